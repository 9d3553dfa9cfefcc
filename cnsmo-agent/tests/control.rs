//! The whole control side against a scripted core: real TLS on loopback, real files, a data path that only remembers.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clap::Parser as _;
use cnsmo_agent::{
    config::{Cli, Config},
    datapath::{ApplyError, Attachment, Datapath, Status as DatapathStatus},
    desired::RESOURCE_TYPE,
    effective::{Balancer, Effective},
    enforcer::{OpenDatapath, OpenTunnel},
    explain::{Answer, Question},
    live::{Impact, LiveFlows},
    runtime,
    tunnel::{Backend, Device, Tunnel, TunnelConfig, TunnelError, TunnelStatus},
};
use cnsmo_proto::{
    digest::Digest,
    model::PublicKey,
    pb::{
        agent::{
            self as pb_agent, Ack, CommandResult, ConnectRequest, ConnectResponse, Heartbeat,
            Hello, Resource, StatusReport, TypeState, Update, Welcome,
            agent_service_server::{AgentService, AgentServiceServer},
            command::Command,
            command_result::Result as Outcome,
            connect_request::Message as Up,
            connect_response::Message as Down,
            resource::Spec,
            update::Kind,
        },
        balancer as balancer_pb,
        catalog::Phase,
        identity::{
            EnrollRequest, EnrollResponse,
            enrollment_service_server::{EnrollmentService, EnrollmentServiceServer},
        },
        network as network_pb,
        policy::{self as policy, FirewallPolicySpec},
        service::{
            KillRequest, ListServicesRequest, ServiceId, ServiceStatus, StartRequest, StopRequest,
            host_service_client::HostServiceClient,
        },
    },
};
use cnsmo_service::{
    supervise::{Stopper, stop_pair},
    token::Token,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa,
    KeyPair, PublicKeyData as _, SanType,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{
    Code, Request, Response, Status, Streaming,
    transport::{Certificate, Channel, Endpoint, Identity, Server, ServerTlsConfig},
};

/// Ends a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Remembers what it was to enforce; outlives the agent as the kernel does. `1`: crash; `2`: the tunnel.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Vec<Effective>>>, Arc<AtomicBool>, Arc<Mutex<Option<TunnelConfig>>>);

impl Fake {
    fn open(&self) -> OpenDatapath {
        let this = self.clone();
        Arc::new(move || Ok(Box::new(this.clone())))
    }

    fn tunnel(&self) -> OpenTunnel {
        let this = self.clone();
        Arc::new(move || Ok(Box::new(this.clone())))
    }

    /// Names of the VMs that the first balancer sends new flows to.
    fn backends(&self) -> Vec<String> {
        let applied = self.0.lock().unwrap();
        let balancer = applied.last().unwrap().balancers.first();
        balancer.iter().flat_map(|b| &b.backends).map(|target| target.node.to_string()).collect()
    }

    /// Names of the rules' policies in force, `-` for built-in ones.
    fn in_force(&self) -> Vec<String> {
        let applied = self.0.lock().unwrap();
        let last = applied.last().unwrap();
        let name = |rule: &cnsmo_agent::effective::OwnedRule| {
            rule.policy.as_ref().unwrap_or(&rule.rule.name).to_string()
        };
        last.rules.iter().map(name).collect()
    }

    fn is_open(&self) -> bool {
        self.0.lock().unwrap().last().unwrap().open
    }
}

impl Datapath for Fake {
    fn apply(&mut self, policy: &Effective) -> Result<(), ApplyError> {
        assert!(!self.1.swap(false, Ordering::SeqCst), "crashed as asked");
        self.0.lock().unwrap().push(policy.clone());
        Ok(())
    }

    fn steer(&mut self, balancers: &[Balancer]) -> Result<(), ApplyError> {
        let mut applied = self.0.lock().unwrap();
        let mut now = applied.last().unwrap().clone();
        now.balancers = balancers.to_vec();
        applied.push(now);
        Ok(())
    }

    fn status(&mut self) -> DatapathStatus {
        let attachment =
            Attachment { interface: "lo".into(), ingress: "xdp-generic", egress: "tcx" };
        DatapathStatus { interfaces: vec![attachment], flows: 3, ..DatapathStatus::default() }
    }

    fn sweep(&mut self) {}

    fn explain(
        &mut self,
        question: &Question,
    ) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
        let dropped = (question.dst.port() != 80).then_some("denied");
        Ok(Answer { dropped, ..Answer::default() })
    }

    fn flows(&mut self, max: usize) -> Result<LiveFlows, Box<dyn std::error::Error + Send + Sync>> {
        Ok(LiveFlows { total: max as u64, ..LiveFlows::default() })
    }

    fn preview(&mut self, policy: &Effective, _: usize) -> Result<Impact, ApplyError> {
        Ok(Impact { judged: policy.rules.len() as u64, ..Impact::default() })
    }
}

const PUBLIC_KEY: PublicKey = PublicKey([9; 32]);

impl Tunnel for Fake {
    fn public_key(&self) -> PublicKey {
        PUBLIC_KEY
    }

    fn prepare(&mut self, config: &TunnelConfig) -> Result<Device, TunnelError> {
        *self.2.lock().unwrap() = Some(config.clone());
        Ok(Device { name: "cnsmo0".into(), mtu: 1420 })
    }

    fn complete(&mut self, config: Option<&TunnelConfig>) -> Result<(), TunnelError> {
        *self.2.lock().unwrap() = config.cloned();
        Ok(())
    }

    fn tend(&mut self) -> Result<(), TunnelError> {
        Ok(())
    }

    fn existing(&mut self) -> Option<Device> {
        let there = self.2.lock().unwrap().is_some();
        there.then(|| Device { name: "cnsmo0".into(), mtu: 1420 })
    }

    fn status(&mut self) -> Option<TunnelStatus> {
        self.2.lock().unwrap().as_ref().map(|config| TunnelStatus {
            network: config.network.clone(),
            backend: Backend::Kernel,
            reason: "the module is there".into(),
            device: Device { name: "cnsmo0".into(), mtu: 1420 },
            peers: config.peers.values().map(|p| (p.node.clone(), Default::default())).collect(),
        })
    }
}

/// The part of a core that outlives its process.
struct Authority {
    ca: CertifiedIssuer<'static, KeyPair>,
    key: KeyPair,
    chain: String,
}

impl Authority {
    fn new() -> Arc<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(["core.cnsmo".to_owned()]).unwrap();
        let chain = leaf.signed_by(&key, &ca).unwrap().pem() + &ca.pem();
        Arc::new(Self { ca, key, chain })
    }

    fn token(&self) -> Token {
        let spki = self.ca.key().subject_public_key_info();
        let mut pin = [0; 32];
        pin.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, &spki).as_ref());
        Token::generate(pin).unwrap()
    }
}

struct Services {
    authority: Arc<Authority>,
    streams: mpsc::Sender<Talk>,
}

#[tonic::async_trait]
impl EnrollmentService for Services {
    async fn enroll(
        &self,
        request: Request<EnrollRequest>,
    ) -> Result<Response<EnrollResponse>, Status> {
        let request = request.into_inner();
        let der = request.csr.as_slice().into();
        let mut csr = CertificateSigningRequestParams::from_der(&der).unwrap();
        let uri = format!("spiffe://cnsmo/agent/{}", request.name).try_into().unwrap();
        csr.params.subject_alt_names = vec![SanType::URI(uri)];
        let certificate_chain = csr.signed_by(&self.authority.ca).unwrap().pem();
        let trust_bundle = self.authority.ca.pem();
        Ok(Response::new(EnrollResponse { certificate_chain, trust_bundle }))
    }
}

#[tonic::async_trait]
impl AgentService for Services {
    type ConnectStream = Pin<Box<dyn Stream<Item = Result<ConnectResponse, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        if request.peer_certs().is_none_or(|certificates| certificates.is_empty()) {
            return Err(Status::unauthenticated("no certificate"));
        }
        let (down, outgoing) = mpsc::channel(8);
        let talk = Talk { up: request.into_inner(), down, nonce: 0 };
        self.streams.send(talk).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// A running core, to be scripted.
struct Core {
    address: SocketAddr,
    streams: mpsc::Receiver<Talk>,
    shutdown: oneshot::Sender<()>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Core {
    async fn start(authority: &Arc<Authority>, address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(&authority.chain, authority.key.serialize_pem()))
            .client_ca_root(Certificate::from_pem(authority.ca.pem()))
            .client_auth_optional(true);
        let (sender, streams) = mpsc::channel(4);
        let services = || Services { authority: authority.clone(), streams: sender.clone() };
        let (shutdown, asked) = oneshot::channel::<()>();
        let server = Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(EnrollmentServiceServer::new(services()))
            .add_service(AgentServiceServer::new(services()))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
                let _ = asked.await;
            });
        Self { address, streams, shutdown, server: tokio::spawn(server) }
    }

    /// The next stream, after its hello.
    async fn accept(&mut self) -> (Talk, Hello) {
        let mut talk = timeout(PATIENCE, self.streams.recv()).await.unwrap().unwrap();
        let Some(Up::Hello(hello)) = talk.next().await.message else { panic!("no hello first") };
        (talk, hello)
    }

    /// Ends with all streams; the address is free again.
    async fn stop(self, talk: Talk) -> SocketAddr {
        drop((talk, self.streams));
        let _ = self.shutdown.send(());
        timeout(PATIENCE, self.server).await.unwrap().unwrap().unwrap();
        self.address
    }
}

/// One stream of an agent.
struct Talk {
    up: Streaming<ConnectRequest>,
    down: mpsc::Sender<Result<ConnectResponse, Status>>,
    nonce: u64,
}

impl Talk {
    async fn next(&mut self) -> ConnectRequest {
        timeout(PATIENCE, self.up.message()).await.unwrap().unwrap().unwrap()
    }

    async fn send(&self, message: Down) {
        self.down.send(Ok(ConnectResponse { message: Some(message) })).await.unwrap();
    }

    async fn welcome(&self, store_epoch: u64) {
        let heartbeat_interval = Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 });
        self.send(Down::Welcome(Welcome {
            store_epoch,
            heartbeat_interval,
            protocol_version: 1,
            ..Welcome::default()
        }))
        .await;
    }

    /// Sends an update and returns the answer to it.
    async fn update(&mut self, update: Update) -> Ack {
        self.nonce += 1;
        self.send(Down::Update(Update { nonce: self.nonce, ..update })).await;
        loop {
            if let Some(Up::Ack(ack)) = self.next().await.message {
                assert_eq!(ack.nonce, self.nonce);
                return ack;
            }
        }
    }

    async fn heartbeat(&mut self) -> Heartbeat {
        loop {
            if let Some(Up::Heartbeat(beat)) = self.next().await.message {
                return beat;
            }
        }
    }

    async fn status_when(&mut self, wanted: impl Fn(&StatusReport) -> bool) -> StatusReport {
        let report = async {
            loop {
                let report = self.status().await;
                if wanted(&report) {
                    return report;
                }
            }
        };
        timeout(PATIENCE, report).await.unwrap()
    }

    async fn status(&mut self) -> StatusReport {
        loop {
            if let Some(Up::Status(report)) = self.next().await.message {
                return *report;
            }
        }
    }
}

struct Agent {
    stopper: Stopper,
    running: JoinHandle<anyhow::Result<()>>,
}

impl Agent {
    fn start(config: &Config, fake: &Fake) -> Self {
        let (stopper, stop) = stop_pair();
        let running = tokio::spawn(runtime::run(
            config.clone(),
            fake.open(),
            fake.tunnel(),
            Arc::default(),
            stop,
        ));
        Self { stopper, running }
    }

    async fn stop(self) {
        self.stopper.stop();
        timeout(PATIENCE, self.running).await.unwrap().unwrap().unwrap();
    }
}

fn config(core: SocketAddr, dir: &Path, token: Option<&Token>) -> Config {
    let core = core.to_string();
    let state = dir.join("state");
    let mut args = vec!["cnsmo-agent", "--core", &core, "--interface", "lo", "--node", "web-1"];
    args.extend(["--label", "role=web", "--state-dir", state.to_str().unwrap()]);
    // The core's port is one all the same: the core is on this VM.
    args.extend(["--failsafe-port", "none"]);
    let file = dir.join("token");
    if let Some(token) = token {
        std::fs::write(&file, format!("{token}\n")).unwrap();
        args.extend(["--token-file", file.to_str().unwrap()]);
    }
    Cli::try_parse_from(args).unwrap().into_config().unwrap()
}

fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// Names without a kind are of policies.
fn full(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("firewall-policy/{name}") }
}

fn resource(name: &str, revision: i64, action: policy::Action) -> Resource {
    let rule = policy::FirewallRule {
        name: "r".into(),
        action: action.into(),
        direction: policy::Direction::Ingress.into(),
        ..Default::default()
    };
    let spec = FirewallPolicySpec { rules: vec![rule], ..Default::default() };
    Resource { name: full(name), version: revision, spec: Some(Spec::FirewallPolicy(spec)) }
}

fn good(name: &str, revision: i64) -> Resource {
    resource(name, revision, policy::Action::Deny)
}

fn bad(name: &str, revision: i64) -> Resource {
    resource(name, revision, policy::Action::Unspecified)
}

fn state(revision: i64, set: &[(&str, i64)]) -> TypeState {
    let mut digest = Digest::default();
    set.iter().for_each(|(name, version)| digest.add(&full(name), *version));
    TypeState { revision, digest: digest.to_vec() }
}

fn update(kind: Kind, base: i64, upserts: Vec<Resource>, after: TypeState) -> Update {
    Update {
        r#type: RESOURCE_TYPE.into(),
        kind: kind.into(),
        base_revision: base,
        revision: after.revision,
        upserts,
        digest: after.digest,
        ..Update::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_moves_on_to_the_core_that_leads() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let mut first = Core::start(&authority, any_port()).await;
    let mut second = Core::start(&authority, any_port()).await;
    let mut config = config(first.address, dir.path(), Some(&authority.token()));
    config.cores.push(second.address.into());
    let agent = Agent::start(&config, &Fake::default());

    let (refused, _) = first.accept().await;
    let mut follower = Status::unavailable("another core leads");
    follower.metadata_mut().insert("cnsmo-leader", second.address.to_string().parse().unwrap());
    refused.down.send(Err(follower)).await.unwrap();
    let (mut talk, _) = second.accept().await;
    talk.welcome(1).await;
    talk.heartbeat().await;

    // The leader dies, and the other one leads now.
    second.stop(talk).await;
    let (mut talk, _) = first.accept().await;
    talk.welcome(1).await;
    talk.heartbeat().await;
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_enrols_follows_its_core_and_survives_it() {
    let (authority, dir, fake) = (Authority::new(), tempfile::tempdir().unwrap(), Fake::default());
    let mut core = Core::start(&authority, any_port()).await;
    let with_token = config(core.address, dir.path(), Some(&authority.token()));
    let agent = Agent::start(&with_token, &fake);

    let (mut talk, hello) = core.accept().await;
    assert_eq!(hello.labels["role"], "web");
    assert_eq!(hello.boot_id.len(), 36);
    assert_eq!(hello.have[RESOURCE_TYPE], state(0, &[]));
    assert_eq!(
        fake.in_force(),
        ["core", "failsafe"],
        "the way to the core is open before the first policy"
    );
    assert!(fake.is_open());
    talk.welcome(7).await;

    // Snapshot.
    let now = state(4, &[("a", 3), ("b", 4)]);
    let upserts = vec![good("a", 3), good("b", 4)];
    let ack = talk.update(update(Kind::Snapshot, 0, upserts, now.clone())).await;
    assert_eq!((ack.error.as_str(), ack.applied.as_ref()), ("", Some(&now)));
    assert!(ack.apply_duration.is_some());
    assert_eq!(fake.in_force(), ["core", "failsafe", "a", "b"]);
    assert_eq!(talk.heartbeat().await.applied[RESOURCE_TYPE], now);
    let node = talk.status().await.node.unwrap();
    assert_eq!(
        (node.interfaces[0].ingress.as_str(), node.firewall.unwrap().flows),
        ("xdp-generic", 3)
    );
    assert!(!node.kernel.is_empty());

    // Delta, with one resource that is no policy.
    let sent = state(6, &[("a", 5), ("b", 4), ("c", 6)]);
    let upserts = vec![bad("a", 5), good("c", 6)];
    let ack = talk.update(update(Kind::Delta, 4, upserts, sent)).await;
    let now = state(6, &[("a", 3), ("b", 4), ("c", 6)]);
    assert_eq!((ack.error.as_str(), ack.applied.as_ref()), ("", Some(&now)));
    assert_eq!(
        (ack.resource_errors[0].name.as_str(), ack.resource_errors[0].version),
        ("firewall-policy/a", 5)
    );
    assert!(ack.resource_errors[0].message.contains("action"));
    assert_eq!(fake.in_force(), ["core", "failsafe", "a", "b", "c"]);

    // An update for another base is refused; the stream goes on.
    let ack = talk.update(update(Kind::Delta, 5, vec![], state(7, &[]))).await;
    assert!(ack.error.contains("based on revision 5"), "{}", ack.error);
    assert_eq!(ack.applied.as_ref(), Some(&now));
    let now = state(8, &[("a", 8)]);
    let ack = talk.update(update(Kind::Snapshot, 0, vec![good("a", 8)], now.clone())).await;
    assert_eq!(ack.error, "");

    // The core goes: policies stay. It comes back: a bookmark is enough.
    let applied = fake.0.lock().unwrap().len();
    let address = core.stop(talk).await;
    assert_eq!(fake.in_force(), ["core", "failsafe", "a"]);
    let mut core = Core::start(&authority, address).await;
    let (mut talk, hello) = core.accept().await;
    assert_eq!(hello.have[RESOURCE_TYPE], now);
    talk.welcome(7).await;
    let now = state(9, &[("a", 8)]);
    let ack = talk.update(update(Kind::Bookmark, 0, vec![], now.clone())).await;
    assert_eq!((ack.error.as_str(), ack.applied.as_ref()), ("", Some(&now)));
    assert_eq!(fake.0.lock().unwrap().len(), applied, "nothing was applied anew");
    agent.stop().await;
    assert_eq!(fake.in_force(), ["core", "failsafe", "a"], "stopping takes nothing out");

    // Boot without core and without token: the ledger rules before anything else.
    core.stop(talk).await;
    let fake = Fake::default();
    let agent = Agent::start(&config(address, dir.path(), None), &fake);
    let mut core = Core::start(&authority, address).await;
    let (talk, hello) = core.accept().await;
    assert_eq!(hello.have[RESOURCE_TYPE], now);
    assert_eq!(fake.0.lock().unwrap().first().unwrap().rules.len(), 3);
    assert_eq!(fake.in_force(), ["core", "failsafe", "a"]);
    drop(talk);
    agent.stop().await;
}

/// A network and a balancer whose backends listen on loopback addresses, which all VMs of this test share.
fn network(backends: &[(&str, SocketAddr)]) -> Vec<Resource> {
    let resource = |name: String, spec| Resource { name, version: 1, spec: Some(spec) };
    let spec = network_pb::NetworkSpec {
        ipv4_prefix: "10.0.0.0/24".into(),
        ..network_pb::NetworkSpec::default()
    };
    let mut all = vec![resource("network/shop".into(), Spec::Network(spec))];
    let own = ("web-1", SocketAddr::from(([127, 0, 0, 9], 0)));
    for (last, (node, address)) in backends.iter().chain([&own]).enumerate() {
        let member = network_pb::Member {
            network: "shop".into(),
            node: (*node).into(),
            ipv4: address.ip().to_string(),
            public_key: vec![u8::try_from(last).unwrap(); 32],
            ..network_pb::Member::default()
        };
        all.push(resource(format!("member/shop/{node}"), Spec::Member(member)));
    }
    let port = backends[0].1.port().into();
    let millis = |n: i32| Some(prost_types::Duration { seconds: 0, nanos: n * 1_000_000 });
    let spec = balancer_pb::LoadBalancerSpec {
        network: "shop".into(),
        addresses: vec!["10.0.0.80".into()],
        ports: vec![balancer_pb::ServicePort { protocol: 6, port: 80, target_port: port }],
        health: Some(balancer_pb::HealthCheck { interval: millis(100), ..Default::default() }),
        ..balancer_pb::LoadBalancerSpec::default()
    };
    all.push(resource("load-balancer/front".into(), Spec::LoadBalancer(spec)));
    for (node, address) in backends {
        let backend = balancer_pb::Backend {
            load_balancer: "front".into(),
            node: (*node).into(),
            ipv4: address.ip().to_string(),
            ..balancer_pb::Backend::default()
        };
        all.push(resource(format!("backend/front/{node}"), Spec::Backend(backend)));
    }
    all
}

/// Two servers on one port of two addresses.
async fn two_servers() -> [TcpListener; 2] {
    let first = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let port = first.local_addr().unwrap().port();
    [first, TcpListener::bind(("127.0.0.3", port)).await.unwrap()]
}

#[tokio::test]
async fn an_agent_announces_itself_joins_and_follows_the_health_of_backends() {
    let (authority, dir, fake) = (Authority::new(), tempfile::tempdir().unwrap(), Fake::default());
    let mut core = Core::start(&authority, any_port()).await;
    let config = config(core.address, dir.path(), Some(&authority.token()));
    let agent = Agent::start(&config, &fake);
    let (mut talk, hello) = core.accept().await;
    let announced = hello.announcement.unwrap();
    assert_eq!(announced.tunnel_public_key, PUBLIC_KEY.0);
    assert!(!announced.addresses.iter().any(|address| address.starts_with("127.")));
    talk.welcome(7).await;

    let [one, two] = two_servers().await;
    let (one_at, two_at) = (one.local_addr().unwrap(), two.local_addr().unwrap());
    let upserts = network(&[("web-2", one_at), ("web-3", two_at)]);
    let sent: Vec<_> = upserts.iter().map(|r| (r.name.clone(), r.version)).collect();
    let sent: Vec<_> = sent.iter().map(|(name, version)| (name.as_str(), *version)).collect();
    let now = state(1, &sent);
    let ack = talk.update(update(Kind::Snapshot, 0, upserts, now.clone())).await;
    assert_eq!((&*ack.error, ack.resource_errors, ack.applied), ("", vec![], Some(now.clone())));
    let active = |report: &StatusReport| {
        let backends = report.load_balancers.first().map(|balancer| balancer.backends.clone());
        let active = backends.into_iter().flatten().filter(|backend| backend.active);
        active.map(|backend| backend.node).collect::<Vec<_>>()
    };
    let report = talk.status_when(|report| active(report) == ["web-2", "web-3"]).await;
    let overlay = report.node.unwrap().overlay.unwrap();
    assert_eq!((&*overlay.network, &*overlay.backend, overlay.peers.len()), ("shop", "kernel", 2));

    drop(two);
    let report = talk.status_when(|report| active(report) == ["web-2"]).await;
    let out = &report.load_balancers[0].backends[1];
    assert_eq!((&*out.node, &*out.reason), ("web-3", "Unhealthy"));
    assert!(out.message.contains("refused"), "{}", out.message);
    assert_eq!(fake.backends(), ["web-2"]);

    // What is known of health survives a crash of the data path.
    fake.1.store(true, Ordering::SeqCst);
    let mut more = sent.clone();
    more.push(("a", 2));
    let delta = update(Kind::Delta, 1, vec![good("a", 2)], state(2, &more));
    assert!(talk.update(delta.clone()).await.error.ends_with("crashed"));
    assert_eq!(talk.update(delta).await.error, "");
    talk.status_when(|report| active(report) == ["web-2"]).await;
    assert_eq!(fake.backends(), ["web-2"]);
    let two = TcpListener::bind(two_at).await.unwrap();
    talk.status_when(|report| active(report) == ["web-2", "web-3"]).await;

    drop(one);
    drop(two);
    talk.status_when(|report| active(report).is_empty()).await;
    assert_eq!(fake.backends(), [""; 0]);
    agent.stop().await;
    assert!(fake.2.lock().unwrap().is_some(), "stopping leaves the tunnel");
}

#[tokio::test]
async fn a_tunnel_that_comes_later_is_announced_then() {
    let (authority, dir, fake) = (Authority::new(), tempfile::tempdir().unwrap(), Fake::default());
    let mut core = Core::start(&authority, any_port()).await;
    let config = config(core.address, dir.path(), Some(&authority.token()));
    let (there, open) = (Arc::new(AtomicBool::new(false)), fake.tunnel());
    let now = there.clone();
    let tunnel: OpenTunnel = Arc::new(move || match now.load(Ordering::SeqCst) {
        true => open(),
        false => anyhow::bail!("no device"),
    });
    let (stopper, stop) = stop_pair();
    let running = tokio::spawn(runtime::run(config, fake.open(), tunnel, Arc::default(), stop));
    let agent = Agent { stopper, running };
    let (mut talk, hello) = core.accept().await;
    assert_eq!(hello.announcement, None);
    talk.welcome(7).await;
    there.store(true, Ordering::SeqCst);
    let announced = loop {
        if let Some(Up::Announcement(announced)) = talk.next().await.message {
            break announced;
        }
    };
    assert_eq!(announced.tunnel_public_key, PUBLIC_KEY.0);
    agent.stop().await;
}

#[tokio::test]
async fn a_restored_store_starts_over_with_a_snapshot() {
    let (authority, dir, fake) = (Authority::new(), tempfile::tempdir().unwrap(), Fake::default());
    let mut core = Core::start(&authority, any_port()).await;
    let config = config(core.address, dir.path(), Some(&authority.token()));
    let agent = Agent::start(&config, &fake);
    let (mut talk, _) = core.accept().await;
    talk.welcome(7).await;
    let then = state(9, &[("a", 9)]);
    talk.update(update(Kind::Snapshot, 0, vec![good("a", 9)], then.clone())).await;
    drop(talk);

    let (mut talk, _) = core.accept().await;
    talk.welcome(8).await;
    let ack = talk.update(update(Kind::Bookmark, 0, vec![], then.clone())).await;
    assert!(ack.error.contains("needs a snapshot"), "{}", ack.error);
    assert_eq!(ack.applied, Some(then));
    let now = state(2, &[("b", 2)]);
    let ack = talk.update(update(Kind::Snapshot, 0, vec![good("b", 2)], now.clone())).await;
    assert_eq!((ack.error.as_str(), ack.applied), ("", Some(now)));
    assert_eq!(fake.in_force(), ["core", "failsafe", "b"]);
    agent.stop().await;
}

#[tokio::test]
async fn a_data_path_that_crashes_is_opened_anew_and_the_stream_goes_on() {
    let (authority, dir, fake) = (Authority::new(), tempfile::tempdir().unwrap(), Fake::default());
    let mut core = Core::start(&authority, any_port()).await;
    let config = config(core.address, dir.path(), Some(&authority.token()));
    let agent = Agent::start(&config, &fake);
    let (mut talk, _) = core.accept().await;
    talk.welcome(7).await;
    talk.update(update(Kind::Snapshot, 0, vec![good("a", 1)], state(1, &[("a", 1)]))).await;
    fake.1.store(true, Ordering::SeqCst);
    let now = state(2, &[("a", 1), ("b", 2)]);
    let delta = update(Kind::Delta, 1, vec![good("b", 2)], now.clone());
    let ack = talk.update(delta.clone()).await;
    assert!(ack.error.ends_with("the data path crashed"), "{}", ack.error);
    let ack = talk.update(delta).await;
    assert_eq!((ack.error.as_str(), ack.applied), ("", Some(now)));
    assert_eq!(fake.in_force(), ["core", "failsafe", "a", "b"]);
    agent.stop().await;
}

#[tokio::test]
async fn a_second_agent_of_one_state_directory_is_refused() {
    let (authority, dir, fake) = (Authority::new(), tempfile::tempdir().unwrap(), Fake::default());
    let mut core = Core::start(&authority, any_port()).await;
    let config = config(core.address, dir.path(), Some(&authority.token()));
    let agent = Agent::start(&config, &fake);
    let _talk = core.accept().await;
    let second = runtime::run(config, fake.open(), fake.tunnel(), Arc::default(), stop_pair().1)
        .await
        .unwrap_err();
    assert!(second.to_string().starts_with("--state-dir: another agent"), "{second}");
    assert!(second.to_string().ends_with(&format!("process {}", std::process::id())), "{second}");
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_can_never_join_ends_with_the_flag_to_change() {
    let (authority, dir, fake) = (Authority::new(), tempfile::tempdir().unwrap(), Fake::default());
    let core = Core::start(&authority, any_port()).await;
    let run = |config: Config| {
        let (stopper, stop) = stop_pair();
        let (open, tunnel, patience) = (fake.open(), fake.tunnel(), PATIENCE);
        async move {
            let result =
                timeout(patience, runtime::run(config, open, tunnel, Arc::default(), stop))
                    .await
                    .unwrap();
            drop(stopper);
            format!("{:#}", result.unwrap_err())
        }
    };
    let error = run(config(core.address, dir.path(), None)).await;
    assert!(error.starts_with("--token-file: missing"), "{error}");

    let other = Authority::new().token();
    let error = run(config(core.address, dir.path(), Some(&other))).await;
    assert!(error.starts_with("what answers is not our core"), "{error}");
}

#[tokio::test]
async fn another_name_than_the_enrolled_one_is_refused() {
    let (authority, dir, fake) = (Authority::new(), tempfile::tempdir().unwrap(), Fake::default());
    let mut core = Core::start(&authority, any_port()).await;
    let mut config = config(core.address, dir.path(), Some(&authority.token()));
    let agent = Agent::start(&config, &fake);
    let _talk = core.accept().await;
    agent.stop().await;
    config.node = cnsmo_proto::model::Name::new("db-1").ok();
    let (_stopper, stop) = stop_pair();
    let error = runtime::run(config, fake.open(), fake.tunnel(), Arc::default(), stop)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("enrolled as `web-1`, not `db-1`"), "{error}");
}

#[tokio::test]
async fn a_data_path_that_does_not_open_ends_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(any_port_of_core(), dir.path(), None);
    let open: OpenDatapath = Arc::new(|| anyhow::bail!("no BPF here"));
    let (_stopper, stop) = stop_pair();
    let error = runtime::run(config, open, Fake::default().tunnel(), Arc::default(), stop)
        .await
        .unwrap_err();
    assert_eq!(error.to_string(), "no BPF here");
}

/// Never dialled.
fn any_port_of_core() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9))
}

/// What the agent reports of its services from now on, up to one state of one of them.
async fn until(talk: &mut Talk, service: &str, phase: Phase) -> Vec<(String, Phase)> {
    let mut told = Vec::new();
    while told.last() != Some(&(service.to_owned(), phase)) {
        if let Some(Up::Instances(report)) = talk.next().await.message {
            told.extend(report.instances.iter().map(|i| (i.service.clone(), i.phase())));
        }
    }
    told
}

fn firewall() -> Option<ServiceId> {
    Some(ServiceId { service: "firewall".into(), ..ServiceId::default() })
}

/// Has a command carried out.
async fn command(talk: &mut Talk, id: u64, command: Command) -> CommandResult {
    talk.send(Down::Command(pb_agent::Command { id, command: Some(command) })).await;
    loop {
        if let Some(Up::Result(result)) = talk.next().await.message {
            assert_eq!(result.id, id);
            return *result;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn services_are_steered_by_the_core_and_on_the_vm_while_the_others_go_on() {
    let (authority, dir, fake) = (Authority::new(), tempfile::tempdir().unwrap(), Fake::default());
    let mut core = Core::start(&authority, any_port()).await;
    let config = config(core.address, dir.path(), Some(&authority.token()));
    let agent = Agent::start(&config, &fake);
    let (mut talk, _) = core.accept().await;
    talk.welcome(7).await;
    let Some(Up::Instances(first)) = talk.next().await.message else { panic!("no services first") };
    let names: Vec<_> = first.instances.iter().map(|i| (&*i.service, &*i.name)).collect();
    assert_eq!(names, [("firewall", "web-1"), ("loadbalancer", "web-1"), ("vpn", "web-1")]);
    assert!(first.complete);
    let set = state(1, &[("a", 1)]);
    assert_eq!(talk.update(update(Kind::Snapshot, 0, vec![good("a", 1)], set)).await.error, "");
    assert_eq!(fake.in_force(), ["core", "failsafe", "a"]);

    // Stopped by the core: what it holds stays, what comes is told not to be in force.
    let stop = Command::Stop(StopRequest { id: firewall(), deadline: None });
    let stopped = command(&mut talk, 1, stop.clone()).await;
    let Some(Outcome::Status(status)) = stopped.result else { panic!("{stopped:?}") };
    assert_eq!((status.phase(), status.driver.as_str()), (Phase::Stopped, "builtin"));
    let again = command(&mut talk, 2, stop).await;
    assert_eq!(again.code, i32::from(Code::FailedPrecondition).unsigned_abs(), "{again:?}");
    let set = state(2, &[("a", 1), ("b", 2)]);
    let ack = talk.update(update(Kind::Delta, 1, vec![good("b", 2)], set.clone())).await;
    let why = "service firewall does not run";
    assert_eq!(
        (&*ack.resource_errors[0].name, &*ack.resource_errors[0].message),
        (&*full("b"), why)
    );
    assert_eq!(ack.applied, Some(state(2, &[("a", 1)])));
    assert_eq!(fake.in_force(), ["core", "failsafe", "a"]);
    let is_degraded = |report: &StatusReport| !report.node.as_ref().unwrap().reason.is_empty();
    let degraded = talk.status_when(is_degraded).await;
    assert_eq!(degraded.node.unwrap().message, why);

    // Started on the VM: what came meanwhile is in force.
    let channel = unix(&config.socket).await;
    let mut here = HostServiceClient::new(channel);
    let listed = here.list_services(ListServicesRequest::default()).await.unwrap().into_inner();
    let phases: Vec<_> = listed.services.iter().map(ServiceStatus::phase).collect();
    assert_eq!(phases, [Phase::Stopped, Phase::Ready, Phase::Ready]);
    here.start(StartRequest { id: firewall() }).await.unwrap();
    let told = until(&mut talk, "firewall", Phase::Ready).await;
    let firewall_told: Vec<_> = told.iter().filter(|t| t.0 == "firewall").map(|t| t.1).collect();
    assert_eq!(firewall_told[firewall_told.len() - 2..], [Phase::Starting, Phase::Ready]);
    while talk.heartbeat().await.applied[RESOURCE_TYPE] != set {}
    assert_eq!(fake.in_force(), ["core", "failsafe", "a", "b"]);

    // Killed: nothing of it is out of force for a moment.
    let applied = fake.0.lock().unwrap().len();
    here.kill(KillRequest { id: firewall() }).await.unwrap();
    let told = until(&mut talk, "firewall", Phase::Ready).await;
    assert_eq!(
        told.iter().map(|t| t.1).collect::<Vec<_>>(),
        [Phase::Failed, Phase::Starting, Phase::Ready]
    );
    assert_eq!(fake.0.lock().unwrap().len(), applied);
    let unknown = Some(ServiceId { service: "dns".into(), ..ServiceId::default() });
    let error = here.kill(KillRequest { id: unknown }).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    drop(here);
    agent.stop().await;
    assert!(!config.socket.exists());
}

async fn unix(path: &Path) -> Channel {
    let url = format!("unix://{}", path.display());
    Endpoint::from_shared(url).unwrap().connect().await.unwrap()
}
