//! `cargo xtask ci`: everything that a change must pass.

use std::process::Command;

use anyhow::Context as _;

use crate::{cargo::cargo, progress, setup, shell, test, tidy};

const CARGO_DENY: &str = "0.20.2";

pub(crate) fn main() -> anyhow::Result<()> {
    setup::need_root("ci")?;
    setup::setup(setup::Scope::All)?;
    checks()?;
    test::everything(true)
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
        install.args(["install", "cargo-deny", "--locked", "--version", CARGO_DENY]);
        // Without gix's and the advisory database's features it would still build them: all are defaults.
        shell::run(&mut install).context("installing cargo-deny")?;
    }
    let mut deny = Command::new("cargo-deny");
    shell::run(deny.args(["--locked", "check", "bans", "licenses", "sources"]))
}
