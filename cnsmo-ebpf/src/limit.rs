//! How many new flows a rule admits.

use cnsmo_common::{
    control::{BucketKey, Limit},
    stat::Reason,
};

use crate::{
    connections,
    parse::Family,
    tables::{Case, Shared, Tables, VisitBucket},
};

/// Other CPUs that may come first before a flow is refused.
pub(crate) const TRIES: u32 = 8;

/// Whether the limits at `place` admit one more flow now; takes it from the rate. The result is in `case.outcome`, and in
/// `case.group` what the flow counts for. Of flows that do not begin now, only that.
#[inline(always)]
pub fn admit<A: Family, T: Tables>(case: &mut Case<A>, tables: &T, place: u16) {
    case.outcome = Err(Reason::Limited);
    if !tables.limit(place, case.live, &mut case.limit) {
        return;
    }
    case.group = case.limit.group;
    if case.fresh && case.limit.connections != 0 {
        case.bucket_key =
            BucketKey { source: source(case.question.src), limit: case.limit.group as u32 };
        if connections::open(&case.bucket_key, tables) >= case.limit.connections as u64 {
            case.outcome = Err(Reason::Connections);
            return;
        }
    }
    if !case.fresh || case.limit.interval == 0 || take(case, tables, place) {
        case.outcome = Ok(0);
    }
}

#[inline(always)]
fn take<A: Family, T: Tables>(case: &mut Case<A>, tables: &T, place: u16) -> bool {
    let limit = &case.limit;
    let source = if limit.per_source == 0 { [0; 16] } else { source(case.question.src) };
    case.bucket_key = BucketKey { source, limit: place as u32 };
    let now = tables.nanoseconds();
    let mut take = Take { now, limit, admitted: false };
    if !tables.touch_bucket(&case.bucket_key, &mut take) {
        tables.begin_bucket(&case.bucket_key, now + limit.interval);
        return true;
    }
    take.admitted
}

/// What stands for an address where sources are told apart.
#[inline(always)]
pub fn source<A: Family>(address: A) -> [u8; 16] {
    if size_of::<A>() == 4 {
        address.widen()
    } else {
        // One host has them all.
        let [network, _] = address.halves();
        ((network as u128) << 64).to_be_bytes()
    }
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
