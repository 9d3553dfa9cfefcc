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
