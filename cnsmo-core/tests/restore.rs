//! A backup of either engine, put back into either.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use cnsmo_proto::pb::{
    admin::{BackupRequest, GetStatusRequest, admin_service_client::AdminServiceClient},
    state::{
        GetRequest, GrantLeaseRequest, Op, Put, TxnRequest, WatchRequest, op,
        state_service_client::StateServiceClient,
    },
};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tonic::transport::Channel;

use crate::{
    cluster::{Member, expired},
    harness::unix,
    postgres::server,
    program::Program,
};

fn restore(folder: &Path, store: Option<&str>, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cnsmo-core"));
    command.arg("--state-dir").arg(folder.join("state")).args(["restore", "--from"]);
    command.arg(folder.join("backup")).args(more).env_remove("CNSMO_LOG");
    command.args(store.iter().flat_map(|url| ["--store", url]));
    command.output().unwrap()
}

fn refused(output: &Output, why: &str) {
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && log.contains(why), "{log}");
}

async fn put(channel: &Channel, key: &str, lease_id: i64) -> i64 {
    let put = Put { key: key.into(), value: "1".into(), lease_id, ..Put::default() };
    let success = vec![Op { op: Some(op::Op::Put(put)) }];
    let txn = TxnRequest { success, ..TxnRequest::default() };
    let answer = StateServiceClient::new(channel.clone()).txn(txn).await;
    answer.unwrap().into_inner().revision
}

async fn has(channel: &Channel, key: &str) -> bool {
    let get = GetRequest { key: key.into(), min_revision: 0 };
    let answer = StateServiceClient::new(channel.clone()).get(get).await;
    answer.unwrap().into_inner().kv.is_some()
}

async fn epoch(channel: &Channel) -> u64 {
    let status = AdminServiceClient::new(channel.clone()).get_status(GetStatusRequest {}).await;
    status.unwrap().into_inner().epoch
}

async fn back_up(channel: &Channel, to: &Path) {
    let mut admin = AdminServiceClient::new(channel.clone());
    let mut pieces = admin.backup(BackupRequest {}).await.unwrap().into_inner();
    let mut file = Vec::new();
    while let Some(piece) = pieces.message().await.unwrap() {
        file.extend(piece.data);
    }
    fs::write(to, file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_goes_from_one_engine_into_the_other_and_back() {
    let root = TempDir::new().unwrap();
    let [lone, member, back] = ["lone", "member", "back"].map(|name| root.path().join(name));
    for folder in [&lone, &member, &back] {
        fs::create_dir_all(folder).unwrap();
    }
    let url = server().create_database().unwrap();
    let core = Program::start(&lone);
    let at_lone = unix(&lone.join("core.sock")).await.unwrap();
    let ttl = Some(prost_types::Duration { seconds: 3_000, nanos: 0 });
    let mut leases = StateServiceClient::new(at_lone.clone());
    let long = leases.grant_lease(GrantLeaseRequest { ttl }).await.unwrap().into_inner();
    let ttl = Some(prost_types::Duration { seconds: 3, nanos: 0 });
    let short = leases.grant_lease(GrantLeaseRequest { ttl }).await.unwrap().into_inner();
    put(&at_lone, "kept", long.lease_id).await;
    put(&at_lone, "leased", short.lease_id).await;
    back_up(&at_lone, &member.join("backup")).await;
    let first_epoch = epoch(&at_lone).await;
    drop(core);

    let restored = restore(&member, Some(&url), &[]);
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    refused(&restore(&member, Some(&url), &[]), "holds a state already");
    let mut core = Member::start(&member, &url);
    refused(&restore(&back, Some(&url), &["--force"]), "cannot open the state");
    fs::copy(member.join("backup"), back.join("backup")).unwrap();
    refused(&restore(&back, Some(&url), &["--force"]), "cores run on database");
    let at_member = core.channel().await;
    assert!(has(&at_member, "kept").await);
    let second_epoch = epoch(&at_member).await;
    assert!(second_epoch > first_epoch);
    // No core of that name counts it: the leader takes it over.
    let watch = WatchRequest { prefix: "leased".into(), ..WatchRequest::default() };
    let stream = StateServiceClient::new(at_member.clone()).watch(watch).await;
    assert_eq!(expired(&mut stream.unwrap().into_inner()).await, "leased");
    put(&at_member, "later", 0).await;
    back_up(&at_member, &back.join("backup")).await;
    core.signal(Signal::SIGTERM);
    assert!(core.process.wait().unwrap().success());

    let restored = restore(&back, None, &[]);
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    let _core = Program::start(&back);
    let at_back = unix(&back.join("core.sock")).await.unwrap();
    for (key, there) in [("kept", true), ("later", true), ("leased", false)] {
        assert_eq!(has(&at_back, key).await, there, "{key}");
    }
    assert!(epoch(&at_back).await > second_epoch);
}
