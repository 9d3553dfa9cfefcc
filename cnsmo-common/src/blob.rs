//! Layout of a classifier blob, shared by the compiler and the walker, and the bounds of both.
//!
//! A blob is an array of 64-bit words in one half of an array map's only value. Words are host-endian.
//!
//! ```text
//! header      per direction (ingress at 0, egress at HEADER_WORDS): words 0..8 root reference per tree,
//!             8..16 lowest rule index per tree, 16 always zero, 17..24 unused
//! reference   bits 0..32 target (word) | 32..38 shift | 40..48 mask | 48..51 key word | 62 SPLIT
//!   leaf      bits 0..32 first rule (word) | 32..37 rules | 40..61 lowest rule index | 63 LEAF
//! cut node    2^n references; next = word[target + ((key[word] >> shift) & mask)]
//! split node  threshold, reference low, reference high, unused (4 words, aligned)
//!             next = (key[word] << shift) <= threshold ? low : high
//! rule        IPv4 4 words, IPv6 8 words, aligned to its size; see `judge` of the walker's keys
//! ```
//!
//! The index in a rule is the rule's place in the policy: several boxes (one per CIDR and port range) of one rule share
//! it. The lowest index that matches wins.

/// Trees in one blob and direction.
pub const TREES_MAX: u32 = 8;
/// Steps from a root to a leaf.
pub const DEPTH_MAX: u32 = 40;
/// Rules in one leaf.
pub const LEAF_RULES_MAX: u32 = 16;

/// Words in one direction's header.
pub const HEADER_WORDS: u32 = 24;
/// Place of the lowest rule index of each tree in a header.
pub const MIN_INDEX_AT: u32 = 8;
/// Place of a word that is always zero in a header.
pub const ZERO_AT: u32 = 16;

/// Marks a reference to a leaf.
pub const LEAF: u64 = 1 << 63;
/// Marks a reference to a split node.
pub const SPLIT: u64 = 1 << 62;
/// Mask of a reference's target.
pub const TARGET: u64 = 0xffff_ffff;
/// Place of a cut's shift in a reference.
pub const SHIFT_AT: u32 = 32;
/// Place of a cut's mask in a reference.
pub const MASK_AT: u32 = 40;
/// Place of the key word's number in a reference.
pub const WORD_AT: u32 = 48;
/// Place of the number of rules in a leaf reference.
pub const COUNT_AT: u32 = 32;
/// Mask of the number of rules, after shifting.
pub const COUNT_MASK: u64 = 31;
/// Place of the lowest rule index in a leaf reference.
pub const LOWEST_AT: u32 = 40;

/// Bits of a rule index.
pub const INDEX_BITS: u32 = 21;
/// The highest index means "no rule".
pub const NO_RULE: u32 = (1 << INDEX_BITS) - 1;

/// The last key word holds ports and protocol in lanes, each with a guard bit above it that is clear in a key and in a
/// lower bound, and set in an upper bound: one subtraction compares three fields at once.
pub const SPORT_AT: u32 = 0;
/// Place of the destination port, or of the ICMP type (high byte) and code (low byte).
pub const DPORT_AT: u32 = 17;
/// Place of the protocol number.
pub const PROTO_AT: u32 = 34;
/// All guard bits.
pub const GUARDS: u64 = (1 << 16) | (1 << 33) | (1 << 42);
/// In a rule, `lower` carries the rule index above the lanes.
pub const INDEX_AT: u32 = 43;
/// In an IPv6 rule, `upper` says per address whether the partial mask belongs to the low half.
pub const SRC_LONG_AT: u32 = 63;
/// As [`SRC_LONG_AT`], for the destination.
pub const DST_LONG_AT: u32 = 62;

/// Packs ports and protocol into lanes. ICMP: `sport` 0, `dport` type << 8 | code.
#[inline(always)]
pub const fn lanes(sport: u16, dport: u16, proto: u8) -> u64 {
    (sport as u64) << SPORT_AT | (dport as u64) << DPORT_AT | (proto as u64) << PROTO_AT
}
