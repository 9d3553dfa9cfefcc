//! An agent that dies and comes back: packets are judged meanwhile, flows and counters go on.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use cnsmo_agent::datapath::{Datapath as _, kernel::Kernel};
use cnsmo_proto::model::Direction;

use super::lab::{Lab, PATIENCE, PEER4, VM4, allow_in, counted, deny_in, dropped, name, tcp, udp};

#[test]
fn packets_are_judged_without_an_agent() {
    let lab = Lab::new("ado-dead");
    let (open, shut) = (lab.udp(&lab.vm, VM4, 80), lab.udp(&lab.vm, VM4, 81));
    let kernel = lab.guard(&deny_in(vec![allow_in("open", udp(80))]));
    drop(kernel);
    assert!(lab.hears(&open, PEER4));
    assert!(!lab.hears(&shut, PEER4));
}

#[test]
fn the_same_policy_is_adopted_with_its_counters() {
    let lab = Lab::new("ado-count");
    let policy = deny_in(vec![allow_in("open", udp(80)), allow_in("other", udp(82))]);
    let open = lab.udp(&lab.vm, VM4, 80);
    let shut = lab.udp(&lab.vm, VM4, 81);
    let mut kernel = lab.guard(&policy);
    let hear = |n: u64| {
        for _ in 0..n {
            assert!(lab.hears(&open, PEER4));
        }
    };
    hear(3);
    assert!(!lab.hears(&shut, PEER4));
    assert_eq!(counted(&mut kernel, "open").packets, 3);
    drop(kernel);
    hear(2);

    let mut kernel = lab.guard(&policy);
    assert_eq!(counted(&mut kernel, "open").packets, 5);
    assert_eq!(dropped(&mut kernel, Direction::Ingress, "denied-by-default"), 1);
    hear(1);
    assert_eq!(counted(&mut kernel, "open").packets, 6);

    lab.apply(&mut kernel, &deny_in(vec![allow_in("new", udp(83)), allow_in("open", udp(80))]));
    hear(1);
    assert_eq!(counted(&mut kernel, "open").packets, 7, "a rule keeps its count in a new policy");
    let known = kernel.status().counters.remove(&name("p")).unwrap();
    assert_eq!(known.into_keys().collect::<Vec<_>>(), [name("new"), name("open")]);
}

/// Writes counting words until told to stop, then closes. Returns how many.
fn count_into(mut stream: TcpStream, stop: Arc<AtomicBool>) -> JoinHandle<u32> {
    std::thread::spawn(move || {
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut n = 0u32;
        while !stop.load(Ordering::Relaxed) {
            let words: Vec<u8> = (n..n + 64).flat_map(u32::to_be_bytes).collect();
            stream.write_all(&words).unwrap();
            n += 64;
        }
        n
    })
}

/// Reads counting words to the end. Returns how many.
fn check(mut stream: TcpStream) -> JoinHandle<u32> {
    std::thread::spawn(move || {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        for (n, word) in (0u32..).zip(bytes.chunks(4)) {
            assert_eq!(word, n.to_be_bytes());
        }
        bytes.len() as u32 / 4
    })
}

#[test]
fn a_stream_does_not_notice_that_the_agent_is_replaced() {
    let lab = Lab::new("ado-tcp");
    let policy = deny_in(vec![allow_in("open", tcp(80))]);
    let mut kernel = lab.guard(&policy);
    let listener = lab.listen(&lab.vm, VM4, 80);
    let client = lab.connect(&lab.peer, (VM4, 80).into(), PATIENCE).unwrap();
    let (server, _) = listener.accept().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = count_into(client, stop.clone());
    let reader = check(server);
    for round in 0..2 {
        let before = counted(&mut kernel, "open").packets;
        if round == 0 {
            drop(kernel);
        } else {
            // As if killed: nothing is closed in order.
            std::mem::forget(kernel);
        }
        kernel = lab.guard(&policy);
        assert!(counted(&mut kernel, "open").packets > before, "counting goes on in between");
    }
    stop.store(true, Ordering::Relaxed);
    let sent = writer.join().unwrap();
    assert_eq!(reader.join().unwrap(), sent);
    assert!(sent > 0);
    // No flow was taken for new, nor refused for having none.
    assert_eq!(kernel.status().drops, []);
    Kernel::detach(lab.pins.path()).unwrap();
}
