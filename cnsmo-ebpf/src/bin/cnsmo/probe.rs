//! Programs that no hook runs: the agent calls them through `BPF_PROG_TEST_RUN`.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, TC_ACT_OK, TC_ACT_SHOT},
    helpers::generated::bpf_jiffies64,
    macros::{classifier, map},
    maps::Array,
    programs::TcContext,
};
use cnsmo_common::{
    Direction,
    control::Live,
    probe::{Header, TRACE_LEN},
};
use cnsmo_ebpf::tables::Tables as _;

use crate::maps::{Maps, classify_v4, classify_v6, place};

/// Headers to classify, or to send.
#[map]
pub static TRACE: Array<[Header; TRACE_LEN as usize]> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Their rule indexes. In a benchmark: the headers of packets, and the device that they go to.
#[map]
pub static RESULTS: Array<[u32; TRACE_LEN as usize]> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// The number of the next header or flow, and a mask for it.
#[map]
pub static POSITION: Array<[u32; 2]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Classifies the next header of the trace by the half that `Control::probe` names: the same code that packets meet,
/// before they do. A TC program, because each test run of an XDP program waits for an RCU grace period in the kernel.
#[classifier]
pub fn probe(_: TcContext) -> i32 {
    match next() {
        Some(()) => TC_ACT_OK as i32,
        None => TC_ACT_SHOT,
    }
}

#[inline(always)]
fn next() -> Option<()> {
    // SAFETY: valid and aligned; the agent may write.
    let live = Live(unsafe { read_volatile(&Maps.control()?.probe) });
    let position = POSITION.get_ptr_mut(0)?;
    let trace = TRACE.get_ptr(0)?.cast::<Header>();
    let results = RESULTS.get_ptr_mut(0)?.cast::<u32>();
    // SAFETY: the values live as long as the program runs; indexes are masked.
    unsafe {
        let at = (*position)[0] & (TRACE_LEN - 1);
        (*position)[0] = at + 1;
        let h = &*trace.add(at as usize);
        let direction = if h.direction == 0 { Direction::Ingress } else { Direction::Egress };
        let index = if h.family == 4 {
            let place = place(direction, live.half(), live.trees_v4(direction));
            classify_v4(h.src[1] << 32 | h.dst[1], h.lanes, place)
        } else {
            let place = place(direction, live.half(), live.trees_v6(direction));
            classify_v6(h.src[0], h.src[1], h.dst[0], h.dst[1], h.lanes | place << 48)
        };
        *results.add(at as usize) = index as u32;
    }
    Some(())
}

/// Writes the jiffies counter to the first two places of `RESULTS`, low half first: run twice, it tells the kernel's HZ.
#[classifier]
pub fn clock(_: TcContext) -> i32 {
    // SAFETY: no arguments.
    let now = unsafe { bpf_jiffies64() };
    let Some(results) = RESULTS.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: the value lives as long as the program runs, and is long enough.
    unsafe { *results.cast::<[u32; 2]>() = [now as u32, (now >> 32) as u32] };
    TC_ACT_OK as i32
}

/// All that [`probe`] does but the classification.
#[classifier]
pub fn probe_nothing(_: TcContext) -> i32 {
    let Some(position) = POSITION.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    let Some(trace) = TRACE.get_ptr(0) else {
        return TC_ACT_SHOT;
    };
    let Some(results) = RESULTS.get_ptr_mut(0) else {
        return TC_ACT_SHOT;
    };
    // SAFETY: as in `next`.
    unsafe {
        let at = (*position)[0] & (TRACE_LEN - 1);
        (*position)[0] = at + 1;
        let header = &*trace.cast::<Header>().add(at as usize);
        *results.cast::<u32>().add(at as usize) = header.lanes as u32;
    }
    TC_ACT_OK as i32
}
