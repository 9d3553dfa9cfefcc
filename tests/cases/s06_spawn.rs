//! Services are started and ended on a VM, from the core's machine and from another one.

use std::{net::SocketAddr, path::PathBuf, process::Command};

use cnsmo_tests::{Process, sweep};
use serde_json::Value;

use super::{
    lab::{Lab, PEER4},
    programs::{Core, PATIENCE, program, until},
};

/// Instances of a service on a VM, with their processes.
fn running(core: &Core, service: &str) -> Vec<(String, u64)> {
    let all = core.cnsmo_json(&["service", "list", "--node", "vm1"]);
    let all = all.as_array().unwrap().iter().filter(|one| one["service"] == service);
    let phase = |one: &Value| one["phase"].as_str().unwrap().to_owned();
    all.map(|one| (phase(one), one["pid"].as_u64().unwrap())).collect()
}

fn command_of(pid: u64) -> String {
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.replace('\0', " ").trim().to_owned()
}

fn agent(lab: &Lab, core: &Core, log: &str) -> Process {
    let mut command = lab.vm.command(program("cnsmo-agent")).unwrap();
    command.arg("--core").arg(core.address().to_string());
    command.arg("--state-dir").arg(core.folder().join("vm1"));
    command.arg("--token-file").arg(core.folder().join("agent-vm1.token"));
    command.arg("--bpffs").arg(lab.pins.path()).env_remove("CNSMO_LOG");
    command.args(["--node", "vm1", "--interface", "eth0", "--flows", "4096"]);
    let mut agent = Process::spawn("cnsmo-agent", &mut command, &core.folder().join(log)).unwrap();
    agent.wait_for("connected to the core", PATIENCE).unwrap();
    agent
}

#[tokio::test]
async fn s06_services_are_spawned_and_deleted_locally_and_remotely() {
    sweep();
    let lab = Lab::new("s06");
    let core = Core::start_by("s06", |path: PathBuf| {
        let mut command = lab.peer.command(path).unwrap();
        command.args(["--listen", &SocketAddr::new(PEER4, 0).to_string()]);
        command
    });
    core.token("agent", "vm1");
    let _agent = agent(&lab, &core, "agent.log");

    // On the core's machine.
    let said = core.cnsmo(&["spawn", "near", "--node", "vm1", "--", "/bin/sleep", "601"]);
    assert!(said.contains("deployment/near created"), "{said}");
    // From the VM, as an editor over TLS.
    let token = core.token("editor", "eve");
    let folder = core.folder().join("eve");
    let remote = |arguments: &[&str]| -> Command {
        let mut command = lab.vm.command(program("cnsmo")).unwrap();
        command.arg("--core").arg(core.address().to_string()).arg("--identity").arg(&folder);
        command.args(arguments);
        command
    };
    let done = |arguments: &[&str]| {
        let output = remote(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let login = done(&["login", "--name", "eve", token.to_str().unwrap()]);
    assert_eq!(login.0, Some(0), "{}", login.1);
    let spawn = ["spawn", "far", "--node", "vm1", "--", "/bin/sleep", "602"];
    let spawned = done(&spawn);
    assert_eq!(spawned.0, Some(0), "{}", spawned.1);

    for (service, line) in [("near", "/bin/sleep 601"), ("far", "/bin/sleep 602")] {
        let all = running(&core, service);
        assert!(all.len() == 1 && all[0].0 == "ready", "{service}: {all:?}");
        assert_eq!(command_of(all[0].1), line);
    }
    // Neither twice, nor where there is no VM.
    let again = done(&spawn);
    assert!(again.0 == Some(1) && again.1.contains("exists already"), "{again:?}");
    let nowhere =
        done(&["spawn", "none", "--node", "vm9", "--timeout", "1s", "--", "/bin/sleep", "603"]);
    assert!(nowhere.0 == Some(3) && nowhere.1.contains("no VM that is reachable"), "{nowhere:?}");

    let pid = running(&core, "near")[0].1;
    core.cnsmo(&["delete", "deployment", "near"]);
    until("the end of one", async || running(&core, "near").is_empty().then_some(())).await;
    assert_eq!(command_of(pid), "");
    assert_eq!(running(&core, "far").len(), 1, "the other one goes on");
    let deleted = done(&["delete", "deployment", "far"]);
    assert_eq!(deleted.0, Some(0), "{}", deleted.1);
    until("the end of the other", async || running(&core, "far").is_empty().then_some(())).await;
}

/// As many as a VM lets follow the output of its services.
const FOLLOWERS_MAX: usize = 8;
/// Says its process and a number, ten times a second.
const COUNTS: &str = "n=0; while :; do n=$((n+1)); echo \"process $$ line $n\"; sleep 0.1; done";

/// A process that follows the output of `counts` through the core, into a file of this name.
fn follower(core: &Core, name: &str) -> Process {
    let mut command = Command::new(program("cnsmo"));
    command.env("CNSMO_SOCKET", core.socket());
    command.args(["logs", "counts", "--tail", "2", "--follow"]);
    Process::spawn(name, &mut command, &core.folder().join(name)).unwrap()
}

/// Of the lines that a follower has printed, the number and the process of each.
fn lines(follower: &Process) -> Vec<(u64, u64)> {
    let output = follower.output().unwrap();
    // The last line may be half written.
    let whole = output.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let line = |line: &str| {
        let (process, number) = line.strip_prefix("process ")?.split_once(" line ")?;
        Some((process.parse().unwrap(), number.parse().unwrap()))
    };
    whole.lines().filter_map(line).collect()
}

#[tokio::test]
async fn s06_output_is_followed_through_the_core_up_to_its_end() {
    sweep();
    let lab = Lab::new("s06f");
    let core = Core::start_by("s06f", |path: PathBuf| {
        let mut command = lab.peer.command(path).unwrap();
        command.args(["--listen", &SocketAddr::new(PEER4, 0).to_string()]);
        command
    });
    core.token("agent", "vm1");
    let mut agents = vec![agent(&lab, &core, "first.log")];
    core.cnsmo(&["spawn", "counts", "--node", "vm1", "--", "/bin/sh", "-c", COUNTS]);
    let mut first = follower(&core, "follower-0");
    first.wait_for("line 9\n", PATIENCE).unwrap();

    // Another process of the instance: nothing is left out, and it goes on.
    core.cnsmo(&["service", "kill", "counts", "--node", "vm1"]);
    let told = until("lines of another process", async || {
        let told = lines(&first);
        (told.last()?.0 != told[0].0 && told.last()?.1 >= 3).then_some(told)
    })
    .await;
    for pair in told.windows(2) {
        let ((before, n), (after, m)) = (pair[0], pair[1]);
        assert!(m == if before == after { n + 1 } else { 1 }, "{pair:?} in {told:?}");
    }

    // There are few; one whose reader goes away makes room.
    let mut others: Vec<_> = (1..FOLLOWERS_MAX)
        .map(|n| {
            let mut one = follower(&core, &format!("follower-{n}"));
            one.wait_for(" line ", PATIENCE).unwrap();
            one
        })
        .collect();
    let mut refused = follower(&core, "refused");
    assert!(!refused.wait(PATIENCE).unwrap().success());
    assert!(refused.output().unwrap().contains("8 followers already"), "{}", refused.tail());
    others.pop().unwrap().kill().unwrap();
    let another = until("room for another one", async || {
        let mut one = follower(&core, "another");
        one.wait_for(" line ", PATIENCE).is_ok().then_some(one)
    });
    others.push(another.await);

    // The VM is lost: its followers are told.
    agents.pop().unwrap().kill().unwrap();
    for one in others.iter_mut().chain([&mut first]) {
        assert!(!one.wait(PATIENCE).unwrap().success());
        let output = one.output().unwrap();
        assert!(output.contains("connection of node vm1 was lost"), "{}", one.tail());
    }
    let mut absent = follower(&core, "absent");
    assert!(!absent.wait(PATIENCE).unwrap().success(), "{}", absent.tail());

    // It is back, with the same process; the end of the instance is the end of its output.
    agents.push(agent(&lab, &core, "second.log"));
    let mut last = until("the instance", async || {
        let mut one = follower(&core, "last");
        one.wait_for(" line ", PATIENCE).is_ok().then_some(one)
    })
    .await;
    assert_eq!(lines(&last)[0].0, told.last().unwrap().0);
    core.cnsmo(&["delete", "deployment", "counts", "--wait"]);
    assert!(last.wait(PATIENCE).unwrap().success(), "{}", last.tail());
}
