//! Whose turn it is: smooth weighted round robin.

/// A member that could take nothing during so many messages of its group gets its share of them later: pauses are evened
/// out. One that is slower throughout gets fewer.
const CATCH_UP: i64 = 1_024;

/// The turns of a group's members, which are known by their position.
#[derive(Debug, Default)]
pub(super) struct Turns(Vec<Turn>);

#[derive(Debug)]
struct Turn {
    weight: i64,
    /// Turns that it has not had, times the weight of all.
    due: i64,
}

impl Turns {
    /// One more, behind the others.
    pub(super) fn push(&mut self, weight: u32) {
        self.0.push(Turn { weight: weight.into(), due: 0 });
    }

    /// Removes one; the last one takes its position.
    pub(super) fn swap_remove(&mut self, at: usize) {
        if at < self.0.len() {
            self.0.swap_remove(at);
        }
    }

    /// The next one among those that can. None can: nobody's turn is lost.
    ///
    /// Each message adds every member's weight to what it is due, and takes the sum from the one that gets the message.
    /// So turns of one are spread evenly between those of the others.
    pub(super) fn next(&mut self, can: impl Fn(usize) -> bool) -> Option<usize> {
        let ready = (0..self.0.len()).filter(|at| can(*at));
        let chosen =
            ready.max_by_key(|at| (self.0[*at].due + self.0[*at].weight, usize::MAX - at))?;
        let mut sum = 0;
        for turn in &mut self.0 {
            let added = turn.weight.min(turn.weight * CATCH_UP - turn.due).max(0);
            turn.due += added;
            sum += added;
        }
        self.0[chosen].due -= sum;
        Some(chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(turns: &mut Turns, rounds: usize, can: impl Fn(usize, usize) -> bool) -> Vec<usize> {
        let mut counts = vec![0; turns.0.len()];
        for round in 0..rounds {
            if let Some(at) = turns.next(|at| can(round, at)) {
                counts[at] += 1;
            }
        }
        counts
    }

    fn of(weights: &[u32]) -> Turns {
        let mut turns = Turns::default();
        weights.iter().for_each(|weight| turns.push(*weight));
        turns
    }

    #[test]
    fn shares_are_as_the_weights_and_no_one_gets_two_in_a_row_without_need() {
        let mut turns = of(&[3, 2, 1]);
        let order: Vec<_> = (0..6).map(|_| turns.next(|_| true).unwrap()).collect();
        assert_eq!(order, [0, 1, 0, 2, 1, 0]);
        assert_eq!(counts(&mut turns, 600, |_, _| true), [300, 200, 100]);
    }

    #[test]
    fn a_short_pause_is_caught_up_and_a_slow_member_gets_fewer() {
        let pause = |round, at| at != 0 || !(100..160).contains(&round);
        assert_eq!(counts(&mut of(&[1, 1, 1]), 900, pause), [300, 300, 300]);
        let slow = |round: usize, at| at != 0 || round.is_multiple_of(10);
        let counts = counts(&mut of(&[1, 1, 1]), 900, slow);
        assert_eq!(counts[0], 90);
        assert!(counts[1].abs_diff(counts[2]) <= 1, "{counts:?}");
    }

    #[test]
    fn nobody_can_and_nobody_is_there() {
        assert_eq!(of(&[]).next(|_| true), None);
        let mut turns = of(&[1, 1]);
        assert_eq!(turns.next(|_| false), None);
        turns.swap_remove(0);
        assert_eq!(turns.next(|_| true), Some(0));
    }
}
