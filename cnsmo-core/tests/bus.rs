//! The message bus, over the API.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use cnsmo_proto::pb::bus::{
    Credit, DeleteGroupRequest, Group, ListMessagesRequest, ListStreamsRequest, Message,
    ReplayRequest, SubscribeRequest, SubscribeResponse, Subscription,
    bus_service_client::BusServiceClient, subscribe_request, subscribe_response,
};
use cnsmo_service::{
    bus::{Answer, Bus, Event, HandleError, Incoming, Subscriber},
    supervise::stop_pair,
};
use futures::StreamExt as _;
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming, transport::Channel};

use crate::harness::{PATIENCE, TestCore, unix};

async fn channel(core: &TestCore) -> Channel {
    unix(&core.folder.path().join("core.sock")).await.unwrap()
}

async fn bus(core: &TestCore) -> Bus {
    Bus::new(channel(core).await)
}

fn message(subject: &str, payload: impl Into<Vec<u8>>) -> Message {
    Message { subject: subject.into(), payload: payload.into().into(), ..Message::default() }
}

fn keyed(subject: &str, number: usize, key: &str) -> Message {
    let ordering_key = key.to_owned();
    Message { ordering_key, ..message(subject, number.to_string()) }
}

fn live(subject: &str, group: &str) -> Subscription {
    let (subject, queue_group) = (subject.into(), group.into());
    Subscription { subject, queue_group, ..Subscription::default() }
}

fn durable(subject: &str, group: &str) -> Subscription {
    Subscription { durable: true, start_sequence: 1, ..live(subject, group) }
}

fn number(incoming: &Incoming) -> usize {
    String::from_utf8(incoming.message().payload.to_vec()).unwrap().parse().unwrap()
}

async fn next(subscriber: &mut Subscriber) -> Box<Incoming> {
    loop {
        let event = tokio::time::timeout(PATIENCE, subscriber.next()).await.unwrap().unwrap();
        if let Event::Delivery(incoming) = event {
            return incoming;
        }
    }
}

/// The subscription is in force.
async fn ready(subscriber: &mut Subscriber) {
    let event = tokio::time::timeout(PATIENCE, subscriber.next()).await.unwrap().unwrap();
    assert!(matches!(event, Event::Subscribed { .. }), "{event:?}");
}

async fn subscribed(bus: &Bus, subscription: Subscription, credit: u32) -> Subscriber {
    let mut subscriber = bus.subscribe(subscription, credit);
    ready(&mut subscriber).await;
    subscriber
}

async fn publish_all(bus: &Bus, messages: Vec<Message>) {
    futures::stream::iter(messages)
        .for_each_concurrent(64, |message| async {
            bus.publish_durable(message).await.unwrap();
        })
        .await;
}

async fn groups(core: &TestCore, stream: &str) -> Vec<Group> {
    let mut client = BusServiceClient::new(channel(core).await);
    let streams = client.list_streams(ListStreamsRequest {}).await.unwrap().into_inner().streams;
    streams.into_iter().find(|known| known.name == stream).map(|s| s.groups).unwrap_or_default()
}

async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Everything is acknowledged.
async fn drained(core: &TestCore, stream: &str) {
    until("all is acknowledged", || async {
        groups(core, stream).await.iter().all(|group| group.pending == 0)
    })
    .await;
}

/// What members saw: number of the message, attempt, in order.
type Seen = Arc<Mutex<Vec<(usize, u32)>>>;

/// A member that takes time for each message and acknowledges it. Aborting it is a death without a word.
fn member(bus: Bus, subscription: Subscription, work: Duration) -> (JoinHandle<()>, Seen) {
    let seen = Seen::default();
    let to = seen.clone();
    let task = tokio::spawn(async move {
        let mut subscriber = bus.subscribe(subscription, 20);
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

fn count(seen: &Seen) -> usize {
    seen.lock().unwrap().len()
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_a_group_share_evenly() {
    let core = TestCore::start().await;
    let bus = bus(&core).await;
    let members: Vec<_> =
        (0..3).map(|_| member(bus.clone(), durable("jobs.>", "workers"), Duration::ZERO)).collect();
    until("three members", || async {
        groups(&core, "jobs").await.first().is_some_and(|group| group.members == 3)
    })
    .await;
    publish_all(&bus, (0..9_000).map(|n| message("jobs.new", n.to_string())).collect()).await;
    drained(&core, "jobs").await;
    let counts: Vec<_> = members.iter().map(|(_, seen)| count(seen)).collect();
    assert_eq!(counts.iter().sum::<usize>(), 9_000);
    assert!(counts.iter().all(|count| (2_700..=3_300).contains(count)), "{counts:?}");
    let numbers: BTreeSet<_> =
        members.iter().flat_map(|(_, seen)| seen.lock().unwrap().clone()).map(|(n, _)| n).collect();
    assert_eq!(numbers.len(), 9_000);
    core.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_member_had_goes_to_the_others_and_a_slow_one_gets_fewer() {
    let core = TestCore::start().await;
    let bus = bus(&core).await;
    let work = [Duration::ZERO, Duration::ZERO, Duration::from_millis(5)];
    let members: Vec<_> =
        work.map(|work| member(bus.clone(), durable("jobs", "workers"), work)).into();
    until("three members", || async {
        groups(&core, "jobs").await.first().is_some_and(|group| group.members == 3)
    })
    .await;
    let publishing = tokio::spawn({
        let bus = bus.clone();
        let messages = (0..6_000).map(|n| message("jobs", n.to_string())).collect();
        async move { publish_all(&bus, messages).await }
    });
    until("half of it", || async { members.iter().map(|(_, s)| count(s)).sum::<usize>() > 3_000 })
        .await;
    members[0].0.abort();
    publishing.await.unwrap();
    drained(&core, "jobs").await;

    let mut attempts = BTreeMap::<usize, Vec<u32>>::new();
    for (_, seen) in &members {
        for (number, attempt) in seen.lock().unwrap().iter() {
            attempts.entry(*number).or_default().push(*attempt);
        }
    }
    assert_eq!(attempts.len(), 6_000, "none is lost");
    for (number, attempts) in attempts {
        let firsts = attempts.iter().filter(|attempt| **attempt == 1).count();
        assert!(firsts <= 1, "{number}: {attempts:?}: a duplicate must have another attempt");
    }
    assert!(count(&members[2].1) < count(&members[1].1) / 2, "the slow one gets fewer");
    core.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_acknowledged_survives_the_core_in_order() {
    let core = TestCore::start().await;
    let client = bus(&core).await;
    for n in 0..100 {
        let key = format!("key-{}", n % 5);
        client.publish_durable(keyed("orders.new", n, &key)).await.unwrap();
    }
    let mut first = subscribed(&client, durable("orders.>", "g"), 100).await;
    for _ in 0..5 {
        assert_eq!(next(&mut first).await.delivery.attempt, 1, "of each key one");
    }
    drop(first);
    let core = core.restart().await;

    let client = bus(&core).await;
    let mut second = subscribed(&client, durable("orders.>", "g"), 100).await;
    let mut seen = BTreeMap::<String, Vec<usize>>::new();
    for _ in 0..100 {
        let incoming = next(&mut second).await;
        let number = number(&incoming);
        let attempt = incoming.delivery.attempt;
        assert!(attempt == 1 || (attempt == 2 && number < 5), "{number}: {attempt}");
        seen.entry(incoming.message().ordering_key).or_default().push(number);
        incoming.ack().await;
    }
    for (key, numbers) in &seen {
        assert!(numbers.is_sorted() && numbers.len() == 20, "{key}: {numbers:?}");
    }
    assert_eq!(seen.len(), 5);
    drained(&core, "orders").await;
    core.stop().await;
}

/// Small and predictable: which member is killed when must differ between runs of the loop, not between runs of the test.
fn dice(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[tokio::test(flavor = "multi_thread")]
async fn the_order_of_each_key_holds_whoever_is_killed() {
    let core = TestCore::start().await;
    let bus = bus(&core).await;
    // What was worked on, in the order in which it was finished; by key.
    let log = Arc::new(Mutex::new(BTreeMap::<String, Vec<usize>>::new()));
    let busy = Arc::new(Mutex::new(BTreeSet::<String>::new()));
    let start = |seed: u64| {
        let (bus, log, busy) = (bus.clone(), log.clone(), busy.clone());
        tokio::spawn(async move {
            let mut state = seed;
            let mut subscriber = bus.subscribe(durable("k.>", "g"), 8);
            loop {
                let incoming = next(&mut subscriber).await;
                let key = incoming.message().ordering_key;
                // A killed member leaves its key behind.
                let free = Release(busy.clone(), key.clone());
                assert!(busy.lock().unwrap().insert(key.clone()), "two at a time of {key}");
                tokio::time::sleep(Duration::from_millis(dice(&mut state) % 3)).await;
                log.lock().unwrap().entry(key).or_default().push(number(&incoming));
                drop(free);
                if dice(&mut state).is_multiple_of(10) {
                    incoming.retry(Duration::from_millis(1)).await;
                } else {
                    incoming.ack().await;
                }
            }
        })
    };
    let mut members: Vec<_> = (1..=4).map(start).collect();
    let messages = (0..600).map(|n| keyed("k.x", n, &format!("key-{}", n % 7)));
    for message in messages {
        bus.publish_durable(message).await.unwrap();
    }
    let mut state = 42;
    for round in 0..20 {
        tokio::time::sleep(Duration::from_millis(dice(&mut state) % 30)).await;
        let victim = usize::try_from(dice(&mut state) % 4).unwrap();
        members[victim].abort();
        assert!((&mut members[victim]).await.unwrap_err().is_cancelled());
        members[victim] = start(100 + round);
    }
    drained(&core, "k").await;
    members.iter().for_each(JoinHandle::abort);
    let log = log.lock().unwrap().clone();
    for (key, numbers) in &log {
        // A message may be seen again; the next one never comes before it.
        let mut firsts = numbers.clone();
        firsts.dedup();
        assert!(firsts.is_sorted(), "{key}: {numbers:?}");
    }
    let all: BTreeSet<_> = log.values().flatten().collect();
    assert_eq!(all.len(), 600);
    core.stop().await;
}

struct Release(Arc<Mutex<BTreeSet<String>>>, String);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.lock().unwrap().remove(&self.1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_group_gives_up_is_a_dead_letter_and_can_be_put_back_for_it_alone() {
    let core = TestCore::start().await;
    let bus = bus(&core).await;
    let attempts = Subscription { max_delivery_attempts: 3, ..durable("orders.>", "strict") };
    let mut strict = subscribed(&bus, attempts, 10).await;
    let mut other = subscribed(&bus, durable("orders.>", "other"), 10).await;
    let (tired, _) = bus.publish_durable(message("orders.a", "1")).await.unwrap();
    let (refused, _) = bus.publish_durable(message("orders.b", "2")).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..4 {
        let incoming = next(&mut strict).await;
        seen.push((incoming.delivery.sequence, incoming.delivery.attempt));
        if incoming.delivery.sequence == refused {
            incoming.reject("no such customer").await;
        } else {
            incoming.retry(Duration::ZERO).await;
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, [(tired, 1), (tired, 2), (tired, 3), (refused, 1)]);
    for _ in 0..2 {
        next(&mut other).await.ack().await;
    }

    let mut client = BusServiceClient::new(channel(&core).await);
    let list = ListMessagesRequest { stream: "dead.orders".into(), ..Default::default() };
    let mut letters = Vec::new();
    while letters.len() < 2 {
        letters = client.list_messages(list.clone()).await.unwrap().into_inner().messages;
    }
    let said: BTreeMap<String, BTreeMap<String, String>> = letters
        .into_iter()
        .map(|letter| letter.message.unwrap())
        .map(|m| {
            assert_eq!(m.subject, "dead.orders");
            (m.headers["cnsmo-dead-subject"].clone(), m.headers)
        })
        .collect();
    for (subject, sequence, attempts, reason) in [
        ("orders.a", tired, "3", "not acknowledged within the number of attempts"),
        ("orders.b", refused, "1", "no such customer"),
    ] {
        let headers = &said[subject];
        assert_eq!(headers["cnsmo-dead-group"], "strict");
        assert_eq!(headers["cnsmo-dead-sequence"], sequence.to_string());
        assert_eq!(headers["cnsmo-dead-attempts"], attempts);
        assert_eq!(headers["cnsmo-dead-reason"], reason);
    }

    let replay = |group: &str| ReplayRequest {
        stream: "orders".into(),
        group: group.into(),
        sequences: Vec::new(),
    };
    assert_eq!(client.replay(replay("other")).await.unwrap().into_inner().replayed, 0);
    assert_eq!(client.replay(replay("")).await.unwrap().into_inner().replayed, 2);
    for _ in 0..2 {
        let again = next(&mut strict).await;
        assert_eq!(again.delivery.attempt, 1);
        assert!(again.message().headers.is_empty());
        again.ack().await;
    }
    // The other group, which had acknowledged both, gets the next message and nothing before it.
    bus.publish_durable(message("orders.c", "3")).await.unwrap();
    assert_eq!(number(&*next(&mut other).await), 3);
    assert!(client.list_messages(list).await.unwrap().into_inner().messages.is_empty());
    core.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_with_a_known_id_is_not_kept_again() {
    let core = TestCore::start().await;
    let bus = bus(&core).await;
    let with_id = |id: &str| Message { message_id: id.into(), ..message("s.x", "1") };
    let (first, duplicate) = bus.publish_durable(with_id("a")).await.unwrap();
    assert!(!duplicate);
    assert_eq!(bus.publish_durable(with_id("a")).await.unwrap(), (first, true));
    assert_eq!(bus.publish_durable(with_id("b")).await.unwrap(), (first + 1, false));
    // In one commit, too.
    let many = futures::future::join_all((0..50).map(|_| bus.publish_durable(with_id("c")))).await;
    let kept = many.iter().filter(|result| !result.as_ref().unwrap().1).count();
    assert_eq!(kept, 1);
    let core = core.restart().await;
    let bus = self::bus(&core).await;
    assert_eq!(bus.publish_durable(with_id("a")).await.unwrap(), (first, true));
    core.stop().await;
}

/// A subscriber that speaks the protocol by hand.
async fn raw(
    core: &TestCore,
    first: Subscription,
) -> (mpsc::Sender<SubscribeRequest>, Streaming<SubscribeResponse>) {
    let (say, said) = mpsc::channel(16);
    let mut client = BusServiceClient::new(channel(core).await);
    let mut heard = client.subscribe(ReceiverStream::new(said)).await.unwrap().into_inner();
    let message = Some(subscribe_request::Message::Subscription(first));
    say.send(SubscribeRequest { message }).await.unwrap();
    let first = heard.message().await.unwrap().unwrap().message.unwrap();
    assert!(matches!(first, subscribe_response::Message::Subscribed(_)));
    (say, heard)
}

async fn grant(say: &mpsc::Sender<SubscribeRequest>, messages: u32) {
    let message = Some(subscribe_request::Message::Credit(Credit { messages }));
    say.send(SubscribeRequest { message }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_credit_nothing_is_sent_and_what_is_missed_is_told() {
    let core = TestCore::start().await;
    let bus = bus(&core).await;
    let (say, mut heard) = raw(&core, live("news.*", "")).await;
    for _ in 0..3 {
        assert_eq!(bus.publish(message("news.eu", "lost")).await.unwrap(), 0);
    }
    bus.publish_durable(message("news.eu", "durable messages are for durable groups"))
        .await
        .unwrap();
    let nothing = tokio::time::timeout(Duration::from_millis(100), heard.message()).await;
    assert!(nothing.is_err(), "{nothing:?}");
    grant(&say, 1).await;
    let lagged = heard.message().await.unwrap().unwrap().message.unwrap();
    let subscribe_response::Message::Lagged(lagged) = lagged else { panic!("{lagged:?}") };
    assert_eq!(lagged.skipped, 3);
    assert_eq!(bus.publish(message("news.eu.x", "of another subject")).await.unwrap(), 0);
    assert_eq!(bus.publish(message("news.eu", "seen")).await.unwrap(), 1);
    let seen = heard.message().await.unwrap().unwrap().message.unwrap();
    let subscribe_response::Message::Delivery(seen) = seen else { panic!("{seen:?}") };
    assert_eq!(seen.message.unwrap().payload, "seen");

    // Durable messages wait for credit instead.
    let (say, mut heard) = raw(&core, durable("news.>", "g")).await;
    let nothing = tokio::time::timeout(Duration::from_millis(100), heard.message()).await;
    assert!(nothing.is_err(), "{nothing:?}");
    grant(&say, 1).await;
    let delivery = heard.message().await.unwrap().unwrap().message.unwrap();
    assert!(matches!(delivery, subscribe_response::Message::Delivery(_)));
    core.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ephemeral_message_goes_to_each_alone_and_to_one_of_each_group() {
    let core = TestCore::start().await;
    let bus = bus(&core).await;
    let mut alone = subscribed(&bus, live("a.*", ""), 100).await;
    let mut rest = subscribed(&bus, live(">", ""), 100).await;
    let mut group = Vec::new();
    for weight in [1, 3] {
        let share = Subscription { weight, ..live("a.*", "g") };
        group.push(member(bus.clone(), share, Duration::ZERO));
    }
    let mut received = 0;
    // Until both members are there.
    while group.iter().any(|(_, seen)| count(seen) == 0) {
        received += 1;
        bus.publish(message("a.b", "0")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let before: Vec<_> = group.iter().map(|(_, seen)| count(seen)).collect();
    for _ in 0..8 {
        assert_eq!(bus.publish(message("a.b", "0")).await.unwrap(), 3);
    }
    for _ in 0..received + 8 {
        next(&mut alone).await;
        next(&mut rest).await;
    }
    until("the group has all", || async {
        let after: Vec<_> = group.iter().map(|(_, seen)| count(seen)).collect();
        after.iter().sum::<usize>() == before.iter().sum::<usize>() + 8
    })
    .await;
    core.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_one_reply_or_a_clear_error() {
    let core = TestCore::start().await;
    let bus = bus(&core).await;
    let ask = |subject: &'static str, ms: u64, idempotent: bool| {
        let bus = bus.clone();
        async move { bus.request(message(subject, "?"), Duration::from_millis(ms), idempotent).await }
    };
    let refused = ask("svc.db", 60_000, false).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "at once: {refused}");

    let (_stopper, stop) = stop_pair();
    let echo = tokio::spawn({
        let bus = bus.clone();
        let of = Subscription { member: "db-1".into(), ..live("svc.db", "svc.db") };
        async move {
            bus.serve(of, 4, stop, |delivery| async move {
                let message = delivery.message.unwrap_or_default();
                if message.payload == "fail" {
                    return Err(HandleError::Reject("out of luck".into()));
                }
                Ok(Answer { payload: message.payload, ..Answer::default() })
            })
            .await
        }
    });
    until("a reply", || async { ask("svc.db", 1_000, false).await.is_ok() }).await;
    let answer = ask("svc.db", 10_000, false).await.unwrap();
    assert_eq!((&answer.payload[..], answer.served_by.as_str()), (&b"?"[..], "db-1"));
    let failed = bus.request(message("svc.db", "fail"), PATIENCE, false).await.unwrap_err();
    assert_eq!((failed.code(), failed.message()), (Code::Aborted, "out of luck"));
    echo.abort();

    // One that takes requests and never replies.
    let mute = Subscription { member: "mute".into(), ..live("svc.mute", "svc.mute") };
    let mut mute = subscribed(&bus, mute, 1).await;
    let late = ask("svc.mute", 50, false).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    let held = next(&mut mute).await;
    let busy = ask("svc.mute", 50, false).await.unwrap_err();
    assert_eq!(busy.code(), Code::ResourceExhausted, "its one credit is used: {busy}");
    held.ack().await;

    // It dies with a request: whoever else is there gets it, if the caller allows that.
    for idempotent in [false, true] {
        let asked = tokio::spawn(ask("svc.mute", 20_000, idempotent));
        let held = next(&mut mute).await;
        let second = Subscription { member: "second".into(), ..live("svc.mute", "svc.mute") };
        let mut second = subscribed(&bus, second, 1).await;
        drop((held, mute));
        if idempotent {
            let incoming = next(&mut second).await;
            incoming.reply(Answer::default()).await;
            assert_eq!(asked.await.unwrap().unwrap().served_by, "second");
        } else {
            let lost = asked.await.unwrap().unwrap_err();
            assert_eq!(lost.code(), Code::Aborted, "{lost}");
        }
        mute = second;
    }
    core.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_breaks_a_rule_is_refused_with_the_name_of_the_field() {
    let core = TestCore::start().await;
    let bus = bus(&core).await;
    let ok = || message("a.b", "x");
    let long = |n| "x".repeat(n);
    let headers = |n: usize| (0..n).map(|i| (format!("h{i}"), String::new())).collect();
    for (bad, field) in [
        (message("a..b", ""), "message.subject: has an empty token"),
        (message("a.*", ""), "message.subject: "),
        (message("dead.x", ""), "message.subject: "),
        (message("a", vec![0; (1 << 20) + 1]), "message.payload: "),
        (Message { content_type: long(256), ..ok() }, "message.contentType: "),
        (Message { headers: headers(33), ..ok() }, "message.headers: "),
        (Message { headers: [("k".into(), long(4_096))].into(), ..ok() }, "message.headers: "),
        (
            Message { headers: [("cnsmo-x".into(), long(1))].into(), ..ok() },
            "message.headers[cnsmo-x]: ",
        ),
        (Message { message_id: long(65), ..ok() }, "message.messageId: "),
        (Message { ordering_key: long(256), ..ok() }, "message.orderingKey: "),
        (Message { ordering_key: "\0".into(), ..ok() }, "message.orderingKey: "),
    ] {
        let status = bus.publish_durable(bad).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}");
        assert!(status.message().starts_with(field), "{} is not of {field}", status.message());
    }
    let status = bus.publish(Message { message_id: "m".into(), ..ok() }).await.unwrap_err();
    assert!(status.message().starts_with("message.messageId: is for durable"), "{status}");

    let weight = Subscription { weight: 101, ..live("a", "g") };
    let ack_wait = prost_types::Duration { seconds: 0, nanos: 1 };
    for (bad, field) in [
        (live("a.>.b", ""), "subscription.subject: has `>` before its end"),
        (live("a", "no spaces"), "subscription.queueGroup: "),
        (durable("a", ""), "subscription.queueGroup: missing"),
        (durable("*.a", "g"), "subscription.subject: must name its stream"),
        (weight, "subscription.weight: "),
        (Subscription { start_sequence: -1, ..durable("a", "g") }, "subscription.startSequence: "),
        (Subscription { ack_wait: Some(ack_wait), ..durable("a", "g") }, "subscription.ackWait: "),
        (
            Subscription { max_delivery_attempts: 1_001, ..durable("a", "g") },
            "subscription.maxDeliveryAttempts: ",
        ),
    ] {
        let status = bus.subscribe(bad, 1).next().await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}");
        assert!(status.message().starts_with(field), "{} is not of {field}", status.message());
    }
    let (say, mut heard) = raw(&core, live("a", "")).await;
    grant(&say, 1_000_001).await;
    let status = heard.message().await.unwrap_err();
    assert!(status.message().starts_with("credit.messages: "), "{status}");
    core.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_keeps_its_subject_until_it_is_deleted() {
    let core = TestCore::start().await;
    let bus = bus(&core).await;
    let mut first = subscribed(&bus, durable("s.a", "g"), 1).await;
    let refused = bus.subscribe(durable("s.b", "g"), 1).next().await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    let delete = || DeleteGroupRequest { stream: "s".into(), group: "g".into() };
    let mut client = BusServiceClient::new(channel(&core).await);
    client.delete_group(delete()).await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, first.next()).await.unwrap().unwrap_err();
    assert_eq!(ended.code(), Code::NotFound, "{ended}");
    assert_eq!(client.delete_group(delete()).await.unwrap_err().code(), Code::NotFound);
    subscribed(&bus, durable("s.b", "g"), 1).await;
    core.stop().await;
}
