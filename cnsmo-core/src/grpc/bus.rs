//! `BusService`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cnsmo_proto::pb::bus::{
    self as pb, DeleteGroupRequest, DeleteGroupResponse, Group, ListMessagesRequest,
    ListMessagesResponse, ListStreamsRequest, ListStreamsResponse, Message, PublishRequest,
    PublishResponse, ReplayRequest, ReplayResponse, RequestRequest, RequestResponse, StoredMessage,
    Stream, SubscribeRequest, bus_service_server, subscribe_request,
};
use prost::Message as _;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    bus::{
        Bus, BusError, CREDIT_MAX, Durable, Member, Outbox, Outgoing, RequestError, Subscription,
        timestamp,
    },
    error::Error,
    identity::caller::Caller,
    subject::{InvalidSubject, Pattern, Subject},
};

/// Largest request: a message with all that belongs to it.
pub(super) const MESSAGE_BYTES_MAX: usize = PAYLOAD_BYTES_MAX + (64 << 10);
const PAYLOAD_BYTES_MAX: usize = 1 << 20;
const HEADERS_MAX: usize = 32;
/// Of names and values together.
const HEADER_BYTES_MAX: usize = 4 << 10;
const CONTENT_TYPE_BYTES_MAX: usize = 255;
const MESSAGE_ID_BYTES_MAX: usize = 64;
const ORDERING_KEY_BYTES_MAX: usize = 255;
const MEMBER_BYTES_MAX: usize = 255;
const GROUP_BYTES_MAX: usize = 64;
const REASON_BYTES_MAX: usize = 1_024;
/// Headers that begin so are the bus's own.
const OWN_HEADERS: &str = "cnsmo-";
const WEIGHT_MAX: u32 = 100;
const ATTEMPTS_DEFAULT: u32 = 5;
const ATTEMPTS_MAX: u32 = 1_000;
const ACK_WAIT_DEFAULT: Duration = Duration::from_secs(30);
const ACK_WAIT_MIN: Duration = Duration::from_millis(100);
const ACK_WAIT_MAX: Duration = Duration::from_secs(3_600);
const REQUEST_DEFAULT: Duration = Duration::from_secs(10);
const REQUEST_MAX: Duration = Duration::from_secs(300);
const LIST_DEFAULT: u32 = 100;
const LIST_MAX: u32 = 1_000;
/// Sequences in one request to replay.
const REPLAY_MAX: usize = 10_000;
/// How long a subscriber may take to say what it wants.
const FIRST_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Service {
    bus: Bus,
}

impl Service {
    pub(super) fn new(bus: Bus) -> Self {
        Self { bus }
    }
}

#[tonic::async_trait]
impl bus_service_server::BusService for Service {
    type SubscribeStream = Outgoing;

    async fn publish(
        &self,
        request: Request<PublishRequest>,
    ) -> Result<Response<PublishResponse>, Status> {
        let who = Who::of(&request)?;
        let PublishRequest { message, durable } = request.into_inner();
        let message = checked(message, durable)?;
        let subject = subject_of(&message)?;
        who.may_publish(subject)?;
        if !durable {
            let message = Arc::new(message);
            let receivers = self.bus.publish(subject_of(&message)?, &message);
            return Ok(Response::new(PublishResponse { receivers, ..PublishResponse::default() }));
        }
        let stream = subject.stream().map_err(|e| at("message.subject", e))?;
        let (sequence, duplicate) = self.bus.publish_durable(stream, &message).await?;
        Ok(Response::new(PublishResponse { sequence, duplicate, receivers: 0 }))
    }

    async fn subscribe(
        &self,
        request: Request<Streaming<SubscribeRequest>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let who = Who::of(&request)?;
        let outbox = Arc::<Outbox>::default();
        // The answer begins before the subscription has come: a client may wait for it first.
        tokio::spawn(serve(self.bus.clone(), who, request.into_inner(), outbox.clone()));
        Ok(Response::new(Outgoing::new(outbox)))
    }

    async fn request(
        &self,
        request: Request<RequestRequest>,
    ) -> Result<Response<RequestResponse>, Status> {
        let who = Who::of(&request)?;
        let RequestRequest { message, timeout, idempotent } = request.into_inner();
        let message = checked(message, false)?;
        who.may_publish(subject_of(&message)?)?;
        let timeout = time(timeout, "timeout", REQUEST_DEFAULT, Duration::ZERO..=REQUEST_MAX)?;
        let served = self.bus.request(Arc::new(message), timeout, idempotent).await?;
        let pb::Reply { payload, content_type, headers, .. } = served.reply;
        let served_by = served.served_by;
        Ok(Response::new(RequestResponse { payload, content_type, headers, served_by }))
    }

    async fn list_streams(
        &self,
        _: Request<ListStreamsRequest>,
    ) -> Result<Response<ListStreamsResponse>, Status> {
        let streams = self.bus.streams().await?;
        let streams = streams.into_iter().map(|(state, members)| Stream {
            name: state.name,
            messages: state.messages,
            bytes: state.bytes,
            first_sequence: state.first,
            last_sequence: state.last,
            groups: (state.groups.into_iter().zip(members))
                .map(|(group, members)| Group {
                    name: group.name,
                    pending: group.pending,
                    in_flight: group.in_flight,
                    members: u32::try_from(members).unwrap_or(u32::MAX),
                    subject: group.subject,
                })
                .collect(),
        });
        Ok(Response::new(ListStreamsResponse { streams: streams.collect() }))
    }

    async fn list_messages(
        &self,
        request: Request<ListMessagesRequest>,
    ) -> Result<Response<ListMessagesResponse>, Status> {
        let ListMessagesRequest { stream, after_sequence, limit } = request.into_inner();
        let stream = stream_name(&stream)?;
        if limit > LIST_MAX {
            return Err(invalid(format!("limit: {limit} is above {LIST_MAX}")));
        }
        let limit = if limit == 0 { LIST_DEFAULT } else { limit };
        let kept = self.bus.messages(stream, after_sequence, limit as usize).await?;
        let mut messages = Vec::with_capacity(kept.len());
        for one in kept {
            let message = Message::decode(one.body).map_err(|_| Error::Internal)?;
            let publish_time = timestamp(one.publish_ms);
            let sequence = one.sequence;
            messages.push(StoredMessage { message: Some(message), sequence, publish_time });
        }
        Ok(Response::new(ListMessagesResponse { messages }))
    }

    async fn replay(
        &self,
        request: Request<ReplayRequest>,
    ) -> Result<Response<ReplayResponse>, Status> {
        let ReplayRequest { stream, sequences, group } = request.into_inner();
        let stream = stream_name(&stream)?;
        if sequences.len() > REPLAY_MAX {
            return Err(invalid(format!("sequences: more than {REPLAY_MAX}")));
        }
        let replayed = self.bus.replay(stream, &group, &sequences).await?;
        Ok(Response::new(ReplayResponse { replayed }))
    }

    async fn delete_group(
        &self,
        request: Request<DeleteGroupRequest>,
    ) -> Result<Response<DeleteGroupResponse>, Status> {
        let DeleteGroupRequest { stream, group } = request.into_inner();
        self.bus.delete_group(stream_name(&stream)?, &group).await?;
        Ok(Response::new(DeleteGroupResponse {}))
    }
}

/// Who calls, and what that one may do.
struct Who(Caller);

impl Who {
    fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        Ok(Self(Caller::of(request)?.clone()))
    }

    fn may_publish(&self, subject: Subject<'_>) -> Result<(), Status> {
        if subject.is_dead_letter() {
            return Err(invalid("message.subject: only the bus publishes to dead".to_owned()));
        }
        if !self.0.may_publish(subject.as_str()) {
            let text = format!(
                "message.subject: {} is not allowed to {}",
                subject.as_str(),
                self.0.identity
            );
            return Err(Status::permission_denied(text));
        }
        Ok(())
    }

    fn may_subscribe(&self, pattern: &Pattern) -> Result<(), Status> {
        if !self.0.may_subscribe(pattern.as_str()) {
            let text = format!(
                "subscription.subject: {} is not allowed to {}",
                pattern.as_str(),
                self.0.identity
            );
            return Err(Status::permission_denied(text));
        }
        Ok(())
    }
}

/// Hears what a subscriber says, until it is gone or says what it must not.
async fn serve(bus: Bus, who: Who, mut incoming: Streaming<SubscribeRequest>, outbox: Arc<Outbox>) {
    let first = tokio::select! {
        first = tokio::time::timeout(FIRST_TIMEOUT, incoming.message()) => first,
        () = outbox.gone() => return,
    };
    let member = match first {
        Ok(Ok(first)) => subscribe(&bus, &who, first, &outbox).await,
        Ok(Err(status)) => Err(status),
        Err(_) => Err(Status::deadline_exceeded("the subscription did not come in time")),
    };
    let member = match member {
        Ok(member) => member,
        Err(status) => return outbox.end(status),
    };
    loop {
        let said = tokio::select! {
            said = incoming.message() => said,
            () = outbox.gone() => break,
        };
        match said {
            Ok(Some(said)) => {
                if let Err(status) = hear(&member, said).await {
                    outbox.end(status);
                    break;
                }
            }
            // It has nothing more to say, and cannot acknowledge what it would get.
            Ok(None) if member.is_durable() => {
                outbox.finish();
                return member.leave().await;
            }
            // It may listen for long.
            Ok(None) => break,
            Err(status) => {
                outbox.end(status);
                break;
            }
        }
    }
    outbox.gone().await;
    member.leave().await;
}

async fn subscribe(
    bus: &Bus,
    who: &Who,
    first: Option<SubscribeRequest>,
    outbox: &Arc<Outbox>,
) -> Result<Member, Status> {
    let Some(SubscribeRequest { message: Some(subscribe_request::Message::Subscription(wanted)) }) =
        first
    else {
        return Err(invalid("subscription: must be the first message".to_owned()));
    };
    let subscription = subscription(wanted, &who.0.identity)?;
    who.may_subscribe(&subscription.pattern)?;
    Ok(bus.subscribe(&who.0.identity, subscription, outbox.clone()).await?)
}

async fn hear(member: &Member, said: SubscribeRequest) -> Result<(), Status> {
    match said.message {
        Some(subscribe_request::Message::Credit(credit)) => member.grant(credit.messages)?,
        Some(subscribe_request::Message::Ack(ack)) => {
            if pb::ack::Result::try_from(ack.result).unwrap_or_default()
                == pb::ack::Result::Unspecified
            {
                return Err(invalid("ack.result: missing or unknown".to_owned()));
            }
            limit_bytes(&ack.reason, "ack.reason", REASON_BYTES_MAX)?;
            if ack.retry_delay.is_some_and(|delay| Duration::try_from(delay).is_err()) {
                return Err(invalid("ack.retryDelay: is not a time from now".to_owned()));
            }
            member.settle(ack).await;
        }
        Some(subscribe_request::Message::Reply(reply)) => {
            check_content(&reply.payload, &reply.content_type, &reply.headers, "reply")?;
            limit_bytes(&reply.error, "reply.error", REASON_BYTES_MAX)?;
            member.reply(reply);
        }
        Some(subscribe_request::Message::Subscription(_)) => {
            return Err(invalid("subscription: must be the first message only".to_owned()));
        }
        None => return Err(invalid("message: missing".to_owned())),
    }
    Ok(())
}

fn subscription(wanted: pb::Subscription, identity: &str) -> Result<Subscription, Status> {
    let pattern = Pattern::parse(&wanted.subject).map_err(|e| at("subscription.subject", e))?;
    let group = wanted.queue_group;
    let name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
    if group.len() > GROUP_BYTES_MAX || !group.bytes().all(name) {
        let text =
            "subscription.queueGroup: is not a name of up to 64 letters, digits, _, - and dots";
        return Err(invalid(text.to_owned()));
    }
    if wanted.weight > WEIGHT_MAX {
        let text = format!("subscription.weight: {} is above {WEIGHT_MAX}", wanted.weight);
        return Err(invalid(text));
    }
    limit_bytes(&wanted.member, "subscription.member", MEMBER_BYTES_MAX)?;
    let durable = if wanted.durable {
        if group.is_empty() {
            let text = "subscription.queueGroup: missing, and a durable subscription needs one";
            return Err(invalid(text.to_owned()));
        }
        pattern.stream().map_err(|e| at("subscription.subject", e))?;
        if wanted.start_sequence < 0 {
            return Err(invalid("subscription.startSequence: is negative".to_owned()));
        }
        if wanted.max_delivery_attempts > ATTEMPTS_MAX {
            let text = format!("subscription.maxDeliveryAttempts: is above {ATTEMPTS_MAX}");
            return Err(invalid(text));
        }
        let times = ACK_WAIT_MIN..=ACK_WAIT_MAX;
        let attempts = wanted.max_delivery_attempts;
        Some(Durable {
            start: wanted.start_sequence,
            ack_wait: time(wanted.ack_wait, "subscription.ackWait", ACK_WAIT_DEFAULT, times)?,
            attempts_max: if attempts == 0 { ATTEMPTS_DEFAULT } else { attempts },
        })
    } else {
        None
    };
    let member = if wanted.member.is_empty() { identity.to_owned() } else { wanted.member };
    Ok(Subscription { pattern, group, weight: wanted.weight.max(1), member, durable })
}

fn checked(message: Option<Message>, durable: bool) -> Result<Message, Status> {
    let message = message.ok_or_else(|| invalid("message: missing".to_owned()))?;
    subject_of(&message)?;
    check_content(&message.payload, &message.content_type, &message.headers, "message")?;
    for (text, field, limit) in [
        (&message.message_id, "message.messageId", MESSAGE_ID_BYTES_MAX),
        (&message.ordering_key, "message.orderingKey", ORDERING_KEY_BYTES_MAX),
    ] {
        if !durable && !text.is_empty() {
            return Err(invalid(format!("{field}: is for durable messages only")));
        }
        limit_bytes(text, field, limit)?;
        if text.chars().any(char::is_control) {
            return Err(invalid(format!("{field}: contains a control character")));
        }
    }
    Ok(message)
}

fn check_content(
    payload: &[u8],
    content_type: &str,
    headers: &BTreeMap<String, String>,
    field: &str,
) -> Result<(), Status> {
    if payload.len() > PAYLOAD_BYTES_MAX {
        let text =
            format!("{field}.payload: {} bytes are above {PAYLOAD_BYTES_MAX}", payload.len());
        return Err(invalid(text));
    }
    limit_bytes(content_type, &format!("{field}.contentType"), CONTENT_TYPE_BYTES_MAX)?;
    if headers.len() > HEADERS_MAX {
        return Err(invalid(format!("{field}.headers: more than {HEADERS_MAX}")));
    }
    let bytes: usize = headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > HEADER_BYTES_MAX {
        let text = format!("{field}.headers: {bytes} bytes are above {HEADER_BYTES_MAX}");
        return Err(invalid(text));
    }
    if let Some(name) = headers.keys().find(|name| name.starts_with(OWN_HEADERS)) {
        return Err(invalid(format!("{field}.headers[{name}]: is a name of the bus itself")));
    }
    Ok(())
}

fn subject_of(message: &Message) -> Result<Subject<'_>, Status> {
    Subject::parse(&message.subject).map_err(|e| at("message.subject", e))
}

fn stream_name(name: &str) -> Result<&str, Status> {
    let subject = Subject::parse(name).map_err(|e| at("stream", e))?;
    match subject.stream() {
        Ok(stream) if stream == name => Ok(name),
        _ => Err(invalid("stream: is not the name of a stream".to_owned())),
    }
}

fn limit_bytes(text: &str, field: &str, limit: usize) -> Result<(), Status> {
    if text.len() > limit {
        return Err(invalid(format!("{field}: {} bytes are above {limit}", text.len())));
    }
    Ok(())
}

/// Nothing and zero are the default.
fn time(
    given: Option<prost_types::Duration>,
    field: &str,
    default: Duration,
    allowed: std::ops::RangeInclusive<Duration>,
) -> Result<Duration, Status> {
    let given = given.map(Duration::try_from).transpose();
    let given = given.map_err(|_| invalid(format!("{field}: is negative or too large")))?;
    match given {
        None | Some(Duration::ZERO) => Ok(default),
        Some(given) if allowed.contains(&given) => Ok(given),
        Some(given) => {
            let (least, most) = (allowed.start(), allowed.end());
            Err(invalid(format!("{field}: {given:?} is not from {least:?} to {most:?}")))
        }
    }
}

fn at(field: &str, error: InvalidSubject) -> Status {
    invalid(format!("{field}: {error}"))
}

fn invalid(text: String) -> Status {
    Error::Invalid(text).into()
}

impl From<BusError> for Status {
    fn from(error: BusError) -> Self {
        let text = error.to_string();
        match error {
            BusError::Credit => {
                Self::invalid_argument(format!("credit.messages: above {CREDIT_MAX} together"))
            }
            BusError::Exhausted(_) => Self::resource_exhausted(text),
            BusError::Conflict(_) => Self::failed_precondition(text),
            BusError::NotFound(_) => Self::not_found(text),
            BusError::Stopped => Self::unavailable(text),
            BusError::Store(cause) => Error::Store(cause).into(),
            BusError::Request(cause) => match cause {
                RequestError::NoSubscriber(_) => Self::unavailable(text),
                RequestError::Busy(_) => Self::resource_exhausted(text),
                RequestError::NoReply { .. } => Self::deadline_exceeded(text),
                RequestError::Lost { .. } | RequestError::Failed { .. } => Self::aborted(text),
            },
        }
    }
}
