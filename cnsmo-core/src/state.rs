//! The resources in memory, and the rules by which requests change them.
//!
//! Nothing here does I/O. A request becomes a [`Plan`], the plan's transaction is made durable, and only then does
//! [`State::commit`] change the memory: what was not committed was never seen.

mod check;
mod deployment;
mod enrol;
mod history;
mod impact;
mod node;
mod overlay;
mod record;
mod request;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::SystemTime,
};

use cnsmo_proto::{
    model::{
        Addresses, Deployment, FirewallPolicy as Policy, Invalid, Labels, LoadBalancer, Name,
        Network, Peer, PublicKey,
    },
    pb::{
        balancer::{self, LoadBalancerSpec},
        deployment::{self as deployment_pb, DeploymentSpec},
        meta::Metadata,
        network::{self, NetworkSpec},
        policy::{FirewallPolicy, FirewallPolicySpec},
        resource::{Change, Kind, apply_request::Mode, change::Outcome, resource::Resource},
    },
};
use uuid::Uuid;

pub use deployment::{Avoided, DEPLOYMENTS_MAX, PLACEMENTS_MAX, Placed, Step, template};
pub use enrol::{
    Admission, Enrolment, IDENTITIES_MAX, TOKEN_TTL_MAX, TOKEN_USES_MAX, TOKENS_MAX, TokenGrant,
    TokenRecord, TokenSummary,
};
pub use history::{HISTORY_MAX, Note, Remembered};
pub use impact::PolicyChange;
pub use node::{Announcement, Membership, NODES_MAX, Node};
pub use overlay::MEMBERS_MAX;
pub use record::{FOLDERS, ROLLBACK_FOLDERS};
pub(crate) use record::{asked, seen};
pub use request::{Body, Wanted, parse_apply};

use crate::{
    error::Error,
    identity::Enrolled,
    store::{Entry, Op, Revision, Txn},
};

/// Firewall policies: as many as one agent takes, since all of them may select one node.
pub const POLICIES_MAX: usize = 4_096;
/// Networks: each node is compared with all of them.
pub const NETWORKS_MAX: usize = 64;
/// Load balancers: all of them may be in one network, and each of its members then balances for all.
pub const BALANCERS_MAX: usize = 1_024;
/// Encoded specs of all policies, networks and balancers together: half of the 64 MiB that an agent takes in one message,
/// since all of them may be for one node. The other half is for what is derived.
pub const SPEC_BYTES_MAX: usize = 30 << 20;

/// A resource that operators write as a whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored<S, M> {
    /// Name, labels, revision and times.
    pub metadata: Metadata,
    /// Valid, and in canonical form so that equal resources are equal messages. Kept encoded for the wire because the core
    /// hands it on.
    pub spec: Arc<S>,
    /// What the core itself looks at.
    pub model: M,
}

/// What the core looks at of a firewall policy.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyView {
    /// VMs it is for.
    pub target: Labels,
    /// All of it, if rules have peers to be resolved.
    pub unresolved: Option<Box<Policy>>,
}

impl PolicyView {
    /// Peers of its rules, in order.
    pub fn peers(&self) -> impl Iterator<Item = &Peer> {
        let rules = self.unresolved.iter().flat_map(|policy| &policy.rules);
        rules.filter_map(|rule| rule.peer.as_ref())
    }
}

impl From<Policy> for PolicyView {
    fn from(policy: Policy) -> Self {
        let has_peers = policy.rules.iter().any(|rule| rule.peer.is_some());
        let target = policy.target.clone();
        Self { target, unresolved: has_peers.then(|| Box::new(policy)) }
    }
}

/// A firewall policy.
pub type StoredPolicy = Stored<FirewallPolicySpec, PolicyView>;
/// A network.
pub type StoredNetwork = Stored<NetworkSpec, Network>;
/// A load balancer.
pub type StoredBalancer = Stored<LoadBalancerSpec, LoadBalancer>;
/// A deployment.
pub type StoredDeployment = Stored<DeploymentSpec, Deployment>;

/// One resource after a commit. The revision of a changed spec is set at the commit.
#[derive(Clone, Debug, PartialEq)]
enum Write {
    Policy(StoredPolicy),
    Network(StoredNetwork),
    Balancer(StoredBalancer),
    Deployment(Box<StoredDeployment>),
    Place(Box<Placed>),
    /// Of this deployment, the instance of this name.
    Unplace(String, String),
    /// Of this deployment, this VM.
    Avoid(String, String, Avoided),
    Forgive(String, String),
    Node(Box<Node>),
    Delete(Kind, String),
    /// Without its uses.
    Token(String, TokenRecord),
    TokenUse(String, [u8; 32]),
    DeleteToken(String),
    DeleteTokenUse(String, [u8; 32]),
    Identity(String, Box<Enrolled>),
    DeleteIdentity(String),
    Remember(Box<Remembered>),
    /// Of the change that made this revision, by its id.
    Forget(Revision, String),
}

/// What a request will change, all of it or nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// For the answer, in the order of the request.
    pub changes: Vec<Change>,
    writes: Vec<Write>,
}

impl Plan {
    /// Whether there is nothing to commit.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Identities that it changes, and what becomes of them; none: deleted.
    pub fn identities(&self) -> impl Iterator<Item = (&str, Option<&Enrolled>)> {
        self.writes.iter().filter_map(|write| match write {
            Write::Identity(identity, enrolled) => Some((identity.as_str(), Some(&**enrolled))),
            Write::DeleteIdentity(identity) => Some((identity.as_str(), None)),
            _ => None,
        })
    }

    /// The same for the store.
    pub fn txn(&self) -> Txn {
        Txn::of(self.writes.iter().map(record::op).collect())
    }
}

/// A resource that a commit has changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// It is gone: its last state.
    pub deleted: Option<Resource>,
}

/// Nodes of a network.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Roster {
    /// They have addresses.
    pub members: BTreeSet<String>,
    /// They come in when addresses become free.
    pub waiting: BTreeSet<String>,
}

/// All resources.
#[derive(Debug, Default)]
pub struct State {
    revision: Revision,
    policies: BTreeMap<String, StoredPolicy>,
    networks: BTreeMap<String, StoredNetwork>,
    balancers: BTreeMap<String, StoredBalancer>,
    deployments: BTreeMap<String, StoredDeployment>,
    /// By deployment and name.
    placements: BTreeMap<(String, String), Placed>,
    /// By deployment and VM.
    avoided: BTreeMap<(String, String), Avoided>,
    nodes: BTreeMap<String, Node>,
    tokens: BTreeMap<String, TokenRecord>,
    /// By `<kind>/<name>`.
    identities: BTreeMap<String, Enrolled>,
    /// By network.
    rosters: BTreeMap<String, Roster>,
    /// Nodes by the overlay addresses they have. Networks do not overlap.
    owners: HashMap<IpAddr, String>,
    /// Nodes by the tunnel keys they have announced.
    keys: HashMap<PublicKey, String>,
    /// By the revision that they made.
    history: BTreeMap<Revision, Remembered>,
}

impl State {
    /// From what the store holds. Refuses an entry that it cannot read, by its key: guessing would lose a policy.
    pub fn load(revision: Revision, entries: Vec<Entry>) -> Result<Self, Invalid> {
        let mut state = Self { revision, ..Self::default() };
        for entry in entries {
            let write = record::read(&entry).map_err(|e| e.at(&entry.key))?;
            state.put(write, entry.mod_revision);
        }
        Ok(state)
    }

    /// Of the last commit.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// By name.
    pub fn policies(&self) -> &BTreeMap<String, StoredPolicy> {
        &self.policies
    }

    /// By name.
    pub fn networks(&self) -> &BTreeMap<String, StoredNetwork> {
        &self.networks
    }

    /// By name.
    pub fn balancers(&self) -> &BTreeMap<String, StoredBalancer> {
        &self.balancers
    }

    /// By name.
    pub fn deployments(&self) -> &BTreeMap<String, StoredDeployment> {
        &self.deployments
    }

    /// Instances that are placed, by deployment and name.
    pub fn placements(&self) -> &BTreeMap<(String, String), Placed> {
        &self.placements
    }

    /// VMs on which instances kept failing, by deployment and VM.
    pub fn avoided(&self) -> &BTreeMap<(String, String), Avoided> {
        &self.avoided
    }

    /// By name.
    pub fn nodes(&self) -> &BTreeMap<String, Node> {
        &self.nodes
    }

    /// By `<kind>/<name>`.
    pub fn identities(&self) -> &BTreeMap<String, Enrolled> {
        &self.identities
    }

    /// Nodes of a network; none if it has no node.
    pub fn roster(&self, network: &str) -> Option<&Roster> {
        self.rosters.get(network)
    }

    /// A node and its addresses, if it is a member of a network.
    pub fn member(&self, node: &str) -> Option<(&Node, &str, Addresses)> {
        let node = self.nodes.get(node)?;
        let membership = node.membership.as_ref()?;
        Some((node, &membership.network, membership.addresses?))
    }

    /// What `wanted` would change.
    pub fn plan_apply(
        &self,
        wanted: Vec<Wanted>,
        mode: Mode,
        now: SystemTime,
    ) -> Result<Plan, Error> {
        let mut plan = Plan::default();
        for wanted in wanted {
            let (kind, name) = (wanted.kind(), wanted.name.to_string());
            let (outcome, write) = self.plan_one(wanted, mode, now)?;
            plan.changes.push(Change { kind: kind.into(), name, outcome: outcome.into() });
            plan.writes.extend(write);
        }
        self.finish(plan)
    }

    fn plan_one(
        &self,
        wanted: Wanted,
        mode: Mode,
        now: SystemTime,
    ) -> Result<(Outcome, Option<Write>), Error> {
        let kind = wanted.kind();
        let Wanted { name, labels, body } = wanted;
        let known = self.metadata(kind, name.as_str()).is_some();
        check_mode(kind, &name, mode, known)?;
        let metadata =
            || Metadata { labels: labels.as_map().clone(), ..created(name.as_str(), now) };
        Ok(match body {
            Body::Policy { spec, view } => {
                let new = Stored { metadata: metadata(), spec: Arc::new(spec), model: view };
                let (outcome, new) = replace(self.policies.get(name.as_str()), new);
                (outcome, new.map(Write::Policy))
            }
            Body::Network { spec, network } => {
                let new = Stored { metadata: metadata(), spec: Arc::new(spec), model: network };
                let (outcome, new) = replace(self.networks.get(name.as_str()), new);
                (outcome, new.map(Write::Network))
            }
            Body::Balancer { spec, balancer } => {
                let new = Stored { metadata: metadata(), spec: Arc::new(spec), model: balancer };
                let (outcome, new) = replace(self.balancers.get(name.as_str()), new);
                (outcome, new.map(Write::Balancer))
            }
            Body::Deployment { spec, deployment } => {
                let (spec, model) = (Arc::new(spec), *deployment);
                let new = Stored { metadata: metadata(), spec, model };
                let (outcome, new) = replace(self.deployments.get(name.as_str()), new);
                (outcome, new.map(|new| Write::Deployment(Box::new(new))))
            }
            Body::Node(spec) => self.plan_node(&name, labels, spec, now)?,
        })
    }

    /// Removal of a resource; [`Error::NotFound`] if there is none.
    pub fn plan_delete(&self, kind: Kind, name: &str) -> Result<Plan, Error> {
        if kind == Kind::Unspecified {
            return Err(Error::Invalid("kind: missing".into()));
        }
        if self.metadata(kind, name).is_none() {
            return Err(Error::NotFound(format!("{} {name}: does not exist", word(kind))));
        }
        let mut writes = vec![Write::Delete(kind, name.to_owned())];
        if kind == Kind::Node {
            writes.extend(self.plan_forgetting(name));
        }
        let outcome = Outcome::Deleted.into();
        let change = Change { kind: kind.into(), name: name.to_owned(), outcome };
        self.finish(Plan { changes: vec![change], writes })
    }

    /// Checks a plan against the rules between resources, and adds which nodes join and leave networks by it.
    fn finish(&self, mut plan: Plan) -> Result<Plan, Error> {
        let next = check::Next::new(self, &plan.writes);
        next.check(self, &plan.writes)?;
        let settled = overlay::settle(self, &next, &plan.writes);
        plan.writes.retain(|write| match write {
            Write::Node(node) => !settled.contains_key(&node.metadata.name),
            _ => true,
        });
        plan.writes.extend(settled.into_values().map(|node| Write::Node(Box::new(node))));
        Ok(plan)
    }

    /// Takes over what the store has committed as `revision`.
    pub fn commit(&mut self, plan: Plan, revision: Revision) -> Vec<Event> {
        self.revision = revision;
        plan.writes.into_iter().filter_map(|write| self.put(write, revision)).collect()
    }

    fn put(&mut self, write: Write, revision: Revision) -> Option<Event> {
        let changed = |kind, name: &str| Some(Event { kind, name: name.to_owned(), deleted: None });
        match write {
            Write::Policy(policy) => {
                changed(Kind::FirewallPolicy, insert(&mut self.policies, policy, revision))
            }
            Write::Network(network) => {
                changed(Kind::Network, insert(&mut self.networks, network, revision))
            }
            Write::Balancer(balancer) => {
                changed(Kind::LoadBalancer, insert(&mut self.balancers, balancer, revision))
            }
            Write::Deployment(deployment) => {
                changed(Kind::Deployment, insert(&mut self.deployments, *deployment, revision))
            }
            Write::Place(placed) => {
                let event = changed(Kind::Deployment, placed.deployment());
                self.placements.insert(placed.key(), *placed);
                event
            }
            Write::Unplace(deployment, name) => {
                let event = changed(Kind::Deployment, &deployment);
                self.placements.remove(&(deployment, name));
                event
            }
            Write::Avoid(deployment, node, avoided) => {
                let event = changed(Kind::Deployment, &deployment);
                self.avoided.insert((deployment, node), avoided);
                event
            }
            Write::Forgive(deployment, node) => {
                let event = changed(Kind::Deployment, &deployment);
                self.avoided.remove(&(deployment, node));
                event
            }
            Write::Node(mut node) => {
                date(&mut node.metadata, revision);
                let name = node.metadata.name.clone();
                self.forget_node(&name);
                self.index_node(&name, &node);
                self.nodes.insert(name.clone(), *node);
                changed(Kind::Node, &name)
            }
            Write::Delete(kind, name) => {
                let deleted = Some(self.remove(kind, &name)?);
                Some(Event { kind, name, deleted })
            }
            Write::Token(id, token) => {
                self.tokens.insert(id, token);
                None
            }
            Write::TokenUse(id, spki_sha256) => {
                self.tokens.get_mut(&id)?.used_by.insert(spki_sha256);
                None
            }
            Write::DeleteToken(id) => {
                self.tokens.remove(&id);
                None
            }
            Write::DeleteTokenUse(id, spki_sha256) => {
                self.tokens.get_mut(&id)?.used_by.remove(&spki_sha256);
                None
            }
            Write::Identity(identity, enrolled) => {
                self.identities.insert(identity, *enrolled);
                None
            }
            Write::DeleteIdentity(identity) => {
                self.identities.remove(&identity);
                None
            }
            Write::Remember(remembered) => {
                self.history.insert(revision, *remembered);
                None
            }
            Write::Forget(at, _) => {
                self.history.remove(&at);
                None
            }
        }
    }

    fn remove(&mut self, kind: Kind, name: &str) -> Option<Resource> {
        Some(match kind {
            Kind::FirewallPolicy => Resource::FirewallPolicy((&self.policies.remove(name)?).into()),
            Kind::Network => Resource::Network((&self.networks.remove(name)?).into()),
            Kind::LoadBalancer => Resource::LoadBalancer((&self.balancers.remove(name)?).into()),
            Kind::Deployment => Resource::Deployment((&self.deployments.remove(name)?).into()),
            Kind::Node => {
                self.forget_node(name);
                Resource::Node((&self.nodes.remove(name)?).into())
            }
            Kind::Unspecified => return None,
        })
    }

    fn index_node(&mut self, name: &str, node: &Node) {
        if let Some(key) = node.announcement.public_key {
            self.keys.insert(key, name.to_owned());
        }
        let Some(Membership { network, addresses }) = &node.membership else { return };
        let roster = self.rosters.entry(network.clone()).or_default();
        let Some(addresses) = addresses else {
            roster.waiting.insert(name.to_owned());
            return;
        };
        roster.members.insert(name.to_owned());
        self.owners.extend(addresses.iter().map(|address| (address, name.to_owned())));
    }

    /// Takes a node out of the indices, but nothing that an earlier write of the same plan has given to another one.
    fn forget_node(&mut self, name: &str) {
        let Some(node) = self.nodes.get(name) else { return };
        if let Some(key) = node.announcement.public_key
            && self.keys.get(&key).is_some_and(|owner| owner == name)
        {
            self.keys.remove(&key);
        }
        let Some(Membership { network, addresses }) = &node.membership else { return };
        for address in addresses.iter().flat_map(|addresses| addresses.iter()) {
            if self.owners.get(&address).is_some_and(|owner| owner == name) {
                self.owners.remove(&address);
            }
        }
        if let Some(roster) = self.rosters.get_mut(network) {
            roster.members.remove(name);
            roster.waiting.remove(name);
            if *roster == Roster::default() {
                self.rosters.remove(network);
            }
        }
    }

    /// Metadata of a resource; none if there is no such resource.
    pub fn metadata(&self, kind: Kind, name: &str) -> Option<&Metadata> {
        match kind {
            Kind::FirewallPolicy => self.policies.get(name).map(|policy| &policy.metadata),
            Kind::Network => self.networks.get(name).map(|network| &network.metadata),
            Kind::LoadBalancer => self.balancers.get(name).map(|balancer| &balancer.metadata),
            Kind::Deployment => self.deployments.get(name).map(|one| &one.metadata),
            Kind::Node => self.nodes.get(name).map(|node| &node.metadata),
            Kind::Unspecified => None,
        }
    }

    /// Names of all resources of a kind, in order.
    pub fn names(&self, kind: Kind) -> Vec<String> {
        match kind {
            Kind::FirewallPolicy => self.policies.keys().cloned().collect(),
            Kind::Network => self.networks.keys().cloned().collect(),
            Kind::LoadBalancer => self.balancers.keys().cloned().collect(),
            Kind::Deployment => self.deployments.keys().cloned().collect(),
            Kind::Node => self.nodes.keys().cloned().collect(),
            Kind::Unspecified => Vec::new(),
        }
    }
}

/// A kind as operators write it.
pub fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::FirewallPolicy => "FirewallPolicy",
        Kind::Network => "Network",
        Kind::LoadBalancer => "LoadBalancer",
        Kind::Deployment => "Deployment",
        Kind::Node => "Node",
        Kind::Unspecified => "resource",
    }
}

impl From<&StoredPolicy> for FirewallPolicy {
    fn from(policy: &StoredPolicy) -> Self {
        let spec = Some(FirewallPolicySpec::clone(&policy.spec));
        Self { metadata: Some(policy.metadata.clone()), spec, status: None }
    }
}

impl From<&StoredNetwork> for network::Network {
    fn from(network: &StoredNetwork) -> Self {
        let spec = Some(NetworkSpec::clone(&network.spec));
        Self { metadata: Some(network.metadata.clone()), spec, status: None }
    }
}

impl From<&StoredBalancer> for balancer::LoadBalancer {
    fn from(balancer: &StoredBalancer) -> Self {
        let spec = Some(LoadBalancerSpec::clone(&balancer.spec));
        Self { metadata: Some(balancer.metadata.clone()), spec, status: None }
    }
}

impl From<&StoredDeployment> for deployment_pb::Deployment {
    fn from(deployment: &StoredDeployment) -> Self {
        let spec = Some(DeploymentSpec::clone(&deployment.spec));
        Self { metadata: Some(deployment.metadata.clone()), spec, status: None }
    }
}

/// What a write of `new` does to `old`; nothing to write if they are equal.
fn replace<S: PartialEq, M>(
    old: Option<&Stored<S, M>>,
    mut new: Stored<S, M>,
) -> (Outcome, Option<Stored<S, M>>) {
    let Some(old) = old else { return (Outcome::Created, Some(new)) };
    let same_spec = old.spec == new.spec;
    if same_spec && old.metadata.labels == new.metadata.labels {
        return (Outcome::Unchanged, None);
    }
    new.metadata = Metadata {
        labels: new.metadata.labels,
        update_time: new.metadata.update_time,
        ..old.metadata.clone()
    };
    if same_spec {
        new.spec = old.spec.clone();
    } else {
        new.metadata.generation += 1;
        new.metadata.revision = 0;
    }
    (Outcome::Updated, Some(new))
}

fn insert<S, M>(
    all: &mut BTreeMap<String, Stored<S, M>>,
    mut one: Stored<S, M>,
    revision: Revision,
) -> &str {
    date(&mut one.metadata, revision);
    let name = one.metadata.name.clone();
    &all.entry(name).insert_entry(one).into_mut().metadata.name
}

/// A changed spec gets the revision of the commit.
fn date(metadata: &mut Metadata, revision: Revision) {
    if metadata.revision == 0 {
        metadata.revision = revision;
    }
}

fn check_mode(kind: Kind, name: &Name, mode: Mode, exists: bool) -> Result<(), Error> {
    let kind = word(kind);
    match mode {
        Mode::Create if exists => Err(Error::Exists(format!("{kind} {name}: exists already"))),
        Mode::Update if !exists => Err(Error::NotFound(format!("{kind} {name}: does not exist"))),
        Mode::Unspecified | Mode::Create | Mode::Update => Ok(()),
    }
}

fn created(name: &str, now: SystemTime) -> Metadata {
    Metadata {
        name: name.to_owned(),
        uid: Uuid::now_v7().to_string(),
        revision: 0,
        generation: 1,
        labels: BTreeMap::new(),
        create_time: Some(now.into()),
        update_time: Some(now.into()),
    }
}

#[cfg(test)]
mod tests;
