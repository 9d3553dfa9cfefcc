//! The message bus of a core, over its socket.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use super::super::Row;
use crate::{
    cargo::{self, cargo},
    netns::RunDir,
    process::Process,
    progress, shell,
};

const PROGRAM: &str = "cnsmo-bench-bus";
/// Until the core takes connections.
const START_MAX: std::time::Duration = std::time::Duration::from_secs(30);

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    progress::heading(&format!("Building cnsmo-core and {PROGRAM}, optimised"));
    let mut build = cargo();
    build.args(["build", "--release", "--package=cnsmo-core", "--bin=cnsmo-core"]);
    let built = cargo::build(build.arg(format!("--bin={PROGRAM}")))?;
    let (core, program) = (built.executable("cnsmo-core")?, built.executable(PROGRAM)?);
    progress::heading("Measuring the message bus");
    let folder = RunDir::new("bench-bus")?;
    let socket = folder.path().join("core.sock");
    let mut command = Command::new(core);
    command.arg("--state-dir").arg(folder.path().join("state"));
    command.args(["--listen", "127.0.0.1:0", "--socket"]).arg(&socket);
    let mut core = Process::spawn("cnsmo-core", &mut command, &folder.path().join("core.log"))?;
    core.wait_for("ready", START_MAX)?;
    let output = Command::new(program)
        .arg(&socket)
        .current_dir(shell::root())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {PROGRAM}"))?;
    ensure!(output.status.success(), "{PROGRAM} failed ({})", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("reading the rows of {PROGRAM}"))
}
