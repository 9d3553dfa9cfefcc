//! Flows to virtual addresses: how a new one finds its backend, and how both entries of one are kept alike.
//!
//! This VM's own flows into the tunnel keep their source; those of clients at a network card leave as from this VM. The
//! rules judge what is on the wire outside of this VM: leaving packets as they are translated, arriving ones as they come.

use cnsmo_common::{
    balance::{NAT_PORT_FIRST, NAT_PORTS, NAT_TRIES, SEED, ServiceKey, algorithm, mix},
    control::{Control, switch},
    flow::{Conn, Flow, ZONE_OVERLAY, ZONE_UNDERLAY, flag},
    stat::Reason,
};

use crate::{
    conntrack::{self, Step},
    parse::{Family, Kind, TCP, UDP, tcp},
    pipeline::{REWRITE, UNCOUNTED, order},
    tables::{Case, FlowTables, Onward, Tables, Visit},
};

/// Slots looked at for one flow of this VM, whose source port is given: the next backend is taken if this VM talks to
/// the first one from the same port already.
const SLOTS_TRIED: u32 = 4;

/// Whether the first packet of a flow is for a virtual address that is served at this hook; the result is in
/// `case.service`.
#[inline(always)]
pub(crate) fn is_served<A: Family, T: Tables>(
    case: &mut Case<A>,
    tables: &T,
    control: &Control,
) -> bool {
    if control.switches & switch::SERVICES == 0 || !case.serves {
        return false;
    }
    look_up(case, tables);
    case.translate
}

/// Hands its result back in `case.translate`.
#[inline(never)]
fn look_up<A: Family, T: Tables>(case: &mut Case<A>, tables: &T) {
    let d = &case.datagram;
    if d.proto != TCP && d.proto != UDP {
        return;
    }
    let family = if size_of::<A>() == 4 { 4 } else { 6 };
    case.service_key = ServiceKey { address: d.dst.widen(), port: d.dport, proto: d.proto, family };
    let found = tables.service(&case.service_key, &mut case.service);
    case.translate = found && (case.zone == ZONE_OVERLAY || case.service.gateway != 0);
}

/// Chooses a backend for the first packet of a flow, and makes the inner entry; the outer one is `case.flow` afterwards.
/// The result is in `case.outcome`.
#[inline(always)]
pub fn choose<A: Family, T: Tables + FlowTables<A>>(
    case: &mut Case<A>,
    tables: &T,
    control: &Control,
) {
    let d = &case.datagram;
    // From the middle of a connection nobody knows which backend it had.
    if d.kind == Kind::Tcp && d.flags & (tcp::SYN | tcp::ACK) != tcp::SYN {
        case.outcome = Err(Reason::NoFlow);
        return;
    }
    let hash = hash(case, case.service.algorithm == algorithm::SOURCE);
    let ring = tables.ring(case.service.balancer);
    case.outcome = Err(Reason::NoBackend);
    if ring.slots() == 0 {
        return;
    }
    let mut at = match case.service.algorithm {
        algorithm::ROUND_ROBIN => ring.first() + tables.turn(case.service.balancer) % ring.slots(),
        _ => ring.place(hash),
    };
    let outward = case.zone == ZONE_OVERLAY;
    let tries = if outward { SLOTS_TRIED } else { NAT_TRIES };
    // Other bits than the slot is taken by, and of both ends: one client has many flows.
    let mut port = (self::hash(case, false) & 0xffff) % NAT_PORTS as u32;
    for _ in 0..tries {
        tables.attempt(case, control, at, port);
        if case.outcome != Err(Reason::NatPorts) {
            return;
        }
        if outward {
            at = if at + 1 < ring.first() + ring.slots() { at + 1 } else { ring.first() };
        } else {
            port = if port + 1 < NAT_PORTS as u32 { port + 1 } else { 0 };
        }
    }
}

/// Tries the backend in a slot, and a gateway's port for it. The result is in `case.outcome`; [`Reason::NatPorts`]: the
/// port is taken.
#[inline(always)]
pub fn attempt<A: Family, T: Tables + FlowTables<A>>(
    case: &mut Case<A>,
    tables: &T,
    control: &Control,
    place: u32,
    port: u32,
) {
    case.outcome = Err(Reason::NoBackend);
    if !aim(case, tables, control, place, port) {
        return;
    }
    claim(case, tables, control);
    case.outcome = if case.translate { Ok(0) } else { Err(Reason::NatPorts) };
}

/// Of the client alone, or of both ends.
#[inline(always)]
fn hash<A: Family>(case: &Case<A>, client: bool) -> u32 {
    let d = &case.datagram;
    let [high, low] = d.src.halves();
    let mut hash = mix(mix(SEED, high), low);
    if !client {
        let [high, low] = d.dst.halves();
        let ports = (u16::from_be_bytes(d.sport) as u64) << 16 | u16::from_be_bytes(d.dport) as u64;
        hash = mix(mix(mix(hash, high), low), ports << 8 | d.proto as u64);
    }
    (hash >> 32) as u32
}

/// Sets translation and inner entry for the backend in a slot; false if it has no address of this family.
#[inline(always)]
fn aim<A: Family, T: Tables>(
    case: &mut Case<A>,
    tables: &T,
    control: &Control,
    place: u32,
    port: u32,
) -> bool {
    let id = tables.slot(place);
    if !tables.backend(id, &mut case.backend) {
        return false;
    }
    let outward = case.zone == ZONE_OVERLAY;
    let d = &case.datagram;
    let dst = A::of_backend(&case.backend);
    let src = if outward { d.src } else { A::own(control) };
    if dst == A::default() || src == A::default() {
        return false;
    }
    let nat_port = (NAT_PORT_FIRST + port as u16).to_be_bytes();
    let to = &mut case.flow.translation;
    to.src = src;
    to.dst = dst;
    to.sport = if outward { d.sport } else { nat_port };
    to.dport = if case.service.target == [0; 2] { case.backend.port } else { case.service.target };
    to.ifindex = if outward { 0 } else { case.ifindex };
    let twin = &mut case.twin.translation;
    twin.src = d.src;
    twin.dst = d.dst;
    twin.sport = d.sport;
    twin.dport = d.dport;
    twin.ifindex = to.ifindex;
    true
}

/// Takes the inner key if no live flow has it; says so in `case.translate`.
#[inline(never)]
fn claim<A: Family, T: Tables + FlowTables<A>>(case: &mut Case<A>, tables: &T, control: &Control) {
    case.translate = false;
    let way = if case.zone == ZONE_OVERLAY { flag::EGRESS } else { 0 };
    let origin = if case.from_high { flag::ORIGIN_HIGH } else { 0 };
    let syn = case.datagram.kind == Kind::Tcp;
    case.flow.conn = Conn {
        seen: case.now as u32,
        generation: case.live.generation(),
        slot: case.flow.conn.slot,
        state: conntrack::first(case.datagram.kind, if syn { tcp::SYN } else { 0 }, false),
        flags: origin | way | flag::TRANSLATED | flag::OUTER,
        group: case.group,
    };
    set_twin(case);
    // Our own kernel gives out the ports of our own flows, and knows when one may be used again. Of a gateway's ports the
    // backend knows it, and there are others.
    let reopens = syn && way == flag::EGRESS;
    let mut look = Look { now: case.now as u32, control, reopens, over: false };
    if tables.touch_established(&case.twin_key, &mut look) && !look.over {
        return;
    }
    if tables.touch_half_open(&case.twin_key, &mut look) && !look.over {
        return;
    }
    if look.over {
        tables.remove(&case.twin_key);
    }
    case.translate = tables.claim_half_open(&case.twin_key, &case.twin);
}

struct Look<'a> {
    now: u32,
    control: &'a Control,
    reopens: bool,
    over: bool,
}

impl<A> Visit<A> for Look<'_> {
    #[inline(always)]
    fn visit(&mut self, flow: &mut Flow<A>) {
        let finished = self.reopens && conntrack::is_finished(flow.conn.state);
        self.over = finished || conntrack::is_over(&flow.conn, self.now, self.control);
    }
}

/// Key of the other entry, and that entry but for its translation.
#[inline(always)]
fn set_twin<A: Family>(case: &mut Case<A>) {
    let to = &case.flow.translation;
    let from_high = order(&mut case.twin_key, (to.src, to.dst), (to.sport, to.dport));
    let flags = case.flow.conn.flags;
    case.twin_key.proto = case.key.proto;
    // All entries are of the tunnel, but for the outer one of a client at a network card.
    let outside = flags & (flag::EGRESS | flag::OUTER) == 0;
    case.twin_key.zone = if outside { ZONE_UNDERLAY } else { ZONE_OVERLAY };
    case.twin_key.pad = [0; 2];
    case.twin.conn = case.flow.conn;
    let origin = if from_high { flag::ORIGIN_HIGH } else { 0 };
    case.twin.conn.flags = flags & !flag::OF_ENTRY | origin | (!flags & flag::OUTER);
}

/// The translation of the other entry: this one's key, as its originator sends.
#[inline(always)]
fn set_twin_translation<A: Family>(case: &mut Case<A>) {
    let key = &case.key;
    let twin = &mut case.twin.translation;
    let from_high = case.flow.conn.flags & flag::ORIGIN_HIGH != 0;
    (twin.src, twin.dst) = if from_high { (key.high, key.low) } else { (key.low, key.high) };
    (twin.sport, twin.dport) =
        if from_high { (key.high_port, key.low_port) } else { (key.low_port, key.high_port) };
    twin.ifindex = case.flow.translation.ifindex;
}

/// Whether packets of a translated flow come this way: to be translated, or translated already at the hook before.
#[inline(always)]
pub(crate) fn is_expected(flags: u8, from_origin: bool, egress: bool) -> bool {
    is_translated_here(flags, from_origin, egress) || was_translated(flags, from_origin, egress)
}

/// The first packet's way, from the outer entry; the answer's, from the inner one, always out of the tunnel.
#[inline(always)]
fn is_translated_here(flags: u8, from_origin: bool, egress: bool) -> bool {
    let outer = flags & flag::OUTER != 0;
    let own = flags & flag::EGRESS != 0;
    outer == from_origin && egress == (from_origin && own)
}

/// For clients at a network card there is a second hook, on the way out of this VM.
#[inline(always)]
fn was_translated(flags: u8, from_origin: bool, egress: bool) -> bool {
    let outer = flags & flag::OUTER != 0;
    let own = flags & flag::EGRESS != 0;
    !own && egress && outer != from_origin
}

/// What a packet of a translated flow means for the other entry and for the packet. The result is in `case.outcome`.
#[inline(always)]
pub fn settle<A: Family, T: Tables + FlowTables<A>>(case: &mut Case<A>, tables: &T) {
    let Ok(slot) = case.outcome else { return };
    let flags = case.flow.conn.flags;
    let egress = case.direction as u8 != 0;
    if was_translated(flags, case.from_origin, egress) {
        case.outcome = Ok(UNCOUNTED);
        return;
    }
    // State and time stamp change together; the other entry is not touched more often.
    if case.step.is_some() && case.flow.conn.seen == case.now as u32 {
        mirror(case, tables);
        if case.outcome.is_err() {
            return;
        }
    }
    case.onward = if flags & flag::EGRESS != 0 {
        Onward::Same
    } else if case.from_origin {
        Onward::Tunnel
    } else {
        Onward::Client
    };
    case.translate = true;
    case.outcome = Ok(slot | REWRITE);
}

/// Copies the state to the other entry, and makes that anew if a flood has evicted it.
#[inline(never)]
fn mirror<A: Family, T: Tables + FlowTables<A>>(case: &mut Case<A>, tables: &T) {
    set_twin(case);
    set_twin_translation(case);
    if case.step == Some(Step::Promote) {
        tables.promote(&case.twin_key, &case.twin);
        return;
    }
    let mut copy = Copy { twin: &case.twin, foreign: false };
    if tables.touch_established(&case.twin_key, &mut copy)
        || tables.touch_half_open(&case.twin_key, &mut copy)
    {
        if copy.foreign {
            // Evicted, and its port is another flow's now: this one is over.
            tables.remove(&case.key);
            case.outcome = Err(Reason::NoFlow);
        }
        return;
    }
    tables.insert_half_open(&case.twin_key, &case.twin);
}

struct Copy<'a, A> {
    twin: &'a Flow<A>,
    foreign: bool,
}

impl<A: Family> Visit<A> for Copy<'_, A> {
    #[inline(always)]
    fn visit(&mut self, flow: &mut Flow<A>) {
        self.foreign = is_foreign(self.twin, flow);
        if !self.foreign {
            flow.conn = self.twin.conn;
        }
    }
}

/// Whether an entry under the key of `twin` is not the one that it stands for. Not bit by bit: another policy may have
/// admitted it, and its state may be newer.
#[inline(always)]
fn is_foreign<A: Family>(twin: &Flow<A>, entry: &Flow<A>) -> bool {
    let (ours, theirs) = (&twin.translation, &entry.translation);
    entry.conn.flags & flag::TRANSLATED == 0
        || ours.src != theirs.src
        || ours.sport != theirs.sport
        || ours.dst != theirs.dst
        || ours.dport != theirs.dport
}

/// Forgets the other entry of a translated flow. Its key may be another flow's by now: a port is free again when its
/// flow is over, and this entry may outlast that.
#[inline(never)]
pub(crate) fn forget_twin<A: Family, T: Tables + FlowTables<A>>(case: &mut Case<A>, tables: &T) {
    set_twin(case);
    set_twin_translation(case);
    let mut check = Check { twin: &case.twin, foreign: true };
    if !tables.touch_established(&case.twin_key, &mut check) {
        tables.touch_half_open(&case.twin_key, &mut check);
    }
    if !check.foreign {
        tables.remove(&case.twin_key);
    }
}

struct Check<'a, A> {
    twin: &'a Flow<A>,
    foreign: bool,
}

impl<A: Family> Visit<A> for Check<'_, A> {
    #[inline(always)]
    fn visit(&mut self, flow: &mut Flow<A>) {
        self.foreign = is_foreign(self.twin, flow);
    }
}

/// Has the other entry bear the stamp of the policy in force too, but no other flow that has its key by now.
#[inline(never)]
pub(crate) fn stamp_twin<A: Family, T: Tables + FlowTables<A>>(
    case: &mut Case<A>,
    tables: &T,
    stamp: &mut impl Visit<A>,
) {
    set_twin(case);
    set_twin_translation(case);
    let mut stamp = OfTwin { twin: &case.twin, visit: stamp };
    if !tables.touch_established(&case.twin_key, &mut stamp) {
        tables.touch_half_open(&case.twin_key, &mut stamp);
    }
}

struct OfTwin<'a, A, V> {
    twin: &'a Flow<A>,
    visit: &'a mut V,
}

impl<A: Family, V: Visit<A>> Visit<A> for OfTwin<'_, A, V> {
    #[inline(always)]
    fn visit(&mut self, flow: &mut Flow<A>) {
        if !is_foreign(self.twin, flow) {
            self.visit.visit(flow);
        }
    }
}

/// Whether the rules judge this entry's packets, or those of the other one: what is on the wire outside.
#[inline(always)]
pub fn is_judged_here(flags: u8) -> bool {
    flags & flag::TRANSLATED == 0 || (flags & flag::OUTER != 0) != (flags & flag::EGRESS != 0)
}

#[cfg(test)]
mod tests;
