//! temp
use cnsmo_common::blob::*;

/// Where the words of a blob are. `None` stands for "outside": the caller must drop the packet.
pub trait Memory {
    fn word(&self, at: u64) -> Option<u64>;
    /// `N` words inside one element; `at` is a multiple of `N`.
    fn words<const N: usize>(&self, at: u64) -> Option<&[u64; N]>;
}

/// A packet's fields packed into words.
pub trait Key {
    const RULE_WORDS: u64;
    fn word(&self, n: u64) -> u64;
    /// Index and whether the rule at `at` matches.
    fn judge<M: Memory + ?Sized>(&self, memory: &M, at: u64) -> Option<(u64, bool)>;
}

/// Zero if every lane of `ports` lies between `lower` and `upper`.
#[inline(always)]
fn outside(ports: u64, lower: u64, upper: u64) -> u64 {
    !((ports | GUARDS).wrapping_sub(lower) & upper.wrapping_sub(ports)) & GUARDS
}

pub struct Key4 {
    pub addresses: u64,
    pub ports: u64,
}

impl Key for Key4 {
    const RULE_WORDS: u64 = 4;
    #[inline(always)]
    fn word(&self, n: u64) -> u64 {
        // Arithmetic instead of a branch that no predictor can learn.
        self.addresses ^ ((self.addresses ^ self.ports) & 0u64.wrapping_sub(n & 1))
    }
    /// Rule: addresses, masks, lower | index, upper.
    #[inline(always)]
    fn judge<M: Memory + ?Sized>(&self, memory: &M, at: u64) -> Option<(u64, bool)> {
        let &[addresses, masks, lower, upper] = memory.words::<4>(at)?;
        let miss = (self.addresses ^ addresses) & masks | outside(self.ports, lower, upper);
        Some((lower >> INDEX_AT, miss == 0))
    }
}

/// Source and destination, two words each, then ports; padded so that an index can be masked.
pub struct Key6(pub [u64; 8]);

impl Key for Key6 {
    const RULE_WORDS: u64 = 8;
    #[inline(always)]
    fn word(&self, n: u64) -> u64 {
        self.0[(n & 7) as usize]
    }
    /// Rule: source, destination (2 words each), partial masks, lower | index, upper | flags.
    /// A prefix is partial in one word of the address only; the flag says in which.
    #[inline(always)]
    fn judge<M: Memory + ?Sized>(&self, memory: &M, at: u64) -> Option<(u64, bool)> {
        let &[src_hi, src_lo, dst_hi, dst_lo, src_mask, dst_mask, lower, upper] =
            memory.words::<8>(at)?;
        let src_long = ((upper << (63 - SRC_LONG_AT)) as i64 >> 63) as u64;
        let dst_long = ((upper << (63 - DST_LONG_AT)) as i64 >> 63) as u64;
        let miss = (self.0[0] ^ src_hi) & (src_mask | src_long)
            | (self.0[1] ^ src_lo) & (src_mask & src_long)
            | (self.0[2] ^ dst_hi) & (dst_mask | dst_long)
            | (self.0[3] ^ dst_lo) & (dst_mask & dst_long)
            | outside(self.0[4], lower, upper);
        Some((lower >> INDEX_AT, miss == 0))
    }
}

#[inline(always)]
fn step<K: Key, M: Memory + ?Sized>(key: &K, memory: &M, node: u64) -> Option<u64> {
    let target = node & TARGET;
    let value = key.word(node >> WORD_AT);
    let shift = (node >> SHIFT_AT) as u32;
    if node & SPLIT == 0 {
        let part = value.wrapping_shr(shift) & node >> MASK_AT & 0xff;
        return memory.word(target + part);
    }
    let &[threshold, low, high, _] = memory.words::<4>(target)?;
    Some(if value.wrapping_shl(shift) <= threshold { low } else { high })
}

/// Lowest index of a matching rule, `NO_RULE`, or `None` if the blob is broken.
#[inline(always)]
pub fn classify<K: Key, M: Memory + ?Sized>(key: &K, memory: &M, header: u64, trees: u64) -> Option<u32> {
    // The verifier must not know that this is zero: mixed into `best`, it erases what each path has
    // learnt about it, so that all paths of one tree meet in one state.
    let zero = memory.word(header + ZERO_AT as u64)?;
    let mut best = NO_RULE as u64;
    for tree in 0..TREES_MAX as u64 {
        best ^= zero;
        if tree >= trees || memory.word(header + MIN_INDEX_AT as u64 + tree)? >= best {
            break;
        }
        let mut node = memory.word(header + tree)?;
        for _ in 0..DEPTH_MAX {
            if node & LEAF != 0 {
                break;
            }
            node = step(key, memory, node)?;
        }
        if node & LEAF == 0 {
            return None;
        }
        if node >> LOWEST_AT & NO_RULE as u64 >= best {
            continue;
        }
        let mut left = node >> COUNT_AT & COUNT_MASK;
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

/// A blob in user space.
impl Memory for [u64] {
    fn word(&self, at: u64) -> Option<u64> {
        self.get(at as usize).copied()
    }
    fn words<const N: usize>(&self, at: u64) -> Option<&[u64; N]> {
        assert!(at as usize % N == 0, "misaligned blob");
        self.get(at as usize..at as usize + N)?.try_into().ok()
    }
}
