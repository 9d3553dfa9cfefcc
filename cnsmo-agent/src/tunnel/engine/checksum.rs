//! Internet checksums (RFC 1071), and the header fields that depend on them.
//!
//! The sum does not depend on the order of bytes, so it is taken over little-endian words and stored back unchanged.

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// Sum of `bytes`, not folded yet. Eight lanes let the compiler use vector registers.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; 8];
    let mut blocks = bytes.chunks_exact(32);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
            *lane += u64::from(u32::from_le_bytes(*word));
        }
    }
    let (pairs, last) = blocks.remainder().as_chunks::<2>();
    let rest: u64 = pairs.iter().map(|pair| u64::from(u16::from_le_bytes(*pair))).sum();
    lanes.iter().sum::<u64>() + rest + last.iter().map(|byte| u64::from(*byte)).sum::<u64>()
}

/// The sum in 16 bits, not complemented.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded until it fits")]
    {
        sum as u16
    }
}

/// Sum of the pseudo header of `packet`, whose transport part has `len` bytes (RFC 9293, section 3.1; RFC 8200, 8.1).
pub(super) fn pseudo(packet: &[u8], protocol: u8, len: usize) -> u64 {
    let addresses = if is_v4(packet) { &packet[12..20] } else { &packet[8..40] };
    sum(addresses) + sum(&[0, protocol]) + sum(&short(len).to_be_bytes())
}

/// Stores what [`sum`] and [`fold`] gave.
pub(super) fn store(packet: &mut [u8], at: usize, value: u16) {
    packet[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(super) fn is_v4(packet: &[u8]) -> bool {
    packet.first().is_some_and(|byte| byte >> 4 == 4)
}

pub(super) fn be16(packet: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

pub(super) fn be32(packet: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
}

/// Gives an IP header the length `total`, and an IPv4 one an identification moved by `id_add` and its checksum.
pub(super) fn set_ip_len(packet: &mut [u8], total: usize, id_add: u16) {
    if is_v4(packet) {
        let header_len = usize::from(packet[0] & 0xf) * 4;
        packet[2..4].copy_from_slice(&short(total).to_be_bytes());
        let id = be16(packet, 4).wrapping_add(id_add);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[10..12].fill(0);
        let value = !fold(sum(&packet[..header_len]));
        store(packet, 10, value);
    } else {
        packet[4..6].copy_from_slice(&short(total - 40).to_be_bytes());
    }
}

/// A length in a header field. Callers hold packets of less than 64 KiB.
pub(super) fn short(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_sum_is_that_of_16_bit_words(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut slow = 0u32;
            for pair in bytes.chunks(2) {
                slow += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
                slow = (slow & 0xffff) + (slow >> 16);
            }
            let folded = fold(sum(&bytes)).swap_bytes();
            // 0 and 0xffff are the same number in one's complement.
            prop_assert_eq!(u32::from(folded) % 0xffff, slow % 0xffff);
        }
    }
}
