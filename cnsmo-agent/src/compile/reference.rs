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
    nets.is_empty() || nets.iter().any(|net| net.contains(&address))
}
