//! XDP and TC programs.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
    helpers::generated::bpf_xdp_get_buff_len,
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use cnsmo_ebpf::{
    packet::{BEHIND, Direct, FRONT, WHOLE},
    pipeline::{ETHERNET, TUNNEL, Verdict, run},
};

use crate::{
    maps::Maps,
    skb::{rewrite_v4, rewrite_v6},
};

/// Headers end here at the latest in any packet that is not refused: Ethernet, two tags, IPv6, extension headers, TCP.
/// What an skb keeps outside its linear part up to there is pulled in.
const HEADERS_MAX: u32 = 256;

/// Towards the VM, on a network card whose driver takes XDP.
#[xdp(frags)]
pub fn nic_xdp(ctx: XdpContext) -> u32 {
    // SAFETY: the context is this program's own.
    let length = unsafe { bpf_xdp_get_buff_len(ctx.ctx) };
    // SAFETY: both ends come from this context.
    let packet = unsafe { Direct::<FRONT>::new(ctx.data(), ctx.data_end(), length as u32, 0, 0) };
    match run::<_, _, ETHERNET, false>(&packet, &Maps) {
        // Rewriting is for the roles that can.
        Verdict::Pass | Verdict::RewriteV4 | Verdict::RewriteV6 => xdp_action::XDP_PASS,
        Verdict::Drop(_) => xdp_action::XDP_DROP,
    }
}

/// Towards the VM, on a network card with XDP: what XDP leaves to TC, because it has to be rewritten.
#[classifier]
pub fn nic_balance(ctx: TcContext) -> i32 {
    tc::<BEHIND, ETHERNET, false>(&ctx)
}

/// Towards the VM, on a network card without XDP.
#[classifier]
pub fn nic_ingress(ctx: TcContext) -> i32 {
    tc::<WHOLE, ETHERNET, false>(&ctx)
}

/// Away from the VM, on a network card.
#[classifier]
pub fn nic_egress(ctx: TcContext) -> i32 {
    tc::<WHOLE, ETHERNET, true>(&ctx)
}

/// Towards the VM, out of a tunnel: no Ethernet header.
#[classifier]
pub fn tunnel_ingress(ctx: TcContext) -> i32 {
    tc::<WHOLE, TUNNEL, false>(&ctx)
}

/// Away from the VM, into a tunnel.
#[classifier]
pub fn tunnel_egress(ctx: TcContext) -> i32 {
    tc::<WHOLE, TUNNEL, true>(&ctx)
}

/// A packet at a TC hook.
#[inline(always)]
pub fn tc<const ROLE: u8, const L3: usize, const EGRESS: bool>(ctx: &TcContext) -> i32 {
    let length = ctx.len();
    if ((ctx.data_end() - ctx.data()) as u32) < length.min(HEADERS_MAX) {
        // On failure the parser meets the end of the data and refuses.
        let _ = ctx.pull_data(length.min(HEADERS_MAX));
    }
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // SAFETY: the context is this program's own.
    let (ifindex, mark) = unsafe { ((*skb).ifindex, (*skb).mark) };
    // SAFETY: both ends come from this context, read after the pull.
    let packet = unsafe { Direct::<ROLE>::new(ctx.data(), ctx.data_end(), length, ifindex, mark) };
    match run::<_, _, L3, EGRESS>(&packet, &Maps) {
        // On to the next program or filter of the hook.
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::RewriteV4 => rewrite_v4(skb) as i32,
        Verdict::RewriteV6 => rewrite_v6(skb) as i32,
        Verdict::Drop(_) => TC_ACT_SHOT,
    }
}
