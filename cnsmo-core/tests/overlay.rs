//! Networks and balancers.

use cnsmo_proto::pb::{
    agent::{
        Announcement, BalancerReport, ResourceError, StatusReport, Update, resource::Spec,
        update::Kind as UpdateKind,
    },
    balancer::BackendStatus,
    meta::{Condition, Metadata, condition::Status as Truth},
    node::{Node, NodeSpec, NodeStatus, OverlayStatus, PeerStatus, node_status::Phase},
    resource::{
        Kind, Resource, WaitAppliedRequest, WaitAppliedResponse, WatchRequest, resource,
        watch_response::Event,
    },
};
use tonic::Code;

use crate::harness::{Agent, Joined, PATIENCE, TestCore, balancer, network, policy};

fn announcement(key: u8, address: &str) -> Announcement {
    Announcement { tunnel_public_key: vec![key; 32], addresses: vec![address.into()] }
}

fn names(update: &Update) -> Vec<&str> {
    update.upserts.iter().map(|upsert| upsert.name.as_str()).collect()
}

fn condition(conditions: &[Condition]) -> (Truth, &str) {
    assert_eq!(conditions.len(), 1);
    (conditions[0].status(), &conditions[0].reason)
}

/// Nodes a (role=web) and b, connected, with an empty set.
async fn two(core: &mut TestCore) -> ([Joined; 2], [Agent; 2]) {
    let joined = [core.join("a", "role=web").await, core.join("b", "").await];
    let first = core.agent_at(&joined[0], None, Some(announcement(1, "192.0.2.1"))).await.unwrap();
    let second = core.agent_at(&joined[1], None, Some(announcement(2, "2001:db8::2"))).await;
    let mut agents = [first, second.unwrap()];
    for agent in &mut agents {
        let update = agent.update().await;
        agent.ack(&update).await;
    }
    (joined, agents)
}

/// The same, with a network, a policy and a balancer that both agents have acknowledged.
async fn two_in_network(core: &mut TestCore) -> ([Joined; 2], [Agent; 2]) {
    let (joined, mut agents) = two(core).await;
    let all = vec![balancer("front", "office"), policy("p", "", 80), network("office")];
    core.admin.apply(all).await.unwrap();
    for agent in &mut agents {
        let update = agent.update().await;
        agent.ack(&update).await;
    }
    (joined, agents)
}

async fn wait(core: &mut TestCore, revision: i64, millis: i32) -> WaitAppliedResponse {
    let timeout = Some(prost_types::Duration { seconds: 0, nanos: millis * 1_000_000 });
    let timeout = timeout.filter(|_| millis > 0);
    let request = WaitAppliedRequest { revision, timeout, ..WaitAppliedRequest::default() };
    let mut stream = core.admin.resources.wait_applied(request).await.unwrap().into_inner();
    let mut last = None;
    while let Some(message) =
        tokio::time::timeout(PATIENCE, stream.message()).await.unwrap().unwrap()
    {
        last = Some(message);
    }
    last.unwrap()
}

#[tokio::test]
async fn all_kinds_of_one_apply_arrive_as_one_update_and_one_acknowledgement_ends_the_wait() {
    let mut core = TestCore::start().await;
    let (_, mut agents) = two(&mut core).await;
    let all = vec![balancer("front", "office"), policy("p", "", 80), network("office")];
    let revision = core.admin.apply(all).await.unwrap().revision;
    let expected = [
        "backend/front/a",
        "firewall-policy/p",
        "load-balancer/front",
        "member/office/a",
        "member/office/b",
        "network/office",
    ];
    for agent in &mut agents {
        let update = agent.update().await;
        assert_eq!((update.kind(), update.revision), (UpdateKind::Delta, revision));
        assert_eq!(names(&update), expected);
        assert_eq!(update.upserts[2].version, revision);
        let Some(Spec::Member(b)) = &update.upserts[4].spec else { panic!() };
        assert_eq!((b.ipv4.as_str(), &b.public_key), ("10.70.0.2", &vec![2; 32]));
        assert_eq!(b.endpoints, ["[2001:db8::2]:51820"]);
        let Some(Spec::Member(a)) = &update.upserts[3].spec else { panic!() };
        assert_eq!(a.labels["role"], "web");
        agent.ack(&update).await;
    }
    let end = wait(&mut core, revision, 0).await;
    assert!(end.applied, "{end:?}");

    let office = core.admin.network("office").await.unwrap().status.unwrap();
    assert_eq!(office.members.len(), 2);
    assert_eq!(condition(&office.conditions), (Truth::True, "Applied"));
    let front = core.admin.balancer("front").await.unwrap().status.unwrap();
    assert_eq!(front.backends[0].ipv4, "10.70.0.1");
    assert_eq!(front.nodes.iter().map(|node| node.applied).collect::<Vec<_>>(), [true, true]);
    assert_eq!(condition(&front.conditions), (Truth::True, "Applied"));
    assert_eq!(core.admin.names(Kind::Network).await, ["office"]);
    assert_eq!(core.admin.names(Kind::LoadBalancer).await, ["front"]);
    core.stop().await;
}

#[tokio::test]
async fn a_rejected_balancer_is_rejected_alone_and_named() {
    let mut core = TestCore::start().await;
    let (_, mut agents) = two(&mut core).await;
    let all = vec![balancer("front", "office"), policy("p", "", 80), network("office")];
    let revision = core.admin.apply(all).await.unwrap().revision;
    let [a, b] = &mut agents;
    let update = b.update().await;
    b.ack(&update).await;
    let update = a.update().await;
    let name = "load-balancer/front".to_owned();
    let version = a.set.remove(&name).unwrap();
    let error = ResourceError { name, version, message: "no room".into() };
    a.answer(&update, "", vec![error]).await;
    core.admin.until_node("a", |node| node.status.as_ref().unwrap().reason == "Rejected").await;
    let end = wait(&mut core, revision, 1).await;
    assert!(end.done && !end.applied);
    assert_eq!((end.pending.len(), end.nodes_applied), (1, 1));
    assert_eq!(end.pending[0].message, "load-balancer/front: no room");
    let front = core.admin.balancer("front").await.unwrap().status.unwrap();
    assert_eq!(condition(&front.conditions), (Truth::False, "Rejected"));
    assert_eq!((front.nodes[0].applied, front.nodes[0].message.as_str()), (false, "no room"));
    assert!(front.nodes[1].applied);
    let office = core.admin.network("office").await.unwrap().status.unwrap();
    assert_eq!(condition(&office.conditions), (Truth::True, "Applied"));
    let policy = core.admin.policy("p").await.unwrap().status.unwrap();
    assert_eq!(condition(&policy.conditions), (Truth::True, "Applied"));
    core.stop().await;
}

#[tokio::test]
async fn a_restarted_core_gives_the_same_versions() {
    let mut core = TestCore::start().await;
    let (joined, agents) = two_in_network(&mut core).await;
    for name in ["a", "b"] {
        core.admin
            .until_node(name, |node| node.status.as_ref().unwrap().phase() == Phase::Ready)
            .await;
    }
    let mut core = core.restart().await;
    let mut again = Vec::new();
    for (joined, before) in joined.iter().zip(&agents) {
        let mut agent = core.agent(joined, Some(before.state())).await.unwrap();
        assert_eq!(agent.update().await.kind(), UpdateKind::Bookmark);
        agent.set = before.set.clone();
        again.push(agent);
    }
    // Of what comes next they get the difference.
    core.admin.apply(vec![policy("q", "", 1)]).await.unwrap();
    for agent in &mut again {
        assert_eq!(names(&agent.update().await), ["firewall-policy/q"]);
    }
    core.stop().await;
}

#[tokio::test]
async fn draining_a_node_changes_one_backend() {
    let mut core = TestCore::start().await;
    let (_, mut agents) = two_in_network(&mut core).await;
    let drain = |draining: bool, labels: &[(&str, &str)]| {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let metadata = Metadata { name: "a".into(), labels, ..Metadata::default() };
        let spec = draining.then_some(NodeSpec { draining });
        let node = Node { metadata: Some(metadata), spec, status: None };
        vec![Resource { resource: Some(resource::Resource::Node(node)) }]
    };
    core.admin.apply(drain(true, &[("role", "web")])).await.unwrap();
    for agent in &mut agents {
        let update = agent.update().await;
        assert_eq!(names(&update), ["backend/front/a"]);
        let Some(Spec::Backend(backend)) = &update.upserts[0].spec else { panic!() };
        assert!(backend.draining);
        agent.ack(&update).await;
    }
    let node = core.admin.node("a").await.unwrap();
    assert!(node.spec.unwrap().draining);
    let front = core.admin.balancer("front").await.unwrap().status.unwrap();
    assert!(front.backends[0].draining);
    // Labels without a spec leave it.
    core.admin.apply(drain(false, &[("role", "web"), ("zone", "1")])).await.unwrap();
    assert!(core.admin.node("a").await.unwrap().spec.unwrap().draining);
    core.stop().await;
}

#[tokio::test]
async fn an_announcement_reaches_the_peers() {
    let mut core = TestCore::start().await;
    let (joined, mut agents) = two_in_network(&mut core).await;
    let [a, b] = &mut agents;
    // What is inside the network cannot carry its tunnels.
    let mut moved = announcement(3, "198.51.100.3");
    moved.addresses.insert(0, "10.70.0.1".into());
    a.announce(moved).await;
    let update = b.update().await;
    assert_eq!(names(&update), ["member/office/a"]);
    let Some(Spec::Member(member)) = &update.upserts[0].spec else { panic!() };
    assert_eq!(
        (&member.public_key, &member.endpoints[..]),
        (&vec![3; 32], &["198.51.100.3:51820".to_owned()][..])
    );
    b.ack(&update).await;

    // A key of another node, and what is no announcement, end the stream with the reason.
    let error =
        core.agent_at(&joined[1], None, Some(announcement(3, "192.0.2.9"))).await.err().unwrap();
    assert_eq!(error.code(), Code::AlreadyExists);
    assert!(error.message().contains("that of Node a"), "{}", error.message());
    b.announce(announcement(4, "localhost")).await;
    let error = b.ended().await;
    assert_eq!(error.code(), Code::InvalidArgument);
    assert_eq!(error.message(), "announcement.addresses[0]: is not an IP address");

    // A VM that leaves takes its record along.
    let update = a.update().await;
    a.ack(&update).await;
    core.admin.delete(Kind::Node, "b").await.unwrap();
    assert_eq!(a.update().await.removals, ["member/office/b"]);
    core.stop().await;
}

#[tokio::test]
async fn reports_are_shown_on_balancers_and_nodes_and_members_to_watchers() {
    let mut core = TestCore::start().await;
    let request = WatchRequest { kind: Kind::Network.into(), name: "office".into() };
    let mut watch = core.admin.resources.watch(request).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().event(), Event::Synced);
    let (_, agents) = two_in_network(&mut core).await;
    let backend = BackendStatus {
        node: "a".into(),
        reason: "Unhealthy".into(),
        message: "connection refused".into(),
        flows: 7,
        ..BackendStatus::default()
    };
    let report =
        |name: &str| BalancerReport { load_balancer: name.into(), backends: vec![backend.clone()] };
    let overlay = OverlayStatus {
        network: "office".into(),
        backend: "engine".into(),
        peers: vec![PeerStatus { node: "x".repeat(5_000), ..PeerStatus::default() }; 1_000],
        ..OverlayStatus::default()
    };
    let node = Some(NodeStatus { overlay: Some(overlay), ..NodeStatus::default() });
    let load_balancers = vec![report("front"), report("unknown")];
    agents[1].report(StatusReport { node, load_balancers, ..StatusReport::default() }).await;
    let node =
        core.admin.until_node("b", |node| node.status.as_ref().unwrap().overlay.is_some()).await;
    let overlay = node.status.unwrap().overlay.unwrap();
    assert_eq!((overlay.backend.as_str(), overlay.peers.len()), ("engine", 256));
    assert_eq!(overlay.peers[0].node.len(), 1_024);
    let front = core.admin.balancer("front").await.unwrap().status.unwrap();
    assert_eq!(front.nodes[1].backends, [backend]);
    assert!(front.nodes[0].backends.is_empty());

    let applied = async {
        loop {
            let message = watch.message().await.unwrap().unwrap();
            let Some(resource::Resource::Network(office)) = message.resource.unwrap().resource
            else {
                panic!()
            };
            let status = office.status.unwrap();
            if status.members.len() == 2 && condition(&status.conditions).1 == "Applied" {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, applied).await.expect("the watcher is not told");
    core.stop().await;
}
