//! What must be true of a fleet, as data: who sends what to whom, and what comes of it without and with policy.

use std::{collections::VecDeque, sync::Mutex, thread, time::Duration};

use anyhow::Context as _;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::{
    fleet::{Family, Fleet},
    interrupt,
    traffic::Probe,
};

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
    /// Adds a check that holds if `seen` is `expected`, and prints it.
    pub(crate) fn add(&mut self, name: &str, expected: &str, seen: &str) {
        let check = Check {
            name: name.to_owned(),
            expected: expected.to_owned(),
            seen: seen.to_owned(),
            ok: expected == seen,
        };
        let mark = if check.ok { "ok  " } else { "FAIL" };
        if check.ok {
            println!("  {mark}  {name:<62} {seen}");
        } else {
            println!("  {mark}  {name:<62} {seen} (expected: {expected})");
        }
        self.checks.push(check);
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
            table.set_header(["check", "expected", "seen"]);
            for check in failed {
                table.add_row([&check.name, &check.expected, &check.seen]);
            }
            text = format!("{table}\n");
        }
        text + &format!("{holding} of {} checks hold", self.checks.len())
    }
}

/// Traffic, and what comes of it before and under `examples/three-tier.yaml`.
struct Expectation {
    from: &'static str,
    to: &'static str,
    family: Family,
    probe: Probe,
    open: &'static str,
    filtered: &'static str,
}

/// Which of the two is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// No policy: the negative control. What will be closed must be open, or its being closed proves nothing.
    Open,
    /// The example's policies are enforced.
    Filtered,
}

use Family::{V4, V6};

const fn allowed(
    from: &'static str,
    to: &'static str,
    family: Family,
    probe: Probe,
    seen: &'static str,
) -> Expectation {
    Expectation { from, to, family, probe, open: seen, filtered: seen }
}

const fn denied(
    from: &'static str,
    to: &'static str,
    family: Family,
    probe: Probe,
    open: &'static str,
    filtered: &'static str,
) -> Expectation {
    Expectation { from, to, family, probe, open, filtered }
}

const WEB: Probe = Probe::Http { port: 80 };
const SSH: Probe = Probe::Tcp { port: 22 };
const DATABASE: Probe = Probe::Tcp { port: 5432 };
const ADMIN: Probe = Probe::Tcp { port: 8080 };
const UDP: Probe = Probe::Udp { port: crate::traffic::UDP_ECHO_PORT };
const PING: Probe = Probe::Ping { bytes: 56 };
/// Larger than any device's MTU here: fragments.
const LARGE_PING: Probe = Probe::Ping { bytes: 4000 };

const EXPECTATIONS: &[Expectation] = &[
    allowed("client", "web1", V4, WEB, "200 web1"),
    allowed("client", "web1", V6, WEB, "200 web1"),
    allowed("client", "web2", V4, WEB, "200 web2"),
    allowed("client", "web2", V6, WEB, "200 web2"),
    denied("client", "db1", V4, WEB, "200 db1", "timeout"),
    denied("client", "db1", V6, WEB, "200 db1", "timeout"),
    denied("web1", "db1", V4, WEB, "200 db1", "timeout"),
    allowed("web1", "db1", V4, DATABASE, "open"),
    allowed("web2", "db1", V6, DATABASE, "open"),
    denied("client", "db1", V4, DATABASE, "open", "timeout"),
    denied("client", "db1", V6, DATABASE, "open", "timeout"),
    denied("bastion", "db1", V4, DATABASE, "open", "timeout"),
    allowed("bastion", "web1", V4, SSH, "open"),
    allowed("bastion", "web2", V4, SSH, "open"),
    allowed("bastion", "db1", V6, SSH, "open"),
    denied("client", "web1", V4, SSH, "open", "timeout"),
    allowed("client", "bastion", V6, SSH, "open"),
    denied("web1", "web2", V4, SSH, "open", "timeout"),
    denied("client", "web1", V4, ADMIN, "open", "timeout"),
    denied("bastion", "web2", V6, ADMIN, "open", "timeout"),
    allowed("client", "web1", V4, PING, "3 of 3"),
    allowed("client", "db1", V6, PING, "3 of 3"),
    allowed("web1", "client", V4, PING, "3 of 3"),
    allowed("client", "web2", V4, LARGE_PING, "3 of 3"),
    allowed("client", "web2", V6, LARGE_PING, "3 of 3"),
    allowed("web1", "client", V4, UDP, "answered"),
    allowed("web1", "client", V6, UDP, "answered"),
    denied("client", "web1", V4, UDP, "answered", "silence"),
    denied("client", "web1", V6, UDP, "answered", "silence"),
    denied(
        "client",
        "web1",
        V4,
        Probe::Scan,
        "open: 22 80 8080; others: 1023 closed",
        "open: 80; others: 1025 filtered",
    ),
];

/// Waiting for what is expected to come: long, for it costs nothing when it comes.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Waiting for what is expected not to come: longer than one retransmission of a SYN (RFC 6298: 1 s).
const SILENCE_LIMIT: Duration = Duration::from_millis(1800);
/// Probes at once; most of them wait.
const PARALLEL: usize = 8;

/// Sends all the traffic of the table and adds a check for each line.
pub(crate) fn judge(fleet: &Fleet, state: State, report: &mut Report) -> anyhow::Result<()> {
    for (expectation, seen) in observe(fleet, state)? {
        let situation = match state {
            State::Open => "no policy: ",
            State::Filtered => "",
        };
        let name = format!("{situation}{}", expectation.name());
        report.add_result(&name, expectation.expected(state), seen);
    }
    Ok(())
}

/// Sends all the traffic and returns what differs from the table: for the same table in another situation.
pub(crate) fn differences(fleet: &Fleet, state: State) -> anyhow::Result<String> {
    let mut wrong = Vec::new();
    let observed = observe(fleet, state)?;
    let total = observed.len();
    for (expectation, seen) in observed {
        let seen = seen.unwrap_or_else(|error| format!("{error:#}"));
        if seen != expectation.expected(state) {
            wrong.push(format!("{}: {seen}", expectation.name()));
        }
    }
    if wrong.is_empty() { Ok(as_in_table(total)) } else { Ok(wrong.join("; ")) }
}

/// What [`differences`] returns when there are none.
pub(crate) fn no_differences() -> String {
    as_in_table(EXPECTATIONS.len())
}

fn as_in_table(total: usize) -> String {
    format!("{total} of {total} as above")
}

type Observed = (&'static Expectation, anyhow::Result<String>);

fn observe(fleet: &Fleet, state: State) -> anyhow::Result<Vec<Observed>> {
    let queue = Mutex::new(EXPECTATIONS.iter().enumerate().collect::<VecDeque<_>>());
    let seen = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                while let Some((n, expectation)) = next(&queue) {
                    let outcome = expectation.observe(fleet, state);
                    if let Ok(mut seen) = seen.lock() {
                        seen.push((n, expectation, outcome));
                    }
                }
            });
        }
    });
    interrupt::check()?;
    let mut seen = seen.into_inner().ok().context("a probe panicked")?;
    seen.sort_by_key(|(n, ..)| *n);
    Ok(seen.into_iter().map(|(_, expectation, outcome)| (expectation, outcome)).collect())
}

fn next<T>(queue: &Mutex<VecDeque<T>>) -> Option<T> {
    if interrupt::asked() {
        return None;
    }
    queue.lock().ok()?.pop_front()
}

impl Expectation {
    fn observe(&self, fleet: &Fleet, state: State) -> anyhow::Result<String> {
        let limit = match self.expected(state) {
            "timeout" | "silence" => SILENCE_LIMIT,
            _ => ANSWER_LIMIT,
        };
        let to = fleet.host(self.to)?.address(self.family);
        self.probe.run(&fleet.host(self.from)?.netns, to, limit)
    }

    fn expected(&self, state: State) -> &'static str {
        match state {
            State::Open => self.open,
            State::Filtered => self.filtered,
        }
    }

    fn name(&self) -> String {
        let what = match self.probe {
            Probe::Http { port } => format!("curl to port {port}"),
            Probe::Tcp { port } => format!("TCP to port {port}"),
            Probe::Udp { port } => format!("UDP to port {port}"),
            Probe::Ping { bytes } => format!("ping with {bytes} bytes"),
            Probe::Scan => "nmap SYN scan".to_owned(),
        };
        let family = match self.family {
            V4 => "IPv4",
            V6 => "IPv6",
        };
        format!("{} -> {}: {what}, {family}", self.from, self.to)
    }
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
    fn every_denied_line_is_open_without_policy() {
        for line in EXPECTATIONS {
            assert!(!matches!(line.open, "timeout" | "silence"), "{}", line.name());
        }
    }
}
