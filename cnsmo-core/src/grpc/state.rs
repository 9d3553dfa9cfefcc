//! `StateService`.

mod access;
mod check;
mod page;
mod watch;

use std::time::Duration;

use cnsmo_proto::pb::state::{
    GetRequest, GetResponse, GrantLeaseRequest, GrantLeaseResponse, KeepAliveLeaseRequest,
    KeepAliveLeaseResponse, KeyValue, ListRequest, ListResponse, RevokeLeaseRequest,
    RevokeLeaseResponse, TxnRequest, TxnResponse, WatchRequest, WatchResponse,
    state_service_server::StateService,
};
use futures::{StreamExt as _, stream::BoxStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use self::{access::Access, watch::Watcher};
use super::{quota::Quota, until_stopped};
use crate::{
    error::Error,
    lease::{Leases, TTL_MAX, TTL_MIN},
    store::{Entry, LeaseId, Range, Revision, Slice, Store, StoreError},
};

/// Largest message of a client: a transaction of [`check::TXN_BYTES_MAX`], and what goes around its keys and values.
pub(super) const MESSAGE_BYTES_MAX: usize = check::TXN_BYTES_MAX + (256 << 10);
/// Watches of this core; a further one is refused. Each takes some kilobytes, and buffers that HTTP/2 bounds.
const WATCHERS_MAX: usize = 10_000;
/// Watches of one identity; a further one is refused.
const WATCHERS_PER_IDENTITY_MAX: usize = 1_000;
/// Keys of a page, if the client does not say.
const PAGE_KEYS_DEFAULT: usize = 1_000;
const PAGE_KEYS_MAX: usize = 10_000;
/// A page ends with the key that reaches so many bytes. Together with the largest value it stays below the 4 MiB that gRPC
/// clients take unless told otherwise.
const PAGE_BYTES: usize = 2 << 20;
/// How long a call waits for a revision that another core has committed; it takes milliseconds unless something is wrong.
const REACHED_TIMEOUT: Duration = Duration::from_secs(5);

/// How many may watch.
pub(super) fn watchers() -> Quota {
    Quota::new("watches", WATCHERS_MAX, WATCHERS_PER_IDENTITY_MAX)
}

#[derive(Debug)]
pub(super) struct Service {
    store: Store,
    leases: Leases,
    watchers: Quota,
    stopping: CancellationToken,
}

impl Service {
    /// `watchers`: see [`watchers`].
    pub(super) fn new(
        store: Store,
        leases: Leases,
        watchers: Quota,
        stopping: CancellationToken,
    ) -> Self {
        Self { store, leases, watchers, stopping }
    }
}

#[tonic::async_trait]
impl StateService for Service {
    type WatchStream = BoxStream<'static, Result<WatchResponse, Status>>;
    type KeepAliveLeaseStream = BoxStream<'static, Result<KeepAliveLeaseResponse, Status>>;

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let access = Access::of(&request)?;
        let GetRequest { key, min_revision } = request.into_inner();
        check::key("key", &key)?;
        access.read("key", &key)?;
        reach(&self.store, "min_revision", min_revision).await?;
        let (entry, revision) = self.store.get(&key).await.map_err(Error::from)?;
        Ok(Response::new(GetResponse { kv: entry.map(key_value), revision }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let access = Access::of(&request)?;
        let ListRequest { prefix, page_size, page_token, min_revision, keys_only } =
            request.into_inner();
        check::prefix("prefix", &prefix)?;
        access.read_all("prefix", &prefix)?;
        let rows = match usize::try_from(page_size) {
            Ok(0) => PAGE_KEYS_DEFAULT,
            Ok(size) if size <= PAGE_KEYS_MAX => size,
            _ => {
                let message = format!("page_size: {page_size} is not one of 0 to {PAGE_KEYS_MAX}");
                return Err(Error::Invalid(message).into());
            }
        };
        reach(&self.store, "min_revision", min_revision).await?;
        let (at, after) = match page::decode(&page_token, &prefix)? {
            Some((revision, key)) => (Some(revision), Some(key)),
            None => (None, None),
        };
        let range = Range { prefix, after, at, rows, bytes: PAGE_BYTES, keys_only };
        Ok(Response::new(self.page(range, &access).await?))
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let access = Access::of(&request)?;
        let txn = check::txn(request.into_inner(), &access)?;
        let outcome = self.store.commit(txn).await.map_err(Error::from)?;
        let kvs = outcome.reads.into_iter().map(|read| match read.entry {
            Some(entry) => key_value(entry),
            None => KeyValue { key: read.key, ..KeyValue::default() },
        });
        Ok(Response::new(TxnResponse {
            succeeded: outcome.succeeded,
            revision: outcome.revision,
            kvs: kvs.collect(),
        }))
    }

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let access = Access::of(&request)?;
        let watch = check::watch(request.into_inner())?;
        access.read_all("prefix", &watch.prefix)?;
        let place = self.watchers.take(access.identity())?;
        let watcher = Watcher::new(self.store.clone(), access, watch);
        reach(&self.store, "start_revision", watcher.start()).await?;
        // Held as long as the stream is.
        let stream = watcher.stream().inspect(move |_| _ = &place);
        Ok(Response::new(until_stopped(stream.boxed(), self.stopping.clone()).boxed()))
    }

    async fn grant_lease(
        &self,
        request: Request<GrantLeaseRequest>,
    ) -> Result<Response<GrantLeaseResponse>, Status> {
        let access = Access::of(&request)?;
        let ttl = check::duration("ttl", request.into_inner().ttl, TTL_MIN, TTL_MAX)?
            .ok_or_else(|| Error::Invalid("ttl: missing".into()))?;
        let lease = self.leases.grant(access.identity(), ttl).await?;
        Ok(Response::new(GrantLeaseResponse {
            lease_id: lease.id,
            ttl: wire(lease.ttl),
            fencing_token: lease.token,
        }))
    }

    async fn keep_alive_lease(
        &self,
        request: Request<Streaming<KeepAliveLeaseRequest>>,
    ) -> Result<Response<Self::KeepAliveLeaseStream>, Status> {
        let access = Access::of(&request)?;
        // No more is taken from the client than it takes from here.
        let renewals =
            KeepAlive { leases: self.leases.clone(), access, requests: request.into_inner() };
        let stream = futures::stream::try_unfold(renewals, KeepAlive::next).boxed();
        Ok(Response::new(until_stopped(stream, self.stopping.clone()).boxed()))
    }

    async fn revoke_lease(
        &self,
        request: Request<RevokeLeaseRequest>,
    ) -> Result<Response<RevokeLeaseResponse>, Status> {
        let access = Access::of(&request)?;
        let id = check::lease("lease_id", request.into_inner().lease_id)?;
        match self.leases.revoke(id, access.owner()).await? {
            Some(revision) => Ok(Response::new(RevokeLeaseResponse { revision })),
            None => Err(Error::NotFound(format!("lease_id: there is no lease {id}")).into()),
        }
    }
}

impl Service {
    /// Reads on until there is something that the caller may see: the token names the last key that was looked at, and shall
    /// not tell the name of another.
    async fn page(&self, mut range: Range, access: &Access) -> Result<ListResponse, Error> {
        loop {
            let slice = self.store.range(range.clone()).await.map_err(|error| match error {
                StoreError::Compacted { at } => Error::OutOfRange(format!(
                    "page_token: the revision that the list is of has been compacted, as all up to {at}: list again"
                )),
                error => error.into(),
            })?;
            let Slice { mut entries, revision, more } = slice;
            let last = entries.last().map(|entry| entry.key.clone());
            entries.retain(|entry| access.reads(&entry.key));
            let next_page_token = match (entries.last(), last) {
                (Some(seen), Some(_)) if more => page::encode(revision, &range.prefix, &seen.key),
                (None, Some(last)) if more => {
                    range.after = Some(last);
                    range.at = Some(revision);
                    continue;
                }
                _ => String::new(),
            };
            let kvs = entries.into_iter().map(key_value).collect();
            return Ok(ListResponse { kvs, next_page_token, revision });
        }
    }
}

/// One stream of renewals.
struct KeepAlive {
    leases: Leases,
    access: Access,
    requests: Streaming<KeepAliveLeaseRequest>,
}

impl KeepAlive {
    async fn next(mut self) -> Result<Option<(KeepAliveLeaseResponse, Self)>, Status> {
        let Some(request) = self.requests.message().await? else { return Ok(None) };
        let lease_id: LeaseId = check::lease("lease_id", request.lease_id)?;
        let ttl = self.leases.renew(lease_id, self.access.owner()).await?;
        let gone = ttl.is_none();
        let ttl = ttl.and_then(wire);
        Ok(Some((KeepAliveLeaseResponse { lease_id, ttl, gone }, self)))
    }
}

/// Waits until this core has a revision.
async fn reach(store: &Store, field: &str, revision: Revision) -> Result<(), Error> {
    if revision < 0 {
        return Err(Error::Invalid(format!("{field}: is negative")));
    }
    if revision <= store.revision() {
        return Ok(());
    }
    tokio::time::timeout(REACHED_TIMEOUT, store.reached(revision)).await.map_err(|_| {
        let newest = store.revision();
        Error::OutOfRange(format!(
            "{field}: there is no revision {revision}; the newest one is {newest}"
        ))
    })
}

fn key_value(entry: Entry) -> KeyValue {
    KeyValue {
        key: entry.key,
        value: entry.value,
        content_type: entry.content_type,
        create_revision: entry.create_revision,
        mod_revision: entry.mod_revision,
        version: entry.version,
        lease_id: entry.lease,
    }
}

fn wire(duration: Duration) -> Option<prost_types::Duration> {
    // Leases are far shorter than the message can say.
    prost_types::Duration::try_from(duration).ok()
}
