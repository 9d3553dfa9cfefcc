//! `cnsmo import`, without a core.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::fake::{Ran, cnsmo};

const HEAD: &str = "*filter\n:INPUT DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n\
    -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n";
const SSH: &str = "-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n";
const MARKED: &str = "-A INPUT -p tcp -m mark --mark 0x1 -j DROP\n";

fn import(arguments: &[&str], input: &str) -> Ran {
    let mut command: Command = cnsmo();
    command.arg("import").args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    Ran {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn rules(rules: &str) -> String {
    format!("{HEAD}{rules}COMMIT\n")
}

#[test]
fn the_policy_goes_to_standard_output_and_the_code_says_whether_it_is_whole() {
    let whole = import(
        &["iptables-save", "-", "--name", "old", "--target", "role=web", "--priority", "7"],
        &rules(SSH),
    );
    assert_eq!(whole.code, 0, "{}", whole.err);
    let expected = "\
kind: FirewallPolicy
metadata:
  name: old
spec:
  target:
    role: web
  priority: 7
";
    assert!(whole.out.contains(expected), "{}", whole.out);
    assert!(whole.err.contains("note: no input chain is for IPv6"), "{}", whole.err);
    let stricter = import(&["iptables-save", "-"], &rules("-A INPUT -i eth1 -j ACCEPT\n"));
    assert_eq!(stricter.code, 4, "{}", stricter.err);
    let named = "left out (stricter): standard input:5: -A INPUT -i eth1 -j ACCEPT: ";
    assert!(stricter.err.contains(named), "{}", stricter.err);
    assert!(stricter.out.contains(&format!("# {named}")), "{}", stricter.out);
}

#[test]
fn a_policy_that_accepts_more_is_printed_only_if_asked_for() {
    let text = rules(&format!("{MARKED}{SSH}"));
    let refused = import(&["iptables-save", "-"], &text);
    assert_eq!((refused.code, refused.out.as_str()), (1, ""), "{}", refused.err);
    assert!(refused.err.contains("left out (wider): standard input:5: "), "{}", refused.err);
    assert!(refused.err.contains("--partial"), "{}", refused.err);
    let partial = import(&["iptables-save", "-", "--partial"], &text);
    assert_eq!(partial.code, 4, "{}", partial.err);
    assert!(partial.out.contains("# left out (wider): "), "{}", partial.out);
    assert!(partial.out.contains("name: input-3"), "{}", partial.out);
}

#[test]
fn json_has_what_was_left_out() {
    let text = rules(&format!("{MARKED}{SSH}"));
    let refused = import(&["iptables-save", "-", "-o", "json"], &text);
    let document: Value = serde_json::from_str(&refused.out).unwrap();
    assert_eq!((refused.code, &document["policy"]), (1, &Value::Null));
    let partial = import(&["iptables-save", "-", "--partial", "-o", "json"], &text);
    let document: Value = serde_json::from_str(&partial.out).unwrap();
    assert_eq!(document["policy"]["spec"]["rules"][0]["ports"][0], 22);
    assert_eq!(document["leftOut"][0]["effect"], "wider");
    assert_eq!(document["leftOut"][0]["place"], "standard input:5");
    assert!(document["notes"].as_array().is_some_and(|notes| !notes.is_empty()));
}

#[test]
fn what_cannot_be_read_is_told_apart() {
    for (arguments, input, reason) in [
        (&["nftables", "-"][..], "table inet filter {\n}\n", "nft -j list ruleset"),
        (&["iptables-save", "-"], "hello\n", "not the form of iptables-save"),
        (&["iptables-save", "/nowhere/rules.v4"], "", "/nowhere/rules.v4"),
        (&["iptables-save"], "", "FILE"),
        (&["iptables-save", "-", "--ipv6", "-"], "", "one of the two"),
    ] {
        let ran = import(arguments, input);
        assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{arguments:?}: {}", ran.err);
        assert!(ran.err.contains(reason), "{arguments:?}: {}", ran.err);
    }
}
