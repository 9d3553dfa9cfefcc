//! Rules about VMs by their labels and by the services on them: what they stand for follows the VMs without a new apply.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
};

use cnsmo_tests::{Netns, Process, sweep};

use super::{
    lab::{PATIENCE as PACKETS, SILENCE, connect, listen},
    programs::{Core, until},
    switch::{Switch, of_vm},
};

const FILE: &str = "
kind: Network
metadata: {name: shop}
spec: {ipv4: 10.93.0.0/24, addresses: {vm1: 10.93.0.1, vm2: 10.93.0.2, vm3: 10.93.0.3}}
---
kind: FirewallPolicy
metadata: {name: server}
spec:
  target: {role: server}
  defaults: {ingress: deny, egress: allow}
  rules:
    - {name: balancers, action: allow, direction: ingress, from: {labels: {role: lb}}, protocol: tcp, ports: [80]}
    - {name: workers, action: allow, direction: ingress, from: {service: worker}, protocol: tcp, ports: [81]}
";

/// Of `vm1` in the network.
const OVERLAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 93, 0, 1));

struct Fleet {
    _agents: Vec<Process>,
    core: Core,
    switch: Switch,
    /// Of `vm1`, on ports 80 and 81 of its two addresses of IPv4.
    listeners: Vec<TcpListener>,
}

impl Fleet {
    fn new() -> Self {
        let switch = Switch::new("peers", 3);
        let core = switch.core("peers", &[]);
        let labels = ["role=server", "role=lb", "role=none"];
        let agents = (1..).zip(&switch.vms).zip(labels);
        let agent = |((n, (netns, pins)), label): ((usize, &(Netns, _)), &str)| {
            core.agent(netns, pins, &format!("vm{n}"), &["--label", label])
        };
        let agents = agents.map(agent).collect();
        let file = core.folder().join("peers.yaml");
        fs::write(&file, FILE).unwrap();
        core.cnsmo(&["apply", "-f", file.to_str().unwrap(), "--wait"]);
        let vm1 = &switch.vms[0].0;
        let addresses = [of_vm(1)[0], OVERLAY];
        let ends = addresses.into_iter().flat_map(|ip| [80, 81].map(|port| (ip, port)));
        let listeners = ends.map(|(ip, port)| listen(vm1, ip, port)).collect();
        Self { _agents: agents, core, switch, listeners }
    }

    /// Whether a VM gets through to both addresses, or to neither.
    fn reaches(&self, vm: usize, port: u16) -> bool {
        let netns = &self.switch.vms[vm - 1].0;
        let ends = [of_vm(1)[0], OVERLAY].map(|ip| SocketAddr::new(ip, port));
        let reached = ends.map(|to| connect(netns, to, SILENCE).is_ok());
        assert_eq!(reached[0], reached[1], "vm{vm}, {port}: underlay and overlay");
        reached[0]
    }

    async fn will_reach(&self, vm: usize, port: u16, reached: bool) {
        let netns = &self.switch.vms[vm - 1].0;
        let ends = [of_vm(1)[0], OVERLAY].map(|ip| SocketAddr::new(ip, port));
        let what = format!("vm{vm}, {port}: {}", if reached { "reached" } else { "shut" });
        until(&what, async || {
            ends.iter().all(|to| connect(netns, *to, SILENCE).is_ok() == reached).then_some(())
        })
        .await;
        assert_eq!(self.reaches(vm, port), reached);
    }
}

#[tokio::test]
async fn rules_follow_labels_and_services_without_a_new_apply() {
    sweep();
    let fleet = Fleet::new();
    fleet.will_reach(2, 80, true).await;
    assert!(!fleet.reaches(3, 80) && !fleet.reaches(2, 81) && !fleet.reaches(3, 81));
    let shown = fleet.core.cnsmo_json(&["get", "fw", "server"]);
    let peers = &shown["status"]["peers"];
    assert_eq!((&peers[0]["nodes"], &peers[1]["nodes"]), (&1.into(), &0.into()), "{shown}");

    // A connection of a VM that is no peer any more is cut, and another VM takes its place.
    let to = SocketAddr::new(of_vm(1)[0], 80);
    let mut kept = connect(&fleet.switch.vms[1].0, to, PACKETS).unwrap();
    kept.set_read_timeout(Some(PACKETS)).unwrap();
    let own = kept.local_addr().unwrap();
    let accept = || fleet.listeners[0].accept().unwrap();
    let mut inside = std::iter::repeat_with(accept).find(|(_, from)| *from == own).unwrap().0;
    inside.set_read_timeout(Some(SILENCE)).unwrap();
    kept.write_all(b"a").unwrap();
    inside.read_exact(&mut [0]).unwrap();
    fleet.core.cnsmo(&["label", "node", "vm3", "role=lb"]);
    fleet.core.cnsmo(&["label", "node", "vm2", "role=none"]);
    fleet.will_reach(3, 80, true).await;
    fleet.will_reach(2, 80, false).await;
    kept.write_all(b"b").unwrap();
    inside.read_exact(&mut [0]).unwrap_err();

    // Who has an instance of the service, and only as long as it has one.
    fleet.core.cnsmo(&["spawn", "worker", "--node", "vm2", "--", "/bin/sleep", "600"]);
    fleet.will_reach(2, 81, true).await;
    assert!(!fleet.reaches(3, 81) && !fleet.reaches(2, 80));
    fleet.core.cnsmo(&["delete", "deployment", "worker", "--wait"]);
    fleet.will_reach(2, 81, false).await;

    // A VM that is deleted is nobody.
    fleet.core.cnsmo(&["delete", "node", "vm3"]);
    let to = SocketAddr::new(of_vm(1)[0], 80);
    let vm3 = &fleet.switch.vms[2].0;
    until("vm3 to be shut out", async || connect(vm3, to, SILENCE).is_err().then_some(())).await;
}
