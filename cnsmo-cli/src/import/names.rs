//! Names of numbers as nft and iptables print them.

use cnsmo_proto::{manifest, model::protocol};

/// IANA protocol numbers by the names of /etc/protocols.
pub(super) const PROTOCOLS: [(&str, u8); 17] = [
    ("icmp", 1),
    ("igmp", 2),
    ("ipencap", 4),
    ("tcp", 6),
    ("udp", 17),
    ("dccp", 33),
    ("ipv6", 41),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", 58),
    ("icmpv6", 58),
    ("ospf", 89),
    ("pim", 103),
    ("vrrp", 112),
    ("sctp", 132),
    ("udplite", 136),
];

/// ICMP types of nft that a manifest has no name for.
const ICMP: [(&str, u8); 5] = [
    ("source-quench", 4),
    ("info-request", 15),
    ("info-reply", 16),
    ("address-mask-request", 17),
    ("address-mask-reply", 18),
];

/// ICMPv6 types of nft that a manifest has no name for, or another one.
const ICMPV6: [(&str, u8); 13] = [
    ("mld-listener-query", 130),
    ("mld-listener-report", 131),
    ("mld-listener-done", 132),
    ("mld-listener-reduction", 132),
    ("nd-router-solicit", 133),
    ("nd-router-advert", 134),
    ("nd-neighbor-solicit", 135),
    ("nd-neighbor-advert", 136),
    ("nd-redirect", 137),
    ("router-renumbering", 138),
    ("ind-neighbor-solicit", 141),
    ("ind-neighbor-advert", 142),
    ("mld2-listener-report", 143),
];

/// ICMP codes of nft.
pub(super) const ICMP_CODES: [(&str, u8); 8] = [
    ("net-unreachable", 0),
    ("host-unreachable", 1),
    ("prot-unreachable", 2),
    ("port-unreachable", 3),
    ("frag-needed", 4),
    ("net-prohibited", 9),
    ("host-prohibited", 10),
    ("admin-prohibited", 13),
];

/// ICMPv6 codes of nft.
pub(super) const ICMPV6_CODES: [(&str, u8); 6] = [
    ("no-route", 0),
    ("admin-prohibited", 1),
    ("addr-unreachable", 3),
    ("port-unreachable", 4),
    ("policy-fail", 5),
    ("reject-route", 6),
];

/// States of connection tracking, in lower case.
pub(super) const STATES: [(&str, u8); 5] =
    [("new", 0), ("established", 1), ("related", 2), ("invalid", 3), ("untracked", 4)];

/// Of an ICMP type, as nft calls it.
pub(super) fn icmp_type(v6: bool, name: &str) -> Option<u8> {
    let (of_nft, number): (&[_], _) =
        if v6 { (&ICMPV6, protocol::ICMPV6) } else { (&ICMP, protocol::ICMP) };
    number_of(of_nft, name).or_else(|| number_of(manifest::icmp_types(number.into()), name))
}

pub(super) fn number_of(names: &[(&str, u8)], name: &str) -> Option<u8> {
    names.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}
