//! What core and agent take while nothing happens: memory, processor time, ports.
//!
//! These are debug builds beside other tests, so the limits of a release build cannot be held against them as they are:
//! the text of such a program alone has more than an agent may have. What grows with what a program does is in anonymous memory
//! and alike in both, and an agent that wakes up all the time is seen in either. `cargo xtask bench idle` measures
//! release builds.

use std::{
    collections::BTreeSet,
    fs,
    future::Future,
    hint::black_box,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cnsmo_proto::pb::service::{ListServicesRequest, host_service_client::HostServiceClient};
use cnsmo_service::channel;
use cnsmo_tests::{Process, sweep, usage};

use super::{
    lab::{Lab, PEER4},
    programs::{Core, PATIENCE, program, until},
};

/// Every service of the VM has something to look after.
const FILE: &str = "
kind: Network
metadata: {name: shop}
spec: {ipv4: 10.92.0.0/24}
---
kind: LoadBalancer
metadata: {name: front}
spec:
  network: shop
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
const MIB: u64 = 1 << 20;
/// An agent may have 30 MiB, of which its release build takes about 10 for its text.
const AGENT_MAX: u64 = 20 * MIB;
/// A core may have 60 MiB, likewise.
const CORE_MAX: u64 = 50 * MIB;
/// Over which processor time is counted, in ticks of 10 ms: three of them are 0.3 %.
const WINDOW: Duration = Duration::from_secs(10);
/// Of one processor. The aim is 1 % of a release build; a debug build takes some times as much, which other tests beside it
/// make longer still, and one that does not rest takes far more.
const SHARE_MAX: f64 = 0.03;

/// The part of one processor that these processes take during something.
async fn share(processes: &[u32], during: impl Future<Output = ()>) -> f64 {
    let taken = || -> Duration {
        processes.iter().map(|process| usage::processor_time(*process).unwrap()).sum()
    };
    let (start, before) = (Instant::now(), taken());
    during.await;
    (taken() - before).as_secs_f64() / start.elapsed().as_secs_f64()
}

/// Asks for the services at a socket, again and again.
async fn pester(socket: &Path) {
    let mut hosts = HostServiceClient::new(channel::local(socket).unwrap());
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        hosts.list_services(ListServicesRequest::default()).await.unwrap();
    }
}

fn set(ports: &[&str]) -> BTreeSet<String> {
    ports.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn s02_an_idle_core_and_agent_are_small_rest_and_open_what_is_documented() {
    sweep();
    let lab = Lab::new("s02");
    let core = Core::start_by("s02", |path: PathBuf| {
        let mut command = lab.peer.command(path).unwrap();
        command.args(["--listen", &SocketAddr::new(PEER4, 7443).to_string()]);
        command
    });
    let state = core.folder().join("vm1");
    let mut command = lab.vm.command(program("cnsmo-agent")).unwrap();
    command.arg("--core").arg(core.address().to_string()).arg("--state-dir").arg(&state);
    command.arg("--token-file").arg(core.token("agent", "vm1")).arg("--bpffs").arg(lab.pins.path());
    command.args(["--node", "vm1", "--label", "role=web", "--interface", "eth0"]);
    command.env_remove("CNSMO_LOG");
    let mut agent =
        Process::spawn("cnsmo-agent", &mut command, &core.folder().join("vm1.log")).unwrap();
    agent.wait_for("connected to the core", PATIENCE).unwrap();
    let before = usage::ports(agent.id()).unwrap();
    // Answers to rejected packets leave by it; nothing comes in by that number.
    const ANSWERS: &str = "raw/255";
    assert_eq!(before, set(&[ANSWERS]), "an agent without a network opens nothing else");
    let file = core.folder().join("all.yaml");
    fs::write(&file, FILE).unwrap();
    core.cnsmo(&["apply", "-f", file.to_str().unwrap(), "--wait"]);

    let documented = set(&[ANSWERS, "udp/51820"]);
    let seen = until("the port of the tunnel", async || {
        Some(usage::ports(agent.id()).unwrap()).filter(|ports| ports.len() > before.len())
    });
    assert_eq!(seen.await, documented, "ports of the VM");
    assert_eq!(usage::ports(core.process_id()).unwrap(), set(&["tcp/7443"]), "ports of the core");

    // One binary each: the engine of the tunnel, if the kernel has none, is the agent's own.
    let here: Vec<_> =
        lab.vm.processes().unwrap().iter().map(|pid| pid.as_raw().unsigned_abs()).collect();
    let own = program("cnsmo-agent").canonicalize().unwrap();
    for process in &here {
        assert_eq!(fs::read_link(format!("/proc/{process}/exe")).unwrap(), own);
    }
    assert!(here.contains(&agent.id()));

    // What the start left to do is done when a whole second takes nothing much.
    let rests = async |processes: &[u32]| {
        let second = share(processes, tokio::time::sleep(Duration::from_secs(1))).await;
        (second < SHARE_MAX).then_some(())
    };
    until("rest", async || rests(&[&here[..], &[core.process_id()]].concat()).await).await;
    let of_core = [core.process_id()];
    let rest = || tokio::time::sleep(WINDOW);
    let (agent_share, core_share) = tokio::join!(share(&here, rest()), share(&of_core, rest()));
    assert!(agent_share < SHARE_MAX, "the agent takes {agent_share}");
    assert!(core_share < SHARE_MAX, "the core takes {core_share}");
    for (process, limit) in [(agent.id(), AGENT_MAX), (core.process_id(), CORE_MAX)] {
        let memory = usage::memory(process).unwrap();
        assert!(memory.anonymous <= limit, "{memory:?} of at most {limit}");
    }

    // One that has something to do does not pass for idle, nor a port that nobody has written down for none.
    let busy = share(&here, pester(&state.join("agent.sock"))).await;
    assert!(busy > 2.0 * SHARE_MAX, "a busy agent takes {busy}");
    let busy = share(&[core.process_id()], pester(&core.socket())).await;
    assert!(busy > 2.0 * SHARE_MAX, "a busy core takes {busy}");
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let _tcp = lab.listen(&lab.vm, any, 8080);
    let _udp = lab.vm.run(|| UdpSocket::bind((any, 5353))).unwrap().unwrap();
    let ports = usage::ports(agent.id()).unwrap();
    assert_eq!(ports, set(&[ANSWERS, "tcp/8080", "udp/51820", "udp/5353"]));
}

#[test]
fn s02_memory_that_is_used_is_counted() {
    let own = || usage::memory(std::process::id()).unwrap();
    let before = own();
    let used = black_box(vec![1_u8; 64 << 20]);
    let after = own();
    // Other tests in this process may give some back meanwhile.
    assert!(after.anonymous >= before.anonymous + 48 * MIB, "{before:?} {after:?}");
    assert!(after.resident >= after.anonymous);
    drop(used);
}
