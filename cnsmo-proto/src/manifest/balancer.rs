//! The spec of a `LoadBalancer`.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

use super::{
    decode::{Decoder, digits, word},
    document,
    tree::{Node, Value},
};
use crate::{
    model::{self, protocol},
    pb::balancer::{Algorithm, HealthCheck, LoadBalancerSpec, Mode, Selector, ServicePort},
};

const ALGORITHMS: [(&str, Algorithm); 3] = [
    ("maglev", Algorithm::Maglev),
    ("roundrobin", Algorithm::RoundRobin),
    ("source", Algorithm::Source),
];
const MODES: [(&str, Mode); 1] = [("nat", Mode::Nat)];
/// What the design knows and this version does not serve.
const LATER_MODES: [&str; 1] = ["dsr"];
pub(super) const PROTOCOLS: [(&str, u32); 2] =
    [("tcp", protocol::TCP as u32), ("udp", protocol::UDP as u32)];
const TIMES_MAX: u32 = 10;

pub(super) fn decode(d: &mut Decoder, node: &Node) -> Option<LoadBalancerSpec> {
    const FIELDS: [&str; 9] = [
        "network",
        "addresses",
        "ports",
        "backends",
        "service",
        "gateways",
        "algorithm",
        "mode",
        "health",
    ];
    let before = d.problems();
    let fields = d.fields(node, &FIELDS)?;
    let network = d.required(node, &fields, "network", Decoder::text);
    let addresses = d.required(node, &fields, "addresses", |d, node| {
        d.list(node, "a list of IP addresses", Decoder::text)
    });
    let ports = d.required(node, &fields, "ports", |d, node| {
        d.list(node, "a list of ports, each with `protocol` and `port`", service_port)
    });
    // One of them is required: without, the clients of a service would be sent to every VM.
    let service = d.optional(&fields, "service", Decoder::text);
    let backends = match service {
        Some(_) => d.optional(&fields, "backends", document::labels),
        None => d.required(node, &fields, "backends", document::labels),
    };
    let gateways = d.optional(&fields, "gateways", document::labels);
    let algorithm = d.optional(&fields, "algorithm", |d, node| d.word(node, &ALGORITHMS));
    let mode = d.optional(&fields, "mode", mode);
    let health = d.optional(&fields, "health", health);
    if d.problems() > before {
        return None;
    }
    let spec = LoadBalancerSpec {
        network: network?,
        addresses: addresses?,
        ports: ports?,
        backends: backends.unwrap_or_default(),
        gateways: gateways.map(|labels| Selector { labels }),
        algorithm: algorithm.unwrap_or(Algorithm::Unspecified).into(),
        mode: mode.unwrap_or(Mode::Unspecified).into(),
        health,
        service: service.unwrap_or_default(),
    };
    match model::LoadBalancer::try_from(spec) {
        Ok(balancer) => Some((&balancer).into()),
        Err(invalid) => {
            d.refuse_invalid(node, invalid);
            None
        }
    }
}

fn service_port(d: &mut Decoder, node: &Node) -> Option<ServicePort> {
    let number = |d: &mut Decoder, node: &Node| d.number(node, 1..=u16::MAX.into());
    let fields = d.fields(node, &["protocol", "port", "targetPort"])?;
    let protocol = d.required(node, &fields, "protocol", |d, node| d.word(node, &PROTOCOLS));
    let port = d.required(node, &fields, "port", number);
    let target_port = d.optional(&fields, "targetPort", number).unwrap_or_default();
    Some(ServicePort { protocol: protocol?, port: port?, target_port })
}

fn mode(d: &mut Decoder, node: &Node) -> Option<Mode> {
    if let Value::Text(word) = &node.value
        && LATER_MODES.contains(&word.as_str())
    {
        d.refuse(node, format!("`{word}` is not supported by this version: use nat"));
        return None;
    }
    d.word(node, &MODES)
}

fn health(d: &mut Decoder, node: &Node) -> Option<HealthCheck> {
    let times = |d: &mut Decoder, node: &Node| d.number(node, 1..=TIMES_MAX);
    let fields = d.fields(node, &["port", "interval", "timeout", "fall", "rise"])?;
    let port = d.optional(&fields, "port", |d, node| d.number(node, 1..=u16::MAX.into()));
    Some(HealthCheck {
        port: port.unwrap_or_default(),
        interval: d.optional(&fields, "interval", time),
        timeout: d.optional(&fields, "timeout", time),
        fall: d.optional(&fields, "fall", times).unwrap_or_default(),
        rise: d.optional(&fields, "rise", times).unwrap_or_default(),
    })
}

/// Milliseconds or seconds. Zero would mean the default to the API.
fn time(d: &mut Decoder, node: &Node) -> Option<prost_types::Duration> {
    let read = match &node.value {
        Value::Text(text) => match (text.strip_suffix("ms"), text.strip_suffix('s')) {
            (Some(ms), _) => digits(ms).map(|ms| Duration::from_millis(ms.into())),
            (None, Some(s)) => digits(s).map(|s| Duration::from_secs(s.into())),
            (None, None) => None,
        },
        Value::Null
        | Value::Bool(_)
        | Value::Integer(_)
        | Value::Float(_)
        | Value::List(_)
        | Value::Map(_) => None,
    };
    let time = read.filter(|time| !time.is_zero());
    if time.is_none() {
        d.mistyped(node, "milliseconds or seconds, such as 500ms or 2s");
    }
    time.and_then(|time| prost_types::Duration::try_from(time).ok())
}

/// The word for an algorithm.
pub fn algorithm(algorithm: Algorithm) -> &'static str {
    word(&ALGORITHMS, algorithm).unwrap_or("unknown")
}

/// The ports in one line, for example `tcp 80->8080, udp 53`.
pub fn ports(ports: &[ServicePort]) -> String {
    let one = |port: &ServicePort| {
        let protocol = word(&PROTOCOLS, port.protocol).unwrap_or("unknown");
        match port.target_port {
            target if target == 0 || target == port.port => format!("{protocol} {}", port.port),
            target => format!("{protocol} {}->{target}", port.port),
        }
    };
    ports.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The spec as it is written.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Document {
    network: String,
    addresses: Vec<String>,
    ports: Vec<PortDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backends: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "String::is_empty")]
    service: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateways: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    algorithm: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    health: Option<HealthDocument>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PortDocument {
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<&'static str>,
    port: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_port: Option<u32>,
}

#[derive(Clone, Debug, Serialize)]
struct HealthDocument {
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interval: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fall: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rise: Option<u32>,
}

impl Document {
    pub(super) fn new(spec: &LoadBalancerSpec) -> Self {
        Self {
            network: spec.network.clone(),
            addresses: spec.addresses.clone(),
            ports: spec.ports.iter().map(PortDocument::new).collect(),
            backends: spec.service.is_empty().then(|| spec.backends.clone()),
            service: spec.service.clone(),
            gateways: spec.gateways.as_ref().map(|selector| selector.labels.clone()),
            algorithm: word(&ALGORITHMS, spec.algorithm()),
            mode: word(&MODES, spec.mode()),
            health: spec.health.as_ref().map(HealthDocument::new),
        }
    }
}

impl PortDocument {
    fn new(port: &ServicePort) -> Self {
        Self {
            protocol: word(&PROTOCOLS, port.protocol),
            port: port.port,
            target_port: some(port.target_port),
        }
    }
}

impl HealthDocument {
    fn new(check: &HealthCheck) -> Self {
        Self {
            port: some(check.port),
            interval: check.interval.and_then(time_text),
            timeout: check.timeout.and_then(time_text),
            fall: some(check.fall),
            rise: some(check.rise),
        }
    }
}

/// The API's 0 stands for a default.
fn some(number: u32) -> Option<u32> {
    Some(number).filter(|number| *number > 0)
}

/// The reverse of [`time`].
fn time_text(time: prost_types::Duration) -> Option<String> {
    let time = Duration::try_from(time).ok().filter(|time| !time.is_zero())?;
    Some(match time.subsec_millis() {
        0 => format!("{}s", time.as_secs()),
        _ => format!("{}ms", time.as_millis()),
    })
}
