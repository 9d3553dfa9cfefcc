//! Who is on the other end: by key, by address within the tunnel, by the index that a peer's packets carry.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::SystemTime,
};

use cnsmo_proto::model::PublicKey;
use gotatun::{
    noise::{Tunn, index_table::IndexTable, rate_limiter::RateLimiter},
    packet::WgKind,
};
use ipnet::IpNet;
use x25519_dalek::StaticSecret;

/// A peer of this tunnel.
pub(super) struct Peer {
    pub(super) key: PublicKey,
    state: Mutex<Session>,
}

/// What changes with packets. Held for a batch of packets, never across a system call.
pub(super) struct Session {
    pub(super) tunn: Tunn,
    /// Where packets go: the configured address until an authenticated packet comes from another one.
    pub(super) endpoint: Option<SocketAddr>,
    configured: Option<SocketAddr>,
    /// Its timers run.
    pub(super) awake: bool,
    /// It is no peer any more.
    pub(super) removed: bool,
    /// A handshake was answered, and nothing was received under the new keys yet.
    pub(super) unconfirmed: bool,
    pub(super) last_handshake: Option<SystemTime>,
    pub(super) received_bytes: u64,
    pub(super) sent_bytes: u64,
    /// Packets with a source address that is not this peer's.
    pub(super) foreign_sources: u64,
    /// Receiver indices that lead to this peer.
    indices: Vec<u32>,
}

impl Peer {
    pub(super) fn new(
        key: PublicKey,
        secret: StaticSecret,
        indices: IndexTable,
        limiter: Arc<RateLimiter>,
    ) -> Self {
        let tunn = Tunn::new(secret, key.0.into(), None, None, indices, limiter);
        let state = Session {
            tunn,
            endpoint: None,
            configured: None,
            awake: false,
            removed: false,
            unconfirmed: false,
            last_handshake: None,
            received_bytes: 0,
            sent_bytes: 0,
            foreign_sources: 0,
            indices: Vec::new(),
        };
        Self { key, state: Mutex::new(state) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Session> {
        // A panic ends the process.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A configured endpoint counts when it changes. Until then the peer may be where its packets come from.
    pub(super) fn configure(&self, endpoint: Option<SocketAddr>) {
        let mut session = self.lock();
        if session.configured != endpoint {
            session.configured = endpoint;
            session.endpoint = endpoint.or(session.endpoint);
        }
    }
}

/// Peers by key, and by longest prefix of an address in the tunnel. Replaced as a whole.
#[derive(Default)]
pub(super) struct Table {
    pub(super) peers: BTreeMap<PublicKey, Arc<Peer>>,
    /// By prefix length, the longest first. Mostly one of each family: an address of a VM.
    v4: Vec<(u8, HashMap<IpNet, Arc<Peer>>)>,
    v6: Vec<(u8, HashMap<IpNet, Arc<Peer>>)>,
}

impl Table {
    pub(super) fn insert(&mut self, peer: &Arc<Peer>, allowed: impl IntoIterator<Item = IpNet>) {
        self.peers.insert(peer.key, peer.clone());
        for net in allowed {
            let net = net.trunc();
            let lengths = if net.addr().is_ipv4() { &mut self.v4 } else { &mut self.v6 };
            let len = net.prefix_len();
            let at = lengths.partition_point(|(longer, _)| *longer > len);
            if lengths.get(at).is_none_or(|(there, _)| *there != len) {
                lengths.insert(at, (len, HashMap::new()));
            }
            lengths[at].1.insert(net, peer.clone());
        }
    }

    pub(super) fn route(&self, address: IpAddr) -> Option<&Arc<Peer>> {
        let lengths = if address.is_ipv4() { &self.v4 } else { &self.v6 };
        lengths.iter().find_map(|(len, nets)| {
            let net = IpNet::new(address, *len).ok()?.trunc();
            nets.get(&net)
        })
    }
}

/// Which peer a receiver index belongs to.
pub(super) struct Indices {
    /// Gives out the indices, and knows which are in use.
    table: IndexTable,
    peers: RwLock<HashMap<u32, Arc<Peer>>>,
}

impl Indices {
    pub(super) fn new() -> Self {
        Self { table: IndexTable::from_os_rng(), peers: RwLock::default() }
    }

    pub(super) fn table(&self) -> IndexTable {
        self.table.clone()
    }

    pub(super) fn peer(&self, index: u32) -> Option<Arc<Peer>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner).get(&index).cloned()
    }

    /// Notes the index in a handshake message that is about to be sent, and forgets those of ended sessions: a peer has
    /// as many as its state machine holds, about ten.
    pub(super) fn note(&self, peer: &Arc<Peer>, session: &mut Session, message: &WgKind) {
        let index = match message {
            WgKind::HandshakeInit(init) => init.sender_idx.get(),
            WgKind::HandshakeResp(response) => response.sender_idx.get(),
            WgKind::CookieReply(_) | WgKind::Data(_) => return,
        };
        if session.removed {
            return;
        }
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        session.indices.retain(|index| {
            let used = self.table.in_use(*index);
            if !used {
                peers.remove(index);
            }
            used
        });
        session.indices.push(index);
        peers.insert(index, peer.clone());
    }

    /// From now on nothing leads to `peer`.
    pub(super) fn forget(&self, peer: &Peer) {
        let mut session = peer.lock();
        session.removed = true;
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        for index in session.indices.drain(..) {
            peers.remove(&index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> Arc<Peer> {
        let public = x25519_dalek::PublicKey::from([9; 32]);
        let limiter = Arc::new(RateLimiter::new(&public, 1));
        let indices = IndexTable::from_os_rng();
        Arc::new(Peer::new(PublicKey([n; 32]), StaticSecret::from([n; 32]), indices, limiter))
    }

    #[test]
    fn the_longest_prefix_decides() {
        let mut table = Table::default();
        let nets = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "fd00::/16", "fd00::7/128"];
        for (n, net) in (1..).zip(nets) {
            table.insert(&peer(n), [net.parse().unwrap()]);
        }
        for (address, expected) in [
            ("10.9.9.9", Some(1)),
            ("10.1.9.9", Some(2)),
            ("10.1.2.3", Some(3)),
            ("11.0.0.1", None),
            ("fd00::1", Some(4)),
            ("fd00::7", Some(5)),
            ("fe80::1", None),
        ] {
            let found = table.route(address.parse().unwrap()).map(|peer| peer.key.0[0]);
            assert_eq!(found, expected, "{address}");
        }
    }

    #[test]
    fn an_endpoint_that_was_learned_stays_until_another_is_configured() {
        let peer = peer(1);
        let [first, roamed, second] =
            ["1.1.1.1:1", "2.2.2.2:2", "3.3.3.3:3"].map(|a| a.parse().ok());
        peer.configure(first);
        peer.lock().endpoint = roamed;
        peer.configure(first);
        assert_eq!(peer.lock().endpoint, roamed);
        peer.configure(second);
        assert_eq!(peer.lock().endpoint, second);
    }
}
