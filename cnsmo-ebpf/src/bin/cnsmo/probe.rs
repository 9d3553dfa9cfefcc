//! Programs that no hook runs: the agent calls them through `BPF_PROG_TEST_RUN`.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, TC_ACT_OK, TC_ACT_SHOT, xdp_action},
    helpers::generated::bpf_jiffies64,
    macros::{classifier, map, xdp},
    maps::Array,
    programs::{TcContext, XdpContext},
};
use cnsmo_common::{
    Direction,
    control::Live,
    probe::{Header, TRACE_LEN},
};
use cnsmo_ebpf::tables::Tables as _;

use crate::maps::{Maps, classify_v4, classify_v6, place};

/// Headers to classify.
#[map]
static TRACE: Array<[Header; TRACE_LEN as usize]> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// Their rule indexes.
#[map]
static RESULTS: Array<[u32; TRACE_LEN as usize]> = Array::with_max_entries(1, BPF_F_MMAPABLE);
/// The next header.
#[map]
static POSITION: Array<u32> = Array::with_max_entries(1, BPF_F_MMAPABLE);

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
        let at = *position & (TRACE_LEN - 1);
        *position = at + 1;
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

/// Low half of the jiffies counter: run twice, it tells the kernel's HZ.
#[classifier]
pub fn clock(_: TcContext) -> i32 {
    // SAFETY: no arguments.
    unsafe { bpf_jiffies64() as i32 }
}

/// Does nothing: what a test run costs by itself.
#[xdp]
pub fn empty(_: XdpContext) -> u32 {
    xdp_action::XDP_DROP
}
