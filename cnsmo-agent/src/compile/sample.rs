//! Policies like real ones, of any size, for tests and benchmarks.
//!
//! The kinds follow the filter sets that packet classifiers are commonly measured with (Taylor, Turner: ClassBench: A Packet
//! Classification Benchmark, IEEE/ACM Transactions on Networking 15(3), 2007): what matters to a search structure is how
//! prefixes nest and how often a field is a wildcard. Some more are there to be hard for it.

use std::{
    cmp::Reverse,
    net::{Ipv4Addr, Ipv6Addr},
};

use cnsmo_proto::model::{Action, Direction, IcmpMatch, Name, PortRange, Protocol, Rule, protocol};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::random::Random;
use crate::effective::{Effective, OwnedRule};

/// A kind of policy. `acl`, `fw` and `ipc` are the names of ClassBench's seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Security groups: one remote prefix, one local host, one TCP port.
    Groups,
    /// Access lists (`acl`): prefixes of a hierarchy on both sides, mostly exact services, few wildcards.
    Acl,
    /// Perimeter firewalls (`fw`): wildcards and port ranges, many rules overlap.
    Firewall,
    /// Decision trees of IP chains (`ipc`), which filter, translate and open tunnels in one list: partly as access lists,
    /// partly as firewalls, and pairs of hosts whatever they say to each other.
    Chains,
    /// Adversarial: firewalls whose rules are about the same few networks, however many rules there are.
    Crowded,
    /// Adversarial: unrelated prefixes of any length, and ranges of both ports that overlap at random.
    Scattered,
    /// Adversarial: half of the rules are from one host to anywhere, half from anywhere to one host. Every two rules of
    /// different halves overlap.
    Cross,
    /// Adversarial: ranges of both ports around one point, the narrowest first. Each end divides all that are wider.
    Nested,
}

impl Style {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Groups,
        Self::Acl,
        Self::Firewall,
        Self::Chains,
        Self::Crowded,
        Self::Scattered,
        Self::Cross,
        Self::Nested,
    ];

    /// Whether no operator writes such policies.
    pub const fn is_adversarial(self) -> bool {
        matches!(self, Self::Crowded | Self::Scattered | Self::Cross | Self::Nested)
    }

    /// A short word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Groups => "groups",
            Self::Acl => "acl",
            Self::Firewall => "fw",
            Self::Chains => "ipc",
            Self::Crowded => "crowded",
            Self::Scattered => "scattered",
            Self::Cross => "cross",
            Self::Nested => "nested",
        }
    }
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

/// A policy of `rules` rules, the same for the same seed. One of eight is egress. All but groups have narrow prefixes
/// first, as operators write them: behind a wide one most rules would never be reached.
pub fn policy(style: Style, family: AddressFamily, rules: usize, seed: u64) -> Effective {
    let mut random = Random::new(seed);
    let sites = match style {
        Style::Crowded => SITES_MIN,
        _ => SITES_MIN.max(rules / RULES_PER_SITE),
    };
    let mut generator = Generator::new(family, sites, &mut random);
    let make = |n| {
        let direction = if n % 8 == 7 { Direction::Egress } else { Direction::Ingress };
        let (remote, local, protocol) = match style {
            Style::Groups => generator.groups(&mut random),
            Style::Acl => generator.acl(&mut random),
            Style::Firewall | Style::Crowded => generator.firewall(&mut random),
            Style::Chains => generator.chains(&mut random),
            Style::Scattered => generator.scattered(&mut random),
            Style::Cross => generator.cross(n, &mut random),
            Style::Nested => generator.nested_ranges(n),
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

/// A longer list is about more networks, not more about each.
const RULES_PER_SITE: usize = 64;
const SITES_MIN: usize = 64;
/// Ranges around one point that one host has.
const NESTED: usize = 100;

struct Generator {
    family: AddressFamily,
    /// Networks that other prefixes lie in.
    sites: Vec<u32>,
}

impl Generator {
    fn new(family: AddressFamily, sites: usize, random: &mut Random) -> Self {
        Self { family, sites: (0..sites).map(|_| random.bits() as u32).collect() }
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

    fn chains(&mut self, random: &mut Random) -> Sides {
        match random.below(20) {
            0..9 => self.acl(random),
            9..17 => self.firewall(random),
            _ => {
                let mut host = || {
                    let site = *random.of(&self.sites);
                    vec![self.net((site & 0xffff_0000) | (random.bits() as u32 & 0xffff), 32)]
                };
                (host(), host(), Protocol::Any)
            }
        }
    }

    fn scattered(&self, random: &mut Random) -> Sides {
        let mut ends = || {
            let (a, b) = (random.bits() as u16, random.bits() as u16);
            vec![range(a.min(b), a.max(b))]
        };
        let protocol = ports(protocol::TCP, ends(), ends());
        (vec![self.anywhere(random)], vec![self.anywhere(random)], protocol)
    }

    fn cross(&self, n: usize, random: &mut Random) -> Sides {
        let host = vec![self.net(random.bits() as u32, 32)];
        // Whole bits of the number, not its lowest: one of eight rules is of the other direction.
        if (n / 8).is_multiple_of(2) {
            (host, vec![], Protocol::Any)
        } else {
            (vec![], host, Protocol::Any)
        }
    }

    /// [`NESTED`] ranges for each local host.
    fn nested_ranges(&self, n: usize) -> Sides {
        let host = vec![self.net(0x0a00_0000 | (n / NESTED) as u32, 32)];
        let width = (n % NESTED) as u16 * 160;
        let around = || vec![range(32_000 - width, 32_000 + width)];
        (vec![], host, ports(protocol::UDP, around(), around()))
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

    /// Not in a site.
    fn anywhere(&self, random: &mut Random) -> IpNet {
        match self.family {
            AddressFamily::V4 => {
                let address = Ipv4Addr::from(random.bits() as u32);
                Ipv4Net::new_assert(address, 4 + random.below(29) as u8).trunc().into()
            }
            AddressFamily::V6 => {
                let address = 0x2 << 124 | random.bits128() >> 4;
                Ipv6Net::new_assert(address.into(), 8 + random.below(121) as u8).trunc().into()
            }
        }
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
