//! Ethernet, VLAN, IPv4, IPv6 with extension headers, TCP, UDP, SCTP, ICMP, ICMPv6: one pass, no allocation.
//!
//! Lengths are compared with the frame as far as a decision rests on them; checksums are left to the kernel, which
//! drops what fails them whatever we decide.

use cnsmo_common::{
    balance::Backend,
    control::{Control, switch},
    flow::Address,
    stat::Reason,
};
use network_types::{
    eth::EthHdr,
    icmp::{Icmpv4Hdr, Icmpv6Hdr},
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    sctp::SctpHdr,
    tcp::TcpHdr,
    udp::UdpHdr,
    vlan::VlanHdr,
};

use crate::{packet::Packet, rewrite::Ends};

/// 802.1ad outer and 802.1Q inner tag.
const TAGS_MAX: usize = 2;
/// Links of a chain: RFC 8200 orders six extension headers (destination options twice), then comes what they carry.
const CHAIN_MAX: usize = 7;
/// In units of 8 bytes: no first fragment's headers reach further into the datagram.
const CHAIN_END: u16 = 32;

const ETH_IPV4: [u8; 2] = [0x08, 0x00];
const ETH_ARP: [u8; 2] = [0x08, 0x06];
const ETH_IPV6: [u8; 2] = [0x86, 0xdd];
const ETH_VLAN: [u8; 2] = [0x81, 0x00];
const ETH_QINQ: [u8; 2] = [0x88, 0xa8];

const HOP_BY_HOP: u8 = IpProto::HopOpt as u8;
const ROUTING: u8 = IpProto::Ipv6Route as u8;
const FRAGMENT: u8 = IpProto::Ipv6Frag as u8;
const AUTHENTICATION: u8 = IpProto::Ah as u8;
const DESTINATION: u8 = IpProto::Ipv6Opts as u8;

/// TCP.
pub const TCP: u8 = IpProto::Tcp as u8;
/// UDP.
pub const UDP: u8 = IpProto::Udp as u8;
/// ICMP for IPv4.
pub const ICMP: u8 = IpProto::Icmp as u8;
/// ICMP for IPv6.
pub const ICMPV6: u8 = IpProto::Ipv6Icmp as u8;
const SCTP: u8 = IpProto::Sctp as u8;

/// Bits of the TCP flags byte.
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 2;
    /// Reset.
    pub const RST: u8 = 4;
    /// Acknowledgment field is significant.
    pub const ACK: u8 = 16;
}

/// What a frame carries, and at which offset.
pub enum Carried {
    /// IPv4.
    V4(usize),
    /// IPv6.
    V6(usize),
    /// ARP: the network does not work without it.
    Arp,
    /// Anything else.
    NotIp,
}

/// What kind of packet it is for connection tracking.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// TCP.
    #[default]
    Tcp,
    /// UDP, SCTP, and protocols without ports: a flow by addresses and ports, without flags.
    Datagram,
    /// ICMP or ICMPv6 echo request.
    EchoRequest,
    /// ICMP or ICMPv6 echo reply.
    EchoReply,
    /// An ICMP error: belongs to the flow of the packet that it quotes.
    IcmpError,
    /// Other ICMP: judged by the rules alone.
    Icmp,
    /// A fragment other than the first: has no L4 header.
    Later,
}

/// One IP packet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Datagram<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Protocol of the L4 header.
    pub proto: u8,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// Kind.
    pub kind: Kind,
    /// Source port, or the identifier of an echo; else zero.
    pub sport: [u8; 2],
    /// Destination port; else zero.
    pub dport: [u8; 2],
    /// ICMP type and code.
    pub icmp: [u8; 2],
    /// TCP flags.
    pub flags: u8,
    /// Offset of the L4 header in the frame.
    pub l4: usize,
    /// It is a fragment, the first or a later one.
    pub fragmented: bool,
    /// Identification of the fragmented datagram; of IPv4 in the last two bytes.
    pub fragment_id: [u8; 4],
    /// Protocol that the fragments of one datagram share.
    pub fragment_proto: u8,
}

/// `L3` is the offset of the IP header: 14 on Ethernet, where tags may follow, 0 on tunnel devices.
#[inline(always)]
pub fn frame<P: Packet + ?Sized, const L3: usize>(packet: &P) -> Result<Carried, Reason> {
    if L3 == 0 {
        let [first, _] = packet.load::<2>(0).ok_or(Reason::Malformed)?;
        return Ok(match first >> 4 {
            4 => Carried::V4(0),
            6 => Carried::V6(0),
            _ => Carried::NotIp,
        });
    }
    let mut at = EthHdr::LEN;
    let mut ether_type = packet.load::<2>(at - 2).ok_or(Reason::Malformed)?;
    for _ in 0..TAGS_MAX {
        if ether_type != ETH_VLAN && ether_type != ETH_QINQ {
            break;
        }
        ether_type = packet.load::<2>(at + 2).ok_or(Reason::Malformed)?;
        at += VlanHdr::LEN;
    }
    match ether_type {
        ETH_IPV4 => Ok(Carried::V4(at)),
        ETH_IPV6 => Ok(Carried::V6(at)),
        ETH_ARP => Ok(Carried::Arp),
        ETH_VLAN | ETH_QINQ => Err(Reason::Malformed),
        _ => Ok(Carried::NotIp),
    }
}

/// What differs between the address families in parsing.
pub trait Family: Address + Default + Ends {
    /// Protocol number of the family's ICMP. The other one's is no ICMP here: no stack takes it for that.
    const ICMP: u8;

    /// Reads the packet at offset `l3` into `into`.
    fn parse<P: Packet + ?Sized>(
        packet: &P,
        l3: usize,
        into: &mut Datagram<Self>,
    ) -> Result<(), Reason>;

    /// Reads the packet that an ICMP error quotes, at offset `at`; `None` if it cannot be matched to a flow.
    fn quoted<P: Packet + ?Sized>(packet: &P, at: usize) -> Option<Quoted<Self>>;

    /// Address of a backend; zeros: it has none.
    fn of_backend(backend: &Backend) -> Self;

    /// Address of this VM in the network; zeros: it has none.
    fn own(control: &Control) -> Self;

    /// Whether it is an address of the network.
    fn is_in_network(self, control: &Control) -> bool;
}

impl Family for [u8; 4] {
    const ICMP: u8 = ICMP;

    #[inline(always)]
    fn parse<P: Packet + ?Sized>(
        packet: &P,
        l3: usize,
        into: &mut Datagram<Self>,
    ) -> Result<(), Reason> {
        ipv4(packet, l3, into)
    }
    #[inline(always)]
    fn quoted<P: Packet + ?Sized>(packet: &P, at: usize) -> Option<Quoted<Self>> {
        quoted_v4(packet, at)
    }
    #[inline(always)]
    fn of_backend(backend: &Backend) -> Self {
        backend.v4
    }
    #[inline(always)]
    fn own(control: &Control) -> Self {
        control.own_v4
    }
    #[inline(always)]
    fn is_in_network(self, control: &Control) -> bool {
        let ([_, bits], [address, mask]) = (self.halves(), control.prefix_v4);
        control.switches & switch::PREFIX_V4 != 0 && bits & mask == address
    }
}

impl Family for [u8; 16] {
    const ICMP: u8 = ICMPV6;

    #[inline(always)]
    fn parse<P: Packet + ?Sized>(
        packet: &P,
        l3: usize,
        into: &mut Datagram<Self>,
    ) -> Result<(), Reason> {
        ipv6(packet, l3, into)
    }
    #[inline(always)]
    fn quoted<P: Packet + ?Sized>(packet: &P, at: usize) -> Option<Quoted<Self>> {
        quoted_v6(packet, at)
    }
    #[inline(always)]
    fn of_backend(backend: &Backend) -> Self {
        backend.v6
    }
    #[inline(always)]
    fn own(control: &Control) -> Self {
        control.own_v6
    }
    #[inline(always)]
    fn is_in_network(self, control: &Control) -> bool {
        let (bits, [address, mask]) = (self.halves(), control.prefix_v6);
        control.switches & switch::PREFIX_V6 != 0
            && bits[0] & mask[0] == address[0]
            && bits[1] & mask[1] == address[1]
    }
}

/// RFC 791.
#[inline(always)]
fn ipv4<P: Packet + ?Sized>(
    packet: &P,
    l3: usize,
    into: &mut Datagram<[u8; 4]>,
) -> Result<(), Reason> {
    let h = packet.load::<12>(l3).ok_or(Reason::Malformed)?;
    let header = ((h[0] & 0x0f) as usize) * 4;
    let total = u16::from_be_bytes([h[2], h[3]]) as usize;
    let in_frame = packet.length().wrapping_sub(l3);
    // A locally made super-packet above 64 KB says 0; from outside the kernel takes it for too short.
    let total = if total == 0 { in_frame } else { total };
    if h[0] >> 4 != 4 || header < Ipv4Hdr::LEN || total < header || total > in_frame {
        return Err(Reason::Malformed);
    }
    let fragment = u16::from_be_bytes([h[6], h[7]]);
    let (offset, more) = (fragment & 0x1fff, fragment & 0x2000 != 0);
    into.src = packet.load::<4>(l3 + 12).ok_or(Reason::Malformed)?;
    into.dst = packet.load::<4>(l3 + 16).ok_or(Reason::Malformed)?;
    into.proto = h[9];
    into.hop_limit = h[8];
    into.fragmented = more || offset != 0;
    into.fragment_id = [0, 0, h[4], h[5]];
    into.fragment_proto = h[9];
    if offset != 0 {
        return later(into, offset);
    }
    transport(packet, l3 + header, into, total - header)
}

/// RFC 8200.
#[inline(always)]
fn ipv6<P: Packet + ?Sized>(
    packet: &P,
    l3: usize,
    into: &mut Datagram<[u8; 16]>,
) -> Result<(), Reason> {
    let h = packet.load::<8>(l3).ok_or(Reason::Malformed)?;
    let payload = u16::from_be_bytes([h[4], h[5]]) as usize;
    let in_frame = packet.length().wrapping_sub(l3 + Ipv6Hdr::LEN);
    let payload = if payload == 0 { in_frame } else { payload };
    if h[0] >> 4 != 6 || payload > in_frame {
        return Err(Reason::Malformed);
    }
    into.src = packet.load::<16>(l3 + 8).ok_or(Reason::Malformed)?;
    into.dst = packet.load::<16>(l3 + 24).ok_or(Reason::Malformed)?;
    into.hop_limit = h[7];
    into.fragmented = false;
    let (mut proto, mut at, mut left) = (h[6], l3 + Ipv6Hdr::LEN, payload);
    for _ in 0..CHAIN_MAX {
        if !is_extension(proto) {
            into.proto = proto;
            return transport(packet, at, into, left);
        }
        let e = packet.load::<8>(at).ok_or(Reason::Malformed)?;
        let bytes = match proto {
            FRAGMENT => 8,
            AUTHENTICATION => (e[1] as usize + 2) * 4,
            ROUTING if e[2] == 0 => return Err(Reason::ExtensionHeaders),
            _ => (e[1] as usize + 1) * 8,
        };
        if bytes > left {
            return Err(Reason::Malformed);
        }
        if proto == FRAGMENT {
            let field = u16::from_be_bytes([e[2], e[3]]);
            let (offset, more) = (field >> 3, field & 1 != 0);
            // Neither: an atomic fragment (RFC 6946), a whole datagram.
            into.fragmented = more || offset != 0;
            into.fragment_id = [e[4], e[5], e[6], e[7]];
            into.fragment_proto = e[0];
            if offset != 0 {
                into.proto = e[0];
                return later(into, offset);
            }
        }
        proto = e[0];
        at += bytes;
        left -= bytes;
    }
    Err(Reason::ExtensionHeaders)
}

#[inline(always)]
fn is_extension(proto: u8) -> bool {
    matches!(proto, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION)
}

/// A fragment other than the first; `offset` in units of 8 bytes.
#[inline(always)]
fn later<A: Address>(into: &mut Datagram<A>, offset: u16) -> Result<(), Reason> {
    // Would overwrite the flags that the first fragment was judged by. Behind extension headers they lie further in.
    let overwrites = match into.proto {
        TCP => offset == 1,
        proto => is_extension(proto) && offset < CHAIN_END,
    };
    if overwrites {
        return Err(Reason::FragmentTiny);
    }
    into.kind = Kind::Later;
    Ok(())
}

/// `left`: bytes of the IP payload from the L4 header at `l4` on.
#[inline(always)]
fn transport<P: Packet + ?Sized, A: Family>(
    packet: &P,
    l4: usize,
    into: &mut Datagram<A>,
    left: usize,
) -> Result<(), Reason> {
    into.l4 = l4;
    into.flags = 0;
    into.icmp = [0; 2];
    into.sport = [0; 2];
    into.dport = [0; 2];
    into.kind = Kind::Datagram;
    let short = if into.fragmented { Reason::FragmentTiny } else { Reason::Malformed };
    let needed = match into.proto {
        TCP => TcpHdr::LEN,
        UDP => UdpHdr::LEN,
        SCTP => SctpHdr::LEN,
        proto if proto == A::ICMP => Icmpv4Hdr::LEN,
        _ => return Ok(()),
    };
    if left < needed {
        return Err(short);
    }
    let h = packet.load::<8>(l4).ok_or(short)?;
    match into.proto {
        TCP => {
            let [offset, flags] = packet.load::<2>(l4 + 12).ok_or(short)?;
            let header = (offset >> 4) as usize * 4;
            if header < TcpHdr::LEN || header > left {
                return Err(short);
            }
            if !is_sane(flags) {
                return Err(Reason::TcpFlags);
            }
            into.kind = Kind::Tcp;
            into.flags = flags;
            into.sport = [h[0], h[1]];
            into.dport = [h[2], h[3]];
        }
        proto if proto == A::ICMP => {
            const { assert!(Icmpv4Hdr::LEN == 8 && Icmpv6Hdr::LEN == 8) };
            into.icmp = [h[0], h[1]];
            into.kind = icmp_kind(into.proto, h[0]);
            if matches!(into.kind, Kind::EchoRequest | Kind::EchoReply) {
                into.sport = [h[4], h[5]];
            }
        }
        _ => {
            into.sport = [h[0], h[1]];
            into.dport = [h[2], h[3]];
        }
    }
    Ok(())
}

/// The combinations that RFC 9293 has a use for: SYN, SYN+ACK, RST, RST+ACK, FIN+ACK, ACK; others are scans.
#[inline(always)]
fn is_sane(flags: u8) -> bool {
    let flags = flags & (tcp::FIN | tcp::SYN | tcp::RST | tcp::ACK);
    const SYN_ACK: u8 = tcp::SYN | tcp::ACK;
    const RST_ACK: u8 = tcp::RST | tcp::ACK;
    const FIN_ACK: u8 = tcp::FIN | tcp::ACK;
    matches!(flags, tcp::SYN | SYN_ACK | tcp::RST | RST_ACK | FIN_ACK | tcp::ACK)
}

/// RFC 792, RFC 4443.
#[inline(always)]
fn icmp_kind(proto: u8, kind: u8) -> Kind {
    match (proto == ICMPV6, kind) {
        (false, 8) | (true, 128) => Kind::EchoRequest,
        (false, 0) | (true, 129) => Kind::EchoReply,
        (false, 3 | 11 | 12) | (true, 1..=4) => Kind::IcmpError,
        _ => Kind::Icmp,
    }
}

/// The packet that an ICMP error quotes: its first bytes follow the 8 bytes of the error's own header.
pub struct Quoted<A> {
    /// Source address.
    pub src: A,
    /// Destination address.
    pub dst: A,
    /// Protocol.
    pub proto: u8,
    /// Kind: TCP, datagram or one of the echoes.
    pub kind: Kind,
    /// Source port, or the identifier of an echo.
    pub sport: [u8; 2],
    /// Destination port.
    pub dport: [u8; 2],
}

#[inline(always)]
fn quoted_v4<P: Packet + ?Sized>(packet: &P, at: usize) -> Option<Quoted<[u8; 4]>> {
    let h = packet.load::<12>(at)?;
    let header = ((h[0] & 0x0f) as usize) * 4;
    let later = u16::from_be_bytes([h[6], h[7]]) & 0x1fff != 0;
    if h[0] >> 4 != 4 || header < Ipv4Hdr::LEN || later {
        return None;
    }
    let src = packet.load::<4>(at + 12)?;
    let dst = packet.load::<4>(at + 16)?;
    quoted(packet, at + header, src, dst, h[9])
}

/// Extension headers of the quoted packet are not followed.
#[inline(always)]
fn quoted_v6<P: Packet + ?Sized>(packet: &P, at: usize) -> Option<Quoted<[u8; 16]>> {
    let h = packet.load::<8>(at)?;
    let src = packet.load::<16>(at + 8)?;
    let dst = packet.load::<16>(at + 24)?;
    if h[0] >> 4 != 6 {
        return None;
    }
    quoted(packet, at + Ipv6Hdr::LEN, src, dst, h[6])
}

#[inline(always)]
fn quoted<P: Packet + ?Sized, A: Family>(
    packet: &P,
    l4: usize,
    src: A,
    dst: A,
    proto: u8,
) -> Option<Quoted<A>> {
    let (mut kind, mut sport, mut dport) = (Kind::Datagram, [0; 2], [0; 2]);
    match proto {
        TCP | UDP | SCTP => {
            let h = packet.load::<4>(l4)?;
            sport = [h[0], h[1]];
            dport = [h[2], h[3]];
            if proto == TCP {
                kind = Kind::Tcp;
            }
        }
        proto if proto == A::ICMP => {
            let h = packet.load::<8>(l4)?;
            kind = icmp_kind(proto, h[0]);
            if !matches!(kind, Kind::EchoRequest | Kind::EchoReply) {
                return None;
            }
            sport = [h[4], h[5]];
        }
        _ if is_extension(proto) => return None,
        _ => {}
    }
    Some(Quoted { src, dst, proto, kind, sport, dport })
}

#[cfg(test)]
mod tests;
