//! Real connections through a gateway: client -- network card of the gateway, tunnel of the gateway -- backends. Threads
//! carry the packets between the TUN devices, super-packets and unfinished checksums as they are.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use cnsmo_agent::{
    datapath::{
        Datapath as _,
        kernel::{Kernel, Options, XdpChoice},
    },
    effective::{BackendTarget, Balancer, Effective, TunnelDevice},
};
use cnsmo_proto::model::{Addresses, Algorithm, ServicePort, protocol};
use cnsmo_tests::{Netns, PinDir, RunDir};

use super::lab::{PATIENCE, SILENCE, allow_in, deny_in, name, tcp};

const TUNNEL: &str = "tun0";
/// Last byte of the gateway's address in the tunnel; those of the backends count from 1.
const GATEWAY: u8 = 9;
const PORT: u16 = 80;
const TARGET: u16 = 8_080;
const VIRTUAL: [&str; 2] = ["192.0.2.10", "2001:db8:10::10"];
/// More than any buffer on the way holds.
const BYTES: usize = 4 << 20;

/// Client, gateway and two backends; all in their places but the data path.
struct Net {
    client: Netns,
    gateway: Netns,
    backends: Vec<Netns>,
    _wires: Wires,
    pins: PinDir,
    state: RunDir,
}

impl Net {
    fn new(label: &str) -> Self {
        let client = Netns::new(&format!("{label}-c")).unwrap();
        let gateway = Netns::new(&format!("{label}-g")).unwrap();
        let backends: Vec<_> =
            (1..=2).map(|n| Netns::new(&format!("{label}-b{n}")).unwrap()).collect();
        let mut tunnels = vec![(GATEWAY, tunnel(&gateway, GATEWAY))];
        tunnels.extend((1..).zip(&backends).map(|(n, backend)| (n, tunnel(backend, n))));
        let net = Self {
            client,
            gateway,
            backends,
            _wires: Wires::new(tunnels),
            pins: PinDir::new(label),
            state: RunDir::new(label).unwrap(),
        };
        Netns::veth((&net.client, "eth0"), (&net.gateway, "eth0")).unwrap();
        for (netns, n) in [(&net.client, 2), (&net.gateway, 1)] {
            address(netns, "eth0", &format!("10.7.0.{n}/24"));
            address(netns, "eth0", &format!("fd07::{n}/64"));
        }
        for (virtual_address, gateway) in VIRTUAL.iter().zip(["10.7.0.1", "fd07::1"]) {
            net.client.ip(&["route", "add", virtual_address, "via", gateway]).unwrap();
        }
        net
    }

    fn open(&self, xdp: XdpChoice) -> Kernel {
        let options = Options {
            pins: self.pins.path().to_owned(),
            state: self.state.path().to_owned(),
            interfaces: vec!["eth0".into()],
            xdp,
            flows: 4_096,
            policy_bytes: 1 << 16,
            rules_max: 64,
        };
        self.gateway.run(|| Kernel::open(options)).unwrap().unwrap()
    }

    fn apply(&self, kernel: &mut Kernel, policy: &Effective) {
        self.gateway.run(|| kernel.apply(policy)).unwrap().unwrap();
    }
}

/// A TUN device with its addresses.
fn tunnel(netns: &Netns, n: u8) -> File {
    let file = netns.run(open_tunnel).unwrap();
    netns.ip(&["link", "set", TUNNEL, "mtu", "1400", "up"]).unwrap();
    address(netns, TUNNEL, &format!("10.99.0.{n}/24"));
    address(netns, TUNNEL, &format!("fd99::{n}/64"));
    file
}

fn open_tunnel() -> File {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    // `struct ifreq`: name, flags.
    let mut request = [0_u8; 40];
    request[..TUNNEL.len()].copy_from_slice(TUNNEL.as_bytes());
    let flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the call reads and writes the request, which outlives it.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    let offload = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    // SAFETY: the argument is a number.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offload) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    file
}

/// Carries packets between TUN devices by the last byte of their destination. Stops when dropped: an open device keeps
/// its namespace.
struct Wires {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Wires {
    fn new(tunnels: Vec<(u8, File)>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let tunnels = Arc::new(tunnels);
        let start = |n| {
            let (tunnels, stop) = (Arc::clone(&tunnels), Arc::clone(&stop));
            std::thread::spawn(move || carry(&tunnels, n, &stop))
        };
        let threads = (0..tunnels.len()).map(start).collect();
        Self { stop, threads }
    }
}

impl Drop for Wires {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn carry(tunnels: &[(u8, File)], from: usize, stop: &AtomicBool) {
    const WAIT_MS: i32 = 100;
    const VNET_HEADER: usize = 10;
    let mut packet = vec![0; 70_000];
    let mut from = &tunnels[from].1;
    while !stop.load(Ordering::Relaxed) {
        let mut ready = libc::pollfd { fd: from.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, which outlives the call.
        if unsafe { libc::poll(&raw mut ready, 1, WAIT_MS) } <= 0 {
            continue;
        }
        let n = from.read(&mut packet).unwrap();
        let packet = &packet[..n];
        let last = if packet[VNET_HEADER] >> 4 == 4 { 19 } else { 39 };
        let to = tunnels.iter().find(|(n, _)| packet.get(VNET_HEADER + last) == Some(n));
        if let Some((_, mut to)) = to.map(|(n, file)| (n, file)) {
            // A full queue loses packets, as a network does.
            let _ = to.write(packet);
        }
    }
}

fn address(netns: &Netns, device: &str, address: &str) {
    netns.ip(&["addr", "add", address, "dev", device]).unwrap();
}

fn balancer(backends: &[usize]) -> Balancer {
    let port = |protocol| ServicePort { protocol, port: PORT, target_port: TARGET };
    Balancer {
        name: name("web"),
        addresses: VIRTUAL.iter().map(|address| address.parse().unwrap()).collect(),
        ports: vec![port(protocol::TCP), port(protocol::UDP)],
        algorithm: Algorithm::RoundRobin,
        gateway: true,
        backends: backends
            .iter()
            .map(|n| BackendTarget {
                instance: None,
                port: 0,
                node: name(&format!("b{n}")),
                addresses: Addresses {
                    v4: Some(format!("10.99.0.{n}").parse().unwrap()),
                    v6: Some(format!("fd99::{n}").parse().unwrap()),
                },
            })
            .collect(),
    }
}

/// Lets clients in to the virtual addresses and nowhere else.
fn policy(backends: &[usize]) -> Effective {
    let mut policy =
        deny_in(vec![allow_in("web", tcp(PORT)), allow_in("datagrams", super::lab::udp(PORT))]);
    policy.tunnel = Some(TunnelDevice {
        device: TUNNEL.into(),
        addresses: Addresses {
            v4: Some("10.99.0.9".parse().unwrap()),
            v6: Some("fd99::9".parse().unwrap()),
        },
        prefixes: vec!["10.99.0.0/24".parse().unwrap(), "fd99::/64".parse().unwrap()],
        mtu: 1_400,
    });
    policy.balancers = vec![balancer(backends)];
    policy
}

fn call(net: &Net, to: &str) -> TcpStream {
    let to = SocketAddr::new(to.parse().unwrap(), PORT);
    let stream = net.client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn listen(netns: &Netns, address: &str) -> TcpListener {
    let address: IpAddr = address.parse().unwrap();
    netns.run(|| TcpListener::bind((address, TARGET))).unwrap().unwrap()
}

/// Takes one connection, says its number, and sends back what comes.
fn echo(listener: TcpListener, number: u8) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            stream.write_all(&[number]).unwrap();
            std::thread::spawn(move || {
                let mut buffer = vec![0; 65_536];
                while let Ok(n) = stream.read(&mut buffer) {
                    if n == 0 || stream.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
            });
        }
    })
}

/// Sends a pattern and reads it back.
fn exchange(stream: &TcpStream) {
    let sent: Vec<u8> = (0..BYTES).map(|n| (n * 7 + n / 251) as u8).collect();
    std::thread::scope(|scope| {
        scope.spawn(|| (&*stream).write_all(&sent).unwrap());
        let mut back = vec![0; BYTES];
        (&*stream).read_exact(&mut back).unwrap();
        assert!(back == sent, "bytes changed on the way");
    });
}

fn number(mut stream: &TcpStream) -> u8 {
    let mut number = [0];
    stream.read_exact(&mut number).unwrap();
    number[0]
}

fn carries_connections(label: &str, xdp: XdpChoice) {
    let net = Net::new(label);
    for (n, backend) in (1..).zip(&net.backends) {
        for address in [format!("10.99.0.{n}"), format!("fd99::{n}")] {
            echo(listen(backend, &address), n);
        }
    }
    let mut kernel = net.open(xdp);
    net.apply(&mut kernel, &policy(&[1, 2]));
    for address in VIRTUAL {
        let mut seen = BTreeMap::<u8, u32>::new();
        for _ in 0..8 {
            let stream = call(&net, address);
            *seen.entry(number(&stream)).or_default() += 1;
        }
        assert_eq!(seen.len(), 2, "all backends are used: {seen:?}");

        let running = call(&net, address);
        let old = number(&running);
        let other = 3 - usize::from(old);
        exchange(&running);
        net.gateway.run(|| kernel.steer(&[balancer(&[other])])).unwrap().unwrap();
        for _ in 0..4 {
            assert_eq!(usize::from(number(&call(&net, address))), other, "drained");
        }
        exchange(&running);
        // The agent starts anew.
        drop(kernel);
        kernel = net.open(xdp);
        net.apply(&mut kernel, &policy(&[other]));
        exchange(&running);
        net.gateway.run(|| kernel.sweep()).unwrap();
        let backend: IpAddr = if address.contains(':') {
            format!("fd99::{old}").parse().unwrap()
        } else {
            format!("10.99.0.{old}").parse().unwrap()
        };
        let backend = SocketAddr::new(backend, TARGET);
        assert!(kernel.status().backend_flows.get(&backend).is_some_and(|n| *n >= 1));
        // The balancer is deleted.
        let mut without = policy(&[]);
        without.balancers.clear();
        net.apply(&mut kernel, &without);
        for _ in 0..4 {
            net.gateway.run(|| kernel.sweep()).unwrap();
            exchange(&running);
        }
        net.apply(&mut kernel, &policy(&[1, 2]));
    }

    net.apply(&mut kernel, &policy(&[]));
    let to = SocketAddr::new(VIRTUAL[0].parse().unwrap(), PORT);
    assert!(net.client.run(|| TcpStream::connect_timeout(&to, SILENCE)).unwrap().is_err());
    let drops = kernel.status().drops;
    assert!(drops.iter().any(|(_, reason, _)| *reason == "no-backend"), "{drops:?}");
}

#[test]
fn a_gateway_with_xdp_carries_connections() {
    carries_connections("lb-xdp", XdpChoice::Auto);
}

#[test]
fn a_gateway_without_xdp_carries_connections() {
    carries_connections("lb-tc", XdpChoice::Off);
}

/// Three on two VMs, each at a port of its own.
#[test]
fn instances_are_reached_at_their_own_ports() {
    const FIRST: u16 = 20_000;
    let net = Net::new("lb-inst");
    let places = [(1, 1_u8), (1, 2), (2, 3)];
    for (vm, instance) in places {
        for address in [format!("10.99.0.{vm}"), format!("fd99::{vm}")] {
            let to = (address.parse::<IpAddr>().unwrap(), FIRST + u16::from(instance));
            let listener = net.backends[vm - 1].run(|| TcpListener::bind(to)).unwrap().unwrap();
            echo(listener, instance);
        }
    }
    let of = |wanted: &[u8]| {
        let mut one = balancer(&[]);
        one.ports.iter_mut().for_each(|port| port.target_port = 0);
        let places = places.into_iter().filter(|(_, instance)| wanted.contains(instance));
        one.backends = places
            .map(|(vm, instance)| BackendTarget {
                instance: Some(name(&format!("web-{instance}"))),
                port: FIRST + u16::from(instance),
                ..balancer(&[vm]).backends.remove(0)
            })
            .collect();
        one
    };
    let mut kernel = net.open(XdpChoice::Auto);
    let mut wanted = policy(&[]);
    wanted.balancers = vec![of(&[1, 2, 3])];
    net.apply(&mut kernel, &wanted);
    for address in VIRTUAL {
        let streams: Vec<_> = (0..9).map(|_| call(&net, address)).collect();
        let mut seen: Vec<_> = streams.iter().map(number).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [1, 2, 3]);
        net.gateway.run(|| kernel.sweep()).unwrap();
        let flows = kernel.status().backend_flows;
        for (vm, instance) in places {
            let host =
                if address.contains(':') { format!("fd99::{vm}") } else { format!("10.99.0.{vm}") };
            let place = SocketAddr::new(host.parse().unwrap(), FIRST + u16::from(instance));
            assert!(flows.get(&place).is_some_and(|n| *n > 0), "{place} has none: {flows:?}");
        }
        // One of two on a VM goes; what it has stays.
        net.gateway.run(|| kernel.steer(&[of(&[1, 3])])).unwrap().unwrap();
        assert!((0..6).all(|_| number(&call(&net, address)) != 2));
        streams.iter().for_each(exchange);
        net.gateway.run(|| kernel.steer(&[of(&[1, 2, 3])])).unwrap().unwrap();
    }
}

#[test]
fn datagrams_find_a_backend_and_back() {
    let net = Net::new("lb-udp");
    let mut kernel = net.open(XdpChoice::Auto);
    net.apply(&mut kernel, &policy(&[1]));
    for (address, here, there) in
        [(VIRTUAL[0], "10.99.0.1", "10.7.0.2"), (VIRTUAL[1], "fd99::1", "fd07::2")]
    {
        let bind = |netns: &Netns, address: &str, port| {
            let address: IpAddr = address.parse().unwrap();
            let socket = netns.run(|| UdpSocket::bind((address, port))).unwrap().unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        let (server, client) = (bind(&net.backends[0], here, TARGET), bind(&net.client, there, 0));
        client.connect((address.parse::<IpAddr>().unwrap(), PORT)).unwrap();
        let mut buffer = [0; 64];
        for question in [&b"one"[..], b"two"] {
            client.send(question).unwrap();
            let (n, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..n], question);
            server.send_to(b"answer", from).unwrap();
            assert_eq!(client.recv(&mut buffer).unwrap(), 6);
        }
    }
}
