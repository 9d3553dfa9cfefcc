//! The services of a core and of its agents, steered by name.

use std::time::Duration;

use cnsmo_core::fleet::Timing;
use cnsmo_proto::pb::{
    agent::{
        CommandResult, InstanceReport, command::Command, command_result::Result as Outcome,
        connect_request::Message as Up,
    },
    bus::{Message, PublishRequest, bus_service_client::BusServiceClient},
    catalog::{
        AnnounceRequest, Instance, ListInstancesRequest, Phase, WatchInstancesRequest,
        catalog_service_client::CatalogServiceClient, watch_instances_response::Event,
    },
    service::{
        GetFeaturesRequest, GetStatusRequest, KillRequest, ListServicesRequest, RestartRequest,
        ServiceId, ServiceStatus, StartRequest, StopRequest,
        host_service_client::HostServiceClient,
    },
    state::{GetRequest, Op, Put, TxnRequest, op, state_service_client::StateServiceClient},
};
use tonic::{Code, Status, transport::Channel};

use crate::harness::{Agent, PATIENCE, TestCore, unix};

const SERVICES: [&str; 5] = ["bus", "catalogue", "identity", "orchestrator", "state"];

struct Client {
    hosts: HostServiceClient<Channel>,
    catalog: CatalogServiceClient<Channel>,
    state: StateServiceClient<Channel>,
    bus: BusServiceClient<Channel>,
}

fn id(node: &str, service: &str) -> Option<ServiceId> {
    Some(ServiceId { node: node.into(), service: service.into(), instance: String::new() })
}

impl Client {
    async fn of(core: &TestCore) -> Self {
        let channel = unix(&core.folder.path().join("core.sock")).await.unwrap();
        Self {
            hosts: HostServiceClient::new(channel.clone()),
            catalog: CatalogServiceClient::new(channel.clone()),
            state: StateServiceClient::new(channel.clone()),
            bus: BusServiceClient::new(channel),
        }
    }

    async fn list(&mut self, node: &str) -> Result<Vec<ServiceStatus>, Status> {
        let request = ListServicesRequest { node: node.into() };
        Ok(self.hosts.list_services(request).await?.into_inner().services)
    }

    async fn status(&mut self, service: &str) -> ServiceStatus {
        let request = GetStatusRequest { id: id("core", service) };
        self.hosts.get_status(request).await.unwrap().into_inner().status.unwrap()
    }

    async fn start(&mut self, service: &str) -> Result<(), Status> {
        self.hosts.start(StartRequest { id: id("core", service) }).await.map(drop)
    }

    async fn stop(&mut self, node: &str, service: &str) -> Result<ServiceStatus, Status> {
        let request = StopRequest { id: id(node, service), deadline: None };
        Ok(self.hosts.stop(request).await?.into_inner().status.unwrap())
    }

    async fn put(&mut self, key: &str) -> Result<(), Status> {
        let put = Put { key: key.into(), ..Put::default() };
        let success = vec![Op { op: Some(op::Op::Put(put)) }];
        self.state.txn(TxnRequest { success, ..TxnRequest::default() }).await.map(drop)
    }

    async fn publish(&mut self) -> Result<(), Status> {
        let message = Message { subject: "a.b".into(), ..Message::default() };
        let request = PublishRequest { message: Some(message), ..PublishRequest::default() };
        self.bus.publish(request).await.map(drop)
    }

    async fn instances(&mut self, node: &str) -> Vec<Instance> {
        let request = ListInstancesRequest { node: node.into(), ..ListInstancesRequest::default() };
        self.catalog.list_instances(request).await.unwrap().into_inner().instances
    }

    /// Waits until the instances of a node, but for its agent, are in these phases.
    async fn until(&mut self, node: &str, expected: &[(&str, Phase)]) {
        let mut seen = Vec::new();
        let wait = async {
            while seen != expected.iter().map(|(s, p)| ((*s).to_owned(), *p)).collect::<Vec<_>>() {
                tokio::time::sleep(Duration::from_millis(10)).await;
                let all = self.instances(node).await.into_iter().filter(|i| i.service != "agent");
                seen = all.map(|i| (i.service.clone(), i.phase())).collect();
            }
        };
        let ended = tokio::time::timeout(PATIENCE, wait).await;
        ended.unwrap_or_else(|_| panic!("{seen:?} are not {expected:?}"));
    }
}

#[tokio::test]
async fn a_service_of_the_core_that_is_killed_fails_and_is_back_while_the_others_go_on() {
    let core = TestCore::start().await;
    let mut client = Client::of(&core).await;
    let listed = client.list("core").await.unwrap();
    let names: Vec<_> = listed.iter().map(|s| s.id.clone().unwrap().service).collect();
    assert_eq!(names, SERVICES);
    assert!(listed.iter().all(|s| s.phase() == Phase::Ready && s.pid == std::process::id()));
    let instances = client.instances("core").await;
    assert_eq!(instances.iter().map(|i| &*i.service).collect::<Vec<_>>(), SERVICES);
    assert!(instances.iter().all(|i| i.phase() == Phase::Ready && i.owner == "core"));

    for service in SERVICES {
        let request = WatchInstancesRequest { service: service.into(), ..Default::default() };
        let mut watch = client.catalog.watch_instances(request).await.unwrap().into_inner();
        while watch.message().await.unwrap().unwrap().event() != Event::Synced {}
        client.hosts.kill(KillRequest { id: id("core", service) }).await.unwrap();
        client.put("k").await.unwrap();
        client.publish().await.unwrap();
        let mut phases = Vec::new();
        while phases.last() != Some(&Phase::Ready) {
            let next = tokio::time::timeout(PATIENCE, watch.message()).await.unwrap();
            phases.push(next.unwrap().unwrap().instance.unwrap().phase());
        }
        assert_eq!(phases, [Phase::Failed, Phase::Starting, Phase::Ready], "{service}");
        assert_eq!(client.status(service).await.restarts, 1, "{service}");
    }
    core.stop().await;
}

#[tokio::test]
async fn a_service_of_the_core_that_is_stopped_takes_no_calls_and_says_so() {
    let core = TestCore::start().await;
    let mut client = Client::of(&core).await;
    assert_eq!(client.stop("core", "state").await.unwrap().phase(), Phase::Stopped);
    client
        .until(
            "core",
            &[
                ("bus", Phase::Ready),
                ("catalogue", Phase::Ready),
                ("identity", Phase::Ready),
                ("orchestrator", Phase::Ready),
                ("state", Phase::Stopped),
            ],
        )
        .await;
    let refused = client.put("k").await.unwrap_err();
    let text = "service state of this core is stopped on request";
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, text));
    client.publish().await.unwrap();

    let again = client.stop("core", "state").await.unwrap_err();
    let text = "service state: a service cannot go from stopped to draining";
    assert_eq!((again.code(), again.message()), (Code::FailedPrecondition, text));
    client.start("state").await.unwrap();
    client.put("k").await.unwrap();
    let get = GetRequest { key: "k".into(), min_revision: 0 };
    assert!(client.state.get(get).await.unwrap().into_inner().kv.is_some());
    let again = client.start("state").await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);

    // What happens while the catalogue stands still is in it afterwards, in order.
    client.stop("core", "catalogue").await.unwrap();
    let list = client.catalog.list_instances(ListInstancesRequest::default()).await;
    assert_eq!(list.unwrap_err().code(), Code::Unavailable);
    let restart = RestartRequest { id: id("core", "bus"), deadline: None };
    client.hosts.restart(restart).await.unwrap();
    client.start("catalogue").await.unwrap();
    client.until("core", &SERVICES.map(|service| (service, Phase::Ready))).await;

    let unknown = client.stop("core", "vpn").await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let absent = client.stop("vm1", "vpn").await.unwrap_err();
    let text = "node vm1 is not connected to this core";
    assert_eq!((absent.code(), absent.message()), (Code::Unavailable, text));
    for service in ["state", "vpn", "orchestrator"] {
        let instance = Instance {
            service: service.into(),
            name: "x".into(),
            phase: Phase::Ready.into(),
            ..Instance::default()
        };
        let request = AnnounceRequest { instance: Some(instance), ttl: None, grace: None };
        let denied = client.catalog.announce(request).await.unwrap_err();
        assert_eq!(denied.code(), Code::PermissionDenied, "{denied}");
    }
    core.stop().await;
}

fn instance(service: &str, phase: Phase) -> Instance {
    let name = "vm1".to_owned();
    Instance { service: service.into(), name, phase: phase.into(), ..Instance::default() }
}

async fn report(agent: &Agent, complete: bool, instances: Vec<Instance>, removed: &[&str]) {
    let removed = removed.iter().map(ToString::to_string).collect();
    agent.say(Up::Instances(InstanceReport { complete, instances, removed })).await;
}

#[tokio::test]
async fn what_an_agent_reports_is_in_the_catalogue_as_long_as_the_agent_is_heard_of() {
    let lease = Duration::from_millis(600);
    let timing = Timing { heartbeat: Duration::from_millis(100), lease, ..Timing::default() };
    let mut core = TestCore::start_with(timing).await;
    let mut client = Client::of(&core).await;
    let joined = core.join("vm1", "").await;
    let agent = core.agent(&joined, None).await.unwrap();
    let mut foreign = instance("state", Phase::Ready);
    foreign.node = "vm2".into();
    let first = vec![instance("vpn", Phase::Ready), instance("firewall", Phase::Starting), foreign];
    report(&agent, true, first, &[]).await;
    // In order, also steps that would not be legal for one who announces itself.
    let firewall = |phase| instance("firewall", phase);
    report(&agent, false, vec![firewall(Phase::Ready), firewall(Phase::Stopped)], &[]).await;
    client.until("vm1", &[("firewall", Phase::Stopped), ("vpn", Phase::Ready)]).await;
    let kept = client.instances("vm1").await;
    assert!(kept.iter().filter(|i| i.service != "agent").all(|i| i.owner == "agent/vm1"));
    report(&agent, false, vec![firewall(Phase::Starting)], &["vpn/vm1"]).await;
    client.until("vm1", &[("firewall", Phase::Starting)]).await;
    report(&agent, false, vec![instance("vpn", Phase::Ready)], &[]).await;
    client.until("vm1", &[("firewall", Phase::Starting), ("vpn", Phase::Ready)]).await;

    // Silence makes all of them unreachable; a sign of life on the same stream brings them back.
    let lost = [("firewall", Phase::Unreachable), ("vpn", Phase::Unreachable)];
    client.until("vm1", &lost).await;
    agent.heartbeat().await;
    client.until("vm1", &[("firewall", Phase::Starting), ("vpn", Phase::Ready)]).await;
    drop(agent);
    client.until("vm1", &lost).await;
    let agent = core.agent(&joined, None).await.unwrap();
    report(&agent, true, vec![firewall(Phase::Ready)], &[]).await;
    client.until("vm1", &[("firewall", Phase::Ready)]).await;
    core.admin.delete(cnsmo_proto::pb::resource::Kind::Node, "vm1").await.unwrap();
    client.until("vm1", &[]).await;
    core.stop().await;
}

#[tokio::test]
async fn an_agent_is_asked_over_its_stream() {
    let mut core = TestCore::start().await;
    let mut client = Client::of(&core).await;
    let joined = core.join("vm1", "").await;
    let mut agent = core.agent(&joined, None).await.unwrap();
    let vpn = ServiceStatus {
        id: id("vm1", "vpn"),
        phase: Phase::Stopped.into(),
        ..ServiceStatus::default()
    };
    let asking = tokio::spawn({
        let mut hosts = client.hosts.clone();
        let request = StopRequest { id: id("vm1", "vpn"), deadline: None };
        async move { hosts.stop(request).await.map(tonic::Response::into_inner) }
    });
    let (number, command) = agent.command().await;
    let Command::Stop(request) = command else { panic!("{command:?}") };
    assert_eq!(request.id, id("vm1", "vpn"));
    // An answer to a question that nobody has asked is nobody's.
    let answer =
        |id, result| Up::Result(Box::new(CommandResult { id, result, ..Default::default() }));
    agent.say(answer(number + 7, None)).await;
    agent.say(answer(number, Some(Outcome::Status(vpn.clone())))).await;
    assert_eq!(asking.await.unwrap().unwrap().status, Some(vpn));

    let asking = tokio::spawn({
        let mut hosts = client.hosts.clone();
        let request = GetFeaturesRequest { id: id("vm1", "vpn") };
        async move { hosts.get_features(request).await.map(drop) }
    });
    let (id, command) = agent.command().await;
    assert!(matches!(command, Command::Features(_)));
    let refused = CommandResult {
        id,
        code: i32::from(Code::FailedPrecondition).unsigned_abs(),
        message: "service vpn: no".into(),
        result: None,
    };
    agent.say(Up::Result(Box::new(refused))).await;
    let error = asking.await.unwrap().unwrap_err();
    let text = "node vm1: service vpn: no";
    assert_eq!((error.code(), error.message()), (Code::FailedPrecondition, text));

    let asking = tokio::spawn({
        let mut hosts = client.hosts.clone();
        async move { hosts.list_services(ListServicesRequest { node: "vm1".into() }).await.map(drop) }
    });
    agent.command().await;
    drop(agent);
    let lost = asking.await.unwrap().unwrap_err();
    assert_eq!(lost.code(), Code::Unavailable, "{lost}");
    assert_eq!(client.list("").await.unwrap().len(), SERVICES.len(), "of those that are there");
    core.stop().await;
}
