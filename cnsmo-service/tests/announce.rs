//! Announcing and waiting, against a catalogue in this process.

#![expect(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use cnsmo_proto::pb::catalog::{
    AnnounceRequest, AnnounceResponse, GetInstanceRequest, GetInstanceResponse, Instance,
    ListInstancesRequest, ListInstancesResponse, Phase, WatchInstancesRequest,
    WatchInstancesResponse, WithdrawRequest, WithdrawResponse,
    catalog_service_server::{CatalogService, CatalogServiceServer},
    watch_instances_response::Event,
};
use cnsmo_service::{
    announce::{Announcement, announce},
    lifecycle::{self, Lifecycle},
    needs,
    supervise::stop_pair,
};
use tokio::{
    net::TcpListener,
    sync::{broadcast, watch},
    time::Instant,
};
use tokio_stream::{
    Stream, StreamExt as _,
    wrappers::{BroadcastStream, TcpListenerStream},
};
use tonic::{
    Request, Response, Status,
    transport::{Channel, Endpoint, Server},
};

/// Keeps what is announced, and each phase that it was told of.
struct Catalogue {
    instances: Mutex<BTreeMap<String, Instance>>,
    told: watch::Sender<Vec<(String, Phase)>>,
    events: broadcast::Sender<WatchInstancesResponse>,
    refuse: Mutex<Vec<Status>>,
}

impl Catalogue {
    async fn serve() -> (Arc<Self>, Channel) {
        let catalogue = Arc::new(Self {
            instances: Mutex::default(),
            told: watch::Sender::default(),
            events: broadcast::Sender::new(1_024),
            refuse: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = CatalogServiceServer::from_arc(catalogue.clone());
        let server = Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        (catalogue, channel)
    }

    fn publish(&self, event: Event, instance: Option<Instance>) {
        let message = WatchInstancesResponse { event: event.into(), revision: 1, instance };
        let _ = self.events.send(message);
    }
}

type Events =
    std::pin::Pin<Box<dyn Stream<Item = Result<WatchInstancesResponse, Status>> + Send + 'static>>;

#[tonic::async_trait]
impl CatalogService for Catalogue {
    type WatchInstancesStream = Events;

    async fn announce(
        &self,
        request: Request<AnnounceRequest>,
    ) -> Result<Response<AnnounceResponse>, Status> {
        if let Some(status) = self.refuse.lock().unwrap().pop() {
            return Err(status);
        }
        let AnnounceRequest { instance, ttl, .. } = request.into_inner();
        let instance = instance.unwrap();
        let told = (instance.incarnation.clone(), instance.phase());
        self.told.send_if_modified(|all| {
            let is_new = all.last() != Some(&told);
            if is_new {
                all.push(told);
            }
            is_new
        });
        self.instances.lock().unwrap().insert(instance.service.clone(), instance.clone());
        self.publish(Event::Upsert, Some(instance.clone()));
        Ok(Response::new(AnnounceResponse { instance: Some(instance), ttl }))
    }

    async fn withdraw(
        &self,
        request: Request<WithdrawRequest>,
    ) -> Result<Response<WithdrawResponse>, Status> {
        let gone = self.instances.lock().unwrap().remove(&request.into_inner().service);
        self.publish(Event::Delete, gone);
        Ok(Response::new(WithdrawResponse { revision: 1 }))
    }

    async fn get_instance(
        &self,
        _: Request<GetInstanceRequest>,
    ) -> Result<Response<GetInstanceResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_instances(
        &self,
        _: Request<ListInstancesRequest>,
    ) -> Result<Response<ListInstancesResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn watch_instances(
        &self,
        request: Request<WatchInstancesRequest>,
    ) -> Result<Response<Events>, Status> {
        let service = request.into_inner().service;
        let instances = self.instances.lock().unwrap();
        let changes = BroadcastStream::new(self.events.subscribe());
        let set: Vec<_> = instances.get(&service).cloned().into_iter().collect();
        drop(instances);
        let upsert = |instance| WatchInstancesResponse {
            event: Event::Upsert.into(),
            revision: 1,
            instance: Some(instance),
        };
        let set = tokio_stream::iter(set.into_iter().map(upsert).map(Ok));
        let changes = changes.filter_map(move |change| {
            let change = change.ok()?;
            (change.instance.as_ref()?.service == service).then_some(Ok(change))
        });
        Ok(Response::new(Box::pin(set.chain(changes))))
    }
}

fn announcement(service: &str) -> Announcement {
    Announcement {
        service: service.into(),
        name: "a".into(),
        ttl: Duration::from_secs(1),
        ..Announcement::default()
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

#[tokio::test]
async fn all_phases_are_told_in_legal_steps_and_the_end_is_a_withdrawal() {
    let (catalogue, channel) = Catalogue::serve().await;
    catalogue.refuse.lock().unwrap().push(Status::unavailable("not yet"));
    let life = Lifecycle::new("Spawned");
    let (stopper, stop) = stop_pair();
    let announced = {
        let life = life.clone();
        tokio::spawn(async move { announce(channel, announcement("db"), &life, stop).await })
    };
    let mut told = catalogue.told.subscribe();
    let last = |phase| {
        move |told: &Vec<(String, Phase)>| told.last().is_some_and(|(_, last)| *last == phase)
    };
    told.wait_for(last(Phase::Installing)).await.unwrap();
    // Too short to be told one by one.
    for phase in [lifecycle::Phase::Starting, lifecycle::Phase::Ready, lifecycle::Phase::Draining] {
        life.step(phase, "Test", "").unwrap();
    }
    told.wait_for(last(Phase::Draining)).await.unwrap();
    let phases: Vec<_> = told.borrow().iter().map(|(_, phase)| *phase).collect();
    assert_eq!(phases, [Phase::Installing, Phase::Starting, Phase::Ready, Phase::Draining]);
    stopper.stop();
    announced.await.unwrap().unwrap();
    assert!(catalogue.instances.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_core_that_knows_another_story_is_told_a_new_life() {
    let (catalogue, channel) = Catalogue::serve().await;
    let life = Lifecycle::new("Spawned");
    let (_stopper, stop) = stop_pair();
    catalogue.refuse.lock().unwrap().push(Status::failed_precondition("cannot"));
    tokio::spawn(async move { announce(channel, announcement("db"), &life, stop).await });
    let mut told = catalogue.told.subscribe();
    told.wait_for(|told| told.len() == 1).await.unwrap();
}

#[tokio::test]
async fn what_may_never_be_announced_is_an_error() {
    let (catalogue, channel) = Catalogue::serve().await;
    catalogue.refuse.lock().unwrap().push(Status::permission_denied("not yours"));
    let (_stopper, stop) = stop_pair();
    let life = Lifecycle::new("Spawned");
    let error = announce(channel, announcement("db"), &life, stop).await.unwrap_err();
    assert_eq!(error.to_string(), "the core does not take the announcement of db/a");
}

/// Each service but the first needs the one before it; they are started in the order given.
async fn started_in(order: [usize; 4]) {
    const SERVICES: [&str; 4] = ["db", "cache", "api", "web"];
    let (catalogue, channel) = Catalogue::serve().await;
    let (_stopper, stop) = stop_pair();
    let started = Arc::new(Mutex::new(Vec::new()));
    let mut running = Vec::new();
    for index in order {
        let (channel, stop, started) = (channel.clone(), stop.clone(), started.clone());
        running.push(tokio::spawn(async move {
            let life = Lifecycle::new("Spawned");
            let service = SERVICES[index];
            let announcing = {
                let (channel, life) = (channel.clone(), life.clone());
                async move { announce(channel, announcement(service), &life, stop).await }
            };
            tokio::spawn(announcing);
            life.step(lifecycle::Phase::Starting, "Installed", "").unwrap();
            if index > 0 {
                needs::ready(&channel, &[SERVICES[index - 1]], soon()).await.unwrap();
            }
            started.lock().unwrap().push(index);
            life.step(lifecycle::Phase::Ready, "Healthy", "").unwrap();
        }));
        tokio::task::yield_now().await;
    }
    for service in running {
        service.await.unwrap();
    }
    assert_eq!(*started.lock().unwrap(), [0, 1, 2, 3], "started in the order {order:?}");
    drop(catalogue);
}

#[tokio::test]
async fn services_may_be_started_in_any_order() {
    let mut orders = 0;
    for a in 0..4 {
        for b in (0..4).filter(|b| *b != a) {
            for c in (0..4).filter(|c| ![a, b].contains(c)) {
                let d = 6 - a - b - c;
                started_in([a, b, c, d]).await;
                orders += 1;
            }
        }
    }
    assert_eq!(orders, 24);
}

#[tokio::test]
async fn a_need_that_is_not_met_says_what_was_seen() {
    let (catalogue, channel) = Catalogue::serve().await;
    let deadline = Instant::now() + Duration::from_millis(300);
    let error = needs::ready(&channel, &["db"], deadline).await.unwrap_err();
    assert_eq!(error.to_string(), "no instance of db is ready: there is none");
    let instance = Instance {
        service: "db".into(),
        name: "a".into(),
        phase: Phase::Starting.into(),
        ..Instance::default()
    };
    catalogue.instances.lock().unwrap().insert("db".into(), instance);
    let deadline = Instant::now() + Duration::from_millis(300);
    let error = needs::ready(&channel, &["db"], deadline).await.unwrap_err();
    assert_eq!(error.to_string(), "no instance of db is ready: a is starting");
}
