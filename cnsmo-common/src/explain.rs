//! What the programs would do with a packet: asked by the agent, with nothing changed by the question.

use crate::flow::Conn;

/// The answer of an `explain` program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The flow that the packet belongs to or would begin, as it would be afterwards; `translated` and `step` say whether
    /// it means anything.
    pub conn: Conn,
    /// Source after translation, [`crate::flow::Address::widen`].
    pub src: [u8; 16],
    /// Destination after translation.
    pub dst: [u8; 16],
    /// Source port after translation, network order.
    pub sport: [u8; 2],
    /// Destination port after translation, network order.
    pub dport: [u8; 2],
    /// Counter of the rule that decided, if `why` has [`crate::record::why::RULE`], or that admitted the flow.
    pub slot: u32,
    /// Number of the [`crate::stat::Reason`], or [`PASSES`].
    pub outcome: u32,
    /// Bits of [`crate::record::why`].
    pub why: u8,
    /// 1: the flow is known.
    pub known: u8,
    /// 1: the packet is translated.
    pub translated: u8,
    /// 1: it begins a flow to a virtual address.
    pub balanced: u8,
    /// Place of the balancer, if `balanced`.
    pub balancer: u16,
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<Explanation>() == 68);

/// The packet passes.
pub const PASSES: u32 = u32::MAX;
/// The program found no answer.
pub const NO_ANSWER: u32 = u32::MAX - 1;
