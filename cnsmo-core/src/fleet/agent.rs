//! One agent.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use cnsmo_proto::{
    digest::Digest,
    model::{Labels, RULES_MAX},
    pb::{
        agent::{Ack, StatusReport, TypeState, Welcome, update::Kind},
        balancer::BackendStatus,
        node::NodeStatus,
        policy::RuleCounter,
    },
};
use tonic::Status;

use super::{
    BALANCER, Catalog, Down, DownSender, POLICY, Push, Revision, SET_TYPE, Topic,
    set::{Set, Target},
    wall_clock,
};
use crate::error::Error;

/// An agent whose heartbeats show another set than it acknowledged gets a snapshot, but not more often than this.
const RESYNC_INTERVAL: Duration = Duration::from_secs(30);
/// Changes of its record that an agent may cause at once, by a first stream, other labels or another announcement: each is
/// written to disk, and told to all members of its network. A VM that roams has some, a hostile one thousands.
const CHANGES_MAX: u32 = 10;
/// After this time it may cause one more.
const CHANGE_INTERVAL: Duration = Duration::from_secs(6);
/// Resources of one update, encoded. An agent takes messages of 64 MiB; the rest is for names and framing.
const UPDATE_BYTES_MAX: usize = 60 << 20;
/// Addresses, interfaces, drop counters or peers that a status report may list; the rest is cut off.
const REPORTED_MAX: usize = 256;
/// Backends of one balancer that a status report may list; one with more is left out.
const BACKENDS_MAX: usize = 16_384;
/// Bytes of a text from an agent; the rest is cut off.
const TEXT_BYTES_MAX: usize = 1_024;
/// Bytes of an X25519 key (RFC 7748, section 5).
const KEY_BYTES: usize = 32;

#[derive(Debug)]
pub(super) struct Session {
    id: u64,
    down: DownSender,
    nonce: u64,
    /// What was confirmed to the agent last.
    confirmed: Option<TypeState>,
}

impl Session {
    pub(super) fn new(id: u64, down: DownSender) -> Self {
        Self { id, down, nonce: 0, confirmed: None }
    }
}

/// An update that waits for its answer.
#[derive(Debug)]
struct InFlight {
    nonce: u64,
    kind: Kind,
    /// The whole set after it.
    target: Target,
}

#[derive(Debug)]
pub(super) struct Rejection {
    version: Revision,
    pub(super) message: String,
}

#[derive(Debug)]
pub(super) struct Agent {
    pub(super) labels: Labels,
    /// That it is a member of.
    pub(super) network: Option<String>,
    desired: Target,
    session: Option<Session>,
    in_flight: Option<InFlight>,
    /// Nonce of this session's bookmark.
    bookmarked: Option<u64>,
    /// Target of the last update that was answered; none: only a snapshot helps. What was rejected is in it, so it is not
    /// sent again.
    sent: Option<Target>,
    /// What the agent runs, if its digest has proved it.
    proven: Option<Target>,
    /// As the agent said last.
    running: Option<(Revision, Digest)>,
    pub(super) rejected: BTreeMap<String, Rejection>,
    /// A whole snapshot was refused: its digest, and why. Not sent again until something changes.
    pub(super) refused: Option<(Digest, String)>,
    /// Highest revision known to be enforced, while the desired set is not.
    applied_revision: Revision,
    /// When all changes that it has caused will be worked off.
    changes_until: Instant,
    heard: Instant,
    resynced: Option<Instant>,
    pub(super) heard_time: Option<SystemTime>,
    /// The lease is over.
    pub(super) late: bool,
    pub(super) report: NodeStatus,
    /// By policy.
    pub(super) counters: BTreeMap<String, Vec<RuleCounter>>,
    /// By balancer.
    pub(super) backends: BTreeMap<String, Vec<BackendStatus>>,
}

impl Agent {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            labels: Labels::default(),
            network: None,
            desired: Target::default(),
            session: None,
            in_flight: None,
            bookmarked: None,
            sent: None,
            proven: None,
            running: None,
            rejected: BTreeMap::new(),
            refused: None,
            applied_revision: 0,
            changes_until: now,
            heard: now,
            resynced: None,
            heard_time: None,
            late: false,
            report: NodeStatus::default(),
            counters: BTreeMap::new(),
            backends: BTreeMap::new(),
        }
    }

    /// Names of the policies that select it.
    pub(super) fn policies(&self) -> impl Iterator<Item = &str> {
        self.desired.own.keys().filter_map(|key| key.strip_prefix(POLICY))
    }

    /// Puts a resource of its own into the desired set or takes it out. Returns whether that changed the set.
    pub(super) fn want(&mut self, key: &str, version: Option<Revision>, before: Revision) -> bool {
        let was_in_sync = self.in_sync();
        if !self.desired.own.put(key, version) {
            return false;
        }
        self.rejected.remove(key);
        if was_in_sync {
            self.applied_revision = before;
        }
        true
    }

    /// Takes over what all members of its network are sent. Returns whether that changed the set.
    pub(super) fn share(&mut self, shared: &Set, before: Revision) -> bool {
        if self.desired.shared.digest() == shared.digest() {
            return false;
        }
        if self.in_sync() {
            self.applied_revision = before;
        }
        self.desired.shared = shared.clone();
        let desired = &self.desired;
        self.rejected.retain(|key, rejected| desired.get(key) == Some(rejected.version));
        true
    }

    /// The version of a resource that it is to have.
    #[cfg(test)]
    pub(super) fn wants(&self, key: &str) -> Option<Revision> {
        self.desired.get(key)
    }

    /// The kernel of this node enforces the desired set.
    pub(super) fn in_sync(&self) -> bool {
        self.running.is_some_and(|(_, digest)| digest == self.desired.digest())
    }

    /// The highest revision whose effect on this node is enforced.
    pub(super) fn applied_revision(&self, current: Revision) -> Revision {
        if self.in_sync() { current } else { self.applied_revision }
    }

    /// Whether the node enforces what is desired of `topic` now.
    pub(super) fn applies(&self, topic: &Topic) -> bool {
        let proven = |set: &Target| !self.desired.differences(set).keys().any(|key| topic.has(key));
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
        self.send(Down::Welcome(Box::new(welcome)));
        let have = have.and_then(|have| Some((have.revision, digest(&have.digest).ok()?)));
        let lost = self.in_flight.take();
        self.running = have;
        let Some((revision, have)) = have else {
            (self.sent, self.proven) = (None, None);
            return;
        };
        if have == self.desired.digest() {
            self.sent = Some(self.desired.clone());
            self.proven = Some(self.desired.clone());
            self.rejected.clear();
        } else if let Some(lost) = lost.filter(|lost| lost.target.digest() == have) {
            self.sent = Some(lost.target.clone());
            self.proven = Some(lost.target);
        } else if self.proven.as_ref().map(Target::digest) != Some(have) {
            (self.sent, self.proven) = (None, None);
        }
        if self.was_sent_all() {
            self.bookmark(revision);
        }
    }

    /// Tells the agent that it was sent the current set already. Needs no answer, but may be refused.
    fn bookmark(&mut self, revision: Revision) {
        let nonce = self.next_nonce();
        self.bookmarked = Some(nonce);
        self.send(Down::Update(Box::new(Push {
            nonce,
            kind: Kind::Bookmark,
            base_revision: revision,
            revision,
            upserts: Vec::new(),
            removals: Vec::new(),
            digest: self.desired.digest(),
        })));
    }

    fn was_sent_all(&self) -> bool {
        self.sent.as_ref().map(Target::digest) == Some(self.desired.digest())
    }

    /// Ends the session, if there is one.
    pub(super) fn end(&mut self, status: Status) {
        if let Some(session) = self.session.take() {
            // A full channel ends as well: its sender is dropped here.
            let _ = session.down.messages.try_send(Err(status));
        }
    }

    /// Asks the agent to come back after `delay`, and ends the session.
    pub(super) fn dismiss(&mut self, delay: Duration) {
        self.send(Down::GoAway(delay));
        self.end(Status::unavailable("the core is shutting down"));
    }

    /// Counts a change of its record. Fails beyond the limit, which a new session does not lift.
    pub(super) fn admit_change(&mut self, now: Instant) -> Result<(), Error> {
        let until = self.changes_until.max(now) + CHANGE_INTERVAL;
        if until.saturating_duration_since(now) > CHANGE_INTERVAL * CHANGES_MAX {
            return Err(Error::Exhausted(format!(
                "the agent changes its labels or its announcement too often: {CHANGES_MAX} changes at once and one every {CHANGE_INTERVAL:?} are allowed"
            )));
        }
        self.changes_until = until;
        Ok(())
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

    /// Sends the next update if one is due and none waits for its answer. Returns whether the node has another status for it:
    /// the agent had to be cut, or its set is too large.
    pub(super) fn push(&mut self, catalog: &Catalog, revision: Revision) -> bool {
        let digest = self.desired.digest();
        let refused = self.refused.as_ref().is_some_and(|(refused, _)| *refused == digest);
        if self.session.is_none() || self.in_flight.is_some() || refused || self.was_sent_all() {
            return false;
        }
        let (kind, base) = match &self.sent {
            None => (Kind::Snapshot, Target::default()),
            Some(sent) => (Kind::Delta, sent.clone()),
        };
        let (mut upserts, mut removals) = (Vec::new(), Vec::new());
        for (key, version) in self.desired.differences(&base) {
            match version
                .and_then(|version| Some((key.clone(), version, catalog.get(key)?.wire.clone())))
            {
                Some(upsert) => upserts.push(upsert),
                None => removals.push(key.clone()),
            }
        }
        let bytes: usize = upserts.iter().map(|(_, _, wire)| wire.len()).sum();
        if bytes > UPDATE_BYTES_MAX {
            let why = format!(
                "the resources for this VM take {bytes} bytes; one update takes {UPDATE_BYTES_MAX}"
            );
            self.refused = Some((digest, why));
            return true;
        }
        if kind == Kind::Snapshot {
            // A fresh start, perhaps of another version of the agent: what was rejected is tried once more.
            self.rejected.clear();
        }
        let nonce = self.next_nonce();
        self.in_flight = Some(InFlight { nonce, kind, target: self.desired.clone() });
        let base_revision = self.running.map_or(0, |(revision, _)| revision);
        let push = Push { nonce, kind, base_revision, revision, upserts, removals, digest };
        !self.send(Down::Update(Box::new(push)))
    }

    /// What the agent runs after `target` if it keeps the last good version of what it has rejected.
    fn without_rejected(&self, target: &Target) -> Target {
        let mut kept = target.clone();
        for (key, rejected) in &self.rejected {
            if target.get(key) == Some(rejected.version) {
                kept.put(key, self.proven.as_ref().and_then(|proven| proven.get(key)));
            }
        }
        kept
    }

    pub(super) fn on_ack(&mut self, ack: Ack) -> Result<(), Status> {
        if ack.r#type != SET_TYPE {
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
            self.proven = self.proven.take().filter(|set| set.digest() == reported);
            self.sent = None;
            if flight.kind == Kind::Snapshot {
                self.refused = Some((flight.target.digest(), cut(ack.error)));
            }
            return Ok(());
        }
        self.refused = None;
        for error in ack.resource_errors {
            let version = Some(error.version);
            if flight.target.get(&error.name) == version && self.desired.get(&error.name) == version
            {
                let (version, message) = (error.version, cut(error.message));
                self.rejected.insert(error.name, Rejection { version, message });
            }
        }
        self.prove(&flight, reported);
        Ok(())
    }

    /// Finds out which set the agent runs after `flight`.
    fn prove(&mut self, flight: &InFlight, reported: Digest) {
        self.sent = Some(flight.target.clone());
        if flight.target.digest() == reported {
            self.proven = Some(flight.target.clone());
            return;
        }
        if self.rejected.is_empty() {
            tracing::warn!(kind = ?flight.kind, "an agent runs another set than it was sent");
            (self.sent, self.proven) = (None, None);
            if flight.kind == Kind::Snapshot {
                let text = "the agent runs another set than it was sent";
                self.refused = Some((flight.target.digest(), text.into()));
            }
            return;
        }
        let kept = self.without_rejected(&flight.target);
        let mut dropped = flight.target.clone();
        for key in self.rejected.keys() {
            dropped.put(key, None);
        }
        self.proven = [kept, dropped].into_iter().find(|set| set.digest() == reported);
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
        let same = self.running.is_some_and(|(_, digest)| digest == shown);
        let explained = self.proven.as_ref().is_some_and(|set| set.digest() == shown);
        if same && (explained || self.refused.is_some()) {
            return Ok(false);
        }
        if shown == self.desired.digest() {
            // What was rejected works now: nothing has to be sent for it.
            self.running = Some((state.revision, shown));
            self.sent = Some(self.desired.clone());
            self.proven = Some(self.desired.clone());
            self.rejected.clear();
            self.refused = None;
            return Ok(true);
        }
        let again =
            self.resynced.is_none_or(|at| now.saturating_duration_since(at) > RESYNC_INTERVAL);
        self.running = Some((state.revision, shown));
        if again {
            self.resynced = Some(now);
            (self.sent, self.proven, self.refused) = (None, None, None);
        }
        Ok(again || !same)
    }

    /// Tells the agent that what it runs has not cut it off. With a heartbeat, not with the answer to an update: so the
    /// confirmations of many VMs do not come between the updates of the others.
    pub(super) fn confirm(&mut self, state: Option<&TypeState>) {
        // Said before the answer to an update, it would be taken for a word on that one.
        let state = state.filter(|_| self.in_flight.is_none());
        let Some((session, state)) = self.session.as_mut().zip(state) else { return };
        // By what it has, not by the revision: what follows the catalogue has none of its own.
        if session.confirmed.as_ref() != Some(state) {
            session.confirmed = Some(state.clone());
            self.send(Down::Confirm(state.revision));
        }
    }

    /// Takes a status report, cut to its limits. Returns whether something changed.
    pub(super) fn on_report(&mut self, report: StatusReport) -> bool {
        let node = cut_status(report.node.unwrap_or_default());
        let known = |kind: &str, name: &str| self.desired.get(&format!("{kind}{name}")).is_some();
        let counters = report
            .policies
            .into_iter()
            .filter(|one| known(POLICY, &one.policy) && one.rules.len() <= RULES_MAX)
            .map(|one| (one.policy, one.rules))
            .collect();
        let backends = report
            .load_balancers
            .into_iter()
            .filter(|one| known(BALANCER, &one.load_balancer) && one.backends.len() <= BACKENDS_MAX)
            .map(|one| (one.load_balancer, one.backends.into_iter().map(cut_backend).collect()))
            .collect();
        let changed =
            (&self.report, &self.counters, &self.backends) != (&node, &counters, &backends);
        (self.report, self.counters, self.backends) = (node, counters, backends);
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

fn digest(bytes: &[u8]) -> Result<Digest, String> {
    Digest::try_from(bytes).map_err(|_| format!("{} bytes; a digest has 32", bytes.len()))
}

/// A status within its limits.
fn cut_status(mut node: NodeStatus) -> NodeStatus {
    node.addresses.truncate(REPORTED_MAX);
    node.interfaces.truncate(REPORTED_MAX);
    if let Some(firewall) = &mut node.firewall {
        firewall.drops.truncate(REPORTED_MAX);
    }
    for text in [&mut node.reason, &mut node.message, &mut node.kernel, &mut node.agent_version] {
        *text = cut(std::mem::take(text));
    }
    if let Some(overlay) = &mut node.overlay {
        overlay.peers.truncate(REPORTED_MAX);
        let own =
            [&mut overlay.network, &mut overlay.backend, &mut overlay.reason, &mut overlay.device];
        let peers = overlay.peers.iter_mut().flat_map(|peer| [&mut peer.node, &mut peer.endpoint]);
        for text in own.into_iter().chain(peers) {
            *text = cut(std::mem::take(text));
        }
        overlay.public_key.truncate(KEY_BYTES);
    }
    node
}

fn cut_backend(backend: BackendStatus) -> BackendStatus {
    BackendStatus {
        node: cut(backend.node),
        instance: cut(backend.instance),
        reason: cut(backend.reason),
        message: cut(backend.message),
        ..backend
    }
}

/// The start of a text.
fn cut(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    }
    text
}
