use anyhow::Result;
use cnsmo_proto::{
    manifest,
    model::Labels,
    pb::{
        node::Node,
        policy::{Action, FirewallPolicy},
        resource::{GetRequest, Kind, ListRequest, Resource, resource::Resource as Inner},
    },
};

use crate::{
    args::{Format, GetArgs},
    client::{Client, refused},
    output::{NONE, age, labels, manifests, or_none, print_json, print_table, print_yaml},
};

pub(crate) async fn get(client: &Client, format: Format, args: GetArgs) -> Result<()> {
    let kind = args.kind.into();
    match args.name {
        None => list(client, format, kind, &args.selector).await,
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
    list(client, format, Kind::Node, &selector).await
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

async fn list(client: &Client, format: Format, kind: Kind, selector: &Labels) -> Result<()> {
    let request = ListRequest { kind: kind.into(), labels: selector.as_map().clone() };
    let response = client.resources().await?.list(request).await.map_err(refused)?.into_inner();
    match format {
        Format::Table => print_rows(kind, &response.resources),
        Format::Json => print_json(&manifests(&response.resources)),
        Format::Yaml => {
            for (n, manifest) in manifests(&response.resources).iter().enumerate() {
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
        Kind::Node => print_table(
            &["NAME", "PHASE", "APPLIED", "ATTACH", "ADDRESSES", "LABELS", "AGE"],
            resources.iter().filter_map(node).map(node_row).collect(),
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
        manifest::phase(status.phase()).to_owned(),
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

pub(crate) fn default_word(action: Action) -> &'static str {
    match action {
        Action::Unspecified => NONE,
        Action::Allow => "allow",
        Action::Deny => "deny",
    }
}
