//! A core in this process that keeps resources in memory and answers waits and watches as the test says.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex, MutexGuard},
};

use cnsmo_proto::pb::{
    admin::admin_service_server::AdminServiceServer,
    balancer::LoadBalancerStatus,
    catalog::{
        AnnounceRequest, AnnounceResponse, GetInstanceRequest, GetInstanceResponse, Instance,
        ListInstancesRequest, ListInstancesResponse, WatchInstancesRequest, WatchInstancesResponse,
        WithdrawRequest, WithdrawResponse,
        catalog_service_server::{CatalogService, CatalogServiceServer},
    },
    event::{
        Event, Synced, WatchEventsRequest, WatchEventsResponse,
        event_service_server::{EventService, EventServiceServer},
        watch_events_response,
    },
    identity::{
        CreateJoinTokenRequest, CreateJoinTokenResponse, DeleteJoinTokenRequest,
        DeleteJoinTokenResponse, JoinToken, ListJoinTokensRequest, ListJoinTokensResponse, Role,
        join_token_service_server::{JoinTokenService, JoinTokenServiceServer},
    },
    node::Node,
    resource::{
        ApplyRequest, ApplyResponse, Change, DeleteRequest, DeleteResponse, GetRequest,
        GetResponse, HistoryEntry, Kind, ListHistoryRequest, ListHistoryResponse, ListRequest,
        ListResponse, Resource, RollbackRequest, RollbackResponse, ScaleRequest, ScaleResponse,
        WaitAppliedRequest, WaitAppliedResponse, WatchRequest, WatchResponse,
        apply_request::Mode,
        change::Outcome,
        resource::Resource as Inner,
        resource_service_server::{ResourceService, ResourceServiceServer},
    },
    state::state_service_server::StateServiceServer,
};
use tempfile::TempDir;
use tokio::{net::UnixListener, runtime::Runtime};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use crate::store::Keys;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) resources: BTreeMap<(i32, String), Resource>,
    pub(crate) revision: i64,
    /// What a wait answers before it ends.
    pub(crate) wait: Vec<WaitAppliedResponse>,
    /// What a watch sends before it stays silent.
    pub(crate) watch: Vec<WatchResponse>,
    pub(crate) instances: Vec<Instance>,
    /// What a watch of instances sends before it ends.
    pub(crate) instance_events: Vec<WatchInstancesResponse>,
    /// The latest change first.
    pub(crate) history: Vec<HistoryEntry>,
    /// What a watch of events sends before it ends.
    pub(crate) events: Vec<Event>,
    pub(crate) events_asked: Option<WatchEventsRequest>,
    pub(crate) refuse: Option<Status>,
    pub(crate) waited: Option<WaitAppliedRequest>,
    pub(crate) token: Option<CreateJoinTokenRequest>,
    pub(crate) keys: Keys,
}

type Shared = Arc<Mutex<State>>;

pub(crate) struct Fake {
    pub(crate) folder: TempDir,
    state: Shared,
    // Ends the server when the test does.
    _runtime: Runtime,
}

impl Fake {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let state = Shared::default();
        let listener = {
            let _context = runtime.enter();
            UnixListener::bind(folder.path().join("core.sock")).unwrap()
        };
        let server = Server::builder()
            .add_service(ResourceServiceServer::new(Core(state.clone())))
            .add_service(CatalogServiceServer::new(Core(state.clone())))
            .add_service(EventServiceServer::new(Core(state.clone())))
            .add_service(JoinTokenServiceServer::new(Core(state.clone())))
            .add_service(StateServiceServer::new(Core(state.clone())))
            .add_service(AdminServiceServer::new(Core(state.clone())))
            .serve_with_incoming(UnixListenerStream::new(listener));
        runtime.spawn(async { server.await.unwrap() });
        Self { folder, state, _runtime: runtime }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("core.sock")
    }

    pub(crate) fn add_node(&self, node: Node) {
        let name = node.metadata.as_ref().unwrap().name.clone();
        let resource = Resource { resource: Some(Inner::Node(node)) };
        self.state().resources.insert((Kind::Node.into(), name), resource);
    }

    /// Has agents report, so to say.
    pub(crate) fn set_balancer_status(&self, name: &str, status: LoadBalancerStatus) {
        let key = (Kind::LoadBalancer.into(), name.to_owned());
        match self.state().resources.get_mut(&key).map(|resource| &mut resource.resource) {
            Some(Some(Inner::LoadBalancer(balancer))) => balancer.status = Some(status),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        Ran::of(cnsmo().env("CNSMO_SOCKET", self.socket()).args(arguments))
    }

    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let ran = self.run(arguments);
        assert_eq!(ran.code, 0, "{arguments:?}\n{}{}", ran.out, ran.err);
        ran.out
    }
}

pub(crate) fn cnsmo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cnsmo"));
    command.env_remove("CNSMO_SOCKET").stdin(Stdio::null());
    command
}

pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn of(command: &mut Command) -> Self {
        let Output { status, stdout, stderr } = command.output().unwrap();
        Self {
            code: status.code().unwrap(),
            out: String::from_utf8(stdout).unwrap(),
            err: String::from_utf8(stderr).unwrap(),
        }
    }
}

pub(crate) struct Core(Shared);

impl Core {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

fn key(resource: &Resource) -> (i32, String) {
    let (kind, metadata) = match resource.resource.as_ref().unwrap() {
        Inner::Deployment(one) => (Kind::Deployment, &one.metadata),
        Inner::FirewallPolicy(policy) => (Kind::FirewallPolicy, &policy.metadata),
        Inner::LoadBalancer(balancer) => (Kind::LoadBalancer, &balancer.metadata),
        Inner::Network(network) => (Kind::Network, &network.metadata),
        Inner::Node(node) => (Kind::Node, &node.metadata),
    };
    (kind.into(), metadata.as_ref().unwrap().name.clone())
}

/// What an operator writes of a resource.
fn written(resource: &Resource) -> (BTreeMap<String, String>, String) {
    let (metadata, spec) = match resource.resource.as_ref().unwrap() {
        Inner::Deployment(one) => (&one.metadata, format!("{:?}", one.spec)),
        Inner::FirewallPolicy(policy) => (&policy.metadata, format!("{:?}", policy.spec)),
        Inner::LoadBalancer(balancer) => (&balancer.metadata, format!("{:?}", balancer.spec)),
        Inner::Network(network) => (&network.metadata, format!("{:?}", network.spec)),
        Inner::Node(node) => (&node.metadata, format!("{:?}", node.spec)),
    };
    (metadata.clone().unwrap().labels, spec)
}

/// The stored resource after an operator wrote `new` over `old`.
fn merged(old: Option<&Resource>, new: &Resource) -> Resource {
    match (old.and_then(|old| old.resource.clone()), &new.resource) {
        (Some(Inner::Node(mut old)), Some(Inner::Node(new))) => {
            old.metadata.as_mut().unwrap().labels = new.metadata.clone().unwrap().labels;
            old.spec = new.spec.or(old.spec);
            Resource { resource: Some(Inner::Node(old)) }
        }
        _ => new.clone(),
    }
}

#[tonic::async_trait]
impl ResourceService for Core {
    async fn apply(
        &self,
        request: Request<ApplyRequest>,
    ) -> Result<Response<ApplyResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        if let Some(status) = &state.refuse {
            return Err(status.clone());
        }
        let mut changes = Vec::new();
        let mut resources = state.resources.clone();
        for resource in &request.resources {
            let key = key(resource);
            let old = resources.get(&key);
            if request.mode() == Mode::Update && old.is_none() {
                return Err(Status::not_found("no such resource"));
            }
            let merged = merged(old, resource);
            let outcome = match old {
                None => Outcome::Created,
                Some(old) if written(old) == written(&merged) => Outcome::Unchanged,
                Some(_) => Outcome::Updated,
            };
            changes.push(Change { kind: key.0, name: key.1.clone(), outcome: outcome.into() });
            resources.insert(key, merged);
        }
        let changed = changes.iter().any(|change| change.outcome() != Outcome::Unchanged);
        if changed && !request.dry_run {
            state.resources = resources;
            state.revision += 1;
        }
        Ok(Response::new(ApplyResponse {
            revision: state.revision,
            changes,
            ..ApplyResponse::default()
        }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let request = request.into_inner();
        let state = self.0.lock().unwrap();
        let resource = state.resources.get(&(request.kind, request.name.clone())).cloned();
        let missing = || Status::not_found(format!("no `{}`", request.name));
        Ok(Response::new(GetResponse { resource: Some(resource.ok_or_else(missing)?) }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let request = request.into_inner();
        let state = self.0.lock().unwrap();
        let selected = |resource: &&Resource| {
            let labels = written(resource).0;
            request.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
        };
        let of_kind = state.resources.iter().filter(|(key, _)| key.0 == request.kind);
        let resources = of_kind.map(|(_, resource)| resource).filter(selected).cloned().collect();
        Ok(Response::new(ListResponse { resources, revision: state.revision }))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        if state.resources.remove(&(request.kind, request.name.clone())).is_none() {
            return Err(Status::not_found(format!("no `{}`", request.name)));
        }
        state.revision += 1;
        Ok(Response::new(DeleteResponse { revision: state.revision }))
    }

    async fn list_history(
        &self,
        request: Request<ListHistoryRequest>,
    ) -> Result<Response<ListHistoryResponse>, Status> {
        let limit = request.into_inner().limit as usize;
        let entries = self.0.lock().unwrap().history.iter().take(limit).cloned().collect();
        Ok(Response::new(ListHistoryResponse { entries }))
    }

    async fn scale(&self, _: Request<ScaleRequest>) -> Result<Response<ScaleResponse>, Status> {
        Err(Status::not_found("Deployment shop: does not exist"))
    }

    async fn rollback(
        &self,
        request: Request<RollbackRequest>,
    ) -> Result<Response<RollbackResponse>, Status> {
        let RollbackRequest { revision, dry_run } = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let entry = state.history.iter().find(|entry| entry.revision == revision).cloned();
        let entry = entry.ok_or_else(|| Status::out_of_range("the history is gone"))?;
        if !dry_run {
            state.revision += 1;
        }
        Ok(Response::new(RollbackResponse { revision: state.revision, changes: entry.changes }))
    }

    type WatchStream = tokio_stream::wrappers::ReceiverStream<Result<WatchResponse, Status>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let events = self.0.lock().unwrap().watch.clone();
        let (sender, receiver) = tokio::sync::mpsc::channel(events.len() + 1);
        for event in events {
            sender.send(Ok(event)).await.unwrap();
        }
        // Stays open, as the real one, until the client goes.
        tokio::spawn(async move { sender.closed().await });
        Ok(Response::new(receiver.into()))
    }

    type WaitAppliedStream =
        tokio_stream::Iter<std::vec::IntoIter<Result<WaitAppliedResponse, Status>>>;

    async fn wait_applied(
        &self,
        request: Request<WaitAppliedRequest>,
    ) -> Result<Response<Self::WaitAppliedStream>, Status> {
        let mut state = self.0.lock().unwrap();
        state.waited = Some(request.into_inner());
        let answers: Vec<_> = state.wait.iter().cloned().map(Ok).collect();
        Ok(Response::new(tokio_stream::iter(answers)))
    }
}

#[tonic::async_trait]
impl EventService for Core {
    type WatchEventsStream =
        tokio_stream::Iter<std::vec::IntoIter<Result<WatchEventsResponse, Status>>>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let mut state = self.0.lock().unwrap();
        state.events_asked = Some(request.into_inner());
        let events = state.events.iter().cloned().map(watch_events_response::Message::Event);
        let synced = watch_events_response::Message::Synced(Synced { revision: 9 });
        let messages = events.chain([synced]);
        let answers = messages.map(|message| Ok(WatchEventsResponse { message: Some(message) }));
        Ok(Response::new(tokio_stream::iter(answers.collect::<Vec<_>>())))
    }
}

#[tonic::async_trait]
impl JoinTokenService for Core {
    async fn create_join_token(
        &self,
        request: Request<CreateJoinTokenRequest>,
    ) -> Result<Response<CreateJoinTokenResponse>, Status> {
        self.0.lock().unwrap().token = Some(request.into_inner());
        Ok(Response::new(CreateJoinTokenResponse {
            token: "cnsmo1.id.secret.pin".to_owned(),
            expire_time: Some(prost_types::Timestamp { seconds: 1_900_000_000, nanos: 0 }),
            id: "id".to_owned(),
        }))
    }

    /// Two pages.
    async fn list_join_tokens(
        &self,
        request: Request<ListJoinTokensRequest>,
    ) -> Result<Response<ListJoinTokensResponse>, Status> {
        let token = |id: &str, role: Role, made: i64| JoinToken {
            id: id.to_owned(),
            role: role.into(),
            create_time: Some(prost_types::Timestamp { seconds: made, nanos: 0 }),
            expire_time: Some(prost_types::Timestamp { seconds: 1_900_000_000, nanos: 7 }),
            max_uses: 5,
            uses: 2,
            labels: [("role".to_owned(), "web".to_owned())].into(),
            ..JoinToken::default()
        };
        Ok(Response::new(match request.into_inner().after.as_str() {
            "" => {
                ListJoinTokensResponse { tokens: vec![token("-late", Role::Agent, 9)], more: true }
            }
            _ => ListJoinTokensResponse {
                tokens: vec![token("early", Role::Viewer, 3)],
                more: false,
            },
        }))
    }

    async fn delete_join_token(
        &self,
        request: Request<DeleteJoinTokenRequest>,
    ) -> Result<Response<DeleteJoinTokenResponse>, Status> {
        match request.into_inner().id.as_str() {
            "-late" => Ok(Response::new(DeleteJoinTokenResponse { revision: 8 })),
            id => Err(Status::not_found(format!("id: there is no join token {id}"))),
        }
    }
}

#[tonic::async_trait]
impl CatalogService for Core {
    async fn announce(
        &self,
        _: Request<AnnounceRequest>,
    ) -> Result<Response<AnnounceResponse>, Status> {
        Err(Status::unimplemented("operators do not announce"))
    }

    async fn withdraw(
        &self,
        _: Request<WithdrawRequest>,
    ) -> Result<Response<WithdrawResponse>, Status> {
        Err(Status::unimplemented("operators do not withdraw"))
    }

    async fn get_instance(
        &self,
        _: Request<GetInstanceRequest>,
    ) -> Result<Response<GetInstanceResponse>, Status> {
        Err(Status::unimplemented("lists have it"))
    }

    async fn list_instances(
        &self,
        request: Request<ListInstancesRequest>,
    ) -> Result<Response<ListInstancesResponse>, Status> {
        let ListInstancesRequest { service, node, attributes } = request.into_inner();
        let state = self.0.lock().unwrap();
        let meant = |instance: &&Instance| {
            (service.is_empty() || instance.service == service)
                && (node.is_empty() || instance.node == node)
                && attributes.iter().all(|(k, v)| instance.attributes.get(k) == Some(v))
        };
        let instances = state.instances.iter().filter(meant).cloned().collect();
        Ok(Response::new(ListInstancesResponse { instances, revision: state.revision }))
    }

    type WatchInstancesStream =
        tokio_stream::Iter<std::vec::IntoIter<Result<WatchInstancesResponse, Status>>>;

    async fn watch_instances(
        &self,
        _: Request<WatchInstancesRequest>,
    ) -> Result<Response<Self::WatchInstancesStream>, Status> {
        let events: Vec<_> =
            self.0.lock().unwrap().instance_events.iter().cloned().map(Ok).collect();
        Ok(Response::new(tokio_stream::iter(events)))
    }
}
