//! The durable state: keys, values and one gapless revision per committed transaction, in one SQLite file.
//!
//! One task writes. It takes what has arrived since its last commit as one group, so that many callers share one fsync,
//! and answers after the commit. Readers use short read-only connections of their own.

mod audit;
mod writer;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cnsmo_proto::pb::identity::AuditRecord;
use sqlx::{
    ConnectOptions as _, Connection as _, Row as _, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use crate::audit::Journal;

/// Transactions that may wait for the writer; one more is refused with [`StoreError::Busy`]. About 100 ms of work.
pub const QUEUE_MAX: usize = 4_096;
/// Read connections: reads are short and few.
const READERS_MAX: u32 = 4;
/// How long a connection waits for a lock that another process holds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Prepared statements kept per connection: more than there are.
const STATEMENTS_MAX: usize = 512;
/// How often the log is looked at for compaction.
const COMPACT_INTERVAL: Duration = Duration::from_secs(60);

/// A number given to each committed transaction: 1 and up, without gaps.
pub type Revision = i64;

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Create or replace.
    Put {
        /// Key.
        key: String,
        /// New value.
        value: Vec<u8>,
    },
    /// Remove; of an absent key, only the log remembers it.
    Delete {
        /// Key.
        key: String,
    },
}

impl Op {
    fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// What a transaction expects of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compare {
    /// Key.
    pub key: String,
    /// Revision of its last put; 0: the key is absent.
    pub mod_rev: Revision,
}

/// Changes that are committed together, as one revision, or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// All must hold.
    pub compares: Vec<Compare>,
    /// In order. None: nothing is committed and no revision is taken.
    pub ops: Vec<Op>,
}

/// What became of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Durable, as this revision.
    Committed(Revision),
    /// Nothing was changed: this key's revision is another than expected.
    CompareFailed(Compare),
}

/// A key of the present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Key.
    pub key: String,
    /// Value.
    pub value: Vec<u8>,
    /// Revision of the last put.
    pub mod_rev: Revision,
}

/// Where the store stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Of the last commit; 0: none yet.
    pub revision: Revision,
    /// Log rows up to here may be missing.
    pub compacted: Revision,
    /// Raised by a restore from backup.
    pub epoch: u64,
}

/// How much of the past is kept. Whatever of these is reached first compacts the log.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// Rows.
    pub rows: i64,
    /// Age.
    pub age: Duration,
    /// Bytes of values: large policies would fill the disk long before the rows run out.
    pub bytes: i64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { rows: 100_000, age: Duration::from_secs(7 * 24 * 3_600), bytes: 256 << 20 }
    }
}

/// Why the store could not be opened, or did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened or brought to the current schema.
    #[error("cannot open the state file {}", path.display())]
    Open {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: Arc<sqlx::Error>,
    },
    /// The file is not a sound database.
    #[error("the state file {} is damaged ({detail}): restore it from a backup", path.display())]
    Damaged {
        /// File.
        path: PathBuf,
        /// What SQLite found first.
        detail: String,
    },
    /// [`QUEUE_MAX`] transactions wait already.
    #[error("the store is busy: {QUEUE_MAX} transactions wait")]
    Busy,
    /// No space on the disk. Nothing was committed.
    #[error("the disk of the state file is full")]
    Full,
    /// Any other failure of the database. Nothing was committed.
    #[error("the state file could not be read or written")]
    Database(#[source] Arc<sqlx::Error>),
    /// The writer has ended.
    #[error("the store is closed")]
    Closed,
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match primary_code(&error) {
            Some(SQLITE_FULL) => Self::Full,
            _ => Self::Database(Arc::new(error)),
        }
    }
}

const SQLITE_CORRUPT: u32 = 11;
const SQLITE_FULL: u32 = 13;
const SQLITE_NOTADB: u32 = 26;

/// The primary result code: the low byte of the extended one.
fn primary_code(error: &sqlx::Error) -> Option<u32> {
    let code = error.as_database_error()?.code()?;
    code.parse::<u32>().ok().map(|code| code & 0xff)
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    queue: mpsc::Sender<Job>,
    readers: SqlitePool,
    writer: JoinHandle<()>,
    compactor: JoinHandle<()>,
}

#[derive(Debug)]
enum Job {
    Commit { txn: Txn, answer: oneshot::Sender<Result<Outcome, StoreError>> },
    Compact { upto: Revision },
    Audit { record: Box<AuditRecord>, answer: oneshot::Sender<Result<(), StoreError>> },
}

impl Store {
    /// Opens or creates the file, checks it and brings it to the current schema.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with(path, Retention::default()).await
    }

    /// As [`Self::open`], keeping another amount of the past.
    pub async fn open_with(path: &Path, retention: Retention) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT)
            .statement_cache_capacity(STATEMENTS_MAX)
            .disable_statement_logging();
        let failed = |error: sqlx::Error| match primary_code(&error) {
            Some(SQLITE_CORRUPT | SQLITE_NOTADB) => {
                StoreError::Damaged { path: path.to_owned(), detail: error.to_string() }
            }
            _ => StoreError::Open { path: path.to_owned(), source: Arc::new(error) },
        };
        let mut connection = SqliteConnection::connect_with(&options).await.map_err(failed)?;
        let verdict: String = sqlx::query_scalar("PRAGMA quick_check(1)")
            .fetch_one(&mut connection)
            .await
            .map_err(failed)?;
        if verdict != "ok" {
            return Err(StoreError::Damaged { path: path.to_owned(), detail: verdict });
        }
        sqlx::migrate!()
            .run(&mut connection)
            .await
            .map_err(|error| failed(sqlx::Error::Migrate(Box::new(error))))?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS_MAX)
            .connect_with(options.read_only(true))
            .await
            .map_err(failed)?;
        let (queue, jobs) = mpsc::channel(QUEUE_MAX);
        let writer = tokio::spawn(writer::run(connection, jobs));
        let compactor = tokio::spawn(compact(readers.clone(), queue.downgrade(), retention));
        Ok(Self { queue, readers, writer, compactor })
    }

    /// Commits, and returns once the transaction is on disk. If the caller goes away meanwhile, it may still be
    /// committed.
    pub async fn commit(&self, txn: Txn) -> Result<Outcome, StoreError> {
        let (answer, outcome) = oneshot::channel();
        self.queue.try_send(Job::Commit { txn, answer }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => StoreError::Busy,
            mpsc::error::TrySendError::Closed(_) => StoreError::Closed,
        })?;
        outcome.await.map_err(|_| StoreError::Closed)?
    }

    /// Where the audit is kept. It does not keep the store open.
    pub fn journal(&self) -> Arc<dyn Journal> {
        Arc::new(audit::Table { queue: self.queue.downgrade(), readers: self.readers.clone() })
    }

    /// All keys that start with `prefix`, by key.
    pub async fn range(&self, prefix: &str) -> Result<Vec<Entry>, StoreError> {
        let rows = sqlx::query(
            "SELECT key, value, mod_rev FROM kv WHERE key >= $1 AND substr(key, 1, $2) = $1 ORDER BY key",
        )
        .bind(prefix)
        .bind(i64::try_from(prefix.chars().count()).unwrap_or(i64::MAX))
        .fetch_all(&self.readers)
        .await?;
        let entry = |row: sqlx::sqlite::SqliteRow| {
            Ok(Entry { key: row.try_get(0)?, value: row.try_get(1)?, mod_rev: row.try_get(2)? })
        };
        rows.into_iter().map(entry).collect::<Result<_, sqlx::Error>>().map_err(Into::into)
    }

    /// Where the store stands.
    pub async fn meta(&self) -> Result<Meta, StoreError> {
        let row = sqlx::query("SELECT rev, compact_rev, epoch FROM meta WHERE id = 1")
            .fetch_one(&self.readers)
            .await?;
        Ok(Meta {
            revision: row.try_get(0)?,
            compacted: row.try_get(1)?,
            epoch: row.try_get::<i64, _>(2)?.cast_unsigned(),
        })
    }

    /// Commits what waits, folds the write-ahead log into the file and closes it.
    pub async fn close(self) {
        let Self { queue, readers, writer, compactor } = self;
        compactor.abort();
        // The last connection to close folds the log, and a read-only one cannot.
        readers.close().await;
        drop(queue);
        if let Err(error) = writer.await {
            tracing::error!(%error, "the store's writer failed");
        }
    }
}

/// Asks the writer to compact whenever more than `retention` has piled up.
async fn compact(readers: SqlitePool, queue: mpsc::WeakSender<Job>, retention: Retention) {
    let mut ticks = tokio::time::interval(COMPACT_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match cut(&readers, retention).await {
            Ok(None) => {}
            Ok(Some(upto)) => {
                let Some(queue) = queue.upgrade() else { return };
                if queue.send(Job::Compact { upto }).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::warn!(%error, "cannot look for what to compact"),
        }
    }
}

/// The newest revision that need not be kept, if it is above what was compacted already.
async fn cut(readers: &SqlitePool, retention: Retention) -> Result<Option<Revision>, sqlx::Error> {
    let oldest_ms = writer::now_ms()
        .saturating_sub(i64::try_from(retention.age.as_millis()).unwrap_or(i64::MAX));
    let upto: Option<i64> = sqlx::query_scalar(
        "SELECT max(rev) FROM (
           SELECT rev, time_ms, row_number() OVER newest AS rows, sum(length(value)) OVER newest AS bytes
           FROM log WINDOW newest AS (ORDER BY rev DESC, sub DESC)
         ) WHERE rows > $1 OR bytes > $2 OR time_ms < $3",
    )
    .bind(retention.rows)
    .bind(retention.bytes)
    .bind(oldest_ms)
    .fetch_one(readers)
    .await?;
    let compacted: i64 =
        sqlx::query_scalar("SELECT compact_rev FROM meta WHERE id = 1").fetch_one(readers).await?;
    Ok(upto.filter(|upto| *upto > compacted))
}

#[cfg(test)]
mod tests;
