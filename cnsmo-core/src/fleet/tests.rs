mod peers;

use std::collections::VecDeque;

use cnsmo_proto::pb::{
    self,
    agent::{Ack, Heartbeat, ResourceError, TypeState},
    balancer::{HealthCheck, LoadBalancer, Selector, ServicePort},
    catalog::{Endpoint, Instance as CatalogInstance, Phase as InstancePhase},
    deployment::{Deployment, DeploymentSpec, Process, deployment_spec, instance::Goal},
    meta::Metadata,
    network::StaticAddresses,
    node::{NodeSpec, node_status::Phase},
    policy::FirewallPolicy,
    resource::{self as api, apply_request::Mode},
};
use proptest::prelude::*;

use super::*;
use crate::{
    identity::Issued,
    orchestrator::plan,
    state::{self, Enrolment, Plan, TokenGrant, TokenRecord, parse_apply},
};

/// State, fleet and a clock, without tasks and sockets.
struct World {
    state: State,
    fleet: Fleet,
    now: Instant,
}

const NODES: [&str; 3] = ["a", "b", "c"];
const LEASE: Duration = Duration::from_secs(6);

impl World {
    fn new() -> Self {
        let mut world = Self {
            state: State::default(),
            fleet: Fleet::new(&State::default(), Timing::default(), Instant::now()),
            now: Instant::now(),
        };
        let token = TokenRecord {
            secret_sha256: [1; 32],
            create_time: wall_clock(),
            expire_time: wall_clock() + LEASE,
            uses_max: 10,
            used_by: BTreeSet::new(),
            grant: TokenGrant::default(),
            labels: Labels::default(),
        };
        let plan = world.state.plan_token("t".into(), token, wall_clock()).unwrap();
        world.commit(plan);
        for (n, node) in (0..).zip(NODES) {
            let enrolment = Enrolment {
                token_id: "t".into(),
                secret_sha256: [1; 32],
                name: node.parse().unwrap(),
                labels: format!("n={node}").parse().unwrap(),
                spki_sha256: [n; 32],
            };
            let plan =
                world.state.plan_enrolment(&enrolment, Issued::sample(), wall_clock()).unwrap();
            world.commit(plan);
        }
        world
    }

    fn commit(&mut self, plan: Plan) {
        if plan.is_empty() {
            return;
        }
        let before = self.state.revision();
        let events = self.state.commit(plan, before + 1);
        self.fleet.on_commit(&events, &self.state, before, self.now);
        self.fleet.flush(&self.state);
    }

    fn apply(&mut self, name: &str, target: &str, priority: u32) {
        let target = target.parse::<Labels>().unwrap().as_map().clone();
        // Some are about others.
        let about = ["q", "r"].iter().position(|other| *other == name).map(|n| LABELS[n + 1]);
        let rules = about.map(|labels| peers::about("peers", labels)).into_iter().collect();
        let spec = FirewallPolicySpec { target, priority, rules, ..Default::default() };
        let metadata = Metadata { name: name.into(), ..Metadata::default() };
        let policy = FirewallPolicy { metadata: Some(metadata), spec: Some(spec), status: None };
        self.apply_all([api::resource::Resource::FirewallPolicy(policy)]);
    }

    /// What a rule between resources refuses changes nothing.
    fn apply_all(&mut self, resources: impl IntoIterator<Item = api::resource::Resource>) {
        let wire = |resource| api::Resource { resource: Some(resource) };
        let wanted = parse_apply(resources.into_iter().map(wire).collect()).unwrap();
        if let Ok(plan) = self.state.plan_apply(wanted, Mode::Unspecified, wall_clock()) {
            self.commit(plan);
        }
    }

    fn drain(&mut self, node: &str, draining: bool) {
        let labels = self.state.nodes()[node].labels.as_map().clone();
        let metadata = Metadata { name: node.into(), labels, ..Metadata::default() };
        let spec = Some(NodeSpec { draining });
        let node = pb::node::Node { metadata: Some(metadata), spec, status: None };
        self.apply_all([api::resource::Resource::Node(node)]);
    }

    fn announce(&mut self, node: &str, key: u8) {
        let addresses = vec![format!("192.0.2.{key}"), "10.1.0.77".into()];
        let wire = Announcement { tunnel_public_key: vec![key; 32], addresses };
        let announcement = wire.try_into().unwrap();
        if let Ok(plan) = self.state.plan_announcement(node, announcement) {
            self.commit(plan);
        }
    }

    fn delete(&mut self, kind: Kind, name: &str) {
        if let Ok(plan) = self.state.plan_delete(kind, name) {
            self.commit(plan);
        }
    }

    fn label(&mut self, node: &str, labels: &str) {
        let labels = labels.parse::<Labels>().unwrap().as_map().clone();
        let metadata = Metadata { name: node.into(), labels, ..Metadata::default() };
        let node = cnsmo_proto::pb::node::Node { metadata: Some(metadata), ..Default::default() };
        self.apply_all([api::resource::Resource::Node(node)]);
    }

    fn phase(&self, node: &str) -> Phase {
        let node = self.fleet.node(&self.state.nodes()[node], self.state.revision());
        node.status.unwrap().phase()
    }

    fn applied(&self, node: &str) -> Revision {
        let node = self.fleet.node(&self.state.nodes()[node], self.state.revision());
        node.status.unwrap().applied_revision
    }

    /// Names of what a node shall run, by the rules of the API alone.
    fn desired(&self, node: &str) -> BTreeSet<String> {
        let labels = &self.state.nodes()[node].labels;
        let policies = self.state.policies().iter();
        let policies = policies.filter(|(_, policy)| policy.model.target.selects(labels));
        let mut names: BTreeSet<_> = policies.map(|(name, _)| format!("{POLICY}{name}")).collect();
        let Some((_, network, _)) = self.state.member(node) else { return names };
        names.insert(format!("{NETWORK}{network}"));
        let members = &self.state.roster(network).unwrap().members;
        names.extend(members.iter().map(|member| format!("{MEMBER}{network}/{member}")));
        for (name, balancer) in self.state.balancers() {
            if balancer.model.network.as_str() == network {
                let Backends::Nodes(wanted) = &balancer.model.backends else { panic!("a service") };
                let selects = |node: &&String| wanted.selects(&self.state.nodes()[*node].labels);
                names.insert(format!("{BALANCER}{name}"));
                let backends = members.iter().filter(selects);
                names.extend(backends.map(|member| format!("{BACKEND}{name}/{member}")));
            }
        }
        names
    }
}

fn network(name: &str, prefix: &str, members: &str, listen_port: u32) -> api::resource::Resource {
    let metadata = Metadata { name: name.into(), ..Metadata::default() };
    let spec = NetworkSpec {
        ipv4_prefix: prefix.into(),
        members: members.parse::<Labels>().unwrap().as_map().clone(),
        listen_port,
        ..NetworkSpec::default()
    };
    let network = pb::network::Network { metadata: Some(metadata), spec: Some(spec), status: None };
    api::resource::Resource::Network(network)
}

fn balancer(name: &str, network: &str, backends: &str) -> api::resource::Resource {
    let metadata = Metadata { name: name.into(), ..Metadata::default() };
    let spec = LoadBalancerSpec {
        network: network.into(),
        addresses: vec!["198.51.100.1".into()],
        ports: vec![ServicePort { protocol: 6, port: 80, target_port: 0 }],
        backends: backends.parse::<Labels>().unwrap().as_map().clone(),
        gateways: Some(Selector::default()),
        ..LoadBalancerSpec::default()
    };
    let balancer = LoadBalancer { metadata: Some(metadata), spec: Some(spec), status: None };
    api::resource::Resource::LoadBalancer(balancer)
}

/// Names and versions.
type Set = BTreeMap<String, Revision>;

/// An agent that keeps its set between sessions and rejects what it is told to.
#[derive(Default)]
struct TestAgent {
    name: &'static str,
    session: u64,
    down: Option<mpsc::Receiver<Result<Down, Status>>>,
    set: Set,
    revision: Revision,
    rejects: BTreeSet<String>,
    /// The set with rejected versions in it.
    was_sent: Set,
    unanswered: VecDeque<Update>,
    confirmed: usize,
    sent: BTreeMap<(String, Revision), usize>,
}

impl TestAgent {
    fn new(name: &'static str) -> Self {
        Self { name, ..Self::default() }
    }

    fn state(&self) -> TypeState {
        let digest: Digest = self.set.iter().map(|(name, rev)| (name.as_str(), *rev)).collect();
        TypeState { revision: self.revision, digest: digest.to_vec() }
    }

    fn connect(&mut self, world: &mut World) {
        let (messages, receiver) = mpsc::channel(DOWN_MAX);
        let down = DownSender { messages, alive: oneshot::channel().0 };
        let plan =
            world.state.plan_connect(self.name, &Labels::default(), None, wall_clock()).unwrap();
        world.commit(plan);
        let have = [(SET_TYPE.to_owned(), self.state())].into();
        let hello = Hello { protocol_version: PROTOCOL_VERSION, have, ..Hello::default() };
        self.session = world.fleet.connect(self.name, &hello, down, 1, world.now);
        self.down = Some(receiver);
        self.unanswered.clear();
        world.fleet.flush(&world.state);
    }

    fn receive(&mut self) {
        let Some(down) = &mut self.down else { return };
        while let Ok(Ok(message)) = down.try_recv() {
            self.confirmed += usize::from(matches!(message, Down::Confirm(_)));
            let Some(update) = as_received(message) else { continue };
            for resource in &update.upserts {
                let key = (resource.name.clone(), resource.version);
                *self.sent.entry(key).or_default() += 1;
            }
            if update.kind() != UpdateKind::Bookmark {
                self.unanswered.push_back(update);
            }
        }
        assert!(self.unanswered.len() <= 1, "more than one unanswered update");
    }

    /// Applies and answers the update at hand. Returns false if there was none.
    fn answer(&mut self, world: &mut World) -> bool {
        self.receive();
        let Some(update) = self.unanswered.pop_front() else { return false };
        let old = self.set.clone();
        let before = self.was_sent.clone();
        if update.kind() == UpdateKind::Snapshot {
            self.was_sent.clear();
        }
        self.was_sent.retain(|name, _| !update.removals.contains(name));
        self.was_sent.extend(update.upserts.iter().map(|r| (r.name.clone(), r.version)));
        let digest: Digest =
            self.was_sent.iter().map(|(name, rev)| (name.as_str(), *rev)).collect();
        if update.digest != digest.as_bytes() {
            assert_eq!(update.kind(), UpdateKind::Delta, "a snapshot leaves nothing to doubt");
            self.was_sent = before;
            self.refuse(world, &update);
            return true;
        }
        if update.kind() == UpdateKind::Snapshot {
            self.set.clear();
        } else {
            assert_eq!(update.base_revision, self.revision);
        }
        let mut errors = Vec::new();
        for name in &update.removals {
            self.set.remove(name);
        }
        for Resource { name, version, .. } in &update.upserts {
            if self.rejects.contains(name) {
                let message = "not today".to_owned();
                errors.push(ResourceError { name: name.clone(), version: *version, message });
                if let Some(last_good) = old.get(name) {
                    self.set.insert(name.clone(), *last_good);
                }
            } else {
                self.set.insert(name.clone(), *version);
            }
        }
        self.revision = update.revision;
        let ack = Ack {
            nonce: update.nonce,
            r#type: SET_TYPE.into(),
            applied: Some(self.state()),
            resource_errors: errors,
            ..Ack::default()
        };
        self.say(world, connect_request::Message::Ack(ack));
        true
    }

    /// The set after it would be another than the core means.
    fn refuse(&mut self, world: &mut World, update: &Update) {
        let ack = Ack {
            nonce: update.nonce,
            r#type: SET_TYPE.into(),
            applied: Some(self.state()),
            error: "another digest".into(),
            ..Ack::default()
        };
        self.say(world, connect_request::Message::Ack(ack));
    }

    fn heartbeat(&mut self, world: &mut World) {
        let applied = [(SET_TYPE.to_owned(), self.state())].into();
        let heartbeat = Heartbeat { sequence: 0, applied };
        self.say(world, connect_request::Message::Heartbeat(heartbeat));
    }

    fn say(&mut self, world: &mut World, message: connect_request::Message) {
        world.fleet.on_message(self.name, self.session, world.now, message);
        world.fleet.flush(&world.state);
    }
}

#[test]
fn a_change_without_a_revision_is_confirmed_too() {
    let mut world = World::new();
    for node in ["a", "b"] {
        world.label(node, "in=m");
    }
    let mut agent = TestAgent::new("a");
    agent.connect(&mut world);
    world.label("a", "in=m");
    world.apply_all([network("m", "10.1.0.0/24", "in=m", 0), of_service(|_| ())]);
    world.fleet.observe(Observed::default(), &world.state);
    world.fleet.flush(&world.state);
    while agent.answer(&mut world) {}
    agent.heartbeat(&mut world);
    agent.receive();
    let confirmed = agent.confirmed;
    for (round, phase) in [InstancePhase::Ready, InstancePhase::Failed].into_iter().enumerate() {
        let before = agent.revision;
        world.fleet.observe(Observed::new([instance("w1", "b", phase)]), &world.state);
        world.fleet.flush(&world.state);
        agent.heartbeat(&mut world);
        agent.receive();
        assert_eq!(agent.confirmed, confirmed + round, "an update is under way");
        assert!(agent.answer(&mut world));
        assert_eq!(agent.revision, before, "the catalogue alone has changed");
        for _ in 0..2 {
            agent.heartbeat(&mut world);
        }
        agent.receive();
        assert_eq!(agent.confirmed, confirmed + round + 1);
    }
}

#[test]
fn an_edit_moves_only_the_nodes_it_touches() {
    let mut world = World::new();
    let mut agents = NODES.map(TestAgent::new);
    for agent in &mut agents {
        agent.connect(&mut world);
    }
    world.label("b", "n=b");
    world.apply("p", "n=b", 1);
    assert_eq!(NODES.map(|node| world.phase(node)), [Phase::Ready, Phase::Degraded, Phase::Ready]);
    let before = world.state.revision() - 1;
    assert_eq!(NODES.map(|node| world.applied(node)), [before + 1, before, before + 1]);
    let [a, b, c] = &mut agents;
    assert!(!a.answer(&mut world) && b.answer(&mut world) && !c.answer(&mut world));
    assert_eq!(world.applied("b"), world.state.revision());
}

#[test]
fn one_vm_that_joins_a_network_costs_each_other_member_one_record() {
    let mut world = World::new();
    world.apply_all([network("m", "10.1.0.0/24", "in=m", 0), balancer("lb", "m", "role=web")]);
    let mut agents = NODES.map(TestAgent::new);
    world.label("a", "in=m");
    for agent in &mut agents {
        agent.connect(&mut world);
        while agent.answer(&mut world) {}
    }
    let mut received = |world: &mut World| {
        NODES.map(|node| {
            let agent = agents.iter_mut().find(|agent| agent.name == node).unwrap();
            agent.receive();
            let update = agent.unanswered.front().cloned().unwrap_or_default();
            agent.answer(world);
            let name = |resource: Resource| resource.name;
            (update.upserts.into_iter().map(name).collect::<Vec<_>>(), update.removals)
        })
    };
    let nothing = (Vec::new(), Vec::new());
    world.label("b", "in=m");
    let [a, b, c] = received(&mut world);
    assert_eq!(a.0, ["member/m/b"]);
    assert_eq!(b.0, ["load-balancer/lb", "member/m/a", "member/m/b", "network/m"]);
    assert_eq!(c, nothing);
    world.label("c", "role=web");
    assert_eq!(received(&mut world), [nothing.clone(), nothing.clone(), nothing.clone()]);
    world.label("c", "in=m,role=web");
    let [a, b, _] = received(&mut world);
    let joined = (vec!["backend/lb/c".to_owned(), "member/m/c".to_owned()], Vec::new());
    assert_eq!((a, b), (joined.clone(), joined));
    world.drain("c", true);
    let drained = (vec!["backend/lb/c".to_owned()], Vec::new());
    assert_eq!(received(&mut world), [drained.clone(), drained.clone(), drained]);
    world.announce("b", 7);
    let [a, ..] = received(&mut world);
    assert_eq!(a, (vec!["member/m/b".into()], Vec::new()));
    let Some(Spec::Member(member)) = world.fleet.spec("member/m/b") else { panic!() };
    assert_eq!(
        (&member.public_key, &member.endpoints[..]),
        (&vec![7; 32], &["192.0.2.7:51820".to_owned()][..])
    );
    world.delete(Kind::Node, "c");
    let gone = ["backend/lb/c".to_owned(), "member/m/c".to_owned()];
    let [a, b, _] = received(&mut world);
    assert_eq!((a.1, b.1), (gone.to_vec(), gone.to_vec()));
}

fn of_service(change: impl FnOnce(&mut LoadBalancerSpec)) -> api::resource::Resource {
    let mut one = balancer("lb", "m", "");
    let api::resource::Resource::LoadBalancer(inner) = &mut one else { panic!() };
    let spec = inner.spec.as_mut().unwrap();
    (spec.service, spec.backends) = ("web".into(), Default::default());
    change(spec);
    one
}

fn instance(name: &str, node: &str, phase: InstancePhase) -> Arc<CatalogInstance> {
    let endpoint = |protocol: &str, port| Endpoint {
        protocol: protocol.into(),
        address: "192.0.2.1".into(),
        port,
    };
    Arc::new(CatalogInstance {
        name: name.into(),
        service: "web".into(),
        node: node.into(),
        phase: phase.into(),
        endpoints: vec![endpoint("bus", 0), endpoint("udp", 53), endpoint("http", 20_001)],
        ..Default::default()
    })
}

fn behind(world: &World) -> Vec<String> {
    let specs = world.fleet.catalog.iter().filter_map(|(key, entry)| match &entry.spec {
        Spec::Backend(backend) => Some((key.to_string(), backend.clone())),
        _ => None,
    });
    let text = |(key, backend): (String, Arc<Backend>)| {
        let draining = if backend.draining { " out" } else { "" };
        format!("{}:{}{draining}", key.strip_prefix(BACKEND).unwrap(), backend.port)
    };
    let mut all: Vec<_> = specs.map(text).collect();
    all.sort();
    all
}

#[test]
fn backends_by_service_follow_what_the_catalogue_says() {
    use InstancePhase::{Degraded, Draining, Failed, Lost, Ready, Starting, Unreachable};
    let mut world = World::new();
    for node in ["a", "b"] {
        world.label(node, "in=m");
    }
    world.apply_all([network("m", "10.1.0.0/24", "in=m", 0)]);
    let mut agent = TestAgent::new("a");
    agent.connect(&mut world);
    while agent.answer(&mut world) {}
    world.apply_all([of_service(|_| ())]);
    assert!(!agent.answer(&mut world), "what is behind the balancer is not known yet");
    let observe = |world: &mut World, all: &[(&str, &str, InstancePhase)]| {
        let all = all.iter().map(|(name, node, phase)| instance(name, node, *phase));
        world.fleet.observe(Observed::new(all), &world.state);
        world.fleet.flush(&world.state);
        behind(world)
    };
    assert_eq!(observe(&mut world, &[]), [""; 0]);
    agent.receive();
    let names: Vec<_> = agent.unanswered[0].upserts.iter().map(|r| r.name.clone()).collect();
    assert_eq!(names, ["load-balancer/lb"]);
    agent.answer(&mut world);

    let all = [("w1", "a", Ready), ("w2", "a", Starting), ("w3", "b", Ready), ("w4", "c", Ready)];
    assert_eq!(observe(&mut world, &all), ["lb/a/w1:20001", "lb/b/w3:20001"], "c is no member");
    agent.answer(&mut world);
    assert!(agent.set.contains_key("backend/lb/b/w3"));
    let all = [("w1", "a", Degraded), ("w2", "a", Unreachable), ("w3", "b", Ready)];
    let expected = ["lb/a/w1:20001 out", "lb/a/w2:20001 out", "lb/b/w3:20001"];
    assert_eq!(observe(&mut world, &all), expected);
    let all = [("w1", "a", Degraded), ("w2", "a", Unreachable), ("w3", "b", Draining)];
    let expected = ["lb/a/w1:20001", "lb/a/w2:20001", "lb/b/w3:20001 out"];
    assert_eq!(observe(&mut world, &all), expected, "better one that may not answer than none");
    world.drain("a", true);
    let expected = ["lb/a/w1:20001 out", "lb/a/w2:20001 out", "lb/b/w3:20001 out"];
    assert_eq!(behind(&world), expected);
    world.drain("a", false);
    let health = Some(HealthCheck::default());
    world.apply_all([of_service(|spec| spec.health = health)]);
    let all = [("w1", "a", Degraded), ("w2", "a", Unreachable), ("w3", "b", Failed)];
    let expected = ["lb/a/w1:20001 out", "lb/a/w2:20001"];
    assert_eq!(observe(&mut world, &all), expected, "the health check knows better");
    assert_eq!(observe(&mut world, &[("w1", "a", Lost), ("w2", "b", Ready)]), ["lb/b/w2:20001"]);
    world.apply_all([of_service(|spec| spec.ports[0].protocol = 17)]);
    assert_eq!(behind(&world), ["lb/b/w2:53"]);
    world.apply_all([of_service(|spec| spec.ports[0].target_port = 8080)]);
    assert_eq!(behind(&world), ["lb/b/w2:0"]);
    world.label("b", "");
    assert_eq!(behind(&world), [""; 0]);
    world.label("b", "in=m");
    assert_eq!(behind(&world), ["lb/b/w2:0"]);
    world.delete(Kind::Node, "b");
    assert_eq!(behind(&world), [""; 0]);
}

#[test]
fn an_instance_ends_when_no_vm_gives_it_new_flows_any_more() {
    let mut world = World::new();
    for node in ["a", "b"] {
        world.label(node, "in=m");
    }
    world.apply_all([network("m", "10.1.0.0/24", "in=m", 0), of_service(|_| ())]);
    let driver = deployment_spec::Driver::Process(Process {
        command: vec!["/bin/app".into()],
        ..Process::default()
    });
    let spec = DeploymentSpec { replicas: 2, driver: Some(driver), ..Default::default() };
    let metadata = Some(Metadata { name: "web".into(), ..Metadata::default() });
    let deployment = Deployment { metadata, spec: Some(spec), status: None };
    world.apply_all([api::resource::Resource::Deployment(deployment)]);
    world.fleet.observe(Observed::default(), &world.state);
    let mut agents = ["a", "b"].map(TestAgent::new);
    for agent in &mut agents {
        agent.connect(&mut world);
        while agent.answer(&mut world) {}
    }
    let mut n = 0;
    let steps = plan(&world.fleet.world(&world.state, 1), |_| {
        n += 1;
        format!("web-{n}")
    });
    let placed = world.state.plan_steps(steps, wall_clock());
    world.commit(placed);
    let seen = ["web-1", "web-2"].map(|name| {
        let node = world.state.placements()[&("web".to_owned(), name.to_owned())].node();
        instance(name, node, InstancePhase::Ready)
    });
    world.fleet.observe(Observed::new(seen), &world.state);
    world.fleet.flush(&world.state);
    while agents.iter_mut().any(|agent| agent.answer(&mut world)) {}
    let goal = |world: &World, name: &str| match world.fleet.spec(&format!("instance/web/{name}")) {
        Some(Spec::Instance(instance)) => instance.goal(),
        _ => panic!("{name} is not placed"),
    };
    let end = |world: &mut World, name: &str| {
        let (deployment, name) = ("web".to_owned(), name.to_owned());
        let step = state::Step::Drain { deployment, name, reason: "ScaledDown" };
        let plan = world.state.plan_steps(vec![step], wall_clock());
        world.commit(plan);
        world.fleet.let_go(&world.state, world.now);
    };
    end(&mut world, "web-1");
    let out = behind(&world).into_iter().filter(|backend| backend.ends_with(" out"));
    assert!(out.eq(behind(&world).into_iter().filter(|backend| backend.contains("/web-1:"))));
    assert_eq!(goal(&world, "web-1"), Goal::Run);
    for (agent, after) in agents.iter_mut().zip([Goal::Run, Goal::Drain]) {
        while agent.answer(&mut world) {}
        world.fleet.let_go(&world.state, world.now);
        assert_eq!(goal(&world, "web-1"), after, "after {}", agent.name);
    }
    // One that says nothing delays the end, and no more.
    end(&mut world, "web-2");
    assert_eq!(goal(&world, "web-2"), Goal::Run);
    world.now += Duration::from_secs(6);
    world.fleet.let_go(&world.state, world.now);
    assert_eq!(goal(&world, "web-2"), Goal::Drain);
}

#[test]
fn who_is_selected_and_not_in_a_network_is_told_why() {
    let mut world = World::new();
    let mut office = network("office", "10.1.0.0/30", "", 0);
    let api::resource::Resource::Network(inner) = &mut office else { panic!() };
    let fixed = StaticAddresses { ipv4: "10.1.0.2".into(), ..StaticAddresses::default() };
    inner.spec.as_mut().unwrap().addresses.insert("c".into(), fixed);
    world.apply_all([office, network("lab", "10.2.0.0/24", "n=b", 0)]);
    let Some(Spec::Network(spec)) = world.fleet.spec("network/office") else { panic!() };
    assert!(spec.addresses.is_empty(), "the members' records have them");
    let refused = |world: &mut World| {
        let office = world.fleet.resource(Kind::Network, "office", &world.state).unwrap();
        let Some(api::resource::Resource::Network(office)) = office.resource else { panic!() };
        let status = office.status.unwrap();
        let refused = status.refused.into_iter().map(|one| (one.node, one.message));
        let members = status.members.into_iter().map(|one| one.node);
        (members.collect::<Vec<_>>(), refused.collect::<Vec<_>>())
    };
    let elsewhere = ("b".to_owned(), "is in Network lab, whose name comes first".to_owned());
    let all = ["a".to_owned(), "c".to_owned()];
    assert_eq!(refused(&mut world), (all.to_vec(), vec![elsewhere]));
    world.delete(Kind::Network, "lab");
    let full = ("b".to_owned(), "no place is free: the network is full".to_owned());
    assert_eq!(refused(&mut world), (all.to_vec(), vec![full]));
    world.delete(Kind::Node, "a");
    assert_eq!(refused(&mut world), (vec!["b".to_owned(), "c".to_owned()], vec![]));
}

#[test]
fn a_lease_ends_by_silence_but_not_by_a_pause_of_the_core() {
    let mut world = World::new();
    let mut agent = TestAgent::new("a");
    agent.connect(&mut world);
    agent.answer(&mut world);
    let tick = Duration::from_millis(100);
    let pass = |world: &mut World, time: Duration| {
        world.now += time;
        world.fleet.tick(world.now, time.min(tick));
    };
    pass(&mut world, LEASE);
    assert_eq!(world.phase("a"), Phase::Ready);
    let pause = Duration::from_secs(3_600);
    world.now += pause;
    world.fleet.tick(world.now, pause);
    assert_eq!(world.phase("a"), Phase::Ready, "the core stood still, not the agent");
    pass(&mut world, tick);
    assert_eq!(world.phase("a"), Phase::Unreachable);
    agent.heartbeat(&mut world);
    assert_eq!(world.phase("a"), Phase::Ready);
}

#[test]
fn an_agent_that_answers_nothing_holds_one_update() {
    let mut world = World::new();
    let mut deaf = TestAgent::new("a");
    deaf.connect(&mut world);
    for n in 0..100 {
        world.apply("p", "", n);
    }
    let down = deaf.down.as_mut().unwrap();
    let waiting = std::iter::from_fn(|| down.try_recv().ok()).count();
    assert_eq!(waiting, 3, "welcome, bookmark, one update");
}

/// It acknowledges what it does not read: something no sound agent does.
#[test]
fn an_agent_whose_channel_is_full_is_cut() {
    let mut world = World::new();
    let mut deaf = TestAgent::new("a");
    deaf.connect(&mut world);
    for n in 1..100 {
        world.apply("p", "", n);
        // The bookmark was the first.
        let nonce = u64::from(n) + 1;
        let applied = Some(deaf.state());
        let ack = Ack { nonce, r#type: SET_TYPE.into(), applied, ..Ack::default() };
        deaf.say(&mut world, connect_request::Message::Ack(ack));
    }
    let down = deaf.down.as_mut().unwrap();
    let waiting = std::iter::from_fn(|| down.try_recv().ok()).count();
    assert_eq!(waiting, DOWN_MAX);
    assert!(down.is_closed());
}

#[test]
fn what_was_rejected_and_works_now_is_believed_at_the_next_heartbeat() {
    let mut world = World::new();
    let mut agent = TestAgent::new("a");
    agent.connect(&mut world);
    world.label("a", "n=a");
    agent.rejects.insert(format!("{POLICY}p"));
    // Twice within the interval of resyncs.
    for priority in [1, 2] {
        world.apply("p", "n=a", priority);
        agent.answer(&mut world);
        assert_eq!(world.phase("a"), Phase::Degraded);
        let before = agent.sent.clone();
        agent.set.clone_from(&agent.was_sent);
        agent.heartbeat(&mut world);
        assert_eq!(world.phase("a"), Phase::Ready);
        let rejected = &world.fleet.agents["a"].rejected;
        assert!(rejected.is_empty(), "{rejected:?}");
        agent.receive();
        assert_eq!(agent.sent, before, "nothing had to be sent");
    }
}

#[test]
fn a_set_that_nothing_explains_is_replaced_once_per_interval() {
    let mut world = World::new();
    let mut agent = TestAgent::new("a");
    agent.connect(&mut world);
    world.label("a", "n=a");
    world.apply("p", "n=a", 1);
    agent.answer(&mut world);
    for within_interval in [false, true] {
        agent.set.clear();
        agent.heartbeat(&mut world);
        assert_eq!(agent.answer(&mut world), !within_interval);
    }
    assert_eq!(world.phase("a"), Phase::Degraded);
    world.now += Duration::from_secs(31);
    agent.heartbeat(&mut world);
    assert!(agent.answer(&mut world), "the set is sent again");
    assert_eq!(world.phase("a"), Phase::Ready);
}

#[test]
fn an_agent_that_changes_its_record_all_the_time_is_refused_for_a_while() {
    let mut world = World::new();
    let (mut now, mut admitted) = (world.now, 0);
    for _ in 0..1_000 {
        admitted += u32::from(world.fleet.admit_change("a", now).is_ok());
    }
    assert_eq!(admitted, 10);
    TestAgent::new("a").connect(&mut world);
    world.fleet.admit_change("a", now).expect_err("another session lifts nothing");
    world.fleet.admit_change("b", now).expect("others are not concerned");
    now += Duration::from_secs(6);
    world.fleet.admit_change("a", now).expect("one more after the interval");
    world.fleet.admit_change("a", now).expect_err("but only one");
}

#[test]
fn malformed_messages_end_the_session_with_the_field() {
    for (message, field) in [
        (connect_request::Message::Hello(Hello::default()), "hello"),
        (connect_request::Message::Ack(Ack::default()), "ack.type"),
        (
            connect_request::Message::Ack(Ack { r#type: SET_TYPE.into(), ..Ack::default() }),
            "ack.applied",
        ),
    ] {
        let mut world = World::new();
        let mut agent = TestAgent::new("a");
        agent.connect(&mut world);
        agent.say(&mut world, message);
        let down = agent.down.as_mut().unwrap();
        let status = std::iter::from_fn(|| down.try_recv().ok()).find_map(Result::err).unwrap();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(status.message().starts_with(field), "{}", status.message());
    }
}

#[derive(Clone, Debug)]
enum Step {
    Apply(usize, usize, u32),
    Delete(usize),
    Label(usize, usize),
    Network(usize, usize, u32),
    DeleteNetwork(usize),
    Balancer(usize, usize),
    DeleteBalancer,
    Drain(usize, bool),
    Announce(usize, u8),
    Connect(usize),
    Forget(usize),
    Answer(usize),
    Heartbeat(usize),
    Reject(usize, usize),
    Accept(usize),
    Restart,
}

const POLICIES: [&str; 4] = ["p", "q", "r", "s"];
const NETWORKS: [&str; 2] = ["m", "n"];
const LABELS: [&str; 4] = ["", "x=1", "x=2", "x=1,y=1"];

fn step() -> impl Strategy<Value = Step> {
    let node = 0..NODES.len();
    prop_oneof![
        4 => (0..POLICIES.len(), 0..LABELS.len(), 0..5_u32).prop_map(|(p, l, n)| Step::Apply(p, l, n)),
        1 => (0..POLICIES.len()).prop_map(Step::Delete),
        2 => (node.clone(), 0..LABELS.len()).prop_map(|(n, l)| Step::Label(n, l)),
        2 => (0..NETWORKS.len(), 0..LABELS.len(), 1..3_u32).prop_map(|(n, l, p)| Step::Network(n, l, p)),
        1 => (0..NETWORKS.len()).prop_map(Step::DeleteNetwork),
        2 => (0..NETWORKS.len(), 0..LABELS.len()).prop_map(|(n, l)| Step::Balancer(n, l)),
        1 => Just(Step::DeleteBalancer),
        1 => (node.clone(), any::<bool>()).prop_map(|(n, drain)| Step::Drain(n, drain)),
        1 => (node.clone(), 1..5_u8).prop_map(|(n, key)| Step::Announce(n, key)),
        2 => node.clone().prop_map(Step::Connect),
        1 => node.clone().prop_map(Step::Forget),
        6 => node.clone().prop_map(Step::Answer),
        1 => node.clone().prop_map(Step::Heartbeat),
        1 => (node.clone(), 0..POLICIES.len()).prop_map(|(n, p)| Step::Reject(n, p)),
        1 => node.prop_map(Step::Accept),
        1 => Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever happens in between, agents that answer end with exactly the set that selects them.
    #[test]
    fn all_agents_converge(steps in prop::collection::vec(step(), 0..80)) {
        let mut world = World::new();
        let mut agents = NODES.map(TestAgent::new);
        for step in steps {
            match step {
                Step::Apply(p, l, n) => world.apply(POLICIES[p], LABELS[l], n),
                Step::Delete(p) => world.delete(Kind::FirewallPolicy, POLICIES[p]),
                Step::Label(n, l) => world.label(NODES[n], LABELS[l]),
                Step::Network(n, l, port) => {
                    // Small enough to be full.
                    let prefix = format!("10.{n}.0.0/30");
                    world.apply_all([network(NETWORKS[n], &prefix, LABELS[l], port)]);
                }
                Step::DeleteNetwork(n) => world.delete(Kind::Network, NETWORKS[n]),
                Step::Balancer(n, l) => world.apply_all([balancer("lb", NETWORKS[n], LABELS[l])]),
                Step::DeleteBalancer => world.delete(Kind::LoadBalancer, "lb"),
                Step::Drain(n, draining) => world.drain(NODES[n], draining),
                Step::Announce(n, key) => world.announce(NODES[n], key),
                Step::Connect(n) => agents[n].connect(&mut world),
                Step::Forget(n) => {
                    agents[n].set.clear();
                    agents[n].was_sent.clear();
                    agents[n].revision = 0;
                    agents[n].connect(&mut world);
                }
                Step::Answer(n) => {
                    agents[n].answer(&mut world);
                }
                Step::Heartbeat(n) => agents[n].heartbeat(&mut world),
                Step::Reject(n, p) => {
                    agents[n].rejects.insert(format!("{POLICY}{}", POLICIES[p]));
                }
                Step::Accept(n) => agents[n].rejects.clear(),
                Step::Restart => {
                    world.fleet = Fleet::new(&world.state, Timing::default(), world.now);
                    for agent in &mut agents {
                        agent.down = None;
                        agent.unanswered.clear();
                    }
                }
            }
        }
        // What came of it step by step is what comes of it at once.
        let fresh = Fleet::new(&world.state, Timing::default(), world.now);
        for name in POLICIES {
            let key = format!("{POLICY}{name}");
            prop_assert_eq!(world.fleet.spec(&key), fresh.spec(&key));
            for node in NODES {
                prop_assert_eq!(world.fleet.agents[node].wants(&key), fresh.agents[node].wants(&key));
            }
        }
        for agent in &mut agents {
            // A new version of each policy is sent even where the last one was rejected.
            agent.rejects.clear();
            agent.connect(&mut world);
        }
        for name in POLICIES {
            world.apply(name, "", 100 + u32::try_from(world.state.revision()).unwrap());
        }
        for agent in &mut agents {
            for _ in 0..10 {
                agent.answer(&mut world);
            }
            let names: BTreeSet<_> = agent.set.keys().cloned().collect();
            prop_assert_eq!(names, world.desired(agent.name));
            prop_assert_eq!(world.phase(agent.name), Phase::Ready);
            prop_assert_eq!(world.applied(agent.name), world.state.revision());
        }
        // A core that starts anew means the same, versions included: nothing is sent again.
        world.fleet = Fleet::new(&world.state, Timing::default(), world.now);
        for agent in &mut agents {
            agent.connect(&mut world);
            prop_assert!(!agent.answer(&mut world));
            prop_assert_eq!(world.phase(agent.name), Phase::Ready);
        }
    }

    /// Within one session, and as long as the policy selects the node, a version that was rejected is sent once.
    #[test]
    fn a_rejected_version_is_not_sent_again(steps in prop::collection::vec(step(), 0..80)) {
        let mut world = World::new();
        let mut agent = TestAgent::new("a");
        agent.rejects.insert(format!("{POLICY}p"));
        agent.connect(&mut world);
        for step in steps {
            match step {
                Step::Apply(p, l, n) => world.apply(POLICIES[p], LABELS[l], n),
                Step::Heartbeat(_) => agent.heartbeat(&mut world),
                _ => {
                    agent.answer(&mut world);
                }
            }
        }
        while agent.answer(&mut world) {}
        let again = agent.sent.iter().filter(|((name, _), times)| name == "firewall-policy/p" && **times > 1);
        prop_assert_eq!(again.count(), 0);
    }
}

/// As it comes out of the network.
fn as_received(down: Down) -> Option<Update> {
    let mut wire = Vec::new();
    down.encode(&mut wire);
    match ConnectResponse::decode(&wire[..]).unwrap().message {
        Some(connect_response::Message::Update(update)) => Some(update),
        _ => None,
    }
}
