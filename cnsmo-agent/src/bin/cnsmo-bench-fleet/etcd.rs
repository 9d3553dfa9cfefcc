//! Watchers of etcd, by the part of its API that they need (etcd's `rpc.proto`, API version 3).

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_prost::ProstCodec;

use super::{
    board::{Board, latencies},
    swarm::PAYLOAD_BYTES,
};

const KEY: &[u8] = b"swarm/all";
/// First connections at a time, as on our side.
const AT_ONCE: usize = 64;
/// The name in the server's certificate.
const SERVER_NAME: &str = "etcd.bench";
/// As in our client.
const KEEPALIVE: Duration = Duration::from_secs(10);

#[derive(Clone, PartialEq, prost::Message)]
struct WatchRequest {
    #[prost(message, optional, tag = "1")]
    create: Option<WatchCreate>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WatchCreate {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WatchResponse {
    #[prost(bool, tag = "3")]
    created: bool,
    #[prost(message, repeated, tag = "11")]
    events: Vec<Event>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Event {
    #[prost(message, optional, tag = "2")]
    kv: Option<KeyValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KeyValue {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PutResponse {}

/// See the module above.
pub(crate) struct Watchers {
    endpoint: Endpoint,
    writer: Channel,
    count: usize,
    board: Arc<Board>,
    /// Dropping it ends all streams.
    watching: JoinSet<()>,
    puts: u8,
}

impl Watchers {
    pub(crate) async fn new(address: &str, folder: &Path, count: usize) -> anyhow::Result<Self> {
        let pem = |file: &str| fs::read_to_string(folder.join(file)).context(file.to_owned());
        let tls = ClientTlsConfig::new()
            .domain_name(SERVER_NAME)
            .ca_certificate(Certificate::from_pem(pem("ca.crt")?))
            .identity(Identity::from_pem(pem("client.crt")?, pem("client.key")?));
        let endpoint = Endpoint::from_shared(format!("https://{address}"))?
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_while_idle(true)
            .tls_config(tls)?;
        let writer = endpoint.connect().await?;
        let (board, watching) = (Arc::default(), JoinSet::new());
        Ok(Self { endpoint, writer, count, board, watching, puts: 0 })
    }

    pub(crate) async fn join(&mut self) -> anyhow::Result<Value> {
        ensure!(self.watching.is_empty(), "all have joined already");
        self.board.clear();
        let start = Instant::now();
        let places = Arc::new(Semaphore::new(AT_ONCE));
        for _ in 0..self.count {
            let place = places.clone().acquire_owned().await?;
            let (endpoint, board) = (self.endpoint.clone(), self.board.clone());
            self.watching.spawn(async move {
                if let Err(error) = watch(&endpoint, &board, place).await {
                    tracing::error!("a watcher ended: {error:#}");
                }
            });
        }
        // The answer that the watch exists.
        self.board.take(self.count).await?;
        Ok(json!({ "seconds": start.elapsed().as_secs_f64() }))
    }

    pub(crate) async fn push(&mut self) -> anyhow::Result<Value> {
        self.board.clear();
        self.puts = self.puts.wrapping_add(1);
        let put = PutRequest { key: KEY.to_vec(), value: vec![self.puts; PAYLOAD_BYTES] };
        let start = Instant::now();
        let mut grpc = Grpc::new(self.writer.clone());
        grpc.ready().await?;
        let path = PathAndQuery::from_static("/etcdserverpb.KV/Put");
        let codec = ProstCodec::<PutRequest, PutResponse>::default();
        grpc.unary(Request::new(put), path, codec).await?;
        let seen = self.board.take(self.count).await?;
        Ok(latencies(start, &seen.times))
    }
}

async fn watch(
    endpoint: &Endpoint,
    board: &Board,
    place: tokio::sync::OwnedSemaphorePermit,
) -> anyhow::Result<()> {
    let mut grpc = Grpc::new(endpoint.connect().await?);
    grpc.ready().await?;
    // Held open: the end of the requests would end the watch.
    let (requests, stream) = mpsc::channel(1);
    requests.send(WatchRequest { create: Some(WatchCreate { key: KEY.to_vec() }) }).await?;
    let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
    let codec = ProstCodec::<WatchRequest, WatchResponse>::default();
    let request = Request::new(ReceiverStream::new(stream));
    let mut events = grpc.streaming(request, path, codec).await?.into_inner();
    let mut place = Some(place);
    while let Some(message) = events.message().await? {
        ensure!(message.created || !message.events.is_empty(), "a message without events");
        place = None;
        board.note(false);
    }
    drop(place);
    Ok(())
}

/// A CA, and certificates of a server on the loopback and of a client.
pub(crate) fn write_certificates(folder: &Path) -> anyhow::Result<()> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let ca = params.self_signed(&key)?;
    let issuer = Issuer::new(params, key);
    fs::write(folder.join("ca.crt"), ca.pem())?;
    for name in ["server", "client"] {
        let key = KeyPair::generate()?;
        let names = vec![SERVER_NAME.to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names)?;
        // Etcd's gateway is a client of its own server.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &issuer)?;
        fs::write(folder.join(format!("{name}.crt")), certificate.pem())?;
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}
