//! On the way out: what the kernel left to a network card is done here. Super-packets are cut, checksums completed.

use bytes::{BufMut as _, BytesMut};

use super::{
    checksum::{self, TCP, UDP, be32, fold, is_v4, pseudo, set_ip_len, short, store, sum},
    vnet::{Kind, VnetHeader},
};

/// Plaintexts are padded to a multiple of it (WireGuard, section 5.4.6).
const PADDING: usize = 16;
/// Room that is taken at once. Two of the largest super-packets, headers of each piece included.
const ARENA_BYTES: usize = 256 << 10;
const UDP_HEADER_LEN: usize = 8;
const UDP_CHECKSUM_AT: usize = 6;
const TCP_CHECKSUM_AT: usize = 16;
const TCP_CWR: u8 = 0x80;
const TCP_FIN_PSH: u8 = 0x09;

/// A packet contradicts its header, or itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed packet")]
pub(super) struct Malformed;

/// Cuts packets into plaintexts, ready to be sealed.
#[derive(Debug, Default)]
pub(super) struct Cutter {
    /// Its memory is taken back once all pieces are sealed.
    arena: BytesMut,
}

impl Cutter {
    /// Appends the plaintexts that `packet` stands for. They are padded, but not beyond `mtu`.
    pub(super) fn cut(
        &mut self,
        header: &VnetHeader,
        packet: &mut [u8],
        mtu: u16,
        pieces: &mut Vec<BytesMut>,
    ) -> Result<(), Malformed> {
        let version = packet.first().map_or(0, |byte| byte >> 4);
        if !matches!((version, packet.len()), (4, 20..) | (6, 40..)) {
            return Err(Malformed);
        }
        match header.kind {
            Kind::Single => {
                complete_checksum(header, packet)?;
                let piece = self.piece(packet, &[], mtu);
                pieces.push(piece);
                Ok(())
            }
            Kind::Tcp4 if version == 4 => self.segment(header, packet, TCP, mtu, pieces),
            Kind::Tcp6 if version == 6 => self.segment(header, packet, TCP, mtu, pieces),
            Kind::Udp => self.segment(header, packet, UDP, mtu, pieces),
            Kind::Tcp4 | Kind::Tcp6 | Kind::Unknown => Err(Malformed),
        }
    }

    fn segment(
        &mut self,
        header: &VnetHeader,
        packet: &[u8],
        protocol: u8,
        mtu: u16,
        pieces: &mut Vec<BytesMut>,
    ) -> Result<(), Malformed> {
        // Checksums of a forwarded super-packet may be complete; then nothing says where they start.
        let l3_min = if is_v4(packet) { usize::from(packet[0] & 0xf) * 4 } else { 40 };
        let l4 = if header.needs_csum { usize::from(header.csum_start) } else { l3_min };
        let gso_size = usize::from(header.gso_size);
        let headers_len = headers_len(packet, l4, protocol)?;
        if gso_size == 0 || packet.len() <= headers_len {
            return Err(Malformed);
        }
        let (headers, payload) = packet.split_at(headers_len);
        let checksum_at = l4 + if protocol == TCP { TCP_CHECKSUM_AT } else { UDP_CHECKSUM_AT };
        let count = payload.len().div_ceil(gso_size);
        for (index, chunk) in payload.chunks(gso_size).enumerate() {
            let total = headers_len + chunk.len();
            let mut piece = self.piece(headers, chunk, mtu);
            // Behind it is padding.
            let segment = &mut piece[..total];
            #[expect(clippy::cast_possible_truncation, reason = "fewer than 65,536 pieces")]
            set_ip_len(segment, total, index as u16);
            if protocol == TCP {
                let offset = u32::try_from(index * gso_size).map_err(|_| Malformed)?;
                let sequence = be32(headers, l4 + 4).wrapping_add(offset);
                segment[l4 + 4..l4 + 8].copy_from_slice(&sequence.to_be_bytes());
                let flags = &mut segment[l4 + 13];
                *flags &= if index > 0 { !TCP_CWR } else { 0xff };
                *flags &= if index + 1 < count { !TCP_FIN_PSH } else { 0xff };
            } else {
                segment[l4 + 4..l4 + 6].copy_from_slice(&short(total - l4).to_be_bytes());
            }
            segment[checksum_at..checksum_at + 2].fill(0);
            let value = !fold(sum(&segment[l4..]) + pseudo(segment, protocol, total - l4));
            store(segment, checksum_at, never_zero(value, protocol));
            pieces.push(piece);
        }
        Ok(())
    }

    fn piece(&mut self, headers: &[u8], payload: &[u8], mtu: u16) -> BytesMut {
        let len = headers.len() + payload.len();
        let padded = len.next_multiple_of(PADDING).min(usize::from(mtu)).max(len);
        if self.arena.capacity() < padded {
            self.arena.reserve(ARENA_BYTES.max(padded));
        }
        self.arena.extend_from_slice(headers);
        self.arena.extend_from_slice(payload);
        self.arena.put_bytes(0, padded - len);
        self.arena.split()
    }
}

/// Bytes before the payload, all of which `packet` has.
fn headers_len(packet: &[u8], l4: usize, protocol: u8) -> Result<usize, Malformed> {
    let l3_min = if is_v4(packet) { usize::from(packet[0] & 0xf).max(5) * 4 } else { 40 };
    if l4 < l3_min {
        return Err(Malformed);
    }
    let l4_len = if protocol == TCP {
        let offset = packet.get(l4 + 12).ok_or(Malformed)? >> 4;
        usize::from(offset.max(5)) * 4
    } else {
        UDP_HEADER_LEN
    };
    let len = l4 + l4_len;
    if len <= packet.len() { Ok(len) } else { Err(Malformed) }
}

/// The checksum's field holds the sum of the pseudo header, of whatever protocol it is.
fn complete_checksum(header: &VnetHeader, packet: &mut [u8]) -> Result<(), Malformed> {
    if !header.needs_csum {
        return Ok(());
    }
    let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
    if start + offset + 2 > packet.len() {
        return Err(Malformed);
    }
    let value = !fold(sum(&packet[start..]));
    let protocol = if offset == UDP_CHECKSUM_AT { UDP } else { TCP };
    store(packet, start + offset, never_zero(value, protocol));
    Ok(())
}

/// Zero says "no checksum" in UDP (RFC 768).
fn never_zero(value: u16, protocol: u8) -> u16 {
    if value == 0 && protocol == checksum::UDP { 0xffff } else { value }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(header: &VnetHeader, packet: &[u8], mtu: u16) -> Result<Vec<BytesMut>, Malformed> {
        let mut pieces = Vec::new();
        Cutter::default().cut(header, &mut packet.to_vec(), mtu, &mut pieces)?;
        Ok(pieces)
    }

    fn kinds() -> impl Strategy<Value = Kind> {
        prop_oneof![
            Just(Kind::Single),
            Just(Kind::Tcp4),
            Just(Kind::Tcp6),
            Just(Kind::Udp),
            Just(Kind::Unknown)
        ]
    }

    proptest! {
        #[test]
        fn any_header_and_packet_end_without_a_panic(
            raw in any::<[u8; super::super::vnet::LEN]>(),
            kind in kinds(),
            near in any::<bool>(),
            first in prop_oneof![Just(0x45u8), Just(0x4fu8), Just(0x60u8), any::<u8>()],
            mut packet in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let mut header = VnetHeader { kind, ..VnetHeader::parse(&raw) };
            if near {
                header.csum_start %= 64;
                header.csum_offset %= 32;
            }
            if let Some(byte) = packet.first_mut() {
                *byte = first;
            }
            let _ = cut(&header, &packet, 1420);
        }

        #[test]
        fn what_is_not_a_super_packet_passes_as_it_is(
            mut packet in proptest::collection::vec(any::<u8>(), 20..1500),
            mtu in 1280u16..1500,
        ) {
            packet[0] = 0x45;
            let pieces = cut(&VnetHeader::default(), &packet, mtu).unwrap();
            prop_assert_eq!(pieces.len(), 1);
            prop_assert_eq!(&pieces[0][..packet.len()], &packet[..]);
            prop_assert!(pieces[0].len() <= packet.len().max(usize::from(mtu)));
            prop_assert!(pieces[0][packet.len()..].iter().all(|byte| *byte == 0));
        }

        /// As the kernel leaves a packet whose destination was rewritten in eBPF: the field has the pseudo header's sum.
        #[test]
        fn a_partial_checksum_is_completed(
            v6 in any::<bool>(),
            tcp in any::<bool>(),
            mut packet in proptest::collection::vec(any::<u8>(), 64..1400),
        ) {
            let (l3, protocol) = (if v6 { 40 } else { 20 }, if tcp { TCP } else { UDP });
            let offset = if tcp { TCP_CHECKSUM_AT } else { UDP_CHECKSUM_AT };
            packet[0] = if v6 { 0x60 } else { 0x45 };
            let len = packet.len() - l3;
            let partial = fold(pseudo(&packet, protocol, len));
            store(&mut packet, l3 + offset, partial);
            let header = VnetHeader {
                needs_csum: true,
                csum_start: short(l3),
                csum_offset: short(offset),
                ..VnetHeader::default()
            };
            let pieces = cut(&header, &packet, 1280).unwrap();
            let whole = &pieces[0][..packet.len()];
            prop_assert_eq!(fold(sum(&whole[l3..]) + pseudo(whole, protocol, len)), 0xffff);
        }
    }

    #[test]
    fn a_checksum_outside_of_the_packet_is_malformed() {
        let header = VnetHeader {
            needs_csum: true,
            csum_start: 20,
            csum_offset: 16,
            ..VnetHeader::default()
        };
        let mut packet = vec![0u8; 37];
        packet[0] = 0x45;
        assert_eq!(cut(&header, &packet, 1420), Err(Malformed));
        packet.push(0);
        assert!(cut(&header, &packet, 1420).is_ok());
    }
}
