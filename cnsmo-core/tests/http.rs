//! The same calls by gRPC and by HTTP/JSON, over TLS and over the unix socket, by HTTP/1.1 and by HTTP/2.

use std::{convert::Infallible, sync::Arc};

use bytes::{Buf as _, BufMut as _, Bytes};
use cnsmo_core::fleet::PROTOCOL_VERSION;
use cnsmo_proto::pb::{
    agent::{ConnectRequest, Hello, connect_request},
    identity::{EnrollRequest, Role},
    resource::{
        ApplyRequest, GetRequest, Kind, ListRequest, Resource, WaitAppliedRequest, WatchRequest,
    },
};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    sync::mpsc,
};
use tokio_rustls::TlsConnector;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::{
    Code::{self, FailedPrecondition, InvalidArgument, NotFound, OutOfRange, PermissionDenied},
    Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

use crate::harness::{Joined, PATIENCE, TestCore, policy, unix};

const GET: &str = "/cnsmo.resource.v1.ResourceService/Get";
const LIST: &str = "/cnsmo.resource.v1.ResourceService/List";
const APPLY: &str = "/cnsmo.resource.v1.ResourceService/Apply";
const WATCH: &str = "/cnsmo.resource.v1.ResourceService/Watch";
const WAIT: &str = "/cnsmo.resource.v1.ResourceService/WaitApplied";
const ENROLL: &str = "/cnsmo.identity.v1.EnrollmentService/Enroll";
const CONNECT: &str = "/cnsmo.agent.v1.AgentService/Connect";
const HEALTH: &str = "/grpc.health.v1.Health/Check";
const NOTHING: &str = "/cnsmo.resource.v1.ResourceService/Nothing";

#[derive(Clone, Copy, Debug)]
enum Version {
    One,
    Two,
}

/// Where a core is called, and as whom.
#[derive(Clone, Copy)]
enum Front<'a> {
    Unix,
    Tls(Option<&'a Joined>),
}

/// One connection.
enum Client {
    One(http1::SendRequest<Body>),
    Two(http2::SendRequest<Body>),
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

impl Client {
    async fn connect(core: &TestCore, front: Front<'_>, version: Version) -> Self {
        match front {
            Front::Unix => {
                let socket = core.folder.path().join("core.sock");
                Self::over(UnixStream::connect(socket).await.unwrap(), version).await
            }
            Front::Tls(identity) => Self::over(tls(core, version, identity).await, version).await,
        }
    }

    async fn over(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        version: Version,
    ) -> Self {
        let io = TokioIo::new(stream);
        match version {
            Version::One => {
                let (sender, connection) = http1::handshake(io).await.unwrap();
                tokio::spawn(connection);
                Self::One(sender)
            }
            Version::Two => {
                let executor = TokioExecutor::new();
                let (sender, connection) = http2::handshake(executor, io).await.unwrap();
                tokio::spawn(connection);
                Self::Two(sender)
            }
        }
    }

    async fn request(&mut self, request: Request<Body>) -> Response<Incoming> {
        let answer = async {
            match self {
                Self::One(sender) => {
                    sender.ready().await?;
                    sender.send_request(request).await
                }
                Self::Two(sender) => sender.send_request(request).await,
            }
        };
        tokio::time::timeout(PATIENCE, answer).await.expect("no answer").unwrap()
    }

    async fn post(&mut self, path: &str, content_type: &str, body: Body) -> Response<Incoming> {
        let request = match self {
            Self::One(_) => Request::post(path).header("host", "core.cnsmo"),
            Self::Two(_) => Request::post(format!("https://core.cnsmo{path}")),
        };
        self.request(request.header("content-type", content_type).body(body).unwrap()).await
    }

    async fn get(&mut self, path: &str) -> (StatusCode, Value) {
        let request = match self {
            Self::One(_) => Request::get(path).header("host", "core.cnsmo"),
            Self::Two(_) => Request::get(format!("https://core.cnsmo{path}")),
        };
        whole(self.request(request.body(full("")).unwrap()).await).await
    }

    /// All messages, or why there are none; of a stream only as many as are expected.
    async fn call(&mut self, call: &Call, expected: usize) -> Result<Vec<Value>, (Value, Value)> {
        let response = self.post(call.rpc, call.content_type, full(&call.json)).await;
        let status = response.status();
        let lines = response.headers()["content-type"] == "application/jsonl";
        if !lines {
            let (_, answer) = whole(response).await;
            if status == StatusCode::OK {
                return Ok(vec![answer]);
            }
            return Err((answer["code"].clone(), answer["message"].clone()));
        }
        assert_eq!(status, StatusCode::OK);
        let mut lines = Lines::of(response);
        let mut messages = Vec::new();
        while messages.len() < expected {
            let message = lines.next().await.expect("the stream ended");
            if let Some(error) = message.get("error") {
                assert_eq!(lines.next().await, None, "something follows the error");
                return Err((error["code"].clone(), error["message"].clone()));
            }
            messages.push(message);
        }
        Ok(messages)
    }
}

/// A body of lines.
struct Lines {
    body: Incoming,
    text: Vec<u8>,
}

impl Lines {
    fn of(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), text: Vec::new() }
    }

    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await;
            let Some(frame) = frame.expect("the stream is silent") else {
                assert!(self.text.is_empty(), "an unfinished line");
                return None;
            };
            self.text.extend_from_slice(&frame.unwrap().into_data().unwrap_or_default());
        }
    }
}

async fn whole(response: Response<Incoming>) -> (StatusCode, Value) {
    let status = response.status();
    assert_eq!(response.headers()["content-type"], "application/json");
    let text = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&text).unwrap())
}

fn full(text: &str) -> Body {
    Full::new(Bytes::from(text.to_owned())).boxed_unsync()
}

/// A body that is written while the answer is read.
fn open() -> (mpsc::Sender<String>, Body) {
    let (to, lines) = mpsc::channel(4);
    let frames = ReceiverStream::new(lines).map(|line: String| Ok(Frame::data(Bytes::from(line))));
    (to, StreamBody::new(frames).boxed_unsync())
}

async fn tls(
    core: &TestCore,
    version: Version,
    identity: Option<&Joined>,
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let ca = std::fs::read(core.folder.path().join("state/ca.crt")).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&ca).unwrap()).unwrap();
    let config =
        ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
    let mut config = match identity {
        None => config.with_no_client_auth(),
        Some(Joined { certificate, key }) => {
            let chain = CertificateDer::pem_slice_iter(certificate.as_bytes());
            let chain = chain.collect::<Result<_, _>>().unwrap();
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            config.with_client_auth_cert(chain, key).unwrap()
        }
    };
    let protocol: &[u8] = match version {
        Version::One => b"http/1.1",
        Version::Two => b"h2",
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    let tcp = TcpStream::connect(core.running.address).await.unwrap();
    let name = ServerName::try_from("core.cnsmo").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol));
    stream
}

/// One request, as JSON and as protobuf.
struct Call {
    rpc: &'static str,
    content_type: &'static str,
    json: String,
    message: Vec<u8>,
}

impl Call {
    #[expect(clippy::needless_pass_by_value, reason = "as the caller writes it")]
    fn new(rpc: &'static str, json: Value, message: impl Message) -> Self {
        let content_type = if rpc == CONNECT { "application/jsonl" } else { "application/json" };
        Self { rpc, content_type, json: json.to_string(), message: message.encode_to_vec() }
    }

    /// By gRPC: messages as JSON, as many as come before the set is complete.
    async fn by_grpc(&self, channel: &Channel) -> Result<Vec<Value>, Status> {
        let mut grpc = Grpc::new(channel.clone());
        grpc.ready().await.unwrap();
        let request = tonic::Request::new(self.message.clone());
        let path = self.rpc.parse().unwrap();
        let answer = tokio::time::timeout(PATIENCE, async {
            let mut stream = grpc.server_streaming(request, path, Raw).await?.into_inner();
            let mut messages = Vec::new();
            while let Some(message) = stream.message().await? {
                messages.push(self.answer(message));
                if self.rpc == WATCH && messages.last().unwrap()["event"] == "EVENT_SYNCED" {
                    break;
                }
            }
            Ok(messages)
        });
        answer.await.expect("no answer")
    }

    fn answer(&self, message: Bytes) -> Value {
        let mut pool = DescriptorPool::decode(cnsmo_proto::DESCRIPTORS).unwrap();
        pool.decode_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET).unwrap();
        let (service, method) = self.rpc[1..].split_once('/').unwrap();
        let service = pool.get_service_by_name(service).unwrap();
        let method = service.methods().find(|m| m.name() == method).unwrap();
        let message = DynamicMessage::decode(method.output(), message).unwrap();
        serde_json::to_value(message).unwrap()
    }
}

/// Messages as they are encoded.
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, message: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Asks by gRPC and by both versions of HTTP, and compares. Ok with how many messages, or the code of the error.
async fn agree(
    core: &TestCore,
    channel: &Channel,
    front: Front<'_>,
    call: &Call,
) -> Result<usize, Code> {
    let expected = call.by_grpc(channel).await;
    let expected_json = expected.clone().map_err(|status| {
        (Value::from(format!("{:?}", status.code())), Value::from(status.message()))
    });
    let count = expected.as_ref().map_or(usize::MAX, Vec::len);
    for version in [Version::One, Version::Two] {
        // HTTP/1.1 may end the connection of a request that was refused before all of it was read.
        let mut client = Client::connect(core, front, version).await;
        let answer = client.call(call, count).await.map_err(|(code, message)| {
            // NOT_FOUND is NotFound in Rust.
            let camel: String = code
                .as_str()
                .unwrap()
                .split('_')
                .flat_map(|word| [word[..1].to_owned(), word[1..].to_lowercase()])
                .collect();
            (Value::from(camel), message)
        });
        assert_eq!(answer, expected_json, "{} {:.200}", call.rpc, call.json);
    }
    expected.map(|messages| messages.len()).map_err(|status| status.code())
}

#[tokio::test]
async fn every_way_gives_the_operator_the_same_answer() {
    let mut core = TestCore::start().await;
    core.admin.apply(vec![policy("web", "role=web", 80), policy("ssh", "", 22)]).await.unwrap();
    let joined = core.join_as(Role::Admin, "ada").await;
    let unix = unix(&core.folder.path().join("core.sock")).await.unwrap();
    let tls = core.tls(Some((&joined.certificate, &joined.key))).await;
    let kind = Kind::FirewallPolicy.into();
    let name = |name: &str| GetRequest { kind, name: name.into() };
    let apply = |resources: Vec<Resource>| ApplyRequest { resources, ..ApplyRequest::default() };
    let rule = |port: u32| {
        json!({ "resources": [{ "firewallPolicy": { "metadata": { "name": "p" }, "spec": { "rules": [{
            "name": "allow", "action": "ACTION_ALLOW", "direction": "DIRECTION_INGRESS", "protocol": 6,
            "ports": [{ "first": port, "last": port }],
        }] } } }], "dryRun": true })
    };
    let dry = |port| ApplyRequest { dry_run: true, ..apply(vec![policy("p", "", port)]) };
    let mut unknown_field = Call::new(
        LIST,
        json!({ "kind": kind, "labels": {}, "colour": { "r": [1, "2"] } }),
        ListRequest { kind, ..ListRequest::default() },
    );
    // Field 100, a varint.
    unknown_field.message.extend([0xa0, 0x06, 0x01]);
    let table = [
        (
            Call::new(GET, json!({ "kind": "KIND_FIREWALL_POLICY", "name": "web" }), name("web")),
            Ok(1),
        ),
        (unknown_field, Ok(1)),
        (Call::new(APPLY, rule(443), dry(443)), Ok(1)),
        (Call::new(APPLY, rule(70_000), dry(70_000)), Err(InvalidArgument)),
        (Call::new(GET, json!({ "kind": kind, "name": "none" }), name("none")), Err(NotFound)),
        (
            Call::new(GET, json!({ "kind": 99 }), GetRequest { kind: 99, ..Default::default() }),
            Err(InvalidArgument),
        ),
        (Call::new(GET, json!({}), GetRequest::default()), Err(InvalidArgument)),
        (Call::new(CONNECT, json!({}), ConnectRequest::default()), Err(PermissionDenied)),
        (Call::new(NOTHING, json!({}), ()), Err(PermissionDenied)),
        (
            Call::new(WATCH, json!({ "kind": kind }), WatchRequest { kind, ..Default::default() }),
            Ok(3),
        ),
        (
            Call::new(
                WAIT,
                json!({ "timeout": "7200.5s" }),
                WaitAppliedRequest {
                    timeout: Some(prost_types::Duration { seconds: 7200, nanos: 500_000_000 }),
                    ..WaitAppliedRequest::default()
                },
            ),
            Err(InvalidArgument),
        ),
        (
            Call::new(
                WAIT,
                json!({ "revision": "9007199254740993" }),
                WaitAppliedRequest { revision: 9_007_199_254_740_993, ..Default::default() },
            ),
            Err(OutOfRange),
        ),
        (Call::new(HEALTH, json!({}), ()), Ok(1)),
    ];
    for (call, expected) in table {
        for (channel, front) in [(&unix, Front::Unix), (&tls, Front::Tls(Some(&joined)))] {
            assert_eq!(agree(&core, channel, front, &call).await, expected, "{}", call.json);
        }
    }
    core.stop().await;
}

#[tokio::test]
async fn every_way_gives_a_caller_over_tls_the_same_answer() {
    let mut core = TestCore::start().await;
    let joined = core.join("vm1", "").await;
    let anonymous = core.tls(None).await;
    let agent = core.tls(Some((&joined.certificate, &joined.key))).await;
    let enrol = |token: String| {
        let request =
            EnrollRequest { token: token.clone(), csr: vec![0, 255], ..Default::default() };
        Call::new(ENROLL, json!({ "token": token, "csr": "AP8=" }), request)
    };
    let hello = Hello { protocol_version: 4_000_000_000, ..Hello::default() };
    let hello = ConnectRequest { message: Some(connect_request::Message::Hello(hello)) };
    let hello =
        Call::new(CONNECT, json!({ "hello": { "protocolVersion": 4_000_000_000_u32 } }), hello);
    let get = Call::new(GET, json!({}), GetRequest::default());
    let health = Call::new(HEALTH, json!({}), ());
    for (call, by_anonymous, by_agent) in [
        (enrol("none".into()), Err(InvalidArgument), Err(PermissionDenied)),
        (enrol("x".repeat(70_000)), Err(OutOfRange), Err(PermissionDenied)),
        (get, Err(PermissionDenied), Err(PermissionDenied)),
        (health, Ok(1), Ok(1)),
        (hello, Err(PermissionDenied), Err(FailedPrecondition)),
    ] {
        let anonymous = agree(&core, &anonymous, Front::Tls(None), &call).await;
        let agent = agree(&core, &agent, Front::Tls(Some(&joined)), &call).await;
        assert_eq!((anonymous, agent), (by_anonymous, by_agent), "{} {:.200}", call.rpc, call.json);
    }
    core.stop().await;
}

#[tokio::test]
async fn what_is_no_call_is_refused_and_says_why() {
    let mut core = TestCore::start().await;
    core.admin.apply(vec![policy("web", "", 80)]).await.unwrap();
    for version in [Version::One, Version::Two] {
        let mut client = Client::connect(&core, Front::Unix, version).await;
        for (path, content_type, text, status, code, message) in [
            (
                GET,
                "application/json",
                r#"{"kind": "KIND_HOUSE"}"#,
                400,
                "INVALID_ARGUMENT",
                r#"kind: "KIND_HOUSE" is none of KIND_UNSPECIFIED, "#,
            ),
            (
                GET,
                "application/json",
                r#"{"name": 7}"#,
                400,
                "INVALID_ARGUMENT",
                "name: invalid type: integer `7`, expected a string",
            ),
            (GET, "application/json", "", 400, "INVALID_ARGUMENT", "EOF while parsing"),
            (
                GET,
                "text/plain",
                "{}",
                415,
                "INVALID_ARGUMENT",
                r#"content-type: "text/plain" is not taken here: send application/json"#,
            ),
            (
                CONNECT,
                "application/json",
                "{}",
                415,
                "INVALID_ARGUMENT",
                r#"content-type: "application/json" is not taken here: send application/jsonl or"#,
            ),
            (
                "/",
                "application/json",
                "{}",
                403,
                "PERMISSION_DENIED",
                "/ is not allowed to the role admin",
            ),
            (
                "/healthz",
                "application/json",
                "{}",
                405,
                "UNIMPLEMENTED",
                "POST is not taken here: use GET",
            ),
        ] {
            let (got, answer) = whole(client.post(path, content_type, full(text)).await).await;
            assert_eq!((got.as_u16(), &answer["code"]), (status, &Value::from(code)), "{answer}");
            assert!(answer["message"].as_str().unwrap().starts_with(message), "{answer}");
        }
        assert_eq!(client.get(GET).await.0, StatusCode::METHOD_NOT_ALLOWED);
        let good = json!({ "kind": "KIND_FIREWALL_POLICY", "name": "web" }).to_string();
        let (status, _) =
            whole(client.post(GET, "application/json; charset=utf-8", full(&good)).await).await;
        assert_eq!(status, StatusCode::OK, "the connection does not live on");
    }
    core.stop().await;
}

#[tokio::test]
async fn more_json_than_a_message_may_have_is_refused_with_and_without_a_declared_length() {
    let core = TestCore::start().await;
    let long = json!({ "colour": "x".repeat(200 << 10) }).to_string();
    for version in [Version::One, Version::Two] {
        for declared in [true, false] {
            let mut client = Client::connect(&core, Front::Tls(None), version).await;
            let body = if declared {
                full(&long)
            } else {
                let (to, body) = open();
                to.send(long.clone()).await.unwrap();
                body
            };
            let (status, answer) = whole(client.post(ENROLL, "application/json", body).await).await;
            assert_eq!(status, StatusCode::BAD_REQUEST);
            let expected = json!({ "code": "OUT_OF_RANGE", "message": "a message takes at most 131072 bytes of JSON" });
            assert_eq!(answer, expected, "{version:?} declared {declared}");
        }
    }
    core.stop().await;
}

/// Also through HTTP/1.1: both directions at once, each line as soon as it is there.
#[tokio::test]
async fn streams_flow_in_both_directions() {
    let mut core = TestCore::start().await;
    core.admin.apply(vec![policy("web", "", 80)]).await.unwrap();
    let joined = core.join("vm1", "").await;
    for (version, port) in [(Version::One, 81), (Version::Two, 82)] {
        let mut client = Client::connect(&core, Front::Tls(Some(&joined)), version).await;
        let (up, body) = open();
        let response = client.post(CONNECT, "application/x-ndjson", body).await;
        assert_eq!(response.status(), StatusCode::OK);
        let mut down = Lines::of(response);
        // Lines may come in any pieces.
        let hello =
            json!({ "hello": { "protocolVersion": PROTOCOL_VERSION, "bootId": "b" } }).to_string();
        let (head, tail) = hello.split_at(20);
        for part in ["\r\n  \n", head, tail, "\n"] {
            up.send(part.into()).await.unwrap();
        }
        let welcome = down.next().await.unwrap();
        assert_eq!(welcome["welcome"]["protocolVersion"], PROTOCOL_VERSION);
        let update = down.next().await.unwrap();
        assert_eq!(update["update"]["kind"], "KIND_SNAPSHOT");
        let ack = json!({ "ack": {
            "nonce": update["update"]["nonce"], "type": update["update"]["type"],
            "applied": { "revision": update["update"]["revision"], "digest": update["update"]["digest"] },
        } });
        up.send(format!("{ack}\n")).await.unwrap();
        core.admin.apply(vec![policy("web", "", port)]).await.unwrap();
        let update = down.next().await.unwrap();
        assert_eq!(update["update"]["upserts"][0]["name"], "firewall-policy/web", "{update}");
        up.send("{\"heartbeat\": []}\n".into()).await.unwrap();
        let error = down.next().await.unwrap();
        assert_eq!(error["error"]["code"], "INVALID_ARGUMENT", "{error}");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.starts_with("heartbeat: invalid type: sequence"), "{message}");
        assert_eq!(down.next().await, None);
    }
    core.stop().await;
}

#[tokio::test]
async fn pages_have_rules_like_rpcs() {
    let core = TestCore::start().await;
    for version in [Version::One, Version::Two] {
        let mut anonymous = Client::connect(&core, Front::Tls(None), version).await;
        let mut operator = Client::connect(&core, Front::Unix, version).await;
        let serving = (StatusCode::OK, json!({ "status": "SERVING" }));
        assert_eq!(anonymous.get("/healthz").await, serving);
        assert_eq!(operator.get("/healthz").await, serving);
        assert_eq!(anonymous.get("/openapi.json").await.0, StatusCode::FORBIDDEN);
        let (status, description) = operator.get("/openapi.json").await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(description["openapi"], "3.1.0");
        assert!(description["paths"][GET]["post"].is_object());
    }
    core.stop().await;
}

/// Also one that looks like HTTP/2 as far as it goes; and a connection that is in use lives on.
#[tokio::test]
async fn who_says_nothing_is_not_waited_for() {
    let core = TestCore::start().await;
    let channel = core.tls(None).await;
    let health = Call::new(HEALTH, json!({}), ());
    health.by_grpc(&channel).await.unwrap();
    let mut silent = tls(&core, Version::Two, None).await;
    let mut slow = tls(&core, Version::Two, None).await;
    slow.write_all(b"PRI * HTTP/2.0").await.unwrap();
    for stream in [&mut silent, &mut slow] {
        let end = tokio::time::timeout(PATIENCE, stream.read_u8()).await;
        end.expect("the connection stays open").unwrap_err();
    }
    health.by_grpc(&channel).await.unwrap();
    core.stop().await;
}
