//! Several cores on one PostgreSQL: one leads, the others follow and take over.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use cnsmo_proto::pb::{
    admin::{GetStatusRequest, GetStatusResponse, admin_service_client::AdminServiceClient},
    catalog::{
        AnnounceRequest, Instance, Phase, WatchInstancesRequest, WatchInstancesResponse,
        catalog_service_client::CatalogServiceClient,
    },
    resource::Kind,
    state::{
        Fence, GrantLeaseRequest, GrantLeaseResponse, KeepAliveLeaseRequest,
        KeepAliveLeaseResponse, Op, Put, TxnRequest, WatchRequest, WatchResponse, event, op,
        state_service_client::StateServiceClient,
    },
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tonic::{Code, Streaming, transport::Channel};

use crate::{
    harness::{Admin, PATIENCE, policy, unix},
    postgres::server,
};

/// Short, so that the tests are.
const TAKEOVER: &str = "2s";

/// A core as a program of its own, killed when dropped.
pub(crate) struct Member {
    folder: PathBuf,
    pub(crate) process: Child,
}

impl Member {
    pub(crate) fn command(folder: &Path, store: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cnsmo-core"));
        command
            .args(["--listen", "127.0.0.1:0", "--store", store, "--takeover", TAKEOVER])
            .args(["--advertise", &format!("{}:7443", name(folder))])
            .arg("--state-dir")
            .arg(folder.join("state"))
            .arg("--socket")
            .arg(folder.join("core.sock"))
            .env_remove("CNSMO_LOG")
            .stderr(Stdio::piped());
        command
    }

    /// Returns when it says that it is ready.
    pub(crate) fn start(folder: &Path, store: &str) -> Self {
        let mut process = Self::command(folder, store).spawn().unwrap();
        let log = process.stderr.take().unwrap();
        let member = Self { folder: folder.to_owned(), process };
        let mut lines = BufReader::new(log).lines().map_while(Result::ok);
        lines.find(|line| line.contains("ready")).expect("it ended before it was ready");
        // A full pipe would stop it.
        std::thread::spawn(move || lines.for_each(drop));
        member
    }

    async fn admin(&self) -> Admin {
        Admin::connect(&self.folder.join("core.sock")).await
    }

    pub(crate) async fn channel(&self) -> Channel {
        unix(&self.folder.join("core.sock")).await.unwrap()
    }

    async fn state(&self) -> StateServiceClient<Channel> {
        StateServiceClient::new(self.channel().await)
    }

    async fn status(&self) -> GetStatusResponse {
        let mut admin = AdminServiceClient::new(self.channel().await);
        admin.get_status(GetStatusRequest {}).await.unwrap().into_inner()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id().try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn name(folder: &Path) -> String {
    folder.file_name().unwrap().to_str().unwrap().to_owned()
}

/// State folders of two cores with one CA, and a database.
struct Site {
    _root: TempDir,
    a: PathBuf,
    b: PathBuf,
    store: String,
}

impl Site {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let [a, b] = ["core-a", "core-b"].map(|name| root.path().join(name));
        let store = server().create_database().unwrap();
        for folder in [&a, &b] {
            fs::create_dir_all(folder.join("state")).unwrap();
        }
        cnsmo_core::identity::ca::Ca::open(&a.join("state")).unwrap();
        for file in ["ca.key", "ca.crt"] {
            fs::copy(a.join("state").join(file), b.join("state").join(file)).unwrap();
        }
        Self { _root: root, a, b, store }
    }
}

/// Applies a policy as soon as this core leads.
async fn apply_when_leading(member: &Member, name: &str) -> i64 {
    let mut admin = member.admin().await;
    let applied = async {
        loop {
            match admin.apply(vec![policy(name, "", 1)]).await {
                Ok(answer) => return answer.revision,
                Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, applied).await.expect("it does not lead")
}

/// Waits until this core sends callers to another one.
async fn follows(member: &Member, leader: &str) {
    let mut admin = member.admin().await;
    let follows = async {
        loop {
            let refused = admin.apply(vec![policy("refused", "", 1)]).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
            if refused.metadata().get("cnsmo-leader").is_some_and(|named| named == leader) {
                assert!(refused.message().contains(leader), "{refused:?}");
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, follows).await.expect("it does not follow");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_core_leads_and_the_other_takes_over_when_it_stops() {
    let site = Site::new();
    let mut a = Member::start(&site.a, &site.store);
    let first = apply_when_leading(&a, "one").await;
    let b = Member::start(&site.b, &site.store);
    follows(&b, "core-a:7443").await;
    let (leader, follower) = (a.status().await, b.status().await);
    for (status, leads) in [(&leader, true), (&follower, false)] {
        assert_eq!((status.leader, &*status.leader_address), (leads, "core-a:7443"));
        assert_eq!(status.engine, "postgresql");
    }
    assert!(!leader.core.is_empty() && leader.core != follower.core, "{leader:?} {follower:?}");

    a.signal(Signal::SIGTERM);
    assert!(a.process.wait().unwrap().success());
    let second = apply_when_leading(&b, "two").await;
    assert!(second > first);
    assert_eq!(b.admin().await.names(Kind::FirewallPolicy).await, ["one", "two"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_killed_is_replaced_and_follows_when_it_is_back() {
    let site = Site::new();
    let mut a = Member::start(&site.a, &site.store);
    apply_when_leading(&a, "one").await;
    let b = Member::start(&site.b, &site.store);
    a.process.kill().unwrap();
    apply_when_leading(&b, "two").await;
    a.process.wait().unwrap();
    let a = Member::start(&site.a, &site.store);
    follows(&a, "core-b:7443").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_frozen_writes_nothing_when_it_wakes_up() {
    let site = Site::new();
    let a = Member::start(&site.a, &site.store);
    apply_when_leading(&a, "one").await;
    let b = Member::start(&site.b, &site.store);
    follows(&b, "core-a:7443").await;
    let mut late = a.admin().await;
    late.apply(vec![policy("two", "", 1)]).await.unwrap();

    a.signal(Signal::SIGSTOP);
    // They wait in its socket, and it still believes that it leads when it reads them.
    let mut writes = tokio::task::JoinSet::new();
    for n in 0..8 {
        let mut late = late.clone();
        writes.spawn(async move { late.apply(vec![policy(&format!("late-{n}"), "", 1)]).await });
    }
    apply_when_leading(&b, "three").await;
    a.signal(Signal::SIGCONT);
    while let Some(write) = writes.join_next().await {
        let refused = write.unwrap().unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    }
    follows(&a, "core-b:7443").await;
    apply_when_leading(&b, "four").await;
    let names = b.admin().await.names(Kind::FirewallPolicy).await;
    assert_eq!(names, ["four", "one", "three", "two"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_core_with_another_ca_is_refused() {
    let site = Site::new();
    let a = Member::start(&site.a, &site.store);
    apply_when_leading(&a, "one").await;
    for file in ["ca.key", "ca.crt"] {
        fs::remove_file(site.b.join("state").join(file)).unwrap();
    }
    let refused = Member::command(&site.b, &site.store).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let log = String::from_utf8(refused.stderr).unwrap();
    assert!(log.contains("cores with another CA: copy ca.key and ca.crt"), "{log}");
}

/// A lease, and a key that ends with it.
async fn lease_with_key(
    state: &mut StateServiceClient<Channel>,
    ttl: Duration,
    key: &str,
) -> GrantLeaseResponse {
    let ttl = Some(prost_types::Duration::try_from(ttl).unwrap());
    let lease = state.grant_lease(GrantLeaseRequest { ttl }).await.unwrap().into_inner();
    state.txn(put(key, lease.lease_id, None)).await.unwrap();
    lease
}

fn put(key: &str, lease_id: i64, fence: Option<Fence>) -> TxnRequest {
    let put = Put { key: key.into(), lease_id, ..Put::default() };
    let success = vec![Op { op: Some(op::Op::Put(put)) }];
    TxnRequest { success, fence, ..TxnRequest::default() }
}

async fn renewed(state: &mut StateServiceClient<Channel>, lease_id: i64) -> KeepAliveLeaseResponse {
    let renewal = futures::stream::iter([KeepAliveLeaseRequest { lease_id }]);
    let mut answers = state.keep_alive_lease(renewal).await.unwrap().into_inner();
    answers.message().await.unwrap().unwrap()
}

/// The next key that goes because its lease has ended.
pub(crate) async fn expired(watch: &mut Streaming<WatchResponse>) -> String {
    let expired = async {
        loop {
            let message = watch.message().await.unwrap().expect("the watch ended");
            let gone =
                message.events.into_iter().find(|event| event.r#type() == event::Type::Expire);
            if let Some(event) = gone {
                return event.kv.unwrap().key;
            }
        }
    };
    tokio::time::timeout(PATIENCE, expired).await.expect("nothing expires")
}

async fn next_phase(watch: &mut Streaming<WatchInstancesResponse>) -> Phase {
    let next = async {
        loop {
            let message = watch.message().await.unwrap().expect("the watch ended");
            if let Some(instance) = message.instance {
                return instance.phase();
            }
        }
    };
    tokio::time::timeout(PATIENCE, next).await.expect("nobody judges the instance")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_core_counted_goes_on_with_its_clients_or_ends() {
    let site = Site::new();
    let a = Member::start(&site.a, &site.store);
    apply_when_leading(&a, "one").await;
    let mut b = Member::start(&site.b, &site.store);
    let mut at_b = b.state().await;
    let ttl = Duration::from_secs(3);
    lease_with_key(&mut at_b, ttl, "held/left").await;
    let moves = lease_with_key(&mut at_b, ttl, "held/moves").await.lease_id;
    let instance = Instance {
        service: "db".into(),
        name: "one".into(),
        phase: Phase::Ready.into(),
        ..Instance::default()
    };
    let announcement = AnnounceRequest {
        instance: Some(instance),
        ttl: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        grace: Some(prost_types::Duration { seconds: 0, nanos: 1 }),
    };
    CatalogServiceClient::new(b.channel().await).announce(announcement).await.unwrap();
    b.process.kill().unwrap();
    b.process.wait().unwrap();

    let mut at_a = a.state().await;
    let watch = WatchRequest { prefix: "held/".into(), ..WatchRequest::default() };
    let mut keys = at_a.watch(watch).await.unwrap().into_inner();
    let mut catalogue = CatalogServiceClient::new(a.channel().await);
    let all = WatchInstancesRequest { service: "db".into(), ..WatchInstancesRequest::default() };
    let mut instances = catalogue.watch_instances(all).await.unwrap().into_inner();

    // One client comes to the core that is left, the other one died with its own.
    let renewing = tokio::spawn(async move {
        loop {
            assert!(!renewed(&mut at_a, moves).await.gone, "the lease of a client that lives");
            tokio::time::sleep(ttl / 4).await;
        }
    });
    assert_eq!(expired(&mut keys).await, "held/left");
    for phase in [Phase::Ready, Phase::Unreachable, Phase::Lost] {
        assert_eq!(next_phase(&mut instances).await, phase);
    }
    assert!(!renewing.is_finished());
    renewing.abort();
    assert_eq!(expired(&mut keys).await, "held/moves");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_of_a_frozen_core_ends_elsewhere_and_its_late_writes_are_refused() {
    let site = Site::new();
    let a = Member::start(&site.a, &site.store);
    apply_when_leading(&a, "one").await;
    let b = Member::start(&site.b, &site.store);
    let mut at_b = b.state().await;
    let lease = lease_with_key(&mut at_b, Duration::from_secs(2), "held").await;
    let fence = Some(Fence { lease_id: lease.lease_id, fencing_token: lease.fencing_token });
    at_b.txn(put("early", 0, fence)).await.unwrap();
    let mut at_a = a.state().await;
    let all = WatchRequest { prefix: "held".into(), ..WatchRequest::default() };
    let mut keys = at_a.watch(all).await.unwrap().into_inner();

    b.signal(Signal::SIGSTOP);
    // They wait in its socket, and its memory says that the lease lives when it reads them.
    let late_write = tokio::spawn({
        let mut at_b = at_b.clone();
        async move { at_b.txn(put("late", 0, fence)).await }
    });
    let late_renewal = tokio::spawn(async move { renewed(&mut at_b, lease.lease_id).await });
    assert_eq!(expired(&mut keys).await, "held");
    b.signal(Signal::SIGCONT);
    let refused = late_write.await.unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(late_renewal.await.unwrap().gone);
}
