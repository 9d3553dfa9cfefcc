//! What must be true of a fleet: the checks of a run, and its traffic as a table.

mod table;

use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use self::table::{EXPECTATIONS, Expectation};
use crate::{fleet::Fleet, parallel};

/// Where the output is no terminal.
const TABLE_WIDTH: u16 = 150;
/// Waiting for what is expected to come: long, for it costs nothing when it comes.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Waiting for what is expected not to come: longer than one retransmission of a SYN (RFC 6298: 1 s).
const SILENCE_LIMIT: Duration = Duration::from_millis(1800);

/// One thing that was asked, and what was seen.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) expected: String,
    pub(crate) seen: String,
    pub(crate) ok: bool,
}

/// All checks of a run, in order.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    checks: Vec<Check>,
}

impl Report {
    /// Adds a check that holds if `seen` is `expected`, or one of its alternatives with ` or ` between, and prints it.
    pub(crate) fn add(&mut self, name: &str, expected: &str, seen: &str) {
        self.judge(name, expected, seen, holds(expected, seen));
    }

    /// Adds a check whose outcome is not one of a few words, and prints it.
    pub(crate) fn judge(&mut self, name: &str, expected: &str, seen: &str, ok: bool) {
        if ok {
            println!("  ok    {name:<66} {seen}");
        } else {
            println!("  FAIL  {name:<66} {seen} (expected: {expected})");
        }
        self.checks.push(Check {
            name: name.to_owned(),
            expected: expected.to_owned(),
            seen: seen.to_owned(),
            ok,
        });
    }

    /// As [`Report::add`] for the outcome of something that may not have worked at all.
    pub(crate) fn add_result(&mut self, name: &str, expected: &str, seen: anyhow::Result<String>) {
        self.add(name, expected, &seen.unwrap_or_else(|error| format!("{error:#}")));
    }

    /// Whether there are checks and all of them hold.
    pub(crate) fn all_hold(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.ok)
    }

    /// The checks that do not hold as a table, and how many do.
    pub(crate) fn summary(&self) -> String {
        let failed: Vec<_> = self.checks.iter().filter(|check| !check.ok).collect();
        let holding = self.checks.len() - failed.len();
        let mut text = String::new();
        if !failed.is_empty() {
            let mut table = Table::new();
            table.load_style(presets::UTF8_BORDERS_ONLY);
            table.set_content_arrangement(ContentArrangement::Dynamic);
            if table.width().is_none() {
                table.set_width(TABLE_WIDTH);
            }
            table.set_header(["check", "expected", "seen"]);
            for check in failed {
                table.add_row([&check.name, &check.expected, &check.seen]);
            }
            text = format!("{table}\n");
        }
        text + &format!("{holding} of {} checks hold", self.checks.len())
    }
}

/// What is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing was applied. What will be closed must be open, or its being closed proves nothing.
    Bare,
    /// The example.
    Enforced,
    /// The example without its firewall policies: as [`State::Bare`] for what needs network or balancer.
    Unfiltered,
}

/// Sends all the traffic of the table and adds a check for each line.
pub(crate) fn judge(fleet: &Fleet, state: State, report: &mut Report) -> anyhow::Result<()> {
    for (expectation, seen) in observe(fleet, state)? {
        let situation = match state {
            State::Bare | State::Unfiltered => "no policy: ",
            State::Enforced => "",
        };
        let name = format!("{situation}{}", expectation.name());
        report.add_result(&name, expectation.expected(state), seen);
    }
    Ok(())
}

/// Sends all the traffic and returns what differs from the table of [`State::Enforced`]: for other situations in which
/// it must hold.
pub(crate) fn differences(fleet: &Fleet) -> anyhow::Result<String> {
    let mut wrong = Vec::new();
    for (expectation, seen) in observe(fleet, State::Enforced)? {
        let seen = seen.unwrap_or_else(|error| format!("{error:#}"));
        if !holds(expectation.expected(State::Enforced), &seen) {
            wrong.push(format!("{}: {seen}", expectation.name()));
        }
    }
    if wrong.is_empty() { Ok(no_differences()) } else { Ok(wrong.join("; ")) }
}

/// What [`differences`] returns when there are none.
pub(crate) fn no_differences() -> String {
    let total = EXPECTATIONS.len();
    format!("{total} of {total} as above")
}

type Observed = (&'static Expectation, anyhow::Result<String>);

fn observe(fleet: &Fleet, state: State) -> anyhow::Result<Vec<Observed>> {
    let lines = EXPECTATIONS.iter().filter(|line| line.is_asked(state));
    parallel::each(lines, |line| (line, line.observe(fleet, state)))
}

/// Whether `seen` is one of the alternatives in `expected`.
fn holds(expected: &str, seen: &str) -> bool {
    expected.split(" or ").any(|one| one == seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_checks_are_no_success() {
        let mut report = Report::default();
        assert!(!report.all_hold());
        report.add("a", "x", "x");
        assert!(report.all_hold());
        report.add("b", "x", "y");
        assert!(!report.all_hold());
        assert!(report.summary().contains("1 of 2 checks hold"));
    }

    #[test]
    fn one_alternative_is_enough() {
        assert!(holds("web1 or web2", "web2") && holds("web1", "web1"));
        assert!(!holds("web1 or web2", "web3") && !holds("web1 or web2", "web1 or web2"));
    }
}
