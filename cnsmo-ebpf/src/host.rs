//! All tables in user space: the pipeline's surroundings in tests and wherever a packet is to be judged without a
//! kernel.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
};

use cnsmo_common::{
    blob::NO_RULE,
    control::{Control, Live, RuleAction, TIMEOUTS},
    flow::{Conn, FlowKey, Fragment, FragmentKey},
    stat::{Count, Reason},
};

use crate::{
    parse::Datagram,
    tables::{Case, FlowTables, Question, Tables, Visit, Work},
};

/// The rules as a function: the index of the first that matches, [`NO_RULE`], or `None` if they are damaged.
pub type Classifier<A> = Box<dyn Fn(&Question<A>, Live) -> Option<u32>>;

/// Flow tables of one family without bound: nothing is evicted here.
struct Family<A> {
    established: RefCell<HashMap<FlowKey<A>, Conn>>,
    half_open: RefCell<HashMap<FlowKey<A>, Conn>>,
    classify: Classifier<A>,
}

impl<A> Family<A> {
    fn new() -> Self {
        let classify = Box::new(|_: &Question<A>, _| Some(NO_RULE));
        Self { established: RefCell::default(), half_open: RefCell::default(), classify }
    }
}

/// Tables, clock and counters of one data path.
pub struct HostTables {
    v4: Family<[u8; 4]>,
    v6: Family<[u8; 16]>,
    fragments: RefCell<HashMap<FragmentKey, Fragment>>,
    /// Timeouts and switches, the live word among them.
    pub control: Control,
    /// Jiffies.
    pub now: Cell<u64>,
    /// What each rule does, by index.
    pub rules: Vec<RuleAction>,
    /// By slot.
    pub rule_counts: RefCell<HashMap<u32, Count>>,
    /// By place, see [`cnsmo_common::stat`].
    pub stat_counts: RefCell<HashMap<u32, Count>>,
}

impl HostTables {
    /// No rules, no flows, time 0, and `live` in force.
    pub fn new(live: Live) -> Self {
        let control = Control {
            live: live.0,
            pickup_until: 0,
            probe: 0,
            timeouts: [1_000; TIMEOUTS],
            fragment_timeout: 1_000,
            refresh: 1,
        };
        Self {
            v4: Family::new(),
            v6: Family::new(),
            fragments: RefCell::default(),
            control,
            now: Cell::new(0),
            rules: Vec::new(),
            rule_counts: RefCell::default(),
            stat_counts: RefCell::default(),
        }
    }

    /// Sets the rules of both families.
    pub fn set_rules(
        &mut self,
        rules: Vec<RuleAction>,
        v4: Classifier<[u8; 4]>,
        v6: Classifier<[u8; 16]>,
    ) {
        self.rules = rules;
        self.v4.classify = v4;
        self.v6.classify = v6;
    }

    /// IPv4 flows: established, half-open.
    pub fn flows_v4(&self) -> [HashMap<FlowKey<[u8; 4]>, Conn>; 2] {
        [self.v4.established.borrow().clone(), self.v4.half_open.borrow().clone()]
    }

    /// IPv6 flows: established, half-open.
    pub fn flows_v6(&self) -> [HashMap<FlowKey<[u8; 16]>, Conn>; 2] {
        [self.v6.established.borrow().clone(), self.v6.half_open.borrow().clone()]
    }
}

impl Tables for HostTables {
    fn control(&self) -> Option<&Control> {
        Some(&self.control)
    }
    fn live(&self, control: &Control) -> Live {
        Live(control.live)
    }
    fn now(&self) -> u64 {
        self.now.get()
    }
    fn rule(&self, index: u32, _: Live) -> Option<RuleAction> {
        self.rules.get(index as usize).copied()
    }
    fn count_rule(&self, slot: u32, count: Count) {
        add(&self.rule_counts, slot, count);
    }
    fn count_stat(&self, stat: u32, count: Count) {
        add(&self.stat_counts, stat, count);
    }
    fn remember_fragment(&self, key: &FragmentKey, fragment: &Fragment) {
        self.fragments.borrow_mut().insert(*key, *fragment);
    }
    fn recall_fragment(&self, key: &FragmentKey, into: &mut Fragment) -> bool {
        match self.fragments.borrow().get(key) {
            Some(fragment) => {
                *into = *fragment;
                true
            }
            None => false,
        }
    }
}

fn add(counts: &RefCell<HashMap<u32, Count>>, at: u32, count: Count) {
    let mut counts = counts.borrow_mut();
    let total = counts.entry(at).or_default();
    total.packets += count.packets;
    total.bytes += count.bytes;
}

macro_rules! flow_tables {
    ($address:ty, $family:ident) => {
        impl FlowTables<$address> for HostTables {
            fn with_case(&self, work: impl Work<$address>) -> Result<u32, Reason> {
                work.judge(&mut empty_case())
            }
            fn touch_established(&self, key: &FlowKey<$address>, visit: &mut impl Visit) -> bool {
                touch(&self.$family.established, key, visit)
            }
            fn touch_half_open(&self, key: &FlowKey<$address>, visit: &mut impl Visit) -> bool {
                touch(&self.$family.half_open, key, visit)
            }
            fn insert_half_open(&self, key: &FlowKey<$address>, conn: &Conn) {
                self.$family.half_open.borrow_mut().insert(*key, *conn);
            }
            fn promote(&self, key: &FlowKey<$address>, conn: &Conn) {
                self.$family.established.borrow_mut().entry(*key).or_insert(*conn);
                self.$family.half_open.borrow_mut().remove(key);
            }
            fn remove(&self, key: &FlowKey<$address>) {
                self.$family.established.borrow_mut().remove(key);
                self.$family.half_open.borrow_mut().remove(key);
            }
            fn classify(&self, question: &Question<$address>, live: Live) -> Option<u32> {
                (self.$family.classify)(question, live)
            }
        }
    };
}
flow_tables!([u8; 4], v4);
flow_tables!([u8; 16], v6);

fn touch<A: Eq + std::hash::Hash>(
    flows: &RefCell<HashMap<FlowKey<A>, Conn>>,
    key: &FlowKey<A>,
    visit: &mut impl Visit,
) -> bool {
    match flows.borrow_mut().get_mut(key) {
        Some(conn) => {
            visit.visit(conn);
            true
        }
        None => false,
    }
}

pub(crate) fn empty_case<A: Copy + Default>() -> Case<A> {
    let a = A::default();
    let conn = Conn { seen: 0, generation: 0, slot: 0, state: 0, flags: 0, pad: [0; 2] };
    let key = FlowKey {
        low: a,
        high: a,
        low_port: [0; 2],
        high_port: [0; 2],
        proto: 0,
        zone: 0,
        pad: [0; 2],
    };
    let fragment_key =
        FragmentKey { src: [0; 16], dst: [0; 16], id: [0; 4], proto: 0, zone: 0, pad: [0; 2] };
    let fragment =
        Fragment { sport: [0; 2], dport: [0; 2], echo: 0, proto: 0, pad: [0; 2], seen: 0 };
    let direction = cnsmo_common::Direction::Ingress;
    Case {
        datagram: Datagram::default(),
        live: Live(0),
        now: 0,
        count: Count::default(),
        direction,
        zone: 0,
        key,
        from_high: false,
        step: None,
        conn,
        fragment_key,
        fragment,
        question: Question { src: a, dst: a, lanes: 0, direction },
        outcome: Err(Reason::Classifier),
    }
}
