//! Agents of one core, beside watchers of one etcd: each has its own connection with mutual TLS on both sides.
//!
//! An update is durable before it is sent, on both sides. Ours is acknowledged too, which etcd's watch does not know.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, ensure};

use crate::{
    bench::{Better, LIMIT, Row, driver::Driver, median},
    interrupt,
    netns::RunDir,
    process::Process,
    progress, shell,
    swarm::{Programs, Push, Swarm, Took, allow_files, free_port, memory, percentile_99},
};

const ROUNDS: usize = 9;
/// Before anything is timed: caches, and connections that were made in haste.
const WARM_UP: usize = 2;
const EDITS: usize = 300;
const LARGEST: usize = 10_000;
const START_MAX: Duration = Duration::from_secs(30);

// What the project promises for a quiet machine with two processors.
const ACKED_MAX_MS: f64 = 300.0;
const RETURNED_MAX_SECONDS: f64 = 8.0;
const EDIT_MAX_MS: f64 = 5.0;

const MILLISECONDS: (&str, Better) = ("ms", Better::Lower);
const SECONDS: (&str, Better) = ("s", Better::Lower);
const BYTES: (&str, Better) = ("B", Better::Lower);

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    let programs = Programs::build()?;
    let etcd = shell::find("etcd").context("etcd is not installed")?;
    let mut rows = Vec::new();
    for (count, label) in [(1_000, "1k"), (5_000, "5k")] {
        progress::heading(&format!("{count} agents beside {count} watchers of etcd"));
        rows.extend(beside_etcd(&programs, &etcd, count, label)?);
    }
    progress::heading(&format!("{LARGEST} agents"));
    rows.push(largest(&programs)?);
    Ok(rows)
}

/// One update of all, on both sides in turn.
fn beside_etcd(
    programs: &Programs,
    etcd: &Path,
    count: usize,
    label: &str,
) -> anyhow::Result<Vec<Row>> {
    let mut ours = joined(programs, count)?;
    let mut peer = Etcd::start(etcd, programs, count)?;
    for _ in 0..WARM_UP {
        ours.push()?;
        peer.push()?;
    }
    let mut fanout = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        interrupt::check()?;
        fanout.0.push(ours.push()?.p99_ms);
        fanout.1.push(peer.push()?.p99_ms);
    }
    let name = format!("state/fanout-{label}-vs-etcd");
    let mut rows = vec![Row::of(&name, MILLISECONDS, &fanout.0, ("etcd", &fanout.1))?];
    if label == "1k" {
        return Ok(rows);
    }
    let memory = (ours.memory_per_agent()?, peer.memory_per_watcher()?);
    rows.push(Row::of("state/agent-memory-vs-etcd", BYTES, &[memory.0], ("etcd", &[memory.1]))?);
    drop(peer);
    ours.edit()?;
    let mut edits = (0..EDITS).map(|_| ours.edit()).collect::<anyhow::Result<Vec<_>>>()?;
    let edit = percentile_99(&mut edits);
    rows.push(Row::of("state/edit-1-of-5k", MILLISECONDS, &[edit], (LIMIT, &[EDIT_MAX_MS]))?);
    let storm = ours.storm()?;
    ensure!(storm.snapshots == 0, "{} agents got a snapshot after a restart", storm.snapshots);
    let limit = (LIMIT, &[RETURNED_MAX_SECONDS][..]);
    rows.push(Row::of("state/reconnect-5k", SECONDS, &[storm.seconds], limit)?);
    Ok(rows)
}

fn largest(programs: &Programs) -> anyhow::Result<Row> {
    let mut swarm = joined(programs, LARGEST)?;
    for _ in 0..WARM_UP {
        swarm.push()?;
    }
    let acked =
        (0..ROUNDS).map(|_| Ok(swarm.push()?.acked_ms)).collect::<anyhow::Result<Vec<_>>>()?;
    let acked = median(&acked);
    Row::of("state/fleet-10k-ack", MILLISECONDS, &[acked], (LIMIT, &[ACKED_MAX_MS]))
}

fn joined(programs: &Programs, count: usize) -> anyhow::Result<Swarm> {
    let mut swarm = Swarm::start(programs.clone(), count)?;
    progress::step("enrolling", || swarm.enrol())?;
    progress::step("joining", || swarm.join())?;
    Ok(swarm)
}

/// A server with its state in a folder of its own, and watchers.
struct Etcd {
    // In this order: the watchers end before their server.
    watchers: Driver,
    server: Process,
    count: usize,
    /// Of the server before anybody watched.
    empty_bytes: u64,
    _dir: RunDir,
}

impl Etcd {
    fn start(program: &Path, programs: &Programs, count: usize) -> anyhow::Result<Self> {
        allow_files(count)?;
        let dir = RunDir::new("etcd")?;
        shell::run(Command::new(&programs.agents).arg("certificates").arg(dir.path()))?;
        let client = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let peer = format!("http://{}:{}", Ipv4Addr::LOCALHOST, free_port()?);
        let file = |name: &str| dir.path().join(name).display().to_string();
        let data = dir.path().join("data");
        fs::create_dir(&data)?;
        let url = format!("https://{client}");
        let mut command = Command::new(program);
        command
            .args(["--name", "bench", "--data-dir", &data.display().to_string()])
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("bench={peer}"), "--log-level", "warn"])
            .args(["--cert-file", &file("server.crt"), "--key-file", &file("server.key")])
            .args(["--client-cert-auth", "--trusted-ca-file", &file("ca.crt")]);
        let mut server = Process::spawn("etcd", &mut command, &dir.path().join("etcd.log"))?;
        let up =
            interrupt::wait_until(START_MAX, || Ok(std::net::TcpStream::connect(client).is_ok()))?;
        ensure!(up && server.is_running()?, "etcd does not listen\n{}", server.tail());
        let empty_bytes = memory(server.id())?;
        let mut command = Command::new(&programs.agents);
        command.arg("etcd").arg(client.to_string()).arg(dir.path()).arg(count.to_string());
        let mut watchers = Driver::start(&mut command)?;
        progress::step("watching etcd", || watchers.ask::<Took>("join"))?;
        Ok(Self { watchers, server, count, empty_bytes, _dir: dir })
    }

    fn push(&mut self) -> anyhow::Result<Push> {
        self.watchers.ask("push")
    }

    fn memory_per_watcher(&self) -> anyhow::Result<f64> {
        let grown = memory(self.server.id())?.saturating_sub(self.empty_bytes);
        Ok(grown as f64 / self.count as f64)
    }
}
