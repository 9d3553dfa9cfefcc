use anyhow::Result;
use cnsmo_proto::{
    manifest,
    model::Labels,
    pb::{
        balancer::LoadBalancer,
        network::Network,
        node::{Node, NodeStatus, node_status::Phase},
        policy::{Action, FirewallPolicy},
        resource::{GetRequest, Kind, ListRequest, Resource, resource::Resource as Inner},
    },
};

use crate::{
    args::{Format, GetArgs},
    backends,
    client::{Client, refused},
    deployment,
    output::{
        NONE, addresses, age, labels, manifests, or_none, print_json, print_table, print_yaml,
    },
};

pub(crate) async fn get(client: &Client, format: Format, args: GetArgs) -> Result<()> {
    let kind = args.kind.into();
    match args.name {
        None => print_list(client, format, kind, &args.selector).await,
        Some(name) => {
            let resource = one(client, kind, name.to_string()).await?;
            match format {
                Format::Table => print_rows(kind, &[resource]),
                Format::Json | Format::Yaml => print_one(format, &resource),
            }
        }
    }
}

pub(crate) async fn nodes(client: &Client, format: Format, selector: Labels) -> Result<()> {
    print_list(client, format, Kind::Node, &selector).await
}

pub(crate) async fn one(client: &Client, kind: Kind, name: String) -> Result<Resource> {
    let request = GetRequest { kind: kind.into(), name };
    let response = client.resources().await?.get(request).await.map_err(refused)?.into_inner();
    Ok(response.resource.unwrap_or_default())
}

pub(crate) fn print_one(format: Format, resource: &Resource) -> Result<()> {
    match manifest::Manifest::new(resource) {
        Some(manifest) if format == Format::Json => print_json(&manifest),
        Some(manifest) => print_yaml(&manifest),
        None => anyhow::bail!("the core sent a resource without content"),
    }
}

/// All of a kind that have the labels.
pub(crate) async fn list(client: &Client, kind: Kind, selector: &Labels) -> Result<Vec<Resource>> {
    let request = ListRequest { kind: kind.into(), labels: selector.as_map().clone() };
    let response = client.resources().await?.list(request).await.map_err(refused)?;
    Ok(response.into_inner().resources)
}

async fn print_list(client: &Client, format: Format, kind: Kind, selector: &Labels) -> Result<()> {
    let resources = list(client, kind, selector).await?;
    match format {
        Format::Table => print_rows(kind, &resources),
        Format::Json => print_json(&manifests(&resources)),
        Format::Yaml => {
            for (n, manifest) in manifests(&resources).iter().enumerate() {
                if n > 0 {
                    crate::output::print_text("---\n")?;
                }
                print_yaml(manifest)?;
            }
            Ok(())
        }
    }
}

fn print_rows(kind: Kind, resources: &[Resource]) -> Result<()> {
    match kind {
        Kind::Deployment => {
            let rows = resources.iter().filter_map(|one| match &one.resource {
                Some(Inner::Deployment(one)) => Some(deployment::row(one)),
                _ => None,
            });
            print_table(&deployment::HEADER, rows.collect())
        }
        Kind::Node => print_table(
            &["NAME", "PHASE", "APPLIED", "ATTACH", "ADDRESSES", "LABELS", "AGE"],
            resources.iter().filter_map(node).map(node_row).collect(),
        ),
        Kind::Network => print_table(
            &["NAME", "PREFIXES", "SELECTOR", "MEMBERS", "READY", "REFUSED", "REVISION", "AGE"],
            resources.iter().filter_map(network).map(network_row).collect(),
        ),
        Kind::LoadBalancer => print_table(
            &[
                "NAME",
                "NETWORK",
                "ADDRESSES",
                "PORTS",
                "BACKENDS",
                "FLOWS",
                "APPLIED",
                "REVISION",
                "AGE",
            ],
            resources.iter().filter_map(balancer).map(balancer_row).collect(),
        ),
        Kind::FirewallPolicy | Kind::Unspecified => print_table(
            &[
                "NAME", "PRIORITY", "TARGET", "INGRESS", "EGRESS", "RULES", "APPLIED", "REVISION",
                "AGE",
            ],
            resources.iter().filter_map(policy).map(policy_row).collect(),
        ),
    }
}

fn node(resource: &Resource) -> Option<&Node> {
    match &resource.resource {
        Some(Inner::Node(node)) => Some(node),
        _ => None,
    }
}

fn policy(resource: &Resource) -> Option<&FirewallPolicy> {
    match &resource.resource {
        Some(Inner::FirewallPolicy(policy)) => Some(policy),
        _ => None,
    }
}

fn network(resource: &Resource) -> Option<&Network> {
    match &resource.resource {
        Some(Inner::Network(network)) => Some(network),
        _ => None,
    }
}

fn balancer(resource: &Resource) -> Option<&LoadBalancer> {
    match &resource.resource {
        Some(Inner::LoadBalancer(balancer)) => Some(balancer),
        _ => None,
    }
}

fn node_row(node: &Node) -> Vec<String> {
    let metadata = node.metadata.clone().unwrap_or_default();
    let status = node.status.clone().unwrap_or_default();
    let attached: Vec<_> = status
        .interfaces
        .iter()
        .map(|i| format!("{}:{}/{}", i.name, or_none(&i.ingress), or_none(&i.egress)))
        .collect();
    vec![
        metadata.name,
        phase_word(node),
        status.applied_revision.to_string(),
        or_none(attached.join(",")),
        or_none(status.addresses.join(",")),
        labels(&metadata.labels),
        age(metadata.create_time),
    ]
}

fn policy_row(policy: &FirewallPolicy) -> Vec<String> {
    let metadata = policy.metadata.clone().unwrap_or_default();
    let spec = policy.spec.clone().unwrap_or_default();
    let nodes = policy.status.as_ref().map_or(&[][..], |status| &status.nodes);
    let applied = nodes.iter().filter(|node| node.applied).count();
    vec![
        metadata.name,
        spec.priority.to_string(),
        labels(&spec.target),
        default_word(spec.default_ingress()).to_owned(),
        default_word(spec.default_egress()).to_owned(),
        spec.rules.len().to_string(),
        format!("{applied}/{}", nodes.len()),
        metadata.revision.to_string(),
        age(metadata.create_time),
    ]
}

fn network_row(network: &Network) -> Vec<String> {
    let metadata = network.metadata.clone().unwrap_or_default();
    let spec = network.spec.clone().unwrap_or_default();
    let status = network.status.clone().unwrap_or_default();
    // Without a key no tunnel leads there.
    let ready = status.members.iter().filter(|member| !member.public_key.is_empty()).count();
    vec![
        metadata.name,
        addresses(&spec.ipv4_prefix, &spec.ipv6_prefix),
        labels(&spec.members),
        status.members.len().to_string(),
        ready.to_string(),
        status.refused.len().to_string(),
        metadata.revision.to_string(),
        age(metadata.create_time),
    ]
}

fn balancer_row(balancer: &LoadBalancer) -> Vec<String> {
    let metadata = balancer.metadata.clone().unwrap_or_default();
    let spec = balancer.spec.clone().unwrap_or_default();
    let status = balancer.status.clone().unwrap_or_default();
    let backends = backends::of(&status);
    let applied = status.nodes.iter().filter(|node| node.applied).count();
    vec![
        metadata.name,
        spec.network,
        or_none(spec.addresses.join(",")),
        or_none(manifest::ports(&spec.ports)),
        format!("{}/{}", backends::active(&backends), backends.len()),
        backends::flows(&backends).to_string(),
        format!("{applied}/{}", status.nodes.len()),
        metadata.revision.to_string(),
        age(metadata.create_time),
    ]
}

/// The phase, and whether the VM is drained.
pub(crate) fn phase_word(node: &Node) -> String {
    let phase = node.status.as_ref().map_or(Phase::Unspecified, NodeStatus::phase);
    let draining = if is_draining(node) { ",Draining" } else { "" };
    format!("{}{draining}", manifest::phase(phase))
}

pub(crate) fn is_draining(node: &Node) -> bool {
    node.spec.is_some_and(|spec| spec.draining)
}

pub(crate) fn default_word(action: Action) -> &'static str {
    match action {
        Action::Unspecified => NONE,
        Action::Allow => "allow",
        Action::Deny => "deny",
        Action::Reject => "reject",
    }
}
