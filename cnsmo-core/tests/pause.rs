//! Cores and agents that stand still for a while.

use std::{collections::BTreeMap, fs, net::SocketAddr, path::Path, time::Duration};

use cnsmo_proto::pb::{
    agent::update::Kind as UpdateKind,
    identity::{EnrollRequest, enrollment_service_client::EnrollmentServiceClient},
    node::node_status::Phase,
    resource::{Kind, WatchRequest, resource, watch_response},
};
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};
use rcgen::{CertificateParams, KeyPair};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::{
    harness::{Admin, Agent, PATIENCE, TestCore, policy},
    program::Program,
};

const AGENTS: usize = 1_000;
const HEARTBEAT: Duration = Duration::from_secs(2);
const LEASE: Duration = Duration::from_secs(10);
/// Files that this process has open at a time: a connection of each agent, and some room.
const FILES: u64 = 4_096;

#[tokio::test(flavor = "multi_thread")]
async fn no_agent_is_taken_for_dead_because_its_core_stood_still() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(FILES), hard.max(FILES)).unwrap();
    let folder = TempDir::new().unwrap();
    let mut command = Program::command(folder.path());
    command.args(["--heartbeat", "2s", "--lease", "10s"]);
    let program = Program::start_with(&mut command);
    let mut admin = Admin::connect(&folder.path().join("core.sock")).await;
    let mut agents = beating_agents(folder.path(), program.address(), &mut admin).await;

    let request = WatchRequest { kind: Kind::Node.into(), name: String::new() };
    let mut changes = admin.resources.watch(request).await.unwrap().into_inner();
    let mut alive = 0;
    loop {
        let message = changes.message().await.unwrap().unwrap();
        if message.event() == watch_response::Event::Synced {
            break;
        }
        let Some(resource::Resource::Node(node)) = message.resource.unwrap().resource else {
            panic!("not a node")
        };
        assert_ne!(node.status.unwrap().phase(), Phase::Unreachable, "before the pause");
        alive += 1;
    }
    assert_eq!(alive, AGENTS);

    program.signal(Signal::SIGSTOP);
    tokio::time::sleep(3 * LEASE).await;
    program.signal(Signal::SIGCONT);
    let watched = tokio::time::timeout(2 * LEASE, async {
        loop {
            let message = changes.message().await.unwrap().unwrap();
            let Some(resource::Resource::Node(node)) = message.resource.unwrap().resource else {
                panic!("not a node")
            };
            assert_ne!(node.status.unwrap().phase(), Phase::Unreachable, "after the pause");
        }
    });
    assert!(watched.await.is_err(), "the core ended the watch");

    // The same watch shows one that is dead indeed.
    agents.abort_all();
    let dead = async {
        loop {
            let message = changes.message().await.unwrap().unwrap();
            if let Some(resource::Resource::Node(node)) = message.resource.unwrap().resource
                && node.status.unwrap().phase() == Phase::Unreachable
            {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, dead).await.expect("no dead agent was noticed");
}

/// Each with its own key, certificate and connection.
async fn beating_agents(folder: &Path, core: SocketAddr, admin: &mut Admin) -> JoinSet<()> {
    let ca = fs::read_to_string(folder.join("state/ca.crt")).unwrap();
    let token = admin.token(AGENTS.try_into().unwrap(), "").await;
    let enrolment = EnrollmentServiceClient::new(connect(core, &ca, None).await);
    let mut agents = JoinSet::new();
    for number in 0..AGENTS {
        let key = KeyPair::generate().unwrap();
        let csr = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        let (token, name) = (token.clone(), format!("vm-{number}"));
        let request = EnrollRequest { token, csr, name, labels: BTreeMap::new() };
        let answer = enrolment.clone().enroll(request).await.unwrap().into_inner();
        let identity = Identity::from_pem(answer.certificate_chain, key.serialize_pem());
        let channel = connect(core, &ca, Some(identity)).await;
        let mut agent = Agent::connect(channel, None, None).await.unwrap();
        let update = agent.update().await;
        agent.ack(&update).await;
        agents.spawn(async move {
            let mut beats = tokio::time::interval(HEARTBEAT);
            loop {
                beats.tick().await;
                agent.heartbeat().await;
            }
        });
    }
    agents
}

async fn connect(core: SocketAddr, ca: &str, identity: Option<Identity>) -> Channel {
    let tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)).domain_name("core.cnsmo");
    let tls = identity.into_iter().fold(tls, ClientTlsConfig::identity);
    let endpoint = Endpoint::from_shared(format!("https://{core}")).unwrap();
    endpoint.tls_config(tls).unwrap().connect().await.unwrap()
}

#[tokio::test]
async fn an_agent_that_stands_still_holds_up_nobody_and_catches_up_in_one_step() {
    let mut core = TestCore::start().await;
    let [stuck, busy] = [core.join("stuck", "").await, core.join("busy", "").await];
    let mut stuck = core.agent(&stuck, None).await.unwrap();
    let mut busy = core.agent(&busy, None).await.unwrap();
    for agent in [&mut stuck, &mut busy] {
        let update = agent.update().await;
        agent.ack(&update).await;
    }
    for port in 1..=100 {
        core.admin.apply(vec![policy("p", "", port)]).await.unwrap();
        let update = busy.update().await;
        assert_eq!(update.kind(), UpdateKind::Delta);
        busy.ack(&update).await;
    }
    let first = stuck.update().await;
    stuck.ack(&first).await;
    let last = stuck.update().await;
    assert_eq!((last.kind(), last.digest.clone()), (UpdateKind::Delta, busy.state().digest));
    assert_eq!(last.nonce, first.nonce + 1);
    stuck.ack(&last).await;
    core.stop().await;
}
