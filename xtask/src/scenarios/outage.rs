//! Programs that die under traffic: nobody notices but the operator.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{REPORT_LIMIT, apply, get, manifest, policy, unchanged};
use crate::{
    checks::Report,
    fleet::{DATABASE_PORT, Fleet, GATEWAY, LARGE_BYTES, LARGE_FILE, To, UDP_PORT, vms},
    interrupt,
    netns::Netns,
    process::pause,
    progress,
    traffic::{
        self,
        load::{Download, Downloaded, Load, Running, verdict},
    },
};

/// How long the core may still believe in the streams of killed agents.
const OUTAGE: Duration = Duration::from_secs(3);
/// Of a transfer under which programs die: it takes 8 seconds.
const RATE: u64 = LARGE_BYTES / 8;
/// How long a transfer may stall while the process that moves its packets is replaced: agents look every second, and
/// TCP's retransmission doubles its pauses (RFC 6298).
const STALL_LIMIT: Duration = Duration::from_secs(10);
/// In clear and not of the client, the tunnels or the core: what must not be there.
const LEAKS: &str =
    "not udp port 51820 and not host 10.77.9.9 and not host fd77:9::9 and not port 7443";
/// Datagrams that the capture must show.
const MARKED: u32 = 5;

/// Core and all agents die under a large transfer, and come back.
pub(crate) fn control(fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    let before = stored(fleet)?;
    let loads = Loads::start(fleet)?;
    let transfer = begin(fleet)?;
    fleet.kill_core()?;
    for vm in vms() {
        fleet.kill_agent(vm)?;
    }
    unchanged(fleet, "traffic while core and all agents are dead", report)?;
    fleet.start_core()?;
    for vm in vms() {
        fleet.restart_agent(vm)?;
    }
    let after = stored(fleet)?;
    let same = if before == after { "the same" } else { &after };
    report.add("what the core knows after its restart", "the same", same);
    pause(OUTAGE);
    fleet.wait_ready(&vms())?;
    let (intact, stall) = judge(fleet, transfer.finish());
    report.add("a transfer client -> gw1 -> web server meanwhile", "intact", &intact);
    progress::say(&format!("        its longest pause: {:.2} s", stall.as_secs_f32()));
    unchanged(fleet, "traffic after their restart", report)?;
    loads.finish("while core and agents die", report);
    // All answer to the core again: a change reaches their kernels.
    let applied = manifest(fleet, "probe.yaml", &policy::probe(true))
        .and_then(|file| apply(fleet, &file))
        .map(|()| "applied".to_owned());
    report.add_result("a change of policy after it", "applied", applied);
    apply(fleet, &manifest(fleet, "probe.yaml", &policy::probe(false))?)
}

/// The process that moves the gateway's tunnel packets dies under a transfer.
pub(crate) fn engine(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    if fleet.engines(GATEWAY)?.is_empty() {
        progress::say("        this kernel has WireGuard: no process moves packets, none can die");
        return Ok(());
    }
    let capture = fleet.capture("engine", LEAKS)?;
    let transfer = begin(fleet)?;
    fleet.kill_engine(GATEWAY)?;
    let (intact, stall) = judge(fleet, transfer.finish());
    report.judge(
        "a transfer through gw1 while its tunnel's process is killed",
        &format!("intact, paused for at most {STALL_LIMIT:?}"),
        &format!("{intact}, paused for {:.2} s", stall.as_secs_f32()),
        intact == "intact" && stall <= STALL_LIMIT,
    );
    let marker = fleet.large().marker;
    let seen = capture.finish()?.count(&marker)?.to_string();
    report.add("packets of it in clear between VMs", "0", &seen);

    let capture = fleet.capture("engine", LEAKS)?;
    let beside = fleet.socket_address(To::Underlay("web1"), UDP_PORT)?;
    traffic::send_datagrams(fleet.netns(GATEWAY)?, beside, &marker, MARKED)?;
    let seen = if capture.finish()?.count(&marker)? > 0 { "seen" } else { "not seen" };
    report.add("the same bytes sent beside the overlay", "seen", seen);
    Ok(())
}

/// A transfer that is well under way.
fn begin(fleet: &Fleet) -> anyhow::Result<Download> {
    let shop = fleet.socket_address(To::Public, 80)?;
    let transfer = Download::start(fleet.netns("client")?, shop, LARGE_FILE, RATE)?;
    let going = interrupt::wait_until(REPORT_LIMIT, || Ok(transfer.received() > LARGE_BYTES / 16))?;
    ensure!(going, "the transfer does not get going");
    Ok(transfer)
}

fn judge(fleet: &Fleet, transfer: anyhow::Result<Downloaded>) -> (String, Duration) {
    match transfer {
        Err(error) => (format!("{error:#}"), Duration::MAX),
        Ok(done) if done.bytes == LARGE_BYTES && done.sha256 == fleet.large().sha256 => {
            ("intact".to_owned(), done.stall)
        }
        Ok(done) => (format!("damaged, {} bytes", done.bytes), done.stall),
    }
}

/// Traffic of each kind, for the time of an outage.
struct Loads(Vec<(&'static str, Running)>);

impl Loads {
    fn start(fleet: &Fleet) -> anyhow::Result<Self> {
        let [client, web1, db1, gateway]: [&Netns; 4] = [
            fleet.netns("client")?,
            fleet.netns("web1")?,
            fleet.netns("db1")?,
            fleet.netns(GATEWAY)?,
        ];
        let public = fleet.socket_address(To::Public, 80)?;
        let internal = fleet.socket_address(To::Internal, 80)?;
        let database = fleet.socket_address(To::Overlay("db1"), DATABASE_PORT)?;
        Ok(Self(vec![
            ("kept connection from outside", Running::start(Load::Stream, client, public)?),
            ("new connections from outside", Running::start(Load::Connect, client, public)?),
            ("kept connection from db1", Running::start(Load::Stream, db1, internal)?),
            ("new connections from web1", Running::start(Load::Connect, web1, internal)?),
            (
                "forbidden connections gw1 -> db1",
                Running::start(Load::Forbidden, gateway, database)?,
            ),
        ]))
    }

    fn finish(self, during: &str, report: &mut Report) {
        for (name, load) in self.0 {
            report.add(&format!("{name} {during}"), "0 wrong", &verdict(&load.finish()));
        }
    }
}

/// What operators wrote, and the identities of it, without what the system writes.
fn stored(fleet: &Fleet) -> anyhow::Result<String> {
    let mut lines = Vec::new();
    for kind in ["fw", "network", "lb"] {
        let value = get(fleet, &[kind])?;
        let list = value.as_array().or_else(|| value["items"].as_array());
        let list: &Vec<Value> =
            list.with_context(|| format!("`cnsmo get {kind}` gives no list"))?;
        ensure!(!list.is_empty(), "`cnsmo get {kind}` gives nothing");
        lines.extend(list.iter().map(|resource| {
            let metadata = &resource["metadata"];
            let (name, uid) = (&metadata["name"], &metadata["uid"]);
            format!("{kind} {name} {uid} {} {}", metadata["generation"], resource["spec"])
        }));
    }
    lines.sort();
    Ok(lines.join("\n"))
}
