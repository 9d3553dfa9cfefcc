//! One watch: the keys as they are, if wanted, and then each change.
//!
//! Nothing is kept for a watcher but its place: the next message is made when HTTP/2 has room for it. One that reads slowly
//! is served from the log once the changes have left the store's memory, and begins anew with a snapshot once they have left
//! the log.

use std::{sync::Arc, time::Duration};

use cnsmo_proto::pb::state::{Event, WatchResponse, event, watch_response::Kind};
use futures::{Stream, stream};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::{PAGE_BYTES, PAGE_KEYS_MAX, access::Access, check::Watch, key_value};
use crate::{
    error::Error,
    store::{
        self as store, Change, Commit, Entry, Feed, Range, Revision, Slice, Store, StoreError,
    },
};

/// A message of events takes no further commit beyond this. One commit can be larger.
const EVENTS_BYTES_MAX: usize = 1 << 20;
/// Bytes of earlier values in a message; those beyond are left out.
const PREV_BYTES_MAX: usize = 2 << 20;

pub(super) struct Watcher {
    store: Store,
    access: Access,
    prefix: String,
    prev_kv: bool,
    bookmark: Duration,
    /// Everything up to it has been sent.
    revision: Revision,
    state: State,
}

enum State {
    /// Behind `revision`, if the history reaches so far.
    Resume,
    /// It does not.
    Compacted,
    /// The keys behind `after`, as they were at `at`; none: as they are.
    Snapshot { at: Option<Revision>, after: Option<String> },
    /// The snapshot has been sent.
    Synced,
    /// Each change.
    Live { feed: Feed, bookmark_at: Instant },
    /// After an error.
    Ended,
}

impl Watcher {
    pub(super) fn new(store: Store, access: Access, watch: Watch) -> Self {
        let Watch { prefix, start, epoch, prev_kv, bookmark } = watch;
        let (state, revision) = match start {
            None => (State::Snapshot { at: None, after: None }, 0),
            // That revision is another one now.
            Some(_) if epoch != 0 && epoch != store.epoch() => (State::Compacted, 0),
            Some(start) => (State::Resume, start),
        };
        Self { store, access, prefix, prev_kv, bookmark, revision, state }
    }

    /// The revision that must be there; 0: any.
    pub(super) fn start(&self) -> Revision {
        self.revision
    }

    /// Its messages.
    pub(super) fn stream(self) -> impl Stream<Item = Result<WatchResponse, Status>> {
        stream::unfold(self, |mut watcher| async {
            if matches!(watcher.state, State::Ended) {
                return None;
            }
            let message = watcher.next().await.map_err(|error| {
                watcher.state = State::Ended;
                Status::from(Error::from(error))
            });
            Some((message, watcher))
        })
    }

    async fn next(&mut self) -> Result<WatchResponse, StoreError> {
        loop {
            let step = match &mut self.state {
                State::Resume => self.resume().await,
                State::Compacted => {
                    self.state = State::Snapshot { at: None, after: None };
                    return Ok(self.message(Kind::Compacted, 0, Vec::new()));
                }
                State::Snapshot { .. } => self.snapshot().await,
                State::Synced => {
                    self.state = State::Live {
                        feed: self.store.follow(self.revision),
                        bookmark_at: Instant::now() + self.bookmark,
                    };
                    return Ok(self.message(Kind::Synced, self.revision, Vec::new()));
                }
                State::Live { .. } => self.live().await,
                State::Ended => Err(StoreError::Closed),
            };
            match step {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(StoreError::Compacted { .. }) => self.state = State::Compacted,
                Err(error) => return Err(error),
            }
        }
    }

    fn message(&self, kind: Kind, revision: Revision, events: Vec<Event>) -> WatchResponse {
        WatchResponse { kind: kind.into(), revision, events, epoch: self.store.epoch() }
    }

    async fn resume(&mut self) -> Result<Option<WatchResponse>, StoreError> {
        self.store.log_after(self.revision, 1).await?;
        self.state = State::Synced;
        Ok(None)
    }

    async fn snapshot(&mut self) -> Result<Option<WatchResponse>, StoreError> {
        let State::Snapshot { at, after } = &mut self.state else { return Ok(None) };
        let range = Range {
            prefix: self.prefix.clone(),
            after: after.take(),
            at: *at,
            rows: PAGE_KEYS_MAX,
            bytes: PAGE_BYTES,
            keys_only: false,
        };
        let Slice { entries, revision, more } = self.store.range(range).await?;
        self.state = match entries.last() {
            Some(last) if more => {
                State::Snapshot { at: Some(revision), after: Some(last.key.clone()) }
            }
            _ => {
                self.revision = revision;
                State::Synced
            }
        };
        let readable = entries.into_iter().filter(|entry| self.access.reads(&entry.key));
        let events: Vec<Event> = readable
            .map(|entry| Event {
                r#type: event::Type::Put.into(),
                kv: Some(key_value(entry)),
                prev_kv: None,
            })
            .collect();
        // 0: a snapshot cannot be resumed in the middle.
        Ok((!events.is_empty()).then(|| self.message(Kind::Snapshot, 0, events)))
    }

    async fn live(&mut self) -> Result<Option<WatchResponse>, StoreError> {
        let State::Live { feed, bookmark_at } = &mut self.state else { return Ok(None) };
        let next = timeout_at(*bookmark_at, feed.next()).await;
        let Ok(commits) = next else {
            *bookmark_at = Instant::now() + self.bookmark;
            return Ok(Some(self.message(Kind::Bookmark, self.revision, Vec::new())));
        };
        let commits = commits?;
        let events = self.events(&commits).await?;
        if events.is_empty() {
            return Ok(None);
        }
        if let State::Live { feed, bookmark_at } = &mut self.state {
            *bookmark_at = Instant::now() + self.bookmark;
            if self.revision < feed.revision() {
                // The rest is fetched again: a watcher that does not read must not keep it in memory.
                *feed = self.store.follow(self.revision);
            }
        }
        Ok(Some(self.message(Kind::Events, self.revision, events)))
    }

    /// Of as many commits as a message takes, up to which the watch has come then.
    async fn events(&mut self, commits: &[Arc<Commit>]) -> Result<Vec<Event>, StoreError> {
        let (mut events, mut bytes, mut prev_bytes) = (Vec::new(), 0, 0);
        for commit in commits {
            for (index, event) in commit.events.iter().enumerate() {
                let key = &event.entry.key;
                if !key.starts_with(&self.prefix) || !self.access.reads(key) {
                    continue;
                }
                let mut prev_kv = None;
                if self.prev_kv && prev_bytes < PREV_BYTES_MAX {
                    prev_kv = self.before(commit, index).await?;
                    prev_bytes += prev_kv.as_ref().map_or(0, |entry| entry.value.len());
                }
                bytes += key.len() + event.entry.value.len();
                events.push(wire(event, prev_kv));
            }
            self.revision = commit.revision;
            if bytes >= EVENTS_BYTES_MAX {
                break;
            }
        }
        Ok(events)
    }

    /// The entry that an event replaced, as far as the history has it.
    async fn before(&self, commit: &Commit, index: usize) -> Result<Option<Entry>, StoreError> {
        let event = &commit.events[index];
        let key = &event.entry.key;
        if event.prev_revision == commit.revision {
            let earlier = commit.events[..index].iter().rev().find(|e| e.entry.key == *key);
            return Ok(earlier.map(|event| event.entry.clone()));
        }
        if event.prev_revision == 0 {
            return Ok(None);
        }
        match self.store.value_at(key, event.prev_revision).await {
            Err(StoreError::Compacted { .. }) => Ok(None),
            found => found,
        }
    }
}

fn wire(event: &store::Event, prev: Option<Entry>) -> Event {
    let kind = match event.change {
        Change::Put => event::Type::Put,
        Change::Delete => event::Type::Delete,
        Change::Expire => event::Type::Expire,
    };
    Event {
        r#type: kind.into(),
        kv: Some(key_value(event.entry.clone())),
        prev_kv: prev.map(key_value),
    }
}
