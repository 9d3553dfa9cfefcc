//! What must stay true while things change: policies, crashes of the agent and of the core.

use std::{fmt::Write as _, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::{
    checks::{self, Report, State},
    fleet::{Family, Fleet, said},
    interrupt,
    process::pause,
    shell,
    traffic::{self, Connection, Load, Probe, Running},
};

/// From an agent's or the core's event to its being visible to the operator: several reporting periods.
const REPORT_LIMIT: Duration = Duration::from_secs(30);
/// How long a crashed program stays away.
const OUTAGE: Duration = Duration::from_secs(3);
/// Datagrams whose counting is checked.
const DATAGRAMS: u32 = 25;
const COUNTED_PORT: u16 = 9998;
const ADMIN_PORT: u16 = 8080;

/// A policy of the checks' own, beside those of the example: counts, and opens a port or not.
fn probe_policy(open: bool) -> String {
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
            "  - {{name: admin, action: allow, direction: ingress, protocol: tcp, ports: [{ADMIN_PORT}]}}"
        );
    }
    text
}

/// Applies a manifest and waits until every VM it selects enforces it.
pub(crate) fn apply(fleet: &Fleet, file: &str) -> anyhow::Result<()> {
    fleet.cli_ok(&["apply", "-f", file, "--wait", "--timeout", "60s"]).map(drop)
}

/// A port is opened and closed again; a connection over it does not outlive its permission.
pub(crate) fn update(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let web1 = address(fleet, "web1", ADMIN_PORT)?;
    let client = &fleet.host("client")?.netns;
    let probe = Probe::Tcp { port: ADMIN_PORT };
    let look = |limit| probe.run(client, web1.ip(), limit);

    apply(fleet, &manifest(fleet, "probe.yaml", &probe_policy(true))?)?;
    report.add_result("a new rule opens port 8080 of web1", "open", look(Duration::from_secs(10)));
    let mut old = Connection::open(client, web1)?;
    let alive = |old: &mut Connection, limit| if old.works(limit) { "works" } else { "cut" };
    let before = alive(&mut old, Duration::from_secs(10));
    report.add("an established connection over it", "works", before);

    apply(fleet, &manifest(fleet, "probe.yaml", &probe_policy(false))?)?;
    let after = alive(&mut old, Duration::from_secs(2));
    report.add("the same connection after the rule is gone", "cut", after);
    let closed = look(Duration::from_millis(1800));
    report.add_result("a new connection after the rule is gone", "timeout", closed);
    Ok(())
}

/// A rule's counter grows by exactly what was sent. Needs the policy that [`update`] applied.
pub(crate) fn counters(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let before = counted(fleet)?;
    let to = address(fleet, "web1", COUNTED_PORT)?;
    traffic::send_datagrams(&fleet.host("client")?.netns, to, DATAGRAMS)?;
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

/// Packets that the counted rule refused on web1.
fn counted(fleet: &Fleet) -> anyhow::Result<u64> {
    let text = fleet.cli_ok(&["get", "fw", "probe", "-o", "json"])?;
    let value: Value = serde_json::from_str(&text).context("reading `cnsmo get fw probe`")?;
    let policy = first(&value);
    let nodes = policy["status"]["nodes"].as_array().context("the policy has no status.nodes")?;
    let web1 = nodes.iter().find(|node| node["node"] == "web1").context("web1 is not in it")?;
    let rules = web1["rules"].as_array().context("web1 has no rules in it")?;
    let rule = rules.iter().find(|rule| rule["rule"] == "counted");
    Ok(rule.map_or(0, |rule| number(&rule["packets"])))
}

/// A list's first resource, or the resource that stands alone.
fn first(value: &Value) -> &Value {
    match value.as_array().or_else(|| value["items"].as_array()) {
        Some(list) => list.first().unwrap_or(&Value::Null),
        None => value,
    }
}

/// 64-bit integers may be texts in JSON.
fn number(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0)
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

/// An agent dies under traffic and comes back; nobody notices.
pub(crate) fn agent_crash(fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    let loads = Loads::start(fleet)?;
    for vm in ["db1", "web1"] {
        fleet.kill_agent(vm)?;
    }
    unchanged(fleet, "traffic while the agents of db1 and web1 are dead", report)?;
    for vm in ["db1", "web1"] {
        fleet.restart_agent(vm)?;
    }
    wait_restarted(fleet)?;
    unchanged(fleet, "traffic after their restart", report)?;
    loads.finish("the agents' crash and restart", report);
    // Both answer to the core again: a change reaches their kernels.
    let applied = manifest(fleet, "probe.yaml", &probe_policy(true))
        .and_then(|file| apply(fleet, &file))
        .map(|()| "applied".to_owned());
    report.add_result("a change of policy after it", "applied", applied);
    apply(fleet, &manifest(fleet, "probe.yaml", &probe_policy(false))?)
}

/// The core dies under traffic and comes back with what it knew.
pub(crate) fn core_crash(fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    let before = policies(fleet)?;
    let loads = Loads::start(fleet)?;
    fleet.kill_core()?;
    pause(OUTAGE);
    unchanged(fleet, "traffic while the core is dead", report)?;
    fleet.start_core()?;
    let after = policies(fleet)?;
    let same = if before == after { "the same" } else { &after };
    report.add("policies of the core after its restart", "the same", same);
    fleet.wait_ready()?;
    unchanged(fleet, "traffic after the core's restart", report)?;
    loads.finish("the core's crash and restart", report);
    let applied = manifest(fleet, "probe.yaml", &probe_policy(true))
        .and_then(|file| apply(fleet, &file))
        .map(|()| "applied".to_owned());
    report.add_result("a change of policy after it", "applied", applied);
    apply(fleet, &manifest(fleet, "probe.yaml", &probe_policy(false))?)
}

/// Leaves the policies of the example alone in force.
pub(crate) fn tidy(fleet: &Fleet) -> anyhow::Result<()> {
    fleet.cli_ok(&["delete", "fw", "probe"])?;
    fleet.cli_ok(&["wait", "--timeout", "60s"]).map(drop)
}

/// Taking the data path away opens what it closed: it was the data path that closed it.
pub(crate) fn detach(fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    fleet.detach("web1")?;
    let web1 = address(fleet, "web1", ADMIN_PORT)?;
    let client = &fleet.host("client")?.netns;
    let seen = Probe::Tcp { port: ADMIN_PORT }.run(client, web1.ip(), Duration::from_secs(10));
    report.add_result("port 8080 of web1 after `cnsmo-agent detach`", "open", seen);
    Ok(())
}

/// Traffic of each kind, for the time of an outage.
struct Loads {
    running: Vec<(&'static str, Running)>,
}

impl Loads {
    fn start(fleet: &Fleet) -> anyhow::Result<Self> {
        let database = address(fleet, "db1", 5432)?;
        let (web1, client) = (&fleet.host("web1")?.netns, &fleet.host("client")?.netns);
        let running = vec![
            ("established stream web1 -> db1", Running::start(Load::Stream, web1, database)?),
            ("new connections web1 -> db1", Running::start(Load::Connect, web1, database)?),
            (
                "forbidden connections client -> db1",
                Running::start(Load::Forbidden, client, database)?,
            ),
        ];
        let loads = Self { running };
        let going = interrupt::wait_until(REPORT_LIMIT, || {
            Ok(loads.running.iter().all(|(_, load)| load.rounds() >= 3))
        })?;
        ensure!(going, "the traffic for an outage does not get going");
        Ok(loads)
    }

    fn finish(self, during: &str, report: &mut Report) {
        for (name, load) in self.running {
            let (rounds, wrong) = load.finish();
            let seen = match (rounds, wrong) {
                (0, _) => "nothing was sent".to_owned(),
                (_, 0) => "0 wrong".to_owned(),
                _ => format!("{wrong} wrong of {rounds}"),
            };
            report.add(&format!("{name} during {during}"), "0 wrong", &seen);
        }
    }
}

fn unchanged(fleet: &Fleet, name: &str, report: &mut Report) -> anyhow::Result<()> {
    let seen = checks::differences(fleet, State::Filtered)?;
    report.add(name, &checks::no_differences(), &seen);
    Ok(())
}

/// The core may still believe in the streams of before: what counts is that the new processes were accepted.
fn wait_restarted(fleet: &mut Fleet) -> anyhow::Result<()> {
    pause(OUTAGE);
    fleet.wait_ready()
}

/// Names and specs of all policies, without what the system writes.
fn policies(fleet: &Fleet) -> anyhow::Result<String> {
    let text = fleet.cli_ok(&["get", "fw", "-o", "json"])?;
    let value: Value = serde_json::from_str(&text).context("reading `cnsmo get fw`")?;
    let list = value.as_array().or_else(|| value["items"].as_array());
    let list = list.context("`cnsmo get fw -o json` gives no list")?;
    ensure!(!list.is_empty(), "`cnsmo get fw` gives no policies");
    let mut lines: Vec<_> = list
        .iter()
        .map(|policy| {
            let metadata = &policy["metadata"];
            format!(
                "{} {} {} {}",
                metadata["name"], metadata["uid"], metadata["generation"], policy["spec"]
            )
        })
        .collect();
    lines.sort();
    Ok(lines.join("\n"))
}

fn manifest(fleet: &Fleet, name: &str, text: &str) -> anyhow::Result<String> {
    let path: PathBuf = fleet.dir().join(name);
    shell::write(&path, text)?;
    Ok(path.display().to_string())
}

fn address(fleet: &Fleet, host: &str, port: u16) -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::new(fleet.host(host)?.address(Family::V4), port))
}
