//! Real sockets through the firewall of a guarded namespace.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream},
    time::Duration,
};

use cnsmo_agent::datapath::{
    ApplyError, Attachment, Datapath as _,
    kernel::{Kernel, Options},
};
use cnsmo_agent::effective::Effective;
use cnsmo_proto::model::{Action, Direction, PortRange, Protocol, protocol};

use super::lab::{
    FAMILIES, Lab, PATIENCE, PEER4, SILENCE, VM4, allow_in, allow_out, arrives, counted, deny_in,
    dropped, name, policy, spec, tcp, udp,
};

/// A ping of two packets.
fn ping(lab: &Lab, from_vm: bool, to: IpAddr) -> bool {
    let netns = if from_vm { &lab.vm } else { &lab.peer };
    let mut command = netns.command("ping").unwrap();
    command.args(["-n", "-q", "-c", "2", "-i", "0.2", "-W", "1"]).arg(to.to_string());
    command.output().unwrap().status.success()
}

fn stream(lab: &Lab, listener: &TcpListener, from_vm: bool) -> (TcpStream, TcpStream) {
    let netns = if from_vm { &lab.vm } else { &lab.peer };
    let client = lab.connect(netns, listener.local_addr().unwrap(), PATIENCE).unwrap();
    let (server, _) = listener.accept().unwrap();
    (client, server)
}

/// Whether a byte written at one end is read at the other.
pub(super) fn carries(from: &mut TcpStream, to: &mut TcpStream, limit: Duration) -> bool {
    from.write_all(b"x").unwrap();
    to.set_read_timeout(Some(limit)).unwrap();
    match to.read(&mut [0; 16]) {
        Ok(length) => length > 0,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        Err(error) => panic!("the connection broke: {error}"),
    }
}

#[test]
fn tcp_connects_where_a_rule_allows_it() {
    let lab = Lab::new("fw-tcp");
    let listeners = FAMILIES.map(|(vm, _)| [80, 81].map(|port| lab.listen(&lab.vm, vm, port)));
    let mut kernel = lab.guard(&deny_in(vec![allow_in("open", tcp(80))]));
    for [open, shut] in &listeners {
        let (mut client, mut server) = stream(&lab, open, false);
        assert!(carries(&mut client, &mut server, PATIENCE));
        assert!(carries(&mut server, &mut client, PATIENCE));
        let error = lab.connect(&lab.peer, shut.local_addr().unwrap(), SILENCE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    }
    assert!(dropped(&mut kernel, Direction::Ingress, "denied-by-default") >= 2);
    assert_eq!(dropped(&mut kernel, Direction::Egress, "denied-by-default"), 0);
}

#[test]
fn udp_answers_pass_and_unsolicited_datagrams_are_counted() {
    let lab = Lab::new("fw-udp");
    let mut kernel = lab.guard(&deny_in(vec![]));
    for (n, (vm, peer)) in (1..).zip(FAMILIES) {
        let (inside, outside) = (lab.udp(&lab.vm, vm, 5000), lab.udp(&lab.peer, peer, 53));
        inside.send_to(b"question", (peer, 53)).unwrap();
        let mut bytes = [0; 16];
        let (_, from) = outside.recv_from(&mut bytes).unwrap();
        outside.send_to(b"answer", from).unwrap();
        let (length, _) = inside.recv_from(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"answer");

        let stranger = lab.udp(&lab.peer, peer, 54);
        for _ in 0..7 {
            stranger.send_to(b"hello", (vm, 5000)).unwrap();
        }
        assert!(!arrives(&inside));
        assert_eq!(dropped(&mut kernel, Direction::Ingress, "denied-by-default"), 7 * n);
    }
}

#[test]
fn pings_pass_by_direction_and_by_rule() {
    let lab = Lab::new("fw-ping");
    let mut kernel = lab.guard(&deny_in(vec![]));
    for (vm, peer) in FAMILIES {
        assert!(ping(&lab, true, peer), "{peer}: the answer belongs to a flow");
        assert!(!ping(&lab, false, vm), "{vm}");
    }
    let icmp = |number| Protocol::Icmp { number, types: vec![] };
    let rules =
        vec![allow_in("ping4", icmp(protocol::ICMP)), allow_in("ping6", icmp(protocol::ICMPV6))];
    lab.apply(&mut kernel, &policy(Action::Deny, Action::Deny, rules));
    for (vm, peer) in FAMILIES {
        assert!(ping(&lab, false, vm), "{vm}");
        assert!(!ping(&lab, true, peer), "{peer}");
    }
}

#[test]
fn neighbours_are_found_under_deny() {
    let lab = Lab::new("fw-nd");
    let rules = vec![allow_in("in", udp(80)), allow_out("out", udp(53))];
    let _kernel = lab.guard(&policy(Action::Deny, Action::Deny, rules));
    for (vm, peer) in FAMILIES {
        let (inside, outside) = (lab.udp(&lab.vm, vm, 80), lab.udp(&lab.peer, peer, 53));
        for netns in [&lab.vm, &lab.peer] {
            netns.ip(&["neigh", "flush", "dev", "eth0"]).unwrap();
        }
        inside.send_to(b"out", (peer, 53)).unwrap();
        assert_eq!(outside.recv_from(&mut [0; 16]).unwrap().1, (vm, 80).into());
        for netns in [&lab.vm, &lab.peer] {
            netns.ip(&["neigh", "flush", "dev", "eth0"]).unwrap();
        }
        outside.send_to(b"in", (vm, 80)).unwrap();
        assert_eq!(inside.recv_from(&mut [0; 16]).unwrap().1, (peer, 53).into());
    }
}

#[test]
fn an_icmp_error_about_an_own_datagram_arrives() {
    let lab = Lab::new("fw-unreach");
    let _kernel = lab.guard(&deny_in(vec![]));
    for (vm, peer) in FAMILIES {
        let socket = lab.udp(&lab.vm, vm, 0);
        socket.connect((peer, 9999)).unwrap();
        socket.send(b"anyone?").unwrap();
        let error = socket.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
    }
}

#[test]
fn fragments_follow_their_first_one() {
    const BYTES: usize = 8_000;
    let lab = Lab::new("fw-frag");
    let mut kernel = lab.guard(&deny_in(vec![allow_in("open", udp(80))]));
    for (vm, peer) in FAMILIES {
        let (open, shut) = (lab.udp(&lab.vm, vm, 80), lab.udp(&lab.vm, vm, 81));
        let outside = lab.udp(&lab.peer, peer, 53);
        let sent: Vec<u8> = (0..BYTES).map(|n| (n / 7) as u8).collect();
        let mut bytes = vec![0; 2 * BYTES];
        outside.send_to(&sent, (vm, 80)).unwrap();
        let (length, from) = open.recv_from(&mut bytes).unwrap();
        assert_eq!(bytes[..length], sent);
        open.send_to(&sent, from).unwrap();
        let (length, _) = outside.recv_from(&mut bytes).unwrap();
        assert_eq!(bytes[..length], sent);

        outside.send_to(&sent, (vm, 81)).unwrap();
        assert!(!arrives(&shut));
    }
    assert_eq!(dropped(&mut kernel, Direction::Ingress, "denied-by-default"), 2);
    // 8,008 bytes in packets of at most 1,480: one more that is no first fragment, five times.
    assert_eq!(dropped(&mut kernel, Direction::Ingress, "fragment-orphan"), 2 * 5);
}

#[test]
fn early_fragments_pass_where_the_policy_says_so_and_are_no_datagram() {
    let mut lets = spec(Action::Deny, Action::Allow, vec![allow_in("open", udp(80))]);
    lets.orphan_fragments = Some(true);
    let lab = Lab::new("fw-orphan");
    let mut kernel = lab.guard(&Effective::merge(vec![], [(&name("p"), &lets)]));
    for (vm, peer) in FAMILIES {
        let shut = lab.udp(&lab.vm, vm, 81);
        lab.udp(&lab.peer, peer, 53).send_to(&[7; 8_000], (vm, 81)).unwrap();
        assert!(!arrives(&shut), "its first fragment is refused");
    }
    assert_eq!(dropped(&mut kernel, Direction::Ingress, "denied-by-default"), 2);
    assert_eq!(dropped(&mut kernel, Direction::Ingress, "fragment-orphan"), 0);
}

#[test]
fn a_flow_is_over_when_the_policy_says_so() {
    for (seconds, answered) in [(1, false), (60, true)] {
        let mut brief = spec(Action::Deny, Action::Allow, vec![]);
        brief.timeouts.unreplied = Some(seconds);
        let lab = Lab::new(&format!("fw-time-{seconds}"));
        let mut kernel = lab.guard(&Effective::merge(vec![], [(&name("p"), &brief)]));
        let (inside, outside) = (lab.udp(&lab.vm, VM4, 0), lab.udp(&lab.peer, PEER4, 53));
        inside.send_to(b"x", (PEER4, 53)).unwrap();
        let (_, from) = outside.recv_from(&mut [0; 8]).unwrap();
        cnsmo_tests::pause(Duration::from_millis(2_500));
        outside.send_to(b"y", from).unwrap();
        assert_eq!(arrives(&inside), answered, "after {seconds} s");
        let late = dropped(&mut kernel, Direction::Ingress, "denied-by-default");
        assert_eq!(late, u64::from(!answered));
    }
}

/// Order matters to it, so that a lost, doubled or moved part shows.
fn fold(sum: u64, bytes: &[u8]) -> u64 {
    let word = |part: &[u8]| part.iter().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
    bytes.chunks(8).fold(sum, |sum, part| sum.rotate_left(5) ^ word(part))
}

/// Moves 50 MB and returns the sums of both ends.
fn transfer(mut from: TcpStream, mut to: TcpStream) -> (u64, u64) {
    const PART: usize = 64 << 10;
    const PARTS: u64 = 800;
    to.set_read_timeout(Some(PATIENCE)).unwrap();
    let writer = std::thread::spawn(move || {
        from.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut part: Vec<u8> = (0..PART).map(|n| (n * 31 / 7) as u8).collect();
        let mut sum = 0;
        for n in 0..PARTS {
            part[..8].copy_from_slice(&n.to_be_bytes());
            from.write_all(&part).unwrap();
            sum = fold(sum, &part);
        }
        sum
    });
    let (mut sum, mut part) = (0, vec![0; PART]);
    for _ in 0..PARTS {
        to.read_exact(&mut part).unwrap();
        sum = fold(sum, &part);
    }
    (writer.join().unwrap(), sum)
}

#[test]
fn super_packets_pass_native_xdp_whole() {
    let lab = Lab::new("fw-gso");
    let mut kernel = lab.guard(&deny_in(vec![allow_in("open", tcp(80))]));
    let expected = Attachment { interface: "eth0".into(), ingress: "xdp-native", egress: "tcx" };
    assert_eq!(kernel.status().interfaces, [expected]);
    for (vm, _) in FAMILIES {
        let listener = lab.listen(&lab.vm, vm, 80);
        let (client, server) = stream(&lab, &listener, false);
        let (sent, received) = transfer(client, server);
        assert_eq!(sent, received, "towards {vm}");
        let (client, server) = stream(&lab, &listener, false);
        let (sent, received) = transfer(server, client);
        assert_eq!(sent, received, "from {vm}");
    }
    assert_eq!(kernel.status().drops, []);
}

/// Connections towards ports 80 and 81 of the VM and from it to the same ports of the peer; then a policy without 80.
fn cuts(label: &str, egress: Action) {
    let lab = Lab::new(label);
    let ends = [(&lab.vm, VM4), (&lab.peer, PEER4)];
    let listeners = ends.map(|(netns, at)| [80, 81].map(|port| lab.listen(netns, at, port)));
    let both_ways = |port| {
        [allow_in(&format!("in-{port}"), tcp(port)), allow_out(&format!("out-{port}"), tcp(port))]
    };
    let mut kernel = lab.guard(&policy(
        Action::Deny,
        egress,
        [80, 81].into_iter().flat_map(both_ways).collect(),
    ));
    let mut streams = Vec::new();
    for (from_vm, listeners) in [false, true].into_iter().zip(&listeners) {
        for listener in listeners {
            let (mut client, mut server) = stream(&lab, listener, from_vm);
            assert!(carries(&mut client, &mut server, PATIENCE));
            let survives =
                listener.local_addr().unwrap().port() == 81 || from_vm && egress == Action::Allow;
            streams.push((client, server, survives));
        }
    }
    lab.apply(&mut kernel, &policy(Action::Deny, egress, both_ways(81).into()));
    for (client, server, survives) in &mut streams {
        let to = server.local_addr().unwrap();
        // Long enough for segments sent again: what is cut must not come back by one.
        let limit = if *survives { PATIENCE } else { 4 * SILENCE };
        assert_eq!(carries(server, client, limit), *survives, "from {to}, egress {egress:?}");
        assert_eq!(carries(client, server, limit), *survives, "to {to}, egress {egress:?}");
    }
    assert!(
        dropped(&mut kernel, Direction::Ingress, "revoked")
            + dropped(&mut kernel, Direction::Egress, "revoked")
            > 0
    );
}

#[test]
fn a_policy_change_cuts_what_it_no_longer_allows() {
    cuts("fw-cut-deny", Action::Deny);
}

#[test]
fn what_is_cut_does_not_come_back_from_its_other_end() {
    cuts("fw-cut-allow", Action::Allow);
}

#[test]
fn a_rule_counts_each_packet_once() {
    const BURST: u64 = 500;
    let lab = Lab::new("fw-count");
    let _socket = lab.udp(&lab.vm, VM4, 80);
    let mut kernel = lab.guard(&deny_in(vec![allow_in("a", udp(80)), allow_in("b", udp(81))]));
    let outside = lab.udp(&lab.peer, PEER4, 0);
    for _ in 0..BURST {
        outside.send_to(b"12345678", (VM4, 80)).unwrap();
    }
    let end = std::time::Instant::now() + PATIENCE;
    while counted(&mut kernel, "a").packets < BURST && std::time::Instant::now() < end {
        cnsmo_tests::pause(SILENCE / 10);
    }
    let count = counted(&mut kernel, "a");
    assert_eq!((count.packets, count.bytes), (BURST, BURST * (14 + 20 + 8 + 8)));
    assert_eq!(counted(&mut kernel, "b").packets, 0);
}

/// `n` rules about one port each, from 10,000 on, and from one host each, so that none can be left out.
fn many(n: u16) -> Vec<cnsmo_proto::model::Rule> {
    let rule = |n: u16| {
        let port = 10_000 + n;
        let ports = Protocol::Ports {
            number: protocol::UDP,
            source: vec![],
            destination: vec![PortRange::new(port, port).unwrap()],
        };
        let mut rule = allow_in(&format!("r{n}"), ports);
        rule.from = vec!["10.7.0.2/32".parse().unwrap()];
        rule
    };
    (0..n).map(rule).collect()
}

#[test]
fn a_policy_that_does_not_fit_is_refused_by_name_and_the_old_one_stays() {
    let lab = Lab::new("fw-fit");
    let (open, shut) = (lab.udp(&lab.vm, VM4, 80), lab.udp(&lab.vm, VM4, 10_000));
    let options = Options { policy_bytes: 4096, ..lab.options() };
    let mut kernel: Kernel = lab.open_with(options).unwrap();
    let small = spec(Action::Deny, Action::Allow, vec![allow_in("open", udp(80))]);
    lab.apply(&mut kernel, &Effective::merge(vec![], [(&name("small"), &small)]));
    let large = spec(Action::Allow, Action::Allow, many(900));
    let both = Effective::merge(vec![], [(&name("small"), &small), (&name("large"), &large)]);
    let Err(ApplyError::Refused(refused)) = lab.try_apply(&mut kernel, &both) else {
        panic!("900 rules fit in 4 kB");
    };
    assert_eq!(refused.keys().collect::<Vec<_>>(), [&name("large")]);
    assert_eq!(kernel.status().rules, 1);
    assert!(lab.hears(&open, PEER4));
    assert!(!lab.hears(&shut, PEER4));
}

#[test]
fn ten_thousand_rules_apply() {
    let lab = Lab::new("fw-10k");
    let sockets = [10_000, 15_000, 19_999, 20_000].map(|port| lab.udp(&lab.vm, VM4, port));
    let options = Options { rules_max: 16_384, policy_bytes: 2 << 20, ..lab.options() };
    let mut kernel = lab.open_with(options).unwrap();
    lab.apply(&mut kernel, &deny_in(many(10_000)));
    assert_eq!(kernel.status().rules, 10_000);
    let heard = sockets.each_ref().map(|socket| lab.hears(socket, PEER4));
    assert_eq!(heard, [true, true, true, false]);
    for rule in ["r0", "r5000", "r9999"] {
        assert_eq!(counted(&mut kernel, rule).packets, 1, "{rule}");
    }
    assert_eq!(counted(&mut kernel, "r1").packets, 0);
}
