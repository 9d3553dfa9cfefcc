//! Statements of nft's JSON in nft's own words, for messages.

use serde_json::Value;

/// What is not known here stays JSON.
pub(super) fn statements(list: &[Value]) -> String {
    list.iter().map(statement).collect::<Vec<_>>().join(" ")
}

fn statement(value: &Value) -> String {
    let Some((name, inner)) = only(value) else { return expression(value) };
    let part = |name: &str| inner.get(name).map(expression).unwrap_or_default();
    match name {
        "match" => {
            let op = inner.get("op").and_then(Value::as_str).unwrap_or_default();
            let (left, right) = (part("left"), part("right"));
            if matches!(op, "==" | "in") {
                format!("{left} {right}")
            } else {
                format!("{left} {op} {right}")
            }
        }
        "vmap" => format!("{} vmap {}", part("key"), part("data")),
        "jump" | "goto" => format!("{name} {}", part("target")),
        "counter" => name.to_owned(),
        "limit" if inner.get("rate").is_some() => {
            let over =
                if inner.get("inv").and_then(Value::as_bool) == Some(true) { "over " } else { "" };
            format!("limit rate {over}{}/{}", part("rate"), part("per"))
        }
        "log" if inner.get("prefix").is_some() => format!("log prefix {}", inner["prefix"]),
        "reject" if inner.get("type").is_some() => {
            format!("reject with {} {}", part("type"), part("expr")).trim_end().to_owned()
        }
        _ if inner.is_null() => name.to_owned(),
        _ => value.to_string(),
    }
}

fn expression(value: &Value) -> String {
    let list = |values: &Value, between: &str| {
        let values = values.as_array().map(Vec::as_slice).unwrap_or_default();
        values.iter().map(expression).collect::<Vec<_>>().join(between)
    };
    let words = |value: &Value, names: [&str; 2]| {
        let words: Vec<_> = names.iter().filter_map(|n| value.get(n)?.as_str()).collect();
        words.join(" ")
    };
    if let Value::Array(pair) = value {
        return match &pair[..] {
            // An element of a verdict map.
            [key, verdict] if only(verdict).is_some() => {
                format!("{} : {}", expression(key), statement(verdict))
            }
            _ => list(value, ","),
        };
    }
    match only(value) {
        Some(("payload", inner)) if inner.get("field").is_some() => {
            words(inner, ["protocol", "field"])
        }
        Some((name @ ("meta" | "ct"), inner)) => format!("{name} {}", words(inner, ["key", ""])),
        Some(("set", inner)) => format!("{{ {} }}", list(inner, ", ")),
        Some(("range", inner)) => list(inner, "-"),
        Some(("concat", inner)) => list(inner, " . "),
        Some(("&", inner)) => format!("({})", list(inner, " & ")),
        Some(("elem", inner)) => inner.get("val").map(expression).unwrap_or_default(),
        Some(("prefix", inner)) => {
            let part = |name: &str| inner.get(name).map(expression).unwrap_or_default();
            format!("{}/{}", part("addr"), part("len"))
        }
        _ => value.as_str().map_or_else(|| value.to_string(), str::to_owned),
    }
}

fn only(value: &Value) -> Option<(&str, &Value)> {
    let object = value.as_object().filter(|object| object.len() == 1)?;
    object.iter().next().map(|(name, inner)| (name.as_str(), inner))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules_are_shown_as_nft_writes_them() {
        for (list, text) in [
            (
                json!([
                    {"match": {"op": "!=", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"prefix": {"addr": "10.0.0.0", "len": 8}}}},
                    {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": {"set": [22, {"range": [80, 90]}]}}},
                    {"log": {"prefix": "x: "}},
                    {"reject": {"type": "tcp reset"}}
                ]),
                "ip saddr != 10.0.0.0/8 tcp dport { 22, 80-90 } log prefix \"x: \" reject with tcp reset",
            ),
            (
                json!([{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["new", {"jump": {"target": "a"}}], ["invalid", {"drop": null}]]}}}]),
                "ct state vmap { new : jump a, invalid : drop }",
            ),
            (
                json!([
                    {"match": {"op": "==", "left": {"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, ["syn", "ack"]]}, "right": "syn"}},
                    {"limit": {"rate": 10, "burst": 7, "per": "minute", "inv": true}},
                    {"quota": {"val": 1}},
                    {"accept": null}
                ]),
                "(tcp flags & syn,ack) syn limit rate over 10/minute {\"quota\":{\"val\":1}} accept",
            ),
        ] {
            assert_eq!(statements(list.as_array().unwrap()), text);
        }
    }
}
