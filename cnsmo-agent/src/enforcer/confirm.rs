//! Commit-confirm: a change that cuts this VM off from its core is undone by the VM itself.
//!
//! The core confirms what it hears to be in force. A change that nobody confirms in time is undone. When the core is there
//! again it sends the same change again, and that is tried once more, because the core may just have been down; undone
//! a second time, the change is refused until it is another one.

use std::time::{Duration, Instant};

use crate::{
    desired::{DesiredSet, Difference},
    ledger::Record,
};

/// Times that one change is tried.
const TRIALS_MAX: u32 = 2;

/// Which change awaits its confirmation, and which one never got it.
#[derive(Debug, Default)]
pub(super) struct Confirmation {
    window: Duration,
    trial: Option<Trial>,
    undone: Option<Undone>,
}

#[derive(Debug)]
struct Trial {
    before: DesiredSet,
    until: Instant,
}

#[derive(Debug)]
struct Undone {
    change: Difference,
    times: u32,
}

impl Confirmation {
    /// Of what the ledger holds: the time begins anew.
    pub(super) fn of(record: &Record, now: Instant) -> Self {
        let window = Duration::from_millis(record.confirm_window_ms);
        let trial = |before: &Record| Trial {
            before: DesiredSet::from_record(before.clone()),
            until: now + window,
        };
        Self { window, trial: record.before.as_deref().map(trial), undone: None }
    }

    /// For the ledger.
    pub(super) fn keep_in(&self, record: &mut Record) {
        let before = self.trial.as_ref().map(|trial| trial.before.to_record(Vec::new()));
        record.confirm_window_ms = u64::try_from(self.window.as_millis()).unwrap_or(u64::MAX);
        record.before = before.map(Box::new);
    }

    /// Zero: changes need no confirmation.
    pub(super) fn within(&mut self, window: Duration) {
        self.window = window;
    }

    /// A change was sent by the core: what is in force has not cut it off. From here on the change itself is on trial.
    pub(super) fn begin(&mut self, before: DesiredSet, now: Instant) {
        self.trial = (!self.window.is_zero()).then(|| Trial { before, until: now + self.window });
    }

    /// Returns whether something was on trial.
    pub(super) fn end(&mut self) -> bool {
        self.trial.take().is_some()
    }

    /// The change has not cut the core off, nor would it if it came again. Returns as [`Self::end`].
    pub(super) fn confirmed(&mut self) -> bool {
        self.undone = None;
        self.end()
    }

    /// When the change is undone.
    pub(super) fn due(&self) -> Option<Instant> {
        self.trial.as_ref().map(|trial| trial.until)
    }

    /// What to go back to from `set`, if it is time.
    pub(super) fn undo(&mut self, set: &DesiredSet, now: Instant) -> Option<DesiredSet> {
        let Trial { before, .. } = self.trial.take_if(|trial| trial.until <= now)?;
        let change = set.difference(&before);
        let before_that = self.undone.take().filter(|undone| undone.change == change);
        let times = before_that.map_or(0, |undone| undone.times) + 1;
        self.undone = Some(Undone { change, times });
        Some(before)
    }

    /// Why `set` is not tried any more.
    pub(super) fn refuses(&self, set: &DesiredSet) -> Option<String> {
        let Undone { change, times } = self.undone.as_ref()?;
        let is_held_back = *times >= TRIALS_MAX && set.has(change);
        is_held_back.then(|| {
            format!("held back: each of {times} times the core could not be reached for {:?} after it, and it was undone", self.window)
        })
    }
}
