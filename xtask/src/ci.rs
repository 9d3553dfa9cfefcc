//! `cargo xtask ci`: everything that a change must pass.

use std::process::Command;

use anyhow::Context as _;

use crate::{cargo::cargo, progress, setup, shell, test, tidy};

const CARGO_DENY: &str = "0.20.2";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Leave out the tests, which `cargo xtask test` runs
    #[arg(long)]
    no_test: bool,
}

pub(crate) fn main(options: &Options) -> anyhow::Result<()> {
    setup::need_root("ci")?;
    setup::setup(setup::Scope::All)?;
    checks()?;
    if options.no_test { Ok(()) } else { test::everything(true) }
}

/// What needs no test to run.
fn checks() -> anyhow::Result<()> {
    progress::heading("Formatting");
    shell::run(cargo().args(["fmt", "--all", "--check"]))?;
    progress::heading("Lints");
    let mut clippy = cargo();
    clippy.args(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    shell::run(&mut clippy)?;
    progress::heading("Tidy");
    tidy::main(false)?;
    progress::heading("Licences, sources and banned crates");
    if shell::find("cargo-deny").is_none() {
        progress::say(&format!("  needs cargo-deny {CARGO_DENY} (cargo install, some minutes)"));
        let mut install = cargo();
        // Unoptimised: built in a third of the time, and it reads one dependency tree.
        install.args(["install", "cargo-deny", "--debug", "--locked", "--version", CARGO_DENY]);
        shell::run(&mut install).context("installing cargo-deny")?;
    }
    let mut deny = Command::new("cargo-deny");
    shell::run(deny.args(["--locked", "check", "bans", "licenses", "sources"]))
}
