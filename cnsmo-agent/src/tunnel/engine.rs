//! WireGuard in user space, for kernels without it: a process of its own that outlives the agent.
//!
//! The Noise protocol is gotatun's; the data path around it is ours. Four threads: `outbound` (device to UDP), `inbound`
//! (UDP to device), `handshake`, so that a flood of those does not stand in the way of data, and `timers`.

use std::{
    io,
    os::fd::AsFd as _,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use cnsmo_proto::model::{MTU_MIN, PublicKey};
use gotatun::noise::rate_limiter::RateLimiter;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use x25519_dalek::StaticSecret;

use self::{
    peers::{Indices, Peer, Session, Table},
    tun::Tun,
    udp::Udp,
};
use super::{
    DEVICE,
    control::{self, Configure, PeerReport, Report},
    key::PrivateKey,
};

mod checksum;
mod cut;
mod handshake;
mod inbound;
mod merge;
mod outbound;
mod peers;
mod tun;
mod udp;
mod vnet;

/// Handshake messages of one source address and second, beyond which it must prove that it is there. The kernel's bound.
const HANDSHAKES_PER_SOURCE: u64 = 20;
const DEVICE_WAIT: Duration = Duration::from_secs(1);

/// Runs the engine: takes the device, then serves `state_dir`'s control socket until it is told to stop or the device is
/// gone.
///
/// # Errors
/// The key cannot be read, the device belongs to another process, or a thread of the engine ended.
pub fn run(state_dir: &Path) -> anyhow::Result<()> {
    let key = PrivateKey::load(&control::key_path(state_dir))?;
    let tun = take_device()?;
    let (engine, handshakes) = Engine::new(&key, tun)?;
    let engine = Arc::new(engine);
    let (ended, end) = mpsc::channel();
    let listener = control::Listener::bind(state_dir)?;
    spawn("outbound", &engine, &ended, |engine| outbound::run(&engine))?;
    spawn("inbound", &engine, &ended, |engine| inbound::run(&engine))?;
    spawn("handshake", &engine, &ended, move |engine| handshake::run(&engine, &handshakes))?;
    spawn("timers", &engine, &ended, |engine| handshake::run_timers(&engine))?;
    spawn("control", &engine, &ended, move |engine| listener.serve(&*engine))?;
    let (thread, result) = end.recv()?;
    tracing::info!(thread, "engine ends");
    Ok(result?)
}

/// An engine that was told to stop may not be gone yet.
fn take_device() -> io::Result<Tun> {
    let end = Instant::now() + DEVICE_WAIT;
    loop {
        match Tun::open(DEVICE) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                handshake::pause(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

type Ended = (&'static str, io::Result<()>);

/// The engine is all of its threads: the first that ends ends it, by return or panic.
fn spawn(
    name: &'static str,
    engine: &Arc<Engine>,
    ended: &mpsc::Sender<Ended>,
    body: impl FnOnce(Arc<Engine>) -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    let (engine, ended) = (engine.clone(), ended.clone());
    thread::Builder::new().name(name.into()).spawn(move || {
        let body = std::panic::AssertUnwindSafe(|| body(engine));
        let result = std::panic::catch_unwind(body)
            .unwrap_or_else(|_| Err(io::Error::other(format!("{name} panicked"))));
        // The process is ending if nobody listens.
        let _ = ended.send((name, result));
    })?;
    Ok(())
}

/// What the threads share.
struct Engine {
    secret: StaticSecret,
    public: x25519_dalek::PublicKey,
    tun: Tun,
    mtu: AtomicU16,
    /// `None`: not configured yet.
    udp: RwLock<Option<Arc<Udp>>>,
    /// Tells `inbound` that `udp` is another.
    rebound: EventFd,
    table: RwLock<Arc<Table>>,
    indices: Indices,
    limiter: Arc<RateLimiter>,
    /// In force when handshakes pile up: every source must prove that it is there.
    strict: RateLimiter,
    handshakes: mpsc::SyncSender<handshake::Message>,
    handshakes_waiting: AtomicUsize,
    /// Peers whose timers shall run from now on.
    waking: Mutex<Vec<Arc<Peer>>>,
    drops: Drops,
}

/// Packets that went nowhere, by reason.
#[derive(Debug, Default)]
struct Drops {
    no_peer: AtomicU64,
    no_endpoint: AtomicU64,
    malformed: AtomicU64,
    unknown_index: AtomicU64,
    undecryptable: AtomicU64,
    foreign_source: AtomicU64,
    handshake: AtomicU64,
}

impl Drops {
    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn report(&self) -> [(&'static str, u64); 7] {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("no-peer", read(&self.no_peer)),
            ("no-endpoint", read(&self.no_endpoint)),
            ("malformed", read(&self.malformed)),
            ("unknown-index", read(&self.unknown_index)),
            ("undecryptable", read(&self.undecryptable)),
            ("foreign-source", read(&self.foreign_source)),
            ("handshake", read(&self.handshake)),
        ]
    }
}

impl Engine {
    fn new(
        key: &PrivateKey,
        tun: Tun,
    ) -> anyhow::Result<(Self, mpsc::Receiver<handshake::Message>)> {
        let secret = key.secret();
        let public = x25519_dalek::PublicKey::from(&secret);
        let (handshakes, queue) = mpsc::sync_channel(handshake::WAITING_MAX);
        let this = Self {
            secret,
            public,
            tun,
            mtu: AtomicU16::new(MTU_MIN),
            udp: RwLock::default(),
            rebound: EventFd::from_value_and_flags(
                0,
                EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
            )?,
            table: RwLock::default(),
            indices: Indices::new(),
            limiter: Arc::new(RateLimiter::new(&public, HANDSHAKES_PER_SOURCE)),
            strict: RateLimiter::new(&public, 0),
            handshakes,
            handshakes_waiting: AtomicUsize::new(0),
            waking: Mutex::default(),
            drops: Drops::default(),
        };
        Ok((this, queue))
    }

    fn table(&self) -> Arc<Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn udp(&self) -> Option<Arc<Udp>> {
        self.udp.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Lets the timers of a peer run. They stand still for a peer that has been silent for long, so that its clock must be
    /// set before anything else happens to it.
    fn wake(&self, peer: &Arc<Peer>, session: &mut Session) {
        if !session.awake {
            session.awake = true;
            // It has no session, or it was awake: nothing is due.
            let _ = session.tunn.update_timers();
            self.waking.lock().unwrap_or_else(PoisonError::into_inner).push(peer.clone());
        }
    }

    fn rebind(&self, port: u16) -> io::Result<()> {
        if self.udp().is_none_or(|udp| udp.port() != port) {
            let udp = Arc::new(Udp::bind(port)?);
            *self.udp.write().unwrap_or_else(PoisonError::into_inner) = Some(udp);
            self.rebound.write(1)?;
        }
        Ok(())
    }

    fn set_peers(&self, wanted: &[control::PeerConfig]) -> Result<(), control::Malformed> {
        let old = self.table();
        let mut table = Table::default();
        for wanted in wanted {
            let (key, endpoint, allowed) = wanted.parse()?;
            let peer = old.peers.get(&key).cloned().unwrap_or_else(|| self.new_peer(key));
            table.insert(&peer, allowed);
            peer.configure(endpoint);
        }
        let table = Arc::new(table);
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table.clone();
        for (key, peer) in &old.peers {
            if !table.peers.contains_key(key) {
                self.indices.forget(peer);
            }
        }
        Ok(())
    }

    fn new_peer(&self, key: PublicKey) -> Arc<Peer> {
        let (indices, limiter) = (self.indices.table(), self.limiter.clone());
        Arc::new(Peer::new(key, self.secret.clone(), indices, limiter))
    }
}

impl control::Service for Engine {
    fn configure(&self, wanted: &Configure) -> anyhow::Result<()> {
        self.rebind(u16::try_from(wanted.listen_port)?)?;
        self.mtu.store(u16::try_from(wanted.mtu)?, Ordering::Relaxed);
        Ok(self.set_peers(&wanted.peers)?)
    }

    fn report(&self) -> Report {
        let peer = |peer: &Arc<Peer>| {
            let session = peer.lock();
            PeerReport {
                public_key: peer.key.0.to_vec(),
                endpoint: session.endpoint.map(|e| e.to_string()).unwrap_or_default(),
                last_handshake: session.last_handshake.map(Into::into),
                received_bytes: session.received_bytes,
                sent_bytes: session.sent_bytes,
                foreign_sources: session.foreign_sources,
            }
        };
        Report {
            listen_port: self.udp().map(|udp| udp.port().into()).unwrap_or_default(),
            peers: self.table().peers.values().map(peer).collect(),
            drops: self.drops.report().map(|(word, n)| (word.to_owned(), n)).into(),
            ..Report::default()
        }
    }
}

/// Waits until one of `fds` can be read.
fn wait_readable(fds: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Length and addresses of an IP packet, all of whose header is there.
fn ip_header(packet: &[u8]) -> Option<IpHeader> {
    let v4 = |at: usize| -> Option<std::net::IpAddr> {
        Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into())
    };
    let v6 = |at: usize| -> Option<std::net::IpAddr> {
        Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into())
    };
    let length = |at: usize| Some(usize::from(checksum::be16(packet.get(at..at + 2)?, 0)));
    match packet.first()? >> 4 {
        4 => Some(IpHeader { len: length(2)?.max(20), source: v4(12)?, destination: v4(16)? }),
        6 => Some(IpHeader { len: length(4)? + 40, source: v6(8)?, destination: v6(24)? }),
        _ => None,
    }
}

struct IpHeader {
    len: usize,
    source: std::net::IpAddr,
    destination: std::net::IpAddr,
}

/// Bytes of a datagram as the state machine wants them.
type Datagram = BytesMut;
