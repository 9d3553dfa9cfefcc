//! Virtual addresses, rings of backends, and how a flow finds its backend. All VMs with the same backends choose alike.

use crate::flow::Address;

/// Balancers on one VM: their rings take 64 KB each.
pub const BALANCERS_MAX: usize = 64;
/// Backends of one balancer: at sixteen slots of the ring per backend, shares differ by some percent at most.
pub const BACKENDS_PER_BALANCER_MAX: usize = 1_024;
/// Backends on one VM, each counted once.
pub const BACKENDS_MAX: usize = 8_192;
/// Services on one VM: all balancers with 8 addresses and 16 ports each.
pub const SERVICES_MAX: usize = BALANCERS_MAX * 8 * 16;

/// Slots of a Maglev ring: a prime, as its permutations need, and the largest below [`RING_STRIDE`]. Sixteen per backend
/// at the most backends, hundreds at the usual number.
pub const RING_SLOTS: usize = 16_381;
/// Slots from the beginning of one ring to that of the next.
pub const RING_STRIDE: usize = 16_384;
/// Slots of all rings: two halves per balancer.
pub const RINGS_LEN: usize = BALANCERS_MAX * 2 * RING_STRIDE;

/// A virtual address and port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    /// [`Address::widen`].
    pub address: [u8; 16],
    /// Network order.
    pub port: [u8; 2],
    /// IANA protocol number.
    pub proto: u8,
    /// 4 or 6.
    pub family: u8,
}
const _: () = assert!(size_of::<ServiceKey>() == 20);

/// What is behind a [`ServiceKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Place of the balancer.
    pub balancer: u16,
    /// Port of the backends, network order. Zero: each has its own.
    pub target: [u8; 2],
    /// One of [`algorithm`].
    pub algorithm: u8,
    /// 1: serves clients that come in by the network cards.
    pub gateway: u8,
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<Service>() == 8);

/// How a flow finds its slot.
pub mod algorithm {
    /// By a hash of both ends.
    pub const MAGLEV: u8 = 0;
    /// In turn.
    pub const ROUND_ROBIN: u8 = 1;
    /// By a hash of the client's address.
    pub const SOURCE: u8 = 2;
}

/// Where a backend is; all zeros: there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Backend {
    /// IPv4.
    pub v4: [u8; 4],
    /// IPv6.
    pub v6: [u8; 16],
    /// For services that name no port of their own, network order.
    pub port: [u8; 2],
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<Backend>() == 24);

/// The ring in force of one balancer, in one word: the first slot in the high half, the number of slots in the low half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring(pub u64);

impl Ring {
    /// `slots` from `first` on.
    pub const fn new(first: u32, slots: u32) -> Self {
        Self((first as u64) << 32 | slots as u64)
    }
    /// First slot.
    #[inline(always)]
    pub const fn first(self) -> u32 {
        (self.0 >> 32) as u32
    }
    /// Number of slots; 0: no backend.
    #[inline(always)]
    pub const fn slots(self) -> u32 {
        self.0 as u32
    }
    /// The place of the slot that `hash` falls on; without a division.
    #[inline(always)]
    pub const fn place(self, hash: u32) -> u32 {
        self.first().wrapping_add(((hash as u64 * self.slots() as u64) >> 32) as u32)
    }
}

/// First port that a gateway sends from for its clients: below the range from which Linux takes ports for programs.
pub const NAT_PORT_FIRST: u16 = 10_240;
/// Number of such ports.
pub const NAT_PORTS: u16 = 22_528;
const _: () = assert!(NAT_PORT_FIRST + NAT_PORTS == 32_768);
/// Ports tried for one flow; with nine of ten taken, five flows of six find one.
pub const NAT_TRIES: u32 = 16;

/// Words of a filter of destinations.
pub const FILTER_WORDS: usize = 64;

/// Word and bit of an address in a filter of destinations.
#[inline(always)]
pub fn filter_bit<A: Address>(address: A) -> (usize, u64) {
    let [high, low] = address.halves();
    let folded = (high >> 32) as u32 ^ high as u32 ^ (low >> 32) as u32 ^ low as u32;
    let hash = folded.wrapping_mul(0x9e37_79b1) >> 20;
    ((hash >> 6) as usize & (FILTER_WORDS - 1), 1 << (hash & 63))
}

/// One step of a hash: the seed, or what the words before gave, and a word.
#[inline(always)]
pub const fn mix(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ product >> 29
}

/// Where hashes of flows begin. The same on all VMs.
pub const SEED: u64 = 0x51_7c_c1_b7_27_22_0a_95;
