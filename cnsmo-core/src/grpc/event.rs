//! `EventService`.

use cnsmo_proto::pb::event::{
    WatchEventsRequest, WatchEventsResponse, event_service_server::EventService,
};
use futures::{StreamExt as _, stream::BoxStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{quota::Quota, until_stopped};
use crate::{
    error::Error,
    events::{Events, Filter},
    identity::caller::Caller,
    store::Store,
};

/// Watches of this core; a further one is refused. Each keeps one batch of commits at most.
const WATCHERS_MAX: usize = 256;
/// Watches of one identity; a further one is refused.
const WATCHERS_PER_IDENTITY_MAX: usize = 64;
/// As the events name them.
const KINDS: [&str; 6] =
    ["deployment", "firewall-policy", "instance", "load-balancer", "network", "node"];

#[derive(Debug)]
pub(super) struct Service {
    store: Store,
    watchers: Quota,
    /// Ends the streams.
    stopping: CancellationToken,
}

impl Service {
    pub(super) fn new(store: Store, stopping: CancellationToken) -> Self {
        let watchers = Quota::new("event watches", WATCHERS_MAX, WATCHERS_PER_IDENTITY_MAX);
        Self { store, watchers, stopping }
    }
}

#[tonic::async_trait]
impl EventService for Service {
    type WatchEventsStream = BoxStream<'static, Result<WatchEventsResponse, Status>>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let place = self.watchers.take(&Caller::of(&request)?.identity)?;
        let WatchEventsRequest { from_revision, follow, kinds, name } = request.into_inner();
        if from_revision < 0 {
            return Err(Error::Invalid("from_revision: is negative".into()).into());
        }
        if let Some(unknown) = kinds.iter().find(|kind| !KINDS.contains(&kind.as_str())) {
            let known = KINDS.join(", ");
            let why = format!("kinds: `{unknown}` is none of {known}");
            return Err(Error::Invalid(why).into());
        }
        let filter = Filter { kinds, name };
        let events = Events::new(&self.store, from_revision, filter, follow).await?;
        let stream =
            until_stopped(events.stream().boxed(), self.stopping.clone()).map(move |message| {
                // Held as long as the stream is.
                let _place = &place;
                message
            });
        Ok(Response::new(stream.boxed()))
    }
}
