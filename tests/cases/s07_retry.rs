//! Agents that are there before their core.

use std::{net::SocketAddr, path::PathBuf};

use cnsmo_tests::{Process, sweep};

use super::{
    lab::{Lab, PEER4},
    programs::{Core, PATIENCE, program, until},
};

#[tokio::test]
async fn s07_an_agent_without_a_core_waits_and_joins_when_there_is_one() {
    sweep();
    let lab = Lab::new("s07r");
    let in_peer = |listen: SocketAddr| {
        let lab = &lab;
        move |path: PathBuf| {
            let mut command = lab.peer.command(path).unwrap();
            command.args(["--listen", &listen.to_string()]);
            command
        }
    };
    let mut core = Core::start_by("s07", in_peer(SocketAddr::new(PEER4, 0)));
    let token = core.token("agent", "vm1");
    core.kill();

    let mut command = lab.vm.command(program("cnsmo-agent")).unwrap();
    command.arg("--core").arg(core.address().to_string()).arg("--token-file").arg(token);
    command.arg("--state-dir").arg(core.folder().join("vm1"));
    command.arg("--bpffs").arg(lab.pins.path()).env_remove("CNSMO_LOG");
    command.args(["--node", "vm1", "--interface", "eth0", "--flows", "4096"]);
    let log = core.folder().join("agent.log");
    let mut agent = Process::spawn("cnsmo-agent", &mut command, &log).unwrap();
    let tries = async || {
        let tries = agent.output().unwrap().matches("not enrolled yet").count();
        (tries >= 3).then_some(())
    };
    until("three tries", tries).await;

    let there = async |core: &Core| {
        let joined = async || core.cnsmo(&["nodes"]).contains("Ready").then_some(());
        until("the agent, ready", joined).await;
    };
    let address = core.address();
    core.start_again_by(in_peer(address));
    there(&core).await;
    core.kill();
    agent.wait_for("no connection to the core", PATIENCE).unwrap();
    core.start_again_by(in_peer(address));
    there(&core).await;
}
