//! Actors: state that one task owns, and a bounded mailbox through which everybody else reaches it.
//!
//! An actor works on one message at a time. A panic or an error ends its task, not its mailbox: the caller of that message
//! gets an error, the supervisor starts the actor anew, and the messages that wait are worked on as if nothing had happened.
//!
//! The address of an actor is a subject of the bus, `svc.<type>.<instance>`, and `svc.<type>` means any instance. A caller
//! holds an [`Address`] and does not see whether the actor is in this program or behind the bus.

use std::{
    fmt,
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    sync::{Mutex as AsyncMutex, mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, timeout_at},
};

use crate::{
    lifecycle::{Lifecycle, Phase},
    supervise::{Failure, GaveUp, Limits, Stop, Stopper, stop_pair, supervise},
};

/// What an actor is: state, and what a message does to it.
pub trait Actor: Send + 'static {
    /// What it takes.
    type Message: Send + 'static;
    /// What a message is answered with.
    type Reply: Send + 'static;

    /// Works on one message.
    ///
    /// # Errors
    /// The state cannot be trusted any more: the actor is started anew, and the caller gets an error. What the caller did
    /// wrong is not an error, but a reply.
    fn handle(
        &mut self,
        message: Self::Message,
    ) -> impl Future<Output = Result<Self::Reply, Failure>> + Send;
}

/// Why a message was not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The mailbox was full until the deadline. The message was not taken.
    #[error("the mailbox is full")]
    Full,
    /// The message was taken; the answer did not come before the deadline.
    #[error("no answer in time")]
    TimedOut,
    /// The actor failed while it worked on the message: how far it came is not known.
    #[error("the actor failed at this message")]
    Aborted,
    /// The actor stops, has stopped or was given up. The message was not worked on.
    #[error("the actor has stopped")]
    Stopped,
}

/// How to reach an actor of messages `M`, wherever it is.
pub trait Address<M, R>: Send + Sync {
    /// Sends a message and waits for the answer, until `deadline` at most.
    ///
    /// # Errors
    /// See [`CallError`].
    fn ask(
        &self,
        message: M,
        deadline: Instant,
    ) -> impl Future<Output = Result<R, CallError>> + Send;

    /// Sends a message and waits for nothing.
    ///
    /// # Errors
    /// [`CallError::Full`] or [`CallError::Stopped`].
    fn tell(&self, message: M) -> impl Future<Output = Result<(), CallError>> + Send;
}

/// How an actor is run.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Messages that wait; a further one finds the mailbox full.
    pub mailbox: usize,
    /// Restarts, and how long a stopping actor may work on what waits.
    pub limits: Limits,
}

/// An actor that runs under a supervisor.
#[derive(Debug)]
pub struct Running<A: Actor> {
    mailbox: Mailbox<A>,
    life: Lifecycle,
    stopper: Stopper,
    supervisor: JoinHandle<Result<(), GaveUp>>,
}

/// The address of an actor in this program. Clones reach the same one.
#[derive(Debug)]
pub struct Mailbox<A: Actor> {
    letters: mpsc::Sender<Letter<A>>,
    is_open: Arc<AtomicBool>,
}

impl<A: Actor> Clone for Mailbox<A> {
    fn clone(&self) -> Self {
        Self { letters: self.letters.clone(), is_open: self.is_open.clone() }
    }
}

struct Letter<A: Actor> {
    message: A::Message,
    /// None: nobody waits.
    answer: Option<oneshot::Sender<Result<A::Reply, CallError>>>,
}

impl<A: Actor> fmt::Debug for Letter<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Letter")
    }
}

/// Starts an actor, and each time it has failed again with what `make` returns. `name` is for the log.
pub fn start<A, F>(name: &'static str, settings: Settings, mut make: F) -> Running<A>
where
    A: Actor,
    F: FnMut() -> Result<A, Failure> + Send + 'static,
{
    let (letters, inbox) = mpsc::channel(settings.mailbox.max(1));
    let inbox = Arc::new(AsyncMutex::new(inbox));
    let is_open = Arc::new(AtomicBool::new(true));
    let life = Lifecycle::new("Spawned");
    let (stopper, stop) = stop_pair();
    let (state, open) = (life.clone(), is_open.clone());
    let supervisor = tokio::spawn(async move {
        let runs = inbox.clone();
        let life = state.clone();
        let ended = supervise(name, settings.limits, state, stop, move |stop| {
            let actor = make();
            run(actor, runs.clone(), life.clone(), stop)
        })
        .await;
        open.store(false, Ordering::Release);
        refuse_rest(&mut *inbox.lock().await);
        ended
    });
    Running { mailbox: Mailbox { letters, is_open }, life, stopper, supervisor }
}

impl<A: Actor> Running<A> {
    /// Its address.
    pub fn mailbox(&self) -> Mailbox<A> {
        self.mailbox.clone()
    }

    /// Its phase, and each change of it.
    pub fn life(&self) -> &Lifecycle {
        &self.life
    }

    /// Takes no more messages, works on those that wait until the deadline of the limits, and answers the rest with
    /// [`CallError::Stopped`].
    ///
    /// # Errors
    /// It had been given up before.
    pub async fn stop(self) -> Result<(), GaveUp> {
        self.mailbox.is_open.store(false, Ordering::Release);
        self.stopper.stop();
        match self.supervisor.await {
            Ok(ended) => ended,
            Err(error) => {
                tracing::error!(%error, "the supervisor of an actor failed");
                Ok(())
            }
        }
    }
}

impl<A: Actor> Address<A::Message, A::Reply> for Mailbox<A> {
    async fn ask(&self, message: A::Message, deadline: Instant) -> Result<A::Reply, CallError> {
        let (answer, answered) = oneshot::channel();
        let place = timeout_at(deadline, self.letters.reserve()).await;
        let place = place.map_err(|_| CallError::Full)?.map_err(|_| CallError::Stopped)?;
        if !self.is_open.load(Ordering::Acquire) {
            return Err(CallError::Stopped);
        }
        place.send(Letter { message, answer: Some(answer) });
        match timeout_at(deadline, answered).await {
            Ok(Ok(answer)) => answer,
            // Dropped without a word: its task ended with it under work, or the mailbox with it inside.
            Ok(Err(_)) if self.is_open.load(Ordering::Acquire) => Err(CallError::Aborted),
            Ok(Err(_)) => Err(CallError::Stopped),
            Err(_) => Err(CallError::TimedOut),
        }
    }

    async fn tell(&self, message: A::Message) -> Result<(), CallError> {
        if !self.is_open.load(Ordering::Acquire) {
            return Err(CallError::Stopped);
        }
        let letter = Letter { message, answer: None };
        self.letters.try_send(letter).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => CallError::Full,
            mpsc::error::TrySendError::Closed(_) => CallError::Stopped,
        })
    }
}

/// One life of the actor.
async fn run<A: Actor>(
    actor: Result<A, Failure>,
    inbox: Arc<AsyncMutex<mpsc::Receiver<Letter<A>>>>,
    life: Lifecycle,
    mut stop: Stop,
) -> Result<(), Failure> {
    let mut actor = actor?;
    // Free: the last life's task has ended, and its guard with it.
    let mut inbox = inbox.lock().await;
    if let Err(error) = life.step(Phase::Ready, "Healthy", "") {
        // A stop came first.
        tracing::debug!(%error, "actor is not ready");
    }
    loop {
        let letter = tokio::select! {
            letter = inbox.recv() => letter,
            () = stop.asked() => {
                // What has a place already still comes; then the channel says that it was all.
                inbox.close();
                inbox.recv().await
            }
        };
        let Some(Letter { message, answer }) = letter else { return Ok(()) };
        let under_work = UnderWork(Mutex::new(answer));
        let reply = actor.handle(message).await;
        match reply {
            Ok(reply) => under_work.answer(Ok(reply)),
            Err(error) => {
                under_work.answer(Err(CallError::Aborted));
                return Err(error);
            }
        }
    }
}

/// The caller of the message under work, who is told also if the task is dropped or panics.
struct UnderWork<R>(Mutex<Option<oneshot::Sender<Result<R, CallError>>>>);

impl<R> UnderWork<R> {
    fn answer(&self, reply: Result<R, CallError>) {
        let answer = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(answer) = answer {
            // The caller waits no more.
            let _ = answer.send(reply);
        }
    }
}

impl<R> Drop for UnderWork<R> {
    fn drop(&mut self) {
        self.answer(Err(CallError::Aborted));
    }
}

fn refuse_rest<A: Actor>(inbox: &mut mpsc::Receiver<Letter<A>>) {
    inbox.close();
    while let Ok(letter) = inbox.try_recv() {
        if let Some(answer) = letter.answer {
            let _ = answer.send(Err(CallError::Stopped));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{sync::Semaphore, time::sleep};

    use super::*;

    const SETTINGS: Settings = Settings {
        mailbox: 8,
        limits: Limits {
            first_delay: Duration::from_millis(10),
            longest_delay: Duration::from_millis(40),
            restarts_max: 3,
            window: Duration::from_secs(60),
            stop_deadline: Duration::from_secs(5),
        },
    };

    /// Counts, and fails on request.
    struct Counter {
        total: u64,
        gate: Arc<Semaphore>,
    }

    enum Say {
        Add,
        Panic,
        Fail,
        /// Works until the gate opens.
        Wait,
    }

    impl Actor for Counter {
        type Message = Say;
        type Reply = u64;

        async fn handle(&mut self, message: Say) -> Result<u64, Failure> {
            match message {
                Say::Add => {
                    let before = self.total;
                    tokio::task::yield_now().await;
                    self.total = before + 1;
                }
                Say::Panic => panic!("on request"),
                Say::Fail => return Err("on request".into()),
                Say::Wait => self.gate.acquire().await?.forget(),
            }
            Ok(self.total)
        }
    }

    fn counter() -> (Running<Counter>, Arc<Semaphore>) {
        let gate = Arc::new(Semaphore::new(0));
        let at_gate = gate.clone();
        let make = move || Ok(Counter { total: 0, gate: at_gate.clone() });
        (start("counter", SETTINGS, make), gate)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_concurrent_increments_are_a_thousand() {
        let (running, _gate) = counter();
        let asks: Vec<_> = (0..1_000)
            .map(|_| {
                let mailbox = running.mailbox();
                tokio::spawn(async move { mailbox.ask(Say::Add, soon()).await })
            })
            .collect();
        let mut answers = Vec::new();
        for ask in asks {
            answers.push(ask.await.unwrap().unwrap());
        }
        answers.sort_unstable();
        assert_eq!(answers, (1..=1_000).collect::<Vec<_>>(), "one message at a time");
        running.stop().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn others_work_on_while_one_is_blocked() {
        let (blocked, gate) = counter();
        let (a, b) = (counter(), counter());
        let mailbox = blocked.mailbox();
        let waiting = tokio::spawn(async move { mailbox.ask(Say::Wait, soon()).await });
        for other in [&a.0, &b.0] {
            assert_eq!(other.mailbox().ask(Say::Add, soon()).await, Ok(1));
        }
        assert!(!waiting.is_finished());
        gate.add_permits(1);
        assert_eq!(waiting.await.unwrap(), Ok(0));
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_costs_its_own_message_and_no_other() {
        for (failing, failure) in [(Say::Panic, "panicked: on request"), (Say::Fail, "on request")]
        {
            let (running, gate) = counter();
            let (other, _) = counter();
            let mailbox = running.mailbox();
            let ask = |message| {
                let mailbox = mailbox.clone();
                tokio::spawn(async move { mailbox.ask(message, soon()).await })
            };
            let mut phases = running.life().watch();
            let mut asks = vec![ask(Say::Wait), ask(failing), ask(Say::Add), ask(Say::Add)];
            sleep(Duration::from_millis(1)).await;
            gate.add_permits(1);
            let failed = phases.wait_for(|state| state.phase == Phase::Failed).await.unwrap();
            assert_eq!(failed.message, failure);
            drop(failed);
            let mut answers = Vec::new();
            for ask in asks.drain(..) {
                answers.push(ask.await.unwrap());
            }
            assert_eq!(answers, [Ok(0), Err(CallError::Aborted), Ok(1), Ok(2)]);
            assert_eq!(other.mailbox().ask(Say::Add, soon()).await, Ok(1), "others are untouched");
            assert_eq!(running.life().phase(), Phase::Ready);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_keeps_failing_is_given_up_and_says_so() {
        let (running, _gate) = counter();
        let mailbox = running.mailbox();
        for _ in 0..=SETTINGS.limits.restarts_max {
            assert_eq!(mailbox.ask(Say::Fail, soon()).await, Err(CallError::Aborted));
        }
        let mut phases = running.life().watch();
        phases.wait_for(|state| state.phase == Phase::Failed).await.unwrap();
        assert_eq!(mailbox.ask(Say::Add, soon()).await, Err(CallError::Stopped));
        assert_eq!(mailbox.tell(Say::Add).await, Err(CallError::Stopped));
        let error = running.stop().await.unwrap_err().to_string();
        assert!(error.starts_with("counter failed 4 times"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_mailbox_is_waited_for_until_the_deadline() {
        let (running, gate) = counter();
        let mailbox = running.mailbox();
        mailbox.tell(Say::Wait).await.unwrap();
        sleep(Duration::from_millis(1)).await;
        for _ in 0..SETTINGS.mailbox {
            mailbox.tell(Say::Add).await.unwrap();
        }
        assert_eq!(mailbox.tell(Say::Add).await, Err(CallError::Full));
        assert_eq!(mailbox.ask(Say::Add, soon()).await, Err(CallError::Full));
        let waiting = {
            let mailbox = mailbox.clone();
            tokio::spawn(async move { mailbox.ask(Say::Add, soon()).await })
        };
        sleep(Duration::from_millis(1)).await;
        gate.add_permits(1);
        assert_eq!(waiting.await.unwrap(), Ok(9), "it waited for a place");
        mailbox.tell(Say::Wait).await.unwrap();
        assert_eq!(mailbox.ask(Say::Add, soon()).await, Err(CallError::TimedOut));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_drains_until_the_deadline_and_tells_the_rest() {
        for (opens, drained) in [(true, Ok(1)), (false, Err(CallError::Stopped))] {
            let (running, gate) = counter();
            let mailbox = running.mailbox();
            let asks = [Say::Wait, Say::Add].map(|message| {
                let mailbox = mailbox.clone();
                tokio::spawn(async move { mailbox.ask(message, soon()).await })
            });
            sleep(Duration::from_millis(1)).await;
            let stopping = tokio::spawn(running.stop());
            sleep(Duration::from_millis(1)).await;
            assert_eq!(mailbox.ask(Say::Add, soon()).await, Err(CallError::Stopped));
            if opens {
                gate.add_permits(1);
            }
            stopping.await.unwrap().unwrap();
            let [under_work, waiting] = asks;
            let first = if opens { Ok(0) } else { Err(CallError::Aborted) };
            assert_eq!(under_work.await.unwrap(), first);
            assert_eq!(waiting.await.unwrap(), drained);
        }
    }
}
