//! Ephemeral messages and requests: from memory to whom they reach now, on this core.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use cnsmo_proto::pb::bus::{Message, Reply};
use tokio::sync::{Notify, oneshot};

use super::{
    index::{Index, Keep},
    outbox::{Item, Outbox},
    share::Turns,
};
use crate::subject::{Pattern, Subject};

/// A request that waits for credit looks again this often: another group may have appeared.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// All subscribers of this core.
#[derive(Debug, Default)]
pub(super) struct Live {
    index: RwLock<Index<Leaf>>,
    turn: AtomicUsize,
    requests: AtomicU64,
}

/// Subscribers of one pattern.
#[derive(Debug, Default)]
struct Leaf {
    alone: Vec<Arc<Subscriber>>,
    groups: Vec<Arc<Group>>,
}

/// One subscriber.
#[derive(Debug)]
pub(super) struct Subscriber {
    /// Named in replies.
    pub(super) member: String,
    pub(super) outbox: Arc<Outbox>,
    /// Position among those of the same leaf or group; changed under the index' lock.
    place: AtomicUsize,
    waiters: Arc<Waiters>,
    /// Requests that it was given and has not answered.
    pending: Mutex<Pending>,
}

#[derive(Debug, Default)]
struct Pending {
    requests: HashMap<u64, oneshot::Sender<Answer>>,
    left: bool,
}

/// What becomes of a request that was given to a subscriber.
#[derive(Debug)]
enum Answer {
    Reply(Reply),
    /// The subscriber left before the request was sent to it.
    Unsent,
    /// The subscriber left, and may have worked on it.
    Lost,
}

#[derive(Debug)]
struct Group {
    name: String,
    members: Mutex<Members>,
    waiters: Arc<Waiters>,
}

#[derive(Debug, Default)]
struct Members {
    subscribers: Vec<Arc<Subscriber>>,
    turns: Turns,
}

/// Requests that wait until a subscriber of theirs has credit.
#[derive(Debug, Default)]
struct Waiters {
    count: AtomicUsize,
    freed: Notify,
}

impl Waiters {
    fn wake(&self, upto: usize) {
        for _ in 0..upto.min(self.count.load(Ordering::Acquire)) {
            self.freed.notify_one();
        }
    }
}

/// Why a request has no reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Nobody could have got it.
    #[error("nobody on this core subscribes to {0}")]
    NoSubscriber(String),
    /// It was not given to anybody in its time.
    #[error("all subscribers of {0} are busy: none had credit in time")]
    Busy(String),
    /// It was given to a subscriber, and there was no reply in its time.
    #[error("{member} has not replied in time")]
    NoReply {
        /// Who.
        member: String,
    },
    /// The subscriber left without a reply.
    #[error("{member} went away and may have worked on the request")]
    Lost {
        /// Who.
        member: String,
    },
    /// The subscriber says that it failed.
    #[error("{reason}")]
    Failed {
        /// In its words.
        reason: String,
    },
}

/// A reply, and who gave it.
#[derive(Clone, Debug, PartialEq)]
pub struct Served {
    /// The reply.
    pub reply: Reply,
    /// Member name of the subscriber.
    pub served_by: String,
}

impl Live {
    /// From now on messages of the pattern reach the outbox. An empty group: all of them.
    pub(super) fn subscribe(
        &self,
        pattern: &Pattern,
        group: &str,
        weight: u32,
        member: String,
        outbox: Arc<Outbox>,
    ) -> Arc<Subscriber> {
        let subscriber = |place, waiters| {
            let (place, pending) = (AtomicUsize::new(place), Mutex::default());
            Arc::new(Subscriber { member, outbox, place, waiters, pending })
        };
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let leaf = index.entry(pattern);
        if group.is_empty() {
            let subscriber = subscriber(leaf.alone.len(), Arc::default());
            leaf.alone.push(subscriber.clone());
            return subscriber;
        }
        let at = leaf.groups.iter().position(|known| known.name == group).unwrap_or_else(|| {
            let (members, waiters) = (Mutex::default(), Arc::default());
            leaf.groups.push(Arc::new(Group { name: group.to_owned(), members, waiters }));
            leaf.groups.len() - 1
        });
        let group = &leaf.groups[at];
        let mut members = lock(&group.members);
        let subscriber = subscriber(members.subscribers.len(), group.waiters.clone());
        members.subscribers.push(subscriber.clone());
        members.turns.push(weight);
        subscriber
    }

    /// Nothing reaches the subscriber any longer; its requests are given to others or fail.
    pub(super) fn unsubscribe(&self, pattern: &Pattern, group: &str, subscriber: &Subscriber) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        index.change(pattern, |leaf| {
            leaf.remove(group, subscriber.place.load(Ordering::Relaxed));
            if leaf.alone.is_empty() && leaf.groups.is_empty() { Keep::No } else { Keep::Yes }
        });
        drop(index);
        subscriber.leave();
    }

    /// Gives the message to all that want it and can take it. Returns how many subscribers and groups that were.
    pub(super) fn publish(&self, subject: Subject<'_>, message: &Arc<Message>) -> u32 {
        let mut receivers = 0;
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.visit(subject, &mut |leaf| {
            for subscriber in &leaf.alone {
                receivers += u32::from(subscriber.outbox.offer(Item::Live(message.clone())));
            }
            for group in &leaf.groups {
                receivers += u32::from(group.offer(message));
            }
        });
        receivers
    }

    /// Gives the message to one subscriber and waits for its reply.
    pub(super) async fn request(
        &self,
        message: Arc<Message>,
        deadline: Instant,
        idempotent: bool,
    ) -> Result<Served, RequestError> {
        loop {
            let (subscriber, answer) = self.hand_over(&message, deadline).await?;
            let forget = Forget(&subscriber.0, subscriber.1);
            let member = subscriber.0.member.clone();
            match tokio::time::timeout_at(deadline.into(), answer).await {
                Err(_) => return Err(RequestError::NoReply { member }),
                Ok(Ok(Answer::Reply(reply))) if reply.error.is_empty() => {
                    return Ok(Served { reply, served_by: member });
                }
                Ok(Ok(Answer::Reply(reply))) => {
                    return Err(RequestError::Failed { reason: reply.error });
                }
                Ok(Ok(Answer::Unsent)) => {}
                Ok(Ok(Answer::Lost) | Err(_)) if idempotent => {}
                Ok(Ok(Answer::Lost) | Err(_)) => return Err(RequestError::Lost { member }),
            }
            drop(forget);
        }
    }

    /// Waits until a subscriber takes it.
    async fn hand_over(
        &self,
        message: &Arc<Message>,
        deadline: Instant,
    ) -> Result<((Arc<Subscriber>, u64), oneshot::Receiver<Answer>), RequestError> {
        let name = || message.subject.clone();
        let subject = Subject::parse(&message.subject)
            .map_err(|_| RequestError::NoSubscriber(message.subject.clone()))?;
        let id = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        loop {
            let targets = self.targets(subject);
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let Some(first) = targets.get(turn % targets.len().max(1)) else {
                return Err(RequestError::NoSubscriber(name()));
            };
            // Before it looks for credit: what is granted in between must wake it.
            let waiters = first.waiters().clone();
            waiters.count.fetch_add(1, Ordering::AcqRel);
            let waiting = Waiting(&waiters);
            let freed = waiters.freed.notified();
            for at in 0..targets.len() {
                let target = &targets[(turn + at) % targets.len()];
                if let Some((subscriber, answer)) = target.hand_over(message, id, deadline) {
                    return Ok(((subscriber, id), answer));
                }
            }
            if Instant::now() >= deadline {
                return Err(RequestError::Busy(name()));
            }
            let again = deadline.min(Instant::now() + LOOK_AGAIN);
            // Freed or not, it looks again.
            let _ = tokio::time::timeout_at(again.into(), freed).await;
            drop(waiting);
        }
    }

    fn targets(&self, subject: Subject<'_>) -> Vec<Target> {
        let mut targets = Vec::new();
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.visit(subject, &mut |leaf| {
            targets.extend(leaf.groups.iter().cloned().map(Target::Group));
            targets.extend(leaf.alone.iter().cloned().map(Target::Alone));
        });
        targets
    }
}

impl Leaf {
    fn remove(&mut self, group: &str, place: usize) {
        if group.is_empty() {
            remove(&mut self.alone, place);
            return;
        }
        let Some(at) = self.groups.iter().position(|known| known.name == group) else { return };
        let mut members = lock(&self.groups[at].members);
        remove(&mut members.subscribers, place);
        members.turns.swap_remove(place);
        let is_empty = members.subscribers.is_empty();
        drop(members);
        // Requests that waited for this member look for another one.
        self.groups[at].waiters.wake(usize::MAX);
        if is_empty {
            self.groups.swap_remove(at);
        }
    }
}

fn remove(subscribers: &mut Vec<Arc<Subscriber>>, place: usize) {
    if place < subscribers.len() {
        subscribers.swap_remove(place);
    }
    if let Some(moved) = subscribers.get(place) {
        moved.place.store(place, Ordering::Relaxed);
    }
}

impl Group {
    fn offer(&self, message: &Arc<Message>) -> bool {
        let mut members = lock(&self.members);
        let Members { subscribers, turns } = &mut *members;
        // If all are too slow, one of them is told that it missed this one.
        let next = turns
            .next(|at| subscribers[at].outbox.free() > 0)
            .or_else(|| turns.next(|_| true))
            .and_then(|at| subscribers.get(at));
        next.is_some_and(|subscriber| subscriber.outbox.offer(Item::Live(message.clone())))
    }
}

impl Subscriber {
    /// Requests that waited for this credit get it.
    pub(super) fn granted(&self, messages: u32) {
        self.waiters.wake(messages as usize);
    }

    /// Hands a reply to whom it is for; one that nobody waits for any more is dropped.
    pub(super) fn reply(&self, reply: Reply) {
        let waiting = lock(&self.pending).requests.remove(&reply.reply_id);
        if let Some(waiting) = waiting {
            let _ = waiting.send(Answer::Reply(reply));
        }
    }

    fn hand_over(
        &self,
        message: &Arc<Message>,
        id: u64,
        deadline: Instant,
    ) -> Option<oneshot::Receiver<Answer>> {
        let (waiting, answer) = oneshot::channel();
        let mut pending = lock(&self.pending);
        if pending.left {
            return None;
        }
        let item = Item::Request { message: message.clone(), reply_id: id, deadline };
        self.outbox.try_push(item).ok()?;
        pending.requests.insert(id, waiting);
        Some(answer)
    }

    fn leave(&self) {
        let mut pending = lock(&self.pending);
        pending.left = true;
        let unsent = self.outbox.unsent_requests();
        for (id, waiting) in pending.requests.drain() {
            let answer = if unsent.contains(&id) { Answer::Unsent } else { Answer::Lost };
            // Who gave up needs no answer.
            let _ = waiting.send(answer);
        }
        drop(pending);
        self.waiters.wake(usize::MAX);
    }
}

enum Target {
    Alone(Arc<Subscriber>),
    Group(Arc<Group>),
}

impl Target {
    fn waiters(&self) -> &Arc<Waiters> {
        match self {
            Self::Alone(subscriber) => &subscriber.waiters,
            Self::Group(group) => &group.waiters,
        }
    }

    fn hand_over(
        &self,
        message: &Arc<Message>,
        id: u64,
        deadline: Instant,
    ) -> Option<(Arc<Subscriber>, oneshot::Receiver<Answer>)> {
        let subscriber = match self {
            Self::Alone(subscriber) => subscriber.clone(),
            Self::Group(group) => {
                let mut members = lock(&group.members);
                let Members { subscribers, turns } = &mut *members;
                let at = turns.next(|at| subscribers[at].outbox.free() > 0)?;
                subscribers.get(at)?.clone()
            }
        };
        let answer = subscriber.hand_over(message, id, deadline)?;
        Some((subscriber, answer))
    }
}

/// A request that nobody waits for any more is not kept.
struct Forget<'a>(&'a Subscriber, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(&self.0.pending).requests.remove(&self.1);
    }
}

struct Waiting<'a>(&'a Waiters);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::AcqRel);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
