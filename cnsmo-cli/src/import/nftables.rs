//! The JSON of `nft -j list ruleset`, as libnftables-json(5) has it.
//!
//! Expressions stay JSON until they are looked at: a set of types would refuse a whole file for one expression that it does not know,
//! and that expression has to be named.

use std::{collections::BTreeMap, net::IpAddr, rc::Rc};

use cnsmo_proto::model::Direction;
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::{
    draft::{self, Draft, TCP_FLAGS},
    iptables::ends,
    ir::{Base, Effect, Left, Origin, Rule, RuleSet, Verdict},
    names::{ICMP_CODES, ICMPV6_CODES, PROTOCOLS, STATES, icmp_type, number_of},
    sets::{Field, Match, Ranges},
    text,
};

/// Letters of a rule that a message shows.
const TEXT_MAX: usize = 400;
/// Elements within elements; nft writes two or three.
const DEPTH_MAX: usize = 8;

#[derive(Deserialize)]
struct Document {
    nftables: Vec<BTreeMap<String, Value>>,
}

#[derive(Deserialize)]
struct Table {
    family: String,
    name: String,
    #[serde(default)]
    flags: Value,
}

#[derive(Deserialize)]
struct Chain {
    family: String,
    table: String,
    name: String,
    #[serde(rename = "type")]
    kind: Option<String>,
    hook: Option<String>,
    prio: Option<i64>,
    policy: Option<String>,
}

#[derive(Deserialize)]
struct RuleObject {
    family: String,
    table: String,
    chain: String,
    handle: Option<u64>,
    comment: Option<String>,
    expr: Vec<Value>,
}

/// A set, or a map.
#[derive(Deserialize)]
struct Set {
    family: String,
    table: String,
    name: String,
    #[serde(default)]
    flags: Value,
    timeout: Option<Value>,
    #[serde(default)]
    elem: Vec<Value>,
}

/// Reads a rule set. The error says what is wrong with the file.
pub(super) fn read(file: &str, text: &str) -> Result<RuleSet, String> {
    const REMEDY: &str = "make it with `nft -j list ruleset`";
    let first = text.trim_start().chars().next();
    if first.is_some_and(|first| first != '{') {
        return Err(format!("{file}: this is not JSON: {REMEDY}"));
    }
    let document: Document = serde_json::from_str(text)
        .map_err(|error| format!("{file}: not what nft writes: {error}; {REMEDY}"))?;
    let mut reader = Reader {
        file,
        set: RuleSet::default(),
        sets: BTreeMap::new(),
        others: vec![],
        dormant: vec![],
    };
    // Rules name sets and chains that may come behind them.
    let mut rules = vec![];
    for (n, object) in document.nftables.into_iter().enumerate() {
        for (kind, value) in object {
            let bad = |error| format!("{file}: object {n}, {kind}: {error}; {REMEDY}");
            match kind.as_str() {
                "table" => reader.table(&Deserialize::deserialize(value).map_err(bad)?),
                "chain" => reader.chain(Deserialize::deserialize(value).map_err(bad)?)?,
                "set" | "map" => reader.named(Deserialize::deserialize(value).map_err(bad)?),
                "rule" => rules.push(RuleObject::deserialize(value).map_err(bad)?),
                // Counters, quotas and helpers decide nothing unless a rule names them.
                _ => {}
            }
        }
    }
    for rule in &rules {
        reader.rule(rule)?;
    }
    Ok(reader.finish())
}

struct Reader<'a> {
    file: &'a str,
    set: RuleSet,
    sets: BTreeMap<String, Set>,
    others: Vec<Other>,
    /// Family and name of tables that are switched off.
    dormant: Vec<String>,
}

/// A chain of another hook.
struct Other {
    id: String,
    what: String,
    drops: bool,
    forwards: bool,
}

fn id(family: &str, table: &str, name: &str) -> String {
    format!("{family} {table} {name}")
}

impl Reader<'_> {
    fn table(&mut self, table: &Table) {
        if has_word(&table.flags, "dormant") {
            let name = format!("{} {}", table.family, table.name);
            self.set
                .notes
                .push(format!("{}: table {name} is dormant: it filters nothing", self.file));
            self.dormant.push(name);
        }
    }

    fn chain(&mut self, chain: Chain) -> Result<(), String> {
        let Chain { family, table, name, kind, hook, prio, policy } = chain;
        let id = id(&family, &table, &name);
        if self.set.chains.insert(id.clone(), vec![]).is_some() {
            return Err(format!("{}: chain {id} is there twice", self.file));
        }
        let Some(hook) = hook else { return Ok(()) };
        if self.dormant.contains(&format!("{family} {table}")) {
            return Ok(());
        }
        let drops = policy.as_deref() == Some("drop");
        let kind = kind.unwrap_or_default();
        let families = match family.as_str() {
            "inet" => Some((true, true)),
            "ip" => Some((true, false)),
            "ip6" => Some((false, true)),
            _ => None,
        };
        let direction = match hook.as_str() {
            "input" => Some(Direction::Ingress),
            "output" => Some(Direction::Egress),
            _ => None,
        };
        let place = format!("{}: {id}", self.file);
        if let Some((direction, families)) = direction.zip(families).filter(|_| kind == "filter") {
            let text = format!("policy {}", policy.as_deref().unwrap_or("accept"));
            let name = format!("{name}-policy");
            let origin = Rc::new(Origin { place, text, name, is_policy: true });
            let priority = prio.unwrap_or_default();
            self.set.bases.push(Base { direction, families, priority, drops, chain: id, origin });
        } else {
            let forwards = hook == "forward" && families.is_some();
            let what = format!("{kind} chain at hook {hook}");
            self.others.push(Other { id, what, drops, forwards });
        }
        Ok(())
    }

    fn named(&mut self, set: Set) {
        self.sets.insert(id(&set.family, &set.table, &set.name), set);
    }

    fn rule(&mut self, rule: &RuleObject) -> Result<(), String> {
        let id = id(&rule.family, &rule.table, &rule.chain);
        let Some(chain) = self.set.chains.get(&id) else {
            return Err(format!("{}: a rule is in chain {id}, which is not there", self.file));
        };
        let n = rule.handle.unwrap_or(chain.len() as u64 + 1);
        let text = text::statements(&rule.expr);
        let mut short: String = text.chars().take(TEXT_MAX).collect();
        if short.len() < text.len() {
            short.push_str("...");
        }
        let origin = Rc::new(Origin {
            place: format!("{}: {id}, handle {n}", self.file),
            text: short,
            name: rule.comment.clone().unwrap_or_else(|| format!("{}-{n}", rule.chain)),
            is_policy: false,
        });
        let statements = Statements {
            reader: self,
            origin: &origin,
            family: &rule.family,
            table: &rule.table,
            used: vec![],
        };
        let (rules, used) = statements.read(&rule.expr);
        for name in used {
            let note = format!("{}: set {name} is taken as it is now", self.file);
            if !self.set.notes.contains(&note) {
                self.set.notes.push(note);
            }
        }
        if let Some(chain) = self.set.chains.get_mut(&id) {
            chain.extend(rules);
        }
        Ok(())
    }

    fn finish(mut self) -> RuleSet {
        for Other { id, what, drops, forwards } in &self.others {
            let rules = self.set.chains.get(id).map_or(0, Vec::len);
            let family = id.split(' ').next().unwrap_or_default();
            if rules == 0 && !drops || family == "arp" {
                continue;
            }
            let can_drop = (*drops || self.set.can_drop(id)) && !what.starts_with("nat");
            let effect = if can_drop { Effect::Wider } else { Effect::None };
            let reason = match (forwards, can_drop) {
                (true, _) => {
                    "what the machine forwards is not translated: ingress and egress rules judge it too"
                }
                (false, true) => {
                    "only filter chains at the hooks input and output are translated, and this one may drop"
                }
                (false, false) => "only filter chains at the hooks input and output are translated",
            };
            self.set.left.push(Left {
                place: format!("{}: {id}", self.file),
                rule: format!("{what}, {rules} rules"),
                reason: reason.to_owned(),
                effect,
            });
        }
        self.set
    }
}

/// The statements of one rule.
struct Statements<'a> {
    reader: &'a Reader<'a>,
    origin: &'a Rc<Origin>,
    family: &'a str,
    table: &'a str,
    /// Named sets that it asks.
    used: Vec<String>,
}

/// The left side of a match.
enum Asked {
    Address {
        v6: bool,
        destination: bool,
    },
    /// Without a number: of the protocol that the rule names elsewhere.
    Ports {
        number: Option<u8>,
        destination: bool,
    },
    Protocol,
    Protocol4,
    Family,
    IcmpType {
        v6: bool,
    },
    IcmpCode {
        v6: bool,
    },
    State,
    Device {
        leaves: bool,
    },
    TcpFlags {
        mask: u8,
    },
}

impl Statements<'_> {
    /// A rule for each case of a verdict map, else one; and the named sets.
    fn read(mut self, statements: &[Value]) -> (Vec<Rule>, Vec<String>) {
        let mut draft = Draft::new();
        let mut verdict = Verdict::Continue;
        let mut cases = None;
        for statement in statements {
            let Some((name, value)) = single(statement) else {
                draft.doubt("a statement has no name");
                verdict = Verdict::Unknown("a statement has no name".to_owned());
                continue;
            };
            match name {
                "match" => {
                    if let Err(reason) = self.matches(&mut draft, value) {
                        draft.doubt(reason);
                    }
                }
                "limit" => match limit(value) {
                    Ok(limit) if draft.limit.is_none() => draft.limit = Some(limit),
                    Ok(_) => draft.doubt("it has two limits"),
                    Err(reason) => draft.doubt(reason),
                },
                "vmap" => cases = Some(value),
                "counter" => {}
                "log" => {
                    draft.log = true;
                    draft.aside.get_or_insert(
                        "it only logs: what is dropped is recorded in any case".to_owned(),
                    );
                }
                "mangle" | "set" | "ct helper" | "ct timeout" | "ct expectation" => {
                    draft.aside = Some(format!("`{name}` has no equivalent"));
                }
                _ => match self.verdict(name, value) {
                    // It may be a condition of the verdict behind it.
                    Verdict::Unknown(reason) => {
                        draft.doubt(reason.clone());
                        verdict = Verdict::Unknown(reason);
                    }
                    known => verdict = known,
                },
            }
        }
        let rules = match cases {
            None => vec![draft.finish(self.origin, verdict)],
            Some(map) => self.cases(draft, map),
        };
        (rules, self.used)
    }

    fn verdict(&self, name: &str, value: &Value) -> Verdict {
        let target = || {
            let target = value.get("target").and_then(Value::as_str).unwrap_or_default();
            id(self.family, self.table, target)
        };
        match name {
            "accept" => Verdict::Accept,
            "drop" => Verdict::Drop,
            "reject" => Verdict::Reject,
            "return" => Verdict::Return,
            "continue" => Verdict::Continue,
            "jump" => Verdict::Jump(target()),
            "goto" => Verdict::Goto(target()),
            "xt" => Verdict::Unknown(
                "a rule of iptables in its own form: import the output of iptables-save".to_owned(),
            ),
            _ => Verdict::Unknown(format!("`{name}` has no equivalent")),
        }
    }

    /// One rule per element: their keys have nothing in common, so that the order does not matter.
    fn cases(&mut self, draft: Draft, map: &Value) -> Vec<Rule> {
        let lost = |draft: Draft, reason: String| {
            vec![draft.finish(self.origin, Verdict::Unknown(reason))]
        };
        let key = map.get("key").unwrap_or(&Value::Null).clone();
        let data = map.get("data").unwrap_or(&Value::Null).clone();
        let elements = match self.elements(&data) {
            Ok(elements) => elements,
            Err(reason) => return lost(draft, reason),
        };
        if draft.limit.is_some() {
            return lost(draft, "its limit is for several cases together".to_owned());
        }
        let mut rules = vec![];
        for element in elements {
            let Some([value, verdict]) = element.as_array().map(Vec::as_slice) else {
                return lost(draft, "an element of its map is not a key and a verdict".to_owned());
            };
            let mut case = draft.clone();
            if let Err(reason) = self.compare(&mut case, &key, "==", value) {
                case.doubt(reason);
            }
            let verdict = match single(verdict) {
                Some((name, value)) => self.verdict(name, value),
                None => Verdict::Unknown("an element of its map has no verdict".to_owned()),
            };
            rules.push(case.finish(self.origin, verdict));
        }
        rules
    }

    fn matches(&mut self, draft: &mut Draft, value: &Value) -> Result<(), String> {
        let part = |name| value.get(name).unwrap_or(&Value::Null);
        let op = part("op").as_str().unwrap_or("==").to_owned();
        self.compare(draft, part("left"), &op, part("right"))
    }

    fn compare(
        &mut self,
        draft: &mut Draft,
        left: &Value,
        op: &str,
        right: &Value,
    ) -> Result<(), String> {
        if let Some(parts) = left.get("concat").and_then(Value::as_array) {
            return self.concatenation(draft, parts, op, right);
        }
        let asked = asked(left)?;
        if matches!(asked, Asked::Ports { number: None, .. }) {
            draft.ask_ports();
        }
        let one = self.one(&asked, op, right)?;
        draft.and(&one);
        Ok(())
    }

    /// Any of several tuples.
    fn concatenation(
        &mut self,
        draft: &mut Draft,
        parts: &[Value],
        op: &str,
        right: &Value,
    ) -> Result<(), String> {
        if !matches!(op, "==" | "in") {
            return Err(format!("`{op}` of several fields together has no equivalent"));
        }
        let asked = parts.iter().map(asked).collect::<Result<Vec<_>, _>>()?;
        if asked.iter().any(|one| matches!(one, Asked::Ports { number: None, .. })) {
            draft.ask_ports();
        }
        let mut any = vec![];
        let elements =
            if right.get("concat").is_some() { vec![right.clone()] } else { self.elements(right)? };
        for element in elements {
            let element = element.get("elem").and_then(|e| e.get("val")).unwrap_or(&element);
            let values = element.get("concat").and_then(Value::as_array);
            let values = values.filter(|values| values.len() == asked.len());
            let values = values.ok_or("an element has not the parts that are compared")?;
            let mut all = Some(Match::all());
            for (asked, value) in asked.iter().zip(values) {
                let one = self.one(asked, "==", value)?;
                all = all.and_then(|all| all.and(&one));
            }
            any.extend(all);
        }
        draft.and_any(&any);
        Ok(())
    }

    /// The elements of a set or map that is written there, or named.
    fn elements(&mut self, value: &Value) -> Result<Vec<Value>, String> {
        if let Some(elements) = value.get("set").and_then(Value::as_array) {
            return Ok(elements.clone());
        }
        let name = value.as_str().and_then(|text| text.strip_prefix('@'));
        let name = name.ok_or_else(|| format!("`{value}` is no set"))?;
        let set = self.reader.sets.get(&id(self.family, self.table, name));
        let set = set.ok_or_else(|| format!("the set {name} is not there"))?;
        if set.timeout.is_some() || ["dynamic", "timeout"].iter().any(|f| has_word(&set.flags, f)) {
            return Err(format!("the set {name} changes by itself"));
        }
        self.used.push(name.to_owned());
        Ok(set.elem.clone())
    }

    fn one(&mut self, asked: &Asked, op: &str, right: &Value) -> Result<Match, String> {
        if let Asked::TcpFlags { mask } = asked {
            return tcp_flags(*mask, op, right);
        }
        if let Asked::Device { leaves } = asked {
            return match (op, right.as_str()) {
                ("==", Some("lo")) => Ok(draft::device(true, *leaves, false)),
                ("!=", Some("lo")) => Ok(draft::device(false, *leaves, false)),
                _ => Err(format!("rules are for all network cards, not for {right} alone")),
            };
        }
        let set = self.values(asked, right, 0)?;
        let single = || match set.iter().collect::<Vec<_>>()[..] {
            [(a, b)] if a == b => Ok(a),
            _ => Err(format!("`{op}` is for one number")),
        };
        let last = asked.last();
        let up_to = |end: Option<u128>| Ranges::of(last, end.map(|end| (0, end)));
        let set = match op {
            "==" | "in" => set,
            "!=" => set.not(),
            "<" => up_to(single()?.checked_sub(1)),
            "<=" => up_to(Some(single()?)),
            ">" => up_to(Some(single()?)).not(),
            ">=" => up_to(single()?.checked_sub(1)).not(),
            _ => return Err(format!("`{op}` has no equivalent")),
        };
        Ok(asked.matches(set))
    }

    fn values(&mut self, asked: &Asked, value: &Value, depth: usize) -> Result<Ranges, String> {
        if depth > DEPTH_MAX {
            return Err("its values are nested too deep".to_owned());
        }
        let list = match value {
            Value::Array(list) => Some(list.clone()),
            Value::String(name) if name.starts_with('@') => Some(self.elements(value)?),
            Value::Object(object) if object.contains_key("set") => Some(self.elements(value)?),
            _ => None,
        };
        let last = asked.last();
        if let Some(list) = list {
            let mut all = vec![];
            for value in &list {
                all.extend(self.values(asked, value, depth + 1)?.iter());
            }
            return Ok(Ranges::of(last, all));
        }
        if let Some(element) = value.get("elem").and_then(|element| element.get("val")) {
            return self.values(asked, element, depth + 1);
        }
        if let Some([first, end]) = value.get("range").and_then(Value::as_array).map(Vec::as_slice)
        {
            let (first, end) = (asked.number(first)?, asked.number(end)?);
            return Ok(Ranges::of(last, [(first, end)]));
        }
        if let Some(prefix) = value.get("prefix") {
            return asked.prefix(prefix);
        }
        asked.number(value).map(|number| Ranges::one(last, number))
    }
}

impl Asked {
    /// Of the values that it is compared with.
    fn last(&self) -> u128 {
        match self {
            Self::Address { v6: true, .. } => u128::MAX,
            Self::Address { v6: false, .. } => u32::MAX.into(),
            Self::Ports { .. } => u16::MAX.into(),
            Self::State => Field::State.last(),
            Self::Family => 1,
            Self::Protocol
            | Self::Protocol4
            | Self::IcmpType { .. }
            | Self::IcmpCode { .. }
            | Self::Device { .. }
            | Self::TcpFlags { .. } => u8::MAX.into(),
        }
    }

    fn number(&self, value: &Value) -> Result<u128, String> {
        let names: &[(&str, u8)] = match self {
            Self::Protocol | Self::Protocol4 => &PROTOCOLS,
            Self::IcmpCode { v6: false } => &ICMP_CODES,
            Self::IcmpCode { v6: true } => &ICMPV6_CODES,
            Self::State => &STATES,
            // `meta protocol` and `meta nfproto` have different words for one thing.
            Self::Family => &[("ipv4", 0), ("ip", 0), ("ipv6", 1), ("ip6", 1)],
            Self::Address { .. }
            | Self::Ports { .. }
            | Self::Device { .. }
            | Self::IcmpType { .. }
            | Self::TcpFlags { .. } => &[],
        };
        let unknown = || format!("the value {value} is not known here");
        match (self, value) {
            (Self::Address { v6, .. }, Value::String(text)) => {
                let address: IpAddr = text.parse().map_err(|_| unknown())?;
                let address = Some(address).filter(|address| address.is_ipv6() == *v6);
                address.map(|address| ends(address.into()).0).ok_or_else(unknown)
            }
            (Self::IcmpType { v6 }, Value::String(name)) => {
                icmp_type(*v6, name).map(Into::into).ok_or_else(unknown)
            }
            (Self::State | Self::Family, Value::Number(_)) => Err(unknown()),
            (_, Value::String(name)) => number_of(names, name).map(Into::into).ok_or_else(unknown),
            (_, Value::Number(number)) => {
                let number = number.as_u64().map(u128::from);
                number.filter(|number| *number <= self.last()).ok_or_else(unknown)
            }
            _ => Err(unknown()),
        }
    }

    fn prefix(&self, prefix: &Value) -> Result<Ranges, String> {
        let unknown = || format!("the prefix {prefix} is not known here");
        let Self::Address { v6, .. } = self else { return Err(unknown()) };
        let address = prefix.get("addr").and_then(Value::as_str);
        let length = prefix.get("len").and_then(Value::as_u64);
        let (address, length) = address.zip(length).ok_or_else(unknown)?;
        let address: IpAddr = address.parse().map_err(|_| unknown())?;
        let net = IpNet::new(address, u8::try_from(length).map_err(|_| unknown())?);
        let net = net.ok().filter(|net| net.addr().is_ipv6() == *v6).ok_or_else(unknown)?;
        Ok(Ranges::of(self.last(), [ends(net)]))
    }

    fn matches(&self, set: Ranges) -> Match {
        match *self {
            Self::Address { v6, destination } => draft::address(v6, destination, set),
            Self::Ports { number, destination } => draft::ports(number, destination, set),
            Self::Protocol => draft::protocols(set),
            Self::Protocol4 => Match::families(true, false).with(Field::Protocol, set),
            Self::Family => Match::families(set.contains(0), set.contains(1)),
            Self::IcmpType { v6 } => {
                let types = set.iter().map(|(a, b)| (a << 8, b << 8 | 255));
                draft::icmp(v6, Ranges::of(Field::Icmp4.last(), types))
            }
            Self::IcmpCode { v6 } => {
                let of = |kind: u128| set.iter().map(move |(a, b)| (kind << 8 | a, kind << 8 | b));
                draft::icmp(v6, Ranges::of(Field::Icmp4.last(), (0..=255).flat_map(of)))
            }
            Self::State => draft::states(set),
            // Both are answered before.
            Self::Device { .. } | Self::TcpFlags { .. } => Match::all(),
        }
    }
}

/// What the left side of a match asks for.
fn asked(left: &Value) -> Result<Asked, String> {
    let unknown = || format!("`{left}` has no equivalent");
    let (kind, value) = single(left).ok_or_else(unknown)?;
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
    Ok(match (kind, text("protocol"), text("field"), text("key")) {
        ("payload", "ip", field @ ("saddr" | "daddr"), _) => {
            Asked::Address { v6: false, destination: field == "daddr" }
        }
        ("payload", "ip6", field @ ("saddr" | "daddr"), _) => {
            Asked::Address { v6: true, destination: field == "daddr" }
        }
        ("payload", protocol @ ("tcp" | "udp" | "sctp"), field @ ("sport" | "dport"), _) => {
            Asked::Ports { number: number_of(&PROTOCOLS, protocol), destination: field == "dport" }
        }
        ("payload", "th", field @ ("sport" | "dport"), _) => {
            Asked::Ports { number: None, destination: field == "dport" }
        }
        ("payload", "ip", "protocol", _) => Asked::Protocol4,
        ("payload", "ip6", "nexthdr", _) => {
            let reason = "`ip6 nexthdr` is the first header alone: `meta l4proto` would be exact";
            return Err(reason.to_owned());
        }
        ("payload", "icmp", "type", _) => Asked::IcmpType { v6: false },
        ("payload", "icmp", "code", _) => Asked::IcmpCode { v6: false },
        ("payload", "icmpv6", "type", _) => Asked::IcmpType { v6: true },
        ("payload", "icmpv6", "code", _) => Asked::IcmpCode { v6: true },
        ("payload", "tcp", "flags", _) => Asked::TcpFlags { mask: u8::MAX },
        ("meta", _, _, "l4proto") => Asked::Protocol,
        ("meta", _, _, "nfproto" | "protocol") => Asked::Family,
        ("meta", _, _, key @ ("iif" | "iifname" | "oif" | "oifname")) => {
            Asked::Device { leaves: key.starts_with('o') }
        }
        ("ct", _, _, "state") => Asked::State,
        ("&", ..) => {
            let parts = value.as_array().map(Vec::as_slice);
            match parts {
                Some([left, mask]) if matches!(asked(left), Ok(Asked::TcpFlags { mask: 255 })) => {
                    Asked::TcpFlags { mask: flag_bits(mask).ok_or_else(unknown)? }
                }
                _ => return Err(unknown()),
            }
        }
        _ => return Err(unknown()),
    })
}

fn tcp_flags(mask: u8, op: &str, right: &Value) -> Result<Match, String> {
    let right =
        flag_bits(right).ok_or_else(|| format!("the TCP flags {right} are not known here"))?;
    match op {
        "==" => draft::tcp_flags(|flags| flags & mask == right),
        "!=" => draft::tcp_flags(|flags| flags & mask != right),
        "in" => draft::tcp_flags(|flags| flags & mask & right != 0),
        _ => Err(format!("`{op}` of TCP flags has no equivalent")),
    }
}

/// Names, a list of them, or a number.
fn flag_bits(value: &Value) -> Option<u8> {
    match value {
        Value::String(name) => number_of(&TCP_FLAGS, name),
        Value::Number(number) => u8::try_from(number.as_u64()?).ok(),
        Value::Array(list) => list.iter().try_fold(0, |bits, value| match value {
            Value::Array(_) => None,
            value => Some(bits | flag_bits(value)?),
        }),
        Value::Object(object) => {
            let list = object.get("|")?.as_array()?;
            list.iter().try_fold(0, |bits, value| match value {
                Value::String(_) | Value::Number(_) => Some(bits | flag_bits(value)?),
                _ => None,
            })
        }
        Value::Null | Value::Bool(_) => None,
    }
}

fn limit(value: &Value) -> Result<super::ir::Limit, String> {
    let part = |name| value.get(name).unwrap_or(&Value::Null);
    if value.get("inv").is_some_and(|inv| inv.as_bool() != Some(false)) {
        return Err("a limit for what is beyond it has no equivalent".to_owned());
    }
    let in_packets = |name| matches!(part(name).as_str(), None | Some("packets"));
    if !in_packets("rate_unit") || !in_packets("burst_unit") {
        return Err("a limit of bytes has no equivalent".to_owned());
    }
    let rate = part("rate").as_u64().ok_or("its limit is kept elsewhere")?;
    let burst = part("burst").as_u64().ok_or("its limit has no burst")?;
    draft::limit(rate.into(), part("per").as_str().unwrap_or_default(), burst.into())
}

/// Name and value of an object with one field; a word stands for itself.
fn single(value: &Value) -> Option<(&str, &Value)> {
    match value {
        Value::Object(object) if object.len() == 1 => {
            object.iter().next().map(|(name, value)| (name.as_str(), value))
        }
        Value::String(word) => Some((word.as_str(), &Value::Null)),
        _ => None,
    }
}

/// In a list, or alone.
fn has_word(value: &Value, word: &str) -> bool {
    match value {
        Value::Array(list) => list.iter().any(|one| one.as_str() == Some(word)),
        value => value.as_str() == Some(word),
    }
}
