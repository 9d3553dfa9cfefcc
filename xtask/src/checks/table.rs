//! Who sends what to whom, and what comes of it without policy and under `examples/three-tier.yaml`.

use super::{ANSWER_LIMIT, SILENCE_LIMIT, State};
use crate::{
    fleet::{
        DATABASE_PORT,
        Family::{self, V4, V6},
        Fleet, SSH_PORT,
        To::{self, Internal, Overlay, Public, Underlay},
        UDP_PORT, WEB_PORT,
    },
    traffic::Probe,
};

/// Traffic, and what comes of it.
pub(super) struct Expectation {
    from: &'static str,
    to: To,
    family: Family,
    probe: Probe,
    open: &'static str,
    enforced: &'static str,
}

const fn allowed(
    from: &'static str,
    to: To,
    family: Family,
    probe: Probe,
    seen: &'static str,
) -> Expectation {
    Expectation { from, to, family, probe, open: seen, enforced: seen }
}

const fn denied(
    from: &'static str,
    to: To,
    family: Family,
    probe: Probe,
    open: &'static str,
    enforced: &'static str,
) -> Expectation {
    Expectation { from, to, family, probe, open, enforced }
}

const WEB: Probe = Probe::Http { port: WEB_PORT };
const SSH: Probe = Probe::Tcp { port: SSH_PORT };
const DATABASE: Probe = Probe::Tcp { port: DATABASE_PORT };
const UDP: Probe = Probe::Udp { port: UDP_PORT };
const PING: Probe = Probe::Ping { bytes: 56 };
/// Larger than any device's MTU here: fragments.
const LARGE_PING: Probe = Probe::Ping { bytes: 4000 };
const SCAN: Probe = Probe::Scan;
/// What the balancer offers.
const SHOP: Probe = Probe::Http { port: 80 };
const NAMES: Probe = Probe::Udp { port: 53 };
const ANY_SHOP: &str = "200 web1 or 200 web2 or 200 web3";
const ANY_NAME: &str = "web1 or web2 or web3";

pub(super) const EXPECTATIONS: &[Expectation] = &[
    // The VMs' own addresses: nothing but ping comes in.
    denied("client", Underlay("web1"), V4, WEB, "200 web1", "timeout"),
    denied("client", Underlay("web2"), V6, WEB, "200 web2", "timeout"),
    denied("gw1", Underlay("web3"), V4, WEB, "200 web3", "timeout"),
    denied("client", Underlay("db1"), V4, DATABASE, "db1", "timeout"),
    denied("client", Underlay("db1"), V6, DATABASE, "db1", "timeout"),
    denied("gw1", Underlay("db1"), V4, DATABASE, "db1", "timeout"),
    denied("web1", Underlay("db1"), V4, DATABASE, "db1", "timeout"),
    denied("gw1", Underlay("web1"), V4, SSH, "web1", "timeout"),
    denied("client", Underlay("web2"), V6, SSH, "web2", "timeout"),
    denied("client", Underlay("web1"), V4, UDP, "web1", "silence"),
    denied("client", Underlay("web3"), V6, UDP, "web3", "silence"),
    allowed("web1", Underlay("client"), V4, UDP, "client"),
    allowed("web1", Underlay("client"), V6, UDP, "client"),
    allowed("client", Underlay("web1"), V4, PING, "3 of 3"),
    allowed("client", Underlay("db1"), V6, PING, "3 of 3"),
    allowed("web1", Underlay("client"), V4, PING, "3 of 3"),
    allowed("client", Underlay("web2"), V4, LARGE_PING, "3 of 3"),
    allowed("client", Underlay("web2"), V6, LARGE_PING, "3 of 3"),
    denied(
        "client",
        Underlay("web1"),
        V4,
        SCAN,
        "open: 22 8080; others: 1024 closed",
        "open: none; others: 1026 filtered",
    ),
    // The network: what the policies name, and nothing else.
    allowed("gw1", Overlay("web1"), V4, WEB, "200 web1"),
    allowed("gw1", Overlay("web3"), V6, WEB, "200 web3"),
    allowed("web1", Overlay("db1"), V4, DATABASE, "db1"),
    allowed("web2", Overlay("db1"), V6, DATABASE, "db1"),
    allowed("web3", Overlay("db1"), V4, DATABASE, "db1"),
    denied("gw1", Overlay("db1"), V4, DATABASE, "db1", "timeout"),
    denied("gw1", Overlay("db1"), V6, DATABASE, "db1", "timeout"),
    allowed("gw1", Overlay("web2"), V4, SSH, "web2"),
    allowed("gw1", Overlay("db1"), V6, SSH, "db1"),
    denied("web1", Overlay("web2"), V4, SSH, "web2", "timeout"),
    denied("web1", Overlay("db1"), V6, SSH, "db1", "timeout"),
    allowed("gw1", Overlay("web1"), V4, LARGE_PING, "3 of 3"),
    allowed("web2", Overlay("db1"), V6, LARGE_PING, "3 of 3"),
    denied(
        "gw1",
        Overlay("web1"),
        V4,
        SCAN,
        "open: 22 8080; others: 1024 closed",
        "open: 22 8080; others: 1024 filtered",
    ),
    denied(
        "gw1",
        Overlay("db1"),
        V6,
        SCAN,
        "open: 22 5432; others: 1024 closed",
        "open: 22; others: 1025 filtered",
    ),
    // The virtual addresses, from outside and from inside; a VM is not its own backend.
    allowed("client", Public, V4, SHOP, ANY_SHOP),
    allowed("client", Public, V6, SHOP, ANY_SHOP),
    allowed("client", Public, V4, NAMES, ANY_NAME),
    allowed("client", Public, V6, NAMES, ANY_NAME),
    allowed("client", Public, V4, SSH, "timeout"),
    allowed("client", Public, V4, SCAN, "open: 80; others: 1025 filtered"),
    allowed("db1", Internal, V4, SHOP, ANY_SHOP),
    allowed("db1", Internal, V6, SHOP, ANY_SHOP),
    allowed("db1", Internal, V4, NAMES, ANY_NAME),
    allowed("web1", Internal, V4, SHOP, "200 web2 or 200 web3"),
    allowed("web2", Internal, V6, SHOP, "200 web1 or 200 web3"),
    allowed("gw1", Internal, V4, SHOP, ANY_SHOP),
];

impl Expectation {
    /// Whether it makes sense: without a network only the hosts' own addresses are there, and once it is there they have
    /// been asked.
    pub(super) fn is_asked(&self, state: State) -> bool {
        let bare = matches!(self.to, Underlay(_));
        match state {
            State::Bare => bare,
            State::Enforced => true,
            State::Unfiltered => !bare,
        }
    }

    /// Sends the traffic and says what came of it.
    pub(super) fn observe(&self, fleet: &Fleet, state: State) -> anyhow::Result<String> {
        let limit = match self.expected(state) {
            "timeout" | "silence" => SILENCE_LIMIT,
            _ => ANSWER_LIMIT,
        };
        let to = fleet.address(self.to, self.family)?;
        self.probe.run(fleet.netns(self.from)?, to, limit)
    }

    pub(super) fn expected(&self, state: State) -> &'static str {
        match state {
            State::Bare | State::Unfiltered => self.open,
            State::Enforced => self.enforced,
        }
    }

    pub(super) fn name(&self) -> String {
        let what = match self.probe {
            Probe::Http { port } => format!("curl to port {port}"),
            Probe::Tcp { port } => format!("TCP to port {port}"),
            Probe::Udp { port } => format!("UDP to port {port}"),
            Probe::Ping { bytes } => format!("ping with {bytes} bytes"),
            Probe::Scan => "nmap SYN scan".to_owned(),
        };
        let family = match self.family {
            V4 => "IPv4",
            V6 => "IPv6",
        };
        format!("{} -> {}: {what}, {family}", self.from, self.to.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_denied_line_is_open_without_policy() {
        for line in EXPECTATIONS.iter().filter(|line| line.open != line.enforced) {
            assert!(!matches!(line.open, "timeout" | "silence"), "{}", line.name());
        }
    }
}
