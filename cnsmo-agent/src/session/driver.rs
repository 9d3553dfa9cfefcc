use std::{
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    time::{Duration, SystemTime},
};

use cnsmo_proto::{
    model::Labels,
    pb::agent::{
        Ack, Announcement, ConnectRequest, ConnectResponse,
        agent_service_client::AgentServiceClient, command::Command,
    },
};
use cnsmo_service::{
    backoff::{Backoff, jittered},
    channel::{ConnectError, CoreAddress, connect},
    host::{News, follow::Followers},
    identity::{Credentials, EnrollError},
    lifecycle::{Lifecycle, Phase},
    supervise::{Chain, Stop},
};
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, interval_at, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use super::{Event, ProtocolError, Session, Welcomed};
use crate::{
    enforcer::{EnforcerHandle, Gone, InForce, VmStatus},
    locate::Locator,
    node,
    report::{Services, announcement, status_report},
};

/// First and longest wait before the next attempt to reach the core.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_LONGEST: Duration = Duration::from_secs(15);
/// First and longest wait before the next attempt to renew the certificate. Half of its life is left for them.
const RENEWAL_RETRY_FIRST: Duration = Duration::from_secs(1);
const RENEWAL_RETRY_LONGEST: Duration = Duration::from_secs(60);
/// Longest wait while cores answer of which none leads: the next one takes over within seconds.
const RETRY_FOLLOWER: Duration = Duration::from_secs(1);
/// Longest wait for the welcome.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the state of the VM is reported; less often if the core wants to hear of us less often.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);
/// Longest time from a change to its report, however often something changes; each VM takes another part of it. So a report
/// that a person waits for comes soon, and an update of thousands of VMs is acknowledged by all before the first report.
const STATUS_DELAY: Duration = Duration::from_secs(1);
/// How often it is looked whether the VM has other addresses.
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(3);
/// Commands that are carried out at a time; one more is refused. The core keeps to fewer.
const COMMANDS_MAX: usize = 32;
/// Messages to the core that wait. One answer, one heartbeat, one announcement and one report are under way at a time.
const OUTGOING_MAX: usize = 8;
/// A core that takes nothing for this long is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest message: a snapshot of many policies with all their rules.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// What a conversation needs.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Finds the core.
    pub locator: Locator,
    /// Who we are.
    pub credentials: Credentials,
    /// Labels of this VM.
    pub labels: Labels,
    /// Who carries updates out.
    pub enforcer: EnforcerHandle,
    /// Whom the core may steer, and hears of.
    pub services: Services,
    /// Shows whether the core is there.
    pub life: Lifecycle,
    /// The core refused the certificate that we have: it may be one that it has forgotten, as after a restore.
    pub renew_first: bool,
}

/// Why a conversation ended. Only [`Gone`] is ours: the others are tried again for ever.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("no address of the core is known")]
    NoAddress,
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the certificate has expired and was not renewed")]
    Expired(#[source] EnrollError),
    #[error("the core does not keep to the protocol")]
    Protocol(#[from] ProtocolError),
    #[error("the core says nothing")]
    Silent,
    #[error("the core takes nothing")]
    NotTaking,
    #[error("the core closed the stream")]
    Closed,
    #[error("the core stops")]
    GoAway(Duration),
    #[error(transparent)]
    Enforcer(#[from] Gone),
}

/// Talks with the core until `stop`, again and again. Without a core the policies in force stay.
///
/// # Errors
/// The enforcer is gone.
pub async fn run(mut connection: Connection, mut stop: Stop) -> Result<(), Gone> {
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
    loop {
        let ended = tokio::select! {
            () = stop.asked() => return Ok(()),
            ended = connection.talk(&mut backoff) => ended,
        };
        if let Ended::Enforcer(gone) = ended {
            return Err(gone);
        }
        connection.renew_first = matches!(ended, Ended::Connect(ConnectError::NotEnrolled(_)));
        let mut delay = backoff.after_failure();
        if matches!(ended, Ended::Connect(ConnectError::Follower(_))) {
            delay = delay.min(RETRY_FOLLOWER);
        }
        if let Ended::GoAway(asked) = ended {
            delay += asked;
        }
        tracing::warn!(reason = %Chain(&ended), retry_in = ?delay, "no connection to the core");
        connection.lost(&ended);
        tokio::select! {
            () = stop.asked() => return Ok(()),
            () = tokio::time::sleep(delay) => {}
        }
    }
}

impl Connection {
    async fn talk(&mut self, backoff: &mut Backoff) -> Ended {
        match self.converse(backoff).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    /// With the first core that welcomes us.
    async fn converse(&mut self, backoff: &mut Backoff) -> Result<Infallible, Ended> {
        let mut refused = Ended::NoAddress;
        for core in self.locator.locate().await? {
            match self.open(core).await {
                Ok((stream, welcomed, renewals)) => {
                    backoff.reset();
                    self.found(&welcomed);
                    self.enforcer.confirm_within(welcomed.confirm_window).await?;
                    return tokio::select! {
                        ended = stream.run(welcomed.heartbeat_interval) => ended,
                        never = renewals.run() => match never {},
                    };
                }
                // A core that answers says more than one that does not.
                Err(_) if matches!(refused, Ended::Connect(ConnectError::Follower(_))) => {}
                Err(ended) => refused = ended,
            }
        }
        Err(refused)
    }

    /// A conversation up to the welcome.
    async fn open(&self, core: SocketAddr) -> Result<(Stream<'_>, Welcomed, Renewals), Ended> {
        let channel = connect(&CoreAddress::from(core), &self.credentials.identity()).await?;
        // What has expired opens nothing else.
        let expired = self.credentials.identity().not_after() <= SystemTime::now();
        if expired || self.renew_first {
            match self.credentials.renew(channel.clone()).await {
                Err(error) if expired => return Err(Ended::Expired(error)),
                // The stream will tell why.
                Ok(_) | Err(_) => {}
            }
        }
        let renewals = Renewals::new(self.credentials.clone(), channel.clone());
        let mut session = Session::default();
        let in_force = self.enforcer.in_force();
        let (have, key) = {
            let in_force = in_force.borrow();
            (in_force.types.clone(), in_force.public_key)
        };
        let announced = announcement(key, &node::addresses(Some(core)));
        let hello = session.hello(node::boot_id(), have, &self.labels, announced.clone());
        let (outgoing, requests) = mpsc::channel(OUTGOING_MAX);
        // The queue is new and empty.
        let _ = outgoing.try_send(hello);
        let mut client =
            AgentServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let stream = client.connect(ReceiverStream::new(requests));
        let stream = timeout(WELCOME_TIMEOUT, stream).await.map_err(|_| Ended::Silent)?;
        let mut incoming = stream.map_err(ConnectError::of_call)?.into_inner();

        let first = timeout(WELCOME_TIMEOUT, next(&mut incoming));
        let first = first.await.map_err(|_| Ended::Silent)??;
        let welcomed = match session.receive(first)? {
            Event::Welcomed(welcomed) => welcomed,
            Event::GoAway(delay) => return Err(Ended::GoAway(delay)),
            Event::Update { .. } | Event::Confirm(_) | Event::Command { .. } => {
                return Err(ProtocolError::NoWelcome.into());
            }
        };
        let (enforcer, services) = (&self.enforcer, self.services.clone());
        let stream =
            Stream { session, outgoing, incoming, in_force, enforcer, services, core, announced };
        Ok((stream, welcomed, renewals))
    }

    fn found(&self, welcomed: &Welcomed) {
        tracing::info!(store_epoch = welcomed.store_epoch, "connected to the core");
        let reason = match self.life.phase() {
            Phase::Degraded => "Recovered",
            _ => "Healthy",
        };
        // Ready already: the stream was replaced in between.
        let _ = self.life.step(Phase::Ready, reason, "");
    }

    fn lost(&self, ended: &Ended) {
        // Starting or degraded already: nothing was lost.
        let _ = self.life.step(Phase::Degraded, "DependencyLost", Chain(ended).to_string());
    }
}

/// Renews the certificate beside the live stream.
struct Renewals {
    credentials: Credentials,
    channel: Channel,
}

impl Renewals {
    fn new(credentials: Credentials, channel: Channel) -> Self {
        Self { credentials, channel }
    }

    async fn run(self) -> Infallible {
        let mut backoff = Backoff::new(RENEWAL_RETRY_FIRST, RENEWAL_RETRY_LONGEST);
        let mut pause = Duration::ZERO;
        loop {
            let due = self.credentials.identity().renew_in(SystemTime::now());
            tokio::time::sleep(due.max(pause)).await;
            match self.credentials.renew(self.channel.clone()).await {
                Ok(()) => {
                    tracing::info!("certificate renewed");
                    backoff.reset();
                    // A clock that is wrong makes a new certificate seem old.
                    pause = self.credentials.identity().life().div_f64(10.0);
                }
                Err(error) => {
                    pause = backoff.after_failure();
                    tracing::warn!(reason = %Chain(&error), retry_in = ?pause, "certificate not renewed");
                }
            }
        }
    }
}

/// A live stream.
struct Stream<'a> {
    session: Session,
    outgoing: mpsc::Sender<ConnectRequest>,
    incoming: Streaming<ConnectResponse>,
    in_force: watch::Receiver<InForce>,
    enforcer: &'a EnforcerHandle,
    services: Services,
    core: SocketAddr,
    announced: Option<Announcement>,
}

type Answer<T> = Option<Pin<Box<dyn Future<Output = Result<T, Gone>> + Send>>>;

impl Stream<'_> {
    /// Heartbeats and reports go on while an update is being carried out; the next update waits in the network.
    async fn run(mut self, heartbeat: Duration) -> Result<Infallible, Ended> {
        let mut heartbeats = interval_at(Instant::now() + heartbeat, heartbeat);
        let between_statuses = heartbeat.max(STATUS_INTERVAL);
        let mut next_status = Instant::now() + jittered(STATUS_DELAY);
        let mut announcements = interval(ANNOUNCE_INTERVAL);
        for ticks in [&mut heartbeats, &mut announcements] {
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut commands = FuturesUnordered::new();
        let followers = Followers::new(self.services.local());
        let mut services = self.services.follow();
        let present = News { states: services.present(), removed: Vec::new() };
        self.send(Session::instances(self.services.report(present, true))).await?;
        let mut update: Answer<Ack> = None;
        let mut status: Answer<VmStatus> = None;
        loop {
            tokio::select! {
                message = next(&mut self.incoming), if update.is_none() => {
                    match self.session.receive(message?)? {
                        Event::Update { store_epoch, update: asked } => {
                            let enforcer = self.enforcer.clone();
                            let carried_out = async move { enforcer.update(store_epoch, asked).await };
                            update = Some(Box::pin(carried_out));
                        }
                        Event::Confirm(revision) => self.enforcer.confirm(revision).await?,
                        Event::Command { id, .. } if commands.len() >= COMMANDS_MAX => {
                            let busy = Services::busy(id);
                            self.send(Session::result(busy)).await?;
                        }
                        Event::Command { id, command } => {
                            let (services, followers) = (self.services.clone(), followers.clone());
                            commands.push(async move {
                                match command {
                                    Command::Follow(follow) => followers.answer(id, follow).await,
                                    command => services.answer(id, command).await,
                                }
                            });
                        }
                        Event::GoAway(delay) => return Err(Ended::GoAway(delay)),
                        Event::Welcomed(_) => return Err(ProtocolError::SecondWelcome.into()),
                    }
                }
                Some(result) = commands.next(), if !commands.is_empty() => {
                    self.send(Session::result(result)).await?;
                }
                news = services.next() => {
                    self.send(Session::instances(self.services.report(news, false))).await?;
                }
                ack = answer(&mut update) => self.send(Session::ack(ack?)).await?,
                _ = heartbeats.tick() => {
                    let applied = self.in_force.borrow().types.clone();
                    let beat = self.session.heartbeat(applied);
                    self.send(beat).await?;
                }
                changed = self.in_force.changed() => {
                    changed.map_err(|_| Gone)?;
                    next_status = next_status.min(Instant::now() + jittered(STATUS_DELAY));
                    announcements.reset_immediately();
                }
                _ = announcements.tick() => self.announce().await?,
                () = sleep_until(next_status), if status.is_none() => {
                    next_status = Instant::now() + between_statuses;
                    let enforcer = self.enforcer.clone();
                    status = Some(Box::pin(async move { enforcer.status().await }));
                }
                now = answer(&mut status) => {
                    let trouble = self.in_force.borrow().trouble.clone();
                    self.send(Session::status(status_report(now?, trouble))).await?;
                }
            }
        }
    }

    async fn announce(&mut self) -> Result<(), Ended> {
        let key = self.in_force.borrow().public_key;
        // Without a tunnel there is nothing to look for.
        let now = key.and_then(|key| announcement(Some(key), &node::addresses(Some(self.core))));
        if now == self.announced {
            return Ok(());
        }
        self.announced = now.clone();
        let Some(now) = now else { return Ok(()) };
        self.send(Session::announcement(now)).await
    }

    async fn send(&self, message: ConnectRequest) -> Result<(), Ended> {
        match timeout(SEND_TIMEOUT, self.outgoing.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Ended::Closed),
            Err(_) => Err(Ended::NotTaking),
        }
    }
}

async fn next(incoming: &mut Streaming<ConnectResponse>) -> Result<ConnectResponse, Ended> {
    incoming.message().await.map_err(ConnectError::of_call)?.ok_or(Ended::Closed)
}

/// The answer under way; never, if there is none.
async fn answer<T>(under_way: &mut Answer<T>) -> Result<T, Gone> {
    match under_way {
        Some(future) => {
            let result = future.await;
            *under_way = None;
            result
        }
        None => std::future::pending().await,
    }
}
