use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use cnsmo_common::{
    control::{
        Limit, LiveParts, RuleAction, SLOT_DEFAULT_EGRESS, SLOT_DEFAULT_INGRESS, SLOT_FIRST,
        rule_flag, verdict,
    },
    flow::state,
    record::Record,
};
use proptest::prelude::*;

use super::*;
use crate::{
    frames::{self, FAMILIES, Ip, PEERS, V4, VM, ethernet, every_kind, icmp, ipv6},
    host::{HostTables, empty_case},
    parse::{TCP, tcp},
};

const FIN: u8 = tcp::FIN | tcp::ACK;
const SYN: u8 = tcp::SYN;
const SYN_ACK: u8 = tcp::SYN | tcp::ACK;
const RST: u8 = tcp::RST;
const ACK: u8 = tcp::ACK;

const PASS: Verdict = Verdict::Pass;
const DEFAULT: Verdict = Verdict::Drop(Reason::DeniedByDefault);
const NO_FLOW: Verdict = Verdict::Drop(Reason::NoFlow);
const UNRELATED: Verdict = Verdict::Drop(Reason::IcmpUnrelated);
const ORPHAN: Verdict = Verdict::Drop(Reason::FragmentOrphan);
const REVOKED: Verdict = Verdict::Drop(Reason::Revoked);

/// What the rules were asked: direction, last byte of source and destination, lanes.
type Asked = (Direction, u8, u8, u64);

/// A data path in front of the VM. Its only rules: the one that allows, and the one that denies.
struct Path {
    tables: HostTables,
    live: LiveParts,
    asked: Rc<RefCell<Vec<Asked>>>,
}

const ALLOW: u32 = 0;
const DENY: u32 = 1;

impl Path {
    /// Refuses whatever no rule allows, in both directions.
    fn closed() -> Self {
        Self::with_defaults([false, false])
    }

    /// As a VM usually is: it may begin flows, others may not.
    fn outward() -> Self {
        Self::with_defaults([false, true])
    }

    fn with_defaults(default_allow: [bool; 2]) -> Self {
        let live = LiveParts { default_allow, generation: 1, ..LiveParts::default() };
        let mut path = Self { tables: HostTables::new(live.pack()), live, asked: Rc::default() };
        path.rules(|_, _| NO_RULE);
        path
    }

    /// Sets the rules: direction and lanes to `ALLOW`, `DENY` or `NO_RULE`.
    fn rules(&mut self, rule: impl Fn(Direction, u64) -> u32 + Clone + 'static) {
        let actions = vec![
            RuleAction { slot: SLOT_FIRST, verdict: verdict::ALLOW, flags: 0, limit: 0 },
            RuleAction { slot: SLOT_FIRST + 1, verdict: verdict::DENY, flags: 0, limit: 0 },
        ];
        let (asked, rule_v6) = (Rc::clone(&self.asked), rule.clone());
        let v4 = move |q: &Question<[u8; 4]>, _| {
            asked.borrow_mut().push((q.direction, q.src[3], q.dst[3], q.lanes));
            Some(rule(q.direction, q.lanes))
        };
        let asked = Rc::clone(&self.asked);
        let v6 = move |q: &Question<[u8; 16]>, _| {
            asked.borrow_mut().push((q.direction, q.src[15], q.dst[15], q.lanes));
            Some(rule_v6(q.direction, q.lanes))
        };
        self.tables.set_rules(actions, Box::new(v4), Box::new(v6));
    }

    /// Puts a policy with other defaults in force.
    fn next_generation(&mut self, default_allow: [bool; 2]) {
        self.live = LiveParts { default_allow, generation: self.live.generation + 1, ..self.live };
        self.tables.control.live = self.live.pack().0;
    }

    fn ingress(&self, ip: Ip, packet: &[u8]) -> Verdict {
        run::<_, _, ETHERNET, false>(&ip.ethernet(packet)[..], &self.tables)
    }

    fn egress(&self, ip: Ip, packet: &[u8]) -> Verdict {
        run::<_, _, ETHERNET, true>(&ip.ethernet(packet)[..], &self.tables)
    }

    fn later(&self, jiffies: u64) {
        self.tables.now.set(self.tables.now.get() + jiffies);
    }

    /// Number of established and of half-open flows, of both families.
    fn flows(&self) -> [usize; 2] {
        let (v4, v6) = (self.tables.flows_v4(), self.tables.flows_v6());
        [v4[0].len() + v6[0].len(), v4[1].len() + v6[1].len()]
    }

    /// The only flow.
    fn conn(&self) -> Conn {
        let (v4, v6) = (self.tables.flows_v4(), self.tables.flows_v6());
        let v4 = v4.iter().flat_map(|flows| flows.values()).map(|flow| flow.conn);
        let v6 = v6.iter().flat_map(|flows| flows.values()).map(|flow| flow.conn);
        let all: Vec<_> = v4.chain(v6).collect();
        assert_eq!(all.len(), 1);
        all[0]
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.take()
    }

    fn packets(&self, slot: u32) -> u64 {
        self.tables.rule_counts.borrow().get(&slot).map_or(0, |count| count.packets)
    }

    fn dropped(&self, reason: Reason, direction: Direction) -> Count {
        self.tables.stat_counts.borrow().get(&reason.at(direction)).copied().unwrap_or_default()
    }
}

/// Each test of a flow, for both families and for a peer at either end of the key.
fn each(mut test: impl FnMut(Ip, u8)) {
    for ip in FAMILIES {
        for peer in PEERS {
            test(ip, peer);
        }
    }
}

/// A connection of the VM to the peer's port 80, complete.
fn connect(path: &Path, ip: Ip, peer: u8) {
    let (client, server) = ((VM, 4000), (peer, 80));
    assert_eq!(path.egress(ip, &ip.tcp(client, server, SYN)), PASS);
    assert_eq!(path.ingress(ip, &ip.tcp(server, client, SYN_ACK)), PASS);
    assert_eq!(path.egress(ip, &ip.tcp(client, server, ACK)), PASS);
}

#[test]
fn a_connection_that_the_vm_began_works_both_ways() {
    each(|ip, peer| {
        let path = Path::outward();
        assert_eq!(path.egress(ip, &ip.tcp((VM, 4000), (peer, 80), SYN)), PASS);
        assert_eq!(path.flows(), [0, 1]);
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 80), (VM, 4000), SYN_ACK)), PASS);
        assert_eq!(path.flows(), [0, 1]);
        assert_eq!(path.egress(ip, &ip.tcp((VM, 4000), (peer, 80), ACK)), PASS);
        assert_eq!(path.flows(), [1, 0]);
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 80), (VM, 4000), FIN)), PASS);
        assert_eq!(path.egress(ip, &ip.tcp((VM, 4000), (peer, 80), FIN)), PASS);
        assert_eq!(path.conn().state, state::TIME_WAIT);
        assert_eq!(path.asked().len(), 1, "the rules are asked about the first packet only");
    });
}

#[test]
fn nobody_else_gets_in() {
    each(|ip, peer| {
        let path = Path::outward();
        connect(&path, ip, peer);
        let other = if peer == PEERS[0] { 2 } else { 201 };
        for (src, dst) in
            [((other, 80), (VM, 4000)), ((peer, 81), (VM, 4000)), ((peer, 80), (VM, 4001))]
        {
            assert_eq!(path.ingress(ip, &ip.tcp(src, dst, ACK)), NO_FLOW);
            assert_eq!(path.ingress(ip, &ip.tcp(src, dst, SYN)), DEFAULT);
            assert_eq!(path.ingress(ip, &ip.tcp(src, dst, SYN_ACK)), NO_FLOW);
            assert_eq!(path.ingress(ip, &ip.tcp(src, dst, RST)), NO_FLOW);
            assert_eq!(path.ingress(ip, &ip.udp(src, dst)), DEFAULT);
        }
        assert_eq!(path.flows(), [1, 0]);
    });
}

#[test]
fn a_refused_syn_flood_never_reaches_the_established_table() {
    each(|ip, peer| {
        let mut path = Path::outward();
        path.rules(|_, _| ALLOW);
        for port in 0..50 {
            let (client, server) = ((peer, 1000 + port), (VM, 81));
            assert_eq!(path.ingress(ip, &ip.tcp(client, server, SYN)), PASS);
            assert_eq!(path.egress(ip, &ip.tcp(server, client, RST | ACK)), PASS);
        }
        assert_eq!(path.flows(), [0, 50]);
    });
}

#[test]
fn a_finished_connection_is_opened_again_by_who_may() {
    each(|ip, peer| {
        let path = Path::outward();
        let (client, server) = ((VM, 4000), (peer, 80));
        connect(&path, ip, peer);
        path.egress(ip, &ip.tcp(client, server, FIN));
        path.ingress(ip, &ip.tcp(server, client, FIN));
        assert_eq!(path.conn().state, state::TIME_WAIT);
        assert_eq!(path.ingress(ip, &ip.tcp(server, client, SYN)), DEFAULT);
        assert_eq!(path.conn().state, state::TIME_WAIT, "the refused left no trace");
        assert_eq!(path.egress(ip, &ip.tcp(client, server, SYN)), PASS);
        assert_eq!((path.flows(), path.conn().state), ([0, 1], state::SYN_SENT));
    });
}

#[test]
fn what_contradicts_the_state_is_dropped() {
    each(|ip, peer| {
        let path = Path::outward();
        path.egress(ip, &ip.tcp((VM, 4000), (peer, 80), SYN));
        let ack = ip.tcp((VM, 4000), (peer, 80), ACK);
        assert_eq!(path.egress(ip, &ack), Verdict::Drop(Reason::TcpState));
    });
}

#[test]
fn udp_answers_pass_and_promote() {
    each(|ip, peer| {
        let path = Path::outward();
        let (client, server) = ((VM, 5353), (peer, 53));
        assert_eq!(path.ingress(ip, &ip.udp(server, client)), DEFAULT);
        assert_eq!(path.egress(ip, &ip.udp(client, server)), PASS);
        assert_eq!(path.egress(ip, &ip.udp(client, server)), PASS);
        assert_eq!(path.flows(), [0, 1]);
        assert_eq!(path.ingress(ip, &ip.udp(server, client)), PASS);
        assert_eq!(path.flows(), [1, 0]);
    });
}

#[test]
fn echoes_are_answered_to_the_requester_alone() {
    each(|ip, peer| {
        let path = Path::outward();
        assert_eq!(path.ingress(ip, &ip.echo_reply(peer, VM, 9)), NO_FLOW);
        assert_eq!(path.egress(ip, &ip.echo_request(VM, peer, 9)), PASS);
        assert_eq!(path.ingress(ip, &ip.echo_request(peer, VM, 9)), DEFAULT, "another flow");
        assert_eq!(path.ingress(ip, &ip.echo_reply(peer, VM, 8)), NO_FLOW);
        assert_eq!(path.egress(ip, &ip.echo_reply(VM, peer, 9)), NO_FLOW);
        assert_eq!(path.flows(), [0, 1]);
        assert_eq!(path.ingress(ip, &ip.echo_reply(peer, VM, 9)), PASS);
        assert_eq!(path.flows(), [1, 0]);
    });
}

#[test]
fn other_icmp_is_judged_by_the_rules_and_leaves_no_flow() {
    each(|ip, peer| {
        let mut path = Path::closed();
        let proto = ip.icmp();
        path.rules(move |direction, asked| {
            let timestamp = lanes(0, 13 << 8, proto);
            if direction == Direction::Ingress && asked == timestamp { ALLOW } else { NO_RULE }
        });
        let message = |kind| icmp([kind, 0], 0, &[]);
        assert_eq!(path.ingress(ip, &ip.packet(peer, VM, proto, &message(13))), PASS);
        assert_eq!(path.egress(ip, &ip.packet(VM, peer, proto, &message(14))), DEFAULT);
        assert_eq!(path.flows(), [0, 0]);
    });
}

#[test]
fn icmp_errors_pass_with_the_flow_they_are_about() {
    each(|ip, peer| {
        let path = Path::outward();
        connect(&path, ip, peer);
        let before = path.conn();
        path.later(5);
        let router = 50;
        let error = |to, quoted: &[u8]| ip.error(router, to, quoted);
        let sent = ip.tcp((VM, 4000), (peer, 80), ACK);
        assert_eq!(path.ingress(ip, &error(VM, &sent)), PASS, "from a router on the way");
        assert_eq!(
            path.egress(ip, &ip.error(VM, peer, &ip.tcp((peer, 80), (VM, 4000), ACK))),
            PASS
        );
        assert_eq!(path.conn(), before, "an error refreshes nothing");

        assert_eq!(path.ingress(ip, &error(peer, &sent)), UNRELATED, "not to who sent it");
        let received = ip.tcp((peer, 80), (VM, 4000), ACK);
        assert_eq!(path.ingress(ip, &error(VM, &received)), UNRELATED, "not sent by the VM");
        let other = ip.tcp((VM, 4001), (peer, 80), ACK);
        assert_eq!(path.ingress(ip, &error(VM, &other)), UNRELATED, "of no flow");
        for end in 0..sent.len() - 16 {
            assert_eq!(path.ingress(ip, &error(VM, &sent[..end])), UNRELATED, "{end}");
        }
        assert_eq!(path.flows(), [1, 0]);
    });
}

#[test]
fn icmp_errors_about_datagrams_and_echoes() {
    each(|ip, peer| {
        let path = Path::outward();
        let sent = [ip.udp((VM, 5353), (peer, 53)), ip.echo_request(VM, peer, 9)];
        for packet in sent {
            let error = ip.error(peer, VM, &packet);
            assert_eq!(path.ingress(ip, &error), UNRELATED);
            assert_eq!(path.egress(ip, &packet), PASS);
            assert_eq!(path.ingress(ip, &error), PASS);
        }
        let nested = ip.error(peer, VM, &ip.error(VM, peer, &ip.echo_request(peer, VM, 9)));
        assert_eq!(path.ingress(ip, &nested), UNRELATED);
    });
}

#[test]
fn fragments_share_the_fate_of_the_first() {
    each(|ip, peer| {
        let path = Path::outward();
        let (sent, received) = ((VM, peer), (peer, VM));
        let first =
            |ends, sport, dport| ip.fragment(ends, UDP, (0, true), &frames::udp(sport, dport));
        let rest = |ends, at| ip.fragment(ends, UDP, at, &[0; 8]);
        assert_eq!(path.egress(ip, &rest(sent, (2, false))), ORPHAN);
        assert_eq!(path.egress(ip, &first(sent, 5353, 53)), PASS);
        assert_eq!(path.egress(ip, &rest(sent, (2, true))), PASS);
        assert_eq!(path.egress(ip, &rest(sent, (3, false))), PASS);
        assert_eq!(path.ingress(ip, &rest(received, (2, false))), ORPHAN, "the other way");
        assert_eq!(path.ingress(ip, &first(received, 53, 5353)), PASS);
        assert_eq!(path.ingress(ip, &rest(received, (2, false))), PASS);

        path.later(1_001);
        assert_eq!(path.egress(ip, &rest(sent, (2, false))), ORPHAN, "too late");
        assert_eq!(path.ingress(ip, &first(received, 1, 5353)), DEFAULT);
        assert_eq!(path.ingress(ip, &rest(received, (2, false))), ORPHAN, "of a refused first");
    });
}

#[test]
fn fragments_of_echoes() {
    each(|ip, peer| {
        let path = Path::outward();
        let part = |(src, dst), kind: u8, at| {
            let message = icmp([kind, 0], 9, &[0; 8]);
            ip.fragment((src, dst), ip.icmp(), at, &message)
        };
        let [request, reply] = ip.echo();
        assert_eq!(path.egress(ip, &part((VM, peer), request, (0, true))), PASS);
        assert_eq!(path.egress(ip, &part((VM, peer), request, (2, false))), PASS);
        assert_eq!(path.ingress(ip, &part((peer, VM), reply, (0, true))), PASS);
        assert_eq!(path.ingress(ip, &part((peer, VM), reply, (2, false))), PASS);
        assert_eq!(path.flows(), [1, 0]);
        // The first packet of a flow of the other side with the same identifier.
        assert_eq!(path.ingress(ip, &part((peer, VM), request, (0, true))), DEFAULT);
    });
}

#[test]
fn fragments_that_attack_are_refused() {
    each(|ip, peer| {
        let mut path = Path::closed();
        path.rules(|_, _| ALLOW);
        let tiny = Verdict::Drop(Reason::FragmentTiny);
        let segment = frames::tcp(4000, 80, SYN);
        let part = |at, payload: &[u8]| ip.fragment((peer, VM), TCP, at, payload);
        assert_eq!(path.ingress(ip, &part((0, true), &segment[..16])), tiny);
        assert_eq!(path.ingress(ip, &part((0, true), &segment)), PASS);
        assert_eq!(path.ingress(ip, &part((1, false), &segment)), tiny);
        assert_eq!(path.ingress(ip, &part((3, false), &segment)), PASS);
    });
}

#[test]
fn a_refused_first_fragment_speaks_for_no_other() {
    each(|ip, peer| {
        let path = Path::outward();
        path.egress(ip, &ip.tcp((VM, 4000), (peer, 80), SYN));
        let part = |at, payload: &[u8]| ip.fragment((VM, peer), TCP, at, payload);
        let ack = part((0, true), &frames::tcp(4000, 80, ACK));
        assert_eq!(path.egress(ip, &ack), Verdict::Drop(Reason::TcpState));
        assert_eq!(path.egress(ip, &part((3, false), &[0; 8])), ORPHAN);
    });
}

/// Else a flood of refused fragments would push others out.
#[test]
fn a_refused_first_fragment_takes_no_place() {
    for (path, kept) in [(Path::closed(), false), (Path::outward(), true)] {
        let first = Ip::V4.fragment((VM, PEERS[0]), UDP, (0, true), &frames::udp(5353, 53));
        assert_eq!(path.egress(Ip::V4, &first) == PASS, kept);
        let mut case = empty_case::<[u8; 4]>();
        <[u8; 4]>::parse(&first[..], 0, &mut case.datagram).unwrap();
        fragment_key(&mut case);
        assert_eq!(path.tables.recall_fragment(&case.fragment_key, &mut case.fragment), kept);
    }
}

/// A fragment header within a fragment: only its outer datagram could be remembered, so the rest has no first.
#[test]
fn nested_fragments_do_not_pass() {
    let mut path = Path::closed();
    path.rules(|_, _| ALLOW);
    let inner = frames::chain(&[44], UDP, &frames::udp(1, 2));
    let part = |at, payload: &[u8]| Ip::V6.fragment((PEERS[0], VM), 44, at, payload);
    assert_eq!(path.ingress(Ip::V6, &part((0, true), &inner)), PASS);
    assert_eq!(path.ingress(Ip::V6, &part((40, false), &[0; 8])), ORPHAN);
}

#[test]
fn neighbour_discovery_passes_from_the_link_only() {
    let path = Path::closed();
    let message = |kind, code, hop_limit| {
        ipv6(PEERS[0], VM, ICMPV6, hop_limit, &icmp([kind, code], 0, &frames::v6(VM)))
    };
    for kind in 133..=137 {
        assert_eq!(path.ingress(Ip::V6, &message(kind, 0, 255)), PASS, "{kind}");
        assert_eq!(path.egress(Ip::V6, &message(kind, 0, 255)), PASS, "{kind}");
        assert_eq!(path.ingress(Ip::V6, &message(kind, 0, 254)), DEFAULT, "{kind}");
        assert_eq!(path.ingress(Ip::V6, &message(kind, 1, 255)), DEFAULT, "{kind}");
    }
    for kind in [130, 131, 132, 143] {
        assert_eq!(path.egress(Ip::V6, &message(kind, 0, 1)), PASS, "{kind}");
        assert_eq!(path.egress(Ip::V6, &message(kind, 0, 2)), DEFAULT, "{kind}");
    }
    for kind in [138, 139, 141, 144, 255] {
        assert_eq!(path.ingress(Ip::V6, &message(kind, 0, 255)), DEFAULT, "{kind}");
        assert_eq!(path.ingress(Ip::V6, &message(kind, 0, 1)), DEFAULT, "{kind}");
    }
    let solicitation = icmp([135, 0], 0, &frames::v6(VM));
    let chain = [&[ICMPV6, 0, 0, 1, 0, 0, 0, 7][..], &solicitation].concat();
    let fragment = ipv6(PEERS[0], VM, 44, 255, &chain);
    assert_eq!(path.ingress(Ip::V6, &fragment), DEFAULT, "in fragments (RFC 6980)");
    let mut in_v4 = V4 { proto: ICMPV6, ..V4::default() }.carrying(&solicitation);
    in_v4[8] = 255;
    assert_eq!(path.ingress(Ip::V4, &in_v4), DEFAULT, "ICMPv6 in IPv4 is none");
    let tunnel = run::<_, _, TUNNEL, false>(&message(134, 0, 255)[..], &path.tables);
    assert_eq!(tunnel, DEFAULT, "a tunnel has no neighbours");
    assert_eq!(path.flows(), [0, 0]);
}

#[test]
fn the_vm_gets_its_address_under_any_policy() {
    for (ip, server, client) in [(Ip::V4, 67, 68), (Ip::V6, 547, 546)] {
        let mut path = Path::closed();
        path.rules(|_, _| DENY);
        let denied = Verdict::Drop(Reason::Denied);
        let peer = PEERS[0];
        assert_eq!(path.egress(ip, &ip.udp((VM, client), (255, server))), PASS);
        assert_eq!(path.ingress(ip, &ip.udp((peer, server), (VM, client))), PASS);
        // Not a server for others, unless a rule says so.
        assert_eq!(path.ingress(ip, &ip.udp((peer, client), (VM, server))), denied);
        assert_eq!(path.egress(ip, &ip.udp((VM, server), (peer, client))), denied);
        assert_eq!(path.ingress(ip, &ip.udp((peer, server), (VM, client + 1))), denied);
        assert_eq!(path.flows(), [0, 0]);
    }
}

#[test]
fn a_flow_is_judged_again_as_it_began_once_per_policy() {
    each(|ip, peer| {
        let mut path = Path::outward();
        connect(&path, ip, peer);
        path.asked();
        path.next_generation([false, true]);
        // The reply comes first.
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 80), (VM, 4000), ACK)), PASS);
        assert_eq!(path.asked(), [(Direction::Egress, VM, peer, lanes(4000, 80, TCP))]);
        assert_eq!(path.egress(ip, &ip.tcp((VM, 4000), (peer, 80), ACK)), PASS);
        assert_eq!(path.asked(), []);
        assert_eq!(path.conn().generation, 2);
    });
}

#[test]
fn a_revoked_flow_ends_with_its_next_packet() {
    each(|ip, peer| {
        for reply_first in [false, true] {
            let mut path = Path::outward();
            connect(&path, ip, peer);
            path.next_generation([true, false]);
            let (sent, received) =
                (ip.tcp((VM, 4000), (peer, 80), ACK), ip.tcp((peer, 80), (VM, 4000), ACK));
            let direction = if reply_first {
                assert_eq!(path.ingress(ip, &received), REVOKED);
                Direction::Ingress
            } else {
                assert_eq!(path.egress(ip, &sent), REVOKED);
                Direction::Egress
            };
            assert_eq!(path.dropped(Reason::Revoked, direction).packets, 1);
            assert_eq!(path.flows(), [0, 0]);
            assert_eq!(path.ingress(ip, &received), NO_FLOW);
            assert_eq!(path.egress(ip, &sent), NO_FLOW);
        }
    });
}

#[test]
fn half_open_flows_fragments_and_errors_are_revoked_too() {
    each(|ip, peer| {
        let datagram = ip.udp((VM, 5353), (peer, 53));
        let first = ip.fragment((VM, peer), UDP, (0, true), &frames::udp(5353, 53));
        let rest = ip.fragment((VM, peer), UDP, (2, false), &[0; 8]);
        let request = ip.echo_request(VM, peer, 9);
        for (before, after, outgoing) in [
            (&datagram, ip.udp((peer, 53), (VM, 5353)), false),
            (&datagram, ip.error(peer, VM, &datagram), false),
            (&first, rest, true),
            (&request, ip.echo_reply(peer, VM, 9), false),
        ] {
            let mut path = Path::outward();
            assert_eq!(path.egress(ip, before), PASS);
            path.next_generation([true, false]);
            let verdict = if outgoing { path.egress(ip, &after) } else { path.ingress(ip, &after) };
            assert_eq!(verdict, REVOKED);
            assert_eq!(path.flows(), [0, 0]);
        }
    });
}

#[test]
fn an_echo_is_judged_again_as_a_request() {
    each(|ip, peer| {
        let mut path = Path::outward();
        path.egress(ip, &ip.echo_request(VM, peer, 9));
        path.asked();
        path.next_generation([false, true]);
        assert_eq!(path.ingress(ip, &ip.echo_reply(peer, VM, 9)), PASS);
        let request = lanes(0, u16::from(ip.echo()[0]) << 8, ip.icmp());
        assert_eq!(path.asked(), [(Direction::Egress, VM, peer, request)]);
        assert_eq!(path.flows(), [1, 0], "promoted by the packet that was judged again");
    });
}

#[test]
fn rules_are_asked_the_same_about_a_flow_as_about_its_first_packet() {
    each(|ip, peer| {
        let foreign = if ip == Ip::V4 { ICMPV6 } else { ICMP };
        for packet in [
            ip.tcp((VM, 4000), (peer, 80), SYN),
            ip.udp((VM, 5353), (peer, 53)),
            ip.packet(VM, peer, 132, &[0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0]),
            ip.packet(VM, peer, 47, &[0; 8]),
            ip.echo_request(VM, peer, 9),
            ip.packet(VM, peer, foreign, &[8; 8]),
        ] {
            let mut path = Path::outward();
            assert_eq!(path.egress(ip, &packet), PASS);
            let first = path.asked();
            path.next_generation([false, true]);
            assert_eq!(path.egress(ip, &packet), PASS);
            assert_eq!((path.asked(), first.len()), (first, 1));
        }
    });
}

#[test]
fn a_flow_that_is_over_is_none() {
    each(|ip, peer| {
        let path = Path::outward();
        connect(&path, ip, peer);
        let received = ip.tcp((peer, 80), (VM, 4000), ACK);
        path.later(1_000);
        assert_eq!(path.ingress(ip, &received), PASS);
        path.later(1_001);
        assert_eq!(path.ingress(ip, &received), NO_FLOW);

        let path = Path::outward();
        let (sent, answer) = (ip.udp((VM, 5353), (peer, 53)), ip.udp((peer, 53), (VM, 5353)));
        path.egress(ip, &sent);
        path.ingress(ip, &answer);
        path.later(1_001);
        assert_eq!(path.ingress(ip, &answer), DEFAULT);
        assert_eq!(path.egress(ip, &sent), PASS);
        assert_eq!(path.flows(), [0, 1], "it begins from the start");
    });
}

#[test]
fn connections_older_than_the_firewall_go_on_if_a_rule_allows_them() {
    each(|ip, peer| {
        let mut path = Path::outward();
        path.tables.control.pickup_until = 100;
        let (sent, received) =
            (ip.tcp((VM, 4000), (peer, 80), ACK), ip.tcp((peer, 80), (VM, 4000), ACK));
        assert_eq!(path.ingress(ip, &received), DEFAULT);
        assert_eq!(path.egress(ip, &ip.tcp((VM, 4000), (peer, 80), RST)), NO_FLOW);
        assert_eq!(path.egress(ip, &sent), PASS);
        assert_eq!(path.flows(), [0, 1], "no place that a flood cannot take before an answer");
        assert_eq!(path.ingress(ip, &received), PASS);
        assert_eq!(path.flows(), [1, 0]);

        path.later(100);
        assert_eq!(path.egress(ip, &ip.tcp((VM, 4001), (peer, 80), ACK)), NO_FLOW, "too late");
        assert_eq!(path.ingress(ip, &received), PASS);
    });
}

#[test]
fn a_vm_that_no_policy_selects_refuses_nothing_for_having_no_flow() {
    each(|ip, peer| {
        let mut path = Path::with_defaults([true, true]);
        path.live.open = true;
        path.next_generation([true, true]);
        path.later(1_000_000);
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 4000), (VM, 80), ACK)), PASS);
        assert_eq!(path.egress(ip, &ip.tcp((VM, 80), (peer, 4000), ACK)), PASS);
        assert_eq!(path.flows(), [1, 0]);

        path.live.open = false;
        path.next_generation([false, true]);
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 4000), (VM, 80), ACK)), REVOKED);
    });
}

#[test]
fn packets_and_bytes_are_counted_where_they_were_decided() {
    each(|ip, peer| {
        let mut path = Path::closed();
        path.rules(|_, asked| match asked >> 17 & 0xffff {
            80 => ALLOW,
            22 => DENY,
            _ => NO_RULE,
        });
        let to = |port| ip.tcp((peer, 4000), (VM, port), SYN);
        let bytes = ip.ethernet(&to(80)).len() as u64;
        for _ in 0..3 {
            assert_eq!(path.ingress(ip, &to(80)), PASS);
        }
        assert_eq!(path.ingress(ip, &to(22)), Verdict::Drop(Reason::Denied));
        assert_eq!(path.ingress(ip, &to(23)), DEFAULT);
        assert_eq!(path.egress(ip, &ip.udp((VM, 1), (peer, 23))), DEFAULT);
        assert_eq!(path.egress(ip, &ip.tcp((VM, 80), (peer, 4000), SYN_ACK)), PASS);

        let counts = path.tables.rule_counts.borrow().clone();
        assert_eq!(counts[&SLOT_FIRST], Count { packets: 4, bytes: 4 * bytes });
        assert_eq!(counts[&(SLOT_FIRST + 1)], Count { packets: 1, bytes });
        assert_eq!(path.packets(SLOT_DEFAULT_INGRESS), 1);
        assert_eq!(path.packets(SLOT_DEFAULT_EGRESS), 1);
        let drop = Count { packets: 1, bytes };
        assert_eq!(path.dropped(Reason::Denied, Direction::Ingress), drop);
        assert_eq!(path.dropped(Reason::DeniedByDefault, Direction::Ingress), drop);
        assert_eq!(path.dropped(Reason::DeniedByDefault, Direction::Egress).packets, 1);
        assert_eq!(path.tables.stat_counts.borrow().len(), 3, "nothing else was dropped");
    });
}

/// The only rule: everything is asked of it.
fn only(action: RuleAction) -> Path {
    let mut path = Path::closed();
    path.rules(|_, _| ALLOW);
    path.tables.rules = vec![action];
    path
}

fn action(verdict: u8, flags: u8) -> RuleAction {
    RuleAction { slot: SLOT_FIRST, verdict, flags, limit: 0 }
}

impl Path {
    fn told(&self) -> Vec<Record> {
        self.tables.records.take()
    }
}

#[test]
fn who_is_rejected_is_to_be_told() {
    each(|ip, peer| {
        let path = only(action(verdict::REJECT, 0));
        let syn = ip.tcp((peer, 4000), (VM, 80), SYN);
        assert_eq!(path.ingress(ip, &syn), Verdict::Drop(Reason::Denied));
        let told = path.told();
        let [record] = &told[..] else { panic!("{told:?}") };
        assert_eq!((record.why, record.outcome), (why::RULE | why::ANSWER, Reason::Denied as u8));
        assert_eq!((record.slot, record.proto, record.direction), (SLOT_FIRST, TCP, 0));
        // What the answer is made of.
        let header = if ip == Ip::V4 { 20 } else { 40 };
        assert_eq!(record.l3[..header], syn[..header]);
        assert_eq!(record.l4[..], syn[header..header + 16]);
        assert_eq!(record.length as usize, ip.ethernet(&syn).len());
        assert_eq!(path.packets(SLOT_FIRST), 1);
    });
}

#[test]
fn a_default_can_reject() {
    for ip in FAMILIES {
        let mut path = Path::outward();
        path.live.default_reject = [true, false];
        path.next_generation([false, true]);
        assert_eq!(path.ingress(ip, &ip.udp((PEERS[0], 9), (VM, 9))), DEFAULT);
        let told = path.told();
        assert_eq!((told.len(), told[0].why), (1, why::RULE | why::ANSWER));
        assert_eq!(told[0].slot, SLOT_DEFAULT_INGRESS);
    }
}

#[test]
fn the_log_has_the_first_packet_of_a_flow_and_every_drop() {
    each(|ip, peer| {
        let path = only(action(verdict::ALLOW, rule_flag::LOG));
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 4000), (VM, 80), SYN)), PASS);
        assert_eq!(path.egress(ip, &ip.tcp((VM, 80), (peer, 4000), SYN_ACK)), PASS);
        let told = path.told();
        assert_eq!((told.len(), told[0].why, told[0].outcome), (1, why::RULE | why::LOG, PASSED));

        assert_eq!(path.ingress(ip, &ip.tcp((peer, 4001), (VM, 80), ACK)), NO_FLOW);
        let told = path.told();
        assert_eq!((told.len(), told[0].why, told[0].outcome), (1, 0, Reason::NoFlow as u8));

        let silent = only(action(verdict::ALLOW, 0));
        assert_eq!(silent.ingress(ip, &ip.tcp((peer, 4000), (VM, 80), SYN)), PASS);
        assert_eq!(silent.told(), []);
    });
}

#[test]
fn a_packet_that_cannot_be_read_is_told_as_far_as_it_was() {
    let path = Path::outward();
    let mut bad = Ip::V4.udp((PEERS[0], 9), (VM, 9));
    bad[0] = 0x44;
    assert_eq!(path.ingress(Ip::V4, &bad), Verdict::Drop(Reason::Malformed));
    let told = path.told();
    assert_eq!((told.len(), told[0].outcome, told[0].l4), (1, Reason::Malformed as u8, [0; 16]));
    assert_eq!(told[0].l3[..20], bad[..20]);
}

#[test]
fn a_policy_on_trial_drops_nothing_and_tells() {
    each(|ip, peer| {
        let path = only(action(verdict::REJECT, rule_flag::AUDIT));
        let syn = ip.tcp((peer, 4000), (VM, 80), SYN);
        assert_eq!(path.ingress(ip, &syn), PASS);
        let told = path.told();
        assert_eq!((told.len(), told[0].why, told[0].outcome), (1, why::RULE | why::AUDIT, PASSED));
        assert_eq!((path.packets(SLOT_FIRST), path.flows()), (1, [0, 1]));

        let mut path = Path::outward();
        path.live.default_audit = [true, false];
        path.next_generation([false, false]);
        assert_eq!(path.ingress(ip, &syn), PASS);
        assert_eq!(path.egress(ip, &ip.udp((VM, 1), (peer, 2))), DEFAULT);
        let why: Vec<_> = path.told().iter().map(|record| record.why).collect();
        assert_eq!(why, [why::RULE | why::AUDIT, why::RULE]);
    });
}

const MILLISECOND: u64 = 1_000_000;

/// Ten flows a second, three at once.
fn limited(per_source: u8) -> Path {
    let mut path = only(RuleAction { limit: 1, ..action(verdict::ALLOW, 0) });
    let interval = 100 * MILLISECOND;
    let limit = Limit { interval, tolerance: 2 * interval, per_source, ..Limit::default() };
    path.tables.limits = vec![Limit::default(), limit];
    path.tables.nanoseconds.set(1 << 40);
    path
}

#[test]
fn a_limit_admits_its_rate_and_its_burst() {
    each(|ip, peer| {
        let path = limited(0);
        let mut port = 1_000;
        let mut admitted = |flows: u16| {
            let mut begin = || {
                port += 1;
                path.ingress(ip, &ip.tcp((peer, port), (VM, 80), SYN))
            };
            (0..flows).filter(|_| begin() == PASS).count()
        };
        let later = |ms: u64| {
            path.tables.nanoseconds.set(path.tables.nanoseconds.get() + ms * MILLISECOND);
        };
        assert_eq!(admitted(10), 3);
        assert_eq!(path.dropped(Reason::Limited, Direction::Ingress).packets, 7);
        later(99);
        assert_eq!(admitted(1), 0);
        later(1);
        assert_eq!(admitted(5), 1);
        later(200);
        assert_eq!(admitted(5), 2);
        later(10_000);
        assert_eq!(admitted(5), 3, "a pause earns the burst and no more");
    });
}

#[test]
fn a_limit_is_for_new_flows() {
    for ip in FAMILIES {
        let mut path = limited(0);
        let (client, server) = ((PEERS[0], 4000), (VM, 80));
        assert_eq!(path.ingress(ip, &ip.tcp(client, server, SYN)), PASS);
        assert_eq!(path.egress(ip, &ip.tcp(server, client, SYN_ACK)), PASS);
        for _ in 0..20 {
            assert_eq!(path.ingress(ip, &ip.tcp(client, server, ACK)), PASS);
        }
        // Nor does a change of the policy cost it anything.
        for _ in 0..20 {
            path.next_generation([false, false]);
            assert_eq!(path.ingress(ip, &ip.tcp(client, server, ACK)), PASS);
        }
    }
}

#[test]
fn each_source_has_its_own_limit_if_asked() {
    for ip in FAMILIES {
        let admitted = |path: &Path, peer: u8| {
            let begin = |port| path.ingress(ip, &ip.tcp((peer, port), (VM, 80), SYN));
            (1_000..1_010).filter(|port| begin(*port) == PASS).count()
        };
        let shared = limited(0);
        assert_eq!((admitted(&shared, PEERS[0]), admitted(&shared, PEERS[1])), (3, 0));
        let own = limited(1);
        // The hosts of a /64 of IPv6 are one source.
        let second = if ip == Ip::V4 { 3 } else { 0 };
        assert_eq!((admitted(&own, PEERS[0]), admitted(&own, PEERS[1])), (3, second));
    }
}

#[test]
fn a_bucket_that_another_rule_left_is_begun_anew() {
    let mut path = limited(0);
    let begin =
        |path: &Path, port| path.ingress(Ip::V4, &Ip::V4.tcp((PEERS[0], port), (VM, 80), SYN));
    path.tables.limits[1] = Limit { interval: 1 << 50, ..Limit::default() };
    assert_eq!(begin(&path, 1), PASS);
    assert_eq!(begin(&path, 2), Verdict::Drop(Reason::Limited));
    path.tables.limits[1] = Limit { interval: MILLISECOND, ..Limit::default() };
    assert_eq!(begin(&path, 3), PASS);
}

/// Two open flows of each source.
fn two_each() -> Path {
    let mut path = only(RuleAction { limit: 1, ..action(verdict::ALLOW, 0) });
    let limit = Limit { connections: 2, group: 77, ..Limit::default() };
    path.tables.limits = vec![Limit::default(), limit];
    path
}

impl Path {
    /// What the sources' open flows are counted to be, all together.
    fn open(&self) -> u64 {
        self.tables.open.borrow().values().sum()
    }

    /// The verdict on the packet that ends the handshake.
    fn accept(&self, ip: Ip, client: (u8, u16)) -> Verdict {
        let server = (VM, 80);
        let syn = self.ingress(ip, &ip.tcp(client, server, SYN));
        if syn != PASS {
            return syn;
        }
        assert_eq!(self.egress(ip, &ip.tcp(server, client, SYN_ACK)), PASS);
        self.ingress(ip, &ip.tcp(client, server, ACK))
    }
}

const TOO_MANY: Verdict = Verdict::Drop(Reason::Connections);

#[test]
fn a_source_has_no_more_open_flows_than_the_rule_allows() {
    each(|ip, peer| {
        let path = two_each();
        let (client, server) = (|port| (peer, port), (VM, 80));
        assert_eq!(path.accept(ip, client(1)), PASS);
        assert_eq!(path.accept(ip, client(2)), PASS);
        assert_eq!(path.accept(ip, client(3)), TOO_MANY);
        assert_eq!(path.open(), 2);
        assert_eq!(path.ingress(ip, &ip.tcp(client(1), server, ACK)), PASS, "the open ones go on");
        // Closed by one end it is open still.
        assert_eq!(path.ingress(ip, &ip.tcp(client(1), server, FIN)), PASS);
        assert_eq!(path.accept(ip, client(3)), TOO_MANY);
        assert_eq!(path.egress(ip, &ip.tcp(server, client(1), FIN)), PASS);
        assert_eq!(path.ingress(ip, &ip.tcp(client(1), server, ACK)), PASS);
        assert_eq!(path.open(), 1);
        assert_eq!(path.accept(ip, client(3)), PASS);
        assert_eq!(path.accept(ip, client(4)), TOO_MANY);
        assert_eq!(path.dropped(Reason::Connections, Direction::Ingress).packets, 3);
    });
}

#[test]
fn a_forged_source_takes_nothing_from_the_real_one() {
    each(|ip, peer| {
        let path = two_each();
        for port in 1..100 {
            assert_eq!(path.ingress(ip, &ip.tcp((peer, port), (VM, 80), SYN)), PASS);
        }
        assert_eq!(path.open(), 0);
        assert_eq!(path.accept(ip, (peer, 1_000)), PASS);
    });
}

#[test]
fn handshakes_at_the_same_time_do_not_get_past_the_number() {
    each(|ip, peer| {
        let path = two_each();
        let server = (VM, 80);
        for port in 1..5 {
            assert_eq!(path.ingress(ip, &ip.tcp((peer, port), server, SYN)), PASS);
            assert_eq!(path.egress(ip, &ip.tcp(server, (peer, port), SYN_ACK)), PASS);
        }
        let end = |port| path.ingress(ip, &ip.tcp((peer, port), server, ACK));
        assert_eq!([end(1), end(2), end(3), end(4)], [PASS, PASS, TOO_MANY, TOO_MANY]);
        assert_eq!(path.flows(), [2, 0], "what came too late is forgotten");
        assert_eq!(path.egress(ip, &ip.tcp(server, (peer, 3), ACK)), NO_FLOW);
    });
}

#[test]
fn flows_count_for_the_rule_that_admits_them_now() {
    each(|ip, peer| {
        let mut path = two_each();
        assert_eq!(path.accept(ip, (peer, 1)), PASS);
        let seen = |path: &Path| {
            let open = path.tables.open.borrow();
            open.iter().map(|(key, open)| (key.limit, *open)).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(seen(&path), [(77, 1)].into());
        path.tables.limits[1].group = 78;
        path.next_generation([false, false]);
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 1), (VM, 80), ACK)), PASS);
        assert_eq!(seen(&path), [(77, 0), (78, 1)].into());
        // Fewer than are open: those stay, others wait.
        path.tables.limits[1].connections = 1;
        path.next_generation([false, false]);
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 1), (VM, 80), ACK)), PASS);
        assert_eq!(path.accept(ip, (peer, 2)), TOO_MANY);
        // Without the limit none counts.
        path.tables.limits[1] = Limit::default();
        path.next_generation([false, false]);
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 1), (VM, 80), ACK)), PASS);
        assert_eq!(path.open(), 0);
    });
}

#[test]
fn a_flow_that_is_revoked_or_over_does_not_count() {
    each(|ip, peer| {
        let mut path = two_each();
        assert_eq!(path.accept(ip, (peer, 1)), PASS);
        assert_eq!(path.accept(ip, (peer, 2)), PASS);
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 1), (VM, 80), RST)), PASS);
        assert_eq!(path.open(), 2, "a RST may be forged");
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 1), (VM, 80), SYN)), PASS);
        assert_eq!(path.open(), 1, "its own place was free when it began anew");
        path.rules(|_, _| NO_RULE);
        path.next_generation([false, false]);
        assert_eq!(path.ingress(ip, &ip.tcp((peer, 2), (VM, 80), ACK)), REVOKED);
        assert_eq!(path.open(), 0);
    });
}

#[test]
fn orphans_pass_where_the_policy_says_so() {
    for ip in FAMILIES {
        let mut path = Path::closed();
        let later = ip.fragment((PEERS[0], VM), UDP, (185, false), &[0; 64]);
        assert_eq!(path.ingress(ip, &later), ORPHAN);
        path.tables.control.switches |= switch::ORPHANS_PASS;
        assert_eq!(path.ingress(ip, &later), PASS);
        let passed = path.tables.stat_counts.borrow()[&STAT_ORPHANS_PASSED];
        assert_eq!(passed.packets, 1);
    }
}

/// A packet that a process of this VM has marked.
struct Marked<'a>(&'a [u8]);

impl Packet for Marked<'_> {
    const ROLE: Role = Role::Whole;
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.load(at)
    }
    fn length(&self) -> usize {
        self.0.len()
    }
    fn ifindex(&self) -> u32 {
        0
    }
    fn mark(&self) -> u32 {
        ANSWER_MARK
    }
}

#[test]
fn the_agents_answers_leave_without_a_flow() {
    each(|ip, peer| {
        let path = Path::closed();
        let rst = ip.ethernet(&ip.tcp((VM, 80), (peer, 4000), RST | ACK));
        assert_eq!(run::<_, _, ETHERNET, true>(&rst[..], &path.tables), NO_FLOW);
        assert_eq!(run::<_, _, ETHERNET, true>(&Marked(&rst), &path.tables), PASS);
        let error = ip.ethernet(&ip.error(VM, peer, &ip.udp((peer, 9), (VM, 9))));
        assert_eq!(run::<_, _, ETHERNET, true>(&error[..], &path.tables), UNRELATED);
        assert_eq!(run::<_, _, ETHERNET, true>(&Marked(&error), &path.tables), PASS);
        // Nobody else's packets come in for it.
        assert_eq!(run::<_, _, ETHERNET, false>(&Marked(&rst), &path.tables), NO_FLOW);
        assert_eq!(path.flows(), [0, 0]);
    });
}

#[test]
fn a_damaged_policy_lets_nothing_begin() {
    for ip in FAMILIES {
        let mut path = Path::with_defaults([true, true]);
        path.tables.set_rules(vec![], Box::new(|_, _| None), Box::new(|_, _| None));
        let syn = ip.tcp((PEERS[0], 4000), (VM, 80), SYN);
        assert_eq!(path.ingress(ip, &syn), Verdict::Drop(Reason::Classifier));
        // An index that has no action.
        path.tables.set_rules(vec![], Box::new(|_, _| Some(5)), Box::new(|_, _| Some(5)));
        assert_eq!(path.ingress(ip, &syn), Verdict::Drop(Reason::Classifier));
        assert_eq!(path.flows(), [0, 0]);
    }
}

#[test]
fn tunnel_and_network_card_know_each_others_flows_not() {
    each(|ip, peer| {
        let path = Path::outward();
        connect(&path, ip, peer);
        let received = ip.tcp((peer, 80), (VM, 4000), ACK);
        let tunnel = |packet: &[u8]| run::<_, _, TUNNEL, false>(packet, &path.tables);
        assert_eq!(tunnel(&received), NO_FLOW);
        let first = ip.fragment((VM, peer), UDP, (0, true), &frames::udp(5353, 53));
        let rest = ip.fragment((VM, peer), UDP, (2, false), &[0; 8]);
        assert_eq!(path.egress(ip, &first), PASS);
        let whole = ip.udp((VM, 5353), (peer, 53));
        assert_eq!(run::<_, _, TUNNEL, true>(&whole[..], &path.tables), PASS);
        assert_eq!(run::<_, _, TUNNEL, true>(&rest[..], &path.tables), ORPHAN);
        assert_eq!(path.egress(ip, &rest), PASS);
    });
}

#[test]
fn what_is_not_ip_is_up_to_the_defaults() {
    let lldp = ethernet(0x88cc, &[], &[0; 46]);
    let arp = ethernet(0x0806, &[], &[0; 46]);
    let not_ip = Verdict::Drop(Reason::NotIp);
    for allow in [[false, false], [false, true], [true, false], [true, true]] {
        let path = Path::with_defaults(allow);
        let verdict = |allow| if allow { PASS } else { not_ip };
        assert_eq!(run::<_, _, ETHERNET, false>(&lldp[..], &path.tables), verdict(allow[0]));
        assert_eq!(run::<_, _, ETHERNET, true>(&lldp[..], &path.tables), verdict(allow[1]));
        assert_eq!(run::<_, _, TUNNEL, false>(&[0; 20][..], &path.tables), verdict(allow[0]));
        assert_eq!(path.packets(SLOT_DEFAULT_INGRESS), 2 * u64::from(allow[0]));
        assert_eq!(path.packets(SLOT_DEFAULT_EGRESS), u64::from(allow[1]));
        assert_eq!(run::<_, _, ETHERNET, false>(&arp[..], &path.tables), PASS);
        assert_eq!(run::<_, _, ETHERNET, true>(&arp[..], &path.tables), PASS);
    }
}

/// The offset of the error is masked for the verifier: what lies at the masked one must not be taken for it.
#[test]
fn an_error_behind_headers_too_long_to_follow_is_unrelated() {
    let path = Path::outward();
    let ip = Ip::V6;
    connect(&path, ip, PEERS[0]);
    let known = ip.tcp((VM, 4000), (PEERS[0], 80), ACK);
    let mut payload = Vec::new();
    for next in [60, 60, ICMPV6] {
        payload.extend([next, 255]);
        payload.extend(vec![0; 2046]);
    }
    let in_frame = ETHERNET + 40 + payload.len();
    payload.extend(icmp(ip.unreachable(), 0, &ip.tcp((VM, 4001), (PEERS[0], 80), ACK)));
    let masked = (in_frame & 0xfff) + 8 - ETHERNET - 40;
    payload[masked..masked + known.len()].copy_from_slice(&known);
    let packet = ipv6(PEERS[0], VM, 60, 64, &payload);
    assert_eq!(path.ingress(ip, &packet), UNRELATED);
}

/// Judged by all four hooks.
fn everywhere(path: &Path, frame: &[u8]) -> [Verdict; 4] {
    [
        run::<_, _, ETHERNET, false>(frame, &path.tables),
        run::<_, _, ETHERNET, true>(frame, &path.tables),
        run::<_, _, TUNNEL, false>(frame, &path.tables),
        run::<_, _, TUNNEL, true>(frame, &path.tables),
    ]
}

#[test]
fn a_frame_cut_anywhere_is_dropped() {
    let path = Path::with_defaults([true, true]);
    for ip in FAMILIES {
        for packet in every_kind(ip) {
            for end in 0..packet.len() {
                let malformed = Verdict::Drop(Reason::Malformed);
                assert_eq!(path.ingress(ip, &packet[..end]), malformed);
                assert_eq!(everywhere(&path, &packet[..end])[2..], [malformed; 2]);
            }
        }
    }
    assert_eq!(path.flows(), [0, 0]);
}

/// One packet of a random sequence.
#[derive(Clone, Copy, Debug)]
struct Step {
    ip: Ip,
    /// From the VM.
    outgoing: bool,
    peer: u8,
    ports: (u16, u16),
    what: What,
    wait: u64,
    new_policy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Tcp(u8),
    Udp,
    EchoRequest,
    EchoReply,
}

impl Step {
    fn packet(self) -> Vec<u8> {
        let (here, there) = ((VM, self.ports.0), (self.peer, self.ports.1));
        let (src, dst) = if self.outgoing { (here, there) } else { (there, here) };
        match self.what {
            What::Tcp(flags) => self.ip.tcp(src, dst, flags),
            What::Udp => self.ip.udp(src, dst),
            What::EchoRequest => self.ip.echo_request(src.0, dst.0, self.ports.0),
            What::EchoReply => self.ip.echo_reply(src.0, dst.0, self.ports.0),
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let what = prop_oneof![
        4 => prop::sample::select(&[SYN, SYN_ACK, ACK, FIN, RST, RST | ACK][..]).prop_map(What::Tcp),
        1 => Just(What::Udp),
        1 => Just(What::EchoRequest),
        1 => Just(What::EchoReply),
    ];
    let step = (
        prop::sample::select(&FAMILIES[..]),
        any::<bool>(),
        prop::sample::select(&PEERS[..]),
        (1_u16..3, 1_u16..3),
        what,
        prop::sample::select(&[0, 0, 0, 1, 400, 1_001][..]),
        prop::bool::weighted(0.1),
    );
    let step = step.prop_map(|(ip, outgoing, peer, ports, what, wait, new_policy)| Step {
        ip,
        outgoing,
        peer,
        ports,
        what,
        wait,
        new_policy,
    });
    prop::collection::vec(step, 0..60)
}

fn key_of<A: Family>(src: A, dst: A, ports: (u16, u16), kind: Kind) -> (FlowKey<A>, bool) {
    let mut case = empty_case();
    let ports = (ports.0.to_be_bytes(), ports.1.to_be_bytes());
    set_key(&mut case, kind, TCP, (src, dst), ports);
    (case.key, case.from_high)
}

fn both_ways<A: Family>(a: (A, u16), b: (A, u16)) {
    let (there, from_high) = key_of(a.0, b.0, (a.1, b.1), Kind::Tcp);
    let (back, back_from_high) = key_of(b.0, a.0, (b.1, a.1), Kind::Tcp);
    assert_eq!(there, back);
    assert_eq!(from_high != back_from_high, a != b, "only equal ends cannot be told apart");
    let high = (there.high, u16::from_be_bytes(there.high_port));
    assert_eq!(if from_high { a } else { b }, high, "the sender is where the key says");
    assert!(!there.low.is_above(there.high));

    let (request, asks) = key_of(a.0, b.0, (a.1, 0), Kind::EchoRequest);
    let (reply, answers) = key_of(b.0, a.0, (a.1, 0), Kind::EchoReply);
    assert_eq!((request, asks, answers), (reply, false, true));
    let (other, _) = key_of(b.0, a.0, (a.1, 0), Kind::EchoRequest);
    assert_eq!(other == request, a.0 == b.0);
}

proptest! {
    #[test]
    fn both_directions_have_one_key(
        a: ([u8; 4], u16),
        b: ([u8; 4], u16),
        c: ([u8; 16], u16),
        d: ([u8; 16], u16),
    ) {
        both_ways(a, b);
        both_ways((a.0, a.1), (a.0, b.1));
        both_ways(a, a);
        both_ways(c, d);
        both_ways((c.0, c.1), (c.0, d.1));
        both_ways(c, c);
    }

    /// The promise of a firewall, whatever the order of packets: what the VM did not begin does not come in.
    #[test]
    fn nothing_comes_in_that_the_vm_did_not_ask_for(steps in steps()) {
        let mut path = Path::outward();
        let mut asked = Vec::new();
        for step in steps {
            path.later(step.wait);
            if step.new_policy {
                path.next_generation([false, true]);
            }
            let packet = step.packet();
            if step.outgoing {
                if path.egress(step.ip, &packet) == PASS {
                    asked.push(step);
                }
            } else if path.ingress(step.ip, &packet) == PASS {
                let answers = |sent: &Step| {
                    let what = match (sent.what, step.what) {
                        (What::Tcp(_), What::Tcp(_)) | (What::Udp, What::Udp) => {
                            sent.ports == step.ports
                        }
                        (What::EchoRequest, What::EchoReply) => sent.ports.0 == step.ports.0,
                        _ => false,
                    };
                    what && (sent.ip, sent.peer) == (step.ip, step.peer)
                };
                prop_assert!(asked.iter().any(answers), "{step:?} was not asked for");
            }
        }
    }

    /// A flow is in one table.
    #[test]
    fn no_flow_is_in_both_tables(steps in steps()) {
        let path = Path::with_defaults([true, true]);
        for step in steps {
            path.later(step.wait);
            let packet = step.packet();
            let _ = if step.outgoing {
                path.egress(step.ip, &packet)
            } else {
                path.ingress(step.ip, &packet)
            };
            let [established, half_open] = path.tables.flows_v4();
            prop_assert!(half_open.keys().all(|key| !established.contains_key(key)));
            let [established, half_open] = path.tables.flows_v6();
            prop_assert!(half_open.keys().all(|key| !established.contains_key(key)));
        }
    }

    #[test]
    fn arbitrary_bytes_are_judged(frame in prop::collection::vec(any::<u8>(), 0..200)) {
        let path = Path::with_defaults([true, true]);
        everywhere(&path, &frame);
        for ip in FAMILIES {
            everywhere(&path, &ip.ethernet(&frame));
        }
    }

    #[test]
    fn damaged_packets_are_judged(
        ip in prop::sample::select(&FAMILIES[..]),
        kind in 0_usize..11,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        surplus in 0_usize..20,
    ) {
        let mut packet = every_kind(ip).swap_remove(kind);
        packet.extend(vec![0; surplus]);
        for (at, byte) in damage {
            *at.get_mut(&mut packet) = byte;
        }
        let path = Path::with_defaults([true, true]);
        for _ in 0..2 {
            everywhere(&path, &packet);
            everywhere(&path, &ip.ethernet(&packet));
        }
    }
}
