//! Takes a VM out of the balancers, and puts it back.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;
use cnsmo_proto::pb::{
    balancer::{LoadBalancer, NodeBalancerStatus},
    meta::Metadata,
    node::{Node, NodeSpec},
    resource::{Kind, ListRequest, Resource, resource::Resource as Inner},
};
use tokio::time::{Instant, sleep_until};

use crate::{
    EXIT_TIMEOUT,
    args::DrainArgs,
    client::{Client, Resources, refused},
    label::{labels_of, update},
    output::{name_of, table},
};

/// Between two looks. Agents report a few times in it at most.
const POLL: Duration = Duration::from_millis(500);

pub(crate) async fn drain(client: &Client, args: DrainArgs) -> Result<ExitCode> {
    let mut core = client.resources().await?;
    let name = args.node.to_string();
    // The core takes labels as a whole.
    let labels = labels_of(&mut core, &name).await?;
    let metadata = Metadata { name: name.clone(), labels, ..Metadata::default() };
    let spec = NodeSpec { draining: !args.undo };
    let node = Node { metadata: Some(metadata), spec: Some(spec), status: None };
    let revision = update(&mut core, node).await?;
    let word = if args.undo { "takes new flows" } else { "draining" };
    writeln!(io::stdout(), "node/{name} {word}\nrevision {revision}")?;
    if args.wait {
        return drained(&mut core, &name, args.timeout).await;
    }
    Ok(ExitCode::SUCCESS)
}

/// Until each VM that balances over the node has stopped to give it flows and has none left.
async fn drained(core: &mut Resources, node: &str, timeout: Duration) -> Result<ExitCode> {
    let deadline = Instant::now() + timeout;
    let mut told = None;
    loop {
        let request = ListRequest { kind: Kind::LoadBalancer.into(), labels: Default::default() };
        let resources = core.list(request).await.map_err(refused)?.into_inner().resources;
        let left: Vec<_> = resources.iter().flat_map(|balancer| left(balancer, node)).collect();
        let flows = left.iter().map(|left| left.flows).sum::<u64>();
        if told.replace((flows, left.len())) != Some((flows, left.len())) {
            writeln!(io::stderr(), "{flows} flows left on {} VMs that balance", left.len())?;
        }
        if left.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        if Instant::now() >= deadline {
            writeln!(io::stderr(), "timed out; {node} is not drained:")?;
            let rows = left.into_iter().map(Left::row).collect();
            let header = ["BALANCER", "ON", "FLOWS", "REASON"];
            writeln!(io::stderr(), "{}", table(&header, rows, "  "))?;
            return Ok(ExitCode::from(EXIT_TIMEOUT));
        }
        sleep_until(deadline.min(Instant::now() + POLL)).await;
    }
}

/// A VM that balances and has not let go of the node.
struct Left {
    balancer: String,
    on: String,
    flows: u64,
    reason: String,
}

impl Left {
    fn row(self) -> Vec<String> {
        vec![self.balancer, self.on, self.flows.to_string(), self.reason]
    }
}

/// A VM that balances and says nothing of the node is the node itself: no VM is its own backend.
fn left(balancer: &Resource, node: &str) -> Vec<Left> {
    let Some(Inner::LoadBalancer(LoadBalancer { status: Some(status), .. })) = &balancer.resource
    else {
        return vec![];
    };
    let is_backend = status.backends.iter().any(|backend| backend.node == node);
    let on = |on: &NodeBalancerStatus| {
        let here = on.backends.iter().filter(|backend| backend.node == node);
        let state = here.map(|backend| (backend.active, backend.flows));
        let state = state.reduce(|a, b| (a.0 || b.0, a.1 + b.1));
        let reason = match state {
            // Silent, it may hold flows that it has not told of.
            None if is_backend && on.node != node && !on.applied => "not applied",
            None | Some((false, 0)) => return None,
            Some((true, _)) => "gives it new flows",
            Some((false, _)) => "its flows go on",
        };
        let reason = match on.message.as_str() {
            "" => reason.to_owned(),
            message => format!("{reason}: {message}"),
        };
        let flows = state.map_or(0, |(_, flows)| flows);
        Some(Left { balancer: name_of(balancer).to_owned(), on: on.node.clone(), flows, reason })
    };
    status.nodes.iter().filter_map(on).collect()
}
