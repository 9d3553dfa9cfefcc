//! What a change would do to live flows: each VM whose policies would change is asked.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cnsmo_proto::pb::{
    agent::{
        PolicyPreview, Resource, command::Command, command_result::Result as Outcome,
        resource::Spec,
    },
    policy::FirewallPolicySpec,
    resource::NodeImpact,
};
use futures::{StreamExt as _, stream};

use super::flow::other_answer;
use crate::{links::Links, state::PolicyChange};

/// VMs that are asked at a time.
const ASKED_MAX: usize = 32;
/// For the answer of one VM, which may have 100,000 rules to compile.
const PATIENCE: Duration = Duration::from_secs(20);
/// Flows in the whole answer; counts are of all.
const FLOWS_MAX: usize = 1_000;
/// Flows of one VM in the answer.
const FLOWS_PER_NODE_MAX: usize = 100;

/// By name of the VM.
pub(super) async fn ask(links: &Links, changes: BTreeMap<String, PolicyChange>) -> Vec<NodeImpact> {
    let each = (FLOWS_MAX / changes.len().max(1)).clamp(1, FLOWS_PER_NODE_MAX);
    let asked = changes.into_iter().map(|(node, change)| ask_one(links, node, change, each));
    let mut impacts: Vec<_> = stream::iter(asked).buffered(ASKED_MAX).collect().await;
    let mut left = FLOWS_MAX;
    for impact in impacts.iter_mut().filter_map(|node| node.impact.as_mut()) {
        impact.flows.truncate(left);
        left -= impact.flows.len();
    }
    impacts
}

async fn ask_one(links: &Links, node: String, change: PolicyChange, max: usize) -> NodeImpact {
    let upsert = |(name, spec): (&String, &Arc<FirewallPolicySpec>)| Resource {
        name: format!("firewall-policy/{name}"),
        // Of no revision: it is not kept.
        version: 1,
        spec: Some(Spec::FirewallPolicy(FirewallPolicySpec::clone(spec))),
    };
    let preview = PolicyPreview {
        upserts: change.upserts.iter().map(upsert).collect(),
        removals: change.removals.iter().map(|name| format!("firewall-policy/{name}")).collect(),
        max: max as u32,
    };
    let (impact, error) = match links.ask(&node, Command::Preview(preview), PATIENCE).await {
        Ok(Outcome::Impact(impact)) => (Some(impact), String::new()),
        Ok(_) => (None, other_answer().message().to_owned()),
        Err(status) => (None, status.message().to_owned()),
    };
    NodeImpact { node, impact, error }
}
