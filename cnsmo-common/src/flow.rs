//! Flows: the key that both directions share, and what is remembered of one.

/// An address of either family, in network order.
pub trait Address: Copy + Eq + core::fmt::Debug {
    /// IPv4 in the last four bytes, the others zero; IPv6 as it is.
    fn widen(self) -> [u8; 16];
    /// Whether it is the higher of two.
    fn is_above(self, other: Self) -> bool;
    /// High half and low half; of IPv4 the low half alone.
    fn halves(self) -> [u64; 2];
}

impl Address for [u8; 4] {
    #[inline(always)]
    fn widen(self) -> [u8; 16] {
        (u32::from_be_bytes(self) as u128).to_be_bytes()
    }
    #[inline(always)]
    fn is_above(self, other: Self) -> bool {
        u32::from_be_bytes(self) > u32::from_be_bytes(other)
    }
    #[inline(always)]
    fn halves(self) -> [u64; 2] {
        [0, u32::from_be_bytes(self) as u64]
    }
}

impl Address for [u8; 16] {
    #[inline(always)]
    fn widen(self) -> [u8; 16] {
        self
    }
    #[inline(always)]
    fn is_above(self, other: Self) -> bool {
        u128::from_be_bytes(self) > u128::from_be_bytes(other)
    }
    #[inline(always)]
    fn halves(self) -> [u64; 2] {
        let bits = u128::from_be_bytes(self);
        [(bits >> 64) as u64, bits as u64]
    }
}

/// Key of a flow, the same for packets of both directions: the end with the smaller (address, port) is `low`.
///
/// ICMP echo is not put in order, `low` is the requester: else the other side could answer a request that nobody made
/// by reusing an identifier.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey<A> {
    /// Address of the low end.
    pub low: A,
    /// Address of the high end.
    pub high: A,
    /// Port of the low end, or the identifier of an echo. Network order.
    pub low_port: [u8; 2],
    /// Port of the high end. Network order.
    pub high_port: [u8; 2],
    /// IANA protocol number.
    pub proto: u8,
    /// [`ZONE_UNDERLAY`] or [`ZONE_OVERLAY`]: the same addresses may live in both.
    pub zone: u8,
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<FlowKey<[u8; 4]>>() == 16);
const _: () = assert!(size_of::<FlowKey<[u8; 16]>>() == 40);

/// Packets seen on a network card.
pub const ZONE_UNDERLAY: u8 = 0;
/// Packets seen on a tunnel device.
pub const ZONE_OVERLAY: u8 = 1;

/// What is remembered of a flow. Shared by all CPUs: fields change by single aligned stores, and only if they differ.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conn {
    /// Low half of the jiffies counter at the last packet, not more often than `Control::refresh`.
    pub seen: u32,
    /// Generation of the policy that admitted it. Another one is live: the next packet is judged anew.
    pub generation: u32,
    /// Counter of the rule that admitted it.
    pub slot: u32,
    /// One of [`state`].
    pub state: u8,
    /// Bits of [`flag`].
    pub flags: u8,
    /// Under which it counts for its source while it is open ([`crate::control::Limit::group`]); 0: it does not.
    pub group: u16,
}
const _: () = assert!(size_of::<Conn>() == 16);

/// Value of the flow tables.
///
/// A translated connection has two entries, one for each side's view of it: the OUTER one, whose key holds the virtual
/// address, and the inner one, whose key holds the backend's. Each carries the whole state, so that a packet costs one
/// lookup from whichever side it comes; what changes in one is copied to the other.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow<A> {
    /// State.
    pub conn: Conn,
    /// Meaningful if [`flag::TRANSLATED`] is set; else zero.
    pub translation: Translation<A>,
}
const _: () = assert!(size_of::<Flow<[u8; 4]>>() == 32);
const _: () = assert!(size_of::<Flow<[u8; 16]>>() == 56);

/// The other entry's view: what a packet of the originator carries there.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation<A> {
    /// Source.
    pub src: A,
    /// Destination.
    pub dst: A,
    /// Source port, network order.
    pub sport: [u8; 2],
    /// Destination port, network order.
    pub dport: [u8; 2],
    /// Kernel's index of the network card that the client came by; 0: the client is this VM.
    pub ifindex: u32,
}

impl<A: Default> Translation<A> {
    /// Of a flow that is not translated.
    #[inline(always)]
    pub fn none() -> Self {
        let (src, dst) = (A::default(), A::default());
        Self { src, dst, sport: [0; 2], dport: [0; 2], ifindex: 0 }
    }
}

/// States of a flow; also the places of their timeouts.
pub mod state {
    /// TCP: a SYN was seen.
    pub const SYN_SENT: u8 = 0;
    /// TCP: SYN and SYN+ACK were seen.
    pub const SYN_RECV: u8 = 1;
    /// TCP: the handshake is complete.
    pub const ESTABLISHED: u8 = 2;
    /// TCP: one end has sent its FIN.
    pub const FIN_WAIT: u8 = 3;
    /// TCP: both ends have sent a FIN.
    pub const TIME_WAIT: u8 = 4;
    /// TCP: a RST was seen.
    pub const CLOSED: u8 = 5;
    /// Packets from the originator only; TCP: of a connection that is older than the firewall.
    pub const UNREPLIED: u8 = 6;
    /// UDP and others: packets from both ends.
    pub const REPLIED: u8 = 7;
    /// ICMP echo with an answer.
    pub const ECHOED: u8 = 8;
    /// Number of states.
    pub const COUNT: usize = 9;
}

/// Flags of a flow.
pub mod flag {
    /// The originator is the high end of the key.
    pub const ORIGIN_HIGH: u8 = 1;
    /// The first packet was on its way out of the VM: the egress rules judge the flow.
    pub const EGRESS: u8 = 2;
    /// The originator has sent its FIN.
    pub const FIN_ORIGIN: u8 = 4;
    /// The responder has sent its FIN.
    pub const FIN_REPLY: u8 = 8;
    /// The handshake was complete once: a segment after a RST shows that the RST was not obeyed.
    pub const ASSURED: u8 = 16;
    /// Addresses and ports are rewritten.
    pub const TRANSLATED: u8 = 32;
    /// Of a translated flow: the entry whose key holds the virtual address.
    pub const OUTER: u8 = 64;
    /// It is among the open flows of its source.
    pub const COUNTED: u8 = 128;
    /// What the two entries of a translated flow do not share.
    pub const OF_ENTRY: u8 = ORIGIN_HIGH | OUTER;
}

/// Finds the ports of a later fragment.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source, [`Address::widen`].
    pub src: [u8; 16],
    /// Destination, [`Address::widen`].
    pub dst: [u8; 16],
    /// Identification; of IPv4 in the last two bytes. Network order.
    pub id: [u8; 4],
    /// Protocol of the IPv4 header, or of the IPv6 fragment header.
    pub proto: u8,
    /// Zone of the flow.
    pub zone: u8,
    /// Zero.
    pub pad: [u8; 2],
}
const _: () = assert!(size_of::<FragmentKey>() == 40);

/// What the first fragment of a datagram said.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Source port, or the identifier of an echo.
    pub sport: [u8; 2],
    /// Destination port.
    pub dport: [u8; 2],
    /// 1 for an echo request, 2 for an echo reply, else 0.
    pub echo: u8,
    /// Protocol of the L4 header, behind all extension headers.
    pub proto: u8,
    /// Zero.
    pub pad: [u8; 2],
    /// Low half of the jiffies counter.
    pub seen: u32,
}
const _: () = assert!(size_of::<Fragment>() == 12);
