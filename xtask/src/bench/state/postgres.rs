//! The state on PostgreSQL, shared by cores, beside the state of one core in a file of its own.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use super::super::Row;
use crate::{
    cargo::{self, cargo},
    netns::RunDir,
    postgres::{Postgres, Sync},
    progress, shell,
};

const PROGRAM: &str = "cnsmo-bench-postgres";

/// Both engines wait for the same disk: that of the folder for temporary files.
pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    progress::heading(&format!("Building {PROGRAM}, optimised"));
    let mut build = cargo();
    build.args(["build", "--release", "--package", "cnsmo-core", "--bin", PROGRAM]);
    let program = cargo::build(&mut build)?.executable(PROGRAM)?;
    progress::heading("Measuring two cores on PostgreSQL");
    let folder = RunDir::new("bench-postgres")?;
    let server = Postgres::start(Sync::Disk)?;
    let output = Command::new(program)
        .args(["rows", &server.create_database()?])
        .arg(folder.path().join("state.db"))
        .current_dir(shell::root())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {PROGRAM}"))?;
    ensure!(output.status.success(), "{PROGRAM} failed ({})", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("reading the rows of {PROGRAM}"))
}
