//! Whatever a file says, it is read or refused.

use cnsmo_proto::model::Labels;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::import::{emit::translate, iptables, nftables};

const IPTABLES: &str = "*filter\n:INPUT DROP [0:0]\n:mine - [0:0]\n-A INPUT -m conntrack --ctstate NEW -j mine\n\
    -A mine ! -s 10.0.0.0/8 -p tcp -m multiport --dports 80,1:9 -m limit --limit 5/min -j ACCEPT\nCOMMIT\n";
/// Words that lead somewhere in the reader of iptables-save.
const WORDS: [&str; 34] = [
    "-A",
    "INPUT",
    "mine",
    "!",
    "-s",
    "-d",
    "10.0.0.0/8",
    "::1",
    "-p",
    "tcp",
    "icmp",
    "all",
    "-i",
    "lo",
    "-m",
    "limit",
    "--limit",
    "5/min",
    "--limit-burst",
    "0",
    "--dport",
    "22:1",
    "99999999999",
    "--icmp-type",
    "3/4",
    "--tcp-flags",
    "ALL",
    "NONE",
    "-j",
    "ACCEPT",
    "-g",
    "--comment",
    "\"",
    "\\",
];

fn word() -> impl Strategy<Value = &'static str> {
    prop::sample::select(WORDS.to_vec())
}

/// Values such as nft writes, put together by chance.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<u64>().prop_map(Value::from),
        prop::sample::select(vec![
            "10.0.0.1",
            "::",
            "tcp",
            "@s",
            "new",
            "echo-request",
            "lo",
            "syn",
            "*",
            "drop",
            "==",
            "!=",
            "<",
            "in",
            "ip",
            "saddr",
            "dport",
            "state",
            "l4proto",
            "iif",
        ])
        .prop_map(Value::from),
        Just(json!({"payload": {"protocol": "tcp", "field": "flags"}})),
        Just(json!({"payload": {"protocol": "ip", "field": "saddr"}})),
        Just(json!({"payload": {"protocol": "th", "field": "dport"}})),
        Just(json!({"ct": {"key": "state"}})),
        Just(json!({"meta": {"key": "l4proto"}})),
        Just(json!({"accept": null})),
        Just(json!({"jump": {"target": "u"}})),
    ];
    leaf.prop_recursive(5, 40, 4, |inner| {
        let names = prop::sample::select(vec![
            "set", "range", "prefix", "concat", "elem", "val", "addr", "len", "match", "left",
            "right", "op", "vmap", "key", "data", "limit", "rate", "burst", "per", "&", "|", "log",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::Array),
            prop::collection::vec((names, inner), 1..4)
                .prop_map(|fields| fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()),
        ]
    })
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text: String) {
        _ = iptables::read("x", &text, false);
        _ = nftables::read("x", &text);
        _ = nftables::read("x", &format!("{{{text}"));
    }

    #[test]
    fn changed_rules_of_iptables_are_read_or_refused(
        words in prop::collection::vec(word(), 0..12),
        at in 0..IPTABLES.len(),
        v6: bool,
    ) {
        let mut text = IPTABLES.to_owned();
        text.insert_str(at, &words.join(" "));
        let line = format!("-A INPUT {}\n", words.join(" "));
        for text in [text, IPTABLES.replace("COMMIT", &(line + "COMMIT"))] {
            if let Ok(set) = iptables::read("x", &text, v6) {
                _ = translate(&set, Labels::default(), 1);
            }
        }
    }

    #[test]
    fn any_statements_of_nft_are_read_or_refused(
        statements in prop::collection::vec(value(), 0..4),
        matched in (value(), value(), value()),
    ) {
        let (left, op, right) = matched;
        let mut expr = statements;
        expr.insert(0, json!({"match": {"left": left, "op": op, "right": right}}));
        let text = json!({"nftables": [
            {"chain": {"family": "inet", "table": "t", "name": "c", "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}},
            {"chain": {"family": "inet", "table": "t", "name": "u"}},
            {"set": {"family": "inet", "table": "t", "name": "s", "elem": [right]}},
            {"rule": {"family": "inet", "table": "t", "chain": "c", "expr": expr}},
            {"rule": {"family": "inet", "table": "t", "chain": "u", "expr": [{"return": null}]}},
        ]})
        .to_string();
        let set = nftables::read("x", &text).unwrap();
        _ = translate(&set, Labels::default(), 1);
    }
}
