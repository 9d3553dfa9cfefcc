//! The narrow waist between the store and a database: connections that run the same SQL text with `$N` parameters.

use std::{
    fmt::Write as _,
    sync::{Arc, OnceLock},
};

use async_trait::async_trait;
use bytes::Bytes;

use super::Revision;

/// Rows of one statement: 1,024 rows of eleven values stay below the 32,766 parameters of SQLite and the 65,535 of
/// PostgreSQL.
pub(super) const ROWS_MAX: usize = 1_024;

/// A parameter, or a column of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// `NULL`.
    Null,
    /// `INTEGER`; `BIGINT`.
    Int(i64),
    /// `TEXT`. Never contains NUL, which PostgreSQL refuses.
    Text(String),
    /// `BLOB`; `BYTEA`.
    Blob(Bytes),
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

impl From<Bytes> for Value {
    fn from(value: Bytes) -> Self {
        Self::Blob(value)
    }
}

impl Value {
    /// What it counts against a limit of bytes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Null | Self::Int(_) => 8,
            Self::Text(text) => text.len(),
            Self::Blob(blob) => blob.len(),
        }
    }
}

/// A row of an answer. Its columns are taken in the order of the statement; a column of another type than the one asked
/// for is an error of the statement, and of the schema's copy in the database.
#[derive(Debug)]
pub(super) struct Row {
    columns: std::vec::IntoIter<Value>,
}

impl Row {
    pub(super) fn new(columns: Vec<Value>) -> Self {
        Self { columns: columns.into_iter() }
    }

    /// The next column.
    pub(super) fn value(&mut self) -> Result<Value, EngineError> {
        self.columns.next().ok_or_else(|| EngineError::unexpected("a column is missing"))
    }

    /// The next column; `NULL` is 0.
    pub(super) fn int(&mut self) -> Result<i64, EngineError> {
        match self.value()? {
            Value::Int(value) => Ok(value),
            Value::Null => Ok(0),
            Value::Text(_) | Value::Blob(_) => Err(EngineError::unexpected("not an integer")),
        }
    }

    /// The next column; `NULL` is empty.
    pub(super) fn text(&mut self) -> Result<String, EngineError> {
        match self.value()? {
            Value::Text(value) => Ok(value),
            Value::Null => Ok(String::new()),
            Value::Int(_) | Value::Blob(_) => Err(EngineError::unexpected("not a text")),
        }
    }

    /// The next column; `NULL` is empty.
    pub(super) fn blob(&mut self) -> Result<Bytes, EngineError> {
        match self.value()? {
            Value::Blob(value) => Ok(value),
            Value::Null => Ok(Bytes::new()),
            Value::Int(_) | Value::Text(_) => Err(EngineError::unexpected("not bytes")),
        }
    }

    /// All columns that are left.
    pub(super) fn rest(self) -> Vec<Value> {
        self.columns.collect()
    }
}

/// An answer.
#[derive(Debug)]
pub(super) struct Rows {
    /// In the statement's order.
    pub(super) rows: Vec<Row>,
    /// There are more: the limit of bytes was reached.
    pub(super) cut: bool,
}

/// Why a database did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum EngineError {
    /// No space. Nothing was committed.
    #[error("no space is left")]
    Full,
    /// The file is no sound database.
    #[error("the database is damaged")]
    Damaged(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The connection broke during a commit, and nobody can say what became of it.
    #[error("it is not known whether the commit succeeded")]
    Unknown(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No connection. Nothing was committed.
    #[error("the database cannot be reached")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Anything else. Nothing was committed.
    #[error("the database failed")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl EngineError {
    /// The database holds what this program does not write.
    pub(super) fn unexpected(what: &'static str) -> Self {
        Self::Failed(what.into())
    }
}

/// Locks the row, so that the commits of all cores come one after the other.
pub(super) const LOCK: Sql =
    Sql::Fixed("UPDATE meta SET rev = rev WHERE id = 1 RETURNING rev, fence");
const ADVANCE: Sql = Sql::Fixed("UPDATE meta SET rev = $1, fence = $2 WHERE id = 1");

/// Of a database that somebody else has changed.
pub(super) const NO_META: &str = "the row of meta is missing";

/// The last numbers that were given out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// Of the state.
    pub(super) revision: Revision,
    /// Lease and fencing token.
    pub(super) fence: i64,
}

impl Head {
    /// Of the answer to [`LOCK`].
    pub(super) fn of(rows: Rows) -> Result<Self, EngineError> {
        let Some(mut row) = rows.rows.into_iter().next() else {
            return Err(EngineError::unexpected(NO_META));
        };
        Ok(Self { revision: row.int()?, fence: row.int()? })
    }
}

/// What a transaction is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Writes. Its first statement locks the one row of `meta`, which puts the commits of all cores in order.
    Write,
    /// Reads one state, whatever is written meanwhile.
    Snapshot,
}

/// A connection. At most one transaction at a time; statements outside of one are each a transaction of their own. What it
/// is doing when its future is dropped is undone, at the latest by the next [`Connection::begin`].
#[async_trait]
pub(super) trait Connection: Send {
    /// Begins a transaction; connects again first if the connection broke.
    async fn begin(&mut self, mode: Mode) -> Result<(), EngineError>;

    /// Durable when it returns. `newest`: all cores are told of this revision.
    async fn commit(&mut self, newest: Option<Revision>) -> Result<(), EngineError>;

    /// Begins a transaction that writes, and locks the head of the state.
    async fn begin_group(&mut self) -> Result<Head, EngineError> {
        self.begin(Mode::Write).await?;
        Head::of(self.fetch(&LOCK, Vec::new(), usize::MAX).await?)
    }

    /// As [`Self::commit`], with a new head if there is one.
    async fn commit_group(
        &mut self,
        head: Option<Head>,
        newest: Option<Revision>,
    ) -> Result<(), EngineError> {
        if let Some(Head { revision, fence }) = head {
            self.execute(&ADVANCE, vec![revision.into(), fence.into()]).await?;
        }
        self.commit(newest).await
    }

    /// Undoes the transaction; without one, nothing.
    async fn rollback(&mut self);

    /// Returns how many rows were changed.
    async fn execute(&mut self, sql: &Sql, args: Vec<Value>) -> Result<u64, EngineError>;

    /// Runs a statement of rows for all of these, and returns how many it changed.
    async fn insert(
        &mut self,
        statement: &Repeated,
        mut rows: Vec<Value>,
    ) -> Result<u64, EngineError> {
        let mut changed = 0;
        while !rows.is_empty() {
            let (sql, count) = statement.upto(rows.len() / statement.width());
            let rest = rows.split_off(count * statement.width());
            changed += self.execute(&sql, rows).await?;
            rows = rest;
        }
        Ok(changed)
    }

    /// Stops after the row with which the values reach `bytes`, at least after the first one.
    async fn fetch(
        &mut self,
        sql: &Sql,
        args: Vec<Value>,
        bytes: usize,
    ) -> Result<Rows, EngineError>;

    /// Runs a script of statements without parameters.
    async fn script(&mut self, sql: &str) -> Result<(), EngineError>;

    /// Whether this table exists.
    async fn has_table(&mut self, name: &str) -> Result<bool, EngineError>;

    /// Gives space back after much was deleted.
    async fn tidy(&mut self) -> Result<(), EngineError>;

    /// Bytes that the database takes, and bytes of its write-ahead log (0: not known).
    async fn size(&mut self) -> Result<(u64, u64), EngineError>;

    /// Keeps all other writers out until it is closed. False: there are some.
    async fn exclude(&mut self) -> Result<bool, EngineError>;

    /// Ends the connection in good order.
    async fn close(self: Box<Self>) -> Result<(), EngineError>;
}

/// A database.
#[async_trait]
pub(super) trait Engine: Send + Sync + 'static {
    /// For the one task that writes.
    async fn writer(&self) -> Result<Box<dyn Connection>, EngineError>;

    /// For reading.
    async fn reader(&self) -> Result<Box<dyn Connection>, EngineError>;

    /// For messages: file or database, without secrets.
    fn name(&self) -> String;

    /// What it is, in one word.
    fn kind(&self) -> &'static str;

    /// Text of the schema in this database's dialect.
    fn schema(&self) -> String;

    /// Waits until another core may have committed, and returns the newest revision known by then. An engine for a single
    /// core never returns.
    async fn wake(&self) -> Revision;
}

/// Text of a statement: the same on all engines. Only constants and repetitions of constants become one. Parameters
/// appear in their order: to SQLite `$2` is a name, and names are numbered as they appear.
#[derive(Clone, Debug)]
pub(super) enum Sql {
    /// A constant.
    Fixed(&'static str),
    /// Made by [`Repeated`].
    Made(Arc<str>),
}

impl Sql {
    pub(super) fn as_str(&self) -> &str {
        let text = match self {
            Self::Fixed(text) => text,
            Self::Made(text) => text.as_ref(),
        };
        debug_assert!(is_in_order(text), "{text}");
        text
    }
}

fn is_in_order(text: &str) -> bool {
    let mut seen = 0;
    text.split('$').skip(1).all(|rest| {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number = rest[..digits].parse().unwrap_or(usize::MAX);
        let expected = number <= seen + 1;
        seen = seen.max(number);
        expected
    })
}

/// A statement that repeats a list of parameters: `(..), (..)` for `VALUES`, or `.., ..` for `IN`. It is made in sizes of
/// powers of two, so that few texts are prepared.
#[derive(Debug)]
pub(super) struct Repeated {
    head: &'static str,
    tail: &'static str,
    columns: usize,
    /// Parameters before those that repeat.
    fixed: usize,
    texts: [OnceLock<Arc<str>>; SIZES],
    arrays: OnceLock<Arc<str>>,
}

/// Powers of two up to [`ROWS_MAX`].
const SIZES: usize = ROWS_MAX.trailing_zeros() as usize + 1;

impl Repeated {
    /// `columns`: of each row; 0: a plain list.
    pub(super) const fn new(head: &'static str, columns: usize, tail: &'static str) -> Self {
        let texts = [const { OnceLock::new() }; SIZES];
        Self { head, tail, columns, fixed: 0, texts, arrays: OnceLock::new() }
    }

    /// A plain list behind `fixed` parameters that are in `head`.
    pub(super) const fn within(fixed: usize, head: &'static str, tail: &'static str) -> Self {
        let texts = [const { OnceLock::new() }; SIZES];
        Self { head, tail, columns: 0, fixed, texts, arrays: OnceLock::new() }
    }

    /// Parameters of a row.
    pub(super) fn width(&self) -> usize {
        self.columns.max(1)
    }

    /// The same for any number of rows, with an array of each column for a parameter. For those that insert.
    pub(super) fn arrays(&self) -> Sql {
        let head = self.head.trim_end_matches("VALUES ");
        let text = self.arrays.get_or_init(|| {
            let columns: Vec<_> = (1..=self.columns).map(|n| format!("${n}")).collect();
            format!("{head}SELECT * FROM unnest({}){}", columns.join(", "), self.tail).into()
        });
        Sql::Made(text.clone())
    }

    /// The largest statement that takes no more than `rows`, and how many it takes.
    pub(super) fn upto(&self, rows: usize) -> (Sql, usize) {
        let size = rows.clamp(1, ROWS_MAX).ilog2() as usize;
        let text = self.texts[size].get_or_init(|| self.text(1 << size).into());
        (Sql::Made(text.clone()), 1 << size)
    }

    /// The smallest statement that takes at least `rows`, at most [`ROWS_MAX`]: for lists that may repeat a value.
    pub(super) fn atleast(&self, rows: usize) -> (Sql, usize) {
        self.upto(rows.clamp(1, ROWS_MAX).next_power_of_two())
    }

    fn text(&self, rows: usize) -> String {
        let mut text = self.head.to_owned();
        let width = self.width();
        for row in 0..rows {
            text.push_str(if row > 0 { ", " } else { "" });
            text.push_str(if self.columns > 0 { "(" } else { "" });
            for column in 0..width {
                text.push_str(if column > 0 { ", " } else { "" });
                // Writing to a string cannot fail.
                let _ = write!(text, "${}", self.fixed + row * width + column + 1);
            }
            text.push_str(if self.columns > 0 { ")" } else { "" });
        }
        text.push_str(self.tail);
        text
    }
}

/// Runs a statement with a list of values, or of rows, as often as it needs; what is left of the last list repeats its last
/// one.
pub(super) async fn select_in(
    connection: &mut dyn Connection,
    statement: &Repeated,
    list: &[Value],
) -> Result<Vec<Row>, EngineError> {
    select_within(connection, statement, &[], list).await
}

/// As [`select_in`], with the values of the parameters before the list.
pub(super) async fn select_within(
    connection: &mut dyn Connection,
    statement: &Repeated,
    fixed: &[Value],
    list: &[Value],
) -> Result<Vec<Row>, EngineError> {
    let width = statement.width();
    let mut found = Vec::with_capacity(list.len() / width);
    for some in list.chunks(ROWS_MAX * width) {
        let (sql, count) = statement.atleast(some.len() / width);
        let mut args = fixed.to_vec();
        args.extend_from_slice(some);
        while args.len() < fixed.len() + count * width {
            args.extend_from_slice(&some[some.len() - width..]);
        }
        found.extend(connection.fetch(&sql, args, usize::MAX).await?.rows);
    }
    Ok(found)
}
