//! The services of a core and of a VM: each can be stopped and killed alone, and packets are judged all the while.

use std::{
    ffi::OsStr,
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use cnsmo_tests::{Process, sweep};
use serde_json::Value;

use super::{
    lab::{Lab, PATIENCE as PACKETS, PEER4, SILENCE, VM4},
    programs::{Core, PATIENCE, json, program, run, until},
};

const POLICY: &str = "
kind: FirewallPolicy
metadata: {name: web}
spec:
  defaults: {ingress: deny, egress: allow}
  rules:
    - {name: http, action: allow, direction: ingress, protocol: tcp, ports: [PORTS]}
";

/// Service and phase of instances.
fn phases(instances: &Value) -> Vec<(String, String)> {
    let text = |one: &Value, field: &str| one[field].as_str().unwrap().to_owned();
    let all = instances.as_array().unwrap().iter();
    all.map(|one| (text(one, "service"), text(one, "phase"))).collect()
}

fn all(services: &[&str], phase: &str) -> Vec<(String, String)> {
    services.iter().map(|service| ((*service).to_owned(), phase.to_owned())).collect()
}

/// What happened to the instances of a service from a revision on.
fn events(core: &Core, service: &str, from: u64) -> Vec<String> {
    let told = core.cnsmo(&[
        "-o",
        "json",
        "events",
        "--kind",
        "instance",
        "--from",
        &from.to_string(),
        service,
    ]);
    let lines = told.lines().map(json);
    lines.filter_map(|event| Some(event["what"].as_str()?.to_owned())).collect()
}

fn revision(core: &Core) -> u64 {
    core.cnsmo_json(&["status"])["revision"].as_u64().unwrap()
}

#[tokio::test]
async fn s08_a_core_has_its_own_agent_and_what_is_killed_of_it_is_back() {
    let core = Core::start("s08");
    let services = ["bus", "catalogue", "identity", "orchestrator", "state"];
    let listed = phases(&core.cnsmo_json(&["services", "--host", "core"]));
    assert_eq!(listed, all(&services, "ready"));
    for service in services {
        let from = revision(&core) + 1;
        core.cnsmo(&["service", "kill", service, "--node", "core"]);
        core.cnsmo(&["kv", "put", "s08", service]);
        let seen = until("the service, ready again", async || {
            let seen = events(&core, service, from);
            (seen.last().map(String::as_str) == Some("Ready")).then_some(seen)
        })
        .await;
        assert_eq!(seen, ["Failed", "Starting", "Ready"], "{service}");
    }
    core.cnsmo(&["service", "stop", "bus", "--node", "core"]);
    let mut publish = Command::new(program("cnsmo"));
    publish.env("CNSMO_SOCKET", core.socket()).args(["bus", "publish", "a.b", "x"]);
    let refused = String::from_utf8(publish.output().unwrap().stderr).unwrap();
    assert!(refused.contains("service bus of this core is stopped on request"), "{refused}");
    core.cnsmo(&["service", "start", "bus"]);
    run(&mut publish);
}

#[tokio::test]
async fn s03_a_service_of_somebody_else_takes_every_step_of_its_life() {
    let core = Core::start("s03");
    let from = revision(&core) + 1;
    let mut command = Command::new(program("examples/greeter"));
    command.arg(core.socket()).arg("greeter-1");
    let mut greeter =
        Process::spawn("greeter", &mut command, &core.folder().join("greeter.log")).unwrap();
    let reply = until("a reply", async || {
        let mut ask = Command::new(program("cnsmo"));
        ask.env("CNSMO_SOCKET", core.socket()).args(["bus", "request", "svc.greeter", "you"]);
        let output = ask.output().unwrap();
        // Nobody subscribes yet.
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    })
    .await;
    assert_eq!(reply.trim(), "hello, you");
    greeter.terminate(PATIENCE).unwrap();
    let seen = until("its end", async || {
        let seen = events(&core, "greeter", from);
        (seen.last().map(String::as_str) == Some("Deleted")).then_some(seen)
    })
    .await;
    assert_eq!(seen, ["Installing", "Starting", "Ready", "Draining", "Stopped", "Deleted"]);
}

struct Vm {
    lab: Lab,
    core: Core,
    state: PathBuf,
}

impl Vm {
    fn new() -> Self {
        let lab = Lab::new("s17");
        let core = Core::start_by("s17", |path: PathBuf| {
            let mut command = lab.peer.command(path).unwrap();
            command.args(["--listen", &SocketAddr::new(PEER4, 0).to_string()]);
            command
        });
        let state = core.folder().join("vm1");
        Self { lab, core, state }
    }

    fn agent(&self, log: &str, more: &[&OsStr]) -> Process {
        let mut command = self.lab.vm.command(program("cnsmo-agent")).unwrap();
        command.arg("--core").arg(self.core.address().to_string()).arg("--state-dir");
        command.arg(&self.state).arg("--bpffs").arg(self.lab.pins.path()).args(more);
        command.args(["--interface", "eth0", "--flows", "4096", "--node", "vm1"]);
        command.env_remove("CNSMO_LOG");
        Process::spawn(log, &mut command, &self.core.folder().join(log)).unwrap()
    }

    fn apply(&self, ports: &str, wait: bool) {
        let file = self.core.folder().join("policy.yaml");
        fs::write(&file, POLICY.replace("PORTS", ports)).unwrap();
        let wait: &[&str] = if wait { &["--wait"] } else { &[] };
        self.core.cnsmo(&[&["apply", "-f", path(&file)], wait].concat());
    }

    /// The service agents of the VM, as the core knows them.
    fn services(&self) -> Vec<(String, String)> {
        phases(&self.core.cnsmo_json(&["agents", "--host", "vm1"]))
    }

    async fn until(&self, expected: Vec<(String, String)>) {
        let found = async || (self.services() == expected).then_some(());
        until(&format!("{expected:?}"), found).await;
    }

    fn opens(&self, listener: &TcpListener, limit: Duration) -> bool {
        self.lab.connect(&self.lab.peer, listener.local_addr().unwrap(), limit).is_ok()
    }

    /// By the agent's own socket.
    fn here(&self, arguments: &[&str]) -> String {
        let socket = self.state.join("agent.sock");
        let mut command = Command::new(program("cnsmo"));
        run(command.env("CNSMO_SOCKET", socket).args(["service"]).args(arguments))
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

const SERVICES: [&str; 3] = ["firewall", "loadbalancer", "vpn"];

#[tokio::test]
async fn s17_each_service_of_a_vm_is_stopped_and_killed_alone_while_packets_are_judged() {
    sweep();
    let vm = Vm::new();
    assert_eq!(vm.core.cnsmo_json(&["agents"]), Value::Array(Vec::new()));
    let token = vm.core.token("agent", "vm1");
    let mut process = vm.agent("agent.log", &["--token-file".as_ref(), token.as_os_str()]);
    vm.until(all(&SERVICES, "ready")).await;
    let agents = vm.core.cnsmo_json(&["agents"]);
    assert_eq!(agents.as_array().unwrap().iter().map(|a| &a["name"]).collect::<Vec<_>>(), ["vm1"]);
    vm.apply("80", true);
    let listeners = [80, 81].map(|port| vm.lab.listen(&vm.lab.vm, VM4, port));
    let [open, shut] = &listeners;
    assert!(vm.opens(open, PACKETS) && !vm.opens(shut, SILENCE));

    // A second one on this VM.
    let mut second = vm.agent("second.log", &["--only".as_ref(), "firewall".as_ref()]);
    second.wait_for("runs the services of this VM", PATIENCE).unwrap();
    assert!(second.output().unwrap().contains(&format!("process {}", process.id())));

    for killed in SERVICES {
        let from = revision(&vm.core) + 1;
        vm.core.cnsmo(&["service", "kill", killed, "--node", "vm1"]);
        assert!(vm.opens(open, PACKETS) && !vm.opens(shut, SILENCE), "{killed}");
        let seen = until("the service, ready again", async || {
            let seen = events(&vm.core, &format!("{killed}/vm1"), from);
            (seen.last().map(String::as_str) == Some("Ready")).then_some(seen)
        })
        .await;
        assert_eq!(seen, ["Failed", "Starting", "Ready"], "{killed}");
        for other in SERVICES.into_iter().filter(|other| *other != killed) {
            assert!(events(&vm.core, &format!("{other}/vm1"), from).is_empty(), "{other}");
        }
    }

    // Stopped: its policy stays in force, and a new one waits until it is started, here on the VM.
    vm.core.cnsmo(&["service", "stop", "firewall", "--node", "vm1"]);
    vm.apply("80, 81", false);
    let policy = until("the policy, not applied", async || {
        let policy = vm.core.cnsmo(&["describe", "firewallpolicies", "web"]);
        policy.contains("service firewall does not run").then_some(policy)
    })
    .await;
    assert!(vm.opens(open, PACKETS) && !vm.opens(shut, SILENCE), "{policy}");
    let stopped = vm.here(&["list"]);
    assert!(stopped.lines().any(|line| line.contains("firewall") && line.contains("stopped")));
    vm.here(&["start", "firewall"]);
    vm.core.cnsmo(&["wait"]);
    assert!(vm.opens(shut, PACKETS));

    // Without its agent: judged as before, and unreachable to the core.
    process.kill().unwrap();
    assert!(vm.opens(open, PACKETS));
    vm.until(all(&SERVICES, "unreachable")).await;
    let process = vm.agent("third.log", &["--only".as_ref(), "firewall".as_ref()]);
    vm.until(all(&["firewall"], "ready")).await;
    assert!(vm.opens(shut, PACKETS));
    drop(process);
}
