//! The catalogue: which instance of which service runs where, and in which phase.
//!
//! What an announcement changes is a commit below [`INSTANCES`]; one that changes nothing only tells that the instance lives
//! and stays in the memory of the core that received it. That core, the holder, is the one that judges its silence. Each
//! core keeps the whole set in memory, as its feed of the store tells it, and serves reads and watches from there.

mod agents;
mod record;
mod silence;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use cnsmo_proto::{
    model::Labels,
    pb::catalog::{AnnounceRequest, Instance, Phase},
};
use futures::stream::{self, StreamExt as _};
use tokio::{
    sync::{broadcast, watch},
    task::JoinHandle,
    time::timeout,
};

pub use record::{AGENT, INSTANCES};

use self::{
    record::{Decision, Record},
    silence::{Due, Silence, TICK},
};
use crate::{
    error::Error,
    store::{Change, Commit, Compare, Op, Range, Revision, Store, StoreError, Target, Txn},
};

/// Instances of a deployment; a further one is refused. A core keeps all of them in memory, about 1 KiB each.
pub const COUNT_MAX: usize = 100_000;
/// Instances of one identity; a further one is refused. One client cannot use up what there is.
pub const COUNT_PER_OWNER_MAX: usize = 10_000;

/// Changes that a watcher may lag behind; one that lags further begins anew.
const RING: usize = 4_096;
/// An instance that was stopped or lost this long ago is removed: nobody else would.
const FORGET_AFTER: Duration = Duration::from_secs(24 * 3_600);
const FORGET_INTERVAL: Duration = Duration::from_secs(60);
/// Judgements that are committed at a time: they share commits, and leave room in the store's queue.
const COMMITS_AT_ONCE: usize = 64;
/// Tries of a change while others change the same instance. Each try means that another one succeeded.
const ATTEMPTS_MAX: usize = 8;
/// How long the answer to a change waits for this core's own view to have it; it takes milliseconds.
const SEEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two tries to follow the store while that fails.
const FOLLOW_RETRY: Duration = Duration::from_secs(1);
/// Rows and bytes of a page when the set is loaded.
const PAGE_ROWS: usize = 1_000;
const PAGE_BYTES: usize = 4 << 20;
const CONTENT_TYPE: &str = "application/x-protobuf";

/// The catalogue as this core has it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Catalog {
    inner: Arc<Inner>,
}

/// Which instances are meant; all conditions must hold.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Empty: any.
    pub service: String,
    /// Empty: any.
    pub node: String,
    /// Attributes that an instance must have.
    pub attributes: Labels,
}

/// What a watcher is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// An instance is new or has changed.
    Upsert(Revision, Arc<Instance>),
    /// The last that was seen of one that is gone, or is not meant any more.
    Delete(Revision, Arc<Instance>),
    /// The whole set has been told.
    Synced(Revision),
    /// Changes were missed: the set follows anew.
    Reset(Revision),
}

#[derive(Debug)]
struct Inner {
    store: Store,
    core: Arc<str>,
    alone: bool,
    state: Mutex<State>,
    /// Revision that the state has.
    seen: watch::Sender<Revision>,
}

#[derive(Debug)]
struct State {
    set: BTreeMap<String, Record>,
    owned: HashMap<String, usize>,
    silence: Silence,
    /// Cores whose instances this one judges, because they are gone.
    gone: HashSet<Arc<str>>,
    revision: Revision,
    /// None: the core stops.
    changes: Option<broadcast::Sender<Arc<Changed>>>,
}

/// The task of a catalogue. Without it nothing changes any more: those who wait are told.
struct AtWork(Arc<Inner>);

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.state().changes = None;
        self.0.seen.send_replace(Revision::MAX);
    }
}

/// A change of the set. Neither before nor after: the set was read anew.
#[derive(Debug)]
struct Changed {
    revision: Revision,
    before: Option<Arc<Instance>>,
    after: Option<Arc<Instance>>,
}

impl Catalog {
    /// Takes up what is in the store, each instance with its full time, and begins to count. `core` names this core; one
    /// that is `alone` with its store counts all instances. The task runs until it is aborted or the store is closed.
    pub async fn start(
        store: Store,
        core: &str,
        alone: bool,
    ) -> Result<(Self, JoinHandle<()>), StoreError> {
        let state = State {
            set: BTreeMap::new(),
            owned: HashMap::new(),
            silence: Silence::new(Instant::now()),
            gone: HashSet::new(),
            revision: 0,
            changes: Some(broadcast::Sender::new(RING)),
        };
        let inner = Arc::new(Inner {
            store,
            core: core.into(),
            alone,
            state: Mutex::new(state),
            seen: watch::Sender::new(0),
        });
        inner.load().await?;
        let at_work = AtWork(inner.clone());
        let task = tokio::spawn(async move {
            tokio::select! {
                () = at_work.0.follow() => {}
                () = at_work.0.judge() => {}
            }
        });
        Ok((Self { inner }, task))
    }

    /// Takes an announcement of `owner`: keeps what it changes, and knows from it that the instance lives. Returns the
    /// instance as it is kept, and the TTL.
    pub async fn announce(
        &self,
        owner: &str,
        request: AnnounceRequest,
    ) -> Result<(Arc<Instance>, Duration), Error> {
        let record = record::check(request, owner, &self.inner.core)?;
        let kept = self.inner.keep(record).await?;
        Ok((kept.instance, kept.ttl))
    }

    /// Removes an instance. `by`: the caller, who must be its owner; none: one who may act for all.
    pub async fn withdraw(
        &self,
        service: &str,
        name: &str,
        by: Option<&str>,
    ) -> Result<Revision, Error> {
        record::check_name("service", service)?;
        record::check_name("name", name)?;
        let key = record::key(service, name);
        for _ in 0..ATTEMPTS_MAX {
            let known = self.inner.known(&key).ok_or_else(|| missing(service, name))?;
            if by.is_some_and(|by| by != known.instance.owner) {
                return Err(Error::Denied(format!(
                    "instance {name} of {service}: is announced by {}",
                    known.instance.owner
                )));
            }
            let op = Op::Delete { key: key.clone() };
            let by = by.unwrap_or("core");
            if let Some(revision) = self.inner.commit(op, &key, known.instance.revision, by).await?
            {
                return Ok(revision);
            }
        }
        Err(contended(service, name))
    }

    /// One instance.
    pub fn get(&self, service: &str, name: &str) -> Result<Arc<Instance>, Error> {
        let known = self.inner.known(&record::key(service, name));
        known.map(|record| record.instance).ok_or_else(|| missing(service, name))
    }

    /// By service and name, with the revision that the set is of.
    pub fn list(&self, filter: &Filter) -> (Vec<Arc<Instance>>, Revision) {
        self.inner.state().list(filter)
    }

    /// The set, and then its changes.
    pub fn watch(&self, filter: Filter) -> Watcher {
        Watcher { inner: self.inner.clone(), filter, state: Watching::Begin }
    }

    /// Judges from now on the instances of these cores, and of no others: they are gone, and this one is the leader.
    pub fn judge_for(&self, gone: impl IntoIterator<Item = Arc<str>>) {
        let mut state = self.inner.state();
        state.gone = gone.into_iter().collect();
        let State { set, silence, gone, .. } = &mut *state;
        let now = Instant::now();
        for (key, record) in set.iter() {
            if record.holder != self.inner.core && !self.inner.alone {
                if gone.contains(&record.holder) && record.is_counted() {
                    silence.begin(key, record, now);
                } else {
                    silence.end(key);
                }
            }
        }
    }
}

fn missing(service: &str, name: &str) -> Error {
    Error::NotFound(format!("there is no instance {name} of {service}"))
}

fn contended(service: &str, name: &str) -> Error {
    Error::Exhausted(format!("instance {name} of {service}: is changed by others all the time"))
}

impl Filter {
    fn admits(&self, instance: &Instance) -> bool {
        let attributes = self.attributes.as_map();
        (self.service.is_empty() || self.service == instance.service)
            && (self.node.is_empty() || self.node == instance.node)
            && attributes.iter().all(|(key, value)| instance.attributes.get(key) == Some(value))
    }
}

/// Checks the conditions of a client.
impl TryFrom<(String, String, BTreeMap<String, String>)> for Filter {
    type Error = Error;

    fn try_from(
        (service, node, attributes): (String, String, BTreeMap<String, String>),
    ) -> Result<Self, Error> {
        for (field, name) in [("service", &service), ("node", &node)] {
            if !name.is_empty() {
                record::check_name(field, name)?;
            }
        }
        let attributes = record::check_attributes("attributes", attributes)?;
        Ok(Self { service, node, attributes })
    }
}

/// One who watches. Nothing is kept for it but its place among the changes.
#[derive(Debug)]
pub struct Watcher {
    inner: Arc<Inner>,
    filter: Filter,
    state: Watching,
}

#[derive(Debug)]
enum Watching {
    Begin,
    Telling {
        rest: VecDeque<Arc<Instance>>,
        revision: Revision,
        changes: broadcast::Receiver<Arc<Changed>>,
    },
    Following(broadcast::Receiver<Arc<Changed>>),
}

impl Watcher {
    /// The next event. None: the core stops.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            match &mut self.state {
                Watching::Begin => {
                    if !self.begin() {
                        return None;
                    }
                }
                Watching::Telling { rest, revision, .. } => {
                    let revision = *revision;
                    if let Some(instance) = rest.pop_front() {
                        return Some(Event::Upsert(instance.revision, instance));
                    }
                    let told = std::mem::replace(&mut self.state, Watching::Begin);
                    if let Watching::Telling { changes, .. } = told {
                        self.state = Watching::Following(changes);
                    }
                    return Some(Event::Synced(revision));
                }
                Watching::Following(changes) => match changes.recv().await {
                    Ok(change) => {
                        if let Some(event) = self.event(&change) {
                            return Some(event);
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => return Some(self.reset()),
                    Err(broadcast::error::RecvError::Closed) => return None,
                },
            }
        }
    }

    /// The set, and the changes from exactly there. False: the core stops.
    fn begin(&mut self) -> bool {
        let state = self.inner.state();
        let Some(changes) = state.changes.as_ref().map(broadcast::Sender::subscribe) else {
            return false;
        };
        let (set, revision) = state.list(&self.filter);
        drop(state);
        self.state = Watching::Telling { rest: set.into(), revision, changes };
        true
    }

    fn reset(&mut self) -> Event {
        self.begin();
        match &self.state {
            Watching::Telling { revision, .. } => Event::Reset(*revision),
            Watching::Begin | Watching::Following(_) => Event::Reset(0),
        }
    }

    fn event(&mut self, change: &Changed) -> Option<Event> {
        if change.before.is_none() && change.after.is_none() {
            return Some(self.reset());
        }
        let meant = |instance: &Option<Arc<Instance>>| {
            instance.clone().filter(|instance| self.filter.admits(instance))
        };
        match (meant(&change.before), meant(&change.after)) {
            (_, Some(after)) => Some(Event::Upsert(change.revision, after)),
            (Some(before), None) => Some(Event::Delete(change.revision, before)),
            (None, None) => None,
        }
    }
}

impl State {
    fn list(&self, filter: &Filter) -> (Vec<Arc<Instance>>, Revision) {
        let mut prefix = INSTANCES.to_owned();
        if !filter.service.is_empty() {
            prefix = record::key(&filter.service, "");
        }
        let from = self.set.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix));
        let meant = from.map(|(_, record)| &record.instance).filter(|i| filter.admits(i));
        (meant.cloned().collect(), self.revision)
    }

    /// Puts a record in place of what there is; none: removes it.
    fn put(&mut self, key: &str, record: Option<Record>) -> Option<Record> {
        let before = match record {
            Some(record) => {
                *self.owned.entry(record.instance.owner.clone()).or_default() += 1;
                self.set.insert(key.to_owned(), record)
            }
            None => self.set.remove(key),
        };
        if let Some(before) = &before
            && let Some(owned) = self.owned.get_mut(&before.instance.owner)
        {
            *owned -= 1;
            if *owned == 0 {
                self.owned.remove(&before.instance.owner);
            }
        }
        before
    }

    fn publish(&self, changed: Changed) {
        if let Some(changes) = &self.changes {
            // No receiver: nobody watches.
            let _ = changes.send(Arc::new(changed));
        }
    }

    fn room(&self, owner: &str) -> Result<(), Error> {
        if self.set.len() >= COUNT_MAX {
            return Err(Error::Exhausted(format!("there are {COUNT_MAX} instances already")));
        }
        if self.owned.get(owner).is_some_and(|owned| *owned >= COUNT_PER_OWNER_MAX) {
            return Err(Error::Exhausted(format!(
                "{owner} has {COUNT_PER_OWNER_MAX} instances already"
            )));
        }
        Ok(())
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change of it is whole before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self, key: &str) -> Option<Record> {
        self.state().set.get(key).cloned()
    }

    /// Commits what an announcement changes, or renews.
    async fn keep(&self, announced: Record) -> Result<Record, Error> {
        let key = announced.key();
        for _ in 0..ATTEMPTS_MAX {
            let (record, expected) = match self.decide(&key, &announced)? {
                Ok(renewed) => return Ok(renewed),
                Err(write) => write,
            };
            let op = Op::Put {
                key: key.clone(),
                value: record.encode(),
                content_type: CONTENT_TYPE.into(),
                lease: 0,
            };
            let owner = record.instance.owner.clone();
            if let Some(revision) = self.commit(op, &key, expected, &owner).await? {
                let mut record = record;
                Arc::make_mut(&mut record.instance).revision = revision;
                return Ok(record);
            }
        }
        Err(contended(&announced.instance.service, &announced.instance.name))
    }

    /// Ok: it was renewed. Err: it is to be written, over this revision.
    fn decide(
        &self,
        key: &str,
        announced: &Record,
    ) -> Result<Result<Record, (Record, Revision)>, Error> {
        let mut state = self.state();
        let State { set, silence, .. } = &mut *state;
        let known = set.get(key);
        let decision = record::decide(known, announced.clone(), SystemTime::now())?;
        let expected = known.map_or(0, |known| known.instance.revision);
        match (decision, known) {
            (Decision::Renew, Some(known)) => {
                if !known.is_counted() || silence.renew(key, known.ttl, Instant::now()) {
                    return Ok(Ok(known.clone()));
                }
                // It is being judged this moment: the commit that comes first decides.
                Ok(Err((known.clone(), expected)))
            }
            (Decision::Write(record), known) => {
                if known.is_none() {
                    state.room(&record.instance.owner)?;
                }
                Ok(Err((record, expected)))
            }
            (Decision::Renew, None) => Err(Error::Internal),
        }
    }

    /// Writes one key, if it is still of the revision `expected`; none: it is not. Returns once this core has seen it.
    async fn commit(
        &self,
        op: Op,
        key: &str,
        expected: Revision,
        by: &str,
    ) -> Result<Option<Revision>, Error> {
        let compare = Compare { key: key.to_owned(), target: Target::ModRevision(expected) };
        let txn =
            Txn { compares: vec![compare], success: vec![op], by: by.to_owned(), ..Txn::default() };
        let outcome = self.store.commit(txn).await?;
        let mut seen = self.seen.subscribe();
        let reached = seen.wait_for(|seen| *seen >= outcome.revision);
        match timeout(SEEN_TIMEOUT, reached).await {
            Ok(Ok(_)) => Ok(outcome.succeeded.then_some(outcome.revision)),
            Ok(Err(_)) => Err(Error::Stopped),
            // It is committed; the view catches up when it can.
            Err(_) if outcome.succeeded => Ok(Some(outcome.revision)),
            Err(_) => Err(Error::Exhausted("the catalogue is behind the store".into())),
        }
    }

    /// Reads the set as it is.
    async fn load(&self) -> Result<(), StoreError> {
        let (mut set, mut after, mut at) = (Vec::new(), None, None);
        let revision = loop {
            let range = Range {
                prefix: INSTANCES.into(),
                after: after.take(),
                at,
                rows: PAGE_ROWS,
                bytes: PAGE_BYTES,
                keys_only: false,
            };
            let slice = self.store.range(range).await?;
            at = Some(slice.revision);
            after = slice.entries.last().map(|entry| entry.key.clone());
            for entry in slice.entries {
                match Record::decode(&entry.value, entry.mod_revision) {
                    Some(record) => set.push((entry.key, record)),
                    None => tracing::error!(key = entry.key, "not an instance; it is left out"),
                }
            }
            if !slice.more {
                break slice.revision;
            }
        };
        let mut state = self.state();
        state.set.clear();
        state.owned.clear();
        // What is counted already goes on; what was deleted meanwhile is found when its time is over.
        for (key, record) in set {
            self.count(&mut state, &key, Some(&record), false);
            state.put(&key, Some(record));
        }
        state.revision = revision;
        state.publish(Changed { revision, before: None, after: None });
        self.seen.send_replace(revision);
        Ok(())
    }

    async fn follow(&self) {
        loop {
            let after = *self.seen.borrow();
            let mut feed = self.store.follow(after);
            let error = loop {
                match feed.next().await {
                    Ok(commits) => commits.iter().for_each(|commit| self.apply(commit)),
                    Err(error) => break error,
                }
            };
            match error {
                StoreError::Closed => return,
                StoreError::Compacted { .. } => match self.load().await {
                    Ok(()) => continue,
                    Err(StoreError::Closed) => return,
                    Err(error) => tracing::warn!(%error, "cannot read the catalogue"),
                },
                error => tracing::warn!(%error, "cannot follow the store"),
            }
            tokio::time::sleep(FOLLOW_RETRY).await;
        }
    }

    fn apply(&self, commit: &Commit) {
        let mut state = self.state();
        for event in commit.events.iter().filter(|event| event.entry.key.starts_with(INSTANCES)) {
            let key = &event.entry.key;
            let after = match event.change {
                Change::Put => Record::decode(&event.entry.value, commit.revision),
                Change::Delete | Change::Expire => None,
            };
            self.count(&mut state, key, after.as_ref(), true);
            let instance = after.as_ref().map(|record| record.instance.clone());
            let before = state.put(key, after).map(|record| record.instance);
            if before.is_some() || instance.is_some() {
                state.publish(Changed { revision: commit.revision, before, after: instance });
            }
        }
        state.revision = commit.revision;
        drop(state);
        self.seen.send_replace(commit.revision);
    }

    /// Counts an instance, or ceases to. `anew`: its time begins again.
    fn count(&self, state: &mut State, key: &str, record: Option<&Record>, anew: bool) {
        let State { silence, gone, .. } = state;
        let ours = |record: &&Record| {
            self.alone || record.holder == self.core || gone.contains(&record.holder)
        };
        match record.filter(ours).filter(|record| record.is_counted()) {
            Some(record) if anew || !silence.counts(key, record.instance.revision) => {
                silence.begin(key, record, Instant::now());
            }
            Some(_) => {}
            None => silence.end(key),
        }
    }

    /// Marks what is silent, and removes what was over long ago.
    async fn judge(&self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut forgot = Instant::now();
        loop {
            ticks.tick().await;
            let due = self.state().silence.due(Instant::now());
            stream::iter(due).for_each_concurrent(COMMITS_AT_ONCE, |due| self.judge_one(due)).await;
            if forgot.elapsed() >= FORGET_INTERVAL {
                self.forget(SystemTime::now()).await;
                forgot = Instant::now();
            }
        }
    }

    async fn judge_one(&self, due: Due) {
        let Some(known) = self.known(&due.key) else {
            self.state().silence.end(&due.key);
            return;
        };
        let (reason, limit) = match due.becomes {
            Phase::Lost => ("GraceOver", known.ttl + known.grace),
            _ => ("LeaseLate", known.ttl),
        };
        let message = format!("silent for longer than {} s", limit.as_secs_f64());
        let record = known.judged(due.becomes, reason, message);
        let op = Op::Put {
            key: due.key.to_string(),
            value: record.encode(),
            content_type: CONTENT_TYPE.into(),
            lease: 0,
        };
        match self.commit(op, &due.key, due.revision, &self.core).await {
            // None: it was heard of, here or at another core, which the feed tells.
            Ok(revision) => {
                tracing::debug!(key = %due.key, phase = ?due.becomes, revision, "judged");
            }
            Err(error) => {
                tracing::warn!(key = %due.key, %error, "cannot mark a silent instance");
                self.state().silence.put_back(&due, Instant::now());
            }
        }
    }

    async fn forget(&self, now: SystemTime) {
        let is_old = |record: &Record| {
            let since = record.instance.phase_time.and_then(|time| SystemTime::try_from(time).ok());
            let age = since.and_then(|since| now.duration_since(since).ok());
            matches!(record.phase(), Phase::Stopped | Phase::Lost)
                && age.is_some_and(|age| age > FORGET_AFTER)
                && (self.alone || record.holder == self.core)
        };
        let old: Vec<_> = {
            let state = self.state();
            let old = state.set.iter().filter(|(_, record)| is_old(record));
            old.map(|(key, record)| (key.clone(), record.instance.revision)).collect()
        };
        for (key, revision) in old {
            let op = Op::Delete { key: key.clone() };
            if let Err(error) = self.commit(op, &key, revision, &self.core).await {
                tracing::warn!(key, %error, "cannot remove an old instance");
            }
        }
    }
}

#[cfg(test)]
mod tests;
