//! What the agent tells about its VM.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::SystemTime,
};

use cnsmo_proto::{
    model::{ENDPOINTS_MAX, Name, PublicKey},
    pb::{
        agent::{
            Announcement, BalancerReport, CommandResult, InstanceReport, PolicyCounters,
            StatusReport, command::Command, command_result,
        },
        balancer::BackendStatus,
        catalog::{self, Instance},
        flow::{Judgement, ListFlowsRequest, PacketQuery},
        node::{DropCounter, FirewallStatus, Interface, NodeStatus, OverlayStatus, PeerStatus},
        policy::RuleCounter,
    },
};

use cnsmo_service::{
    announce::incarnation,
    host::{About, Following, Host, News, front::Local},
    lifecycle::State,
};
use tonic::Code;

use crate::{
    datapath::{Attachment, Count},
    effective::BackendTarget,
    enforcer::{EnforcerHandle, Gone, VmStatus},
    explain::Question,
    flows::FlowLog,
    live, node,
    plan::BackendState,
    tunnel::{self, Backend, TunnelStatus},
};

/// The services of this VM as the core is to know them.
#[derive(Clone, Debug)]
pub struct Services {
    local: Local,
    host: Host,
    node: Name,
    /// Of this run of the agent.
    incarnation: String,
    flows: Arc<FlowLog>,
    enforcer: EnforcerHandle,
}

impl Services {
    /// `node`: the name of this VM.
    pub fn new(host: Host, node: Name, flows: Arc<FlowLog>, enforcer: EnforcerHandle) -> Self {
        let local = Local::new(host.clone(), node.as_str());
        Self { local, host, node, incarnation: incarnation(), flows, enforcer }
    }

    /// The services themselves.
    pub fn local(&self) -> Local {
        self.local.clone()
    }

    /// Carries a command out.
    pub async fn answer(&self, id: u64, command: Command) -> CommandResult {
        match command {
            Command::Records(query) => {
                let page = command_result::Result::Records(self.flows.answer(query));
                CommandResult { id, result: Some(page), ..CommandResult::default() }
            }
            Command::Explain(query) => {
                let judgement = self.explain(&query).await;
                answered(id, judgement.map(command_result::Result::Judgement))
            }
            Command::Flows(ListFlowsRequest { max, .. }) => {
                let flows = self.enforcer.flows(live::bounded(max)).await;
                let flows = told(flows).map(Into::into);
                answered(id, flows.map(command_result::Result::Flows))
            }
            Command::Preview(preview) => {
                let impact = told(self.enforcer.preview(preview).await).map(Into::into);
                answered(id, impact.map(command_result::Result::Impact))
            }
            command => self.local.answer(id, command).await,
        }
    }

    async fn explain(&self, query: &PacketQuery) -> Result<Judgement, (Code, String)> {
        let question = Question::try_from(query)
            .map_err(|error| (Code::InvalidArgument, error.to_string()))?;
        told(self.enforcer.explain(question).await).map(Judgement::from)
    }

    /// All states from now on.
    pub fn follow(&self) -> Following {
        self.host.follow()
    }

    /// The answer to a command that there is no room for.
    pub fn busy(id: u64) -> CommandResult {
        let code = i32::from(Code::ResourceExhausted).unsigned_abs();
        let message = "too many commands are carried out: try again".to_owned();
        CommandResult { id, code, message, result: None }
    }

    /// `complete`: these are all.
    pub fn report(&self, news: News, complete: bool) -> InstanceReport {
        let name = |about: &About| match about.instance.as_str() {
            "" => self.node.to_string(),
            instance => instance.to_owned(),
        };
        let instance = |(about, state): (About, State)| Instance {
            name: name(&about),
            service: about.service,
            endpoints: about.endpoints,
            attributes: about.attributes,
            phase: catalog::Phase::from(state.phase).into(),
            reason: state.reason.into(),
            message: state.message,
            incarnation: self.incarnation.clone(),
            ..Instance::default()
        };
        let removed = |about: &About| format!("{}/{}", about.service, name(about));
        let removed = news.removed.iter().map(removed).collect();
        let instances = news.states.into_iter().map(instance).collect();
        InstanceReport { complete, instances, removed }
    }
}

/// What the enforcer says, for who asked by a command.
fn told<T>(answer: Result<Result<T, String>, Gone>) -> Result<T, (Code, String)> {
    let answer = answer.map_err(|gone| (Code::Unavailable, gone.to_string()))?;
    answer.map_err(|why| (Code::FailedPrecondition, why))
}

fn answered(id: u64, result: Result<command_result::Result, (Code, String)>) -> CommandResult {
    match result {
        Ok(result) => CommandResult { id, result: Some(result), ..CommandResult::default() },
        Err((code, message)) => {
            let code = i32::from(code).unsigned_abs();
            CommandResult { id, code, message, result: None }
        }
    }
}

/// What peers must know of this VM; nothing of a VM that has no tunnel.
pub fn announcement(key: Option<PublicKey>, addresses: &[IpAddr]) -> Option<Announcement> {
    let addresses = addresses.iter().take(ENDPOINTS_MAX).map(ToString::to_string).collect();
    Some(Announcement { tunnel_public_key: key?.0.to_vec(), addresses })
}

/// The state of this VM, its tunnel and its data path, for the core.
pub fn status_report(vm: VmStatus, trouble: Option<(&'static str, String)>) -> StatusReport {
    let VmStatus { datapath: status, tunnel, public_key, balancers } = vm;
    let (reason, message) = trouble.unwrap_or_default();
    let interfaces = status.interfaces.into_iter().map(interface).collect();
    let node = NodeStatus {
        reason: reason.to_owned(),
        message,
        addresses: node::addresses(None).iter().map(ToString::to_string).collect(),
        kernel: node::kernel_release(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        interfaces,
        firewall: Some(FirewallStatus {
            flows: status.flows,
            rules: status.rules,
            drops: status.drops.into_iter().map(drop_counter).collect(),
        }),
        overlay: tunnel.map(|tunnel| overlay(tunnel, public_key)),
        program_ids: status.program_ids,
        ..NodeStatus::default()
    };
    let hits = status.last_hits;
    let policies = status.counters.into_iter().map(|(policy, rules)| {
        let hits = hits.get(&policy);
        policy_counters(&policy, rules, hits)
    });
    let policies = policies.collect();
    let flows = &status.backend_flows;
    let load_balancers = balancers.into_iter().map(|balancer| balancer_report(balancer, flows));
    StatusReport { node: Some(node), policies, load_balancers: load_balancers.collect() }
}

fn overlay(tunnel: TunnelStatus, key: Option<PublicKey>) -> OverlayStatus {
    let backend = match tunnel.backend {
        Backend::Kernel => "kernel",
        Backend::Engine => "engine",
    };
    OverlayStatus {
        network: tunnel.network.to_string(),
        backend: backend.to_owned(),
        reason: tunnel.reason,
        device: tunnel.device.name,
        mtu: tunnel.device.mtu.into(),
        public_key: key.map(|key| key.0.to_vec()).unwrap_or_default(),
        peers: tunnel.peers.into_iter().map(peer).collect(),
    }
}

fn peer((node, status): (Name, tunnel::PeerStatus)) -> PeerStatus {
    PeerStatus {
        node: node.to_string(),
        endpoint: status.endpoint.map(|endpoint| endpoint.to_string()).unwrap_or_default(),
        last_handshake_time: status.last_handshake.map(Into::into),
        received_bytes: status.received_bytes,
        sent_bytes: status.sent_bytes,
    }
}

fn balancer_report(
    (name, backends): (Name, Vec<BackendState>),
    flows: &BTreeMap<SocketAddr, u64>,
) -> BalancerReport {
    let flows_to = |BackendTarget { addresses, port, .. }: &BackendTarget| {
        let ports = if *port == 0 { 0..=u16::MAX } else { *port..=*port };
        let places = addresses.iter().map(|address| {
            SocketAddr::new(address, *ports.start())..=SocketAddr::new(address, *ports.end())
        });
        places.flat_map(|place| flows.range(place)).map(|(_, n)| n).sum()
    };
    let backend = |state: BackendState| BackendStatus {
        node: state.target.node.to_string(),
        active: state.idle.is_none(),
        reason: state.idle.map(|idle| idle.as_str().to_owned()).unwrap_or_default(),
        message: state.message,
        flows: flows_to(&state.target),
        instance: state.target.instance.map(|name| name.to_string()).unwrap_or_default(),
    };
    let backends = backends.into_iter().map(backend).collect();
    BalancerReport { load_balancer: name.to_string(), backends }
}

fn interface(attachment: Attachment) -> Interface {
    Interface {
        name: attachment.interface,
        ingress: attachment.ingress.to_owned(),
        egress: attachment.egress.to_owned(),
    }
}

fn drop_counter(
    (direction, reason, count): (cnsmo_proto::model::Direction, &str, Count),
) -> DropCounter {
    let Count { packets, bytes } = count;
    DropCounter { reason: reason.to_owned(), direction: direction.to_string(), packets, bytes }
}

fn policy_counters(
    policy: &Name,
    rules: BTreeMap<Name, Count>,
    hits: Option<&BTreeMap<Name, SystemTime>>,
) -> PolicyCounters {
    let counter = |(rule, Count { packets, bytes }): (Name, Count)| RuleCounter {
        last_hit_time: hits.and_then(|hits| hits.get(&rule)).copied().map(Into::into),
        rule: rule.to_string(),
        packets,
        bytes,
    };
    PolicyCounters { policy: policy.to_string(), rules: rules.into_iter().map(counter).collect() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cnsmo_proto::model::{Addresses, Direction};

    use super::*;
    use crate::{datapath::Status, plan::Idle, tunnel::Device};

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    #[test]
    fn everything_the_data_path_says_is_reported() {
        let count = Count { packets: 3, bytes: 180 };
        let datapath = Status {
            interfaces: vec![Attachment {
                interface: "eth0".into(),
                ingress: "xdp-native",
                egress: "tcx",
            }],
            flows: 5,
            rules: 2,
            counters: [(name("web"), [(name("http"), count)].into())].into(),
            drops: vec![(Direction::Ingress, "policy", count)],
            ..Status::default()
        };
        let vm = VmStatus { datapath, ..VmStatus::default() };
        let report = status_report(vm, Some(("LedgerDamaged", "why".into())));
        let node = report.node.unwrap();
        assert_eq!((node.reason.as_str(), node.message.as_str()), ("LedgerDamaged", "why"));
        assert_eq!(node.interfaces[0].ingress, "xdp-native");
        let firewall = node.firewall.unwrap();
        assert_eq!((firewall.flows, firewall.rules), (5, 2));
        assert_eq!(firewall.drops[0].direction, "ingress");
        assert_eq!(firewall.drops[0].bytes, 180);
        assert_eq!(report.policies[0].rules[0].rule, "http");
        assert_eq!(report.policies[0].rules[0].packets, 3);
        assert_eq!(node.overlay, None);
    }

    #[test]
    fn peers_are_reported() {
        let peer = tunnel::PeerStatus {
            endpoint: Some("192.0.2.1:51820".parse().unwrap()),
            last_handshake: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(7)),
            received_bytes: 8,
            sent_bytes: 9,
        };
        let status = TunnelStatus {
            network: name("shop"),
            backend: Backend::Engine,
            reason: "no module".into(),
            device: Device { name: "cnsmo0".into(), mtu: 1420 },
            peers: [(name("web-1"), peer), (name("web-2"), Default::default())].into(),
        };
        let overlay = overlay(status, Some(PublicKey([3; 32])));
        assert_eq!((overlay.network.as_str(), overlay.backend.as_str()), ("shop", "engine"));
        assert_eq!((overlay.mtu, overlay.public_key), (1420, vec![3; 32]));
        let shown: Vec<_> = overlay
            .peers
            .iter()
            .map(|p| (&*p.node, &*p.endpoint, p.last_handshake_time.map(|time| time.seconds)))
            .collect();
        assert_eq!(shown, [("web-1", "192.0.2.1:51820", Some(7)), ("web-2", "", None)]);
        assert_eq!((overlay.peers[0].received_bytes, overlay.peers[0].sent_bytes), (8, 9));
    }

    #[test]
    fn flows_of_a_backend_are_those_of_all_its_addresses() {
        let backend = |last: u8, port: Option<u16>, idle: Option<Idle>| BackendState {
            target: BackendTarget {
                node: name(&format!("web-{last}")),
                instance: port.map(|port| name(&format!("one-{port}"))),
                addresses: Addresses {
                    v4: Some([10, 70, 0, last].into()),
                    v6: Some([0xfd70, 0, 0, 0, 0, 0, 0, last.into()].into()),
                },
                port: port.unwrap_or_default(),
            },
            idle,
            message: idle.map_or("", |_| "refused").to_owned(),
        };
        let flows = [
            ("10.70.0.1:80", 3),
            ("10.70.0.1:65535", 1),
            ("[fd70::1]:80", 2),
            ("10.70.0.3:81", 16),
            ("10.70.0.3:82", 32),
            ("[fd70::3]:82", 64),
            ("10.70.0.9:80", 1),
        ];
        let flows = flows.map(|(place, flows)| (place.parse().unwrap(), flows)).into();
        let backends = vec![
            backend(1, None, None),
            backend(2, None, Some(Idle::Unhealthy)),
            backend(3, Some(81), None),
            backend(3, Some(82), None),
        ];
        let report = balancer_report((name("front"), backends), &flows);
        assert_eq!(report.load_balancer, "front");
        let shown: Vec<_> = report
            .backends
            .iter()
            .map(|b| (&*b.node, &*b.instance, b.active, &*b.reason, &*b.message, b.flows))
            .collect();
        assert_eq!(
            shown,
            [
                ("web-1", "", true, "", "", 6),
                ("web-2", "", false, "Unhealthy", "refused", 0),
                ("web-3", "one-81", true, "", "", 16),
                ("web-3", "one-82", true, "", "", 96),
            ]
        );
    }

    #[test]
    fn a_vm_without_a_tunnel_announces_nothing() {
        let addresses: Vec<IpAddr> = (0..20).map(|n| [10, 0, 0, n].into()).collect();
        assert_eq!(announcement(None, &addresses), None);
        let announced = announcement(Some(PublicKey([1; 32])), &addresses).unwrap();
        assert_eq!(announced.tunnel_public_key, [1; 32]);
        assert_eq!((announced.addresses.len(), &*announced.addresses[0]), (16, "10.0.0.0"));
    }
}
