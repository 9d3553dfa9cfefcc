//! Backup and restore: the same rows in another database, of whichever engine.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    Revision, StoreConfig, StoreError,
    engine::{Connection, Engine as _, EngineError, Mode, ROWS_MAX, Sql, Value},
    read::{Readers, one},
    schema, sqlite,
};

/// Bytes of values that a copy has in memory.
const BYTES_MAX: usize = 8 << 20;

const META: Sql =
    Sql::Fixed("SELECT rev, compact_rev, epoch, msg_seq, fence FROM meta WHERE id = 1");
const SET_META: Sql = Sql::Fixed(
    "UPDATE meta SET rev = $1, compact_rev = $2, epoch = $3, msg_seq = $4, fence = $5 WHERE id = 1",
);

/// See [`super::Store::backup`].
pub(super) async fn backup(readers: &Readers, to: &Path) -> Result<Revision, StoreError> {
    let name = to.display().to_string();
    let open = |error| schema::open_error(&sqlite::File::new(to.to_owned()), error);
    let mut target = blocking(to, sqlite::File::create).await.map_err(open)?;
    let unfinished = Unfinished(Some(to.to_owned()));
    schema::prepare(&sqlite::File::new(to.to_owned()), target.as_mut()).await?;
    let mut reader = readers.take().await?;
    reader.begin(Mode::Snapshot).await?;
    target.begin(Mode::Write).await?;
    let revision = copy(&mut **reader, target.as_mut(), 0).await?;
    target.commit(None).await?;
    reader.commit(None).await?;
    reader.give_back();
    target.close().await?;
    unfinished.finish();
    tracing::info!(file = name, revision, "backup written");
    Ok(revision)
}

/// Puts a backup in place of the state, with a new epoch. The core must be down.
///
/// # Errors
/// [`StoreError::Damaged`] and [`StoreError::Open`] for a backup that is no sound one, [`StoreError::InUse`] for a database
/// on which cores run, [`StoreError::NotEmpty`] for a state that is there already, unless `force` replaces it. The state is
/// as before then.
pub async fn restore(
    config: &StoreConfig,
    from: &Path,
    force: bool,
) -> Result<Revision, StoreError> {
    let backup = sqlite::File::new(from.to_owned());
    let open = |error| schema::open_error(&backup, error);
    if !from.is_file() {
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(open(EngineError::Failed(missing.into())));
    }
    blocking(from, sqlite::check).await.map_err(open)?;
    let mut source = backup.reader().await.map_err(open)?;
    if !source.has_table("meta").await.map_err(open)? {
        return Err(open(EngineError::unexpected("it holds no state")));
    }
    source.begin(Mode::Snapshot).await?;
    let engine = config.open();
    let failed = |error| schema::open_error(engine.as_ref(), error);
    let mut target = engine.writer().await.map_err(failed)?;
    if !target.exclude().await.map_err(failed)? {
        return Err(StoreError::InUse { name: engine.name() });
    }
    schema::prepare(engine.as_ref(), target.as_mut()).await?;
    target.begin(Mode::Write).await.map_err(failed)?;
    let (revision, epoch) = meta_of(target.as_mut()).await.map_err(failed)?;
    if revision > 0 && !force {
        target.rollback().await;
        return Err(StoreError::NotEmpty { name: engine.name() });
    }
    for (table, _) in schema::TABLES {
        let delete = Sql::Made(format!("DELETE FROM {table}").into());
        target.execute(&delete, Vec::new()).await.map_err(failed)?;
    }
    // Above both: whoever knows a later state of either must learn that it was taken back.
    let revision = copy(source.as_mut(), target.as_mut(), epoch).await.map_err(failed)?;
    target.commit(None).await.map_err(failed)?;
    target.close().await.map_err(failed)?;
    Ok(revision)
}

async fn meta_of(connection: &mut dyn Connection) -> Result<(Revision, i64), EngineError> {
    let mut meta = one(connection.fetch(&META, Vec::new(), usize::MAX).await?.rows)?;
    let (revision, _, epoch) = (meta.int()?, meta.int()?, meta.int()?);
    Ok((revision, epoch))
}

/// Copies all rows into empty tables, within a transaction of each. The epoch is raised above `above`, unless that is 0.
async fn copy(
    from: &mut dyn Connection,
    to: &mut dyn Connection,
    above: i64,
) -> Result<Revision, EngineError> {
    let mut meta = one(from.fetch(&META, Vec::new(), usize::MAX).await?.rows)?.rest();
    let [Value::Int(revision), _, Value::Int(epoch), ..] = &mut meta[..] else {
        return Err(EngineError::unexpected("the row of meta has other columns"));
    };
    let revision = *revision;
    if above > 0 {
        *epoch = (*epoch).max(above) + 1;
    }
    to.execute(&SET_META, meta).await?;
    for (table, order) in schema::TABLES {
        copy_table(from, to, table, order).await?;
    }
    Ok(revision)
}

/// In pages behind the last row's key.
async fn copy_table(
    from: &mut dyn Connection,
    to: &mut dyn Connection,
    table: &str,
    order: &str,
) -> Result<(), EngineError> {
    let columns = schema::columns(table);
    let keys: Vec<usize> = order
        .split(", ")
        .filter_map(|key| columns.iter().position(|column| *column == key))
        .collect();
    let list = columns.join(", ");
    let places = |from: usize, n: usize| {
        (from..from + n).map(|n| format!("${n}")).collect::<Vec<_>>().join(", ")
    };
    let first = format!("SELECT {list} FROM {table} ORDER BY {order} LIMIT {ROWS_MAX}");
    let next = format!(
        "SELECT {list} FROM {table} WHERE ({order}) > ({}) ORDER BY {order} LIMIT {ROWS_MAX}",
        places(1, keys.len())
    );
    let put = format!("INSERT INTO {table} ({list}) VALUES ({})", places(1, columns.len()));
    let (first, next, put) =
        (Sql::Made(first.into()), Sql::Made(next.into()), Sql::Made(put.into()));
    let mut page = from.fetch(&first, Vec::new(), BYTES_MAX).await?;
    while !page.rows.is_empty() {
        let mut last = Vec::new();
        for row in page.rows {
            let row = row.rest();
            last = keys.iter().filter_map(|key| row.get(*key).cloned()).collect();
            to.execute(&put, row).await?;
        }
        page = from.fetch(&next, last, BYTES_MAX).await?;
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce(&Path) -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    let path = path.to_owned();
    let task = tokio::task::spawn_blocking(move || work(&path));
    task.await.map_err(|error| EngineError::Failed(error.into()))?
}

/// A file that is removed unless it was finished.
struct Unfinished(Option<PathBuf>);

impl Unfinished {
    fn finish(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let Some(path) = &self.0 else { return };
        for suffix in ["", "-wal", "-shm"] {
            let mut name = path.clone().into_os_string();
            name.push(suffix);
            // It may not be there; there is nobody to tell.
            let _ = fs::remove_file(name);
        }
    }
}
