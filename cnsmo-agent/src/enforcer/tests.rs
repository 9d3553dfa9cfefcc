use std::sync::Mutex as SyncMutex;

use cnsmo_proto::pb::{
    agent::{Resource, resource::Spec},
    policy::FirewallPolicySpec,
};
use cnsmo_service::supervise::{Stopper, stop_pair};

use super::*;

/// Enforces what it is given, except what it is told to refuse.
#[derive(Clone, Default)]
struct Fake(Arc<SyncMutex<Inner>>);

#[derive(Default)]
struct Inner {
    applied: Vec<Effective>,
    /// Policies to refuse, by priority: the version is in it.
    refuse: Vec<u32>,
    blame: Option<Name>,
    fail: bool,
    crash: bool,
    sweeps: u32,
}

impl Fake {
    fn set(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    fn last(&self) -> Effective {
        let inner = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        inner.applied.last().unwrap().clone()
    }

    fn times(&self) -> usize {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).applied.len()
    }

    fn open(&self) -> OpenDatapath {
        let this = self.clone();
        Arc::new(move || Ok(Box::new(this.clone())))
    }
}

impl Datapath for Fake {
    fn apply(&mut self, policy: &Effective) -> Result<(), ApplyError> {
        let mut inner = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if std::mem::take(&mut inner.crash) {
            drop(inner);
            panic!("crashed as asked");
        }
        if inner.fail {
            return Err(ApplyError::Failed("no memory".into()));
        }
        let at_fault = |rule: &&crate::effective::OwnedRule| {
            let port = match &rule.rule.protocol {
                Protocol::Ports { destination, .. } => destination[0].first(),
                _ => 0,
            };
            rule.policy.is_some() && inner.refuse.contains(&u32::from(port))
        };
        let names = policy.rules.iter().filter(at_fault).flat_map(|rule| rule.policy.clone());
        let names: BTreeMap<_, _> =
            names.map(|n| (inner.blame.clone().unwrap_or(n), "too large".to_owned())).collect();
        if !names.is_empty() {
            return Err(ApplyError::Refused(names));
        }
        inner.applied.push(policy.clone());
        Ok(())
    }

    fn status(&mut self) -> Status {
        Status { rules: self.last().rules.len() as u64, ..Status::default() }
    }

    fn sweep(&mut self) {
        self.set(|inner| inner.sweeps += 1);
    }
}

fn resource(name: &str, revision: i64) -> Resource {
    use cnsmo_proto::pb::policy as pb;
    let port = u32::try_from(revision).unwrap();
    let rule = pb::FirewallRule {
        name: "r".into(),
        action: pb::Action::Deny.into(),
        direction: pb::Direction::Ingress.into(),
        protocol: Some(6),
        ports: vec![pb::PortRange { first: port, last: port }],
        ..Default::default()
    };
    let spec = FirewallPolicySpec { rules: vec![rule], ..Default::default() };
    Resource { name: name.into(), revision, spec: Some(Spec::FirewallPolicy(spec)) }
}

fn digest(set: &[(&str, i64)]) -> Vec<u8> {
    set.iter().copied().collect::<Digest>().to_vec()
}

fn update(kind: Kind, base: i64, upserts: Vec<Resource>, sent: &[(&str, i64)]) -> Update {
    Update {
        nonce: 1,
        r#type: FIREWALL_POLICY.into(),
        kind: kind.into(),
        base_revision: base,
        revision: sent.iter().map(|s| s.1).max().unwrap_or(base),
        upserts,
        digest: digest(sent),
        ..Update::default()
    }
}

fn snapshot_of_a() -> Update {
    update(Kind::Snapshot, 0, vec![resource("a", 1)], &[("a", 1)])
}

fn start(fake: &Fake, dir: &Path) -> (Enforcer, watch::Receiver<InForce>) {
    let (seat, handle) = Seat::new(fake.open(), dir);
    (seat.start().unwrap().0, handle.in_force())
}

fn ports(effective: &Effective) -> Vec<u16> {
    let port = |rule: &crate::effective::OwnedRule| match &rule.rule.protocol {
        Protocol::Ports { destination, .. } => destination[0].first(),
        _ => panic!("a rule without ports"),
    };
    effective.rules.iter().map(port).collect()
}

fn have(watch: &watch::Receiver<InForce>) -> TypeState {
    watch.borrow().types[FIREWALL_POLICY].clone()
}

#[test]
fn a_new_vm_is_open_until_the_core_sends_policies_and_keeps_them_over_a_restart() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, watch) = start(&fake, dir.path());
    assert!(fake.last().open);
    let ack = enforcer.update(7, snapshot_of_a());
    assert_eq!((ack.error.as_str(), ack.nonce), ("", 1));
    assert_eq!(ack.applied, Some(have(&watch)));
    assert!(ack.apply_duration.is_some());
    assert_eq!(ports(&fake.last()), [1]);
    drop(enforcer);

    let fake = Fake::default();
    let (_, watch) = start(&fake, dir.path());
    assert_eq!(ports(&fake.last()), [1]);
    assert_eq!(have(&watch).digest, digest(&[("a", 1)]));
}

#[test]
fn what_does_not_change_the_rules_is_not_applied_again() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, watch) = start(&fake, dir.path());
    enforcer.update(7, snapshot_of_a());
    let times = fake.times();
    let mut bookmark = update(Kind::Bookmark, 0, vec![], &[("a", 1)]);
    bookmark.revision = 5;
    assert_eq!(enforcer.update(7, bookmark).error, "");
    assert_eq!((fake.times(), have(&watch).revision), (times, 5));
    assert_eq!(start(&Fake::default(), dir.path()).1.borrow().types[FIREWALL_POLICY].revision, 5);
}

#[test]
fn a_policy_that_the_data_path_refuses_keeps_its_last_version_and_the_rest_applies() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, watch) = start(&fake, dir.path());
    enforcer.update(7, snapshot_of_a());
    fake.set(|inner| inner.refuse = vec![2, 4]);
    let upserts = vec![resource("a", 2), resource("b", 3), resource("c", 4)];
    let ack = enforcer.update(7, update(Kind::Delta, 1, upserts, &[("a", 2), ("b", 3), ("c", 4)]));
    assert_eq!(ack.error, "");
    let errors: Vec<_> = ack.resource_errors.iter().map(|e| (&*e.name, e.revision)).collect();
    assert_eq!(errors, [("a", 2), ("c", 4)]);
    assert_eq!(ports(&fake.last()), [1, 3]);
    assert_eq!(have(&watch).digest, digest(&[("a", 1), ("b", 3)]));
    let fake = Fake::default();
    start(&fake, dir.path());
    assert_eq!(ports(&fake.last()), [1, 3], "the ledger holds what is in force");
}

#[test]
fn an_update_that_fails_leaves_everything_as_it_was() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, watch) = start(&fake, dir.path());
    enforcer.update(7, snapshot_of_a());
    let before = have(&watch);
    let delta = || update(Kind::Delta, 1, vec![resource("b", 2)], &[("a", 1), ("b", 2)]);

    fake.set(|inner| inner.fail = true);
    let ack = enforcer.update(7, delta());
    assert!(ack.error.ends_with("no memory"), "{}", ack.error);
    assert_eq!(ack.applied, Some(before.clone()));
    fake.set(|inner| inner.fail = false);

    // Blame on a policy that the update does not touch must not take it out.
    fake.set(|inner| (inner.refuse, inner.blame) = (vec![2], Name::new("a").ok()));
    let ack = enforcer.update(7, delta());
    assert!(ack.error.contains("in force"), "{}", ack.error);
    assert_eq!((have(&watch), ports(&fake.last())), (before.clone(), vec![1]));

    fake.set(|inner| inner.refuse.clear());
    std::fs::create_dir(dir.path().join("policy.ledger.new")).unwrap();
    let ack = enforcer.update(7, delta());
    assert!(ack.error.starts_with("cannot keep"), "{}", ack.error);
    assert_eq!((have(&watch), ports(&fake.last())), (before.clone(), vec![1]));
    std::fs::remove_dir(dir.path().join("policy.ledger.new")).unwrap();

    let again = Fake::default();
    assert_eq!(have(&start(&again, dir.path()).1), before);
    assert_eq!(enforcer.update(7, delta()).error, "");
}

#[test]
fn other_types_are_refused_by_name() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, _) = start(&fake, dir.path());
    let ack = enforcer.update(7, Update { r#type: "x".into(), nonce: 4, ..Update::default() });
    assert_eq!((ack.error.as_str(), ack.nonce), ("unknown resource type `x`", 4));
    assert_eq!(ack.applied.unwrap().digest, NO_SET_DIGEST);
}

#[test]
fn without_a_readable_ledger_the_vm_is_closed_until_a_snapshot() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    std::fs::write(dir.path().join("policy.ledger"), "damaged").unwrap();
    let (mut enforcer, watch) = start(&fake, dir.path());
    let closed = fake.last();
    assert!(!closed.open);
    assert_eq!((closed.ingress, closed.egress), (Action::Deny, Action::Deny));
    assert!(watch.borrow().types.is_empty());
    assert_eq!(watch.borrow().trouble.as_ref().unwrap().0, "LedgerLost");

    enforcer.core_at(vec!["10.0.0.1:7400".parse().unwrap()]);
    assert_eq!(ports(&fake.last()), [7400], "the core stays in reach");
    assert!(!fake.last().open);
    let bookmark = update(Kind::Bookmark, 0, vec![], &[]);
    assert!(enforcer.update(7, bookmark).error.contains("needs a snapshot"));
    assert!(!fake.last().open);
    assert_eq!(enforcer.update(7, update(Kind::Snapshot, 0, vec![], &[])).error, "");
    assert!(fake.last().open);
    assert_eq!(watch.borrow().trouble, None);
}

#[test]
fn a_damaged_ledger_gives_way_to_the_one_before_and_says_so() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, _) = start(&fake, dir.path());
    enforcer.update(7, snapshot_of_a());
    enforcer.update(7, update(Kind::Snapshot, 0, vec![resource("b", 2)], &[("b", 2)]));
    std::fs::write(dir.path().join("policy.ledger"), "damaged").unwrap();
    let (_, watch) = start(&fake, dir.path());
    assert_eq!(ports(&fake.last()), [1]);
    assert_eq!(watch.borrow().trouble.as_ref().unwrap().0, "LedgerDamaged");
}

#[test]
fn policies_of_the_ledger_that_are_refused_now_are_left_out() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, _) = start(&fake, dir.path());
    let both = vec![resource("a", 1), resource("b", 2)];
    enforcer.update(7, update(Kind::Snapshot, 0, both, &[("a", 1), ("b", 2)]));
    let fake = Fake::default();
    fake.set(|inner| inner.refuse = vec![1]);
    let (enforcer, _) = start(&fake, dir.path());
    assert_eq!(ports(&fake.last()), [2]);
    assert_eq!(enforcer.set.unwrap().rejections()[0].name, "a");
    fake.set(|inner| inner.blame = Name::new("x").ok());
    assert!(
        Seat::new(fake.open(), dir.path()).0.start().is_err(),
        "no way out, and no endless try"
    );
}

#[test]
fn the_way_to_the_core_is_open_and_survives_a_restart() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, _) = start(&fake, dir.path());
    let core: Vec<SocketAddr> =
        ["10.0.0.1:7400", "[fd00::1]:7400"].map(|a| a.parse().unwrap()).to_vec();
    enforcer.core_at(core.clone());
    enforcer.update(7, snapshot_of_a());
    let rule = &fake.last().rules[0];
    assert_eq!((rule.policy.as_ref(), rule.rule.name.as_str()), (None, "core"));
    assert_eq!((rule.rule.action, rule.rule.direction), (Action::Allow, Direction::Egress));
    let to: Vec<_> = rule.rule.to.iter().map(ToString::to_string).collect();
    assert_eq!(to, ["10.0.0.1/32", "fd00::1/128"]);
    let times = fake.times();
    enforcer.core_at(core.clone());
    assert_eq!(fake.times(), times, "nothing new");

    let fake = Fake::default();
    let (_, found) = Seat::new(fake.open(), dir.path()).0.start().unwrap();
    assert_eq!(found, core);
    assert_eq!(fake.last().rules[0].rule.name.as_str(), "core");
}

#[test]
fn no_address_of_the_core_is_no_rule() {
    assert_eq!(core_rule(&[]), None);
}

fn serve(seat: &Seat) -> (Stopper, tokio::task::JoinHandle<Result<(), Crashed>>) {
    let (stopper, stop) = stop_pair();
    let (seat, enforcer) = (seat.clone(), seat.start().unwrap().0);
    (stopper, tokio::spawn(async move { seat.serve(enforcer, stop).await }))
}

#[tokio::test]
async fn the_mailbox_outlives_a_crash() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (seat, handle) = Seat::new(fake.open(), dir.path());
    let (_stopper, serving) = serve(&seat);
    handle.update(7, snapshot_of_a()).await.unwrap();
    fake.set(|inner| inner.crash = true);
    let delta = || update(Kind::Delta, 1, vec![resource("b", 2)], &[("a", 1), ("b", 2)]);
    let ack = handle.update(7, delta()).await.unwrap();
    assert!(ack.error.ends_with("the data path crashed"), "{}", ack.error);
    assert_eq!(ack.applied.unwrap().digest, digest(&[("a", 1)]));
    assert_eq!(serving.await.unwrap(), Err(Crashed));

    let (stopper, serving) = serve(&seat);
    assert_eq!(have(&handle.in_force()).digest, digest(&[("a", 1)]), "the ledger is clean");
    assert_eq!(handle.update(7, delta()).await.unwrap().error, "");
    handle.sweep();
    assert_eq!(handle.status().await.unwrap().rules, 2);
    fake.set(|inner| assert_eq!(inner.sweeps, 1));
    stopper.stop();
    serving.await.unwrap().unwrap();
    assert_eq!(ports(&fake.last()), [1, 2], "stopping changes nothing");
}
