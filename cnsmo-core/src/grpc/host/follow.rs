//! The output of a service on a VM, as it is written.
//!
//! The agent is asked for a part when the reader has room for it, so nothing is kept here, and a slow reader costs the stream
//! of the agent nothing.

use std::time::Duration;

use cnsmo_proto::pb::{
    agent::{Follow, LogPart, command::Command, command_result::Result as Outcome},
    service::{ReadLogsRequest, ReadLogsResponse},
};
use cnsmo_service::host::front::LogStream;
use futures::stream;
use tonic::{Code, Status};

use super::{PATIENCE, other_answer};
use crate::links::Links;

/// How long an agent may wait for something to tell before it answers that there was nothing.
const WAIT: Duration = Duration::from_secs(5);
/// After such an answer, should it come too early.
const PAUSE: Duration = Duration::from_millis(100);

/// Up to the end of the instance; an error if the VM is lost before.
pub(super) fn follow(links: Links, node: String, logs: ReadLogsRequest) -> LogStream {
    let follower = Follower { links, node, first: Some(logs), known: None };
    Box::pin(stream::try_unfold(follower, |mut follower| async move {
        let lines = follower.next().await?;
        Ok(lines.map(|lines| (ReadLogsResponse { lines }, follower)))
    }))
}

struct Follower {
    links: Links,
    node: String,
    /// What the agent has not been asked yet.
    first: Option<ReadLogsRequest>,
    /// Stream of the agent, and number on it.
    known: Option<(u64, u64)>,
}

impl Follower {
    /// None: there will be no more.
    async fn next(&mut self) -> Result<Option<Vec<cnsmo_proto::pb::service::LogLine>>, Status> {
        loop {
            let logs = self.first.take();
            if logs.is_none() && self.known.is_none() {
                return Ok(None);
            }
            let LogPart { lines, ended, .. } = self.ask(logs).await?;
            if ended {
                self.known = None;
            }
            if !lines.is_empty() {
                return Ok(Some(lines));
            }
            if !ended {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    async fn ask(&mut self, logs: Option<ReadLogsRequest>) -> Result<LogPart, Status> {
        let session = self.known.map(|(session, _)| session);
        let follower = self.known.map_or(0, |(_, follower)| follower);
        // The first answer comes at once: then it is known whom to stop.
        let wait = if logs.is_some() { Duration::ZERO } else { WAIT };
        let wait = prost_types::Duration::try_from(wait).ok();
        let command = Command::Follow(Follow { logs, follower, wait, stop: false });
        let asked = self.links.ask_on(&self.node, session, command, WAIT + PATIENCE).await;
        match asked {
            Ok((session, Outcome::Part(part))) => {
                self.known = Some((session, part.follower));
                Ok(part)
            }
            Ok(_) => Err(other_answer()),
            Err(status) if status.code() == Code::Unknown => {
                Err(Status::internal(status.message().to_owned()))
            }
            Err(status) => Err(status),
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if let Some((session, follower)) = self.known {
            let stop = Follow { follower, stop: true, ..Follow::default() };
            self.links.tell(&self.node, session, Command::Follow(stop));
        }
    }
}
