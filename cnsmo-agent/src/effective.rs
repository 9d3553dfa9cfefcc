//! What one VM shall enforce: the policies that select it, put together.

use cnsmo_proto::model::{Action, FirewallPolicy, Name, Rule};

/// The policies of one VM in one ordered list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effective {
    /// No policy selects this VM: everything passes, known flow or not.
    pub open: bool,
    /// For new flows towards the VM that no rule matches.
    pub ingress: Action,
    /// For new flows away from the VM that no rule matches.
    pub egress: Action,
    /// In order; the first match decides. The place in this list is the rule's index in the data path.
    pub rules: Vec<OwnedRule>,
}

/// A rule and the policy it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedRule {
    /// Name of the policy; `None`: built into the agent.
    pub policy: Option<Name>,
    /// The rule.
    pub rule: Rule,
}

impl Effective {
    /// Puts `built_in` first, then the policies by priority and name. Of each direction the first policy that states a
    /// default decides; none does: allow.
    pub fn merge<'a>(
        built_in: Vec<Rule>,
        policies: impl IntoIterator<Item = (&'a Name, &'a FirewallPolicy)>,
    ) -> Self {
        let mut policies: Vec<_> = policies.into_iter().collect();
        policies.sort_by_key(|(name, policy)| (policy.priority, *name));
        let default = |of: fn(&FirewallPolicy) -> Option<Action>| {
            policies.iter().find_map(|(_, policy)| of(policy)).unwrap_or(Action::Allow)
        };
        let owned = policies.iter().flat_map(|(name, policy)| {
            let own = |rule: &Rule| OwnedRule { policy: Some((*name).clone()), rule: rule.clone() };
            policy.rules.iter().map(own)
        });
        let built_in = built_in.into_iter().map(|rule| OwnedRule { policy: None, rule });
        Self {
            open: policies.is_empty(),
            ingress: default(|p| p.defaults.ingress),
            egress: default(|p| p.defaults.egress),
            rules: built_in.chain(owned).collect(),
        }
    }
}
