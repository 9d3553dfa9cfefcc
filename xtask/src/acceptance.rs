//! The twenty checks that say whether the project keeps its promise. Check S18 is the test `s18_...` in `tests/`.

use std::process::Command;

use anyhow::{Context as _, bail};
use comfy_table::{ContentArrangement, Table, presets};

use crate::{
    cargo::{self, cargo},
    interrupt, progress, shell,
};

/// What each check expects, S1 first.
const CHECKS: [&str; 20] = [
    "one file deploys VPN, firewall and balancer; a second apply changes nothing",
    "agent and core stay small in memory, idle CPU and open ports",
    "services answer the basic API and make legal life-cycle transitions only",
    "actors: nothing lost, nobody blocked by another, restarted after a panic",
    "the same call by gRPC, HTTP/JSON and unix socket gives the same message",
    "services are spawned and deleted locally and remotely",
    "agents without a core retry and join when it appears",
    "the core's own services are services like all others",
    "random SIGKILLs of the core lose no acknowledged write",
    "a service module goes on elsewhere with an empty disk",
    "unacknowledged messages survive the core",
    "a client made from the .proto files alone takes part",
    "messages are shared out between consumers, none lost",
    "late subscribers see the present; needs are started in order",
    "scale up and down over hosts, no connection reset",
    "an agent is announced within a second; a wrong certificate is not",
    "one service agent for each service and VM, each killable alone",
    "the overlay is private, complete, revocable and rotates keys without loss",
    "the firewall of each VM: verbatim rules, atomic change, revocation, counters",
    "the balancer spreads over the chosen VMs, drains and fails over",
];

/// A check's number, from `S18`, `s18` or `18`.
pub(crate) fn parse(text: &str) -> Result<u8, String> {
    let number = text.trim_start_matches(['S', 's']).parse().ok();
    let known = number.filter(|n| (1..=CHECKS.len()).contains(&usize::from(*n)));
    known.ok_or_else(|| format!("there are the checks S1 to S{}", CHECKS.len()))
}

/// Runs the checks, all if none is named, and prints one line for each. An error unless every one is built and holds.
pub(crate) fn run(wanted: &[u8]) -> anyhow::Result<()> {
    progress::heading("Building the tests");
    shell::run(cargo().args([
        "build",
        "--locked",
        "--package=cnsmo-core",
        "--package=cnsmo-agent",
        "--package=cnsmo-cli",
    ]))?;
    shell::run(cargo().args(["build", "--locked", "--package=cnsmo-service", "--examples"]))?;
    let built = cargo::build(cargo().args(["test", "--no-run", "--package=cnsmo-tests"]))?;
    let binary = built.executable("main")?;
    let list = shell::read(Command::new(&binary).args(["--list", "--format=terse"]))?;
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["check", "expected", "seen", "verdict"]);
    let (mut hold, mut asked) = (0, 0);
    for (number, expected) in (1_u8..).zip(CHECKS) {
        if !wanted.is_empty() && !wanted.contains(&number) {
            continue;
        }
        interrupt::check()?;
        asked += 1;
        let names = tests_of(number, &list);
        let (seen, verdict) = if names.is_empty() {
            ("no test".to_owned(), "missing")
        } else {
            progress::say(&format!("  ...   S{number}: {}", names.join(", ")));
            let mut command = Command::new(&binary);
            command.args(["--exact", "--test-threads=1"]).args(&names);
            let output = shell::capture(command.current_dir(shell::root().join("tests")))?;
            let text = String::from_utf8_lossy(&output.stdout);
            let result = text.lines().find(|line| line.starts_with("test result:"));
            let seen = result.context("the tests gave no result")?.to_owned();
            if output.status.success() {
                hold += 1;
                (seen, "holds")
            } else {
                progress::say(&text);
                (seen, "FAILS")
            }
        };
        table.add_row([&format!("S{number}"), expected, &seen, verdict]);
    }
    println!("{table}\n{hold} of {asked} checks hold");
    if hold < asked {
        bail!("{} checks fail or are missing", asked - hold);
    }
    Ok(())
}

/// The tests of a check in the output of `--list`, whose lines are `path::s01_name: test`.
fn tests_of(number: u8, list: &str) -> Vec<String> {
    let prefix = format!("s{number:02}_");
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    let own = |name: &str| name.rsplit("::").any(|part| part.starts_with(&prefix));
    names.filter(|name| own(name)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_has_the_tests_with_its_number() {
        let list = "cases::s01_deploy: test\ncases::s11_queue::acked: test\nkernel::s1x: test\nbench: bench\n";
        assert_eq!(tests_of(1, list), ["cases::s01_deploy"]);
        assert_eq!(tests_of(11, list), ["cases::s11_queue::acked"]);
        assert!(tests_of(2, list).is_empty());
    }

    #[test]
    fn only_the_checks_that_exist_are_accepted() {
        assert_eq!(parse("S18"), Ok(18));
        assert_eq!(parse("s1"), Ok(1));
        for bad in ["S0", "S21", "x", ""] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
