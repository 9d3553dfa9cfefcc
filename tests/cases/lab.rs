//! A guarded namespace (`vm`), one that sends to it (`peer`), and policies in few words.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use cnsmo_agent::{
    datapath::{
        ApplyError, Count, Datapath as _,
        kernel::{Kernel, KernelError, Options, XdpChoice},
    },
    effective::Effective,
};
use cnsmo_proto::model::{
    Action, Direction, FirewallPolicy, Name, PolicyDefaults, PortRange, Protocol, Rule, protocol,
};
use cnsmo_tests::{Netns, PinDir, RunDir};

/// How long something that must arrive may take on a busy host.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// How long something that must not arrive is waited for.
pub(super) const SILENCE: Duration = Duration::from_millis(300);

pub(super) const VM4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 7, 0, 1));
pub(super) const PEER4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 7, 0, 2));
pub(super) const VM6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, 1));
pub(super) const PEER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd07, 0, 0, 0, 0, 0, 0, 2));
/// Addresses of the VM and of the peer, per family.
pub(super) const FAMILIES: [(IpAddr, IpAddr); 2] = [(VM4, PEER4), (VM6, PEER6)];

pub(super) struct Lab {
    pub(super) vm: Netns,
    pub(super) peer: Netns,
    pub(super) pins: PinDir,
    state: RunDir,
    device: String,
}

impl Lab {
    pub(super) fn new(label: &str) -> Self {
        Self::with_device(label, "eth0")
    }

    /// `device`: name of the VM's end.
    pub(super) fn with_device(label: &str, device: &str) -> Self {
        let lab = Self {
            vm: Netns::new(&format!("{label}-vm")).unwrap(),
            peer: Netns::new(&format!("{label}-peer")).unwrap(),
            pins: PinDir::new(label),
            state: RunDir::new(label).unwrap(),
            device: device.to_owned(),
        };
        lab.plug();
        lab
    }

    /// Makes the cable and its addresses.
    pub(super) fn plug(&self) {
        Netns::veth((&self.vm, &self.device), (&self.peer, "eth0")).unwrap();
        for (netns, device, n) in [(&self.vm, self.device.as_str(), 1), (&self.peer, "eth0", 2)] {
            for address in [format!("10.7.0.{n}/24"), format!("fd07::{n}/64")] {
                netns.ip(&["addr", "add", &address, "dev", device]).unwrap();
            }
        }
    }

    pub(super) fn options(&self) -> Options {
        Options {
            pins: self.pins.path().to_owned(),
            state: self.state.path().to_owned(),
            interfaces: vec![self.device.clone()],
            xdp: XdpChoice::Auto,
            flows: 4096,
            policy_bytes: 1 << 20,
            rules_max: 1024,
        }
    }

    pub(super) fn open(&self) -> Kernel {
        self.open_with(self.options()).unwrap()
    }

    pub(super) fn open_with(&self, options: Options) -> Result<Kernel, KernelError> {
        self.vm.run(|| Kernel::open(options)).unwrap()
    }

    /// Opens and applies.
    pub(super) fn guard(&self, policy: &Effective) -> Kernel {
        let mut kernel = self.open();
        self.apply(&mut kernel, policy);
        kernel
    }

    pub(super) fn apply(&self, kernel: &mut Kernel, policy: &Effective) {
        self.try_apply(kernel, policy).unwrap();
    }

    pub(super) fn try_apply(
        &self,
        kernel: &mut Kernel,
        policy: &Effective,
    ) -> Result<(), ApplyError> {
        self.vm.run(|| kernel.apply(policy)).unwrap()
    }

    pub(super) fn listen(&self, netns: &Netns, address: IpAddr, port: u16) -> TcpListener {
        listen(netns, address, port)
    }

    pub(super) fn connect(
        &self,
        netns: &Netns,
        to: SocketAddr,
        limit: Duration,
    ) -> io::Result<TcpStream> {
        connect(netns, to, limit)
    }

    /// A UDP socket that waits [`PATIENCE`] for an answer.
    pub(super) fn udp(&self, netns: &Netns, address: IpAddr, port: u16) -> UdpSocket {
        socket(netns, address, port)
    }

    /// Whether a datagram from a new socket of the peer reaches `socket` in the VM.
    pub(super) fn hears(&self, socket: &UdpSocket, source: IpAddr) -> bool {
        let sender = self.udp(&self.peer, source, 0);
        sender.send_to(b"knock", socket.local_addr().unwrap()).unwrap();
        arrives(socket)
    }
}

pub(super) fn listen(netns: &Netns, address: IpAddr, port: u16) -> TcpListener {
    netns.run(|| TcpListener::bind((address, port))).unwrap().unwrap()
}

pub(super) fn connect(netns: &Netns, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    netns.run(|| TcpStream::connect_timeout(&to, limit)).unwrap()
}

/// A UDP socket that waits [`PATIENCE`] for an answer.
pub(super) fn socket(netns: &Netns, address: IpAddr, port: u16) -> UdpSocket {
    let socket = netns.run(|| UdpSocket::bind((address, port))).unwrap().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Whether a datagram is there within [`SILENCE`].
pub(super) fn arrives(socket: &UdpSocket) -> bool {
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    let result = socket.recv_from(&mut [0; 64]);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    match result {
        Ok(_) => true,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        Err(error) => panic!("receiving: {error}"),
    }
}

pub(super) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// A rule about a protocol and its destination ports, for any address.
pub(super) fn rule(text: &str, action: Action, direction: Direction, protocol: Protocol) -> Rule {
    Rule { protocol, ..Rule::new(name(text), action, direction) }
}

pub(super) fn tcp(port: u16) -> Protocol {
    ports(protocol::TCP, port)
}

pub(super) fn udp(port: u16) -> Protocol {
    ports(protocol::UDP, port)
}

fn ports(number: u8, port: u16) -> Protocol {
    let destination = vec![PortRange::new(port, port).unwrap()];
    Protocol::Ports { number, source: vec![], destination }
}

pub(super) fn allow_in(text: &str, protocol: Protocol) -> Rule {
    rule(text, Action::Allow, Direction::Ingress, protocol)
}

pub(super) fn allow_out(text: &str, protocol: Protocol) -> Rule {
    rule(text, Action::Allow, Direction::Egress, protocol)
}

pub(super) fn spec(ingress: Action, egress: Action, rules: Vec<Rule>) -> FirewallPolicy {
    FirewallPolicy {
        priority: 100,
        defaults: PolicyDefaults { ingress: Some(ingress), egress: Some(egress) },
        rules,
        ..FirewallPolicy::default()
    }
}

/// One policy, called `p`.
pub(super) fn policy(ingress: Action, egress: Action, rules: Vec<Rule>) -> Effective {
    Effective::merge(vec![], [(&name("p"), &spec(ingress, egress, rules))])
}

/// Denies what comes in but for `rules`; lets everything out.
pub(super) fn deny_in(rules: Vec<Rule>) -> Effective {
    policy(Action::Deny, Action::Allow, rules)
}

/// Packets and bytes that a rule of policy `p` has counted.
pub(super) fn counted(kernel: &mut Kernel, rule: &str) -> Count {
    let counters: BTreeMap<_, _> = kernel.status().counters;
    counters[&name("p")][&name(rule)]
}

/// Packets dropped for a reason.
pub(super) fn dropped(kernel: &mut Kernel, direction: Direction, reason: &str) -> u64 {
    let drops = kernel.status().drops;
    let of = drops.iter().find(|(d, r, _)| *d == direction && *r == reason);
    of.map_or(0, |(_, _, count)| count.packets)
}
