use std::{path::Path, sync::Mutex as SyncMutex};

use cnsmo_proto::{
    digest::Digest,
    model::{Action, Direction, Protocol},
    pb::{
        agent::{Resource, resource::Spec, update::Kind},
        balancer as balancer_pb, deployment as deployment_pb, network as network_pb,
        policy::FirewallPolicySpec,
    },
};
use cnsmo_service::supervise::{Stopper, stop_pair};

use super::{
    worker::{NO_SET_DIGEST, SWEEPS_PER_RETRY},
    *,
};
use crate::{
    datapath::ApplyError,
    desired::RESOURCE_TYPE,
    effective::{Balancer, Effective},
    explain::{Answer, Question},
    health::{Subject, Verdict},
    live::{Impact, LiveFlows},
    tunnel::{Backend, Device, PeerStatus, TunnelConfig, TunnelError},
};

/// The VM under test.
const NODE: &str = "vm-1";

/// Tunnel and data path of one VM: enforce what they are given, except what they are told to refuse, and outlive the
/// enforcer as the kernel does.
#[derive(Clone, Default)]
struct Fake(Arc<SyncMutex<Inner>>);

#[derive(Default)]
struct Inner {
    applied: Vec<Effective>,
    /// Every call that changes something, in order.
    calls: Vec<String>,
    /// Policies to refuse, by priority: the version is in it.
    refuse: Vec<u32>,
    /// Balancers to refuse that have more backends than this.
    backends_max: Option<usize>,
    blame: Option<Name>,
    fail: bool,
    crash: bool,
    sweeps: u32,
    no_tunnel: bool,
    tunnel_fails: bool,
    complete_fails: bool,
    tend_fails: bool,
    tunnel: Option<TunnelConfig>,
    handshakes: BTreeMap<Name, PeerStatus>,
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

    /// The calls since this was asked last.
    fn calls(&self) -> Vec<String> {
        let mut calls = Vec::new();
        self.set(|inner| calls = std::mem::take(&mut inner.calls));
        calls
    }

    fn datapath(&self) -> OpenDatapath {
        let this = self.clone();
        Arc::new(move || Ok(Box::new(this.clone())))
    }

    fn tunnel(&self) -> OpenTunnel {
        let this = self.clone();
        Arc::new(move || {
            let mut none = false;
            this.set(|inner| none = inner.no_tunnel);
            anyhow::ensure!(!none, "no tunnel in this build");
            Ok(Box::new(this.clone()))
        })
    }

    fn seat(&self, dir: &Path) -> (Seat, EnforcerHandle) {
        Seat::new(
            self.datapath(),
            self.tunnel(),
            dir,
            Name::new(NODE).ok(),
            Parts::default(),
            vec![],
        )
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
                Protocol::Ports { destination, .. } => destination.first().map_or(0, |p| p.first()),
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
        let too_many = |b: &&Balancer| inner.backends_max.is_some_and(|max| b.backends.len() > max);
        let names =
            policy.balancers.iter().filter(too_many).map(|b| (b.name.clone(), "many".into()));
        let names: BTreeMap<_, _> = names.collect();
        if !names.is_empty() {
            return Err(ApplyError::BalancersRefused(names));
        }
        let device = policy.tunnel.as_ref().map_or("-", |t| t.device.as_str());
        inner.calls.push(format!("apply {device} {}", shown(&policy.balancers)));
        inner.applied.push(policy.clone());
        Ok(())
    }

    fn steer(&mut self, balancers: &[Balancer]) -> Result<(), ApplyError> {
        let mut inner = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if inner.fail {
            return Err(ApplyError::Failed("no memory".into()));
        }
        inner.calls.push(format!("steer {}", shown(balancers)));
        let mut now = inner.applied.last().unwrap().clone();
        now.balancers = balancers.to_vec();
        inner.applied.push(now);
        Ok(())
    }

    fn status(&mut self) -> Status {
        Status { rules: self.last().rules.len() as u64, ..Status::default() }
    }

    fn sweep(&mut self) {
        self.set(|inner| inner.sweeps += 1);
    }

    fn explain(
        &mut self,
        question: &Question,
    ) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
        let dropped = (question.dst.port() != 80).then_some("denied");
        Ok(Answer { dropped, ..Answer::default() })
    }

    fn flows(&mut self, max: usize) -> Result<LiveFlows, Box<dyn std::error::Error + Send + Sync>> {
        Ok(LiveFlows { total: max as u64, ..LiveFlows::default() })
    }

    fn preview(&mut self, policy: &Effective, _: usize) -> Result<Impact, ApplyError> {
        Ok(Impact { judged: policy.rules.len() as u64, ..Impact::default() })
    }
}

/// `front:web-1,web-2`
fn shown(balancers: &[Balancer]) -> String {
    let nodes = |b: &Balancer| b.backends.iter().map(|t| t.node.to_string()).collect::<Vec<_>>();
    let shown = balancers.iter().map(|b| format!("{}:{}", b.name, nodes(b).join(",")));
    shown.collect::<Vec<_>>().join(" ")
}

fn failure(what: &str) -> TunnelError {
    TunnelError { what: what.into(), source: "port in use".into() }
}

impl Tunnel for Fake {
    fn public_key(&self) -> PublicKey {
        PublicKey([1; 32])
    }

    fn prepare(&mut self, config: &TunnelConfig) -> Result<Device, TunnelError> {
        let mut inner = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if inner.tunnel_fails {
            return Err(failure("listen"));
        }
        inner.calls.push(format!("prepare {}", peers(config)));
        let mut with_old = config.clone();
        let old = inner.tunnel.take().map(|old| old.peers).unwrap_or_default();
        with_old.peers.extend(old);
        inner.tunnel = Some(with_old);
        Ok(Device { name: "cnsmo0".into(), mtu: config.mtu.unwrap_or(1420) })
    }

    fn complete(&mut self, config: Option<&TunnelConfig>) -> Result<(), TunnelError> {
        let mut inner = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if inner.complete_fails {
            return Err(failure("finish"));
        }
        inner.calls.push(format!("complete {}", config.map_or("-".into(), peers)));
        inner.tunnel = config.cloned();
        Ok(())
    }

    fn tend(&mut self) -> Result<(), TunnelError> {
        let mut fails = false;
        self.set(|inner| fails = inner.tend_fails);
        if fails { Err(failure("start the engine")) } else { Ok(()) }
    }

    fn existing(&mut self) -> Option<Device> {
        let mut there = false;
        self.set(|inner| there = inner.tunnel.is_some());
        there.then(|| Device { name: "cnsmo0".into(), mtu: 1420 })
    }

    fn status(&mut self) -> Option<TunnelStatus> {
        let inner = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        inner.tunnel.as_ref().map(|config| TunnelStatus {
            network: config.network.clone(),
            backend: Backend::Engine,
            reason: "no module".into(),
            device: Device { name: "cnsmo0".into(), mtu: 1420 },
            peers: inner.handshakes.clone(),
        })
    }
}

fn peers(config: &TunnelConfig) -> String {
    let nodes: Vec<_> = config.peers.values().map(|peer| peer.node.to_string()).collect();
    nodes.join(",")
}

/// Names without a kind are of policies.
fn full(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("firewall-policy/{name}") }
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
    Resource { name: full(name), version: revision, spec: Some(Spec::FirewallPolicy(spec)) }
}

fn digest(set: &[(&str, i64)]) -> Vec<u8> {
    let mut digest = Digest::default();
    set.iter().for_each(|(name, version)| digest.add(&full(name), *version));
    digest.to_vec()
}

fn update(kind: Kind, base: i64, upserts: Vec<Resource>, sent: &[(&str, i64)]) -> Update {
    Update {
        nonce: 1,
        r#type: RESOURCE_TYPE.into(),
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
    let (seat, handle) = fake.seat(dir);
    (seat.start().unwrap().0, handle.in_force())
}

fn sweep(enforcer: &mut Enforcer) {
    Part::ALL.into_iter().for_each(|part| enforcer.sweep(part));
}

fn ports(effective: &Effective) -> Vec<u16> {
    let port = |rule: &crate::effective::OwnedRule| match &rule.rule.protocol {
        Protocol::Ports { destination, .. } => destination[0].first(),
        _ => panic!("a rule without ports"),
    };
    effective.rules.iter().map(port).collect()
}

/// Of the policies, without the built-in rules.
fn policy_ports(mut effective: Effective) -> Vec<u16> {
    effective.rules.retain(|rule| rule.policy.is_some());
    ports(&effective)
}

fn have(watch: &watch::Receiver<InForce>) -> TypeState {
    watch.borrow().types[RESOURCE_TYPE].clone()
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
    assert_eq!(start(&Fake::default(), dir.path()).1.borrow().types[RESOURCE_TYPE].revision, 5);
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
    let errors: Vec<_> = ack.resource_errors.iter().map(|e| (&*e.name, e.version)).collect();
    assert_eq!(errors, [("firewall-policy/a", 2), ("firewall-policy/c", 4)]);
    assert_eq!(ports(&fake.last()), [1, 3]);
    assert_eq!(have(&watch).digest, digest(&[("a", 1), ("b", 3)]));
    let fake = Fake::default();
    start(&fake, dir.path());
    assert_eq!(ports(&fake.last()), [1, 3], "the ledger holds what is in force");
}

fn confirm_within(enforcer: &mut Enforcer, window: Duration) {
    let (reply, _) = oneshot::channel();
    enforcer.handle(Message::ConfirmWithin { window, reply });
}

#[test]
fn a_change_that_the_core_does_not_survive_is_undone_then_tried_once_more() {
    let window = Duration::from_secs(10);
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, watch) = start(&fake, dir.path());
    confirm_within(&mut enforcer, window);
    enforcer.update(7, snapshot_of_a());
    enforcer.confirm(1);
    assert_eq!(watch.borrow().confirm_by, None);
    let before = have(&watch);

    let change = || {
        let both = vec![resource("a", 1), resource("b", 2)];
        update(Kind::Snapshot, 0, both, &[("a", 1), ("b", 2)])
    };
    enforcer.update(7, change());
    let due = watch.borrow().confirm_by.unwrap();
    // Not of this change, and not yet.
    enforcer.confirm(1);
    enforcer.undo(due - Duration::from_millis(1));
    assert_eq!(ports(&fake.last()), [1, 2]);
    enforcer.undo(due);
    assert_eq!((ports(&fake.last()), have(&watch)), (vec![1], before.clone()));
    let trouble = watch.borrow().trouble.clone().unwrap();
    assert!(trouble.0 == "Undone" && trouble.1.contains("revision 2"), "{trouble:?}");
    assert_eq!(have(&start(&Fake::default(), dir.path()).1), before);

    // The core may just have been away. Confirmed, the change stays.
    assert_eq!(enforcer.update(7, change()).error, "");
    assert_eq!(watch.borrow().trouble, None);
    enforcer.confirm(2);
    enforcer.undo(due + window * 10);
    assert_eq!(ports(&fake.last()), [1, 2]);
    assert_eq!(start(&Fake::default(), dir.path()).1.borrow().confirm_by, None);

    // Without it, twice: not a third time, until it is another change.
    let worse = |version| {
        let upserts = vec![resource("c", version)];
        update(Kind::Delta, 2, upserts, &[("a", 1), ("b", 2), ("c", version)])
    };
    for _ in 0..2 {
        assert_eq!(enforcer.update(7, worse(3)).error, "");
        let due = watch.borrow().confirm_by.unwrap();
        enforcer.undo(due);
        assert_eq!(ports(&fake.last()), [1, 2]);
    }
    let ack = enforcer.update(7, worse(3));
    assert!(ack.error.starts_with("held back: each of 2 times"), "{}", ack.error);
    assert_eq!(ports(&fake.last()), [1, 2]);
    assert_eq!(enforcer.update(7, worse(4)).error, "");
    assert_eq!(ports(&fake.last()), [1, 2, 4]);
}

#[test]
fn instances_are_never_on_trial() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (seat, handle) = fake.seat(dir.path());
    let (mut enforcer, watch) = (seat.start().unwrap().0, handle.in_force());
    let instances = || handle.instances().borrow().as_ref().map_or(0, |all| all.len());
    confirm_within(&mut enforcer, Duration::from_secs(10));
    enforcer.update(7, snapshot_of_a());
    enforcer.confirm(1);
    let instance = |revision| Resource {
        name: "instance/shop/shop-1".into(),
        version: revision,
        spec: Some(Spec::Instance(Box::new(deployment_pb::Instance {
            name: "shop-1".into(),
            deployment: "shop".into(),
            node: "vm1".into(),
            goal: deployment_pb::instance::Goal::Run.into(),
            driver: Some(deployment_pb::instance::Driver::Process(deployment_pb::Process {
                command: vec!["/bin/true".into()],
                ..Default::default()
            })),
            ..Default::default()
        }))),
    };
    let mut both = Digest::default();
    both.add(&full("a"), 1);
    both.add("instance/shop/shop-1", 2);
    let update = |base, revision, upserts, digest: &Digest| Update {
        revision,
        digest: digest.to_vec(),
        ..update(Kind::Delta, base, upserts, &[])
    };
    assert_eq!(enforcer.update(7, update(1, 2, vec![instance(2)], &both)).error, "");
    assert_eq!((watch.borrow().confirm_by, instances()), (None, 1));

    // What is undone leaves them alone.
    both.add(&full("b"), 3);
    assert_eq!(enforcer.update(7, update(2, 3, vec![resource("b", 3)], &both)).error, "");
    let due = watch.borrow().confirm_by.unwrap();
    enforcer.undo(due);
    assert_eq!((ports(&fake.last()), instances()), (vec![1], 1));
}

#[test]
fn a_restart_does_not_make_a_change_stay() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, watch) = start(&fake, dir.path());
    confirm_within(&mut enforcer, Duration::from_secs(10));
    enforcer.update(7, snapshot_of_a());
    enforcer.confirm(1);
    let before = have(&watch);
    let removal =
        Update { removals: vec![full("a")], revision: 2, ..update(Kind::Delta, 1, vec![], &[]) };
    assert_eq!(enforcer.update(7, removal).error, "");
    assert!(fake.last().open);
    drop(enforcer);

    let fake = Fake::default();
    let (mut enforcer, watch) = start(&fake, dir.path());
    assert!(fake.last().open);
    let due = watch.borrow().confirm_by.unwrap();
    enforcer.undo(due);
    assert_eq!((ports(&fake.last()), have(&watch)), (vec![1], before));
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
    let (mut enforcer, _) = start(&fake, dir.path());
    assert_eq!(ports(&fake.last()), [2]);
    assert_eq!(
        enforcer.update(7, update(Kind::Bookmark, 0, vec![], &[])).resource_errors[0].name,
        "firewall-policy/a"
    );
    fake.set(|inner| inner.blame = Name::new("x").ok());
    assert!(fake.seat(dir.path()).0.start().is_err(), "no way out, and no endless try");
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
    let (_, found) = fake.seat(dir.path()).0.start().unwrap();
    assert_eq!(found, core);
    assert_eq!(fake.last().rules[0].rule.name.as_str(), "core");
}

fn serve(seat: &Seat) -> (Stopper, tokio::task::JoinHandle<Result<(), Crashed>>) {
    let (stopper, stop) = stop_pair();
    let (seat, enforcer) = (seat.clone(), seat.start().unwrap().0);
    (stopper, tokio::spawn(async move { seat.serve(enforcer, stop).await }))
}

#[tokio::test]
async fn the_mailbox_outlives_a_crash() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (seat, handle) = fake.seat(dir.path());
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
    handle.sweep(Part::Firewall);
    assert_eq!(handle.status().await.unwrap().datapath.rules, 2);
    fake.set(|inner| assert_eq!(inner.sweeps, 1));
    stopper.stop();
    serving.await.unwrap().unwrap();
    assert_eq!(ports(&fake.last()), [1, 2], "stopping changes nothing");
}

fn derived(name: String, version: i64, spec: Spec) -> Resource {
    Resource { name, version, spec: Some(spec) }
}

fn network(version: i64) -> Resource {
    let spec = network_pb::NetworkSpec {
        ipv4_prefix: "10.70.0.0/24".into(),
        mtu: 1_280 + u32::try_from(version).unwrap(),
        ..Default::default()
    };
    derived("network/shop".into(), version, Spec::Network(spec))
}

/// `vm-1` or `web-N`; the number tells the address.
fn member(node: &str) -> Resource {
    let number: u8 = node.rsplit('-').next().unwrap().parse().unwrap();
    let last = if node == NODE { 5 } else { 10 + number };
    let spec = network_pb::Member {
        network: "shop".into(),
        node: node.into(),
        ipv4: format!("10.70.0.{last}"),
        public_key: vec![last; 32],
        ..Default::default()
    };
    derived(format!("member/shop/{node}"), last.into(), Spec::Member(spec))
}

fn balancer(version: i64) -> Resource {
    let spec = balancer_pb::LoadBalancerSpec {
        network: "shop".into(),
        addresses: vec!["10.70.0.80".into()],
        ports: vec![balancer_pb::ServicePort { protocol: 6, port: 80, target_port: 0 }],
        health: Some(Default::default()),
        ..Default::default()
    };
    derived("load-balancer/front".into(), version, Spec::LoadBalancer(spec))
}

fn backend(node: &str, draining: bool) -> Resource {
    let number: u8 = node.rsplit('-').next().unwrap().parse().unwrap();
    let spec = balancer_pb::Backend {
        load_balancer: "front".into(),
        node: node.into(),
        ipv4: format!("10.70.0.{}", 10 + number),
        draining,
        ..Default::default()
    };
    let version = i64::from(number) * 2 + i64::from(draining);
    derived(format!("backend/front/{node}"), version, Spec::Backend(spec))
}

/// One policy, a network of three, a balancer over two.
fn shop() -> Vec<Resource> {
    let members = [NODE, "web-1", "web-2"].map(member);
    let backends = ["web-1", "web-2"].map(|node| backend(node, false));
    let mut all = vec![resource("a", 1), network(1), balancer(1)];
    all.extend(members.into_iter().chain(backends));
    all
}

/// A core that knows what it has sent.
struct Core {
    sent: BTreeMap<String, i64>,
    revision: i64,
}

impl Core {
    fn new() -> Self {
        Self { sent: BTreeMap::new(), revision: 0 }
    }

    fn send(&mut self, upserts: Vec<Resource>, removals: &[&str]) -> Update {
        let base_revision = self.revision;
        self.revision += 100;
        self.sent.extend(upserts.iter().map(|r| (r.name.clone(), r.version)));
        self.sent.retain(|name, _| !removals.contains(&name.as_str()));
        Update {
            nonce: 1,
            r#type: RESOURCE_TYPE.into(),
            kind: if base_revision == 0 { Kind::Snapshot } else { Kind::Delta }.into(),
            base_revision,
            revision: self.revision,
            upserts,
            removals: removals.iter().copied().map(String::from).collect(),
            digest: self.digest(&[]),
        }
    }

    fn digest(&self, without: &[&str]) -> Vec<u8> {
        let sent = self.sent.iter().filter(|(name, _)| !without.contains(&name.as_str()));
        digest(&sent.map(|(name, version)| (name.as_str(), *version)).collect::<Vec<_>>())
    }
}

/// An enforcer with the shop in force.
fn start_shop(fake: &Fake, dir: &Path) -> (Enforcer, EnforcerHandle, Core) {
    let (seat, handle) = fake.seat(dir);
    let (mut enforcer, mut core) = (seat.start().unwrap().0, Core::new());
    let ack = enforcer.update(7, core.send(shop(), &[]));
    assert_eq!((&*ack.error, &ack.resource_errors[..]), ("", &[][..]));
    (enforcer, handle, core)
}

fn errors(ack: &Ack) -> Vec<(&str, &str)> {
    ack.resource_errors.iter().map(|e| (&*e.name, &*e.message)).collect()
}

#[test]
fn tunnel_and_data_path_are_made_before_they_are_broken() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, _, mut core) = start_shop(&fake, dir.path());
    assert_eq!(
        fake.calls(),
        [
            "apply - ",
            "complete -",
            "prepare web-1,web-2",
            "apply cnsmo0 front:web-1,web-2",
            "complete web-1,web-2",
        ]
    );
    let guarded = fake.last().tunnel.unwrap();
    assert_eq!((guarded.mtu, guarded.addresses.v4), (1_281, Some([10, 70, 0, 5].into())));

    // A VM of the network that is no backend: no rule is compiled again.
    enforcer.update(7, core.send(vec![member("web-3")], &[]));
    assert_eq!(fake.calls(), ["prepare web-1,web-2,web-3", "complete web-1,web-2,web-3"]);
    // A drain: neither is the tunnel touched.
    enforcer.update(7, core.send(vec![backend("web-1", true)], &[]));
    assert_eq!(fake.calls(), ["steer front:web-2"]);
    // Gone: the data path lets go first.
    let ack = enforcer.update(7, core.send(vec![], &["member/shop/web-1", "backend/front/web-1"]));
    assert_eq!(
        fake.calls(),
        ["prepare web-2,web-3", "apply cnsmo0 front:web-2", "complete web-2,web-3"]
    );
    assert_eq!(ack.applied.unwrap().digest, core.digest(&[]));
    let all: Vec<_> = core.sent.keys().filter(|k| !k.starts_with("firewall")).cloned().collect();
    enforcer.update(7, core.send(vec![], &all.iter().map(String::as_str).collect::<Vec<_>>()));
    assert_eq!(fake.calls(), ["apply - ", "complete -"]);
    assert_eq!(ports(&fake.last()), [1], "the policy stays");
}

#[test]
fn a_restart_without_a_core_brings_everything_back() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (enforcer, _, core) = start_shop(&fake, dir.path());
    let before = fake.last();
    drop(enforcer);
    let fake = Fake::default();
    let (_, watch) = start(&fake, dir.path());
    assert_eq!(
        fake.calls(),
        ["prepare web-1,web-2", "apply cnsmo0 front:web-1,web-2", "complete web-1,web-2"]
    );
    assert_eq!(fake.last(), before);
    assert_eq!(have(&watch).digest, core.digest(&[]));
}

#[test]
fn a_tunnel_that_fails_blocks_its_network_alone_until_it_works() {
    for no_tunnel in [true, false] {
        let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
        fake.set(|inner| (inner.no_tunnel, inner.tunnel_fails) = (no_tunnel, !no_tunnel));
        let (mut enforcer, watch) = start(&fake, dir.path());
        let mut core = Core::new();
        let ack = enforcer.update(7, core.send(shop(), &[]));
        let why =
            if no_tunnel { "no tunnel in this build" } else { "failed to listen: port in use" };
        let needs = format!("needs network `shop`: {why}");
        assert_eq!(ack.error, "");
        assert_eq!(errors(&ack), [("network/shop", why), ("load-balancer/front", &needs)]);
        let without = core.digest(&["network/shop", "load-balancer/front"]);
        assert_eq!(ack.applied.unwrap().digest, without);
        assert_eq!(policy_ports(fake.last()), [1], "the firewall is in force");
        assert_eq!((fake.last().tunnel, fake.last().balancers), (None, vec![]));
        assert_eq!(watch.borrow().trouble, Some(("TunnelDown", why.to_owned())));

        fake.set(|inner| (inner.no_tunnel, inner.tunnel_fails) = (false, false));
        fake.calls();
        (0..SWEEPS_PER_RETRY).for_each(|_| sweep(&mut enforcer));
        assert_eq!(
            fake.calls(),
            ["prepare web-1,web-2", "apply cnsmo0 front:web-1,web-2", "complete web-1,web-2"]
        );
        assert_eq!((have(&watch).digest, watch.borrow().trouble.clone()), (core.digest(&[]), None));
        assert_eq!(watch.borrow().public_key, Some(PublicKey([1; 32])));
        (0..SWEEPS_PER_RETRY).for_each(|_| sweep(&mut enforcer));
        assert_eq!(fake.calls(), [""; 0], "nothing is left to do");
    }
}

#[test]
fn a_tunnel_that_cannot_change_stays_as_it_was_and_guarded() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, _, mut core) = start_shop(&fake, dir.path());
    fake.set(|inner| inner.tunnel_fails = true);
    let ack = enforcer.update(7, core.send(vec![member("web-3"), resource("b", 2)], &[]));
    assert_eq!(errors(&ack), [("network/shop", "failed to listen: port in use")]);
    let now = fake.last();
    assert_eq!(policy_ports(now.clone()), [1, 2]);
    assert_eq!((now.tunnel.unwrap().device.as_str(), now.balancers.len()), ("cnsmo0", 1));
    fake.set(|inner| {
        assert_eq!(inner.tunnel.as_ref().map(|config| config.peers.len()), Some(2));
        inner.tunnel_fails = false;
    });
    let ack = enforcer.update(7, core.send(vec![resource("b", 3)], &[]));
    assert_eq!((errors(&ack), &ack.applied.as_ref().unwrap().digest), (vec![], &core.digest(&[])));
    fake.set(|inner| assert_eq!(inner.tunnel.as_ref().map(|config| config.peers.len()), Some(3)));
}

#[test]
fn a_tunnel_that_cannot_be_removed_is_tried_again() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, handle, mut core) = start_shop(&fake, dir.path());
    fake.set(|inner| inner.complete_fails = true);
    let all: Vec<_> = core.sent.keys().cloned().collect();
    let ack =
        enforcer.update(7, core.send(vec![], &all.iter().map(String::as_str).collect::<Vec<_>>()));
    assert_eq!((&*ack.error, errors(&ack)), ("", vec![]));
    let trouble = handle.in_force().borrow().trouble.clone();
    assert_eq!(trouble, Some(("TunnelDown", "failed to finish: port in use".to_owned())));
    fake.set(|inner| inner.complete_fails = false);
    fake.calls();
    (0..SWEEPS_PER_RETRY).for_each(|_| sweep(&mut enforcer));
    assert_eq!(fake.calls(), ["complete -"]);
    assert_eq!(handle.in_force().borrow().trouble, None);
}

#[test]
fn a_balancer_that_is_refused_goes_back_alone() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, _, mut core) = start_shop(&fake, dir.path());
    fake.set(|inner| inner.backends_max = Some(2));
    let upserts = vec![member("web-3"), backend("web-3", false), resource("b", 2)];
    let ack = enforcer.update(7, core.send(upserts, &[]));
    assert_eq!((&*ack.error, errors(&ack)), ("", vec![("backend/front/web-3", "many")]));
    assert_eq!(shown(&fake.last().balancers), "front:web-1,web-2");
    assert_eq!(policy_ports(fake.last()), [1, 2]);
    assert_eq!(ack.applied.unwrap().digest, core.digest(&["backend/front/web-3"]));

    // At the start there is nothing to go back to.
    let fake = Fake::default();
    fake.set(|inner| inner.backends_max = Some(1));
    let (mut enforcer, _) = start(&fake, dir.path());
    assert_eq!(fake.last().balancers, []);
    assert!(fake.last().tunnel.is_some());
    let ack = enforcer.update(7, core.send(vec![], &["backend/front/web-3"]));
    assert_eq!(errors(&ack), [("load-balancer/front", "many")]);
}

#[test]
fn an_update_that_fails_takes_its_peers_back() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, _, mut core) = start_shop(&fake, dir.path());
    let (before, digest) = (fake.last(), core.digest(&[]));
    fake.set(|inner| inner.fail = true);
    fake.calls();
    let upserts = vec![member("web-3"), resource("b", 2)];
    let ack = enforcer.update(7, core.send(upserts, &[]));
    assert!(ack.error.ends_with("no memory"), "{}", ack.error);
    assert_eq!(
        fake.calls(),
        ["prepare web-1,web-2,web-3", "prepare web-1,web-2", "complete web-1,web-2"]
    );
    assert_eq!((fake.last(), ack.applied.unwrap().digest), (before, digest));
}

#[test]
fn health_steers_new_flows_and_a_new_enforcer_asks_for_it() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (seat, handle) = fake.seat(dir.path());
    let mut enforcer = seat.start().unwrap().0;
    enforcer.update(7, Core::new().send(shop(), &[]));
    let mut checks = handle.checks();
    let wanted = checks.borrow_and_update().clone();
    let nodes: Vec<_> = wanted.keys().map(|subject| subject.node.to_string()).collect();
    assert_eq!(nodes, ["web-1", "web-2"]);
    fake.calls();
    let verdict = |(subject, healthy): (&Subject, bool)| {
        (subject.clone(), Verdict { healthy, message: String::new() })
    };
    let view = |healthy: [bool; 2]| wanted.keys().zip(healthy).map(verdict).collect::<View>();
    let events = || handle.in_force().borrow().events;
    for (healthy, calls, news) in [
        ([true, true], &[][..], true),
        ([true, false], &["steer front:web-1"], true),
        ([true, false], &[], false),
        ([false, false], &["steer front:"], true),
        ([false, true], &["steer front:web-2"], true),
    ] {
        let before = events();
        enforcer.health(view(healthy));
        assert_eq!(fake.calls(), calls, "{healthy:?}");
        assert_eq!(events() > before, news, "a report is due if there is something to tell");
    }
    assert_eq!(enforcer.status().balancers[&Name::new("front").unwrap()].len(), 2);

    // A failure is tried again.
    fake.set(|inner| inner.fail = true);
    enforcer.health(view([true, true]));
    fake.set(|inner| inner.fail = false);
    (0..SWEEPS_PER_RETRY).for_each(|_| sweep(&mut enforcer));
    assert_eq!(fake.calls(), ["steer front:web-1,web-2"]);

    assert!(!checks.has_changed().unwrap());
    drop(enforcer);
    let _enforcer = seat.start().unwrap();
    assert!(checks.has_changed().unwrap(), "a new enforcer asks for what is known");
    assert_eq!(checks.borrow().len(), 2);
}

#[test]
fn without_a_readable_ledger_the_tunnel_is_closed_but_not_touched() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    drop(start_shop(&fake, dir.path()));
    fake.calls();
    for file in ["policy.ledger", "policy.ledger.1"] {
        std::fs::write(dir.path().join(file), "damaged").unwrap();
    }
    let (mut enforcer, _) = start(&fake, dir.path());
    (0..SWEEPS_PER_RETRY).for_each(|_| sweep(&mut enforcer));
    assert_eq!(fake.calls(), ["apply cnsmo0 "]);
    let closed = fake.last();
    assert_eq!((closed.open, closed.ingress, closed.egress), (false, Action::Deny, Action::Deny));
    enforcer.update(7, Core::new().send(shop(), &[]));
    assert_eq!(
        fake.calls(),
        ["prepare web-1,web-2", "apply cnsmo0 front:web-1,web-2", "complete web-1,web-2"]
    );
}

#[test]
fn a_vm_that_enrols_later_joins_then() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    drop(start_shop(&fake, dir.path()));
    let fake = Fake::default();
    let (seat, handle) =
        Seat::new(fake.datapath(), fake.tunnel(), dir.path(), None, Parts::default(), vec![]);
    let mut enforcer = seat.start().unwrap().0;
    assert_eq!(fake.calls(), ["apply - ", "complete -"]);
    assert_ne!(have(&handle.in_force()).digest, Digest::default().to_vec());
    enforcer.named(Name::new(NODE).unwrap());
    assert_eq!(
        fake.calls(),
        ["prepare web-1,web-2", "apply cnsmo0 front:web-1,web-2", "complete web-1,web-2"]
    );
}

#[test]
fn what_happens_to_the_tunnel_is_told_once() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, handle, _) = start_shop(&fake, dir.path());
    sweep(&mut enforcer);
    let mut watch = handle.in_force();
    let mut told = |received_bytes: Option<u64>, tend_fails| {
        let handshake = |received_bytes| PeerStatus {
            last_handshake: Some(std::time::SystemTime::now()),
            received_bytes,
            ..PeerStatus::default()
        };
        let peer = |bytes| (Name::new("web-1").unwrap(), handshake(bytes));
        fake.set(|inner| {
            inner.handshakes = received_bytes.map(peer).into_iter().collect();
            inner.tend_fails = tend_fails;
        });
        watch.borrow_and_update();
        sweep(&mut enforcer);
        watch.has_changed().unwrap()
    };
    assert!(!told(None, false));
    assert!(told(Some(1), false), "the first handshake");
    assert!(!told(Some(2), false), "more bytes and another handshake");
    assert!(told(Some(2), true));
    assert!(!told(Some(2), true));
    let trouble = watch.borrow().trouble.clone();
    assert_eq!(trouble, Some(("TunnelDown", "failed to start the engine: port in use".to_owned())));
    fake.set(|inner| inner.tend_fails = false);
    sweep(&mut enforcer);
    assert_eq!(watch.borrow().trouble, None);
}

#[test]
fn a_tunnel_that_died_is_made_anew_and_guarded_before_it_carries_packets() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, ..) = start_shop(&fake, dir.path());
    fake.calls();
    fake.set(|inner| inner.tend_fails = true);
    (0..SWEEPS_PER_RETRY).for_each(|_| sweep(&mut enforcer));
    assert_eq!(
        fake.calls(),
        ["prepare web-1,web-2", "apply cnsmo0 front:web-1,web-2", "complete web-1,web-2"]
    );
    fake.set(|inner| inner.tend_fails = false);
    (0..SWEEPS_PER_RETRY).for_each(|_| sweep(&mut enforcer));
    assert_eq!(fake.calls(), [""; 0]);
}

/// The service of a part runs again.
fn follow(enforcer: &mut Enforcer, handle: &EnforcerHandle, part: Part) {
    handle.parts.follow(part);
    enforcer.handle(Message::Followed { reply: oneshot::channel().0 });
}

#[test]
fn the_part_of_a_service_that_does_not_run_stays_and_the_others_follow() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, handle, mut core) = start_shop(&fake, dir.path());
    fake.calls();
    let changes = [
        (Part::Vpn, vec!["member/shop/web-3"], "front:web-1,web-2,web-4"),
        (Part::Firewall, vec!["firewall-policy/b"], "web-5"),
        (Part::LoadBalancer, vec!["backend/front/web-7"], "web-6"),
    ];
    let sent = [
        vec![member("web-3"), backend("web-4", false)],
        vec![resource("b", 2), member("web-5")],
        vec![backend("web-7", false), resource("c", 3), member("web-6")],
    ];
    for ((part, names, followed), upserts) in changes.into_iter().zip(sent) {
        handle.parts.hold(part);
        enforcer.handle(Message::Held);
        let why = format!("service {} does not run", part.name());
        let trouble = handle.in_force().borrow().trouble.clone();
        assert_eq!(trouble, Some(("ServiceStopped", why.clone())));
        let before = (fake.last(), peers_now(&fake));
        let ack = enforcer.update(7, core.send(upserts, &[]));
        let expected: Vec<_> = names.iter().map(|name| (*name, &*why)).collect();
        assert_eq!((&*ack.error, errors(&ack)), ("", expected), "{part:?}");
        assert_eq!(ack.applied.unwrap().digest, core.digest(&names));
        let calls = fake.calls().join("; ");
        assert!(calls.contains(followed), "{part:?}: {calls}");
        let (now, was) = (fake.last(), before.0);
        match part {
            Part::Vpn => assert_eq!(peers_now(&fake), before.1),
            Part::Firewall => assert_eq!(policy_ports(now), policy_ports(was)),
            Part::LoadBalancer => assert_eq!(shown(&now.balancers), shown(&was.balancers)),
        }

        follow(&mut enforcer, &handle, part);
        assert_eq!(handle.in_force().borrow().trouble, None);
        assert_eq!(have(&handle.in_force()).digest, core.digest(&[]), "{part:?}");
    }
    assert_eq!(policy_ports(fake.last()), [1, 2, 3]);
    assert_eq!(peers_now(&fake), "web-1,web-2,web-3,web-5,web-6");
    assert_eq!(shown(&fake.last().balancers), "front:web-1,web-2,web-4,web-7");
}

#[test]
fn what_is_removed_while_its_service_does_not_run_ends_when_it_runs_again() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let (mut enforcer, handle, mut core) = start_shop(&fake, dir.path());
    Part::ALL.into_iter().for_each(|part| handle.parts.hold(part));
    let all: Vec<_> = core.sent.keys().cloned().collect();
    fake.calls();
    enforcer.update(7, core.send(vec![], &all.iter().map(String::as_str).collect::<Vec<_>>()));
    enforcer.named(Name::new("other").unwrap());
    sweep(&mut enforcer);
    assert_eq!(fake.calls(), [""; 0]);
    assert_eq!((policy_ports(fake.last()), &*peers_now(&fake)), (vec![1], "web-1,web-2"));
    for part in Part::ALL {
        follow(&mut enforcer, &handle, part);
    }
    assert!(fake.last().open && fake.last().balancers.is_empty());
    fake.set(|inner| assert_eq!(inner.tunnel, None));
}

#[test]
fn services_that_a_vm_does_not_run_have_no_part() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let parts = Parts::new(&[Part::Firewall]);
    let node = Name::new(NODE).ok();
    let (seat, handle) = Seat::new(fake.datapath(), fake.tunnel(), dir.path(), node, parts, vec![]);
    let (mut enforcer, mut core) = (seat.start().unwrap().0, Core::new());
    let ack = enforcer.update(7, core.send(shop(), &[]));
    let why = "this VM has no service";
    assert_eq!(ack.resource_errors.len(), core.sent.len() - 1);
    assert!(ack.resource_errors.iter().all(|error| error.message.starts_with(why)));
    assert_eq!((policy_ports(fake.last()), fake.last().tunnel), (vec![1], None));
    assert_eq!(handle.in_force().borrow().trouble, None);
}

fn peers_now(fake: &Fake) -> String {
    let mut shown = String::new();
    fake.set(|inner| shown = inner.tunnel.as_ref().map(peers).unwrap_or_default());
    shown
}
