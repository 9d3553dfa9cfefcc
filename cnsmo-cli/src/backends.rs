//! The backends of a balancer, as the VMs that balance see them together.

use cnsmo_proto::pb::balancer::{Backend, BackendStatus, LoadBalancerStatus};

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
            None if self.backend.draining => ("Draining", ""),
            None => ("", ""),
        }
    }
}

/// Each backend with what is said of it, by name.
pub(crate) fn of(status: &LoadBalancerStatus) -> Vec<Seen<'_>> {
    let seen = |backend| Seen { backend, by: views(status, &backend.node) };
    status.backends.iter().map(seen).collect()
}

/// What the VMs that balance say of one backend; it is none of their own.
fn views<'a>(status: &'a LoadBalancerStatus, of: &str) -> Vec<(&'a str, &'a BackendStatus)> {
    let said = |node: &'a cnsmo_proto::pb::balancer::NodeBalancerStatus| {
        let backend = node.backends.iter().find(|backend| backend.node == of)?;
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
