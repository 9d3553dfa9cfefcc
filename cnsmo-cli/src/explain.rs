//! `cnsmo explain`: what would happen to a packet on its way.

use std::{
    io::{self, Write as _},
    net::IpAddr,
    process::ExitCode,
    str::FromStr,
};

use anyhow::Result;
use cnsmo_proto::{
    manifest,
    pb::flow::{ExplainRequest, ExplainResponse, ExplainStep, Judgement},
};
use serde::Serialize;

use crate::{
    args::{ExplainArgs, Format},
    client::{Client, refused},
    output::{age, end, print_json, print_yaml},
};

/// The packet would be dropped.
const DROPPED: u8 = 4;

/// A VM, balancer or address, with port and protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    name: String,
    port: Option<u16>,
    /// IANA number.
    protocol: Option<u8>,
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, word)) => (rest, Some(protocol(word)?)),
            None => (text, None),
        };
        let bare: Option<IpAddr> = rest.parse().ok();
        let (name, port) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((address, "")) => (address, None),
            Some((address, rest)) => (address, Some(rest.strip_prefix(':').unwrap_or(rest))),
            None if bare.is_some() => (rest, None),
            None => match rest.split_once(':') {
                Some((name, port)) => (name, Some(port)),
                None => (rest, None),
            },
        };
        let port = port.map(|port| {
            let read = port.parse().ok().filter(|port| *port != 0_u16);
            read.ok_or_else(|| format!("`{port}` is not a port: 1 to 65535"))
        });
        let port = port.transpose()?;
        if name.is_empty() {
            return Err("a VM, a load balancer or an address is missing".into());
        }
        if port.is_none() && matches!(protocol, Some(6 | 17 | 132)) {
            return Err("a port is missing, as in vm2:443/tcp".into());
        }
        if port.is_some() && !matches!(protocol, None | Some(6 | 17 | 132)) {
            return Err("only tcp, udp and sctp have ports".into());
        }
        Ok(Self { name: name.to_owned(), port, protocol })
    }
}

fn protocol(word: &str) -> Result<u8, String> {
    let named = (0..=u8::MAX).find(|number| manifest::protocol((*number).into()) == word);
    named
        .or_else(|| word.parse().ok())
        .ok_or_else(|| format!("`{word}` is no protocol: tcp, udp, sctp, icmp, icmpv6 or 0 to 255"))
}

pub(crate) async fn explain(
    client: &Client,
    format: Format,
    args: ExplainArgs,
) -> Result<ExitCode> {
    let mut core = client.flows().await?;
    let answer = core.explain(request(args)).await.map_err(refused)?.into_inner();
    match format {
        Format::Json => print_json(&Document::from(&answer))?,
        Format::Yaml => print_yaml(&Document::from(&answer))?,
        Format::Table => io::stdout().write_all(text(&answer).as_bytes())?,
    }
    Ok(if answer.passes { ExitCode::SUCCESS } else { ExitCode::from(DROPPED) })
}

fn request(args: ExplainArgs) -> ExplainRequest {
    let ExplainArgs { from, to, via, underlay, ipv6 } = args;
    let is_v6 = |end: &End| end.name.parse::<IpAddr>().ok().map(|ip| ip.is_ipv6());
    let v6 = is_v6(&to).or(is_v6(&from)).unwrap_or(ipv6);
    let echo = if v6 { 58 } else { 1 };
    let protocol = to.protocol.unwrap_or(if to.port.is_some() { 6 } else { echo });
    ExplainRequest {
        from: from.name,
        to: to.name,
        protocol: protocol.into(),
        port: to.port.unwrap_or_default().into(),
        source_port: from.port.unwrap_or_default().into(),
        via: via.map(|via| via.to_string()).unwrap_or_default(),
        underlay,
        ipv6: v6,
    }
}

/// Stable names for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    passes: bool,
    steps: Vec<StepDocument<'a>>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    notes: &'a [String],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StepDocument<'a> {
    node: &'a str,
    direction: &'static str,
    overlay: bool,
    protocol: String,
    source: String,
    destination: String,
    verdict: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    policy: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    rule: &'a str,
    by_default: bool,
    #[serde(skip_serializing_if = "str::is_empty")]
    flow: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    translated_to: Option<[String; 2]>,
    #[serde(skip_serializing_if = "str::is_empty")]
    load_balancer: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    backend: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    backend_instance: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    tunnel_peer: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    endpoint: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_handshake_time: Option<String>,
}

impl<'a> From<&'a ExplainResponse> for Document<'a> {
    fn from(answer: &'a ExplainResponse) -> Self {
        let steps = answer.steps.iter().filter_map(StepDocument::new).collect();
        Self { passes: answer.passes, steps, notes: &answer.notes }
    }
}

impl<'a> StepDocument<'a> {
    /// `None`: an answer without content.
    fn new(step: &'a ExplainStep) -> Option<Self> {
        let (packet, judgement) = step.packet.as_ref().zip(step.judgement.as_ref())?;
        let has_ports = matches!(packet.protocol, 6 | 17 | 132);
        let end = |address: &str, port: u32| end(address, has_ports.then_some(port));
        Some(Self {
            node: &step.node,
            direction: manifest::direction(step.direction()),
            overlay: step.overlay,
            protocol: manifest::protocol(packet.protocol),
            source: end(&packet.source, packet.source_port),
            destination: end(&packet.destination, packet.destination_port),
            verdict: verdict(judgement),
            reason: &judgement.drop_reason,
            policy: &judgement.policy,
            rule: &judgement.rule,
            by_default: judgement.by_default,
            flow: &judgement.flow_state,
            translated_to: judgement.translated.as_ref().map(|to| {
                [end(&to.source, to.source_port), end(&to.destination, to.destination_port)]
            }),
            load_balancer: &judgement.load_balancer,
            backend: &step.backend,
            backend_instance: &step.backend_instance,
            tunnel_peer: &step.tunnel_peer,
            endpoint: &step.endpoint,
            last_handshake_time: step.last_handshake_time.as_ref().map(ToString::to_string),
        })
    }
}

fn verdict(judgement: &Judgement) -> &'static str {
    match judgement {
        Judgement { unguarded: true, .. } => "unguarded",
        Judgement { rejected: true, .. } => "rejected",
        Judgement { drop_reason, .. } if !drop_reason.is_empty() => "dropped",
        Judgement { audited: true, .. } => "audited",
        _ => "passes",
    }
}

/// One hook per paragraph.
fn text(answer: &ExplainResponse) -> String {
    let mut text = String::new();
    for wire in &answer.steps {
        let Some(step) = StepDocument::new(wire) else { continue };
        let place = if step.overlay { "overlay" } else { "underlay" };
        let (protocol, source, destination) = (&step.protocol, &step.source, &step.destination);
        text += &format!(
            "{} {} {place}  {protocol} {source} > {destination}\n",
            step.node, step.direction
        );
        let mut verdict = step.verdict.to_owned();
        if !step.reason.is_empty() {
            verdict += &format!(": {}", step.reason);
        }
        let mut lines = vec![verdict];
        if !step.rule.is_empty() {
            let policy = if step.policy.is_empty() { "built in" } else { step.policy };
            lines.push(format!("rule {policy}/{}", step.rule));
        } else if step.by_default {
            lines.push("no rule matches: the default".into());
        }
        match step.flow {
            "" => lines.push("a new flow".into()),
            state => lines.push(format!("a known flow, {state}")),
        }
        if let Some([source, destination]) = &step.translated_to {
            let by = if step.load_balancer.is_empty() {
                "translated".to_owned()
            } else {
                format!("balanced by {}", step.load_balancer)
            };
            let backend = match (step.backend, step.backend_instance) {
                ("", _) => String::new(),
                (node, "") => format!(", {node}"),
                (node, instance) => format!(", {instance} on {node}"),
            };
            lines.push(format!("{by}: {source} > {destination}{backend}"));
        }
        if !step.tunnel_peer.is_empty() {
            let at = if step.endpoint.is_empty() { "unknown place" } else { step.endpoint };
            let handshake = match wire.last_handshake_time {
                Some(time) => format!("last handshake {} ago", age(Some(time))),
                None => "no handshake yet".into(),
            };
            lines.push(format!("tunnel to {} at {at}, {handshake}", step.tunnel_peer));
        }
        for line in lines {
            text += &format!("  {line}\n");
        }
    }
    for note in &answer.notes {
        text += &format!("note: {note}\n");
    }
    let verdict = match (answer.passes, answer.steps.last()) {
        (false, Some(last)) => format!("it does not pass {}\n", last.node),
        _ => "it passes\n".to_owned(),
    };
    text + &verdict
}

#[cfg(test)]
mod tests {
    use cnsmo_proto::pb::{
        flow::{PacketQuery, Translated},
        policy::Direction,
    };

    use super::*;

    fn end(name: &str, port: Option<u16>, protocol: Option<u8>) -> End {
        End { name: name.into(), port, protocol }
    }

    #[test]
    fn ends_are_read() {
        for (text, expected) in [
            ("vm1", end("vm1", None, None)),
            ("vm2:443/tcp", end("vm2", Some(443), Some(6))),
            ("front:80", end("front", Some(80), None)),
            ("10.0.0.7:53/udp", end("10.0.0.7", Some(53), Some(17))),
            ("2001:db8::7", end("2001:db8::7", None, None)),
            ("[2001:db8::7]:22", end("2001:db8::7", Some(22), None)),
            ("[2001:db8::7]/icmpv6", end("2001:db8::7", None, Some(58))),
            ("vm2/47", end("vm2", None, Some(47))),
        ] {
            assert_eq!(text.parse::<End>(), Ok(expected), "{text}");
        }
        for bad in ["", ":80", "vm2:0", "vm2:65536", "vm2:http", "vm2/tcp", "vm2:1/icmp", "vm2/x"] {
            assert!(bad.parse::<End>().is_err(), "{bad}");
        }
    }

    #[test]
    fn each_hook_says_what_decides_there() {
        let packet = |source: &str, destination: &str, port| PacketQuery {
            source: source.into(),
            destination: destination.into(),
            protocol: 6,
            source_port: 61_000,
            destination_port: port,
            ..PacketQuery::default()
        };
        let first = ExplainStep {
            node: "vm1".into(),
            direction: Direction::Egress.into(),
            overlay: true,
            packet: Some(packet("10.70.0.1", "10.70.9.9", 443)),
            judgement: Some(Judgement {
                by_default: true,
                load_balancer: "front".into(),
                translated: Some(Translated {
                    source: "10.70.0.1".into(),
                    destination: "10.70.0.3".into(),
                    source_port: 61_000,
                    destination_port: 8_080,
                }),
                ..Judgement::default()
            }),
            backend: "vm3".into(),
            backend_instance: "web-1".into(),
            tunnel_peer: "vm3".into(),
            ..ExplainStep::default()
        };
        let second = ExplainStep {
            node: "vm3".into(),
            direction: Direction::Ingress.into(),
            overlay: true,
            packet: Some(packet("10.70.0.1", "10.70.0.3", 8_080)),
            judgement: Some(Judgement {
                drop_reason: "denied".into(),
                policy: "web".into(),
                rule: "no-http".into(),
                ..Judgement::default()
            }),
            ..ExplainStep::default()
        };
        let answer = ExplainResponse { steps: vec![first, second], ..ExplainResponse::default() };
        assert_eq!(
            text(&answer),
            "vm1 egress overlay  tcp 10.70.0.1:61000 > 10.70.9.9:443\n\
             \x20 passes\n\
             \x20 no rule matches: the default\n\
             \x20 a new flow\n\
             \x20 balanced by front: 10.70.0.1:61000 > 10.70.0.3:8080, web-1 on vm3\n\
             \x20 tunnel to vm3 at unknown place, no handshake yet\n\
             vm3 ingress overlay  tcp 10.70.0.1:61000 > 10.70.0.3:8080\n\
             \x20 dropped: denied\n\
             \x20 rule web/no-http\n\
             \x20 a new flow\n\
             it does not pass vm3\n"
        );
        let json = serde_json::to_value(Document::from(&answer)).unwrap();
        assert_eq!(
            (&json["passes"], &json["steps"][1]["reason"]),
            (&false.into(), &"denied".into())
        );
        assert_eq!(json["steps"][0]["backend"], "vm3");
    }
}
