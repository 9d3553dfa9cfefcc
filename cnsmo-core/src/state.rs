//! The resources in memory, and the rules by which requests change them.
//!
//! Nothing here does I/O. A request becomes a [`Plan`], the plan's transaction is made durable, and only then does
//! [`State::commit`] change the memory: what was not committed was never seen.

mod record;
mod request;

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use cnsmo_proto::{
    model::{Invalid, Labels, Name},
    pb::{
        meta::Metadata,
        policy::{FirewallPolicy, FirewallPolicySpec},
        resource::{Change, Kind, apply_request::Mode, change::Outcome},
    },
};
use prost::Message as _;
use uuid::Uuid;

pub use request::{Wanted, parse_apply};

use crate::{
    error::Error,
    store::{Entry, Op, Revision, Txn},
};

/// Firewall policies: as many as one agent takes, since all of them may select one node.
pub const POLICIES_MAX: usize = 4_096;
/// Encoded specs of all policies together: a snapshot of every policy must fit into one message of 32 MiB.
pub const POLICY_BYTES_MAX: usize = 30 << 20;
/// Nodes: what one core is measured with, twice.
pub const NODES_MAX: usize = 20_000;
/// Join tokens that have not expired.
pub const TOKENS_MAX: usize = 10_000;
/// Nodes that one join token may admit.
pub const TOKEN_USES_MAX: u32 = 10_000;
/// Longest life of a join token.
pub const TOKEN_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3_600);

/// A firewall policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Name, labels, revision and times.
    pub metadata: Metadata,
    /// VMs it is for.
    pub target: Labels,
    /// Valid, and in canonical form so that equal policies are equal messages. Kept encoded for the wire because the
    /// core hands policies on and looks into nothing but the target.
    pub spec: Arc<FirewallPolicySpec>,
}

/// What is durable about a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Name, labels, revision and times.
    pub metadata: Metadata,
    /// The same labels as in the metadata.
    pub labels: Labels,
    /// From the join token: these win over the agent's.
    pub token_labels: Labels,
    /// An operator has written the labels: the agent's count no more.
    pub labels_by_operator: bool,
    /// SHA-256 of the public key info in its certificate.
    pub spki_sha256: [u8; 32],
    /// Its agent has connected at least once.
    pub connected: bool,
}

/// What is kept of a join token. Its secret is not.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRecord {
    /// SHA-256 of the secret.
    pub secret_sha256: [u8; 32],
    /// End of its life.
    pub expire_time: SystemTime,
    /// Nodes that it may admit.
    pub uses_max: u32,
    /// SHA-256 of the public key info of each node that it has admitted.
    pub used_by: Vec<[u8; 32]>,
    /// Labels for each node that joins with it.
    pub labels: Labels,
}

/// A request to join.
#[derive(Clone, Debug)]
pub struct Enrolment {
    /// Public part of the token.
    pub token_id: String,
    /// SHA-256 of the presented secret.
    pub secret_sha256: [u8; 32],
    /// Name of the node.
    pub node: Name,
    /// The agent's own labels.
    pub labels: Labels,
    /// SHA-256 of the public key info in the signing request.
    pub spki_sha256: [u8; 32],
}

/// One resource after a commit. The revision of a changed spec is set at the commit.
#[derive(Clone, Debug, PartialEq)]
enum Write {
    Policy(Policy),
    DeletePolicy(String),
    Node(Node),
    DeleteNode(String),
    Token(String, TokenRecord),
    DeleteToken(String),
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

    /// The same for the store.
    pub fn txn(&self) -> Txn {
        Txn { compares: Vec::new(), ops: self.writes.iter().map(record::op).collect() }
    }
}

/// What a commit has changed.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A policy is new or changed.
    Policy(String),
    /// A policy is gone; its last state.
    PolicyDeleted(Policy),
    /// A node is new or its record changed.
    Node(String),
    /// A node is gone; its last state.
    NodeDeleted(Node),
}

/// All resources.
#[derive(Debug, Default)]
pub struct State {
    revision: Revision,
    policies: BTreeMap<String, Policy>,
    nodes: BTreeMap<String, Node>,
    tokens: BTreeMap<String, TokenRecord>,
}

impl State {
    /// From what the store holds. Refuses an entry that it cannot read, by its key: guessing would lose a policy.
    pub fn load(revision: Revision, entries: Vec<Entry>) -> Result<Self, Invalid> {
        let mut state = Self { revision, ..Self::default() };
        for entry in entries {
            let write = record::read(&entry).map_err(|e| e.at(&entry.key))?;
            state.put(write, entry.mod_rev);
        }
        Ok(state)
    }

    /// Of the last commit.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// By name.
    pub fn policies(&self) -> &BTreeMap<String, Policy> {
        &self.policies
    }

    /// By name.
    pub fn nodes(&self) -> &BTreeMap<String, Node> {
        &self.nodes
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
            let (kind, name) = (wanted.kind(), wanted.name().to_string());
            let (outcome, write) = match wanted {
                Wanted::Policy { name, labels, target, spec } => {
                    self.plan_policy(&name, &labels, target, spec, mode, now)?
                }
                Wanted::Node { name, labels } => self.plan_labels(&name, labels, mode, now)?,
            };
            plan.changes.push(Change { kind: kind.into(), name, outcome: outcome.into() });
            plan.writes.extend(write);
        }
        self.check_policy_limits(&plan)?;
        Ok(plan)
    }

    fn plan_policy(
        &self,
        name: &Name,
        labels: &Labels,
        target: Labels,
        spec: FirewallPolicySpec,
        mode: Mode,
        now: SystemTime,
    ) -> Result<(Outcome, Option<Write>), Error> {
        let old = self.policies.get(name.as_str());
        check_mode("FirewallPolicy", name, mode, old.is_some())?;
        let labels = labels.as_map();
        let (outcome, metadata, spec) = match old {
            None => {
                let metadata = Metadata { labels: labels.clone(), ..created(name.as_str(), now) };
                (Outcome::Created, metadata, Arc::new(spec))
            }
            Some(old) if *old.spec == spec && old.metadata.labels == *labels => {
                return Ok((Outcome::Unchanged, None));
            }
            Some(old) => {
                let same_spec = *old.spec == spec;
                let mut metadata = old.metadata.clone();
                metadata.labels.clone_from(labels);
                metadata.update_time = Some(now.into());
                if !same_spec {
                    metadata.generation += 1;
                    metadata.revision = 0;
                }
                let spec = if same_spec { old.spec.clone() } else { Arc::new(spec) };
                (Outcome::Updated, metadata, spec)
            }
        };
        Ok((outcome, Some(Write::Policy(Policy { metadata, target, spec }))))
    }

    fn plan_labels(
        &self,
        name: &Name,
        labels: Labels,
        mode: Mode,
        now: SystemTime,
    ) -> Result<(Outcome, Option<Write>), Error> {
        let Some(old) = self.nodes.get(name.as_str()) else {
            return Err(Error::NotFound(format!(
                "Node {name}: has not joined: only the labels of a node that has joined can be written"
            )));
        };
        check_mode("Node", name, mode, true)?;
        if old.labels == labels {
            return Ok((Outcome::Unchanged, None));
        }
        let node = Node { labels_by_operator: true, ..relabelled(old, labels, now) };
        Ok((Outcome::Updated, Some(Write::Node(node))))
    }

    fn check_policy_limits(&self, plan: &Plan) -> Result<(), Error> {
        let written: BTreeMap<&str, &Policy> = plan
            .writes
            .iter()
            .filter_map(|write| match write {
                Write::Policy(policy) => Some((policy.metadata.name.as_str(), policy)),
                _ => None,
            })
            .collect();
        if written.is_empty() {
            return Ok(());
        }
        let kept = self.policies.iter().filter(|(name, _)| !written.contains_key(name.as_str()));
        let all = kept.map(|(_, policy)| policy).chain(written.values().copied());
        let (count, bytes) = all.fold((0_usize, 0_usize), |(count, bytes), policy| {
            (count + 1, bytes + policy.spec.encoded_len())
        });
        if count > POLICIES_MAX {
            return Err(Error::Exhausted(format!(
                "{count} firewall policies; at most {POLICIES_MAX} are allowed"
            )));
        }
        if bytes > POLICY_BYTES_MAX {
            return Err(Error::Exhausted(format!(
                "all firewall policies together take {bytes} bytes; at most {POLICY_BYTES_MAX} are allowed"
            )));
        }
        Ok(())
    }

    /// Removal of a resource; [`Error::NotFound`] if there is none.
    pub fn plan_delete(&self, kind: Kind, name: &str) -> Result<Plan, Error> {
        let (kind_name, write) = match kind {
            Kind::FirewallPolicy => (
                "FirewallPolicy",
                self.policies.get(name).map(|_| Write::DeletePolicy(name.to_owned())),
            ),
            Kind::Node => {
                ("Node", self.nodes.get(name).map(|_| Write::DeleteNode(name.to_owned())))
            }
            Kind::Unspecified => return Err(Error::Invalid("kind: missing".into())),
        };
        let Some(write) = write else {
            return Err(Error::NotFound(format!("{kind_name} {name}: does not exist")));
        };
        let change =
            Change { kind: kind.into(), name: name.to_owned(), outcome: Outcome::Deleted.into() };
        Ok(Plan { changes: vec![change], writes: vec![write] })
    }

    /// A new join token. Tokens that have expired are removed with it.
    pub fn plan_token(
        &self,
        id: String,
        token: TokenRecord,
        now: SystemTime,
    ) -> Result<Plan, Error> {
        let expired = |(_, token): &(&String, &TokenRecord)| token.expire_time <= now;
        let mut writes: Vec<Write> = self
            .tokens
            .iter()
            .filter(expired)
            .map(|(id, _)| Write::DeleteToken(id.clone()))
            .collect();
        if self.tokens.len() - writes.len() >= TOKENS_MAX {
            return Err(Error::Exhausted(format!("{TOKENS_MAX} join tokens are alive already")));
        }
        writes.push(Write::Token(id, token));
        Ok(Plan { changes: Vec::new(), writes })
    }

    /// Admits a node. The same key may come again while the token lives: a lost answer locks nobody out.
    pub fn plan_enrolment(&self, enrolment: &Enrolment, now: SystemTime) -> Result<Plan, Error> {
        let Enrolment { token_id, secret_sha256, node: name, labels, spki_sha256 } = enrolment;
        let known =
            self.tokens.get(token_id).filter(|token| equal(&token.secret_sha256, secret_sha256));
        let Some(token) = known else {
            return Err(Error::Denied("this core does not know the join token".into()));
        };
        if token.expire_time <= now {
            return Err(Error::Denied(
                "the join token has expired: create another with `cnsmo token create`".into(),
            ));
        }
        let old = self.nodes.get(name.as_str());
        if old.is_some_and(|old| old.spki_sha256 != *spki_sha256) {
            return Err(Error::Exists(format!(
                "Node {name}: has joined with another key: if this VM takes its place, run `cnsmo delete node {name}` first"
            )));
        }
        // A node that was deleted is not let in again by a used token.
        if old.is_some() && token.used_by.contains(spki_sha256) {
            return Ok(Plan::default());
        }
        if token.used_by.len() >= token.uses_max as usize {
            return Err(Error::Denied(format!(
                "the join token is used up ({} of {} uses): create another with `cnsmo token create`",
                token.used_by.len(),
                token.uses_max
            )));
        }
        if old.is_none() && self.nodes.len() >= NODES_MAX {
            return Err(Error::Exhausted(format!("{NODES_MAX} nodes have joined already")));
        }
        let mut used = token.clone();
        used.used_by.push(*spki_sha256);
        let both = joined(labels, &token.labels)?;
        let fresh = || Node {
            metadata: created(name.as_str(), now),
            labels: Labels::default(),
            token_labels: Labels::default(),
            labels_by_operator: false,
            spki_sha256: *spki_sha256,
            connected: false,
        };
        let old = old.cloned().unwrap_or_else(fresh);
        let labels = if old.labels_by_operator { old.labels.clone() } else { both };
        let node = Node { token_labels: token.labels.clone(), ..relabelled(&old, labels, now) };
        Ok(Plan {
            changes: Vec::new(),
            writes: vec![Write::Token(token_id.clone(), used), Write::Node(node)],
        })
    }

    /// What the first stream of a node, or one with other labels of the agent, changes in its record.
    pub fn plan_connect(
        &self,
        name: &str,
        agent_labels: &Labels,
        now: SystemTime,
    ) -> Result<Plan, Error> {
        let Some(old) = self.nodes.get(name) else {
            return Err(Error::Denied(format!("Node {name}: is not known to this core")));
        };
        let labels = if old.labels_by_operator {
            old.labels.clone()
        } else {
            joined(agent_labels, &old.token_labels)?
        };
        if old.connected && old.labels == labels {
            return Ok(Plan::default());
        }
        let node = if old.labels == labels { old.clone() } else { relabelled(old, labels, now) };
        let write = Write::Node(Node { connected: true, ..node });
        Ok(Plan { changes: Vec::new(), writes: vec![write] })
    }

    /// Takes over what the store has committed as `revision`.
    pub fn commit(&mut self, plan: Plan, revision: Revision) -> Vec<Event> {
        self.revision = revision;
        plan.writes.into_iter().filter_map(|write| self.put(write, revision)).collect()
    }

    fn put(&mut self, write: Write, revision: Revision) -> Option<Event> {
        let date = |metadata: &mut Metadata| {
            if metadata.revision == 0 {
                metadata.revision = revision;
            }
            metadata.name.clone()
        };
        match write {
            Write::Policy(mut policy) => {
                let name = date(&mut policy.metadata);
                self.policies.insert(name.clone(), policy);
                Some(Event::Policy(name))
            }
            Write::Node(mut node) => {
                let name = date(&mut node.metadata);
                self.nodes.insert(name.clone(), node);
                Some(Event::Node(name))
            }
            Write::DeletePolicy(name) => self.policies.remove(&name).map(Event::PolicyDeleted),
            Write::DeleteNode(name) => self.nodes.remove(&name).map(Event::NodeDeleted),
            Write::Token(id, token) => {
                self.tokens.insert(id, token);
                None
            }
            Write::DeleteToken(id) => {
                self.tokens.remove(&id);
                None
            }
        }
    }
}

impl From<&Policy> for FirewallPolicy {
    fn from(policy: &Policy) -> Self {
        Self {
            metadata: Some(policy.metadata.clone()),
            spec: Some(FirewallPolicySpec::clone(&policy.spec)),
            status: None,
        }
    }
}

fn check_mode(kind: &str, name: &Name, mode: Mode, exists: bool) -> Result<(), Error> {
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

/// Labels are all that can be written of a node, so they count as its spec.
fn relabelled(old: &Node, labels: Labels, now: SystemTime) -> Node {
    let mut node = old.clone();
    if old.metadata.revision != 0 && old.labels != labels {
        node.metadata.generation += 1;
        node.metadata.update_time = Some(now.into());
        node.metadata.revision = 0;
    }
    node.metadata.labels = labels.as_map().clone();
    node.labels = labels;
    node
}

fn joined(agent: &Labels, token: &Labels) -> Result<Labels, Error> {
    let both = agent.clone().overridden_by(token);
    Labels::new(both.as_map().clone())
        .map_err(|e| Error::Invalid(format!("labels of the agent and of the token together: {e}")))
}

/// Compares hashes of secrets without telling by time where they differ.
fn equal(stored: &[u8; 32], presented: &[u8; 32]) -> bool {
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"cnsmo join token");
    ring::hmac::verify(&key, presented, ring::hmac::sign(&key, stored).as_ref()).is_ok()
}

/// Refuses a second resource of one kind and name.
fn distinct(wanted: &[Wanted]) -> Result<(), Error> {
    let mut seen = HashSet::new();
    for one in wanted {
        if !seen.insert((one.kind(), one.name())) {
            return Err(Error::Invalid(format!(
                "{} {}: appears twice in one request",
                one.kind_name(),
                one.name()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
