use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use super::{
    Addresses, Invalid, Labels, Name,
    error::shorten,
    firewall::protocol,
    network::{is_for_hosts, optional, text},
};
use crate::pb::balancer as pb;

/// Virtual addresses of one balancer.
pub const ADDRESSES_MAX: usize = 8;
/// Ports of one balancer.
pub const PORTS_MAX: usize = 16;

/// The spec of a `LoadBalancer`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadBalancer {
    /// The network through which the backends are reached.
    pub network: Name,
    /// Virtual addresses, at least one, none twice.
    pub addresses: Vec<IpAddr>,
    /// At least one; no protocol and port twice.
    pub ports: Vec<ServicePort>,
    /// What is behind it.
    pub backends: Backends,
    /// VMs that serve clients outside of the network.
    pub gateways: Option<Labels>,
    /// How a new flow finds its backend.
    pub algorithm: Algorithm,
    /// How packets reach it.
    pub mode: Mode,
    /// `None`: every backend counts as healthy.
    pub health: Option<HealthCheck>,
}

/// What is behind a balancer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backends {
    /// Members of the network with these labels.
    Nodes(Labels),
    /// Instances of this service on members of the network.
    Service(Name),
}

/// A port of the virtual addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// TCP (6) or UDP (17).
    pub protocol: u8,
    /// Of the virtual addresses.
    pub port: u16,
    /// Of the backends. 0: each has its own.
    pub target_port: u16,
}

/// How a new flow finds its backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// By a hash of both ends.
    #[default]
    Maglev,
    /// In turn.
    RoundRobin,
    /// By a hash of the client's address.
    Source,
}

/// How packets reach the backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Addresses and ports are rewritten, there and back.
    #[default]
    Nat,
}

/// A TCP connection to each backend, again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HealthCheck {
    /// On the backends. 0: each has its own.
    pub port: u16,
    /// From one check to the next.
    pub interval: Duration,
    /// For one connection.
    pub timeout: Duration,
    /// Failures in a row that take a backend out.
    pub fall: u8,
    /// Successes in a row that take it in again.
    pub rise: u8,
}

/// A VM behind a balancer, or an instance of a service on one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Name of the balancer.
    pub load_balancer: Name,
    /// Name of the VM.
    pub node: Name,
    /// In the balancer's network; at least one.
    pub addresses: Addresses,
    /// Gets no new flows.
    pub draining: bool,
    /// Name of the instance; `None`: the VM itself.
    pub instance: Option<Name>,
    /// Where the instance listens. 0: at the target ports of the balancer alone.
    pub port: u16,
    /// Why it drains, for people.
    pub message: String,
}

impl TryFrom<pb::LoadBalancerSpec> for LoadBalancer {
    type Error = Invalid;

    fn try_from(spec: pb::LoadBalancerSpec) -> Result<Self, Invalid> {
        let backends = backends(spec.backends, spec.service)?;
        let is_service = matches!(backends, Backends::Service(_));
        let ports = ports(&spec.ports, is_service).map_err(|e| e.at("ports"))?;
        let gateways = spec.gateways.map(|selector| Labels::new(selector.labels)).transpose();
        let health = spec.health.map(|check| health(check, &ports)).transpose();
        Ok(Self {
            network: Name::new(spec.network).map_err(|e| e.at("network"))?,
            addresses: addresses(&spec.addresses).map_err(|e| e.at("addresses"))?,
            backends,
            gateways: gateways.map_err(|e| e.at("gateways"))?,
            algorithm: match pb::Algorithm::try_from(spec.algorithm) {
                Ok(pb::Algorithm::Unspecified | pb::Algorithm::Maglev) => Algorithm::Maglev,
                Ok(pb::Algorithm::RoundRobin) => Algorithm::RoundRobin,
                Ok(pb::Algorithm::Source) => Algorithm::Source,
                Err(unknown) => return Err(Invalid::new(unknown.to_string()).at("algorithm")),
            },
            mode: match pb::Mode::try_from(spec.mode) {
                Ok(pb::Mode::Unspecified | pb::Mode::Nat) => Mode::Nat,
                Err(unknown) => return Err(Invalid::new(unknown.to_string()).at("mode")),
            },
            health: health.map_err(|e| e.at("health"))?,
            ports,
        })
    }
}

fn backends(labels: BTreeMap<String, String>, service: String) -> Result<Backends, Invalid> {
    if service.is_empty() {
        return Labels::new(labels).map(Backends::Nodes).map_err(|e| e.at("backends"));
    }
    if !labels.is_empty() {
        let why = "a balancer has backends by labels or by service, not both";
        return Err(Invalid::new(why).at("service"));
    }
    Name::new(service).map(Backends::Service).map_err(|e| e.at("service"))
}

fn addresses(wire: &[String]) -> Result<Vec<IpAddr>, Invalid> {
    let n = wire.len();
    if !(1..=ADDRESSES_MAX).contains(&n) {
        return Err(Invalid::new(format!("{n} addresses; 1 to {ADDRESSES_MAX} are needed")));
    }
    let mut seen = BTreeSet::new();
    let one = |(n, text): (usize, &String)| {
        let address: IpAddr = text.parse().map_err(|_| {
            Invalid::new(format!("`{}` is not an IP address", shorten(text))).at_index(n)
        })?;
        if !is_for_hosts(address) {
            return Err(Invalid::new(format!("{address} cannot be a virtual address")).at_index(n));
        }
        if !seen.insert(address) {
            return Err(Invalid::new(format!("{address} twice")).at_index(n));
        }
        Ok(address)
    };
    wire.iter().enumerate().map(one).collect()
}

fn ports(wire: &[pb::ServicePort], of_service: bool) -> Result<Vec<ServicePort>, Invalid> {
    let n = wire.len();
    if !(1..=PORTS_MAX).contains(&n) {
        return Err(Invalid::new(format!("{n} ports; 1 to {PORTS_MAX} are needed")));
    }
    let mut seen = BTreeSet::new();
    let is_only = wire.len() == 1;
    let one = |(n, wire): (usize, &pb::ServicePort)| {
        let mut port = service_port(wire).map_err(|e| e.at_index(n))?;
        if of_service && wire.target_port == 0 {
            if is_only {
                port.target_port = 0;
            } else {
                let why = "missing: an instance announces one port, the balancer has several";
                return Err(Invalid::new(why).at("targetPort").at_index(n));
            }
        }
        if !seen.insert((port.protocol, port.port)) {
            let why = format!("port {} of the same protocol twice", port.port);
            return Err(Invalid::new(why).at("port").at_index(n));
        }
        Ok(port)
    };
    wire.iter().enumerate().map(one).collect()
}

fn service_port(wire: &pb::ServicePort) -> Result<ServicePort, Invalid> {
    let protocol = u8::try_from(wire.protocol).ok();
    let protocol = protocol.filter(|n| matches!(*n, protocol::TCP | protocol::UDP));
    let protocol = protocol.ok_or_else(|| Invalid::new("is not tcp or udp").at("protocol"))?;
    let number = port(wire.port).map_err(|e| e.at("port"))?;
    let target_port = match wire.target_port {
        0 => number,
        n => port(n).map_err(|e| e.at("targetPort"))?,
    };
    Ok(ServicePort { protocol, port: number, target_port })
}

fn port(n: u32) -> Result<u16, Invalid> {
    let port = u16::try_from(n).ok().filter(|port| *port != 0);
    port.ok_or_else(|| Invalid::new(format!("{n} is not a port: 1 to 65535")))
}

fn health(wire: pb::HealthCheck, ports: &[ServicePort]) -> Result<HealthCheck, Invalid> {
    let tcp = ports.iter().find(|port| port.protocol == protocol::TCP);
    let port = match (wire.port, tcp) {
        (0, Some(first)) => first.target_port,
        (0, None) => {
            let why = "missing: a TCP port of the backends, for the balancer has none";
            return Err(Invalid::new(why).at("port"));
        }
        (n, _) => port(n).map_err(|e| e.at("port"))?,
    };
    let times = |n: u32, field| match n {
        0 => Ok(2),
        1..=10 => Ok(n as u8),
        _ => Err(Invalid::new(format!("{n} is above 10")).at(field)),
    };
    Ok(HealthCheck {
        port,
        interval: duration(wire.interval, 100, 60_000).map_err(|e| e.at("interval"))?,
        timeout: duration(wire.timeout, 50, 10_000).map_err(|e| e.at("timeout"))?,
        fall: times(wire.fall, "fall")?,
        rise: times(wire.rise, "rise")?,
    })
}

/// In whole milliseconds, the rest is dropped; absent or 0: 500.
fn duration(wire: Option<prost_types::Duration>, min: u64, max: u64) -> Result<Duration, Invalid> {
    let wire = wire.unwrap_or_default();
    if wire.seconds == 0 && wire.nanos == 0 {
        return Ok(Duration::from_millis(500));
    }
    let range = Duration::from_millis(min)..=Duration::from_millis(max);
    let whole = |time: Duration| {
        Duration::from_secs(time.as_secs()) + Duration::from_millis(time.subsec_millis().into())
    };
    let duration = Duration::try_from(wire).ok().map(whole).filter(|time| range.contains(time));
    duration.ok_or_else(|| Invalid::new(format!("is not from {min} to {max} ms")))
}

impl From<&LoadBalancer> for pb::LoadBalancerSpec {
    fn from(balancer: &LoadBalancer) -> Self {
        let port = |port: &ServicePort| pb::ServicePort {
            protocol: port.protocol.into(),
            port: port.port.into(),
            target_port: port.target_port.into(),
        };
        let selector = |labels: &Labels| pb::Selector { labels: labels.as_map().clone() };
        Self {
            network: balancer.network.to_string(),
            addresses: balancer.addresses.iter().map(ToString::to_string).collect(),
            ports: balancer.ports.iter().map(port).collect(),
            backends: match &balancer.backends {
                Backends::Nodes(labels) => labels.as_map().clone(),
                Backends::Service(_) => BTreeMap::new(),
            },
            gateways: balancer.gateways.as_ref().map(selector),
            algorithm: match balancer.algorithm {
                Algorithm::Maglev => pb::Algorithm::Maglev,
                Algorithm::RoundRobin => pb::Algorithm::RoundRobin,
                Algorithm::Source => pb::Algorithm::Source,
            }
            .into(),
            mode: match balancer.mode {
                Mode::Nat => pb::Mode::Nat,
            }
            .into(),
            health: balancer.health.as_ref().map(|check| pb::HealthCheck {
                port: check.port.into(),
                interval: prost_types::Duration::try_from(check.interval).ok(),
                timeout: prost_types::Duration::try_from(check.timeout).ok(),
                fall: check.fall.into(),
                rise: check.rise.into(),
            }),
            service: match &balancer.backends {
                Backends::Nodes(_) => String::new(),
                Backends::Service(name) => name.to_string(),
            },
        }
    }
}

impl TryFrom<pb::Backend> for Backend {
    type Error = Invalid;

    fn try_from(wire: pb::Backend) -> Result<Self, Invalid> {
        let addresses = Addresses {
            v4: optional(&wire.ipv4, "an IPv4 address").map_err(|e| e.at("ipv4"))?,
            v6: optional(&wire.ipv6, "an IPv6 address").map_err(|e| e.at("ipv6"))?,
        };
        if addresses == Addresses::default() {
            return Err(Invalid::new("missing, and so is ipv6: one is needed").at("ipv4"));
        }
        Ok(Self {
            load_balancer: Name::new(wire.load_balancer).map_err(|e| e.at("loadBalancer"))?,
            node: Name::new(wire.node).map_err(|e| e.at("node"))?,
            addresses,
            draining: wire.draining,
            instance: match wire.instance.as_str() {
                "" => None,
                name => Some(Name::new(name).map_err(|e| e.at("instance"))?),
            },
            port: u16::try_from(wire.port)
                .map_err(|_| Invalid::new(format!("{} is not a port", wire.port)).at("port"))?,
            message: wire.message,
        })
    }
}

impl From<&Backend> for pb::Backend {
    fn from(backend: &Backend) -> Self {
        Self {
            load_balancer: backend.load_balancer.to_string(),
            node: backend.node.to_string(),
            ipv4: text(backend.addresses.v4),
            ipv6: text(backend.addresses.v6),
            draining: backend.draining,
            instance: backend.instance.as_ref().map(Name::to_string).unwrap_or_default(),
            port: backend.port.into(),
            message: backend.message.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> pb::LoadBalancerSpec {
        pb::LoadBalancerSpec {
            network: "shop".into(),
            addresses: vec!["10.70.0.80".into(), "fd70::80".into()],
            ports: vec![
                pb::ServicePort { protocol: 17, port: 53, target_port: 5353 },
                pb::ServicePort { protocol: 6, port: 80, target_port: 8080 },
                pb::ServicePort { protocol: 6, port: 443, target_port: 0 },
            ],
            backends: [("role".to_owned(), "web".to_owned())].into(),
            ..pb::LoadBalancerSpec::default()
        }
    }

    fn of(nanos: i32) -> Option<prost_types::Duration> {
        Some(prost_types::Duration { seconds: 0, nanos })
    }

    #[test]
    fn what_is_left_out_has_the_value_that_the_contract_gives() {
        let health = Some(pb::HealthCheck::default());
        let balancer = LoadBalancer::try_from(pb::LoadBalancerSpec { health, ..spec() }).unwrap();
        assert_eq!((balancer.algorithm, balancer.mode), (Algorithm::Maglev, Mode::Nat));
        assert_eq!(balancer.ports[2].target_port, 443);
        assert_eq!(balancer.gateways, None);
        let half = Duration::from_millis(500);
        let check = HealthCheck { port: 8080, interval: half, timeout: half, fall: 2, rise: 2 };
        assert_eq!(balancer.health, Some(check));
        let wire = pb::LoadBalancerSpec::from(&balancer);
        assert_eq!(LoadBalancer::try_from(wire).unwrap(), balancer);
    }

    #[test]
    fn a_bad_field_is_refused_with_its_path() {
        type Damage = fn(&mut pb::LoadBalancerSpec);
        let damages: [(Damage, &str); 22] = [
            (|s| s.network.clear(), "network"),
            (|s| s.addresses.clear(), "addresses"),
            (|s| s.addresses = (1..10).map(|n| format!("10.0.0.{n}")).collect(), "addresses"),
            (|s| s.addresses[1] = "10.70.0.80".into(), "addresses[1]"),
            (|s| s.addresses[1] = "fd70::/64".into(), "addresses[1]"),
            (|s| s.addresses[0] = "224.0.0.1".into(), "addresses[0]"),
            (|s| s.addresses[0] = "::ffff:10.0.0.1".into(), "addresses[0]"),
            (|s| s.ports.clear(), "ports"),
            (|s| s.ports = vec![s.ports[0]; 17], "ports"),
            (|s| s.ports[1].protocol = 17 + 256, "ports[1].protocol"),
            (|s| s.ports[1].port = 0, "ports[1].port"),
            (|s| s.ports[2].port = 80, "ports[2].port"),
            (|s| s.ports[0].target_port = 65_536, "ports[0].targetPort"),
            (|s| s.service = "web".into(), "service"),
            (|s| (s.service, s.backends) = ("Web!".into(), Default::default()), "service"),
            (
                |s| (s.service, s.backends) = ("web".into(), Default::default()),
                "ports[2].targetPort",
            ),
            (|s| s.algorithm = 9, "algorithm"),
            (|s| s.mode = 9, "mode"),
            (
                |s| s.health = Some(pb::HealthCheck { fall: 11, ..Default::default() }),
                "health.fall",
            ),
            (
                |s| {
                    let interval = of(99_999_999);
                    s.health = Some(pb::HealthCheck { interval, ..Default::default() });
                },
                "health.interval",
            ),
            (
                |s| {
                    let timeout = of(-1);
                    s.health = Some(pb::HealthCheck { timeout, ..Default::default() });
                },
                "health.timeout",
            ),
            (
                |s| {
                    s.ports.truncate(1);
                    s.health = Some(pb::HealthCheck::default());
                },
                "health.port",
            ),
        ];
        for (damage, field) in damages {
            let mut damaged = spec();
            damage(&mut damaged);
            let invalid = LoadBalancer::try_from(damaged).expect_err(field);
            assert_eq!(invalid.field(), field, "{invalid}");
        }
        assert!(LoadBalancer::try_from(spec()).is_ok());
    }

    #[test]
    fn the_only_port_of_a_service_may_be_the_one_that_each_instance_announces() {
        let mut wire = pb::LoadBalancerSpec {
            backends: Default::default(),
            service: "web".into(),
            health: Some(pb::HealthCheck::default()),
            ..spec()
        };
        wire.ports.drain(..2);
        let balancer = LoadBalancer::try_from(wire.clone()).unwrap();
        assert_eq!(balancer.backends, Backends::Service(Name::new("web").unwrap()));
        assert_eq!((balancer.ports[0].target_port, balancer.health.unwrap().port), (0, 0));
        let again = pb::LoadBalancerSpec::from(&balancer);
        assert_eq!(LoadBalancer::try_from(again).unwrap(), balancer);
        wire.ports[0].target_port = 8443;
        let balancer = LoadBalancer::try_from(wire).unwrap();
        assert_eq!((balancer.ports[0].target_port, balancer.health.unwrap().port), (8443, 8443));
    }

    #[test]
    fn a_time_is_of_whole_milliseconds() {
        let interval = of(250_900_000);
        let health = Some(pb::HealthCheck { interval, ..Default::default() });
        let balancer = LoadBalancer::try_from(pb::LoadBalancerSpec { health, ..spec() }).unwrap();
        assert_eq!(balancer.health.unwrap().interval, Duration::from_millis(250));
    }

    #[test]
    fn a_backend_survives_the_wire_and_needs_an_address() {
        let backend = pb::Backend {
            load_balancer: "front".into(),
            node: "web1".into(),
            ipv4: "10.70.0.11".into(),
            ipv6: String::new(),
            draining: true,
            instance: "web-7f".into(),
            port: 20_001,
            message: "is Degraded".into(),
        };
        let read = Backend::try_from(backend.clone()).unwrap();
        assert_eq!(pb::Backend::from(&read), backend);
        let nowhere = pb::Backend { ipv4: String::new(), ..backend };
        assert_eq!(Backend::try_from(nowhere).unwrap_err().field(), "ipv4");
    }
}
