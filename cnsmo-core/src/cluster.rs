//! Several cores on one database: which of them live, and which one leads.
//!
//! All of them serve state, bus and catalogue. Resources and agents belong to the one that leads: it holds the lease
//! [`LEADER_KEY`], and each of its transactions carries the lease's fencing token, so that a leader that was frozen and
//! wakes up again changes nothing.
//!
//! A core shows that it lives by changing its row in the store with every beat. Clocks of different machines are never
//! compared: who sees a row unchanged for [`SILENCE`] by its own clock takes its core for dead. The leader then counts that
//! core's leases and instances in its place.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, ErrorKind},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, timeout, timeout_at},
};

use crate::{
    actor::Seats,
    catalog::Catalog,
    fleet::Timing,
    lease::Leases,
    store::{
        Beat, Compare, Feed, Fence, LeaseId, Members, Op, PostgresConfig, Revision, Store,
        StoreError, Target, Txn,
    },
};

/// Key of the present leader; owner of the lease that it is bound to.
pub const LEADER_KEY: &str = "cnsmo/leader";
/// SHA-256 of the public key of the CA that all cores share.
const CA_KEY: &str = "cnsmo/ca";
/// In the state folder: a core keeps its name.
const ID_FILE: &str = "core.id";

/// Shortest time to take over in: several beats must fit, each with a round trip to the database.
pub const TTL_MIN: Duration = Duration::from_secs(1);
/// Longest: nothing can be changed meanwhile.
pub const TTL_MAX: Duration = Duration::from_secs(300);
/// Beats within the time to take over in.
const BEATS: u32 = 10;
/// Tenths of that time after which a leader whose beats fail stops by itself.
const PATIENCE: u32 = 7;
/// Tenths of that time after which a core without beats is dead to the others. More than [`PATIENCE`], and with the beat in
/// which it died and the beat in which it is found less than the whole.
const SILENCE: u32 = 8;
/// How long a deposed task may take to end its sessions.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// What a core is to the others.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Member {
    /// Kept over restarts.
    pub id: String,
    /// Where agents and operators reach it.
    pub address: String,
}

/// The name of the core with this state folder, made if it has none.
///
/// # Errors
/// The file cannot be read or written.
pub fn id_in(folder: &Path) -> io::Result<String> {
    let path = folder.join(ID_FILE);
    match fs::read_to_string(&path) {
        Ok(id) => Ok(id.trim().to_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let id = uuid::Uuid::now_v7().to_string();
            cnsmo_service::durable::write(&path, id.as_bytes(), 0o644)?;
            Ok(id)
        }
        Err(error) => Err(error),
    }
}

/// Cores with different CAs would refuse each other's agents: the first one's counts.
///
/// # Errors
/// The database was used with another CA.
pub async fn check_ca(store: &Store, spki_sha256: &[u8; 32]) -> anyhow::Result<()> {
    let ours: String = spki_sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    let first = store.commit(Txn {
        compares: vec![Compare { key: CA_KEY.into(), target: Target::ModRevision(0) }],
        success: vec![Op::Put {
            key: CA_KEY.into(),
            value: ours.clone().into(),
            content_type: "text/plain".into(),
            lease: 0,
        }],
        ..Txn::default()
    });
    if first.await?.succeeded {
        return Ok(());
    }
    let (known, _) = store.get(CA_KEY).await?;
    if known.is_some_and(|entry| entry.value == ours.as_bytes()) {
        return Ok(());
    }
    bail!(
        "the database belongs to cores with another CA: copy ca.key and ca.crt from the state folder of one of them"
    )
}

/// What a core keeps going: resources and agents as the leader, leases and instances also beside one.
#[derive(Debug)]
pub struct Duties {
    /// Where resources and agents are.
    pub seats: Seats,
    /// Of agents.
    pub timing: Timing,
    /// Of clients.
    pub leases: Leases,
    /// Of services.
    pub catalog: Catalog,
}

/// One core's part in the cluster.
#[derive(Debug)]
pub struct Cluster {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Cluster {
    /// Begins to beat, and leads when no other core does. `ttl`: a dead leader is replaced within it.
    pub fn start(
        store: Store,
        database: &PostgresConfig,
        me: Member,
        duties: Duties,
        ttl: Duration,
    ) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (members, roll) = (Members::new(database), Roll::new(ttl, Instant::now()));
        let (term, gone) = (None, HashSet::new());
        let candidate = Candidate { store, members, me, duties, ttl, roll, term, gone };
        Self { stop, task: tokio::spawn(candidate.run(stopped)) }
    }

    /// Gives the lead back, so that another core takes over at once.
    ///
    /// # Errors
    /// The task has panicked.
    pub async fn stop(self) -> anyhow::Result<()> {
        // No receiver: the task has ended, and the next line says why.
        let _ = self.stop.send(true);
        self.task.await.context("the cluster's task failed")
    }

    /// Waits for the end of the task, which only a fault of its own brings.
    pub async fn ended(&mut self) -> anyhow::Error {
        match (&mut self.task).await {
            Ok(()) => anyhow::anyhow!("the cluster's task has ended"),
            Err(error) => anyhow::Error::new(error).context("the cluster's task has failed"),
        }
    }
}

struct Candidate {
    store: Store,
    members: Members,
    me: Member,
    duties: Duties,
    ttl: Duration,
    roll: Roll,
    term: Option<Term>,
    /// Cores whose leases and instances this one counts as the leader.
    gone: HashSet<Arc<str>>,
}

/// A time of leading.
struct Term {
    lease: LeaseId,
    /// Without another beat it ends then.
    until: Instant,
    task: JoinHandle<()>,
}

impl Candidate {
    async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut ticks = interval(self.ttl / BEATS);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let store = self.store.clone();
        let mut commits = store.follow(store.revision());
        loop {
            tokio::select! {
                () = asked(&mut stop) => break,
                _ = ticks.tick() => {}
                () = leader_changed(&mut commits, &store) => {}
                () = deposed(&mut self.term) => self.step_down(None).await,
            }
            // A leader's beat that takes too long is none.
            let end = self.term.as_ref().map_or(Instant::now() + self.ttl, |term| term.until);
            let error = match timeout_at(end, self.beat()).await {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "the database does not answer".to_owned(),
            };
            tracing::warn!(error, "this core cannot show that it lives");
            if self.term.as_ref().is_some_and(|term| term.until <= Instant::now()) {
                tracing::error!("this core leads no more: others must take it for dead");
                self.step_down(None).await;
            }
        }
        self.leave().await;
    }

    /// One beat, and what follows from those of the others.
    async fn beat(&mut self) -> Result<(), StoreError> {
        let began = Instant::now();
        let beats = self.members.beat(&self.me.id).await?;
        self.roll.note(beats, began);
        self.trust_memory(began).await?;
        let (present, _) = self.store.get(LEADER_KEY).await?;
        let Some(entry) = present else {
            self.step_down(None).await;
            return self.campaign(began, 0).await;
        };
        if let Some(term) = self.term.as_mut().filter(|term| term.lease == entry.lease) {
            term.until = began + self.ttl * PATIENCE / 10;
            self.stand_in(began);
            return Ok(());
        }
        let leader: Option<Member> = serde_json::from_slice(&entry.value).ok();
        if let Some(leader) = &leader {
            self.roll.expect(&HashSet::from([leader.id.as_str().into()]), began);
        }
        // This core cannot lead by a term that it does not know.
        let lives = |id: &str| id != self.me.id && self.roll.lives(id, began);
        if let Some(leader) = leader.as_ref().filter(|leader| lives(&leader.id)) {
            self.step_down(Some(leader.address.clone())).await;
            return Ok(());
        }
        let (id, after) = (leader.map(|leader| leader.id), self.ttl * SILENCE / 10);
        tracing::warn!(
            leader = id,
            ?after,
            "the leader gives no sign of life: this core takes over"
        );
        self.step_down(None).await;
        // From here on its writes are refused.
        self.store.end_lease(entry.lease, true, None).await?;
        let (left, _) = self.store.get(LEADER_KEY).await?;
        self.campaign(began, left.map_or(0, |entry| entry.mod_revision)).await
    }

    /// As long as no other core can take this one for dead, what it remembers of its leases is right.
    async fn trust_memory(&mut self, began: Instant) -> Result<(), StoreError> {
        match self.roll.standing(began) {
            Standing::New => return Ok(()),
            // From now on nobody takes a lease away.
            Standing::Settled => self.duties.leases.reconcile().await?,
            Standing::Known => {}
        }
        let until = began + self.ttl * PATIENCE / 10;
        self.duties.leases.trust(until.into_std());
        Ok(())
    }

    /// Counts leases and instances of cores that are gone, as the leader.
    fn stand_in(&mut self, now: Instant) {
        let Duties { leases, catalog, .. } = &self.duties;
        let holders = &leases.holders() | &catalog.holders();
        self.roll.expect(&holders, now);
        let gone = self.roll.gone(&self.me.id, now);
        self.set_gone(gone);
    }

    fn set_gone(&mut self, gone: HashSet<Arc<str>>) {
        if gone == self.gone {
            return;
        }
        tracing::info!(cores = ?gone, "this core counts leases and instances of cores that are gone");
        self.duties.leases.adopt_from(gone.clone());
        self.duties.catalog.judge_for(gone.clone());
        self.gone = gone;
    }

    /// Tries to lead. Of those that find the same, the first one does.
    async fn campaign(&mut self, began: Instant, found: Revision) -> Result<(), StoreError> {
        // Not the name by which this core counts leases down: this one lives by beats.
        let holder = format!("{}/leader", self.me.id);
        let lease = self.store.grant(LEADER_KEY, self.ttl, &holder).await?;
        let fence = Fence { lease: lease.id, token: lease.token };
        let leads = self.store.commit(Txn {
            compares: vec![Compare { key: LEADER_KEY.into(), target: Target::ModRevision(found) }],
            success: vec![Op::Put {
                key: LEADER_KEY.into(),
                value: serde_json::to_vec(&self.me).unwrap_or_default().into(),
                content_type: "application/json".into(),
                lease: lease.id,
            }],
            fence: Some(fence),
            by: self.me.id.clone(),
            ..Txn::default()
        });
        if !leads.await?.succeeded {
            self.store.end_lease(lease.id, false, None).await?;
            return Ok(());
        }
        let Duties { seats, timing, .. } = &self.duties;
        match seats.lead(self.store.clone(), *timing, Some(fence)).await {
            Ok(task) => {
                tracing::info!(lease = lease.id, "this core leads");
                let until = began + self.ttl * PATIENCE / 10;
                self.term = Some(Term { lease: lease.id, until, task });
            }
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "this core cannot lead");
                self.store.end_lease(lease.id, false, None).await?;
            }
        }
        self.forget_candidates(lease.id).await
    }

    /// Ends leases that were granted to candidates whose campaign was cut short.
    async fn forget_candidates(&self, lease: LeaseId) -> Result<(), StoreError> {
        for other in self.store.leases().await? {
            if other.owner == LEADER_KEY && other.id != lease {
                self.store.end_lease(other.id, false, None).await?;
            }
        }
        Ok(())
    }

    /// Sends callers to `leader` and ends the task here, if it runs.
    async fn step_down(&mut self, leader: Option<String>) {
        self.set_gone(HashSet::new());
        self.duties.seats.follow(leader);
        let Some(mut term) = self.term.take() else { return };
        tracing::warn!("this core leads no more");
        if !term.task.is_finished() && timeout(STOP_TIMEOUT, &mut term.task).await.is_err() {
            // It waits for the database, which will refuse it.
            term.task.abort();
        }
    }

    async fn leave(mut self) {
        let lease = self.term.as_ref().map(|term| term.lease);
        self.step_down(None).await;
        let leave = async {
            if let Some(lease) = lease {
                self.store.end_lease(lease, false, None).await?;
            }
            self.members.forget(&self.me.id).await
        };
        match timeout(STOP_TIMEOUT, leave).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot give the lead back"),
            Err(_) => tracing::warn!("cannot give the lead back: the database does not answer"),
        }
    }
}

/// Which cores have shown themselves lately, by this core's clock.
#[derive(Debug)]
struct Roll {
    ttl: Duration,
    /// Last beat of each core, and when it was first seen here.
    seen: HashMap<Arc<str>, (i64, Instant)>,
    /// When this core looked last, and since when it has never missed a look.
    looked: Option<Instant>,
    unbroken: Instant,
    is_settled: bool,
}

/// How this core stands with the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Some core may still take it for dead.
    New,
    /// From now on none does.
    Settled,
    /// As before.
    Known,
}

impl Roll {
    fn new(ttl: Duration, now: Instant) -> Self {
        let seen = HashMap::new();
        Self { ttl, seen, looked: None, unbroken: now, is_settled: false }
    }

    /// Takes the beats over that are in the store, with one of this core. In a time in which this core did not look itself
    /// nobody was silent.
    fn note(&mut self, beats: Vec<Beat>, now: Instant) {
        let missed = |looked: Instant| now - looked >= self.ttl * PATIENCE / 10;
        if self.looked.is_none_or(missed) {
            (self.unbroken, self.is_settled) = (now, false);
            self.seen.values_mut().for_each(|(_, since)| *since = now);
        }
        self.looked = Some(now);
        for Beat { core, count } in beats {
            let seen = self.seen.entry(core.into()).or_insert((count, now));
            if seen.0 != count {
                *seen = (count, now);
            }
        }
    }

    /// A leader that judges by what it saw before this core's first beat ends its term within the time to take over in.
    fn standing(&mut self, now: Instant) -> Standing {
        if now - self.unbroken < self.ttl {
            return Standing::New;
        }
        if std::mem::replace(&mut self.is_settled, true) {
            Standing::Known
        } else {
            Standing::Settled
        }
    }

    /// These cores count something, so they were there once. Who has left or never came in this core's time is silent from
    /// now on.
    fn expect(&mut self, holders: &HashSet<Arc<str>>, now: Instant) {
        for core in holders {
            self.seen.entry(core.clone()).or_insert((0, now));
        }
    }

    /// Whether a core has shown itself lately; one that nobody has heard of has not.
    fn lives(&self, core: &str, now: Instant) -> bool {
        self.seen.get(core).is_some_and(|(_, since)| now - *since < self.ttl * SILENCE / 10)
    }

    /// All others that have not.
    fn gone(&self, me: &str, now: Instant) -> HashSet<Arc<str>> {
        let is_gone = |core: &&Arc<str>| &***core != me && !self.lives(core, now);
        self.seen.keys().filter(is_gone).cloned().collect()
    }
}

async fn asked(stop: &mut watch::Receiver<bool>) {
    // The sender is gone: stop as well.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Waits until the task has found by its fence that this core leads no more.
async fn deposed(term: &mut Option<Term>) {
    match term {
        Some(term) => {
            if let Err(error) = (&mut term.task).await {
                tracing::error!(%error, "the core's task failed");
            }
        }
        None => std::future::pending().await,
    }
}

/// Waits until a commit names another leader, or none.
async fn leader_changed(commits: &mut Feed, store: &Store) {
    loop {
        match commits.next().await {
            Ok(commits) => {
                let mut events = commits.iter().flat_map(|commit| &commit.events);
                if events.any(|event| event.entry.key == LEADER_KEY) {
                    return;
                }
            }
            // Too far behind: the next beat reads who leads.
            Err(StoreError::Compacted { .. }) => *commits = store.follow(store.revision()),
            Err(_) => return std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(10);
    const BEAT: Duration = Duration::from_secs(1);

    struct World {
        roll: Roll,
        now: Instant,
        count: i64,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            Self { roll: Roll::new(TTL, now), now, count: 0 }
        }

        /// Beats in which "b" is silent and the others are not.
        fn pass(&mut self, time: Duration) {
            let until = self.now + time;
            while self.now < until {
                self.now += BEAT;
                self.count += 1;
                let beat = |core: &str, count| Beat { core: core.to_owned(), count };
                let beats = vec![beat("a", self.count), beat("b", 1), beat("me", self.count)];
                self.roll.note(beats, self.now);
            }
        }

        fn gone(&self) -> Vec<String> {
            let mut gone: Vec<_> =
                self.roll.gone("me", self.now).iter().map(ToString::to_string).collect();
            gone.sort();
            gone
        }
    }

    #[test]
    fn who_is_silent_or_never_comes_is_gone_in_time() {
        let mut world = World::new();
        world.pass(BEAT);
        world.roll.expect(&HashSet::from(["left".into(), "a".into()]), world.now);
        world.pass(TTL * 7 / 10);
        assert!(world.gone().is_empty());
        world.pass(TTL / 10);
        assert_eq!(world.gone(), ["b", "left"]);
        assert!(world.roll.lives("a", world.now) && !world.roll.lives("b", world.now));
    }

    #[test]
    fn while_this_core_does_not_look_nobody_is_silent() {
        let mut world = World::new();
        world.pass(TTL / 2);
        world.now += TTL * 30;
        world.pass(TTL * 7 / 10);
        assert!(world.gone().is_empty());
        world.pass(TTL / 5);
        assert_eq!(world.gone(), ["b"]);
    }

    #[test]
    fn a_core_settles_once_no_other_can_take_it_for_dead() {
        let mut world = World::new();
        for _ in 0..2 {
            world.pass(TTL);
            assert_eq!(world.roll.standing(world.now), Standing::New);
            world.pass(BEAT);
            assert_eq!(world.roll.standing(world.now), Standing::Settled);
            world.pass(BEAT);
            assert_eq!(world.roll.standing(world.now), Standing::Known);
            // A pause, after which all of that begins anew.
            world.now += TTL;
        }
    }
}
