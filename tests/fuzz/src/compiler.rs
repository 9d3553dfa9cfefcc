//! The compiler of policies against the linear matcher: any rules, any headers.

use arbitrary::{Result, Unstructured};
use cnsmo_agent::{
    compile::{
        Limits, Refused, compile,
        reference::first_match,
        sample::{effective, rule},
        trace::{Header, headers},
    },
    effective::Effective,
};
use cnsmo_common::blob::NO_RULE;
use cnsmo_proto::model::{Direction, IcmpMatch, PortRange, Protocol, Rule, protocol};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// As an agent has by default.
const LIMITS: Limits = Limits { blob_words: 1 << 17, rules: 4_096 };
const RULES_MAX: usize = 64;
/// Beside those that the input names.
const HEADERS: usize = 300;
const PORTS: [u16; 8] = [0, 1, 22, 80, 443, 1_024, 65_534, 65_535];

/// Rules first; what is left of the bytes are headers.
pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let Ok(rules) = rules(&mut input) else { return };
    let policy = effective(rules);
    let compiled = match compile(&policy, &LIMITS) {
        Ok(compiled) => compiled,
        Err(Refused::Policies(_)) => return,
        Err(built_in @ Refused::BuiltIn(_)) => panic!("no rule is built in: {built_in}"),
    };
    let mut all = headers(&policy, HEADERS, 7);
    while !input.is_empty()
        && let Ok(header) = header(&mut input)
    {
        all.push(header);
    }
    for header in all {
        let expected = Some(first_match(&policy, &header).unwrap_or(NO_RULE));
        assert_eq!(compiled.classify(&header), expected, "{header:?} by {}", told(&policy));
    }
}

fn told(policy: &Effective) -> String {
    policy.rules.iter().map(|owned| format!("\n{:?}", owned.rule)).collect()
}

fn rules(input: &mut Unstructured<'_>) -> Result<Vec<Rule>> {
    let count = input.int_in_range(0..=RULES_MAX)?;
    (0..count).map(|n| one_rule(input, n)).collect()
}

fn one_rule(input: &mut Unstructured<'_>, n: usize) -> Result<Rule> {
    let shape: u8 = input.arbitrary()?;
    let direction = if shape & 1 == 0 { Direction::Ingress } else { Direction::Egress };
    let nets = |input: &mut Unstructured<'_>, count: u8| (0..count).map(|_| net(input)).collect();
    let from: Result<Vec<_>> = nets(input, shape >> 1 & 3);
    let to: Result<Vec<_>> = nets(input, shape >> 3 & 3);
    let ranges = |input: &mut Unstructured<'_>| -> Result<Vec<PortRange>> {
        (0..input.int_in_range(0..=2)?).map(|_| range(input)).collect()
    };
    let number = if shape >> 7 == 0 { protocol::TCP } else { protocol::UDP };
    let protocol = match shape >> 5 & 3 {
        0 => Protocol::Any,
        1 => Protocol::Other(*input.choose(&[0, 47, 132, 255])?),
        2 => Protocol::Ports { number, source: ranges(input)?, destination: ranges(input)? },
        _ => {
            let number = *input.choose(&[protocol::ICMP, protocol::ICMPV6])?;
            let types = (0..input.int_in_range(0..=2)?).map(|_| icmp(input));
            Protocol::Icmp { number, types: types.collect::<Result<_>>()? }
        }
    };
    Ok(Rule { from: from?, to: to?, protocol, ..rule(n, direction) })
}

/// Few distinct bits, so that networks nest and overlap.
fn net(input: &mut Unstructured<'_>) -> Result<IpNet> {
    if input.ratio(1, 3)? {
        let length = input.int_in_range(0..=128)?;
        Ok(Ipv6Net::new_assert(v6(input)?.into(), length).trunc().into())
    } else {
        let length = input.int_in_range(0..=32)?;
        Ok(Ipv4Net::new_assert(v4(input)?.into(), length).trunc().into())
    }
}

fn v4(input: &mut Unstructured<'_>) -> Result<u32> {
    let [bits, last]: [u8; 2] = input.arbitrary()?;
    Ok(u32::from(bits & 3) << 30 | u32::from(bits >> 2 & 3) << 16 | u32::from(last))
}

fn v6(input: &mut Unstructured<'_>) -> Result<u128> {
    let [bits, last]: [u8; 2] = input.arbitrary()?;
    Ok(0x2001 << 112 | u128::from(bits & 15) << 62 | u128::from(last))
}

fn range(input: &mut Unstructured<'_>) -> Result<PortRange> {
    let [a, b] = [port(input)?, port(input)?];
    PortRange::new(a.min(b), a.max(b)).map_err(|_| arbitrary::Error::IncorrectFormat)
}

fn port(input: &mut Unstructured<'_>) -> Result<u16> {
    if input.ratio(1, 2)? { Ok(*input.choose(&PORTS)?) } else { input.arbitrary() }
}

fn icmp(input: &mut Unstructured<'_>) -> Result<IcmpMatch> {
    let code = if input.arbitrary()? { Some(input.arbitrary()?) } else { None };
    Ok(IcmpMatch { kind: *input.choose(&[0, 3, 8, 128, 255])?, code })
}

fn header(input: &mut Unstructured<'_>) -> Result<Header> {
    let (src, dst) = if input.arbitrary()? {
        (std::net::IpAddr::V6(v6(input)?.into()), std::net::IpAddr::V6(v6(input)?.into()))
    } else {
        (std::net::IpAddr::V4(v4(input)?.into()), std::net::IpAddr::V4(v4(input)?.into()))
    };
    let direction = if input.arbitrary()? { Direction::Ingress } else { Direction::Egress };
    let proto = *input.choose(&[0, 1, 6, 17, 47, 58, 132, 255])?;
    Ok(Header { src, dst, sport: port(input)?, dport: port(input)?, proto, direction })
}
