//! The API: the same services behind two fronts, TLS for agents and a unix socket for the operators of this machine.

mod admin;
mod agent;
pub mod auth;
mod bus;
mod catalog;
mod event;
mod flow;
pub mod gate;
mod host;
pub mod identity;
mod impact;
pub mod listen;
mod quota;
mod resource;
mod state;

use std::{path::PathBuf, sync::Arc, time::Duration};

use cnsmo_proto::pb::{
    admin::admin_service_server::AdminServiceServer,
    bus::bus_service_server::{self, BusServiceServer},
    catalog::catalog_service_server::{self, CatalogServiceServer},
    event::event_service_server::EventServiceServer,
    flow::flow_service_server::FlowServiceServer,
    identity::{
        enrollment_service_server::{self, EnrollmentServiceServer},
        identity_service_server::{self, IdentityServiceServer},
        join_token_service_server::JoinTokenServiceServer,
    },
    resource::resource_service_server::ResourceServiceServer,
    service::host_service_server::{self, HostServiceServer},
    state::state_service_server::{self, StateServiceServer},
};
use cnsmo_service::host::{
    Host,
    front::{Front, Local},
};
use futures::{Stream, StreamExt as _, stream};
use tokio_util::sync::CancellationToken;
use tonic::{Status, service::Routes, transport::Server};
use tower::layer::util::{Identity, Stack};

use self::identity::Issuer;
use crate::{
    actor::Core, audit::Audit, bus::Bus, catalog::Catalog, cluster::Member, error::Error,
    http::HttpLayer, identity::registry::Registry, lease::Leases, links::Links, own, store::Store,
};

/// Largest message that the core takes.
pub const MESSAGE_BYTES_MAX: usize = 32 << 20;
/// Largest message of a service that anybody may call.
const ENROLL_BYTES_MAX: usize = 64 << 10;
/// Largest message about one service of a host.
const HOST_BYTES_MAX: usize = 16 << 10;
/// Calls at a time on one connection.
const STREAMS_MAX: u32 = 64;
/// A connection without traffic is asked for a sign of life this often, and closed if none comes.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Flow-control window: a large policy needs few round trips.
const WINDOW_BYTES: u32 = 1 << 20;

/// What the services stand on.
#[derive(Debug)]
pub struct Parts {
    /// This core.
    pub me: Member,
    /// Resources and agents.
    pub core: Core,
    /// Of certificates.
    pub issuer: Issuer,
    /// What was done and refused.
    pub audit: Audit,
    /// Keys.
    pub store: Store,
    /// Those of clients.
    pub leases: Leases,
    /// Instances of services.
    pub catalog: Catalog,
    /// Messages.
    pub bus: Bus,
    /// The services of this core.
    pub host: Host,
    /// Those who steer services of agents.
    pub links: Links,
    /// Folder with room for a backup.
    pub state_dir: PathBuf,
    /// Ends the streams that clients keep open.
    pub stopping: CancellationToken,
}

/// The services; both fronts serve them.
pub fn routes(parts: Parts) -> anyhow::Result<Routes> {
    let Parts {
        me,
        core,
        issuer,
        audit,
        store,
        leases,
        catalog,
        bus,
        host,
        links,
        state_dir,
        stopping,
    } = parts;
    let (_, health) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(cnsmo_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let resources = resource::Service::new(core.clone(), store.clone(), links.clone());
    let resources =
        ResourceServiceServer::new(resources).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let parts = agent::Parts { core: core.clone(), catalog: catalog.clone(), links: links.clone() };
    let agents = agent::Service::new(parts);
    let flows = flow::Service::new(core.clone(), links.clone(), stopping.clone());
    let hosts = Front(host::Hosts::new(Local::new(host, own::NODE), links));
    let hosts = HostServiceServer::new(hosts).max_decoding_message_size(HOST_BYTES_MAX);
    let identity = Arc::new(identity::Service::new(core.clone(), issuer, audit));
    let (watchers, catalogue_watchers) = (state::watchers(), catalog::watchers());
    let state = StateServiceServer::new(state::Service::new(
        store.clone(),
        leases.clone(),
        watchers.clone(),
        stopping.clone(),
    ))
    .max_decoding_message_size(state::MESSAGE_BYTES_MAX);
    let admin = admin::Service::new(admin::Parts {
        me,
        core,
        store: store.clone(),
        leases,
        catalog: catalog.clone(),
        bus: bus.clone(),
        watchers: [watchers, catalogue_watchers.clone()],
        state_dir,
    })?;
    let instances = CatalogServiceServer::new(catalog::Service::new(catalog, catalogue_watchers))
        .max_decoding_message_size(catalog::MESSAGE_BYTES_MAX);
    let enrolment = EnrollmentServiceServer::from_arc(identity.clone())
        .max_decoding_message_size(ENROLL_BYTES_MAX);
    let events = event::Service::new(store.clone(), stopping.clone());
    let buses = BusServiceServer::new(bus::Service::new(bus))
        .max_decoding_message_size(bus::MESSAGE_BYTES_MAX);
    let mut routes = Routes::builder();
    routes
        .add_service(health)
        .add_service(reflection)
        .add_service(resources)
        .add_service(agents)
        .add_service(buses)
        .add_service(enrolment)
        .add_service(hosts)
        .add_service(EventServiceServer::new(events))
        .add_service(FlowServiceServer::new(flows))
        .add_service(state)
        .add_service(AdminServiceServer::new(admin))
        .add_service(instances)
        .add_service(JoinTokenServiceServer::from_arc(identity.clone()))
        .add_service(
            IdentityServiceServer::from_arc(identity).max_decoding_message_size(ENROLL_BYTES_MAX),
        );
    Ok(routes.routes())
}

/// Largest message that a service takes.
pub fn request_bytes_max(service: &str) -> usize {
    match service {
        enrollment_service_server::SERVICE_NAME | identity_service_server::SERVICE_NAME => {
            ENROLL_BYTES_MAX
        }
        state_service_server::SERVICE_NAME => state::MESSAGE_BYTES_MAX,
        bus_service_server::SERVICE_NAME => bus::MESSAGE_BYTES_MAX,
        catalog_service_server::SERVICE_NAME => catalog::MESSAGE_BYTES_MAX,
        host_service_server::SERVICE_NAME => HOST_BYTES_MAX,
        _ => MESSAGE_BYTES_MAX,
    }
}

/// The messages of a stream until it ends, or until the core stops and the client is told.
fn until_stopped<T>(
    stream: impl Stream<Item = Result<T, Status>> + Unpin,
    stopping: CancellationToken,
) -> impl Stream<Item = Result<T, Status>> {
    stream::unfold((stream, Some(stopping)), |(mut stream, stopping)| async {
        let stopping = stopping?;
        tokio::select! {
            biased;
            () = stopping.cancelled() => Some((Err(Error::Stopped.into()), (stream, None))),
            message = stream.next() => Some((message?, (stream, Some(stopping)))),
        }
    })
}

/// What stands between HTTP and the services.
type Layers = Stack<gate::GateLayer, Stack<auth::AuthLayer, Stack<HttpLayer, Identity>>>;

/// HTTP as both fronts speak it. The request's role is checked before anything looks at its body.
pub fn server(
    http: HttpLayer,
    registry: &Arc<Registry>,
    audit: &Audit,
    gate: gate::GateLayer,
) -> Server<Layers> {
    Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .layer(http)
        .layer(auth::AuthLayer::new(registry.clone(), audit.clone()))
        .layer(gate)
}
