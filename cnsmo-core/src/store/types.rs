//! What goes into the store and what comes out.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;

use super::{KEY_BYTES_MAX, LEASE_KEYS_MAX, QUEUE_MAX, engine::EngineError};

/// A number given to each committed transaction that writes: 1 and up, without gaps.
pub type Revision = i64;
/// Of a lease: above 0. 0: none.
pub type LeaseId = i64;
/// Of a durable message: it grows within a stream.
pub type Sequence = i64;

/// One step of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Create or replace.
    Put {
        /// Key.
        key: String,
        /// New value.
        value: Bytes,
        /// How to read it.
        content_type: String,
        /// The lease with which the key ends; 0: none.
        lease: LeaseId,
    },
    /// Remove; of an absent key: no change.
    Delete {
        /// Key.
        key: String,
    },
    /// Remove all keys that start so, at most [`super::DELETE_KEYS_MAX`].
    DeletePrefix {
        /// Start of the keys.
        prefix: String,
    },
    /// Read, in view of the steps before.
    Get {
        /// Key.
        key: String,
    },
}

impl Op {
    /// A put without content type and lease.
    pub fn put(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        let (key, value) = (key.into(), value.into());
        Self::Put { key, value, content_type: String::new(), lease: 0 }
    }
}

/// What is expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Revision of the key's last put; 0: it is absent.
    ModRevision(Revision),
    /// Number of puts since its creation; 0: it is absent.
    Version(i64),
    /// Its lease; 0: none.
    Lease(LeaseId),
    /// Its value; never that of an absent key.
    Value(Bytes),
}

/// What a transaction expects of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compare {
    /// Key.
    pub key: String,
    /// What is expected of it.
    pub target: Target,
}

/// A holder of a lease proves that it still is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    /// It must live.
    pub lease: LeaseId,
    /// It must be the lease's.
    pub token: u64,
}

/// Changes that are committed together, as one revision, or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    /// If all hold `success` runs, else `failure`.
    pub compares: Vec<Compare>,
    /// In order.
    pub success: Vec<Op>,
    /// In order.
    pub failure: Vec<Op>,
    /// [`StoreError::Fenced`] if it does not hold.
    pub fence: Option<Fence>,
    /// Repeated by the same caller within [`super::REQUEST_TTL`]: the first outcome again.
    pub request_id: Option<String>,
    /// Identity of the caller, kept in the log.
    pub by: String,
}

impl Txn {
    /// Operations without condition.
    pub fn of(ops: Vec<Op>) -> Self {
        Self { success: ops, ..Self::default() }
    }

    pub(super) fn ops(&self) -> impl Iterator<Item = &Op> {
        self.success.iter().chain(&self.failure)
    }

    /// What the database could not take would fail all other transactions of its group.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        for compare in &self.compares {
            check_key(&compare.key)?;
        }
        for op in self.ops() {
            match op {
                Op::Put { key, content_type, .. } => {
                    check_key(key)?;
                    check_text(content_type)?;
                }
                Op::Delete { key } | Op::Get { key } => check_key(key)?,
                Op::DeletePrefix { prefix } => check_key(prefix)?,
            }
        }
        check_text(&self.by)?;
        self.request_id.as_deref().map_or(Ok(()), check_text)
    }

    /// Bytes in memory, about.
    pub(super) fn bytes(&self) -> usize {
        let op = |op: &Op| match op {
            Op::Put { key, value, content_type, .. } => {
                key.len() + value.len() + content_type.len()
            }
            Op::Delete { key } | Op::Get { key } => key.len(),
            Op::DeletePrefix { prefix } => prefix.len(),
        };
        let compare = |c: &Compare| match &c.target {
            Target::Value(value) => c.key.len() + value.len(),
            Target::ModRevision(_) | Target::Version(_) | Target::Lease(_) => c.key.len(),
        };
        size_of::<Self>()
            + self.ops().map(|o| size_of::<Op>() + op(o)).sum::<usize>()
            + self.compares.iter().map(|c| size_of::<Compare>() + compare(c)).sum::<usize>()
    }
}

fn check_key(key: &str) -> Result<(), StoreError> {
    match key {
        "" => Err(StoreError::Invalid("a key is empty")),
        _ if key.len() > KEY_BYTES_MAX => Err(StoreError::Invalid("a key is too long")),
        _ if key.chars().any(char::is_control) => {
            Err(StoreError::Invalid("a key contains a control character"))
        }
        _ => Ok(()),
    }
}

/// PostgreSQL's text has no NUL.
pub(super) fn check_text(text: &str) -> Result<(), StoreError> {
    if text.contains('\0') { Err(StoreError::Invalid("a text contains NUL")) } else { Ok(()) }
}

/// What became of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whether all comparisons held.
    pub succeeded: bool,
    /// Durable as this revision; of the state that was looked at, if nothing was written.
    pub revision: Revision,
    /// Of each [`Op::Get`] that ran.
    pub reads: Vec<Read>,
}

/// What a [`Op::Get`] saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// Key.
    pub key: String,
    /// None: it is absent.
    pub entry: Option<Entry>,
}

/// A key and its value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Key.
    pub key: String,
    /// Value.
    pub value: Bytes,
    /// How to read it.
    pub content_type: String,
    /// Of the put that created it.
    pub create_revision: Revision,
    /// Of the last put.
    pub mod_revision: Revision,
    /// 1 at creation, one more with each put.
    pub version: i64,
    /// The lease with which it ends; 0: none.
    pub lease: LeaseId,
}

/// How a key changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Created or replaced.
    Put,
    /// Deleted.
    Delete,
    /// Deleted because its lease expired.
    Expire,
}

/// A change of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Of the transaction.
    pub revision: Revision,
    /// How.
    pub change: Change,
    /// After the change; of a deleted key only its name, and `revision` as its last.
    pub entry: Entry,
    /// Revision of the key's put before; 0: it was absent.
    pub prev_revision: Revision,
}

/// A whole transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// Revision.
    pub revision: Revision,
    /// In order; not empty.
    pub events: Vec<Event>,
}

impl Commit {
    /// Bytes in memory, about.
    pub(super) fn bytes(&self) -> usize {
        let entry = |e: &Entry| e.key.len() + e.value.len() + e.content_type.len();
        size_of::<Self>()
            + self.events.iter().map(|e| size_of::<Event>() + entry(&e.entry)).sum::<usize>()
    }
}

/// Which keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// Start of the keys; empty: all.
    pub prefix: String,
    /// Only keys behind this one.
    pub after: Option<String>,
    /// As they were at this revision; none: as they are.
    pub at: Option<Revision>,
    /// At most so many.
    pub rows: usize,
    /// Ends with the key that reaches so many bytes.
    pub bytes: usize,
    /// Without values.
    pub keys_only: bool,
}

impl Range {
    /// All keys that start with `prefix`, as they are, whatever they take.
    pub fn prefix(prefix: impl Into<String>) -> Self {
        Self {
            prefix: prefix.into(),
            after: None,
            at: None,
            rows: usize::MAX,
            bytes: usize::MAX,
            keys_only: false,
        }
    }
}

/// Some keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// By key, in the order of bytes.
    pub entries: Vec<Entry>,
    /// Of the state that was read.
    pub revision: Revision,
    /// A limit was reached: there may be more behind the last key.
    pub more: bool,
}

/// A lease. When it ends is in the memory of its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Identifier.
    pub id: LeaseId,
    /// Who may renew and end it.
    pub owner: String,
    /// How long it lives without renewal.
    pub ttl: Duration,
    /// Fencing token: higher than that of every lease before it.
    pub token: u64,
    /// The core that counts it down.
    pub holder: String,
    /// Raised each time that a core takes it.
    pub holder_epoch: i64,
}

/// Where the store stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreStatus {
    /// `sqlite` or `postgresql`.
    pub engine: &'static str,
    /// Of the last commit; 0: none yet.
    pub revision: Revision,
    /// The history up to here is gone.
    pub compacted: Revision,
    /// Raised by a restore from backup.
    pub epoch: u64,
    /// Keys of the present.
    pub keys: u64,
    /// Of the database.
    pub bytes: u64,
    /// Of the write-ahead log; 0: not known.
    pub wal_bytes: u64,
}

/// Why the store could not be opened, or did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be opened or brought to the current schema.
    #[error("cannot open the state {name}")]
    Open {
        /// File or database.
        name: String,
        /// Cause.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The file is not a sound database.
    #[error("the state {name} is damaged ({detail}): restore it from a backup")]
    Damaged {
        /// File.
        name: String,
        /// What was found first.
        detail: String,
    },
    /// [`QUEUE_MAX`] transactions or [`super::QUEUE_BYTES_MAX`] bytes wait already.
    #[error("the store is busy: up to {QUEUE_MAX} transactions wait")]
    Busy,
    /// No space on the disk. Nothing was committed.
    #[error("the disk of the state is full")]
    Full,
    /// A key or text that no database takes.
    #[error("{0}")]
    Invalid(&'static str),
    /// The fence's lease is gone, or is another's now.
    #[error("the fence does not hold: the lease has ended or belongs to another holder")]
    Fenced,
    /// A put names a lease that is not there.
    #[error("there is no lease {0}")]
    LeaseGone(LeaseId),
    /// A put would bind one more key to a lease than it may have.
    #[error("lease {0} has {LEASE_KEYS_MAX} keys already")]
    LeaseFull(LeaseId),
    /// The history does not reach back so far.
    #[error("the history up to revision {at} is gone")]
    Compacted {
        /// Up to here.
        at: Revision,
    },
    /// This revision is not there yet.
    #[error("revision {at} is the newest")]
    Ahead {
        /// The newest one.
        at: Revision,
    },
    /// One transaction would touch more than is allowed.
    #[error("more than {limit} {what} in one transaction")]
    TooMany {
        /// Of these.
        what: &'static str,
        /// At most.
        limit: usize,
    },
    /// The restore's target holds a state already.
    #[error("{name} holds a state already")]
    NotEmpty {
        /// File or database.
        name: String,
    },
    /// The restore's target is in use.
    #[error("cores run on {name}: stop them first")]
    InUse {
        /// Database.
        name: String,
    },
    /// The connection broke during the commit.
    #[error("the connection to the database broke: it is not known whether this was committed")]
    Unknown(#[source] Arc<dyn std::error::Error + Send + Sync>),
    /// Any other failure of the database. Nothing was committed.
    #[error("the state could not be read or written")]
    Database(#[source] Arc<dyn std::error::Error + Send + Sync>),
    /// The store is closed.
    #[error("the store is closed")]
    Closed,
}

impl From<EngineError> for StoreError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Full => Self::Full,
            EngineError::Unknown(source) => Self::Unknown(source.into()),
            EngineError::Damaged(source)
            | EngineError::Lost(source)
            | EngineError::Failed(source) => Self::Database(source.into()),
        }
    }
}
