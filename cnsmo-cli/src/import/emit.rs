//! From a rule set to a policy: what the data path does by itself is left off, what it cannot do is named.

use std::{collections::BTreeSet, rc::Rc};

use anyhow::{Context as _, Result, bail};
use cnsmo_proto::{
    model::{
        self, Action, Direction, FirewallPolicy, IcmpMatch, Labels, NAME_BYTES_MAX, Name,
        PolicyDefaults, PortRange, Protocol, RateLimit, protocol,
    },
    pb::policy::FirewallPolicySpec,
};
use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};

use super::{
    flatten::{Decides, Entry, Lost, flatten},
    ir::{Effect, Left, Limit, Origin, RuleSet},
    sets::{Field, Match, Ranges, device, state},
};

/// Parts of what nothing has decided yet. With more, what is decided is not taken out any more, and a rule may be named that
/// does no harm.
const PARTS_MAX: usize = 256;
/// Entries that a later one is compared with, to leave it off if it can decide nothing any more. Beyond it stays.
const COMPARED_MAX: usize = 2_000;
/// The port that an agent keeps open unless it is told otherwise.
const FAILSAFE: u16 = 22;

/// Of one direction.
#[derive(Debug)]
struct Translated {
    rules: Vec<model::Rule>,
    default: Action,
    /// The decisions, for what has to be said about them.
    entries: Vec<Entry>,
}

/// A policy, and what it does not say.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) policy: FirewallPolicy,
    pub(super) left: Vec<Left>,
    pub(super) notes: Vec<String>,
}

/// Fails if the chains are too many or lead nowhere, or if the policy would be larger than one may be.
pub(super) fn translate(set: &RuleSet, target: Labels, priority: u32) -> Result<Outcome> {
    let mut emitter = Emitter {
        limited: vec![],
        left: set.left.clone(),
        notes: set.notes.clone(),
        names: BTreeSet::new(),
    };
    let ingress = emitter.direction(set, Direction::Ingress)?;
    let egress = emitter.direction(set, Direction::Egress)?;
    emitter.remarks(set, &ingress);
    let policy = FirewallPolicy {
        target,
        priority,
        defaults: PolicyDefaults { ingress: Some(ingress.default), egress: Some(egress.default) },
        rules: [ingress.rules, egress.rules].concat(),
        ..FirewallPolicy::default()
    };
    // The model's own checks: what is printed can be applied.
    let policy = FirewallPolicy::try_from(FirewallPolicySpec::from(&policy))
        .context("what the rules become is no policy")?;
    Ok(Outcome { policy, left: emitter.left, notes: emitter.notes })
}

const SEVERAL: &str =
    "its limit is for all that it matches, which here takes several rules with a limit each";

struct Emitter {
    /// Rules whose limits have been met.
    limited: Vec<Rc<Origin>>,
    left: Vec<Left>,
    notes: Vec<String>,
    names: BTreeSet<String>,
}

impl Emitter {
    fn direction(&mut self, set: &RuleSet, direction: Direction) -> Result<Translated> {
        let all = flatten(set, direction)?;
        for state in [state::ESTABLISHED, state::RELATED] {
            self.answers(&all, state, direction);
        }
        let firsts = self.first_packets(all, direction);
        let decided = self.without_lost(reachable(firsts));
        let mut entries = self.without_inexact_limits(decided);
        let default = entries.pop().context("a direction without a last word")?;
        let Decides::Action(default_action) = default.decides else {
            bail!("a direction without a last word");
        };
        let superfluous: Vec<_> =
            (0..entries.len()).map(|n| is_said_later(&entries, n, default_action)).collect();
        let mut rules = vec![];
        let mut kept = vec![];
        for (entry, superfluous) in entries.into_iter().zip(superfluous) {
            if !superfluous {
                rules.extend(self.rules(&entry, direction)?);
            }
            kept.push(entry);
        }
        kept.push(default);
        Ok(Translated { rules, default: default_action, entries: kept })
    }

    /// Names a rule once, with the worst that leaving it out does.
    fn leave(&mut self, origin: &Origin, reason: &str, effect: Effect) {
        let known = self
            .left
            .iter_mut()
            .find(|left| left.place == origin.place && left.rule == origin.text);
        match known {
            Some(left) if left.effect >= effect => {}
            Some(left) => {
                left.effect = effect;
                left.reason = reason.to_owned();
            }
            None => self.left.push(Left {
                place: origin.place.clone(),
                rule: origin.text.clone(),
                reason: reason.to_owned(),
                effect,
            }),
        }
    }

    /// The data path lets pass what belongs to a flow. Rules that drop such packets have no equivalent.
    fn answers(&mut self, entries: &[Entry], state: u128, direction: Direction) {
        let mut open = vec![answers_to_anything(state, direction)];
        for entry in entries {
            let hit = open.iter().any(|part| part.and(&entry.matches).is_some());
            if !hit {
                continue;
            }
            let drops = match &entry.decides {
                Decides::Action(Action::Allow) | Decides::Lost(Lost::Accept | Lost::Nothing, _) => {
                    false
                }
                Decides::Action(_) | Decides::Lost(Lost::Deny | Lost::Other, _) => true,
            };
            if drops {
                let what = if state == state::RELATED { "related to" } else { "of" };
                let reason = format!(
                    "it drops packets {what} established flows too, which always pass here: an \
                     `established,related accept` before it would make it exact"
                );
                self.leave(&entry.origin, &reason, Effect::Wider);
            }
            let decided = matches!(entry.decides, Decides::Action(_));
            if decided && entry.limit.is_none() && !entry.matches.narrow {
                open = undecided(open, &entry.matches);
            }
        }
    }

    /// What the rules say about packets that begin a flow on a network card.
    fn first_packets(&mut self, entries: Vec<Entry>, direction: Direction) -> Vec<Entry> {
        let device = match direction {
            Direction::Ingress => Field::InputDevice,
            Direction::Egress => Field::OutputDevice,
        };
        let mut kept = vec![];
        for entry in entries {
            if let Decides::Lost(Lost::Nothing, reason) = &entry.decides {
                self.leave(&entry.origin, reason, Effect::None);
                continue;
            }
            if !entry.matches.get(device).contains(device::CARD) {
                if entry.decides != Decides::Action(Action::Allow) {
                    let reason = "packets of the loopback device are not filtered here";
                    self.leave(&entry.origin, reason, Effect::Wider);
                }
                continue;
            }
            if let Some(matches) = first_of_a_flow(&entry.matches) {
                kept.push(Entry { matches, ..entry });
            }
        }
        kept
    }

    fn without_lost(&mut self, entries: Vec<Entry>) -> Vec<Entry> {
        for (n, entry) in entries.iter().enumerate() {
            let Decides::Lost(lost, reason) = &entry.decides else { continue };
            let later = &entries[n + 1..];
            let effect = match lost {
                Lost::Accept if follows(later, &entry.matches, |a| a != Action::Allow) => {
                    Effect::Stricter
                }
                Lost::Deny | Lost::Other
                    if follows(later, &entry.matches, |a| a == Action::Allow) =>
                {
                    Effect::Wider
                }
                Lost::Other => Effect::Stricter,
                Lost::Accept | Lost::Deny | Lost::Nothing => Effect::None,
            };
            self.leave(&entry.origin, reason, effect);
        }
        entries.into_iter().filter(|entry| matches!(entry.decides, Decides::Action(_))).collect()
    }

    /// Beyond a limit the data path drops; the rules that were read go on to the next one.
    fn without_inexact_limits(&mut self, entries: Vec<Entry>) -> Vec<Entry> {
        let inexact = |n: usize| {
            entries[n].limit.is_some()
                && follows(&entries[n + 1..], &entries[n].matches, |a| a == Action::Allow)
        };
        let inexact: Vec<_> = (0..entries.len()).map(inexact).collect();
        let limited: Vec<_> = entries.iter().filter(|entry| entry.limit.is_some()).collect();
        let origins: Vec<_> = limited.iter().map(|entry| Rc::clone(&entry.origin)).collect();
        let before = std::mem::take(&mut self.limited);
        let mut kept = vec![];
        for (entry, inexact) in entries.into_iter().zip(inexact) {
            let uses = |list: &[Rc<Origin>]| {
                list.iter().filter(|one| Rc::ptr_eq(one, &entry.origin)).count()
            };
            if entry.limit.is_some() && uses(&origins) + uses(&before) > 1 {
                self.leave(&entry.origin, SEVERAL, Effect::Stricter);
            } else if inexact {
                let reason = "what is beyond its limit comes to rules that accept some of it; here it \
                              would be dropped";
                self.leave(&entry.origin, reason, Effect::Stricter);
            } else {
                kept.push(entry);
            }
        }
        self.limited = [before, origins].concat();
        kept
    }

    fn rules(&mut self, entry: &Entry, direction: Direction) -> Result<Vec<model::Rule>> {
        let Decides::Action(action) = entry.decides else { return Ok(vec![]) };
        let parts = parts(&entry.matches);
        if entry.limit.is_some() && parts.len() > 1 {
            self.leave(&entry.origin, SEVERAL, Effect::Stricter);
            return Ok(vec![]);
        }
        let mut rules = vec![];
        if self.names.len() + parts.len() > model::RULES_MAX {
            bail!("the policy would have more than {} rules", model::RULES_MAX);
        }
        for (from, to, protocol) in parts {
            let name = self.name(&entry.origin.name)?;
            let log = entry.log && action == Action::Allow;
            let limit = entry.limit.map(rate_limit);
            let rule = model::Rule::new(name, action, direction);
            rules.push(model::Rule { from, to, protocol, log, limit, ..rule });
        }
        Ok(rules)
    }

    /// A valid name that no other rule has.
    fn name(&mut self, wanted: &str) -> Result<Name> {
        let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        // Room for a number behind it.
        let text: String = wanted.chars().map(letter).take(NAME_BYTES_MAX - 8).collect();
        let words: Vec<_> = text.split('-').filter(|word| !word.is_empty()).collect();
        let stem = if words.is_empty() { "rule".to_owned() } else { words.join("-") };
        let mut name = stem.clone();
        let mut n = 1;
        while !self.names.insert(name.clone()) {
            n += 1;
            name = format!("{stem}-{n}");
        }
        Name::new(name).context("a rule's name")
    }

    fn remarks(&mut self, set: &RuleSet, ingress: &Translated) {
        for (family, has) in [("IPv4", 0), ("IPv6", 1)] {
            let judges = |base: &super::ir::Base| {
                base.direction == Direction::Ingress
                    && if has == 0 { base.families.0 } else { base.families.1 }
            };
            if !set.bases.iter().any(judges) {
                self.notes.push(format!(
                    "no input chain is for {family}: the policy lets all of it in, as the rules do"
                ));
            }
        }
        if ingress.entries.iter().any(|entry| entry.decides == Decides::Action(Action::Reject)) {
            self.notes.push(
                "reject answers TCP by RST and everything else by ICMP port unreachable, whatever \
                 the rules say"
                    .to_owned(),
            );
        }
        let port = Ranges::one(Field::Port.last(), FAILSAFE.into());
        let tcp = Ranges::one(Field::Protocol.last(), protocol::TCP.into());
        let ssh = Match::all().with(Field::Port, port).with(Field::Protocol, tcp);
        let is_refused = follows(&ingress.entries, &ssh, |action| action != Action::Allow);
        if is_refused && !ingress.rules.iter().any(names_failsafe) {
            self.notes.push(format!(
                "TCP {FAILSAFE} stays open: agents keep it open as a failsafe port until a rule of a \
                 policy names it (docs/manifest.md)"
            ));
        }
    }
}

/// As the agent asks it.
fn names_failsafe(rule: &model::Rule) -> bool {
    let Protocol::Ports { number: protocol::TCP, destination, .. } = &rule.protocol else {
        return false;
    };
    let has = |range: &PortRange| (range.first()..=range.last()).contains(&FAILSAFE);
    let is_all = |range: &PortRange| range.first() <= 1 && range.last() == u16::MAX;
    destination.iter().any(|range| has(range) && !is_all(range))
}

/// Packets that may answer something: from and to one machine each, on a network card.
fn answers_to_anything(state: u128, direction: Direction) -> Match {
    let v4 = |list: &[[u8; 4]]| {
        let ranges = list.chunks(2).map(|ends| {
            let [a, b] = [ends[0], ends[1]].map(|end| u128::from(u32::from_be_bytes(end)));
            (a, b)
        });
        Ranges::of(u32::MAX.into(), ranges).not()
    };
    let none = [[0, 0, 0, 0], [0, 255, 255, 255]];
    let loopback = [[127, 0, 0, 0], [127, 255, 255, 255]];
    let many = [[224, 0, 0, 0], [255, 255, 255, 255]];
    let single4 = v4(&[none, loopback, many].concat());
    // ::, ::1 and ff00::/8.
    let single6 = Ranges::of(u128::MAX, [(0, 1), (0xff << 120, u128::MAX)]).not();
    let state = Ranges::one(Field::State.last(), state);
    let devices = device::of(direction, &[device::CARD]);
    let all = Match::all()
        .with(Field::Source4, single4.clone())
        .with(Field::Destination4, single4)
        .with(Field::Source6, single6.clone())
        .with(Field::Destination6, single6)
        .with(Field::State, state);
    devices.into_iter().fold(all, |all, (field, set)| all.with(field, set))
}

/// The part that connection tracking calls new, or does not track: neighbour discovery and multicast listeners. States and
/// devices are settled by it.
fn first_of_a_flow(matches: &Match) -> Option<Match> {
    let states = matches.get(Field::State);
    let kinds = [(130, 137), (143, 143)].map(|(a, b): (u128, u128)| (a << 8, b << 8 | 255));
    let untracked = Ranges::of(Field::Icmp6.last(), kinds);
    let first = matches
        .clone()
        .with(Field::State, Ranges::all(Field::State.last()))
        .with(Field::InputDevice, Ranges::all(Field::InputDevice.last()))
        .with(Field::OutputDevice, Ranges::all(Field::OutputDevice.last()));
    let icmp6 = first.get(Field::Icmp6);
    let part = match (states.contains(state::NEW), states.contains(state::UNTRACKED)) {
        (true, true) => first,
        (true, false) => {
            let tracked = icmp6.and(&untracked.not());
            return only_of_icmp6(first, tracked, true);
        }
        (false, true) => {
            let these = icmp6.and(&untracked);
            return only_of_icmp6(first, these, false);
        }
        (false, false) => return None,
    };
    Some(part)
}

/// Types matter to ICMPv6 alone. With `others` the rest stays as it is.
fn only_of_icmp6(matches: Match, types: Ranges, others: bool) -> Option<Match> {
    let protocols = matches.get(Field::Protocol);
    let icmp6 = Ranges::one(Field::Protocol.last(), protocol::ICMPV6.into());
    if others && !(protocols.is_within(&icmp6)) {
        // Other protocols too: discovery passes under any policy, so the types need not be told apart.
        return Some(matches);
    }
    let shared = protocols.and(&icmp6);
    let part = matches.with(Field::Icmp6, types).with(Field::Protocol, shared);
    (!part.is_empty()).then_some(part)
}

/// Without what earlier ones have decided.
fn reachable(entries: Vec<Entry>) -> Vec<Entry> {
    let mut kept: Vec<Entry> = vec![];
    for entry in entries {
        let decides = |before: &&Entry| {
            matches!(before.decides, Decides::Action(_)) && before.limit.is_none()
        };
        let dead = kept
            .iter()
            .take(COMPARED_MAX)
            .filter(decides)
            .any(|b| entry.matches.is_within(&b.matches));
        if !dead {
            kept.push(entry);
        }
    }
    kept
}

/// Whether one of these actions can be what decides about a packet of `matches`.
fn follows(later: &[Entry], matches: &Match, asked: impl Fn(Action) -> bool) -> bool {
    let mut open = vec![matches.clone()];
    for entry in later {
        let Decides::Action(action) = entry.decides else { continue };
        if open.iter().all(|part| part.and(&entry.matches).is_none()) {
            continue;
        }
        if asked(action) {
            return true;
        }
        if entry.limit.is_none() {
            open = undecided(open, &entry.matches);
        }
    }
    false
}

/// What an entry leaves open. Parts without measure are not made: then more than that is.
fn undecided(open: Vec<Match>, decided: &Match) -> Vec<Match> {
    let rest: Vec<_> = open.iter().flat_map(|part| part.minus(decided)).collect();
    if rest.len() <= PARTS_MAX { rest } else { open }
}

/// The policy of a chain, for what later entries and the default say too.
fn is_said_later(entries: &[Entry], n: usize, default: Action) -> bool {
    let entry = &entries[n];
    entry.origin.is_policy
        && entry.limit.is_none()
        && entry.decides == Decides::Action(default)
        && !follows(&entries[n + 1..], &entry.matches, |action| action != default)
}

fn rate_limit(limit: Limit) -> RateLimit {
    let Limit { flows, period_seconds, burst } = limit;
    RateLimit { flows, period_seconds, burst, per_source: false }
}

type Part = (Vec<IpNet>, Vec<IpNet>, Protocol);

/// What rules can match one by one.
fn parts(matches: &Match) -> Vec<Part> {
    let protocols = matches.get(Field::Protocol);
    let numbers: Vec<Option<u8>> = if protocols.is_all() {
        vec![None]
    } else {
        protocols.iter().flat_map(|(a, b)| a..=b).map(|n| u8::try_from(n).ok()).collect()
    };
    numbers.into_iter().flat_map(|number| parts_of(matches, number)).collect()
}

fn parts_of(matches: &Match, number: Option<u8>) -> Vec<Part> {
    let v4 = matches.has_v4() && number != Some(protocol::ICMPV6);
    let v6 = matches.has_v6() && number != Some(protocol::ICMP);
    if !v4 && !v6 {
        return vec![];
    }
    let side = |field4, field6| {
        let (a, b) = (matches.get(field4), matches.get(field6));
        let any = (!v4 || a.is_all()) && (!v6 || b.is_all());
        let mut nets = vec![];
        if v4 && !any {
            nets.extend(networks4(a));
        }
        if v6 && !any {
            nets.extend(networks6(b));
        }
        nets
    };
    let mut from = side(Field::Source4, Field::Source6);
    let to = side(Field::Destination4, Field::Destination6);
    let says_family = matches!(number, Some(protocol::ICMP | protocol::ICMPV6));
    if v4 != v6 && from.is_empty() && to.is_empty() && !says_family {
        from = if v4 {
            networks4(matches.get(Field::Source4)).collect()
        } else {
            networks6(matches.get(Field::Source6)).collect()
        };
    }
    let protocols = protocol_of(matches, number);
    let mut parts = vec![];
    for from in chunks(&from, model::PEERS_MAX) {
        for to in chunks(&to, model::PEERS_MAX) {
            if share_a_family(&from, &to) {
                parts.extend(protocols.iter().map(|p| (from.clone(), to.clone(), p.clone())));
            }
        }
    }
    parts
}

/// Halves of two long lists may have no packet in common.
fn share_a_family(from: &[IpNet], to: &[IpNet]) -> bool {
    let has = |nets: &[IpNet], v4| nets.is_empty() || nets.iter().any(|n| n.addr().is_ipv4() == v4);
    [true, false].into_iter().any(|v4| has(from, v4) && has(to, v4))
}

/// An empty list, which is any, stays one list.
fn chunks<T: Clone>(list: &[T], max: usize) -> Vec<Vec<T>> {
    if list.is_empty() { vec![vec![]] } else { list.chunks(max).map(<[T]>::to_vec).collect() }
}

fn protocol_of(matches: &Match, number: Option<u8>) -> Vec<Protocol> {
    let Some(number) = number else { return vec![Protocol::Any] };
    match number {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            let lists = [Field::SourcePort, Field::Port].map(|field| {
                let set = matches.get(field);
                let ranges: Vec<_> = if set.is_all() { vec![] } else { set.iter().collect() };
                chunks(
                    &ranges.into_iter().filter_map(port_range).collect::<Vec<_>>(),
                    model::RANGES_MAX,
                )
            });
            let [sources, destinations] = lists;
            let with = |source: &Vec<PortRange>| {
                let source = source.clone();
                destinations.iter().map(move |destination| Protocol::Ports {
                    number,
                    source: source.clone(),
                    destination: destination.clone(),
                })
            };
            sources.iter().flat_map(with).collect()
        }
        protocol::ICMP | protocol::ICMPV6 => {
            let v4 = number == protocol::ICMP;
            let set = matches.get(if v4 { Field::Icmp4 } else { Field::Icmp6 });
            let types = chunks(&icmp_types(set), model::RANGES_MAX);
            types.into_iter().map(|types| Protocol::Icmp { number, types }).collect()
        }
        number => vec![Protocol::Other(number)],
    }
}

fn port_range((first, last): (u128, u128)) -> Option<PortRange> {
    PortRange::new(u16::try_from(first).ok()?, u16::try_from(last).ok()?).ok()
}

/// None stands for all of them.
fn icmp_types(set: &Ranges) -> Vec<IcmpMatch> {
    if set.is_all() {
        return vec![];
    }
    let mut types = vec![];
    for kind in 0..=u8::MAX {
        let first = u128::from(kind) << 8;
        let codes = set.and(&Ranges::of(Field::Icmp4.last(), [(first, first | 255)]));
        if codes.iter().eq([(first, first | 255)]) {
            types.push(IcmpMatch { kind, code: None });
        } else {
            let codes = codes.iter().flat_map(|(a, b)| a..=b);
            types.extend(codes.map(|n| IcmpMatch { kind, code: Some((n & 255) as u8) }));
        }
    }
    types
}

fn networks4(set: &Ranges) -> impl Iterator<Item = IpNet> + '_ {
    let address = |n: u128| (n as u32).into();
    set.iter().flat_map(move |(a, b)| Ipv4Subnets::new(address(a), address(b), 0)).map(IpNet::V4)
}

fn networks6(set: &Ranges) -> impl Iterator<Item = IpNet> + '_ {
    set.iter().flat_map(|(a, b)| Ipv6Subnets::new(a.into(), b.into(), 0)).map(IpNet::V6)
}
