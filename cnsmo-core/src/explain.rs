//! The way of one packet between VMs: the hooks that it meets, and what the agents there say of it.

use std::net::IpAddr;

use cnsmo_proto::pb::{
    balancer::LoadBalancer,
    flow::{ExplainRequest, ExplainResponse, ExplainStep, Judgement, PacketQuery},
    network::{Member, Network},
    node::Node,
    policy::Direction,
};
use ipnet::IpNet;
use tonic::Status;

use crate::error::Error;

/// Where Linux takes no source port from by itself (`net.ipv4.ip_local_port_range`).
const SOURCE_PORT: u32 = 61_000;

/// Who is where.
#[derive(Debug, Default)]
pub struct Map {
    /// All VMs.
    pub nodes: Vec<Node>,
    /// All networks, with their members.
    pub networks: Vec<Network>,
    /// All balancers, with their backends.
    pub balancers: Vec<LoadBalancer>,
}

/// The packet, and where it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Start {
    /// `None`: outside of all VMs.
    sender: Option<String>,
    /// The VM that the packet meets first, if it is neither the sender nor who has the destination.
    gateway: Option<String>,
    src: IpAddr,
    dst: IpAddr,
    overlay: bool,
}

/// Who asks the agents.
#[tonic::async_trait]
pub trait Judges: Sync {
    /// What the data path of a VM would do with a packet.
    async fn judge(&self, node: &str, packet: PacketQuery) -> Result<Judgement, Status>;
}

/// Follows the packet from hook to hook.
///
/// # Errors
/// [`Error::Invalid`] names the field of the request; those of the judges are told on.
pub async fn explain(
    map: &Map,
    request: &ExplainRequest,
    judges: &dyn Judges,
) -> Result<ExplainResponse, Status> {
    let start = map.start(request)?;
    let mut way = Way { map, steps: Vec::new(), notes: Vec::new(), passes: true };
    let mut packet = PacketQuery {
        direction: Direction::Egress.into(),
        overlay: start.overlay,
        source: start.src.to_string(),
        destination: start.dst.to_string(),
        protocol: request.protocol,
        source_port: if request.port == 0 {
            0
        } else {
            Some(request.source_port).filter(|port| *port != 0).unwrap_or(SOURCE_PORT)
        },
        destination_port: request.port,
    };
    if let Some(sender) = &start.sender {
        way.step(sender, &mut packet, judges).await?;
    }
    if let Some(gateway) = start.gateway.as_ref().filter(|_| way.passes) {
        packet.direction = Direction::Ingress.into();
        way.step(gateway, &mut packet, judges).await?;
        if way.passes && !packet.overlay {
            way.notes.push(format!("{gateway} does not balance it: the way behind is not known"));
            return Ok(way.told());
        }
    }
    if way.passes {
        packet.direction = Direction::Ingress.into();
        match map.at(&packet.destination, packet.overlay) {
            Some(receiver) if start.sender.as_deref() == Some(receiver) => {
                way.notes.push("the packet stays on its VM, where nothing judges it".into());
            }
            Some(receiver) => way.step(receiver, &mut packet, judges).await?,
            None => {
                way.notes.push(format!("no VM has {}: the way ends here", packet.destination));
            }
        }
    }
    Ok(way.told())
}

struct Way<'a> {
    map: &'a Map,
    steps: Vec<ExplainStep>,
    notes: Vec<String>,
    passes: bool,
}

impl Way<'_> {
    /// Has the packet judged at one hook; it goes on as that says.
    async fn step(
        &mut self,
        node: &str,
        packet: &mut PacketQuery,
        judges: &dyn Judges,
    ) -> Result<(), Status> {
        let asked = packet.clone();
        let judgement = judges.judge(node, asked.clone()).await?;
        self.passes = judgement.drop_reason.is_empty();
        let mut step = ExplainStep {
            node: node.to_owned(),
            direction: asked.direction,
            overlay: asked.overlay,
            ..ExplainStep::default()
        };
        if let Some(to) = &judgement.translated {
            // Whatever is balanced goes into the tunnel.
            packet.overlay = true;
            packet.source.clone_from(&to.source);
            packet.destination.clone_from(&to.destination);
            (packet.source_port, packet.destination_port) = (to.source_port, to.destination_port);
            if let Some((node, instance)) = self.map.backend(&judgement.load_balancer, packet) {
                (step.backend, step.backend_instance) = (node.to_owned(), instance.to_owned());
            }
        }
        let goes_out = asked.direction() == Direction::Egress || judgement.translated.is_some();
        if packet.overlay
            && goes_out
            && self.passes
            && let Some(peer) = self.map.at(&packet.destination, true)
        {
            step.tunnel_peer = peer.to_owned();
            let overlay =
                self.map.node(node).and_then(|node| node.status.as_ref()?.overlay.as_ref());
            if let Some(peer) = overlay.and_then(|o| o.peers.iter().find(|p| p.node == peer)) {
                step.endpoint.clone_from(&peer.endpoint);
                step.last_handshake_time = peer.last_handshake_time;
            }
        }
        (step.packet, step.judgement) = (Some(asked), Some(judgement));
        self.steps.push(step);
        Ok(())
    }

    fn told(self) -> ExplainResponse {
        ExplainResponse { steps: self.steps, passes: self.passes, notes: self.notes }
    }
}

impl Map {
    fn start(&self, request: &ExplainRequest) -> Result<Start, Error> {
        let invalid = |why: String| Error::Invalid(why);
        if request.protocol == 0 || request.protocol > 255 {
            return Err(invalid(format!("protocol: {} is not from 1 to 255", request.protocol)));
        }
        for (field, port) in [("port", request.port), ("source_port", request.source_port)] {
            if port > 65_535 {
                return Err(invalid(format!("{field}: {port} is not a port: 0 to 65535")));
            }
        }
        let sender = self.node(&request.from).map(name_of_node);
        let outside: Option<IpAddr> = request.from.parse().ok();
        let sender = sender.or_else(|| outside.and_then(|ip| self.at_any(ip)).map(str::to_owned));
        if sender.is_none() && outside.is_none() {
            return Err(invalid(format!(
                "from: `{}` is neither a VM nor an address",
                request.from
            )));
        }
        let home = sender.as_deref().and_then(|node| self.member(node));
        // An IPv6 address asks for IPv6 whatever the flag says.
        let given: Option<IpAddr> = request.to.parse().ok();
        let v6 = given.or(outside).map_or(request.ipv6, |ip| ip.is_ipv6());

        let balancer = match given {
            Some(ip) => self.balancers.iter().find(|b| addresses(b).any(|address| address == ip)),
            None => self.balancers.iter().find(|b| name_of_balancer(b) == request.to),
        };
        let target = self.node(&request.to).map(name_of_node).filter(|_| given.is_none());
        let far = target.as_deref().and_then(|node| self.member(node));
        let family = if v6 { "IPv6" } else { "IPv4" };
        let dst = if let Some(ip) = given {
            ip
        } else if let Some(target) = &target {
            let tunnelled = match (home, far) {
                (Some(home), Some(far)) if home.network == far.network && !request.underlay => {
                    member_address(far, v6)
                }
                _ => None,
            };
            tunnelled.or_else(|| self.underlay(target, v6)).ok_or_else(|| {
                invalid(format!("to: VM `{target}` has no {family} address that is known"))
            })?
        } else if let Some(balancer) = balancer {
            addresses(balancer).find(|ip| ip.is_ipv6() == v6).ok_or_else(|| {
                invalid(format!("to: load balancer `{}` has no {family} address", request.to))
            })?
        } else {
            let why = "is no VM, no load balancer and no address";
            return Err(invalid(format!("to: `{}` {why}", request.to)));
        };
        let overlay = home.is_some_and(|home| self.is_in_network(&home.network, dst));
        let src = match (&sender, outside) {
            (_, Some(ip)) => ip,
            (Some(sender), None) => {
                let own =
                    if overlay { home.and_then(|home| member_address(home, v6)) } else { None };
                own.or_else(|| self.underlay(sender, v6)).ok_or_else(|| {
                    invalid(format!("from: VM `{sender}` has no {family} address that is known"))
                })?
            }
            (None, None) => unreachable!("refused above"),
        };
        if src.is_ipv4() != dst.is_ipv4() {
            return Err(invalid(format!("from: {src} and {dst} are not of one address family")));
        }
        let gateway = match balancer {
            Some(balancer) if !overlay => Some(self.gateway(balancer, &request.via)?),
            _ => None,
        };
        Ok(Start { sender, gateway, src, dst, overlay })
    }

    /// The VM by which clients outside reach a balancer.
    fn gateway(&self, balancer: &LoadBalancer, via: &str) -> Result<String, Error> {
        let selector = balancer.spec.as_ref().and_then(|spec| spec.gateways.as_ref());
        let is_gateway = |node: &&Node| {
            let labels = node.metadata.as_ref().map(|metadata| &metadata.labels);
            selector.zip(labels).is_some_and(|(selector, labels)| {
                selector.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            })
        };
        let names: Vec<_> = self.nodes.iter().filter(is_gateway).map(name_of_node).collect();
        let of = name_of_balancer(balancer);
        match &names[..] {
            _ if names.iter().any(|name| name == via) => Ok(via.to_owned()),
            _ if !via.is_empty() => {
                Err(Error::Invalid(format!("via: `{via}` is no gateway of load balancer `{of}`")))
            }
            [only] => Ok(only.clone()),
            [] => Err(Error::Invalid(format!(
                "to: load balancer `{of}` has no gateway: only VMs of its network reach it"
            ))),
            several => Err(Error::Invalid(format!(
                "via: missing: the gateways of load balancer `{of}` are {}",
                several.join(", ")
            ))),
        }
    }

    fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| name_of_node(node) == name)
    }

    fn members(&self) -> impl Iterator<Item = &Member> {
        self.networks.iter().filter_map(|network| network.status.as_ref()).flat_map(|s| &s.members)
    }

    fn member(&self, node: &str) -> Option<&Member> {
        self.members().find(|member| member.node == node)
    }

    /// The first address at a network card.
    fn underlay(&self, node: &str, v6: bool) -> Option<IpAddr> {
        let member = self.member(node);
        let own = |ip: &IpAddr| member.is_some_and(|m| member_address(m, v6) == Some(*ip));
        let status = self.node(node)?.status.as_ref()?;
        let addresses = status.addresses.iter().filter_map(|address| address.parse().ok());
        let mut usable = addresses.filter(|ip: &IpAddr| {
            let is_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
            ip.is_ipv6() == v6 && !own(ip) && !is_local
        });
        usable.next()
    }

    /// The VM with that address.
    fn at(&self, address: &str, overlay: bool) -> Option<&str> {
        let ip: IpAddr = address.parse().ok()?;
        if overlay { self.in_overlay(ip) } else { self.at_any(ip) }
    }

    fn in_overlay(&self, ip: IpAddr) -> Option<&str> {
        let mut members = self.members();
        let found = members.find(|m| member_address(m, ip.is_ipv6()) == Some(ip));
        found.map(|member| member.node.as_str())
    }

    fn at_any(&self, ip: IpAddr) -> Option<&str> {
        let has = |node: &&Node| {
            let addresses = node.status.iter().flat_map(|status| &status.addresses);
            addresses.filter_map(|address| address.parse().ok()).any(|own: IpAddr| own == ip)
        };
        let node = self.nodes.iter().find(has)?;
        Some(&node.metadata.as_ref()?.name)
    }

    fn is_in_network(&self, network: &str, ip: IpAddr) -> bool {
        let mut networks = self.networks.iter();
        let found = networks.find(|n| n.metadata.as_ref().is_some_and(|m| m.name == network));
        let spec = found.and_then(|network| network.spec.as_ref());
        let prefixes = spec.into_iter().flat_map(|spec| [&spec.ipv4_prefix, &spec.ipv6_prefix]);
        prefixes.filter_map(|prefix| prefix.parse::<IpNet>().ok()).any(|net| net.contains(&ip))
    }

    /// VM and instance that a balancer has sent the packet to.
    fn backend(&self, balancer: &str, packet: &PacketQuery) -> Option<(&str, &str)> {
        let of = |b: &&LoadBalancer| name_of_balancer(b) == balancer;
        let status = self.balancers.iter().find(of).and_then(|b| b.status.as_ref());
        let known = status.into_iter().flat_map(|status| &status.backends);
        let mut at = known.filter(|backend| {
            let address =
                if packet.destination.contains(':') { &backend.ipv6 } else { &backend.ipv4 };
            *address == packet.destination
                && (backend.port == 0 || backend.port == packet.destination_port)
        });
        let found = at.next().map(|b| (b.node.as_str(), b.instance.as_str()));
        found.or_else(|| Some((self.at(&packet.destination, true)?, "")))
    }
}

fn name_of_node(node: &Node) -> String {
    node.metadata.as_ref().map(|metadata| metadata.name.clone()).unwrap_or_default()
}

fn name_of_balancer(balancer: &LoadBalancer) -> &str {
    balancer.metadata.as_ref().map_or("", |metadata| &metadata.name)
}

fn addresses(balancer: &LoadBalancer) -> impl Iterator<Item = IpAddr> {
    let spec = balancer.spec.iter();
    spec.flat_map(|spec| &spec.addresses).filter_map(|address| address.parse().ok())
}

fn member_address(member: &Member, v6: bool) -> Option<IpAddr> {
    let address = if v6 { &member.ipv6 } else { &member.ipv4 };
    address.parse().ok()
}

#[cfg(test)]
mod tests;
