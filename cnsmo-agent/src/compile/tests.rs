use cnsmo_common::blob::{LEAF_RULES_MAX, TREES_MAX};
use cnsmo_proto::model::{Direction, IcmpMatch, PortRange, Protocol, Rule, protocol};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::{collection::vec, prelude::*};

use super::{
    reference::first_match,
    sample::{AddressFamily, Style, effective, rule},
    trace::headers,
    *,
};

const ROOMY: Limits = Limits { blob_words: 8 << 20, rules: 1 << 20 };

/// Compiles, checks the bounds, and compares the walk with the reference.
fn assert_agrees(policy: &Effective, count: usize) -> Compiled {
    let compiled = compile(policy, &ROOMY).unwrap();
    assert_within_bounds(&compiled);
    let wrong = headers(policy, count, 11).par_iter().find_map_first(|header| {
        let expected = Some(first_match(policy, header).unwrap_or(NO_RULE));
        let walked = compiled.classify(header);
        (walked != expected).then(|| format!("{header:?}: {walked:?}, expected {expected:?}"))
    });
    assert_eq!(wrong, None, "{} rules", policy.rules.len());
    compiled
}

fn assert_within_bounds(compiled: &Compiled) {
    for blob in [&compiled.v4, &compiled.v6] {
        assert!(blob.stats.longest_leaf <= LEAF_RULES_MAX as usize, "{:?}", blob.stats);
        assert!(blob.stats.depth <= DEPTH_MAX, "{:?}", blob.stats);
        assert!(blob.trees.iter().all(|trees| *trees <= TREES_MAX), "{:?}", blob.trees);
        assert!(blob.words.len() <= ROOMY.blob_words);
    }
}

/// Few distinct bits, so that networks nest and overlap.
fn net4() -> impl Strategy<Value = IpNet> {
    (any::<[bool; 4]>(), any::<u8>(), 0u8..=32).prop_map(|(bits, last, length)| {
        let octet = |bit| if bit { 0x81u32 } else { 0x80 };
        let address = bits.into_iter().fold(0, |sum, bit| sum << 8 | octet(bit)) ^ u32::from(last);
        Ipv4Net::new_assert(address.into(), length).trunc().into()
    })
}

fn net6() -> impl Strategy<Value = IpNet> {
    let length = prop_oneof![0u8..=128, 60u8..=68, Just(128), Just(64)];
    (any::<[bool; 8]>(), any::<u16>(), length).prop_map(|(bits, last, length)| {
        let group = |bit| if bit { 0x2001u128 } else { 0x2000 };
        let address =
            bits.into_iter().fold(0, |sum, bit| sum << 16 | group(bit)) ^ u128::from(last);
        Ipv6Net::new_assert(address.into(), length).trunc().into()
    })
}

fn port_range() -> impl Strategy<Value = PortRange> {
    let port = || prop_oneof![0u16..32, Just(u16::MAX), any::<u16>()];
    (port(), port()).prop_map(|(a, b)| PortRange::new(a.min(b), a.max(b)).unwrap())
}

fn icmp_match() -> impl Strategy<Value = IcmpMatch> {
    (prop_oneof![0u8..4, Just(255)], proptest::option::of(prop_oneof![0u8..3, Just(255)]))
        .prop_map(|(kind, code)| IcmpMatch { kind, code })
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let protocol = prop_oneof![
        2 => Just(Protocol::Any),
        6 => (
            prop_oneof![Just(protocol::TCP), Just(protocol::UDP)],
            vec(port_range(), 0..3),
            vec(port_range(), 0..4),
        )
            .prop_map(|(number, source, destination)| Protocol::Ports {
                number,
                source,
                destination
            }),
        2 => (prop_oneof![Just(protocol::ICMP), Just(protocol::ICMPV6)], vec(icmp_match(), 0..4))
            .prop_map(|(number, types)| Protocol::Icmp { number, types }),
        1 => prop_oneof![Just(0u8), Just(47), Just(255)].prop_map(Protocol::Other),
    ];
    let nets = || vec(prop_oneof![net4(), net6()], 0..4);
    let direction = prop_oneof![Just(Direction::Ingress), Just(Direction::Egress)];
    (nets(), nets(), protocol, direction).prop_map(|(from, to, protocol, direction)| Rule {
        from,
        to,
        protocol,
        ..rule(0, direction)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn walk_and_reference_agree_on_any_rules(rules in vec(any_rule(), 0..120)) {
        assert_agrees(&effective(rules), 2_000);
    }

    #[test]
    fn walk_and_reference_agree_on_hosts_and_ports_of_one_direction(
        rules in vec((net4(), net6(), port_range()), 1..400),
    ) {
        let rules = rules.into_iter().map(|(v4, v6, ports)| Rule {
            from: vec![v4, v6],
            protocol: Protocol::Ports {
                number: protocol::TCP, source: vec![], destination: vec![ports],
            },
            ..rule(0, Direction::Ingress)
        });
        assert_agrees(&effective(rules.collect()), 2_000);
    }
}

#[test]
fn no_rules_are_two_empty_directions() {
    let compiled = assert_agrees(&effective(vec![]), 100);
    for blob in [compiled.v4, compiled.v6] {
        assert_eq!(blob.trees, [0, 0]);
        assert_eq!(blob.words, vec![0; 2 * HEADER_WORDS as usize]);
    }
}

#[test]
fn boxes_of_one_rule_share_its_index() {
    let port = |n| PortRange::new(n, n).unwrap();
    let many = Rule {
        protocol: Protocol::Ports {
            number: protocol::TCP,
            source: vec![],
            destination: (0..100).map(|n| port(n * 2)).collect(),
        },
        ..rule(0, Direction::Ingress)
    };
    let compiled = assert_agrees(&effective(vec![many, rule(1, Direction::Ingress)]), 5_000);
    assert_eq!(compiled.v4.stats.boxes, 101);
}

#[test]
fn samples_of_all_kinds_agree() {
    for style in Style::ALL {
        for family in AddressFamily::ALL {
            for (rules, count) in [(10, 1_000), (1_000, 4_000)] {
                assert_agrees(&sample::policy(style, family, rules, 5), count);
            }
        }
    }
}

#[test]
fn ten_thousand_rules_agree() {
    for style in Style::ALL {
        for family in AddressFamily::ALL {
            assert_agrees(&sample::policy(style, family, 10_000, 6), 2_000);
        }
    }
}

#[test]
fn a_hundred_thousand_rules_agree() {
    for family in AddressFamily::ALL {
        assert_agrees(&sample::policy(Style::Acl, family, 100_000, 7), 400);
    }
}

/// Source networks with any destination, and any source with destination networks: every pair overlaps.
#[test]
fn a_cross_of_wildcards_agrees() {
    let host = |n: usize| -> IpNet { Ipv4Net::new_assert((n as u32 * 7_919).into(), 32).into() };
    let rules = (0..10_000).map(|n| {
        let one = rule(n, Direction::Ingress);
        if n % 2 == 0 {
            Rule { from: vec![host(n)], ..one }
        } else {
            Rule { to: vec![host(n)], ..one }
        }
    });
    assert_agrees(&effective(rules.collect()), 1_000);
}

#[test]
fn overlapping_port_ranges_agree() {
    let rules = (0..10_000usize).map(|n| {
        let (first, width) = ((n * 7_919 % 60_000) as u16, (n * 104_729 % 5_000) as u16);
        let other = (n * 31_337 % 60_000) as u16;
        Rule {
            protocol: Protocol::Ports {
                number: protocol::TCP,
                source: vec![PortRange::new(other, other + width).unwrap()],
                destination: vec![PortRange::new(first, first + width).unwrap()],
            },
            ..rule(n, Direction::Egress)
        }
    });
    assert_agrees(&effective(rules.collect()), 1_000);
}

/// Ranges around one point, the narrowest first: none hides another, and each end divides all.
fn nested_ranges(n: u16) -> Effective {
    let rules = (0..n).map(|n| {
        let around = || vec![PortRange::new(30_000 - n, 30_000 + n).unwrap()];
        let protocol =
            Protocol::Ports { number: protocol::UDP, source: around(), destination: around() };
        Rule { protocol, ..rule(n.into(), Direction::Ingress) }
    });
    effective(rules.collect())
}

#[test]
fn nested_ranges_agree() {
    for n in [100, 10_000] {
        assert_agrees(&nested_ranges(n), 1_000);
    }
}

#[test]
fn equal_rules_hide_each_other() {
    let rules = (0..10_000).map(|n| Rule {
        from: vec!["192.0.2.0/24".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
        ..rule(n, Direction::Ingress)
    });
    assert_agrees(&effective(rules.collect()), 500);
}

#[test]
fn compiling_twice_gives_equal_words() {
    for family in AddressFamily::ALL {
        let policy = sample::policy(Style::Firewall, family, 5_000, 9);
        assert!(compile(&policy, &ROOMY).unwrap() == compile(&policy, &ROOMY).unwrap());
    }
}

/// A large policy beside a small one; `built_in` rules before both.
fn two_policies(built_in: usize, small: usize, large: usize) -> Effective {
    let mut policy = sample::policy(Style::Acl, AddressFamily::V4, built_in + small + large, 2);
    for (n, owned) in policy.rules.iter_mut().enumerate() {
        owned.policy = match n {
            n if n < built_in => None,
            n if n < built_in + small => Some(Name::new("small").unwrap()),
            _ => Some(Name::new("large").unwrap()),
        };
    }
    policy
}

fn refused(policy: &Effective, limits: &Limits) -> BTreeMap<Name, String> {
    match compile(policy, limits) {
        Err(Refused::Policies(policies)) => policies,
        Err(built_in @ Refused::BuiltIn(_)) => panic!("{built_in}"),
        Ok(_) => panic!("compiled"),
    }
}

fn assert_blames(refused: &BTreeMap<Name, String>, policy: &str, words: &[&str]) {
    let names: Vec<_> = refused.keys().map(Name::as_str).collect();
    assert_eq!(names, [policy]);
    for word in words {
        assert!(refused.values().all(|reason| reason.contains(word)), "{refused:?} lacks {word}");
    }
}

#[test]
fn too_many_rules_are_refused() {
    let policy = two_policies(5, 10, 100);
    let limits = Limits { rules: 114, ..ROOMY };
    assert_blames(&refused(&policy, &limits), "large", &["115 rules", "114", "100 of them"]);
    compile(&policy, &Limits { rules: 115, ..ROOMY }).unwrap();
}

#[test]
fn too_many_boxes_are_refused_with_the_widest_rule() {
    let mut policy = two_policies(5, 10, 1_000);
    let nets = |first: u32| -> Vec<IpNet> {
        (0..1_024u32)
            .map(|n| Ipv4Net::new_assert((first << 24 | n << 1).into(), 32).into())
            .collect()
    };
    let wide = &mut policy.rules[8];
    (wide.rule.from, wide.rule.to) = (nets(10), nets(11));
    wide.rule.protocol = Protocol::Any;
    wide.rule.name = Name::new("wide").unwrap();
    assert_blames(&refused(&policy, &ROOMY), "small", &["1048576 are allowed", "rule `wide`"]);
}

#[test]
fn a_blob_that_does_not_fit_is_refused_not_cut() {
    let policy = two_policies(5, 10, 1_000);
    let words = compile(&policy, &ROOMY).unwrap().v4.words.len();
    let limits = Limits { blob_words: words - 1, ..ROOMY };
    assert_blames(&refused(&policy, &limits), "large", &["bytes", "of its rule `r"]);
    compile(&policy, &Limits { blob_words: words, ..ROOMY }).unwrap();
}

#[test]
fn built_in_rules_that_do_not_fit_are_no_policys_fault() {
    let policy = two_policies(100, 0, 0);
    let refused = compile(&policy, &Limits { rules: 99, ..ROOMY }).unwrap_err();
    assert!(matches!(refused, Refused::BuiltIn(_)), "{refused:?}");
    assert!(matches!(ApplyError::from(refused), ApplyError::Failed(_)));
}

/// One tree for both kinds would copy each rule of one into the parts of the other.
#[test]
fn a_cross_of_ports_is_separated_further() {
    let rules = (0..4_000u16).map(|n| {
        let port = vec![PortRange::new(n * 16, n * 16).unwrap()];
        let (source, destination) = if n % 2 == 0 { (port, vec![]) } else { (vec![], port) };
        let protocol = Protocol::Ports { number: protocol::TCP, source, destination };
        Rule { protocol, ..rule(n.into(), Direction::Ingress) }
    });
    let compiled = assert_agrees(&effective(rules.collect()), 2_000);
    assert_eq!(compiled.v4.trees, [2, 0], "{:?}", compiled.v4.stats);
}

#[test]
fn a_broken_bound_of_the_trees_names_the_rules() {
    let policy = sample::policy(Style::Firewall, AddressFamily::V4, 2_000, 3);
    let boxes = &boxes::expand(&policy).unwrap().v4[0];
    let breach = |bounds| plant::<V4, 5>(boxes, 12, bounds).err().unwrap();
    let roomy = Bounds::tight(boxes.len());

    let deep = breach(Bounds { depth: 1, ..roomy });
    assert_eq!(deep.budget, Budget::Depth);
    assert!(deep.shares.iter().map(|(_, boxes)| boxes).sum::<usize>() > LEAF_RULES_MAX as usize);
    assert_eq!(deep.shares, breach(Bounds { depth: 1, ..roomy }).shares, "depends on threads");

    let copied = breach(Bounds { leaf_rules: boxes.len() / 2, ..roomy });
    assert_eq!(copied.budget, Budget::Copies);
    assert!(!copied.shares.is_empty());
}
