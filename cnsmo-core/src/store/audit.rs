//! Who did what, as a chain: each record's hash covers the one before, so that none can be taken out unseen.

use ring::digest;

use super::{
    Revision, StoreError,
    engine::{Connection, EngineError, Repeated, Row, Sql, Value},
    types::check_text,
};

const LAST: Sql = Sql::Fixed("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1");
static INSERT: Repeated = Repeated::new(
    "INSERT INTO audit (seq, time_ms, identity, role, rpc, decision, status, rev, detail, hash) VALUES ",
    10,
    "",
);
const LIST: Sql = Sql::Fixed(
    "SELECT seq, time_ms, identity, role, rpc, decision, status, rev, detail, hash
     FROM audit WHERE seq > $1 ORDER BY seq LIMIT $2",
);
const PRUNE: Sql = Sql::Fixed(
    "DELETE FROM audit WHERE seq <= (SELECT max(seq) FROM audit) - $1
     AND seq < (SELECT min(seq) FROM audit) + $2",
);

/// One call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditRecord {
    /// When, in milliseconds since 1970.
    pub time_ms: i64,
    /// Who called.
    pub identity: String,
    /// As what.
    pub role: String,
    /// What was called.
    pub rpc: String,
    /// Whether it was allowed.
    pub decision: String,
    /// How it ended.
    pub status: String,
    /// Of its commit; 0: none.
    pub revision: Revision,
    /// What it was about.
    pub detail: String,
}

impl AuditRecord {
    fn texts(&self) -> [&str; 6] {
        [&self.identity, &self.role, &self.rpc, &self.decision, &self.status, &self.detail]
    }

    pub(super) fn check(&self) -> Result<(), StoreError> {
        self.texts().into_iter().try_for_each(check_text)
    }

    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + self.texts().iter().map(|text| text.len()).sum::<usize>()
    }
}

/// A record in its place in the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditRow {
    /// 1 and up, without gaps.
    pub seq: i64,
    /// What happened.
    pub record: AuditRecord,
    /// SHA-256 of the hash before (of the first: 32 zero bytes) and of `seq`, `time_ms`, `revision` and the texts, each with
    /// its length before it; numbers are 8 bytes, big-endian.
    pub hash: [u8; 32],
}

impl AuditRow {
    fn new(seq: i64, record: AuditRecord, previous: &[u8; 32]) -> Self {
        let hash = hash(seq, &record, previous);
        Self { seq, record, hash }
    }

    /// Whether this row is the one that was written after the row with this hash; none: the first row of all.
    pub fn follows(&self, previous: Option<&[u8; 32]>) -> bool {
        hash(self.seq, &self.record, previous.unwrap_or(&[0; 32])) == self.hash
    }
}

fn hash(seq: i64, record: &AuditRecord, previous: &[u8; 32]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(previous);
    for number in [seq, record.time_ms, record.revision] {
        context.update(&number.to_be_bytes());
    }
    for text in record.texts() {
        context.update(&(text.len() as u64).to_be_bytes());
        context.update(text.as_bytes());
    }
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

/// Appends to the chain, within a transaction that has locked `meta`.
pub(super) async fn append(
    connection: &mut dyn Connection,
    records: Vec<AuditRecord>,
) -> Result<(), EngineError> {
    if records.is_empty() {
        return Ok(());
    }
    let last = connection.fetch(&LAST, Vec::new(), usize::MAX).await?.rows;
    let (mut seq, mut previous) = match last.into_iter().next() {
        Some(mut row) => (row.int()?, hash_of(&mut row)?),
        None => (0, [0; 32]),
    };
    let mut values = Vec::with_capacity(records.len() * 10);
    for record in records {
        seq += 1;
        let row = AuditRow::new(seq, record, &previous);
        previous = row.hash;
        let AuditRecord { time_ms, identity, role, rpc, decision, status, revision, detail } =
            row.record;
        values.extend([seq.into(), time_ms.into(), identity.into(), role.into(), rpc.into()]);
        values.extend([decision.into(), status.into(), revision.into(), detail.into()]);
        values.push(Value::Blob(previous.to_vec().into()));
    }
    connection.insert(&INSERT, values).await.map(drop)
}

/// Records behind `after`, in order.
pub(super) async fn list(
    connection: &mut dyn Connection,
    after: i64,
    rows: i64,
) -> Result<Vec<AuditRow>, EngineError> {
    let args = vec![after.into(), rows.into()];
    let found = connection.fetch(&LIST, args, usize::MAX).await?.rows;
    found.into_iter().map(audit_row).collect()
}

/// Removes at most `rows` of the oldest records, so that `keep` stay. Returns how many.
pub(super) async fn prune(
    connection: &mut dyn Connection,
    keep: i64,
    rows: i64,
) -> Result<u64, EngineError> {
    connection.execute(&PRUNE, vec![keep.into(), rows.into()]).await
}

fn audit_row(mut row: Row) -> Result<AuditRow, EngineError> {
    let seq = row.int()?;
    let record = AuditRecord {
        time_ms: row.int()?,
        identity: row.text()?,
        role: row.text()?,
        rpc: row.text()?,
        decision: row.text()?,
        status: row.text()?,
        revision: row.int()?,
        detail: row.text()?,
    };
    Ok(AuditRow { seq, record, hash: hash_of(&mut row)? })
}

fn hash_of(row: &mut Row) -> Result<[u8; 32], EngineError> {
    let hash = row.blob()?;
    hash.as_ref().try_into().map_err(|_| EngineError::unexpected("a hash is not 32 bytes"))
}
