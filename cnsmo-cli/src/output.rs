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

fn metadata(resource: &Resource) -> Option<&Metadata> {
    match resource.resource.as_ref()? {
        Inner::Deployment(one) => one.metadata.as_ref(),
        Inner::FirewallPolicy(policy) => policy.metadata.as_ref(),
        Inner::LoadBalancer(balancer) => balancer.metadata.as_ref(),
        Inner::Network(network) => network.metadata.as_ref(),
        Inner::Node(node) => node.metadata.as_ref(),
    }
}

pub(crate) fn name_of(resource: &Resource) -> &str {
    metadata(resource).map_or("", |metadata| &metadata.name)
}

pub(crate) fn kind_of(resource: &Resource) -> Kind {
    match &resource.resource {
        Some(Inner::Deployment(_)) => Kind::Deployment,
        Some(Inner::FirewallPolicy(_)) => Kind::FirewallPolicy,
        Some(Inner::LoadBalancer(_)) => Kind::LoadBalancer,
        Some(Inner::Network(_)) => Kind::Network,
        Some(Inner::Node(_)) => Kind::Node,
        None => Kind::Unspecified,
    }
}

/// As in `firewallpolicy/web`.
pub(crate) fn kind_word(kind: Kind) -> &'static str {
    match kind {
        Kind::Deployment => "deployment",
        Kind::FirewallPolicy => "firewallpolicy",
        Kind::LoadBalancer => "loadbalancer",
        Kind::Network => "network",
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

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
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

pub(crate) fn short(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7200 => format!("{}m", s / 60),
        s @ 7200..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

/// Addresses of both families, IPv4 first.
/// An end of a connection; without a port, where the protocol has none.
pub(crate) fn end(address: &str, port: Option<u32>) -> String {
    match port {
        Some(port) if address.contains(':') => format!("[{address}]:{port}"),
        Some(port) => format!("{address}:{port}"),
        None => address.to_owned(),
    }
}

pub(crate) fn addresses(ipv4: &str, ipv6: &str) -> String {
    let given: Vec<_> = [ipv4, ipv6].into_iter().filter(|address| !address.is_empty()).collect();
    or_none(given.join(","))
}

/// In the largest unit of which there is at least one.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let Some(n) = (1..=UNITS.len()).rev().find(|n| bytes >> (10 * n) > 0) else {
        return format!("{bytes} B");
    };
    let tenths = (u128::from(bytes) * 10) >> (10 * n);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[n - 1])
}

pub(crate) fn print_text(text: &str) -> Result<()> {
    write!(io::stdout(), "{text}")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_of_their_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_048_575, "1023.9 KiB"),
            (1 << 20, "1.0 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
