//! What would happen to a packet: the pipeline over the live maps, of which nothing is changed. No hook runs these programs.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, TC_ACT_OK, TC_ACT_SHOT},
    macros::{classifier, map},
    maps::{Array, PerCpuArray},
    programs::TcContext,
};
use cnsmo_common::{
    balance::{Backend, Ring, Service, ServiceKey},
    control::{BucketKey, Control, Limit, Live, RuleAction},
    explain::{Explanation, NO_ANSWER, PASSES},
    flow::{Flow, FlowKey, Fragment, FragmentKey, flag},
    record::{Record, why},
    stat::{Count, Reason},
};
use cnsmo_ebpf::{
    balance,
    connections::Change,
    conntrack::Step,
    limit,
    packet::{Direct, Packet as _, WHOLE},
    parse::Family,
    pipeline::{self, ETHERNET, TUNNEL, Verdict, run},
    tables::{Case, FlowTables, Question, Shared, Tables, Visit, VisitBucket, Work},
};

use crate::maps::{
    BUCKETS, ESTABLISHED_V4, ESTABLISHED_V6, HALF_OPEN_V4, HALF_OPEN_V6, Maps, OPEN_FLOWS, TURNS,
    stage,
};

/// The answer to the last question.
#[map]
static EXPLANATION: Array<Explanation> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// As `CASE_V4`, but packets do not wait while this is filled.
#[map]
static QUESTION_V4: PerCpuArray<Case<[u8; 4]>> = PerCpuArray::with_max_entries(1, 0);
/// As `QUESTION_V4`.
#[map]
static QUESTION_V6: PerCpuArray<Case<[u8; 16]>> = PerCpuArray::with_max_entries(1, 0);
/// A flow to be changed in place of the one in the table.
#[map]
static COPY_V4: PerCpuArray<Flow<[u8; 4]>> = PerCpuArray::with_max_entries(1, 0);
/// As `COPY_V4`.
#[map]
static COPY_V6: PerCpuArray<Flow<[u8; 16]>> = PerCpuArray::with_max_entries(1, 0);

/// Towards the VM, on a network card.
#[classifier]
pub fn explain_nic_ingress(ctx: TcContext) -> i32 {
    explain::<ETHERNET, false>(&ctx)
}

/// Away from the VM, on a network card.
#[classifier]
pub fn explain_nic_egress(ctx: TcContext) -> i32 {
    explain::<ETHERNET, true>(&ctx)
}

/// Towards the VM, out of a tunnel.
#[classifier]
pub fn explain_tunnel_ingress(ctx: TcContext) -> i32 {
    explain::<TUNNEL, false>(&ctx)
}

/// Away from the VM, into a tunnel.
#[classifier]
pub fn explain_tunnel_egress(ctx: TcContext) -> i32 {
    explain::<TUNNEL, true>(&ctx)
}

#[inline(always)]
fn explain<const L3: usize, const EGRESS: bool>(ctx: &TcContext) -> i32 {
    let (Some(v4), Some(v6)) = (QUESTION_V4.get_ptr_mut(0), QUESTION_V6.get_ptr_mut(0)) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: this CPU's own, and a question is asked at a time.
    let (v4, v6) = unsafe { (&mut *v4, &mut *v6) };
    clear(v4);
    clear(v6);
    // SAFETY: both ends come from this context.
    let packet = unsafe { Direct::<WHOLE>::new(ctx.data(), ctx.data_end(), ctx.len(), 0, 0) };
    let verdict = run::<_, _, L3, EGRESS>(&packet, &Dry);
    let Some(answer) = EXPLANATION.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: valid while the program runs; the agent reads when it has ended.
    let answer = unsafe { &mut *answer };
    answer.outcome = match verdict {
        Verdict::Pass | Verdict::RewriteV4 | Verdict::RewriteV6 => PASSES,
        Verdict::Drop(reason) => reason as u32,
    };
    match packet.load::<2>(L3) {
        Some([first, _]) if first >> 4 == 4 => tell(answer, v4),
        Some([first, _]) if first >> 4 == 6 => tell(answer, v6),
        _ => answer.outcome = NO_ANSWER,
    }
    TC_ACT_OK as i32
}

/// What a packet that is refused early would leave from the one before.
#[inline(always)]
fn clear<A: Family>(case: &mut Case<A>) {
    case.step = None;
    case.why = 0;
    case.slot = 0;
    case.translate = false;
    let conn = &mut case.flow.conn;
    (conn.seen, conn.generation, conn.slot, conn.state, conn.flags, conn.group) =
        (0, 0, 0, 0, 0, 0);
}

#[inline(always)]
fn tell<A: Family>(answer: &mut Explanation, case: &Case<A>) {
    let conn = case.flow.conn;
    answer.conn = conn;
    answer.why = case.why;
    answer.slot = if case.why & why::RULE != 0 { case.slot } else { conn.slot };
    let is_known = matches!(
        case.step,
        Some(Step::Pass | Step::Promote | Step::Rejudge | Step::Contradict | Step::Astray)
    );
    answer.known = is_known as u8;
    answer.translated = case.translate as u8;
    let begins = case.step.is_none() && conn.flags & flag::TRANSLATED != 0;
    answer.balanced = begins as u8;
    answer.balancer = case.service.balancer;
    answer.pad = [0; 2];
    let to = &case.flow.translation;
    answer.src = to.src.widen();
    answer.dst = to.dst.widen();
    answer.sport = to.sport;
    answer.dport = to.dport;
}

/// The maps, read only.
struct Dry;

impl Tables for Dry {
    #[inline(always)]
    fn control(&self) -> Option<&Control> {
        Maps.control()
    }
    #[inline(always)]
    fn live(&self, control: &Control) -> Live {
        Maps.live(control)
    }
    #[inline(always)]
    fn now(&self) -> u64 {
        Maps.now()
    }
    #[inline(always)]
    fn rule(&self, index: u32, live: Live) -> Option<RuleAction> {
        Maps.rule(index, live)
    }
    #[inline(always)]
    fn rule_of(&self, slot: u32) -> Option<RuleAction> {
        Maps.rule_of(slot)
    }
    #[inline(always)]
    fn limit(&self, place: u16, live: Live, into: &mut Limit) -> bool {
        Maps.limit(place, live, into)
    }
    #[inline(always)]
    fn nanoseconds(&self) -> u64 {
        Maps.nanoseconds()
    }
    #[inline(always)]
    fn touch_bucket(&self, key: &BucketKey, visit: &mut impl VisitBucket) -> bool {
        look(BUCKETS.get_ptr(key), visit)
    }
    #[inline(always)]
    fn begin_bucket(&self, _: &BucketKey, _: u64) {}
    #[inline(always)]
    fn touch_open(&self, key: &BucketKey, visit: &mut impl VisitBucket) -> bool {
        look(OPEN_FLOWS.get_ptr(key), visit)
    }
    #[inline(always)]
    fn begin_open(&self, _: &BucketKey, _: u64) -> bool {
        true
    }
    #[inline(always)]
    fn spend(&self, _: u32) -> bool {
        false
    }
    #[inline(always)]
    fn record(&self, _: &Record) {}
    #[inline(always)]
    fn count_rule(&self, _: u32, _: Count) {}
    #[inline(always)]
    fn count_stat(&self, _: u32, _: Count) {}
    #[inline(always)]
    fn remember_fragment(&self, _: &FragmentKey, _: &Fragment) {}
    #[inline(always)]
    fn recall_fragment(&self, key: &FragmentKey, into: &mut Fragment) -> bool {
        Maps.recall_fragment(key, into)
    }
    #[inline(always)]
    fn service(&self, key: &ServiceKey, into: &mut Service) -> bool {
        Maps.service(key, into)
    }
    #[inline(always)]
    fn ring(&self, balancer: u16) -> Ring {
        Maps.ring(balancer)
    }
    #[inline(always)]
    fn slot(&self, place: u32) -> u16 {
        Maps.slot(place)
    }
    #[inline(always)]
    fn backend(&self, id: u16, into: &mut Backend) -> bool {
        Maps.backend(id, into)
    }
    /// The turn of the next flow, if it came by this CPU.
    #[inline(always)]
    fn turn(&self, balancer: u16) -> u32 {
        match TURNS.get(balancer as u32) {
            Some(turn) => turn.wrapping_add(1),
            None => 0,
        }
    }
}

/// A word that stays as it is.
struct Peek(u64);

impl Shared for Peek {
    #[inline(always)]
    fn load(&self) -> u64 {
        self.0
    }
    #[inline(always)]
    fn exchange(&self, _: u64, _: u64) -> bool {
        true
    }
}

#[inline(always)]
fn look(word: Option<*const u64>, visit: &mut impl VisitBucket) -> bool {
    let Some(word) = word else {
        return false;
    };
    // SAFETY: valid and aligned. Volatile, because other CPUs write it.
    visit.visit(&Peek(unsafe { word.read_volatile() }));
    true
}

#[inline(always)]
fn touch<A>(
    flow: Option<*mut Flow<A>>,
    copy: Option<*mut Flow<A>>,
    visit: &mut impl Visit<A>,
) -> bool
where
    A: Copy,
{
    let (Some(flow), Some(copy)) = (flow, copy) else {
        return false;
    };
    // SAFETY: both are valid while the program runs, and the copy is this CPU's own.
    unsafe {
        *copy = *flow;
        visit.visit(&mut *copy);
    }
    true
}

macro_rules! flow_tables {
    ($address:ty, $family:ident, $case:ident, $copy:ident, $established:ident, $half_open:ident) => {
        impl FlowTables<$address> for Dry {
            #[inline(always)]
            fn with_case(&self, work: impl Work<$address>) -> Result<u32, Reason> {
                let case = $case.get_ptr_mut(0).ok_or(Reason::Classifier)?;
                // SAFETY: as in `explain`, which does not look at it meanwhile.
                work.judge(unsafe { &mut *case })
            }
            #[inline(always)]
            fn touch_established(
                &self,
                key: &FlowKey<$address>,
                visit: &mut impl Visit<$address>,
            ) -> bool {
                touch($established.get_ptr_mut(key), $copy.get_ptr_mut(0), visit)
            }
            #[inline(always)]
            fn touch_half_open(
                &self,
                key: &FlowKey<$address>,
                visit: &mut impl Visit<$address>,
            ) -> bool {
                touch($half_open.get_ptr_mut(key), $copy.get_ptr_mut(0), visit)
            }
            #[inline(always)]
            fn insert_half_open(&self, _: &FlowKey<$address>, _: &Flow<$address>) {}
            #[inline(always)]
            fn claim_half_open(&self, key: &FlowKey<$address>, _: &Flow<$address>) -> bool {
                $half_open.get_ptr(key).is_none()
            }
            #[inline(always)]
            fn promote(&self, _: &FlowKey<$address>, _: &Flow<$address>) {}
            #[inline(always)]
            fn remove(&self, _: &FlowKey<$address>) {}
            #[inline(always)]
            fn classify(&self, question: &Question<$address>, live: Live) -> Option<u32> {
                Maps.classify(question, live)
            }
            #[inline(always)]
            fn decide(&self, case: &mut Case<$address>, _: &Control, stale: bool) {
                core::hint::black_box(case);
                stages::$family::decide(stale as u64);
            }
            #[inline(always)]
            fn decide_again(&self, case: &mut Case<$address>, _: &Control) {
                core::hint::black_box(case);
                stages::$family::decide_again();
            }
            #[inline(always)]
            fn choose(&self, case: &mut Case<$address>, _: &Control) {
                core::hint::black_box(case);
                stages::$family::choose();
            }
            #[inline(always)]
            fn attempt(&self, case: &mut Case<$address>, _: &Control, place: u32, port: u32) {
                core::hint::black_box(case);
                stages::$family::attempt(place as u64, port as u64);
            }
            #[inline(always)]
            fn settle(&self, case: &mut Case<$address>) {
                core::hint::black_box(case);
                stages::$family::settle();
            }
            #[inline(always)]
            fn admit(&self, case: &mut Case<$address>, place: u16) {
                core::hint::black_box(case);
                stages::$family::admit(place as u64);
            }
            #[inline(always)]
            fn change_open(&self, _: &mut Case<$address>, _: Change) {}
            #[inline(always)]
            fn tell(&self, _: &mut Case<$address>) {}
        }
    };
}
flow_tables!([u8; 4], v4, QUESTION_V4, COPY_V4, ESTABLISHED_V4, HALF_OPEN_V4);
flow_tables!([u8; 16], v6, QUESTION_V6, COPY_V6, ESTABLISHED_V6, HALF_OPEN_V6);

mod stages {
    use super::*;

    stage!(explain_decide_v4, QUESTION_V4, |case, control, stale| pipeline::decide(
        case,
        &Dry,
        control,
        stale != 0
    ));
    stage!(explain_decide_again_v4, QUESTION_V4, |case, control| {
        pipeline::decide_again(case, &Dry, control)
    });
    stage!(explain_choose_v4, QUESTION_V4, |case, control| balance::choose(case, &Dry, control));
    stage!(explain_attempt_v4, QUESTION_V4, |case, control, place, port| balance::attempt(
        case,
        &Dry,
        control,
        place as u32,
        port as u32
    ));
    stage!(explain_settle_v4, QUESTION_V4, |case, _control| balance::settle(case, &Dry));
    stage!(explain_admit_v4, QUESTION_V4, |case, _control, place| limit::admit(
        case,
        &Dry,
        place as u16
    ));

    stage!(explain_decide_v6, QUESTION_V6, |case, control, stale| pipeline::decide(
        case,
        &Dry,
        control,
        stale != 0
    ));
    stage!(explain_decide_again_v6, QUESTION_V6, |case, control| {
        pipeline::decide_again(case, &Dry, control)
    });
    stage!(explain_choose_v6, QUESTION_V6, |case, control| balance::choose(case, &Dry, control));
    stage!(explain_attempt_v6, QUESTION_V6, |case, control, place, port| balance::attempt(
        case,
        &Dry,
        control,
        place as u32,
        port as u32
    ));
    stage!(explain_settle_v6, QUESTION_V6, |case, _control| balance::settle(case, &Dry));
    stage!(explain_admit_v6, QUESTION_V6, |case, _control, place| limit::admit(
        case,
        &Dry,
        place as u16
    ));

    pub mod v4 {
        pub use super::{
            explain_admit_v4 as admit, explain_attempt_v4 as attempt, explain_choose_v4 as choose,
            explain_decide_again_v4 as decide_again, explain_decide_v4 as decide,
            explain_settle_v4 as settle,
        };
    }
    pub mod v6 {
        pub use super::{
            explain_admit_v6 as admit, explain_attempt_v6 as attempt, explain_choose_v6 as choose,
            explain_decide_again_v6 as decide_again, explain_decide_v6 as decide,
            explain_settle_v6 as settle,
        };
    }
}
