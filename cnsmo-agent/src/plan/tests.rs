use cnsmo_proto::{
    digest::Digest,
    pb::{
        agent::{Resource, Update, resource::Spec, update::Kind},
        balancer as balancer_pb, network as network_pb, policy as policy_pb,
    },
};

use super::*;
use crate::{desired::RESOURCE_TYPE, health::Verdict};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn set(resources: Vec<Resource>) -> DesiredSet {
    let mut digest = Digest::default();
    resources.iter().for_each(|r| digest.add(&r.name, r.version));
    let update = Update {
        r#type: RESOURCE_TYPE.into(),
        kind: Kind::Snapshot.into(),
        revision: 1,
        upserts: resources,
        digest: digest.to_vec(),
        ..Update::default()
    };
    let set = DesiredSet::default().stage(1, update).unwrap().into_set();
    assert_eq!(set.errors(&BTreeMap::new()), []);
    set
}

fn resource(name: String, spec: Spec) -> Resource {
    Resource { name, version: 1, spec: Some(spec) }
}

fn network(name: &str) -> Resource {
    let spec = network_pb::NetworkSpec {
        ipv4_prefix: "10.70.0.0/24".into(),
        ipv6_prefix: "fd70::/64".into(),
        listen_port: 4_000,
        mtu: 1_380,
        ..Default::default()
    };
    resource(format!("network/{name}"), Spec::Network(spec))
}

fn member(network: &str, node: &str, last: u8, key: &[u8]) -> Resource {
    let spec = network_pb::Member {
        network: network.into(),
        node: node.into(),
        ipv4: format!("10.70.0.{last}"),
        ipv6: format!("fd70::{last}"),
        public_key: key.to_vec(),
        endpoints: vec![format!("192.0.2.{last}:4000")],
        labels: [("role".to_owned(), node.split('-').next().unwrap().to_owned())].into(),
    };
    resource(format!("member/{network}/{node}"), Spec::Member(spec))
}

fn balancer(name: &str, change: impl FnOnce(&mut balancer_pb::LoadBalancerSpec)) -> Resource {
    let mut spec = balancer_pb::LoadBalancerSpec {
        network: "shop".into(),
        addresses: vec!["10.70.0.80".into()],
        ports: vec![balancer_pb::ServicePort { protocol: 6, port: 80, target_port: 8_080 }],
        ..Default::default()
    };
    change(&mut spec);
    resource(format!("load-balancer/{name}"), Spec::LoadBalancer(spec))
}

fn backend(balancer: &str, node: &str, last: u8, draining: bool) -> Resource {
    let spec = balancer_pb::Backend {
        load_balancer: balancer.into(),
        node: node.into(),
        ipv4: format!("10.70.0.{last}"),
        ipv6: format!("fd70::{last}"),
        draining,
        ..Default::default()
    };
    resource(format!("backend/{balancer}/{node}"), Spec::Backend(spec))
}

/// On `web-1`.
fn instance(name: &str, port: u32, draining: bool) -> Resource {
    let of_vm = backend("front", "web-1", 11, draining);
    let Some(Spec::Backend(spec)) = of_vm.spec else { panic!() };
    let message = "the instance is degraded".into();
    let spec = balancer_pb::Backend { instance: name.into(), port, message, ..spec };
    resource(format!("backend/front/web-1/{name}"), Spec::Backend(spec))
}

fn plan_of(set: &DesiredSet, node: &str, health: &View) -> Plan {
    Plan::new(set, Some(&name(node)), &Always::default(), health)
}

fn checked(spec: &mut balancer_pb::LoadBalancerSpec) {
    spec.health = Some(balancer_pb::HealthCheck::default());
}

fn shop() -> Vec<Resource> {
    vec![
        network("shop"),
        member("shop", "gw-1", 5, &[5; 32]),
        member("shop", "web-1", 11, &[11; 32]),
        member("shop", "web-2", 12, &[]),
        backend("front", "web-1", 11, false),
        backend("front", "web-2", 12, false),
    ]
}

fn rules(plan: &Plan) -> Vec<String> {
    let ports =
        |ranges: &[PortRange]| ranges.iter().map(|r| r.first().to_string()).collect::<String>();
    let shown = |owned: &crate::effective::OwnedRule| {
        assert_eq!((owned.policy.as_ref(), owned.rule.action), (None, Action::Allow));
        let Protocol::Ports { number, source, destination } = &owned.rule.protocol else {
            panic!("not by ports")
        };
        let to: Vec<_> = owned.rule.to.iter().map(|net| net.addr().to_string()).collect();
        let (from, port) = (ports(source), ports(destination));
        let Rule { name, direction, .. } = &owned.rule;
        format!("{name} {direction} {number} {from}>{} {port}", to.join(","))
    };
    plan.effective.rules.iter().map(shown).collect()
}

#[test]
fn a_vm_that_is_in_no_network_has_no_tunnel_and_says_what_it_cannot_follow() {
    let set = set([shop(), vec![balancer("front", |_| ())]].concat());
    for node in [None, Some(name("db-1"))] {
        let plan = Plan::new(&set, node.as_ref(), &Always::default(), &View::new());
        assert_eq!((&plan.tunnel, plan.effective.balancers.len()), (&None, 0));
        assert_eq!(rules(&plan), [""; 0]);
        let blocked: Vec<_> = plan.blocked.keys().map(ToString::to_string).collect();
        assert_eq!(blocked, ["network/shop", "load-balancer/front"]);
    }
}

#[test]
fn the_tunnel_has_the_addresses_of_the_own_record_and_the_others_as_peers() {
    // A second record with the own key cannot be a peer.
    let set = set([shop(), vec![member("shop", "web-3", 13, &[5; 32])]].concat());
    let plan = plan_of(&set, "gw-1", &View::new());
    assert_eq!(plan.blocked, BTreeMap::new());
    let tunnel = plan.tunnel.unwrap();
    assert_eq!(
        (tunnel.network, tunnel.listen_port, tunnel.mtu),
        (name("shop"), 4_000, Some(1_380))
    );
    assert_eq!(tunnel.addresses.v4, Some([10, 70, 0, 5].into()));
    let prefixes: Vec<_> = tunnel.prefixes.iter().map(ToString::to_string).collect();
    assert_eq!(prefixes, ["10.70.0.0/24", "fd70::/64"]);
    let peers: Vec<_> = tunnel.peers.values().map(|p| (p.node.as_str(), p.addresses.v4)).collect();
    assert_eq!(peers, [("web-1", Some([10, 70, 0, 11].into()))], "web-2 has no key yet");
    let other = member("aaa", "gw-1", 5, &[5; 32]);
    let both = set_with(other);
    let plan = plan_of(&both, "gw-1", &View::new());
    assert_eq!(plan.tunnel.unwrap().network, name("aaa"), "in one network, the first by name");
    assert!(plan.blocked.contains_key(&Key::Network(name("shop"))));
}

fn set_with(other: Resource) -> DesiredSet {
    set([shop(), vec![network("aaa"), other]].concat())
}

#[test]
fn a_gateway_is_told_by_the_labels_of_its_own_record() {
    let gateways = |spec: &mut balancer_pb::LoadBalancerSpec| {
        let labels = [("role".to_owned(), "gw".to_owned())].into();
        spec.gateways = Some(balancer_pb::Selector { labels });
    };
    let set = set([shop(), vec![balancer("front", gateways), balancer("plain", |_| ())]].concat());
    let gateway = |node| {
        let balancers = plan_of(&set, node, &View::new()).effective.balancers;
        balancers.iter().map(|b| (b.name.to_string(), b.gateway)).collect::<Vec<_>>()
    };
    assert_eq!(gateway("gw-1"), [("front".into(), true), ("plain".into(), false)]);
    assert_eq!(gateway("web-1"), [("front".into(), false), ("plain".into(), false)]);
}

#[test]
fn no_vm_is_its_own_backend_and_a_draining_one_is_none() {
    let mut resources = shop();
    resources.extend([balancer("front", |_| ()), backend("front", "web-3", 13, true)]);
    let set = set(resources);
    for (node, targets) in [("gw-1", &["web-1", "web-2"][..]), ("web-1", &["web-2"])] {
        let balancers = plan_of(&set, node, &View::new()).effective.balancers;
        let nodes: Vec<_> = balancers[0].backends.iter().map(|b| b.node.as_str()).collect();
        assert_eq!(nodes, targets);
        assert_eq!(balancers, super::balancers(&set, Some(&name(node)), &View::new()));
        let states = &backends(&set, Some(&name(node)), &View::new())[&name("front")];
        assert_eq!(states.len(), targets.len() + 1);
        assert_eq!(states.last().unwrap().idle, Some(Idle::Draining));
    }
}

#[test]
fn new_flows_go_to_the_healthy_else_to_the_unknown_and_never_to_the_failing() {
    let mut resources = shop();
    resources.extend([balancer("front", checked), backend("front", "web-3", 13, true)]);
    let set = set(resources);
    let (yes, no) = (Some(true), Some(false));
    for (verdicts, active) in [
        ([None, None], &["web-1", "web-2"][..]),
        ([yes, None], &["web-1"]),
        ([no, None], &["web-2"]),
        ([no, yes], &["web-2"]),
        ([yes, yes], &["web-1", "web-2"]),
        ([no, no], &[]),
    ] {
        let verdict = |(node, healthy): (&str, Option<bool>)| {
            let subject = Subject { balancer: name("front"), node: name(node), instance: None };
            let message = "refused".to_owned();
            Some((subject, Verdict { healthy: healthy?, message }))
        };
        // What was known of a VM that drains now counts for nothing.
        let nodes = [("web-1", verdicts[0]), ("web-2", verdicts[1]), ("web-3", yes)];
        let health: View = nodes.into_iter().filter_map(verdict).collect();
        let balancers = plan_of(&set, "gw-1", &health).effective.balancers;
        let found: Vec<_> = balancers[0].backends.iter().map(|b| b.node.as_str()).collect();
        assert_eq!(found, active, "{verdicts:?}");
        for state in &backends(&set, Some(&name("gw-1")), &health)[&name("front")][..2] {
            let node = state.target.node.as_str();
            assert_eq!(state.idle.is_none(), active.contains(&node), "{node}: {verdicts:?}");
        }
    }
}

#[test]
fn checks_go_to_the_families_of_the_virtual_addresses() {
    let v4 = |spec: &mut balancer_pb::LoadBalancerSpec| checked(spec);
    let both = |spec: &mut balancer_pb::LoadBalancerSpec| {
        checked(spec);
        spec.addresses.push("fd70::80".into());
    };
    for (change, addresses) in [
        (&v4 as &dyn Fn(&mut _), &["10.70.0.12:8080"][..]),
        (&both, &["10.70.0.12:8080", "[fd70::12]:8080"]),
    ] {
        let mut resources = shop();
        resources.extend([balancer("front", change), backend("front", "web-3", 13, true)]);
        let plan = plan_of(&set(resources), "web-1", &View::new());
        let [(subject, check)] = &plan.checks.iter().collect::<Vec<_>>()[..] else {
            panic!("neither this VM nor a draining one is checked: {:?}", plan.checks)
        };
        assert_eq!(subject.node, name("web-2"));
        let found: Vec<_> = check.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(found, addresses);
    }
}

#[test]
fn instances_on_one_vm_are_backends_each_at_its_own_port() {
    let of_service = |spec: &mut balancer_pb::LoadBalancerSpec| {
        checked(spec);
        (spec.service, spec.ports[0].target_port) = ("web".into(), 0);
    };
    let mut resources = shop();
    resources.retain(|one| !one.name.starts_with("backend/"));
    resources.push(balancer("front", of_service));
    resources.extend([instance("a", 20_001, false), instance("b", 20_002, false)]);
    resources.push(instance("c", 20_003, true));
    let set = set(resources);
    let health = |healthy: bool, instance: &str| {
        let (node, instance) = (name("web-1"), Some(name(instance)));
        let verdict = Verdict { healthy, message: "refused".into() };
        (Subject { balancer: name("front"), node, instance }, verdict)
    };
    let health = View::from([health(true, "a"), health(false, "b")]);
    let plan = plan_of(&set, "gw-1", &health);
    let active = &plan.effective.balancers[0].backends;
    let shown: Vec<_> = active.iter().map(|one| (one.ring_name(), one.port)).collect();
    assert_eq!(shown, [("a", 20_001)]);
    let checks: Vec<_> = plan.checks.values().map(|check| check.addresses[0].port()).collect();
    assert_eq!(checks, [20_001, 20_002]);
    let health_rules = rules(&plan).into_iter().filter(|rule| rule.starts_with("health"));
    let expected = [1, 2, 3].map(|n| format!("health egress 6 >10.70.0.11 {}", 20_000 + n));
    assert!(health_rules.eq(expected));
    let states = &backends(&set, Some(&name("gw-1")), &health)[&name("front")];
    let shown: Vec<_> = states.iter().map(|state| (state.idle, &*state.message)).collect();
    let out = (Some(Idle::Draining), "the instance is degraded");
    assert_eq!(shown, [(None, "refused"), (Some(Idle::Unhealthy), "refused"), out]);
    assert!(plan_of(&set, "web-1", &health).effective.balancers[0].backends.is_empty());
}

#[test]
fn built_in_rules_let_core_tunnel_and_health_checks_through_and_nothing_else() {
    let set = set([shop(), vec![balancer("front", checked), balancer("plain", |_| ())]].concat());
    let core = ["192.0.2.9:7400".parse().unwrap()];
    let always = Always { core: &core, ports: vec![22] };
    let plan = Plan::new(&set, Some(&name("gw-1")), &always, &View::new());
    assert_eq!(
        rules(&plan),
        [
            "core egress 6 >192.0.2.9 7400",
            "failsafe ingress 6 > 22",
            "tunnel ingress 17 > 4000",
            "tunnel egress 17 4000> ",
            "health egress 6 >10.70.0.11,10.70.0.12 8080",
        ]
    );
    assert!(plan.effective.open, "built-in rules select no VM");
}

#[test]
fn a_failsafe_port_is_left_to_the_rules_that_name_it() {
    use policy_pb::Direction::{Egress, Ingress};
    let always = Always { core: &[], ports: vec![22] };
    for (protocol, ports, direction, stays_open) in [
        (6, Some((22, 22)), Ingress, false),
        (6, Some((20, 30)), Ingress, false),
        (6, Some((1, 65_535)), Ingress, true),
        (6, Some((23, 24)), Ingress, true),
        (6, None, Ingress, true),
        (17, Some((22, 22)), Ingress, true),
        (6, Some((22, 22)), Egress, true),
    ] {
        let ranges = ports.map(|(first, last)| policy_pb::PortRange { first, last });
        let rule = policy_pb::FirewallRule {
            name: "r".into(),
            action: policy_pb::Action::Deny.into(),
            direction: direction.into(),
            protocol: Some(protocol),
            ports: ranges.into_iter().collect(),
            ..Default::default()
        };
        let spec = policy_pb::FirewallPolicySpec { rules: vec![rule], ..Default::default() };
        let set = set(vec![resource("firewall-policy/p".into(), Spec::FirewallPolicy(spec))]);
        let plan = Plan::new(&set, None, &always, &View::new());
        let first = &plan.effective.rules[0].rule;
        let is_open = first.name.as_str() == FAILSAFE_RULE && first.action == Action::Allow;
        assert_eq!(is_open, stays_open, "{protocol} {ports:?} {direction:?}");
    }
}

#[test]
fn a_rule_about_nobody_matches_nothing_and_still_names_its_port() {
    let rule = |name: &str, from| policy_pb::FirewallRule {
        name: name.into(),
        action: policy_pb::Action::Allow.into(),
        direction: policy_pb::Direction::Ingress.into(),
        from,
        protocol: Some(6),
        ports: vec![policy_pb::PortRange { first: 22, last: 22 }],
        ..Default::default()
    };
    let plan = |from| {
        let rules = vec![rule("ssh", from)];
        let spec = policy_pb::FirewallPolicySpec { rules, ..Default::default() };
        let set = set(vec![resource("firewall-policy/p".into(), Spec::FirewallPolicy(spec))]);
        Plan::new(&set, None, &Always { core: &[], ports: vec![22] }, &View::new())
    };
    let names = |plan: &Plan| {
        let names = plan.effective.rules.iter().map(|owned| owned.rule.name.to_string());
        names.collect::<Vec<_>>()
    };
    assert_eq!(names(&plan(None)), ["ssh"]);
    let nobody = plan(Some(policy_pb::Peer::default()));
    assert_eq!(names(&nobody), [""; 0], "neither for everybody nor left to the failsafe rule");
    assert!(!nobody.effective.open, "its defaults are in force");
}
