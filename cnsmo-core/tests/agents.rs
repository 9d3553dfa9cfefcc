//! Sessions of agents.

use std::time::Duration;

use cnsmo_core::fleet::{SET_TYPE, Timing};
use cnsmo_proto::pb::{
    agent::{PolicyCounters, ResourceError, StatusReport, TypeState, update::Kind as UpdateKind},
    meta::condition::Status as Truth,
    node::{Node, NodeStatus, node_status::Phase},
    policy::RuleCounter,
    resource::{Kind, WaitAppliedRequest},
};
use tonic::Code;

use crate::harness::{PATIENCE, TestCore, node_labels, policy};

fn phase(node: &Node) -> Phase {
    node.status.as_ref().unwrap().phase()
}

fn status(node: Node) -> NodeStatus {
    node.status.unwrap()
}

#[tokio::test]
async fn a_snapshot_then_deltas_of_what_selects_the_node() {
    let mut core = TestCore::start().await;
    let joined = core.join("web-1", "role=web").await;
    assert_eq!(phase(&core.admin.node("web-1").await.unwrap()), Phase::Joining);
    core.admin.apply(vec![policy("all", "", 1), policy("db", "role=db", 2)]).await.unwrap();

    let mut agent = core.agent(&joined, None).await.unwrap();
    let update = agent.update().await;
    assert_eq!((update.kind(), update.r#type.as_str()), (UpdateKind::Snapshot, SET_TYPE));
    assert_eq!(agent.set.keys().collect::<Vec<_>>(), ["firewall-policy/all"]);
    assert_eq!(phase(&core.admin.node("web-1").await.unwrap()), Phase::Degraded);
    agent.ack(&update).await;
    let node = core.admin.until_node("web-1", |node| phase(node) == Phase::Ready).await;
    assert_eq!(status(node).applied_revision, update.revision);

    core.admin
        .apply(vec![policy("web", "role=web", 80), policy("db", "role=db", 3)])
        .await
        .unwrap();
    let update = agent.update().await;
    assert_eq!(update.kind(), UpdateKind::Delta);
    assert_eq!(
        update.upserts.iter().map(|u| u.name.as_str()).collect::<Vec<_>>(),
        ["firewall-policy/web"]
    );
    agent.ack(&update).await;

    core.admin.delete(Kind::FirewallPolicy, "all").await.unwrap();
    let update = agent.update().await;
    assert_eq!(
        (update.kind(), &update.removals[..]),
        (UpdateKind::Delta, &["firewall-policy/all".to_owned()][..])
    );
    agent.ack(&update).await;
    core.admin.until_node("web-1", |node| phase(node) == Phase::Ready).await;
    core.stop().await;
}

#[tokio::test]
async fn changes_behind_an_unanswered_update_coalesce() {
    let mut core = TestCore::start().await;
    let joined = core.join("a", "").await;
    let mut agent = core.agent(&joined, None).await.unwrap();
    let first = agent.update().await;
    let mut revision = 0;
    for port in 1..=20 {
        revision = core.admin.apply(vec![policy("p", "", port)]).await.unwrap().revision;
    }
    core.admin.apply(vec![policy("short", "", 1)]).await.unwrap();
    core.admin.delete(Kind::FirewallPolicy, "short").await.unwrap();
    agent.ack(&first).await;
    let update = agent.update().await;
    assert_eq!(update.kind(), UpdateKind::Delta);
    let upserts: Vec<_> = update.upserts.iter().map(|u| (u.name.as_str(), u.version)).collect();
    assert_eq!((upserts, update.removals.len()), (vec![("firewall-policy/p", revision)], 0));
    assert!(update.nonce > first.nonce);
    agent.ack(&update).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Ready).await;
    core.stop().await;
}

#[tokio::test]
async fn a_rejected_policy_is_shown_and_not_sent_again() {
    let mut core = TestCore::start().await;
    let joined = core.join("a", "").await;
    let both = vec![policy("good", "", 1), policy("bad", "", 1)];
    let first = core.admin.apply(both).await.unwrap().revision;
    let mut agent = core.agent(&joined, None).await.unwrap();
    let update = agent.update().await;
    agent.ack(&update).await;

    let revision = core.admin.apply(vec![policy("bad", "", 2)]).await.unwrap().revision;
    let last_good = agent.set["firewall-policy/bad"];
    let update = agent.update().await;
    agent.set.insert("firewall-policy/bad".into(), last_good);
    let error = ResourceError {
        name: "firewall-policy/bad".into(),
        version: revision,
        message: "too many ports".into(),
    };
    agent.answer(&update, "", vec![error]).await;
    let node =
        core.admin.until_node("a", |node| node.status.as_ref().unwrap().reason == "Rejected").await;
    assert_eq!(phase(&node), Phase::Degraded);
    let node = status(node);
    assert!(node.message.contains("firewall-policy/bad: too many ports"), "{}", node.message);
    // Others may have committed something in between.
    assert!((first..revision).contains(&node.applied_revision));
    let bad = core.admin.policy("bad").await.unwrap().status.unwrap();
    assert_eq!(bad.conditions[0].status(), Truth::False);
    assert_eq!(bad.conditions[0].reason, "Rejected");
    assert!(bad.conditions[0].message.contains("too many ports"));
    assert!(!bad.nodes[0].applied);
    let good = core.admin.policy("good").await.unwrap().status.unwrap();
    assert!(good.nodes[0].applied);

    // A reconnect with the same set and a change of another policy do not bring it back.
    drop(agent.state());
    let (state, set) = (agent.state(), agent.set.clone());
    let mut agent = core.agent(&joined, Some(state)).await.unwrap();
    agent.set = set;
    let update = agent.update().await;
    assert_eq!(update.kind(), UpdateKind::Bookmark);
    core.admin.apply(vec![policy("good", "", 2)]).await.unwrap();
    let update = agent.update().await;
    assert_eq!(
        update.upserts.iter().map(|u| u.name.as_str()).collect::<Vec<_>>(),
        ["firewall-policy/good"]
    );
    assert_ne!(
        update.digest,
        agent.state().digest,
        "the set as sent has the rejected version in it"
    );
    agent.answer(&update, "", Vec::new()).await;

    // The next version is sent.
    core.admin.apply(vec![policy("bad", "", 3)]).await.unwrap();
    let update = agent.update().await;
    assert_eq!(update.upserts[0].name, "firewall-policy/bad");
    agent.ack(&update).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Ready).await;
    let bad = core.admin.policy("bad").await.unwrap().status.unwrap();
    assert_eq!(bad.conditions[0].status(), Truth::True);
    core.stop().await;
}

#[tokio::test]
async fn a_refused_delta_is_followed_by_one_snapshot() {
    let mut core = TestCore::start().await;
    let joined = core.join("a", "").await;
    let mut agent = core.agent(&joined, None).await.unwrap();
    let update = agent.update().await;
    agent.ack(&update).await;
    core.admin.apply(vec![policy("p", "", 1)]).await.unwrap();
    let update = agent.update().await;
    assert_eq!(update.kind(), UpdateKind::Delta);
    agent.set.clear();
    agent.answer(&update, "another base", Vec::new()).await;
    let update = agent.update().await;
    assert_eq!(update.kind(), UpdateKind::Snapshot);
    agent.set.clear();
    agent.answer(&update, "no room", Vec::new()).await;
    let node =
        core.admin.until_node("a", |node| node.status.as_ref().unwrap().message == "no room").await;
    assert_eq!(phase(&node), Phase::Degraded);
    // Not sent again until something changes.
    core.admin.apply(vec![policy("p", "", 2)]).await.unwrap();
    let update = agent.update().await;
    assert_eq!((update.kind(), update.nonce), (UpdateKind::Snapshot, 4));
    agent.ack(&update).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Ready).await;
    core.stop().await;
}

#[tokio::test]
async fn an_equal_digest_is_enough_after_a_restart_of_the_core() {
    let mut core = TestCore::start().await;
    let joined = core.join("a", "").await;
    core.admin.apply(vec![policy("p", "", 1)]).await.unwrap();
    let mut agent = core.agent(&joined, None).await.unwrap();
    let update = agent.update().await;
    agent.ack(&update).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Ready).await;
    let state = agent.state();

    let mut core = core.restart().await;
    assert_eq!(agent.ended().await.code(), Code::Unavailable);
    let mut agent = core.agent(&joined, Some(state)).await.unwrap();
    let update = agent.update().await;
    assert_eq!(update.kind(), UpdateKind::Bookmark);
    let node = core.admin.node("a").await.unwrap();
    assert_eq!(phase(&node), Phase::Ready);
    assert!(status(node).applied_revision >= update.revision);

    // A bookmark needs no answer.
    core.admin.apply(vec![policy("p", "", 2)]).await.unwrap();
    assert_eq!(agent.update().await.kind(), UpdateKind::Delta);
    core.stop().await;
}

#[tokio::test]
async fn a_refused_bookmark_is_followed_by_a_snapshot() {
    let mut core = TestCore::start().await;
    let joined = core.join("a", "").await;
    let nothing = TypeState { revision: 0, digest: vec![0; 32] };
    let mut agent = core.agent(&joined, Some(nothing)).await.unwrap();
    let update = agent.update().await;
    assert_eq!(update.kind(), UpdateKind::Bookmark);
    agent.answer(&update, "no set", Vec::new()).await;
    let update = agent.update().await;
    assert_eq!(update.kind(), UpdateKind::Snapshot);
    agent.ack(&update).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Ready).await;
    core.stop().await;
}

#[tokio::test]
async fn a_second_stream_of_one_agent_ends_the_first() {
    let mut core = TestCore::start().await;
    let joined = core.join("a", "").await;
    let mut first = core.agent(&joined, None).await.unwrap();
    first.update().await;
    let mut second = core.agent(&joined, None).await.unwrap();
    assert_eq!(first.ended().await.code(), Code::Aborted);
    let update = second.update().await;
    second.ack(&update).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Ready).await;
    core.stop().await;
}

#[tokio::test]
async fn new_labels_of_a_node_bring_other_policies() {
    let mut core = TestCore::start().await;
    let joined = core.join("a", "role=web").await;
    core.admin.apply(vec![policy("web", "role=web", 1), policy("db", "role=db", 2)]).await.unwrap();
    let mut agent = core.agent(&joined, None).await.unwrap();
    let update = agent.update().await;
    assert_eq!(agent.set.keys().collect::<Vec<_>>(), ["firewall-policy/web"]);
    agent.ack(&update).await;
    core.admin.apply(vec![node_labels("a", "role=db")]).await.unwrap();
    let update = agent.update().await;
    assert_eq!(update.removals, ["firewall-policy/web"]);
    assert_eq!(agent.set.keys().collect::<Vec<_>>(), ["firewall-policy/db"]);
    agent.ack(&update).await;
    let web = core.admin.policy("web").await.unwrap().status.unwrap();
    assert!(web.nodes.is_empty());
    assert_eq!(web.conditions[0].reason, "NoNodes");
    core.stop().await;
}

#[tokio::test]
async fn waiting_ends_with_the_last_acknowledgement() {
    let mut core = TestCore::start().await;
    let [a, b] = [core.join("a", "role=web").await, core.join("b", "role=web").await];
    let mut agents = Vec::new();
    for joined in [&a, &b] {
        let mut agent = core.agent(joined, None).await.unwrap();
        let update = agent.update().await;
        agent.ack(&update).await;
        agents.push(agent);
    }
    let revision = core.admin.apply(vec![policy("p", "role=web", 1)]).await.unwrap().revision;
    let request = WaitAppliedRequest { revision, ..WaitAppliedRequest::default() };
    let mut wait = core.admin.resources.wait_applied(request).await.unwrap().into_inner();
    let first = wait.message().await.unwrap().unwrap();
    assert!(!first.done && !first.applied);
    assert_eq!((first.nodes_applied, first.pending.len(), first.revision), (0, 2, revision));
    assert_eq!(first.pending[0].reason, "Pending");
    for agent in &mut agents {
        let update = agent.update().await;
        agent.ack(&update).await;
    }
    let end = tokio::time::timeout(PATIENCE, async {
        loop {
            let message = wait.message().await.unwrap().expect("it ends with done");
            if message.done {
                return message;
            }
        }
    });
    let end = end.await.unwrap();
    assert!(end.applied && end.pending.is_empty());
    assert_eq!(end.nodes_applied, 2);
    assert!(wait.message().await.unwrap().is_none());
    core.stop().await;
}

#[tokio::test]
async fn silence_makes_a_node_unreachable_and_a_word_brings_it_back() {
    let timing = Timing {
        heartbeat: Duration::from_millis(50),
        lease: Duration::from_millis(300),
        ..Timing::default()
    };
    let mut core = TestCore::start_with(timing).await;
    let joined = core.join("a", "").await;
    let mut agent = core.agent(&joined, None).await.unwrap();
    let update = agent.update().await;
    agent.ack(&update).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Unreachable).await;
    let revision = core.admin.apply(vec![policy("p", "", 1)]).await.unwrap().revision;
    let timeout = Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 });
    let request = WaitAppliedRequest { revision, timeout, ..WaitAppliedRequest::default() };
    let mut wait = core.admin.resources.wait_applied(request).await.unwrap().into_inner();
    let mut last = wait.message().await.unwrap().unwrap();
    while let Some(message) = wait.message().await.unwrap() {
        last = message;
    }
    assert!(last.done && !last.applied);
    assert_eq!(last.pending[0].reason, "Unreachable");

    let update = agent.update().await;
    agent.ack(&update).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Ready).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Unreachable).await;
    agent.heartbeat().await;
    core.admin.until_node("a", |node| phase(node) == Phase::Ready).await;
    core.stop().await;
}

#[tokio::test]
async fn drift_seen_in_a_heartbeat_is_repaired() {
    let mut core = TestCore::start().await;
    let joined = core.join("a", "").await;
    core.admin.apply(vec![policy("p", "", 1)]).await.unwrap();
    let mut agent = core.agent(&joined, None).await.unwrap();
    let update = agent.update().await;
    agent.ack(&update).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Ready).await;
    agent.set.clear();
    agent.heartbeat().await;
    let update = agent.update().await;
    assert_eq!(update.kind(), UpdateKind::Snapshot);
    assert_eq!(agent.set.len(), 1);
    agent.ack(&update).await;
    core.admin.until_node("a", |node| phase(node) == Phase::Ready).await;
    core.stop().await;
}

#[tokio::test]
async fn reports_are_shown_on_node_and_policy() {
    let mut core = TestCore::start().await;
    let joined = core.join("a", "").await;
    core.admin.apply(vec![policy("p", "", 1)]).await.unwrap();
    let mut agent = core.agent(&joined, None).await.unwrap();
    let update = agent.update().await;
    agent.ack(&update).await;
    let counter =
        RuleCounter { rule: "allow".into(), packets: 7, bytes: 700, ..RuleCounter::default() };
    let counters =
        |policy: &str| PolicyCounters { policy: policy.into(), rules: vec![counter.clone()] };
    let node = NodeStatus {
        phase: Phase::Unreachable.into(),
        applied_revision: 1_000_000,
        kernel: "6.18".into(),
        addresses: vec!["10.0.0.1".into(); 1_000],
        ..NodeStatus::default()
    };
    let policies = vec![counters("p"), counters("unknown")];
    agent.report(StatusReport { node: Some(node), policies, ..StatusReport::default() }).await;
    let node =
        core.admin.until_node("a", |node| node.status.as_ref().unwrap().kernel == "6.18").await;
    assert_eq!(phase(&node), Phase::Ready, "the agent's word on its phase does not count");
    let node = status(node);
    assert!(node.applied_revision < 1_000_000);
    assert_eq!(node.addresses.len(), 256);
    let policy = core.admin.policy("p").await.unwrap().status.unwrap();
    assert_eq!(policy.nodes[0].rules, [counter]);
    core.stop().await;
}

#[tokio::test]
async fn a_core_that_stops_asks_its_agents_to_return_at_different_times() {
    let mut core = TestCore::start().await;
    let mut agents = Vec::new();
    for name in ["a", "b"] {
        let joined = core.join(name, "").await;
        let mut agent = core.agent(&joined, None).await.unwrap();
        let first = agent.update().await;
        agent.ack(&first).await;
        agents.push(agent);
    }
    core.stop().await;
    let (first, second) = (agents[0].dismissed().await, agents[1].dismissed().await);
    assert_ne!(first, second);
    assert_eq!(agents[0].ended().await.code(), Code::Unavailable);
}
