//! The message bus of a running core, for `cargo xtask bench state`: prints rows. The one argument is the core's socket.

use std::{
    env,
    io::Write as _,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use cnsmo_proto::pb::bus::{Message, Subscription};
use cnsmo_service::{
    bus::{Answer, Bus, Event},
    supervise::{Stopper, stop_pair},
};
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

const ROUNDS: usize = 3;
/// Of each run: long against its beginning, short enough that a round is under one load of the machine.
const RUN: Duration = Duration::from_secs(3);
const SUBSCRIBERS: usize = 1_000;
/// Below the core's limit of calls on one connection.
const STREAMS_PER_CONNECTION: usize = 50;
const PUBLISHERS: usize = 64;
const PUBLISHER_CONNECTIONS: usize = 8;
/// Messages that each subscriber may be behind: far below what the core keeps for it, so that none is skipped.
const BEHIND_MAX: u64 = 256;
const CREDIT: u32 = 4_096;
const PAYLOAD_BYTES: usize = 256;
/// One after the other.
const REQUESTS: usize = 2_000;
/// Of the design, as there is no peer that does the same.
const DELIVERIES: f64 = 250_000.0;
const PUBLISHES: f64 = 25_000.0;
const REQUEST_P50_US: f64 = 300.0;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(rows) => {
            let _ = writeln!(std::io::stdout(), "{rows}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "cnsmo-bench-bus: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<serde_json::Value> {
    let socket = env::args().nth(1).context("the argument is the socket of a core")?;
    let (mut deliveries, mut publishes, mut requests) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        deliveries.push(ephemeral(&socket).await?);
        publishes.push(durable(&socket).await?);
        requests.push(request(&socket).await?);
    }
    Ok(serde_json::json!([
        row("state/bus-ephemeral", ("deliveries/s", "higher"), &deliveries, DELIVERIES),
        row("state/bus-durable", ("publishes/s", "higher"), &publishes, PUBLISHES),
        row("state/bus-request-p50", ("us", "lower"), &requests, REQUEST_P50_US),
    ]))
}

/// As the bench of xtask has them, beside a limit.
fn row(id: &str, (unit, better): (&str, &str), ours: &[f64], limit: f64) -> serde_json::Value {
    let ours = median(ours);
    serde_json::json!({
        "id": id, "unit": unit, "ours": ours, "peer_name": "limit", "peer": limit,
        "ratio": ours / limit, "better": better, "rounds": ROUNDS,
    })
}

fn median(samples: &[f64]) -> f64 {
    let mut samples = samples.to_vec();
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

async fn connect(socket: &str) -> anyhow::Result<Bus> {
    let channel: Channel = Endpoint::from_shared(format!("unix://{socket}"))?.connect().await?;
    Ok(Bus::new(channel))
}

fn message(subject: &str) -> Message {
    Message {
        subject: subject.to_owned(),
        payload: vec![0x5a; PAYLOAD_BYTES].into(),
        ..Message::default()
    }
}

/// Deliveries per second of one subject to a thousand subscribers.
async fn ephemeral(socket: &str) -> anyhow::Result<f64> {
    let received = Arc::new(AtomicU64::new(0));
    let ready = Arc::new(AtomicU64::new(0));
    let mut subscribers = JoinSet::new();
    let mut bus = connect(socket).await?;
    for n in 0..SUBSCRIBERS {
        if n % STREAMS_PER_CONNECTION == 0 {
            bus = connect(socket).await?;
        }
        let (received, ready) = (received.clone(), ready.clone());
        let wanted = Subscription { subject: "bench.live".to_owned(), ..Subscription::default() };
        let mut subscriber = bus.subscribe(wanted, CREDIT);
        subscribers.spawn(async move {
            loop {
                match subscriber.next().await? {
                    Event::Subscribed { .. } => ready.fetch_add(1, Ordering::Relaxed),
                    Event::Delivery(_) => received.fetch_add(1, Ordering::Relaxed),
                    Event::Lagged { skipped } => anyhow::bail!("{skipped} messages were skipped"),
                };
            }
        });
    }
    while ready.load(Ordering::Relaxed) < SUBSCRIBERS as u64 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let publisher = connect(socket).await?;
    let (begin, mut published) = (Instant::now(), 0);
    while begin.elapsed() < RUN {
        let behind = published - received.load(Ordering::Relaxed) / SUBSCRIBERS as u64;
        if behind >= BEHIND_MAX {
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        }
        publisher.publish(message("bench.live")).await?;
        published += 1;
        if let Some(Ok(ended)) = subscribers.try_join_next() {
            let () = ended?;
        }
    }
    let rate = received.load(Ordering::Relaxed) as f64 / begin.elapsed().as_secs_f64();
    subscribers.shutdown().await;
    Ok(rate)
}

/// Publishes per second, each answered once it is on disk, by publishers that each wait for their last answer.
async fn durable(socket: &str) -> anyhow::Result<f64> {
    let mut connections = Vec::new();
    for _ in 0..PUBLISHER_CONNECTIONS {
        connections.push(connect(socket).await?);
    }
    let mut publishers = JoinSet::new();
    let begin = Instant::now();
    for n in 0..PUBLISHERS {
        let bus = connections[n % PUBLISHER_CONNECTIONS].clone();
        publishers.spawn(async move {
            let mut count = 0_u64;
            while begin.elapsed() < RUN {
                bus.publish_durable(message("bench.durable")).await?;
                count += 1;
            }
            anyhow::Ok(count)
        });
    }
    let mut sum = 0;
    while let Some(count) = publishers.join_next().await {
        sum += count??;
    }
    Ok(sum as f64 / begin.elapsed().as_secs_f64())
}

/// Median time of a request with its reply, in microseconds; client and service have connections of their own.
async fn request(socket: &str) -> anyhow::Result<f64> {
    let service = connect(socket).await?;
    let (stopper, stop): (Stopper, _) = stop_pair();
    let of = Subscription {
        subject: "svc.bench".to_owned(),
        queue_group: "svc.bench".to_owned(),
        ..Subscription::default()
    };
    let serving = tokio::spawn(async move {
        let echo = |delivery: cnsmo_proto::pb::bus::Delivery| async move {
            let payload = delivery.message.unwrap_or_default().payload;
            Ok(Answer { payload, ..Answer::default() })
        };
        service.serve(of, 16, stop, echo).await
    });
    let client = connect(socket).await?;
    let timeout = Duration::from_secs(10);
    // Until the service is there.
    while client.request(message("svc.bench"), timeout, false).await.is_err() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let begin = Instant::now();
        client.request(message("svc.bench"), timeout, false).await?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    stopper.stop();
    serving.await??;
    Ok(median(&times))
}
