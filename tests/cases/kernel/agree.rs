//! Three judges: for every frame the host function, the XDP program and the TC programs must give the same verdict and
//! leave the same bytes; and in the end the same flows.

use std::net::IpAddr;

use cnsmo_agent::{
    compile::{Compiled, Limits, compile, trace::Header},
    datapath::{
        Datapath as _,
        kernel::{Kernel, KernelError, Options, XdpChoice},
    },
    effective::Effective,
};
use cnsmo_common::{
    blob::{DPORT_AT, PROTO_AT, SPORT_AT},
    control::{LiveParts, RuleAction, SLOT_FIRST, TIMEOUTS},
    flow::Address,
    stat::Reason,
};
use cnsmo_ebpf::{
    host::{Frame, HostTables},
    pipeline::{ETHERNET, TUNNEL, Verdict, run},
    tables::{Onward, Question},
};
use cnsmo_proto::{
    model::{Action, Direction, FirewallPolicy, Name},
    pb::policy as pb,
};
use cnsmo_tests::{
    PinDir,
    frame::{self, Ends, Random, ethernet, random_packet},
};

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const TC_SHOT: u32 = 2;
const TC_NEXT: u32 = u32::MAX;
const TC_REDIRECT: u32 = 7;
/// Kernel's index of the device that test runs come by.
const LOOPBACK: u32 = 1;

/// The kernel refuses test frames with nothing behind the Ethernet header.
const FRAME_MIN: usize = 15;
const RULES_MAX: u32 = 64;
const FRAMES: usize = 10_000;

#[test]
fn host_xdp_and_tc_agree_on_random_frames() {
    for (n, policy) in policies().into_iter().enumerate() {
        let mut judges = [
            Judges::new(&policy, "nic_xdp", "nic_egress"),
            Judges::new(&policy, "nic_ingress", "nic_egress"),
        ];
        let mut random = Random::new(0x5eed + n as u64);
        for _ in 0..FRAMES {
            let outbound = random.one_in(2);
            let tags: &[u16] =
                random.pick(&[&[][..], &[], &[0x8100], &[0x88a8, 0x8100], &[0x8100; 3]]);
            let mut frame = ethernet(tags, &random_packet(&mut random, outbound));
            if random.one_in(50) {
                frame[12..14].copy_from_slice(&random.pick(&[[8, 6], [0x88, 0xcc], [0x86, 0xdd]]));
            }
            for judges in &mut judges {
                judges.judge(&frame, outbound, true);
            }
        }
        for judges in judges {
            judges.finish();
        }
    }
}

#[test]
fn host_and_tunnel_programs_agree_on_random_packets() {
    for (n, policy) in policies().into_iter().enumerate() {
        let mut judges = Judges::new(&policy, "tunnel_ingress", "tunnel_egress");
        let mut random = Random::new(0x7e57 + n as u64);
        for _ in 0..FRAMES {
            let outbound = random.one_in(2);
            let packet = random_packet(&mut random, outbound);
            judges.judge(&packet, outbound, false);
        }
        judges.finish();
    }
}

#[test]
fn every_truncation_is_judged_alike() {
    let policy = policies().remove(0);
    let mut judges = Judges::new(&policy, "nic_xdp", "nic_egress");
    let (a, b) = ([10, 0, 1, 1], [10, 0, 0, 5]);
    let (mut a6, mut b6) = ([0xfd; 16], [0xfd; 16]);
    (a6[15], b6[15]) = (1, 2);
    let inner = frame::ip(Ends::V4(b, a), 17, &frame::udp(53, 40_000, b""));
    for packet in [
        frame::ip(Ends::V4(a, b), 6, &frame::tcp(40_000, 80, 2, b"")),
        frame::ip(Ends::V6(a6, b6), 6, &frame::tcp(40_000, 80, 2, b"")),
        frame::ip(Ends::V4(a, b), 17, &frame::udp(40_000, 53, b"question")),
        frame::ip(Ends::V4(a, b), 1, &frame::icmp(3, 3, [0; 4], &inner)),
        frame::ipv6(
            a6,
            b6,
            0,
            64,
            &[&[60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0][..], &frame::udp(1, 2, b"")]
                .concat(),
        ),
    ] {
        let whole = ethernet(&[0x8100], &packet);
        for length in FRAME_MIN..=whole.len() {
            judges.judge(&whole[..length], false, true);
        }
    }
    judges.finish();
}

/// One kernel and the host, fed the same frames.
struct Judges {
    kernel: Kernel,
    host: HostTables,
    ingress: &'static str,
    egress: &'static str,
    passed: usize,
    dropped: usize,
    refused: usize,
    rewritten: usize,
    _pins: PinDir,
    _state: tempfile::TempDir,
}

impl Judges {
    fn new(policy: &Effective, ingress: &'static str, egress: &'static str) -> Self {
        let (pins, state) = (PinDir::new("agree"), tempfile::tempdir().unwrap());
        let mut kernel = Kernel::open(Options {
            pins: pins.path().to_owned(),
            state: state.path().to_owned(),
            interfaces: vec![],
            xdp: XdpChoice::Auto,
            flows: 65_536,
            policy_bytes: 1 << 16,
            rules_max: RULES_MAX,
        })
        .unwrap();
        kernel.apply(policy).unwrap();
        // The host's clock stands still: nothing may depend on how long the run takes.
        kernel.change_control(|control| {
            control.pickup_until = 0;
            control.timeouts = [1 << 30; TIMEOUTS];
            control.fragment_timeout = 1 << 30;
        });
        Self {
            kernel,
            host: host(policy),
            ingress,
            egress,
            passed: 0,
            dropped: 0,
            refused: 0,
            rewritten: 0,
            _pins: pins,
            _state: state,
        }
    }

    /// Where the frame goes and what it is then; `None`: it is dropped.
    fn judge(&mut self, frame: &[u8], outbound: bool, ethernet: bool) -> Option<(Onward, Vec<u8>)> {
        if frame.len() < FRAME_MIN {
            return None;
        }
        let program = if outbound { self.egress } else { self.ingress };
        // Test runs of TC programs refuse frames that claim to be IP and are too short for it.
        let (code, bytes) = match self.kernel.test_run(program, frame) {
            Ok(run) => run,
            Err(error) if is_invalid_argument(&error) => {
                self.refused += 1;
                return None;
            }
            Err(error) => panic!("{error:?}"),
        };
        let (expected, after) = self.expect(program, frame, outbound, ethernet);
        match expected {
            Ok(_) => self.passed += 1,
            Err(_) => self.dropped += 1,
        }
        let wanted = match expected {
            Ok(Onward::Same) if program == "nic_xdp" => XDP_PASS,
            Ok(Onward::Same) => TC_NEXT,
            Ok(Onward::Tunnel | Onward::Client) => TC_REDIRECT,
            Err(_) if program == "nic_xdp" => XDP_DROP,
            Err(_) => TC_SHOT,
        };
        assert_eq!(code, wanted, "{program} against {expected:?}: {frame:02x?}");
        assert_eq!(bytes, after, "{program} ({expected:?}) made of {frame:02x?}");
        self.rewritten += usize::from(after != frame);
        expected.ok().map(|onward| (onward, after))
    }

    /// The host's verdict, and what the frame is afterwards.
    fn expect(
        &self,
        program: &str,
        frame: &[u8],
        outbound: bool,
        ethernet: bool,
    ) -> (Result<Onward, Reason>, Vec<u8>) {
        if program == "nic_xdp" {
            let verdict = run::<_, _, ETHERNET, false>(frame, &self.host);
            let Verdict::Drop(reason) = verdict else { return (Ok(Onward::Same), frame.to_vec()) };
            return (Err(reason), frame.to_vec());
        }
        let frame = Frame::new(frame, LOOPBACK);
        let expected = match (ethernet, outbound) {
            (true, false) => frame.run::<ETHERNET, false>(&self.host),
            (true, true) => frame.run::<ETHERNET, true>(&self.host),
            (false, false) => frame.run::<TUNNEL, false>(&self.host),
            (false, true) => frame.run::<TUNNEL, true>(&self.host),
        };
        let mut after = frame.bytes();
        if expected == Ok(Onward::Client) {
            // Room for the Ethernet header, which the kernel fills in later.
            after.splice(..0, [0; ETHERNET]);
        }
        (expected, after)
    }

    /// Counters are a digest of every decision: drops by reason, packets by rule.
    fn finish(mut self) {
        let judged = self.passed + self.dropped;
        assert!(self.passed > 2 && self.dropped > 50, "{} / {}", self.passed, self.dropped);
        assert!(self.refused * 10 < judged, "{} of {judged} not judged", self.refused);
        let status = self.kernel.status();
        let host = self.host.stat_counts.borrow();
        for (direction, number) in [
            (Direction::Ingress, cnsmo_common::Direction::Ingress),
            (Direction::Egress, cnsmo_common::Direction::Egress),
        ] {
            for reason in Reason::ALL {
                let ours = host.get(&reason.at(number)).copied().unwrap_or_default();
                let theirs = status
                    .drops
                    .iter()
                    .find(|(d, word, _)| *d == direction && *word == reason.as_str())
                    .map(|(_, _, count)| *count)
                    .unwrap_or_default();
                assert_eq!(
                    (theirs.packets, theirs.bytes),
                    (ours.packets, ours.bytes),
                    "{reason:?}"
                );
            }
        }
        let counted: u64 =
            status.counters.values().flat_map(|rules| rules.values()).map(|c| c.packets).sum();
        let host = self.host.rule_counts.borrow();
        let ours: u64 =
            host.iter().filter(|(slot, _)| **slot >= SLOT_FIRST).map(|(_, c)| c.packets).sum();
        assert_eq!(counted, ours, "packets counted by rules");
    }
}

fn is_invalid_argument(error: &KernelError) -> bool {
    let source = std::error::Error::source(error);
    source.is_some_and(|cause| format!("{cause:?}").contains("InvalidInput"))
}

/// The host's tables with the same rules, walked in the same compiled form.
fn host(policy: &Effective) -> HostTables {
    let limits = Limits { blob_words: 1 << 13, rules: RULES_MAX as usize };
    let compiled = compile(policy, &limits).unwrap();
    let live = LiveParts {
        half: 0,
        default_allow: [policy.ingress == Action::Allow, policy.egress == Action::Allow],
        open: policy.open,
        trees_v4: compiled.v4.trees,
        trees_v6: compiled.v6.trees,
        generation: 1,
    };
    let action = |(slot, owned): (u32, &cnsmo_agent::effective::OwnedRule)| RuleAction {
        slot,
        allow: u32::from(owned.rule.action == Action::Allow),
    };
    let rules = (SLOT_FIRST..).zip(&policy.rules).map(action).collect();
    let mut host = HostTables::new(live.pack());
    let (v4, v6) = (compiled.clone(), compiled);
    host.set_rules(
        rules,
        Box::new(move |question, _| classify(&v4, question, IpAddr::from)),
        Box::new(move |question, _| classify(&v6, question, IpAddr::from)),
    );
    host
}

fn classify<A: Address>(
    compiled: &Compiled,
    question: &Question<A>,
    address: impl Fn(A) -> IpAddr,
) -> Option<u32> {
    compiled.classify(&Header {
        src: address(question.src),
        dst: address(question.dst),
        sport: (question.lanes >> SPORT_AT) as u16,
        dport: (question.lanes >> DPORT_AT) as u16,
        proto: (question.lanes >> PROTO_AT) as u8,
        direction: match question.direction {
            cnsmo_common::Direction::Ingress => Direction::Ingress,
            cnsmo_common::Direction::Egress => Direction::Egress,
        },
    })
}

/// Default deny with some holes; default allow with some denials; no policy.
fn policies() -> Vec<Effective> {
    let rule =
        |name: &str, action, direction, from: &[&str], protocol, ports: &[u32]| pb::FirewallRule {
            name: name.into(),
            action,
            direction,
            from_cidrs: from.iter().map(ToString::to_string).collect(),
            protocol,
            ports: ports.iter().map(|&p| pb::PortRange { first: p, last: p }).collect(),
            ..Default::default()
        };
    let (allow, deny) = (pb::Action::Allow as i32, pb::Action::Deny as i32);
    let (ingress, egress) = (pb::Direction::Ingress as i32, pb::Direction::Egress as i32);
    let closed = pb::FirewallPolicySpec {
        default_ingress: deny,
        default_egress: deny,
        rules: vec![
            rule("web", allow, ingress, &["10.0.1.0/25", "fd77::/16"], Some(6), &[80, 443]),
            rule("dns", allow, ingress, &[], Some(17), &[53]),
            rule("ping", allow, ingress, &["10.0.1.1/32"], Some(1), &[]),
            rule("ping6", allow, ingress, &[], Some(58), &[]),
            rule("out", allow, egress, &[], Some(6), &[]),
            rule("out-udp", allow, egress, &[], Some(17), &[53, 40_000]),
            rule("out-ping", allow, egress, &[], Some(1), &[]),
            rule("gre", allow, ingress, &["10.0.1.2/32"], Some(47), &[]),
            rule("sctp", allow, ingress, &[], Some(132), &[80]),
        ],
        ..Default::default()
    };
    let open = pb::FirewallPolicySpec {
        rules: vec![
            rule("no-ssh", deny, ingress, &[], Some(6), &[22]),
            rule("no-dns-out", deny, egress, &[], Some(17), &[53]),
            rule("no-one", deny, ingress, &["10.0.1.200/32", "fd77:0:0:1::c8/128"], None, &[]),
        ],
        ..Default::default()
    };
    let merged = |spec: pb::FirewallPolicySpec| {
        let (name, policy) = (Name::new("test").unwrap(), FirewallPolicy::try_from(spec).unwrap());
        Effective::merge(vec![], [(&name, &policy)])
    };
    vec![merged(closed), merged(open), Effective::merge(vec![], [])]
}
