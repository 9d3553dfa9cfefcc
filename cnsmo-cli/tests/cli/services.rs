//! `cnsmo services`.

use cnsmo_proto::pb::catalog::{
    Endpoint, Instance, Phase, WatchInstancesResponse, watch_instances_response::Event,
};
use serde_json::{Value, json};

use crate::{fake::Fake, json_of};

fn instance(service: &str, name: &str, node: &str, phase: Phase) -> Instance {
    Instance {
        name: name.to_owned(),
        service: service.to_owned(),
        node: node.to_owned(),
        phase: phase.into(),
        reason: "Healthy".to_owned(),
        endpoints: vec![
            Endpoint { protocol: "tcp".into(), address: "fd00::1".into(), port: 5432 },
            Endpoint { protocol: "bus".into(), address: format!("svc.{service}"), port: 0 },
        ],
        attributes: [("zone".to_owned(), "a".to_owned())].into(),
        phase_time: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
        revision: 7,
        owner: format!("service/{service}"),
        ..Instance::default()
    }
}

fn fake() -> Fake {
    let fake = Fake::start();
    fake.state().instances = vec![
        instance("db", "db-1", "vm1", Phase::Ready),
        instance("db", "db-2", "vm2", Phase::Unreachable),
        Instance { attributes: [].into(), ..instance("web", "web-1", "vm1", Phase::Starting) },
    ];
    fake
}

#[test]
fn instances_are_listed_for_people_and_programs() {
    let fake = fake();
    let table = fake.ok(&["services"]);
    let lines: Vec<_> = table.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!(lines[0], ["SERVICE", "NAME", "NODE", "PHASE", "SINCE", "REASON", "ENDPOINTS"]);
    assert_eq!(lines[2][..4], ["db", "db-2", "vm2", "unreachable"]);
    assert_eq!(lines[1][6], "tcp:[fd00::1]:5432,bus:svc.db");

    let names = |arguments: &[&str]| -> Vec<String> {
        let json = json_of(&fake.ok(&[arguments, &["-o", "json"]].concat()));
        let list = json.as_array().unwrap().iter();
        list.map(|instance| instance["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&["services"]), ["db-1", "db-2", "web-1"]);
    assert_eq!(names(&["services", "--service", "db"]), ["db-1", "db-2"]);
    assert_eq!(names(&["services", "--node", "vm1"]), ["db-1", "web-1"]);
    assert_eq!(names(&["services", "-l", "zone=a", "--node", "vm1"]), ["db-1"]);

    let json = json_of(&fake.ok(&["services", "--service", "web", "-o", "json"]));
    assert_eq!(json[0]["phase"], "starting");
    assert_eq!(json[0]["phaseTime"], "2023-11-14T22:13:20Z");
    assert_eq!(
        json[0]["endpoints"][1],
        json!({"protocol": "bus", "address": "svc.web", "port": 0})
    );
}

#[test]
fn a_watch_prints_a_line_per_event() {
    let fake = fake();
    let event = |event: Event, revision, instance| WatchInstancesResponse {
        event: event.into(),
        revision,
        instance,
    };
    fake.state().instance_events = vec![
        event(Event::Upsert, 7, Some(instance("db", "db-1", "vm1", Phase::Ready))),
        event(Event::Synced, 8, None),
        event(Event::Delete, 9, Some(instance("db", "db-1", "vm1", Phase::Stopped))),
    ];
    let ran = fake.run(&["services", "--watch"]);
    assert_eq!((ran.code, ran.err.contains("the core ended the watch")), (1, true), "{}", ran.err);
    let lines: Vec<_> = ran.out.lines().collect();
    assert_eq!(
        lines,
        [
            "upsert         7 db/db-1 node=vm1 ready Healthy",
            "synced         8",
            "delete         9 db/db-1 node=vm1 stopped Healthy",
        ]
    );
    let ran = fake.run(&["services", "--watch", "-o", "json"]);
    let events: Vec<Value> = ran.out.lines().map(json_of).collect();
    assert_eq!(events[1], json!({"event": "synced", "revision": 8}));
    assert_eq!(events[0]["instance"]["name"], "db-1");
}
