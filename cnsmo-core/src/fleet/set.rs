//! Sets of resources that are cheap to copy, and cheap to compare with an earlier copy of themselves.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use cnsmo_proto::digest::Digest;

use super::Revision;

/// Name of a resource, as agents know it: "firewall-policy/web", "member/office/web-1".
pub(super) type Key = Arc<str>;

/// Parts of a set that copies share until one of them changes. A set of 32,000 resources copies 500 for a change.
const SHARDS: usize = 64;

type Shard = BTreeMap<Key, Revision>;

/// Names and versions.
#[derive(Clone, Debug, Default)]
pub(super) struct Set {
    /// [`SHARDS`], or none of an empty set.
    shards: Arc<Vec<Arc<Shard>>>,
    digest: Digest,
}

impl Set {
    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    pub(super) fn get(&self, key: &str) -> Option<Revision> {
        self.shards.get(shard_of(key))?.get(key).copied()
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.shards.iter().flat_map(|shard| shard.keys())
    }

    /// Puts a resource in, in place of another version of it, or takes it out. Returns whether that changed the set.
    pub(super) fn put(&mut self, key: &str, version: Option<Revision>) -> bool {
        let old = self.get(key);
        if old == version {
            return false;
        }
        let shards = Arc::make_mut(&mut self.shards);
        if shards.is_empty() {
            *shards = vec![Arc::default(); SHARDS];
        }
        let shard = Arc::make_mut(&mut shards[shard_of(key)]);
        if let Some(old) = old {
            self.digest.remove(key, old);
            shard.remove(key);
        }
        if let Some(version) = version {
            self.digest.add(key, version);
            shard.insert(key.into(), version);
        }
        true
    }

    /// Calls `found` with what has another version than in `old`, or is not in either: its version here.
    fn differences<'a>(&'a self, old: &'a Self, found: &mut impl FnMut(&'a Key, Option<Revision>)) {
        if Arc::ptr_eq(&self.shards, &old.shards) {
            return;
        }
        let empty = &*EMPTY;
        for n in 0..SHARDS {
            let new = self.shards.get(n).unwrap_or(empty);
            let old = old.shards.get(n).unwrap_or(empty);
            if Arc::ptr_eq(new, old) {
                continue;
            }
            for (key, version) in new.iter() {
                if old.get(key) != Some(version) {
                    found(key, Some(*version));
                }
            }
            for key in old.keys().filter(|key| !new.contains_key(*key)) {
                found(key, None);
            }
        }
    }
}

static EMPTY: std::sync::LazyLock<Arc<Shard>> = std::sync::LazyLock::new(Arc::default);

fn shard_of(key: &str) -> usize {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    (hasher.finish() % SHARDS as u64) as usize
}

/// All that one node runs or shall run.
#[derive(Clone, Debug, Default)]
pub(super) struct Target {
    /// For it because of its labels.
    pub(super) own: Set,
    /// The same for all members of its network.
    pub(super) shared: Set,
}

impl Target {
    pub(super) fn digest(&self) -> Digest {
        self.own.digest + self.shared.digest
    }

    pub(super) fn get(&self, key: &str) -> Option<Revision> {
        self.own.get(key).or_else(|| self.shared.get(key))
    }

    /// Replaces or removes a resource that is in the set.
    pub(super) fn put(&mut self, key: &str, version: Option<Revision>) {
        let part = if self.shared.get(key).is_some() { &mut self.shared } else { &mut self.own };
        part.put(key, version);
    }

    /// What has another version than in `old`, or is not in either, by name: its version here.
    pub(super) fn differences<'a>(&'a self, old: &'a Self) -> BTreeMap<&'a Key, Option<Revision>> {
        let mut all = BTreeMap::new();
        let mut found = |key, version| {
            all.insert(key, version);
        };
        self.own.differences(&old.own, &mut found);
        self.shared.differences(&old.shared, &mut found);
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_is_what_was_put_and_differs_from_a_copy_by_what_came_after(
            edits in prop::collection::vec(("[a-d]{1,2}", prop::option::of(1_i64..4)), 0..64),
            copy_at in 0_usize..64,
        ) {
            let (mut set, mut plain) = (Set::default(), BTreeMap::new());
            let mut copies = (Set::default(), BTreeMap::new());
            for (n, (key, version)) in edits.into_iter().enumerate() {
                if n == copy_at {
                    copies = (set.clone(), plain.clone());
                }
                let old = match version {
                    Some(version) => plain.insert(Key::from(&*key), version),
                    None => plain.remove(&*key),
                };
                prop_assert_eq!(set.put(&key, version), old != version);
            }
            let whole: Digest = plain.iter().map(|(key, version)| (&**key, *version)).collect();
            prop_assert_eq!(set.digest(), whole);
            let mut got: Vec<_> = set.keys().map(|key| (key.clone(), set.get(key).unwrap())).collect();
            got.sort();
            prop_assert_eq!(got, plain.clone().into_iter().collect::<Vec<_>>());
            let (old, old_plain) = copies;
            let mut expected: BTreeMap<Key, Option<Revision>> = BTreeMap::new();
            for key in plain.keys().chain(old_plain.keys()) {
                if plain.get(key) != old_plain.get(key) {
                    expected.insert(key.clone(), plain.get(key).copied());
                }
            }
            let new = Target { shared: set, ..Target::default() };
            let old = Target { shared: old, ..Target::default() };
            let found: BTreeMap<Key, _> =
                new.differences(&old).into_iter().map(|(key, version)| (key.clone(), version)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
