//! How many of something there may be, in all and for each identity.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::error::Error;

/// Places that are held until they are dropped.
#[derive(Clone, Debug)]
pub(super) struct Quota {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    what: &'static str,
    max: usize,
    each_max: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    each: HashMap<Arc<str>, usize>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Place {
    inner: Arc<Inner>,
    identity: Arc<str>,
}

impl Quota {
    /// `what` is for messages: "watches".
    pub(super) fn new(what: &'static str, max: usize, each_max: usize) -> Self {
        let taken = Mutex::default();
        Self { inner: Arc::new(Inner { what, max, each_max, taken }) }
    }

    /// A place, or which limit is reached.
    pub(super) fn take(&self, identity: &str) -> Result<Place, Error> {
        let Inner { what, max, each_max, .. } = *self.inner;
        let mut taken = self.inner.taken();
        if taken.all >= max {
            return Err(Error::Exhausted(format!("this core has {max} {what} already")));
        }
        if taken.each.get(identity).is_some_and(|each| *each >= each_max) {
            return Err(Error::Exhausted(format!("{identity} has {each_max} {what} already")));
        }
        let identity: Arc<str> = identity.into();
        taken.all += 1;
        *taken.each.entry(identity.clone()).or_default() += 1;
        drop(taken);
        Ok(Place { inner: self.inner.clone(), identity })
    }

    /// Places that are taken.
    pub(super) fn taken(&self) -> usize {
        self.inner.taken().all
    }
}

impl Inner {
    fn taken(&self) -> MutexGuard<'_, Taken> {
        // Counters: each change is whole before anything can panic.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.inner.taken();
        taken.all -= 1;
        if let Some(each) = taken.each.get_mut(&self.identity) {
            *each -= 1;
            if *each == 0 {
                taken.each.remove(&self.identity);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_come_back() {
        let quota = Quota::new("watches", 3, 2);
        let a = [quota.take("a").unwrap(), quota.take("a").unwrap()];
        let refused = quota.take("a").unwrap_err().to_string();
        assert_eq!(refused, "a has 2 watches already");
        let b = quota.take("b").unwrap();
        assert_eq!(quota.take("c").unwrap_err().to_string(), "this core has 3 watches already");
        drop(a);
        let _a = quota.take("a").unwrap();
        drop(b);
        assert_eq!(quota.inner.taken().each.len(), 1);
    }
}
