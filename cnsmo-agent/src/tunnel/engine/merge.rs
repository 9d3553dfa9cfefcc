//! On the way in: consecutive packets of a flow become one super-packet, as GRO does it for a network card.
//!
//! No payload is copied: packets stay where they were decrypted, and one `writev` gathers them. A packet joins only if its
//! checksum is right. After the merge the kernel sees one checksum for the whole, so a wrong one would be made good.

use bytes::BytesMut;

use super::{
    checksum::{TCP, UDP, be16, be32, fold, is_v4, pseudo, set_ip_len, short, store, sum},
    vnet::{Kind, VnetHeader},
};

/// Runs that grow at the same time: flows whose packets arrive interleaved. The oldest is written when one more begins.
const RUNS_MAX: usize = 8;
/// Packets of one run: what the kernel takes for UDP, and what 64 KiB hold of full packets.
const PACKETS_MAX: usize = 64;
/// The IP length field has 16 bits.
const BYTES_MAX: usize = 65_535;

const TCP_PSH: u8 = 0x08;
const TCP_ACK: u8 = 0x10;
const DONT_FRAGMENT: u8 = 0x40;

/// Where packets go: the device.
pub(super) trait Sink {
    /// Takes one packet, in parts.
    fn write(&mut self, header: &VnetHeader, parts: &[&[u8]]);
}

/// See the module.
#[derive(Debug)]
pub(super) struct Merger {
    /// The oldest first.
    runs: Vec<Run>,
    /// Whether the kernel takes UDP super-packets.
    udp: bool,
}

impl Merger {
    pub(super) fn new(udp: bool) -> Self {
        Self { runs: Vec::with_capacity(RUNS_MAX), udp }
    }

    /// Takes an IP packet of its own length. The order within its flow is kept.
    pub(super) fn push(&mut self, packet: BytesMut, sink: &mut impl Sink) {
        let Some(flow) = Flow::of(&packet) else {
            return sink.write(&VnetHeader::default(), &[&packet]);
        };
        let known = self.runs.iter().position(|run| run.flow == flow);
        let shape = Shape::of(&packet, &flow).filter(|_| self.udp || flow.protocol == TCP);
        let Some(shape) = shape else {
            if let Some(known) = known {
                self.runs.remove(known).write(sink);
            }
            return sink.write(&VnetHeader::default(), &[&packet]);
        };
        if let Some(known) = known {
            let run = &mut self.runs[known];
            if run.takes(&packet, shape) {
                run.add(packet);
                if run.is_closed() {
                    self.runs.remove(known).write(sink);
                }
                return;
            }
            self.runs.remove(known).write(sink);
        } else if self.runs.len() == RUNS_MAX {
            self.runs.remove(0).write(sink);
        }
        let run = Run::new(flow, shape, packet);
        if run.is_closed() {
            return run.write(sink);
        }
        self.runs.push(run);
    }

    /// Writes what is held back.
    pub(super) fn flush(&mut self, sink: &mut impl Sink) {
        for run in self.runs.drain(..) {
            run.write(sink);
        }
    }
}

/// What packets of one flow and direction have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    addresses: [u8; 32],
    ports: [u8; 4],
    protocol: u8,
}

impl Flow {
    /// `None`: neither TCP nor UDP with its ports at the usual place.
    fn of(packet: &[u8]) -> Option<Self> {
        let mut addresses = [0; 32];
        let (l3_len, protocol) = match packet.first()? >> 4 {
            4 => {
                addresses[..8].copy_from_slice(packet.get(12..20)?);
                (20, packet[9])
            }
            6 => {
                addresses.copy_from_slice(packet.get(8..40)?);
                (40, packet[6])
            }
            _ => return None,
        };
        let usual = is_v4(packet) && packet[0] == 0x45 && be16(packet, 6) & 0x3fff == 0;
        if !matches!(protocol, TCP | UDP) || !(usual || l3_len == 40) {
            return None;
        }
        let ports = packet.get(l3_len..l3_len + 4)?.try_into().ok()?;
        Some(Self { addresses, ports, protocol })
    }
}

/// Lengths of the headers of a packet that may be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    l3_len: usize,
    headers_len: usize,
}

impl Shape {
    /// `None`: empty, with flags other than ACK and PSH, of another length than it says, or with a wrong checksum.
    fn of(packet: &[u8], flow: &Flow) -> Option<Self> {
        let (l3_len, len) = if is_v4(packet) {
            (20, usize::from(be16(packet, 2)))
        } else {
            (40, usize::from(be16(packet, 4)) + 40)
        };
        let l4 = packet.get(l3_len..).filter(|_| len == packet.len())?;
        let l4_len = if flow.protocol == TCP {
            let flags = *l4.get(13)?;
            (flags & !TCP_PSH == TCP_ACK).then_some(usize::from((l4[12] >> 4).max(5)) * 4)?
        } else {
            let whole = l4.len() >= 8 && usize::from(be16(l4, 4)) == l4.len();
            (whole && l4[6..8] != [0, 0]).then_some(8)?
        };
        let right =
            l4.len() > l4_len && fold(sum(l4) + pseudo(packet, flow.protocol, l4.len())) == 0xffff;
        right.then_some(Self { l3_len, headers_len: l3_len + l4_len })
    }
}

#[derive(Debug)]
struct Run {
    flow: Flow,
    shape: Shape,
    /// The first whole, of the others the payload counts.
    packets: Vec<BytesMut>,
    bytes: usize,
    gso_size: usize,
    next_sequence: u32,
    /// A shorter packet or a push ended it.
    ended: bool,
}

impl Run {
    fn new(flow: Flow, shape: Shape, packet: BytesMut) -> Self {
        let gso_size = packet.len() - shape.headers_len;
        let mut this = Self {
            flow,
            shape,
            packets: Vec::new(),
            bytes: shape.headers_len,
            gso_size,
            next_sequence: 0,
            ended: false,
        };
        this.add(packet);
        this
    }

    fn takes(&self, next: &[u8], shape: Shape) -> bool {
        let Shape { l3_len, headers_len } = self.shape;
        let payload = next.len() - shape.headers_len;
        if shape != self.shape
            || payload > self.gso_size
            || self.bytes + payload > BYTES_MAX
            || self.packets.len() == PACKETS_MAX
        {
            return false;
        }
        let first = &self.packets[0];
        let same = |range: std::ops::Range<usize>| first[range.clone()] == next[range];
        // Without its length, identification and checksum; addresses and protocol are in the flow.
        let same_l3 = if l3_len == 20 {
            let follows = be16(next, 4).wrapping_sub(be16(first, 4));
            let in_order = usize::from(follows) == self.packets.len();
            same(0..2) && same(6..9) && (in_order || first[6] & DONT_FRAGMENT != 0)
        } else {
            same(0..4) && same(7..8)
        };
        let continues = self.flow.protocol == UDP
            || (be32(next, l3_len + 4) == self.next_sequence
                && same(l3_len + 8..l3_len + 13)
                && same(l3_len + 14..l3_len + 16)
                && same(l3_len + 18..headers_len));
        same_l3 && continues
    }

    fn add(&mut self, packet: BytesMut) {
        let Shape { l3_len, headers_len } = self.shape;
        let payload = packet.len() - headers_len;
        self.bytes += payload;
        self.ended = payload < self.gso_size;
        if self.flow.protocol == TCP {
            let len = u32::from(short(payload));
            self.next_sequence = be32(&packet, l3_len + 4).wrapping_add(len);
            let push = packet[l3_len + 13] & TCP_PSH;
            self.ended |= push != 0;
            if let Some(first) = self.packets.first_mut() {
                first[l3_len + 13] |= push;
            }
        }
        self.packets.push(packet);
    }

    fn is_closed(&self) -> bool {
        self.ended || self.packets.len() == PACKETS_MAX
    }

    fn write(mut self, sink: &mut impl Sink) {
        let header = self.finish_headers();
        let mut parts: [&[u8]; PACKETS_MAX] = [&[]; PACKETS_MAX];
        for (index, (part, packet)) in parts.iter_mut().zip(&self.packets).enumerate() {
            *part = if index == 0 { packet } else { &packet[self.shape.headers_len..] };
        }
        sink.write(&header, &parts[..self.packets.len()]);
    }

    /// Gives the first headers the length of the whole. The checksum is left to the kernel, which expects the pseudo
    /// header's sum in its field.
    fn finish_headers(&mut self) -> VnetHeader {
        if self.packets.len() == 1 {
            return VnetHeader::default();
        }
        let (l3_len, total) = (self.shape.l3_len, self.bytes);
        let first = &mut self.packets[0];
        set_ip_len(first, total, 0);
        let (kind, csum_offset) = match self.flow.protocol {
            TCP if is_v4(first) => (Kind::Tcp4, 16),
            TCP => (Kind::Tcp6, 16),
            _ => (Kind::Udp, 6),
        };
        if kind == Kind::Udp {
            first[l3_len + 4..l3_len + 6].copy_from_slice(&short(total - l3_len).to_be_bytes());
        }
        let partial = fold(pseudo(first, self.flow.protocol, total - l3_len));
        store(first, l3_len + usize::from(csum_offset), partial);
        VnetHeader {
            needs_csum: true,
            kind,
            hdr_len: short(self.shape.headers_len),
            gso_size: short(self.gso_size),
            csum_start: short(l3_len),
            csum_offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::cut::Cutter, *};

    /// Cuts what was merged, as a network card would.
    #[derive(Default)]
    struct Wire {
        packets: Vec<Vec<u8>>,
        writes: usize,
    }

    impl Sink for Wire {
        fn write(&mut self, header: &VnetHeader, parts: &[&[u8]]) {
            self.writes += 1;
            let mut pieces = Vec::new();
            let mut whole = parts.concat();
            Cutter::default().cut(header, &mut whole, 0, &mut pieces).unwrap();
            self.packets.extend(pieces.into_iter().map(|piece| piece.to_vec()));
        }
    }

    fn through(packets: &[Vec<u8>]) -> Wire {
        let (mut merger, mut wire) = (Merger::new(true), Wire::default());
        for packet in packets {
            merger.push(BytesMut::from(&packet[..]), &mut wire);
        }
        merger.flush(&mut wire);
        wire
    }

    #[derive(Clone, Copy, Debug)]
    struct Stream {
        v6: bool,
        tcp: bool,
        port: u8,
        options: bool,
    }

    /// A correct packet with `payload`, the `index`th of its stream.
    fn packet(stream: Stream, index: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let l3_len = if stream.v6 { 40 } else { 20 };
        let options = if stream.tcp && stream.options { 12 } else { 0 };
        let l4_len = if stream.tcp { 20 + options } else { 8 };
        let protocol = if stream.tcp { TCP } else { UDP };
        let mut packet = vec![0u8; l3_len + l4_len];
        packet.extend(payload);
        let total = packet.len();
        if stream.v6 {
            packet[0] = 0x60;
            packet[6] = protocol;
            packet[7] = 64;
            packet[8..40].copy_from_slice(&[0xfd; 32]);
        } else {
            packet[0] = 0x45;
            packet[8] = 64;
            packet[9] = protocol;
            packet[12..20].copy_from_slice(&[10; 8]);
        }
        set_ip_len(&mut packet, total, index);
        packet[l3_len + 1] = stream.port;
        let csum_at = if stream.tcp {
            packet[l3_len + 4..l3_len + 8].copy_from_slice(&sequence.to_be_bytes());
            packet[l3_len + 12] = short(l4_len / 4).to_be_bytes()[1] << 4;
            packet[l3_len + 13] = flags;
            l3_len + 16
        } else {
            packet[l3_len + 4..l3_len + 6].copy_from_slice(&short(total - l3_len).to_be_bytes());
            l3_len + 6
        };
        let value = !fold(sum(&packet[l3_len..]) + pseudo(&packet, protocol, total - l3_len));
        store(&mut packet, csum_at, if value == 0 && !stream.tcp { 0xffff } else { value });
        packet
    }

    fn streams() -> impl Strategy<Value = Vec<(Stream, Vec<(u16, bool)>)>> {
        let stream = (any::<bool>(), any::<bool>(), any::<bool>());
        let packets = proptest::collection::vec(
            (prop_oneof![4 => Just(1000u16), 1 => 0u16..1200], any::<bool>()),
            1..80,
        );
        proptest::collection::vec((stream, packets), 1..12).prop_map(|streams| {
            let numbered = streams.into_iter().zip(0u8..);
            let stream = |(((v6, tcp, options), packets), port)| {
                (Stream { v6, tcp, port, options }, packets)
            };
            numbered.map(stream).collect()
        })
    }

    /// The packets of each stream in order, the streams interleaved.
    fn packets(streams: &[(Stream, Vec<(u16, bool)>)]) -> Vec<(u8, Vec<u8>)> {
        let mut all = Vec::new();
        let mut sequences = vec![u32::MAX - 5_000; streams.len()];
        for index in 0..80u16 {
            for ((stream, sizes), sequence) in streams.iter().zip(&mut sequences) {
                let Some(&(size, push)) = sizes.get(usize::from(index)) else { continue };
                let payload: Vec<u8> = (0..size).map(|n| n.to_le_bytes()[0]).collect();
                let flags = TCP_ACK | if push && size < 1000 { TCP_PSH } else { 0 };
                all.push((stream.port, packet(*stream, index, *sequence, flags, &payload)));
                *sequence = sequence.wrapping_add(u32::from(size));
            }
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn cutting_what_was_merged_gives_the_packets_of_each_flow_in_order(streams in streams()) {
            let sent = packets(&streams);
            let all: Vec<_> = sent.iter().map(|(_, packet)| packet.clone()).collect();
            let received = through(&all).packets;
            prop_assert_eq!(received.len(), all.len());
            for (stream, _) in &streams {
                let l3_len = if stream.v6 { 40 } else { 20 };
                let of_stream = |packet: &&Vec<u8>| {
                    (packet[0] >> 4 == 6) == stream.v6 && packet[l3_len + 1] == stream.port
                };
                let got: Vec<_> = received.iter().filter(of_stream).collect();
                let wanted: Vec<_> = sent.iter().filter(|(port, _)| *port == stream.port)
                    .map(|(_, packet)| packet).collect();
                prop_assert_eq!(got, wanted);
            }
        }

        #[test]
        fn arbitrary_bytes_come_out_as_they_went_in(
            packets in proptest::collection::vec(
                (prop_oneof![Just(0x45u8), Just(0x60u8), any::<u8>()], prop_oneof![Just(TCP), Just(UDP), any::<u8>()],
                    proptest::collection::vec(any::<u8>(), 1..120)), 1..20),
        ) {
            struct Raw(Vec<Vec<u8>>);
            impl Sink for Raw {
                fn write(&mut self, _: &VnetHeader, parts: &[&[u8]]) {
                    self.0.push(parts.concat());
                }
            }
            let (mut merger, mut raw) = (Merger::new(true), Raw(Vec::new()));
            let packets: Vec<_> = packets.into_iter().map(|(first, protocol, mut packet)| {
                packet[0] = first;
                if let Some(byte) = packet.get_mut(if first == 0x60 { 6 } else { 9 }) {
                    *byte = protocol;
                }
                packet
            }).collect();
            for packet in &packets {
                merger.push(BytesMut::from(&packet[..]), &mut raw);
            }
            merger.flush(&mut raw);
            prop_assert_eq!(raw.0, packets);
        }
    }

    const STREAM: Stream = Stream { v6: false, tcp: true, port: 1, options: true };

    #[test]
    fn a_bulk_transfer_is_a_few_writes() {
        for v6 in [false, true] {
            let stream = Stream { v6, ..STREAM };
            let payload = [7; 1000];
            let all: Vec<_> = (0..60u16)
                .map(|n| packet(stream, n, u32::from(n) * 1000, TCP_ACK, &payload))
                .collect();
            assert_eq!(through(&all).writes, 1);
        }
    }

    #[test]
    fn a_wrong_checksum_is_not_made_good() {
        let mut all: Vec<_> =
            (0..3u16).map(|n| packet(STREAM, n, u32::from(n) * 4, TCP_ACK, &[1; 4])).collect();
        let last = all[1].len() - 1;
        all[1][last] ^= 1;
        let wire = through(&all);
        assert_eq!(wire.packets, all);
        assert_eq!(wire.writes, 3);
    }
}
