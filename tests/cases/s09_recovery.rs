//! The core is killed in the middle of writes, again and again.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use cnsmo_proto::pb::state::{
    KeyValue, ListRequest, Op, Put, TxnRequest, WatchRequest, op,
    state_service_client::StateServiceClient, watch_response,
};
use cnsmo_tests::RunDir;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::programs::{Core, Random, in_time, run};

const ROUNDS: u64 = 30;
const WRITERS: u64 = 8;
/// The kill comes after at most so many acknowledged writes of a round.
const WRITES_MAX: u64 = 400;
/// Keys of one transaction: all of them are there, or none.
const PARTS: usize = 3;

type Client = StateServiceClient<Channel>;

#[tokio::test(flavor = "multi_thread")]
async fn s09_no_acknowledged_write_is_lost_by_kills_at_any_time() {
    let (seed, mut random) = Random::seeded();
    let mut core = Core::start("s09");
    let mut acknowledged = BTreeMap::new();
    let (mut tried, mut last_revision) = (0, 0);
    for round in 0..ROUNDS {
        let done = Arc::new(AtomicU64::new(0));
        let mut writers = JoinSet::new();
        for writer in 0..WRITERS {
            let client = StateServiceClient::new(core.channel());
            writers.spawn(write(client, format!("w/{round:02}-{writer}-"), done.clone()));
        }
        let kill_after = random.below(WRITES_MAX);
        in_time("enough writes", async {
            while done.load(Ordering::Relaxed) < kill_after {
                tokio::task::yield_now().await;
            }
        })
        .await;
        core.kill();
        while let Some(writer) = writers.join_next().await {
            let (written, attempts) = writer.unwrap();
            acknowledged.extend(written);
            tried += attempts;
        }
        let at = format!("round {round}, seed {seed}");
        check_integrity(&core.folder().join("state"), &at);
        core.start_again();
        let mut client = StateServiceClient::new(core.channel());
        let (kvs, revision) = list(&mut client).await;
        check_writes(&kvs, &acknowledged, &at);
        assert!(revision >= last_revision, "{at}: back from {last_revision} to {revision}");
        check_gapless(&mut client, last_revision, revision, &at).await;
        last_revision = revision;
    }
    assert!(!acknowledged.is_empty(), "every kill came before any write");
    assert!(tried > acknowledged.len(), "no kill came in the middle of a write");
    check_that_checks_can_fail(&acknowledged);
}

/// Writes until the core is gone. Returns what was acknowledged, and how many writes were tried.
async fn write(
    mut client: Client,
    prefix: String,
    done: Arc<AtomicU64>,
) -> (Vec<(String, i64)>, usize) {
    let mut acknowledged = Vec::new();
    for n in 0.. {
        let key = format!("{prefix}{n}");
        let put = |part: usize| {
            let put =
                Put { key: format!("{key}/{part}"), value: key.clone().into(), ..Put::default() };
            Op { op: Some(op::Op::Put(put)) }
        };
        let request =
            TxnRequest { success: (0..PARTS).map(put).collect(), ..TxnRequest::default() };
        match client.txn(request).await {
            Ok(answer) => acknowledged.push((key, answer.into_inner().revision)),
            Err(_) => return (acknowledged, n + 1),
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    unreachable!("the core is killed")
}

async fn list(client: &mut Client) -> (Vec<KeyValue>, i64) {
    let (mut kvs, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListRequest {
            prefix: "w/".into(),
            page_size: 10_000,
            page_token,
            ..ListRequest::default()
        };
        let page = client.list(request).await.unwrap().into_inner();
        kvs.extend(page.kvs);
        if page.next_page_token.is_empty() {
            return (kvs, page.revision);
        }
        page_token = page.next_page_token;
    }
}

/// Each acknowledged write is there at its revision, and each write that is there is whole.
fn check_writes(kvs: &[KeyValue], acknowledged: &BTreeMap<String, i64>, at: &str) {
    let mut found: BTreeMap<&str, Vec<&KeyValue>> = BTreeMap::new();
    for kv in kvs {
        let (write, _) = kv.key.rsplit_once('/').unwrap();
        assert_eq!(kv.value, write.as_bytes(), "{at}: the value of {}", kv.key);
        found.entry(write).or_default().push(kv);
    }
    for (write, parts) in &found {
        assert_eq!(parts.len(), PARTS, "{at}: {write} is half written");
        assert!(
            parts.iter().all(|part| part.mod_revision == parts[0].mod_revision),
            "{at}: {write} has two revisions"
        );
    }
    for (write, revision) in acknowledged {
        let parts = found.get(write.as_str());
        let parts = parts.unwrap_or_else(|| panic!("{at}: {write} was acknowledged and is lost"));
        assert_eq!(parts[0].mod_revision, *revision, "{at}: {write}");
    }
}

/// Every revision after `from` up to `to` is in the history, once.
async fn check_gapless(client: &mut Client, from: i64, to: i64, at: &str) {
    let mut next = from.max(1);
    let request = WatchRequest { start_revision: next, ..WatchRequest::default() };
    let mut watch = client.watch(request).await.unwrap().into_inner();
    next += 1;
    while next <= to {
        let message = in_time("the history", watch.message()).await.unwrap().unwrap();
        assert_ne!(message.kind(), watch_response::Kind::Compacted, "{at}");
        for event in message.events {
            let revision = event.kv.unwrap().mod_revision;
            assert!(
                revision == next || revision == next - 1,
                "{at}: {revision} follows {}",
                next - 1
            );
            next = revision + 1;
        }
    }
}

/// Of what the kill left, before another core repairs anything.
fn check_integrity(state: &Path, at: &str) {
    let copy = RunDir::new("s09-copy").unwrap();
    for file in ["state.db", "state.db-wal"] {
        fs::copy(state.join(file), copy.path().join(file)).unwrap();
    }
    assert_eq!(integrity(&copy.path().join("state.db")), "ok", "{at}");
}

fn integrity(database: &Path) -> String {
    const CHECK: &str = "import sqlite3, sys
try: print(*sqlite3.connect(sys.argv[1]).execute('PRAGMA integrity_check').fetchone())
except sqlite3.DatabaseError as error: print(error)";
    run(Command::new("python3").args(["-c", CHECK]).arg(database)).trim().to_owned()
}

fn check_that_checks_can_fail(acknowledged: &BTreeMap<String, i64>) {
    let whole = |(write, revision): (&String, &i64)| {
        let part = |n| KeyValue {
            key: format!("{write}/{n}"),
            value: write.clone().into(),
            mod_revision: *revision,
            ..KeyValue::default()
        };
        (0..PARTS).map(part).collect::<Vec<_>>()
    };
    let kvs: Vec<_> = acknowledged.iter().flat_map(whole).collect();
    check_writes(&kvs, acknowledged, "control");
    let lost = std::panic::catch_unwind(|| check_writes(&kvs[PARTS..], acknowledged, "control"));
    assert!(lost.is_err(), "a lost write is not noticed");
    let half = std::panic::catch_unwind(|| check_writes(&kvs[1..], acknowledged, "control"));
    assert!(half.is_err(), "half a write is not noticed");
    let folder = RunDir::new("s09-control").unwrap();
    let damaged = folder.path().join("state.db");
    fs::write(&damaged, [0x5a; 8_192]).unwrap();
    assert_ne!(integrity(&damaged), "ok", "a damaged file is not noticed");
}
