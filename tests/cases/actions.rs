//! What a rule does beside letting pass and dropping: reject, limit, log, trial.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use cnsmo_agent::{
    datapath::{
        Datapath as _,
        kernel::{Kernel, Options, XdpChoice},
    },
    effective::Effective,
    flows::{FlowLog, FlowRecord, Why},
};
use cnsmo_common::flow::state::CLOSED;
use cnsmo_proto::model::{
    Action, Direction, FirewallPolicy, PolicyMode, Protocol, RateLimit, Rule, protocol,
};

use super::lab::{
    FAMILIES, Lab, PATIENCE, PEER4, SILENCE, VM4, allow_in, arrives, counted, deny_in, dropped,
    name, policy, rule, spec, tcp, udp,
};

/// Where ingress is hooked.
const HOOKS: [(&str, XdpChoice); 2] = [("xdp", XdpChoice::Auto), ("tc", XdpChoice::Off)];

/// A guarded VM whose data path tells and answers.
fn guard(label: &str, xdp: XdpChoice, policy: &Effective) -> (Lab, Kernel, Arc<FlowLog>) {
    let lab = Lab::new(label);
    let mut kernel = lab.open_with(Options { xdp, ..lab.options() }).unwrap();
    lab.apply(&mut kernel, policy);
    let log = Arc::new(FlowLog::default());
    // Answers leave by the network of the VM.
    lab.vm.run(|| kernel.record(Arc::clone(&log))).unwrap().unwrap();
    (lab, kernel, log)
}

/// The records of a port, as soon as there are `n` of them or after a while.
fn told(log: &FlowLog, port: u16, n: usize) -> Vec<FlowRecord> {
    let end = Instant::now() + PATIENCE;
    loop {
        let mut records = log.read(0, usize::MAX).records;
        records.retain(|record| record.ports[1] == port);
        if records.len() >= n || Instant::now() > end {
            return records;
        }
        cnsmo_tests::pause(Duration::from_millis(20));
    }
}

fn refused(connected: io::Result<TcpStream>) -> io::ErrorKind {
    connected.expect_err("connected").kind()
}

/// What a datagram to `to` brings its sender: `None` is silence.
fn fate(socket: &UdpSocket, to: SocketAddr, patience: Duration) -> Option<io::ErrorKind> {
    socket.connect(to).unwrap();
    socket.send(b"x").unwrap();
    socket.set_read_timeout(Some(patience)).unwrap();
    let error = socket.recv(&mut [0; 8]).unwrap_err();
    (error.kind() != io::ErrorKind::WouldBlock).then_some(error.kind())
}

#[test]
fn who_is_rejected_hears_of_it_and_who_is_denied_does_not() {
    for (hook, xdp) in HOOKS {
        let reject = |text, protocol| rule(text, Action::Reject, Direction::Ingress, protocol);
        let rules = vec![reject("tcp", tcp(80)), reject("udp", udp(80))];
        let (lab, mut kernel, log) = guard(&format!("act-rej-{hook}"), xdp, &deny_in(rules));
        for (vm, peer) in FAMILIES {
            let _open = [80, 81].map(|port| lab.listen(&lab.vm, vm, port));
            let connect = |port| lab.connect(&lab.peer, (vm, port).into(), PATIENCE);
            assert_eq!(refused(connect(80)), io::ErrorKind::ConnectionRefused, "{hook} {vm}");
            let silent = lab.connect(&lab.peer, (vm, 81).into(), SILENCE);
            assert_eq!(refused(silent), io::ErrorKind::TimedOut, "{hook} {vm}");

            let socket = || lab.udp(&lab.peer, peer, 0);
            let answered = fate(&socket(), (vm, 80).into(), PATIENCE);
            assert_eq!(answered, Some(io::ErrorKind::ConnectionRefused), "{hook} {vm}");
            assert_eq!(fate(&socket(), (vm, 81).into(), SILENCE), None, "{hook} {vm}");
        }
        assert_eq!(dropped(&mut kernel, Direction::Ingress, "denied"), 4, "{hook}");
        assert_eq!(
            (counted(&mut kernel, "tcp").packets, counted(&mut kernel, "udp").packets),
            (2, 2)
        );
        // The answers are no flow, and nobody counts them as dropped.
        assert_eq!(dropped(&mut kernel, Direction::Egress, "no-flow"), 0, "{hook}");
        assert_eq!(dropped(&mut kernel, Direction::Egress, "icmp-unrelated"), 0, "{hook}");

        let records = told(&log, 80, 4);
        assert_eq!(records.len(), 4, "{hook}: {records:?}");
        for record in records {
            assert_eq!((record.why, record.dropped), (Why::Rejected, Some("denied")), "{hook}");
            let by = if record.protocol == protocol::TCP { "tcp" } else { "udp" };
            assert_eq!(record.rule, Some((name("p"), name(by))), "{hook}");
            assert_eq!(record.direction, Direction::Ingress, "{hook}");
        }
        let silent = told(&log, 81, 4);
        assert!(silent.len() >= 4, "{hook}: {silent:?}");
        let by_default =
            |r: &FlowRecord| (r.why, r.dropped) == (Why::Dropped, Some("denied-by-default"));
        assert!(silent.iter().all(by_default), "{hook}: {silent:?}");
    }
}

#[test]
fn a_process_of_the_vm_is_told_at_once_that_it_may_not_leave() {
    let reject = |text, protocol| rule(text, Action::Reject, Direction::Egress, protocol);
    let rules = vec![reject("tcp", tcp(80)), reject("udp", udp(80))];
    let rules = policy(Action::Deny, Action::Allow, rules);
    let (lab, mut kernel, _log) = guard("act-out", XdpChoice::Auto, &rules);
    for (vm, peer) in FAMILIES {
        let _open = [80, 81].map(|port| lab.listen(&lab.peer, peer, port));
        let connect = |port| lab.connect(&lab.vm, (peer, port).into(), PATIENCE);
        assert_eq!(refused(connect(80)), io::ErrorKind::ConnectionRefused, "{peer}");
        connect(81).unwrap();
        let answered = fate(&lab.udp(&lab.vm, vm, 0), (peer, 80).into(), PATIENCE);
        assert_eq!(answered, Some(io::ErrorKind::ConnectionRefused), "{peer}");
    }
    assert_eq!(dropped(&mut kernel, Direction::Egress, "denied"), 4);
}

#[test]
fn a_connection_that_a_rule_now_rejects_is_reset() {
    let allow = deny_in(vec![allow_in("open", tcp(80))]);
    let (lab, mut kernel, _log) = guard("act-cut", XdpChoice::Auto, &allow);
    let listener = lab.listen(&lab.vm, VM4, 80);
    let mut client = lab.connect(&lab.peer, (VM4, 80).into(), PATIENCE).unwrap();
    let _server = listener.accept().unwrap();
    let shut = deny_in(vec![rule("shut", Action::Reject, Direction::Ingress, tcp(80))]);
    lab.apply(&mut kernel, &shut);
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    io::Write::write_all(&mut client, b"x").unwrap();
    let error = io::Read::read(&mut client, &mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn without_an_agent_who_is_rejected_hears_nothing_and_gets_nowhere() {
    let shut = deny_in(vec![rule("shut", Action::Reject, Direction::Ingress, tcp(80))]);
    let (lab, kernel, _log) = guard("act-dead", XdpChoice::Auto, &shut);
    let _open = lab.listen(&lab.vm, VM4, 80);
    let connect = |limit| refused(lab.connect(&lab.peer, (VM4, 80).into(), limit));
    assert_eq!(connect(PATIENCE), io::ErrorKind::ConnectionRefused);
    drop(kernel);
    assert_eq!(connect(SILENCE), io::ErrorKind::TimedOut);
}

/// Ten an hour is none more while a test runs; three at once.
fn limited(per_source: bool, protocol: Protocol) -> Rule {
    let limit = RateLimit { flows: 10, period_seconds: 3_600, burst: 3, per_source };
    Rule { limit: Some(limit), ..allow_in("few", protocol) }
}

#[test]
fn no_more_flows_begin_than_a_limit_allows_and_those_there_are_go_on() {
    for (hook, xdp) in HOOKS {
        let rules = deny_in(vec![limited(false, udp(5_000))]);
        let (lab, mut kernel, log) = guard(&format!("act-lim-{hook}"), xdp, &rules);
        let inside = lab.udp(&lab.vm, VM4, 5_000);
        let senders: Vec<_> = (0..8).map(|_| lab.udp(&lab.peer, PEER4, 0)).collect();
        let reach = |senders: &[UdpSocket]| {
            for sender in senders {
                sender.send_to(b"x", (VM4, 5_000)).unwrap();
            }
            std::iter::repeat_with(|| arrives(&inside)).take_while(|arrived| *arrived).count()
        };
        assert_eq!(reach(&senders), 3, "{hook}");
        assert_eq!(dropped(&mut kernel, Direction::Ingress, "limited"), 5, "{hook}");
        assert_eq!(reach(&senders[..3]), 3, "{hook}: flows that have begun");
        assert_eq!(told(&log, 5_000, 5)[0].dropped, Some("limited"), "{hook}");
        // A change of the policy elsewhere is no new allowance.
        let more = vec![limited(false, udp(5_000)), allow_in("other", udp(6_000))];
        lab.apply(&mut kernel, &deny_in(more));
        assert_eq!(reach(&senders), 3, "{hook}");
    }
}

#[test]
fn each_source_has_a_limit_of_its_own_if_asked() {
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 7, 0, 3));
    for (per_source, expected) in [(false, 3), (true, 6)] {
        let rules = deny_in(vec![limited(per_source, udp(5_000))]);
        let (lab, _kernel, _log) = guard(&format!("act-src-{per_source}"), XdpChoice::Auto, &rules);
        lab.peer.ip(&["addr", "add", "10.7.0.3/24", "dev", "eth0"]).unwrap();
        let inside = lab.udp(&lab.vm, VM4, 5_000);
        for source in [PEER4, OTHER] {
            for _ in 0..5 {
                lab.udp(&lab.peer, source, 0).send_to(b"x", (VM4, 5_000)).unwrap();
            }
        }
        let arrived = std::iter::repeat_with(|| arrives(&inside)).take_while(|arrived| *arrived);
        assert_eq!(arrived.count(), expected, "per source: {per_source}");
    }
}

#[test]
fn a_source_has_no_more_connections_open_than_a_rule_allows() {
    for (hook, xdp) in HOOKS {
        let two = Rule { connections_per_source: Some(2), ..allow_in("web", tcp(80)) };
        let (lab, mut kernel, log) =
            guard(&format!("act-open-{hook}"), xdp, &deny_in(vec![two.clone()]));
        let listeners = FAMILIES.map(|(vm, _)| lab.listen(&lab.vm, vm, 80));
        let connect = |vm, limit| lab.connect(&lab.peer, (vm, 80).into(), limit);
        let open = |n: usize| {
            let client = connect(FAMILIES[n].0, PATIENCE).unwrap();
            (client, listeners[n].accept().unwrap().0)
        };
        let (first, second) = (open(0), open(0));
        assert_eq!(refused(connect(VM4, SILENCE)), io::ErrorKind::TimedOut, "{hook}");
        assert!(dropped(&mut kernel, Direction::Ingress, "connections") > 0, "{hook}");
        assert_eq!(told(&log, 80, 1)[0].dropped, Some("connections"), "{hook}");
        // By IPv6 it is another source.
        let _others = [open(1), open(1)];
        // A change of the policy elsewhere gives nobody more.
        lab.apply(&mut kernel, &deny_in(vec![allow_in("other", udp(6_000)), two]));
        for (client, server) in [&first, &second] {
            io::Write::write_all(&mut &*client, b"x").unwrap();
            io::Read::read_exact(&mut &*server, &mut [0; 1]).unwrap();
        }
        assert_eq!(refused(connect(VM4, SILENCE)), io::ErrorKind::TimedOut, "{hook}");

        // Closed by both ends, one more may come.
        drop(first);
        let third = soon(|| connect(VM4, SILENCE).ok());
        assert_eq!(refused(connect(VM4, SILENCE)), io::ErrorKind::TimedOut, "{hook}");
        // What ends otherwise counts until it is forgotten.
        kernel.change_control(|control| control.timeouts[usize::from(CLOSED)] = 0);
        socket2::SockRef::from(&second.0).set_linger(Some(Duration::ZERO)).unwrap();
        drop(second);
        let fourth = soon(|| {
            kernel.sweep();
            connect(VM4, SILENCE).ok()
        });
        drop((third, fourth));
    }
}

/// What there is after a while at the latest.
fn soon<T>(mut there: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(it) = there() {
            return it;
        }
        assert!(Instant::now() < end, "not in time");
    }
}

#[test]
fn a_policy_on_trial_drops_nothing_and_says_what_it_would_have_dropped() {
    let mut trial = spec(
        Action::Deny,
        Action::Allow,
        vec![rule("shut", Action::Reject, Direction::Ingress, tcp(80)), allow_in("open", tcp(81))],
    );
    trial.mode = PolicyMode::Audit;
    let merged = |spec: &FirewallPolicy| Effective::merge(vec![], [(&name("p"), spec)]);
    let (lab, mut kernel, log) = guard("act-trial", XdpChoice::Auto, &merged(&trial));
    for (vm, _) in FAMILIES {
        for port in [80, 81, 82] {
            let _open = lab.listen(&lab.vm, vm, port);
            lab.connect(&lab.peer, (vm, port).into(), PATIENCE).unwrap();
        }
    }
    assert_eq!(kernel_drops(&mut kernel), 0);
    let records = told(&log, 82, 2);
    assert_eq!(records.len(), 2, "{records:?}");
    assert!(records.iter().all(|r| r.why == Why::Audited && r.dropped.is_none()), "{records:?}");
    let by_rule: Vec<_> = told(&log, 80, 2).into_iter().map(|r| r.rule).collect();
    assert_eq!(by_rule, [Some((name("p"), name("shut"))), Some((name("p"), name("shut")))]);
    assert_eq!(told(&log, 81, 0), [], "what it allows is not worth a record");
    assert!(counted(&mut kernel, "shut").packets >= 2);

    // Enforced, the same policy drops, also what it let begin.
    trial.mode = PolicyMode::Enforce;
    let _open = lab.listen(&lab.vm, VM4, 80);
    let client = lab.connect(&lab.peer, (VM4, 80).into(), PATIENCE).unwrap();
    lab.apply(&mut kernel, &merged(&trial));
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    io::Write::write_all(&mut &client, b"x").unwrap();
    let error = io::Read::read(&mut &client, &mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(kernel_drops(&mut kernel) > 0);
}

fn kernel_drops(kernel: &mut Kernel) -> u64 {
    ["denied", "denied-by-default", "no-flow", "limited", "revoked"]
        .map(|reason| dropped(kernel, Direction::Ingress, reason))
        .iter()
        .sum()
}

#[test]
fn a_logged_rule_tells_of_each_new_flow_and_not_of_each_packet() {
    let rules = vec![Rule { log: true, ..allow_in("web", tcp(80)) }];
    let (lab, _kernel, log) = guard("act-log", XdpChoice::Auto, &deny_in(rules));
    let listener = lab.listen(&lab.vm, VM4, 80);
    for _ in 0..3 {
        let mut client = lab.connect(&lab.peer, (VM4, 80).into(), PATIENCE).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        for _ in 0..10 {
            io::Write::write_all(&mut client, b"x").unwrap();
            io::Read::read_exact(&mut server, &mut [0; 1]).unwrap();
        }
    }
    let records = told(&log, 80, 3);
    assert_eq!(records.len(), 3, "{records:?}");
    for record in records {
        assert_eq!((record.why, record.dropped), (Why::Logged, None));
        assert_eq!((record.src, record.dst, record.tcp_flags & 0x3f), (PEER4, VM4, 2));
        assert_eq!(record.rule, Some((name("p"), name("web"))));
    }
}

#[test]
fn a_flood_makes_no_more_records_than_there_is_a_budget_for() {
    let (lab, mut kernel, log) = guard("act-flood", XdpChoice::Auto, &deny_in(vec![]));
    let sender = lab.udp(&lab.peer, PEER4, 0);
    for _ in 0..5_000 {
        sender.send_to(b"x", (VM4, 9)).unwrap();
    }
    let end = Instant::now() + PATIENCE;
    while dropped(&mut kernel, Direction::Ingress, "denied-by-default") < 5_000 {
        assert!(Instant::now() < end, "not all were counted");
        cnsmo_tests::pause(Duration::from_millis(20));
    }
    // The budget is filled up by the sweep alone, which nobody calls here.
    let records = told(&log, 9, 200).len();
    assert!((1..=202).contains(&records), "{records} records");
}
