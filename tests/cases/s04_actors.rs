//! Actors on a runtime of several threads.

use std::{sync::Arc, time::Duration};

use cnsmo_service::{
    actor::{Actor, Address as _, CallError, Mailbox, Running, Settings, start},
    lifecycle::Phase,
    supervise::{Failure, Limits},
};
use tokio::{sync::Semaphore, task::JoinSet, time::Instant};

use super::programs::{PATIENCE, in_time};

const INCREMENTS: u64 = 1_000;
const SETTINGS: Settings = Settings {
    mailbox: 64,
    limits: Limits {
        first_delay: Duration::from_millis(10),
        longest_delay: Duration::from_millis(100),
        restarts_max: 10,
        window: Duration::from_secs(60),
        stop_deadline: Duration::from_secs(5),
    },
};

/// Counts in two steps, between which others run: two at once would lose counts.
struct Counter {
    total: u64,
    gate: Arc<Semaphore>,
}

#[derive(Clone, Copy)]
enum Say {
    Add,
    /// Is worked on until the gate opens.
    Wait,
    Panic,
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
            Say::Wait => self.gate.acquire().await?.forget(),
            Say::Panic => panic!("on request"),
        }
        Ok(self.total)
    }
}

fn counter() -> (Running<Counter>, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let of_actor = gate.clone();
    let running =
        start("counter", SETTINGS, move || Ok(Counter { total: 0, gate: of_actor.clone() }));
    (running, gate)
}

async fn ask(mailbox: &Mailbox<Counter>, say: Say) -> Result<u64, CallError> {
    mailbox.ask(say, Instant::now() + PATIENCE).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn s04_a_thousand_concurrent_increments_are_a_thousand() {
    let (running, _gate) = counter();
    let mut asks = JoinSet::new();
    for _ in 0..INCREMENTS {
        let mailbox = running.mailbox();
        asks.spawn(async move { ask(&mailbox, Say::Add).await.unwrap() });
    }
    let mut answers = asks.join_all().await;
    answers.sort_unstable();
    assert_eq!(answers, (1..=INCREMENTS).collect::<Vec<_>>());
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s04_two_work_on_while_a_third_is_blocked() {
    let (blocked, gate) = counter();
    let (a, b) = (counter(), counter());
    let mailbox = blocked.mailbox();
    let waiting = tokio::spawn(async move { ask(&mailbox, Say::Wait).await });
    for n in 1..=100 {
        for other in [&a.0, &b.0] {
            assert_eq!(ask(&other.mailbox(), Say::Add).await, Ok(n));
        }
    }
    assert!(!waiting.is_finished(), "it was not blocked");
    gate.add_permits(1);
    assert_eq!(waiting.await.unwrap(), Ok(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s04_a_panic_costs_one_message_and_the_mailbox_is_kept() {
    let (running, gate) = counter();
    let (other, _) = counter();
    assert_eq!(ask(&other.mailbox(), Say::Add).await, Ok(1));
    let mailbox = running.mailbox();
    assert_eq!(ask(&mailbox, Say::Add).await, Ok(1));
    // Behind what blocks, in this order.
    let mut asks = Vec::new();
    for say in [Say::Wait, Say::Panic, Say::Add, Say::Add] {
        let mut asking = Box::pin({
            let mailbox = mailbox.clone();
            async move { ask(&mailbox, say).await }
        });
        // The first poll puts it in the mailbox.
        tokio::select! {
            biased;
            answer = &mut asking => panic!("answered at once: {answer:?}"),
            () = std::future::ready(()) => {}
        }
        asks.push(asking);
    }
    let mut phases = running.life().watch();
    gate.add_permits(1);
    let failed = phases.wait_for(|state| state.phase == Phase::Failed);
    let message = in_time("the failure", failed).await.unwrap().message.clone();
    assert_eq!(message, "panicked: on request");
    let mut answers = Vec::new();
    for asking in asks {
        answers.push(asking.await);
    }
    // What it counted before went with it.
    assert_eq!(answers, [Ok(1), Err(CallError::Aborted), Ok(1), Ok(2)]);
    assert_eq!(running.life().phase(), Phase::Ready);
    assert_eq!(ask(&other.mailbox(), Say::Add).await, Ok(2), "another was touched");
    assert_eq!(other.life().phase(), Phase::Ready);
}
