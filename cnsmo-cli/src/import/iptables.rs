//! The text of iptables-save(8) and ip6tables-save(8).

use std::{net::IpAddr, rc::Rc};

use cnsmo_proto::model::Direction;
use ipnet::IpNet;

use super::{
    draft::{self, Draft, TCP_FLAGS},
    ir::{Base, Effect, Left, Origin, RuleSet, Verdict},
    names::{PROTOCOLS, STATES, number_of},
    sets::{Field, Ranges},
};

/// Burst of a limit that states none.
const BURST: u128 = 5;

/// Reads the rules of one family. The error names the line.
pub(super) fn read(file: &str, text: &str, v6: bool) -> Result<RuleSet, String> {
    let title = text.lines().find(|line| line.contains("tables-save"));
    if title.is_some_and(|line| line.contains("ip6tables-save") != v6) {
        let remedy =
            if v6 { "rules for IPv4 go before --ipv6" } else { "rules for IPv6 go behind --ipv6" };
        return Err(format!("{file}: this is of the other address family: {remedy}"));
    }
    let mut reader =
        Reader { file, v6, table: String::new(), set: RuleSet::default(), others: vec![] };
    let mut lines = 0;
    for (n, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        lines += 1;
        reader.line(n + 1, line).map_err(|reason| format!("{file}:{}: {reason}", n + 1))?;
    }
    if lines == 0 {
        return Err(format!("{file}: no rule in it: make it with iptables-save"));
    }
    reader.finish()
}

struct Reader<'a> {
    file: &'a str,
    v6: bool,
    /// The one that is open.
    table: String,
    set: RuleSet,
    /// Chains that this is not about, with the rules in them.
    others: Vec<Other>,
}

/// A chain of another table or hook.
struct Other {
    id: String,
    name: String,
    place: String,
    drops: bool,
}

impl Reader<'_> {
    fn line(&mut self, n: usize, line: &str) -> Result<(), String> {
        if let Some(table) = line.strip_prefix('*') {
            if !self.table.is_empty() {
                return Err(format!("table {} has no COMMIT before this one", self.table));
            }
            table.clone_into(&mut self.table);
            return Ok(());
        }
        if self.table.is_empty() {
            return Err("not the form of iptables-save: no table is open".to_owned());
        }
        if line == "COMMIT" {
            self.table.clear();
            return Ok(());
        }
        if let Some(chain) = line.strip_prefix(':') {
            return self.chain(n, chain);
        }
        // Counters come before a rule or not.
        let rule = if line.starts_with('[') {
            line.split_once("] ").map_or("", |(_, rule)| rule)
        } else {
            line
        };
        let tokens = tokens(rule)?;
        match tokens.split_first() {
            Some((append, [chain, ..])) if append == "-A" => {
                let chain = chain.clone();
                self.rule(n, &chain, rule, &tokens[2..])
            }
            _ => Err("not the form of iptables-save: expected -A CHAIN".to_owned()),
        }
    }

    fn id(&self, chain: &str) -> String {
        format!("{} {} {chain}", if self.v6 { "ip6" } else { "ip" }, self.table)
    }

    fn chain(&mut self, n: usize, text: &str) -> Result<(), String> {
        let mut words = text.split_whitespace();
        let (Some(name), Some(policy)) = (words.next(), words.next()) else {
            return Err("expected :CHAIN POLICY".to_owned());
        };
        let id = self.id(name);
        if self.set.chains.insert(id.clone(), vec![]).is_some() {
            return Err(format!("chain {name} is there twice"));
        }
        let drops = match policy {
            "ACCEPT" => false,
            "DROP" => true,
            "-" => return Ok(()),
            other => return Err(format!("{other} is no policy of a chain")),
        };
        let place = format!("{}:{n}", self.file);
        let direction = match (self.table.as_str(), name) {
            ("filter", "INPUT") => Direction::Ingress,
            ("filter", "OUTPUT") => Direction::Egress,
            _ => {
                self.others.push(Other { id, name: name.to_owned(), place, drops });
                return Ok(());
            }
        };
        let family = if self.v6 { "v6-" } else { "" };
        let origin = Rc::new(Origin {
            place,
            text: format!(":{text}"),
            name: format!("{family}{name}-policy"),
            is_policy: true,
        });
        let families = (!self.v6, self.v6);
        self.set.bases.push(Base { direction, families, priority: 0, drops, chain: id, origin });
        Ok(())
    }

    fn rule(&mut self, n: usize, chain: &str, text: &str, words: &[String]) -> Result<(), String> {
        let id = self.id(chain);
        let Some(rules) = self.set.chains.get(&id) else {
            return Err(format!("chain {chain} is not declared"));
        };
        let family = if self.v6 { "v6-" } else { "" };
        let mut draft = Draft::new();
        let mut options = Options { words, at: 0 };
        let mut read = Words { verdict: Verdict::Continue, comment: None, protocol: None };
        while let Some((option, not)) = options.next()? {
            self.option(&mut draft, &mut read, &option, not, &mut options)?;
        }
        let name = read.comment.unwrap_or_else(|| format!("{family}{chain}-{}", rules.len() + 1));
        let origin = Rc::new(Origin {
            place: format!("{}:{n}", self.file),
            text: text.to_owned(),
            name,
            is_policy: false,
        });
        let rule = draft.finish(&origin, read.verdict);
        if let Some(rules) = self.set.chains.get_mut(&id) {
            rules.push(rule);
        }
        Ok(())
    }

    fn option(
        &self,
        draft: &mut Draft,
        read: &mut Words,
        option: &str,
        not: bool,
        options: &mut Options<'_>,
    ) -> Result<(), String> {
        match option {
            "-s" | "--source" | "-d" | "--destination" => {
                let nets = options.value(option)?;
                let set = self.networks(&nets)?;
                let destination = option == "-d" || option == "--destination";
                draft.and(&draft::address(self.v6, destination, negated(set, not)));
            }
            "-p" | "--protocol" => protocol(draft, read, &options.value(option)?, not),
            "-i" | "-o" | "--in-interface" | "--out-interface" => {
                let device = options.value(option)?;
                if device == "lo" {
                    let leaves = matches!(option, "-o" | "--out-interface");
                    draft.and(&draft::device(!not, leaves, not));
                } else {
                    draft.doubt(format!("rules are for all network cards, not for {device} alone"));
                }
            }
            "-m" | "--match" => {
                let module = options.value(option)?;
                if !MODULES.contains(&module.as_str()) {
                    draft.doubt(format!("the match `{module}` has no equivalent"));
                }
            }
            "-c" | "--set-counters" => {
                options.value(option)?;
                options.value(option)?;
            }
            "-j" | "--jump" | "-g" | "--goto" => {
                let target = options.value(option)?;
                read.verdict = self.verdict(draft, &target, matches!(option, "-g" | "--goto"));
            }
            "--reject-with" => drop(options.value(option)?),
            _ if ["--log-", "--nflog-", "--ulog-"].iter().any(|of| option.starts_with(of)) => {
                options.skip();
            }
            "--comment" => read.comment = Some(options.value(option)?),
            "--limit" | "--limit-burst" => limit(draft, option, not, options)?,
            _ => match self.known_match(draft, read, option, not, options)? {
                true => {}
                false => {
                    let with = options.skip();
                    draft.doubt(format!("`{option}{with}` has no equivalent"));
                }
            },
        }
        Ok(())
    }

    /// Whether the option is one of these.
    fn known_match(
        &self,
        draft: &mut Draft,
        read: &Words,
        option: &str,
        not: bool,
        options: &mut Options<'_>,
    ) -> Result<bool, String> {
        match option {
            "--sport"
            | "--source-port"
            | "--sports"
            | "--source-ports"
            | "--dport"
            | "--destination-port"
            | "--dports"
            | "--destination-ports"
            | "--ports"
            | "--port" => {
                ports(draft, read, option, not, &options.value(option)?);
            }
            "--icmp-type" | "--icmpv6-type" => {
                let text = options.value(option)?;
                match icmp_type(&text) {
                    Some(set) => draft.and(&draft::icmp(self.v6, negated(set, not))),
                    None => draft.doubt(format!("the ICMP type `{text}` is not known here")),
                }
            }
            "--ctstate" | "--state" => {
                let text = options.value(option)?;
                let state = |name: &str| {
                    number_of(&STATES, &name.to_ascii_lowercase()).map(|n| (n.into(), n.into()))
                };
                match text.split(',').map(state).collect::<Option<Vec<_>>>() {
                    Some(list) => {
                        let set = Ranges::of(Field::State.last(), list);
                        draft.and(&draft::states(negated(set, not)));
                    }
                    None => draft.doubt(format!("the state {text} is not known here")),
                }
            }
            "--src-range" | "--dst-range" => {
                let text = options.value(option)?;
                let set = self.range(&text)?;
                let set = Ranges::of(if self.v6 { u128::MAX } else { u32::MAX.into() }, [set]);
                let destination = option == "--dst-range";
                draft.and(&draft::address(self.v6, destination, negated(set, not)));
            }
            "--syn" => flags(draft, not, "FIN,SYN,RST,ACK", "SYN"),
            "--tcp-flags" => {
                let mask = options.value(option)?;
                flags(draft, not, &mask, &options.value(option)?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn verdict(&self, draft: &mut Draft, target: &str, goto: bool) -> Verdict {
        match target {
            "ACCEPT" => Verdict::Accept,
            "DROP" => Verdict::Drop,
            "REJECT" => Verdict::Reject,
            "RETURN" => Verdict::Return,
            "LOG" | "NFLOG" | "ULOG" => {
                draft.log = true;
                draft.aside =
                    Some("it only logs: what is dropped is recorded in any case".to_owned());
                Verdict::Continue
            }
            chain if self.set.chains.contains_key(&self.id(chain)) => {
                let id = self.id(chain);
                if goto { Verdict::Goto(id) } else { Verdict::Jump(id) }
            }
            other => Verdict::Unknown(format!("the target `{other}` has no equivalent")),
        }
    }

    fn networks(&self, text: &str) -> Result<Ranges, String> {
        let last = if self.v6 { u128::MAX } else { u32::MAX.into() };
        let one = |text: &str| {
            let net = network(text).filter(|net| net.addr().is_ipv6() == self.v6);
            net.map(ends).ok_or_else(|| format!("{text} is not a network of this family"))
        };
        Ok(Ranges::of(last, text.split(',').map(one).collect::<Result<Vec<_>, _>>()?))
    }

    fn range(&self, text: &str) -> Result<(u128, u128), String> {
        let bad = || format!("{text} is not a range of addresses of this family");
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| {
            let address: IpAddr = text.parse().ok()?;
            (address.is_ipv6() == self.v6).then(|| ends(address.into()).0)
        };
        let range = number(first).zip(number(last)).ok_or_else(bad)?;
        if range.0 <= range.1 { Ok(range) } else { Err(bad()) }
    }

    fn finish(mut self) -> Result<RuleSet, String> {
        if !self.table.is_empty() {
            return Err(format!(
                "{}: table {} has no COMMIT: the file is cut off",
                self.file, self.table
            ));
        }
        for Other { id, name, place, drops } in &self.others {
            let rules = self.set.chains.get(id).map_or(0, Vec::len);
            if rules == 0 && !drops {
                continue;
            }
            let table = id.split(' ').nth(1).unwrap_or_default();
            let forward = table == "filter" && name == "FORWARD";
            let can_drop = (*drops || self.set.can_drop(id)) && table != "nat";
            let effect = if can_drop { Effect::Wider } else { Effect::None };
            let reason = match (forward, can_drop) {
                (true, _) => {
                    "what the machine forwards is not translated: ingress and egress rules judge it too"
                }
                (false, true) => {
                    "rules outside of the filter's INPUT and OUTPUT are not translated, and some of these \
                     may drop"
                }
                (false, false) => "only the chains INPUT and OUTPUT of table filter are translated",
            };
            let rule = format!("table {table}, chain {name}, {rules} rules");
            self.set.left.push(Left {
                place: place.clone(),
                rule,
                reason: reason.to_owned(),
                effect,
            });
        }
        Ok(self.set)
    }
}

/// Matches whose options are read, or that have none.
const MODULES: [&str; 12] = [
    "tcp",
    "udp",
    "sctp",
    "icmp",
    "icmp6",
    "ipv6-icmp",
    "multiport",
    "conntrack",
    "state",
    "comment",
    "iprange",
    "limit",
];

/// What options say beside matches.
struct Words {
    verdict: Verdict,
    comment: Option<String>,
    /// For the ports of `-m multiport`.
    protocol: Option<u8>,
}

struct Options<'a> {
    words: &'a [String],
    at: usize,
}

impl Options<'_> {
    /// The next option, and whether it is negated.
    fn next(&mut self) -> Result<Option<(String, bool)>, String> {
        let not = self.words.get(self.at).is_some_and(|word| word == "!");
        self.at += usize::from(not);
        let Some(word) = self.words.get(self.at) else {
            return if not { Err("`!` at the end".to_owned()) } else { Ok(None) };
        };
        if !word.starts_with('-') {
            return Err(format!("expected an option, found `{word}`"));
        }
        self.at += 1;
        Ok(Some((word.clone(), not)))
    }

    fn value(&mut self, option: &str) -> Result<String, String> {
        let value = self.words.get(self.at).filter(|word| *word != "!");
        self.at += 1;
        value.cloned().ok_or_else(|| format!("{option} without a value"))
    }

    /// The values of an option that nobody knows, each behind a blank.
    fn skip(&mut self) -> String {
        let mut text = String::new();
        while let Some(word) = self.words.get(self.at)
            && word != "!"
            && !word.starts_with('-')
        {
            text.push(' ');
            text.push_str(word);
            self.at += 1;
        }
        text
    }
}

/// Words with the quotes of iptables-save taken off.
fn tokens(line: &str) -> Result<Vec<String>, String> {
    let mut words = vec![];
    let mut letters = line.chars().peekable();
    while let Some(first) = letters.peek().copied() {
        if first.is_whitespace() {
            letters.next();
            continue;
        }
        let mut word = String::new();
        if first == '"' {
            letters.next();
            loop {
                match letters.next() {
                    Some('"') => break,
                    Some('\\') => word.extend(letters.next()),
                    Some(letter) => word.push(letter),
                    None => return Err("a quote is not closed".to_owned()),
                }
            }
        } else {
            while let Some(letter) = letters.next_if(|letter| !letter.is_whitespace()) {
                word.push(letter);
            }
        }
        words.push(word);
    }
    Ok(words)
}

fn negated(set: Ranges, not: bool) -> Ranges {
    if not { set.not() } else { set }
}

fn network(text: &str) -> Option<IpNet> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address.into());
    }
    let (address, mask) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    match mask.parse::<IpAddr>() {
        Ok(mask) => IpNet::with_netmask(address, mask).ok(),
        Err(_) => IpNet::new(address, mask.parse().ok()?).ok(),
    }
}

/// First and last address.
pub(super) fn ends(net: IpNet) -> (u128, u128) {
    let number = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => v6.into(),
    };
    (number(net.network()), number(net.broadcast()))
}

fn protocol(draft: &mut Draft, read: &mut Words, text: &str, not: bool) {
    // 0 is `all` to iptables.
    if matches!(text, "all" | "0") {
        return;
    }
    match number_of(&PROTOCOLS, text).or_else(|| text.parse().ok()) {
        Some(number) => {
            read.protocol = (!not).then_some(number);
            let set = Ranges::one(Field::Protocol.last(), number.into());
            draft.and(&draft::protocols(negated(set, not)));
        }
        None => draft.doubt(format!("the protocol `{text}` is not known here")),
    }
}

fn ports(draft: &mut Draft, read: &Words, option: &str, not: bool, text: &str) {
    let range = |text: &str| {
        let (first, last) = text.split_once(':').unwrap_or((text, text));
        let number = |text: &str, open: u16| {
            if text.is_empty() { Some(open) } else { text.parse().ok() }
        };
        let (first, last) = number(first, 0).zip(number(last, u16::MAX))?;
        Some((u128::from(first), u128::from(last)))
    };
    let Some(list) = text.split(',').map(range).collect::<Option<Vec<_>>>() else {
        draft.doubt(format!("`{text}` are not ports by number"));
        return;
    };
    let Some(number) = read.protocol.filter(|n| draft::WITH_PORTS.contains(n)) else {
        draft.doubt("ports are known of tcp, udp and sctp alone");
        return;
    };
    let set = negated(Ranges::of(Field::Port.last(), list), not);
    let of = |destination| draft::ports(Some(number), destination, set.clone());
    match option.trim_start_matches("--").chars().next() {
        Some('s') => draft.and(&of(false)),
        Some('d') => draft.and(&of(true)),
        // Either of them; not any of them.
        _ if not => {
            draft.and(&of(false));
            draft.and(&of(true));
        }
        _ => draft.and_any(&[of(false), of(true)]),
    }
}

/// A type, `type/code`, or `any`.
fn icmp_type(text: &str) -> Option<Ranges> {
    let last = Field::Icmp4.last();
    if matches!(text, "any" | "255") {
        return Some(Ranges::all(last));
    }
    let (kind, code) = match text.split_once('/') {
        Some((kind, code)) => (kind, Some(code.parse::<u8>().ok()?)),
        None => (text, None),
    };
    let first = u128::from(kind.parse::<u8>().ok()?) << 8;
    Some(match code {
        Some(code) => Ranges::one(last, first | u128::from(code)),
        None => Ranges::of(last, [(first, first | 255)]),
    })
}

fn flags(draft: &mut Draft, not: bool, mask: &str, wanted: &str) {
    let bits = |text: &str| match text {
        "ALL" => Some(0x3f),
        "NONE" => Some(0),
        list => list.split(',').try_fold(0, |bits, name| {
            Some(bits | number_of(&TCP_FLAGS, &name.to_ascii_lowercase())?)
        }),
    };
    let Some((mask, wanted)) = bits(mask).zip(bits(wanted)) else {
        draft.doubt("these TCP flags are not known here");
        return;
    };
    match draft::tcp_flags(|flags| (flags & mask == wanted) != not) {
        Ok(matches) => draft.and(&matches),
        Err(reason) => draft.doubt(reason),
    }
}

fn limit(
    draft: &mut Draft,
    option: &str,
    not: bool,
    options: &mut Options<'_>,
) -> Result<(), String> {
    let text = options.value(option)?;
    let before = draft.limit;
    let read = if option == "--limit-burst" {
        let burst = text.parse::<u128>().ok();
        burst.zip(before).ok_or_else(|| "its limit is not known here".to_owned()).and_then(
            |(burst, limit)| {
                draft::limit(u128::from(limit.flows), unit(limit.period_seconds), burst)
            },
        )
    } else {
        let (flows, period) = text.split_once('/').unwrap_or((&text, "sec"));
        let flows = flows.parse().map_err(|_| format!("{text} is not a limit"))?;
        draft::limit(flows, period, BURST)
    };
    match read {
        Ok(_) if not => draft.doubt("a limit for what is beyond it has no equivalent"),
        Ok(limit) => draft.limit = Some(limit),
        Err(reason) => draft.doubt(reason),
    }
    Ok(())
}

fn unit(seconds: u32) -> &'static str {
    match seconds {
        1 => "second",
        60 => "minute",
        3_600 => "hour",
        _ => "day",
    }
}
