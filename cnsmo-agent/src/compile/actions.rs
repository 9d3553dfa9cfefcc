//! What the rules do, beside what they match.

use cnsmo_common::control::{LIMITS_MAX, Limit, LiveParts, RuleAction, rule_flag, verdict};
use cnsmo_proto::model::{Action, RateLimit};

use super::{Breach, Budget, Compiled};
use crate::effective::Effective;

/// Rules with a limit that one VM can have; place 0 stands for none.
pub const LIMITED_RULES_MAX: usize = LIMITS_MAX as usize - 1;

/// What each rule does, in the order of the rules. Their counters begin at `first_slot`.
pub fn actions(policy: &Effective, first_slot: u32) -> Vec<RuleAction> {
    let mut limited = 0;
    let action = |(slot, owned): (u32, &crate::effective::OwnedRule)| {
        let log = if owned.rule.log { rule_flag::LOG } else { 0 };
        let audit = if owned.audit { rule_flag::AUDIT } else { 0 };
        let limit = match owned.rule.limit {
            Some(_) => {
                limited += 1;
                limited
            }
            None => 0,
        };
        RuleAction { slot, verdict: verdict_of(owned.rule.action), flags: log | audit, limit }
    };
    (first_slot..).zip(&policy.rules).map(action).collect()
}

/// The limits by their places.
pub fn limits(policy: &Effective) -> Vec<Limit> {
    let of_rules = policy.rules.iter().filter_map(|owned| owned.rule.limit).map(|limit| {
        const SECOND: u64 = 1_000_000_000;
        let RateLimit { flows, period_seconds, burst, per_source } = limit;
        // At most 1,000,000 flows a second: never 0.
        let interval = u64::from(period_seconds) * SECOND / u64::from(flows);
        let tolerance = interval * u64::from(burst - 1);
        Limit { interval, tolerance, per_source: per_source.into() }
    });
    std::iter::once(Limit::default()).chain(of_rules).collect()
}

/// The word that puts the policy in force.
pub fn live(policy: &Effective, compiled: &Compiled, half: u8, generation: u32) -> LiveParts {
    let is = |action| [policy.ingress == action, policy.egress == action];
    LiveParts {
        half,
        default_allow: is(Action::Allow),
        default_reject: is(Action::Reject),
        default_audit: policy.audit,
        open: policy.open,
        trees_v4: compiled.v4.trees,
        trees_v6: compiled.v6.trees,
        generation,
    }
}

/// Refuses more limits than there are places.
pub(super) fn check_limits(policy: &Effective) -> Result<(), Breach> {
    let limited = policy.rules.iter().zip(0..).filter(|(owned, _)| owned.rule.limit.is_some());
    let limited: Vec<u32> = limited.map(|(_, index)| index).collect();
    let total = limited.len();
    if total > LIMITED_RULES_MAX {
        return Err(Breach::new(Budget::Limits { total }, limited));
    }
    Ok(())
}

fn verdict_of(action: Action) -> u8 {
    match action {
        Action::Allow => verdict::ALLOW,
        Action::Deny => verdict::DENY,
        Action::Reject => verdict::REJECT,
    }
}

#[cfg(test)]
mod tests {
    use cnsmo_proto::model::{Direction, Rule};

    use super::*;
    use crate::compile::{
        Limits, Refused, compile,
        sample::{effective, rule},
    };

    fn limited(n: usize, flows: u32, period_seconds: u32, burst: u32) -> Rule {
        let limit = RateLimit { flows, period_seconds, burst, per_source: true };
        Rule { limit: Some(limit), ..rule(n, Direction::Ingress) }
    }

    #[test]
    fn rules_know_the_place_of_their_limit() {
        let plain = |n| rule(n, Direction::Ingress);
        let reject = Rule { action: Action::Reject, log: true, ..plain(2) };
        let mut policy =
            effective(vec![plain(0), limited(1, 10, 60, 5), reject, limited(3, 1_000_000, 1, 1)]);
        policy.rules[2].audit = true;
        let actions = actions(&policy, 7);
        let seen: Vec<_> = actions.iter().map(|a| (a.slot, a.verdict, a.flags, a.limit)).collect();
        let both = rule_flag::LOG | rule_flag::AUDIT;
        let allow = verdict::ALLOW;
        assert_eq!(
            seen,
            [(7, allow, 0, 0), (8, allow, 0, 1), (9, verdict::REJECT, both, 0), (10, allow, 0, 2)]
        );
        let limit = |interval, tolerance| Limit { interval, tolerance, per_source: 1 };
        let second = limit(6_000_000_000, 24_000_000_000);
        assert_eq!(limits(&policy), [Limit::default(), second, limit(1_000, 0)]);
    }

    #[test]
    fn more_limits_than_there_are_places_are_refused_with_the_policy() {
        let roomy = Limits { blob_words: 1 << 20, rules: 10_000 };
        let rules = |n| (0..n).map(|n| limited(n, 1, 1, 1)).collect();
        assert!(compile(&effective(rules(LIMITED_RULES_MAX)), &roomy).is_ok());
        let error = compile(&effective(rules(LIMITED_RULES_MAX + 1)), &roomy).unwrap_err();
        let Refused::Policies(policies) = error else { panic!("{error}") };
        let reason = policies.values().next().unwrap();
        assert!(reason.contains("1024 rules of this VM have a limit"), "{reason}");
    }
}
