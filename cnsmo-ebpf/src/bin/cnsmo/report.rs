//! Messages to the agent's log about what cannot happen while memory is sound.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, macros::map, maps::Array};
use aya_log_ebpf::warn;

/// Messages that the agent still takes; it fills this up each second. Under a damaged policy every new flow is worth a
/// message, and who sends packets must not choose how many are written.
#[map]
static REPORTS_LEFT: Array<u32> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// One function per program, because a name handed in would need a table of pointers. Global, so that the verifier
/// proves it once. Not `cold`: such functions get a section of their own, where the loader resolves calls wrongly.
macro_rules! damaged {
    ($($function:ident: $program:literal,)*) => {$(
        /// A packet met a damaged policy.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub fn $function() -> u64 {
            if may_report() {
                warn!(&(), target: $program, "the policy in the kernel is damaged: packets are dropped");
            }
            0
        }
    )*};
}
damaged! {
    damaged_nic_xdp: "nic_xdp",
    damaged_nic_ingress: "nic_ingress",
    damaged_nic_egress: "nic_egress",
    damaged_tunnel_ingress: "tunnel_ingress",
    damaged_tunnel_egress: "tunnel_egress",
}

#[inline(always)]
fn may_report() -> bool {
    let Some(left) = REPORTS_LEFT.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: valid while the program runs. CPUs that read at the same time write one message each: no more than CPUs.
    unsafe {
        let now = left.read_volatile();
        if now == 0 {
            return false;
        }
        left.write_volatile(now - 1);
    }
    true
}
