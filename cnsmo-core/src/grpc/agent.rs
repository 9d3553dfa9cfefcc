//! `AgentService`.

use std::{
    convert::Infallible,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use cnsmo_proto::pb::agent::{ConnectRequest, Hello, agent_service_server, connect_request};
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};
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
    fleet::{DOWN_MAX, Down, DownSender, PROTOCOL_VERSION},
    identity::{Kind, Peer, caller::Caller},
};

/// How long an agent may take to introduce itself.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// First size of the two buffers of a stream, which it keeps while it lives: most messages fit.
const BUFFER_BYTES: usize = 1_024;
/// Bytes of messages that are handed to HTTP/2 at once.
const YIELD_BYTES: usize = 32 << 10;
const CONNECT: &str = "/cnsmo.agent.v1.AgentService/Connect";

type Messages = mpsc::Sender<Result<Down, Status>>;

/// As the generated one, but for what goes over the wire: resources that many agents are sent are encoded once.
#[derive(Clone, Debug)]
pub(super) struct Service {
    core: Core,
}

impl Service {
    pub(super) fn new(core: Core) -> Self {
        Self { core }
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
        let connect = Connect(self.core.clone());
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Wire)
                .apply_max_message_size_config(Some(MESSAGE_BYTES_MAX), None);
            Ok(grpc.streaming(connect, request).await)
        })
    }
}

struct Connect(Core);

impl StreamingService<ConnectRequest> for Connect {
    type Response = Down;
    type ResponseStream = ReceiverStream<Result<Down, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<ConnectRequest>>) -> Self::Future {
        let core = self.0.clone();
        Box::pin(async move {
            let peer = Caller::of(&request)?.peer().filter(|peer| peer.subject.kind == Kind::Agent);
            let peer = peer.ok_or_else(|| Status::permission_denied("only agents may connect"))?;
            let peer = peer.clone();
            let (down, messages) = mpsc::channel(DOWN_MAX);
            // The answer begins before the hello has come: a client may wait for it first.
            tokio::spawn(serve(core, peer, request.into_inner(), down));
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
async fn serve(core: Core, peer: Peer, mut up: Streaming<ConnectRequest>, messages: Messages) {
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
    // From here on the core alone ends the stream.
    drop(messages);
    tracing::info!(node, session, "agent connected");
    loop {
        let message = tokio::select! {
            message = up.next() => message,
            _ = &mut ended => break,
        };
        let Some(Ok(ConnectRequest { message: Some(message) })) = message else { break };
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
