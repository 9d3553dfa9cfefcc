//! What services keep in the core: keys, messages and announcements, used from a VM, across deaths of the core.

use std::process::Command;

use anyhow::ensure;

use super::{REPORT_LIMIT, identity::Operator, number, unchanged};
use crate::{checks::Report, fleet::Fleet, interrupt, shell};

const ORDERS: usize = 10;
/// Acknowledged before the core is killed.
const DONE: usize = 3;

/// A service on another machine keeps keys and messages, which outlive the core.
pub(crate) fn kept(fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    let shop = Operator::log_in(fleet, "shop", "service")?;
    let put = |key: &str, value: &str, condition: &[&str]| -> anyhow::Result<String> {
        let (ok, said) = shop.run(&[&["kv", "put", key, value], condition].concat())?;
        Ok(if ok { "done".to_owned() } else { said })
    };
    report.add(
        "a service puts a key of its own",
        "done",
        &put("shop/cart", "7", &["--if-absent"])?,
    );
    let second = put("shop/cart", "8", &["--if-absent"])?;
    let seen = if second == "done" { "replaced" } else { "refused" };
    report.add("again, if the key is absent", "refused", seen);
    let other = put("till/cart", "8", &[])?;
    let seen = if other.contains("till/cart") { "refused, naming the key" } else { &other };
    report.add("a key of another service", "refused, naming the key", seen);

    for order in 1..=ORDERS {
        let (payload, id) = (format!("order-{order}."), order.to_string());
        let publish = ["bus", "publish", "shop.orders", &payload, "--durable", "--id", &id];
        // Each is said twice and kept once.
        for _ in 0..2 {
            let (ok, said) = shop.run(&publish)?;
            ensure!(ok, "cnsmo bus publish failed: {said}");
        }
    }
    let first = orders(&shop, DONE)?;
    let before = revision(fleet)?;
    fleet.kill_core()?;
    fleet.start_core()?;
    let shop = Operator::again(fleet, "shop")?;
    let rest = orders(&shop, ORDERS - DONE)?;
    let all: Vec<_> = (1..=ORDERS).map(|order| order.to_string()).collect();
    let seen = [first, rest].concat().join(" ");
    report.add("10 durable messages, the core killed after 3", &all.join(" "), &seen);
    let (_, value) = shop.run(&["kv", "get", "shop/cart"])?;
    report.add("the key after that", "7", value.trim());
    let kept = if revision(fleet)? >= before { "not gone back" } else { "gone back" };
    report.add("the revision", "not gone back", kept);
    Ok(())
}

/// An instance that falls silent is told to be unreachable, then lost.
pub(crate) fn announced(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let announcement = serde_json::json!({
        "instance": {"service": "till", "name": "till-1", "phase": "PHASE_READY", "reason": "Healthy"},
        "ttl": "2s", "grace": "2s",
    });
    let mut announce = Command::new("curl");
    announce.args(["--silent", "--show-error", "--fail", "--unix-socket"]);
    announce.arg(fleet.control().socket()).args(["--json", &announcement.to_string()]);
    shell::read(announce.arg("http://core.cnsmo/cnsmo.catalog.v1.CatalogService/Announce"))?;
    for phase in ["ready", "unreachable", "lost"] {
        let come = interrupt::wait_until(REPORT_LIMIT, || {
            Ok(fleet.cli_ok(&["services", "--service", "till"])?.contains(phase))
        })?;
        let seen = if come { "seen" } else { "not seen" };
        report.add(&format!("an instance that is announced once: {phase}"), "seen", seen);
    }
    Ok(())
}

/// The core's state is put back from a backup, while the VMs go on.
pub(crate) fn restored(fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    let backup = fleet.control().dir().join("state.backup").display().to_string();
    fleet.cli_ok(&["backup", &backup])?;
    fleet.cli_ok(&["kv", "put", "shop/cart", "after the backup"])?;
    fleet.kill_core()?;
    let mut restore = Command::new(&fleet.control().programs.core);
    restore.arg("--state-dir").arg(fleet.control().core_state());
    shell::read(restore.args(["restore", "--force", "--from", &backup]))?;
    fleet.start_core()?;
    let value = fleet.cli_ok(&["kv", "get", "shop/cart"])?;
    report.add("a key that was changed after the backup", "7", value.trim());
    fleet.wait_ready(&crate::fleet::vms())?;
    unchanged(fleet, "traffic after the restore", report)
}

/// Takes and acknowledges so many orders.
fn orders(shop: &Operator<'_>, count: usize) -> anyhow::Result<Vec<String>> {
    let count = count.to_string();
    let subscribe = ["bus", "subscribe", "shop.orders", "--durable", "--group", "shop"];
    let (ok, said) = shop.run(&[&subscribe[..], &["--from", "1", "--count", &count]].concat())?;
    ensure!(ok, "cnsmo bus subscribe failed: {said}");
    let orders = said.split("order-").skip(1);
    Ok(orders.map(|order| order.split('.').next().unwrap_or_default().to_owned()).collect())
}

fn revision(fleet: &Fleet) -> anyhow::Result<u64> {
    let status: serde_json::Value =
        serde_json::from_str(&fleet.cli_ok(&["status", "-o", "json"])?)?;
    ensure!(!status["revision"].is_null(), "cnsmo status names no revision: {status}");
    Ok(number(&status["revision"]))
}
