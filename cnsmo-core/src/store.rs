//! The durable state: keys, values, leases, messages and audit, and one gapless revision per committed transaction.
//!
//! One task writes. It takes what has arrived since its last commit as one group, so that many callers share one fsync,
//! and answers after the commit. Readers use short read-only connections of their own. The database is SQLite, or
//! PostgreSQL for several cores at once; both run the same SQL text (`engine`).

mod audit;
mod copy;
mod engine;
mod group;
mod hub;
pub mod message;
mod postgres;
mod read;
mod schema;
mod sqlite;
mod types;
mod writer;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

pub use audit::{AuditRecord, AuditRow};
pub use copy::restore;
pub use hub::Feed;
pub use postgres::{Beat, InvalidUrl, Members, PostgresConfig};
pub use types::{
    Change, Commit, Compare, Entry, Event, Fence, Lease, LeaseId, Op, Outcome, Range, Read,
    Revision, Sequence, Slice, StoreError, StoreStatus, Target, Txn,
};

use engine::Engine;
use group::{Done, Work};
use hub::Hub;
use read::Readers;
use writer::Job;

/// Transactions that may wait for the writer; one more is refused with [`StoreError::Busy`]. About 100 ms of work.
pub const QUEUE_MAX: usize = 4_096;
/// Bytes of keys and values that may wait for the writer: they are in memory until they are on disk.
pub const QUEUE_BYTES_MAX: usize = 64 << 20;
/// Bytes of a key. Keys contain no control characters.
pub const KEY_BYTES_MAX: usize = 512;
/// Keys that one operation deletes.
pub const DELETE_KEYS_MAX: usize = 10_000;
/// Keys of one lease: its end deletes them as one revision.
pub const LEASE_KEYS_MAX: i64 = 10_000;
/// Bytes of values that one transaction reads.
pub const READ_BYTES_MAX: usize = 4 << 20;
/// How long the answer to a request with an id is kept.
pub const REQUEST_TTL: Duration = Duration::from_secs(600);
/// How often the log is looked at for compaction.
const COMPACT_INTERVAL: Duration = Duration::from_secs(60);

/// Where the state is, and how much of its past.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Where.
    pub engine: EngineConfig,
    /// How much.
    pub retention: Retention,
}

/// Where the state is.
#[derive(Clone, Debug)]
pub enum EngineConfig {
    /// In this file, for one core.
    Sqlite(PathBuf),
    /// In a database that several cores share.
    Postgres(Box<PostgresConfig>),
}

impl StoreConfig {
    /// In a file.
    pub fn sqlite(path: impl Into<PathBuf>) -> Self {
        Self { engine: EngineConfig::Sqlite(path.into()), retention: Retention::default() }
    }

    /// In a database that several cores share.
    pub fn postgres(config: PostgresConfig) -> Self {
        Self { engine: EngineConfig::Postgres(Box::new(config)), retention: Retention::default() }
    }

    fn open(&self) -> Arc<dyn Engine> {
        match &self.engine {
            EngineConfig::Sqlite(path) => Arc::new(sqlite::File::new(path.clone())),
            EngineConfig::Postgres(config) => Arc::new(postgres::Database::new(config)),
        }
    }
}

/// How much of the past is kept. Whatever of these is reached first compacts the log.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// Changes.
    pub rows: i64,
    /// Age of changes.
    pub age: Duration,
    /// Bytes of values: large policies would fill the disk long before the rows run out.
    pub bytes: i64,
    /// Records of the audit.
    pub audit_rows: i64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            rows: 100_000,
            age: Duration::from_secs(7 * 24 * 3_600),
            bytes: 256 << 20,
            audit_rows: 1_000_000,
        }
    }
}

/// An open store. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    queue: mpsc::Sender<Job>,
    queued_bytes: Arc<AtomicUsize>,
    readers: Readers,
    hub: Arc<Hub>,
    epoch: u64,
    writer: Mutex<Option<oneshot::Receiver<()>>>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        self.hub.close();
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("revision", &self.revision()).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the database or makes it, checks it and brings it to the current schema.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] and [`StoreError::Open`].
    pub async fn open(config: &StoreConfig) -> Result<Self, StoreError> {
        let engine = config.open();
        let (queue, jobs) = mpsc::channel(QUEUE_MAX);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let hub = Arc::new(Hub::default());
        let writer = writer::start(engine.clone(), jobs, queued_bytes.clone(), hub.clone()).await?;
        let readers = Readers::new(engine.clone());
        let epoch = readers.epoch().await?;
        let tasks = [
            tokio::spawn(compact(readers.clone(), queue.downgrade(), config.retention)),
            tokio::spawn(hub::pump(engine, readers.clone(), hub.clone())),
        ];
        let writer = Mutex::new(Some(writer));
        let inner = Inner { queue, queued_bytes, readers, hub, epoch, writer, tasks };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Commits, and returns once the transaction is on disk. If the caller goes away meanwhile, it may still be
    /// committed.
    ///
    /// # Errors
    /// Nothing was committed, except for [`StoreError::Unknown`].
    pub async fn commit(&self, txn: Txn) -> Result<Outcome, StoreError> {
        txn.check()?;
        let Done::Outcome(outcome) = self.ask(Work::Commit(txn)).await? else { unreachable!() };
        Ok(outcome)
    }

    /// A new lease. It takes no revision: nobody can see it yet.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn grant(
        &self,
        owner: &str,
        ttl: Duration,
        holder: &str,
    ) -> Result<Lease, StoreError> {
        let work = Work::Grant { owner: owner.to_owned(), ttl, holder: holder.to_owned() };
        let Done::Lease(Some(lease)) = self.ask(work).await? else { unreachable!() };
        Ok(lease)
    }

    /// `holder` counts this lease down from now on, with a new epoch. With `from` (a holder and its epoch): only if it is
    /// still that holder's. None: it is not, or there is no such lease.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn take_lease(
        &self,
        id: LeaseId,
        holder: &str,
        from: Option<(&str, i64)>,
    ) -> Result<Option<Lease>, StoreError> {
        let from = from.map(|(holder, epoch)| (holder.to_owned(), epoch));
        let work = Work::TakeLease { id, holder: holder.to_owned(), from };
        let Done::Lease(lease) = self.ask(work).await? else { unreachable!() };
        Ok(lease)
    }

    /// Deletes the lease and its keys as one revision; without keys it takes none, and the current one is returned.
    /// With `guard` (holder and its epoch): only if it is still that holder's. None: it is not, or there is no such
    /// lease. `expired` tells watchers why the keys went.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn end_lease(
        &self,
        id: LeaseId,
        expired: bool,
        guard: Option<(&str, i64)>,
    ) -> Result<Option<Revision>, StoreError> {
        let guard = guard.map(|(holder, epoch)| (holder.to_owned(), epoch));
        let Done::Ended(revision) = self.ask(Work::EndLease { id, expired, guard }).await? else {
            unreachable!()
        };
        Ok(revision)
    }

    /// Appends a record to the chain.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn append_audit(&self, record: AuditRecord) -> Result<(), StoreError> {
        record.check()?;
        self.ask(Work::Audit(record)).await.map(drop)
    }

    /// Removes the history up to a revision, as far as it is not the present. Returns up to where it is gone.
    ///
    /// # Errors
    /// As [`Self::commit`]; what was removed before the error stays removed.
    pub async fn compact(&self, upto: Revision) -> Result<Revision, StoreError> {
        let (answer, compacted) = oneshot::channel();
        self.send(Job::Compact { upto, answer })?;
        compacted.await.map_err(|_| StoreError::Closed)?
    }

    /// Writes all of the state into a new SQLite file, as it is at one moment, while the store goes on. The file
    /// is readable by its owner only, and complete if this succeeds.
    ///
    /// # Errors
    /// [`StoreError::Open`] if the file exists or cannot be written.
    pub async fn backup(&self, to: &Path) -> Result<Revision, StoreError> {
        copy::backup(&self.inner.readers, to).await
    }

    /// Commits in order from the first one after `after`.
    pub fn follow(&self, after: Revision) -> Feed {
        Feed::new(self.inner.hub.clone(), self.inner.readers.clone(), after)
    }

    /// The newest revision that this core has seen.
    pub fn revision(&self) -> Revision {
        self.inner.hub.newest()
    }

    /// Of all revisions while the store is open: a restore from backup raises it.
    pub fn epoch(&self) -> u64 {
        self.inner.epoch
    }

    /// Waits until this core has seen a revision, or the store closes.
    pub async fn reached(&self, revision: Revision) {
        // Closed: no later revision will come, and reading says so.
        let _ = self.inner.hub.beyond(revision - 1).await;
    }

    /// Commits what waits and closes the database, also for all clones.
    pub async fn close(self) {
        let writer = self.inner.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.inner.tasks.iter().for_each(JoinHandle::abort);
        // The last connection to close folds the log, and a read-only one cannot.
        self.inner.readers.close();
        // Closed already is as good.
        let _ = self.inner.queue.send(Job::Close).await;
        if let Some(ended) = writer {
            let _ = ended.await;
        }
        self.inner.hub.close();
    }

    async fn ask(&self, work: Work) -> Result<Done, StoreError> {
        let (answer, done) = oneshot::channel();
        let bytes = work.bytes();
        let queued = self.inner.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        let sent = if queued.saturating_add(bytes) > QUEUE_BYTES_MAX {
            Err(StoreError::Busy)
        } else {
            self.send(Job::Work { work, bytes, answer })
        };
        if sent.is_err() {
            self.inner.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        sent?;
        done.await.map_err(|_| StoreError::Closed)?
    }

    fn send(&self, job: Job) -> Result<(), StoreError> {
        self.inner.queue.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => StoreError::Busy,
            mpsc::error::TrySendError::Closed(_) => StoreError::Closed,
        })
    }
}

/// Asks the writer to compact whenever more than `retention` has piled up.
async fn compact(readers: Readers, queue: mpsc::WeakSender<Job>, retention: Retention) {
    let mut ticks = tokio::time::interval(COMPACT_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let upto = match readers.cut(retention).await {
            Ok(upto) => upto,
            Err(error) => {
                tracing::warn!(%error, "cannot look for what to compact");
                continue;
            }
        };
        let Some(queue) = queue.upgrade() else { return };
        let prune = Job::Prune { audit_rows: retention.audit_rows };
        if queue.send(prune).await.is_err() {
            return;
        }
        if let Some(upto) = upto {
            let (answer, compacted) = oneshot::channel();
            if queue.send(Job::Compact { upto, answer }).await.is_err() {
                return;
            }
            drop(queue);
            // The writer tells of failures.
            let _ = compacted.await;
        }
    }
}

#[cfg(test)]
mod tests;
