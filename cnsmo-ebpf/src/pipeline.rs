//! The order of the stages: parse, find the flow, else ask the rules, count, decide.
//!
//! The way of a packet of a known flow is inlined from end to end. What is rare is not (`inline(never)`): each such
//! function is proven by the verifier and given stack once, and hands its result back in the [`Case`], because a BPF
//! function returns one register.

use cnsmo_common::{
    Direction,
    blob::{NO_RULE, lanes},
    control::{Control, rule_flag, switch, verdict},
    flow::{
        Conn, Flow, FlowKey, Fragment, FragmentKey, Translation, ZONE_OVERLAY, ZONE_UNDERLAY, flag,
        state,
    },
    record::{ANSWER_MARK, PASSED, budget, why},
    stat::{Count, Reason, STAT_ORPHANS_PASSED},
};

use network_types::icmp::Icmpv4Hdr;

use crate::{
    balance,
    connections::Change,
    conntrack::{self, NO_STATE, Segment, Step},
    packet::{Packet, Role},
    parse::{Carried, Datagram, Family, ICMP, ICMPV6, Kind, UDP, frame, tcp},
    tables::{Case, FlowTables, Onward, Question, Tables, Visit, Work},
};

/// What happens to the packet. Only an entry point turns it into an action of its hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On to the stack, or out.
    Pass,
    /// As its case says: to be rewritten ([`crate::rewrite`]), then on to where that says.
    RewriteV4,
    /// As `RewriteV4`.
    RewriteV6,
    /// Gone.
    Drop(Reason),
}

/// Offset of the IP header behind an Ethernet header.
pub const ETHERNET: usize = 14;
/// Offset of the IP header on a tunnel device.
pub const TUNNEL: usize = 0;

/// In the place of a counter: the packet is to be rewritten.
pub(crate) const REWRITE: u32 = 1 << 31;
/// Beside [`REWRITE`]: it is one of IPv6.
const REWRITE_V6: u32 = 1 << 30;
/// In the place of a counter: another hook counts the packet.
pub(crate) const UNCOUNTED: u32 = REWRITE_V6 - 1;

/// Judges one packet. `EGRESS`: it is on its way out.
#[inline(always)]
pub fn run<P, T, const L3: usize, const EGRESS: bool>(packet: &P, tables: &T) -> Verdict
where
    P: Packet + ?Sized,
    T: Tables,
{
    let direction = if EGRESS { Direction::Egress } else { Direction::Ingress };
    let outcome = match frame::<P, L3>(packet) {
        Ok(Carried::V4(at)) => judge::<P, T, [u8; 4], L3>(packet, at, tables, direction),
        Ok(Carried::V6(at)) => judge::<P, T, [u8; 16], L3>(packet, at, tables, direction),
        Ok(Carried::Arp) => return Verdict::Pass,
        Ok(Carried::NotIp) if P::ROLE as u8 == Role::Behind as u8 => return Verdict::Pass,
        Ok(Carried::NotIp) => not_ip(tables, direction),
        Err(reason) => Err(reason),
    };
    let count = Count { packets: 1, bytes: packet.length() as u64 };
    match outcome {
        Ok(slot) => {
            if slot & UNCOUNTED != UNCOUNTED {
                tables.count_rule(slot & UNCOUNTED, count);
            }
            match slot & (REWRITE | REWRITE_V6) {
                0 => Verdict::Pass,
                REWRITE => Verdict::RewriteV4,
                _ => Verdict::RewriteV6,
            }
        }
        Err(reason) => {
            tables.count_stat(reason.at(direction), count);
            Verdict::Drop(reason)
        }
    }
}

/// The counter of the rule that lets the packet pass, or why it is dropped.
#[inline(always)]
fn judge<P, T, A, const L3: usize>(
    packet: &P,
    at: usize,
    tables: &T,
    direction: Direction,
) -> Result<u32, Reason>
where
    P: Packet + ?Sized,
    T: Tables + FlowTables<A>,
    A: Family,
{
    let control = tables.control().ok_or(Reason::Classifier)?;
    FlowTables::<A>::with_case(tables, Judge::<P, T, L3> { packet, at, tables, control, direction })
}

struct Judge<'a, P: ?Sized, T, const L3: usize> {
    packet: &'a P,
    /// Offset of the IP header.
    at: usize,
    tables: &'a T,
    control: &'a Control,
    direction: Direction,
}

impl<P, T, A, const L3: usize> Work<A> for Judge<'_, P, T, L3>
where
    P: Packet + ?Sized,
    T: Tables + FlowTables<A>,
    A: Family,
{
    #[inline(always)]
    fn judge(self, case: &mut Case<A>) -> Result<u32, Reason> {
        const WANTED: u8 = why::LOG | why::AUDIT | why::ANSWER;
        let (packet, tables) = (self.packet, self.tables);
        case.why = 0;
        // Each arm returns by itself: the verifier would not accept what the other one leaves unwritten.
        match self.examine(case) {
            Ok(slot) => {
                if case.why & WANTED != 0 {
                    case.record.outcome = PASSED;
                    hand_over(packet, case, tables);
                }
                Ok(slot)
            }
            Err(reason) => {
                case.record.outcome = reason as u8;
                hand_over(packet, case, tables);
                Err(reason)
            }
        }
    }
}

impl<P, T, const L3: usize> Judge<'_, P, T, L3>
where
    P: Packet + ?Sized,
    T: Tables,
{
    #[inline(always)]
    fn examine<A>(self, case: &mut Case<A>) -> Result<u32, Reason>
    where
        T: FlowTables<A>,
        A: Family,
    {
        let Self { packet, at, tables, control, direction } = self;
        case.live = tables.live(control);
        case.now = tables.now();
        case.count = Count { packets: 1, bytes: packet.length() as u64 };
        case.direction = direction;
        case.zone = if L3 == TUNNEL { ZONE_OVERLAY } else { ZONE_UNDERLAY };
        case.flow.conn.flags = 0;
        case.l3 = at;
        case.ifindex = packet.ifindex();
        case.mark = packet.mark();
        case.datagram.l4 = 0;

        A::parse(packet, at, &mut case.datagram)?;
        if is_anothers::<P, A>(case, control) {
            return Ok(UNCOUNTED);
        }
        case.translate = false;
        // In front of a tag there is another network, which answers would not find back to.
        case.serves = P::ROLE as u8 != Role::Front as u8
            && at == L3
            && (direction as u8 != 0) == (L3 == TUNNEL);
        match case.datagram.kind {
            Kind::IcmpError => {
                place_quoted(packet, case);
                case.outcome?;
            }
            Kind::Later => {
                place_later(case, tables, control);
                if case.outcome.is_err() && control.switches & switch::ORPHANS_PASS != 0 {
                    tables.count_stat(STAT_ORPHANS_PASSED, case.count);
                    return Ok(UNCOUNTED);
                }
                case.outcome?;
            }
            _ => place(case),
        }
        case.step = None;
        case.outcome = Err(Reason::Classifier);
        if case.datagram.kind != Kind::Icmp {
            find(case, tables, control);
        }
        match case.step {
            Some(Step::Pass) => case.outcome = Ok(case.flow.conn.slot),
            Some(Step::Promote) => {
                case.outcome = Ok(case.flow.conn.slot);
                promote(case, tables);
                if case.flow.conn.group != 0 {
                    tables.change_open(case, Change::Begin);
                }
            }
            Some(Step::Contradict) => return Err(Reason::TcpState),
            Some(Step::Astray) => return Err(Reason::NoFlow),
            Some(Step::Rejudge) => {
                tables.decide_again(case, control);
                if case.outcome.is_ok() {
                    resume(case, tables, control);
                }
                if case.flow.conn.flags & flag::COUNTED != 0 {
                    move_open(case, tables);
                }
            }
            Some(Step::Over) => {
                if case.flow.conn.flags & flag::COUNTED != 0 {
                    tables.change_open(case, Change::End);
                }
                tables.decide(case, control, true);
            }
            None => tables.decide(case, control, false),
        }
        if case.flow.conn.flags & (flag::TRANSLATED | flag::COUNTED) != 0 {
            let is_open = case.flow.conn.state != state::TIME_WAIT;
            if case.flow.conn.flags & flag::COUNTED != 0 && !is_open {
                tables.change_open(case, Change::End);
            }
            if case.flow.conn.flags & flag::TRANSLATED != 0 {
                tables.settle(case);
            }
        }
        if case.datagram.fragmented && case.datagram.kind != Kind::Later {
            remember(case, tables);
        }
        if P::ROLE as u8 == Role::Front as u8 {
            return case.outcome;
        }
        case.clamp = L3 == TUNNEL
            && case.datagram.kind == Kind::Tcp
            && case.datagram.flags & tcp::SYN != 0
            && control.tunnel_mtu != 0;
        if case.clamp {
            clamp(case);
        }
        let v6 = if size_of::<A>() == 4 { 0 } else { REWRITE_V6 };
        match case.outcome {
            Ok(slot) if slot & REWRITE != 0 => Ok(slot | v6),
            outcome => outcome,
        }
    }
}

/// Whether another hook judges the packet: XDP leaves packets to virtual addresses to TC, and TC behind XDP judges none
/// but those. By the destination alone, so that fragments and errors go the same way.
#[inline(always)]
fn is_anothers<P: Packet + ?Sized, A: Family>(case: &Case<A>, control: &Control) -> bool {
    if P::ROLE as u8 == Role::Front as u8 {
        case.zone == ZONE_UNDERLAY
            && case.direction as u8 == 0
            && control.leaves_to_tc(case.datagram.dst)
    } else {
        P::ROLE as u8 == Role::Behind as u8 && !control.judges_in_tc(case.datagram.dst)
    }
}

/// Has the size of TCP's segments looked at.
#[inline(always)]
fn clamp<A>(case: &mut Case<A>) {
    if let Ok(slot) = case.outcome {
        if slot & REWRITE == 0 {
            case.onward = Onward::Same;
        }
        case.outcome = Ok(slot | REWRITE);
    }
}

#[inline(always)]
fn promote<A: Family, T: FlowTables<A>>(case: &mut Case<A>, tables: &T) {
    if case.flow.conn.flags & flag::TRANSLATED == 0 {
        // Left there by an earlier packet.
        case.flow.translation = Translation::none();
    }
    tables.promote(&case.key, &case.flow);
}

/// The flow counts for the rule that admits it now; refused, for none.
#[inline(always)]
fn move_open<A: Family, T: FlowTables<A>>(case: &mut Case<A>, tables: &T) {
    if case.outcome.is_err() {
        tables.change_open(case, Change::End);
    } else if case.flow.conn.group != case.group {
        tables.change_open(case, Change::Move);
    }
}

/// Neither IP nor ARP: the defaults decide.
#[inline(always)]
fn not_ip<T: Tables>(tables: &T, direction: Direction) -> Result<u32, Reason> {
    let control = tables.control().ok_or(Reason::Classifier)?;
    let action = tables.live(control).default_action(direction);
    let passes = action.verdict == verdict::ALLOW || action.flags & rule_flag::AUDIT != 0;
    if passes { Ok(action.slot) } else { Err(Reason::NotIp) }
}

/// ONE lookup for a packet of an established flow, two for any other. The result is in `case.step`, the flow as it is
/// now in `case.flow`.
#[inline(always)]
fn find<A: Family, T: FlowTables<A>>(case: &mut Case<A>, tables: &T, control: &Control) {
    let Datagram { kind, flags, .. } = case.datagram;
    let mut advance = Advance {
        segment: Segment { kind, flags, from_origin: false },
        from_high: case.from_high,
        egress: case.direction as u8 != 0,
        now: case.now as u32,
        generation: case.live.generation(),
        control,
        step: &mut case.step,
        from_origin: &mut case.from_origin,
        flow: &mut case.flow,
    };
    if !tables.touch_established(&case.key, &mut advance) {
        tables.touch_half_open(&case.key, &mut advance);
    }
}

struct Advance<'a, A> {
    segment: Segment,
    from_high: bool,
    egress: bool,
    now: u32,
    generation: u32,
    control: &'a Control,
    step: &'a mut Option<Step>,
    from_origin: &'a mut bool,
    flow: &'a mut Flow<A>,
}

impl<A: Family> Visit<A> for Advance<'_, A> {
    #[inline(always)]
    fn visit(&mut self, flow: &mut Flow<A>) {
        let conn = &mut flow.conn;
        let (now, generation) = (self.now, self.generation);
        let from_origin = (conn.flags & flag::ORIGIN_HIGH != 0) == self.from_high;
        if conn.flags & flag::TRANSLATED != 0 {
            // An error travels towards the sender of what it quotes.
            let with_origin = from_origin != (self.segment.kind == Kind::IcmpError);
            *self.from_origin = with_origin;
            self.flow.translation = flow.translation;
            if !balance::is_expected(conn.flags, with_origin, self.egress) {
                self.flow.conn = *conn;
                // The port may be that of another connection by now, one that is not translated.
                let over = conntrack::is_over_for(conn, self.segment, now, self.control);
                *self.step = Some(if over { Step::Over } else { Step::Astray });
                return;
            }
        }
        let step = if matches!(self.segment.kind, Kind::Later | Kind::IcmpError) {
            conntrack::observe(conn, now, generation, self.control)
        } else {
            let segment = Segment { from_origin, ..self.segment };
            conntrack::advance(conn, segment, now, generation, self.control)
        };
        self.flow.conn = *conn;
        *self.step = Some(step);
    }
}

/// The policy in force admits the flow too.
struct Stamp {
    slot: u32,
    generation: u32,
    group: u16,
}

impl<A> Visit<A> for Stamp {
    #[inline(always)]
    fn visit(&mut self, flow: &mut Flow<A>) {
        flow.conn.slot = self.slot;
        flow.conn.generation = self.generation;
        // What it counts for while it does is changed together with the number.
        if flow.conn.flags & flag::COUNTED == 0 {
            flow.conn.group = self.group;
        }
    }
}

/// Asks the rules about the first packet of a flow. `stale`: an entry that is over is in the way.
#[inline(always)]
pub fn decide<A: Family, T: Tables + FlowTables<A>>(
    case: &mut Case<A>,
    tables: &T,
    control: &Control,
    stale: bool,
) {
    case.outcome = begin(case, tables, control, stale);
}

#[inline(always)]
fn begin<A: Family, T: Tables + FlowTables<A>>(
    case: &mut Case<A>,
    tables: &T,
    control: &Control,
    stale: bool,
) -> Result<u32, Reason> {
    let datagram = &case.datagram;
    if case.zone == ZONE_UNDERLAY && is_essential(datagram, case.direction) || is_own_answer(case) {
        return Ok(case.live.default_action(case.direction).slot);
    }
    let state = match datagram.kind {
        Kind::IcmpError => return Err(Reason::IcmpUnrelated),
        Kind::Later => return Err(Reason::FragmentOrphan),
        // Other ICMP than echo makes no flow.
        Kind::Icmp => NO_STATE,
        kind => {
            let pickup = case.live.is_open() || case.now < control.pickup_until;
            let state = conntrack::first(kind, datagram.flags, pickup);
            if state == NO_STATE {
                return Err(Reason::NoFlow);
            }
            state
        }
    };
    case.question = question(datagram, case.direction);
    if case.zone == ZONE_UNDERLAY && is_beside_tunnel(&case.question, control) {
        return Err(Reason::NotTunnelled);
    }
    if stale && case.flow.conn.flags & flag::TRANSLATED != 0 {
        balance::forget_twin(case, tables);
        tables.remove(&case.key);
    }
    case.flow.conn.flags = 0;
    case.flow.conn.slot = 0;
    case.group = 0;
    if state != NO_STATE && balance::is_served(case, tables, control) {
        return begin_translated(case, tables, control);
    }
    let slot = ask(case, tables, true)?;
    if state != NO_STATE {
        if stale {
            tables.remove(&case.key);
        }
        let origin = if case.from_high { flag::ORIGIN_HIGH } else { 0 };
        let way = if case.direction == Direction::Egress { flag::EGRESS } else { 0 };
        case.flow.conn = Conn {
            seen: case.now as u32,
            generation: case.live.generation(),
            slot,
            state,
            flags: origin | way,
            group: case.group,
        };
        case.flow.translation = Translation::none();
        tables.insert_half_open(&case.key, &case.flow);
    }
    Ok(slot)
}

/// As [`begin`], for the first packet to a virtual address.
#[inline(always)]
fn begin_translated<A: Family, T: Tables + FlowTables<A>>(
    case: &mut Case<A>,
    tables: &T,
    control: &Control,
) -> Result<u32, Reason> {
    let own = case.direction == Direction::Egress;
    case.from_origin = true;
    if own {
        tables.choose(case, control);
        case.outcome?;
        set_other_question(case);
    }
    let slot = match ask(case, tables, true) {
        Ok(slot) => slot,
        Err(reason) => {
            if own {
                balance::forget_twin(case, tables);
                case.flow.conn.flags = 0;
            }
            return Err(reason);
        }
    };
    case.flow.conn.slot = slot;
    case.flow.conn.group = case.group;
    if own {
        let mut stamp = stamp(case, slot);
        balance::stamp_twin(case, tables, &mut stamp);
    } else {
        tables.choose(case, control);
        case.outcome?;
    }
    tables.insert_half_open(&case.key, &case.flow);
    Ok(slot)
}

/// A network card has no packets from the network's addresses, nor any to them: those are in the tunnel or forged.
#[inline(always)]
fn is_beside_tunnel<A: Family>(question: &Question<A>, control: &Control) -> bool {
    let far = match question.direction {
        Direction::Ingress => question.src,
        Direction::Egress => question.dst,
    };
    far.is_in_network(control)
}

/// Asks the rules in force about a flow that other rules admitted, as its originator began it. If they refuse, it is
/// forgotten: that is how a revoked rule cuts live flows, without a walk over the table.
#[inline(always)]
pub fn decide_again<A: Family, T: Tables + FlowTables<A>>(
    case: &mut Case<A>,
    tables: &T,
    control: &Control,
) {
    let flags = case.flow.conn.flags;
    let translated = flags & flag::TRANSLATED != 0;
    let mut zone = case.zone;
    if balance::is_judged_here(flags) {
        case.question = original(&case.key, flags);
    } else {
        set_other_question(case);
        zone = if flags & flag::EGRESS != 0 { ZONE_OVERLAY } else { ZONE_UNDERLAY };
    }
    let forged = zone == ZONE_UNDERLAY && is_beside_tunnel(&case.question, control);
    let slot = if forged { Err(Reason::NotTunnelled) } else { ask(case, tables, false) };
    let Ok(slot) = slot else {
        if translated {
            balance::forget_twin(case, tables);
        }
        tables.remove(&case.key);
        case.outcome = Err(Reason::Revoked);
        return;
    };
    let mut stamp = stamp(case, slot);
    if !tables.touch_established(&case.key, &mut stamp) {
        tables.touch_half_open(&case.key, &mut stamp);
    }
    if translated {
        balance::stamp_twin(case, tables, &mut stamp);
    }
    case.outcome = Ok(slot);
}

#[inline(always)]
fn stamp<A>(case: &Case<A>, slot: u32) -> Stamp {
    Stamp { slot, generation: case.live.generation(), group: case.group }
}

/// The rules judge the other entry's packets.
#[inline(always)]
fn set_other_question<A: Family>(case: &mut Case<A>) {
    let to = &case.flow.translation;
    let (sport, dport) = (u16::from_be_bytes(to.sport), u16::from_be_bytes(to.dport));
    let egress = case.flow.conn.flags & flag::EGRESS != 0;
    let direction = if egress { Direction::Egress } else { Direction::Ingress };
    let lanes = lanes(sport, dport, case.key.proto);
    case.question = Question { src: to.src, dst: to.dst, lanes, direction };
}

/// Goes on with a packet whose flow was judged again. Not part of that: the stack holds one of the two at a time.
#[inline(never)]
fn resume<A: Family, T: Tables + FlowTables<A>>(case: &mut Case<A>, tables: &T, control: &Control) {
    find(case, tables, control);
    match case.step {
        Some(Step::Contradict) => case.outcome = Err(Reason::TcpState),
        Some(Step::Promote) => promote(case, tables),
        Some(Step::Pass | Step::Astray | Step::Rejudge | Step::Over) | None => {}
    }
}

/// The rules' answer to `case.question`, and in `case.why` what else they ask for. A refusal is counted with its rule
/// here. `fresh`: the flow begins; limits and the log are for such.
#[inline(always)]
fn ask<A: Family, T: Tables + FlowTables<A>>(
    case: &mut Case<A>,
    tables: &T,
    fresh: bool,
) -> Result<u32, Reason> {
    let index = tables.classify(&case.question, case.live).ok_or(Reason::Classifier)?;
    let (action, refusal) = if index == NO_RULE {
        (case.live.default_action(case.question.direction), Reason::DeniedByDefault)
    } else {
        (tables.rule(index, case.live).ok_or(Reason::Classifier)?, Reason::Denied)
    };
    case.slot = action.slot;
    case.why = why::RULE;
    case.fresh = fresh;
    case.group = 0;
    if fresh && action.flags & rule_flag::LOG != 0 {
        case.why |= why::LOG;
    }
    let refusal = if action.verdict != verdict::ALLOW {
        refusal
    } else if action.limit == 0 {
        return Ok(action.slot);
    } else {
        tables.admit(case, action.limit);
        match case.outcome {
            Ok(_) => return Ok(action.slot),
            Err(reason) => reason,
        }
    };
    if action.flags & rule_flag::AUDIT != 0 {
        case.why |= why::AUDIT;
        return Ok(action.slot);
    }
    if action.verdict == verdict::REJECT {
        case.why |= why::ANSWER;
    }
    tables.count_rule(action.slot, case.count);
    Err(refusal)
}

/// What the agent tells a sender on behalf of a rule: it belongs to no flow.
#[inline(always)]
fn is_own_answer<A>(case: &Case<A>) -> bool {
    case.mark == ANSWER_MARK && case.direction as u8 != 0
}

/// Tells the agent of the packet, if there is a budget for it.
#[inline(never)]
fn hand_over<P, T, A>(packet: &P, case: &mut Case<A>, tables: &T)
where
    P: Packet + ?Sized,
    T: Tables + FlowTables<A>,
    A: Family,
{
    let budget = if case.why & why::ANSWER == 0 { budget::RECORDS } else { budget::ANSWERS };
    if tables.spend(budget) {
        quote(packet, case);
        tables.tell(case);
    }
}

/// Copies the headers into the record.
#[inline(always)]
fn quote<P: Packet + ?Sized, A: Family>(packet: &P, case: &mut Case<A>) {
    let record = &mut case.record;
    // Masks, as in `place_quoted`.
    let (l3, l4) = (case.l3 & 0xff, case.datagram.l4 & 0xfff);
    if size_of::<A>() == 4 {
        let header: [u8; 20] = packet.load(l3).unwrap_or([0; 20]);
        record.l3[..20].copy_from_slice(&header);
    } else {
        record.l3 = packet.load(l3).unwrap_or([0; 40]);
    }
    record.l4 = [0; 16];
    if l4 == 0 {
        return;
    }
    if let Some(start) = packet.load(l4) {
        record.l4 = start;
    } else if let Some(start) = packet.load::<8>(l4) {
        record.l4[..8].copy_from_slice(&start);
    }
}

/// Completes the record and hands it to the agent.
#[inline(always)]
pub fn tell<A: Family, T: Tables>(case: &mut Case<A>, tables: &T) {
    let record = &mut case.record;
    record.time = tables.nanoseconds();
    record.slot = case.slot;
    record.generation = case.live.generation();
    record.length = case.count.bytes as u32;
    record.ifindex = case.ifindex;
    record.family = if size_of::<A>() == 4 { 4 } else { 6 };
    record.proto = case.datagram.proto;
    record.direction = case.direction as u8;
    record.zone = case.zone;
    record.why = case.why;
    record.pad = [0; 2];
    tables.record(record);
}

#[inline(always)]
fn question<A: Family>(d: &Datagram<A>, direction: Direction) -> Question<A> {
    let lanes = if d.proto == A::ICMP {
        lanes(0, u16::from_be_bytes(d.icmp), d.proto)
    } else {
        lanes(u16::from_be_bytes(d.sport), u16::from_be_bytes(d.dport), d.proto)
    };
    Question { src: d.src, dst: d.dst, lanes, direction }
}

/// The first packet of a known flow, as rules are asked about it.
#[inline(always)]
pub fn original<A: Family>(key: &FlowKey<A>, flags: u8) -> Question<A> {
    let from_high = flags & flag::ORIGIN_HIGH != 0;
    let (src, dst) = if from_high { (key.high, key.low) } else { (key.low, key.high) };
    let (sport, dport) =
        if from_high { (key.high_port, key.low_port) } else { (key.low_port, key.high_port) };
    let lanes = match key.proto {
        ICMP if A::ICMP == ICMP => lanes(0, 8 << 8, ICMP),
        ICMPV6 if A::ICMP == ICMPV6 => lanes(0, 128 << 8, ICMPV6),
        proto => lanes(u16::from_be_bytes(sport), u16::from_be_bytes(dport), proto),
    };
    let egress = flags & flag::EGRESS != 0;
    let direction = if egress { Direction::Egress } else { Direction::Ingress };
    Question { src, dst, lanes, direction }
}

/// What no policy may cut on a network card: without it the VM loses its neighbours or its address.
#[inline(always)]
fn is_essential<A: Family>(datagram: &Datagram<A>, direction: Direction) -> bool {
    if datagram.proto == ICMPV6 && datagram.kind == Kind::Icmp {
        let [kind, code] = datagram.icmp;
        // Neighbour discovery comes from the link or not at all (RFC 4861), and whole (RFC 6980); so do reports of
        // multicast listeners.
        let discovery = matches!(kind, 133..=137) && code == 0 && datagram.hop_limit == 255;
        let listeners = matches!(kind, 130..=132 | 143) && datagram.hop_limit == 1;
        return (discovery || listeners) && !datagram.fragmented;
    }
    if datagram.proto == UDP && datagram.kind == Kind::Datagram {
        let (server, client) = match direction {
            Direction::Ingress => (datagram.sport, datagram.dport),
            Direction::Egress => (datagram.dport, datagram.sport),
        };
        // DHCP: its answers come from another address than the question went to.
        let dhcp = if size_of::<A>() == 4 { (67, 68) } else { (547, 546) };
        return (u16::from_be_bytes(server), u16::from_be_bytes(client)) == dhcp;
    }
    false
}

#[inline(always)]
fn place<A: Family>(case: &mut Case<A>) {
    let Datagram { kind, proto, src, dst, sport, dport, .. } = case.datagram;
    set_key(case, kind, proto, (src, dst), (sport, dport));
}

/// Of the packet that an ICMP error quotes. It must have been sent by the end that now hears of the error.
#[inline(never)]
fn place_quoted<P: Packet + ?Sized, A: Family>(packet: &P, case: &mut Case<A>) {
    case.outcome = Err(Reason::IcmpUnrelated);
    // The mask tells the verifier what it forgot while the offset was in memory.
    let l4 = case.datagram.l4 & 0xfff;
    if l4 != case.datagram.l4 {
        return;
    }
    let Some(q) = A::quoted(packet, l4 + Icmpv4Hdr::LEN) else {
        return;
    };
    if q.src == case.datagram.dst {
        set_key(case, q.kind, q.proto, (q.src, q.dst), (q.sport, q.dport));
        case.outcome = Ok(0);
    }
}

/// Of a later fragment: the first one has said the rest.
#[inline(never)]
fn place_later<A: Family, T: Tables>(case: &mut Case<A>, tables: &T, control: &Control) {
    fragment_key(case);
    case.outcome = Err(Reason::FragmentOrphan);
    if !tables.recall_fragment(&case.fragment_key, &mut case.fragment) {
        return;
    }
    let f = case.fragment;
    if conntrack::age(case.now as u32, f.seen) > control.fragment_timeout {
        return;
    }
    let kind = match f.echo {
        1 => Kind::EchoRequest,
        2 => Kind::EchoReply,
        _ => Kind::Datagram,
    };
    let ends = (case.datagram.src, case.datagram.dst);
    set_key(case, kind, f.proto, ends, (f.sport, f.dport));
    case.outcome = Ok(0);
}

#[inline(never)]
fn remember<A: Family, T: Tables>(case: &mut Case<A>, tables: &T) {
    fragment_key(case);
    let d = &case.datagram;
    case.fragment = Fragment {
        sport: d.sport,
        dport: d.dport,
        echo: match d.kind {
            Kind::EchoRequest => 1,
            Kind::EchoReply => 2,
            _ => 0,
        },
        proto: d.proto,
        pad: [0; 2],
        seen: case.now as u32,
    };
    if case.outcome.is_ok() {
        tables.remember_fragment(&case.fragment_key, &case.fragment);
    }
}

#[inline(always)]
fn fragment_key<A: Family>(case: &mut Case<A>) {
    let d = &case.datagram;
    case.fragment_key = FragmentKey {
        src: d.src.widen(),
        dst: d.dst.widen(),
        id: d.fragment_id,
        proto: d.fragment_proto,
        zone: case.zone,
        pad: [0; 2],
    };
}

/// Sets the key, and whether the packet was sent by its high end. Field by field: the key does not cross the stack.
#[inline(always)]
fn set_key<A: Family>(
    case: &mut Case<A>,
    kind: Kind,
    proto: u8,
    (src, dst): (A, A),
    (sport, dport): ([u8; 2], [u8; 2]),
) {
    let key = &mut case.key;
    case.from_high = match kind {
        // The identifier of an echo stays with the requester.
        Kind::EchoRequest | Kind::EchoReply => {
            let reply = matches!(kind, Kind::EchoReply);
            (key.low, key.high) = if reply { (dst, src) } else { (src, dst) };
            (key.low_port, key.high_port) = (sport, dport);
            reply
        }
        _ => order(key, (src, dst), (sport, dport)),
    };
    key.proto = proto;
    key.zone = case.zone;
    key.pad = [0; 2];
}

/// Sets the ends of a key in their order; true if the first is the high one.
#[inline(always)]
pub(crate) fn order<A: Family>(
    key: &mut FlowKey<A>,
    (src, dst): (A, A),
    (sport, dport): ([u8; 2], [u8; 2]),
) -> bool {
    let from_high =
        src.is_above(dst) || src == dst && u16::from_be_bytes(sport) > u16::from_be_bytes(dport);
    (key.low, key.high) = if from_high { (dst, src) } else { (src, dst) };
    (key.low_port, key.high_port) = if from_high { (dport, sport) } else { (sport, dport) };
    from_high
}

#[cfg(test)]
mod tests;
