//! The part of the core in this process that keeps keys, and the commands that need it.

use std::{collections::BTreeMap, os::unix::fs::PermissionsExt as _};

use cnsmo_proto::pb::{
    admin::{
        BackupRequest, BackupResponse, CompactRequest, CompactResponse, GetStatusRequest,
        GetStatusResponse, admin_service_server::AdminService,
    },
    state::{
        Event, GetRequest, GetResponse, GrantLeaseRequest, GrantLeaseResponse,
        KeepAliveLeaseRequest, KeepAliveLeaseResponse, KeyValue, ListRequest, ListResponse,
        RevokeLeaseRequest, RevokeLeaseResponse, TxnRequest, TxnResponse, WatchRequest,
        WatchResponse, compare::Target, event::Type, op, state_service_server::StateService,
        watch_response::Kind,
    },
};
use serde_json::json;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    fake::{Core, Fake, cnsmo},
    json_of,
};

/// Keys, and what was asked.
#[derive(Default)]
pub(crate) struct Keys {
    kvs: BTreeMap<String, KeyValue>,
    revision: i64,
    watched: Option<WatchRequest>,
    /// What a watch sends before it ends.
    watch: Vec<WatchResponse>,
    /// Pieces of a backup; an error ends it.
    backup: Vec<Result<BackupResponse, Status>>,
    status: GetStatusResponse,
}

/// Two keys: the CLI must ask for further pages.
const PAGE_KEYS: usize = 2;

#[tonic::async_trait]
impl StateService for Core {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let state = self.state();
        let kv = state.keys.kvs.get(&request.into_inner().key).cloned();
        Ok(Response::new(GetResponse { kv, revision: state.keys.revision }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let request = request.into_inner();
        let state = self.state();
        let mut kvs: Vec<_> = state.keys.kvs.values().cloned().collect();
        kvs.retain(|kv| kv.key.starts_with(&request.prefix) && kv.key > request.page_token);
        let more = kvs.len() > PAGE_KEYS;
        kvs.truncate(PAGE_KEYS);
        let last = kvs.last().filter(|_| more).map(|kv| kv.key.clone()).unwrap_or_default();
        let revision = state.keys.revision;
        Ok(Response::new(ListResponse { kvs, next_page_token: last, revision }))
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let request = request.into_inner();
        let keys = &mut self.state().keys;
        let found = |keys: &Keys, key: &str| keys.kvs.get(key).map_or(0, |kv| kv.mod_revision);
        let succeeded = request.compare.iter().all(|compare| {
            let Some(Target::ModRevision(revision)) = compare.target else { panic!() };
            found(keys, &compare.key) == revision
        });
        let mut answer = TxnResponse { succeeded, ..TxnResponse::default() };
        for op in if succeeded { request.success } else { request.failure } {
            let revision = keys.revision + 1;
            match op.op.unwrap() {
                op::Op::Get(key) => {
                    let absent = KeyValue { key: key.clone(), ..KeyValue::default() };
                    answer.kvs.push(keys.kvs.get(&key).cloned().unwrap_or(absent));
                    continue;
                }
                op::Op::Put(put) => {
                    let version = keys.kvs.get(&put.key).map_or(0, |kv| kv.version) + 1;
                    let kv = KeyValue {
                        key: put.key.clone(),
                        value: put.value,
                        content_type: put.content_type,
                        create_revision: revision,
                        mod_revision: revision,
                        version,
                        lease_id: put.lease_id,
                    };
                    keys.kvs.insert(put.key, kv);
                }
                op::Op::Delete(key) => _ = keys.kvs.remove(&key),
                op::Op::DeletePrefix(prefix) => keys.kvs.retain(|key, _| !key.starts_with(&prefix)),
            }
            keys.revision = revision;
        }
        answer.revision = keys.revision;
        Ok(Response::new(answer))
    }

    type WatchStream = tokio_stream::Iter<std::vec::IntoIter<Result<WatchResponse, Status>>>;

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut state = self.state();
        state.keys.watched = Some(request.into_inner());
        let messages: Vec<_> = state.keys.watch.iter().cloned().map(Ok).collect();
        Ok(Response::new(tokio_stream::iter(messages)))
    }

    async fn grant_lease(
        &self,
        _: Request<GrantLeaseRequest>,
    ) -> Result<Response<GrantLeaseResponse>, Status> {
        panic!("no command does that")
    }

    type KeepAliveLeaseStream = tokio_stream::Empty<Result<KeepAliveLeaseResponse, Status>>;

    async fn keep_alive_lease(
        &self,
        _: Request<Streaming<KeepAliveLeaseRequest>>,
    ) -> Result<Response<Self::KeepAliveLeaseStream>, Status> {
        panic!("no command does that")
    }

    async fn revoke_lease(
        &self,
        _: Request<RevokeLeaseRequest>,
    ) -> Result<Response<RevokeLeaseResponse>, Status> {
        panic!("no command does that")
    }
}

#[tonic::async_trait]
impl AdminService for Core {
    type BackupStream = tokio_stream::Iter<std::vec::IntoIter<Result<BackupResponse, Status>>>;

    async fn backup(
        &self,
        _: Request<BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        Ok(Response::new(tokio_stream::iter(self.state().keys.backup.clone())))
    }

    async fn get_status(
        &self,
        _: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusResponse>, Status> {
        Ok(Response::new(self.state().keys.status.clone()))
    }

    async fn compact(
        &self,
        _: Request<CompactRequest>,
    ) -> Result<Response<CompactResponse>, Status> {
        panic!("no command does that")
    }
}

#[test]
fn keys_are_put_read_listed_and_deleted() {
    let core = Fake::start();
    assert_eq!(
        core.ok(&["kv", "put", "a/1", "one", "--content-type", "text/plain"]),
        "revision 1\n"
    );
    let file = core.write("value", "two\n");
    assert_eq!(core.ok(&["kv", "put", "a/2", "-f", &file]), "revision 2\n");
    assert_eq!(core.ok(&["kv", "put", "a/3", "three", "--lease", "7"]), "revision 3\n");
    assert_eq!(core.ok(&["kv", "get", "a/2"]), "two\n", "as it is");
    assert_eq!(
        json_of(&core.ok(&["-o", "json", "kv", "get", "a/1"])),
        json!({
            "key": "a/1", "value": "one", "contentType": "text/plain",
            "createRevision": 1, "modRevision": 1, "version": 1,
        })
    );
    assert_eq!(
        core.ok(&["kv", "list", "a/"]),
        "KEY  REVISION  VERSION  LEASE  BYTES  VALUE\n\
         a/1  1         1        -      3      one\n\
         a/2  2         1        -      4      two\\n\n\
         a/3  3         1        7      5      three\n"
    );
    assert_eq!(core.ok(&["kv", "list", "--keys-only"]), "a/1\na/2\na/3\n");
    assert_eq!(core.ok(&["-o", "json", "kv", "delete", "a/1"]), "{\n  \"revision\": 4\n}\n");
    assert_eq!(core.ok(&["kv", "delete", "a/", "--prefix"]), "revision 5\n");
    let ran = core.run(&["kv", "get", "a/2"]);
    assert_eq!((ran.code, ran.err.as_str()), (1, "error: a/2: does not exist\n"));
}

#[test]
fn a_value_comes_from_standard_input_and_may_be_anything() {
    use std::{io::Write as _, process::Stdio};
    let core = Fake::start();
    let mut child = cnsmo()
        .env("CNSMO_SOCKET", core.socket())
        .args(["kv", "put", "bin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"\0\xff\n").unwrap();
    assert!(child.wait_with_output().unwrap().status.success());
    let output =
        cnsmo().env("CNSMO_SOCKET", core.socket()).args(["kv", "get", "bin"]).output().unwrap();
    assert_eq!(output.stdout, b"\0\xff\n");
    let document = json_of(&core.ok(&["-o", "json", "kv", "get", "bin"]));
    assert_eq!((&document["valueBase64"], &document["value"]), (&json!("AP8K"), &json!(null)));
    let large = core.write("large", &"x".repeat((1 << 20) + 1));
    let ran = core.run(&["kv", "put", "large", "-f", &large]);
    assert_eq!(ran.code, 1);
    assert!(ran.err.contains("a value takes at most 1048576 bytes"), "{}", ran.err);
}

#[test]
fn a_condition_that_fails_says_what_was_found() {
    let core = Fake::start();
    core.ok(&["kv", "put", "a", "1", "--if-absent"]);
    core.ok(&["kv", "put", "a", "2", "--if-revision", "1"]);
    for (arguments, error) in [
        (&["kv", "put", "a", "3", "--if-absent"][..], "a: exists already"),
        (&["kv", "put", "a", "3", "--if-revision", "1"], "a: has revision 2"),
        (&["kv", "delete", "a", "--if-revision", "1"], "a: has revision 2"),
        (&["kv", "delete", "b", "--if-revision", "1"], "b: does not exist"),
    ] {
        let ran = core.run(arguments);
        let expected = format!("error: {error}; nothing was changed\n");
        assert_eq!((ran.code, ran.err), (1, expected), "{arguments:?}");
    }
    assert_eq!(core.ok(&["kv", "get", "a"]), "2");
}

#[test]
fn a_watch_prints_each_change() {
    let core = Fake::start();
    let event = |kind: Type, key: &str, value: &'static str, mod_revision| Event {
        r#type: kind.into(),
        kv: Some(KeyValue {
            key: key.into(),
            value: value.as_bytes().into(),
            mod_revision,
            ..KeyValue::default()
        }),
        prev_kv: None,
    };
    let message = |kind: Kind, revision, events| WatchResponse {
        kind: kind.into(),
        revision,
        events,
        epoch: 1,
    };
    core.state().keys.watch = vec![
        message(Kind::Snapshot, 0, vec![event(Type::Put, "a", "1", 3)]),
        message(Kind::Synced, 4, Vec::new()),
        message(Kind::Bookmark, 4, Vec::new()),
        message(
            Kind::Events,
            6,
            vec![event(Type::Delete, "a", "", 5), event(Type::Expire, "b", "", 6)],
        ),
        message(Kind::Compacted, 0, Vec::new()),
    ];
    let ran = core.run(&["kv", "watch", "a", "--from", "2", "--prev"]);
    assert_eq!((ran.code, ran.err.as_str()), (1, "error: the core ended the watch\n"));
    assert_eq!(
        ran.out,
        "put              3 a 1\n\
         synced           4\n\
         delete           5 a\n\
         expire           6 b\n\
         compacted        0\n"
    );
    let watched = core.state().keys.watched.clone().unwrap();
    assert_eq!((watched.prefix.as_str(), watched.start_revision, watched.prev_kv), ("a", 2, true));
    let lines = core.run(&["-o", "json", "kv", "watch"]).out;
    let events: Vec<_> = lines.lines().map(|line| json_of(line)["event"].clone()).collect();
    assert_eq!(events, ["put", "synced", "delete", "expire", "compacted"]);
}

#[test]
fn a_backup_is_whole_and_private_or_not_there() {
    let core = Fake::start();
    let piece = |revision, data: &'static str| {
        Ok(BackupResponse { revision, data: data.as_bytes().into() })
    };
    let path = core.folder.path().join("state.backup");
    let file = path.to_str().unwrap();
    core.state().keys.backup = vec![piece(9, "SQLite "), Err(Status::unavailable("gone"))];
    let files = || std::fs::read_dir(core.folder.path()).unwrap().count();
    let before = files();
    let ran = core.run(&["backup", file]);
    assert_eq!(ran.code, 1, "{}", ran.err);
    assert_eq!(files(), before);
    core.state().keys.backup = vec![piece(9, "SQLite "), piece(0, "format 3")];
    assert_eq!(core.ok(&["backup", file]), format!("{file}: revision 9, 15 B\n"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "SQLite format 3");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(
        json_of(&core.ok(&["-o", "json", "backup", file])),
        json!({"file": file, "revision": 9, "bytes": 15})
    );
}

#[test]
fn the_status_shows_an_alarm_of_the_brake() {
    let core = Fake::start();
    core.state().keys.status = GetStatusResponse {
        core: "a".into(),
        version: "1.2.3".into(),
        engine: "sqlite".into(),
        revision: 12,
        compact_revision: 4,
        leases: 100,
        leases_held_back: 80,
        leader: true,
        ..GetStatusResponse::default()
    };
    let text = core.ok(&["status"]);
    assert!(text.contains("\nrevision     12, history from 5\n"), "{text}");
    assert!(text.contains("leases       100, 80 of them over and held back"), "{text}");
    let document = json_of(&core.ok(&["-o", "json", "status"]));
    assert_eq!((&document["leasesHeldBack"], &document["keys"]), (&json!(80), &json!(0)));
}
