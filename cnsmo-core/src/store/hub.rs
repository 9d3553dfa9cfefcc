//! What was committed, once in memory for all who follow. A commit waits for none of them: who falls behind reads the log.

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tokio::sync::{Notify, watch};

use super::{Commit, Revision, StoreError, engine::Engine, read::Readers};

/// Commits in memory: some seconds at full speed.
const RING_MAX: usize = 16_384;
/// Bytes of them: large values would take all memory long before their number does.
const RING_BYTES_MAX: usize = 32 << 20;
/// Commits that a follower takes at a time.
const TAKE_MAX: usize = 256;
/// Own commits that wait for those of other cores: more than a group has.
const AHEAD_MAX: usize = 1_024;
/// Changes read from the log at a time.
const REFILL_ROWS: usize = 1_000;
/// Pause before the log is read again after a failure.
const RETRY: Duration = Duration::from_millis(200);

/// The newest commits.
#[derive(Debug)]
pub(super) struct Hub {
    ring: RwLock<Ring>,
    newest: watch::Sender<Newest>,
    /// Another core has committed in between.
    gap: Notify,
    /// Another core may have committed, perhaps messages only.
    pub(super) woken: Notify,
}

#[derive(Clone, Copy, Debug, Default)]
struct Newest {
    revision: Revision,
    closed: bool,
}

#[derive(Debug, Default)]
struct Ring {
    /// Without gaps; the last one is the newest.
    commits: VecDeque<Arc<Commit>>,
    bytes: usize,
    /// Of this core, behind commits of another one that are not here yet.
    ahead: VecDeque<Arc<Commit>>,
    /// The last revision that is known to be there.
    heard: Revision,
}

impl Default for Hub {
    fn default() -> Self {
        let newest = watch::Sender::new(Newest::default());
        Self { ring: RwLock::default(), newest, gap: Notify::new(), woken: Notify::new() }
    }
}

impl Hub {
    /// Of the state as it was opened.
    pub(super) fn start(&self, revision: Revision) {
        self.newest.send_modify(|newest| newest.revision = revision);
    }

    pub(super) fn close(&self) {
        self.newest.send_modify(|newest| newest.closed = true);
    }

    pub(super) fn newest(&self) -> Revision {
        self.newest.borrow().revision
    }

    /// Takes over commits that are durable, in their order. Those behind a gap wait for [`pump`] to fill it from the log.
    pub(super) fn publish(&self, commits: Vec<Arc<Commit>>) {
        let mut ring = self.ring.write().unwrap_or_else(PoisonError::into_inner);
        let mut newest = self.newest();
        for commit in commits {
            ring.heard = ring.heard.max(commit.revision);
            if commit.revision > newest + 1 {
                ring.wait(commit);
            } else if commit.revision == newest + 1 {
                newest = commit.revision;
                ring.push(commit);
            }
        }
        while let Some(next) = ring.ahead.pop_front_if(|first| first.revision <= newest + 1) {
            if next.revision > newest {
                newest = next.revision;
                ring.push(next);
            }
        }
        if ring.heard > newest {
            self.gap.notify_one();
        }
        // Before anybody else can add to the ring.
        self.newest.send_if_modified(|now| {
            let advanced = now.revision < newest;
            now.revision = now.revision.max(newest);
            advanced
        });
    }

    fn hear(&self, revision: Revision) {
        let mut ring = self.ring.write().unwrap_or_else(PoisonError::into_inner);
        ring.heard = ring.heard.max(revision);
    }

    /// Before the first and up to the last revision that is there, and not here.
    fn missing(&self) -> Option<(Revision, Revision)> {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let newest = self.newest();
        let upto = ring.ahead.front().map_or(Revision::MAX, |first| first.revision - 1);
        (ring.heard > newest).then_some((newest, upto))
    }

    /// Waits for a revision after `revision`. None: the store is closed.
    pub(super) async fn beyond(&self, revision: Revision) -> Option<Revision> {
        let mut newest = self.newest.subscribe();
        let seen = newest.wait_for(|now| now.revision > revision || now.closed).await.ok()?;
        (seen.revision > revision).then_some(seen.revision)
    }

    /// Commits after `after`; none: the ring does not reach back so far.
    fn after(&self, after: Revision) -> Option<Vec<Arc<Commit>>> {
        let ring = self.ring.read().unwrap_or_else(PoisonError::into_inner);
        let first = ring.commits.front()?.revision;
        let skip = usize::try_from(after + 1 - first).ok()?;
        Some(ring.commits.iter().skip(skip).take(TAKE_MAX).cloned().collect())
    }
}

impl Ring {
    fn push(&mut self, commit: Arc<Commit>) {
        self.bytes += commit.bytes();
        self.commits.push_back(commit);
        while self.commits.len() > RING_MAX || self.bytes > RING_BYTES_MAX {
            let Some(oldest) = self.commits.pop_front() else { break };
            self.bytes -= oldest.bytes();
        }
    }

    fn wait(&mut self, commit: Arc<Commit>) {
        if self.ahead.len() == AHEAD_MAX {
            // All of it can be read from the log.
            self.ahead.clear();
        }
        self.ahead.push_back(commit);
    }
}

/// Brings in the commits of other cores.
pub(super) async fn pump(engine: Arc<dyn Engine>, readers: Readers, hub: Arc<Hub>) {
    loop {
        tokio::select! {
            newest = engine.wake() => {
                hub.woken.notify_one();
                hub.hear(newest);
            }
            () = hub.gap.notified() => {}
        }
        if let Err(error) = catch_up(&readers, &hub).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot read what other cores committed"
            );
            tokio::time::sleep(RETRY).await;
            hub.gap.notify_one();
        }
    }
}

async fn catch_up(readers: &Readers, hub: &Hub) -> Result<(), StoreError> {
    while let Some((after, upto)) = hub.missing() {
        match readers.log_between(after, upto, REFILL_ROWS).await {
            Ok(commits) if commits.is_empty() => return Ok(()),
            Ok(commits) => hub.publish(commits.into_iter().map(Arc::new).collect()),
            // Followers are told of it in their turn.
            Err(StoreError::Compacted { at }) => hub.skip_to(at),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Hub {
    /// The commits up to here are gone from the log, and this core has not seen them.
    fn skip_to(&self, revision: Revision) {
        let mut ring = self.ring.write().unwrap_or_else(PoisonError::into_inner);
        (ring.commits, ring.bytes) = Default::default();
        self.newest.send_modify(|newest| newest.revision = newest.revision.max(revision));
    }
}

/// Commits in order, each whole, none left out.
pub struct Feed {
    hub: Arc<Hub>,
    readers: Readers,
    after: Revision,
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Feed").field("after", &self.after).finish_non_exhaustive()
    }
}

impl Feed {
    pub(super) fn new(hub: Arc<Hub>, readers: Readers, after: Revision) -> Self {
        Self { hub, readers, after }
    }

    /// The last revision that was given out.
    pub fn revision(&self) -> Revision {
        self.after
    }

    /// Waits for more. May be dropped while it waits: nothing is lost.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] when some of what comes next is gone: follow again, from the revision of a fresh
    /// reading. [`StoreError::Closed`] at the end.
    pub async fn next(&mut self) -> Result<Vec<Arc<Commit>>, StoreError> {
        self.hub.beyond(self.after).await.ok_or(StoreError::Closed)?;
        let commits = match self.hub.after(self.after) {
            Some(commits) if !commits.is_empty() => commits,
            _ => {
                let commits =
                    self.readers.log_between(self.after, Revision::MAX, REFILL_ROWS).await?;
                commits.into_iter().map(Arc::new).collect()
            }
        };
        self.after = commits.last().map_or(self.after, |last| last.revision);
        Ok(commits)
    }
}
