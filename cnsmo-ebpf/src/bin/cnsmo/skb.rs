//! Changing an skb and sending it on.

use core::ptr;

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT,
        TC_ACT_UNSPEC,
    },
    helpers::generated::{
        bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh,
        bpf_skb_change_head, bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
};
use cnsmo_common::control::Control;
use cnsmo_ebpf::{
    parse::Family,
    pipeline::ETHERNET,
    rewrite::{Checksum, Rewrite, rewrite},
    tables::{Case, Onward, Tables as _},
};

use crate::maps::{Maps, last_v4, last_v6};

/// Rewrites the packet that was judged last, and sends it on: an action of the hook.
#[inline(never)]
pub fn rewrite_v4(skb: *mut __sk_buff) -> i64 {
    match (last_v4(), Maps.control()) {
        (Some(case), Some(control)) => finish(skb, case, control),
        _ => TC_ACT_SHOT as i64,
    }
}

/// As [`rewrite_v4`].
#[inline(never)]
pub fn rewrite_v6(skb: *mut __sk_buff) -> i64 {
    match (last_v6(), Maps.control()) {
        (Some(case), Some(control)) => finish(skb, case, control),
        _ => TC_ACT_SHOT as i64,
    }
}

#[inline(always)]
fn finish<A: Family>(skb: *mut __sk_buff, case: &Case<A>, control: &Control) -> i64 {
    if rewrite(&Skb(skb), case, control).is_none() {
        // The kernel has no memory to change it.
        return TC_ACT_SHOT as i64;
    }
    match case.onward {
        Onward::Same => TC_ACT_UNSPEC as i64,
        // SAFETY: no pointers. Without a device the kernel drops the packet.
        Onward::Tunnel => unsafe { bpf_redirect(control.tunnel, 0) },
        Onward::Client => to_client(skb, case.flow.translation.ifindex),
    }
}

/// The kernel finds route and neighbour, and fills in the Ethernet header.
#[inline(always)]
fn to_client(skb: *mut __sk_buff, ifindex: u32) -> i64 {
    // SAFETY: the context is this program's own; without parameters the kernel looks at the packet's destination.
    unsafe {
        if bpf_skb_change_head(skb, ETHERNET as u32, 0) != 0 {
            return TC_ACT_SHOT as i64;
        }
        bpf_redirect_neigh(ifindex, ptr::null_mut(), 0, 0)
    }
}

struct Skb(*mut __sk_buff);

impl Skb {
    #[inline(always)]
    fn store<const N: usize>(&self, at: usize, bytes: &[u8; N], flags: u32) -> Option<()> {
        let from = bytes.as_ptr().cast();
        // SAFETY: N bytes are there; the kernel checks the offset.
        let result =
            unsafe { bpf_skb_store_bytes(self.0, at as u32, from, N as u32, flags as u64) };
        if result == 0 { Some(()) } else { None }
    }
}

impl Rewrite for Skb {
    #[inline(always)]
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let to = bytes.as_mut_ptr().cast();
        // SAFETY: there is room for N bytes; the kernel checks the offset.
        let result = unsafe { bpf_skb_load_bytes(self.0.cast(), at as u32, to, N as u32) };
        if result == 0 { Some(bytes) } else { None }
    }
    #[inline(always)]
    fn write<const N: usize>(&self, at: usize, bytes: &[u8; N]) -> Option<()> {
        self.store(at, bytes, 0)
    }
    #[inline(always)]
    fn write_unsummed<const N: usize>(&self, at: usize, bytes: &[u8; N]) -> Option<()> {
        self.store(at, bytes, BPF_F_RECOMPUTE_CSUM)
    }
    #[inline(always)]
    fn change<const N: usize>(&self, from: &[u8; N], to: &[u8; N]) -> u32 {
        let size = N as u32;
        // The kernel only reads.
        let (from, to) = (from.as_ptr().cast_mut().cast(), to.as_ptr().cast_mut().cast());
        // SAFETY: both are N bytes long.
        unsafe { bpf_csum_diff(from, size, to, size, 0) as u32 }
    }
    #[inline(always)]
    fn correct_header(&self, at: usize, change: u32) -> Option<()> {
        // SAFETY: the kernel checks the offset.
        let result = unsafe { bpf_l3_csum_replace(self.0, at as u32, 0, change as u64, 0) };
        if result == 0 { Some(()) } else { None }
    }
    #[inline(always)]
    fn correct(&self, at: usize, change: u32, which: Checksum) -> Option<()> {
        let pseudo = if which.pseudo { BPF_F_PSEUDO_HDR } else { 0 };
        let udp = if which.udp { BPF_F_MARK_MANGLED_0 } else { 0 };
        let flags = (pseudo | udp) as u64;
        // SAFETY: the kernel checks the offset.
        let result = unsafe { bpf_l4_csum_replace(self.0, at as u32, 0, change as u64, flags) };
        if result == 0 { Some(()) } else { None }
    }
}
