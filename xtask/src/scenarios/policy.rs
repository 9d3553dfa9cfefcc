//! Firewall policies that change, count, and are refused.

use std::{fmt::Write as _, path::Path, time::Duration};

use anyhow::Context as _;
use serde_json::Value;

use super::{ANSWER_LIMIT, REPORT_LIMIT, apply, get, manifest, number, settle, unchanged};
use crate::{
    checks::{self, Report, State},
    fleet::{Family, Fleet, SSH_PORT, To, said},
    interrupt,
    traffic::{self, Connection, Probe},
};

/// Datagrams whose counting is checked.
const DATAGRAMS: u32 = 25;
const COUNTED_PORT: u16 = 9998;
/// Longer than one retransmission of a SYN (RFC 6298: 1 s).
const SILENCE_LIMIT: Duration = Duration::from_millis(1800);

/// A policy of the checks' own, beside those of the example: counts, and opens a port to everybody or not.
pub(super) fn probe(open: bool) -> String {
    let mut text = format!(
        "kind: FirewallPolicy\n\
         metadata: {{name: probe}}\n\
         spec:\n\
         \x20 target: {{role: web}}\n\
         \x20 priority: 1\n\
         \x20 rules:\n\
         \x20 - {{name: counted, action: deny, direction: ingress, protocol: udp, ports: [{COUNTED_PORT}]}}\n"
    );
    if open {
        let _ = writeln!(
            text,
            "  - {{name: ssh, action: allow, direction: ingress, protocol: tcp, ports: [{SSH_PORT}]}}"
        );
    }
    text
}

/// A port is opened and closed again; a connection over it does not outlive its permission.
pub(crate) fn update(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let web1 = fleet.socket_address(To::Underlay("web1"), SSH_PORT)?;
    let client = fleet.netns("client")?;
    let ssh = Probe::Tcp { port: SSH_PORT };
    let look = |limit| ssh.run(client, web1.ip(), limit);

    apply(fleet, &manifest(fleet, "probe.yaml", &probe(true))?)?;
    report.add_result("a new rule opens port 22 of web1", "web1", look(ANSWER_LIMIT));
    let mut old = Connection::open(client, web1)?;
    let alive = |old: &mut Connection, limit| if old.works(limit) { "works" } else { "cut" };
    let before = alive(&mut old, ANSWER_LIMIT);
    report.add("an established connection over it", "works", before);

    apply(fleet, &manifest(fleet, "probe.yaml", &probe(false))?)?;
    let after = alive(&mut old, Duration::from_secs(2));
    report.add("the same connection after the rule is gone", "cut", after);
    let closed = look(SILENCE_LIMIT);
    report.add_result("a new connection after the rule is gone", "timeout", closed);
    Ok(())
}

/// What `cnsmo explain` says of packets whose fate the checks before have seen.
pub(crate) fn explained(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let client = fleet.address(To::Underlay("client"), Family::V4)?.to_string();
    let shop = fleet.socket_address(To::Public, 80)?.to_string();
    for (from, to, expected) in [
        (client.as_str(), shop.as_str(), "gw1 passes, backend passes"),
        ("web1", "db1:5432", "web1 passes, db1 passes"),
        ("gw1", "db1:5432", "gw1 passes, db1 dropped"),
    ] {
        let output = fleet.cli(&["explain", "--from", from, "--to", to, "-o", "json"])?;
        let seen = serde_json::from_slice(&output.stdout)
            .map_err(anyhow::Error::from)
            .and_then(|document: Value| way(&document))
            .unwrap_or_else(|_| said(&output));
        report.add(&format!("cnsmo explain --from {from} --to {to}"), expected, &seen);
    }
    Ok(())
}

/// Each VM on the way and what happens there; one that was chosen to be the backend is called so.
fn way(document: &Value) -> anyhow::Result<String> {
    let steps = document["steps"].as_array().context("there are no steps")?;
    let mut words = Vec::new();
    let mut backend = "";
    for step in steps {
        let text = |key: &str| step[key].as_str().unwrap_or_default();
        let node =
            if !backend.is_empty() && text("node") == backend { "backend" } else { text("node") };
        words.push(format!("{node} {}", text("verdict")));
        backend = text("backend");
    }
    Ok(words.join(", "))
}

/// A rule's counter grows by exactly what was sent. Needs the policy that [`update`] applied.
pub(crate) fn counters(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let before = counted(fleet)?;
    let to = fleet.socket_address(To::Underlay("web1"), COUNTED_PORT)?;
    traffic::send_datagrams(fleet.netns("client")?, to, b"cnsmo", DATAGRAMS)?;
    let wanted = before + u64::from(DATAGRAMS);
    let mut after = before;
    interrupt::wait_until(REPORT_LIMIT, || {
        after = counted(fleet)?;
        Ok(after >= wanted)
    })?;
    let sent = format!("grew by {DATAGRAMS}");
    let seen = format!("grew by {}", after - before);
    report.add("counter of a deny rule after 25 datagrams", &sent, &seen);
    Ok(())
}

/// An earlier state comes back as a new revision, in all VMs, and so does the later one.
pub(crate) fn rolled_back(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let history = fleet.cli_ok(&["history", "-o", "json"])?;
    let history: Value = serde_json::from_str(&history).context("cnsmo history is not JSON")?;
    let revision = |n: usize| history[n]["revision"].to_string();
    let (closed, opened) = (revision(0), revision(1));
    let (client, web1) =
        (fleet.netns("client")?, fleet.socket_address(To::Underlay("web1"), SSH_PORT)?);
    let look = |limit| Probe::Tcp { port: SSH_PORT }.run(client, web1.ip(), limit);
    let back = |to: &str| fleet.cli_ok(&["rollback", to, "--wait"]).map(drop);

    back(&opened)?;
    report.add_result("port 22 after the way back to when it was open", "web1", look(ANSWER_LIMIT));
    back(&closed)?;
    let seen = look(SILENCE_LIMIT);
    report.add_result("and after the way back to when it was closed", "timeout", seen);
    let again = fleet.cli_ok(&["rollback", &closed])?;
    let seen = if again.starts_with("no change") { "no change" } else { again.trim() };
    report.add("the same way again", "no change", seen);
    Ok(())
}

/// Packets that the counted rule refused on web1.
fn counted(fleet: &Fleet) -> anyhow::Result<u64> {
    let policy = get(fleet, &["fw", "probe"])?;
    let nodes = policy["status"]["nodes"].as_array().context("the policy has no status.nodes")?;
    let web1 = nodes.iter().find(|node| node["node"] == "web1").context("web1 is not in it")?;
    let rules = web1["rules"].as_array().context("web1 has no rules in it")?;
    let rule = rules.iter().find(|rule| rule["rule"] == "counted");
    Ok(rule.map_or(0, |rule| number(&rule["packets"])))
}

/// A manifest that must be refused, and what the message must say beside the file's name.
struct Bad {
    what: &'static str,
    file: &'static str,
    text: &'static str,
    named: &'static str,
}

const BAD: &[Bad] = &[
    Bad {
        what: "port 70000",
        file: "bad-port.yaml",
        text: "kind: FirewallPolicy\nmetadata: {name: probe}\nspec:\n  rules:\n  - {name: a, \
               action: allow, direction: ingress, protocol: tcp, ports: [70000]}\n",
        named: "rules[0].ports[0]",
    },
    Bad {
        what: "an unknown field",
        file: "bad-field.yaml",
        text: "kind: FirewallPolicy\nmetadata: {name: probe}\nspec:\n  rules:\n  - {name: a, \
               action: allow, direction: ingress, protocl: tcp}\n",
        named: "rules[0].protocl",
    },
    Bad {
        what: "two rules of one name",
        file: "bad-names.yaml",
        text: "kind: FirewallPolicy\nmetadata: {name: probe}\nspec:\n  rules:\n  - {name: a, \
               action: allow, direction: ingress}\n  - {name: a, action: deny, direction: ingress}\n",
        named: "rules[1].name",
    },
    Bad {
        what: "a bad rule of the original CNSMO",
        file: "bad-original.json",
        text: r#"[{"direction":"in","protocol":"tcp","dst_port":"70000","dst_src":"src","ip_range":"0.0.0.0/0","action":"acpt"}]"#,
        named: "dst_port",
    },
    Bad {
        what: "a good policy beside a bad one",
        file: "bad-second.yaml",
        text: "kind: FirewallPolicy\nmetadata: {name: open}\nspec: {priority: 0, rules: [{name: a, \
               action: allow, direction: ingress}]}\n---\nkind: FirewallPolicy\nmetadata: {name: bad}\n\
               spec: {priority: -1}\n",
        named: "priority",
    },
];

/// Bad policies are refused with a message that names the place, and change nothing.
pub(crate) fn refusals(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    for bad in BAD {
        let file = manifest(fleet, bad.file, bad.text)?;
        let output = fleet.cli(&["apply", "-f", &file])?;
        let said = said(&output);
        let named = [bad.file, bad.named].iter().all(|word| said.contains(word));
        let seen = match (output.status.success(), named) {
            (false, true) => "refused, naming file and field".to_owned(),
            (true, _) => "accepted".to_owned(),
            (false, false) => format!("refused with: {}", said.trim()),
        };
        let name = format!("{} is refused", bad.what);
        report.add(&name, "refused, naming file and field", &seen);
    }
    unchanged(fleet, "traffic after the refused policies", report)
}

/// Without the example's policies everything is open that they closed in the network.
pub(crate) fn unfiltered(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let policies = get(fleet, &["fw"])?;
    let list = policies.as_array().or_else(|| policies["items"].as_array());
    for policy in list.context("`cnsmo get fw -o json` gives no list")? {
        let name = policy["metadata"]["name"].as_str().context("a policy without a name")?;
        fleet.cli_ok(&["delete", "fw", name])?;
    }
    settle(fleet)?;
    checks::judge(fleet, State::Unfiltered, report)
}

/// Taking the data path away opens what it closed, and takes the tunnel away.
pub(crate) fn detach(fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    fleet.detach("web1")?;
    let web1 = fleet.socket_address(To::Underlay("web1"), SSH_PORT)?;
    let client = fleet.netns("client")?;
    let seen = Probe::Tcp { port: SSH_PORT }.run(client, web1.ip(), ANSWER_LIMIT);
    report.add_result("port 22 of web1 after `cnsmo-agent detach`", "web1", seen);
    let left = fleet
        .netns("web1")?
        .run(|| Path::new("/proc/thread-self/net/dev_snmp6/cnsmo0").exists())?;
    let engines = fleet.engines("web1")?.len();
    let seen = format!("{} devices, {engines} processes", u8::from(left));
    report.add("what is left of its tunnel", "0 devices, 0 processes", &seen);
    Ok(())
}
