//! Durable messages: streams of them, and what their queue groups are still owed.
//!
//! Messages are committed in the same groups as all else, but take no revision: their order is that of their stream.
//! - `stream`: one row for each, with its last sequence and what it holds.
//! - `message`: the messages. One stays until retention removes it, at the earliest when no group is owed it any more.
//! - `message_id`: ids of the last [`DEDUP_WINDOW`].
//! - `queue_group`: each group's place in its stream: what is behind it, the group has not looked at.
//! - `delivery`: what is before that place and not acknowledged yet.

mod delivery;
mod group;
mod history;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use bytes::Bytes;

use super::{
    Sequence, Store, StoreError,
    engine::{Connection, EngineError, Repeated, Row, Sql, Value, select_in},
    group::{Done, Work},
    types::check_text,
    writer::now_ms,
};

pub use delivery::{Claim, Claimed, Serve, Served, Settle, Settlement};
pub use group::{DEAD_HEADERS, NewGroup, Opened};
pub use history::{GroupState, Kept, StreamState};

/// Within this time a second message of a stream with the same id is not kept again.
pub const DEDUP_WINDOW: Duration = Duration::from_secs(600);
/// Streams: each has rows and counters, and appears in lists.
pub const STREAMS_MAX: i64 = 1_000;
/// Queue groups of one stream: each is looked at when old messages are removed.
pub const GROUPS_MAX: i64 = 64;

static STREAMS: Repeated =
    Repeated::new("SELECT name, last_seq, messages, bytes FROM stream WHERE name IN (", 0, ")");
const COUNT_STREAMS: Sql = Sql::Fixed("SELECT count(*) FROM stream");
static PUT_STREAMS: Repeated = Repeated::new(
    "INSERT INTO stream (name, last_seq, messages, bytes) VALUES ",
    4,
    " ON CONFLICT (name) DO UPDATE SET last_seq = excluded.last_seq, messages = excluded.messages, bytes = excluded.bytes",
);
static PUT_MESSAGES: Repeated = Repeated::new(
    "INSERT INTO message (stream, seq, grp, subject, ordering_key, publish_ms, body) VALUES ",
    7,
    "",
);
static IDS: Repeated = Repeated::new(
    "SELECT stream, message_id, seq, expire_ms FROM message_id WHERE (stream, message_id) IN (VALUES ",
    2,
    ")",
);
static PUT_IDS: Repeated = Repeated::new(
    "INSERT INTO message_id (stream, message_id, seq, expire_ms) VALUES ",
    4,
    " ON CONFLICT (stream, message_id) DO UPDATE SET seq = excluded.seq, expire_ms = excluded.expire_ms",
);

/// How much of a stream is kept. What a group is owed is kept whatever these say: a stream that is full of such messages
/// takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamLimits {
    /// Messages.
    pub messages: i64,
    /// Bytes of messages.
    pub bytes: i64,
    /// Age of messages.
    pub age: Duration,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self { messages: 1_000_000, bytes: 1 << 30, age: Duration::from_secs(7 * 24 * 3_600) }
    }
}

/// Messages to keep in one stream, in their order: all or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMessages {
    /// Its name.
    pub stream: String,
    /// Of the stream.
    pub limits: StreamLimits,
    /// At least one.
    pub messages: Vec<NewMessage>,
}

/// A message to keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMessage {
    /// Decides which groups want it.
    pub subject: String,
    /// Not empty: one of these at a time, in order.
    pub ordering_key: String,
    /// Not empty: kept once.
    pub message_id: String,
    /// The encoded message.
    pub body: Bytes,
}

impl NewMessage {
    fn bytes(&self) -> usize {
        let texts = [&self.subject, &self.ordering_key, &self.message_id];
        size_of::<Self>() + self.body.len() + texts.map(String::len).iter().sum::<usize>()
    }
}

/// What became of messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Published {
    /// They are on disk.
    Kept(Vec<Receipt>),
    /// The stream is full of messages that its groups are owed.
    Full,
    /// There are [`STREAMS_MAX`] streams, and this would be one more.
    TooManyStreams,
}

/// What its publisher is told of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// In its stream.
    pub sequence: Sequence,
    /// One with its id was kept before, there.
    pub duplicate: bool,
}

/// What is asked of the writer about messages.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    Publish(NewMessages),
    OpenGroup(NewGroup),
    DeleteGroup { stream: String, group: String },
    Serve(Serve),
    Release { holder: String },
    Replay { stream: String, group: String, sequences: Vec<Sequence>, after: Sequence },
    Trim { stream: String, limits: StreamLimits },
    Forget,
}

/// What became of it.
#[derive(Debug)]
pub(super) enum Told {
    Published(Published),
    Opened(Opened),
    Deleted(bool),
    Served(Served),
    Released,
    Replayed {
        count: i64,
        last: Option<Sequence>,
    },
    /// How many rows were removed.
    Trimmed(u64),
}

impl Store {
    /// Keeps messages, and returns once they are on disk.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn publish(&self, new: NewMessages) -> Result<Published, StoreError> {
        for message in &new.messages {
            check_text(&message.message_id)?;
            check_text(&message.ordering_key)?;
        }
        let Told::Published(published) = self.tell(Ask::Publish(new)).await? else {
            unreachable!()
        };
        Ok(published)
    }

    /// Waits until another core may have published or given up messages. For one caller.
    pub async fn other_core_committed(&self) {
        self.inner.hub.woken.notified().await;
    }

    async fn tell(&self, ask: Ask) -> Result<Told, StoreError> {
        let Done::Told(told) = self.ask(Work::Message(ask)).await? else { unreachable!() };
        Ok(told)
    }
}

impl Ask {
    /// Bytes in memory, about.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Publish(new) => {
                new.stream.len() + new.messages.iter().map(NewMessage::bytes).sum::<usize>()
            }
            Self::Serve(serve) => size_of::<Self>() + serve.bytes(),
            Self::Replay { sequences, .. } => size_of::<Self>() + size_of_val(&**sequences),
            Self::OpenGroup(_)
            | Self::DeleteGroup { .. }
            | Self::Release { .. }
            | Self::Trim { .. }
            | Self::Forget => size_of::<Self>(),
        }
    }
}

/// The messages of one commit.
#[derive(Default)]
pub(super) struct Batch {
    /// Those that were looked at; none: there is none of the name.
    streams: BTreeMap<String, Option<Stream>>,
    changed: BTreeSet<String>,
    /// How many there are; none: not counted yet.
    stream_count: Option<i64>,
    messages: Vec<Value>,
    /// By stream and id.
    ids: HashMap<(String, String), Sequence>,
    new_ids: Vec<Value>,
    /// Something was written already.
    written: bool,
}

/// A row of `stream`.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    last: Sequence,
    messages: i64,
    bytes: i64,
}

impl Batch {
    pub(super) fn is_unchanged(&self) -> bool {
        self.changed.is_empty() && self.messages.is_empty() && !self.written
    }

    /// Reads at once what many messages need.
    pub(super) async fn load(
        &mut self,
        connection: &mut dyn Connection,
        asks: impl Iterator<Item = &Ask>,
    ) -> Result<(), EngineError> {
        let (mut streams, mut ids) = (BTreeSet::new(), Vec::new());
        for ask in asks {
            let Ask::Publish(NewMessages { stream, messages, .. }) = ask else { continue };
            streams.insert(stream.as_str());
            for id in messages.iter().map(|message| &message.message_id) {
                if !id.is_empty() {
                    ids.extend([stream.as_str().into(), id.as_str().into()]);
                }
            }
        }
        let names: Vec<Value> = streams.iter().map(|name| Value::from(*name)).collect();
        self.streams.extend(streams.into_iter().map(|name| (name.to_owned(), None)));
        for mut row in select_in(connection, &STREAMS, &names).await? {
            let name = row.text()?;
            self.streams.insert(name, Some(stream(&mut row)?));
        }
        let now = now_ms();
        for mut row in select_in(connection, &IDS, &ids).await? {
            let (key, sequence) = ((row.text()?, row.text()?), row.int()?);
            if row.int()? > now {
                self.ids.insert(key, sequence);
            }
        }
        Ok(())
    }

    pub(super) async fn settle(
        &mut self,
        connection: &mut dyn Connection,
        ask: &Ask,
    ) -> Result<Told, EngineError> {
        Ok(match ask {
            Ask::Publish(new) => Told::Published(self.publish(connection, new).await?),
            Ask::OpenGroup(new) => Told::Opened(self.open_group(connection, new).await?),
            Ask::DeleteGroup { stream, group } => {
                Told::Deleted(self.delete_group(connection, stream, group).await?)
            }
            Ask::Serve(serve) => Told::Served(self.serve(connection, serve).await?),
            Ask::Release { holder } => {
                self.release(connection, holder).await?;
                Told::Released
            }
            Ask::Replay { stream, group, sequences, after } => {
                let (count, last) =
                    self.replay(connection, stream, group, sequences, *after).await?;
                Told::Replayed { count, last }
            }
            Ask::Trim { stream, limits } => {
                Told::Trimmed(self.trim_old(connection, stream, *limits).await?)
            }
            Ask::Forget => Told::Trimmed(self.forget_ids(connection).await?),
        })
    }

    pub(super) async fn write(
        mut self,
        connection: &mut dyn Connection,
    ) -> Result<(), EngineError> {
        self.flush(connection).await?;
        connection.insert(&PUT_IDS, self.new_ids).await?;
        let mut rows = Vec::with_capacity(self.changed.len() * 4);
        for name in self.changed {
            let stream = self.streams.get(&name).copied().flatten().unwrap_or_default();
            rows.push(name.into());
            rows.extend([stream.last, stream.messages, stream.bytes].map(Value::Int));
        }
        connection.insert(&PUT_STREAMS, rows).await.map(drop)
    }

    async fn publish(
        &mut self,
        connection: &mut dyn Connection,
        new: &NewMessages,
    ) -> Result<Published, EngineError> {
        let NewMessages { stream, limits, messages } = new;
        let kept_before = |message: &NewMessage| {
            let id = &message.message_id;
            !id.is_empty() && self.ids.contains_key(&(stream.clone(), id.clone()))
        };
        if !messages.iter().all(kept_before) {
            if !self.has_stream(connection, stream).await? {
                return Ok(Published::TooManyStreams);
            }
            let bytes = messages.iter().map(|message| message.body.len()).sum();
            if !self.has_room(connection, stream, (messages.len(), bytes), *limits).await? {
                return Ok(Published::Full);
            }
        }
        Ok(Published::Kept(messages.iter().map(|message| self.keep(stream, message)).collect()))
    }

    /// There is room for it.
    fn keep(&mut self, stream: &str, message: &NewMessage) -> Receipt {
        let NewMessage { subject, ordering_key, message_id, body } = message;
        let id = (!message_id.is_empty()).then(|| (stream.to_owned(), message_id.clone()));
        if let Some(sequence) = id.as_ref().and_then(|id| self.ids.get(id)) {
            return Receipt { sequence: *sequence, duplicate: true };
        }
        let message = Stored { group: "", subject, ordering_key, body: body.clone() };
        let sequence = self.append(stream, message);
        if let Some(id) = id {
            let expire = now_ms().saturating_add(millis(DEDUP_WINDOW));
            self.new_ids.extend([stream.into(), message_id.as_str().into()]);
            self.new_ids.extend([sequence.into(), expire.into()]);
            self.ids.insert(id, sequence);
        }
        Receipt { sequence, duplicate: false }
    }

    /// Puts a message at the end of a stream that is there.
    fn append(&mut self, name: &str, message: Stored<'_>) -> Sequence {
        let Stored { group, subject, ordering_key, body } = message;
        let stream = self.streams.entry(name.to_owned()).or_default().get_or_insert_default();
        stream.last += 1;
        stream.messages += 1;
        stream.bytes += size(&body);
        let sequence = stream.last;
        self.messages.extend([name.into(), sequence.into(), group.into(), subject.into()]);
        self.messages.extend([ordering_key.into(), now_ms().into(), body.into()]);
        self.change(name);
        sequence
    }

    /// Writes the new messages, so that statements see them.
    async fn flush(&mut self, connection: &mut dyn Connection) -> Result<(), EngineError> {
        let rows = std::mem::take(&mut self.messages);
        self.written |= !rows.is_empty();
        connection.insert(&PUT_MESSAGES, rows).await.map(drop)
    }

    fn change(&mut self, name: &str) {
        if !self.changed.contains(name) {
            self.changed.insert(name.to_owned());
        }
    }

    async fn stream(
        &mut self,
        connection: &mut dyn Connection,
        name: &str,
    ) -> Result<Option<Stream>, EngineError> {
        if let Some(known) = self.streams.get(name) {
            return Ok(*known);
        }
        let rows = select_in(connection, &STREAMS, &[name.into()]).await?;
        let mut found = None;
        for mut row in rows {
            row.text()?;
            found = Some(stream(&mut row)?);
        }
        self.streams.insert(name.to_owned(), found);
        Ok(found)
    }

    /// Makes the stream if there may be one more. Whether it is there.
    async fn has_stream(
        &mut self,
        connection: &mut dyn Connection,
        name: &str,
    ) -> Result<bool, EngineError> {
        if self.stream(connection, name).await?.is_some() {
            return Ok(true);
        }
        let count = match self.stream_count {
            Some(count) => count,
            None => {
                let rows = connection.fetch(&COUNT_STREAMS, Vec::new(), usize::MAX).await?.rows;
                rows.into_iter().next().map_or(Ok(0), |mut row| row.int())?
            }
        };
        if count >= STREAMS_MAX {
            return Ok(false);
        }
        self.stream_count = Some(count + 1);
        self.streams.insert(name.to_owned(), Some(Stream::default()));
        self.change(name);
        Ok(true)
    }
}

/// A message but for its place.
struct Stored<'a> {
    /// Empty: for all groups.
    group: &'a str,
    subject: &'a str,
    ordering_key: &'a str,
    body: Bytes,
}

fn stream(row: &mut Row) -> Result<Stream, EngineError> {
    Ok(Stream { last: row.int()?, messages: row.int()?, bytes: row.int()? })
}

fn size(body: &Bytes) -> i64 {
    i64::try_from(body.len()).unwrap_or(i64::MAX)
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
