//! Switches of the policy under traffic: each packet meets one policy as a whole.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cnsmo_proto::model::{Action, Direction};
use cnsmo_tests::pause;

use super::lab::{Lab, PATIENCE, PEER4, VM4, allow_in, deny_in, rule, udp};

const SWITCHES: usize = 1_000;
/// Open in both policies, in one each, in none.
const BOTH: u16 = 1000;
const ONLY_A: u16 = 1001;
const ONLY_B: u16 = 1002;
const NONE: u16 = 1003;

/// Datagrams that arrived, until `stop`.
fn count(socket: &UdpSocket, stop: &AtomicBool) -> usize {
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        n += usize::from(socket.recv(&mut [0; 8]).is_ok());
    }
    n
}

#[test]
fn a_thousand_switches_lose_nothing_that_both_policies_allow() {
    let lab = Lab::new("swap");
    // The same index means the opposite in the other policy: trees of one with actions of the other would let NONE in
    // and stop BOTH.
    let deny = || rule("none", Action::Deny, Direction::Ingress, udp(NONE));
    let both = || allow_in("both", udp(BOTH));
    let a = deny_in(vec![both(), deny(), allow_in("a", udp(ONLY_A))]);
    let b = deny_in(vec![deny(), both(), allow_in("b", udp(ONLY_B))]);
    let mut kernel = lab.guard(&a);

    let (stop, sent_all) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let receivers = [ONLY_A, ONLY_B, NONE].map(|port| {
        let (socket, stop) = (lab.udp(&lab.vm, VM4, port), sent_all.clone());
        std::thread::spawn(move || count(&socket, &stop))
    });
    let echo = lab.udp(&lab.vm, VM4, BOTH);
    echo.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let echoing = {
        let stop = sent_all.clone();
        std::thread::spawn(move || {
            let mut word = [0; 8];
            while !stop.load(Ordering::Relaxed) {
                if let Ok((length, from)) = echo.recv_from(&mut word) {
                    echo.send_to(&word[..length], from).unwrap();
                }
            }
        })
    };
    let sending = {
        let stop = stop.clone();
        let send = move || {
            let to = |port| SocketAddr::from((VM4, port));
            let mut sent = 0usize;
            while !stop.load(Ordering::Relaxed) {
                // A new socket is a new source port, so a new flow, so a question to the rules.
                let socket = UdpSocket::bind((PEER4, 0)).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                for port in [ONLY_A, ONLY_B, NONE] {
                    socket.send_to(b"x", to(port)).unwrap();
                }
                socket.send_to(&sent.to_be_bytes(), to(BOTH)).unwrap();
                let mut word = [0; 8];
                let (length, _) = socket.recv_from(&mut word).expect("an answer, or BOTH lost one");
                assert_eq!(word[..length], sent.to_be_bytes());
                sent += 1;
                // Leaves the machine some time for the switches.
                pause(Duration::from_micros(500));
            }
            sent
        };
        lab.peer.spawn(send).unwrap()
    };

    for n in 0..SWITCHES {
        lab.apply(&mut kernel, if n % 2 == 0 { &b } else { &a });
        assert!(!sending.is_finished(), "the sender lost a packet before switch {n}");
    }
    stop.store(true, Ordering::Relaxed);
    let sent = sending.join().unwrap();
    sent_all.store(true, Ordering::Relaxed);
    echoing.join().unwrap();
    let [only_a, only_b, none] = receivers.map(|receiver| receiver.join().unwrap());
    assert_eq!(none, 0, "no policy allows it");
    for (policy, heard) in [("a", only_a), ("b", only_b)] {
        assert!(0 < heard && heard < sent, "{heard} of {sent} by policy {policy}");
    }
    assert!(sent > SWITCHES, "{sent} flows in {SWITCHES} switches show little");
}
