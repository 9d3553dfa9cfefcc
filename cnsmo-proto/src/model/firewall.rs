use std::{collections::BTreeSet, fmt};

use ipnet::IpNet;

use super::{Invalid, Labels, Name, error::shorten};
use crate::pb::policy as pb;

/// Rules in one policy. Bounds the message (about 10 MB) and the time to compile.
pub const RULES_MAX: usize = 131_072;
/// CIDRs in one `from` or `to`, port ranges in one rule: their product is what the data path holds.
pub const PEERS_MAX: usize = 4_096;
/// CIDRs that all peers of one policy are resolved to: as many as rules, which are larger.
pub const RESOLVED_MAX: usize = RULES_MAX;
/// Port ranges or ICMP types in one list.
pub const RANGES_MAX: usize = 256;
/// Flows in a [`RateLimit`], and its burst.
pub const LIMIT_FLOWS_MAX: u32 = 1_000_000;
/// Seconds of a [`RateLimit`]'s period: a second, a minute, an hour, a day.
pub const LIMIT_PERIODS: [u32; 4] = [1, 60, 3_600, 86_400];
/// Flows of one source that a rule can allow to be open.
pub const CONNECTIONS_MAX: u32 = 1_000_000;
/// Seconds in the longest of [`FlowTimeouts`].
pub const TIMEOUT_SECONDS_MAX: u32 = 7 * 24 * 3_600;
/// Highest priority number, the last to be asked.
pub const PRIORITY_MAX: u32 = 1_000_000;

/// IANA protocol numbers that rules treat specially.
pub mod protocol {
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// What a rule or a default decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// The flow may pass, and so may its answers.
    Allow,
    /// The packet is dropped without an answer.
    Deny,
    /// The packet is dropped, and its sender is told.
    Reject,
}

/// What becomes of the refusals of a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PolicyMode {
    /// What it refuses is dropped.
    #[default]
    Enforce,
    /// What it refuses passes; it is counted and recorded.
    Audit,
}

/// New flows that a rule allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// In each period.
    pub flows: u32,
    /// Length of the period, one of [`LIMIT_PERIODS`].
    pub period_seconds: u32,
    /// Flows that may come at once after a pause.
    pub burst: u32,
    /// Each source has that much, an IPv6 source by its first 64 bits; else all sources together.
    pub per_source: bool,
}

/// After how many seconds without a packet a flow is over. `None`: not stated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowTimeouts {
    /// A TCP handshake that is not complete.
    pub tcp_opening: Option<u32>,
    /// A TCP connection.
    pub tcp_established: Option<u32>,
    /// A TCP connection that one end has closed.
    pub tcp_closing: Option<u32>,
    /// A flow of another protocol, with packets from one end only.
    pub unreplied: Option<u32>,
    /// As `unreplied`, with packets from both ends.
    pub replied: Option<u32>,
    /// An ICMP echo with its answer.
    pub echo: Option<u32>,
}

impl FlowTimeouts {
    /// What is not stated here, as there.
    pub fn or(self, other: Self) -> Self {
        Self {
            tcp_opening: self.tcp_opening.or(other.tcp_opening),
            tcp_established: self.tcp_established.or(other.tcp_established),
            tcp_closing: self.tcp_closing.or(other.tcp_closing),
            unreplied: self.unreplied.or(other.unreplied),
            replied: self.replied.or(other.replied),
            echo: self.echo.or(other.echo),
        }
    }
}

/// As seen from the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Towards the VM.
    Ingress,
    /// Away from the VM.
    Egress,
}

/// The protocol a rule matches, with what belongs to it: an invalid pair such as ICMP with ports cannot be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Every protocol.
    Any,
    /// TCP, UDP or SCTP. Empty lists match any port.
    Ports {
        /// IANA number.
        number: u8,
        /// Source ports.
        source: Vec<PortRange>,
        /// Destination ports.
        destination: Vec<PortRange>,
    },
    /// ICMP or ICMPv6. An empty list matches any type.
    Icmp {
        /// IANA number: 1 or 58.
        number: u8,
        /// Types and codes.
        types: Vec<IcmpMatch>,
    },
    /// Any other protocol, by IANA number.
    Other(u8),
}

impl Protocol {
    /// IANA number; none for [`Protocol::Any`].
    pub fn number(&self) -> Option<u8> {
        match self {
            Self::Any => None,
            Self::Ports { number, .. } | Self::Icmp { number, .. } | Self::Other(number) => {
                Some(*number)
            }
        }
    }
}

/// Ports, both ends included, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// Refuses a range that ends before it starts.
    pub fn new(first: u16, last: u16) -> Result<Self, Invalid> {
        if first > last {
            return Err(Invalid::new(format!("port range {first}-{last} ends before it starts")));
        }
        Ok(Self { first, last })
    }

    /// Lowest port.
    pub fn first(self) -> u16 {
        self.first
    }

    /// Highest port.
    pub fn last(self) -> u16 {
        self.last
    }
}

/// An ICMP type, and one code or all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IcmpMatch {
    /// Type.
    pub kind: u8,
    /// Code; `None` matches any.
    pub code: Option<u8>,
}

/// The other side of a rule by what it is: VMs. The core resolves it to networks, or to nobody.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// Those with all of these labels, at least one.
    Labels(Labels),
    /// Those with instances of this service.
    Service(Name),
    /// None: the rule matches nothing. An operator has no use for it.
    Nobody,
}

/// One rule: matches the first packet of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Unique in its policy.
    pub name: Name,
    /// What happens to a match.
    pub action: Action,
    /// Which packets are asked.
    pub direction: Direction,
    /// Source networks, host bits cleared; empty: any.
    pub from: Vec<IpNet>,
    /// Destination networks, host bits cleared; empty: any.
    pub to: Vec<IpNet>,
    /// In place of networks of the other side: of the source towards the VM, of the destination away from it.
    pub peer: Option<Peer>,
    /// Protocol, ports, ICMP types.
    pub protocol: Protocol,
    /// The decision about each new flow is recorded.
    pub log: bool,
    /// New flows beyond it are dropped. Of rules that allow.
    pub limit: Option<RateLimit>,
    /// Flows that each source may have open at a time. Of rules that allow.
    pub connections_per_source: Option<u32>,
}

impl Rule {
    /// A rule that matches everything of one direction.
    pub fn new(name: Name, action: Action, direction: Direction) -> Self {
        Self {
            name,
            action,
            direction,
            from: Vec::new(),
            to: Vec::new(),
            peer: None,
            protocol: Protocol::Any,
            log: false,
            limit: None,
            connections_per_source: None,
        }
    }
}

impl FirewallPolicy {
    /// As an operator may write it.
    ///
    /// # Errors
    /// A rule is about nobody: a field was forgotten, or a template found nothing.
    pub fn written(self) -> Result<Self, Invalid> {
        match self.rules.iter().position(|rule| rule.peer == Some(Peer::Nobody)) {
            None => Ok(self),
            Some(n) => {
                let side = self.rules[n].direction.far_side();
                let why = "missing: labels, at least one, or a service";
                Err(Invalid::new(why).at(side).at_index(n).at("rules"))
            }
        }
    }
}

impl Direction {
    /// The field of a rule that says who is at the other end.
    pub fn far_side(self) -> &'static str {
        match self {
            Self::Ingress => "from",
            Self::Egress => "to",
        }
    }
}

impl Rule {
    /// Whether an address of the other side can be of IPv4, or of IPv6: the protocol and the networks of this side decide.
    pub fn is_for(&self, v4: bool) -> bool {
        let own = match self.direction {
            Direction::Ingress => &self.to,
            Direction::Egress => &self.from,
        };
        let by_own = own.is_empty() || own.iter().any(|net| net.addr().is_ipv4() == v4);
        by_own
            && match self.protocol.number() {
                Some(protocol::ICMP) => v4,
                Some(protocol::ICMPV6) => !v4,
                _ => true,
            }
    }
}

/// What happens to a flow that no rule matches. `None`: this policy does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyDefaults {
    /// Towards the VM.
    pub ingress: Option<Action>,
    /// Away from the VM.
    pub egress: Option<Action>,
}

/// The spec of a `FirewallPolicy`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirewallPolicy {
    /// VMs it is for.
    pub target: Labels,
    /// Lower is asked first.
    pub priority: u32,
    /// For what no rule matches.
    pub defaults: PolicyDefaults,
    /// What becomes of its refusals.
    pub mode: PolicyMode,
    /// In order: the first match decides.
    pub rules: Vec<Rule>,
    /// When flows are over.
    pub timeouts: FlowTimeouts,
    /// Whether fragments pass whose first one was not seen. `None`: this policy does not say.
    pub orphan_fragments: Option<bool>,
}

impl TryFrom<pb::FirewallPolicySpec> for FirewallPolicy {
    type Error = Invalid;

    fn try_from(spec: pb::FirewallPolicySpec) -> Result<Self, Invalid> {
        let target = Labels::new(spec.target.clone()).map_err(|e| e.at("target"))?;
        if spec.priority > PRIORITY_MAX {
            return Err(
                Invalid::new(format!("{} is above {PRIORITY_MAX}", spec.priority)).at("priority")
            );
        }
        let defaults = PolicyDefaults {
            ingress: action(spec.default_ingress).map_err(|e| e.at("defaultIngress"))?,
            egress: action(spec.default_egress).map_err(|e| e.at("defaultEgress"))?,
        };
        let mode = match pb::Mode::try_from(spec.mode) {
            Ok(pb::Mode::Unspecified | pb::Mode::Enforce) => PolicyMode::Enforce,
            Ok(pb::Mode::Audit) => PolicyMode::Audit,
            Err(unknown) => return Err(Invalid::new(unknown.to_string()).at("mode")),
        };
        let timeouts = spec.timeouts.map(FlowTimeouts::try_from).transpose();
        let timeouts = timeouts.map_err(|e| e.at("timeouts"))?.unwrap_or_default();
        let orphan_fragments = match action(spec.orphan_fragments) {
            Ok(None) => Ok(None),
            Ok(Some(Action::Allow)) => Ok(Some(true)),
            Ok(Some(Action::Deny)) => Ok(Some(false)),
            Ok(Some(Action::Reject)) => Err(Invalid::new("allow or deny: nobody can be told")),
            Err(unknown) => Err(unknown),
        };
        let orphan_fragments = orphan_fragments.map_err(|e| e.at("orphanFragments"))?;
        at_most(spec.rules.len(), RULES_MAX, "rules").map_err(|e| e.at("rules"))?;
        let mut names = BTreeSet::new();
        let mut rules = Vec::with_capacity(spec.rules.len());
        for (n, rule) in spec.rules.into_iter().enumerate() {
            let here = |e: Invalid| e.at_index(n).at("rules");
            let rule = Rule::try_from(rule).map_err(here)?;
            if !names.insert(rule.name.clone()) {
                return Err(here(
                    Invalid::new(format!("an earlier rule is called `{}` too", rule.name))
                        .at("name"),
                ));
            }
            rules.push(rule);
        }
        let priority = spec.priority;
        Ok(Self { target, priority, defaults, mode, rules, timeouts, orphan_fragments })
    }
}

impl TryFrom<pb::FirewallRule> for Rule {
    type Error = Invalid;

    fn try_from(rule: pb::FirewallRule) -> Result<Self, Invalid> {
        let missing = |what| Invalid::new(format!("missing: {what}"));
        let name = Name::new(rule.name).map_err(|e| e.at("name"))?;
        let action = action(rule.action)
            .and_then(|action| action.ok_or_else(|| missing("allow, deny or reject")))
            .map_err(|e| e.at("action"))?;
        let direction = match pb::Direction::try_from(rule.direction) {
            Ok(pb::Direction::Ingress) => Direction::Ingress,
            Ok(pb::Direction::Egress) => Direction::Egress,
            Ok(pb::Direction::Unspecified) => {
                return Err(missing("ingress or egress").at("direction"));
            }
            Err(unknown) => return Err(Invalid::new(unknown.to_string()).at("direction")),
        };
        let from = networks(&rule.from_cidrs).map_err(|e| e.at("fromCidrs"))?;
        let to = networks(&rule.to_cidrs).map_err(|e| e.at("toCidrs"))?;
        one_family(&from, &to).map_err(|e| e.at("toCidrs"))?;
        let peer = match direction {
            Direction::Ingress => {
                not_the_own_side(rule.to.as_ref()).map_err(|e| e.at("to"))?;
                rule.from.map(|peer| far(peer, &from).map_err(|e| e.at("from")))
            }
            Direction::Egress => {
                not_the_own_side(rule.from.as_ref()).map_err(|e| e.at("from"))?;
                rule.to.map(|peer| far(peer, &to).map_err(|e| e.at("to")))
            }
        };
        let peer = peer.transpose()?;
        let source = ranges(&rule.source_ports).map_err(|e| e.at("sourcePorts"))?;
        let destination = ranges(&rule.ports).map_err(|e| e.at("ports"))?;
        let types = icmp_types(&rule.icmp_types).map_err(|e| e.at("icmpTypes"))?;
        let number = rule
            .protocol
            .map(|n| u8::try_from(n).map_err(|_| Invalid::new(format!("{n} is above 255"))))
            .transpose()
            .map_err(|e| e.at("protocol"))?;
        let protocol = protocol_of(number, source, destination, types)?;
        let family = match protocol.number() {
            Some(protocol::ICMP) => from.iter().chain(&to).find(|net| net.addr().is_ipv6()),
            Some(protocol::ICMPV6) => from.iter().chain(&to).find(|net| net.addr().is_ipv4()),
            _ => None,
        };
        if let Some(net) = family {
            return Err(Invalid::new(format!(
                "{net} is of the other address family: icmp is IPv4, icmpv6 is IPv6"
            ))
            .at("protocol"));
        }
        let limit = rule.limit.map(RateLimit::try_from).transpose().map_err(|e| e.at("limit"))?;
        if limit.is_some() && action != Action::Allow {
            return Err(Invalid::new("only rules that allow have a limit").at("limit"));
        }
        let connections_per_source = match rule.connections_per_source {
            0 => None,
            n if n > CONNECTIONS_MAX => {
                let reason = format!("{n} is above {CONNECTIONS_MAX}");
                return Err(Invalid::new(reason).at("connectionsPerSource"));
            }
            _ if action != Action::Allow => {
                let reason = "only rules that allow limit connections";
                return Err(Invalid::new(reason).at("connectionsPerSource"));
            }
            n => Some(n),
        };
        let log = rule.log;
        Ok(Self {
            name,
            action,
            direction,
            from,
            to,
            peer,
            protocol,
            log,
            limit,
            connections_per_source,
        })
    }
}

impl TryFrom<pb::RateLimit> for RateLimit {
    type Error = Invalid;

    fn try_from(limit: pb::RateLimit) -> Result<Self, Invalid> {
        let pb::RateLimit { flows, period_seconds, burst, per_source } = limit;
        for (field, value) in [("flows", flows), ("burst", burst)] {
            if value == 0 || value > LIMIT_FLOWS_MAX {
                let reason = format!("{value} is not from 1 to {LIMIT_FLOWS_MAX}");
                return Err(Invalid::new(reason).at(field));
            }
        }
        if !LIMIT_PERIODS.contains(&period_seconds) {
            let reason = format!("{period_seconds} is none of {LIMIT_PERIODS:?}");
            return Err(Invalid::new(reason).at("periodSeconds"));
        }
        Ok(Self { flows, period_seconds, burst, per_source })
    }
}

impl TryFrom<pb::FlowTimeouts> for FlowTimeouts {
    type Error = Invalid;

    fn try_from(wire: pb::FlowTimeouts) -> Result<Self, Invalid> {
        let read = |time: Option<prost_types::Duration>, field| {
            let Some(time) = time else { return Ok(None) };
            let seconds = u32::try_from(time.seconds).ok().filter(|_| time.nanos == 0);
            let seconds = seconds.filter(|n| (1..=TIMEOUT_SECONDS_MAX).contains(n));
            let refused = || Invalid::new("not whole seconds from 1 s to 7 days").at(field);
            seconds.map(Some).ok_or_else(refused)
        };
        Ok(Self {
            tcp_opening: read(wire.tcp_opening, "tcpOpening")?,
            tcp_established: read(wire.tcp_established, "tcpEstablished")?,
            tcp_closing: read(wire.tcp_closing, "tcpClosing")?,
            unreplied: read(wire.unreplied, "unreplied")?,
            replied: read(wire.replied, "replied")?,
            echo: read(wire.echo, "echo")?,
        })
    }
}

impl From<FlowTimeouts> for pb::FlowTimeouts {
    fn from(timeouts: FlowTimeouts) -> Self {
        let wire = |seconds: Option<u32>| {
            seconds.map(|n| prost_types::Duration { seconds: n.into(), nanos: 0 })
        };
        Self {
            tcp_opening: wire(timeouts.tcp_opening),
            tcp_established: wire(timeouts.tcp_established),
            tcp_closing: wire(timeouts.tcp_closing),
            unreplied: wire(timeouts.unreplied),
            replied: wire(timeouts.replied),
            echo: wire(timeouts.echo),
        }
    }
}

impl TryFrom<pb::Peer> for Peer {
    type Error = Invalid;

    fn try_from(pb::Peer { labels, service }: pb::Peer) -> Result<Self, Invalid> {
        if service.is_empty() {
            if labels.is_empty() {
                return Ok(Self::Nobody);
            }
            return Labels::new(labels).map(Self::Labels).map_err(|e| e.at("labels"));
        }
        if !labels.is_empty() {
            return Err(Invalid::new("a peer has labels or a service, not both").at("service"));
        }
        Name::new(service).map(Self::Service).map_err(|e| e.at("service"))
    }
}

fn far(peer: pb::Peer, networks: &[IpNet]) -> Result<Peer, Invalid> {
    if !networks.is_empty() {
        return Err(Invalid::new("a side has CIDRs or a peer, not both"));
    }
    peer.try_into()
}

fn not_the_own_side(peer: Option<&pb::Peer>) -> Result<(), Invalid> {
    let why = "this side is the VM itself: `target` says which VMs a policy is for";
    peer.map_or(Ok(()), |_| Err(Invalid::new(why)))
}

fn protocol_of(
    number: Option<u8>,
    source: Vec<PortRange>,
    destination: Vec<PortRange>,
    types: Vec<IcmpMatch>,
) -> Result<Protocol, Invalid> {
    let ports = matches!(number, Some(protocol::TCP | protocol::UDP | protocol::SCTP));
    let icmp = matches!(number, Some(protocol::ICMP | protocol::ICMPV6));
    let only_ports = || Invalid::new("only tcp, udp and sctp have ports");
    if !ports && !destination.is_empty() {
        return Err(only_ports().at("ports"));
    }
    if !ports && !source.is_empty() {
        return Err(only_ports().at("sourcePorts"));
    }
    if !icmp && !types.is_empty() {
        return Err(Invalid::new("only icmp and icmpv6 have types").at("icmpTypes"));
    }
    Ok(match number {
        None => Protocol::Any,
        Some(number) if ports => Protocol::Ports { number, source, destination },
        Some(number) if icmp => Protocol::Icmp { number, types },
        Some(number) => Protocol::Other(number),
    })
}

fn action(wire: i32) -> Result<Option<Action>, Invalid> {
    match pb::Action::try_from(wire) {
        Ok(pb::Action::Unspecified) => Ok(None),
        Ok(pb::Action::Allow) => Ok(Some(Action::Allow)),
        Ok(pb::Action::Deny) => Ok(Some(Action::Deny)),
        Ok(pb::Action::Reject) => Ok(Some(Action::Reject)),
        Err(unknown) => Err(Invalid::new(unknown.to_string())),
    }
}

fn at_most(n: usize, max: usize, what: &str) -> Result<(), Invalid> {
    if n > max {
        return Err(Invalid::new(format!("{n} {what}; at most {max} are allowed")));
    }
    Ok(())
}

/// Each CIDR once, host bits cleared.
fn networks(texts: &[String]) -> Result<Vec<IpNet>, Invalid> {
    at_most(texts.len(), PEERS_MAX, "CIDRs")?;
    let parse = |(n, text): (usize, &String)| {
        text.parse::<IpNet>().map(|net| net.trunc()).map_err(|_| {
            let hint = match text.parse::<std::net::IpAddr>() {
                Ok(address) if address.is_ipv4() => format!("; did you mean {address}/32?"),
                Ok(address) => format!("; did you mean {address}/128?"),
                Err(_) => String::new(),
            };
            Invalid::new(format!("`{}` is not a CIDR{hint}", shorten(text))).at_index(n)
        })
    };
    texts.iter().enumerate().map(parse).collect()
}

/// A rule whose two sides share no family can never match: certainly a mistake.
fn one_family(from: &[IpNet], to: &[IpNet]) -> Result<(), Invalid> {
    let has = |nets: &[IpNet], v4| nets.is_empty() || nets.iter().any(|n| n.addr().is_ipv4() == v4);
    if (has(from, true) && has(to, true)) || (has(from, false) && has(to, false)) {
        return Ok(());
    }
    Err(Invalid::new("all of another address family than fromCidrs: the rule could never match"))
}

fn ranges(wire: &[pb::PortRange]) -> Result<Vec<PortRange>, Invalid> {
    at_most(wire.len(), RANGES_MAX, "port ranges")?;
    let port = |n: u32| {
        u16::try_from(n).map_err(|_| Invalid::new(format!("{n} is not a port: 0 to 65535")))
    };
    let range = |(n, r): (usize, &pb::PortRange)| {
        let range = port(r.first).and_then(|first| PortRange::new(first, port(r.last)?));
        range.map_err(|e| e.at_index(n))
    };
    wire.iter().enumerate().map(range).collect()
}

fn icmp_types(wire: &[pb::IcmpType]) -> Result<Vec<IcmpMatch>, Invalid> {
    at_most(wire.len(), RANGES_MAX, "ICMP types")?;
    let byte = |n: u32| u8::try_from(n).map_err(|_| Invalid::new(format!("{n} is above 255")));
    let one = |(n, t): (usize, &pb::IcmpType)| {
        let kind = byte(t.r#type).map_err(|e| e.at("type").at_index(n))?;
        let code = t.code.map(byte).transpose().map_err(|e| e.at("code").at_index(n))?;
        Ok(IcmpMatch { kind, code })
    };
    wire.iter().enumerate().map(one).collect()
}

impl From<&FirewallPolicy> for pb::FirewallPolicySpec {
    fn from(policy: &FirewallPolicy) -> Self {
        Self {
            target: policy.target.as_map().clone(),
            priority: policy.priority,
            default_ingress: wire_action(policy.defaults.ingress),
            default_egress: wire_action(policy.defaults.egress),
            mode: match policy.mode {
                PolicyMode::Enforce => pb::Mode::Unspecified,
                PolicyMode::Audit => pb::Mode::Audit,
            }
            .into(),
            rules: policy.rules.iter().map(Into::into).collect(),
            timeouts: (policy.timeouts != FlowTimeouts::default()).then(|| policy.timeouts.into()),
            orphan_fragments: wire_action(policy.orphan_fragments.map(|pass| match pass {
                true => Action::Allow,
                false => Action::Deny,
            })),
        }
    }
}

impl From<&Rule> for pb::FirewallRule {
    fn from(rule: &Rule) -> Self {
        let ranges = |ranges: &[PortRange]| {
            let wire = |r: &PortRange| pb::PortRange { first: r.first.into(), last: r.last.into() };
            ranges.iter().map(wire).collect()
        };
        let (source_ports, ports, icmp_types) = match &rule.protocol {
            Protocol::Any | Protocol::Other(_) => (vec![], vec![], vec![]),
            Protocol::Ports { source, destination, .. } => {
                (ranges(source), ranges(destination), vec![])
            }
            Protocol::Icmp { types, .. } => {
                let wire = |t: &IcmpMatch| pb::IcmpType {
                    r#type: t.kind.into(),
                    code: t.code.map(Into::into),
                };
                (vec![], vec![], types.iter().map(wire).collect())
            }
        };
        let peer = rule.peer.as_ref().map(pb::Peer::from);
        let (direction, from, to) = match rule.direction {
            Direction::Ingress => (pb::Direction::Ingress, peer, None),
            Direction::Egress => (pb::Direction::Egress, None, peer),
        };
        Self {
            name: rule.name.to_string(),
            action: wire_action(Some(rule.action)),
            direction: direction.into(),
            from_cidrs: rule.from.iter().map(ToString::to_string).collect(),
            to_cidrs: rule.to.iter().map(ToString::to_string).collect(),
            protocol: rule.protocol.number().map(Into::into),
            source_ports,
            ports,
            icmp_types,
            from,
            to,
            log: rule.log,
            limit: rule.limit.map(|limit| pb::RateLimit {
                flows: limit.flows,
                period_seconds: limit.period_seconds,
                burst: limit.burst,
                per_source: limit.per_source,
            }),
            connections_per_source: rule.connections_per_source.unwrap_or_default(),
        }
    }
}

impl From<&Peer> for pb::Peer {
    fn from(peer: &Peer) -> Self {
        match peer {
            Peer::Labels(labels) => Self { labels: labels.as_map().clone(), ..Self::default() },
            Peer::Service(service) => Self { service: service.to_string(), ..Self::default() },
            Peer::Nobody => Self::default(),
        }
    }
}

fn wire_action(action: Option<Action>) -> i32 {
    match action {
        None => pb::Action::Unspecified,
        Some(Action::Allow) => pb::Action::Allow,
        Some(Action::Deny) => pb::Action::Deny,
        Some(Action::Reject) => pb::Action::Reject,
    }
    .into()
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Reject => "reject",
        })
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule() -> pb::FirewallRule {
        pb::FirewallRule {
            name: "http".into(),
            action: pb::Action::Allow.into(),
            direction: pb::Direction::Ingress.into(),
            protocol: Some(6),
            ports: vec![pb::PortRange { first: 80, last: 80 }],
            from_cidrs: vec!["10.1.2.3/8".into()],
            ..Default::default()
        }
    }

    fn limit() -> pb::RateLimit {
        pb::RateLimit { flows: 10, period_seconds: 60, burst: 5, per_source: true }
    }

    #[test]
    fn log_limit_and_mode_survive_the_round_trip() {
        let rule = pb::FirewallRule {
            log: true,
            limit: Some(limit()),
            connections_per_source: 7,
            ..rule()
        };
        let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        let spec = pb::FirewallPolicySpec {
            mode: pb::Mode::Audit.into(),
            default_ingress: pb::Action::Reject.into(),
            rules: vec![rule],
            timeouts: Some(pb::FlowTimeouts { tcp_established: seconds(60), ..Default::default() }),
            orphan_fragments: pb::Action::Allow.into(),
            ..Default::default()
        };
        let policy = FirewallPolicy::try_from(spec).unwrap();
        assert_eq!(
            (policy.mode, policy.defaults.ingress),
            (PolicyMode::Audit, Some(Action::Reject))
        );
        let limit = RateLimit { flows: 10, period_seconds: 60, burst: 5, per_source: true };
        assert_eq!((policy.rules[0].log, policy.rules[0].limit), (true, Some(limit)));
        assert_eq!(policy.rules[0].connections_per_source, Some(7));
        assert_eq!(policy.timeouts.tcp_established, Some(60));
        assert_eq!(policy.orphan_fragments, Some(true));
        let again = FirewallPolicy::try_from(pb::FirewallPolicySpec::from(&policy)).unwrap();
        assert_eq!(again, policy);
    }

    #[test]
    fn a_good_rule_survives_the_round_trip_with_host_bits_cleared() {
        let checked = Rule::try_from(rule()).unwrap();
        assert_eq!(checked.from[0].to_string(), "10.0.0.0/8");
        let again = Rule::try_from(pb::FirewallRule::from(&checked)).unwrap();
        assert_eq!(again, checked);
    }

    #[test]
    fn a_bad_rule_is_refused_with_the_field() {
        type Break = fn(&mut pb::FirewallRule);
        fn lb() -> pb::Peer {
            pb::Peer { labels: [("role".into(), "lb".into())].into(), ..Default::default() }
        }
        let cases: [(&str, Break); 22] = [
            ("name", |r| r.name = "No".into()),
            ("action", |r| r.action = 0),
            ("action", |r| r.action = 99),
            ("direction", |r| r.direction = 0),
            ("fromCidrs[0]", |r| r.from_cidrs[0] = "10.0.0.0/33".into()),
            ("toCidrs[0]", |r| r.to_cidrs = vec!["10.0.0.1".into()]),
            ("toCidrs", |r| r.to_cidrs = vec!["fd00::/8".into()]),
            ("ports[0]", |r| r.ports[0].last = 70_000),
            ("ports[0]", |r| r.ports[0].first = 81),
            ("ports", |r| r.protocol = None),
            ("protocol", |r| r.protocol = Some(300)),
            ("icmpTypes", |r| r.icmp_types = vec![pb::IcmpType::default()]),
            ("from", |r| r.from = Some(lb())),
            ("to", |r| r.to = Some(lb())),
            ("from.service", |r| {
                (r.from, r.from_cidrs) = (Some(pb::Peer { service: "web".into(), ..lb() }), vec![]);
            }),
            ("from.service", |r| {
                let web = pb::Peer { service: "Web!".into(), ..Default::default() };
                (r.from, r.from_cidrs) = (Some(web), vec![]);
            }),
            ("from.labels.a b", |r| {
                let labels = [("a b".to_owned(), String::new())].into();
                let odd = pb::Peer { labels, ..Default::default() };
                (r.from, r.from_cidrs) = (Some(odd), vec![]);
            }),
            ("limit.flows", |r| r.limit = Some(pb::RateLimit::default())),
            ("limit.periodSeconds", |r| {
                r.limit = Some(pb::RateLimit { flows: 1, period_seconds: 90_000, ..limit() });
            }),
            ("limit", |r| {
                r.limit = Some(limit());
                r.action = pb::Action::Reject.into();
            }),
            ("connectionsPerSource", |r| r.connections_per_source = CONNECTIONS_MAX + 1),
            ("connectionsPerSource", |r| {
                r.connections_per_source = 1;
                r.action = pb::Action::Deny.into();
            }),
        ];
        for (field, break_it) in cases {
            let mut bad = rule();
            break_it(&mut bad);
            assert_eq!(Rule::try_from(bad).unwrap_err().field(), field);
        }
    }

    #[test]
    fn times_and_fragments_are_refused_with_the_field() {
        let refused = |spec: pb::FirewallPolicySpec| {
            FirewallPolicy::try_from(spec).unwrap_err().field().to_owned()
        };
        for time in [(0, 0), (-1, 0), (1, 500), (i64::from(TIMEOUT_SECONDS_MAX) + 1, 0)] {
            let echo = Some(prost_types::Duration { seconds: time.0, nanos: time.1 });
            let timeouts = Some(pb::FlowTimeouts { echo, ..Default::default() });
            let spec = pb::FirewallPolicySpec { timeouts, ..Default::default() };
            assert_eq!(refused(spec), "timeouts.echo", "{time:?}");
        }
        let orphan_fragments = pb::Action::Reject.into();
        let spec = pb::FirewallPolicySpec { orphan_fragments, ..Default::default() };
        assert_eq!(refused(spec), "orphanFragments");
    }

    #[test]
    fn a_peer_is_the_other_side_and_leaves_only_the_families_that_the_rule_is_about() {
        let labels =
            pb::Peer { labels: [("role".into(), "lb".into())].into(), ..Default::default() };
        let service = pb::Peer { service: "web".into(), ..Default::default() };
        let base = pb::FirewallRule { from_cidrs: vec![], ports: vec![], protocol: None, ..rule() };
        let ingress = pb::FirewallRule { from: Some(labels), ..base.clone() };
        let direction = pb::Direction::Egress.into();
        let egress = pb::FirewallRule { direction, to: Some(service), ..base };
        for wire in [ingress.clone(), egress.clone()] {
            let rule = Rule::try_from(wire.clone()).unwrap();
            assert!(rule.peer.is_some());
            assert_eq!(pb::FirewallRule::from(&rule), wire);
        }
        let families = |wire: pb::FirewallRule| {
            let rule = Rule::try_from(wire).unwrap();
            (rule.is_for(true), rule.is_for(false))
        };
        let with = |protocol| pb::FirewallRule { protocol: Some(protocol), ..ingress.clone() };
        assert_eq!(
            [6, 1, 58].map(|n| families(with(n))),
            [(true, true), (true, false), (false, true)]
        );
        let own = vec!["fd00::/8".to_owned()];
        let to_v6 = pb::FirewallRule { to_cidrs: own.clone(), ..ingress };
        let from_v6 = pb::FirewallRule { from_cidrs: own, ..egress };
        assert_eq!([families(to_v6), families(from_v6)], [(false, true); 2]);
    }

    #[test]
    fn two_rules_of_one_name_are_refused_with_the_place() {
        let spec = pb::FirewallPolicySpec { rules: vec![rule(), rule()], ..Default::default() };
        let error = FirewallPolicy::try_from(spec).unwrap_err();
        assert_eq!(error.field(), "rules[1].name");
    }
}
