//! Giving messages to a group's members, and what they say of them.

use std::collections::{BTreeSet, HashMap};

use super::{
    Ask, Batch, Bytes, Connection, EngineError, Repeated, Row, Sequence, Sql, Store, StoreError,
    StreamLimits, Told, Value, group::DeadLetter, now_ms,
};
use crate::{
    store::engine::select_within,
    subject::{Pattern, Subject},
};

/// `visible_ms` of a message that waits for the one with its key before it. Below: given to nobody before that time.
pub(super) const BLOCKED_MS: i64 = i64::MAX;
/// Messages of a group that wait for others with their key: one key with a long queue holds up the others behind this.
const BLOCKED_MAX: i64 = 4_096;
/// Messages of other subjects, or blocked ones, that one look at a stream passes over.
const SCAN_ROWS: i64 = 256;
/// How long a message waits that should become a dead letter while there is no room for it.
const NO_ROOM_MS: i64 = 30_000;
/// For the dead letter of a message that was tried too often.
const TOO_OFTEN: &str = "not acknowledged within the number of attempts";

const GROUP: Sql = Sql::Fixed(
    "SELECT subject, next_seq, ack_wait_ms, attempts_max FROM queue_group WHERE stream = $1 AND name = $2",
);
const ADVANCE: Sql =
    Sql::Fixed("UPDATE queue_group SET next_seq = $1 WHERE stream = $2 AND name = $3");
const DUE: Sql = Sql::Fixed(
    "SELECT delivery.seq, delivery.ordering_key, delivery.attempt, message.publish_ms, message.body
     FROM delivery JOIN message ON message.stream = delivery.stream AND message.seq = delivery.seq
     WHERE delivery.stream = $1 AND delivery.grp = $2 AND delivery.visible_ms <= $3
     ORDER BY delivery.visible_ms, delivery.seq LIMIT $4",
);
const NEXT_DUE: Sql = Sql::Fixed(
    "SELECT min(visible_ms) FROM delivery WHERE stream = $1 AND grp = $2 AND visible_ms > $3 AND visible_ms < $4",
);
const BLOCKED: Sql =
    Sql::Fixed("SELECT count(*) FROM delivery WHERE stream = $1 AND grp = $2 AND visible_ms = $3");
const NEW: Sql = Sql::Fixed(
    "SELECT seq, grp, subject, ordering_key, publish_ms, body FROM message
     WHERE stream = $1 AND seq >= $2 ORDER BY seq LIMIT $3",
);
static KEYS: Repeated = Repeated::within(
    2,
    "SELECT DISTINCT ordering_key FROM delivery WHERE stream = $1 AND grp = $2 AND ordering_key <> '' AND ordering_key IN (",
    ")",
);
static PUT: Repeated = Repeated::new(
    "INSERT INTO delivery (stream, grp, seq, ordering_key, holder, attempt, visible_ms) VALUES ",
    7,
    " ON CONFLICT (stream, grp, seq) DO UPDATE SET holder = excluded.holder, attempt = excluded.attempt, visible_ms = excluded.visible_ms",
);
/// The attempt tells this delivery from a later one of the same message.
static HELD: Repeated = Repeated::within(
    2,
    "SELECT seq, ordering_key, attempt FROM delivery WHERE stream = $1 AND grp = $2 AND seq IN (",
    ")",
);
static ACK: Repeated =
    Repeated::within(2, "DELETE FROM delivery WHERE stream = $1 AND grp = $2 AND seq IN (", ")");
static UNBLOCK: Repeated = Repeated::within(
    2,
    "UPDATE delivery SET visible_ms = 0
     WHERE stream = $1 AND grp = $2 AND visible_ms = 9223372036854775807 AND seq IN (
       SELECT min(seq) FROM delivery
       WHERE stream = $1 AND grp = $2 AND ordering_key <> '' AND ordering_key IN (",
    ") GROUP BY ordering_key)",
);
const BODY: Sql = Sql::Fixed("SELECT body FROM message WHERE stream = $1 AND seq = $2");

/// What a core asks for a group: first what its members said, then more messages for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// Stream of the group.
    pub stream: String,
    /// Name of the group.
    pub group: String,
    /// The core.
    pub holder: String,
    /// Of different messages.
    pub settled: Vec<Settle>,
    /// None: no more for now.
    pub claim: Option<Claim>,
    /// Of the dead letters.
    pub limits: StreamLimits,
}

impl Serve {
    pub(super) fn bytes(&self) -> usize {
        self.stream.len() + self.group.len() + self.settled.len() * size_of::<Settle>()
    }
}

/// How much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Messages, at most.
    pub rows: usize,
    /// Ends with the message that reaches so many.
    pub bytes: usize,
}

/// What was said of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settle {
    /// Which.
    pub sequence: Sequence,
    /// The delivery that it was said of; of another one it has no effect.
    pub attempt: i64,
    /// What.
    pub settlement: Settlement,
}

/// What becomes of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// The group is done with it.
    Ack,
    /// Given again, in so many milliseconds.
    Retry {
        /// From now.
        delay_ms: i64,
    },
    /// A dead letter.
    Reject {
        /// Kept with it.
        reason: String,
    },
    /// Its time begins again.
    Extend,
    /// It was given to nobody after all: this does not count as an attempt.
    Return,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// The group is no more.
    pub gone: bool,
    /// Each is this core's until its time is over.
    pub claimed: Vec<Claimed>,
    /// There may be more now.
    pub more: bool,
    /// When there may be more if nothing happens, in milliseconds since 1970.
    pub next_due_ms: Option<i64>,
}

/// A message for a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// Its place.
    pub sequence: Sequence,
    /// Which delivery of it this is, from 1.
    pub attempt: i64,
    /// When it was kept.
    pub publish_ms: i64,
    /// It is given to another member then, unless it is settled.
    pub deadline_ms: i64,
    /// The encoded message.
    pub body: Bytes,
}

impl Store {
    /// Serves a group.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn serve(&self, serve: Serve) -> Result<Served, StoreError> {
        let Told::Served(served) = self.tell(Ask::Serve(serve)).await? else { unreachable!() };
        Ok(served)
    }
}

/// A row of `queue_group`.
struct Group {
    subject: Pattern,
    next: Sequence,
    ack_wait_ms: i64,
    attempts_max: i64,
}

/// A row of `delivery` but for stream and group.
struct Delivery {
    sequence: Sequence,
    ordering_key: String,
    holder: String,
    attempt: i64,
    visible_ms: i64,
}

impl Batch {
    pub(super) async fn serve(
        &mut self,
        connection: &mut dyn Connection,
        serve: &Serve,
    ) -> Result<Served, EngineError> {
        let key = vec![serve.stream.as_str().into(), serve.group.as_str().into()];
        let rows = connection.fetch(&GROUP, key, usize::MAX).await?.rows;
        let Some(mut row) = rows.into_iter().next() else {
            return Ok(Served { gone: true, ..Served::default() });
        };
        let subject = Pattern::parse(&row.text()?).map_err(|e| EngineError::Failed(e.into()))?;
        let (next, ack_wait_ms, attempts_max) = (row.int()?, row.int()?, row.int()?);
        let mut serving = Serving {
            connection,
            serve,
            group: Group { subject, next, ack_wait_ms, attempts_max },
            now_ms: now_ms(),
            served: Served::default(),
            changed: Vec::new(),
            done: Vec::new(),
            freed: BTreeSet::new(),
            moved: false,
        };
        serving.settle(self).await?;
        if let Some(claim) = serve.claim {
            let left = serving.claim_due(self, claim).await?;
            serving.write(self).await?;
            serving.claim_new(left).await?;
            serving.write(self).await?;
            serving.next_due().await?;
        } else {
            serving.write(self).await?;
        }
        Ok(serving.served)
    }
}

struct Serving<'a> {
    connection: &'a mut dyn Connection,
    serve: &'a Serve,
    group: Group,
    now_ms: i64,
    served: Served,
    /// Deliveries to write.
    changed: Vec<Delivery>,
    /// Those to remove.
    done: Vec<Sequence>,
    /// Keys whose next message may go.
    freed: BTreeSet<String>,
    /// The group's place was written.
    moved: bool,
}

impl Serving<'_> {
    fn key(&self) -> Vec<Value> {
        vec![self.serve.stream.as_str().into(), self.serve.group.as_str().into()]
    }

    async fn settle(&mut self, batch: &mut Batch) -> Result<(), EngineError> {
        if self.serve.settled.is_empty() {
            return Ok(());
        }
        let settled: HashMap<Sequence, &Settle> =
            self.serve.settled.iter().map(|settle| (settle.sequence, settle)).collect();
        let places: Vec<Value> = settled.keys().copied().map(Value::Int).collect();
        let key = self.key();
        for row in select_within(self.connection, &HELD, &key, &places).await? {
            let delivery = delivery(row)?;
            let said = settled.get(&delivery.sequence);
            let Some(said) = said.filter(|said| said.attempt == delivery.attempt) else { continue };
            let holder = self.serve.holder.clone();
            match &said.settlement {
                Settlement::Ack => self.finish(delivery),
                Settlement::Retry { delay_ms } => {
                    let visible_ms = self.now_ms.saturating_add(*delay_ms);
                    self.changed.push(Delivery { holder: String::new(), visible_ms, ..delivery });
                }
                Settlement::Reject { reason } => self.bury(batch, delivery, reason).await?,
                Settlement::Return => {
                    let attempt = delivery.attempt - 1;
                    self.changed.push(Delivery { attempt, ..delivery });
                }
                Settlement::Extend => {
                    let visible_ms = self.now_ms.saturating_add(self.group.ack_wait_ms);
                    self.changed.push(Delivery { holder, visible_ms, ..delivery });
                }
            }
        }
        self.write(batch).await
    }

    /// The group is done with it.
    fn finish(&mut self, delivery: Delivery) {
        self.done.push(delivery.sequence);
        if !delivery.ordering_key.is_empty() {
            self.freed.insert(delivery.ordering_key);
        }
    }

    async fn bury(
        &mut self,
        batch: &mut Batch,
        delivery: Delivery,
        reason: &str,
    ) -> Result<(), EngineError> {
        let args = vec![self.serve.stream.as_str().into(), delivery.sequence.into()];
        let rows = self.connection.fetch(&BODY, args, usize::MAX).await?.rows;
        let Some(mut row) = rows.into_iter().next() else {
            self.finish(delivery);
            return Ok(());
        };
        let letter = DeadLetter {
            group: &self.serve.group,
            sequence: delivery.sequence,
            attempts: delivery.attempt,
            reason,
            body: row.blob()?,
        };
        let (stream, limits) = (&self.serve.stream, self.serve.limits);
        if batch.bury(self.connection, stream, letter, limits).await? {
            self.finish(delivery);
        } else {
            let visible_ms = self.now_ms.saturating_add(NO_ROOM_MS);
            self.changed.push(Delivery { holder: String::new(), visible_ms, ..delivery });
        }
        Ok(())
    }

    /// Messages that were given before, or waited for another one. Returns what may still be claimed.
    async fn claim_due(&mut self, batch: &mut Batch, claim: Claim) -> Result<Claim, EngineError> {
        let mut args = self.key();
        args.extend([self.now_ms.into(), limit(claim.rows).into()]);
        let found = self.connection.fetch(&DUE, args, claim.bytes).await?;
        let mut left = claim;
        self.served.more = found.cut || found.rows.len() == claim.rows;
        for row in found.rows {
            let mut row = row;
            let (sequence, ordering_key, attempt) = (row.int()?, row.text()?, row.int()?);
            let (publish_ms, body) = (row.int()?, row.blob()?);
            let before =
                Delivery { sequence, ordering_key, holder: String::new(), attempt, visible_ms: 0 };
            if attempt >= self.group.attempts_max {
                self.bury(batch, before, TOO_OFTEN).await?;
                // The next one of its key is looked for in the next turn.
                self.served.more = true;
                continue;
            }
            left.rows -= 1;
            left.bytes = left.bytes.saturating_sub(body.len());
            self.claim(before, publish_ms, body);
        }
        Ok(left)
    }

    /// Messages that the group has not looked at.
    async fn claim_new(&mut self, left: Claim) -> Result<(), EngineError> {
        let mut args = self.key();
        args.push(BLOCKED_MS.into());
        let mut blocked = self.connection.fetch(&BLOCKED, args, usize::MAX).await?.rows;
        let blocked = blocked.first_mut().map_or(Ok(0), Row::int)?;
        if left.rows == 0 || left.bytes == 0 || blocked >= BLOCKED_MAX {
            return Ok(());
        }
        let rows = limit(left.rows).max(SCAN_ROWS);
        let args = vec![self.serve.stream.as_str().into(), self.group.next.into(), rows.into()];
        let found = self.connection.fetch(&NEW, args, left.bytes).await?;
        let all = found.rows.len();
        self.served.more |= found.cut || limit(all) == rows;
        let new = found.rows.into_iter().map(new).collect::<Result<Vec<_>, _>>()?;
        let mut busy = self.busy(&new).await?;
        let (mut claimed, before) = (0, self.group.next);
        for message in new {
            if claimed == left.rows {
                self.served.more = true;
                break;
            }
            self.group.next = message.sequence + 1;
            if !self.wants(&message)? {
                continue;
            }
            let New { sequence, ordering_key, publish_ms, body, .. } = message;
            let key = ordering_key.clone();
            let (holder, visible_ms) = (String::new(), BLOCKED_MS);
            let delivery = Delivery { sequence, ordering_key, holder, attempt: 0, visible_ms };
            if !key.is_empty() && !busy.insert(key) {
                self.changed.push(delivery);
                continue;
            }
            claimed += 1;
            self.claim(delivery, publish_ms, body);
        }
        if self.group.next != before {
            let mut args = vec![self.group.next.into()];
            args.extend(self.key());
            self.connection.execute(&ADVANCE, args).await?;
            self.moved = true;
        }
        Ok(())
    }

    fn wants(&self, message: &New) -> Result<bool, EngineError> {
        let for_all = message.group.is_empty();
        let subject =
            Subject::parse(&message.subject).map_err(|e| EngineError::Failed(e.into()))?;
        Ok((for_all || message.group == self.serve.group) && self.group.subject.matches(subject))
    }

    /// Keys of which a message is not acknowledged.
    async fn busy(&mut self, new: &[New]) -> Result<BTreeSet<String>, EngineError> {
        let keys: BTreeSet<&str> =
            new.iter().map(|m| m.ordering_key.as_str()).filter(|key| !key.is_empty()).collect();
        let keys: Vec<Value> = keys.into_iter().map(Value::from).collect();
        let key = self.key();
        let rows = select_within(self.connection, &KEYS, &key, &keys).await?;
        rows.into_iter().map(|mut row| row.text()).collect()
    }

    fn claim(&mut self, delivery: Delivery, publish_ms: i64, body: Bytes) {
        let attempt = delivery.attempt + 1;
        let deadline_ms = self.now_ms.saturating_add(self.group.ack_wait_ms);
        let holder = self.serve.holder.clone();
        let sequence = delivery.sequence;
        self.changed.push(Delivery { holder, attempt, visible_ms: deadline_ms, ..delivery });
        self.served.claimed.push(Claimed { sequence, attempt, publish_ms, deadline_ms, body });
    }

    async fn write(&mut self, batch: &mut Batch) -> Result<(), EngineError> {
        batch.written |= self.moved || !self.changed.is_empty() || !self.done.is_empty();
        let mut rows = Vec::with_capacity(self.changed.len() * 7);
        for delivery in std::mem::take(&mut self.changed) {
            let Delivery { sequence, ordering_key, holder, attempt, visible_ms } = delivery;
            rows.extend(self.key());
            rows.extend([sequence.into(), ordering_key.into(), holder.into()]);
            rows.extend([attempt.into(), visible_ms.into()]);
        }
        self.connection.insert(&PUT, rows).await?;
        let key = self.key();
        let done: Vec<Value> = self.done.drain(..).map(Value::Int).collect();
        select_within(self.connection, &ACK, &key, &done).await?;
        let freed = std::mem::take(&mut self.freed);
        let freed: Vec<Value> = freed.into_iter().map(Value::Text).collect();
        select_within(self.connection, &UNBLOCK, &key, &freed).await.map(drop)
    }

    async fn next_due(&mut self) -> Result<(), EngineError> {
        let mut args = self.key();
        args.extend([self.now_ms.into(), BLOCKED_MS.into()]);
        let rows = self.connection.fetch(&NEXT_DUE, args, usize::MAX).await?.rows;
        if let Some(mut row) = rows.into_iter().next()
            && let Value::Int(due) = row.value()?
        {
            self.served.next_due_ms = Some(due);
        }
        Ok(())
    }
}

/// A message that the group has not looked at.
struct New {
    sequence: Sequence,
    group: String,
    subject: String,
    ordering_key: String,
    publish_ms: i64,
    body: Bytes,
}

fn new(mut row: Row) -> Result<New, EngineError> {
    Ok(New {
        sequence: row.int()?,
        group: row.text()?,
        subject: row.text()?,
        ordering_key: row.text()?,
        publish_ms: row.int()?,
        body: row.blob()?,
    })
}

fn delivery(mut row: Row) -> Result<Delivery, EngineError> {
    Ok(Delivery {
        sequence: row.int()?,
        ordering_key: row.text()?,
        holder: String::new(),
        attempt: row.int()?,
        visible_ms: 0,
    })
}

fn limit(rows: usize) -> i64 {
    i64::try_from(rows).unwrap_or(i64::MAX)
}
