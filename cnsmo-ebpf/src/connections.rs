//! How many flows a source has open by the rules that limit them.
//!
//! A flow counts from when it is known from both ends: by packets with a forged source nobody uses up what another may
//! have. It counts until both ends have closed it, or until its entry expires, of which the agent takes notice: it
//! compares the numbers with the flows there are, which also mends what CPUs that met have missed.

use cnsmo_common::{
    control::BucketKey,
    flow::{Flow, FlowKey, flag},
    stat::Reason,
};

use crate::{
    balance,
    limit::{TRIES, source},
    parse::Family,
    tables::{Case, FlowTables, Shared, Tables, Visit, VisitBucket},
};

/// What becomes of the number.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The flow is known from both ends now. Too many: it is forgotten.
    Begin,
    /// Another rule admits the flow now.
    Move,
    /// The flow is over.
    End,
}

/// Changes the number for the flow of `case`, and `case.outcome` if it may not go on.
#[inline(always)]
pub fn change<A: Family, T: Tables + FlowTables<A>>(
    case: &mut Case<A>,
    tables: &T,
    change: Change,
) {
    if change != Change::Begin {
        case.bucket_key = number_of(&case.key, &case.flow);
        end(&case.bucket_key, tables);
        mark(case, tables, 0, 0);
    }
    match change {
        Change::End => return,
        Change::Move => case.flow.conn.group = case.group,
        Change::Begin => {}
    }
    let group = case.flow.conn.group;
    if group == 0 || !mark(case, tables, flag::COUNTED, group) {
        return;
    }
    case.bucket_key = number_of(&case.key, &case.flow);
    let max = if change == Change::Begin { max(case, tables) } else { u64::MAX };
    if !begin(&case.bucket_key, tables, max) {
        if case.flow.conn.flags & flag::TRANSLATED != 0 {
            balance::forget_twin(case, tables);
        }
        tables.remove(&case.key);
        case.flow.conn.flags = 0;
        case.outcome = Err(Reason::Connections);
    }
}

/// Flows that are open.
#[inline(always)]
pub(crate) fn open<T: Tables>(key: &BucketKey, tables: &T) -> u64 {
    let mut read = Read { open: 0 };
    tables.touch_open(key, &mut read);
    read.open
}

/// Says in the flow's entry whether and for what it counts; false: no flood-proof entry, or it says so already.
#[inline(always)]
fn mark<A: Family, T: Tables + FlowTables<A>>(
    case: &mut Case<A>,
    tables: &T,
    counted: u8,
    group: u16,
) -> bool {
    let mut mark = Mark { counted, group, is_new: false };
    if !tables.touch_established(&case.key, &mut mark) || !mark.is_new {
        return false;
    }
    let conn = &mut case.flow.conn;
    conn.flags = conn.flags & !flag::COUNTED | counted;
    conn.group = group;
    if conn.flags & flag::TRANSLATED != 0 {
        balance::stamp_twin(case, tables, &mut mark);
    }
    true
}

struct Mark {
    counted: u8,
    group: u16,
    is_new: bool,
}

impl<A> Visit<A> for Mark {
    #[inline(always)]
    fn visit(&mut self, flow: &mut Flow<A>) {
        let conn = &mut flow.conn;
        self.is_new = conn.flags & flag::COUNTED != self.counted;
        conn.flags = conn.flags & !flag::COUNTED | self.counted;
        conn.group = self.group;
    }
}

/// Under which a flow counts: who began it, as the rules see it, and its group.
#[inline(always)]
pub fn number_of<A: Family>(key: &FlowKey<A>, flow: &Flow<A>) -> BucketKey {
    let flags = flow.conn.flags;
    let address = if !balance::is_judged_here(flags) {
        flow.translation.src
    } else if flags & flag::ORIGIN_HIGH != 0 {
        key.high
    } else {
        key.low
    };
    BucketKey { source: source(address), limit: flow.conn.group as u32 }
}

/// What the rule in force allows.
#[inline(always)]
fn max<A: Family, T: Tables>(case: &mut Case<A>, tables: &T) -> u64 {
    let place = tables.rule_of(case.flow.conn.slot).map_or(0, |action| action.limit);
    if place == 0 || !tables.limit(place, case.live, &mut case.limit) {
        return u64::MAX;
    }
    match case.limit.connections {
        0 => u64::MAX,
        connections => connections as u64,
    }
}

#[inline(always)]
fn begin<T: Tables>(key: &BucketKey, tables: &T, max: u64) -> bool {
    let mut add = Add { max, done: false };
    if tables.touch_open(key, &mut add) {
        return add.done;
    }
    if tables.begin_open(key, 1) {
        return true;
    }
    tables.touch_open(key, &mut add);
    add.done
}

#[inline(always)]
fn end<T: Tables>(key: &BucketKey, tables: &T) {
    tables.touch_open(key, &mut Subtract);
}

struct Read {
    open: u64,
}

impl VisitBucket for Read {
    #[inline(always)]
    fn visit(&mut self, word: &impl Shared) {
        self.open = word.load();
    }
}

struct Add {
    max: u64,
    done: bool,
}

impl VisitBucket for Add {
    #[inline(always)]
    fn visit(&mut self, word: &impl Shared) {
        for _ in 0..TRIES {
            let before = word.load();
            if before >= self.max {
                return;
            }
            if word.exchange(before, before + 1) {
                self.done = true;
                return;
            }
        }
    }
}

struct Subtract;

impl VisitBucket for Subtract {
    #[inline(always)]
    fn visit(&mut self, word: &impl Shared) {
        for _ in 0..TRIES {
            let before = word.load();
            if before == 0 || word.exchange(before, before - 1) {
                return;
            }
        }
    }
}
