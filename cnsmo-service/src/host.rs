//! A host of services: runs each of them under a supervisor of its own, and starts, stops, restarts and kills them by name.

pub mod follow;
pub mod front;

use std::{
    collections::{BTreeMap, btree_map::Entry},
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use cnsmo_proto::pb::catalog::Endpoint;
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
};
use tonic::transport::Channel;

use crate::{
    announce::{Announcement, Refused, announce},
    lifecycle::{IllegalStep, Lifecycle, Phase, State},
    supervise::{Failure, GaveUp, Limits, Stop, stop_pair, supervise},
};

/// Orders to one service that wait: each is carried out at once, or refused.
const ORDERS_MAX: usize = 16;

/// What a service does while it runs.
pub type Run = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

/// What can be run by a [`Host`].
pub trait Service: Send + Sync + 'static {
    /// Unique on its host; a DNS label.
    fn name(&self) -> &str;

    /// What it can do, as words.
    fn features(&self) -> Vec<String> {
        Vec::new()
    }

    /// As it is in the catalogue.
    fn about(&self) -> About {
        About { service: self.name().to_owned(), driver: "builtin", ..About::default() }
    }

    /// The process that it runs in, if it runs.
    fn pid(&self) -> u32 {
        std::process::id()
    }

    /// When it is started again, and how long it may take to stop. None: as its host says.
    fn limits(&self) -> Option<Limits> {
        None
    }

    /// What it writes to standard output and error: the last `tail` lines of the past (0: all that are kept), and with
    /// `follow` what comes. None: it has no output of its own.
    fn logs(&self, _tail: usize, _follow: bool) -> Option<front::LogStream> {
        None
    }

    /// It goes on without this program: when the host ends it is left alone.
    fn outlives(&self) -> bool {
        false
    }

    /// One life of it: until `stop` is asked for, or until it fails. Reports through `life` when it is ready or
    /// degraded; the host does the rest. Dropped where a crash is wanted, so what must not be lost is not in it.
    fn run(&self, life: Lifecycle, stop: Stop) -> Run;
}

/// What a service is, whatever phase it is in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// Its name in the catalogue.
    pub service: String,
    /// Which of several instances of the service it is; empty: there is one on each host.
    pub instance: String,
    /// builtin, process or systemd.
    pub driver: &'static str,
    /// Where it is reached.
    pub endpoints: Vec<Endpoint>,
    /// Of the instance.
    pub attributes: BTreeMap<String, String>,
}

/// What can be known of a service from outside.
#[derive(Clone, Debug)]
pub struct Status {
    /// What it is.
    pub about: About,
    /// The process that it runs in; 0: none.
    pub pid: u32,
    /// Phase, since when, and why.
    pub state: State,
    /// By its supervisor, since the host has it.
    pub restarts: u64,
}

/// Why an order is not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// There is no such service here.
    #[error("there is no service {0} on this host")]
    Unknown(String),
    /// There are several instances, and none is named.
    #[error("there are {count} instances of service {service} on this host: name one")]
    Several {
        /// Its name.
        service: String,
        /// So many.
        count: usize,
    },
    /// A service of this name is there already.
    #[error("service {0} runs on this host already")]
    Taken(String),
    /// The life-cycle has no such step from where the service is; nothing has changed.
    #[error("service {service}")]
    Illegal {
        /// Its name.
        service: String,
        /// What was refused.
        #[source]
        step: IllegalStep,
    },
    /// Too many orders wait, or the host ends.
    #[error("service {0} takes no orders now: try again")]
    Busy(String),
}

/// Why a service is not announced.
#[derive(Debug, thiserror::Error)]
pub enum AnnounceError {
    /// It is not there.
    #[error(transparent)]
    Unknown(#[from] OrderError),
    /// By the core.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// Services of one program. Clones steer the same ones.
#[derive(Clone, Debug)]
pub struct Host {
    limits: Limits,
    services: Arc<Mutex<BTreeMap<String, Hosted>>>,
    /// Counts services that came and went.
    roster: Arc<watch::Sender<u64>>,
}

struct Hosted {
    service: Arc<dyn Service>,
    life: Lifecycle,
    orders: mpsc::Sender<Order>,
    starts: Arc<AtomicU64>,
    keeper: JoinHandle<()>,
}

impl std::fmt::Debug for Hosted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Hosted").field(&self.life.phase()).finish()
    }
}

type Answer = oneshot::Sender<Result<(), IllegalStep>>;

struct Order {
    what: What,
    answer: Answer,
}

#[derive(Clone, Copy)]
enum What {
    Start,
    Stop { deadline: Option<Duration>, again: bool },
    Kill,
}

impl Host {
    /// Without services. `limits`: of the supervisor of each.
    pub fn new(limits: Limits) -> Self {
        Self { limits, services: Arc::default(), roster: Arc::new(watch::Sender::new(0)) }
    }

    /// Starts a service.
    ///
    /// # Errors
    /// [`OrderError::Taken`].
    pub fn add(&self, service: Arc<dyn Service>) -> Result<Lifecycle, OrderError> {
        let name = service.name().to_owned();
        let mut services = self.services();
        let Entry::Vacant(place) = services.entry(name.clone()) else {
            return Err(OrderError::Taken(name));
        };
        let life = Lifecycle::new("Spawned");
        let (orders, inbox) = mpsc::channel(ORDERS_MAX);
        let starts = Arc::default();
        let keeper = Keeper {
            service: service.clone(),
            limits: service.limits().unwrap_or(self.limits),
            life: life.clone(),
            starts: Arc::clone(&starts),
            kill: Arc::default(),
            orders: inbox,
        };
        let keeper = tokio::spawn(keeper.keep());
        place.insert(Hosted { service, life: life.clone(), orders, starts, keeper });
        drop(services);
        self.roster.send_modify(|count| *count += 1);
        Ok(life)
    }

    /// Takes a service out. One that runs is ended as a crash would: stop it before.
    ///
    /// # Errors
    /// [`OrderError::Unknown`].
    pub fn remove(&self, service: &str) -> Result<(), OrderError> {
        let hosted = self.services().remove(service);
        let hosted = hosted.ok_or_else(|| OrderError::Unknown(service.to_owned()))?;
        hosted.keeper.abort();
        self.roster.send_modify(|count| *count += 1);
        Ok(())
    }

    /// The host's name of what is in the catalogue as this service and instance; empty: the only one.
    ///
    /// # Errors
    /// [`OrderError::Unknown`]; [`OrderError::Several`].
    pub fn name_of(&self, service: &str, instance: &str) -> Result<String, OrderError> {
        let services = self.services();
        let is_it = |hosted: &Hosted| {
            let about = hosted.service.about();
            about.service == service && (instance.is_empty() || about.instance == instance)
        };
        let mut found = services.iter().filter(|(_, hosted)| is_it(hosted)).map(|(name, _)| name);
        let unknown = || match instance {
            "" => OrderError::Unknown(service.to_owned()),
            instance => OrderError::Unknown(format!("{service}/{instance}")),
        };
        let name = found.next().ok_or_else(unknown)?;
        match found.count() {
            0 => Ok(name.clone()),
            more => Err(OrderError::Several { service: service.to_owned(), count: more + 1 }),
        }
    }

    /// All services, by name.
    pub fn list(&self) -> Vec<Status> {
        self.services().values().map(Hosted::status).collect()
    }

    /// One service.
    ///
    /// # Errors
    /// [`OrderError::Unknown`].
    pub fn status(&self, service: &str) -> Result<Status, OrderError> {
        self.with(service, Hosted::status)
    }

    /// What a service can do.
    ///
    /// # Errors
    /// [`OrderError::Unknown`].
    pub fn features(&self, service: &str) -> Result<Vec<String>, OrderError> {
        self.with(service, |hosted| hosted.service.features())
    }

    /// What a service writes: see [`Service::logs`].
    ///
    /// # Errors
    /// [`OrderError::Unknown`].
    pub fn logs(
        &self,
        service: &str,
        tail: usize,
        follow: bool,
    ) -> Result<Option<front::LogStream>, OrderError> {
        self.with(service, |hosted| hosted.service.logs(tail, follow))
    }

    /// Its phases.
    ///
    /// # Errors
    /// [`OrderError::Unknown`].
    pub fn life(&self, service: &str) -> Result<Lifecycle, OrderError> {
        self.with(service, |hosted| hosted.life.clone())
    }

    /// Starts a service that is stopped, or has failed: then without the rest of the pause. Returns when it starts.
    ///
    /// # Errors
    /// See [`OrderError`].
    pub async fn start(&self, service: &str) -> Result<Status, OrderError> {
        self.order(service, What::Start).await
    }

    /// Lets a service finish what it has, for `deadline` at most; none: what the host's limits say. Returns when it is
    /// stopped.
    ///
    /// # Errors
    /// See [`OrderError`].
    pub async fn stop(
        &self,
        service: &str,
        deadline: Option<Duration>,
    ) -> Result<Status, OrderError> {
        self.order(service, What::Stop { deadline, again: false }).await
    }

    /// As [`Self::stop`], and then [`Self::start`].
    ///
    /// # Errors
    /// See [`OrderError`].
    pub async fn restart(
        &self,
        service: &str,
        deadline: Option<Duration>,
    ) -> Result<Status, OrderError> {
        self.order(service, What::Stop { deadline, again: true }).await
    }

    /// Ends this life of a service as a crash would; its supervisor starts it again.
    ///
    /// # Errors
    /// See [`OrderError`].
    pub async fn kill(&self, service: &str) -> Result<Status, OrderError> {
        self.order(service, What::Kill).await
    }

    /// The states of all services that it has now, and each that they enter later.
    pub fn follow(&self) -> Following {
        let roster = self.roster.subscribe();
        Following { host: self.clone(), roster, followed: BTreeMap::new() }
    }

    /// The services and their phases, by name.
    pub fn lives(&self) -> Vec<(String, Lifecycle)> {
        self.services().iter().map(|(name, hosted)| (name.clone(), hosted.life.clone())).collect()
    }

    /// Keeps the phases of one of these services in the catalogue, until `stop`: see [`announce()`]. For a program that stands
    /// alone; agent and core tell of theirs by themselves.
    ///
    /// # Errors
    /// There is no service of the name that is announced, or the core does not take it.
    pub async fn announce(
        self,
        channel: Channel,
        announcement: Announcement,
        stop: Stop,
    ) -> Result<(), AnnounceError> {
        let life = self.life(&announcement.service)?;
        Ok(announce(channel, announcement, &life, stop).await?)
    }

    /// Stops all services at once and waits for them.
    pub async fn shut_down(&self) {
        let hosted = std::mem::take(&mut *self.services());
        let mut keepers = Vec::new();
        for hosted in hosted.into_values() {
            if hosted.service.outlives() {
                hosted.keeper.abort();
                continue;
            }
            // Without its orders a keeper stops its service and ends.
            drop(hosted.orders);
            keepers.push(hosted.keeper);
        }
        for keeper in keepers {
            if let Err(error) = keeper.await {
                tracing::error!(%error, "the keeper of a service failed");
            }
        }
    }

    async fn order(&self, service: &str, what: What) -> Result<Status, OrderError> {
        let orders = self.with(service, |hosted| hosted.orders.clone())?;
        let (answer, answered) = oneshot::channel();
        let busy = || OrderError::Busy(service.to_owned());
        orders.try_send(Order { what, answer }).map_err(|_| busy())?;
        let carried_out = answered.await.map_err(|_| busy())?;
        let refused = |step| OrderError::Illegal { service: service.to_owned(), step };
        carried_out.map_err(refused)?;
        self.status(service)
    }

    fn with<T>(&self, service: &str, of: impl FnOnce(&Hosted) -> T) -> Result<T, OrderError> {
        let services = self.services();
        services.get(service).map(of).ok_or_else(|| OrderError::Unknown(service.to_owned()))
    }

    fn services(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Hosted>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hosted {
    fn status(&self) -> Status {
        let restarts = self.starts.load(Ordering::Relaxed).saturating_sub(1);
        let state = self.life.watch().borrow().clone();
        Status { about: self.service.about(), pid: self.service.pid(), state, restarts }
    }
}

/// One who is told every state of every service once, and of those that are taken out.
#[derive(Debug)]
pub struct Following {
    host: Host,
    roster: watch::Receiver<u64>,
    followed: BTreeMap<String, Followed>,
}

#[derive(Debug)]
struct Followed {
    about: About,
    life: Lifecycle,
    states: watch::Receiver<State>,
    seen: u64,
}

/// What has happened to the services of a host.
#[derive(Debug, Default)]
pub struct News {
    /// States that were entered, those of one service in order.
    pub states: Vec<(About, State)>,
    /// They are not there any more.
    pub removed: Vec<About>,
}

impl Following {
    /// The state that each service is in, by name. What came before is not told any more.
    pub fn present(&mut self) -> Vec<(About, State)> {
        self.look_for_services();
        let present = |one: &mut Followed| {
            let (states, entered) = one.life.entered_after(0);
            one.seen = entered;
            Some((one.about.clone(), states.last()?.clone()))
        };
        self.followed.values_mut().filter_map(present).collect()
    }

    /// What has happened since this was asked last; waits until there is something.
    pub async fn next(&mut self) -> News {
        loop {
            let removed = self.look_for_services();
            let mut news = News { states: Vec::new(), removed };
            for one in self.followed.values_mut() {
                let (states, entered) = one.life.entered_after(one.seen);
                one.seen = entered;
                news.states.extend(states.into_iter().map(|state| (one.about.clone(), state)));
            }
            if !(news.states.is_empty() && news.removed.is_empty()) {
                return news;
            }
            let changed = self.followed.values_mut().map(|one| Box::pin(one.states.changed()));
            let mut changed: Vec<_> = changed.collect();
            // The senders are in the lives, and in the host.
            let any = poll_fn(|context| {
                let is_any = changed.iter_mut().any(|one| one.as_mut().poll(context).is_ready());
                if is_any { Poll::Ready(()) } else { Poll::Pending }
            });
            tokio::select! {
                () = any => {}
                _ = self.roster.changed() => {}
            }
        }
    }

    /// Takes up those that are new. Returns those that are gone.
    fn look_for_services(&mut self) -> Vec<About> {
        let services = self.host.services();
        // Another one of the same name is another one.
        let is_same = |name: &String, one: &mut Followed| {
            services.get(name).is_some_and(|hosted| hosted.life.is_same(&one.life))
        };
        let gone = self.followed.extract_if(.., |name, one| !is_same(name, one));
        let gone: Vec<_> = gone.map(|(_, one)| one.about).collect();
        for (name, hosted) in services.iter() {
            self.followed.entry(name.clone()).or_insert_with(|| Followed {
                about: hosted.service.about(),
                states: hosted.life.watch(),
                life: hosted.life.clone(),
                seen: 0,
            });
        }
        gone
    }
}

/// Carries out the orders to one service.
struct Keeper {
    service: Arc<dyn Service>,
    limits: Limits,
    life: Lifecycle,
    starts: Arc<AtomicU64>,
    kill: Arc<Notify>,
    orders: mpsc::Receiver<Order>,
}

/// What follows the end of a run.
enum Next {
    Again(Vec<Answer>),
    Wait,
    End,
}

impl Keeper {
    async fn keep(mut self) {
        let mut told = Vec::new();
        loop {
            match self.run(told).await {
                Next::Again(answers) => told = answers,
                Next::Wait => match self.wait_for_start().await {
                    Some(answer) => told = vec![answer],
                    None => return,
                },
                Next::End => return,
            }
        }
    }

    /// From a start to the stop that was asked for, or until the supervisor gives up. `told`: those who are to hear that
    /// it starts.
    async fn run(&mut self, told: Vec<Answer>) -> Next {
        let (stopper, stop) = stop_pair();
        let (service, life, kill) = (self.service.clone(), self.life.clone(), self.kill.clone());
        let starts = self.starts.clone();
        let name = service.name().to_owned();
        let start = move |stop| {
            starts.fetch_add(1, Ordering::Relaxed);
            let (run, kill) = (service.run(life.clone(), stop), kill.clone());
            async move {
                tokio::select! {
                    ended = run => ended,
                    () = kill.notified() => Err("killed on request".into()),
                }
            }
        };
        let run = supervise(&name, self.limits, self.life.clone(), stop, start);
        tokio::pin!(run);
        // The first poll takes the step to starting.
        let mut ended = poll_fn(|context| Poll::Ready(run.as_mut().poll(context))).await;
        for answer in told {
            // Nobody waits any more.
            let _ = answer.send(Ok(()));
        }
        let mut stopping = Stopping::default();
        loop {
            if let Poll::Ready(result) = ended {
                return stopping.done(&name, result);
            }
            tokio::select! {
                result = &mut run => ended = Poll::Ready(result),
                order = self.orders.recv() => {
                    let Some(Order { what, answer }) = order else {
                        stopper.stop();
                        let _ = run.await;
                        return Next::End;
                    };
                    match (what, self.life.phase()) {
                        // Between two lives: nothing is dropped but the pause.
                        (What::Start, Phase::Failed) => return Next::Again(vec![answer]),
                        (What::Kill, Phase::Starting | Phase::Ready | Phase::Degraded) => {
                            self.kill.notify_one();
                            let _ = answer.send(Ok(()));
                        }
                        (
                            What::Stop { deadline, again },
                            Phase::Starting | Phase::Ready | Phase::Degraded | Phase::Failed,
                        ) => {
                            stopping.again |= again;
                            stopping.waiting.push(answer);
                            stopper.stop_within(deadline);
                        }
                        (what, from) => refuse(answer, from, what.first_step()),
                    }
                }
            }
        }
    }

    /// None: the host ends.
    async fn wait_for_start(&mut self) -> Option<Answer> {
        loop {
            let Order { what, answer } = self.orders.recv().await?;
            match (what, self.life.phase()) {
                (What::Start, _) | (What::Stop { again: true, .. }, Phase::Failed) => {
                    return Some(answer);
                }
                (What::Stop { .. }, Phase::Failed) => {
                    let stopped = self.life.step(Phase::Stopped, "Stop", "");
                    let _ = answer.send(stopped);
                }
                (what, from) => refuse(answer, from, what.first_step()),
            }
        }
    }
}

/// Those who asked for the end of a run.
#[derive(Default)]
struct Stopping {
    waiting: Vec<Answer>,
    /// It is to start again then.
    again: bool,
}

impl Stopping {
    fn done(self, service: &str, ended: Result<(), GaveUp>) -> Next {
        if let Err(error) = ended {
            tracing::error!(service, %error, "service given up");
        }
        if self.again {
            return Next::Again(self.waiting);
        }
        for answer in self.waiting {
            let _ = answer.send(Ok(()));
        }
        Next::Wait
    }
}

impl What {
    /// The phase that an order leads to first.
    fn first_step(self) -> Phase {
        match self {
            Self::Start => Phase::Starting,
            Self::Stop { .. } => Phase::Draining,
            Self::Kill => Phase::Failed,
        }
    }
}

fn refuse(answer: Answer, from: Phase, to: Phase) {
    let _ = answer.send(Err(IllegalStep { from, to }));
}

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;

    const LIMITS: Limits = Limits {
        first_delay: Duration::from_secs(10),
        longest_delay: Duration::from_secs(10),
        restarts_max: 2,
        window: Duration::from_secs(600),
        stop_deadline: Duration::from_secs(5),
    };

    /// Ready at once; fails as often as told; takes its time to stop where it is told to.
    struct Fake {
        name: &'static str,
        failures: Arc<Semaphore>,
        is_slow: bool,
    }

    fn fake(name: &'static str) -> Fake {
        Fake { name, failures: Arc::new(Semaphore::new(0)), is_slow: false }
    }

    impl Service for Fake {
        fn name(&self) -> &str {
            self.name
        }

        fn features(&self) -> Vec<String> {
            vec!["fake".to_owned()]
        }

        fn run(&self, life: Lifecycle, mut stop: Stop) -> Run {
            let (failures, is_slow) = (self.failures.clone(), self.is_slow);
            Box::pin(async move {
                if let Ok(failure) = failures.try_acquire() {
                    failure.forget();
                    return Err("as told".into());
                }
                life.step(Phase::Ready, "Healthy", "")?;
                stop.asked().await;
                if is_slow {
                    std::future::pending::<()>().await;
                }
                Ok(())
            })
        }
    }

    async fn until(host: &Host, service: &str, phase: Phase) {
        let mut states = host.life(service).unwrap().watch();
        states.wait_for(|state| state.phase == phase).await.unwrap();
    }

    fn illegal(service: &str, from: Phase, to: Phase) -> OrderError {
        OrderError::Illegal { service: service.to_owned(), step: IllegalStep { from, to } }
    }

    #[tokio::test(start_paused = true)]
    async fn services_are_stopped_started_and_restarted_by_name() {
        let host = Host::new(LIMITS);
        host.add(Arc::new(fake("a"))).unwrap();
        host.add(Arc::new(fake("b"))).unwrap();
        until(&host, "a", Phase::Ready).await;
        until(&host, "b", Phase::Ready).await;
        assert_eq!(host.add(Arc::new(fake("a"))).unwrap_err(), OrderError::Taken("a".into()));
        assert_eq!(host.start("c").await.unwrap_err(), OrderError::Unknown("c".into()));
        assert_eq!(host.features("a").unwrap(), ["fake"]);

        let stopped = host.stop("a", None).await.unwrap();
        assert_eq!((stopped.state.phase, stopped.state.reason), (Phase::Stopped, "Drained"));
        assert_eq!(host.status("b").unwrap().state.phase, Phase::Ready, "the other one goes on");
        for refused in [host.stop("a", None).await, host.restart("a", None).await] {
            assert_eq!(refused.unwrap_err(), illegal("a", Phase::Stopped, Phase::Draining));
        }
        let refused = host.kill("a").await.unwrap_err();
        assert_eq!(refused, illegal("a", Phase::Stopped, Phase::Failed));
        host.start("a").await.unwrap();
        until(&host, "a", Phase::Ready).await;
        let refused = host.start("a").await.unwrap_err();
        assert_eq!(refused, illegal("a", Phase::Ready, Phase::Starting));
        host.restart("b", None).await.unwrap();
        until(&host, "b", Phase::Ready).await;
        assert_eq!(host.list().iter().map(|one| one.restarts).collect::<Vec<_>>(), [1, 1]);
        host.shut_down().await;
        assert!(host.list().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_killed_fails_and_is_started_again() {
        let host = Host::new(LIMITS);
        let life = host.add(Arc::new(fake("a"))).unwrap();
        until(&host, "a", Phase::Ready).await;
        let mut states = life.watch();
        let mut following = host.follow();
        let present: Vec<_> = following.present().into_iter().map(|(_, s)| s.phase).collect();
        assert_eq!(present, [Phase::Ready]);
        host.kill("a").await.unwrap();
        let mut seen = Vec::new();
        while seen.last() != Some(&Phase::Ready) {
            states.changed().await.unwrap();
            seen.push(states.borrow_and_update().phase);
        }
        // A watcher may miss what passes at once, as starting; a follower misses nothing.
        assert_eq!(seen.first(), Some(&Phase::Failed));
        let mut told = Vec::new();
        while told.last() != Some(&Phase::Ready) {
            let news = following.next().await;
            told.extend(news.states.into_iter().map(|(_, state)| state.phase));
        }
        assert_eq!(told, [Phase::Failed, Phase::Starting, Phase::Ready]);
        assert_eq!(host.status("a").unwrap().restarts, 1);
        host.shut_down().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_one_can_be_started_early_or_left() {
        let host = Host::new(LIMITS);
        let service = fake("a");
        let failures = service.failures.clone();
        failures.add_permits(1);
        let begin = tokio::time::Instant::now();
        host.add(Arc::new(service)).unwrap();
        until(&host, "a", Phase::Failed).await;
        host.start("a").await.unwrap();
        until(&host, "a", Phase::Ready).await;
        assert!(begin.elapsed() < LIMITS.first_delay, "it did not wait for its pause to end");

        // Given up: it fails more often than it may.
        failures.add_permits(LIMITS.restarts_max + 1);
        host.kill("a").await.unwrap();
        until(&host, "a", Phase::Failed).await;
        while failures.available_permits() > 1 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        tokio::time::sleep(10 * LIMITS.longest_delay).await;
        assert_eq!(host.status("a").unwrap().state.phase, Phase::Failed);
        let left = host.stop("a", None).await.unwrap();
        assert_eq!(left.state.phase, Phase::Stopped);
        host.shut_down().await;
    }

    #[tokio::test(start_paused = true)]
    async fn while_it_drains_it_takes_no_other_order_and_the_deadline_ends_it() {
        let host = Host::new(LIMITS);
        host.add(Arc::new(Fake { is_slow: true, ..fake("a") })).unwrap();
        until(&host, "a", Phase::Ready).await;
        let begin = tokio::time::Instant::now();
        let other = host.clone();
        let deadline = Some(Duration::from_secs(60));
        let stopping = tokio::spawn(async move { other.stop("a", deadline).await });
        until(&host, "a", Phase::Draining).await;
        let refused = host.start("a").await.unwrap_err();
        assert_eq!(refused.to_string(), "service a");
        assert_eq!(refused, illegal("a", Phase::Draining, Phase::Starting));
        let refused = host.stop("a", None).await.unwrap_err();
        assert_eq!(refused, illegal("a", Phase::Draining, Phase::Draining));
        let stopped = stopping.await.unwrap().unwrap();
        assert_eq!((stopped.state.phase, stopped.state.reason), (Phase::Stopped, "DrainDeadline"));
        assert_eq!(begin.elapsed().as_secs(), 60);
        host.shut_down().await;
    }
}
