//! The audit's table: written by the writer, a record at a time.

use std::time::{Duration, UNIX_EPOCH};

use cnsmo_proto::pb::identity::AuditRecord;
use cnsmo_service::audit;
use sqlx::{Row as _, SqliteConnection, SqlitePool, sqlite::SqliteRow};
use tokio::sync::{mpsc, oneshot};

use super::{Job, StoreError};
use crate::{audit::Journal, error::Error};

const COLUMNS: &str = "seq, time_ms, identity, role, rpc, decision, status, rev, detail, hash";

/// The audit of a store; it does not keep the store open.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) queue: mpsc::WeakSender<Job>,
    pub(super) readers: SqlitePool,
}

#[tonic::async_trait]
impl Journal for Table {
    async fn append(&self, record: AuditRecord) -> Result<(), Error> {
        let queue = self.queue.upgrade().ok_or(StoreError::Closed)?;
        let (answer, done) = oneshot::channel();
        let job = Job::Audit { record: Box::new(record), answer };
        queue.send(job).await.map_err(|_| StoreError::Closed)?;
        drop(queue);
        Ok(done.await.map_err(|_| StoreError::Closed)??)
    }

    async fn list(&self, after: i64, rows: usize) -> Result<Vec<AuditRecord>, Error> {
        let sql = format!("SELECT {COLUMNS} FROM audit WHERE seq > $1 ORDER BY seq LIMIT $2");
        let found = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(after)
            .bind(i64::try_from(rows).unwrap_or(i64::MAX))
            .fetch_all(&self.readers)
            .await
            .map_err(StoreError::from)?;
        let records: Result<Vec<_>, sqlx::Error> = found.iter().map(read).collect();
        Ok(records.map_err(StoreError::from)?)
    }
}

fn read(row: &SqliteRow) -> Result<AuditRecord, sqlx::Error> {
    let ms = u64::try_from(row.try_get::<i64, _>(1)?).unwrap_or_default();
    let time = UNIX_EPOCH.checked_add(Duration::from_millis(ms));
    Ok(AuditRecord {
        sequence: row.try_get(0)?,
        time: time.map(Into::into),
        identity: row.try_get(2)?,
        role: row.try_get(3)?,
        rpc: row.try_get(4)?,
        decision: row.try_get(5)?,
        status: row.try_get(6)?,
        revision: row.try_get(7)?,
        detail: row.try_get(8)?,
        hash: row.try_get(9)?,
    })
}

/// Only one task writes: nothing comes between the two statements.
pub(super) async fn append(
    connection: &mut SqliteConnection,
    mut record: AuditRecord,
) -> Result<(), StoreError> {
    let last = sqlx::query("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")
        .fetch_optional(&mut *connection)
        .await?;
    let (seq, previous): (i64, Vec<u8>) = match last {
        Some(row) => (row.try_get(0)?, row.try_get(1)?),
        None => (0, vec![0; 32]),
    };
    record.sequence = seq + 1;
    let hash = audit::hash(&previous, &record).to_vec();
    let sql =
        format!("INSERT INTO audit ({COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)");
    sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(record.sequence)
        .bind(audit::time_ms(&record))
        .bind(record.identity)
        .bind(record.role)
        .bind(record.rpc)
        .bind(record.decision)
        .bind(record.status)
        .bind(record.revision)
        .bind(record.detail)
        .bind(hash)
        .execute(connection)
        .await?;
    Ok(())
}
