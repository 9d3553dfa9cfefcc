//! Frames: well-formed ones piece by piece, and random ones that are often almost well-formed.

/// A small generator that gives the same numbers for the same seed (xorshift64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Any seed but 0.
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }

    /// One time in `n`.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// Addresses of one packet.
#[derive(Clone, Copy, Debug)]
pub enum Ends {
    /// Source, destination.
    V4([u8; 4], [u8; 4]),
    /// Source, destination.
    V6([u8; 16], [u8; 16]),
}

impl Ends {
    /// The other way round.
    pub fn reversed(self) -> Self {
        match self {
            Self::V4(a, b) => Self::V4(b, a),
            Self::V6(a, b) => Self::V6(b, a),
        }
    }
}

/// A TCP segment without options.
pub fn tcp(sport: u16, dport: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
    out.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    out.extend(payload);
    out
}

/// A UDP datagram.
pub fn udp(sport: u16, dport: u16, payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    let mut out = [sport.to_be_bytes(), dport.to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    out.extend(payload);
    out
}

/// An ICMP message of 8 bytes and more.
pub fn icmp(kind: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut out = vec![kind, code, 0, 0];
    out.extend(rest);
    out.extend(payload);
    out
}

/// An IP packet around `payload`; IPv4 without options.
pub fn ip(ends: Ends, proto: u8, payload: &[u8]) -> Vec<u8> {
    match ends {
        Ends::V4(src, dst) => ipv4(src, dst, proto, 0, &[], payload),
        Ends::V6(src, dst) => ipv6(src, dst, proto, 64, payload),
    }
}

/// `fragment`: flags and offset; `options`: a multiple of 4 bytes.
pub fn ipv4(
    src: [u8; 4],
    dst: [u8; 4],
    proto: u8,
    fragment: u16,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let header = 20 + options.len();
    let total = (header + payload.len()) as u16;
    let mut out = vec![0x40 | (header / 4) as u8, 0];
    out.extend(total.to_be_bytes());
    out.extend([0x12, 0x34]);
    out.extend(fragment.to_be_bytes());
    out.extend([64, proto, 0, 0]);
    out.extend(src);
    out.extend(dst);
    out.extend(options);
    out.extend(payload);
    out
}

/// `next`: the first header of `payload`.
pub fn ipv6(src: [u8; 16], dst: [u8; 16], next: u8, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0x60, 0, 0, 0];
    out.extend((payload.len() as u16).to_be_bytes());
    out.extend([next, hop_limit]);
    out.extend(src);
    out.extend(dst);
    out.extend(payload);
    out
}

/// An Ethernet frame with VLAN tags (outermost first) around an IP packet.
pub fn ethernet(tags: &[u16], packet: &[u8]) -> Vec<u8> {
    let mut out = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for tag in tags {
        out.extend(tag.to_be_bytes());
        out.extend([0, 7]);
    }
    let version = packet.first().map_or(0, |byte| byte >> 4);
    out.extend(if version == 6 { [0x86, 0xdd] } else { [0x08, 0x00] });
    out.extend(packet);
    out
}

const TCP_FLAGS: [u8; 10] = [0x02, 0x12, 0x10, 0x10, 0x18, 0x11, 0x04, 0x14, 0x00, 0x29];
const PORTS: [u16; 6] = [22, 53, 80, 443, 40_000, 40_001];

/// A packet between a few addresses and ports, so that flows, answers, fragments and errors meet each other; one in
/// eight is damaged.
pub fn random_packet(random: &mut Random, outbound: bool) -> Vec<u8> {
    let ends = random_ends(random);
    let ends = if outbound { ends.reversed() } else { ends };
    let (proto, payload) = random_payload(random, ends);
    let mut packet = match ends {
        Ends::V4(src, dst) => {
            let options: &[u8] = random.pick(&[&[][..], &[], &[], &[1, 1, 1, 0], &[0; 40]]);
            let fragment = random.pick(&[0, 0, 0, 0, 0x4000, 0x2000, 0x2001, 3, 0x2002]);
            ipv4(src, dst, proto, fragment, options, &payload)
        }
        Ends::V6(src, dst) => {
            let hop_limit = random.pick(&[64, 255, 1]);
            let (next, payload) = extended(random, proto, payload);
            ipv6(src, dst, next, hop_limit, &payload)
        }
    };
    if random.one_in(8) {
        damage(random, &mut packet);
    }
    packet
}

fn random_ends(random: &mut Random) -> Ends {
    let (a, b) = (random.pick(&[1, 2, 200]), random.pick(&[5, 6]));
    if random.one_in(2) {
        Ends::V4([10, 0, 1, a], [10, 0, 0, b])
    } else {
        let mut src = [0; 16];
        src[..2].copy_from_slice(&[0xfd, 0x77]);
        let mut dst = src;
        (src[15], dst[15]) = (a, b);
        src[7] = 1;
        if random.one_in(8) {
            src[..2].copy_from_slice(&[0xfe, 0x80]);
        }
        Ends::V6(src, dst)
    }
}

fn random_payload(random: &mut Random, ends: Ends) -> (u8, Vec<u8>) {
    let (sport, dport) = (random.pick(&PORTS), random.pick(&PORTS));
    let v6 = matches!(ends, Ends::V6(..));
    let icmp_proto = if v6 { 58 } else { 1 };
    match random.below(12) {
        0..=4 => (6, tcp(sport, dport, random.pick(&TCP_FLAGS), b"data")),
        5 | 6 => (17, udp(sport, dport, b"payload")),
        7 | 8 => {
            let kinds: &[u8] = if v6 { &[128, 129] } else { &[8, 0] };
            let kind = random.pick(kinds);
            (icmp_proto, icmp(kind, 0, [0, random.below(2) as u8, 0, 1], b"ping"))
        }
        9 => {
            let kinds: &[u8] =
                if v6 { &[1, 2, 3, 4, 133, 135, 136, 143] } else { &[3, 11, 12, 5, 13] };
            let inner = if random.one_in(2) {
                ip(ends.reversed(), 17, &udp(dport, sport, b""))
            } else {
                ip(ends.reversed(), 6, &tcp(dport, sport, 0x10, b""))
            };
            (icmp_proto, icmp(random.pick(kinds), random.below(2) as u8, [0; 4], &inner))
        }
        10 => (
            132,
            [sport.to_be_bytes(), dport.to_be_bytes(), [0; 2], [0; 2], [0; 2], [0; 2]].concat(),
        ),
        _ => (random.pick(&[47, 50, 59, 2, 255]), vec![0; 24]),
    }
}

/// Puts extension headers in front; returns the first header's number.
fn extended(random: &mut Random, proto: u8, payload: Vec<u8>) -> (u8, Vec<u8>) {
    let (mut next, mut out) = (proto, payload);
    let count = random.pick(&[0, 0, 0, 0, 1, 1, 2, 3, 8]);
    for _ in 0..count {
        let header = random.pick(&[0, 60, 43, 51, 44]);
        let mut front = match header {
            44 => {
                let field: u16 = random.pick(&[0, 1, 8, 9, 24]);
                let [high, low] = field.to_be_bytes();
                vec![next, 0, high, low, 0, 0, 0, random.below(2) as u8]
            }
            51 => [&[next, 1][..], &[0; 10]].concat(),
            43 => vec![next, 0, random.pick(&[0, 2, 4, 4]), 0, 0, 0, 0, 0],
            _ => vec![next, 0, 1, 4, 0, 0, 0, 0],
        };
        front.extend(out);
        (next, out) = (header, front);
    }
    (next, out)
}

fn damage(random: &mut Random, packet: &mut Vec<u8>) {
    if random.one_in(2) {
        packet.truncate(random.below(packet.len() + 1));
    } else if !packet.is_empty() {
        for _ in 0..=random.below(3) {
            let at = random.below(packet.len().min(48));
            packet[at] ^= 1 << random.below(8);
        }
    }
}

/// Frames of every kind of damage that the parser meets: cut after each byte, each length field wrong in each way that
/// matters, tags and extension headers nested up to more than is read, fragments that overlap.
pub fn malformed() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for packet in well_formed() {
        let whole = ethernet(&[0x8100], &packet);
        frames.extend((0..=whole.len()).map(|length| whole[..length].to_vec()));
        for (at, width) in length_fields(&packet) {
            for value in wrong_lengths(packet.len(), width) {
                let mut packet = packet.clone();
                match width {
                    2 => packet[at..at + 2].copy_from_slice(&value.to_be_bytes()),
                    _ => packet[at] = value as u8,
                }
                frames.push(ethernet(&[], &packet));
            }
        }
        for depth in 0..5 {
            frames.push(ethernet(&vec![0x8100; depth], &packet));
            frames.push(ethernet(&vec![0x88a8; depth], &packet));
        }
    }
    frames.extend(chains().iter().chain(&overlapping()).map(|packet| ethernet(&[], packet)));
    frames
}

const HOSTS_V4: Ends = Ends::V4([10, 0, 1, 1], [10, 0, 0, 5]);

fn hosts_v6() -> Ends {
    let (mut src, mut dst) = ([0; 16], [0; 16]);
    (src[0], src[1], src[7], src[15]) = (0xfd, 0x77, 1, 1);
    (dst[0], dst[1], dst[15]) = (0xfd, 0x77, 5);
    Ends::V6(src, dst)
}

/// One packet of every kind, both families.
fn well_formed() -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    for ends in [HOSTS_V4, hosts_v6()] {
        let (icmp_proto, echo, error) =
            if matches!(ends, Ends::V4(..)) { (1, 8, 3) } else { (58, 128, 1) };
        let quoted = ip(ends.reversed(), 17, &udp(53, 40_000, b""));
        packets.extend([
            ip(ends, 6, &tcp(40_000, 80, 2, b"data")),
            ip(ends, 17, &udp(40_000, 53, b"question")),
            ip(ends, icmp_proto, &icmp(echo, 0, [0, 1, 0, 1], b"ping")),
            ip(ends, icmp_proto, &icmp(error, 1, [0; 4], &quoted)),
            ip(ends, 132, &[0; 12]),
            ip(ends, 47, &[0; 8]),
        ]);
    }
    let Ends::V6(src, dst) = hosts_v6() else { return packets };
    let chain =
        [&[60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0][..], &udp(1, 53, b"")].concat();
    packets.push(ipv6(src, dst, 0, 64, &chain));
    packets.push(ipv4([10, 0, 1, 1], [10, 0, 0, 5], 17, 0, &[1; 40], &udp(1, 53, b"")));
    packets
}

/// Places and widths of what says how long something is, or which version.
fn length_fields(packet: &[u8]) -> Vec<(usize, usize)> {
    let (mut fields, proto, l4) = if packet[0] >> 4 == 4 {
        (vec![(0, 1), (2, 2)], packet[9], usize::from(packet[0] & 15) * 4)
    } else {
        (vec![(0, 1), (4, 2)], packet[6], 40)
    };
    fields.extend(match proto {
        // Data offset.
        6 => vec![(l4 + 12, 1)],
        17 => vec![(l4 + 4, 2)],
        // Version and header length of what is quoted, and its own length.
        1 | 58 if packet.len() > l4 + 16 => vec![(l4 + 8, 1), (l4 + 10, 2), (l4 + 12, 2)],
        // Of two extension headers.
        0 => vec![(l4 + 1, 1), (l4 + 9, 1)],
        _ => vec![],
    });
    fields
}

/// Of a field with so many bytes: none, one header's, the true one, too much; and nibbles of versions and header lengths.
fn wrong_lengths(length: usize, width: usize) -> Vec<u16> {
    if width == 1 {
        let nibbles = [0x40, 0x44, 0x45, 0x46, 0x4f, 0x50, 0x5f, 0x60, 0x6f, 0xf0];
        return (0..8).chain(nibbles).chain([0xff]).collect();
    }
    let around = |n: usize| [n.saturating_sub(1), n, n + 1];
    [0, 8, 20, length, 0xfffe].into_iter().flat_map(around).map(|n| n as u16).collect()
}

/// IPv6 extension headers of one kind, none to more than are followed, and ones that name themselves as what follows.
fn chains() -> Vec<Vec<u8>> {
    let Ends::V6(src, dst) = hosts_v6() else { return Vec::new() };
    let mut packets = Vec::new();
    for header in [0, 43, 44, 51, 60] {
        for depth in 0..10 {
            for last in [17, 6, 59, header] {
                let mut payload = Vec::new();
                for n in (0..depth).rev() {
                    let next = if n == 0 { last } else { header };
                    payload.extend([next, u8::from(header == 51), 0, 0, 0, 0, 0, 0]);
                    payload.extend(if header == 51 { &[0; 4][..] } else { &[] });
                }
                payload.extend(tcp(40_000, 80, 2, b""));
                let first = if depth == 0 { last } else { header };
                packets.push(ipv6(src, dst, first, 64, &payload));
            }
        }
    }
    packets
}

/// Fragments of one datagram that overlap, come twice, in the wrong order and with other headers.
fn overlapping() -> Vec<Vec<u8>> {
    const MORE: u16 = 0x2000;
    let segment = tcp(40_000, 80, 2, &[0; 20]);
    let other = tcp(40_000, 22, 2, &[0; 20]);
    let datagram = udp(40_000, 53, &[0; 32]);
    let mut packets = Vec::new();
    for (proto, first, again) in [(6, &segment, &other), (17, &datagram, &other)] {
        for (offset, bytes) in [
            (2, &first[16..]),
            (MORE, &first[..]),
            (MORE | 1, &again[8..]),
            (MORE | 1, &again[..8]),
            (MORE, &again[..]),
            (MORE, &first[..8]),
            (2, &first[16..]),
            (MORE | 2, &again[..]),
            (0x1fff, &first[..8]),
            (MORE | 0x1fff, &first[..]),
            (0, &first[..]),
        ] {
            packets.push(ipv4([10, 0, 1, 1], [10, 0, 0, 5], proto, offset, &[], bytes));
            let Ends::V6(src, dst) = hosts_v6() else { continue };
            let [high, low] = ((offset & 0x1fff) << 3 | offset >> 13 & 1).to_be_bytes();
            let front = [&[proto, 0, high, low, 0, 0, 0, 9][..], bytes].concat();
            packets.push(ipv6(src, dst, 44, 64, &front));
        }
    }
    packets
}
