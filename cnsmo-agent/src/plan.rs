//! From the resources of this VM to what its tunnel, its data path and its health checks shall do.
//!
//! Pure: nothing here touches disk, kernel or network.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use cnsmo_proto::model::{
    Action, Addresses, Backend, Direction, HealthCheck, LoadBalancer, Member, Name, Network,
    PortRange, Protocol, Rule, protocol,
};
use ipnet::IpNet;

use crate::{
    desired::{DesiredSet, Key},
    effective::{BackendTarget, Balancer, Effective},
    health::{Check, Checks, Subject, View},
    tunnel::{Peer, TunnelConfig},
};

/// Names of built-in rules.
const CORE_RULE: &str = "core";
const TUNNEL_RULE: &str = "tunnel";
const HEALTH_RULE: &str = "health";
const FAILSAFE_RULE: &str = "failsafe";

/// What one VM shall do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// For the data path. The tunnel device is not in it yet: it may still have to be made.
    pub effective: Effective,
    /// For the tunnel; `None`: this VM is in no network.
    pub tunnel: Option<TunnelConfig>,
    /// Of all balancers in `effective`.
    pub checks: Checks,
    /// Resources that this VM cannot follow as it is now, and why.
    pub blocked: BTreeMap<Key, String>,
}

/// A backend as this VM sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendState {
    /// Where it is.
    pub target: BackendTarget,
    /// Why it gets no new flows; `None`: it does.
    pub idle: Option<Idle>,
    /// What the last health check met; empty: nothing worth telling.
    pub message: String,
}

/// Why a backend gets no new flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// The core said so: its VM or its instance shall get none, or is not ready.
    Draining,
    /// Its health checks fail, or did not succeed yet where those of others did.
    Unhealthy,
}

impl Idle {
    /// The stable word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Draining => "Draining",
            Self::Unhealthy => "Unhealthy",
        }
    }
}

/// What stays open whatever the defaults of policies are.
#[derive(Clone, Debug, Default)]
pub struct Always<'a> {
    /// Where the core is: towards it, whatever the rules are.
    pub core: &'a [SocketAddr],
    /// TCP ports of this VM, each unless a rule names it.
    pub ports: Vec<u16>,
}

/// A network and the place of this VM in it.
struct Membership<'a> {
    name: &'a Name,
    network: &'a Network,
    own: &'a Member,
}

impl Plan {
    /// What the VM called `node` shall do. It has joined no network before it has a name.
    pub fn new(set: &DesiredSet, node: Option<&Name>, always: &Always<'_>, health: &View) -> Self {
        let membership = Membership::find(set, node);
        let backends = membership.iter().flat_map(|m| m.balancers(set)).collect::<Vec<_>>();
        let mut built_in: Vec<_> = core_rule(always.core).into_iter().collect();
        built_in.extend(always.ports.iter().filter_map(|port| failsafe_rule(*port, set)));
        if let Some(membership) = &membership {
            built_in.extend(tunnel_rules(membership.network.listen_port));
            built_in.extend(health_rules(&backends));
        }
        let mut effective = Effective::merge(built_in, set.policies());
        effective.balancers = backends.iter().map(|b| b.effective(health)).collect();
        Self {
            effective,
            tunnel: membership.as_ref().map(|m| m.tunnel(set)),
            checks: backends.iter().flat_map(Balanced::checks).collect(),
            blocked: blocked(set, membership.as_ref()),
        }
    }
}

/// The balancers of [`Plan::new`] alone.
pub fn balancers(set: &DesiredSet, node: Option<&Name>, health: &View) -> Vec<Balancer> {
    let membership = Membership::find(set, node);
    membership.iter().flat_map(|m| m.balancers(set)).map(|b| b.effective(health)).collect()
}

/// Each balancer's backends other than this VM, by name.
pub fn backends(
    set: &DesiredSet,
    node: Option<&Name>,
    health: &View,
) -> BTreeMap<Name, Vec<BackendState>> {
    let membership = Membership::find(set, node);
    let balancers = membership.iter().flat_map(|m| m.balancers(set));
    balancers.map(|b| (b.name.clone(), b.states(health))).collect()
}

fn blocked(set: &DesiredSet, membership: Option<&Membership<'_>>) -> BTreeMap<Key, String> {
    let other = |network: &Name| membership.is_none_or(|m| m.name != network);
    let networks = set.networks().filter(|(name, _)| other(name)).map(|(name, _)| {
        (Key::Network(name.clone()), "this VM has no address in the network".to_owned())
    });
    let balancers = set.balancers().filter(|(_, balancer)| other(&balancer.network));
    let balancers = balancers.map(|(name, balancer)| {
        let why = format!("needs network `{}`, which this VM is not in", balancer.network);
        (Key::LoadBalancer(name.clone()), why)
    });
    networks.chain(balancers).collect()
}

impl<'a> Membership<'a> {
    /// A VM is in one network at most: the first that has a record of it.
    fn find(set: &'a DesiredSet, node: Option<&Name>) -> Option<Self> {
        let own = |name| set.member(name, node?);
        set.networks().find_map(|(name, network)| Some(Self { name, network, own: own(name)? }))
    }

    fn tunnel(&self, set: &DesiredSet) -> TunnelConfig {
        let others = set.members().filter(|m| m.network == *self.name && m.node != self.own.node);
        let peers = others.filter_map(|member| {
            // Nobody can be a peer of itself: WireGuard refuses its own key.
            let key = member.public_key.filter(|key| Some(*key) != self.own.public_key)?;
            let (node, endpoints) = (member.node.clone(), member.endpoints.clone());
            Some((key, Peer { node, addresses: member.addresses, endpoints }))
        });
        TunnelConfig {
            network: self.name.clone(),
            addresses: self.own.addresses,
            prefixes: self.network.prefixes().collect(),
            listen_port: self.network.listen_port,
            mtu: self.network.mtu,
            peers: peers.collect(),
        }
    }

    fn balancers(&self, set: &'a DesiredSet) -> Vec<Balanced<'a>> {
        let mut backends: BTreeMap<&Name, Vec<&Backend>> = BTreeMap::new();
        for backend in set.backends().filter(|backend| backend.node != self.own.node) {
            backends.entry(&backend.load_balancer).or_default().push(backend);
        }
        let ours = set.balancers().filter(|(_, balancer)| balancer.network == *self.name);
        let balanced = |(name, spec): (&'a Name, &'a LoadBalancer)| Balanced {
            name,
            spec,
            gateway: spec.gateways.as_ref().is_some_and(|g| g.selects(&self.own.labels)),
            backends: backends.remove(name).unwrap_or_default(),
        };
        ours.map(balanced).collect()
    }
}

/// A balancer with its backends, this VM left out.
struct Balanced<'a> {
    name: &'a Name,
    spec: &'a LoadBalancer,
    gateway: bool,
    backends: Vec<&'a Backend>,
}

impl Balanced<'_> {
    fn effective(&self, health: &View) -> Balancer {
        let active = self.states(health).into_iter().filter(|state| state.idle.is_none());
        Balancer {
            name: self.name.clone(),
            addresses: self.spec.addresses.clone(),
            ports: self.spec.ports.clone(),
            algorithm: self.spec.algorithm,
            gateway: self.gateway,
            backends: active.map(|state| state.target).collect(),
        }
    }

    /// New flows go to the backends whose checks succeed. A backend without a verdict is used only where there is none
    /// that is known to be healthy: a balancer that has just begun must not refuse everything until its first checks are
    /// over, and a backend that was just added must not get flows that others serve before it has answered once.
    fn states(&self, health: &View) -> Vec<BackendState> {
        let verdict = |backend: &Backend| health.get(&self.subject(backend));
        let healthy = |backend: &&&Backend| {
            !backend.draining && verdict(backend).is_some_and(|verdict| verdict.healthy)
        };
        let any_healthy = self.backends.iter().any(|backend| healthy(&backend));
        let state = |backend: &&Backend| {
            let verdict = self.spec.health.is_some().then(|| verdict(backend));
            let (usable, message) = match verdict {
                None => (true, ""),
                Some(Some(verdict)) => (verdict.healthy, verdict.message.as_str()),
                Some(None) => (!any_healthy, "not checked yet"),
            };
            let idle = match (backend.draining, usable) {
                (true, _) => Some(Idle::Draining),
                (false, false) => Some(Idle::Unhealthy),
                (false, true) => None,
            };
            let target = BackendTarget {
                node: backend.node.clone(),
                instance: backend.instance.clone(),
                addresses: backend.addresses,
                port: backend.port,
            };
            // A draining backend is not checked any more.
            let message = if backend.draining { &backend.message } else { message };
            BackendState { target, idle, message: message.to_owned() }
        };
        self.backends.iter().map(state).collect()
    }

    fn checks(&self) -> Vec<(Subject, Check)> {
        let Some(how) = self.spec.health else { return Vec::new() };
        let check = |backend: &&Backend| {
            let port = check_port(how, backend);
            let addresses = served(&self.spec.addresses, backend.addresses);
            let addresses = addresses.map(|address| SocketAddr::new(address, port)).collect();
            (self.subject(backend), Check { addresses, how })
        };
        self.backends.iter().filter(|backend| !backend.draining).map(check).collect()
    }

    fn subject(&self, backend: &Backend) -> Subject {
        let Backend { node, instance, .. } = backend;
        let (node, instance) = (node.clone(), instance.clone());
        Subject { balancer: self.name.clone(), node, instance }
    }
}

/// Where a backend is checked.
fn check_port(how: HealthCheck, backend: &Backend) -> u16 {
    if how.port == 0 { backend.port } else { how.port }
}

/// Addresses of a backend in the families of the virtual addresses: where flows may go.
fn served(virtual_addresses: &[IpAddr], backend: Addresses) -> impl Iterator<Item = IpAddr> {
    backend.iter().filter(|a| virtual_addresses.iter().any(|v| v.is_ipv4() == a.is_ipv4()))
}

/// A rule without networks would match any, so there is none without addresses.
fn core_rule(core: &[SocketAddr]) -> Option<Rule> {
    let port = port(core.first()?.port());
    let to = core.iter().map(|address| IpNet::from(address.ip())).collect();
    allow(CORE_RULE, Direction::Egress, to, tcp(port))
}

/// A port that a rule names is left to the rules: who writes of it means it. A rule for all ports names none.
fn failsafe_rule(number: u16, set: &DesiredSet) -> Option<Rule> {
    let names = |rule: &Rule| match &rule.protocol {
        Protocol::Ports { number: protocol::TCP, destination, .. } => {
            let has = |range: &PortRange| (range.first()..=range.last()).contains(&number);
            let is_all = |range: &PortRange| range.first() <= 1 && range.last() == u16::MAX;
            destination.iter().any(|range| has(range) && !is_all(range))
        }
        _ => false,
    };
    let inwards = |rule: &&Rule| rule.direction == Direction::Ingress;
    let mut rules = set.policies().flat_map(|(_, policy)| &policy.rules).filter(inwards);
    if rules.any(names) {
        return None;
    }
    allow(FAILSAFE_RULE, Direction::Ingress, Vec::new(), tcp(port(number)))
}

/// Peers may be anywhere and move; what is sent from the tunnel's port is the tunnel's. The rules stay the same when
/// members come and go, so that policies are not compiled again for each of them.
fn tunnel_rules(listen_port: u16) -> impl Iterator<Item = Rule> {
    let udp = |source, destination| Protocol::Ports { number: protocol::UDP, source, destination };
    let port = || port(listen_port);
    let ingress = allow(TUNNEL_RULE, Direction::Ingress, Vec::new(), udp(Vec::new(), port()));
    let egress = allow(TUNNEL_RULE, Direction::Egress, Vec::new(), udp(port(), Vec::new()));
    ingress.into_iter().chain(egress)
}

/// One per port. A draining backend stays in, so that a drain changes no rule.
fn health_rules(balancers: &[Balanced<'_>]) -> impl Iterator<Item = Rule> {
    let mut ports: BTreeMap<u16, Vec<IpNet>> = BTreeMap::new();
    for balanced in balancers {
        let Some(how) = balanced.spec.health else { continue };
        for backend in &balanced.backends {
            let addresses = served(&balanced.spec.addresses, backend.addresses);
            let port = check_port(how, backend);
            ports.entry(port).or_default().extend(addresses.map(IpNet::from));
        }
    }
    ports.into_iter().filter_map(|(number, mut to)| {
        to.sort_unstable();
        to.dedup();
        if to.is_empty() {
            return None;
        }
        allow(HEALTH_RULE, Direction::Egress, to, tcp(port(number)))
    })
}

fn allow(name: &str, direction: Direction, to: Vec<IpNet>, protocol: Protocol) -> Option<Rule> {
    let name = Name::new(name).ok()?;
    Some(Rule { to, protocol, ..Rule::new(name, Action::Allow, direction) })
}

fn tcp(destination: Vec<PortRange>) -> Protocol {
    Protocol::Ports { number: protocol::TCP, source: Vec::new(), destination }
}

fn port(number: u16) -> Vec<PortRange> {
    PortRange::new(number, number).into_iter().collect()
}

#[cfg(test)]
mod tests;
