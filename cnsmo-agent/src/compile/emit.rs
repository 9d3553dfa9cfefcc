//! Trees as words.

use std::{collections::HashMap, marker::PhantomData};

use cnsmo_common::blob::{
    COUNT_AT, LEAF, LOWEST_AT, MASK_AT, MIN_INDEX_AT, NO_RULE, SHIFT_AT, SPLIT, WORD_AT,
};

use super::{
    FamilyBlob,
    family::{Family, RuleBox},
    tree::{Node, Tree},
};

/// Words of a cache line; what is smaller than one never crosses one.
const LINE_WORDS: usize = 8;

/// The words exceed the half they are for.
#[derive(Debug)]
pub(super) struct Overflow;

/// Appends the trees of one direction and fills in its header.
pub(super) fn emit<F: Family<D>, const D: usize>(
    boxes: &[RuleBox<D>],
    trees: &[Tree],
    header_at: usize,
    blob: &mut FamilyBlob,
    words_max: usize,
) -> Result<(), Overflow> {
    let mut emitter =
        Emitter::<F, D> { boxes, leaves: HashMap::new(), blob, words_max, family: PhantomData };
    for (n, tree) in trees.iter().enumerate() {
        let reference = emitter.node(&tree.root, 0)?;
        let words = &mut emitter.blob.words;
        words[header_at + n] = reference;
        words[header_at + MIN_INDEX_AT as usize + n] = boxes[tree.first as usize].rule.into();
    }
    Ok(())
}

struct Emitter<'a, F, const D: usize> {
    boxes: &'a [RuleBox<D>],
    /// References of the leaves so far: equal ones are stored once.
    leaves: HashMap<&'a [u32], u64>,
    blob: &'a mut FamilyBlob,
    words_max: usize,
    family: PhantomData<fn() -> F>,
}

impl<'a, F: Family<D>, const D: usize> Emitter<'a, F, D> {
    /// Returns the reference to a node.
    fn node(&mut self, node: &'a Node, depth: u32) -> Result<u64, Overflow> {
        self.blob.stats.depth = self.blob.stats.depth.max(depth);
        match node {
            Node::Leaf(list) => self.leaf(list),
            Node::Cut { dimension, shift, children } => {
                let at = self.allocate(children.len())?;
                for (n, child) in children.iter().enumerate() {
                    self.blob.words[at + n] = self.node(child, depth + 1)?;
                }
                let dimension = &F::DIMENSIONS[*dimension];
                Ok(at as u64
                    | (u64::from(dimension.shift + shift) << SHIFT_AT)
                    | ((children.len() as u64 - 1) << MASK_AT)
                    | (u64::from(dimension.word) << WORD_AT))
            }
            Node::Split { dimension, threshold, children } => {
                let at = self.allocate(4)?;
                let low = self.node(&children[0], depth + 1)?;
                let high = self.node(&children[1], depth + 1)?;
                let dimension = &F::DIMENSIONS[*dimension];
                // The key is shifted left until the field is on top: fields above it are gone, those below it meet
                // ones in the threshold.
                let up = 64 - dimension.shift - dimension.bits;
                let free = 64 - dimension.bits;
                let threshold = (threshold << free) | !(u64::MAX << free);
                self.blob.words[at..at + 3].copy_from_slice(&[threshold, low, high]);
                Ok(at as u64
                    | (u64::from(up) << SHIFT_AT)
                    | (u64::from(dimension.word) << WORD_AT)
                    | SPLIT)
            }
        }
    }

    fn leaf(&mut self, list: &'a [u32]) -> Result<u64, Overflow> {
        if let Some(&reference) = self.leaves.get(list) {
            return Ok(reference);
        }
        let lowest = list.first().map_or(NO_RULE, |&n| self.boxes[n as usize].rule);
        // A multiple of a rule's words, so that each rule is aligned.
        let at = self.allocate(list.len() * F::RULE_WORDS)?;
        let rules = self.blob.words[at..].chunks_exact_mut(F::RULE_WORDS);
        for (words, &n) in rules.zip(list) {
            F::encode(&self.boxes[n as usize], words);
        }
        let stats = &mut self.blob.stats;
        stats.longest_leaf = stats.longest_leaf.max(list.len());
        stats.leaf_rules += list.len();
        let reference =
            LEAF | ((list.len() as u64) << COUNT_AT) | (u64::from(lowest) << LOWEST_AT) | at as u64;
        self.leaves.insert(list, reference);
        Ok(reference)
    }

    /// Zeroed words that cross no more cache lines than they must.
    fn allocate(&mut self, n: usize) -> Result<usize, Overflow> {
        let words = &mut self.blob.words;
        let align = n.next_power_of_two().min(LINE_WORDS);
        let at = words.len().next_multiple_of(align);
        if at + n > self.words_max {
            return Err(Overflow);
        }
        words.resize(at + n, 0);
        Ok(at)
    }
}
