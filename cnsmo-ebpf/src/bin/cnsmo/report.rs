//! Messages to the agent's log about what cannot happen while memory is sound.

use aya_ebpf::{bindings::BPF_F_MMAPABLE, macros::map, maps::Array};
use aya_log_ebpf::warn;

/// Messages that the agent still takes; it fills this up each second. Under a damaged policy every new flow is worth a
/// message, and who sends packets must not choose how many are written.
#[map]
static REPORTS_LEFT: Array<u32> = Array::with_max_entries(1, BPF_F_MMAPABLE);

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
