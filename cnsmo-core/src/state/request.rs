//! What an operator asks for, checked before anybody else sees it.

use std::collections::BTreeMap;

use cnsmo_proto::{
    model::{FirewallPolicy, Invalid, Labels, Name},
    pb::{
        meta::Metadata,
        policy::FirewallPolicySpec,
        resource::{Kind, Resource, resource},
    },
};

use super::distinct;
use crate::error::Error;

/// Resources in one request: one transaction, so one pause for all others.
pub(super) const RESOURCES_MAX: usize = 10_000;

/// A resource as it shall be.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    /// A firewall policy.
    Policy {
        /// Name.
        name: Name,
        /// Labels of the policy itself.
        labels: Labels,
        /// VMs it is for.
        target: Labels,
        /// In canonical form.
        spec: FirewallPolicySpec,
    },
    /// Labels of a node.
    Node {
        /// Name.
        name: Name,
        /// All of its labels.
        labels: Labels,
    },
}

impl Wanted {
    /// Name.
    pub fn name(&self) -> &Name {
        match self {
            Self::Policy { name, .. } | Self::Node { name, .. } => name,
        }
    }

    /// Kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Policy { .. } => Kind::FirewallPolicy,
            Self::Node { .. } => Kind::Node,
        }
    }

    /// Kind, as operators write it.
    pub fn kind_name(&self) -> &'static str {
        match self {
            Self::Policy { .. } => "FirewallPolicy",
            Self::Node { .. } => "Node",
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

fn parse(n: usize, resource: Resource) -> Result<Wanted, Error> {
    match resource.resource {
        Some(resource::Resource::FirewallPolicy(policy)) => {
            let who = who("FirewallPolicy", n, policy.metadata.as_ref());
            let refused = |e: Invalid| Error::Invalid(format!("{who}: {e}"));
            let (name, labels) = metadata(policy.metadata).map_err(refused)?;
            let spec = policy.spec.ok_or_else(|| refused(Invalid::new("missing").at("spec")))?;
            let checked = FirewallPolicy::try_from(spec).map_err(|e| refused(e.at("spec")))?;
            let spec = FirewallPolicySpec::from(&checked);
            Ok(Wanted::Policy { name, labels, target: checked.target, spec })
        }
        Some(resource::Resource::Node(node)) => {
            let who = who("Node", n, node.metadata.as_ref());
            let refused = |e: Invalid| Error::Invalid(format!("{who}: {e}"));
            let (name, labels) = metadata(node.metadata).map_err(refused)?;
            Ok(Wanted::Node { name, labels })
        }
        None => Err(Error::Invalid(format!("resources[{n}]: missing, or of an unknown kind"))),
    }
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
    let labels: BTreeMap<_, _> = metadata.labels;
    let labels = Labels::new(labels).map_err(|e| e.at("metadata.labels"))?;
    Ok((name, labels))
}
