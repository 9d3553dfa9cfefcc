//! The tunnel over whatever moves its packets: what is the same for the kernel and for the engine.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use cnsmo_proto::model::PublicKey;
use cnsmo_service::supervise::Chain;
use ipnet::IpNet;
use netlink_packet_route::link::InfoKind;

use super::{
    Backend, DEVICE, Device, Peer, PeerStatus, Tunnel, TunnelConfig, TunnelError, TunnelStatus,
    kernel::Kernel,
    key::PrivateKey,
    link::{Link, Links},
    process::Process,
};

/// A peer without a session that does not answer for this long is tried at its next endpoint: one attempt of the protocol.
const UNANSWERED_MAX: Duration = Duration::from_secs(5);
/// A peer with a session may be silent for 10 s (WireGuard, section 6.5), asks for a new one after 15, then is given one
/// attempt.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// No session is older (WireGuard, section 6.1).
const SESSION_AGE_MAX: Duration = Duration::from_secs(180);

/// What a tunnel is opened with.
#[derive(Clone, Debug)]
pub struct TunnelOptions {
    /// Where keys and the engine's socket are.
    pub state_dir: PathBuf,
    /// What runs the engine; this program itself.
    pub program: PathBuf,
    /// Network cards that carry the tunnel's packets. Empty: all.
    pub interfaces: Vec<String>,
}

/// What moves packets.
pub(super) trait Mover: Send {
    fn backend(&self) -> Backend;

    /// Makes it as wanted, the device included. What is as before is not touched.
    fn set(&mut self, wanted: &Settings) -> anyhow::Result<()>;

    fn peers(&mut self) -> anyhow::Result<BTreeMap<PublicKey, PeerStatus>>;

    /// Starts again what has died.
    fn revive(&mut self) -> anyhow::Result<()>;

    /// Ends what would keep the device.
    fn stop(&mut self) -> anyhow::Result<()>;
}

/// All that a mover is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) listen_port: u16,
    pub(super) mtu: u16,
    pub(super) peers: BTreeMap<PublicKey, PeerSettings>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PeerSettings {
    pub(super) allowed: BTreeSet<IpNet>,
    /// `None`: whatever it is now.
    pub(super) endpoint: Option<SocketAddr>,
}

/// The tunnel of this VM.
pub struct WireGuard {
    public_key: PublicKey,
    interfaces: Vec<String>,
    links: Links,
    mover: Box<dyn Mover>,
    reason: String,
    /// As of the last `prepare` or `complete`.
    config: Option<TunnelConfig>,
    mtu: u16,
    /// Of the peers of `config`, and until `complete` of those before.
    peers: BTreeMap<PublicKey, Followed>,
}

/// A peer and how it answers.
#[derive(Debug)]
struct Followed {
    peer: Peer,
    endpoint: Option<SocketAddr>,
    received_bytes: u64,
    sent_bytes: u64,
    /// Since when something was sent and nothing came.
    unanswered: Option<Instant>,
}

impl WireGuard {
    /// Takes over the tunnel that is there, or finds out what a new one would be moved by. Changes nothing.
    ///
    /// Sockets and the engine are in the network namespace of the calling thread.
    ///
    /// # Errors
    /// No netlink, or the key cannot be read or made.
    pub fn open(options: TunnelOptions) -> Result<Self, TunnelError> {
        let mut links = Links::open().map_err(failed("reach the kernel over netlink"))?;
        let (backend, reason) = choose(&mut links)?;
        let key_path = match backend {
            Backend::Kernel => super::kernel::key_path(&options.state_dir),
            Backend::Engine => super::control::key_path(&options.state_dir),
        };
        let key = PrivateKey::open(&key_path).map_err(failed("open the tunnel's key"))?;
        let public_key = key.public();
        let mover: Box<dyn Mover> = match backend {
            Backend::Kernel => Box::new(Kernel::open(key).map_err(failed("reach WireGuard"))?),
            Backend::Engine => Box::new(Process::new(options.state_dir, options.program)),
        };
        let (config, mtu, peers) = (None, 0, BTreeMap::new());
        Ok(Self {
            public_key,
            interfaces: options.interfaces,
            links,
            mover,
            reason,
            config,
            mtu,
            peers,
        })
    }

    /// Removes the device, if there is one. An engine ends with it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn detach() -> Result<(), TunnelError> {
        let remove = || -> io::Result<()> {
            let mut links = Links::open()?;
            match links.find(DEVICE)?.filter(|link| backend_of(link).is_some()) {
                Some(link) => links.delete(&link),
                None => Ok(()),
            }
        };
        remove().map_err(failed("remove the tunnel's device"))
    }

    /// Notes which peers there are from now on; with `all`, those before stay too.
    fn follow(&mut self, config: &TunnelConfig, all: bool) -> anyhow::Result<()> {
        let unknown = config.peers.keys().any(|key| !self.peers.contains_key(key));
        // Those that an earlier agent set up may be at another endpoint than the first.
        let known = if unknown { self.mover.peers().unwrap_or_default() } else { BTreeMap::new() };
        if !all {
            self.peers.retain(|key, _| config.peers.contains_key(key));
        }
        for (key, peer) in &config.peers {
            let at = |endpoint: &SocketAddr| peer.endpoints.contains(endpoint);
            match self.peers.get_mut(key) {
                Some(followed) => {
                    if !followed.endpoint.as_ref().is_some_and(at) {
                        followed.endpoint = peer.endpoints.first().copied();
                    }
                    followed.peer = peer.clone();
                }
                None => {
                    let now = known.get(key).and_then(|status| status.endpoint);
                    let endpoint = match now {
                        Some(now) if at(&now) => Some(now),
                        // It roamed.
                        Some(_) => None,
                        None => peer.endpoints.first().copied(),
                    };
                    self.peers.insert(*key, Followed::new(peer.clone(), endpoint));
                }
            }
        }
        Ok(())
    }

    /// An address belongs to one peer: to that of the newest configuration.
    fn settings(&self, config: &TunnelConfig) -> Settings {
        let mut owned = BTreeSet::new();
        let mut peers = BTreeMap::new();
        let (new, old): (Vec<_>, Vec<_>) =
            self.peers.iter().partition(|(key, _)| config.peers.contains_key(key));
        for (key, followed) in new.into_iter().chain(old) {
            let addresses = followed.peer.addresses.iter().map(IpNet::from);
            let allowed = addresses.filter(|net| owned.insert(*net)).collect();
            peers.insert(*key, PeerSettings { allowed, endpoint: followed.endpoint });
        }
        Settings { listen_port: config.listen_port, mtu: self.mtu, peers }
    }

    fn try_prepare(&mut self, config: &TunnelConfig) -> anyhow::Result<()> {
        self.mtu = match config.mtu {
            Some(mtu) => mtu,
            None => self.links.derive_mtu(&self.interfaces)?,
        };
        self.follow(config, true)?;
        let settings = self.settings(config);
        self.mover.set(&settings)?;
        let link = self.device()?;
        self.links.set_up_queue(&link, self.mtu)?;
        self.links.add_addresses(&link, &config.addresses.iter().collect())?;
        self.config = Some(config.clone());
        Ok(())
    }

    fn try_complete(&mut self, config: &TunnelConfig) -> anyhow::Result<()> {
        let link = self.device()?;
        self.links.up(&link)?;
        let source = |prefix: &IpNet| {
            let of_family = |a: &IpAddr| a.is_ipv4() == prefix.addr().is_ipv4();
            Some((prefix.trunc(), config.addresses.iter().find(of_family)?))
        };
        let routes = config.prefixes.iter().filter_map(source).collect();
        self.links.set_routes(&link, &routes)?;
        self.links.keep_addresses(&link, &config.addresses.iter().collect())?;
        self.follow(config, false)?;
        let settings = self.settings(config);
        self.mover.set(&settings)?;
        self.config = Some(config.clone());
        Ok(())
    }

    fn remove(&mut self) -> anyhow::Result<()> {
        if let Some(link) = self.links.find(DEVICE)?.filter(|link| backend_of(link).is_some()) {
            self.mover.stop()?;
            self.links.delete(&link)?;
        }
        self.config = None;
        self.peers.clear();
        Ok(())
    }

    fn device(&mut self) -> io::Result<Link> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, format!("{DEVICE} is gone"));
        self.links.find(DEVICE)?.ok_or_else(gone)
    }

    fn try_tend(&mut self) -> anyhow::Result<()> {
        let Some(config) = self.config.clone() else { return Ok(()) };
        // Without its hooks a new device must not carry packets: only the next update makes one.
        self.device()?;
        self.mover.revive()?;
        let now = Instant::now();
        let mut changed = false;
        for (key, status) in self.mover.peers()? {
            if let Some(followed) = self.peers.get_mut(&key) {
                changed |= followed.observe(&status, now);
            }
        }
        if changed {
            let settings = self.settings(&config);
            self.mover.set(&settings)?;
        }
        Ok(())
    }
}

impl Tunnel for WireGuard {
    fn public_key(&self) -> PublicKey {
        self.public_key
    }

    fn prepare(&mut self, config: &TunnelConfig) -> Result<Device, TunnelError> {
        self.try_prepare(config).map_err(failed("prepare the tunnel"))?;
        Ok(Device { name: DEVICE.to_owned(), mtu: self.mtu })
    }

    fn complete(&mut self, config: Option<&TunnelConfig>) -> Result<(), TunnelError> {
        match config {
            Some(config) => self.try_complete(config).map_err(failed("complete the tunnel")),
            None => self.remove().map_err(failed("remove the tunnel")),
        }
    }

    fn tend(&mut self) -> Result<(), TunnelError> {
        self.try_tend().map_err(failed("keep the tunnel running"))
    }

    fn existing(&mut self) -> Option<Device> {
        let link = self.links.find(DEVICE).ok()?.filter(|link| backend_of(link).is_some())?;
        let mtu = u16::try_from(link.mtu).unwrap_or(u16::MAX);
        Some(Device { name: DEVICE.to_owned(), mtu })
    }

    fn status(&mut self) -> Option<TunnelStatus> {
        let config = self.config.as_ref()?;
        let now = self.mover.peers().unwrap_or_else(|error| {
            tracing::warn!(error = %Chain(error.as_ref()), "the tunnel does not say what it does");
            BTreeMap::new()
        });
        let peer = |(key, peer): (&PublicKey, &Peer)| {
            (peer.node.clone(), now.get(key).cloned().unwrap_or_default())
        };
        Some(TunnelStatus {
            network: config.network.clone(),
            backend: self.mover.backend(),
            reason: self.reason.clone(),
            device: Device { name: DEVICE.to_owned(), mtu: self.mtu },
            peers: config.peers.iter().map(peer).collect(),
        })
    }
}

impl Followed {
    fn new(peer: Peer, endpoint: Option<SocketAddr>) -> Self {
        Self { peer, endpoint, received_bytes: 0, sent_bytes: 0, unanswered: None }
    }

    /// Takes note of what a peer has done; moves on to its next endpoint if it should have answered by now.
    fn observe(&mut self, status: &PeerStatus, now: Instant) -> bool {
        let answered = status.received_bytes != self.received_bytes;
        let asked = status.sent_bytes != self.sent_bytes;
        self.received_bytes = status.received_bytes;
        self.sent_bytes = status.sent_bytes;
        if answered {
            self.unanswered = None;
            return false;
        }
        if asked && self.unanswered.is_none() {
            self.unanswered = Some(now);
        }
        let age = |then: SystemTime| then.elapsed().unwrap_or_default();
        let has_session = status.last_handshake.is_some_and(|then| age(then) < SESSION_AGE_MAX);
        let patience = if has_session { SILENCE_MAX } else { UNANSWERED_MAX };
        // Who has given up is not asked elsewhere.
        let give_up = asked && self.unanswered.is_some_and(|since| now - since >= patience);
        if !give_up {
            return false;
        }
        self.unanswered = Some(now);
        self.next_endpoint(status.endpoint)
    }

    fn next_endpoint(&mut self, now: Option<SocketAddr>) -> bool {
        let endpoints = &self.peer.endpoints;
        let current = self.endpoint.or(now);
        let at = endpoints.iter().position(|endpoint| Some(*endpoint) == current);
        let next = endpoints.get(at.map_or(0, |at| (at + 1) % endpoints.len())).copied();
        let changed = next.is_some() && next != self.endpoint;
        if changed {
            tracing::info!(node = %self.peer.node, ?next, "peer does not answer, trying another endpoint");
            self.endpoint = next;
        }
        changed
    }
}

/// A device that is there is taken over; else the kernel is tried.
fn choose(links: &mut Links) -> Result<(Backend, String), TunnelError> {
    let found = links.find(DEVICE).map_err(failed("look for the tunnel's device"))?;
    match found.as_ref().map(|link| (backend_of(link), link)) {
        Some((Some(backend), _)) => {
            return Ok((backend, "it moves the packets already".to_owned()));
        }
        Some((None, link)) => {
            let why = format!("a device {DEVICE} is there, and not ours: {:?}", link.kind);
            return Err(failed("take over the tunnel's device")(io::Error::other(why)));
        }
        None => {}
    }
    let tried = links.create_wireguard(DEVICE).and_then(|()| {
        let made = links.find(DEVICE)?;
        made.map_or(Ok(()), |link| links.delete(&link))
    });
    Ok(match tried {
        Ok(()) => (Backend::Kernel, "the kernel has WireGuard".to_owned()),
        Err(e) => (Backend::Engine, format!("the kernel has no WireGuard: {e}")),
    })
}

fn backend_of(link: &Link) -> Option<Backend> {
    match link.kind {
        Some(InfoKind::Wireguard) => Some(Backend::Kernel),
        Some(InfoKind::Tun) => Some(Backend::Engine),
        _ => None,
    }
}

fn failed<E>(what: &str) -> impl FnOnce(E) -> TunnelError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let what = what.to_owned();
    move |source| TunnelError { what, source: source.into() }
}

#[cfg(test)]
mod tests {
    use cnsmo_proto::model::{Addresses, Name};

    use super::*;

    fn followed(endpoints: &[&str]) -> Followed {
        let endpoints: Vec<_> = endpoints.iter().map(|e| e.parse().unwrap()).collect();
        let first = endpoints.first().copied();
        let node = Name::new("a").unwrap();
        Followed::new(Peer { node, addresses: Addresses::default(), endpoints }, first)
    }

    fn port(followed: &Followed) -> u16 {
        followed.endpoint.unwrap().port()
    }

    #[test]
    fn a_peer_that_never_answers_is_tried_everywhere_in_turn() {
        let mut peer = followed(&["1.1.1.1:1", "1.1.1.1:2", "1.1.1.1:3"]);
        let start = Instant::now();
        let mut ports = Vec::new();
        for second in 0..20 {
            let sent_bytes = 148 * (second / 5 + 1);
            let status = PeerStatus { sent_bytes, ..PeerStatus::default() };
            peer.observe(&status, start + Duration::from_secs(second));
            ports.push(port(&peer));
        }
        ports.dedup();
        assert_eq!(ports, [1, 2, 3, 1]);
    }

    #[test]
    fn a_peer_that_is_not_spoken_to_or_answers_stays() {
        let mut peer = followed(&["1.1.1.1:1", "1.1.1.1:2"]);
        let start = Instant::now();
        for second in 0..60 {
            let now = start + Duration::from_secs(second);
            assert!(!peer.observe(&PeerStatus::default(), now));
        }
        for second in 60..120 {
            let bytes = second * 100;
            let status =
                PeerStatus { sent_bytes: bytes, received_bytes: bytes, ..PeerStatus::default() };
            assert!(!peer.observe(&status, start + Duration::from_secs(second)));
        }
    }

    #[test]
    fn data_in_one_direction_is_no_silence() {
        let mut peer = followed(&["1.1.1.1:1", "1.1.1.1:2"]);
        let start = Instant::now();
        for second in 1..60 {
            let status = PeerStatus {
                last_handshake: Some(SystemTime::now()),
                sent_bytes: second * 1000,
                // Keepalives.
                received_bytes: second / 10 * 32,
                ..PeerStatus::default()
            };
            assert!(!peer.observe(&status, start + Duration::from_secs(second)));
        }
        let gone = |second| PeerStatus {
            last_handshake: Some(SystemTime::now()),
            sent_bytes: second * 1000,
            received_bytes: 160,
            ..PeerStatus::default()
        };
        let moved = (60..90)
            .find(|second| peer.observe(&gone(*second), start + Duration::from_secs(*second)));
        assert!(moved.is_some_and(|second| second >= 70), "{moved:?}");
        assert_eq!(port(&peer), 2);
    }
}
