use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::{Context as _, Result};
use cnsmo_proto::pb::service::{
    GetFeaturesRequest, GetStatusRequest, KillRequest, ListServicesRequest, RestartRequest,
    ServiceId, ServiceStatus, StartRequest, StopRequest,
};
use serde::Serialize;

use crate::{
    args::{Format, ServiceArgs, ServiceCommand, StopArgs},
    client::{Client, refused},
    output::{age, or_none, print_json, print_table, print_yaml},
};

/// Steers one service, or shows it.
pub(crate) async fn service(
    client: &Client,
    format: Format,
    command: ServiceCommand,
) -> Result<()> {
    let mut hosts = client.hosts().await?;
    let status = match command {
        ServiceCommand::List { node } => {
            let node = node.map(|node| node.to_string()).unwrap_or_default();
            let listed = hosts.list_services(ListServicesRequest { node }).await;
            let services = listed.map_err(refused)?.into_inner().services;
            let documents: Vec<_> = services.iter().map(Document::from).collect();
            return print(format, &documents, &services);
        }
        ServiceCommand::Features(args) => {
            let answer = hosts.get_features(GetFeaturesRequest { id: id(args) }).await;
            return print_features(format, &answer.map_err(refused)?.into_inner().features);
        }
        ServiceCommand::Status(args) => {
            let answer = hosts.get_status(GetStatusRequest { id: id(args) }).await;
            answer.map_err(refused)?.into_inner().status
        }
        ServiceCommand::Start(args) => {
            let answer = hosts.start(StartRequest { id: id(args) }).await;
            answer.map_err(refused)?.into_inner().status
        }
        ServiceCommand::Stop(StopArgs { what, deadline }) => {
            let deadline = deadline.and_then(wire);
            let answer = hosts.stop(StopRequest { id: id(what), deadline }).await;
            answer.map_err(refused)?.into_inner().status
        }
        ServiceCommand::Restart(StopArgs { what, deadline }) => {
            let deadline = deadline.and_then(wire);
            let answer = hosts.restart(RestartRequest { id: id(what), deadline }).await;
            answer.map_err(refused)?.into_inner().status
        }
        ServiceCommand::Kill(args) => {
            let answer = hosts.kill(KillRequest { id: id(args) }).await;
            answer.map_err(refused)?.into_inner().status
        }
    };
    let status = status.context("the host says nothing of the service")?;
    print(format, &Document::from(&status), std::slice::from_ref(&status))
}

fn id(ServiceArgs { service, node, instance }: ServiceArgs) -> Option<ServiceId> {
    let text = |name: Option<cnsmo_proto::model::Name>| name.map(|name| name.to_string());
    let (node, instance) = (text(node).unwrap_or_default(), text(instance).unwrap_or_default());
    Some(ServiceId { node, service: service.to_string(), instance })
}

fn wire(time: Duration) -> Option<prost_types::Duration> {
    time.try_into().ok()
}

/// Stable names for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    node: &'a str,
    service: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    instance: &'a str,
    phase: String,
    reason: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    phase_time: Option<String>,
    pid: u32,
    restarts: u64,
    driver: &'a str,
}

impl<'a> From<&'a ServiceStatus> for Document<'a> {
    fn from(status: &'a ServiceStatus) -> Self {
        let id = status.id.as_ref();
        Self {
            node: id.map_or("", |id| &id.node),
            service: id.map_or("", |id| &id.service),
            instance: id.map_or("", |id| &id.instance),
            phase: phase(status),
            reason: &status.reason,
            message: &status.message,
            phase_time: status.phase_time.as_ref().map(ToString::to_string),
            pid: status.pid,
            restarts: status.restarts,
            driver: &status.driver,
        }
    }
}

fn print(format: Format, documents: &impl Serialize, services: &[ServiceStatus]) -> Result<()> {
    match format {
        Format::Json => print_json(documents),
        Format::Yaml => print_yaml(documents),
        Format::Table => print_table(
            &["NODE", "SERVICE", "PHASE", "SINCE", "REASON", "RESTARTS", "PID", "MESSAGE"],
            services.iter().map(row).collect(),
        ),
    }
}

fn row(status: &ServiceStatus) -> Vec<String> {
    let ServiceId { node, service, instance } = status.id.clone().unwrap_or_default();
    let service = if instance.is_empty() { service } else { format!("{service}/{instance}") };
    vec![
        or_none(node),
        service,
        phase(status),
        age(status.phase_time),
        or_none(&status.reason),
        status.restarts.to_string(),
        status.pid.to_string(),
        or_none(&status.message),
    ]
}

fn print_features(format: Format, features: &[String]) -> Result<()> {
    match format {
        Format::Json => print_json(&features),
        Format::Yaml => print_yaml(&features),
        Format::Table => {
            for feature in features {
                writeln!(io::stdout(), "{feature}")?;
            }
            Ok(())
        }
    }
}

fn phase(status: &ServiceStatus) -> String {
    status.phase().as_str_name().trim_start_matches("PHASE_").to_lowercase()
}
