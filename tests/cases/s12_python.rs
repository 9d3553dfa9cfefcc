//! A service in Python, made from the `.proto` files alone, beside another copy of itself.

use std::{path::Path, process::Command, time::Duration};

use cnsmo_tests::Process;

use super::programs::{Core, PATIENCE, python, root};

/// How long a service may take to say good-bye.
const STOP_MAX: Duration = Duration::from_secs(30);

/// The example, as an instance of the service `echo`.
fn echo(core: &Core, name: &str, way: &[&str]) -> Process {
    let mut command = Command::new(python());
    command.arg(root().join("examples/python/echo.py")).args(["--name", name]).args(way);
    Process::spawn(name, &mut command, &core.folder().join(format!("{name}.log"))).unwrap()
}

fn over_tls<'a>(address: &'a str, identity: &'a Path) -> [&'a str; 4] {
    ["--core", address, "--identity", identity.to_str().unwrap()]
}

#[test]
fn s12_a_python_program_announces_subscribes_and_serves() {
    let core = Core::start("s12");
    let (socket, address) = (core.socket(), core.address().to_string());
    let mut local = echo(&core, "echo-local", &["--socket", socket.to_str().unwrap()]);
    local.wait_for(r#""phase": "ready""#, PATIENCE).unwrap();
    // It comes later, over mutual TLS, and sees what is there.
    let identity = core.identity("service", "echo");
    let mut remote = echo(&core, "echo-remote", &over_tls(&address, &identity));
    remote.wait_for(r#""phase": "ready""#, PATIENCE).unwrap();
    let seen = r#""name": "echo-local", "phase": "PHASE_READY""#;
    remote.wait_for(seen, PATIENCE).unwrap();
    // Who was there before sees it come.
    local.wait_for(r#""name": "echo-remote", "phase": "PHASE_READY""#, PATIENCE).unwrap();

    for number in 0..8 {
        let text = format!("Grüße {number}");
        let reply = core.cnsmo_json(&["bus", "request", "svc.echo", &text]);
        assert_eq!(reply["payload"], text, "{reply}");
    }
    // They have shared the requests.
    for instance in [&mut local, &mut remote] {
        instance.wait_for(r#""event": "delivery""#, PATIENCE).unwrap();
    }

    // One that stops withdraws itself; the other one serves on, and has seen it go.
    assert!(remote.terminate(STOP_MAX).unwrap().success(), "{}", remote.tail());
    local
        .wait_for(r#""kind": "EVENT_DELETE", "service": "echo", "name": "echo-remote""#, PATIENCE)
        .unwrap();
    let reply = core.cnsmo_json(&["bus", "request", "svc.echo", "still there"]);
    assert_eq!(reply["servedBy"], "echo-local", "{reply}");

    // An identity of another service may not say that it is an echo.
    let other = core.identity("service", "other");
    let mut refused = echo(&core, "echo-forged", &over_tls(&address, &other));
    refused.wait_for("PERMISSION_DENIED", PATIENCE).unwrap();
    assert!(!core.cnsmo(&["services"]).contains("echo-forged"));
}
