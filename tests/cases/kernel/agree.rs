//! Three judges: for every frame the host function, the XDP program and the TC programs must give the same verdict and
//! leave the same bytes; and in the end the same flows.

use std::net::IpAddr;

use cnsmo_agent::{
    balance::ring,
    compile::{
        Compiled, Limits,
        actions::{actions, limits, live},
        compile,
        trace::Header,
    },
    datapath::{
        Datapath as _,
        kernel::{Kernel, KernelError, Options, XdpChoice},
    },
    effective::{BackendTarget, Balancer, Effective, TunnelDevice},
};
use cnsmo_common::{
    balance::{Backend, Ring, Service, ServiceKey},
    blob::{DPORT_AT, PROTO_AT, SPORT_AT},
    control::{Control, SLOT_FIRST, TIMEOUTS},
    flow::Address,
    stat::Reason,
};
use cnsmo_ebpf::{
    host::{Frame, HostTables},
    pipeline::{ETHERNET, TUNNEL, Verdict, run},
    tables::{Onward, Question},
};
use cnsmo_proto::{
    model::{Addresses, Algorithm, Direction, FirewallPolicy, Name, ServicePort},
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

/// Every packet is one of a flow to a virtual address, or an answer to one that went there.
#[test]
fn translated_packets_are_the_same_bytes() {
    in_own_network(|| {
        for (n, outbound) in [(1, false), (2, true)] {
            let policy = balanced(policies().remove(4));
            let (card, tunnel) = if outbound {
                (["nic_ingress", "nic_egress"], ["tunnel_ingress", "tunnel_egress"])
            } else {
                (["nic_balance", "nic_egress"], ["tunnel_ingress", "tunnel_egress"])
            };
            let mut judges = Judges::new(&policy, card[0], card[1]);
            let mut random = Random::new(0xba1a + n);
            for _ in 0..FRAMES / 4 {
                let packet = seal(service_packet(&mut random, outbound));
                let programs = if outbound { tunnel } else { card };
                (judges.ingress, judges.egress) = (programs[0], programs[1]);
                let sent = if outbound {
                    judges.judge(&packet, true, false)
                } else {
                    let frame = judges.judge(&ethernet(&[], &packet), false, true);
                    frame.map(|(onward, bytes)| (onward, bytes[ETHERNET..].to_vec()))
                };
                let Some((_, inside)) = sent else { continue };
                assert!(is_sealed(&inside) || !is_sealed(&packet), "{packet:02x?} {inside:02x?}");
                (judges.ingress, judges.egress) = (tunnel[0], tunnel[1]);
                let Some(answer) = answer(&mut random, &inside) else { continue };
                let answer = seal(answer);
                if let Some((_, back)) = judges.judge(&answer, false, false) {
                    let back = &back[if outbound { 0 } else { ETHERNET }..];
                    assert!(is_sealed(back), "{answer:02x?} {back:02x?}");
                }
            }
            assert!(judges.rewritten > FRAMES / 8, "{} rewritten", judges.rewritten);
            judges.finish_verdicts();
        }
    });
}

fn in_own_network(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        work();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

const VIRTUAL_V4: [u8; 4] = [10, 0, 0, 6];
const BACKENDS: [u8; 3] = [1, 2, 3];

fn virtual_v6() -> [u8; 16] {
    let mut address = [0; 16];
    (address[0], address[1], address[15]) = (0xfd, 0x77, 6);
    address
}

fn inside_v6(host: u8) -> [u8; 16] {
    let mut address = [0; 16];
    (address[0], address[1], address[15]) = (0xfd, 0x99, host);
    address
}

/// With a balancer and a tunnel; the loopback device of this namespace stands for it.
fn balanced(mut policy: Effective) -> Effective {
    let inside =
        |host| Addresses { v4: Some([10, 0, 2, host].into()), v6: Some(inside_v6(host).into()) };
    policy.tunnel = Some(TunnelDevice {
        device: "lo".into(),
        addresses: inside(9),
        prefixes: vec!["10.0.2.0/24".parse().unwrap(), "fd99::/64".parse().unwrap()],
        mtu: 1_280,
    });
    let port = |protocol, port| ServicePort { protocol, port, target_port: port + 1_000 };
    let node = |host| BackendTarget {
        instance: None,
        port: 0,
        node: Name::new(format!("b{host}")).unwrap(),
        addresses: inside(host),
    };
    policy.balancers = vec![Balancer {
        name: Name::new("web").unwrap(),
        addresses: vec![VIRTUAL_V4.into(), virtual_v6().into()],
        ports: vec![port(6, 80), port(6, 443), port(17, 53)],
        algorithm: Algorithm::Maglev,
        gateway: true,
        backends: BACKENDS.into_iter().map(node).collect(),
    }];
    policy
}

/// Of a few clients, so that handshakes are completed by chance.
fn service_packet(random: &mut Random, outbound: bool) -> Vec<u8> {
    let ends = if random.one_in(2) {
        let client = if outbound { [10, 0, 2, 9] } else { [10, 0, 1, random.pick(&[1, 200])] };
        Ends::V4(client, VIRTUAL_V4)
    } else {
        let client = if outbound { inside_v6(9) } else { inside_v6_client(random) };
        Ends::V6(client, virtual_v6())
    };
    let sport = random.pick(&[40_000, 40_001, 40_002]);
    match random.below(8) {
        0 | 1 => frame::ip(ends, 17, &frame::udp(sport, 53, b"question")),
        2 => {
            let mut syn = frame::tcp(sport, 80, 2, b"");
            syn[12] = 0x70;
            syn.extend([1, 2, 4, 5, 180, 1, 1, 0]);
            frame::ip(ends, 6, &syn)
        }
        3 => frame::ip(ends, 6, &frame::tcp(sport, 443, 2, b"")),
        4 => frame::ip(ends, 6, &frame::tcp(sport, 443, 0x11, b"odd")),
        _ => frame::ip(ends, 6, &frame::tcp(sport, random.pick(&[80, 443]), 0x10, b"bytes")),
    }
}

fn inside_v6_client(random: &mut Random) -> [u8; 16] {
    let mut address = virtual_v6();
    (address[7], address[15]) = (1, random.pick(&[1, 200]));
    address
}

/// What a backend might send back to `packet`: an answer, or an error about it.
fn answer(random: &mut Random, packet: &[u8]) -> Option<Vec<u8>> {
    let is_v4 = packet[0] >> 4 == 4;
    let (ends, l4) = if is_v4 {
        let at = |n: usize| packet[n..n + 4].try_into().unwrap();
        (Ends::V4(at(16), at(12)), 20)
    } else {
        let at = |n: usize| packet[n..n + 16].try_into().unwrap();
        (Ends::V6(at(24), at(8)), 40)
    };
    let proto = packet[if is_v4 { 9 } else { 6 }];
    let port = |n: usize| u16::from_be_bytes([packet[l4 + n], packet[l4 + n + 1]]);
    let (sport, dport) = (port(2), port(0));
    if random.one_in(6) {
        let (proto, kind) = if is_v4 { (1, 3) } else { (58, 1) };
        return Some(frame::ip(ends, proto, &frame::icmp(kind, 1, [0; 4], packet)));
    }
    match proto {
        6 => {
            let flags = random.pick(&[0x12, 0x10, 0x10, 0x11, 0x04]);
            Some(frame::ip(ends, 6, &frame::tcp(sport, dport, flags, b"")))
        }
        17 => Some(frame::ip(ends, 17, &frame::udp(sport, dport, b"answer"))),
        _ => None,
    }
}

/// RFC 1071.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let word = |word: &[u8]| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
    let mut sum: u32 = words.map(word).sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// Sum of the L4 header, payload and pseudo-header, and the place of the checksum.
fn whole_sum(packet: &[u8]) -> (u16, usize) {
    let is_v4 = packet[0] >> 4 == 4;
    let (addresses, l4, proto) =
        if is_v4 { (12..20, 20, packet[9]) } else { (8..40, 40, packet[6]) };
    let mut covered = packet[l4..].to_vec();
    covered.resize(covered.len().next_multiple_of(2), 0);
    if proto != 1 {
        covered.extend(&packet[addresses]);
        covered.extend([0, proto]);
        covered.extend(((packet.len() - l4) as u16).to_be_bytes());
    }
    let at = match proto {
        6 => 16,
        17 => 6,
        _ => 2,
    };
    (sum(&covered), l4 + at)
}

/// Fills in the checksums of a packet without options.
fn seal(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        let sum = !sum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let (sum, at) = whole_sum(&packet);
    packet[at..at + 2].copy_from_slice(&(!sum).to_be_bytes());
    packet
}

fn is_sealed(packet: &[u8]) -> bool {
    (packet[0] >> 4 != 4 || sum(&packet[..20]) == 0xffff) && whole_sum(packet).0 == 0xffff
}

/// Backends and rings as the agent fills them in, found by the same pure function.
fn fill_balancers(host: &mut HostTables, policy: &Effective) {
    for (place, balancer) in (0..).zip(&policy.balancers) {
        for address in &balancer.addresses {
            let (address, family) = match address {
                IpAddr::V4(address) => (address.octets().widen(), 4),
                IpAddr::V6(address) => (address.octets(), 6),
            };
            for port in &balancer.ports {
                let key = ServiceKey {
                    address,
                    port: port.port.to_be_bytes(),
                    proto: port.protocol,
                    family,
                };
                let service = Service {
                    balancer: place,
                    target: port.target_port.to_be_bytes(),
                    gateway: u8::from(balancer.gateway),
                    ..Service::default()
                };
                host.services.borrow_mut().insert(key, service);
            }
        }
        let targets = &balancer.backends;
        let octets = |target: &BackendTarget| Backend {
            v4: target.addresses.v4.unwrap().octets(),
            v6: target.addresses.v6.unwrap().octets(),
            port: target.port.to_be_bytes(),
            ..Backend::default()
        };
        *host.backends.borrow_mut() = targets.iter().map(octets).collect();
        let numbered = targets.iter().map(BackendTarget::ring_name).zip(0..).collect();
        let slots = ring(balancer.algorithm, numbered);
        *host.rings.borrow_mut() = vec![Ring::new(0, slots.len() as u32)];
        *host.slots.borrow_mut() = slots;
    }
}

/// No frame makes a program give up: its verdict would be another one than the host's.
#[test]
fn malformed_frames_are_judged_alike() {
    let frames = frame::malformed();
    let policy = policies().remove(0);
    for (ingress, egress) in [("nic_xdp", "nic_egress"), ("nic_ingress", "nic_egress")] {
        let mut judges = Judges::new(&policy, ingress, egress);
        for frame in &frames {
            for outbound in [false, true] {
                judges.judge(frame, outbound, true);
            }
        }
        judges.finish();
    }
    let mut judges = Judges::new(&policy, "tunnel_ingress", "tunnel_egress");
    for frame in frames.iter().filter(|frame| frame.len() > ETHERNET) {
        for outbound in [false, true] {
            judges.judge(&frame[ETHERNET..], outbound, false);
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
        let mut host = host(policy);
        fill_balancers(&mut host, policy);
        // The host's clock stands still: nothing may depend on how long the run takes.
        kernel.change_control(|control| {
            let (live, refresh, timeouts) =
                (host.control.live, host.control.refresh, host.control.timeouts);
            host.control = Control { live, refresh, timeouts, ..*control };
            host.control.fragment_timeout = 1_000;
            host.control.pickup_until = 0;
            control.pickup_until = 0;
            control.timeouts = [1 << 30; TIMEOUTS];
            control.fragment_timeout = 1 << 30;
        });
        Self {
            kernel,
            host,
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
    fn finish(self) {
        let judged = self.passed + self.dropped;
        assert!(self.passed > 2 && self.dropped > 50, "{} / {}", self.passed, self.dropped);
        assert!(self.refused * 10 < judged, "{} of {judged} not judged", self.refused);
        self.finish_verdicts();
    }

    fn finish_verdicts(mut self) {
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
    let room = Limits { blob_words: 1 << 13, rules: RULES_MAX as usize };
    let compiled = compile(policy, &room).unwrap();
    let live = live(policy, &compiled, 0, 1);
    let rules = actions(policy, SLOT_FIRST);
    let mut host = HostTables::new(live.pack());
    let (v4, v6) = (compiled.clone(), compiled);
    host.set_rules(
        rules,
        Box::new(move |question, _| classify(&v4, question, IpAddr::from)),
        Box::new(move |question, _| classify(&v6, question, IpAddr::from)),
    );
    host.limits = limits(policy);
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
    let reject = pb::Action::Reject as i32;
    // So slow that the judges' clocks do not matter.
    let limit = |burst, per_source| {
        let limit = pb::RateLimit { flows: 1, period_seconds: 86_400, burst, per_source };
        move |rule| pb::FirewallRule { limit: Some(limit), log: true, ..rule }
    };
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
    let acting = pb::FirewallPolicySpec {
        default_ingress: reject,
        rules: vec![
            limit(40, false)(rule("web", allow, ingress, &[], Some(6), &[80, 443])),
            limit(3, true)(rule("dns", allow, ingress, &[], Some(17), &[53])),
            rule("no-ping", reject, ingress, &["10.0.1.1/32"], Some(1), &[]),
            limit(9, true)(rule("ping", allow, ingress, &[], None, &[])),
        ],
        ..Default::default()
    };
    let trial = pb::FirewallPolicySpec { mode: pb::Mode::Audit.into(), ..closed.clone() };
    let merged = |spec: pb::FirewallPolicySpec| {
        let (name, policy) = (Name::new("test").unwrap(), FirewallPolicy::try_from(spec).unwrap());
        Effective::merge(vec![], [(&name, &policy)])
    };
    let specs = [closed, open, acting, trial];
    specs.into_iter().map(merged).chain([Effective::merge(vec![], [])]).collect()
}
