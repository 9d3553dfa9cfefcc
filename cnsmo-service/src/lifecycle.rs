//! The life of a service: its phases and the steps between them.

use std::{fmt, time::SystemTime};

use tokio::sync::watch;

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

    /// The fewest legal steps to `to`, which is the last of them. Empty: it is there, or there is no way.
    pub fn way_to(self, to: Self) -> Vec<Self> {
        let mut ways = std::collections::VecDeque::from([vec![self]]);
        let mut seen = vec![self];
        while let Some(way) = ways.pop_front() {
            let Some(at) = way.last().copied() else { break };
            if at == to {
                return way[1..].to_vec();
            }
            for (_, next) in STEPS.iter().filter(|(from, _)| *from == at) {
                if !seen.contains(next) {
                    seen.push(*next);
                    ways.push_back([&way[..], &[*next]].concat());
                }
            }
        }
        Vec::new()
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
pub struct Lifecycle(watch::Sender<State>);

impl Lifecycle {
    /// Begins with [`Phase::Installing`].
    pub fn new(reason: &'static str) -> Self {
        let (phase, since) = (Phase::Installing, SystemTime::now());
        Self(watch::Sender::new(State { phase, reason, message: String::new(), since }))
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
        self.0.send_if_modified(|state| {
            if !state.phase.may_become(to) {
                result = Err(IllegalStep { from: state.phase, to });
                return false;
            }
            let (message, since) = (message.into(), SystemTime::now());
            *state = State { phase: to, reason, message, since };
            true
        });
        result
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        self.0.borrow().phase
    }

    /// The state now and each later one; a slow watcher sees the latest.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.0.subscribe()
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
    fn a_way_has_legal_steps_only_and_there_is_one_to_all_but_the_first() {
        for from in ALL {
            for to in ALL {
                let way = from.way_to(to);
                let mut at = from;
                for step in &way {
                    assert!(at.may_become(*step), "{at} to {step}");
                    at = *step;
                }
                let is_there = at == to;
                assert_eq!(is_there, from == to || to != Phase::Installing, "{from} to {to}");
            }
        }
        assert_eq!(Phase::Ready.way_to(Phase::Starting), [Phase::Failed, Phase::Starting]);
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
}
