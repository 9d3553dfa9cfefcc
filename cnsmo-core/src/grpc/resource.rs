//! `ResourceService`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cnsmo_proto::{
    model::Labels,
    pb::resource::{
        ApplyRequest, ApplyResponse, DeleteRequest, DeleteResponse, GetRequest, GetResponse, Kind,
        ListHistoryRequest, ListHistoryResponse, ListRequest, ListResponse, Resource,
        RollbackRequest, RollbackResponse, ScaleRequest, ScaleResponse, WaitAppliedRequest,
        WaitAppliedResponse, WatchRequest, WatchResponse, apply_request::Mode, change::Outcome,
        resource, resource_service_server::ResourceService, watch_response::Event,
    },
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::impact;
use crate::{
    actor::{Core, Wait},
    audit::Note,
    error::Error,
    identity::{Role, caller::Caller},
    links::Links,
    state::{self, HISTORY_MAX, ROLLBACK_FOLDERS, parse_apply, word},
    store::{Range, Store},
};

/// Watchers at a time. Each remembers the set as it was last sent.
const WATCHERS_MAX: usize = 256;
/// Messages that wait for one watcher; after that it lags, and is later sent the difference.
const WATCH_QUEUE: usize = 16;
/// Entries of the history that are sent if no number is asked for.
const HISTORY_DEFAULT: usize = 20;
const WAIT_DEFAULT: Duration = Duration::from_secs(60);
const WAIT_MAX: Duration = Duration::from_secs(3_600);

#[derive(Debug)]
pub(super) struct Service {
    core: Core,
    store: Store,
    links: Links,
    watchers: Arc<Semaphore>,
}

impl Service {
    pub(super) fn new(core: Core, store: Store, links: Links) -> Self {
        Self { core, store, links, watchers: Arc::new(Semaphore::new(WATCHERS_MAX)) }
    }
}

#[tonic::async_trait]
impl ResourceService for Service {
    type WatchStream = ReceiverStream<Result<WatchResponse, Status>>;
    type WaitAppliedStream = ReceiverStream<Result<WaitAppliedResponse, Status>>;

    async fn apply(
        &self,
        request: Request<ApplyRequest>,
    ) -> Result<Response<ApplyResponse>, Status> {
        let by = note(&request, "Apply")?;
        let request = request.into_inner();
        let mode =
            Mode::try_from(request.mode).map_err(|e| Error::Invalid(format!("mode: {e}")))?;
        let wanted = tokio::task::spawn_blocking(move || parse_apply(request.resources))
            .await
            .map_err(|_| Error::Internal)??;
        let about = format!("{} resources", wanted.len());
        let answer = if request.against_flows {
            if !request.dry_run {
                let why = "against_flows: only with dry_run: ask first, then apply";
                return Err(Error::Invalid(why.into()).into());
            }
            let (answer, changed) = self.core.preview(wanted, mode).await?;
            ApplyResponse { impacts: impact::ask(&self.links, changed).await, ..answer }
        } else {
            self.core.apply(wanted, mode, request.dry_run, by).await?
        };
        let changed = answer.changes.iter().any(|change| change.outcome() != Outcome::Unchanged);
        let revision = if changed && !request.dry_run { answer.revision } else { 0 };
        let mut response = Response::new(answer);
        response.extensions_mut().insert(Note { revision, detail: about });
        Ok(response)
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let GetRequest { kind, name } = request.into_inner();
        let kind = kind_of(kind)?;
        let (mut found, _) = self.core.list(kind, Some(name.clone()), Labels::default()).await?;
        let Some(resource) = found.pop() else {
            return Err(Error::NotFound(format!("{} {name}: does not exist", word(kind))).into());
        };
        Ok(Response::new(GetResponse { resource: Some(resource) }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let ListRequest { kind, labels } = request.into_inner();
        let labels = selector(labels, "labels")?;
        let (resources, revision) = self.core.list(kind_of(kind)?, None, labels).await?;
        Ok(Response::new(ListResponse { resources, revision }))
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        let role = Caller::of(&request)?.role;
        let by = note(&request, "Delete")?;
        let DeleteRequest { kind, name } = request.into_inner();
        let kind = kind_of(kind)?;
        if kind == Kind::Node && role != Role::Admin {
            let why = format!("Node {name}: only the role admin takes VMs out");
            return Err(Error::Denied(why).into());
        }
        let about = format!("{} {name}", word(kind));
        let revision = self.core.delete(kind, name, by).await?;
        let mut response = Response::new(DeleteResponse { revision });
        response.extensions_mut().insert(Note { revision, detail: about });
        Ok(response)
    }

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let WatchRequest { kind, name } = request.into_inner();
        let permit = self.watchers.clone().try_acquire_owned().map_err(|_| {
            Error::Exhausted(format!("{WATCHERS_MAX} watchers are connected already"))
        })?;
        let (to, messages) = mpsc::channel(WATCH_QUEUE);
        let name = (!name.is_empty()).then_some(name);
        let watcher = Watcher {
            core: self.core.clone(),
            kind: kind_of(kind)?,
            name,
            to,
            known: BTreeMap::new(),
            _permit: permit,
        };
        tokio::spawn(watcher.run());
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn wait_applied(
        &self,
        request: Request<WaitAppliedRequest>,
    ) -> Result<Response<Self::WaitAppliedStream>, Status> {
        let request = request.into_inner();
        let timeout = match request.timeout {
            None => WAIT_DEFAULT,
            Some(timeout) => {
                Duration::try_from(timeout).map_err(|e| Error::Invalid(format!("timeout: {e}")))?
            }
        };
        let timeout = if timeout.is_zero() { WAIT_DEFAULT } else { timeout };
        if timeout > WAIT_MAX {
            return Err(Error::Invalid(format!("timeout: {timeout:?} is above one hour")).into());
        }
        if request.revision < 0 {
            return Err(Error::Invalid("revision: is negative".into()).into());
        }
        let selector = selector(request.selector, "selector")?;
        let wait = Wait { revision: request.revision, selector, timeout };
        Ok(Response::new(ReceiverStream::new(self.core.wait(wait).await?)))
    }

    async fn scale(
        &self,
        request: Request<ScaleRequest>,
    ) -> Result<Response<ScaleResponse>, Status> {
        let by = note(&request, "Scale")?;
        let ScaleRequest { name, replicas } = request.into_inner();
        let detail = format!("Deployment {name} to {replicas}");
        let (revision, replicas_before) = self.core.scale(name, replicas, by).await?;
        let mut response = Response::new(ScaleResponse { revision, replicas_before });
        let revision = if replicas == replicas_before { 0 } else { revision };
        response.extensions_mut().insert(Note { revision, detail });
        Ok(response)
    }

    async fn list_history(
        &self,
        request: Request<ListHistoryRequest>,
    ) -> Result<Response<ListHistoryResponse>, Status> {
        let ListHistoryRequest { limit, before_revision } = request.into_inner();
        let limit = if limit == 0 { HISTORY_DEFAULT } else { limit as usize };
        if limit > HISTORY_MAX {
            let why = format!("limit: {limit} is above {HISTORY_MAX}");
            return Err(Error::Invalid(why).into());
        }
        if before_revision < 0 {
            return Err(Error::Invalid("before_revision: is negative".into()).into());
        }
        let kept = self.store.status().await.map_err(Error::from)?.compacted;
        let entries = self.core.history(before_revision, limit, kept).await?;
        Ok(Response::new(ListHistoryResponse { entries }))
    }

    async fn rollback(
        &self,
        request: Request<RollbackRequest>,
    ) -> Result<Response<RollbackResponse>, Status> {
        let by = note(&request, "Rollback")?;
        let RollbackRequest { revision, dry_run } = request.into_inner();
        let by = state::Note { to_revision: revision, ..by };
        if revision < 1 {
            return Err(Error::Invalid(format!("revision: {revision} is below 1")).into());
        }
        let mut entries = Vec::new();
        for folder in ROLLBACK_FOLDERS {
            let range = Range { at: Some(revision), ..Range::prefix(folder) };
            entries.extend(self.store.range(range).await.map_err(Error::from)?.entries);
        }
        let answer = self.core.roll_back(entries, dry_run, by).await?;
        let ApplyResponse { revision: now, changes, .. } = answer;
        let committed = !changes.is_empty() && !dry_run;
        let mut response = Response::new(RollbackResponse { revision: now, changes });
        let detail = format!("to revision {revision}");
        let revision = if committed { now } else { 0 };
        response.extensions_mut().insert(Note { revision, detail });
        Ok(response)
    }
}

/// Who asks, for the history.
fn note<T>(request: &Request<T>, call: &'static str) -> Result<state::Note, Status> {
    Ok(state::Note { by: Caller::of(request)?.identity.to_string(), call, to_revision: 0 })
}

fn kind_of(kind: i32) -> Result<Kind, Error> {
    match Kind::try_from(kind) {
        Ok(Kind::Unspecified) => Err(Error::Invalid("kind: missing".into())),
        Ok(kind) => Ok(kind),
        Err(unknown) => Err(Error::Invalid(format!("kind: {unknown}"))),
    }
}

fn selector(labels: BTreeMap<String, String>, field: &str) -> Result<Labels, Error> {
    Labels::new(labels).map_err(|e| Error::Invalid(e.at(field).to_string()))
}

/// One stream of changes.
struct Watcher {
    core: Core,
    kind: Kind,
    name: Option<String>,
    to: mpsc::Sender<Result<WatchResponse, Status>>,
    /// As the watcher knows them: what a lagging one has missed is found by comparison.
    known: BTreeMap<String, Resource>,
    _permit: OwnedSemaphorePermit,
}

/// The client is gone.
struct Gone;

impl Watcher {
    async fn run(mut self) {
        let mut synced = false;
        loop {
            let view = match self.core.watch(self.kind, self.name.clone()).await {
                Ok(view) => view,
                Err(error) => {
                    let _ = self.to.send(Err(error.into())).await;
                    return;
                }
            };
            if self.catch_up(view.resources, view.revision).await.is_err() {
                return;
            }
            if !synced {
                let message = WatchResponse {
                    event: Event::Synced.into(),
                    revision: view.revision,
                    resource: None,
                };
                if self.to.send(Ok(message)).await.is_err() {
                    return;
                }
                synced = true;
            }
            match self.follow(view.changes).await {
                Ok(true) => {}
                Ok(false) => {
                    let _ = self.to.send(Err(Error::Stopped.into())).await;
                    return;
                }
                Err(Gone) => return,
            }
        }
    }

    /// Sends the difference between what the watcher knows and the set.
    async fn catch_up(&mut self, set: Vec<Resource>, revision: i64) -> Result<(), Gone> {
        let set: BTreeMap<String, Resource> =
            set.into_iter().map(|resource| (name_of(&resource), resource)).collect();
        let gone: Vec<String> =
            self.known.keys().filter(|name| !set.contains_key(*name)).cloned().collect();
        for name in gone {
            let resource = self.known.get(&name).cloned();
            self.send(name, Event::Delete, revision, resource).await?;
        }
        for (name, resource) in set {
            if self.known.get(&name) != Some(&resource) {
                self.send(name, Event::Upsert, revision, Some(resource)).await?;
            }
        }
        Ok(())
    }

    /// Sends changes until the watcher lags too far (true) or the core stops (false).
    async fn follow(
        &mut self,
        mut changes: broadcast::Receiver<Arc<crate::actor::Change>>,
    ) -> Result<bool, Gone> {
        loop {
            let change = tokio::select! {
                change = changes.recv() => change,
                () = self.to.closed() => return Err(Gone),
            };
            let change = match change {
                Ok(change) => change,
                Err(broadcast::error::RecvError::Lagged(_)) => return Ok(true),
                Err(broadcast::error::RecvError::Closed) => return Ok(false),
            };
            if self.name.as_ref().is_none_or(|name| *name == change.name) {
                let message = &change.message;
                let resource = message.resource.clone();
                self.send(change.name.clone(), message.event(), message.revision, resource).await?;
            }
        }
    }

    async fn send(
        &mut self,
        name: String,
        event: Event,
        revision: i64,
        resource: Option<Resource>,
    ) -> Result<(), Gone> {
        match (&resource, event) {
            (Some(resource), Event::Upsert) => self.known.insert(name, resource.clone()),
            _ => self.known.remove(&name),
        };
        let message = WatchResponse { event: event.into(), revision, resource };
        self.to.send(Ok(message)).await.map_err(|_| Gone)
    }
}

fn name_of(resource: &Resource) -> String {
    let metadata = match &resource.resource {
        Some(resource::Resource::FirewallPolicy(policy)) => policy.metadata.as_ref(),
        Some(resource::Resource::Network(network)) => network.metadata.as_ref(),
        Some(resource::Resource::LoadBalancer(balancer)) => balancer.metadata.as_ref(),
        Some(resource::Resource::Deployment(one)) => one.metadata.as_ref(),
        Some(resource::Resource::Node(node)) => node.metadata.as_ref(),
        None => None,
    };
    metadata.map(|metadata| metadata.name.clone()).unwrap_or_default()
}
