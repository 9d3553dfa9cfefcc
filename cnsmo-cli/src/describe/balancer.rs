use std::time::Duration;

use anyhow::Result;
use cnsmo_proto::{
    manifest,
    pb::balancer::{HealthCheck, LoadBalancer, NodeBalancerStatus},
};

use super::{describe_conditions, describe_metadata, field, section, yes};
use crate::{
    backends::{self, Seen},
    output::{NONE, labels, or_none},
};

pub(super) fn describe(balancer: &LoadBalancer) -> Result<()> {
    let spec = balancer.spec.clone().unwrap_or_default();
    let status = balancer.status.clone().unwrap_or_default();
    describe_metadata(balancer.metadata.as_ref())?;
    field("Network", &or_none(&spec.network))?;
    field("Addresses", &or_none(spec.addresses.join(", ")))?;
    field("Ports", &or_none(manifest::ports(&spec.ports)))?;
    match spec.service.as_str() {
        "" => field("Selector", &labels(&spec.backends))?,
        service => field("Service", service)?,
    }
    let gateways = match &spec.gateways {
        None => "none".to_owned(),
        Some(all) if all.labels.is_empty() => "every member".to_owned(),
        Some(selector) => labels(&selector.labels),
    };
    field("Gateways", &gateways)?;
    field("Algorithm", manifest::algorithm(spec.algorithm()))?;
    field("Health check", &spec.health.as_ref().map_or("none".to_owned(), check))?;
    let seen = backends::of(&status);
    section(
        "Backends",
        &["BACKEND", "ADDRESSES", "STATE", "REASON", "FLOWS", "MESSAGE"],
        seen.iter().map(backend_row).collect(),
    )?;
    if seen.iter().any(Seen::differs) {
        section(
            "Seen differently",
            &["BACKEND", "FROM", "ACTIVE", "REASON", "FLOWS", "MESSAGE"],
            seen.iter().filter(|seen| seen.differs()).flat_map(view_rows).collect(),
        )?;
    }
    section(
        "Balancing VMs",
        &["NODE", "APPLIED", "ACTIVE", "FLOWS", "MESSAGE"],
        status.nodes.iter().map(node_row).collect(),
    )?;
    describe_conditions(&status.conditions)
}

fn check(check: &HealthCheck) -> String {
    let time = |time: Option<prost_types::Duration>| {
        let time = time.and_then(|time| Duration::try_from(time).ok());
        time.map_or(NONE.to_owned(), |time| format!("{time:?}"))
    };
    let (interval, timeout) = (time(check.interval), time(check.timeout));
    let HealthCheck { port, fall, rise, .. } = check;
    let port = match port {
        0 => "of each".to_owned(),
        port => port.to_string(),
    };
    format!("tcp {port} every {interval}, timeout {timeout}, fall {fall}, rise {rise}")
}

fn backend_row(seen: &Seen<'_>) -> Vec<String> {
    let (reason, message) = seen.why_not();
    vec![
        seen.name(),
        seen.addresses(),
        seen.state(),
        or_none(reason),
        seen.flows().to_string(),
        or_none(message),
    ]
}

fn view_rows(seen: &Seen<'_>) -> Vec<Vec<String>> {
    let row = |(from, status): &(&str, &cnsmo_proto::pb::balancer::BackendStatus)| {
        vec![
            seen.name(),
            (*from).to_owned(),
            yes(status.active),
            or_none(&status.reason),
            status.flows.to_string(),
            or_none(&status.message),
        ]
    };
    seen.by.iter().map(row).collect()
}

fn node_row(node: &NodeBalancerStatus) -> Vec<String> {
    let active = node.backends.iter().filter(|backend| backend.active).count();
    vec![
        node.node.clone(),
        yes(node.applied),
        format!("{active}/{}", node.backends.len()),
        node.backends.iter().map(|backend| backend.flows).sum::<u64>().to_string(),
        or_none(&node.message),
    ]
}
