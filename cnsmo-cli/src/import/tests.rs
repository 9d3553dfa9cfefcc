//! What both languages become. Expected policies are written in short: action, sources, protocol and ports.

mod iptables;
mod nftables;
mod oracle;
mod readers;

use cnsmo_proto::{
    manifest::{self, Original, action_text, traffic},
    model::{Direction, Labels},
    pb::{
        policy::{Action, FirewallPolicySpec},
        resource::resource::Resource as Kind,
    },
};

use super::{
    emit::{Outcome, translate},
    ir::{Effect, RuleSet},
};
use crate::output::yaml;

/// The policy as `cnsmo apply` reads what is printed: defaults, then rules in a line each.
fn told(outcome: &Outcome) -> Vec<String> {
    let args = super::PolicyArgs {
        name: cnsmo_proto::model::Name::new("imported").unwrap(),
        target: Labels::default(),
        priority: 1000,
        partial: true,
    };
    let text = super::comments(outcome) + &yaml(&super::manifest(&args, outcome).unwrap()).unwrap();
    let parsed = manifest::parse("printed.yaml", &text, &Original::default()).unwrap();
    let Some(Kind::FirewallPolicy(policy)) = &parsed.resources[0].resource else {
        panic!("no policy: {text}")
    };
    let spec = policy.spec.as_ref().unwrap();
    let mut lines = vec![format!(
        "{} {}",
        default_word(spec.default_ingress()),
        default_word(spec.default_egress())
    )];
    lines.extend(rules(spec));
    lines
}

fn default_word(action: Action) -> String {
    format!("{action:?}").to_lowercase()
}

fn rules(spec: &FirewallPolicySpec) -> Vec<String> {
    let one = |rule: &cnsmo_proto::pb::policy::FirewallRule| {
        let way = manifest::direction(rule.direction());
        let mut text = format!("{}: {way} {} {}", rule.name, action_text(rule), traffic(rule));
        for (word, nets) in [("from", &rule.from_cidrs), ("to", &rule.to_cidrs)] {
            if !nets.is_empty() {
                text.push_str(&format!(" {word} {}", nets.join(",")));
            }
        }
        text
    };
    spec.rules.iter().map(one).collect()
}

fn outcome(set: &RuleSet) -> Outcome {
    translate(set, Labels::default(), 1000).unwrap()
}

/// Effect and reason of what was left out.
fn left(outcome: &Outcome) -> Vec<(Effect, &str)> {
    outcome.left.iter().map(|left| (left.effect, left.reason.as_str())).collect()
}

/// The only rule left out has this effect, and this in its reason.
fn assert_left(outcome: &Outcome, effect: Effect, reason: &str) {
    let left = left(outcome);
    let [(found, why)] = left[..] else { panic!("not one: {left:#?}") };
    assert!(found == effect && why.contains(reason), "{left:#?}");
}

#[test]
fn chains_in_a_circle_are_refused() {
    let text = "*filter\n:INPUT ACCEPT [0:0]\n:A - [0:0]\n:B - [0:0]\n-A INPUT -j A\n-A A -j B\n\
                -A B -j A\nCOMMIT\n";
    let set = super::iptables::read("x", text, false).unwrap();
    let error = translate(&set, Labels::default(), 1000).unwrap_err();
    assert!(error.to_string().contains("circle"), "{error}");
}

#[test]
fn chains_that_grow_without_measure_are_refused() {
    use std::fmt::Write as _;
    let mut text = "*filter\n:INPUT ACCEPT [0:0]\n".to_owned();
    for n in 0..20 {
        writeln!(text, ":C{n} - [0:0]").unwrap();
    }
    text.push_str("-A INPUT -j C0\n");
    for n in 0..19 {
        for _ in 0..4 {
            writeln!(text, "-A C{n} -j C{}", n + 1).unwrap();
        }
    }
    text.push_str("-A C19 -s 10.0.0.0/8 -j ACCEPT\nCOMMIT\n");
    let set = super::iptables::read("x", &text, false).unwrap();
    let error = translate(&set, Labels::default(), 1000).unwrap_err();
    assert!(error.to_string().contains("too many rules"), "{error}");
}

#[test]
fn both_families_of_iptables_stay_apart() {
    let v4 = "*filter\n:INPUT DROP [0:0]\n-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
              -A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\nCOMMIT\n";
    let v6 = v4.replace("22", "443");
    let mut set = super::iptables::read("v4", v4, false).unwrap();
    let alone = outcome(&set);
    // IPv6 was open and stays open.
    assert_eq!(
        told(&alone),
        [
            "allow allow",
            "input-2: ingress allow tcp 22 from 0.0.0.0/0",
            "input-policy: ingress deny any from 0.0.0.0/0",
        ]
    );
    assert!(alone.notes.iter().any(|note| note.contains("no input chain is for IPv6")));
    set.merge(super::iptables::read("v6", &v6, true).unwrap());
    let both = outcome(&set);
    assert_eq!(
        told(&both),
        [
            "deny allow",
            "input-2: ingress allow tcp 22 from 0.0.0.0/0",
            "v6-input-2: ingress allow tcp 443 from ::/0",
        ]
    );
    assert!(both.left.is_empty() && both.notes.is_empty(), "{both:#?}");
    assert_eq!(both.policy.rules[0].direction, Direction::Ingress);
}
