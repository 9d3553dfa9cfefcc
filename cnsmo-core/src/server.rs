//! A whole core: store, actor, CA and both fronts.

use std::{
    fs::{self, DirBuilder, File},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::DirBuilderExt as _,
    path::PathBuf,
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

use crate::{
    actor::Core,
    bus::{Bus, BusConfig},
    fleet::Timing,
    grpc,
    identity::Ca,
    store::{Store, StoreConfig},
};

/// Connections that have finished their handshake and wait to be served.
const ACCEPTED_MAX: usize = 64;
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
    actor: JoinHandle<()>,
    // Held until the end.
    socket: grpc::listen::SocketFile,
    lock: File,
}

impl Running {
    /// Starts a core. When it returns, both fronts take connections.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let folder = &config.state_dir;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("cannot make the state folder {}", folder.display()))?;
        let lock = lock(&folder.join("lock"))?;
        let ca = Arc::new(Ca::open(folder)?);
        let store = Store::open(&StoreConfig::sqlite(folder.join("state.db"))).await?;
        let tcp = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("cannot listen on {}", config.listen))?;
        let address = tcp.local_addr().context("the listener has no address")?;
        let tls = Arc::new(ca.server_config(&addresses(address.ip()))?);
        let (unix, socket) = grpc::listen::bind_unix(&config.socket)
            .await
            .with_context(|| format!("cannot listen at {}", config.socket.display()))?;

        let bus = Bus::start(store.clone(), BusConfig::default()).await?;
        let (core, actor) = Core::start(store, config.timing).await?;
        let routes = grpc::routes(&core, &bus, &ca)?.prepare();
        let (stop, stopped) = watch::channel(false);
        let until = |mut stopped: watch::Receiver<bool>| async move {
            // The sender is gone: stop as well.
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let (to_tls, from_tls) = mpsc::channel(ACCEPTED_MAX);
        let (to_unix, from_unix) = mpsc::channel(ACCEPTED_MAX);
        tokio::spawn(grpc::listen::accept_tls(tcp, tls, to_tls));
        tokio::spawn(grpc::listen::accept_unix(unix, to_unix));
        let mut servers = JoinSet::new();
        servers.spawn(grpc::server().serve_with_incoming_shutdown(
            routes.clone(),
            ReceiverStream::new(from_tls),
            until(stopped.clone()),
        ));
        servers.spawn(grpc::server().serve_with_incoming_shutdown(
            routes,
            ReceiverStream::new(from_unix),
            until(stopped),
        ));
        Ok(Self { address, core, bus, stop, servers, actor, socket, lock })
    }

    /// Ends all streams, lets calls finish, and closes the store.
    pub async fn stop(self) {
        let Self { core, bus, stop, mut servers, actor, socket, lock, .. } = self;
        // No receiver: the servers have ended already.
        let _ = stop.send(true);
        bus.stop();
        core.shut_down().await;
        drop(core);
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
        if let Err(error) = actor.await {
            tracing::error!(%error, "the core's task failed");
        }
        drop((socket, lock));
    }

    /// Waits for a failure that no restart inside can repair.
    pub async fn failed(&mut self) -> anyhow::Error {
        tokio::select! {
            ended = &mut self.actor => match ended {
                Ok(()) => anyhow::anyhow!("the core's task has ended"),
                Err(error) => anyhow::Error::new(error).context("the core's task has failed"),
            },
            Some(ended) = self.servers.join_next() => match ended {
                Ok(Err(error)) => anyhow::Error::new(error).context("a server has failed"),
                Err(error) => anyhow::Error::new(error).context("a server has failed"),
                Ok(Ok(())) => anyhow::anyhow!("a server has ended"),
            },
        }
    }
}

/// Two cores on one state folder would overwrite each other.
fn lock(path: &std::path::Path) -> anyhow::Result<File> {
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
