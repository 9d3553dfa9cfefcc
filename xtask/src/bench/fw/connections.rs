//! Connections to servers behind firewalls of many rules, and to one without.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, ensure};

use super::{
    super::{Better, Row, lb::load},
    DEVICE, Guard, ROUNDS,
};
use crate::{netns::Netns, progress};

/// Rules of each server's firewall, and the word for them; the first has none.
const SERVERS: [(u32, &str); 4] = [(0, "none"), (10, "10"), (10_000, "10k"), (100_000, "100k")];
const LINK_BITS: u8 = 30;

const PER_SECOND: (&str, Better) = ("1/s", Better::Higher);

/// Fields are dropped in order.
struct Server {
    guard: Option<Guard>,
    address: SocketAddr,
    _netns: Netns,
}

pub(super) fn measure(program: &Path) -> anyhow::Result<Vec<Row>> {
    let client = Netns::new("fw-client")?;
    // All of a round's connections are from one address of each link.
    client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    client.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
    let servers = (1..).zip(SERVERS).map(|(n, (rules, size))| {
        Server::start(program, &client, n, rules)
            .with_context(|| format!("starting a server with {size} rules"))
    });
    let mut servers = servers.collect::<anyhow::Result<Vec<_>>>()?;
    let mut samples = vec![Vec::new(); servers.len()];
    for round in 1..=ROUNDS {
        progress::step(&format!("connections, round {round} of {ROUNDS}"), || {
            for (server, samples) in servers.iter().zip(&mut samples) {
                samples.push(load::connections(&client, server.address)?);
            }
            Ok(())
        })?;
    }
    for server in &mut servers {
        server.check()?;
    }
    let (none, ours) = samples.split_first().context("nothing was measured")?;
    let row = |((_, size), ours): (&(u32, &str), &Vec<f64>)| {
        Row::of(&format!("fw/cps-{size}-vs-none"), PER_SECOND, ours, ("no firewall", none))
    };
    SERVERS[1..].iter().zip(ours).map(row).collect()
}

impl Server {
    fn start(program: &Path, client: &Netns, n: u8, rules: u32) -> anyhow::Result<Self> {
        let netns = Netns::new("fw-server")?;
        let link = format!("server{n}");
        Netns::veth((client, &link), (&netns, DEVICE))?;
        // RFC 5737, documentation.
        let [address, peer] = [1, 2].map(|host| Ipv4Addr::new(203, 0, 113, 4 * n + host));
        netns.ip(&["address", "add", &format!("{address}/{LINK_BITS}"), "dev", DEVICE])?;
        client.ip(&["address", "add", &format!("{peer}/{LINK_BITS}"), "dev", &link])?;
        load::serve(&netns, "server")?;
        let guard = match rules {
            0 => None,
            rules => Some(Guard::start(program, &netns, rules, "serve")?),
        };
        Ok(Self { guard, address: (address, load::TCP_PORT).into(), _netns: netns })
    }

    /// The firewall was in the way of all this.
    fn check(&mut self) -> anyhow::Result<()> {
        let Some(guard) = &mut self.guard else { return Ok(()) };
        let flows = guard.counts()?.flows;
        ensure!(flows > 0, "{}: no connection went through the firewall", self.address);
        Ok(())
    }
}
