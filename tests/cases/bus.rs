//! The message queue, between real processes: the core, which is killed, and clients over its socket.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use cnsmo_proto::pb::bus::{
    ListStreamsRequest, Message, Stream, Subscription, bus_service_client::BusServiceClient,
};
use cnsmo_service::bus::{Bus, Event, Incoming, Subscriber};
use cnsmo_tests::CoreProcess;
use tokio::task::{JoinHandle, JoinSet};
use tonic::transport::{Channel, Endpoint};

/// How long something that must happen may take on a busy host.
const PATIENCE: Duration = Duration::from_secs(60);

async fn channel(core: &CoreProcess) -> Channel {
    let url = format!("unix://{}", core.socket().display());
    Endpoint::from_shared(url).unwrap().connect().await.unwrap()
}

fn subscription(stream: &str) -> Subscription {
    Subscription {
        subject: format!("{stream}.>"),
        queue_group: "workers".into(),
        durable: true,
        start_sequence: 1,
        ..Subscription::default()
    }
}

fn numbered(stream: &str, number: usize, key: &str) -> Message {
    Message {
        subject: format!("{stream}.new"),
        payload: number.to_string().into_bytes().into(),
        message_id: format!("{stream}-{number}"),
        ordering_key: key.into(),
        ..Message::default()
    }
}

async fn next(subscriber: &mut Subscriber) -> Box<Incoming> {
    loop {
        let event = tokio::time::timeout(PATIENCE, subscriber.next()).await.unwrap().unwrap();
        if let Event::Delivery(incoming) = event {
            return incoming;
        }
    }
}

fn number(incoming: &Incoming) -> usize {
    String::from_utf8(incoming.message().payload.to_vec()).unwrap().parse().unwrap()
}

async fn stream(core: &CoreProcess, name: &str) -> Option<Stream> {
    let mut client = BusServiceClient::new(channel(core).await);
    let streams = client.list_streams(ListStreamsRequest {}).await.unwrap().into_inner().streams;
    streams.into_iter().find(|stream| stream.name == name)
}

/// Waits until the one group of the stream is as wanted.
async fn until(core: &CoreProcess, name: &str, what: &str, holds: impl Fn(i64, u32) -> bool) {
    let wait = async {
        loop {
            let stream = stream(core, name).await.unwrap_or_default();
            if stream.groups.first().is_some_and(|group| holds(group.pending, group.members)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn s11_unacknowledged_messages_survive_the_core() {
    let mut core = CoreProcess::start("s11").unwrap();
    let bus = Bus::new(channel(&core).await);
    for n in 0..100 {
        bus.publish_durable(numbered("orders", n, &format!("key-{}", n % 10))).await.unwrap();
    }
    // Each of the ten keys has one message at work when the core dies.
    let mut subscriber = bus.subscribe(subscription("orders"), 100);
    let mut held = Vec::new();
    for _ in 0..10 {
        held.push(next(&mut subscriber).await);
    }
    core.kill().unwrap();
    drop((held, subscriber));
    core.start_again().unwrap();

    let bus = Bus::new(channel(&core).await);
    let mut subscriber = bus.subscribe(subscription("orders"), 100);
    let (mut once, mut by_key) = (BTreeSet::new(), BTreeMap::<String, Vec<usize>>::new());
    while once.len() < 100 {
        let incoming = next(&mut subscriber).await;
        let message = incoming.message();
        // What came before may come again, and says so.
        let is_new = once.insert(message.message_id.clone());
        assert!(is_new || incoming.delivery.attempt > 1, "{}", message.message_id);
        if is_new {
            by_key.entry(message.ordering_key).or_default().push(number(&incoming));
        }
        incoming.ack().await;
    }
    assert_eq!(by_key.len(), 10);
    for (key, numbers) in by_key {
        assert!(numbers.is_sorted() && numbers.len() == 10, "{key}: {numbers:?}");
    }
    until(&core, "orders", "all is acknowledged", |pending, _| pending == 0).await;
    // The id of a message that was kept before the kill is known after it.
    let (_, duplicate) = bus.publish_durable(numbered("orders", 0, "key-0")).await.unwrap();
    assert!(duplicate);
}

/// Number and attempt of each message that a member saw.
type Seen = Arc<Mutex<Vec<(usize, u32)>>>;

/// A member with a connection of its own.
async fn member(core: &CoreProcess, work: Duration) -> (JoinHandle<()>, Seen) {
    let bus = Bus::new(channel(core).await);
    let seen = Seen::default();
    let to = seen.clone();
    let task = tokio::spawn(async move {
        let mut subscriber = bus.subscribe(subscription("jobs"), 20);
        loop {
            let incoming = next(&mut subscriber).await;
            to.lock().unwrap().push((number(&incoming), incoming.delivery.attempt));
            if !work.is_zero() {
                tokio::time::sleep(work).await;
            }
            incoming.ack().await;
        }
    });
    (task, seen)
}

async fn publish(bus: &Bus, numbers: std::ops::Range<usize>) {
    let mut publishing = JoinSet::new();
    for n in numbers {
        if publishing.len() >= 64 {
            publishing.join_next().await.unwrap().unwrap();
        }
        let bus = bus.clone();
        publishing.spawn(async move {
            bus.publish_durable(numbered("jobs", n, "")).await.unwrap();
        });
    }
    publishing.join_all().await;
}

/// Every message was seen, and a second time only as a further attempt.
fn check(members: &[(JoinHandle<()>, Seen)], numbers: std::ops::Range<usize>) {
    let mut attempts = BTreeMap::<usize, Vec<u32>>::new();
    for (_, seen) in members {
        for (number, attempt) in seen.lock().unwrap().iter() {
            attempts.entry(*number).or_default().push(*attempt);
        }
    }
    for number in numbers {
        let attempts = attempts.get(&number).unwrap_or_else(|| panic!("{number} is lost"));
        let firsts = attempts.iter().filter(|attempt| **attempt == 1).count();
        assert!(firsts <= 1, "{number} was seen with the attempts {attempts:?}");
    }
}

fn counts(members: &[(JoinHandle<()>, Seen)]) -> Vec<usize> {
    members.iter().map(|(_, seen)| seen.lock().unwrap().len()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn s13_messages_are_shared_out_evenly() {
    let core = CoreProcess::start("s13-even").unwrap();
    let mut members = Vec::new();
    for _ in 0..3 {
        members.push(member(&core, Duration::ZERO).await);
    }
    until(&core, "jobs", "three members", |_, members| members == 3).await;
    publish(&Bus::new(channel(&core).await), 0..9_000).await;
    until(&core, "jobs", "all is acknowledged", |pending, _| pending == 0).await;
    let counts = counts(&members);
    assert_eq!(counts.iter().sum::<usize>(), 9_000, "nobody died, so nothing comes twice");
    assert!(counts.iter().all(|count| (2_700..=3_300).contains(count)), "{counts:?}");
    check(&members, 0..9_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn s13_a_killed_member_loses_nothing_and_a_slow_one_gets_fewer() {
    let core = CoreProcess::start("s13-kill").unwrap();
    let mut members = Vec::new();
    for work in [Duration::ZERO, Duration::ZERO, Duration::from_millis(5)] {
        members.push(member(&core, work).await);
    }
    until(&core, "jobs", "three members", |_, members| members == 3).await;
    let bus = Bus::new(channel(&core).await);
    publish(&bus, 0..4_500).await;
    members[0].0.abort();
    publish(&bus, 4_500..9_000).await;
    until(&core, "jobs", "all is acknowledged", |pending, _| pending == 0).await;
    check(&members, 0..9_000);
    let counts = counts(&members);
    assert!(counts[2] < counts[1] / 2, "the slow one gets fewer: {counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn s13_what_a_killed_member_held_goes_to_another_one_because_it_is_gone() {
    let core = CoreProcess::start("s13-held").unwrap();
    // Nothing is due by time while this test runs.
    let ack_wait = Some(prost_types::Duration { seconds: 3_600, nanos: 0 });
    let patient = || Subscription { ack_wait, ..subscription("jobs") };
    let dying = Bus::new(channel(&core).await);
    let mut subscriber = dying.subscribe(patient(), 5);
    publish(&Bus::new(channel(&core).await), 0..5).await;
    let mut held = BTreeSet::new();
    let mut unanswered = Vec::new();
    while held.len() < 5 {
        let incoming = next(&mut subscriber).await;
        held.insert(number(&incoming));
        unanswered.push(incoming);
    }
    let heir = Bus::new(channel(&core).await);
    let mut heirs = heir.subscribe(patient(), 5);
    let joined = until(&core, "jobs", "two members", |_, members| members == 2);
    tokio::select! {
        _ = next(&mut heirs) => panic!("what is held is not given to another"),
        () = joined => {}
    }

    // Its connection goes, as with its process.
    drop((unanswered, subscriber, dying));
    let mut inherited = BTreeSet::new();
    while inherited.len() < 5 {
        let incoming = next(&mut heirs).await;
        assert_eq!(incoming.delivery.attempt, 2);
        inherited.insert(number(&incoming));
        incoming.ack().await;
    }
    assert_eq!(inherited, held);
    until(&core, "jobs", "all is acknowledged", |pending, _| pending == 0).await;
}
