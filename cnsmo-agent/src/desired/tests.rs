use cnsmo_proto::pb::{
    agent::resource::Spec as Wire,
    balancer as balancer_pb, network as network_pb,
    policy::{Action, Direction, FirewallPolicySpec, FirewallRule, Peer},
};
use proptest::prelude::*;

use super::*;

const EPOCH: u64 = 7;

/// Names without a kind are of policies.
fn full(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("firewall-policy/{name}") }
}

/// A policy with one rule; the priority tells versions apart.
fn good(name: &str, revision: i64) -> Resource {
    let rule = FirewallRule {
        name: "r".into(),
        action: Action::Allow.into(),
        direction: Direction::Ingress.into(),
        ..Default::default()
    };
    let priority = u32::try_from(revision).unwrap();
    let spec = FirewallPolicySpec { priority, rules: vec![rule], ..Default::default() };
    Resource { name: full(name), version: revision, spec: Some(Wire::FirewallPolicy(spec)) }
}

/// Refused by the model: a priority above the limit.
fn bad(name: &str, revision: i64) -> Resource {
    let spec = FirewallPolicySpec { priority: u32::MAX, ..Default::default() };
    Resource { name: full(name), version: revision, spec: Some(Wire::FirewallPolicy(spec)) }
}

fn digest(set: &[(&str, i64)]) -> Vec<u8> {
    digest_of(set.iter().map(|(name, version)| (full(name), *version))).to_vec()
}

fn update(kind: Kind, base: i64, revision: i64, sent: &[(&str, i64)]) -> Update {
    Update {
        r#type: RESOURCE_TYPE.into(),
        kind: kind.into(),
        base_revision: base,
        revision,
        digest: digest(sent),
        ..Update::default()
    }
}

fn snapshot(revision: i64, upserts: &[Resource]) -> Update {
    let sent: Vec<_> = upserts.iter().map(|r| (r.name.as_str(), r.version)).collect();
    Update { upserts: upserts.to_vec(), ..update(Kind::Snapshot, 0, revision, &sent) }
}

/// `a` at 1 and `b` at 2.
fn two() -> DesiredSet {
    let update = snapshot(2, &[good("a", 1), good("b", 2)]);
    DesiredSet::default().stage(EPOCH, update).unwrap().into_set()
}

/// Name, version and priority of the policies.
fn names(set: &DesiredSet) -> Vec<(&str, i64, u32)> {
    let version = |name: &Name| set.running[&Key::FirewallPolicy(name.clone())].version;
    set.policies().map(|(n, p)| (n.as_str(), version(n), p.priority)).collect()
}

fn state(set: &DesiredSet) -> TypeState {
    set.running_state(&BTreeMap::new())
}

fn key(text: &str) -> Key {
    full(text).parse().unwrap()
}

#[test]
fn a_snapshot_replaces_everything() {
    let next = two().stage(EPOCH, snapshot(5, &[good("c", 5)])).unwrap().into_set();
    assert_eq!(names(&next), [("c", 5, 5)]);
    let state = state(&next);
    assert_eq!((state.revision, state.digest), (5, digest(&[("c", 5)])));
}

#[test]
fn a_delta_changes_what_it_names() {
    let delta = Update {
        upserts: vec![good("b", 4), good("c", 5)],
        removals: vec![full("a")],
        ..update(Kind::Delta, 2, 5, &[("b", 4), ("c", 5)])
    };
    let next = two().stage(EPOCH, delta).unwrap().into_set();
    assert_eq!(names(&next), [("b", 4, 4), ("c", 5, 5)]);
}

#[test]
fn a_bookmark_moves_the_revision_only() {
    let bookmark = update(Kind::Bookmark, 0, 9, &[("a", 1), ("b", 2)]);
    let next = two().stage(EPOCH, bookmark).unwrap().into_set();
    assert_eq!(state(&next).revision, 9);
    assert_eq!(next.running, two().running);
}

#[test]
fn updates_that_do_not_fit_are_refused_whole() {
    let set = two();
    let ab: &[_] = &[("a", 1), ("b", 2)];
    let twice = Update {
        upserts: vec![good("a", 3)],
        removals: vec![full("a")],
        ..update(Kind::Delta, 2, 3, ab)
    };
    let loaded = Update { removals: vec![full("a")], ..update(Kind::Bookmark, 0, 3, ab) };
    let mut other_type = update(Kind::Bookmark, 0, 3, ab);
    other_type.r#type = "cnsmo.policy.v1.FirewallPolicy".into();
    let short = Update { digest: vec![1; 31], ..update(Kind::Bookmark, 0, 3, ab) };
    let digest_of = |set: &DesiredSet| set.sent_digest();
    let cases = [
        (EPOCH, update(Kind::Delta, 1, 3, ab), Refusal::OtherBase { base: 1, have: 2 }),
        (EPOCH, update(Kind::Snapshot, 0, 1, &[]), Refusal::LowerRevision { revision: 1, have: 2 }),
        (EPOCH, update(Kind::Bookmark, 0, 1, ab), Refusal::LowerRevision { revision: 1, have: 2 }),
        (8, update(Kind::Delta, 2, 3, ab), Refusal::OtherEpoch { core: 8, have: EPOCH }),
        (8, update(Kind::Bookmark, 0, 3, ab), Refusal::OtherEpoch { core: 8, have: EPOCH }),
        (EPOCH, update(Kind::Unspecified, 0, 3, ab), Refusal::UnknownKind(0)),
        (EPOCH, twice, Refusal::Twice(full("a"))),
        (EPOCH, loaded, Refusal::BookmarkWithChanges),
        (EPOCH, other_type, Refusal::UnknownType("cnsmo.policy.v1.FirewallPolicy".into())),
        (
            EPOCH,
            update(Kind::Delta, 2, 3, &[("a", 1)]),
            Refusal::OtherDigest { have: digest_of(&set), update: hex(&digest(&[("a", 1)])) },
        ),
        (EPOCH, short, Refusal::OtherDigest { have: digest_of(&set), update: "01".repeat(31) }),
    ];
    for (epoch, update, refusal) in cases {
        assert_eq!(set.stage(epoch, update).unwrap_err(), refusal);
    }
}

#[test]
fn a_restored_store_may_go_back_with_a_snapshot() {
    let next = two().stage(8, snapshot(1, &[good("a", 1)])).unwrap().into_set();
    assert_eq!((next.store_epoch, next.revision), (8, 1));
}

#[test]
fn a_new_agent_takes_a_bookmark_of_nothing_in_any_epoch() {
    let next = DesiredSet::default().stage(EPOCH, update(Kind::Bookmark, 0, 4, &[])).unwrap();
    assert_eq!(state(next.set()).revision, 4);
}

#[test]
fn an_invalid_resource_is_rejected_alone_and_its_last_version_stays() {
    for kind in [Kind::Delta, Kind::Snapshot] {
        let update = Update {
            upserts: vec![bad("a", 3), good("b", 4), bad("Not A Name", 5)],
            ..update(kind, 2, 5, &[("a", 3), ("b", 4), ("Not A Name", 5)])
        };
        let next = two().stage(EPOCH, update).unwrap().into_set();
        assert_eq!(names(&next), [("a", 1, 1), ("b", 4, 4)]);
        let rejected = next.rejections();
        let rejected: Vec<_> = rejected.iter().map(|r| (r.name.as_str(), r.version)).collect();
        assert_eq!(rejected, [("firewall-policy/Not A Name", 5), ("firewall-policy/a", 3)]);
        assert!(next.rejections()[1].message.starts_with("spec.priority: "));
        assert_eq!(state(&next).digest, digest(&[("a", 1), ("b", 4)]));
    }
}

fn with_a_rejected() -> DesiredSet {
    let update =
        Update { upserts: vec![bad("a", 3)], ..update(Kind::Delta, 2, 3, &[("a", 3), ("b", 2)]) };
    two().stage(EPOCH, update).unwrap().into_set()
}

#[test]
fn what_was_rejected_still_counts_as_sent() {
    let set = with_a_rejected();
    let bookmark = update(Kind::Bookmark, 0, 4, &[("a", 3), ("b", 2)]);
    assert_eq!(set.stage(EPOCH, bookmark).unwrap().set().rejections().len(), 1);
    let repaired =
        Update { upserts: vec![good("a", 4)], ..update(Kind::Delta, 3, 4, &[("a", 4), ("b", 2)]) };
    let next = set.stage(EPOCH, repaired).unwrap().into_set();
    assert!(next.rejections().is_empty());
    assert_eq!(names(&next), [("a", 4, 4), ("b", 2, 2)]);
    let removed = Update { removals: vec![full("a")], ..update(Kind::Delta, 3, 4, &[("b", 2)]) };
    let next = set.stage(EPOCH, removed).unwrap().into_set();
    assert!(next.rejections().is_empty());
    assert_eq!(names(&next), [("b", 2, 2)]);
}

#[test]
fn a_core_may_count_what_runs_in_place_of_what_was_rejected() {
    let set = with_a_rejected();
    let bookmark = update(Kind::Bookmark, 0, 4, &[("a", 1), ("b", 2)]);
    assert_eq!(set.stage(EPOCH, bookmark).unwrap().set().rejections().len(), 1);
    // A rejection that the core cannot know of yet counts as sent.
    let delta =
        Update { upserts: vec![bad("b", 4)], ..update(Kind::Delta, 3, 4, &[("a", 1), ("b", 4)]) };
    let next = set.stage(EPOCH, delta).unwrap().into_set();
    assert_eq!(names(&next), [("a", 1, 1), ("b", 2, 2)]);
    assert_eq!(next.rejections().len(), 2);
    let too_early = update(Kind::Bookmark, 0, 4, &[("a", 1), ("b", 1)]);
    assert!(set.stage(EPOCH, too_early).is_err());
}

#[test]
fn a_policy_that_the_data_path_refuses_falls_back_to_its_last_version() {
    let before = two();
    let delta = Update {
        upserts: vec![good("a", 3), good("c", 4)],
        ..update(Kind::Delta, 2, 4, &[("a", 3), ("b", 2), ("c", 4)])
    };
    let mut staged = before.stage(EPOCH, delta).unwrap();
    let refused = |n: &str| BTreeMap::from([(key(n), "too large".to_owned())]);
    assert!(!staged.fall_back(&before, &refused("b")), "b has not changed");
    assert!(staged.fall_back(&before, &refused("a")));
    assert!(!staged.fall_back(&before, &refused("a")), "a is the last version again");
    assert!(staged.fall_back(&before, &refused("c")));
    let set = staged.into_set();
    assert_eq!(names(&set), [("a", 1, 1), ("b", 2, 2)]);
    assert_eq!(set.sent_digest().to_vec(), digest(&[("a", 3), ("b", 2), ("c", 4)]));
}

#[test]
fn the_ledger_keeps_what_runs_and_what_was_rejected() {
    let set = with_a_rejected();
    assert_eq!(DesiredSet::from_record(set.to_record(vec![])), set);
}

fn derived(name: &str, version: i64, spec: Wire) -> Resource {
    Resource { name: name.into(), version, spec: Some(spec) }
}

fn network(name: &str, version: i64) -> Resource {
    let spec = network_pb::NetworkSpec { ipv4_prefix: "10.70.0.0/24".into(), ..Default::default() };
    derived(&format!("network/{name}"), version, Wire::Network(spec))
}

fn member(network: &str, node: &str, last: u8) -> Resource {
    let spec = network_pb::Member {
        network: network.into(),
        node: node.into(),
        ipv4: format!("10.70.0.{last}"),
        public_key: vec![last; 32],
        ..Default::default()
    };
    derived(&format!("member/{network}/{node}"), last.into(), Wire::Member(spec))
}

fn balancer(name: &str, version: i64) -> Resource {
    let spec = balancer_pb::LoadBalancerSpec {
        network: "n".into(),
        addresses: vec!["10.70.0.80".into()],
        ports: vec![balancer_pb::ServicePort { protocol: 6, port: 80, target_port: 0 }],
        ..Default::default()
    };
    derived(&format!("load-balancer/{name}"), version, Wire::LoadBalancer(spec))
}

fn backend(balancer: &str, node: &str, version: i64) -> Resource {
    let spec = balancer_pb::Backend {
        load_balancer: balancer.into(),
        node: node.into(),
        ipv4: "10.70.0.2".into(),
        draining: version % 2 == 0,
        ..Default::default()
    };
    derived(&format!("backend/{balancer}/{node}"), version, Wire::Backend(spec))
}

fn one_of_each() -> DesiredSet {
    let all = [
        good("a", 1),
        network("n", 1),
        member("n", "x", 2),
        balancer("b", 3),
        backend("b", "x", 5),
    ];
    DesiredSet::default().stage(EPOCH, snapshot(5, &all)).unwrap().into_set()
}

#[test]
fn all_kinds_are_kept_and_come_back_from_the_ledger() {
    let set = one_of_each();
    assert_eq!(set.rejections(), []);
    assert_eq!((set.policies().count(), set.networks().count(), set.members().count()), (1, 1, 1));
    assert_eq!((set.balancers().count(), set.backends().count()), (1, 1));
    let (n, x) = (Name::new("n").unwrap(), Name::new("x").unwrap());
    assert_eq!(set.member(&n, &x).unwrap().node, x);
    assert_eq!(set.member(&x, &n), None);
    assert_eq!(DesiredSet::from_record(set.to_record(vec![])), set);
}

#[test]
fn a_name_that_contradicts_its_content_is_rejected_alone() {
    let as_other = |name: &str, resource: Resource| Resource { name: name.into(), ..resource };
    for (resource, reason) in [
        (as_other("member/m/x", member("n", "x", 2)), "spec.network: is `n`, the name says `m`"),
        (as_other("member/n/y", member("n", "x", 2)), "spec.node: is `x`, the name says `y`"),
        (
            as_other("backend/c/x", backend("b", "x", 1)),
            "spec.loadBalancer: is `b`, the name says `c`",
        ),
        (as_other("backend/b/y", backend("b", "x", 1)), "spec.node: is `x`, the name says `y`"),
        (as_other("network/n", good("n", 1)), "spec: is not of the kind that the name says"),
        (as_other("volume/n", good("n", 1)), "name: begins with no kind"),
        (Resource { spec: None, ..good("n", 1) }, "spec: missing"),
    ] {
        let next = DesiredSet::default().stage(EPOCH, snapshot(1, &[resource, good("a", 1)]));
        let next = next.unwrap().into_set();
        let [rejection] = &next.rejections()[..] else { panic!("not one rejection") };
        assert!(rejection.message.starts_with(reason), "{}", rejection.message);
        assert_eq!(names(&next), [("a", 1, 1)]);
    }
}

#[test]
fn what_is_blocked_is_kept_but_does_not_count_as_running() {
    let set = one_of_each();
    let blocked = BTreeMap::from([(key("network/n"), "no device".to_owned())]);
    let without = [("a", 1), ("member/n/x", 2), ("load-balancer/b", 3), ("backend/b/x", 5)];
    assert_eq!(set.running_state(&blocked).digest, digest(&without));
    let [error] = &set.errors(&blocked)[..] else { panic!("not one error") };
    assert_eq!((&*error.name, error.version, &*error.message), ("network/n", 1, "no device"));
    assert_eq!(set.sent_digest().to_vec(), state(&set).digest);
}

#[test]
fn a_refused_balancer_takes_its_changed_backends_back_with_it() {
    let before = one_of_each();
    let sent = [
        ("a", 1),
        ("network/n", 1),
        ("member/n/x", 2),
        ("load-balancer/b", 3),
        ("backend/b/x", 6),
        ("backend/b/y", 7),
    ];
    let delta = Update {
        upserts: vec![backend("b", "x", 6), backend("b", "y", 7)],
        ..update(Kind::Delta, 5, 7, &sent)
    };
    let mut staged = before.stage(EPOCH, delta).unwrap();
    let refused = BTreeMap::from([(key("load-balancer/b"), "too many".to_owned())]);
    assert!(staged.fall_back(&before, &refused));
    assert!(!staged.fall_back(&before, &refused), "nothing more can go back");
    let set = staged.into_set();
    assert_eq!(set.running, before.running);
    let rejected: Vec<_> = set.rejections().into_iter().map(|r| (r.name, r.version)).collect();
    assert_eq!(rejected, [("backend/b/x".to_owned(), 6), ("backend/b/y".to_owned(), 7)]);
    assert_eq!(set.sent_digest().to_vec(), digest(&sent));
}

#[test]
fn a_peer_that_the_core_has_not_resolved_is_refused_by_name() {
    let about = |version, peer: Peer| {
        let mut policy = good("a", version);
        if let Some(Wire::FirewallPolicy(spec)) = &mut policy.spec {
            spec.rules[0].from = Some(peer);
        }
        policy
    };
    let services = Peer { service: "web".into(), ..Peer::default() };
    let labels = Peer { labels: [("role".into(), "lb".into())].into(), ..Peer::default() };
    for peer in [services, labels] {
        let delta = Update {
            upserts: vec![about(3, peer)],
            ..update(Kind::Delta, 2, 3, &[("a", 3), ("b", 2)])
        };
        let staged = two().stage(EPOCH, delta).unwrap().into_set();
        assert_eq!(names(&staged), [("a", 1, 1), ("b", 2, 2)], "the version before stays");
        let [error] = &staged.errors(&BTreeMap::new())[..] else { panic!() };
        assert!(error.message.starts_with("spec.rules[0].from: "), "{}", error.message);
    }
    let nobody = snapshot(3, &[about(3, Peer::default())]);
    let staged = DesiredSet::default().stage(EPOCH, nobody).unwrap().into_set();
    assert_eq!(names(&staged), [("a", 3, 3)]);
}

#[test]
fn too_many_resources_are_refused_whole() {
    let all: Vec<_> = (0..=RESOURCES_MAX).map(|n| good(&format!("p{n}"), 1)).collect();
    let refusal = DesiredSet::default().stage(EPOCH, snapshot(1, &all)).unwrap_err();
    assert_eq!(refusal, Refusal::TooMany(RESOURCES_MAX + 1));
}

/// What a core may send: right or wrong in each part on its own.
#[derive(Clone, Debug)]
struct Step {
    kind: Kind,
    /// (name, valid); the revision is the update's.
    upserts: BTreeMap<String, bool>,
    removals: BTreeSet<String>,
    right_base: bool,
    right_digest: bool,
    goes_back: bool,
}

fn step() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![Just(Kind::Snapshot), Just(Kind::Delta), Just(Kind::Bookmark)];
    let upserts = prop::collection::btree_map("[a-d]", prop::bool::weighted(0.7), 0..3);
    let removals = prop::collection::btree_set("[a-d]", 0..2);
    let mostly = || prop::bool::weighted(0.9);
    (kind, upserts, removals, mostly(), mostly(), mostly()).prop_map(
        |(kind, upserts, removals, right_base, right_digest, forward)| Step {
            kind,
            upserts,
            removals,
            right_base,
            right_digest,
            goes_back: !forward,
        },
    )
}

/// The plain model: what was sent last and what of it was valid last, per name.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    revision: i64,
    sent: BTreeMap<String, i64>,
    good: BTreeMap<String, i64>,
}

impl Model {
    /// The model after the step as the core means it, and the message for it.
    fn send(&self, step: &Step) -> (Self, Update) {
        let mut next = self.clone();
        next.revision += if step.goes_back { -1 } else { 1 };
        let mut update = update(step.kind, self.revision, next.revision, &[]);
        if step.kind != Kind::Bookmark {
            if step.kind == Kind::Snapshot {
                next.sent.clear();
            } else {
                update.removals = step.removals.iter().map(|name| full(name)).collect();
                next.sent.retain(|name, _| !step.removals.contains(name));
            }
            let revision = next.revision.max(1);
            for (name, valid) in &step.upserts {
                update.upserts.push(if *valid {
                    good(name, revision)
                } else {
                    bad(name, revision)
                });
                next.sent.insert(name.clone(), revision);
                if *valid {
                    next.good.insert(name.clone(), revision);
                }
            }
            next.good.retain(|name, _| next.sent.contains_key(name));
        }
        if !step.right_base {
            update.base_revision += 1;
        }
        let sent: Vec<_> = next.sent.iter().map(|(n, r)| (n.as_str(), *r)).collect();
        update.digest = digest(&sent);
        if !step.right_digest {
            update.digest[0] ^= 1;
        }
        (next, update)
    }
}

proptest! {
    #[test]
    fn any_updates_leave_the_last_accepted_set(steps in prop::collection::vec(step(), 0..40)) {
        let (mut set, mut model) = (DesiredSet::default(), Model::default());
        for step in steps {
            let (next, update) = model.send(&step);
            let twice = step.kind == Kind::Delta
                && step.upserts.keys().any(|name| step.removals.contains(name));
            let acceptable = step.right_digest
                && !step.goes_back
                && !twice
                && (step.kind != Kind::Delta || step.right_base);
            match set.stage(EPOCH, update) {
                Ok(staged) => {
                    prop_assert!(acceptable, "accepted {step:?}");
                    set = staged.into_set();
                    model = next;
                }
                Err(refusal) => prop_assert!(!acceptable, "{refusal}: {step:?}"),
            }
            let running: BTreeMap<_, _> =
                names(&set).iter().map(|(name, version, _)| (name.to_string(), *version)).collect();
            prop_assert_eq!(&running, &model.good);
            prop_assert_eq!(set.revision, model.revision);
            let stored = DesiredSet::from_record(set.to_record(vec![]));
            prop_assert_eq!(&stored, &set, "the ledger loses nothing");
        }
    }
}
