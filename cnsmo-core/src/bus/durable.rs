//! Durable queue groups: one task for each with members on this core.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cnsmo_proto::pb::bus::{Ack, Delivery, Message, ack};
use futures::future::{BoxFuture, FutureExt as _, OptionFuture};
use prost::Message as _;
use prost_types::Timestamp;
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep_until},
};
use tonic::Status;

use super::{
    BusConfig, BusError, lock,
    outbox::{Item, Outbox},
    share::Turns,
};
use crate::store::{
    Sequence, Store, StoreError,
    message::{Claim, Claimed, Serve, Served, Settle, Settlement},
};

/// What members say and the task has not heard yet. One more waits.
const COMMANDS_MAX: usize = 1_024;
/// Messages that are given out, or settled, in one commit.
const SERVE_ROWS_MAX: usize = 512;
/// Bytes of messages that are given out in one commit.
const SERVE_BYTES_MAX: usize = 4 << 20;
/// Messages that one member has not acknowledged. It gets no more before it does.
const HELD_MAX: usize = 16_384;
/// Pause after the store failed.
const RETRY: Duration = Duration::from_millis(200);
/// Longest time until a member says that a message shall be given again.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(24 * 3_600);

/// All groups with members here, by stream and name.
#[derive(Debug)]
pub(super) struct Groups {
    store: Store,
    config: BusConfig,
    tasks: Arc<Mutex<Tasks>>,
    next_member: AtomicU64,
}

type Tasks = HashMap<String, HashMap<String, Handle>>;

#[derive(Clone, Debug)]
struct Handle {
    commands: mpsc::Sender<Command>,
    signals: Arc<Signals>,
}

#[derive(Debug, Default)]
struct Signals {
    /// There may be more messages.
    published: Notify,
    /// A member takes more messages.
    freed: Arc<Notify>,
    members: AtomicUsize,
}

#[derive(Debug)]
enum Command {
    Join { id: u64, weight: u32, ack_wait: Duration, outbox: Arc<Outbox> },
    Settle { id: u64, ack: Ack },
    Leave { id: u64 },
}

/// A member's place in its group.
#[derive(Debug)]
pub(super) struct Seat {
    id: u64,
    handle: Handle,
}

impl Groups {
    pub(super) fn new(store: Store, config: BusConfig) -> Self {
        Self { store, config, tasks: Arc::default(), next_member: AtomicU64::new(0) }
    }

    /// The outbox becomes that of a member; the group is in the store.
    pub(super) fn join(
        &self,
        stream: &str,
        group: &str,
        weight: u32,
        ack_wait: Duration,
        outbox: Arc<Outbox>,
    ) -> Result<Seat, BusError> {
        let id = self.next_member.fetch_add(1, Ordering::Relaxed) + 1;
        let mut tasks = lock(&self.tasks);
        let groups = tasks.entry(stream.to_owned()).or_default();
        // A task that ends takes itself out of the map, under this lock.
        let handle =
            groups.entry(group.to_owned()).or_insert_with(|| self.start(stream, group)).clone();
        outbox.tell_room(handle.signals.freed.clone());
        let join = Command::Join { id, weight, ack_wait, outbox };
        handle.commands.try_send(join).map_err(|_| {
            BusError::Exhausted(format!("queue group {group} of stream {stream} is busy"))
        })?;
        handle.signals.members.fetch_add(1, Ordering::Relaxed);
        Ok(Seat { id, handle })
    }

    /// There is something new in the stream.
    pub(super) fn wake(&self, stream: &str) {
        let tasks = lock(&self.tasks);
        for handle in tasks.get(stream).into_iter().flat_map(HashMap::values) {
            handle.signals.published.notify_one();
        }
    }

    /// Other cores may have published.
    pub(super) fn wake_all(&self) {
        for handle in lock(&self.tasks).values().flat_map(HashMap::values) {
            handle.signals.published.notify_one();
        }
    }

    pub(super) fn members(&self, stream: &str, group: &str) -> usize {
        let tasks = lock(&self.tasks);
        let handle = tasks.get(stream).and_then(|groups| groups.get(group));
        handle.map_or(0, |handle| handle.signals.members.load(Ordering::Relaxed))
    }

    fn start(&self, stream: &str, group: &str) -> Handle {
        let (commands, heard) = mpsc::channel(COMMANDS_MAX);
        let signals = Arc::<Signals>::default();
        let task = Task {
            store: self.store.clone(),
            config: self.config.clone(),
            stream: stream.to_owned(),
            group: group.to_owned(),
            tasks: self.tasks.clone(),
            commands: heard,
            signals: signals.clone(),
            members: Vec::new(),
            turns: Turns::default(),
            ack_wait: Duration::ZERO,
            settled: BTreeMap::new(),
            maybe: true,
            due: None,
            paused: None,
        };
        tokio::spawn(task.run());
        Handle { commands, signals }
    }
}

impl Seat {
    /// The member has more credit.
    pub(super) fn granted(&self) {
        self.handle.signals.freed.notify_one();
    }

    pub(super) async fn settle(&self, ack: Ack) {
        // The task has ended: so has the stream of the member.
        let _ = self.handle.commands.send(Command::Settle { id: self.id, ack }).await;
    }

    pub(super) async fn leave(self) {
        self.handle.signals.members.fetch_sub(1, Ordering::Relaxed);
        let _ = self.handle.commands.send(Command::Leave { id: self.id }).await;
    }
}

struct Member {
    id: u64,
    outbox: Arc<Outbox>,
    held: HashMap<Sequence, Held>,
}

#[derive(Clone, Copy)]
struct Held {
    attempt: i64,
    /// As the store has it, about: the store decides.
    deadline_ms: i64,
}

impl Member {
    fn free(&self) -> usize {
        self.outbox.free().min(HELD_MAX.saturating_sub(self.held.len()))
    }
}

struct Task {
    store: Store,
    config: BusConfig,
    stream: String,
    group: String,
    tasks: Arc<Mutex<Tasks>>,
    commands: mpsc::Receiver<Command>,
    signals: Arc<Signals>,
    members: Vec<Member>,
    turns: Turns,
    /// As the newest member wants it.
    ack_wait: Duration,
    /// What was said and the store does not know yet, the last of each message.
    settled: BTreeMap<Sequence, Settle>,
    /// The store may have more messages.
    maybe: bool,
    /// When it may have more if nothing happens.
    due: Option<Instant>,
    /// The store failed: not before this.
    paused: Option<Instant>,
}

type Answer = (Vec<Settle>, Result<Served, StoreError>);

/// Nothing is left to do.
struct Ended;

impl Task {
    async fn run(mut self) {
        let mut asked: Option<BoxFuture<'static, Answer>> = None;
        let signals = self.signals.clone();
        loop {
            if asked.is_none() && self.paused.is_none() {
                asked = self.ask();
            }
            if asked.is_none() && self.settled.is_empty() && self.try_end() {
                return;
            }
            let alarm = self.paused.or(self.due);
            tokio::select! {
                Some(command) = self.commands.recv() => self.hear(command),
                Some((settled, answer)) = OptionFuture::from(asked.as_mut()) => {
                    asked = None;
                    if self.told(settled, answer).is_err() {
                        return self.leave_map();
                    }
                }
                () = signals.published.notified() => self.maybe = true,
                () = signals.freed.notified() => {}
                () = sleep_until(alarm.unwrap_or_else(Instant::now)), if alarm.is_some() => {
                    if self.paused.take().is_none() {
                        self.due = None;
                        self.maybe = true;
                        self.expire();
                    }
                }
            }
        }
    }

    /// Asks the store for what there is to do.
    fn ask(&mut self) -> Option<BoxFuture<'static, Answer>> {
        let free: usize = self.members.iter().map(Member::free).sum();
        // An acknowledgement may let the next message of its key go.
        let wants = free > 0 && (self.maybe || !self.settled.is_empty());
        if self.settled.is_empty() && !wants {
            return None;
        }
        let mut settled = std::mem::take(&mut self.settled);
        if let Some(key) = settled.keys().nth(SERVE_ROWS_MAX).copied() {
            self.settled = settled.split_off(&key);
        }
        let settled: Vec<Settle> = settled.into_values().collect();
        let claim = Claim { rows: free.min(SERVE_ROWS_MAX), bytes: SERVE_BYTES_MAX };
        if wants {
            self.maybe = false;
        }
        let serve = Serve {
            stream: self.stream.clone(),
            group: self.group.clone(),
            holder: self.config.holder.clone(),
            settled: settled.clone(),
            claim: wants.then_some(claim),
            limits: self.config.limits,
        };
        let store = self.store.clone();
        Some(async move { (settled, store.serve(serve).await) }.boxed())
    }

    fn told(
        &mut self,
        settled: Vec<Settle>,
        answer: Result<Served, StoreError>,
    ) -> Result<(), Ended> {
        let served = match answer {
            Ok(served) => served,
            Err(StoreError::Closed) => {
                self.end_members(&Status::unavailable("the core is shutting down"));
                return Err(Ended);
            }
            Err(error) => {
                let (stream, group) = (&self.stream, &self.group);
                let error = &error as &dyn std::error::Error;
                tracing::warn!(stream, group, error, "cannot serve a queue group");
                for settle in settled {
                    self.settled.entry(settle.sequence).or_insert(settle);
                }
                self.maybe = true;
                self.paused = Some(Instant::now() + RETRY);
                return Ok(());
            }
        };
        if served.gone {
            let (stream, group) = (&self.stream, &self.group);
            let text = format!("queue group {group} of stream {stream} was deleted");
            self.end_members(&Status::not_found(text));
            return Err(Ended);
        }
        self.maybe |= served.more;
        if let Some(due_ms) = served.next_due_ms {
            self.wait_for(due_ms);
        }
        if served.claimed.iter().any(|claimed| claimed.attempt > 1) {
            self.expire();
        }
        self.give(served.claimed);
        Ok(())
    }

    fn hear(&mut self, command: Command) {
        match command {
            Command::Join { id, weight, ack_wait, outbox } => {
                self.members.push(Member { id, outbox, held: HashMap::new() });
                self.turns.push(weight);
                self.ack_wait = ack_wait;
                self.maybe = true;
            }
            Command::Settle { id, ack } => self.settle(id, ack),
            Command::Leave { id } => {
                let Some(at) = self.members.iter().position(|member| member.id == id) else {
                    return;
                };
                let member = self.members.swap_remove(at);
                self.turns.swap_remove(at);
                for (sequence, Held { attempt, .. }) in member.held {
                    self.say(sequence, attempt, Settlement::Retry { delay_ms: 0 });
                }
                self.maybe = true;
            }
        }
    }

    fn settle(&mut self, id: u64, ack: Ack) {
        let Some(member) = self.members.iter_mut().find(|member| member.id == id) else { return };
        let Some(held) = member.held.remove(&ack.sequence) else { return };
        let settlement = match ack.result() {
            ack::Result::Unspecified | ack::Result::Ack => Settlement::Ack,
            ack::Result::Reject => Settlement::Reject { reason: ack.reason },
            ack::Result::Retry => {
                let delay = ack.retry_delay.and_then(|delay| Duration::try_from(delay).ok());
                let delay = delay.unwrap_or_default().min(RETRY_DELAY_MAX);
                let delay_ms = millis(delay);
                self.wait_for(now_ms().saturating_add(delay_ms));
                Settlement::Retry { delay_ms }
            }
            ack::Result::InProgress => {
                let deadline_ms = now_ms().saturating_add(millis(self.ack_wait));
                member.held.insert(ack.sequence, Held { deadline_ms, ..held });
                Settlement::Extend
            }
        };
        self.say(ack.sequence, held.attempt, settlement);
    }

    fn say(&mut self, sequence: Sequence, attempt: i64, settlement: Settlement) {
        self.settled.insert(sequence, Settle { sequence, attempt, settlement });
    }

    /// Shares messages out.
    fn give(&mut self, claimed: Vec<Claimed>) {
        let mut free: Vec<usize> = self.members.iter().map(Member::free).collect();
        for Claimed { sequence, attempt, publish_ms, deadline_ms, body } in claimed {
            let message = match Message::decode(body) {
                Ok(message) => message,
                Err(error) => {
                    tracing::error!(stream = self.stream, sequence, %error, "a message is damaged");
                    let reason = "the message cannot be read".to_owned();
                    self.say(sequence, attempt, Settlement::Reject { reason });
                    continue;
                }
            };
            let delivery = Box::new(Delivery {
                message: Some(message),
                sequence,
                attempt: u32::try_from(attempt).unwrap_or(u32::MAX),
                publish_time: timestamp(publish_ms),
                ..Delivery::default()
            });
            let next = self.turns.next(|at| free[at] > 0);
            let given = next.is_some_and(|at| {
                free[at] -= 1;
                self.members[at].outbox.try_push(Item::Durable(delivery)).is_ok()
            });
            match next {
                Some(at) if given => {
                    self.members[at].held.insert(sequence, Held { attempt, deadline_ms });
                }
                _ => {
                    self.say(sequence, attempt, Settlement::Return);
                    self.maybe = true;
                }
            }
        }
    }

    /// Members no longer hold what their time is over for.
    fn expire(&mut self) {
        let now = now_ms();
        for member in &mut self.members {
            member.held.retain(|_, held| held.deadline_ms > now);
        }
    }

    fn wait_for(&mut self, due_ms: i64) {
        let left = u64::try_from(due_ms.saturating_sub(now_ms())).unwrap_or(0);
        // One millisecond later it is due for sure.
        let due = Instant::now() + Duration::from_millis(left + 1);
        self.due = Some(self.due.map_or(due, |earlier| earlier.min(due)));
    }

    /// Whether the task ends: it has no members, and nobody can have joined.
    fn try_end(&mut self) -> bool {
        if !self.members.is_empty() {
            return false;
        }
        let tasks = self.tasks.clone();
        let mut tasks = lock(&tasks);
        if let Ok(command) = self.commands.try_recv() {
            self.hear(command);
            return false;
        }
        remove(&mut tasks, &self.stream, &self.group);
        true
    }

    fn leave_map(&mut self) {
        let tasks = self.tasks.clone();
        let mut tasks = lock(&tasks);
        // Who joined meanwhile must try again.
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Join { outbox, .. } = command {
                outbox.end(Status::unavailable("the queue group has just ended: subscribe again"));
            }
        }
        remove(&mut tasks, &self.stream, &self.group);
    }

    fn end_members(&mut self, reason: &Status) {
        for member in &self.members {
            member.outbox.end(reason.clone());
        }
    }
}

fn remove(tasks: &mut Tasks, stream: &str, group: &str) {
    if let Some(groups) = tasks.get_mut(stream) {
        groups.remove(group);
        if groups.is_empty() {
            tasks.remove(stream);
        }
    }
}

fn now_ms() -> i64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// Of milliseconds since 1970.
pub(crate) fn timestamp(ms: i64) -> Option<Timestamp> {
    let nanos = i32::try_from(ms.rem_euclid(1_000) * 1_000_000).ok()?;
    Some(Timestamp { seconds: ms.div_euclid(1_000), nanos })
}
