//! Packets through a gateway, and from this VM into the tunnel. Checksums are computed anew by other code than the one
//! that corrects them.

use std::collections::BTreeSet;

use cnsmo_common::{
    Direction,
    balance::{Backend, Ring, Service},
    control::LiveParts,
    flow::{Address as _, state},
    stat::Reason,
};
use proptest::prelude::*;

use super::*;
use crate::{
    frames::{self, FAMILIES, Ip, PEERS, V4, VM, icmp, v4, v6},
    host::{Frame, HostTables},
    pipeline::{ETHERNET, TUNNEL},
};

const SYN: u8 = tcp::SYN;
const SYN_ACK: u8 = tcp::SYN | tcp::ACK;
const ACK: u8 = tcp::ACK;
const FIN: u8 = tcp::FIN | tcp::ACK;
const CLIENT: u8 = PEERS[0];
const VIRTUAL: u8 = 50;
const PORT: u16 = 80;
const TARGET: u16 = 8080;
const BACKENDS: [u8; 3] = [60, 61, 62];
const CARD: u32 = 7;

/// This VM, with everything allowed unless changed.
struct Vm {
    tables: HostTables,
    live: LiveParts,
}

impl Vm {
    fn new(algorithm: u8, backends: &[u8]) -> Self {
        let live = LiveParts { default_allow: [true; 2], generation: 1, ..LiveParts::default() };
        let mut tables = HostTables::new(live.pack());
        tables.control.switches = switch::SERVICES;
        (tables.control.own_v4, tables.control.own_v6) = (v4(VM), v6(VM));
        for (address, family) in [(v4(VIRTUAL).widen(), 4), (v6(VIRTUAL), 6)] {
            for proto in [TCP, UDP] {
                let key = ServiceKey { address, port: PORT.to_be_bytes(), proto, family };
                let target = TARGET.to_be_bytes();
                let service = Service { balancer: 0, target, algorithm, gateway: 1, pad: [0; 2] };
                tables.services.borrow_mut().insert(key, service);
            }
        }
        let vm = Self { tables, live };
        vm.steer(backends);
        vm
    }

    /// The numbers of backends are their hosts.
    fn steer(&self, backends: &[u8]) {
        let all =
            (0..=255).map(|host| Backend { v4: v4(host), v6: v6(host), ..Backend::default() });
        *self.tables.backends.borrow_mut() = all.collect();
        let slots: Vec<u16> = backends.iter().map(|host| u16::from(*host)).collect();
        *self.tables.rings.borrow_mut() = vec![Ring::new(0, slots.len() as u32)];
        *self.tables.slots.borrow_mut() = slots;
    }

    fn deny(&mut self, direction: Direction) {
        self.live.default_allow[direction as usize] = false;
        self.live.generation += 1;
        self.tables.control.live = self.live.pack().0;
    }

    fn later(&self, jiffies: u64) {
        self.tables.now.set(self.tables.now.get() + jiffies);
    }

    /// Established, half-open; one entry each.
    fn flows(&self) -> [usize; 2] {
        let (v4, v6) = (self.tables.flows_v4(), self.tables.flows_v6());
        [v4[0].len() + v6[0].len(), v4[1].len() + v6[1].len()]
    }

    fn states(&self) -> BTreeSet<u8> {
        let (v4, v6) = (self.tables.flows_v4(), self.tables.flows_v6());
        let v4 = v4.iter().flat_map(|flows| flows.values()).map(|flow| flow.conn.state);
        v4.chain(v6.iter().flat_map(|flows| flows.values()).map(|flow| flow.conn.state)).collect()
    }

    fn card_in(&self, ip: Ip, packet: &[u8]) -> Result<(Onward, Vec<u8>), Reason> {
        let frame = Frame::new(&ip.ethernet(packet), CARD);
        let onward = frame.run::<ETHERNET, false>(&self.tables)?;
        Ok((onward, frame.bytes()[ETHERNET..].to_vec()))
    }

    fn card_out(&self, ip: Ip, packet: &[u8]) -> Result<(Onward, Vec<u8>), Reason> {
        let frame = Frame::new(&ip.ethernet(packet), CARD);
        let onward = frame.run::<ETHERNET, true>(&self.tables)?;
        Ok((onward, frame.bytes()[ETHERNET..].to_vec()))
    }

    fn tunnel_in(&self, packet: &[u8]) -> Result<(Onward, Vec<u8>), Reason> {
        let frame = Frame::new(packet, 0);
        let onward = frame.run::<TUNNEL, false>(&self.tables)?;
        Ok((onward, frame.bytes()))
    }

    fn tunnel_out(&self, packet: &[u8]) -> Result<(Onward, Vec<u8>), Reason> {
        let frame = Frame::new(packet, 0);
        let onward = frame.run::<TUNNEL, true>(&self.tables)?;
        Ok((onward, frame.bytes()))
    }

    /// From a client to the virtual address, as it is in the tunnel.
    fn forward(&self, ip: Ip, packet: &[u8]) -> Vec<u8> {
        let (onward, inside) = self.card_in(ip, packet).unwrap();
        assert_eq!(onward, Onward::Tunnel);
        assert_sealed(&inside);
        assert_eq!(self.tunnel_out(&inside), Ok((Onward::Same, inside.clone())), "seen twice");
        inside
    }

    /// From a backend to this VM, as it goes to the client.
    fn back(&self, ip: Ip, packet: &[u8]) -> Vec<u8> {
        let (onward, outside) = self.tunnel_in(packet).unwrap();
        assert_eq!(onward, Onward::Client);
        assert_sealed(&outside);
        assert_eq!(self.card_out(ip, &outside), Ok((Onward::Same, outside.clone())), "seen twice");
        outside
    }
}

/// Source, destination and their ports of a packet without extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tuple(u8, u16, u8, u16);

fn tuple(packet: &[u8]) -> Tuple {
    let (src, dst, l4) = ends(packet);
    let port = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    Tuple(packet[src], port(l4), packet[dst], port(l4 + 2))
}

/// Offsets of the last bytes of both addresses, and of what follows the header.
fn ends(packet: &[u8]) -> (usize, usize, usize) {
    if packet[0] >> 4 == 4 { (15, 19, usize::from(packet[0] & 15) * 4) } else { (23, 39, 40) }
}

/// RFC 1071.
fn sum(bytes: &[u8]) -> u32 {
    let words =
        bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum
}

/// Protocol, and the sum of L4 header, payload and pseudo-header.
fn whole_sum(packet: &[u8]) -> (u8, u32) {
    let (src, _, l4) = ends(packet);
    let is_v4 = packet[0] >> 4 == 4;
    let proto = packet[if is_v4 { 9 } else { 6 }];
    let mut covered = packet[l4..].to_vec();
    if covered.len() % 2 == 1 {
        covered.push(0);
    }
    if proto != 1 {
        let (from, to) = if is_v4 { (12, 20) } else { (8, 40) };
        assert!(from < src);
        covered.extend(&packet[from..to]);
        covered.extend([0, proto]);
        covered.extend(((packet.len() - l4) as u16).to_be_bytes());
    }
    (proto, sum(&covered))
}

fn checksum_at(packet: &[u8]) -> usize {
    let (_, _, l4) = ends(packet);
    let proto = packet[if packet[0] >> 4 == 4 { 9 } else { 6 }];
    l4 + match proto {
        6 => 16,
        17 => 6,
        _ => 2,
    }
}

/// Fills in the checksums.
fn sealed(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        let header = usize::from(packet[0] & 15) * 4;
        let sum = !(sum(&packet[..header]) as u16);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    let at = checksum_at(&packet);
    // 0 would say that UDP has none (RFC 768).
    let sum = match !(whole_sum(&packet).1 as u16) {
        0 => 0xffff,
        sum => sum,
    };
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn assert_sealed(packet: &[u8]) {
    if packet[0] >> 4 == 4 {
        let header = usize::from(packet[0] & 15) * 4;
        assert_eq!(sum(&packet[..header]), 0xffff, "checksum of the header of {packet:02x?}");
    }
    assert_eq!(whole_sum(packet).1, 0xffff, "checksum of {packet:02x?}");
}

fn tcp_of(ip: Ip, Tuple(src, sport, dst, dport): Tuple, flags: u8) -> Vec<u8> {
    sealed(ip.tcp((src, sport), (dst, dport), flags))
}

fn udp_of(ip: Ip, Tuple(src, sport, dst, dport): Tuple) -> Vec<u8> {
    sealed(ip.udp((src, sport), (dst, dport)))
}

fn reversed(Tuple(src, sport, dst, dport): Tuple) -> Tuple {
    Tuple(dst, dport, src, sport)
}

const CALL: Tuple = Tuple(CLIENT, 4000, VIRTUAL, PORT);

/// A connection of a client outside, complete; as it is in the tunnel.
fn connect(vm: &Vm, ip: Ip, call: Tuple) -> Tuple {
    let inside = tuple(&vm.forward(ip, &tcp_of(ip, call, SYN)));
    vm.back(ip, &tcp_of(ip, reversed(inside), SYN_ACK));
    vm.forward(ip, &tcp_of(ip, call, ACK));
    inside
}

#[test]
fn a_gateway_carries_a_connection_both_ways() {
    for ip in FAMILIES {
        let vm = Vm::new(algorithm::MAGLEV, &BACKENDS);
        let inside = tuple(&vm.forward(ip, &tcp_of(ip, CALL, SYN)));
        let Tuple(src, port, dst, dport) = inside;
        assert_eq!((src, dport), (VM, TARGET));
        assert!(BACKENDS.contains(&dst));
        assert!((NAT_PORT_FIRST..NAT_PORT_FIRST + NAT_PORTS).contains(&port));
        assert_eq!(vm.flows(), [0, 2]);
        let outside = vm.back(ip, &tcp_of(ip, reversed(inside), SYN_ACK));
        assert_eq!(tuple(&outside), reversed(CALL));
        vm.forward(ip, &tcp_of(ip, CALL, ACK));
        assert_eq!(vm.flows(), [2, 0], "out of a flood's reach, both of them");
        vm.back(ip, &tcp_of(ip, reversed(inside), FIN));
        vm.forward(ip, &tcp_of(ip, CALL, FIN));
        assert_eq!(vm.states(), BTreeSet::from([state::TIME_WAIT]));
        assert_eq!(tuple(&vm.forward(ip, &tcp_of(ip, CALL, SYN))).0, VM, "and again");
        assert_eq!(vm.flows(), [0, 2]);
    }
}

#[test]
fn this_vms_own_flows_keep_their_source() {
    for ip in FAMILIES {
        let vm = Vm::new(algorithm::MAGLEV, &BACKENDS);
        let call = Tuple(VM, 4000, VIRTUAL, PORT);
        let out = |flags| {
            let (onward, packet) = vm.tunnel_out(&tcp_of(ip, call, flags)).unwrap();
            assert_eq!(onward, Onward::Same);
            assert_sealed(&packet);
            tuple(&packet)
        };
        let inside = out(SYN);
        assert_eq!((inside.0, inside.1, inside.3), (VM, 4000, TARGET));
        let (onward, answer) = vm.tunnel_in(&tcp_of(ip, reversed(inside), SYN_ACK)).unwrap();
        assert_eq!((onward, tuple(&answer)), (Onward::Same, reversed(call)));
        assert_sealed(&answer);
        assert_eq!(out(ACK), inside);
        assert_eq!((vm.flows(), vm.states()), ([2, 0], BTreeSet::from([state::ESTABLISHED])));
        // Nobody in the tunnel has the virtual address.
        let forged = vm.tunnel_in(&tcp_of(ip, reversed(call), ACK));
        assert_eq!(forged, Err(Reason::NoFlow));
    }
}

#[test]
fn datagrams_and_their_errors_and_fragments_are_translated() {
    for ip in FAMILIES {
        let vm = Vm::new(algorithm::SOURCE, &BACKENDS);
        let asked = vm.forward(ip, &udp_of(ip, CALL));
        let inside = tuple(&asked);
        assert_eq!(tuple(&vm.back(ip, &udp_of(ip, reversed(inside)))), reversed(CALL));

        // A backend's host does not know the port.
        let error = sealed(ip.packet(inside.2, VM, ip.icmp(), &icmp(ip.unreachable(), 0, &asked)));
        let told = vm.back(ip, &error);
        let (_, _, l4) = ends(&told);
        assert_eq!((told[ends(&told).0], told[ends(&told).1]), (VIRTUAL, CLIENT));
        assert_eq!(tuple(&told[l4 + 8..]), CALL);
        if ip == Ip::V4 {
            assert_eq!(sum(&told[l4 + 8..l4 + 28]), 0xffff, "the quoted header's checksum");
        }
        // A router on the way to the client.
        let answer = udp_of(ip, reversed(CALL));
        let error = ip.packet(200, VIRTUAL, ip.icmp(), &icmp(ip.unreachable(), 0, &answer));
        let told = vm.forward(ip, &sealed(error));
        assert_eq!((told[ends(&told).0], told[ends(&told).1]), (VM, inside.2));
        assert_eq!(tuple(&told[l4 + 8..]), reversed(inside));

        // The first fragment's checksum covers the others, which get addresses alone.
        let fragment = |place, payload: &[u8]| ip.fragment((CLIENT, VIRTUAL), UDP, place, payload);
        let first = fragment((0, true), &frames::udp(4000, PORT));
        let (onward, first) = vm.card_in(ip, &first).unwrap();
        assert_eq!((onward, first[ends(&first).1]), (Onward::Tunnel, inside.2));
        let rest = fragment((2, false), &[9; 8]);
        let (onward, moved) = vm.card_in(ip, &rest).unwrap();
        assert_eq!(onward, Onward::Tunnel);
        assert_eq!((moved[ends(&moved).0], moved[ends(&moved).1]), (VM, inside.2));
        assert_eq!(moved[moved.len() - 8..], [9; 8]);
        assert_eq!(vm.tunnel_out(&first).unwrap().1, first);
        assert_eq!(vm.tunnel_out(&moved).unwrap().1, moved);
    }
}

#[test]
fn a_datagram_without_checksum_stays_without() {
    let vm = Vm::new(algorithm::MAGLEV, &BACKENDS);
    let packet = V4 { dst: VIRTUAL, proto: UDP, ..V4::default() };
    let (_, inside) = vm.card_in(Ip::V4, &packet.carrying(&frames::udp(4000, PORT))).unwrap();
    assert_eq!(inside[26..28], [0, 0]);
}

#[test]
fn rules_judge_what_comes_in_and_what_goes_out() {
    for ip in FAMILIES {
        let mut vm = Vm::new(algorithm::MAGLEV, &BACKENDS);
        let inside = connect(&vm, ip, CALL);
        vm.deny(Direction::Egress);
        vm.forward(ip, &tcp_of(ip, CALL, ACK));
        vm.back(ip, &tcp_of(ip, reversed(inside), ACK));
        vm.deny(Direction::Ingress);
        // Whichever entry is met first: both go.
        let answer = vm.tunnel_in(&tcp_of(ip, reversed(inside), ACK));
        assert_eq!((answer, vm.flows()), (Err(Reason::Revoked), [0, 0]));
        let call = vm.card_in(ip, &tcp_of(ip, CALL, SYN));
        assert_eq!((call, vm.flows()), (Err(Reason::DeniedByDefault), [0, 0]));
        let own = vm.tunnel_out(&tcp_of(ip, Tuple(VM, 4000, VIRTUAL, PORT), SYN));
        assert_eq!((own, vm.flows()), (Err(Reason::DeniedByDefault), [0, 0]));
    }
}

#[test]
fn new_flows_follow_the_ring_and_known_ones_stay() {
    for ip in FAMILIES {
        let vm = Vm::new(algorithm::MAGLEV, &BACKENDS);
        let inside = connect(&vm, ip, CALL);
        let others: Vec<u8> = BACKENDS.into_iter().filter(|host| *host != inside.2).collect();
        vm.steer(&others);
        assert_eq!(tuple(&vm.forward(ip, &tcp_of(ip, CALL, ACK))), inside);
        vm.back(ip, &tcp_of(ip, reversed(inside), ACK));
        let next = Tuple(CLIENT, 4001, VIRTUAL, PORT);
        assert!(others.contains(&tuple(&vm.forward(ip, &tcp_of(ip, next, SYN))).2));
        vm.steer(&[]);
        assert_eq!(tuple(&vm.forward(ip, &tcp_of(ip, CALL, ACK))), inside);
        let last = Tuple(CLIENT, 4002, VIRTUAL, PORT);
        assert_eq!(vm.card_in(ip, &tcp_of(ip, last, SYN)), Err(Reason::NoBackend));
        assert_eq!(vm.card_in(ip, &tcp_of(ip, last, ACK)), Err(Reason::NoFlow));
    }
}

#[test]
fn algorithms_choose_as_they_say() {
    let chosen = |algorithm| {
        let vm = Vm::new(algorithm, &BACKENDS);
        let call = |port| Tuple(CLIENT, port, VIRTUAL, PORT);
        (1..=30).map(|port| tuple(&vm.forward(Ip::V4, &udp_of(Ip::V4, call(port)))).2).collect()
    };
    let all = BTreeSet::from(BACKENDS);
    let source: BTreeSet<u8> = chosen(algorithm::SOURCE);
    assert_eq!(source.len(), 1, "one client has one backend");
    assert_eq!(chosen(algorithm::MAGLEV), all);
    let vm = Vm::new(algorithm::ROUND_ROBIN, &BACKENDS);
    let call = |port| Tuple(CLIENT, port, VIRTUAL, PORT);
    let turns: BTreeSet<u8> =
        (1..=3).map(|port| tuple(&vm.forward(Ip::V4, &udp_of(Ip::V4, call(port)))).2).collect();
    assert_eq!(turns, all, "three turns, three backends");
}

#[test]
fn ports_run_out_and_come_back() {
    let vm = Vm::new(algorithm::MAGLEV, &BACKENDS[..1]);
    let call = |n: u32| Tuple(CLIENT + (n >> 15) as u8, (n & 0x7fff) as u16 + 1, VIRTUAL, PORT);
    let mut ports = BTreeSet::new();
    let mut refused = 0;
    for n in 0..60_000 {
        match vm.card_in(Ip::V4, &udp_of(Ip::V4, call(n))) {
            Ok((_, inside)) => assert!(ports.insert(tuple(&inside).1), "a port for one flow"),
            Err(reason) => {
                assert_eq!(reason, Reason::NatPorts);
                refused += 1;
            }
        }
    }
    assert_eq!(ports.len() + refused, 60_000);
    assert!(ports.len() * 10 > usize::from(NAT_PORTS) * 9, "{} ports used", ports.len());
    vm.later(1_001);
    vm.forward(Ip::V4, &udp_of(Ip::V4, call(70_000)));
}

#[test]
fn a_port_that_another_flow_has_by_now_stays_with_it() {
    for ip in FAMILIES {
        let vm = Vm::new(algorithm::MAGLEV, &[BACKENDS[0]]);
        let call = |port| Tuple(CLIENT, port, VIRTUAL, PORT);
        let send = |port| tuple(&vm.forward(ip, &udp_of(ip, call(port))));
        let first = send(1024);
        vm.later(1_001);
        // All are over at their second packet; the first to choose the same port takes it over.
        let (port, inner) = (1025..u16::MAX)
            .map(|port| (port, send(port)))
            .find(|(_, inner)| *inner == first)
            .expect("there are fewer ports for backends than for clients");
        send(1024);
        assert_eq!(tuple(&vm.back(ip, &udp_of(ip, reversed(inner)))), reversed(call(port)));
    }
}

#[test]
fn a_direct_flow_is_not_mistaken_for_a_translated_one() {
    for ip in FAMILIES {
        let vm = Vm::new(algorithm::MAGLEV, &BACKENDS[..1]);
        let direct = Tuple(VM, 4000, BACKENDS[0], TARGET);
        assert!(vm.tunnel_out(&tcp_of(ip, direct, SYN)).is_ok());
        let call = Tuple(VM, 4000, VIRTUAL, PORT);
        assert_eq!(vm.tunnel_out(&tcp_of(ip, call, SYN)), Err(Reason::NatPorts));
        vm.steer(&BACKENDS[..2]);
        let (_, packet) = vm.tunnel_out(&tcp_of(ip, call, SYN)).unwrap();
        assert_eq!(tuple(&packet).2, BACKENDS[1], "the next backend");
    }
}

/// Whoever gives out ports gives them out again: the health checks of a VM and its calls share them.
#[test]
fn a_port_whose_connection_is_finished_opens_another_one_of_either_kind() {
    for ip in FAMILIES {
        let vm = Vm::new(algorithm::MAGLEV, &BACKENDS[..1]);
        let direct = Tuple(VM, 4000, BACKENDS[0], TARGET);
        let call = Tuple(VM, 4000, VIRTUAL, PORT);
        let out = |to: Tuple, flags| -> Result<Tuple, Reason> {
            let (_, packet) = vm.tunnel_out(&tcp_of(ip, to, flags))?;
            assert_sealed(&packet);
            Ok(tuple(&packet))
        };
        // The backend sees the same connection either way; this VM sees the one that it has begun.
        let through = |to: Tuple| {
            for (flags, answer) in [(SYN, SYN_ACK), (ACK, ACK), (FIN, FIN)] {
                assert_eq!(out(to, flags), Ok(direct));
                let (_, back) = vm.tunnel_in(&tcp_of(ip, reversed(direct), answer)).unwrap();
                assert_eq!(tuple(&back), reversed(to));
                if flags != FIN {
                    let other = if to == call { direct } else { call };
                    assert!(out(other, SYN).is_err(), "{other:?} while {to:?} lives");
                }
            }
        };
        for to in [direct, call, direct, direct, call, call] {
            through(to);
        }
    }
}

#[test]
fn an_entry_that_a_flood_evicted_is_made_anew() {
    let vm = Vm::new(algorithm::MAGLEV, &BACKENDS);
    let inside = tuple(&vm.forward(Ip::V4, &tcp_of(Ip::V4, CALL, SYN)));
    vm.tables.forget_half_open_v4(|key| key.zone == ZONE_OVERLAY);
    assert_eq!(vm.flows(), [0, 1]);
    vm.later(2);
    assert_eq!(tuple(&vm.forward(Ip::V4, &tcp_of(Ip::V4, CALL, SYN))), inside);
    vm.back(Ip::V4, &tcp_of(Ip::V4, reversed(inside), SYN_ACK));
}

#[test]
fn the_networks_addresses_are_reached_through_the_tunnel_alone() {
    for ip in FAMILIES {
        let mut vm = Vm::new(algorithm::MAGLEV, &BACKENDS);
        let bits = u128::from_be_bytes(v6(0));
        vm.tables.control.prefix_v4 = [0x0a00_0000, 0xffff_ffc0];
        vm.tables.control.prefix_v6 =
            [[(bits >> 64) as u64, bits as u64], [u64::MAX, u64::MAX - 63]];
        let inside = Tuple(10, 4000, VM, 22);
        assert!(vm.card_in(ip, &tcp_of(ip, inside, SYN)).is_ok(), "before there is a network");
        vm.tables.control.switches |= switch::PREFIX_V4 | switch::PREFIX_V6;
        let inside = Tuple(10, 4001, VM, 22);
        let forged = vm.card_in(ip, &tcp_of(ip, inside, SYN));
        assert_eq!(forged, Err(Reason::NotTunnelled));
        let leak = vm.card_out(ip, &tcp_of(ip, reversed(inside), SYN));
        assert_eq!(leak, Err(Reason::NotTunnelled));
        assert!(vm.tunnel_in(&tcp_of(ip, inside, SYN)).is_ok());
        let outside = Tuple(200, 4000, VM, 22);
        assert!(vm.card_in(ip, &tcp_of(ip, outside, SYN)).is_ok());
    }
}

#[test]
fn segments_are_made_to_fit_into_the_tunnel() {
    // MSS 1460 behind another option, so that it lies across two words of the sum.
    for (ip, options, limit) in [
        (Ip::V4, [2, 4, 5, 180, 1, 1, 1, 0], 1_240_u16),
        (Ip::V6, [1, 2, 4, 5, 180, 1, 1, 0], 1_220),
    ] {
        let mut vm = Vm::new(algorithm::MAGLEV, &BACKENDS);
        let mut segment = frames::tcp(4000, 22, SYN);
        segment[12] = 7 << 4;
        segment.extend(options);
        let packet = sealed(ip.packet(VM, 200, TCP, &segment));
        assert_eq!(vm.tunnel_out(&packet).unwrap().1, packet, "without a limit");
        vm.tables.control.tunnel_mtu = 1_280;
        for changed in [vm.tunnel_out(&packet), vm.tunnel_in(&packet)] {
            let changed = changed.unwrap().1;
            assert_sealed(&changed);
            let at = changed.len() - 8 + if ip == Ip::V4 { 2 } else { 3 };
            assert_eq!(changed[at..at + 2], limit.to_be_bytes());
            assert_eq!(vm.tunnel_out(&changed).unwrap().1, changed, "small enough");
        }
    }
}

#[test]
fn xdp_leaves_virtual_addresses_to_tc_and_nothing_else() {
    let mut vm = Vm::new(algorithm::MAGLEV, &BACKENDS);
    vm.deny(Direction::Ingress);
    let call = Ip::V4.ethernet(&udp_of(Ip::V4, CALL));
    let other = Ip::V4.ethernet(&udp_of(Ip::V4, Tuple(CLIENT, 1, VM, 1)));
    let front =
        |vm: &Vm, frame: &[u8]| crate::pipeline::run::<_, _, ETHERNET, false>(frame, &vm.tables);
    let denied = crate::pipeline::Verdict::Drop(Reason::DeniedByDefault);
    assert_eq!(front(&vm, &call), denied);
    let (word, bit) = cnsmo_common::balance::filter_bit(v4(VIRTUAL));
    vm.tables.control.left_to_tc[word] |= bit;
    vm.tables.control.switches |= switch::LEAVE_TO_TC;
    assert_eq!(front(&vm, &call), crate::pipeline::Verdict::Pass);
    assert_eq!(front(&vm, &other), denied);
}

proptest! {
    /// Whatever happens to the ring, a flow keeps its backend, and both entries tell the same.
    #[test]
    fn no_change_of_the_ring_moves_a_flow(
        steps in prop::collection::vec((0_u16..6, any::<bool>(), 0_usize..8, 0_u64..3), 1..60),
    ) {
        let vm = Vm::new(algorithm::MAGLEV, &BACKENDS);
        let mut known = std::collections::BTreeMap::new();
        for (client, v6, ring, wait) in steps {
            vm.later(wait);
            let backends: Vec<u8> = (0..3).filter(|n| ring >> n & 1 != 0).map(|n| BACKENDS[n]).collect();
            vm.steer(&backends);
            let ip = if v6 { Ip::V6 } else { Ip::V4 };
            let call = Tuple(CLIENT, client + 1, VIRTUAL, PORT);
            match vm.card_in(ip, &udp_of(ip, call)) {
                Ok((_, packet)) => {
                    let inside = tuple(&packet);
                    let first = *known.entry((client, v6)).or_insert(inside);
                    prop_assert_eq!(inside, first);
                    prop_assert_eq!(tuple(&vm.back(ip, &udp_of(ip, reversed(inside)))), reversed(call));
                }
                Err(reason) => {
                    prop_assert_eq!(reason, Reason::NoBackend);
                    prop_assert!(backends.is_empty() && !known.contains_key(&(client, v6)));
                }
            }
        }
        prop_assert_eq!(vm.flows(), [known.len() * 2, 0]);
    }
}
