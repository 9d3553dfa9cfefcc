//! Policies like real ones, of any size, for tests and benchmarks.
//!
//! The kinds follow the filter sets that packet classifiers are commonly measured with (Taylor, Turner: ClassBench,
//! 2007): what matters to a search structure is how prefixes nest and how often a field is a wildcard.

use std::{
    cmp::Reverse,
    net::{Ipv4Addr, Ipv6Addr},
};

use cnsmo_proto::model::{Action, Direction, IcmpMatch, Name, PortRange, Protocol, Rule, protocol};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::random::Random;
use crate::effective::{Effective, OwnedRule};

/// A kind of policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Security groups: one remote prefix, one local host, one TCP port.
    Groups,
    /// Access lists: prefixes of a hierarchy on both sides, mostly exact services, few wildcards.
    Acl,
    /// Perimeter firewalls: wildcards and port ranges, many rules overlap.
    Firewall,
}

impl Style {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Groups, Self::Acl, Self::Firewall];
}

/// The family of a sample's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressFamily {
    /// IPv4.
    V4,
    /// IPv6, with prefixes nested as those of the IPv4 sample.
    V6,
}

impl AddressFamily {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];
}

/// A policy of `rules` rules, the same for the same seed. One of eight is egress. Lists and firewalls have narrow
/// prefixes first, as operators write them: behind a wide one most rules would never be reached.
pub fn policy(style: Style, family: AddressFamily, rules: usize, seed: u64) -> Effective {
    let mut random = Random::new(seed);
    let mut generator = Generator::new(family, &mut random);
    let make = |n| {
        let direction = if n % 8 == 7 { Direction::Egress } else { Direction::Ingress };
        let (remote, local, protocol) = match style {
            Style::Groups => generator.groups(&mut random),
            Style::Acl => generator.acl(&mut random),
            Style::Firewall => generator.firewall(&mut random),
        };
        let (from, to) = match direction {
            Direction::Ingress => (remote, local),
            Direction::Egress => (local, remote),
        };
        let action = if random.one_in(3) { Action::Deny } else { Action::Allow };
        Rule { action, from, to, protocol, ..rule(n, direction) }
    };
    let mut rules: Vec<_> = (0..rules).map(make).collect();
    if style != Style::Groups {
        rules.sort_by_cached_key(|rule| Reverse(specificity(rule)));
    }
    effective(rules)
}

/// Bits of both prefixes.
fn specificity(rule: &Rule) -> u32 {
    rule.from.iter().chain(&rule.to).map(|net| u32::from(net.prefix_len())).sum()
}

/// These rules as one policy called `sample`.
pub fn effective(rules: Vec<Rule>) -> Effective {
    let policy = Some(name("sample"));
    let own = |rule| OwnedRule { policy: policy.clone(), rule, audit: false };
    Effective {
        open: false,
        ingress: Action::Deny,
        egress: Action::Allow,
        audit: [false; 2],
        rules: rules.into_iter().map(own).collect(),
        timeouts: Default::default(),
        orphans_pass: false,
        tunnel: None,
        balancers: Vec::new(),
    }
}

/// A rule called `r<n>` that allows everything in one direction.
pub fn rule(n: usize, direction: Direction) -> Rule {
    Rule::new(name(&format!("r{n}")), Action::Allow, direction)
}

/// Remote networks, local networks, and protocol of a rule.
type Sides = (Vec<IpNet>, Vec<IpNet>, Protocol);

const SERVICES: [u16; 12] = [22, 25, 53, 80, 110, 123, 143, 389, 443, 993, 3306, 5432];

struct Generator {
    family: AddressFamily,
    /// Networks that other prefixes lie in.
    sites: Vec<u32>,
}

impl Generator {
    fn new(family: AddressFamily, random: &mut Random) -> Self {
        Self { family, sites: (0..64).map(|_| random.bits() as u32).collect() }
    }

    fn groups(&mut self, random: &mut Random) -> Sides {
        let remote = self.net(random.bits() as u32, 16 + random.below(17) as u8);
        let local = self.net(0x0a00_0000 | (random.bits() as u32 & 0xf_ffff), 32);
        let port = random.below(1_024) as u16;
        (vec![remote], vec![local], ports(protocol::TCP, vec![], vec![range(port, port)]))
    }

    fn acl(&mut self, random: &mut Random) -> Sides {
        let remote = if random.one_in(50) { vec![] } else { vec![self.nested(random)] };
        let local = if random.one_in(50) { vec![] } else { vec![self.nested(random)] };
        let protocol = match random.below(20) {
            0 => Protocol::Any,
            1 => self.icmp(random),
            2..6 => ports(protocol::UDP, vec![], vec![service(random)]),
            6 => ports(protocol::TCP, vec![], vec![]),
            7 => {
                let first = random.below(60_000) as u16;
                ports(protocol::TCP, vec![], vec![range(first, first + random.below(5_000) as u16)])
            }
            _ => ports(protocol::TCP, vec![], vec![service(random)]),
        };
        (remote, local, protocol)
    }

    fn firewall(&mut self, random: &mut Random) -> Sides {
        let mut side = |wild: usize| {
            if random.below(100) < wild { vec![] } else { vec![self.nested(random)] }
        };
        let (remote, local) = (side(35), side(15));
        let high = || range(1_024, u16::MAX);
        let any = random.bits() as u16;
        let protocol = match random.below(20) {
            0 => Protocol::Any,
            1 => self.icmp(random),
            2 => Protocol::Other(47),
            3..5 => ports(protocol::TCP, vec![], vec![high()]),
            5..7 => ports(protocol::UDP, vec![high()], vec![service(random)]),
            7..10 => ports(protocol::TCP, vec![high()], vec![service(random)]),
            10..12 => ports(protocol::TCP, vec![service(random)], vec![]),
            12..14 => ports(protocol::UDP, vec![], vec![range(any, any)]),
            _ => ports(protocol::TCP, vec![], vec![range(any, any)]),
        };
        (remote, local, protocol)
    }

    fn icmp(&self, random: &mut Random) -> Protocol {
        let (number, kinds) = match self.family {
            AddressFamily::V4 => (protocol::ICMP, [0, 3, 8, 11]),
            AddressFamily::V6 => (protocol::ICMPV6, [1, 3, 128, 129]),
        };
        let code = random.one_in(2).then_some(0);
        Protocol::Icmp { number, types: vec![IcmpMatch { kind: *random.of(&kinds), code }] }
    }

    /// A network of any size in one of the sites; the deeper, the more of them.
    fn nested(&self, random: &mut Random) -> IpNet {
        let site = *random.of(&self.sites);
        let length = *random.of(&[8, 12, 16, 20, 22, 24, 24, 26, 28, 30, 32, 32, 32, 32]);
        self.net((site & 0xffff_0000) | (random.bits() as u32 & 0xffff), length)
    }

    /// IPv6: the bits of the IPv4 address follow 2001:db8::/32; a host is a /64 or one address in it.
    fn net(&self, address: u32, length: u8) -> IpNet {
        match self.family {
            AddressFamily::V4 => {
                Ipv4Net::new_assert(Ipv4Addr::from(address), length).trunc().into()
            }
            AddressFamily::V6 => {
                let host = u64::from(address).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let length = match length {
                    32 if host >> 40 & 1 == 0 => 128,
                    length => 32 + length,
                };
                let subnet = 0x2001_0db8 << 96 | u128::from(address) << 64;
                Ipv6Net::new_assert(Ipv6Addr::from(subnet | u128::from(host)), length)
                    .trunc()
                    .into()
            }
        }
    }
}

fn ports(number: u8, source: Vec<PortRange>, destination: Vec<PortRange>) -> Protocol {
    Protocol::Ports { number, source, destination }
}

fn service(random: &mut Random) -> PortRange {
    let port = *random.of(&SERVICES);
    range(port, port)
}

fn range(first: u16, last: u16) -> PortRange {
    PortRange::new(first, last).expect("generated in order")
}

fn name(text: &str) -> Name {
    Name::new(text).expect("a DNS label")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_depends_on_its_arguments_alone() {
        for style in Style::ALL {
            for family in AddressFamily::ALL {
                let sample = policy(style, family, 64, 3);
                assert_eq!(sample.rules.len(), 64);
                assert_eq!(sample, policy(style, family, 64, 3));
                assert_ne!(sample, policy(style, family, 64, 4));
            }
        }
    }
}
