//! A service without a state of its own: it counts, and keeps the count in the core alone. Kill it, start another one on
//! another VM, and that one goes on where this one was.
//!
//!     cargo run -p cnsmo-service --example counter -- /run/cnsmo/core.sock counter-1
//!
//! A request to `svc.counter` carries a number, as text, and is answered with the count after it was added. All instances share
//! the requests.

use std::{env, error::Error, path::PathBuf, time::Duration};

use cnsmo_proto::pb::{
    bus::{
        Credit, Delivery, Reply, SubscribeRequest, Subscription,
        bus_service_client::BusServiceClient, subscribe_request, subscribe_response,
    },
    catalog::Endpoint,
    state::{
        Compare, GetRequest, Op, Put, TxnRequest, compare::Target, op,
        state_service_client::StateServiceClient,
    },
};
use cnsmo_service::{
    announce::{Announcement, announce},
    channel,
    lifecycle::{Lifecycle, Phase},
    supervise::{Limits, Stop, stop_pair, supervise},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const SUBJECT: &str = "svc.counter";
const KEY: &str = "counter/total";
const TTL: Duration = Duration::from_secs(3);
/// Requests that may be on their way here; each answer makes room for one.
const CREDIT: u32 = 16;
/// Others count too: each try that fails means that one of them succeeded.
const ATTEMPTS_MAX: usize = 100;
const LIMITS: Limits = Limits { restarts_max: usize::MAX, ..Limits::DEFAULT };

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let mut arguments = env::args_os().skip(1);
    let (Some(socket), Some(name)) = (arguments.next(), arguments.next()) else {
        return Err("usage: counter SOCKET NAME".into());
    };
    let name = name.into_string().map_err(|_| "the name is not text")?;
    let channel = channel::local(&PathBuf::from(socket))?;
    let (stopper, stop) = stop_pair();
    let life = Lifecycle::new("Spawned");
    let announcement = Announcement {
        service: "counter".into(),
        name: name.clone(),
        endpoints: vec![Endpoint { protocol: "bus".into(), address: SUBJECT.into(), port: 0 }],
        ttl: TTL,
        ..Announcement::default()
    };
    let announcing = {
        let (channel, life, stop) = (channel.clone(), life.clone(), stop.clone());
        tokio::spawn(async move { announce(channel, announcement, &life, stop).await })
    };
    let (served, state) = (channel, life.clone());
    let serving = tokio::spawn(supervise("counter", LIMITS, life, stop, move |stop| {
        serve(served.clone(), name.clone(), state.clone(), stop)
    }));
    signal(SignalKind::terminate())?.recv().await;
    stopper.stop();
    serving.await??;
    announcing.await??;
    Ok(())
}

/// Serves requests until asked to stop.
async fn serve(channel: Channel, member: String, life: Lifecycle, mut stop: Stop) -> Result<()> {
    let (outgoing, requests) = mpsc::channel(CREDIT as usize);
    let subject = SUBJECT.to_owned();
    let queue_group = subject.clone();
    let subscription = Subscription { subject, queue_group, member, ..Subscription::default() };
    let send = async |message| {
        let request = SubscribeRequest { message: Some(message) };
        outgoing.send(request).await.map_err(|_| "the bus has gone")
    };
    send(subscribe_request::Message::Subscription(subscription)).await?;
    send(subscribe_request::Message::Credit(Credit { messages: CREDIT })).await?;
    let mut bus = BusServiceClient::new(channel.clone());
    let mut deliveries = bus.subscribe(ReceiverStream::new(requests)).await?.into_inner();
    loop {
        let message = tokio::select! {
            message = deliveries.message() => message?.ok_or("the bus has ended the subscription")?,
            () = stop.asked() => return Ok(()),
        };
        match message.message {
            Some(subscribe_response::Message::Subscribed(_)) => {
                life.step(Phase::Ready, "Healthy", "")?;
            }
            Some(subscribe_response::Message::Delivery(delivery)) => {
                let reply = answer(&channel, *delivery).await;
                send(subscribe_request::Message::Reply(reply)).await?;
                send(subscribe_request::Message::Credit(Credit { messages: 1 })).await?;
            }
            // A request that did not reach this member is the caller's to repeat.
            Some(subscribe_response::Message::Lagged(_)) | None => {}
        }
    }
}

async fn answer(channel: &Channel, delivery: Delivery) -> Reply {
    let reply = Reply { reply_id: delivery.reply_id, ..Reply::default() };
    let payload = delivery.message.map(|message| message.payload).unwrap_or_default();
    match add(channel, &payload).await {
        Ok(total) => {
            Reply { payload: total.to_string().into(), content_type: "text/plain".into(), ..reply }
        }
        Err(error) => Reply { error: error.to_string(), ..reply },
    }
}

/// Adds what the request says, if nobody else did meanwhile; else again.
async fn add(channel: &Channel, request: &[u8]) -> Result<i64> {
    let more: i64 = std::str::from_utf8(request)?.trim().parse()?;
    let mut state = StateServiceClient::new(channel.clone());
    for _ in 0..ATTEMPTS_MAX {
        let known =
            state.get(GetRequest { key: KEY.into(), min_revision: 0 }).await?.into_inner().kv;
        let revision = known.as_ref().map_or(0, |kv| kv.mod_revision);
        let total: i64 = match known {
            Some(kv) => std::str::from_utf8(&kv.value)?.parse()?,
            None => 0,
        };
        let total = total.checked_add(more).ok_or("the count would overflow")?;
        let put = Put {
            key: KEY.into(),
            value: total.to_string().into(),
            content_type: "text/plain".into(),
            lease_id: 0,
        };
        let request = TxnRequest {
            compare: vec![Compare { key: KEY.into(), target: Some(Target::ModRevision(revision)) }],
            success: vec![Op { op: Some(op::Op::Put(put)) }],
            ..TxnRequest::default()
        };
        if state.txn(request).await?.into_inner().succeeded {
            return Ok(total);
        }
    }
    Err("too many others count".into())
}
