//! What operators see of agents.

use std::time::SystemTime;

use cnsmo_proto::{
    model::Labels,
    pb::{
        meta::{Condition, condition::Status as Truth},
        node::{self, NodeStatus, node_status::Phase},
        policy::{FirewallPolicy, FirewallPolicyStatus, NodePolicyStatus},
        resource::{PendingNode, WaitAppliedResponse},
    },
};

use super::{Fleet, Member, Revision, State, wall_clock};
use crate::state::{Node, Policy};

/// Pending nodes that one answer lists.
const PENDING_MAX: usize = 1_000;
/// Rule counters in the status of one policy; those of further nodes are left out, so that it fits into a message.
const COUNTERS_MAX: usize = 100_000;
/// Rejected policies that one text names.
const NAMED_MAX: usize = 3;

/// A condition as last shown.
#[derive(Debug)]
pub(super) struct Seen {
    truth: Truth,
    reason: &'static str,
    since: SystemTime,
}

/// Why a node does not enforce a revision, as in `PendingNode.reason`.
const UNREACHABLE: &str = "Unreachable";
const REJECTED: &str = "Rejected";
const PENDING: &str = "Pending";

impl Fleet {
    /// A node with its status.
    pub fn node(&self, node: &Node, current: Revision) -> node::Node {
        let status = self.members.get(&node.metadata.name).map(|member| {
            let (phase, reason, message) = phase(node, member, self.timing.lease);
            NodeStatus {
                phase: phase.into(),
                reason,
                message,
                applied_revision: member.applied_revision(current),
                last_seen_time: member.heard_time.map(Into::into),
                ..member.report.clone()
            }
        });
        node::Node { metadata: Some(node.metadata.clone()), status }
    }

    /// A policy with its status.
    pub fn policy(&mut self, policy: &Policy) -> FirewallPolicy {
        let name = &policy.metadata.name;
        let selected = self.selected.get(name).into_iter().flatten();
        let members =
            selected.filter_map(|node| Some((node, self.members.get(node)?))).collect::<Vec<_>>();
        let (truth, reason, message) = judge(name, &members);
        let mut room = COUNTERS_MAX;
        let nodes = members
            .iter()
            .map(|(node, member)| {
                let counters = member.counters.get(name).filter(|rules| rules.len() <= room);
                room -= counters.map_or(0, Vec::len);
                NodePolicyStatus {
                    node: (*node).clone(),
                    applied: member.applies(name),
                    message: why_not(name, member).map(|(_, text)| text).unwrap_or_default(),
                    rules: counters.cloned().unwrap_or_default(),
                }
            })
            .collect();
        let seen = self
            .conditions
            .entry(name.clone())
            .and_modify(|seen| {
                if (seen.truth, seen.reason) != (truth, reason) {
                    *seen = Seen { truth, reason, since: wall_clock() };
                }
            })
            .or_insert_with(|| Seen { truth, reason, since: wall_clock() });
        let condition = Condition {
            r#type: "Applied".into(),
            status: truth.into(),
            reason: reason.into(),
            message,
            observed_generation: policy.metadata.generation,
            transition_time: Some(seen.since.into()),
        };
        let status = FirewallPolicyStatus { nodes, conditions: vec![condition] };
        FirewallPolicy { status: Some(status), ..FirewallPolicy::from(policy) }
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
        for (name, node) in state.nodes().iter().filter(|(_, node)| selector.selects(&node.labels))
        {
            let Some(member) = self.members.get(name) else { continue };
            if member.applied_revision(state.revision()) >= revision {
                progress.nodes_applied += 1;
                continue;
            }
            all = false;
            if progress.pending.len() < PENDING_MAX {
                progress.pending.push(pending(name, node, member));
            }
        }
        progress.applied = all;
        progress
    }
}

fn pending(name: &str, node: &Node, member: &Member) -> PendingNode {
    let (reason, message) = if !node.connected {
        (UNREACHABLE, "its agent has never connected".into())
    } else if member.late {
        (UNREACHABLE, "nothing was heard of its agent for longer than the lease".into())
    } else if let Some(text) = rejections(member) {
        (REJECTED, text)
    } else if member.is_connected() {
        (PENDING, "its agent has not acknowledged the revision yet".into())
    } else {
        (PENDING, "its agent is not connected at the moment".into())
    };
    PendingNode { node: name.to_owned(), reason: reason.into(), message }
}

fn phase(node: &Node, member: &Member, lease: std::time::Duration) -> (Phase, String, String) {
    let text = |phase, reason: &str, message: String| (phase, reason.to_owned(), message);
    if !node.connected {
        return text(Phase::Joining, "NeverConnected", "the agent has never connected".into());
    }
    if member.late {
        return text(
            Phase::Unreachable,
            "LeaseExpired",
            format!("nothing was heard of the agent for longer than its lease of {lease:?}"),
        );
    }
    if let Some(message) = rejections(member) {
        return text(Phase::Degraded, REJECTED, message);
    }
    if !member.in_sync() {
        let message = "the agent has not acknowledged the desired policy yet".into();
        return text(Phase::Degraded, PENDING, message);
    }
    if !member.report.reason.is_empty() {
        return text(Phase::Degraded, &member.report.reason, member.report.message.clone());
    }
    text(Phase::Ready, "", String::new())
}

fn rejections(member: &Member) -> Option<String> {
    if let Some((_, error)) = &member.refused {
        return Some(error.clone());
    }
    let texts = member
        .rejected
        .iter()
        .take(NAMED_MAX)
        .map(|(name, rejected)| format!("FirewallPolicy {name}: {}", rejected.message));
    let mut text = texts.collect::<Vec<_>>().join("; ");
    if member.rejected.len() > NAMED_MAX {
        text += &format!("; and {} more", member.rejected.len() - NAMED_MAX);
    }
    (!text.is_empty()).then_some(text)
}

/// Why a node does not enforce a policy; none: it does.
fn why_not(policy: &str, member: &Member) -> Option<(&'static str, String)> {
    if member.applies(policy) {
        return None;
    }
    if let Some(rejected) = member.rejected.get(policy) {
        return Some((REJECTED, rejected.message.clone()));
    }
    if let Some((_, error)) = &member.refused {
        return Some((REJECTED, error.clone()));
    }
    if member.late {
        return Some((UNREACHABLE, "unreachable".into()));
    }
    Some((PENDING, "pending".into()))
}

/// The worst of all nodes makes the condition.
fn judge(policy: &str, members: &[(&String, &Member)]) -> (Truth, &'static str, String) {
    let mut worst: Option<(&'static str, String)> = None;
    let rank = |reason: &str| [PENDING, UNREACHABLE, REJECTED].iter().position(|r| *r == reason);
    let mut failing = 0_usize;
    for (node, member) in members {
        let Some((reason, text)) = why_not(policy, member) else { continue };
        failing += 1;
        if worst.as_ref().is_none_or(|(worst, _)| rank(worst) < rank(reason)) {
            worst = Some((reason, format!("node {node}: {text}")));
        }
    }
    let total = members.len();
    match worst {
        None if total == 0 => (Truth::True, "NoNodes", "selects no node".into()),
        None => (Truth::True, "Applied", format!("{total} of {total} nodes")),
        Some((reason, text)) => {
            let message = format!("{} of {total} nodes; {text}", total - failing);
            (Truth::False, reason, message)
        }
    }
}
