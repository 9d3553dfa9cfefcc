//! The one task that writes, on a thread of its own: SQLite blocks it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use tokio::sync::{mpsc, oneshot};

use super::{
    Revision, StoreError, audit,
    engine::{Connection, Engine, EngineError, Mode, Sql},
    group::{self, Committed, Done, Work},
    hub::Hub,
    schema,
};

/// Pieces of work in one commit: enough to share an fsync, few enough that the first of them does not wait long.
const GROUP_MAX: usize = 256;
/// Log rows that compaction looks at, and rows of other tables that it removes, between two groups: a few milliseconds.
const SLICE_ROWS: i64 = 1_000;

const META: Sql = Sql::Fixed("UPDATE meta SET rev = rev WHERE id = 1 RETURNING rev, compact_rev");
const SET_COMPACTED: Sql = Sql::Fixed("UPDATE meta SET compact_rev = $1 WHERE id = 1");
const SLICE_END: Sql = Sql::Fixed(
    "SELECT rev FROM log WHERE rev > $1 AND rev <= $2 ORDER BY rev, sub LIMIT 1 OFFSET $3",
);
/// What the changes of a slice replaced. The newest put of each key stays, so that the state at the cut can still be read.
const COMPACT_REPLACED: Sql = Sql::Fixed(
    "DELETE FROM log WHERE (rev, sub) IN (
       SELECT old.rev, old.sub FROM log AS new JOIN log AS old ON old.rev = new.prev_rev AND old.key = new.key
       WHERE new.rev > $1 AND new.rev <= $2 AND (old.rev, old.sub) < (new.rev, new.sub)
     )",
);
const COMPACT_DELETES: Sql = Sql::Fixed("DELETE FROM log WHERE rev > $1 AND rev <= $2 AND op <> 1");
const PRUNE_REQUESTS: Sql = Sql::Fixed(
    "DELETE FROM request WHERE (identity, request_id) IN
     (SELECT identity, request_id FROM request WHERE expire_ms <= $1 ORDER BY expire_ms LIMIT $2)",
);

/// What is sent to the writer.
#[derive(Debug)]
pub(super) enum Job {
    /// For a group.
    Work { work: Work, bytes: usize, answer: oneshot::Sender<Result<Done, StoreError>> },
    /// Removes the log up to here.
    Compact { upto: Revision, answer: oneshot::Sender<Result<Revision, StoreError>> },
    /// Removes what has expired in other tables.
    Prune { audit_rows: i64 },
    /// Does what was sent before, and ends.
    Close,
}

/// Opens the database for writing and starts the task. Its end is told by the returned channel.
pub(super) async fn start(
    engine: Arc<dyn Engine>,
    jobs: mpsc::Receiver<Job>,
    queued_bytes: Arc<AtomicUsize>,
    hub: Arc<Hub>,
) -> Result<oneshot::Receiver<()>, StoreError> {
    let (opened, open) = oneshot::channel();
    let (ended, end) = oneshot::channel();
    let run = async move {
        let connection = match open_writer(engine.as_ref(), &hub).await {
            Ok(connection) => connection,
            Err(error) => return drop(opened.send(Err(error))),
        };
        // Nobody waits: the store was dropped meanwhile, and so was the queue.
        let _ = opened.send(Ok(()));
        Writer { connection, queued_bytes, hub, compaction: None, pruning: None }.run(jobs).await;
        drop(ended);
    };
    let spawned = thread::Builder::new().name("store".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        match runtime {
            Ok(runtime) => runtime.block_on(run),
            Err(error) => tracing::error!(%error, "cannot start the store's writer"),
        }
    });
    spawned.map_err(|e| StoreError::Database(Arc::new(e)))?;
    open.await.map_err(|_| StoreError::Closed)??;
    Ok(end)
}

async fn open_writer(engine: &dyn Engine, hub: &Hub) -> Result<Box<dyn Connection>, StoreError> {
    let opened = engine.writer().await;
    let mut connection = opened.map_err(|error| schema::open_error(engine, error))?;
    schema::prepare(engine, connection.as_mut()).await?;
    let meta = meta(connection.as_mut()).await;
    let (revision, _) = meta.map_err(|error| schema::open_error(engine, error))?;
    hub.start(revision);
    Ok(connection)
}

async fn meta(connection: &mut dyn Connection) -> Result<(Revision, Revision), EngineError> {
    let mut rows = connection.fetch(&META, Vec::new(), usize::MAX).await?.rows;
    let Some(row) = rows.first_mut() else {
        return Err(EngineError::unexpected("the row of meta is missing"));
    };
    Ok((row.int()?, row.int()?))
}

struct Writer {
    connection: Box<dyn Connection>,
    queued_bytes: Arc<AtomicUsize>,
    hub: Arc<Hub>,
    compaction: Option<Compaction>,
    /// Records of the audit that stay.
    pruning: Option<i64>,
}

type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

/// A compaction under way.
struct Compaction {
    upto: Revision,
    answers: Vec<Answer<Revision>>,
}

impl Writer {
    async fn run(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut arrived = Vec::with_capacity(GROUP_MAX);
        loop {
            let idle = self.compaction.is_none() && self.pruning.is_none();
            if idle || !jobs.is_empty() {
                if jobs.recv_many(&mut arrived, GROUP_MAX).await == 0 {
                    break;
                }
                let (mut group, mut answers, mut bytes) = (Vec::new(), Vec::new(), 0);
                for job in arrived.drain(..) {
                    match job {
                        Job::Work { work, bytes: size, answer } => {
                            group.push(work);
                            answers.push(answer);
                            bytes += size;
                        }
                        Job::Compact { upto, answer } => self.want_compaction(upto, answer),
                        Job::Prune { audit_rows } => self.pruning = Some(audit_rows),
                        Job::Close => jobs.close(),
                    }
                }
                self.commit(group, answers).await;
                self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            }
            self.compact_some().await;
            self.prune_some().await;
        }
        if let Err(error) = self.connection.close().await {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot close the state");
        }
    }

    async fn commit(&mut self, group: Vec<Work>, answers: Vec<Answer<Done>>) {
        if group.is_empty() {
            return;
        }
        let mut result = self.try_commit(&group).await;
        if let Err(EngineError::Lost(error)) = &result {
            tracing::warn!(%error, "the database was lost: once more on another connection");
            result = self.try_commit(&group).await;
        }
        let error = match result {
            Ok(results) => return answer_all(answers, results),
            Err(error) => error,
        };
        tracing::error!(
            error = &error as &dyn std::error::Error,
            transactions = group.len(),
            "commit failed"
        );
        if group.len() == 1 || !matches!(error, EngineError::Failed(_)) {
            let error = StoreError::from(error);
            let results = answers.iter().map(|_| Err(error.clone())).collect();
            return answer_all(answers, results);
        }
        // One that the database does not take must not fail the others.
        for (work, answer) in group.into_iter().zip(answers) {
            let result = self.try_commit(std::slice::from_ref(&work)).await;
            let results = result.unwrap_or_else(|error| vec![Err(error.into())]);
            answer_all(vec![answer], results);
        }
    }

    async fn try_commit(
        &mut self,
        group: &[Work],
    ) -> Result<Vec<Result<Done, StoreError>>, EngineError> {
        let connection = self.connection.as_mut();
        let head = match connection.begin_group().await {
            Ok(head) => head,
            Err(error) => {
                connection.rollback().await;
                return Err(error);
            }
        };
        let committed = match group::run(connection, head, group).await {
            Ok(committed) => committed,
            Err(error) => {
                connection.rollback().await;
                return Err(error);
            }
        };
        let Committed { results, commits, head, newest, unchanged } = committed;
        if unchanged {
            connection.rollback().await;
            return Ok(results);
        }
        if let Err(error) = connection.commit_group(head, newest).await {
            connection.rollback().await;
            return Err(error);
        }
        self.hub.publish(commits);
        Ok(results)
    }

    fn want_compaction(&mut self, upto: Revision, answer: Answer<Revision>) {
        let mut answers = vec![answer];
        let mut upto = upto;
        if let Some(running) = self.compaction.take() {
            answers.extend(running.answers);
            upto = upto.max(running.upto);
        }
        self.compaction = Some(Compaction { upto, answers });
    }

    async fn compact_some(&mut self) {
        let Some(mut compaction) = self.compaction.take() else { return };
        let result = match self.compact_slice(&mut compaction).await {
            Ok(true) => return self.compaction = Some(compaction),
            Ok(false) => match self.connection.tidy().await {
                Ok(()) => Ok(compaction.upto),
                Err(error) => Err(StoreError::from(error)),
            },
            Err(error) => {
                self.connection.rollback().await;
                Err(error.into())
            }
        };
        if let Err(error) = &result {
            tracing::warn!(error = error as &dyn std::error::Error, "cannot compact the log");
        }
        for answer in compaction.answers {
            // A caller that went away needs no answer.
            let _ = answer.send(result.clone());
        }
    }

    /// Whether there is more. Each slice is a whole compaction, up to its own end.
    async fn compact_slice(&mut self, compaction: &mut Compaction) -> Result<bool, EngineError> {
        let connection = self.connection.as_mut();
        connection.begin(Mode::Write).await?;
        let (newest, compacted) = meta(connection).await?;
        let upto = compaction.upto.min(newest).max(compacted);
        compaction.upto = upto;
        let args = vec![compacted.into(), upto.into(), SLICE_ROWS.into()];
        let end = connection.fetch(&SLICE_END, args, usize::MAX).await?.rows;
        let more = !end.is_empty();
        let end = end.into_iter().next().map_or(Ok(upto), |mut row| row.int())?;
        let slice = vec![compacted.into(), end.into()];
        connection.execute(&COMPACT_REPLACED, slice.clone()).await?;
        connection.execute(&COMPACT_DELETES, slice).await?;
        connection.execute(&SET_COMPACTED, vec![end.into()]).await?;
        connection.commit(None).await?;
        Ok(more)
    }

    async fn prune_some(&mut self) {
        let Some(audit_rows) = self.pruning.take() else { return };
        match self.prune_slice(audit_rows).await {
            Ok(true) => self.pruning = Some(audit_rows),
            Ok(false) => {}
            Err(error) => {
                self.connection.rollback().await;
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "cannot remove what has expired");
            }
        }
    }

    /// Whether there is more.
    async fn prune_slice(&mut self, audit_rows: i64) -> Result<bool, EngineError> {
        let connection = self.connection.as_mut();
        connection.begin(Mode::Write).await?;
        meta(connection).await?;
        let expired = vec![now_ms().into(), SLICE_ROWS.into()];
        let requests = connection.execute(&PRUNE_REQUESTS, expired).await?;
        let records = audit::prune(connection, audit_rows, SLICE_ROWS).await?;
        connection.commit(None).await?;
        Ok(requests.max(records) >= SLICE_ROWS.cast_unsigned())
    }
}

fn answer_all(answers: Vec<Answer<Done>>, results: Vec<Result<Done, StoreError>>) {
    for (answer, result) in answers.into_iter().zip(results) {
        // A caller that went away needs no answer.
        let _ = answer.send(result);
    }
}

pub(super) fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
