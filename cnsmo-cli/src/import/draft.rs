//! A rule while it is read, and the matches that both languages know.

use std::rc::Rc;

use cnsmo_proto::model::{self, protocol};

use super::{
    ir::{Limit, Origin, Rule, Verdict},
    sets::{Field, Match, Ranges, device, state},
};

/// Matches of one rule, such as the elements of a set of pairs.
const MATCHES_MAX: usize = 16_384;

/// Protocols whose ports the data path knows.
pub(super) const WITH_PORTS: [u8; 3] = [protocol::TCP, protocol::UDP, protocol::SCTP];

#[derive(Clone, Debug)]
pub(super) struct Draft {
    matches: Vec<Match>,
    doubt: Option<String>,
    /// It asks for ports of whatever protocol.
    asks_ports: bool,
    pub(super) limit: Option<Limit>,
    pub(super) log: bool,
    /// What it does beside its verdict.
    pub(super) aside: Option<String>,
}

impl Draft {
    pub(super) fn new() -> Self {
        Self {
            matches: vec![Match::all()],
            doubt: None,
            asks_ports: false,
            limit: None,
            log: false,
            aside: None,
        }
    }

    /// It matches what it did and any of these does.
    pub(super) fn and_any(&mut self, others: &[Match]) {
        if self.limit.is_some() {
            self.doubt("its limit is for more packets than it matches");
        }
        if self.matches.len().saturating_mul(others.len()) > MATCHES_MAX {
            self.doubt(format!("it has more than {MATCHES_MAX} cases"));
            return;
        }
        let pairs = self.matches.iter().flat_map(|a| others.iter().map(move |b| a.and(b)));
        self.matches = pairs.flatten().collect();
    }

    pub(super) fn and(&mut self, other: &Match) {
        self.and_any(std::slice::from_ref(other));
    }

    /// It matches less than can be said here. The first reason stays.
    pub(super) fn doubt(&mut self, reason: impl Into<String>) {
        self.doubt.get_or_insert(reason.into());
    }

    pub(super) fn ask_ports(&mut self) {
        self.asks_ports = true;
    }

    pub(super) fn finish(mut self, origin: &Rc<Origin>, verdict: Verdict) -> Rule {
        let known = Ranges::of(Field::Protocol.last(), WITH_PORTS.map(|n| (n.into(), n.into())));
        let is_known = |one: &Match| one.get(Field::Protocol).is_within(&known);
        if self.asks_ports && !self.matches.iter().all(is_known) {
            self.doubt("ports are known of tcp, udp and sctp alone, and it does not say which");
        }
        if self.limit.is_some() && verdict != Verdict::Continue {
            if verdict != Verdict::Accept {
                self.doubt("a limit is for rules that accept");
            } else if self.matches.len() > 1 {
                self.doubt("its limit is for several cases together");
            }
        }
        if verdict == Verdict::Continue
            && let Some(aside) = self.aside.take()
        {
            self.doubt = Some(aside);
        }
        let Self { matches, doubt, limit, log, .. } = self;
        Rule { origin: Rc::clone(origin), matches, doubt, limit, log, verdict }
    }
}

/// A limit that the policy can have.
pub(super) fn limit(flows: u128, period: &str, burst: u128) -> Result<Limit, String> {
    let period_seconds = match period {
        "s" | "sec" | "second" => 1,
        "m" | "min" | "minute" => 60,
        "h" | "hour" => 3_600,
        "d" | "day" => 86_400,
        _ => return Err(format!("limits per {period} are not known")),
    };
    let fits = |n: u128| {
        u32::try_from(n)
            .ok()
            .filter(|n| (1..=model::LIMIT_FLOWS_MAX).contains(n))
            .ok_or_else(|| format!("its limit is not from 1 to {}", model::LIMIT_FLOWS_MAX))
    };
    Ok(Limit { flows: fits(flows)?, period_seconds, burst: fits(burst)? })
}

pub(super) fn address(v6: bool, destination: bool, set: Ranges) -> Match {
    let field = match (v6, destination) {
        (false, false) => Field::Source4,
        (false, true) => Field::Destination4,
        (true, false) => Field::Source6,
        (true, true) => Field::Destination6,
    };
    Match::families(!v6, v6).with(field, set)
}

pub(super) fn protocols(set: Ranges) -> Match {
    Match::all().with(Field::Protocol, set)
}

pub(super) fn protocol_number(number: u8) -> Match {
    protocols(Ranges::one(Field::Protocol.last(), number.into()))
}

/// Ports of a protocol; without one, of those that the rule says elsewhere.
pub(super) fn ports(number: Option<u8>, destination: bool, set: Ranges) -> Match {
    let field = if destination { Field::Port } else { Field::SourcePort };
    number.map_or_else(Match::all, protocol_number).with(field, set)
}

/// `set` is of types, or of `type << 8 | code`.
pub(super) fn icmp(v6: bool, set: Ranges) -> Match {
    let (number, field) =
        if v6 { (protocol::ICMPV6, Field::Icmp6) } else { (protocol::ICMP, Field::Icmp4) };
    let family = Match::families(!v6, v6);
    let protocol = Ranges::one(Field::Protocol.last(), number.into());
    family.with(Field::Protocol, protocol).with(field, set)
}

pub(super) fn states(set: Ranges) -> Match {
    Match::all().with(Field::State, set)
}

/// Packets that came by the loopback device, or leave by it. `absent`: those without such a device too.
pub(super) fn device(is_loopback: bool, leaves: bool, absent: bool) -> Match {
    let field = if leaves { Field::OutputDevice } else { Field::InputDevice };
    let device = if is_loopback { device::LOOPBACK } else { device::CARD };
    let also = if absent { device::ABSENT } else { device };
    Match::all().with(field, Ranges::of(field.last(), [(device, device), (also, also)]))
}

/// Bits of the TCP flags byte, with the names of both languages.
pub(super) const TCP_FLAGS: [(&str, u8); 8] = [
    ("fin", 1),
    ("syn", 2),
    ("rst", 4),
    ("psh", 8),
    ("ack", 16),
    ("urg", 32),
    ("ecn", 64),
    ("cwr", 128),
];

/// TCP segments whose flags are `asked`. The data path begins flows with a SYN alone and drops combinations without a
/// meaning, so that many such matches say nothing new; the others cannot be said.
pub(super) fn tcp_flags(asked: impl Fn(u8) -> bool) -> Result<Match, String> {
    const FIN: u8 = 1;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    let is_first = |flags: u8| flags & (FIN | SYN | RST | ACK) == SYN;
    let is_later = |flags: u8| {
        let flags = flags & (FIN | SYN | RST | ACK);
        [SYN | ACK, RST, RST | ACK, FIN | ACK, ACK].contains(&flags)
    };
    let count = |kind: &dyn Fn(u8) -> bool| {
        let (mut hits, mut all) = (0, 0);
        for flags in (0..=u8::MAX).filter(|flags| kind(*flags)) {
            all += 1;
            hits += usize::from(asked(flags));
        }
        (hits, all)
    };
    let ((firsts, all_firsts), (laters, all_laters)) = (count(&is_first), count(&is_later));
    if firsts != 0 && firsts != all_firsts {
        return Err("it tells apart TCP flags of first packets that are one here".to_owned());
    }
    let mut left = vec![state::INVALID];
    if firsts > 0 {
        left.extend([state::NEW, state::UNTRACKED]);
    }
    if laters > 0 {
        left.extend([state::ESTABLISHED, state::RELATED]);
    }
    let set = Ranges::of(Field::State.last(), left.into_iter().map(|one| (one, one)));
    let mut matches = protocol_number(protocol::TCP).with(Field::State, set);
    matches.narrow = laters != 0 && laters != all_laters;
    Ok(matches)
}
