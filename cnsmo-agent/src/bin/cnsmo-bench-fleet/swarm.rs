//! Agents of a core.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use cnsmo_agent::{
    enforcer::MemoryEnforcer,
    locate::Locator,
    report::Services,
    runtime::LIMITS,
    session::{self, Connection},
};
use cnsmo_proto::{
    model::{Labels, Name},
    pb::{
        agent::update,
        identity::{CreateJoinTokenRequest, join_token_service_client::JoinTokenServiceClient},
        meta::Metadata,
        node::node_status::Phase,
        policy::{Action, Direction, FirewallPolicy, FirewallPolicySpec, FirewallRule, PortRange},
        resource::{
            ApplyRequest, Kind, ListRequest, Resource, WaitAppliedRequest, resource,
            resource_service_client::ResourceServiceClient,
        },
    },
};
use cnsmo_service::{
    channel::CoreAddress,
    host::Host,
    identity::{Credentials, enroll},
    lifecycle::Lifecycle,
    supervise::{Stopper, stop_pair},
    token::Token,
};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinSet};
use tonic::transport::{Channel, Endpoint};

use super::board::{Board, PATIENCE, latencies};

/// Bytes of the update that everybody is sent, but for some names and numbers.
pub(crate) const PAYLOAD_BYTES: usize = 1_024;
/// Enrolments, or first connections, at a time: more than the machine has cores, fewer than it has file descriptors.
const AT_ONCE: usize = 64;
/// Uses of one join token; the core allows no more.
const TOKEN_USES_MAX: u32 = 10_000;

/// See the module above.
pub(crate) struct Swarm {
    operator: Channel,
    core: SocketAddr,
    folder: PathBuf,
    count: usize,
    identities: Vec<Credentials>,
    board: Arc<Board>,
    edits: u32,
    /// Streams end when it is dropped.
    stopper: Option<Stopper>,
}

impl Swarm {
    pub(crate) fn new(
        socket: &Path,
        core: SocketAddr,
        folder: PathBuf,
        count: usize,
    ) -> anyhow::Result<Self> {
        let operator = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        Ok(Self {
            operator: operator.connect_lazy(),
            core,
            folder,
            count,
            identities: Vec::new(),
            board: Arc::default(),
            edits: 0,
            stopper: None,
        })
    }

    /// Gets a key and a certificate for each.
    pub(crate) async fn enrol(&mut self) -> anyhow::Result<Value> {
        let max_uses = u32::try_from(self.count)?.min(TOKEN_USES_MAX);
        let mut tokens = Vec::new();
        for _ in 0..self.count.div_ceil(usize::try_from(max_uses)?.max(1)) {
            let request = CreateJoinTokenRequest { max_uses, ..CreateJoinTokenRequest::default() };
            let mut client = JoinTokenServiceClient::new(self.operator.clone());
            let token: Token =
                client.create_join_token(request).await?.into_inner().token.parse()?;
            tokens.push(Arc::new(token));
        }
        let start = Instant::now();
        let places = Arc::new(Semaphore::new(AT_ONCE));
        let mut enrolling = JoinSet::new();
        for number in 0..self.count {
            let place = places.clone().acquire_owned().await?;
            let token = tokens[number / usize::try_from(max_uses)?].clone();
            let (core, name) = (CoreAddress::from(self.core), name(number)?);
            let folder = self.folder.join(name.as_str());
            enrolling.spawn(async move {
                fs::create_dir(&folder)?;
                let identity = enroll(&core, &token, &name, &BTreeMap::new(), &folder).await;
                drop(place);
                anyhow::Ok(Credentials::new(&folder, identity?))
            });
        }
        while let Some(identity) = enrolling.join_next().await {
            self.identities.push(identity??);
        }
        Ok(json!({ "seconds": start.elapsed().as_secs_f64() }))
    }

    /// Has all agents connect, as after a power failure of all VMs, and waits until each has its set.
    pub(crate) async fn join(&mut self) -> anyhow::Result<Value> {
        ensure!(self.stopper.is_none(), "all have joined already");
        self.board.clear();
        let start = Instant::now();
        let (stopper, stop) = stop_pair();
        self.stopper = Some(stopper);
        for credentials in &self.identities {
            let (enforcer, handle) = MemoryEnforcer::new();
            let board = self.board.clone();
            tokio::spawn(enforcer.run(move |update| {
                board.note(update.kind() == update::Kind::Snapshot);
            }));
            let name = credentials.identity().name().to_string();
            let labels = BTreeMap::from([("vm".to_owned(), name)]);
            let node = credentials.identity().name().clone();
            let connection = Connection {
                locator: Locator::new(vec![self.core.into()], Vec::new(), handle.clone()),
                credentials: credentials.clone(),
                labels: Labels::new(labels).map_err(|error| anyhow::anyhow!("{error:?}"))?,
                services: Services::new(Host::new(LIMITS), node, Arc::default(), handle.clone()),
                enforcer: handle,
                life: Lifecycle::new("Spawned"),
                renew_first: false,
            };
            tokio::spawn(session::run(connection, stop.clone()));
        }
        let seen = self.board.take(self.count).await?;
        let seconds = start.elapsed().as_secs_f64();
        self.wait_applied(0, BTreeMap::new()).await?;
        Ok(json!({ "seconds": seconds, "snapshots": seen.snapshots }))
    }

    /// One update to all: how long until each has it, and until the core knows that each enforces it.
    pub(crate) async fn push(&mut self) -> anyhow::Result<Value> {
        self.board.clear();
        let start = Instant::now();
        let revision = self.apply("swarm-all", BTreeMap::new()).await?;
        self.wait_applied(revision, BTreeMap::new()).await?;
        let acked = start.elapsed().as_secs_f64() * 1e3;
        let seen = self.board.take(self.count).await?;
        let mut answer = latencies(start, &seen.times);
        answer["acked_ms"] = json!(acked);
        answer["snapshots"] = json!(seen.snapshots);
        Ok(answer)
    }

    /// One update to one of them.
    pub(crate) async fn edit(&mut self) -> anyhow::Result<Value> {
        self.board.clear();
        let selector = BTreeMap::from([("vm".to_owned(), name(0)?.to_string())]);
        let start = Instant::now();
        let revision = self.apply("swarm-one", selector.clone()).await?;
        self.wait_applied(revision, selector).await?;
        Ok(json!({ "acked_ms": start.elapsed().as_secs_f64() * 1e3 }))
    }

    /// Forgets what was received so far: the core is about to be stopped.
    pub(crate) fn mark(&self) -> Value {
        self.board.clear();
        json!({})
    }

    /// Waits until all agents have heard of the core again since [`Self::mark`].
    pub(crate) async fn returned(&mut self) -> anyhow::Result<Value> {
        let seen = self.board.take(self.count).await?;
        Ok(json!({ "snapshots": seen.snapshots, "messages": seen.times.len() }))
    }

    /// How many nodes the core takes for dead now.
    pub(crate) async fn unreachable(&self) -> anyhow::Result<Value> {
        let request = ListRequest { kind: Kind::Node.into(), ..ListRequest::default() };
        let list = self.resources().list(request).await?.into_inner().resources;
        let late = list.into_iter().filter(|resource| match &resource.resource {
            Some(resource::Resource::Node(node)) => {
                node.status.as_ref().is_some_and(|status| status.phase() == Phase::Unreachable)
            }
            _ => false,
        });
        Ok(json!({ "nodes": late.count() }))
    }

    fn resources(&self) -> ResourceServiceClient<Channel> {
        ResourceServiceClient::new(self.operator.clone()).max_decoding_message_size(64 << 20)
    }

    async fn apply(
        &mut self,
        policy: &str,
        target: BTreeMap<String, String>,
    ) -> anyhow::Result<i64> {
        self.edits += 1;
        let metadata = Metadata { name: policy.into(), ..Metadata::default() };
        let spec = FirewallPolicySpec {
            target,
            priority: self.edits % 1_000,
            rules: rules(),
            ..FirewallPolicySpec::default()
        };
        let policy = FirewallPolicy { metadata: Some(metadata), spec: Some(spec), status: None };
        let resource = Resource { resource: Some(resource::Resource::FirewallPolicy(policy)) };
        let request = ApplyRequest { resources: vec![resource], ..ApplyRequest::default() };
        Ok(self.resources().apply(request).await?.into_inner().revision)
    }

    async fn wait_applied(
        &self,
        revision: i64,
        selector: BTreeMap<String, String>,
    ) -> anyhow::Result<()> {
        let timeout = prost_types::Duration::try_from(PATIENCE)?;
        let request = WaitAppliedRequest { revision, selector, timeout: Some(timeout) };
        let mut progress = self.resources().wait_applied(request).await?.into_inner();
        while let Some(now) = progress.message().await? {
            if now.done {
                ensure!(now.applied, "{} agents are missing", now.pending.len());
                return Ok(());
            }
        }
        bail!("the core stopped before all agents had acknowledged")
    }
}

fn name(number: usize) -> anyhow::Result<Name> {
    Name::new(format!("swarm-{number}")).ok().context("not a name")
}

/// As many as the payload takes.
fn rules() -> Vec<FirewallRule> {
    let mut rules = Vec::new();
    let mut bytes = 0;
    for number in 0_u32.. {
        let port = 1_024 + number;
        let rule = FirewallRule {
            name: format!("rule-{number}"),
            action: Action::Allow.into(),
            direction: Direction::Ingress.into(),
            from_cidrs: vec![format!("198.51.100.{}/32", number % 256)],
            protocol: Some(6),
            ports: vec![PortRange { first: port, last: port }],
            ..FirewallRule::default()
        };
        // Field number and length of the field take two bytes.
        bytes += rule.encoded_len() + 2;
        if bytes > PAYLOAD_BYTES {
            break;
        }
        rules.push(rule);
    }
    rules
}
