//! Agents in the catalogue: each node that has connected is an instance of [`AGENT`], as the fleet sees it. What an agent
//! reports of its VM is there for as long as the fleet hears of the agent.

use std::{sync::Arc, time::Duration};

use cnsmo_proto::{
    model::LABEL_BYTES_MAX,
    pb::{
        catalog::{Instance, Phase},
        node::{Node, node_status},
        resource::{Kind, Resource, resource::Resource as Inner, watch_response},
    },
};
use tokio::sync::broadcast::error::RecvError;

use super::{
    Catalog, Filter,
    record::{self, AGENT},
};
use crate::{
    actor::{self, Core},
    error::Error,
    links::Links,
    store::{Fence, StoreError},
};

/// After an error of the store, and while another core has the agents.
const RETRY: Duration = Duration::from_secs(1);

impl Catalog {
    /// Keeps the agents' instances as the fleet has its nodes, while this core has them. Runs until it is dropped.
    pub async fn follow_agents(self, core: Core, links: Links) {
        loop {
            match self.agents(&core, &links).await {
                Ok(()) => {}
                // Another core has the agents now, or none.
                Err(Error::Stopped | Error::NotLeader(_) | Error::Store(StoreError::Fenced)) => {
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot keep the agents in the catalogue");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Ends when changes were missed.
    async fn agents(&self, core: &Core, links: &Links) -> Result<(), Error> {
        // Before anything is read: what another leader changed later is not overwritten.
        let fence = core.fence()?;
        let mut view = core.watch(Kind::Node, None).await?;
        let nodes: Vec<_> = view.resources.into_iter().filter_map(node).collect();
        let agents = Filter { service: AGENT.into(), ..Filter::default() };
        for gone in self.list(&agents).0 {
            if !nodes.iter().any(|node| name(node) == gone.name) {
                self.remove_agent(&gone.name, fence).await?;
            }
        }
        for node in nodes {
            self.see(&node, links, fence).await?;
        }
        loop {
            let change = match view.changes.recv().await {
                Ok(change) => change,
                Err(RecvError::Lagged(_)) => return Ok(()),
                Err(RecvError::Closed) => return Err(Error::Stopped),
            };
            self.follow_change(&change, links, fence).await?;
        }
    }

    async fn follow_change(
        &self,
        change: &Arc<actor::Change>,
        links: &Links,
        fence: Option<Fence>,
    ) -> Result<(), Error> {
        let Some(node) = change.message.resource.clone().and_then(node) else { return Ok(()) };
        if change.message.event() == watch_response::Event::Delete {
            return self.remove_agent(name(&node), fence).await;
        }
        self.see(&node, links, fence).await
    }

    /// Keeps what an agent reports of its VM. What is wrong of it is left out and logged: the agent cannot mend it.
    ///
    /// # Errors
    /// Of the store, or another core leads.
    pub async fn report(
        &self,
        node: &str,
        reported: Vec<Instance>,
        fence: Option<Fence>,
    ) -> Result<(), Error> {
        for instance in reported {
            let what = format!("{}/{}", instance.service, instance.name);
            let kept = match record::reported(instance, node, &self.inner.core) {
                Ok(record) => self.inner.keep(record, fence).await.map(|_| ()),
                Err(error) => Err(error),
            };
            match kept {
                Err(error @ (Error::Invalid(_) | Error::Denied(_) | Error::Exists(_))) => {
                    tracing::warn!(node, what, %error, "an agent reports what is not kept");
                }
                kept => kept?,
            }
        }
        Ok(())
    }

    /// Removes what an agent does not report any more.
    ///
    /// # Errors
    /// Of the store, or another core leads.
    pub async fn keep_reported(
        &self,
        node: &str,
        is_there: impl Fn(&Instance) -> bool,
        fence: Option<Fence>,
    ) -> Result<(), Error> {
        for gone in self.reported(node).into_iter().filter(|instance| !is_there(instance)) {
            match self.remove(&gone.service, &gone.name, None, fence).await {
                Ok(_) | Err(Error::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn reported(&self, node: &str) -> Vec<Arc<Instance>> {
        let owner = record::agent_identity(node);
        let state = self.inner.state();
        if !state.owned.contains_key(&owner) {
            return Vec::new();
        }
        let records = state.set.values().filter(|r| r.followed && r.instance.owner == owner);
        records.map(|record| record.instance.clone()).collect()
    }

    async fn remove_agent(&self, node: &str, fence: Option<Fence>) -> Result<(), Error> {
        self.keep_reported(node, |_| false, fence).await?;
        match self.remove(AGENT, node, None, fence).await {
            // It never connected.
            Ok(_) | Err(Error::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn see(&self, node: &Node, links: &Links, fence: Option<Fence>) -> Result<(), Error> {
        let Some(instance) = instance(node) else { return Ok(()) };
        self.see_reported(&instance, links, fence).await?;
        let known = self.inner.known(&record::key(AGENT, &instance.name));
        let is_lost = known.is_some_and(|known| known.phase() == Phase::Lost);
        if is_lost && instance.phase() == Phase::Unreachable {
            return Ok(());
        }
        self.inner.keep(record::of_agent(instance, &self.inner.core), fence).await?;
        Ok(())
    }

    /// With an agent that nobody hears of, what it has reported is out of sight too.
    async fn see_reported(
        &self,
        agent: &Instance,
        links: &Links,
        fence: Option<Fence>,
    ) -> Result<(), Error> {
        let known = self.inner.known(&record::key(AGENT, &agent.name));
        let was_seen = !matches!(
            known.as_ref().map(record::Record::phase),
            Some(Phase::Unreachable | Phase::Lost)
        );
        let is_seen = agent.phase() != Phase::Unreachable;
        if was_seen == is_seen {
            return Ok(());
        }
        if is_seen {
            links.report_again(&agent.name);
            return Ok(());
        }
        for instance in self.reported(&agent.name) {
            if matches!(instance.phase(), Phase::Unreachable | Phase::Lost | Phase::Stopped) {
                continue;
            }
            let Some(known) = self.inner.known(&record::key(&instance.service, &instance.name))
            else {
                continue;
            };
            let message = "the agent of its VM is silent".to_owned();
            self.inner.keep(known.judged(Phase::Unreachable, "LeaseLate", message), fence).await?;
        }
        Ok(())
    }
}

fn node(resource: Resource) -> Option<Node> {
    match resource.resource? {
        Inner::Node(node) => Some(node),
        Inner::FirewallPolicy(_)
        | Inner::LoadBalancer(_)
        | Inner::Network(_)
        | Inner::Deployment(_) => None,
    }
}

fn name(node: &Node) -> &str {
    node.metadata.as_ref().map_or("", |metadata| &metadata.name)
}

/// None: its agent has never connected.
fn instance(node: &Node) -> Option<Instance> {
    let status = node.status.as_ref()?;
    let phase = match status.phase() {
        node_status::Phase::Unspecified | node_status::Phase::Joining => return None,
        node_status::Phase::Ready => Phase::Ready,
        node_status::Phase::Degraded => Phase::Degraded,
        node_status::Phase::Unreachable => Phase::Unreachable,
    };
    let mut attributes = std::collections::BTreeMap::new();
    let programs: Vec<_> = status.program_ids.iter().map(ToString::to_string).collect();
    let programs = programs.join("/");
    for (key, value) in
        [("kernel", &status.kernel), ("version", &status.agent_version), ("programs", &programs)]
    {
        // An attribute is a label: what it cannot be is left out, as it is for people only.
        let fits = value.len() <= LABEL_BYTES_MAX
            && value.bytes().all(|b| b.is_ascii_graphic() && b != b'=' && b != b',');
        if !value.is_empty() && fits {
            attributes.insert(key.to_owned(), value.clone());
        }
    }
    Some(Instance {
        name: name(node).to_owned(),
        node: name(node).to_owned(),
        phase: phase.into(),
        reason: status.reason.clone(),
        message: status.message.clone(),
        attributes,
        ..Instance::default()
    })
}
