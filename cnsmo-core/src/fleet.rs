//! What each agent shall run, what it says it runs, and the update that closes the gap.
//!
//! No I/O beyond handing messages to bounded channels: one task calls in, in order. An inverted index from labels to nodes
//! and the set of nodes per policy keep the work of an edit to the nodes that it touches.

mod member;
mod status;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use cnsmo_proto::{
    digest::Digest,
    model::Labels,
    pb::{
        agent::{
            ConnectResponse, Hello, Resource, Update, Welcome, connect_request, connect_response,
            resource, update::Kind,
        },
        policy::FirewallPolicySpec,
    },
};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use self::member::{Member, Session};
use crate::{
    state::{Event, State},
    store::Revision,
};

/// The one resource type that agents are sent.
pub const POLICY_TYPE: &str = "cnsmo.policy.v1.FirewallPolicy";
/// Version of the stream's protocol.
pub const PROTOCOL_VERSION: u32 = 1;
/// Messages that wait for one agent: the welcome, the one update without an answer, bookmarks, the end. An agent that
/// does not take them is cut.
pub const DOWN_MAX: usize = 8;
/// A gap between two ticks longer than this means that the core itself stood still.
const FREEZE_MIN: Duration = Duration::from_secs(2);

/// Names and revisions of the policies of one node.
type Set = BTreeMap<String, Revision>;

/// How often agents call, and how long one may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// Longest silence.
    pub lease: Duration,
}

impl Default for Timing {
    /// Death is noticed within 6 s, after three heartbeats were lost.
    fn default() -> Self {
        Self { heartbeat: Duration::from_secs(2), lease: Duration::from_secs(6) }
    }
}

/// A message on its way to an agent. Specs are shared until the moment they are encoded.
#[derive(Debug)]
pub enum Down {
    /// The first.
    Welcome(Welcome),
    /// One step of the policies.
    Update(Push),
}

/// An update before it is encoded.
#[derive(Debug)]
pub struct Push {
    nonce: u64,
    kind: Kind,
    base_revision: Revision,
    revision: Revision,
    upserts: Vec<(String, Revision, Arc<FirewallPolicySpec>)>,
    removals: Vec<String>,
    digest: Digest,
}

impl From<Down> for ConnectResponse {
    fn from(down: Down) -> Self {
        let message = match down {
            Down::Welcome(welcome) => connect_response::Message::Welcome(welcome),
            Down::Update(push) => connect_response::Message::Update(push.into()),
        };
        Self { message: Some(message) }
    }
}

impl From<Push> for Update {
    fn from(push: Push) -> Self {
        let resource = |(name, revision, spec): (String, Revision, Arc<FirewallPolicySpec>)| {
            let spec = FirewallPolicySpec::clone(&spec);
            Resource { name, version: revision, spec: Some(resource::Spec::FirewallPolicy(spec)) }
        };
        Self {
            nonce: push.nonce,
            r#type: POLICY_TYPE.into(),
            kind: push.kind.into(),
            base_revision: push.base_revision,
            revision: push.revision,
            upserts: push.upserts.into_iter().map(resource).collect(),
            removals: push.removals,
            digest: push.digest.to_vec(),
        }
    }
}

/// Where messages to one agent go.
#[derive(Debug)]
pub struct DownSender {
    /// At most [`DOWN_MAX`] wait.
    pub messages: mpsc::Sender<Result<Down, Status>>,
    /// Dropped with the session: whoever reads from the agent stops.
    pub alive: oneshot::Sender<()>,
}

/// All agents.
#[derive(Debug)]
pub struct Fleet {
    members: BTreeMap<String, Member>,
    /// Nodes that each policy selects.
    selected: BTreeMap<String, BTreeSet<String>>,
    /// Nodes that have each label.
    by_label: HashMap<(String, String), BTreeSet<String>>,
    /// Nodes that may need an update.
    outbox: BTreeSet<String>,
    /// Since [`Self::take_changed`] was called last.
    changed: Changed,
    /// When the condition of each policy became what it is.
    conditions: BTreeMap<String, status::Seen>,
    timing: Timing,
    sessions: u64,
}

/// Resources whose status is another than before.
#[derive(Debug, Default)]
pub struct Changed {
    /// Names of nodes.
    pub nodes: BTreeSet<String>,
    /// Names of policies.
    pub policies: BTreeSet<String>,
}

impl Changed {
    /// Whether nothing has changed.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.policies.is_empty()
    }
}

impl Fleet {
    /// All nodes of the state, none of them connected, each with a full lease.
    pub fn new(state: &State, timing: Timing, now: Instant) -> Self {
        let mut fleet = Self {
            members: BTreeMap::new(),
            selected: state.policies().keys().map(|name| (name.clone(), BTreeSet::new())).collect(),
            by_label: HashMap::new(),
            outbox: BTreeSet::new(),
            changed: Changed::default(),
            conditions: BTreeMap::new(),
            timing,
            sessions: 0,
        };
        for name in state.nodes().keys() {
            fleet.node_changed(name, state, 0, now);
        }
        fleet
    }

    /// Takes over what a commit has changed. `before` is the revision before that commit.
    pub fn on_event(&mut self, event: &Event, state: &State, before: Revision, now: Instant) {
        match event {
            Event::Policy(name) => self.policy_changed(name, state, before),
            Event::PolicyDeleted(policy) => {
                self.policy_changed(&policy.metadata.name, state, before);
                self.selected.remove(&policy.metadata.name);
                self.conditions.remove(&policy.metadata.name);
            }
            Event::Node(name) => self.node_changed(name, state, before, now),
            Event::NodeDeleted(node) => self.node_deleted(&node.metadata.name, &node.labels),
        }
    }

    fn policy_changed(&mut self, name: &str, state: &State, before: Revision) {
        let mut nodes = self.selected.remove(name).unwrap_or_default();
        let policy = state.policies().get(name);
        let wanted: BTreeSet<String> =
            policy.map(|policy| self.matching(state, &policy.target)).unwrap_or_default();
        nodes.extend(wanted.iter().cloned());
        let revision = policy.map(|policy| policy.metadata.revision);
        for node in nodes {
            let want = revision.filter(|_| wanted.contains(&node));
            let Some(member) = self.members.get_mut(&node) else { continue };
            if member.want(name, want, before) {
                self.changed.nodes.insert(node.clone());
                self.outbox.insert(node);
            }
        }
        self.selected.insert(name.to_owned(), wanted);
        self.changed.policies.insert(name.to_owned());
    }

    /// Nodes that `target` selects, found from its rarest label.
    fn matching(&self, state: &State, target: &Labels) -> BTreeSet<String> {
        let postings = target
            .as_map()
            .iter()
            .map(|(key, value)| self.by_label.get(&(key.clone(), value.clone())));
        match postings.min_by_key(|nodes| nodes.map_or(0, BTreeSet::len)) {
            None => self.members.keys().cloned().collect(),
            Some(None) => BTreeSet::new(),
            Some(Some(nodes)) => {
                let selects = |name: &&String| {
                    state.nodes().get(*name).is_some_and(|node| target.selects(&node.labels))
                };
                nodes.iter().filter(selects).cloned().collect()
            }
        }
    }

    fn node_changed(&mut self, name: &str, state: &State, before: Revision, now: Instant) {
        let Some(node) = state.nodes().get(name) else { return };
        let member = self.members.entry(name.to_owned()).or_insert_with(|| Member::new(now));
        for label in std::mem::replace(&mut member.labels, node.labels.clone()).as_map() {
            unindex(&mut self.by_label, label, name);
        }
        for (key, value) in node.labels.as_map() {
            self.by_label.entry((key.clone(), value.clone())).or_default().insert(name.to_owned());
        }
        for (policy_name, policy) in state.policies() {
            let want = policy.target.selects(&node.labels).then_some(policy.metadata.revision);
            if member.want(policy_name, want, before) {
                let nodes = self.selected.entry(policy_name.clone()).or_default();
                if want.is_some() {
                    nodes.insert(name.to_owned());
                } else {
                    nodes.remove(name);
                }
                self.changed.policies.insert(policy_name.clone());
                self.outbox.insert(name.to_owned());
            }
        }
        self.changed.nodes.insert(name.to_owned());
    }

    fn node_deleted(&mut self, name: &str, labels: &Labels) {
        for label in labels.as_map() {
            unindex(&mut self.by_label, label, name);
        }
        let Some(mut member) = self.members.remove(name) else { return };
        member.end(Status::permission_denied(format!("Node {name}: was deleted")));
        for policy in member.policies() {
            if let Some(nodes) = self.selected.get_mut(policy) {
                nodes.remove(name);
            }
            self.changed.policies.insert(policy.clone());
        }
        self.outbox.remove(name);
        self.changed.nodes.remove(name);
    }

    /// Begins a session; an older one of the same agent ends. Returns its number.
    pub fn connect(
        &mut self,
        name: &str,
        hello: &Hello,
        down: DownSender,
        epoch: u64,
        now: Instant,
    ) -> u64 {
        self.sessions += 1;
        let id = self.sessions;
        let Some(member) = self.members.get_mut(name) else { return id };
        member.end(Status::aborted("another stream of this agent has connected"));
        let wire = |d: Duration| prost_types::Duration::try_from(d).ok();
        let welcome = Welcome {
            store_epoch: epoch,
            heartbeat_interval: wire(self.timing.heartbeat),
            lease_ttl: wire(self.timing.lease),
            protocol_version: PROTOCOL_VERSION,
        };
        member.begin(Session::new(id, down), welcome, hello.have.get(POLICY_TYPE), now);
        self.touched(name);
        id
    }

    /// Takes a message of an agent. A message of an older session is dropped; an error ends the session.
    pub fn on_message(
        &mut self,
        name: &str,
        session: u64,
        received: Instant,
        message: connect_request::Message,
    ) {
        let Some(member) = self.members.get_mut(name).filter(|m| m.is_session(session)) else {
            return;
        };
        let was_late = member.heard(received);
        let result = match message {
            connect_request::Message::Hello(_) => {
                Err(Status::invalid_argument("hello: comes once, as the first message"))
            }
            connect_request::Message::Ack(ack) => member.on_ack(ack).map(|()| true),
            connect_request::Message::Heartbeat(heartbeat) => {
                member.on_state(heartbeat.applied.get(POLICY_TYPE), received)
            }
            connect_request::Message::Status(report) => Ok(member.on_report(report)),
        };
        let changed = match result {
            Ok(changed) => changed,
            Err(status) => {
                member.end(status);
                true
            }
        };
        if changed || was_late {
            self.touched(name);
        }
    }

    /// A session's stream is gone. The lease goes on.
    pub fn disconnected(&mut self, name: &str, session: u64) {
        if let Some(member) = self.members.get_mut(name).filter(|m| m.is_session(session)) {
            member.end(Status::ok(""));
            self.touched(name);
        }
    }

    /// Ends leases. `since_last` is the time since the last call: if the core stood still, its agents get that time back.
    pub fn tick(&mut self, now: Instant, since_last: Duration) {
        let frozen = if since_last > FREEZE_MIN { since_last } else { Duration::ZERO };
        if !frozen.is_zero() {
            tracing::warn!(?frozen, "the core stood still: all leases are extended");
        }
        let mut late = Vec::new();
        for (name, member) in &mut self.members {
            if member.expire(now, frozen, self.timing.lease) {
                late.push(name.clone());
            }
        }
        for name in late {
            self.touched(&name);
        }
    }

    /// Sends what has become due.
    pub fn flush(&mut self, state: &State) {
        for name in std::mem::take(&mut self.outbox) {
            if let Some(member) = self.members.get_mut(&name)
                && !member.push(state)
            {
                self.changed.nodes.insert(name);
            }
        }
    }

    /// What has another status since the last call.
    pub fn take_changed(&mut self) -> Changed {
        std::mem::take(&mut self.changed)
    }

    /// Whether [`Self::take_changed`] has something to give.
    pub fn has_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Ends all sessions.
    pub fn shut_down(&mut self) {
        for member in self.members.values_mut() {
            member.end(Status::unavailable("the core is shutting down"));
        }
    }

    fn touched(&mut self, name: &str) {
        if let Some(member) = self.members.get(name) {
            self.changed.policies.extend(member.policies().cloned());
        }
        self.changed.nodes.insert(name.to_owned());
        self.outbox.insert(name.to_owned());
    }
}

/// Wall clock, for people; decisions use the monotonic clock.
fn wall_clock() -> SystemTime {
    SystemTime::now()
}

fn unindex(
    by_label: &mut HashMap<(String, String), BTreeSet<String>>,
    (key, value): (&String, &String),
    node: &str,
) {
    let label = (key.clone(), value.clone());
    if let Some(nodes) = by_label.get_mut(&label) {
        nodes.remove(node);
        if nodes.is_empty() {
            by_label.remove(&label);
        }
    }
}

#[cfg(test)]
mod tests;
