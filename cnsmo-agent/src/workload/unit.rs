//! A unit of systemd as an instance: started, watched by signals, and found again by the next agent.
//!
//! systemd keeps the unit, so an agent that comes later finds it active and takes it up. What is kept beside the instance is
//! that the unit is its own, written before the unit is started, and the invocation that was seen last.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use cnsmo_service::{backoff::Backoff, durable};
use tokio::{
    runtime::Handle,
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_stream::StreamExt as _;
use zbus::{
    fdo::PropertiesChangedStream,
    zvariant::{ObjectPath, OwnedObjectPath},
};

use super::{
    runner::Report,
    systemd::{Activity, JobRemovedStream, Loaded, Manager, Systemd, Transient},
};

/// After the bus was lost, until it is there again.
const FIRST_DELAY: Duration = Duration::from_millis(500);
const LONGEST_DELAY: Duration = Duration::from_secs(60);
/// For one that is ending to be gone, before it is started: systemd's own limit is 90 s where a unit sets none.
const SETTLE: Duration = Duration::from_secs(120);

/// Units that are run by this agent, and for which instance.
pub(super) type Claims = Arc<Mutex<BTreeMap<String, String>>>;

/// What is to be run.
#[derive(Clone, Debug)]
pub(super) struct Order {
    /// Full name of the unit.
    pub(super) name: String,
    /// Of the instance, for people.
    pub(super) instance: String,
    /// How it is made; None: it is there.
    pub(super) transient: Option<Box<Transient>>,
    /// It must be one that announces itself.
    pub(super) is_announced: bool,
    /// It shall end: it is not started.
    pub(super) is_ending: bool,
    /// Says that the unit is the instance's, and the invocation that was seen last.
    pub(super) record: PathBuf,
}

/// A unit that is looked after. Dropping it leaves it running.
#[derive(Debug)]
pub(super) struct Unit {
    name: String,
    systemd: Systemd,
    seen: watch::Receiver<Report>,
    watcher: JoinHandle<()>,
    _claim: Claim,
}

impl Unit {
    /// Starts it, unless it is active, and looks after it. In a runtime.
    ///
    /// # Errors
    /// Another instance has it, for people.
    pub(super) fn run(
        systemd: Systemd,
        claims: &Claims,
        order: Order,
        pid: Arc<AtomicU32>,
    ) -> Result<Self, String> {
        let claim = Claim::of(claims, &order.name, &order.instance)?;
        let name = order.name.clone();
        let begun = Report::Bad(format!("unit {name}: not started yet"));
        let (told, seen) = watch::channel(begun);
        let watcher = Watcher { systemd: systemd.clone(), order, pid, told, seen_last: Vec::new() };
        let watcher = tokio::spawn(watcher.run());
        Ok(Self { name, systemd, seen, watcher, _claim: claim })
    }

    /// Active, not so, or ended.
    pub(super) fn reports(&self) -> watch::Receiver<Report> {
        self.seen.clone()
    }

    /// Waits for the end. Can be cancelled.
    pub(super) async fn ended(&mut self) -> String {
        match self.seen.wait_for(|seen| matches!(seen, Report::Ended(_))).await.as_deref() {
            Ok(Report::Ended(how)) => how.clone(),
            Ok(_) | Err(_) => format!("unit {}: nobody looks after it any more", self.name),
        }
    }

    /// Asks systemd to end it.
    pub(super) async fn stop(&self) {
        let stop = async { self.systemd.connect().await?.stop(&self.name).await.map_err(text) };
        if let Err(error) = stop.await {
            tracing::error!(unit = self.name, error, "cannot be stopped");
        }
    }

    /// Ends it at once, in the background.
    pub(super) fn kill(&self) {
        // One that has ended may be another's by now.
        if matches!(*self.seen.borrow(), Report::Ended(_)) {
            return;
        }
        let (systemd, name) = (self.systemd.clone(), self.name.clone());
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(async move {
            let kill = async {
                let manager = systemd.connect().await?;
                // Both: systemd shall not start again what is killed.
                manager.stop(&name).await.map_err(text)?;
                manager.kill(&name).await.map_err(text)
            };
            if let Err(error) = kill.await {
                tracing::warn!(unit = name, error, "cannot be killed");
            }
        });
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// One instance has a unit at a time.
#[derive(Debug)]
struct Claim {
    all: Claims,
    unit: String,
}

impl Claim {
    fn of(all: &Claims, unit: &str, instance: &str) -> Result<Self, String> {
        let mut claims = all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = claims.get(unit) {
            return Err(format!("unit {unit}: instance {other} has it on this VM"));
        }
        claims.insert(unit.to_owned(), instance.to_owned());
        Ok(Self { all: all.clone(), unit: unit.to_owned() })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.unit);
    }
}

struct Watcher {
    systemd: Systemd,
    order: Order,
    pid: Arc<AtomicU32>,
    told: watch::Sender<Report>,
    /// Invocation.
    seen_last: Vec<u8>,
}

/// One connection's view of a unit.
struct View {
    manager: Manager,
    loaded: Loaded,
    changes: PropertiesChangedStream,
    /// While a job of ours is under way.
    jobs: Option<(JobRemovedStream, OwnedObjectPath)>,
}

impl Watcher {
    async fn run(mut self) {
        let unit = self.order.name.clone();
        let told = self.told.clone();
        let end =
            |how: String| drop(told.send_replace(Report::Ended(format!("unit {unit}: {how}"))));
        let mut view = match self.begin().await {
            Ok(Some(view)) => view,
            Ok(None) => return end("is not active".into()),
            Err(why) => return end(why),
        };
        let mut backoff = Backoff::new(FIRST_DELAY, LONGEST_DELAY);
        loop {
            let lost = match self.follow(&mut view, &mut backoff).await {
                Ok(how) => return end(how),
                Err(error) => error.to_string(),
            };
            tracing::warn!(unit, error = lost, "the bus is lost: systemd is not heard");
            let why = format!("unit {unit}: systemd is not heard: {lost}");
            self.told.send_replace(Report::Bad(why));
            view = loop {
                sleep(backoff.after_failure()).await;
                match self.view().await {
                    Ok(view) => break view,
                    Err(error) => tracing::debug!(unit, error, "the bus is still lost"),
                }
            };
        }
    }

    /// Signals first, so that nothing is missed.
    async fn view(&self) -> Result<View, String> {
        let name = &self.order.name;
        let manager = self.systemd.connect().await?;
        let open = async {
            manager.subscribe().await?;
            let loaded = manager.load(name).await?;
            let changes = loaded.proxy.receive_properties_changed().await?;
            if let Err(error) = manager.hold(name).await {
                tracing::debug!(unit = name, %error, "not held");
            }
            Ok((loaded, changes))
        };
        let (loaded, changes) = open.await.map_err(text)?;
        Ok(View { manager, loaded, changes, jobs: None })
    }

    /// Takes up one that is active, starts one that is not. None: it is not active and shall end.
    async fn begin(&mut self) -> Result<Option<View>, String> {
        let Order { name, transient, is_announced, is_ending, record, .. } = self.order.clone();
        let mut view = self.view().await?;
        if transient.is_none() {
            let state = view.loaded.load_state().await.map_err(text)?;
            if state != "loaded" {
                return Err(format!("cannot be run by the systemd of this VM: it is {state}"));
            }
            let kind = view.loaded.kind().await.map_err(text)?;
            if is_announced && !kind.starts_with("notify") {
                return Err(format!("does not announce itself: its Type is {kind}, not notify"));
            }
        }
        let activity = self.settled(&mut view).await?;
        if matches!(&*activity.active, "active" | "activating" | "reloading") {
            let known = fs::read_to_string(&record).unwrap_or_default();
            let is_same = known.trim() == hex(&activity.invocation);
            tracing::info!(unit = name, pid = activity.pid, is_same, "is active already: taken up");
            self.keep(&activity.invocation)?;
            return Ok(Some(view));
        }
        if is_ending {
            return Ok(None);
        }
        self.keep(&[])?;
        let jobs = view.manager.jobs().await.map_err(text)?;
        let job = match transient {
            Some(transient) => view.manager.start_transient(&name, &transient).await,
            None => view.manager.start(&name).await,
        };
        let job = job.map_err(|error| format!("cannot be started: {error}"))?;
        view.jobs = Some((jobs, job));
        Ok(Some(view))
    }

    /// One that is ending is waited for.
    async fn settled(&self, view: &mut View) -> Result<Activity, String> {
        let settle = async {
            loop {
                let activity = view.loaded.activity().await.map_err(text)?;
                if activity.active != "deactivating" {
                    return Ok(activity);
                }
                let changed = view.changes.next().await;
                changed.ok_or_else(|| "the bus was lost".to_owned())?;
            }
        };
        let late = |_| Err(format!("was ending already, and has not ended within {SETTLE:?}"));
        timeout(SETTLE, settle).await.unwrap_or_else(late)
    }

    /// How it ended. An error: the bus is lost.
    async fn follow(&mut self, view: &mut View, backoff: &mut Backoff) -> zbus::Result<String> {
        let mut failed_job = None;
        loop {
            let activity = view.loaded.activity().await?;
            backoff.reset();
            self.pid.store(activity.pid, Ordering::Relaxed);
            if activity.invocation != self.seen_last
                && !activity.invocation.is_empty()
                && let Err(error) = self.keep(&activity.invocation)
            {
                tracing::warn!(unit = self.order.name, error, "its invocation is not kept");
            }
            let Activity { active, sub, .. } = &activity;
            let is_over = matches!(&**active, "inactive" | "failed");
            if is_over && view.jobs.is_none() {
                let how = view.loaded.end(&activity).await?;
                return Ok(match failed_job {
                    Some(result) => format!("{how}; its start: {result}"),
                    None => how,
                });
            }
            self.told.send_replace(match &**active {
                "active" | "reloading" => Report::Good(String::new()),
                _ => Report::Bad(format!("unit {}: {active} ({sub})", self.order.name)),
            });
            let result = changed(view).await?;
            failed_job = failed_job.or(result.filter(|result| result != "done"));
        }
    }

    /// That the unit is the instance's, with its invocation, if it has one.
    fn keep(&mut self, invocation: &[u8]) -> Result<(), String> {
        let record = &self.order.record;
        durable::write(record, format!("{}\n", hex(invocation)).as_bytes(), 0o600)
            .map_err(|error| format!("cannot write {}: {error}", record.display()))?;
        self.seen_last = invocation.to_vec();
        Ok(())
    }
}

/// Waits for a signal of the unit or the end of its job, whose result it returns.
async fn changed(view: &mut View) -> zbus::Result<Option<String>> {
    let lost = || zbus::Error::InputOutput(Arc::new(std::io::ErrorKind::ConnectionReset.into()));
    let Some((jobs, job)) = &mut view.jobs else {
        return view.changes.next().await.map(|_| None).ok_or_else(lost);
    };
    let own: &ObjectPath<'_> = job;
    let result = loop {
        tokio::select! {
            change = view.changes.next() => return change.map(|_| None).ok_or_else(lost),
            removed = jobs.next() => {
                let removed = removed.ok_or_else(lost)?;
                let arguments = removed.args()?;
                if *own == *arguments.job {
                    break arguments.result.to_owned();
                }
            }
        }
    };
    // Nobody listens to the jobs of others any more.
    view.jobs = None;
    Ok(Some(result))
}

#[expect(clippy::needless_pass_by_value, reason = "as `map_err` hands it over")]
fn text(error: zbus::Error) -> String {
    error.to_string()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
