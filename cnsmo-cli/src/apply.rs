//! Commands that take files.

use std::{
    io::{self, Write as _},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Result, bail};
use cnsmo_proto::{
    manifest::Manifest,
    pb::resource::{
        ApplyRequest, ApplyResponse, Change, DeleteRequest, GetRequest, Kind, Resource,
        change::Outcome, resource::Resource as Inner,
    },
};
use serde::Serialize;
use tokio::time::Instant;
use tonic::Code;

use crate::{
    args::{ApplyArgs, DeleteArgs, FileArgs, Format, OriginalArgs},
    client::{Client, Resources, refused},
    deployment, diff,
    live::{self, ImpactDocument},
    load,
    output::{kind_of, kind_word, name_of, print_json, print_text, print_yaml, yaml},
    wait,
};

pub(crate) async fn apply(client: &Client, format: Format, args: ApplyArgs) -> Result<ExitCode> {
    let resources = load::resources(&args.files.files, args.files.original)?;
    let mut core = client.resources().await?;
    let ApplyArgs { dry_run, against_flows, .. } = args;
    let request = ApplyRequest { resources, dry_run, against_flows, ..ApplyRequest::default() };
    let response = core.apply(request).await.map_err(refused)?.into_inner();
    print_changes(format, &response, dry_run)?;
    if against_flows && format == Format::Table {
        print_text(&live::impacts(&response.impacts))?;
    }
    if !args.wait {
        return Ok(ExitCode::SUCCESS);
    }
    in_effect(client, &response, args.timeout).await
}

/// Until each VM enforces the revision, and the deployments in it have their instances.
pub(crate) async fn in_effect(
    client: &Client,
    response: &ApplyResponse,
    timeout: Duration,
) -> Result<ExitCode> {
    let deadline = Instant::now() + timeout;
    let mut core = client.resources().await?;
    let applied = wait::applied(&mut core, response.revision, Default::default(), timeout).await?;
    if applied != ExitCode::SUCCESS {
        return Ok(applied);
    }
    let is_deployment = |change: &&Change| {
        change.kind() == Kind::Deployment && change.outcome() != Outcome::Deleted
    };
    for change in response.changes.iter().filter(is_deployment) {
        let left = deadline.saturating_duration_since(Instant::now());
        let complete = deployment::complete(client, &change.name, left).await?;
        if complete != ExitCode::SUCCESS {
            return Ok(complete);
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn diff(client: &Client, args: FileArgs) -> Result<()> {
    let resources = load::resources(&args.files, args.original)?;
    let mut core = client.resources().await?;
    let request =
        ApplyRequest { resources: resources.clone(), dry_run: true, ..ApplyRequest::default() };
    let response = core.apply(request).await.map_err(refused)?.into_inner();
    let mut out = io::stdout();
    for (change, resource) in response.changes.iter().zip(&resources) {
        writeln!(out, "{}", line(change))?;
        if change.outcome() == Outcome::Unchanged {
            continue;
        }
        let before = current(&mut core, change).await?;
        let after = completed(resource.clone(), before.as_ref());
        let (before, after) = (document(before.as_ref())?, document(Some(&after))?);
        write!(out, "{}", diff::lines(&before, &after))?;
    }
    Ok(())
}

/// A node's absent spec stays as it is.
fn completed(mut resource: Resource, before: Option<&Resource>) -> Resource {
    if let Some(Inner::Node(node)) = &mut resource.resource
        && let Some(Inner::Node(before)) = before.and_then(|before| before.resource.as_ref())
    {
        node.spec = node.spec.or(before.spec);
    }
    resource
}

pub(crate) async fn delete(client: &Client, args: DeleteArgs) -> Result<ExitCode> {
    let (wait, timeout) = (args.wait, args.timeout);
    let deployments = delete_all(client, args).await?;
    if wait {
        return deployment::ended(client, deployments, timeout).await;
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns the names of those that are deployments.
async fn delete_all(client: &Client, args: DeleteArgs) -> Result<Vec<String>> {
    let mut out = io::stdout();
    if let (Some(kind), Some(name)) = (args.kind, args.name) {
        let (kind, name) = (Kind::from(kind), name.to_string());
        let request = DeleteRequest { kind: kind.into(), name: name.clone() };
        let mut core = client.resources().await?;
        let revision = core.delete(request).await.map_err(refused)?.into_inner().revision;
        writeln!(out, "{}/{name} deleted\nrevision {revision}", kind_word(kind))?;
        return Ok(Some(name).filter(|_| kind == Kind::Deployment).into_iter().collect());
    }
    let original = OriginalArgs { name: None, target: Default::default() };
    let mut resources = load::resources(&args.files, original)?;
    resources.sort_by_key(deleted_as);
    let mut core = client.resources().await?;
    for resource in &resources {
        let (kind, name) = (kind_of(resource), name_of(resource));
        let shown = format!("{}/{name}", kind_word(kind));
        // A file that labels VMs does not own them.
        if kind == Kind::Node {
            writeln!(out, "{shown} kept: delete it by its name")?;
            continue;
        }
        let request = DeleteRequest { kind: kind.into(), name: name.to_owned() };
        match core.delete(request).await {
            Ok(_) => writeln!(out, "{shown} deleted")?,
            Err(status) if status.code() == Code::NotFound => writeln!(out, "{shown} not there")?,
            Err(status) => return Err(refused(status).context(shown)),
        }
    }
    let deployments = resources.iter().filter(|one| kind_of(one) == Kind::Deployment);
    Ok(deployments.map(|one| name_of(one).to_owned()).collect())
}

/// A balancer needs its network. Policies go last: what they close stays closed while there is a way to it.
fn deleted_as(resource: &Resource) -> u8 {
    match kind_of(resource) {
        Kind::LoadBalancer | Kind::Deployment => 0,
        Kind::Network => 1,
        Kind::FirewallPolicy | Kind::Unspecified => 2,
        Kind::Node => 3,
    }
}

/// Stable field names, for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Applied<'a> {
    revision: i64,
    dry_run: bool,
    changes: Vec<AppliedChange>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    impacts: Vec<ImpactDocument<'a>>,
}

#[derive(Serialize)]
struct AppliedChange {
    kind: &'static str,
    name: String,
    outcome: &'static str,
}

pub(crate) fn print_changes(format: Format, response: &ApplyResponse, dry_run: bool) -> Result<()> {
    let change = |change: &Change| AppliedChange {
        kind: kind_word(change.kind()),
        name: change.name.clone(),
        outcome: outcome_word(change.outcome()),
    };
    let applied = || Applied {
        revision: response.revision,
        dry_run,
        changes: response.changes.iter().map(change).collect(),
        impacts: response.impacts.iter().map(ImpactDocument::from).collect(),
    };
    match format {
        Format::Json => return print_json(&applied()),
        Format::Yaml => return print_yaml(&applied()),
        Format::Table => {}
    }
    let mut out = io::stdout();
    let suffix = if dry_run { " (dry run)" } else { "" };
    for change in &response.changes {
        writeln!(out, "{}{suffix}", line(change))?;
    }
    let revision = response.revision;
    if response.changes.iter().all(|change| change.outcome() == Outcome::Unchanged) {
        writeln!(out, "no change (revision {revision})")?;
    } else if dry_run {
        writeln!(out, "nothing committed (revision {revision})")?;
    } else {
        writeln!(out, "revision {revision}")?;
    }
    Ok(())
}

fn line(change: &Change) -> String {
    format!("{}/{} {}", kind_word(change.kind()), change.name, outcome_word(change.outcome()))
}

pub(crate) fn outcome_word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Unspecified => "unknown",
        Outcome::Created => "created",
        Outcome::Updated => "updated",
        Outcome::Unchanged => "unchanged",
        Outcome::Deleted => "deleted",
    }
}

/// What the core has; `None` if nothing yet.
async fn current(core: &mut Resources, change: &Change) -> Result<Option<Resource>> {
    let request = GetRequest { kind: change.kind, name: change.name.clone() };
    match core.get(request).await {
        Ok(response) => Ok(response.into_inner().resource),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(refused(status)),
    }
}

fn document(resource: Option<&Resource>) -> Result<String> {
    match resource.map(Manifest::new) {
        None => Ok(String::new()),
        Some(Some(manifest)) => yaml(&manifest.without_status()),
        Some(None) => bail!("the core sent a resource without content"),
    }
}
