//! The only promises of plain old data: `repr(C)`, every bit pattern valid, no implicit padding (see the assertions).

use crate::{control, flow, probe, stat};

// SAFETY: as the module says.
unsafe impl aya::Pod for flow::FlowKey<[u8; 4]> {}
// SAFETY: as the module says.
unsafe impl aya::Pod for flow::FlowKey<[u8; 16]> {}
// SAFETY: as the module says.
unsafe impl aya::Pod for flow::Conn {}
// SAFETY: as the module says.
unsafe impl aya::Pod for control::Control {}
// SAFETY: as the module says.
unsafe impl aya::Pod for control::RuleAction {}
// SAFETY: as the module says.
unsafe impl aya::Pod for stat::Count {}
// SAFETY: as the module says.
unsafe impl aya::Pod for probe::Header {}
