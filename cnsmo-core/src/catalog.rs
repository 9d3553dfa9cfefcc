//! The catalogue: which instance of which service runs where, and in which phase.
//!
//! What an announcement changes is a commit below [`INSTANCES`]; one that changes nothing only tells that the instance lives
//! and stays in the memory of the core that received it. That core, the holder, is the one that judges its silence. Each
//! core keeps the whole set in memory, as its feed of the store tells it, and serves reads and watches from there.

mod agents;
mod record;
mod silence;

use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    hash::Hash,
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
    time::timeout,
};

pub(crate) use record::seen;
pub use record::{AGENT, INSTANCES};

use self::{
    record::{Decision, Record},
    silence::{Due, Silence, TICK},
};
use crate::{
    error::Error,
    store::{Change, Commit, Compare, Fence, Op, Range, Revision, Store, StoreError, Target, Txn},
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
    /// Instances of each core that counts some.
    held: HashMap<Arc<str>, usize>,
    silence: Silence,
    /// Cores whose instances this one judges, because they are gone.
    gone: HashSet<Arc<str>>,
    revision: Revision,
    /// None: the core stops.
    changes: Option<broadcast::Sender<Arc<Changed>>>,
}

/// A change of the set. Neither before nor after: the set was read anew.
#[derive(Debug)]
struct Changed {
    revision: Revision,
    before: Option<Arc<Instance>>,
    after: Option<Arc<Instance>>,
}

impl Catalog {
    /// Takes up what is in the store, each instance with its full time; [`Self::run`] counts. `core` names this core; one
    /// that is `alone` with its store counts all instances.
    pub async fn start(store: Store, core: &str, alone: bool) -> Result<Self, StoreError> {
        let state = State {
            set: BTreeMap::new(),
            owned: HashMap::new(),
            held: HashMap::new(),
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
        Ok(Self { inner })
    }

    /// Follows the store and judges silence until it is dropped or the store is closed. While nobody runs it, the set stays
    /// as it is, and no instance is silent.
    pub async fn run(self) {
        self.inner.state().silence.take_up(Instant::now());
        tokio::select! {
            () = self.inner.follow() => {}
            () = self.inner.judge() => {}
        }
    }

    /// The core stops: those who watch or wait are told.
    pub fn close(&self) {
        self.inner.state().changes = None;
        self.inner.seen.send_replace(Revision::MAX);
    }

    /// Takes an announcement of `owner`: keeps what it changes, and knows from it that the instance lives. Returns the
    /// instance as it is kept, and the TTL.
    pub async fn announce(
        &self,
        owner: &str,
        request: AnnounceRequest,
    ) -> Result<(Arc<Instance>, Duration), Error> {
        let record = record::check(request, owner, &self.inner.core)?;
        let kept = self.inner.keep(record, None).await?;
        Ok((kept.instance, kept.ttl))
    }

    /// Takes a state of one of this core's own services.
    pub async fn announce_own(&self, instance: Instance) -> Result<(), Error> {
        self.inner.keep(record::own(instance, &self.inner.core)?, None).await?;
        Ok(())
    }

    /// Removes an instance of this core's own services, if it is there.
    pub async fn withdraw_own(&self, service: &str, name: &str) -> Result<(), Error> {
        match self.remove(service, name, None, None).await {
            Ok(_) | Err(Error::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes an instance. `by`: the caller, who must be its owner; none: one who may act for all.
    pub async fn withdraw(
        &self,
        service: &str,
        name: &str,
        by: Option<&str>,
    ) -> Result<Revision, Error> {
        self.remove(service, name, by, None).await
    }

    async fn remove(
        &self,
        service: &str,
        name: &str,
        by: Option<&str>,
        fence: Option<Fence>,
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
            let write = Write {
                op,
                key: &key,
                expected: known.instance.revision,
                by: by.unwrap_or("core"),
                fence,
            };
            if let Some(revision) = self.inner.commit(write).await? {
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

    /// How many there are.
    pub fn count(&self) -> usize {
        self.inner.state().set.len()
    }

    /// The set, and then its changes.
    pub fn watch(&self, filter: Filter) -> Watcher {
        Watcher { inner: self.inner.clone(), filter, state: Watching::Begin }
    }

    /// Judges from now on the instances of these cores, and of no others: they are gone, and this one is the leader.
    pub fn judge_for(&self, gone: HashSet<Arc<str>>) {
        let mut state = self.inner.state();
        let before = std::mem::replace(&mut state.gone, gone);
        let State { set, silence, gone, .. } = &mut *state;
        let now = Instant::now();
        for (key, record) in set.iter() {
            if record.holder == self.inner.core || self.inner.alone {
                continue;
            }
            match (before.contains(&record.holder), gone.contains(&record.holder)) {
                (false, true) if record.is_counted() => silence.begin(key, record, now),
                (true, false) => silence.end(key),
                _ => {}
            }
        }
    }

    /// The cores that count instances.
    pub fn holders(&self) -> HashSet<Arc<str>> {
        self.inner.state().held.keys().cloned().collect()
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
                *self.held.entry(record.holder.clone()).or_default() += 1;
                self.set.insert(key.to_owned(), record)
            }
            None => self.set.remove(key),
        };
        if let Some(before) = &before {
            one_less(&mut self.owned, &before.instance.owner);
            one_less(&mut self.held, &*before.holder);
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

fn one_less<K, Q>(counts: &mut HashMap<K, usize>, key: &Q)
where
    K: Borrow<Q> + Eq + Hash,
    Q: Eq + Hash + ?Sized,
{
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// A change of one key.
struct Write<'a> {
    op: Op,
    key: &'a str,
    /// Only if the key is still of this revision.
    expected: Revision,
    by: &'a str,
    fence: Option<Fence>,
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
    async fn keep(&self, announced: Record, fence: Option<Fence>) -> Result<Record, Error> {
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
            let by = &record.instance.owner;
            let write = Write { op, key: &key, expected, by, fence };
            if let Some(revision) = self.commit(write).await? {
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

    /// None: the key is of another revision than expected. Returns once this core has seen it.
    async fn commit(&self, write: Write<'_>) -> Result<Option<Revision>, Error> {
        let Write { op, key, expected, by, fence } = write;
        let compare = Compare { key: key.to_owned(), target: Target::ModRevision(expected) };
        let (compares, success, by) = (vec![compare], vec![op], by.to_owned());
        let txn = Txn { compares, success, by, fence, ..Txn::default() };
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
        state.held.clear();
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
        let ours = |record: &&Record| self.counts(gone, record);
        match record.filter(ours).filter(|record| record.is_counted()) {
            Some(record) if anew || !silence.counts(key, record.instance.revision) => {
                silence.begin(key, record, Instant::now());
            }
            Some(_) => {}
            None => silence.end(key),
        }
    }

    fn counts(&self, gone: &HashSet<Arc<str>>, record: &Record) -> bool {
        self.alone || record.holder == self.core || gone.contains(&record.holder)
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
        let expected = due.revision;
        let write = Write { op, key: &due.key, expected, by: &self.core, fence: None };
        match self.commit(write).await {
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
        let is_old = |record: &Record, gone: &HashSet<Arc<str>>| {
            let since = record.instance.phase_time.and_then(|time| SystemTime::try_from(time).ok());
            let age = since.and_then(|since| now.duration_since(since).ok());
            matches!(record.phase(), Phase::Stopped | Phase::Lost)
                && age.is_some_and(|age| age > FORGET_AFTER)
                && self.counts(gone, record)
        };
        let old: Vec<_> = {
            let state = self.state();
            let old = state.set.iter().filter(|(_, record)| is_old(record, &state.gone));
            old.map(|(key, record)| (key.clone(), record.instance.revision)).collect()
        };
        for (key, expected) in old {
            let op = Op::Delete { key: key.clone() };
            let write = Write { op, key: &key, expected, by: &self.core, fence: None };
            if let Err(error) = self.commit(write).await {
                tracing::warn!(key, %error, "cannot remove an old instance");
            }
        }
    }
}

#[cfg(test)]
mod tests;
