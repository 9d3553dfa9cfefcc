//! How the core itself is.

use std::time::Duration;

use anyhow::Result;
use cnsmo_proto::pb::admin::{GetStatusRequest, GetStatusResponse};
use serde::Serialize;

use crate::{
    args::Format,
    client::{Client, refused},
    output::{or_none, print_json, print_text, print_yaml, short, size},
};

pub(crate) async fn status(client: &Client, format: Format) -> Result<()> {
    let mut core = client.admin().await?;
    let status = core.get_status(GetStatusRequest {}).await.map_err(refused)?.into_inner();
    match format {
        Format::Table => print_text(&text(&status)),
        Format::Json => print_json(&Document::of(status)),
        Format::Yaml => print_yaml(&Document::of(status)),
    }
}

fn text(status: &GetStatusResponse) -> String {
    let held_back = match status.leases_held_back {
        0 => String::new(),
        leases => format!(", {leases} of them over and held back: too many ran out at once"),
    };
    let bytes = |bytes: i64| size(bytes.try_into().unwrap_or(0));
    let rows = [
        ("core", format!("{}, version {}", or_none(status.core.as_str()), status.version)),
        ("up", short(uptime(status))),
        (
            "leader",
            if status.leader {
                "yes".to_owned()
            } else {
                format!("no: {}", or_none(status.leader_address.as_str()))
            },
        ),
        ("store", format!("{}, epoch {}", status.engine, status.epoch)),
        ("revision", format!("{}, history from {}", status.revision, status.compact_revision + 1)),
        ("size", format!("{}, log {}", bytes(status.database_bytes), bytes(status.wal_bytes))),
        ("keys", status.keys.to_string()),
        ("leases", format!("{}{held_back}", status.leases)),
        ("agents", status.agents.to_string()),
        ("instances", status.instances.to_string()),
        ("watchers", status.watchers.to_string()),
        ("subscribers", status.subscribers.to_string()),
    ];
    rows.iter().map(|(name, value)| format!("{name:<12} {value}\n")).collect()
}

fn uptime(status: &GetStatusResponse) -> Duration {
    status.uptime.and_then(|uptime| Duration::try_from(uptime).ok()).unwrap_or_default()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    core: String,
    version: String,
    uptime_seconds: u64,
    leader: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    leader_address: String,
    engine: String,
    epoch: u64,
    revision: i64,
    compact_revision: i64,
    database_bytes: i64,
    wal_bytes: i64,
    keys: i64,
    leases: i64,
    leases_held_back: i64,
    agents: u32,
    instances: i64,
    watchers: u32,
    subscribers: u32,
}

impl Document {
    fn of(status: GetStatusResponse) -> Self {
        Self {
            uptime_seconds: uptime(&status).as_secs(),
            core: status.core,
            version: status.version,
            leader: status.leader,
            leader_address: status.leader_address,
            engine: status.engine,
            epoch: status.epoch,
            revision: status.revision,
            compact_revision: status.compact_revision,
            database_bytes: status.database_bytes,
            wal_bytes: status.wal_bytes,
            keys: status.keys,
            leases: status.leases,
            leases_held_back: status.leases_held_back,
            agents: status.agents,
            instances: status.instances,
            watchers: status.watchers,
            subscribers: status.subscribers,
        }
    }
}
