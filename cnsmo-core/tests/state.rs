//! Keys, revisions, watches and leases, as clients see them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cnsmo_proto::pb::{
    admin::{
        BackupRequest, CompactRequest, GetStatusRequest, GetStatusResponse,
        admin_service_client::AdminServiceClient,
    },
    identity::{CreateJoinTokenRequest, Role},
    state::{
        Compare, Event, Fence, GetRequest, GrantLeaseRequest, GrantLeaseResponse,
        KeepAliveLeaseRequest, KeyValue, ListRequest, Op, Put, RevokeLeaseRequest, TxnRequest,
        TxnResponse, WatchRequest, WatchResponse, compare::Target, event::Type, op,
        state_service_client::StateServiceClient, watch_response::Kind,
    },
};
use nix::sys::signal::Signal;
use rcgen::KeyPair;
use tempfile::TempDir;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{
    harness::{OWN_COMMITS, PATIENCE, TestCore, unix},
    program::Program,
};

/// A client of one core.
#[derive(Clone)]
pub(crate) struct Client {
    state: StateServiceClient<Channel>,
    admin: AdminServiceClient<Channel>,
}

impl Client {
    pub(crate) async fn connect(folder: &TempDir) -> Self {
        Self::on(unix(&folder.path().join("core.sock")).await.unwrap())
    }

    fn on(channel: Channel) -> Self {
        let state = StateServiceClient::new(channel.clone());
        Self { state, admin: AdminServiceClient::new(channel) }
    }

    /// Over TLS, as somebody who has joined in this role.
    async fn join(core: &mut TestCore, role: Role, name: &str) -> Self {
        let request =
            CreateJoinTokenRequest { role: role.into(), ..CreateJoinTokenRequest::default() };
        let token = core.admin.tokens.create_join_token(request).await.unwrap().into_inner().token;
        let key = KeyPair::generate().unwrap();
        let chain = core.enrol(&token, name, &key).await.unwrap().certificate_chain;
        Self::on(core.tls(Some((&chain, &key.serialize_pem()))).await)
    }

    async fn txn(&mut self, txn: TxnRequest) -> Result<TxnResponse, Status> {
        Ok(self.state.txn(txn).await?.into_inner())
    }

    async fn ops(&mut self, ops: Vec<Op>) -> Result<TxnResponse, Status> {
        self.txn(TxnRequest { success: ops, ..TxnRequest::default() }).await
    }

    pub(crate) async fn put(&mut self, key: &str, value: &str) -> i64 {
        self.ops(vec![put(key, value)]).await.unwrap().revision
    }

    async fn get(&mut self, key: &str) -> Option<KeyValue> {
        let request = GetRequest { key: key.into(), min_revision: 0 };
        self.state.get(request).await.unwrap().into_inner().kv
    }

    pub(crate) async fn value(&mut self, key: &str) -> Option<String> {
        let kv = self.get(key).await?;
        Some(String::from_utf8(kv.value.to_vec()).unwrap())
    }

    /// All pages, and the revision that they are of.
    async fn list(&mut self, prefix: &str, page_size: i32) -> (BTreeMap<String, Vec<u8>>, i64) {
        let mut request =
            ListRequest { prefix: prefix.into(), page_size, ..ListRequest::default() };
        let (mut all, mut last) = (BTreeMap::new(), String::new());
        loop {
            let page = self.state.list(request.clone()).await.unwrap().into_inner();
            for kv in page.kvs {
                assert!(kv.key > last, "in order");
                last.clone_from(&kv.key);
                all.insert(kv.key, kv.value.to_vec());
            }
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                return (all, page.revision);
            }
        }
    }

    async fn watch(&mut self, request: WatchRequest) -> Result<Watched, Status> {
        let stream = self.state.watch(request).await?.into_inner();
        Ok(Watched { stream, map: BTreeMap::new(), revision: 0, compactions: 0, begins_anew: true })
    }

    async fn watch_from(&mut self, prefix: &str, start_revision: i64) -> Watched {
        let request =
            WatchRequest { prefix: prefix.into(), start_revision, ..WatchRequest::default() };
        self.watch(request).await.unwrap()
    }

    pub(crate) async fn grant(&mut self, ttl: Duration) -> GrantLeaseResponse {
        let ttl = Some(ttl.try_into().unwrap());
        self.state.grant_lease(GrantLeaseRequest { ttl }).await.unwrap().into_inner()
    }

    async fn grant_lease(&mut self) -> Result<GrantLeaseResponse, Status> {
        let ttl = Some(Duration::from_secs(1).try_into().unwrap());
        Ok(self.state.grant_lease(GrantLeaseRequest { ttl }).await?.into_inner())
    }

    /// Renews once; false: it is gone.
    pub(crate) async fn renew(&mut self, lease_id: i64) -> bool {
        let requests = tokio_stream::iter([KeepAliveLeaseRequest { lease_id }]);
        let mut answers = self.state.keep_alive_lease(requests).await.unwrap().into_inner();
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!((answer.lease_id, answer.ttl.is_none()), (lease_id, answer.gone));
        !answer.gone
    }

    async fn status(&mut self) -> GetStatusResponse {
        self.admin.get_status(GetStatusRequest {}).await.unwrap().into_inner()
    }

    async fn compact(&mut self, revision: i64) -> Result<i64, Status> {
        let answer = self.admin.compact(CompactRequest { revision }).await?;
        Ok(answer.into_inner().compact_revision)
    }

    async fn backup(&mut self) -> Result<(i64, Vec<u8>), Status> {
        let mut stream = self.admin.backup(BackupRequest {}).await?.into_inner();
        let (mut revision, mut file) = (0, Vec::new());
        while let Some(piece) = stream.message().await? {
            revision += piece.revision;
            file.extend(piece.data);
        }
        Ok((revision, file))
    }

    /// Waits until `is` holds.
    async fn until(&mut self, is: impl Fn(&GetStatusResponse) -> bool) {
        let wait = async {
            while !is(&self.status().await) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("it never came to that");
    }
}

/// A watch, and what it says that the keys are.
struct Watched {
    stream: Streaming<WatchResponse>,
    map: BTreeMap<String, Vec<u8>>,
    revision: i64,
    compactions: usize,
    /// The next snapshot replaces what is known.
    begins_anew: bool,
}

impl Watched {
    /// The next message but bookmarks, taken into the map.
    async fn next(&mut self) -> (Kind, Vec<Event>) {
        loop {
            let message = self.message().await;
            if message.kind() != Kind::Bookmark {
                return (message.kind(), message.events);
            }
        }
    }

    async fn message(&mut self) -> WatchResponse {
        let message = tokio::time::timeout(PATIENCE, self.stream.message()).await;
        let message = message.expect("the watch is silent").unwrap().expect("the watch ended");
        match message.kind() {
            Kind::Snapshot => {
                if self.begins_anew {
                    self.map.clear();
                }
                self.begins_anew = false;
                assert_eq!(message.revision, 0, "not to be resumed from");
            }
            Kind::Compacted => {
                self.compactions += 1;
                self.begins_anew = true;
                assert_eq!(message.revision, 0);
            }
            Kind::Synced => {
                if self.begins_anew && self.compactions > 0 {
                    self.map.clear();
                }
                self.begins_anew = false;
                self.revision = message.revision;
            }
            Kind::Events | Kind::Bookmark => {
                assert!(message.revision >= self.revision, "backwards");
                self.revision = message.revision;
            }
            Kind::Unspecified => panic!("no kind"),
        }
        for event in &message.events {
            let kv = event.kv.clone().unwrap();
            match event.r#type() {
                Type::Put => _ = self.map.insert(kv.key, kv.value.to_vec()),
                Type::Delete | Type::Expire => _ = self.map.remove(&kv.key),
                Type::Unspecified => panic!("no type"),
            }
        }
        message
    }

    async fn until(&mut self, revision: i64) {
        while self.revision < revision {
            self.message().await;
        }
    }
}

fn put(key: &str, value: &str) -> Op {
    put_with(key, value, 0)
}

fn put_with(key: &str, value: &str, lease_id: i64) -> Op {
    let value = value.as_bytes().to_vec().into();
    let put = Put { key: key.into(), value, lease_id, ..Put::default() };
    Op { op: Some(op::Op::Put(put)) }
}

fn delete(key: &str) -> Op {
    Op { op: Some(op::Op::Delete(key.into())) }
}

fn delete_prefix(prefix: &str) -> Op {
    Op { op: Some(op::Op::DeletePrefix(prefix.into())) }
}

fn read(key: &str) -> Op {
    Op { op: Some(op::Op::Get(key.into())) }
}

fn compare(key: &str, target: Target) -> Compare {
    Compare { key: key.into(), target: Some(target) }
}

async fn start() -> (TestCore, Client) {
    let core = TestCore::start().await;
    let client = Client::connect(&core.folder).await;
    (core, client)
}

#[tokio::test]
async fn a_transaction_is_one_revision_or_nothing() {
    let (core, mut client) = start().await;
    let first = client.ops(vec![put("a", "1"), put("b", "1"), read("a")]).await.unwrap();
    assert_eq!(first.kvs[0].value, "1", "reads see what was written before them");
    let revision = first.revision;
    for key in ["a", "b"] {
        let kv = client.get(key).await.unwrap();
        assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (revision, revision, 1));
    }
    for (target, holds) in [
        (Target::ModRevision(revision), true),
        (Target::ModRevision(revision + 1), false),
        (Target::ModRevision(0), false),
        (Target::Version(1), true),
        (Target::Version(0), false),
        (Target::Value("1".into()), true),
        (Target::Value("2".into()), false),
        (Target::LeaseId(0), true),
        (Target::LeaseId(1), false),
    ] {
        let answer = client
            .txn(TxnRequest {
                compare: vec![
                    compare("a", target.clone()),
                    compare("none", Target::ModRevision(0)),
                ],
                success: vec![read("b")],
                failure: vec![read("a"), read("none")],
                ..TxnRequest::default()
            })
            .await
            .unwrap();
        assert_eq!((answer.succeeded, answer.revision), (holds, revision), "{target:?}");
        let keys: Vec<_> = answer.kvs.iter().map(|kv| (kv.key.as_str(), kv.version)).collect();
        assert_eq!(keys, if holds { vec![("b", 1)] } else { vec![("a", 1), ("none", 0)] });
    }
    let second = client.ops(vec![put("a", "2"), delete("b"), put("c/1", ""), put("c/2", "")]).await;
    assert_eq!(second.unwrap().revision, revision + 1);
    assert_eq!((client.value("a").await.unwrap().as_str(), client.get("b").await), ("2", None));
    let third = client.ops(vec![delete_prefix("c/"), read("c/1")]).await.unwrap();
    assert_eq!((third.revision, third.kvs[0].version), (revision + 2, 0));
    let mut users = client.list("", 0).await.0;
    users.retain(|key, _| !key.starts_with("cnsmo/"));
    assert_eq!(users.keys().collect::<Vec<_>>(), ["a"]);
    core.stop().await;
}

#[tokio::test]
async fn a_repeated_request_is_answered_as_the_first_time() {
    let (core, mut client) = start().await;
    let request = TxnRequest {
        compare: vec![compare("a", Target::ModRevision(0))],
        success: vec![put("a", "1")],
        request_id: "one".into(),
        ..TxnRequest::default()
    };
    let first = client.txn(request.clone()).await.unwrap();
    let again = client.txn(request.clone()).await.unwrap();
    assert_eq!((first.succeeded, &again), (true, &first));
    let core = core.restart().await;
    let mut client = Client::connect(&core.folder).await;
    assert_eq!(client.txn(request.clone()).await.unwrap(), first, "also after a restart");
    let other = client.txn(TxnRequest { request_id: "two".into(), ..request }).await.unwrap();
    assert!(!other.succeeded);
    core.stop().await;
}

#[tokio::test]
async fn bad_requests_name_the_field_and_change_nothing() {
    let (core, mut client) = start().await;
    let revision = client.put("a", "1").await;
    let long = "k".repeat(513);
    let list = |count| vec![put("a", "2"); count];
    let absent = |key: &str| compare(key, Target::ModRevision(0));
    let failing = |success| TxnRequest { success, ..TxnRequest::default() };
    let cases: Vec<(TxnRequest, Code, &str)> = vec![
        (
            failing(vec![put("a", "2"), put("", "")]),
            Code::InvalidArgument,
            "success[1].put.key: missing",
        ),
        (failing(vec![put(&long, "")]), Code::InvalidArgument, "success[0].put.key: has 513 bytes"),
        (failing(vec![put("a\n", "")]), Code::InvalidArgument, "success[0].put.key: has a control"),
        (
            failing(vec![put("a", &"x".repeat((1 << 20) + 1))]),
            Code::InvalidArgument,
            "success[0].put.value: has 1048577 bytes",
        ),
        (
            failing(vec![put("a", &"x".repeat(1 << 20)), put("b", &"x".repeat(1 << 20))]),
            Code::InvalidArgument,
            "the transaction has 2097154 bytes",
        ),
        (
            failing(vec![put_with("a", "", -1)]),
            Code::InvalidArgument,
            "success[0].put.lease_id: -1",
        ),
        (failing(vec![put_with("a", "", 77)]), Code::NotFound, "77"),
        (failing(list(129)), Code::InvalidArgument, "success: has 129 elements"),
        (failing(vec![read("a"); 33]), Code::InvalidArgument, "success: has 33 gets"),
        (failing(vec![Op { op: None }]), Code::InvalidArgument, "success[0]: missing"),
        (
            failing(vec![delete_prefix("")]),
            Code::InvalidArgument,
            "success[0].delete_prefix: missing",
        ),
        (failing(vec![put("cnsmo/x", "")]), Code::PermissionDenied, "success[0].put.key"),
        (failing(vec![delete("cnsmo/nodes/a")]), Code::PermissionDenied, "success[0].delete"),
        (failing(vec![delete_prefix("c")]), Code::PermissionDenied, "success[0].delete_prefix"),
        (
            failing(vec![delete_prefix("cnsmo/x")]),
            Code::PermissionDenied,
            "success[0].delete_prefix",
        ),
        (failing(vec![read("cnsmo/tokens/x")]), Code::PermissionDenied, "success[0].get"),
        (
            TxnRequest { failure: vec![put("cnsmo/x", "")], ..failing(list(1)) },
            Code::PermissionDenied,
            "failure[0].put.key",
        ),
        (
            TxnRequest {
                compare: vec![absent("a"), absent("cnsmo/identities/x")],
                ..failing(list(1))
            },
            Code::PermissionDenied,
            "compare[1].key",
        ),
        (
            TxnRequest {
                compare: vec![Compare { key: "a".into(), target: None }],
                ..failing(list(1))
            },
            Code::InvalidArgument,
            "compare[0]: missing",
        ),
        (
            TxnRequest { compare: vec![compare("a", Target::Version(-1))], ..failing(list(1)) },
            Code::InvalidArgument,
            "compare[0].version: is negative",
        ),
        (
            TxnRequest { request_id: "x".repeat(65), ..failing(list(1)) },
            Code::InvalidArgument,
            "request_id: has 65 bytes",
        ),
        (
            TxnRequest { fence: Some(Fence { lease_id: 0, fencing_token: 1 }), ..failing(list(1)) },
            Code::InvalidArgument,
            "fence.lease_id",
        ),
    ];
    for (request, code, text) in cases {
        let error = client.txn(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{text}: {error}");
        assert!(error.message().contains(text), "{text}: {error}");
    }
    let invalid = client.state.get(GetRequest::default()).await.unwrap_err();
    assert_eq!((invalid.code(), invalid.message()), (Code::InvalidArgument, "key: missing"));
    let newer = GetRequest { key: "a".into(), min_revision: -1 };
    assert_eq!(client.state.get(newer).await.unwrap_err().message(), "min_revision: is negative");
    for page_size in [-1, 10_001] {
        let request = ListRequest { page_size, ..ListRequest::default() };
        let error = client.state.list(request).await.unwrap_err();
        assert!(error.message().starts_with("page_size: "), "{error}");
    }
    for ttl in [None, Some(Duration::from_millis(999)), Some(Duration::from_secs(3_601))] {
        let ttl = ttl.map(|ttl| ttl.try_into().unwrap());
        let error = client.state.grant_lease(GrantLeaseRequest { ttl }).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().starts_with("ttl: "), "{error}");
    }
    assert_eq!(client.status().await.revision, revision, "nothing was committed");
    core.stop().await;
}

#[tokio::test]
async fn pages_are_of_one_revision_while_others_write() {
    let (core, mut client) = start().await;
    for some in 0..10 {
        let key = |n: usize| format!("p/{:04}", some * 100 + n);
        client.ops((0..100).map(|n| put(&key(n), "first")).collect()).await.unwrap();
    }
    let written = client.put("q", "outside").await;
    let stop = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let (mut client, stop) = (client.clone(), stop.clone());
        async move {
            for n in (0..1_000).cycle() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let op = if n % 3 == 0 {
                    delete(&format!("p/{n:04}"))
                } else {
                    put(&format!("p/{n:04}"), "later")
                };
                client.ops(vec![op, put(&format!("p/{n:04}x"), "later")]).await.unwrap();
            }
        }
    });
    let request = ListRequest { prefix: "p/".into(), page_size: 7, ..ListRequest::default() };
    let first = client.state.list(request.clone()).await.unwrap().into_inner();
    let at = first.revision;
    let mut seen = first.kvs;
    let mut token = first.next_page_token;
    let wrong = ListRequest { prefix: "q".into(), page_token: token.clone(), ..request.clone() };
    assert_eq!(client.state.list(wrong).await.unwrap_err().code(), Code::InvalidArgument);
    while !token.is_empty() {
        let request = ListRequest { page_token: token, ..request.clone() };
        let page = client.state.list(request).await.unwrap().into_inner();
        assert_eq!(page.revision, at);
        seen.extend(page.kvs);
        token = page.next_page_token;
    }
    stop.store(true, Ordering::Relaxed);
    writing.await.unwrap();
    // The history up to that revision says the same.
    let mut expected: BTreeMap<String, Vec<u8>> =
        (0..1_000).map(|n| (format!("p/{n:04}"), b"first".to_vec())).collect();
    let mut history = client.watch_from("p/", written).await;
    while history.revision < at {
        for event in history.message().await.events {
            let kv = event.kv.clone().unwrap();
            if kv.mod_revision > at {
                break;
            }
            match event.r#type() {
                Type::Put => _ = expected.insert(kv.key, kv.value.to_vec()),
                _ => _ = expected.remove(&kv.key),
            }
        }
    }
    let seen: BTreeMap<_, _> = seen.into_iter().map(|kv| (kv.key, kv.value.to_vec())).collect();
    let differ = |key: &&String| seen.get(*key) != expected.get(*key);
    let wrong: Vec<_> = seen.keys().chain(expected.keys()).filter(differ).collect();
    assert!(wrong.is_empty(), "at {at}, after {written}: {wrong:?}");
    assert!(client.status().await.revision > at, "nobody wrote meanwhile");
    core.stop().await;
}

#[tokio::test]
async fn a_watch_tells_what_is_and_then_each_change() {
    let (core, mut client) = start().await;
    let ops = vec![put("a/1", "one"), put("a/2", "two"), put("b", "other")];
    let first = client.ops(ops).await.unwrap().revision;
    let request = WatchRequest {
        prefix: "a/".into(),
        prev_kv: true,
        bookmark_interval: Some(Duration::from_millis(100).try_into().unwrap()),
        ..WatchRequest::default()
    };
    let mut watch = client.watch(request).await.unwrap();
    let (kind, events) = watch.next().await;
    assert_eq!((kind, events.len()), (Kind::Snapshot, 2));
    assert_eq!(watch.next().await.0, Kind::Synced);
    assert_eq!(watch.revision, first);
    // One transaction is one message or a part of one, never torn.
    client
        .ops(vec![
            put("a/1", "uno"),
            delete("a/2"),
            put("b", ""),
            put("a/3", "x"),
            put("a/3", "tre"),
        ])
        .await
        .unwrap();
    let (kind, events) = watch.next().await;
    let told: Vec<_> = events
        .iter()
        .map(|event| {
            let kv = event.kv.clone().unwrap();
            let prev = event.prev_kv.clone().map(|kv| kv.value.to_vec());
            (event.r#type(), kv.key, kv.mod_revision, prev)
        })
        .collect();
    assert_eq!(kind, Kind::Events);
    assert_eq!(
        told,
        [
            (Type::Put, "a/1".into(), first + 1, Some(b"one".to_vec())),
            (Type::Delete, "a/2".into(), first + 1, Some(b"two".to_vec())),
            (Type::Put, "a/3".into(), first + 1, None),
            (Type::Put, "a/3".into(), first + 1, Some(b"x".to_vec())),
        ]
    );
    // What others write moves a quiet watcher on.
    let other = client.put("b", "again").await;
    let bookmark = watch.message().await;
    assert_eq!(bookmark.kind(), Kind::Bookmark);
    watch.until(other).await;
    // Resumed where it was seen last.
    let revision = client.put("a/4", "four").await;
    let mut resumed = client.watch_from("a/", other).await;
    assert_eq!((resumed.next().await.0, resumed.revision), (Kind::Synced, other));
    resumed.until(revision).await;
    assert_eq!(resumed.map.keys().collect::<Vec<_>>(), ["a/4"]);
    let beyond = WatchRequest { start_revision: revision + 1_000, ..WatchRequest::default() };
    let error = client.watch(beyond).await.map(|_| ()).unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange, "{error}");
    core.stop().await;
}

#[tokio::test]
async fn an_old_watcher_gets_a_snapshot_on_the_same_stream() {
    let (core, mut client) = start().await;
    for n in 0..50 {
        client.put(&format!("k/{}", n % 5), &n.to_string()).await;
    }
    client.ops(vec![delete("k/4")]).await.unwrap();
    client.put("z", "").await;
    assert_eq!(client.compact(40).await.unwrap(), 40);
    for wrong in [0, -1, 1_000_000] {
        assert_eq!(client.compact(wrong).await.unwrap_err().code(), Code::OutOfRange);
    }
    let mut watch = client.watch_from("k/", 7).await;
    watch.map.insert("k/gone".into(), Vec::new());
    let kinds = [watch.next().await.0, watch.next().await.0, watch.next().await.0];
    assert_eq!(kinds, [Kind::Compacted, Kind::Snapshot, Kind::Synced]);
    assert_eq!(watch.map, client.list("k/", 0).await.0);
    assert_eq!(watch.map.len(), 4);
    let revision = client.put("k/5", "new").await;
    watch.until(revision).await;
    assert_eq!(watch.map, client.list("k/", 0).await.0);
    core.stop().await;
}

/// It reads nothing while far more is written than is kept in memory or in its stream, and then all of it is compacted.
#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_watcher_slows_nobody_and_is_told_what_it_missed() {
    let (core, mut client) = start().await;
    client.put("s/old", "").await;
    let mut stuck = Client::connect(&core.folder).await.watch_from("s/", 0).await;
    while stuck.next().await.0 != Kind::Synced {}
    let mut live = client.watch_from("s/", 0).await;
    let value = "v".repeat(512 << 10);
    client.ops(vec![delete("s/old")]).await.unwrap();
    let mut revision = 0;
    for n in 0..128 {
        revision = client.put(&format!("s/{}", n % 4), &format!("{n}{value}")).await;
    }
    live.until(revision).await;
    client.compact(revision).await.unwrap();
    revision = client.put("s/last", "").await;
    stuck.until(revision).await;
    assert_eq!(stuck.compactions, 1, "it must not pretend that nothing was missed");
    let expected = client.list("s/", 0).await.0;
    assert!(stuck.map == expected && live.map.len() <= expected.len());
    core.stop().await;
}

/// Whatever is written, and wherever a watch is broken off and resumed: what it told is what is there.
#[tokio::test(flavor = "multi_thread")]
async fn watches_replay_to_what_a_list_says() {
    let (core, mut client) = start().await;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4_u64 {
        let mut client = Client::connect(&core.folder).await;
        writers.spawn(async move {
            let mut random = writer + 1;
            for n in 0..150 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let key = |shift: u32| format!("w/{}", (random >> shift) % 40);
                let ops = match (random >> 60) % 4 {
                    0 => vec![delete(&key(8))],
                    1 => vec![
                        put(&key(8), &format!("{writer}/{n}")),
                        delete(&key(16)),
                        put(&key(24), ""),
                    ],
                    2 => {
                        vec![delete_prefix(&format!("w/{}", (random >> 8) % 4)), put(&key(16), "p")]
                    }
                    _ => vec![put(&key(8), &format!("{writer}/{n}"))],
                };
                client.ops(ops).await.unwrap();
            }
        });
    }
    let mut watchers = tokio::task::JoinSet::new();
    let done = Arc::new(AtomicBool::new(false));
    for watcher in 0..4 {
        let mut client = Client::connect(&core.folder).await;
        let done = done.clone();
        watchers.spawn(async move {
            tokio::time::sleep(Duration::from_millis(30 * watcher)).await;
            let mut watch = client.watch_from("w/", 0).await;
            let mut messages = 0;
            while !done.load(Ordering::Relaxed) {
                let request = GetStatusRequest {};
                let newest = client.admin.get_status(request).await.unwrap().into_inner().revision;
                while watch.revision < newest {
                    watch.message().await;
                    messages += 1;
                    if messages % 5 == 0 && watch.revision > 0 && !watch.begins_anew {
                        let mut again = client.watch_from("w/", watch.revision).await;
                        again.map = std::mem::take(&mut watch.map);
                        again.revision = watch.revision;
                        watch = again;
                    }
                }
            }
            (client, watch)
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended.unwrap();
    }
    let last = client.put("w/end", "").await;
    done.store(true, Ordering::Relaxed);
    let (expected, revision) = client.list("w/", 3).await;
    assert_eq!(revision, last);
    while let Some(watch) = watchers.join_next().await {
        let (_client, mut watch) = watch.unwrap();
        watch.until(last).await;
        assert_eq!((watch.map, watch.compactions), (expected.clone(), 0));
    }
    core.stop().await;
}

#[tokio::test]
async fn a_lease_lives_by_renewal_and_takes_its_keys_with_it() {
    let (core, mut client) = start().await;
    let lease = client.grant(Duration::from_secs(1)).await;
    let (first, second) =
        (put_with("l/1", "", lease.lease_id), put_with("l/2", "", lease.lease_id));
    client.ops(vec![first, second, put_with("l/freed", "", lease.lease_id)]).await.unwrap();
    let bound = client.put("l/freed", "no longer bound").await;
    let mut watch = client.watch_from("l/", bound).await;
    assert_eq!(watch.next().await.0, Kind::Synced);
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        assert!(client.renew(lease.lease_id).await);
    }
    assert_eq!(client.status().await.revision, bound, "a renewal writes nothing");
    let (kind, events) = watch.next().await;
    let ended: Vec<_> = events
        .iter()
        .map(|e| (e.r#type(), e.kv.clone().unwrap().key, e.kv.as_ref().unwrap().mod_revision))
        .collect();
    assert_eq!(kind, Kind::Events);
    let revision = watch.revision;
    assert_eq!(
        ended,
        [(Type::Expire, "l/1".into(), revision), (Type::Expire, "l/2".into(), revision)]
    );
    assert!(client.get("l/freed").await.is_some());
    assert!(!client.renew(lease.lease_id).await);
    let late = client.ops(vec![put_with("l/1", "", lease.lease_id)]).await.unwrap_err();
    assert_eq!(late.code(), Code::NotFound, "{late}");
    core.stop().await;
}

#[tokio::test]
async fn a_revoked_lease_fences_its_holder_out() {
    let (core, mut client) = start().await;
    let lease = client.grant(Duration::from_secs(60)).await;
    let next = client.grant(Duration::from_secs(60)).await;
    assert!(next.fencing_token > lease.fencing_token);
    let fenced = |lease_id, fencing_token| TxnRequest {
        success: vec![put("f", "")],
        fence: Some(Fence { lease_id, fencing_token }),
        ..TxnRequest::default()
    };
    client.txn(fenced(lease.lease_id, lease.fencing_token)).await.unwrap();
    client.ops(vec![put_with("held", "", lease.lease_id)]).await.unwrap();
    let wrong = client.txn(fenced(lease.lease_id, next.fencing_token)).await.unwrap_err();
    assert_eq!(wrong.code(), Code::FailedPrecondition, "{wrong}");
    let request = RevokeLeaseRequest { lease_id: lease.lease_id };
    let revoked = client.state.revoke_lease(request).await.unwrap().into_inner().revision;
    assert_eq!((client.get("held").await, client.status().await.revision), (None, revoked));
    let late = client.txn(fenced(lease.lease_id, lease.fencing_token)).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition, "{late}");
    assert_eq!(client.status().await.revision, revoked, "nothing of it was written");
    let again = client.state.revoke_lease(request).await.unwrap_err();
    assert_eq!(again.code(), Code::NotFound);
    core.stop().await;
}

#[tokio::test]
async fn a_core_that_starts_gives_each_lease_its_full_time() {
    let (core, mut client) = start().await;
    let lease = client.grant(Duration::from_secs(2)).await;
    client.ops(vec![put_with("l", "", lease.lease_id)]).await.unwrap();
    let folder = core.stop().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let core = TestCore::start_in(folder, cnsmo_core::fleet::Timing::default()).await;
    let mut client = Client::connect(&core.folder).await;
    assert!(client.renew(lease.lease_id).await);
    assert!(client.get("l").await.is_some());
    // Nobody renews it any more.
    client.until(|status| status.leases == 0).await;
    assert_eq!(client.get("l").await, None);
    core.stop().await;
}

#[tokio::test]
async fn many_leases_that_end_at_once_are_held_back() {
    let (core, mut client) = start().await;
    let (mut leases, mut puts) = (Vec::new(), Vec::new());
    for n in 0..100 {
        // Long enough for all of them to be granted before the first is over.
        let lease = client.grant(Duration::from_secs(10)).await.lease_id;
        puts.push(put_with(&format!("m/{n}"), "", lease));
        leases.push(lease);
    }
    client.ops(puts).await.unwrap();
    client.until(|status| status.leases_held_back > 0).await;
    client.until(|status| status.leases == 80 && status.leases_held_back == 80).await;
    assert_eq!(client.list("m/", 0).await.0.len(), 80);
    // The clients are back, and find out who of them was ended.
    let mut alive = 0;
    for lease in leases {
        alive += usize::from(client.renew(lease).await);
    }
    assert_eq!(alive, 80);
    client.until(|status| status.leases_held_back == 0).await;
    core.stop().await;
}

#[tokio::test]
async fn a_core_that_was_stopped_ends_no_lease_for_it() {
    let folder = TempDir::new().unwrap();
    let program = Program::start(folder.path());
    let mut client = Client::connect(&folder).await;
    let lease = client.grant(Duration::from_secs(3)).await;
    client.ops(vec![put_with("l", "", lease.lease_id)]).await.unwrap();
    assert!(client.renew(lease.lease_id).await);
    program.signal(Signal::SIGSTOP);
    // Three times what the lease is good for.
    tokio::time::sleep(Duration::from_secs(9)).await;
    program.signal(Signal::SIGCONT);
    // Several ticks, and less than what was left of it.
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    assert!(client.get("l").await.is_some(), "ended for a time in which nobody could renew it");
    assert!(client.renew(lease.lease_id).await);
    client.until(|status| status.leases == 0).await;
    assert_eq!(client.get("l").await, None, "and counts again");
}

#[tokio::test]
async fn a_backup_is_the_state_of_its_revision() {
    let (core, mut client) = start().await;
    for n in 0..200 {
        client.put(&format!("b/{n}"), &"x".repeat(4_000)).await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let (mut client, stop) = (client.clone(), stop.clone());
        async move {
            let mut revisions = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                revisions.push(client.put("b/count", &revisions.len().to_string()).await);
            }
            revisions
        }
    });
    let (revision, file) = client.backup().await.unwrap();
    stop.store(true, Ordering::Relaxed);
    let revisions = writing.await.unwrap();
    assert!(file.starts_with(b"SQLite format 3\0"));
    let leftover = core.folder.path().join("state/backup.tmp");
    assert!(!leftover.exists());
    let epoch = client.status().await.epoch;
    let mut watched = client.watch_from("b/", 0).await;
    let synced = watched.stream.message().await.unwrap().unwrap();
    assert_eq!(synced.epoch, epoch);
    drop(watched);
    core.stop().await;

    let counted = revisions.iter().filter(|r| **r <= revision).count();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("backup");
    std::fs::write(&path, file).unwrap();
    let state_dir = folder.path().join("state");
    let restored = cnsmo_core::server::restore(&state_dir, None, &path, false).await.unwrap();
    assert_eq!(restored, revision);
    let refused = cnsmo_core::server::restore(&state_dir, None, &path, false).await.unwrap_err();
    assert!(format!("{refused:#}").contains("force"), "{refused:#}");
    let core = TestCore::start_in(folder, cnsmo_core::fleet::Timing::default()).await;
    let mut client = Client::connect(&core.folder).await;
    let status = client.status().await;
    assert!(status.epoch > epoch);
    let revision = revision + OWN_COMMITS;
    assert_eq!(status.revision, revision);
    let expected = counted.checked_sub(1).map(|n| n.to_string());
    assert_eq!(client.value("b/count").await, expected);
    assert_eq!(client.put("new", "").await, revision + 1);

    // One that has seen what was taken back, and one whose revision is another one now.
    for start_revision in [revision + 1_000, revision + 1] {
        let resume = WatchRequest { epoch, start_revision, ..WatchRequest::default() };
        let mut stream = client.state.watch(resume.clone()).await.unwrap().into_inner();
        let mut kinds = Vec::new();
        while kinds.last() != Some(&Kind::Synced) {
            let message = stream.message().await.unwrap().unwrap();
            assert_eq!(message.epoch, status.epoch);
            kinds.push(message.kind());
        }
        assert_eq!((kinds[0], kinds[1]), (Kind::Compacted, Kind::Snapshot));
        let resume = WatchRequest { epoch: status.epoch, start_revision: revision, ..resume };
        let mut stream = client.state.watch(resume).await.unwrap().into_inner();
        assert_eq!(stream.message().await.unwrap().unwrap().kind(), Kind::Synced);
        let event = stream.message().await.unwrap().unwrap();
        assert_eq!((event.kind(), event.revision), (Kind::Events, revision + 1));
    }
    core.stop().await;
}

#[tokio::test]
async fn each_caller_has_what_its_role_grants() {
    let (mut core, mut admin) = start().await;
    admin.put("shop/a", "1").await;
    admin.put("bank/a", "1").await;
    let denied = |status: Status| assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let mut shop = Client::join(&mut core, Role::Service, "shop").await;
    shop.put("shop/a", "2").await;
    assert_eq!(shop.list("shop/", 0).await.0.len(), 1);
    let other = GetRequest { key: "bank/a".into(), min_revision: 0 };
    denied(shop.state.get(other.clone()).await.unwrap_err());
    denied(shop.state.list(ListRequest::default()).await.unwrap_err());
    denied(shop.watch(WatchRequest::default()).await.map(|_| ()).unwrap_err());
    denied(shop.ops(vec![put("shop/b", ""), put("bank/b", "")]).await.unwrap_err());
    denied(shop.ops(vec![delete_prefix("s")]).await.unwrap_err());
    denied(
        shop.txn(TxnRequest {
            compare: vec![compare("bank/a", Target::Value("1".into()))],
            ..TxnRequest::default()
        })
        .await
        .unwrap_err(),
    );
    assert!(admin.get("shop/b").await.is_none());

    let mut bank = Client::join(&mut core, Role::Service, "bank").await;
    let lease = shop.grant(Duration::from_secs(60)).await.lease_id;
    let request = RevokeLeaseRequest { lease_id: lease };
    denied(bank.state.revoke_lease(request).await.unwrap_err());
    let renewal = tokio_stream::iter([KeepAliveLeaseRequest { lease_id: lease }]);
    let mut answers = bank.state.keep_alive_lease(renewal).await.unwrap().into_inner();
    denied(answers.message().await.unwrap_err());
    assert!(shop.renew(lease).await && admin.renew(lease).await);
    shop.state.revoke_lease(request).await.unwrap();

    // The same id of another caller is another request.
    let once = |key: &str| TxnRequest {
        success: vec![put(key, "")],
        request_id: "r".into(),
        ..TxnRequest::default()
    };
    let first = shop.txn(once("shop/r")).await.unwrap();
    assert!(bank.txn(once("bank/r")).await.unwrap().revision > first.revision);

    let mut viewer = Client::join(&mut core, Role::Viewer, "eve").await;
    let everything = viewer.list("", 2).await.0;
    assert!(everything.contains_key("bank/a") && everything.contains_key("shop/a"));
    denied(viewer.ops(vec![put("eve", "")]).await.unwrap_err());
    denied(viewer.grant_lease().await.unwrap_err());
    // Tokens and identities are there, and nobody sees them.
    for client in [&mut viewer, &mut admin] {
        let seen = client.list("", 1).await.0;
        assert!(
            seen.keys()
                .all(|key| !key.starts_with("cnsmo/tokens/")
                    && !key.starts_with("cnsmo/identities/"))
        );
        assert_eq!(client.list("cnsmo/identities/", 0).await.0.len(), 0);
        let mut watch = client.watch_from("", 0).await;
        while watch.next().await.0 != Kind::Synced {}
        assert_eq!(watch.map, seen);
    }
    let status = admin.status().await;
    let visible = i64::try_from(admin.list("", 0).await.0.len()).unwrap();
    assert!(status.keys > visible, "the secrets are keys of the same store");
    core.stop().await;
}

#[tokio::test]
async fn watches_of_one_identity_are_limited() {
    let (core, client) = start().await;
    let mut watches = Vec::new();
    let mut clients = Vec::new();
    let refused = 'full: loop {
        let mut client = Client::connect(&core.folder).await;
        // One connection carries 64 calls.
        for _ in 0..60 {
            match client.watch(WatchRequest::default()).await {
                Ok(watch) => watches.push(watch),
                Err(status) => break 'full status,
            }
        }
        clients.push(client);
    };
    assert_eq!((watches.len(), refused.code()), (1_000, Code::ResourceExhausted));
    assert!(refused.message().contains("1000 watches already"), "{refused}");
    let mut status = client.clone();
    assert_eq!(status.status().await.watchers, 1_000);
    let last = watches.split_off(999).remove(0);
    watches.clear();
    status.until(|status| status.watchers == 1).await;
    let ended = tokio::spawn(async move {
        let mut stream = last.stream;
        loop {
            if let Err(status) = stream.message().await.map(Option::unwrap) {
                return status;
            }
        }
    });
    core.stop().await;
    assert_eq!(ended.await.unwrap().code(), Code::Unavailable, "a core that stops says so");
}
