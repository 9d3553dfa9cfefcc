//! Boxes in the two address families, and how a leaf stores them.

use cnsmo_common::blob::{
    DPORT_AT, DST_LONG_AT, GUARDS, INDEX_AT, PROTO_AT, SPORT_AT, SRC_LONG_AT, lanes,
};
use ipnet::{Ipv4Net, Ipv6Net};

/// Both ends included.
pub(super) type Range = (u64, u64);

/// A range per dimension: what one combination of a rule's networks and ports matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RuleBox<const D: usize> {
    pub(super) low: [u64; D],
    pub(super) high: [u64; D],
    /// Place of the rule in the policy.
    pub(super) rule: u32,
}

impl<const D: usize> RuleBox<D> {
    fn new(dimensions: [Range; D], rule: u32) -> Self {
        Self { low: dimensions.map(|d| d.0), high: dimensions.map(|d| d.1), rule }
    }
}

/// Where a dimension lies in the key, and whether it can be cut into equal parts.
pub(super) struct Dimension {
    pub(super) word: u32,
    pub(super) shift: u32,
    pub(super) bits: u32,
    pub(super) address: bool,
}

impl Dimension {
    const fn address(word: u32, shift: u32, bits: u32) -> Self {
        Self { word, shift, bits, address: true }
    }

    const fn lane(word: u32, shift: u32, bits: u32) -> Self {
        Self { word, shift, bits, address: false }
    }

    pub(super) const fn highest(&self) -> u64 {
        u64::MAX >> (64 - self.bits)
    }
}

/// An address family. The last three of its `D` dimensions are source port, destination port and protocol.
pub(super) trait Family<const D: usize>: Sync {
    type Net: Copy;
    const DIMENSIONS: [Dimension; D];
    /// Words of one rule in a leaf.
    const RULE_WORDS: usize;
    /// Prefix lengths that are tried for the separation of boxes into trees.
    const SEPARATE_AT: &'static [u32];

    fn rule_box(src: Self::Net, dst: Self::Net, lanes: [Range; 3], rule: u32) -> RuleBox<D>;

    /// Of source and destination.
    fn prefix_lengths(rule_box: &RuleBox<D>) -> (u32, u32);

    /// Appends [`Self::RULE_WORDS`] words.
    fn encode(rule_box: &RuleBox<D>, words: &mut [u64]);
}

pub(super) struct V4;
pub(super) struct V6;

impl Family<5> for V4 {
    type Net = Ipv4Net;
    const DIMENSIONS: [Dimension; 5] = [
        Dimension::address(0, 32, 32),
        Dimension::address(0, 0, 32),
        Dimension::lane(1, SPORT_AT, 16),
        Dimension::lane(1, DPORT_AT, 16),
        Dimension::lane(1, PROTO_AT, 8),
    ];
    const RULE_WORDS: usize = 4;
    const SEPARATE_AT: &'static [u32] = &[4, 8, 12, 16];

    fn rule_box(src: Ipv4Net, dst: Ipv4Net, lanes: [Range; 3], rule: u32) -> RuleBox<5> {
        let range = |net: Ipv4Net| {
            (u64::from(net.network().to_bits()), u64::from(net.broadcast().to_bits()))
        };
        let [sport, dport, proto] = lanes;
        RuleBox::new([range(src), range(dst), sport, dport, proto], rule)
    }

    fn prefix_lengths(b: &RuleBox<5>) -> (u32, u32) {
        (32 - free_bits(b.low[0], b.high[0]), 32 - free_bits(b.low[1], b.high[1]))
    }

    fn encode(b: &RuleBox<5>, words: &mut [u64]) {
        let addresses = (b.low[0] << 32) | b.low[1];
        let masks = !(((b.low[0] ^ b.high[0]) << 32) | (b.low[1] ^ b.high[1]));
        let (lower, upper) = lane_bounds(b);
        words.copy_from_slice(&[addresses, masks, lower, upper]);
    }
}

impl Family<7> for V6 {
    type Net = Ipv6Net;
    const DIMENSIONS: [Dimension; 7] = [
        Dimension::address(0, 0, 64),
        Dimension::address(1, 0, 64),
        Dimension::address(2, 0, 64),
        Dimension::address(3, 0, 64),
        Dimension::lane(4, SPORT_AT, 16),
        Dimension::lane(4, DPORT_AT, 16),
        Dimension::lane(4, PROTO_AT, 8),
    ];
    const RULE_WORDS: usize = 8;
    const SEPARATE_AT: &'static [u32] = &[16, 28, 32, 48, 64];

    fn rule_box(src: Ipv6Net, dst: Ipv6Net, lanes: [Range; 3], rule: u32) -> RuleBox<7> {
        let halves = |net: Ipv6Net| {
            let (low, high) = (net.network().to_bits(), net.broadcast().to_bits());
            [((low >> 64) as u64, (high >> 64) as u64), (low as u64, high as u64)]
        };
        let ([src_high, src_low], [dst_high, dst_low]) = (halves(src), halves(dst));
        let [sport, dport, proto] = lanes;
        RuleBox::new([src_high, src_low, dst_high, dst_low, sport, dport, proto], rule)
    }

    fn prefix_lengths(b: &RuleBox<7>) -> (u32, u32) {
        let length = |at: usize| match free_bits(b.low[at], b.high[at]) {
            0 => 128 - free_bits(b.low[at + 1], b.high[at + 1]),
            free => 64 - free,
        };
        (length(0), length(2))
    }

    fn encode(b: &RuleBox<7>, words: &mut [u64]) {
        // The half of an address that may be neither exact nor free.
        let partial = |at: usize| {
            let long = b.low[at] == b.high[at];
            let half = at + usize::from(long);
            (!(b.low[half] ^ b.high[half]), u64::from(long))
        };
        let ((src_mask, src_long), (dst_mask, dst_long)) = (partial(0), partial(2));
        let (lower, upper) = lane_bounds(b);
        let upper = upper | (src_long << SRC_LONG_AT) | (dst_long << DST_LONG_AT);
        let [src_high, src_low, dst_high, dst_low, ..] = b.low;
        words.copy_from_slice(&[
            src_high, src_low, dst_high, dst_low, src_mask, dst_mask, lower, upper,
        ]);
    }
}

fn free_bits(low: u64, high: u64) -> u32 {
    64 - (low ^ high).leading_zeros()
}

/// Lower bound with the rule index above it, and upper bound.
fn lane_bounds<const D: usize>(b: &RuleBox<D>) -> (u64, u64) {
    let pack = |ends: &[u64; D]| lanes(ends[D - 3] as u16, ends[D - 2] as u16, ends[D - 1] as u8);
    (pack(&b.low) | (u64::from(b.rule) << INDEX_AT), pack(&b.high) | GUARDS)
}
