//! Durable messages below the API: limits of streams, and several cores on one database.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use cnsmo_core::{
    bus::{Bus, BusConfig, BusError, Durable, Member, Outbox, Outgoing, Subscription},
    store::{PostgresConfig, Store, StoreConfig, message::StreamLimits},
    subject::Pattern,
};
use cnsmo_proto::pb::bus::{Ack, Delivery, Message, ack, subscribe_response};
use futures::StreamExt as _;
use tempfile::TempDir;

use crate::{harness::PATIENCE, postgres::server};

fn few() -> StreamLimits {
    StreamLimits { messages: 10, ..StreamLimits::default() }
}

async fn sqlite(folder: &TempDir) -> Store {
    Store::open(&StoreConfig::sqlite(folder.path().join("state.db"))).await.unwrap()
}

async fn postgres(url: &str) -> Store {
    Store::open(&StoreConfig::postgres(PostgresConfig::new(url, None).unwrap())).await.unwrap()
}

/// A bus, and the task that runs it.
struct Running(Bus, tokio::task::JoinHandle<()>);

impl Running {
    fn stop(&self) {
        self.1.abort();
        self.0.stop();
    }
}

impl std::ops::Deref for Running {
    type Target = Bus;

    fn deref(&self) -> &Bus {
        &self.0
    }
}

async fn bus(store: &Store, holder: &str, limits: StreamLimits) -> Running {
    let config = BusConfig { holder: holder.to_owned(), limits };
    let bus = Bus::start(store.clone(), config).await.unwrap();
    let task = tokio::spawn(bus.clone().run());
    Running(bus, task)
}

fn message(number: usize, key: &str) -> Message {
    Message {
        subject: "s.x".into(),
        payload: number.to_string().into_bytes().into(),
        ordering_key: key.into(),
        ..Message::default()
    }
}

async fn member(bus: &Bus, group: &str, credit: u32) -> (Member, Outgoing) {
    let subscription = Subscription {
        pattern: Pattern::parse("s.>").unwrap(),
        group: group.into(),
        weight: 1,
        member: "test".into(),
        durable: Some(Durable { start: 1, ack_wait: Duration::from_secs(60), attempts_max: 5 }),
    };
    let outbox = Arc::<Outbox>::default();
    let member = bus.subscribe("test", subscription, outbox.clone()).await.unwrap();
    member.grant(credit).unwrap();
    (member, Outgoing::new(outbox))
}

async fn next(outgoing: &mut Outgoing) -> Delivery {
    loop {
        let next = tokio::time::timeout(PATIENCE, outgoing.next()).await.unwrap();
        let message = next.unwrap().unwrap().message.unwrap();
        if let subscribe_response::Message::Delivery(delivery) = message {
            return *delivery;
        }
    }
}

async fn acknowledge(member: &Member, sequence: i64) {
    let result = ack::Result::Ack.into();
    member.settle(Ack { sequence, result, ..Ack::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_stream_forgets_what_nobody_is_owed_and_refuses_before_it_loses_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let store = sqlite(&folder).await;
    let bus = bus(&store, "core", few()).await;
    // Without groups: the newest ten stay.
    for n in 1..=25 {
        let receipts = bus.publish_durable("s", vec![message(n, "")]).await.unwrap();
        assert_eq!(receipts[0].sequence, n as i64);
    }
    let kept = bus.messages("s", 0, 100).await.unwrap();
    assert_eq!(kept.iter().map(|m| m.sequence).collect::<Vec<_>>(), (16..=25).collect::<Vec<_>>());

    let (reader, mut outgoing) = member(&bus, "g", 100).await;
    let full = bus.publish_durable("s", vec![message(26, "")]).await.unwrap_err();
    assert!(matches!(full, BusError::Exhausted(_)), "{full}");
    // Nor a batch larger than a stream may be, and nothing of it.
    let batch = (26..=36).map(|n| message(n, "")).collect();
    let full = bus.publish_durable("s", batch).await.unwrap_err();
    assert!(matches!(full, BusError::Exhausted(_)), "{full}");
    assert_eq!(bus.messages("s", 0, 100).await.unwrap(), kept);
    for sequence in 16..=17 {
        assert_eq!(next(&mut outgoing).await.sequence, sequence);
        acknowledge(&reader, sequence).await;
    }
    let freed = async {
        while bus.publish_durable("s", vec![message(26, "")]).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, freed).await.unwrap();
    let kept = bus.messages("s", 0, 100).await.unwrap();
    assert!(kept.first().unwrap().sequence > 16 && kept.last().unwrap().sequence == 26);

    // The group goes, and what it was owed may go too.
    bus.delete_group("s", "g").await.unwrap();
    for n in 27..=40 {
        bus.publish_durable("s", vec![message(n, "")]).await.unwrap();
    }
    let (streams, kept) = (bus.streams().await.unwrap(), bus.messages("s", 0, 100).await.unwrap());
    let (state, _) = &streams[0];
    assert_eq!((state.messages, state.first, state.last), (10, 31, 40));
    assert_eq!(state.bytes, kept.iter().map(|m| m.body.len() as i64).sum::<i64>());
    let aged = StreamLimits { age: Duration::ZERO, ..few() };
    tokio::time::sleep(Duration::from_millis(2)).await;
    assert_eq!(store.trim("s", aged).await.unwrap(), 10);
    assert!(bus.messages("s", 0, 100).await.unwrap().is_empty());
    reader.leave().await;
    bus.stop();
}

/// Members on both cores share one group; each message is with one member at a time, and keys keep their order.
#[tokio::test(flavor = "multi_thread")]
async fn two_cores_on_postgresql_serve_one_group() {
    const MESSAGES: usize = 300;
    let url = server().create_database().unwrap();
    let (first, second) = (postgres(&url).await, postgres(&url).await);
    let first = bus(&first, "first", StreamLimits::default()).await;
    let second = bus(&second, "second", StreamLimits::default()).await;
    let mut members = vec![member(&first, "g", 10).await, member(&second, "g", 10).await];
    for n in 0..MESSAGES {
        // Published on one core only: the other one must hear of it.
        let message = message(n, &format!("key-{}", n % 20));
        first.publish_durable("s", vec![message]).await.unwrap();
    }
    let mut seen = BTreeMap::<String, Vec<usize>>::new();
    let (mut sequences, mut counts) = (BTreeSet::new(), [0; 2]);
    while sequences.len() < MESSAGES {
        let [(one, of_one), (other, of_other)] = members.as_mut_slice() else { unreachable!() };
        let (at, delivery) = tokio::select! {
            delivery = next(of_one) => (0, delivery),
            delivery = next(of_other) => (1, delivery),
        };
        let member = if at == 0 { &*one } else { &*other };
        assert!(sequences.insert(delivery.sequence), "{delivery:?} was given twice");
        counts[at] += 1;
        let message = delivery.message.unwrap();
        let number = String::from_utf8(message.payload.to_vec()).unwrap().parse().unwrap();
        seen.entry(message.ordering_key).or_default().push(number);
        acknowledge(member, delivery.sequence).await;
        member.grant(1).unwrap();
    }
    assert!(seen.values().all(|numbers| numbers.is_sorted()), "{seen:?}");
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");

    // A core that starts again gives out again what its members had.
    first.publish_durable("s", vec![message(MESSAGES, "last")]).await.unwrap();
    let [(_, of_one), (_, of_other)] = members.as_mut_slice() else { unreachable!() };
    let (last, other, dead, name) = tokio::select! {
        last = next(of_one) => (last, of_other, &first, "first"),
        last = next(of_other) => (last, of_one, &second, "second"),
    };
    assert_eq!(last.attempt, 1);
    dead.stop();
    let again = postgres(&url).await;
    let again = bus(&again, name, StreamLimits::default()).await;
    assert_eq!(next(other).await.attempt, 2);
    for bus in [first, second, again] {
        bus.stop();
    }
}
