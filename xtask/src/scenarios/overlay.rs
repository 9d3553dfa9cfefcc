//! The network between the VMs: complete, and nothing of it to be seen from outside.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use anyhow::Context as _;
use ring::rand::{SecureRandom as _, SystemRandom};

use super::ANSWER_LIMIT;
use crate::{
    capture::{Ip, Recording},
    checks::Report,
    fleet::{Family, Fleet, TUNNEL_PORT, To, UDP_PORT, in_overlay, pairs, vms},
    parallel,
    traffic::{self, Probe},
};

/// Datagrams that carry a marker.
const MARKED: u32 = 5;
const UDP: u8 = 17;

/// Every VM reaches every other.
pub(crate) fn complete(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    for (family, name) in [(Family::V4, "IPv4"), (Family::V6, "IPv6")] {
        let pairs = pairs();
        let total = pairs.len();
        let silent = parallel::each(pairs, |(from, to)| {
            let address = fleet.address(To::Overlay(to), family)?;
            let ping = Probe::Ping { bytes: 56 };
            let seen = ping.run(fleet.netns(from)?, address, Duration::from_secs(3))?;
            Ok((seen != "3 of 3").then(|| format!("{from} -> {to}: {seen}")))
        })?;
        let silent = silent.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
        let silent: Vec<_> = silent.into_iter().flatten().collect();
        let seen =
            if silent.is_empty() { format!("{total} of {total}") } else { silent.join("; ") };
        let name = format!("pairs of VMs that ping each other in the overlay, {name}");
        report.add(&name, &format!("{total} of {total}"), &seen);
    }
    Ok(())
}

/// Nothing that goes over the overlay is seen between the VMs; the same sent beside it is.
pub(crate) fn private(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let mut marker = [0; 16];
    SystemRandom::new().fill(&mut marker).ok().context("the system gave no randomness")?;
    let (gateway, web1) = (fleet.netns("gw1")?, To::Overlay("web1"));

    let capture = fleet.capture("overlay", "")?;
    complete(fleet, report)?;
    for family in [Family::V4, Family::V6] {
        let address = fleet.address(web1, family)?;
        traffic::send_datagrams(gateway, (address, UDP_PORT).into(), &marker, MARKED)?;
        let probe = Probe::Http { port: 8080 };
        let seen = probe.run(gateway, address, ANSWER_LIMIT);
        report.add_result("gw1 -> web1 in the overlay, under the capture", "200 web1", seen);
    }
    let recording = capture.finish()?;
    let seen = recording.count(&marker)?.to_string();
    report.add("packets on the underlay with a marker sent over the overlay", "0", &seen);
    report.add(
        "what passes between the VMs",
        &format!("UDP to port {TUNNEL_PORT}"),
        &between_vms(fleet, &recording)?,
    );
    let seen = with_overlay_addresses(&recording)?.to_string();
    report.add("packets on the underlay with addresses of the overlay", "0", &seen);

    let capture = fleet.capture("underlay", "")?;
    let beside = fleet.socket_address(To::Underlay("web1"), UDP_PORT)?;
    traffic::send_datagrams(gateway, beside, &marker, MARKED)?;
    let recording = capture.finish()?;
    let seen = if recording.count(&marker)? > 0 { "seen" } else { "not seen" };
    report.add("the same marker sent beside the overlay", "seen", seen);
    Ok(())
}

/// What VMs exchange by their own addresses, as text.
fn between_vms(fleet: &Fleet, recording: &Recording) -> anyhow::Result<String> {
    let mut own = BTreeSet::new();
    for vm in vms() {
        for family in [Family::V4, Family::V6] {
            own.insert(fleet.address(To::Underlay(vm), family)?);
        }
    }
    let mut seen = BTreeSet::new();
    recording.each(|packet| {
        if let Some(ip) = packet.ip
            && own.contains(&ip.source)
            && own.contains(&ip.destination)
        {
            seen.insert(kind(ip));
        }
    })?;
    Ok(if seen.is_empty() { "nothing".to_owned() } else { Vec::from_iter(seen).join(", ") })
}

fn kind(ip: Ip) -> String {
    match (ip.protocol, ip.ports) {
        (UDP, Some((_, port))) => format!("UDP to port {port}"),
        (protocol, Some((_, port))) => format!("protocol {protocol} to port {port}"),
        (protocol, None) => format!("protocol {protocol}"),
    }
}

fn with_overlay_addresses(recording: &Recording) -> anyhow::Result<usize> {
    let mut count = 0;
    let inside = |address: IpAddr| in_overlay(address);
    recording.each(|packet| {
        count +=
            usize::from(packet.ip.is_some_and(|ip| inside(ip.source) || inside(ip.destination)));
    })?;
    Ok(count)
}
