//! Which VMs a plan gives other policies.

use std::{collections::BTreeMap, sync::Arc};

use cnsmo_proto::{model::Labels, pb::policy::FirewallPolicySpec};

use super::{Plan, State, StoredPolicy, Write, check::Next};

/// What a plan changes of the policies of one VM.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PolicyChange {
    /// New ones, and those that are others, by name.
    pub upserts: BTreeMap<String, Arc<FirewallPolicySpec>>,
    /// Names.
    pub removals: Vec<String>,
}

impl State {
    /// By name of the VM; none for those that keep their policies.
    pub fn policy_changes(&self, plan: &Plan) -> BTreeMap<String, PolicyChange> {
        let next = Next::new(self, &plan.writes);
        let relabelled: BTreeMap<&str, &Labels> = plan
            .writes
            .iter()
            .filter_map(|write| match write {
                Write::Node(node) => Some((node.metadata.name.as_str(), &node.labels)),
                _ => None,
            })
            .collect();
        let mut changes = BTreeMap::new();
        for (name, node) in &self.nodes {
            let labels = relabelled.get(name.as_str()).copied().unwrap_or(&node.labels);
            let before = selecting(self.policies.values(), &node.labels);
            let after = selecting(next.policies.values().copied(), labels);
            let change = PolicyChange::between(&before, &after);
            if change != PolicyChange::default() {
                changes.insert(name.clone(), change);
            }
        }
        changes
    }
}

type Specs<'a> = BTreeMap<&'a str, &'a Arc<FirewallPolicySpec>>;

fn selecting<'a>(policies: impl Iterator<Item = &'a StoredPolicy>, labels: &Labels) -> Specs<'a> {
    policies
        .filter(|policy| policy.model.target.selects(labels))
        .map(|policy| (policy.metadata.name.as_str(), &policy.spec))
        .collect()
}

impl PolicyChange {
    fn between(before: &Specs<'_>, after: &Specs<'_>) -> Self {
        // The same allocation is the same policy: one that stays is not compared rule by rule.
        let is_new = |name: &&str, spec: &Arc<FirewallPolicySpec>| {
            before.get(*name).is_none_or(|old| !Arc::ptr_eq(old, spec) && *old != spec)
        };
        let upserts = after.iter().filter(|(name, spec)| is_new(name, spec));
        let removals = before.keys().filter(|name| !after.contains_key(*name));
        Self {
            upserts: upserts.map(|(name, spec)| ((*name).to_owned(), Arc::clone(spec))).collect(),
            removals: removals.map(|name| (*name).to_owned()).collect(),
        }
    }
}
