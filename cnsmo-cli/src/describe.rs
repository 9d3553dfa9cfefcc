use std::io::{self, Write as _};

use anyhow::{Result, bail};
use cnsmo_proto::{
    manifest,
    model::Name,
    pb::{
        meta::Metadata,
        node::Node,
        policy::{FirewallPolicy, FirewallRule},
        resource::{Kind, resource::Resource as Inner},
    },
};

use crate::{
    args::Format,
    client::Client,
    get::{default_word, one, print_one},
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
        Some(Inner::FirewallPolicy(policy)) => describe_policy(policy),
        Some(Inner::Node(node)) => describe_node(node),
        None => bail!("the core sent a resource without content"),
    }
}

fn describe_policy(policy: &FirewallPolicy) -> Result<()> {
    let spec = policy.spec.clone().unwrap_or_default();
    describe_metadata(policy.metadata.as_ref())?;
    field("Target", &labels(&spec.target))?;
    field("Priority", &spec.priority.to_string())?;
    field("Default ingress", default_word(spec.default_ingress()))?;
    field("Default egress", default_word(spec.default_egress()))?;
    section(
        "Rules",
        &["NAME", "ACTION", "DIRECTION", "FROM", "TO", "MATCH"],
        spec.rules.iter().map(rule_row).collect(),
    )?;
    let status = policy.status.clone().unwrap_or_default();
    let node = |n: &cnsmo_proto::pb::policy::NodePolicyStatus| {
        vec![n.node.clone(), yes(n.applied), or_none(&n.message)]
    };
    let nodes = status.nodes.iter().map(node).collect();
    section("VMs", &["NODE", "APPLIED", "MESSAGE"], nodes)?;
    let counters = status.nodes.iter().flat_map(|node| {
        node.rules.iter().map(|c| {
            vec![node.node.clone(), c.rule.clone(), c.packets.to_string(), c.bytes.to_string()]
        })
    });
    section("Counters", &["NODE", "RULE", "PACKETS", "BYTES"], counters.collect())?;
    let condition = |c: &cnsmo_proto::pb::meta::Condition| {
        let status = c.status().as_str_name().trim_start_matches("STATUS_").to_lowercase();
        vec![c.r#type.clone(), status, or_none(&c.reason), or_none(&c.message)]
    };
    let conditions = status.conditions.iter().map(condition).collect();
    section("Conditions", &["TYPE", "STATUS", "REASON", "MESSAGE"], conditions)
}

fn rule_row(rule: &FirewallRule) -> Vec<String> {
    let any = |list: &[String]| {
        if list.is_empty() { "any".to_owned() } else { list.join(",") }
    };
    vec![
        rule.name.clone(),
        default_word(rule.action()).to_owned(),
        manifest::direction(rule.direction()).to_owned(),
        any(&rule.from_cidrs),
        any(&rule.to_cidrs),
        manifest::traffic(rule),
    ]
}

fn describe_node(node: &Node) -> Result<()> {
    let status = node.status.clone().unwrap_or_default();
    describe_metadata(node.metadata.as_ref())?;
    field("Phase", manifest::phase(status.phase()))?;
    field("Reason", &or_none(&status.reason))?;
    field("Message", &or_none(&status.message))?;
    field("Applied revision", &status.applied_revision.to_string())?;
    field("Last seen", &ago(status.last_seen_time))?;
    field("Addresses", &or_none(status.addresses.join(", ")))?;
    field("Kernel", &or_none(&status.kernel))?;
    field("Agent", &or_none(&status.agent_version))?;
    let interface = |i: &cnsmo_proto::pb::node::Interface| {
        vec![i.name.clone(), or_none(&i.ingress), or_none(&i.egress)]
    };
    let interfaces = status.interfaces.iter().map(interface).collect();
    section("Interfaces", &["NAME", "INGRESS", "EGRESS"], interfaces)?;
    let firewall = status.firewall.unwrap_or_default();
    field("Flows", &firewall.flows.to_string())?;
    field("Rules", &firewall.rules.to_string())?;
    let drop = |d: &cnsmo_proto::pb::node::DropCounter| {
        vec![d.reason.clone(), d.direction.clone(), d.packets.to_string(), d.bytes.to_string()]
    };
    let drops = firewall.drops.iter().map(drop).collect();
    section("Drops", &["REASON", "DIRECTION", "PACKETS", "BYTES"], drops)
}

fn describe_metadata(metadata: Option<&Metadata>) -> Result<()> {
    let metadata = metadata.cloned().unwrap_or_default();
    field("Name", &metadata.name)?;
    field("UID", &or_none(&metadata.uid))?;
    field("Labels", &labels(&metadata.labels))?;
    field("Revision", &metadata.revision.to_string())?;
    field("Generation", &metadata.generation.to_string())?;
    field("Age", &age(metadata.create_time))
}

fn field(name: &str, value: &str) -> Result<()> {
    writeln!(io::stdout(), "{:<18}{value}", format!("{name}:"))?;
    Ok(())
}

fn section(name: &str, header: &[&str], rows: Vec<Vec<String>>) -> Result<()> {
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
