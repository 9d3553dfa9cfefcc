use std::io::{self, Write as _};

use anyhow::{Context as _, Result, bail};
use cnsmo_proto::{
    manifest::{self, Manifest},
    pb::resource::{
        Kind, Resource, WatchRequest, WatchResponse, resource::Resource as Inner,
        watch_response::Event,
    },
};
use serde::Serialize;

use crate::{
    args::Format,
    backends,
    client::{Client, refused},
    deployment::state,
    get::is_draining,
    output::{kind_of, kind_word, name_of, print_text, print_yaml},
};

/// One line, or document, per event; until the core ends.
pub(crate) async fn watch(client: &Client, format: Format, kind: Kind, name: String) -> Result<()> {
    let request = WatchRequest { kind: kind.into(), name };
    let mut core = client.resources().await?;
    let mut stream = core.watch(request).await.map_err(refused)?.into_inner();
    while let Some(response) = stream.message().await.map_err(refused)? {
        print(format, &response)?;
    }
    bail!("the core ended the watch")
}

#[derive(Serialize)]
struct EventDocument {
    event: &'static str,
    revision: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource: Option<Manifest>,
}

fn print(format: Format, response: &WatchResponse) -> Result<()> {
    let event = match response.event() {
        Event::Unspecified => "unknown",
        Event::Upsert => "upsert",
        Event::Delete => "delete",
        Event::Synced => "synced",
    };
    let revision = response.revision;
    let document = || EventDocument {
        event,
        revision,
        resource: response.resource.as_ref().and_then(Manifest::new),
    };
    match format {
        Format::Json => {
            let line = serde_json::to_string(&document()).context("failed to write JSON")?;
            writeln!(io::stdout(), "{line}")?;
        }
        Format::Yaml => {
            print_text("---\n")?;
            print_yaml(&document())?;
        }
        Format::Table => {
            let what = response.resource.as_ref().map(summary).unwrap_or_default();
            let line = format!("{event:<7} {revision:>8} {what}");
            writeln!(io::stdout(), "{}", line.trim_end())?;
        }
    }
    io::stdout().flush()?;
    Ok(())
}

fn summary(resource: &Resource) -> String {
    let name = format!("{}/{}", kind_word(kind_of(resource)), name_of(resource));
    match &resource.resource {
        Some(Inner::Node(node)) => {
            let status = node.status.clone().unwrap_or_default();
            let phase = manifest::phase(status.phase());
            let draining = if is_draining(node) { " draining" } else { "" };
            format!("{name} {phase}{draining} applied={}", status.applied_revision)
        }
        Some(Inner::Deployment(deployment)) => {
            let status = deployment.status.clone().unwrap_or_default();
            let (ready, desired, updated) = (status.ready, status.desired, status.updated);
            format!("{name} ready={ready}/{desired} updated={updated} {}", state(&status))
        }
        Some(Inner::Network(network)) => {
            let status = network.status.clone().unwrap_or_default();
            let ready = status.members.iter().filter(|member| !member.public_key.is_empty());
            let (ready, members) = (ready.count(), status.members.len());
            format!("{name} ready={ready}/{members} refused={}", status.refused.len())
        }
        Some(Inner::LoadBalancer(balancer)) => {
            let status = balancer.status.clone().unwrap_or_default();
            let applied = status.nodes.iter().filter(|node| node.applied).count();
            let backends = backends::of(&status);
            let (active, flows) = (backends::active(&backends), backends::flows(&backends));
            let (all, nodes) = (backends.len(), status.nodes.len());
            format!("{name} backends={active}/{all} flows={flows} applied={applied}/{nodes}")
        }
        Some(Inner::FirewallPolicy(policy)) => {
            let rules = policy.spec.as_ref().map_or(0, |spec| spec.rules.len());
            let nodes = policy.status.as_ref().map_or(&[][..], |status| &status.nodes);
            let applied = nodes.iter().filter(|node| node.applied).count();
            format!("{name} rules={rules} applied={applied}/{}", nodes.len())
        }
        None => name,
    }
}
