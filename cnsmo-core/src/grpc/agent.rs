//! `AgentService`.

use std::time::{Duration, Instant};

use cnsmo_proto::pb::agent::{
    ConnectRequest, ConnectResponse, Hello, agent_service_server, connect_request,
};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    actor::{Core, FromAgent},
    fleet::{DOWN_MAX, Down, DownSender, PROTOCOL_VERSION},
    identity::{Kind, Peer, caller::Caller},
};

/// How long an agent may take to introduce itself.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

type Messages = mpsc::Sender<Result<Down, Status>>;

#[derive(Debug)]
pub(super) struct Service {
    core: Core,
}

impl Service {
    pub(super) fn new(core: Core) -> Self {
        Self { core }
    }
}

#[tonic::async_trait]
impl agent_service_server::AgentService for Service {
    type ConnectStream = tokio_stream::adapters::Map<
        ReceiverStream<Result<Down, Status>>,
        fn(Result<Down, Status>) -> Result<ConnectResponse, Status>,
    >;

    async fn connect(
        &self,
        request: Request<Streaming<ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let peer = Caller::of(&request)?.peer().filter(|peer| peer.subject.kind == Kind::Agent);
        let peer = peer.ok_or_else(|| Status::permission_denied("only agents may connect"))?;
        let peer = peer.clone();
        let (down, messages) = mpsc::channel(DOWN_MAX);
        // The answer begins before the hello has come: a client may wait for it first.
        tokio::spawn(serve(self.core.clone(), peer, request.into_inner(), down));
        let encode: fn(_) -> _ = |down: Result<Down, Status>| down.map(Into::into);
        Ok(Response::new(ReceiverStream::new(messages).map(encode)))
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
