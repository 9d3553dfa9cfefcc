//! Statuses as documents: written, never read.

use serde::{Serialize, Serializer};

use crate::{
    model::PublicKey,
    pb::{
        balancer::{Backend, BackendStatus, LoadBalancerStatus, NodeBalancerStatus},
        catalog::Phase as InstancePhase,
        deployment::{AvoidedNode, DeploymentStatus, InstanceStatus, Port},
        meta::{Condition, condition::Status},
        network::{Member, NetworkStatus, Refused},
        node::{NodeStatus, OverlayStatus, PeerStatus, node_status::Phase},
        policy::{FirewallPolicyStatus, ResolvedPeer},
    },
};

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum StatusDocument {
    Deployment(DeploymentStatusDocument),
    Policy(PolicyStatusDocument),
    LoadBalancer(BalancerStatusDocument),
    Network(NetworkStatusDocument),
    Node(Box<NodeStatusDocument>),
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct DeploymentStatusDocument {
    observed_generation: i64,
    desired: u32,
    placed: u32,
    ready: u32,
    updated: u32,
    instances: Vec<InstanceDocument>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    avoided: Vec<AvoidedDocument>,
    conditions: Vec<ConditionDocument>,
}

#[derive(Clone, Debug, Serialize)]
struct AvoidedDocument {
    node: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<String>,
    times: u32,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct InstanceDocument {
    name: String,
    node: String,
    phase: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    generation: i64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<InstancePortDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    phase_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failing_since: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct InstancePortDocument {
    name: String,
    port: u32,
}

impl InstanceDocument {
    fn new(instance: &InstanceStatus) -> Self {
        let port = |port: &Port| InstancePortDocument { name: port.name.clone(), port: port.port };
        Self {
            name: instance.name.clone(),
            node: instance.node.clone(),
            phase: instance_phase(instance.phase()),
            reason: instance.reason.clone(),
            message: instance.message.clone(),
            generation: instance.generation,
            ports: instance.ports.iter().map(port).collect(),
            phase_time: instance.phase_time.map(|t| t.to_string()),
            failing_since: instance.failing_since.map(|t| t.to_string()),
        }
    }
}

/// The word for the phase of an instance; unspecified: nobody has told of it yet.
pub fn instance_phase(phase: InstancePhase) -> &'static str {
    match phase {
        InstancePhase::Unspecified => "placed",
        InstancePhase::Installing => "installing",
        InstancePhase::Starting => "starting",
        InstancePhase::Ready => "ready",
        InstancePhase::Degraded => "degraded",
        InstancePhase::Draining => "draining",
        InstancePhase::Failed => "failed",
        InstancePhase::Stopped => "stopped",
        InstancePhase::Unreachable => "unreachable",
        InstancePhase::Lost => "lost",
    }
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PolicyStatusDocument {
    nodes: Vec<PolicyOnNode>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers: Vec<ResolvedPeerDocument>,
    conditions: Vec<ConditionDocument>,
}

#[derive(Clone, Debug, Serialize)]
struct ResolvedPeerDocument {
    rule: String,
    nodes: u32,
    cidrs: u32,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PolicyOnNode {
    node: String,
    applied: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    rules: Vec<RuleCounterDocument>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct RuleCounterDocument {
    rule: String,
    packets: u64,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_hit_time: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ConditionDocument {
    r#type: String,
    #[serde(serialize_with = "condition_status")]
    status: i32,
    reason: String,
    message: String,
    observed_generation: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    transition_time: Option<String>,
}

fn condition_status<S: Serializer>(status: &i32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(match Status::try_from(*status) {
        Ok(Status::True) => "True",
        Ok(Status::False) => "False",
        Ok(Status::Unknown | Status::Unspecified) | Err(_) => "Unknown",
    })
}

impl ConditionDocument {
    fn new(condition: &Condition) -> Self {
        Self {
            r#type: condition.r#type.clone(),
            status: condition.status,
            reason: condition.reason.clone(),
            message: condition.message.clone(),
            observed_generation: condition.observed_generation,
            transition_time: condition.transition_time.map(|t| t.to_string()),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NodeStatusDocument {
    phase: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    addresses: Vec<String>,
    kernel: String,
    agent_version: String,
    interfaces: Vec<InterfaceDocument>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    program_ids: Vec<u32>,
    applied_revision: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_seen_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    firewall: Option<FirewallStatusDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    overlay: Option<OverlayDocument>,
}

#[derive(Clone, Debug, Serialize)]
struct InterfaceDocument {
    name: String,
    ingress: String,
    egress: String,
}

#[derive(Clone, Debug, Serialize)]
struct FirewallStatusDocument {
    flows: u64,
    rules: u64,
    drops: Vec<DropDocument>,
}

#[derive(Clone, Debug, Serialize)]
struct DropDocument {
    reason: String,
    direction: String,
    packets: u64,
    bytes: u64,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct OverlayDocument {
    #[serde(skip_serializing_if = "String::is_empty")]
    network: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    backend: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    device: String,
    mtu: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    public_key: String,
    peers: Vec<PeerDocument>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PeerDocument {
    node: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    endpoint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_handshake_time: Option<String>,
    received_bytes: u64,
    sent_bytes: u64,
}

impl OverlayDocument {
    fn new(status: &OverlayStatus) -> Self {
        let peer = |peer: &PeerStatus| PeerDocument {
            node: peer.node.clone(),
            endpoint: peer.endpoint.clone(),
            last_handshake_time: peer.last_handshake_time.map(|t| t.to_string()),
            received_bytes: peer.received_bytes,
            sent_bytes: peer.sent_bytes,
        };
        Self {
            network: status.network.clone(),
            backend: status.backend.clone(),
            reason: status.reason.clone(),
            device: status.device.clone(),
            mtu: status.mtu,
            public_key: public_key(&status.public_key),
            peers: status.peers.iter().map(peer).collect(),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct NetworkStatusDocument {
    members: Vec<MemberDocument>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refused: Vec<RefusedDocument>,
    conditions: Vec<ConditionDocument>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct MemberDocument {
    node: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    ipv4: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    ipv6: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    public_key: String,
    endpoints: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
struct RefusedDocument {
    node: String,
    message: String,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct BalancerStatusDocument {
    backends: Vec<BackendDocument>,
    nodes: Vec<BalancerOnNode>,
    conditions: Vec<ConditionDocument>,
}

#[derive(Clone, Debug, Serialize)]
struct BackendDocument {
    node: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    instance: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    ipv4: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    ipv6: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u32>,
    draining: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
}

#[derive(Clone, Debug, Serialize)]
struct BalancerOnNode {
    node: String,
    applied: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    backends: Vec<BackendStatusDocument>,
}

#[derive(Clone, Debug, Serialize)]
struct BackendStatusDocument {
    node: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    instance: String,
    active: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    flows: u64,
}

impl BalancerOnNode {
    fn new(status: &NodeBalancerStatus) -> Self {
        let backend = |backend: &BackendStatus| BackendStatusDocument {
            node: backend.node.clone(),
            instance: backend.instance.clone(),
            active: backend.active,
            reason: backend.reason.clone(),
            message: backend.message.clone(),
            flows: backend.flows,
        };
        Self {
            node: status.node.clone(),
            applied: status.applied,
            message: status.message.clone(),
            backends: status.backends.iter().map(backend).collect(),
        }
    }
}

impl StatusDocument {
    pub(super) fn of_deployment(status: &DeploymentStatus) -> Self {
        let avoided = |avoided: &AvoidedNode| AvoidedDocument {
            node: avoided.node.clone(),
            until: avoided.until.map(|t| t.to_string()),
            times: avoided.times,
        };
        Self::Deployment(DeploymentStatusDocument {
            observed_generation: status.observed_generation,
            desired: status.desired,
            placed: status.placed,
            ready: status.ready,
            updated: status.updated,
            instances: status.instances.iter().map(InstanceDocument::new).collect(),
            avoided: status.avoided.iter().map(avoided).collect(),
            conditions: status.conditions.iter().map(ConditionDocument::new).collect(),
        })
    }

    pub(super) fn of_policy(status: &FirewallPolicyStatus) -> Self {
        let node = |node: &crate::pb::policy::NodePolicyStatus| PolicyOnNode {
            node: node.node.clone(),
            applied: node.applied,
            message: node.message.clone(),
            rules: node
                .rules
                .iter()
                .map(|c| RuleCounterDocument {
                    rule: c.rule.clone(),
                    packets: c.packets,
                    bytes: c.bytes,
                    last_hit_time: c.last_hit_time.as_ref().map(ToString::to_string),
                })
                .collect(),
        };
        let peer = |peer: &ResolvedPeer| ResolvedPeerDocument {
            rule: peer.rule.clone(),
            nodes: peer.nodes,
            cidrs: peer.cidrs,
        };
        Self::Policy(PolicyStatusDocument {
            nodes: status.nodes.iter().map(node).collect(),
            peers: status.peers.iter().map(peer).collect(),
            conditions: status.conditions.iter().map(ConditionDocument::new).collect(),
        })
    }

    pub(super) fn of_network(status: &NetworkStatus) -> Self {
        let member = |member: &Member| MemberDocument {
            node: member.node.clone(),
            ipv4: member.ipv4.clone(),
            ipv6: member.ipv6.clone(),
            public_key: public_key(&member.public_key),
            endpoints: member.endpoints.clone(),
        };
        let refused = |refused: &Refused| RefusedDocument {
            node: refused.node.clone(),
            message: refused.message.clone(),
        };
        Self::Network(NetworkStatusDocument {
            members: status.members.iter().map(member).collect(),
            refused: status.refused.iter().map(refused).collect(),
            conditions: status.conditions.iter().map(ConditionDocument::new).collect(),
        })
    }

    pub(super) fn of_balancer(status: &LoadBalancerStatus) -> Self {
        let backend = |backend: &Backend| BackendDocument {
            node: backend.node.clone(),
            ipv4: backend.ipv4.clone(),
            ipv6: backend.ipv6.clone(),
            draining: backend.draining,
            instance: backend.instance.clone(),
            port: Some(backend.port).filter(|port| *port > 0),
            message: backend.message.clone(),
        };
        Self::LoadBalancer(BalancerStatusDocument {
            backends: status.backends.iter().map(backend).collect(),
            nodes: status.nodes.iter().map(BalancerOnNode::new).collect(),
            conditions: status.conditions.iter().map(ConditionDocument::new).collect(),
        })
    }

    pub(super) fn of_node(status: &NodeStatus) -> Self {
        let interface = |i: &crate::pb::node::Interface| InterfaceDocument {
            name: i.name.clone(),
            ingress: i.ingress.clone(),
            egress: i.egress.clone(),
        };
        let drop = |d: &crate::pb::node::DropCounter| DropDocument {
            reason: d.reason.clone(),
            direction: d.direction.clone(),
            packets: d.packets,
            bytes: d.bytes,
        };
        Self::Node(Box::new(NodeStatusDocument {
            phase: phase(status.phase()),
            reason: status.reason.clone(),
            message: status.message.clone(),
            addresses: status.addresses.clone(),
            kernel: status.kernel.clone(),
            agent_version: status.agent_version.clone(),
            interfaces: status.interfaces.iter().map(interface).collect(),
            program_ids: status.program_ids.clone(),
            applied_revision: status.applied_revision,
            last_seen_time: status.last_seen_time.map(|t| t.to_string()),
            firewall: status.firewall.as_ref().map(|firewall| FirewallStatusDocument {
                flows: firewall.flows,
                rules: firewall.rules,
                drops: firewall.drops.iter().map(drop).collect(),
            }),
            overlay: status.overlay.as_ref().map(OverlayDocument::new),
        }))
    }
}

/// The word for a phase, as in a Node's status.
pub fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Unspecified => "Unknown",
        Phase::Joining => "Joining",
        Phase::Ready => "Ready",
        Phase::Degraded => "Degraded",
        Phase::Unreachable => "Unreachable",
    }
}

/// A tunnel's public key as `wg` shows it; empty of none, and of what is no key.
pub fn public_key(bytes: &[u8]) -> String {
    PublicKey::try_from(bytes).map(|key| key.to_string()).unwrap_or_default()
}
