//! Leases: a client shows that it lives by renewing one, and its end deletes the keys bound to it.
//!
//! Grants and ends are commits. What is in between is here, in the memory of the one core that counts the lease down: a
//! renewal writes nothing.
//!
//! Ending what lives is worse than ending late. So a core that was paused itself (stopped, its machine suspended, its disk
//! stuck) counts that time for nobody, a core that takes leases over gives each its full time, and when many leases run out
//! at once, which is more likely a fault of the network than of all clients, only some are ended at a time.
//!
//! The leases of a core that died are taken over by the one that leads, or by whichever core their clients come to. A core
//! that others may have taken for dead asks the store with each renewal, until it knows that they do not.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::stream::{self, StreamExt as _};

use crate::{
    cluster::LEADER_KEY,
    error::Error,
    store::{Lease, LeaseId, Revision, Store, StoreError},
};

/// Shortest lease: a renewal takes a round trip, and a tick passes before an end.
pub const TTL_MIN: Duration = Duration::from_secs(1);
/// Longest lease.
pub const TTL_MAX: Duration = Duration::from_secs(3_600);
/// Leases that one core counts down; a further one is refused.
pub const LEASES_MAX: usize = 100_000;
/// Leases of one identity; a further one is refused. One client cannot use up what there is.
pub const LEASES_PER_OWNER_MAX: usize = 10_000;

/// How often leases are looked at: well below the shortest.
const TICK: Duration = Duration::from_millis(200);
/// A tick that comes later than this means that the core was paused: no lease lost that time.
const PAUSE_MIN: Duration = Duration::from_secs(2);
/// Leases are ended at most in this share, or this number if it is more, per window.
const BRAKE_SHARE: usize = 20;
const BRAKE_MIN: usize = 20;
const BRAKE_WINDOW: Duration = Duration::from_secs(10);
/// Ends and take-overs that are committed at a time: they share commits, and leave room in the store's queue.
const COMMITS_AT_ONCE: usize = 64;
/// A lease whose end could not be committed is tried again after this time.
const RETRY: Duration = Duration::from_secs(5);
/// How often a core with others beside it looks for leases that these have ended or taken.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(5);

/// The leases that this core counts down. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Leases {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    core: String,
    alone: bool,
    table: Mutex<Table>,
    others: Mutex<Others>,
}

/// What is known of the other cores.
#[derive(Debug, Default)]
struct Others {
    /// None of them takes this core for dead before then.
    trusted_until: Option<Instant>,
    /// Those whose leases this core takes over.
    gone: HashSet<Arc<str>>,
    /// Leases are to be compared with the store now.
    is_due: bool,
    /// Who counts leases down, as of the last comparison.
    holders: HashSet<Arc<str>>,
}

/// For operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Leases that this core counts down.
    pub held: usize,
    /// Of them those whose time is over, and that the brake on mass expiry keeps for now.
    pub held_back: usize,
}

impl Leases {
    /// Takes up what is in the store, each lease with its full time; [`Self::run`] counts. `core` names this core; one that is
    /// `alone` with its store takes over whatever other names left in it.
    pub async fn start(store: Store, core: &str, alone: bool) -> Result<Self, StoreError> {
        let (table, others) = (Mutex::new(Table::new(Instant::now())), Mutex::default());
        let inner = Inner { store, core: core.to_owned(), alone, table, others };
        let leases = Self { inner: Arc::new(inner) };
        for lease in leases.inner.store.leases().await? {
            if lease.holder == core {
                leases.table().insert(&lease);
            } else if alone {
                leases.inner.take(lease.id, None).await?;
            }
        }
        Ok(leases)
    }

    /// Counts and ends leases until it is dropped. While nobody runs it, time stands still for all of them.
    pub async fn run(self) {
        self.table().take_up(Instant::now());
        self.inner.run().await;
    }

    /// A new lease of `owner`.
    pub async fn grant(&self, owner: &str, ttl: Duration) -> Result<Lease, Error> {
        self.table().reserve(owner)?;
        let inner = self.inner.clone();
        let owner = owner.to_owned();
        // In a task of its own: a caller that goes away while it is committed must not leave a lease that nobody counts.
        let granting = tokio::spawn(async move {
            let granted = inner.store.grant(&owner, ttl, &inner.core).await;
            let mut table = inner.table();
            table.release(&owner);
            if let Ok(lease) = &granted {
                table.insert(lease);
            }
            granted
        });
        Ok(granting.await.map_err(|_| Error::Internal)??)
    }

    /// Renews a lease from now on and says for how long; none: it has ended. `by`: the caller, who must be its owner; none:
    /// one who may act for all.
    pub async fn renew(&self, id: LeaseId, by: Option<&str>) -> Result<Option<Duration>, Error> {
        let now = Instant::now();
        match self.table().renew(id, by, now) {
            Some(Ok(Some(ttl))) if self.inner.is_trusted(now) => return Ok(Some(ttl)),
            // Another core may have taken it over: the store knows. If it does not answer, the lease goes on here.
            Some(Ok(Some(_))) => {}
            Some(over) => return over,
            None if self.inner.alone => return Ok(None),
            None => {}
        }
        let inner = self.inner.clone();
        let taking = tokio::spawn(async move { inner.take(id, None).await });
        if !taking.await.map_err(|_| Error::Internal)?? {
            return Ok(None);
        }
        self.table().renew(id, by, Instant::now()).unwrap_or(Ok(None))
    }

    /// Ends a lease and deletes its keys. None: there is no such lease. `by` as in [`Self::renew`].
    pub async fn revoke(&self, id: LeaseId, by: Option<&str>) -> Result<Option<Revision>, Error> {
        let owner = self.table().held.get(&id).map(|held| held.owner.clone());
        match owner {
            Some(owner) => may(id, &owner, by)?,
            None if self.inner.alone => return Ok(None),
            // Another core counts it: the renewal checks the owner, and has it taken over.
            None if self.renew(id, by).await?.is_none() => return Ok(None),
            None => {}
        }
        let ended = self.inner.store.end_lease(id, false, None).await?;
        self.table().remove(id);
        Ok(ended)
    }

    /// From now on takes over the leases of these cores, and of no others, each with its full time: they are gone, and this
    /// core is the leader.
    pub fn adopt_from(&self, gone: HashSet<Arc<str>>) {
        let mut others = self.inner.others();
        others.is_due |= !gone.is_empty();
        others.gone = gone;
    }

    /// Until then no other core takes this one for dead: its memory is right, once it was compared with the store.
    pub fn trust(&self, until: Instant) {
        self.inner.others().trusted_until = Some(until);
    }

    /// Forgets leases that others have ended or taken, counts those that were granted here without an answer, and takes over
    /// those of cores that are gone.
    ///
    /// # Errors
    /// The store fails.
    pub async fn reconcile(&self) -> Result<(), StoreError> {
        self.inner.reconcile().await
    }

    /// The cores that count leases down, as of some seconds ago.
    pub fn holders(&self) -> HashSet<Arc<str>> {
        self.inner.others().holders.clone()
    }

    /// How many there are.
    pub fn summary(&self) -> Summary {
        let table = self.table();
        Summary { held: table.held.len(), held_back: table.held_back }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.inner.table()
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Each change of it is whole before anything can panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn others(&self) -> MutexGuard<'_, Others> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_trusted(&self, now: Instant) -> bool {
        self.alone || self.others().trusted_until.is_some_and(|until| now < until)
    }

    async fn run(&self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reconciled = Instant::now();
        loop {
            ticks.tick().await;
            let due = self.table().due(Instant::now());
            self.end(due).await;
            if self.alone {
                continue;
            }
            let is_due = std::mem::take(&mut self.others().is_due);
            if is_due || reconciled.elapsed() >= RECONCILE_INTERVAL {
                if let Err(error) = self.reconcile().await {
                    tracing::warn!(%error, "cannot compare leases with the store");
                }
                reconciled = Instant::now();
            }
        }
    }

    async fn end(&self, due: Vec<Due>) {
        let ends = stream::iter(due).map(|Due { id, epoch }| async move {
            (id, self.store.end_lease(id, true, Some((&self.core, epoch))).await)
        });
        let mut ends = ends.buffer_unordered(COMMITS_AT_ONCE);
        let mut failed: Option<(usize, StoreError)> = None;
        while let Some((id, ended)) = ends.next().await {
            match ended {
                // None: another core has ended it or counts it now.
                Ok(revision) => {
                    tracing::debug!(lease = id, revision, "lease ended");
                    self.table().remove(id);
                }
                Err(error) => {
                    self.table().put_back(id, Instant::now());
                    failed = Some((failed.map_or(1, |(count, _)| count + 1), error));
                }
            }
        }
        if let Some((leases, error)) = failed {
            tracing::warn!(leases, %error, "leases that are over could not be ended");
        }
    }

    /// Counts a lease down from now on, if there is one; if `from` is given, only if that is still its holder and epoch.
    async fn take(&self, id: LeaseId, from: Option<(&str, i64)>) -> Result<bool, StoreError> {
        let lease = self.store.take_lease(id, &self.core, from).await?;
        if let Some(lease) = &lease {
            self.table().insert(lease);
        }
        Ok(lease.is_some())
    }

    async fn reconcile(&self) -> Result<(), StoreError> {
        let known: Vec<(LeaseId, i64)> =
            self.table().held.iter().map(|(id, held)| (*id, held.epoch)).collect();
        let mut leases = self.store.leases().await?;
        // These live by the beats of cores.
        leases.retain(|lease| lease.owner != LEADER_KEY);
        let own: HashMap<LeaseId, &Lease> =
            leases.iter().filter(|lease| lease.holder == self.core).map(|l| (l.id, l)).collect();
        self.align(&known, &own);
        self.others().holders = leases.iter().map(|lease| lease.holder.as_str().into()).collect();
        self.adopt(leases).await
    }

    fn align(&self, known: &[(LeaseId, i64)], own: &HashMap<LeaseId, &Lease>) {
        let mut table = self.table();
        for &(id, epoch) in known {
            if own.get(&id).is_none_or(|lease| lease.holder_epoch != epoch) {
                table.remove(id);
            }
        }
        for lease in own.values() {
            if !table.held.contains_key(&lease.id) {
                table.insert(lease);
            }
        }
    }

    /// Takes over the leases of cores that are gone.
    async fn adopt(&self, mut leases: Vec<Lease>) -> Result<(), StoreError> {
        leases.retain(|lease| self.is_gone(&lease.holder));
        let taking = stream::iter(leases).map(|lease| async move {
            // Its core may have come back meanwhile.
            Ok::<_, StoreError>(
                self.is_gone(&lease.holder)
                    && self.take(lease.id, Some((&lease.holder, lease.holder_epoch))).await?,
            )
        });
        let mut taking = taking.buffer_unordered(COMMITS_AT_ONCE);
        let mut adopted = 0;
        while let Some(taken) = taking.next().await {
            adopted += usize::from(taken?);
        }
        if adopted > 0 {
            tracing::info!(leases = adopted, "took over the leases of cores that are gone");
        }
        Ok(())
    }

    fn is_gone(&self, core: &str) -> bool {
        self.others().gone.contains(core)
    }
}

fn may(id: LeaseId, owner: &str, by: Option<&str>) -> Result<(), Error> {
    match by {
        Some(by) if by != owner => Err(Error::Denied(format!("lease_id: {id} is not yours"))),
        _ => Ok(()),
    }
}

/// A lease whose time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Due {
    id: LeaseId,
    epoch: i64,
}

#[derive(Debug)]
struct Held {
    owner: Arc<str>,
    ttl: Duration,
    /// Of its holder: whoever takes the lease over raises it.
    epoch: i64,
    deadline: Instant,
    /// Its place in [`Table::queue`], not later than the deadline.
    queued: Instant,
    ending: bool,
}

/// Deadlines. Times in it are of a clock that stands still while the core is paused.
#[derive(Debug)]
struct Table {
    held: HashMap<LeaseId, Held>,
    /// Each lease once. A renewal leaves it where it is: that it lives on is found when its turn comes.
    queue: BTreeSet<(Instant, LeaseId)>,
    owned: HashMap<Arc<str>, usize>,
    /// Granted, and not yet committed.
    reserved: usize,
    /// How far the clock is behind.
    paused: Duration,
    ticked: Instant,
    /// When leases were ended, within the brake's window.
    ended: VecDeque<Instant>,
    held_back: usize,
}

impl Table {
    fn new(now: Instant) -> Self {
        Self {
            held: HashMap::new(),
            queue: BTreeSet::new(),
            owned: HashMap::new(),
            reserved: 0,
            paused: Duration::ZERO,
            ticked: now,
            ended: VecDeque::new(),
            held_back: 0,
        }
    }

    /// The time of leases. Whoever comes first after a pause, a tick or a renewal, takes the pause out of it.
    fn clock(&mut self, now: Instant) -> Instant {
        let gap = now.saturating_duration_since(self.ticked);
        if gap > PAUSE_MIN {
            tracing::warn!(?gap, "the core was paused: leases are extended by that time");
            self.paused += gap;
            self.ticked = now;
        }
        // The monotonic clock begins with the machine: a core cannot have been paused for longer than it counts.
        now.checked_sub(self.paused).unwrap_or(now)
    }

    fn reserve(&mut self, owner: &str) -> Result<(), Error> {
        if self.held.len() + self.reserved >= LEASES_MAX {
            return Err(Error::Exhausted(format!("this core has {LEASES_MAX} leases already")));
        }
        let owned = self.owned.entry(owner.into()).or_default();
        if *owned >= LEASES_PER_OWNER_MAX {
            return Err(Error::Exhausted(format!(
                "{owner} has {LEASES_PER_OWNER_MAX} leases already"
            )));
        }
        *owned += 1;
        self.reserved += 1;
        Ok(())
    }

    /// Gives back what [`Self::reserve`] took.
    fn release(&mut self, owner: &str) {
        self.reserved -= 1;
        self.disown(owner);
    }

    fn disown(&mut self, owner: &str) {
        if let Some(owned) = self.owned.get_mut(owner) {
            *owned -= 1;
            if *owned == 0 {
                self.owned.remove(owner);
            }
        }
    }

    /// Begins to count, with the full time.
    fn insert(&mut self, lease: &Lease) {
        self.remove(lease.id);
        let deadline = self.clock(Instant::now()) + lease.ttl;
        let owner: Arc<str> = lease.owner.as_str().into();
        *self.owned.entry(owner.clone()).or_default() += 1;
        self.queue.insert((deadline, lease.id));
        let (ttl, epoch) = (lease.ttl, lease.holder_epoch);
        let held = Held { owner, ttl, epoch, deadline, queued: deadline, ending: false };
        self.held.insert(lease.id, held);
    }

    fn remove(&mut self, id: LeaseId) {
        if let Some(held) = self.held.remove(&id) {
            self.queue.remove(&(held.queued, id));
            self.disown(&held.owner);
        }
    }

    /// None: it is not known here. Some of none: it is over.
    fn renew(
        &mut self,
        id: LeaseId,
        by: Option<&str>,
        now: Instant,
    ) -> Option<Result<Option<Duration>, Error>> {
        let clock = self.clock(now);
        let held = self.held.get_mut(&id)?;
        if let Err(error) = may(id, &held.owner, by) {
            return Some(Err(error));
        }
        if held.ending {
            return Some(Ok(None));
        }
        held.deadline = clock + held.ttl;
        Some(Ok(Some(held.ttl)))
    }

    /// Leases to end now. They are `ending` until they are removed or put back.
    fn due(&mut self, now: Instant) -> Vec<Due> {
        let clock = self.clock(now);
        self.ticked = now;
        while self.ended.front().is_some_and(|at| now.duration_since(*at) >= BRAKE_WINDOW) {
            self.ended.pop_front();
        }
        let population = self.held.len() + self.ended.len();
        let room = (population / BRAKE_SHARE).max(BRAKE_MIN).saturating_sub(self.ended.len());
        // A tick's grace: renewals that the sockets hold already come before the end.
        let Some(late) = clock.checked_sub(TICK) else { return Vec::new() };
        let mut due = Vec::new();
        while due.len() < room
            && let Some((at, id)) = self.queue.first().copied()
            && at <= late
        {
            self.queue.pop_first();
            let Some(held) = self.held.get_mut(&id) else { continue };
            if held.deadline > late {
                held.queued = held.deadline;
                self.queue.insert((held.queued, id));
            } else {
                held.ending = true;
                due.push(Due { id, epoch: held.epoch });
                self.ended.push_back(now);
            }
        }
        self.brake(late);
        due
    }

    /// Tells when the brake begins and ceases to hold leases back.
    fn brake(&mut self, late: Instant) {
        let over = self.queue.range(..=(late, LeaseId::MAX));
        let held_back = over
            .filter(|(_, id)| self.held.get(id).is_some_and(|held| held.deadline <= late))
            .count();
        if held_back > 0 && self.held_back == 0 {
            tracing::error!(
                held_back,
                leases = self.held.len(),
                "many leases run out at once: they are ended slowly, in case it is the network's fault"
            );
        } else if held_back == 0 && self.held_back > 0 {
            tracing::info!("no lease is held back any more");
        }
        self.held_back = held_back;
    }

    /// What was being ended when the counting stopped has to be ended anew.
    fn take_up(&mut self, now: Instant) {
        let clock = self.clock(now);
        for (id, held) in self.held.iter_mut().filter(|(_, held)| held.ending) {
            (held.ending, held.queued) = (false, clock);
            self.queue.insert((clock, *id));
        }
    }

    /// Its end failed: it can be renewed again, until the next try.
    fn put_back(&mut self, id: LeaseId, now: Instant) {
        let retry = self.clock(now) + RETRY;
        if let Some(held) = self.held.get_mut(&id) {
            held.ending = false;
            held.deadline = retry;
            held.queued = retry;
            self.queue.insert((retry, id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreConfig;

    const TTL: Duration = Duration::from_secs(10);

    fn lease(id: LeaseId) -> Lease {
        Lease {
            id,
            owner: "service/a".into(),
            ttl: TTL,
            token: 1,
            holder: "core".into(),
            holder_epoch: 1,
        }
    }

    /// A table of leases, and a clock that ticks.
    struct World {
        table: Table,
        now: Instant,
    }

    impl World {
        fn with(leases: LeaseId) -> Self {
            let now = Instant::now();
            let mut table = Table::new(now);
            for id in 1..=leases {
                table.insert(&lease(id));
            }
            // What was inserted took some time of the real clock.
            Self { table, now: Instant::now() }
        }

        /// Time passes, tick by tick, and what is due is ended.
        fn pass(&mut self, time: Duration) -> Vec<LeaseId> {
            let until = self.now + time;
            let mut ended = Vec::new();
            while self.now < until {
                self.now += TICK;
                for Due { id, .. } in self.table.due(self.now) {
                    self.table.remove(id);
                    ended.push(id);
                }
            }
            ended
        }

        fn renew(&mut self, id: LeaseId) -> Option<Duration> {
            self.table.renew(id, None, self.now).and_then(|renewed| renewed.unwrap())
        }
    }

    #[test]
    fn what_is_renewed_lives_and_the_rest_ends() {
        let mut world = World::with(3);
        for _ in 0..5 {
            assert!(world.pass(TTL / 2).is_empty());
            for id in 1..=3 {
                assert_eq!(world.renew(id), Some(TTL));
            }
        }
        assert!(world.pass(TTL / 2).is_empty());
        world.renew(2);
        assert_eq!(world.pass(TTL * 3 / 4), [1, 3]);
        assert_eq!(world.renew(1), None);
        assert_eq!(world.pass(TTL), [2]);
        assert_eq!((world.table.queue.len(), world.table.owned.len()), (0, 0));
    }

    #[test]
    fn a_pause_of_the_core_is_nobodys_time() {
        for renewal_comes_first in [false, true] {
            let mut world = World::with(2);
            assert!(world.pass(TTL * 9 / 10).is_empty());
            world.now += TTL * 30;
            if renewal_comes_first {
                assert_eq!(world.renew(1), Some(TTL));
            }
            // What was left of each lease is left after the pause.
            assert!(world.pass(TTL / 20).is_empty());
            assert_eq!(world.pass(TTL / 4), if renewal_comes_first { vec![2] } else { vec![1, 2] });
            assert_eq!(world.pass(TTL), if renewal_comes_first { vec![1] } else { vec![] });
        }
    }

    #[test]
    fn a_mass_expiry_is_braked_and_may_be_survived() {
        let mut world = World::with(1_000);
        let ended = world.pass(TTL + BRAKE_WINDOW / 2).len();
        assert_eq!(ended, 50);
        assert_eq!(world.table.held_back, 950);
        // The network heals: who is still held renews.
        let held: Vec<_> = world.table.held.keys().copied().collect();
        for id in held {
            assert_eq!(world.renew(id), Some(TTL));
        }
        assert!(world.pass(TTL / 2).is_empty());
        assert_eq!(world.table.held_back, 0);
        // In the end all go, 5 % or 20 per window.
        let ended = world.pass(BRAKE_WINDOW * 60).len();
        assert_eq!((ended, world.table.held_back, world.table.held.len()), (950, 0, 0));
    }

    #[test]
    fn few_leases_are_never_braked() {
        let mut world = World::with(20);
        assert_eq!(world.pass(TTL + 3 * TICK).len(), 20);
    }

    #[test]
    fn an_end_that_fails_is_tried_again_and_can_be_renewed_until_then() {
        let mut world = World::with(1);
        world.now += TICK;
        while world.table.due(world.now).is_empty() {
            world.now += TICK;
        }
        assert_eq!(world.renew(1), None, "on its way out");
        world.table.put_back(1, world.now);
        assert_eq!(world.renew(1), Some(TTL));
        assert!(world.pass(TTL - TICK).is_empty());
        assert_eq!(world.pass(TTL), [1]);
    }

    #[test]
    fn leases_are_limited_per_owner() {
        let mut table = Table::new(Instant::now());
        for _ in 0..LEASES_PER_OWNER_MAX {
            table.reserve("service/a").unwrap();
        }
        assert!(matches!(table.reserve("service/a"), Err(Error::Exhausted(_))));
        table.reserve("service/b").unwrap();
        table.release("service/a");
        table.reserve("service/a").unwrap();
    }

    #[test]
    fn another_owner_may_neither_renew_nor_learn_more() {
        let mut world = World::with(1);
        let renewed = world.table.renew(1, Some("service/b"), world.now).unwrap();
        assert!(matches!(renewed, Err(Error::Denied(_))));
        assert!(world.table.renew(1, Some("service/a"), world.now).unwrap().is_ok());
    }

    async fn holder_of(store: &Store, id: LeaseId) -> Option<(String, i64)> {
        let leases = store.leases().await.unwrap();
        let lease = leases.into_iter().find(|lease| lease.id == id);
        lease.map(|lease| (lease.holder, lease.holder_epoch))
    }

    #[tokio::test]
    async fn a_core_that_may_be_taken_for_dead_asks_the_store_with_each_renewal() {
        let folder = tempfile::tempdir().unwrap();
        let config = StoreConfig::sqlite(folder.path().join("state.db"));
        let store = Store::open(&config).await.unwrap();
        let a = Leases::start(store.clone(), "a", false).await.unwrap();
        let counting_a = tokio::spawn(a.clone().run());
        let lease = a.grant("service/x", TTL).await.unwrap();
        assert_eq!(a.renew(lease.id, None).await.unwrap(), Some(TTL));
        assert_eq!(holder_of(&store, lease.id).await, Some(("a".into(), 2)));
        a.trust(Instant::now() + TTL * 100);
        assert_eq!(a.renew(lease.id, None).await.unwrap(), Some(TTL));
        assert_eq!(holder_of(&store, lease.id).await, Some(("a".into(), 2)), "it is in memory");

        // Another core has taken it over, and ended it, while this one was frozen.
        a.trust(Instant::now());
        store.take_lease(lease.id, "b", Some(("a", 2))).await.unwrap().unwrap();
        store.end_lease(lease.id, true, Some(("b", 3))).await.unwrap().unwrap();
        assert_eq!(a.renew(lease.id, None).await.unwrap(), None, "it does not believe its memory");
        counting_a.abort();
        store.close().await;
    }

    #[tokio::test]
    async fn a_lease_that_another_core_counts_is_not_ended_here() {
        let folder = tempfile::tempdir().unwrap();
        let config = StoreConfig::sqlite(folder.path().join("state.db"));
        let store = Store::open(&config).await.unwrap();
        let a = Leases::start(store.clone(), "a", false).await.unwrap();
        let counting_a = tokio::spawn(a.clone().run());
        let b = Leases::start(store.clone(), "b", false).await.unwrap();
        let counting_b = tokio::spawn(b.clone().run());
        let lease = a.grant("service/x", TTL_MIN).await.unwrap();
        // The client has moved to b.
        for _ in 0..3 * 4 {
            assert_eq!(b.renew(lease.id, Some("service/x")).await.unwrap(), Some(TTL_MIN));
            tokio::time::sleep(TTL_MIN / 4).await;
        }
        assert_eq!((a.summary().held, b.summary().held), (0, 1));
        assert!(a.renew(lease.id, Some("service/y")).await.is_err(), "not its owner");
        assert_eq!(a.renew(lease.id + 1, None).await.unwrap(), None);

        // b dies, with the lease or without it.
        counting_b.abort();
        let other = b.grant("service/x", TTL_MIN).await.unwrap();
        let orphan = b.grant("service/x", TTL_MIN).await.unwrap();
        a.reconcile().await.unwrap();
        let kept = holder_of(&store, orphan.id).await;
        assert_eq!(kept, Some(("b".into(), 1)), "nobody said that b is gone");
        assert!(a.holders().contains("b"));
        a.adopt_from(HashSet::from(["b".into()]));
        while holder_of(&store, orphan.id).await.is_some_and(|(holder, _)| holder == "b") {
            assert_eq!(a.renew(other.id, Some("service/x")).await.unwrap(), Some(TTL_MIN));
            tokio::time::sleep(TICK).await;
        }
        while !store.leases().await.unwrap().is_empty() {
            tokio::time::sleep(TICK).await;
        }
        assert_eq!(a.revoke(lease.id, None).await.unwrap(), None);
        counting_a.abort();
        store.close().await;
    }
}
