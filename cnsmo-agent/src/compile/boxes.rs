//! A policy as boxes: each rule is the product of its networks and ports.

use cnsmo_proto::model::{Direction, IcmpMatch, PortRange, Protocol, Rule, protocol};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{
    Breach, Budget,
    family::{Family, Range, RuleBox, V4, V6},
};
use crate::effective::Effective;

/// Boxes of one VM, both families and directions together. Bounds memory while compiling to some 250 MB, and is eight
/// times the rules of the largest policy.
pub const BOXES_MAX: usize = 1 << 20;

/// In the order of their rules; the first list is ingress, the second egress.
#[derive(Default)]
pub(super) struct Boxes {
    pub(super) v4: [Vec<RuleBox<5>>; 2],
    pub(super) v6: [Vec<RuleBox<7>>; 2],
}

/// Expands all rules, or says how many boxes each rule would be.
pub(super) fn expand(policy: &Effective) -> Result<Boxes, Breach> {
    let mut boxes = Boxes::default();
    let mut shares = Vec::with_capacity(policy.rules.len());
    let mut total = 0usize;
    for (index, owned) in policy.rules.iter().enumerate() {
        let index = index as u32;
        let sides = Sides::of(&owned.rule);
        let count = sides.count();
        total = total.saturating_add(count);
        shares.push((index, count));
        // Past the limit only the counting goes on.
        if total <= BOXES_MAX {
            let direction = direction_index(owned.rule.direction);
            sides.push(index, &mut boxes.v4[direction], &mut boxes.v6[direction]);
        }
    }
    if total > BOXES_MAX {
        return Err(Breach { budget: Budget::Boxes { total }, shares });
    }
    Ok(boxes)
}

/// Place of a direction in pairs.
pub(super) fn direction_index(direction: Direction) -> usize {
    match direction {
        Direction::Ingress => 0,
        Direction::Egress => 1,
    }
}

/// The factors of a rule's product, each without overlaps.
struct Sides {
    v4: [Vec<Ipv4Net>; 2],
    v6: [Vec<Ipv6Net>; 2],
    sports: Vec<Range>,
    dports: Vec<Range>,
    proto: Range,
}

impl Sides {
    fn of(rule: &Rule) -> Self {
        let (sports, dports) = match &rule.protocol {
            Protocol::Any | Protocol::Other(_) => (any_port(), any_port()),
            Protocol::Ports { source, destination, .. } => {
                let range = |r: &PortRange| (u64::from(r.first()), u64::from(r.last()));
                let ranges = |list: &[PortRange]| merge(list.iter().map(range).collect());
                (ranges(source), ranges(destination))
            }
            Protocol::Icmp { types, .. } => {
                let range = |t: &IcmpMatch| {
                    let first = u64::from(t.kind) << 8;
                    t.code.map_or((first, first | 0xff), |code| {
                        (first | u64::from(code), first | u64::from(code))
                    })
                };
                (any_port(), merge(types.iter().map(range).collect()))
            }
        };
        let number = rule.protocol.number();
        let icmp = matches!(rule.protocol, Protocol::Icmp { .. });
        let has = |family: u8| !icmp || number == Some(family);
        let sides = [&rule.from, &rule.to];
        Self {
            v4: if has(protocol::ICMP) {
                sides.map(|nets| networks4(nets))
            } else {
                [vec![], vec![]]
            },
            v6: if has(protocol::ICMPV6) {
                sides.map(|nets| networks6(nets))
            } else {
                [vec![], vec![]]
            },
            sports,
            dports,
            proto: number.map_or((0, u8::MAX.into()), |n| (n.into(), n.into())),
        }
    }

    fn count(&self) -> usize {
        let pairs = self.v4[0].len() * self.v4[1].len() + self.v6[0].len() * self.v6[1].len();
        pairs.saturating_mul(self.sports.len() * self.dports.len())
    }

    fn push(&self, index: u32, v4: &mut Vec<RuleBox<5>>, v6: &mut Vec<RuleBox<7>>) {
        for &sport in &self.sports {
            for &dport in &self.dports {
                let lanes = [sport, dport, self.proto];
                product::<V4, 5>(&self.v4, lanes, index, v4);
                product::<V6, 7>(&self.v6, lanes, index, v6);
            }
        }
    }
}

fn product<F: Family<D>, const D: usize>(
    [from, to]: &[Vec<F::Net>; 2],
    lanes: [Range; 3],
    index: u32,
    boxes: &mut Vec<RuleBox<D>>,
) {
    for &src in from {
        boxes.extend(to.iter().map(|&dst| F::rule_box(src, dst, lanes, index)));
    }
}

fn any_port() -> Vec<Range> {
    vec![(0, u16::MAX.into())]
}

/// Joins ranges that overlap or meet; none is any.
fn merge(mut ranges: Vec<Range>) -> Vec<Range> {
    if ranges.is_empty() {
        return any_port();
    }
    ranges.sort_unstable();
    ranges.dedup_by(|next, kept| {
        let joined = next.0 <= kept.1 + 1;
        if joined {
            kept.1 = kept.1.max(next.1);
        }
        joined
    });
    ranges
}

/// The IPv4 networks of a list, the fewest that match the same; an empty list is any.
fn networks4(nets: &[IpNet]) -> Vec<Ipv4Net> {
    if nets.is_empty() {
        return vec![Ipv4Net::default()];
    }
    let mut of_family = Vec::new();
    of_family.extend(nets.iter().filter_map(|net| match net {
        IpNet::V4(net) => Some(*net),
        IpNet::V6(_) => None,
    }));
    if of_family.len() > 1 { Ipv4Net::aggregate(&of_family) } else { of_family }
}

/// As [`networks4`].
fn networks6(nets: &[IpNet]) -> Vec<Ipv6Net> {
    if nets.is_empty() {
        return vec![Ipv6Net::default()];
    }
    let mut of_family = Vec::new();
    of_family.extend(nets.iter().filter_map(|net| match net {
        IpNet::V4(_) => None,
        IpNet::V6(net) => Some(*net),
    }));
    if of_family.len() > 1 { Ipv6Net::aggregate(&of_family) } else { of_family }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::sample::{effective, rule};

    #[test]
    fn a_rule_is_the_product_of_its_merged_sides() {
        let mut rule = rule(0, Direction::Ingress);
        rule.from = ["10.0.0.0/25", "10.0.0.128/25", "192.0.2.1/32", "2001:db8::/32"]
            .map(|net| net.parse().unwrap())
            .into();
        let range = |first, last| PortRange::new(first, last).unwrap();
        rule.protocol = Protocol::Ports {
            number: protocol::TCP,
            source: vec![],
            destination: vec![range(443, 443), range(80, 90), range(91, 99), range(85, 86)],
        };
        let boxes = expand(&effective(vec![rule])).unwrap();
        // 10.0.0.0/24 and 192.0.2.1 with 80-99 and 443.
        assert_eq!(boxes.v4[0].len(), 4);
        assert_eq!(boxes.v6[0].len(), 2);
        assert!(boxes.v4[1].is_empty() && boxes.v6[1].is_empty());
        let first = &boxes.v4[0][0];
        assert_eq!(first.low, [0x0a00_0000, 0, 0, 80, 6]);
        assert_eq!(first.high, [0x0a00_00ff, u32::MAX.into(), 65_535, 99, 6]);
    }

    #[test]
    fn icmp_types_are_ranges_and_belong_to_one_family() {
        for (number, v4, v6) in [(protocol::ICMP, 2, 0), (protocol::ICMPV6, 0, 2)] {
            let mut rule = rule(0, Direction::Egress);
            let one = |kind, code| IcmpMatch { kind, code };
            rule.protocol = Protocol::Icmp {
                number,
                types: vec![one(8, None), one(9, Some(0)), one(3, Some(4))],
            };
            let boxes = expand(&effective(vec![rule])).unwrap();
            assert_eq!((boxes.v4[1].len(), boxes.v6[1].len()), (v4, v6));
            let ports = boxes.v4[1].iter().map(|b| (b.low[3], b.high[3]));
            let ports6 = boxes.v6[1].iter().map(|b| (b.low[5], b.high[5]));
            assert!(ports.chain(ports6).eq([(0x304, 0x304), (0x800, 0x900)]));
        }
    }

    #[test]
    fn too_many_boxes_are_counted_and_not_built() {
        let mut wide = rule(1, Direction::Ingress);
        let nets = |first: u8| -> Vec<IpNet> {
            (0..2_048u32)
                .map(|n| Ipv4Net::new_assert((u32::from(first) << 24 | n << 9).into(), 32).into())
                .collect()
        };
        (wide.from, wide.to) = (nets(10), nets(11));
        let breach = expand(&effective(vec![rule(0, Direction::Ingress), wide])).err().unwrap();
        assert_eq!(breach.budget, Budget::Boxes { total: 2 + 2_048 * 2_048 });
        assert_eq!(breach.shares, [(0, 2), (1, 2_048 * 2_048)]);
    }
}
