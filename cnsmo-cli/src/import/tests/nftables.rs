//! `nft -j list ruleset`.

#![expect(clippy::needless_pass_by_value, reason = "values are written where they are handed over")]

use serde_json::{Value, json};

use super::{assert_left, left, outcome, told};
use crate::import::{emit::Outcome, ir::Effect, nftables::read};

fn base(family: &str, table: &str, hook: &str, priority: i64, policy: &str) -> Value {
    json!({"chain": {"family": family, "table": table, "name": hook, "type": "filter", "hook": hook, "prio": priority,
        "policy": policy}})
}

fn rule(family: &str, table: &str, chain: &str, handle: u64, statements: Value) -> Value {
    json!({"rule": {"family": family, "table": table, "chain": chain, "handle": handle, "expr": statements}})
}

fn payload(protocol: &str, field: &str, right: Value) -> Value {
    json!({"match": {"op": "==", "left": {"payload": {"protocol": protocol, "field": field}}, "right": right}})
}

fn established() -> Value {
    json!([{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}}, {"accept": null}])
}

fn import(objects: Vec<Value>) -> Outcome {
    let text = json!({"nftables": objects}).to_string();
    outcome(&read("rules.json", &text).unwrap())
}

/// Behind the usual first rule, in a chain that drops; with these objects before it.
fn closed_with(objects: Vec<Value>, rules: &[Value]) -> Outcome {
    let mut all = vec![base("inet", "filter", "input", 0, "drop")];
    all.extend(objects);
    all.push(rule("inet", "filter", "input", 1, established()));
    for (n, statements) in (2..).zip(rules) {
        all.push(rule("inet", "filter", "input", n, statements.clone()));
    }
    import(all)
}

fn closed(statements: Value) -> Outcome {
    closed_with(vec![], &[statements])
}

#[test]
fn each_match_is_said() {
    let meta = |key: &str, right: Value| json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": right}});
    let prefix = json!({"prefix": {"addr": "10.0.0.0", "len": 8}});
    for (statements, expected) in [
        (json!([payload("tcp", "dport", json!(22)), {"accept": null}]), "allow tcp 22"),
        (
            json!([payload("tcp", "dport", json!({"set": [80, {"range": [8000, 8100]}]})), {"counter": {"packets": 1, "bytes": 2}}, {"accept": null}]),
            "allow tcp 80,8000-8100",
        ),
        (
            json!([payload("ip", "saddr", prefix.clone()), {"drop": null}]),
            "deny any from 10.0.0.0/8",
        ),
        (
            json!([{"match": {"op": "!=", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": prefix}}, payload("tcp", "dport", json!(1)), {"drop": null}]),
            "deny tcp 1 from 0.0.0.0/5,8.0.0.0/7,11.0.0.0/8,12.0.0.0/6,16.0.0.0/4,32.0.0.0/3,64.0.0.0/2,128.0.0.0/1",
        ),
        (
            json!([payload("ip6", "daddr", json!("fd00::1")), {"accept": null}]),
            "allow any to fd00::1/128",
        ),
        (json!([meta("l4proto", json!("sctp")), {"accept": null}]), "allow sctp"),
        (json!([meta("nfproto", json!("ipv6")), {"accept": null}]), "allow any from ::/0"),
        (
            json!([meta("l4proto", json!("udp")), payload("th", "dport", json!(53)), {"accept": null}]),
            "allow udp 53",
        ),
        (
            json!([payload("ip", "protocol", json!("esp")), {"accept": null}]),
            "allow 50 from 0.0.0.0/0",
        ),
        (
            json!([payload("icmp", "type", json!("echo-request")), {"accept": null}]),
            "allow icmp echo-request",
        ),
        (
            json!([payload("icmp", "type", json!("destination-unreachable")), payload("icmp", "code", json!("frag-needed")), {"accept": null}]),
            "allow icmp 3/4",
        ),
        (
            json!([payload("icmpv6", "type", json!({"set": ["echo-request", "packet-too-big"]})), {"accept": null}]),
            "allow icmpv6 packet-too-big,echo-request",
        ),
        (
            json!([{"match": {"op": ">=", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": 60000}}, {"reject": {"type": "icmpx", "expr": "admin-prohibited"}}]),
            "reject udp 60000-65535",
        ),
        (
            json!([payload("tcp", "dport", json!(22)), {"limit": {"rate": 3, "burst": 5, "per": "minute"}}, {"log": {"prefix": "x"}}, {"accept": null}]),
            "allow 3/m per rule, burst 5, logged tcp 22",
        ),
        (
            json!([{"match": {"op": "==", "left": {"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, ["fin", "syn", "rst", "ack"]]}, "right": "syn"}}, payload("tcp", "dport", json!(9)), {"accept": null}]),
            "allow tcp 9",
        ),
        (
            json!([{"match": {"op": "!=", "left": {"meta": {"key": "iifname"}}, "right": "lo"}}, payload("ip", "saddr", json!("127.0.0.1")), {"drop": null}]),
            "deny any from 127.0.0.1/32",
        ),
    ] {
        let outcome = closed(statements.clone());
        assert_eq!(left(&outcome), [], "{statements}");
        assert_eq!(
            told(&outcome),
            ["deny allow".to_owned(), format!("input-2: ingress {expected}")]
        );
    }
}

#[test]
fn what_the_data_path_does_by_itself_is_no_rule() {
    let map = json!([{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["invalid", {"drop": null}],
        ["established", {"accept": null}], ["related", {"accept": null}]]}}}]);
    let lo = json!([{"match": {"op": "==", "left": {"meta": {"key": "iif"}}, "right": "lo"}}, {"accept": null}]);
    for statements in [map, lo] {
        let outcome = closed(statements.clone());
        assert_eq!(
            (told(&outcome), left(&outcome)),
            (vec!["deny allow".to_owned()], vec![]),
            "{statements}"
        );
    }
}

#[test]
fn what_cannot_be_said_is_named_with_its_effect() {
    let with = |left: Value, op: &str, right: Value| json!({"match": {"op": op, "left": left, "right": right}});
    let limit = json!({"limit": {"rate": 10, "burst": 5, "per": "minute", "inv": true}});
    for (condition, reason) in [
        (with(json!({"meta": {"key": "mark"}}), "==", json!(1)), "mark"),
        (with(json!({"meta": {"key": "iifname"}}), "==", json!("eth0")), "eth0"),
        (with(json!({"fib": {"result": "type", "flags": ["daddr"]}}), "==", json!("local")), "fib"),
        (payload("ip6", "nexthdr", json!("tcp")), "first header"),
        (payload("th", "dport", json!(53)), "does not say which"),
        (payload("tcp", "dport", json!("ssh")), "ssh"),
        (
            with(json!({"payload": {"protocol": "tcp", "field": "flags"}}), "!=", json!("syn")),
            "TCP flags",
        ),
        (payload("ip", "saddr", json!("@gone")), "not there"),
        (payload("ip", "saddr", json!("@moving")), "changes by itself"),
        (limit, "beyond it"),
        (json!({"quota": {"val": 1, "val_unit": "mbytes"}}), "quota"),
        (json!({"xt": {"type": "match", "name": "recent"}}), "iptables-save"),
    ] {
        let moving = json!({"set": {"family": "inet", "table": "filter", "name": "moving", "type": "ipv4_addr",
            "flags": ["dynamic"], "elem": ["10.0.0.1"]}});
        let outcome = closed_with(vec![moving.clone()], &[json!([condition, {"accept": null}])]);
        assert_left(&outcome, Effect::Stricter, reason);
        assert_eq!(told(&outcome), ["deny allow"], "{condition}");
        // The control: a drop in its place, before something is accepted, lets in more.
        let drop = json!([condition, {"drop": null}]);
        let outcome = closed_with(vec![moving], &[drop, json!([{"accept": null}])]);
        assert_left(&outcome, Effect::Wider, reason);
    }
}

#[test]
fn sets_maps_and_tuples_are_opened() {
    let set = json!({"set": {"family": "inet", "table": "filter", "name": "pairs", "type": ["ipv4_addr", "inet_service"],
        "elem": [{"concat": ["10.1.1.1", 80]}, {"elem": {"val": {"concat": [{"prefix": {"addr": "10.2.0.0", "len": 16}}, {"range": [25, 30]}]}, "comment": "x"}}]}});
    let map = json!({"map": {"family": "inet", "table": "filter", "name": "ports", "type": "inet_service", "map": "verdict",
        "elem": [[81, {"accept": null}], [82, {"drop": null}], [83, {"jump": {"target": "more"}}]]}});
    let more = json!({"chain": {"family": "inet", "table": "filter", "name": "more"}});
    let inner = rule(
        "inet",
        "filter",
        "more",
        9,
        json!([payload("ip", "saddr", json!("10.0.0.9")), {"accept": null}]),
    );
    let tuple = json!({"concat": [{"payload": {"protocol": "ip", "field": "saddr"}}, {"payload": {"protocol": "tcp", "field": "dport"}}]});
    let outcome = closed_with(
        vec![set, map, more, inner],
        &[
            json!([{"match": {"op": "==", "left": tuple, "right": "@pairs"}}, {"accept": null}]),
            json!([{"vmap": {"key": {"payload": {"protocol": "tcp", "field": "dport"}}, "data": "@ports"}}]),
        ],
    );
    assert_eq!(left(&outcome), []);
    assert_eq!(
        told(&outcome),
        [
            "deny allow",
            "input-2: ingress allow tcp 80 from 10.1.1.1/32",
            "input-2-2: ingress allow tcp 25-30 from 10.2.0.0/16",
            "input-3: ingress allow tcp 81",
            "input-3-2: ingress deny tcp 82",
            "more-9: ingress allow tcp 83 from 10.0.0.9/32",
        ]
    );
    assert!(outcome.notes.iter().any(|note| note.contains("set pairs is taken as it is now")));
}

/// What the first accepts comes to the second.
#[test]
fn two_chains_on_one_hook_both_have_to_accept() {
    let outcome = import(vec![
        base("inet", "b", "input", 10, "drop"),
        base("inet", "a", "input", 0, "accept"),
        rule("inet", "a", "input", 1, established()),
        rule("inet", "b", "input", 1, established()),
        rule(
            "inet",
            "a",
            "input",
            2,
            json!([payload("ip", "saddr", json!("10.0.0.1")), {"drop": null}]),
        ),
        rule(
            "inet",
            "a",
            "input",
            3,
            json!([payload("tcp", "dport", json!(80)), {"accept": null}]),
        ),
        rule(
            "inet",
            "b",
            "input",
            2,
            json!([payload("tcp", "dport", json!({"range": [80, 90]})), {"accept": null}]),
        ),
    ]);
    assert_eq!(left(&outcome), []);
    assert_eq!(
        told(&outcome),
        [
            "deny allow",
            "input-2: ingress deny any from 10.0.0.1/32",
            "input-2-2: ingress allow tcp 80",
            "input-policy: ingress deny tcp 80",
            "input-2-3: ingress allow tcp 80-90",
        ]
        .into_iter()
        .filter(|rule| !rule.starts_with("input-policy"))
        .collect::<Vec<_>>()
    );
}

#[test]
fn a_limit_is_exact_only_where_the_rest_is_dropped() {
    let limited = json!([payload("tcp", "dport", json!(22)), {"limit": {"rate": 3, "burst": 5, "per": "minute"}}, {"accept": null}]);
    let all = json!([payload("tcp", "dport", json!({"range": [20, 30]})), {"accept": null}]);
    let outcome = closed_with(vec![], &[limited.clone(), all]);
    assert_left(&outcome, Effect::Stricter, "beyond its limit");
    assert_eq!(told(&outcome), ["deny allow", "input-3: ingress allow tcp 20-30"]);
    // For two protocols together it would be two limits.
    let two = json!([{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": {"set": ["tcp", "udp"]}}},
        {"limit": {"rate": 3, "burst": 5, "per": "minute"}}, {"accept": null}]);
    assert_left(&closed(two), Effect::Stricter, "several rules");
    // And one that two chains call has one limit for both.
    let more = json!({"chain": {"family": "inet", "table": "filter", "name": "more"}});
    let jump =
        |port: u16| json!([payload("tcp", "dport", json!(port)), {"jump": {"target": "more"}}]);
    let inner = rule(
        "inet",
        "filter",
        "more",
        9,
        json!([{"limit": {"rate": 3, "burst": 5, "per": "minute"}}, {"accept": null}]),
    );
    let outcome = closed_with(vec![more, inner], &[jump(1), jump(2)]);
    assert_left(&outcome, Effect::Stricter, "several rules");
    assert_eq!(told(&outcome), ["deny allow"]);
}

/// A chain for one family neither closes nor opens the other.
#[test]
fn one_family_alone() {
    for (family, net, other) in [("ip", "0.0.0.0/0", "IPv6"), ("ip6", "::/0", "IPv4")] {
        let outcome = import(vec![
            base(family, "f", "input", 0, "drop"),
            rule(family, "f", "input", 1, established()),
            rule(
                family,
                "f",
                "input",
                2,
                json!([payload("tcp", "dport", json!(22)), {"accept": null}]),
            ),
        ]);
        assert_eq!(
            told(&outcome),
            [
                "allow allow".to_owned(),
                format!("input-2: ingress allow tcp 22 from {net}"),
                format!("input-policy: ingress deny any from {net}"),
            ]
        );
        assert!(
            outcome
                .notes
                .iter()
                .any(|note| note.contains(&format!("no input chain is for {other}")))
        );
    }
}

/// The loopback device is not filtered: what was closed on it is open.
#[test]
fn a_drop_on_the_loopback_device_is_named() {
    let lo = json!({"match": {"op": "==", "left": {"meta": {"key": "iif"}}, "right": "lo"}});
    assert_left(&closed(json!([lo, {"drop": null}])), Effect::Wider, "loopback");
}

/// A packet that comes in has no device that it leaves by.
#[test]
fn devices_of_the_other_direction_match_nothing() {
    for op in ["==", "!="] {
        let out = json!({"match": {"op": op, "left": {"meta": {"key": "oifname"}}, "right": "lo"}});
        let outcome = closed(json!([out, {"accept": null}]));
        assert_eq!((told(&outcome), left(&outcome)), (vec!["deny allow".to_owned()], vec![]));
    }
}

#[test]
fn chains_elsewhere_are_named() {
    let nat = json!({"chain": {"family": "ip", "table": "nat", "name": "post", "type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"}});
    let masquerade = rule("ip", "nat", "post", 1, json!([{"masquerade": null}]));
    let outcome = closed_with(vec![nat, masquerade], &[]);
    assert_left(&outcome, Effect::None, "only filter chains");
    let early = base("inet", "filter", "prerouting", -300, "accept");
    let drop = rule(
        "inet",
        "filter",
        "prerouting",
        1,
        json!([payload("ip", "saddr", json!("10.0.0.1")), {"drop": null}]),
    );
    assert_left(&closed_with(vec![early, drop], &[]), Effect::Wider, "may drop");
    let forward = base("inet", "filter", "forward", 0, "drop");
    assert_left(&closed_with(vec![forward], &[]), Effect::Wider, "forwards");
    let forward = base("inet", "filter", "forward", 0, "accept");
    let accepts = rule("inet", "filter", "forward", 1, json!([{"accept": null}]));
    assert_left(&closed_with(vec![forward, accepts], &[]), Effect::None, "forwards");
}

#[test]
fn what_nft_does_not_write_is_refused() {
    for (text, reason) in [
        ("table inet filter {\n}\n", "make it with `nft -j list ruleset`"),
        ("", "not what nft writes"),
        ("{\"nftables\": [{\"rule\": {}}]}", "object 0, rule"),
        ("{\"nftables\": 3}", "not what nft writes"),
    ] {
        let error = read("x", text).unwrap_err();
        assert!(error.contains(reason), "{text}: {error}");
    }
}
