//! What the programs say of a packet, beside what they do with it.

use std::net::{IpAddr, SocketAddr};

use cnsmo_agent::{
    datapath::{
        Datapath as _,
        kernel::{Kernel, Options, XdpChoice},
    },
    effective::Effective,
    explain::{Answer, Decider, Question},
};
use cnsmo_proto::model::{Action, Direction, RateLimit, Rule, protocol};

use super::lab::{
    FAMILIES, Lab, PATIENCE, PEER4, VM4, allow_in, counted, deny_in, dropped, name, rule, tcp, udp,
};

fn ask(kernel: &mut Kernel, protocol: u8, from: SocketAddr, to: (IpAddr, u16)) -> Answer {
    let question = Question {
        direction: Direction::Ingress,
        overlay: false,
        src: from,
        dst: to.into(),
        protocol,
    };
    kernel.explain(&question).unwrap()
}

fn by(rule: &str) -> Decider {
    Decider::Rule(Some(name("p")), name(rule))
}

fn policy() -> Effective {
    let limit = RateLimit { flows: 1, period_seconds: 86_400, burst: 1, per_source: false };
    deny_in(vec![
        allow_in("open", tcp(80)),
        rule("shut", Action::Reject, Direction::Ingress, tcp(81)),
        Rule { limit: Some(limit), ..allow_in("once", udp(53)) },
        Rule { connections_per_source: Some(1), ..allow_in("one", tcp(443)) },
    ])
}

#[test]
fn the_programs_say_what_they_would_do_and_do_nothing() {
    for (hook, xdp) in [("xdp", XdpChoice::Auto), ("tc", XdpChoice::Off)] {
        let lab = Lab::new(&format!("explain-{hook}"));
        let mut kernel = lab.open_with(Options { xdp, ..lab.options() }).unwrap();
        lab.apply(&mut kernel, &policy());
        for (vm, peer) in FAMILIES {
            let from = SocketAddr::new(peer, 61_000);
            // Asked again and again: an answer takes nothing of a limit, and begins nothing.
            for _ in 0..3 {
                let open = ask(&mut kernel, protocol::TCP, from, (vm, 80));
                assert_eq!(open, Answer { by: by("open"), ..Answer::default() }, "{hook}");
                let shut = ask(&mut kernel, protocol::TCP, from, (vm, 81));
                let refused = Answer {
                    dropped: Some("denied"),
                    rejected: true,
                    by: by("shut"),
                    ..Answer::default()
                };
                assert_eq!(shut, refused, "{hook}");
                let other = ask(&mut kernel, protocol::TCP, from, (vm, 82));
                assert_eq!(
                    (other.dropped, other.by),
                    (Some("denied-by-default"), Decider::Default),
                    "{hook}"
                );
                let once = ask(&mut kernel, protocol::UDP, from, (vm, 53));
                assert_eq!((once.dropped, once.by), (None, by("once")), "{hook}");
            }
        }
        let rules = ["open", "shut", "once"].map(|rule| counted(&mut kernel, rule).packets);
        assert_eq!(rules, [0; 3], "{hook}: what is asked is not counted");
        for reason in ["denied", "denied-by-default", "limited"] {
            assert_eq!(dropped(&mut kernel, Direction::Ingress, reason), 0, "{hook}: {reason}");
        }
        kernel.sweep();
        assert_eq!(kernel.status().flows, 0, "{hook}");
    }
}

#[test]
fn they_know_flows_limits_and_what_is_open() {
    let lab = Lab::new("explain-flow");
    let mut kernel = lab.guard(&policy());
    let listeners = [80, 443].map(|port| lab.listen(&lab.vm, VM4, port));
    let mut kept = Vec::new();
    for listener in &listeners {
        let to = listener.local_addr().unwrap();
        kept.push(lab.connect(&lab.peer, to, PATIENCE).unwrap());
        kept.push(listener.accept().unwrap().0);
    }
    let own = kept[0].local_addr().unwrap();
    let known = ask(&mut kernel, protocol::TCP, own, (VM4, 80));
    assert_eq!((known.flow, known.dropped, &known.by), (Some("established"), None, &by("open")));
    let other = SocketAddr::new(PEER4, own.port() ^ 1);
    assert_eq!(ask(&mut kernel, protocol::TCP, other, (VM4, 80)).flow, None);
    let second = ask(&mut kernel, protocol::TCP, other, (VM4, 443));
    assert_eq!((second.dropped, second.by), (Some("connections"), by("one")));

    let inside = lab.udp(&lab.vm, VM4, 53);
    assert!(lab.hears(&inside, PEER4), "the one flow that the limit allows");
    let more = ask(&mut kernel, protocol::UDP, other, (VM4, 53));
    assert_eq!((more.dropped, more.by), (Some("limited"), by("once")));

    // The next policy's word on the flow, before a packet of it comes.
    lab.apply(&mut kernel, &deny_in(vec![]));
    let cut = ask(&mut kernel, protocol::TCP, own, (VM4, 80));
    assert_eq!((cut.dropped, cut.by), (Some("revoked"), Decider::Default));
    lab.apply(&mut kernel, &policy());
    let back = ask(&mut kernel, protocol::TCP, own, (VM4, 80));
    assert_eq!((back.flow, back.dropped), (Some("established"), None), "the question cut nothing");
}

#[test]
fn where_no_hook_is_nothing_is_judged() {
    let lab = Lab::new("explain-none");
    let mut kernel = lab.guard(&policy());
    let question = Question {
        direction: Direction::Egress,
        overlay: true,
        src: SocketAddr::new(VM4, 1),
        dst: SocketAddr::new(PEER4, 2),
        protocol: protocol::TCP,
    };
    let expected = Answer { unguarded: true, ..Answer::default() };
    assert_eq!(kernel.explain(&question).unwrap(), expected);
}
