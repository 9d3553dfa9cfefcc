//! The state of a flow: what one packet does to it. Pure; the tables are the caller's.

use cnsmo_common::{
    control::{Control, TIMEOUTS},
    flow::{Conn, flag, state},
    stat::Reason,
};

use crate::parse::{Kind, tcp};

/// What a packet means for a known flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It belongs to the flow.
    Pass {
        /// Counter of the rule that admitted the flow.
        slot: u32,
    },
    /// It belongs to the flow, which is now known from both ends: keep it safe from floods.
    Promote,
    /// The flow was admitted by another policy than the one in force: judge it again as its originator began it.
    Rejudge {
        /// Flags of the flow.
        flags: u8,
    },
    /// The flow is over (timed out, or a SYN opens it again): as if there were none.
    Over,
    /// It contradicts the flow's state.
    Drop(Reason),
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
    if now.wrapping_sub(conn.seen) > control.timeouts[conn.state as usize & (TIMEOUTS - 1)] {
        return Step::Over;
    }
    let before = conn.state;
    let next = match segment.kind {
        Kind::Tcp => tcp_step(conn, segment),
        _ => other_step(conn, segment),
    };
    let next = match next {
        Ok(next) => next,
        Err(step) => return step,
    };
    if conn.generation != generation {
        return Step::Rejudge { flags: conn.flags };
    }
    if next.flags != conn.flags {
        conn.flags = next.flags;
    }
    if next.state != before {
        conn.state = next.state;
    }
    if now.wrapping_sub(conn.seen) >= control.refresh || next.state != before {
        conn.seen = now;
    }
    if is_half_open(before) && !is_half_open(next.state) {
        return Step::Promote;
    }
    Step::Pass { slot: conn.slot }
}

/// A packet that belongs to the flow but says nothing about its state: a later fragment, an ICMP error.
#[inline(always)]
pub fn observe(conn: &Conn, now: u32, generation: u32, control: &Control) -> Step {
    if now.wrapping_sub(conn.seen) > control.timeouts[conn.state as usize & (TIMEOUTS - 1)] {
        Step::Over
    } else if conn.generation != generation {
        Step::Rejudge { flags: conn.flags }
    } else {
        Step::Pass { slot: conn.slot }
    }
}

/// State and flags of a flow's first packet; `None` if such a packet begins no flow. `pickup`: connections that are
/// older than the firewall are taken over.
#[inline(always)]
pub fn first(kind: Kind, tcp_flags: u8, pickup: bool) -> Option<(u8, u8)> {
    match kind {
        Kind::Tcp if tcp_flags & (tcp::SYN | tcp::ACK) == tcp::SYN => Some((state::SYN_SENT, 0)),
        Kind::Tcp if pickup && tcp_flags & tcp::RST == 0 => {
            Some((state::ESTABLISHED, flag::ASSURED))
        }
        Kind::Datagram | Kind::EchoRequest => Some((state::UNREPLIED, 0)),
        _ => None,
    }
}

/// Kept in the table that a flood may evict from.
#[inline(always)]
pub fn is_half_open(state: u8) -> bool {
    matches!(state, state::SYN_SENT | state::SYN_RECV | state::UNREPLIED)
}

#[derive(Clone, Copy)]
struct Next {
    state: u8,
    flags: u8,
}

#[inline(always)]
fn other_step(conn: &Conn, segment: Segment) -> Result<Next, Step> {
    let state = match (segment.kind, segment.from_origin) {
        (_, true) => conn.state,
        (Kind::EchoReply, false) => state::ECHOED,
        (_, false) => state::REPLIED,
    };
    Ok(Next { state, flags: conn.flags })
}

/// RFC 9293, as far as it can be followed from the middle and without sequence numbers.
#[inline(always)]
fn tcp_step(conn: &Conn, segment: Segment) -> Result<Next, Step> {
    let old = conn.state;
    let syn = segment.flags & tcp::SYN != 0;
    let ack = segment.flags & tcp::ACK != 0;
    let over = matches!(old, state::TIME_WAIT | state::CLOSED);
    let to = |state| Ok(Next { state, flags: conn.flags });
    if syn && !ack {
        // On a live flow: the ends sort it out between them (RFC 5961, challenge ACK).
        return if over { Err(Step::Over) } else { to(old) };
    }
    if segment.flags & tcp::RST != 0 {
        // Only shortens the timeout: if the ends did not believe it, their next segment revives the flow, so a forged
        // RST cuts nobody off.
        return to(state::CLOSED);
    }
    if syn {
        return match old {
            state::SYN_SENT if !segment.from_origin => to(state::SYN_RECV),
            state::TIME_WAIT | state::CLOSED => Err(Step::Drop(Reason::TcpState)),
            _ => to(old),
        };
    }
    if segment.flags & tcp::FIN != 0 && !matches!(old, state::SYN_SENT | state::CLOSED) {
        return Ok(finished(conn.flags, segment.from_origin));
    }
    match old {
        // The handshake was not answered yet; only a challenge ACK of the responder makes sense.
        state::SYN_SENT if segment.from_origin => Err(Step::Drop(Reason::TcpState)),
        state::SYN_RECV if segment.from_origin => {
            Ok(Next { state: state::ESTABLISHED, flags: conn.flags | flag::ASSURED })
        }
        state::CLOSED if conn.flags & flag::ASSURED != 0 => to(state::ESTABLISHED),
        state::CLOSED => Err(Step::Drop(Reason::TcpState)),
        _ => to(old),
    }
}

#[inline(always)]
fn finished(flags: u8, from_origin: bool) -> Next {
    const BOTH: u8 = flag::FIN_ORIGIN | flag::FIN_REPLY;
    let flags = flags | if from_origin { flag::FIN_ORIGIN } else { flag::FIN_REPLY };
    let state = if flags & BOTH == BOTH { state::TIME_WAIT } else { state::FIN_WAIT };
    Next { state, flags }
}
