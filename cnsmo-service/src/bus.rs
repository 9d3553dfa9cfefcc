//! The message bus, from a service's side.

use std::{collections::BTreeMap, error::Error, future::Future, time::Duration};

use bytes::Bytes;
use cnsmo_proto::pb::bus::{
    Ack, Credit, Delivery, Message, PublishRequest, Reply, RequestRequest, RequestResponse,
    SubscribeRequest, Subscription, ack, bus_service_client::BusServiceClient, subscribe_request,
    subscribe_response,
};
use tokio::{sync::mpsc, task::JoinSet, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{backoff::Backoff, supervise::Stop};

/// What a subscriber says and the connection has not taken yet. More waits.
const SAID_MAX: usize = 256;
/// Wait before the first try to subscribe again.
const FIRST_RETRY: Duration = Duration::from_millis(100);
/// Longest wait between tries.
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// How long the core may take to end a subscription.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest text that says why a message is rejected or a request failed.
const REASON_BYTES_MAX: usize = 1_024;

/// The bus behind a connection to the core. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Bus {
    client: BusServiceClient<Channel>,
}

/// What comes to a subscriber.
#[derive(Debug)]
pub enum Event {
    /// From now on messages come. Again after a lost connection: ephemeral messages in between did not reach this subscriber.
    Subscribed {
        /// Durable: the next message for the group is here or behind.
        next_sequence: i64,
    },
    /// A message.
    Delivery(Box<Incoming>),
    /// Ephemeral messages that did not reach this subscriber, because it was too slow.
    Lagged {
        /// How many.
        skipped: u64,
    },
}

impl Bus {
    /// Over this connection, which connects again by itself.
    pub fn new(channel: Channel) -> Self {
        Self { client: BusServiceClient::new(channel) }
    }

    /// Gives an ephemeral message to whom it reaches now. Returns how many subscribers and groups those were.
    ///
    /// # Errors
    /// As the core answers.
    pub async fn publish(&self, message: Message) -> Result<u32, Status> {
        let request = PublishRequest { message: Some(message), durable: false };
        Ok(self.client.clone().publish(request).await?.into_inner().receivers)
    }

    /// Keeps a message for all groups of its stream: on disk when this returns. Returns its place, and whether it was kept
    /// before. After an error it may be kept: publish it again with the same `message_id`.
    ///
    /// # Errors
    /// As the core answers.
    pub async fn publish_durable(&self, message: Message) -> Result<(i64, bool), Status> {
        let request = PublishRequest { message: Some(message), durable: true };
        let response = self.client.clone().publish(request).await?.into_inner();
        Ok((response.sequence, response.duplicate))
    }

    /// Gives a message to one subscriber and waits for its reply. `idempotent`: to another one if that one goes away.
    ///
    /// # Errors
    /// `UNAVAILABLE`: nobody subscribes. `DEADLINE_EXCEEDED`: no reply in time. `RESOURCE_EXHAUSTED`: all are busy.
    /// `ABORTED`: the subscriber failed, or went away and may have done it.
    pub async fn request(
        &self,
        message: Message,
        timeout: Duration,
        idempotent: bool,
    ) -> Result<RequestResponse, Status> {
        let timeout = prost_types::Duration::try_from(timeout)
            .map_err(|_| Status::invalid_argument("timeout: is too long"))?;
        let request = RequestRequest { message: Some(message), timeout: Some(timeout), idempotent };
        Ok(self.client.clone().request(request).await?.into_inner())
    }

    /// Subscribes at the first [`Subscriber::next`]. At most `credit` messages, at least one, are with the subscriber at a time:
    /// sent to it and not yet taken, or, if durable or a request, not yet settled.
    pub fn subscribe(&self, subscription: Subscription, credit: u32) -> Subscriber {
        Subscriber {
            client: self.client.clone(),
            subscription,
            credit: credit.max(1),
            connection: None,
            backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
        }
    }

    /// Has `handle` work on each message, on at most `at_once` at a time, until a stop is asked for; then it waits for those
    /// under work. What `handle` returns is the reply to a request. A durable message is acknowledged, or as the error says.
    ///
    /// # Errors
    /// The core refuses the subscription.
    pub async fn serve<H, F>(
        &self,
        subscription: Subscription,
        at_once: u32,
        mut stop: Stop,
        handle: H,
    ) -> Result<(), Status>
    where
        H: Fn(Delivery) -> F,
        F: Future<Output = Result<Answer, HandleError>> + Send + 'static,
    {
        let mut subscriber = self.subscribe(subscription, at_once);
        let mut working = JoinSet::new();
        let result = loop {
            let event = tokio::select! {
                event = subscriber.next() => event,
                () = stop.asked() => break Ok(()),
                // A handler that panicked has settled nothing: its message comes again.
                Some(_) = working.join_next() => continue,
            };
            match event {
                Ok(Event::Delivery(incoming)) => {
                    let work = handle(incoming.delivery.clone());
                    working.spawn(async move { incoming.settle(work.await).await });
                }
                Ok(Event::Lagged { skipped }) => {
                    tracing::warn!(skipped, "too slow for the messages that come");
                }
                Ok(Event::Subscribed { .. }) => {}
                Err(status) => break Err(status),
            }
        };
        while working.join_next().await.is_some() {}
        result
    }
}

/// A reply to a request; of other messages nobody sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Payload.
    pub payload: Bytes,
    /// How to read it.
    pub content_type: String,
    /// Beside it.
    pub headers: BTreeMap<String, String>,
}

/// Why a message was not handled, and what shall become of it.
#[derive(Debug, thiserror::Error)]
pub enum HandleError {
    /// Deliver it again after some time. To a request: it failed.
    #[error("{cause}")]
    Retry {
        /// Until then.
        delay: Duration,
        /// Why.
        cause: Box<dyn Error + Send + Sync>,
    },
    /// Nobody can handle it: to the dead letters. To a request: it failed.
    #[error("{0}")]
    Reject(Box<dyn Error + Send + Sync>),
}

/// Messages, one after the other, also over connections that are lost and made again.
#[derive(Debug)]
pub struct Subscriber {
    client: BusServiceClient<Channel>,
    subscription: Subscription,
    credit: u32,
    connection: Option<Connection>,
    backoff: Backoff,
}

#[derive(Debug)]
struct Connection {
    say: mpsc::Sender<SubscribeRequest>,
    incoming: Streaming<cnsmo_proto::pb::bus::SubscribeResponse>,
    /// Messages that are done with, and for which no new credit was given.
    done: mpsc::UnboundedReceiver<()>,
    tell_done: mpsc::UnboundedSender<()>,
    owed: u32,
}

impl Subscriber {
    /// The next event. May be dropped while it waits: nothing is lost.
    ///
    /// # Errors
    /// The core refuses the subscription: trying again would not help.
    pub async fn next(&mut self) -> Result<Event, Status> {
        loop {
            let result = match &mut self.connection {
                Some(connection) => connection.next(self.credit).await,
                None => match self.connect().await {
                    Ok(connection) => {
                        self.connection = Some(connection);
                        continue;
                    }
                    Err(status) => Err(status),
                },
            };
            let status = match result {
                Ok(event) => {
                    if matches!(event, Event::Subscribed { .. }) {
                        self.backoff.reset();
                    }
                    return Ok(event);
                }
                Err(status) => status,
            };
            self.connection = None;
            if is_final(status.code()) {
                return Err(status);
            }
            let delay = self.backoff.after_failure();
            tracing::info!(reason = status.message(), ?delay, "subscription lost, trying again");
            sleep(delay).await;
        }
    }

    /// Ends the subscription once the core has heard what was said of durable messages.
    pub async fn end(self) {
        let Some(Connection { say, mut incoming, .. }) = self.connection else { return };
        drop(say);
        if self.subscription.durable {
            // The core ends its side after ours. What it sent before is given to others.
            let end = async { while let Ok(Some(_)) = incoming.message().await {} };
            let _ = tokio::time::timeout(END_TIMEOUT, end).await;
        }
    }

    async fn connect(&mut self) -> Result<Connection, Status> {
        let (say, said) = mpsc::channel(SAID_MAX);
        let first = [
            subscribe_request::Message::Subscription(self.subscription.clone()),
            subscribe_request::Message::Credit(Credit { messages: self.credit }),
        ];
        for message in first {
            // There is room for both, and the stream below holds the other end.
            let _ = say.try_send(SubscribeRequest { message: Some(message) });
        }
        let incoming = self.client.subscribe(ReceiverStream::new(said)).await?.into_inner();
        let (tell_done, done) = mpsc::unbounded_channel();
        Ok(Connection { say, incoming, done, tell_done, owed: 0 })
    }
}

impl Connection {
    async fn next(&mut self, credit: u32) -> Result<Event, Status> {
        loop {
            if self.owed > 0 && self.owed >= credit / 2 {
                let message = subscribe_request::Message::Credit(Credit { messages: self.owed });
                // Of a stream that has ended, the core says why.
                if let Ok(place) = self.say.try_reserve() {
                    place.send(SubscribeRequest { message: Some(message) });
                    self.owed = 0;
                }
            }
            let response = tokio::select! {
                response = self.incoming.message() => response?,
                Some(()) = self.done.recv() => {
                    self.owed += 1;
                    continue;
                }
            };
            let lost = || Status::unavailable("the core ended the subscription");
            let message = response.ok_or_else(lost)?.message;
            return Ok(match message.ok_or_else(|| Status::internal("an empty message"))? {
                subscribe_response::Message::Subscribed(subscribed) => {
                    Event::Subscribed { next_sequence: subscribed.next_sequence }
                }
                subscribe_response::Message::Lagged(lagged) => {
                    Event::Lagged { skipped: lagged.skipped }
                }
                subscribe_response::Message::Delivery(delivery) => {
                    let (say, done) = (self.say.clone(), Done(self.tell_done.clone()));
                    let is_live = delivery.sequence == 0 && delivery.reply_id == 0;
                    let done = if is_live {
                        self.owed += 1;
                        None
                    } else {
                        Some(done)
                    };
                    let delivery = *delivery;
                    Event::Delivery(Box::new(Incoming { delivery, say, _done: done }))
                }
            });
        }
    }
}

/// Whether the core would answer the same again.
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::NotFound
            | Code::Unimplemented
    )
}

/// A message that has come. A durable one that is dropped without a word comes again after its time.
#[derive(Debug)]
pub struct Incoming {
    /// As it came.
    pub delivery: Delivery,
    say: mpsc::Sender<SubscribeRequest>,
    _done: Option<Done>,
}

/// Tells on drop that there may be one more.
#[derive(Debug)]
struct Done(mpsc::UnboundedSender<()>);

impl Drop for Done {
    fn drop(&mut self) {
        // The connection has ended.
        let _ = self.0.send(());
    }
}

impl Incoming {
    /// The message.
    pub fn message(&self) -> Message {
        self.delivery.message.clone().unwrap_or_default()
    }

    /// The group is done with it. Of an ephemeral message nothing is said.
    pub async fn ack(self) {
        self.say_of(ack::Result::Ack, Duration::ZERO, String::new()).await;
    }

    /// Deliver it again.
    pub async fn retry(self, delay: Duration) {
        self.say_of(ack::Result::Retry, delay, String::new()).await;
    }

    /// To the dead letters.
    pub async fn reject(self, reason: &str) {
        self.say_of(ack::Result::Reject, Duration::ZERO, cut(reason)).await;
    }

    /// Still at work: its time begins again.
    pub async fn in_progress(&self) {
        self.say_of(ack::Result::InProgress, Duration::ZERO, String::new()).await;
    }

    /// Replies to a request. Of other messages nothing is said.
    pub async fn reply(self, answer: Answer) {
        let Answer { payload, content_type, headers } = answer;
        let reply_id = self.delivery.reply_id;
        let error = String::new();
        self.say_reply(Reply { reply_id, payload, content_type, headers, error }).await;
    }

    /// Says that a request failed.
    pub async fn fail(self, reason: &str) {
        let (reply_id, error) = (self.delivery.reply_id, cut(reason));
        self.say_reply(Reply { reply_id, error, ..Reply::default() }).await;
    }

    async fn settle(self, result: Result<Answer, HandleError>) {
        let is_request = self.delivery.reply_id != 0;
        match result {
            Ok(answer) if is_request => self.reply(answer).await,
            Ok(_) => self.ack().await,
            Err(error) if is_request => self.fail(&error.to_string()).await,
            Err(HandleError::Retry { delay, cause }) => {
                tracing::warn!(sequence = self.delivery.sequence, %cause, "message not handled");
                self.retry(delay).await;
            }
            Err(HandleError::Reject(cause)) => self.reject(&cause.to_string()).await,
        }
    }

    async fn say_of(&self, result: ack::Result, delay: Duration, reason: String) {
        if self.delivery.sequence == 0 {
            return;
        }
        let ack = Ack {
            sequence: self.delivery.sequence,
            result: result.into(),
            retry_delay: prost_types::Duration::try_from(delay).ok(),
            reason,
        };
        self.say(subscribe_request::Message::Ack(ack)).await;
    }

    async fn say_reply(&self, reply: Reply) {
        if reply.reply_id != 0 {
            self.say(subscribe_request::Message::Reply(reply)).await;
        }
    }

    async fn say(&self, message: subscribe_request::Message) {
        // The connection was lost: the core gives the message to somebody again.
        let _ = self.say.send(SubscribeRequest { message: Some(message) }).await;
    }
}

/// At most as long as the core takes.
fn cut(reason: &str) -> String {
    reason[..reason.floor_char_boundary(REASON_BYTES_MAX)].to_owned()
}
