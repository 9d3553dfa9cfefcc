use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    time::Duration,
};

use super::{Invalid, Labels, Name, firewall::protocol, process::Driver};
use crate::pb::deployment as pb;

/// Instances of one deployment.
pub const REPLICAS_MAX: u32 = 1_000;
/// Services that one deployment needs.
pub const NEEDS_MAX: usize = 16;
/// Ports of one instance.
pub const DEPLOYMENT_PORTS_MAX: usize = 16;
/// Attributes of an instance: the catalogue takes as many again from others.
pub const ATTRIBUTES_MAX: usize = 16;
/// A port's name becomes part of a variable's (RFC 6335, section 5.1, has the same limit).
const PORT_NAME_BYTES_MAX: usize = 15;
const NEED_TIMEOUT: Duration = Duration::from_secs(300);
const RESCHEDULE_AFTER: Duration = Duration::from_secs(120);
/// Shorter ones would move what only starts again.
const RESCHEDULE_AFTER_MIN: Duration = Duration::from_secs(1);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_secs(3_600);
/// The label over whose values instances are spread if none is named.
pub const SPREAD: &str = "zone";

/// The spec of a `Deployment`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deployment {
    /// Instances.
    pub replicas: u32,
    /// Where they may run.
    pub placement: Placement,
    /// What must be there first.
    pub needs: Vec<Need>,
    /// What an instance is.
    pub template: Template,
    /// How instances are replaced.
    pub rollout: Rollout,
    /// For connections of an instance that shall end.
    pub drain_timeout: Duration,
}

/// What makes an instance what it is: with another one it is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// What runs it.
    pub driver: Driver,
    /// No name twice.
    pub ports: Vec<Port>,
    /// Of the announced instances.
    pub attributes: Labels,
}

/// Where instances may run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// VMs with these labels.
    pub selector: Labels,
    /// One VM, whatever its labels.
    pub node: Option<Name>,
    /// Label over whose values they are spread.
    pub spread: String,
    /// On one VM; 0: no limit.
    pub max_per_node: u32,
    /// One that has been failing for so long goes to another VM. None: never.
    pub reschedule_after: Option<Duration>,
}

/// A service that must be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Its name.
    pub service: Name,
    /// So many ready instances of it.
    pub ready: u32,
    /// After this time the deployment says so.
    pub timeout: Duration,
}

/// A port of each instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// A DNS label.
    pub name: Name,
    /// TCP (6) or UDP (17).
    pub protocol: u8,
    /// 0: each instance gets one of its own.
    pub port: u16,
}

/// One instance, as its VM is to run it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Unique among all of the deployment that ever were.
    pub name: Name,
    /// Name of the deployment, and of the service.
    pub deployment: Name,
    /// Name of the VM.
    pub node: Name,
    /// It shall end: why.
    pub draining: Option<String>,
    /// Of the deployment.
    pub generation: i64,
    /// What it is; ports have numbers.
    pub template: Template,
    /// For its connections when it shall end.
    pub drain_timeout: Duration,
}

/// How instances are replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rollout {
    /// May be missing meanwhile; at least 1.
    pub max_unavailable: u32,
    /// For which a new one must be ready before the next one is replaced.
    pub soak: Duration,
}

impl TryFrom<pb::DeploymentSpec> for Deployment {
    type Error = Invalid;

    fn try_from(spec: pb::DeploymentSpec) -> Result<Self, Invalid> {
        if spec.replicas > REPLICAS_MAX {
            let why = format!("{} instances; at most {REPLICAS_MAX} are allowed", spec.replicas);
            return Err(Invalid::new(why).at("replicas"));
        }
        let ports = ports(&spec.ports).map_err(|e| e.at("ports"))?;
        let attributes = Labels::new(spec.attributes).map_err(|e| e.at("attributes"))?;
        let n = attributes.as_map().len();
        if n > ATTRIBUTES_MAX {
            let why = format!("{n} attributes; at most {ATTRIBUTES_MAX} are allowed");
            return Err(Invalid::new(why).at("attributes"));
        }
        let rollout = spec.rollout.unwrap_or_default();
        Ok(Self {
            replicas: spec.replicas,
            placement: placement(*spec.placement.unwrap_or_default())
                .map_err(|e| e.at("placement"))?,
            needs: needs(spec.needs).map_err(|e| e.at("needs"))?,
            rollout: Rollout {
                max_unavailable: rollout.max_unavailable.max(1),
                soak: time(rollout.soak, Duration::ZERO, Duration::ZERO..=HOUR)
                    .map_err(|e| e.at("soak").at("rollout"))?,
            },
            drain_timeout: time(spec.drain_timeout, DRAIN_TIMEOUT, Duration::ZERO..=HOUR)
                .map_err(|e| e.at("drainTimeout"))?,
            template: Template { driver: Driver::new(spec.driver, &ports)?, ports, attributes },
        })
    }
}

fn placement(wire: pb::Placement) -> Result<Placement, Invalid> {
    let selector = Labels::new(wire.selector).map_err(|e| e.at("selector"))?;
    let node = Some(wire.node).filter(|node| !node.is_empty());
    let node = node.map(Name::new).transpose().map_err(|e| e.at("node"))?;
    if node.is_some() && !selector.as_map().is_empty() {
        return Err(Invalid::new("is one VM by its name: leave the selector out").at("node"));
    }
    let spread = if wire.spread.is_empty() { SPREAD.to_owned() } else { wire.spread };
    Labels::new([(spread.clone(), String::new())].into()).map_err(|e| e.at("spread"))?;
    let reschedule_after =
        time(wire.reschedule_after, RESCHEDULE_AFTER, Duration::ZERO..=24 * HOUR)
            .map_err(|e| e.at("rescheduleAfter"))?;
    if (Duration::from_nanos(1)..RESCHEDULE_AFTER_MIN).contains(&reschedule_after) {
        let why = format!("is below {RESCHEDULE_AFTER_MIN:?}; 0s: never");
        return Err(Invalid::new(why).at("rescheduleAfter"));
    }
    let reschedule_after = Some(reschedule_after).filter(|time| !time.is_zero());
    Ok(Placement { selector, node, spread, max_per_node: wire.max_per_node, reschedule_after })
}

fn needs(wire: Vec<pb::Need>) -> Result<Vec<Need>, Invalid> {
    let n = wire.len();
    if n > NEEDS_MAX {
        return Err(Invalid::new(format!("{n} needs; at most {NEEDS_MAX} are allowed")));
    }
    let mut seen = BTreeSet::new();
    let one = |(n, wire): (usize, pb::Need)| {
        let need = need(wire).map_err(|e| e.at_index(n))?;
        if !seen.insert(need.service.clone()) {
            let why = format!("{} is needed twice", need.service);
            return Err(Invalid::new(why).at("service").at_index(n));
        }
        Ok(need)
    };
    wire.into_iter().enumerate().map(one).collect()
}

fn need(wire: pb::Need) -> Result<Need, Invalid> {
    if wire.ready > REPLICAS_MAX {
        return Err(Invalid::new(format!("{} is above {REPLICAS_MAX}", wire.ready)).at("ready"));
    }
    Ok(Need {
        service: Name::new(wire.service).map_err(|e| e.at("service"))?,
        ready: wire.ready.max(1),
        timeout: time(wire.timeout, NEED_TIMEOUT, Duration::from_secs(1)..=24 * HOUR)
            .map_err(|e| e.at("timeout"))?,
    })
}

fn ports(wire: &[pb::Port]) -> Result<Vec<Port>, Invalid> {
    let n = wire.len();
    if n > DEPLOYMENT_PORTS_MAX {
        return Err(Invalid::new(format!("{n} ports; at most {DEPLOYMENT_PORTS_MAX} are allowed")));
    }
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    let one = |(n, wire): (usize, &pb::Port)| {
        let port = Port::try_from(wire).map_err(|e| e.at_index(n))?;
        if !names.insert(port_variable(&port.name)) {
            return Err(Invalid::new(format!("{} twice", port.name)).at("name").at_index(n));
        }
        if port.port != 0 && !numbers.insert((port.protocol, port.port)) {
            return Err(Invalid::new(format!("{} twice", port.port)).at("port").at_index(n));
        }
        Ok(port)
    };
    wire.iter().enumerate().map(one).collect()
}

impl TryFrom<&pb::Port> for Port {
    type Error = Invalid;

    fn try_from(wire: &pb::Port) -> Result<Self, Invalid> {
        let name = Name::new(wire.name.as_str()).map_err(|e| e.at("name"))?;
        if name.as_str().len() > PORT_NAME_BYTES_MAX {
            let why = format!("`{name}` is longer than {PORT_NAME_BYTES_MAX} characters");
            return Err(Invalid::new(why).at("name"));
        }
        let protocol = match u8::try_from(wire.protocol) {
            Ok(0 | protocol::TCP) => protocol::TCP,
            Ok(protocol::UDP) => protocol::UDP,
            _ => return Err(Invalid::new("is not tcp or udp").at("protocol")),
        };
        let port = u16::try_from(wire.port).map_err(|_| {
            Invalid::new(format!("{} is not a port: 1 to 65535", wire.port)).at("port")
        })?;
        Ok(Self { name, protocol, port })
    }
}

impl From<&Port> for pb::Port {
    fn from(port: &Port) -> Self {
        let Port { name, protocol, port } = port;
        Self { name: name.to_string(), protocol: (*protocol).into(), port: (*port).into() }
    }
}

impl TryFrom<pb::Instance> for Instance {
    type Error = Invalid;

    fn try_from(wire: pb::Instance) -> Result<Self, Invalid> {
        let draining = match wire.goal() {
            pb::instance::Goal::Run => None,
            pb::instance::Goal::Drain => Some(wire.goal_reason),
            pb::instance::Goal::Unspecified => return Err(Invalid::new("missing").at("goal")),
        };
        let ports = ports(&wire.ports).map_err(|e| e.at("ports"))?;
        if let Some(port) = ports.iter().find(|port| port.port == 0) {
            return Err(Invalid::new(format!("{} has no number", port.name)).at("ports"));
        }
        let driver = wire.driver.map(|driver| match driver {
            pb::instance::Driver::Process(one) => pb::deployment_spec::Driver::Process(one),
            pb::instance::Driver::Systemd(one) => pb::deployment_spec::Driver::Systemd(one),
        });
        let attributes = Labels::new(wire.attributes).map_err(|e| e.at("attributes"))?;
        Ok(Self {
            name: Name::new(wire.name).map_err(|e| e.at("name"))?,
            deployment: Name::new(wire.deployment).map_err(|e| e.at("deployment"))?,
            node: Name::new(wire.node).map_err(|e| e.at("node"))?,
            draining,
            generation: wire.generation,
            drain_timeout: time(wire.drain_timeout, DRAIN_TIMEOUT, Duration::ZERO..=HOUR)
                .map_err(|e| e.at("drainTimeout"))?,
            template: Template { driver: Driver::new(driver, &ports)?, ports, attributes },
        })
    }
}

impl From<&Instance> for pb::Instance {
    fn from(instance: &Instance) -> Self {
        use pb::instance::Goal;
        let goal = if instance.draining.is_some() { Goal::Drain } else { Goal::Run };
        let driver = match pb::deployment_spec::Driver::from(&instance.template.driver) {
            pb::deployment_spec::Driver::Process(one) => pb::instance::Driver::Process(one),
            pb::deployment_spec::Driver::Systemd(one) => pb::instance::Driver::Systemd(one),
        };
        Self {
            name: instance.name.to_string(),
            deployment: instance.deployment.to_string(),
            node: instance.node.to_string(),
            goal: goal.into(),
            goal_reason: instance.draining.clone().unwrap_or_default(),
            generation: instance.generation,
            driver: Some(driver),
            ports: instance.template.ports.iter().map(Into::into).collect(),
            attributes: instance.template.attributes.as_map().clone(),
            drain_timeout: instance.drain_timeout.try_into().ok(),
        }
    }
}

/// The variable in which an instance finds its port.
pub fn port_variable(name: &Name) -> String {
    format!("PORT_{}", name.as_str().to_ascii_uppercase().replace('-', "_"))
}

/// In whole milliseconds, the rest is dropped.
pub(super) fn time(
    wire: Option<prost_types::Duration>,
    absent: Duration,
    range: RangeInclusive<Duration>,
) -> Result<Duration, Invalid> {
    let Some(wire) = wire else { return Ok(absent) };
    let whole = |time: Duration| {
        Duration::from_secs(time.as_secs()) + Duration::from_millis(time.subsec_millis().into())
    };
    let time = Duration::try_from(wire).ok().map(whole).filter(|time| range.contains(time));
    time.ok_or_else(|| {
        Invalid::new(format!("is not from {:?} to {:?}", range.start(), range.end()))
    })
}

/// 0: `absent`.
pub(super) fn times(n: u32, absent: u8, max: u8) -> Result<u8, Invalid> {
    match u8::try_from(n) {
        Ok(0) => Ok(absent),
        Ok(n) if n <= max => Ok(n),
        _ => Err(Invalid::new(format!("{n} is above {max}"))),
    }
}

impl From<&Deployment> for pb::DeploymentSpec {
    fn from(deployment: &Deployment) -> Self {
        let Deployment { replicas, placement, needs, template, rollout, drain_timeout } =
            deployment;
        let need = |need: &Need| pb::Need {
            service: need.service.to_string(),
            ready: need.ready,
            timeout: need.timeout.try_into().ok(),
        };
        Self {
            replicas: *replicas,
            placement: Some(Box::new(pb::Placement {
                selector: placement.selector.as_map().clone(),
                node: placement.node.as_ref().map(ToString::to_string).unwrap_or_default(),
                spread: placement.spread.clone(),
                max_per_node: placement.max_per_node,
                reschedule_after: placement.reschedule_after.unwrap_or_default().try_into().ok(),
            })),
            needs: needs.iter().map(need).collect(),
            driver: Some((&template.driver).into()),
            ports: template.ports.iter().map(Into::into).collect(),
            attributes: template.attributes.as_map().clone(),
            rollout: Some(pb::Rollout {
                max_unavailable: rollout.max_unavailable,
                soak: rollout.soak.try_into().ok(),
            }),
            drain_timeout: (*drain_timeout).try_into().ok(),
        }
    }
}

/// Services that need each other in a circle, from one of them round to itself.
pub fn cycle<'a>(needs: &BTreeMap<&'a str, Vec<&'a str>>) -> Option<Vec<&'a str>> {
    let mut done = BTreeSet::new();
    needs.keys().find_map(|start| {
        let mut path = Vec::new();
        walk(start, needs, &mut path, &mut done)
    })
}

/// Depth first. The path is as long as the longest chain of needs, the number of deployments at most.
fn walk<'a>(
    at: &'a str,
    needs: &BTreeMap<&'a str, Vec<&'a str>>,
    path: &mut Vec<&'a str>,
    done: &mut BTreeSet<&'a str>,
) -> Option<Vec<&'a str>> {
    if let Some(start) = path.iter().position(|seen| *seen == at) {
        let mut circle = path[start..].to_vec();
        circle.push(at);
        return Some(circle);
    }
    if done.contains(at) {
        return None;
    }
    path.push(at);
    for next in needs.get(at).into_iter().flatten() {
        if let Some(circle) = walk(next, needs, path, done) {
            return Some(circle);
        }
    }
    path.pop();
    done.insert(at);
    None
}

#[cfg(test)]
mod tests {
    use super::{super::process, *};

    fn spec() -> pb::DeploymentSpec {
        pb::DeploymentSpec {
            replicas: 3,
            driver: Some(pb::deployment_spec::Driver::Process(process::sleep())),
            ports: vec![pb::Port { name: "http".into(), protocol: 0, port: 0 }],
            ..pb::DeploymentSpec::default()
        }
    }

    #[test]
    fn what_is_left_out_has_a_meaning_and_the_canonical_form_is_stable() {
        let model = Deployment::try_from(spec()).unwrap();
        assert_eq!(model.placement.spread, "zone");
        assert_eq!((model.rollout.max_unavailable, model.drain_timeout), (1, DRAIN_TIMEOUT));
        assert_eq!(model.template.ports[0].protocol, protocol::TCP);
        let canonical = pb::DeploymentSpec::from(&model);
        assert_eq!(Deployment::try_from(canonical.clone()).unwrap(), model);
        assert_eq!(
            pb::DeploymentSpec::from(&Deployment::try_from(canonical.clone()).unwrap()),
            canonical
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_field() {
        let refused = |change: &dyn Fn(&mut pb::DeploymentSpec)| {
            let mut spec = spec();
            change(&mut spec);
            Deployment::try_from(spec).unwrap_err().to_string()
        };
        let port = |name: &str, port| pb::Port { name: name.into(), protocol: 0, port };
        type Case<'a> = (&'a dyn Fn(&mut pb::DeploymentSpec), &'a str);
        let cases: [Case<'_>; 9] = [
            (&|s| s.replicas = 1_001, "replicas: 1001 instances"),
            (&|s| s.driver = None, "missing: say what runs"),
            (&|s| s.ports.push(port("http", 1)), "ports[1].name: http twice"),
            (&|s| s.ports = vec![port("a", 80), port("b", 80)], "ports[1].port: 80 twice"),
            (&|s| s.ports = vec![port("a", 70_000)], "ports[0].port: 70000 is not"),
            (&|s| s.ports = vec![port("averylongportname", 1)], "ports[0].name: `averylong"),
            (&|s| s.needs = vec![pb::Need::default()], "needs[0].service: `` is not a name"),
            (
                &|s| s.drain_timeout = Some(prost_types::Duration { seconds: -1, nanos: 0 }),
                "drainTimeout: is not from",
            ),
            (
                &|s| {
                    s.placement = Some(Box::new(pb::Placement {
                        selector: [("a".into(), "b".into())].into(),
                        node: "vm1".into(),
                        ..Default::default()
                    }));
                },
                "placement.node: is one VM",
            ),
        ];
        for (change, expected) in cases {
            let error = refused(change);
            assert!(error.starts_with(expected), "{error}: {expected}");
        }
    }

    #[test]
    fn needs_in_a_circle_are_found() {
        let needs = |all: &[(&'static str, &[&'static str])]| {
            let all: BTreeMap<_, _> = all.iter().map(|(a, b)| (*a, b.to_vec())).collect();
            cycle(&all)
        };
        assert_eq!(needs(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])]), None);
        assert_eq!(needs(&[("a", &["b"]), ("b", &["gone"])]), None);
        assert_eq!(needs(&[("a", &["a"])]), Some(vec!["a", "a"]));
        let circle = needs(&[("a", &["b"]), ("b", &["c"]), ("c", &["d", "b"]), ("d", &[])]);
        assert_eq!(circle, Some(vec!["b", "c", "b"]));
    }
}
