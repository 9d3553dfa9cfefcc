//! Puts against the store, a core or etcd, for `cargo xtask bench state`; and a writer for the test that kills it.

#![expect(clippy::print_stdout, reason = "its output is what it is run for")]

use std::{
    io::{self, Write as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use clap::{Parser, Subcommand};
use cnsmo_core::store::{Op, Store, StoreConfig, Txn};
use cnsmo_proto::pb::state::{Put, TxnRequest, op, state_service_client::StateServiceClient};
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::{net::UnixStream, task::JoinSet};
use tonic::{
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

/// As the core has it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// The store in this process
    Store {
        /// A new file
        file: PathBuf,
        #[command(flatten)]
        load: Load,
    },
    /// A core
    Core {
        /// Its unix socket
        socket: PathBuf,
        #[command(flatten)]
        load: Load,
    },
    /// An etcd
    Etcd {
        /// Its unix socket
        socket: PathBuf,
        #[command(flatten)]
        load: Load,
    },
    /// Writes until it is killed, and says what was acknowledged
    Write {
        /// Of the state
        file: PathBuf,
        /// Greater than all numbers before
        first: u64,
    },
}

#[derive(Clone, Copy, clap::Args)]
struct Load {
    /// Puts under way at a time
    #[arg(long, default_value_t = 64)]
    writers: usize,
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    #[arg(long, default_value_t = 10_000)]
    keys: usize,
    /// Of a value
    #[arg(long, default_value_t = 256)]
    bytes: usize,
}

/// Connections of all writers together, as several clients would have.
const CONNECTIONS_MAX: usize = 8;
/// Writers of [`What::Write`].
const WRITERS: u64 = 16;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().what {
        What::Store { file, load } => {
            let store = Store::open(&StoreConfig::sqlite(file)).await?;
            drive(load, |_| {
                let store = store.clone();
                move |key, value| {
                    let (store, put) = (store.clone(), Op::put(key, value));
                    async move {
                        store.commit(Txn::of(vec![put])).await?;
                        Ok(())
                    }
                }
            })
            .await?;
            store.close().await;
            Ok(())
        }
        What::Core { socket, load } => {
            let channels = connect(socket, load.writers).await?;
            drive(load, |writer| {
                let client = StateServiceClient::new(channels[writer % channels.len()].clone());
                move |key, value| {
                    let mut client = client.clone();
                    let put = Put { key, value, ..Put::default() };
                    let op = cnsmo_proto::pb::state::Op { op: Some(op::Op::Put(put)) };
                    let txn = TxnRequest { success: vec![op], ..TxnRequest::default() };
                    async move {
                        client.txn(txn).await?;
                        Ok(())
                    }
                }
            })
            .await
        }
        What::Etcd { socket, load } => {
            let channels = connect(socket, load.writers).await?;
            drive(load, |writer| {
                let channel = channels[writer % channels.len()].clone();
                move |key, value| {
                    let client = tonic::client::Grpc::new(channel.clone());
                    put_etcd(client, EtcdPut { key: key.into(), value })
                }
            })
            .await
        }
        What::Write { file, first } => write(file, first).await,
    }
}

async fn connect(socket: PathBuf, writers: usize) -> anyhow::Result<Vec<Channel>> {
    let mut channels = Vec::new();
    for _ in 0..writers.min(CONNECTIONS_MAX) {
        let path = socket.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        let channel = endpoint.connect_with_connector(connector).await;
        channels.push(channel.with_context(|| format!("cannot reach {}", socket.display()))?);
    }
    Ok(channels)
}

/// etcd's request, as far as it is needed.
#[derive(Clone, PartialEq, Message)]
struct EtcdPut {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

async fn put_etcd(mut client: tonic::client::Grpc<Channel>, put: EtcdPut) -> anyhow::Result<()> {
    client.ready().await?;
    let codec = ProstCodec::<EtcdPut, ()>::default();
    let path = PathAndQuery::from_static("/etcdserverpb.KV/Put");
    client.unary(tonic::Request::new(put), path, codec).await?;
    Ok(())
}

/// Keeps `load.writers` puts under way, each by one task, and prints what came of it.
async fn drive<P, F>(load: Load, writer: impl Fn(usize) -> P) -> anyhow::Result<()>
where
    P: Fn(String, Bytes) -> F + Send + 'static,
    F: Future<Output = anyhow::Result<()>> + Send,
{
    let count = Arc::new(AtomicUsize::new(0));
    let value = Bytes::from(vec![b'v'; load.bytes]);
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(load.seconds);
    let mut tasks = JoinSet::new();
    for number in 0..load.writers {
        let (put, count, value) = (writer(number), count.clone(), value.clone());
        tasks.spawn(async move {
            let mut took = Vec::new();
            while Instant::now() < end {
                // A prime stride: neighbours in time are no neighbours in the tables.
                let key = count.fetch_add(1, Ordering::Relaxed).wrapping_mul(7_919) % load.keys;
                let before = Instant::now();
                put(format!("bench/{key:08}"), value.clone()).await?;
                took.push(before.elapsed());
            }
            anyhow::Ok(took)
        });
    }
    let mut took = Vec::new();
    while let Some(done) = tasks.join_next().await {
        took.extend(done??);
    }
    let seconds = start.elapsed().as_secs_f64();
    took.sort_unstable();
    let percentile = |part: usize| {
        let index = (took.len() * part / 100).min(took.len().saturating_sub(1));
        took.get(index).map_or(0.0, Duration::as_secs_f64) * 1e6
    };
    println!(
        "{{\"puts_per_second\": {:.1}, \"p50_us\": {:.1}, \"p99_us\": {:.1}}}",
        took.len() as f64 / seconds,
        percentile(50),
        percentile(99)
    );
    Ok(())
}

/// Each transaction writes its number under two keys of its writer. A line `WRITER NUMBER REVISION` says that it is durable.
async fn write(file: PathBuf, first: u64) -> anyhow::Result<()> {
    let store = Store::open(&StoreConfig::sqlite(file)).await?;
    println!("ready");
    let mut tasks = JoinSet::new();
    for writer in 0..WRITERS {
        let store = store.clone();
        tasks.spawn(async move {
            for number in first.. {
                let value = number.to_string();
                let put = |half: &str| Op::put(format!("{half}/{writer:02}"), value.clone());
                let outcome = store.commit(Txn::of(vec![put("a"), put("b")])).await?;
                let line = format!("{writer} {number} {}\n", outcome.revision);
                io::stdout().lock().write_all(line.as_bytes())?;
            }
            anyhow::Ok(())
        });
    }
    tasks.join_next().await.context("no writer")?.context("a writer failed")?
}
