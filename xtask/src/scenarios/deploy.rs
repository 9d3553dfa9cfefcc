//! One file for network, balancer and firewall; VMs that come and go; parts that cannot be applied.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::{ANSWER_LIMIT, apply, get, manifest, unchanged};
use crate::{
    checks::Report,
    fleet::{Family, Fleet, To, UDP_PORT, WEB, said, vms},
    interrupt, parallel,
    process::pause,
    traffic::{self, Probe},
};

/// From a VM's being READY to its being reached by all others.
const JOIN_LIMIT: Duration = Duration::from_secs(1);
/// From a VM's deletion to its being reached by nobody.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);
/// For one answer over the overlay, a handshake included.
const ROUND_TRIP_LIMIT: Duration = Duration::from_millis(900);
/// More balancers than a VM takes.
const TOO_MANY: usize = 70;
/// The first of their ports.
const EXTRA_PORT: u16 = 2000;

/// The whole deployment is one revision; the same file again changes nothing.
pub(crate) fn example(fleet: &Fleet, file: &str, report: &mut Report) -> anyhow::Result<()> {
    let first = fleet.cli(&["apply", "-f", file, "--wait", "--timeout", "60s"])?;
    let text = String::from_utf8_lossy(&first.stdout);
    let revisions: Vec<_> =
        text.lines().filter_map(|line| line.strip_prefix("revision ")).collect();
    let created = text.lines().filter(|line| line.ends_with(" created")).count();
    let seen = match first.status.code() {
        Some(0) => format!("exit code 0, {} revision", revisions.len()),
        code => format!("exit code {code:?}: {}", said(&first).trim()),
    };
    let name = format!("network, balancer and policies: {created} resources of one file");
    report.add(&name, "exit code 0, 1 revision", &seen);

    let again = fleet.cli_ok(&["apply", "-f", file, "--wait"])?;
    let unchanged = revisions.first().map(|revision| format!("no change (revision {revision})"));
    let said = again.lines().find(|line| line.starts_with("no change")).unwrap_or("a change");
    report.add("the same file again", unchanged.as_deref().unwrap_or("no change"), said);
    Ok(())
}

/// A VM that was not there when the file was applied.
pub(crate) fn join(fleet: &mut Fleet, vm: &'static str, report: &mut Report) -> anyhow::Result<()> {
    fleet.start_agents(&[vm])?;
    fleet.wait_ready(&[vm])?;
    let ready = Instant::now();
    let to = SocketAddr::new(fleet.address(To::Overlay(vm), Family::V4)?, UDP_PORT);
    let others: Vec<_> = vms().into_iter().filter(|other| *other != vm).collect();
    let late = parallel::each(others, |other| -> anyhow::Result<Duration> {
        let from = fleet.netns(other)?;
        let probe = Probe::Udp { port: UDP_PORT };
        interrupt::wait_until(ANSWER_LIMIT, || {
            Ok(probe.run(from, to.ip(), ROUND_TRIP_LIMIT)? == vm)
        })?;
        Ok(ready.elapsed())
    })?;
    let last = late.into_iter().collect::<anyhow::Result<Vec<_>>>()?.into_iter().max();
    let last = last.context("there are no other VMs")?;
    report.judge(
        &format!("all others reach {vm} once it is READY"),
        &format!("within {JOIN_LIMIT:?}"),
        &format!("after {:.2} s", last.as_secs_f32()),
        last <= JOIN_LIMIT,
    );
    let used = until_answers(fleet, vm)?;
    report.add(&format!("the balancer gives {vm} connections"), "yes", used);
    Ok(())
}

/// A VM that is deleted has no way back in.
pub(crate) fn leave(fleet: &Fleet, vm: &'static str, report: &mut Report) -> anyhow::Result<()> {
    fleet.cli_ok(&["delete", "node", vm])?;
    pause(LEAVE_LIMIT);
    let to = fleet.address(To::Overlay(vm), Family::V4)?;
    let others: Vec<_> = vms().into_iter().filter(|other| *other != vm).collect();
    let reached = parallel::each(others, |other| {
        let seen = Probe::Udp { port: UDP_PORT }.run(fleet.netns(other)?, to, ROUND_TRIP_LIMIT)?;
        Ok((seen != "silence").then_some(other))
    })?;
    let reached = reached.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let reached: Vec<_> = reached.into_iter().flatten().collect();
    let seen = if reached.is_empty() { "nobody".to_owned() } else { reached.join(" ") };
    report.add(&format!("who reaches {vm}, {LEAVE_LIMIT:?} after its deletion"), "nobody", &seen);
    let shop = fleet.socket_address(To::Public, 80)?;
    let answers = traffic::answers(fleet.netns("client")?, shop, Probe::Http { port: 80 }, 60)?;
    let seen = answers.into_keys().collect::<Vec<_>>().join(" ");
    let rest: Vec<_> = WEB.into_iter().filter(|web| *web != vm).collect();
    report.add("who answers for the public address then", &rest.join(" "), &seen);
    Ok(())
}

/// What one VM cannot apply, `--wait` names, and the rest does not wait for it.
pub(crate) fn absent(fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    let change = |open| {
        let action = if open { "allow" } else { "deny" };
        format!(
            "kind: FirewallPolicy\n\
             metadata: {{name: late}}\n\
             spec:\n\
             \x20 priority: 2\n\
             \x20 rules:\n\
             \x20 - {{name: udp, action: {action}, direction: ingress, protocol: udp, ports: [9997]}}\n"
        )
    };
    let file = manifest(fleet, "late.yaml", &change(false))?;
    fleet.kill_agent("db1")?;
    let output = fleet.cli(&["apply", "-f", &file, "--wait", "--timeout", "3s"])?;
    let text = said(&output);
    let lines: Vec<_> = text.lines().filter(|line| line.contains("db1")).collect();
    let others = vms().into_iter().filter(|vm| *vm != "db1").any(|vm| text.contains(vm));
    let seen = match (output.status.code(), lines.first(), others) {
        (Some(3), Some(_), false) => "exit code 3, naming db1 alone".to_owned(),
        (code, ..) => format!("exit code {code:?}: {}", text.trim()),
    };
    report.add(
        "apply --wait while the agent of db1 is dead",
        "exit code 3, naming db1 alone",
        &seen,
    );
    fleet.restart_agent("db1")?;
    let file = manifest(fleet, "late.yaml", &change(true))?;
    let seen = apply(fleet, &file).map(|()| "exit code 0".to_owned());
    report.add_result("apply --wait once it runs again", "exit code 0", seen);
    fleet.cli_ok(&["delete", "fw", "late"]).map(drop)
}

/// More balancers than a VM takes: those above its limit are refused alone and named.
pub(crate) fn too_many(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let mut text = String::new();
    let internal = fleet.address(To::Internal, Family::V4)?;
    for n in 0..TOO_MANY {
        let port = usize::from(EXTRA_PORT) + n;
        let _ = write!(
            text,
            "kind: LoadBalancer\n\
             metadata: {{name: z{n:02}, labels: {{check: limit}}}}\n\
             spec:\n\
             \x20 network: shop\n\
             \x20 addresses: [{internal}]\n\
             \x20 ports: [{{protocol: tcp, port: {port}, targetPort: 8080}}]\n\
             \x20 backends: {{role: web}}\n\
             ---\n"
        );
    }
    let file = manifest(fleet, "many.yaml", &text)?;
    let output = fleet.cli(&["apply", "-f", &file, "--wait", "--timeout", "20s"])?;
    let text = said(&output);
    let last = format!("z{}", TOO_MANY - 1);
    let seen = match (output.status.code(), text.contains(&last)) {
        (Some(3), true) => "exit code 3, naming the last".to_owned(),
        (code, _) => format!("exit code {code:?}: {}", text.trim()),
    };
    let name = format!("{TOO_MANY} more balancers, above the limit of a VM");
    report.add(&name, "exit code 3, naming the last", &seen);
    let first = Probe::Http { port: EXTRA_PORT };
    let seen = first.run(fleet.netns("db1")?, internal, ANSWER_LIMIT);
    report.add_result("the first of them", "200 web1 or 200 web2 or 200 web3", seen);
    unchanged(fleet, "traffic beside the refused ones", report)?;
    fleet.cli_ok(&["delete", "-f", &file])?;
    super::settle(fleet)
}

/// `yes` as soon as a backend answers for the public address.
pub(super) fn until_answers(fleet: &Fleet, backend: &str) -> anyhow::Result<&'static str> {
    let (client, shop) = (fleet.netns("client")?, fleet.socket_address(To::Public, 80)?);
    let answered = interrupt::wait_until(ANSWER_LIMIT, || {
        let answers = traffic::answers(client, shop, Probe::Http { port: 80 }, 10)?;
        Ok(answers.contains_key(backend))
    })?;
    Ok(if answered { "yes" } else { "no" })
}

/// What the core says of the addresses in the network.
pub(crate) fn members(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let network = get(fleet, &["network", "shop"])?;
    let members = network["status"]["members"].as_array().context("no status.members")?;
    for vm in vms() {
        let expected = [Family::V4, Family::V6]
            .map(|family| To::Overlay(vm).address(family).map(|address| address.to_string()));
        let expected = expected.map(Option::unwrap_or_default).join(" ");
        let member = members.iter().find(|member| member["node"] == vm);
        let seen = member.map_or("none".to_owned(), |member| {
            let address = |family| member[family].as_str().unwrap_or_default();
            format!("{} {}", address("ipv4"), address("ipv6"))
        });
        report.add(&format!("addresses of {vm} in the network"), &expected, &seen);
    }
    Ok(())
}
