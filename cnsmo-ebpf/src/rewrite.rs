//! Changing packets: addresses, ports and checksums of translated flows, and the segment size that TCP's ends agree on.
//!
//! Checksums are corrected by what changed (RFC 1624) and never computed anew: that is right for a packet whose checksum
//! the device completes later, and for super-packets that the kernel cuts into segments later.

use cnsmo_common::control::Control;
use network_types::{icmp::Icmpv4Hdr, ip::Ipv6Hdr, tcp::TcpHdr};

use crate::{
    parse::{Family, Kind, TCP, UDP},
    tables::Case,
};

/// Bytes of the IP and TCP headers, which an MSS leaves out (RFC 9293, 3.7.1).
const HEADERS_V4: u32 = 40;
/// As `HEADERS_V4`.
const HEADERS_V6: u32 = 60;
/// Options of one segment: one per byte would fit, more than these are not looked at.
const OPTIONS_MAX: usize = 16;
const OPTION_END: u8 = 0;
const OPTION_NOTHING: u8 = 1;
const OPTION_MSS: u8 = 2;

/// A packet that can be changed. Offsets are from its first byte; `None` stands for one that is too short, or for want of
/// memory.
pub trait Rewrite {
    /// Copies `N` bytes.
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]>;
    /// Overwrites bytes for which a checksum in the packet makes up.
    fn write<const N: usize>(&self, at: usize, bytes: &[u8; N]) -> Option<()>;
    /// Overwrites bytes for which none does: IPv6 has no checksum of its header. Where a device has summed up the whole
    /// packet, that sum changes.
    fn write_unsummed<const N: usize>(&self, at: usize, bytes: &[u8; N]) -> Option<()>;
    /// What the sum of a packet's words gains if some bytes take the place of others; a multiple of four bytes.
    fn change<const N: usize>(&self, from: &[u8; N], to: &[u8; N]) -> u32;
    /// Corrects the checksum of an IPv4 header.
    fn correct_header(&self, at: usize, change: u32) -> Option<()>;
    /// Corrects another checksum.
    fn correct(&self, at: usize, change: u32, which: Checksum) -> Option<()>;
}

/// What a checksum covers, and how it stands for "none".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// What changed is in the pseudo-header: of a packet whose checksum the device completes, that part alone is in the
    /// field already.
    pub pseudo: bool,
    /// Zero: there is none (RFC 768).
    pub udp: bool,
}

/// Carries out what the case says. `None`: the packet cannot be changed and must not go on.
#[inline(always)]
pub fn rewrite<P: Rewrite, A: Family>(packet: &P, case: &Case<A>, control: &Control) -> Option<()> {
    if case.clamp {
        clamp(packet, case, control.tunnel_mtu)?;
    }
    if case.translate {
        translate(packet, case)?;
    }
    Some(())
}

/// Lowers the MSS option to what fits into the tunnel.
#[inline(never)]
fn clamp<P: Rewrite, A: Family>(packet: &P, case: &Case<A>, mtu: u32) -> Option<()> {
    let headers = if size_of::<A>() == 4 { HEADERS_V4 } else { HEADERS_V6 };
    let limit = mtu.saturating_sub(headers) as u16;
    let l4 = case.datagram.l4;
    let [offset, _] = packet.read::<2>(l4 + 12)?;
    let end = l4 + (offset >> 4) as usize * 4;
    let mut at = l4 + TcpHdr::LEN;
    for _ in 0..OPTIONS_MAX {
        if at + 4 > end {
            break;
        }
        let [kind, length, high, low] = packet.read::<4>(at)?;
        match kind {
            OPTION_END => break,
            OPTION_NOTHING => at += 1,
            OPTION_MSS => {
                let mss = u16::from_be_bytes([high, low]);
                if length == 4 && mss > limit {
                    packet.write(at + 2, &limit.to_be_bytes())?;
                    let odd = (at - l4) & 1 != 0;
                    let (from, to) = (word(mss, odd), word(limit, odd));
                    let sum = Checksum { pseudo: false, udp: false };
                    packet.correct(l4 + 16, fold(!from as u64 + to as u64), sum)?;
                }
                break;
            }
            _ if length < 2 => break,
            _ => at += length as usize,
        }
    }
    Some(())
}

/// A word as the checksum's sum takes it; at an odd offset it lies across two.
#[inline(always)]
fn word(value: u16, odd: bool) -> u16 {
    let bytes = value.to_be_bytes();
    let bytes = if odd { [bytes[1], bytes[0]] } else { bytes };
    u16::from_ne_bytes(bytes)
}

/// Gives the packet the addresses and ports that its flow has on the other side.
#[inline(never)]
fn translate<P: Rewrite, A: Family>(packet: &P, case: &Case<A>) -> Option<()> {
    let (to, d) = (&case.flow.translation, &case.datagram);
    let (src, dst) = if case.from_origin { (&to.src, &to.dst) } else { (&to.dst, &to.src) };
    let change = add(A::change(packet, &d.src, src), A::change(packet, &d.dst, dst));
    match d.kind {
        Kind::IcmpError => {
            quoted(packet, case)?;
            if size_of::<A>() != 4 {
                packet.correct(d.l4 + 2, change, Checksum { pseudo: true, udp: false })?;
            }
        }
        Kind::Later => {}
        _ => {
            let (sport, dport) =
                if case.from_origin { (to.sport, to.dport) } else { (to.dport, to.sport) };
            let at = d.l4 + if d.proto == TCP { 16 } else { 6 };
            let udp = d.proto == UDP;
            let ports = ports_change(d.sport, sport) + ports_change(d.dport, dport);
            packet.correct(at, change, Checksum { pseudo: true, udp })?;
            packet.correct(at, fold(ports), Checksum { pseudo: false, udp })?;
            packet.write(d.l4, &sport)?;
            packet.write(d.l4 + 2, &dport)?;
        }
    }
    A::write_ends(packet, case.l3, (src, dst), change, true)
}

/// Translates the packet that an error quotes, which travelled the other way. The checksum behind its ports stays: it is
/// often cut off, and nobody who gets an error looks at it.
#[inline(never)]
fn quoted<P: Rewrite, A: Family>(packet: &P, case: &Case<A>) -> Option<()> {
    let (to, l4) = (&case.flow.translation, case.datagram.l4);
    let (src, dst) = if case.from_origin { (&to.dst, &to.src) } else { (&to.src, &to.dst) };
    let (sport, dport) = if case.from_origin { (to.dport, to.sport) } else { (to.sport, to.dport) };
    let at = l4 + Icmpv4Hdr::LEN;
    let (ends, header) = A::read_ends(packet, at, (src, dst))?;
    let old = packet.read::<4>(at + header)?;
    packet.write(at + header, &sport)?;
    packet.write(at + header + 2, &dport)?;
    A::write_ends(packet, at, (src, dst), ends, false)?;
    let ports = fold(ports_change([old[0], old[1]], sport) + ports_change([old[2], old[3]], dport));
    // In IPv4 the quoted header's own checksum makes up for its addresses.
    let change = if size_of::<A>() == 4 { ports } else { add(ports, ends) };
    packet.correct(l4 + 2, change, Checksum { pseudo: false, udp: false })
}

/// One's complement sum of two sums.
#[inline(always)]
fn add(a: u32, b: u32) -> u32 {
    fold(a as u64 + b as u64)
}

#[inline(always)]
fn ports_change(from: [u8; 2], to: [u8; 2]) -> u64 {
    !u16::from_ne_bytes(from) as u64 + u16::from_ne_bytes(to) as u64
}

/// One's complement sum, as far as 32 bits hold it.
#[inline(always)]
fn fold(sum: u64) -> u32 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    ((sum >> 32) + (sum & 0xffff_ffff)) as u32
}

/// What differs between the address families in rewriting.
pub trait Ends: Sized {
    /// [`Rewrite::change`].
    fn change<P: Rewrite>(packet: &P, from: &Self, to: &Self) -> u32;
    /// What `ends` in place of source and destination change in the sum of the header at `l3`, and its length.
    fn read_ends<P: Rewrite>(packet: &P, l3: usize, ends: (&Self, &Self)) -> Option<(u32, usize)>;
    /// Overwrites source and destination in the header at `l3`, and corrects its checksum where it has one. `outside`: it
    /// is the packet's own header and not one that an error quotes.
    fn write_ends<P: Rewrite>(
        packet: &P,
        l3: usize,
        ends: (&Self, &Self),
        change: u32,
        outside: bool,
    ) -> Option<()>;
}

impl Ends for [u8; 4] {
    #[inline(always)]
    fn change<P: Rewrite>(packet: &P, from: &Self, to: &Self) -> u32 {
        packet.change(from, to)
    }
    #[inline(always)]
    fn read_ends<P: Rewrite>(
        packet: &P,
        l3: usize,
        (src, dst): (&Self, &Self),
    ) -> Option<(u32, usize)> {
        let [first, _] = packet.read::<2>(l3)?;
        let source = packet.change(&packet.read(l3 + 12)?, src);
        let destination = packet.change(&packet.read(l3 + 16)?, dst);
        Some((add(source, destination), (first & 0x0f) as usize * 4))
    }
    #[inline(always)]
    fn write_ends<P: Rewrite>(
        packet: &P,
        l3: usize,
        (src, dst): (&Self, &Self),
        change: u32,
        _: bool,
    ) -> Option<()> {
        packet.correct_header(l3 + 10, change)?;
        packet.write(l3 + 12, src)?;
        packet.write(l3 + 16, dst)
    }
}

impl Ends for [u8; 16] {
    #[inline(always)]
    fn change<P: Rewrite>(packet: &P, from: &Self, to: &Self) -> u32 {
        packet.change(from, to)
    }
    #[inline(always)]
    fn read_ends<P: Rewrite>(
        packet: &P,
        l3: usize,
        (src, dst): (&Self, &Self),
    ) -> Option<(u32, usize)> {
        let source = packet.change(&packet.read(l3 + 8)?, src);
        let destination = packet.change(&packet.read(l3 + 24)?, dst);
        Some((add(source, destination), Ipv6Hdr::LEN))
    }
    #[inline(always)]
    fn write_ends<P: Rewrite>(
        packet: &P,
        l3: usize,
        (src, dst): (&Self, &Self),
        _: u32,
        outside: bool,
    ) -> Option<()> {
        if outside {
            packet.write_unsummed(l3 + 8, src)?;
            return packet.write_unsummed(l3 + 24, dst);
        }
        packet.write(l3 + 8, src)?;
        packet.write(l3 + 24, dst)
    }
}
