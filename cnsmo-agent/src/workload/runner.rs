//! The life of one instance.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use cnsmo_proto::{
    model::{Instance, Name, Port, Probe, Process, protocol},
    pb::{
        catalog::Endpoint,
        deployment as pb,
        service::{LogLine, ReadLogsResponse},
    },
};
use cnsmo_service::{
    durable,
    host::{About, Run, Service, front::LogStream},
    lifecycle::{Lifecycle, Phase},
    supervise::{Limits, Stop},
};
use prost::Message as _;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::Status;

use super::{
    cgroup::Group,
    child::{Child, Folder},
    launch::Launch,
    log::{self, Output},
    probe,
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
/// Before an instance that shall end is looked at. The balancers have let go of it, but what they sent it may be under way, and
/// VMs that the core could not ask may need so long.
const GRACE: Duration = Duration::from_secs(1);
/// Between two looks at its connections.
const LOOK: Duration = Duration::from_millis(200);
/// Of each of standard output and error; as much of the past is kept beside it.
const LOG_BYTES_MAX: u64 = 8 << 20;
/// Where control groups of version 2 are, on machines that have no others.
const CONTROL_GROUPS: &str = "/sys/fs/cgroup/cnsmo";
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
    folder: Folder,
    output: Arc<Output>,
    /// 0: it does not run.
    pid: AtomicU32,
    leaving: Arc<AtomicBool>,
}

impl Runner {
    pub(super) fn new(
        name: String,
        instance: Instance,
        process: Process,
        folder: Folder,
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
        let (output, pid) = (Arc::new(Output::new(folder.clone())), AtomicU32::new(0));
        let life = Life { name: name.clone(), instance, process, folder, output, pid, leaving };
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

    fn logs(&self, tail: usize, follow: bool) -> Option<LogStream> {
        let lines = ReceiverStream::new(log::read(self.life.output.clone(), tail, follow));
        Some(Box::pin(lines.map(|line| {
            let line = line.map_err(|error| Status::internal(error.to_string()))?;
            let log::Line { time, stream, text } = line;
            let line = LogLine { time: Some(time.into()), stream: stream.to_owned(), text };
            Ok(ReadLogsResponse { lines: vec![line] })
        })))
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
            self.child.kill();
        }
    }
}

/// The folder of an instance and its control group, which may not be there.
pub(super) fn folder(all: &Path, deployment: &Name, name: &Name) -> Folder {
    let own = format!("{deployment}.{name}");
    Folder::new(all.join(&own), Some(Group::new(Path::new(CONTROL_GROUPS).join(own))))
}

/// How it ended, or could not begin.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failed(String);

impl Life {
    async fn live(&self, life: Lifecycle, mut stop: Stop) -> Result<(), Failed> {
        let launch = Launch::new(&self.instance, &self.process).map_err(Failed)?;
        let failed = |error: io::Error| Failed(format!("cannot be started: {error}"));
        let found = Child::adopt(&self.folder).map_err(failed)?;
        // There is nothing to end.
        if found.is_none() && self.instance.draining.is_some() {
            stop.asked().await;
            return Ok(());
        }
        let is_found = found.is_some();
        let unlimited = self.folder.limit(&launch.limits).unwrap_or_default();
        let child = match found {
            Some(child) => child,
            None => self.start(&launch).map_err(failed)?,
        };
        if is_found {
            tracing::info!(instance = self.name, pid = child.pid(), "runs already: taken up");
        }
        self.pid.store(child.pid().cast_unsigned(), Ordering::Relaxed);
        let mut held = Held { child, of: self };
        tokio::select! {
            how = held.child.ended() => return Err(Failed(how.to_string())),
            () = stop.asked() => {}
            failed = self.watch(&launch, &life, unlimited) => return failed,
        }
        self.drain(&mut held.child).await;
        Ok(())
    }

    fn start(&self, launch: &Launch) -> io::Result<Child> {
        self.folder.make()?;
        let message = pb::Instance::from(&self.instance).encode_to_vec();
        durable::write(&self.folder.message(), &message, 0o600)?;
        Child::launch(&self.folder, launch)
    }

    /// Tells whether it is ready, until it has not become so in time.
    async fn watch(
        &self,
        launch: &Launch,
        life: &Lifecycle,
        message: String,
    ) -> Result<(), Failed> {
        let mut logs = interval(LOGS);
        let keep_logs = async {
            loop {
                logs.tick().await;
                if let Err(error) = self.output.rotate(LOG_BYTES_MAX) {
                    tracing::warn!(instance = self.name, %error, "its logs cannot be kept short");
                }
            }
        };
        let look = async {
            match &self.process.readiness {
                Some(probe) => self.probe(probe, launch, life, &message).await,
                None => {
                    step(life, Phase::Ready, "Running", message.clone())?;
                    std::future::pending().await
                }
            }
        };
        tokio::select! {
            ended = look => ended,
            () = keep_logs => Ok(()),
        }
    }

    async fn probe(
        &self,
        probe: &Probe,
        launch: &Launch,
        life: &Lifecycle,
        message: &str,
    ) -> Result<(), Failed> {
        let begin = Instant::now();
        let mut failures = 0_u8;
        let mut ticks = interval(probe.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let seen = probe::look(probe, &self.instance, launch, &self.folder).await;
            failures = if seen.is_ok() { 0 } else { failures.saturating_add(1) };
            match (life.phase(), seen) {
                (Phase::Starting, Ok(())) => {
                    step(life, Phase::Ready, "Healthy", message.to_owned())?;
                }
                (Phase::Starting, Err(why)) => {
                    let limit = self.process.start_timeout;
                    if begin.elapsed() > limit {
                        return Err(Failed(format!("not ready within {limit:?}: {why}")));
                    }
                }
                (Phase::Degraded, Ok(())) => {
                    step(life, Phase::Ready, "Recovered", message.to_owned())?;
                }
                (Phase::Ready, Err(why)) if failures >= probe.fall => {
                    step(life, Phase::Degraded, "ProbeFailed", why)?;
                }
                (_, Ok(()) | Err(_)) => {}
            }
        }
    }

    /// Lets connections end, then asks it to end, then ends it.
    async fn drain(&self, child: &mut Child) {
        let Process { stop_signal, stop_timeout, .. } = self.process;
        let finish = async {
            tokio::time::sleep(GRACE).await;
            while probe::connections(&self.instance) > 0 {
                tokio::time::sleep(LOOK).await;
            }
        };
        let finish = timeout(GRACE + self.instance.drain_timeout, finish);
        let ended = tokio::select! {
            _ = child.ended() => true,
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
        child.signal(i32::from(stop_signal));
        if timeout(stop_timeout, child.ended()).await.is_err() {
            tracing::warn!(instance = self.name, ?stop_timeout, "does not end: killed");
            child.kill();
            child.ended().await;
        }
    }
}

fn step(life: &Lifecycle, to: Phase, reason: &'static str, message: String) -> Result<(), Failed> {
    life.step(to, reason, message).map_err(|error| Failed(error.to_string()))
}
