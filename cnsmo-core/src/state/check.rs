//! Rules between resources, checked on the state as a request would leave it: what it brings together may come in any order.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use cnsmo_proto::{
    model::{Labels, LoadBalancer, Name, Network, cycle},
    pb::resource::Kind,
};
use ipnet::IpNet;
use prost::Message;

use super::{
    BALANCERS_MAX, DEPLOYMENTS_MAX, NETWORKS_MAX, PLACEMENTS_MAX, POLICIES_MAX, SPEC_BYTES_MAX,
    State, Stored, StoredBalancer, StoredDeployment, StoredNetwork, StoredPolicy, Write,
};
use crate::error::Error;

/// Services that cores and agents are made of: the catalogue has them already.
const OWN_SERVICES: [&str; 9] = [
    "agent",
    "vpn",
    "firewall",
    "loadbalancer",
    "state",
    "bus",
    "catalogue",
    "orchestrator",
    "identity",
];

/// Policies, networks and balancers after a plan, by name.
pub(super) struct Next<'a> {
    pub(super) policies: BTreeMap<&'a str, &'a StoredPolicy>,
    pub(super) networks: BTreeMap<&'a str, &'a StoredNetwork>,
    pub(super) balancers: BTreeMap<&'a str, &'a StoredBalancer>,
    deployments: BTreeMap<&'a str, &'a StoredDeployment>,
}

impl<'a> Next<'a> {
    pub(super) fn new(state: &'a State, writes: &'a [Write]) -> Self {
        let mut next = Self {
            policies: by_name(&state.policies),
            networks: by_name(&state.networks),
            balancers: by_name(&state.balancers),
            deployments: by_name(&state.deployments),
        };
        for write in writes {
            match write {
                Write::Policy(one) => drop(next.policies.insert(&one.metadata.name, one)),
                Write::Network(one) => drop(next.networks.insert(&one.metadata.name, one)),
                Write::Balancer(one) => drop(next.balancers.insert(&one.metadata.name, one)),
                Write::Delete(Kind::FirewallPolicy, name) => {
                    next.policies.remove(name.as_str());
                }
                Write::Deployment(one) => {
                    next.deployments.insert(&one.metadata.name, one);
                }
                Write::Delete(Kind::Deployment, name) => {
                    next.deployments.remove(name.as_str());
                }
                Write::Delete(Kind::Network, name) => drop(next.networks.remove(name.as_str())),
                Write::Delete(Kind::LoadBalancer, name) => {
                    next.balancers.remove(name.as_str());
                }
                Write::Delete(..)
                | Write::Place(_)
                | Write::Unplace(..)
                | Write::Avoid(..)
                | Write::Forgive(..)
                | Write::Node(_)
                | Write::Token(..)
                | Write::TokenUse(..)
                | Write::DeleteToken(_)
                | Write::DeleteTokenUse(..)
                | Write::Identity(..)
                | Write::DeleteIdentity(_)
                | Write::Remember(_)
                | Write::Forget(..) => {}
            }
        }
        next
    }

    /// The network that a node with these labels is in: the first by name that selects it.
    pub(super) fn home(&self, labels: &Labels) -> Option<(&'a str, &'a Network)> {
        let mut all = self.networks.iter().map(|(name, network)| (*name, &network.model));
        all.find(|(_, network)| network.members.selects(labels))
    }

    /// All virtual addresses.
    pub(super) fn virtual_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.balancers.values().flat_map(|balancer| balancer.model.addresses.iter().copied())
    }

    /// Refuses what breaks a rule. `writes` are those that lead here.
    pub(super) fn check(&self, state: &State, writes: &[Write]) -> Result<(), Error> {
        if writes.iter().any(Write::is_object) {
            self.check_limits()?;
        }
        if writes.iter().any(Write::is_overlay) {
            self.check_overlap()?;
            self.check_networks_in_use(state)?;
            self.check_balancers()?;
        }
        if writes.iter().any(|write| matches!(write, Write::Deployment(_))) {
            self.check_deployments()?;
        }
        Ok(())
    }

    fn check_limits(&self) -> Result<(), Error> {
        let counts = [
            ("firewall policies", self.policies.len(), POLICIES_MAX),
            ("networks", self.networks.len(), NETWORKS_MAX),
            ("load balancers", self.balancers.len(), BALANCERS_MAX),
            ("deployments", self.deployments.len(), DEPLOYMENTS_MAX),
        ];
        for (what, count, max) in counts {
            if count > max {
                let why = format!("{count} {what}; at most {max} are allowed");
                return Err(Error::Exhausted(why));
            }
        }
        let bytes = bytes(&self.policies)
            + bytes(&self.networks)
            + bytes(&self.balancers)
            + bytes(&self.deployments);
        if bytes > SPEC_BYTES_MAX {
            return Err(Error::Exhausted(format!(
                "all specs together take {bytes} bytes; at most {SPEC_BYTES_MAX} are allowed"
            )));
        }
        Ok(())
    }

    fn check_deployments(&self) -> Result<(), Error> {
        let all = self.deployments.values();
        let instances: u64 = all.map(|one| u64::from(one.model.replicas)).sum();
        if instances > PLACEMENTS_MAX as u64 {
            let why = format!("{instances} instances in all; at most {PLACEMENTS_MAX} are allowed");
            return Err(Error::Exhausted(why));
        }
        if let Some(name) = self.deployments.keys().find(|name| OWN_SERVICES.contains(name)) {
            let why = "is the name of a service of our own";
            return Err(Error::Invalid(format!("Deployment {name}: metadata.name: {why}")));
        }
        let needs = self.deployments.iter().map(|(name, one)| {
            (*name, one.model.needs.iter().map(|need| need.service.as_str()).collect())
        });
        let Some(circle) = cycle(&needs.collect()) else { return Ok(()) };
        let (name, circle) = (circle[0], circle.join(" needs "));
        Err(Error::Invalid(format!("Deployment {name}: spec.needs: a circle: {circle}")))
    }

    fn check_overlap(&self) -> Result<(), Error> {
        let all: Vec<(&str, IpNet)> = self
            .networks
            .iter()
            .flat_map(|(name, one)| one.model.prefixes().map(move |prefix| (*name, prefix)))
            .collect();
        for (n, (name, prefix)) in all.iter().enumerate() {
            let overlaps =
                |(_, other): &&(&str, IpNet)| prefix.contains(other) || other.contains(prefix);
            if let Some((other, prefix_of_other)) = all[..n].iter().find(overlaps) {
                let field = if prefix.addr().is_ipv4() { "ipv4" } else { "ipv6" };
                return Err(Error::Invalid(format!(
                    "Network {name}: spec.{field}: {prefix} overlaps {prefix_of_other} of Network {other}"
                )));
            }
        }
        Ok(())
    }

    /// A network that balancers use stays.
    fn check_networks_in_use(&self, state: &State) -> Result<(), Error> {
        for (name, balancer) in &self.balancers {
            let network = balancer.model.network.as_str();
            if state.networks.contains_key(network) && !self.networks.contains_key(network) {
                let why = format!("Network {network}: is used by LoadBalancer {name}");
                return Err(Error::Invalid(why));
            }
        }
        Ok(())
    }

    fn check_balancers(&self) -> Result<(), Error> {
        let fixed: HashMap<IpAddr, &Name> =
            self.networks.values().flat_map(|network| static_addresses(&network.model)).collect();
        let mut taken = BTreeMap::new();
        for (name, balancer) in &self.balancers {
            let refused = |field: &str, why: String| {
                Error::Invalid(format!("LoadBalancer {name}: spec.{field}: {why}"))
            };
            let balancer = &balancer.model;
            let network = balancer.network.as_str();
            let Some(network) = self.networks.get(network) else {
                return Err(refused("network", format!("there is no Network {network}")));
            };
            for (n, address) in balancer.addresses.iter().enumerate() {
                let refused = |why| refused(&format!("addresses[{n}]"), why);
                self.check_address(network, balancer, *address).map_err(refused)?;
                if let Some(node) = fixed.get(address) {
                    return Err(refused(format!("{address} is the static address of Node {node}")));
                }
                for port in &balancer.ports {
                    let service = (*address, port.protocol, port.port);
                    if let Some(other) = taken.insert(service, name) {
                        let port = port.port;
                        return Err(refused(format!(
                            "port {port} of {address} is that of LoadBalancer {other}, with the same protocol"
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    fn check_address(
        &self,
        network: &StoredNetwork,
        balancer: &LoadBalancer,
        address: IpAddr,
    ) -> Result<(), String> {
        let (name, network) = (&network.metadata.name, &network.model);
        let (family, has_family) = match address {
            IpAddr::V4(_) => ("IPv4", network.ipv4.is_some()),
            IpAddr::V6(_) => ("IPv6", network.ipv6.is_some()),
        };
        if !has_family {
            return Err(format!("Network {name} has no {family}"));
        }
        if network.contains(address) {
            let usable = network.usable(address);
            return usable.then_some(()).ok_or_else(|| {
                format!("{address} is the first or last address of Network {name}")
            });
        }
        let other = self.networks.iter().find(|(_, other)| other.model.contains(address));
        if let Some((other, _)) = other {
            return Err(format!("{address} is an address of Network {other}"));
        }
        if balancer.gateways.is_none() {
            return Err(format!(
                "{address} is not within Network {name}, and without gateways nobody serves it"
            ));
        }
        Ok(())
    }
}

/// Addresses that the spec gives to nodes, and to which.
fn static_addresses(network: &Network) -> impl Iterator<Item = (IpAddr, &Name)> {
    let all = network.addresses.iter();
    all.flat_map(|(node, addresses)| addresses.iter().map(move |address| (address, node)))
}

impl Write {
    /// It changes what operators write as a whole.
    fn is_object(&self) -> bool {
        matches!(self, Self::Policy(_) | Self::Network(_) | Self::Balancer(_) | Self::Deployment(_))
    }

    /// It changes who is in which network, or which addresses are free.
    pub(super) fn is_overlay(&self) -> bool {
        let kinds = [Kind::Network, Kind::LoadBalancer];
        match self {
            Self::Network(_) | Self::Balancer(_) => true,
            Self::Delete(kind, _) => kinds.contains(kind),
            Self::Policy(_)
            | Self::Deployment(_)
            | Self::Place(_)
            | Self::Unplace(..)
            | Self::Avoid(..)
            | Self::Forgive(..)
            | Self::Node(_)
            | Self::Token(..)
            | Self::TokenUse(..)
            | Self::DeleteToken(_)
            | Self::DeleteTokenUse(..)
            | Self::Identity(..)
            | Self::DeleteIdentity(_)
            | Self::Remember(_)
            | Self::Forget(..) => false,
        }
    }
}

fn by_name<T>(all: &BTreeMap<String, T>) -> BTreeMap<&str, &T> {
    all.iter().map(|(name, one)| (name.as_str(), one)).collect()
}

fn bytes<S: Message, M>(all: &BTreeMap<&str, &Stored<S, M>>) -> usize {
    all.values().map(|one| one.spec.encoded_len()).sum()
}
