//! `AdminService`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use cnsmo_proto::pb::{
    admin::{
        BackupRequest, BackupResponse, CompactRequest, CompactResponse, GetStatusRequest,
        GetStatusResponse, admin_service_server::AdminService,
    },
    catalog::{Instance, Phase},
};
use futures::{StreamExt as _, stream::BoxStream};
use tokio::{
    fs::File,
    io::AsyncReadExt as _,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tonic::{Request, Response, Status};

use super::quota::Quota;
use crate::{
    actor::Core,
    bus::Bus,
    catalog::{AGENT, Catalog, Filter},
    cluster::Member,
    error::Error,
    lease::Leases,
    store::{Revision, Store, StoreStatus},
};

/// Bytes in one message of a backup.
const PIECE_BYTES: usize = 256 << 10;
/// Name of a backup in the state folder while it is made.
const BACKUP_FILE: &str = "backup.tmp";

/// What the service looks at.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) me: Member,
    pub(super) core: Core,
    pub(super) store: Store,
    pub(super) leases: Leases,
    pub(super) catalog: Catalog,
    pub(super) bus: Bus,
    /// Of keys and of instances.
    pub(super) watchers: [Quota; 2],
    /// Has room for a copy of the state.
    pub(super) state_dir: PathBuf,
}

#[derive(Debug)]
pub(super) struct Service {
    parts: Parts,
    started: Instant,
    /// A backup takes as much disk as the state: one at a time.
    backups: Arc<Semaphore>,
}

impl Service {
    /// Removes what a core that was killed during a backup left.
    pub(super) fn new(parts: Parts) -> io::Result<Self> {
        remove(&parts.state_dir.join(BACKUP_FILE))?;
        Ok(Self { parts, started: Instant::now(), backups: Arc::new(Semaphore::new(1)) })
    }

    /// Agents that are there now, as the leader keeps them in the catalogue for all cores.
    fn agents(&self) -> usize {
        let agents = Filter { service: AGENT.into(), ..Filter::default() };
        let is_there =
            |agent: &&Arc<Instance>| !matches!(agent.phase(), Phase::Unreachable | Phase::Lost);
        self.parts.catalog.list(&agents).0.iter().filter(is_there).count()
    }
}

#[tonic::async_trait]
impl AdminService for Service {
    type BackupStream = BoxStream<'static, Result<BackupResponse, Status>>;

    async fn backup(
        &self,
        _: Request<BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let permit = self
            .backups
            .clone()
            .try_acquire_owned()
            .map_err(|_| Error::Exhausted("another backup is under way".into()))?;
        let path = self.parts.state_dir.join(BACKUP_FILE);
        let store = self.parts.store.clone();
        // In a task of its own: the file is removed also if the caller goes away while it is written.
        let making = tokio::spawn(async move {
            let revision = store.backup(&path).await;
            let file = File::open(&path).await;
            remove(&path).map_err(|error| failed(&error))?;
            let revision = revision.map_err(Error::from)?;
            let file = file.map_err(|error| failed(&error))?;
            Ok::<_, Error>(Copy { file, revision, first: true, _permit: permit })
        });
        let copy = making.await.map_err(|_| Error::Internal)??;
        tracing::info!(revision = copy.revision, "backup taken");
        Ok(Response::new(futures::stream::try_unfold(copy, Copy::next).boxed()))
    }

    async fn get_status(
        &self,
        _: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusResponse>, Status> {
        let StoreStatus { engine, revision, compacted, epoch, bytes, wal_bytes, keys } =
            self.parts.store.status().await.map_err(Error::from)?;
        let Parts { me, core, leases, catalog, bus, watchers, .. } = &self.parts;
        let (leader, leases) = (core.leader(), leases.summary());
        Ok(Response::new(GetStatusResponse {
            core: me.id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            engine: engine.to_owned(),
            revision,
            compact_revision: compacted,
            epoch,
            database_bytes: count(bytes),
            wal_bytes: count(wal_bytes),
            keys: count(keys),
            leases: count(leases.held),
            leases_held_back: count(leases.held_back),
            instances: count(catalog.count()),
            agents: count(self.agents()),
            watchers: count(watchers.iter().map(Quota::taken).sum::<usize>()),
            subscribers: count(bus.subscriptions()),
            leader: leader.is_none(),
            leader_address: leader.map_or_else(|| me.address.clone(), Option::unwrap_or_default),
            uptime: uptime(self.started.elapsed()),
        }))
    }

    async fn compact(
        &self,
        request: Request<CompactRequest>,
    ) -> Result<Response<CompactResponse>, Status> {
        let CompactRequest { revision } = request.into_inner();
        let newest = self.parts.store.revision();
        if !(1..=newest).contains(&revision) {
            let message = format!("revision: {revision} is not one of 1 to {newest}");
            return Err(Error::OutOfRange(message).into());
        }
        let compact_revision = self.parts.store.compact(revision).await.map_err(Error::from)?;
        Ok(Response::new(CompactResponse { compact_revision }))
    }
}

/// A backup on its way to the client. Its file has no name any more: it goes when this does.
struct Copy {
    file: File,
    revision: Revision,
    first: bool,
    _permit: OwnedSemaphorePermit,
}

impl Copy {
    async fn next(mut self) -> Result<Option<(BackupResponse, Self)>, Status> {
        let mut piece = BytesMut::with_capacity(PIECE_BYTES);
        while piece.len() < PIECE_BYTES {
            let read = self.file.read_buf(&mut piece).await.map_err(|error| failed(&error))?;
            if read == 0 {
                break;
            }
        }
        let data: Bytes = piece.freeze();
        if data.is_empty() {
            return Ok(None);
        }
        let revision = if self.first { self.revision } else { 0 };
        self.first = false;
        Ok(Some((BackupResponse { revision, data }, self)))
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn failed(error: &io::Error) -> Error {
    tracing::error!(%error, "cannot read or remove a backup's file");
    Error::Internal
}

/// As a message has it. No count comes near its limit.
fn count<M: TryFrom<N> + Default, N>(number: N) -> M {
    M::try_from(number).unwrap_or_default()
}

fn uptime(elapsed: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(Duration::from_secs(elapsed.as_secs())).ok()
}
