//! What an operator asks for, checked before anybody else sees it.

use std::collections::HashSet;

use cnsmo_proto::{
    model::{Deployment, FirewallPolicy, Invalid, Labels, LoadBalancer, Name, Network},
    pb::{
        balancer::LoadBalancerSpec,
        deployment::DeploymentSpec,
        meta::Metadata,
        network::NetworkSpec,
        node::NodeSpec,
        policy::FirewallPolicySpec,
        resource::{Kind, Resource, resource},
    },
};

use super::{PolicyView, word};
use crate::error::Error;

/// Resources in one request: one transaction, so one pause for all others.
pub(super) const RESOURCES_MAX: usize = 10_000;

/// A resource as it shall be.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Name.
    pub name: Name,
    /// All of its labels.
    pub labels: Labels,
    /// The rest.
    pub body: Body,
}

/// What is particular to a kind. Specs are in canonical form.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// A firewall policy.
    Policy {
        /// As it is handed on.
        spec: FirewallPolicySpec,
        /// What the core looks at.
        view: PolicyView,
    },
    /// A network.
    Network {
        /// As it is handed on.
        spec: NetworkSpec,
        /// The same.
        network: Network,
    },
    /// A load balancer.
    Balancer {
        /// As it is handed on.
        spec: LoadBalancerSpec,
        /// The same.
        balancer: LoadBalancer,
    },
    /// A deployment.
    Deployment {
        /// As it is handed on.
        spec: DeploymentSpec,
        /// The same.
        deployment: Box<Deployment>,
    },
    /// A node. None: its spec stays.
    Node(Option<NodeSpec>),
}

impl Wanted {
    /// Kind.
    pub fn kind(&self) -> Kind {
        match self.body {
            Body::Policy { .. } => Kind::FirewallPolicy,
            Body::Network { .. } => Kind::Network,
            Body::Balancer { .. } => Kind::LoadBalancer,
            Body::Deployment { .. } => Kind::Deployment,
            Body::Node(_) => Kind::Node,
        }
    }
}

/// Checks the resources of an `Apply`. Takes a while for large policies: keep it off the threads that serve others.
pub fn parse_apply(resources: Vec<Resource>) -> Result<Vec<Wanted>, Error> {
    if resources.len() > RESOURCES_MAX {
        return Err(Error::Invalid(format!(
            "resources: {} in one request; at most {RESOURCES_MAX} are allowed",
            resources.len()
        )));
    }
    let wanted = resources
        .into_iter()
        .enumerate()
        .map(|(n, resource)| parse(n, resource))
        .collect::<Result<Vec<_>, _>>()?;
    distinct(&wanted)?;
    Ok(wanted)
}

/// Refuses a second resource of one kind and name.
fn distinct(wanted: &[Wanted]) -> Result<(), Error> {
    let mut seen = HashSet::new();
    for one in wanted {
        if !seen.insert((one.kind(), &one.name)) {
            let (kind, name) = (word(one.kind()), &one.name);
            return Err(Error::Invalid(format!("{kind} {name}: appears twice in one request")));
        }
    }
    Ok(())
}

fn parse(n: usize, resource: Resource) -> Result<Wanted, Error> {
    let missing = || Invalid::new("missing").at("spec");
    let (kind, meta, body) = match resource.resource {
        Some(resource::Resource::FirewallPolicy(policy)) => {
            let body = policy.spec.ok_or_else(missing).and_then(policy_body);
            (Kind::FirewallPolicy, policy.metadata, body)
        }
        Some(resource::Resource::Network(network)) => {
            let body = network.spec.ok_or_else(missing).and_then(network_body);
            (Kind::Network, network.metadata, body)
        }
        Some(resource::Resource::LoadBalancer(balancer)) => {
            let body = balancer.spec.ok_or_else(missing).and_then(balancer_body);
            (Kind::LoadBalancer, balancer.metadata, body)
        }
        Some(resource::Resource::Deployment(one)) => {
            let body = one.spec.ok_or_else(missing).and_then(deployment_body);
            (Kind::Deployment, one.metadata, body)
        }
        Some(resource::Resource::Node(node)) => {
            (Kind::Node, node.metadata, Ok(Body::Node(node.spec)))
        }
        None => {
            let why = format!("resources[{n}]: missing, or of an unknown kind");
            return Err(Error::Invalid(why));
        }
    };
    let who = who(word(kind), n, meta.as_ref());
    let refused = |e: Invalid| Error::Invalid(format!("{who}: {e}"));
    let (name, labels) = metadata(meta).map_err(refused)?;
    Ok(Wanted { name, labels, body: body.map_err(refused)? })
}

fn policy_body(spec: FirewallPolicySpec) -> Result<Body, Invalid> {
    let policy = FirewallPolicy::try_from(spec).and_then(FirewallPolicy::written);
    let policy = policy.map_err(|e| e.at("spec"))?;
    Ok(Body::Policy { spec: (&policy).into(), view: policy.into() })
}

fn network_body(spec: NetworkSpec) -> Result<Body, Invalid> {
    let network = Network::try_from(spec).map_err(|e| e.at("spec"))?;
    Ok(Body::Network { spec: (&network).into(), network })
}

fn balancer_body(spec: LoadBalancerSpec) -> Result<Body, Invalid> {
    let balancer = LoadBalancer::try_from(spec).map_err(|e| e.at("spec"))?;
    Ok(Body::Balancer { spec: (&balancer).into(), balancer })
}

fn deployment_body(spec: DeploymentSpec) -> Result<Body, Invalid> {
    let deployment = Deployment::try_from(spec).map_err(|e| e.at("spec"))?;
    Ok(Body::Deployment { spec: (&deployment).into(), deployment: Box::new(deployment) })
}

fn who(kind: &str, n: usize, metadata: Option<&Metadata>) -> String {
    match metadata {
        Some(Metadata { name, .. }) if Name::new(name.as_str()).is_ok() => format!("{kind} {name}"),
        _ => format!("resources[{n}] ({kind})"),
    }
}

fn metadata(metadata: Option<Metadata>) -> Result<(Name, Labels), Invalid> {
    let metadata = metadata.ok_or_else(|| Invalid::new("missing").at("metadata"))?;
    let name = Name::new(metadata.name).map_err(|e| e.at("metadata.name"))?;
    let labels = Labels::new(metadata.labels).map_err(|e| e.at("metadata.labels"))?;
    Ok((name, labels))
}
