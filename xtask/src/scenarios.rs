//! What must stay true while things change: VMs that come and go, policies, balancing, crashes.

pub(crate) mod balancer;
pub(crate) mod deploy;
pub(crate) mod identity;
pub(crate) mod instances;
pub(crate) mod outage;
pub(crate) mod overlay;
pub(crate) mod policy;
pub(crate) mod secrets;
pub(crate) mod state;

use std::time::Duration;

use serde_json::Value;

use crate::{
    checks::{self, Report},
    fleet::Fleet,
};

/// From an agent's or the core's event to its being visible to the operator: several reporting periods.
const REPORT_LIMIT: Duration = Duration::from_secs(30);
/// Waiting for traffic that is expected.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Applies a manifest and waits until every VM it concerns enforces it.
fn apply(fleet: &Fleet, file: &str) -> anyhow::Result<()> {
    fleet.cli_ok(&["apply", "-f", file, "--wait", "--timeout", "60s"]).map(drop)
}

/// Waits until every VM enforces the state as it is.
fn settle(fleet: &Fleet) -> anyhow::Result<()> {
    fleet.cli_ok(&["wait", "--timeout", "60s"]).map(drop)
}

/// Writes a manifest and returns its path.
fn manifest(fleet: &Fleet, name: &str, text: &str) -> anyhow::Result<String> {
    fleet.control().manifest(name, text)
}

/// What `cnsmo get KIND [NAME] -o json` prints.
fn get(fleet: &Fleet, what: &[&str]) -> anyhow::Result<Value> {
    fleet.control().get(what)
}

/// 64-bit integers may be texts in JSON.
fn number(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0)
}

fn unchanged(fleet: &Fleet, name: &str, report: &mut Report) -> anyhow::Result<()> {
    let seen = checks::differences(fleet)?;
    report.add(name, &checks::no_differences(), &seen);
    Ok(())
}
