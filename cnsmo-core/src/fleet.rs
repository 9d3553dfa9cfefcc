//! What each agent shall run, what it says it runs, and the update that closes the gap.
//!
//! No I/O beyond handing messages to bounded channels: one task calls in, in order. An inverted index from labels to nodes
//! and the set of nodes per policy keep the work of an edit to the nodes that it touches. What all members of a network are
//! sent is one set, of which each of them holds a cheap copy.

mod agent;
mod behind;
mod derive;
mod peers;
mod set;
mod status;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use cnsmo_proto::{
    digest::Digest,
    model::{Backends, Labels},
    pb::{
        agent::{
            Announcement, Command, Confirm, ConnectResponse, GoAway, Hello, Resource, Update,
            Welcome, connect_request, connect_response, resource, update::Kind as UpdateKind,
        },
        balancer::{Backend, LoadBalancerSpec},
        deployment::Instance,
        network::{Member, NetworkSpec},
        policy::FirewallPolicySpec,
        resource::Kind,
    },
};
use prost::{
    Message as _,
    bytes::{BufMut, Bytes},
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len},
};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use self::{
    agent::{Agent, Session},
    peers::Resolved,
    set::{Key, Set},
};
use crate::{
    error::Error,
    orchestrator::{Host, Observed, World},
    state::{Event, Node, State, StoredBalancer},
    store::Revision,
};

/// The one type of set that agents are sent.
pub const SET_TYPE: &str = "cnsmo.agent.v1.Resource";
/// Version of the stream's protocol.
pub const PROTOCOL_VERSION: u32 = 1;
/// Messages that wait for one agent: the welcome, the one update without an answer, a confirmation, bookmarks, commands, the
/// end. An agent that does not take them is cut.
pub const DOWN_MAX: usize = 8;
/// Agents that a core which stops asks to come back in one second: fewer than the handshakes that the smallest machine does,
/// beside its other work.
const RETURNS_PER_SECOND: u32 = 1_000;
/// A gap between two ticks longer than this means that the core itself stood still.
const FREEZE_MIN: Duration = Duration::from_secs(2);

// How names of resources begin, as agents know them.
const POLICY: &str = "firewall-policy/";
const NETWORK: &str = "network/";
const MEMBER: &str = "member/";
const BALANCER: &str = "load-balancer/";
const BACKEND: &str = "backend/";
const INSTANCE: &str = "instance/";

/// Everything that agents are sent, as it is now.
type Catalog = HashMap<Key, Entry>;

/// How often agents call, and how long one may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// Longest silence.
    pub lease: Duration,
    /// An agent that does not hear from the core for so long after a change undoes it; zero: it does not.
    pub confirm: Duration,
}

impl Default for Timing {
    /// Death is noticed within 6 s, after three heartbeats were lost.
    fn default() -> Self {
        let (heartbeat, lease) = (Duration::from_secs(2), Duration::from_secs(6));
        Self { heartbeat, lease, confirm: Duration::from_secs(30) }
    }
}

/// A message on its way to an agent. Small: a channel has room for 32 of them from the start, for each agent.
#[derive(Debug)]
pub enum Down {
    /// The first.
    Welcome(Box<Welcome>),
    /// One step of the policies.
    Update(Box<Push>),
    /// To one of its services.
    Command(Box<Command>),
    /// What it said to run has reached us.
    Confirm(Revision),
    /// The last: come back after this time.
    GoAway(Duration),
}

/// An update. Its resources were encoded once, for all agents that are sent them.
#[derive(Debug)]
pub struct Push {
    nonce: u64,
    kind: UpdateKind,
    base_revision: Revision,
    revision: Revision,
    upserts: Vec<(Key, Revision, Bytes)>,
    removals: Vec<Key>,
    digest: Digest,
}

/// What a name stands for. Shared by all nodes that are sent it.
#[derive(Clone, Debug, PartialEq)]
enum Spec {
    Policy(Arc<FirewallPolicySpec>),
    Network(Arc<NetworkSpec>),
    Member(Arc<Member>),
    Balancer(Arc<LoadBalancerSpec>),
    Backend(Arc<Backend>),
    Instance(Arc<Instance>),
}

impl Spec {
    fn encode_to_vec(&self) -> Vec<u8> {
        match self {
            Self::Policy(spec) => spec.encode_to_vec(),
            Self::Network(spec) => spec.encode_to_vec(),
            Self::Member(spec) => spec.encode_to_vec(),
            Self::Balancer(spec) => spec.encode_to_vec(),
            Self::Backend(spec) => spec.encode_to_vec(),
            Self::Instance(spec) => spec.encode_to_vec(),
        }
    }
}

impl From<Spec> for resource::Spec {
    fn from(spec: Spec) -> Self {
        match spec {
            Spec::Policy(spec) => Self::FirewallPolicy(Arc::unwrap_or_clone(spec)),
            Spec::Network(spec) => Self::Network(Arc::unwrap_or_clone(spec)),
            Spec::Member(spec) => Self::Member(Arc::unwrap_or_clone(spec)),
            Spec::Balancer(spec) => Self::LoadBalancer(Arc::unwrap_or_clone(spec)),
            Spec::Backend(spec) => Self::Backend(Arc::unwrap_or_clone(spec)),
            Spec::Instance(spec) => Self::Instance(Box::new(Arc::unwrap_or_clone(spec))),
        }
    }
}

/// The names that belong to one resource of an operator.
#[derive(Debug)]
struct Topic {
    name: String,
    /// How the names of what is derived from it begin.
    parts: Option<String>,
}

impl Topic {
    fn policy(name: &str) -> Self {
        Self { name: format!("{POLICY}{name}"), parts: None }
    }

    fn network(name: &str) -> Self {
        Self { name: format!("{NETWORK}{name}"), parts: Some(format!("{MEMBER}{name}/")) }
    }

    fn balancer(name: &str) -> Self {
        Self { name: format!("{BALANCER}{name}"), parts: Some(format!("{BACKEND}{name}/")) }
    }

    fn has(&self, key: &str) -> bool {
        key == self.name || self.parts.as_ref().is_some_and(|parts| key.starts_with(parts))
    }
}

/// What a name stands for, and how it goes over the wire.
#[derive(Debug)]
struct Entry {
    spec: Spec,
    /// The field `spec` of a [`Resource`].
    wire: Bytes,
}

impl From<Spec> for Entry {
    fn from(spec: Spec) -> Self {
        // Protobuf leaves out fields that have their default: the other two are added for each agent.
        let resource = Resource { spec: Some(spec.clone().into()), ..Resource::default() };
        Self { spec, wire: resource.encode_to_vec().into() }
    }
}

// Fields of messages in agent.proto.
const UPDATE_OF_RESPONSE: u32 = 2;
const UPSERTS_OF_UPDATE: u32 = 6;

impl Down {
    /// Writes it as a [`ConnectResponse`].
    pub fn encode(self, buffer: &mut impl BufMut) {
        match self {
            Self::Welcome(welcome) => {
                let message = Some(connect_response::Message::Welcome(*welcome));
                ConnectResponse { message }.encode_raw(buffer);
            }
            Self::Update(push) => push.encode(buffer),
            Self::Command(command) => {
                let message = Some(connect_response::Message::Command(*command));
                ConnectResponse { message }.encode_raw(buffer);
            }
            Self::Confirm(revision) => {
                let message = Some(connect_response::Message::Confirm(Confirm { revision }));
                ConnectResponse { message }.encode_raw(buffer);
            }
            Self::GoAway(delay) => {
                let delay = prost_types::Duration::try_from(delay).ok();
                let message = Some(connect_response::Message::GoAway(GoAway { delay }));
                ConnectResponse { message }.encode_raw(buffer);
            }
        }
    }
}

impl Push {
    /// The order of fields is free, so those that were encoded before come last.
    fn encode(self, buffer: &mut impl BufMut) {
        let update = Update {
            nonce: self.nonce,
            r#type: SET_TYPE.into(),
            kind: self.kind.into(),
            base_revision: self.base_revision,
            revision: self.revision,
            upserts: Vec::new(),
            removals: self.removals.iter().map(ToString::to_string).collect(),
            digest: self.digest.to_vec(),
        };
        let upserts: Vec<_> = self
            .upserts
            .into_iter()
            .map(|(name, version, wire)| {
                (Resource { name: name.to_string(), version, spec: None }, wire)
            })
            .collect();
        let length_of = |(head, wire): &(Resource, Bytes)| head.encoded_len() + wire.len();
        let with_prefix =
            |length: usize| key_len(UPSERTS_OF_UPDATE) + encoded_len_varint(length as u64) + length;
        let upserts_length: usize = upserts.iter().map(|one| with_prefix(length_of(one))).sum();
        encode_key(UPDATE_OF_RESPONSE, WireType::LengthDelimited, buffer);
        encode_varint((update.encoded_len() + upserts_length) as u64, buffer);
        update.encode_raw(buffer);
        for upsert in &upserts {
            encode_key(UPSERTS_OF_UPDATE, WireType::LengthDelimited, buffer);
            encode_varint(length_of(upsert) as u64, buffer);
            upsert.0.encode_raw(buffer);
            buffer.put_slice(&upsert.1);
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
    agents: BTreeMap<String, Agent>,
    catalog: Catalog,
    /// Nodes that each policy selects.
    selected: BTreeMap<String, BTreeSet<String>>,
    /// What is sent of each policy that has rules with peers.
    resolved: BTreeMap<String, Resolved>,
    /// Policies whose peers may stand for something else now.
    unsettled: BTreeSet<String>,
    /// What each balancer has in the set of its network.
    served: BTreeMap<String, derive::Served>,
    /// VM of each instance of each deployment, by deployment and the instance's key.
    placed: BTreeMap<String, BTreeMap<String, String>>,
    /// Deployments with instances that shall end once no balancer gives them new flows, and since when.
    leaving: BTreeMap<String, Instant>,
    /// What the catalogue knows of services.
    observed: Observed,
    /// Nothing was observed yet: backends by service are not known, and are not to be taken for gone.
    is_blind: bool,
    /// What all members of each network are sent.
    shared: BTreeMap<String, Set>,
    /// Networks whose members have not been told yet.
    stale: BTreeSet<String>,
    /// Nodes that have each label.
    by_label: HashMap<(String, String), BTreeSet<String>>,
    /// Nodes that may need an update.
    outbox: BTreeSet<String>,
    /// Resources whose status is another than when [`Self::take_changed`] was called last.
    changed: BTreeSet<(Kind, String)>,
    /// When the condition of each resource became what it is.
    conditions: BTreeMap<(Kind, String, &'static str), status::Seen>,
    timing: Timing,
}

impl Fleet {
    /// All nodes of the state, none of them connected, each with a full lease.
    pub fn new(state: &State, timing: Timing, now: Instant) -> Self {
        let mut fleet = Self {
            agents: BTreeMap::new(),
            catalog: Catalog::new(),
            selected: BTreeMap::new(),
            resolved: BTreeMap::new(),
            unsettled: BTreeSet::new(),
            served: BTreeMap::new(),
            placed: BTreeMap::new(),
            leaving: BTreeMap::new(),
            observed: Observed::default(),
            is_blind: true,
            shared: BTreeMap::new(),
            stale: BTreeSet::new(),
            by_label: HashMap::new(),
            outbox: BTreeSet::new(),
            changed: BTreeSet::new(),
            conditions: BTreeMap::new(),
            timing,
        };
        let event = |kind, name| Event { kind, name, deleted: None };
        // Nodes late: policies and balancers that come after them would look for each of them. Instances are sent to them.
        let kinds = [Kind::FirewallPolicy, Kind::Network, Kind::LoadBalancer, Kind::Node];
        let all = kinds
            .into_iter()
            .flat_map(|kind| state.names(kind).into_iter().map(move |name| event(kind, name)));
        let deployments: BTreeSet<_> =
            state.placements().keys().map(|(deployment, _)| deployment.clone()).collect();
        let placed = deployments.into_iter().map(|name| event(Kind::Deployment, name));
        fleet.on_commit(&all.chain(placed).collect::<Vec<_>>(), state, 0, now);
        fleet
    }

    /// Takes over what a commit has changed. `before` is the revision before that commit.
    pub fn on_commit(&mut self, events: &[Event], state: &State, before: Revision, now: Instant) {
        for Event { kind, name, deleted } in events {
            self.changed.insert((*kind, name.clone()));
            match kind {
                Kind::FirewallPolicy => self.policy_edited(name, state, before),
                Kind::Network => self.network_changed(name, state),
                Kind::LoadBalancer => self.balancer_changed(name, state),
                Kind::Deployment => self.deployment_changed(name, state, before, now),
                Kind::Node if deleted.is_none() => self.node_changed(name, state, before, now),
                Kind::Node => self.node_deleted(name),
                Kind::Unspecified => {}
            }
            if deleted.is_some() {
                let conditions = std::mem::take(&mut self.conditions);
                let is_other = |of: &(Kind, String, &str)| (of.0, &of.1) != (*kind, name);
                self.conditions = conditions.into_iter().filter(|(of, _)| is_other(of)).collect();
                self.changed.remove(&(*kind, name.clone()));
            }
        }
        if events.iter().any(|event| event.kind == Kind::Network) {
            self.networks_changed(state);
            self.unsettled.extend(self.resolved.keys().cloned());
        }
        self.settle_policies(state, before);
        self.tell_members(state, before);
    }

    fn policy_changed(&mut self, name: &str, state: &State, before: Revision) {
        let key = format!("{POLICY}{name}");
        let mut nodes = self.selected.remove(name).unwrap_or_default();
        let policy = state.policies().get(name);
        let wanted: BTreeSet<String> =
            policy.map(|policy| self.matching(state, &policy.model.target)).unwrap_or_default();
        nodes.extend(wanted.iter().cloned());
        let version = policy.map(|policy| self.publish_policy(policy, state));
        if policy.is_some() {
            self.selected.insert(name.to_owned(), wanted.clone());
        } else {
            self.catalog.remove(&*key);
            self.resolved.remove(name);
        }
        for node in nodes {
            let want = version.filter(|_| wanted.contains(&node));
            let Some(agent) = self.agents.get_mut(&node) else { continue };
            if agent.want(&key, want, before) {
                if want.is_none() {
                    agent.counters.remove(name);
                }
                self.changed.insert((Kind::Node, node.clone()));
                self.outbox.insert(node);
            }
        }
    }

    /// Nodes that `target` selects.
    fn matching(&self, state: &State, target: &Labels) -> BTreeSet<String> {
        self.selected(state, target, "").map(|(name, _)| name.clone()).collect()
    }

    /// Nodes that `target` selects, at or after `from` by name, found from its rarest label.
    fn selected<'a>(
        &'a self,
        state: &'a State,
        target: &'a Labels,
        from: &str,
    ) -> Box<dyn Iterator<Item = (&'a String, &'a Node)> + 'a> {
        let from = (Bound::Included(from), Bound::Unbounded);
        let postings = target
            .as_map()
            .iter()
            .map(|(key, value)| self.by_label.get(&(key.clone(), value.clone())));
        match postings.min_by_key(|nodes| nodes.map_or(0, BTreeSet::len)) {
            None => Box::new(state.nodes().range::<str, _>(from)),
            Some(None) => Box::new(std::iter::empty()),
            Some(Some(nodes)) => {
                let known = nodes.range::<str, _>(from);
                let known = known.filter_map(|name| state.nodes().get_key_value(name));
                Box::new(known.filter(|(_, node)| target.selects(&node.labels)))
            }
        }
    }

    fn node_changed(&mut self, name: &str, state: &State, before: Revision, now: Instant) {
        let Some(node) = state.nodes().get(name) else { return };
        let agent = self.agents.entry(name.to_owned()).or_insert_with(|| Agent::new(now));
        let old = std::mem::replace(&mut agent.labels, node.labels.clone());
        for label in old.as_map() {
            unindex(&mut self.by_label, label, name);
        }
        for (key, value) in node.labels.as_map() {
            self.by_label.entry((key.clone(), value.clone())).or_default().insert(name.to_owned());
        }
        self.unsettle_peers(name, &[&old, &node.labels]);
        let Some(agent) = self.agents.get_mut(name) else { return };
        for (policy_name, policy) in state.policies() {
            let version = match self.resolved.get(policy_name) {
                // All that it selects are told, once all of the commit is known.
                _ if self.unsettled.contains(policy_name) => continue,
                Some(resolved) => resolved.version,
                None => policy.metadata.revision,
            };
            let want = policy.model.target.selects(&node.labels).then_some(version);
            if agent.want(&format!("{POLICY}{policy_name}"), want, before) {
                let nodes = self.selected.entry(policy_name.clone()).or_default();
                if want.is_some() {
                    nodes.insert(name.to_owned());
                } else {
                    nodes.remove(name);
                    agent.counters.remove(policy_name);
                }
                self.changed.insert((Kind::FirewallPolicy, policy_name.clone()));
                self.outbox.insert(name.to_owned());
            }
        }
        self.place_changed(name, state, before);
    }

    fn node_deleted(&mut self, name: &str) {
        self.withdraw_node(name);
        let Some(mut agent) = self.agents.remove(name) else { return };
        self.unsettle_peers(name, &[&agent.labels]);
        for label in agent.labels.as_map() {
            unindex(&mut self.by_label, label, name);
        }
        agent.end(Status::permission_denied(format!("Node {name}: was deleted")));
        for policy in agent.policies() {
            if let Some(nodes) = self.selected.get_mut(policy) {
                nodes.remove(name);
            }
            self.changed.insert((Kind::FirewallPolicy, policy.to_owned()));
        }
        self.outbox.remove(name);
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
        // One count for the process: what comes late from a session of an earlier leadership is of no session now.
        static SESSIONS: AtomicU64 = AtomicU64::new(1);
        let id = SESSIONS.fetch_add(1, Ordering::Relaxed);
        let Some(agent) = self.agents.get_mut(name) else { return id };
        agent.end(Status::aborted("another stream of this agent has connected"));
        let wire = |d: Duration| prost_types::Duration::try_from(d).ok();
        let welcome = Welcome {
            store_epoch: epoch,
            heartbeat_interval: wire(self.timing.heartbeat),
            lease_ttl: wire(self.timing.lease),
            protocol_version: PROTOCOL_VERSION,
            confirm_window: wire(self.timing.confirm),
        };
        agent.begin(Session::new(id, down), welcome, hello.have.get(SET_TYPE), now);
        self.touched(name);
        id
    }

    /// Counts a change that an agent causes in the record of its node.
    ///
    /// # Errors
    /// It causes too many.
    pub fn admit_change(&mut self, name: &str, now: Instant) -> Result<(), Error> {
        self.agents.get_mut(name).map_or(Ok(()), |agent| agent.admit_change(now))
    }

    /// Takes a message of an agent. A message of an older session is dropped; an error ends the session. An announcement is
    /// given back: it has to be committed first.
    pub fn on_message(
        &mut self,
        name: &str,
        session: u64,
        received: Instant,
        message: connect_request::Message,
    ) -> Option<Announcement> {
        let agent = self.agents.get_mut(name).filter(|agent| agent.is_session(session))?;
        let was_late = agent.heard(received);
        let mut announcement = None;
        let result = match message {
            connect_request::Message::Hello(_) => {
                Err(Status::invalid_argument("hello: comes once, as the first message"))
            }
            connect_request::Message::Ack(ack) => agent.on_ack(ack).map(|()| true),
            connect_request::Message::Heartbeat(heartbeat) => {
                let state = heartbeat.applied.get(SET_TYPE);
                let changed = agent.on_state(state, received);
                if !self.timing.confirm.is_zero() {
                    agent.confirm(state);
                }
                changed
            }
            connect_request::Message::Status(report) => Ok(agent.on_report(*report)),
            connect_request::Message::Announcement(new) => {
                announcement = Some(new);
                Ok(false)
            }
            // The task of the stream has them.
            connect_request::Message::Instances(_) | connect_request::Message::Result(_) => {
                Ok(false)
            }
        };
        let changed = match result {
            Ok(changed) => changed,
            Err(status) => {
                agent.end(status);
                true
            }
        };
        if changed || was_late {
            self.touched(name);
        }
        announcement
    }

    /// Ends a session, whose stream may be gone already. The lease goes on.
    pub fn end(&mut self, name: &str, session: u64, status: Status) {
        if let Some(agent) = self.agents.get_mut(name).filter(|agent| agent.is_session(session)) {
            agent.end(status);
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
        for (name, agent) in &mut self.agents {
            if agent.expire(now, frozen, self.timing.lease) {
                late.push(name.clone());
            }
        }
        for name in late {
            self.touched(&name);
        }
    }

    /// Sends what has become due. What depends on services waits for the first look at them: VMs that go on with what they
    /// have are better off. For rules about a service that is new to us, the VMs wait that have such rules.
    pub fn flush(&mut self, state: &State) {
        let by_service =
            |balancer: &StoredBalancer| matches!(balancer.model.backends, Backends::Service(_));
        if self.is_blind && state.balancers().values().any(by_service) {
            return;
        }
        if self.outbox.is_empty() {
            return;
        }
        let unknown: BTreeSet<&str> = self
            .resolved
            .iter()
            .filter(|(_, resolved)| !resolved.is_known)
            .map(|(name, _)| name.as_str())
            .collect();
        for name in std::mem::take(&mut self.outbox) {
            let Some(agent) = self.agents.get_mut(&name) else { continue };
            if agent.policies().any(|policy| unknown.contains(policy)) {
                self.outbox.insert(name);
            } else if agent.push(&self.catalog, state.revision()) {
                self.changed.insert((Kind::Node, name));
            }
        }
    }

    /// What has another status since the last call.
    pub fn take_changed(&mut self) -> BTreeSet<(Kind, String)> {
        std::mem::take(&mut self.changed)
    }

    /// Whether [`Self::take_changed`] has something to give.
    pub fn has_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Ends all sessions; tells each agent another time to come back at.
    pub fn shut_down(&mut self) {
        let connected = self.agents.values_mut().filter(|agent| agent.is_connected());
        for (place, agent) in (0..).zip(connected) {
            agent.dismiss(Duration::from_secs(1) * place / RETURNS_PER_SECOND);
        }
    }

    /// What the orchestrator looks at.
    pub fn world<'a>(&'a self, state: &'a State, now_ms: u64) -> World<'a> {
        let host = |(name, node): (&'a String, &'a Node)| {
            let agent = self.agents.get(name);
            let host = Host {
                labels: &node.labels,
                is_seen: agent.is_some_and(|agent| agent.is_connected() && !agent.late),
                is_draining: node.draining,
            };
            (name.as_str(), host)
        };
        World {
            deployments: state.deployments(),
            placements: state.placements(),
            avoided: state.avoided(),
            hosts: state.nodes().iter().map(host).collect(),
            observed: &self.observed,
            now_ms,
        }
    }

    /// Takes over what the catalogue knows of the services that [`State::observed_services`] names.
    pub fn observe(&mut self, observed: Observed, state: &State) {
        let differ = observed.differences(&self.observed);
        let differ: BTreeSet<String> = differ.into_iter().map(ToOwned::to_owned).collect();
        (self.observed, self.is_blind) = (observed, false);
        let concerned = state.deployments().iter().filter(|(name, one)| {
            let needs = one.model.needs.iter().any(|need| differ.contains(need.service.as_str()));
            needs || differ.contains(*name)
        });
        self.changed.extend(concerned.map(|(name, _)| (Kind::Deployment, name.clone())));
        for service in &differ {
            self.service_changed(service, state);
        }
        self.unsettle_services(&differ);
        self.settle_policies(state, state.revision());
        self.tell_members(state, state.revision());
    }

    fn touched(&mut self, name: &str) {
        if let Some(agent) = self.agents.get(name) {
            let policies = agent.policies().map(|policy| (Kind::FirewallPolicy, policy.to_owned()));
            self.changed.extend(policies);
            if let Some(network) = &agent.network {
                self.changed.insert((Kind::Network, network.clone()));
                let balancers = self.served.iter().filter(|(_, served)| served.network == *network);
                let balancers = balancers.map(|(name, _)| (Kind::LoadBalancer, name.clone()));
                self.changed.extend(balancers);
            }
        }
        self.changed.insert((Kind::Node, name.to_owned()));
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
