//! Starting and stopping the parts of the agent in the right order.

use std::{
    fs::{self, DirBuilder, File},
    io::{Read as _, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use cnsmo_proto::model::Name;
use cnsmo_service::{
    backoff::Backoff,
    channel::CoreAddress,
    host::{Host, Run, Service},
    identity::{Credentials, EnrollError, Identity, enroll},
    lifecycle::{Lifecycle, Phase},
    supervise::{Chain, Limits, Stop, stop_pair, supervise},
    token::Token,
};
use nix::fcntl::{Flock, FlockArg};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    config::Config,
    enforcer::{EnforcerHandle, OpenDatapath, OpenTunnel, Seat, TUNNEL_DOWN},
    flows::FlowLog,
    health,
    locate::Locator,
    node,
    parts::{Part, Parts},
    report::Services,
    session::{self, Connection},
    socket,
    workload::{Systemd, Workloads},
};

/// What an agent's certificate must be of.
const KIND: &str = "agent";
/// How often a service does what its part needs: removes expired flows, tends the tunnel.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Between two attempts to undo a change.
const UNDO_RETRY: Duration = Duration::from_secs(1);
/// First and longest wait before the next attempt to enrol.
const ENROLL_RETRY_FIRST: Duration = Duration::from_millis(500);
const ENROLL_RETRY_LONGEST: Duration = Duration::from_secs(15);
/// A part that fails more often than this within the window is not helped by another restart. The kernel goes on with
/// the last policies; who started the agent decides.
pub const LIMITS: Limits = Limits {
    // A large policy takes seconds to compile; the one in force is whole at any moment.
    stop_deadline: Duration::from_secs(10),
    ..Limits::DEFAULT
};

/// Runs the agent until `stop`. `flows`: what the data path tells of packets. Tunnel and data path stay in any case: a VM without an agent is still guarded and connected.
///
/// # Errors
/// Another agent has the state directory, the data path cannot be opened, the core refuses this VM, or a part keeps
/// failing.
pub async fn run(
    config: Config,
    datapath: OpenDatapath,
    tunnel: OpenTunnel,
    flows: Arc<FlowLog>,
    mut stop: Stop,
) -> anyhow::Result<()> {
    let _lock = lock(&config.state_dir)?;
    // A damaged identity ends the agent, but not before this VM is guarded.
    let node = Identity::load(&config.state_dir).ok().flatten().map(|id| id.name().clone());
    // Before anything that depends on the network.
    let parts = Parts::new(&config.parts);
    let failsafe = config.failsafe_ports.clone();
    let (seat, enforcer) =
        Seat::new(datapath, tunnel, &config.state_dir, node.clone(), parts, failsafe);
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
    let host = Host::new(LIMITS);
    let node_name = node.as_ref().map_or("", |node| node.as_str());
    let steering = socket::serve(&config.socket, host.clone(), node_name, parts_stop.clone());
    let steering = steering
        .await
        .with_context(|| format!("--socket: cannot listen at {}", config.socket.display()))?;
    let locator = Locator::new(config.cores.clone(), last_core, enforcer.clone());
    let asked = config.parts.clone();
    let undoing_stop = parts_stop.clone();
    let systemd = Systemd::new(config.systemd_bus.clone());
    let workloads = Workloads::new(host.clone(), &config.state_dir, systemd);
    let leaving = workloads.leaving();
    let working = workloads.run(enforcer.instances(), parts_stop.clone());
    let services = |node| Services::new(host.clone(), node, flows, enforcer.clone());
    let talking = talk(config, locator, enforcer.clone(), services, parts_stop);
    let parts = async {
        tokio::try_join!(
            async { enforcing.await.map_err(anyhow::Error::from) },
            async { steering.await.context("the task of the socket failed") },
            talking,
            undo_in_time(enforcer.clone(), undoing_stop),
            async { working.await.context("instances cannot be run") },
        )
    };
    for part in asked {
        host.add(Arc::new(Kept { part, enforcer: enforcer.clone() }))?;
    }
    tokio::pin!(parts);
    let ended = tokio::select! {
        ended = &mut parts => ended,
        () = stop.asked() => {
            tracing::info!("stopping; the data path stays attached");
            leaving.store(true, Ordering::Relaxed);
            // Services first: they need the enforcer, and the core hears of their end.
            let stop_all = async {
                host.shut_down().await;
                stopper.stop();
            };
            tokio::join!(stop_all, parts).1
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

/// A service that looks after a part of what is enforced.
struct Kept {
    part: Part,
    enforcer: EnforcerHandle,
}

impl Service for Kept {
    fn name(&self) -> &str {
        self.part.name()
    }

    fn features(&self) -> Vec<String> {
        let features: &[&str] = match self.part {
            Part::Vpn => &["wireguard", "ipv4", "ipv6"],
            Part::Firewall => &["stateful", "ipv4", "ipv6", "counters"],
            Part::LoadBalancer => &["maglev", "round-robin", "source", "health-checks", "drain"],
        };
        features.iter().map(ToString::to_string).collect()
    }

    fn run(&self, life: Lifecycle, stop: Stop) -> Run {
        let (part, enforcer) = (self.part, self.enforcer.clone());
        Box::pin(async move {
            let _at_work = enforcer.begin(part).await?;
            match part {
                Part::LoadBalancer => health::run(enforcer, life, stop).await,
                Part::Vpn | Part::Firewall => tend(part, enforcer, life, stop).await,
            }
        })
    }
}

/// Undoes each change that the core does not confirm in its time.
async fn undo_in_time(enforcer: EnforcerHandle, mut stop: Stop) -> anyhow::Result<()> {
    let mut in_force = enforcer.in_force();
    loop {
        let due = in_force.borrow_and_update().confirm_by;
        let undo = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.asked() => return Ok(()),
            // Why the enforcer is gone, its own task tells.
            changed = in_force.changed() => if changed.is_err() {
                return Ok(());
            },
            () = undo => if enforcer.undo().await.is_err() {
                // It crashed, and is being started again.
                tokio::time::sleep(UNDO_RETRY).await;
            },
        }
    }
}

async fn tend(part: Part, enforcer: EnforcerHandle, life: Lifecycle, mut stop: Stop) -> TaskResult {
    life.step(Phase::Ready, "Healthy", "")?;
    let in_force = enforcer.in_force();
    let mut ticks = interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.asked() => return Ok(()),
            _ = ticks.tick() => enforcer.sweep(part),
        }
        let trouble = in_force.borrow().trouble.clone();
        let trouble = trouble.filter(|(reason, _)| part == Part::Vpn && *reason == TUNNEL_DOWN);
        match (life.phase(), trouble) {
            (Phase::Ready, Some((reason, why))) => life.step(Phase::Degraded, reason, why)?,
            (Phase::Degraded, None) => life.step(Phase::Ready, "Recovered", "")?,
            _ => {}
        }
    }
}

/// Enrols if needed, then talks with the core.
async fn talk(
    config: Config,
    mut locator: Locator,
    enforcer: EnforcerHandle,
    services: impl FnOnce(Name) -> Services,
    mut stop: Stop,
) -> anyhow::Result<()> {
    let identity = tokio::select! {
        () = stop.asked() => return Ok(()),
        identity = identify(&config, &mut locator) => identity?,
    };
    enforcer.named(identity.name().clone()).await?;
    let life = Lifecycle::new("Spawned");
    let services = services(identity.name().clone());
    let labels = config.labels;
    let credentials = Credentials::new(&config.state_dir, identity);
    let renew_first = false;
    let connection = Connection {
        locator,
        credentials,
        labels,
        enforcer,
        services,
        life: life.clone(),
        renew_first,
    };
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
        // The users of instances pass through to their working folders; what is secret has a mode of its own.
        .mode(0o711)
        .create(state_dir)
        .with_context(|| format!("--state-dir: cannot make {shown}"))?;
    let path = state_dir.join("lock");
    let file =
        fs::OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path);
    let file = file.with_context(|| format!("--state-dir: cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            // For the message to another one.
            lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()))?;
            Ok(lock)
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            let pid = pid.trim();
            bail!(
                "--state-dir: another agent runs the services of this VM with {shown}: process {pid}"
            )
        }
        Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}
