//! An agent that starts is announced; one with a certificate of another CA is not.

use std::{
    ffi::OsStr,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use cnsmo_tests::{Process, sweep};
use serde_json::Value;

use super::{
    lab::{Lab, PEER4},
    programs::{Core, PATIENCE, program, until},
};

/// The agent of the lab's VM, of a core in the peer's namespace.
fn agent(lab: &Lab, core: SocketAddr, state: &Path, more: &[&OsStr]) -> Process {
    let mut command = lab.vm.command(program("cnsmo-agent")).unwrap();
    command.arg("--core").arg(core.to_string());
    command.arg("--state-dir").arg(state).arg("--bpffs").arg(lab.pins.path());
    command.args(["--interface", "eth0", "--flows", "4096"]).args(more);
    command.env_remove("CNSMO_LOG");
    Process::spawn("cnsmo-agent", &mut command, &state.with_extension("log")).unwrap()
}

fn agents(core: &Core) -> Vec<Value> {
    core.cnsmo_json(&["services", "--service", "agent"]).as_array().unwrap().clone()
}

/// Calls the core from the VM with this certificate, as no agent of ours would. The body of the answer, or what curl says.
fn call(lab: &Lab, core: &Core, certificate: &Path) -> Result<String, String> {
    let (ip, port) = (core.address().ip(), core.address().port());
    let mut curl: Command = lab.vm.command("curl").unwrap();
    curl.args(["--silent", "--show-error", "--max-time", "30"]);
    curl.args(["--resolve", &format!("core.cnsmo:{port}:{ip}"), "--cacert"]);
    curl.arg(core.folder().join("state/ca.crt"));
    curl.arg("--cert").arg(certificate.join("identity.crt"));
    curl.arg("--key").arg(certificate.join("identity.key"));
    curl.args(["--json", r#"{"service": "agent"}"#]);
    let method = "cnsmo.catalog.v1.CatalogService/ListInstances";
    let output = curl.arg(format!("https://core.cnsmo:{port}/{method}")).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

#[tokio::test]
async fn s16_an_agent_is_announced_when_it_starts_and_an_impostor_is_not() {
    sweep();
    let lab = Lab::new("s16");
    let core = Core::start_by("s16", |path: PathBuf| {
        let mut command = lab.peer.command(path).unwrap();
        command.args(["--listen", &SocketAddr::new(PEER4, 0).to_string()]);
        command
    });
    assert!(agents(&core).is_empty());
    let token = core.token("agent", "vm1");
    let arguments = ["--node", "vm1", "--token-file"].map(OsStr::new);
    let state = core.folder().join("vm1");
    let more = [&arguments[..], &[token.as_os_str()]].concat();
    let mut process = agent(&lab, core.address(), &state, &more);
    // The agent's first report completes what its session began.
    let announced = until("the agent, ready and with its kernel, in the catalogue", async || {
        let is_whole =
            |one: &Value| one["phase"] == "ready" && !one["attributes"]["kernel"].is_null();
        agents(&core).pop().filter(is_whole)
    })
    .await;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let wanted = [
        ("/name", "vm1"),
        ("/node", "vm1"),
        ("/attributes/kernel", kernel.trim()),
        ("/attributes/version", env!("CARGO_PKG_VERSION")),
    ];
    for (pointer, value) in wanted {
        assert_eq!(announced.pointer(pointer), Some(&value.into()), "{pointer}: {announced}");
    }

    let node = core.cnsmo_json(&["get", "node", "vm1"]);
    let mut reported: Vec<_> = node["status"]["programIds"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap())
        .collect();
    let joined: Vec<_> = reported.iter().map(ToString::to_string).collect();
    assert_eq!(announced["attributes"]["programs"], joined.join("/"));
    let mut held = programs_held_by(process.id());
    for ids in [&mut reported, &mut held] {
        ids.sort_unstable();
        ids.dedup();
    }
    assert!(!held.is_empty());
    assert_eq!(reported, held, "as the kernel says of the agent's file descriptors");

    // Another deployment, which certifies the same name.
    let foreign = Core::start("s16-foreign");
    let certificate = foreign.identity("agent", "vm2");
    let answer = call(&lab, &core, &state).expect("the real certificate");
    assert!(answer.contains("\"vm1\""), "{answer}");
    let before = refusals(&core).len();
    // How the client hears of it depends on who is faster, the alert or the end of the connection.
    call(&lab, &core, &certificate).expect_err("a certificate of another CA");
    let record = until("the refusal in the audit", async || {
        let mut refusals = refusals(&core);
        (refusals.len() > before).then(|| refusals.pop().unwrap())
    })
    .await;
    assert_eq!(record["rpc"], "tls", "{record}");

    // The agent itself does not even trust this core.
    process.terminate(PATIENCE).unwrap();
    let mut impostor =
        agent(&lab, core.address(), &certificate, &["--node", "vm2"].map(OsStr::new));
    impostor.wait_for("what answers is not our core", PATIENCE).unwrap();
    let names: Vec<_> = agents(&core).iter().map(|one| one["name"].clone()).collect();
    assert_eq!(names, ["vm1"]);
    let nodes = core.cnsmo(&["nodes"]);
    assert!(nodes.contains("vm1") && !nodes.contains("vm2"), "{nodes}");
    assert!(core.cnsmo(&["audit", "--verify"]).contains("each follows"));
}

/// Ids of the eBPF programs that a process holds open.
fn programs_held_by(pid: u32) -> Vec<u64> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let infos = files.filter_map(|file| std::fs::read_to_string(file.unwrap().path()).ok());
    let program = |info: String| {
        let field =
            |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        // A link names the program too, but has no type of one.
        field("prog_type:").and(field("prog_id:"))
    };
    infos.filter_map(program).collect()
}

/// Beyond the life of the certificate that it began with, on one stream.
#[tokio::test]
async fn s16_an_agent_renews_its_certificate_on_the_live_stream() {
    sweep();
    let lab = Lab::new("s16r");
    let core = Core::start_by("s16-renew", |path: PathBuf| {
        let mut command = lab.peer.command(path).unwrap();
        command.args(["--listen", &SocketAddr::new(PEER4, 0).to_string()]);
        command.args(["--certificate-life", "12s"]);
        command
    });
    let token = core.token("agent", "vm1");
    let state = core.folder().join("vm1");
    let arguments = ["--node", "vm1", "--token-file"].map(OsStr::new);
    let process =
        agent(&lab, core.address(), &state, &[&arguments[..], &[token.as_os_str()]].concat());
    let certificate = || std::fs::read(state.join("identity.crt")).ok();
    let first = until("a certificate", async || certificate()).await;
    let mut seen = vec![first];
    // The third one comes after the end of the first one's life.
    while seen.len() < 3 {
        let next = until("another certificate", async || {
            certificate().filter(|now| seen.last() != Some(now))
        })
        .await;
        seen.push(next);
    }
    let log = process.output().unwrap();
    assert_eq!(log.matches("connected to the core").count(), 1, "one stream all along: {log}");
    assert!(!log.contains("no connection to the core"), "{log}");
    assert_eq!(agents(&core)[0]["phase"], "ready");
}

fn refusals(core: &Core) -> Vec<Value> {
    let all = core.cnsmo_json(&["audit"]);
    all.as_array().unwrap().iter().filter(|one| one["decision"] == "refused").cloned().collect()
}
