//! The numbers of open flows, compared with the flows there are.
//!
//! The data path counts a flow when it is known from both ends and when both ends have closed it. It cannot see that one
//! expires, and CPUs that meet may miss one. So after each whole round of the sweep a number that has not changed in that
//! time and is not that of the flows seen is corrected.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use aya::maps::{HashMap, MapData, MapError};
use cnsmo_common::control::BucketKey;

use super::sys::Batches;

/// Numbers per system call.
const BATCH: usize = 4_096;

/// Open flows by source and group.
pub(super) type Numbers = BTreeMap<BucketKey, u64>;

pub(super) struct OpenFlows {
    fd: OwnedFd,
    map: HashMap<MapData, BucketKey, u64>,
    batches: Batches<BucketKey, u64>,
    /// When the round of a family ended last: IPv4, IPv6.
    before: [Numbers; 2],
}

impl OpenFlows {
    pub(super) fn new(fd: OwnedFd, map: HashMap<MapData, BucketKey, u64>) -> Self {
        Self { fd, map, batches: Batches::new(BATCH), before: Default::default() }
    }

    /// After a whole round over the flows of one family, of which `seen` are counted.
    pub(super) fn correct(&mut self, v6: bool, seen: &Numbers) -> io::Result<()> {
        let mut now = self.numbers(v6)?;
        for (key, number) in corrections(&self.before[usize::from(v6)], &now, seen) {
            let written = match number {
                0 => self.map.remove(&key),
                _ => self.map.insert(key, number, 0),
            };
            match written {
                // Gone by itself: the source was forgotten.
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(error) => return Err(io::Error::other(error)),
            }
            now.insert(key, number);
        }
        self.before[usize::from(v6)] = now;
        Ok(())
    }

    fn numbers(&mut self, v6: bool) -> io::Result<Numbers> {
        let mut numbers = Numbers::new();
        loop {
            let (entries, done) = self.batches.next(self.fd.as_fd())?;
            numbers.extend(entries.filter(|(key, _)| is_v6(key) == v6));
            if done {
                return Ok(numbers);
            }
        }
    }
}

/// An IPv4 source has its address at the end, an IPv6 source its network at the start.
fn is_v6(key: &BucketKey) -> bool {
    key.source[..8] != [0; 8]
}

/// What is to be written where the numbers stayed as they were for a round and are not those of the flows.
fn corrections(before: &Numbers, now: &Numbers, seen: &Numbers) -> Vec<(BucketKey, u64)> {
    let is_settled = |key: &BucketKey| before.get(key) == now.get(key);
    let wrong = now.iter().filter_map(|(key, number)| {
        let seen = seen.get(key).copied().unwrap_or_default();
        (*number != seen && is_settled(key)).then_some((*key, seen))
    });
    let forgotten = seen.iter().filter(|(key, _)| !now.contains_key(key) && is_settled(key));
    wrong.chain(forgotten.map(|(key, number)| (*key, *number))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers<const N: usize>(entries: [(u8, u64); N]) -> Numbers {
        entries.map(|(last, number)| (key(last), number)).into()
    }

    fn key(last: u8) -> BucketKey {
        let mut source = [0; 16];
        source[15] = last;
        BucketKey { source, limit: 1 }
    }

    #[test]
    fn what_rests_and_is_wrong_is_corrected() {
        let now = numbers([(1, 5), (2, 5), (3, 5), (4, 5), (5, 0)]);
        // 2 has changed meanwhile, 4 is new.
        let before = numbers([(1, 5), (2, 4), (3, 5), (5, 0)]);
        // 3 is right; of 1 some have expired, of 6 the number was forgotten.
        let seen = numbers([(1, 2), (3, 5), (4, 1), (6, 7)]);
        assert_eq!(corrections(&before, &now, &seen), [(key(1), 2), (key(6), 7)]);
        assert_eq!(corrections(&now, &now, &Numbers::new()).len(), 4, "none is left");
        assert_eq!(corrections(&Numbers::new(), &Numbers::new(), &Numbers::new()), []);
    }

    #[test]
    fn families_are_told_apart() {
        assert!(!is_v6(&key(9)));
        let mut source = [0; 16];
        source[..4].copy_from_slice(&[0x20, 1, 0xd, 0xb8]);
        assert!(is_v6(&BucketKey { source, limit: 1 }));
    }
}
