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
    model::{Check, Driver, Instance, Name, Port, Probe, protocol},
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
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::Status;

use super::{
    cgroup::Group,
    child::{Child, Folder, directory},
    journal,
    launch::Launch,
    log::{self, Output},
    notify::{self, Mailbox},
    probe,
    systemd::{Systemd, Transient},
    unit::{Claims, Order, Unit},
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
    folder: Folder,
    output: Arc<Output>,
    /// 0: it does not run.
    pid: Arc<AtomicU32>,
    leaving: Arc<AtomicBool>,
    units: Units,
}

/// Where units run, and which of them do.
#[derive(Clone, Debug)]
pub(super) struct Units {
    pub(super) systemd: Systemd,
    pub(super) claims: Claims,
}

/// What an instance or its unit tells by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// It does its work; with what it says of that.
    Good(String),
    /// It does not, and why.
    Bad(String),
    /// How it ended.
    Ended(String),
}

impl Runner {
    pub(super) fn new(
        name: String,
        instance: Instance,
        folder: Folder,
        leaving: Arc<AtomicBool>,
        units: Units,
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
            driver: match &instance.template.driver {
                Driver::Process(_) => "process",
                Driver::Unit(_) | Driver::Transient(_) => "systemd",
            },
            endpoints: instance.template.ports.iter().map(endpoint).collect(),
            attributes: instance.template.attributes.as_map().clone(),
        };
        let (output, pid) = (Arc::new(Output::new(folder.clone())), Arc::default());
        let life = Life { name: name.clone(), instance, folder, output, pid, leaving, units };
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
        let instance = &self.life.instance;
        let own = instance.drain_timeout + instance.template.driver.stop_timeout();
        Some(Limits { stop_deadline: GRACE + own + MARGIN, ..RESTARTS })
    }

    fn outlives(&self) -> bool {
        true
    }

    fn logs(&self, tail: usize, follow: bool) -> Option<LogStream> {
        let lines = match self.life.unit_name() {
            None => log::read(self.life.output.clone(), tail, follow),
            Some(unit) => journal::read(&self.life.units.systemd, &unit, tail, follow),
        };
        let of_unit = self.life.unit_name().is_some();
        Some(Box::pin(ReceiverStream::new(lines).map(move |line| {
            let line = line.map_err(|error| match of_unit {
                // A journal is nothing that every VM has.
                true => Status::failed_precondition(error.to_string()),
                false => Status::internal(error.to_string()),
            })?;
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

/// What runs.
enum Body {
    Child(Child),
    Unit(Unit),
}

impl Body {
    /// Waits for the end. Can be cancelled.
    async fn ended(&mut self) -> String {
        match self {
            Self::Child(child) => child.ended().await.to_string(),
            Self::Unit(unit) => unit.ended().await,
        }
    }

    /// `signal`: for a child; what a unit gets is its own.
    async fn ask_to_end(&self, signal: u8) {
        match self {
            Self::Child(child) => child.signal(i32::from(signal)),
            Self::Unit(unit) => unit.stop().await,
        }
    }

    fn kill(&self) {
        match self {
            Self::Child(child) => child.kill(),
            Self::Unit(unit) => unit.kill(),
        }
    }
}

/// A body that is killed with the task that looks after it, unless the agent leaves.
struct Held<'a> {
    body: Body,
    of: &'a Life,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.of.pid.store(0, Ordering::Relaxed);
        if !self.of.leaving.load(Ordering::Relaxed) {
            self.body.kill();
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

/// What runs, and what of it only this life of it knows.
struct Begun {
    body: Body,
    /// Of a process that was just started and announces itself.
    mailbox: Option<Mailbox>,
    /// What is not as it should be.
    message: String,
}

impl Life {
    async fn live(&self, life: Lifecycle, mut stop: Stop) -> Result<(), Failed> {
        let launch = Launch::new(&self.instance).map_err(Failed)?;
        let begun = match self.unit_name() {
            None => self.child(&launch)?,
            Some(name) => self.unit(name, &launch)?,
        };
        // There is nothing to end.
        let Some(Begun { body, mailbox, message }) = begun else {
            stop.asked().await;
            return Ok(());
        };
        let mut held = Held { body, of: self };
        let watch = self.watch(&held.body, mailbox, &launch, &life, message);
        tokio::select! {
            how = held.body.ended() => {
                if self.instance.draining.is_none() {
                    return Err(Failed(how));
                }
                stop.asked().await;
                return Ok(());
            }
            () = stop.asked() => {}
            failed = watch => return failed,
        }
        self.drain(&mut held.body).await;
        Ok(())
    }

    /// The child that runs, or a new one. None: there is none, and it shall end.
    fn child(&self, launch: &Launch) -> Result<Option<Begun>, Failed> {
        let failed = |error: io::Error| Failed(format!("cannot be started: {error}"));
        let found = Child::adopt(&self.folder).map_err(failed)?;
        if found.is_none() && self.instance.draining.is_some() {
            return Ok(None);
        }
        let message = self.folder.limit(&launch.limits).unwrap_or_default();
        let (child, mailbox) = match found {
            None => self.start(launch).map_err(failed)?,
            Some(child) => {
                tracing::info!(instance = self.name, pid = child.pid(), "runs already: taken up");
                (child, None)
            }
        };
        self.pid.store(child.pid().cast_unsigned(), Ordering::Relaxed);
        Ok(Some(Begun { body: Body::Child(child), mailbox, message }))
    }

    fn start(&self, launch: &Launch) -> io::Result<(Child, Option<Mailbox>)> {
        self.keep()?;
        let mut launch = launch.clone();
        // Before it runs: it may announce itself at once.
        let mailbox = self.is_announced().then(|| Mailbox::new(&self.folder.mailbox()));
        let mailbox = mailbox.transpose()?;
        if let Some(mailbox) = &mailbox {
            launch.environment.insert(notify::VARIABLE.to_owned(), mailbox.address());
        }
        Ok((Child::launch(&self.folder, &launch)?, mailbox))
    }

    /// The unit, which is started if it is not active. None: it was never the instance's, and shall end.
    fn unit(&self, name: String, launch: &Launch) -> Result<Option<Begun>, Failed> {
        let record = self.folder.unit();
        let is_ending = self.instance.draining.is_some();
        if is_ending && !record.exists() {
            return Ok(None);
        }
        let failed = |error: io::Error| Failed(format!("unit {name}: cannot be started: {error}"));
        self.keep().map_err(failed)?;
        let transient = self.transient(launch).map_err(failed)?.map(Box::new);
        let (instance, is_announced) = (self.name.clone(), self.is_announced());
        let order = Order { name, instance, transient, is_announced, is_ending, record };
        let Units { systemd, claims } = &self.units;
        let unit = Unit::run(systemd.clone(), claims, order, self.pid.clone()).map_err(Failed)?;
        Ok(Some(Begun { body: Body::Unit(unit), mailbox: None, message: String::new() }))
    }

    fn transient(&self, launch: &Launch) -> io::Result<Option<Transient>> {
        let Driver::Transient(process) = &self.instance.template.driver else { return Ok(None) };
        let directory = directory(&self.folder, launch)?;
        let directory = directory.to_str().ok_or(io::ErrorKind::InvalidFilename)?.to_owned();
        Ok(Some(Transient {
            description: format!("CNSMO: instance {}", self.name),
            launch: launch.clone(),
            directory,
            is_announced: self.is_announced(),
            start_timeout: process.start_timeout,
            stop_signal: process.stop_signal,
            stop_timeout: process.stop_timeout,
        }))
    }

    /// Before it is started: for an agent that comes when the core does not want it any more.
    fn keep(&self) -> io::Result<()> {
        self.folder.make()?;
        let message = pb::Instance::from(&self.instance).encode_to_vec();
        durable::write(&self.folder.message(), &message, 0o600)
    }

    /// None: it is a process of the agent's.
    fn unit_name(&self) -> Option<String> {
        let Instance { name, deployment, template, .. } = &self.instance;
        match &template.driver {
            Driver::Process(_) => None,
            Driver::Unit(unit) => Some(unit.of(name)),
            Driver::Transient(_) => Some(format!("cnsmo-{deployment}.{name}.service")),
        }
    }

    fn is_announced(&self) -> bool {
        let readiness = self.instance.template.driver.readiness();
        readiness.is_some_and(|probe| probe.check == Check::Announced)
    }

    /// Tells whether it is ready, until it has not become so in time.
    fn watch<'a>(
        &'a self,
        body: &Body,
        mailbox: Option<Mailbox>,
        launch: &'a Launch,
        life: &'a Lifecycle,
        message: String,
    ) -> impl Future<Output = Result<(), Failed>> + 'a {
        let failed = |error: io::Error| Failed(format!("its announcements are not heard: {error}"));
        let (told, heard) = watch::channel(Report::Bad(String::new()));
        let (is_child, reports, root) = match body {
            Body::Child(child) => (true, heard, child.pid()),
            Body::Unit(unit) => (false, unit.reports(), 0),
        };
        let hear = async move {
            let mailbox = match mailbox {
                Some(mailbox) => mailbox,
                None if is_child && self.is_announced() => {
                    Mailbox::again(&self.folder.mailbox()).await?
                }
                None => return std::future::pending().await,
            };
            mailbox.hear(|pid| self.folder.holds(pid, root), told).await
        };
        let look = async move {
            match self.instance.template.driver.readiness() {
                Some(probe) if probe.check != Check::Announced => {
                    self.probe(probe, launch, life, &message).await
                }
                None if is_child => {
                    step(life, Phase::Ready, "Running", message)?;
                    std::future::pending().await
                }
                Some(_) if is_child => self.heed(reports, life, "Announced", &message).await,
                Some(_) | None => self.heed(reports, life, "Active", &message).await,
            }
        };
        async move {
            tokio::select! {
                ended = look => ended,
                heard = hear => heard.map_err(failed),
                () = self.keep_logs(), if is_child => Ok(()),
            }
        }
    }

    async fn keep_logs(&self) {
        let mut logs = interval(LOGS);
        loop {
            logs.tick().await;
            if let Err(error) = self.output.rotate(LOG_BYTES_MAX) {
                tracing::warn!(instance = self.name, %error, "its logs cannot be kept short");
            }
        }
    }

    /// Passes on what it tells by itself. `reason`: of its being ready.
    async fn heed(
        &self,
        mut reports: watch::Receiver<Report>,
        life: &Lifecycle,
        reason: &'static str,
        message: &str,
    ) -> Result<(), Failed> {
        let limit = self.instance.template.driver.start_timeout();
        let late = Instant::now() + limit;
        loop {
            let report = reports.borrow_and_update().clone();
            match (life.phase(), &report) {
                (Phase::Starting, Report::Good(text)) => {
                    step(life, Phase::Ready, reason, joined(text, message))?;
                }
                (Phase::Degraded, Report::Good(text)) => {
                    step(life, Phase::Ready, "Recovered", joined(text, message))?;
                }
                (Phase::Ready, Report::Bad(why)) => {
                    step(life, Phase::Degraded, "NotReady", why.clone())?;
                }
                (Phase::Starting, Report::Bad(why)) if Instant::now() >= late => {
                    return Err(Failed(format!("not ready within {limit:?}: {why}")));
                }
                _ => {}
            }
            tokio::select! {
                changed = reports.changed() => if changed.is_err() {
                    // Its end is told to whoever waits for that.
                    return std::future::pending().await;
                },
                () = sleep_until(late), if life.phase() == Phase::Starting => {}
            }
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
                    let limit = self.instance.template.driver.start_timeout();
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
    async fn drain(&self, body: &mut Body) {
        let driver = &self.instance.template.driver;
        let stop_timeout = driver.stop_timeout();
        let finish = async {
            tokio::time::sleep(GRACE).await;
            while probe::connections(&self.instance) > 0 {
                tokio::time::sleep(LOOK).await;
            }
        };
        let finish = timeout(GRACE + self.instance.drain_timeout, finish);
        let ended = tokio::select! {
            _ = body.ended() => true,
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
        let end = async {
            body.ask_to_end(driver.process().map_or(0, |process| process.stop_signal)).await;
            body.ended().await
        };
        if timeout(stop_timeout, end).await.is_err() {
            tracing::warn!(instance = self.name, ?stop_timeout, "does not end: killed");
            body.kill();
            body.ended().await;
        }
    }
}

/// What it says of itself, and what is not as it should be.
fn joined(text: &str, message: &str) -> String {
    let all: Vec<_> = [text, message].into_iter().filter(|text| !text.is_empty()).collect();
    all.join("; ")
}

fn step(life: &Lifecycle, to: Phase, reason: &'static str, message: String) -> Result<(), Failed> {
    life.step(to, reason, message).map_err(|error| Failed(error.to_string()))
}
