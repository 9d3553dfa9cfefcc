//! Clients that send what no client sends.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use bytes::{Buf as _, BufMut as _, Bytes};
use cnsmo_proto::pb::{
    admin::CompactRequest,
    identity::{CreateJoinTokenRequest, EnrollRequest},
    resource::ApplyRequest,
    state::{
        Compare, GrantLeaseRequest, ListRequest, Op, Put, TxnRequest, WatchRequest,
        compare::Target, op,
    },
};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    task::JoinSet,
};
use tokio_rustls::TlsConnector;
use tonic::{
    Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::Channel,
};

use crate::{
    harness::{PATIENCE, policy, unix},
    program::Program,
    state::Client,
};

/// Requests with bodies that are mutated; the frames around them are sound.
const BODIES: usize = 70_000;
/// Mutated frames over the unix socket and over TLS. A connection takes some before the core ends it.
const FRAMES_UNIX: usize = 25_000;
const FRAMES_TLS: usize = 5_000;
const FRAMES_PER_CONNECTION: usize = 25;
const CLIENTS: usize = 8;
/// Growth that is no leak: buffers of connections, the store's cache and ring.
const GROWTH_BYTES_MAX: u64 = 192 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_mutated_frames_do_no_harm() {
    let folder = TempDir::new().unwrap();
    let mut program = Program::start(folder.path());
    let socket = folder.path().join("core.sock");
    let mut client = Client::connect(&folder).await;
    // The first use of everything takes memory that stays.
    bodies(&socket, 0, 1_000).await;
    let before = resident(&program);

    let mut attackers = JoinSet::new();
    for n in 1..=CLIENTS {
        let socket = socket.clone();
        attackers.spawn(async move { bodies(&socket, n as u64, BODIES / CLIENTS).await });
    }
    while let Some(ended) = attackers.join_next().await {
        ended.unwrap();
    }
    let tls = Tls::of(folder.path(), program.address());
    for n in 0..CLIENTS {
        let (socket, tls) = (socket.clone(), tls.clone());
        attackers.spawn(async move {
            let mut random = Random::new(1_000 + n as u64);
            let mut sent = 0;
            while sent < FRAMES_UNIX / CLIENTS {
                sent += frames(UnixStream::connect(&socket).await.unwrap(), &mut random).await;
            }
            let mut sent = 0;
            while sent < FRAMES_TLS / CLIENTS {
                sent += frames(tls.connect().await, &mut random).await;
            }
        });
    }
    while let Some(ended) = attackers.join_next().await {
        ended.unwrap();
    }

    assert!(program.is_running(), "it died");
    // Not of a key that was there before: a mutated message may be a sound one that deletes it.
    let value = tokio::time::timeout(PATIENCE, async {
        client.put("after", "it").await;
        client.value("after").await
    });
    assert_eq!(value.await.expect("it hangs").as_deref(), Some("it"));
    let growth = resident(&program).saturating_sub(before);
    assert!(growth <= GROWTH_BYTES_MAX, "it grew by {} MiB", growth >> 20);
}

/// xorshift64*: a failure is found again with the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % bound
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.byte()).collect()
    }

    /// Changes, cuts, doubles or inserts some bytes.
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(6) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
                2 => bytes.truncate(at),
                3 => {
                    let part = bytes[at..].to_vec();
                    bytes.extend(part);
                }
                4 => {
                    let count = self.below(9);
                    bytes.splice(at..at, self.bytes(count));
                }
                _ if at < bytes.len() => bytes[at] = self.byte(),
                _ => bytes.push(self.byte()),
            }
        }
    }

    /// Fields with low numbers and plausible content, as most messages have them.
    fn message(&mut self, depth: usize) -> Vec<u8> {
        let mut message = Vec::new();
        for _ in 0..self.below(6) {
            let number = u8::try_from(1 + self.below(12)).unwrap();
            match self.below(4) {
                0 => {
                    message.push(number << 3);
                    let shift = self.below(64);
                    prost::encoding::encode_varint(self.next() >> shift, &mut message);
                }
                1 => {
                    message.push(number << 3 | 1);
                    message.extend(self.bytes(8));
                }
                kind => {
                    let count = self.below(40);
                    let content = match kind {
                        2 if depth > 0 => self.message(depth - 1),
                        2 => self.bytes(count),
                        _ => vec![b'a' + self.byte() % 26; count],
                    };
                    message.push(number << 3 | 2);
                    prost::encoding::encode_varint(content.len() as u64, &mut message);
                    message.extend(content);
                }
            }
        }
        message
    }
}

/// Every RPC but the one whose cost is not in its request.
fn rpcs() -> Vec<PathAndQuery> {
    let mut paths = Vec::new();
    for file in FileDescriptorSet::decode(cnsmo_proto::DESCRIPTORS).unwrap().file {
        for service in &file.service {
            for method in &service.method {
                let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                if method.name() != "Backup" {
                    paths.push(path.parse().unwrap());
                }
            }
        }
    }
    paths
}

/// Sound messages to begin with.
fn samples() -> Vec<Vec<u8>> {
    let put = Put { key: "a".into(), value: vec![7; 100].into(), lease_id: 1, ..Put::default() };
    let compare = Compare { key: "a".into(), target: Some(Target::ModRevision(0)) };
    let txn = TxnRequest {
        compare: vec![compare],
        success: vec![Op { op: Some(op::Op::Put(put)) }, Op { op: Some(op::Op::Get("a".into())) }],
        failure: vec![Op { op: Some(op::Op::DeletePrefix("b".into())) }],
        request_id: "r".into(),
        fence: None,
    };
    let second = prost_types::Duration { seconds: 1, nanos: 0 };
    vec![
        txn.encode_to_vec(),
        ListRequest {
            prefix: "a".into(),
            page_size: 5,
            page_token: "AQ".into(),
            ..ListRequest::default()
        }
        .encode_to_vec(),
        WatchRequest {
            prefix: "a".into(),
            start_revision: 1,
            prev_kv: true,
            bookmark_interval: Some(second),
            epoch: 1,
        }
        .encode_to_vec(),
        GrantLeaseRequest { ttl: Some(second) }.encode_to_vec(),
        CompactRequest { revision: 3 }.encode_to_vec(),
        ApplyRequest { resources: vec![policy("p", "role=web", 80)], ..ApplyRequest::default() }
            .encode_to_vec(),
        CreateJoinTokenRequest {
            ttl: Some(second),
            max_uses: 1,
            ..CreateJoinTokenRequest::default()
        }
        .encode_to_vec(),
        EnrollRequest {
            token: "cnsmo1.a.b.c".into(),
            csr: vec![0x30, 0x82, 1, 0],
            ..EnrollRequest::default()
        }
        .encode_to_vec(),
    ]
}

/// Calls with mutated messages in sound frames.
async fn bodies(socket: &Path, seed: u64, count: usize) {
    let mut random = Random::new(seed);
    let (rpcs, samples) = (rpcs(), samples());
    let mut grpc = Grpc::new(unix(socket).await.unwrap());
    for _ in 0..count {
        let mut body = if random.below(2) == 0 {
            samples[random.below(samples.len())].clone()
        } else {
            random.message(3)
        };
        random.mutate(&mut body);
        let rpc = rpcs[random.below(rpcs.len())].clone();
        call(&mut grpc, rpc, body.into()).await;
    }
}

async fn call(grpc: &mut Grpc<Channel>, rpc: PathAndQuery, body: Bytes) {
    grpc.ready().await.expect("the core ended the connection for what a message said");
    let request = Request::new(tokio_stream::once(body));
    // Streams that stay open, and calls that wait for something, are left.
    let call = tokio::time::timeout(Duration::from_millis(20), async {
        let answer = grpc.streaming(request, rpc.clone(), Raw).await?;
        answer.into_inner().message().await
    });
    if let Ok(Err(status)) = call.await {
        let panicked = status.message().contains("panic");
        assert!(!panicked, "{rpc}: {status}");
    }
}

/// Messages as bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let count = from.remaining();
        Ok(Some(from.copy_to_bytes(count)))
    }
}

/// HTTP/2 frame types.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;

/// Sends mutated frames until the core ends the connection or there were enough. Returns how many.
async fn frames(mut connection: impl AsyncRead + AsyncWrite + Unpin, random: &mut Random) -> usize {
    let samples = samples();
    let mut start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    start.extend(frame(SETTINGS, 0, 0, &[]));
    if connection.write_all(&start).await.is_err() {
        return 1;
    }
    let mut sink = vec![0; 16 << 10];
    for n in 0..FRAMES_PER_CONNECTION {
        let stream = u32::try_from(1 + 2 * (n / 2)).unwrap();
        let mut frame = match random.below(8) {
            0 => {
                let count = random.below(64);
                let (kind, flags) = (random.byte() % 12, random.byte());
                frame(kind, flags, stream, &random.bytes(count))
            }
            _ if n % 2 == 0 => frame(HEADERS, 4, stream, &headers()),
            _ => {
                let sample = &samples[random.below(samples.len())];
                let mut body = vec![0];
                body.extend(u32::try_from(sample.len()).unwrap().to_be_bytes());
                body.extend(sample);
                frame(DATA, 1, stream, &body)
            }
        };
        random.mutate(&mut frame);
        if connection.write_all(&frame).await.is_err() {
            return n + 1;
        }
        // What it answers must not fill the connection, nor hold this up.
        let read = tokio::time::timeout(Duration::from_micros(200), connection.read(&mut sink));
        if matches!(read.await, Ok(Ok(0) | Err(_))) {
            return n + 1;
        }
    }
    FRAMES_PER_CONNECTION
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// HPACK: literals that are not indexed.
fn headers() -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/cnsmo.state.v1.StateService/Txn"),
        (":authority", "core.cnsmo"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend(text.as_bytes());
        }
    }
    block
}

#[derive(Clone)]
struct Tls {
    connector: TlsConnector,
    address: SocketAddr,
}

impl Tls {
    fn of(folder: &Path, address: SocketAddr) -> Self {
        let ca = CertificateDer::from_pem_file(folder.join("state/ca.crt")).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Self { connector: TlsConnector::from(Arc::new(config)), address }
    }

    async fn connect(&self) -> tokio_rustls::client::TlsStream<TcpStream> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("core.cnsmo").unwrap();
        self.connector.connect(name, stream).await.unwrap()
    }
}

fn resident(program: &Program) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kilobytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes << 10
}
