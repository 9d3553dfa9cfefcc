//! Which instances of a service are behind a balancer, and which of them get new flows.

use std::collections::BTreeMap;

use cnsmo_proto::{
    model::{Addresses, Backends, protocol},
    pb::{
        balancer::Backend,
        catalog::{Endpoint, Instance, Phase},
    },
};

use super::{Fleet, State, derive::backend_key};
use crate::state::{Node, StoredBalancer};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Gets new flows.
    Ready,
    /// Gets them if none is ready: better a backend that may not answer than none.
    Spare,
    /// Keeps what it has.
    Leaving,
}

impl Fleet {
    /// What is behind a balancer, by the keys under which its network's members know it.
    pub(super) fn behind(
        &self,
        balancer: &StoredBalancer,
        state: &State,
    ) -> BTreeMap<String, Backend> {
        match &balancer.model.backends {
            Backends::Nodes(labels) => {
                let nodes = self.selected(state, labels, "");
                nodes.filter_map(|(node, _)| node_behind(balancer, node, state)).collect()
            }
            Backends::Service(service) => self.instances_behind(balancer, service.as_str(), state),
        }
    }

    fn instances_behind(
        &self,
        balancer: &StoredBalancer,
        service: &str,
        state: &State,
    ) -> BTreeMap<String, Backend> {
        let mut behind: Vec<(Standing, Backend)> = Vec::new();
        for instance in self.observed.instances(service) {
            let Some((node, addresses)) = member(balancer, &instance.node, state) else { continue };
            let Some(port) = port(balancer, &instance.endpoints) else { continue };
            let placement = (service.to_owned(), instance.name.clone());
            let placed = state.placements().get(&placement);
            let shall_end = node.draining || placed.is_some_and(|placed| !placed.is_wanted());
            let Some(standing) = standing(instance, shall_end, balancer) else { continue };
            let backend = Backend {
                instance: instance.name.clone(),
                port: port.into(),
                message: match standing {
                    Standing::Spare => why_spare(instance),
                    Standing::Ready | Standing::Leaving => String::new(),
                },
                ..backend(balancer, &instance.node, addresses)
            };
            behind.push((standing, backend));
        }
        let any_ready = behind.iter().any(|(standing, _)| *standing == Standing::Ready);
        let behind = behind.into_iter().map(|(standing, mut backend)| {
            backend.draining = match standing {
                Standing::Ready => false,
                Standing::Spare => any_ready,
                Standing::Leaving => true,
            };
            (backend_key(&balancer.metadata.name, &backend.node, &backend.instance), backend)
        });
        behind.collect()
    }
}

/// A VM behind a balancer, if it is in its network.
pub(super) fn node_behind(
    balancer: &StoredBalancer,
    name: &str,
    state: &State,
) -> Option<(String, Backend)> {
    let (node, addresses) = member(balancer, name, state)?;
    let backend = Backend { draining: node.draining, ..backend(balancer, name, addresses) };
    Some((backend_key(&balancer.metadata.name, name, ""), backend))
}

fn member<'a>(
    balancer: &StoredBalancer,
    node: &str,
    state: &'a State,
) -> Option<(&'a Node, Addresses)> {
    let (node, network, addresses) = state.member(node)?;
    (network == balancer.model.network.as_str()).then_some((node, addresses))
}

fn backend(balancer: &StoredBalancer, node: &str, Addresses { v4, v6 }: Addresses) -> Backend {
    Backend {
        load_balancer: balancer.metadata.name.clone(),
        node: node.to_owned(),
        ipv4: v4.map(|address| address.to_string()).unwrap_or_default(),
        ipv6: v6.map(|address| address.to_string()).unwrap_or_default(),
        ..Backend::default()
    }
}

/// The instance's own port, 0 if the balancer asks for none; `None`: the instance announces none of the protocol.
fn port(balancer: &StoredBalancer, endpoints: &[Endpoint]) -> Option<u16> {
    let Some(asks) = balancer.model.ports.iter().find(|port| port.target_port == 0) else {
        return Some(0);
    };
    let is_udp = asks.protocol == protocol::UDP;
    let fits = |endpoint: &&Endpoint| {
        endpoint.port > 0 && endpoint.protocol.eq_ignore_ascii_case("udp") == is_udp
    };
    endpoints.iter().find(fits).and_then(|endpoint| endpoint.port.try_into().ok())
}

/// `None`: it cannot have flows, or has lost them.
fn standing(instance: &Instance, shall_end: bool, balancer: &StoredBalancer) -> Option<Standing> {
    let standing = match instance.phase() {
        Phase::Ready => Standing::Ready,
        // Silent towards the core. Whether it answers those that need it, a health check knows better.
        Phase::Unreachable if balancer.model.health.is_some() => Standing::Ready,
        Phase::Degraded | Phase::Unreachable => Standing::Spare,
        Phase::Draining => Standing::Leaving,
        Phase::Unspecified
        | Phase::Installing
        | Phase::Starting
        | Phase::Stopped
        | Phase::Failed
        | Phase::Lost => return None,
    };
    Some(if shall_end { Standing::Leaving } else { standing })
}

fn why_spare(instance: &Instance) -> String {
    let what = match instance.phase() {
        Phase::Unreachable => "the instance is unreachable",
        _ => "the instance is degraded",
    };
    match instance.reason.as_str() {
        "" => what.to_owned(),
        reason => format!("{what}: {reason}"),
    }
}
