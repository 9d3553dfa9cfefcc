//! VMs in subnets of their own behind one router, each with a tunnel into one network.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use cnsmo_agent::tunnel::{
    Backend, Peer, PeerStatus, Tunnel as _, TunnelConfig, TunnelOptions, WireGuard, control,
};
use cnsmo_proto::model::{Addresses, LISTEN_PORT, Name, PublicKey};
use cnsmo_tests::{Netns, Process, RunDir, pause};

/// How long something that must arrive may take on a busy host.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// All VMs, and what forwards between them.
pub(super) struct Site {
    pub(super) router: Netns,
    pub(super) vms: Vec<Vm>,
    pub(super) run: RunDir,
}

/// A VM, the `n`th from 1.
pub(super) struct Vm {
    pub(super) n: u8,
    pub(super) netns: Netns,
    pub(super) state: RunDir,
    tunnel: Option<WireGuard>,
}

impl Site {
    /// `count` VMs that all know each other.
    pub(super) fn joined(label: &str, count: u8) -> Self {
        let mut site = Self::apart(label, count);
        for n in 0..site.vms.len() {
            let config = site.config(n);
            site.vms[n].set(&config);
        }
        site
    }

    /// `count` VMs whose tunnels are not set up yet.
    pub(super) fn apart(label: &str, count: u8) -> Self {
        let router = Netns::new(&format!("{label}-router")).unwrap();
        router.sysctl("net/ipv4/ip_forward", "1").unwrap();
        router.sysctl("net/ipv6/conf/all/forwarding", "1").unwrap();
        let vms = (1..=count).map(|n| Vm::new(label, n, &router)).collect();
        Self { router, vms, run: RunDir::new(label).unwrap() }
    }

    /// Of the VM at `index`: the others as peers. The second of them is reached over IPv6.
    pub(super) fn config(&self, index: usize) -> TunnelConfig {
        let others = self.vms.iter().enumerate().filter(|(n, _)| *n != index);
        let peer = |(n, vm): (usize, &Vm)| {
            let over = if n == 2 { vm.underlay6() } else { vm.underlay4() };
            let endpoints = vec![SocketAddr::new(over, LISTEN_PORT)];
            let node = Name::new(format!("vm{}", vm.n)).unwrap();
            (vm.tunnel().public_key(), Peer { node, addresses: vm.addresses(), endpoints })
        };
        TunnelConfig {
            network: Name::new("overlay").unwrap(),
            addresses: self.vms[index].addresses(),
            prefixes: vec!["10.99.0.0/24".parse().unwrap(), "fd99::/64".parse().unwrap()],
            listen_port: LISTEN_PORT,
            mtu: None,
            peers: others.map(peer).collect(),
        }
    }

    /// Records what the router forwards until the value is dropped.
    pub(super) fn capture(&self, name: &str) -> Capture {
        let file = self.run.path().join(format!("{name}.pcap"));
        let mut command = self.router.command("tcpdump").unwrap();
        command.args(["-i", "any", "--immediate-mode", "-U", "-Z", "root", "-w"]).arg(&file);
        let log = self.run.path().join("tcpdump.log");
        let mut process = Process::spawn("tcpdump", &mut command, &log).unwrap();
        process.wait_for("listening on", PATIENCE).unwrap();
        Capture { file, process }
    }
}

impl Vm {
    fn new(label: &str, n: u8, router: &Netns) -> Self {
        let netns = Netns::new(&format!("{label}-{n}")).unwrap();
        let port = format!("vm{n}");
        Netns::veth((&netns, "eth0"), (router, &port)).unwrap();
        for (netns, device, host) in [(&netns, "eth0", 2), (router, port.as_str(), 1)] {
            for address in [format!("10.61.{n}.{host}/24"), format!("fd61:{n}::{host}/64")] {
                netns.ip(&["addr", "add", &address, "dev", device]).unwrap();
            }
        }
        for gateway in [format!("10.61.{n}.1"), format!("fd61:{n}::1")] {
            netns.ip(&["route", "add", "default", "via", &gateway]).unwrap();
        }
        let state = RunDir::new(&format!("{label}-{n}")).unwrap();
        let mut this = Self { n, netns, state, tunnel: None };
        this.open();
        this
    }

    /// As a starting agent does; an earlier one is gone without a word.
    pub(super) fn open(&mut self) {
        self.open_with(agent());
    }

    /// As a starting agent of another build does.
    pub(super) fn open_with(&mut self, program: PathBuf) {
        self.tunnel = None;
        let options = TunnelOptions {
            state_dir: self.state.path().to_owned(),
            program,
            interfaces: vec!["eth0".to_owned()],
        };
        self.tunnel = Some(self.netns.run(|| WireGuard::open(options)).unwrap().unwrap());
    }

    fn tunnel(&self) -> &WireGuard {
        self.tunnel.as_ref().unwrap()
    }

    pub(super) fn tunnel_key(&self) -> PublicKey {
        self.tunnel().public_key()
    }

    pub(super) fn backend(&mut self) -> Backend {
        self.tunnel.as_mut().unwrap().status().unwrap().backend
    }

    /// Leaves the network.
    pub(super) fn leave(&mut self) {
        let tunnel = self.tunnel.as_mut().unwrap();
        self.netns.run(|| tunnel.complete(None)).unwrap().unwrap();
    }

    /// Prepares and completes.
    pub(super) fn set(&mut self, config: &TunnelConfig) {
        let tunnel = self.tunnel.as_mut().unwrap();
        let set = || {
            tunnel.prepare(config).unwrap();
            tunnel.complete(Some(config)).unwrap();
        };
        self.netns.run(set).unwrap();
    }

    pub(super) fn tend(&mut self) {
        let tunnel = self.tunnel.as_mut().unwrap();
        self.netns.run(|| tunnel.tend()).unwrap().unwrap();
    }

    /// Of the peer with this number.
    pub(super) fn peer(&mut self, n: u8) -> PeerStatus {
        let status = self.tunnel.as_mut().unwrap().status().unwrap();
        status.peers[&Name::new(format!("vm{n}")).unwrap()].clone()
    }

    pub(super) fn report(&self) -> control::Report {
        control::ask(self.state.path(), control::Request::Report(())).unwrap()
    }

    pub(super) fn overlay4(&self) -> IpAddr {
        Ipv4Addr::new(10, 99, 0, self.n).into()
    }

    pub(super) fn overlay6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, self.n.into()).into()
    }

    pub(super) fn underlay4(&self) -> IpAddr {
        Ipv4Addr::new(10, 61, self.n, 2).into()
    }

    pub(super) fn underlay6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd61, self.n.into(), 0, 0, 0, 0, 0, 2).into()
    }

    fn addresses(&self) -> Addresses {
        Addresses {
            v4: Some(Ipv4Addr::new(10, 99, 0, self.n)),
            v6: Some(Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, self.n.into())),
        }
    }

    /// Whether one of a few echo requests is answered.
    pub(super) fn pings(&self, to: IpAddr) -> bool {
        self.ping(&["-c", "1", "-W", "2", &to.to_string()])
            || self.ping(&["-c", "3", "-i", "0.3", "-W", "2", &to.to_string()])
    }

    pub(super) fn ping(&self, args: &[&str]) -> bool {
        let mut ping = self.netns.command("ping").unwrap();
        ping.args(["-q", "-n"]).args(args).output().unwrap().status.success()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Ends the engine, whatever became of the test.
        let tunnel = self.tunnel.take();
        let _ = self.netns.run(move || {
            if let Some(mut tunnel) = tunnel {
                let _ = tunnel.complete(None);
            }
            let _ = WireGuard::detach();
        });
    }
}

/// What went over the underlay.
pub(super) struct Capture {
    file: PathBuf,
    process: Process,
}

impl Capture {
    /// Every byte until now.
    pub(super) fn bytes(mut self, site: &Site) -> Vec<u8> {
        const END: &[u8] = b"end-of-the-capture";
        let to = (site.vms[0].underlay4(), 9);
        let limit = Instant::now() + PATIENCE;
        loop {
            let socket = site.router.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
            socket.send_to(END, to).unwrap();
            pause(Duration::from_millis(20));
            let bytes = std::fs::read(&self.file).unwrap();
            if contains(&bytes, END) {
                self.process.terminate(PATIENCE).unwrap();
                return bytes;
            }
            assert!(Instant::now() < limit, "{}", self.process.tail());
        }
    }
}

pub(super) fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Sends `data` from one VM to an address of the other; what arrived.
pub(super) fn transfer(from: &Vm, to: &Vm, address: IpAddr, data: &[u8]) -> Vec<u8> {
    let listener = to.netns.run(|| TcpListener::bind((address, 0))).unwrap().unwrap();
    let target = listener.local_addr().unwrap();
    thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE * 3)).unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            received
        });
        let connect = || TcpStream::connect_timeout(&target, PATIENCE);
        let mut stream = from.netns.run(connect).unwrap().unwrap();
        stream.write_all(data).unwrap();
        drop(stream);
        receiver.join().unwrap()
    })
}

/// Sends one datagram and returns what came back from an echo at `address`.
pub(super) fn echo(from: &Vm, to: &Vm, address: IpAddr, datagram: &[u8]) -> Vec<u8> {
    let server = to.netns.run(|| UdpSocket::bind((address, 0))).unwrap().unwrap();
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let client = from.netns.run(|| UdpSocket::bind((any, 0))).unwrap().unwrap();
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    client.send_to(datagram, server.local_addr().unwrap()).unwrap();
    let mut buffer = vec![0; 65_536];
    let (len, source) = server.recv_from(&mut buffer).unwrap();
    server.send_to(&buffer[..len], source).unwrap();
    let len = client.recv(&mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

/// The program under test, beside this one.
pub(super) fn agent() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let path = here.parent().unwrap().parent().unwrap().join("cnsmo-agent");
    assert!(path.exists(), "{} is missing: cargo build -p cnsmo-agent", path.display());
    path
}

/// Text of what the process was started with.
pub(super) fn start_of(pid: u32) -> BTreeMap<&'static str, Vec<u8>> {
    let read = |file| std::fs::read(format!("/proc/{pid}/{file}")).unwrap();
    [("cmdline", read("cmdline")), ("environ", read("environ"))].into()
}
