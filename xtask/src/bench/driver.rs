//! Programs that run our code to be measured: xtask itself knows none of it.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use super::Row;
use crate::{
    cargo::{self, cargo},
    process::pause,
    progress, shell,
};

/// To remove what it made.
const STOP_MAX: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// Builds one of them.
pub(crate) fn build(program: &str) -> anyhow::Result<PathBuf> {
    progress::heading(&format!("Building {program}, optimised"));
    let mut build = cargo();
    build.args(["build", "--release", "--package", "cnsmo-agent", "--bin", program]);
    cargo::build(&mut build)?.executable(program)
}

/// Has one of them measure and print rows.
pub(super) fn rows(program: &str, arguments: &[&str]) -> anyhow::Result<Vec<Row>> {
    let path = build(program)?;
    progress::heading(&format!("Measuring with {program}"));
    let output = Command::new(path)
        .args(arguments)
        .current_dir(shell::root())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {program}"))?;
    ensure!(output.status.success(), "{program} failed ({})", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("reading the rows of {program}"))
}

/// One that runs, and talks in lines. It removes what it made when its input is closed, which dropping this does.
pub(crate) struct Driver {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Driver {
    pub(crate) fn start(command: &mut Command) -> anyhow::Result<Self> {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("a program without output")?);
        Ok(Self { child, input, output })
    }

    pub(crate) fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("a program without input")?;
        writeln!(input, "{line}").with_context(|| format!("telling `{line}`"))
    }

    pub(crate) fn hear(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let length = self.output.read_line(&mut line)?;
        ensure!(length > 0, "the program has ended");
        Ok(line.trim_end().to_owned())
    }

    /// Has a command carried out and returns the answer.
    pub(crate) fn ask<T: serde::de::DeserializeOwned>(
        &mut self,
        command: &str,
    ) -> anyhow::Result<T> {
        self.tell(command)?;
        let answer = self.hear().with_context(|| format!("`{command}`"))?;
        serde_json::from_str(&answer)
            .with_context(|| format!("the answer to `{command}`: {answer}"))
    }

    pub(super) fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let said = self.hear()?;
        ensure!(said == "ready", "the program said `{said}` instead of `ready`");
        Ok(())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.input = None;
        let end = Instant::now() + STOP_MAX;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > end {
                let _ = self.child.kill();
            }
            pause(POLL);
        }
    }
}
