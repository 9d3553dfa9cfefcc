//! The engine for several cores: one PostgreSQL database.
//!
//! Every group of transactions begins by locking the one row of `meta`, so the groups of all cores come one after the
//! other, revisions are gapless, and a reader of the log sees a prefix of it.

use std::{
    fmt, fs, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt as _;
use sqlx::{
    Arguments as _, AssertSqlSafe, Column as _, ConnectOptions as _, Connection as _, Encode,
    Executor as _, PgConnection, PgPool, Postgres, Row as _, Type, TypeInfo as _,
    encode::IsNull,
    error::BoxDynError,
    postgres::{
        PgArgumentBuffer, PgArguments, PgColumn, PgConnectOptions, PgListener, PgPoolOptions,
        PgRow, PgTypeInfo, types::Oid,
    },
};
use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
    time::timeout,
};
use zeroize::Zeroizing;

use super::{
    Revision, StoreError,
    engine::{
        Connection, Engine, EngineError, Head, LOCK, Mode, NO_META, Repeated, Row, Rows, Sql, Value,
    },
    schema,
};

/// Notifications carry the newest revision, once per group: NOTIFY takes a lock on the whole database at its commit.
const CHANNEL: &str = "cnsmo_rev";
/// How often the newest revision is asked for, in case that a notification got lost with its connection.
const POLL: Duration = Duration::from_millis(500);
/// Prepared statements kept per connection: more than there are.
const STATEMENTS_MAX: usize = 512;
/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it is tried to find out what became of a commit whose answer got lost.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Key of the advisory lock under which tables are made: any number that nobody else uses.
const SCHEMA_LOCK: i64 = 0x636e_736d_6f00;
/// Key of the advisory lock that every core shares with the others as long as it writes.
const WRITERS_LOCK: i64 = SCHEMA_LOCK + 1;
/// Pause between attempts to ask again.
const RETRY: Duration = Duration::from_millis(50);
/// Settings of the URL that name a file.
const FILES: [&str; 3] = ["sslrootcert", "sslcert", "sslkey"];
/// A password file has one line; more is another file.
const PASSWORD_BYTES_MAX: usize = 1_024;
const MEMBERS: &str = "CREATE TABLE IF NOT EXISTS core
    (id TEXT COLLATE \"C\" PRIMARY KEY, beats BIGINT NOT NULL)";
/// What the server does for each session. A statement that takes longer than any of ours is stuck. A core that is frozen in
/// a transaction would hold up all others, so its session is ended. Neither the server's settings nor the role's may
/// make an acknowledged commit less than durable, or let it see less than what was committed before.
const SESSION: [(&str, &str); 5] = [
    ("statement_timeout", "10s"),
    ("idle_in_transaction_session_timeout", "2s"),
    ("synchronous_commit", "on"),
    ("default_transaction_isolation", "read committed"),
    ("client_min_messages", "warning"),
];

/// Where the database is and who we are there.
#[derive(Clone)]
pub struct PostgresConfig {
    options: PgConnectOptions,
}

/// A setting of the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InvalidUrl {
    /// It is not of the form `postgres://USER@HOST:PORT/DATABASE`.
    #[error("not a URL of PostgreSQL")]
    Url(#[source] sqlx::Error),
    /// Anybody on the machine can read arguments.
    #[error("must not contain the password: put it into a password file, PGPASSFILE or PGPASSWORD")]
    Password,
    /// A file that the URL names.
    #[error("cannot read the file of {setting}")]
    File {
        /// In the URL.
        setting: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The password file.
    #[error("cannot read the password file")]
    PasswordFile(#[source] io::Error),
    /// The password file has another content.
    #[error("the password file has not one line of text")]
    PasswordLine,
}

impl PostgresConfig {
    /// Reads libpq's URL. The password comes from `password_file`, from libpq's passfile or from `PGPASSWORD`.
    ///
    /// # Errors
    /// See [`InvalidUrl`]. No error contains the URL: a password might be in it.
    pub fn new(url: &str, password_file: Option<&Path>) -> Result<Self, InvalidUrl> {
        if has_password(url) {
            return Err(InvalidUrl::Password);
        }
        let mut options: PgConnectOptions = url.parse().map_err(InvalidUrl::Url)?;
        check_files(url)?;
        if let Some(path) = password_file {
            let text = Zeroizing::new(fs::read(path).map_err(InvalidUrl::PasswordFile)?);
            options = options.password(&password(&text)?);
        }
        let options = options
            .application_name("cnsmo-core")
            .statement_cache_capacity(STATEMENTS_MAX)
            .options(SESSION)
            .disable_statement_logging();
        Ok(Self { options })
    }
}

/// Never the password.
impl fmt::Debug for PostgresConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { options } = self;
        let (host, database) = (options.get_host(), options.get_database());
        f.debug_struct("PostgresConfig").field("host", &host).field("database", &database).finish()
    }
}

fn has_password(url: &str) -> bool {
    let (before, query) = url.split_once('?').unwrap_or((url, ""));
    let authority = before.split_once("://").map_or(before, |(_, rest)| rest);
    let authority = authority.split('/').next().unwrap_or_default();
    let user = authority.rsplit_once('@').map_or("", |(user, _)| user);
    user.contains(':') || query.split('&').any(|pair| pair.starts_with("password="))
}

/// When it connects, it would be told that some file is not there.
fn check_files(url: &str) -> Result<(), InvalidUrl> {
    let (_, query) = url.split_once('?').unwrap_or_default();
    let named = |(name, path)| Some((FILES.into_iter().find(|file| *file == name)?, path));
    for (setting, path) in
        query.split('&').filter_map(|pair| pair.split_once('=')).filter_map(named)
    {
        let is_plain = !path.contains('%');
        if is_plain && let Err(source) = fs::File::open(path) {
            return Err(InvalidUrl::File { setting, source });
        }
    }
    Ok(())
}

fn password(bytes: &[u8]) -> Result<Zeroizing<String>, InvalidUrl> {
    if bytes.len() > PASSWORD_BYTES_MAX {
        return Err(InvalidUrl::PasswordLine);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| InvalidUrl::PasswordLine)?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    if text.is_empty() || text.contains('\n') {
        return Err(InvalidUrl::PasswordLine);
    }
    Ok(Zeroizing::new(text.to_owned()))
}

/// One database that cores share.
#[derive(Debug)]
pub(super) struct Database {
    options: PgConnectOptions,
    /// The server's process for our writer: its commits are known here.
    own: Arc<AtomicU32>,
    newest: Mutex<Option<Newest>>,
}

/// The newest revision of all cores, and the task that learns of it.
#[derive(Debug)]
struct Newest {
    seen: watch::Receiver<Revision>,
    listener: JoinHandle<()>,
}

impl Newest {
    fn of(options: PgConnectOptions, own: Arc<AtomicU32>) -> Self {
        let (newest, seen) = watch::channel(0);
        Self { seen, listener: tokio::spawn(listen(options, own, newest)) }
    }
}

impl Database {
    /// Connects when it is needed.
    pub(super) fn new(config: &PostgresConfig) -> Self {
        Self { options: config.options.clone(), own: Arc::default(), newest: Mutex::default() }
    }

    async fn session(&self, writes: bool) -> Result<Box<dyn Connection>, EngineError> {
        let mut session = Session {
            options: self.options.clone(),
            writes: writes.then(|| self.own.clone()),
            connection: None,
            in_transaction: false,
            transaction: None,
        };
        session.live().await?;
        Ok(Box::new(session))
    }
}

impl Drop for Newest {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

#[async_trait]
impl Engine for Database {
    async fn writer(&self) -> Result<Box<dyn Connection>, EngineError> {
        self.session(true).await
    }

    async fn reader(&self) -> Result<Box<dyn Connection>, EngineError> {
        self.session(false).await
    }

    fn name(&self) -> String {
        let database = self.options.get_database().unwrap_or("of the same name as the user");
        format!("database {database} at {}", self.options.get_host())
    }

    fn kind(&self) -> &'static str {
        "postgresql"
    }

    fn schema(&self) -> String {
        schema::postgres()
    }

    async fn wake(&self) -> Revision {
        let mut newest = self.newest.lock().await;
        let Newest { seen, .. } =
            newest.get_or_insert_with(|| Newest::of(self.options.clone(), self.own.clone()));
        if seen.changed().await.is_err() {
            // The listener is gone with its runtime, and so are we.
            std::future::pending::<()>().await;
        }
        *seen.borrow_and_update()
    }
}

/// A connection, and how to get another when it breaks.
struct Session {
    options: PgConnectOptions,
    /// It holds its share of [`WRITERS_LOCK`], and says here which process serves it.
    writes: Option<Arc<AtomicU32>>,
    connection: Option<PgConnection>,
    in_transaction: bool,
    /// Id of the last transaction that writes, to ask for it if its end is not known.
    transaction: Option<String>,
}

#[async_trait]
impl Connection for Session {
    async fn begin(&mut self, mode: Mode) -> Result<(), EngineError> {
        self.transaction = match mode {
            Mode::Write => {
                let rows = self.open("BEGIN; SELECT pg_current_xact_id()::text").await?;
                Some(rows.first().map_or(Ok(String::new()), |row| row.try_get(0))?)
            }
            Mode::Snapshot => {
                self.open("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
                None
            }
        };
        Ok(())
    }

    async fn commit(&mut self, newest: Option<Revision>) -> Result<(), EngineError> {
        self.end("", newest).await
    }

    async fn begin_group(&mut self) -> Result<Head, EngineError> {
        let lock = format!("BEGIN; {}, pg_current_xact_id()::text", LOCK.as_str());
        let rows = self.open(&lock).await?;
        let row = rows.first().ok_or_else(|| EngineError::unexpected(NO_META))?;
        self.transaction = Some(row.try_get(2)?);
        Ok(Head { revision: row.try_get(0)?, fence: row.try_get(1)? })
    }

    async fn commit_group(
        &mut self,
        head: Option<Head>,
        newest: Option<Revision>,
    ) -> Result<(), EngineError> {
        let advance = head.map_or_else(String::new, |Head { revision, fence }| {
            format!("UPDATE meta SET rev = {revision}, fence = {fence} WHERE id = 1;")
        });
        self.end(&advance, newest).await
    }

    async fn rollback(&mut self) {
        if std::mem::take(&mut self.in_transaction)
            && let Some(connection) = &mut self.connection
            && let Err(error) = connection.execute("ROLLBACK").await
        {
            tracing::debug!(%error, "the transaction ended with its connection");
            self.lose();
        }
    }

    async fn execute(&mut self, sql: &Sql, args: Vec<Value>) -> Result<u64, EngineError> {
        let query = sqlx::query_with(AssertSqlSafe(sql.as_str()), bind(args)?);
        let result = query.execute(self.live().await?).await;
        Ok(self.checked(result)?.rows_affected())
    }

    /// As arrays, which one text takes, whatever the number of rows, and one answer.
    async fn insert(&mut self, statement: &Repeated, rows: Vec<Value>) -> Result<u64, EngineError> {
        if rows.is_empty() {
            return Ok(0);
        }
        let mut arguments = PgArguments::default();
        for column in 0..statement.width() {
            let values: Vec<&Value> = rows.iter().skip(column).step_by(statement.width()).collect();
            bind_array(&mut arguments, &values)?;
        }
        let sql = statement.arrays();
        let query = sqlx::query_with(AssertSqlSafe(sql.as_str()), arguments);
        let result = query.execute(self.live().await?).await;
        Ok(self.checked(result)?.rows_affected())
    }

    async fn fetch(
        &mut self,
        sql: &Sql,
        args: Vec<Value>,
        bytes: usize,
    ) -> Result<Rows, EngineError> {
        let alone = !self.in_transaction;
        let again = if alone { Some(args.clone()) } else { None };
        let result = rows(self.live().await?, sql, args, bytes).await;
        match (result, again) {
            // By itself a read can be done twice.
            (Err(error), Some(args)) if is_lost(&error) => {
                self.lose();
                let result = rows(self.live().await?, sql, args, bytes).await;
                self.checked(result)
            }
            (result, _) => self.checked(result),
        }
    }

    async fn script(&mut self, sql: &str) -> Result<(), EngineError> {
        let script = sqlx::raw_sql(AssertSqlSafe(sql));
        let result = script.execute(self.live().await?).await;
        self.checked(result).map(drop)
    }

    /// Of several cores that find a new database, the others wait here for the one that makes the tables.
    async fn has_table(&mut self, name: &str) -> Result<bool, EngineError> {
        let connection = self.live().await?;
        let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(SCHEMA_LOCK);
        let has = sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL").bind(name);
        lock.execute(&mut *connection).await?;
        let result = has.fetch_one(connection).await;
        self.checked(result)
    }

    /// Autovacuum does.
    async fn tidy(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    async fn size(&mut self) -> Result<(u64, u64), EngineError> {
        let size = sqlx::query_scalar("SELECT pg_database_size(current_database())");
        let result = size.fetch_one(self.live().await?).await;
        let bytes: i64 = self.checked(result)?;
        Ok((bytes.cast_unsigned(), 0))
    }

    /// Others wait with their first statement. What this one does may take its time.
    async fn exclude(&mut self) -> Result<bool, EngineError> {
        let connection = self.live().await?;
        let lock = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)").bind(WRITERS_LOCK);
        let alone = lock.fetch_one(&mut *connection).await;
        let slow = "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0";
        sqlx::raw_sql(slow).execute(connection).await?;
        self.checked(alone)
    }

    async fn close(mut self: Box<Self>) -> Result<(), EngineError> {
        match self.connection.take() {
            Some(connection) => Ok(connection.close().await?),
            None => Ok(()),
        }
    }
}

impl Session {
    /// Sends all that begins a transaction at once: every answer that is waited for costs a group as much as some rows.
    async fn open(&mut self, statements: &str) -> Result<Vec<PgRow>, EngineError> {
        if self.in_transaction {
            self.rollback().await;
        }
        // A connection that broke while it was idle shows it now, when nothing is lost with it.
        if let Some(connection) = &mut self.connection {
            match all(connection, statements).await {
                Ok(rows) => {
                    self.in_transaction = true;
                    return Ok(rows);
                }
                Err(error) if is_lost(&error) => self.connection = None,
                Err(error) => {
                    // It may have begun.
                    self.in_transaction = true;
                    return Err(error.into());
                }
            }
        }
        let rows = all(self.live().await?, statements).await;
        self.in_transaction = true;
        self.checked(rows)
    }

    /// Sends all that ends a transaction at once.
    async fn end(&mut self, statements: &str, newest: Option<Revision>) -> Result<(), EngineError> {
        let news = newest.map_or_else(String::new, |newest| {
            format!("SELECT pg_notify('{CHANNEL}', '{newest}');")
        });
        let ended = all(self.live().await?, &format!("{statements}{news}COMMIT")).await;
        let Err(error) = ended else {
            self.in_transaction = false;
            return Ok(());
        };
        if !is_lost(&error) {
            return Err(error.into());
        }
        let Some(transaction) = self.transaction.take() else {
            return self.checked(Err(error));
        };
        tracing::warn!(%error, transaction, "the connection broke during a commit");
        self.lose();
        match timeout(RESOLVE_TIMEOUT, self.outcome(&transaction)).await {
            Ok(Some(true)) => Ok(()),
            Ok(Some(false)) => Err(EngineError::Lost(error.into())),
            Ok(None) | Err(_) => Err(EngineError::Unknown(error.into())),
        }
    }

    /// The connection; outside of a transaction a new one if it broke.
    async fn live(&mut self) -> Result<&mut PgConnection, EngineError> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None if self.in_transaction => {
                return Err(EngineError::Lost(
                    "the connection broke during the transaction".into(),
                ));
            }
            None => {
                let mut connection = connect(&self.options).await?;
                if let Some(own) = &self.writes {
                    let share = "SELECT pg_backend_pid() FROM (SELECT pg_advisory_lock_shared($1)) AS share";
                    let share = sqlx::query_scalar(share).bind(WRITERS_LOCK);
                    let process: i32 = share.fetch_one(&mut connection).await?;
                    own.store(process.cast_unsigned(), Ordering::Relaxed);
                }
                tracing::debug!("connected to the database");
                connection
            }
        };
        Ok(self.connection.insert(connection))
    }

    fn lose(&mut self) {
        self.connection = None;
        self.in_transaction = false;
    }

    fn checked<T>(&mut self, result: Result<T, sqlx::Error>) -> Result<T, EngineError> {
        if let Err(error) = &result
            && is_lost(error)
        {
            // A transaction stays open until it is rolled back: its later statements must not run outside of it.
            self.connection = None;
        }
        Ok(result?)
    }

    /// Whether a transaction was committed; none: the database does not know it any more.
    async fn outcome(&mut self, transaction: &str) -> Option<bool> {
        loop {
            match self.status_of(transaction).await {
                Ok(Some(status)) if status == "committed" => return Some(true),
                Ok(Some(status)) if status == "aborted" => return Some(false),
                Ok(None) => return None,
                // In progress: its session has not noticed yet that we are gone.
                Ok(Some(_)) => {}
                Err(error) => tracing::debug!(%error, "cannot ask what became of a commit"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn status_of(&mut self, transaction: &str) -> Result<Option<String>, EngineError> {
        let status = sqlx::query_scalar("SELECT pg_xact_status($1::text::xid8)").bind(transaction);
        let result = status.fetch_one(self.live().await?).await;
        if result.is_err() {
            self.connection = None;
        }
        Ok(result?)
    }
}

/// A core that shares a database, and how often it has shown that it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    /// Name of the core.
    pub core: String,
    /// Changes as long as the core lives.
    pub count: i64,
}

/// The cores of a database, on a connection of their own: work that waits for the writer makes no core look dead. They are
/// no state: no revision, no backup.
#[derive(Debug)]
pub struct Members {
    options: PgConnectOptions,
    connection: Option<PgConnection>,
}

impl Members {
    /// Connects when it is needed.
    pub fn new(config: &PostgresConfig) -> Self {
        Self { options: config.options.clone(), connection: None }
    }

    /// Shows that `core` lives, and tells which ones have ever done so.
    ///
    /// # Errors
    /// The database fails.
    pub async fn beat(&mut self, core: &str) -> Result<Vec<Beat>, StoreError> {
        let result = beat(self.live().await?, core).await;
        self.checked(result)
    }

    /// `core` leaves.
    ///
    /// # Errors
    /// The database fails.
    pub async fn forget(&mut self, core: &str) -> Result<(), StoreError> {
        let forget = sqlx::query("DELETE FROM core WHERE id = $1").bind(core);
        let result = forget.execute(self.live().await?).await;
        self.checked(result).map(drop)
    }

    async fn live(&mut self) -> Result<&mut PgConnection, StoreError> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let mut connection = connect(&self.options).await.map_err(EngineError::from)?;
                // One statement list is one transaction.
                let prepare = format!("SELECT pg_advisory_xact_lock({SCHEMA_LOCK}); {MEMBERS}");
                let prepare = sqlx::raw_sql(AssertSqlSafe(prepare));
                prepare.execute(&mut connection).await.map_err(EngineError::from)?;
                connection
            }
        };
        Ok(self.connection.insert(connection))
    }

    fn checked<T>(&mut self, result: Result<T, sqlx::Error>) -> Result<T, StoreError> {
        if result.is_err() {
            self.connection = None;
        }
        Ok(result.map_err(EngineError::from)?)
    }
}

async fn beat(connection: &mut PgConnection, core: &str) -> Result<Vec<Beat>, sqlx::Error> {
    sqlx::query(
        "INSERT INTO core (id, beats) VALUES ($1, 1) ON CONFLICT (id) DO UPDATE SET beats = core.beats + 1",
    )
    .bind(core)
    .execute(&mut *connection)
    .await?;
    let rows = sqlx::query("SELECT id, beats FROM core ORDER BY id").fetch_all(connection).await?;
    rows.iter().map(|row| Ok(Beat { core: row.try_get(0)?, count: row.try_get(1)? })).collect()
}

/// The rows of all statements together, which have no parameters.
async fn all(connection: &mut PgConnection, statements: &str) -> Result<Vec<PgRow>, sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(statements)).fetch_all(connection).await
}

async fn rows(
    connection: &mut PgConnection,
    sql: &Sql,
    args: Vec<Value>,
    bytes: usize,
) -> Result<Rows, sqlx::Error> {
    let query = sqlx::query_with(AssertSqlSafe(sql.as_str()), bind(args)?);
    let mut answer = query.fetch(connection);
    let (mut rows, mut size) = (Vec::new(), 0_usize);
    while let Some(row) = answer.try_next().await? {
        let columns = decode(&row)?;
        size = columns.iter().map(Value::bytes).fold(size, usize::saturating_add);
        rows.push(Row::new(columns));
        if size >= bytes {
            let cut = answer.try_next().await?.is_some();
            return Ok(Rows { rows, cut });
        }
    }
    Ok(Rows { rows, cut: false })
}

fn bind(values: Vec<Value>) -> Result<PgArguments, sqlx::Error> {
    let mut arguments = PgArguments::default();
    for value in values {
        let added = match value {
            Value::Null => arguments.add(Untyped),
            Value::Int(value) => arguments.add(value),
            Value::Text(value) => arguments.add(value),
            Value::Blob(value) => arguments.add(value.as_ref()),
        };
        added.map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

/// A column. One of nothing but NULL is of bytes: there is no other that may be NULL.
fn bind_array(arguments: &mut PgArguments, values: &[&Value]) -> Result<(), sqlx::Error> {
    let added = match values.iter().find(|value| !matches!(value, Value::Null)) {
        Some(Value::Int(_)) => arguments.add(array(values, |value| match value {
            Value::Int(value) => Some(*value),
            _ => None,
        })),
        Some(Value::Text(_)) => arguments.add(array(values, |value| match value {
            Value::Text(value) => Some(value.as_str()),
            _ => None,
        })),
        _ => arguments.add(array(values, |value| match value {
            Value::Blob(value) => Some(value.as_ref()),
            _ => None,
        })),
    };
    added.map_err(sqlx::Error::Encode)
}

fn array<'a, T>(values: &[&'a Value], of: impl Fn(&'a Value) -> Option<T>) -> Vec<Option<T>> {
    values.iter().map(|value| of(value)).collect()
}

/// NULL of the type that the statement has in its place.
struct Untyped;

impl Type<Postgres> for Untyped {
    fn type_info() -> PgTypeInfo {
        /// Pseudo-type `unknown`: the server infers the parameter's type.
        const UNKNOWN: Oid = Oid(705);
        PgTypeInfo::with_oid(UNKNOWN)
    }
}

impl Encode<'_, Postgres> for Untyped {
    fn encode_by_ref(&self, _: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        Ok(IsNull::Yes)
    }
}

fn decode(row: &PgRow) -> Result<Vec<Value>, sqlx::Error> {
    let value = |column: &PgColumn| {
        let n = column.ordinal();
        Ok(match column.type_info().name() {
            "INT8" => row.try_get::<Option<i64>, _>(n)?.map_or(Value::Null, Value::Int),
            // Of literals.
            "INT4" => {
                let int = row.try_get::<Option<i32>, _>(n)?;
                int.map_or(Value::Null, |int| Value::Int(int.into()))
            }
            "BYTEA" => {
                let bytes = row.try_get::<Option<Vec<u8>>, _>(n)?;
                bytes.map_or(Value::Null, |bytes| Value::Blob(Bytes::from(bytes)))
            }
            _ => row.try_get::<Option<String>, _>(n)?.map_or(Value::Null, Value::Text),
        })
    };
    row.columns().iter().map(value).collect()
}

impl From<sqlx::Error> for EngineError {
    fn from(error: sqlx::Error) -> Self {
        let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
        match code.as_deref() {
            Some("53100") => Self::Full,
            Some("XX001" | "XX002") => Self::Damaged(error.into()),
            _ if is_lost(&error) => Self::Lost(error.into()),
            _ => Self::Failed(error.into()),
        }
    }
}

async fn connect(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    match timeout(CONNECT_TIMEOUT, PgConnection::connect_with(options)).await {
        Ok(connected) => connected,
        Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
    }
}

/// Tells of the newest revision, whichever core committed it, until nobody listens.
async fn listen(options: PgConnectOptions, own: Arc<AtomicU32>, newest: watch::Sender<Revision>) {
    let pool = PgPoolOptions::new()
        .max_connections(2)
        .acquire_timeout(CONNECT_TIMEOUT)
        .connect_lazy_with(options);
    let mut polls = tokio::time::interval(POLL);
    polls.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !newest.is_closed() {
        if let Err(error) = notified(&pool, &own, &newest, &mut polls).await {
            tracing::warn!(%error, "no notifications from the database: asking for commits instead");
        }
        polls.tick().await;
        poll(&pool, &newest).await;
        // Of messages that were published meanwhile no revision tells.
        newest.send_modify(|_| {});
    }
}

async fn notified(
    pool: &PgPool,
    own: &AtomicU32,
    newest: &watch::Sender<Revision>,
    polls: &mut tokio::time::Interval,
) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(pool).await?;
    listener.eager_reconnect(false);
    listener.listen(CHANNEL).await?;
    loop {
        let notification = listener.try_recv();
        tokio::pin!(notification);
        let notification = loop {
            tokio::select! {
                notification = &mut notification => break notification?,
                () = newest.closed() => return Ok(()),
                _ = polls.tick() => poll(pool, newest).await,
            }
        };
        let Some(notification) = notification else { return Err(sqlx::Error::WorkerCrashed) };
        let is_own = notification.process_id() == own.load(Ordering::Relaxed);
        if !is_own && let Ok(revision) = notification.payload().parse() {
            // Also at the same revision: messages take none.
            newest.send_modify(|newest| *newest = (*newest).max(revision));
        }
    }
}

async fn poll(pool: &PgPool, newest: &watch::Sender<Revision>) {
    match sqlx::query_scalar("SELECT rev FROM meta WHERE id = 1").fetch_one(pool).await {
        Ok(revision) => seen(newest, revision),
        Err(error) => tracing::debug!(%error, "cannot ask for commits"),
    }
}

fn seen(newest: &watch::Sender<Revision>, revision: Revision) {
    newest.send_if_modified(|newest| std::mem::replace(newest, (*newest).max(revision)) < revision);
}

/// Whether the connection is of no use after this.
fn is_lost(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => error.code().is_some_and(|code| {
            // Connection exceptions, operator intervention but a cancelled statement, sessions that were idle too long.
            code.starts_with("08") || (code.starts_with("57P")) || code == "25P03"
        }),
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::WorkerCrashed => true,
        _ => false,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    };

    use super::*;
    use crate::postgres_server::{Postgres as Server, Sync};

    /// One for all tests of this process; each has a database of its own.
    fn server() -> &'static Server {
        static SERVER: OnceLock<Server> = OnceLock::new();
        SERVER.get_or_init(|| Server::start(Sync::None).unwrap())
    }

    /// Name of a new database, and the way to it.
    pub(in crate::store) fn database() -> (String, PostgresConfig) {
        let url = server().create_database().unwrap();
        let name = url.split(['/', '?']).nth(3).unwrap().to_owned();
        (name, PostgresConfig::new(&url, None).unwrap())
    }

    async fn insert(writer: &mut dyn Connection, n: i64) -> Result<(), EngineError> {
        writer.begin(Mode::Write).await?;
        writer.execute(&Sql::Fixed("INSERT INTO t VALUES ($1)"), vec![n.into()]).await?;
        writer.commit(Some(n)).await
    }

    fn kill_backends(database: &str) {
        let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                    WHERE application_name = 'cnsmo-core' AND datname = current_database()";
        server().sql(database, kill).unwrap();
    }

    #[test]
    fn no_password_is_taken_from_the_url_or_shown() {
        for url in [
            "postgres://me:secret@db/state",
            "postgres://me:@db/state",
            "postgres:///state?host=/run&password=secret",
        ] {
            let error = PostgresConfig::new(url, None).unwrap_err();
            assert!(matches!(error, InvalidUrl::Password), "{url}: {error:?}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "secret\n").unwrap();
        let url = "postgres://me@db:5433/state?sslmode=require";
        let config = PostgresConfig::new(url, Some(file.path())).unwrap();
        let shown = format!("{config:?}");
        assert!(shown.contains("db") && !shown.contains("secret"), "{shown}");
        for bad in ["", "\n", "a\nb\n", &"x".repeat(2_000)] {
            fs::write(file.path(), bad).unwrap();
            let error = PostgresConfig::new(url, Some(file.path())).unwrap_err();
            assert!(matches!(error, InvalidUrl::PasswordLine), "{bad:?}: {error:?}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_told_of_a_commit_is_true_however_often_its_connection_is_killed() {
        let (name, config) = database();
        server().sql(&name, "CREATE TABLE t (n BIGINT)").unwrap();
        let database = Database::new(&config);
        let mut writer = database.writer().await.unwrap();
        let stop = AtomicBool::new(false);
        let handle = tokio::runtime::Handle::current();
        let (committed, lost) = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    kill_backends(&name);
                }
            });
            let told = tokio::task::block_in_place(|| {
                handle.block_on(async {
                    let (mut committed, mut lost) = (Vec::new(), 0);
                    for n in 0.. {
                        match insert(&mut *writer, n).await {
                            Ok(()) => committed.push(n),
                            Err(EngineError::Lost(_)) => {
                                lost += 1;
                                writer.rollback().await;
                            }
                            Err(error) => panic!("{error}"),
                        }
                        if committed.len() >= 300 && lost >= 10 {
                            break;
                        }
                    }
                    (committed, lost)
                })
            });
            stop.store(true, Ordering::Relaxed);
            told
        });
        assert!(lost >= 10, "nothing was killed");
        let there = server().sql(&name, "SELECT n FROM t ORDER BY n").unwrap();
        let there: Vec<i64> = there.lines().map(|n| n.parse().unwrap()).collect();
        assert_eq!(there, committed);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn commits_are_noticed_with_and_without_a_notification() {
        let (name, config) = database();
        server().sql(&name, &schema::postgres()).unwrap();
        let (here, there) = (Database::new(&config), Database::new(&config));
        let mut writer = there.writer().await.unwrap();
        let set = Sql::Fixed("UPDATE meta SET rev = $1");
        for revision in 1..=20 {
            writer.begin(Mode::Write).await.unwrap();
            writer.execute(&set, vec![revision.into()]).await.unwrap();
            // Half of them go without one, as if it had got lost.
            writer.commit((revision % 2 == 0).then_some(revision)).await.unwrap();
            let noticed = async { while here.wake().await < revision {} };
            timeout(Duration::from_secs(20), noticed).await.expect("it was never noticed");
            if revision % 5 == 0 {
                kill_backends(&name);
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_session_that_is_frozen_in_a_transaction_holds_nobody_up_for_long() {
        let (name, config) = database();
        server().sql(&name, &schema::postgres()).unwrap();
        let database = Database::new(&config);
        let lock = Sql::Fixed("UPDATE meta SET rev = rev RETURNING rev");
        let mut frozen = database.writer().await.unwrap();
        frozen.begin(Mode::Write).await.unwrap();
        frozen.fetch(&lock, vec![], usize::MAX).await.unwrap();

        let mut other = database.writer().await.unwrap();
        other.begin(Mode::Write).await.unwrap();
        other.fetch(&lock, vec![], usize::MAX).await.unwrap();
        other.commit(None).await.unwrap();
        let late = frozen.commit(Some(1)).await.unwrap_err();
        assert!(matches!(late, EngineError::Lost(_)), "{late:?}");
        frozen.rollback().await;
        frozen.begin(Mode::Write).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn values_come_back_as_they_were_and_an_answer_stops_at_its_bytes() {
        let (name, config) = database();
        let table = "CREATE TABLE v (n BIGINT, t TEXT COLLATE \"C\", b BYTEA)";
        server().sql(&name, table).unwrap();
        let database = Database::new(&config);
        let mut session = database.writer().await.unwrap();
        let insert = Sql::Fixed("INSERT INTO v (n, t, b) VALUES ($1, $2, $3), ($4, $5, $6)");
        let blob = Value::Blob(Bytes::from_static(b"\0\xff"));
        let rows = [
            vec![1.into(), "ü".into(), blob.clone(), Value::Null, Value::Null, Value::Null],
            vec![Value::Null, Value::Null, Value::Null, 3.into(), "Z".into(), blob],
        ];
        for row in &rows {
            assert_eq!(session.execute(&insert, row.clone()).await.unwrap(), 2);
        }
        let all = Sql::Fixed("SELECT n, t, b FROM v WHERE n > 0 ORDER BY t");
        let found = session.fetch(&all, vec![], usize::MAX).await.unwrap();
        assert!(!found.cut);
        let found: Vec<_> = found.rows.into_iter().flat_map(Row::rest).collect();
        // By bytes: Z before the umlaut.
        assert_eq!(found, [&rows[1][3..], &rows[0][..3]].concat());
        let some = session.fetch(&all, vec![], 1).await.unwrap();
        assert_eq!((some.rows.len(), some.cut), (1, true));
        assert!(session.has_table("v").await.unwrap() && !session.has_table("w").await.unwrap());
        assert!(session.size().await.unwrap().0 > 0);
    }
}
