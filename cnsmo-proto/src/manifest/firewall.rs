//! The spec of a `FirewallPolicy`.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use super::{
    decode::{Decoder, digits, time, time_text, word},
    document, icmp,
    tree::{Node, Value},
};
use crate::{
    model,
    pb::policy::{
        Action, Direction, FirewallPolicySpec, FirewallRule, FlowTimeouts, IcmpType, Mode, Peer,
        PortRange, RateLimit,
    },
};

/// Of a policy that states none: room on both sides.
pub(super) const PRIORITY_DEFAULT: u32 = 1000;

const ACTIONS: [(&str, Action); 3] =
    [("allow", Action::Allow), ("deny", Action::Deny), ("reject", Action::Reject)];
const MODES: [(&str, Mode); 2] = [("enforce", Mode::Enforce), ("audit", Mode::Audit)];
/// Seconds of a limit's period.
const PERIODS: [(&str, u32); 4] = [("s", 1), ("m", 60), ("h", 3_600), ("d", 86_400)];
/// Whether each source has a limit of its own.
const SHARES: [(&str, bool); 2] = [("rule", false), ("source", true)];
const DIRECTIONS: [(&str, Direction); 2] =
    [("ingress", Direction::Ingress), ("egress", Direction::Egress)];
const ANY: &str = "any";

pub(super) fn decode(d: &mut Decoder, node: &Node) -> Option<FirewallPolicySpec> {
    let before = d.problems();
    const FIELDS: [&str; 7] =
        ["target", "priority", "defaults", "mode", "rules", "timeouts", "orphanFragments"];
    let fields = d.fields(node, &FIELDS)?;
    let target = d.optional(&fields, "target", document::labels).unwrap_or_default();
    let priority =
        d.optional(&fields, "priority", |d, node| d.number(node, 0..=model::PRIORITY_MAX));
    let defaults = d.optional(&fields, "defaults", |d, node| {
        let fields = d.fields(node, &["ingress", "egress"])?;
        Some((d.optional(&fields, "ingress", action), d.optional(&fields, "egress", action)))
    });
    let (ingress, egress) = defaults.unwrap_or_default();
    let mode = d.optional(&fields, "mode", |d, node| d.word(node, &MODES));
    let rules = d.optional(&fields, "rules", |d, node| d.list(node, "a list of rules", rule));
    let spec = FirewallPolicySpec {
        target,
        priority: priority.unwrap_or(PRIORITY_DEFAULT),
        default_ingress: ingress.unwrap_or(Action::Unspecified).into(),
        default_egress: egress.unwrap_or(Action::Unspecified).into(),
        rules: rules.unwrap_or_default(),
        mode: mode.unwrap_or(Mode::Unspecified).into(),
        timeouts: d.optional(&fields, "timeouts", timeouts),
        orphan_fragments: d
            .optional(&fields, "orphanFragments", action)
            .unwrap_or(Action::Unspecified)
            .into(),
    };
    // What no rule can know alone; only of a spec that was read wholly, else the numbers of rules would be wrong.
    if d.problems() > before {
        return None;
    }
    match model::FirewallPolicy::try_from(spec) {
        Ok(policy) => Some((&policy).into()),
        Err(invalid) => {
            d.refuse_invalid(node, in_words_of_the_manifest(&invalid));
            None
        }
    }
}

fn rule(d: &mut Decoder, node: &Node) -> Option<FirewallRule> {
    const FIELDS: [&str; 12] = [
        "name",
        "action",
        "direction",
        "from",
        "to",
        "protocol",
        "ports",
        "sourcePorts",
        "icmpTypes",
        "log",
        "limit",
        "connectionsPerSource",
    ];
    let before = d.problems();
    let fields = d.fields(node, &FIELDS)?;
    let name = d.required(node, &fields, "name", Decoder::text);
    let action = d.required(node, &fields, "action", action);
    let direction = d.required(node, &fields, "direction", |d, node| d.word(node, &DIRECTIONS));
    let (from_cidrs, from) = d.optional(&fields, "from", side).unwrap_or_default();
    let (to_cidrs, to) = d.optional(&fields, "to", side).unwrap_or_default();
    let read = d.optional(&fields, "protocol", protocol);
    let protocol = read.flatten();
    let port_list = |d: &mut Decoder, node: &Node| {
        d.matches(node, "a list of ports such as 80 and \"8000-8100\"", ports)
    };
    let ports = d.optional(&fields, "ports", port_list).unwrap_or_default();
    let source_ports = d.optional(&fields, "sourcePorts", port_list).unwrap_or_default();
    // Types cannot be judged without a protocol that could be read.
    let icmp_types = if fields.get("protocol").is_none() || read.is_some() {
        d.optional(&fields, "icmpTypes", |d, node| icmp_types(d, node, protocol))
    } else {
        None
    };
    let rule = FirewallRule {
        name: name.unwrap_or_default(),
        action: action.unwrap_or(Action::Unspecified).into(),
        direction: direction.unwrap_or(Direction::Unspecified).into(),
        from_cidrs,
        to_cidrs,
        protocol,
        source_ports,
        ports,
        icmp_types: icmp_types.unwrap_or_default(),
        from,
        to,
        log: d.optional(&fields, "log", Decoder::boolean).unwrap_or_default(),
        limit: d.optional(&fields, "limit", limit),
        connections_per_source: d
            .optional(&fields, "connectionsPerSource", |d, node| {
                d.number(node, 1..=model::CONNECTIONS_MAX)
            })
            .unwrap_or_default(),
    };
    if d.problems() == before
        && let Err(invalid) = model::Rule::try_from(rule.clone())
    {
        d.refuse_invalid(node, in_words_of_the_manifest(&invalid));
    }
    Some(rule)
}

fn action(d: &mut Decoder, node: &Node) -> Option<Action> {
    d.word(node, &ACTIONS)
}

fn timeouts(d: &mut Decoder, node: &Node) -> Option<FlowTimeouts> {
    const FIELDS: [&str; 6] =
        ["tcpOpening", "tcpEstablished", "tcpClosing", "unreplied", "replied", "echo"];
    let fields = d.fields(node, &FIELDS)?;
    let [tcp_opening, tcp_established, tcp_closing, unreplied, replied, echo] =
        FIELDS.map(|field| d.optional(&fields, field, time));
    Some(FlowTimeouts { tcp_opening, tcp_established, tcp_closing, unreplied, replied, echo })
}

/// A rate such as `100/s`; the burst is one period's worth if none is given.
fn limit(d: &mut Decoder, node: &Node) -> Option<RateLimit> {
    let fields = d.fields(node, &["rate", "burst", "per"])?;
    let rate = d.required(node, &fields, "rate", rate);
    let burst = d.optional(&fields, "burst", |d, node| d.number(node, 1..=model::LIMIT_FLOWS_MAX));
    let per_source = d.optional(&fields, "per", |d, node| d.word(node, &SHARES));
    let (flows, period_seconds) = rate?;
    let per_source = per_source.unwrap_or_default();
    Some(RateLimit { flows, period_seconds, burst: burst.unwrap_or(flows), per_source })
}

fn rate(d: &mut Decoder, node: &Node) -> Option<(u32, u32)> {
    let read = match &node.value {
        Value::Text(text) => text.split_once('/').and_then(|(flows, period)| {
            let period = PERIODS.iter().find(|(name, _)| *name == period)?;
            digits(flows).filter(|n| (1..=model::LIMIT_FLOWS_MAX).contains(n)).zip(Some(period.1))
        }),
        Value::Null
        | Value::Bool(_)
        | Value::Integer(_)
        | Value::Float(_)
        | Value::List(_)
        | Value::Map(_) => None,
    };
    if read.is_none() {
        d.mistyped(
            node,
            format!(
                "new flows per second, minute, hour or day, such as 100/s, 30/m, 10/h, 5/d (1 to {})",
                model::LIMIT_FLOWS_MAX
            ),
        );
    }
    read
}

/// `any`, CIDRs or a peer.
fn side(d: &mut Decoder, node: &Node) -> Option<(Vec<String>, Option<Peer>)> {
    const EXPECTED: &str = "`any`, a list of CIDRs, or `labels` or `service` of VMs";
    match &node.value {
        Value::Text(word) if word == ANY => Some((vec![], None)),
        Value::Map(_) => peer(d, node).map(|peer| (vec![], Some(peer))),
        _ => d.matches(node, EXPECTED, cidr).map(|cidrs| (cidrs, None)),
    }
}

fn cidr(d: &mut Decoder, node: &Node) -> Option<String> {
    if let Value::Map(_) = node.value {
        d.refuse(node, "labels or a service stand alone, without CIDRs: use another rule for them");
        return None;
    }
    d.text(node)
}

fn peer(d: &mut Decoder, node: &Node) -> Option<Peer> {
    let before = d.problems();
    let fields = d.fields(node, &["labels", "service"])?;
    let labels = d.optional(&fields, "labels", document::labels).unwrap_or_default();
    let service = d.optional(&fields, "service", Decoder::filled).unwrap_or_default();
    if d.problems() > before {
        return None;
    }
    if labels.is_empty() && service.is_empty() {
        d.refuse(node, "missing: `labels`, at least one, or `service`");
        return None;
    }
    Some(Peer { labels, service })
}

/// The outer `None` after an error, the inner one for any.
fn protocol(d: &mut Decoder, node: &Node) -> Option<Option<u32>> {
    match &node.value {
        Value::Text(word) if word == ANY => Some(None),
        Value::Text(word) => {
            let known = icmp::PROTOCOLS.iter().find(|(name, _)| name == word);
            if known.is_none() {
                let names: Vec<_> = icmp::PROTOCOLS.iter().map(|(name, _)| *name).collect();
                let names = names.join(", ");
                d.refuse(node, format!("`{word}` is none of any, {names} and 0 to 255"));
            }
            known.map(|(_, number)| Some(u32::from(*number)))
        }
        _ => d.number(node, 0..=u8::MAX.into()).map(Some),
    }
}

fn ports(d: &mut Decoder, node: &Node) -> Option<PortRange> {
    let range = match &node.value {
        Value::Integer(port) => u32::try_from(*port).ok().map(|port| (port, port)),
        Value::Text(text) => {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            digits(first).zip(digits(last))
        }
        Value::Null | Value::Bool(_) | Value::Float(_) | Value::List(_) | Value::Map(_) => None,
    };
    if range.is_none() {
        d.mistyped(node, "a port (0 to 65535) or a range such as \"8000-8100\"");
    }
    range.map(|(first, last)| PortRange { first, last })
}

fn icmp_types(d: &mut Decoder, node: &Node, protocol: Option<u32>) -> Option<Vec<IcmpType>> {
    let types = icmp::types(protocol.unwrap_or_default());
    if types.is_empty() {
        d.refuse(node, "only icmp and icmpv6 have types");
        return None;
    }
    d.matches(node, "a list of ICMP types", |d, node| icmp_type(d, node, types))
}

fn icmp_type(d: &mut Decoder, node: &Node, types: &[(&str, u8)]) -> Option<IcmpType> {
    let read = match &node.value {
        Value::Integer(kind) => u32::try_from(*kind).ok().map(|kind| (kind, None)),
        Value::Text(text) => {
            let (kind, code) = match text.split_once('/') {
                Some((kind, code)) => (kind, Some(digits(code))),
                None => (text.as_str(), None),
            };
            let named = types.iter().find(|(name, _)| *name == kind).map(|(_, n)| u32::from(*n));
            named.or_else(|| digits(kind)).and_then(|kind| match code {
                Some(code) => code.map(|code| (kind, Some(code))),
                None => Some((kind, None)),
            })
        }
        Value::Null | Value::Bool(_) | Value::Float(_) | Value::List(_) | Value::Map(_) => None,
    };
    let byte = 0..=u32::from(u8::MAX);
    let read = read
        .filter(|(kind, code)| byte.contains(kind) && code.is_none_or(|code| byte.contains(&code)));
    if read.is_none() {
        let names: Vec<_> = types.iter().map(|(name, _)| *name).collect();
        let names = names.join(", ");
        d.mistyped(
            node,
            format!("a type (0 to 255), type/code such as \"3/4\", or one of {names}"),
        );
    }
    read.map(|(kind, code)| IcmpType { r#type: kind, code })
}

/// The model speaks of the API's fields.
fn in_words_of_the_manifest(invalid: &model::Invalid) -> model::Invalid {
    let field = invalid
        .field()
        .replace("fromCidrs", "from")
        .replace("toCidrs", "to")
        .replace("defaultIngress", "defaults.ingress")
        .replace("defaultEgress", "defaults.egress");
    let reason = invalid.reason().replace("fromCidrs", "`from`");
    let inner = model::Invalid::new(reason);
    if field.is_empty() { inner } else { inner.at(field) }
}

/// The word for a direction.
pub fn direction(direction: Direction) -> &'static str {
    word(&DIRECTIONS, direction).unwrap_or("unknown")
}

/// One side of a rule in one line: `any`, CIDRs, labels such as `role=lb`, or `service web`.
pub fn side_of(cidrs: &[String], peer: Option<&Peer>) -> String {
    match peer {
        None if cidrs.is_empty() => ANY.to_owned(),
        None => cidrs.join(","),
        Some(Peer { labels, service }) if service.is_empty() => {
            let labels = labels.iter().map(|(key, value)| format!("{key}={value}"));
            labels.collect::<Vec<_>>().join(",")
        }
        Some(Peer { service, .. }) => format!("service {service}"),
    }
}

/// The word for an IANA protocol number, or the number.
pub fn protocol_name(number: u32) -> String {
    named(&icmp::PROTOCOLS, number).to_string()
}

/// Protocol, ports and ICMP types of a rule in one line, for example `tcp 80,8000-8100`.
pub fn traffic(rule: &FirewallRule) -> String {
    let list = |items: Vec<NumberOrText>| {
        items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    };
    let document = RuleDocument::new(rule);
    let mut text = document.protocol.map_or(ANY.to_owned(), |protocol| protocol.to_string());
    for (before, items) in
        [(" ", document.ports), (" from port ", document.source_ports), (" ", document.icmp_types)]
    {
        if !items.is_empty() {
            text.push_str(before);
            text.push_str(&list(items));
        }
    }
    text
}

/// The spec as it is written.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Document {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    target: BTreeMap<String, String>,
    priority: u32,
    #[serde(skip_serializing_if = "DefaultsDocument::is_empty")]
    defaults: DefaultsDocument,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<&'static str>,
    rules: Vec<RuleDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeouts: Option<TimeoutsDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    orphan_fragments: Option<&'static str>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct TimeoutsDocument {
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp_opening: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp_established: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp_closing: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreplied: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replied: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    echo: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct DefaultsDocument {
    #[serde(skip_serializing_if = "Option::is_none")]
    ingress: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    egress: Option<&'static str>,
}

impl DefaultsDocument {
    fn is_empty(&self) -> bool {
        self.ingress.is_none() && self.egress.is_none()
    }
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct RuleDocument {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    direction: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<SideDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<SideDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<NumberOrText>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<NumberOrText>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    source_ports: Vec<NumberOrText>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    icmp_types: Vec<NumberOrText>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    log: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<LimitDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connections_per_source: Option<u32>,
}

#[derive(Clone, Debug, Serialize)]
struct LimitDocument {
    rate: String,
    burst: u32,
    per: &'static str,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum SideDocument {
    Cidrs(Vec<String>),
    Labels { labels: BTreeMap<String, String> },
    Service { service: String },
}

impl SideDocument {
    /// None: any.
    fn new(cidrs: &[String], peer: Option<&Peer>) -> Option<Self> {
        match peer {
            None => (!cidrs.is_empty()).then(|| Self::Cidrs(cidrs.to_vec())),
            Some(Peer { labels, service }) if service.is_empty() => {
                Some(Self::Labels { labels: labels.clone() })
            }
            Some(Peer { service, .. }) => Some(Self::Service { service: service.clone() }),
        }
    }
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u32),
    Text(String),
}

impl fmt::Display for NumberOrText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl Document {
    pub(super) fn new(spec: &FirewallPolicySpec) -> Self {
        Self {
            target: spec.target.clone(),
            priority: spec.priority,
            defaults: DefaultsDocument {
                ingress: word(&ACTIONS, spec.default_ingress()),
                egress: word(&ACTIONS, spec.default_egress()),
            },
            mode: word(&MODES, spec.mode()),
            rules: spec.rules.iter().map(RuleDocument::new).collect(),
            timeouts: spec.timeouts.as_ref().map(|timeouts| TimeoutsDocument {
                tcp_opening: timeouts.tcp_opening.and_then(time_text),
                tcp_established: timeouts.tcp_established.and_then(time_text),
                tcp_closing: timeouts.tcp_closing.and_then(time_text),
                unreplied: timeouts.unreplied.and_then(time_text),
                replied: timeouts.replied.and_then(time_text),
                echo: timeouts.echo.and_then(time_text),
            }),
            orphan_fragments: word(&ACTIONS, spec.orphan_fragments()),
        }
    }
}

impl RuleDocument {
    fn new(rule: &FirewallRule) -> Self {
        Self {
            name: rule.name.clone(),
            action: word(&ACTIONS, rule.action()),
            direction: word(&DIRECTIONS, rule.direction()),
            from: SideDocument::new(&rule.from_cidrs, rule.from.as_ref()),
            to: SideDocument::new(&rule.to_cidrs, rule.to.as_ref()),
            protocol: rule.protocol.map(|n| named(&icmp::PROTOCOLS, n)),
            ports: rule.ports.iter().map(range_document).collect(),
            source_ports: rule.source_ports.iter().map(range_document).collect(),
            icmp_types: rule
                .icmp_types
                .iter()
                .map(|t| icmp_document(*t, rule.protocol.unwrap_or_default()))
                .collect(),
            log: rule.log,
            limit: rule.limit.as_ref().map(limit_document),
            connections_per_source: Some(rule.connections_per_source).filter(|n| *n != 0),
        }
    }
}

fn limit_document(limit: &RateLimit) -> LimitDocument {
    LimitDocument {
        rate: format!("{}/{}", limit.flows, word(&PERIODS, limit.period_seconds).unwrap_or("?")),
        burst: limit.burst,
        per: word(&SHARES, limit.per_source).unwrap_or_default(),
    }
}

/// The word for a mode.
pub fn mode(mode: Mode) -> &'static str {
    word(&MODES, mode).unwrap_or("enforce")
}

/// What a rule does, in words: its action, limit and log.
pub fn action_text(rule: &FirewallRule) -> String {
    let mut text = word(&ACTIONS, rule.action()).unwrap_or("unknown").to_owned();
    if let Some(limit) = &rule.limit {
        let LimitDocument { rate, burst, per } = limit_document(limit);
        text.push_str(&format!(" {rate} per {per}, burst {burst}"));
    }
    if rule.connections_per_source != 0 {
        text.push_str(&format!(", {} open per source", rule.connections_per_source));
    }
    if rule.log {
        text.push_str(", logged");
    }
    text
}

fn named(names: &[(&'static str, u8)], number: u32) -> NumberOrText {
    match names.iter().find(|(_, n)| u32::from(*n) == number) {
        Some((name, _)) => NumberOrText::Text((*name).to_owned()),
        None => NumberOrText::Number(number),
    }
}

fn range_document(range: &PortRange) -> NumberOrText {
    if range.first == range.last {
        NumberOrText::Number(range.first)
    } else {
        NumberOrText::Text(format!("{}-{}", range.first, range.last))
    }
}

fn icmp_document(kind: IcmpType, protocol: u32) -> NumberOrText {
    match kind.code {
        Some(code) => NumberOrText::Text(format!("{}/{code}", kind.r#type)),
        None => named(icmp::types(protocol), kind.r#type),
    }
}
