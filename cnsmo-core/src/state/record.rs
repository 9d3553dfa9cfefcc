//! How resources are kept in the store.

use std::{collections::BTreeSet, fmt::Write as _, sync::Arc};

use cnsmo_proto::{
    model::{self, Addresses, Deployment, Invalid, Labels, LoadBalancer, Name, Network},
    pb::{
        agent, balancer, deployment, identity,
        meta::Metadata,
        network,
        policy::FirewallPolicy,
        resource::{Change, Kind},
    },
};
use prost::Message;
use prost_types::Timestamp;

use super::{
    Announcement, Avoided, Entry, Membership, Node, Op, Placed, PolicyView, Remembered, Revision,
    Stored, StoredBalancer, StoredDeployment, StoredNetwork, StoredPolicy, TokenGrant, TokenRecord,
    Write,
};
use crate::{
    events::Seen,
    identity::{Enrolled, Grants, Role, from_ms, registry::IDENTITIES, to_ms},
};

const POLICIES: &str = "cnsmo/firewall-policies/";
const NETWORKS: &str = "cnsmo/networks/";
const BALANCERS: &str = "cnsmo/load-balancers/";
const DEPLOYMENTS: &str = "cnsmo/deployments/";
/// By deployment, then name.
const PLACEMENTS: &str = "cnsmo/placements/";
/// VMs that deployments avoid.
const AVOIDED: &str = "cnsmo/avoided/";
const NODES: &str = "cnsmo/nodes/";
/// A token's uses are below it, so they are read after it.
const TOKENS: &str = "cnsmo/tokens/";

const HISTORY: &str = "cnsmo/history/";

/// How the keys begin that make up the state; other keys are not its own.
pub const FOLDERS: [&str; 10] = [
    POLICIES,
    NETWORKS,
    BALANCERS,
    DEPLOYMENTS,
    PLACEMENTS,
    AVOIDED,
    NODES,
    TOKENS,
    IDENTITIES,
    HISTORY,
];
/// Those with the resources that a rollback is about.
pub const ROLLBACK_FOLDERS: [&str; 4] = [POLICIES, NETWORKS, BALANCERS, DEPLOYMENTS];

/// Revision 0 in the metadata: that of this put.
#[derive(Clone, PartialEq, Message)]
struct NodeRecord {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(bytes = "vec", tag = "2")]
    spki_sha256: Vec<u8>,
    #[prost(btree_map = "string, string", tag = "3")]
    token_labels: std::collections::BTreeMap<String, String>,
    #[prost(bool, tag = "4")]
    labels_by_operator: bool,
    #[prost(bool, tag = "5")]
    connected: bool,
    #[prost(bool, tag = "6")]
    draining: bool,
    #[prost(message, optional, tag = "7")]
    announcement: Option<agent::Announcement>,
    #[prost(message, optional, tag = "8")]
    membership: Option<MembershipRecord>,
}

/// Without an address: waits for one.
#[derive(Clone, PartialEq, Message)]
struct MembershipRecord {
    #[prost(string, tag = "1")]
    network: String,
    #[prost(string, tag = "2")]
    ipv4: String,
    #[prost(string, tag = "3")]
    ipv6: String,
}

#[derive(Clone, PartialEq, Message)]
struct JoinTokenRecord {
    #[prost(bytes = "vec", tag = "1")]
    secret_sha256: Vec<u8>,
    #[prost(uint64, tag = "2")]
    expire_ms: u64,
    #[prost(uint32, tag = "3")]
    uses_max: u32,
    #[prost(btree_map = "string, string", tag = "4")]
    labels: std::collections::BTreeMap<String, String>,
    #[prost(uint64, tag = "5")]
    create_ms: u64,
    #[prost(enumeration = "identity::Role", tag = "6")]
    role: i32,
    #[prost(string, tag = "7")]
    name: String,
    #[prost(string, repeated, tag = "8")]
    state_prefixes: Vec<String>,
    #[prost(string, repeated, tag = "9")]
    subjects: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct PlacementRecord {
    #[prost(message, optional, tag = "1")]
    instance: Option<deployment::Instance>,
    #[prost(bytes = "vec", tag = "2")]
    template: Vec<u8>,
    #[prost(uint64, tag = "3")]
    create_ms: u64,
    #[prost(uint64, tag = "4")]
    drain_ms: u64,
    #[prost(uint64, tag = "5")]
    fail_ms: u64,
}

#[derive(Clone, PartialEq, Message)]
struct AvoidedRecord {
    #[prost(bytes = "vec", tag = "1")]
    template: Vec<u8>,
    #[prost(uint64, tag = "2")]
    until_ms: u64,
    #[prost(uint32, tag = "3")]
    times: u32,
}

#[derive(Clone, PartialEq, Message)]
struct HistoryRecord {
    #[prost(uint64, tag = "1")]
    time_ms: u64,
    #[prost(string, tag = "2")]
    by: String,
    #[prost(string, tag = "3")]
    call: String,
    #[prost(message, repeated, tag = "4")]
    changes: Vec<Change>,
    #[prost(uint32, tag = "5")]
    changes_left_off: u32,
    #[prost(int64, tag = "6")]
    to_revision: Revision,
}

pub(super) fn op(write: &Write) -> Op {
    let put = |folder: &str, name: &str, value: Vec<u8>| Op::put(format!("{folder}{name}"), value);
    match write {
        Write::Policy(policy) => {
            put(POLICIES, &policy.metadata.name, FirewallPolicy::from(policy).encode_to_vec())
        }
        Write::Network(network) => {
            put(NETWORKS, &network.metadata.name, network::Network::from(network).encode_to_vec())
        }
        Write::Balancer(balancer) => {
            let value = balancer::LoadBalancer::from(balancer).encode_to_vec();
            put(BALANCERS, &balancer.metadata.name, value)
        }
        Write::Deployment(one) => {
            let value = deployment::Deployment::from(&**one).encode_to_vec();
            put(DEPLOYMENTS, &one.metadata.name, value)
        }
        Write::Place(placed) => {
            let (deployment, name) = placed.key();
            let record = placement_record(placed).encode_to_vec();
            put(PLACEMENTS, &format!("{deployment}/{name}"), record)
        }
        Write::Unplace(deployment, name) => {
            Op::Delete { key: format!("{PLACEMENTS}{deployment}/{name}") }
        }
        Write::Avoid(deployment, node, Avoided { template, until_ms, times }) => {
            let (until_ms, times) = (*until_ms, *times);
            let record = AvoidedRecord { template: template.to_vec(), until_ms, times };
            put(AVOIDED, &format!("{deployment}/{node}"), record.encode_to_vec())
        }
        Write::Forgive(deployment, node) => {
            Op::Delete { key: format!("{AVOIDED}{deployment}/{node}") }
        }
        Write::Node(node) => put(NODES, &node.metadata.name, node_record(node).encode_to_vec()),
        Write::Token(id, token) => put(TOKENS, id, token_record(token).encode_to_vec()),
        Write::Delete(kind, name) => Op::Delete { key: format!("{}{name}", folder(*kind)) },
        Write::TokenUse(id, spki) => put(TOKENS, &use_name(id, spki), spki.to_vec()),
        Write::DeleteTokenUse(id, spki) => {
            Op::Delete { key: format!("{TOKENS}{}", use_name(id, spki)) }
        }
        Write::DeleteToken(id) => Op::Delete { key: format!("{TOKENS}{id}") },
        Write::Remember(one) => put(HISTORY, &one.id, history_record(one).encode_to_vec()),
        Write::Forget(_, id) => Op::Delete { key: format!("{HISTORY}{id}") },
        Write::Identity(identity, enrolled) => put(IDENTITIES, identity, enrolled.encode()),
        Write::DeleteIdentity(identity) => Op::Delete { key: format!("{IDENTITIES}{identity}") },
    }
}

fn use_name(token: &str, spki_sha256: &[u8; 32]) -> String {
    let mut name = format!("{token}/");
    for byte in spki_sha256 {
        // Writing to a string does not fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}

fn folder(kind: Kind) -> &'static str {
    match kind {
        Kind::FirewallPolicy => POLICIES,
        Kind::Network => NETWORKS,
        Kind::LoadBalancer => BALANCERS,
        Kind::Deployment => DEPLOYMENTS,
        Kind::Node => NODES,
        Kind::Unspecified => "",
    }
}

pub(super) fn read(entry: &Entry) -> Result<Write, Invalid> {
    let value = entry.value.as_ref();
    if entry.key.starts_with(POLICIES) {
        return policy(decode(value)?).map(Write::Policy);
    }
    if entry.key.starts_with(NETWORKS) {
        return network(decode(value)?).map(Write::Network);
    }
    if entry.key.starts_with(BALANCERS) {
        return balancer(decode(value)?).map(Write::Balancer);
    }
    if entry.key.starts_with(DEPLOYMENTS) {
        return deployment(decode(value)?).map(|one| Write::Deployment(Box::new(one)));
    }
    if entry.key.starts_with(PLACEMENTS) {
        return placement(decode(value)?).map(|one| Write::Place(Box::new(one)));
    }
    if let Some((deployment, node)) =
        entry.key.strip_prefix(AVOIDED).and_then(|name| name.split_once('/'))
    {
        let AvoidedRecord { template, until_ms, times } = decode(value)?;
        let avoided = Avoided { template: hash(&template)?, until_ms, times };
        return Ok(Write::Avoid(deployment.to_owned(), node.to_owned(), avoided));
    }
    if entry.key.starts_with(NODES) {
        return node(decode(value)?).map(|node| Write::Node(Box::new(node)));
    }
    if let Some(name) = entry.key.strip_prefix(TOKENS) {
        if let Some((id, _)) = name.split_once('/') {
            return Ok(Write::TokenUse(id.to_owned(), hash(value)?));
        }
        return Ok(Write::Token(name.to_owned(), token(decode(value)?)?));
    }
    if let Some(id) = entry.key.strip_prefix(HISTORY) {
        return Ok(Write::Remember(Box::new(remembered(id, decode(value)?))));
    }
    if let Some(identity) = entry.key.strip_prefix(IDENTITIES) {
        return Ok(Write::Identity(identity.to_owned(), Box::new(Enrolled::decode(value)?)));
    }
    Err(Invalid::new("no resource of this kind is known: was it written by a newer version?"))
}

/// What an entry of the store, or of a deleted key, is about. None: nothing that is told of.
pub(crate) fn seen(entry: &Entry) -> Option<Seen> {
    let of = |folder: &str, kind| Some((kind, entry.key.strip_prefix(folder)?));
    let (kind, name) = of(POLICIES, "firewall-policy")
        .or_else(|| of(NETWORKS, "network"))
        .or_else(|| of(BALANCERS, "load-balancer"))
        .or_else(|| of(DEPLOYMENTS, "deployment"))
        .or_else(|| of(NODES, "node"))?;
    // All of these records begin with the metadata.
    let record = Headed::decode(entry.value.as_ref()).unwrap_or_default();
    let metadata = record.metadata.unwrap_or_default();
    let node = if kind == "node" { name.to_owned() } else { String::new() };
    let time = metadata.update_time;
    Some(Seen { kind, name: name.to_owned(), time, node, ..Seen::default() })
}

/// Who asked for the change that an entry of the history tells of, and when. None: it is no such entry.
pub(crate) fn asked(entry: &Entry) -> Option<(String, Timestamp)> {
    entry.key.strip_prefix(HISTORY)?;
    let record = HistoryRecord::decode(entry.value.as_ref()).ok()?;
    Some((record.by, from_ms(record.time_ms).ok()?.into()))
}

/// The beginning of every resource.
#[derive(Clone, PartialEq, Message)]
struct Headed {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
}

fn decode<M: Message + Default>(value: &[u8]) -> Result<M, Invalid> {
    M::decode(value).map_err(|e| Invalid::new(e.to_string()))
}

fn policy(record: FirewallPolicy) -> Result<StoredPolicy, Invalid> {
    let metadata = record.metadata.unwrap_or_default();
    let spec = record.spec.unwrap_or_default();
    let model = if spec.rules.iter().any(|rule| rule.from.is_some() || rule.to.is_some()) {
        model::FirewallPolicy::try_from(spec.clone()).map_err(|e| e.at("spec"))?.into()
    } else {
        let target = Labels::new(spec.target.clone()).map_err(|e| e.at("spec.target"))?;
        PolicyView { target, unresolved: None }
    };
    Ok(Stored { metadata, model, spec: Arc::new(spec) })
}

fn network(record: network::Network) -> Result<StoredNetwork, Invalid> {
    let metadata = record.metadata.unwrap_or_default();
    let spec = record.spec.unwrap_or_default();
    let model = Network::try_from(spec.clone()).map_err(|e| e.at("spec"))?;
    Ok(Stored { metadata, model, spec: Arc::new(spec) })
}

fn balancer(record: balancer::LoadBalancer) -> Result<StoredBalancer, Invalid> {
    let metadata = record.metadata.unwrap_or_default();
    let spec = record.spec.unwrap_or_default();
    let model = LoadBalancer::try_from(spec.clone()).map_err(|e| e.at("spec"))?;
    Ok(Stored { metadata, model, spec: Arc::new(spec) })
}

fn deployment(record: deployment::Deployment) -> Result<StoredDeployment, Invalid> {
    let metadata = record.metadata.unwrap_or_default();
    let spec = record.spec.unwrap_or_default();
    let model = Deployment::try_from(spec.clone()).map_err(|e| e.at("spec"))?;
    Ok(Stored { metadata, model, spec: Arc::new(spec) })
}

fn placement_record(placed: &Placed) -> PlacementRecord {
    PlacementRecord {
        instance: Some(deployment::Instance::clone(&placed.instance)),
        template: placed.template.to_vec(),
        create_ms: placed.create_ms,
        drain_ms: placed.drain_ms,
        fail_ms: placed.fail_ms,
    }
}

fn placement(record: PlacementRecord) -> Result<Placed, Invalid> {
    Ok(Placed {
        instance: Arc::new(record.instance.unwrap_or_default()),
        template: hash(&record.template)?,
        create_ms: record.create_ms,
        drain_ms: record.drain_ms,
        fail_ms: record.fail_ms,
    })
}

fn node_record(node: &Node) -> NodeRecord {
    NodeRecord {
        metadata: Some(node.metadata.clone()),
        spki_sha256: node.spki_sha256.to_vec(),
        token_labels: node.token_labels.as_map().clone(),
        labels_by_operator: node.labels_by_operator,
        connected: node.connected,
        draining: node.draining,
        announcement: node.announcement.public_key.map(|key| agent::Announcement {
            tunnel_public_key: key.0.to_vec(),
            addresses: node.announcement.addresses.iter().map(ToString::to_string).collect(),
        }),
        membership: node.membership.as_ref().map(membership_record),
    }
}

fn node(record: NodeRecord) -> Result<Node, Invalid> {
    let metadata = record.metadata.unwrap_or_default();
    let announcement = record.announcement.map(Announcement::try_from).transpose();
    let membership = record.membership.map(membership).transpose();
    Ok(Node {
        labels: Labels::new(metadata.labels.clone())?,
        metadata,
        token_labels: Labels::new(record.token_labels)?,
        labels_by_operator: record.labels_by_operator,
        spki_sha256: hash(&record.spki_sha256)?,
        connected: record.connected,
        draining: record.draining,
        announcement: announcement.map_err(|e| e.at("announcement"))?.unwrap_or_default(),
        membership: membership.map_err(|e| e.at("membership"))?,
    })
}

fn membership_record(membership: &Membership) -> MembershipRecord {
    let Addresses { v4, v6 } = membership.addresses.unwrap_or_default();
    MembershipRecord {
        network: membership.network.clone(),
        ipv4: v4.map(|address| address.to_string()).unwrap_or_default(),
        ipv6: v6.map(|address| address.to_string()).unwrap_or_default(),
    }
}

fn membership(record: MembershipRecord) -> Result<Membership, Invalid> {
    let addresses = Addresses {
        v4: address(&record.ipv4).map_err(|e| e.at("ipv4"))?,
        v6: address(&record.ipv6).map_err(|e| e.at("ipv6"))?,
    };
    let addresses = (addresses != Addresses::default()).then_some(addresses);
    Ok(Membership { network: record.network, addresses })
}

fn address<T: std::str::FromStr>(text: &str) -> Result<Option<T>, Invalid> {
    let parse = |text: &str| text.parse().map_err(|_| Invalid::new("is not an address"));
    (!text.is_empty()).then(|| parse(text)).transpose()
}

fn token_record(token: &TokenRecord) -> JoinTokenRecord {
    let TokenGrant { role, name, grants } = &token.grant;
    JoinTokenRecord {
        secret_sha256: token.secret_sha256.to_vec(),
        expire_ms: to_ms(token.expire_time),
        uses_max: token.uses_max,
        labels: token.labels.as_map().clone(),
        create_ms: to_ms(token.create_time),
        role: identity::Role::from(*role).into(),
        name: name.as_ref().map(ToString::to_string).unwrap_or_default(),
        state_prefixes: grants.state_prefixes.clone(),
        subjects: grants.subjects.clone(),
    }
}

fn token(record: JoinTokenRecord) -> Result<TokenRecord, Invalid> {
    let role = Role::try_from(record.role()).map_err(|e| e.at("role"))?;
    let name = (!record.name.is_empty()).then(|| Name::new(record.name)).transpose();
    let grants = Grants { state_prefixes: record.state_prefixes, subjects: record.subjects };
    Ok(TokenRecord {
        secret_sha256: hash(&record.secret_sha256)?,
        create_time: from_ms(record.create_ms)?,
        expire_time: from_ms(record.expire_ms)?,
        uses_max: record.uses_max,
        used_by: BTreeSet::new(),
        labels: Labels::new(record.labels)?,
        grant: TokenGrant { role, name: name.map_err(|e| e.at("name"))?, grants },
    })
}

fn history_record(one: &Remembered) -> HistoryRecord {
    HistoryRecord {
        time_ms: one.time_ms,
        by: one.by.clone(),
        call: one.call.clone(),
        changes: one.changes.clone(),
        changes_left_off: one.changes_left_off,
        to_revision: one.to_revision,
    }
}

fn remembered(id: &str, record: HistoryRecord) -> Remembered {
    Remembered {
        id: id.to_owned(),
        time_ms: record.time_ms,
        by: record.by,
        call: record.call,
        changes: record.changes,
        changes_left_off: record.changes_left_off,
        to_revision: record.to_revision,
    }
}

fn hash(bytes: &[u8]) -> Result<[u8; 32], Invalid> {
    bytes.try_into().map_err(|_| Invalid::new("a hash is not 32 bytes long"))
}
