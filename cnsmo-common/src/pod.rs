//! The only promises of plain old data: `repr(C)`, every bit pattern valid, no implicit padding (see the assertions).

use crate::{balance, control, explain, flow, probe, record, stat};

// SAFETY: as the module says.
unsafe impl aya::Pod for flow::FlowKey<[u8; 4]> {}
// SAFETY: as the module says.
unsafe impl aya::Pod for flow::FlowKey<[u8; 16]> {}
// SAFETY: as the module says.
unsafe impl aya::Pod for flow::Flow<[u8; 4]> {}
// SAFETY: as the module says.
unsafe impl aya::Pod for flow::Flow<[u8; 16]> {}
// SAFETY: as the module says.
unsafe impl aya::Pod for balance::ServiceKey {}
// SAFETY: as the module says.
unsafe impl aya::Pod for balance::Service {}
// SAFETY: as the module says.
unsafe impl aya::Pod for balance::Backend {}
// SAFETY: as the module says.
unsafe impl aya::Pod for control::Control {}
// SAFETY: as the module says.
unsafe impl aya::Pod for control::RuleAction {}
// SAFETY: as the module says.
unsafe impl aya::Pod for control::Limit {}
// SAFETY: as the module says.
unsafe impl aya::Pod for control::BucketKey {}
// SAFETY: as the module says.
unsafe impl aya::Pod for explain::Explanation {}
// SAFETY: as the module says.
unsafe impl aya::Pod for record::Record {}
// SAFETY: as the module says.
unsafe impl aya::Pod for stat::Count {}
// SAFETY: as the module says.
unsafe impl aya::Pod for probe::Header {}
