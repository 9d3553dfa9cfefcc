//! The engine for one core: one SQLite file.

use std::{
    fs::{self, OpenOptions, Permissions},
    io::{self, Seek as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use rusqlite::{
    ErrorCode, OpenFlags, params_from_iter,
    types::{ToSqlOutput, ValueRef},
};

use super::{
    Revision,
    engine::{Connection, Engine, EngineError, Mode, Row, Rows, Sql, Value},
    schema,
};

/// How long a connection waits for a lock that another one holds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Prepared statements kept per connection: more than there are.
const STATEMENTS_MAX: usize = 256;
/// Cached pages of a connection, in KiB (negative by SQLite's convention): the index of some 100,000 keys.
const CACHE_KIB: i64 = -32_768;
/// Pages of the write-ahead log (of 4 KiB) after which a commit folds it into the file. Larger than SQLite's own 1,000,
/// because each folding costs two fsyncs and many keys are written more than once in between.
const CHECKPOINT_PAGES: i64 = 8_192;
/// How much of the write-ahead log's file stays for re-use when it was larger.
const WAL_BYTES_KEPT: i64 = 64 << 20;
/// What the write-ahead log needs between two foldings, and a group of commits more. A sync of a file that grows writes its
/// metadata too, which takes half as long again.
const WAL_BYTES_RESERVED: u64 = (CHECKPOINT_PAGES as u64 + 1_024) * (4_096 + 24);
/// Commits after which the file gets that size at once: who writes so much will write more.
const COMMITS_BEFORE_RESERVE: u32 = 500;

/// A database file.
#[derive(Debug)]
pub(super) struct File {
    path: PathBuf,
}

impl File {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Makes a file that only its owner can read, and opens it for writing. It must not exist.
    pub(super) fn create(path: &Path) -> Result<Box<dyn Connection>, EngineError> {
        let create = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        create.and_then(|file| file.sync_all()).map_err(io_error)?;
        open_blocking(path)
    }
}

/// For a thread of its own: each call blocks it.
pub(super) fn open_blocking(path: &Path) -> Result<Box<dyn Connection>, EngineError> {
    let connection = rusqlite::Connection::open(path).map_err(failed)?;
    connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    connection.pragma_update(None, "cache_size", CACHE_KIB).map_err(failed)?;
    connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES).map_err(failed)?;
    connection.pragma_update(None, "journal_size_limit", WAL_BYTES_KEPT).map_err(failed)?;
    let sqlite = Sqlite {
        path: path.to_owned(),
        connection: Some(prepare(connection)?),
        shared: false,
        commits: 0,
    };
    Ok(Box::new(sqlite))
}

fn open_reader(path: &Path) -> Result<rusqlite::Connection, EngineError> {
    // Not read-only: such a connection could not recover the log that a killed process left behind.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = rusqlite::Connection::open_with_flags(path, flags).map_err(failed)?;
    connection.pragma_update(None, "query_only", true).map_err(failed)?;
    prepare(connection)
}

fn prepare(connection: rusqlite::Connection) -> Result<rusqlite::Connection, EngineError> {
    connection.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    Ok(connection)
}

#[async_trait]
impl Engine for File {
    async fn writer(&self) -> Result<Box<dyn Connection>, EngineError> {
        if let Ok(metadata) = fs::metadata(&self.path) {
            check(&self.path)?;
            // It holds secrets' hashes.
            if metadata.permissions().mode() & 0o077 != 0 {
                fs::set_permissions(&self.path, Permissions::from_mode(0o600)).map_err(io_error)?;
            }
            return open_blocking(&self.path);
        }
        Self::create(&self.path)
    }

    async fn reader(&self) -> Result<Box<dyn Connection>, EngineError> {
        let sqlite = Sqlite { path: self.path.clone(), connection: None, shared: true, commits: 0 };
        Ok(Box::new(sqlite))
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn kind(&self) -> &'static str {
        "sqlite"
    }

    fn schema(&self) -> String {
        schema::SQLITE.to_owned()
    }

    async fn wake(&self) -> Revision {
        // The file is this core's alone.
        std::future::pending().await
    }
}

/// Refuses a file that is no sound database.
pub(super) fn check(path: &Path) -> Result<(), EngineError> {
    let connection = rusqlite::Connection::open(path).map_err(failed)?;
    connection.busy_timeout(BUSY_TIMEOUT).map_err(failed)?;
    let verdict: String =
        connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(failed)?;
    if verdict == "ok" { Ok(()) } else { Err(EngineError::Damaged(verdict.into())) }
}

struct Sqlite {
    path: PathBuf,
    /// None: not yet opened, or lost with a future that was dropped.
    connection: Option<rusqlite::Connection>,
    /// Calls come from tasks that must not be held up.
    shared: bool,
    commits: u32,
}

impl Sqlite {
    async fn run<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut rusqlite::Connection) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, EngineError> {
        if !self.shared {
            return match &mut self.connection {
                Some(connection) => work(connection),
                None => Err(EngineError::unexpected("the connection is closed")),
            };
        }
        let (connection, path) = (self.connection.take(), self.path.clone());
        let task = tokio::task::spawn_blocking(move || {
            let mut connection = match connection {
                Some(connection) => connection,
                None => open_reader(&path)?,
            };
            let result = work(&mut connection);
            Ok::<_, EngineError>((connection, result))
        });
        let (connection, result) = task.await.map_err(|e| EngineError::Failed(e.into()))??;
        self.connection = Some(connection);
        result
    }
}

#[async_trait]
impl Connection for Sqlite {
    async fn begin(&mut self, mode: Mode) -> Result<(), EngineError> {
        self.run(move |connection| {
            if !connection.is_autocommit() {
                connection.execute_batch("ROLLBACK").map_err(failed)?;
            }
            // A read transaction that turns into a write is not covered by the busy timeout.
            let begin = match mode {
                Mode::Write => "BEGIN IMMEDIATE",
                Mode::Snapshot => "BEGIN",
            };
            execute(connection, begin, &[]).map(drop)
        })
        .await
    }

    async fn commit(&mut self, _newest: Option<Revision>) -> Result<(), EngineError> {
        self.run(|connection| execute(connection, "COMMIT", &[]).map(drop)).await?;
        self.commits = self.commits.saturating_add(1);
        if self.commits == COMMITS_BEFORE_RESERVE
            && let Err(error) = reserve(&wal(&self.path))
        {
            tracing::warn!(%error, "cannot reserve space for the write-ahead log");
        }
        Ok(())
    }

    async fn rollback(&mut self) {
        let undone = self.run(|connection| {
            // A full disk ends the transaction by itself.
            if connection.is_autocommit() {
                return Ok(());
            }
            execute(connection, "ROLLBACK", &[]).map(drop)
        });
        if let Err(error) = undone.await {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot roll back");
        }
    }

    async fn execute(&mut self, sql: &Sql, args: Vec<Value>) -> Result<u64, EngineError> {
        let sql = sql.clone();
        self.run(move |connection| execute(connection, sql.as_str(), &args)).await
    }

    async fn fetch(
        &mut self,
        sql: &Sql,
        args: Vec<Value>,
        bytes: usize,
    ) -> Result<Rows, EngineError> {
        let sql = sql.clone();
        self.run(move |connection| fetch(connection, sql.as_str(), &args, bytes)).await
    }

    async fn script(&mut self, sql: &str) -> Result<(), EngineError> {
        let sql = sql.to_owned();
        self.run(move |connection| connection.execute_batch(&sql).map_err(failed)).await
    }

    async fn has_table(&mut self, name: &str) -> Result<bool, EngineError> {
        let name = name.to_owned();
        self.run(move |connection| connection.table_exists(None, name.as_str()).map_err(failed))
            .await
    }

    async fn tidy(&mut self) -> Result<(), EngineError> {
        // Busy readers make it a smaller one; the next one does the rest. The file stays for re-use.
        self.run(|connection| {
            let sql = "PRAGMA wal_checkpoint(RESTART)";
            connection.query_row(sql, [], |_| Ok(())).map_err(failed)
        })
        .await
    }

    async fn size(&mut self) -> Result<(u64, u64), EngineError> {
        let of = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
        Ok((of(&self.path), of(&wal(&self.path))))
    }

    /// Cores keep each other out by the lock of the state folder.
    async fn exclude(&mut self) -> Result<bool, EngineError> {
        Ok(true)
    }

    async fn close(mut self: Box<Self>) -> Result<(), EngineError> {
        match self.connection.take() {
            Some(connection) => connection.close().map_err(|(_, error)| failed(error)),
            None => Ok(()),
        }
    }
}

/// The write-ahead log of a database.
fn wal(path: &Path) -> PathBuf {
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    wal.into()
}

/// Zeros behind the end are no frames to SQLite (<https://sqlite.org/fileformat2.html#walformat>: the salt of a frame must be
/// that of the header). Written ones, because space that is only allocated costs metadata once more when it is first used.
fn reserve(wal: &Path) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut file = OpenOptions::new().write(true).open(wal)?;
    let before = file.seek(io::SeekFrom::End(0))?;
    let mut left = WAL_BYTES_RESERVED.saturating_sub(before);
    while left > 0 {
        let size = left.min(ZEROS.len() as u64);
        if let Err(error) = file.write_all(&ZEROS[..size as usize]) {
            // Space is short: it is for the state.
            file.set_len(before)?;
            return Err(error);
        }
        left -= size;
    }
    file.sync_all()
}

fn execute(
    connection: &rusqlite::Connection,
    sql: &str,
    args: &[Value],
) -> Result<u64, EngineError> {
    let mut statement = connection.prepare_cached(sql).map_err(failed)?;
    let changed = statement.execute(params_from_iter(args)).map_err(failed)?;
    Ok(changed as u64)
}

fn fetch(
    connection: &rusqlite::Connection,
    sql: &str,
    args: &[Value],
    bytes: usize,
) -> Result<Rows, EngineError> {
    let mut statement = connection.prepare_cached(sql).map_err(failed)?;
    let width = statement.column_count();
    let mut rows = statement.query(params_from_iter(args)).map_err(failed)?;
    let (mut found, mut taken) = (Vec::new(), 0);
    while let Some(row) = rows.next().map_err(failed)? {
        if taken >= bytes && !found.is_empty() {
            return Ok(Rows { rows: found, cut: true });
        }
        let mut columns = Vec::with_capacity(width);
        for column in 0..width {
            let value = value(row.get_ref(column).map_err(failed)?)?;
            taken += value.bytes();
            columns.push(value);
        }
        found.push(Row::new(columns));
    }
    Ok(Rows { rows: found, cut: false })
}

fn value(value: ValueRef<'_>) -> Result<Value, EngineError> {
    match value {
        ValueRef::Null => Ok(Value::Null),
        ValueRef::Integer(value) => Ok(Value::Int(value)),
        ValueRef::Text(text) => match std::str::from_utf8(text) {
            Ok(text) => Ok(Value::Text(text.to_owned())),
            Err(error) => Err(EngineError::Failed(error.into())),
        },
        ValueRef::Blob(blob) => Ok(Value::Blob(blob.to_vec().into())),
        ValueRef::Real(_) => Err(EngineError::unexpected("a floating-point number")),
    }
}

impl rusqlite::ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Null => ValueRef::Null,
            Self::Int(value) => ValueRef::Integer(*value),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Blob(blob) => ValueRef::Blob(blob),
        }))
    }
}

fn failed(error: rusqlite::Error) -> EngineError {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => EngineError::Full,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            EngineError::Damaged(error.into())
        }
        _ => EngineError::Failed(error.into()),
    }
}

fn io_error(error: io::Error) -> EngineError {
    match error.kind() {
        io::ErrorKind::StorageFull => EngineError::Full,
        _ => EngineError::Failed(error.into()),
    }
}
