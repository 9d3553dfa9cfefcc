//! The walker: finds the first rule that matches a packet in a blob laid out by [`cnsmo_common::blob`].
//!
//! The same code runs in the kernel, over a half of an array map, and on the host, over a slice. Its form is what the
//! verifier can follow: every index is a `u64` (32-bit ones are sign-extended by shift pairs, which make the verifier
//! lose the loops), and every loop has a constant bound.

use cnsmo_common::blob::{
    COUNT_AT, COUNT_MASK, DEPTH_MAX, DST_LONG_AT, GUARDS, INDEX_AT, LEAF, LEAF_RULES_MAX,
    LOWEST_AT, MASK_AT, MIN_INDEX_AT, NO_RULE, SHIFT_AT, SPLIT, SRC_LONG_AT, TARGET, TREES_MAX,
    WORD_AT, ZERO_AT,
};

/// Where the words of a blob are. `None` stands for "outside".
pub trait Memory {
    /// The word at `at`.
    fn word(&self, at: u64) -> Option<u64>;
    /// `N` words at `at`, which is a multiple of `N`.
    fn words<const N: usize>(&self, at: u64) -> Option<&[u64; N]>;
}

/// The fields of a packet that rules ask about, packed into words.
pub trait Key {
    /// Words of one rule in a leaf.
    const RULE_WORDS: u64;
    /// Word `n`; any value stands for `n` outside the key.
    fn word(&self, n: u64) -> u64;
    /// Index of the rule at `at`, and whether the rule matches.
    fn judge<M: Memory + ?Sized>(&self, memory: &M, at: u64) -> Option<(u64, bool)>;
}

/// IPv4.
#[derive(Clone, Copy, Debug)]
pub struct Key4 {
    addresses: u64,
    lanes: u64,
}

impl Key4 {
    /// Addresses in host order, and [`cnsmo_common::blob::lanes`].
    #[inline(always)]
    pub const fn new(src: u32, dst: u32, lanes: u64) -> Self {
        Self { addresses: (src as u64) << 32 | dst as u64, lanes }
    }
}

impl Key for Key4 {
    const RULE_WORDS: u64 = 4;

    #[inline(always)]
    fn word(&self, n: u64) -> u64 {
        // Arithmetic in place of a branch that no predictor can learn.
        self.addresses ^ ((self.addresses ^ self.lanes) & 0u64.wrapping_sub(n & 1))
    }

    /// Rule: addresses, masks, lower | index, upper.
    #[inline(always)]
    fn judge<M: Memory + ?Sized>(&self, memory: &M, at: u64) -> Option<(u64, bool)> {
        let &[addresses, masks, lower, upper] = memory.words::<4>(at)?;
        let miss = ((self.addresses ^ addresses) & masks) | outside(self.lanes, lower, upper);
        Some((lower >> INDEX_AT, miss == 0))
    }
}

/// IPv6.
#[derive(Clone, Copy, Debug)]
pub struct Key6([u64; 8]);

impl Key6 {
    /// Addresses as high and low half in host order, and [`cnsmo_common::blob::lanes`].
    #[inline(always)]
    pub const fn new(src: [u64; 2], dst: [u64; 2], lanes: u64) -> Self {
        // Padded to a power of two, so that a mask bounds the index.
        Self([src[0], src[1], dst[0], dst[1], lanes, 0, 0, 0])
    }
}

impl Key for Key6 {
    const RULE_WORDS: u64 = 8;

    #[inline(always)]
    fn word(&self, n: u64) -> u64 {
        self.0[(n & 7) as usize]
    }

    /// Rule: source, destination (two words each), partial masks, lower | index, upper | flags.
    ///
    /// A prefix is partial in one word of its address: the words above are exact, those below are free. The flag says
    /// in which.
    #[inline(always)]
    fn judge<M: Memory + ?Sized>(&self, memory: &M, at: u64) -> Option<(u64, bool)> {
        let &[src_high, src_low, dst_high, dst_low, src_mask, dst_mask, lower, upper] =
            memory.words::<8>(at)?;
        let src_long = ((upper << (63 - SRC_LONG_AT)) as i64 >> 63) as u64;
        let dst_long = ((upper << (63 - DST_LONG_AT)) as i64 >> 63) as u64;
        let miss = ((self.0[0] ^ src_high) & (src_mask | src_long))
            | ((self.0[1] ^ src_low) & (src_mask & src_long))
            | ((self.0[2] ^ dst_high) & (dst_mask | dst_long))
            | ((self.0[3] ^ dst_low) & (dst_mask & dst_long))
            | outside(self.0[4], lower, upper);
        Some((lower >> INDEX_AT, miss == 0))
    }
}

/// Lowest index of a matching rule, [`NO_RULE`], or `None` if the blob is broken: the packet must be dropped.
///
/// `header_at` is the place of the direction's header, 0 for ingress or [`cnsmo_common::blob::HEADER_WORDS`] for
/// egress, `trees` the number of trees behind it.
#[inline(always)]
pub fn classify<K: Key, M: Memory + ?Sized>(
    key: &K,
    memory: &M,
    header_at: u64,
    trees: u64,
) -> Option<u32> {
    // The verifier must not know that this is zero: mixed into `best`, it erases what each path has learnt about it, so
    // that all paths of one tree meet in one state.
    let zero = memory.word(header_at + ZERO_AT as u64)?;
    let mut best = NO_RULE as u64;
    for tree in 0..TREES_MAX as u64 {
        best ^= zero;
        if tree >= trees || memory.word(header_at + MIN_INDEX_AT as u64 + tree)? >= best {
            break;
        }
        let mut node = memory.word(header_at + tree)?;
        for _ in 0..DEPTH_MAX {
            if node & LEAF != 0 {
                break;
            }
            node = step(key, memory, node)?;
        }
        if node & LEAF == 0 {
            return None;
        }
        if (node >> LOWEST_AT) & NO_RULE as u64 >= best {
            continue;
        }
        let mut left = (node >> COUNT_AT) & COUNT_MASK;
        let mut at = node & TARGET;
        for _ in 0..LEAF_RULES_MAX {
            if left == 0 {
                break;
            }
            let (index, matches) = key.judge(memory, at)?;
            if index >= best {
                break;
            }
            if matches {
                best = index;
                break;
            }
            left -= 1;
            at += K::RULE_WORDS;
        }
    }
    Some(best as u32)
}

#[inline(always)]
fn step<K: Key, M: Memory + ?Sized>(key: &K, memory: &M, node: u64) -> Option<u64> {
    let target = node & TARGET;
    let value = key.word(node >> WORD_AT);
    let shift = (node >> SHIFT_AT) as u32;
    if node & SPLIT == 0 {
        let part = value.wrapping_shr(shift) & (node >> MASK_AT) & 0xff;
        return memory.word(target + part);
    }
    let &[threshold, low, high, _] = memory.words::<4>(target)?;
    Some(if value.wrapping_shl(shift) <= threshold { low } else { high })
}

/// Zero if every lane lies between `lower` and `upper`.
#[inline(always)]
fn outside(lanes: u64, lower: u64, upper: u64) -> u64 {
    !((lanes | GUARDS).wrapping_sub(lower) & upper.wrapping_sub(lanes)) & GUARDS
}

/// A blob in user space. A misaligned group of words is outside: the kernel would read another one.
impl Memory for [u64] {
    fn word(&self, at: u64) -> Option<u64> {
        self.get(usize::try_from(at).ok()?).copied()
    }

    fn words<const N: usize>(&self, at: u64) -> Option<&[u64; N]> {
        let at = usize::try_from(at).ok()?;
        if !at.is_multiple_of(N) {
            return None;
        }
        self.get(at..)?.first_chunk()
    }
}

#[cfg(test)]
mod tests {
    use cnsmo_common::blob::{HEADER_WORDS, lanes};

    use super::*;

    /// One tree in the ingress header: a leaf with one rule.
    fn blob(rule: [u64; 4]) -> Vec<u64> {
        let mut words = vec![0; 2 * HEADER_WORDS as usize];
        let index = rule[2] >> INDEX_AT;
        words[0] = LEAF | 1 << COUNT_AT | index << LOWEST_AT | words.len() as u64;
        words[MIN_INDEX_AT as usize] = index;
        words.extend(rule);
        words
    }

    fn https_to_10(index: u64) -> [u64; 4] {
        let lower = lanes(0, 443, 6) | index << INDEX_AT;
        [0x0a00_0000, 0xff00_0000, lower, lanes(u16::MAX, 443, 6) | GUARDS]
    }

    #[test]
    fn a_rule_matches_inside_its_bounds_only() {
        let blob = blob(https_to_10(7));
        let judge = |dst, sport, dport, proto| {
            classify(&Key4::new(1, dst, lanes(sport, dport, proto)), blob.as_slice(), 0, 1)
        };
        assert_eq!(judge(0x0a01_0203, 40_000, 443, 6), Some(7));
        assert_eq!(judge(0x0aff_ffff, u16::MAX, 443, 6), Some(7));
        for (dst, dport, proto) in [
            (0x0b00_0000, 443, 6),
            (0x0a00_0000, 442, 6),
            (0x0a00_0000, 444, 6),
            (0x0a00_0000, 443, 7),
        ] {
            assert_eq!(judge(dst, 0, dport, proto), Some(NO_RULE), "{dst:x} {dport} {proto}");
        }
    }

    #[test]
    fn a_direction_without_trees_has_no_rule() {
        let blob = blob(https_to_10(7));
        let key = Key4::new(1, 0x0a00_0000, lanes(1, 443, 6));
        assert_eq!(classify(&key, blob.as_slice(), HEADER_WORDS.into(), 0), Some(NO_RULE));
    }

    #[test]
    fn a_broken_blob_is_told_from_no_rule() {
        let key = Key4::new(1, 0x0a00_0000, lanes(1, 443, 6));
        let whole = blob(https_to_10(7));
        assert_eq!(classify(&key, &whole[..whole.len() - 1], 0, 1), None, "cut off");
        // A cut node that leads to itself.
        let mut endless = whole;
        endless[0] = 0;
        assert_eq!(classify(&key, endless.as_slice(), 0, 1), None, "endless");
    }
}
