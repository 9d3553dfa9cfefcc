//! What sets of rules cost: to classify a header by them, to compile them, to hold them, and to switch over to them.
//!
//! Each set is in the kernel as a policy would be. Before its classification is timed, it is compared with the linear
//! reference: on the edges of the rules, and on the headers that are timed.

use std::time::Instant;

use anyhow::{Context as _, ensure};
use cnsmo_agent::{
    compile::{
        Limits, compile,
        sample::{self, AddressFamily, Style},
        trace,
    },
    datapath::{Datapath as _, kernel::Kernel},
    effective::Effective,
};
use cnsmo_common::probe::TRACE_LEN;

use super::{Bench, OPEN_PORT, REPEAT, ROUNDS, TCP_SYN, frame, limit_row, median, row};

/// Rules, as a word, and the most that a classification by the worst of the real sets may take, net: IPv4, IPv6.
const SIZES: [(usize, &str, [f64; 2]); 4] = [
    (10, "10", [27.0, 50.0]),
    (1_000, "1k", [80.0, 130.0]),
    (10_000, "10k", [90.0, 130.0]),
    (LARGE, "100k", [110.0, 220.0]),
];
/// The largest, whose change is timed too.
const LARGE: usize = 100_000;
/// Milliseconds to compile it, and bytes per rule: IPv4, IPv6.
const COMPILE_MAX: [f64; 2] = [80.0, 800.0];
const BYTES_MAX: [f64; 2] = [60.0, 150.0];
/// Milliseconds until packets are judged by it.
const SWAP_MAX: f64 = 150.0;

/// More than any set needs: whether one fits the memory of an agent is not the question here.
const ROOMY: Limits = Limits { blob_words: 16 << 20, rules: 1 << 20 };

/// The most that each of the real sets took.
#[derive(Default)]
struct Worst {
    classify: f64,
    compile: f64,
    bytes: f64,
    swap: f64,
}

/// The rows, and the worst classification of 10,000 IPv4 rules.
pub(super) fn measure() -> anyhow::Result<(Vec<String>, f64)> {
    let mut rows = Vec::new();
    let mut usual = 0.0;
    for (n, family) in AddressFamily::ALL.into_iter().enumerate() {
        let v6 = if family == AddressFamily::V6 { "v6-" } else { "" };
        for (rules, size, classify_max) in SIZES {
            let mut worst = Worst::default();
            for style in Style::ALL {
                let set = Set { family, rules, policy: sample::policy(style, family, rules, 1) };
                let id = format!("fw/classify-{v6}{}-{size}", style.name());
                set.measure(&id, style, &mut worst, &mut rows).with_context(|| id.clone())?;
            }
            rows.push(limit_row(
                &format!("fw/classify-{v6}{size}"),
                "ns",
                worst.classify,
                classify_max[n],
            ));
            if (family, rules) == (AddressFamily::V4, super::RULES) {
                usual = worst.classify;
            }
            if rules == LARGE {
                for (what, unit, ours, max) in [
                    ("compile", "ms", worst.compile, COMPILE_MAX[n]),
                    ("bytes", "B/rule", worst.bytes, BYTES_MAX[n]),
                    ("swap", "ms", worst.swap, SWAP_MAX),
                ] {
                    rows.push(limit_row(&format!("fw/{what}-{v6}{size}"), unit, ours, max));
                }
            }
        }
    }
    ensure!(usual > 0.0, "no set has {} rules", super::RULES);
    Ok((rows, usual))
}

struct Set {
    family: AddressFamily,
    rules: usize,
    policy: Effective,
}

impl Set {
    fn measure(
        &self,
        id: &str,
        style: Style,
        worst: &mut Worst,
        rows: &mut Vec<String>,
    ) -> anyhow::Result<()> {
        let bytes = self.bytes()?;
        // With room for the other one of its kind.
        let memory = (bytes * 2).max(1 << 20);
        let mut bench = Bench::open(self.rules as u32 + 16, memory, 1 << 16)?;
        bench.kernel.apply(&self.policy)?;
        let (ours, peer) = self.classify(&mut bench.kernel)?;
        rows.push(row(id, ours, peer));
        if style.is_adversarial() {
            return Ok(());
        }
        worst.classify = worst.classify.max(ours - peer);
        worst.bytes = worst.bytes.max(bytes as f64 / self.rules as f64);
        if self.rules == LARGE {
            worst.compile = worst.compile.max(self.compile()?);
            worst.swap = worst.swap.max(self.swap(style, &mut bench.kernel)?);
        }
        Ok(())
    }

    /// Nanoseconds of the classifier, and of nothing.
    fn classify(&self, kernel: &mut Kernel) -> anyhow::Result<(f64, f64)> {
        let headers = TRACE_LEN as usize;
        kernel.check_live(&self.policy, &trace::headers(&self.policy, headers, 2))?;
        kernel.check_live(&self.policy, &trace::traffic(&self.policy, headers, 3))?;
        let frame = frame(OPEN_PORT, TCP_SYN);
        let (mut ours, mut peer) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            ours.push(kernel.time("probe", &frame, REPEAT)?.as_nanos() as f64);
            peer.push(kernel.time("probe_nothing", &frame, REPEAT)?.as_nanos() as f64);
        }
        Ok((median(ours), median(peer)))
    }

    /// Of its form in the kernel.
    fn bytes(&self) -> anyhow::Result<usize> {
        let compiled = compile(&self.policy, &ROOMY)?;
        let blob = match self.family {
            AddressFamily::V4 => &compiled.v4,
            AddressFamily::V6 => &compiled.v6,
        };
        Ok(blob.words.len() * 8)
    }

    /// Milliseconds of the compiler alone.
    fn compile(&self) -> anyhow::Result<f64> {
        let mut samples = Vec::new();
        for _ in 0..ROUNDS {
            let start = Instant::now();
            compile(&self.policy, &ROOMY)?;
            samples.push(milliseconds(start.elapsed()));
        }
        Ok(median(samples))
    }

    /// Milliseconds from the policy at hand until packets are judged by it: compiled, written, tried, switched over to. In
    /// turn with another of its kind, so that everything is new.
    fn swap(&self, style: Style, kernel: &mut Kernel) -> anyhow::Result<f64> {
        let other = sample::policy(style, self.family, self.rules, 2);
        let mut samples = Vec::new();
        for policy in [&other, &self.policy].into_iter().cycle().take(ROUNDS) {
            let start = Instant::now();
            kernel.apply(policy)?;
            samples.push(milliseconds(kernel.in_force_since().duration_since(start)));
        }
        Ok(median(samples))
    }
}

fn milliseconds(time: std::time::Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
