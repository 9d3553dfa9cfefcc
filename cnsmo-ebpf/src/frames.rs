//! Frames for tests, byte by byte.

use crate::parse::{ICMP, ICMPV6, TCP, UDP};

/// The VM that the data path guards. Its peers are below and above it in the order of addresses.
pub(crate) const VM: u8 = 100;
pub(crate) const PEERS: [u8; 2] = [1, 200];

pub(crate) const FAMILIES: [Ip; 2] = [Ip::V4, Ip::V6];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ip {
    V4,
    V6,
}

impl Ip {
    pub(crate) fn icmp(self) -> u8 {
        match self {
            Self::V4 => ICMP,
            Self::V6 => ICMPV6,
        }
    }

    /// Types of echo request and echo reply.
    pub(crate) fn echo(self) -> [u8; 2] {
        match self {
            Self::V4 => [8, 0],
            Self::V6 => [128, 129],
        }
    }

    /// Type and code of "port unreachable".
    pub(crate) fn unreachable(self) -> [u8; 2] {
        match self {
            Self::V4 => [3, 3],
            Self::V6 => [1, 4],
        }
    }

    pub(crate) fn packet(self, src: u8, dst: u8, proto: u8, payload: &[u8]) -> Vec<u8> {
        match self {
            Self::V4 => V4 { src, dst, proto, ..V4::default() }.carrying(payload),
            Self::V6 => ipv6(src, dst, proto, 64, payload),
        }
    }

    /// A fragment; `offset` in units of 8 bytes.
    pub(crate) fn fragment(
        self,
        (src, dst): (u8, u8),
        proto: u8,
        (offset, more): (u16, bool),
        payload: &[u8],
    ) -> Vec<u8> {
        match self {
            Self::V4 => {
                let fragment = offset | if more { 0x2000 } else { 0 };
                V4 { src, dst, proto, fragment, ..V4::default() }.carrying(payload)
            }
            Self::V6 => {
                let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
                let mut chain = vec![proto, 0, high, low, 0, 0, 0, 7];
                chain.extend(payload);
                ipv6(src, dst, 44, 64, &chain)
            }
        }
    }

    pub(crate) fn tcp(
        self,
        (src, sport): (u8, u16),
        (dst, dport): (u8, u16),
        flags: u8,
    ) -> Vec<u8> {
        self.packet(src, dst, TCP, &tcp(sport, dport, flags))
    }

    pub(crate) fn udp(self, (src, sport): (u8, u16), (dst, dport): (u8, u16)) -> Vec<u8> {
        self.packet(src, dst, UDP, &udp(sport, dport))
    }

    pub(crate) fn echo_request(self, src: u8, dst: u8, id: u16) -> Vec<u8> {
        self.packet(src, dst, self.icmp(), &icmp([self.echo()[0], 0], id, &[]))
    }

    pub(crate) fn echo_reply(self, src: u8, dst: u8, id: u16) -> Vec<u8> {
        self.packet(src, dst, self.icmp(), &icmp([self.echo()[1], 0], id, &[]))
    }

    /// An error about `quoted`, an IP packet.
    pub(crate) fn error(self, src: u8, dst: u8, quoted: &[u8]) -> Vec<u8> {
        self.packet(src, dst, self.icmp(), &icmp(self.unreachable(), 0, quoted))
    }

    pub(crate) fn ethernet(self, packet: &[u8]) -> Vec<u8> {
        ethernet(if self == Self::V4 { 0x0800 } else { 0x86dd }, &[], packet)
    }
}

/// A frame with `tags`: their EtherTypes, outermost first.
pub(crate) fn ethernet(ether_type: u16, tags: &[u16], payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2; 12];
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 5]);
    }
    frame.extend(ether_type.to_be_bytes());
    frame.extend(payload);
    frame
}

pub(crate) struct V4 {
    pub(crate) src: u8,
    pub(crate) dst: u8,
    pub(crate) proto: u8,
    pub(crate) fragment: u16,
    pub(crate) options: Vec<u8>,
}

impl Default for V4 {
    fn default() -> Self {
        Self { src: PEERS[0], dst: VM, proto: TCP, fragment: 0, options: vec![] }
    }
}

impl V4 {
    pub(crate) fn carrying(&self, payload: &[u8]) -> Vec<u8> {
        let header = 20 + self.options.len();
        let total = (header + payload.len()) as u16;
        let mut packet = vec![0x40 | (header / 4) as u8, 0];
        packet.extend(total.to_be_bytes());
        packet.extend([0, 7]);
        packet.extend(self.fragment.to_be_bytes());
        packet.extend([64, self.proto, 0, 0]);
        packet.extend(v4(self.src));
        packet.extend(v4(self.dst));
        packet.extend(&self.options);
        packet.extend(payload);
        packet
    }
}

pub(crate) fn ipv6(src: u8, dst: u8, next: u8, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, hop_limit]);
    packet.extend(v6(src));
    packet.extend(v6(dst));
    packet.extend(payload);
    packet
}

pub(crate) fn v4(host: u8) -> [u8; 4] {
    [10, 0, 0, host]
}

pub(crate) fn v6(host: u8) -> [u8; 16] {
    let mut address = [0; 16];
    (address[0], address[15]) = (0xfd, host);
    address
}

pub(crate) fn tcp(sport: u16, dport: u16, flags: u8) -> Vec<u8> {
    let mut segment = vec![0; 20];
    segment[..2].copy_from_slice(&sport.to_be_bytes());
    segment[2..4].copy_from_slice(&dport.to_be_bytes());
    (segment[12], segment[13]) = (5 << 4, flags);
    segment
}

pub(crate) fn udp(sport: u16, dport: u16) -> Vec<u8> {
    let mut datagram = vec![0; 12];
    datagram[..2].copy_from_slice(&sport.to_be_bytes());
    datagram[2..4].copy_from_slice(&dport.to_be_bytes());
    datagram[5] = 12;
    datagram
}

pub(crate) fn icmp([kind, code]: [u8; 2], id: u16, body: &[u8]) -> Vec<u8> {
    let [high, low] = id.to_be_bytes();
    let mut message = vec![kind, code, 0, 0, high, low, 0, 1];
    message.extend(body);
    message
}

/// One of every kind of packet, each complete.
pub(crate) fn every_kind(ip: Ip) -> Vec<Vec<u8>> {
    let (a, b) = (PEERS[0], VM);
    let lookup = ip.udp((b, 5353), (a, 53));
    let mut kinds = vec![
        ip.tcp((a, 4000), (b, 80), 2),
        ip.udp((a, 4000), (b, 53)),
        ip.packet(a, b, 132, &[0; 12]),
        ip.packet(a, b, 47, &[]),
        ip.echo_request(a, b, 9),
        ip.echo_reply(a, b, 9),
        ip.error(a, b, &lookup),
        ip.packet(a, b, ip.icmp(), &icmp([13, 0], 0, &[])),
        ip.fragment((a, b), TCP, (0, true), &tcp(1, 2, 2)),
        ip.fragment((a, b), UDP, (3, false), &[0; 16]),
    ];
    match ip {
        Ip::V4 => {
            let options = vec![1; 40];
            kinds.push(V4 { options, ..V4::default() }.carrying(&tcp(1, 2, 16)));
        }
        Ip::V6 => {
            let chain = chain(&[0, 60, 43, 44, 51, 60], TCP, &tcp(1, 2, 16));
            kinds.push(ipv6(a, b, 0, 64, &chain));
            kinds.push(ipv6(a, b, ICMPV6, 255, &icmp([135, 0], 0, &v6(b))));
        }
    }
    kinds
}

/// A chain of IPv6 extension headers; the first one's number goes into the IPv6 header.
pub(crate) fn chain(headers: &[u8], last: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (n, header) in headers.iter().enumerate() {
        let next = headers.get(n + 1).copied().unwrap_or(last);
        match header {
            // Whole: offset 0, no more.
            44 => bytes.extend([next, 0, 0, 0, 0, 0, 0, 7]),
            51 => bytes.extend([&[next, 1][..], &[0; 10]].concat()),
            // Type 4: segment routing.
            43 => bytes.extend([next, 0, 4, 0, 0, 0, 0, 0]),
            _ => bytes.extend([&[next, 1][..], &[0; 14]].concat()),
        }
    }
    bytes.extend(payload);
    bytes
}
