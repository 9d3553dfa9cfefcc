//! `cargo xtask bench idle`: what core and agent take while nothing happens, as release builds. One VM in a network, with a
//! policy and a balancer, so that each of its services has something to look after.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::ensure;

use super::{Better, LIMIT, Row};
use crate::{
    cargo::{self, cargo},
    fleet::{CORE_PORT, Control, Programs},
    interrupt,
    netns::{Netns, PinDir},
    process::pause,
    progress, usage,
};

const ROUNDS: usize = 3;
/// Processor time is counted in ticks of 10 ms: of this time one is 0.05 %.
const WINDOW: Duration = Duration::from_secs(20);
const READY_MAX: Duration = Duration::from_secs(60);
/// From the last change to the first round: what it left to do is done.
const SETTLE: Duration = Duration::from_secs(10);

const AGENT_MAX_MIB: f64 = 30.0;
const CORE_MAX_MIB: f64 = 60.0;
const PERCENT_MAX: f64 = 1.0;

const MIB: (&str, Better) = ("MiB", Better::Lower);
const PERCENT: (&str, Better) = ("% of a CPU", Better::Lower);

const VM: &str = "vm1";
const CORE_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 2, 1);
const FILE: &str = "
kind: Network
metadata: {name: idle}
spec: {ipv4: 10.92.0.0/24}
---
kind: LoadBalancer
metadata: {name: front}
spec:
  network: idle
  addresses: [10.92.0.80]
  ports: [{protocol: tcp, port: 80, targetPort: 8080}]
  backends: {role: web}
---
kind: FirewallPolicy
metadata: {name: web}
spec:
  target: {role: web}
  defaults: {ingress: deny, egress: allow}
  rules:
    - {name: http, action: allow, direction: ingress, protocol: tcp, ports: [8080]}
";

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    progress::heading("Building core, agent and command line, optimised");
    let built = cargo::build(cargo().args([
        "build",
        "--release",
        "--package=cnsmo-core",
        "--package=cnsmo-agent",
        "--package=cnsmo-cli",
    ]))?;
    progress::heading("Measuring what is idle");
    let control = Control::new(Programs::of(&built)?, "idle")?;
    let (host, vm) = (Netns::new("idle-core")?, Netns::new("idle-vm")?);
    Netns::veth((&host, "eth0"), (&vm, "eth0"))?;
    host.ip(&["address", "add", &format!("{CORE_ADDRESS}/30"), "dev", "eth0"])?;
    vm.ip(&["address", "add", "198.18.2.2/30", "dev", "eth0"])?;
    let listen = SocketAddr::from((CORE_ADDRESS, CORE_PORT));
    let core = control.start_core(&host, listen)?;
    control.make_token(1)?;
    let pins = PinDir::new("idle");
    let agent = control.start_agent((VM, &vm), listen, "role=web", &pins)?;
    let late = control.wait_ready(&[VM], READY_MAX)?;
    ensure!(late.is_none(), "{VM} is not ready\n{}", agent.tail());
    let file = control.manifest("all.yaml", FILE)?;
    control.cli_ok(&["apply", "-f", &file, "--wait"])?;
    pause(SETTLE);

    let all: Vec<_> = vm.processes()?.iter().map(|pid| pid.as_raw().unsigned_abs()).collect();
    let mut samples = Samples::default();
    for round in 1..=ROUNDS {
        interrupt::check()?;
        progress::step(&format!("round {round} of {ROUNDS}"), || {
            samples.take(core.id(), agent.id(), &all)
        })?;
    }
    samples.rows()
}

#[derive(Default)]
struct Samples {
    core: Vec<f64>,
    core_percent: Vec<f64>,
    agent: Vec<f64>,
    engine: Vec<f64>,
    agent_percent: Vec<f64>,
}

impl Samples {
    /// `vm`: the agent, and the engine of its tunnel where the kernel has none.
    fn take(&mut self, core: u32, agent: u32, vm: &[u32]) -> anyhow::Result<()> {
        let (start, before) = (Instant::now(), (processor_time(&[core])?, processor_time(vm)?));
        pause(WINDOW);
        let percent = |after: Duration, before: Duration| {
            (after - before).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0
        };
        self.core_percent.push(percent(processor_time(&[core])?, before.0));
        self.agent_percent.push(percent(processor_time(vm)?, before.1));
        let mib = |process: u32| -> anyhow::Result<f64> {
            Ok(usage::memory(process)?.resident as f64 / f64::from(1 << 20))
        };
        self.core.push(mib(core)?);
        self.agent.push(mib(agent)?);
        for engine in vm.iter().filter(|process| **process != agent) {
            self.engine.push(mib(*engine)?);
        }
        Ok(())
    }

    fn rows(&self) -> anyhow::Result<Vec<Row>> {
        let all = [
            ("idle/agent-memory", MIB, &self.agent, AGENT_MAX_MIB),
            ("idle/engine-memory", MIB, &self.engine, AGENT_MAX_MIB),
            ("idle/core-memory", MIB, &self.core, CORE_MAX_MIB),
            ("idle/agent-cpu", PERCENT, &self.agent_percent, PERCENT_MAX),
            ("idle/core-cpu", PERCENT, &self.core_percent, PERCENT_MAX),
        ];
        // Where the kernel moves the packets of the tunnel there is no engine.
        let measured = all.into_iter().filter(|(_, _, samples, _)| !samples.is_empty());
        measured
            .map(|(id, unit, samples, limit)| {
                Row::of(id, unit, samples, (LIMIT, &vec![limit; samples.len()]))
            })
            .collect()
    }
}

fn processor_time(processes: &[u32]) -> anyhow::Result<Duration> {
    processes.iter().map(|process| usage::processor_time(*process)).sum()
}
