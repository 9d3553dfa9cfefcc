//! Switches of the policy under traffic: each packet meets one policy as a whole.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use cnsmo_proto::model::{Action, Direction};
use cnsmo_tests::{Netns, pause};

use super::lab::{Lab, PATIENCE, PEER4, VM4, allow_in, deny_in, rule, udp};

const SWITCHES: usize = 1_000;
/// Open in both policies, in one each, in none.
pub(super) const BOTH: u16 = 1000;
pub(super) const ONLY_A: u16 = 1001;
pub(super) const ONLY_B: u16 = 1002;
pub(super) const NONE: u16 = 1003;

/// Datagrams of new flows, all the time, to four ports of a VM.
pub(super) struct Traffic {
    stop: Arc<AtomicBool>,
    sent_all: Arc<AtomicBool>,
    rounds: Arc<AtomicUsize>,
    sending: JoinHandle<()>,
    echoing: JoinHandle<()>,
    receivers: [JoinHandle<usize>; 3],
}

/// Datagrams sent to each port, and how many of them arrived. Those to [`BOTH`] all did.
#[derive(Debug)]
pub(super) struct Heard {
    pub(super) sent: usize,
    pub(super) only_a: usize,
    pub(super) only_b: usize,
    pub(super) none: usize,
}

impl Traffic {
    pub(super) fn start(from: (&Netns, IpAddr), to: (&Netns, IpAddr)) -> Self {
        let ((client, source), (vm, address)) = (from, to);
        let [stop, sent_all] = [false, false].map(|value| Arc::new(AtomicBool::new(value)));
        let bind = |port| {
            let socket = vm.run(|| UdpSocket::bind((address, port))).unwrap().unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            socket
        };
        let receivers = [ONLY_A, ONLY_B, NONE].map(|port| {
            let (socket, stop) = (bind(port), sent_all.clone());
            std::thread::spawn(move || count(&socket, &stop))
        });
        let (echo, end) = (bind(BOTH), sent_all.clone());
        let echoing = std::thread::spawn(move || answer(&echo, &end));
        let (end, rounds) = (stop.clone(), Arc::<AtomicUsize>::default());
        let done = rounds.clone();
        let sending = client.spawn(move || send(source, address, &end, &done)).unwrap();
        Self { stop, sent_all, rounds, sending, echoing, receivers }
    }

    /// Datagrams sent to each port so far. Panics if one to [`BOTH`] was lost.
    pub(super) fn sent(&self) -> usize {
        assert!(!self.sending.is_finished(), "a datagram that both policies allow was lost");
        self.rounds.load(Ordering::Relaxed)
    }

    pub(super) fn stop(self) -> Heard {
        self.stop.store(true, Ordering::Relaxed);
        self.sending.join().unwrap();
        self.sent_all.store(true, Ordering::Relaxed);
        self.echoing.join().unwrap();
        let [only_a, only_b, none] = self.receivers.map(|receiver| receiver.join().unwrap());
        Heard { sent: self.rounds.load(Ordering::Relaxed), only_a, only_b, none }
    }
}

impl Heard {
    /// Every verdict was one of policy a or of policy b, and both were met.
    pub(super) fn is_of_one_policy_each(&self) {
        assert_eq!(self.none, 0, "no policy allows it: {self:?}");
        for heard in [self.only_a, self.only_b] {
            assert!(0 < heard && heard < self.sent, "{self:?}");
        }
    }
}

/// Datagrams that arrived, until `stop`.
fn count(socket: &UdpSocket, stop: &AtomicBool) -> usize {
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        n += usize::from(socket.recv(&mut [0; 8]).is_ok());
    }
    n
}

fn answer(socket: &UdpSocket, stop: &AtomicBool) {
    let mut word = [0; 8];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut word) {
            socket.send_to(&word[..length], from).unwrap();
        }
    }
}

fn send(source: IpAddr, address: IpAddr, stop: &AtomicBool, rounds: &AtomicUsize) {
    let to = |port| SocketAddr::from((address, port));
    while !stop.load(Ordering::Relaxed) {
        // A new socket is a new source port, so a new flow, so a question to the rules.
        let socket = UdpSocket::bind((source, 0)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        for port in [ONLY_A, ONLY_B, NONE] {
            socket.send_to(b"x", to(port)).unwrap();
        }
        let number = rounds.load(Ordering::Relaxed).to_be_bytes();
        socket.send_to(&number, to(BOTH)).unwrap();
        let mut word = [0; 8];
        let (length, _) = socket.recv_from(&mut word).expect("an answer, or BOTH lost one");
        assert_eq!(word[..length], number);
        rounds.fetch_add(1, Ordering::Relaxed);
        // Leaves the machine some time for the switches.
        pause(Duration::from_micros(500));
    }
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

    let traffic = Traffic::start((&lab.peer, PEER4), (&lab.vm, VM4));
    for n in 0..SWITCHES {
        lab.apply(&mut kernel, if n % 2 == 0 { &b } else { &a });
        traffic.sent();
    }
    let heard = traffic.stop();
    heard.is_of_one_policy_each();
    assert!(heard.sent > SWITCHES, "{heard:?} in {SWITCHES} switches show little");
}
