//! Port scans of a guarded VM: what nmap sees is what the policy says, whatever kind of packet asks.

use std::{
    collections::BTreeMap,
    net::{IpAddr, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use cnsmo_agent::datapath::{
    Datapath as _,
    kernel::{Options, XdpChoice},
};
use cnsmo_proto::model::Direction;

use super::lab::{FAMILIES, Lab, VM4, allow_in, deny_in, dropped, tcp, udp};

/// Somebody listens there, and the policy lets in what is for it.
#[derive(Clone, Copy)]
struct Port {
    number: u16,
    listens: bool,
    allowed: bool,
}

/// Every combination.
const PORTS: [Port; 4] = [
    Port { number: 80, listens: true, allowed: true },
    Port { number: 81, listens: false, allowed: true },
    Port { number: 82, listens: true, allowed: false },
    Port { number: 83, listens: false, allowed: false },
];

/// What asks, in the words of nmap's options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scan {
    Syn,
    Ack,
    Fin,
    Null,
    Xmas,
    Udp,
    /// SYN in fragments of eight bytes. IPv4 alone: nmap makes none of IPv6.
    Fragments,
}

impl Scan {
    const ALL: [Self; 7] =
        [Self::Syn, Self::Ack, Self::Fin, Self::Null, Self::Xmas, Self::Udp, Self::Fragments];

    fn options(self) -> &'static [&'static str] {
        match self {
            Self::Syn => &["-sS"],
            Self::Ack => &["-sA"],
            Self::Fin => &["-sF"],
            Self::Null => &["-sN"],
            Self::Xmas => &["-sX"],
            Self::Udp => &["-sU"],
            Self::Fragments => &["-sS", "-f"],
        }
    }

    /// What the port looks like. Without a policy a stack answers as RFC 9293 has it; a policy lets in first packets of flows
    /// that it allows, and nothing that begins with another packet or hides its header.
    fn expected(self, port: Port, guarded: bool) -> &'static str {
        let answers = if port.listens { "open" } else { "closed" };
        match (self, guarded) {
            (Self::Syn | Self::Fragments, false) => answers,
            (Self::Syn, true) if port.allowed => answers,
            (Self::Syn | Self::Fragments | Self::Ack, true) => "filtered",
            (Self::Ack, false) => "unfiltered",
            (Self::Fin | Self::Null | Self::Xmas, false) if !port.listens => "closed",
            (Self::Fin | Self::Null | Self::Xmas, _) => "open|filtered",
            (Self::Udp, false) => answers,
            (Self::Udp, true) if port.allowed => answers,
            (Self::Udp, true) => "open|filtered",
        }
    }

    /// Seen by nmap in the peer's namespace.
    fn run(self, lab: &Lab, to: IpAddr) -> BTreeMap<u16, String> {
        let ports = PORTS.map(|port| port.number.to_string()).join(",");
        let mut nmap = lab.peer.command("nmap").unwrap();
        nmap.args(["-n", "-Pn", "-T4", "--max-retries", "2", "--max-rtt-timeout", "250ms"]);
        // All ports singly, also if they are alike; the limit is for what hangs.
        nmap.args(["-d", "-d", "--host-timeout", "60s", "-oG", "-", "-p", &ports]);
        nmap.args(self.options()).args(to.is_ipv6().then_some("-6")).arg(to.to_string());
        let output = nmap.output().expect("nmap starts: apt-get install nmap");
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.split_once("Ports: "));
        let (_, list) = line.unwrap_or_else(|| {
            panic!("{self:?} saw no port: {text}{}", String::from_utf8_lossy(&output.stderr))
        });
        let list = list.split('\t').next().unwrap().split(", ");
        list.map(|entry| {
            let mut fields = entry.trim().split('/');
            (fields.next().unwrap().parse().unwrap(), fields.next().unwrap().to_owned())
        })
        .collect()
    }
}

/// Answers datagrams until it is stopped.
fn answer(socket: &UdpSocket, stop: &AtomicBool) {
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut bytes = [0; 512];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut bytes) {
            socket.send_to(&bytes[..length], from).unwrap();
        }
    }
}

/// All scans of both addresses of the VM.
fn scans(lab: &Lab, guarded: bool) {
    for scan in Scan::ALL {
        for (vm, _) in FAMILIES {
            if scan == Scan::Fragments && vm != VM4 {
                continue;
            }
            let seen = scan.run(lab, vm);
            let expected = PORTS.map(|port| (port.number, scan.expected(port, guarded).to_owned()));
            assert_eq!(seen, expected.into(), "{scan:?} of {vm}, guarded: {guarded}");
        }
    }
}

fn see_the_policy(label: &str, xdp: XdpChoice, ingress: &str) {
    let lab = Lab::new(label);
    // Or unreachable ports are told of once in a second.
    lab.vm.sysctl("net/ipv4/icmp_ratelimit", "0").unwrap();
    lab.vm.sysctl("net/ipv6/icmp/ratelimit", "0").unwrap();
    let listening = PORTS.iter().filter(|port| port.listens);
    let sockets: Vec<_> = listening
        .flat_map(|port| FAMILIES.map(|(vm, _)| (vm, port.number)))
        .map(|(vm, port)| (lab.listen(&lab.vm, vm, port), lab.udp(&lab.vm, vm, port)))
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also when a check fails: the scope waits for its threads.
        let _stop = Stop(&stop);
        for (_, socket) in &sockets {
            scope.spawn(|| answer(socket, &stop));
        }
        scans(&lab, false);
        let allowed = PORTS.iter().filter(|port| port.allowed).map(|port| port.number);
        let rules = allowed.flat_map(|port| {
            [
                allow_in(&format!("tcp-{port}"), tcp(port)),
                allow_in(&format!("udp-{port}"), udp(port)),
            ]
        });
        let mut kernel = lab.open_with(Options { xdp, ..lab.options() }).unwrap();
        // Under the first policy of its life a VM takes up connections that are older, where rules allow them.
        lab.apply(&mut kernel, &deny_in(vec![]));
        lab.apply(&mut kernel, &deny_in(rules.collect()));
        assert_eq!(kernel.status().interfaces[0].ingress, ingress);
        scans(&lab, true);
        for reason in ["denied-by-default", "no-flow", "tcp-flags", "fragment-tiny"] {
            assert!(dropped(&mut kernel, Direction::Ingress, reason) > 0, "{reason}");
        }
    });
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn scans_see_the_policy_in_xdp() {
    see_the_policy("scan-xdp", XdpChoice::Auto, "xdp-native");
}

#[test]
fn scans_see_the_policy_in_tc() {
    see_the_policy("scan-tc", XdpChoice::Off, "tcx");
}
