//! Rules about VMs by their labels or by a service of theirs: the addresses that they stand for are what agents are sent.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use cnsmo_proto::{
    model::{Addresses, Direction, FirewallPolicy, Labels, PEERS_MAX, Peer, RESOLVED_MAX, Rule},
    pb::{
        catalog::Phase,
        policy::{FirewallPolicySpec, ResolvedPeer},
        resource::Kind,
    },
};
use ipnet::IpNet;
use prost::Message as _;

use super::{Fleet, Key, POLICY, Revision, Spec, derive::version_of};
use crate::state::{Membership, Node, State, StoredPolicy};

/// What became of a policy whose rules have peers.
#[derive(Debug, PartialEq)]
pub(super) struct Resolved {
    /// Of what agents are sent.
    pub(super) version: Revision,
    /// Per rule with a peer.
    pub(super) peers: Vec<ResolvedPeer>,
    /// Its peers stand for more than fits. Agents are sent it as it is written, which they refuse: what they had stays in
    /// force, also when another core takes over.
    pub(super) refused: Option<String>,
    /// The catalogue was looked at for all of its services. Otherwise it is not sent.
    pub(super) is_known: bool,
    /// That its rules ask for.
    labels: BTreeSet<Labels>,
    services: BTreeSet<String>,
}

/// What a peer stands for.
struct Stand {
    nodes: u32,
    /// Each address once, neighbours as one prefix.
    networks: Vec<IpNet>,
}

impl Fleet {
    /// Policies with peers are resolved once, when all of a commit is known.
    pub(super) fn policy_edited(&mut self, name: &str, state: &State, before: Revision) {
        let policy = state.policies().get(name);
        if policy.is_some_and(|policy| policy.model.unresolved.is_some()) {
            self.unsettled.insert(name.to_owned());
        } else {
            self.policy_changed(name, state, before);
        }
    }

    /// A node comes, goes, or has other labels or addresses. `labels`: old and new ones.
    pub(super) fn unsettle_peers(&mut self, node: &str, labels: &[&Labels]) {
        let is_on_it = |service: &String| {
            self.observed.instances(service).any(|instance| instance.node == node)
        };
        let concerned = self.resolved.iter().filter(|(_, resolved)| {
            let selects = |wanted: &Labels| labels.iter().any(|labels| wanted.selects(labels));
            resolved.labels.iter().any(selects) || resolved.services.iter().any(is_on_it)
        });
        self.unsettled.extend(concerned.map(|(name, _)| name.clone()));
    }

    /// Something is new about the instances of these services, or they were looked at for the first time.
    pub(super) fn unsettle_services(&mut self, services: &BTreeSet<String>) {
        let concerned = self
            .resolved
            .iter()
            .filter(|(_, resolved)| !resolved.is_known || !resolved.services.is_disjoint(services));
        self.unsettled.extend(concerned.map(|(name, _)| name.clone()));
    }

    /// Resolves what may stand for something else, and tells those whose rules it changes.
    pub(super) fn settle_policies(&mut self, state: &State, before: Revision) {
        for name in std::mem::take(&mut self.unsettled) {
            self.policy_changed(&name, state, before);
        }
    }

    /// Makes a policy what agents are sent of it. Returns its version.
    pub(super) fn publish_policy(&mut self, policy: &StoredPolicy, state: &State) -> Revision {
        let name = &policy.metadata.name;
        let key = Key::from(format!("{POLICY}{name}"));
        let Some(model) = &policy.model.unresolved else {
            self.resolved.remove(name);
            self.catalog.insert(key, Spec::Policy(policy.spec.clone()).into());
            return policy.metadata.revision;
        };
        let mut peers = Vec::new();
        let (spec, refused) = match self.resolve(model, state, &mut peers) {
            Ok(spec) => (spec.into(), None),
            Err(why) => (policy.spec.clone(), Some(why)),
        };
        let (labels, services) = wanted(model);
        let is_known = services.iter().all(|service| self.observed.knows(service));
        let mut content = spec.encode_to_vec();
        if !is_known {
            // What no VM has: none enforces it before it is known what it stands for, also if that will be the same.
            content.push(0);
        }
        let version = version_of(&content);
        let old = self.resolved.get(name);
        // What did not change keeps its version.
        if old.map(|old| old.version) != Some(version) {
            self.catalog.insert(key, Spec::Policy(spec).into());
        }
        let resolved = Resolved { version, peers, refused, is_known, labels, services };
        if old != Some(&resolved) {
            self.changed.insert((Kind::FirewallPolicy, name.clone()));
            self.resolved.insert(name.clone(), resolved);
        }
        version
    }

    /// What agents would be sent of a policy, its peers being what they are now.
    pub fn as_sent(&self, spec: Arc<FirewallPolicySpec>, state: &State) -> Arc<FirewallPolicySpec> {
        if spec.rules.iter().all(|rule| rule.from.is_none() && rule.to.is_none()) {
            return spec;
        }
        let Ok(policy) = FirewallPolicy::try_from(FirewallPolicySpec::clone(&spec)) else {
            return spec;
        };
        self.resolve(&policy, state, &mut Vec::new()).map_or(spec, Arc::new)
    }

    /// A policy with networks in place of peers. A rule whose peer has no address stays, and matches nothing: what it names,
    /// such as a failsafe port, it still names.
    fn resolve(
        &self,
        policy: &FirewallPolicy,
        state: &State,
        peers: &mut Vec<ResolvedPeer>,
    ) -> Result<FirewallPolicySpec, String> {
        let mut known: BTreeMap<&Peer, Stand> = BTreeMap::new();
        let mut room = RESOLVED_MAX;
        let mut rules = Vec::with_capacity(policy.rules.len());
        for (n, rule) in policy.rules.iter().enumerate() {
            let Some(peer) = &rule.peer else {
                rules.push(rule.clone());
                continue;
            };
            let stand = known.entry(peer).or_insert_with(|| self.stand(peer, state));
            let fits = |network: &&IpNet| rule.is_for(network.addr().is_ipv4());
            let networks: Vec<_> = stand.networks.iter().filter(fits).copied().collect();
            let cidrs = u32::try_from(networks.len()).unwrap_or(u32::MAX);
            peers.push(ResolvedPeer { rule: rule.name.to_string(), nodes: stand.nodes, cidrs });
            let refused = |max: usize, of: &str| {
                let nodes = stand.nodes;
                Err(format!(
                    "rules[{n}] ({}): {cidrs} CIDRs of {nodes} VMs; {of} takes at most {max}: name prefixes in place of them",
                    rule.name
                ))
            };
            if networks.len() > PEERS_MAX {
                return refused(PEERS_MAX, "a rule");
            }
            match room.checked_sub(networks.len()) {
                Some(left) => room = left,
                None => return refused(RESOLVED_MAX, "a policy with all of its peers"),
            }
            rules.push(with(rule, networks));
        }
        let FirewallPolicy { target, priority, defaults, mode, timeouts, orphan_fragments, .. } =
            policy;
        Ok((&FirewallPolicy {
            target: target.clone(),
            priority: *priority,
            defaults: *defaults,
            mode: *mode,
            rules,
            timeouts: *timeouts,
            orphan_fragments: *orphan_fragments,
        })
            .into())
    }

    fn stand(&self, peer: &Peer, state: &State) -> Stand {
        let nodes: BTreeMap<&String, &Node> = match peer {
            Peer::Labels(labels) => self.selected(state, labels, "").collect(),
            Peer::Service(service) => {
                let instances = self.observed.instances(service.as_str());
                let there = instances.filter(|instance| is_there(instance.phase()));
                there.filter_map(|instance| state.nodes().get_key_value(&instance.node)).collect()
            }
            Peer::Nobody => BTreeMap::new(),
        };
        let all = nodes.values().flat_map(|node| addresses(node, state));
        let all: BTreeSet<IpAddr> = all.collect();
        let networks = all.into_iter().map(IpNet::from).collect();
        let nodes = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
        Stand { nodes, networks: IpNet::aggregate(&networks) }
    }
}

fn wanted(policy: &FirewallPolicy) -> (BTreeSet<Labels>, BTreeSet<String>) {
    let (mut labels, mut services) = (BTreeSet::new(), BTreeSet::new());
    for peer in policy.rules.iter().filter_map(|rule| rule.peer.as_ref()) {
        match peer {
            Peer::Labels(wanted) => {
                labels.insert(wanted.clone());
            }
            Peer::Service(service) => {
                services.insert(service.to_string());
            }
            Peer::Nobody => {}
        }
    }
    (labels, services)
}

fn with(rule: &Rule, networks: Vec<IpNet>) -> Rule {
    let peer = networks.is_empty().then_some(Peer::Nobody);
    let mut rule = Rule { peer, ..rule.clone() };
    match rule.direction {
        Direction::Ingress => rule.from = networks,
        Direction::Egress => rule.to = networks,
    }
    rule
}

/// Whether an instance may have connections: one that starts asks others before it is ready, one that drains ends what it
/// has, one that is silent towards the core need not be so towards others.
fn is_there(phase: Phase) -> bool {
    match phase {
        Phase::Starting | Phase::Ready | Phase::Degraded | Phase::Unreachable | Phase::Draining => {
            true
        }
        Phase::Unspecified | Phase::Installing | Phase::Stopped | Phase::Failed | Phase::Lost => {
            false
        }
    }
}

/// In its network, as the core has given them, and outside of all networks, as its agent says.
fn addresses(node: &Node, state: &State) -> impl Iterator<Item = IpAddr> {
    let member = node.membership.as_ref().and_then(|Membership { addresses, .. }| *addresses);
    let inside =
        |address: IpAddr| state.networks().values().any(|network| network.model.contains(address));
    let announced = node.announcement.addresses.iter().copied();
    let announced = announced.filter(move |address| !inside(*address));
    member.into_iter().flat_map(Addresses::iter).chain(announced)
}
