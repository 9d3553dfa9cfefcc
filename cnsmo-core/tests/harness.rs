use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use cnsmo_core::{
    fleet::{PROTOCOL_VERSION, SET_TYPE, Timing},
    identity::CERTIFICATE_LIFE,
    server::{Config, Running},
};
use cnsmo_proto::{
    digest::Digest,
    model::Labels,
    pb::{
        agent::{
            Ack, Announcement, ConnectRequest, ConnectResponse, Heartbeat, Hello, ResourceError,
            StatusReport, TypeState, Update, agent_service_client::AgentServiceClient, command,
            connect_request, connect_response, update::Kind as UpdateKind,
        },
        balancer::{LoadBalancer, LoadBalancerSpec, ServicePort},
        identity::{
            CreateJoinTokenRequest, EnrollRequest, EnrollResponse,
            enrollment_service_client::EnrollmentServiceClient,
            join_token_service_client::JoinTokenServiceClient,
        },
        meta::Metadata,
        network::{Network, NetworkSpec},
        node::Node,
        policy::{Action, Direction, FirewallPolicy, FirewallPolicySpec, FirewallRule, PortRange},
        resource::{
            ApplyRequest, ApplyResponse, DeleteRequest, GetRequest, Kind, ListRequest, Resource,
            resource, resource_service_client::ResourceServiceClient,
        },
    },
};
use rcgen::{CertificateParams, KeyPair};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

/// With these a core that starts announces its own services, and one that stops withdraws them.
pub(crate) const OWN_COMMITS: i64 = 5;

/// Nothing here takes longer unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A core in this process, with its state in a folder of its own.
pub(crate) struct TestCore {
    pub(crate) folder: TempDir,
    pub(crate) running: Running,
    pub(crate) admin: Admin,
}

impl TestCore {
    pub(crate) async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), Timing::default()).await
    }

    pub(crate) async fn start_with(timing: Timing) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), timing).await
    }

    pub(crate) async fn start_in(folder: TempDir, timing: Timing) -> Self {
        Self::start_as(folder, timing, CERTIFICATE_LIFE).await
    }

    pub(crate) async fn start_as(
        folder: TempDir,
        timing: Timing,
        certificate_life: Duration,
    ) -> Self {
        let socket = folder.path().join("core.sock");
        let config = Config {
            state_dir: folder.path().join("state"),
            listen: "127.0.0.1:0".parse().unwrap(),
            socket: socket.clone(),
            timing,
            certificate_life,
        };
        let running = Running::start(config).await.unwrap();
        let admin = Admin::connect(&socket).await;
        Self { folder, running, admin }
    }

    /// Stops it and gives back the folder.
    pub(crate) async fn stop(self) -> TempDir {
        self.running.stop().await;
        self.folder
    }

    pub(crate) async fn restart(self) -> Self {
        Self::start_in(self.stop().await, Timing::default()).await
    }

    fn ca_pem(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("state/ca.crt")).unwrap()
    }

    /// Over TLS, with or without a certificate and its key.
    pub(crate) async fn tls(&self, identity: Option<(&str, &str)>) -> Channel {
        self.try_tls(identity).await.unwrap()
    }

    async fn try_tls(
        &self,
        identity: Option<(&str, &str)>,
    ) -> Result<Channel, tonic::transport::Error> {
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(self.ca_pem()))
            .domain_name("core.cnsmo");
        if let Some((certificate, key)) = identity {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        let url = format!("https://{}", self.running.address);
        Endpoint::from_shared(url).unwrap().tls_config(tls).unwrap().connect().await
    }

    pub(crate) async fn enrol(
        &self,
        token: &str,
        name: &str,
        key: &KeyPair,
    ) -> Result<EnrollResponse, Status> {
        let csr = csr(key);
        let request =
            EnrollRequest { token: token.into(), csr, name: name.into(), labels: BTreeMap::new() };
        let mut client = EnrollmentServiceClient::new(self.tls(None).await);
        Ok(client.enroll(request).await?.into_inner())
    }

    /// A node that has joined.
    pub(crate) async fn join(&mut self, node: &str, labels: &str) -> Joined {
        let token = self.admin.token(1, labels).await;
        let key = KeyPair::generate().unwrap();
        let answer = self.enrol(&token, node, &key).await.unwrap();
        Joined { certificate: answer.certificate_chain, key: key.serialize_pem() }
    }

    pub(crate) async fn agent(
        &self,
        joined: &Joined,
        have: Option<TypeState>,
    ) -> Result<Agent, Status> {
        self.agent_at(joined, have, None).await
    }

    /// An agent that can be reached.
    pub(crate) async fn agent_at(
        &self,
        joined: &Joined,
        have: Option<TypeState>,
        announcement: Option<Announcement>,
    ) -> Result<Agent, Status> {
        let channel = self.tls(Some((&joined.certificate, &joined.key))).await;
        Agent::connect(channel, have, announcement).await
    }
}

impl TestCore {
    /// An agent on a connection that is used for more.
    pub(crate) async fn agent_on(&self, channel: Channel) -> Result<Agent, Status> {
        Agent::connect(channel, None, None).await
    }

    /// A list over a new connection, which may not come about.
    pub(crate) async fn try_list(&self, joined: &Joined, list: ListRequest) -> Result<(), Status> {
        let channel = self.try_tls(Some((&joined.certificate, &joined.key))).await;
        let channel = channel.map_err(|error| Status::unavailable(error.to_string()))?;
        ResourceServiceClient::new(channel).list(list).await.map(drop)
    }
}

pub(crate) struct Joined {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// An operator.
#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) resources: ResourceServiceClient<Channel>,
    pub(crate) tokens: JoinTokenServiceClient<Channel>,
}

impl Admin {
    pub(crate) async fn connect(socket: &Path) -> Self {
        let channel = unix(socket).await.unwrap();
        Self {
            resources: ResourceServiceClient::new(channel.clone()),
            tokens: JoinTokenServiceClient::new(channel),
        }
    }

    pub(crate) async fn token(&mut self, max_uses: u32, labels: &str) -> String {
        let labels = labels.parse::<Labels>().unwrap().as_map().clone();
        let request =
            CreateJoinTokenRequest { max_uses, labels, ..CreateJoinTokenRequest::default() };
        self.tokens.create_join_token(request).await.unwrap().into_inner().token
    }

    pub(crate) async fn apply(
        &mut self,
        resources: Vec<Resource>,
    ) -> Result<ApplyResponse, Status> {
        let request = ApplyRequest { resources, ..ApplyRequest::default() };
        Ok(self.resources.apply(request).await?.into_inner())
    }

    pub(crate) async fn delete(&mut self, kind: Kind, name: &str) -> Result<i64, Status> {
        let request = DeleteRequest { kind: kind.into(), name: name.into() };
        Ok(self.resources.delete(request).await?.into_inner().revision)
    }

    async fn get(&mut self, kind: Kind, name: &str) -> Result<resource::Resource, Status> {
        let request = GetRequest { kind: kind.into(), name: name.into() };
        Ok(self.resources.get(request).await?.into_inner().resource.unwrap().resource.unwrap())
    }

    pub(crate) async fn policy(&mut self, name: &str) -> Result<FirewallPolicy, Status> {
        let resource = self.get(Kind::FirewallPolicy, name).await?;
        let resource::Resource::FirewallPolicy(policy) = resource else { panic!() };
        Ok(policy)
    }

    pub(crate) async fn network(&mut self, name: &str) -> Result<Network, Status> {
        let resource::Resource::Network(network) = self.get(Kind::Network, name).await? else {
            panic!()
        };
        Ok(network)
    }

    pub(crate) async fn balancer(&mut self, name: &str) -> Result<LoadBalancer, Status> {
        let resource = self.get(Kind::LoadBalancer, name).await?;
        let resource::Resource::LoadBalancer(balancer) = resource else { panic!() };
        Ok(balancer)
    }

    pub(crate) async fn node(&mut self, name: &str) -> Result<Node, Status> {
        let resource::Resource::Node(node) = self.get(Kind::Node, name).await? else { panic!() };
        Ok(node)
    }

    pub(crate) async fn names(&mut self, kind: Kind) -> Vec<String> {
        let request = ListRequest { kind: kind.into(), ..ListRequest::default() };
        let list = self.resources.list(request).await.unwrap().into_inner().resources;
        list.iter().map(name_of).collect()
    }

    /// Polls a node until `is` holds.
    pub(crate) async fn until_node(&mut self, name: &str, is: impl Fn(&Node) -> bool) -> Node {
        let wait = async {
            loop {
                let node = self.node(name).await.unwrap();
                if is(&node) {
                    return node;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("the node never got there")
    }
}

/// A signing request.
pub(crate) fn csr(key: &KeyPair) -> Vec<u8> {
    CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

pub(crate) async fn unix(socket: &Path) -> Result<Channel, tonic::transport::Error> {
    let path: PathBuf = socket.to_owned();
    Endpoint::from_shared(format!("unix://{}", path.display())).unwrap().connect().await
}

pub(crate) fn name_of(resource: &Resource) -> String {
    match resource.resource.as_ref().unwrap() {
        resource::Resource::Deployment(one) => one.metadata.clone().unwrap().name,
        resource::Resource::FirewallPolicy(policy) => policy.metadata.clone().unwrap().name,
        resource::Resource::Network(network) => network.metadata.clone().unwrap().name,
        resource::Resource::LoadBalancer(balancer) => balancer.metadata.clone().unwrap().name,
        resource::Resource::Node(node) => node.metadata.clone().unwrap().name,
    }
}

/// A policy with one rule that allows a TCP port.
pub(crate) fn policy(name: &str, target: &str, port: u32) -> Resource {
    let rule = FirewallRule {
        name: "allow".into(),
        action: Action::Allow.into(),
        direction: Direction::Ingress.into(),
        protocol: Some(6),
        ports: vec![PortRange { first: port, last: port }],
        ..FirewallRule::default()
    };
    let target = target.parse::<Labels>().unwrap().as_map().clone();
    let spec = FirewallPolicySpec { target, rules: vec![rule], ..FirewallPolicySpec::default() };
    let metadata = Metadata { name: name.into(), ..Metadata::default() };
    let policy = FirewallPolicy { metadata: Some(metadata), spec: Some(spec), status: None };
    Resource { resource: Some(resource::Resource::FirewallPolicy(policy)) }
}

/// 10.70.0.0/24 for all VMs.
pub(crate) fn network(name: &str) -> Resource {
    let metadata = Metadata { name: name.into(), ..Metadata::default() };
    let spec = NetworkSpec { ipv4_prefix: "10.70.0.0/24".into(), ..NetworkSpec::default() };
    let network = Network { metadata: Some(metadata), spec: Some(spec), status: None };
    Resource { resource: Some(resource::Resource::Network(network)) }
}

/// TCP port 80 of 10.70.0.200, served by the VMs with role=web.
pub(crate) fn balancer(name: &str, network: &str) -> Resource {
    let metadata = Metadata { name: name.into(), ..Metadata::default() };
    let spec = LoadBalancerSpec {
        network: network.into(),
        addresses: vec!["10.70.0.200".into()],
        ports: vec![ServicePort { protocol: 6, port: 80, target_port: 8_080 }],
        backends: [("role".into(), "web".into())].into(),
        ..LoadBalancerSpec::default()
    };
    let balancer = LoadBalancer { metadata: Some(metadata), spec: Some(spec), status: None };
    Resource { resource: Some(resource::Resource::LoadBalancer(balancer)) }
}

pub(crate) fn node_labels(name: &str, labels: &str) -> Resource {
    let labels = labels.parse::<Labels>().unwrap().as_map().clone();
    let metadata = Metadata { name: name.into(), labels, ..Metadata::default() };
    let node = Node { metadata: Some(metadata), ..Node::default() };
    Resource { resource: Some(resource::Resource::Node(node)) }
}

/// A scripted agent: it keeps a set as the real one does, and says what the test tells it to.
pub(crate) struct Agent {
    up: mpsc::Sender<ConnectRequest>,
    down: Streaming<ConnectResponse>,
    pub(crate) set: BTreeMap<String, i64>,
    pub(crate) revision: i64,
}

impl Agent {
    pub(crate) async fn connect(
        channel: Channel,
        have: Option<TypeState>,
        announcement: Option<Announcement>,
    ) -> Result<Self, Status> {
        let (up, messages) = mpsc::channel(16);
        let have = have.map(|state| (SET_TYPE.to_owned(), state)).into_iter().collect();
        let protocol_version = PROTOCOL_VERSION;
        let hello = Hello { protocol_version, have, announcement, ..Hello::default() };
        send(&up, connect_request::Message::Hello(hello)).await;
        let mut client = AgentServiceClient::new(channel);
        let down = client.connect(ReceiverStream::new(messages)).await?.into_inner();
        let mut agent = Self { up, down, set: BTreeMap::new(), revision: 0 };
        match agent.next().await? {
            connect_response::Message::Welcome(welcome) => {
                assert_eq!(welcome.protocol_version, PROTOCOL_VERSION);
                assert!(welcome.lease_ttl.is_some() && welcome.heartbeat_interval.is_some());
            }
            other => panic!("{other:?} before the welcome"),
        }
        Ok(agent)
    }

    /// But for confirmations: they come with heartbeats, whatever a test is about.
    async fn next(&mut self) -> Result<connect_response::Message, Status> {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.down.message()).await;
            let next = next.expect("the core sends nothing")?;
            let message = next.expect("the stream ended without a status").message.unwrap();
            if !matches!(message, connect_response::Message::Confirm(_)) {
                return Ok(message);
            }
        }
    }

    /// Whatever comes next.
    pub(crate) async fn message(&mut self) -> Result<(), Status> {
        self.next().await.map(drop)
    }

    /// How long the core, which stops, wants to be left alone.
    pub(crate) async fn dismissed(&mut self) -> prost_types::Duration {
        match self.next().await.unwrap() {
            connect_response::Message::GoAway(go_away) => go_away.delay.unwrap(),
            other => panic!("{other:?} from a core that stops"),
        }
    }

    /// The status with which the core ends the stream; one that stops says so before.
    pub(crate) async fn ended(&mut self) -> Status {
        match self.next().await {
            Ok(connect_response::Message::GoAway(_)) => self.next().await.unwrap_err(),
            ended => ended.unwrap_err(),
        }
    }

    /// The next update, taken into the set.
    pub(crate) async fn update(&mut self) -> Update {
        let connect_response::Message::Update(update) = self.next().await.unwrap() else {
            panic!("not an update")
        };
        match update.kind() {
            UpdateKind::Snapshot => self.set.clear(),
            UpdateKind::Delta => assert_eq!(update.base_revision, self.revision, "wrong base"),
            UpdateKind::Bookmark => {
                assert!(update.upserts.is_empty() && update.removals.is_empty());
            }
            UpdateKind::Unspecified => panic!("an update without a kind"),
        }
        for name in &update.removals {
            self.set.remove(name);
        }
        for resource in &update.upserts {
            assert!(resource.spec.is_some());
            self.set.insert(resource.name.clone(), resource.version);
        }
        self.revision = update.revision;
        update
    }

    pub(crate) fn state(&self) -> TypeState {
        let digest: Digest = self.set.iter().map(|(name, rev)| (name.as_str(), *rev)).collect();
        TypeState { revision: self.revision, digest: digest.to_vec() }
    }

    pub(crate) async fn ack(&self, update: &Update) {
        assert_eq!(update.digest, self.state().digest, "core and agent hold other sets");
        self.answer(update, "", Vec::new()).await;
    }

    pub(crate) async fn answer(&self, update: &Update, error: &str, errors: Vec<ResourceError>) {
        let ack = Ack {
            nonce: update.nonce,
            r#type: update.r#type.clone(),
            applied: Some(self.state()),
            error: error.into(),
            resource_errors: errors,
            apply_duration: None,
        };
        send(&self.up, connect_request::Message::Ack(ack)).await;
    }

    pub(crate) async fn heartbeat(&self) {
        let applied = [(SET_TYPE.to_owned(), self.state())].into();
        let heartbeat = Heartbeat { sequence: 1, applied };
        send(&self.up, connect_request::Message::Heartbeat(heartbeat)).await;
    }

    pub(crate) async fn announce(&self, announcement: Announcement) {
        send(&self.up, connect_request::Message::Announcement(announcement)).await;
    }

    pub(crate) async fn report(&self, report: StatusReport) {
        self.say(connect_request::Message::Status(Box::new(report))).await;
    }

    pub(crate) async fn say(&self, message: connect_request::Message) {
        send(&self.up, message).await;
    }

    /// The next command, whatever comes before it.
    pub(crate) async fn command(&mut self) -> (u64, command::Command) {
        loop {
            if let connect_response::Message::Command(command) = self.next().await.unwrap() {
                return (command.id, command.command.unwrap());
            }
        }
    }
}

async fn send(up: &mpsc::Sender<ConnectRequest>, message: connect_request::Message) {
    up.send(ConnectRequest { message: Some(message) }).await.unwrap();
}
