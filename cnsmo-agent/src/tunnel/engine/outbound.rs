//! From the device to the network: cut, seal, send runs of datagrams together.

use std::{io, mem, os::fd::AsFd as _, sync::atomic::Ordering};

use bytes::BytesMut;
use gotatun::packet::Packet;

use super::{
    Drops, Engine,
    cut::Cutter,
    ip_header, tun,
    udp::Batch,
    vnet::{self, VnetHeader},
    wait_readable,
};

/// Runs until the device is gone.
///
/// What is ready is sent when the queue of the device is empty, so that latency is never traded for batches.
pub(super) fn run(engine: &Engine) -> io::Result<()> {
    let mut frame = vec![0; tun::FRAME_BYTES_MAX];
    let mut outbound = Outbound::default();
    loop {
        match engine.tun.read(&mut frame) {
            Ok(len) => outbound.packet(engine, &mut frame[..len]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if let Some(udp) = engine.udp() {
                    outbound.batch.flush(&udp);
                }
                wait_readable(&[engine.tun.fd().as_fd()])?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // The device was removed.
            Err(e) if e.raw_os_error() == Some(libc::EBADFD) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

#[derive(Default)]
struct Outbound {
    cutter: Cutter,
    pieces: Vec<BytesMut>,
    sealed: Vec<Packet>,
    batch: Batch,
}

impl Outbound {
    fn packet(&mut self, engine: &Engine, frame: &mut [u8]) {
        let Some((header, packet)) = frame.split_first_chunk_mut::<{ vnet::LEN }>() else {
            return Drops::count(&engine.drops.malformed);
        };
        let Some(ip) = ip_header(packet) else {
            return Drops::count(&engine.drops.malformed);
        };
        let table = engine.table();
        let Some(peer) = table.route(ip.destination) else {
            return Drops::count(&engine.drops.no_peer);
        };
        let mtu = engine.mtu.load(Ordering::Relaxed);
        let cut = self.cutter.cut(&VnetHeader::parse(header), packet, mtu, &mut self.pieces);
        if cut.is_err() {
            self.pieces.clear();
            return Drops::count(&engine.drops.malformed);
        }
        let mut session = peer.lock();
        let Some(endpoint) = session.endpoint else {
            self.pieces.clear();
            return Drops::count(&engine.drops.no_endpoint);
        };
        engine.wake(peer, &mut session);
        for piece in self.pieces.drain(..) {
            match session.tunn.encapsulate_with_session(Packet::from_bytes(piece)) {
                Ok(data) => self.sealed.push(data.into_bytes()),
                // It waits, together with at most 255 others, until the handshake is done.
                Err(piece) => {
                    if let Some(message) = session.tunn.handle_outgoing_packet(piece, None) {
                        engine.indices.note(peer, &mut session, &message);
                        self.sealed.push(message.into());
                    }
                }
            }
        }
        session.sent_bytes += self.sealed.iter().map(|sealed| sealed.len() as u64).sum::<u64>();
        drop(session);
        let sealed = mem::take(&mut self.sealed);
        if let Some(udp) = engine.udp() {
            for datagram in &sealed {
                self.batch.push(&udp, endpoint, datagram);
            }
        }
        self.sealed = sealed;
        self.sealed.clear();
    }
}
