//! `HostService` of all hosts: this core's own services here, those of the VMs through the streams of their agents.

mod follow;

use std::time::Duration;

use cnsmo_proto::pb::{
    agent::{command::Command, command_result::Result as Outcome},
    service::{
        GetFeaturesRequest, GetStatusRequest, KillRequest, ListServicesRequest,
        ListServicesResponse, ReadLogsRequest, RestartRequest, ServiceId, ServiceStatus,
        StartRequest, StopRequest,
    },
};
use cnsmo_service::host::front::{Local, LogStream, Steer, time};
use futures::{StreamExt as _, stream};
use tonic::{Code, Status};

use crate::{links::Links, own};

/// For an answer of an agent, beside the time that its service is given.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a service may take to stop if nobody says: longer than any host of ours allows.
const STOP_DEFAULT: Duration = Duration::from_secs(30);
/// Agents that are asked at a time, when all of them are.
const ASKED_AT_ONCE: usize = 64;

#[derive(Clone, Debug)]
pub(super) struct Hosts {
    own: Local,
    links: Links,
}

impl Hosts {
    pub(super) fn new(own: Local, links: Links) -> Self {
        Self { own, links }
    }

    /// Of this core and of all agents that are connected to it. One that leaves meanwhile, or does not answer, is left out.
    async fn list_all(&self) -> Vec<ServiceStatus> {
        let agents = stream::iter(self.links.nodes()).map(|node| async move {
            let command = Command::List(ListServicesRequest { node: node.clone() });
            match self.links.ask(&node, command, PATIENCE).await {
                Ok(Outcome::Services(all)) => all.services,
                Ok(_) => Vec::new(),
                Err(status) => {
                    tracing::debug!(node, %status, "services are not listed");
                    Vec::new()
                }
            }
        });
        let agents: Vec<_> = agents.buffered(ASKED_AT_ONCE).collect().await;
        let mut all: Vec<_> = agents.into_iter().flatten().chain(self.own.list()).collect();
        all.sort_by(|a, b| key(a).cmp(&key(b)));
        all
    }
}

fn key(status: &ServiceStatus) -> (&str, &str, &str) {
    let id = status.id.as_ref();
    id.map_or(("", "", ""), |id| (&*id.node, &*id.service, &*id.instance))
}

impl Steer for Hosts {
    async fn steer(&self, command: Command) -> Result<Outcome, Status> {
        let node = node_of(&command).to_owned();
        if node.is_empty()
            && let Command::List(_) = command
        {
            return Ok(Outcome::Services(ListServicesResponse { services: self.list_all().await }));
        }
        if node.is_empty() || node == own::NODE {
            return self.own.steer(command).await;
        }
        let patience = PATIENCE
            + match &command {
                Command::Stop(StopRequest { deadline, .. })
                | Command::Restart(RestartRequest { deadline, .. }) => {
                    time(*deadline)?.unwrap_or(STOP_DEFAULT)
                }
                _ => Duration::ZERO,
            };
        match self.links.ask(&node, command, patience).await {
            Err(status) if status.code() == Code::Unknown => {
                Err(Status::internal(status.message().to_owned()))
            }
            answer => answer,
        }
    }

    fn logs(&self, request: ReadLogsRequest) -> Result<LogStream, Status> {
        let node = request.id.as_ref().map_or("", |id| &id.node).to_owned();
        if node.is_empty() || node == own::NODE {
            return self.own.logs(request);
        }
        let links = self.links.clone();
        if request.follow {
            return Ok(follow::follow(links, node, request));
        }
        Ok(Box::pin(stream::once(async move {
            match links.ask(&node, Command::Logs(request), PATIENCE).await? {
                Outcome::Logs(logs) => Ok(logs),
                _ => Err(other_answer()),
            }
        })))
    }
}

fn other_answer() -> Status {
    Status::internal("the agent answers something else than it was asked")
}

fn node_of(command: &Command) -> &str {
    let id = match command {
        // Of no service; asked by another way.
        Command::Records(_) | Command::Explain(_) | Command::Flows(_) | Command::Preview(_) => {
            return "";
        }
        Command::List(ListServicesRequest { node }) => return node,
        Command::Start(StartRequest { id })
        | Command::Stop(StopRequest { id, .. })
        | Command::Restart(RestartRequest { id, .. })
        | Command::Kill(KillRequest { id })
        | Command::Status(GetStatusRequest { id })
        | Command::Features(GetFeaturesRequest { id })
        | Command::Logs(ReadLogsRequest { id, .. }) => id,
        Command::Follow(follow) => match &follow.logs {
            Some(ReadLogsRequest { id, .. }) => id,
            None => return "",
        },
    };
    id.as_ref().map_or("", |ServiceId { node, .. }| node)
}
