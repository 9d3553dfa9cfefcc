//! The built binary against a core in this process.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, helpers included")]

mod fake;
mod import;
mod services;
mod store;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    path::Path,
    process::Stdio,
};

use cnsmo_proto::pb::{
    balancer::{Backend, BackendStatus, LoadBalancer, LoadBalancerStatus, NodeBalancerStatus},
    event::{self, WatchEventsRequest},
    meta::Metadata,
    network::{Member, Network, NetworkStatus, Refused},
    node::{
        DropCounter, FirewallStatus, Interface, Node, NodeStatus, OverlayStatus, PeerStatus,
        node_status::Phase,
    },
    policy::{FirewallPolicyStatus, NodePolicyStatus, RuleCounter},
    resource::{
        Change, HistoryEntry, Kind, PendingNode, Resource, WaitAppliedResponse, WatchResponse,
        change::Outcome, resource::Resource as Inner, watch_response::Event,
    },
};
use fake::{Fake, Ran, cnsmo};
use serde_json::{Value, json};
use tonic::Status;

const WEB: &str = "\
kind: FirewallPolicy
metadata: {name: web}
spec:
  target: {role: web}
  rules:
    - {name: http, action: allow, direction: ingress, protocol: tcp, ports: [80]}
";

fn node(name: &str, role: &str, phase: Phase) -> Node {
    Node {
        metadata: Some(Metadata {
            name: name.to_owned(),
            labels: [("role".to_owned(), role.to_owned())].into(),
            ..Metadata::default()
        }),
        status: Some(NodeStatus {
            phase: phase.into(),
            message: if phase == Phase::Ready { "" } else { "lease expired" }.to_owned(),
            addresses: vec!["10.77.1.11".to_owned(), "fd77:1::11".to_owned()],
            interfaces: vec![Interface {
                name: "eth0".to_owned(),
                ingress: "xdp-native".to_owned(),
                egress: "tcx".to_owned(),
            }],
            applied_revision: 4,
            firewall: Some(FirewallStatus {
                flows: 12,
                rules: 3,
                drops: vec![DropCounter {
                    reason: "policy".to_owned(),
                    direction: "ingress".to_owned(),
                    packets: 7,
                    bytes: 420,
                }],
            }),
            ..NodeStatus::default()
        }),
        spec: None,
    }
}

fn example(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name).display().to_string()
}

fn json_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

#[test]
fn a_second_apply_changes_nothing_and_says_so() {
    let core = Fake::start();
    let file = core.write("web.yaml", WEB);
    assert_eq!(core.ok(&["apply", "-f", &file]), "firewallpolicy/web created\nrevision 1\n");
    assert_eq!(
        core.ok(&["apply", "-f", &file]),
        "firewallpolicy/web unchanged\nno change (revision 1)\n"
    );
    let file = core.write("web.yaml", &WEB.replace("80", "81"));
    assert_eq!(
        core.ok(&["apply", "-f", &file, "--dry-run"]),
        "firewallpolicy/web updated (dry run)\nnothing committed (revision 1)\n"
    );
    let applied = json_of(&core.ok(&["-o", "json", "apply", "-f", &file]));
    assert_eq!(
        applied,
        json!({
            "revision": 2,
            "dryRun": false,
            "changes": [{"kind": "firewallpolicy", "name": "web", "outcome": "updated"}],
        })
    );
}

fn changed(revision: i64, to_revision: i64, names: &[(&str, Outcome)]) -> HistoryEntry {
    let change = |(name, outcome): &(&str, Outcome)| Change {
        kind: Kind::FirewallPolicy.into(),
        name: (*name).to_owned(),
        outcome: (*outcome).into(),
    };
    HistoryEntry {
        revision,
        by: "operator/jo".to_owned(),
        call: if to_revision > 0 { "Rollback" } else { "Apply" }.to_owned(),
        changes: names.iter().map(change).collect(),
        to_revision,
        available: revision > 3,
        ..HistoryEntry::default()
    }
}

#[test]
fn history_is_shown_and_a_rollback_says_what_it_changes() {
    let core = Fake::start();
    core.state().history = vec![
        changed(9, 4, &[("web", Outcome::Updated), ("test", Outcome::Deleted)]),
        changed(3, 0, &["a", "b", "c", "d", "e"].map(|name| (name, Outcome::Created))),
    ];
    let shown = core.ok(&["history"]);
    let lines: Vec<Vec<&str>> =
        shown.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["REVISION", "AGE", "BY", "CALL", "CHANGES"]);
    assert_eq!(
        lines[1].join(" "),
        "9 - operator/jo rollback to 4 updated firewallpolicy/web; deleted firewallpolicy/test"
    );
    assert_eq!(
        lines[2].join(" "),
        "3 (history gone) - operator/jo apply created firewallpolicy/a, firewallpolicy/b, \
         firewallpolicy/c and 2 more"
    );
    let one = json_of(&core.ok(&["-o", "json", "history", "--last", "1"]));
    assert_eq!(one[0]["toRevision"], 4);
    assert_eq!(
        one[0]["changes"][1],
        json!({"kind": "firewallpolicy", "name": "test", "outcome": "deleted"})
    );

    assert_eq!(
        core.ok(&["rollback", "9", "--dry-run"]),
        "firewallpolicy/web updated (dry run)\nfirewallpolicy/test deleted (dry run)\n\
         nothing committed (revision 0)\n"
    );
    assert_eq!(
        core.ok(&["rollback", "9"]),
        "firewallpolicy/web updated\nfirewallpolicy/test deleted\nrevision 1\n"
    );
    let refused = core.run(&["rollback", "4"]);
    assert_eq!((refused.code, refused.err.as_str()), (1, "error: the history is gone\n"));
    assert_eq!(core.run(&["rollback", "0"]).code, 2);
}

#[test]
fn events_are_lines_for_people_and_objects_for_programs() {
    let core = Fake::start();
    let time = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 5_000_000 });
    core.state().events = vec![
        event::Event {
            revision: 7,
            time,
            kind: "instance".to_owned(),
            name: "db/db-1".to_owned(),
            what: "Failed".to_owned(),
            reason: "Crashed".to_owned(),
            message: "signal 9".to_owned(),
            node: "vm1".to_owned(),
            by: String::new(),
        },
        event::Event {
            revision: 8,
            kind: "node".to_owned(),
            name: "vm1".to_owned(),
            what: "Updated".to_owned(),
            node: "vm1".to_owned(),
            by: "operator/jo".to_owned(),
            ..event::Event::default()
        },
    ];
    let shown = core.ok(&["events", "vm1", "--from", "7", "--kind", "instance,node"]);
    let lines: Vec<_> = shown.lines().map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "7  2023-11-14T22:13:20  instance/db/db-1 Failed Crashed node=vm1: signal 9",
            "8  -                    node/vm1 Updated by=operator/jo",
        ]
    );
    let asked = WatchEventsRequest {
        from_revision: 7,
        follow: false,
        kinds: vec!["instance".to_owned(), "node".to_owned()],
        name: "vm1".to_owned(),
    };
    assert_eq!(core.state().events_asked, Some(asked));
    let shown = core.ok(&["-o", "json", "events"]);
    let objects: Vec<_> = shown.lines().map(json_of).collect();
    assert_eq!(objects.len(), 2, "the end of history is no event");
    assert_eq!(
        (&objects[0]["reason"], &objects[1]["by"]),
        (&json!("Crashed"), &json!("operator/jo"))
    );
    let ended = core.run(&["events", "--follow"]);
    assert_eq!((ended.code, ended.err.as_str()), (1, "error: the core ended the stream\n"));
}

#[test]
fn a_folder_and_standard_input_are_applied_as_one_request() {
    let core = Fake::start();
    let folder = core.folder.path().join("policies");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("a.yaml"), WEB).unwrap();
    std::fs::write(folder.join("README.md"), "not a manifest").unwrap();
    let mut child = cnsmo()
        .env("CNSMO_SOCKET", core.socket())
        .args(["apply", "-f", "-", "-f", folder.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let json = r#"{"kind":"FirewallPolicy","metadata":{"name":"all"},"spec":{}}"#;
    child.stdin.take().unwrap().write_all(json.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "firewallpolicy/all created\nfirewallpolicy/web created\nrevision 1\n"
    );
}

#[test]
fn nothing_is_sent_when_any_file_is_bad() {
    let core = Fake::start();
    let good = core.write("good.yaml", WEB);
    let bad = core.write("bad.yaml", &WEB.replace("80", "70000").replace("name: web", "name: b"));
    let ran = core.run(&["apply", "-f", &good, "-f", &bad]);
    assert_eq!(ran.code, 1);
    assert_eq!(
        ran.err,
        format!(
            "error: nothing was sent\n{bad}: document 1 (FirewallPolicy b): \
             spec.rules[0].ports[0]: 70000 is not a port: 0 to 65535 (line 6)\n"
        )
    );
    assert_eq!(core.state().revision, 0);

    let ran = core.run(&["apply", "-f", &good, "-f", &good]);
    assert!(ran.err.contains("firewallpolicy web: is in"), "{}", ran.err);
    assert_eq!((ran.code, core.state().revision), (1, 0));
}

#[test]
fn the_three_tier_example_is_applied_and_printed_so_that_it_applies_unchanged() {
    let core = Fake::start();
    core.ok(&["apply", "-f", &example("three-tier.yaml")]);
    for (format, ending) in [("yaml", "yaml"), ("json", "json")] {
        let printed = core.ok(&["get", "fw", "-o", format]);
        let file = core.write(&format!("printed.{ending}"), &printed);
        let again = core.ok(&["apply", "-f", &file]);
        assert!(again.ends_with("no change (revision 1)\n"), "{again}");
    }
    let table = core.ok(&["get", "firewallpolicies"]);
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].starts_with("NAME"), "{table}");
    assert_eq!(lines.len(), 5, "{table}");
    let row: Vec<_> = lines[1].split_whitespace().collect();
    assert_eq!(row, ["base", "10000", "-", "deny", "allow", "3", "0/0", "0", "-"]);
    let some = json_of(&core.ok(&["get", "fw", "-l", "tier=front", "-o", "json"]));
    assert_eq!(some.as_array().unwrap().len(), 2);
    assert_eq!(some[0]["metadata"]["name"], "gateway");
}

#[test]
fn every_kind_of_the_example_is_printed_so_that_it_applies_unchanged() {
    let core = Fake::start();
    let created = core.ok(&["apply", "-f", &example("three-tier.yaml")]);
    assert!(created.starts_with("network/shop created\nloadbalancer/front created\n"), "{created}");
    core.set_balancer_status("front", seen(true, 3));
    for kind in ["fw", "net", "lb"] {
        for format in ["yaml", "json"] {
            let file = core.write(&format!("p.{format}"), &core.ok(&["get", kind, "-o", format]));
            let again = core.ok(&["apply", "-f", &file]);
            assert!(again.ends_with("no change (revision 1)\n"), "{again}");
        }
    }
    let diff = core.ok(&["diff", "-f", &example("three-tier.yaml")]);
    assert!(diff.lines().all(|line| line.ends_with(" unchanged")), "{diff}");
}

/// Of `front`: `web1` as gw1 and db1 see it, gw1 with `flows`; and `web2`, healthy and unused.
fn seen(web1_active: bool, flows: u64) -> LoadBalancerStatus {
    let backend = |node: &str, ipv4: &str| Backend {
        node: node.to_owned(),
        ipv4: ipv4.to_owned(),
        ..Backend::default()
    };
    let status = |node: &str, active: bool, flows| BackendStatus {
        node: node.to_owned(),
        active,
        reason: if active { "" } else { "Draining" }.to_owned(),
        flows,
        ..BackendStatus::default()
    };
    let on = |node: &str, backends| NodeBalancerStatus {
        node: node.to_owned(),
        applied: true,
        message: String::new(),
        backends,
    };
    LoadBalancerStatus {
        backends: vec![backend("web1", "10.70.0.11"), backend("web2", "10.70.0.12")],
        nodes: vec![
            on("gw1", vec![status("web1", web1_active, flows), status("web2", true, 0)]),
            on("db1", vec![status("web1", true, 0), status("web2", true, 0)]),
        ],
        conditions: vec![],
    }
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[test]
fn networks_and_balancers_are_listed_with_what_they_have() {
    let core = Fake::start();
    core.ok(&["apply", "-f", &example("three-tier.yaml")]);
    core.set_balancer_status("front", seen(false, 3));
    let table = core.ok(&["get", "loadbalancers"]);
    let rows: Vec<_> = table.lines().map(words).collect();
    let header = "NAME NETWORK ADDRESSES PORTS BACKENDS FLOWS APPLIED REVISION AGE";
    assert_eq!(rows[0].join(" "), header);
    let addresses = "10.77.100.80,fd77:100::80,10.70.0.80,fd70::80";
    assert_eq!(
        rows[1].join(" "),
        format!("front shop {addresses} tcp 80->8080, udp 53->5353 1/2 3 2/2 0 -")
    );
    let key = (Kind::Network.into(), "shop".to_owned());
    if let Some(Inner::Network(network)) =
        &mut core.state().resources.get_mut(&key).unwrap().resource
    {
        network.status = Some(network_status());
    }
    let table = core.ok(&["get", "net", "shop"]);
    let row = words(table.lines().nth(1).unwrap());
    assert_eq!(row, ["shop", "10.70.0.0/24,fd70::/64", "-", "2", "1", "1", "0", "-"]);
    let shown = words(&core.ok(&["describe", "network", "shop"])).join(" ");
    for part in [
        "Listen port: 51820",
        "MTU: derived",
        "gw1 10.70.0.5,fd70::5",
        "db1 10.70.0.21,fd70::21 BwcHBwcHBw... 10.77.2.21:51820,[fd77:2::21]:51820",
        "web1 10.70.0.11 - -",
        "db2 is in network `a`",
    ] {
        assert!(shown.contains(part), "{part}\n{shown}");
    }
}

fn network_status() -> NetworkStatus {
    NetworkStatus {
        members: vec![
            Member {
                node: "db1".to_owned(),
                ipv4: "10.70.0.21".to_owned(),
                ipv6: "fd70::21".to_owned(),
                public_key: vec![7; 32],
                endpoints: vec!["10.77.2.21:51820".to_owned(), "[fd77:2::21]:51820".to_owned()],
                ..Member::default()
            },
            Member { node: "web1".to_owned(), ipv4: "10.70.0.11".to_owned(), ..Member::default() },
        ],
        refused: vec![Refused { node: "db2".to_owned(), message: "is in network `a`".to_owned() }],
        conditions: vec![],
    }
}

#[test]
fn a_balancer_of_a_service_is_described_by_its_instances() {
    let core = Fake::start();
    let text = std::fs::read_to_string(example("three-tier.yaml")).unwrap();
    let by_service = text.replace("  backends: {role: web}", "  service: web");
    assert_ne!(text, by_service);
    let file = core.write("by-service.yaml", &by_service);
    core.ok(&["apply", "-f", &file]);
    let of = |instance: &str, port| Backend {
        node: "web1".to_owned(),
        instance: instance.to_owned(),
        ipv4: "10.70.0.11".to_owned(),
        port,
        ..Backend::default()
    };
    let says = |instance: &str, active, flows| BackendStatus {
        node: "web1".to_owned(),
        instance: instance.to_owned(),
        active,
        flows,
        ..BackendStatus::default()
    };
    let on = NodeBalancerStatus {
        node: "gw1".to_owned(),
        applied: true,
        backends: vec![says("web-a", true, 3), says("web-b", false, 4)],
        ..NodeBalancerStatus::default()
    };
    let backends = vec![of("web-a", 20_001), of("web-b", 20_002)];
    core.set_balancer_status(
        "front",
        LoadBalancerStatus { backends, nodes: vec![on], conditions: vec![] },
    );
    let shown = words(&core.ok(&["describe", "lb", "front"])).join(" ");
    for part in [
        "Service: web",
        "web1/web-a 10.70.0.11:20001 Active - 3 -",
        "web1/web-b 10.70.0.11:20002 Inactive - 4 -",
    ] {
        assert!(shown.contains(part), "{part}\n{shown}");
    }
}

#[test]
fn a_balancer_is_described_with_each_view_only_where_they_differ() {
    let core = Fake::start();
    core.ok(&["apply", "-f", &example("three-tier.yaml")]);
    core.set_balancer_status("front", seen(true, 3));
    let same = words(&core.ok(&["describe", "lb", "front"])).join(" ");
    for part in [
        "Ports: tcp 80->8080, udp 53->5353",
        "Gateways: role=gateway",
        "Health check: tcp 8080 every 200ms, timeout 200ms, fall 2, rise 2",
        "web1 10.70.0.11 Active - 3 -",
        "gw1 yes 2/2 3 -",
    ] {
        assert!(same.contains(part), "{part}\n{same}");
    }
    assert!(!same.contains("Seen differently"), "{same}");
    core.set_balancer_status("front", seen(false, 3));
    let differs = words(&core.ok(&["describe", "lb", "front"])).join(" ");
    for part in [
        "web1 10.70.0.11 Active on 1 of 2 Draining 3 -",
        "web1 gw1 no Draining 3 -",
        "web1 db1 yes - 0 -",
        "gw1 yes 1/2 3 -",
    ] {
        assert!(differs.contains(part), "{part}\n{differs}");
    }
    assert!(!differs.contains("web2 gw1"), "{differs}");
}

#[test]
fn a_node_is_described_with_its_tunnel_and_its_balancers() {
    let core = Fake::start();
    core.ok(&["apply", "-f", &example("three-tier.yaml")]);
    core.set_balancer_status("front", seen(false, 3));
    for name in ["web1", "gw1", "web9"] {
        let mut node = node(name, "web", Phase::Ready);
        node.status.as_mut().unwrap().overlay = Some(OverlayStatus {
            network: "shop".to_owned(),
            backend: "engine".to_owned(),
            reason: "the kernel has no wireguard".to_owned(),
            device: "cnsmo0".to_owned(),
            mtu: 1420,
            public_key: vec![7; 32],
            peers: vec![PeerStatus {
                node: "db1".to_owned(),
                endpoint: "10.77.2.21:51820".to_owned(),
                received_bytes: 1536,
                sent_bytes: 92,
                ..PeerStatus::default()
            }],
        });
        core.add_node(node);
    }
    let shown = words(&core.ok(&["describe", "node", "web1"])).join(" ");
    for part in [
        "Network: shop Tunnel: engine (the kernel has no wireguard) Device: cnsmo0, MTU 1420",
        "Public key: BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=",
        "db1 10.77.2.21:51820 never 1.5 KiB 92 B",
        "front backend Active on 1 of 2 3 Draining",
    ] {
        assert!(shown.contains(part), "{part}\n{shown}");
    }
    let shown = words(&core.ok(&["describe", "node", "gw1"])).join(" ");
    assert!(shown.contains("front balancer Applied 3 -"), "{shown}");
    let shown = words(&core.ok(&["describe", "node", "web9"])).join(" ");
    assert!(shown.contains("Balancers: none"), "{shown}");
}

#[test]
fn drain_writes_the_spec_alone_and_undo_takes_it_back() {
    let core = Fake::start();
    core.add_node(node("web1", "web", Phase::Ready));
    assert_eq!(core.ok(&["drain", "web1"]), "node/web1 draining\nrevision 1\n");
    let shown = json_of(&core.ok(&["get", "node", "web1", "-o", "json"]));
    assert_eq!(shown["spec"], json!({"draining": true}));
    assert_eq!(shown["metadata"]["labels"], json!({"role": "web"}));
    let table = core.ok(&["nodes"]);
    assert!(table.contains("Ready,Draining"), "{table}");

    core.ok(&["label", "node", "web1", "site=a"]);
    let shown = json_of(&core.ok(&["get", "node", "web1", "-o", "json"]));
    assert_eq!(shown["spec"], json!({"draining": true}), "labels leave it alone");

    let file = core.write("web1.yaml", "kind: Node\nmetadata: {name: web1, labels: {role: db}}\n");
    let diff = core.ok(&["diff", "-f", &file]);
    let changed = diff.lines().filter(|line| line.starts_with(['-', '+'])).count();
    assert_eq!(changed, 3, "role, site and nothing of the spec\n{diff}");

    assert_eq!(core.ok(&["drain", "web1", "--undo"]), "node/web1 takes new flows\nrevision 3\n");
    let shown = json_of(&core.ok(&["get", "node", "web1", "-o", "json"]));
    assert_eq!(shown["spec"], json!({"draining": false}));
    assert_eq!(core.run(&["drain", "web9"]).err, "error: no `web9`\n");
    assert_eq!(core.run(&["drain", "web1", "--undo", "--wait"]).code, 2);
}

/// As [`seen`], once no VM gives `web1` new flows.
fn drained(flows: u64) -> LoadBalancerStatus {
    let mut status = seen(false, flows);
    status.nodes[1].backends[0].active = false;
    status
}

#[test]
fn drain_waits_for_the_last_flow_of_each_vm_that_balances() {
    let core = Fake::start();
    core.add_node(node("web1", "web", Phase::Ready));
    core.ok(&["apply", "-f", &example("three-tier.yaml")]);
    let wait = ["drain", "web1", "--wait", "--timeout", "300ms"];

    core.set_balancer_status("front", drained(3));
    let ran = core.run(&wait);
    assert_eq!(ran.code, 3, "{}", ran.err);
    let last = ran.err.lines().last().unwrap();
    assert_eq!(words(last).join(" "), "front gw1 3 its flows go on");

    core.set_balancer_status("front", seen(false, 0));
    let ran = core.run(&wait);
    let last = ran.err.lines().last().unwrap();
    assert_eq!((ran.code, words(last).join(" ")), (3, "front db1 0 gives it new flows".to_owned()));

    let mut silent = drained(0);
    silent.nodes[1].backends.clear();
    silent.nodes[1].applied = false;
    silent.nodes[1].message = "unreachable".to_owned();
    core.set_balancer_status("front", silent);
    let ran = core.run(&wait);
    let last = ran.err.lines().last().unwrap();
    assert_eq!(
        (ran.code, words(last).join(" ")),
        (3, "front db1 0 not applied: unreachable".to_owned())
    );

    core.set_balancer_status("front", drained(3));
    let mut child = cnsmo()
        .env("CNSMO_SOCKET", core.socket())
        .args(["drain", "web1", "--wait"])
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "3 flows left on 1 VMs that balance");
    core.set_balancer_status("front", drained(0));
    assert_eq!(lines.next().unwrap(), "0 flows left on 0 VMs that balance");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_file_is_deleted_balancers_first_and_policies_last() {
    let core = Fake::start();
    core.ok(&["apply", "-f", &example("three-tier.yaml")]);
    let deleted = core.ok(&["delete", "-f", &example("three-tier.yaml")]);
    let names: Vec<_> = deleted.lines().map(|line| words(line)[0]).collect();
    assert_eq!(names[..3], ["loadbalancer/front", "network/shop", "firewallpolicy/base"]);
    assert_eq!(names.len(), 6, "{deleted}");
    assert!(core.state().resources.is_empty());
}

#[test]
fn the_originals_rules_are_applied_under_a_name_to_a_target() {
    let core = Fake::start();
    let rules = example("original/rules.json");
    core.ok(&["apply", "-f", &rules, "--name", "legacy", "--target", "role=web"]);
    let policy = json_of(&core.ok(&["get", "fw", "legacy", "-o", "json"]));
    assert_eq!(policy["spec"]["target"], json!({"role": "web"}));
    assert_eq!(policy["spec"]["rules"].as_array().unwrap().len(), 4);

    let denyall = core.run(&["apply", "-f", &example("original/denyall.json")]);
    assert_eq!(denyall.out, "firewallpolicy/denyall created\nrevision 2\n");
    assert!(denyall.err.contains("dst_port is ignored"), "{}", denyall.err);

    for entry in std::fs::read_dir(example("original/bad")).unwrap() {
        let path = entry.unwrap().path().display().to_string();
        let ran = core.run(&["apply", "-f", &path]);
        assert_eq!((ran.code, core.state().revision), (1, 2), "{path}\n{}", ran.err);
    }
}

#[test]
fn diff_shows_the_changed_lines_and_commits_nothing() {
    let core = Fake::start();
    let file = core.write("web.yaml", WEB);
    core.ok(&["apply", "-f", &file]);
    assert_eq!(core.ok(&["diff", "-f", &file]), "firewallpolicy/web unchanged\n");
    let file = core.write("web.yaml", &WEB.replace("80", "81"));
    let diff = core.ok(&["diff", "-f", &file]);
    assert!(diff.starts_with("firewallpolicy/web updated\n"), "{diff}");
    let changed: Vec<_> = diff.lines().filter(|line| line.starts_with(['-', '+'])).collect();
    let trimmed: Vec<_> = changed.iter().map(|line| line.replace(' ', "")).collect();
    assert_eq!(trimmed, ["--80", "+-81"], "{diff}");
    assert_eq!(core.state().revision, 1);
}

#[test]
fn nodes_are_listed_with_where_they_enforce_and_what_they_run() {
    let core = Fake::start();
    core.add_node(node("vm1", "web", Phase::Ready));
    core.add_node(node("vm2", "db", Phase::Unreachable));
    let table = core.ok(&["nodes", "-l", "role=web"]);
    let rows: Vec<Vec<_>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(
        rows,
        [
            vec!["NAME", "PHASE", "APPLIED", "ATTACH", "ADDRESSES", "LABELS", "AGE"],
            vec![
                "vm1",
                "Ready",
                "4",
                "eth0:xdp-native/tcx",
                "10.77.1.11,fd77:1::11",
                "role=web",
                "-"
            ],
        ]
    );
    assert_eq!(core.ok(&["get", "node"]).lines().count(), 3);
    let nodes = json_of(&core.ok(&["nodes", "-o", "json"]));
    assert_eq!(nodes[1]["status"]["phase"], "Unreachable");
    assert_eq!(nodes[1]["status"]["firewall"]["drops"][0]["packets"], 7);
}

#[test]
fn describe_shows_status_and_counters() {
    let core = Fake::start();
    let file = core.write("web.yaml", WEB);
    core.ok(&["apply", "-f", &file]);
    let status = FirewallPolicyStatus {
        nodes: vec![NodePolicyStatus {
            node: "vm1".to_owned(),
            applied: false,
            message: "table full".to_owned(),
            rules: vec![RuleCounter {
                rule: "http".to_owned(),
                packets: 42,
                bytes: 4200,
                ..RuleCounter::default()
            }],
        }],
        conditions: vec![],
        peers: vec![],
    };
    for resource in core.state().resources.values_mut() {
        if let Some(Inner::FirewallPolicy(policy)) = &mut resource.resource {
            policy.status = Some(status.clone());
        }
    }
    let squeezed = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let policy = squeezed(core.ok(&["describe", "fw", "web"]));
    for part in [
        "Target: role=web",
        "http allow ingress any any tcp 80",
        "vm1 no table full",
        "vm1 http 42 4200",
    ] {
        assert!(policy.contains(part), "{part}\n{policy}");
    }
    core.add_node(node("vm1", "web", Phase::Ready));
    let node = squeezed(core.ok(&["describe", "node", "vm1"]));
    for part in ["Phase: Ready", "eth0 xdp-native tcx", "Flows: 12", "policy ingress 7 420"] {
        assert!(node.contains(part), "{part}\n{node}");
    }
    assert_eq!(core.run(&["describe", "fw", "nope"]).err, "error: no `nope`\n");
}

#[test]
fn delete_by_name_and_by_file() {
    let core = Fake::start();
    let node_labels = "---\nkind: Node\nmetadata: {name: vm1, labels: {role: web}}\n";
    let file = core.write("web.yaml", &format!("{WEB}{node_labels}"));
    core.ok(&["apply", "-f", &file]);
    assert_eq!(
        core.ok(&["delete", "-f", &file]),
        "firewallpolicy/web deleted\nnode/vm1 kept: delete it by its name\n"
    );
    assert_eq!(
        core.ok(&["delete", "-f", &file]).lines().next(),
        Some("firewallpolicy/web not there")
    );
    assert_eq!(core.ok(&["delete", "node", "vm1"]), "node/vm1 deleted\nrevision 3\n");
    assert_eq!(core.run(&["delete", "fw", "web"]).code, 1);
    for wrong in [&["delete"][..], &["delete", "fw"], &["delete", "fw", "web", "-f", &file]] {
        assert_eq!(core.run(wrong).code, 2, "{wrong:?}");
    }
}

fn pending(reason: &str) -> Vec<PendingNode> {
    let message = "lease expired".to_owned();
    vec![PendingNode { node: "vm2".to_owned(), reason: reason.to_owned(), message }]
}

#[test]
fn wait_ends_with_0_when_all_applied_and_3_with_those_that_did_not() {
    let core = Fake::start();
    let first = WaitAppliedResponse {
        nodes_applied: 1,
        pending: pending("Pending"),
        revision: 5,
        ..WaitAppliedResponse::default()
    };
    let good = WaitAppliedResponse {
        done: true,
        applied: true,
        nodes_applied: 2,
        revision: 5,
        ..first.clone()
    };
    let good = WaitAppliedResponse { pending: vec![], ..good };
    core.state().wait = vec![first.clone(), good];
    let ran = core.run(&["wait", "--revision", "5", "-l", "role=web", "--timeout", "5s"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, ""));
    assert_eq!(ran.err, "revision 5: applied by 1 of 2 VMs\nrevision 5: applied by 2 of 2 VMs\n");
    let waited = core.state().waited.take().unwrap();
    assert_eq!((waited.revision, waited.timeout.unwrap().seconds), (5, 5));
    assert_eq!(waited.selector["role"], "web");

    let bad = WaitAppliedResponse { done: true, pending: pending("Unreachable"), ..first };
    core.state().wait = vec![bad];
    let file = core.write("web.yaml", WEB);
    let ran = core.run(&["apply", "-f", &file, "--wait"]);
    assert_eq!(ran.code, 3);
    assert!(ran.out.ends_with("revision 1\n"), "{}", ran.out);
    let words: Vec<_> = ran.err.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(words, ["vm2", "Unreachable", "lease", "expired"]);
    assert_eq!(core.state().waited.take().unwrap().revision, 1);

    core.state().wait = vec![];
    let ran = core.run(&["wait"]);
    assert_eq!(ran.code, 1);
    assert_eq!(ran.err, "error: the core ended the wait without a result\n");
}

fn upsert(node: Node) -> WatchResponse {
    upserted(Inner::Node(node))
}

fn upserted(resource: Inner) -> WatchResponse {
    WatchResponse {
        event: Event::Upsert.into(),
        revision: 3,
        resource: Some(Resource { resource: Some(resource) }),
    }
}

fn synced() -> WatchResponse {
    WatchResponse { event: Event::Synced.into(), revision: 3, resource: None }
}

#[test]
fn wait_for_ready_looks_at_the_selected_vms() {
    let core = Fake::start();
    core.state().watch = vec![
        upsert(node("vm1", "web", Phase::Joining)),
        upsert(node("vm2", "db", Phase::Unreachable)),
        synced(),
        upsert(node("vm1", "web", Phase::Ready)),
    ];
    let ran = core.run(&["wait", "--ready", "-l", "role=web"]);
    assert_eq!((ran.code, ran.err.as_str()), (0, "0 of 1 VMs ready\n1 of 1 VMs ready\n"));
    let ran = core.run(&["wait", "--ready", "--timeout", "200ms"]);
    assert_eq!(ran.code, 3);
    let words: Vec<_> = ran.err.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(words, ["vm2", "Unreachable", "lease", "expired"]);
    let ran = core.run(&["wait", "--ready", "-l", "role=none", "--timeout", "200ms"]);
    assert_eq!(ran.code, 3);
    assert!(ran.err.contains("no VM has these labels"), "{}", ran.err);
}

#[test]
fn watch_prints_an_event_per_line_as_it_comes() {
    let core = Fake::start();
    core.state().watch = vec![upsert(node("vm1", "web", Phase::Ready)), synced()];
    let lines = |arguments: &[&str]| {
        let mut child = cnsmo()
            .env("CNSMO_SOCKET", core.socket())
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().take(2);
        let lines: Vec<_> = lines.map(Result::unwrap).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        lines
    };
    assert_eq!(
        lines(&["watch", "nodes"]),
        ["upsert         3 node/vm1 Ready applied=4", "synced         3"]
    );
    let metadata = |name: &str| Some(Metadata { name: name.to_owned(), ..Metadata::default() });
    core.state().watch = vec![
        upserted(Inner::LoadBalancer(LoadBalancer {
            metadata: metadata("front"),
            spec: None,
            status: Some(seen(false, 3)),
        })),
        upserted(Inner::Network(Network {
            metadata: metadata("shop"),
            spec: None,
            status: Some(network_status()),
        })),
    ];
    assert_eq!(
        lines(&["watch", "lb"]),
        [
            "upsert         3 loadbalancer/front backends=1/2 flows=3 applied=2/2",
            "upsert         3 network/shop ready=1/2 refused=1"
        ]
    );
    core.state().watch = vec![upsert(node("vm1", "web", Phase::Ready)), synced()];
    let events = lines(&["watch", "nodes", "-o", "json"]);
    let first = json_of(&events[0]);
    assert_eq!((&first["event"], &first["revision"]), (&json!("upsert"), &json!(3)));
    assert_eq!(first["resource"]["metadata"]["name"], "vm1");
    assert_eq!(json_of(&events[1]), json!({"event": "synced", "revision": 3}));
}

#[test]
fn labels_are_set_and_removed_and_the_others_stay() {
    let core = Fake::start();
    core.add_node(node("vm1", "web", Phase::Ready));
    assert_eq!(
        core.ok(&["label", "node", "vm1", "site=a", "tier=front"]),
        "node/vm1 role=web,site=a,tier=front\nrevision 1\n"
    );
    core.ok(&["label", "node", "vm1", "role-", "site=b"]);
    let labels =
        json_of(&core.ok(&["get", "node", "vm1", "-o", "json"]))["metadata"]["labels"].clone();
    assert_eq!(labels, json!({"site": "b", "tier": "front"}));
    assert_eq!(core.run(&["label", "node", "vm1", "role"]).code, 1);
    assert_eq!(core.run(&["label", "node", "vm9", "role=x"]).err, "error: no `vm9`\n");
}

#[test]
fn a_token_is_alone_on_standard_output_or_in_a_private_file() {
    let core = Fake::start();
    let ran = core.run(&["token", "create", "--ttl", "2h", "--max-uses", "5", "-l", "role=web"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, "cnsmo1.id.secret.pin\n"));
    let asked = core.state().token.take().unwrap();
    assert_eq!((asked.ttl.unwrap().seconds, asked.max_uses), (7200, 5));
    assert_eq!(asked.labels["role"], "web");

    let file = core.folder.path().join("token");
    let path = file.to_str().unwrap();
    let ran = core.run(&["token", "create", "--output", path]);
    assert_eq!((ran.code, ran.out.as_str()), (0, ""));
    assert!(!ran.err.contains("secret"), "{}", ran.err);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "cnsmo1.id.secret.pin\n");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let again = core.run(&["token", "create", "--output", path]);
    assert_eq!(again.code, 1);
    assert!(!again.err.contains("secret"), "{}", again.err);
}

#[test]
fn tokens_are_listed_and_withdrawn() {
    let core = Fake::start();
    let ran = core.run(&["token", "ls"]);
    assert_eq!(
        ran.out,
        "ID     ROLE    NAME  USES  EXPIRES               LABELS\n\
         early  viewer  -     2/5   2030-03-17T17:46:40Z  role=web\n\
         -late  agent   -     2/5   2030-03-17T17:46:40Z  role=web\n"
    );
    let listed: Value =
        serde_json::from_str(&core.run(&["token", "list", "-o", "json"]).out).unwrap();
    assert_eq!((&listed[1]["id"], &listed[1]["maxUses"]), (&json!("-late"), &json!(5)));
    let ran = core.run(&["token", "rm", "-late"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, "token -late deleted (revision 8)\n"));
    let ran = core.run(&["token", "rm", "other"]);
    assert_eq!((ran.code, ran.err.as_str()), (1, "error: id: there is no join token other\n"));
}

#[test]
fn an_existing_token_file_costs_no_token() {
    let core = Fake::start();
    let file = core.write("token", "old");
    assert_eq!(core.run(&["token", "create", "--output", &file]).code, 1);
    assert!(core.state().token.is_none());
    assert_eq!(std::fs::read_to_string(file).unwrap(), "old");
}

#[test]
fn a_core_that_cannot_be_reached_is_said_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("core.sock");
    let run = || Ran::of(cnsmo().arg("--socket").arg(&socket).arg("nodes"));
    let ran = run();
    assert_eq!(ran.code, 1);
    assert!(ran.err.contains("no socket at"), "{}", ran.err);
    assert!(ran.err.contains("is cnsmo-core running"), "{}", ran.err);

    // The socket of a program that has ended.
    drop(UnixListener::bind(&socket).unwrap());
    let ran = run();
    assert!(ran.err.contains("nobody listens on"), "{}", ran.err);
}

#[test]
fn what_the_core_refuses_is_said_without_noise() {
    let core = Fake::start();
    core.state().refuse = Some(Status::invalid_argument("spec.rules[0].name: no"));
    let file = core.write("web.yaml", WEB);
    let ran = core.run(&["apply", "-f", &file]);
    assert_eq!((ran.code, ran.err.as_str()), (1, "error: spec.rules[0].name: no\n"));
    core.state().refuse = Some(Status::internal("disk full"));
    let ran = core.run(&["apply", "-f", &file]);
    assert_eq!(ran.err, "error: the core answered Internal: disk full\n");
}

#[test]
fn usage_errors_end_with_2_and_the_rest_needs_no_core() {
    for wrong in [
        &["get", "pods"][..],
        &["apply"],
        &["wait", "--timeout", "60"],
        &["wait", "--timeout", "2h"],
        &["token", "create", "--max-uses", "0"],
        &["get", "fw", "Web"],
        &["apply", "-f", "x", "--wait", "--dry-run"],
    ] {
        assert_eq!(Ran::of(cnsmo().args(wrong)).code, 2, "{wrong:?}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let ran = Ran::of(cnsmo().args(["completions", shell]));
        assert!(ran.code == 0 && ran.out.contains("cnsmo"), "{shell}");
    }
    let version = Ran::of(cnsmo().arg("version")).out;
    assert_eq!(version, format!("cnsmo {}\n", env!("CARGO_PKG_VERSION")));
}
