//! The life of one instance.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use cnsmo_proto::{
    model::{Instance, Port, Probe, Process, protocol},
    pb::catalog::Endpoint,
};
use cnsmo_service::{
    host::{About, Run, Service},
    lifecycle::{Lifecycle, Phase},
    supervise::{Limits, Stop},
};
use nix::sys::signal::Signal;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::{
    child::{Child, Launch, rotate_logs},
    probe,
    record::Record,
};
use crate::node;

/// One that fails is started again for ever: who has deployed it may mend what it needs.
const RESTARTS: Limits = Limits {
    first_delay: Duration::from_millis(500),
    longest_delay: Duration::from_secs(60),
    restarts_max: usize::MAX,
    window: Duration::from_secs(600),
    stop_deadline: Duration::ZERO,
};
/// Before an instance that shall end is looked at: so long it takes until balancers give it nothing new.
const GRACE: Duration = Duration::from_secs(1);
/// Between two looks at its connections.
const LOOK: Duration = Duration::from_millis(200);
/// Between two looks at its logs.
const LOGS: Duration = Duration::from_secs(5);
/// Beyond its own times: for the kernel to end what was killed.
const MARGIN: Duration = Duration::from_secs(5);

/// An instance as a service of the agent's host.
pub(super) struct Runner {
    name: String,
    about: About,
    life: Arc<Life>,
}

struct Life {
    name: String,
    instance: Instance,
    process: Process,
    folder: PathBuf,
    /// 0: it does not run.
    pid: AtomicU32,
    leaving: Arc<AtomicBool>,
}

impl Runner {
    pub(super) fn new(
        name: String,
        instance: Instance,
        process: Process,
        folder: PathBuf,
        leaving: Arc<AtomicBool>,
    ) -> Self {
        let address = node::addresses(None).first().map(ToString::to_string).unwrap_or_default();
        let endpoint = |port: &Port| Endpoint {
            protocol: if port.protocol == protocol::UDP { "udp" } else { "tcp" }.to_owned(),
            address: address.clone(),
            port: port.port.into(),
        };
        let about = About {
            service: instance.deployment.to_string(),
            instance: instance.name.to_string(),
            driver: "process",
            endpoints: instance.template.ports.iter().map(endpoint).collect(),
            attributes: instance.template.attributes.as_map().clone(),
        };
        let pid = AtomicU32::new(0);
        let life = Life { name: name.clone(), instance, process, folder, pid, leaving };
        Self { name, about, life: Arc::new(life) }
    }
}

impl Service for Runner {
    fn name(&self) -> &str {
        &self.name
    }

    fn about(&self) -> About {
        self.about.clone()
    }

    fn pid(&self) -> u32 {
        self.life.pid.load(Ordering::Relaxed)
    }

    fn limits(&self) -> Option<Limits> {
        let Life { instance, process, .. } = &*self.life;
        let own = instance.drain_timeout + process.stop_timeout;
        Some(Limits { stop_deadline: GRACE + own + MARGIN, ..RESTARTS })
    }

    fn outlives(&self) -> bool {
        true
    }

    fn run(&self, life: Lifecycle, stop: Stop) -> Run {
        let this = self.life.clone();
        Box::pin(async move { Ok(this.live(life, stop).await?) })
    }
}

/// A child that is killed with the task that looks after it, unless the agent leaves.
struct Held<'a> {
    child: Child,
    of: &'a Life,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.of.pid.store(0, Ordering::Relaxed);
        if !self.of.leaving.load(Ordering::Relaxed) {
            self.child.signal(Signal::SIGKILL);
        }
    }
}

/// How it ended, or could not begin.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failed(String);

impl Life {
    async fn live(&self, life: Lifecycle, mut stop: Stop) -> Result<(), Failed> {
        let launch = Launch::new(&self.instance, &self.process).map_err(Failed)?;
        let found = Record::load(&self.folder).and_then(|record| record.alive(&self.name));
        let child = match found {
            Some(pid) => Child::of(pid),
            // There is nothing to end.
            None if self.instance.draining.is_some() => {
                stop.asked().await;
                return Ok(());
            }
            None => self.start(&launch),
        };
        let child = child.map_err(|error| Failed(format!("cannot be started: {error}")))?;
        if found.is_some() {
            tracing::info!(instance = self.name, pid = child.pid(), "runs already: taken up");
        }
        self.pid.store(child.pid(), Ordering::Relaxed);
        let held = Held { child, of: self };
        tokio::select! {
            how = held.child.exited() => return Err(Failed(how)),
            () = stop.asked() => {}
            failed = self.watch(&launch, &life) => return failed,
        }
        self.drain(&held.child).await;
        Ok(())
    }

    fn start(&self, launch: &Launch) -> io::Result<Child> {
        make_folder(&self.folder)?;
        let record = Record::before(&self.folder, &self.instance)?;
        let pid = launch.start(&self.folder)?;
        record.made(&self.folder, pid)?;
        Child::of(pid)
    }

    /// Tells whether it is ready, until it has not become so in time.
    async fn watch(&self, launch: &Launch, life: &Lifecycle) -> Result<(), Failed> {
        let mut logs = interval(LOGS);
        let keep_logs = async {
            loop {
                logs.tick().await;
                if let Err(error) = rotate_logs(&self.folder) {
                    tracing::warn!(instance = self.name, %error, "its logs cannot be kept short");
                }
            }
        };
        let look = async {
            match &self.process.readiness {
                Some(probe) => self.probe(probe, launch, life).await,
                None => {
                    step(life, Phase::Ready, "Running", String::new())?;
                    std::future::pending().await
                }
            }
        };
        tokio::select! {
            ended = look => ended,
            () = keep_logs => Ok(()),
        }
    }

    async fn probe(&self, probe: &Probe, launch: &Launch, life: &Lifecycle) -> Result<(), Failed> {
        let begin = Instant::now();
        let mut failures = 0;
        let mut ticks = interval(probe.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let seen = probe::look(probe, &self.instance, launch, &self.folder).await;
            match (life.phase(), seen) {
                (Phase::Starting, Ok(())) => step(life, Phase::Ready, "Healthy", String::new())?,
                (Phase::Starting, Err(why)) => {
                    if begin.elapsed() > self.process.start_timeout {
                        let limit = self.process.start_timeout;
                        return Err(Failed(format!("not ready within {limit:?}: {why}")));
                    }
                }
                (Phase::Degraded, Ok(())) => step(life, Phase::Ready, "Recovered", String::new())?,
                (_, Ok(())) => failures = 0,
                (phase, Err(why)) => {
                    failures += 1;
                    if phase == Phase::Ready && failures >= probe.fall {
                        step(life, Phase::Degraded, "ProbeFailed", why)?;
                    }
                }
            }
            if life.phase() == Phase::Ready && failures >= probe.fall {
                failures = 0;
            }
        }
    }

    /// Lets connections end, then asks it to end, then ends it.
    async fn drain(&self, child: &Child) {
        let Process { stop_signal, stop_timeout, .. } = self.process;
        let finish = async {
            tokio::time::sleep(GRACE).await;
            while probe::connections(&self.instance) > 0 {
                tokio::time::sleep(LOOK).await;
            }
        };
        let finish = timeout(GRACE + self.instance.drain_timeout, finish);
        let ended = tokio::select! {
            _ = child.exited() => true,
            finished = finish => {
                if finished.is_err() {
                    tracing::warn!(instance = self.name, "still has connections: ended all the same");
                }
                false
            }
        };
        if ended {
            return;
        }
        child.signal(Signal::try_from(i32::from(stop_signal)).unwrap_or(Signal::SIGTERM));
        if timeout(stop_timeout, child.exited()).await.is_err() {
            tracing::warn!(instance = self.name, ?stop_timeout, "does not end: killed");
            child.signal(Signal::SIGKILL);
            child.exited().await;
        }
    }
}

fn step(life: &Lifecycle, to: Phase, reason: &'static str, message: String) -> Result<(), Failed> {
    life.step(to, reason, message).map_err(|error| Failed(error.to_string()))
}

fn make_folder(folder: &Path) -> io::Result<()> {
    // Others may pass, to the instance's own folder.
    DirBuilder::new().recursive(true).mode(0o711).create(folder)
}
