//! Instances of deployments, each on its VM. Who decides where they are is in [`crate::orchestrator`].

use std::{collections::BTreeSet, sync::Arc, time::SystemTime};

use cnsmo_proto::{
    model::{Backends, Peer},
    pb::{
        deployment::{DeploymentSpec, Instance, instance::Goal},
        resource::{Change, Kind, change::Outcome},
    },
};
use prost::Message as _;
use ring::digest::{SHA256, digest};

use super::{Error, Plan, State, Stored, StoredDeployment, Write};
use crate::identity::to_ms;

/// Deployments: each is looked at whenever something changes.
pub const DEPLOYMENTS_MAX: usize = 1_024;
/// Instances of all deployments together.
pub const PLACEMENTS_MAX: usize = 10_000;

/// An instance on a VM.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// As the VM is to run it.
    pub instance: Arc<Instance>,
    /// [`template`] of the deployment that it was made of.
    pub template: [u8; 32],
    /// When it was placed, in milliseconds since 1970.
    pub create_ms: u64,
    /// Since when it shall end, likewise; 0: it shall run.
    pub drain_ms: u64,
    /// Since when it is failing, likewise; 0: it is not.
    pub fail_ms: u64,
}

/// A VM on which instances of a deployment kept failing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avoided {
    /// [`template`] of what failed there: another one gets another chance.
    pub template: [u8; 32],
    /// In milliseconds since 1970.
    pub until_ms: u64,
    /// How often in a row.
    pub times: u32,
}

impl Placed {
    /// Name of its deployment.
    pub fn deployment(&self) -> &str {
        &self.instance.deployment
    }

    /// Name of its VM.
    pub fn node(&self) -> &str {
        &self.instance.node
    }

    /// It shall run.
    pub fn is_wanted(&self) -> bool {
        self.drain_ms == 0
    }

    pub(super) fn key(&self) -> (String, String) {
        (self.instance.deployment.clone(), self.instance.name.clone())
    }
}

/// What an instance of this deployment is: another one takes other instances.
pub fn template(spec: &DeploymentSpec) -> [u8; 32] {
    let template = DeploymentSpec {
        driver: spec.driver.clone(),
        ports: spec.ports.clone(),
        attributes: spec.attributes.clone(),
        ..DeploymentSpec::default()
    };
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, &template.encode_to_vec()).as_ref());
    hash
}

/// A change of where instances are.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A new instance, on this VM.
    Place(Box<Instance>),
    /// It shall finish what it has, and end.
    Drain {
        /// Of the deployment.
        deployment: String,
        /// Of the instance.
        name: String,
        /// CamelCase and stable.
        reason: &'static str,
    },
    /// It has failed; or it is not failing any more.
    Fail {
        /// Of the deployment.
        deployment: String,
        /// Of the instance.
        name: String,
        /// The former.
        is_failing: bool,
    },
    /// Instances of the deployment keep failing on this VM.
    Avoid {
        /// Its name.
        deployment: String,
        /// Of the VM.
        node: String,
        /// For how long.
        avoided: Avoided,
    },
    /// The VM is as good as any other again.
    Forgive {
        /// Name of the deployment.
        deployment: String,
        /// Of the VM.
        node: String,
    },
    /// Its VM need not know of it any more.
    Remove {
        /// Of the deployment.
        deployment: String,
        /// Of the instance.
        name: String,
    },
}

impl State {
    /// Services of which the instances have to be known: deployments, also such that are being deleted, what they need, what
    /// balancers spread flows over, and what rules of firewall policies are about.
    pub fn observed_services(&self) -> BTreeSet<String> {
        let needs = self.deployments.values().flat_map(|one| &one.model.needs);
        let needs = needs.map(|need| need.service.to_string());
        let placed = self.placements.keys().map(|(deployment, _)| deployment.clone());
        let balanced = self.balancers.values().filter_map(|one| match &one.model.backends {
            Backends::Nodes(_) => None,
            Backends::Service(service) => Some(service.to_string()),
        });
        let peers = self.policies.values().flat_map(|policy| policy.model.peers());
        let peers = peers.filter_map(|peer| match peer {
            Peer::Labels(_) | Peer::Nobody => None,
            Peer::Service(service) => Some(service.to_string()),
        });
        let deployments = self.deployments.keys().cloned();
        deployments.chain(placed).chain(needs).chain(balanced).chain(peers).collect()
    }

    /// Carries out steps. One whose instance or deployment is not there any more changes nothing.
    pub fn plan_steps(&self, steps: Vec<Step>, now: SystemTime) -> Plan {
        let now = to_ms(now);
        let writes = steps.into_iter().filter_map(|step| match step {
            Step::Place(instance) => {
                let deployment = self.deployments.get(&instance.deployment)?;
                Some(Write::Place(Box::new(Placed {
                    template: template(&deployment.spec),
                    instance: Arc::from(instance),
                    create_ms: now,
                    drain_ms: 0,
                    fail_ms: 0,
                })))
            }
            Step::Drain { deployment, name, reason } => {
                let placed = self.placements.get(&(deployment, name))?;
                let spec = self.deployments.get(placed.deployment()).map(|one| &one.spec);
                let drain_timeout = spec.and_then(|spec| spec.drain_timeout);
                let instance = Instance {
                    goal: Goal::Drain.into(),
                    goal_reason: reason.to_owned(),
                    drain_timeout: drain_timeout.or(placed.instance.drain_timeout),
                    ..Instance::clone(&placed.instance)
                };
                let instance = Arc::new(instance);
                Some(Write::Place(Box::new(Placed { instance, drain_ms: now, ..placed.clone() })))
            }
            Step::Fail { deployment, name, is_failing } => {
                let placed = self.placements.get(&(deployment, name))?;
                let fail_ms = if is_failing { now } else { 0 };
                Some(Write::Place(Box::new(Placed { fail_ms, ..placed.clone() })))
            }
            Step::Avoid { deployment, node, avoided } => {
                Some(Write::Avoid(deployment, node, avoided))
            }
            Step::Forgive { deployment, node } => Some(Write::Forgive(deployment, node)),
            Step::Remove { deployment, name } => {
                let key = (deployment, name);
                let is_there = self.placements.contains_key(&key);
                is_there.then_some(Write::Unplace(key.0, key.1))
            }
        });
        Plan { writes: writes.collect(), ..Plan::default() }
    }

    /// Changes the number of instances. Returns that before, too.
    ///
    /// # Errors
    /// There is no such deployment, or there would be too many instances.
    pub fn plan_scale(
        &self,
        name: &str,
        replicas: u32,
        now: SystemTime,
    ) -> Result<(Plan, u32), Error> {
        let Some(old) = self.deployments.get(name) else {
            return Err(Error::NotFound(format!("Deployment {name}: does not exist")));
        };
        let before = old.model.replicas;
        let spec = DeploymentSpec { replicas, ..DeploymentSpec::clone(&old.spec) };
        let model = spec.clone().try_into();
        let model = model.map_err(|e: cnsmo_proto::model::Invalid| {
            Error::Invalid(format!("Deployment {name}: {}", e.at("spec")))
        })?;
        let mut metadata = old.metadata.clone();
        metadata.update_time = Some(now.into());
        let new: StoredDeployment = Stored { metadata, spec: Arc::new(spec), model };
        let (outcome, new) = super::replace(Some(old), new);
        let change = Change {
            kind: Kind::Deployment.into(),
            name: name.to_owned(),
            outcome: outcome.into(),
        };
        let changes = if outcome == Outcome::Unchanged { vec![] } else { vec![change] };
        let writes = new.map(|new| Write::Deployment(Box::new(new))).into_iter().collect();
        Ok((self.finish(Plan { changes, writes })?, before))
    }
}
