//! Waiting longer after each failure.

use std::time::Duration;

use ring::rand::{SecureRandom as _, SystemRandom};

/// Doubles from `first` to `longest`. Each delay is drawn from its upper half, so that clients that lost the same server
/// do not return at the same moment.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// Starts with `first`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    /// The wait after one more failure.
    pub fn after_failure(&mut self) -> Duration {
        let full = self.first.saturating_mul(1 << self.failures.min(31)).min(self.longest);
        self.failures = self.failures.saturating_add(1);
        jittered(full)
    }

    /// The next failure is a first one again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A time from the upper half of `full`.
pub fn jittered(full: Duration) -> Duration {
    full.mul_f64(0.5 + random_fraction() / 2.0)
}

/// At least 0, below 1. Without random numbers 0: the delays are then alike, not wrong.
fn random_fraction() -> f64 {
    let mut bytes = [0; 4];
    if SystemRandom::new().fill(&mut bytes).is_err() {
        return 0.0;
    }
    f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_longest_and_start_again_after_a_reset() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for full_ms in [100, 200, 400, 800, 1000, 1000] {
            let delay = backoff.after_failure();
            assert!(delay <= Duration::from_millis(full_ms), "{delay:?} of {full_ms} ms");
            assert!(delay >= Duration::from_millis(full_ms / 2), "{delay:?} of {full_ms} ms");
        }
        backoff.reset();
        assert!(backoff.after_failure() <= Duration::from_millis(100));
    }

    #[test]
    fn no_number_of_failures_overflows() {
        let mut backoff = Backoff::new(Duration::from_secs(1 << 40), Duration::MAX / 4);
        for _ in 0..100 {
            assert!(backoff.after_failure() <= Duration::MAX / 4);
        }
    }
}
