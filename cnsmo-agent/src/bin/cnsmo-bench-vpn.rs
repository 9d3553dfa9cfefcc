//! What the engine costs per byte, beside other implementations of WireGuard: `cargo xtask bench vpn`.
//!
//! All run at the same time between the same two namespaces and take turns, round by round; the medians are printed as
//! JSON rows on standard output. Compared is CPU time of both daemons, which other load disturbs less than throughput.

use std::{
    fs, io,
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use cnsmo_agent::tunnel::{
    control::{self, Configure, PeerConfig, Request},
    key::PrivateKey,
};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

const ROUNDS: usize = 5;
const SECONDS: u64 = 2;
/// Largest plaintext on a path of 1,500 bytes.
const MTU: u16 = 1_420;
/// Where the peers' control sockets are, in whatever namespace they run.
const UAPI: &str = "/var/run/wireguard";
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    match measure() {
        Ok(rows) => match writeln!(io::stdout(), "[{}]", rows.join(",\n ")) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(error) => {
            let _ = writeln!(io::stderr(), "cnsmo-bench-vpn: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure() -> anyhow::Result<Vec<String>> {
    let lab = Lab::new()?;
    let ours = Pair::ours(&lab)?;
    let others = (1..).zip(PEERS).map(|(n, name)| Pair::of(&lab, n, name));
    let others: Vec<_> = others.collect::<anyhow::Result<_>>()?;
    let floor = (0..ROUNDS).map(|_| floor()).collect::<anyhow::Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    let mut costs = Vec::new();
    for other in &others {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push((ours.tcp(&lab)?, other.tcp(&lab)?));
        }
        let column = |of: fn(&(Load, Load)) -> f64| median(rounds.iter().map(of).collect());
        let ratio =
            |of: fn(&Load) -> f64| median(rounds.iter().map(|(a, b)| of(a) / of(b)).collect());
        let name = &other.name;
        rows.push(row(
            &format!("vpn/cpu-per-gb-vs-{name}"),
            "CPU s/GB",
            column(|(ours, _)| ours.cost),
            name,
            column(|(_, other)| other.cost),
            ratio(|load| load.cost),
            "lower",
        ));
        rows.push(row(
            &format!("vpn/tcp-vs-{name}"),
            "Gb/s",
            column(|(ours, _)| ours.rate),
            name,
            column(|(_, other)| other.rate),
            ratio(|load| load.rate),
            "higher",
        ));
        costs.extend(rounds.iter().map(|(ours, _)| ours.cost));
    }
    let (cost, floor) = (median(costs), median(floor));
    rows.push(row(
        "vpn/cpu-per-gb",
        "CPU s/GB",
        cost,
        "seal and open alone",
        floor,
        cost / floor,
        "lower",
    ));
    if let Some(other) = others.first() {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push((ours.udp64(&lab)?, other.udp64(&lab)?));
        }
        let ratio = median(rounds.iter().map(|(a, b)| a / b).collect());
        let (a, b) = rounds.into_iter().unzip();
        rows.push(row("vpn/udp64", "us/packet", median(a), &other.name, median(b), ratio, "lower"));
    }
    Ok(rows)
}

/// Names of other implementations, which are the names of their programs too.
const PEERS: &[&str] = &["wireguard-go"];

/// Two namespaces and the cable between them, gone with the value.
struct Lab {
    names: [String; 2],
    folder: PathBuf,
}

impl Lab {
    fn new() -> anyhow::Result<Self> {
        let name = |end| format!("cnsmo-{}-bench-{end}", std::process::id());
        let folder = std::env::temp_dir().join(name("vpn"));
        fs::create_dir(&folder)?;
        let lab = Self { names: [name("a"), name("b")], folder };
        for name in &lab.names {
            ip(&["netns", "add", name])?;
        }
        let [a, b] = &lab.names;
        ip(&[
            "link", "add", "wire", "netns", a, "type", "veth", "peer", "name", "wire", "netns", b,
        ])?;
        for (n, name) in (1..).zip(&lab.names) {
            ip(&["-n", name, "addr", "add", &format!("10.63.0.{n}/24"), "dev", "wire"])?;
            ip(&["-n", name, "link", "set", "wire", "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(lab)
    }

    fn inside(&self, end: usize, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.names[end])).arg("--").arg(program);
        command
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in &self.names {
            // What stays is in a namespace that carries the id of this process.
            let _ = ip(&["netns", "del", name]);
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Both ends of one implementation.
struct Pair {
    name: String,
    subnet: u16,
    daemons: [Daemon; 2],
}

/// One transfer.
struct Load {
    /// CPU seconds of both daemons per GB.
    cost: f64,
    /// Gb/s.
    rate: f64,
}

impl Pair {
    fn ours(lab: &Lab) -> anyhow::Result<Self> {
        let folders = [lab.folder.join("a"), lab.folder.join("b")];
        let mut keys = Vec::new();
        for folder in &folders {
            fs::create_dir(folder)?;
            keys.push(PrivateKey::open(&control::key_path(folder))?.public());
        }
        let program = std::env::current_exe()?.with_file_name("cnsmo-agent");
        let mut daemons = Vec::new();
        for (end, folder) in folders.iter().enumerate() {
            let mut command = lab.inside(end, &program);
            command.args(["tunnel", "--state-dir"]).arg(folder);
            daemons.push(Daemon::start(command)?);
            let other = 1 - end;
            let configure = Configure {
                listen_port: 51_000,
                mtu: MTU.into(),
                peers: vec![PeerConfig {
                    public_key: keys[other].0.to_vec(),
                    allowed_ips: vec![format!("10.64.0.{}/32", other + 1)],
                    endpoint: format!("10.63.0.{}:51000", other + 1),
                }],
            };
            until(|| control::ask(folder, Request::Configure(configure.clone())))
                .context("our engine does not answer")?;
        }
        Self::up(lab, "ours", 0, daemons, |_| "cnsmo0".to_owned())
    }

    fn of(lab: &Lab, n: u16, name: &str) -> anyhow::Result<Self> {
        let device =
            |end: usize| format!("cnb{}{n}{}", std::process::id() % 100_000, ["a", "b"][end]);
        let mut keys = Vec::new();
        for end in ["a", "b"] {
            let path = lab.folder.join(format!("{name}-{end}.key"));
            keys.push((PrivateKey::open(&path)?.public(), fs::read(&path)?));
        }
        let port = 51_000 + n;
        let mut daemons = Vec::new();
        for end in 0..2 {
            let mut command = lab.inside(end, name);
            command.args(["--foreground", &device(end)]);
            daemons.push(Daemon::start(command).with_context(|| format!("starting {name}"))?);
            let other = 1 - end;
            let request = format!(
                "set=1\nprivate_key={}\nlisten_port={port}\npublic_key={}\nendpoint=10.63.0.{}:{port}\n\
                 allowed_ip=10.64.{n}.{}/32\n\n",
                hex(&keys[end].1),
                hex(&keys[other].0.0),
                other + 1,
                other + 1,
            );
            let socket = format!("{UAPI}/{}.sock", device(end));
            until(|| uapi(&socket, &request)).with_context(|| format!("{name} does not answer"))?;
        }
        Self::up(lab, name, n, daemons, device)
    }

    fn up(
        lab: &Lab,
        name: &str,
        subnet: u16,
        daemons: Vec<Daemon>,
        device: impl Fn(usize) -> String,
    ) -> anyhow::Result<Self> {
        for (end, netns) in lab.names.iter().enumerate() {
            let (device, address) = (device(end), format!("10.64.{subnet}.{}/24", end + 1));
            ip(&["-n", netns, "addr", "add", &address, "dev", &device])?;
            ip(&["-n", netns, "link", "set", &device, "mtu", &MTU.to_string(), "up"])?;
        }
        let daemons = daemons.try_into().map_err(|_| anyhow::anyhow!("two ends are needed"))?;
        Ok(Self { name: name.to_owned(), subnet, daemons })
    }

    fn tcp(&self, lab: &Lab) -> anyhow::Result<Load> {
        let (cpu, report) = self.iperf(lab, &[])?;
        let end = &report["end"]["sum_received"];
        let number = |key: &str| end[key].as_f64().with_context(|| format!("iperf3 says no {key}"));
        let (bytes, rate) = (number("bytes")?, number("bits_per_second")?);
        Ok(Load { cost: cpu / (bytes / 1e9), rate: rate / 1e9 })
    }

    /// Microseconds of both daemons per packet that arrived.
    fn udp64(&self, lab: &Lab) -> anyhow::Result<f64> {
        let (cpu, report) = self.iperf(lab, &["-u", "-b", "0", "-l", "64"])?;
        let sum = &report["end"]["sum"];
        let number = |key: &str| sum[key].as_f64().with_context(|| format!("iperf3 says no {key}"));
        Ok(cpu * 1e6 / (number("packets")? - number("lost_packets")?))
    }

    fn iperf(&self, lab: &Lab, args: &[&str]) -> anyhow::Result<(f64, serde_json::Value)> {
        let address = format!("10.64.{}.2", self.subnet);
        let mut server = lab.inside(1, "iperf3");
        server.args(["-s", "-B", &address]);
        let _server = Daemon::start(server)?;
        // Until the server listens and a session is there.
        until(|| self.client(lab, &address, &["-n", "1"])).map(drop)?;
        let seconds = SECONDS.to_string();
        let before = self.cpu()?;
        let report = self.client(lab, &address, &[&["-t", seconds.as_str()], args].concat())?;
        Ok((self.cpu()? - before, report))
    }

    fn client(&self, lab: &Lab, to: &str, args: &[&str]) -> anyhow::Result<serde_json::Value> {
        let output = lab.inside(0, "iperf3").args(["-J", "-c", to]).args(args).output()?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let failed = !output.status.success() || report["error"].is_string();
        ensure!(!failed, "iperf3 over {}: {}", self.name, report["error"]);
        Ok(report)
    }

    /// Seconds of both daemons so far.
    fn cpu(&self) -> anyhow::Result<f64> {
        self.daemons.iter().map(Daemon::cpu).sum()
    }
}

/// A child that ends with its value.
struct Daemon(Child);

impl Daemon {
    fn start(mut command: Command) -> anyhow::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn()?))
    }

    fn cpu(&self) -> anyhow::Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        // After the name, which may have blanks: state is field 3, utime 14, stime 15 (proc(5)).
        let (_, fields) = stat.rsplit_once(')').context("a strange /proc/PID/stat")?;
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
        let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?;
        #[expect(clippy::cast_precision_loss, reason = "100")]
        let per_second = per_second.context("no clock ticks")? as f64;
        Ok(ticks.sum::<Result<f64, _>>()? / per_second)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// CPU seconds to seal and open 1 GB in packets of the MTU: what no implementation can be below.
fn floor() -> anyhow::Result<f64> {
    const PACKETS: u32 = 100_000;
    let key = || UnboundKey::new(&CHACHA20_POLY1305, &[7; 32]).map(LessSafeKey::new);
    let key = key().map_err(|_| anyhow::anyhow!("no key"))?;
    let mut packet = vec![0; MTU.into()];
    let start = Instant::now();
    for n in 0..PACKETS {
        let nonce = || {
            let mut bytes = [0; 12];
            bytes[..4].copy_from_slice(&n.to_le_bytes());
            Nonce::assume_unique_for_key(bytes)
        };
        packet.truncate(MTU.into());
        key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut packet)
            .and_then(|()| key.open_in_place(nonce(), Aad::empty(), &mut packet).map(drop))
            .map_err(|_| anyhow::anyhow!("sealing failed"))?;
    }
    Ok(start.elapsed().as_secs_f64() / (f64::from(PACKETS) * f64::from(MTU) / 1e9))
}

fn uapi(socket: &str, request: &str) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.contains("errno=0") { Ok(()) } else { Err(io::Error::other(answer)) }
}

#[expect(clippy::disallowed_methods, reason = "no runtime is here to be blocked")]
fn until<T, E: Into<anyhow::Error>>(
    mut attempt: impl FnMut() -> Result<T, E>,
) -> anyhow::Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn ip(args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(args).output().context("starting ip")?;
    if !output.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn row(
    id: &str,
    unit: &str,
    ours: f64,
    peer_name: &str,
    peer: f64,
    ratio: f64,
    better: &str,
) -> String {
    format!(
        r#"{{"id":"{id}","unit":"{unit}","ours":{ours},"peer_name":"{peer_name}","peer":{peer},"ratio":{ratio},"better":"{better}","rounds":{ROUNDS}}}"#
    )
}
