//! What operators call.

use std::collections::BTreeMap;

use cnsmo_proto::pb::{
    policy::PortRange,
    resource::{
        ApplyRequest, Kind, WaitAppliedRequest, WaitAppliedResponse, WatchRequest, WatchResponse,
        apply_request::Mode, change::Outcome, resource,
        resource_service_client::ResourceServiceClient, watch_response::Event,
    },
};
use tonic::{Code, Streaming};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::harness::{OWN_COMMITS, PATIENCE, TestCore, name_of, policy};

async fn next(stream: &mut Streaming<WatchResponse>) -> (Event, i64, String) {
    let message = tokio::time::timeout(PATIENCE, stream.message()).await.unwrap();
    let message = message.unwrap().unwrap();
    let name = message.resource.as_ref().map(name_of).unwrap_or_default();
    (message.event(), message.revision, name)
}

async fn last(mut stream: Streaming<WaitAppliedResponse>) -> WaitAppliedResponse {
    let mut last = None;
    while let Some(message) =
        tokio::time::timeout(PATIENCE, stream.message()).await.unwrap().unwrap()
    {
        last = Some(message);
    }
    last.unwrap()
}

#[tokio::test]
async fn apply_get_list_delete() {
    let mut core = TestCore::start().await;
    let admin = &mut core.admin;
    let answer = admin.apply(vec![policy("b", "", 80), policy("a", "", 81)]).await.unwrap();
    let outcomes: Vec<_> = answer.changes.iter().map(|c| (c.name.as_str(), c.outcome())).collect();
    assert_eq!(outcomes, [("b", Outcome::Created), ("a", Outcome::Created)]);
    let first = OWN_COMMITS + 1;
    assert_eq!(answer.revision, first);
    assert_eq!(admin.names(Kind::FirewallPolicy).await, ["a", "b"]);
    assert_eq!(admin.policy("a").await.unwrap().metadata.unwrap().revision, first);

    let again = admin.apply(vec![policy("b", "", 80)]).await.unwrap();
    assert_eq!((again.revision, again.changes[0].outcome()), (first, Outcome::Unchanged));

    assert_eq!(admin.delete(Kind::FirewallPolicy, "b").await.unwrap(), first + 1);
    assert_eq!(admin.policy("b").await.unwrap_err().code(), Code::NotFound);
    let error = admin.delete(Kind::FirewallPolicy, "b").await.unwrap_err();
    assert_eq!(
        (error.code(), error.message()),
        (Code::NotFound, "FirewallPolicy b: does not exist")
    );
    core.stop().await;
}

#[tokio::test]
async fn bad_input_is_named_and_changes_nothing() {
    let mut core = TestCore::start().await;
    core.admin.apply(vec![policy("web", "", 80)]).await.unwrap();
    let before = core.admin.policy("web").await.unwrap();
    let error =
        core.admin.apply(vec![policy("new", "", 1), policy("web", "", 70_000)]).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert_eq!(
        error.message(),
        "FirewallPolicy web: spec.rules[0].ports[0]: 70000 is not a port: 0 to 65535"
    );
    let twice = core.admin.apply(vec![policy("x", "", 1), policy("x", "", 2)]).await.unwrap_err();
    assert_eq!(twice.code(), Code::InvalidArgument);
    let create = ApplyRequest {
        resources: vec![policy("web", "", 81)],
        mode: Mode::Create.into(),
        ..ApplyRequest::default()
    };
    let exists = core.admin.resources.apply(create).await.unwrap_err();
    assert_eq!(exists.code(), Code::AlreadyExists);
    let dry = ApplyRequest {
        resources: vec![policy("web", "", 81)],
        dry_run: true,
        ..ApplyRequest::default()
    };
    let preview = core.admin.resources.apply(dry).await.unwrap().into_inner();
    assert_eq!(
        (preview.revision, preview.changes[0].outcome()),
        (OWN_COMMITS + 1, Outcome::Updated)
    );
    assert_eq!(core.admin.policy("web").await.unwrap(), before);
    assert_eq!(core.admin.names(Kind::FirewallPolicy).await, ["web"]);
    core.stop().await;
}

#[tokio::test]
async fn watch_gives_the_set_then_each_change() {
    let mut core = TestCore::start().await;
    core.admin.apply(vec![policy("a", "", 1), policy("b", "", 1)]).await.unwrap();
    let request = WatchRequest { kind: Kind::FirewallPolicy.into(), name: String::new() };
    let mut all = core.admin.resources.watch(request).await.unwrap().into_inner();
    let request = WatchRequest { kind: Kind::FirewallPolicy.into(), name: "b".into() };
    let mut one = core.admin.resources.watch(request).await.unwrap().into_inner();
    let event = |event, nth, name: &str| (event, OWN_COMMITS + nth, name.to_owned());
    assert_eq!(next(&mut all).await, event(Event::Upsert, 1, "a"));
    assert_eq!(next(&mut all).await, event(Event::Upsert, 1, "b"));
    assert_eq!(next(&mut all).await, event(Event::Synced, 1, ""));
    assert_eq!(next(&mut one).await, event(Event::Upsert, 1, "b"));
    assert_eq!(next(&mut one).await, event(Event::Synced, 1, ""));
    core.admin.apply(vec![policy("a", "", 2)]).await.unwrap();
    core.admin.delete(Kind::FirewallPolicy, "b").await.unwrap();
    let mut seen = Vec::new();
    while seen.last() != Some(&event(Event::Delete, 3, "b")) {
        let change = next(&mut all).await;
        // The status of a policy may be told again at any time.
        if seen.last() != Some(&change) {
            seen.push(change);
        }
    }
    assert!(seen.contains(&event(Event::Upsert, 2, "a")), "{seen:?}");
    let mut last = next(&mut one).await;
    while last.0 == Event::Upsert && last.2 == "b" {
        last = next(&mut one).await;
    }
    assert_eq!(last, event(Event::Delete, 3, "b"));
    let stop = tokio::spawn(core.stop());
    let end = tokio::time::timeout(PATIENCE, async {
        loop {
            match all.message().await {
                Ok(Some(_)) => {}
                other => break other,
            }
        }
    });
    assert_eq!(end.await.unwrap().unwrap_err().code(), Code::Unavailable);
    stop.await.unwrap();
}

/// More changes than the ring holds pass while the watcher reads nothing; it still ends with the right set.
#[tokio::test]
async fn a_watcher_that_lagged_is_brought_up_to_date() {
    let mut core = TestCore::start().await;
    let request = WatchRequest { kind: Kind::FirewallPolicy.into(), name: String::new() };
    let mut watch = core.admin.resources.watch(request).await.unwrap().into_inner();
    assert_eq!(next(&mut watch).await.0, Event::Synced);
    // Large, so that the connection's window does not hold all of them.
    let large = |name: &str, port| {
        let mut resource = policy(name, "", port);
        let Some(resource::Resource::FirewallPolicy(policy)) = &mut resource.resource else {
            panic!("a policy")
        };
        let rule = &mut policy.spec.as_mut().unwrap().rules[0];
        rule.ports = vec![PortRange { first: port, last: 60_000 }; 256];
        resource
    };
    let all = |port| (0..600).map(|n| large(&format!("p{n:03}"), port)).collect::<Vec<_>>();
    for port in 1..=6 {
        core.admin.apply(all(port)).await.unwrap();
    }
    core.admin.delete(Kind::FirewallPolicy, "p007").await.unwrap();
    let last = core.admin.apply(vec![policy("p599", "", 99)]).await.unwrap().revision;
    let mut known: BTreeMap<String, i64> = BTreeMap::new();
    let mut messages = 0;
    let right = |known: &BTreeMap<String, i64>| {
        known.len() == 599 && !known.contains_key("p007") && known.get("p599") == Some(&last)
    };
    while !right(&known) {
        let (event, revision, name) = next(&mut watch).await;
        messages += 1;
        match event {
            Event::Upsert => known.insert(name, revision),
            Event::Delete => known.remove(&name),
            Event::Synced | Event::Unspecified => panic!("{event:?} a second time"),
        };
    }
    assert!(messages < 6 * 600, "it did not lag: {messages} messages");
    core.stop().await;
}

#[tokio::test]
async fn waiting_for_no_node_is_done_at_once_and_for_the_future_is_refused() {
    let mut core = TestCore::start().await;
    let request = WaitAppliedRequest::default();
    let answer = core.admin.resources.wait_applied(request).await.unwrap().into_inner();
    let end = last(answer).await;
    assert!(end.done && end.applied, "{end:?}");
    assert_eq!((end.nodes_applied, end.pending.len()), (0, 0));

    core.join("a", "role=web").await;
    let selector: BTreeMap<_, _> = [("role".to_owned(), "db".to_owned())].into();
    let request = WaitAppliedRequest { selector, ..WaitAppliedRequest::default() };
    let end = last(core.admin.resources.wait_applied(request).await.unwrap().into_inner()).await;
    assert!(end.done && end.applied, "{end:?}");

    let timeout = Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 });
    let request = WaitAppliedRequest { timeout, ..WaitAppliedRequest::default() };
    let end = last(core.admin.resources.wait_applied(request).await.unwrap().into_inner()).await;
    assert!(end.done && !end.applied, "{end:?}");
    assert_eq!(
        (end.pending[0].node.as_str(), end.pending[0].reason.as_str()),
        ("a", "Unreachable")
    );

    let request = WaitAppliedRequest { revision: 99, ..WaitAppliedRequest::default() };
    let error = core.admin.resources.wait_applied(request).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange);
    core.stop().await;
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_restart() {
    let mut core = TestCore::start().await;
    for n in 0..20 {
        core.admin.apply(vec![policy(&format!("p{n:02}"), "", n + 1)]).await.unwrap();
    }
    let last = core.admin.delete(Kind::FirewallPolicy, "p07").await.unwrap();
    let before = core.admin.policy("p19").await.unwrap();
    let mut core = core.restart().await;
    let names = core.admin.names(Kind::FirewallPolicy).await;
    assert_eq!(names.len(), 19);
    assert!(!names.contains(&"p07".to_owned()));
    let after = core.admin.policy("p19").await.unwrap();
    assert_eq!((after.metadata, after.spec), (before.metadata, before.spec));
    // The services of the core were withdrawn, and announced again.
    let next = core.admin.apply(vec![policy("next", "", 1)]).await.unwrap().revision;
    assert_eq!(next, last + 2 * OWN_COMMITS + 1);
    core.stop().await;
}

#[tokio::test]
async fn without_a_role_for_it_no_rpc_answers() {
    let mut core = TestCore::start().await;
    let joined = core.join("a", "").await;
    let anonymous = core.tls(None).await;
    let agent = core.tls(Some((&joined.certificate, &joined.key))).await;
    for channel in [anonymous, agent] {
        let mut resources = ResourceServiceClient::new(channel.clone());
        let error = resources.apply(ApplyRequest::default()).await.unwrap_err();
        assert_eq!(error.code(), Code::PermissionDenied);
        let mut health = HealthClient::new(channel);
        health.check(HealthCheckRequest::default()).await.unwrap();
    }
    core.stop().await;
}
