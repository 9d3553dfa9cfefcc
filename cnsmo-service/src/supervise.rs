//! Keeping a task running.

use std::{collections::VecDeque, error::Error, fmt, future::Future, time::Duration};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    backoff::Backoff,
    lifecycle::{Lifecycle, Phase},
};

/// When a task that failed is started again.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Wait before the first restart; doubles with each further one.
    pub first_delay: Duration,
    /// Longest wait between restarts.
    pub longest_delay: Duration,
    /// Restarts within `window`. At one more the task is given up: restarting has not helped.
    pub restarts_max: usize,
    /// Failures longer ago than this are forgotten.
    pub window: Duration,
    /// How long a task that is asked to stop may take before it is dropped.
    pub stop_deadline: Duration,
}

impl Limits {
    /// For a task whose failures are rare and which ends at once: given up after ten restarts in a minute.
    pub const DEFAULT: Self = Self {
        first_delay: Duration::from_millis(100),
        longest_delay: Duration::from_secs(5),
        restarts_max: 10,
        window: Duration::from_secs(60),
        stop_deadline: Duration::from_secs(5),
    };
}

/// Why a task ended before it was asked to.
pub type Failure = Box<dyn Error + Send + Sync>;

/// Asks tasks to stop; dropping it asks too.
#[derive(Debug)]
pub struct Stopper(watch::Sender<Asked>);

/// Told when to stop. Clones are told alike.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<Asked>);

#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    is_asked: bool,
    /// In place of the one of the limits.
    deadline: Option<Duration>,
}

/// A pair that belongs together.
pub fn stop_pair() -> (Stopper, Stop) {
    let (sender, receiver) = watch::channel(Asked::default());
    (Stopper(sender), Stop(receiver))
}

impl Stopper {
    /// Asks. A second time does nothing more.
    pub fn stop(&self) {
        self.stop_within(None);
    }

    /// As [`Self::stop`]; a task that takes longer is dropped. None: as its supervisor's limits say. The first time counts.
    pub fn stop_within(&self, deadline: Option<Duration>) {
        self.0.send_if_modified(|asked| {
            let is_first = !asked.is_asked;
            if is_first {
                *asked = Asked { is_asked: true, deadline };
            }
            is_first
        });
    }
}

impl Stop {
    /// Ends when a stop is asked for.
    pub async fn asked(&mut self) {
        // An error is a dropped `Stopper`: nobody is left who wants the task.
        let _ = self.0.wait_for(|asked| asked.is_asked).await;
    }

    /// Whether a stop was asked for.
    pub fn is_asked(&self) -> bool {
        self.0.borrow().is_asked || self.0.has_changed().is_err()
    }

    fn deadline(&self) -> Option<Duration> {
        self.0.borrow().deadline
    }
}

/// Restarting has not helped.
#[derive(Debug, thiserror::Error)]
#[error("{task} failed {failures} times within {window:?}, last: {last}")]
pub struct GaveUp {
    task: String,
    failures: usize,
    window: Duration,
    last: String,
}

/// Runs `start` until a stop is asked for, again after each error, panic or unexpected end.
///
/// `life` shows it: starting before each run, failed with the reason `Crashed` and the error after it, draining and
/// stopped when asked. The task itself reports ready and degraded.
///
/// # Errors
/// More failures than `limits` allow; the phase stays failed.
pub async fn supervise<S, F>(
    task: &str,
    limits: Limits,
    life: Lifecycle,
    mut stop: Stop,
    mut start: S,
) -> Result<(), GaveUp>
where
    S: FnMut(Stop) -> F,
    F: Future<Output = Result<(), Failure>> + Send + 'static,
{
    let mut backoff = Backoff::new(limits.first_delay, limits.longest_delay);
    let mut failures = VecDeque::new();
    let mut reason = match life.phase() {
        Phase::Installing => "Installed",
        _ => "Start",
    };
    while !stop.is_asked() {
        step(task, &life, Phase::Starting, reason, String::new());
        let mut run = Running(tokio::spawn(start(stop.clone())));
        let Some(failure) = run_to_failure(task, &mut run, &limits, &life, &mut stop).await else {
            return Ok(());
        };
        step(task, &life, Phase::Failed, "Crashed", failure.clone());
        let now = Instant::now();
        while failures.front().is_some_and(|then| now.duration_since(*then) > limits.window) {
            failures.pop_front();
        }
        if failures.is_empty() {
            backoff.reset();
        }
        failures.push_back(now);
        if failures.len() > limits.restarts_max {
            let (task, failures, window) = (task.to_owned(), failures.len(), limits.window);
            return Err(GaveUp { task, failures, window, last: failure });
        }
        let delay = backoff.after_failure();
        tracing::warn!(task, %failure, ?delay, "task failed, restarting");
        tokio::select! {
            () = sleep(delay) => {}
            () = stop.asked() => {}
        }
        reason = "Restart";
    }
    step(task, &life, Phase::Stopped, "Stop", String::new());
    Ok(())
}

/// Why the run failed; `None`: it ended as asked.
async fn run_to_failure(
    task: &str,
    run: &mut Running,
    limits: &Limits,
    life: &Lifecycle,
    stop: &mut Stop,
) -> Option<String> {
    tokio::select! {
        ended = &mut run.0 => {
            // The task may see the request first; its end is then no failure.
            if !stop.is_asked() {
                return Some(failure_of(ended));
            }
            step(task, life, Phase::Draining, "Stop", String::new());
            step(task, life, Phase::Stopped, "Drained", String::new());
        }
        () = stop.asked() => {
            step(task, life, Phase::Draining, "Stop", String::new());
            let reason = match timeout(stop.deadline().unwrap_or(limits.stop_deadline), &mut run.0).await {
                Ok(Ok(Ok(()))) => "Drained",
                Ok(ended) => {
                    tracing::warn!(task, failure = failure_of(ended), "task failed while stopping");
                    "Drained"
                }
                Err(_) => {
                    tracing::warn!(task, "task did not stop in time, dropping it");
                    "DrainDeadline"
                }
            };
            step(task, life, Phase::Stopped, reason, String::new());
        }
    }
    None
}

type Ended = Result<Result<(), Failure>, tokio::task::JoinError>;

fn failure_of(ended: Ended) -> String {
    match ended {
        Ok(Ok(())) => "ended without being asked".to_owned(),
        Ok(Err(error)) => Chain(&*error).to_string(),
        Err(join) => match join.try_into_panic() {
            Ok(panic) => {
                let text = panic
                    .downcast_ref::<&str>()
                    .map(|text| (*text).to_owned())
                    .or_else(|| panic.downcast_ref::<String>().cloned());
                format!("panicked: {}", text.unwrap_or_else(|| "no message".to_owned()))
            }
            Err(_) => "cancelled".to_owned(),
        },
    }
}

fn step(task: &str, life: &Lifecycle, to: Phase, reason: &'static str, message: String) {
    if let Err(error) = life.step(to, reason, message) {
        tracing::error!(task, %error, "phase not changed");
    }
}

/// A task that does not outlive its supervisor.
struct Running(JoinHandle<Result<(), Failure>>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An error with its causes on one line, each said once: some errors repeat what caused them.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = text(self.0);
        f.write_str(&last)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = text(error);
            if !last.ends_with(&text) {
                write!(f, ": {text}")?;
                last = text;
            }
            cause = error.source();
        }
        Ok(())
    }
}

/// The message alone where there is one: gRPC adds the explanation of its code, and the cause in its debug form.
fn text(error: &(dyn Error + 'static)) -> String {
    match error.downcast_ref::<tonic::Status>().map(tonic::Status::message) {
        Some(message) if !message.is_empty() => message.to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        source: Option<Box<dyn Error + Send + Sync>>,
    }

    #[test]
    fn a_chain_says_each_cause_once_and_of_grpc_only_the_message() {
        let refused = Link { text: "tcp: refused", source: None };
        let repeated = Link { text: "tcp: refused", source: Some(refused.into()) };
        let outer = Link { text: "unreachable", source: Some(repeated.into()) };
        assert_eq!(Chain(&outer).to_string(), "unreachable: tcp: refused");

        let status = tonic::Status::permission_denied("Node n1: was deleted");
        let outer = Link { text: "not enrolled", source: Some(status.into()) };
        assert_eq!(Chain(&outer).to_string(), "not enrolled: Node n1: was deleted");
    }

    const LIMITS: Limits = Limits {
        first_delay: Duration::from_millis(10),
        longest_delay: Duration::from_millis(40),
        restarts_max: 3,
        window: Duration::from_secs(60),
        stop_deadline: Duration::from_secs(1),
    };

    fn life() -> Lifecycle {
        Lifecycle::new("Spawned")
    }

    #[tokio::test(start_paused = true)]
    async fn errors_panics_and_early_ends_are_restarted() {
        let (stopper, stop) = stop_pair();
        let runs = Arc::new(AtomicUsize::new(0));
        let (life, count) = (life(), runs.clone());
        let mut phases = life.watch();
        let supervised =
            tokio::spawn(supervise("t", LIMITS, life.clone(), stop, move |mut stop| {
                let run = count.fetch_add(1, Ordering::SeqCst);
                async move {
                    match run {
                        0 => return Err("first".into()),
                        1 => panic!("second"),
                        2 => return Ok(()),
                        _ => stop.asked().await,
                    }
                    Ok(())
                }
            }));
        let mut failures = Vec::new();
        while runs.load(Ordering::SeqCst) < 4 {
            phases.changed().await.unwrap();
            let state = phases.borrow_and_update().clone();
            if state.phase == Phase::Failed {
                failures.push(state.message);
            }
        }
        assert_eq!(failures, ["first", "panicked: second", "ended without being asked"]);
        stopper.stop();
        supervised.await.unwrap().unwrap();
        assert_eq!(life.phase(), Phase::Stopped);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_keeps_failing_is_given_up() {
        let (_stopper, stop) = stop_pair();
        let life = life();
        let start = |_| async { Err("no luck".into()) };
        let error = supervise("t", LIMITS, life.clone(), stop, start).await.unwrap_err();
        assert_eq!(error.to_string(), "t failed 4 times within 60s, last: no luck");
        assert_eq!(life.phase(), Phase::Failed);
    }

    #[tokio::test(start_paused = true)]
    async fn old_failures_are_forgotten() {
        let (stopper, stop) = stop_pair();
        let runs = Arc::new(AtomicUsize::new(0));
        let count = runs.clone();
        let supervised = tokio::spawn(supervise("t", LIMITS, life(), stop, move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            async {
                sleep(Duration::from_secs(61)).await;
                Err("now and then".into())
            }
        }));
        while runs.load(Ordering::SeqCst) < 10 {
            sleep(Duration::from_secs(10)).await;
        }
        stopper.stop();
        supervised.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_stop_is_dropped_at_the_deadline() {
        struct Dropped(Arc<AtomicUsize>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let (stopper, stop) = stop_pair();
        let drops = Arc::new(AtomicUsize::new(0));
        let guard = drops.clone();
        let life = life();
        let mut phases = life.watch();
        let supervised = tokio::spawn(supervise("t", LIMITS, life, stop, move |_| {
            let guard = Dropped(guard.clone());
            async move {
                std::future::pending::<()>().await;
                drop(guard);
                Ok(())
            }
        }));
        phases.wait_for(|state| state.phase == Phase::Starting).await.unwrap();
        stopper.stop();
        supervised.await.unwrap().unwrap();
        assert_eq!(phases.borrow().reason, "DrainDeadline");
        tokio::task::yield_now().await;
        assert_eq!(drops.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_between_two_runs_ends_the_wait() {
        let (stopper, stop) = stop_pair();
        let limits = Limits { first_delay: Duration::from_secs(1 << 30), ..LIMITS };
        let limits = Limits { longest_delay: limits.first_delay, ..limits };
        let life = life();
        let mut phases = life.watch();
        let start = |_| async { Err("once".into()) };
        let supervised = tokio::spawn(supervise("t", limits, life, stop, start));
        phases.wait_for(|state| state.phase == Phase::Failed).await.unwrap();
        drop(stopper);
        supervised.await.unwrap().unwrap();
        assert_eq!(phases.borrow().phase, Phase::Stopped);
    }
}
