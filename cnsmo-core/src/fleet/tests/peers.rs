//! Rules about VMs by labels or service.

use std::net::Ipv4Addr;

use cnsmo_proto::{
    model::{PEERS_MAX, RESOLVED_MAX},
    pb::policy::{Action, Direction, FirewallRule, Peer, ResolvedPeer},
};

use super::*;

/// A rule that lets VMs with these labels in.
pub(super) fn about(name: &str, labels: &str) -> FirewallRule {
    let labels = labels.parse::<Labels>().unwrap().as_map().clone();
    allow(name, Peer { labels, ..Peer::default() })
}

fn of_service(name: &str, service: &str) -> FirewallRule {
    allow(name, Peer { service: service.into(), ..Peer::default() })
}

fn allow(name: &str, from: Peer) -> FirewallRule {
    FirewallRule {
        name: name.into(),
        action: Action::Allow.into(),
        direction: Direction::Ingress.into(),
        from: Some(from),
        ..FirewallRule::default()
    }
}

fn policy(name: &str, target: &str, rules: Vec<FirewallRule>) -> api::resource::Resource {
    let target = target.parse::<Labels>().unwrap().as_map().clone();
    let spec = FirewallPolicySpec { target, rules, ..FirewallPolicySpec::default() };
    let metadata = Some(Metadata { name: name.into(), ..Metadata::default() });
    let policy = FirewallPolicy { metadata, spec: Some(spec), status: None };
    api::resource::Resource::FirewallPolicy(policy)
}

/// What each rule of a policy lets in.
fn sent(world: &World, policy: &str) -> Vec<String> {
    let Some(Spec::Policy(spec)) = world.fleet.spec(&format!("{POLICY}{policy}")) else { panic!() };
    let text = |rule: &FirewallRule| {
        let from = match &rule.from {
            Some(peer) if *peer == Peer::default() => "nobody".to_owned(),
            Some(peer) => format!("{peer:?}"),
            None => rule.from_cidrs.join(" "),
        };
        format!("{}: {from}", rule.name)
    };
    spec.rules.iter().map(text).collect()
}

fn shown(world: &mut World, policy: &str) -> pb::policy::FirewallPolicyStatus {
    let one = world.fleet.resource(Kind::FirewallPolicy, policy, &world.state).unwrap();
    let Some(api::resource::Resource::FirewallPolicy(one)) = one.resource else { panic!() };
    one.status.unwrap()
}

/// Names of what comes with the next update.
fn next(agent: &mut TestAgent, world: &mut World) -> Vec<String> {
    agent.receive();
    let update = agent.unanswered.front().cloned().unwrap_or_default();
    agent.answer(world);
    update.upserts.into_iter().map(|resource| resource.name).collect()
}

#[test]
fn rules_about_labels_are_right_after_each_commit_and_sent_when_they_change() {
    let mut world = World::new();
    world.apply_all([network("m", "10.1.0.0/24", "in=m", 0)]);
    for (node, labels) in [("a", "in=m,role=lb"), ("b", "role=web"), ("c", "in=m")] {
        world.label(node, labels);
    }
    // It announces 10.1.0.77 too, which is of the network: another VM's to have.
    world.announce("a", 1);
    let of = |protocol| FirewallRule { protocol: Some(protocol), ..about("", "role=lb") };
    let named = |name: &str, rule: FirewallRule| FirewallRule { name: name.into(), ..rule };
    let fixed = FirewallRule { from: None, from_cidrs: vec!["198.51.100.0/24".into()], ..of(6) };
    let to_v6 = FirewallRule { to_cidrs: vec!["fd00::/8".into()], ..of(6) };
    let egress = FirewallRule { direction: Direction::Egress.into(), from: None, ..of(6) };
    let egress = FirewallRule { to: of(6).from, ..egress };
    let rules = vec![
        about("lb", "role=lb"),
        named("fixed", fixed),
        named("ping4", of(1)),
        named("ping6", of(58)),
        named("to-v6", to_v6),
        named("out", egress),
        about("lb-of-c", "role=lb,n=c"),
    ];
    world.apply_all([policy("web", "role=web", rules)]);
    let mut agent = TestAgent::new("b");
    agent.connect(&mut world);
    while agent.answer(&mut world) {}
    let all = |lb: &str| {
        let text = |(name, from)| format!("{name}: {from}");
        let rules = [("lb", lb), ("fixed", "198.51.100.0/24"), ("ping4", lb)];
        let nobody = [("ping6", "nobody"), ("to-v6", "nobody"), ("out", ""), ("lb-of-c", "nobody")];
        rules.into_iter().chain(nobody).map(text).collect::<Vec<_>>()
    };
    assert_eq!(sent(&world, "web"), all("10.1.0.1/32 192.0.2.1/32"));
    let Some(Spec::Policy(spec)) = world.fleet.spec("firewall-policy/web") else { panic!() };
    assert_eq!(spec.rules[5].to_cidrs, ["10.1.0.1/32", "192.0.2.1/32"]);
    let counts = |status: pb::policy::FirewallPolicyStatus| {
        let of = |one: ResolvedPeer| (one.rule, one.nodes, one.cidrs);
        status.peers.into_iter().map(of).collect::<Vec<_>>()
    };
    let peers = counts(shown(&mut world, "web"));
    let peer = |rule: &str, nodes, cidrs| (rule.to_owned(), nodes, cidrs);
    assert_eq!(peers[..2], [peer("lb", 1, 2), peer("ping4", 1, 2)]);
    assert_eq!(peers[5], peer("lb-of-c", 0, 0));

    // Neighbours are one prefix.
    world.label("c", "in=m,role=lb");
    assert_eq!(sent(&world, "web"), all("10.1.0.1/32 10.1.0.2/32 192.0.2.1/32"));
    assert!(world.applied("b") < world.state.revision(), "it waits for the acknowledgement");
    assert_eq!(next(&mut agent, &mut world), ["firewall-policy/web"]);
    assert_eq!(world.applied("b"), world.state.revision());
    world.announce("c", 0x82);
    world.announce("a", 0x83);
    assert_eq!(sent(&world, "web"), all("10.1.0.1/32 10.1.0.2/32 192.0.2.130/31"));
    while agent.answer(&mut world) {}

    // What changes nothing sends nothing, and a core that starts again means the same.
    world.drain("c", true);
    world.announce("b", 9);
    world.label("b", "role=web,more=1");
    world.apply_all([network("other", "10.2.0.0/24", "in=nowhere", 0)]);
    assert_eq!(next(&mut agent, &mut world), [""; 0]);
    world.fleet = Fleet::new(&world.state, Timing::default(), world.now);
    agent.connect(&mut world);
    assert_eq!(next(&mut agent, &mut world), [""; 0]);
    assert_eq!(world.phase("b"), Phase::Ready);

    // An announced address becomes one of a network.
    world.apply_all([network("third", "192.0.2.128/25", "in=nowhere", 0)]);
    assert_eq!(sent(&world, "web"), all("10.1.0.1/32 10.1.0.2/32"));
    world.delete(Kind::Network, "third");
    world.label("c", "in=m");
    assert_eq!(sent(&world, "web"), all("10.1.0.1/32 192.0.2.131/32"));
    world.delete(Kind::Node, "a");
    assert_eq!(sent(&world, "web"), all("nobody"));
    assert_eq!(next(&mut agent, &mut world), ["firewall-policy/web"]);
    while agent.answer(&mut world) {}

    // Without peers it has the version of the resource again; without it nothing is left.
    world.apply_all([policy("web", "role=web", vec![])]);
    agent.answer(&mut world);
    assert_eq!(agent.set["firewall-policy/web"], world.state.revision());
    world.apply_all([policy("web", "role=web", vec![about("lb", "role=lb")])]);
    world.delete(Kind::FirewallPolicy, "web");
    while agent.answer(&mut world) {}
    assert_eq!(world.fleet.resolved.len() + agent.set.len(), 0);
}

#[test]
fn rules_about_a_service_wait_for_the_first_look_at_it_and_then_follow_it() {
    use InstancePhase::{Degraded, Draining, Failed, Installing, Lost, Ready};
    use InstancePhase::{Starting, Stopped, Unreachable};
    let mut world = World::new();
    // Of which 10.1.0.77 is an address: no VM's word for it counts.
    world.apply_all([network("m", "10.1.0.0/24", "in=nowhere", 0)]);
    for (n, node) in (1..).zip(NODES) {
        world.announce(node, n);
    }
    let of = |service| policy("p", "n=b", vec![of_service("peers", service)]);
    let mut b = TestAgent::new("b");
    let mut c = TestAgent::new("c");
    for (agent, labels) in [(&mut b, "n=b"), (&mut c, "n=c")] {
        // The first stream of an agent states labels of its own.
        agent.connect(&mut world);
        world.label(agent.name, labels);
    }
    let look = |world: &mut World, services: &[&str], all: &[(&str, &str, InstancePhase)]| {
        let all = all.iter().map(|(name, node, phase)| instance(name, node, *phase));
        let services = services.iter().map(ToString::to_string);
        world.fleet.observe(Observed::new(all).looked_at(services), &world.state);
        world.fleet.flush(&world.state);
    };
    let before = world.state.revision();
    world.apply_all([of("web"), policy("other", "n=c", vec![])]);
    assert_eq!(world.state.observed_services(), ["web".to_owned()].into());
    assert!(next(&mut b, &mut world).is_empty(), "nobody has looked at the service");
    assert_eq!(next(&mut c, &mut world), ["firewall-policy/other"], "it has no such rule");
    look(&mut world, &["db"], &[]);
    assert!(next(&mut b, &mut world).is_empty(), "what was seen is older than the rule");
    assert_eq!(world.applied("b"), before);
    look(&mut world, &["web"], &[("w1", "a", Ready)]);
    assert_eq!(next(&mut b, &mut world), ["firewall-policy/p"]);
    assert_eq!(world.applied("b"), world.state.revision());
    assert_eq!(sent(&world, "p"), ["peers: 192.0.2.1/32"]);

    for (phase, is_there) in [
        (Starting, true),
        (Failed, false),
        (Degraded, true),
        (Stopped, false),
        (Unreachable, true),
        (Lost, false),
        (Draining, true),
        (Installing, false),
        (Ready, true),
    ] {
        look(&mut world, &["web"], &[("w1", "a", phase), ("w2", "c", Ready), ("w3", "x", Ready)]);
        let there = if is_there { "192.0.2.1/32 192.0.2.3/32" } else { "192.0.2.3/32" };
        assert_eq!(sent(&world, "p"), [format!("peers: {there}")], "{phase:?}");
        assert_eq!(next(&mut b, &mut world), ["firewall-policy/p"]);
    }
    // The same by other instances.
    look(&mut world, &["web"], &[("w4", "a", Draining), ("w5", "c", Ready), ("w6", "c", Starting)]);
    assert!(next(&mut b, &mut world).is_empty());
    look(&mut world, &["web"], &[("w5", "c", Ready), ("w6", "c", Starting)]);
    while b.answer(&mut world) {}
    world.announce("c", 0x33);
    assert_eq!(sent(&world, "p"), ["peers: 192.0.2.51/32"]);
    world.delete(Kind::Node, "c");
    assert_eq!(sent(&world, "p"), ["peers: nobody"]);
    while b.answer(&mut world) {}

    // Nobody is cut off before it is known who has the other service.
    let before = world.state.revision();
    world.apply_all([of("db")]);
    assert!(next(&mut b, &mut world).is_empty());
    assert_eq!(world.applied("b"), before);
    look(&mut world, &["web", "db"], &[]);
    assert_eq!(world.applied("b"), world.state.revision(), "it stands for as much as before");
    // Nor does a core that starts again send less than it knew.
    look(&mut world, &["db"], &[]);
    world.fleet = Fleet::new(&world.state, Timing::default(), world.now);
    b.connect(&mut world);
    assert!(next(&mut b, &mut world).is_empty());
}

#[test]
fn a_change_without_a_revision_is_confirmed_too() {
    let mut world = World::new();
    world.announce("a", 1);
    let mut agent = TestAgent::new("b");
    agent.connect(&mut world);
    world.label("b", "n=b");
    world.apply_all([policy("p", "n=b", vec![of_service("peers", "web")])]);
    for (round, phase) in [InstancePhase::Ready, InstancePhase::Failed].into_iter().enumerate() {
        world.fleet.observe(Observed::new([instance("w1", "a", phase)]), &world.state);
        world.fleet.flush(&world.state);
        agent.heartbeat(&mut world);
        agent.receive();
        assert_eq!(agent.confirmed, round, "an update is under way");
        assert!(agent.answer(&mut world));
        for _ in 0..2 {
            agent.heartbeat(&mut world);
        }
        agent.receive();
        assert_eq!(agent.confirmed, round + 1);
    }
}

#[test]
fn peers_that_are_too_many_leave_what_is_in_force_and_are_named() {
    let mut world = World::new();
    let token = TokenRecord {
        secret_sha256: [2; 32],
        create_time: wall_clock(),
        expire_time: wall_clock() + LEASE,
        uses_max: 1_000,
        used_by: BTreeSet::new(),
        grant: TokenGrant::default(),
        labels: Labels::default(),
    };
    let plan = world.state.plan_token("many".into(), token, wall_clock()).unwrap();
    world.commit(plan);
    // Every second address: none has a neighbour.
    let addresses = |n: u32| {
        let all = (0..16).map(move |k| Ipv4Addr::from(0x0b00_0000 + 2 * (16 * n + k)).to_string());
        all.collect::<Vec<_>>()
    };
    let join = |world: &mut World, n: u32| {
        let mut spki_sha256 = [3; 32];
        spki_sha256[..4].copy_from_slice(&n.to_be_bytes());
        let name = format!("vm{n}");
        let enrolment = Enrolment {
            token_id: "many".into(),
            secret_sha256: [2; 32],
            name: name.parse().unwrap(),
            labels: "role=many".parse().unwrap(),
            spki_sha256,
        };
        let plan = world.state.plan_enrolment(&enrolment, Issued::sample(), wall_clock()).unwrap();
        world.commit(plan);
        let wire = Announcement { tunnel_public_key: spki_sha256.into(), addresses: addresses(n) };
        let plan = world.state.plan_announcement(&name, wire.try_into().unwrap()).unwrap();
        world.commit(plan);
    };
    let many = PEERS_MAX as u32 / 16;
    let mut agent = TestAgent::new("b");
    agent.connect(&mut world);
    world.label("b", "n=b");
    for n in 0..many {
        join(&mut world, n);
    }
    let times = RESOLVED_MAX / PEERS_MAX;
    let rules = |n| (0..n).map(|n| about(&format!("r{n}"), "role=many")).collect::<Vec<_>>();
    world.apply_all([policy("p", "n=b", rules(times))]);
    while agent.answer(&mut world) {}
    let in_force = agent.set.clone();
    assert_eq!(world.phase("b"), Phase::Ready);
    assert_eq!(shown(&mut world, "p").peers[0].cidrs, PEERS_MAX as u32);

    agent.rejects.insert(format!("{POLICY}p"));
    let why = |world: &mut World| {
        let status = shown(world, "p");
        (status.conditions[0].reason.clone(), status.conditions[0].message.clone())
    };
    join(&mut world, many);
    // As an agent that cannot resolve it does.
    while agent.answer(&mut world) {}
    let (reason, message) = why(&mut world);
    assert_eq!(reason, "TooManyAddresses");
    assert!(message.starts_with("rules[0] (r0): 4112 CIDRs of 257 VMs; a rule takes"), "{message}");
    assert_eq!((&agent.set, world.phase("b")), (&in_force, Phase::Degraded));
    // It is not tried again by what makes no difference.
    let before = agent.sent.clone();
    world.announce("a", 1);
    join(&mut world, many + 1);
    agent.receive();
    assert_eq!((&agent.sent, world.fleet.agents["b"].rejected.len()), (&before, 1));
    // Another core means the same.
    world.fleet = Fleet::new(&world.state, Timing::default(), world.now);
    agent.connect(&mut world);
    while agent.answer(&mut world) {}
    assert_eq!((&agent.set, why(&mut world).0.as_str()), (&in_force, "TooManyAddresses"));

    for n in [many, many + 1] {
        world.delete(Kind::Node, &format!("vm{n}"));
    }
    agent.rejects.clear();
    while agent.answer(&mut world) {}
    assert_eq!((&agent.set, world.phase("b")), (&in_force, Phase::Ready));
    assert_eq!(why(&mut world).0, "Applied");

    world.apply_all([policy("p", "n=b", rules(times + 1))]);
    let (_, message) = why(&mut world);
    assert!(message.contains(&format!("r{times}): 4096 CIDRs of 256 VMs; a policy")), "{message}");
}
