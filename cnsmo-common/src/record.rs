//! What the data path tells about single packets: those that are dropped, logged, or to be answered.

/// One packet. Sampled: a flood makes no more records than there is room for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds of the monotonic clock.
    pub time: u64,
    /// The IP header without options; of IPv4 the first 20 bytes.
    pub l3: [u8; 40],
    /// Start of the L4 header; zeros from where the packet ends, or if it was not read that far.
    pub l4: [u8; 16],
    /// Counter of the rule that decided, if `why` has [`why::RULE`].
    pub slot: u32,
    /// Generation of the policy that decided.
    pub generation: u32,
    /// Bytes of the frame.
    pub length: u32,
    /// Kernel's index of the device; 0: not known.
    pub ifindex: u32,
    /// 4 or 6.
    pub family: u8,
    /// Protocol of the L4 header.
    pub proto: u8,
    /// 0 ingress, 1 egress.
    pub direction: u8,
    /// Zone of the flow tables.
    pub zone: u8,
    /// Number of the [`crate::stat::Reason`], or [`PASSED`].
    pub outcome: u8,
    /// Bits of [`why`].
    pub why: u8,
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<Record>() == 88);

/// The packet was not dropped.
pub const PASSED: u8 = u8::MAX;

/// What a record is for.
pub mod why {
    /// A rule or a default decided.
    pub const RULE: u8 = 1;
    /// The rule asks for a record.
    pub const LOG: u8 = 2;
    /// The packet passed, because the policy is on trial.
    pub const AUDIT: u8 = 4;
    /// The sender is to be told.
    pub const ANSWER: u8 = 8;
}

/// Mark of the agent's own answers, which belong to no flow (`SO_MARK`, which only root may set).
pub const ANSWER_MARK: u32 = 0x636e_736d;

/// Places of the budgets, which the agent fills up: who sends packets must not choose how much is told of them.
pub mod budget {
    /// Records that are for reading.
    pub const RECORDS: u32 = 0;
    /// Records that are to be answered.
    pub const ANSWERS: u32 = 1;
    /// Number of budgets.
    pub const COUNT: u32 = 2;
}
