//! Names of protocols and ICMP types as IANA registers them (registries protocol-numbers, icmp-parameters,
//! icmpv6-parameters), in lower case with '-'.

use crate::model::protocol;

/// Protocols with a name here; others are written as numbers.
pub(super) const PROTOCOLS: [(&str, u8); 5] = [
    ("tcp", protocol::TCP),
    ("udp", protocol::UDP),
    ("sctp", protocol::SCTP),
    ("icmp", protocol::ICMP),
    ("icmpv6", protocol::ICMPV6),
];

const ICMP: [(&str, u8); 12] = [
    ("echo-reply", 0),
    ("destination-unreachable", 3),
    ("redirect", 5),
    ("echo-request", 8),
    ("router-advertisement", 9),
    ("router-solicitation", 10),
    ("time-exceeded", 11),
    ("parameter-problem", 12),
    ("timestamp-request", 13),
    ("timestamp-reply", 14),
    ("extended-echo-request", 42),
    ("extended-echo-reply", 43),
];

const ICMPV6: [(&str, u8); 17] = [
    ("destination-unreachable", 1),
    ("packet-too-big", 2),
    ("time-exceeded", 3),
    ("parameter-problem", 4),
    ("echo-request", 128),
    ("echo-reply", 129),
    ("multicast-listener-query", 130),
    ("multicast-listener-report", 131),
    ("multicast-listener-done", 132),
    ("router-solicitation", 133),
    ("router-advertisement", 134),
    ("neighbor-solicitation", 135),
    ("neighbor-advertisement", 136),
    ("redirect", 137),
    ("multicast-listener-report-v2", 143),
    ("extended-echo-request", 160),
    ("extended-echo-reply", 161),
];

/// The types of a protocol; none where it is not ICMP.
pub fn types(protocol: u32) -> &'static [(&'static str, u8)] {
    match u8::try_from(protocol) {
        Ok(protocol::ICMP) => &ICMP,
        Ok(protocol::ICMPV6) => &ICMPV6,
        _ => &[],
    }
}
