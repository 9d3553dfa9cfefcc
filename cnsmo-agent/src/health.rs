//! Whether backends answer, as this VM sees them: TCP connections over the network, again and again.

use std::{collections::BTreeMap, error::Error, net::SocketAddr, sync::Arc, time::Duration};

use cnsmo_proto::model::{HealthCheck, Name};
use cnsmo_service::{
    lifecycle::{Lifecycle, Phase},
    supervise::Stop,
};
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::{
    net::TcpStream,
    sync::{Semaphore, mpsc},
    task::AbortHandle,
    time::{Instant, sleep_until, timeout},
};

use crate::enforcer::EnforcerHandle;

/// Connections under way at once. Each takes a file descriptor, of which a process has 1,024 unless it asks for more. What
/// is beyond waits; it is checked less often than asked for.
const CONNECTIONS_MAX: usize = 256;
/// Verdicts that wait for the task that collects them. A check that finds no room waits.
const VERDICTS_MAX: usize = 256;

/// A backend of a balancer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    /// Name of the balancer.
    pub balancer: Name,
    /// Name of the VM behind it.
    pub node: Name,
    /// Name of the instance there; `None`: the VM itself.
    pub instance: Option<Name>,
}

/// How a backend is checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// All of them must answer: a backend that serves one family only would break the clients of the other.
    pub addresses: Vec<SocketAddr>,
    /// When, and how often before it counts.
    pub how: HealthCheck,
}

/// What is to be checked.
pub type Checks = BTreeMap<Subject, Check>;

/// What the checks say; nothing of a backend on which they have not decided yet.
pub type View = BTreeMap<Subject, Verdict>;

/// What the checks say of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// It may get new flows.
    pub healthy: bool,
    /// For people: what went wrong last; empty if nothing did.
    pub message: String,
}

/// Checks what the enforcer wants checked and tells it what has changed, until `stop`. A check that stays the same goes on
/// when others change, and keeps its verdict.
///
/// # Errors
/// The enforcer is gone for good.
pub async fn run(
    enforcer: EnforcerHandle,
    life: Lifecycle,
    mut stop: Stop,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    life.step(Phase::Ready, "Healthy", "")?;
    let mut wanted = enforcer.checks();
    let (verdicts, mut incoming) = mpsc::channel(VERDICTS_MAX);
    let mut checker = Checker::new(verdicts);
    checker.adopt(&wanted.borrow_and_update().clone());
    let mut batch = Vec::new();
    loop {
        let changed = tokio::select! {
            () = stop.asked() => return Ok(()),
            changed = wanted.changed() => {
                changed?;
                checker.adopt(&wanted.borrow_and_update().clone());
                // An enforcer that has just started knows nothing yet.
                true
            }
            _ = incoming.recv_many(&mut batch, VERDICTS_MAX) => {
                batch.drain(..).fold(false, |any, found| checker.take(found) | any)
            }
        };
        if changed {
            // One that crashed over this asks again when it is back.
            let _ = enforcer.health(checker.view.clone()).await;
        }
    }
}

/// What a check has found, and which one it was.
type Found = (u64, Subject, Verdict);

struct Checker {
    running: BTreeMap<Subject, Running>,
    view: View,
    started: u64,
    connections: Arc<Semaphore>,
    verdicts: mpsc::Sender<Found>,
}

struct Running {
    id: u64,
    check: Check,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Checker {
    fn new(verdicts: mpsc::Sender<Found>) -> Self {
        Self {
            running: BTreeMap::new(),
            view: View::new(),
            started: 0,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            verdicts,
        }
    }

    fn adopt(&mut self, wanted: &Checks) {
        self.running.retain(|subject, running| wanted.get(subject) == Some(&running.check));
        let goes_on = &self.running;
        self.view.retain(|subject, _| goes_on.contains_key(subject));
        for (subject, check) in wanted {
            if self.running.contains_key(subject) {
                continue;
            }
            self.started += 1;
            let id = self.started;
            let (verdicts, subject_then) = (self.verdicts.clone(), subject.clone());
            let repeated = repeat(check.clone(), self.connections.clone(), move |verdict| {
                let (verdicts, found) = (verdicts.clone(), (id, subject_then.clone(), verdict));
                async move { verdicts.send(found).await.is_ok() }
            });
            let task = tokio::spawn(repeated).abort_handle();
            self.running.insert(subject.clone(), Running { id, check: check.clone(), task });
        }
    }

    /// Returns whether it says anything new.
    fn take(&mut self, (id, subject, verdict): Found) -> bool {
        if self.running.get(&subject).is_none_or(|running| running.id != id) {
            return false;
        }
        self.view.insert(subject, verdict.clone()) != Some(verdict)
    }
}

/// Checks for ever, or until `tell` finds nobody who listens; it is told each verdict that differs from the last. A result
/// that contradicts the verdict is doubted or confirmed after half the interval: new flows fail until then.
async fn repeat<F>(check: Check, connections: Arc<Semaphore>, tell: impl Fn(Verdict) -> F)
where
    F: Future<Output = bool>,
{
    let mut counter = Counter::new(check.how);
    let mut told = None;
    loop {
        let started = Instant::now();
        let Ok(permit) = connections.acquire().await else { return };
        let result = connect(&check).await;
        drop(permit);
        let verdict = counter.count(result);
        if verdict.is_some() && verdict != told {
            told = verdict;
            if let Some(verdict) = told.clone()
                && !tell(verdict).await
            {
                return;
            }
        }
        let pause = if counter.in_doubt() { check.how.interval / 2 } else { check.how.interval };
        sleep_until(started + spread(pause)).await;
    }
}

/// One connection to each address; the error is for people.
async fn connect(check: &Check) -> Result<(), String> {
    for address in &check.addresses {
        match timeout(check.how.timeout, TcpStream::connect(address)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(format!("{address}: {error}")),
            Err(_) => {
                let within = check.how.timeout.as_millis();
                return Err(format!("{address}: no answer within {within} ms"));
            }
        }
    }
    Ok(())
}

/// Successes and failures in a row.
#[derive(Debug)]
struct Counter {
    how: HealthCheck,
    /// `None`: not decided yet.
    healthy: Option<bool>,
    /// Results in a row that contradict `healthy`.
    against: u8,
}

impl Counter {
    fn new(how: HealthCheck) -> Self {
        Self { how, healthy: None, against: 0 }
    }

    /// The last result contradicts the verdict, or there is none.
    fn in_doubt(&self) -> bool {
        self.against > 0
    }

    /// The verdict after one more result. The first success decides at once: it contradicts nothing.
    fn count(&mut self, result: Result<(), String>) -> Option<Verdict> {
        let answered = result.is_ok();
        let needed = match (self.healthy, answered) {
            (None, true) => 1,
            (None | Some(true), false) => self.how.fall,
            (Some(false), true) => self.how.rise,
            (Some(true), true) | (Some(false), false) => u8::MAX,
        };
        if needed == u8::MAX {
            self.against = 0;
        } else {
            self.against += 1;
            if self.against >= needed {
                (self.healthy, self.against) = (Some(answered), 0);
            }
        }
        let message = result.err().unwrap_or_default();
        self.healthy.map(|healthy| Verdict { healthy, message })
    }
}

/// The interval or up to a tenth less, so that the VMs that check a backend do not all call at the same moment.
fn spread(interval: Duration) -> Duration {
    let mut byte = [0];
    // Without random numbers they do; that is no reason not to check.
    let _ = SystemRandom::new().fill(&mut byte);
    interval.mul_f64(1.0 - f64::from(byte[0]) / 2_560.0)
}

#[cfg(test)]
mod tests;
