//! What one VM shall enforce: the policies that select it, put together, its tunnel and its balancers.

use std::net::IpAddr;

use cnsmo_proto::model::{
    Action, Addresses, Algorithm, FirewallPolicy, FlowTimeouts, Name, PolicyMode, Rule, ServicePort,
};
use ipnet::IpNet;

/// The policies of one VM in one ordered list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effective {
    /// No policy that enforces selects this VM: everything passes, known flow or not.
    pub open: bool,
    /// For new flows towards the VM that no rule matches.
    pub ingress: Action,
    /// For new flows away from the VM that no rule matches.
    pub egress: Action,
    /// What the default refuses passes all the same, and is recorded. Ingress, egress.
    pub audit: [bool; 2],
    /// In order; the first match decides. The place in this list is the rule's index in the data path.
    pub rules: Vec<OwnedRule>,
    /// When flows are over, where policies that enforce say so.
    pub timeouts: FlowTimeouts,
    /// Fragments pass whose first one was not seen.
    pub orphans_pass: bool,
    /// The tunnel into the network that this VM is in.
    pub tunnel: Option<TunnelDevice>,
    /// By name.
    pub balancers: Vec<Balancer>,
}

/// A tunnel device, to be guarded like a network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelDevice {
    /// Name of the device. It is there.
    pub device: String,
    /// Of this VM in the network.
    pub addresses: Addresses,
    /// Of the network. What comes from them by another way than the tunnel is forged.
    pub prefixes: Vec<IpNet>,
    /// MTU of the device: TCP segments through it fit, whatever the ends believe.
    pub mtu: u16,
}

/// Virtual addresses, and the backends that new flows to them go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balancer {
    /// Name of the resource.
    pub name: Name,
    /// Virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// Their ports.
    pub ports: Vec<ServicePort>,
    /// How a new flow finds its backend.
    pub algorithm: Algorithm,
    /// Serves clients that come in by the network cards. Flows from this VM into the tunnel are served in any case.
    pub gateway: bool,
    /// Those that take new flows, by name; never this VM. Empty: new flows are refused.
    pub backends: Vec<BackendTarget>,
}

/// A VM behind a balancer, or an instance of a service on one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendTarget {
    /// Name of the VM.
    pub node: Name,
    /// Name of the instance, of which a VM may have several; `None`: the VM itself.
    pub instance: Option<Name>,
    /// In the network.
    pub addresses: Addresses,
    /// Where the instance listens, for ports of the balancer that have no target of their own. 0: nowhere else.
    pub port: u16,
}

impl BackendTarget {
    /// The name that its place in the ring comes from: the same on all VMs, and no other backend's.
    pub fn ring_name(&self) -> &str {
        self.instance.as_ref().unwrap_or(&self.node).as_str()
    }
}

/// A rule and the policy it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedRule {
    /// Name of the policy; `None`: built into the agent.
    pub policy: Option<Name>,
    /// The rule.
    pub rule: Rule,
    /// What it refuses passes all the same, and is recorded.
    pub audit: bool,
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
        let is_audited = |policy: &FirewallPolicy| policy.mode == PolicyMode::Audit;
        let default = |of: fn(&FirewallPolicy) -> Option<Action>| {
            let first = policies.iter().find_map(|(_, policy)| Some((of(policy)?, *policy)));
            first.map_or((Action::Allow, false), |(action, policy)| (action, is_audited(policy)))
        };
        let owned = policies.iter().flat_map(|(name, policy)| {
            // What is left of a peer stands for nobody.
            policy.rules.iter().filter(|rule| rule.peer.is_none()).map(|rule| OwnedRule {
                policy: Some((*name).clone()),
                rule: rule.clone(),
                audit: is_audited(policy),
            })
        });
        let built_in = built_in.into_iter();
        let built_in = built_in.map(|rule| OwnedRule { policy: None, rule, audit: false });
        let enforced = || policies.iter().map(|(_, policy)| policy).filter(|p| !is_audited(p));
        let timeouts =
            enforced().map(|p| p.timeouts).fold(FlowTimeouts::default(), FlowTimeouts::or);
        let orphans_pass = enforced().find_map(|p| p.orphan_fragments).unwrap_or(false);
        let (ingress, ingress_audit) = default(|p| p.defaults.ingress);
        let (egress, egress_audit) = default(|p| p.defaults.egress);
        Self {
            open: policies.iter().all(|(_, policy)| is_audited(policy)),
            ingress,
            egress,
            audit: [ingress_audit, egress_audit],
            rules: built_in.chain(owned).collect(),
            timeouts,
            orphans_pass,
            tunnel: None,
            balancers: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use cnsmo_proto::model::{Direction, PolicyDefaults};

    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn rule(text: &str) -> Rule {
        Rule::new(name(text), Action::Allow, Direction::Ingress)
    }

    fn policy(priority: u32, ingress: Option<Action>, rules: &[&str]) -> FirewallPolicy {
        FirewallPolicy {
            priority,
            defaults: PolicyDefaults { ingress, egress: None },
            rules: rules.iter().map(|text| rule(text)).collect(),
            ..FirewallPolicy::default()
        }
    }

    #[test]
    fn no_policy_is_open_even_with_built_in_rules() {
        let merged = Effective::merge(vec![rule("core")], []);
        assert!(merged.open);
        assert_eq!(merged.rules, [OwnedRule { policy: None, rule: rule("core"), audit: false }]);
        assert_eq!((merged.ingress, merged.egress), (Action::Allow, Action::Allow));
    }

    #[test]
    fn a_policy_without_rules_closes_nothing_but_tracks_flows() {
        let merged = Effective::merge(vec![], [(&name("a"), &policy(0, None, &[]))]);
        assert!(!merged.open);
        assert_eq!((merged.ingress, merged.egress), (Action::Allow, Action::Allow));
    }

    #[test]
    fn rules_are_built_in_first_then_by_priority_then_by_name() {
        let (late, b, a) =
            (policy(9, None, &["x"]), policy(5, None, &["y", "x"]), policy(5, None, &["z"]));
        let names = [name("aa-late"), name("b"), name("a")];
        let merged = Effective::merge(
            vec![rule("core")],
            [(&names[0], &late), (&names[1], &b), (&names[2], &a)],
        );
        let order: Vec<_> = merged
            .rules
            .iter()
            .map(|r| (r.policy.as_ref().map_or("-", Name::as_str), r.rule.name.as_str()))
            .collect();
        assert_eq!(order, [("-", "core"), ("a", "z"), ("b", "y"), ("b", "x"), ("aa-late", "x")]);
    }

    #[test]
    fn a_policy_on_trial_says_so_of_its_rules_and_defaults_and_closes_nothing() {
        let mut trial = policy(1, Some(Action::Deny), &["x"]);
        trial.mode = PolicyMode::Audit;
        let merged = Effective::merge(vec![rule("core")], [(&name("a"), &trial)]);
        assert_eq!(
            (merged.open, merged.ingress, merged.audit),
            (true, Action::Deny, [true, false])
        );
        assert_eq!(merged.rules.iter().map(|r| r.audit).collect::<Vec<_>>(), [false, true]);

        let enforced = policy(2, Some(Action::Deny), &["y"]);
        let both = [(&name("a"), &trial), (&name("b"), &enforced)];
        let merged = Effective::merge(vec![], both);
        assert_eq!((merged.open, merged.audit), (false, [true, false]));
        assert_eq!(merged.rules.iter().map(|r| r.audit).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn each_time_is_of_the_first_policy_in_force_that_states_it() {
        let seconds = |tcp_established, echo| FlowTimeouts {
            tcp_established,
            echo,
            ..FlowTimeouts::default()
        };
        let mut trial = policy(1, None, &[]);
        trial.mode = PolicyMode::Audit;
        (trial.timeouts, trial.orphan_fragments) = (seconds(Some(1), Some(1)), Some(true));
        let mut first = policy(2, None, &[]);
        (first.timeouts, first.orphan_fragments) = (seconds(Some(60), None), Some(false));
        let mut second = policy(3, None, &[]);
        (second.timeouts, second.orphan_fragments) = (seconds(Some(90), Some(5)), Some(true));
        let names = [name("a"), name("b"), name("c")];
        let all = [(&names[2], &second), (&names[1], &first), (&names[0], &trial)];
        let merged = Effective::merge(vec![], all);
        assert_eq!(merged.timeouts, seconds(Some(60), Some(5)));
        assert!(!merged.orphans_pass);
        let merged = Effective::merge(vec![], [(&names[2], &second)]);
        assert!(merged.orphans_pass);
    }

    #[test]
    fn the_first_policy_that_states_a_default_decides_for_its_direction() {
        let silent = policy(1, None, &[]);
        let deny = policy(2, Some(Action::Deny), &[]);
        let mut allow = policy(3, Some(Action::Allow), &[]);
        allow.defaults.egress = Some(Action::Deny);
        let names = [name("a"), name("b"), name("c")];
        let merged = Effective::merge(
            vec![],
            [(&names[2], &allow), (&names[1], &deny), (&names[0], &silent)],
        );
        assert_eq!((merged.ingress, merged.egress), (Action::Deny, Action::Deny));
    }
}
