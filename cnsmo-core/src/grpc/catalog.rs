//! `CatalogService`.

use cnsmo_proto::pb::catalog::{
    AnnounceRequest, AnnounceResponse, GetInstanceRequest, GetInstanceResponse, Instance,
    ListInstancesRequest, ListInstancesResponse, WatchInstancesRequest, WatchInstancesResponse,
    WithdrawRequest, WithdrawResponse, catalog_service_server::CatalogService,
    watch_instances_response,
};
use futures::{StreamExt as _, stream, stream::BoxStream};
use tonic::{Request, Response, Status};

use super::quota::Quota;
use crate::{
    catalog::{Catalog, Event, Filter, Watcher},
    error::Error,
    identity::{Kind, Role, caller::Caller},
};

/// Largest message of a client: an announcement with all that it may have.
pub(super) const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Watches of this core; a further one is refused. Each keeps no more than its place among the changes.
const WATCHERS_MAX: usize = 10_000;
/// Watches of one identity; a further one is refused.
const WATCHERS_PER_IDENTITY_MAX: usize = 1_000;

/// How many may watch.
pub(super) fn watchers() -> Quota {
    Quota::new("catalogue watches", WATCHERS_MAX, WATCHERS_PER_IDENTITY_MAX)
}

#[derive(Debug)]
pub(super) struct Service {
    catalog: Catalog,
    watchers: Quota,
}

impl Service {
    /// `watchers`: see [`watchers`].
    pub(super) fn new(catalog: Catalog, watchers: Quota) -> Self {
        Self { catalog, watchers }
    }
}

#[tonic::async_trait]
impl CatalogService for Service {
    type WatchInstancesStream = BoxStream<'static, Result<WatchInstancesResponse, Status>>;

    async fn announce(
        &self,
        request: Request<AnnounceRequest>,
    ) -> Result<Response<AnnounceResponse>, Status> {
        let caller = Caller::of(&request)?.clone();
        let request = request.into_inner();
        if let Some(instance) = &request.instance {
            check_caller(&caller, instance)?;
        }
        let (instance, ttl) = self.catalog.announce(&caller.identity, request).await?;
        let instance = Some((*instance).clone());
        // At most 10 minutes, far below what the message can say.
        let ttl = ttl.try_into().ok();
        Ok(Response::new(AnnounceResponse { instance, ttl }))
    }

    async fn withdraw(
        &self,
        request: Request<WithdrawRequest>,
    ) -> Result<Response<WithdrawResponse>, Status> {
        let caller = Caller::of(&request)?.clone();
        let WithdrawRequest { service, name } = request.into_inner();
        let by = match caller.role {
            Role::Editor | Role::Admin | Role::Core => None,
            Role::Agent | Role::Service | Role::Viewer | Role::Anonymous => Some(&*caller.identity),
        };
        let revision = self.catalog.withdraw(&service, &name, by).await?;
        Ok(Response::new(WithdrawResponse { revision }))
    }

    async fn get_instance(
        &self,
        request: Request<GetInstanceRequest>,
    ) -> Result<Response<GetInstanceResponse>, Status> {
        let GetInstanceRequest { service, name } = request.into_inner();
        let instance = Some((*self.catalog.get(&service, &name)?).clone());
        Ok(Response::new(GetInstanceResponse { instance }))
    }

    async fn list_instances(
        &self,
        request: Request<ListInstancesRequest>,
    ) -> Result<Response<ListInstancesResponse>, Status> {
        let ListInstancesRequest { service, node, attributes } = request.into_inner();
        let filter = Filter::try_from((service, node, attributes))?;
        let (instances, revision) = self.catalog.list(&filter);
        let instances = instances.into_iter().map(|instance| (*instance).clone()).collect();
        Ok(Response::new(ListInstancesResponse { instances, revision }))
    }

    async fn watch_instances(
        &self,
        request: Request<WatchInstancesRequest>,
    ) -> Result<Response<Self::WatchInstancesStream>, Status> {
        let place = self.watchers.take(&Caller::of(&request)?.identity)?;
        let WatchInstancesRequest { service, node, attributes } = request.into_inner();
        let filter = Filter::try_from((service, node, attributes))?;
        let events = stream::unfold(self.catalog.watch(filter), next);
        // Held as long as the stream is.
        Ok(Response::new(events.inspect(move |_| _ = &place).map(Ok).boxed()))
    }
}

async fn next(mut watcher: Watcher) -> Option<(WatchInstancesResponse, Watcher)> {
    use watch_instances_response::Event as Kind;
    let (kind, revision, instance) = match watcher.next().await? {
        Event::Upsert(revision, instance) => (Kind::Upsert, revision, Some(instance)),
        Event::Delete(revision, instance) => (Kind::Delete, revision, Some(instance)),
        Event::Synced(revision) => (Kind::Synced, revision, None),
        Event::Reset(revision) => (Kind::Reset, revision, None),
    };
    let instance = instance.map(|instance| (*instance).clone());
    Some((WatchInstancesResponse { event: kind.into(), revision, instance }, watcher))
}

/// A service announces itself, an agent what runs on its own VM.
fn check_caller(caller: &Caller, instance: &Instance) -> Result<(), Error> {
    let (field, value, own) = match caller.role {
        Role::Editor | Role::Admin | Role::Core => return Ok(()),
        Role::Agent => ("node", &instance.node, caller.name_as(Kind::Agent)),
        Role::Service => ("service", &instance.service, caller.name_as(Kind::Service)),
        Role::Viewer | Role::Anonymous => ("service", &instance.service, None),
    };
    if own == Some(value) {
        return Ok(());
    }
    Err(Error::Denied(format!(
        "instance.{field}: {} may not announce `{value}`, but `{}`",
        caller.identity,
        own.unwrap_or_default()
    )))
}
