//! The life of a service: its phases and the steps between them.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tokio::sync::watch;

/// States that are kept of one service: several lives of one that keeps failing.
pub const HISTORY_MAX: usize = 64;

/// Where a service is in its life. What only the core can see from outside, unreachable and lost, is not among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Its parts are being brought to the VM.
    Installing,
    /// Launched, does not answer yet.
    Starting,
    /// Does all of its work.
    Ready,
    /// Does a part of its work.
    Degraded,
    /// Finishes what it has, takes nothing new.
    Draining,
    /// Ended as asked.
    Stopped,
    /// Ended by itself.
    Failed,
}

/// Every step a service or its host may take. Anything else is refused and changes nothing.
const STEPS: [(Phase, Phase); 17] = [
    (Phase::Installing, Phase::Starting),
    (Phase::Installing, Phase::Failed),
    (Phase::Installing, Phase::Stopped),
    (Phase::Starting, Phase::Ready),
    (Phase::Starting, Phase::Failed),
    (Phase::Starting, Phase::Draining),
    (Phase::Ready, Phase::Degraded),
    (Phase::Ready, Phase::Draining),
    (Phase::Ready, Phase::Failed),
    (Phase::Degraded, Phase::Ready),
    (Phase::Degraded, Phase::Draining),
    (Phase::Degraded, Phase::Failed),
    (Phase::Draining, Phase::Stopped),
    (Phase::Draining, Phase::Failed),
    (Phase::Failed, Phase::Starting),
    (Phase::Failed, Phase::Stopped),
    (Phase::Stopped, Phase::Starting),
];

impl Phase {
    /// Whether a service may go from this phase to `to`.
    pub fn may_become(self, to: Self) -> bool {
        STEPS.contains(&(self, to))
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Installing => "installing",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Degraded => "degraded",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        })
    }
}

/// A phase, since when, and why.
#[derive(Clone, Debug)]
pub struct State {
    /// The phase.
    pub phase: Phase,
    /// CamelCase and stable: programs match on it.
    pub reason: &'static str,
    /// For people; may be empty.
    pub message: String,
    /// When the phase was entered.
    pub since: SystemTime,
}

/// A step that is not in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a service cannot go from {from} to {to}")]
pub struct IllegalStep {
    /// The phase it is in, and stays in.
    pub from: Phase,
    /// The phase asked for.
    pub to: Phase,
}

/// The state of one service. Clones share it.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    state: watch::Sender<State>,
    history: Arc<Mutex<History>>,
}

/// The latest states, the oldest first.
#[derive(Debug)]
struct History {
    states: VecDeque<State>,
    /// Entered since the beginning, those that are not kept any more too.
    entered: u64,
}

impl Lifecycle {
    /// Whether both are of one service.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.history, &other.history)
    }

    /// Begins with [`Phase::Installing`].
    pub fn new(reason: &'static str) -> Self {
        let (phase, since) = (Phase::Installing, SystemTime::now());
        let state = State { phase, reason, message: String::new(), since };
        let history = History { states: VecDeque::from([state.clone()]), entered: 1 };
        Self { state: watch::Sender::new(state), history: Arc::new(Mutex::new(history)) }
    }

    /// Takes a step, seen by all watchers.
    ///
    /// # Errors
    /// The step is not legal; nothing has changed.
    pub fn step(
        &self,
        to: Phase,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Result<(), IllegalStep> {
        let mut result = Ok(());
        self.state.send_if_modified(|state| {
            if !state.phase.may_become(to) {
                result = Err(IllegalStep { from: state.phase, to });
                return false;
            }
            let (message, since) = (message.into(), SystemTime::now());
            *state = State { phase: to, reason, message, since };
            let mut history = self.history();
            if history.states.len() == HISTORY_MAX {
                history.states.pop_front();
            }
            history.states.push_back(state.clone());
            history.entered += 1;
            true
        });
        result
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        self.state.borrow().phase
    }

    /// The state now and each later one; a slow watcher sees the latest.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// The states entered after the first `seen` ones, the oldest first, and how many have been entered by now. Of those that
    /// are long past only the last [`HISTORY_MAX`] are known.
    pub fn entered_after(&self, seen: u64) -> (Vec<State>, u64) {
        let history = self.history();
        let missing = usize::try_from(history.entered.saturating_sub(seen)).unwrap_or(usize::MAX);
        let known = history.states.len();
        let states = history.states.iter().skip(known.saturating_sub(missing)).cloned();
        (states.collect(), history.entered)
    }

    fn history(&self) -> MutexGuard<'_, History> {
        // Each change of it is whole before anything can panic.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Phase; 7] = [
        Phase::Installing,
        Phase::Starting,
        Phase::Ready,
        Phase::Degraded,
        Phase::Draining,
        Phase::Stopped,
        Phase::Failed,
    ];

    /// A row per phase: from `Installing` to `Failed`, the letters of the phases it may become.
    const LEGAL: [&str; 7] = ["SFO", "RFN", "DNF", "RNF", "OF", "S", "SO"];
    const LETTERS: [char; 7] = ['I', 'S', 'R', 'D', 'N', 'O', 'F'];

    /// The shortest way from the beginning to `phase`.
    fn in_phase(phase: Phase) -> Lifecycle {
        let way: &[Phase] = match phase {
            Phase::Installing => &[],
            Phase::Starting => &[Phase::Starting],
            Phase::Ready => &[Phase::Starting, Phase::Ready],
            Phase::Degraded => &[Phase::Starting, Phase::Ready, Phase::Degraded],
            Phase::Draining => &[Phase::Starting, Phase::Draining],
            Phase::Stopped => &[Phase::Stopped],
            Phase::Failed => &[Phase::Failed],
        };
        let life = Lifecycle::new("Spawned");
        for step in way {
            life.step(*step, "Test", "").unwrap();
        }
        life
    }

    #[test]
    fn every_pair_of_phases_is_taken_or_refused_as_the_table_says() {
        for (from, legal) in ALL.into_iter().zip(LEGAL) {
            for (to, letter) in ALL.into_iter().zip(LETTERS) {
                let life = in_phase(from);
                let result = life.step(to, "Test", "");
                if legal.contains(letter) {
                    assert_eq!(result, Ok(()), "{from} to {to}");
                    assert_eq!(life.phase(), to);
                } else {
                    assert_eq!(result, Err(IllegalStep { from, to }));
                    assert_eq!(life.phase(), from, "a refused step changes nothing");
                }
            }
        }
    }

    #[test]
    fn the_error_names_both_phases() {
        let error = in_phase(Phase::Draining).step(Phase::Starting, "Start", "").unwrap_err();
        assert_eq!(error.to_string(), "a service cannot go from draining to starting");
    }

    #[tokio::test]
    async fn watchers_see_the_phase_with_its_reason() {
        let life = Lifecycle::new("Spawned");
        let mut watch = life.watch();
        watch.mark_unchanged();
        life.step(Phase::Failed, "InstallFailed", "disk full").unwrap();
        watch.changed().await.unwrap();
        let state = watch.borrow_and_update().clone();
        assert_eq!((state.phase, state.reason), (Phase::Failed, "InstallFailed"));
        assert_eq!(state.message, "disk full");
        life.step(Phase::Ready, "Healthy", "").unwrap_err();
        assert!(!watch.has_changed().unwrap());
    }

    #[test]
    fn every_state_is_told_once_and_the_oldest_are_forgotten() {
        let life = Lifecycle::new("Spawned");
        life.step(Phase::Starting, "Start", "").unwrap();
        let (states, seen) = life.entered_after(0);
        let phases = |states: &[State]| states.iter().map(|s| s.phase).collect::<Vec<_>>();
        assert_eq!(phases(&states), [Phase::Installing, Phase::Starting]);
        life.step(Phase::Failed, "Crashed", "no luck").unwrap();
        life.step(Phase::Starting, "Restart", "").unwrap();
        assert!(life.step(Phase::Stopped, "Stop", "").is_err());
        let (states, seen) = life.entered_after(seen);
        assert_eq!(phases(&states), [Phase::Failed, Phase::Starting]);
        assert_eq!((states[0].reason, &*states[0].message), ("Crashed", "no luck"));
        assert_eq!(life.entered_after(seen).0.len(), 0);
        for _ in 0..HISTORY_MAX {
            life.step(Phase::Failed, "Crashed", "").unwrap();
            life.step(Phase::Starting, "Restart", "").unwrap();
        }
        let (states, now) = life.entered_after(seen);
        assert_eq!((states.len(), now - seen), (HISTORY_MAX, 2 * HISTORY_MAX as u64));
        assert_eq!(states[HISTORY_MAX - 1].phase, Phase::Starting);
    }
}
