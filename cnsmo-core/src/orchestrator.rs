//! Keeps deployments as they shall be: it looks at what is placed and what is seen of it, and takes the next steps.
//!
//! It keeps nothing itself. What it has decided is committed before anybody acts on it, so it can be killed at any moment,
//! and another one goes on. [`plan`] decides; the actor, which owns the resources, carries it out.

mod plan;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use cnsmo_proto::pb::catalog::{Instance, Phase};
use futures::FutureExt as _;

pub use self::plan::{Host, Steps, World, plan, shortage};
use crate::{
    actor::Core,
    catalog::{Catalog, Filter},
    error::Error,
};

/// Between two looks when nothing happens: soak times and deadlines pass by themselves.
const TICK: Duration = Duration::from_secs(1);
/// After a look, what comes meanwhile is looked at together.
const PAUSE: Duration = Duration::from_millis(50);
/// While another core has the resources.
const RETRY: Duration = Duration::from_secs(1);

/// What the catalogue knows of the services that deployments are and need, that balancers spread flows over, and that rules
/// of firewall policies are about.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed(BTreeMap<String, BTreeMap<String, Arc<Instance>>>);

impl Observed {
    /// Instances of the catalogue.
    pub fn new(instances: impl IntoIterator<Item = Arc<Instance>>) -> Self {
        let mut all = Self::default();
        for instance in instances {
            let of = all.0.entry(instance.service.clone()).or_default();
            of.insert(instance.name.clone(), instance);
        }
        all
    }

    /// With these services too, of which the catalogue need not know any instance.
    #[must_use]
    pub fn looked_at(mut self, services: impl IntoIterator<Item = String>) -> Self {
        for service in services {
            self.0.entry(service).or_default();
        }
        self
    }

    /// Whether it is known which instances of a service there are, be it none.
    pub fn knows(&self, service: &str) -> bool {
        self.0.contains_key(service)
    }

    /// One instance.
    pub fn instance(&self, service: &str, name: &str) -> Option<&Arc<Instance>> {
        self.0.get(service)?.get(name)
    }

    /// All of a service.
    pub fn instances(&self, service: &str) -> impl Iterator<Item = &Arc<Instance>> {
        self.0.get(service).into_iter().flat_map(BTreeMap::values)
    }

    /// Its phase; unspecified: nobody has told of it.
    pub fn phase(&self, service: &str, name: &str) -> Phase {
        self.instance(service, name).map_or(Phase::Unspecified, |instance| instance.phase())
    }

    /// Ready instances of a service.
    pub fn ready(&self, service: &str) -> u32 {
        let is_ready = |instance: &&Arc<Instance>| instance.phase() == Phase::Ready;
        let ready = self.0.get(service).map_or(0, |all| all.values().filter(is_ready).count());
        u32::try_from(ready).unwrap_or(u32::MAX)
    }

    /// Services of which something differs.
    pub fn differences<'a>(&'a self, other: &'a Self) -> BTreeSet<&'a str> {
        let names = self.0.keys().chain(other.0.keys()).map(String::as_str);
        names.filter(|service| self.0.get(*service) != other.0.get(*service)).collect()
    }
}

/// Looks whenever something has changed, until it is dropped.
pub async fn run(core: Core, catalog: Catalog) {
    let mut changes = catalog.watch(Filter::default());
    loop {
        match look(&core, &catalog).await {
            Ok(()) => {}
            Err(Error::NotLeader(_) | Error::Stopped) => tokio::time::sleep(RETRY).await,
            Err(error) => {
                tracing::warn!(%error, "deployments stay as they are for now");
                tokio::time::sleep(RETRY).await;
            }
        }
        tokio::time::sleep(PAUSE).await;
        // One look is for all that has happened.
        while let Some(Some(_)) = changes.next().now_or_never() {}
        tokio::select! {
            _ = changes.next() => {}
            () = core.deployments_changed() => {}
            () = tokio::time::sleep(TICK) => {}
        }
    }
}

async fn look(core: &Core, catalog: &Catalog) -> Result<(), Error> {
    let services = core.observed_services().await?;
    let of = |service: String| catalog.list(&Filter { service, ..Filter::default() }).0;
    let observed = Observed::new(services.iter().cloned().flat_map(of)).looked_at(services);
    core.orchestrate(observed).await
}

#[cfg(test)]
mod tests;
