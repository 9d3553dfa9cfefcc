//! What happened, told from the commits.

use cnsmo_proto::pb::{
    admin::{CompactRequest, admin_service_client::AdminServiceClient},
    catalog::{
        AnnounceRequest, Instance, Phase, WithdrawRequest,
        catalog_service_client::CatalogServiceClient,
    },
    event::{
        Event, WatchEventsRequest, WatchEventsResponse, event_service_client::EventServiceClient,
        watch_events_response::Message,
    },
    resource::Kind,
};
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::harness::{PATIENCE, TestCore, policy, unix};

struct Watcher {
    client: EventServiceClient<Channel>,
    catalog: CatalogServiceClient<Channel>,
    admin: AdminServiceClient<Channel>,
}

impl Watcher {
    async fn of(core: &TestCore) -> Self {
        let channel = unix(&core.folder.path().join("core.sock")).await.unwrap();
        Self {
            client: EventServiceClient::new(channel.clone()),
            catalog: CatalogServiceClient::new(channel.clone()),
            admin: AdminServiceClient::new(channel),
        }
    }

    async fn watch(
        &mut self,
        request: WatchEventsRequest,
    ) -> Result<Streaming<WatchEventsResponse>, Status> {
        self.client.watch_events(request).await.map(tonic::Response::into_inner)
    }

    /// All of the history that a request asks for.
    async fn told(&mut self, from_revision: i64, kinds: &[&str], name: &str) -> Vec<Event> {
        let kinds = kinds.iter().map(ToString::to_string).collect();
        let request = WatchEventsRequest { from_revision, kinds, name: name.into(), follow: false };
        let mut stream = self.watch(request).await.unwrap();
        let mut events = Vec::new();
        let mut synced = false;
        while let Some(message) = stream.message().await.unwrap() {
            match message.message.unwrap() {
                Message::Event(event) => events.push(event),
                Message::Synced(_) => synced = true,
            }
        }
        assert!(synced, "the end of history is told");
        events
    }

    async fn announce(&mut self, phase: Phase, reason: &str, message: &str) {
        let instance = Instance {
            service: "db".into(),
            name: "db-1".into(),
            node: "vm1".into(),
            phase: phase.into(),
            reason: reason.into(),
            message: message.into(),
            ..Instance::default()
        };
        let ttl = Some(prost_types::Duration { seconds: 600, nanos: 0 });
        let request = AnnounceRequest { instance: Some(instance), ttl, grace: None };
        self.catalog.announce(request).await.unwrap();
    }
}

fn shown(events: &[Event]) -> Vec<String> {
    let line = |event: &Event| format!("{}/{} {}", event.kind, event.name, event.what);
    events.iter().map(line).collect()
}

#[tokio::test]
async fn changes_are_told_in_order_with_who_and_why() {
    let mut core = TestCore::start().await;
    let mut watcher = Watcher::of(&core).await;
    let both = core.admin.apply(vec![policy("a", "", 80), policy("b", "", 80)]).await;
    let first = both.unwrap().revision;
    let second = core.admin.apply(vec![policy("a", "", 81)]).await.unwrap().revision;
    watcher.announce(Phase::Starting, "Installed", "").await;
    watcher.announce(Phase::Ready, "Healthy", "").await;
    watcher.announce(Phase::Failed, "Crashed", "signal 9").await;
    watcher
        .catalog
        .withdraw(WithdrawRequest { service: "db".into(), name: "db-1".into() })
        .await
        .unwrap();
    let last = core.admin.delete(Kind::FirewallPolicy, "b").await.unwrap();

    let told = watcher.told(first, &[], "").await;
    let expected = [
        "firewall-policy/a Created",
        "firewall-policy/b Created",
        "firewall-policy/a Updated",
        "instance/db/db-1 Starting",
        "instance/db/db-1 Ready",
        "instance/db/db-1 Failed",
        "instance/db/db-1 Deleted",
        "firewall-policy/b Deleted",
    ];
    assert_eq!(shown(&told), expected);
    assert!(told.is_sorted_by_key(|event| event.revision));
    assert!(told[0].by.starts_with("local/uid-") && told[0].time.is_some());
    let failed = &told[5];
    assert_eq!((failed.reason.as_str(), failed.message.as_str()), ("Crashed", "signal 9"));
    assert_eq!((failed.node.as_str(), failed.by.as_str()), ("vm1", ""));
    assert!(told[7].by == told[0].by && told[7].time.is_some());

    assert_eq!(watcher.told(second, &[], "").await, told[2..]);
    assert_eq!(watcher.told(first, &["instance"], "").await, told[3..7]);
    for about in ["vm1", "db", "db-1", "db/db-1"] {
        assert_eq!(watcher.told(0, &[], about).await, told[3..7], "{about}");
    }
    assert_eq!(watcher.told(0, &["firewall-policy"], "b").await.len(), 2);
    assert_eq!(watcher.told(last + 1, &[], "").await, [], "from the next one on");
    core.stop().await;
}

#[tokio::test]
async fn a_follower_is_told_what_happens_until_the_core_stops() {
    let mut core = TestCore::start().await;
    let mut watcher = Watcher::of(&core).await;
    let from_revision = core.admin.apply(vec![policy("a", "", 80)]).await.unwrap().revision;
    let request =
        WatchEventsRequest { from_revision, follow: true, ..WatchEventsRequest::default() };
    let mut stream = watcher.watch(request).await.unwrap();
    let mut next = async || {
        let message = tokio::time::timeout(PATIENCE, stream.message()).await.unwrap();
        message.map(|message| message.unwrap().message.unwrap())
    };
    assert!(matches!(next().await, Ok(Message::Event(event)) if event.name == "a"));
    assert!(matches!(next().await, Ok(Message::Synced(_))));
    core.admin.delete(Kind::FirewallPolicy, "a").await.unwrap();
    assert!(matches!(next().await, Ok(Message::Event(event)) if event.what == "Deleted"));
    core.stop().await;
    assert_eq!(next().await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn what_cannot_be_told_is_refused() {
    let mut core = TestCore::start().await;
    let mut watcher = Watcher::of(&core).await;
    core.admin.apply(vec![policy("a", "", 80)]).await.unwrap();
    let newest = core.admin.apply(vec![policy("a", "", 81)]).await.unwrap().revision;
    watcher.admin.compact(CompactRequest { revision: newest }).await.unwrap();
    let from = |from_revision| WatchEventsRequest { from_revision, ..Default::default() };
    for (request, code) in [
        (from(-1), Code::InvalidArgument),
        (from(1), Code::OutOfRange),
        (from(newest + 2), Code::OutOfRange),
        (WatchEventsRequest { kinds: vec!["pod".into()], ..from(0) }, Code::InvalidArgument),
    ] {
        let error = watcher.watch(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }
    assert_eq!(watcher.told(0, &[], "").await, [], "as much as there is");
    core.stop().await;
}
