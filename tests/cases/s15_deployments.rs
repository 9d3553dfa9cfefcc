//! Instances of a service on a VM: placed, scaled, replaced and ended by the core, whoever is killed meanwhile.

use std::{
    cell::Cell, collections::BTreeSet, fs, net::SocketAddr, path::PathBuf, process::Command,
};

use cnsmo_tests::{Process, sweep};
use serde_json::Value;

use super::{
    lab::{Lab, PATIENCE as PACKETS, PEER4, SILENCE, VM4},
    programs::{Core, program, until},
};

/// Accepts connections one after the other, on any address.
const SERVER: &str = "import socket,sys; s=socket.create_server(('0.0.0.0', int(sys.argv[1])));
while True:
  c,_=s.accept()
  while c.recv(100): pass
  c.close()";

fn deployment(name: &str, replicas: u32, version: u32, needs: &str) -> String {
    let server = SERVER.replace('\n', "\n        ");
    format!(
        "kind: Deployment
metadata: {{name: {name}}}
spec:
  replicas: {replicas}
  needs: [{needs}]
  ports: [{{name: main}}]
  attributes: {{version: '{version}'}}
  drainTimeout: 5s
  process:
    user: nobody
    command:
      - /usr/bin/python3
      - -c
      - |
        {server}
      - ${{PORT_MAIN}}
    readiness: {{tcp: main, interval: 100ms}}
    stopTimeout: 1s
---
"
    )
}

struct Fleet {
    lab: Lab,
    core: Core,
}

impl Fleet {
    fn new(name: &str) -> Self {
        let lab = Lab::new(name);
        let core = Core::start_by(name, |path: PathBuf| {
            let mut command = lab.peer.command(path).unwrap();
            command.args(["--listen", &SocketAddr::new(PEER4, 0).to_string()]);
            command.args(["--heartbeat", "200ms", "--lease", "1s"]);
            command
        });
        Self { lab, core }
    }

    fn agent(&self, log: &str) -> Process {
        let mut command = self.lab.vm.command(program("cnsmo-agent")).unwrap();
        command.arg("--core").arg(self.core.address().to_string());
        if log == "first.log" {
            command.arg("--token-file").arg(self.core.token("agent", "vm1"));
        }
        command.arg("--state-dir").arg(self.core.folder().join("vm1"));
        command.arg("--bpffs").arg(self.lab.pins.path()).env_remove("CNSMO_LOG");
        command.args(["--interface", "eth0", "--flows", "4096", "--node", "vm1"]);
        Process::spawn(log, &mut command, &self.core.folder().join(log)).unwrap()
    }

    fn apply(&self, text: &str) -> u64 {
        let file = self.core.folder().join("web.yaml");
        fs::write(&file, text).unwrap();
        let applied = self.core.cnsmo_json(&["apply", "-f", file.to_str().unwrap()]);
        applied["revision"].as_u64().unwrap()
    }

    fn instances(&self, deployment: &str) -> Vec<Value> {
        let all = self.core.cnsmo_json(&["get", "deployments", deployment]);
        all["status"]["instances"].as_array().unwrap().clone()
    }

    /// As many as that, all of them ready, and as the deployment shall be.
    async fn complete(&self, deployment: &str, count: u64) -> Vec<Value> {
        until(&format!("{count} of {deployment}"), async || {
            let one = self.core.cnsmo_json(&["get", "deployments", deployment]);
            let status = &one["status"];
            let counts = ["desired", "placed", "ready", "updated"].map(|n| status[n].as_u64());
            (counts == [Some(count); 4]).then(|| status["instances"].as_array().unwrap().clone())
        })
        .await
    }

    /// Processes of the deployment, as the agent knows them.
    fn pids(&self, deployment: &str) -> BTreeSet<u64> {
        let all = self.core.cnsmo_json(&["service", "list", "--node", "vm1"]);
        let all = all.as_array().unwrap().iter().filter(|one| one["service"] == deployment);
        all.map(|one| one["pid"].as_u64().unwrap()).collect()
    }

    fn answers(&self, instance: &Value) -> bool {
        let port = u16::try_from(instance["ports"][0]["port"].as_u64().unwrap()).unwrap();
        self.lab.connect(&self.lab.peer, SocketAddr::new(VM4, port), PACKETS).is_ok()
    }
}

/// Time and number of ready instances, once and again.
async fn fewest_ready(fleet: &Fleet, deployment: &str, version: &str) -> usize {
    let fewest = Cell::new(usize::MAX);
    until("the new version", async || {
        let all = fleet.core.cnsmo_json(&["services", "--service", deployment]);
        let all = all.as_array().unwrap();
        let ready: Vec<_> = all.iter().filter(|one| one["phase"] == "ready").collect();
        fewest.set(fewest.get().min(ready.len()));
        let is_new = |one: &Value| one["attributes"]["version"] == version;
        (ready.len() == all.len() && all.iter().all(is_new)).then_some(())
    })
    .await;
    fewest.get()
}

#[tokio::test]
async fn s15_instances_are_placed_scaled_replaced_and_ended_whoever_is_killed() {
    sweep();
    let fleet = Fleet::new("s15");
    let mut agent = fleet.agent("first.log");
    let refused = [deployment("a", 1, 1, "b"), deployment("b", 1, 1, "a")].concat();
    fs::write(fleet.core.folder().join("circle.yaml"), refused).unwrap();
    let mut circle = Command::new(program("cnsmo"));
    circle.env("CNSMO_SOCKET", fleet.core.socket()).arg("apply").arg("-f");
    let circle = circle.arg(fleet.core.folder().join("circle.yaml")).output().unwrap();
    let text = String::from_utf8(circle.stderr).unwrap();
    assert!(!circle.status.success() && text.contains("a needs b needs a"), "{text}");

    // What is needed comes first, whatever the file says.
    fleet.apply(&deployment("web", 2, 1, "db"));
    let waiting = until("a reason", async || {
        let text = fleet.core.cnsmo(&["describe", "deployment", "web"]);
        text.contains("db: 0 of 1 instances are ready").then_some(())
    });
    waiting.await;
    assert!(fleet.instances("web").is_empty());
    fleet.apply(&deployment("db", 1, 1, ""));
    let web = fleet.complete("web", 2).await;
    assert!(web.iter().all(|one| fleet.answers(one)));
    let ports: BTreeSet<_> = web.iter().map(|one| one["ports"][0]["port"].to_string()).collect();
    assert_eq!(ports.len(), 2);

    // The orchestrator is killed at any moment; what it had begun goes on.
    for count in [4, 1, 3] {
        fleet.core.cnsmo(&["scale", &format!("web={count}")]);
        fleet.core.cnsmo(&["service", "kill", "orchestrator", "--node", "core"]);
        fleet.complete("web", count).await;
    }
    let three = fleet.core.cnsmo_json(&["status"])["revision"].as_u64().unwrap();

    // Without the agent they run on, and the next one takes them up.
    let pids = fleet.pids("web");
    assert_eq!(pids.len(), 3);
    agent.kill().unwrap();
    let web = fleet.instances("web");
    assert!(web.iter().all(|one| fleet.answers(one)));
    drop(agent);
    let agent = fleet.agent("second.log");
    until("the same processes", async || {
        let mut list = Command::new(program("cnsmo"));
        list.env("CNSMO_SOCKET", fleet.core.socket()).args(["service", "list", "--node", "vm1"]);
        let is_there = list.output().unwrap().status.success();
        (is_there && fleet.pids("web") == pids).then_some(())
    })
    .await;
    fleet.complete("web", 3).await;

    // Another version: never fewer than two at a time.
    fleet.apply(&deployment("web", 3, 2, "db"));
    assert!(fewest_ready(&fleet, "web", "2").await >= 2);
    fleet.complete("web", 3).await;
    assert!(fleet.pids("web").is_disjoint(&pids));

    // Back to what it was, by number.
    fleet.core.cnsmo(&["scale", "web=1"]);
    fleet.complete("web", 1).await;
    fleet.core.cnsmo(&["rollback", &three.to_string()]);
    let web = fleet.complete("web", 3).await;
    fleet.core.cnsmo(&["delete", "deployment", "web"]);
    until("their end", async || {
        let left = fleet.core.cnsmo_json(&["services", "--service", "web"]);
        left.as_array().unwrap().is_empty().then_some(())
    })
    .await;
    for one in &web {
        let port = u16::try_from(one["ports"][0]["port"].as_u64().unwrap()).unwrap();
        let address = SocketAddr::new(VM4, port);
        assert!(fleet.lab.connect(&fleet.lab.peer, address, SILENCE).is_err());
    }
    assert_eq!(fleet.pids("web").len(), 0);
    fleet.core.cnsmo(&["delete", "deployment", "db"]);
    until("the end of all", async || fleet.pids("db").is_empty().then_some(())).await;
    drop(agent);
}

/// Counts its lives in a file of its own, and says which one this is.
const TALKS: &str = "kind: Deployment
metadata: {name: talk}
spec:
  drainTimeout: 0s
  process:
    command:
      - /bin/sh
      - -c
      - |
        echo x >> lives; n=$(wc -l < lives); trap 'echo \"end $n\"; exit 0' TERM
        echo \"life $n of $INSTANCE\"; echo \"error $n\" >&2
        while :; do sleep 0.1; done
";

#[tokio::test]
async fn s15_what_an_instance_writes_is_read_over_its_restarts_and_the_agents() {
    sweep();
    let fleet = Fleet::new("s15-logs");
    let mut agent = fleet.agent("first.log");
    fleet.apply(TALKS);
    let all = fleet.complete("talk", 1).await;
    let name = all[0]["name"].as_str().unwrap().to_owned();
    let life = |n: u32| format!("life {n} of {name}");
    let logs = |arguments: &[&str]| fleet.core.cnsmo(&[&["logs", "talk"][..], arguments].concat());
    let says = async |expected: Vec<String>| {
        let expected = expected.join("\n") + "\n";
        until(&expected, async || (logs(&[]) == expected).then_some(())).await;
    };
    // Standard output, then error.
    says(vec![life(1), "error 1".into()]).await;

    // What an earlier life said stays, up to its last word.
    let restart = ["service", "restart", "talk", "--node", "vm1", "--instance", &name];
    fleet.core.cnsmo(&restart);
    let two = vec![life(1), "end 1".into(), life(2), "error 1".into(), "error 2".into()];
    says(two.clone()).await;

    // The next agent has it all.
    agent.kill().unwrap();
    drop(agent);
    let agent = fleet.agent("second.log");
    until("the next agent", async || {
        let mut command = Command::new(program("cnsmo"));
        command.env("CNSMO_SOCKET", fleet.core.socket()).args(["logs", "talk"]);
        command.output().unwrap().status.success().then_some(())
    })
    .await;
    says(two).await;
    fleet.core.cnsmo(&restart);
    let three: Vec<_> = (1..=3).map(|n| format!("error {n}")).collect();
    let said = [life(1), "end 1".into(), life(2), "end 2".into(), life(3)];
    says([said.to_vec(), three].concat()).await;

    assert_eq!(logs(&["--tail", "1", "--instance", &name]), format!("{}\nerror 3\n", life(3)));
    let last = logs(&["--tail", "1", "-o", "json"]);
    let last: Vec<Value> = last.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(last[0]["stream"] == "stdout" && last[1]["stream"] == "stderr", "{last:?}");
    assert_eq!(last[1]["text"], "error 3");
    assert!(last.iter().all(|line| line["time"].as_str().is_some_and(|time| time.contains('T'))));

    fleet.core.cnsmo(&["delete", "deployment", "talk", "--wait"]);
    let mut gone = Command::new(program("cnsmo"));
    let gone = gone.env("CNSMO_SOCKET", fleet.core.socket()).args(["logs", "talk"]);
    let gone = gone.output().unwrap();
    let text = String::from_utf8(gone.stderr).unwrap();
    assert!(!gone.status.success() && text.contains("no instance of talk"), "{text}");
    drop(agent);
}
