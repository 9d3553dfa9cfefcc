//! `cargo xtask bench fw`: the data path and the compiler of the firewall, by a program that runs them.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use super::{Row, driver};
use crate::{progress, shell};

const PROGRAM: &str = "cnsmo-bench-fw";

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    let program = driver::build(PROGRAM)?;
    progress::heading(&format!("Measuring with {PROGRAM}"));
    let output = Command::new(program)
        .arg("--json")
        .current_dir(shell::root())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {PROGRAM}"))?;
    ensure!(output.status.success(), "{PROGRAM} failed ({})", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("reading the rows of {PROGRAM}"))
}
