//! The maps, and the pipeline's view of them. Sizes are set by the agent when it loads the object.

use core::{arch::asm, ptr::read_volatile};

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_NOEXIST},
    helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use cnsmo_common::{
    Direction,
    balance::{
        BACKENDS_MAX, BALANCERS_MAX, Backend, RINGS_LEN, Ring, SERVICES_MAX, Service, ServiceKey,
    },
    blob::HEADER_WORDS,
    control::{BucketKey, Control, LIMITS_MAX, Limit, Live, RuleAction, SLOT_FIRST},
    flow::{Flow, FlowKey, Fragment, FragmentKey},
    probe::BROKEN,
    record::{Record, budget},
    stat::{Count, Reason, STAT_ESTABLISHED_FULL, STATS},
};
use cnsmo_ebpf::{
    classify::{Key4, Key6, Memory, classify},
    connections::Change,
    tables::{Case, FlowTables, Question, Shared, Tables, Visit, VisitBucket, Work},
};

use crate::report::damaged_policy;

/// One value of [`Control`].
#[map]
static CONTROL: Array<Control> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Two halves of `HALF_WORDS` words in ONE value. Declared small; the agent hands in a larger map through a pin.
#[map]
static BLOB_V4: Array<[u64; 8]> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// As `BLOB_V4`.
#[map]
static BLOB_V6: Array<[u64; 8]> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Two halves of `RULES_MAX`.
#[map]
static RULES: Array<RuleAction> = Array::with_max_entries(2, BPF_F_MMAPABLE);
/// Two halves of `LIMITS_MAX`.
#[map]
static LIMITS: Array<Limit> = Array::with_max_entries(2 * LIMITS_MAX, BPF_F_MMAPABLE);
/// Full: the one that was not asked for longest is forgotten, and with it what it had left.
#[map]
pub static BUCKETS: LruHashMap<BucketKey, u64> = LruHashMap::with_max_entries(65_536, 0);
/// Open flows by source and group.
#[map]
pub static OPEN_FLOWS: LruHashMap<BucketKey, u64> = LruHashMap::with_max_entries(65_536, 0);
/// Not pinned, as [`BUDGETS`]: without an agent nobody reads, and nothing is told.
#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);
/// By place, see `cnsmo_common::record`.
#[map]
static BUDGETS: Array<u64> = Array::with_max_entries(budget::COUNT, BPF_F_MMAPABLE);
/// By slot.
#[map]
static RULE_COUNTS: PerCpuArray<Count> = PerCpuArray::with_max_entries(2, 0);
/// By place, see `cnsmo_common::stat`.
#[map]
static STAT_COUNTS: PerCpuArray<Count> = PerCpuArray::with_max_entries(STATS, 0);

#[map]
pub static ESTABLISHED_V4: HashMap<FlowKey<[u8; 4]>, Flow<[u8; 4]>> =
    HashMap::with_max_entries(1, 0);
#[map]
pub static ESTABLISHED_V6: HashMap<FlowKey<[u8; 16]>, Flow<[u8; 16]>> =
    HashMap::with_max_entries(1, 0);
#[map]
pub static HALF_OPEN_V4: LruHashMap<FlowKey<[u8; 4]>, Flow<[u8; 4]>> =
    LruHashMap::with_max_entries(1, 0);
#[map]
pub static HALF_OPEN_V6: LruHashMap<FlowKey<[u8; 16]>, Flow<[u8; 16]>> =
    LruHashMap::with_max_entries(1, 0);
/// Datagrams under way in fragments: short-lived and rare, so a small table. Full: the oldest is lost.
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment> = LruHashMap::with_max_entries(4096, 0);

/// Virtual addresses.
#[map]
static SERVICES: HashMap<ServiceKey, Service> = HashMap::with_max_entries(SERVICES_MAX as u32, 0);
/// Rings in force, one word each, by place of the balancer.
#[map]
static BALANCERS: Array<u64> = Array::with_max_entries(BALANCERS_MAX as u32, BPF_F_MMAPABLE);
/// Slots of all rings in ONE value. Declared small, as `BLOB_V4`.
#[map]
static RINGS: Array<[u64; 8]> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// By number.
#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(BACKENDS_MAX as u32, 0);
/// Turns taken, by place of the balancer.
#[map]
pub static TURNS: PerCpuArray<u32> = PerCpuArray::with_max_entries(BALANCERS_MAX as u32, 0);

/// Room for one packet's case: it does not fit on the stack.
#[map]
static CASE_V4: PerCpuArray<Case<[u8; 4]>> = PerCpuArray::with_max_entries(1, 0);
/// As `CASE_V4`.
#[map]
static CASE_V6: PerCpuArray<Case<[u8; 16]>> = PerCpuArray::with_max_entries(1, 0);

/// Words in one half of a blob; a power of two. Constant for the verifier.
#[unsafe(no_mangle)]
static HALF_WORDS: u32 = 8;
/// Rules in one half of `RULES`.
#[unsafe(no_mangle)]
static RULES_MAX: u32 = 1;

#[inline(always)]
fn half_words() -> u64 {
    // SAFETY: a static. Volatile, because the loader changes it.
    unsafe { read_volatile(&HALF_WORDS) as u64 }
}

/// All maps, as the pipeline sees them.
pub struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn control(&self) -> Option<&Control> {
        CONTROL.get(0)
    }
    #[inline(always)]
    fn live(&self, control: &Control) -> Live {
        // SAFETY: valid and aligned. Volatile, so that it is read once although the agent writes it meanwhile.
        Live(unsafe { read_volatile(&control.live) })
    }
    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: no arguments.
        unsafe { bpf_jiffies64() }
    }
    #[inline(always)]
    fn rule(&self, index: u32, live: Live) -> Option<RuleAction> {
        // SAFETY: a static. Volatile, because the loader changes it.
        let max = unsafe { read_volatile(&RULES_MAX) };
        RULES.get(live.half() as u32 * max + index).copied()
    }
    #[inline(always)]
    fn rule_of(&self, slot: u32) -> Option<RuleAction> {
        RULES.get(slot.wrapping_sub(SLOT_FIRST)).copied()
    }
    #[inline(always)]
    fn limit(&self, place: u16, live: Live, into: &mut Limit) -> bool {
        match LIMITS.get(live.half() as u32 * LIMITS_MAX + place as u32) {
            Some(limit) => {
                *into = *limit;
                true
            }
            None => false,
        }
    }
    #[inline(always)]
    fn nanoseconds(&self) -> u64 {
        // SAFETY: no arguments.
        unsafe { bpf_ktime_get_ns() }
    }
    #[inline(always)]
    fn touch_bucket(&self, key: &BucketKey, visit: &mut impl VisitBucket) -> bool {
        match BUCKETS.get_ptr(key) {
            Some(word) => {
                visit.visit(&Bucket(word));
                true
            }
            None => false,
        }
    }
    #[inline(always)]
    fn begin_bucket(&self, key: &BucketKey, word: u64) {
        // Another CPU was first, or holds the bucket: one flow more than allowed.
        let _ = BUCKETS.insert(key, word, BPF_NOEXIST.into());
    }
    #[inline(always)]
    fn touch_open(&self, key: &BucketKey, visit: &mut impl VisitBucket) -> bool {
        match OPEN_FLOWS.get_ptr(key) {
            Some(word) => {
                visit.visit(&Bucket(word));
                true
            }
            None => false,
        }
    }
    #[inline(always)]
    fn begin_open(&self, key: &BucketKey, word: u64) -> bool {
        OPEN_FLOWS.insert(key, word, BPF_NOEXIST.into()).is_ok()
    }
    #[inline(always)]
    fn spend(&self, budget: u32) -> bool {
        match BUDGETS.get_ptr_mut(budget) {
            Some(left) => spend(left),
            None => false,
        }
    }
    #[inline(always)]
    fn record(&self, record: &Record) {
        // No room: lost, as in a flood.
        let _ = RECORDS.output::<Record>(record, 0);
    }
    #[inline(always)]
    fn count_rule(&self, slot: u32, count: Count) {
        add(RULE_COUNTS.get_ptr_mut(slot), count);
    }
    #[inline(always)]
    fn count_stat(&self, stat: u32, count: Count) {
        add(STAT_COUNTS.get_ptr_mut(stat), count);
    }
    #[inline(always)]
    fn remember_fragment(&self, key: &FragmentKey, fragment: &Fragment) {
        // An LRU map takes it at the cost of the oldest; lost, the later fragments are refused and counted.
        let _ = FRAGMENTS.insert(key, fragment, 0);
    }
    #[inline(always)]
    fn recall_fragment(&self, key: &FragmentKey, into: &mut Fragment) -> bool {
        // SAFETY: copied while the program runs; written once per datagram.
        let Some(fragment) = (unsafe { FRAGMENTS.get(key) }) else {
            return false;
        };
        *into = *fragment;
        true
    }
    #[inline(always)]
    fn service(&self, key: &ServiceKey, into: &mut Service) -> bool {
        // SAFETY: copied while the program runs; one word, which is replaced and never changed.
        let Some(service) = (unsafe { SERVICES.get(key) }) else {
            return false;
        };
        *into = *service;
        true
    }
    #[inline(always)]
    fn ring(&self, balancer: u16) -> Ring {
        match BALANCERS.get_ptr(balancer as u32) {
            // SAFETY: valid and aligned. Volatile, so that it is read once although the agent writes it meanwhile.
            Some(word) => Ring(unsafe { read_volatile(word) }),
            None => Ring(0),
        }
    }
    #[inline(always)]
    fn slot(&self, place: u32) -> u16 {
        match RINGS.get_ptr(0) {
            // SAFETY: masked; the value is that long.
            Some(rings) => unsafe { *rings.cast::<u16>().add(place as usize & (RINGS_LEN - 1)) },
            None => u16::MAX,
        }
    }
    #[inline(always)]
    fn backend(&self, id: u16, into: &mut Backend) -> bool {
        let Some(backend) = BACKENDS.get(id as u32) else {
            return false;
        };
        *into = *backend;
        true
    }
    #[inline(always)]
    fn turn(&self, balancer: u16) -> u32 {
        let Some(turn) = TURNS.get_ptr_mut(balancer as u32) else {
            return 0;
        };
        // SAFETY: this CPU's own.
        unsafe {
            *turn = (*turn).wrapping_add(1);
            *turn
        }
    }
}

#[inline(always)]
fn add(counter: Option<*mut Count>, count: Count) {
    if let Some(counter) = counter {
        // SAFETY: this CPU's own, valid while the program runs.
        unsafe {
            (*counter).packets += count.packets;
            (*counter).bytes += count.bytes;
        }
    }
}

/// A value of `BUCKETS` or `OPEN_FLOWS`, valid while the program runs.
struct Bucket(*const u64);

impl Shared for Bucket {
    #[inline(always)]
    fn load(&self) -> u64 {
        // SAFETY: valid and aligned. Volatile, because other CPUs write it.
        unsafe { read_volatile(self.0) }
    }
    #[inline(always)]
    fn exchange(&self, before: u64, after: u64) -> bool {
        let found: u64;
        // SAFETY: as above. In assembly, because the target says of itself that it has no such instruction; kernels have
        // it since 5.12.
        unsafe {
            asm!(
                "r0 = cmpxchg_64({word} + 0, r0, {after})",
                word = in(reg) self.0,
                after = in(reg) after,
                inout("r0") before => found,
                options(nostack),
            );
        }
        found == before
    }
}

/// Takes one, if there is one left.
#[inline(always)]
pub fn spend(left: *mut u64) -> bool {
    // SAFETY: valid while the program runs. CPUs that read at the same time take one each: no more than CPUs too many.
    unsafe {
        let now = left.read_volatile();
        if now == 0 {
            return false;
        }
        left.write_volatile(now - 1);
    }
    true
}

#[inline(always)]
fn touch<A>(flow: Option<*mut Flow<A>>, visit: &mut impl Visit<A>) -> bool {
    let Some(flow) = flow else {
        return false;
    };
    // SAFETY: valid while the program runs. Other CPUs may write at the same time: fields are stored whole.
    visit.visit(unsafe { &mut *flow });
    true
}

/// The two families differ in their maps and in the shape of the classifier's key, in nothing else.
macro_rules! flow_tables {
    ($address:ty, $family:ident, $case:ident, $established:ident, $half_open:ident, $walk:ident) => {
        impl FlowTables<$address> for Maps {
            #[inline(always)]
            fn with_case(&self, work: impl Work<$address>) -> Result<u32, Reason> {
                let case = $case.get_ptr_mut(0).ok_or(Reason::Classifier)?;
                // SAFETY: this CPU's own, and programs of these hooks do not interrupt each other on one CPU. All
                // zeros are valid, and every field is written before it is read.
                work.judge(unsafe { &mut *case })
            }
            #[inline(always)]
            fn touch_established(
                &self,
                key: &FlowKey<$address>,
                visit: &mut impl Visit<$address>,
            ) -> bool {
                touch($established.get_ptr_mut(key), visit)
            }
            #[inline(always)]
            fn touch_half_open(
                &self,
                key: &FlowKey<$address>,
                visit: &mut impl Visit<$address>,
            ) -> bool {
                touch($half_open.get_ptr_mut(key), visit)
            }
            #[inline(always)]
            fn insert_half_open(&self, key: &FlowKey<$address>, flow: &Flow<$address>) {
                // Fails only if another CPU holds the bucket; the next packet of the flow tries again.
                let _ = $half_open.insert(key, flow, 0);
            }
            #[inline(always)]
            fn claim_half_open(&self, key: &FlowKey<$address>, flow: &Flow<$address>) -> bool {
                $half_open.insert(key, flow, BPF_NOEXIST.into()).is_ok()
            }
            #[inline(always)]
            fn promote(&self, key: &FlowKey<$address>, flow: &Flow<$address>) {
                const EEXIST: i32 = 17;
                match $established.insert(key, flow, BPF_NOEXIST.into()) {
                    Ok(()) => {
                        let _ = $half_open.remove(key);
                    }
                    // Another CPU was first.
                    Err(error) if error == -EEXIST => {}
                    Err(_) => {
                        self.count_stat(STAT_ESTABLISHED_FULL, Count { packets: 1, bytes: 0 });
                        let _ = $half_open.insert(key, flow, 0);
                    }
                }
            }
            #[inline(always)]
            fn remove(&self, key: &FlowKey<$address>) {
                let _ = $established.remove(key);
                let _ = $half_open.remove(key);
            }
            #[inline(always)]
            fn classify(&self, question: &Question<$address>, live: Live) -> Option<u32> {
                let index = $walk(question, live);
                if index == BROKEN as u64 {
                    damaged_policy();
                    return None;
                }
                Some(index as u32)
            }
            #[inline(always)]
            fn decide(&self, case: &mut Case<$address>, _: &Control, stale: bool) {
                lend(case);
                stages::$family::decide(stale as u64);
            }
            #[inline(always)]
            fn decide_again(&self, case: &mut Case<$address>, _: &Control) {
                lend(case);
                stages::$family::decide_again();
            }
            #[inline(always)]
            fn choose(&self, case: &mut Case<$address>, _: &Control) {
                lend(case);
                stages::$family::choose();
            }
            #[inline(always)]
            fn attempt(&self, case: &mut Case<$address>, _: &Control, place: u32, port: u32) {
                lend(case);
                stages::$family::attempt(place as u64, port as u64);
            }
            #[inline(always)]
            fn settle(&self, case: &mut Case<$address>) {
                lend(case);
                stages::$family::settle();
            }
            #[inline(always)]
            fn admit(&self, case: &mut Case<$address>, place: u16) {
                lend(case);
                stages::$family::admit(place as u64);
            }
            #[inline(always)]
            fn change_open(&self, case: &mut Case<$address>, change: Change) {
                lend(case);
                stages::$family::change_open(change as u64);
            }
            #[inline(always)]
            fn tell(&self, case: &mut Case<$address>) {
                lend(case);
                stages::$family::tell();
            }
        }
    };
}
/// The case of the packet that this program has just judged.
#[inline(always)]
pub fn last_v4() -> Option<&'static Case<[u8; 4]>> {
    CASE_V4.get(0)
}

/// As [`last_v4`].
#[inline(always)]
pub fn last_v6() -> Option<&'static Case<[u8; 16]>> {
    CASE_V6.get(0)
}

flow_tables!([u8; 4], v4, CASE_V4, ESTABLISHED_V4, HALF_OPEN_V4, walk_v4);
flow_tables!([u8; 16], v6, CASE_V6, ESTABLISHED_V6, HALF_OPEN_V6, walk_v6);

/// Tells the compiler that others may now change the case.
#[inline(always)]
fn lend<A>(case: &mut Case<A>) {
    core::hint::black_box(case);
}

/// A stage that works on the case alone, as a global function: the verifier proves it once. It finds the case anew, because
/// a global function takes no pointer; the borrow of the caller is the same memory of the same CPU.
macro_rules! stage {
    ($name:ident, $case:ident, |$on:ident, $control:ident $(, $argument:ident)*| $work:expr) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name($($argument: u64),*) -> u64 {
            if let (Some(case), Some($control)) = ($case.get_ptr_mut(0), Maps.control()) {
                // SAFETY: this CPU's own; the caller waits.
                let $on = unsafe { &mut *case };
                $work;
            }
            0
        }
    };
}
pub(crate) use stage;

/// As [`Change`] goes through a register.
#[inline(always)]
fn change_of(number: u64) -> Change {
    match number {
        0 => Change::Begin,
        1 => Change::Move,
        _ => Change::End,
    }
}

mod stages {
    use cnsmo_ebpf::{balance, connections, limit, pipeline, tables::Tables as _};

    use super::{CASE_V4, CASE_V6, Maps, change_of};

    stage!(decide_v4, CASE_V4, |case, control, stale| pipeline::decide(
        case,
        &Maps,
        control,
        stale != 0
    ));
    stage!(decide_again_v4, CASE_V4, |case, control| pipeline::decide_again(case, &Maps, control));
    stage!(choose_v4, CASE_V4, |case, control| balance::choose(case, &Maps, control));
    stage!(attempt_v4, CASE_V4, |case, control, place, port| balance::attempt(
        case,
        &Maps,
        control,
        place as u32,
        port as u32
    ));
    stage!(settle_v4, CASE_V4, |case, _control| balance::settle(case, &Maps));
    stage!(admit_v4, CASE_V4, |case, _control, place| limit::admit(case, &Maps, place as u16));
    stage!(change_open_v4, CASE_V4, |case, _control, change| connections::change(
        case,
        &Maps,
        change_of(change)
    ));
    stage!(tell_v4, CASE_V4, |case, _control| pipeline::tell(case, &Maps));

    stage!(decide_v6, CASE_V6, |case, control, stale| pipeline::decide(
        case,
        &Maps,
        control,
        stale != 0
    ));
    stage!(decide_again_v6, CASE_V6, |case, control| pipeline::decide_again(case, &Maps, control));
    stage!(choose_v6, CASE_V6, |case, control| balance::choose(case, &Maps, control));
    stage!(attempt_v6, CASE_V6, |case, control, place, port| balance::attempt(
        case,
        &Maps,
        control,
        place as u32,
        port as u32
    ));
    stage!(settle_v6, CASE_V6, |case, _control| balance::settle(case, &Maps));
    stage!(admit_v6, CASE_V6, |case, _control, place| limit::admit(case, &Maps, place as u16));
    stage!(change_open_v6, CASE_V6, |case, _control, change| connections::change(
        case,
        &Maps,
        change_of(change)
    ));
    stage!(tell_v6, CASE_V6, |case, _control| pipeline::tell(case, &Maps));

    pub mod v4 {
        pub use super::{
            admit_v4 as admit, attempt_v4 as attempt, change_open_v4 as change_open,
            choose_v4 as choose, decide_again_v4 as decide_again, decide_v4 as decide,
            settle_v4 as settle, tell_v4 as tell,
        };
    }
    pub mod v6 {
        pub use super::{
            admit_v6 as admit, attempt_v6 as attempt, change_open_v6 as change_open,
            choose_v6 as choose, decide_again_v6 as decide_again, decide_v6 as decide,
            settle_v6 as settle, tell_v6 as tell,
        };
    }
}

#[inline(always)]
fn walk_v4(q: &Question<[u8; 4]>, live: Live) -> u64 {
    let addresses = (u32::from_be_bytes(q.src) as u64) << 32 | u32::from_be_bytes(q.dst) as u64;
    classify_v4(addresses, q.lanes, place(q.direction, live.half(), live.trees_v4(q.direction)))
}

#[inline(always)]
fn walk_v6(q: &Question<[u8; 16]>, live: Live) -> u64 {
    let (src, dst) = (u128::from_be_bytes(q.src), u128::from_be_bytes(q.dst));
    let place = place(q.direction, live.half(), live.trees_v6(q.direction));
    classify_v6(
        (src >> 64) as u64,
        src as u64,
        (dst >> 64) as u64,
        dst as u64,
        q.lanes | place << PLACE_AT,
    )
}

/// First bit above the lanes.
const PLACE_AT: u32 = 48;

/// Where to classify, in 6 bits: direction, half, trees.
#[inline(always)]
pub fn place(direction: Direction, half: u64, trees: u64) -> u64 {
    direction as u64 | (half & 1) << 1 | (trees & 15) << 2
}

/// Global functions with nothing but integers as arguments: the verifier proves each once, not once per path to it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn classify_v4(addresses: u64, ports: u64, place: u64) -> u64 {
    let key = Key4::new((addresses >> 32) as u32, addresses as u32, ports);
    half(BLOB_V4.get_ptr(0), place)
        .and_then(|memory| classify(&key, &memory, header(place), place >> 2))
        .map_or(BROKEN as u64, |index| index as u64)
}

/// As [`classify_v4`]; the place is in the bits of `ports` from `PLACE_AT` on, for want of a sixth argument.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn classify_v6(
    src_high: u64,
    src_low: u64,
    dst_high: u64,
    dst_low: u64,
    ports: u64,
) -> u64 {
    let place = ports >> PLACE_AT;
    let ports = ports & ((1 << PLACE_AT) - 1);
    let key = Key6::new([src_high, src_low], [dst_high, dst_low], ports);
    // Read from memory where it is needed: copies of its words would not fit on the stack beside it.
    let key = core::hint::black_box(&key);
    half(BLOB_V6.get_ptr(0), place)
        .and_then(|memory| classify(key, &memory, header(place), place >> 2))
        .map_or(BROKEN as u64, |index| index as u64)
}

#[inline(always)]
fn header(place: u64) -> u64 {
    (place & 1) * HEADER_WORDS as u64
}

/// One half of a blob; a mask keeps every access inside.
struct Half {
    base: *const u64,
    mask: u64,
}

#[inline(always)]
fn half(blob: Option<*const [u64; 8]>, place: u64) -> Option<Half> {
    let base = blob?.cast::<u64>();
    let words = half_words();
    // SAFETY: the value holds two halves; the verifier checks.
    Some(Half { base: unsafe { base.add(((place >> 1 & 1) * words) as usize) }, mask: words - 1 })
}

impl Memory for Half {
    #[inline(always)]
    fn word(&self, at: u64) -> Option<u64> {
        // SAFETY: masked.
        Some(unsafe { *self.base.add((at & self.mask) as usize) })
    }
    #[inline(always)]
    fn words<const N: usize>(&self, at: u64) -> Option<&[u64; N]> {
        // SAFETY: masked, and N divides the half.
        Some(unsafe { &*self.base.add((at & self.mask) as usize & !(N - 1)).cast() })
    }
}
