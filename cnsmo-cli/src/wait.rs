//! Waits for VMs; progress goes to standard error.

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Result, bail};
use cnsmo_proto::{
    manifest,
    model::Labels,
    pb::{
        node::{Node, node_status::Phase},
        resource::{
            Kind, PendingNode, WaitAppliedRequest, WaitAppliedResponse, WatchRequest,
            resource::Resource as Inner, watch_response::Event,
        },
    },
};
use tokio::time::{Instant, timeout_at};

use crate::{
    EXIT_TIMEOUT,
    args::WaitArgs,
    client::{Client, Resources, refused},
    output::{or_none, table},
};

/// The core ends the wait itself; this much later it is taken for dead.
const GRACE: Duration = Duration::from_secs(10);

pub(crate) async fn wait(client: &Client, args: WaitArgs) -> Result<ExitCode> {
    let mut core = client.resources().await?;
    if args.ready {
        return ready(&mut core, &args.selector, args.timeout).await;
    }
    applied(&mut core, args.revision, args.selector, args.timeout).await
}

/// Until the selected VMs enforce `revision`; 0: the current one.
pub(crate) async fn applied(
    core: &mut Resources,
    revision: i64,
    selector: Labels,
    timeout: Duration,
) -> Result<ExitCode> {
    let request = WaitAppliedRequest {
        revision,
        selector: selector.as_map().clone(),
        timeout: Some(prost_types::Duration::try_from(timeout)?),
    };
    let deadline = Instant::now() + timeout + GRACE;
    let mut last = WaitAppliedResponse::default();
    let answers = async {
        let mut stream = core.wait_applied(request).await.map_err(refused)?.into_inner();
        while let Some(response) = stream.message().await.map_err(refused)? {
            progress(&response)?;
            last = response;
            if last.done {
                return Ok(());
            }
        }
        bail!("the core ended the wait without a result")
    };
    match timeout_at(deadline, answers).await {
        Ok(result) => result?,
        Err(_) => writeln!(io::stderr(), "the core does not answer")?,
    }
    if last.done && last.applied {
        return Ok(ExitCode::SUCCESS);
    }
    let all = last.nodes_applied as usize + last.pending.len();
    writeln!(io::stderr(), "timed out; not applied by {} of {all} VMs:", last.pending.len())?;
    print_pending(&last.pending)
}

/// Until there are selected VMs and all are ready.
async fn ready(core: &mut Resources, selector: &Labels, timeout: Duration) -> Result<ExitCode> {
    let deadline = Instant::now() + timeout;
    let mut waiting = Waiting::default();
    let request = WatchRequest { kind: Kind::Node.into(), name: String::new() };
    let changes = async {
        let mut stream = core.watch(request).await.map_err(refused)?.into_inner();
        while let Some(response) = stream.message().await.map_err(refused)? {
            let node = match response.resource.as_ref().and_then(|r| r.resource.as_ref()) {
                Some(Inner::Node(node)) => Some(node),
                _ => None,
            };
            match (response.event(), node) {
                (Event::Upsert, Some(node)) => waiting.upsert(selector, node),
                (Event::Delete, Some(node)) => waiting.remove(node),
                (Event::Synced, _) => waiting.synced = true,
                (Event::Unspecified | Event::Upsert | Event::Delete, _) => {}
            }
            if !waiting.synced {
                continue;
            }
            writeln!(io::stderr(), "{} of {} VMs ready", waiting.ready(), waiting.nodes.len())?;
            if waiting.is_over() {
                return Ok(());
            }
        }
        bail!("the core ended the watch")
    };
    match timeout_at(deadline, changes).await {
        Ok(result) => result.map(|()| ExitCode::SUCCESS),
        Err(_) => {
            let pending = waiting.pending();
            if waiting.nodes.is_empty() {
                writeln!(io::stderr(), "timed out; no VM has these labels")?;
            } else {
                let (late, all) = (pending.len(), waiting.nodes.len());
                writeln!(io::stderr(), "timed out; {late} of {all} VMs not ready:")?;
            }
            print_pending(&pending)
        }
    }
}

/// The selected VMs as the watch has told so far.
#[derive(Default)]
struct Waiting {
    nodes: BTreeMap<String, Node>,
    synced: bool,
}

impl Waiting {
    fn upsert(&mut self, selector: &Labels, node: &Node) {
        let metadata = node.metadata.clone().unwrap_or_default();
        let selected =
            selector.as_map().iter().all(|(key, value)| metadata.labels.get(key) == Some(value));
        if selected {
            self.nodes.insert(metadata.name, node.clone());
        } else {
            self.nodes.remove(&metadata.name);
        }
    }

    fn remove(&mut self, node: &Node) {
        if let Some(metadata) = &node.metadata {
            self.nodes.remove(&metadata.name);
        }
    }

    fn ready(&self) -> usize {
        self.nodes.values().filter(|node| phase(node) == Phase::Ready).count()
    }

    fn is_over(&self) -> bool {
        !self.nodes.is_empty() && self.ready() == self.nodes.len()
    }

    fn pending(&self) -> Vec<PendingNode> {
        let pending = |(name, node): (&String, &Node)| PendingNode {
            node: name.clone(),
            reason: manifest::phase(phase(node)).to_owned(),
            message: node.status.as_ref().map(|s| s.message.clone()).unwrap_or_default(),
        };
        self.nodes.iter().filter(|(_, n)| phase(n) != Phase::Ready).map(pending).collect()
    }
}

fn phase(node: &Node) -> Phase {
    node.status.as_ref().map_or(Phase::Unspecified, cnsmo_proto::pb::node::NodeStatus::phase)
}

fn progress(response: &WaitAppliedResponse) -> Result<()> {
    let applied = response.nodes_applied;
    let all = applied as usize + response.pending.len();
    writeln!(io::stderr(), "revision {}: applied by {applied} of {all} VMs", response.revision)?;
    Ok(())
}

fn print_pending(pending: &[PendingNode]) -> Result<ExitCode> {
    if !pending.is_empty() {
        let row = |p: &PendingNode| vec![p.node.clone(), p.reason.clone(), or_none(&p.message)];
        let rows = pending.iter().map(row).collect();
        writeln!(io::stderr(), "{}", table(&["NODE", "REASON", "MESSAGE"], rows, "  "))?;
    }
    Ok(ExitCode::from(EXIT_TIMEOUT))
}
