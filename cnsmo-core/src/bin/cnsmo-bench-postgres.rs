//! The store on PostgreSQL beside the one on SQLite, for `cargo xtask bench state`: prints rows.
//!
//! Each core is a process of its own, this program again: `rows URL FILE`, `put STORE`, `pace URL`.

use std::{
    env,
    io::Write as _,
    process::{Command, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail, ensure};
use cnsmo_core::store::{Op, PostgresConfig, Store, StoreConfig, Txn};

const ROUNDS: usize = 5;
/// Of each run: long against the first commits, short enough that a round is under one load of the machine.
const RUN: Duration = Duration::from_secs(2);
const WRITERS: usize = 64;
const KEYS: u64 = 10_000;
const VALUE_BYTES: usize = 256;
/// Between puts of the paced writer: 200 a second.
const PACE: Duration = Duration::from_millis(5);
/// Of the watch, of the design.
const TARGET_P50_MS: f64 = 3.0;
const TARGET_P99_MS: f64 = 10.0;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        ["rows", url, file] => rows(url, file).await,
        ["put", store] => put(store).await,
        ["pace", url] => pace(url).await,
        _ => Err(anyhow::anyhow!("rows URL FILE | put STORE | pace URL")),
    };
    match done {
        Ok(text) => {
            let _ = writeln!(std::io::stdout(), "{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "cnsmo-bench-postgres: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Each round one after the other, so that both sides are under one load of the machine.
async fn rows(url: &str, file: &str) -> anyhow::Result<String> {
    let (mut shared, mut alone, mut p50, mut p99) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let first = start(&["put", url])?;
        let second = start(&["put", url])?;
        shared.push(number(first)? + number(second)?);
        alone.push(number(start(&["put", file])?)?);
        let (middle, slow) = watch(url).await?;
        p50.push(middle);
        p99.push(slow);
    }
    let target = |of: f64| vec![of; ROUNDS];
    let rows = [
        row("state/pg-put-vs-sqlite", ("puts/s", "higher"), &shared, ("SQLite, one core", &alone)),
        row("state/pg-watch-p50", ("ms", "lower"), &p50, ("limit", &target(TARGET_P50_MS))),
        row("state/pg-watch-p99", ("ms", "lower"), &p99, ("limit", &target(TARGET_P99_MS))),
    ];
    Ok(serde_json::to_string(&rows)?)
}

/// As the bench of xtask has them: medians of rounds, and the median of their ratios.
fn row(
    id: &str,
    (unit, better): (&str, &str),
    ours: &[f64],
    (peer_name, peer): (&str, &[f64]),
) -> serde_json::Value {
    let ratios: Vec<_> = ours.iter().zip(peer).map(|(ours, peer)| ours / peer).collect();
    serde_json::json!({
        "id": id, "unit": unit, "ours": quantile(ours, 0.5), "peer_name": peer_name,
        "peer": quantile(peer, 0.5), "ratio": quantile(&ratios, 0.5), "better": better,
        "rounds": ours.len(),
    })
}

fn quantile(samples: &[f64], at: f64) -> f64 {
    let mut samples = samples.to_vec();
    samples.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    let index = (samples.len() as f64 * at) as usize;
    samples.get(index).copied().unwrap_or(f64::NAN)
}

/// Another core.
fn start(arguments: &[&str]) -> anyhow::Result<std::process::Child> {
    let program = env::current_exe()?;
    Command::new(program)
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .context("starting another core")
}

fn number(core: std::process::Child) -> anyhow::Result<f64> {
    let output = core.wait_with_output()?;
    ensure!(output.status.success(), "a core failed ({})", output.status);
    String::from_utf8(output.stdout)?.trim().parse().context("a core said no number")
}

async fn open(store: &str) -> anyhow::Result<Store> {
    let config = if store.starts_with("postgres") {
        StoreConfig::postgres(PostgresConfig::new(store, None)?)
    } else {
        StoreConfig::sqlite(store)
    };
    Ok(Store::open(&config).await?)
}

/// Puts per second of this core, by writers that each wait for their last put to be durable.
async fn put(store: &str) -> anyhow::Result<String> {
    let store = open(store).await?;
    let next = Arc::new(AtomicU64::new(0));
    let begin = Instant::now();
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..WRITERS {
        let (store, next) = (store.clone(), next.clone());
        writers.spawn(async move {
            while begin.elapsed() < RUN {
                // Every key in turn, in no order (Fibonacci hashing).
                let key = next.fetch_add(1, Ordering::Relaxed).wrapping_mul(2_654_435_761) % KEYS;
                store.commit(stamped(format!("bench/{key:06}"))).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended??;
    }
    let seconds = begin.elapsed().as_secs_f64();
    store.close().await;
    Ok((next.load(Ordering::Relaxed) as f64 / seconds).to_string())
}

/// One writer at a fixed pace.
async fn pace(url: &str) -> anyhow::Result<String> {
    let store = open(url).await?;
    let begin = Instant::now();
    let mut ticks = tokio::time::interval(PACE);
    let mut puts = 0;
    while begin.elapsed() < RUN {
        ticks.tick().await;
        store.commit(stamped(format!("paced/{:03}", puts % 100))).await?;
        puts += 1;
    }
    store.close().await;
    Ok(puts.to_string())
}

/// Milliseconds from the call of a put in another core to its event in this one: the middle, and 99 of 100.
async fn watch(url: &str) -> anyhow::Result<(f64, f64)> {
    let store = open(url).await?;
    let mut feed = store.follow(store.revision());
    let mut last = store.revision();
    let writer = tokio::task::spawn_blocking({
        let core = start(&["pace", url])?;
        move || number(core)
    });
    let mut delays = Vec::new();
    let end = tokio::time::sleep(RUN * 2);
    tokio::pin!(end);
    loop {
        let commits = tokio::select! {
            commits = feed.next() => commits?,
            () = &mut end => break,
        };
        let now = now_ns();
        for commit in &commits {
            if commit.revision != last + 1 {
                bail!("revision {} after {last}", commit.revision);
            }
            last = commit.revision;
            for event in &commit.events {
                let stamp = event.entry.value.first_chunk().context("a value without a stamp")?;
                delays.push((now.saturating_sub(u64::from_le_bytes(*stamp))) as f64 / 1e6);
            }
        }
    }
    let puts = writer.await??;
    ensure!(delays.len() as f64 >= puts, "{} of {puts} puts were seen", delays.len());
    store.close().await;
    Ok((quantile(&delays, 0.5), quantile(&delays, 0.99)))
}

fn stamped(key: String) -> Txn {
    let mut value = vec![b'x'; VALUE_BYTES];
    value[..8].copy_from_slice(&now_ns().to_le_bytes());
    let put = Op::Put { key, value: value.into(), content_type: String::new(), lease: 0 };
    Txn { success: vec![put], ..Txn::default() }
}

/// The wall clock: all processes of a machine share it.
fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
