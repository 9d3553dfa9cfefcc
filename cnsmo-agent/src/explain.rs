//! What would happen to a packet on this VM: the question, the packet made of it, and the answer.

use std::net::{IpAddr, SocketAddr};

use cnsmo_proto::{
    model::{Direction, Name, protocol},
    pb::{
        flow::{Judgement, PacketQuery, Translated},
        policy,
    },
};

/// A packet at a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// Towards the VM or away from it.
    pub direction: Direction,
    /// At the tunnel device, not at a network card.
    pub overlay: bool,
    /// Source; without a port where the protocol has none.
    pub src: SocketAddr,
    /// Destination, of the same family.
    pub dst: SocketAddr,
    /// IANA number.
    pub protocol: u8,
}

/// What the programs say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// No hook is there.
    pub unguarded: bool,
    /// Why it would be dropped (a stable word); `None`: it would pass.
    pub dropped: Option<&'static str>,
    /// Its sender would be told.
    pub rejected: bool,
    /// It passes because the policy is on trial.
    pub audited: bool,
    /// What decides.
    pub by: Decider,
    /// State of the flow that it belongs to.
    pub flow: Option<&'static str>,
    /// Source and destination afterwards.
    pub translated: Option<[SocketAddr; 2]>,
    /// The balancer that a new flow goes by.
    pub balancer: Option<Name>,
}

/// What decides about a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Decider {
    /// Neither rule nor default: what the packet is.
    #[default]
    Nothing,
    /// A rule; without a policy one that is built in.
    Rule(Option<Name>, Name),
    /// No rule matches.
    Default,
}

impl Decider {
    /// Policy, rule, and whether neither but the default decides.
    pub fn in_words(self) -> (String, String, bool) {
        match self {
            Self::Nothing => Default::default(),
            Self::Default => (String::new(), String::new(), true),
            Self::Rule(policy, rule) => {
                (policy.map_or_else(String::new, |name| name.to_string()), rule.to_string(), false)
            }
        }
    }
}

/// Source and destination of a packet that is rewritten.
pub(crate) fn translated([src, dst]: [SocketAddr; 2]) -> Translated {
    Translated {
        source: src.ip().to_string(),
        destination: dst.ip().to_string(),
        source_port: src.port().into(),
        destination_port: dst.port().into(),
    }
}

/// The query cannot be answered.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Unclear {
    field: &'static str,
    reason: String,
}

impl TryFrom<&PacketQuery> for Question {
    type Error = Unclear;

    fn try_from(query: &PacketQuery) -> Result<Self, Unclear> {
        let unclear = |field, reason: String| Unclear { field, reason };
        let direction = match query.direction() {
            policy::Direction::Ingress => Direction::Ingress,
            policy::Direction::Egress => Direction::Egress,
            policy::Direction::Unspecified => {
                return Err(unclear("direction", "missing: ingress or egress".into()));
            }
        };
        let end = |address: &str, port: u32, fields: [&'static str; 2]| {
            let ip: IpAddr = address
                .parse()
                .map_err(|_| unclear(fields[0], format!("`{address}` is not an IP address")))?;
            let port = u16::try_from(port)
                .map_err(|_| unclear(fields[1], format!("{port} is not a port: 0 to 65535")))?;
            Ok(SocketAddr::new(ip, port))
        };
        let src = end(&query.source, query.source_port, ["source", "source_port"])?;
        let dst =
            end(&query.destination, query.destination_port, ["destination", "destination_port"])?;
        if src.is_ipv4() != dst.is_ipv4() {
            return Err(unclear("destination", "of another address family than the source".into()));
        }
        let protocol = u8::try_from(query.protocol)
            .map_err(|_| unclear("protocol", format!("{} is above 255", query.protocol)))?;
        Ok(Self { direction, overlay: query.overlay, src, dst, protocol })
    }
}

impl From<Answer> for Judgement {
    fn from(answer: Answer) -> Self {
        let (policy, rule, by_default) = answer.by.in_words();
        Self {
            unguarded: answer.unguarded,
            drop_reason: answer.dropped.unwrap_or_default().to_owned(),
            rejected: answer.rejected,
            audited: answer.audited,
            policy,
            rule,
            by_default,
            flow_state: answer.flow.unwrap_or_default().to_owned(),
            translated: answer.translated.map(translated),
            load_balancer: answer.balancer.map_or_else(String::new, |name| name.to_string()),
        }
    }
}

impl Question {
    /// The packet that asks it, as its hook has it: of TCP a SYN, of ICMP an echo request.
    pub fn packet(&self) -> Vec<u8> {
        let body = self.body();
        let mut packet = if self.overlay { Vec::new() } else { self.ethernet() };
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let [high, low] = (20 + body.len() as u16).to_be_bytes();
                packet.extend([0x45, 0, high, low, 0, 0, 0x40, 0, HOPS, self.protocol, 0, 0]);
                packet.extend(src.octets());
                packet.extend(dst.octets());
            }
            (src, dst) => {
                let [high, low] = (body.len() as u16).to_be_bytes();
                packet.extend([0x60, 0, 0, 0, high, low, self.protocol, HOPS]);
                for address in [src, dst] {
                    let v6 = match address {
                        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                        IpAddr::V6(v6) => v6,
                    };
                    packet.extend(v6.octets());
                }
            }
        }
        packet.extend(body);
        packet
    }

    fn ethernet(&self) -> Vec<u8> {
        let kind: [u8; 2] = if self.src.is_ipv4() { [8, 0] } else { [0x86, 0xdd] };
        // Locally administered, and of nobody: the programs do not look at them.
        [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]].concat().into_iter().chain(kind).collect()
    }

    fn body(&self) -> Vec<u8> {
        const SYN: u8 = 2;
        let ports = [self.src.port().to_be_bytes(), self.dst.port().to_be_bytes()].concat();
        let mut body = match self.protocol {
            protocol::TCP => {
                [ports, vec![0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0]].concat()
            }
            protocol::UDP => [ports, vec![0, 8, 0, 0]].concat(),
            protocol::SCTP => [ports, vec![0; 8]].concat(),
            protocol::ICMP if self.src.is_ipv4() => vec![8, 0, 0, 0, 0, 1, 0, 1],
            protocol::ICMPV6 if !self.src.is_ipv4() => vec![128, 0, 0, 0, 0, 1, 0, 1],
            _ => Vec::new(),
        };
        // The shortest frame there is.
        body.resize(body.len().max(26), 0);
        if self.protocol == protocol::UDP {
            let [high, low] = (body.len() as u16).to_be_bytes();
            (body[4], body[5]) = (high, low);
        }
        body
    }
}

const HOPS: u8 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn query() -> PacketQuery {
        PacketQuery {
            direction: policy::Direction::Ingress.into(),
            overlay: false,
            source: "192.0.2.1".into(),
            destination: "192.0.2.2".into(),
            protocol: 6,
            source_port: 61_000,
            destination_port: 443,
        }
    }

    #[test]
    fn a_query_that_is_not_one_packet_is_refused_with_the_field() {
        type Break = fn(&mut PacketQuery);
        let cases: [(&str, Break); 6] = [
            ("direction", |q| q.direction = 0),
            ("source", |q| q.source = "vm1".into()),
            ("destination", |q| q.destination = "2001:db8::1".into()),
            ("protocol", |q| q.protocol = 256),
            ("source_port", |q| q.source_port = 65_536),
            ("destination_port", |q| q.destination_port = 65_536),
        ];
        for (field, break_it) in cases {
            let mut bad = query();
            break_it(&mut bad);
            assert_eq!(Question::try_from(&bad).unwrap_err().field, field);
        }
    }

    #[test]
    fn packets_are_those_that_the_parser_reads() {
        use cnsmo_ebpf::parse::{Carried, Datagram, Family as _, Kind, frame};
        for (source, destination, icmp) in
            [("192.0.2.1", "192.0.2.2", 1), ("2001:db8::1", "2001:db8::2", 58)]
        {
            for (protocol, kind) in [
                (6, Kind::Tcp),
                (17, Kind::Datagram),
                (132, Kind::Datagram),
                (icmp, Kind::EchoRequest),
            ] {
                let (source, destination) = (source.into(), destination.into());
                let query = PacketQuery { source, destination, protocol, ..query() };
                let packet = Question::try_from(&query).unwrap().packet();
                let ports = match frame::<[u8], 14>(&packet) {
                    Ok(Carried::V4(at)) => {
                        let mut into = Datagram::default();
                        <[u8; 4]>::parse(&packet[..], at, &mut into).unwrap();
                        assert_eq!(into.kind, kind);
                        (into.sport, into.dport)
                    }
                    Ok(Carried::V6(at)) => {
                        let mut into = Datagram::default();
                        <[u8; 16]>::parse(&packet[..], at, &mut into).unwrap();
                        assert_eq!(into.kind, kind);
                        (into.sport, into.dport)
                    }
                    Ok(Carried::Arp | Carried::NotIp) | Err(_) => panic!("it is not read as IP"),
                };
                if protocol != icmp {
                    assert_eq!(ports, (61_000_u16.to_be_bytes(), 443_u16.to_be_bytes()));
                }
            }
        }
    }
}
