//! All tables in user space: the pipeline's surroundings in tests and wherever a packet is to be judged without a
//! kernel.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
};

use cnsmo_common::{
    balance::{Backend, FILTER_WORDS, Ring, Service, ServiceKey},
    blob::NO_RULE,
    control::{BucketKey, Control, Limit, Live, RuleAction, TIMEOUTS},
    flow::{Conn, Flow, FlowKey, Fragment, FragmentKey, Translation},
    record::Record,
    stat::{Count, Reason},
};

use crate::{
    balance,
    connections::{self, Change},
    limit,
    packet::{Packet, Role},
    parse::Datagram,
    pipeline::{self, Verdict},
    rewrite::{Checksum, Rewrite, rewrite},
    tables::{Case, FlowTables, Onward, Question, Shared, Tables, Visit, VisitBucket, Work},
};

/// The rules as a function: the index of the first that matches, [`NO_RULE`], or `None` if they are damaged.
pub type Classifier<A> = Box<dyn Fn(&Question<A>, Live) -> Option<u32>>;

/// Flow tables of one family without bound: nothing is evicted here.
struct Family<A> {
    established: RefCell<Flows<A>>,
    half_open: RefCell<Flows<A>>,
    classify: Classifier<A>,
    /// Of the last packet.
    case: RefCell<Case<A>>,
}

/// Flows by their keys.
pub type Flows<A> = HashMap<FlowKey<A>, Flow<A>>;

impl<A: Copy + Default> Family<A> {
    fn new() -> Self {
        Self {
            established: RefCell::default(),
            half_open: RefCell::default(),
            classify: Box::new(|_: &Question<A>, _| Some(NO_RULE)),
            case: RefCell::new(empty_case()),
        }
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
    /// Limits, by place.
    pub limits: Vec<Limit>,
    /// Nanoseconds of the monotonic clock.
    pub nanoseconds: Cell<u64>,
    buckets: RefCell<HashMap<BucketKey, u64>>,
    /// Open flows that are counted.
    pub open: RefCell<HashMap<BucketKey, u64>>,
    /// What was told.
    pub records: RefCell<Vec<Record>>,
    /// Virtual addresses.
    pub services: RefCell<HashMap<ServiceKey, Service>>,
    /// Rings in force, by place of the balancer.
    pub rings: RefCell<Vec<Ring>>,
    /// Slots of all rings.
    pub slots: RefCell<Vec<u16>>,
    /// By number.
    pub backends: RefCell<Vec<Backend>>,
    /// Turns taken by all balancers.
    turns: Cell<u32>,
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
            switches: 0,
            tunnel: 0,
            tunnel_mtu: 0,
            own_v4: [0; 4],
            own_v6: [0; 16],
            prefix_v4: [0; 2],
            prefix_v6: [[0; 2]; 2],
            left_to_tc: [0; FILTER_WORDS],
            judged_by_tc: [0; FILTER_WORDS],
        };
        Self {
            v4: Family::new(),
            v6: Family::new(),
            fragments: RefCell::default(),
            control,
            now: Cell::new(0),
            rules: Vec::new(),
            limits: Vec::new(),
            nanoseconds: Cell::new(0),
            buckets: RefCell::default(),
            open: RefCell::default(),
            records: RefCell::default(),
            services: RefCell::default(),
            rings: RefCell::default(),
            slots: RefCell::default(),
            backends: RefCell::default(),
            turns: Cell::new(0),
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
    pub fn flows_v4(&self) -> [Flows<[u8; 4]>; 2] {
        [self.v4.established.borrow().clone(), self.v4.half_open.borrow().clone()]
    }

    /// As a flood does: takes away half-open IPv4 flows.
    #[cfg(test)]
    pub(crate) fn forget_half_open_v4(&self, is_gone: impl Fn(&FlowKey<[u8; 4]>) -> bool) {
        self.v4.half_open.borrow_mut().retain(|key, _| !is_gone(key));
    }

    /// IPv6 flows: established, half-open.
    pub fn flows_v6(&self) -> [Flows<[u8; 16]>; 2] {
        [self.v6.established.borrow().clone(), self.v6.half_open.borrow().clone()]
    }
}

impl Shared for Cell<u64> {
    fn load(&self) -> u64 {
        self.get()
    }
    fn exchange(&self, before: u64, after: u64) -> bool {
        let is_unchanged = self.get() == before;
        if is_unchanged {
            self.set(after);
        }
        is_unchanged
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
    fn rule_of(&self, slot: u32) -> Option<RuleAction> {
        self.rules.iter().find(|rule| rule.slot == slot).copied()
    }
    fn limit(&self, place: u16, _: Live, into: &mut Limit) -> bool {
        match self.limits.get(usize::from(place)) {
            Some(limit) => {
                *into = *limit;
                true
            }
            None => false,
        }
    }
    fn nanoseconds(&self) -> u64 {
        self.nanoseconds.get()
    }
    fn touch_bucket(&self, key: &BucketKey, visit: &mut impl VisitBucket) -> bool {
        match self.buckets.borrow_mut().get_mut(key) {
            Some(word) => {
                visit.visit(Cell::from_mut(word));
                true
            }
            None => false,
        }
    }
    fn begin_bucket(&self, key: &BucketKey, word: u64) {
        self.buckets.borrow_mut().insert(*key, word);
    }
    fn touch_open(&self, key: &BucketKey, visit: &mut impl VisitBucket) -> bool {
        match self.open.borrow_mut().get_mut(key) {
            Some(word) => {
                visit.visit(Cell::from_mut(word));
                true
            }
            None => false,
        }
    }
    fn begin_open(&self, key: &BucketKey, word: u64) -> bool {
        self.open.borrow_mut().insert(*key, word).is_none()
    }
    fn spend(&self, _: u32) -> bool {
        true
    }
    fn record(&self, record: &Record) {
        self.records.borrow_mut().push(*record);
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
    fn service(&self, key: &ServiceKey, into: &mut Service) -> bool {
        match self.services.borrow().get(key) {
            Some(service) => {
                *into = *service;
                true
            }
            None => false,
        }
    }
    fn ring(&self, balancer: u16) -> Ring {
        self.rings.borrow().get(usize::from(balancer)).copied().unwrap_or(Ring(0))
    }
    fn slot(&self, place: u32) -> u16 {
        self.slots.borrow().get(place as usize).copied().unwrap_or(u16::MAX)
    }
    fn backend(&self, id: u16, into: &mut Backend) -> bool {
        match self.backends.borrow().get(usize::from(id)) {
            Some(backend) => {
                *into = *backend;
                true
            }
            None => false,
        }
    }
    fn turn(&self, _: u16) -> u32 {
        self.turns.set(self.turns.get().wrapping_add(1));
        self.turns.get()
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
                work.judge(&mut self.$family.case.borrow_mut())
            }
            fn touch_established(
                &self,
                key: &FlowKey<$address>,
                visit: &mut impl Visit<$address>,
            ) -> bool {
                touch(&self.$family.established, key, visit)
            }
            fn touch_half_open(
                &self,
                key: &FlowKey<$address>,
                visit: &mut impl Visit<$address>,
            ) -> bool {
                touch(&self.$family.half_open, key, visit)
            }
            fn insert_half_open(&self, key: &FlowKey<$address>, flow: &Flow<$address>) {
                self.$family.half_open.borrow_mut().insert(*key, *flow);
            }
            fn claim_half_open(&self, key: &FlowKey<$address>, flow: &Flow<$address>) -> bool {
                let mut flows = self.$family.half_open.borrow_mut();
                let is_free = !flows.contains_key(key);
                flows.entry(*key).or_insert(*flow);
                is_free
            }
            fn promote(&self, key: &FlowKey<$address>, flow: &Flow<$address>) {
                self.$family.established.borrow_mut().entry(*key).or_insert(*flow);
                self.$family.half_open.borrow_mut().remove(key);
            }
            fn remove(&self, key: &FlowKey<$address>) {
                self.$family.established.borrow_mut().remove(key);
                self.$family.half_open.borrow_mut().remove(key);
            }
            fn classify(&self, question: &Question<$address>, live: Live) -> Option<u32> {
                (self.$family.classify)(question, live)
            }
            fn decide(&self, case: &mut Case<$address>, control: &Control, stale: bool) {
                pipeline::decide(case, self, control, stale);
            }
            fn decide_again(&self, case: &mut Case<$address>, control: &Control) {
                pipeline::decide_again(case, self, control);
            }
            fn choose(&self, case: &mut Case<$address>, control: &Control) {
                balance::choose(case, self, control);
            }
            fn attempt(&self, case: &mut Case<$address>, control: &Control, place: u32, port: u32) {
                balance::attempt(case, self, control, place, port);
            }
            fn settle(&self, case: &mut Case<$address>) {
                balance::settle(case, self);
            }
            fn admit(&self, case: &mut Case<$address>, place: u16) {
                limit::admit(case, self, place);
            }
            fn change_open(&self, case: &mut Case<$address>, change: Change) {
                connections::change(case, self, change);
            }
            fn tell(&self, case: &mut Case<$address>) {
                pipeline::tell(case, self);
            }
        }
    };
}
flow_tables!([u8; 4], v4);
flow_tables!([u8; 16], v6);

fn touch<A: Eq + std::hash::Hash>(
    flows: &RefCell<Flows<A>>,
    key: &FlowKey<A>,
    visit: &mut impl Visit<A>,
) -> bool {
    match flows.borrow_mut().get_mut(key) {
        Some(flow) => {
            visit.visit(flow);
            true
        }
        None => false,
    }
}

/// A frame that may be rewritten, as TC has it.
pub struct Frame {
    bytes: RefCell<Vec<u8>>,
    ifindex: u32,
}

impl Frame {
    /// `ifindex`: of the device that it came by.
    pub fn new(bytes: &[u8], ifindex: u32) -> Self {
        Self { bytes: RefCell::new(bytes.to_vec()), ifindex }
    }

    /// What it is now.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.borrow().clone()
    }

    /// Judges the frame and rewrites it; where it goes, unless it is dropped.
    pub fn run<const L3: usize, const EGRESS: bool>(
        &self,
        tables: &HostTables,
    ) -> Result<Onward, Reason> {
        match pipeline::run::<_, _, L3, EGRESS>(self, tables) {
            Verdict::Pass => Ok(Onward::Same),
            Verdict::Drop(reason) => Err(reason),
            Verdict::RewriteV4 => self.rewrite(&tables.v4.case.borrow(), &tables.control),
            Verdict::RewriteV6 => self.rewrite(&tables.v6.case.borrow(), &tables.control),
        }
    }

    fn rewrite<A: crate::parse::Family>(
        &self,
        case: &Case<A>,
        control: &Control,
    ) -> Result<Onward, Reason> {
        rewrite(self, case, control).map(|()| case.onward).ok_or(Reason::Malformed)
    }
}

impl Packet for Frame {
    const ROLE: Role = Role::Whole;
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.bytes.borrow().load(at)
    }
    fn length(&self) -> usize {
        self.bytes.borrow().len()
    }
    fn ifindex(&self) -> u32 {
        self.ifindex
    }
    fn mark(&self) -> u32 {
        0
    }
}

impl Rewrite for Frame {
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.load(at)
    }
    fn write<const N: usize>(&self, at: usize, bytes: &[u8; N]) -> Option<()> {
        let mut frame = self.bytes.borrow_mut();
        frame.get_mut(at..at.checked_add(N)?)?.copy_from_slice(bytes);
        Some(())
    }
    fn write_unsummed<const N: usize>(&self, at: usize, bytes: &[u8; N]) -> Option<()> {
        self.write(at, bytes)
    }
    fn change<const N: usize>(&self, from: &[u8; N], to: &[u8; N]) -> u32 {
        let sum = |bytes: &[u8; N], of: fn(u16) -> u16| {
            let words = bytes.chunks_exact(2).map(|word| u16::from_ne_bytes([word[0], word[1]]));
            words.map(|word| u32::from(of(word))).sum::<u32>()
        };
        sum(from, |word| !word) + sum(to, |word| word)
    }
    fn correct_header(&self, at: usize, change: u32) -> Option<()> {
        self.correct(at, change, Checksum { pseudo: false, udp: false })
    }
    /// RFC 1624, equation 3.
    fn correct(&self, at: usize, change: u32, which: Checksum) -> Option<()> {
        let old = u16::from_ne_bytes(self.load(at)?);
        if which.udp && old == 0 {
            return Some(());
        }
        let mut sum = u64::from(!old) + u64::from(change);
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        let new = match !(sum as u16) {
            0 if which.udp => 0xffff,
            new => new,
        };
        self.write(at, &new.to_ne_bytes())
    }
}

pub(crate) fn empty_case<A: Copy + Default>() -> Case<A> {
    let a = A::default();
    let conn = Conn { seen: 0, generation: 0, slot: 0, state: 0, flags: 0, group: 0 };
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
    let flow = Flow { conn, translation: Translation::none() };
    Case {
        datagram: Datagram::default(),
        live: Live(0),
        now: 0,
        count: Count::default(),
        direction,
        zone: 0,
        l3: 0,
        ifindex: 0,
        mark: 0,
        serves: false,
        key,
        from_high: false,
        step: None,
        from_origin: false,
        flow,
        twin_key: key,
        twin: flow,
        service_key: ServiceKey { address: [0; 16], port: [0; 2], proto: 0, family: 0 },
        service: Service::default(),
        backend: Backend::default(),
        translate: false,
        clamp: false,
        onward: Onward::Same,
        fragment_key,
        fragment,
        question: Question { src: a, dst: a, lanes: 0, direction },
        outcome: Err(Reason::Classifier),
        why: 0,
        slot: 0,
        fresh: false,
        group: 0,
        record: empty_record(),
        limit: Limit::default(),
        bucket_key: BucketKey::default(),
    }
}

fn empty_record() -> Record {
    Record {
        time: 0,
        l3: [0; 40],
        l4: [0; 16],
        slot: 0,
        generation: 0,
        length: 0,
        ifindex: 0,
        family: 0,
        proto: 0,
        direction: 0,
        zone: 0,
        outcome: 0,
        why: 0,
        pad: [0; 2],
    }
}
