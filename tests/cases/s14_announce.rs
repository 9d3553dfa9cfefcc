//! The catalogue of a running core: who comes late sees what is there, and death is noticed.

use std::{
    collections::BTreeMap,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use cnsmo_proto::pb::catalog::{
    AnnounceRequest, Instance, Phase, WatchInstancesRequest, WatchInstancesResponse,
    catalog_service_client::CatalogServiceClient, watch_instances_response::Event,
};
use cnsmo_service::{
    announce::{Announcement, announce},
    lifecycle::{self, Lifecycle},
    needs,
    supervise::{Stop, stop_pair},
};
use cnsmo_tests::Process;
use tokio::{task::JoinSet, time::Instant};
use tonic::{Streaming, transport::Channel};

use super::programs::{Core, PATIENCE, in_time};

/// Each needs the one before it.
const SERVICES: [&str; 4] = ["db", "cache", "api", "web"];

/// A service that is a shell script: it announces itself over HTTP/JSON until it is killed.
fn script(core: &Core, name: &str, ttl: &str) -> Process {
    const SCRIPT: &str = r#"while :; do
        curl --silent --show-error --fail --unix-socket "$1" --json "$2" \
            http://core.cnsmo/cnsmo.catalog.v1.CatalogService/Announce
        sleep 0.2
    done"#;
    let announcement = serde_json::json!({
        "instance": {"service": "script", "name": name, "phase": "PHASE_READY", "reason": "Healthy", "incarnation": name},
        "ttl": ttl,
        "grace": "1s",
    });
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "sh"]).arg(core.socket()).arg(announcement.to_string());
    Process::spawn(name, &mut command, &core.folder().join(format!("{name}.log"))).unwrap()
}

struct Watch(Streaming<WatchInstancesResponse>);

impl Watch {
    async fn of(core: &Core, service: &str) -> Self {
        let request =
            WatchInstancesRequest { service: service.into(), ..WatchInstancesRequest::default() };
        let mut client = CatalogServiceClient::new(core.channel());
        Self(client.watch_instances(request).await.unwrap().into_inner())
    }

    async fn next(&mut self) -> (Event, String, Phase) {
        let message = in_time("a change in the catalogue", self.0.message()).await;
        let message = message.unwrap().expect("the stream ended");
        let instance = message.instance.clone().unwrap_or_default();
        (message.event(), instance.name.clone(), instance.phase())
    }

    /// The set as it is when the watch begins.
    async fn present(&mut self) -> BTreeMap<String, Phase> {
        let mut set = BTreeMap::new();
        loop {
            match self.next().await {
                (Event::Synced, ..) => return set,
                (Event::Upsert, name, phase) => assert_eq!(set.insert(name, phase), None),
                other => panic!("{other:?} before all that is there was told"),
            }
        }
    }
}

fn instance(service: &str, name: &str, phase: Phase) -> AnnounceRequest {
    let instance = Instance {
        service: service.into(),
        name: name.into(),
        phase: phase.into(),
        incarnation: "one".into(),
        ..Instance::default()
    };
    let ttl = prost_types::Duration { seconds: 600, nanos: 0 };
    AnnounceRequest { instance: Some(instance), ttl: Some(ttl), grace: None }
}

#[tokio::test]
async fn s14_who_comes_late_sees_what_is_there_and_then_each_change() {
    let core = Core::start("s14-late");
    let mut catalogue = CatalogServiceClient::new(core.channel());
    catalogue.announce(instance("db", "db-1", Phase::Starting)).await.unwrap();
    catalogue.announce(instance("db", "db-1", Phase::Ready)).await.unwrap();
    catalogue.announce(instance("other", "other-1", Phase::Ready)).await.unwrap();

    let mut late = Watch::of(&core, "db").await;
    assert_eq!(late.present().await, [("db-1".to_owned(), Phase::Ready)].into());
    for phase in [Phase::Degraded, Phase::Ready, Phase::Draining, Phase::Stopped] {
        catalogue.announce(instance("db", "db-1", phase)).await.unwrap();
    }
    catalogue.announce(instance("db", "db-2", Phase::Starting)).await.unwrap();
    for (name, phase) in [
        ("db-1", Phase::Degraded),
        ("db-1", Phase::Ready),
        ("db-1", Phase::Draining),
        ("db-1", Phase::Stopped),
        ("db-2", Phase::Starting),
    ] {
        assert_eq!(late.next().await, (Event::Upsert, name.to_owned(), phase));
    }
    // The present outlives the core.
    let mut core = core;
    core.kill();
    core.start_again();
    let mut later = Watch::of(&core, "db").await;
    let wanted = [("db-1".to_owned(), Phase::Stopped), ("db-2".to_owned(), Phase::Starting)];
    assert_eq!(later.present().await, wanted.into());
}

#[tokio::test]
async fn s14_a_killed_service_is_unreachable_within_its_lease_and_lost_later() {
    let core = Core::start("s14-kill");
    let mut watch = Watch::of(&core, "script").await;
    assert!(watch.present().await.is_empty());
    let mut short = script(&core, "short", "1s");
    assert_eq!(watch.next().await, (Event::Upsert, "short".into(), Phase::Ready));
    let mut long = script(&core, "long", "6s");
    assert_eq!(watch.next().await, (Event::Upsert, "long".into(), Phase::Ready));
    let _alive = script(&core, "alive", "6s");
    assert_eq!(watch.next().await, (Event::Upsert, "alive".into(), Phase::Ready));
    // Together: the shorter lease, and the grace time after it, end within the longer lease.
    short.kill().unwrap();
    long.kill().unwrap();
    for (name, phase) in [
        ("short", Phase::Unreachable),
        ("short", Phase::Lost),
        ("long", Phase::Unreachable),
        ("long", Phase::Lost),
    ] {
        assert_eq!(watch.next().await, (Event::Upsert, name.to_owned(), phase));
    }
    let mut present = Watch::of(&core, "script").await.present().await;
    assert_eq!(present.remove("alive"), Some(Phase::Ready), "it was not silent");
    // A fresh one takes its place.
    let _again = script(&core, "short", "1s");
    assert_eq!(watch.next().await, (Event::Upsert, "short".into(), Phase::Ready));
}

#[tokio::test(flavor = "multi_thread")]
async fn s14_services_become_ready_in_order_whatever_order_they_are_started_in() {
    let core = Core::start("s14-orders");
    let (_stopper, stop) = stop_pair();
    let mut orders = Vec::new();
    for a in 0..4 {
        for b in (0..4).filter(|b| *b != a) {
            for c in (0..4).filter(|c| ![a, b].contains(c)) {
                orders.push([a, b, c, 6 - a - b - c]);
            }
        }
    }
    assert_eq!(orders.len(), 24);
    let mut running = JoinSet::new();
    for order in orders {
        let (channel, stop) = (core.channel(), stop.clone());
        running.spawn(async move { (order, ready_order(&channel, order, &stop).await) });
    }
    while let Some(done) = running.join_next().await {
        let (order, ready) = done.unwrap();
        assert_eq!(ready, [0, 1, 2, 3], "started in the order {order:?}");
    }
    // Without the first, the second does not start.
    let deadline = Instant::now() + Duration::from_millis(500);
    let error = needs::ready(&core.channel(), &["absent"], deadline).await.unwrap_err();
    assert!(matches!(error, needs::Unmet::TimedOut { .. }), "{error}");
}

/// Starts the services in this order; returns in which order they became ready.
async fn ready_order(channel: &Channel, order: [usize; 4], stop: &Stop) -> Vec<usize> {
    let tag: String = order.iter().map(ToString::to_string).collect();
    let service = |index: usize| format!("{}-{tag}", SERVICES[index]);
    let became_ready = Arc::new(Mutex::new(Vec::new()));
    let mut services = JoinSet::new();
    for index in order {
        let (channel, stop) = (channel.clone(), stop.clone());
        let (name, need) = (service(index), index.checked_sub(1).map(service));
        let became_ready = became_ready.clone();
        services.spawn(async move {
            let life = Lifecycle::new("Spawned");
            let announcement = Announcement {
                service: name.clone(),
                name,
                ttl: PATIENCE,
                ..Announcement::default()
            };
            let announcing = {
                let (channel, life) = (channel.clone(), life.clone());
                async move { announce(channel, announcement, &life, stop).await }
            };
            tokio::spawn(announcing);
            life.step(lifecycle::Phase::Starting, "Installed", "").unwrap();
            if let Some(need) = need {
                needs::ready(&channel, &[&need], Instant::now() + PATIENCE).await.unwrap();
            }
            became_ready.lock().unwrap().push(index);
            life.step(lifecycle::Phase::Ready, "Healthy", "").unwrap();
        });
        tokio::task::yield_now().await;
    }
    services.join_all().await;
    let became_ready = became_ready.lock().unwrap();
    became_ready.clone()
}
