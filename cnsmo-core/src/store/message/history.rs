//! What streams hold, and removing what is old.

use super::{
    Batch, Bytes, Connection, EngineError, Row, Sequence, Sql, Store, StoreError, StreamLimits,
    Told, Value, delivery::BLOCKED_MS, millis, now_ms,
};
use crate::store::message::Ask;

/// Messages that are removed at a time: a few milliseconds.
const SLICE_ROWS: i64 = 1_000;
/// Bytes of messages that one look at a stream takes into memory.
const READ_BYTES_MAX: usize = 4 << 20;

/// Nobody is owed what is before both.
const OWED: Sql = Sql::Fixed(
    "SELECT next_seq, (SELECT min(seq) FROM delivery WHERE delivery.stream = queue_group.stream AND delivery.grp = queue_group.name)
     FROM queue_group WHERE stream = $1",
);
const OLDEST: Sql = Sql::Fixed(
    "SELECT seq, length(body), publish_ms FROM message WHERE stream = $1 AND seq < $2 ORDER BY seq LIMIT $3",
);
const DELETE: Sql = Sql::Fixed("DELETE FROM message WHERE stream = $1 AND seq <= $2");
const FORGET: Sql = Sql::Fixed(
    "DELETE FROM message_id WHERE (stream, message_id) IN
     (SELECT stream, message_id FROM message_id WHERE expire_ms <= $1 ORDER BY expire_ms LIMIT $2)",
);
const LIST: Sql = Sql::Fixed(
    "SELECT name, last_seq, messages, bytes,
       (SELECT min(seq) FROM message WHERE message.stream = stream.name) FROM stream ORDER BY name",
);
const LIST_GROUPS: Sql = Sql::Fixed(
    "SELECT stream, name, subject, next_seq,
       (SELECT count(*) FROM delivery WHERE delivery.stream = queue_group.stream AND delivery.grp = queue_group.name),
       (SELECT count(*) FROM delivery WHERE delivery.stream = queue_group.stream AND delivery.grp = queue_group.name
          AND delivery.holder <> '' AND delivery.visible_ms > $1 AND delivery.visible_ms < $2)
     FROM queue_group ORDER BY stream, name",
);
const READ: Sql = Sql::Fixed(
    "SELECT seq, publish_ms, body FROM message WHERE stream = $1 AND seq > $2 ORDER BY seq LIMIT $3",
);

/// A stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamState {
    /// Name.
    pub name: String,
    /// How many it holds.
    pub messages: i64,
    /// Of their bodies.
    pub bytes: i64,
    /// Of the oldest message that it holds; 0: it holds none.
    pub first: Sequence,
    /// The last one given out.
    pub last: Sequence,
    /// By name.
    pub groups: Vec<GroupState>,
}

/// A queue group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupState {
    /// Name.
    pub name: String,
    /// Pattern of its subjects.
    pub subject: String,
    /// Not acknowledged, at most: of what the group has not looked at yet, some may be of other subjects.
    pub pending: i64,
    /// With members.
    pub in_flight: i64,
}

/// A message of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Place.
    pub sequence: Sequence,
    /// When it was kept, in milliseconds since 1970.
    pub publish_ms: i64,
    /// The encoded message.
    pub body: Bytes,
}

impl Store {
    /// All streams, by name.
    ///
    /// # Errors
    /// [`StoreError::Database`], as for all that reads.
    pub async fn streams(&self) -> Result<Vec<StreamState>, StoreError> {
        let mut reader = self.inner.readers.take().await?;
        let rows = reader.fetch(&LIST, Vec::new(), usize::MAX).await?.rows;
        let args = vec![now_ms().into(), BLOCKED_MS.into()];
        let groups = reader.fetch(&LIST_GROUPS, args, usize::MAX).await?.rows;
        reader.give_back();
        let mut streams = Vec::with_capacity(rows.len());
        for mut row in rows {
            let (name, last, messages) = (row.text()?, row.int()?, row.int()?);
            let (bytes, first) = (row.int()?, row.int()?);
            streams.push(StreamState { name, messages, bytes, first, last, groups: Vec::new() });
        }
        for mut row in groups {
            let stream = row.text()?;
            let at = streams.binary_search_by(|known| known.name.as_str().cmp(&stream));
            // A group of a stream that was made between the two readings.
            let Some(stream) = at.ok().and_then(|at| streams.get_mut(at)) else { continue };
            let (name, subject, next) = (row.text()?, row.text()?, row.int()?);
            let (taken, in_flight) = (row.int()?, row.int()?);
            let pending = (stream.last + 1 - next.max(stream.first)).max(0) + taken;
            stream.groups.push(GroupState { name, subject, pending, in_flight });
        }
        Ok(streams)
    }

    /// Messages of a stream behind a place, in order: at most so many, or fewer if they are large.
    ///
    /// # Errors
    /// As [`Self::streams`].
    pub async fn messages(
        &self,
        stream: &str,
        after: Sequence,
        rows: usize,
    ) -> Result<Vec<Kept>, StoreError> {
        let mut reader = self.inner.readers.take().await?;
        let limit = i64::try_from(rows).unwrap_or(i64::MAX);
        let args = vec![stream.into(), after.into(), limit.into()];
        let rows = reader.fetch(&READ, args, READ_BYTES_MAX).await?.rows;
        reader.give_back();
        rows.into_iter().map(kept).collect::<Result<_, _>>().map_err(Into::into)
    }

    /// Removes messages that are above the limits and that nobody is owed. Returns how many.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn trim(&self, stream: &str, limits: StreamLimits) -> Result<u64, StoreError> {
        let ask = || Ask::Trim { stream: stream.to_owned(), limits };
        self.in_slices(ask).await
    }

    /// Forgets message ids that are older than [`super::DEDUP_WINDOW`].
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn forget_message_ids(&self) -> Result<u64, StoreError> {
        self.in_slices(|| Ask::Forget).await
    }

    /// As often as there is something to remove, so that others get their turn in between.
    async fn in_slices(&self, ask: impl Fn() -> Ask) -> Result<u64, StoreError> {
        let mut sum = 0;
        loop {
            let Told::Trimmed(count) = self.tell(ask()).await? else { unreachable!() };
            sum += count;
            if count == 0 {
                return Ok(sum);
            }
        }
    }
}

fn kept(mut row: Row) -> Result<Kept, EngineError> {
    Ok(Kept { sequence: row.int()?, publish_ms: row.int()?, body: row.blob()? })
}

impl Batch {
    /// Whether one more message of this size may be in the stream, after old ones were removed if need be.
    pub(super) async fn has_room(
        &mut self,
        connection: &mut dyn Connection,
        name: &str,
        bytes: usize,
        limits: StreamLimits,
    ) -> Result<bool, EngineError> {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        loop {
            let stream = self.stream(connection, name).await?.unwrap_or_default();
            let over = stream.messages >= limits.messages
                || stream.bytes.saturating_add(bytes) > limits.bytes;
            if !over {
                return Ok(true);
            }
            // More than needed, so that not each further message has to look for one.
            let most = (limits.messages / 100).clamp(1, SLICE_ROWS);
            if self.remove_oldest(connection, name, most, |_| true).await? == 0 {
                return Ok(false);
            }
        }
    }

    pub(super) async fn trim_old(
        &mut self,
        connection: &mut dyn Connection,
        name: &str,
        limits: StreamLimits,
    ) -> Result<u64, EngineError> {
        let oldest_ms = now_ms().saturating_sub(millis(limits.age));
        self.remove_oldest(connection, name, SLICE_ROWS, |publish_ms| publish_ms < oldest_ms).await
    }

    pub(super) async fn forget_ids(
        &mut self,
        connection: &mut dyn Connection,
    ) -> Result<u64, EngineError> {
        let args = vec![now_ms().into(), SLICE_ROWS.into()];
        let removed = connection.execute(&FORGET, args).await?;
        self.written |= removed > 0;
        Ok(removed)
    }

    /// Removes the oldest messages for which `may` holds and that nobody is owed. Returns how many.
    async fn remove_oldest(
        &mut self,
        connection: &mut dyn Connection,
        name: &str,
        most: i64,
        may: impl Fn(i64) -> bool,
    ) -> Result<u64, EngineError> {
        self.flush(connection).await?;
        let mut owed = i64::MAX;
        for mut row in connection.fetch(&OWED, vec![name.into()], usize::MAX).await?.rows {
            let next = row.int()?;
            owed = owed.min(next);
            if let Value::Int(delivery) = row.value()? {
                owed = owed.min(delivery);
            }
        }
        let args = vec![name.into(), owed.into(), most.into()];
        let (mut last, mut count, mut bytes) = (0, 0, 0);
        for mut row in connection.fetch(&OLDEST, args, usize::MAX).await?.rows {
            let (sequence, length, publish_ms) = (row.int()?, row.int()?, row.int()?);
            if !may(publish_ms) {
                break;
            }
            (last, count, bytes) = (sequence, count + 1, bytes + length);
        }
        if count > 0 {
            connection.execute(&DELETE, vec![name.into(), last.into()]).await?;
            self.removed(connection, name, count, bytes).await?;
        }
        Ok(count.cast_unsigned())
    }

    /// So many messages of so many bytes are no longer in the stream.
    pub(super) async fn removed(
        &mut self,
        connection: &mut dyn Connection,
        name: &str,
        count: i64,
        bytes: i64,
    ) -> Result<(), EngineError> {
        self.stream(connection, name).await?;
        if let Some(stream) = self.streams.get_mut(name).and_then(Option::as_mut) {
            stream.messages -= count;
            stream.bytes -= bytes;
        }
        self.change(name);
        Ok(())
    }
}
