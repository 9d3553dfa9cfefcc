//! `cnsmo flows`: what happened to packets on one VM.

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, bail};
use cnsmo_proto::{
    manifest,
    pb::flow::{PacketRecord, ReadRecordsRequest, Why},
};
use serde::Serialize;

use crate::{
    args::{FlowsArgs, Format},
    client::{Client, refused},
    live,
    output::{end, or_none, print_text, print_yaml},
};

/// One line, object or document each, as they come.
pub(crate) async fn flows(client: &Client, format: Format, args: FlowsArgs) -> Result<()> {
    let FlowsArgs { node, tail, follow, dropped, live, max } = args;
    if live {
        return live::list(client, format, node.to_string(), max).await;
    }
    let (node, tail) = (node.to_string(), tail.unwrap_or_default());
    let request = ReadRecordsRequest { node, tail, follow };
    let mut core = client.flows().await?;
    let mut stream = core.read_records(request).await.map_err(refused)?.into_inner();
    while let Some(some) = stream.message().await.map_err(refused)? {
        if some.missed > 0 && format == Format::Table {
            print_text(&format!(
                "({} records were forgotten before they were read)\n",
                some.missed
            ))?;
        }
        for record in some.records.iter().filter(|r| !dropped || !r.drop_reason.is_empty()) {
            print_record(format, record)?;
        }
        io::stdout().flush()?;
    }
    if follow {
        bail!("the core ended the stream")
    }
    Ok(())
}

/// Stable names for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    sequence: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    time: Option<String>,
    verdict: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'a str,
    direction: &'static str,
    overlay: bool,
    protocol: String,
    source: &'a str,
    destination: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ports: Option<[u32; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp: Option<[u32; 2]>,
    tcp_flags: u32,
    length: u32,
    #[serde(skip_serializing_if = "str::is_empty")]
    policy: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    rule: &'a str,
}

impl<'a> From<&'a PacketRecord> for Document<'a> {
    fn from(record: &'a PacketRecord) -> Self {
        let is_icmp = matches!(record.protocol, 1 | 58);
        let has_ports = matches!(record.protocol, 6 | 17 | 132);
        Self {
            sequence: record.sequence,
            time: record.time.as_ref().map(ToString::to_string),
            verdict: verdict(record.why()),
            reason: &record.drop_reason,
            direction: manifest::direction(record.direction()),
            overlay: record.overlay,
            protocol: manifest::protocol(record.protocol),
            source: &record.source,
            destination: &record.destination,
            ports: has_ports.then_some([record.source_port, record.destination_port]),
            icmp: is_icmp.then_some([record.icmp_type, record.icmp_code]),
            tcp_flags: record.tcp_flags,
            length: record.length,
            policy: &record.policy,
            rule: &record.rule,
        }
    }
}

fn verdict(why: Why) -> &'static str {
    match why {
        Why::Dropped => "dropped",
        Why::Rejected => "rejected",
        Why::Logged => "allowed",
        Why::Audited => "audited",
        Why::Unspecified => "unknown",
    }
}

fn print_record(format: Format, record: &PacketRecord) -> Result<()> {
    let document = Document::from(record);
    match format {
        Format::Json => {
            let line = serde_json::to_string(&document).context("failed to write JSON")?;
            writeln!(io::stdout(), "{line}")?;
        }
        Format::Yaml => {
            print_text("---\n")?;
            print_yaml(&document)?;
        }
        Format::Table => writeln!(io::stdout(), "{}", line(&document).trim_end())?,
    }
    Ok(())
}

fn line(document: &Document<'_>) -> String {
    // Milliseconds are enough for people.
    let time = or_none(document.time.clone().unwrap_or_default());
    let time = time.get(..23).unwrap_or(&time);
    let place = if document.overlay { "overlay" } else { "underlay" };
    let [from, to] = [0, 1].map(|n| document.ports.map(|ports| ports[n]));
    let mut line = format!(
        "{time:<23}  {:<8} {:<7} {place:<8} {} {} > {}",
        document.verdict,
        document.direction,
        document.protocol,
        end(document.source, from),
        end(document.destination, to),
    );
    if let Some([kind, code]) = document.icmp {
        line += &format!(" type {kind}/{code}");
    }
    if !document.reason.is_empty() {
        line += &format!("  {}", document.reason);
    }
    if !document.rule.is_empty() {
        line += &format!("  by {}/{}", document.policy, document.rule);
    }
    line
}

#[cfg(test)]
mod tests {
    use cnsmo_proto::pb::policy::Direction;

    use super::*;

    fn record() -> PacketRecord {
        PacketRecord {
            sequence: 7,
            time: Some(prost_types::Timestamp { seconds: 0, nanos: 123_456_789 }),
            why: Why::Rejected.into(),
            drop_reason: "denied".into(),
            direction: Direction::Ingress.into(),
            source: "2001:db8::1".into(),
            destination: "2001:db8::2".into(),
            protocol: 6,
            source_port: 4000,
            destination_port: 22,
            tcp_flags: 2,
            length: 74,
            policy: "web".into(),
            rule: "no-ssh".into(),
            ..PacketRecord::default()
        }
    }

    #[test]
    fn a_line_says_who_what_and_why() {
        assert_eq!(
            line(&(&record()).into()),
            "1970-01-01T00:00:00.123  rejected ingress underlay tcp [2001:db8::1]:4000 > \
             [2001:db8::2]:22  denied  by web/no-ssh"
        );
        let ping = PacketRecord {
            why: Why::Audited.into(),
            drop_reason: String::new(),
            protocol: 1,
            icmp_type: 8,
            source: "192.0.2.1".into(),
            destination: "192.0.2.2".into(),
            overlay: true,
            rule: String::new(),
            ..record()
        };
        assert_eq!(
            line(&(&ping).into()),
            "1970-01-01T00:00:00.123  audited  ingress overlay  icmp 192.0.2.1 > 192.0.2.2 type 8/0"
        );
    }

    #[test]
    fn programs_get_what_there_is_and_nothing_else() {
        let json = serde_json::to_value(Document::from(&record())).unwrap();
        assert_eq!(json["verdict"], "rejected");
        assert_eq!(json["ports"], serde_json::json!([4000, 22]));
        assert_eq!((json.get("icmp"), &json["rule"]), (None, &"no-ssh".into()));
    }
}
