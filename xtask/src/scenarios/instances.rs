//! A service of the operator's own on the VMs: placed, scaled, moved and brought back by the core.

use std::collections::BTreeSet;

use anyhow::Context as _;
use serde_json::Value;

use super::{REPORT_LIMIT, get, manifest, number};
use crate::{checks::Report, fleet::Fleet, interrupt};

/// They need nothing but the base system, and end by themselves if they are left behind.
const STOCK: &str = "kind: Deployment
metadata: {name: stock}
spec:
  placement: {selector: {role: db}}
  process: {command: [/bin/sleep, '1800'], user: nobody, stopTimeout: 1s}
  drainTimeout: 0s
";
const DEPLOYMENT: &str = "kind: Deployment
metadata: {name: cart}
spec:
  replicas: 3
  needs: [stock]
  placement: {selector: {role: web}, spread: site}
  process: {command: [/bin/sleep, '1800'], user: nobody, stopTimeout: 1s}
  drainTimeout: 1s
";

/// Started, scaled, run on without their agent, moved away from a VM that is drained, brought back, ended.
pub(crate) fn deployed(fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    let file = manifest(fleet, "cart.yaml", DEPLOYMENT)?;
    fleet.cli_ok(&["apply", "-f", &file])?;
    let waits = interrupt::wait_until(REPORT_LIMIT, || {
        Ok(fleet.cli_ok(&["get", "deployments", "cart"])?.contains("WaitingForNeeds"))
    })?;
    let seen = if waits && nodes(fleet)?.is_empty() { "waits" } else { "does not wait" };
    report.add("a service whose need is not there", "waits", seen);
    let stock = manifest(fleet, "stock.yaml", STOCK)?;
    fleet.cli_ok(&["apply", "-f", &stock, "--wait"])?;
    come(fleet, report, "3 instances on the VMs with role=web", "web1 web2 web3", 3)?;
    let history = fleet.cli_ok(&["history", "-o", "json"])?;
    let history: Value = serde_json::from_str(&history).context("cnsmo history is not JSON")?;
    let revision = number(&history[0]["revision"]);

    scale(fleet, 5)?;
    come(fleet, report, "scaled to 5: even over the sites", "a:3 b:2 or a:2 b:3", 5)?;
    let before = pids(fleet, "web1")?;
    fleet.kill_agent("web1")?;
    fleet.restart_agent("web1")?;
    fleet.wait_ready(&["web1"])?;
    let same = interrupt::wait_until(REPORT_LIMIT, || Ok(pids(fleet, "web1")? == before))?;
    let seen = if same && !before.is_empty() { "the same" } else { "others" };
    report.add("processes on web1 after SIGKILL to its agent", "the same", seen);

    scale(fleet, 2)?;
    come(fleet, report, "scaled to 2", "", 2)?;
    fleet.cli_ok(&["service", "kill", "orchestrator", "--node", "core"])?;
    fleet.cli_ok(&["drain", "web1"])?;
    let emptied = interrupt::wait_until(REPORT_LIMIT, || {
        let nodes = nodes(fleet)?;
        Ok(nodes.len() == 2 && !nodes.contains(&"web1".to_owned()))
    })?;
    let seen = if emptied { "moved" } else { "still there" };
    report.add("instances of web1 while it is drained", "moved", seen);
    fleet.cli_ok(&["drain", "web1", "--undo"])?;

    fleet.cli_ok(&["rollback", &revision.to_string()])?;
    come(fleet, report, "rolled back to 3", "", 3)?;
    fleet.cli_ok(&["delete", "deployment", "cart"])?;
    fleet.cli_ok(&["delete", "deployment", "stock"])?;
    let gone = interrupt::wait_until(REPORT_LIMIT, || {
        let left = fleet.cli_ok(&["services", "-o", "json"])?;
        let left: Value = serde_json::from_str(&left).context("cnsmo services is not JSON")?;
        let left = left.as_array().context("cnsmo services is no list")?;
        Ok(left.iter().all(|one| one["service"] != "cart" && one["service"] != "stock"))
    })?;
    report.add("deleted", "none left", if gone { "none left" } else { "some left" });
    Ok(())
}

fn scale(fleet: &Fleet, count: usize) -> anyhow::Result<()> {
    fleet.cli_ok(&["scale", &format!("cart={count}"), "--wait"]).map(drop)
}

/// All instances are ready, so many, and spread as they shall be.
fn come(
    fleet: &Fleet,
    report: &mut Report,
    what: &str,
    expected: &str,
    count: u64,
) -> anyhow::Result<()> {
    let complete = interrupt::wait_until(REPORT_LIMIT, || {
        let status = get(fleet, &["deployments", "cart"])?["status"].clone();
        Ok(["placed", "ready", "updated"].iter().all(|field| number(&status[*field]) == count))
    })?;
    let nodes = nodes(fleet)?;
    let seen = format!("{} ready on {}", nodes.len(), nodes.join(" "));
    let in_a = nodes.iter().filter(|node| *node == "web1").count();
    let spread = nodes.len().abs_diff(2 * in_a) <= 1;
    let is_all = nodes.iter().collect::<BTreeSet<_>>().len() == 3 || count < 3;
    let expected = if expected.is_empty() { format!("{count} ready") } else { expected.to_owned() };
    report.judge(what, &expected, &seen, complete && spread && is_all);
    Ok(())
}

/// VMs of the instances, one for each.
fn nodes(fleet: &Fleet) -> anyhow::Result<Vec<String>> {
    let status = get(fleet, &["deployments", "cart"])?["status"].clone();
    let instances = status["instances"].as_array().context("the deployment has no instances")?;
    let node = |one: &Value| Some(one["node"].as_str()?.to_owned());
    let mut nodes: Vec<_> = instances.iter().filter_map(node).collect();
    nodes.sort();
    Ok(nodes)
}

/// Processes of the instances on a VM.
fn pids(fleet: &Fleet, vm: &str) -> anyhow::Result<BTreeSet<u64>> {
    let output = fleet.cli(&["service", "list", "--node", vm, "-o", "json"])?;
    // Its agent may not be there yet.
    let all: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let all = all.as_array().cloned().unwrap_or_default();
    Ok(all.iter().filter(|one| one["service"] == "cart").map(|one| number(&one["pid"])).collect())
}
