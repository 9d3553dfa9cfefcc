//! From the network to the device: trains of datagrams (`UDP_GRO`) are opened in place, and merged.

use std::{
    io::{self, IoSliceMut},
    mem,
    net::SocketAddr,
    os::fd::AsFd as _,
    time::SystemTime,
};

use bytes::BytesMut;
use gotatun::{noise::TunnResult, packet::Packet};
use quinn_udp::RecvMeta;

use super::{
    Datagram, Drops, Engine, Peer, handshake, ip_header, merge::Merger, udp::Udp, wait_readable,
};

/// Trains of one receive.
const TRAINS: usize = 8;
/// The longest train: the kernel merges up to the length of one IP packet.
const TRAIN_BYTES_MAX: usize = 65_535;
/// Header and tag of a message that carries no data (WireGuard, section 5.4.6).
const DATA_LEN_MIN: usize = 32;

/// Runs until the socket fails.
pub(super) fn run(engine: &Engine) -> io::Result<()> {
    let mut inbound = Inbound {
        engine,
        sealed: Vec::new(),
        index: 0,
        plain: Vec::new(),
        merger: Merger::new(engine.tun.has_uso()),
    };
    let mut buffers: [BytesMut; TRAINS] = Default::default();
    loop {
        match engine.udp() {
            None => wait_readable(&[engine.rebound.as_fd()])?,
            Some(udp) => inbound.receive(&udp, &mut buffers)?,
        }
        // Empty unless the socket was replaced.
        let _ = engine.rebound.read();
    }
}

struct Inbound<'a> {
    engine: &'a Engine,
    /// Data messages that follow each other and carry the same index.
    sealed: Vec<Datagram>,
    index: u32,
    plain: Vec<BytesMut>,
    merger: Merger,
}

impl Inbound<'_> {
    fn receive(&mut self, udp: &Udp, buffers: &mut [BytesMut; TRAINS]) -> io::Result<()> {
        let mut meta = [RecvMeta::default(); TRAINS];
        let received = {
            let mut slices = buffers.each_mut().map(|buffer| {
                refill(buffer);
                IoSliceMut::new(buffer)
            });
            udp.receive(&mut slices, &mut meta)
        };
        let count = match received {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return wait_readable(&[udp.fd(), self.engine.rebound.as_fd()]);
            }
            // Errors of datagrams that were sent are reported here as well.
            Err(_) => return Ok(()),
        };
        for (buffer, meta) in buffers.iter_mut().zip(&meta[..count]) {
            self.train(buffer.split_to(meta.len), meta.stride.max(1), meta.addr);
        }
        // Nothing waits for the next receive.
        self.merger.flush(&mut &self.engine.tun);
        Ok(())
    }

    fn train(&mut self, mut train: BytesMut, stride: usize, from: SocketAddr) {
        while !train.is_empty() {
            let datagram = train.split_to(stride.min(train.len()));
            match datagram.first_chunk::<8>() {
                Some([4, 0, 0, 0, index @ ..]) if datagram.len() >= DATA_LEN_MIN => {
                    let index = u32::from_le_bytes(*index);
                    if index != self.index {
                        self.open(from);
                    }
                    self.index = index;
                    self.sealed.push(datagram);
                }
                Some([1..=3, 0, 0, 0, ..]) => handshake::enqueue(self.engine, from, &datagram),
                _ => Drops::count(&self.engine.drops.malformed),
            }
        }
        self.open(from);
    }

    /// Opens what was collected, under one lock of the peer, and passes it on.
    fn open(&mut self, from: SocketAddr) {
        if self.sealed.is_empty() {
            return;
        }
        let Some(peer) = self.engine.indices.peer(self.index) else {
            self.sealed.clear();
            return Drops::count(&self.engine.drops.unknown_index);
        };
        let mut session = peer.lock();
        let mut opened = false;
        for datagram in self.sealed.drain(..) {
            let len = datagram.len() as u64;
            let Ok(message) = Packet::from_bytes(datagram).try_into_wg() else { continue };
            match session.tunn.handle_incoming_packet(message) {
                TunnResult::WriteToTunnel(mut packet) => {
                    opened = true;
                    session.received_bytes += len;
                    if !packet.is_empty() {
                        self.plain.push(mem::take(packet.buf_mut()));
                    }
                }
                _ => Drops::count(&self.engine.drops.undecryptable),
            }
        }
        let mut queued = Vec::new();
        if opened {
            session.endpoint = Some(from);
            if mem::take(&mut session.unconfirmed) {
                session.last_handshake = Some(SystemTime::now());
                queued = handshake::queued(self.engine, &mut session);
                session.sent_bytes += handshake::bytes(&queued);
            }
        }
        drop(session);
        handshake::send(self.engine, from, &queued);
        self.pass(&peer);
    }

    fn pass(&mut self, peer: &Peer) {
        let table = self.engine.table();
        for mut packet in self.plain.drain(..) {
            let Some(ip) = ip_header(&packet).filter(|ip| ip.len <= packet.len()) else {
                Drops::count(&self.engine.drops.malformed);
                continue;
            };
            if table.route(ip.source).is_none_or(|owner| owner.key != peer.key) {
                peer.lock().foreign_sources += 1;
                Drops::count(&self.engine.drops.foreign_source);
                continue;
            }
            // The rest is padding.
            packet.truncate(ip.len);
            self.merger.push(packet, &mut &self.engine.tun);
        }
    }
}

/// Makes a buffer long again after its front was split off. Its memory is used again once all parts are gone.
fn refill(buffer: &mut BytesMut) {
    if buffer.len() >= TRAIN_BYTES_MAX {
        return;
    }
    buffer.clear();
    if !buffer.try_reclaim(TRAIN_BYTES_MAX) {
        *buffer = BytesMut::zeroed(TRAIN_BYTES_MAX);
        return;
    }
    // SAFETY: the capacity was just ensured. Each buffer was made by `zeroed` with this very length and never grew, so
    // all of its bytes are initialised.
    unsafe { buffer.set_len(TRAIN_BYTES_MAX) };
}
