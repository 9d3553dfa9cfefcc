//! Kind and metadata, and the way back from a resource to a document.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    Problem, balancer, decode::Decoder, deployment, firewall, network, status::StatusDocument,
    tree::Node,
};
use crate::{
    model::{Labels, Name},
    pb::{
        balancer::LoadBalancer,
        deployment::Deployment,
        meta::Metadata,
        network::Network,
        node::{Node as PbNode, NodeSpec},
        policy::FirewallPolicy,
        resource::{Resource, resource::Resource as Kind},
    },
};

const DEPLOYMENT: &str = "Deployment";
const FIREWALL_POLICY: &str = "FirewallPolicy";
const LOAD_BALANCER: &str = "LoadBalancer";
const NETWORK: &str = "Network";
const NODE: &str = "Node";
const KINDS: [&str; 5] = [DEPLOYMENT, FIREWALL_POLICY, LOAD_BALANCER, NETWORK, NODE];
/// Kinds of the design that this version does not serve: better answered than "unknown".
const LATER: [&str; 1] = ["Token"];

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
        DEPLOYMENT => {
            let spec = d.required(node, &fields, "spec", deployment::decode);
            Kind::Deployment(Deployment { metadata, spec: Some(spec?), status: None })
        }
        FIREWALL_POLICY => {
            let spec = d.required(node, &fields, "spec", firewall::decode);
            Kind::FirewallPolicy(FirewallPolicy { metadata, spec: Some(spec?), status: None })
        }
        LOAD_BALANCER => {
            let spec = d.required(node, &fields, "spec", balancer::decode);
            Kind::LoadBalancer(LoadBalancer { metadata, spec: Some(spec?), status: None })
        }
        NETWORK => {
            let spec = d.required(node, &fields, "spec", network::decode);
            Kind::Network(Network { metadata, spec: Some(spec?), status: None })
        }
        NODE => {
            let spec = d.optional(&fields, "spec", node_spec);
            Kind::Node(PbNode { metadata, status: None, spec })
        }
        kind => {
            let reason = if LATER.contains(&kind) {
                format!("{kind} is not supported by this version")
            } else {
                format!("`{kind}` is not a kind; there are: {}", KINDS.join(", "))
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

fn node_spec(d: &mut Decoder, node: &Node) -> Option<NodeSpec> {
    let fields = d.fields(node, &["draining"])?;
    let draining = d.optional(&fields, "draining", Decoder::boolean).unwrap_or_default();
    Some(NodeSpec { draining })
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
    spec: Option<SpecDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<StatusDocument>,
}

impl Manifest {
    /// `None` of an empty message.
    pub fn new(resource: &Resource) -> Option<Self> {
        let manifest = match resource.resource.as_ref()? {
            Kind::Deployment(one) => Self {
                kind: DEPLOYMENT,
                metadata: MetadataDocument::new(one.metadata.as_ref()),
                spec: one.spec.as_ref().map(|spec| {
                    SpecDocument::Deployment(Box::new(deployment::Document::new(spec)))
                }),
                status: one.status.as_ref().map(StatusDocument::of_deployment),
            },
            Kind::FirewallPolicy(policy) => Self {
                kind: FIREWALL_POLICY,
                metadata: MetadataDocument::new(policy.metadata.as_ref()),
                spec: policy.spec.as_ref().map(firewall::Document::new).map(SpecDocument::Policy),
                status: policy.status.as_ref().map(StatusDocument::of_policy),
            },
            Kind::LoadBalancer(balancer) => Self {
                kind: LOAD_BALANCER,
                metadata: MetadataDocument::new(balancer.metadata.as_ref()),
                spec: balancer
                    .spec
                    .as_ref()
                    .map(balancer::Document::new)
                    .map(SpecDocument::LoadBalancer),
                status: balancer.status.as_ref().map(StatusDocument::of_balancer),
            },
            Kind::Network(network) => Self {
                kind: NETWORK,
                metadata: MetadataDocument::new(network.metadata.as_ref()),
                spec: network.spec.as_ref().map(network::Document::new).map(SpecDocument::Network),
                status: network.status.as_ref().map(StatusDocument::of_network),
            },
            Kind::Node(node) => Self {
                kind: NODE,
                metadata: MetadataDocument::new(node.metadata.as_ref()),
                spec: node
                    .spec
                    .map(|spec| SpecDocument::Node(NodeSpecDocument { draining: spec.draining })),
                status: node.status.as_ref().map(StatusDocument::of_node),
            },
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

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum SpecDocument {
    Deployment(Box<deployment::Document>),
    Policy(firewall::Document),
    LoadBalancer(balancer::Document),
    Network(network::Document),
    Node(NodeSpecDocument),
}

#[derive(Clone, Debug, Serialize)]
struct NodeSpecDocument {
    draining: bool,
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
