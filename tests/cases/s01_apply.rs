//! One file makes a private network, a firewall, a balancer and a service; the same file again does nothing.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Command,
};

use cnsmo_tests::{PinDir, sweep};

use super::{
    lab::{Lab, PATIENCE as PACKETS, PEER4, SILENCE, VM4},
    programs::{Core, program, run, until},
};

const FILE: &str = "
kind: Network
metadata: {name: shop}
spec:
  ipv4: 10.90.0.0/24
  addresses: {vm1: {ipv4: 10.90.0.11}, vm2: {ipv4: 10.90.0.12}}
---
kind: LoadBalancer
metadata: {name: front}
spec:
  network: shop
  addresses: [10.90.0.80]
  ports: [{protocol: tcp, port: 80, targetPort: 8080}]
  backends: {role: web}
---
kind: FirewallPolicy
metadata: {name: web}
spec:
  target: {role: web}
  defaults: {ingress: deny, egress: allow}
  rules:
    - {name: http, action: allow, direction: ingress, from: [10.90.0.0/24], protocol: tcp, ports: [8080]}
---
kind: Deployment
metadata: {name: page}
spec:
  placement: {selector: {role: web}}
  process: {command: [/bin/sleep, '605'], user: nobody}
";
const OWN: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 90, 0, 11));
const VIRTUAL: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 90, 0, 80));

#[tokio::test]
async fn s01_one_file_deploys_everything_and_again_changes_nothing() {
    sweep();
    let lab = Lab::new("s01");
    let core = Core::start_by("s01", |path: PathBuf| {
        let mut command = lab.peer.command(path).unwrap();
        command.args(["--listen", &SocketAddr::new(PEER4, 0).to_string()]);
        command
    });
    let pins = PinDir::new("s01-peer");
    let agents = [
        core.agent(&lab.vm, &lab.pins, "vm1", &["--label", "role=web"]),
        core.agent(&lab.peer, &pins, "vm2", &["--label", "role=client"]),
    ];
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let server = lab.listen(&lab.vm, any, 8080);
    let other = lab.listen(&lab.vm, any, 8081);
    let ssh = lab.listen(&lab.vm, any, 22);
    let port = |listener: &std::net::TcpListener| listener.local_addr().unwrap().port();
    let opens = |to: IpAddr, port: u16, limit| {
        lab.connect(&lab.peer, SocketAddr::new(to, port), limit).is_ok()
    };
    // Without it: everything is open, and there is neither network nor balancer.
    assert!(opens(VM4, port(&server), PACKETS) && opens(VM4, port(&other), PACKETS));
    assert!(!opens(VIRTUAL, 80, SILENCE) && !opens(OWN, port(&server), SILENCE));

    let file = core.folder().join("all.yaml");
    fs::write(&file, FILE).unwrap();
    let apply = ["apply", "-f", file.to_str().unwrap(), "--wait"];
    let before = core.cnsmo_json(&["status"])["revision"].as_u64().unwrap();
    let applied = core.cnsmo(&apply);
    assert_eq!(applied.matches("created").count(), 4, "{applied}");
    let history = core.cnsmo_json(&["history"]);
    let newest = history[0]["revision"].as_u64().unwrap();
    assert!(newest > before && history[1].is_null(), "one revision: {history}");
    until("the tunnel", async || opens(OWN, port(&server), SILENCE).then_some(())).await;
    until("the balancer", async || opens(VIRTUAL, 80, SILENCE).then_some(())).await;
    assert!(!opens(OWN, port(&other), SILENCE), "the policy");
    assert!(!opens(VM4, port(&server), SILENCE), "beside the network");
    assert!(opens(VM4, port(&ssh), PACKETS), "a default closes no failsafe port");
    let page = core.cnsmo_json(&["get", "deployments", "page"]);
    assert_eq!(page["status"]["ready"], 1, "it was waited for");

    // Nothing is committed by it, and nothing is sent to the VMs.
    core.cnsmo(&["wait"]);
    let applied_on = |core: &Core| core.cnsmo_json(&["get", "node", "vm1"])["metadata"].clone();
    let (settled, node) = (core.cnsmo_json(&["history"]), applied_on(&core));
    let said = core.cnsmo(&apply);
    assert_eq!(said.matches("unchanged").count(), 4, "{said}");
    assert_eq!((core.cnsmo_json(&["history"]), applied_on(&core)), (settled, node));
    let mut diff = Command::new(program("cnsmo"));
    diff.env("CNSMO_SOCKET", core.socket()).args(["diff", "-f"]).arg(&file);
    let diff = run(&mut diff);
    assert!(diff.lines().all(|line| line.ends_with("unchanged")), "{diff}");
    // A rule that names the port does.
    let rules = "  rules:\n    - {name: ssh, action: deny, direction: ingress, protocol: tcp, ports: [22]}\n";
    fs::write(&file, FILE.replace("  rules:\n", rules)).unwrap();
    core.cnsmo(&apply);
    assert!(!opens(VM4, port(&ssh), SILENCE) && opens(OWN, port(&server), PACKETS));
    // What cannot become ready is waited for in vain.
    fs::write(
        &file,
        FILE.replace("spec:\n  placement", "spec:\n  needs: [db]\n  replicas: 2\n  placement"),
    )
    .unwrap();
    let mut waits = Command::new(program("cnsmo"));
    waits.env("CNSMO_SOCKET", core.socket()).args(apply).args(["--timeout", "2s"]);
    let waits = waits.output().unwrap();
    let why = String::from_utf8(waits.stderr).unwrap();
    assert!(waits.status.code() == Some(3) && why.contains("db: 0 of 1"), "{why}");

    core.cnsmo(&["delete", "deployment", "page", "--wait"]);
    let left = core.cnsmo_json(&["services", "--service", "page"]);
    assert_eq!(left.as_array().unwrap().len(), 0);
    drop(agents);
}
