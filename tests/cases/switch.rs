//! VMs on one switch. The core and the clients are in the switch's namespace.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use cnsmo_tests::{Netns, PinDir};

use super::programs::Core;

/// Of the switch, and so of core and clients.
pub(super) const HERE4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 1));
pub(super) const HERE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, 1));

/// Networks 10.77.1.0/24 and fd77:1::/64.
pub(super) struct Switch {
    /// Each with `eth0`, and the folder for the pins of its agent.
    pub(super) vms: Vec<(Netns, PinDir)>,
    pub(super) netns: Netns,
}

/// Addresses of the `n`-th VM, from 1 on.
pub(super) fn of_vm(n: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, 0x10 + u16::from(n));
    [Ipv4Addr::new(10, 77, 1, 10 + n).into(), v6.into()]
}

impl Switch {
    pub(super) fn new(label: &str, vms: u8) -> Self {
        let netns = Netns::new(&format!("{label}-switch")).unwrap();
        netns.ip(&["link", "add", "br0", "type", "bridge"]).unwrap();
        netns.ip(&["link", "set", "br0", "up"]).unwrap();
        address(&netns, "br0", [HERE4, HERE6]);
        let vm = |n| {
            let vm = Netns::new(&format!("{label}-vm{n}")).unwrap();
            let port = format!("vm{n}");
            Netns::veth((&vm, "eth0"), (&netns, &port)).unwrap();
            netns.ip(&["link", "set", &port, "master", "br0"]).unwrap();
            address(&vm, "eth0", of_vm(n));
            (vm, PinDir::new(&format!("{label}-vm{n}")))
        };
        Self { vms: (1..=vms).map(vm).collect(), netns }
    }

    /// A core that the VMs reach.
    pub(super) fn core(&self, label: &str, more: &[&str]) -> Core {
        Core::start_by(label, |path: PathBuf| {
            let mut command = self.netns.command(path).unwrap();
            command.args(["--listen", &SocketAddr::new(HERE4, 0).to_string()]).args(more);
            command
        })
    }
}

fn address(netns: &Netns, device: &str, [v4, v6]: [IpAddr; 2]) {
    for address in [format!("{v4}/24"), format!("{v6}/64")] {
        netns.ip(&["addr", "add", &address, "dev", device]).unwrap();
    }
}
