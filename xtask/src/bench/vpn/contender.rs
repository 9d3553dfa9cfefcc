//! One WireGuard program at both ends of a tunnel, in two namespaces of its own.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::{
    bench::driver::Driver,
    interrupt,
    netns::{Netns, RunDir},
    process::Process,
    shell,
};

/// Inside the tunnel, of both ends.
pub(super) const INNER: [&str; 2] = ["198.18.0.1", "198.18.0.2"];
const OUTER: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
const LISTEN_PORT: u16 = 51820;
/// What is left of 1500 bytes under IPv6, as WireGuard's own tools set it.
const MTU: &str = "1420";

/// Secret and public halves: known to all, so good for nothing but namespaces without a way out.
const KEYS: [(&str, &str); 2] = [
    (
        "0101010101010101010101010101010101010101010101010101010101010101",
        "a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209",
    ),
    (
        "0202020202020202020202020202020202020202020202020202020202020202",
        "ce8d3ad1ccb633ec7b70c17814a5c76ecd029685050d344745ba05870e587d59",
    ),
];

/// Of ours.
const DEVICE: &str = "cnsmo0";

/// Where the others have their sockets.
const UAPI: &str = "/var/run/wireguard";

const START_MAX: Duration = Duration::from_secs(10);

/// What moves the packets.
#[derive(Clone, Copy)]
pub(super) enum Kind<'a> {
    /// Our engine under our agent's `Tunnel`, by a program that does nothing else.
    Ours(&'a Path),
    /// A program that takes a device's name, makes the device, and is configured over a socket.
    Uapi(&'a Path, &'static [&'static str]),
}

/// The daemons run until it is dropped.
pub(super) struct Contender {
    /// For people: with the version.
    pub(super) name: String,
    /// Of the daemons, their helpers included.
    pids: Vec<Pid>,
    // Before the namespaces: ours clears up in them.
    _daemons: [Daemon; 2],
    pub(super) ends: [Netns; 2],
}

enum Daemon {
    Ours { _driver: Driver, _state: RunDir },
    Uapi { _process: Process, _socket: Socket },
}

impl Contender {
    pub(super) fn start(name: &str, kind: Kind<'_>, logs: &Path) -> anyhow::Result<Self> {
        let ends = [Netns::new("vpn-a")?, Netns::new("vpn-b")?];
        Netns::veth((&ends[0], "eth0"), (&ends[1], "eth0"))?;
        for (netns, outer) in ends.iter().zip(OUTER) {
            netns.ip(&["address", "add", &format!("{outer}/24"), "dev", "eth0"])?;
        }
        let daemons = match kind {
            Kind::Ours(program) => ours(program, &ends),
            Kind::Uapi(program, arguments) => {
                let start = |end: usize| uapi(program, arguments, end, &ends[end], logs);
                start(0).and_then(|first| Ok([first, start(1)?]))
            }
        };
        let daemons = daemons.with_context(|| format!("starting {name}"))?;
        let name = name.to_owned();
        let mut contender = Self { name, pids: vec![], _daemons: daemons, ends };
        contender.check()?;
        for netns in &contender.ends {
            contender.pids.extend(netns.processes()?);
        }
        Ok(contender)
    }

    /// Time that the daemons of both ends have had on processors.
    pub(super) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let ticks_per_second =
            sysconf(SysconfVar::CLK_TCK)?.context("the system has no clock ticks")?;
        let ticks = self.pids.iter().map(|pid| cpu_ticks(*pid));
        Ok(ticks.sum::<anyhow::Result<u64>>()? as f64 / ticks_per_second as f64)
    }

    /// A ping comes back: there is no other way between the inner addresses.
    fn check(&self) -> anyhow::Result<()> {
        let answered = interrupt::wait_until(START_MAX, || {
            let mut ping = self.ends[0].command("ping")?;
            let output = ping.args(["-c1", "-W1", INNER[1]]).stdin(Stdio::null()).output()?;
            Ok(output.status.success())
        })?;
        ensure!(answered, "{}: no ping comes through the tunnel", self.name);
        Ok(())
    }
}

/// Both ends, each told of the other.
fn ours(program: &Path, ends: &[Netns; 2]) -> anyhow::Result<[Daemon; 2]> {
    let start = |end: usize| -> anyhow::Result<_> {
        // Our tunnel takes over a device that is there; without one, a kernel that has WireGuard would move the packets.
        ends[end].ip(&["tuntap", "add", "dev", DEVICE, "mode", "tun"])?;
        let state = RunDir::new("bench-tunnel")?;
        let mut command = ends[end].command(program)?;
        command.arg("serve").arg(state.path()).args([INNER[end], MTU]);
        let mut driver = Driver::start(command.arg(LISTEN_PORT.to_string()))?;
        let key = driver.hear()?;
        Ok((driver, key, state))
    };
    let (mut a, mut b) = (start(0)?, start(1)?);
    for (driver, key, other) in [(&mut a.0, &b.1, 1), (&mut b.0, &a.1, 0)] {
        driver.tell(&format!("{key} {} {}:{LISTEN_PORT}", INNER[other], OUTER[other]))?;
        driver.wait_until_ready()?;
    }
    Ok([a, b].map(|(driver, _, state)| Daemon::Ours { _driver: driver, _state: state }))
}

fn uapi(
    program: &Path,
    arguments: &[&str],
    end: usize,
    netns: &Netns,
    logs: &Path,
) -> anyhow::Result<Daemon> {
    let device = device(end);
    let socket = Socket::of(&device);
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut command = netns.command(program)?;
    command.args(arguments).arg(&device);
    let mut process = Process::spawn(&name, &mut command, &logs.join(format!("{device}.log")))?;
    let there = interrupt::wait_until(START_MAX, || {
        ensure!(process.is_running()?, "it ended\n{}", process.tail());
        Ok(socket.0.exists())
    })?;
    ensure!(there, "{} is not there after {START_MAX:?}", socket.0.display());
    let other = 1 - end;
    socket.set(&format!(
        "set=1\nprivate_key={}\nlisten_port={LISTEN_PORT}\npublic_key={}\nendpoint={}:{LISTEN_PORT}\n\
         replace_allowed_ips=true\nallowed_ip={}/32\n\n",
        KEYS[end].0, KEYS[other].1, OUTER[other], INNER[other],
    ))?;
    netns.ip(&["address", "add", &format!("{}/24", INNER[end]), "dev", &device])?;
    netns.ip(&["link", "set", &device, "mtu", MTU, "up"])?;
    Ok(Daemon::Uapi { _process: process, _socket: socket })
}

/// The sockets of all namespaces are in one folder: a name of this run's own, at most 15 bytes.
fn device(end: usize) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("wg{}-{}{end}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A daemon's socket; dropping it removes what a killed daemon leaves.
struct Socket(PathBuf);

impl Socket {
    fn of(device: &str) -> Self {
        Self(Path::new(UAPI).join(format!("{device}.sock")))
    }

    /// One request of WireGuard's cross-platform interface.
    fn set(&self, request: &str) -> anyhow::Result<()> {
        let mut stream = UnixStream::connect(&self.0)
            .with_context(|| format!("connecting to {}", self.0.display()))?;
        stream.set_read_timeout(Some(START_MAX))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        for line in BufReader::new(stream).lines() {
            let line = line?;
            if line.is_empty() {
                break;
            }
            answer.push_str(&line);
        }
        ensure!(answer == "errno=0", "it refused its configuration: `{answer}`");
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// User and system time of a process, its threads included that have ended.
fn cpu_ticks(pid: Pid) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let stat = shell::text(Path::new(&path))?;
    parse_ticks(&stat).with_context(|| format!("{path} has no times: {stat}"))
}

/// See proc_pid_stat(5): the name is in parentheses and may contain any character.
fn parse_ticks(stat: &str) -> Option<u64> {
    let (_, behind_name) = stat.rsplit_once(')')?;
    let mut fields = behind_name.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

/// What a program calls itself, in the last word of the first line.
pub(super) fn version(program: &Path) -> anyhow::Result<String> {
    let text = shell::read(Command::new(program).arg("--version"))?;
    let first = text.lines().next().unwrap_or_default();
    let version = first.split_whitespace().next_back().unwrap_or_default();
    ensure!(!version.is_empty(), "{} has no version", program.display());
    Ok(version.trim_start_matches('v').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 250 31 0 0 20 0 4 0 100";
        assert_eq!(parse_ticks(stat), Some(281));
        assert_eq!(parse_ticks("7 (a) S 1"), None);
    }
}
