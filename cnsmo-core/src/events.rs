//! What the commits of the store say happened, for people and programs that follow a deployment.

use std::collections::VecDeque;

use cnsmo_proto::pb::event::{Event, Synced, WatchEventsResponse, watch_events_response::Message};
use futures::{Stream, stream};
use prost_types::Timestamp;
use tonic::Status;

use crate::{
    catalog,
    error::Error,
    state,
    store::{self, Change, Commit, Entry, Feed, Revision, Store, StoreError},
};

/// How far back a watch begins that does not say.
const REVISIONS_DEFAULT: Revision = 1_000;

/// What a resource, or an instance, was seen to become. Without what the commit says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Seen {
    pub(crate) kind: &'static str,
    pub(crate) name: String,
    /// None: created or updated.
    pub(crate) what: Option<String>,
    pub(crate) time: Option<Timestamp>,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) node: String,
}

/// Which events.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    /// Empty: all.
    pub(crate) kinds: Vec<String>,
    /// Empty: all.
    pub(crate) name: String,
}

impl Filter {
    fn takes(&self, event: &Event) -> bool {
        let kind = self.kinds.is_empty() || self.kinds.contains(&event.kind);
        let is = |name: &str| name == self.name;
        let named = || is(&event.name) || is(&event.node) || event.name.split('/').any(is);
        kind && (self.name.is_empty() || named())
    }
}

/// Events in the order of commits.
pub(crate) struct Events {
    store: Store,
    feed: Feed,
    filter: Filter,
    /// Read and not yet sent: of one batch of commits.
    waiting: VecDeque<Event>,
    /// Up to here it is history; none: told already.
    until: Option<Revision>,
    follow: bool,
}

impl Events {
    /// From a revision on; 0: from some time ago on.
    ///
    /// # Errors
    /// The history does not reach so far, or the revision is not there yet.
    pub(crate) async fn new(
        store: &Store,
        from: Revision,
        filter: Filter,
        follow: bool,
    ) -> Result<Self, Error> {
        let status = store.status().await?;
        let from = match from {
            0 => (status.revision - REVISIONS_DEFAULT).max(status.compacted) + 1,
            from if from <= status.compacted => {
                return Err(StoreError::Compacted { at: status.compacted }.into());
            }
            from if from > status.revision + 1 => {
                return Err(StoreError::Ahead { at: status.revision }.into());
            }
            from => from,
        };
        let feed = store.follow(from - 1);
        let until = Some(status.revision);
        Ok(Self { store: store.clone(), feed, filter, waiting: VecDeque::new(), until, follow })
    }

    /// Its messages.
    pub(crate) fn stream(self) -> impl Stream<Item = Result<WatchEventsResponse, Status>> {
        stream::unfold(Some(self), |events| async {
            let mut events = events?;
            match events.next().await {
                Ok(Some(message)) => {
                    Some((Ok(WatchEventsResponse { message: Some(message) }), Some(events)))
                }
                Ok(None) => None,
                Err(error) => Some((Err(Error::from(error).into()), None)),
            }
        })
    }

    async fn next(&mut self) -> Result<Option<Message>, StoreError> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Ok(Some(Message::Event(event)));
            }
            let revision = self.feed.revision();
            if self.until.is_some_and(|until| revision >= until) {
                self.until = None;
                return Ok(Some(Message::Synced(Synced { revision })));
            }
            if self.until.is_none() && !self.follow {
                return Ok(None);
            }
            for commit in self.feed.next().await? {
                let happened = told(&self.store, &commit).await?.into_iter();
                self.waiting.extend(happened.filter(|event| self.filter.takes(event)));
            }
        }
    }
}

/// What one commit tells.
async fn told(store: &Store, commit: &Commit) -> Result<Vec<Event>, StoreError> {
    let asked = commit.events.iter().find_map(|event| state::asked(&event.entry));
    let (by, asked_time) = asked.unzip();
    let mut events = Vec::new();
    for event in &commit.events {
        let is_gone = event.change != Change::Put;
        let before = if is_gone { before(store, event).await? } else { None };
        let entry = before.as_ref().unwrap_or(&event.entry);
        let Some(seen) = state::seen(entry).or_else(|| catalog::seen(entry)) else { continue };
        let seen = if is_gone { gone(seen, asked_time) } else { seen };
        let is_new = event.prev_revision == 0;
        let what = seen.what.unwrap_or(if is_new { "Created" } else { "Updated" }.to_owned());
        events.push(Event {
            revision: commit.revision,
            time: seen.time,
            kind: seen.kind.to_owned(),
            name: seen.name,
            what,
            reason: seen.reason,
            message: seen.message,
            node: seen.node,
            by: by.clone().unwrap_or_default(),
        });
    }
    Ok(events)
}

/// Of what is gone only where it was is worth telling: the rest was told.
fn gone(seen: Seen, time: Option<Timestamp>) -> Seen {
    let Seen { kind, name, node, .. } = seen;
    Seen { kind, name, node, time, what: Some("Deleted".to_owned()), ..Seen::default() }
}

/// The entry that is gone, if the history has it.
async fn before(store: &Store, event: &store::Event) -> Result<Option<Entry>, StoreError> {
    match store.value_at(&event.entry.key, event.prev_revision).await {
        Err(StoreError::Compacted { .. }) => Ok(None),
        found => found,
    }
}
