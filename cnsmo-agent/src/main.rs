//! The program that runs on every VM.

use std::{io::IsTerminal as _, path::Path, process::ExitCode, sync::Arc};

use anyhow::Context as _;
use clap::Parser as _;
use cnsmo_agent::{
    config::{Cli, Command, Config, LogFormat, Xdp},
    datapath::{
        Datapath,
        kernel::{Kernel, Options, XdpChoice},
    },
    flows::FlowLog,
    runtime,
    tunnel::{Tunnel, TunnelOptions, WireGuard, engine},
};
use cnsmo_proto::model::RULES_MAX;
use cnsmo_service::supervise::{Chain, Stopper, stop_pair};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Rules of one VM: 16 bytes each for each CPU, and 8, twice. More are refused, with the policy's name.
const RULES_MIN: u32 = 32_768;
/// Bytes of policy memory that a rule takes at least: whoever gives more memory gets more rules.
const RULE_BYTES: u32 = 32;

fn main() -> ExitCode {
    match dispatch(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn dispatch(mut cli: Cli) -> anyhow::Result<()> {
    match cli.command.take() {
        Some(Command::Detach { bpffs }) => return detach(&bpffs),
        Some(Command::Tunnel { state_dir }) => {
            log_to_stderr(LogFormat::Text);
            return engine::run(&state_dir);
        }
        None => {}
    }
    let config = cli.into_config()?;
    log_to_stderr(config.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let (stopper, stop) = stop_pair();
        stop_at_signals(stopper)?;
        let (for_datapath, for_tunnel) = (config.clone(), config.clone());
        let flows = Arc::new(FlowLog::default());
        let told = Arc::clone(&flows);
        let datapath = Arc::new(move || open_datapath(&for_datapath, &told));
        let tunnel = Arc::new(move || open_tunnel(&for_tunnel));
        runtime::run(config, datapath, tunnel, flows, stop).await
    })
}

/// The kernel data path, taken over where an earlier agent left it.
fn open_datapath(config: &Config, flows: &Arc<FlowLog>) -> anyhow::Result<Box<dyn Datapath>> {
    let options = Options {
        pins: config.bpffs.clone(),
        state: config.state_dir.clone(),
        interfaces: config.interfaces.clone(),
        xdp: match config.xdp {
            Xdp::Auto => XdpChoice::Auto,
            Xdp::Native => XdpChoice::Native,
            Xdp::Generic => XdpChoice::Generic,
            Xdp::Off => XdpChoice::Off,
        },
        flows: config.flows,
        policy_bytes: config.policy_memory as usize,
        rules_max: rules_max(config.policy_memory),
    };
    let mut kernel = Kernel::open(options)?;
    if let Err(error) = kernel.record(Arc::clone(flows)) {
        // It guards all the same.
        let error: &dyn std::error::Error = &error;
        tracing::error!(error, "packets are neither recorded nor answered");
    }
    Ok(Box::new(kernel))
}

/// Of a VM, by its policy memory; never more than one policy may have.
fn rules_max(policy_memory: u32) -> u32 {
    (policy_memory / RULE_BYTES).clamp(RULES_MIN, RULES_MAX as u32)
}

/// The tunnel, taken over where an earlier agent left it.
fn open_tunnel(config: &Config) -> anyhow::Result<Box<dyn Tunnel>> {
    let options = TunnelOptions {
        state_dir: config.state_dir.clone(),
        // The one that runs, also when its file was replaced.
        program: "/proc/self/exe".into(),
        interfaces: config.interfaces.clone(),
    };
    Ok(Box::new(WireGuard::open(options)?))
}

/// Takes everything of ours out of the kernel. The tunnel first: nothing is to pass through it unguarded.
fn detach(bpffs: &Path) -> anyhow::Result<()> {
    WireGuard::detach()?;
    Ok(Kernel::detach(bpffs)?)
}

fn stop_at_signals(stopper: Stopper) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopper.stop();
    });
    Ok(())
}

fn log_to_stderr(format: LogFormat) {
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .with_env_var("CNSMO_LOG")
        .from_env_lossy();
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => lines.json().init(),
    }
}

/// One line with all causes.
#[expect(clippy::print_stderr, reason = "the log may not be set up yet")]
fn report(error: &anyhow::Error) {
    eprintln!("cnsmo-agent: {}", Chain(error.as_ref()));
}
