mod balancer;
mod network;
mod node;

use std::io::{self, Write as _};

use anyhow::{Result, bail};
use cnsmo_proto::{
    manifest,
    model::{Labels, Name},
    pb::{
        meta::{Condition, Metadata},
        policy::{FirewallPolicy, FirewallRule, ResolvedPeer},
        resource::{Kind, resource::Resource as Inner},
    },
};

use crate::{
    args::Format,
    client::Client,
    deployment,
    get::{default_word, list, one, print_one},
    output::{age, labels, or_none, table},
};

pub(crate) async fn describe(
    client: &Client,
    format: Format,
    kind: Kind,
    name: Name,
) -> Result<()> {
    let resource = one(client, kind, name.to_string()).await?;
    if format != Format::Table {
        return print_one(format, &resource);
    }
    match &resource.resource {
        Some(Inner::Deployment(one)) => deployment::describe(one),
        Some(Inner::FirewallPolicy(policy)) => describe_policy(policy),
        Some(Inner::LoadBalancer(balancer)) => balancer::describe(balancer),
        Some(Inner::Network(network)) => network::describe(network),
        Some(Inner::Node(node)) => {
            let all = Labels::default();
            node::describe(node, &list(client, Kind::LoadBalancer, &all).await?)
        }
        None => bail!("the core sent a resource without content"),
    }
}

fn describe_policy(policy: &FirewallPolicy) -> Result<()> {
    let spec = policy.spec.clone().unwrap_or_default();
    describe_metadata(policy.metadata.as_ref())?;
    field("Target", &labels(&spec.target))?;
    field("Priority", &spec.priority.to_string())?;
    field("Mode", manifest::mode(spec.mode()))?;
    field("Default ingress", default_word(spec.default_ingress()))?;
    field("Default egress", default_word(spec.default_egress()))?;
    section(
        "Rules",
        &["NAME", "ACTION", "DIRECTION", "FROM", "TO", "MATCH"],
        spec.rules.iter().map(rule_row).collect(),
    )?;
    let status = policy.status.clone().unwrap_or_default();
    if !status.peers.is_empty() {
        let peer =
            |p: &ResolvedPeer| vec![p.rule.clone(), p.nodes.to_string(), p.cidrs.to_string()];
        section("Peers", &["RULE", "VMS", "CIDRS"], status.peers.iter().map(peer).collect())?;
    }
    let node = |n: &cnsmo_proto::pb::policy::NodePolicyStatus| {
        vec![n.node.clone(), yes(n.applied), or_none(&n.message)]
    };
    let nodes = status.nodes.iter().map(node).collect();
    section("VMs", &["NODE", "APPLIED", "MESSAGE"], nodes)?;
    let counters = status.nodes.iter().flat_map(|node| {
        node.rules.iter().map(|c| {
            let last = c.last_hit_time.map_or_else(|| or_none(""), |time| age(Some(time)));
            let (packets, bytes) = (c.packets.to_string(), c.bytes.to_string());
            vec![node.node.clone(), c.rule.clone(), packets, bytes, last]
        })
    });
    let header = ["NODE", "RULE", "PACKETS", "BYTES", "LAST HIT"];
    section("Counters", &header, counters.collect())?;
    describe_conditions(&status.conditions)
}

fn rule_row(rule: &FirewallRule) -> Vec<String> {
    vec![
        rule.name.clone(),
        manifest::action_text(rule),
        manifest::direction(rule.direction()).to_owned(),
        manifest::side_of(&rule.from_cidrs, rule.from.as_ref()),
        manifest::side_of(&rule.to_cidrs, rule.to.as_ref()),
        manifest::traffic(rule),
    ]
}

pub(crate) fn describe_metadata(metadata: Option<&Metadata>) -> Result<()> {
    let metadata = metadata.cloned().unwrap_or_default();
    field("Name", &metadata.name)?;
    field("UID", &or_none(&metadata.uid))?;
    field("Labels", &labels(&metadata.labels))?;
    field("Revision", &metadata.revision.to_string())?;
    field("Generation", &metadata.generation.to_string())?;
    field("Age", &age(metadata.create_time))
}

pub(crate) fn describe_conditions(conditions: &[Condition]) -> Result<()> {
    let condition = |c: &Condition| {
        let status = c.status().as_str_name().trim_start_matches("STATUS_").to_lowercase();
        vec![c.r#type.clone(), status, or_none(&c.reason), or_none(&c.message)]
    };
    let conditions = conditions.iter().map(condition).collect();
    section("Conditions", &["TYPE", "STATUS", "REASON", "MESSAGE"], conditions)
}

pub(crate) fn field(name: &str, value: &str) -> Result<()> {
    writeln!(io::stdout(), "{:<18}{value}", format!("{name}:"))?;
    Ok(())
}

pub(crate) fn section(name: &str, header: &[&str], rows: Vec<Vec<String>>) -> Result<()> {
    if rows.is_empty() {
        return field(name, "none");
    }
    writeln!(io::stdout(), "{name}:\n{}", table(header, rows, "  "))?;
    Ok(())
}

fn ago(time: Option<prost_types::Timestamp>) -> String {
    if time.is_none() { "never".to_owned() } else { format!("{} ago", age(time)) }
}

fn yes(is: bool) -> String {
    if is { "yes" } else { "no" }.to_owned()
}
