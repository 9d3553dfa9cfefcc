//! A VM with WireGuard in its kernel joins a fleet of this host, where the engine moves the packets.
//!
//! ```text
//!  QEMU: node debian                underlay: core 10.78.1.1           host: node host
//!  10.78.1.2 fd78:1::2 ──── tap0 ── 10.78.1.1      10.78.2.1 ── veth ── 10.78.2.2 fd78:2::2
//!  10.79.0.2 fd79::2 ═══════════════ WireGuard over UDP ═══════════════ 10.79.0.1 fd79::1
//! ```
//! The VM has no control channel: it does its part of the checks by a script, and says on the serial console what it saw.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use ring::digest::{SHA256, digest};
use serde_json::Value;

use super::{Initramfs, Kernel, MODULES, QEMU, cache, configure, unpacked};
use crate::{
    capture::{Capture, Ip, Recording},
    checks::Report,
    fleet::{CORE_PORT, Control, LargeFile, Programs, TUNNEL_PORT, WEB_PORT},
    interrupt,
    netns::{self, Netns, PinDir},
    process::Process,
    progress, run, shell,
    traffic::{self, Probe},
};

/// Beside those of the kernel tests.
const NETWORK_CARD: [&str; 2] = ["virtio_pci", "virtio_net"];
/// Names of the nodes.
const HOST: &str = "host";
const VM: &str = "debian";
const CORE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 78, 1, 1)), CORE_PORT);
/// Addresses in the network, of both families.
const HOST_OVERLAY: [&str; 2] = ["10.79.0.1", "fd79::1"];
const VM_OVERLAY: [&str; 2] = ["10.79.0.2", "fd79::2"];
const NETWORK: &str = "kind: Network\n\
    metadata: {name: overlay}\n\
    spec:\n\
    \x20 ipv4: 10.79.0.0/24\n\
    \x20 ipv6: \"fd79::/64\"\n\
    \x20 addresses:\n\
    \x20   host: {ipv4: 10.79.0.1, ipv6: \"fd79::1\"}\n\
    \x20   debian: {ipv4: 10.79.0.2, ipv6: \"fd79::2\"}\n";
/// In each direction and family. The emulated CPU encrypts some MB in a second.
const TRANSFER_BYTES: u64 = 4 << 20;
/// Where the host sends the file to whoever connects: busybox's clients that need no name service are raw ones.
const FILE_PORT: u16 = 9000;
/// From power to the agent's start: seconds.
const BOOT_LIMIT: Duration = Duration::from_mins(1);
/// Verifying and compiling the programs takes most of it.
const JOIN_LIMIT: Duration = Duration::from_mins(3);
const HOST_READY_LIMIT: Duration = Duration::from_mins(1);
/// From an agent's event to its being visible to the operator.
const REPORT_LIMIT: Duration = Duration::from_secs(30);
/// What the VM asks and transfers, all together.
const SCRIPT_LIMIT: Duration = Duration::from_mins(3);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const TRANSFER_LIMIT: Duration = Duration::from_mins(1);
/// Before what the VM's script has to say.
const SEEN: &str = "SEEN ";

/// Boots `kernel` into the fleet, with `agent` as a static program.
pub(super) fn run(kernel: Kernel, agent: &Path) -> anyhow::Result<()> {
    progress::heading(&format!("Debian's {} joins a fleet of this host", kernel.name()));
    netns::sweep();
    let programs = Programs::of(&run::build()?)?;
    let mut site = progress::step("core, network and the host's agent", || Site::new(programs))?;
    let mut report = Report::default();
    let result = prove(&mut site, kernel, agent, &mut report);
    if result.is_err() || !report.all_hold() {
        let logs = cache()?.join("logs");
        site.control.keep_logs(&logs)?;
        progress::say(&format!("\nlogs of core, agents and console: {}", logs.display()));
    }
    result?;
    println!("\n{}", report.summary());
    ensure!(report.all_hold(), "not every check of the VM in the fleet holds");
    Ok(())
}

fn prove(site: &mut Site, kernel: Kernel, agent: &Path, report: &mut Report) -> anyhow::Result<()> {
    let capture = site.control.dir().join("underlay.pcap");
    let capture = Capture::start(&site.underlay, &capture, "")?;
    let release = progress::step(&format!("Linux {} boots", kernel.name()), || {
        site.boot(kernel, agent)?;
        site.wait_for_vm("started", BOOT_LIMIT)?;
        site.release()
    })?;
    progress::step("its agent loads the programs and joins, emulated", || {
        let late = site.control.wait_ready(&[HOST, VM], JOIN_LIMIT)?;
        late.map_or(Ok(()), |seen| {
            bail!("not READY after {JOIN_LIMIT:?}; the core says\n{seen}\n{}", site.console()?)
        })
    })?;
    site.control.cli_ok(&["wait", "--timeout", "60s"])?;
    report.add(&format!("{VM} with Linux {release}"), "READY", "READY");
    for (node, backend) in [(VM, "kernel"), (HOST, "engine")] {
        let (seen, reason) = site.backend(node)?;
        let name = format!("what moves the packets of {node}");
        report.judge(&name, backend, &format!("{seen}: {reason}"), seen == backend);
    }
    progress::step("pings and transfers begun by the VM", || {
        site.wait_for_vm("done", SCRIPT_LIMIT)
    })?;
    from_vm(site, report)?;
    from_host(site, report)?;
    wire(&capture.finish()?, &site.large, report)
}

/// What the VM's script saw.
fn from_vm(site: &Site, report: &mut Report) -> anyhow::Result<()> {
    let console = site.console()?;
    let whole = site.large.sha256_text();
    for address in HOST_OVERLAY {
        let ping = said(&console, &format!("ping {address} "));
        let ping = ping.map_or("nothing".to_owned(), |line| pings(&line));
        report.add(&format!("{VM} -> {HOST}: ping {address}"), "3 of 3", &ping);
    }
    for address in HOST_OVERLAY {
        let sum = said(&console, &format!("sha256 {address} ")).unwrap_or_default();
        let seen = judge_sum(sum.split(' ').next().unwrap_or_default(), &whole);
        report.add(&format!("{VM} <- {HOST}: download from {address}"), &complete(), &seen);
    }
    Ok(())
}

/// What this host sees of the VM.
fn from_host(site: &Site, report: &mut Report) -> anyhow::Result<()> {
    let whole = site.large.sha256_text();
    for address in VM_OVERLAY {
        let seen = Probe::Ping { bytes: 56 }.run(&site.host, address.parse()?, ANSWER_LIMIT);
        report.add_result(&format!("{HOST} -> {VM}: ping {address}"), "3 of 3", seen);
    }
    for address in VM_OVERLAY {
        let mut command = site.host.command("curl")?;
        let limit = TRANSFER_LIMIT.as_secs().to_string();
        command.args(["--silent", "--show-error", "--noproxy", "*", "--max-time", &limit]);
        let output = shell::capture(command.arg(url(address)))?;
        let seen = if output.status.success() {
            judge_sum(&shell::hex(digest(&SHA256, &output.stdout).as_ref()), &whole)
        } else {
            String::from_utf8_lossy(&output.stderr).trim().to_owned()
        };
        report.add(&format!("{HOST} <- {VM}: download from {address}"), &complete(), &seen);
    }
    Ok(())
}

/// What passed between the VM, the core and the host.
fn wire(recording: &Recording, large: &LargeFile, report: &mut Report) -> anyhow::Result<()> {
    let (mut kinds, mut inside) = (BTreeSet::new(), 0);
    recording.each(|packet| {
        if let Some(ip) = packet.ip {
            kinds.extend(kind(ip));
            inside += u32::from([ip.source, ip.destination].into_iter().any(in_overlay));
        }
    })?;
    report.add(
        "what the underlay carries",
        &format!("TCP of the core and UDP to port {TUNNEL_PORT}"),
        &Vec::from_iter(kinds).join(" and "),
    );
    report.add("packets there with addresses of the overlay", "0", &inside.to_string());
    let seen = recording.count(&large.marker)?.to_string();
    report.add("packets there with a piece of the file", "0", &seen);
    Ok(())
}

/// In words; nothing of what finds neighbours, which IPv6 does above IP.
fn kind(ip: Ip) -> Option<String> {
    const HOP_BY_HOP: u8 = 0;
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const ICMPV6: u8 = 58;
    match (ip.protocol, ip.ports) {
        (HOP_BY_HOP | ICMPV6, _) if ip.source.is_ipv6() => None,
        (TCP, Some((from, to))) if from == CORE_PORT || to == CORE_PORT => {
            Some("TCP of the core".to_owned())
        }
        (UDP, Some((_, port))) => Some(format!("UDP to port {port}")),
        (protocol, ports) => Some(format!("protocol {protocol}, ports {ports:?}")),
    }
}

fn in_overlay(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets().starts_with(&[10, 79]),
        IpAddr::V6(v6) => v6.segments().starts_with(&[0xfd79]),
    }
}

/// Everything that runs. Dropping it stops all of it and leaves nothing on the host.
struct Site {
    // Dropped in this order: processes before the namespaces they are in, the folder of their files last.
    qemu: Option<Process>,
    _agent: Process,
    _core: Process,
    _pins: PinDir,
    host: Netns,
    underlay: Netns,
    large: LargeFile,
    control: Control,
}

impl Site {
    /// All but the VM, and the network applied.
    fn new(programs: Programs) -> anyhow::Result<Self> {
        let control = Control::new(programs, "vm")?;
        let (underlay, host) = (Netns::new("underlay")?, Netns::new(HOST)?);
        connect(&underlay, &host)?;
        prefer_engine(&host)?;
        let file = control.dir().join("large");
        let large = LargeFile::write(&file, TRANSFER_BYTES)?;
        traffic::serve_file(&host, FILE_PORT, &file)?;
        let core = control.start_core(&underlay, CORE)?;
        control.make_token(2)?;
        let pins = PinDir::new(HOST);
        let agent = control.start_agent((HOST, &host), CORE, "kind=host", &pins)?;
        let site = Self {
            qemu: None,
            _agent: agent,
            _core: core,
            _pins: pins,
            host,
            underlay,
            large,
            control,
        };
        if let Some(seen) = site.control.wait_ready(&[HOST], HOST_READY_LIMIT)? {
            bail!("{HOST} is not READY after {HOST_READY_LIMIT:?}; the core says\n{seen}");
        }
        let manifest = site.control.manifest("network.yaml", NETWORK)?;
        site.control.cli_ok(&["apply", "-f", &manifest, "--wait", "--timeout", "60s"])?;
        Ok(site)
    }

    /// Starts the VM.
    fn boot(&mut self, kernel: Kernel, agent: &Path) -> anyhow::Result<()> {
        let tree = unpacked(kernel)?;
        let mut initramfs = Initramfs::new(&tree, &[MODULES, &NETWORK_CARD].concat())?;
        initramfs.program("bin/cnsmo-agent", agent)?;
        initramfs.copy("token", &self.control.token_file())?;
        initramfs.folder("www");
        initramfs.copy("www/large", &self.control.dir().join("large"))?;
        let initrd = self.control.dir().join("initrd");
        shell::write(&initrd, initramfs.finish(&script()))?;
        let mut qemu = self.underlay.command(QEMU)?;
        configure(&mut qemu, kernel, &tree, &initrd)?
            .args(["-netdev", "tap,id=n0,ifname=tap0,script=no,downscript=no"])
            .args(["-device", "virtio-net-pci,netdev=n0,romfile="]);
        self.qemu = Some(Process::spawn("qemu", &mut qemu, &self.control.log("console"))?);
        Ok(())
    }

    /// Waits until the VM's script says so.
    fn wait_for_vm(&mut self, word: &str, limit: Duration) -> anyhow::Result<()> {
        let qemu = self.qemu.as_mut().context("the VM was not started")?;
        let mut running = true;
        let said = interrupt::wait_until(limit, || {
            running = qemu.is_running()?;
            Ok(said(&qemu.output()?, word).is_some() || !running)
        })?;
        let console = qemu.output()?;
        if let Some(line) = console.lines().find(|line| line.contains("INSMOD FAIL")) {
            bail!("a module was not loaded: {line}");
        }
        ensure!(running, "the VM stopped, the console says\n{console}");
        ensure!(said, "the VM has not said `{word}` after {limit:?}, but\n{console}");
        Ok(())
    }

    fn console(&self) -> anyhow::Result<String> {
        self.qemu.as_ref().context("the VM was not started")?.output()
    }

    /// Of the kernel that booted.
    fn release(&self) -> anyhow::Result<String> {
        let console = self.console()?;
        let release = console.lines().find_map(|line| line.split("BOOTED ").nth(1));
        Ok(release.context("the kernel did not say its release")?.trim().to_owned())
    }

    /// What moves the packets of a node's tunnel, and why, as the operator sees it.
    fn backend(&self, node: &str) -> anyhow::Result<(String, String)> {
        let mut overlay = Value::Null;
        interrupt::wait_until(REPORT_LIMIT, || {
            overlay = self.control.get(&["node", node])?["status"]["overlay"].take();
            Ok(overlay["backend"].is_string())
        })?;
        let text = |field| overlay[field].as_str().unwrap_or_default().to_owned();
        Ok((text("backend"), text("reason")))
    }
}

/// Namespaces and the tap, with addresses and routes.
fn connect(underlay: &Netns, host: &Netns) -> anyhow::Result<()> {
    underlay.sysctl("net/ipv4/ip_forward", "1")?;
    underlay.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    Netns::veth((host, "eth0"), (underlay, "to-host"))?;
    underlay.ip(&["tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr"])?;
    for (netns, device, addresses) in [
        (underlay, "tap0", ["10.78.1.1/24", "fd78:1::1/64"]),
        (underlay, "to-host", ["10.78.2.1/24", "fd78:2::1/64"]),
        (host, "eth0", ["10.78.2.2/24", "fd78:2::2/64"]),
    ] {
        for address in addresses {
            netns.ip(&["address", "add", address, "dev", device])?;
        }
        netns.ip(&["link", "set", device, "up"])?;
    }
    host.ip(&["route", "add", "10.78.0.0/16", "via", "10.78.2.1"])?;
    host.ip(&["-6", "route", "add", "fd78::/16", "via", "fd78:2::1"])
}

/// Where the kernel of this host has WireGuard too, a device in user space is there before the agent, which takes it over.
fn prefer_engine(host: &Netns) -> anyhow::Result<()> {
    if host.ip(&["link", "add", "probe", "type", "wireguard"]).is_err() {
        return Ok(());
    }
    host.ip(&["link", "delete", "probe"])?;
    host.ip(&["tuntap", "add", "dev", "cnsmo0", "mode", "tun", "vnet_hdr"])
}

/// What the VM does. It has no default route: nothing for the overlay can leave beside the tunnel.
fn script() -> String {
    let [v4, v6] = HOST_OVERLAY;
    format!(
        "until [ -e /sys/class/net/eth0 ]; do usleep 50000; done\n\
         echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad\n\
         ip link set lo up\n\
         ip address add 10.78.1.2/24 dev eth0\n\
         ip address add fd78:1::2/64 dev eth0\n\
         ip link set eth0 up\n\
         ip route add 10.78.0.0/16 via 10.78.1.1\n\
         ip -6 route add fd78::/16 via fd78:1::1\n\
         httpd -p {WEB_PORT} -h /www\n\
         export CNSMO_CORE={CORE}\n\
         cnsmo-agent --node {VM} --token-file /token --interface eth0 --label kind=vm &\n\
         echo; echo {SEEN}started\n\
         for address in {v4} {v6}; do\n\
         until ping -c 1 -W 2 $address > /dev/null 2>&1; do usleep 200000; done\n\
         result=$(ping -c 3 -W 5 $address | grep received)\n\
         echo; echo {SEEN}ping $address $result\n\
         done\n\
         for address in {v4} {v6}; do\n\
         sum=$(nc $address {FILE_PORT} < /dev/null | sha256sum)\n\
         echo; echo {SEEN}sha256 $address $sum\n\
         done\n\
         echo; echo {SEEN}done\n\
         wait"
    )
}

fn url(address: &str) -> String {
    let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    format!("http://{host}:{WEB_PORT}/large")
}

/// The rest of the script's line that starts with `what`.
fn said(console: &str, what: &str) -> Option<String> {
    // An unfinished line may lack its end.
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut lines = whole.lines().filter_map(|line| line.trim_end().strip_prefix(SEEN));
    lines.find_map(|line| line.strip_prefix(what)).map(str::to_owned)
}

/// `3 packets transmitted, 3 packets received, 0% packet loss` in short.
fn pings(line: &str) -> String {
    let count = |what| line.split(", ").find_map(|part| part.strip_suffix(what));
    match (count(" packets received"), count(" packets transmitted")) {
        (Some(received), Some(sent)) => format!("{received} of {sent}"),
        _ => line.to_owned(),
    }
}

fn complete() -> String {
    format!("{} MiB, SHA-256 as sent", TRANSFER_BYTES >> 20)
}

fn judge_sum(seen: &str, whole: &str) -> String {
    if seen == whole { complete() } else { format!("another SHA-256: {seen}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_of_the_script_count() {
        let console = "BOOTED\r\nSEEN ping fd79::1 3 packets transmitted, 2 packets received, 33% packet \
                       loss\r\nINFO SEEN done\r\nSEEN do";
        let line = said(console, "ping fd79::1 ").unwrap();
        assert_eq!(pings(&line), "2 of 3");
        assert_eq!(said(console, "ping 10.79.0.1 "), None);
        assert_eq!(said(console, "do"), None);
        assert_eq!(said(&format!("{console}ne\r\n"), "done").unwrap(), "");
    }

    #[test]
    fn only_tunnel_and_core_pass_for_what_they_are() {
        let ip = |protocol, ports| Ip {
            source: CORE.ip(),
            destination: Ipv4Addr::new(10, 78, 2, 2).into(),
            protocol,
            ports,
        };
        let tunnel = Some((40_000, TUNNEL_PORT));
        assert_eq!(kind(ip(17, tunnel)).unwrap(), "UDP to port 51820");
        assert_eq!(kind(ip(6, Some((CORE_PORT, 5)))).unwrap(), "TCP of the core");
        for other in [ip(6, tunnel), ip(1, None), ip(58, None), ip(17, None)] {
            assert!(kind(other).unwrap().starts_with("protocol "));
        }
    }
}
