//! A fleet of VMs on one host: network namespaces in two sites behind a router, one core, one agent for each VM.
//!
//! ```text
//!  site a                          router                          site b
//!  web1 10.77.1.11, bastion .5 ──┐         ┌── web2 10.77.2.11, db1 .21
//!                                ├─ router ─┤
//!  outside: client 10.77.9.9 ────┘         └── core 10.77.9.2
//! ```
//! Each host has the same last part in IPv6: 10.77.1.11 is fd77:1::11. As in a cloud, a VM has a host address
//! and everything goes through its router.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use crate::{
    cargo::Built,
    interrupt,
    netns::{Netns, PinDir, RunDir},
    process::Process,
    shell, traffic,
};

/// Starting a program on a busy two-core machine.
const START_LIMIT: Duration = Duration::from_secs(30);
/// From the last agent's start to the last node's READY, and from a restart to READY again.
const READY_LIMIT: Duration = Duration::from_secs(60);
const CORE_PORT: u16 = 7443;
/// The router's address on every device, reachable without a subnet.
const GATEWAY_V6: &str = "fe80::1";
const GATEWAY_V4: &str = "169.254.77.1";

/// Address family of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// A host of the fleet, before it is built.
struct Spec {
    name: &'static str,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    /// Labels of its agent; a host without is no VM of the fleet.
    labels: Option<&'static str>,
}

const fn spec(name: &'static str, site: u8, host: u8, labels: Option<&'static str>) -> Spec {
    // The decimal digits are reused as hexadecimal ones, so that both addresses read alike.
    let digits = (host / 10 * 16 + host % 10) as u16;
    Spec {
        name,
        v4: Ipv4Addr::new(10, 77, site, host),
        v6: Ipv6Addr::new(0xfd77, site as u16, 0, 0, 0, 0, 0, digits),
        labels,
    }
}

const HOSTS: &[Spec] = &[
    spec("web1", 1, 11, Some("role=web,site=a")),
    spec("bastion", 1, 5, Some("role=bastion,site=a")),
    spec("web2", 2, 11, Some("role=web,site=b")),
    spec("db1", 2, 21, Some("role=db,site=b")),
    spec("client", 9, 9, None),
    spec("core", 9, 2, None),
];

/// The fleet's programs, as cargo built them.
#[derive(Debug)]
pub(crate) struct Programs {
    pub(crate) core: PathBuf,
    pub(crate) agent: PathBuf,
    pub(crate) cli: PathBuf,
}

impl Programs {
    /// Takes them from a build of the three packages.
    pub(crate) fn of(built: &Built) -> anyhow::Result<Self> {
        Ok(Self {
            core: built.executable("cnsmo-core")?,
            agent: built.executable("cnsmo-agent")?,
            cli: built.executable("cnsmo")?,
        })
    }
}

/// A host of the fleet: a namespace with one device `eth0`.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) netns: Netns,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Host {
    /// Its address of a family.
    pub(crate) fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
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
    // Dropped in this order: processes before the namespaces they are in, the folder of their files last.
    agents: BTreeMap<&'static str, Agent>,
    core: Option<Process>,
    servers: Vec<Process>,
    hosts: BTreeMap<&'static str, Host>,
    /// Held for its drop only.
    _router: Netns,
    programs: Programs,
    dir: RunDir,
}

impl Fleet {
    /// Builds the network and starts the servers, without core and agents.
    pub(crate) fn new(programs: Programs) -> anyhow::Result<Self> {
        let dir = RunDir::new("run")?;
        let router = Netns::new("router")?;
        router.sysctl("net/ipv4/ip_forward", "1")?;
        router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let mut hosts = BTreeMap::new();
        for spec in HOSTS {
            interrupt::check()?;
            hosts.insert(spec.name, host(spec, &router)?);
        }
        let mut fleet = Self {
            agents: BTreeMap::new(),
            core: None,
            servers: Vec::new(),
            hosts,
            _router: router,
            programs,
            dir,
        };
        fleet.start_servers()?;
        Ok(fleet)
    }

    /// A host by name.
    pub(crate) fn host(&self, name: &str) -> anyhow::Result<&Host> {
        self.hosts.get(name).with_context(|| format!("the fleet has no host `{name}`"))
    }

    /// Folder of logs, sockets and state.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The core's socket for operators.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir().join("core.sock")
    }

    /// Names of the VMs that run an agent.
    pub(crate) fn vms() -> impl Iterator<Item = &'static str> {
        HOSTS.iter().filter(|spec| spec.labels.is_some()).map(|spec| spec.name)
    }

    /// Starts the core, or starts it again, and waits until it serves.
    pub(crate) fn start_core(&mut self) -> anyhow::Result<()> {
        let host = self.host("core")?;
        let listen = format!("{}:{CORE_PORT}", host.address(Family::V4));
        let mut command = host.netns.command(&self.programs.core)?;
        command
            .arg("--state-dir")
            .arg(self.dir().join("core"))
            .args(["--listen", &listen])
            .arg("--socket")
            .arg(self.socket());
        let mut core = Process::spawn("cnsmo-core", &mut command, &self.log("core"))?;
        core.wait_for("ready", START_LIMIT)?;
        self.core = Some(core);
        Ok(())
    }

    /// Makes a join token that is good for the whole fleet, and starts an agent on each VM.
    pub(crate) fn start_agents(&mut self) -> anyhow::Result<()> {
        let uses = Self::vms().count().to_string();
        let file = self.token_file().display().to_string();
        self.cli_ok(&["token", "create", "--max-uses", &uses, "--ttl", "1h", "--output", &file])?;
        for vm in Self::vms() {
            self.start_agent(vm, PinDir::new(vm))?;
        }
        Ok(())
    }

    /// Waits until the core calls every VM ready.
    pub(crate) fn wait_ready(&mut self) -> anyhow::Result<()> {
        let wanted: Vec<_> = Self::vms().collect();
        let mut seen = String::new();
        let all = interrupt::wait_until(READY_LIMIT, || {
            let output = self.cli(&["nodes", "-o", "json"])?;
            seen = said(&output);
            let ready = ready_nodes(&String::from_utf8_lossy(&output.stdout));
            Ok(wanted.iter().all(|vm| ready.iter().any(|name| name == vm)))
        })?;
        if all {
            return Ok(());
        }
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

    /// Ends a VM's agent and takes its data path away.
    pub(crate) fn detach(&mut self, vm: &str) -> anyhow::Result<()> {
        let agent = self.agents.get_mut(vm).with_context(|| format!("no agent on {vm}"))?;
        agent.process.terminate(START_LIMIT)?;
        let host = self.hosts.get(vm).with_context(|| format!("no host {vm}"))?;
        let mut command = host.netns.command(&self.programs.agent)?;
        shell::read(command.arg("detach").arg("--bpffs").arg(agent.pins.path())).map(drop)
    }

    /// Kills the core as a crash would.
    pub(crate) fn kill_core(&mut self) -> anyhow::Result<()> {
        self.core.take().context("no core runs")?.kill()
    }

    /// Runs the operator's command line.
    pub(crate) fn cli(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(&self.programs.cli);
        command.arg("--socket").arg(self.socket()).args(arguments);
        let output = shell::capture(&mut command)?;
        interrupt::check()?;
        Ok(output)
    }

    /// As [`Fleet::cli`], and it must succeed. Returns its standard output.
    pub(crate) fn cli_ok(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.cli(arguments)?;
        let command = arguments.join(" ");
        ensure!(output.status.success(), "cnsmo {command} failed\n{}", said(&output).trim_end());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The operator's command line as a person would type it.
    pub(crate) fn cli_hint(&self) -> String {
        format!("{} --socket {}", self.programs.cli.display(), self.socket().display())
    }

    /// Makes the fleet's folder stay, for reading its logs, by moving the logs out of it.
    pub(crate) fn keep_logs(&self, to: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
        for log in shell::files(self.dir())? {
            if let (Some("log"), Some(name)) =
                (log.extension().and_then(|e| e.to_str()), log.file_name())
            {
                std::fs::copy(&log, to.join(name)).context("keeping a log")?;
            }
        }
        Ok(())
    }

    fn start_agent(&mut self, vm: &'static str, pins: PinDir) -> anyhow::Result<()> {
        let labels = HOSTS.iter().find(|spec| spec.name == vm).and_then(|spec| spec.labels);
        let core = format!("{}:{CORE_PORT}", self.host("core")?.address(Family::V4));
        let mut command = self.host(vm)?.netns.command(&self.programs.agent)?;
        command
            .args(["--core", &core, "--node", vm, "--interface", "eth0"])
            .args(["--label", labels.unwrap_or_default()])
            .arg("--token-file")
            .arg(self.token_file())
            .arg("--state-dir")
            .arg(self.dir().join(format!("agent-{vm}")))
            .arg("--bpffs")
            .arg(pins.path());
        let process = Process::spawn("cnsmo-agent", &mut command, &self.log(vm))?;
        self.agents.insert(vm, Agent { process, pins });
        Ok(())
    }

    /// Web servers, and echo servers on the ports that policy will open or close.
    fn start_servers(&mut self) -> anyhow::Result<()> {
        for vm in ["web1", "web2", "db1"] {
            let root = self.dir().join(format!("www-{vm}"));
            std::fs::create_dir(&root).with_context(|| format!("making {}", root.display()))?;
            shell::write(&root.join("index.html"), vm)?;
            let mut command = self.host(vm)?.netns.command("python3")?;
            command
                .args(["-u", "-m", "http.server", "80", "--bind", "::", "--directory"])
                .arg(root);
            let log = self.log(&format!("http-{vm}"));
            self.servers.push(Process::spawn("http.server", &mut command, &log)?);
        }
        for server in &mut self.servers {
            server.wait_for("Serving HTTP", START_LIMIT)?;
        }
        for (vm, ports) in [
            ("web1", &[22, 8080][..]),
            ("web2", &[22, 8080]),
            ("db1", &[22, 5432]),
            ("bastion", &[22]),
        ] {
            for port in ports {
                traffic::serve_tcp(&self.host(vm)?.netns, *port)?;
            }
        }
        for name in ["web1", "client"] {
            traffic::serve_udp(&self.host(name)?.netns, traffic::UDP_ECHO_PORT)?;
        }
        Ok(())
    }

    fn token_file(&self) -> PathBuf {
        self.dir().join("token")
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir().join(format!("{name}.log"))
    }
}

/// What a program wrote, errors first.
pub(crate) fn said(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    errors.into_owned() + &String::from_utf8_lossy(&output.stdout)
}

fn host(spec: &Spec, router: &Netns) -> anyhow::Result<Host> {
    let netns = Netns::new(spec.name)?;
    let port = format!("to-{}", spec.name);
    Netns::veth((&netns, "eth0"), (router, &port))?;
    let (v4, v6) = (format!("{}/32", spec.v4), format!("{}/128", spec.v6));
    netns.ip(&["address", "add", &v4, "dev", "eth0"])?;
    netns.ip(&["address", "add", &v6, "dev", "eth0", "nodad"])?;
    router.ip(&["address", "add", &format!("{GATEWAY_V4}/32"), "dev", &port])?;
    router.ip(&["address", "add", &format!("{GATEWAY_V6}/64"), "dev", &port, "nodad"])?;
    netns.ip(&["route", "add", "default", "via", GATEWAY_V4, "dev", "eth0", "onlink"])?;
    netns.ip(&["-6", "route", "add", "default", "via", GATEWAY_V6, "dev", "eth0"])?;
    router.ip(&["route", "add", &v4, "dev", &port])?;
    router.ip(&["-6", "route", "add", &v6, "dev", &port])?;
    Ok(Host { netns, v4: spec.v4, v6: spec.v6 })
}

/// Names of the nodes whose phase is READY in `cnsmo nodes -o json`. Empty while the core does not answer.
fn ready_nodes(json: &str) -> Vec<String> {
    let Ok(value) = serde_json::from_str::<Value>(json) else { return Vec::new() };
    let list = value.as_array().or_else(|| value["items"].as_array());
    let nodes = list.into_iter().flatten();
    nodes
        .filter(|node| {
            let phase = node["status"]["phase"].as_str().unwrap_or_default();
            phase.eq_ignore_ascii_case("ready") || phase == "PHASE_READY"
        })
        .filter_map(|node| Some(node["metadata"]["name"].as_str()?.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_addresses_of_a_host_read_alike() {
        let web1 = &HOSTS[0];
        assert_eq!(web1.v4.to_string(), "10.77.1.11");
        assert_eq!(web1.v6.to_string(), "fd77:1::11");
    }

    #[test]
    fn only_ready_nodes_count() {
        let json = r#"{"items":[
            {"metadata":{"name":"web1"},"status":{"phase":"READY"}},
            {"metadata":{"name":"web2"},"status":{"phase":"JOINING"}},
            {"metadata":{"name":"db1"}}]}"#;
        assert_eq!(ready_nodes(json), ["web1"]);
        assert!(ready_nodes("connection refused").is_empty());
    }
}
