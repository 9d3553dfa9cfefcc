//! A fleet of VMs on one host: network namespaces in two sites behind a router, one core, one agent for each VM.
//!
//! ```text
//!  site a                           router                          site b
//!  gw1 10.77.1.5, web1 .11 ───────┐         ┌─────── web2 10.77.2.11, web3 .12, db1 .21
//!                                 ├─ router ┤
//!  outside: client 10.77.9.9 ─────┘         └─────── core 10.77.9.2
//! ```
//! Each host has the same last part in IPv6: 10.77.1.11 is fd77:1::11. As in a cloud, a VM has a host address,
//! everything goes through its router, and a route there leads the virtual addresses 10.77.100.80 and fd77:100::80 to gw1.

mod control;
mod topology;

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process::Output,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use ring::{
    digest::{SHA256, digest},
    rand::{SecureRandom as _, SystemRandom},
};

use self::topology::{HOSTS, Spec};
pub(crate) use self::{
    control::{Control, Programs, said},
    topology::{Family, GATEWAY, To, WEB, in_overlay, pairs, vms},
};
use crate::{
    capture::Capture,
    interrupt,
    netns::{Netns, PinDir},
    process::Process,
    shell, traffic,
};

/// Starting a program on a busy two-core machine.
const START_LIMIT: Duration = Duration::from_secs(30);
/// From the last agent's start to the last node's READY, and from a restart to READY again.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// Of the core.
pub(crate) const CORE_PORT: u16 = 7443;
/// The router's address on every device, reachable without a subnet.
const GATEWAY_V6: &str = "fe80::1";
const GATEWAY_V4: &str = "169.254.77.1";
/// Port of the web servers.
pub(crate) const WEB_PORT: u16 = 8080;
/// Where UDP is answered.
pub(crate) const UDP_PORT: u16 = 5353;
/// Port of the stand-in for a database.
pub(crate) const DATABASE_PORT: u16 = 5432;
/// Port of the stand-in for sshd.
pub(crate) const SSH_PORT: u16 = 22;
/// UDP port of the tunnels.
pub(crate) const TUNNEL_PORT: u16 = 51820;
/// The file that web servers have for transfers: at the rate of the checks it takes several seconds.
pub(crate) const LARGE_FILE: &str = "/large";
/// Its size.
pub(crate) const LARGE_BYTES: u64 = 64 << 20;
/// The large file is a sequence of blocks that all begin with the marker: each full-sized packet holds a part of one.
const BLOCK: usize = 512;

/// A host of the fleet: a namespace with one device `eth0`.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) netns: Netns,
    spec: &'static Spec,
}

/// The file for large transfers.
#[derive(Debug)]
pub(crate) struct LargeFile {
    /// Random, in each of its blocks.
    pub(crate) marker: [u8; 16],
    pub(crate) sha256: Vec<u8>,
}

impl LargeFile {
    /// Writes one of so many bytes.
    pub(crate) fn write(path: &Path, bytes: u64) -> anyhow::Result<Self> {
        let random = SystemRandom::new();
        let mut marker = [0; 16];
        let mut block = [0; BLOCK];
        let fill =
            |bytes: &mut [u8]| random.fill(bytes).ok().context("the system gave no randomness");
        fill(&mut marker)?;
        fill(&mut block)?;
        block[..marker.len()].copy_from_slice(&marker);
        let mut contents = block.repeat(usize::try_from(bytes)? / BLOCK);
        // No two blocks are the same, so that a lost or doubled one does not go unnoticed.
        for (n, block) in (0_u64..).zip(contents.chunks_mut(BLOCK)) {
            block[marker.len()..marker.len() + 8].copy_from_slice(&n.to_be_bytes());
        }
        shell::write(path, &contents)?;
        Ok(Self { marker, sha256: digest(&SHA256, &contents).as_ref().to_vec() })
    }

    /// In hexadecimal digits.
    pub(crate) fn sha256_text(&self) -> String {
        shell::hex(&self.sha256)
    }
}

/// Running agent of one VM.
#[derive(Debug)]
struct Agent {
    // First: no process holds what is then unpinned.
    process: Process,
    pins: PinDir,
}

/// Everything that runs. Dropping it stops all of it and leaves nothing on the host.
#[derive(Debug)]
pub(crate) struct Fleet {
    // Dropped in this order: processes before the namespaces they are in, the folder of their files last. The tunnels'
    // engines leave their agents, and end with their namespace.
    agents: BTreeMap<&'static str, Agent>,
    core: Option<Process>,
    web: BTreeMap<&'static str, Process>,
    hosts: BTreeMap<&'static str, Host>,
    router: Netns,
    large: LargeFile,
    control: Control,
}

impl Fleet {
    /// Builds the network and starts the servers, without core and agents.
    pub(crate) fn new(programs: Programs) -> anyhow::Result<Self> {
        let control = Control::new(programs, "run")?;
        let router = Netns::new("router")?;
        router.sysctl("net/ipv4/ip_forward", "1")?;
        router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let mut hosts = BTreeMap::new();
        for spec in HOSTS {
            interrupt::check()?;
            hosts.insert(spec.name, host(spec, &router)?);
        }
        for family in [Family::V4, Family::V6] {
            let public = To::Public.address(family).context("the public address")?.to_string();
            let gateway = To::Underlay(GATEWAY).address(family).context("the gateway")?;
            router.ip(&["route", "add", &public, "via", &gateway.to_string()])?;
        }
        let large = LargeFile::write(&control.dir().join("large"), LARGE_BYTES)?;
        let mut fleet = Self {
            agents: BTreeMap::new(),
            core: None,
            web: BTreeMap::new(),
            hosts,
            router,
            large,
            control,
        };
        fleet.start_servers()?;
        Ok(fleet)
    }

    /// A host by name.
    pub(crate) fn host(&self, name: &str) -> anyhow::Result<&Host> {
        self.hosts.get(name).with_context(|| format!("the fleet has no host `{name}`"))
    }

    /// The namespace of a host.
    pub(crate) fn netns(&self, name: &str) -> anyhow::Result<&Netns> {
        Ok(&self.host(name)?.netns)
    }

    /// Where traffic goes.
    pub(crate) fn address(&self, to: To, family: Family) -> anyhow::Result<IpAddr> {
        to.address(family).with_context(|| format!("there is no {}", to.name()))
    }

    /// As [`Fleet::address`], of IPv4 and with a port.
    pub(crate) fn socket_address(&self, to: To, port: u16) -> anyhow::Result<SocketAddr> {
        Ok(SocketAddr::new(self.address(to, Family::V4)?, port))
    }

    /// Records what passes the router from now on; `filter` is tcpdump's.
    pub(crate) fn capture(&self, name: &str, filter: &str) -> anyhow::Result<Capture> {
        Capture::start(&self.router, &self.dir().join(format!("{name}.pcap")), filter)
    }

    /// Its core, agents and command line.
    pub(crate) fn control(&self) -> &Control {
        &self.control
    }

    /// The file that each web server has at [`LARGE_FILE`].
    pub(crate) fn large(&self) -> &LargeFile {
        &self.large
    }

    /// Folder of logs, sockets and state.
    pub(crate) fn dir(&self) -> &Path {
        self.control.dir()
    }

    /// The core's socket for operators.
    pub(crate) fn socket(&self) -> PathBuf {
        self.control.socket()
    }

    /// Folder of the core's state.
    pub(crate) fn core_state(&self) -> PathBuf {
        self.control.core_state()
    }

    /// Folder of an agent's state.
    pub(crate) fn agent_state(&self, vm: &str) -> PathBuf {
        self.control.agent_state(vm)
    }

    /// Every process in a namespace of the fleet.
    pub(crate) fn processes(&self) -> anyhow::Result<Vec<Pid>> {
        let mut all = Vec::new();
        for host in self.hosts.values() {
            all.extend(host.netns.processes()?);
        }
        Ok(all)
    }

    /// Starts the core, or starts it again, and waits until it serves.
    pub(crate) fn start_core(&mut self) -> anyhow::Result<()> {
        let host = self.host("core")?;
        let listen = SocketAddr::new(host.spec.address(Family::V4), CORE_PORT);
        let core = self.control.start_core(&host.netns, listen)?;
        self.core = Some(core);
        Ok(())
    }

    /// Makes a join token that is good for the whole fleet.
    pub(crate) fn make_token(&self) -> anyhow::Result<()> {
        self.control.make_token(vms().len())
    }

    /// Starts the agent of each of these VMs, which never ran there.
    pub(crate) fn start_agents(&mut self, vms: &[&'static str]) -> anyhow::Result<()> {
        vms.iter().try_for_each(|vm| self.start_agent(vm, PinDir::new(vm)))
    }

    /// Waits until the core calls these VMs ready.
    pub(crate) fn wait_ready(&mut self, wanted: &[&str]) -> anyhow::Result<()> {
        let Some(seen) = self.control.wait_ready(wanted, READY_LIMIT)? else { return Ok(()) };
        let logs: String = self
            .agents
            .iter()
            .map(|(vm, agent)| format!("  agent of {vm}:\n{}", agent.process.tail()))
            .collect();
        bail!("not every node is READY after {READY_LIMIT:?}; the core says\n{seen}\n{logs}")
    }

    /// Kills an agent as a crash would. The data path stays.
    pub(crate) fn kill_agent(&mut self, vm: &str) -> anyhow::Result<()> {
        self.agents.get_mut(vm).with_context(|| format!("no agent on {vm}"))?.process.kill()
    }

    /// Starts a killed agent again on the pins it left.
    pub(crate) fn restart_agent(&mut self, vm: &'static str) -> anyhow::Result<()> {
        let agent = self.agents.remove(vm).with_context(|| format!("no agent on {vm}"))?;
        drop(agent.process);
        self.start_agent(vm, agent.pins)
    }

    /// Kills the process that moves the packets of a VM's tunnel, as a crash would.
    pub(crate) fn kill_engine(&self, vm: &str) -> anyhow::Result<()> {
        let engines = self.engines(vm)?;
        ensure!(!engines.is_empty(), "no tunnel engine runs on {vm}");
        for engine in engines {
            kill(engine, Signal::SIGKILL).with_context(|| format!("killing the engine of {vm}"))?;
        }
        Ok(())
    }

    /// The processes that move the packets of a VM's tunnel; none if its kernel does.
    pub(crate) fn engines(&self, vm: &str) -> anyhow::Result<Vec<Pid>> {
        let mut engines = Vec::new();
        for process in self.netns(vm)?.processes()? {
            // One that has ended meanwhile has none.
            let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            if line.split(|byte| *byte == 0).nth(1) == Some(b"tunnel") {
                engines.push(process);
            }
        }
        Ok(engines)
    }

    /// Kills the web server of a VM as a crash would.
    pub(crate) fn kill_web(&mut self, vm: &str) -> anyhow::Result<()> {
        self.web.get_mut(vm).with_context(|| format!("no web server on {vm}"))?.kill()
    }

    /// Starts the web server of a VM, or starts it again.
    pub(crate) fn start_web(&mut self, vm: &'static str) -> anyhow::Result<()> {
        let root = self.dir().join(format!("www-{vm}"));
        let port = WEB_PORT.to_string();
        let mut command = self.netns(vm)?.command("python3")?;
        command.args(["-u", "-m", "http.server", &port, "--bind", "::", "--protocol", "HTTP/1.1"]);
        command.arg("--directory").arg(root);
        let log = self.log(&format!("http-{vm}"));
        let mut server = Process::spawn("http.server", &mut command, &log)?;
        server.wait_for("Serving HTTP", START_LIMIT)?;
        self.web.insert(vm, server);
        Ok(())
    }

    /// Ends a VM's agent and takes its data path away.
    pub(crate) fn detach(&mut self, vm: &str) -> anyhow::Result<()> {
        let agent = self.agents.get_mut(vm).with_context(|| format!("no agent on {vm}"))?;
        agent.process.terminate(START_LIMIT)?;
        let host = self.hosts.get(vm).with_context(|| format!("no host {vm}"))?;
        let mut command = host.netns.command(&self.control.programs.agent)?;
        shell::read(command.arg("detach").arg("--bpffs").arg(agent.pins.path())).map(drop)
    }

    /// Kills the core as a crash would.
    pub(crate) fn kill_core(&mut self) -> anyhow::Result<()> {
        self.core.take().context("no core runs")?.kill()
    }

    /// Runs the operator's command line.
    pub(crate) fn cli(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        self.control.cli(arguments)
    }

    /// As [`Fleet::cli`], and it must succeed. Returns its standard output.
    pub(crate) fn cli_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.control.cli_ok(arguments)
    }

    /// The operator's command line as a person would type it.
    pub(crate) fn cli_hint(&self) -> String {
        format!("{} --socket {}", self.control.programs.cli.display(), self.socket().display())
    }

    /// Makes the fleet's folder stay, for reading its logs, by moving the logs out of it.
    pub(crate) fn keep_logs(&self, to: &Path) -> anyhow::Result<()> {
        self.control.keep_logs(to)
    }

    fn start_agent(&mut self, vm: &'static str, pins: PinDir) -> anyhow::Result<()> {
        let host = self.host(vm)?;
        let labels = host.spec.vm.as_ref().with_context(|| format!("{vm} is no VM"))?.labels;
        let core = self.socket_address(To::Underlay("core"), CORE_PORT)?;
        let process = self.control.start_agent((vm, &host.netns), core, labels, &pins)?;
        self.agents.insert(vm, Agent { process, pins });
        Ok(())
    }

    /// Servers that answer the name of their VM, on the ports that policy will open or close.
    fn start_servers(&mut self) -> anyhow::Result<()> {
        for vm in WEB {
            let root = self.dir().join(format!("www-{vm}"));
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&root)
                .with_context(|| format!("making {}", root.display()))?;
            shell::write(&root.join("index.html"), vm)?;
            fs::hard_link(self.dir().join("large"), root.join("large"))
                .with_context(|| format!("linking into {}", root.display()))?;
            self.start_web(vm)?;
            traffic::serve_udp(self.netns(vm)?, UDP_PORT, vm)?;
        }
        for vm in vms() {
            traffic::serve_tcp(self.netns(vm)?, SSH_PORT, vm)?;
        }
        traffic::serve_tcp(self.netns("db1")?, DATABASE_PORT, "db1")?;
        traffic::serve_udp(self.netns("client")?, UDP_PORT, "client")
    }

    fn log(&self, name: &str) -> PathBuf {
        self.control.log(name)
    }
}

fn host(spec: &'static Spec, router: &Netns) -> anyhow::Result<Host> {
    let netns = Netns::new(spec.name)?;
    let port = format!("to-{}", spec.name);
    Netns::veth((&netns, "eth0"), (router, &port))?;
    let v4 = format!("{}/32", spec.address(Family::V4));
    let v6 = format!("{}/128", spec.address(Family::V6));
    netns.ip(&["address", "add", &v4, "dev", "eth0"])?;
    netns.ip(&["address", "add", &v6, "dev", "eth0", "nodad"])?;
    router.ip(&["address", "add", &format!("{GATEWAY_V4}/32"), "dev", &port])?;
    router.ip(&["address", "add", &format!("{GATEWAY_V6}/64"), "dev", &port, "nodad"])?;
    netns.ip(&["route", "add", "default", "via", GATEWAY_V4, "dev", "eth0", "onlink"])?;
    netns.ip(&["-6", "route", "add", "default", "via", GATEWAY_V6, "dev", "eth0"])?;
    router.ip(&["route", "add", &v4, "dev", &port])?;
    router.ip(&["-6", "route", "add", &v6, "dev", &port])?;
    Ok(Host { netns, spec })
}
