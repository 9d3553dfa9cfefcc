//! What was done and refused: one record for each call that a person made to change something, for each change of who may
//! do what, and for what was refused.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use cnsmo_proto::pb::identity::AuditRecord;
use tokio::sync::mpsc;
use tonic::{Code, Status};

use crate::{
    error::Error,
    identity::caller::Caller,
    store::{self, Revision, Store},
};

/// What `rpc` says of a TLS handshake.
pub const HANDSHAKE: &str = "tls";
/// Refusals that are recorded at once; a scan that is refused without end must not fill the disk.
const REFUSALS_BURST: u32 = 100;
/// Then one more each so often. What was left out is counted in the next record.
const REFUSAL_INTERVAL: Duration = Duration::from_millis(500);
/// Refusals that wait to be written; more are counted as left out.
const QUEUE_MAX: usize = 256;
/// Bytes of a text from outside; the rest is cut off.
const TEXT_BYTES_MAX: usize = 512;

/// Where records are kept, chained as `cnsmo_service::audit` checks it.
#[tonic::async_trait]
pub trait Journal: fmt::Debug + Send + Sync + 'static {
    /// Gives the record its number and hash, and makes it durable.
    async fn append(&self, record: AuditRecord) -> Result<(), Error>;
    /// Records after this number, in order, at most so many.
    async fn list(&self, after: i64, rows: usize) -> Result<Vec<AuditRecord>, Error>;
}

#[tonic::async_trait]
impl Journal for Store {
    async fn append(&self, record: AuditRecord) -> Result<(), Error> {
        let time_ms = cnsmo_service::audit::time_ms(&record);
        let AuditRecord { identity, role, rpc, decision, status, revision, detail, .. } = record;
        let record =
            store::AuditRecord { time_ms, identity, role, rpc, decision, status, revision, detail };
        Ok(self.append_audit(record).await?)
    }

    async fn list(&self, after: i64, rows: usize) -> Result<Vec<AuditRecord>, Error> {
        Ok(self.list_audit(after, rows).await?.into_iter().map(Into::into).collect())
    }
}

impl From<store::AuditRow> for AuditRecord {
    fn from(row: store::AuditRow) -> Self {
        let store::AuditRow { seq, record, hash } = row;
        let ms = u64::try_from(record.time_ms).unwrap_or_default();
        let time = UNIX_EPOCH.checked_add(Duration::from_millis(ms));
        Self {
            sequence: seq,
            time: time.map(Into::into),
            identity: record.identity,
            role: record.role,
            rpc: record.rpc,
            decision: record.decision,
            status: record.status,
            revision: record.revision,
            detail: record.detail,
            hash: hash.to_vec(),
        }
    }
}

/// What a service knows of a call that the audit should have. Left in the extensions of its response.
#[derive(Clone, Debug, Default)]
pub struct Note {
    /// Of the change; 0: none.
    pub revision: Revision,
    /// What the call was about. No secrets.
    pub detail: String,
}

/// The way to the journal. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Audit {
    journal: Arc<dyn Journal>,
    refusals: mpsc::Sender<AuditRecord>,
    limit: Arc<Mutex<Limit>>,
}

impl Audit {
    /// Writes to `journal`. The task that writes refusals ends with the last clone.
    pub fn new(journal: Arc<dyn Journal>) -> Self {
        let (refusals, waiting) = mpsc::channel(QUEUE_MAX);
        tokio::spawn(write(journal.clone(), waiting));
        Self { journal, refusals, limit: Arc::new(Mutex::new(Limit::new(Instant::now()))) }
    }

    /// Records a call that was let through, before its answer leaves. One that cannot be recorded has happened all the same:
    /// the log has it then.
    pub async fn call(&self, caller: &Caller, rpc: &str, code: Code, note: Note) {
        let record = AuditRecord {
            status: status_word(code).to_owned(),
            decision: "allowed".to_owned(),
            revision: note.revision,
            detail: cut(note.detail),
            ..record(&caller.identity, caller.role.as_str(), rpc)
        };
        append(&*self.journal, record).await;
    }

    /// Records a call that was refused. Returns at once.
    pub fn refused_call(&self, caller: Option<&Caller>, rpc: &str, refusal: &Status) {
        let (identity, role) = match caller {
            Some(caller) => (&*caller.identity, caller.role.as_str()),
            None => ("", ""),
        };
        let detail = refusal.message().to_owned();
        self.refused(identity, role, rpc, refusal.code(), detail);
    }

    /// Records a TLS handshake that failed because of the client's certificate. Returns at once.
    pub fn refused_handshake(&self, peer: std::net::SocketAddr, reason: &str) {
        let detail = format!("{peer}: {reason}");
        self.refused("", "", HANDSHAKE, Code::Unauthenticated, detail);
    }

    fn refused(&self, identity: &str, role: &str, rpc: &str, code: Code, detail: String) {
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(left_out) = limit.admit(Instant::now()) else { return };
        let more =
            if left_out == 0 { String::new() } else { format!("; {left_out} left out before") };
        let record = AuditRecord {
            status: status_word(code).to_owned(),
            decision: "refused".to_owned(),
            detail: cut(detail) + &more,
            ..record(identity, role, rpc)
        };
        if self.refusals.try_send(record).is_err() {
            limit.left_out += left_out + 1;
        }
    }

    /// Records after this number, in order, at most so many.
    pub async fn list(&self, after: i64, rows: usize) -> Result<Vec<AuditRecord>, Error> {
        self.journal.list(after, rows).await
    }
}

/// Lets a burst through, then a steady rate, and counts the rest.
#[derive(Debug)]
struct Limit {
    /// When all that was let through will be worked off.
    until: Instant,
    left_out: u64,
}

impl Limit {
    fn new(now: Instant) -> Self {
        Self { until: now, left_out: 0 }
    }

    /// How many were left out since the last one; none: leave this one out too.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let until = self.until.max(now) + REFUSAL_INTERVAL;
        if until > now + REFUSAL_INTERVAL * REFUSALS_BURST {
            self.left_out += 1;
            return None;
        }
        self.until = until;
        Some(std::mem::take(&mut self.left_out))
    }
}

async fn write(journal: Arc<dyn Journal>, mut waiting: mpsc::Receiver<AuditRecord>) {
    while let Some(record) = waiting.recv().await {
        append(&*journal, record).await;
    }
}

async fn append(journal: &dyn Journal, record: AuditRecord) {
    let shown = format!("{record:?}");
    if let Err(error) = journal.append(record).await {
        tracing::error!(%error, record = shown, "a record of the audit was not kept");
    }
}

fn record(identity: &str, role: &str, rpc: &str) -> AuditRecord {
    AuditRecord {
        time: Some(SystemTime::now().into()),
        identity: identity.to_owned(),
        role: role.to_owned(),
        rpc: cut(rpc.to_owned()),
        ..AuditRecord::default()
    }
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    text
}

/// As in google.rpc.Code.
fn status_word(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_beyond_the_rate_are_counted() {
        let start = Instant::now();
        let mut limit = Limit::new(start);
        for _ in 0..REFUSALS_BURST {
            assert_eq!(limit.admit(start), Some(0));
        }
        assert_eq!([(); 3].map(|()| limit.admit(start)), [None; 3]);
        assert_eq!(limit.admit(start + REFUSAL_INTERVAL), Some(3));
        assert_eq!(limit.admit(start + REFUSAL_INTERVAL), None);
    }
}
