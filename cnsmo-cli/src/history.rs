//! What was changed, and the way back.

use std::{collections::BTreeMap, process::ExitCode};

use anyhow::Result;
use cnsmo_proto::pb::resource::{
    ApplyResponse, Change, HistoryEntry, ListHistoryRequest, RollbackRequest, change::Outcome,
};
use serde::Serialize;

use crate::{
    apply::{in_effect, outcome_word, print_changes},
    args::{Format, RollbackArgs},
    client::{Client, refused},
    output::{age, kind_word, print_json, print_table, print_yaml},
};

/// Resources that the table names of one change.
const SHOWN_MAX: usize = 3;

pub(crate) async fn history(client: &Client, format: Format, last: u32) -> Result<()> {
    let mut core = client.resources().await?;
    let request = ListHistoryRequest { limit: last, before_revision: 0 };
    let entries = core.list_history(request).await.map_err(refused)?.into_inner().entries;
    let documents = || entries.iter().map(Document::from).collect::<Vec<_>>();
    match format {
        Format::Json => print_json(&documents()),
        Format::Yaml => print_yaml(&documents()),
        Format::Table => print_table(
            &["REVISION", "AGE", "BY", "CALL", "CHANGES"],
            entries.iter().map(row).collect(),
        ),
    }
}

pub(crate) async fn rollback(
    client: &Client,
    format: Format,
    args: RollbackArgs,
) -> Result<ExitCode> {
    let RollbackArgs { revision, dry_run, wait, timeout } = args;
    let mut core = client.resources().await?;
    let request = RollbackRequest { revision, dry_run };
    let response = core.rollback(request).await.map_err(refused)?.into_inner();
    let response = ApplyResponse {
        revision: response.revision,
        changes: response.changes,
        ..ApplyResponse::default()
    };
    print_changes(format, &response, dry_run)?;
    if !wait {
        return Ok(ExitCode::SUCCESS);
    }
    in_effect(client, &response, timeout).await
}

/// Stable names for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    revision: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<String>,
    by: &'a str,
    call: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    to_revision: i64,
    changes: Vec<ChangeDocument<'a>>,
    changes_left_off: u32,
    available: bool,
}

#[derive(Serialize)]
struct ChangeDocument<'a> {
    kind: &'static str,
    name: &'a str,
    outcome: &'static str,
}

impl<'a> From<&'a HistoryEntry> for Document<'a> {
    fn from(entry: &'a HistoryEntry) -> Self {
        let change = |change: &'a Change| ChangeDocument {
            kind: kind_word(change.kind()),
            name: &change.name,
            outcome: outcome_word(change.outcome()),
        };
        Self {
            revision: entry.revision,
            time: entry.time.as_ref().map(ToString::to_string),
            by: &entry.by,
            call: &entry.call,
            to_revision: entry.to_revision,
            changes: entry.changes.iter().map(change).collect(),
            changes_left_off: entry.changes_left_off,
            available: entry.available,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

fn row(entry: &HistoryEntry) -> Vec<String> {
    let call = match entry.to_revision {
        0 => entry.call.to_lowercase(),
        to => format!("{} to {to}", entry.call.to_lowercase()),
    };
    let gone = if entry.available { "" } else { " (history gone)" };
    let revision = format!("{}{gone}", entry.revision);
    vec![revision, age(entry.time), entry.by.clone(), call, changes(entry)]
}

/// By outcome: the first names, and how many more.
fn changes(entry: &HistoryEntry) -> String {
    let mut by_outcome: BTreeMap<Outcome, Vec<String>> = BTreeMap::new();
    for change in &entry.changes {
        let name = format!("{}/{}", kind_word(change.kind()), change.name);
        by_outcome.entry(change.outcome()).or_default().push(name);
    }
    let mut parts = Vec::new();
    for (outcome, names) in by_outcome {
        let more = names.len().saturating_sub(SHOWN_MAX);
        let mut part = format!("{} ", outcome_word(outcome));
        part += &names.into_iter().take(SHOWN_MAX).collect::<Vec<_>>().join(", ");
        if more > 0 {
            part += &format!(" and {more} more");
        }
        parts.push(part);
    }
    if entry.changes_left_off > 0 {
        parts.push(format!("{} more", entry.changes_left_off));
    }
    parts.join("; ")
}
