//! Several cores on one database: which of them live, and which one leads.
//!
//! All of them serve state, bus and catalogue. Resources and agents belong to the one that leads: it holds the lease
//! [`LEADER_KEY`], and each of its transactions carries the lease's fencing token, so that a leader that was frozen and
//! wakes up again changes nothing.
//!
//! A core shows that it lives by changing its row in the store with every beat. Clocks of different machines are never
//! compared: who sees a row unchanged for [`SILENCE`] by its own clock takes its core for dead.

use std::{
    collections::HashMap,
    fs,
    io::{self, ErrorKind},
    path::Path,
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
    fleet::Timing,
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
        seats: Seats,
        timing: Timing,
        ttl: Duration,
    ) -> Self {
        let (stop, stopped) = watch::channel(false);
        let (members, seen) = (Members::new(database), HashMap::new());
        let candidate = Candidate { store, members, me, seats, timing, ttl, seen, term: None };
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
    seats: Seats,
    timing: Timing,
    ttl: Duration,
    /// Last beat of each core, and when it was first seen here.
    seen: HashMap<String, (i64, Instant)>,
    term: Option<Term>,
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
        for Beat { core, count } in self.members.beat(&self.me.id).await? {
            let seen = self.seen.entry(core).or_insert((count, began));
            if seen.0 != count {
                *seen = (count, began);
            }
        }
        let (present, _) = self.store.get(LEADER_KEY).await?;
        let Some(entry) = present else {
            self.step_down(None).await;
            return self.campaign(began, 0).await;
        };
        if let Some(term) = self.term.as_mut().filter(|term| term.lease == entry.lease) {
            term.until = began + self.ttl * PATIENCE / 10;
            return Ok(());
        }
        let leader: Option<Member> = serde_json::from_slice(&entry.value).ok();
        if let Some(leader) = leader.as_ref().filter(|leader| self.lives(&leader.id)) {
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

    /// Whether another core has shown itself lately. This one cannot lead by a term that it does not know.
    fn lives(&mut self, id: &str) -> bool {
        // One that is not known yet has come a moment ago.
        let (_, since) = self.seen.entry(id.to_owned()).or_insert((0, Instant::now()));
        id != self.me.id && since.elapsed() < self.ttl * SILENCE / 10
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
        match self.seats.lead(self.store.clone(), self.timing, Some(fence)).await {
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
        self.seats.follow(leader);
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
