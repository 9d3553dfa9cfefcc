//! The same calls by gRPC and by HTTP/JSON, over TLS and over the unix socket. The other ends are Google's implementations in
//! Python and curl, so that nothing of ours judges itself.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Value, json};

use super::programs::{Core, json, python, root, run};

const STATE: (&str, &str, &str) = ("cnsmo/state/v1/state.proto", "cnsmo.state.v1", "StateService");
const CATALOG: (&str, &str, &str) =
    ("cnsmo/catalog/v1/catalog.proto", "cnsmo.catalog.v1", "CatalogService");
const EVENT: (&str, &str, &str) = ("cnsmo/event/v1/event.proto", "cnsmo.event.v1", "EventService");
const RESOURCE: (&str, &str, &str) =
    ("cnsmo/resource/v1/resource.proto", "cnsmo.resource.v1", "ResourceService");

struct Call {
    service: (&'static str, &'static str, &'static str),
    method: &'static str,
    request: Value,
    /// Empty: it succeeds.
    code: &'static str,
}

fn call(
    service: (&'static str, &'static str, &'static str),
    method: &'static str,
    request: Value,
    code: &'static str,
) -> Call {
    Call { service, method, request, code }
}

/// None of them changes anything, so that all ways are asked about the same state.
fn calls() -> Vec<Call> {
    let absent = json!({"key": "a/text", "modRevision": "123456"});
    vec![
        call(STATE, "Get", json!({"key": "a/text"}), ""),
        call(STATE, "Get", json!({"key": "a/bytes"}), ""),
        call(STATE, "Get", json!({"key": "a/absent"}), ""),
        call(STATE, "Get", json!({}), "INVALID_ARGUMENT"),
        call(STATE, "List", json!({"prefix": "a/", "pageSize": 1, "keysOnly": true}), ""),
        call(STATE, "List", json!({"prefix": "a/"}), ""),
        call(STATE, "List", json!({"pageSize": -1}), "INVALID_ARGUMENT"),
        call(STATE, "Get", json!({"key": "a/text", "minRevision": "-1"}), "INVALID_ARGUMENT"),
        call(
            STATE,
            "Txn",
            json!({"compare": [absent], "success": [{"delete": "a/text"}], "failure": [{"get": "a/text"}]}),
            "",
        ),
        call(
            STATE,
            "Txn",
            json!({"success": [{"put": {"key": "cnsmo/x", "value": "eA=="}}]}),
            "PERMISSION_DENIED",
        ),
        call(STATE, "RevokeLease", json!({"leaseId": "77"}), "NOT_FOUND"),
        call(EVENT, "WatchEvents", json!({"kinds": ["firewall-policy"]}), ""),
        call(EVENT, "WatchEvents", json!({"fromRevision": "1", "name": "web"}), ""),
        call(EVENT, "WatchEvents", json!({"fromRevision": "987654"}), "OUT_OF_RANGE"),
        call(EVENT, "WatchEvents", json!({"kinds": ["pod"]}), "INVALID_ARGUMENT"),
        call(RESOURCE, "List", json!({"kind": "KIND_FIREWALL_POLICY"}), ""),
        call(RESOURCE, "Get", json!({"kind": "KIND_NODE", "name": "none"}), "NOT_FOUND"),
        call(RESOURCE, "List", json!({"kind": 99}), "INVALID_ARGUMENT"),
        call(CATALOG, "ListInstances", json!({}), ""),
        call(CATALOG, "GetInstance", json!({"service": "shop", "name": "shop-1"}), ""),
        call(CATALOG, "GetInstance", json!({"service": "shop", "name": "x"}), "NOT_FOUND"),
        call(
            CATALOG,
            "Announce",
            json!({"instance": {"service": "shop", "name": "shop-2", "phase": 42}}),
            "INVALID_ARGUMENT",
        ),
        call(
            CATALOG,
            "Announce",
            json!({"instance": {"service": "shop", "name": "Not A Label", "phase": "PHASE_READY"}}),
            "INVALID_ARGUMENT",
        ),
    ]
}

const POLICY: &str = "\
kind: FirewallPolicy
metadata: {name: web}
spec:
  target: {role: web}
  rules:
    - {name: http, action: allow, direction: ingress, protocol: tcp, ports: [80, 8000-8100], from: [10.0.0.0/8]}
";

#[test]
fn s05_every_way_gives_the_same_message_or_the_same_error() {
    let core = Core::start("s05");
    let manifest = core.folder().join("web.yaml");
    std::fs::write(&manifest, POLICY).unwrap();
    core.cnsmo(&["apply", "-f", manifest.to_str().unwrap()]);
    core.cnsmo(&["kv", "put", "a/text", "Grüße, \"quoted\"", "--content-type", "text/plain"]);
    let bytes = core.folder().join("bytes");
    std::fs::write(&bytes, [0, 1, 0xfb, 0xff]).unwrap();
    core.cnsmo(&["kv", "put", "a/bytes", "--file", bytes.to_str().unwrap()]);
    let instance = json!({
        "service": "shop", "name": "shop-1", "phase": "PHASE_READY", "reason": "Healthy",
        "endpoints": [{"protocol": "tcp", "address": "10.0.0.1", "port": 80}],
        "attributes": {"tier": "front"},
    });
    let announce = call(CATALOG, "Announce", json!({"instance": instance, "ttl": "600s"}), "");
    by_json(&over_unix(&core), &announce);

    let identity = core.identity("admin", "alice");
    let calls = calls();
    let answers = by_grpc(&calls, &[core.socket().to_str().unwrap()]);
    let tls = [core.address().to_string(), identity.to_str().unwrap().to_owned()];
    let by_tls = by_grpc(&calls, &tls.each_ref().map(String::as_str));
    let by_tls = by_tls.iter().map(as_local);
    for ((call, answer), by_tls) in calls.iter().zip(&answers).zip(by_tls) {
        let what = format!("{} {}", call.method, call.request);
        assert_eq!(answer["code"].as_str().unwrap_or_default(), call.code, "{what}: {answer}");
        assert_eq!(by_tls, *answer, "{what}: by gRPC over TLS");
        let unix = over_unix(&core);
        assert_eq!(by_json(&unix, call), *answer, "{what}: by JSON over the unix socket");
        let tls = over_tls(&core, &identity);
        assert_eq!(as_local(&by_json(&tls, call)), *answer, "{what}: by JSON over TLS");
        let mut more = call.request.clone();
        more["fieldOfTomorrow"] = json!({"nested": [1, 2]});
        let more = Call { request: more, ..*call };
        assert_eq!(by_json(&unix, &more), *answer, "{what}: with an unknown field");
    }
    let streams: Vec<_> =
        calls.iter().zip(&answers).filter(|(call, _)| call.service == EVENT).collect();
    let lengths: Vec<_> =
        streams.iter().filter_map(|(_, all)| Some(all.as_array()?.len())).collect();
    assert_eq!(lengths, [2, 2], "events, then that this is all");
    assert_eq!(streams[0].1[0]["event"]["name"], "web");

    written_alike(&core, &identity);

    // The comparison can fail: what is asked and who asks make a difference.
    assert_ne!(answers[0], answers[1]);
    let viewer = core.identity("viewer", "eve");
    let refused = by_json(&over_tls(&core, &viewer), &announce);
    assert_eq!(refused["code"], "PERMISSION_DENIED");
    // In JSON an enum may also be named; gRPC has only its number.
    let named = call(RESOURCE, "List", json!({"kind": "KIND_NONSENSE"}), "");
    assert_eq!(by_json(&over_unix(&core), &named)["code"], "INVALID_ARGUMENT");
}

/// Makes a call.
type Way<'a> = &'a dyn Fn(&Call) -> Value;

/// What is written one way is there for all, and each way gives the same answer.
fn written_alike(core: &Core, identity: &Path) {
    let value = |n: usize| ["eA==", "eQ=="][n % 2];
    let put = |n: usize| {
        let put = json!({"key": "a/written", "value": value(n), "contentType": "text/x"});
        call(STATE, "Txn", json!({"success": [{"put": put}]}), "")
    };
    let get = call(STATE, "Get", json!({"key": "a/written"}), "");
    let socket = core.socket().to_str().unwrap().to_owned();
    let tls = [core.address().to_string(), identity.to_str().unwrap().to_owned()];
    let (unix_json, tls_json) = (over_unix(core), over_tls(core, identity));
    let ways: [(&str, Way<'_>); 4] = [
        ("gRPC, unix", &|call| by_grpc(std::slice::from_ref(call), &[&socket]).remove(0)),
        ("gRPC, TLS", &|call| {
            by_grpc(std::slice::from_ref(call), &tls.each_ref().map(String::as_str)).remove(0)
        }),
        ("JSON, unix", &|call| by_json(&unix_json, call)),
        ("JSON, TLS", &|call| by_json(&tls_json, call)),
    ];
    let mut before: Option<(Value, i64)> = None;
    for (n, (way, ask)) in ways.iter().enumerate() {
        let mut answer = ask(&put(n));
        let revision: i64 = answer["revision"].as_str().unwrap().parse().unwrap();
        answer["revision"] = json!("-");
        if let Some((other, last)) = &before {
            assert_eq!(answer, *other, "{way}");
            assert_eq!(revision, last + 1, "{way}");
        }
        for (reader, read) in &ways {
            let kv = &read(&get)["kv"];
            assert_eq!(kv["value"], value(n), "written by {way}, read by {reader}");
            assert_eq!(kv["modRevision"], json!(revision.to_string()), "{way}, {reader}");
            assert_eq!(kv["version"], json!((n + 1).to_string()), "{way}, {reader}");
        }
        before = Some((answer, revision));
    }
}

/// What a refusal says of the caller, who over TLS is another one.
fn as_local(answer: &Value) -> Value {
    json(&answer.to_string().replace("operator/alice", "local/uid-0"))
}

/// Makes all calls on one connection.
fn by_grpc(calls: &[Call], to: &[&str]) -> Vec<Value> {
    let mut command = Command::new(python());
    command.arg(root().join("tests/cases/s05_call.py")).arg(root().join("cnsmo-proto/proto"));
    let mut child = command
        .args(to)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = child.stdin.take().unwrap();
    for Call { service: (file, _, service), method, request, .. } in calls {
        writeln!(lines, "{}", json!([file, service, method, request])).unwrap();
    }
    drop(lines);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<_> = text.lines().map(json).collect();
    assert_eq!(answers.len(), calls.len());
    answers
}

fn over_unix(core: &Core) -> Vec<String> {
    let socket = core.socket().to_str().unwrap().to_owned();
    ["--unix-socket".into(), socket, "http://core.cnsmo".into()].into()
}

fn over_tls(core: &Core, identity: &Path) -> Vec<String> {
    let file = |name| identity.join(name).to_str().unwrap().to_owned();
    let (ip, port) = (core.address().ip(), core.address().port());
    let mut arguments = vec!["--resolve".into(), format!("core.cnsmo:{port}:{ip}")];
    for (option, name) in
        [("--cacert", "ca.crt"), ("--cert", "identity.crt"), ("--key", "identity.key")]
    {
        arguments.extend([option.into(), file(name)]);
    }
    arguments.push(format!("https://core.cnsmo:{port}"));
    arguments
}

/// `way` ends with the URL's beginning.
fn by_json(way: &[String], call: &Call) -> Value {
    let (url, options) = way.split_last().unwrap();
    let (_, package, service) = call.service;
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "30"]).args(options);
    curl.args(["--json", &call.request.to_string()]);
    let answer = run(curl.arg(format!("{url}/{package}.{service}/{}", call.method)));
    // A stream has a message a line. One that is refused before it begins is answered as any other call.
    let refused = |answer: &str| json(answer)["code"].is_string();
    if call.service == EVENT && !(answer.lines().count() == 1 && refused(&answer)) {
        return answer.lines().map(json).collect();
    }
    json(&answer)
}
