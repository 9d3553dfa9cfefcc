//! When each rule was hit last.
//!
//! The data path counts and keeps no time, which would cost each packet a write more. A rule was hit between two looks at
//! its counter if that has grown, and looks are as frequent as reports.

use std::{collections::BTreeMap, time::SystemTime};

use cnsmo_proto::model::Name;

/// Policy and rule; those built in have none.
pub(super) type RuleName = Option<(Name, Name)>;

/// A rule at the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) packets: u64,
    /// `None`: never, or before there was somebody to look.
    pub(super) last: Option<SystemTime>,
}

/// What the looks have seen, by index of the rule.
#[derive(Debug, Default)]
pub(super) struct Hits {
    seen: Vec<Seen>,
    /// Nobody has looked yet: what the agent before this one has seen.
    before: Option<BTreeMap<(Name, Name), Seen>>,
}

impl Hits {
    pub(super) fn new(before: BTreeMap<(Name, Name), Seen>) -> Self {
        Self { seen: Vec::new(), before: Some(before) }
    }

    /// Rules have other places, some are new and some are gone.
    pub(super) fn rename(&mut self, old: &[RuleName], new: &[RuleName]) {
        if old == new {
            return;
        }
        let known: BTreeMap<_, _> = self.by_name(old).collect();
        let seen = |name: &RuleName| known.get(name.as_ref()?).copied();
        self.seen = new.iter().map(|name| seen(name).unwrap_or_default()).collect();
    }

    /// Looks at the packets of all rules there are.
    pub(super) fn look(
        &mut self,
        names: &[RuleName],
        packets: impl Iterator<Item = u64>,
        now: SystemTime,
    ) {
        if names.is_empty() {
            return;
        }
        self.seen.resize(names.len(), Seen::default());
        let before = self.before.take();
        for ((seen, name), packets) in self.seen.iter_mut().zip(names).zip(packets) {
            if let Some(before) = &before {
                // If it has grown, it was hit at any time since the other agent has looked.
                let known = name.as_ref().and_then(|name| before.get(name));
                let same = known.filter(|known| known.packets == packets);
                *seen = Seen { packets, last: same.and_then(|known| known.last) };
            } else if seen.packets != packets {
                *seen = Seen { packets, last: Some(now) };
            }
        }
    }

    /// Of rules with names.
    pub(super) fn by_name<'a>(
        &'a self,
        names: &'a [RuleName],
    ) -> impl Iterator<Item = (&'a (Name, Name), Seen)> {
        names.iter().zip(&self.seen).filter_map(|(name, seen)| Some((name.as_ref()?, *seen)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn name(text: &str) -> (Name, Name) {
        (Name::new("p").unwrap(), Name::new(text).unwrap())
    }

    fn names(all: &[&str]) -> Vec<RuleName> {
        // A rule that is built in has a place and no name.
        std::iter::once(None).chain(all.iter().map(|text| Some(name(text)))).collect()
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn look(hits: &mut Hits, all: &[&str], seconds: u64, packets: &[u64]) -> Vec<Option<u64>> {
        let all = names(all);
        hits.look(&all, std::iter::once(99).chain(packets.iter().copied()), at(seconds));
        let last = |seen: Seen| seen.last.map(|time| time.duration_since(at(0)).unwrap().as_secs());
        hits.by_name(&all).map(|(_, seen)| last(seen)).collect()
    }

    #[test]
    fn a_hit_is_of_the_look_that_saw_it() {
        let before = Seen { packets: 7, last: Some(at(1)) };
        let mut hits = Hits::new([(name("same"), before), (name("more"), before)].into());
        let all = ["idle", "more", "same"];
        assert_eq!(look(&mut hits, &all, 10, &[0, 9, 7]), [None, None, Some(1)]);
        assert_eq!(look(&mut hits, &all, 15, &[0, 10, 7]), [None, Some(15), Some(1)]);
        assert_eq!(look(&mut hits, &all, 20, &[1, 10, 7]), [Some(20), Some(15), Some(1)]);
    }

    #[test]
    fn it_stays_with_its_rule_when_rules_change_places() {
        let mut hits = Hits::new(BTreeMap::new());
        look(&mut hits, &["a", "b"], 10, &[0, 0]);
        look(&mut hits, &["a", "b"], 15, &[3, 4]);
        hits.rename(&names(&["a", "b"]), &names(&["new", "b", "unhit"]));
        let all = ["new", "b", "unhit"];
        assert_eq!(look(&mut hits, &all, 20, &[5, 4, 0]), [Some(20), Some(15), None]);
    }
}
