//! What several commands print.

use std::{
    io::{self, Write as _},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use cnsmo_proto::{
    manifest::Manifest,
    pb::{
        meta::Metadata,
        resource::{Kind, Resource, resource::Resource as Inner},
    },
};
use comfy_table::{Table, presets};
use prost_types::Timestamp;
use serde::Serialize;

/// For a value that is not there.
pub(crate) const NONE: &str = "-";

pub(crate) fn metadata(resource: &Resource) -> Metadata {
    match &resource.resource {
        Some(Inner::FirewallPolicy(policy)) => policy.metadata.clone(),
        Some(Inner::Node(node)) => node.metadata.clone(),
        None => None,
    }
    .unwrap_or_default()
}

pub(crate) fn name_of(resource: &Resource) -> &str {
    match &resource.resource {
        Some(Inner::FirewallPolicy(policy)) => policy.metadata.as_ref(),
        Some(Inner::Node(node)) => node.metadata.as_ref(),
        None => None,
    }
    .map_or("", |metadata| &metadata.name)
}

pub(crate) fn kind_of(resource: &Resource) -> &'static str {
    match &resource.resource {
        Some(Inner::FirewallPolicy(_)) => kind_word(Kind::FirewallPolicy),
        Some(Inner::Node(_)) => kind_word(Kind::Node),
        None => kind_word(Kind::Unspecified),
    }
}

/// As in `firewallpolicy/web`.
pub(crate) fn kind_word(kind: Kind) -> &'static str {
    match kind {
        Kind::FirewallPolicy => "firewallpolicy",
        Kind::Node => "node",
        Kind::Unspecified => "unknown",
    }
}

/// The documents of resources; an answer without content is left out.
pub(crate) fn manifests(resources: &[Resource]) -> Vec<Manifest> {
    resources.iter().filter_map(Manifest::new).collect()
}

pub(crate) fn print_json<T: Serialize>(value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value).context("failed to write JSON")?;
    writeln!(io::stdout(), "{text}")?;
    Ok(())
}

pub(crate) fn print_yaml<T: Serialize>(value: &T) -> Result<()> {
    write!(io::stdout(), "{}", yaml(value)?)?;
    Ok(())
}

pub(crate) fn yaml<T: Serialize>(value: &T) -> Result<String> {
    let mut text = serde_saphyr::to_string(value).context("failed to write YAML")?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

pub(crate) fn print_table(header: &[&str], rows: Vec<Vec<String>>) -> Result<()> {
    writeln!(io::stdout(), "{}", table(header, rows, ""))?;
    Ok(())
}

/// Aligned columns, each line behind `indent`.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>, indent: &str) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec()).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let lines: Vec<_> = table.lines().map(|line| format!("{indent}{}", line.trim_end())).collect();
    lines.join("\n")
}

pub(crate) fn or_none(text: impl Into<String>) -> String {
    let text = text.into();
    if text.is_empty() { NONE.to_owned() } else { text }
}

pub(crate) fn labels(labels: &std::collections::BTreeMap<String, String>) -> String {
    let pairs: Vec<_> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    or_none(pairs.join(","))
}

/// How long ago, in the largest unit that gives a whole number.
pub(crate) fn age(time: Option<Timestamp>) -> String {
    let Some(time) = time.and_then(|time| SystemTime::try_from(time).ok()) else {
        return NONE.to_owned();
    };
    // Clocks differ by a little: the future is now.
    short(SystemTime::now().duration_since(time).unwrap_or(Duration::ZERO))
}

fn short(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7200 => format!("{}m", s / 60),
        s @ 7200..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

pub(crate) fn print_text(text: &str) -> Result<()> {
    write!(io::stdout(), "{text}")?;
    Ok(())
}
