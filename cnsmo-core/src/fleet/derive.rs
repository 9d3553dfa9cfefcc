//! What all members of a network are sent: the network, its members, its balancers and their backends. And what one VM is
//! sent alone: the instances that it is to run.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use cnsmo_proto::{
    model::{Addresses, Backends, ENDPOINTS_MAX},
    pb::{
        catalog::Instance,
        deployment::instance::Goal,
        network::{Member, NetworkSpec},
        resource::Kind,
    },
};

use super::{
    BACKEND, BALANCER, Fleet, INSTANCE, Key, MEMBER, NETWORK, Revision, Set, Spec, Topic,
    behind::node_behind,
};
use crate::state::{Node, State};

/// An instance that shall end waits so long at most for the VMs that balance its service.
const LEAVE_MAX: Duration = Duration::from_secs(5);

/// What a balancer has in the set of its network.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) network: String,
    /// Keys of its backends.
    pub(super) backends: BTreeSet<String>,
}

impl Fleet {
    pub(super) fn network_changed(&mut self, name: &str, state: &State) {
        let key = format!("{NETWORK}{name}");
        match state.networks().get(name) {
            Some(network) => {
                // The members' records have the addresses.
                let spec = NetworkSpec {
                    addresses: Default::default(),
                    ..NetworkSpec::clone(&network.spec)
                };
                let revision = network.metadata.revision;
                self.publish(name, &key, revision, Spec::Network(Arc::new(spec)));
            }
            None => self.withdraw(name, &key),
        }
    }

    /// Port and prefixes are in the members' endpoints, the prefixes of all networks in those of all.
    pub(super) fn networks_changed(&mut self, state: &State) {
        for roster in state.networks().keys().filter_map(|network| state.roster(network)) {
            for node in &roster.members {
                self.publish_member(node, state);
            }
        }
    }

    pub(super) fn balancer_changed(&mut self, name: &str, state: &State) {
        let balancer = state.balancers().get(name);
        let network = balancer.map(|balancer| balancer.model.network.as_str());
        let backends = balancer.map(|balancer| self.behind(balancer, state)).unwrap_or_default();
        if let Some(old) = self.served.remove(name) {
            let stays = network == Some(old.network.as_str());
            for key in old.backends.iter().filter(|key| !stays || !backends.contains_key(*key)) {
                self.withdraw(&old.network, key);
            }
            if !stays {
                self.withdraw(&old.network, &format!("{BALANCER}{name}"));
            }
        }
        let Some(balancer) = balancer else { return };
        let spec = Spec::Balancer(balancer.spec.clone());
        let network = balancer.model.network.to_string();
        self.publish(&network, &format!("{BALANCER}{name}"), balancer.metadata.revision, spec);
        let keys = backends.keys().cloned().collect();
        for (key, backend) in backends {
            self.publish_derived(&network, &key, Spec::Backend(Arc::new(backend)));
        }
        self.changed.insert((Kind::LoadBalancer, name.to_owned()));
        self.served.insert(name.to_owned(), Served { network, backends: keys });
    }

    /// The balancers of a service have other backends now.
    pub(super) fn service_changed(&mut self, service: &str, state: &State) {
        for name in balancers_of(service, state) {
            self.balancer_changed(name, state);
        }
    }

    /// Ends the instances that no balancer gives new flows any more, and those that have waited for it long enough.
    pub fn let_go(&mut self, state: &State, now: Instant) {
        let is_due = |(name, since): &(&String, &Instant)| {
            now.saturating_duration_since(**since) > LEAVE_MAX || self.is_out(name, state)
        };
        let due: Vec<_> =
            self.leaving.iter().filter(is_due).map(|(name, _)| name.clone()).collect();
        for name in due {
            self.leaving.remove(&name);
            self.instances_changed(&name, state, state.revision(), false);
        }
    }

    /// All VMs that are here balance the service as they shall.
    fn is_out(&self, service: &str, state: &State) -> bool {
        balancers_of(service, state).all(|balancer| {
            let topic = Topic::balancer(balancer);
            let network = self.served.get(balancer).map_or("", |served| &served.network);
            let members = state.roster(network).into_iter().flat_map(|roster| &roster.members);
            let mut agents = members.filter_map(|node| self.agents.get(node));
            agents.all(|agent| !agent.is_connected() || agent.late || agent.applies(&topic))
        })
    }

    /// Takes over which instances of a deployment are on which VM.
    pub(super) fn deployment_changed(
        &mut self,
        name: &str,
        state: &State,
        before: Revision,
        now: Instant,
    ) {
        self.service_changed(name, state);
        let may_wait = balancers_of(name, state).next().is_some();
        if self.instances_changed(name, state, before, may_wait) {
            self.leaving.entry(name.to_owned()).or_insert(now);
        }
    }

    /// Returns whether some instance goes on for now that shall end: with `may_wait` those do that run until now.
    fn instances_changed(
        &mut self,
        name: &str,
        state: &State,
        before: Revision,
        may_wait: bool,
    ) -> bool {
        let mut any_waits = false;
        let mut old = self.placed.remove(name).unwrap_or_default();
        let mut placed = BTreeMap::new();
        let from = (name.to_owned(), String::new());
        let mine = state.placements().range(from..).take_while(|((of, _), _)| of == name);
        for (_, one) in mine {
            let key = format!("{INSTANCE}{name}/{}", one.instance.name);
            old.remove(&key);
            let spec = Spec::Instance(one.instance.clone());
            let known = self.catalog.get(&*key).map(|entry| &entry.spec);
            let runs = matches!(known, Some(Spec::Instance(known)) if known.goal() == Goal::Run);
            if may_wait && runs && !one.is_wanted() {
                any_waits = true;
            } else if known != Some(&spec) {
                let version = version_of(&spec.encode_to_vec());
                self.catalog.insert(Key::from(&*key), spec.into());
                self.want(one.node(), &key, Some(version), before);
            }
            placed.insert(key, one.node().to_owned());
        }
        for (key, node) in old {
            self.catalog.remove(&*key);
            self.want(&node, &key, None, before);
        }
        if !placed.is_empty() {
            self.placed.insert(name.to_owned(), placed);
        }
        any_waits
    }

    fn want(&mut self, node: &str, key: &str, version: Option<Revision>, before: Revision) {
        let Some(agent) = self.agents.get_mut(node) else { return };
        if agent.want(key, version, before) {
            self.changed.insert((Kind::Node, node.to_owned()));
            self.outbox.insert(node.to_owned());
        }
    }

    /// Takes over where a node is now, and what is derived from it.
    pub(super) fn place_changed(&mut self, name: &str, state: &State, before: Revision) {
        let place = state.member(name).map(|(_, network, _)| network);
        let old = self.agents.get(name).and_then(|agent| agent.network.as_deref());
        if old != place {
            self.withdraw_node(name);
            if let Some(agent) = self.agents.get_mut(name) {
                agent.network = place.map(ToOwned::to_owned);
                agent.backends.clear();
                match place {
                    // Told with the other members.
                    Some(network) => drop(self.stale.insert(network.to_owned())),
                    None => {
                        agent.share(&Set::default(), before);
                        self.outbox.insert(name.to_owned());
                    }
                }
            }
        }
        let Some((node, network, _)) = state.member(name) else { return };
        self.publish_member(name, state);
        for (balancer_name, balancer) in state.balancers() {
            if balancer.model.network.as_str() != network {
                continue;
            }
            let labels = match &balancer.model.backends {
                Backends::Nodes(labels) => labels,
                Backends::Service(service) => {
                    let is_here = |instance: &Arc<Instance>| instance.node == name;
                    if self.observed.instances(service.as_str()).any(is_here) {
                        self.balancer_changed(balancer_name, state);
                    }
                    continue;
                }
            };
            let Some(served) = self.served.get_mut(balancer_name) else { continue };
            let behind = node_behind(balancer, name, state);
            if let Some((key, backend)) = behind.filter(|_| labels.selects(&node.labels)) {
                served.backends.insert(key.clone());
                self.changed.insert((Kind::LoadBalancer, balancer_name.clone()));
                self.publish_derived(network, &key, Spec::Backend(Arc::new(backend)));
            } else {
                let key = backend_key(balancer_name, name, "");
                if served.backends.remove(&key) {
                    self.withdraw(network, &key);
                }
            }
        }
    }

    /// Takes all that is derived from a node out of the set of its network.
    pub(super) fn withdraw_node(&mut self, name: &str) {
        let agent = self.agents.get_mut(name);
        let Some(network) = agent.and_then(|agent| agent.network.take()) else { return };
        let mut left = Vec::new();
        let of = self.served.iter_mut().filter(|(_, served)| served.network == network);
        for (balancer, served) in of {
            let own = backend_key(balancer, name, "");
            let is_its = |key: &String| {
                key.strip_prefix(&own).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            };
            left.extend(served.backends.extract_if(.., |key| is_its(key)));
        }
        for key in left {
            self.withdraw(&network, &key);
        }
        self.withdraw(&network, &format!("{MEMBER}{network}/{name}"));
    }

    /// Gives all members of changed networks their new set.
    pub(super) fn tell_members(&mut self, state: &State, before: Revision) {
        for network in std::mem::take(&mut self.stale) {
            let Some(shared) = self.shared.get(&network) else { continue };
            for name in state.roster(&network).into_iter().flat_map(|roster| &roster.members) {
                let Some(agent) = self.agents.get_mut(name) else { continue };
                if agent.share(shared, before) {
                    self.changed.insert((Kind::Node, name.clone()));
                    self.outbox.insert(name.clone());
                }
            }
            if !state.networks().contains_key(&network) {
                self.shared.remove(&network);
            }
        }
    }

    fn publish_member(&mut self, name: &str, state: &State) {
        let Some((node, network, addresses)) = state.member(name) else { return };
        let Addresses { v4, v6 } = addresses;
        let member = Member {
            network: network.to_owned(),
            node: name.to_owned(),
            ipv4: v4.map(|address| address.to_string()).unwrap_or_default(),
            ipv6: v6.map(|address| address.to_string()).unwrap_or_default(),
            public_key: node.announcement.public_key.map(|key| key.0.to_vec()).unwrap_or_default(),
            endpoints: endpoints(node, network, state),
            labels: node.labels.as_map().clone(),
        };
        let key = format!("{MEMBER}{network}/{name}");
        self.publish_derived(network, &key, Spec::Member(Arc::new(member)));
    }

    fn publish_derived(&mut self, network: &str, key: &str, spec: Spec) {
        // What did not change keeps its version.
        if self.catalog.get(key).map(|entry| &entry.spec) != Some(&spec) {
            let version = version_of(&spec.encode_to_vec());
            self.publish(network, key, version, spec);
        }
    }

    fn publish(&mut self, network: &str, key: &str, version: Revision, spec: Spec) {
        let set = self.shared.entry(network.to_owned()).or_default();
        if set.put(key, Some(version)) {
            self.catalog.insert(Key::from(key), spec.into());
            self.set_changed(network);
        }
    }

    fn withdraw(&mut self, network: &str, key: &str) {
        if let Some(set) = self.shared.get_mut(network)
            && set.put(key, None)
        {
            self.catalog.remove(key);
            self.set_changed(network);
        }
    }

    fn set_changed(&mut self, network: &str) {
        self.stale.insert(network.to_owned());
        self.changed.insert((Kind::Network, network.to_owned()));
    }
}

/// Where the tunnel of a node may be reached. Not inside a tunnel: a packet to such an endpoint would need itself.
fn endpoints(node: &Node, network: &str, state: &State) -> Vec<String> {
    let Some(network) = state.networks().get(network) else { return Vec::new() };
    let inside =
        |address: IpAddr| state.networks().values().any(|network| network.model.contains(address));
    let addresses = node.announcement.addresses.iter().filter(|address| !inside(**address));
    let endpoint =
        |address: &IpAddr| SocketAddr::new(*address, network.model.listen_port).to_string();
    addresses.take(ENDPOINTS_MAX).map(endpoint).collect()
}

/// `instance`: none is the VM itself.
pub(super) fn backend_key(balancer: &str, node: &str, instance: &str) -> String {
    match instance {
        "" => format!("{BACKEND}{balancer}/{node}"),
        instance => format!("{BACKEND}{balancer}/{node}/{instance}"),
    }
}

fn balancers_of<'a>(service: &'a str, state: &'a State) -> impl Iterator<Item = &'a str> {
    let balancers = state.balancers().iter().filter(move |(_, balancer)| {
        let of = match &balancer.model.backends {
            Backends::Nodes(_) => None,
            Backends::Service(of) => Some(of.as_str()),
        };
        of == Some(service)
    });
    balancers.map(|(name, _)| name.as_str())
}

/// The first 63 bits of the SHA-256, but not 0.
pub(super) fn version_of(encoded: &[u8]) -> Revision {
    let hash = ring::digest::digest(&ring::digest::SHA256, encoded);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_ref()[..8]);
    (u64::from_be_bytes(first) >> 1).max(1).cast_signed()
}
