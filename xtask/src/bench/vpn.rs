//! `cargo xtask bench vpn`: iperf3 through a tunnel between two namespaces, ours and those of other WireGuard programs.
//!
//! Both daemons and both ends of iperf3 share the machine's cores, so throughput swings with all else that runs there. The
//! processor time of both daemons per gigabyte that arrived is the stable figure.

mod contender;

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use self::contender::{Contender, INNER, Kind, version};
use super::{Better, Row, driver};
use crate::{interrupt, netns::RunDir, process::Process, progress, setup, shell};

const PROGRAM: &str = "cnsmo-bench-vpn";
const IPERF: &str = "iperf3";

const ROUNDS: usize = 5;
/// Of each run, in seconds: long against the start of TCP, short enough that a round is under one load of the machine.
const TCP_SECONDS: &str = "2";
const UDP_SECONDS: &str = "1";
const UDP_BYTES: &str = "64";

const START_MAX: Duration = Duration::from_secs(5);

const SECONDS_PER_GB: (&str, Better) = ("CPU-s/GB", Better::Lower);
const GBIT_PER_SECOND: (&str, Better) = ("Gb/s", Better::Higher);
const MICROSECONDS: (&str, Better) = ("us", Better::Lower);

/// One value per round.
#[derive(Default)]
struct Samples {
    tcp: Vec<f64>,
    cpu_per_gb: Vec<f64>,
    cpu_per_packet: Vec<f64>,
}

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    let boringtun = setup::cargo_program("boringtun-cli", "0.7.1", "boringtun-cli")?;
    let gotatun = setup::cargo_program("gotatun-cli", "0.10.2", "gotatun")?;
    let wireguard_go = shell::find("wireguard-go").context("wireguard-go is not installed")?;
    let ours = driver::build(PROGRAM)?;

    progress::heading("Measuring tunnels");
    let foreground: &[&str] = &["--foreground", "--disable-drop-privileges", "--verbosity=error"];
    let kinds = [
        ("ours", Kind::Ours(&ours)),
        ("gotatun", Kind::Uapi(&gotatun, foreground)),
        ("wireguard-go", Kind::Uapi(&wireguard_go, &["--foreground"])),
        ("boringtun", Kind::Uapi(&boringtun, foreground)),
    ];
    let logs = RunDir::new("bench-vpn")?;
    let mut contenders = Vec::new();
    for (label, kind) in kinds {
        let name = match kind {
            Kind::Ours(_) => label.to_owned(),
            Kind::Uapi(program, _) => format!("{label} {}", version(program)?),
        };
        contenders.push((label, Contender::start(&name, kind, logs.path())?, Samples::default()));
    }
    let mut floor = Vec::new();
    for round in 1..=ROUNDS {
        progress::step(&format!("round {round} of {ROUNDS}"), || {
            for (_, contender, samples) in &mut contenders {
                sample(contender, samples, &logs)
                    .with_context(|| format!("measuring {}", contender.name))?;
            }
            floor.push(crypto_floor(&ours)?);
            Ok(())
        })?;
    }
    rows(&contenders, &floor)
}

fn rows(contenders: &[(&str, Contender, Samples)], floor: &[f64]) -> anyhow::Result<Vec<Row>> {
    let ((_, _, ours), peers) = contenders.split_first().context("nothing was measured")?;
    let mut rows = vec![Row::of(
        "vpn/cpu-per-gb",
        SECONDS_PER_GB,
        &ours.cpu_per_gb,
        ("seal and open alone", floor),
    )?];
    for (label, peer, samples) in peers {
        let versus = |what: &str, unit, of: fn(&Samples) -> &[f64]| {
            Row::of(&format!("vpn/{what}-vs-{label}"), unit, of(ours), (&peer.name, of(samples)))
        };
        rows.push(versus("cpu-per-gb", SECONDS_PER_GB, |samples| &samples.cpu_per_gb)?);
        rows.push(versus("tcp", GBIT_PER_SECOND, |samples| &samples.tcp)?);
    }
    let udp = peers.iter().map(|(_, peer, samples)| {
        let peer = (peer.name.as_str(), samples.cpu_per_packet.as_slice());
        Row::of("vpn/udp64", MICROSECONDS, &ours.cpu_per_packet, peer)
    });
    let udp = udp.collect::<anyhow::Result<Vec<_>>>()?;
    rows.extend(udp.into_iter().min_by(|a, b| a.peer.total_cmp(&b.peer)));
    Ok(rows)
}

fn sample(contender: &Contender, samples: &mut Samples, logs: &RunDir) -> anyhow::Result<()> {
    let (end, seconds) = run(contender, logs, &["--time", TCP_SECONDS])?;
    let received = end.sum_received.context("iperf3 says nothing of its receiver")?;
    ensure!(received.bytes > 0.0, "no bytes arrived");
    samples.tcp.push(received.bits_per_second / 1e9);
    samples.cpu_per_gb.push(seconds / (received.bytes / 1e9));

    let udp = ["--time", UDP_SECONDS, "--udp", "--length", UDP_BYTES, "--bandwidth", "0"];
    let (end, seconds) = run(contender, logs, &udp)?;
    let sum = end.sum.context("iperf3 says nothing of its datagrams")?;
    let arrived = sum.packets - sum.lost_packets;
    ensure!(arrived > 0.0, "no datagrams arrived");
    samples.cpu_per_packet.push(seconds / arrived * 1e6);
    Ok(())
}

/// One run of iperf3 through the tunnel, and the time that the daemons had on processors meanwhile.
fn run(contender: &Contender, logs: &RunDir, arguments: &[&str]) -> anyhow::Result<(End, f64)> {
    interrupt::check()?;
    let [client, server] = &contender.ends;
    let mut command = server.command(IPERF)?;
    command.args(["--server", "--one-off", "--forceflush", "--bind", INNER[1]]);
    let mut listening = Process::spawn(IPERF, &mut command, &logs.path().join("iperf3.log"))?;
    listening.wait_for("Server listening", START_MAX)?;

    let before = contender.cpu_seconds()?;
    let mut command = client.command(IPERF)?;
    command.args(["--client", INNER[1], "--json"]).args(arguments);
    let text = shell::read(&mut command)?;
    let seconds = contender.cpu_seconds()? - before;
    let report: Report = serde_json::from_str(&text).context("reading the output of iperf3")?;
    Ok((report.end, seconds))
}

/// What no WireGuard program can do without: CPU-seconds to seal and to open a gigabyte.
fn crypto_floor(program: &Path) -> anyhow::Result<f64> {
    let text = shell::read(Command::new(program).arg("floor"))?;
    text.trim().parse().with_context(|| format!("reading the output of {PROGRAM}"))
}

/// What iperf3 writes with `--json`, as far as it is of use.
#[derive(Deserialize)]
struct Report {
    end: End,
}

#[derive(Deserialize)]
struct End {
    /// Of TCP.
    sum_received: Option<Received>,
    /// Of UDP.
    sum: Option<Datagrams>,
}

#[derive(Deserialize)]
struct Received {
    bytes: f64,
    bits_per_second: f64,
}

#[derive(Deserialize)]
struct Datagrams {
    packets: f64,
    lost_packets: f64,
}
