//! Nodes: how they join, what their agents say of them, what operators say of them.

use std::{net::IpAddr, time::SystemTime};

use cnsmo_proto::{
    model::{Addresses, ENDPOINTS_MAX, Invalid, Labels, Name, PublicKey},
    pb::{
        agent,
        meta::Metadata,
        node::{self, NodeSpec},
        resource::change::Outcome,
    },
};

use super::{Plan, State, Write};
use crate::error::Error;

/// Nodes: what one core is measured with, twice.
pub const NODES_MAX: usize = 20_000;
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
    /// Balancers give it no new flows.
    pub draining: bool,
    /// What peers must know of it.
    pub announcement: Announcement,
    /// The network that selects it.
    pub membership: Option<Membership>,
}

/// How a VM can be reached outside of any tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Announcement {
    /// None: not announced yet.
    pub public_key: Option<PublicKey>,
    /// The likeliest first, none twice.
    pub addresses: Vec<IpAddr>,
}

/// Of a node in a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Name of the network.
    pub network: String,
    /// One for each family of the network. None: the network is full, the node waits for a place.
    pub addresses: Option<Addresses>,
}

impl TryFrom<agent::Announcement> for Announcement {
    type Error = Invalid;

    fn try_from(wire: agent::Announcement) -> Result<Self, Invalid> {
        let key = PublicKey::try_from(wire.tunnel_public_key.as_slice())
            .map_err(|e| e.at("tunnelPublicKey"))?;
        // A secret agreed on with it is one that everybody knows (RFC 7748, section 6.1).
        if key.0 == [0; 32] {
            return Err(Invalid::new("is zero").at("tunnelPublicKey"));
        }
        if wire.addresses.len() > ENDPOINTS_MAX {
            let n = wire.addresses.len();
            let why = format!("{n}; at most {ENDPOINTS_MAX} are allowed");
            return Err(Invalid::new(why).at("addresses"));
        }
        let mut addresses = Vec::with_capacity(wire.addresses.len());
        for (n, text) in wire.addresses.iter().enumerate() {
            let refused = |why: &str| Invalid::new(why).at_index(n).at("addresses");
            let address: IpAddr = text.parse().map_err(|_| refused("is not an IP address"))?;
            // What an IPv4-mapped address leads to is that of IPv4 (RFC 4291, section 2.5.5.2).
            let address = address.to_canonical();
            if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
                return Err(refused("leads to no other VM"));
            }
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        Ok(Self { public_key: Some(key), addresses })
    }
}

impl From<&Node> for node::Node {
    fn from(node: &Node) -> Self {
        let spec = NodeSpec { draining: node.draining };
        Self { metadata: Some(node.metadata.clone()), status: None, spec: Some(spec) }
    }
}

impl State {
    /// What an operator's word changes in a node's record.
    pub(super) fn plan_node(
        &self,
        name: &Name,
        labels: Labels,
        spec: Option<NodeSpec>,
        now: SystemTime,
    ) -> Result<(Outcome, Option<Write>), Error> {
        let Some(old) = self.nodes.get(name.as_str()) else {
            return Err(Error::NotFound(format!(
                "Node {name}: has not joined: only the labels and the spec of a node that has joined can be written"
            )));
        };
        let draining = spec.map_or(old.draining, |spec| spec.draining);
        let labels_by_operator = old.labels_by_operator || old.labels != labels;
        let node = Node { labels_by_operator, ..rewritten(old, labels, draining, now) };
        if node == *old {
            return Ok((Outcome::Unchanged, None));
        }
        Ok((Outcome::Updated, Some(Write::Node(Box::new(node)))))
    }

    /// What the first stream of a node, or one with other labels or another announcement, changes in its record.
    pub fn plan_connect(
        &self,
        name: &str,
        agent_labels: &Labels,
        announcement: Option<Announcement>,
        now: SystemTime,
    ) -> Result<Plan, Error> {
        let old = self.known(name)?;
        let labels = if old.labels_by_operator {
            old.labels.clone()
        } else {
            joined(agent_labels, &old.token_labels)?
        };
        let announcement = announcement.unwrap_or_else(|| old.announcement.clone());
        let node = rewritten(old, labels, old.draining, now);
        self.plan_record(old, Node { connected: true, announcement, ..node })
    }

    /// What another announcement of a node changes in its record.
    pub fn plan_announcement(&self, name: &str, announcement: Announcement) -> Result<Plan, Error> {
        let old = self.known(name)?;
        self.plan_record(old, Node { announcement, ..old.clone() })
    }

    fn known(&self, name: &str) -> Result<&Node, Error> {
        let unknown = || Error::Denied(format!("Node {name}: is not known to this core"));
        self.nodes.get(name).ok_or_else(unknown)
    }

    fn plan_record(&self, old: &Node, new: Node) -> Result<Plan, Error> {
        if new == *old {
            return Ok(Plan::default());
        }
        // Two peers with one key are one peer to WireGuard: what is meant for either would reach any of them.
        if let Some(key) = new.announcement.public_key
            && let Some(other) = self.keys.get(&key)
            && *other != new.metadata.name
        {
            return Err(Error::Exists(format!(
                "announcement.tunnelPublicKey: is that of Node {other}: if this VM takes its place, run `cnsmo delete node {other}` first"
            )));
        }
        self.finish(Plan { changes: Vec::new(), writes: vec![Write::Node(Box::new(new))] })
    }
}

/// Labels and spec are what can be written of a node, so a change of either is one of its revision.
pub(super) fn rewritten(old: &Node, labels: Labels, draining: bool, now: SystemTime) -> Node {
    let mut node = old.clone();
    if old.metadata.revision != 0 && (old.labels != labels || old.draining != draining) {
        node.metadata.generation += 1;
        node.metadata.update_time = Some(now.into());
        node.metadata.revision = 0;
    }
    node.metadata.labels = labels.as_map().clone();
    node.labels = labels;
    node.draining = draining;
    node
}

pub(super) fn joined(agent: &Labels, token: &Labels) -> Result<Labels, Error> {
    let both = agent.clone().overridden_by(token);
    Labels::new(both.as_map().clone())
        .map_err(|e| Error::Invalid(format!("labels of the agent and of the token together: {e}")))
}
