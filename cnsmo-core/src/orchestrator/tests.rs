//! A fleet in memory that does what it is told, late and in any order.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use cnsmo_proto::{
    model::{Labels, Name},
    pb::{
        catalog::{Instance, Phase},
        deployment::{self as pb, DeploymentSpec},
        meta::Metadata,
        resource::{Resource, apply_request::Mode, resource},
    },
};
use proptest::{collection::vec, prelude::*};

use super::{Host, Observed, World, plan, shortage};
use crate::{
    identity::to_ms,
    state::{Note, Placed, State, Step, parse_apply},
};

struct Vm {
    labels: Labels,
    is_seen: bool,
    is_draining: bool,
}

/// State, VMs, and what the catalogue knows.
struct Fleet {
    state: State,
    vms: BTreeMap<String, Vm>,
    seen: BTreeMap<(String, String), (Phase, u64)>,
    now_ms: u64,
    named: usize,
    revision: i64,
}

impl Fleet {
    /// VMs and their zones.
    fn new(zones: &[&str]) -> Self {
        let vm = |(n, zone): (usize, &&str)| {
            let labels = format!("zone={zone}").parse().unwrap();
            (format!("vm{n}"), Vm { labels, is_seen: true, is_draining: false })
        };
        Self {
            state: State::default(),
            vms: zones.iter().enumerate().map(vm).collect(),
            seen: BTreeMap::new(),
            now_ms: to_ms(SystemTime::now()),
            named: 0,
            revision: 0,
        }
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(self.now_ms)
    }

    fn commit(&mut self, plan: crate::state::Plan) {
        if !plan.is_empty() {
            self.revision += 1;
            self.state.commit(plan, self.revision);
        }
    }

    fn apply(&mut self, name: &str, change: impl FnOnce(&mut DeploymentSpec)) {
        let mut spec = match self.state.deployments().get(name) {
            Some(old) => DeploymentSpec::clone(&old.spec),
            None => DeploymentSpec {
                replicas: 3,
                driver: Some(pb::deployment_spec::Driver::Process(pb::Process {
                    command: vec!["/bin/app".into()],
                    ..Default::default()
                })),
                ..Default::default()
            },
        };
        change(&mut spec);
        let metadata = Some(Metadata { name: name.into(), ..Metadata::default() });
        let one = pb::Deployment { metadata, spec: Some(spec), status: None };
        let resource = Resource { resource: Some(resource::Resource::Deployment(one)) };
        let wanted = parse_apply(vec![resource]).unwrap();
        let plan = self.state.plan_apply(wanted, Mode::Unspecified, self.now()).unwrap();
        let note = Note { by: "test".into(), call: "Apply", to_revision: 0 };
        let plan = self.state.noted(plan, &note, self.now());
        self.commit(plan);
    }

    fn observed(&self) -> Observed {
        Observed::new(self.seen.iter().map(|((service, name), (phase, since))| {
            Arc::new(Instance {
                service: service.clone(),
                name: name.clone(),
                phase: (*phase).into(),
                phase_time: Some(prost_types::Timestamp {
                    seconds: (since / 1_000).cast_signed(),
                    nanos: 0,
                }),
                ..Instance::default()
            })
        }))
    }

    fn with_world<T>(&self, look: impl FnOnce(&World<'_>) -> T) -> T {
        let observed = self.observed();
        let host = |vm: &Vm| (vm.is_seen, vm.is_draining);
        let hosts = self.vms.iter().map(|(name, vm)| {
            let (is_seen, is_draining) = host(vm);
            (name.as_str(), Host { labels: &vm.labels, is_seen, is_draining })
        });
        look(&World {
            deployments: self.state.deployments(),
            placements: self.state.placements(),
            avoided: self.state.avoided(),
            hosts: hosts.collect(),
            observed: &observed,
            now_ms: self.now_ms,
        })
    }

    /// One look of the orchestrator; returns how many steps it took.
    fn look(&mut self) -> usize {
        let mut named = self.named;
        let steps = self.with_world(|world| {
            plan(world, |deployment| {
                named += 1;
                format!("{deployment}-{named:04}")
            })
        });
        self.named = named;
        let count = steps.len();
        for step in &steps {
            if let Step::Remove { deployment, name } = step {
                self.seen.remove(&(deployment.clone(), name.clone()));
            }
        }
        let plan = self.state.plan_steps(steps, self.now());
        self.commit(plan);
        count
    }

    fn placed(&self, deployment: &str) -> Vec<&Placed> {
        let all = self.state.placements().values();
        all.filter(|placed| placed.deployment() == deployment).collect()
    }

    fn set(&mut self, placed: &Placed, phase: Phase) {
        let key = (placed.deployment().to_owned(), placed.instance.name.clone());
        self.seen.insert(key, (phase, self.now_ms));
    }

    /// Every VM that is seen does all that it is told.
    fn obey(&mut self) {
        let all: Vec<Placed> = self.state.placements().values().cloned().collect();
        for placed in &all {
            if !self.vms[placed.node()].is_seen {
                continue;
            }
            let phase = if placed.is_wanted() { Phase::Ready } else { Phase::Stopped };
            let key = (placed.deployment().to_owned(), placed.instance.name.clone());
            if self.seen.get(&key).map(|(phase, _)| *phase) != Some(phase) {
                self.set(placed, phase);
            }
        }
    }

    /// Until nothing is left to do.
    fn settle(&mut self) {
        for _ in 0..100 {
            self.now_ms += 1_000;
            let steps = self.look();
            self.obey();
            if steps == 0 && self.look() == 0 {
                return;
            }
        }
        panic!("it never ends: {:?}", self.state.placements());
    }

    fn ready(&self, deployment: &str) -> usize {
        let is_ready = |placed: &&&Placed| {
            let key = (deployment.to_owned(), placed.instance.name.clone());
            self.seen.get(&key).is_some_and(|(phase, _)| *phase == Phase::Ready)
        };
        self.placed(deployment).iter().filter(is_ready).count()
    }

    fn nodes(&self, deployment: &str) -> Vec<&str> {
        let mut nodes: Vec<_> = self.placed(deployment).iter().map(|one| one.node()).collect();
        nodes.sort_unstable();
        nodes
    }
}

#[test]
fn instances_are_spread_over_zones_then_over_vms() {
    let mut fleet = Fleet::new(&["a", "a", "a", "b"]);
    fleet.apply("web", |spec| spec.replicas = 4);
    fleet.settle();
    assert_eq!(fleet.nodes("web"), ["vm0", "vm1", "vm3", "vm3"]);
    // More or fewer: what is there stays.
    let before: Vec<_> = fleet.placed("web").iter().map(|one| one.instance.name.clone()).collect();
    fleet.apply("web", |spec| spec.replicas = 6);
    fleet.settle();
    let names: Vec<_> = fleet.placed("web").iter().map(|one| one.instance.name.clone()).collect();
    assert!(names.len() == 6 && before.iter().all(|name| names.contains(name)));
    fleet.apply("web", |spec| spec.replicas = 4);
    fleet.settle();
    let left: Vec<_> = fleet.placed("web").iter().map(|one| one.instance.name.clone()).collect();
    assert_eq!(left, before, "the youngest go");
}

#[test]
fn a_deployment_waits_for_what_it_needs() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.apply("web", |spec| {
        spec.needs = vec![pb::Need { service: "db".into(), ready: 2, timeout: None }];
    });
    assert_eq!(fleet.look(), 0);
    fleet.apply("db", |spec| spec.replicas = 2);
    fleet.look();
    assert_eq!((fleet.placed("db").len(), fleet.placed("web").len()), (2, 0));
    fleet.settle();
    assert_eq!(fleet.placed("web").len(), 3);
    // What runs goes on when what it needs is gone.
    fleet.apply("db", |spec| spec.replicas = 0);
    fleet.settle();
    assert_eq!((fleet.placed("db").len(), fleet.placed("web").len()), (0, 3));
}

#[test]
fn a_vm_that_is_emptied_is_replaced_first_and_a_lost_one_is_replaced() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.apply("web", |spec| spec.replicas = 1);
    fleet.settle();
    assert_eq!(fleet.nodes("web"), ["vm0"]);
    fleet.vms.get_mut("vm0").unwrap().is_draining = true;
    fleet.look();
    assert_eq!(fleet.nodes("web"), ["vm0", "vm1"]);
    assert!(fleet.placed("web").iter().all(|one| one.is_wanted()), "until the other one is ready");
    // However long that takes.
    let other = fleet.placed("web").into_iter().find(|one| one.node() == "vm1").unwrap().clone();
    fleet.set(&other, Phase::Starting);
    assert_eq!(fleet.look(), 0);
    fleet.settle();
    assert_eq!((fleet.nodes("web"), fleet.ready("web")), (vec!["vm1"], 1));

    // Out of sight is not lost.
    fleet.vms.get_mut("vm0").unwrap().is_draining = false;
    fleet.vms.get_mut("vm1").unwrap().is_seen = false;
    let placed = fleet.placed("web")[0].clone();
    fleet.set(&placed, Phase::Unreachable);
    assert_eq!(fleet.look(), 0);
    fleet.set(&placed, Phase::Lost);
    fleet.look();
    assert_eq!(fleet.placed("web").iter().filter(|one| one.is_wanted()).count(), 1);
    fleet.settle();
    assert_eq!(fleet.nodes("web"), ["vm0"]);
}

#[test]
fn an_end_does_not_hang_on_a_vm_that_does_nothing() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.apply("web", |_| {});
    fleet.settle();
    let deleted = fleet.state.plan_delete(cnsmo_proto::pb::resource::Kind::Deployment, "web");
    fleet.commit(deleted.unwrap());
    fleet.look();
    assert!(fleet.placed("web").iter().all(|one| !one.is_wanted()));
    assert_eq!(fleet.look(), 0);
    // Its drain time of 30 s, its stop time of 10 s and a minute.
    fleet.now_ms += 99_000;
    assert_eq!(fleet.look(), 0);
    fleet.now_ms += 2_000;
    assert_eq!(fleet.look(), 3);
    assert!(fleet.placed("web").is_empty());
}

#[test]
fn ports_are_each_instances_own() {
    let mut fleet = Fleet::new(&["a", "a"]);
    let port = |name: &str, port| pb::Port { name: name.into(), protocol: 6, port };
    fleet.apply("web", |spec| (spec.replicas, spec.ports) = (4, vec![port("http", 0)]));
    fleet.apply("fixed", |spec| (spec.replicas, spec.ports) = (3, vec![port("http", 8080)]));
    fleet.settle();
    let mut used: Vec<_> = fleet
        .state
        .placements()
        .values()
        .map(|placed| (placed.node(), placed.instance.ports[0].port))
        .collect();
    used.sort_unstable();
    let count = used.len();
    used.dedup();
    assert_eq!((count, used.len()), (6, 6), "{used:?}");
    assert_eq!(fleet.placed("fixed").len(), 2);
    let why = fleet.with_world(|world| shortage(world, "fixed"));
    assert!(why.unwrap().contains("ports or units are in use"), "{why:?}");
    fleet.apply("nowhere", |spec| {
        let selector = [("zone".into(), "c".into())].into();
        spec.placement = Some(Box::new(pb::Placement { selector, ..Default::default() }));
    });
    let why = fleet.with_world(|world| shortage(world, "nowhere"));
    assert!(why.unwrap().contains("no VM"), "{why:?}");
}

#[test]
fn a_unit_is_one_instances_on_each_vm_and_one_of_a_template_is_not() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let unit = |name: &str| {
        let unit = Some(pb::systemd::Unit::Name(name.into()));
        Some(pb::deployment_spec::Driver::Systemd(pb::Systemd { unit, readiness: None }))
    };
    for (name, of) in [("one", "a.service"), ("other", "a.service"), ("each", "a@.service")] {
        fleet.apply(name, |spec| (spec.replicas, spec.driver) = (3, unit(of)));
        fleet.settle();
    }
    let counts = ["one", "other", "each"].map(|name| fleet.placed(name).len());
    assert_eq!(counts, [2, 0, 3]);
    let why = fleet.with_world(|world| shortage(world, "other"));
    assert!(why.unwrap().contains("units are in use"), "{why:?}");
}

#[derive(Clone, Debug)]
enum Deed {
    Scale(u32),
    Replace(u32),
    Unavailable(u32),
    Drain(usize, bool),
    See(usize, bool),
    Obey,
    Fail(usize),
    Pass,
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        (0..6_u32).prop_map(Deed::Scale),
        (0..3_u32).prop_map(Deed::Replace),
        (1..4_u32).prop_map(Deed::Unavailable),
        (0..4_usize, any::<bool>()).prop_map(|(n, is)| Deed::Drain(n, is)),
        (0..4_usize, any::<bool>()).prop_map(|(n, is)| Deed::See(n, is)),
        Just(Deed::Obey),
        Just(Deed::Obey),
        (0..8_usize).prop_map(Deed::Fail),
        Just(Deed::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever happens in between: no look makes more of them than there shall be and may be in between, or takes away
    /// one that is ready beyond what may be missing; and when VMs obey, all is as it shall be.
    #[test]
    fn it_keeps_to_its_limits_and_comes_to_an_end(deeds in vec(deed(), 1..40)) {
        let mut fleet = Fleet::new(&["a", "a", "b", "b"]);
        fleet.apply("web", |_| {});
        for deed in deeds {
            fleet.now_ms += 1_000;
            match deed {
                Deed::Scale(n) => fleet.apply("web", |spec| spec.replicas = n),
                Deed::Replace(n) => fleet.apply("web", |spec| {
                    spec.attributes = [("version".to_owned(), n.to_string())].into();
                }),
                Deed::Unavailable(n) => fleet.apply("web", |spec| {
                    spec.rollout = Some(pb::Rollout { max_unavailable: n, soak: None });
                }),
                Deed::Drain(n, is) => fleet.vms.get_mut(&format!("vm{n}")).unwrap().is_draining = is,
                Deed::See(n, is) => fleet.vms.get_mut(&format!("vm{n}")).unwrap().is_seen = is,
                Deed::Obey => fleet.obey(),
                Deed::Fail(n) => {
                    let placed = fleet.placed("web").get(n).map(|one| (*one).clone());
                    if let Some(placed) = placed {
                        fleet.set(&placed, Phase::Failed);
                    }
                }
                Deed::Pass => fleet.now_ms += 30_000,
            }
            let model = fleet.state.deployments()["web"].model.clone();
            let (desired, most) = (model.replicas as usize, model.rollout.max_unavailable as usize);
            let wanted = |fleet: &Fleet| fleet.placed("web").iter().filter(|one| one.is_wanted()).count();
            let ready = |fleet: &Fleet| {
                let wanted = fleet.placed("web").into_iter().filter(|one| one.is_wanted());
                wanted.filter(|one| {
                    let key = ("web".to_owned(), one.instance.name.clone());
                    fleet.seen.get(&key).is_some_and(|(phase, _)| *phase == Phase::Ready)
                }).count()
            };
            let (wanted_before, ready_before) = (wanted(&fleet), ready(&fleet));
            fleet.look();
            let limit = (desired + most).max(wanted_before);
            prop_assert!(wanted(&fleet) <= limit, "{} of {limit}", wanted(&fleet));
            let least = ready_before.min(desired.saturating_sub(most));
            prop_assert!(ready(&fleet) >= least, "{} ready of {least}", ready(&fleet));
            // Where nothing happens, nothing more is done.
            fleet.look();
            fleet.look();
            prop_assert_eq!(fleet.look(), 0, "it does not come to rest");
            // The same world gives the same steps.
            let twice = [(); 2].map(|()| fleet.with_world(|world| plan(world, |d| format!("{d}-x"))));
            prop_assert_eq!(&twice[0], &twice[1]);
        }
        for vm in fleet.vms.values_mut() {
            (vm.is_seen, vm.is_draining) = (true, false);
        }
        fleet.obey();
        fleet.settle();
        let model = &fleet.state.deployments()["web"];
        let desired = model.model.replicas as usize;
        prop_assert_eq!((fleet.placed("web").len(), fleet.ready("web")), (desired, desired));
        let current = crate::state::template(&model.spec);
        prop_assert!(fleet.placed("web").iter().all(|one| one.template == current));
    }
}

#[test]
fn needs_in_a_circle_are_refused_with_the_circle() {
    let one = |name: &str, need: &str| {
        let spec = DeploymentSpec {
            needs: vec![pb::Need { service: need.into(), ready: 1, timeout: None }],
            driver: Some(pb::deployment_spec::Driver::Process(pb::Process {
                command: vec!["/bin/app".into()],
                ..Default::default()
            })),
            ..Default::default()
        };
        let metadata =
            Some(Metadata { name: Name::new(name).unwrap().to_string(), ..Metadata::default() });
        let one = pb::Deployment { metadata, spec: Some(spec), status: None };
        Resource { resource: Some(resource::Resource::Deployment(one)) }
    };
    let wanted = parse_apply(vec![one("a", "b"), one("b", "c"), one("c", "a")]).unwrap();
    let refused = State::default().plan_apply(wanted, Mode::Unspecified, SystemTime::now());
    let text = refused.unwrap_err().to_string();
    assert!(
        text.contains("Deployment a: spec.needs: a circle: a needs b needs c needs a"),
        "{text}"
    );
    let wanted = parse_apply(vec![one("firewall", "b")]).unwrap();
    let refused = State::default().plan_apply(wanted, Mode::Unspecified, SystemTime::now());
    assert!(refused.unwrap_err().to_string().contains("a service of our own"));
}

impl Fleet {
    /// The only instance that shall run.
    fn only(&self) -> Placed {
        let wanted: Vec<_> = self.placed("web").into_iter().filter(|one| one.is_wanted()).collect();
        let [one] = *wanted else { panic!("{wanted:?}") };
        one.clone()
    }

    /// Looks until `seconds` have passed; VMs of these names let all that they have fail. Returns how many were placed.
    fn fail_on(&mut self, vms: &[&str], seconds: u64) -> usize {
        let before = self.named;
        for step in 0..seconds / 5 {
            self.now_ms += 5_000;
            self.obey();
            for placed in self.placed("web").into_iter().cloned().collect::<Vec<_>>() {
                if vms.contains(&placed.node()) && placed.is_wanted() {
                    // Up for a moment now and then, as one that has no readiness probe.
                    let phase = [Phase::Failed, Phase::Starting, Phase::Ready][step as usize % 3];
                    self.set(&placed, phase);
                }
            }
            self.look();
        }
        self.named - before
    }
}

#[test]
fn what_keeps_failing_goes_to_another_vm_and_the_old_one_is_avoided() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.apply("web", |spec| spec.replicas = 1);
    fleet.settle();
    assert_eq!(fleet.only().node(), "vm0");
    assert_eq!(fleet.fail_on(&["vm0"], 115), 0);
    let failing = fleet.only();
    assert!(failing.node() == "vm0" && failing.fail_ms > 0);
    // Out of sight is no failure, and begins anew.
    fleet.set(&failing, Phase::Unreachable);
    fleet.vms.get_mut("vm0").unwrap().is_seen = false;
    fleet.now_ms += 600_000;
    fleet.look();
    assert!(fleet.only().node() == "vm0" && fleet.only().fail_ms == 0);
    fleet.vms.get_mut("vm0").unwrap().is_seen = true;
    assert_eq!(fleet.fail_on(&["vm0"], 115), 0);
    assert_eq!(fleet.fail_on(&["vm0"], 15), 1);
    assert_eq!(fleet.only().node(), "vm1");
    fleet.settle();
    let avoided = fleet.state.avoided()[&("web".to_owned(), "vm0".to_owned())];
    assert_eq!((avoided.times, fleet.nodes("web"), fleet.ready("web")), (1, vec!["vm1"], 1));

    // Further ones are not placed there for ten minutes, unless it is another program.
    fleet.apply("web", |spec| spec.replicas = 2);
    fleet.settle();
    assert_eq!(fleet.nodes("web"), ["vm1", "vm1"]);
    fleet.now_ms = avoided.until_ms + 1_000;
    fleet.apply("web", |spec| spec.replicas = 3);
    fleet.settle();
    assert_eq!(fleet.nodes("web"), ["vm0", "vm1", "vm1"]);
    fleet.apply("web", |spec| spec.attributes = [("version".into(), "2".into())].into());
    fleet.settle();
    assert!(fleet.state.avoided().is_empty(), "another program gets another chance");
}

#[test]
fn one_that_recovers_or_has_nowhere_to_go_stays_where_it_is() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.apply("web", |spec| spec.replicas = 1);
    fleet.settle();
    let one = fleet.only();
    fleet.set(&one, Phase::Failed);
    fleet.look();
    assert!(fleet.only().fail_ms > 0);
    fleet.set(&one, Phase::Ready);
    fleet.now_ms += 119_000;
    assert_eq!(fleet.look(), 0, "it may fail again at once");
    fleet.now_ms += 2_000;
    fleet.look();
    assert_eq!((fleet.only().fail_ms, fleet.only().node()), (0, "vm0"));
    // The other VM is away, or the deployment is for this one, or does not want it.
    fleet.vms.get_mut("vm1").unwrap().is_seen = false;
    assert_eq!(fleet.fail_on(&["vm0"], 300), 0);
    fleet.vms.get_mut("vm1").unwrap().is_seen = true;
    let placement = |node: &str, after: Option<i64>| {
        Some(Box::new(pb::Placement {
            node: node.into(),
            reschedule_after: after.map(|seconds| prost_types::Duration { seconds, nanos: 0 }),
            ..Default::default()
        }))
    };
    fleet.apply("web", |spec| spec.placement = placement("vm0", None));
    assert_eq!(fleet.fail_on(&["vm0"], 300), 0);
    fleet.apply("web", |spec| spec.placement = placement("", Some(0)));
    assert_eq!(fleet.fail_on(&["vm0"], 300), 0);
    assert_eq!(fleet.only().fail_ms, 0);
    fleet.apply("web", |spec| spec.placement = placement("", Some(10)));
    assert_eq!(fleet.fail_on(&["vm0"], 20), 1);
    assert_eq!(fleet.only().node(), "vm1");
}

#[test]
fn what_fails_everywhere_does_not_go_round_and_round() {
    let mut fleet = Fleet::new(&["a", "b", "c"]);
    fleet.apply("web", |spec| spec.replicas = 1);
    fleet.settle();
    let day = fleet.fail_on(&["vm0", "vm1", "vm2"], 24 * 3_600);
    assert!((9..40).contains(&day), "{day} times in a day");
    // When one of them gets well, it is found.
    fleet.fail_on(&["vm0", "vm2"], 24 * 3_600);
    assert_eq!(fleet.only().node(), "vm1");
}

#[test]
fn no_more_than_may_be_missing_go_at_a_time() {
    for most in [1, 2] {
        let mut fleet = Fleet::new(&["a", "a"]);
        fleet.apply("web", |spec| {
            spec.replicas = 6;
            spec.rollout = Some(pb::Rollout { max_unavailable: most, soak: None });
        });
        fleet.settle();
        let ill: Vec<_> =
            fleet.placed("web").into_iter().filter(|one| one.node() == "vm0").cloned().collect();
        for one in &ill {
            fleet.set(one, Phase::Failed);
        }
        fleet.look();
        fleet.now_ms += 121_000;
        fleet.look();
        let ending = fleet.placed("web").into_iter().filter(|one| !one.is_wanted());
        let why: Vec<_> = ending.map(|one| one.instance.goal_reason.clone()).collect();
        assert_eq!(why, vec!["Failing"; most as usize]);
        // Of those that come to the other VM, none becomes ready.
        for _ in 0..5 {
            fleet.look();
        }
        let there = fleet.nodes("web").into_iter().filter(|node| *node == "vm1").count();
        assert_eq!((there, fleet.ready("web")), (3 + most as usize, 3));
    }
}
