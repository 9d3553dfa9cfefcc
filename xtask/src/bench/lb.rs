//! `cargo xtask bench lb`: the data path's cost per packet, by a program that runs it; and a client, a gateway, and
//! backends behind it, with ours and others on the gateway.
//!
//! All of the latter shares the machine's cores, the network between gateway and backends included. So these are ratios
//! of whole paths, and a gateway's own cost differs by more than they do.

mod hub;
pub(super) mod load;

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, ensure};

use self::hub::{DEVICE, DISCARD_PORT, Hub, MTU, Port};
use super::{Better, Row, driver, driver::Driver, fw};
use crate::{
    interrupt,
    netns::{Netns, PinDir, RunDir},
    process::Process,
    progress, shell,
};

const PROGRAM: &str = "cnsmo-bench-lb";

const ROUNDS: usize = 5;
/// Over which all backends must be seen before anything is timed.
const TRIES: u32 = 60;
const START_MAX: Duration = Duration::from_secs(5);

/// Behind the gateways: backends, and the gateways' own addresses (RFC 2544, benchmarks).
const INNER: &str = "198.18.1.0";
const INNER_BITS: u8 = 24;
/// Between client and gateway.
const LINK_BITS: u8 = 30;
const BACKENDS: [(&str, Ipv4Addr); 3] = [
    ("backend-1", Ipv4Addr::new(198, 18, 1, 11)),
    ("backend-2", Ipv4Addr::new(198, 18, 1, 12)),
    ("backend-3", Ipv4Addr::new(198, 18, 1, 13)),
];

const GBIT_PER_SECOND: (&str, Better) = ("Gb/s", Better::Higher);
const PER_SECOND: (&str, Better) = ("1/s", Better::Higher);

/// Who is on a gateway. The number is in all of its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Ours, hooked as the agent hooks itself.
    Ours = 1,
    Haproxy = 2,
    Nft = 3,
    /// Nobody: the gateway forwards to the backend that the client asks for.
    Direct = 4,
    /// Ours without XDP. veth loses its segmentation offload where XDP is, and so all that larger packets save.
    OursTc = 5,
}

impl Side {
    fn number(self) -> u8 {
        self as u8
    }

    /// What clients ask for (RFC 5737, documentation, as the outer ones).
    fn virtual_address(self) -> Ipv4Addr {
        Ipv4Addr::new(198, 51, 100, self.number())
    }

    fn inner(self) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, 1, self.number())
    }

    /// Of the link between client and gateway: network, gateway, client.
    fn outer(self) -> [Ipv4Addr; 3] {
        [0, 1, 2].map(|host| Ipv4Addr::new(203, 0, 113, 4 * self.number() + host))
    }

    fn at(self, port: u16) -> SocketAddr {
        (self.virtual_address(), port).into()
    }
}

pub(super) fn measure() -> anyhow::Result<Vec<Row>> {
    let mut rows = driver::rows(fw::PROGRAM, &["lb"])?;
    let program = driver::build(PROGRAM)?;
    progress::heading("Measuring gateways");
    let bench = Bench::start(&program)?;
    let mut samples = Samples::default();
    for round in 1..=ROUNDS {
        progress::step(&format!("round {round} of {ROUNDS}"), || samples.take(&bench))?;
    }
    rows.extend(samples.rows()?);
    Ok(rows)
}

/// One value per round, ours and the peer's.
#[derive(Default)]
struct Samples {
    stream: [Vec<f64>; 2],
    connections: [Vec<f64>; 2],
    requests: [Vec<f64>; 2],
    datagrams: [Vec<f64>; 2],
    // Of ours on TC, beside the same samples of the peers.
    stream_tc: Vec<f64>,
    datagrams_tc: Vec<f64>,
}

impl Samples {
    fn take(&mut self, bench: &Bench) -> anyhow::Result<()> {
        let client = &bench.client;
        for (n, side) in [Side::Ours, Side::Haproxy].into_iter().enumerate() {
            let to = side.at(load::TCP_PORT);
            let failed = || format!("measuring {side:?}");
            self.stream[n].push(load::stream(client, to).with_context(failed)?);
            self.connections[n].push(load::connections(client, to).with_context(failed)?);
        }
        let to = Side::OursTc.at(load::TCP_PORT);
        self.stream_tc.push(load::stream(client, to).context("measuring ours on TC")?);
        let direct = BACKENDS.map(|(_, address)| (address, load::TCP_PORT).into());
        let ours = [Side::Ours.at(load::TCP_PORT)];
        for (n, to) in [&ours[..], &direct[..]].into_iter().enumerate() {
            self.requests[n].push(load::requests(client, to)?);
        }
        for (n, side) in [Side::Ours, Side::Nft].into_iter().enumerate() {
            self.datagrams[n].push(bench.datagrams(side)?);
        }
        self.datagrams_tc.push(bench.datagrams(Side::OursTc)?);
        Ok(())
    }

    fn rows(&self) -> anyhow::Result<Vec<Row>> {
        let [stream, haproxy] = &self.stream;
        let [datagrams, nft] = &self.datagrams;
        let mut rows = vec![
            Row::of("lb/tcp-vs-haproxy", GBIT_PER_SECOND, stream, ("haproxy", haproxy))?,
            Row::of(
                "lb/tcp-tc-vs-haproxy",
                GBIT_PER_SECOND,
                &self.stream_tc,
                ("haproxy", haproxy),
            )?,
        ];
        for (id, peer_name, [ours, peer]) in [
            ("lb/cps-vs-haproxy", "haproxy", &self.connections),
            ("lb/keepalive-vs-direct", "no balancer", &self.requests),
        ] {
            rows.push(Row::of(id, PER_SECOND, ours, (peer_name, peer))?);
        }
        rows.push(Row::of("lb/pps-vs-nft", PER_SECOND, datagrams, ("nft", nft))?);
        rows.push(Row::of("lb/pps-tc-vs-nft", PER_SECOND, &self.datagrams_tc, ("nft", nft))?);
        Ok(rows)
    }
}

/// Everything, running and seen to work. Fields are dropped in order: programs, the network, namespaces.
struct Bench {
    _ours: [Ours; 2],
    _haproxy: Process,
    hub: Hub,
    client: Netns,
    _gateways: [Netns; 5],
    _backends: Vec<Netns>,
    _files: RunDir,
}

/// Our data path, and where its pins and state are.
struct Ours {
    _driver: Driver,
    _pins: PinDir,
    _state: RunDir,
}

impl Bench {
    fn start(program: &Path) -> anyhow::Result<Self> {
        let files = RunDir::new("bench-lb")?;
        let client = Netns::new("lb-client")?;
        // All of a round's connections are from one address.
        client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        client.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
        let gateways = [
            gateway(Side::Ours, &client)?,
            gateway(Side::Haproxy, &client)?,
            gateway(Side::Nft, &client)?,
            gateway(Side::Direct, &client)?,
            gateway(Side::OursTc, &client)?,
        ];
        let backends = BACKENDS.iter().map(|_| Netns::new("lb-backend"));
        let backends = backends.collect::<anyhow::Result<Vec<_>>>()?;
        let hub = join(&gateways, &backends)?;
        for (netns, (name, _)) in backends.iter().zip(BACKENDS) {
            netns.ip(&["route", "add", "203.0.113.0/24", "dev", DEVICE])?;
            load::serve(netns, name)?;
        }
        for (_, address) in BACKENDS {
            route(&client, address, Side::Direct)?;
        }
        let [ours, haproxy, nft, _, ours_tc] = &gateways;
        start_nft(nft, files.path()).context("setting up nft")?;
        let bench = Self {
            _ours: [
                start_ours(Side::Ours, "auto", ours, program).context("starting ours")?,
                start_ours(Side::OursTc, "tc", ours_tc, program).context("starting ours on TC")?,
            ],
            _haproxy: start_haproxy(haproxy, files.path()).context("starting haproxy")?,
            hub,
            client,
            _gateways: gateways,
            _backends: backends,
            _files: files,
        };
        bench.check()?;
        Ok(bench)
    }

    /// Each side spreads clients over all backends.
    fn check(&self) -> anyhow::Result<()> {
        for side in [Side::Ours, Side::OursTc, Side::Haproxy] {
            let to = side.at(load::TCP_PORT);
            let seen = load::tcp_backends(&self.client, to, TRIES)?;
            check_spread(&format!("{side:?}, TCP"), &seen)?;
        }
        for side in [Side::Ours, Side::OursTc, Side::Nft] {
            let to = side.at(load::UDP_PORT);
            let seen = load::udp_backends(&self.client, to, TRIES)?;
            check_spread(&format!("{side:?}, UDP"), &seen)?;
        }
        Ok(())
    }

    /// Datagrams per second that came out of the gateway with the address of a backend.
    fn datagrams(&self, side: Side) -> anyhow::Result<f64> {
        let before = self.hub.discarded();
        let arrived = || self.hub.discarded().values().sum();
        let per_second = load::datagrams(&self.client, side.at(DISCARD_PORT), arrived)?;
        for (address, count) in self.hub.discarded() {
            let count = count - before[&address];
            let is_backend = BACKENDS.iter().any(|(_, backend)| *backend == address);
            ensure!((count > 0) == is_backend, "{side:?}: {count} datagrams went to {address}");
        }
        Ok(per_second)
    }
}

fn check_spread(what: &str, seen: &BTreeMap<String, u32>) -> anyhow::Result<()> {
    let all = BACKENDS.iter().all(|(name, _)| seen.contains_key(*name));
    ensure!(all && seen.len() == BACKENDS.len(), "{what}: of {TRIES} clients went {seen:?}");
    Ok(())
}

fn gateway(side: Side, client: &Netns) -> anyhow::Result<Netns> {
    let gateway = Netns::new("lb-gateway")?;
    let link = format!("gateway{}", side.number());
    Netns::veth((client, &link), (&gateway, "client"))?;
    let [_, at_gateway, at_client] = side.outer();
    gateway.ip(&["address", "add", &format!("{at_gateway}/{LINK_BITS}"), "dev", "client"])?;
    client.ip(&["address", "add", &format!("{at_client}/{LINK_BITS}"), "dev", &link])?;
    gateway.sysctl("net/ipv4/ip_forward", "1")?;
    route(client, side.virtual_address(), side)?;
    Ok(gateway)
}

fn route(client: &Netns, to: Ipv4Addr, side: Side) -> anyhow::Result<()> {
    let [_, gateway, _] = side.outer();
    client.ip(&["route", "add", &format!("{to}/32"), "via", &gateway.to_string()])
}

fn join(gateways: &[Netns; 5], backends: &[Netns]) -> anyhow::Result<Hub> {
    let sides = [Side::Ours, Side::Haproxy, Side::Nft, Side::Direct, Side::OursTc];
    let gateways = sides.into_iter().zip(gateways).map(|(side, netns)| {
        // Answers to the client itself.
        let also = (side == Side::Direct).then(|| (side.outer()[0], LINK_BITS));
        Port { netns, address: side.inner(), also }
    });
    let backends = BACKENDS.into_iter().zip(backends);
    let backends = backends.map(|((_, address), netns)| Port { netns, address, also: None });
    Hub::join(&gateways.chain(backends).collect::<Vec<_>>(), INNER_BITS)
}

fn start_ours(side: Side, hook: &str, netns: &Netns, program: &Path) -> anyhow::Result<Ours> {
    let (pins, state) = (PinDir::new("bench-lb"), RunDir::new("bench-lb")?);
    let mut command = netns.command(program)?;
    command.args([pins.path(), state.path()]).args(["client", hook, DEVICE]).arg(MTU.to_string());
    command.arg(side.inner().to_string()).arg(format!("{INNER}/{INNER_BITS}"));
    command.arg(side.virtual_address().to_string());
    command.args([load::TCP_PORT, load::UDP_PORT, DISCARD_PORT].map(|port| port.to_string()));
    command.args(BACKENDS.map(|(_, address)| address.to_string()));
    let mut driver = Driver::start(&mut command)?;
    driver.wait_until_ready()?;
    Ok(Ours { _driver: driver, _pins: pins, _state: state })
}

/// As its documentation advises for raw speed: layer 4, no log, payload moved by the kernel.
fn start_haproxy(netns: &Netns, files: &Path) -> anyhow::Result<Process> {
    let address = Side::Haproxy.virtual_address();
    netns.ip(&["address", "add", &format!("{address}/32"), "dev", "lo"])?;
    netns.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    netns.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
    let servers =
        BACKENDS.map(|(name, backend)| format!("  server {name} {backend}:{}\n", load::TCP_PORT));
    let text = format!(
        "global\n  maxconn 4096\n\
         defaults\n  mode tcp\n  option splice-auto\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n\
         listen bench\n  bind {address}:{}\n  balance roundrobin\n{}",
        load::TCP_PORT,
        servers.concat()
    );
    let path = files.join("haproxy.cfg");
    shell::write(&path, text)?;
    let program = shell::find("haproxy").context("haproxy is not installed")?;
    let mut command = netns.command(program)?;
    command.arg("-db").arg("-f").arg(&path);
    let mut process = Process::spawn("haproxy", &mut command, &files.join("haproxy.log"))?;
    let listens = interrupt::wait_until(START_MAX, || {
        ensure!(process.is_running()?, "it ended\n{}", process.tail());
        let to = Side::Haproxy.at(load::TCP_PORT);
        netns.run(|| std::net::TcpStream::connect(to).is_ok())
    })?;
    ensure!(listens, "it does not listen\n{}", process.tail());
    Ok(process)
}

/// Destinations in turn, the gateway's own address as source: what ours does.
fn start_nft(netns: &Netns, files: &Path) -> anyhow::Result<()> {
    let backends: Vec<_> =
        (0..).zip(BACKENDS).map(|(n, (_, address)): (u32, _)| format!("{n}: {address}")).collect();
    let text = format!(
        "table ip bench {{\n\
           chain incoming {{\n type nat hook prerouting priority dstnat\n\
             ip daddr {} udp dport {{ {}, {DISCARD_PORT} }} dnat to numgen inc mod {} map {{ {} }}\n}}\n\
           chain outgoing {{\n type nat hook postrouting priority srcnat\n\
             oifname {DEVICE} masquerade\n}}\n}}\n",
        Side::Nft.virtual_address(),
        load::UDP_PORT,
        BACKENDS.len(),
        backends.join(", ")
    );
    let path = files.join("bench.nft");
    shell::write(&path, text)?;
    let program = shell::find("nft").context("nft is not installed")?;
    shell::read(netns.command(program)?.arg("-f").arg(&path)).map(drop)
}
