//! What operators see of agents.

use std::time::SystemTime;

use cnsmo_proto::{
    model::Labels,
    pb::{
        balancer::{LoadBalancer, LoadBalancerStatus, NodeBalancerStatus},
        catalog::Phase as InstancePhase,
        deployment::{AvoidedNode, Deployment, DeploymentStatus, InstanceStatus},
        meta::{Condition, Metadata, condition::Status as Truth},
        network::{Network, NetworkStatus, Refused},
        node::{self, NodeStatus, node_status::Phase},
        policy::{FirewallPolicy, FirewallPolicyStatus, NodePolicyStatus},
        resource::{Kind, PendingNode, Resource, WaitAppliedResponse, resource},
    },
};

use super::{Agent, Fleet, Instance, MEMBER, Revision, Spec, State, Topic, wall_clock};
use crate::{
    identity::from_ms,
    orchestrator::shortage,
    state::{
        Avoided, Node, Placed, StoredBalancer, StoredDeployment, StoredNetwork, StoredPolicy,
        template,
    },
};

/// Pending nodes that one answer lists.
const PENDING_MAX: usize = 1_000;
/// Rule counters in the status of one policy, or backends in that of one balancer; those of further nodes are left out, so
/// that it fits into a message.
const COUNTERS_MAX: usize = 100_000;
/// Rejected resources that one text names.
const NAMED_MAX: usize = 3;

/// A condition as last shown.
#[derive(Debug)]
pub(super) struct Seen {
    truth: Truth,
    reason: &'static str,
    since: SystemTime,
}

/// That all agents together do.
const APPLIED: &str = "Applied";
/// Why a node does not enforce a revision, as in `PendingNode.reason`.
const UNREACHABLE: &str = "Unreachable";
const REJECTED: &str = "Rejected";
const PENDING: &str = "Pending";
/// Peers of a policy stand for more than it takes.
const TOO_MANY: &str = "TooManyAddresses";

impl Fleet {
    /// A resource with its status; none if there is no such resource.
    pub fn resource(&mut self, kind: Kind, name: &str, state: &State) -> Option<Resource> {
        let resource = match kind {
            Kind::FirewallPolicy => {
                resource::Resource::FirewallPolicy(self.policy(state.policies().get(name)?))
            }
            Kind::Network => {
                resource::Resource::Network(self.network(state.networks().get(name)?, state))
            }
            Kind::LoadBalancer => {
                let balancer = state.balancers().get(name)?;
                resource::Resource::LoadBalancer(self.balancer(balancer, state))
            }
            Kind::Deployment => {
                let deployment = state.deployments().get(name)?;
                resource::Resource::Deployment(self.deployment(deployment, state))
            }
            Kind::Node => {
                resource::Resource::Node(self.node(state.nodes().get(name)?, state.revision()))
            }
            Kind::Unspecified => return None,
        };
        Some(Resource { resource: Some(resource) })
    }

    /// A node with its status.
    pub fn node(&self, node: &Node, current: Revision) -> node::Node {
        let status = self.agents.get(&node.metadata.name).map(|agent| {
            let (phase, reason, message) = phase(node, agent, self.timing.lease);
            NodeStatus {
                phase: phase.into(),
                reason,
                message,
                applied_revision: agent.applied_revision(current),
                last_seen_time: agent.heard_time.map(Into::into),
                ..agent.report.clone()
            }
        });
        node::Node { status, ..node.into() }
    }

    fn policy(&mut self, policy: &StoredPolicy) -> FirewallPolicy {
        let name = &policy.metadata.name;
        let topic = Topic::policy(name);
        let agents = self.agents_of(self.selected.get(name).into_iter().flatten());
        let judgement = judge(&topic, &agents);
        let mut room = COUNTERS_MAX;
        let nodes = agents
            .iter()
            .map(|(node, agent)| NodePolicyStatus {
                node: (*node).clone(),
                applied: agent.applies(&topic),
                message: why_not(&topic, agent).map(|(_, text)| text).unwrap_or_default(),
                rules: within(&mut room, agent.counters.get(name)),
            })
            .collect();
        let resolved = self.resolved.get(name);
        let peers = resolved.iter().flat_map(|one| one.peers.iter().take(COUNTERS_MAX).cloned());
        let peers = peers.collect();
        let refused = resolved.and_then(|resolved| resolved.refused.clone());
        let judgement = refused.map_or(judgement, |why| (Truth::False, TOO_MANY, why));
        let condition = self.condition(Kind::FirewallPolicy, APPLIED, &policy.metadata, judgement);
        let status = FirewallPolicyStatus { nodes, conditions: vec![condition], peers };
        FirewallPolicy { status: Some(status), ..policy.into() }
    }

    fn network(&mut self, network: &StoredNetwork, state: &State) -> Network {
        let name = &network.metadata.name;
        let members = || state.roster(name).into_iter().flat_map(|roster| &roster.members);
        let judgement = judge(&Topic::network(name), &self.agents_of(members()));
        let record = |node: &String| match self.spec(&format!("{MEMBER}{name}/{node}")) {
            Some(Spec::Member(member)) => Some((**member).clone()),
            _ => None,
        };
        let refused = |node: &String| {
            let membership = state.nodes().get(node)?.membership.as_ref()?;
            let message = match &membership.network {
                own if own != name => format!("is in Network {own}, whose name comes first"),
                _ if membership.addresses.is_none() => {
                    "no place is free: the network is full".into()
                }
                _ => return None,
            };
            Some(Refused { node: node.clone(), message })
        };
        let selected = self.matching(state, &network.model.members);
        let mut status = NetworkStatus {
            members: members().filter_map(record).collect(),
            refused: selected.iter().filter_map(refused).collect(),
            conditions: Vec::new(),
        };
        status.conditions.push(self.condition(
            Kind::Network,
            APPLIED,
            &network.metadata,
            judgement,
        ));
        Network { status: Some(status), ..network.into() }
    }

    fn balancer(&mut self, balancer: &StoredBalancer, state: &State) -> LoadBalancer {
        let name = &balancer.metadata.name;
        let topic = Topic::balancer(name);
        let roster = state.roster(balancer.model.network.as_str());
        let agents = self.agents_of(roster.into_iter().flat_map(|roster| &roster.members));
        let judgement = judge(&topic, &agents);
        let mut room = COUNTERS_MAX;
        let nodes = agents
            .iter()
            .map(|(node, agent)| NodeBalancerStatus {
                node: (*node).clone(),
                applied: agent.applies(&topic),
                message: why_not(&topic, agent).map(|(_, text)| text).unwrap_or_default(),
                backends: within(&mut room, agent.backends.get(name)),
            })
            .collect();
        let record = |key: &String| match self.spec(key) {
            Some(Spec::Backend(backend)) => Some((**backend).clone()),
            _ => None,
        };
        let backends = self.served.get(name).into_iter().flat_map(|served| &served.backends);
        let backends = backends.filter_map(record).collect();
        let condition = self.condition(Kind::LoadBalancer, APPLIED, &balancer.metadata, judgement);
        let status = LoadBalancerStatus { backends, nodes, conditions: vec![condition] };
        LoadBalancer { status: Some(status), ..balancer.into() }
    }

    pub(super) fn spec(&self, key: &str) -> Option<&Spec> {
        Some(&self.catalog.get(key)?.spec)
    }

    fn agents_of<'a>(
        &'a self,
        nodes: impl Iterator<Item = &'a String>,
    ) -> Vec<(&'a String, &'a Agent)> {
        nodes.filter_map(|node| Some((node, self.agents.get(node)?))).collect()
    }

    fn deployment(&mut self, deployment: &StoredDeployment, state: &State) -> Deployment {
        let name = &deployment.metadata.name;
        let current = template(&deployment.spec);
        let from = (name.clone(), String::new());
        let placed: Vec<_> =
            state.placements().range(from..).take_while(|((of, _), _)| of == name).collect();
        let instances: Vec<_> = placed.iter().map(|(_, one)| self.instance(one)).collect();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let wanted = || placed.iter().filter(|(_, one)| one.is_wanted());
        let is_ready = |one: &&InstanceStatus| one.phase() == InstancePhase::Ready;
        let mut status = DeploymentStatus {
            observed_generation: deployment.metadata.generation,
            desired: deployment.model.replicas,
            placed: count(placed.len()),
            ready: count(instances.iter().filter(is_ready).count()),
            updated: count(wanted().filter(|(_, one)| one.template == current).count()),
            instances,
            conditions: Vec::new(),
            avoided: avoided(name, state),
        };
        let needs = self.needs(deployment);
        let judgements = [
            ("Available", available(deployment, &status)),
            ("Progressing", self.progressing(deployment, &status, &needs, state)),
            ("NeedsMet", needs),
        ];
        let kind = Kind::Deployment;
        let conditions = judgements.map(|(condition, judgement)| {
            self.condition(kind, condition, &deployment.metadata, judgement)
        });
        status.conditions.extend(conditions);
        Deployment { status: Some(status), ..deployment.into() }
    }

    fn instance(&self, placed: &Placed) -> InstanceStatus {
        let Instance { name, deployment, node, generation, ports, .. } = &*placed.instance;
        let seen = self.observed.instance(deployment, name);
        InstanceStatus {
            name: name.clone(),
            node: node.clone(),
            phase: seen.map(|seen| seen.phase).unwrap_or_default(),
            reason: seen.map(|seen| seen.reason.clone()).unwrap_or_default(),
            message: seen.map(|seen| seen.message.clone()).unwrap_or_default(),
            generation: *generation,
            ports: ports.clone(),
            phase_time: seen.and_then(|seen| seen.phase_time),
            failing_since: time(placed.fail_ms),
        }
    }

    fn needs(&self, deployment: &StoredDeployment) -> Judgement {
        let missing = deployment.model.needs.iter().find_map(|need| {
            let ready = self.observed.ready(need.service.as_str());
            (ready < need.ready).then_some((need, ready))
        });
        let Some((need, ready)) = missing else {
            let n = deployment.model.needs.len();
            return (Truth::True, "Met", format!("{n} of {n} services are ready"));
        };
        let text = format!("{}: {ready} of {} instances are ready", need.service, need.ready);
        let changed = deployment.metadata.update_time.and_then(|time| time.try_into().ok());
        let waited = changed.and_then(|since: SystemTime| wall_clock().duration_since(since).ok());
        match waited.is_some_and(|waited| waited > need.timeout) {
            true => {
                (Truth::False, "Timeout", format!("{text}, for longer than {:?}", need.timeout))
            }
            false => (Truth::False, "Waiting", text),
        }
    }

    fn progressing(
        &self,
        deployment: &StoredDeployment,
        status: &DeploymentStatus,
        needs: &Judgement,
        state: &State,
    ) -> Judgement {
        let DeploymentStatus { desired, placed, ready, updated, .. } = *status;
        let text = format!("{ready} of {desired} ready, {updated} as they shall be");
        if (placed, ready, updated) == (desired, desired, desired) {
            return (Truth::False, "Complete", text);
        }
        if updated < desired && needs.0 == Truth::False {
            return (Truth::True, "WaitingForNeeds", needs.2.clone());
        }
        let world = self.world(state, crate::identity::to_ms(wall_clock()));
        match shortage(&world, &deployment.metadata.name) {
            Some(why) => (Truth::True, "NoPlace", format!("{text}; {why}")),
            None if status.instances.iter().any(|one| one.failing_since.is_some()) => {
                (Truth::True, "Failing", format!("{text}; {}", failing(deployment, status)))
            }
            None if placed > updated => (Truth::True, "Replacing", text),
            None => (Truth::True, "Starting", text),
        }
    }

    /// A condition, with the time since when it is so.
    fn condition(
        &mut self,
        kind: Kind,
        condition: &'static str,
        metadata: &Metadata,
        judgement: Judgement,
    ) -> Condition {
        let (truth, reason, message) = judgement;
        let seen = self
            .conditions
            .entry((kind, metadata.name.clone(), condition))
            .and_modify(|seen| {
                if (seen.truth, seen.reason) != (truth, reason) {
                    *seen = Seen { truth, reason, since: wall_clock() };
                }
            })
            .or_insert_with(|| Seen { truth, reason, since: wall_clock() });
        Condition {
            r#type: condition.into(),
            status: truth.into(),
            reason: reason.into(),
            message,
            observed_generation: metadata.generation,
            transition_time: Some(seen.since.into()),
        }
    }

    /// The first of the selected nodes, at or after `from` by name, that does not enforce `revision`.
    pub fn first_pending(
        &self,
        state: &State,
        revision: Revision,
        selector: &Labels,
        from: &str,
    ) -> Option<String> {
        let pending = |(name, _): &(&String, &Node)| {
            let agent = self.agents.get(*name);
            agent.is_some_and(|agent| agent.applied_revision(state.revision()) < revision)
        };
        self.selected(state, selector, from).find(pending).map(|(name, _)| name.clone())
    }

    /// Which of the selected nodes enforce `revision`.
    pub fn progress(
        &self,
        state: &State,
        revision: Revision,
        selector: &Labels,
    ) -> WaitAppliedResponse {
        let mut progress = WaitAppliedResponse { revision, ..WaitAppliedResponse::default() };
        let mut all = true;
        for (name, node) in self.selected(state, selector, "") {
            let Some(agent) = self.agents.get(name) else { continue };
            if agent.applied_revision(state.revision()) >= revision {
                progress.nodes_applied += 1;
                continue;
            }
            all = false;
            if progress.pending.len() < PENDING_MAX {
                progress.pending.push(pending(name, node, agent));
            }
        }
        progress.applied = all;
        progress
    }
}

fn pending(name: &str, node: &Node, agent: &Agent) -> PendingNode {
    let (reason, message) = if !node.connected {
        (UNREACHABLE, "its agent has never connected".into())
    } else if agent.late {
        (UNREACHABLE, "nothing was heard of its agent for longer than the lease".into())
    } else if let Some(text) = rejections(agent) {
        (REJECTED, text)
    } else if agent.is_connected() {
        (PENDING, "its agent has not acknowledged the revision yet".into())
    } else {
        (PENDING, "its agent is not connected at the moment".into())
    };
    PendingNode { node: name.to_owned(), reason: reason.into(), message }
}

fn phase(node: &Node, agent: &Agent, lease: std::time::Duration) -> (Phase, String, String) {
    let text = |phase, reason: &str, message: String| (phase, reason.to_owned(), message);
    if !node.connected {
        return text(Phase::Joining, "NeverConnected", "the agent has never connected".into());
    }
    if agent.late {
        return text(
            Phase::Unreachable,
            "LeaseExpired",
            format!("nothing was heard of the agent for longer than its lease of {lease:?}"),
        );
    }
    if let Some(message) = rejections(agent) {
        return text(Phase::Degraded, REJECTED, message);
    }
    if !agent.in_sync() {
        let message = "the agent has not acknowledged all that it was sent yet".into();
        return text(Phase::Degraded, PENDING, message);
    }
    if !agent.report.reason.is_empty() {
        return text(Phase::Degraded, &agent.report.reason, agent.report.message.clone());
    }
    text(Phase::Ready, "", String::new())
}

fn rejections(agent: &Agent) -> Option<String> {
    if let Some((_, error)) = &agent.refused {
        return Some(error.clone());
    }
    let texts = agent
        .rejected
        .iter()
        .take(NAMED_MAX)
        .map(|(name, rejected)| format!("{name}: {}", rejected.message));
    let mut text = texts.collect::<Vec<_>>().join("; ");
    if agent.rejected.len() > NAMED_MAX {
        text += &format!("; and {} more", agent.rejected.len() - NAMED_MAX);
    }
    (!text.is_empty()).then_some(text)
}

/// What fits into the room that is left.
fn within<T: Clone>(room: &mut usize, counters: Option<&Vec<T>>) -> Vec<T> {
    let counters = counters.filter(|counters| counters.len() <= *room).cloned().unwrap_or_default();
    *room -= counters.len();
    counters
}

/// Why a node does not enforce a resource; none: it does.
fn why_not(topic: &Topic, agent: &Agent) -> Option<(&'static str, String)> {
    if agent.applies(topic) {
        return None;
    }
    if let Some((_, rejected)) = agent.rejected.iter().find(|(key, _)| topic.has(key)) {
        return Some((REJECTED, rejected.message.clone()));
    }
    if let Some((_, error)) = &agent.refused {
        return Some((REJECTED, error.clone()));
    }
    if agent.late {
        return Some((UNREACHABLE, "unreachable".into()));
    }
    Some((PENDING, "pending".into()))
}

/// State of a condition, its reason and a text.
type Judgement = (Truth, &'static str, String);

/// The worst of all nodes makes the condition.
/// None: 0, or too late for a message.
fn time(ms: u64) -> Option<prost_types::Timestamp> {
    Some(ms).filter(|ms| *ms > 0).and_then(|ms| from_ms(ms).ok()).map(Into::into)
}

/// VMs on which instances of a deployment kept failing.
fn avoided(deployment: &str, state: &State) -> Vec<AvoidedNode> {
    let from = (deployment.to_owned(), String::new());
    let mine = state.avoided().range(from..).take_while(|((of, _), _)| of == deployment);
    let node = |((_, node), avoided): (&(String, String), &Avoided)| AvoidedNode {
        node: node.clone(),
        until: time(avoided.until_ms),
        times: avoided.times,
    };
    mine.map(node).collect()
}

/// Which instance fails, why, and what will become of it.
fn failing(deployment: &StoredDeployment, status: &DeploymentStatus) -> String {
    let mut failing = status.instances.iter().filter(|one| one.failing_since.is_some());
    let Some(InstanceStatus { name, node, message, .. }) = failing.next() else {
        return String::new();
    };
    let more = match failing.count() {
        0 => String::new(),
        n => format!(", and {n} more"),
    };
    let then = match deployment.model.placement.reschedule_after {
        Some(after) => format!("after {after:?} it goes to another VM, if there is one"),
        None => "it stays there".to_owned(),
    };
    let message = if message.is_empty() { "it is being started again" } else { message };
    format!("{name} fails on {node}: {message}{more}; {then}")
}

fn available(deployment: &StoredDeployment, status: &DeploymentStatus) -> Judgement {
    let DeploymentStatus { desired, ready, .. } = *status;
    let least =
        desired.saturating_sub(deployment.model.rollout.max_unavailable).max(desired.min(1));
    let text = format!("{ready} of {desired} ready; {least} are needed");
    match ready >= least {
        true => (Truth::True, "EnoughReady", text),
        false => (Truth::False, "TooFewReady", text),
    }
}

fn judge(topic: &Topic, agents: &[(&String, &Agent)]) -> Judgement {
    let mut worst: Option<(&'static str, String)> = None;
    let rank = |reason: &str| [PENDING, UNREACHABLE, REJECTED].iter().position(|r| *r == reason);
    let mut failing = 0_usize;
    for (node, agent) in agents {
        let Some((reason, text)) = why_not(topic, agent) else { continue };
        failing += 1;
        if worst.as_ref().is_none_or(|(worst, _)| rank(worst) < rank(reason)) {
            worst = Some((reason, format!("node {node}: {text}")));
        }
    }
    let total = agents.len();
    match worst {
        None if total == 0 => (Truth::True, "NoNodes", "no node has to apply it".into()),
        None => (Truth::True, "Applied", format!("{total} of {total} nodes")),
        Some((reason, text)) => {
            let message = format!("{} of {total} nodes; {text}", total - failing);
            (Truth::False, reason, message)
        }
    }
}
