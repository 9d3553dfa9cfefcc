//! Programs for `cargo xtask bench fw` and `lb`; no hook runs them. A test run repeats one frame, and a frame of one flow
//! stays in the first-level cache: these set the flow from a counter before each run. [`bench_send`] and [`bench_drop`] are the
//! ends of a pair of devices.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{TC_ACT_OK, TC_ACT_SHOT, xdp_action},
    helpers::generated::{bpf_redirect, bpf_skb_store_bytes},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use cnsmo_common::{
    blob::DPORT_AT,
    probe::{BENCH_HEADERS, Header, TRACE_LEN},
};
use cnsmo_ebpf::{
    packet::{Direct, FRONT, WHOLE},
    pipeline::{ETHERNET, Verdict, run},
};

use crate::{
    maps::Maps,
    probe::{POSITION, RESULTS, TRACE},
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

/// Sends the next frame of many out of a device: addresses and destination port are those of the next IPv4 header of the
/// trace, the source port is that of the next flow, and the rest is the frame that `RESULTS` begins with. Behind it is the
/// device. Whoever had the memory of the frame before may have written to all of it.
#[xdp]
pub fn bench_send(ctx: XdpContext) -> u32 {
    match next_frame(&ctx) {
        // SAFETY: no pointers.
        Some(device) => (unsafe { bpf_redirect(device, 0) }) as u32,
        None => xdp_action::XDP_ABORTED,
    }
}

/// What a packet costs before anybody looks at it.
#[xdp]
pub fn bench_drop(_: XdpContext) -> u32 {
    xdp_action::XDP_DROP
}

/// Returns the index of the device.
#[inline(always)]
fn next_frame(ctx: &XdpContext) -> Option<u32> {
    const WORDS: usize = BENCH_HEADERS / 8;
    /// In the frame at hand: what the rest of the header adds up to.
    const CHECKSUM: usize = 14 + 10;
    let position = POSITION.get_ptr_mut(0)?;
    let trace = TRACE.get_ptr(0)?.cast::<Header>();
    let results = RESULTS.get_ptr(0)?;
    let frame = ctx.data();
    if frame + BENCH_HEADERS > ctx.data_end() {
        return None;
    }
    // SAFETY: this program's own maps, whose values live as long as it runs and are longer than what is read; the index into
    // the trace is masked; the frame's length is checked above.
    unsafe {
        let flow = (*position)[0];
        (*position)[0] = flow.wrapping_add(1);
        let words = results.cast::<u64>();
        for n in 0..WORDS {
            (frame as *mut u64).add(n).write_unaligned(*words.add(n));
        }
        let header = &*trace.add((flow & (TRACE_LEN - 1)) as usize);
        let (source, destination) = (header.src[1] as u32, header.dst[1] as u32);
        let (_, port) = flow_ends(flow);
        let rest = u16::from_be(*((frame + CHECKSUM) as *const u16));
        let halves = |address: u32| (address >> 16) + (address & 0xffff);
        let sum = u32::from(rest) + halves(source) + halves(destination);
        let sum = (sum >> 16) + (sum & 0xffff);
        let sum = !((sum >> 16) + sum) as u16;
        *((frame + CHECKSUM) as *mut [u8; 2]) = sum.to_be_bytes();
        *((frame + SOURCE_ADDRESS) as *mut [u8; 4]) = source.to_be_bytes();
        *((frame + SOURCE_ADDRESS + 4) as *mut [u8; 4]) = destination.to_be_bytes();
        *((frame + SOURCE_PORT) as *mut [u8; 2]) = port;
        let to = (header.lanes >> DPORT_AT) as u16;
        *((frame + SOURCE_PORT + 2) as *mut [u8; 2]) = to.to_be_bytes();
        Some(*results.cast::<u32>().add(BENCH_HEADERS / 4))
    }
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
