//! Our data path on a gateway, for `cargo xtask bench lb`.
//!
//! Takes pins' folder, state's folder, network card, its hook (`auto` or `tc`), tunnel device, its MTU, own address, prefix, virtual address, TCP port,
//! UDP ports (two), backends. Prints `ready` when the balancer is in force, and detaches when standard input is closed.

use std::{
    env,
    io::{Read as _, Write as _, stdin, stdout},
    net::Ipv4Addr,
    os::fd::AsFd as _,
    path::PathBuf,
    process::ExitCode,
    str::FromStr,
};

use anyhow::{Context as _, bail};
use cnsmo_agent::{
    datapath::{
        Datapath as _,
        kernel::{Kernel, Options, XdpChoice},
    },
    effective::{BackendTarget, Balancer, Effective, TunnelDevice},
};
use cnsmo_proto::model::{Addresses, Algorithm, Name, ServicePort};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const TCP: u8 = 6;
const UDP: u8 = 17;
/// As in an agent.
const FLOWS: u32 = 1 << 18;
const SWEEP_MS: u16 = 1_000;

fn main() -> ExitCode {
    match serve(env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "cnsmo-bench-lb: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let pins: PathBuf = next(&mut arguments)?;
    let options = Options {
        pins: pins.clone(),
        state: next(&mut arguments)?,
        interfaces: vec![next(&mut arguments)?],
        xdp: hook(&next::<String>(&mut arguments)?)?,
        flows: FLOWS,
        policy_bytes: 1 << 20,
        rules_max: 1_000,
    };
    let effective = effective(arguments)?;
    let mut kernel = Kernel::open(options)?;
    kernel.apply(&effective)?;
    let mut out = stdout();
    writeln!(out, "ready")?;
    out.flush()?;
    loop {
        let input = stdin();
        let mut ready = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, PollTimeout::from(SWEEP_MS))? == 0 {
            kernel.sweep();
        } else if input.lock().read(&mut [0; 64])? == 0 {
            drop(kernel);
            return Ok(Kernel::detach(&pins)?);
        }
    }
}

/// No policy: the peers have no firewall either.
fn effective(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Effective> {
    let device = next(&mut arguments)?;
    let mtu = next(&mut arguments)?;
    let addresses = Addresses { v4: Some(next::<Ipv4Addr>(&mut arguments)?), v6: None };
    let tunnel = TunnelDevice { device, addresses, prefixes: vec![next(&mut arguments)?], mtu };
    let virtual_address: Ipv4Addr = next(&mut arguments)?;
    let mut port = |protocol| -> anyhow::Result<_> {
        let port = next(&mut arguments)?;
        Ok(ServicePort { protocol, port, target_port: port })
    };
    let ports = vec![port(TCP)?, port(UDP)?, port(UDP)?];
    let backend = |address: String| -> anyhow::Result<_> {
        let v4 = Some(address.parse()?);
        let node = Name::new(format!("backend-{}", address.replace('.', "-")))?;
        Ok(BackendTarget { node, instance: None, addresses: Addresses { v4, v6: None }, port: 0 })
    };
    let balancer = Balancer {
        name: Name::new("bench")?,
        addresses: vec![virtual_address.into()],
        ports,
        algorithm: Algorithm::default(),
        gateway: true,
        backends: arguments.map(backend).collect::<anyhow::Result<_>>()?,
    };
    let open = Effective::merge(vec![], []);
    Ok(Effective { tunnel: Some(tunnel), balancers: vec![balancer], ..open })
}

fn hook(name: &str) -> anyhow::Result<XdpChoice> {
    match name {
        "auto" => Ok(XdpChoice::Auto),
        "tc" => Ok(XdpChoice::Off),
        _ => bail!("no hook is named `{name}`"),
    }
}

fn next<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    arguments: &mut impl Iterator<Item = String>,
) -> anyhow::Result<T> {
    let text = arguments.next().context("it is a part of `cargo xtask bench lb`")?;
    text.parse().with_context(|| format!("argument `{text}`"))
}
