//! Queue groups: their place in a stream, and messages that they gave up.

use cnsmo_proto::pb::bus::Message;
use prost::Message as _;

use super::{
    Ask, Batch, Bytes, Connection, EngineError, GROUPS_MAX, Sequence, Sql, Store, StoreError,
    Stored, StreamLimits, Told, Value, delivery::BLOCKED_MS, size,
};
use crate::subject::dead_letters_of;

/// What dead letters say of themselves: subject, group, sequence and deliveries of the message, and why the group gave it up.
pub const DEAD_HEADERS: [&str; 5] = [
    "cnsmo-dead-subject",
    "cnsmo-dead-group",
    "cnsmo-dead-sequence",
    "cnsmo-dead-attempts",
    "cnsmo-dead-reason",
];
/// Dead letters that are put back at a time: a few milliseconds.
const REPLAY_ROWS: i64 = 256;

const GROUP: Sql =
    Sql::Fixed("SELECT subject, next_seq FROM queue_group WHERE stream = $1 AND name = $2");
const COUNT: Sql = Sql::Fixed("SELECT count(*) FROM queue_group WHERE stream = $1");
const PUT_GROUP: Sql = Sql::Fixed(
    "INSERT INTO queue_group (stream, name, subject, next_seq, ack_wait_ms, attempts_max) VALUES ($1, $2, $3, $4, $5, $6)
     ON CONFLICT (stream, name) DO UPDATE SET ack_wait_ms = excluded.ack_wait_ms, attempts_max = excluded.attempts_max",
);
const DELETE_GROUP: Sql = Sql::Fixed("DELETE FROM queue_group WHERE stream = $1 AND name = $2");
const DELETE_DELIVERIES: Sql = Sql::Fixed("DELETE FROM delivery WHERE stream = $1 AND grp = $2");
const RELEASE: Sql = Sql::Fixed(
    "UPDATE delivery SET holder = '', visible_ms = 0 WHERE holder = $1 AND visible_ms < $2",
);
const DEAD_LETTERS: Sql = Sql::Fixed(
    "SELECT seq, body FROM message WHERE stream = $1 AND seq > $2 ORDER BY seq LIMIT $3",
);
const DEAD_LETTER: Sql = Sql::Fixed("SELECT seq, body FROM message WHERE stream = $1 AND seq = $2");
const DELETE_MESSAGE: Sql = Sql::Fixed("DELETE FROM message WHERE stream = $1 AND seq = $2");
const DELETE_OWED: Sql = Sql::Fixed("DELETE FROM delivery WHERE stream = $1 AND seq = $2");

/// A group that somebody wants to be a member of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewGroup {
    /// Of this stream.
    pub stream: String,
    /// Name.
    pub group: String,
    /// Pattern of its subjects.
    pub subject: String,
    /// Where it begins if it is new; 0: behind the last message.
    pub start: Sequence,
    /// Time for a message until another member gets it, in milliseconds.
    pub ack_wait_ms: i64,
    /// Then a message is a dead letter.
    pub attempts_max: i64,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opened {
    /// The group is there, with this member's times.
    Group {
        /// Its next message is here or behind.
        next: Sequence,
    },
    /// The group is there, of another pattern.
    OtherSubject {
        /// That one.
        subject: String,
    },
    /// The stream has [`GROUPS_MAX`] groups.
    TooManyGroups,
    /// There are [`super::STREAMS_MAX`] streams.
    TooManyStreams,
}

impl Store {
    /// Makes a group unless it is there.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn open_group(&self, new: NewGroup) -> Result<Opened, StoreError> {
        let Told::Opened(opened) = self.tell(Ask::OpenGroup(new)).await? else { unreachable!() };
        Ok(opened)
    }

    /// Ends a group: it is owed nothing any more. Whether it was there.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn delete_group(&self, stream: &str, group: &str) -> Result<bool, StoreError> {
        let ask = Ask::DeleteGroup { stream: stream.to_owned(), group: group.to_owned() };
        let Told::Deleted(deleted) = self.tell(ask).await? else { unreachable!() };
        Ok(deleted)
    }

    /// What this core's members were given is given again: for a core that starts, and has none.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub async fn release_deliveries(&self, holder: &str) -> Result<(), StoreError> {
        self.tell(Ask::Release { holder: holder.to_owned() }).await.map(drop)
    }

    /// Puts dead letters of a stream back, each for the group that gave it up. Those of groups that are no more stay.
    /// No `group`: of all; no `sequences`: all. Returns how many.
    ///
    /// # Errors
    /// As [`Self::commit`]; what was put back before the error stays so.
    pub async fn replay(
        &self,
        stream: &str,
        group: &str,
        sequences: &[Sequence],
    ) -> Result<i64, StoreError> {
        let (mut sum, mut after) = (0, 0);
        let mut some = sequences.chunks(usize::try_from(REPLAY_ROWS).unwrap_or(1));
        loop {
            let sequences = some.next().unwrap_or_default().to_vec();
            let is_listed = !sequences.is_empty();
            let ask = Ask::Replay {
                stream: stream.to_owned(),
                group: group.to_owned(),
                sequences,
                after,
            };
            let Told::Replayed { count, last } = self.tell(ask).await? else { unreachable!() };
            sum += count;
            match last {
                Some(last) if !is_listed => after = last,
                _ if some.len() > 0 => {}
                _ => return Ok(sum),
            }
        }
    }
}

impl Batch {
    pub(super) async fn open_group(
        &mut self,
        connection: &mut dyn Connection,
        new: &NewGroup,
    ) -> Result<Opened, EngineError> {
        let NewGroup { stream, group, subject, start, ack_wait_ms, attempts_max } = new;
        let key = vec![stream.as_str().into(), group.as_str().into()];
        let known = connection.fetch(&GROUP, key, usize::MAX).await?.rows;
        let next = match known.into_iter().next() {
            Some(mut row) => {
                let (known, next) = (row.text()?, row.int()?);
                if known != *subject {
                    return Ok(Opened::OtherSubject { subject: known });
                }
                next
            }
            None => {
                let args = vec![stream.as_str().into()];
                let count = connection.fetch(&COUNT, args, usize::MAX).await?.rows;
                if count.into_iter().next().map_or(Ok(0), |mut row| row.int())? >= GROUPS_MAX {
                    return Ok(Opened::TooManyGroups);
                }
                if !self.has_stream(connection, stream).await? {
                    return Ok(Opened::TooManyStreams);
                }
                let last = self.stream(connection, stream).await?.unwrap_or_default().last;
                if *start > 0 { *start } else { last + 1 }
            }
        };
        let mut args: Vec<Value> = [stream, group, subject].map(|text| text.as_str().into()).into();
        args.extend([next, *ack_wait_ms, *attempts_max].map(Value::Int));
        connection.execute(&PUT_GROUP, args).await?;
        self.written = true;
        Ok(Opened::Group { next })
    }

    pub(super) async fn delete_group(
        &mut self,
        connection: &mut dyn Connection,
        stream: &str,
        group: &str,
    ) -> Result<bool, EngineError> {
        let key = vec![stream.into(), group.into()];
        connection.execute(&DELETE_DELIVERIES, key.clone()).await?;
        let deleted = connection.execute(&DELETE_GROUP, key).await? > 0;
        self.written = true;
        Ok(deleted)
    }

    pub(super) async fn release(
        &mut self,
        connection: &mut dyn Connection,
        holder: &str,
    ) -> Result<(), EngineError> {
        let args = vec![holder.into(), BLOCKED_MS.into()];
        self.written |= connection.execute(&RELEASE, args).await? > 0;
        Ok(())
    }

    /// Whether it was kept: not if the dead letters' stream is full of what its own groups are owed.
    pub(super) async fn bury(
        &mut self,
        connection: &mut dyn Connection,
        stream: &str,
        letter: DeadLetter<'_>,
        limits: StreamLimits,
    ) -> Result<bool, EngineError> {
        let name = dead_letters_of(stream);
        let DeadLetter { group, sequence, attempts, reason, body } = letter;
        let mut message = decode(body)?;
        let subject = std::mem::replace(&mut message.subject, name.clone());
        let (group, reason) = (group.to_owned(), reason.to_owned());
        let said = [subject, group, sequence.to_string(), attempts.to_string(), reason];
        message.headers.extend(DEAD_HEADERS.map(str::to_owned).into_iter().zip(said));
        let body = Bytes::from(message.encode_to_vec());
        if !self.has_stream(connection, &name).await?
            || !self.has_room(connection, &name, body.len(), limits).await?
        {
            return Ok(false);
        }
        let ordering_key = &message.ordering_key;
        self.append(&name, Stored { group: "", subject: &name, ordering_key, body });
        Ok(true)
    }

    /// Returns how many, and the last dead letter that was looked at.
    pub(super) async fn replay(
        &mut self,
        connection: &mut dyn Connection,
        stream: &str,
        group: &str,
        sequences: &[Sequence],
        after: Sequence,
    ) -> Result<(i64, Option<Sequence>), EngineError> {
        self.flush(connection).await?;
        let name = dead_letters_of(stream);
        let mut rows = Vec::new();
        if sequences.is_empty() {
            let args = vec![name.as_str().into(), after.into(), REPLAY_ROWS.into()];
            rows = connection.fetch(&DEAD_LETTERS, args, usize::MAX).await?.rows;
        }
        for sequence in sequences {
            let args = vec![name.as_str().into(), (*sequence).into()];
            rows.extend(connection.fetch(&DEAD_LETTER, args, usize::MAX).await?.rows);
        }
        let (mut count, mut last) = (0, None);
        for mut row in rows {
            let (sequence, body) = (row.int()?, row.blob()?);
            last = Some(sequence);
            let bytes = size(&body);
            let mut message = decode(body)?;
            let taken = DEAD_HEADERS.map(|header| message.headers.remove(header));
            let [Some(subject), Some(owner), ..] = taken else { continue };
            let key = vec![stream.into(), owner.as_str().into()];
            let known = connection.fetch(&GROUP, key, usize::MAX).await?.rows;
            if known.is_empty() || !(group.is_empty() || group == owner) {
                continue;
            }
            message.subject.clone_from(&subject);
            let body = Bytes::from(message.encode_to_vec());
            self.stream(connection, stream).await?;
            let (group, ordering_key) = (owner.as_str(), message.ordering_key.as_str());
            self.append(stream, Stored { group, subject: &subject, ordering_key, body });
            let place = || vec![name.as_str().into(), sequence.into()];
            connection.execute(&DELETE_OWED, place()).await?;
            connection.execute(&DELETE_MESSAGE, place()).await?;
            self.removed(connection, &name, 1, bytes).await?;
            count += 1;
        }
        Ok((count, last))
    }
}

/// What a group gives up.
pub(super) struct DeadLetter<'a> {
    pub(super) group: &'a str,
    pub(super) sequence: Sequence,
    pub(super) attempts: i64,
    pub(super) reason: &'a str,
    pub(super) body: Bytes,
}

fn decode(body: Bytes) -> Result<Message, EngineError> {
    Message::decode(body).map_err(|e| EngineError::Failed(e.into()))
}
