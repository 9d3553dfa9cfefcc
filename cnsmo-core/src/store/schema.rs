//! The tables, for each engine from one text.

use super::{
    StoreError,
    engine::{Connection, Engine, EngineError, Mode, Sql},
};

/// In SQLite's dialect.
pub(super) const SQLITE: &str = include_str!("schema.sql");

/// Of [`SQLITE`]; a database of a newer one is refused.
const VERSION: i64 = 1;

/// Tables of the state but `meta`, and the columns by which their rows are in order.
pub(super) const TABLES: [(&str, &str); 10] = [
    ("kv", "key"),
    ("log", "rev, sub"),
    ("lease", "lease_id"),
    ("request", "identity, request_id"),
    ("audit", "seq"),
    ("stream", "name"),
    ("message", "stream, seq"),
    ("message_id", "stream, message_id"),
    ("queue_group", "stream, name"),
    ("delivery", "stream, grp, seq"),
];

const READ_VERSION: Sql = Sql::Fixed("SELECT schema_version FROM meta WHERE id = 1");

/// Columns of a table, in order.
pub(super) fn columns(table: &str) -> Vec<&'static str> {
    let head = format!("CREATE TABLE {table} (");
    let lines = SQLITE.lines().skip_while(|line| *line != head).skip(1);
    let lines = lines.take_while(|line| !line.starts_with(')'));
    let words = lines.filter_map(|line| line.split_whitespace().next());
    words.filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase())).collect()
}

/// Makes the tables, unless they are there.
pub(super) async fn prepare(
    engine: &dyn Engine,
    connection: &mut dyn Connection,
) -> Result<(), StoreError> {
    match prepare_tables(engine, connection).await {
        Ok(VERSION) => Ok(()),
        Ok(version) => Err(StoreError::Open {
            name: engine.name(),
            source: std::sync::Arc::from(Box::<dyn std::error::Error + Send + Sync>::from(
                format!(
                    "its schema is version {version}, and this program knows version {VERSION}"
                ),
            )),
        }),
        Err(error) => Err(open_error(engine, error)),
    }
}

/// What went wrong when a database was opened.
pub(super) fn open_error(engine: &dyn Engine, error: EngineError) -> StoreError {
    let name = engine.name();
    match error {
        EngineError::Damaged(detail) => StoreError::Damaged { name, detail: detail.to_string() },
        EngineError::Full => StoreError::Full,
        EngineError::Unknown(source) | EngineError::Lost(source) | EngineError::Failed(source) => {
            StoreError::Open { name, source: source.into() }
        }
    }
}

async fn prepare_tables(
    engine: &dyn Engine,
    connection: &mut dyn Connection,
) -> Result<i64, EngineError> {
    connection.begin(Mode::Write).await?;
    if !connection.has_table("meta").await? {
        connection.script(&engine.schema()).await?;
    }
    let mut rows = connection.fetch(&READ_VERSION, Vec::new(), usize::MAX).await?.rows;
    let Some(row) = rows.first_mut() else {
        return Err(EngineError::unexpected("the row of meta is missing"));
    };
    let version = row.int()?;
    connection.commit(None).await?;
    Ok(version)
}

/// The same tables in PostgreSQL's dialect. There are no string literals or quoted names in the text.
pub(super) fn postgres() -> String {
    let uncommented = SQLITE.lines().map(|line| line.split("--").next().unwrap_or_default());
    uncommented
        .collect::<Vec<_>>()
        .join("\n")
        .replace("STRICT, WITHOUT ROWID", "")
        .replace("STRICT", "")
        .replace("INTEGER", "BIGINT")
        .replace("BLOB", "BYTEA")
        .replace("TEXT", "TEXT COLLATE \"C\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_is_listed_and_nothing_of_the_dialect_is_left() {
        let names: Vec<&str> = SQLITE
            .lines()
            .filter_map(|line| line.strip_prefix("CREATE TABLE ")?.strip_suffix(" ("))
            .collect();
        let listed = TABLES.iter().map(|(name, _)| *name);
        assert_eq!(names, ["meta"].into_iter().chain(listed).collect::<Vec<_>>());
        let postgres = postgres();
        for word in ["INTEGER", "BLOB", "STRICT", "ROWID", "--"] {
            assert!(!postgres.contains(word), "{word} in {postgres}");
        }
        assert_eq!(
            postgres.matches("TEXT").count(),
            postgres.matches("TEXT COLLATE \"C\"").count()
        );
        assert_eq!(postgres.matches("CREATE").count(), SQLITE.matches("CREATE").count());
    }
}
