use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path};

use proptest::prelude::*;

use super::*;
use crate::pb::{
    balancer::{
        Algorithm, Backend, BackendStatus, HealthCheck, LoadBalancer, LoadBalancerSpec,
        LoadBalancerStatus, Mode, NodeBalancerStatus, Selector, ServicePort,
    },
    meta::Metadata,
    network::{Member, Network, NetworkSpec, NetworkStatus, Refused, StaticAddresses},
    node::{Node, NodeSpec, NodeStatus, OverlayStatus, PeerStatus},
    policy::{
        Action, Direction, FirewallPolicy, FirewallPolicySpec, FirewallRule, FlowTimeouts,
        IcmpType, Peer, PortRange, RateLimit, ResolvedPeer,
    },
    resource::{Resource, resource::Resource as Kind},
};

fn read(text: &str) -> Result<Parsed, Errors> {
    parse("net.yaml", text, &Original::default())
}

fn policies(text: &str) -> Vec<FirewallPolicySpec> {
    let policy = |resource: Resource| match resource.resource {
        Some(Kind::FirewallPolicy(policy)) => policy.spec,
        _ => None,
    };
    read(text).unwrap().resources.into_iter().filter_map(policy).collect()
}

/// A policy with one good rule, of which `lines` replace or add fields.
fn with_rule(lines: &[&str]) -> String {
    let mut fields = vec!["name: http", "action: allow", "direction: ingress", "protocol: tcp"];
    for line in lines {
        let key = line.split(':').next().unwrap();
        fields.retain(|field| field.split(':').next() != Some(key));
        fields.push(line);
    }
    let mut text = "kind: FirewallPolicy\nmetadata: {name: web}\nspec:\n  rules:\n  -".to_owned();
    for (n, field) in fields.iter().enumerate() {
        writeln!(text, "{} {field}", if n == 0 { "" } else { "   " }).unwrap();
    }
    text
}

fn with_spec(line: &str) -> String {
    format!("kind: FirewallPolicy\nmetadata: {{name: web}}\nspec:\n  {line}\n")
}

#[test]
fn every_field_of_a_policy_arrives() {
    let text = r#"
kind: FirewallPolicy
metadata: {name: web, labels: {team: shop}}
spec:
  target: {role: web}
  priority: 100
  defaults: {ingress: deny, egress: allow}
  rules:
    - name: http
      action: allow
      direction: ingress
      from: [10.1.2.3/8, "fd00::/8"]
      to: any
      protocol: tcp
      ports: [80, 443, "8000-8100", 9000-9001]
      sourcePorts: ["1024-65535"]
    - {name: v4, action: deny, direction: egress, protocol: icmp, icmpTypes: [echo-request, 3, "3/4", redirect/1]}
    - {name: v6, action: deny, direction: egress, protocol: icmpv6, icmpTypes: [echo-request]}
    - {name: gre, action: deny, direction: egress, protocol: 47}
    - {name: rest, action: allow, direction: egress, protocol: any}
    - {name: lb, action: allow, direction: ingress, from: {labels: {role: lb, zone: a}}}
    - {name: db, action: allow, direction: egress, to: {service: db}}
"#;
    let spec = policies(text).remove(0);
    assert_eq!(spec.target, BTreeMap::from([("role".to_owned(), "web".to_owned())]));
    assert_eq!((spec.priority, spec.default_ingress, spec.default_egress), (100, 2, 1));
    let http = &spec.rules[0];
    assert_eq!(http.from_cidrs, ["10.0.0.0/8", "fd00::/8"]);
    assert!(http.to_cidrs.is_empty());
    let ports: Vec<_> = http.ports.iter().map(|r| (r.first, r.last)).collect();
    assert_eq!(ports, [(80, 80), (443, 443), (8000, 8100), (9000, 9001)]);
    assert_eq!(http.source_ports, [PortRange { first: 1024, last: 65_535 }]);
    let types: Vec<_> = spec.rules[1].icmp_types.iter().map(|t| (t.r#type, t.code)).collect();
    assert_eq!(types, [(8, None), (3, None), (3, Some(4)), (5, Some(1))]);
    assert_eq!(spec.rules[2].icmp_types, [IcmpType { r#type: 128, code: None }]);
    let protocols: Vec<_> = spec.rules.iter().map(|rule| rule.protocol).collect();
    assert_eq!(protocols, [Some(6), Some(1), Some(58), Some(47), None, None, None]);
    let [lb, db] = &spec.rules[5..] else { panic!() };
    assert_eq!(side_of(&lb.from_cidrs, lb.from.as_ref()), "role=lb,zone=a");
    assert_eq!(side_of(&db.to_cidrs, db.to.as_ref()), "service db");
    assert_eq!((&lb.to, &db.from), (&None, &None));
}

#[test]
fn what_a_policy_leaves_out_has_the_documented_value() {
    let spec = policies("kind: FirewallPolicy\nmetadata: {name: web}\nspec: {}").remove(0);
    assert_eq!(spec, FirewallPolicySpec { priority: 1000, ..FirewallPolicySpec::default() });
}

#[test]
fn a_bad_field_is_refused_with_its_path() {
    let rule = with_rule;
    let cases: Vec<(String, &str)> = vec![
        ("metadata: {name: web}\nspec: {}".into(), "kind"),
        ("kind: Firewall\nmetadata: {name: web}".into(), "kind"),
        ("kind: Token\nmetadata: {name: web}".into(), "kind"),
        ("kind: 7\nmetadata: {name: web}".into(), "kind"),
        ("kind: Node\nkind: Node\nmetadata: {name: web}".into(), "kind"),
        ("kind: FirewallPolicy\nspec: {}".into(), "metadata"),
        ("kind: FirewallPolicy\nmetadata: {name: web}".into(), "spec"),
        ("kind: FirewallPolicy\nmetadata: {name: web}\nspec:".into(), "spec"),
        ("kind: FirewallPolicy\nmetadata: {name: web}\nspec: []".into(), "spec"),
        ("kind: FirewallPolicy\nmetadata: {name: web}\nspec: {}\nfoo: 1".into(), "foo"),
        ("kind: FirewallPolicy\nmetadata: {}\nspec: {}".into(), "metadata.name"),
        ("kind: FirewallPolicy\nmetadata: {name: Web}\nspec: {}".into(), "metadata.name"),
        ("kind: FirewallPolicy\nmetadata: {name: 1}\nspec: {}".into(), "metadata.name"),
        ("kind: Node\nmetadata: {name: a, labels: {x: 1}}".into(), "metadata.labels.x"),
        ("kind: Node\nmetadata: {name: a, labels: {x: a b}}".into(), "metadata.labels.x"),
        ("kind: Node\nmetadata: {name: a, labels: {x: a, x: b}}".into(), "metadata.labels.x"),
        ("kind: Node\nmetadata: {name: a, labels: [x]}".into(), "metadata.labels"),
        ("kind: Node\nmetadata: {name: a, uuid: x}".into(), "metadata.uuid"),
        ("kind: Node\nmetadata: {name: a}\nspec: {drain: true}".into(), "spec.drain"),
        ("kind: Node\nmetadata: {name: a}\nspec: {draining: 1}".into(), "spec.draining"),
        ("kind: Node\nmetadata: {name: a}\nspec:".into(), "spec"),
        (with_spec("target: web"), "spec.target"),
        (with_spec("target: {role: true}"), "spec.target.role"),
        (with_spec("priority: -1"), "spec.priority"),
        (with_spec("priority: 1000001"), "spec.priority"),
        (with_spec("priority: high"), "spec.priority"),
        (with_spec("defaults: deny"), "spec.defaults"),
        (with_spec("defaults: {ingress: drop}"), "spec.defaults.ingress"),
        (with_spec("defaults: {input: deny}"), "spec.defaults.input"),
        (with_spec("mode: staged"), "spec.mode"),
        (with_spec("rules: {}"), "spec.rules"),
        (with_spec("rules: [http]"), "spec.rules[0]"),
        (rule(&["name: Http"]), "spec.rules[0].name"),
        (rule(&["action: drop"]), "spec.rules[0].action"),
        (rule(&["action:"]), "spec.rules[0].action"),
        (rule(&["direction: in"]), "spec.rules[0].direction"),
        (rule(&["log: 1"]), "spec.rules[0].log"),
        (rule(&["limit: 100/s"]), "spec.rules[0].limit"),
        (rule(&["limit: {burst: 5}"]), "spec.rules[0].limit.rate"),
        (rule(&["limit: {rate: 100}"]), "spec.rules[0].limit.rate"),
        (rule(&["limit: {rate: 0/s}"]), "spec.rules[0].limit.rate"),
        (rule(&["limit: {rate: 5/w}"]), "spec.rules[0].limit.rate"),
        (rule(&["limit: {rate: 5/s, burst: 0}"]), "spec.rules[0].limit.burst"),
        (rule(&["limit: {rate: 5/s, per: host}"]), "spec.rules[0].limit.per"),
        (rule(&["action: deny", "limit: {rate: 5/s}"]), "spec.rules[0].limit"),
        (rule(&["connectionsPerSource: 0"]), "spec.rules[0].connectionsPerSource"),
        (rule(&["action: deny", "connectionsPerSource: 5"]), "spec.rules[0].connectionsPerSource"),
        (rule(&["port: [80]"]), "spec.rules[0].port"),
        (rule(&["from: 10.0.0.0/8"]), "spec.rules[0].from"),
        (rule(&["from: []"]), "spec.rules[0].from"),
        (rule(&["from: {role: web}"]), "spec.rules[0].from.role"),
        (rule(&["from: [{labels: {role: web}}]"]), "spec.rules[0].from[0]"),
        (rule(&["from: {}"]), "spec.rules[0].from"),
        (rule(&["from: {labels: {}}"]), "spec.rules[0].from"),
        (rule(&["from: {label: {role: web}}"]), "spec.rules[0].from.label"),
        (rule(&["from: {labels: {\"a b\": x}}"]), "spec.rules[0].from.labels.a b"),
        (rule(&["from: {service: \"\"}"]), "spec.rules[0].from.service"),
        (rule(&["from: {service: Web}"]), "spec.rules[0].from.service"),
        (rule(&["from: {labels: {role: web}, service: web}"]), "spec.rules[0].from.service"),
        (rule(&["to: {service: web}"]), "spec.rules[0].to"),
        (rule(&["from: [10.0.0.0/33]"]), "spec.rules[0].from[0]"),
        (rule(&["to: [10.0.0.0/8, 10.0.0.1]"]), "spec.rules[0].to[1]"),
        (rule(&["from: [10.0.0.0/8]", "to: [\"fd00::/8\"]"]), "spec.rules[0].to"),
        (rule(&["protocol: http"]), "spec.rules[0].protocol"),
        (rule(&["protocol: icpm", "icmpTypes: [3]"]), "spec.rules[0].protocol"),
        (rule(&["protocol: 256"]), "spec.rules[0].protocol"),
        (rule(&["protocol: any", "ports: [80]"]), "spec.rules[0].ports"),
        (rule(&["protocol: 47", "sourcePorts: [80]"]), "spec.rules[0].sourcePorts"),
        (rule(&["ports: 80"]), "spec.rules[0].ports"),
        (rule(&["ports: []"]), "spec.rules[0].ports"),
        (rule(&["ports: [80, 70000]"]), "spec.rules[0].ports[1]"),
        (rule(&["ports: [-1]"]), "spec.rules[0].ports[0]"),
        (rule(&["ports: [80.5]"]), "spec.rules[0].ports[0]"),
        (rule(&["ports: [\"90-80\"]"]), "spec.rules[0].ports[0]"),
        (rule(&["ports: [\"+80\"]"]), "spec.rules[0].ports[0]"),
        (rule(&["ports: [\"80-\"]"]), "spec.rules[0].ports[0]"),
        (rule(&["sourcePorts: [http]"]), "spec.rules[0].sourcePorts[0]"),
        (rule(&["icmpTypes: [echo-request]"]), "spec.rules[0].icmpTypes"),
        (rule(&["protocol: icmp", "icmpTypes: [packet-too-big]"]), "spec.rules[0].icmpTypes[0]"),
        (rule(&["protocol: icmp", "icmpTypes: [256]"]), "spec.rules[0].icmpTypes[0]"),
        (rule(&["protocol: icmp", "icmpTypes: [\"3/256\"]"]), "spec.rules[0].icmpTypes[0]"),
        (rule(&["protocol: icmp", "from: [\"fd00::/8\"]"]), "spec.rules[0].protocol"),
        (
            "kind: Node\nmetadata: {name: a}\n---\nkind: Node\nmetadata: {name: a}".into(),
            "metadata.name",
        ),
        (String::new(), ""),
        ("just a text".into(), ""),
        ("a: [".into(), ""),
        ("[".repeat(10_000), ""),
        ("kind: !mine Node\nmetadata: {name: a}".into(), ""),
    ];
    for (text, field) in cases {
        refused(&text, field);
    }
}

fn refused(text: &str, field: &str) {
    let errors = read(text).expect_err(text);
    let fields: Vec<_> = errors.iter().map(Invalid::field).collect();
    assert_eq!(fields, [field], "{text}\n{errors}");
}

const NETWORK: &str = r#"kind: Network
metadata: {name: shop}
spec:
  ipv4: 10.70.0.0/16
  ipv6: "fd70::/64"
  members: {team: shop}
  addresses: {gw1: {ipv4: 10.70.0.5, ipv6: "fd70::5"}, db1: 10.70.0.21, web1: "fd70::b"}
  listenPort: 51821
  mtu: 1380
"#;

#[test]
fn every_field_of_a_network_arrives() {
    let Some(Kind::Network(network)) = read(NETWORK).unwrap().resources.remove(0).resource else {
        panic!("not a network");
    };
    let addresses =
        |ipv4: &str, ipv6: &str| StaticAddresses { ipv4: ipv4.to_owned(), ipv6: ipv6.to_owned() };
    let expected = NetworkSpec {
        ipv4_prefix: "10.70.0.0/16".into(),
        ipv6_prefix: "fd70::/64".into(),
        members: [("team".to_owned(), "shop".to_owned())].into(),
        addresses: [
            ("gw1".to_owned(), addresses("10.70.0.5", "fd70::5")),
            ("db1".to_owned(), addresses("10.70.0.21", "")),
            ("web1".to_owned(), addresses("", "fd70::b")),
        ]
        .into(),
        listen_port: 51_821,
        mtu: 1380,
    };
    assert_eq!(network.spec, Some(expected));
}

#[test]
fn a_bad_field_of_a_network_is_refused_with_its_path() {
    let cases = [
        ("ipv4: 10.70.0.0/16", "ipv4: 10.70.0.1/16", "spec.ipv4"),
        ("ipv4: 10.70.0.0/16", "ipv4: 10.70", "spec.ipv4"),
        ("ipv4: 10.70.0.0/16", "ipv4: \"\"", "spec.ipv4"),
        ("ipv4: 10.70.0.0/16", "ipv4Prefix: 10.70.0.0/16", "spec.ipv4Prefix"),
        ("ipv6: \"fd70::/64\"", "ipv6: \"fd70::/127\"", "spec.ipv6"),
        ("{team: shop}", "[web1, web2]", "spec.members"),
        ("{team: shop}", "{team: 1}", "spec.members.team"),
        ("db1: 10.70.0.21", "db1: 10.71.0.21", "spec.addresses.db1"),
        ("db1: 10.70.0.21", "db1: 10.70.0.5", "spec.addresses.gw1"),
        ("db1: 10.70.0.21", "gw1: 10.70.0.21", "spec.addresses.gw1"),
        ("db1: 10.70.0.21", "db1: 21", "spec.addresses.db1"),
        ("db1: 10.70.0.21", "db1: {}", "spec.addresses.db1"),
        ("db1: 10.70.0.21", "db1: {v4: 10.70.0.21}", "spec.addresses.db1.v4"),
        ("db1: 10.70.0.21", "db1: {ipv4: \"fd70::21\"}", "spec.addresses.db1.ipv4"),
        ("db1: 10.70.0.21", "DB: 10.70.0.21", "spec.addresses.DB"),
        ("51821", "0", "spec.listenPort"),
        ("51821", "65536", "spec.listenPort"),
        ("1380", "1279", "spec.mtu"),
        ("1380", "8921", "spec.mtu"),
    ];
    for (good, bad, field) in cases {
        assert!(NETWORK.contains(good), "{good}");
        refused(&NETWORK.replace(good, bad), field);
    }
    let error = read(&NETWORK.replace("10.70.0.0/16", "10.70.0.1/16")).unwrap_err().to_string();
    assert_eq!(
        error,
        "net.yaml: document 1 (Network shop): spec.ipv4: 10.70.0.1/16 has host bits; \
         did you mean 10.70.0.0/16? (line 4)"
    );
    refused("kind: Network\nmetadata: {name: shop}\nspec: {}", "spec.ipv4");
}

const BALANCER: &str = r#"kind: LoadBalancer
metadata: {name: front}
spec:
  network: shop
  addresses: [10.70.0.80, "fd70::80"]
  ports:
    - {protocol: tcp, port: 80, targetPort: 8080}
    - {protocol: udp, port: 53}
  backends: {role: web}
  gateways: {role: gateway}
  algorithm: source
  mode: nat
  health: {port: 8081, interval: 1s, timeout: 250ms, fall: 3, rise: 4}
"#;

fn balancer(text: &str) -> LoadBalancerSpec {
    match read(text).unwrap().resources.remove(0).resource {
        Some(Kind::LoadBalancer(balancer)) => balancer.spec.unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_field_of_a_balancer_arrives() {
    let label = |value: &str| BTreeMap::from([("role".to_owned(), value.to_owned())]);
    let expected = LoadBalancerSpec {
        network: "shop".into(),
        addresses: vec!["10.70.0.80".into(), "fd70::80".into()],
        ports: vec![
            ServicePort { protocol: 6, port: 80, target_port: 8080 },
            ServicePort { protocol: 17, port: 53, target_port: 53 },
        ],
        backends: label("web"),
        gateways: Some(Selector { labels: label("gateway") }),
        algorithm: Algorithm::Source.into(),
        mode: Mode::Nat.into(),
        health: Some(HealthCheck {
            port: 8081,
            interval: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
            timeout: Some(prost_types::Duration { seconds: 0, nanos: 250_000_000 }),
            fall: 3,
            rise: 4,
        }),
        service: String::new(),
    };
    assert_eq!(balancer(BALANCER), expected);
    let text = BALANCER.replace("backends: {role: web}", "service: web");
    let text = text.replace("port: 53", "port: 53, targetPort: 53");
    let of_service =
        LoadBalancerSpec { service: "web".into(), backends: BTreeMap::new(), ..expected };
    assert_eq!(balancer(&text), of_service);
}

#[test]
fn no_gateways_are_not_all_vms_and_no_health_check_is_not_the_default_one() {
    let short: String = BALANCER.lines().take(9).flat_map(|line| [line, "\n"]).collect();
    let spec = balancer(&short);
    assert_eq!((spec.gateways, spec.health), (None, None));
    assert_eq!(spec.algorithm, i32::from(Algorithm::Maglev));
    let spec = balancer(&(short + "  gateways: {}\n  health: {}\n"));
    assert_eq!(spec.gateways, Some(Selector::default()));
    let check = spec.health.unwrap();
    assert_eq!((check.port, check.fall, check.rise), (8080, 2, 2));
}

#[test]
fn a_bad_field_of_a_balancer_is_refused_with_its_path() {
    let cases = [
        ("  network: shop\n", "", "spec.network"),
        ("network: shop", "network: Shop", "spec.network"),
        ("  backends: {role: web}\n", "", "spec.backends"),
        ("  backends: {role: web}\n", "  service: web\n", "spec.ports[1].targetPort"),
        ("  backends: {role: web}\n", "  backends: {role: web}\n  service: web\n", "spec.service"),
        ("\"fd70::80\"", "10.70.0.80", "spec.addresses[1]"),
        ("\"fd70::80\"", "10.70.0.0/24", "spec.addresses[1]"),
        ("\"fd70::80\"", "127.0.0.1", "spec.addresses[1]"),
        ("[10.70.0.80, \"fd70::80\"]", "10.70.0.80", "spec.addresses"),
        ("[10.70.0.80, \"fd70::80\"]", "[]", "spec.addresses"),
        ("protocol: udp", "protocol: sctp", "spec.ports[1].protocol"),
        ("protocol: udp, ", "", "spec.ports[1].protocol"),
        ("port: 53", "port: 0", "spec.ports[1].port"),
        ("protocol: udp, port: 53", "protocol: tcp, port: 80", "spec.ports[1].port"),
        ("port: 53", "port: 53, targetPort: 65536", "spec.ports[1].targetPort"),
        ("port: 53", "port: 53, target: 5353", "spec.ports[1].target"),
        ("{role: gateway}", "gw1", "spec.gateways"),
        ("algorithm: source", "algorithm: random", "spec.algorithm"),
        ("mode: nat", "mode: dsr", "spec.mode"),
        ("interval: 1s", "interval: 1", "spec.health.interval"),
        ("interval: 1s", "interval: 0s", "spec.health.interval"),
        ("interval: 1s", "interval: 99ms", "spec.health.interval"),
        ("timeout: 250ms", "timeout: 11s", "spec.health.timeout"),
        ("timeout: 250ms", "timeout: -1s", "spec.health.timeout"),
        ("fall: 3", "fall: 0", "spec.health.fall"),
        ("rise: 4", "rise: 11", "spec.health.rise"),
    ];
    for (good, bad, field) in cases {
        assert!(BALANCER.contains(good), "{good}");
        refused(&BALANCER.replace(good, bad), field);
    }
    let udp_only = BALANCER.replace("    - {protocol: tcp, port: 80, targetPort: 8080}\n", "");
    refused(&udp_only.replace("port: 8081, ", ""), "spec.health.port");
}

#[test]
fn a_nodes_spec_is_read_and_an_absent_one_stays_absent() {
    for (text, expected) in [
        ("", None),
        ("spec: {}", Some(NodeSpec { draining: false })),
        ("spec: {draining: true}", Some(NodeSpec { draining: true })),
    ] {
        let parsed = read(&format!("kind: Node\nmetadata: {{name: a}}\n{text}")).unwrap();
        let Some(Kind::Node(node)) = &parsed.resources[0].resource else { panic!("not a node") };
        assert_eq!(node.spec, expected, "{text}");
    }
}

#[test]
fn a_file_cut_anywhere_is_read_or_refused_as_a_whole() {
    let policy = with_rule(&["ports: [80]"]);
    let whole = format!("{NETWORK}---\n{BALANCER}---\n{policy}");
    for end in (0..whole.len()).filter(|end| whole.is_char_boundary(*end)) {
        if let Err(errors) = read(&whole[..end]) {
            assert!(errors.iter().next().is_some(), "cut at {end}");
        }
    }
    assert_eq!(read(&whole).unwrap().resources.len(), 3);
}

#[test]
fn an_error_names_file_document_resource_field_and_line() {
    let text =
        "kind: Node\nmetadata: {name: a}\n---\n".to_owned() + &with_rule(&["ports: [70000]"]);
    assert_eq!(
        read(&text).unwrap_err().to_string(),
        "net.yaml: document 2 (FirewallPolicy web): spec.rules[0].ports[0]: \
         70000 is not a port: 0 to 65535 (line 12)"
    );
}

#[test]
fn all_bad_documents_and_fields_are_reported_also_before_a_syntax_error() {
    let text = with_rule(&["ports: [70000]", "from: [x]", "action: log"])
        + "---\nkind: Node\nmetadata: {name: ok}\n---\nkind: Nod\nmetadata: {name: B}\n---\nkind: [\n";
    let errors = read(&text).unwrap_err();
    let fields: Vec<_> = errors.iter().map(Invalid::field).collect();
    assert_eq!(fields, ["spec.rules[0].action", "metadata.name", "kind", ""], "{errors}");
    let shown = errors.to_string();
    assert!(shown.contains("document 3 (Nod B): "), "{shown}");
    assert!(shown.lines().last().unwrap().contains("document 4: "), "{shown}");
    assert!(shown.lines().last().unwrap().contains("line 18"), "{shown}");
}

#[test]
fn two_rules_of_one_name_are_refused_with_the_line_of_the_second() {
    let text = with_rule(&[]) + "  - {name: http, action: deny, direction: egress}\n";
    assert_eq!(
        read(&text).unwrap_err().to_string(),
        "net.yaml: document 1 (FirewallPolicy web): spec.rules[1].name: \
         an earlier rule is called `http` too (line 9)"
    );
}

#[test]
fn json_is_read_as_an_object_or_a_list_also_with_tabs() {
    let one = "{\n\t\"kind\": \"Node\",\n\t\"metadata\": {\"name\": \"a\"}\n}";
    assert_eq!(read(one).unwrap().resources.len(), 1);
    let two =
        r#"[{"kind":"Node","metadata":{"name":"a"}}, {"kind":"Node","metadata":{"name":"b"}}]"#;
    assert_eq!(read(two).unwrap().resources.len(), 2);
    let bad =
        r#"[{"kind":"Node","metadata":{"name":"a"}}, {"kind":"Node","metadata":{"name":"B"}}]"#;
    let error = read(bad).unwrap_err().to_string();
    assert!(error.starts_with("net.yaml: document 1, item 2 (Node B): metadata.name: "), "{error}");
}

#[test]
fn an_alias_bomb_is_refused_and_a_shared_list_is_not() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for n in 1..9 {
        let alias = format!("*a{}", n - 1);
        let list = [alias.as_str(); 10].join(", ");
        writeln!(bomb, "a{n}: &a{n} [{list}]").unwrap();
    }
    let error = read(&bomb).unwrap_err().to_string();
    assert!(error.contains("alias"), "{error}");

    let shared = with_rule(&["from: &net [10.0.0.0/8]"])
        + "  - {name: b, action: deny, direction: egress, to: *net}\n";
    assert_eq!(policies(&shared)[0].rules[1].to_cidrs, ["10.0.0.0/8"]);
}

#[test]
fn a_file_above_the_limit_is_refused_unread() {
    let error = read(&" ".repeat(FILE_BYTES_MAX + 1)).unwrap_err().to_string();
    assert!(error.contains("at most 33554432 are read"), "{error}");
}

#[test]
fn errors_are_counted_above_the_limit() {
    let text = "kind: Node\nmetadata: {name: A}\n---\n".repeat(ERRORS_MAX + 7);
    let error = read(&text).unwrap_err().to_string();
    assert_eq!(error.lines().count(), ERRORS_MAX + 1);
    assert!(error.ends_with("net.yaml: 7 more errors"), "{error}");
}

#[test]
fn every_example_is_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let parsed = parse(&path.display().to_string(), &text, &Original::default()).unwrap();
        assert!(!parsed.resources.is_empty(), "{}", path.display());
        names.insert(path.file_name().unwrap().to_str().unwrap().to_owned());
    }
    assert!(names.contains("three-tier.yaml"), "{names:?}");
}

#[test]
fn the_manifests_in_the_documentation_are_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/manifest.md");
    let text = fs::read_to_string(path).unwrap();
    let blocks: Vec<_> = text.split("```yaml\n").skip(1).collect();
    assert_eq!(blocks.len(), 5);
    for block in blocks {
        let yaml = block.split("```").next().unwrap();
        assert_eq!(read(yaml).unwrap().resources.len(), 1, "{yaml}");
    }
}

fn original(name: &str) -> Result<Parsed, Errors> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/original");
    let text = fs::read_to_string(folder.join(name)).unwrap();
    parse(name, &text, &Original::default())
}

fn only(parsed: &Parsed) -> FirewallPolicy {
    match &parsed.resources[..] {
        [Resource { resource: Some(Kind::FirewallPolicy(policy)) }] => policy.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_originals_good_rules_mean_what_they_meant() {
    let parsed = original("rules.json").unwrap();
    let policy = only(&parsed);
    assert_eq!(policy.metadata.unwrap().name, "rules");
    let spec = policy.spec.unwrap();
    assert_eq!((spec.default_ingress(), spec.default_egress()), (Action::Allow, Action::Allow));
    let rules: Vec<_> = spec.rules.iter().map(summary).collect();
    assert_eq!(
        rules,
        [
            "rule-1 deny ingress from [] to [0.0.0.0/0]: tcp 8082",
            "rule-2 allow egress from [] to [10.77.2.0/24]: udp 53",
            "rule-3 allow ingress from [10.77.1.0/24] to []: tcp 8000-8100",
            "rule-4 deny ingress from [fd77:1::/64] to []: tcp 443",
        ]
    );
    let one = only(&original("one-rule.json").unwrap());
    assert_eq!(one.metadata.unwrap().name, "one-rule");
    assert_eq!(one.spec.unwrap().rules.len(), 1);
}

fn summary(rule: &FirewallRule) -> String {
    let action = if rule.action() == Action::Allow { "allow" } else { "deny" };
    let (from, to) = (rule.from_cidrs.join(","), rule.to_cidrs.join(","));
    let direction = direction(rule.direction());
    format!("{} {action} {direction} from [{from}] to [{to}]: {}", rule.name, traffic(rule))
}

#[test]
fn denyall_closes_ingress_but_for_ping_and_an_icmp_rule_loses_its_port_with_a_note() {
    let parsed = original("denyall.json").unwrap();
    let spec = only(&parsed).spec.unwrap();
    assert_eq!((spec.default_ingress(), spec.default_egress()), (Action::Deny, Action::Allow));
    let rules: Vec<_> = spec.rules.iter().map(summary).collect();
    assert_eq!(
        rules,
        [
            "ping-in allow ingress from [] to []: icmp echo-request",
            "ping-out allow egress from [] to []: icmp echo-request",
            "ping-in-v6 allow ingress from [] to []: icmpv6 echo-request",
            "ping-out-v6 allow egress from [] to []: icmpv6 echo-request",
            "rule-2 allow ingress from [0.0.0.0/0] to []: tcp 80",
            "rule-3 allow ingress from [10.77.0.0/16] to []: icmp",
        ]
    );
    assert_eq!(
        parsed.notes,
        ["denyall.json: rule-3: dst_port is ignored: this protocol has no ports"]
    );
}

#[test]
fn the_originals_bad_rules_are_refused_with_the_field() {
    let cases = [
        ("missing-field", "ip_range"),
        ("port-above-65535", "dst_port"),
        ("mask-33", "ip_range"),
        ("bad-address", "ip_range"),
        ("no-mask", "ip_range"),
        ("bad-action", "action"),
        ("port-not-a-number", "dst_port"),
        ("bad-dst-src", "dst_src"),
    ];
    for (name, field) in cases {
        let errors = original(&format!("bad/{name}.json")).unwrap_err();
        let fields: Vec<_> = errors.iter().map(Invalid::field).collect();
        assert_eq!(fields, [field], "{errors}");
    }
}

#[test]
fn a_bad_rule_of_a_list_is_named_by_its_place() {
    let good = r#"{"direction":"in","protocol":"tcp","dst_port":"80","dst_src":"src","ip_range":"10.0.0.0/8","action":"acpt"}"#;
    let cases = [
        (good.replace("tcp", "all"), "[1].protocol", "found the text `all`"),
        (good.replace("\"in\"", "\"ingress\""), "[1].direction", "in or out"),
        (good.replace("\"80\"", "\"90:80\""), "[1].dst_port", "ends before it starts"),
        (good.replace("\"80\"", "\":80\""), "[1].dst_port", "a port \"N\""),
        (good.replace("tcp", "icmpv6"), "[1].protocol", "other address family"),
        (good.replace('}', ",\"comment\":\"x\"}"), "[1].comment", "unknown field"),
        ("{\"policy\":\"allowall\"}".to_owned(), "[1].policy", "expected denyall"),
    ];
    for (bad, field, reason) in cases {
        let errors = read(&format!("[{good}, {bad}]")).unwrap_err();
        let error = errors.iter().next().unwrap();
        assert_eq!(error.field(), field, "{errors}");
        assert!(error.reason().contains(reason), "{errors}");
    }
}

#[test]
fn an_empty_list_is_the_originals_only_where_it_is_named() {
    assert_eq!(read("[]").unwrap().resources, []);
    let named =
        Original { name: Some(crate::model::Name::new("fw").unwrap()), ..Default::default() };
    let policy = only(&parse("x.json", "[]", &named).unwrap());
    assert_eq!(policy.metadata.unwrap().name, "fw");
}

#[test]
fn the_name_of_a_file_becomes_a_name() {
    let rule = r#"{"policy":"denyall"}"#;
    let name = |file: &str| {
        let parsed = parse(file, rule, &Original::default());
        parsed.map(|parsed| only(&parsed).metadata.unwrap().name)
    };
    assert_eq!(name("/etc/My Rules_2.json").unwrap(), "my-rules-2");
    assert_eq!(name("_.x.json").unwrap(), "x");
    assert!(name("___.json").unwrap_err().to_string().contains("--name"));
}

#[test]
fn what_is_printed_with_a_status_can_be_applied_again() {
    let policy = FirewallPolicy {
        metadata: Some(Metadata {
            name: "web".into(),
            uid: "u".into(),
            revision: 7,
            ..Default::default()
        }),
        spec: Some(FirewallPolicySpec { priority: 5, ..Default::default() }),
        status: Some(crate::pb::policy::FirewallPolicyStatus {
            nodes: vec![crate::pb::policy::NodePolicyStatus {
                node: "vm1".into(),
                applied: true,
                ..Default::default()
            }],
            peers: vec![ResolvedPeer { rule: "lb".into(), nodes: 2, cidrs: 3 }],
            conditions: vec![crate::pb::meta::Condition {
                r#type: "Applied".into(),
                status: 1,
                ..Default::default()
            }],
        }),
    };
    let resource = Resource { resource: Some(Kind::FirewallPolicy(policy)) };
    let json = serde_json::to_value(Manifest::new(&resource).unwrap()).unwrap();
    assert_eq!(json["metadata"]["revision"], 7);
    assert_eq!(json["status"]["nodes"][0]["applied"], true);
    assert_eq!(json["status"]["peers"][0]["cidrs"], 3);
    assert_eq!(json["status"]["conditions"][0]["status"], "True");
    assert_eq!(policies(&json.to_string())[0].priority, 5);
}

#[test]
fn the_statuses_of_network_balancer_and_node_are_written_and_read_over() {
    let parse_one = |text: &str| read(text).unwrap().resources.remove(0).resource.unwrap();
    let (Kind::Network(mut network), Kind::LoadBalancer(mut balancer)) =
        (parse_one(NETWORK), parse_one(BALANCER))
    else {
        panic!("not a network and a balancer");
    };
    network.status = Some(NetworkStatus {
        members: vec![Member {
            node: "db1".into(),
            ipv4: "10.70.0.21".into(),
            public_key: vec![0; 32],
            endpoints: vec!["192.0.2.1:51820".into()],
            ..Member::default()
        }],
        refused: vec![Refused { node: "db2".into(), message: "is in `a`".into() }],
        conditions: vec![],
    });
    let on_gateway = BackendStatus { node: "web1".into(), flows: 7, ..BackendStatus::default() };
    balancer.status = Some(LoadBalancerStatus {
        backends: vec![Backend { node: "web1".into(), draining: true, ..Backend::default() }],
        nodes: vec![NodeBalancerStatus {
            node: "gw1".into(),
            applied: true,
            backends: vec![BackendStatus { reason: "Draining".into(), ..on_gateway }],
            ..NodeBalancerStatus::default()
        }],
        conditions: vec![],
    });
    let overlay = OverlayStatus {
        network: "shop".into(),
        public_key: vec![0; 32],
        peers: vec![PeerStatus { node: "db1".into(), sent_bytes: 9, ..PeerStatus::default() }],
        ..OverlayStatus::default()
    };
    let node = Node {
        metadata: Some(Metadata { name: "web1".into(), ..Metadata::default() }),
        spec: Some(NodeSpec { draining: true }),
        status: Some(NodeStatus { overlay: Some(overlay), ..NodeStatus::default() }),
    };
    let printed = |resource: Kind| {
        let manifest = Manifest::new(&Resource { resource: Some(resource) }).unwrap();
        let json = serde_json::to_value(&manifest).unwrap();
        let written = serde_json::to_value(manifest.without_status()).unwrap();
        let again = read(&json.to_string()).unwrap().resources.remove(0);
        let again = serde_json::to_value(Manifest::new(&again).unwrap()).unwrap();
        assert_eq!(again, written);
        json
    };
    let key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let network = printed(Kind::Network(network));
    assert_eq!(network["status"]["members"][0]["publicKey"], key);
    assert_eq!(network["status"]["refused"][0]["message"], "is in `a`");
    let balancer = printed(Kind::LoadBalancer(balancer));
    assert_eq!(balancer["status"]["backends"][0]["draining"], true);
    assert_eq!(balancer["status"]["nodes"][0]["backends"][0]["flows"], 7);
    let node = printed(Kind::Node(node));
    assert_eq!(node["spec"]["draining"], true);
    assert_eq!(node["status"]["overlay"]["publicKey"], key);
    assert_eq!(node["status"]["overlay"]["peers"][0]["sentBytes"], 9);
}

prop_compose! {
    fn network_spec()(
        base in any::<std::net::Ipv4Addr>(),
        len in 8_u8..=24,
        base6 in any::<std::net::Ipv6Addr>(),
        len6 in 16_u8..=112,
        members in label(),
        hosts in prop::collection::btree_map("[a-z]{1,8}", (1_u8..255, 0..3), 0..5),
        listen_port in 1_u32..=65_535,
        mtu in prop_oneof![Just(0_u32), 1280_u32..=8920],
    ) -> NetworkSpec {
        let v4 = ipnet::Ipv4Net::new(base, len).unwrap().trunc();
        let v6 = ipnet::Ipv6Net::new(base6, len6).unwrap().trunc();
        let mut used = BTreeSet::new();
        let hosts = hosts.into_iter().filter(|(_, (host, _))| used.insert(*host));
        let addresses = hosts.map(|(node, (host, families))| {
            let ipv4 = (u32::from(v4.network()) + u32::from(host)).to_be_bytes();
            let ipv6 = u128::from(v6.network()) + u128::from(host);
            let ipv4 = if families == 1 { String::new() } else { std::net::Ipv4Addr::from(ipv4).to_string() };
            let ipv6 = if families == 0 { String::new() } else { std::net::Ipv6Addr::from(ipv6).to_string() };
            (node, StaticAddresses { ipv4, ipv6 })
        });
        NetworkSpec {
            ipv4_prefix: v4.to_string(),
            ipv6_prefix: v6.to_string(),
            members,
            addresses: addresses.collect(),
            listen_port,
            mtu,
        }
    }
}

prop_compose! {
    fn balancer_spec()(
        v4 in prop::collection::btree_set(0x0a00_0000_u32..0x0b00_0000, 1..5),
        v6 in prop::collection::btree_set(0x2000_u128 << 112..0x4000_u128 << 112, 0..4),
        ports in prop::collection::btree_map((prop::bool::ANY, 1_u32..=65_535), 1_u32..=65_535, 1..6),
        backends in label(),
        by_service in prop::bool::ANY,
        gateways in prop::option::of(label()),
        algorithm in 1..=3,
        health in prop::option::of((1_u32..=65_535, 100_i64..=60_000, 50_i64..=10_000, 1_u32..=10, 1_u32..=10)),
    ) -> LoadBalancerSpec {
        let time = |ms: i64| Some(prost_types::Duration {
            seconds: ms / 1000,
            nanos: i32::try_from(ms % 1000).unwrap() * 1_000_000,
        });
        LoadBalancerSpec {
            network: "shop".into(),
            addresses: v4
                .into_iter()
                .map(|bits| std::net::Ipv4Addr::from(bits).to_string())
                .chain(v6.into_iter().map(|bits| std::net::Ipv6Addr::from(bits).to_string()))
                .collect(),
            ports: ports
                .into_iter()
                .map(|((udp, port), target_port)| ServicePort { protocol: if udp { 17 } else { 6 }, port, target_port })
                .collect(),
            service: if by_service { "web" } else { "" }.into(),
            backends: if by_service { BTreeMap::new() } else { backends },
            gateways: gateways.map(|labels| Selector { labels }),
            algorithm,
            mode: Mode::Nat.into(),
            health: health.map(|(port, interval, timeout, fall, rise)| HealthCheck {
                port,
                interval: time(interval),
                timeout: time(timeout),
                fall,
                rise,
            }),
        }
    }
}

const DEPLOYMENT: &str = "
kind: Deployment
metadata: {name: shop, labels: {tier: front}}
spec:
  replicas: 4
  placement: {selector: {role: app}, spread: rack, maxPerNode: 2, rescheduleAfter: 5m}
  needs: [db, {service: cache, ready: 2, timeout: 90s}]
  process:
    command: [/usr/bin/shop, '--port=${PORT_HTTP}']
    environment: {WHERE: '${NODE}'}
    user: nobody
    group: nogroup
    directory: /srv/shop
    limits: {memory: 256MiB, cpuMillis: 500, processes: 64}
    readiness: {http: {port: http, path: /ready}, interval: 250ms, timeout: 2s, fall: 5}
    startTimeout: 2m
    stopSignal: QUIT
    stopTimeout: 0s
  ports: [{name: http}, {name: admin, protocol: udp, port: 9000}]
  attributes: {version: '2'}
  rollout: {maxUnavailable: 2, soak: 10s}
  drainTimeout: 1h
";

#[test]
fn a_deployment_survives_the_way_to_a_file_and_back() {
    let processes = ["[/bin/x]", "[/bin/x, a, 'b c']"];
    let mut texts = vec![DEPLOYMENT.to_owned()];
    texts.extend(processes.map(|command| {
        format!(
            "kind: Deployment\nmetadata: {{name: a}}\nspec: {{process: {{command: {command}}}}}"
        )
    }));
    for systemd in [
        "{unit: nginx.service, readiness: {tcp: 80}}",
        "{process: {command: [/bin/x], readiness: {exec: [/bin/y]}}}",
        "{process: {command: [/bin/x], readiness: {announced: true}}}",
    ] {
        texts.push(format!(
            "kind: Deployment\nmetadata: {{name: a}}\nspec: {{replicas: 0, systemd: {systemd}}}"
        ));
    }
    for text in texts {
        let parsed = read(&text).unwrap_or_else(|errors| panic!("{errors}"));
        survives(&parsed.resources[0]).unwrap();
    }
}

#[test]
fn a_bad_field_of_a_deployment_is_refused_with_its_path() {
    let cases = [
        ("replicas: 4", "replicas: 4.5", "spec.replicas"),
        ("rack", "''", "spec.placement.spread"),
        ("After: 5m", "After: 1ms", "spec.placement.rescheduleAfter"),
        ("After: 5m", "After: 25h", "spec.placement.rescheduleAfter"),
        ("ready: 2", "ready: 0", "spec.needs[1].ready"),
        ("[db,", "[db, db,", "spec.needs[1].service"),
        ("/usr/bin/shop", "shop", "spec.process.command[0]"),
        ("${PORT_HTTP}", "${PORT_HTTPS}", "spec.process.command[1]"),
        ("256MiB", "256MB", "spec.process.limits.memory"),
        ("http: {port: http", "tcp: 1, http: {port: http", "spec.process.readiness"),
        ("port: http,", "port: htp,", "spec.process.readiness.http.port"),
        ("2m", "2", "spec.process.startTimeout"),
        ("QUIT", "STOP", "spec.process.stopSignal"),
        ("udp", "sctp", "spec.ports[1].protocol"),
        ("9000}]", "9000}]\n  systemd: {unit: a.service}", "spec.systemd"),
        ("drainTimeout: 1h", "drainTimeout: 2h", "spec.drainTimeout"),
    ];
    for (good, bad, field) in cases {
        let text = DEPLOYMENT.replacen(good, bad, 1);
        assert_ne!(text, DEPLOYMENT, "{good}");
        let errors = read(&text).unwrap_err();
        let fields: Vec<_> = errors.iter().map(Invalid::field).collect();
        assert_eq!(fields, [field], "{errors}");
    }
}

/// YAML and JSON of it are read as it.
fn survives(resource: &Resource) -> Result<(), TestCaseError> {
    let manifest = Manifest::new(resource).unwrap();
    let yaml = serde_saphyr::to_string(&manifest).unwrap();
    let json = serde_json::to_string_pretty(&manifest).unwrap();
    for text in [yaml, json] {
        match read(&text) {
            Ok(parsed) => {
                prop_assert_eq!(&parsed.resources, std::slice::from_ref(resource), "{}", text);
            }
            Err(errors) => prop_assert!(false, "{errors}\n{text}"),
        }
    }
    Ok(())
}

prop_compose! {
    fn port_range()(a: u16, b: u16) -> PortRange {
        PortRange { first: a.min(b).into(), last: a.max(b).into() }
    }
}

fn cidrs() -> impl Strategy<Value = Vec<String>> {
    let v4 = (any::<std::net::Ipv4Addr>(), 0_u8..=32)
        .prop_map(|(a, len)| ipnet::Ipv4Net::new(a, len).unwrap().trunc().to_string());
    let v6 = (any::<std::net::Ipv6Addr>(), 0_u8..=128)
        .prop_map(|(a, len)| ipnet::Ipv6Net::new(a, len).unwrap().trunc().to_string());
    prop::collection::vec(prop_oneof![v4, v6], 0..4)
}

prop_compose! {
    fn rule()(
        action in prop_oneof![Just(Action::Allow), Just(Action::Deny), Just(Action::Reject)],
        ingress: bool,
        log: bool,
        limit in prop::option::of((1_u32..1_000_001, 0_usize..4, 1_u32..1_000_001, any::<bool>())),
        open in 0_u32..=1_000_000,
        from in cidrs(),
        to in cidrs(),
        peer in prop::option::of(peer()),
        protocol in prop_oneof![Just(None), (0_u32..256).prop_map(Some), Just(Some(6)), Just(Some(17)), Just(Some(1)), Just(Some(58))],
        ports in prop::collection::vec(port_range(), 0..4),
        source_ports in prop::collection::vec(port_range(), 0..2),
        types in prop::collection::vec((0_u32..256, prop::option::of(0_u32..256)), 0..4),
    ) -> FirewallRule {
        let has_ports = matches!(protocol, Some(6 | 17 | 132));
        let has_types = matches!(protocol, Some(1 | 58));
        FirewallRule {
            name: String::new(),
            action: action.into(),
            direction: if ingress { Direction::Ingress } else { Direction::Egress }.into(),
            from_cidrs: if has_types || peer.is_some() { vec![] } else { from },
            // One side only: two sides may share no family.
            to_cidrs: vec![],
            protocol,
            source_ports: if has_ports { source_ports } else { vec![] },
            ports: if has_ports { ports } else { vec![] },
            icmp_types: if has_types {
                types.into_iter().map(|(r#type, code)| IcmpType { r#type, code }).collect()
            } else {
                vec![]
            },
            from: peer.clone().filter(|_| ingress),
            to: peer.filter(|_| !ingress),
            log,
            limit: limit.filter(|_| action == Action::Allow).map(|(flows, period, burst, per_source)| {
                let period_seconds = crate::model::LIMIT_PERIODS[period];
                RateLimit { flows, period_seconds, burst, per_source }
            }),
            connections_per_source: if action == Action::Allow { open } else { 0 },
        }
        .swapped_if(!ingress, to)
    }
}

fn peer() -> impl Strategy<Value = Peer> {
    let some = label().prop_filter("labels", |labels| !labels.is_empty());
    prop_oneof![
        some.prop_map(|labels| Peer { labels, ..Peer::default() }),
        "[a-z]{1,9}".prop_map(|service| Peer { service, ..Peer::default() }),
    ]
}

impl FirewallRule {
    /// The other side of an egress rule.
    fn swapped_if(mut self, swap: bool, to: Vec<String>) -> Self {
        if swap && !self.from_cidrs.is_empty() {
            self.from_cidrs.clear();
            self.to_cidrs = to;
        }
        self
    }
}

fn label() -> impl Strategy<Value = BTreeMap<String, String>> {
    // Texts that YAML could take for something else are the point here.
    let odd = prop::sample::select(vec![
        "true",
        "null",
        "1",
        "0x10",
        "1e3",
        "~",
        "yes",
        "-",
        "{",
        "a:b",
        "#",
        "2026-01-01",
    ]);
    let value = prop_oneof!["[!-+\\--<>-~]{0,8}", odd.prop_map(str::to_owned)];
    prop::collection::btree_map("[a-z]{1,6}", value, 0..4)
}

proptest! {
    #[test]
    fn a_policy_survives_the_way_to_a_file_and_back(
        labels in label(),
        target in label(),
        priority in 0_u32..=1_000_000,
        default_ingress in 0..4,
        default_egress in 0..4,
        audit: bool,
        times in prop::array::uniform6(prop::option::of(1_i64..=604_800)),
        orphan_fragments in 0..3,
        mut rules in prop::collection::vec(rule(), 0..6),
    ) {
        for (n, rule) in rules.iter_mut().enumerate() {
            rule.name = format!("rule-{n}");
        }
        let policy = FirewallPolicy {
            metadata: Some(Metadata { name: "web".to_owned(), labels, ..Metadata::default() }),
            spec: Some(FirewallPolicySpec {
                target, priority, default_ingress, default_egress, rules, mode: if audit { 2 } else { 0 },
                timeouts: times.iter().any(Option::is_some).then(|| {
                    let [tcp_opening, tcp_established, tcp_closing, unreplied, replied, echo] = times
                        .map(|time| Some(prost_types::Duration { seconds: time?, nanos: 0 }));
                    FlowTimeouts { tcp_opening, tcp_established, tcp_closing, unreplied, replied, echo }
                }),
                orphan_fragments,
            }),
            status: None,
        };
        survives(&Resource { resource: Some(Kind::FirewallPolicy(policy)) })?;
    }

    #[test]
    fn a_network_survives_the_way_to_a_file_and_back(labels in label(), spec in network_spec()) {
        prop_assume!(crate::model::Network::try_from(spec.clone()).is_ok());
        let metadata = Some(Metadata { name: "shop".to_owned(), labels, ..Metadata::default() });
        let network = Network { metadata, spec: Some(spec), status: None };
        survives(&Resource { resource: Some(Kind::Network(network)) })?;
    }

    #[test]
    fn a_balancer_survives_the_way_to_a_file_and_back(labels in label(), spec in balancer_spec()) {
        let metadata = Some(Metadata { name: "front".to_owned(), labels, ..Metadata::default() });
        let balancer = LoadBalancer { metadata, spec: Some(spec), status: None };
        survives(&Resource { resource: Some(Kind::LoadBalancer(balancer)) })?;
    }

    #[test]
    fn no_text_panics(text in "[ \\[\\]{}:,&*!|>'\"%@`#\n\ta-z0-9-]{0,200}") {
        _ = read(&text);
    }
}
