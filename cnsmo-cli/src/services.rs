use std::{
    collections::BTreeMap,
    io::{self, Write as _},
};

use anyhow::{Context as _, Result, bail};
use cnsmo_proto::{
    model::Name,
    pb::catalog::{
        Endpoint, Instance, ListInstancesRequest, WatchInstancesRequest, WatchInstancesResponse,
        watch_instances_response::Event,
    },
};
use serde::Serialize;

use crate::{
    args::{Format, ServicesArgs},
    client::{Client, refused},
    output::{NONE, age, or_none, print_json, print_table, print_text, print_yaml},
};

/// The service of which each VM's agent is an instance.
const AGENT: &str = "agent";

/// The instances of services; with `--watch` also each change, until the core ends.
pub(crate) async fn services(client: &Client, format: Format, args: ServicesArgs) -> Result<()> {
    let ServicesArgs { service, node, selector, watch } = args;
    let text = |name: Option<Name>| name.map(|n| n.to_string());
    let (service, node) = (text(service).unwrap_or_default(), text(node).unwrap_or_default());
    let attributes = selector.as_map().clone();
    let mut catalog = client.catalog().await?;
    if watch {
        let request = WatchInstancesRequest { service, node, attributes };
        let mut stream = catalog.watch_instances(request).await.map_err(refused)?.into_inner();
        while let Some(response) = stream.message().await.map_err(refused)? {
            print_event(format, &response)?;
        }
        bail!("the core ended the watch")
    }
    let request = ListInstancesRequest { service, node, attributes };
    let instances = catalog.list_instances(request).await.map_err(refused)?.into_inner().instances;
    print(format, &instances)
}

/// The agents of all VMs, or what the agent of one VM runs.
pub(crate) async fn agents(client: &Client, format: Format, host: Option<Name>) -> Result<()> {
    let mut catalog = client.catalog().await?;
    let mut request = ListInstancesRequest::default();
    match &host {
        None => AGENT.clone_into(&mut request.service),
        Some(host) => request.node = host.to_string(),
    }
    let instances = catalog.list_instances(request).await.map_err(refused)?.into_inner().instances;
    let is_meant = |instance: &Instance| match &host {
        None => true,
        Some(host) => instance.owner == format!("{AGENT}/{host}"),
    };
    let instances: Vec<_> = instances.into_iter().filter(is_meant).collect();
    print(format, &instances)
}

fn print(format: Format, instances: &[Instance]) -> Result<()> {
    let documents = || instances.iter().map(Document::from).collect::<Vec<_>>();
    match format {
        Format::Json => print_json(&documents()),
        Format::Yaml => print_yaml(&documents()),
        Format::Table => print_table(
            &["SERVICE", "NAME", "NODE", "PHASE", "SINCE", "REASON", "ENDPOINTS"],
            instances.iter().map(row).collect(),
        ),
    }
}

/// Stable names for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    service: &'a str,
    name: &'a str,
    node: &'a str,
    phase: String,
    reason: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    phase_time: Option<String>,
    endpoints: Vec<EndpointDocument<'a>>,
    attributes: &'a BTreeMap<String, String>,
    owner: &'a str,
    incarnation: &'a str,
    revision: i64,
}

#[derive(Serialize)]
struct EndpointDocument<'a> {
    protocol: &'a str,
    address: &'a str,
    port: u32,
}

impl<'a> From<&'a Instance> for Document<'a> {
    fn from(instance: &'a Instance) -> Self {
        let endpoint = |endpoint: &'a Endpoint| EndpointDocument {
            protocol: &endpoint.protocol,
            address: &endpoint.address,
            port: endpoint.port,
        };
        Self {
            service: &instance.service,
            name: &instance.name,
            node: &instance.node,
            phase: phase(instance),
            reason: &instance.reason,
            message: &instance.message,
            phase_time: instance.phase_time.as_ref().map(ToString::to_string),
            endpoints: instance.endpoints.iter().map(endpoint).collect(),
            attributes: &instance.attributes,
            owner: &instance.owner,
            incarnation: &instance.incarnation,
            revision: instance.revision,
        }
    }
}

#[derive(Serialize)]
struct EventDocument<'a> {
    event: String,
    revision: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance: Option<Document<'a>>,
}

fn print_event(format: Format, response: &WatchInstancesResponse) -> Result<()> {
    let event = match response.event() {
        Event::Unspecified => "unknown",
        Event::Upsert => "upsert",
        Event::Delete => "delete",
        Event::Synced => "synced",
        Event::Reset => "reset",
    };
    let revision = response.revision;
    let instance = response.instance.as_ref();
    let document =
        || EventDocument { event: event.into(), revision, instance: instance.map(Document::from) };
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
            let what = instance.map(summary).unwrap_or_default();
            let line = format!("{event:<7} {revision:>8} {what}");
            writeln!(io::stdout(), "{}", line.trim_end())?;
        }
    }
    io::stdout().flush()?;
    Ok(())
}

fn summary(instance: &Instance) -> String {
    let Instance { service, name, node, reason, .. } = instance;
    let (phase, node) = (phase(instance), or_none(node));
    format!("{service}/{name} node={node} {phase} {reason}").trim_end().to_owned()
}

fn row(instance: &Instance) -> Vec<String> {
    let mut endpoints: Vec<_> = instance.endpoints.iter().map(endpoint).collect();
    if endpoints.is_empty() {
        endpoints.push(NONE.to_owned());
    }
    vec![
        instance.service.clone(),
        instance.name.clone(),
        or_none(&instance.node),
        phase(instance),
        age(instance.phase_time),
        or_none(&instance.reason),
        endpoints.join(","),
    ]
}

fn endpoint(endpoint: &Endpoint) -> String {
    let Endpoint { protocol, address, port } = endpoint;
    match port {
        0 => format!("{protocol}:{address}"),
        _ if address.contains(':') => format!("{protocol}:[{address}]:{port}"),
        _ => format!("{protocol}:{address}:{port}"),
    }
}

fn phase(instance: &Instance) -> String {
    instance.phase().as_str_name().trim_start_matches("PHASE_").to_lowercase()
}
