use cnsmo_common::{
    control::LiveParts,
    flow::state::{
        CLOSED, ECHOED, ESTABLISHED, FIN_WAIT, REPLIED, SYN_RECV, SYN_SENT, TIME_WAIT, UNREPLIED,
    },
};

use super::{
    Step::{Contradict, Over, Pass, Promote},
    *,
};
use crate::host::HostTables;

const FIN: u8 = tcp::FIN | tcp::ACK;
const SYN: u8 = tcp::SYN;
const SYN_ACK: u8 = tcp::SYN | tcp::ACK;
const RST: u8 = tcp::RST;
const ACK: u8 = tcp::ACK;

const ORIGIN: bool = true;
const REPLY: bool = false;

fn control() -> Control {
    let mut control = HostTables::new(LiveParts::default().pack()).control;
    for (state, timeout) in control.timeouts.iter_mut().enumerate() {
        *timeout = 100 + state as u32;
    }
    control.refresh = 10;
    control
}

fn conn(state: u8) -> Conn {
    Conn { seen: 0, generation: 0, slot: 0, state, flags: 0, group: 0 }
}

/// Begins a flow by `first_flags` and plays `segments`: who, flags, expected step and state.
fn play(first_flags: u8, pickup: bool, segments: &[(bool, u8, Step, u8)]) {
    let mut conn = conn(first(Kind::Tcp, first_flags, pickup));
    for (n, &(from_origin, flags, step, state)) in segments.iter().enumerate() {
        let segment = Segment { kind: Kind::Tcp, flags, from_origin };
        let seen = advance(&mut conn, segment, 0, 0, &control());
        assert_eq!((seen, conn.state), (step, state), "segment {n} of {segments:?}");
    }
}

#[test]
fn only_a_syn_begins_a_connection() {
    for flags in [SYN, SYN_ACK, RST, RST | ACK, FIN, ACK] {
        let begun = if flags == SYN { SYN_SENT } else { NO_STATE };
        assert_eq!(first(Kind::Tcp, flags, false), begun, "{flags:05b}");
        let picked_up = match flags {
            SYN => SYN_SENT,
            flags if flags & RST != 0 => NO_STATE,
            _ => UNREPLIED,
        };
        assert_eq!(first(Kind::Tcp, flags, true), picked_up, "{flags:05b}");
    }
    for pickup in [false, true] {
        assert_eq!(first(Kind::Datagram, 0, pickup), UNREPLIED);
        assert_eq!(first(Kind::EchoRequest, 0, pickup), UNREPLIED);
        for kind in [Kind::EchoReply, Kind::IcmpError, Kind::Icmp, Kind::Later] {
            assert_eq!(first(kind, 0, pickup), NO_STATE, "{kind:?}");
        }
    }
}

#[test]
fn handshake_data_and_close() {
    play(
        SYN,
        false,
        &[
            (ORIGIN, SYN, Pass, SYN_SENT),
            (REPLY, SYN_ACK, Pass, SYN_RECV),
            (REPLY, SYN_ACK, Pass, SYN_RECV),
            (ORIGIN, ACK, Promote, ESTABLISHED),
            (REPLY, ACK, Pass, ESTABLISHED),
            (ORIGIN, FIN, Pass, FIN_WAIT),
            (REPLY, ACK, Pass, FIN_WAIT),
            (REPLY, FIN, Pass, TIME_WAIT),
            (ORIGIN, ACK, Pass, TIME_WAIT),
            (REPLY, FIN, Pass, TIME_WAIT),
        ],
    );
}

#[test]
fn one_end_may_close_long_before_the_other() {
    play(
        SYN,
        false,
        &[
            (REPLY, SYN_ACK, Pass, SYN_RECV),
            (ORIGIN, ACK, Promote, ESTABLISHED),
            (REPLY, FIN, Pass, FIN_WAIT),
            (REPLY, FIN, Pass, FIN_WAIT),
            (ORIGIN, ACK, Pass, FIN_WAIT),
            (ORIGIN, ACK, Pass, FIN_WAIT),
            (ORIGIN, FIN, Pass, TIME_WAIT),
        ],
    );
}

#[test]
fn a_refused_connection_takes_no_place_among_the_established() {
    play(
        SYN,
        false,
        &[
            (REPLY, RST | ACK, Pass, CLOSED),
            (ORIGIN, ACK, Contradict, CLOSED),
            (REPLY, SYN_ACK, Contradict, CLOSED),
            (ORIGIN, SYN, Over, CLOSED),
        ],
    );
    play(SYN, false, &[(REPLY, SYN_ACK, Pass, SYN_RECV), (ORIGIN, RST, Pass, CLOSED)]);
    play(SYN, false, &[(ORIGIN, RST, Pass, CLOSED)]);
}

#[test]
fn data_revives_a_connection_that_obeyed_no_reset() {
    for forger in [ORIGIN, REPLY] {
        play(
            SYN,
            false,
            &[
                (REPLY, SYN_ACK, Pass, SYN_RECV),
                (ORIGIN, ACK, Promote, ESTABLISHED),
                (forger, RST, Pass, CLOSED),
                // It is among the established already.
                (ORIGIN, ACK, Pass, ESTABLISHED),
                (REPLY, ACK, Pass, ESTABLISHED),
            ],
        );
    }
}

#[test]
fn a_syn_opens_a_finished_connection_again_from_either_end() {
    for opener in [ORIGIN, REPLY] {
        play(
            SYN,
            false,
            &[
                (REPLY, SYN_ACK, Pass, SYN_RECV),
                (ORIGIN, ACK, Promote, ESTABLISHED),
                (opener, SYN, Pass, ESTABLISHED),
                (ORIGIN, FIN, Pass, FIN_WAIT),
                (opener, SYN, Pass, FIN_WAIT),
                (REPLY, FIN, Pass, TIME_WAIT),
                (REPLY, SYN_ACK, Contradict, TIME_WAIT),
                (opener, SYN, Over, TIME_WAIT),
            ],
        );
    }
}

#[test]
fn both_ends_may_begin_at_once() {
    play(
        SYN,
        false,
        &[
            (REPLY, SYN, Pass, SYN_SENT),
            (ORIGIN, SYN_ACK, Pass, SYN_SENT),
            (REPLY, SYN_ACK, Pass, SYN_RECV),
            (REPLY, ACK, Pass, SYN_RECV),
            (ORIGIN, ACK, Promote, ESTABLISHED),
        ],
    );
}

#[test]
fn the_originator_waits_for_an_answer() {
    play(
        SYN,
        false,
        &[
            (ORIGIN, ACK, Contradict, SYN_SENT),
            (ORIGIN, FIN, Contradict, SYN_SENT),
            // A challenge ACK (RFC 5961).
            (REPLY, ACK, Pass, SYN_SENT),
            (REPLY, FIN, Pass, SYN_SENT),
        ],
    );
}

#[test]
fn a_connection_older_than_the_firewall_is_taken_over_when_both_ends_speak() {
    play(
        ACK,
        true,
        &[
            (ORIGIN, ACK, Pass, UNREPLIED),
            (ORIGIN, FIN, Pass, UNREPLIED),
            (REPLY, ACK, Promote, ESTABLISHED),
            (REPLY, FIN, Pass, FIN_WAIT),
            (ORIGIN, FIN, Pass, TIME_WAIT),
        ],
    );
    play(ACK, true, &[(REPLY, FIN, Promote, FIN_WAIT)]);
    play(ACK, true, &[(REPLY, RST, Pass, CLOSED), (ORIGIN, ACK, Contradict, CLOSED)]);
}

#[test]
fn other_protocols_are_promoted_by_the_first_answer() {
    for (request, reply, answered) in
        [(Kind::Datagram, Kind::Datagram, REPLIED), (Kind::EchoRequest, Kind::EchoReply, ECHOED)]
    {
        let mut conn = conn(first(request, 0, false));
        let mut step = |kind, from_origin| {
            let segment = Segment { kind, flags: 0, from_origin };
            (advance(&mut conn, segment, 0, 0, &control()), conn.state)
        };
        assert_eq!(step(request, ORIGIN), (Pass, UNREPLIED));
        assert_eq!(step(reply, REPLY), (Promote, answered));
        assert_eq!(step(request, ORIGIN), (Pass, answered));
        assert_eq!(step(reply, REPLY), (Pass, answered));
    }
}

#[test]
fn a_flow_is_over_one_jiffy_after_its_timeout() {
    let control = control();
    for state in 0..state::COUNT as u8 {
        let timeout = control.timeouts[usize::from(state)];
        for start in [0, 7, u32::MAX - 50, u32::MAX] {
            let conn = Conn { seen: start, ..conn(state) };
            let at = |now: u32| observe(&conn, now, 0, &control);
            assert_eq!(at(start.wrapping_add(timeout)), Pass, "{state} {start}");
            assert_eq!(at(start.wrapping_add(timeout + 1)), Over, "{state} {start}");
            let segment = Segment { kind: Kind::Datagram, flags: 0, from_origin: ORIGIN };
            let late = start.wrapping_add(timeout + 1);
            assert_eq!(advance(&mut conn.clone(), segment, late, 0, &control), Over);
        }
    }
}

#[test]
fn a_packet_that_another_cpu_overtook_finds_its_flow_alive() {
    let control = control();
    for now in [0, 1, 1_000, u32::MAX] {
        let mut conn = Conn { seen: now.wrapping_add(1), ..conn(REPLIED) };
        let segment = Segment { kind: Kind::Datagram, flags: 0, from_origin: ORIGIN };
        assert_eq!(observe(&conn, now, 0, &control), Pass);
        assert_eq!(advance(&mut conn, segment, now, 0, &control), Pass);
        assert_eq!(conn.seen, now.wrapping_add(1), "time does not go back");
    }
}

#[test]
fn the_time_is_stored_no_more_often_than_needed() {
    let control = control();
    let mut conn = conn(REPLIED);
    let segment = Segment { kind: Kind::Datagram, flags: 0, from_origin: ORIGIN };
    for (now, seen) in [(1, 0), (9, 0), (10, 10), (19, 10), (20, 20)] {
        assert_eq!(advance(&mut conn, segment, now, 0, &control), Pass);
        assert_eq!(conn.seen, seen, "at {now}");
    }
}

#[test]
fn another_generation_is_judged_again_before_anything_changes() {
    let control = control();
    for flags in [ACK, FIN, RST] {
        let before = Conn { flags: flag::ASSURED, ..conn(ESTABLISHED) };
        let mut conn = before;
        let segment = Segment { kind: Kind::Tcp, flags, from_origin: REPLY };
        assert_eq!(advance(&mut conn, segment, 50, 1, &control), Step::Rejudge);
        assert_eq!(conn, before);
        assert_eq!(observe(&conn, 50, 1, &control), Step::Rejudge);
    }
}

#[test]
fn observers_change_nothing_and_promote_nothing() {
    let control = control();
    for state in 0..state::COUNT as u8 {
        assert_eq!(observe(&conn(state), 50, 0, &control), Pass, "{state}");
    }
}
