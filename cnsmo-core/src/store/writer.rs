//! The one task that writes.

use std::time::{SystemTime, UNIX_EPOCH};

use sqlx::{Connection as _, QueryBuilder, Row as _, Sqlite, SqliteConnection};
use tokio::sync::{mpsc, oneshot};

use super::{Compare, HashMap, Job, Op, Outcome, Revision, StoreError, Txn, audit};

/// Transactions in one commit: enough to share an fsync, few enough that the first of them does not wait long.
const GROUP_MAX: usize = 256;
/// Rows in one statement: 1,000 rows of seven values stay far below SQLite's 32,766 parameters.
const ROWS_MAX: usize = 1_000;
/// Log rows that compaction removes between two groups.
const COMPACT_ROWS_MAX: i64 = 1_000;

type Answer = oneshot::Sender<Result<Outcome, StoreError>>;

pub(super) async fn run(mut connection: SqliteConnection, mut jobs: mpsc::Receiver<Job>) {
    let mut arrived = Vec::with_capacity(GROUP_MAX);
    let mut compact_to = None;
    loop {
        if compact_to.is_none() || !jobs.is_empty() {
            if jobs.recv_many(&mut arrived, GROUP_MAX).await == 0 {
                break;
            }
            let mut group = Vec::with_capacity(arrived.len());
            let mut records = Vec::new();
            for job in arrived.drain(..) {
                match job {
                    Job::Commit { txn, answer } => group.push((txn, answer)),
                    Job::Compact { upto } => compact_to = Some(upto),
                    Job::Audit { record, answer } => records.push((record, answer)),
                }
            }
            commit_and_answer(&mut connection, group).await;
            for (record, answer) in records {
                // A caller that went away needs no answer.
                let _ = answer.send(audit::append(&mut connection, *record).await);
            }
        }
        if let Some(upto) = compact_to {
            match compact_slice(&mut connection, upto).await {
                Ok(true) => {}
                Ok(false) => compact_to = None,
                Err(error) => {
                    tracing::warn!(%error, "cannot compact the log");
                    compact_to = None;
                }
            }
        }
    }
    if let Err(error) = connection.close().await {
        tracing::warn!(%error, "cannot close the state file");
    }
}

async fn commit_and_answer(connection: &mut SqliteConnection, group: Vec<(Txn, Answer)>) {
    if group.is_empty() {
        return;
    }
    let (txns, answers): (Vec<Txn>, Vec<Answer>) = group.into_iter().unzip();
    match commit(connection, txns).await {
        Ok(outcomes) => {
            for (answer, outcome) in answers.into_iter().zip(outcomes) {
                // A caller that went away needs no answer.
                let _ = answer.send(Ok(outcome));
            }
        }
        Err(error) => {
            let error = StoreError::from(error);
            tracing::error!(%error, transactions = answers.len(), "commit failed");
            for answer in answers {
                let _ = answer.send(Err(error.clone()));
            }
        }
    }
}

struct LogRow {
    revision: Revision,
    sub: i64,
    op: Op,
    previous: Revision,
}

async fn commit(
    connection: &mut SqliteConnection,
    txns: Vec<Txn>,
) -> Result<Vec<Outcome>, sqlx::Error> {
    // A read transaction that turns into a write is not covered by the busy timeout.
    sqlx::query("BEGIN IMMEDIATE").execute(&mut *connection).await?;
    let mut result = commit_group(connection, txns).await;
    if result.is_ok()
        && let Err(error) = sqlx::query("COMMIT").execute(&mut *connection).await
    {
        result = Err(error);
    }
    if result.is_err() {
        rollback(connection).await;
    }
    result
}

/// A full disk ends SQLite's transaction by itself, which sqlx's own transactions do not notice: they would refuse all
/// later ones. So this module speaks SQL, and a rollback without a transaction is no error.
async fn rollback(connection: &mut SqliteConnection) {
    if let Err(error) = sqlx::query("ROLLBACK").execute(connection).await {
        tracing::debug!(%error, "nothing to roll back");
    }
}

async fn commit_group(
    connection: &mut SqliteConnection,
    txns: Vec<Txn>,
) -> Result<Vec<Outcome>, sqlx::Error> {
    let last: Revision =
        sqlx::query_scalar("SELECT rev FROM meta WHERE id = 1").fetch_one(&mut *connection).await?;
    let mut present = present(connection, &txns).await?;
    let mut rows = Vec::new();
    let mut revision = last;
    let outcomes =
        txns.into_iter().map(|txn| settle(txn, &mut revision, &mut present, &mut rows)).collect();
    if revision == last {
        return Ok(outcomes);
    }
    sqlx::query("UPDATE meta SET rev = $1 WHERE id = 1")
        .bind(revision)
        .execute(&mut *connection)
        .await?;
    write(connection, rows, last + 1).await?;
    Ok(outcomes)
}

/// Decides one transaction, in view of those before it in the group.
fn settle(
    txn: Txn,
    revision: &mut Revision,
    present: &mut HashMap<String, Revision>,
    rows: &mut Vec<LogRow>,
) -> Outcome {
    let of =
        |present: &HashMap<String, Revision>, key: &str| present.get(key).copied().unwrap_or(0);
    let failed = txn.compares.iter().find(|c| of(present, &c.key) != c.mod_rev);
    if let Some(Compare { key, .. }) = failed {
        return Outcome::CompareFailed(Compare { key: key.clone(), mod_rev: of(present, key) });
    }
    if txn.ops.is_empty() {
        return Outcome::Committed(*revision);
    }
    *revision += 1;
    for (sub, op) in (0..).zip(txn.ops) {
        let previous = match &op {
            Op::Put { key, .. } => present.insert(key.clone(), *revision),
            Op::Delete { key } => present.remove(key),
        };
        rows.push(LogRow { revision: *revision, sub, op, previous: previous.unwrap_or(0) });
    }
    Outcome::Committed(*revision)
}

/// The revisions of all keys that the group names.
async fn present(
    connection: &mut SqliteConnection,
    txns: &[Txn],
) -> Result<HashMap<String, Revision>, sqlx::Error> {
    let mut keys: Vec<&str> = txns
        .iter()
        .flat_map(|txn| {
            txn.compares.iter().map(|c| c.key.as_str()).chain(txn.ops.iter().map(Op::key))
        })
        .collect();
    keys.sort_unstable();
    keys.dedup();
    let mut present = HashMap::with_capacity(keys.len());
    for some in keys.chunks(ROWS_MAX) {
        let mut query = QueryBuilder::<Sqlite>::new("SELECT key, mod_rev FROM kv WHERE key IN (");
        let mut list = query.separated(", ");
        for key in some {
            list.push_bind((*key).to_owned());
        }
        query.push(")");
        for row in query.build().fetch_all(&mut *connection).await? {
            present.insert(row.try_get(0)?, row.try_get(1)?);
        }
    }
    Ok(present)
}

async fn write(
    connection: &mut SqliteConnection,
    rows: Vec<LogRow>,
    first: Revision,
) -> Result<(), sqlx::Error> {
    let time = now_ms();
    let deletes = rows.iter().any(|row| matches!(row.op, Op::Delete { .. }));
    let mut rows = rows.into_iter().peekable();
    while rows.peek().is_some() {
        let mut log = QueryBuilder::<Sqlite>::new(
            "INSERT INTO log (rev, sub, op, key, value, prev_rev, time_ms) ",
        );
        log.push_values(rows.by_ref().take(ROWS_MAX), |mut values, row| {
            let (op, key, value) = match row.op {
                Op::Put { key, value } => (1, key, Some(value)),
                Op::Delete { key } => (2, key, None),
            };
            values
                .push_bind(row.revision)
                .push_bind(row.sub)
                .push_bind(op)
                .push_bind(key)
                .push_bind(value)
                .push_bind(row.previous)
                .push_bind(time);
        });
        log.build().execute(&mut *connection).await?;
    }
    if deletes {
        sqlx::query("DELETE FROM kv WHERE key IN (SELECT key FROM log WHERE rev >= $1 AND op = 2)")
            .bind(first)
            .execute(&mut *connection)
            .await?;
    }
    // In the order of revisions, so that the last put of a key wins; puts before a delete of their key do not count.
    sqlx::query(
        "INSERT INTO kv (key, value, create_rev, mod_rev, version)
         SELECT key, value, rev, rev, 1 FROM log AS put
         WHERE rev >= $1 AND op = 1 AND NOT EXISTS (
           SELECT 1 FROM log AS gone
           WHERE gone.key = put.key AND gone.op = 2 AND (gone.rev, gone.sub) > (put.rev, put.sub)
         )
         ORDER BY rev, sub
         ON CONFLICT (key) DO UPDATE
         SET value = excluded.value, mod_rev = excluded.mod_rev, version = kv.version + 1",
    )
    .bind(first)
    .execute(&mut *connection)
    .await?;
    Ok(())
}

/// Removes some log rows up to `upto` that a newer one of them supersedes, and deletes. The newest put of each key stays,
/// so that the past at `upto` can still be read. Returns whether there may be more.
async fn compact_slice(
    connection: &mut SqliteConnection,
    upto: Revision,
) -> Result<bool, sqlx::Error> {
    // One statement at a time is enough: a cut that outruns its deletes is made good by the next slice.
    sqlx::query("UPDATE meta SET compact_rev = max(compact_rev, $1) WHERE id = 1")
        .bind(upto)
        .execute(&mut *connection)
        .await?;
    // Oldest first: a delete must outlive the puts that it hides.
    let removed = sqlx::query(
        "DELETE FROM log WHERE rowid IN (
           SELECT rowid FROM log AS old WHERE rev <= $1 AND (op = 2 OR EXISTS (
             SELECT 1 FROM log AS new
             WHERE new.key = old.key AND (new.rev, new.sub) > (old.rev, old.sub) AND new.rev <= $1
           )) ORDER BY rev, sub LIMIT $2
         )",
    )
    .bind(upto)
    .bind(COMPACT_ROWS_MAX)
    .execute(&mut *connection)
    .await?
    .rows_affected();
    if removed == COMPACT_ROWS_MAX.cast_unsigned() {
        return Ok(true);
    }
    tracing::debug!(upto, "log compacted");
    sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(connection).await?;
    Ok(false)
}

pub(super) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
