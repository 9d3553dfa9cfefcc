//! The services of a VM. Each looks after a part of what the enforcer enforces; while one of them does not run, its part
//! stays as tunnel and data path have it, and the parts of the others go on to change.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use clap::ValueEnum;

use crate::desired::{DesiredSet, Key};

/// A service, and what is its to look after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Part {
    /// Networks with their members: the tunnel.
    Vpn,
    /// Policies: rules, and the flows that they let through.
    Firewall,
    /// Balancers with their backends, and health checks.
    #[value(name = "loadbalancer")]
    LoadBalancer,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Vpn, Self::Firewall, Self::LoadBalancer];

    /// Name of the service.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vpn => "vpn",
            Self::Firewall => "firewall",
            Self::LoadBalancer => "loadbalancer",
        }
    }

    /// None: it is the services' own that run as processes.
    fn of(key: &Key) -> Option<Self> {
        Some(match key {
            Key::Instance(..) => return None,
            Key::Network(_) | Key::Member(..) => Self::Vpn,
            Key::FirewallPolicy(_) => Self::Firewall,
            Key::LoadBalancer(_) | Key::Backend(..) => Self::LoadBalancer,
        })
    }
}

const FOLLOWED: u8 = 0;
const HELD: u8 = 1;
const ABSENT: u8 = 2;

/// Which parts follow what the core sends. Clones share it.
#[derive(Clone, Debug)]
pub struct Parts(Arc<[AtomicU8; 3]>);

impl Parts {
    /// These are run on this VM, of the others there is nothing. What the ledger holds is in force before any service runs:
    /// a part is held from the first end of its service on.
    pub fn new(run: &[Part]) -> Self {
        let state = |part| if run.contains(&part) { FOLLOWED } else { ABSENT };
        Self(Arc::new(Part::ALL.map(state).map(AtomicU8::new)))
    }

    /// The service runs: its part follows.
    pub fn follow(&self, part: Part) {
        self.state(part).store(FOLLOWED, Ordering::Release);
    }

    /// The service has ended: its part stays as it is.
    pub fn hold(&self, part: Part) {
        self.state(part).store(HELD, Ordering::Release);
    }

    /// Whether the part follows.
    pub fn follows(&self, part: Part) -> bool {
        self.state(part).load(Ordering::Acquire) == FOLLOWED
    }

    /// The first of the parts that are held.
    pub fn held(&self) -> Option<Part> {
        Part::ALL.into_iter().find(|part| self.state(*part).load(Ordering::Acquire) == HELD)
    }

    /// What of `wanted` is to be enforced over what is `enforced`, and the resources that this leaves out, with the reason.
    pub fn restrict(
        &self,
        wanted: &DesiredSet,
        enforced: Option<&DesiredSet>,
    ) -> (DesiredSet, BTreeMap<Key, String>) {
        let state = Part::ALL.map(|part| self.state(part).load(Ordering::Acquire));
        if state == [FOLLOWED; 3] {
            return (wanted.clone(), BTreeMap::new());
        }
        let of = |key: &Key| Part::of(key).map_or(FOLLOWED, |part| state[part as usize]);
        let nothing = DesiredSet::default();
        let restricted = wanted
            .with_those_of(enforced.unwrap_or(&nothing), |key| of(key) == HELD)
            .with_those_of(&nothing, |key| of(key) == ABSENT);
        let why = |key: &Key| {
            let service = Part::of(key).map_or("", Part::name);
            match of(key) {
                HELD => format!("service {service} does not run"),
                _ => format!("this VM has no service {service}"),
            }
        };
        let left_out = wanted.missing_in(&restricted).map(|key| (key.clone(), why(key)));
        let left_out = left_out.collect();
        (restricted, left_out)
    }

    fn state(&self, part: Part) -> &AtomicU8 {
        &self.0[part as usize]
    }
}

impl Default for Parts {
    fn default() -> Self {
        Self::new(&Part::ALL)
    }
}
