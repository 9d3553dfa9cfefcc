//! Instances of services: how many there are, where they run, one by hand.

use std::{
    collections::BTreeSet,
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Result, bail};
use cnsmo_proto::{
    manifest,
    pb::{
        catalog::ListInstancesRequest,
        deployment::{
            AvoidedNode, Deployment, DeploymentSpec, DeploymentStatus, InstanceStatus, Placement,
            Port, Process, deployment_spec::Driver, systemd,
        },
        meta::{Metadata, condition::Status as Truth},
        resource::{
            ApplyRequest, Kind, Resource, ScaleRequest, apply_request::Mode,
            resource::Resource as Inner,
        },
        service::{ListServicesRequest, LogLine, ReadLogsRequest, ServiceId},
    },
};
use tokio::time::{Instant, sleep_until};

use crate::{
    EXIT_TIMEOUT,
    args::{Format, LogsArgs, ScaleArgs, SpawnArgs},
    client::{Client, refused},
    describe::{describe_conditions, describe_metadata, field, section},
    get::one,
    output::{age, labels, or_none},
};

/// Between two looks.
const POLL: Duration = Duration::from_millis(200);

/// Changes the number of instances.
pub(crate) async fn scale(client: &Client, args: ScaleArgs) -> Result<ExitCode> {
    let (name, replicas) = args.to;
    let request = ScaleRequest { name: name.to_string(), replicas };
    let answer = client.resources().await?.scale(request).await.map_err(refused)?.into_inner();
    let before = answer.replicas_before;
    if before == replicas {
        writeln!(io::stdout(), "deployment/{name} has {replicas} instances already: no change")?;
    } else {
        let revision = answer.revision;
        writeln!(io::stdout(), "deployment/{name} {before} -> {replicas}\nrevision {revision}")?;
    }
    if args.wait {
        return complete(client, name.as_str(), args.timeout).await;
    }
    Ok(ExitCode::SUCCESS)
}

/// A deployment of one instance, from the command line.
pub(crate) async fn spawn(client: &Client, args: SpawnArgs) -> Result<ExitCode> {
    let port = |name: &str| Port { name: name.to_owned(), ..Port::default() };
    let spec = DeploymentSpec {
        replicas: 1,
        placement: Some(Box::new(Placement {
            node: args.node.map(|node| node.to_string()).unwrap_or_default(),
            ..Placement::default()
        })),
        driver: Some(Driver::Process(Process {
            command: args.command,
            user: args.user.unwrap_or_default(),
            ..Process::default()
        })),
        ports: args.ports.iter().map(|name| port(name)).collect(),
        ..DeploymentSpec::default()
    };
    let metadata = Metadata { name: args.name.to_string(), ..Metadata::default() };
    let one = Deployment { metadata: Some(metadata), spec: Some(spec), status: None };
    let request = ApplyRequest {
        resources: vec![Resource { resource: Some(Inner::Deployment(one)) }],
        mode: Mode::Create.into(),
        ..ApplyRequest::default()
    };
    let answer = client.resources().await?.apply(request).await.map_err(refused)?.into_inner();
    let (name, revision) = (&args.name, answer.revision);
    writeln!(io::stdout(), "deployment/{name} created\nrevision {revision}")?;
    complete(client, name.as_str(), args.timeout).await
}

/// Prints what one instance has written.
pub(crate) async fn logs(client: &Client, format: Format, args: LogsArgs) -> Result<()> {
    let mut hosts = client.hosts().await?;
    let all = hosts.list_services(ListServicesRequest::default()).await.map_err(refused)?;
    let (service, instance) =
        (args.deployment.to_string(), args.instance.map(|one| one.to_string()));
    let ids = all.into_inner().services.into_iter().filter_map(|status| status.id);
    let is_meant = |id: &ServiceId| {
        id.service == service && instance.as_ref().is_none_or(|i| *i == id.instance)
    };
    let found: Vec<_> = ids.filter(is_meant).collect();
    let id = match &*found {
        [] => bail!("no instance of {service} is on a VM that is connected"),
        [one] => one.clone(),
        several => {
            let names: Vec<_> = several.iter().map(|id| id.instance.as_str()).collect();
            bail!("--instance: missing, {service} has several: {}", names.join(", "));
        }
    };
    let tail = args.tail.unwrap_or_default();
    let request = ReadLogsRequest { id: Some(id), tail, follow: args.follow };
    let mut stream = hosts.read_logs(request).await.map_err(refused)?.into_inner();
    while let Some(some) = stream.message().await.map_err(refused)? {
        for line in &some.lines {
            print_line(format, line)?;
        }
        io::stdout().flush()?;
    }
    Ok(())
}

fn print_line(format: Format, line: &LogLine) -> Result<()> {
    let LogLine { time, stream, text } = line;
    let out = &mut io::stdout();
    match format {
        Format::Table => writeln!(out, "{text}")?,
        Format::Json | Format::Yaml => {
            let time = time.map(|time| time.to_string());
            let line = serde_json::json!({"time": time, "stream": stream, "text": text});
            writeln!(out, "{line}")?;
        }
    }
    Ok(())
}

/// Until all instances are as they shall be.
pub(crate) async fn complete(client: &Client, name: &str, timeout: Duration) -> Result<ExitCode> {
    let deadline = Instant::now() + timeout;
    let mut told = String::new();
    loop {
        let resource = one(client, Kind::Deployment, name.to_string()).await?;
        let Some(Inner::Deployment(deployment)) = resource.resource else {
            bail!("the core sent a resource without content");
        };
        let status = deployment.status.unwrap_or_default();
        let progress = status.conditions.iter().find(|one| one.r#type == "Progressing");
        let text = progress.map(|one| one.message.clone()).unwrap_or_default();
        if text != told {
            writeln!(io::stderr(), "deployment/{name}: {text}")?;
            told = text;
        }
        if progress.is_some_and(|one| one.status() == Truth::False) {
            return Ok(ExitCode::SUCCESS);
        }
        if Instant::now() >= deadline {
            writeln!(io::stderr(), "timed out; why: cnsmo describe deployment {name}")?;
            return Ok(ExitCode::from(EXIT_TIMEOUT));
        }
        sleep_until((Instant::now() + POLL).min(deadline)).await;
    }
}

/// Until no instance of deleted deployments is left.
pub(crate) async fn ended(
    client: &Client,
    names: Vec<String>,
    timeout: Duration,
) -> Result<ExitCode> {
    let deadline = Instant::now() + timeout;
    let mut catalog = client.catalog().await?;
    for name in names {
        let mut told = None;
        loop {
            let request = ListInstancesRequest { service: name.clone(), ..Default::default() };
            let left = catalog.list_instances(request).await.map_err(refused)?.into_inner();
            let left = left.instances.len();
            if told.replace(left) != Some(left) {
                writeln!(io::stderr(), "deployment/{name}: {left} instances left")?;
            }
            if left == 0 {
                break;
            }
            if Instant::now() >= deadline {
                writeln!(io::stderr(), "timed out; where: cnsmo services --service {name}")?;
                return Ok(ExitCode::from(EXIT_TIMEOUT));
            }
            sleep_until((Instant::now() + POLL).min(deadline)).await;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Of `cnsmo get`.
pub(crate) const HEADER: [&str; 8] =
    ["NAME", "READY", "UPDATED", "PLACED", "DRIVER", "STATE", "REVISION", "AGE"];

pub(crate) fn row(deployment: &Deployment) -> Vec<String> {
    let metadata = deployment.metadata.clone().unwrap_or_default();
    let spec = deployment.spec.clone().unwrap_or_default();
    let status = deployment.status.clone().unwrap_or_default();
    vec![
        metadata.name,
        format!("{}/{}", status.ready, status.desired),
        status.updated.to_string(),
        status.placed.to_string(),
        driver(&spec).to_owned(),
        state(&status),
        metadata.revision.to_string(),
        age(metadata.create_time),
    ]
}

fn driver(spec: &DeploymentSpec) -> &'static str {
    match spec.driver {
        Some(Driver::Process(_)) => "process",
        Some(Driver::Systemd(_)) => "systemd",
        None => "-",
    }
}

/// In one word.
pub(crate) fn state(status: &DeploymentStatus) -> String {
    let progress = status.conditions.iter().find(|one| one.r#type == "Progressing");
    or_none(progress.map(|one| one.reason.clone()).unwrap_or_default())
}

pub(crate) fn describe(deployment: &Deployment) -> Result<()> {
    let spec = deployment.spec.clone().unwrap_or_default();
    let status = deployment.status.clone().unwrap_or_default();
    let placement = spec.placement.clone().unwrap_or_default();
    describe_metadata(deployment.metadata.as_ref())?;
    let counts = [status.ready, status.desired, status.updated, status.placed];
    let [ready, desired, updated, placed] = counts;
    field("Ready", &format!("{ready} of {desired}, {updated} updated, {placed} placed"))?;
    field("Driver", driver(&spec))?;
    field("Runs", &runs(&spec))?;
    match placement.node.as_str() {
        "" => field("Selector", &labels(&placement.selector))?,
        node => field("Node", node)?,
    }
    field("Spread", &placement.spread)?;
    let needs: Vec<_> =
        spec.needs.iter().map(|one| format!("{} ({})", one.service, one.ready)).collect();
    field("Needs", &or_none(needs.join(", ")))?;
    let row = |one: &InstanceStatus| {
        let ports: Vec<_> =
            one.ports.iter().map(|port| format!("{}:{}", port.name, port.port)).collect();
        vec![
            one.name.clone(),
            one.node.clone(),
            manifest::instance_phase(one.phase()).to_owned(),
            age(one.phase_time),
            or_none(&one.reason),
            or_none(ports.join(",")),
            or_none(&one.message),
        ]
    };
    let header = ["NAME", "NODE", "PHASE", "SINCE", "REASON", "PORTS", "MESSAGE"];
    section("Instances", &header, status.instances.iter().map(row).collect())?;
    let avoided = |one: &AvoidedNode| {
        let until = one.until.map(|time| time.to_string()).unwrap_or_default();
        vec![one.node.clone(), until, one.times.to_string()]
    };
    if !status.avoided.is_empty() {
        let rows = status.avoided.iter().map(avoided).collect();
        section("Avoided, where instances kept failing", &["NODE", "UNTIL", "TIMES"], rows)?;
    }
    let known: BTreeSet<_> = status.instances.iter().map(|one| one.node.as_str()).collect();
    field("VMs", &or_none(known.into_iter().collect::<Vec<_>>().join(",")))?;
    describe_conditions(&status.conditions)
}

fn runs(spec: &DeploymentSpec) -> String {
    match &spec.driver {
        Some(Driver::Process(process)) => process.command.join(" "),
        Some(Driver::Systemd(systemd)) => match &systemd.unit {
            Some(systemd::Unit::Name(name)) => name.clone(),
            Some(systemd::Unit::Process(process)) => process.command.join(" "),
            None => "-".to_owned(),
        },
        None => "-".to_owned(),
    }
}
