//! One agent.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use cnsmo_proto::{
    digest::Digest,
    model::{Labels, RULES_MAX},
    pb::{
        agent::{Ack, StatusReport, TypeState, Welcome, update::Kind},
        node::NodeStatus,
        policy::RuleCounter,
    },
};
use tonic::Status;

use super::{Down, DownSender, POLICY_TYPE, Push, Revision, Set, State, wall_clock};

/// An agent whose heartbeats show another set than it acknowledged gets a snapshot, but not more often than this.
const RESYNC_INTERVAL: Duration = Duration::from_secs(30);
/// Addresses, interfaces or drop counters that a status report may list; the rest is cut off.
const REPORTED_MAX: usize = 256;
/// Bytes of a text from an agent; the rest is cut off.
const TEXT_BYTES_MAX: usize = 1_024;

#[derive(Debug)]
pub(super) struct Session {
    id: u64,
    down: DownSender,
    nonce: u64,
}

impl Session {
    pub(super) fn new(id: u64, down: DownSender) -> Self {
        Self { id, down, nonce: 0 }
    }
}

/// An update that waits for its answer.
#[derive(Debug)]
struct InFlight {
    nonce: u64,
    kind: Kind,
    /// The whole set after it.
    target: Arc<Set>,
    /// Of the target.
    digest: Digest,
}

#[derive(Debug)]
pub(super) struct Rejection {
    pub(super) revision: Revision,
    pub(super) message: String,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) labels: Labels,
    desired: Arc<Set>,
    digest: Digest,
    session: Option<Session>,
    in_flight: Option<InFlight>,
    /// Nonce of this session's bookmark.
    bookmarked: Option<u64>,
    /// Target of the last update that was answered; none: only a snapshot helps. What was rejected is in it, so it is not
    /// sent again.
    sent: Option<Arc<Set>>,
    /// What the agent runs, if its digest has proved it.
    proven: Option<Arc<Set>>,
    /// As the agent said last.
    running: Option<(Revision, Digest)>,
    pub(super) rejected: BTreeMap<String, Rejection>,
    /// A whole snapshot was refused: its digest, and why. Not sent again until something changes.
    pub(super) refused: Option<(Digest, String)>,
    /// Highest revision known to be enforced, while the desired set is not.
    applied_revision: Revision,
    heard: Instant,
    resynced: Option<Instant>,
    pub(super) heard_time: Option<SystemTime>,
    /// The lease is over.
    pub(super) late: bool,
    pub(super) report: NodeStatus,
    pub(super) counters: BTreeMap<String, Vec<RuleCounter>>,
}

impl Member {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            labels: Labels::default(),
            desired: Arc::default(),
            digest: Digest::default(),
            session: None,
            in_flight: None,
            bookmarked: None,
            sent: None,
            proven: None,
            running: None,
            rejected: BTreeMap::new(),
            refused: None,
            applied_revision: 0,
            heard: now,
            resynced: None,
            heard_time: None,
            late: false,
            report: NodeStatus::default(),
            counters: BTreeMap::new(),
        }
    }

    /// Names of the policies that select it.
    pub(super) fn policies(&self) -> impl Iterator<Item = &String> {
        self.desired.keys()
    }

    /// Puts a policy into the desired set or takes it out. Returns whether that changed the set.
    pub(super) fn want(
        &mut self,
        policy: &str,
        revision: Option<Revision>,
        before: Revision,
    ) -> bool {
        let old = self.desired.get(policy).copied();
        if old == revision {
            return false;
        }
        if self.in_sync() {
            self.applied_revision = before;
        }
        let desired = Arc::make_mut(&mut self.desired);
        if let Some(old) = old {
            desired.remove(policy);
            self.digest.remove(policy, old);
            self.rejected.remove(policy);
        }
        if let Some(revision) = revision {
            desired.insert(policy.to_owned(), revision);
            self.digest.add(policy, revision);
        } else {
            self.counters.remove(policy);
        }
        true
    }

    /// The kernel of this node enforces the desired set.
    pub(super) fn in_sync(&self) -> bool {
        self.running.is_some_and(|(_, digest)| digest == self.digest)
    }

    /// The highest revision whose effect on this node is enforced.
    pub(super) fn applied_revision(&self, current: Revision) -> Revision {
        if self.in_sync() { current } else { self.applied_revision }
    }

    /// Whether the node enforces what `policy` says now.
    pub(super) fn applies(&self, policy: &str) -> bool {
        let proven = |set: &Arc<Set>| set.get(policy) == self.desired.get(policy);
        self.in_sync() || self.proven.as_ref().is_some_and(proven)
    }

    pub(super) fn is_connected(&self) -> bool {
        self.session.is_some()
    }

    pub(super) fn is_session(&self, id: u64) -> bool {
        self.session.as_ref().is_some_and(|session| session.id == id)
    }

    /// Starts a session with the agent's word on what it runs.
    pub(super) fn begin(
        &mut self,
        session: Session,
        welcome: Welcome,
        have: Option<&TypeState>,
        now: Instant,
    ) {
        self.session = Some(session);
        self.heard(now);
        self.resynced = None;
        self.refused = None;
        self.bookmarked = None;
        self.send(Down::Welcome(welcome));
        let have = have.and_then(|have| Some((have.revision, digest(&have.digest).ok()?)));
        let lost = self.in_flight.take();
        self.running = have;
        let Some((revision, have)) = have else {
            (self.sent, self.proven) = (None, None);
            return;
        };
        if have == self.digest {
            self.sent = Some(self.desired.clone());
            self.proven = Some(self.desired.clone());
            self.rejected.clear();
        } else if let Some(lost) = lost.filter(|lost| lost.digest == have) {
            self.sent = Some(lost.target.clone());
            self.proven = Some(lost.target);
        } else if self.proven.as_deref().map(digest_of) != Some(have) {
            (self.sent, self.proven) = (None, None);
        }
        if self.sent.as_ref() == Some(&self.desired) {
            self.bookmark(revision);
        }
    }

    /// Tells the agent that it was sent the current set already. Needs no answer, but may be refused.
    fn bookmark(&mut self, revision: Revision) {
        let nonce = self.next_nonce();
        self.bookmarked = Some(nonce);
        self.send(Down::Update(Push {
            nonce,
            kind: Kind::Bookmark,
            base_revision: revision,
            revision,
            upserts: Vec::new(),
            removals: Vec::new(),
            digest: self.digest,
        }));
    }

    /// Ends the session, if there is one.
    pub(super) fn end(&mut self, status: Status) {
        if let Some(session) = self.session.take() {
            // A full channel ends as well: its sender is dropped here.
            let _ = session.down.messages.try_send(Err(status));
        }
    }

    /// Renews the lease. Returns whether it was over.
    pub(super) fn heard(&mut self, at: Instant) -> bool {
        self.heard = self.heard.max(at);
        self.heard_time = Some(wall_clock());
        std::mem::take(&mut self.late)
    }

    /// Returns whether the lease ends now.
    pub(super) fn expire(&mut self, now: Instant, frozen: Duration, lease: Duration) -> bool {
        self.heard = (self.heard + frozen).min(now);
        let over = !self.late && now.saturating_duration_since(self.heard) > lease;
        self.late |= over;
        over
    }

    /// Sends the next update if one is due and none waits for its answer. Returns false if the agent had to be cut.
    pub(super) fn push(&mut self, state: &State) -> bool {
        if self.session.is_none() || self.in_flight.is_some() {
            return true;
        }
        if self.refused.as_ref().is_some_and(|(digest, _)| *digest == self.digest) {
            return true;
        }
        if self.sent.as_ref() == Some(&self.desired) {
            return true;
        }
        let empty = Set::new();
        let (kind, base) = match &self.sent {
            None => (Kind::Snapshot, &empty),
            Some(sent) => (Kind::Delta, sent.as_ref()),
        };
        let new = self.desired.iter().filter(|(name, revision)| base.get(*name) != Some(revision));
        let upserts = new
            .filter_map(|(name, revision)| {
                let policy = state.policies().get(name)?;
                Some((name.clone(), *revision, policy.spec.clone()))
            })
            .collect();
        let removals =
            base.keys().filter(|name| !self.desired.contains_key(*name)).cloned().collect();
        if kind == Kind::Snapshot {
            // A fresh start, perhaps of another version of the agent: what was rejected is tried once more.
            self.rejected.clear();
        }
        let nonce = self.next_nonce();
        self.in_flight =
            Some(InFlight { nonce, kind, target: self.desired.clone(), digest: self.digest });
        self.send(Down::Update(Push {
            nonce,
            kind,
            base_revision: self.running.map_or(0, |(revision, _)| revision),
            revision: state.revision(),
            upserts,
            removals,
            digest: self.digest,
        }))
    }

    /// What the agent runs after `target` if it keeps the last good version of what it has rejected.
    fn without_rejected(&self, target: &Set) -> Set {
        let keeps = |(name, revision): (&String, &Revision)| {
            if self.rejected.get(name).is_none_or(|rejected| rejected.revision != *revision) {
                return Some((name.clone(), *revision));
            }
            let last_good = self.proven.as_ref()?.get(name)?;
            Some((name.clone(), *last_good))
        };
        target.iter().filter_map(keeps).collect()
    }

    pub(super) fn on_ack(&mut self, ack: Ack) -> Result<(), Status> {
        if ack.r#type != POLICY_TYPE {
            return Err(Status::invalid_argument("ack.type: is not known"));
        }
        let applied =
            ack.applied.ok_or_else(|| Status::invalid_argument("ack.applied: missing"))?;
        let reported = digest(&applied.digest)
            .map_err(|e| Status::invalid_argument(format!("ack.applied.digest: {e}")))?;
        self.running = Some((applied.revision, reported));
        let Some(flight) = self.in_flight.take_if(|flight| flight.nonce == ack.nonce) else {
            if self.bookmarked.take_if(|nonce| *nonce == ack.nonce).is_some()
                && !ack.error.is_empty()
                && self.in_flight.is_none()
            {
                (self.sent, self.proven) = (None, None);
            }
            return Ok(());
        };
        if !ack.error.is_empty() {
            self.proven = self.proven.take().filter(|set| digest_of(set) == reported);
            self.sent = None;
            if flight.kind == Kind::Snapshot {
                self.refused = Some((flight.digest, cut(ack.error)));
            }
            return Ok(());
        }
        self.refused = None;
        for error in ack.resource_errors {
            if flight.target.get(&error.name) == Some(&error.version)
                && self.desired.get(&error.name) == Some(&error.version)
            {
                let message = cut(error.message);
                self.rejected.insert(error.name, Rejection { revision: error.version, message });
            }
        }
        self.prove(&flight, reported);
        Ok(())
    }

    /// Finds out which set the agent runs after `flight`.
    fn prove(&mut self, flight: &InFlight, reported: Digest) {
        self.sent = Some(flight.target.clone());
        if flight.digest == reported {
            self.proven = Some(flight.target.clone());
            return;
        }
        if self.rejected.is_empty() {
            tracing::warn!(kind = ?flight.kind, "an agent runs another set than it was sent");
            (self.sent, self.proven) = (None, None);
            if flight.kind == Kind::Snapshot {
                let text = "the agent runs another set than it was sent";
                self.refused = Some((flight.digest, text.into()));
            }
            return;
        }
        let kept = self.without_rejected(&flight.target);
        let rejected = &self.rejected;
        let dropped: Set = flight
            .target
            .iter()
            .filter(|(name, _)| !rejected.contains_key(*name))
            .map(|(name, revision)| (name.clone(), *revision))
            .collect();
        self.proven =
            [kept, dropped].into_iter().find(|set| digest_of(set) == reported).map(Arc::new);
    }

    /// Takes the set that a heartbeat shows. Returns whether something changed.
    pub(super) fn on_state(
        &mut self,
        state: Option<&TypeState>,
        now: Instant,
    ) -> Result<bool, Status> {
        // With an update under way either set may be the right one: its answer will tell.
        let Some(state) = state.filter(|_| self.in_flight.is_none()) else { return Ok(false) };
        let shown = digest(&state.digest)
            .map_err(|e| Status::invalid_argument(format!("heartbeat.applied: {e}")))?;
        if self.running.is_some_and(|(_, digest)| digest == shown) {
            return Ok(false);
        }
        let again =
            self.resynced.is_none_or(|at| now.saturating_duration_since(at) > RESYNC_INTERVAL);
        self.running = Some((state.revision, shown));
        if again {
            self.resynced = Some(now);
            (self.sent, self.proven, self.refused) = (None, None, None);
        }
        Ok(true)
    }

    /// Takes a status report, cut to its limits. Returns whether something changed.
    pub(super) fn on_report(&mut self, report: StatusReport) -> bool {
        let mut node = report.node.unwrap_or_default();
        node.addresses.truncate(REPORTED_MAX);
        node.interfaces.truncate(REPORTED_MAX);
        if let Some(firewall) = &mut node.firewall {
            firewall.drops.truncate(REPORTED_MAX);
        }
        for text in [&mut node.reason, &mut node.message, &mut node.kernel, &mut node.agent_version]
        {
            *text = cut(std::mem::take(text));
        }
        let counters = report
            .policies
            .into_iter()
            .filter(|one| self.desired.contains_key(&one.policy) && one.rules.len() <= RULES_MAX)
            .map(|one| (one.policy, one.rules))
            .collect();
        let changed = self.report != node || self.counters != counters;
        self.report = node;
        self.counters = counters;
        changed
    }

    fn next_nonce(&mut self) -> u64 {
        self.session.as_mut().map_or(0, |session| {
            session.nonce += 1;
            session.nonce
        })
    }

    /// Returns false if the agent takes nothing and was cut.
    fn send(&mut self, down: Down) -> bool {
        let Some(session) = &self.session else { return true };
        if session.down.messages.try_send(Ok(down)).is_ok() {
            return true;
        }
        self.session = None;
        self.in_flight = None;
        false
    }
}

fn digest_of(set: &Set) -> Digest {
    set.iter().map(|(name, revision)| (name.as_str(), *revision)).collect()
}

fn digest(bytes: &[u8]) -> Result<Digest, String> {
    Digest::try_from(bytes).map_err(|_| format!("{} bytes; a digest has 32", bytes.len()))
}

/// The start of a text.
fn cut(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    }
    text
}
