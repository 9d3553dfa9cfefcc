//! What a gateway's address translation costs per packet.
//!
//! In the numbers: `nic_ingress` from the first instruction to its verdict, for packets from clients, 10 balancers and no
//! policy in force. That is parsing, the flow's entry, the choice of backend and port for a new flow, and the rewriting,
//! checksums included, of a packet that no device has summed up. Flows come in turn, and once a second the first packet
//! of each also brings its other entry up to date.
//! Not in them: what the kernel does with the verdict, the hook on the tunnel that the packet meets next, and the way
//! back, on which the packet gets an Ethernet header: in a test run it would grow with each repetition.
//!
//! The peer is a program that writes the same headers to the frame, which the rewriting of the run before demands, and ends.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::ensure;
use cnsmo_agent::{
    datapath::{Datapath as _, kernel::Kernel},
    effective::{BackendTarget, Balancer, Effective},
};
use cnsmo_common::{
    balance::{NAT_PORT_FIRST, NAT_PORTS, filter_bit},
    probe::BENCH_HEADERS,
};
use cnsmo_proto::model::{Addresses, Algorithm, Name, ServicePort};

use super::{
    Bench, FLOWS, NEW_FLOWS, OPEN_PORT, REPEAT, ROUNDS, TCP, TCP_ACK, TCP_SYN, XDP_PASS, frame,
    median, row, set_flow, text,
};

const BALANCERS: u8 = 10;
/// Of each balancer: with a full table of half-open flows, a tenth of the gateway's ports for each backend is taken. With so
/// few backends that most are, new flows look at more ports, and some are refused.
const BACKENDS: u8 = 128;
/// Entries of each flow table, as in an agent: two for each of the most flows that are established here, and as many again.
const TABLE: u32 = 1 << 18;

const TC_SHOT: u32 = 2;
const TC_UNSPEC: u32 = u32::MAX;
const TC_REDIRECT: u32 = 7;

const UDP: u8 = 17;
const TARGET_PORT: u16 = 8_080;

const ETHERNET: usize = 14;

type Headers = [u8; BENCH_HEADERS];

/// Packets of one kind.
struct Case {
    id: &'static str,
    packet: Packet,
    /// Flows in turn, a power of two.
    flows: u32,
    is_new: bool,
}

/// From a client to the first balancer.
#[derive(Clone, Copy)]
struct Packet {
    v6: bool,
    protocol: u8,
    flags: u8,
}

pub(super) fn measure() -> anyhow::Result<Vec<String>> {
    let tcp = Packet { v6: false, protocol: TCP, flags: TCP_ACK };
    let syn = Packet { flags: TCP_SYN, ..tcp };
    let udp = Packet { protocol: UDP, ..tcp };
    let v6 = Packet { v6: true, ..tcp };
    let case = |id, packet, flows| Case { id, packet, flows, is_new: false };
    let cases = [
        case("lb/hit-1k", tcp, 1 << 10),
        case("lb/hit-64k", tcp, 1 << 16),
        Case { is_new: true, ..case("lb/new", syn, NEW_FLOWS) },
        case("lb/udp", udp, 1 << 10),
        case("lb/hit-v6", v6, 1 << 10),
    ];
    let mut rows = Vec::new();
    for case in &cases {
        rows.push(translated(case)?);
    }
    rows.push(not_virtual()?);
    Ok(rows)
}

/// On a data path of its own, so that no case's flows are in another's way.
fn translated(case: &Case) -> anyhow::Result<String> {
    let mut bench = Bench::open(16, 1 << 16, TABLE)?;
    let kernel = &mut bench.kernel;
    apply(kernel, BALANCERS)?;
    if !case.is_new {
        establish(kernel, case)?;
    }
    let headers = headers(case.packet);
    check(kernel, case, &headers)?;
    let before = refused(kernel);
    let (mut ours, mut peer) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        // New ones go on where the last round ended.
        if !case.is_new || ours.is_empty() {
            kernel.set_bench_headers(&headers, case.flows);
        }
        ours.push(kernel.time("bench_balancer", &headers, REPEAT)?.as_nanos() as f64);
        peer.push(kernel.time("bench_no_balancer", &headers, REPEAT)?.as_nanos() as f64);
    }
    let refused = refused(kernel) - before;
    ensure!(refused == 0, "{}: {refused} packets were refused", case.id);
    Ok(row(case.id, median(ours), median(peer)))
}

fn refused(kernel: &mut Kernel) -> u64 {
    kernel.status().drops.iter().map(|(_, _, count)| count.packets).sum()
}

/// Packets of established flows that no balancer has to do with, on a network card with XDP: with balancers, XDP looks
/// whether it leaves them to TC, and TC whether XDP has. The entry into the program of TC is in the number; without
/// balancers it is not on the card.
fn not_virtual() -> anyhow::Result<String> {
    let mut bench = Bench::open(16, 1 << 16, TABLE)?;
    apply(&mut bench.kernel, BALANCERS)?;
    let frame = frame(OPEN_PORT, TCP_ACK);
    let bit = filter_bit([frame[30], frame[31], frame[32], frame[33]]);
    let is_taken = |n| filter_bit(virtual_v4(n).octets()) == bit;
    ensure!(!(0..BALANCERS).any(is_taken), "a virtual address is taken for the packet's");
    bench.establish()?;
    let kernel = &mut bench.kernel;
    let mut empty = Vec::new();
    let mut sides = [(BALANCERS, Vec::new()), (0, Vec::new())];
    for _ in 0..ROUNDS {
        for (balancers, samples) in &mut sides {
            apply(kernel, *balancers)?;
            kernel.set_bench_flows(FLOWS);
            let (seen, _) = kernel.test_run("bench_flows", &frame)?;
            ensure!(seen == XDP_PASS, "lb/not-vip: verdict {seen} of XDP");
            kernel.set_bench_flows(FLOWS);
            let mut time = kernel.time("bench_flows", &frame, REPEAT)?;
            if *balancers > 0 {
                let (seen, _) = kernel.test_run("nic_balance", &frame)?;
                ensure!(seen == TC_UNSPEC, "lb/not-vip: verdict {seen} of TC");
                time += kernel.time("nic_balance", &frame, REPEAT)?;
            }
            samples.push(time.as_nanos() as f64);
        }
        kernel.set_bench_flows(FLOWS);
        empty.push(kernel.time("bench_no_firewall", &frame, REPEAT)?.as_nanos() as f64);
    }
    let empty = median(empty);
    let [with, without] = sides.map(|(_, samples)| median(samples) - empty);
    Ok(text("lb/not-vip", "ns", with, ("no balancers", without), with / without))
}

/// Without a tunnel: its hooks take no part, only its addresses do.
fn apply(kernel: &mut Kernel, balancers: u8) -> anyhow::Result<()> {
    let node = |n| -> anyhow::Result<_> {
        let addresses = Addresses { v4: Some(inner_v4(n)), v6: Some(inner_v6(n)) };
        let node = Name::new(format!("backend-{n}"))?;
        Ok(BackendTarget { node, instance: None, addresses, port: 0 })
    };
    let backends = (1..=BACKENDS).map(node).collect::<anyhow::Result<Vec<_>>>()?;
    let port = |protocol| ServicePort { protocol, port: OPEN_PORT, target_port: TARGET_PORT };
    let balancer = |n| -> anyhow::Result<_> {
        Ok(Balancer {
            name: Name::new(format!("balancer-{n}"))?,
            addresses: vec![virtual_v4(n).into(), virtual_v6(n).into()],
            ports: vec![port(TCP), port(UDP)],
            algorithm: Algorithm::Maglev,
            gateway: true,
            backends: backends.clone(),
        })
    };
    let balancers = (0..balancers).map(balancer).collect::<anyhow::Result<_>>()?;
    kernel.apply(&Effective { balancers, ..Effective::merge(vec![], []) })?;
    kernel.change_control(|control| {
        control.own_v4 = inner_v4(0).octets();
        control.own_v6 = inner_v6(0).octets();
    });
    Ok(())
}

/// Lets every flow of a case speak from both ends.
fn establish(kernel: &mut Kernel, case: &Case) -> anyhow::Result<()> {
    let is_tcp = case.packet.protocol == TCP;
    let opening = if is_tcp { TCP_SYN } else { 0 };
    let first = headers(Packet { flags: opening, ..case.packet });
    let then = headers(case.packet);
    for flow in 0..case.flows {
        let mut run = |program: &str, headers: &[u8]| -> anyhow::Result<Vec<u8>> {
            let (seen, out) = kernel.test_run(program, headers)?;
            let id = case.id;
            ensure!(seen == TC_REDIRECT, "{id}: verdict {seen} of {program} on flow {flow}");
            Ok(out)
        };
        let out = run("nic_ingress", &of_flow(first, flow))?;
        run("tunnel_ingress", &answer(case.packet, &out))?;
        if is_tcp {
            run("nic_ingress", &of_flow(then, flow))?;
        }
    }
    Ok(())
}

/// The verdict, the packet that comes out, and that a flow that is none is refused: the flows timed are known ones.
fn check(kernel: &mut Kernel, case: &Case, headers: &Headers) -> anyhow::Result<()> {
    let id = case.id;
    kernel.set_bench_headers(headers, case.flows);
    let (seen, out) = kernel.test_run("bench_balancer", headers)?;
    ensure!(seen == TC_REDIRECT, "{id}: verdict {seen}");
    ensure!(sums(case.packet, headers) == [0; 2], "{id}: the bench's own checksums are wrong");
    ensure!(sums(case.packet, &out) == [0; 2], "{id}: checksums are wrong in {out:02x?}");
    let (src, dst, l4) = places(case.packet.v6);
    let is_inner = |address: &[u8], hosts: std::ops::RangeInclusive<u8>| {
        hosts.into_iter().any(|n| {
            address == inner_v4(n).octets().as_slice() || address == inner_v6(n).octets().as_slice()
        })
    };
    let at = |from: usize| u16::from_be_bytes([out[from], out[from + 1]]);
    let is_translated = is_inner(&out[src..dst], 0..=0)
        && is_inner(&out[dst..dst + (dst - src)], 1..=BACKENDS)
        && (NAT_PORT_FIRST..NAT_PORT_FIRST + NAT_PORTS).contains(&at(l4))
        && at(l4 + 2) == TARGET_PORT;
    ensure!(is_translated, "{id}: not translated: {out:02x?}");
    if !case.is_new && case.packet.protocol == TCP {
        let unknown = of_flow(*headers, case.flows);
        let (seen, _) = kernel.test_run("nic_ingress", &unknown)?;
        ensure!(seen == TC_SHOT, "{id}: verdict {seen} on a flow that is not known");
    }
    Ok(())
}

/// From 198.18.0.0 (RFC 2544, benchmarks) or its like to the first virtual address; checksums are right for flow 0.
fn headers(packet: Packet) -> Headers {
    let mut bytes = [0; BENCH_HEADERS];
    bytes[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    let (src, dst, l4) = places(packet.v6);
    let carried = (BENCH_HEADERS - l4) as u16;
    if packet.v6 {
        bytes[12..14].copy_from_slice(&[0x86, 0xdd]);
        bytes[14] = 0x60;
        bytes[18..20].copy_from_slice(&carried.to_be_bytes());
        (bytes[20], bytes[21]) = (packet.protocol, 64);
        bytes[src..dst].copy_from_slice(&Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0).octets());
        bytes[dst..l4].copy_from_slice(&virtual_v6(0).octets());
    } else {
        bytes[12..14].copy_from_slice(&[8, 0]);
        bytes[14] = 0x45;
        bytes[16..18].copy_from_slice(&(carried + 20).to_be_bytes());
        bytes[20] = 0x40;
        (bytes[22], bytes[23]) = (64, packet.protocol);
        bytes[src..dst].copy_from_slice(&[198, 18, 0, 0]);
        bytes[dst..l4].copy_from_slice(&virtual_v4(0).octets());
    }
    bytes[l4 + 2..l4 + 4].copy_from_slice(&OPEN_PORT.to_be_bytes());
    if packet.protocol == UDP {
        bytes[l4 + 4..l4 + 6].copy_from_slice(&carried.to_be_bytes());
    } else {
        (bytes[l4 + 12], bytes[l4 + 13]) = (0x50, packet.flags);
    }
    let mut bytes = of_flow(bytes, 0);
    let [header, segment] = sums(packet, &bytes);
    if !packet.v6 {
        bytes[24..26].copy_from_slice(&header.to_be_bytes());
    }
    let at = l4 + if packet.protocol == UDP { 6 } else { 16 };
    bytes[at..at + 2].copy_from_slice(&segment.to_be_bytes());
    bytes
}

/// As the program `bench_balancer` does it.
fn of_flow(mut headers: Headers, flow: u32) -> Headers {
    if headers[12] == 8 {
        set_flow(&mut headers, flow);
    } else {
        headers[36..38].copy_from_slice(&((flow >> 14) as u16).to_be_bytes());
        headers[54..56].copy_from_slice(&(1_024 + (flow & 0x3fff) as u16).to_be_bytes());
    }
    headers
}

/// What a backend answers to a packet, as it comes out of the tunnel: without an Ethernet header. Nobody looks at its
/// checksums.
fn answer(packet: Packet, question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    let (src, dst, l4) = places(packet.v6);
    answer[src..dst].copy_from_slice(&question[dst..l4]);
    answer[dst..l4].copy_from_slice(&question[src..dst]);
    answer[l4..l4 + 2].copy_from_slice(&question[l4 + 2..l4 + 4]);
    answer[l4 + 2..l4 + 4].copy_from_slice(&question[l4..l4 + 2]);
    if packet.protocol == TCP {
        answer[l4 + 13] = TCP_SYN | TCP_ACK;
    }
    answer.split_off(ETHERNET)
}

/// Checksums of the IPv4 header, if there is one, and of what it carries with its pseudo-header; of a packet that has its
/// checksums already: zero if they are right.
fn sums(packet: Packet, bytes: &[u8]) -> [u16; 2] {
    let (src, _, l4) = places(packet.v6);
    let header = if packet.v6 { 0 } else { sum(&[&bytes[ETHERNET..l4]]) };
    let carried = (BENCH_HEADERS - l4) as u8;
    let pseudo = [0, packet.protocol, 0, carried];
    [header, sum(&[&bytes[src..l4], &pseudo, &bytes[l4..BENCH_HEADERS]])]
}

/// RFC 1071; all parts but the last one are of even length.
fn sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks_exact(2));
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Offsets of source address, destination address, and what the IP header is followed by.
fn places(v6: bool) -> (usize, usize, usize) {
    if v6 { (ETHERNET + 8, ETHERNET + 24, ETHERNET + 40) } else { (26, 30, 34) }
}

fn virtual_v4(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, n + 1)
}

fn virtual_v6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(n) + 1)
}

/// 0: the gateway itself.
fn inner_v4(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, n + 1)
}

fn inner_v6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(n) + 1)
}
