//! Thousands of agents in one process, for `cargo xtask swarm` and `cargo xtask bench state`.
//!
//! Each has its own connection, key, certificate and session, as in the agent's program; their data paths enforce nothing.
//! `core SOCKET ADDRESS FOLDER COUNT` joins a core; `etcd ADDRESS FOLDER COUNT` does the same to etcd, with one watch on
//! one connection for each; `certificates FOLDER` makes what etcd and its clients need. Commands come by standard input,
//! one a line; each is answered with one line of JSON.

mod board;
mod etcd;
mod swarm;

use std::{
    env,
    io::{Write as _, stdin, stdout},
    path::PathBuf,
    process::ExitCode,
    str::FromStr,
};

use anyhow::{Context as _, bail};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::Level::ERROR.into())
        .with_env_var("CNSMO_LOG")
        .from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match run(env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "cnsmo-bench-fleet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    // Tasks need the runtime's timers.
    let _inside = runtime.enter();
    let mut side = match next::<String>(&mut arguments)?.as_str() {
        "certificates" => return etcd::write_certificates(&next::<PathBuf>(&mut arguments)?),
        "core" => Side::Core(swarm::Swarm::new(
            &next::<PathBuf>(&mut arguments)?,
            next(&mut arguments)?,
            next(&mut arguments)?,
            next(&mut arguments)?,
        )?),
        "etcd" => {
            let address: String = next(&mut arguments)?;
            let folder: PathBuf = next(&mut arguments)?;
            let count = next(&mut arguments)?;
            Side::Etcd(Box::new(runtime.block_on(etcd::Watchers::new(&address, &folder, count))?))
        }
        other => bail!("no side is named `{other}`"),
    };
    for command in stdin().lines() {
        let command = command?;
        let answer = runtime.block_on(side.carry_out(&command)).context(command)?;
        let mut out = stdout();
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

enum Side {
    Core(swarm::Swarm),
    Etcd(Box<etcd::Watchers>),
}

impl Side {
    async fn carry_out(&mut self, command: &str) -> anyhow::Result<serde_json::Value> {
        match (self, command) {
            (Self::Core(swarm), "enrol") => swarm.enrol().await,
            (Self::Core(swarm), "join") => swarm.join().await,
            (Self::Core(swarm), "push") => swarm.push().await,
            (Self::Core(swarm), "edit") => swarm.edit().await,
            (Self::Core(swarm), "mark") => Ok(swarm.mark()),
            (Self::Core(swarm), "returned") => swarm.returned().await,
            (Self::Core(swarm), "unreachable") => swarm.unreachable().await,
            (Self::Etcd(watchers), "join") => watchers.join().await,
            (Self::Etcd(watchers), "push") => watchers.push().await,
            _ => bail!("no such command"),
        }
    }
}

fn next<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    arguments: &mut impl Iterator<Item = String>,
) -> anyhow::Result<T> {
    let text = arguments.next().context("it is a part of `cargo xtask swarm`")?;
    text.parse().with_context(|| format!("argument `{text}`"))
}
