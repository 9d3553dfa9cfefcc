//! How many new flows a rule admits.

use cnsmo_common::control::{BucketKey, Limit};

use crate::{
    parse::Family,
    tables::{Case, Shared, Tables, VisitBucket},
};

/// Other CPUs that may come first before a flow is refused.
const TRIES: u32 = 8;

/// Whether the limit at `place` admits one more flow now; takes it.
#[inline(always)]
pub fn admits<A: Family, T: Tables>(case: &mut Case<A>, tables: &T, place: u16) -> bool {
    if !tables.limit(place, case.live, &mut case.limit) {
        return false;
    }
    let limit = &case.limit;
    let source = if limit.per_source == 0 {
        [0; 16]
    } else if size_of::<A>() == 4 {
        case.question.src.widen()
    } else {
        // One host has them all.
        let [network, _] = case.question.src.halves();
        ((network as u128) << 64).to_be_bytes()
    };
    case.bucket_key = BucketKey { source, limit: place as u32 };
    let now = tables.nanoseconds();
    let mut take = Take { now, limit, admitted: false };
    if !tables.touch_bucket(&case.bucket_key, &mut take) {
        tables.begin_bucket(&case.bucket_key, now + limit.interval);
        return true;
    }
    take.admitted
}

struct Take<'a> {
    now: u64,
    limit: &'a Limit,
    admitted: bool,
}

impl VisitBucket for Take<'_> {
    /// The word is the time at which the next flow is due.
    #[inline(always)]
    fn visit(&mut self, word: &impl Shared) {
        let Limit { interval, tolerance, .. } = *self.limit;
        for _ in 0..TRIES {
            let before = word.load();
            let due = if before > self.now + tolerance + interval || before < self.now {
                // Long idle, or left by another rule that had this place.
                self.now
            } else {
                before
            };
            if due > self.now + tolerance {
                return;
            }
            if word.exchange(before, due + interval) {
                self.admitted = true;
                return;
            }
        }
    }
}
