//! The linear matcher: what a policy means, in the plainest form.

use std::net::IpAddr;

use cnsmo_proto::model::{PortRange, Protocol, Rule, protocol};
use ipnet::IpNet;

use super::trace::Header;
use crate::effective::Effective;

/// Index of the first rule that matches. Takes time in proportion to the rules: the compiler, the walker and the kernel
/// are compared with this, packets are not judged by it.
pub fn first_match(policy: &Effective, header: &Header) -> Option<u32> {
    let place = policy.rules.iter().position(|owned| matches(&owned.rule, header))?;
    u32::try_from(place).ok()
}

/// As [`first_match`], of each header, in one pass over the rules: those of a large policy are in no cache.
pub fn first_matches(policy: &Effective, headers: &[Header]) -> Vec<Option<u32>> {
    let mut found = vec![None; headers.len()];
    let mut open: Vec<usize> = (0..headers.len()).collect();
    for (index, owned) in (0..).zip(&policy.rules) {
        open.retain(|&n| {
            let is_first = matches(&owned.rule, &headers[n]);
            if is_first {
                found[n] = Some(index);
            }
            !is_first
        });
    }
    found
}

/// The cheapest questions first.
fn matches(rule: &Rule, header: &Header) -> bool {
    rule.direction == header.direction
        && header.src.is_ipv4() == header.dst.is_ipv4()
        && protocol_matches(&rule.protocol, header)
        && any_contains(&rule.from, header.src)
        && any_contains(&rule.to, header.dst)
}

fn protocol_matches(protocol: &Protocol, header: &Header) -> bool {
    match protocol {
        Protocol::Any => true,
        Protocol::Other(number) => *number == header.proto,
        Protocol::Ports { number, source, destination } => {
            let within =
                |port: u16| move |range: &PortRange| range.first() <= port && port <= range.last();
            *number == header.proto
                && (source.is_empty() || source.iter().any(within(header.sport)))
                && (destination.is_empty() || destination.iter().any(within(header.dport)))
        }
        Protocol::Icmp { number, types } => {
            let [kind, code] = header.dport.to_be_bytes();
            let family = if header.src.is_ipv4() { protocol::ICMP } else { protocol::ICMPV6 };
            *number == header.proto
                && *number == family
                && (types.is_empty()
                    || types.iter().any(|t| t.kind == kind && t.code.is_none_or(|c| c == code)))
        }
    }
}

/// An empty list is any.
fn any_contains(nets: &[IpNet], address: IpAddr) -> bool {
    nets.is_empty() || nets.iter().any(|net| contains(net, address))
}

/// Policies of any size are judged by this before they go live: unlike the one of ipnet, it can be inlined.
fn contains(net: &IpNet, address: IpAddr) -> bool {
    let equal = match (net, address) {
        (IpNet::V4(net), IpAddr::V4(address)) => {
            (net.addr().to_bits() ^ address.to_bits()).leading_zeros()
        }
        (IpNet::V6(net), IpAddr::V6(address)) => {
            (net.addr().to_bits() ^ address.to_bits()).leading_zeros()
        }
        (IpNet::V4(_), IpAddr::V6(_)) | (IpNet::V6(_), IpAddr::V4(_)) => return false,
    };
    equal >= u32::from(net.prefix_len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::{
        sample::{self, AddressFamily, Style},
        trace,
    };

    #[test]
    fn a_network_contains_what_ipnet_says() {
        for net in
            ["0.0.0.0/0", "192.0.2.0/31", "192.0.2.77/24", "192.0.2.1/32", "::/0", "2001:db8::/33"]
        {
            let net: IpNet = net.parse().unwrap();
            for address in [
                "0.0.0.0",
                "192.0.2.1",
                "192.0.2.255",
                "192.0.3.0",
                "::",
                "2001:db8:8000::",
                "2001:db8::1",
            ] {
                let address: IpAddr = address.parse().unwrap();
                assert_eq!(contains(&net, address), net.contains(&address), "{net} {address}");
            }
        }
    }

    #[test]
    fn one_pass_finds_what_many_find() {
        for family in AddressFamily::ALL {
            let policy = sample::policy(Style::Firewall, family, 200, 4);
            let headers = trace::headers(&policy, 1_000, 5);
            let each: Vec<_> = headers.iter().map(|header| first_match(&policy, header)).collect();
            assert_eq!(first_matches(&policy, &headers), each);
        }
    }
}
