//! The firewall rules of the original CNSMO, in their own JSON: a list of rules, one rule, or `{"policy":"denyall"}`.

use super::{
    Problem,
    decode::Decoder,
    firewall::PRIORITY_DEFAULT,
    icmp,
    tree::{Node, Value},
};
use crate::{
    model::{self, Invalid, Labels, NAME_BYTES_MAX, Name, protocol},
    pb::{
        meta::Metadata,
        policy::{
            Action, Direction, FirewallPolicy, FirewallPolicySpec, FirewallRule, IcmpType,
            PortRange,
        },
        resource::{Resource, resource::Resource as Kind},
    },
};

/// What the original's rules do not say: which policy they become.
#[derive(Clone, Debug, Default)]
pub struct Original {
    /// Absent: the name of the file without its ending, made a valid name.
    pub name: Option<Name>,
    /// VMs that the rules are for; the original installed them VM by VM.
    pub target: Labels,
}

const FIELDS: [&str; 6] = ["direction", "protocol", "dst_port", "dst_src", "ip_range", "action"];
const POLICY: &str = "policy";

/// Whether a document is in the original's form. An empty list ("no rules") is so only where a name says that a policy
/// is meant: otherwise it is more likely a file that lost its content.
pub(super) fn is_original(root: &Node, original: &Original) -> bool {
    let element = |node: &Node| {
        node.get("kind").is_none()
            && FIELDS.iter().chain([&POLICY]).any(|field| node.get(field).is_some())
    };
    match &root.value {
        Value::List(items) if items.is_empty() => original.name.is_some(),
        Value::List(items) => {
            items.iter().all(|item| item.get("kind").is_none()) && items.iter().any(element)
        }
        _ => element(root),
    }
}

/// One policy, its rules in the order of the file, and notes.
pub(super) fn convert(
    file: &str,
    root: &Node,
    original: &Original,
) -> Result<(Resource, Vec<String>), Vec<Problem>> {
    let name = match &original.name {
        Some(name) => name.clone(),
        None => name_of_file(file).map_err(|invalid| vec![Problem::new(0, invalid)])?,
    };
    let mut converter = Converter::default();
    let mut d = Decoder::default();
    match &root.value {
        Value::List(_) => {
            d.list(root, "a list of rules", |d, node| converter.element(d, node));
        }
        _ => {
            converter.element(&mut d, root);
        }
    }
    let spec = FirewallPolicySpec {
        target: original.target.as_map().clone(),
        priority: PRIORITY_DEFAULT,
        default_ingress: if converter.denyall { Action::Deny } else { Action::Allow }.into(),
        default_egress: Action::Allow.into(),
        rules: converter.rules,
        ..FirewallPolicySpec::default()
    };
    let spec = match (d.problems(), model::FirewallPolicy::try_from(spec)) {
        (0, Ok(policy)) => Some(FirewallPolicySpec::from(&policy)),
        (0, Err(invalid)) => {
            d.refuse_invalid(root, invalid);
            None
        }
        _ => None,
    };
    let metadata = Metadata { name: name.to_string(), ..Metadata::default() };
    let policy = FirewallPolicy { metadata: Some(metadata), spec, status: None };
    let resource = Resource { resource: Some(Kind::FirewallPolicy(policy)) };
    d.finish(Some((resource, converter.notes)))
}

/// The stem of a path as a name: lower case, everything else a '-'.
fn name_of_file(file: &str) -> Result<Name, Invalid> {
    let stem = std::path::Path::new(file).file_stem().unwrap_or_default().to_string_lossy();
    let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = stem.chars().map(letter).take(NAME_BYTES_MAX).collect();
    Name::new(name.trim_matches('-'))
        .map_err(|_| Invalid::new("the file name gives no policy name: state one with --name"))
}

#[derive(Default)]
struct Converter {
    rules: Vec<FirewallRule>,
    denyall: bool,
    notes: Vec<String>,
    /// Elements seen: names the rules by their place in the file.
    seen: usize,
}

impl Converter {
    fn element(&mut self, d: &mut Decoder, node: &Node) -> Option<()> {
        self.seen += 1;
        if node.get(POLICY).is_some() {
            return self.policy(d, node);
        }
        let before = d.problems();
        let rule = self.rule(d, node)?;
        // The model checks what is left, the address above all; its fields are put in the original's words.
        if d.problems() == before {
            if let Err(invalid) = model::Rule::try_from(rule.clone()) {
                let field = match invalid.field().split('[').next().unwrap_or_default() {
                    "fromCidrs" | "toCidrs" => "ip_range",
                    "ports" => "dst_port",
                    field => field,
                };
                d.refuse_invalid(node, Invalid::new(invalid.reason()).at(field));
            }
            self.rules.push(rule);
        }
        Some(())
    }

    /// `denyall` closed the input chain but for established connections, which follow here by themselves, and ping.
    fn policy(&mut self, d: &mut Decoder, node: &Node) -> Option<()> {
        let fields = d.fields(node, &[POLICY])?;
        d.required(node, &fields, POLICY, |d, node| d.word(node, &[("denyall", ())]))?;
        if !self.denyall {
            self.denyall = true;
            for (suffix, number, kind) in [("", protocol::ICMP, 8), ("-v6", protocol::ICMPV6, 128)]
            {
                for (way, direction) in [("in", Direction::Ingress), ("out", Direction::Egress)] {
                    self.rules.push(FirewallRule {
                        name: format!("ping-{way}{suffix}"),
                        action: Action::Allow.into(),
                        direction: direction.into(),
                        protocol: Some(number.into()),
                        icmp_types: vec![IcmpType { r#type: kind, code: None }],
                        ..FirewallRule::default()
                    });
                }
            }
        }
        Some(())
    }

    fn rule(&mut self, d: &mut Decoder, node: &Node) -> Option<FirewallRule> {
        let fields = d.fields(node, &FIELDS)?;
        let direction = d.required(node, &fields, "direction", |d, node| {
            d.word(node, &[("in", Direction::Ingress), ("out", Direction::Egress)])
        });
        let protocol = d.required(node, &fields, "protocol", protocol_number);
        let port = d.required(node, &fields, "dst_port", port);
        let source = d.required(node, &fields, "dst_src", |d, node| {
            d.word(node, &[("dst", false), ("src", true)])
        });
        let range = d.required(node, &fields, "ip_range", Decoder::text);
        let action = d.required(node, &fields, "action", action);
        let name = format!("rule-{}", self.seen);
        let protocol = protocol?;
        let mut ports = vec![port?];
        // Every rule of the original carries a port, and iptables then refused the ones whose protocol has none, behind
        // the operator's back. What such a rule means is plain, so it does that; the port is checked, and ignored.
        if !matches!(protocol, protocol::TCP | protocol::UDP | protocol::SCTP) {
            ports.clear();
            self.notes.push(format!("{name}: dst_port is ignored: this protocol has no ports"));
        }
        let (from, to) = if source? { (vec![range?], vec![]) } else { (vec![], vec![range?]) };
        Some(FirewallRule {
            name,
            action: action?.into(),
            direction: direction?.into(),
            from_cidrs: from,
            to_cidrs: to,
            protocol: Some(protocol.into()),
            ports,
            ..FirewallRule::default()
        })
    }
}

fn action(d: &mut Decoder, node: &Node) -> Option<Action> {
    // The original's user API offered `rjct`, and its firewall refused it.
    d.word(node, &[("drop", Action::Deny), ("acpt", Action::Allow), ("rjct", Action::Reject)])
}

/// What `iptables -p` took: a name or a number. `all` is refused: with a port it never worked, and without one it would
/// match far more than was written.
fn protocol_number(d: &mut Decoder, node: &Node) -> Option<u8> {
    const MORE: [(&str, u8); 5] =
        [("ipv6-icmp", protocol::ICMPV6), ("igmp", 2), ("gre", 47), ("esp", 50), ("ah", 51)];
    let number = match &node.value {
        Value::Text(text) => {
            let word = text.to_ascii_lowercase();
            let named = icmp::PROTOCOLS.iter().chain(&MORE).find(|(name, _)| *name == word);
            named.map(|(_, n)| *n).or_else(|| word.parse().ok())
        }
        Value::Integer(number) => u8::try_from(*number).ok(),
        Value::Null | Value::Bool(_) | Value::Float(_) | Value::List(_) | Value::Map(_) => None,
    };
    // 0 is `all` to iptables.
    let number = number.filter(|n| *n != 0);
    if number.is_none() {
        let reason = format!(
            "expected tcp, udp, sctp, icmp, icmpv6, igmp, gre, esp, ah or 1 to 255, found {}",
            node.describe()
        );
        d.refuse(node, reason);
    }
    number
}

/// `"N"` or `"A:B"`.
fn port(d: &mut Decoder, node: &Node) -> Option<PortRange> {
    let digits = |text: &str| {
        let number = text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u32>().ok());
        number.flatten()
    };
    let range = match &node.value {
        Value::Text(text) => {
            let (first, last) = text.split_once(':').unwrap_or((text, text));
            digits(first).zip(digits(last))
        }
        Value::Integer(port) => u32::try_from(*port).ok().map(|port| (port, port)),
        Value::Null | Value::Bool(_) | Value::Float(_) | Value::List(_) | Value::Map(_) => None,
    };
    if range.is_none() {
        d.mistyped(node, "a port \"N\" or a range \"A:B\", 0 to 65535");
    }
    range.map(|(first, last)| PortRange { first, last })
}
