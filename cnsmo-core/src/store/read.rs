//! Reading: short, on connections of their own, next to the one task that writes.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    AuditRow, Change, Commit, Entry, Event, KEY_BYTES_MAX, Lease, Range, Retention, Revision,
    Slice, Store, StoreError, StoreStatus, audit,
    engine::{Connection, Engine, EngineError, Mode, Row, Sql},
    group,
    writer::now_ms,
};

/// Connections for reading: reads are short and few, and more would only compete for the disk.
const READERS_MAX: usize = 4;
/// Bytes that one look at the log takes into memory, unless one transaction alone is larger.
const LOG_BYTES_MAX: usize = 8 << 20;

const META: Sql = Sql::Fixed("SELECT rev, compact_rev, epoch FROM meta WHERE id = 1");
const COUNT: Sql = Sql::Fixed("SELECT count(*) FROM kv");
const GET: Sql = Sql::Fixed(
    "SELECT meta.rev, kv.key, kv.value, kv.content_type, kv.create_rev, kv.mod_rev, kv.version, kv.lease_id
     FROM meta LEFT JOIN kv ON kv.key = $1 WHERE meta.id = 1",
);
const RANGE: Sql = Sql::Fixed(
    "SELECT key, value, content_type, create_rev, mod_rev, version, lease_id
     FROM kv WHERE key >= $1 AND key < $2 ORDER BY key LIMIT $3",
);
const RANGE_OF_KEYS: Sql = Sql::Fixed(
    "SELECT key, NULL, content_type, create_rev, mod_rev, version, lease_id
     FROM kv WHERE key >= $1 AND key < $2 ORDER BY key LIMIT $3",
);
/// Keys that have not changed since, and of each that has the put before its first change after that revision. A key that
/// was absent has no such put.
const RANGE_AT: Sql = Sql::Fixed(
    "SELECT key, value, content_type, create_rev, mod_rev, version, lease_id
     FROM kv WHERE key >= $1 AND key < $2 AND mod_rev <= $3
     UNION ALL
     SELECT old.key, old.value, old.content_type, old.create_rev, old.rev, old.version, old.lease_id
     FROM log AS new JOIN log AS old ON old.rev = new.prev_rev AND old.key = new.key
     WHERE new.rev > $3 AND new.prev_rev > 0 AND new.prev_rev <= $3 AND new.key >= $1 AND new.key < $2
     AND NOT EXISTS (SELECT 1 FROM log AS later
       WHERE later.rev = old.rev AND later.key = old.key AND later.sub > old.sub)
     ORDER BY key LIMIT $4",
);
const RANGE_OF_KEYS_AT: Sql = Sql::Fixed(
    "SELECT key, NULL, content_type, create_rev, mod_rev, version, lease_id
     FROM kv WHERE key >= $1 AND key < $2 AND mod_rev <= $3
     UNION ALL
     SELECT old.key, NULL, old.content_type, old.create_rev, old.rev, old.version, old.lease_id
     FROM log AS new JOIN log AS old ON old.rev = new.prev_rev AND old.key = new.key
     WHERE new.rev > $3 AND new.prev_rev > 0 AND new.prev_rev <= $3 AND new.key >= $1 AND new.key < $2
     AND NOT EXISTS (SELECT 1 FROM log AS later
       WHERE later.rev = old.rev AND later.key = old.key AND later.sub > old.sub)
     ORDER BY key LIMIT $4",
);
/// The last change of a key in one revision.
const VALUE_OF: Sql = Sql::Fixed(
    "SELECT op, key, value, content_type, create_rev, rev, version, lease_id
     FROM log WHERE rev = $1 AND key = $2 ORDER BY sub DESC LIMIT 1",
);
/// What is not compacted when it is read is whole.
const LOG: Sql = Sql::Fixed(
    "SELECT (SELECT compact_rev FROM meta WHERE id = 1),
       op, prev_rev, key, value, content_type, create_rev, rev, version, lease_id
     FROM log WHERE rev > $1 AND rev <= $2 ORDER BY rev, sub LIMIT $3",
);
const LOG_OF: Sql = Sql::Fixed(
    "SELECT op, prev_rev, key, value, content_type, create_rev, rev, version, lease_id
     FROM log WHERE rev = $1 ORDER BY sub",
);
const LEASES: Sql = Sql::Fixed(
    "SELECT lease_id, owner, ttl_ms, fence, holder, holder_epoch FROM lease ORDER BY lease_id",
);
/// Of the changes that need not be kept, the newest.
const CUT: Sql = Sql::Fixed(
    "SELECT max(rev) FROM (
       SELECT rev, time_ms, row_number() OVER newest AS place, sum(length(value)) OVER newest AS size
       FROM log WINDOW newest AS (ORDER BY rev DESC, sub DESC)
     ) AS sized WHERE place > $1 OR size > $2 OR time_ms < $3",
);

impl Store {
    /// A key, and the revision of the state that was read.
    ///
    /// # Errors
    /// [`StoreError::Database`], as for all that reads.
    pub async fn get(&self, key: &str) -> Result<(Option<Entry>, Revision), StoreError> {
        let mut reader = self.inner.readers.take().await?;
        let rows = reader.fetch(&GET, vec![key.into()], usize::MAX).await?.rows;
        let mut row = one(rows)?;
        let revision = row.int()?;
        let entry = entry(row)?;
        reader.give_back();
        Ok(((!entry.key.is_empty()).then_some(entry), revision))
    }

    /// Keys in order.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] and [`StoreError::Ahead`] if the state at `query.at` cannot be read.
    pub async fn range(&self, query: Range) -> Result<Slice, StoreError> {
        let mut reader = self.inner.readers.take().await?;
        reader.begin(Mode::Snapshot).await?;
        let (newest, compacted, _) = meta(&mut **reader).await?;
        let at = query.at.unwrap_or(newest);
        if at > newest {
            return Err(StoreError::Ahead { at: newest });
        }
        if at < compacted {
            return Err(StoreError::Compacted { at: compacted });
        }
        // Nothing is between a key and itself with the least character that a key may contain.
        let start = query.after.map_or(query.prefix.clone(), |after| after + "\u{1}");
        let limit = i64::try_from(query.rows).unwrap_or(i64::MAX).saturating_add(1);
        let end = prefix_end(&query.prefix);
        let mut args = vec![start.max(query.prefix).into(), end.into()];
        let sql = match (at == newest, query.keys_only) {
            (true, false) => RANGE,
            (true, true) => RANGE_OF_KEYS,
            (false, false) => RANGE_AT,
            (false, true) => RANGE_OF_KEYS_AT,
        };
        if at != newest {
            args.push(at.into());
        }
        args.push(limit.into());
        let found = reader.fetch(&sql, args, query.bytes).await?;
        reader.commit(None).await?;
        reader.give_back();
        let mut entries = found.rows.into_iter().map(entry).collect::<Result<Vec<_>, _>>()?;
        let more = found.cut || entries.len() > query.rows;
        entries.truncate(query.rows);
        Ok(Slice { entries, revision: at, more })
    }

    /// A key as it was. Quick at a revision in which it changed; else it takes a look at all changes since then.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if that is gone.
    pub async fn value_at(
        &self,
        key: &str,
        revision: Revision,
    ) -> Result<Option<Entry>, StoreError> {
        let mut reader = self.inner.readers.take().await?;
        let args = vec![revision.into(), key.into()];
        let changed = reader.fetch(&VALUE_OF, args, usize::MAX).await?.rows;
        let found = match changed.into_iter().next() {
            Some(mut row) => (row.int()? == 1).then_some(row),
            None => {
                let end = format!("{key}\u{1}");
                let args = vec![key.into(), end.into(), revision.into(), 1.into()];
                reader.fetch(&RANGE_AT, args, usize::MAX).await?.rows.into_iter().next()
            }
        };
        // Afterwards: what is not compacted now was not when it was read.
        let (_, compacted, _) = meta(&mut **reader).await?;
        reader.give_back();
        if revision < compacted {
            return Err(StoreError::Compacted { at: compacted });
        }
        Ok(found.map(entry).transpose()?)
    }

    /// Commits in order, whole, from the first one after `after`: about `rows` changes, or fewer if they are large.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] if some of them are gone.
    pub async fn log_after(&self, after: Revision, rows: usize) -> Result<Vec<Commit>, StoreError> {
        self.inner.readers.log_between(after, Revision::MAX, rows).await
    }

    /// All leases.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn leases(&self) -> Result<Vec<Lease>, StoreError> {
        let mut reader = self.inner.readers.take().await?;
        let rows = reader.fetch(&LEASES, Vec::new(), usize::MAX).await?.rows;
        reader.give_back();
        Ok(rows.into_iter().map(group::lease).collect::<Result<_, _>>()?)
    }

    /// Records of the audit behind `after`, in order.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn list_audit(&self, after: i64, rows: usize) -> Result<Vec<AuditRow>, StoreError> {
        let mut reader = self.inner.readers.take().await?;
        let rows = i64::try_from(rows).unwrap_or(i64::MAX);
        let found = audit::list(&mut **reader, after, rows).await?;
        reader.give_back();
        Ok(found)
    }

    /// Where the store stands.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn status(&self) -> Result<StoreStatus, StoreError> {
        let mut reader = self.inner.readers.take().await?;
        let (revision, compacted, epoch) = meta(&mut **reader).await?;
        let mut count = one(reader.fetch(&COUNT, Vec::new(), usize::MAX).await?.rows)?;
        let keys = count.int()?.cast_unsigned();
        let (bytes, wal_bytes) = reader.size().await?;
        reader.give_back();
        let engine = self.inner.readers.engine.kind();
        Ok(StoreStatus { engine, revision, compacted, epoch, keys, bytes, wal_bytes })
    }
}

/// The least text behind all keys that start with `prefix`.
pub(super) fn prefix_end(prefix: &str) -> String {
    let mut end = prefix.to_owned();
    while let Some(last) = end.pop() {
        // UTF-8 is in the order of code points.
        if let Some(next) = (last..=char::MAX).nth(1) {
            end.push(next);
            return end;
        }
    }
    // Longer than any key, of the last character.
    char::MAX.to_string().repeat(KEY_BYTES_MAX / char::MAX.len_utf8() + 1)
}

/// Connections for reading.
#[derive(Clone)]
pub(super) struct Readers {
    engine: Arc<dyn Engine>,
    permits: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<Box<dyn Connection>>>>,
}

impl Readers {
    pub(super) fn new(engine: Arc<dyn Engine>) -> Self {
        Self { engine, permits: Arc::new(Semaphore::new(READERS_MAX)), idle: Arc::default() }
    }

    pub(super) fn close(&self) {
        self.permits.close();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    pub(super) async fn take(&self) -> Result<Reader, StoreError> {
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.engine.reader().await?,
        };
        Ok(Reader { connection, idle: self.idle.clone(), permit })
    }

    pub(super) async fn epoch(&self) -> Result<u64, StoreError> {
        let mut reader = self.take().await?;
        let (_, _, epoch) = meta(&mut **reader).await?;
        reader.give_back();
        Ok(epoch)
    }

    pub(super) async fn log_between(
        &self,
        after: Revision,
        upto: Revision,
        rows: usize,
    ) -> Result<Vec<Commit>, StoreError> {
        let rows = rows.clamp(1, i64::MAX as usize);
        let mut reader = self.take().await?;
        let args = vec![after.into(), upto.into(), (rows as i64).into()];
        let mut found = reader.fetch(&LOG, args, LOG_BYTES_MAX).await?;
        let cut = found.cut || found.rows.len() == rows;
        let mut compacted = 0;
        for row in &mut found.rows {
            compacted = row.int()?;
        }
        if found.rows.is_empty() {
            compacted = meta(&mut **reader).await?.1;
        }
        let mut commits = commits(found.rows)?;
        // The last one may lack its end.
        if cut
            && let Some(last) = commits.pop()
            && commits.is_empty()
        {
            let found = reader.fetch(&LOG_OF, vec![last.revision.into()], usize::MAX).await?;
            commits = self::commits(found.rows)?;
            compacted = meta(&mut **reader).await?.1;
        }
        reader.give_back();
        if after < compacted {
            return Err(StoreError::Compacted { at: compacted });
        }
        Ok(commits)
    }

    /// The newest revision that need not be kept, if it is above what was compacted already.
    pub(super) async fn cut(&self, retention: Retention) -> Result<Option<Revision>, StoreError> {
        let age = i64::try_from(retention.age.as_millis()).unwrap_or(i64::MAX);
        let oldest_ms = now_ms().saturating_sub(age);
        let mut reader = self.take().await?;
        let args = vec![retention.rows.into(), retention.bytes.into(), oldest_ms.into()];
        let mut row = one(reader.fetch(&CUT, args, usize::MAX).await?.rows)?;
        let (_, compacted, _) = meta(&mut **reader).await?;
        reader.give_back();
        let upto = row.int()?;
        Ok((upto > compacted).then_some(upto))
    }
}

/// A connection in use. Dropped before [`Self::give_back`] it is closed: it may be within a transaction.
pub(super) struct Reader {
    connection: Box<dyn Connection>,
    idle: Arc<Mutex<Vec<Box<dyn Connection>>>>,
    permit: OwnedSemaphorePermit,
}

impl Reader {
    pub(super) fn give_back(self) {
        let Self { connection, idle, permit } = self;
        if !permit.semaphore().is_closed() {
            idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        }
    }
}

impl Deref for Reader {
    type Target = Box<dyn Connection>;

    fn deref(&self) -> &Self::Target {
        &self.connection
    }
}

impl DerefMut for Reader {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.connection
    }
}

/// Newest revision, compacted up to, epoch.
pub(super) async fn meta(
    connection: &mut dyn Connection,
) -> Result<(Revision, Revision, u64), EngineError> {
    let mut row = one(connection.fetch(&META, Vec::new(), usize::MAX).await?.rows)?;
    Ok((row.int()?, row.int()?, row.int()?.cast_unsigned()))
}

pub(super) fn one(rows: Vec<Row>) -> Result<Row, EngineError> {
    rows.into_iter().next().ok_or_else(|| EngineError::unexpected("a row is missing"))
}

fn entry(mut row: Row) -> Result<Entry, EngineError> {
    Ok(Entry {
        key: row.text()?,
        value: row.blob()?,
        content_type: row.text()?,
        create_revision: row.int()?,
        mod_revision: row.int()?,
        version: row.int()?,
        lease: row.int()?,
    })
}

fn commits(rows: Vec<Row>) -> Result<Vec<Commit>, EngineError> {
    let mut commits: Vec<Commit> = Vec::new();
    for mut row in rows {
        let change = match row.int()? {
            1 => Change::Put,
            2 => Change::Delete,
            3 => Change::Expire,
            _ => return Err(EngineError::unexpected("a change of another kind")),
        };
        let prev_revision = row.int()?;
        let entry = entry(row)?;
        let revision = entry.mod_revision;
        let event = Event { revision, change, entry, prev_revision };
        match commits.last_mut() {
            Some(last) if last.revision == revision => last.events.push(event),
            _ => commits.push(Commit { revision, events: vec![event] }),
        }
    }
    Ok(commits)
}
