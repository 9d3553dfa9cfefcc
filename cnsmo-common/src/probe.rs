//! Headers that the kernel classifies with a policy before it goes live.

/// One header of a self-check, in host order, or one header of a benchmark.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Source, two words, high first. IPv4: low 32 bits of the second.
    pub src: [u64; 2],
    /// Destination, likewise.
    pub dst: [u64; 2],
    /// Ports and protocol in lanes ([`crate::blob::lanes`]).
    pub lanes: u64,
    /// 0 ingress, 1 egress.
    pub direction: u8,
    /// 4 or 6.
    pub family: u8,
    /// Zero.
    pub pad: [u8; 22],
}
const _: () = assert!(size_of::<Header>() == 64);

/// Headers in one run; a power of two.
pub const TRACE_LEN: u32 = 4_096;

/// Bytes of a benchmark's headers: Ethernet, IPv6, TCP, and what makes whole words of them.
pub const BENCH_HEADERS: usize = 80;
const _: () = assert!(BENCH_HEADERS >= 14 + 40 + 20 && BENCH_HEADERS.is_multiple_of(8));

/// Result of a header: what classification answers when the blob is broken.
pub const BROKEN: u32 = u32::MAX;
