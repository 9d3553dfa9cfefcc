//! What operators have changed, and the way back.

use std::{collections::BTreeSet, time::SystemTime};

use cnsmo_proto::{
    model::{Invalid, Labels, Name},
    pb::resource::{Change, HistoryEntry, Kind, apply_request::Mode, change::Outcome},
};
use uuid::Uuid;

use super::{Body, Entry, Error, Plan, Revision, State, Wanted, Write, record};
use crate::identity::{from_ms, to_ms};

/// Changes that are remembered; older ones are forgotten.
pub const HISTORY_MAX: usize = 1_000;
/// Changed resources that are named in one entry; the rest is counted.
const CHANGES_MAX: usize = 100;
/// Kinds that operators write as a whole: what a rollback is about. A node is a fact.
const KINDS: [Kind; 4] =
    [Kind::FirewallPolicy, Kind::Network, Kind::LoadBalancer, Kind::Deployment];

/// Who asked for a change, and how.
#[derive(Clone, Debug)]
pub struct Note {
    /// Identity.
    pub by: String,
    /// Name of the call.
    pub call: &'static str,
    /// Of a rollback: the revision gone back to; otherwise 0.
    pub to_revision: Revision,
}

/// One change as it is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Remembered {
    /// Last part of its key.
    pub(super) id: String,
    /// Since 1970, as it is kept.
    pub(super) time_ms: u64,
    pub(super) by: String,
    pub(super) call: String,
    pub(super) changes: Vec<Change>,
    pub(super) changes_left_off: u32,
    /// Of a rollback; otherwise 0.
    pub(super) to_revision: Revision,
}

impl State {
    /// The plan, with the entry of the history that will tell of it.
    pub fn noted(&self, mut plan: Plan, note: &Note, now: SystemTime) -> Plan {
        if plan.is_empty() {
            return plan;
        }
        let changed = |change: &&Change| change.outcome() != Outcome::Unchanged;
        let changes: Vec<_> = plan.changes.iter().filter(changed).cloned().collect();
        let left_off = changes.len().saturating_sub(CHANGES_MAX);
        let remembered = Remembered {
            id: Uuid::now_v7().simple().to_string(),
            time_ms: to_ms(now),
            by: note.by.clone(),
            call: note.call.to_owned(),
            changes: changes.into_iter().take(CHANGES_MAX).collect(),
            changes_left_off: u32::try_from(left_off).unwrap_or(u32::MAX),
            to_revision: note.to_revision,
        };
        let forgotten = (self.history.len() + 1).saturating_sub(HISTORY_MAX);
        let forgotten = self.history.iter().take(forgotten);
        plan.writes.extend(forgotten.map(|(at, old)| Write::Forget(*at, old.id.clone())));
        plan.writes.push(Write::Remember(Box::new(remembered)));
        plan
    }

    /// The latest `limit` changes before a revision; 0: all. `kept`: the history of the store reaches back to here.
    pub fn history(&self, before: Revision, limit: usize, kept: Revision) -> Vec<HistoryEntry> {
        let before = if before == 0 { Revision::MAX } else { before };
        let latest = self.history.range(..before).rev().take(limit);
        let entry = |(revision, one): (&Revision, &Remembered)| HistoryEntry {
            revision: *revision,
            time: from_ms(one.time_ms).ok().map(Into::into),
            by: one.by.clone(),
            call: one.call.clone(),
            changes: one.changes.clone(),
            changes_left_off: one.changes_left_off,
            to_revision: one.to_revision,
            available: *revision >= kept,
        };
        latest.map(entry).collect()
    }

    /// Makes the resources what `entries` say: all of [`super::ROLLBACK_FOLDERS`] at some revision.
    pub fn plan_rollback(&self, entries: &[Entry], now: SystemTime) -> Result<Plan, Error> {
        let mut plan = Plan::default();
        let mut there = BTreeSet::new();
        for entry in entries {
            let wanted = wanted(entry).map_err(|e| {
                Error::Precondition(format!("the past cannot be read: {}", e.at(&entry.key)))
            })?;
            let (kind, name) = (wanted.kind(), wanted.name.to_string());
            let (outcome, write) = self.plan_one(wanted, Mode::Unspecified, now)?;
            if write.is_some() {
                plan.changes.push(change(kind, &name, outcome));
            }
            plan.writes.extend(write);
            there.insert((kind, name));
        }
        for kind in KINDS {
            for name in self.names(kind) {
                if !there.contains(&(kind, name.clone())) {
                    plan.changes.push(change(kind, &name, Outcome::Deleted));
                    plan.writes.push(Write::Delete(kind, name));
                }
            }
        }
        self.finish(plan)
    }
}

fn change(kind: Kind, name: &str, outcome: Outcome) -> Change {
    Change { kind: kind.into(), name: name.to_owned(), outcome: outcome.into() }
}

/// A resource as it was, as if it were asked for now.
fn wanted(entry: &Entry) -> Result<Wanted, Invalid> {
    let (metadata, body) = match record::read(entry)? {
        Write::Policy(old) => {
            (old.metadata, Body::Policy { spec: (*old.spec).clone(), view: old.model })
        }
        Write::Network(old) => {
            (old.metadata, Body::Network { spec: (*old.spec).clone(), network: old.model })
        }
        Write::Balancer(old) => {
            (old.metadata, Body::Balancer { spec: (*old.spec).clone(), balancer: old.model })
        }
        Write::Deployment(old) => {
            let (spec, deployment) = ((*old.spec).clone(), Box::new(old.model));
            (old.metadata, Body::Deployment { spec, deployment })
        }
        _ => return Err(Invalid::new("is not of a kind that operators write as a whole")),
    };
    Ok(Wanted { name: Name::new(metadata.name)?, labels: Labels::new(metadata.labels)?, body })
}
