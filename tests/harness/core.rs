//! The core as a process.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, ensure};

use crate::{Process, RunDir};

/// How long a start may take on a busy host.
const START_MAX: Duration = Duration::from_secs(30);

/// A core with its state in a folder of its own; both end with the value.
pub struct CoreProcess {
    process: Process,
    folder: RunDir,
}

impl CoreProcess {
    /// Starts one with an empty state.
    pub fn start(label: &str) -> anyhow::Result<Self> {
        let folder = RunDir::new(label)?;
        Ok(Self { process: spawn(folder.path())?, folder })
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill()
    }

    /// Starts it again with its state, after it ended.
    pub fn start_again(&mut self) -> anyhow::Result<()> {
        self.process = spawn(self.folder.path())?;
        Ok(())
    }

    /// Its unix socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("core.sock")
    }
}

fn spawn(folder: &Path) -> anyhow::Result<Process> {
    let mut command = Command::new(program("cnsmo-core")?);
    command
        .arg("--state-dir")
        .arg(folder.join("state"))
        .args(["--listen", "127.0.0.1:0", "--socket"])
        .arg(folder.join("core.sock"));
    let mut process = Process::spawn("cnsmo-core", &mut command, &folder.join("core.log"))?;
    process.wait_for("ready", START_MAX)?;
    Ok(process)
}

/// A program of this workspace, which Cargo puts next to the folder of the tests.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let test = env::current_exe().context("no path of this test")?;
    let target = test.ancestors().nth(2).context("the test is in no target folder")?;
    let program = target.join(name);
    ensure!(program.exists(), "{} is missing: run `cargo xtask test`", program.display());
    Ok(program)
}
