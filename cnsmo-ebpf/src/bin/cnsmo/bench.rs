//! Programs for `cargo xtask bench fw` and `lb`; no hook runs them. A test run repeats one frame, and a frame of one flow
//! stays in the first-level cache: these set the flow from a counter before each run.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{TC_ACT_OK, TC_ACT_SHOT, xdp_action},
    helpers::generated::bpf_skb_store_bytes,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use cnsmo_common::probe::BENCH_HEADERS;
use cnsmo_ebpf::{
    packet::{Direct, FRONT, WHOLE},
    pipeline::{ETHERNET, Verdict, run},
};

use crate::{
    maps::Maps,
    probe::{POSITION, RESULTS},
    programs::tc,
};

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
    let packet = unsafe { Direct::<FRONT>::new(start, end, (end - start) as u32, 0, 0) };
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

/// What `nic_ingress` does, on the headers of the next flow. That rewrites the one frame of a test run in place, so each run
/// first writes the headers anew.
#[classifier]
pub fn bench_balancer(ctx: TcContext) -> i32 {
    if restore(&ctx) { tc::<WHOLE, ETHERNET, false>(&ctx) } else { TC_ACT_SHOT }
}

/// All that [`bench_balancer`] does but `nic_ingress`.
#[classifier]
pub fn bench_no_balancer(ctx: TcContext) -> i32 {
    if restore(&ctx) { TC_ACT_OK as i32 } else { TC_ACT_SHOT }
}

/// Sets the next flow in the headers that `RESULTS` begins with, as [`next_flow`] does, and writes them to the frame.
#[inline(always)]
fn restore(ctx: &TcContext) -> bool {
    const TYPE: usize = 12;
    const IPV6: [u8; 2] = [0x86, 0xdd];
    /// Last two bytes of the source address, and the source port.
    const V4: [usize; 2] = [SOURCE_ADDRESS + 2, SOURCE_PORT];
    const V6: [usize; 2] = [14 + 8 + 14, 14 + 40];
    let Some(position) = POSITION.get_ptr_mut(0) else {
        return false;
    };
    let Some(headers) = RESULTS.get_ptr_mut(0) else {
        return false;
    };
    let headers = headers.cast::<[u8; BENCH_HEADERS]>();
    // SAFETY: this program's own counter and headers, which live as long as it runs; the value is longer than them.
    let result = unsafe {
        let [flow, mask] = *position;
        *position = [flow.wrapping_add(1), mask];
        let flow = flow & mask;
        let (address, port) = flow_ends(flow);
        let v6 = (*headers)[TYPE] == IPV6[0] && (*headers)[TYPE + 1] == IPV6[1];
        let [address_at, port_at] = if v6 { V6 } else { V4 };
        *headers.byte_add(address_at).cast::<[u8; 2]>() = address;
        *headers.byte_add(port_at).cast::<[u8; 2]>() = port;
        bpf_skb_store_bytes(ctx.as_ptr().cast(), 0, headers.cast(), BENCH_HEADERS as u32, 0)
    };
    result == 0
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
        let (address, port) = flow_ends(flow);
        *((start + SOURCE_ADDRESS + 2) as *mut [u8; 2]) = address;
        *((start + SOURCE_PORT) as *mut [u8; 2]) = port;
    }
    true
}

/// Low half of the source address, and source port.
#[inline(always)]
fn flow_ends(flow: u32) -> ([u8; 2], [u8; 2]) {
    let port = 1_024 + (flow & 0x3fff) as u16;
    (((flow >> 14) as u16).to_be_bytes(), port.to_be_bytes())
}
