//! The spec of a `Deployment`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    balancer::PROTOCOLS,
    decode::{Decoder, Fields, digits, time, time_text, word},
    document,
    tree::{Node, Value},
};
use crate::{
    model,
    pb::deployment::{
        DeploymentSpec, ExecProbe, HttpProbe, Limits, Need, Placement, Port, Probe, Process,
        Rollout, Systemd, deployment_spec::Driver, probe, systemd,
    },
};

/// Signals that services are stopped by, by their number on Linux (signal(7)).
const SIGNALS: [(&str, u32); 6] =
    [("TERM", 15), ("INT", 2), ("QUIT", 3), ("HUP", 1), ("USR1", 10), ("USR2", 12)];
/// Units of bytes, the larger ones first.
const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

pub(super) fn decode(d: &mut Decoder, node: &Node) -> Option<DeploymentSpec> {
    const FIELDS: [&str; 9] = [
        "replicas",
        "placement",
        "needs",
        "process",
        "systemd",
        "ports",
        "attributes",
        "rollout",
        "drainTimeout",
    ];
    let before = d.problems();
    let fields = d.fields(node, &FIELDS)?;
    let replicas =
        d.optional(&fields, "replicas", |d, node| d.number(node, 0..=model::REPLICAS_MAX));
    let placement = d.optional(&fields, "placement", placement);
    let needs = d.optional(&fields, "needs", |d, node| {
        d.list(node, "a list of services, by name or each with `service`", need)
    });
    let process = d.optional(&fields, "process", process);
    let systemd = d.optional(&fields, "systemd", systemd);
    if let (Some(_), Some(systemd)) = (fields.get("process"), fields.get("systemd")) {
        d.field("systemd", |d| d.refuse(systemd, "there is `process` too: leave one of them out"));
    }
    let ports = d.optional(&fields, "ports", |d, node| {
        d.list(node, "a list of ports, each with `name`", port)
    });
    let attributes = d.optional(&fields, "attributes", document::labels);
    let rollout = d.optional(&fields, "rollout", rollout);
    let drain_timeout = d.optional(&fields, "drainTimeout", time);
    if d.problems() > before {
        return None;
    }
    let spec = DeploymentSpec {
        replicas: replicas.unwrap_or(1),
        placement: placement.map(Box::new),
        needs: needs.unwrap_or_default(),
        ports: ports.unwrap_or_default(),
        attributes: attributes.unwrap_or_default(),
        rollout,
        drain_timeout,
        driver: process.map(Driver::Process).or(systemd.map(Driver::Systemd)),
    };
    match model::Deployment::try_from(spec) {
        Ok(deployment) => Some((&deployment).into()),
        Err(invalid) => {
            d.refuse_invalid(node, invalid);
            None
        }
    }
}

fn placement(d: &mut Decoder, node: &Node) -> Option<Placement> {
    const FIELDS: [&str; 5] = ["selector", "node", "spread", "maxPerNode", "rescheduleAfter"];
    let fields = d.fields(node, &FIELDS)?;
    Some(Placement {
        selector: d.optional(&fields, "selector", document::labels).unwrap_or_default(),
        node: d.optional(&fields, "node", Decoder::filled).unwrap_or_default(),
        spread: d.optional(&fields, "spread", Decoder::filled).unwrap_or_default(),
        max_per_node: d
            .optional(&fields, "maxPerNode", |d, node| d.number(node, 1..=model::REPLICAS_MAX))
            .unwrap_or_default(),
        reschedule_after: d.optional(&fields, "rescheduleAfter", time),
    })
}

fn need(d: &mut Decoder, node: &Node) -> Option<Need> {
    if let Value::Text(service) = &node.value {
        return Some(Need { service: service.clone(), ..Need::default() });
    }
    let fields = d.fields(node, &["service", "ready", "timeout"])?;
    let service = d.required(node, &fields, "service", Decoder::filled);
    let ready = d.optional(&fields, "ready", |d, node| d.number(node, 1..=model::REPLICAS_MAX));
    let timeout = d.optional(&fields, "timeout", time);
    Some(Need { service: service?, ready: ready.unwrap_or_default(), timeout })
}

fn process(d: &mut Decoder, node: &Node) -> Option<Process> {
    const FIELDS: [&str; 10] = [
        "command",
        "environment",
        "user",
        "group",
        "directory",
        "limits",
        "readiness",
        "startTimeout",
        "stopSignal",
        "stopTimeout",
    ];
    let fields = d.fields(node, &FIELDS)?;
    let command = d.required(node, &fields, "command", command);
    Some(Process {
        environment: d.optional(&fields, "environment", Decoder::texts).unwrap_or_default(),
        user: d.optional(&fields, "user", Decoder::filled).unwrap_or_default(),
        group: d.optional(&fields, "group", Decoder::filled).unwrap_or_default(),
        directory: d.optional(&fields, "directory", Decoder::filled).unwrap_or_default(),
        limits: d.optional(&fields, "limits", limits),
        readiness: d.optional(&fields, "readiness", readiness),
        start_timeout: d.optional(&fields, "startTimeout", time),
        stop_signal: d.optional(&fields, "stopSignal", signal).unwrap_or_default(),
        stop_timeout: d.optional(&fields, "stopTimeout", time),
        command: command?,
    })
}

fn command(d: &mut Decoder, node: &Node) -> Option<Vec<String>> {
    d.list(
        node,
        "a list of texts: the program by its absolute path, then its arguments",
        Decoder::text,
    )
}

fn signal(d: &mut Decoder, node: &Node) -> Option<u32> {
    match node.value {
        Value::Integer(_) => d.number(node, 1..=64),
        _ => d.word(node, &SIGNALS),
    }
}

fn limits(d: &mut Decoder, node: &Node) -> Option<Limits> {
    let fields = d.fields(node, &["memory", "cpuMillis", "processes"])?;
    let number = |d: &mut Decoder, key| {
        d.optional(&fields, key, |d, node| d.number(node, 1..=u32::MAX)).unwrap_or_default()
    };
    let (cpu_millis, processes) = (number(d, "cpuMillis"), number(d, "processes"));
    let memory_bytes = d.optional(&fields, "memory", bytes).unwrap_or_default();
    Some(Limits { memory_bytes, cpu_millis, processes })
}

fn bytes(d: &mut Decoder, node: &Node) -> Option<u64> {
    let read = match &node.value {
        Value::Integer(n) => u64::try_from(*n).ok(),
        Value::Text(text) => UNITS.into_iter().find_map(|(unit, size)| {
            u64::from(digits(text.strip_suffix(unit)?.trim_end())?).checked_mul(size)
        }),
        _ => None,
    };
    if read.is_none() {
        d.mistyped(node, "bytes, such as 256MiB or 1GiB");
    }
    read
}

fn readiness(d: &mut Decoder, node: &Node) -> Option<Probe> {
    const CHECKS: [&str; 4] = ["tcp", "http", "exec", "announced"];
    let fields =
        d.fields(node, &["tcp", "http", "exec", "announced", "interval", "timeout", "fall"])?;
    if CHECKS.iter().filter(|check| fields.get(check).is_some()).count() != 1 {
        d.refuse(node, format!("must have one of {}", CHECKS.join(", ")));
        return None;
    }
    Some(Probe {
        probe: Some(check(d, &fields)?),
        interval: d.optional(&fields, "interval", time),
        timeout: d.optional(&fields, "timeout", time),
        fall: d.optional(&fields, "fall", |d, node| d.number(node, 1..=10)).unwrap_or_default(),
    })
}

fn check(d: &mut Decoder, fields: &Fields<'_>) -> Option<probe::Probe> {
    let tcp = d.optional(fields, "tcp", port_of_probe).map(probe::Probe::TcpPort);
    let http = d.optional(fields, "http", |d, node| {
        let fields = d.fields(node, &["port", "path"])?;
        let port = d.required(node, &fields, "port", port_of_probe)?;
        let path = d.optional(&fields, "path", Decoder::filled).unwrap_or_default();
        Some(probe::Probe::Http(HttpProbe { port, path }))
    });
    let exec = d.optional(fields, "exec", command);
    let exec = exec.map(|command| probe::Probe::Exec(ExecProbe { command }));
    let announced = d.optional(fields, "announced", |d, node| {
        if d.boolean(node)? {
            return Some(probe::Probe::Announced(true));
        }
        d.refuse(node, "is true, or left out");
        None
    });
    tcp.or(http).or(exec).or(announced)
}

/// By name or number.
fn port_of_probe(d: &mut Decoder, node: &Node) -> Option<String> {
    match node.value {
        Value::Integer(_) => d.number(node, 1..=u16::MAX.into()).map(|port| port.to_string()),
        _ => d.filled(node),
    }
}

fn systemd(d: &mut Decoder, node: &Node) -> Option<Systemd> {
    let fields = d.fields(node, &["unit", "process", "readiness"])?;
    let unit = d.optional(&fields, "unit", Decoder::filled).map(systemd::Unit::Name);
    let process = d.optional(&fields, "process", process);
    if fields.get("unit").is_some() == fields.get("process").is_some() {
        d.refuse(node, "must have one of unit, process");
        return None;
    }
    let readiness = d.optional(&fields, "readiness", readiness);
    let process = process.map(Box::new).map(systemd::Unit::Process);
    Some(Systemd { unit: unit.or(process), readiness })
}

fn port(d: &mut Decoder, node: &Node) -> Option<Port> {
    let fields = d.fields(node, &["name", "protocol", "port"])?;
    let name = d.required(node, &fields, "name", Decoder::filled);
    let protocol = d.optional(&fields, "protocol", |d, node| d.word(node, &PROTOCOLS));
    let port = d.optional(&fields, "port", |d, node| d.number(node, 1..=u16::MAX.into()));
    Some(Port {
        name: name?,
        protocol: protocol.unwrap_or_default(),
        port: port.unwrap_or_default(),
    })
}

fn rollout(d: &mut Decoder, node: &Node) -> Option<Rollout> {
    let fields = d.fields(node, &["maxUnavailable", "soak"])?;
    let most = |d: &mut Decoder, node: &Node| d.number(node, 1..=model::REPLICAS_MAX);
    let max_unavailable = d.optional(&fields, "maxUnavailable", most).unwrap_or_default();
    Some(Rollout { max_unavailable, soak: d.optional(&fields, "soak", time) })
}

/// The spec as it is written.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Document {
    replicas: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    placement: Option<PlacementDocument>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    needs: Vec<NeedDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<ProcessDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    systemd: Option<SystemdDocument>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<PortDocument>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    attributes: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rollout: Option<RolloutDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    drain_timeout: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PlacementDocument {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    selector: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spread: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_per_node: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reschedule_after: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
struct NeedDocument {
    service: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    ready: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ProcessDocument {
    command: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    environment: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    directory: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<LimitsDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    readiness: Option<ProbeDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    start_timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_signal: Option<SignalDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_timeout: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum SignalDocument {
    Word(&'static str),
    Number(u32),
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct LimitsDocument {
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_millis: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    processes: Option<u32>,
}

#[derive(Clone, Debug, Serialize)]
struct ProbeDocument {
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    http: Option<HttpDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exec: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    announced: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interval: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fall: Option<u32>,
}

#[derive(Clone, Debug, Serialize)]
struct HttpDocument {
    port: String,
    path: String,
}

#[derive(Clone, Debug, Serialize)]
struct SystemdDocument {
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<ProcessDocument>,
    #[serde(skip_serializing_if = "Option::is_none")]
    readiness: Option<ProbeDocument>,
}

#[derive(Clone, Debug, Serialize)]
struct PortDocument {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    protocol: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u32>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct RolloutDocument {
    #[serde(skip_serializing_if = "Option::is_none")]
    max_unavailable: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    soak: Option<String>,
}

impl Document {
    pub(super) fn new(spec: &DeploymentSpec) -> Self {
        let (process, systemd) = match &spec.driver {
            Some(Driver::Process(process)) => (Some(ProcessDocument::new(process)), None),
            Some(Driver::Systemd(systemd)) => (None, Some(SystemdDocument::new(systemd))),
            None => (None, None),
        };
        Self {
            replicas: spec.replicas,
            placement: spec.placement.as_deref().map(PlacementDocument::new),
            needs: spec.needs.iter().map(NeedDocument::new).collect(),
            process,
            systemd,
            ports: spec.ports.iter().map(PortDocument::new).collect(),
            attributes: spec.attributes.clone(),
            rollout: spec.rollout.as_ref().map(|rollout| RolloutDocument {
                max_unavailable: number(rollout.max_unavailable),
                soak: rollout.soak.and_then(time_text),
            }),
            drain_timeout: spec.drain_timeout.and_then(time_text),
        }
    }
}

impl PlacementDocument {
    fn new(placement: &Placement) -> Self {
        Self {
            selector: placement.selector.clone(),
            node: filled(&placement.node),
            spread: filled(&placement.spread),
            max_per_node: number(placement.max_per_node),
            reschedule_after: placement.reschedule_after.and_then(time_text),
        }
    }
}

impl NeedDocument {
    fn new(need: &Need) -> Self {
        Self {
            service: need.service.clone(),
            ready: number(need.ready),
            timeout: need.timeout.and_then(time_text),
        }
    }
}

impl ProcessDocument {
    fn new(process: &Process) -> Self {
        let signal = number(process.stop_signal).map(|number| {
            word(&SIGNALS, number).map_or(SignalDocument::Number(number), SignalDocument::Word)
        });
        Self {
            command: process.command.clone(),
            environment: process.environment.clone(),
            user: filled(&process.user),
            group: filled(&process.group),
            directory: filled(&process.directory),
            limits: process.limits.as_ref().map(|limits| LimitsDocument {
                memory: (limits.memory_bytes > 0).then(|| bytes_text(limits.memory_bytes)),
                cpu_millis: number(limits.cpu_millis),
                processes: number(limits.processes),
            }),
            readiness: process.readiness.as_ref().map(ProbeDocument::new),
            start_timeout: process.start_timeout.and_then(time_text),
            stop_signal: signal,
            stop_timeout: process.stop_timeout.and_then(time_text),
        }
    }
}

impl ProbeDocument {
    fn new(probe: &Probe) -> Self {
        let mut document = Self {
            tcp: None,
            http: None,
            exec: None,
            announced: None,
            interval: probe.interval.and_then(time_text),
            timeout: probe.timeout.and_then(time_text),
            fall: number(probe.fall),
        };
        match &probe.probe {
            Some(probe::Probe::TcpPort(port)) => document.tcp = Some(port.clone()),
            Some(probe::Probe::Http(http)) => {
                let HttpProbe { port, path } = http.clone();
                document.http = Some(HttpDocument { port, path });
            }
            Some(probe::Probe::Exec(exec)) => document.exec = Some(exec.command.clone()),
            Some(probe::Probe::Announced(announced)) => document.announced = Some(*announced),
            None => {}
        }
        document
    }
}

impl SystemdDocument {
    fn new(systemd: &Systemd) -> Self {
        let (unit, process) = match &systemd.unit {
            Some(systemd::Unit::Name(name)) => (Some(name.clone()), None),
            Some(systemd::Unit::Process(process)) => (None, Some(ProcessDocument::new(process))),
            None => (None, None),
        };
        Self { unit, process, readiness: systemd.readiness.as_ref().map(ProbeDocument::new) }
    }
}

impl PortDocument {
    fn new(port: &Port) -> Self {
        Self {
            name: port.name.clone(),
            protocol: word(&PROTOCOLS, port.protocol),
            port: number(port.port),
        }
    }
}

/// The API's 0 stands for a default.
fn number(number: u32) -> Option<u32> {
    Some(number).filter(|number| *number > 0)
}

fn filled(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|text| !text.is_empty())
}

/// The reverse of [`bytes`].
fn bytes_text(bytes: u64) -> String {
    let whole = |(_, size): &&(&str, u64)| bytes.is_multiple_of(*size);
    match UNITS.iter().find(whole) {
        Some((unit, size)) => format!("{}{unit}", bytes / size),
        None => bytes.to_string(),
    }
}
