//! Durable puts: a core beside an etcd, both over gRPC on a unix socket, each with its data on the same disk.

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use crate::{
    bench::{Better, Row},
    cargo::{self, cargo},
    interrupt,
    netns::RunDir,
    process::Process,
    progress, shell,
    swarm::free_port,
};

const PROGRAM: &str = "cnsmo-bench-state";
const ROUNDS: usize = 5;
const SECONDS: &str = "3";
const START_MAX: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
struct Measured {
    puts_per_second: f64,
}

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    let etcd = shell::find("etcd").context("etcd is not installed")?;
    progress::heading("Building cnsmo-core, optimised");
    let mut build = cargo();
    build.args(["build", "--release", "--package", "cnsmo-core"]);
    build.args(["--bin", "cnsmo-core", "--bin", PROGRAM]);
    let built = cargo::build(&mut build)?;
    let (core, load) = (built.executable("cnsmo-core")?, built.executable(PROGRAM)?);
    let folder = RunDir::new("bench-store")?;
    let (_core, ours) = start_core(&core, &folder)?;
    let (_etcd, peer) = start_etcd(&etcd, &folder)?;
    let mut rows = Vec::new();
    for writers in ["64", "1"] {
        progress::heading(&format!("Durable puts of 256 bytes, {writers} at a time"));
        let run = |what: &str, socket: &Path| put(&load, what, socket, writers);
        // Caches, and files that grow for the first time.
        run("core", &ours)?;
        run("etcd", &peer)?;
        let mut puts = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            interrupt::check()?;
            puts.0.push(run("core", &ours)?);
            puts.1.push(run("etcd", &peer)?);
        }
        let id = format!("state/put-{writers}-vs-etcd");
        rows.push(Row::of(&id, ("puts/s", Better::Higher), &puts.0, ("etcd", &puts.1))?);
    }
    Ok(rows)
}

fn start_core(program: &Path, folder: &RunDir) -> anyhow::Result<(Process, PathBuf)> {
    let socket = folder.path().join("core.sock");
    let mut command = Command::new(program);
    command.arg("--state-dir").arg(folder.path().join("core")).arg("--socket").arg(&socket);
    command.args(["--listen", &format!("{}:0", Ipv4Addr::LOCALHOST)]);
    let process = Process::spawn("cnsmo-core", &mut command, &folder.path().join("core.log"))?;
    wait(process, socket)
}

fn start_etcd(program: &Path, folder: &RunDir) -> anyhow::Result<(Process, PathBuf)> {
    let data = folder.path().join("etcd");
    fs::create_dir(&data)?;
    // The name of a socket must look like an address to etcd; it is relative to the folder.
    let name = "localhost:1";
    let url = format!("unix://{name}");
    let peer = format!("http://{}:{}", Ipv4Addr::LOCALHOST, free_port()?);
    let mut command = Command::new(program);
    command
        .current_dir(folder.path())
        .args(["--name", "bench", "--data-dir"])
        .arg(&data)
        .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("bench={peer}"), "--log-level", "warn"]);
    let process = Process::spawn("etcd", &mut command, &folder.path().join("etcd.log"))?;
    wait(process, folder.path().join(name))
}

fn wait(mut process: Process, socket: PathBuf) -> anyhow::Result<(Process, PathBuf)> {
    let up = interrupt::wait_until(START_MAX, || Ok(UnixStream::connect(&socket).is_ok()))?;
    ensure!(up && process.is_running()?, "no answer at {}\n{}", socket.display(), process.tail());
    Ok((process, socket))
}

fn put(program: &Path, what: &str, socket: &Path, writers: &str) -> anyhow::Result<f64> {
    let output = Command::new(program)
        .arg(what)
        .arg(socket)
        .args(["--writers", writers, "--seconds", SECONDS])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {PROGRAM}"))?;
    ensure!(output.status.success(), "{PROGRAM} {what} failed ({})", output.status);
    let measured: Measured = serde_json::from_slice(&output.stdout)?;
    Ok(measured.puts_per_second)
}
