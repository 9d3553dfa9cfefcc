//! A change after which a VM does not hear of its core is undone by the VM itself.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use cnsmo_tests::sweep;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    lab::{Lab, PATIENCE as PACKETS, PEER4, SILENCE, VM4},
    programs::{Core, until},
};

/// Of the core below.
const WINDOW: Duration = Duration::from_secs(6);

fn policy(ports: &str) -> String {
    format!(
        "kind: FirewallPolicy
metadata: {{name: web}}
spec:
  defaults: {{ingress: deny, egress: allow}}
  rules:
    - {{name: open, action: allow, direction: ingress, protocol: tcp, ports: [{ports}]}}
"
    )
}

#[tokio::test]
async fn a_change_is_undone_when_the_core_is_not_there_any_more() {
    sweep();
    let lab = Lab::new("confirm");
    let core = Core::start_by("confirm", |path: PathBuf| {
        let mut command = lab.peer.command(path).unwrap();
        command.args(["--listen", &SocketAddr::new(PEER4, 0).to_string()]);
        command.args(["--heartbeat", "3s", "--lease", "4s", "--confirm-window", "6s"]);
        command
    });
    let mut agent = core.agent(&lab.vm, &lab.pins, "vm1", &[]);

    let file = core.folder().join("policy.yaml");
    let apply = |ports: &str, wait: bool| {
        fs::write(&file, policy(ports)).unwrap();
        let file = file.to_str().unwrap();
        let arguments = ["apply", "-f", file, "--wait"];
        core.cnsmo(&arguments[..if wait { 4 } else { 3 }]);
    };
    let [kept, new] = [80, 81].map(|port| lab.listen(&lab.vm, VM4, port));
    let opens = |listener: &std::net::TcpListener, limit: Duration| {
        lab.connect(&lab.peer, listener.local_addr().unwrap(), limit).is_ok()
    };
    apply("80", true);
    assert!(opens(&kept, PACKETS) && !opens(&new, SILENCE));

    // With a core that goes on to answer it stays.
    apply("80, 82", true);
    tokio::time::sleep(WINDOW * 2).await;
    assert!(!agent.output().unwrap().contains("is in force again"));

    // Frozen as soon as the VM has the change, before the core confirms it: with luck, as a heartbeat can come in between.
    let core_process = Pid::from_raw(core.process_id().cast_signed());
    let mut undone = || {
        apply("81", true);
        kill(core_process, Signal::SIGSTOP).unwrap();
        let undone = agent.wait_for("is in force again", WINDOW * 2).is_ok();
        let packets = (opens(&kept, PACKETS), opens(&new, SILENCE));
        kill(core_process, Signal::SIGCONT).unwrap();
        if undone {
            assert_eq!(packets, (true, false), "as before the change");
        } else {
            apply("80, 82", true);
        }
        undone
    };
    assert!((0..3).any(|_| undone()), "nothing was undone");

    // The core is there again: so is the change.
    until("the change, once more", async || opens(&new, SILENCE).then_some(())).await;
    assert!(!opens(&kept, SILENCE));
    core.cnsmo(&["wait"]);
}
