//! Writes the Rust code of `proto` to the folder that is the only argument: `cargo xtask codegen`.

use std::{env, error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = root.join("proto");
    let areas = [
        "admin",
        "agent",
        "balancer",
        "bus",
        "catalog",
        "deployment",
        "event",
        "flow",
        "identity",
        "meta",
        "network",
        "node",
        "policy",
        "resource",
        "service",
        "state",
    ];
    let files = areas.map(|area| proto.join(format!("cnsmo/{area}/v1/{area}.proto")));
    let out = env::args_os().nth(1).ok_or("the argument must be the folder to write to")?;
    fs::create_dir_all(&out)?;
    tonic_prost_build::configure()
        .btree_map(".")
        // Payloads are handed on as they came.
        .bytes(".cnsmo.admin")
        .bytes(".cnsmo.bus")
        .bytes(".cnsmo.state")
        // Much larger than the other messages of their unions.
        .boxed(".cnsmo.agent.v1.ConnectRequest.message.result")
        .boxed(".cnsmo.agent.v1.ConnectRequest.message.status")
        .boxed(".cnsmo.agent.v1.Resource.spec.instance")
        .boxed(".cnsmo.deployment.v1.DeploymentSpec.placement")
        .boxed(".cnsmo.deployment.v1.Systemd.unit.process")
        .boxed(".cnsmo.bus.v1.SubscribeResponse.message.delivery")
        .build_transport(false)
        .out_dir(&out)
        .emit_rerun_if_changed(false)
        .compile_fds(protox::compile(files, [proto])?)?;
    Ok(())
}
