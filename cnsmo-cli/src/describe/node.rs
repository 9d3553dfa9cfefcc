use anyhow::Result;
use cnsmo_proto::{
    manifest,
    pb::{
        node::{DropCounter, Interface, Node, OverlayStatus, PeerStatus},
        resource::{Resource, resource::Resource as Inner},
    },
};

use super::{ago, describe_metadata, field, section};
use crate::{
    backends,
    get::phase_word,
    output::{name_of, or_none, size},
};

/// `balancers` are all there are.
pub(super) fn describe(node: &Node, balancers: &[Resource]) -> Result<()> {
    let status = node.status.clone().unwrap_or_default();
    describe_metadata(node.metadata.as_ref())?;
    field("Phase", &phase_word(node))?;
    field("Reason", &or_none(&status.reason))?;
    field("Message", &or_none(&status.message))?;
    field("Applied revision", &status.applied_revision.to_string())?;
    field("Last seen", &ago(status.last_seen_time))?;
    field("Addresses", &or_none(status.addresses.join(", ")))?;
    field("Kernel", &or_none(&status.kernel))?;
    field("Agent", &or_none(&status.agent_version))?;
    let programs: Vec<_> = status.program_ids.iter().map(ToString::to_string).collect();
    field("eBPF programs", &or_none(programs.join(", ")))?;
    let interface = |i: &Interface| vec![i.name.clone(), or_none(&i.ingress), or_none(&i.egress)];
    let interfaces = status.interfaces.iter().map(interface).collect();
    section("Interfaces", &["NAME", "INGRESS", "EGRESS"], interfaces)?;
    describe_overlay(status.overlay.as_ref())?;
    let name = node.metadata.clone().unwrap_or_default().name;
    let rows = balancers.iter().flat_map(|balancer| balancer_rows(balancer, &name)).collect();
    section("Balancers", &["NAME", "AS", "STATE", "FLOWS", "MESSAGE"], rows)?;
    let firewall = status.firewall.unwrap_or_default();
    field("Flows", &firewall.flows.to_string())?;
    field("Rules", &firewall.rules.to_string())?;
    let drop = |d: &DropCounter| {
        vec![d.reason.clone(), d.direction.clone(), d.packets.to_string(), d.bytes.to_string()]
    };
    let drops = firewall.drops.iter().map(drop).collect();
    section("Drops", &["REASON", "DIRECTION", "PACKETS", "BYTES"], drops)
}

fn describe_overlay(status: Option<&OverlayStatus>) -> Result<()> {
    let Some(status) = status.filter(|status| !status.network.is_empty()) else {
        return field("Network", "none");
    };
    field("Network", &status.network)?;
    let reason = match status.reason.as_str() {
        "" => String::new(),
        reason => format!(" ({reason})"),
    };
    field("Tunnel", &format!("{}{reason}", or_none(&status.backend)))?;
    field("Device", &format!("{}, MTU {}", or_none(&status.device), status.mtu))?;
    field("Public key", &or_none(manifest::public_key(&status.public_key)))?;
    let peer = |peer: &PeerStatus| {
        vec![
            peer.node.clone(),
            or_none(&peer.endpoint),
            ago(peer.last_handshake_time),
            size(peer.received_bytes),
            size(peer.sent_bytes),
        ]
    };
    let peers = status.peers.iter().map(peer).collect();
    section("Peers", &["NODE", "ENDPOINT", "HANDSHAKE", "RECEIVED", "SENT"], peers)
}

/// What the VM is to a balancer: one that balances, a backend, both or neither.
fn balancer_rows(balancer: &Resource, node: &str) -> Vec<Vec<String>> {
    let Some(Inner::LoadBalancer(inner)) = &balancer.resource else { return vec![] };
    let status = inner.status.clone().unwrap_or_default();
    let row = |role: &str, state: String, flows: u64, message: &str| {
        let name = name_of(balancer).to_owned();
        vec![name, role.to_owned(), state, flows.to_string(), or_none(message)]
    };
    let balances = status.nodes.iter().filter(|on| on.node == node).map(|on| {
        let state = if on.applied { "Applied" } else { "Not applied" }.to_owned();
        row("balancer", state, on.backends.iter().map(|b| b.flows).sum(), &on.message)
    });
    let seen = backends::of(&status);
    let backs = seen.iter().filter(|seen| seen.backend.node == node).map(|seen| {
        let (reason, message) = seen.why_not();
        let why = [reason, message].iter().filter(|t| !t.is_empty()).copied().collect::<Vec<_>>();
        let role = match seen.backend.instance.as_str() {
            "" => "backend".to_owned(),
            instance => format!("backend {instance}"),
        };
        row(&role, seen.state(), seen.flows(), &why.join(": "))
    });
    balances.chain(backs).collect()
}
