//! The core's program: arguments, log, signals.

use std::{
    io::{self, IsTerminal as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use cnsmo_core::{
    cluster::{TTL_MAX, TTL_MIN},
    fleet::Timing,
    server::{self, Config, Running, Shared},
    store::PostgresConfig,
};
use cnsmo_service::channel::CoreAddress;
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Agents look at their certificate about once a second.
const CERTIFICATE_LIFE_MIN: Duration = Duration::from_secs(4);

/// Each request takes and frees buffers of some kilobytes on whichever thread serves it, and glibc gives their memory back to
/// the kernel and takes it again each time: a quarter of the time of a put.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Keeps the state of a CNSMO deployment and its agents in step.
#[derive(Debug, Parser)]
#[command(name = "cnsmo-core", version, args_override_self = true)]
struct Arguments {
    /// Folder of state and keys.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "CNSMO_STATE_DIR",
        default_value = "/var/lib/cnsmo/core"
    )]
    state_dir: PathBuf,
    /// Address and port for agents (TLS).
    #[arg(long, value_name = "ADDRESS:PORT", env = "CNSMO_LISTEN", default_value = "0.0.0.0:7443")]
    listen: SocketAddr,
    /// Unix socket for the operators of this machine.
    #[arg(long, value_name = "PATH", env = "CNSMO_SOCKET", default_value = "/run/cnsmo/core.sock")]
    socket: PathBuf,
    /// Database shared with other cores, postgres://USER@HOST/DATABASE [default: a file in the state folder].
    #[arg(long, global = true, value_name = "URL", env = "CNSMO_STORE", hide_env_values = true)]
    store: Option<String>,
    /// File with the password for --store.
    #[arg(long, global = true, value_name = "FILE", env = "CNSMO_STORE_PASSWORD_FILE")]
    store_password_file: Option<PathBuf>,
    /// Where agents reach this core, of several [default: --listen, if that is an address].
    #[arg(long, value_name = "HOST:PORT", env = "CNSMO_ADVERTISE", requires = "store")]
    advertise: Option<CoreAddress>,
    /// Time within which another core takes over from one that died.
    #[arg(long, value_name = "TIME", env = "CNSMO_TAKEOVER", value_parser = duration, default_value = "10s")]
    takeover: Duration,
    /// How often agents call, for example 2s or 500ms.
    #[arg(long, value_name = "TIME", env = "CNSMO_HEARTBEAT", value_parser = duration, default_value = "2s")]
    heartbeat: Duration,
    /// Silence after which an agent is unreachable; more than the heartbeat.
    #[arg(long, value_name = "TIME", env = "CNSMO_LEASE", value_parser = duration, default_value = "6s")]
    lease: Duration,
    /// A VM that does not reach the core for so long after a change goes back to what it enforced before; 0s: it does not.
    #[arg(long, value_name = "TIME", env = "CNSMO_CONFIRM_WINDOW", value_parser = window, default_value = "30s")]
    confirm_window: Duration,
    /// How long certificates live; they are renewed at half of it.
    #[arg(long, value_name = "TIME", env = "CNSMO_CERTIFICATE_LIFE", value_parser = duration, default_value = "24h")]
    certificate_life: Duration,
    /// Form of the log on standard error; CNSMO_LOG sets what it tells, for example debug.
    #[arg(long, value_enum, env = "CNSMO_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put a backup in place of the state, in the state folder or in the database of --store. No core must run on it.
    ///
    /// Agents and clients notice, and take the older state over.
    Restore {
        /// As made by `cnsmo backup`.
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
        /// Replace a state that is there.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log(arguments.log_format);
    allow_connections();
    use_small_pages();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn log(format: LogFormat) {
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .with_env_var("CNSMO_LOG")
        .from_env_lossy();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// As many open files as the system allows: the soft limit is low for programs that use select(2), and each agent is one.
fn allow_connections() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit on open files");
    }
}

/// The allocator asks for huge pages, which are resident as soon as one byte of them is used. Buffers of connections are large
/// and mostly empty: with huge pages an agent takes a quarter more memory.
fn use_small_pages() {
    if let Err(error) = prctl::set_thp_disable(true) {
        tracing::warn!(%error, "cannot do without huge pages");
    }
}

#[tokio::main]
async fn run(mut arguments: Arguments) -> anyhow::Result<()> {
    if let Some(Command::Restore { from, force }) = arguments.command.take() {
        let database = database(&arguments)?;
        let revision = server::restore(&arguments.state_dir, database, &from, force).await?;
        tracing::info!(revision, "restored");
        return Ok(());
    }
    let shared = shared(&arguments)?;
    let Arguments { state_dir, listen, socket, heartbeat, lease, confirm_window, .. } = arguments;
    let certificate_life = arguments.certificate_life;
    ensure!(
        certificate_life >= CERTIFICATE_LIFE_MIN && certificate_life.subsec_nanos() == 0,
        "--certificate-life must be whole seconds, and at least {CERTIFICATE_LIFE_MIN:?}"
    );
    anyhow::ensure!(
        lease > heartbeat,
        "--lease {lease:?} must be longer than --heartbeat {heartbeat:?}"
    );
    ensure!(
        confirm_window.is_zero() || confirm_window >= lease,
        "--confirm-window {confirm_window:?} must be 0s, or at least --lease {lease:?}"
    );
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok()
        .context("another TLS provider is installed")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
    let timing = Timing { heartbeat, lease, confirm: confirm_window };
    let config = Config { state_dir, listen, socket: socket.clone(), timing, certificate_life };
    let mut running = match shared {
        None => Running::start(config).await?,
        Some(shared) => Running::start_shared(config, shared).await?,
    };
    tracing::info!(listen = %running.address, socket = %socket.display(), "ready");
    let failure = tokio::select! {
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
        error = running.failed() => Some(error),
    };
    match failure {
        None => {
            tracing::info!("stopping");
            running.stop().await;
            Ok(())
        }
        Some(error) => Err(error),
    }
}

/// How the core shares a database, if it does.
fn shared(arguments: &Arguments) -> anyhow::Result<Option<Shared>> {
    let Some(database) = database(arguments)? else { return Ok(None) };
    let Arguments { advertise, listen, takeover, .. } = arguments;
    let advertise = match advertise {
        Some(address) => address.to_string(),
        None if listen.ip().is_unspecified() || listen.port() == 0 => {
            bail!("--advertise: missing, and --listen {listen} is no address that agents reach")
        }
        None => listen.to_string(),
    };
    let fits = (TTL_MIN..=TTL_MAX).contains(takeover);
    ensure!(fits, "--takeover: {takeover:?} is not in {TTL_MIN:?} to {TTL_MAX:?}");
    Ok(Some(Shared { database, advertise, takeover: *takeover }))
}

fn database(arguments: &Arguments) -> anyhow::Result<Option<PostgresConfig>> {
    let Arguments { store, store_password_file, .. } = arguments;
    match store {
        Some(url) => {
            let config = PostgresConfig::new(url, store_password_file.as_deref());
            Ok(Some(config.context("--store")?))
        }
        None if store_password_file.is_some() => bail!("--store-password-file: without --store"),
        None => Ok(None),
    }
}

/// A number with one of the units ms, s, m and h.
/// As [`duration`], or nothing.
fn window(text: &str) -> Result<Duration, String> {
    if text == "0s" { Ok(Duration::ZERO) } else { duration(text) }
}

fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u32 = number.parse().map_err(|_| "not of the form 2s, 500ms or 1m".to_owned())?;
    let unit = match unit {
        "ms" => Duration::from_millis(1),
        "s" => Duration::from_secs(1),
        "m" => Duration::from_secs(60),
        "h" => Duration::from_secs(3_600),
        _ => return Err("not of the form 2s, 500ms or 1m".into()),
    };
    if number == 0 {
        return Err("must be longer than nothing".into());
    }
    Ok(unit * number)
}
