//! Flows that a VM knows: `cnsmo flows --live`, and those that a change would cut.

use std::{
    io::{self, Write as _},
    time::Duration,
};

use anyhow::Result;
use cnsmo_proto::{
    manifest,
    pb::{
        flow::{CutFlow, ListFlowsRequest, LiveFlow},
        resource::NodeImpact,
    },
};
use serde::Serialize;

use crate::{
    args::Format,
    client::{Client, refused},
    output::{end, or_none, print_json, print_table, print_yaml, short},
};

/// A table, or one document with all of them.
pub(crate) async fn list(client: &Client, format: Format, node: String, max: u32) -> Result<()> {
    let mut core = client.flows().await?;
    let answer = core.list_flows(ListFlowsRequest { node, max }).await.map_err(refused)?;
    let answer = answer.into_inner();
    let flows: Vec<_> = answer.flows.iter().map(Document::from).collect();
    match format {
        Format::Json => return print_json(&flows),
        Format::Yaml => return print_yaml(&flows),
        Format::Table => {}
    }
    let header =
        ["DIRECTION", "DEVICE", "PROTOCOL", "SOURCE", "DESTINATION", "STATE", "IDLE", "BY", "TO"];
    print_table(&header, flows.iter().map(Document::row).collect())?;
    let (shown, total) = (answer.flows.len() as u64, answer.total);
    if shown < total {
        let note = format!("{shown} of {total} flows, those with the latest packets; see --max");
        writeln!(io::stderr(), "{note}")?;
    }
    Ok(())
}

/// Stable names for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    direction: &'static str,
    overlay: bool,
    protocol: String,
    source: String,
    destination: String,
    state: &'a str,
    idle_seconds: i64,
    #[serde(skip_serializing_if = "str::is_empty")]
    policy: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    rule: &'a str,
    by_default: bool,
    /// Source and destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    translated_to: Option<[String; 2]>,
}

impl<'a> From<&'a LiveFlow> for Document<'a> {
    fn from(flow: &'a LiveFlow) -> Self {
        let has_ports = matches!(flow.protocol, 6 | 17 | 132);
        let end = |address: &str, port: u32| end(address, has_ports.then_some(port));
        Self {
            direction: manifest::direction(flow.direction()),
            overlay: flow.overlay,
            protocol: manifest::protocol(flow.protocol),
            source: end(&flow.source, flow.source_port),
            destination: end(&flow.destination, flow.destination_port),
            state: &flow.state,
            idle_seconds: flow.idle.as_ref().map_or(0, |idle| idle.seconds),
            policy: &flow.policy,
            rule: &flow.rule,
            by_default: flow.by_default,
            translated_to: flow.translated.as_ref().map(|to| {
                [end(&to.source, to.source_port), end(&to.destination, to.destination_port)]
            }),
        }
    }
}

impl Document<'_> {
    fn device(&self) -> &'static str {
        if self.overlay { "overlay" } else { "underlay" }
    }

    fn idle(&self) -> String {
        short(Duration::from_secs(self.idle_seconds.unsigned_abs()))
    }

    fn row(&self) -> Vec<String> {
        let to = self.translated_to.as_ref().map(|[_, destination]| destination.clone());
        vec![
            self.direction.to_owned(),
            self.device().to_owned(),
            self.protocol.clone(),
            self.source.clone(),
            self.destination.clone(),
            self.state.to_owned(),
            self.idle(),
            or_none(decider(self.policy, self.rule, self.by_default)),
            or_none(to.unwrap_or_default()),
        ]
    }
}

/// Empty: it is not known.
fn decider(policy: &str, rule: &str, by_default: bool) -> String {
    match (policy, rule) {
        _ if by_default => "the default".to_owned(),
        ("", "") => String::new(),
        ("", rule) => format!("{rule} (built in)"),
        (policy, rule) => format!("{policy}/{rule}"),
    }
}

/// What a change would do to the flows of one VM, for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ImpactDocument<'a> {
    node: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    error: &'a str,
    judged: u64,
    cut: u64,
    flows: Vec<CutDocument<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refused: Vec<RefusedDocument<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct CutDocument<'a> {
    #[serde(flatten)]
    flow: Document<'a>,
    #[serde(skip_serializing_if = "str::is_empty")]
    cut_by_policy: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    cut_by_rule: &'a str,
    cut_by_default: bool,
}

#[derive(Serialize)]
struct RefusedDocument<'a> {
    policy: &'a str,
    message: &'a str,
}

impl<'a> From<&'a NodeImpact> for ImpactDocument<'a> {
    fn from(of: &'a NodeImpact) -> Self {
        let impact = of.impact.as_ref();
        let cut = |cut: &'a CutFlow| {
            Some(CutDocument {
                flow: cut.flow.as_ref()?.into(),
                cut_by_policy: &cut.policy,
                cut_by_rule: &cut.rule,
                cut_by_default: cut.by_default,
            })
        };
        let refused = impact.iter().flat_map(|impact| &impact.refused);
        Self {
            node: &of.node,
            error: &of.error,
            judged: impact.map_or(0, |impact| impact.judged),
            cut: impact.map_or(0, |impact| impact.cut),
            flows: impact.iter().flat_map(|impact| &impact.flows).filter_map(cut).collect(),
            refused: refused
                .map(|one| RefusedDocument { policy: &one.policy, message: &one.message })
                .collect(),
        }
    }
}

/// What a change would do to the flows of all VMs that were asked.
pub(crate) fn impacts(all: &[NodeImpact]) -> String {
    if all.is_empty() {
        return "no VM gets other policies by it\n".to_owned();
    }
    let mut text = String::new();
    let mut untouched = 0;
    for impact in all.iter().map(ImpactDocument::from) {
        let node = impact.node;
        if !impact.error.is_empty() {
            text += &format!("{node}: not known: {}\n", impact.error);
            continue;
        }
        for RefusedDocument { policy, message } in &impact.refused {
            text += &format!("{node} would refuse {policy}: {message}\n");
        }
        if !impact.refused.is_empty() {
            continue;
        }
        if impact.cut == 0 {
            untouched += 1;
            continue;
        }
        text += &format!("{node}: {} of {} flows would be cut\n", impact.cut, impact.judged);
        for cut in &impact.flows {
            let CutDocument { flow, cut_by_policy, cut_by_rule, cut_by_default } = cut;
            text += &format!(
                "  {} {} {} {} > {}  {}, idle {}  by {}\n",
                flow.direction,
                flow.device(),
                flow.protocol,
                flow.source,
                flow.destination,
                flow.state,
                flow.idle(),
                decider(cut_by_policy, cut_by_rule, *cut_by_default),
            );
        }
        let more = impact.cut.saturating_sub(impact.flows.len() as u64);
        if more > 0 {
            text += &format!("  and {more} more\n");
        }
    }
    if untouched > 0 {
        text += &format!("no flow would be cut on {untouched} VMs\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use cnsmo_proto::pb::{
        flow::{FlowsImpact, RefusedPolicy},
        policy::Direction,
    };

    use super::*;

    fn flow() -> LiveFlow {
        LiveFlow {
            direction: Direction::Ingress.into(),
            protocol: 6,
            source: "2001:db8::1".into(),
            destination: "2001:db8::2".into(),
            source_port: 4000,
            destination_port: 22,
            state: "established".into(),
            idle: Some(prost_types::Duration { seconds: 3, nanos: 0 }),
            policy: "base".into(),
            rule: "ssh".into(),
            ..LiveFlow::default()
        }
    }

    #[test]
    fn a_row_says_who_what_and_why() {
        let row = Document::from(&flow()).row().join(" ");
        assert_eq!(
            row,
            "ingress underlay tcp [2001:db8::1]:4000 [2001:db8::2]:22 established 3s base/ssh -"
        );
        let echo = LiveFlow {
            protocol: 1,
            source: "192.0.2.1".into(),
            destination: "192.0.2.2".into(),
            overlay: true,
            policy: String::new(),
            rule: String::new(),
            by_default: true,
            ..flow()
        };
        let row = Document::from(&echo).row().join(" ");
        assert_eq!(row, "ingress overlay icmp 192.0.2.1 192.0.2.2 established 3s the default -");
    }

    #[test]
    fn each_vm_says_what_a_change_would_cut() {
        let impact = |node: &str, impact| NodeImpact {
            node: node.into(),
            impact: Some(impact),
            ..NodeImpact::default()
        };
        let cut = CutFlow { flow: Some(flow()), by_default: true, ..CutFlow::default() };
        let cut = FlowsImpact { judged: 9, cut: 4, flows: vec![cut], refused: Vec::new() };
        let refused = RefusedPolicy { policy: "big".into(), message: "too many rules".into() };
        let refused = FlowsImpact { refused: vec![refused], ..FlowsImpact::default() };
        let silent = NodeImpact {
            node: "vm4".into(),
            error: "not connected".into(),
            ..NodeImpact::default()
        };
        let all = [
            impact("vm1", cut),
            impact("vm2", FlowsImpact::default()),
            impact("vm3", refused),
            silent,
        ];
        assert_eq!(
            impacts(&all),
            "vm1: 4 of 9 flows would be cut\n\
             \x20 ingress underlay tcp [2001:db8::1]:4000 > [2001:db8::2]:22  established, idle 3s  \
             by the default\n\
             \x20 and 3 more\n\
             vm3 would refuse big: too many rules\n\
             vm4: not known: not connected\n\
             no flow would be cut on 1 VMs\n"
        );
        let json = serde_json::to_value(ImpactDocument::from(&all[0])).unwrap();
        assert_eq!(
            (&json["flows"][0]["cutByDefault"], &json["flows"][0]["rule"]),
            (&true.into(), &"ssh".into())
        );
        assert_eq!(impacts(&[]), "no VM gets other policies by it\n");
    }
}
