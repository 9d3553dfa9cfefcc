//! The live streams of agents, for those who ask an agent something: commands go down, answers come up.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cnsmo_proto::pb::agent::{Command, CommandResult, command, command_result::Result as Outcome};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::timeout,
};
use tonic::{Code, Status};

use crate::fleet::{DOWN_MAX, Down};

/// Commands that one agent has not answered yet; a further one is refused.
const COMMANDS_MAX: usize = 16;
/// Places in the queue to an agent that commands leave free: without one the agent would be cut.
const RESERVED: usize = DOWN_MAX / 2;

/// Agents that are connected to this core. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Links {
    links: Arc<Mutex<BTreeMap<String, Link>>>,
}

type Messages = mpsc::WeakSender<Result<Down, Status>>;

#[derive(Debug)]
struct Link {
    session: u64,
    /// The core's task alone keeps the stream open.
    messages: Messages,
    last_id: u64,
    waiting: HashMap<u64, oneshot::Sender<CommandResult>>,
    report_again: Arc<Notify>,
}

/// A stream as long as it lives.
#[derive(Debug)]
pub struct Open {
    links: Links,
    node: String,
    session: u64,
    /// Told when what the agent has reported is to be kept anew.
    pub report_again: Arc<Notify>,
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut links = self.links.links();
        if links.get(&self.node).is_some_and(|link| link.session == self.session) {
            links.remove(&self.node);
        }
    }
}

impl Links {
    /// A new stream, in place of an older one of the same agent.
    pub fn open(&self, node: &str, session: u64, messages: Messages) -> Open {
        let report_again = Arc::<Notify>::default();
        let link = Link {
            session,
            messages,
            last_id: 0,
            waiting: HashMap::new(),
            report_again: report_again.clone(),
        };
        // Whoever waits for an answer from the older one is told that it is gone.
        self.links().insert(node.to_owned(), link);
        Open { links: self.clone(), node: node.to_owned(), session, report_again }
    }

    /// An answer has come.
    pub fn answered(&self, open: &Open, result: CommandResult) {
        let mut links = self.links();
        let link = links.get_mut(&open.node).filter(|link| link.session == open.session);
        if let Some(asker) = link.and_then(|link| link.waiting.remove(&result.id)) {
            // It may have gone away.
            let _ = asker.send(result);
        }
    }

    /// Names of the agents, in order.
    pub fn nodes(&self) -> Vec<String> {
        self.links().keys().cloned().collect()
    }

    /// What an agent has reported was judged meanwhile: it is to be kept as it was reported.
    pub fn report_again(&self, node: &str) {
        if let Some(link) = self.links().get(node) {
            link.report_again.notify_one();
        }
    }

    /// Has an agent carry out a command, and waits for its answer for so long.
    ///
    /// # Errors
    /// Of the agent; UNAVAILABLE if it is not connected, DEADLINE_EXCEEDED if it does not answer.
    pub async fn ask(
        &self,
        node: &str,
        command: command::Command,
        patience: Duration,
    ) -> Result<Outcome, Status> {
        let (_, outcome) = self.ask_on(node, None, command, patience).await?;
        Ok(outcome)
    }

    /// As [`Self::ask`], on this stream or none; without one on that of now. Returns which one it was, too.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub async fn ask_on(
        &self,
        node: &str,
        session: Option<u64>,
        command: command::Command,
        patience: Duration,
    ) -> Result<(u64, Outcome), Status> {
        let (session, id, answer) = self.send(node, session, command)?;
        let _waiting = Waiting { links: self, node, session, id };
        let result = timeout(patience, answer).await.map_err(|_| {
            Status::deadline_exceeded(format!(
                "node {node} has not answered within {} s; it may carry the command out all the same",
                patience.as_secs()
            ))
        })?;
        let result = result.map_err(|_| {
            Status::unavailable(format!("the connection of node {node} was lost meanwhile"))
        })?;
        if result.code != 0 {
            let code = Code::from(i32::try_from(result.code).unwrap_or_default());
            return Err(Status::new(code, format!("node {node}: {}", result.message)));
        }
        let outcome = result.result;
        let outcome =
            outcome.ok_or_else(|| Status::internal(format!("node {node} answers nothing")))?;
        Ok((session, outcome))
    }

    /// Has an agent carry out a command, if it is still there, and does not wait for the answer.
    pub fn tell(&self, node: &str, session: u64, command: command::Command) {
        if let Ok((session, id, _)) = self.send(node, Some(session), command) {
            drop(Waiting { links: self, node, session, id });
        }
    }

    fn send(
        &self,
        node: &str,
        session: Option<u64>,
        command: command::Command,
    ) -> Result<(u64, u64, oneshot::Receiver<CommandResult>), Status> {
        let absent = || Status::unavailable(format!("node {node} is not connected to this core"));
        let busy =
            || Status::resource_exhausted(format!("node {node} has commands to answer: try again"));
        let mut links = self.links();
        let link = links.get_mut(node).ok_or_else(absent)?;
        if session.is_some_and(|session| session != link.session) {
            let text = format!("the connection of node {node} was lost meanwhile");
            return Err(Status::unavailable(text));
        }
        let messages = link.messages.upgrade().ok_or_else(absent)?;
        if link.waiting.len() >= COMMANDS_MAX || messages.capacity() <= RESERVED {
            return Err(busy());
        }
        link.last_id += 1;
        let id = link.last_id;
        let command = Command { id, command: Some(command) };
        messages.try_send(Ok(Down::Command(Box::new(command)))).map_err(|_| busy())?;
        let (asker, answer) = oneshot::channel();
        link.waiting.insert(id, asker);
        Ok((link.session, id, answer))
    }

    fn links(&self) -> MutexGuard<'_, BTreeMap<String, Link>> {
        // Each change of it is whole before anything can panic.
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One who waits for an answer; gone, it makes room for another one.
struct Waiting<'a> {
    links: &'a Links,
    node: &'a str,
    session: u64,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut links = self.links.links();
        if let Some(link) = links.get_mut(self.node).filter(|link| link.session == self.session) {
            link.waiting.remove(&self.id);
        }
    }
}
