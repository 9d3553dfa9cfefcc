//! Compiles the policy of one VM into the words that the data path's walker searches.
//!
//! A rule becomes one box per combination of networks and port ranges ([`BOXES_MAX`]); the boxes of one family and
//! direction become up to eight trees; the trees become words laid out by [`cnsmo_common::blob`]. Each step has a
//! bound that the walker or memory sets. A policy that breaks one is refused, never cut short: a rule left out silently
//! is a hole in a firewall.

pub mod actions;
mod boxes;
mod emit;
mod family;
mod random;
pub mod reference;
pub mod sample;
#[cfg(test)]
mod tests;
pub mod trace;
mod tree;

use std::{cmp::Reverse, collections::BTreeMap, fmt, net::IpAddr};

use cnsmo_common::blob::{DEPTH_MAX, HEADER_WORDS, NO_RULE, TARGET, lanes};
use cnsmo_ebpf::classify::{Key4, Key6, classify};
use cnsmo_proto::model::{Direction, Name};
use rayon::prelude::*;

pub use boxes::BOXES_MAX;

use self::{
    boxes::direction_index,
    emit::emit,
    family::{Family, RuleBox, V4, V6},
    trace::Header,
    tree::{Bounds, COPIES_MAX, Tree, plant},
};
use crate::{datapath::ApplyError, effective::Effective};

/// What the loaded data path has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Words in one half, of each family.
    pub blob_words: usize,
    /// Rules of both directions together. An index has [`cnsmo_common::blob::INDEX_BITS`] bits: more than
    /// [`NO_RULE`] are never taken.
    pub rules: usize,
}

/// A policy in the data path's form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// For IPv4 packets.
    pub v4: FamilyBlob,
    /// For IPv6 packets.
    pub v6: FamilyBlob,
}

/// The blob of one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyBlob {
    /// Contents of a half from its first word: ingress header, egress header, nodes and rules.
    pub words: Vec<u64>,
    /// Trees for ingress and for egress.
    pub trees: [u32; 2],
    /// How it came out.
    pub stats: Stats,
}

/// Measures of a blob.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Combinations of networks and port ranges.
    pub boxes: usize,
    /// Steps from a root to the deepest leaf.
    pub depth: u32,
    /// Boxes in the longest leaf.
    pub longest_leaf: usize,
    /// Boxes in all leaves that are stored.
    pub leaf_rules: usize,
}

/// The policy cannot be compiled within its bounds.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The policies at fault, and why. Without them the rest may fit.
    #[error("refused: {0:?}")]
    Policies(BTreeMap<Name, String>),
    /// The rules built into the agent do not fit by themselves: a fault of the agent, not of a policy.
    #[error("built-in rules: {0}")]
    BuiltIn(String),
}

impl From<Refused> for ApplyError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Policies(policies) => Self::Refused(policies),
            built_in @ Refused::BuiltIn(_) => Self::Failed(Box::new(built_in)),
        }
    }
}

/// Compiles both families. Equal input gives equal output.
///
/// # Errors
///
/// [`Refused`] names the policy with the largest share of what broke a bound, and in it the rule with the largest
/// share.
pub fn compile(policy: &Effective, limits: &Limits) -> Result<Compiled, Refused> {
    let max = limits.rules.min(NO_RULE as usize);
    let total = policy.rules.len();
    if total > max {
        let breach = Breach::new(Budget::Rules { total, max }, 0..total as u32);
        return Err(refuse(policy, [breach]));
    }
    actions::check_limits(policy).map_err(|breach| refuse(policy, [breach]))?;
    let boxes = boxes::expand(policy).map_err(|breach| refuse(policy, [breach]))?;
    let blobs = rayon::join(
        || family_blob::<V4, 5>(&boxes.v4, limits.blob_words),
        || family_blob::<V6, 7>(&boxes.v6, limits.blob_words),
    );
    match blobs {
        (Ok(v4), Ok(v6)) => Ok(Compiled { v4, v6 }),
        (v4, v6) => Err(refuse(policy, [v4.err(), v6.err()].into_iter().flatten())),
    }
}

impl Compiled {
    /// Walks the words on the host, as the data path does: the index of the first rule that matches, [`NO_RULE`], or
    /// `None` if the words are broken.
    pub fn classify(&self, header: &Header) -> Option<u32> {
        let lanes = lanes(header.sport, header.dport, header.proto);
        self.classify_lanes(header.src, header.dst, lanes, header.direction)
    }

    /// As [`Self::classify`], with ports and protocol as [`lanes`] packs them.
    pub fn classify_lanes(
        &self,
        src: IpAddr,
        dst: IpAddr,
        lanes: u64,
        direction: Direction,
    ) -> Option<u32> {
        let direction = direction_index(direction);
        let header_at = u64::from(HEADER_WORDS) * direction as u64;
        let walk = |blob: &FamilyBlob| u64::from(blob.trees[direction]);
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let key = Key4::new(src.to_bits(), dst.to_bits(), lanes);
                classify(&key, self.v4.words.as_slice(), header_at, walk(&self.v4))
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let halves = |bits: u128| [(bits >> 64) as u64, bits as u64];
                let key = Key6::new(halves(src.to_bits()), halves(dst.to_bits()), lanes);
                classify(&key, self.v6.words.as_slice(), header_at, walk(&self.v6))
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Some(NO_RULE),
        }
    }
}

impl FamilyBlob {
    /// Two headers without trees.
    fn empty() -> Self {
        let words = vec![0; 2 * HEADER_WORDS as usize];
        Self { words, trees: [0; 2], stats: Stats::default() }
    }
}

/// A bound that a policy can break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Budget {
    Rules { total: usize, max: usize },
    Boxes { total: usize },
    Limits { total: usize },
    Depth,
    Copies,
    Blob { words_max: usize },
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rules { total, max } => {
                write!(f, "{total} rules select this VM, the data path holds {max}")
            }
            Self::Boxes { total } => write!(
                f,
                "the rules of this VM are {total} combinations of networks and ports, at most {BOXES_MAX} are allowed"
            ),
            Self::Limits { total } => {
                let max = actions::LIMITED_RULES_MAX;
                write!(f, "{total} rules of this VM have a limit, at most {max} are allowed")
            }
            Self::Depth => {
                write!(f, "rules overlap so that a search would take more than {DEPTH_MAX} steps")
            }
            Self::Copies => write!(
                f,
                "rules overlap so that the compiled form would hold each over {COPIES_MAX} times"
            ),
            Self::Blob { words_max } => {
                write!(f, "the compiled rules need more than the {} bytes there are", words_max * 8)
            }
        }
    }
}

/// A broken bound, and how many boxes of each rule had a part in it.
#[derive(Debug)]
struct Breach {
    budget: Budget,
    shares: Vec<(u32, usize)>,
}

impl Breach {
    /// `rules` in order, one for each box.
    fn new(budget: Budget, rules: impl IntoIterator<Item = u32>) -> Self {
        let mut shares: Vec<(u32, usize)> = Vec::new();
        for rule in rules {
            match shares.last_mut() {
                Some((last, boxes)) if *last == rule => *boxes += 1,
                _ => shares.push((rule, 1)),
            }
        }
        Self { budget, shares }
    }
}

/// Of each breach, blames the policy with the largest share; of equal ones the one that is asked last.
fn refuse(policy: &Effective, breaches: impl IntoIterator<Item = Breach>) -> Refused {
    let mut refused = BTreeMap::new();
    let mut built_in = String::new();
    for Breach { budget, shares } in breaches {
        /// Boxes, the rule with most of them, and how many those are.
        struct Share {
            boxes: usize,
            rule: (Reverse<usize>, u32),
        }
        let mut policies: BTreeMap<&Name, Share> = BTreeMap::new();
        for (index, boxes) in shares {
            let Some(name) = &policy.rules[index as usize].policy else { continue };
            let rule = (Reverse(boxes), index);
            let share = policies.entry(name).or_insert(Share { boxes: 0, rule });
            share.boxes = share.boxes.saturating_add(boxes);
            share.rule = share.rule.min(rule);
        }
        match policies.into_iter().max_by_key(|(_, share)| (share.boxes, share.rule.1)) {
            Some((name, Share { boxes, rule: (Reverse(most), index) })) => {
                let rule = &policy.rules[index as usize].rule.name;
                refused.entry(name.clone()).or_insert(format!(
                    "{budget}; {boxes} of them are of this policy, {most} of its rule `{rule}`"
                ));
            }
            None => built_in = budget.to_string(),
        }
    }
    if refused.is_empty() { Refused::BuiltIn(built_in) } else { Refused::Policies(refused) }
}

/// Boxes from which separations are tried: the best length depends on the kind of the prefixes, not on their number.
const SAMPLE_BOXES: usize = 4_096;

fn family_blob<F: Family<D>, const D: usize>(
    boxes: &[Vec<RuleBox<D>>; 2],
    words_max: usize,
) -> Result<FamilyBlob, Breach> {
    let words_max = words_max.min(TARGET as usize);
    let mut blob = FamilyBlob::empty();
    for (direction, boxes) in boxes.iter().enumerate() {
        let trees = best_trees::<F, D>(boxes)?;
        let header_at = direction * HEADER_WORDS as usize;
        blob.trees[direction] = trees.len() as u32;
        blob.stats.boxes += boxes.len();
        emit::<F, D>(boxes, &trees, header_at, &mut blob, words_max).map_err(
            |emit::Overflow| {
                let all = boxes.iter();
                Breach::new(Budget::Blob { words_max }, all.map(|b| b.rule))
            },
        )?;
    }
    Ok(blob)
}

/// Separates at the prefix length that promises the fewest words and keeps all bounds.
fn best_trees<F: Family<D>, const D: usize>(boxes: &[RuleBox<D>]) -> Result<Vec<Tree>, Breach> {
    let mut lengths = F::SEPARATE_AT.to_vec();
    if lengths.len() > 1 {
        let every = boxes.len().div_ceil(SAMPLE_BOXES).max(1);
        let sample: Vec<_> = boxes.iter().step_by(every).copied().collect();
        let words = |&length: &u32| {
            let trees = plant::<F, D>(&sample, length, Bounds::tight(sample.len())).ok()?;
            let mut blob = FamilyBlob::empty();
            emit::<F, D>(&sample, &trees, 0, &mut blob, usize::MAX).ok()?;
            Some(blob.words.len())
        };
        lengths.par_sort_by_cached_key(|length| words(length).unwrap_or(usize::MAX));
    }
    let mut last_breach = None;
    for bounds in [Bounds::tight(boxes.len()), Bounds::loose(boxes.len())] {
        for &length in &lengths {
            match plant::<F, D>(boxes, length, bounds) {
                Ok(trees) => return Ok(trees),
                Err(breach) => last_breach = Some(breach),
            }
        }
    }
    match last_breach {
        Some(breach) => Err(breach),
        None => unreachable!("a family separates somewhere"),
    }
}
