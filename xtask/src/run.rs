//! `cargo xtask run`: from a bare machine to a firewalled fleet that was seen to work.

use std::{os::unix::process::CommandExt as _, process::Command, time::Duration};

use anyhow::{Context as _, bail};
use clap::Subcommand;

use crate::{
    Json,
    cargo::{self, cargo},
    checks::{self, Report, State},
    fleet::{Fleet, Programs},
    interrupt, netns,
    process::pause,
    progress, scenarios, setup, shell,
};

const EXAMPLE: &str = "examples/three-tier.yaml";

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    program: Option<Program>,
    /// Stop after the checks; success only if every one holds
    #[arg(long)]
    exit: bool,
    #[command(flatten)]
    json: Json,
}

#[derive(Subcommand)]
enum Program {
    /// Build the core and run it on this machine
    Core {
        /// Passed on to cnsmo-core
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Build the agent and run it on this machine, whose traffic it will filter
    Agent {
        /// Passed on to cnsmo-agent
        #[arg(last = true)]
        arguments: Vec<String>,
    },
}

pub(crate) fn main(options: &Options) -> anyhow::Result<()> {
    setup::need_root("run")?;
    setup::setup(setup::Scope::Run)?;
    match &options.program {
        Some(Program::Core { arguments }) => replace_by("cnsmo-core", arguments),
        Some(Program::Agent { arguments }) => replace_by("cnsmo-agent", arguments),
        None => fleet(options),
    }
}

/// Builds a program and becomes it.
fn replace_by(package: &str, arguments: &[String]) -> anyhow::Result<()> {
    let built = build()?;
    let error = Command::new(built.executable(package)?).args(arguments).exec();
    Err(error).with_context(|| format!("starting {package}"))
}

/// All programs at once also for one of them: with other packages cargo would choose other features, and build
/// everything again.
fn build() -> anyhow::Result<cargo::Built> {
    cargo::build(cargo().args([
        "build",
        "--package=cnsmo-core",
        "--package=cnsmo-agent",
        "--package=cnsmo-cli",
    ]))
}

fn fleet(options: &Options) -> anyhow::Result<()> {
    let swept = netns::sweep();
    if swept > 0 {
        progress::say(&format!("  ok    removed {swept} leftovers of runs that were killed"));
    }
    progress::heading("Building core, agent and command line");
    let built = build()?;
    progress::heading("Starting the fleet");
    let programs = Programs::of(&built)?;
    let mut fleet = progress::step("router, two sites, 4 VMs, servers", || Fleet::new(programs))?;
    let mut report = Report::default();
    let result = prove(&mut fleet, &mut report, options.exit);
    if result.is_err() || !report.all_hold() {
        let logs = cargo::metadata()?.target_directory.join("run-logs");
        fleet.keep_logs(&logs)?;
        progress::say(&format!("\nlogs of core and agents: {}", logs.display()));
    }
    if let Some(path) = &options.json.json {
        shell::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    result?;
    println!("\n{}", report.summary());
    if !options.exit {
        stay(&fleet)?;
    }
    if !report.all_hold() {
        bail!("not every check holds");
    }
    Ok(())
}

/// All checks, in an order in which each can mean something.
fn prove(fleet: &mut Fleet, report: &mut Report, detach: bool) -> anyhow::Result<()> {
    progress::step("core", || fleet.start_core())?;
    progress::step("4 agents, until the core calls them READY", || {
        fleet.start_agents()?;
        fleet.wait_ready()
    })?;
    progress::heading("Without policy everything is open");
    checks::judge(fleet, State::Open, report)?;
    progress::heading(&format!("cnsmo apply -f {EXAMPLE} --wait"));
    let example = shell::root().join(EXAMPLE);
    scenarios::apply(fleet, &example.display().to_string())?;
    checks::judge(fleet, State::Filtered, report)?;
    progress::heading("Changing policy");
    scenarios::update(fleet, report)?;
    scenarios::counters(fleet, report)?;
    progress::heading("Refusing bad policy");
    scenarios::refusals(fleet, report)?;
    progress::heading("SIGKILL to agents under traffic");
    scenarios::agent_crash(fleet, report)?;
    progress::heading("SIGKILL to the core under traffic");
    scenarios::core_crash(fleet, report)?;
    scenarios::tidy(fleet)?;
    if detach {
        progress::heading("Taking the data path away");
        scenarios::detach(fleet, report)?;
    }
    Ok(())
}

/// Shows how to look around, and waits for Ctrl-C.
fn stay(fleet: &Fleet) -> anyhow::Result<()> {
    let cli = fleet.cli_hint();
    let client = fleet.host("client")?.netns.name().to_owned();
    println!(
        "\nThe fleet runs until Ctrl-C. In another root shell:\n\
         \x20 {cli} nodes\n\
         \x20 {cli} get fw\n\
         \x20 {cli} apply -f {EXAMPLE} --wait\n\
         \x20 nsenter --net=/run/netns/{client} curl http://10.77.1.11/      # as a client outside\n\
         \x20 ls {dir}/*.log\n\
         Hosts: web1 10.77.1.11, bastion 10.77.1.5, web2 10.77.2.11, db1 10.77.2.21, client 10.77.9.9;\n\
         each also as fd77:<site>::<host>.",
        dir = fleet.dir().display(),
    );
    while !interrupt::asked() {
        pause(Duration::from_millis(100));
    }
    println!("\nremoving the fleet");
    Ok(())
}
