//! The data path at the limits of its tables and of its policy.

use std::{
    io,
    net::{IpAddr, UdpSocket},
};

use cnsmo_agent::{
    compile::sample::{self, AddressFamily, Style},
    datapath::{ApplyError, Datapath as _, kernel::Options},
    effective::Effective,
};
use cnsmo_proto::{
    model::{Action, Direction, FirewallPolicy, RULES_MAX},
    pb::policy as pb,
};
use cnsmo_tests::Netns;

use super::lab::{
    FAMILIES, Lab, PATIENCE, PEER4, SILENCE, VM4, allow_in, arrives, counted, deny_in, dropped,
    name, policy, socket, udp,
};

/// Of each flow table.
const FLOWS: u32 = 256;

/// A flow that the VM begins, and the end at which it is answered.
struct Talk<'a> {
    inside: UdpSocket,
    outside: &'a UdpSocket,
}

impl<'a> Talk<'a> {
    fn begin(vm: &Netns, own: IpAddr, outside: &'a UdpSocket) -> Self {
        let talk = Self { inside: socket(vm, own, 0), outside };
        talk.inside.connect(outside.local_addr().unwrap()).unwrap();
        talk
    }

    /// A question and its answer.
    fn goes_on(&self) -> io::Result<()> {
        self.inside.send(b"question")?;
        let from = self.inside.local_addr()?;
        while self.outside.recv_from(&mut [0; 16])?.1 != from {}
        self.is_answered()
    }

    /// Something that comes in without a question, which only a known flow may.
    fn is_answered(&self) -> io::Result<()> {
        self.outside.send_to(b"answer", self.inside.local_addr()?)?;
        self.inside.recv(&mut [0; 16]).map(drop)
    }
}

#[test]
fn full_tables_are_counted_and_old_flows_go_on() {
    let lab = Lab::new("lim-flows");
    let options = Options { flows: FLOWS, ..lab.options() };
    let mut kernel = lab.open_with(options).unwrap();
    lab.apply(&mut kernel, &deny_in(vec![allow_in("open", udp(80))]));
    let _unanswered = FAMILIES.map(|(vm, _)| lab.udp(&lab.vm, vm, 80));
    for (n, (vm, peer)) in FAMILIES.into_iter().enumerate() {
        let outside = lab.udp(&lab.peer, peer, 53);
        let begin = || Talk::begin(&lab.vm, vm, &outside);
        let full = kernel.status().established_full;
        let old: Vec<_> = (0..FLOWS).map(|_| begin()).collect();
        for talk in &old {
            talk.goes_on().unwrap();
        }
        assert_eq!(kernel.status().established_full, full, "there was room");
        // The kernel keeps an element per CPU beyond the limit.
        let more: Vec<_> = (0..FLOWS).map(|_| begin()).collect();
        for talk in &more {
            talk.goes_on().unwrap();
        }
        let found_no_room = kernel.status().established_full - full;
        assert!(found_no_room >= u64::from(FLOWS) / 2, "{found_no_room}");

        // A flood of flows that nobody answers, several times as many as the table holds.
        let flood = |n: u32| {
            let sender = lab.udp(&lab.peer, peer, 0);
            sender.send_to(b"flood", (vm, 80)).unwrap_or_else(|error| panic!("{n}: {error}"));
        };
        let before = counted(&mut kernel, "open").packets;
        (0..8 * FLOWS).for_each(flood);
        assert_eq!(counted(&mut kernel, "open").packets - before, u64::from(8 * FLOWS), "{n}");
        for talk in &old {
            talk.is_answered().unwrap();
        }
        // The control: those that found no room are forgotten, and begin anew when the VM speaks.
        let forgotten = more.iter().filter(|talk| {
            talk.inside.set_read_timeout(Some(SILENCE / 30)).unwrap();
            talk.is_answered().is_err()
        });
        assert!(forgotten.count() > FLOWS as usize / 2);
        for talk in &more {
            talk.inside.set_read_timeout(Some(PATIENCE)).unwrap();
            talk.goes_on().unwrap();
        }
    }
    assert_eq!(dropped(&mut kernel, Direction::Egress, "denied-by-default"), 0);
}

/// Security groups, and behind them one rule for the peer.
fn groups(rules: usize) -> Effective {
    let mut policy = sample::policy(Style::Groups, AddressFamily::V4, rules - 1, 3);
    let open = deny_in(vec![allow_in("open", udp(80))]);
    policy.rules.extend(open.rules);
    policy
}

#[test]
fn a_policy_has_no_rules_or_a_hundred_thousand_and_never_more_than_fit() {
    let lab = Lab::new("lim-rules");
    let [open, shut] = [80, 81].map(|port| lab.udp(&lab.vm, VM4, port));
    let options = Options { rules_max: RULES_MAX as u32, policy_bytes: 16 << 20, ..lab.options() };
    let mut kernel = lab.open_with(options).unwrap();
    let hears = || [&open, &shut].map(|socket| lab.hears(socket, PEER4));

    lab.apply(&mut kernel, &policy(Action::Allow, Action::Allow, vec![]));
    assert_eq!((kernel.status().rules, hears()), (0, [true, true]));
    lab.apply(&mut kernel, &policy(Action::Deny, Action::Deny, vec![]));
    assert_eq!((kernel.status().rules, hears()), (0, [false, false]));

    lab.apply(&mut kernel, &groups(100_000));
    assert_eq!((kernel.status().rules, hears()), (100_000, [true, false]));
    assert_eq!(counted(&mut kernel, "open").packets, 1);

    let Err(ApplyError::Refused(refused)) = lab.try_apply(&mut kernel, &groups(RULES_MAX + 1))
    else {
        panic!("one rule more than there is room for was taken");
    };
    let reason = &refused[&name("sample")];
    assert!(reason.contains("131073 rules") && reason.contains("131072"), "{reason}");
    assert_eq!((kernel.status().rules, hears()), (100_000, [true, false]), "the old one stays");
    assert!(!arrives(&shut));
}

#[test]
fn a_policy_has_as_many_rules_as_one_may_have_and_not_one_more() {
    let rule = |n| pb::FirewallRule {
        name: format!("r{n}"),
        action: pb::Action::Allow.into(),
        direction: pb::Direction::Ingress.into(),
        ..pb::FirewallRule::default()
    };
    let spec = |rules| pb::FirewallPolicySpec {
        rules: (0..rules).map(rule).collect(),
        ..pb::FirewallPolicySpec::default()
    };
    assert_eq!(RULES_MAX, 131_072);
    assert_eq!(FirewallPolicy::try_from(spec(RULES_MAX)).unwrap().rules.len(), RULES_MAX);
    let error = FirewallPolicy::try_from(spec(RULES_MAX + 1)).unwrap_err();
    assert_eq!(error.field(), "rules", "{error}");
}
