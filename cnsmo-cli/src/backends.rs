//! The backends of a balancer, as the VMs that balance see them together.

use cnsmo_proto::pb::balancer::{Backend, BackendStatus, LoadBalancerStatus};

use crate::output::addresses;

/// One backend and what is said of it.
pub(crate) struct Seen<'a> {
    pub(crate) backend: &'a Backend,
    /// By the VM that balances.
    pub(crate) by: Vec<(&'a str, &'a BackendStatus)>,
}

impl Seen<'_> {
    /// VMs that give it new flows.
    pub(crate) fn active(&self) -> usize {
        self.by.iter().filter(|(_, status)| status.active).count()
    }

    /// Active of some, of others not.
    pub(crate) fn differs(&self) -> bool {
        (1..self.by.len()).contains(&self.active())
    }

    /// What all that see it say, or how many of them give it new flows.
    pub(crate) fn state(&self) -> String {
        match (self.active(), self.by.len()) {
            (_, 0) => "Unknown".to_owned(),
            (0, _) => "Inactive".to_owned(),
            (active, all) if active == all => "Active".to_owned(),
            (active, all) => format!("Active on {active} of {all}"),
        }
    }

    pub(crate) fn flows(&self) -> u64 {
        self.by.iter().map(|(_, status)| status.flows).sum()
    }

    /// The first that explains why it is not active.
    pub(crate) fn why_not(&self) -> (&str, &str) {
        let bad = self.by.iter().find(|(_, status)| !status.active);
        match bad {
            Some((_, status)) => (&status.reason, &status.message),
            None if self.backend.draining => ("Draining", &self.backend.message),
            None => ("", ""),
        }
    }

    /// Name of the VM, and of the instance there if it is one.
    pub(crate) fn name(&self) -> String {
        match self.backend.instance.as_str() {
            "" => self.backend.node.clone(),
            instance => format!("{}/{instance}", self.backend.node),
        }
    }

    /// Of the overlay; with the port of an instance.
    pub(crate) fn addresses(&self) -> String {
        let Backend { ipv4, ipv6, port, .. } = self.backend;
        let at = |address: &str| match (address, port) {
            ("", _) | (_, 0) => address.to_owned(),
            (address, port) if address.contains(':') => format!("[{address}]:{port}"),
            (address, port) => format!("{address}:{port}"),
        };
        addresses(&at(ipv4), &at(ipv6))
    }
}

/// Each backend with what is said of it, by name.
pub(crate) fn of(status: &LoadBalancerStatus) -> Vec<Seen<'_>> {
    let seen = |backend| Seen { backend, by: views(status, backend) };
    status.backends.iter().map(seen).collect()
}

/// What the VMs that balance say of one backend; it is none of their own.
fn views<'a>(status: &'a LoadBalancerStatus, of: &Backend) -> Vec<(&'a str, &'a BackendStatus)> {
    let is_it = |said: &&BackendStatus| (&said.node, &said.instance) == (&of.node, &of.instance);
    let said = |node: &'a cnsmo_proto::pb::balancer::NodeBalancerStatus| {
        let backend = node.backends.iter().find(is_it)?;
        Some((node.node.as_str(), backend))
    };
    status.nodes.iter().filter_map(said).collect()
}

/// Backends to which each VM that sees them gives new flows.
pub(crate) fn active(backends: &[Seen<'_>]) -> usize {
    backends.iter().filter(|seen| !seen.by.is_empty() && seen.active() == seen.by.len()).count()
}

/// Live flows to all of them.
pub(crate) fn flows(backends: &[Seen<'_>]) -> u64 {
    backends.iter().map(Seen::flows).sum()
}
