//! What a sender is told when a rule rejects its packet: TCP by RST, everything else by ICMP "port unreachable".
//!
//! The data path drops the packet and hands its headers over; the answer is made and sent here. Without an agent rejected
//! packets are dropped silently, and a flood is answered no more often than the data path has a budget for.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsRawFd as _, OwnedFd},
};

use cnsmo_common::record::{ANSWER_MARK, Record};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto,
    setsockopt, socket, sockopt,
};

const ICMP: u8 = 1;
const TCP: u8 = 6;
const ICMPV6: u8 = 58;

const SYN: u8 = 2;
const FIN: u8 = 1;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Of the answers themselves.
const TTL: u8 = 64;
/// Bytes behind the IP header that an error quotes: what RFC 792 asks for.
const QUOTED: usize = 8;

/// One packet, IP header first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whom it is for.
    pub to: IpAddr,
    /// The packet.
    pub packet: Vec<u8>,
}

/// The answer to a packet; `None`: there is none (RFC 1122, section 3.2.2; RFC 4443, section 2.4; RFC 9293, section 3.10.7).
pub fn answer(record: &Record) -> Option<Answer> {
    let (src, dst) = ends(record);
    let is_one_host = |address: IpAddr| match address {
        IpAddr::V4(v4) => !v4.is_multicast() && !v4.is_broadcast() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_multicast() && !v6.is_unspecified(),
    };
    if !is_one_host(src) || !is_one_host(dst) || !begins_l4(record) {
        return None;
    }
    let (proto, body) = match (record.proto, src) {
        (TCP, _) => (TCP, reset(record)?),
        // Never about an error.
        (ICMP, IpAddr::V4(_)) if matches!(record.l4[0], 3 | 4 | 5 | 11 | 12) => return None,
        (ICMPV6, IpAddr::V6(_)) if record.l4[0] < 128 => return None,
        (_, IpAddr::V4(_)) => (ICMP, unreachable([3, 3], record)),
        (_, IpAddr::V6(_)) => (ICMPV6, unreachable([1, 4], record)),
    };
    Some(Answer { to: src, packet: packet(dst, src, proto, body) })
}

/// Source and destination.
pub(super) fn ends(record: &Record) -> (IpAddr, IpAddr) {
    let l3 = &record.l3;
    if record.family == 4 {
        let at = |at: usize| Ipv4Addr::new(l3[at], l3[at + 1], l3[at + 2], l3[at + 3]).into();
        (at(12), at(16))
    } else {
        let at = |at: usize| {
            let mut address = [0; 16];
            address.copy_from_slice(&l3[at..at + 16]);
            Ipv6Addr::from(address).into()
        };
        (at(8), at(24))
    }
}

/// Whether the record's L4 header is known to be behind its IP header: a later fragment has none, and of extension
/// headers the record does not tell.
fn begins_l4(record: &Record) -> bool {
    if record.family == 4 {
        record.l3[6] & 0x1f == 0 && record.l3[7] == 0
    } else {
        record.l3[6] == record.proto
    }
}

fn reset(record: &Record) -> Option<Vec<u8>> {
    let l4 = &record.l4;
    let word = |at: usize| u32::from_be_bytes([l4[at], l4[at + 1], l4[at + 2], l4[at + 3]]);
    let (seq, ack, flags) = (word(4), word(8), l4[13]);
    if flags & RST != 0 {
        return None;
    }
    let (seq, ack, flags) = if flags & ACK != 0 {
        (ack, 0, RST)
    } else {
        let of_flag = |flag| u32::from(flags & flag != 0);
        let length = payload(record).saturating_sub(usize::from(l4[12] >> 4) * 4) as u32;
        (0, seq.wrapping_add(length + of_flag(SYN) + of_flag(FIN)), RST | ACK)
    };
    let mut tcp = vec![l4[2], l4[3], l4[0], l4[1]];
    tcp.extend(seq.to_be_bytes());
    tcp.extend(ack.to_be_bytes());
    // Five words of header; no window, checksum, urgent pointer.
    tcp.extend([5 << 4, flags, 0, 0, 0, 0, 0, 0]);
    Some(tcp)
}

/// Bytes behind the IP header.
fn payload(record: &Record) -> usize {
    let l3 = &record.l3;
    if record.family == 4 {
        let total = usize::from(u16::from_be_bytes([l3[2], l3[3]]));
        total.saturating_sub(usize::from(l3[0] & 15) * 4)
    } else {
        u16::from_be_bytes([l3[4], l3[5]]).into()
    }
}

fn unreachable([kind, code]: [u8; 2], record: &Record) -> Vec<u8> {
    let mut icmp = vec![kind, code, 0, 0, 0, 0, 0, 0];
    let header = icmp.len();
    icmp.extend(if record.family == 4 { &record.l3[..20] } else { &record.l3[..40] });
    if record.family == 4 {
        // The options are not quoted.
        icmp[header] = 0x45;
    }
    icmp.extend(&record.l4[..QUOTED]);
    icmp
}

/// With the checksum at the place where `proto` has it.
fn packet(from: IpAddr, to: IpAddr, proto: u8, mut body: Vec<u8>) -> Vec<u8> {
    let length = body.len() as u16;
    let mut sum = 0_u64;
    let mut add = |bytes: &[u8]| {
        for pair in bytes.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    };
    add(&body);
    if proto != ICMP {
        match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                add(&from.octets());
                add(&to.octets());
            }
            (from, to) => {
                add(&v6(from).octets());
                add(&v6(to).octets());
            }
        }
        add(&[0, proto]);
        add(&length.to_be_bytes());
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    let at = if proto == TCP { 16 } else { 2 };
    body[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());

    let mut packet = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let [high, low] = (length + 20).to_be_bytes();
            // Not to be fragmented; the kernel sets identification and checksum.
            let mut header = vec![0x45, 0, high, low, 0, 0, 0x40, 0, TTL, proto, 0, 0];
            header.extend(from.octets());
            header.extend(to.octets());
            header
        }
        (from, to) => {
            let [high, low] = length.to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, high, low, proto, TTL];
            header.extend(v6(from).octets());
            header.extend(v6(to).octets());
            header
        }
    };
    packet.append(&mut body);
    packet
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// Raw sockets with the mark that lets answers leave.
pub struct Answers {
    v4: OwnedFd,
    /// `None`: this VM has no IPv6.
    v6: Option<OwnedFd>,
}

impl Answers {
    /// Of the network namespace that the calling thread is in.
    pub fn open() -> io::Result<Self> {
        let open = |family| -> nix::Result<OwnedFd> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let fd = socket(family, SockType::Raw, flags, SockProtocol::Raw)?;
            setsockopt(&fd, sockopt::Mark, &ANSWER_MARK)?;
            Ok(fd)
        };
        let v6 = match open(AddressFamily::Inet6) {
            Err(nix::errno::Errno::EAFNOSUPPORT) => None,
            opened => Some(opened?),
        };
        Ok(Self { v4: open(AddressFamily::Inet)?, v6 })
    }

    /// Sends the answer; `ifindex`: where the packet came in, or 0. What cannot be sent is lost, as any packet may be.
    pub fn send(&self, answer: &Answer, ifindex: u32) -> io::Result<()> {
        let Answer { to, packet } = answer;
        let flags = MsgFlags::empty();
        let sent = match SocketAddr::new(*to, 0) {
            SocketAddr::V4(to) => sendto(
                self.v4.as_raw_fd(),
                packet,
                &SockaddrIn::from(SocketAddrV4::new(*to.ip(), 0)),
                flags,
            ),
            SocketAddr::V6(to) => {
                let Some(socket) = &self.v6 else { return Ok(()) };
                let scope = if to.ip().is_unicast_link_local() { ifindex } else { 0 };
                let to = SocketAddrV6::new(*to.ip(), 0, 0, scope);
                sendto(socket.as_raw_fd(), packet, &SockaddrIn6::from(to), flags)
            }
        };
        sent.map(drop).map_err(io::Error::from)
    }
}

#[cfg(test)]
mod tests {
    use cnsmo_common::record::why;

    use super::*;

    const CLIENT: [u8; 4] = [192, 0, 2, 1];
    const SERVER: [u8; 4] = [192, 0, 2, 2];

    fn record(family: u8, proto: u8, l4: &[u8], payload: u16) -> Record {
        let mut l3 = [0; 40];
        if family == 4 {
            l3[0] = 0x45;
            l3[2..4].copy_from_slice(&(payload + 20).to_be_bytes());
            l3[9] = proto;
            l3[12..16].copy_from_slice(&CLIENT);
            l3[16..20].copy_from_slice(&SERVER);
        } else {
            l3[0] = 0x60;
            l3[4..6].copy_from_slice(&payload.to_be_bytes());
            l3[6] = proto;
            l3[8..24].copy_from_slice(&"2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
            l3[24..40].copy_from_slice(&"2001:db8::2".parse::<Ipv6Addr>().unwrap().octets());
        }
        let mut start = [0; 16];
        let n = l4.len().min(16);
        start[..n].copy_from_slice(&l4[..n]);
        Record {
            time: 0,
            l3,
            l4: start,
            slot: 0,
            generation: 0,
            length: 0,
            ifindex: 0,
            family,
            proto,
            direction: 0,
            zone: 0,
            outcome: 0,
            why: why::ANSWER,
            pad: [0; 2],
        }
    }

    fn segment(flags: u8) -> Vec<u8> {
        let mut tcp = vec![0x0f, 0xa0, 0, 80];
        tcp.extend(1_000_u32.to_be_bytes());
        tcp.extend(7_000_u32.to_be_bytes());
        tcp.extend([5 << 4, flags, 0, 0]);
        tcp
    }

    /// One's complement sum over what the checksum covers; right if it is all ones.
    fn sum(packet: &[u8], family: u8, proto: u8) -> u16 {
        let (header, pseudo) =
            if family == 4 { (20, &packet[12..20]) } else { (40, &packet[8..40]) };
        let body = &packet[header..];
        let words = |bytes: &[u8]| -> u32 {
            bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum()
        };
        let mut sum = words(body);
        if proto != ICMP {
            sum += words(pseudo) + u32::from(proto) + body.len() as u32;
        }
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    #[test]
    fn a_syn_is_answered_as_by_a_closed_port() {
        for family in [4, 6] {
            let answer = answer(&record(family, TCP, &segment(SYN), 20)).unwrap();
            let l4 = &answer.packet[if family == 4 { 20 } else { 40 }..];
            assert_eq!(l4[..4], [0, 80, 0x0f, 0xa0]);
            assert_eq!((&l4[4..8], &l4[8..12]), (&[0; 4][..], &1_001_u32.to_be_bytes()[..]));
            assert_eq!((l4[13], l4.len()), (RST | ACK, 20));
            assert_eq!(sum(&answer.packet, family, TCP), 0xffff);
            let to = if family == 4 { "192.0.2.1" } else { "2001:db8::1" };
            assert_eq!(answer.to, to.parse::<IpAddr>().unwrap());
        }
    }

    #[test]
    fn a_segment_of_a_connection_is_reset_where_it_expects_it() {
        let l4 = |flags, payload| {
            let answer = answer(&record(4, TCP, &segment(flags), payload)).unwrap();
            answer.packet[20..].to_vec()
        };
        let with_ack = l4(ACK, 120);
        assert_eq!((&with_ack[4..8], with_ack[13]), (&7_000_u32.to_be_bytes()[..], RST));
        let without = l4(SYN | FIN, 120);
        assert_eq!((&without[8..12], without[13]), (&1_102_u32.to_be_bytes()[..], RST | ACK));
        assert_eq!(answer(&record(4, TCP, &segment(RST), 20)), None);
    }

    #[test]
    fn everything_else_is_told_that_the_port_is_unreachable() {
        let datagram = [0x0f, 0xa0, 0, 53, 0, 20, 1, 2];
        for (family, kind, header) in [(4, [3, 3], 20), (6, [1, 4], 40)] {
            let record = record(family, 17, &datagram, 20);
            let answer = answer(&record).unwrap();
            let icmp = &answer.packet[header..];
            assert_eq!(icmp[..2], kind);
            assert_eq!(icmp[8..8 + header], record.l3[..header]);
            assert_eq!(icmp[8 + header..], datagram);
            let proto = if family == 4 { ICMP } else { ICMPV6 };
            assert_eq!(sum(&answer.packet, family, proto), 0xffff);
        }
        let echo = [8, 0, 0, 0, 0, 1, 0, 1];
        assert_eq!(answer(&record(4, ICMP, &echo, 8)).unwrap().packet[20..22], [3, 3]);
    }

    #[test]
    fn nobody_is_told_about_errors_fragments_and_groups() {
        for (family, proto, kind) in [(4, ICMP, 3), (4, ICMP, 11), (6, ICMPV6, 1), (6, ICMPV6, 2)] {
            assert_eq!(answer(&record(family, proto, &[kind, 0, 0, 0, 0, 0, 0, 0], 8)), None);
        }
        let mut later = record(4, 17, &[], 100);
        later.l3[7] = 1;
        assert_eq!(answer(&later), None);
        let mut chained = record(6, 17, &[0; 8], 100);
        chained.l3[6] = 0;
        assert_eq!(answer(&chained), None);
        for place in [12, 16] {
            for address in [[224, 0, 0, 1], [255; 4], [0; 4]] {
                let mut group = record(4, 17, &[0; 8], 8);
                group.l3[place..place + 4].copy_from_slice(&address);
                assert_eq!(answer(&group), None);
            }
        }
    }
}
