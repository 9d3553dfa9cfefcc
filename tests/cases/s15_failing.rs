//! An instance that cannot run on its VM goes to another one; one that is out of sight stays.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use cnsmo_tests::{Netns, PinDir, Process, sweep};
use serde_json::Value;

use super::{
    lab::{Lab, PEER4},
    programs::{Core, PATIENCE, program, until},
};

/// Runs where a file says so. Two of them: one may go elsewhere.
const FILE: &str = "
kind: Deployment
metadata: {name: moves}
spec:
  placement: {rescheduleAfter: 3s}
  process:
    command: [/bin/sh, -c, 'test -e \"$0\" || exit 1; exec sleep 606', 'FOLDER/good-${NODE}']
---
kind: Deployment
metadata: {name: stays}
spec:
  placement: {rescheduleAfter: 0s, selector: {first: 'yes'}}
  process:
    command: [/bin/sh, -c, 'test -e \"$0\" || exit 1; exec sleep 607', 'FOLDER/good-${NODE}']
";

fn agent(core: &Core, netns: &Netns, name: &str, pins: &Path) -> Process {
    let mut command = netns.command(program("cnsmo-agent")).unwrap();
    command.arg("--core").arg(core.address().to_string());
    command.arg("--token-file").arg(core.token("agent", name));
    command.arg("--state-dir").arg(core.folder().join(name));
    command.arg("--bpffs").arg(pins).env_remove("CNSMO_LOG");
    command.args(["--node", name, "--interface", "eth0", "--flows", "4096"]);
    let first = if name == "vm1" { "yes" } else { "no" };
    command.args(["--label", &format!("first={first}")]);
    let log = core.folder().join(format!("{name}.log"));
    let mut agent = Process::spawn(name, &mut command, &log).unwrap();
    agent.wait_for("connected to the core", PATIENCE).unwrap();
    agent
}

fn status(core: &Core, deployment: &str) -> Value {
    core.cnsmo_json(&["get", "deployments", deployment])["status"].clone()
}

/// VM and phase of the only instance, if there is only one.
fn only(core: &Core, deployment: &str) -> Option<(String, String)> {
    let status = status(core, deployment);
    let [one] = &**status["instances"].as_array()? else { return None };
    Some((one["node"].as_str()?.to_owned(), one["phase"].as_str()?.to_owned()))
}

fn at(node: &str, phase: &str) -> Option<(String, String)> {
    Some((node.to_owned(), phase.to_owned()))
}

#[tokio::test]
async fn s15_an_instance_that_keeps_failing_goes_to_another_vm() {
    sweep();
    let lab = Lab::new("s15f");
    let start = |path: PathBuf, listen: SocketAddr| {
        let mut command = lab.peer.command(path).unwrap();
        command.args(["--listen", &listen.to_string()]);
        command.args(["--heartbeat", "200ms", "--lease", "1s"]);
        command
    };
    let mut core = Core::start_by("s15f", |path| start(path, SocketAddr::new(PEER4, 0)));
    let pins = PinDir::new("s15f-peer");
    let _first = agent(&core, &lab.vm, "vm1", lab.pins.path());
    let mut second = agent(&core, &lab.peer, "vm2", pins.path());
    let good = |node: &str| core.folder().join(format!("good-{node}"));
    let (good1, good2) = (good("vm1"), good("vm2"));
    fs::write(&good2, "").unwrap();
    let file = core.folder().join("all.yaml");
    fs::write(&file, FILE.replace("FOLDER", core.folder().to_str().unwrap())).unwrap();
    core.cnsmo(&["apply", "-f", file.to_str().unwrap()]);

    // Both begin on the first VM, where nothing runs; why is told.
    until("the reason", async || {
        let text = core.cnsmo(&["describe", "deployment", "moves"]);
        text.contains("ended with exit code 1").then_some(())
    })
    .await;
    until("it, elsewhere", async || (only(&core, "moves") == at("vm2", "ready")).then_some(()))
        .await;
    let avoided = status(&core, "moves")["avoided"].clone();
    assert_eq!((&avoided[0]["node"], &avoided[0]["times"]), (&"vm1".into(), &1.into()));
    assert!(
        core.cnsmo(&["describe", "deployment", "moves"]).contains("where instances kept failing")
    );
    assert_eq!(only(&core, "stays").unwrap().0, "vm1", "it was told to");
    assert!(status(&core, "stays")["avoided"].is_null());

    // What was decided is known to the next core.
    let address = core.address();
    core.kill();
    core.start_again_by(|path| start(path, address));
    until("the same VM avoided", async || {
        (status(&core, "moves")["avoided"] == avoided).then_some(())
    })
    .await;
    fs::write(&good1, "").unwrap();
    until("the other one, where it is", async || {
        (only(&core, "stays") == at("vm1", "ready")).then_some(())
    })
    .await;

    // Out of sight for longer than it may fail: it is left where it is, and runs.
    until("it is seen", async || (only(&core, "moves") == at("vm2", "ready")).then_some(())).await;
    second.kill().unwrap();
    until("it is not seen", async || {
        (only(&core, "moves") == at("vm2", "unreachable")).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(only(&core, "moves"), at("vm2", "unreachable"));
    let sleeps = lab.peer.processes().unwrap().into_iter().filter(|pid| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(char::from(0)).eq(["sleep", "606", ""])
    });
    assert_eq!(sleeps.count(), 1);
}
