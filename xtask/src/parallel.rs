//! Work of which most is waiting, a few pieces at a time.

use std::{
    sync::{Mutex, PoisonError},
    thread,
};

use crate::interrupt;

/// Pieces at once.
const PARALLEL: usize = 8;

/// Does `work` for each item and returns the results in the items' order. An error when interrupted.
pub(crate) fn each<T: Send, R: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> anyhow::Result<Vec<R>> {
    let queue: Vec<_> = items.into_iter().enumerate().collect();
    let queue = Mutex::new(queue.into_iter());
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(|| {
                while let Some((n, item)) = next(&queue) {
                    let result = work(item);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((n, result));
                }
            });
        }
    });
    interrupt::check()?;
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(n, _)| *n);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

fn next<T>(queue: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    if interrupt::asked() {
        return None;
    }
    queue.lock().unwrap_or_else(PoisonError::into_inner).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        assert_eq!(each(0..100, |n| n * 2).unwrap(), (0..100).map(|n| n * 2).collect::<Vec<_>>());
    }
}
