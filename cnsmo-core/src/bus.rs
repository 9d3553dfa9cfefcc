//! The message bus.
//!
//! - Ephemeral messages and requests (`live`) are in memory, and reach the subscribers of this core only.
//! - Durable messages are in the [store](crate::store::message); `durable` has one task for each queue group with members on
//!   this core, which shares them out. Several cores may serve one group.
//! - What waits for one subscriber is in its [`Outbox`], whichever kind it is.

mod durable;
mod index;
mod live;
mod outbox;
mod share;

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cnsmo_proto::pb::bus::{Ack, Message, Reply};
use prost::Message as _;
use tonic::Status;

use crate::{
    store::{
        Sequence, Store, StoreError,
        message::{
            GROUPS_MAX, Kept, NewGroup, NewMessage, NewMessages, Opened, Published, Receipt,
            STREAMS_MAX, StreamLimits, StreamState,
        },
    },
    subject::{Pattern, Subject},
};

pub(crate) use durable::timestamp;
pub use live::{RequestError, Served};
pub use outbox::{CREDIT_MAX, Outbox, Outgoing, WAITING_BYTES_MAX, WAITING_MAX};

use durable::Groups;
use live::Live;
use outbox::Item;

/// Subscriptions of this core: some 10 kB each.
pub const SUBSCRIPTIONS_MAX: usize = 65_536;
/// Subscriptions of one identity, so that one service does not take those of all.
pub const SUBSCRIPTIONS_OF_ONE_MAX: usize = 4_096;
/// Requests that wait for a reply.
pub const REQUESTS_MAX: u64 = 16_384;
/// How often old messages and ids are looked for.
const TRIM_INTERVAL: Duration = Duration::from_secs(60);

/// How much is kept, and for whom.
#[derive(Clone, Debug, Default)]
pub struct BusConfig {
    /// Name of this core among those on one database: what its members hold is released when it starts again.
    pub holder: String,
    /// Of each stream.
    pub limits: StreamLimits,
}

/// Why the bus does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// A limit is reached.
    #[error("{0}")]
    Exhausted(String),
    /// More than [`CREDIT_MAX`].
    #[error("more credit than {CREDIT_MAX} messages is not granted")]
    Credit,
    /// It contradicts what is there.
    #[error("{0}")]
    Conflict(String),
    /// Not there.
    #[error("{0}")]
    NotFound(String),
    /// The request has no reply.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The store failed.
    #[error("the store failed")]
    Store(#[from] StoreError),
    /// The bus ends.
    #[error("the core is shutting down")]
    Stopped,
}

/// Somebody who wants messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    /// Of these subjects.
    pub pattern: Pattern,
    /// Empty: alone.
    pub group: String,
    /// Share in its group.
    pub weight: u32,
    /// Named in replies.
    pub member: String,
    /// None: ephemeral.
    pub durable: Option<Durable>,
}

/// Of a durable subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Durable {
    /// Where a new group begins; 0: behind the last message.
    pub start: Sequence,
    /// Time for a message until another member gets it.
    pub ack_wait: Duration,
    /// Then it is a dead letter.
    pub attempts_max: u32,
}

/// The bus of a core. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Bus(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    live: Live,
    groups: Groups,
    store: Store,
    limits: StreamLimits,
    requests: AtomicU64,
    subscribed: Mutex<Subscribed>,
}

/// Who subscribes, to keep to the limits and to end all of them.
#[derive(Debug, Default)]
struct Subscribed {
    next: u64,
    outboxes: HashMap<u64, Weak<Outbox>>,
    of_identity: BTreeMap<String, usize>,
    stopped: bool,
}

impl Bus {
    /// Starts the bus of this core.
    ///
    /// # Errors
    /// The store fails.
    pub async fn start(store: Store, config: BusConfig) -> Result<Self, StoreError> {
        store.release_deliveries(&config.holder).await?;
        Ok(Self(Arc::new(Inner {
            live: Live::default(),
            limits: config.limits,
            groups: Groups::new(store.clone(), config),
            store,
            requests: AtomicU64::new(0),
            subscribed: Mutex::default(),
        })))
    }

    /// Hears of what other cores publish and removes what is too old, until it is dropped. What is published here reaches its
    /// subscribers without it.
    pub async fn run(self) {
        let Inner { store, limits, .. } = &*self.0;
        tokio::select! {
            () = self.0.listen() => {}
            () = trim(store.clone(), *limits) => {}
        }
    }

    /// Gives a message to whom it reaches now: at most once to each subscriber alone, and to one of each group. Returns how
    /// many those are.
    pub fn publish(&self, subject: Subject<'_>, message: &Arc<Message>) -> u32 {
        self.0.live.publish(subject, message)
    }

    /// Keeps messages for all groups of their stream, all or none; they are on disk when this returns. All subjects must be of
    /// that stream.
    ///
    /// # Errors
    /// The stream is full, or the store fails.
    pub async fn publish_durable(
        &self,
        stream: &str,
        messages: Vec<Message>,
    ) -> Result<Vec<Receipt>, BusError> {
        let messages = messages.into_iter().map(|message| NewMessage {
            body: Bytes::from(message.encode_to_vec()),
            subject: message.subject,
            ordering_key: message.ordering_key,
            message_id: message.message_id,
        });
        let new = NewMessages {
            stream: stream.to_owned(),
            limits: self.0.limits,
            messages: messages.collect(),
        };
        match self.0.store.publish(new).await? {
            Published::Kept(receipts) => {
                if receipts.iter().any(|receipt| !receipt.duplicate) {
                    self.0.groups.wake(stream);
                }
                Ok(receipts)
            }
            Published::Full => Err(BusError::Exhausted(format!(
                "stream {stream} is full of messages that its queue groups have not acknowledged"
            ))),
            Published::TooManyStreams => Err(BusError::Exhausted(format!(
                "there are {STREAMS_MAX} streams already: {stream} would be one more"
            ))),
        }
    }

    /// Subscriptions of this core.
    pub fn subscriptions(&self) -> usize {
        lock(&self.0.subscribed).outboxes.len()
    }

    /// Gives a message to one subscriber and waits for its reply.
    ///
    /// # Errors
    /// See [`RequestError`]; too many requests wait.
    pub async fn request(
        &self,
        message: Arc<Message>,
        timeout: Duration,
        idempotent: bool,
    ) -> Result<Served, BusError> {
        let waiting = Waiting(&self.0.requests);
        if self.0.requests.fetch_add(1, Ordering::Relaxed) >= REQUESTS_MAX {
            return Err(BusError::Exhausted(format!("{REQUESTS_MAX} requests wait already")));
        }
        let deadline = Instant::now() + timeout;
        let served = self.0.live.request(message, deadline, idempotent).await;
        drop(waiting);
        Ok(served?)
    }

    /// From now on messages reach the outbox, as far as credit is granted.
    ///
    /// # Errors
    /// A limit is reached, or there is a group of this name for other subjects.
    pub async fn subscribe(
        &self,
        identity: &str,
        subscription: Subscription,
        outbox: Arc<Outbox>,
    ) -> Result<Member, BusError> {
        let place = self.place(identity, &outbox)?;
        let Subscription { pattern, group, weight, member, durable } = subscription;
        let Some(durable) = durable else {
            let subscriber =
                self.0.live.subscribe(&pattern, &group, weight, member, outbox.clone());
            // It is the first all the same: nothing is sent without credit.
            outbox.push(Item::Subscribed { next_sequence: 0 });
            let kind = Kind::Live { pattern, group, subscriber };
            return Ok(Member { place, outbox, kind });
        };
        let stream = pattern.stream().map_err(|e| BusError::Conflict(format!("subject: {e}")))?;
        let new = NewGroup {
            stream: stream.to_owned(),
            group: group.clone(),
            subject: pattern.as_str().to_owned(),
            start: durable.start,
            ack_wait_ms: i64::try_from(durable.ack_wait.as_millis()).unwrap_or(i64::MAX),
            attempts_max: durable.attempts_max.into(),
        };
        let next_sequence = match self.0.store.open_group(new).await? {
            Opened::Group { next } => next,
            Opened::OtherSubject { subject } => {
                return Err(BusError::Conflict(format!(
                    "queue group {group} of stream {stream} is for {subject}, not for {pattern}: \
                     use another name or delete it"
                )));
            }
            Opened::TooManyGroups => {
                return Err(BusError::Exhausted(format!(
                    "stream {stream} has {GROUPS_MAX} queue groups already"
                )));
            }
            Opened::TooManyStreams => {
                return Err(BusError::Exhausted(format!(
                    "there are {STREAMS_MAX} streams already: {stream} would be one more"
                )));
            }
        };
        let ack_wait = durable.ack_wait;
        let seat = self.0.groups.join(stream, &group, weight, ack_wait, outbox.clone())?;
        outbox.push(Item::Subscribed { next_sequence });
        Ok(Member { place, outbox, kind: Kind::Durable(seat) })
    }

    /// All streams, by name, and the members of each group on this core.
    ///
    /// # Errors
    /// The store fails.
    pub async fn streams(&self) -> Result<Vec<(StreamState, Vec<usize>)>, BusError> {
        let streams = self.0.store.streams().await?;
        let with_members = |stream: StreamState| {
            let of = |name| self.0.groups.members(&stream.name, name);
            let members = stream.groups.iter().map(|group| of(&group.name)).collect();
            (stream, members)
        };
        Ok(streams.into_iter().map(with_members).collect())
    }

    /// Messages of a stream behind a place, in order.
    ///
    /// # Errors
    /// The store fails.
    pub async fn messages(
        &self,
        stream: &str,
        after: Sequence,
        rows: usize,
    ) -> Result<Vec<Kept>, BusError> {
        Ok(self.0.store.messages(stream, after, rows).await?)
    }

    /// Puts dead letters of a stream back, each for the group that gave it up. No group: of all; no sequences: all.
    ///
    /// # Errors
    /// The store fails.
    pub async fn replay(
        &self,
        stream: &str,
        group: &str,
        sequences: &[Sequence],
    ) -> Result<i64, BusError> {
        let replayed = self.0.store.replay(stream, group, sequences).await?;
        self.0.groups.wake(stream);
        Ok(replayed)
    }

    /// Ends a durable group. Its members' streams end.
    ///
    /// # Errors
    /// There is no such group.
    pub async fn delete_group(&self, stream: &str, group: &str) -> Result<(), BusError> {
        if self.0.store.delete_group(stream, group).await? {
            self.0.groups.wake(stream);
            return Ok(());
        }
        Err(BusError::NotFound(format!("stream {stream} has no queue group {group}")))
    }

    /// Ends all subscriptions; further ones are refused.
    pub fn stop(&self) {
        let mut subscribed = lock(&self.0.subscribed);
        subscribed.stopped = true;
        for outbox in subscribed.outboxes.values().filter_map(Weak::upgrade) {
            outbox.end(Status::unavailable(BusError::Stopped.to_string()));
        }
    }

    fn place(&self, identity: &str, outbox: &Arc<Outbox>) -> Result<Place, BusError> {
        let mut subscribed = lock(&self.0.subscribed);
        if subscribed.stopped {
            return Err(BusError::Stopped);
        }
        if subscribed.outboxes.len() >= SUBSCRIPTIONS_MAX {
            let text = format!("this core has {SUBSCRIPTIONS_MAX} subscriptions already");
            return Err(BusError::Exhausted(text));
        }
        let of_one = subscribed.of_identity.entry(identity.to_owned()).or_default();
        if *of_one >= SUBSCRIPTIONS_OF_ONE_MAX {
            let text = format!("{identity} has {SUBSCRIPTIONS_OF_ONE_MAX} subscriptions already");
            return Err(BusError::Exhausted(text));
        }
        *of_one += 1;
        subscribed.next += 1;
        let id = subscribed.next;
        subscribed.outboxes.insert(id, Arc::downgrade(outbox));
        Ok(Place { bus: self.clone(), id, identity: identity.to_owned() })
    }
}

/// A subscription in force. It must be told when the subscriber leaves.
#[derive(Debug)]
pub struct Member {
    place: Place,
    outbox: Arc<Outbox>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Live { pattern: Pattern, group: String, subscriber: Arc<live::Subscriber> },
    Durable(durable::Seat),
}

impl Member {
    /// Whether it is a member of a durable group.
    pub fn is_durable(&self) -> bool {
        matches!(self.kind, Kind::Durable(_))
    }

    /// Permits that many more messages.
    ///
    /// # Errors
    /// Above [`CREDIT_MAX`].
    pub fn grant(&self, messages: u32) -> Result<(), BusError> {
        self.outbox.grant(messages).map_err(|_| BusError::Credit)?;
        match &self.kind {
            Kind::Live { subscriber, .. } => subscriber.granted(messages),
            Kind::Durable(seat) => seat.granted(),
        }
        Ok(())
    }

    /// What the subscriber says of a message. Without effect on an ephemeral subscription, and for messages that this member
    /// does not hold, for example because their time was over.
    pub async fn settle(&self, ack: Ack) {
        match &self.kind {
            Kind::Live { .. } => {}
            Kind::Durable(seat) => seat.settle(ack).await,
        }
    }

    /// Its reply to a request; dropped if nobody waits for it.
    pub fn reply(&self, reply: Reply) {
        match &self.kind {
            Kind::Live { subscriber, .. } => subscriber.reply(reply),
            Kind::Durable(_) => {}
        }
    }

    /// The subscriber is gone: what it holds is given to others.
    pub async fn leave(self) {
        match self.kind {
            Kind::Live { pattern, group, subscriber } => {
                self.place.bus.0.live.unsubscribe(&pattern, &group, &subscriber);
            }
            Kind::Durable(seat) => seat.leave().await,
        }
    }
}

/// Counts against the limits while it lives.
#[derive(Debug)]
struct Place {
    bus: Bus,
    id: u64,
    identity: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut subscribed = lock(&self.bus.0.subscribed);
        subscribed.outboxes.remove(&self.id);
        let identity = std::mem::take(&mut self.identity);
        if let Entry::Occupied(mut of_one) = subscribed.of_identity.entry(identity) {
            *of_one.get_mut() -= 1;
            if *of_one.get() == 0 {
                of_one.remove();
            }
        }
    }
}

struct Waiting<'a>(&'a AtomicU64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inner {
    /// Hears of what other cores publish.
    async fn listen(&self) {
        loop {
            self.groups.wake_all();
            self.store.other_core_committed().await;
        }
    }
}

/// Removes what is too old, from time to time.
async fn trim(store: Store, limits: StreamLimits) {
    let mut ticks = tokio::time::interval(TRIM_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = trim_all(&store, limits).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "cannot remove old messages");
        }
    }
}

async fn trim_all(store: &Store, limits: StreamLimits) -> Result<(), StoreError> {
    store.forget_message_ids().await?;
    for stream in store.streams().await? {
        store.trim(&stream.name, limits).await?;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
