//! Kind and metadata, and the way back from a resource to a document.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use super::{Problem, decode::Decoder, firewall, tree::Node};
use crate::{
    model::{Labels, Name},
    pb::{
        meta::{Condition, Metadata, condition::Status},
        node::{Node as PbNode, NodeStatus, node_status::Phase},
        policy::{FirewallPolicy, FirewallPolicyStatus},
        resource::{Resource, resource::Resource as Kind},
    },
};

const FIREWALL_POLICY: &str = "FirewallPolicy";
const NODE: &str = "Node";
/// Kinds of the design that this version does not serve: better answered than "unknown".
const LATER: [&str; 4] = ["Network", "LoadBalancer", "Deployment", "Token"];

pub(super) fn decode(node: &Node) -> Result<Resource, Vec<Problem>> {
    let mut decoder = Decoder::default();
    let resource = resource(&mut decoder, node);
    decoder.finish(resource)
}

fn resource(d: &mut Decoder, node: &Node) -> Option<Resource> {
    // A status is the system's: accepted, so that what `get` prints can be applied again, and ignored.
    let fields = d.fields(node, &["kind", "metadata", "spec", "status"])?;
    let kind = d.required(node, &fields, "kind", Decoder::text);
    let metadata = d.required(node, &fields, "metadata", metadata);
    let resource = match kind?.as_str() {
        FIREWALL_POLICY => {
            let spec = d.required(node, &fields, "spec", firewall::decode);
            Kind::FirewallPolicy(FirewallPolicy { metadata, spec: Some(spec?), status: None })
        }
        NODE => {
            if let Some(spec) = fields.get("spec") {
                let reason = "a Node has none: only its labels can be written";
                d.field("spec", |d| d.refuse(spec, reason));
            }
            Kind::Node(PbNode { metadata, status: None, spec: None })
        }
        kind => {
            let reason = if LATER.contains(&kind) {
                format!("{kind} is not supported by this version")
            } else {
                format!("`{kind}` is not a kind; there are: {FIREWALL_POLICY}, {NODE}")
            };
            let at = fields.get("kind").unwrap_or(node);
            d.field("kind", |d| d.refuse(at, reason));
            return None;
        }
    };
    Some(Resource { resource: Some(resource) })
}

fn metadata(d: &mut Decoder, node: &Node) -> Option<Metadata> {
    // The system's fields are accepted and ignored, as a status is.
    let known = ["name", "labels", "uid", "revision", "generation", "createTime", "updateTime"];
    let fields = d.fields(node, &known)?;
    let name = d.required(node, &fields, "name", |d, node| {
        let text = d.text(node)?;
        Name::new(text).map_err(|invalid| d.refuse_invalid(node, invalid)).ok()
    });
    let labels = d.optional(&fields, "labels", labels).unwrap_or_default();
    Some(Metadata { name: name?.to_string(), labels, ..Metadata::default() })
}

/// Labels of a resource, or a selector.
pub(super) fn labels(d: &mut Decoder, node: &Node) -> Option<BTreeMap<String, String>> {
    let texts = d.texts(node)?;
    let labels = Labels::new(texts).map_err(|invalid| d.refuse_invalid(node, invalid)).ok()?;
    Some(labels.as_map().clone())
}

/// A resource as a document for people and programs, with its status. Serialises to YAML and JSON; what it prints,
/// [`super::parse`] reads.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    kind: &'static str,
    metadata: MetadataDocument,
    #[serde(skip_serializing_if = "Option::is_none")]
    spec: Option<firewall::Document>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<StatusDocument>,
}

impl Manifest {
    /// `None` of an empty message.
    pub fn new(resource: &Resource) -> Option<Self> {
        let manifest = match resource.resource.as_ref()? {
            Kind::FirewallPolicy(policy) => Self {
                kind: FIREWALL_POLICY,
                metadata: MetadataDocument::new(policy.metadata.as_ref()),
                spec: Some(firewall::Document::new(&policy.spec.clone().unwrap_or_default())),
                status: policy.status.as_ref().map(StatusDocument::of_policy),
            },
            Kind::Node(node) => Self {
                kind: NODE,
                metadata: MetadataDocument::new(node.metadata.as_ref()),
                spec: None,
                status: node.status.as_ref().map(StatusDocument::of_node),
            },
            Kind::Network(_) | Kind::LoadBalancer(_) => return None,
        };
        Some(manifest)
    }

    /// What an operator wrote or could have written, without what the system adds.
    #[must_use]
    pub fn without_status(mut self) -> Self {
        self.status = None;
        self.metadata = MetadataDocument {
            name: self.metadata.name,
            labels: self.metadata.labels,
            ..MetadataDocument::default()
        };
        self
    }
}

#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct MetadataDocument {
    name: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    uid: String,
    #[serde(skip_serializing_if = "is_zero")]
    revision: i64,
    #[serde(skip_serializing_if = "is_zero")]
    generation: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    create_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    update_time: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde calls")]
fn is_zero(n: &i64) -> bool {
    *n == 0
}

impl MetadataDocument {
    fn new(metadata: Option<&Metadata>) -> Self {
        let metadata = metadata.cloned().unwrap_or_default();
        Self {
            name: metadata.name,
            labels: metadata.labels,
            uid: metadata.uid,
            revision: metadata.revision,
            generation: metadata.generation,
            create_time: metadata.create_time.map(|t| t.to_string()),
            update_time: metadata.update_time.map(|t| t.to_string()),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum StatusDocument {
    Policy(PolicyStatusDocument),
    Node(Box<NodeStatusDocument>),
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PolicyStatusDocument {
    nodes: Vec<PolicyOnNode>,
    conditions: Vec<ConditionDocument>,
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
struct RuleCounterDocument {
    rule: String,
    packets: u64,
    bytes: u64,
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
struct NodeStatusDocument {
    phase: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
    addresses: Vec<String>,
    kernel: String,
    agent_version: String,
    interfaces: Vec<InterfaceDocument>,
    applied_revision: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_seen_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    firewall: Option<FirewallStatusDocument>,
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

impl StatusDocument {
    fn of_policy(status: &FirewallPolicyStatus) -> Self {
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
                })
                .collect(),
        };
        Self::Policy(PolicyStatusDocument {
            nodes: status.nodes.iter().map(node).collect(),
            conditions: status.conditions.iter().map(ConditionDocument::new).collect(),
        })
    }

    fn of_node(status: &NodeStatus) -> Self {
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
            applied_revision: status.applied_revision,
            last_seen_time: status.last_seen_time.map(|t| t.to_string()),
            firewall: status.firewall.as_ref().map(|firewall| FirewallStatusDocument {
                flows: firewall.flows,
                rules: firewall.rules,
                drops: firewall.drops.iter().map(drop).collect(),
            }),
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
