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

#[tokio::test]
async fn s06_services_are_spawned_and_deleted_locally_and_remotely() {
    sweep();
    let lab = Lab::new("s06");
    let core = Core::start_by("s06", |path: PathBuf| {
        let mut command = lab.peer.command(path).unwrap();
        command.args(["--listen", &SocketAddr::new(PEER4, 0).to_string()]);
        command
    });
    let mut command = lab.vm.command(program("cnsmo-agent")).unwrap();
    command.arg("--core").arg(core.address().to_string());
    command.arg("--token-file").arg(core.token("agent", "vm1"));
    command.arg("--state-dir").arg(core.folder().join("vm1"));
    command.arg("--bpffs").arg(lab.pins.path()).env_remove("CNSMO_LOG");
    command.args(["--node", "vm1", "--interface", "eth0", "--flows", "4096"]);
    let log = core.folder().join("agent.log");
    let mut agent = Process::spawn("cnsmo-agent", &mut command, &log).unwrap();
    agent.wait_for("connected to the core", PATIENCE).unwrap();

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
