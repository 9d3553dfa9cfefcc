//! XDP and TC programs.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    helpers::generated::bpf_xdp_get_buff_len,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use cnsmo_ebpf::{
    packet::Direct,
    pipeline::{ETHERNET, TUNNEL, Verdict, run},
};

use crate::maps::Maps;

/// Headers end here at the latest in any packet that is not refused: Ethernet, two tags, IPv6, extension headers, TCP.
/// What an skb keeps outside its linear part up to there is pulled in.
const HEADERS_MAX: u32 = 256;

/// Towards the VM, on a network card whose driver takes XDP.
#[xdp(frags)]
pub fn nic_xdp(ctx: XdpContext) -> u32 {
    // SAFETY: the context is this program's own.
    let length = unsafe { bpf_xdp_get_buff_len(ctx.ctx) };
    // SAFETY: both ends come from this context.
    let packet = unsafe { Direct::new(ctx.data(), ctx.data_end(), length as usize) };
    match run::<_, _, ETHERNET, false>(&packet, &Maps) {
        Verdict::Pass => xdp_action::XDP_PASS,
        Verdict::Drop(_) => xdp_action::XDP_DROP,
    }
}

/// Towards the VM, on a network card without XDP.
#[classifier]
pub fn nic_ingress(ctx: TcContext) -> i32 {
    tc::<ETHERNET, false>(&ctx)
}

/// Away from the VM, on a network card.
#[classifier]
pub fn nic_egress(ctx: TcContext) -> i32 {
    tc::<ETHERNET, true>(&ctx)
}

/// Towards the VM, out of a tunnel: no Ethernet header.
#[classifier]
pub fn tunnel_ingress(ctx: TcContext) -> i32 {
    tc::<TUNNEL, false>(&ctx)
}

/// Away from the VM, into a tunnel.
#[classifier]
pub fn tunnel_egress(ctx: TcContext) -> i32 {
    tc::<TUNNEL, true>(&ctx)
}

#[inline(always)]
fn tc<const L3: usize, const EGRESS: bool>(ctx: &TcContext) -> i32 {
    let length = ctx.len();
    if ((ctx.data_end() - ctx.data()) as u32) < length.min(HEADERS_MAX) {
        // On failure the parser meets the end of the data and refuses.
        let _ = ctx.pull_data(length.min(HEADERS_MAX));
    }
    // SAFETY: both ends come from this context, read after the pull.
    let packet = unsafe { Direct::new(ctx.data(), ctx.data_end(), length as usize) };
    match run::<_, _, L3, EGRESS>(&packet, &Maps) {
        // On to the next program or filter of the hook.
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::Drop(_) => TC_ACT_SHOT,
    }
}
