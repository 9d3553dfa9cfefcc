//! Counters, and the reasons why a packet is dropped.

/// Packets and bytes, of one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes of the frames, link-layer header included where there is one.
    pub bytes: u64,
}
const _: () = assert!(size_of::<Count>() == 16);

/// Why a packet is dropped. The words are documented in docs/drop-reasons.md.
///
/// As wide as the place of a counter: the two arms of a `Result<u32, Reason>` are then one register, and none is left
/// unwritten, which the verifier would refuse.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A header is cut short, contradicts itself, or is tagged more than twice.
    Malformed = 0,
    /// Flags that no TCP sends: none, SYN+FIN, FIN without ACK...
    TcpFlags = 1,
    /// A first fragment without its whole L4 header, or one that overwrites it (RFC 1858, RFC 3128).
    FragmentTiny = 2,
    /// A later fragment whose first one was not seen.
    FragmentOrphan = 3,
    /// More IPv6 extension headers than are followed, or a type 0 routing header (RFC 5095).
    ExtensionHeaders = 4,
    /// A TCP segment other than SYN, or an echo reply, that belongs to no flow.
    NoFlow = 5,
    /// A rule denies it.
    Denied = 6,
    /// No rule matches and the default denies.
    DeniedByDefault = 7,
    /// It belongs to a flow that the policy in force no longer allows.
    Revoked = 8,
    /// An ICMP error about a packet of no flow.
    IcmpUnrelated = 9,
    /// A TCP segment that cannot follow in the state of its flow.
    TcpState = 10,
    /// The policy in the kernel is damaged. Closed rather than wrong.
    Classifier = 11,
    /// Neither IP nor ARP, and the default denies.
    NotIp = 12,
    /// A flow to a virtual address that no backend takes.
    NoBackend = 13,
    /// A flow to a virtual address for which no source port is left.
    NatPorts = 14,
    /// On a network card, from or to an address that is reached through the tunnel alone.
    NotTunnelled = 15,
    /// A rule allows it, but not that many new flows in that time.
    Limited = 16,
    /// A rule allows it, but not that many open flows of one source.
    Connections = 17,
}

impl Reason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 18] = [
        Self::Malformed,
        Self::TcpFlags,
        Self::FragmentTiny,
        Self::FragmentOrphan,
        Self::ExtensionHeaders,
        Self::NoFlow,
        Self::Denied,
        Self::DeniedByDefault,
        Self::Revoked,
        Self::IcmpUnrelated,
        Self::TcpState,
        Self::Classifier,
        Self::NotIp,
        Self::NoBackend,
        Self::NatPorts,
        Self::NotTunnelled,
        Self::Limited,
        Self::Connections,
    ];

    /// The stable word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::TcpFlags => "tcp-flags",
            Self::FragmentTiny => "fragment-tiny",
            Self::FragmentOrphan => "fragment-orphan",
            Self::ExtensionHeaders => "extension-headers",
            Self::NoFlow => "no-flow",
            Self::Denied => "denied",
            Self::DeniedByDefault => "denied-by-default",
            Self::Revoked => "revoked",
            Self::IcmpUnrelated => "icmp-unrelated",
            Self::TcpState => "tcp-state",
            Self::Classifier => "classifier",
            Self::NotIp => "not-ip",
            Self::NoBackend => "no-backend",
            Self::NatPorts => "nat-ports",
            Self::NotTunnelled => "not-tunnelled",
            Self::Limited => "limited",
            Self::Connections => "connections",
        }
    }

    /// Place of the counter of one direction.
    pub const fn at(self, direction: crate::Direction) -> u32 {
        self as u32 * 2 + direction as u32
    }
}

/// Flows that stay in the half-open table, where they can be evicted, because the table of established flows is full.
pub const STAT_ESTABLISHED_FULL: u32 = Reason::ALL.len() as u32 * 2;
/// Later fragments that passed although their first one was not seen.
pub const STAT_ORPHANS_PASSED: u32 = STAT_ESTABLISHED_FULL + 1;
/// Counters in all.
pub const STATS: u32 = STAT_ORPHANS_PASSED + 1;
