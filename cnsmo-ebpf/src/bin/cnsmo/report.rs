//! Messages to the agent's log about what cannot happen while memory is sound.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, macros::map, maps::Array};
use aya_log_ebpf::warn;

use crate::maps::spend;

/// Messages that the agent still takes; it fills this up each second. Under a damaged policy every new flow is worth a
/// message, and who sends packets must not choose how many are written.
#[map]
static REPORTS_LEFT: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// A packet met a damaged policy. Global, so that the verifier proves it once. Not `cold`: such functions get a section
/// of their own, where the loader resolves calls wrongly.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn damaged_policy() -> u64 {
    if may_report() {
        warn!(&(), target: "classifier", "the policy in the kernel is damaged: new flows are dropped");
    }
    0
}

#[inline(always)]
fn may_report() -> bool {
    REPORTS_LEFT.get_ptr_mut(0).is_some_and(spend)
}
