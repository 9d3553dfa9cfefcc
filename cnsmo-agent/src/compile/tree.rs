//! Boxes as search trees: separation by prefix length, then cuts and splits.
//!
//! A cut divides the smallest aligned block of addresses that holds the boxes of a node into equal parts, one step for
//! up to 256 of them. A split divides any dimension at the median of the boxes' ends. Wide boxes would be copied into
//! many parts; hence the separation into trees whose boxes are alike.

use std::{
    marker::PhantomData,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use cnsmo_common::blob::{DEPTH_MAX, LEAF_RULES_MAX, TREES_MAX};
use rayon::prelude::*;

use super::{
    Breach, Budget,
    family::{Family, Range, RuleBox},
};

/// More boxes than this below one node are built by all threads.
const PARALLEL_FROM: usize = 1_000;
/// The most parts of a cut, as a power of two.
const CUT_BITS_MAX: u32 = 8;
/// Wide cuts are shallower: a split must cost less than this share of the best cut.
const SPLIT_ADVANTAGE: f64 = 0.9;

pub(super) enum Node {
    /// Positions of boxes, in order.
    Leaf(Vec<u32>),
    /// Part `n` holds values whose bits from `shift` are `n`; the bits above are not looked at.
    Cut { dimension: usize, shift: u32, children: Vec<Node> },
    /// At most `threshold`, and above.
    Split { dimension: usize, threshold: u64, children: Box<[Node; 2]> },
}

pub(super) struct Tree {
    /// Position of its first box.
    pub(super) first: u32,
    pub(super) root: Node,
}

/// Bounds of one set of trees.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub(super) depth: u32,
    /// Boxes in all leaves together. A box that spans several parts is in several leaves.
    pub(super) leaf_rules: usize,
}

impl Bounds {
    /// Ten copies of each box; the worst measured real set needs 9.4.
    pub(super) fn of(boxes: usize) -> Self {
        Self { depth: DEPTH_MAX, leaf_rules: boxes * 10 + 1_000 }
    }
}

/// Builds the trees of `boxes`, first box first. Prefixes up to `separate_at` bits are wide.
pub(super) fn plant<F: Family<D>, const D: usize>(
    boxes: &[RuleBox<D>],
    separate_at: u32,
    bounds: Bounds,
) -> Result<Vec<Tree>, Breach> {
    let builder = Builder::<F, D> {
        boxes,
        bounds,
        leaf_rules: AtomicUsize::new(0),
        too_deep: Mutex::new(None),
        family: PhantomData,
    };
    let mut groups = vec![Vec::new(); 4];
    for (position, rule_box) in boxes.iter().enumerate() {
        let (src, dst) = F::prefix_lengths(rule_box);
        let group = usize::from(src <= separate_at) | (usize::from(dst <= separate_at) << 1);
        groups[group].push(position as u32);
    }
    let mut trees = Vec::new();
    let whole = || FURTHER.as_slice();
    let mut pending: Vec<_> =
        groups.into_iter().filter(|g| !g.is_empty()).map(|g| (g, whole())).collect();
    while let Some((group, further)) = pending.pop() {
        match builder.tree(&group) {
            Ok(root) => trees.push(Tree { first: group[0], root }),
            Err(breach) => {
                // Two more groups in place of this one.
                if trees.len() + pending.len() + 2 > TREES_MAX as usize {
                    return Err(breach);
                }
                let Some((any, not, further)) = builder.separate(&group, further) else {
                    return Err(breach);
                };
                pending.extend([(any, further), (not, further)]);
            }
        }
    }
    trees.sort_unstable_by_key(|tree| tree.first);
    Ok(trees)
}

/// A group that breaks a bound is separated by "any or not" of these dimensions, counted from the last: destination
/// port, source port, protocol.
const FURTHER: [usize; 3] = [2, 3, 1];

type Area<const D: usize> = [Range; D];

/// A choice and its cost.
type Best = Option<(Choice, f64)>;

#[derive(Clone, Copy)]
enum Choice {
    Cut { dimension: usize, cut: Cut },
    Split { dimension: usize, threshold: u64 },
}

/// `1 << bits` parts of `1 << shift` values, from `base`.
#[derive(Clone, Copy)]
struct Cut {
    base: u64,
    bits: u32,
    shift: u32,
}

struct Builder<'a, F, const D: usize> {
    boxes: &'a [RuleBox<D>],
    bounds: Bounds,
    /// In the leaves so far.
    leaf_rules: AtomicUsize,
    /// Boxes of a node that could not be built, the first in order, so that the report does not depend on threads.
    too_deep: Mutex<Option<Vec<u32>>>,
    family: PhantomData<fn() -> F>,
}

impl<F: Family<D>, const D: usize> Builder<'_, F, D> {
    fn tree(&self, group: &[u32]) -> Result<Node, Breach> {
        let area: Area<D> = F::DIMENSIONS.map(|dimension| (0, dimension.highest()));
        let before = self.leaf_rules.load(Ordering::Relaxed);
        let root = self.build(self.until_covering(group, &area), area, 0);
        let too_deep = self.too_deep.lock().unwrap_or_else(PoisonError::into_inner).take();
        let breach = if self.leaf_rules.load(Ordering::Relaxed) > self.bounds.leaf_rules {
            Breach::new(Budget::Copies, group.iter().map(|&n| self.boxes[n as usize].rule))
        } else if let Some(list) = too_deep {
            Breach::new(Budget::Depth, list.iter().map(|&n| self.boxes[n as usize].rule))
        } else {
            return Ok(root);
        };
        self.leaf_rules.store(before, Ordering::Relaxed);
        Err(breach)
    }

    /// By the first dimension that separates anything; the rest is left for the parts.
    fn separate<'f>(
        &self,
        group: &[u32],
        further: &'f [usize],
    ) -> Option<(Vec<u32>, Vec<u32>, &'f [usize])> {
        further.iter().enumerate().find_map(|(tried, from_last)| {
            let d = D - from_last;
            let is_any = |&n: &u32| {
                let b = &self.boxes[n as usize];
                (b.low[d], b.high[d]) == (0, F::DIMENSIONS[d].highest())
            };
            let (any, not): (Vec<u32>, Vec<u32>) = group.iter().copied().partition(is_any);
            (!any.is_empty() && !not.is_empty()).then(|| (any, not, &further[tried + 1..]))
        })
    }

    /// A breach is noted in `self`; the tree is then of no use.
    fn build(&self, list: Vec<u32>, area: Area<D>, depth: u32) -> Node {
        if list.len() <= LEAF_RULES_MAX as usize {
            self.leaf_rules.fetch_add(list.len(), Ordering::Relaxed);
            return Node::Leaf(list);
        }
        let mut best = None;
        for (d, _) in F::DIMENSIONS.iter().enumerate().filter(|(_, dimension)| dimension.address) {
            self.consider_cuts(&list, &area, d, &mut best);
        }
        for d in 0..D {
            self.consider_split(&list, &area, d, &mut best);
        }
        let copies = self.leaf_rules.load(Ordering::Relaxed) > self.bounds.leaf_rules;
        // Without a choice every box covers the area, and all but one had been dropped.
        let (Some((choice, _)), true, false) = (best, depth < self.bounds.depth, copies) else {
            self.note_too_deep(list);
            return Node::Leaf(Vec::new());
        };
        let children = match choice {
            Choice::Cut { dimension, cut } => self.cut(&list, &area, dimension, cut),
            Choice::Split { dimension, threshold } => {
                self.split(&list, &area, dimension, threshold)
            }
        };
        let parallel = list.len() > PARALLEL_FROM;
        drop(list);
        let build = |(list, area)| self.build(list, area, depth + 1);
        match choice {
            Choice::Split { dimension, threshold } => {
                let Ok([low, high]) = <[_; 2]>::try_from(children) else {
                    unreachable!("a split has two sides")
                };
                let (low, high) = if parallel {
                    rayon::join(|| build(low), || build(high))
                } else {
                    (build(low), build(high))
                };
                Node::Split { dimension, threshold, children: Box::new([low, high]) }
            }
            Choice::Cut { dimension, cut } => {
                let children = if parallel {
                    children.into_par_iter().map(build).collect()
                } else {
                    children.into_iter().map(build).collect()
                };
                Node::Cut { dimension, shift: cut.shift, children }
            }
        }
    }

    fn note_too_deep(&self, list: Vec<u32>) {
        let mut noted = self.too_deep.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.as_ref().is_none_or(|noted| list < *noted) {
            *noted = Some(list);
        }
    }

    fn covers(&self, position: u32, area: &Area<D>) -> bool {
        let b = &self.boxes[position as usize];
        (0..D).all(|d| b.low[d] <= area[d].0 && b.high[d] >= area[d].1)
    }

    /// Boxes after one that covers the whole area can never be the first match.
    fn until_covering(&self, list: &[u32], area: &Area<D>) -> Vec<u32> {
        let end = list.iter().position(|&n| self.covers(n, area)).map_or(list.len(), |at| at + 1);
        list[..end].to_vec()
    }

    fn cut(&self, list: &[u32], area: &Area<D>, d: usize, cut: Cut) -> Vec<(Vec<u32>, Area<D>)> {
        let parts = 1usize << cut.bits;
        let part = |k: usize| {
            let first = cut.base + ((k as u64) << cut.shift);
            (first, first + ((1u64 << cut.shift) - 1))
        };
        // Values outside the block land in some part too: only if the block is the whole side does a part bound what
        // lands in it, and may a box that covers the part alone hide later ones.
        let exact = area[d] == (cut.base, part(parts - 1).1);
        let mut children: Vec<_> = (0..parts)
            .map(|k| {
                let mut child = *area;
                if exact {
                    child[d] = part(k);
                }
                (Vec::new(), child)
            })
            .collect();
        let mut hidden = vec![false; parts];
        for &n in list {
            let b = &self.boxes[n as usize];
            let (first, last) = parts_of((b.low[d], b.high[d]), area[d], cut);
            let covers_others =
                (0..D).all(|e| e == d || b.low[e] <= area[e].0 && b.high[e] >= area[e].1);
            for k in first..=last {
                if hidden[k] {
                    continue;
                }
                let (list, child) = &mut children[k];
                list.push(n);
                hidden[k] = covers_others && b.low[d] <= child[d].0 && b.high[d] >= child[d].1;
            }
        }
        children
    }

    fn split(
        &self,
        list: &[u32],
        area: &Area<D>,
        d: usize,
        threshold: u64,
    ) -> Vec<(Vec<u32>, Area<D>)> {
        let (mut low, mut high) = (*area, *area);
        low[d].1 = threshold;
        high[d].0 = threshold + 1;
        let (mut below, mut above) = (Vec::new(), Vec::new());
        let (mut below_hidden, mut above_hidden) = (false, false);
        for &n in list {
            let b = &self.boxes[n as usize];
            if b.low[d] <= threshold && !below_hidden {
                below.push(n);
                below_hidden = self.covers(n, &low);
            }
            if b.high[d] > threshold && !above_hidden {
                above.push(n);
                above_hidden = self.covers(n, &high);
            }
        }
        vec![(below, low), (above, high)]
    }

    fn consider_cuts(&self, list: &[u32], area: &Area<D>, d: usize, best: &mut Best) {
        let Some(finest) = self.finest_cut(list, area[d], d) else { return };
        // The parts each box touches in the finest cut; coarser cuts only shift these.
        let touched: Vec<(u16, u16)> = list
            .iter()
            .map(|&n| {
                let b = &self.boxes[n as usize];
                let (first, last) = parts_of((b.low[d], b.high[d]), area[d], finest);
                (first as u16, last as u16)
            })
            .collect();
        for bits in (1..=finest.bits).rev() {
            let coarser = finest.bits - bits;
            let Some(cost) = cut_cost(&touched, coarser, bits) else { continue };
            if best.is_none_or(|(_, least)| cost < least) {
                let cut = Cut { base: finest.base, bits, shift: finest.shift + coarser };
                *best = Some((Choice::Cut { dimension: d, cut }, cost));
            }
        }
    }

    /// Of the smallest aligned block that holds all boxes but those that span the whole side.
    fn finest_cut(&self, list: &[u32], side: Range, d: usize) -> Option<Cut> {
        let (mut least, mut most) = (u64::MAX, 0);
        for &n in list {
            let b = &self.boxes[n as usize];
            if b.low[d] > side.0 || b.high[d] < side.1 {
                least = least.min(b.low[d].max(side.0));
                most = most.max(b.high[d].min(side.1));
            }
        }
        if least >= most {
            return None;
        }
        let block_bits = 64 - (least ^ most).leading_zeros();
        let bits = block_bits.min(match list.len() {
            4_097.. => CUT_BITS_MAX,
            257.. => 6,
            65.. => 5,
            _ => 4,
        });
        let base = least & u64::MAX.checked_shl(block_bits).unwrap_or(0);
        Some(Cut { base, bits, shift: block_bits - bits })
    }

    fn consider_split(&self, list: &[u32], area: &Area<D>, d: usize, best: &mut Best) {
        let mut ends = Vec::with_capacity(list.len() * 2);
        for &n in list {
            let b = &self.boxes[n as usize];
            if b.low[d] > area[d].0 {
                ends.push(b.low[d] - 1);
            }
            if b.high[d] < area[d].1 {
                ends.push(b.high[d]);
            }
        }
        if ends.is_empty() {
            return;
        }
        let middle = ends.len() / 2;
        let threshold = *ends.select_nth_unstable(middle).1;
        let (mut left, mut right) = (0usize, 0usize);
        for &n in list {
            let b = &self.boxes[n as usize];
            left += usize::from(b.low[d] <= threshold);
            right += usize::from(b.high[d] > threshold);
        }
        if left >= list.len() && right >= list.len() {
            return;
        }
        let (left, right, n) = (left as f64, right as f64, list.len() as f64);
        let cost = part_cost(left * left + right * right, left.max(right), left + right, n);
        if best.is_none_or(|(_, least)| cost < least * SPLIT_ADVANTAGE) {
            *best = Some((Choice::Split { dimension: d, threshold }, cost));
        }
    }
}

/// First and last part that a range touches.
fn parts_of(range: Range, side: Range, cut: Cut) -> (usize, usize) {
    if range.0 <= side.0 && range.1 >= side.1 {
        return (0, (1 << cut.bits) - 1);
    }
    let part = |value: u64| ((value - cut.base) >> cut.shift) as usize;
    (part(range.0.max(side.0)), part(range.1.min(side.1)))
}

/// Of a cut into `1 << bits` parts, from the parts of the finest cut. None: it separates too little for its copies.
fn cut_cost(touched: &[(u16, u16)], coarser: u32, bits: u32) -> Option<f64> {
    let n = touched.len();
    let parts = 1usize << bits;
    if parts > 4 * n {
        return None;
    }
    let mut change = [0i32; (1 << CUT_BITS_MAX) + 1];
    let mut total = 0;
    for &(first, last) in touched {
        let (first, last) = (usize::from(first >> coarser), usize::from(last >> coarser));
        total += last - first + 1;
        change[first] += 1;
        change[last + 1] -= 1;
    }
    let (mut here, mut largest, mut squares) = (0, 0, 0.0);
    for change in &change[..parts] {
        here += change;
        largest = largest.max(here);
        squares += f64::from(here) * f64::from(here);
    }
    let copies = if n > 256 { 1.6 } else { 2.0 };
    if largest as usize >= n || total as f64 > n as f64 * copies + parts as f64 {
        return None;
    }
    Some(part_cost(squares, largest.into(), total as f64, n as f64))
}

/// The boxes a packet has left, on average and at worst, times the copies made.
fn part_cost(squares: f64, largest: f64, total: f64, n: f64) -> f64 {
    (squares / total + largest * 0.5) * total / n
}
