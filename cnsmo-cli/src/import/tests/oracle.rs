//! Random rule sets: what a policy decides is what the chains decide, packet by packet.

use std::rc::Rc;

use cnsmo_proto::model::{Action, Direction, FirewallPolicy, Labels, Protocol, protocol};
use proptest::prelude::*;

use crate::import::{
    draft::{self, Draft},
    emit::{Outcome, translate},
    ir::{Base, ChainId, Effect, Limit, Origin, Rule, RuleSet, Verdict},
    sets::{Field, Match, Ranges, device, state},
};

/// Few distinct values, so that rules meet.
const ADDRESSES: [u32; 6] = [0, 1, 0x0a00_0000, 0x0a00_00ff, 0x0b00_0000, u32::MAX];
const PORTS: [u16; 5] = [0, 22, 23, 80, u16::MAX];
const PROTOCOLS: [u8; 6] =
    [protocol::ICMP, protocol::TCP, protocol::UDP, 47, protocol::ICMPV6, protocol::SCTP];
const KINDS: [u16; 5] = [0, 8 << 8, 3 << 8, 3 << 8 | 4, 128 << 8];
/// Rules that match less than they say, and limits: what they do is tried in all ways.
const UNSURE_MAX: usize = 3;
const PACKETS: usize = 60;

/// Numbers from bytes; zeros when they are used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn below(&mut self, n: usize) -> usize {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        usize::from(*first) % n
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    fn range<T: Copy + Ord>(&mut self, choices: &[T]) -> (T, T) {
        let (a, b) = (self.pick(choices), self.pick(choices));
        (a.min(b), a.max(b))
    }
}

#[derive(Clone, Copy, Debug)]
struct Packet {
    direction: Direction,
    v6: bool,
    source: u32,
    destination: u32,
    protocol: u8,
    source_port: u16,
    port: u16,
    icmp: u16,
    state: u128,
}

impl Packet {
    fn is_in(&self, matches: &Match) -> bool {
        let families = if self.v6 {
            [(Field::Source6, self.source), (Field::Destination6, self.destination)]
        } else {
            [(Field::Source4, self.source), (Field::Destination4, self.destination)]
        };
        let (input, output) = match self.direction {
            Direction::Ingress => (device::CARD, device::ABSENT),
            Direction::Egress => (device::ABSENT, device::CARD),
        };
        let fields = [
            (Field::Protocol, self.protocol.into()),
            (Field::SourcePort, self.source_port.into()),
            (Field::Port, self.port.into()),
            (if self.v6 { Field::Icmp6 } else { Field::Icmp4 }, self.icmp.into()),
            (Field::State, self.state),
            (Field::InputDevice, input),
            (Field::OutputDevice, output),
        ];
        families.into_iter().all(|(field, n)| matches.get(field).contains(n.into()))
            && fields.into_iter().all(|(field, n)| matches.get(field).contains(n))
    }
}

fn packet(input: &mut Input<'_>) -> Packet {
    let v6 = input.below(2) == 1;
    let other = if v6 { protocol::ICMP } else { protocol::ICMPV6 };
    let number = Some(input.pick(&PROTOCOLS)).filter(|n| *n != other).unwrap_or(protocol::TCP);
    let ports = draft::WITH_PORTS.contains(&number);
    let icmp = matches!(number, protocol::ICMP | protocol::ICMPV6);
    Packet {
        direction: input.pick(&[Direction::Ingress, Direction::Egress]),
        v6,
        source: input.pick(&ADDRESSES),
        destination: input.pick(&ADDRESSES),
        protocol: number,
        source_port: if ports { input.pick(&PORTS) } else { 0 },
        port: if ports { input.pick(&PORTS) } else { 0 },
        icmp: if icmp { input.pick(&KINDS) } else { 0 },
        state: state::NEW,
    }
}

fn one_match(input: &mut Input<'_>) -> Match {
    let not = input.below(4) == 0;
    let numbers = |last: u128, (a, b): (u128, u128)| {
        let set = Ranges::of(last, [(a, b)]);
        if not { set.not() } else { set }
    };
    match input.below(8) {
        0 | 1 => {
            let (v6, destination) = (input.below(2) == 1, input.below(2) == 1);
            let (a, b) = input.range(&ADDRESSES);
            let last = if v6 { u128::MAX } else { u32::MAX.into() };
            draft::address(v6, destination, numbers(last, (a.into(), b.into())))
        }
        2 | 3 => {
            let (a, b) = input.range(&PORTS);
            let number = input.pick(&draft::WITH_PORTS);
            let set = numbers(Field::Port.last(), (a.into(), b.into()));
            draft::ports(Some(number), input.below(2) == 1, set)
        }
        4 => {
            let (a, b) = input.range(&PROTOCOLS);
            draft::protocols(numbers(Field::Protocol.last(), (a.into(), b.into())))
        }
        5 => {
            let (a, b) = input.range(&KINDS);
            draft::icmp(input.below(2) == 1, numbers(Field::Icmp4.last(), (a.into(), b.into())))
        }
        6 => {
            let (a, b) = input.range(&[state::NEW, state::ESTABLISHED, state::RELATED]);
            draft::states(numbers(Field::State.last(), (a, b)))
        }
        _ => draft::device(input.below(2) == 1, input.below(2) == 1, not),
    }
}

fn rule(input: &mut Input<'_>, n: usize, unsure: &mut usize, depth: usize) -> Rule {
    let mut draft = Draft::new();
    for _ in 0..input.below(3) {
        let any: Vec<_> = (0..=input.below(2)).map(|_| one_match(input)).collect();
        draft.and_any(&any);
    }
    let verdict = match input.below(10) {
        0..=2 => Verdict::Accept,
        3 | 4 => Verdict::Drop,
        5 => Verdict::Reject,
        6 => Verdict::Return,
        7 if depth < 2 => Verdict::Jump(chain(depth + 1)),
        8 if depth < 2 => Verdict::Goto(chain(depth + 1)),
        _ => Verdict::Continue,
    };
    match input.below(6) {
        0 if *unsure < UNSURE_MAX => {
            draft.doubt("who knows");
            *unsure += 1;
        }
        1 if *unsure < UNSURE_MAX && verdict == Verdict::Accept => {
            draft.limit = Some(Limit { flows: 1, period_seconds: 1, burst: 1 });
            *unsure += 1;
        }
        _ => {}
    }
    draft.finish(&origin(n), verdict)
}

/// What most rule sets begin with.
fn established(n: usize) -> Rule {
    let mut draft = Draft::new();
    let set = Ranges::of(Field::State.last(), [(state::ESTABLISHED, state::RELATED)]);
    draft.and(&draft::states(set));
    draft.finish(&origin(n), Verdict::Accept)
}

fn origin(n: usize) -> Rc<Origin> {
    let name = format!("r{n}");
    Rc::new(Origin { place: name.clone(), text: name.clone(), name, is_policy: false })
}

fn chain(n: usize) -> ChainId {
    format!("chain {n}")
}

/// Two bases at most, each with rules of its own, and two chains that they call.
fn rule_set(bytes: &[u8]) -> RuleSet {
    let input = &mut Input(bytes);
    let mut set = RuleSet::default();
    let (mut n, mut unsure) = (0, 0);
    for base in 0..=input.below(3) {
        let id = format!("base {base}");
        let origin = Origin {
            place: id.clone(),
            text: "policy".to_owned(),
            name: format!("p{base}"),
            is_policy: true,
        };
        set.bases.push(Base {
            direction: input.pick(&[Direction::Ingress, Direction::Egress]),
            families: input.pick(&[(true, true), (true, false), (false, true)]),
            priority: input.below(3) as i64,
            drops: input.below(2) == 0,
            chain: id.clone(),
            origin: Rc::new(origin),
        });
        set.chains.insert(id, vec![]);
    }
    for depth in 1..=2 {
        set.chains.insert(chain(depth), vec![]);
    }
    for (id, rules) in &mut set.chains {
        let depth = id.strip_prefix("chain ").map_or(0, |n| n.parse().unwrap());
        if depth == 0 && input.below(4) > 0 {
            rules.push(established(n));
            n += 1;
        }
        for _ in 0..input.below(4) {
            rules.push(rule(input, n, &mut unsure, depth));
            n += 1;
        }
    }
    set
}

/// The kernel's way: chain by chain. `unsure` says of each rule in doubt or with a limit whether it matches now.
struct Kernel<'a> {
    set: &'a RuleSet,
    unsure: &'a [(String, bool)],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Walked {
    Decided(Action),
    Through,
}

impl Kernel<'_> {
    fn decides(&self, packet: &Packet) -> Action {
        let mut bases: Vec<_> =
            self.set.bases.iter().filter(|base| base.direction == packet.direction).collect();
        bases.sort_by_key(|base| base.priority);
        for base in bases {
            let here = if packet.v6 { base.families.1 } else { base.families.0 };
            if !here {
                continue;
            }
            let policy = if base.drops { Action::Deny } else { Action::Allow };
            match self.walk(&base.chain, packet) {
                Walked::Decided(Action::Allow) => {}
                Walked::Decided(action) => return action,
                Walked::Through if policy != Action::Allow => return policy,
                Walked::Through => {}
            }
        }
        Action::Allow
    }

    fn walk(&self, chain: &ChainId, packet: &Packet) -> Walked {
        for rule in &self.set.chains[chain] {
            let known = self.unsure.iter().find(|(name, _)| *name == rule.origin.name);
            if !rule.matches.iter().any(|one| packet.is_in(one)) || known.is_some_and(|(_, m)| !m) {
                continue;
            }
            match &rule.verdict {
                Verdict::Accept => return Walked::Decided(Action::Allow),
                Verdict::Drop => return Walked::Decided(Action::Deny),
                Verdict::Reject => return Walked::Decided(Action::Reject),
                Verdict::Return => return Walked::Through,
                Verdict::Goto(target) => return self.walk(target, packet),
                Verdict::Jump(target) => match self.walk(target, packet) {
                    Walked::Through => {}
                    decided @ Walked::Decided(_) => return decided,
                },
                Verdict::Continue | Verdict::Unknown(_) => {}
            }
        }
        Walked::Through
    }
}

/// The data path's way: the first rule that matches.
fn policy_decides(policy: &FirewallPolicy, packet: &Packet, unsure: &[(String, bool)]) -> Action {
    for rule in policy.rules.iter().filter(|rule| rule.direction == packet.direction) {
        if !rule_matches(rule, packet) {
            continue;
        }
        let spent = rule.limit.is_some()
            && unsure.iter().any(|(name, token)| name == rule.name.as_str() && !token);
        return if spent { Action::Deny } else { rule.action };
    }
    let defaults = policy.defaults;
    match packet.direction {
        Direction::Ingress => defaults.ingress.unwrap(),
        Direction::Egress => defaults.egress.unwrap(),
    }
}

fn rule_matches(rule: &cnsmo_proto::model::Rule, packet: &Packet) -> bool {
    let address = |number: u32| -> std::net::IpAddr {
        if packet.v6 {
            std::net::Ipv6Addr::from(u128::from(number)).into()
        } else {
            std::net::Ipv4Addr::from(number).into()
        }
    };
    let has = |nets: &[ipnet::IpNet], number| {
        nets.is_empty() || nets.iter().any(|net| net.contains(&address(number)))
    };
    let protocol = match &rule.protocol {
        Protocol::Any => true,
        Protocol::Other(number) => *number == packet.protocol,
        Protocol::Ports { number, source, destination } => {
            let any = |list: &[cnsmo_proto::model::PortRange], port| {
                list.is_empty() || list.iter().any(|r| (r.first()..=r.last()).contains(&port))
            };
            *number == packet.protocol
                && any(source, packet.source_port)
                && any(destination, packet.port)
        }
        Protocol::Icmp { number, types } => {
            let [kind, code] = packet.icmp.to_be_bytes();
            *number == packet.protocol
                && (types.is_empty()
                    || types.iter().any(|t| t.kind == kind && t.code.is_none_or(|c| c == code)))
        }
    };
    protocol && has(&rule.from, packet.source) && has(&rule.to, packet.destination)
}

/// All that rules in doubt and limits may do.
fn ways(set: &RuleSet) -> Vec<Vec<(String, bool)>> {
    let rules = set.chains.values().flatten();
    let names: Vec<_> = rules
        .filter(|rule| rule.doubt.is_some() || rule.limit.is_some())
        .map(|rule| rule.origin.name.clone())
        .take(8)
        .collect();
    (0..1_usize << names.len())
        .map(|bits| {
            names.iter().enumerate().map(|(n, x)| (x.clone(), bits >> n & 1 == 1)).collect()
        })
        .collect()
}

/// A failure for a reader: each rule in a line, with the fields that it restricts.
fn shown(set: &RuleSet, outcome: &Outcome) -> String {
    let fields = [
        ("from4", Field::Source4),
        ("to4", Field::Destination4),
        ("from6", Field::Source6),
        ("to6", Field::Destination6),
        ("protocol", Field::Protocol),
        ("sport", Field::SourcePort),
        ("port", Field::Port),
        ("icmp4", Field::Icmp4),
        ("icmp6", Field::Icmp6),
        ("state", Field::State),
        ("in", Field::InputDevice),
        ("out", Field::OutputDevice),
    ];
    let matched = |one: &Match| -> String {
        let limited = fields.iter().filter(|(_, field)| !one.get(*field).is_all());
        limited.map(|(n, f)| format!(" {n} {:?}", one.get(*f).iter().collect::<Vec<_>>())).collect()
    };
    let mut text = String::new();
    for base in &set.bases {
        text.push_str(&format!("\n{base:?}"));
    }
    for (id, rules) in &set.chains {
        text.push_str(&format!("\n{id}"));
        for rule in rules {
            let any: Vec<_> = rule.matches.iter().map(matched).collect();
            let (name, verdict) = (&rule.origin.name, &rule.verdict);
            text.push_str(&format!(
                "\n  {name} {any:?} {verdict:?} {:?} {:?}",
                rule.doubt, rule.limit
            ));
        }
    }
    for rule in super::rules(&(&outcome.policy).into()).iter().take(40) {
        text.push_str(&format!("\n{rule}"));
    }
    text + &format!("\n{:?} {:?}", outcome.policy.defaults, outcome.left)
}

/// How often a comparison of each kind took place: a generator that makes nothing of interest would pass too.
fn agree(rules: &[u8], packets: &[u8]) -> (usize, usize) {
    let set = rule_set(rules);
    let outcome = translate(&set, Labels::default(), 1).unwrap();
    let worst = outcome.left.iter().map(|left| left.effect).max();
    let is_exact = worst.is_none_or(|worst| worst == Effect::None);
    if worst == Some(Effect::Wider) {
        return (0, 0);
    }
    let input = &mut Input(packets);
    let (mut equal, mut stricter) = (0, 0);
    for _ in 0..PACKETS {
        let packet = packet(input);
        for unsure in ways(&set) {
            let kernel = Kernel { set: &set, unsure: &unsure };
            let (old, new) =
                (kernel.decides(&packet), policy_decides(&outcome.policy, &packet, &unsure));
            // A reject and a drop that nobody can tell from each other any more let nothing in.
            let passes = [old, new].map(|action| action == Action::Allow);
            if is_exact {
                assert_eq!(passes[0], passes[1], "{packet:?} {unsure:?} {}", shown(&set, &outcome));
                equal += 1;
            } else {
                assert!(passes[0] || !passes[1], "{packet:?} {unsure:?} {}", shown(&set, &outcome));
                stricter += 1;
            }
            // Answers pass whatever the policy says, so that the chains must let them pass too.
            for state in [state::ESTABLISHED, state::RELATED] {
                let machines = [packet.source, packet.destination];
                if machines.iter().any(|n| [0, 1, u32::MAX].contains(n)) {
                    continue;
                }
                let answer = Packet { state, ..packet };
                assert_eq!(
                    kernel.decides(&answer),
                    Action::Allow,
                    "{answer:?} {set:#?} {outcome:#?}"
                );
            }
        }
    }
    (equal, stricter)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn a_policy_never_accepts_more_than_the_chains(
        rules in prop::collection::vec(any::<u8>(), 0..160),
        packets in prop::collection::vec(any::<u8>(), 400),
    ) {
        agree(&rules, &packets);
    }
}

#[test]
fn the_comparison_compares() {
    let mut random = proptest::test_runner::TestRng::deterministic_rng(
        proptest::test_runner::RngAlgorithm::ChaCha,
    );
    let (mut equal, mut stricter) = (0, 0);
    for _ in 0..500 {
        let mut bytes = [0; 560];
        random.fill_bytes(&mut bytes);
        let (rules, packets) = bytes.split_at(160);
        let (a, b) = agree(rules, packets);
        equal += usize::from(a > 0);
        stricter += usize::from(b > 0);
    }
    assert!(equal > 150 && stricter > 20, "{equal} {stricter}");
}
