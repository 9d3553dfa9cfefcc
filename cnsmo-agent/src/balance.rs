//! Rings of backends: which slot of a balancer belongs to which backend.
//!
//! Pure, and the same on every VM: a flow that moves from one gateway to another meets the same backend.

use cnsmo_common::balance::{RING_SLOTS, SEED, mix};
use cnsmo_proto::model::Algorithm;

/// The ring of a balancer; `backends` with the numbers that stand for them, in any order. Empty without backends.
pub fn ring(algorithm: Algorithm, mut backends: Vec<(&str, u16)>) -> Vec<u16> {
    backends.sort_unstable();
    match algorithm {
        Algorithm::Maglev | Algorithm::Source => maglev(&backends),
        // A turn is a slot.
        Algorithm::RoundRobin => backends.into_iter().map(|(_, id)| id).collect(),
    }
}

/// Maglev hashing (Eisenbud et al., NSDI 2016, section 3.4): every backend takes in turn the next free slot of its own
/// permutation. All get the same number of slots but for one, and few slots change hands with a change of backends.
fn maglev(backends: &[(&str, u16)]) -> Vec<u16> {
    if backends.is_empty() {
        return Vec::new();
    }
    let mut walks: Vec<Walk> = backends.iter().map(|(name, _)| Walk::new(name)).collect();
    let mut slots = vec![None; RING_SLOTS];
    let mut left = RING_SLOTS;
    while left > 0 {
        for (walk, (_, id)) in walks.iter_mut().zip(backends).take(left) {
            let place = loop {
                let place = walk.step();
                if slots[place].is_none() {
                    break place;
                }
            };
            slots[place] = Some(*id);
            left -= 1;
        }
    }
    slots.into_iter().flatten().collect()
}

/// A permutation of the slots: their number is a prime, so any step visits them all.
struct Walk {
    at: usize,
    step: usize,
}

impl Walk {
    fn new(name: &str) -> Self {
        let hash = |seed| name.bytes().fold(seed, |hash, byte| mix(hash, byte.into()));
        let (offset, step) = (mix(hash(SEED), 0), mix(hash(!SEED), 1));
        let below = |hash: u64, bound: usize| (hash % bound as u64) as usize;
        Self { at: below(offset, RING_SLOTS), step: below(step, RING_SLOTS - 1) + 1 }
    }

    fn step(&mut self) -> usize {
        let at = self.at;
        self.at = (at + self.step) % RING_SLOTS;
        at
    }
}

#[cfg(test)]
mod tests;
