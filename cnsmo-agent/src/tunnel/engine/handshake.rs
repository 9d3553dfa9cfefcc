//! Handshakes, apart from data: expensive, rare, and open to anybody who can send a datagram. And the timers, which start
//! them.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, PoisonError, atomic::Ordering, mpsc},
    thread,
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use cnsmo_proto::model::PublicKey;
use gotatun::{
    noise::{TunnResult, errors::WireGuardError, handshake::parse_handshake_anon},
    packet::{Packet, WgKind},
    tun::MtuWatcher,
};

use super::{Datagram, Drops, Engine, Peer, Session};

/// Messages that wait. About 0.1 s of work; what comes on top is lost, and sent again by who means it.
pub(super) const WAITING_MAX: usize = 1_024;
/// From here on only sources that prove that they are there are served (WireGuard, section 5.3).
const WAITING_UNDER_LOAD: usize = WAITING_MAX / 8;
/// The finest timer of the protocol has seconds.
const TICK: Duration = Duration::from_millis(250);

/// A datagram and its source.
pub(super) type Message = (SocketAddr, Datagram);

/// Leaves a message to the thread of handshakes.
pub(super) fn enqueue(engine: &Engine, from: SocketAddr, datagram: &[u8]) {
    engine.handshakes_waiting.fetch_add(1, Ordering::Relaxed);
    // Copied: the train's buffer must not be kept for so few bytes.
    if engine.handshakes.try_send((from, BytesMut::from(datagram))).is_err() {
        engine.handshakes_waiting.fetch_sub(1, Ordering::Relaxed);
        Drops::count(&engine.drops.handshake);
    }
}

/// Runs until nobody sends any more.
pub(super) fn run(engine: &Engine, messages: &mpsc::Receiver<Message>) -> io::Result<()> {
    while let Ok((from, datagram)) = messages.recv() {
        let waiting = engine.handshakes_waiting.fetch_sub(1, Ordering::Relaxed);
        let len = datagram.len() as u64;
        let limiter = if waiting > WAITING_UNDER_LOAD { &engine.strict } else { &*engine.limiter };
        match limiter.verify_packet(from, Packet::from_bytes(datagram)) {
            Ok(message) => handle(engine, from, message, len),
            Err(TunnResult::WriteToNetwork(cookie)) => send(engine, from, &[cookie.into()]),
            Err(_) => Drops::count(&engine.drops.handshake),
        }
    }
    Ok(())
}

fn handle(engine: &Engine, from: SocketAddr, message: WgKind, len: u64) {
    let peer = match &message {
        WgKind::HandshakeInit(init) => {
            let half = parse_handshake_anon(&engine.secret, &engine.public, init).ok();
            half.and_then(|half| {
                engine.table().peers.get(&PublicKey(half.peer_static_public)).cloned()
            })
        }
        WgKind::HandshakeResp(response) => engine.indices.peer(response.receiver_idx.get()),
        WgKind::CookieReply(reply) => engine.indices.peer(reply.receiver_idx.get()),
        WgKind::Data(_) => None,
    };
    match peer {
        Some(peer) => advance(engine, &peer, from, message, len),
        None => Drops::count(&engine.drops.handshake),
    }
}

fn advance(engine: &Engine, peer: &Arc<Peer>, from: SocketAddr, message: WgKind, len: u64) {
    let mut session = peer.lock();
    engine.wake(peer, &mut session);
    let reply = match session.tunn.handle_incoming_packet(message) {
        TunnResult::WriteToNetwork(reply) => reply,
        TunnResult::Err(_) => return Drops::count(&engine.drops.handshake),
        TunnResult::Done | TunnResult::WriteToTunnel(_) => return,
    };
    session.received_bytes += len;
    session.endpoint = Some(from);
    engine.indices.note(peer, &mut session, &reply);
    let mut replies = Vec::new();
    if matches!(reply, WgKind::Data(_)) {
        session.last_handshake = Some(SystemTime::now());
        replies.push(reply.into());
        replies.append(&mut queued(engine, &mut session));
    } else {
        session.unconfirmed = true;
        replies.push(reply.into());
    }
    session.sent_bytes += bytes(&replies);
    drop(session);
    send(engine, from, &replies);
}

/// What waited for the handshake, sealed.
pub(super) fn queued(engine: &Engine, session: &mut Session) -> Vec<Packet> {
    let mut mtu = MtuWatcher::new(engine.mtu.load(Ordering::Relaxed));
    session.tunn.get_queued_packets(&mut mtu).map(Into::into).collect()
}

/// Runs for ever. Only peers with a session or a handshake under way are looked at.
pub(super) fn run_timers(engine: &Engine) -> io::Result<()> {
    let mut awake = Vec::new();
    loop {
        pause(TICK);
        engine.limiter.try_reset_count();
        engine.strict.try_reset_count();
        awake.append(&mut engine.waking.lock().unwrap_or_else(PoisonError::into_inner));
        awake.retain(|peer| tick(engine, peer));
    }
}

/// Whether the peer's timers go on.
fn tick(engine: &Engine, peer: &Arc<Peer>) -> bool {
    let mut session = peer.lock();
    if session.removed {
        return false;
    }
    let message = match session.tunn.update_timers() {
        Ok(Some(message)) => message,
        Err(WireGuardError::ConnectionExpired) => {
            session.awake = false;
            return false;
        }
        Ok(None) | Err(_) => return true,
    };
    engine.indices.note(peer, &mut session, &message);
    let message = [message.into()];
    session.sent_bytes += bytes(&message);
    let endpoint = session.endpoint;
    drop(session);
    if let Some(endpoint) = endpoint {
        send(engine, endpoint, &message);
    }
    true
}

pub(super) fn send(engine: &Engine, to: SocketAddr, datagrams: &[Packet]) {
    let Some(udp) = engine.udp() else { return };
    for datagram in datagrams {
        udp.send(to, datagram, datagram.len());
    }
}

pub(super) fn bytes(datagrams: &[Packet]) -> u64 {
    datagrams.iter().map(|datagram| datagram.len() as u64).sum()
}

#[expect(
    clippy::disallowed_methods,
    reason = "a thread of its own, in a process without a runtime"
)]
pub(super) fn pause(time: Duration) {
    thread::sleep(time);
}
