//! What the data path costs per packet, beside doing nothing: the firewall for `cargo xtask bench fw`; with argument `lb`, the
//! balancer for `cargo xtask bench lb`; with others, one end of a pair of devices (module `ends`).
//!
//! Each round times every case and its peer one after the other, by `BPF_PROG_TEST_RUN`; the medians of the rounds are
//! printed as JSON rows on standard output. Verdicts are checked before anything is timed.

mod balancer;
mod ends;
mod rules;

use std::{io::Write as _, process::ExitCode};

use anyhow::{Context as _, ensure};
use cnsmo_agent::{
    compile::sample::{self, AddressFamily, Style},
    datapath::{
        Datapath as _,
        kernel::{Kernel, Options, XdpChoice},
    },
    effective::Effective,
};
use cnsmo_proto::{
    model::{FirewallPolicy, Name},
    pb::policy as pb,
};

const ROUNDS: usize = 7;
const REPEAT: u32 = 400_000;
/// Flows in turn: more than any cache of a core holds.
const FLOWS: u32 = 16_384;
/// New flows in turn: they come back only long after their half-open entry was evicted.
const NEW_FLOWS: u32 = 1 << 24;
const RULES: usize = 10_000;
/// The most that an established packet may take, net.
const ESTABLISHED_MAX: f64 = 110.0;

const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;

const TCP: u8 = 6;
const TCP_SYN: u8 = 2;
const TCP_ACK: u8 = 16;
const OPEN_PORT: u16 = 80;
const CLOSED_PORT: u16 = 81;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "cnsmo-bench-fw: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> anyhow::Result<()> {
    choose_cpus()?;
    let measure = match arguments.split_first() {
        None => measure,
        Some((mode, _)) if mode == "lb" => balancer::measure,
        Some((mode, arguments)) => return ends::run(mode, arguments),
    };
    yield_to_nobody()?;
    let rows = measure()?;
    Ok(writeln!(std::io::stdout(), "[{}]", rows.join(",\n "))?)
}

fn measure() -> anyhow::Result<Vec<String>> {
    let (rules, classify) = rules::measure()?;
    let mut rows = packets(classify)?;
    rows.extend(rules);
    Ok(rows)
}

/// The whole firewall on whole packets, 10,000 rules loaded. `classify`: what classification alone takes there.
fn packets(classify: f64) -> anyhow::Result<Vec<String>> {
    let mut bench = Bench::open(RULES as u32 + 16, 1 << 20, 1 << 16)?;
    bench.kernel.apply(&allowing(RULES, TCP, OPEN_PORT)?)?;
    bench.kernel.change_control(|control| control.pickup_until = 0);
    bench.establish()?;

    let cases = [
        ("fw/established", frame(OPEN_PORT, TCP_ACK), FLOWS, XDP_PASS),
        ("fw/new", frame(OPEN_PORT, TCP_SYN), NEW_FLOWS, XDP_PASS),
        ("fw/denied", frame(CLOSED_PORT, TCP_SYN), NEW_FLOWS, XDP_DROP),
    ];
    for (id, frame, flows, expected) in &cases {
        bench.kernel.set_bench_flows(*flows);
        let (seen, _) = bench.kernel.test_run("bench_flows", frame)?;
        ensure!(seen == *expected, "{id}: verdict {seen} instead of {expected}");
    }
    let mut ours = vec![Vec::new(); cases.len()];
    let mut peer = vec![Vec::new(); cases.len()];
    for _ in 0..ROUNDS {
        for (n, (_, frame, flows, _)) in cases.iter().enumerate() {
            bench.kernel.set_bench_flows(*flows);
            ours[n].push(bench.kernel.time("bench_flows", frame, REPEAT)?.as_nanos() as f64);
            bench.kernel.set_bench_flows(*flows);
            peer[n].push(bench.kernel.time("bench_no_firewall", frame, REPEAT)?.as_nanos() as f64);
        }
    }
    let medians = ours.into_iter().zip(peer).map(|(ours, peer)| (median(ours), median(peer)));
    let medians: Vec<_> = medians.collect();
    let rows = cases.iter().zip(&medians).map(|((id, ..), (ours, peer))| row(id, *ours, *peer));
    let mut rows: Vec<_> = rows.collect();
    let established = medians[0].0 - medians[0].1;
    rows.push(limit_row("fw/established-16k", "ns", established, ESTABLISHED_MAX));
    rows.push(text(
        "fw/established-vs-classify",
        "ns",
        established,
        ("classify-10k", classify),
        established / classify,
    ));
    Ok(rows)
}

/// A data path of its own, removed at the end.
struct Bench {
    kernel: Kernel,
    pins: std::path::PathBuf,
    state: std::path::PathBuf,
}

impl Bench {
    fn open(rules_max: u32, policy_bytes: usize, flows: u32) -> anyhow::Result<Self> {
        let name = format!("cnsmo-bench-{}", std::process::id());
        let pins = std::path::Path::new("/sys/fs/bpf").join(&name);
        let state = std::env::temp_dir().join(&name);
        std::fs::create_dir_all(&state)
            .with_context(|| format!("failed to make {}", state.display()))?;
        let options = Options {
            pins: pins.clone(),
            state: state.clone(),
            interfaces: vec![],
            xdp: XdpChoice::Auto,
            flows,
            policy_bytes,
            rules_max,
        };
        let kernel = Kernel::open(options);
        if kernel.is_err() {
            remove(&pins, &state);
        }
        Ok(Self { kernel: kernel?, pins, state })
    }

    /// Lets every flow shake hands. By TC programs: each test run of an XDP program waits for a grace period.
    fn establish(&mut self) -> anyhow::Result<()> {
        for flow in 0..FLOWS {
            let mut syn = frame(OPEN_PORT, TCP_SYN);
            set_flow(&mut syn, flow);
            let mut ack = frame(OPEN_PORT, TCP_ACK);
            set_flow(&mut ack, flow);
            let answer = reversed(&syn, TCP_SYN | TCP_ACK);
            for (program, frame) in
                [("nic_ingress", &syn), ("nic_egress", &answer), ("nic_ingress", &ack)]
            {
                let (seen, _) = self.kernel.test_run(program, frame)?;
                ensure!(seen == u32::MAX, "handshake of flow {flow} was refused");
            }
        }
        Ok(())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        remove(&self.pins, &self.state);
    }
}

fn remove(pins: &std::path::Path, state: &std::path::Path) {
    // A leftover is found by the next run of this process id; nothing else depends on it.
    let _ = Kernel::detach(pins);
    let _ = std::fs::remove_dir_all(state);
}

/// So many rules, all but the last about others; then nothing may come in.
fn allowing(rules: usize, protocol: u8, port: u16) -> anyhow::Result<Effective> {
    let mut policy = sample::policy(Style::Groups, AddressFamily::V4, rules - 1, 1);
    let spec = pb::FirewallPolicySpec {
        default_ingress: pb::Action::Deny.into(),
        rules: vec![pb::FirewallRule {
            name: "open".into(),
            action: pb::Action::Allow.into(),
            direction: pb::Direction::Ingress.into(),
            protocol: Some(protocol.into()),
            ports: vec![pb::PortRange { first: port.into(), last: port.into() }],
            ..Default::default()
        }],
        ..Default::default()
    };
    let open = FirewallPolicy::try_from(spec)?;
    let own = Effective::merge(vec![], [(&Name::new("bench")?, &open)]);
    policy.rules.extend(own.rules);
    Ok(Effective { open: false, ingress: own.ingress, ..policy })
}

/// From 198.18.0.0/15 (RFC 2544, benchmarks) to 192.0.2.1 (RFC 5737, documentation).
fn frame(port: u16, flags: u8) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame.extend([198, 18, 0, 0, 192, 0, 2, 1]);
    frame.extend([4, 0]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend([0; 6]);
    frame
}

/// As the program `bench_flows` does it.
fn set_flow(frame: &mut [u8], flow: u32) {
    frame[28..30].copy_from_slice(&((flow >> 14) as u16).to_be_bytes());
    frame[34..36].copy_from_slice(&(1_024 + (flow & 0x3fff) as u16).to_be_bytes());
}

fn reversed(frame: &[u8], flags: u8) -> Vec<u8> {
    let mut answer = frame.to_vec();
    answer[26..30].copy_from_slice(&frame[30..34]);
    answer[30..34].copy_from_slice(&frame[26..30]);
    answer[34..36].copy_from_slice(&frame[36..38]);
    answer[36..38].copy_from_slice(&frame[34..36]);
    answer[47] = flags;
    answer
}

/// All for threads that compile and compare, one for this thread, which times programs.
fn choose_cpus() -> anyhow::Result<()> {
    use nix::{
        sched::{CpuSet, sched_getaffinity, sched_setaffinity},
        unistd::Pid,
    };
    // Threads are where the one was that started them.
    rayon::ThreadPoolBuilder::new().build_global()?;
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let last = (0..CpuSet::count()).rev().find(|&cpu| allowed.is_set(cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.context("no CPU to run on")?)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &one)?)
}

/// The kernel's clock runs on while others have the processor.
fn yield_to_nobody() -> anyhow::Result<()> {
    let parameters = nix::libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters outlive the call.
    let result =
        unsafe { nix::libc::sched_setscheduler(0, nix::libc::SCHED_FIFO, &raw const parameters) };
    Ok(nix::errno::Errno::result(result).map(drop)?)
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// `ours` is net of the peer, which is everything but what is measured; `ratio` is gross.
fn row(id: &str, ours: f64, peer: f64) -> String {
    text(id, "ns", (ours - peer).max(0.0), ("empty", peer), ours / peer)
}

/// Beside the most that it may be.
fn limit_row(id: &str, unit: &str, ours: f64, max: f64) -> String {
    text(id, unit, ours, ("limit", max), ours / max)
}

fn text(id: &str, unit: &str, ours: f64, (peer_name, peer): (&str, f64), ratio: f64) -> String {
    format!(
        r#"{{"id":"{id}","unit":"{unit}","ours":{ours:.1},"peer_name":"{peer_name}","peer":{peer:.1},"ratio":{ratio:.3},"better":"lower","rounds":{ROUNDS}}}"#
    )
}
