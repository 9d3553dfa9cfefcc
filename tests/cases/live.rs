//! The flows that a VM knows, and what other policies would do to them.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use cnsmo_agent::{
    datapath::{ApplyError, Datapath as _},
    effective::Effective,
    explain::Decider,
    live::{Impact, LiveFlow},
};
use cnsmo_proto::model::{Action, Direction, PolicyMode, Rule, protocol};

use super::lab::{
    FAMILIES, Lab, PATIENCE, VM4, VM6, allow_in, arrives, deny_in, dropped, name, policy, spec,
    tcp, udp,
};

/// Both ends of flows to the VM's UDP ports, answered, so that their states are alike.
fn talk(lab: &Lab, vm: IpAddr, peer: IpAddr, ports: &[u16]) -> Vec<[UdpSocket; 2]> {
    let talk = |port: &u16| {
        let (inside, outside) = (lab.udp(&lab.vm, vm, *port), lab.udp(&lab.peer, peer, 0));
        outside.connect((vm, *port)).unwrap();
        assert!(say(&outside, &inside), "port {port}");
        [inside, outside]
    };
    ports.iter().map(talk).collect()
}

/// Whether a datagram arrives and is answered.
fn say(outside: &UdpSocket, inside: &UdpSocket) -> bool {
    outside.send(b"?").unwrap();
    if !arrives(inside) {
        return false;
    }
    inside.send_to(b"!", outside.local_addr().unwrap()).unwrap();
    arrives(outside)
}

fn ports(impact: &Impact) -> BTreeSet<SocketAddr> {
    impact.flows.iter().map(|(flow, _)| flow.dst).collect()
}

fn by(rule: &str) -> Decider {
    Decider::Rule(Some(name("p")), name(rule))
}

#[test]
fn flows_are_told_as_they_began_the_latest_first() {
    let lab = Lab::new("live-list");
    let open = deny_in(vec![allow_in("web", tcp(80)), allow_in("dns", udp(53))]);
    let mut kernel = lab.guard(&open);
    assert_eq!(kernel.flows(10).unwrap().total, 0);
    let mut kept = Vec::new();
    for (vm, peer) in FAMILIES {
        let listener = lab.listen(&lab.vm, vm, 80);
        let client = lab.connect(&lab.peer, (vm, 80).into(), PATIENCE).unwrap();
        let server = listener.accept().unwrap().0;
        let from = client.local_addr().unwrap();
        kept.push((client, server));
        let outside = lab.udp(&lab.peer, peer, 9_999);
        let own = lab.udp(&lab.vm, vm, 0);
        own.send_to(b"out", (peer, 9_999)).unwrap();
        assert!(arrives(&outside));

        let flows = kernel.flows(10).unwrap();
        let of = |protocol, end: SocketAddr| {
            let mut of = flows.flows.iter().filter(|f| f.protocol == protocol && f.dst == end);
            let found = of.next().cloned();
            assert_eq!(of.next(), None, "each flow is told once");
            found.unwrap()
        };
        let web = LiveFlow {
            direction: Direction::Ingress,
            overlay: false,
            protocol: protocol::TCP,
            src: from,
            dst: (vm, 80).into(),
            state: "established",
            idle: of(protocol::TCP, (vm, 80).into()).idle,
            by: by("web"),
            translated: None,
        };
        assert_eq!(of(protocol::TCP, (vm, 80).into()), web);
        let sent = of(protocol::UDP, (peer, 9_999).into());
        let brief = (sent.direction, sent.state, sent.by, sent.src);
        let own = own.local_addr().unwrap();
        assert_eq!(brief, (Direction::Egress, "unreplied", Decider::Default, own));
    }
    let all = kernel.flows(100).unwrap();
    assert_eq!((all.total, all.flows.len()), (4, 4));
    assert!(all.flows.is_sorted_by_key(|flow| flow.idle));
    let some = kernel.flows(1).unwrap();
    assert_eq!((some.total, &some.flows[..]), (4, &all.flows[..1]));
}

#[test]
fn what_a_change_would_cut_is_what_it_cuts() {
    const PORTS: [u16; 6] = [1_000, 1_001, 1_002, 1_003, 1_004, 1_005];
    let all = || PORTS.map(|port| allow_in(&format!("p{port}"), udp(port))).to_vec();
    let lab = Lab::new("live-preview");
    let mut kernel = lab.guard(&deny_in(all()));
    let talks: Vec<_> =
        FAMILIES.into_iter().flat_map(|(vm, peer)| talk(&lab, vm, peer, &PORTS)).collect();

    // Of IPv4 alone 1000 is denied by a rule, 1001 is on trial, 1002 and 1003 are left to the default.
    let mut next: Vec<_> = all();
    next.retain(|rule| !["p1002", "p1003"].contains(&rule.name.as_str()));
    let shut = Rule { from: vec!["0.0.0.0/0".parse().unwrap()], ..allow_in("shut", udp(1_000)) };
    next.insert(0, Rule { action: Action::Reject, ..shut });
    let mut trial = spec(Action::Deny, Action::Allow, vec![]);
    trial.mode = PolicyMode::Audit;
    let mut denied = allow_in("trial", udp(1_001));
    denied.action = Action::Deny;
    (trial.rules, trial.priority) = (vec![denied], 0);
    trial.defaults = Default::default();
    let mut enforced = spec(Action::Deny, Action::Allow, next);
    enforced.priority = 1;
    let (a, b) = (name("p"), name("trial"));
    let next = Effective::merge(vec![], [(&a, &enforced), (&b, &trial)]);

    let before = kernel.status().counters;
    let impact = kernel.preview(&next, 100).unwrap();
    let expected = [(VM4, 1_000), (VM4, 1_002), (VM4, 1_003), (VM6, 1_002), (VM6, 1_003)];
    assert_eq!((impact.judged, impact.cut), (12, 5));
    assert_eq!(ports(&impact), expected.map(SocketAddr::from).into());
    let said = |port| impact.flows.iter().find(|(f, _)| f.dst.port() == port).unwrap().1.clone();
    assert_eq!((said(1_000), said(1_002)), (by("shut"), Decider::Default));
    let one = kernel.preview(&next, 1).unwrap();
    assert_eq!((one.cut, one.flows.len()), (5, 1));
    assert_eq!(kernel.preview(&deny_in(all()), 100).unwrap().cut, 0);
    let open = Effective::merge(vec![], []);
    assert_eq!(kernel.preview(&open, 100).unwrap().cut, 0, "without a policy nothing is judged");
    assert_eq!(kernel.status().counters, before);
    assert!(talks.iter().all(|[inside, outside]| say(outside, inside)), "nothing was changed");

    lab.apply(&mut kernel, &next);
    for [inside, outside] in &talks {
        let to = outside.peer_addr().unwrap();
        assert_eq!(say(outside, inside), !ports(&impact).contains(&to), "{to}");
    }
    assert!(dropped(&mut kernel, Direction::Ingress, "revoked") >= 5);
}

#[test]
fn a_policy_that_would_be_refused_is_refused_by_the_preview() {
    let lab = Lab::new("live-refused");
    let mut kernel = lab.guard(&deny_in(vec![allow_in("web", tcp(80))]));
    let rule = |n| allow_in(&format!("r{n}"), tcp(1));
    let too_many = (0..=lab.options().rules_max).map(rule).collect();
    let refused = kernel.preview(&policy(Action::Deny, Action::Deny, too_many), 1).unwrap_err();
    let ApplyError::Refused(policies) = refused else { panic!("{refused}") };
    assert_eq!(policies.keys().collect::<Vec<_>>(), [&name("p")]);
    assert_eq!(kernel.status().rules, 1);
}
