//! The state of a flow: what one packet does to it. Pure; the tables are the caller's.

use cnsmo_common::{
    control::{Control, TIMEOUTS},
    flow::{Conn, flag, state},
};

use crate::parse::{Kind, tcp};

/// What a packet means for a known flow. Without fields: the parts of an enum that a variant leaves open are registers
/// that the verifier has never seen written.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It belongs to the flow.
    Pass,
    /// It belongs to the flow, which is now known from both ends: keep it safe from floods.
    Promote,
    /// The flow was admitted by another policy than the one in force: judge it again as its originator began it.
    Rejudge,
    /// The flow is over (timed out, or a SYN opens it again): as if there were none.
    Over,
    /// It contradicts the flow's state.
    Contradict,
    /// It carries the addresses of a translated flow where or in a direction that such packets do not come.
    Astray,
}

/// One packet, as far as the state of its flow is concerned.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Kind; `Later` and `IcmpError` touch no state.
    pub kind: Kind,
    /// TCP flags.
    pub flags: u8,
    /// Sent by the end that began the flow.
    pub from_origin: bool,
}

/// Advances `conn` by one packet.
#[inline(always)]
pub fn advance(
    conn: &mut Conn,
    segment: Segment,
    now: u32,
    generation: u32,
    control: &Control,
) -> Step {
    if is_over_for(conn, segment, now, control) {
        return Step::Over;
    }
    let before = conn.state;
    let next = match segment.kind {
        Kind::Tcp => tcp_step(conn, segment),
        _ => other_step(conn, segment),
    };
    if next.step != Step::Pass {
        return next.step;
    }
    if conn.generation != generation {
        return Step::Rejudge;
    }
    if next.flags != conn.flags {
        conn.flags = next.flags;
    }
    if next.state != before {
        conn.state = next.state;
    }
    if age(now, conn.seen) >= control.refresh || next.state != before {
        conn.seen = now;
    }
    if is_half_open(before) && is_known_from_both_ends(next.state) {
        Step::Promote
    } else {
        Step::Pass
    }
}

/// A packet that belongs to the flow but says nothing about its state: a later fragment, an ICMP error.
#[inline(always)]
pub fn observe(conn: &Conn, now: u32, generation: u32, control: &Control) -> Step {
    if is_over(conn, now, control) {
        Step::Over
    } else if conn.generation != generation {
        Step::Rejudge
    } else {
        Step::Pass
    }
}

/// Jiffies from `seen` to `now`. Another CPU may have stored a later time than the one this packet was given: no age.
#[inline(always)]
pub fn age(now: u32, seen: u32) -> u32 {
    const AHEAD_MAX: u32 = 64;
    let age = now.wrapping_sub(seen);
    if age > u32::MAX - AHEAD_MAX { 0 } else { age }
}

/// Whether nothing was seen of the flow for longer than its state allows.
#[inline(always)]
pub fn is_over(conn: &Conn, now: u32, control: &Control) -> bool {
    age(now, conn.seen) > control.timeouts[conn.state as usize & (TIMEOUTS - 1)]
}

/// Whether a SYN may begin another connection under the key of this one: both ends have closed it, or one has reset it.
#[inline(always)]
pub fn is_finished(state: u8) -> bool {
    matches!(state, state::TIME_WAIT | state::CLOSED)
}

/// Whether the flow is no more to this packet: nothing was seen of it for too long, or it is finished and the packet opens
/// another one.
#[inline(always)]
pub fn is_over_for(conn: &Conn, segment: Segment, now: u32, control: &Control) -> bool {
    let opens = segment.kind == Kind::Tcp && segment.flags & (tcp::SYN | tcp::ACK) == tcp::SYN;
    is_over(conn, now, control) || (opens && is_finished(conn.state))
}

/// State of a flow after its first packet, or [`NO_STATE`] if such a packet begins no flow. `pickup`: connections that
/// are older than the firewall are taken over.
#[inline(always)]
pub fn first(kind: Kind, tcp_flags: u8, pickup: bool) -> u8 {
    match kind {
        Kind::Tcp if tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN => state::SYN_SENT,
        // Anyone can send such a segment: it earns no place among the established flows before it is answered.
        Kind::Tcp if pickup && tcp_flags & tcp::RST == 0 => state::UNREPLIED,
        Kind::Datagram | Kind::EchoRequest => state::UNREPLIED,
        _ => NO_STATE,
    }
}

/// No state of a flow.
pub const NO_STATE: u8 = u8::MAX;

/// Kept in the table that a flood may evict from.
#[inline(always)]
pub fn is_half_open(state: u8) -> bool {
    matches!(state, state::SYN_SENT | state::SYN_RECV | state::UNREPLIED)
}

/// Worth a place that no flood can take. A refused connection is not: its RST costs the flooder nothing.
#[inline(always)]
fn is_known_from_both_ends(state: u8) -> bool {
    !is_half_open(state) && state != state::CLOSED
}

/// What becomes of the flow if the step is to pass.
#[derive(Clone, Copy)]
struct Next {
    step: Step,
    state: u8,
    flags: u8,
}

#[inline(always)]
fn other_step(conn: &Conn, segment: Segment) -> Next {
    let state = match (segment.kind, segment.from_origin) {
        (_, true) => conn.state,
        (Kind::EchoReply, false) => state::ECHOED,
        (_, false) => state::REPLIED,
    };
    Next { step: Step::Pass, state, flags: conn.flags }
}

/// RFC 9293, as far as it can be followed from the middle and without sequence numbers.
#[inline(always)]
fn tcp_step(conn: &Conn, segment: Segment) -> Next {
    let old = conn.state;
    let syn = segment.flags & tcp::SYN != 0;
    let ack = segment.flags & tcp::ACK != 0;
    let to = |state| Next { step: Step::Pass, state, flags: conn.flags };
    let no = |step| Next { step, state: old, flags: conn.flags };
    if syn && !ack {
        // On a live flow: the ends sort it out between them (RFC 5961, challenge ACK).
        return to(old);
    }
    if segment.flags & tcp::RST != 0 {
        // Only shortens the timeout: if the ends did not believe it, their next segment revives the flow. Sequence
        // numbers are not followed, so a forged RST does cut off a connection that is then idle for that long.
        return to(state::CLOSED);
    }
    if syn {
        return match old {
            state::SYN_SENT if !segment.from_origin => to(state::SYN_RECV),
            state::TIME_WAIT | state::CLOSED => no(Step::Contradict),
            _ => to(old),
        };
    }
    if old == state::UNREPLIED && segment.from_origin {
        return to(old);
    }
    if segment.flags & tcp::FIN != 0 && !matches!(old, state::SYN_SENT | state::CLOSED) {
        return finished(conn.flags, segment.from_origin);
    }
    match old {
        // The handshake was not answered yet; only a challenge ACK of the responder makes sense.
        state::SYN_SENT if segment.from_origin => no(Step::Contradict),
        state::SYN_RECV if segment.from_origin => assured(conn.flags),
        state::UNREPLIED => assured(conn.flags),
        state::CLOSED if conn.flags & flag::ASSURED != 0 => to(state::ESTABLISHED),
        state::CLOSED => no(Step::Contradict),
        _ => to(old),
    }
}

#[inline(always)]
fn assured(flags: u8) -> Next {
    Next { step: Step::Pass, state: state::ESTABLISHED, flags: flags | flag::ASSURED }
}

#[inline(always)]
fn finished(flags: u8, from_origin: bool) -> Next {
    const BOTH: u8 = flag::FIN_ORIGIN | flag::FIN_REPLY;
    let flags = flags | if from_origin { flag::FIN_ORIGIN } else { flag::FIN_REPLY };
    let state = if flags & BOTH == BOTH { state::TIME_WAIT } else { state::FIN_WAIT };
    Next { step: Step::Pass, state, flags }
}

#[cfg(test)]
mod tests;
