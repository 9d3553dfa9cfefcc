//! Operators who may not do everything, and identities that end at once.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use super::{REPORT_LIMIT, manifest, policy};
use crate::{
    checks::Report,
    fleet::{CORE_PORT, Fleet, To},
    interrupt, shell,
};

/// A viewer works from outside, over TLS, until it is banned; the audit has it all.
pub(crate) fn operators(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let eve = Operator::log_in(fleet, "eve", "viewer")?;
    let (ok, _) = eve.run(&["get", "nodes"])?;
    report.add("a viewer on another machine reads", "allowed", word(ok));
    let file = manifest(fleet, "eve.yaml", &policy::probe(true))?;
    let (ok, said) = eve.run(&["apply", "-f", &file])?;
    let named = said.contains("viewer");
    let seen = if !ok && named { "refused, naming the role" } else { &said };
    report.add("a viewer applies a policy", "refused, naming the role", seen);

    let mut watch = eve.command(&["watch", "nodes"])?;
    let log = fleet.control().log("watch-eve");
    let mut watch = crate::process::Process::spawn("cnsmo watch", &mut watch, &log)?;
    watch.wait_for("web1", REPORT_LIMIT)?;
    fleet.cli_ok(&["identity", "revoke", "operator/eve", "--ban"])?;
    let cut = Instant::now();
    let ended = interrupt::wait_until(REPORT_LIMIT, || Ok(!watch.is_running()?))?;
    let within = if ended { cut.elapsed() } else { Duration::MAX };
    let seen = if within <= CUT_LIMIT { "cut within 1 s" } else { "lives on" };
    report.add("her watch when she is banned", "cut within 1 s", seen);
    let (ok, _) = eve.run(&["get", "nodes"])?;
    report.add("she reads after that", "refused", word(ok));
    let said = fleet.cli_ok(&["audit", "--verify"])?;
    let seen = if said.contains("each follows from the one before") { "a chain" } else { &said };
    report.add("the audit", "a chain", seen);
    Ok(())
}

/// A ban holds within this time.
const CUT_LIMIT: Duration = Duration::from_secs(1);

fn word(ok: bool) -> &'static str {
    if ok { "allowed" } else { "refused" }
}

/// Who uses `cnsmo` at the client's host, outside of the core's machine.
pub(super) struct Operator<'a> {
    fleet: &'a Fleet,
    dir: String,
    core: String,
}

impl<'a> Operator<'a> {
    pub(super) fn log_in(fleet: &'a Fleet, name: &str, role: &str) -> anyhow::Result<Self> {
        let token = fleet.control().dir().join(format!("{name}.token")).display().to_string();
        fleet.cli_ok(&["token", "create", "--role", role, "--name", name, "--output", &token])?;
        let operator = Self::again(fleet, name)?;
        let (ok, said) = operator.run(&["login", "--name", name, &token])?;
        ensure!(ok, "cnsmo login failed: {said}");
        Ok(operator)
    }

    /// One that has logged in.
    pub(super) fn again(fleet: &'a Fleet, name: &str) -> anyhow::Result<Self> {
        let core = fleet.socket_address(To::Underlay("core"), CORE_PORT)?.to_string();
        Ok(Self { fleet, dir: fleet.control().dir().join(name).display().to_string(), core })
    }

    fn command(&self, arguments: &[&str]) -> anyhow::Result<std::process::Command> {
        let cli = &self.fleet.control().programs.cli;
        let mut command = self.fleet.netns("client")?.command(cli)?;
        command.args(["--core", &self.core, "--identity", &self.dir]).args(arguments);
        Ok(command)
    }

    /// Whether it succeeded, and what it said.
    pub(super) fn run(&self, arguments: &[&str]) -> anyhow::Result<(bool, String)> {
        let output = shell::capture(&mut self.command(arguments)?).context("running cnsmo")?;
        Ok((output.status.success(), crate::fleet::said(&output)))
    }
}
