//! Starting and stopping the parts of the agent in the right order.

use std::{
    fs::{self, DirBuilder, File},
    os::unix::fs::DirBuilderExt as _,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use cnsmo_proto::model::Name;
use cnsmo_service::{
    backoff::Backoff,
    channel::CoreAddress,
    identity::{Credentials, EnrollError, Identity, enroll},
    lifecycle::{Lifecycle, Phase},
    supervise::{Chain, Limits, Stop, stop_pair, supervise},
    token::Token,
};
use nix::fcntl::{Flock, FlockArg};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    config::Config,
    enforcer::{EnforcerHandle, OpenDatapath, OpenTunnel, Seat},
    health,
    locate::Locator,
    node,
    session::{self, Connection},
};

/// What an agent's certificate must be of.
const KIND: &str = "agent";
/// How often expired flows are removed and the tunnel is tended.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// First and longest wait before the next attempt to enrol.
const ENROLL_RETRY_FIRST: Duration = Duration::from_millis(500);
const ENROLL_RETRY_LONGEST: Duration = Duration::from_secs(15);
/// A part that fails more often than this within the window is not helped by another restart. The kernel goes on with
/// the last policies; who started the agent decides.
const LIMITS: Limits = Limits {
    first_delay: Duration::from_millis(100),
    longest_delay: Duration::from_secs(5),
    restarts_max: 10,
    window: Duration::from_secs(60),
    // A large policy takes seconds to compile; the one in force is whole at any moment.
    stop_deadline: Duration::from_secs(10),
};

/// Runs the agent until `stop`. Tunnel and data path stay in any case: a VM without an agent is still guarded and connected.
///
/// # Errors
/// Another agent has the state directory, the data path cannot be opened, the core refuses this VM, or a part keeps
/// failing.
pub async fn run(
    config: Config,
    datapath: OpenDatapath,
    tunnel: OpenTunnel,
    mut stop: Stop,
) -> anyhow::Result<()> {
    let _lock = lock(&config.state_dir)?;
    // A damaged identity ends the agent, but not before this VM is guarded.
    let node = Identity::load(&config.state_dir).ok().flatten().map(|id| id.name().clone());
    // Before anything that depends on the network.
    let (seat, enforcer) = Seat::new(datapath, tunnel, &config.state_dir, node);
    let starting = seat.clone();
    let (first, last_core) = tokio::task::spawn_blocking(move || starting.start()).await??;
    tracing::info!("resources of the ledger are in force");

    let (stopper, parts_stop) = stop_pair();
    let mut first = Some(first);
    let life = Lifecycle::new("Spawned");
    let seat_life = life.clone();
    let enforcing = supervise("datapath", LIMITS, life, parts_stop.clone(), move |stop| {
        serve(seat.clone(), first.take(), seat_life.clone(), stop)
    });
    let sweeper_life = Lifecycle::new("Spawned");
    let (life, handle) = (sweeper_life.clone(), enforcer.clone());
    let sweeping = supervise("sweeper", LIMITS, sweeper_life, parts_stop.clone(), move |stop| {
        sweep(handle.clone(), life.clone(), stop)
    });
    let health_life = Lifecycle::new("Spawned");
    let (life, handle) = (health_life.clone(), enforcer.clone());
    let checking = supervise("health", LIMITS, health_life, parts_stop.clone(), move |stop| {
        health::run(handle.clone(), life.clone(), stop)
    });
    let locator = Locator::new(config.cores.clone(), last_core, enforcer.clone());
    let talking = talk(config, locator, enforcer, parts_stop);
    let parts = async {
        tokio::try_join!(
            async { enforcing.await.map_err(anyhow::Error::from) },
            async { sweeping.await.map_err(anyhow::Error::from) },
            async { checking.await.map_err(anyhow::Error::from) },
            talking,
        )
    };
    tokio::pin!(parts);
    let ended = tokio::select! {
        ended = &mut parts => ended,
        () = stop.asked() => {
            tracing::info!("stopping; the data path stays attached");
            stopper.stop();
            parts.await
        }
    };
    ended.map(|_| ())
}

type TaskResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

async fn serve(
    seat: Seat,
    first: Option<crate::enforcer::Enforcer>,
    life: Lifecycle,
    stop: Stop,
) -> TaskResult {
    let enforcer = match first {
        Some(first) => first,
        None => {
            let again = seat.clone();
            tokio::task::spawn_blocking(move || again.start()).await??.0
        }
    };
    life.step(Phase::Ready, "Healthy", "")?;
    Ok(seat.serve(enforcer, stop).await?)
}

async fn sweep(enforcer: EnforcerHandle, life: Lifecycle, mut stop: Stop) -> TaskResult {
    life.step(Phase::Ready, "Healthy", "")?;
    let mut ticks = interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.asked() => return Ok(()),
            _ = ticks.tick() => enforcer.sweep(),
        }
    }
}

/// Enrols if needed, then talks with the core.
async fn talk(
    config: Config,
    mut locator: Locator,
    enforcer: EnforcerHandle,
    mut stop: Stop,
) -> anyhow::Result<()> {
    let identity = tokio::select! {
        () = stop.asked() => return Ok(()),
        identity = identify(&config, &mut locator) => identity?,
    };
    enforcer.named(identity.name().clone()).await?;
    let life = Lifecycle::new("Spawned");
    let labels = config.labels;
    let credentials = Credentials::new(&config.state_dir, identity);
    let renew_first = false;
    let connection =
        Connection { locator, credentials, labels, enforcer, life: life.clone(), renew_first };
    supervise("session", LIMITS, life, stop, move |stop| {
        let connection = connection.clone();
        async move { Ok(session::run(connection, stop).await?) }
    })
    .await?;
    Ok(())
}

/// The identity on disk, or a new one from the core.
async fn identify(config: &Config, locator: &mut Locator) -> anyhow::Result<Identity> {
    let (dir, asked) = (config.state_dir.as_path(), config.node.as_ref());
    if let Some(identity) = Identity::load(dir)? {
        let (kind, name) = (identity.kind(), identity.name());
        ensure!(kind == KIND, "--state-dir: the identity there is {kind}/{name}, not an agent's");
        if let Some(other) = asked.filter(|name| *name != identity.name()) {
            let (enrolled, dir) = (identity.name(), dir.display());
            bail!("--node: this VM is enrolled as `{enrolled}`, not `{other}`; see {dir}");
        }
        return Ok(identity);
    }
    let source = config.token.as_ref();
    let source = source.context("--token-file: missing, and this VM is not enrolled yet")?;
    let token = source.read()?;
    let name = asked.cloned().or_else(node::host_name);
    let name = name.context("--node: missing, and the host name makes no name")?;
    let mut backoff = Backoff::new(ENROLL_RETRY_FIRST, ENROLL_RETRY_LONGEST);
    loop {
        match enroll_anywhere(config, locator, &token, &name).await? {
            Ok(identity) => {
                let kind = identity.kind();
                ensure!(
                    kind == KIND,
                    "--token-file: the token is for the kind {kind}, not for agents"
                );
                tracing::info!(node = %name, "enrolled");
                return Ok(identity);
            }
            Err(error) if error.is_temporary() => {
                let delay = backoff.after_failure();
                tracing::warn!(reason = %Chain(&error), retry_in = ?delay, "not enrolled yet");
                tokio::time::sleep(delay).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// At the first address of the core that does not fail by itself.
async fn enroll_anywhere(
    config: &Config,
    locator: &mut Locator,
    token: &Token,
    name: &Name,
) -> anyhow::Result<Result<Identity, EnrollError>> {
    let unknown = std::io::Error::other("no address of the core is known");
    let unreachable = cnsmo_service::channel::ConnectError::Unreachable(unknown.into());
    let mut result = Err(unreachable.into());
    for address in locator.locate().await? {
        let (core, labels) = (CoreAddress::from(address), config.labels.as_map());
        result = enroll(&core, token, name, labels, &config.state_dir).await;
        if !matches!(&result, Err(error) if error.is_temporary()) {
            break;
        }
    }
    Ok(result)
}

/// Two agents of one identity would end each other's streams and overwrite the ledger.
fn lock(state_dir: &Path) -> anyhow::Result<Flock<File>> {
    let shown = state_dir.display();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir)
        .with_context(|| format!("--state-dir: cannot make {shown}"))?;
    let path = state_dir.join("lock");
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("--state-dir: cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            bail!("--state-dir: another agent is running with {shown}")
        }
        Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}
