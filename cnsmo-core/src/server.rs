//! A whole core: store, actor, CA and both fronts.

use std::{
    fs::{self, DirBuilder, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::{
    actor::{Core, Seats},
    audit::Audit,
    bus::{Bus, BusConfig},
    catalog::Catalog,
    cluster::{self, Cluster, Duties, Member},
    fleet::Timing,
    grpc::{self, gate::GateLayer},
    http::HttpLayer,
    identity::{ca::Ca, registry::Registry},
    lease::Leases,
    links::Links,
    own::{self, Own},
    store::{self, PostgresConfig, Revision, Store, StoreConfig, StoreError},
};

/// Connections that have finished their handshake and wait to be served.
const ACCEPTED_MAX: usize = 64;
/// Name of a core that has its store for itself, as the holder of leases.
const CORE: &str = "core";
/// How long calls may take to end once the core stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a core keeps its state and where it listens.
#[derive(Clone, Debug)]
pub struct Config {
    /// Folder of state, keys and lock.
    pub state_dir: PathBuf,
    /// TLS.
    pub listen: SocketAddr,
    /// Unix socket.
    pub socket: PathBuf,
    /// Of agents.
    pub timing: Timing,
    /// How long certificates live, in whole seconds.
    pub certificate_life: Duration,
}

/// How a core shares a database with others.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The database.
    pub database: PostgresConfig,
    /// Where agents and operators reach this core, for the others to tell.
    pub advertise: String,
    /// A leader that dies is replaced within this time.
    pub takeover: Duration,
}

/// Who keeps resources and agents going.
#[derive(Debug)]
enum Keeper {
    /// This core has its store for itself.
    Alone(JoinHandle<()>),
    Cluster(Cluster),
}

/// A core that serves.
#[derive(Debug)]
pub struct Running {
    /// Where TLS is served: the real port if 0 was asked for.
    pub address: SocketAddr,
    core: Core,
    bus: Bus,
    stop: watch::Sender<bool>,
    servers: JoinSet<Result<(), tonic::transport::Error>>,
    keeper: Keeper,
    store: Store,
    /// Ends the streams that clients keep open.
    stopping: CancellationToken,
    catalog: Catalog,
    own: Own,
    // Held until the end.
    socket: grpc::listen::SocketFile,
    lock: File,
}

impl Running {
    /// Starts a core with a store for itself. When it returns, both fronts take connections.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        Self::start_with(config, None).await
    }

    /// Starts one of several cores on one database.
    pub async fn start_shared(config: Config, shared: Shared) -> anyhow::Result<Self> {
        Self::start_with(config, Some(shared)).await
    }

    async fn start_with(config: Config, shared: Option<Shared>) -> anyhow::Result<Self> {
        let folder = &config.state_dir;
        make_folder(folder)?;
        let lock = lock(&folder.join("lock"))?;
        let ca = Arc::new(Ca::open(folder)?);
        let store = match &shared {
            None => StoreConfig::sqlite(folder.join("state.db")),
            Some(shared) => StoreConfig::postgres(shared.database.clone()),
        };
        let store = Store::open(&store).await?;
        if shared.is_some() {
            cluster::check_ca(&store, &ca.spki_sha256()).await?;
        }
        let tcp = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("cannot listen on {}", config.listen))?;
        let address = tcp.local_addr().context("the listener has no address")?;
        let registry = Arc::new(Registry::default());
        let tls = Arc::new(ca.server_config(&addresses(address.ip()), &registry)?);
        let (unix, socket) = grpc::listen::bind_unix(&config.socket)
            .await
            .with_context(|| format!("cannot listen at {}", config.socket.display()))?;

        let audit = Audit::new(Arc::new(store.clone()));
        let alone = shared.is_none();
        let id = match &shared {
            None => CORE.to_owned(),
            Some(_) => cluster::id_in(folder).context("cannot keep the name of this core")?,
        };
        let stopping = CancellationToken::new();
        let catalog = Catalog::start(store.clone(), &id, alone).await?;
        let leases = Leases::start(store.clone(), &id, alone).await?;
        let (seats, core) = Seats::new(registry.clone());
        let duties = Duties {
            seats,
            timing: config.timing,
            leases: leases.clone(),
            catalog: catalog.clone(),
        };
        let advertise = shared.as_ref().map(|shared| shared.advertise.clone());
        let me = Member { id, address: advertise.unwrap_or_default() };
        let keeper = keep(store.clone(), me.clone(), duties, shared).await?;
        let messages = BusConfig { holder: me.id.clone(), ..BusConfig::default() };
        let bus = Bus::start(store.clone(), messages).await?;
        let links = Links::default();
        let own = Own::start(own::Parts {
            id: me.id.clone(),
            alone,
            leases: leases.clone(),
            bus: bus.clone(),
            catalog: catalog.clone(),
            registry: registry.clone(),
            store: store.clone(),
            core: core.clone(),
            links: links.clone(),
        })
        .await?;
        let gate = GateLayer::new(own.host());
        let parts = grpc::Parts {
            me,
            core: core.clone(),
            issuer: grpc::identity::Issuer { ca, life: config.certificate_life },
            audit: audit.clone(),
            store: store.clone(),
            leases,
            catalog: catalog.clone(),
            bus: bus.clone(),
            host: own.host().clone(),
            links,
            state_dir: folder.clone(),
            stopping: stopping.clone(),
        };
        let routes = grpc::routes(parts)?.prepare();
        let http = HttpLayer::new().context("the API's descriptors are damaged")?;
        let (stop, stopped) = watch::channel(false);
        let until = |mut stopped: watch::Receiver<bool>| async move {
            // The sender is gone: stop as well.
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let (to_tls, from_tls) = mpsc::channel(ACCEPTED_MAX);
        let (to_unix, from_unix) = mpsc::channel(ACCEPTED_MAX);
        tokio::spawn(grpc::listen::accept_tls(tcp, tls, audit.clone(), to_tls));
        tokio::spawn(grpc::listen::accept_unix(unix, to_unix));
        let mut servers = JoinSet::new();
        let server = || grpc::server(http.clone(), &registry, &audit, gate.clone());
        servers.spawn(server().serve_with_incoming_shutdown(
            routes.clone(),
            ReceiverStream::new(from_tls),
            until(stopped.clone()),
        ));
        servers.spawn(server().serve_with_incoming_shutdown(
            routes,
            ReceiverStream::new(from_unix),
            until(stopped),
        ));
        Ok(Self {
            address,
            core,
            bus,
            stop,
            servers,
            keeper,
            store,
            stopping,
            catalog,
            own,
            socket,
            lock,
        })
    }

    /// Ends all streams, lets calls finish, and closes the store.
    pub async fn stop(self) {
        let Self {
            core,
            bus,
            stop,
            mut servers,
            keeper,
            store,
            stopping,
            catalog,
            own,
            socket,
            lock,
            address: _,
        } = self;
        stopping.cancel();
        own.stop().await;
        catalog.close();
        // No receiver: the servers have ended already.
        let _ = stop.send(true);
        bus.stop();
        core.shut_down().await;
        drop(core);
        let kept = match keeper {
            Keeper::Alone(task) => task.await.context("the core's task failed"),
            Keeper::Cluster(cluster) => cluster.stop().await,
        };
        if let Err(error) = kept {
            tracing::error!("{error:#}");
        }
        let drained = tokio::time::timeout(DRAIN_TIMEOUT, async {
            while let Some(ended) = servers.join_next().await {
                if let Ok(Err(error)) = ended {
                    tracing::warn!(%error, "a server failed");
                }
            }
        });
        if drained.await.is_err() {
            tracing::warn!("some calls did not end in time");
            servers.shutdown().await;
        }
        store.close().await;
        drop((socket, lock));
    }

    /// Waits for a failure that no restart inside can repair.
    pub async fn failed(&mut self) -> anyhow::Error {
        let keeper = async {
            match &mut self.keeper {
                Keeper::Alone(task) => match task.await {
                    Ok(()) => anyhow::anyhow!("the core's task has ended"),
                    Err(error) => anyhow::Error::new(error).context("the core's task has failed"),
                },
                Keeper::Cluster(cluster) => cluster.ended().await,
            }
        };
        tokio::select! {
            error = keeper => error,
            Some(ended) = self.servers.join_next() => match ended {
                Ok(Err(error)) => anyhow::Error::new(error).context("a server has failed"),
                Err(error) => anyhow::Error::new(error).context("a server has failed"),
                Ok(Ok(())) => anyhow::anyhow!("a server has ended"),
            },
        }
    }
}

/// Starts what owns resources and agents: here, or in whichever core leads.
async fn keep(
    store: Store,
    me: Member,
    duties: Duties,
    shared: Option<Shared>,
) -> anyhow::Result<Keeper> {
    let Some(Shared { database, takeover, .. }) = shared else {
        return Ok(Keeper::Alone(duties.seats.lead(store, duties.timing, None).await?));
    };
    Ok(Keeper::Cluster(Cluster::start(store, &database, me, duties, takeover)))
}

/// Puts a backup in place of the state of a core that does not run, in its folder or in the database that cores share, and
/// returns its revision. A state that is there is only replaced if `force` says so.
pub async fn restore(
    folder: &Path,
    database: Option<PostgresConfig>,
    from: &Path,
    force: bool,
) -> anyhow::Result<Revision> {
    make_folder(folder)?;
    let _lock = lock(&folder.join("lock"))?;
    let store = match database {
        None => StoreConfig::sqlite(folder.join("state.db")),
        Some(database) => StoreConfig::postgres(database),
    };
    match store::restore(&store, from, force).await {
        Err(error @ StoreError::NotEmpty { .. }) => {
            Err(anyhow::Error::new(error).context("nothing was restored: --force replaces it"))
        }
        restored => Ok(restored?),
    }
}

fn make_folder(folder: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("cannot make the state folder {}", folder.display()))
}

/// Two cores on one state folder would overwrite each other.
fn lock(path: &Path) -> anyhow::Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot write to {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            bail!("another core runs with this state folder: it holds {}", path.display())
        }
        Err(fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// Addresses for the server's certificate.
fn addresses(listen: IpAddr) -> Vec<IpAddr> {
    let mut addresses = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    if !listen.is_unspecified() && !listen.is_loopback() {
        addresses.push(listen);
    }
    addresses
}
