//! The one value that steers all programs, mapped into the agent's memory.

use crate::{
    Direction,
    balance::{FILTER_WORDS, filter_bit},
    flow::{Address, state},
};

/// Times are in jiffies, which cost nothing to read; the agent learns the kernel's HZ and converts.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// A [`Live`] word. Read once per packet: every packet is judged by one policy as a whole.
    pub live: u64,
    /// Until then (jiffies) a TCP segment without a flow may make one, if a rule allows it: connections that are older
    /// than the firewall go on.
    pub pickup_until: u64,
    /// As `live`, for the probe program: the half under self-check.
    pub probe: u64,
    /// Timeouts by state, in jiffies. As long as a state can be masked to: an access cannot miss.
    pub timeouts: [u32; TIMEOUTS],
    /// Timeout of a fragmented datagram, in jiffies.
    pub fragment_timeout: u32,
    /// `Conn::seen` is written when it is older than this many jiffies: a busy flow does not keep its cache line dirty.
    pub refresh: u32,
    /// Bits of [`switch`].
    pub switches: u32,
    /// Kernel's index of the tunnel device.
    pub tunnel: u32,
    /// MTU of the tunnel device; 0: TCP's segments are not adapted to it.
    pub tunnel_mtu: u32,
    /// Address of this VM in the network: as which it speaks to backends for others.
    pub own_v4: [u8; 4],
    /// As `own_v4`.
    pub own_v6: [u8; 16],
    /// The network's prefix, host order: address and mask.
    pub prefix_v4: [u64; 2],
    /// As `prefix_v4`, each with its high half first.
    pub prefix_v6: [[u64; 2]; 2],
    /// Destinations that XDP leaves to TC, which can rewrite.
    pub left_to_tc: [u64; FILTER_WORDS],
    /// Destinations that TC behind XDP judges: all of `left_to_tc` at any time, so that every packet is judged.
    pub judged_by_tc: [u64; FILTER_WORDS],
}
const _: () = assert!(size_of::<Control>() == 1_200);

/// Switches of a [`Control`]: what most VMs do not have costs them one test.
pub mod switch {
    /// There are services.
    pub const SERVICES: u32 = 1;
    /// XDP leaves destinations to TC.
    pub const LEAVE_TO_TC: u32 = 2;
    /// `prefix_v4` is in force.
    pub const PREFIX_V4: u32 = 4;
    /// `prefix_v6` is in force.
    pub const PREFIX_V6: u32 = 8;
    /// Later fragments whose first one was not seen pass.
    pub const ORPHANS_PASS: u32 = 16;
}

impl Control {
    /// Whether XDP leaves packets to `destination` to TC.
    #[inline(always)]
    pub fn leaves_to_tc<A: Address>(&self, destination: A) -> bool {
        let (word, bit) = filter_bit(destination);
        self.switches & switch::LEAVE_TO_TC != 0 && self.left_to_tc[word] & bit != 0
    }
    /// Whether TC behind XDP judges packets to `destination`.
    #[inline(always)]
    pub fn judges_in_tc<A: Address>(&self, destination: A) -> bool {
        let (word, bit) = filter_bit(destination);
        self.judged_by_tc[word] & bit != 0
    }
}

/// Places in `Control::timeouts`; a power of two.
pub const TIMEOUTS: usize = 16;
const _: () = assert!(state::COUNT <= TIMEOUTS);

/// Which policy is live, in one word.
///
/// ```text
/// bit 0 half | 1 ingress default: allow | 2 egress default: allow | 3 open
/// bits 4..8, 8..12 IPv4 trees, ingress and egress | 12..16, 16..20 IPv6 trees
/// bit 20 ingress default: answer what it refuses | 21 egress | 22 ingress default: audit | 23 egress | 32..64 generation
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live(pub u64);

/// Set in [`Live`]: no policy selects this VM. Flows are tracked, nothing is refused for having none.
pub const OPEN: u64 = 1 << 3;

impl Live {
    /// Half of the tables that is live, 0 or 1.
    #[inline(always)]
    pub const fn half(self) -> u64 {
        self.0 & 1
    }
    /// Whether flows that no rule matches may pass.
    #[inline(always)]
    pub const fn allows_by_default(self, direction: Direction) -> bool {
        self.0 >> (1 + direction as u32) & 1 != 0
    }
    /// What happens to flows that no rule matches.
    #[inline(always)]
    pub const fn default_action(self, direction: Direction) -> RuleAction {
        let verdict = if self.allows_by_default(direction) {
            verdict::ALLOW
        } else if self.0 >> (20 + direction as u32) & 1 != 0 {
            verdict::REJECT
        } else {
            verdict::DENY
        };
        let audit = self.0 >> (22 + direction as u32) & 1 != 0;
        let flags = if audit { rule_flag::AUDIT } else { 0 };
        let slot = match direction {
            Direction::Ingress => SLOT_DEFAULT_INGRESS,
            Direction::Egress => SLOT_DEFAULT_EGRESS,
        };
        RuleAction { slot, verdict, flags, limit: 0 }
    }
    /// Whether no policy selects this VM.
    #[inline(always)]
    pub const fn is_open(self) -> bool {
        self.0 & OPEN != 0
    }
    /// Trees of the IPv4 blob.
    #[inline(always)]
    pub const fn trees_v4(self, direction: Direction) -> u64 {
        self.0 >> (4 + 4 * direction as u32) & 15
    }
    /// Trees of the IPv6 blob.
    #[inline(always)]
    pub const fn trees_v6(self, direction: Direction) -> u64 {
        self.0 >> (12 + 4 * direction as u32) & 15
    }
    /// Number of the policy; flows admitted by another one are judged anew.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// The parts of a [`Live`] word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LiveParts {
    /// 0 or 1.
    pub half: u8,
    /// Ingress, egress.
    pub default_allow: [bool; 2],
    /// What the defaults refuse is answered. Ingress, egress.
    pub default_reject: [bool; 2],
    /// What the defaults refuse passes all the same. Ingress, egress.
    pub default_audit: [bool; 2],
    /// No policy selects this VM.
    pub open: bool,
    /// Ingress, egress.
    pub trees_v4: [u32; 2],
    /// Ingress, egress.
    pub trees_v6: [u32; 2],
    /// Number of the policy.
    pub generation: u32,
}

impl LiveParts {
    /// Takes a word apart.
    pub const fn unpack(live: Live) -> Self {
        use Direction::{Egress, Ingress};
        Self {
            half: live.half() as u8,
            default_allow: [live.allows_by_default(Ingress), live.allows_by_default(Egress)],
            default_reject: [live.0 >> 20 & 1 != 0, live.0 >> 21 & 1 != 0],
            default_audit: [live.0 >> 22 & 1 != 0, live.0 >> 23 & 1 != 0],
            open: live.is_open(),
            trees_v4: [live.trees_v4(Ingress) as u32, live.trees_v4(Egress) as u32],
            trees_v6: [live.trees_v6(Ingress) as u32, live.trees_v6(Egress) as u32],
            generation: live.generation(),
        }
    }

    /// Packs the parts.
    pub const fn pack(self) -> Live {
        Live(
            (self.half & 1) as u64
                | (self.default_allow[0] as u64) << 1
                | (self.default_allow[1] as u64) << 2
                | if self.open { OPEN } else { 0 }
                | ((self.trees_v4[0] & 15) as u64) << 4
                | ((self.trees_v4[1] & 15) as u64) << 8
                | ((self.trees_v6[0] & 15) as u64) << 12
                | ((self.trees_v6[1] & 15) as u64) << 16
                | (self.default_reject[0] as u64) << 20
                | (self.default_reject[1] as u64) << 21
                | (self.default_audit[0] as u64) << 22
                | (self.default_audit[1] as u64) << 23
                | (self.generation as u64) << 32,
        )
    }
}

/// What a rule does, found by its index in the live half of the rule table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleAction {
    /// Place of its counter.
    pub slot: u32,
    /// One of [`verdict`].
    pub verdict: u8,
    /// Bits of [`rule_flag`].
    pub flags: u8,
    /// Place of its [`Limit`] in a half of the table; 0: none.
    pub limit: u16,
}
const _: () = assert!(size_of::<RuleAction>() == 8);

/// What a rule decides.
pub mod verdict {
    /// The packet is dropped without an answer.
    pub const DENY: u8 = 0;
    /// The flow may pass, and so may its answers.
    pub const ALLOW: u8 = 1;
    /// The packet is dropped, and its sender is told.
    pub const REJECT: u8 = 2;
}

/// Flags of a rule.
pub mod rule_flag {
    /// Each decision about a new flow is recorded.
    pub const LOG: u8 = 1;
    /// What it refuses passes all the same, and is recorded.
    pub const AUDIT: u8 = 2;
}

/// How many flows a rule allows: new ones by the generic cell rate algorithm (ITU-T I.371), which needs one word per
/// bucket, and open ones of one source.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// Nanoseconds between flows at the rate allowed; 0: any rate.
    pub interval: u64,
    /// Nanoseconds that a flow may be early: (burst - 1) intervals.
    pub tolerance: u64,
    /// Flows that one source may have open; 0: any number.
    pub connections: u32,
    /// Under which those are counted, the same for the same rule of the next policy. Not 0 where `connections` is not.
    pub group: u16,
    /// 1: each source has a bucket of its own; 0: all share one.
    pub per_source: u8,
    /// Zero.
    pub pad: u8,
}
const _: () = assert!(size_of::<Limit>() == 24);

/// Limits in one half, the unused place 0 among them; a power of two.
pub const LIMITS_MAX: u32 = 1_024;

/// Whose bucket, or whose number of open flows it is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BucketKey {
    /// IPv4 address as [`Address::widen`] has it; of IPv6 the first 64 bits, which is what one host has for itself.
    pub source: [u8; 16],
    /// Place of the limit; of open flows its group.
    pub limit: u32,
}
const _: () = assert!(size_of::<BucketKey>() == 20);

/// Counter of flows towards the VM that no rule matched.
pub const SLOT_DEFAULT_INGRESS: u32 = 0;
/// Counter of flows away from the VM that no rule matched.
pub const SLOT_DEFAULT_EGRESS: u32 = 1;
/// Counter of the first rule.
pub const SLOT_FIRST: u32 = 2;
