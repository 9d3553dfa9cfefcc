//! `cargo xtask swarm`: one core, and thousands of agents in one process, each with its own connection and certificate.
//!
//! Both share the machine's cores: what is measured is the whole path, the agents' half of it included.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use comfy_table::{Table, presets};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Deserialize;

use crate::{
    bench::{driver::Driver, median},
    cargo::{self, cargo},
    interrupt,
    netns::RunDir,
    process::{Process, pause},
    progress, usage,
};

const CORE: &str = "cnsmo-core";
/// Thousands of agents, in cnsmo-agent.
const AGENTS: &str = "cnsmo-bench-fleet";
/// The core loads its state and listens.
const START_MAX: Duration = Duration::from_secs(30);
/// The core ends all streams.
const STOP_MAX: Duration = Duration::from_secs(30);
/// Over which the core's processor time without any change is measured.
const IDLE: Duration = Duration::from_secs(10);
/// Of each kind of update.
const PUSHES: usize = 10;
const EDITS: usize = 100;
/// File descriptors of a process beside one for each agent.
const FILES_BESIDE: u64 = 1_000;
/// Heartbeats of a large fleet: death is noticed within a minute.
const HEARTBEAT: &str = "10s";
const LEASE: &str = "30s";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// How many; a core takes 20,000
    #[arg(long, value_name = "NUMBER", default_value_t = 10_000)]
    agents: usize,
}

/// Built programs.
#[derive(Clone)]
pub(crate) struct Programs {
    pub(crate) core: PathBuf,
    pub(crate) agents: PathBuf,
}

impl Programs {
    pub(crate) fn build() -> anyhow::Result<Self> {
        progress::heading(&format!("Building {CORE} and {AGENTS}, optimised"));
        let mut build = cargo();
        build.args(["build", "--release", "--package", "cnsmo-core", "--package", "cnsmo-agent"]);
        let built = cargo::build(build.args(["--bin", CORE, "--bin", AGENTS]))?;
        Ok(Self { core: built.executable(CORE)?, agents: built.executable(AGENTS)? })
    }
}

/// How long one update took, in milliseconds.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Push {
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
    /// Until the core knew that all enforce it; a peer has no such thing.
    #[serde(default)]
    pub(crate) acked_ms: f64,
    #[serde(default)]
    pub(crate) snapshots: usize,
}

#[derive(Deserialize)]
pub(crate) struct Took {
    pub(crate) seconds: f64,
}

#[derive(Deserialize)]
struct Edited {
    acked_ms: f64,
}

#[derive(Deserialize)]
struct Marked {}

#[derive(Deserialize)]
struct Returned {
    snapshots: usize,
}

/// What a restart of the core did to its agents.
pub(crate) struct Storm {
    /// From the moment when the core served again until the last agent had its answer.
    pub(crate) seconds: f64,
    pub(crate) snapshots: usize,
}

/// A core and its agents. Dropping it ends both and removes their files.
pub(crate) struct Swarm {
    // In this order: the agents end before their core.
    agents: Driver,
    core: Process,
    programs: Programs,
    listen: SocketAddr,
    dir: RunDir,
    count: usize,
    /// Of the core before anybody had joined, with the records of all that have enrolled and full caches.
    empty_bytes: u64,
}

impl Swarm {
    /// Starts a core, and the process of the agents, which have not enrolled yet.
    pub(crate) fn start(programs: Programs, count: usize) -> anyhow::Result<Self> {
        allow_files(count)?;
        let dir = RunDir::new("swarm")?;
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let core = start_core(&programs.core, listen, dir.path())?;
        let identities = dir.path().join("agents");
        fs::create_dir(&identities).with_context(|| format!("making {}", identities.display()))?;
        let mut command = Command::new(&programs.agents);
        command.arg("core").arg(dir.path().join("core.sock")).arg(listen.to_string());
        let agents = Driver::start(command.arg(identities).arg(count.to_string()))?;
        Ok(Self { agents, core, programs, listen, dir, count, empty_bytes: 0 })
    }

    pub(crate) fn enrol(&mut self) -> anyhow::Result<Took> {
        let took = self.agents.ask("enrol")?;
        self.empty_bytes = memory(self.core.id())?;
        Ok(took)
    }

    pub(crate) fn join(&mut self) -> anyhow::Result<Took> {
        self.agents.ask("join")
    }

    pub(crate) fn push(&mut self) -> anyhow::Result<Push> {
        let push: Push = self.agents.ask("push")?;
        // The first of all is one.
        ensure!(push.snapshots == 0 || push.snapshots == self.count, "agents got snapshots");
        Ok(push)
    }

    /// Milliseconds until one agent has acknowledged what concerns it alone.
    pub(crate) fn edit(&mut self) -> anyhow::Result<f64> {
        Ok(self.agents.ask::<Edited>("edit")?.acked_ms)
    }

    /// Kills the core, which is no different from its machine's power failure, and starts it again.
    pub(crate) fn storm(&mut self) -> anyhow::Result<Storm> {
        let Marked {} = self.agents.ask("mark")?;
        self.core.kill()?;
        self.core = start_core(&self.programs.core, self.listen, self.dir.path())?;
        let start = Instant::now();
        let returned: Returned = self.agents.ask("returned")?;
        Ok(Storm { seconds: start.elapsed().as_secs_f64(), snapshots: returned.snapshots })
    }

    /// What the core's memory has grown by for each agent since it joined, in bytes.
    pub(crate) fn memory_per_agent(&self) -> anyhow::Result<f64> {
        let grown = memory(self.core.id())?.saturating_sub(self.empty_bytes);
        Ok(grown as f64 / self.count as f64)
    }

    /// Share of one processor that the core takes while nothing changes.
    fn idle_share(&self) -> anyhow::Result<f64> {
        let (start, before) = (Instant::now(), usage::processor_time(self.core.id())?);
        pause(IDLE);
        let used = usage::processor_time(self.core.id())? - before;
        Ok(used.as_secs_f64() / start.elapsed().as_secs_f64())
    }

    fn stop(mut self) -> anyhow::Result<()> {
        self.core.terminate(STOP_MAX)?;
        Ok(())
    }
}

pub(crate) fn main(options: &Options) -> anyhow::Result<()> {
    let count = options.agents;
    let programs = Programs::build()?;
    progress::heading(&format!("{count} agents on one core"));
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_header(["what", "", "unit"]);
    let mut row = |what: &str, value: f64, unit: &str| {
        table.add_row([what.to_owned(), format!("{value:.2}"), unit.to_owned()]);
    };
    let mut swarm = Swarm::start(programs, count)?;
    let took = progress::step("enrolling", || swarm.enrol())?;
    row("enrolled", count as f64 / took.seconds, "1/s");
    let took = progress::step("joining", || swarm.join())?;
    row("joined", count as f64 / took.seconds, "1/s");
    let pushes = progress::step("updates for all", || {
        (0..PUSHES)
            .map(|_| interrupt::check().and_then(|()| swarm.push()))
            .collect::<Result<Vec<_>, _>>()
    })?;
    let of = |value: fn(&Push) -> f64| median(&pushes.iter().map(value).collect::<Vec<_>>());
    row("update of all received, p50", of(|push| push.p50_ms), "ms");
    row("update of all received, p99", of(|push| push.p99_ms), "ms");
    row("update of all received by the last", of(|push| push.max_ms), "ms");
    row("update of all acknowledged by the last", of(|push| push.acked_ms), "ms");
    let mut edits = progress::step("updates for one", || {
        (0..EDITS)
            .map(|_| interrupt::check().and_then(|()| swarm.edit()))
            .collect::<Result<Vec<_>, _>>()
    })?;
    row("update of one acknowledged, p50", median(&edits), "ms");
    row("update of one acknowledged, p99", percentile_99(&mut edits), "ms");
    let idle = progress::step("nothing", || swarm.idle_share())?;
    row("core while nothing changes", idle * 100.0, "% of a CPU");
    row("core's memory per agent that joined", swarm.memory_per_agent()? / 1_000.0, "kB");
    row("core's memory in all", memory(swarm.core.id())? as f64 / 1e6, "MB");
    let storm = progress::step("restart of the core", || swarm.storm())?;
    row("all back after a restart of the core", storm.seconds, "s");
    row("snapshots sent for that", storm.snapshots as f64, "");
    swarm.stop()?;
    println!("{table}");
    Ok(())
}

pub(crate) fn percentile_99(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() * 99 / 100).copied().unwrap_or(f64::NAN)
}

/// Resident memory in bytes.
pub(crate) fn memory(process: u32) -> anyhow::Result<u64> {
    Ok(usage::memory(process)?.resident)
}

/// Each agent is a file descriptor in both processes, which inherit the limit.
pub(crate) fn allow_files(agents: usize) -> anyhow::Result<()> {
    let needed = u64::try_from(agents)? + FILES_BESIDE;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft >= needed {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, needed, hard.max(needed))
        .with_context(|| format!("{needed} open files are not allowed; run as root"))
}

/// Free a moment ago.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no port is free")?;
    Ok(listener.local_addr()?.port())
}

fn start_core(program: &Path, listen: SocketAddr, dir: &Path) -> anyhow::Result<Process> {
    let mut command = Command::new(program);
    command
        .args(["--listen", &listen.to_string(), "--heartbeat", HEARTBEAT, "--lease", LEASE])
        .arg("--state-dir")
        .arg(dir.join("core"))
        .arg("--socket")
        .arg(dir.join("core.sock"))
        .env("CNSMO_LOG", "cnsmo_core=info,warn");
    let mut core = Process::spawn("cnsmo-core", &mut command, &dir.join("core.log"))?;
    core.wait_for("ready", START_MAX)?;
    Ok(core)
}
