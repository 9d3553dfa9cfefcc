//! The services that a core consists of. Each has tasks of its own under a supervisor, can be stopped, started, restarted
//! and killed while the others go on, and is an instance in the catalogue.
//!
//! What is kept, and what clients are promised, is not in these tasks: one that is killed goes on where it was.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use cnsmo_proto::pb::catalog::{Instance, Phase as Announced};
use cnsmo_service::{
    announce::incarnation,
    host::{Host, OrderError, Run, Service},
    lifecycle::{Lifecycle, Phase, State},
    supervise::{Limits, Stop, Stopper, stop_pair},
};
use futures::future;
use tokio::{task::JoinHandle, time::timeout};

use crate::{
    actor::Core,
    bus::Bus,
    catalog::Catalog,
    error::Error,
    identity::registry::{self, Registry},
    lease::Leases,
    links::Links,
    orchestrator,
    store::Store,
};

/// The host of a core's services, beside the nodes.
pub const NODE: &str = "core";

/// A service that fails more often is not helped by another restart: it stays failed until an operator starts it.
/// What they do is made of single commits: they end at once.
const LIMITS: Limits = Limits::DEFAULT;
/// Between two announcements of what has not changed: three are within the TTL.
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(1);
/// How long the end of a core waits for its services to be withdrawn.
const WITHDRAW_TIMEOUT: Duration = Duration::from_secs(2);

/// What the services work on.
#[derive(Debug)]
pub struct Parts {
    /// Of this core: its instances have this name.
    pub id: String,
    /// No other core changes the store.
    pub alone: bool,
    /// Of clients.
    pub leases: Leases,
    /// Messages.
    pub bus: Bus,
    /// Instances.
    pub catalog: Catalog,
    /// Who may call.
    pub registry: Arc<Registry>,
    /// Where identities are.
    pub store: Store,
    /// Where agents are.
    pub core: Core,
    /// Their streams.
    pub links: Links,
}

/// The services of a running core.
#[derive(Debug)]
pub struct Own {
    host: Host,
    announcing: JoinHandle<()>,
    stopper: Stopper,
}

/// The service of this core that serves calls to `path`.
pub fn service_of(path: &str) -> Option<&'static str> {
    let area = path.strip_prefix("/cnsmo.")?.split('.').next()?;
    Some(match area {
        "state" => "state",
        "bus" => "bus",
        "catalog" => "catalogue",
        "identity" => "identity",
        _ => return None,
    })
}

impl Own {
    /// Starts the services. When it returns, all of them are ready and in the catalogue.
    ///
    /// # Errors
    /// The store fails.
    pub async fn start(parts: Parts) -> Result<Self, OwnError> {
        let host = Host::new(LIMITS);
        let (id, catalog) = (parts.id.clone(), parts.catalog.clone());
        for task in tasks(parts) {
            let mut states = host.add(Arc::new(task))?.watch();
            // The sender is in the host.
            let _ = states.wait_for(|state| state.phase == Phase::Ready).await;
        }
        let mut announced: Vec<_> = host
            .lives()
            .into_iter()
            .map(|(service, life)| {
                // What came before it was ready is nobody's news.
                let (_, seen) = life.entered_after(0);
                let seen = seen.saturating_sub(1);
                let incarnation = incarnation();
                Announcer {
                    catalog: catalog.clone(),
                    id: id.clone(),
                    service,
                    life,
                    seen,
                    incarnation,
                }
            })
            .collect();
        for one in &mut announced {
            one.announce().await?;
        }
        let (stopper, stop) = stop_pair();
        let announcing = announced.into_iter().map(|one| one.run(stop.clone()));
        let announcing = future::join_all(announcing.collect::<Vec<_>>());
        let announcing = tokio::spawn(async move { drop(announcing.await) });
        Ok(Self { host, announcing, stopper })
    }

    /// Who steers them.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Withdraws the services and stops them.
    pub async fn stop(self) {
        self.stopper.stop();
        if timeout(WITHDRAW_TIMEOUT, self.announcing).await.is_err() {
            tracing::warn!("the services of this core are not withdrawn in time");
        }
        self.host.shut_down().await;
    }
}

/// Why the services do not start.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// Two of one name.
    #[error("cannot start a service")]
    Order(#[from] OrderError),
    /// The catalogue does not take one.
    #[error("cannot announce a service")]
    Announce(#[from] Error),
}

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A service whose work may end at any moment.
struct Task {
    name: &'static str,
    features: &'static [&'static str],
    work: Box<dyn Fn() -> Work + Send + Sync>,
}

impl Service for Task {
    fn name(&self) -> &str {
        self.name
    }

    fn features(&self) -> Vec<String> {
        self.features.iter().map(ToString::to_string).collect()
    }

    fn run(&self, life: Lifecycle, mut stop: Stop) -> Run {
        let work = (self.work)();
        Box::pin(async move {
            life.step(Phase::Ready, "Healthy", "")?;
            tokio::select! {
                () = work => {}
                () = stop.asked() => {}
            }
            Ok(())
        })
    }
}

fn tasks(parts: Parts) -> [Task; 5] {
    let Parts { id: _, alone, leases, bus, catalog, registry, store, core, links } = parts;
    let (resources, seen) = (core.clone(), catalog.clone());
    [
        Task {
            name: "state",
            features: &["keys", "transactions", "watches", "leases"],
            work: Box::new(move || Box::pin(leases.clone().run())),
        },
        Task {
            name: "bus",
            features: &["publish", "request", "queue-groups", "durable", "replay"],
            work: Box::new(move || Box::pin(bus.clone().run())),
        },
        Task {
            name: "catalogue",
            features: &["announce", "watch"],
            work: Box::new(move || {
                let (catalog, core, links) = (catalog.clone(), core.clone(), links.clone());
                Box::pin(async move {
                    tokio::select! {
                        () = catalog.clone().run() => {}
                        () = catalog.follow_agents(core, links) => {}
                    }
                })
            }),
        },
        Task {
            name: "orchestrator",
            features: &["placement", "needs", "rolling-update", "scale", "drain"],
            work: Box::new(move || Box::pin(orchestrator::run(resources.clone(), seen.clone()))),
        },
        Task {
            name: "identity",
            features: &["enrol", "renew", "revoke", "audit"],
            work: Box::new(move || {
                let (registry, store) = (registry.clone(), store.clone());
                Box::pin(async move {
                    let followed = registry::follow(registry.clone(), store);
                    // Only the core that leads changes identities: the others learn of it.
                    let followed =
                        async { if alone { future::pending().await } else { followed.await } };
                    tokio::select! {
                        () = registry::sweep(registry) => {}
                        () = followed => {}
                    }
                })
            }),
        },
    ]
}

/// Tells the catalogue of one service.
struct Announcer {
    catalog: Catalog,
    id: String,
    service: String,
    life: Lifecycle,
    /// States that the catalogue has been told.
    seen: u64,
    incarnation: String,
}

impl Announcer {
    async fn run(mut self, mut stop: Stop) {
        let mut states = self.life.watch();
        loop {
            tokio::select! {
                () = stop.asked() => break,
                () = tokio::time::sleep(ANNOUNCE_INTERVAL) => {}
                // The sender is in `life`.
                Ok(()) = states.changed() => {}
            }
            let announced = tokio::select! {
                () = stop.asked() => break,
                announced = self.announce() => announced,
            };
            if let Err(error) = announced {
                let service = &*self.service;
                tracing::warn!(service, %error, "not announced yet");
            }
        }
        if let Err(error) = self.catalog.withdraw_own(&self.service, &self.id).await {
            tracing::warn!(service = self.service, %error, "not withdrawn");
        }
    }

    /// Each state that is new, in order; or the last one, to show that the service is there.
    async fn announce(&mut self) -> Result<(), Error> {
        let (mut states, entered) = self.life.entered_after(self.seen);
        if states.is_empty() {
            states.push(self.life.watch().borrow().clone());
        }
        for state in states {
            let told = self.catalog.announce_own(self.instance(state.clone())).await;
            // States in between were forgotten: it is told as another life.
            if let Err(Error::Precondition(_)) = told {
                self.incarnation = incarnation();
                self.catalog.announce_own(self.instance(state)).await?;
            } else {
                told?;
            }
        }
        self.seen = entered;
        Ok(())
    }

    fn instance(&self, state: State) -> Instance {
        let State { phase, reason, message, since: _ } = state;
        Instance {
            name: self.id.clone(),
            service: self.service.clone(),
            node: NODE.into(),
            phase: Announced::from(phase).into(),
            reason: reason.into(),
            message,
            incarnation: self.incarnation.clone(),
            ..Instance::default()
        }
    }
}
