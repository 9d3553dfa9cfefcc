//! The kernel's WireGuard and the engine understand each other. On a kernel without it, the engine is on both ends.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use cnsmo_agent::tunnel::{
    Backend, Peer, Tunnel as _, TunnelConfig, TunnelOptions, WireGuard, control, engine,
    key::PrivateKey,
};
use cnsmo_proto::model::{Addresses, Name, PublicKey};
use nix::{
    sched::{CloneFlags, unshare},
    unistd::gettid,
};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);
/// How long a connection that must fail is tried.
const SILENCE: Duration = Duration::from_secs(2);
const PORT: u16 = 51_820;

#[test]
fn the_kernel_and_the_engine_understand_each_other() {
    let (mut a, mut b) = (End::new(1), End::new(2));
    connect(&a.space, &b.space);
    let kernel = a.space.run(|| ip("link add name probe type wireguard").is_ok());
    if kernel {
        a.space.run(|| ip("link del probe")).unwrap();
    } else {
        a.start_engine();
    }
    b.start_engine();
    a.open();
    b.open();
    let (of_a, of_b) = (a.config(&b), b.config(&a));
    a.set(&of_a);
    b.set(&of_b);
    let expected = if kernel { Backend::Kernel } else { Backend::Engine };
    assert_eq!((a.backend(), b.backend()), (expected, Backend::Engine));
    println!("moved by {:?} and {:?}", a.backend(), b.backend());

    for (from, to) in [(&a, &b), (&b, &a)] {
        for address in to.addresses().iter() {
            let received = transfer(from, to, address);
            assert!(received == payload(), "to {address}: {} bytes", received.len());
        }
    }
    let before = a.last_handshake(2);
    assert!(before.is_some());
    a.set(&of_a);
    assert_eq!(a.last_handshake(2), before, "nothing was touched");

    // An agent that starts again finds what is there.
    a.open();
    a.set(&of_a);
    assert_eq!(a.last_handshake(2), before);

    let without = TunnelConfig { peers: [].into(), ..of_a.clone() };
    a.set(&without);
    let to = b.addresses().v4.unwrap().into();
    assert!(try_connect(&a, &b, to, SILENCE).is_err(), "a removed peer");
    let moved = TunnelConfig { listen_port: 4_000, ..of_a };
    a.set(&moved);
    assert_eq!(transfer(&a, &b, to).len(), payload().len(), "from another port");
    a.leave();
    b.leave();
}

/// A VM in small.
struct End {
    n: u8,
    space: Space,
    state: TempDir,
    tunnel: Option<WireGuard>,
}

impl End {
    fn new(n: u8) -> Self {
        Self { n, space: Space::new(), state: tempfile::tempdir().unwrap(), tunnel: None }
    }

    /// In this process: what runs here is one program.
    fn start_engine(&self) {
        let state = self.state.path().to_owned();
        PrivateKey::open(&control::key_path(&state)).unwrap();
        self.space.run(move || {
            thread::spawn(move || engine::run(&state).unwrap());
        });
        let end = Instant::now() + PATIENCE;
        while control::ask(self.state.path(), control::Request::Report(())).is_err() {
            assert!(Instant::now() < end, "the engine does not answer");
            cnsmo_tests::pause(Duration::from_millis(10));
        }
    }

    fn open(&mut self) {
        self.tunnel = None;
        let options = TunnelOptions {
            state_dir: self.state.path().to_owned(),
            program: Path::new("/proc/self/exe").to_owned(),
            interfaces: Vec::new(),
        };
        self.tunnel = Some(self.space.run(|| WireGuard::open(options)).unwrap());
    }

    fn key(&self) -> PublicKey {
        self.tunnel.as_ref().unwrap().public_key()
    }

    fn addresses(&self) -> Addresses {
        Addresses {
            v4: format!("10.98.0.{}", self.n).parse().ok(),
            v6: format!("fd98::{}", self.n).parse().ok(),
        }
    }

    fn config(&self, other: &Self) -> TunnelConfig {
        let endpoints = vec![SocketAddr::from(([10, 62, 0, other.n], PORT))];
        let node = Name::new(format!("vm{}", other.n)).unwrap();
        TunnelConfig {
            network: Name::new("overlay").unwrap(),
            addresses: self.addresses(),
            prefixes: vec!["10.98.0.0/24".parse().unwrap(), "fd98::/64".parse().unwrap()],
            listen_port: PORT,
            mtu: None,
            peers: [(other.key(), Peer { node, addresses: other.addresses(), endpoints })].into(),
        }
    }

    fn with<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut WireGuard) -> T + Send + 'static,
    ) -> T {
        let mut tunnel = self.tunnel.take().unwrap();
        let (tunnel, result) = self.space.run(move || {
            let result = work(&mut tunnel);
            (tunnel, result)
        });
        self.tunnel = Some(tunnel);
        result
    }

    fn set(&mut self, config: &TunnelConfig) {
        let config = config.clone();
        self.with(move |tunnel| {
            tunnel.prepare(&config).unwrap();
            tunnel.complete(Some(&config)).unwrap();
        });
    }

    fn leave(&mut self) {
        self.with(|tunnel| tunnel.complete(None)).unwrap();
        assert!(self.space.run(|| ip("link show cnsmo0")).is_err());
    }

    fn backend(&mut self) -> Backend {
        self.with(|tunnel| tunnel.status().unwrap().backend)
    }

    fn last_handshake(&mut self, n: u8) -> Option<std::time::SystemTime> {
        let name = Name::new(format!("vm{n}")).unwrap();
        self.with(move |tunnel| tunnel.status().unwrap().peers[&name].last_handshake)
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// A network namespace without a name: a thread is in it.
struct Space {
    work: mpsc::Sender<Work>,
    thread: i32,
}

impl Space {
    fn new() -> Self {
        let (work, queue) = mpsc::channel::<Work>();
        let (ready, wait) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up").unwrap();
            ready.send(gettid().as_raw()).unwrap();
            while let Ok(work) = queue.recv() {
                work();
            }
        });
        Self { work, thread: wait.recv().unwrap() }
    }

    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, wait) = mpsc::channel();
        let work = move || {
            let _ = done.send(work());
        };
        self.work.send(Box::new(work)).unwrap();
        wait.recv().expect("panicked inside")
    }
}

/// Words that iproute2's `ip` and busybox's understand.
fn ip(words: &str) -> Result<(), String> {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    output.status.success().then_some(()).ok_or(said)
}

/// The kernel chooses the name of the cable's other end.
fn connect(a: &Space, b: &Space) {
    a.run(|| ip("link add name cable type veth")).unwrap();
    let names = a.run(|| {
        let interfaces = nix::net::if_::if_nameindex().unwrap();
        interfaces.iter().map(|i| i.name().to_str().unwrap().to_owned()).collect::<Vec<_>>()
    });
    let other = names.into_iter().find(|name| name.starts_with("veth")).unwrap();
    let (moved, thread) = (other.clone(), b.thread);
    a.run(move || ip(&format!("link set {moved} netns {thread}"))).unwrap();
    a.run(|| ip("addr add 10.62.0.1/24 dev cable").and_then(|()| ip("link set cable up"))).unwrap();
    b.run(move || {
        ip(&format!("addr add 10.62.0.2/24 dev {other}"))?;
        ip(&format!("link set {other} up"))
    })
    .unwrap();
}

fn payload() -> Vec<u8> {
    (0..512_u32 << 10).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

fn transfer(from: &End, to: &End, address: IpAddr) -> Vec<u8> {
    let (mut client, mut server) = try_connect(from, to, address, PATIENCE).unwrap();
    let sender = thread::spawn(move || client.write_all(&payload()).unwrap());
    let mut received = Vec::new();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    server.read_to_end(&mut received).unwrap();
    sender.join().unwrap();
    received
}

fn try_connect(
    from: &End,
    to: &End,
    address: IpAddr,
    limit: Duration,
) -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = to.space.run(move || TcpListener::bind((address, 0))).unwrap();
    let target = listener.local_addr().unwrap();
    let client = from.space.run(move || TcpStream::connect_timeout(&target, limit))?;
    Ok((client, listener.accept().unwrap().0))
}
