//! The ends of pairs of devices, for `cargo xtask bench fw`: who sends, who judges, and the same rules for nftables.
//!
//! `send PINS STATE`: sends frames when told `drop DEVICE FRAMES BATCH` or `forward DEVICE FRAMES BATCH`, and says how long
//! each took; `bench_drop` is pinned in the folder PINS meanwhile.
//! `guard PINS STATE DEVICE RULES CASE`: judges what arrives at a device, of a case `drop`, `forward` or `serve`, and tells what
//! came of it when told `counts`.
//! `nft FORM`: prints the rules of the case `drop` in a form of nftables.
//! The first two say `ready`, and end when standard input is closed.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{BufRead as _, Write as _, stdin, stdout},
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use anyhow::{Context as _, bail, ensure};
use cnsmo_agent::{
    compile::{
        reference::first_match,
        sample::{self, AddressFamily, Style},
        trace::Header,
    },
    datapath::{
        Datapath as _, Status,
        kernel::{Kernel, Options, XdpChoice},
    },
    effective::Effective,
};
use cnsmo_common::probe::{BENCH_HEADERS, TRACE_LEN};
use cnsmo_proto::model::{Action, Direction, Protocol};
use rayon::prelude::*;

use super::{FLOWS, OPEN_PORT, RULES, TCP, TCP_SYN, allowing, reversed};

const UDP: u8 = 17;
/// Where forwarded packets go to (RFC 5737, documentation): a host and its port that discards (RFC 863).
const BEYOND: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const DISCARD_PORT: u16 = 9;
/// Of the interfaces that shall receive: the same for all.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Offsets in an untagged IPv4 frame without options.
const CHECKSUM: usize = 14 + 10;
const L4: usize = 34;

pub(super) fn run(mode: &str, arguments: &[String]) -> anyhow::Result<()> {
    match (mode, arguments) {
        ("send", [pins, state]) => send(pins.as_ref(), state.as_ref()),
        ("guard", [pins, state, device, rules, case]) => {
            let rules = rules.parse().with_context(|| format!("{rules} rules"))?;
            let options = options(pins.as_ref(), state.as_ref(), rules);
            guard(Options { interfaces: vec![device.clone()], ..options }, rules, case)
        }
        ("nft", [form]) => print_nft(form),
        _ => bail!("`{mode}` is a part of `cargo xtask bench`, with other arguments"),
    }
}

fn options(pins: &Path, state: &Path, rules: usize) -> Options {
    Options {
        pins: pins.to_owned(),
        state: state.to_owned(),
        interfaces: vec![],
        xdp: XdpChoice::Auto,
        // As in an agent.
        flows: 1 << 18,
        policy_bytes: 16 << 20,
        rules_max: rules as u32 + 16,
    }
}

/// Says `ready`, then answers each line until there are no more.
fn serve(mut answer: impl FnMut(&str) -> anyhow::Result<String>) -> anyhow::Result<()> {
    let mut out = stdout();
    writeln!(out, "ready")?;
    out.flush()?;
    for line in stdin().lock().lines() {
        let line = line?;
        let said = answer(&line).with_context(|| format!("told `{line}`"))?;
        writeln!(out, "{said}")?;
        out.flush()?;
    }
    Ok(())
}

fn send(pins: &Path, state: &Path) -> anyhow::Result<()> {
    let mut kernel = Kernel::open(options(pins, state, 0))?;
    kernel.pin_program("bench_drop", &pins.join("bench_drop"))?;
    let dropped = strangers(&denying()?)?;
    let forwarded = forwarded();
    let served = serve(|line| {
        let words: Vec<_> = line.split(' ').collect();
        let [case, device, frames, batch] = words[..] else { bail!("not understood") };
        let (headers, frame) = match case {
            "drop" => (&dropped, template(TCP)),
            "forward" => (&forwarded, template(UDP)),
            _ => bail!("no case is named `{case}`"),
        };
        let device = nix::net::if_::if_nametoindex(device)?;
        kernel.set_bench_traffic(headers, &frame, device);
        let time = kernel.send(frames.parse()?, batch.parse()?)?;
        Ok(serde_json::json!({ "ns": time.as_nanos() }).to_string())
    });
    drop(kernel);
    Kernel::detach(pins)?;
    served
}

fn guard(options: Options, rules: usize, case: &str) -> anyhow::Result<()> {
    let policy = match case {
        "drop" => denying()?,
        "forward" => allowing(rules, UDP, DISCARD_PORT)?,
        "serve" => allowing(rules, TCP, OPEN_PORT)?,
        _ => bail!("no case is named `{case}`"),
    };
    let pins = options.pins.clone();
    let mut kernel = Kernel::open(options)?;
    let judged = (|| -> anyhow::Result<()> {
        kernel.apply(&policy)?;
        kernel.change_control(|control| control.pickup_until = 0);
        if case == "forward" {
            establish(&mut kernel)?;
        }
        serve(|line| {
            ensure!(line == "counts", "not understood");
            // A whole round, and what was left of the one before.
            for _ in 0..=2 * FLOWS / 16_384 {
                kernel.sweep();
            }
            Ok(counts(&kernel.status()))
        })
    })();
    drop(kernel);
    Kernel::detach(&pins)?;
    judged
}

/// Packets that were dropped on their way in, by reason, and established flows.
fn counts(status: &Status) -> String {
    let ingress = status.drops.iter().filter(|(direction, ..)| *direction == Direction::Ingress);
    let drops: BTreeMap<_, _> = ingress.map(|(_, reason, count)| (reason, count.packets)).collect();
    let flows = status.flows;
    serde_json::json!({ "drops": drops, "flows": flows }).to_string()
}

/// [`RULES`] rules for what comes in; nothing else may.
fn denying() -> anyhow::Result<Effective> {
    // One of eight is for the other direction.
    let mut policy = sample::policy(Style::Groups, AddressFamily::V4, RULES * 8 / 7 + 8, 1);
    policy.rules.retain(|owned| owned.rule.direction == Direction::Ingress);
    policy.rules.truncate(RULES);
    ensure!(policy.rules.len() == RULES, "there are {} rules", policy.rules.len());
    Ok(policy)
}

/// To the hosts and ports that rules are about, from others than they say: a search goes all the way, and no rule matches.
fn strangers(policy: &Effective) -> anyhow::Result<Vec<Header>> {
    let len = TRACE_LEN as usize;
    let rules = &policy.rules;
    let stranger = |n: usize| {
        let rule = &rules[n * rules.len() / len].rule;
        let dst = rule.to.first()?.network();
        let Protocol::Ports { destination, .. } = &rule.protocol else { return None };
        // Odd multiples of a constant spread over all addresses. None is from here or from a group.
        let mut sources = (1..64_u32).map(|k| {
            let bits = (n as u32 * 64 + k).wrapping_mul(0x9e37_79b1);
            Ipv4Addr::from(bits)
        });
        let header = |src: Ipv4Addr| Header {
            src: src.into(),
            dst,
            sport: 1_024,
            dport: destination.first().map_or(0, |range| range.first()),
            proto: TCP,
            direction: Direction::Ingress,
        };
        let usable = |src: &Ipv4Addr| (11..224).contains(&src.octets()[0]) && !src.is_loopback();
        let mut headers = sources.by_ref().filter(usable).map(header);
        headers.find(|header| first_match(policy, header).is_none())
    };
    let headers: Option<Vec<_>> = (0..len).into_par_iter().map(stranger).collect();
    headers.context("a rule that nobody is a stranger to")
}

/// From one network to one host: the source port makes the flow.
fn forwarded() -> Vec<Header> {
    (0..TRACE_LEN as u16).map(header_of_flow).collect()
}

fn header_of_flow(n: u16) -> Header {
    let [high, low] = n.to_be_bytes();
    Header {
        src: Ipv4Addr::new(198, 18, high, low).into(),
        dst: BEYOND.into(),
        sport: 1_024,
        dport: DISCARD_PORT,
        proto: UDP,
        direction: Direction::Ingress,
    }
}

/// A frame without addresses and ports, and with the sum of the rest of the IPv4 header in place of its checksum.
fn template(protocol: u8) -> [u8; BENCH_HEADERS] {
    const IP_BYTES: u16 = (BENCH_HEADERS - 14) as u16;
    let mut frame = [0; BENCH_HEADERS];
    frame[..6].copy_from_slice(&MAC);
    frame[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 2, 8, 0]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&IP_BYTES.to_be_bytes());
    (frame[20], frame[22], frame[23]) = (0x40, 64, protocol);
    if protocol == TCP {
        (frame[L4 + 12], frame[L4 + 13]) = (0x50, TCP_SYN);
        frame[L4 + 14..L4 + 16].copy_from_slice(&[0xff, 0xff]);
    } else {
        frame[L4 + 4..L4 + 6].copy_from_slice(&(IP_BYTES - 20).to_be_bytes());
    }
    let words = frame[14..L4].chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
    let sum: u32 = words.sum();
    let sum = (sum >> 16) + (sum & 0xffff);
    frame[CHECKSUM..CHECKSUM + 2].copy_from_slice(&(sum as u16).to_be_bytes());
    frame
}

/// Has each flow of the case `forward` answered once.
fn establish(kernel: &mut Kernel) -> anyhow::Result<()> {
    for flow in 0..FLOWS {
        let header = header_of_flow((flow & (TRACE_LEN - 1)) as u16);
        let mut frame = template(UDP).to_vec();
        let (IpAddr::V4(src), IpAddr::V4(dst)) = (header.src, header.dst) else {
            bail!("a flow that is not IPv4");
        };
        frame[26..30].copy_from_slice(&src.octets());
        frame[30..34].copy_from_slice(&dst.octets());
        // As program `bench_send` does it.
        frame[34..36].copy_from_slice(&(1_024 + (flow & 0x3fff) as u16).to_be_bytes());
        frame[36..38].copy_from_slice(&header.dport.to_be_bytes());
        let answer = reversed(&frame, 0);
        for (program, frame) in [("nic_ingress", &frame), ("nic_egress", &answer)] {
            let (seen, _) = kernel.test_run(program, frame)?;
            ensure!(seen == u32::MAX, "verdict {seen} of {program} on flow {flow}");
        }
    }
    Ok(())
}

/// Rules one after the other, or a map from intervals to verdicts; where the kernel's IP begins, or at the device. What no
/// rule decides is counted and dropped.
fn print_nft(form: &str) -> anyhow::Result<()> {
    let policy = denying()?;
    let mut rules = Vec::with_capacity(policy.rules.len());
    for owned in &policy.rules {
        let rule = &owned.rule;
        let ([from], [to], Protocol::Ports { destination, .. }) =
            (&rule.from[..], &rule.to[..], &rule.protocol)
        else {
            bail!("{} is not of one network to another", rule.name);
        };
        let port = destination.first().with_context(|| format!("{} has no port", rule.name))?;
        let verdict = match rule.action {
            Action::Allow => "accept",
            _ => "drop",
        };
        rules.push((from, to, port.first(), verdict));
    }
    let (family, hook) = match form {
        "linear" | "set" => ("ip", "prerouting"),
        "set-ingress" => ("netdev", "ingress device \"in\""),
        _ => bail!("no form is named `{form}`"),
    };
    let mut text = format!("table {family} bench {{\ncounter judged {{ }}\n");
    if form != "linear" {
        text += "map verdicts {\ntype ipv4_addr . ipv4_addr . inet_service : verdict\nflags interval\nelements = {\n";
        for (from, to, port, verdict) in &rules {
            writeln!(text, "{from} . {to} . {port} : {verdict},")?;
        }
        text += "}\n}\n";
    }
    writeln!(text, "chain judge {{\ntype filter hook {hook} priority -300; policy drop;")?;
    if form == "linear" {
        for (from, to, port, verdict) in &rules {
            writeln!(text, "ip saddr {from} ip daddr {to} tcp dport {port} {verdict}")?;
        }
    } else {
        text += "ip saddr . ip daddr . tcp dport vmap @verdicts\n";
    }
    text += "counter name judged drop\n}\n}\n";
    Ok(stdout().write_all(text.as_bytes())?)
}
