//! The UDP socket of the tunnel, for both families where the kernel has IPv6.

use std::{
    io::{self, IoSliceMut},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt},
};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use socket2::{Domain, Socket, Type};

/// Of either direction. The default of 212 KiB loses bursts of 64 KiB.
const BUFFER_BYTES: usize = 7 << 20;
/// A full send buffer is waited for this long; then datagrams are lost, as in any network.
const SEND_WAIT_MS: u8 = 100;
/// Datagrams of one send: the limit of older kernels.
const SEGMENTS_MAX: usize = 64;
/// Payload of one send: an IP packet less the headers of IPv6 and UDP.
const SEND_BYTES_MAX: usize = 65_535 - 48;

/// See the module.
#[derive(Debug)]
pub(super) struct Udp {
    socket: Socket,
    state: UdpSocketState,
    /// Takes IPv4 addresses as mapped ones.
    dual: bool,
    port: u16,
}

impl Udp {
    pub(super) fn bind(port: u16) -> io::Result<Self> {
        let (socket, dual) = match Socket::new(Domain::IPV6, Type::DGRAM, None) {
            Ok(socket) => {
                socket.set_only_v6(false)?;
                (socket, true)
            }
            Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                (Socket::new(Domain::IPV4, Type::DGRAM, None)?, false)
            }
            Err(e) => return Err(e),
        };
        let any = |dual| match dual {
            true => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
            false => SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
        };
        socket.bind(&any(dual).into())?;
        // Beyond the limit of the VM; without the capability, up to it.
        if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
            socket.set_recv_buffer_size(BUFFER_BYTES)?;
        }
        if setsockopt(&socket, sockopt::SndBufForce, &BUFFER_BYTES).is_err() {
            socket.set_send_buffer_size(BUFFER_BYTES)?;
        }
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        allow_fragments(&socket, dual)?;
        Ok(Self { socket, state, dual, port })
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn receive(
        &self,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> io::Result<usize> {
        let count = self.state.recv(UdpSockRef::from(&self.socket), buffers, meta)?;
        for meta in &mut meta[..count] {
            meta.addr = SocketAddr::new(meta.addr.ip().to_canonical(), meta.addr.port());
        }
        Ok(count)
    }

    /// Sends datagrams that lie end to end, all of `segment` bytes but the last. What cannot be sent is lost.
    pub(super) fn send(&self, to: SocketAddr, contents: &[u8], segment: usize) {
        let destination = match to {
            SocketAddr::V4(to) if self.dual => (to.ip().to_ipv6_mapped(), to.port()).into(),
            to => to,
        };
        let whole = (contents.len() > segment).then_some(segment);
        if self.transmit(destination, contents, whole).is_err() && whole.is_some() {
            // The card has no segmentation, or a piece is longer than the path takes.
            for datagram in contents.chunks(segment) {
                let _ = self.transmit(destination, datagram, None);
            }
        }
    }

    fn transmit(
        &self,
        destination: SocketAddr,
        contents: &[u8],
        segment_size: Option<usize>,
    ) -> io::Result<()> {
        let transmit = Transmit { destination, ecn: None, contents, segment_size, src_ip: None };
        loop {
            match self.state.try_send(UdpSockRef::from(&self.socket), &transmit) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(self.fd(), PollFlags::POLLOUT)];
                    if poll(&mut fds, PollTimeout::from(SEND_WAIT_MS))? == 0 {
                        return Err(e);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

/// A path with a smaller MTU than the tunnel counts on shall be slow, not silent: as with the kernel's WireGuard.
fn allow_fragments(socket: &Socket, dual: bool) -> io::Result<()> {
    let set = |level, name, value: libc::c_int| {
        let len = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
        let value = (&raw const value).cast();
        // SAFETY: pointer and length are those of a live integer.
        match unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value, len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
    if dual {
        set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT)?;
        set(libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 0)?;
    }
    Ok(())
}

/// Datagrams for one peer, laid end to end until they are sent together (`UDP_SEGMENT`).
#[derive(Debug, Default)]
pub(super) struct Batch {
    to: Option<SocketAddr>,
    bytes: Vec<u8>,
    segment: usize,
    count: usize,
    /// A shorter datagram ended it.
    ended: bool,
}

impl Batch {
    /// Appends a datagram; sends what was there if this one cannot join it.
    pub(super) fn push(&mut self, udp: &Udp, to: SocketAddr, datagram: &[u8]) {
        let joins = self.to == Some(to)
            && !self.ended
            && datagram.len() <= self.segment
            && self.bytes.len() + datagram.len() <= SEND_BYTES_MAX
            && self.count < SEGMENTS_MAX.min(udp.state.max_gso_segments());
        if !joins {
            self.flush(udp);
            self.segment = datagram.len();
        }
        self.to = Some(to);
        self.bytes.extend_from_slice(datagram);
        self.ended = datagram.len() < self.segment;
        self.count += 1;
    }

    pub(super) fn flush(&mut self, udp: &Udp) {
        if let Some(to) = self.to.take() {
            udp.send(to, &self.bytes, self.segment);
        }
        self.bytes.clear();
        self.count = 0;
        self.ended = false;
    }
}
