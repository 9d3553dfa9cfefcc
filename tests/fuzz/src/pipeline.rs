//! The parser and the pipeline on sequences of frames. Nothing panics, XDP and TC say the same, what is dropped is counted
//! once and left as it was, and a closed firewall remembers nobody.

use std::collections::HashMap;

use arbitrary::{Result, Unstructured};
use cnsmo_common::{
    Direction,
    blob::{DPORT_AT, NO_RULE},
    control::{Limit, LiveParts, RuleAction, SLOT_FIRST, rule_flag, verdict},
    stat::Reason,
};
use cnsmo_ebpf::{
    host::{Frame, HostTables},
    pipeline::{ETHERNET, TUNNEL, Verdict, run as judge},
    tables::Onward,
};
use cnsmo_tests::frame::{self, Ends};

const FRAMES_MAX: usize = 48;
const EDITS_MAX: usize = 4;
/// Index of the device; any.
const DEVICE: u32 = 1;
const PORTS: [u16; 5] = [22, 53, 80, 40_000, 40_001];
/// What the rules do: verdict, flags, limit.
const RULES: [(u8, u8, u16); 4] = [
    (verdict::DENY, 0, 0),
    (verdict::ALLOW, rule_flag::LOG, 0),
    (verdict::REJECT, 0, 0),
    (verdict::ALLOW, 0, 1),
];

/// What is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// No policy.
    Open,
    /// Neither rule nor default lets anything pass.
    Closed,
    /// The VM may begin flows, others may not.
    Outward,
    /// By the destination port, in both directions.
    ByPort,
}

/// One frame and what happens before it.
struct Step {
    bytes: Vec<u8>,
    outbound: bool,
    /// On a tunnel device: without an Ethernet header.
    bare: bool,
    jiffies: u64,
    /// A policy change: flows are asked about again.
    changes: bool,
}

/// The mode, then frames.
pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let modes = [Mode::Open, Mode::Closed, Mode::Outward, Mode::ByPort];
    let Ok(mode) = input.choose(&modes).copied() else { return };
    let (mut xdp, mut tc) = (Path::new(mode), Path::new(mode));
    for frames in 1..=FRAMES_MAX {
        if input.is_empty() {
            break;
        }
        let Ok(step) = step(&mut input) else { break };
        for path in [&mut xdp, &mut tc] {
            path.before(&step);
        }
        let (by_xdp, by_tc) = (xdp.judge(&step), tc.judge_frame(&step));
        assert_eq!(by_xdp, by_tc, "{mode:?}: {:02x?}", step.bytes);
        for path in [&xdp, &tc] {
            path.check(mode, frames);
        }
    }
}

/// The tables of one data path.
struct Path {
    tables: HostTables,
    live: LiveParts,
    dropped: u64,
}

impl Path {
    fn new(mode: Mode) -> Self {
        let default_allow = match mode {
            Mode::Open => [true, true],
            Mode::Closed | Mode::ByPort => [false, false],
            Mode::Outward => [false, true],
        };
        let open = mode == Mode::Open;
        let live = LiveParts { default_allow, open, generation: 1, ..LiveParts::default() };
        let mut tables = HostTables::new(live.pack());
        let rules = RULES.into_iter().zip(SLOT_FIRST..);
        let rules =
            rules.map(|((verdict, flags, limit), slot)| RuleAction { slot, verdict, flags, limit });
        let (interval, tolerance) = (1, 3);
        let limit = Limit { interval, tolerance, connections: 2, group: 1, per_source: 1, pad: 0 };
        tables.limits = vec![Limit::default(), limit];
        let by_port = mode == Mode::ByPort;
        let rule = move |lanes: u64| if by_port { (lanes >> DPORT_AT & 3) as u32 } else { NO_RULE };
        tables.set_rules(
            rules.collect(),
            Box::new(move |question, _| Some(rule(question.lanes))),
            Box::new(move |question, _| Some(rule(question.lanes))),
        );
        Self { tables, live, dropped: 0 }
    }

    fn before(&mut self, step: &Step) {
        self.tables.now.set(self.tables.now.get() + step.jiffies);
        if step.changes {
            self.live.generation += 1;
            self.tables.control.live = self.live.pack().0;
        }
    }

    /// As XDP does, which cannot rewrite.
    fn judge(&mut self, step: &Step) -> Option<Reason> {
        let (bytes, tables) = (&step.bytes[..], &self.tables);
        let verdict = match (step.bare, step.outbound) {
            (false, false) => judge::<_, _, ETHERNET, false>(bytes, tables),
            (false, true) => judge::<_, _, ETHERNET, true>(bytes, tables),
            (true, false) => judge::<_, _, TUNNEL, false>(bytes, tables),
            (true, true) => judge::<_, _, TUNNEL, true>(bytes, tables),
        };
        match verdict {
            Verdict::Pass => None,
            Verdict::Drop(reason) => {
                self.dropped += 1;
                Some(reason)
            }
            Verdict::RewriteV4 | Verdict::RewriteV6 => panic!("there is nothing to rewrite"),
        }
    }

    /// As TC does.
    fn judge_frame(&mut self, step: &Step) -> Option<Reason> {
        let (frame, tables) = (Frame::new(&step.bytes, DEVICE), &self.tables);
        let verdict = match (step.bare, step.outbound) {
            (false, false) => frame.run::<ETHERNET, false>(tables),
            (false, true) => frame.run::<ETHERNET, true>(tables),
            (true, false) => frame.run::<TUNNEL, false>(tables),
            (true, true) => frame.run::<TUNNEL, true>(tables),
        };
        assert_eq!(frame.bytes(), step.bytes, "changed, and is behind no balancer");
        match verdict {
            Ok(onward) => {
                assert_eq!(onward, Onward::Same);
                None
            }
            Err(reason) => {
                self.dropped += 1;
                Some(reason)
            }
        }
    }

    fn check(&self, mode: Mode, frames: usize) {
        let counts = self.tables.stat_counts.borrow();
        let at = |reason: &Reason| {
            let both = [Direction::Ingress, Direction::Egress].map(|way| reason.at(way));
            both.iter()
                .filter_map(|place| counts.get(place))
                .map(|count| count.packets)
                .sum::<u64>()
        };
        assert_eq!(Reason::ALL.iter().map(at).sum::<u64>(), self.dropped, "each counted once");
        let (v4, v6) = (self.tables.flows_v4(), self.tables.flows_v6());
        let flows = v4.iter().map(HashMap::len).chain(v6.iter().map(HashMap::len));
        let flows: usize = flows.sum();
        assert!(flows <= frames, "{flows} flows of {frames} frames");
        assert!(flows == 0 || mode != Mode::Closed, "{flows} flows behind a closed firewall");
    }
}

fn step(input: &mut Unstructured<'_>) -> Result<Step> {
    let [how, jiffies]: [u8; 2] = input.arbitrary()?;
    let (outbound, bare) = (how & 1 != 0, how & 2 != 0);
    let mut bytes = if how & 0x1c == 0 {
        let length = input.int_in_range(0..=120)?;
        input.bytes(length)?.to_vec()
    } else {
        let packet = packet(input)?;
        let tags: &[u16] =
            input.choose(&[&[][..], &[], &[0x8100], &[0x88a8, 0x8100], &[0x8100; 3]])?;
        if bare { packet } else { frame::ethernet(tags, &packet) }
    };
    for _ in 0..input.int_in_range(0..=EDITS_MAX)? {
        let [at, value]: [u8; 2] = input.arbitrary()?;
        if let Some(byte) = bytes.get_mut(usize::from(at)) {
            *byte = value;
        }
    }
    if input.ratio(1, 8)? {
        bytes.truncate(input.int_in_range(0..=bytes.len())?);
    }
    let jiffies = if how & 0x20 == 0 { 0 } else { u64::from(jiffies) * 16 };
    Ok(Step { bytes, outbound, bare, jiffies, changes: how & 0xc0 == 0xc0 })
}

/// Between a VM and two peers.
fn packet(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let [vm, peer] = [100, *input.choose(&[1, 200])?];
    let (a, b) = if input.arbitrary()? { (vm, peer) } else { (peer, vm) };
    let v6 = |host| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host];
    let is_v4: bool = input.arbitrary()?;
    let ends = if is_v4 { Ends::V4([10, 0, 0, a], [10, 0, 0, b]) } else { Ends::V6(v6(a), v6(b)) };
    let (proto, payload) = payload(input, ends, is_v4)?;
    match ends {
        Ends::V4(src, dst) => {
            let fragment = *input.choose(&[0, 0, 0, 0x4000, 0x2000, 0x2001, 3])?;
            let options: &[u8] = input.choose(&[&[][..], &[], &[1, 1, 1, 0], &[0; 40]])?;
            Ok(frame::ipv4(src, dst, proto, fragment, options, &payload))
        }
        Ends::V6(src, dst) => {
            let (mut next, mut chain) = (proto, payload);
            for _ in 0..input.int_in_range(0..=7)? {
                let header = *input.choose(&[0, 60, 43, 51, 44])?;
                let mut front = match header {
                    44 => [&[next, 0][..], input.bytes(2)?, &[0, 0, 0, 1]].concat(),
                    51 => [&[next, 1][..], &[0; 10]].concat(),
                    _ => [&[next, 0][..], &[4; 6]].concat(),
                };
                front.extend(chain);
                (next, chain) = (header, front);
            }
            let hop_limit = *input.choose(&[64, 255, 1])?;
            Ok(frame::ipv6(src, dst, next, hop_limit, &chain))
        }
    }
}

fn payload(input: &mut Unstructured<'_>, ends: Ends, is_v4: bool) -> Result<(u8, Vec<u8>)> {
    let [sport, dport] = [*input.choose(&PORTS)?, *input.choose(&PORTS)?];
    let icmp = if is_v4 { 1 } else { 58 };
    Ok(match input.int_in_range(0..=6)? {
        0..=2 => (6, frame::tcp(sport, dport, input.arbitrary()?, b"data")),
        3 => (17, frame::udp(sport, dport, b"payload")),
        4 => {
            let echo = if is_v4 { [8, 0] } else { [128, 129] };
            (icmp, frame::icmp(*input.choose(&echo)?, 0, [0, 1, 0, 1], b"ping"))
        }
        5 => {
            let inner = if input.arbitrary()? {
                frame::ip(ends.reversed(), 17, &frame::udp(dport, sport, b""))
            } else {
                frame::ip(ends.reversed(), 6, &frame::tcp(dport, sport, 0x10, b""))
            };
            (icmp, frame::icmp(input.arbitrary()?, input.arbitrary()?, [0; 4], &inner))
        }
        _ => (*input.choose(&[0, 2, 47, 50, 59, 132, 255])?, input.bytes(16)?.to_vec()),
    })
}
