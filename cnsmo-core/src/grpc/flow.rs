//! `FlowService`: what the agents of the VMs tell of packets.

use std::time::Duration;

use cnsmo_proto::{
    model::Labels,
    pb::{
        agent::{command::Command, command_result::Result as Outcome},
        flow::{
            ExplainRequest, ExplainResponse, Judgement, ListFlowsRequest, ListFlowsResponse,
            PacketQuery, ReadRecordsRequest, ReadRecordsResponse, RecordsPage, RecordsQuery,
            flow_service_server::FlowService,
        },
        resource::{Kind, resource::Resource},
    },
};
use futures::{StreamExt as _, stream::BoxStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::{quota::Quota, until_stopped};
use crate::{
    actor::Core,
    error::Error,
    explain::{self, Judges, Map},
    identity::caller::Caller,
    links::Links,
};

/// Readers of this core; a further one is refused. Each keeps one page at most.
const READERS_MAX: usize = 64;
/// Readers of one identity; a further one is refused.
const READERS_PER_IDENTITY_MAX: usize = 16;
/// For an answer of an agent.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two questions of one who follows: agents take few commands at a time, and none shall be held for long.
const PAUSE: Duration = Duration::from_millis(500);
/// Records in one message.
const PAGE: u32 = 500;

#[derive(Debug)]
pub(super) struct Service {
    core: Core,
    links: Links,
    readers: Quota,
    /// Ends the streams.
    stopping: CancellationToken,
}

impl Service {
    pub(super) fn new(core: Core, links: Links, stopping: CancellationToken) -> Self {
        let readers = Quota::new("readers of records", READERS_MAX, READERS_PER_IDENTITY_MAX);
        Self { core, links, readers, stopping }
    }

    async fn map(&self) -> Result<Map, Error> {
        let mut map = Map::default();
        for kind in [Kind::Node, Kind::Network, Kind::LoadBalancer] {
            let (resources, _) = self.core.list(kind, None, Labels::default()).await?;
            for resource in resources {
                match resource.resource {
                    Some(Resource::Node(node)) => map.nodes.push(node),
                    Some(Resource::Network(network)) => map.networks.push(network),
                    Some(Resource::LoadBalancer(balancer)) => map.balancers.push(balancer),
                    _ => {}
                }
            }
        }
        Ok(map)
    }
}

#[tonic::async_trait]
impl FlowService for Service {
    type ReadRecordsStream = BoxStream<'static, Result<ReadRecordsResponse, Status>>;

    async fn explain(
        &self,
        request: Request<ExplainRequest>,
    ) -> Result<Response<ExplainResponse>, Status> {
        let request = request.into_inner();
        let map = self.map().await?;
        Ok(Response::new(explain::explain(&map, &request, &self.links).await?))
    }

    async fn list_flows(
        &self,
        request: Request<ListFlowsRequest>,
    ) -> Result<Response<ListFlowsResponse>, Status> {
        let request = request.into_inner();
        let node = request.node.clone();
        if node.is_empty() {
            return Err(Error::Invalid("node: missing".into()).into());
        }
        match self.links.ask(&node, Command::Flows(request), PATIENCE).await? {
            Outcome::Flows(flows) => Ok(Response::new(flows)),
            _ => Err(other_answer()),
        }
    }

    async fn read_records(
        &self,
        request: Request<ReadRecordsRequest>,
    ) -> Result<Response<Self::ReadRecordsStream>, Status> {
        let place = self.readers.take(&Caller::of(&request)?.identity)?;
        let ReadRecordsRequest { node, tail, follow } = request.into_inner();
        if node.is_empty() {
            return Err(Error::Invalid("node: missing".into()).into());
        }
        let links = self.links.clone();
        // Before the stream begins, so that a VM that is not there is an error of the call.
        let first = ask(&links, &node, first_query(tail)).await?;
        let reader = Reader { links, node, follow, page: Some(first) };
        let pages = futures::stream::unfold(reader, Reader::next);
        let stream = until_stopped(pages.boxed(), self.stopping.clone()).map(move |message| {
            // Held as long as the stream is.
            let _place = &place;
            message
        });
        Ok(Response::new(stream.boxed()))
    }
}

#[tonic::async_trait]
impl Judges for Links {
    async fn judge(&self, node: &str, packet: PacketQuery) -> Result<Judgement, Status> {
        match self.ask(node, Command::Explain(packet), PATIENCE).await? {
            Outcome::Judgement(judgement) => Ok(judgement),
            _ => Err(other_answer()),
        }
    }
}

/// All that are kept are more than one page: from the start.
fn first_query(tail: u32) -> RecordsQuery {
    match tail {
        0 => RecordsQuery { from: Some(0), max: PAGE },
        tail => RecordsQuery { from: None, max: tail.min(PAGE) },
    }
}

struct Reader {
    links: Links,
    node: String,
    follow: bool,
    /// To be handed out; `None`: the end was told.
    page: Option<RecordsPage>,
}

impl Reader {
    async fn next(mut self) -> Option<(Result<ReadRecordsResponse, Status>, Self)> {
        loop {
            let RecordsPage { records, next, missed } = self.page.take()?;
            let is_last = records.is_empty();
            if is_last && !self.follow {
                return None;
            }
            if is_last {
                tokio::time::sleep(PAUSE).await;
            }
            let query = RecordsQuery { from: Some(next), max: PAGE };
            let error = match ask(&self.links, &self.node, query).await {
                Ok(page) => {
                    self.page = Some(page);
                    None
                }
                Err(status) => Some(status),
            };
            if !is_last {
                // The error, if it lasts, is met by the next question.
                if error.is_some() {
                    self.page = Some(RecordsPage { records: Vec::new(), next, missed: 0 });
                }
                return Some((Ok(ReadRecordsResponse { records, missed }), self));
            }
            if let Some(status) = error {
                return Some((Err(status), self));
            }
        }
    }
}

async fn ask(links: &Links, node: &str, query: RecordsQuery) -> Result<RecordsPage, Status> {
    match links.ask(node, Command::Records(query), PATIENCE).await? {
        Outcome::Records(page) => Ok(page),
        _ => Err(other_answer()),
    }
}

pub(super) fn other_answer() -> Status {
    Status::internal("the agent answers something else than it was asked")
}
