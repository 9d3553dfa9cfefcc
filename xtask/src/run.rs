//! `cargo xtask run`: from a bare machine to a private, filtered and balanced fleet that was seen to work.

use std::{os::unix::process::CommandExt as _, process::Command, time::Duration};

use anyhow::{Context as _, bail};
use clap::Subcommand;

use crate::{
    Json,
    cargo::{self, cargo},
    checks::{self, Report, State},
    fleet::{Fleet, GATEWAY, Programs, vms},
    interrupt, netns,
    process::pause,
    progress, scenarios, setup, shell,
};

const EXAMPLE: &str = "examples/three-tier.yaml";
/// The VM that joins when the others are at work.
const LATE: &str = "web3";

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
pub(crate) fn build() -> anyhow::Result<cargo::Built> {
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
    let mut fleet = progress::step("router, two sites, 5 VMs, servers", || Fleet::new(programs))?;
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
fn prove(fleet: &mut Fleet, report: &mut Report, take_apart: bool) -> anyhow::Result<()> {
    let (late, first): (Vec<_>, Vec<_>) = vms().into_iter().partition(|vm| *vm == LATE);
    let start = fleet.capture("start", "")?;
    progress::step("core", || fleet.start_core())?;
    let text = format!("{} agents, until the core calls them READY", first.len());
    progress::step(&text, || {
        fleet.make_token()?;
        fleet.start_agents(&first)?;
        fleet.wait_ready(&first)
    })?;
    progress::heading("Without policy everything is open");
    checks::judge(fleet, State::Bare, report)?;
    progress::heading(&format!("cnsmo apply -f {EXAMPLE} --wait"));
    let example = shell::root().join(EXAMPLE).display().to_string();
    scenarios::deploy::example(fleet, &example, report)?;
    for vm in late {
        progress::heading(&format!("{vm} joins"));
        scenarios::deploy::join(fleet, vm, report)?;
    }
    scenarios::deploy::members(fleet, report)?;
    let start = start.finish()?;
    progress::heading("Firewall, network and balancer");
    checks::judge(fleet, State::Enforced, report)?;
    scenarios::policy::explained(fleet, report)?;
    progress::heading("Privacy of the network");
    scenarios::overlay::private(fleet, report)?;
    scenarios::secrets::keys(fleet, &[start], report)?;
    progress::heading("Balancing");
    scenarios::balancer::spread(fleet, report)?;
    progress::heading("SIGKILL to a backend's server under load");
    scenarios::balancer::failover(fleet, report)?;
    progress::heading("cnsmo drain under load");
    scenarios::balancer::drain(fleet, report)?;
    progress::heading("Changing policy");
    scenarios::policy::update(fleet, report)?;
    scenarios::policy::counters(fleet, report)?;
    scenarios::policy::rolled_back(fleet, report)?;
    progress::heading("What cannot be applied");
    scenarios::policy::refusals(fleet, report)?;
    scenarios::deploy::too_many(fleet, report)?;
    scenarios::deploy::absent(fleet, report)?;
    progress::heading("Who may do what");
    scenarios::identity::operators(fleet, report)?;
    progress::heading("What services keep in the core");
    scenarios::state::kept(fleet, report)?;
    scenarios::state::announced(fleet, report)?;
    progress::heading("A service of one's own: cnsmo apply, scale, drain, rollback, delete");
    scenarios::instances::deployed(fleet, report)?;
    progress::heading("cnsmo backup, cnsmo-core restore");
    scenarios::state::restored(fleet, report)?;
    progress::heading("SIGKILL to the core and all agents under traffic");
    scenarios::outage::control(fleet, report)?;
    progress::heading("SIGKILL to the gateway's tunnel process under traffic");
    scenarios::outage::engine(fleet, report)?;
    progress::heading("Without the example's policies the network is open");
    scenarios::policy::unfiltered(fleet, report)?;
    fleet.cli_ok(&["apply", "-f", &example, "--wait"])?;
    if take_apart {
        progress::heading("Taking VMs out");
        scenarios::deploy::leave(fleet, LATE, report)?;
        scenarios::policy::detach(fleet, report)?;
    }
    Ok(())
}

/// Shows how to look around, and waits for Ctrl-C.
fn stay(fleet: &Fleet) -> anyhow::Result<()> {
    let cli = fleet.cli_hint();
    let [client, gateway] = [fleet.netns("client")?.name(), fleet.netns(GATEWAY)?.name()];
    println!(
        "\nThe fleet runs until Ctrl-C. In another root shell:\n\
         \x20 {cli} nodes\n\
         \x20 {cli} describe network shop\n\
         \x20 {cli} describe lb front\n\
         \x20 {cli} drain web2\n\
         \x20 {cli} apply -f {EXAMPLE} --wait\n\
         \x20 nsenter --net=/run/netns/{client} curl http://10.77.100.80/    # as a client outside\n\
         \x20 nsenter --net=/run/netns/{gateway} ping 10.70.0.21              # gw1 -> db1 in the overlay\n\
         \x20 ls {dir}/*.log\n\
         Hosts: gw1 10.77.1.5, web1 10.77.1.11, web2 10.77.2.11, web3 10.77.2.12, db1 10.77.2.21,\n\
         client 10.77.9.9; each also as fd77:<site>::<host>.",
        dir = fleet.dir().display(),
    );
    while !interrupt::asked() {
        pause(Duration::from_millis(100));
    }
    println!("\nremoving the fleet");
    Ok(())
}
