//! Who has received what, and when.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::ensure;
use serde_json::{Value, json};
use tokio::sync::Notify;

/// Nothing takes longer unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// What has been received since the last [`Board::clear`].
#[derive(Debug, Default)]
pub(crate) struct Board {
    seen: Mutex<Seen>,
    changed: Notify,
}

#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) times: Vec<Instant>,
    pub(crate) snapshots: usize,
}

impl Board {
    pub(crate) fn note(&self, snapshot: bool) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.times.push(Instant::now());
        seen.snapshots += usize::from(snapshot);
        drop(seen);
        self.changed.notify_one();
    }

    pub(crate) fn clear(&self) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Seen::default();
    }

    /// Waits until `count` messages have come, and takes them.
    pub(crate) async fn take(&self, count: usize) -> anyhow::Result<Seen> {
        let end = tokio::time::Instant::now() + PATIENCE;
        loop {
            let changed = self.changed.notified();
            {
                let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                if seen.times.len() >= count {
                    return Ok(std::mem::take(&mut *seen));
                }
                let have = seen.times.len();
                ensure!(tokio::time::Instant::now() < end, "{have} of {count} came in time");
            }
            // Looks again now and then for the time limit.
            let _ = tokio::time::timeout(Duration::from_secs(1), changed).await;
        }
    }
}

/// Percentiles in milliseconds since `start`.
pub(crate) fn latencies(start: Instant, times: &[Instant]) -> Value {
    let mut ms: Vec<f64> =
        times.iter().map(|at| at.duration_since(start).as_secs_f64() * 1e3).collect();
    ms.sort_by(f64::total_cmp);
    let at = |percent: usize| ms.get((ms.len() * percent / 100).min(ms.len().saturating_sub(1)));
    json!({ "p50_ms": at(50), "p99_ms": at(99), "max_ms": ms.last() })
}
