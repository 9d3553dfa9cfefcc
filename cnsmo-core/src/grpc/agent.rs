//! `AgentService`.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use cnsmo_proto::pb::{
    agent::{ConnectRequest, Hello, InstanceReport, agent_service_server, connect_request},
    catalog::Instance,
};
use prost::Message as _;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::{Body, BoxFuture, StdError, http},
    server::{NamedService, StreamingService},
};

use super::MESSAGE_BYTES_MAX;
use crate::{
    actor::{Core, FromAgent},
    catalog::Catalog,
    error::Error,
    fleet::{DOWN_MAX, Down, DownSender, PROTOCOL_VERSION},
    identity::{Kind, Peer, caller::Caller},
    links::Links,
};

/// How long an agent may take to introduce itself.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Reports of instances that wait for the store. An agent that sends more is cut.
const REPORTS_MAX: usize = 16;
/// Instances that one agent may report; one with more is cut.
const REPORTED_MAX: usize = 1_000;
/// Between two reports of one agent that are kept: each change in them is a commit.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// After an error of the store.
const REPORT_RETRY: Duration = Duration::from_secs(1);

/// First size of the two buffers of a stream, which it keeps while it lives: most messages fit.
const BUFFER_BYTES: usize = 1_024;
/// Bytes of messages that are handed to HTTP/2 at once.
const YIELD_BYTES: usize = 32 << 10;
const CONNECT: &str = "/cnsmo.agent.v1.AgentService/Connect";

type Messages = mpsc::Sender<Result<Down, Status>>;

/// As the generated one, but for what goes over the wire: resources that many agents are sent are encoded once.
#[derive(Clone, Debug)]
pub(super) struct Service {
    parts: Parts,
}

/// What a stream stands on.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    pub(super) core: Core,
    pub(super) catalog: Catalog,
    pub(super) links: Links,
}

impl Service {
    pub(super) fn new(parts: Parts) -> Self {
        Self { parts }
    }
}

impl NamedService for Service {
    const NAME: &'static str = agent_service_server::SERVICE_NAME;
}

impl<B> tower::Service<http::Request<B>> for Service
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        if request.uri().path() != CONNECT {
            let answer = Status::unimplemented("AgentService has no such call").into_http();
            return Box::pin(std::future::ready(Ok(answer)));
        }
        let connect = Connect(self.parts.clone());
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Wire)
                .apply_max_message_size_config(Some(MESSAGE_BYTES_MAX), None);
            Ok(grpc.streaming(connect, request).await)
        })
    }
}

struct Connect(Parts);

impl StreamingService<ConnectRequest> for Connect {
    type Response = Down;
    type ResponseStream = ReceiverStream<Result<Down, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<ConnectRequest>>) -> Self::Future {
        let parts = self.0.clone();
        Box::pin(async move {
            let peer = Caller::of(&request)?.peer().filter(|peer| peer.subject.kind == Kind::Agent);
            let peer = peer.ok_or_else(|| Status::permission_denied("only agents may connect"))?;
            let peer = peer.clone();
            let (down, messages) = mpsc::channel(DOWN_MAX);
            // The answer begins before the hello has come: a client may wait for it first.
            tokio::spawn(serve(parts, peer, request.into_inner(), down));
            Ok(Response::new(ReceiverStream::new(messages)))
        })
    }
}

struct Wire;

impl Codec for Wire {
    type Encode = Down;
    type Decode = ConnectRequest;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Wire {
    type Item = Down;
    type Error = Status;

    fn encode(&mut self, down: Down, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        down.encode(buffer);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}

impl Decoder for Wire {
    type Item = ConnectRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<ConnectRequest>, Status> {
        let request = ConnectRequest::decode(buffer);
        request.map(Some).map_err(|error| Status::invalid_argument(error.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}

/// Hands an agent's messages to the core until either side ends the stream.
async fn serve(parts: Parts, peer: Peer, mut up: Streaming<ConnectRequest>, messages: Messages) {
    let Parts { core, catalog, links } = parts;
    let node = peer.subject.name.to_string();
    let hello = match tokio::time::timeout(HELLO_TIMEOUT, hello(&mut up)).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(status)) => return refuse(&messages, status),
        Err(_) => {
            return refuse(&messages, Status::deadline_exceeded("hello: did not come in time"));
        }
    };
    let (alive, mut ended) = oneshot::channel();
    let down = DownSender { messages: messages.clone(), alive };
    let session = match core.connect(node.clone(), peer.spki_sha256, hello, down).await {
        Ok(session) => session,
        Err(error) => return refuse(&messages, error.into()),
    };
    let open = links.open(&node, session, messages.downgrade());
    // From here on the core alone ends the stream.
    drop(messages);
    let (reports, to_keep) = mpsc::channel(REPORTS_MAX);
    let again = open.report_again.clone();
    let keeper = Keeper { core: core.clone(), catalog, node: node.clone(), known: BTreeMap::new() };
    tokio::spawn(keeper.run(to_keep, again));
    tracing::info!(node, session, "agent connected");
    loop {
        let message = tokio::select! {
            message = up.next() => message,
            _ = &mut ended => break,
        };
        let Some(Ok(ConnectRequest { message: Some(message) })) = message else { break };
        let message = match message {
            connect_request::Message::Result(result) => {
                links.answered(&open, *result);
                continue;
            }
            connect_request::Message::Instances(report) => match reports.try_send(report) {
                Ok(()) => continue,
                Err(_) => {
                    tracing::warn!(node, "an agent reports its instances too often, or too many");
                    break;
                }
            },
            message => message,
        };
        let from = FromAgent {
            node: node.clone(),
            session,
            received: Instant::now(),
            message: Some(message),
        };
        if !core.from_agent(from).await {
            return;
        }
    }
    tracing::info!(node, session, "agent disconnected");
    core.from_agent(FromAgent { node, session, received: Instant::now(), message: None }).await;
}

/// Keeps in the catalogue what one agent reports, as long as its stream lives.
struct Keeper {
    core: Core,
    catalog: Catalog,
    node: String,
    /// By service and name.
    known: BTreeMap<(String, String), Instance>,
}

impl Keeper {
    async fn run(mut self, mut reports: mpsc::Receiver<InstanceReport>, again: Arc<Notify>) {
        loop {
            let kept = tokio::select! {
                report = reports.recv() => match report {
                    Some(report) => match self.take(report) {
                        Some((news, complete)) => self.keep(news, complete).await,
                        None => return,
                    },
                    None => return,
                },
                () = again.notified() => self.keep(self.known.values().cloned().collect(), false).await,
            };
            let mut pause = REPORT_INTERVAL;
            match kept {
                Ok(()) => {}
                // The agent goes to the one that leads, and reports there.
                Err(Error::NotLeader(_) | Error::Stopped) => return,
                Err(error) => {
                    tracing::warn!(node = self.node, %error, "instances of an agent are not kept yet");
                    again.notify_one();
                    pause = REPORT_RETRY;
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Returns what is to be kept, and whether it is all. None: there are too many.
    fn take(&mut self, report: InstanceReport) -> Option<(Vec<Instance>, bool)> {
        let InstanceReport { complete, instances, removed } = report;
        if complete {
            self.known.clear();
        }
        for gone in &removed {
            if let Some((service, name)) = gone.split_once('/') {
                self.known.remove(&(service.to_owned(), name.to_owned()));
            }
        }
        for instance in &instances {
            let key = (instance.service.clone(), instance.name.clone());
            self.known.insert(key, instance.clone());
        }
        if self.known.len() > REPORTED_MAX || instances.len() > REPORTED_MAX {
            tracing::warn!(node = self.node, "an agent reports more than {REPORTED_MAX} instances");
            return None;
        }
        Some((instances, complete || !removed.is_empty()))
    }

    async fn keep(&self, news: Vec<Instance>, others_are_gone: bool) -> Result<(), Error> {
        let fence = self.core.fence()?;
        if others_are_gone {
            let is_there = |instance: &Instance| {
                self.known.contains_key(&(instance.service.clone(), instance.name.clone()))
            };
            self.catalog.keep_reported(&self.node, is_there, fence).await?;
        }
        self.catalog.report(&self.node, news, fence).await
    }
}

async fn hello(up: &mut Streaming<ConnectRequest>) -> Result<Hello, Status> {
    let first = up.next().await.transpose()?.and_then(|request| request.message);
    let Some(connect_request::Message::Hello(hello)) = first else {
        return Err(Status::invalid_argument("hello: must be the first message"));
    };
    if hello.protocol_version != PROTOCOL_VERSION {
        return Err(Status::failed_precondition(format!(
            "hello.protocolVersion: {} is not spoken here; {PROTOCOL_VERSION} is",
            hello.protocol_version
        )));
    }
    Ok(hello)
}

fn refuse(messages: &Messages, status: Status) {
    tracing::info!(reason = status.message(), "agent refused");
    // The client may be gone already.
    let _ = messages.try_send(Err(status));
}
