//! `struct virtio_net_hdr` (Virtio 1.2, section 5.1.6): before each packet that is read from or written to the device.

/// Bytes of the header.
pub(super) const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
/// Marks a super-packet with ECN, beside its kind.
const ECN: u8 = 0x80;

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct VnetHeader {
    /// The checksum field at `csum_start + csum_offset` has the sum of the pseudo header only.
    pub(super) needs_csum: bool,
    pub(super) kind: Kind,
    pub(super) hdr_len: u16,
    /// Payload bytes of each packet but the last.
    pub(super) gso_size: u16,
    pub(super) csum_start: u16,
    pub(super) csum_offset: u16,
}

/// Whether a packet stands for several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    #[default]
    Single,
    Tcp4,
    Tcp6,
    Udp,
    /// Was not asked for.
    Unknown,
}

impl VnetHeader {
    pub(super) fn parse(raw: &[u8; LEN]) -> Self {
        let word = |at| u16::from_ne_bytes([raw[at], raw[at + 1]]);
        let kind = match raw[1] & !ECN {
            0 => Kind::Single,
            1 => Kind::Tcp4,
            4 => Kind::Tcp6,
            5 => Kind::Udp,
            _ => Kind::Unknown,
        };
        Self {
            needs_csum: raw[0] & NEEDS_CSUM != 0,
            kind,
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    pub(super) fn emit(&self) -> [u8; LEN] {
        let kind = match self.kind {
            Kind::Single | Kind::Unknown => 0,
            Kind::Tcp4 => 1,
            Kind::Tcp6 => 4,
            Kind::Udp => 5,
        };
        let mut raw = [u8::from(self.needs_csum) * NEEDS_CSUM, kind, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset];
        for (slot, word) in raw[2..].chunks_exact_mut(2).zip(words) {
            slot.copy_from_slice(&word.to_ne_bytes());
        }
        raw
    }
}
