//! Programs for `cargo xtask bench fw`; no hook runs them. A test run repeats one frame, and a frame of one flow stays in
//! the first-level cache: these set the flow from a counter before each run.

use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext};
use cnsmo_ebpf::{
    packet::{Direct, FRONT},
    pipeline::{ETHERNET, Verdict, run},
};

use crate::{maps::Maps, probe::POSITION};

/// Offsets in an untagged IPv4 frame without options.
const SOURCE_ADDRESS: usize = 14 + 12;
const SOURCE_PORT: usize = 14 + 20;

/// The firewall on the frame of the next flow.
#[xdp]
pub fn bench_flows(ctx: XdpContext) -> u32 {
    if !next_flow(&ctx) {
        return xdp_action::XDP_ABORTED;
    }
    let (start, end) = (ctx.data(), ctx.data_end());
    // SAFETY: both ends come from this context.
    let packet = unsafe { Direct::<FRONT>::new(start, end, (end - start) as u32, 0) };
    match run::<_, _, ETHERNET, false>(&packet, &Maps) {
        Verdict::Drop(_) => xdp_action::XDP_DROP,
        _ => xdp_action::XDP_PASS,
    }
}

/// All that [`bench_flows`] does but the firewall.
#[xdp]
pub fn bench_no_firewall(ctx: XdpContext) -> u32 {
    if next_flow(&ctx) { xdp_action::XDP_PASS } else { xdp_action::XDP_ABORTED }
}

/// Writes the next of `mask + 1` flows: the number's low 14 bits go to the source port, the next 16 to the address.
#[inline(always)]
fn next_flow(ctx: &XdpContext) -> bool {
    let Some(position) = POSITION.get_ptr_mut(0) else {
        return false;
    };
    let start = ctx.data();
    if start + SOURCE_PORT + 2 > ctx.data_end() {
        return false;
    }
    // SAFETY: this program's own counter and, checked above, this frame's own bytes.
    unsafe {
        let [flow, mask] = *position;
        *position = [flow.wrapping_add(1), mask];
        let flow = flow & mask;
        let port = 1_024 + (flow & 0x3fff) as u16;
        *((start + SOURCE_ADDRESS + 2) as *mut [u8; 2]) = ((flow >> 14) as u16).to_be_bytes();
        *((start + SOURCE_PORT) as *mut [u8; 2]) = port.to_be_bytes();
    }
    true
}
