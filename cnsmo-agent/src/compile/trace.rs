//! Headers on which two judges of a policy would differ if either were wrong.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cnsmo_proto::model::{Direction, PortRange, Protocol, Rule, protocol};
use ipnet::IpNet;

use super::random::Random;
use crate::effective::Effective;

/// What rules ask about a packet. Both addresses are of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Header {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Source port; 0 for protocols without ports.
    pub sport: u16,
    /// Destination port; ICMP: type << 8 | code.
    pub dport: u16,
    /// IANA number.
    pub proto: u8,
    /// As seen from the VM.
    pub direction: Direction,
}

/// Returns `count` headers, the same for the same seed: six of ten on the edges of rules and one step outside, three
/// inside rules, one with the fields of several rules or of none.
///
/// Rules are taken evenly from the whole list, so that each one is seen if `count` is some thirty times their number.
pub fn headers(policy: &Effective, count: usize, seed: u64) -> Vec<Header> {
    let mut random = Random::new(seed);
    let mut headers = Vec::with_capacity(count + HEADERS_PER_AREA);
    let rules: Vec<&Rule> = policy.rules.iter().map(|owned| &owned.rule).collect();
    if !rules.is_empty() {
        let areas = (count * 6 / 10).div_ceil(HEADERS_PER_AREA);
        for n in 0..areas {
            // Evenly spaced; more areas than rules: each in turn, with other networks and ports.
            let at = if areas < rules.len() { n * rules.len() / areas } else { n % rules.len() };
            Area::of(rules[at], &mut random).edges(&mut random, &mut headers);
        }
        headers.truncate(count * 6 / 10);
        while headers.len() < count * 9 / 10 {
            let rule = rules[random.below(rules.len())];
            headers.push(Area::of(rule, &mut random).inside(&mut random));
        }
    }
    while headers.len() < count {
        headers.push(stray(&rules, &mut random));
    }
    headers
}

/// Returns `count` headers as traffic brings them, the same for the same seed: nine of ten anywhere inside of a rule taken
/// at random, one with the fields of several rules or of none.
pub fn traffic(policy: &Effective, count: usize, seed: u64) -> Vec<Header> {
    let mut random = Random::new(seed);
    let rules: Vec<&Rule> = policy.rules.iter().map(|owned| &owned.rule).collect();
    let one = |_| {
        if rules.is_empty() || random.one_in(10) {
            return stray(&rules, &mut random);
        }
        let rule = rules[random.below(rules.len())];
        Area::of(rule, &mut random).inside(&mut random)
    };
    (0..count).map(one).collect()
}

const DIMENSIONS: usize = 5;
/// The lowest and the highest corner, and per side a point on it and one a step outside.
const HEADERS_PER_AREA: usize = 2 + DIMENSIONS * 4;

/// One combination of a rule's networks and ports: ranges of source, destination, ports and protocol.
struct Area {
    ranges: [(u128, u128); DIMENSIONS],
    v4: bool,
    direction: Direction,
}

impl Area {
    fn of(rule: &Rule, random: &mut Random) -> Self {
        let v4 = family(rule, random);
        let ((sport, dport), proto) = (ports(&rule.protocol, random), rule.protocol.number());
        let proto = match proto {
            Some(number) => (number.into(), number.into()),
            None => (0, u8::MAX.into()),
        };
        let (src, dst) = (network(&rule.from, v4, random), network(&rule.to, v4, random));
        Self { ranges: [src, dst, sport, dport, proto], v4, direction: rule.direction }
    }

    /// The highest value of each dimension.
    fn limits(v4: bool) -> [u128; DIMENSIONS] {
        let address = if v4 { u32::MAX.into() } else { u128::MAX };
        [address, address, u16::MAX.into(), u16::MAX.into(), u8::MAX.into()]
    }

    fn header(&self, point: [u128; DIMENSIONS]) -> Header {
        let address = |bits: u128| -> IpAddr {
            if self.v4 { Ipv4Addr::from(bits as u32).into() } else { Ipv6Addr::from(bits).into() }
        };
        let [src, dst, sport, dport, proto] = point;
        Header {
            src: address(src),
            dst: address(dst),
            sport: sport as u16,
            dport: dport as u16,
            proto: proto as u8,
            direction: self.direction,
        }
    }

    fn edges(&self, random: &mut Random, headers: &mut Vec<Header>) {
        headers.push(self.header(self.ranges.map(|r| r.0)));
        headers.push(self.header(self.ranges.map(|r| r.1)));
        for (d, limit) in Self::limits(self.v4).into_iter().enumerate() {
            let (low, high) = self.ranges[d];
            let outside = [low.checked_sub(1), high.checked_add(1).filter(|n| *n <= limit)];
            for value in [Some(low), Some(high)].into_iter().chain(outside).flatten() {
                let mut point = self.ranges.map(|r| if random.one_in(2) { r.0 } else { r.1 });
                point[d] = value;
                headers.push(self.header(point));
            }
        }
    }

    fn inside(&self, random: &mut Random) -> Header {
        self.header(self.ranges.map(|(low, high)| random.within(low, high)))
    }
}

/// Each field from another rule, or from everywhere.
fn stray(rules: &[&Rule], random: &mut Random) -> Header {
    let v4 = random.one_in(2);
    let direction = if random.one_in(2) { Direction::Ingress } else { Direction::Egress };
    let mut ranges = Area::limits(v4).map(|limit| (0, limit));
    for (d, range) in ranges.iter_mut().enumerate() {
        if rules.is_empty() || random.one_in(4) {
            continue;
        }
        let area = Area::of(rules[random.below(rules.len())], random);
        if area.v4 == v4 {
            *range = area.ranges[d];
        }
    }
    Area { ranges, v4, direction }.inside(random)
}

/// Whether a header of this rule is IPv4; a rule can be for both.
fn family(rule: &Rule, random: &mut Random) -> bool {
    let has = |v4: bool| {
        let lists =
            |nets: &[IpNet]| nets.is_empty() || nets.iter().any(|n| n.addr().is_ipv4() == v4);
        let number = if v4 { protocol::ICMPV6 } else { protocol::ICMP };
        lists(&rule.from) && lists(&rule.to) && rule.protocol.number() != Some(number)
    };
    if has(true) && has(false) { random.one_in(2) } else { has(true) }
}

fn network(nets: &[IpNet], v4: bool, random: &mut Random) -> (u128, u128) {
    let of_family: Vec<&IpNet> = nets.iter().filter(|n| n.addr().is_ipv4() == v4).collect();
    if of_family.is_empty() {
        return (0, Area::limits(v4)[0]);
    }
    match random.of(&of_family) {
        IpNet::V4(n) => (n.network().to_bits().into(), n.broadcast().to_bits().into()),
        IpNet::V6(n) => (n.network().to_bits(), n.broadcast().to_bits()),
    }
}

/// A range of source ports, and one of destination ports or ICMP types.
fn ports(protocol: &Protocol, random: &mut Random) -> ((u128, u128), (u128, u128)) {
    const ANY: (u128, u128) = (0, u16::MAX as u128);
    match protocol {
        Protocol::Any | Protocol::Other(_) => (ANY, ANY),
        Protocol::Ports { source, destination, .. } => {
            let mut one = |list: &[PortRange]| match list {
                [] => ANY,
                list => {
                    let range = random.of(list);
                    (range.first().into(), range.last().into())
                }
            };
            (one(source), one(destination))
        }
        Protocol::Icmp { types, .. } if types.is_empty() => ((0, 0), ANY),
        Protocol::Icmp { types, .. } => {
            let t = random.of(types);
            let first = u128::from(t.kind) << 8;
            let codes = t.code.map_or((first, first | 0xff), |code| {
                let value = first | u128::from(code);
                (value, value)
            });
            ((0, 0), codes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::{
        reference::first_match,
        sample::{AddressFamily, Style, policy},
    };

    #[test]
    fn headers_depend_on_the_seed_alone_and_fill_the_count() {
        let policy = policy(Style::Acl, AddressFamily::V6, 100, 1);
        let first = headers(&policy, 1_000, 7);
        assert_eq!(first.len(), 1_000);
        assert_eq!(first, headers(&policy, 1_000, 7));
        assert_ne!(first, headers(&policy, 1_000, 8));
    }

    #[test]
    fn traffic_is_in_rules_mostly() {
        let policy = policy(Style::Groups, AddressFamily::V4, 100, 1);
        let traffic = traffic(&policy, 1_000, 7);
        assert_eq!(traffic.len(), 1_000);
        let met = traffic.iter().filter(|header| first_match(&policy, header).is_some()).count();
        assert!((850..990).contains(&met), "{met} of 1,000 meet a rule");
    }

    #[test]
    fn most_rules_are_met_and_some_headers_meet_none() {
        let policy = policy(Style::Groups, AddressFamily::V4, 100, 1);
        let verdicts: Vec<_> =
            headers(&policy, 3_000, 7).iter().map(|header| first_match(&policy, header)).collect();
        let met: std::collections::BTreeSet<_> = verdicts.iter().flatten().collect();
        assert!(met.len() >= 95, "{} of 100 rules", met.len());
        assert!(verdicts.iter().filter(|verdict| verdict.is_none()).count() > 300);
    }

    #[test]
    fn without_rules_there_are_still_headers_of_both_families_and_directions() {
        let headers = headers(&crate::compile::sample::effective(vec![]), 100, 7);
        for (v4, direction) in [
            (true, Direction::Ingress),
            (true, Direction::Egress),
            (false, Direction::Ingress),
            (false, Direction::Egress),
        ] {
            let of = |h: &&Header| h.src.is_ipv4() == v4 && h.direction == direction;
            assert!(headers.iter().any(|h| of(&h)));
        }
    }
}
