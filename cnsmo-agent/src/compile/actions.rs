//! What the rules do, beside what they match.

use std::collections::BTreeSet;

use cnsmo_common::control::{LIMITS_MAX, Limit, LiveParts, RuleAction, rule_flag, verdict};
use cnsmo_proto::model::{Action, Name, RateLimit, Rule};

use super::{Breach, Budget, Compiled};
use crate::effective::{Effective, OwnedRule};

/// Rules with a limit that one VM can have; place 0 stands for none.
pub const LIMITED_RULES_MAX: usize = LIMITS_MAX as usize - 1;

/// What each rule does, in the order of the rules. Their counters begin at `first_slot`.
pub fn actions(policy: &Effective, first_slot: u32) -> Vec<RuleAction> {
    let mut limited = 0;
    let action = |(slot, owned): (u32, &OwnedRule)| {
        let log = if owned.rule.log { rule_flag::LOG } else { 0 };
        let audit = if owned.audit { rule_flag::AUDIT } else { 0 };
        let limit = if is_limited(&owned.rule) {
            limited += 1;
            limited
        } else {
            0
        };
        RuleAction { slot, verdict: verdict_of(owned.rule.action), flags: log | audit, limit }
    };
    (first_slot..).zip(&policy.rules).map(action).collect()
}

/// The limits by their places.
pub fn limits(policy: &Effective) -> Vec<Limit> {
    let mut groups = BTreeSet::new();
    let of_rules = policy.rules.iter().filter(|owned| is_limited(&owned.rule)).map(|owned| {
        let rate = owned.rule.limit.map(rate).unwrap_or_default();
        let connections = owned.rule.connections_per_source.unwrap_or_default();
        let group = if connections == 0 { 0 } else { group(owned, &mut groups) };
        Limit { connections, group, ..rate }
    });
    std::iter::once(Limit::default()).chain(of_rules).collect()
}

fn is_limited(rule: &Rule) -> bool {
    rule.limit.is_some() || rule.connections_per_source.is_some()
}

fn rate(limit: RateLimit) -> Limit {
    const SECOND: u64 = 1_000_000_000;
    let RateLimit { flows, period_seconds, burst, per_source } = limit;
    // At most 1,000,000 flows a second: never 0.
    let interval = u64::from(period_seconds) * SECOND / u64::from(flows);
    let tolerance = interval * u64::from(burst - 1);
    Limit { interval, tolerance, per_source: per_source.into(), ..Limit::default() }
}

/// A number above 0 that no other rule of the policy has, and that the rule keeps from one policy to the next unless another
/// one comes before it whose name falls on the same: its flows go on to be counted together.
fn group(owned: &OwnedRule, taken: &mut BTreeSet<u16>) -> u16 {
    let policy = owned.policy.as_ref().map_or("", Name::as_str);
    let bytes = policy.bytes().chain([0]).chain(owned.rule.name.as_str().bytes());
    // FNV-1a: the same in every version, unlike the hashes of the standard library.
    let hash = bytes
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let mut group = (hash ^ (hash >> 16)) as u16;
    // There are fewer rules with a limit than numbers.
    while group == 0 || !taken.insert(group) {
        group = group.wrapping_add(1);
    }
    group
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
    let limited = policy.rules.iter().zip(0..).filter(|(owned, _)| is_limited(&owned.rule));
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
        let limit =
            |interval, tolerance| Limit { interval, tolerance, per_source: 1, ..Limit::default() };
        let second = limit(6_000_000_000, 24_000_000_000);
        assert_eq!(limits(&policy), [Limit::default(), second, limit(1_000, 0)]);
    }

    #[test]
    fn a_rule_keeps_its_group_and_shares_it_with_none() {
        let counted = |n| Rule { connections_per_source: Some(9), ..rule(n, Direction::Ingress) };
        let groups = |rules: &[usize]| -> Vec<u16> {
            let policy = effective(rules.iter().map(|n| counted(*n)).collect());
            let limits = limits(&policy);
            assert!(limits[1..].iter().all(|l| (l.connections, l.interval) == (9, 0)));
            limits[1..].iter().map(|limit| limit.group).collect()
        };
        let all: Vec<_> = (0..LIMITED_RULES_MAX).collect();
        let distinct: BTreeSet<_> = groups(&all).into_iter().collect();
        assert_eq!((distinct.len(), distinct.contains(&0)), (LIMITED_RULES_MAX, false));
        assert_eq!(groups(&[5, 6, 7])[2], groups(&[7])[0]);
        // A rate alone counts nothing.
        assert_eq!(limits(&effective(vec![limited(1, 1, 1, 1)]))[1].group, 0);
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
