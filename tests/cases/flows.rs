//! What operators see of packets, by way of the core: agents in namespaces, real sockets, the command line.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use cnsmo_tests::{Process, sweep};
use serde_json::Value;

use super::{
    lab::{Lab, PATIENCE as PACKETS, PEER4, SILENCE, VM4},
    programs::{Core, PATIENCE, program, until},
};

const POLICY: &str = "kind: FirewallPolicy
metadata: {name: web}
spec:
  defaults: {ingress: deny, egress: allow}
  rules:
    - {name: open, action: allow, direction: ingress, protocol: tcp, ports: [80], log: true}
    - {name: shut, action: reject, direction: ingress, protocol: tcp, ports: [81]}
";

#[tokio::test]
async fn flows_shows_what_happened_to_packets_and_why() {
    sweep();
    let lab = Lab::new("flows");
    let core = Core::start_by("flows", |path: PathBuf| {
        let mut command = lab.peer.command(path).unwrap();
        command.args(["--listen", &SocketAddr::new(PEER4, 0).to_string()]);
        command
    });
    let mut command = lab.vm.command(program("cnsmo-agent")).unwrap();
    command.arg("--core").arg(core.address().to_string());
    command.arg("--token-file").arg(core.token("agent", "vm1"));
    command.arg("--state-dir").arg(core.folder().join("vm1"));
    command.arg("--bpffs").arg(lab.pins.path());
    command.args(["--node", "vm1", "--interface", "eth0", "--flows", "4096"]);
    command.env_remove("CNSMO_LOG");
    let log = core.folder().join("agent.log");
    let mut agent = Process::spawn("cnsmo-agent", &mut command, &log).unwrap();
    agent.wait_for("connected to the core", PATIENCE).unwrap();
    let file = core.folder().join("policy.yaml");
    fs::write(&file, POLICY).unwrap();
    core.cnsmo(&["apply", "-f", file.to_str().unwrap(), "--wait"]);

    let listener = lab.listen(&lab.vm, VM4, 80);
    let connect = |port, limit| lab.connect(&lab.peer, (VM4, port).into(), limit);
    connect(80, PACKETS).unwrap();
    listener.accept().unwrap();
    let refused = connect(81, PACKETS).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(connect(82, SILENCE).unwrap_err().kind(), io::ErrorKind::TimedOut);

    let seen = |arguments: &[&str]| -> Vec<Value> {
        let all = [&["flows", "--node", "vm1", "-o", "json"], arguments].concat();
        let lines = core.cnsmo(&all);
        let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap());
        // The session with the core is a flow of its own.
        lines.filter(|record: &Value| record["source"] == PEER4.to_string()).collect()
    };
    let of = |records: &[Value], port: u16| {
        let of = records.iter().find(|record| record["ports"][1] == port).cloned();
        of.unwrap_or_default()
    };
    let all = until("three records", async || {
        let all = seen(&[]);
        (of(&all, 82) != Value::Null).then_some(all)
    })
    .await;
    let brief = |port| {
        let record = of(&all, port);
        ["verdict", "reason", "policy", "rule"]
            .map(|key| record[key].as_str().unwrap_or("-").to_owned())
    };
    assert_eq!(brief(80), ["allowed", "-", "web", "open"]);
    assert_eq!(brief(81), ["rejected", "denied", "web", "shut"]);
    assert_eq!(brief(82), ["dropped", "denied-by-default", "-", "-"]);

    until("the first report, with the addresses of the VM", async || {
        let node = core.cnsmo(&["get", "node", "vm1", "-o", "json"]);
        let node: Value = serde_json::from_str(&node).unwrap();
        node["status"]["addresses"][0].is_string().then_some(())
    })
    .await;
    let explain = |to: &str| {
        let mut command = Command::new(program("cnsmo"));
        command.env("CNSMO_SOCKET", core.socket());
        let from = PEER4.to_string();
        let output = command.args(["explain", "--from", &from, "--to", to, "-o", "json"]).output();
        let output = output.unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        let said: Value = serde_json::from_slice(&output.stdout).expect(&errors);
        let step = |key: &str| said["steps"][0][key].as_str().unwrap_or("-").to_owned();
        let words = ["node", "verdict", "reason", "policy", "rule", "destination"].map(step);
        (output.status.code(), words)
    };
    let (vm, to) = ("vm1", |port: u16| SocketAddr::new(VM4, port).to_string());
    let words = |words: [&str; 6]| words.map(str::to_owned);
    let open = words([vm, "passes", "-", "web", "open", &to(80)]);
    assert_eq!(explain("vm1:80"), (Some(0), open));
    let shut = words([vm, "rejected", "denied", "web", "shut", &to(81)]);
    assert_eq!(explain("vm1:81/tcp"), (Some(4), shut));
    let default = words([vm, "dropped", "denied-by-default", "-", "-", &to(82)]);
    assert_eq!(explain(&to(82)), (Some(4), default));

    // What a change would do to a connection that is there, and that it does nothing yet.
    let kept = connect(80, PACKETS).unwrap();
    let kept = [kept, listener.accept().unwrap().0];
    let from = kept[0].local_addr().unwrap().to_string();
    let next = core.folder().join("next.yaml");
    fs::write(&next, POLICY.replace("ports: [80]", "ports: [8080]")).unwrap();
    let preview = |file: &Path| -> Value {
        let file = file.to_str().unwrap();
        let said = ["apply", "-f", file, "--dry-run", "--against-flows", "-o", "json"];
        serde_json::from_str(&core.cnsmo(&said)).unwrap()
    };
    assert_eq!(preview(&file)["impacts"], Value::Null, "no VM gets another policy");
    let impact = preview(&next)["impacts"][0].take();
    assert_eq!((&impact["node"], &impact["refused"]), (&"vm1".into(), &Value::Null));
    let cut = impact["flows"].as_array().unwrap();
    let is_kept = |flow: &&Value| flow["source"] == from;
    let ended = cut.iter().find(is_kept).unwrap();
    assert_eq!((&ended["rule"], &ended["cutByDefault"]), (&"open".into(), &true.into()));
    let live: Value =
        serde_json::from_str(&core.cnsmo(&["flows", "--node", "vm1", "--live", "-o", "json"]))
            .unwrap();
    let found = live.as_array().unwrap().iter().find(is_kept).unwrap();
    assert_eq!((&found["state"], &found["rule"]), (&"established".into(), &"open".into()));

    until("the time of the last hit", async || {
        let policy = core.cnsmo_json(&["get", "fw", "web"]);
        let rules = policy["status"]["nodes"][0]["rules"].as_array()?.clone();
        let is_hit = |rule: &Value| rule["lastHitTime"].is_string() && rule["packets"] != 0;
        (rules.len() == 2 && rules.iter().all(is_hit)).then_some(())
    })
    .await;

    let dropped = seen(&["--dropped"]);
    assert_eq!(of(&dropped, 80), Value::Null);
    assert_ne!(of(&dropped, 81), Value::Null);
    assert_eq!(seen(&["--tail", "1"]).len(), 1);
    let mut unknown = Command::new(program("cnsmo"));
    unknown.env("CNSMO_SOCKET", core.socket()).args(["flows", "--node", "vm9"]);
    let unknown = unknown.output().unwrap();
    let message = String::from_utf8(unknown.stderr).unwrap();
    assert!(message.contains("node vm9 is not connected to this core"), "{message}");
    assert!(!unknown.status.success());
}
