//! The virtual addresses: spread, failure and drain of a backend under load.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use super::{REPORT_LIMIT, deploy::until_answers, get, number, settle};
use crate::{
    checks::Report,
    fleet::{Family, Fleet, GATEWAY, To, WEB},
    interrupt,
    process::pause,
    traffic::{
        self, Probe,
        load::{Load, Running, verdict},
    },
};

/// New connections whose backends are counted.
const COUNTED: u32 = 150;
/// Of each of three backends: chance gives less once in some ten million runs (50 expected, deviation 5.8).
const EACH_OF_THREE: u32 = 20;
/// Of each of two: 75 expected, deviation 6.1.
const EACH_OF_TWO: u32 = 43;
/// Kept connections to each backend, and how many are opened at most to have them.
const KEPT: usize = 2;
const KEPT_MAX: usize = 60;
/// For how long new connections may fail after a backend has died: two failed health checks, and their spread.
const FAILURE_LIMIT: Duration = Duration::from_secs(1);
/// For how long they are watched.
const WATCHED: Duration = Duration::from_secs(4);
/// The backend that dies and is drained.
const VICTIM: &str = "web2";

/// New connections go to all backends alike.
pub(crate) fn spread(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    const HTTP: Probe = Probe::Http { port: 80 };
    const NAMES: Probe = Probe::Udp { port: 53 };
    for (from, to, family, probe, wanted) in [
        ("client", To::Public, Family::V4, HTTP, &WEB[..]),
        ("client", To::Public, Family::V6, HTTP, &WEB),
        ("client", To::Public, Family::V4, NAMES, &WEB),
        ("client", To::Public, Family::V6, NAMES, &WEB),
        ("db1", To::Internal, Family::V4, HTTP, &WEB),
        ("db1", To::Internal, Family::V6, NAMES, &WEB),
        ("web1", To::Internal, Family::V4, HTTP, &WEB[1..]),
    ] {
        let (protocol, port) = match probe {
            Probe::Udp { port } => ("UDP", port),
            _ => ("TCP", 80),
        };
        let address = SocketAddr::new(fleet.address(to, family)?, port);
        let answers = traffic::answers(fleet.netns(from)?, address, probe, COUNTED)?;
        let least = if wanted.len() == 3 { EACH_OF_THREE } else { EACH_OF_TWO };
        let ok = answers.len() == wanted.len()
            && wanted.iter().all(|backend| answers.get(*backend).is_some_and(|n| *n >= least));
        let family = if family == Family::V4 { "IPv4" } else { "IPv6" };
        report.judge(
            &format!("{from} -> {}: {COUNTED} times {protocol}, {family}", to.name()),
            &format!("{}: at least {least} each", wanted.join(" ")),
            &counts(&answers),
            ok,
        );
    }
    Ok(())
}

/// The server of a backend dies under load: its connections are lost, the others' are not, and new ones go elsewhere.
pub(crate) fn failover(fleet: &mut Fleet, report: &mut Report) -> anyhow::Result<()> {
    let kept = Kept::start(fleet)?;
    let fresh = start(Load::Connect, fleet)?;
    fleet.kill_web(VICTIM)?;
    let killed = Instant::now();
    pause(WATCHED);
    let rounds = fresh.finish();
    report.add(
        "kept connections to other backends while web2's server dies",
        "0 wrong",
        &kept.finish(|backend| backend != VICTIM),
    );
    let failed: Vec<_> = rounds.iter().filter(|round| round.answer.is_err()).collect();
    let last = failed.iter().map(|round| round.at.saturating_duration_since(killed)).max();
    let last = last.unwrap_or_default();
    report.judge(
        "new connections that fail then",
        &format!("none begun later than {FAILURE_LIMIT:?}"),
        &format!(
            "{} of {}, the last begun after {:.2} s",
            failed.len(),
            rounds.len(),
            last.as_secs_f32()
        ),
        last <= FAILURE_LIMIT,
    );
    fleet.start_web(VICTIM)?;
    let seen = until_answers(fleet, VICTIM)?;
    report.add("it gets new connections after its restart", "yes", seen);
    Ok(())
}

/// A drained backend keeps what it has and gets nothing new.
pub(crate) fn drain(fleet: &Fleet, report: &mut Report) -> anyhow::Result<()> {
    let kept = Kept::start(fleet)?;
    let on_victim = kept.to(VICTIM);
    let fresh = start(Load::Connect, fleet)?;
    fleet.cli_ok(&["drain", VICTIM])?;
    settle(fleet)?;
    let drained = Instant::now();
    let shop = fleet.socket_address(To::Public, 80)?;
    let answers =
        traffic::answers(fleet.netns("client")?, shop, Probe::Http { port: 80 }, COUNTED)?;
    let others: Vec<_> = WEB.into_iter().filter(|backend| *backend != VICTIM).collect();
    report.judge(
        &format!("{COUNTED} new connections after `cnsmo drain {VICTIM}`"),
        &format!("{} alone", others.join(" ")),
        &counts(&answers),
        answers.keys().eq(others.iter()),
    );
    let mut shown = String::new();
    let wanted = format!("Draining, {on_victim} or more flows");
    let seen = interrupt::wait_until(REPORT_LIMIT, || {
        let (reason, flows) = backend_status(fleet)?;
        shown = format!("{reason}, {flows} flows");
        Ok(reason == "Draining" && flows >= on_victim as u64)
    })?;
    report.judge("what the core shows of it", &wanted, &shown, seen);
    let rounds = fresh.finish();
    let late = rounds.iter().filter(|round| round.at >= drained);
    let late = late.filter(|round| round.answer.as_deref() == Ok(VICTIM)).count();
    report.add("new connections during the drain", "0 wrong", &verdict(&rounds));
    report.add("of them to web2, once it is drained", "0", &late.to_string());
    report.add("kept connections during the drain", "0 wrong", &kept.finish(|_| true));
    fleet.cli_ok(&["drain", VICTIM, "--undo"])?;
    let seen = until_answers(fleet, VICTIM)?;
    report.add("it gets new connections after `--undo`", "yes", seen);
    Ok(())
}

/// Kept connections from outside, some to each backend.
struct Kept(Vec<(String, Running)>);

impl Kept {
    fn start(fleet: &Fleet) -> anyhow::Result<Self> {
        let mut kept = Self(Vec::new());
        while WEB.iter().any(|backend| kept.to(backend) < KEPT) {
            ensure!(kept.0.len() < KEPT_MAX, "no {KEPT} connections to each backend in {KEPT_MAX}");
            let running = start(Load::Stream, fleet)?;
            let backend = running.peer().context("a connection without an answer")?;
            if kept.to(&backend) < KEPT {
                kept.0.push((backend, running));
            }
        }
        Ok(kept)
    }

    /// How many there are to a backend.
    fn to(&self, backend: &str) -> usize {
        self.0.iter().filter(|(name, _)| name == backend).count()
    }

    /// Ends all, and says how those to some backends went.
    fn finish(self, wanted: impl Fn(&str) -> bool) -> String {
        let mut all = Vec::new();
        for (backend, running) in self.0 {
            let mut rounds = running.finish();
            for round in &mut rounds {
                if let Ok(answer) = &round.answer
                    && *answer != backend
                {
                    round.answer = Err(format!("{answer} answers for {backend}"));
                }
            }
            if wanted(&backend) {
                all.extend(rounds);
            }
        }
        verdict(&all)
    }
}

fn start(load: Load, fleet: &Fleet) -> anyhow::Result<Running> {
    Running::start(load, fleet.netns("client")?, fleet.socket_address(To::Public, 80)?)
}

/// Reason and flows of the drained backend, as the gateway sees it.
fn backend_status(fleet: &Fleet) -> anyhow::Result<(String, u64)> {
    let balancer = get(fleet, &["lb", "front"])?;
    let nodes = balancer["status"]["nodes"].as_array().context("no status.nodes")?;
    let gateway = nodes.iter().find(|node| node["node"] == GATEWAY).context("gw1 is not in it")?;
    let backends = gateway["backends"].as_array().context("gw1 has no backends")?;
    let backend = backends.iter().find(|backend| backend["node"] == VICTIM);
    let backend = backend.with_context(|| format!("{VICTIM} is not among them"))?;
    let reason = backend["reason"].as_str().unwrap_or_default();
    Ok((reason.to_owned(), number(&backend["flows"])))
}

fn counts(answers: &BTreeMap<String, u32>) -> String {
    answers.iter().map(|(name, n)| format!("{name} {n}")).collect::<Vec<_>>().join(", ")
}
