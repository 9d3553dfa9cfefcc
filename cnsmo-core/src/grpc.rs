//! The API: the same services behind two fronts, TLS for agents and a unix socket for the operators of this machine.

mod agent;
pub mod auth;
mod bus;
mod identity;
pub mod listen;
mod resource;

use std::{sync::Arc, time::Duration};

use cnsmo_proto::pb::{
    agent::agent_service_server::AgentServiceServer,
    bus::bus_service_server::BusServiceServer,
    identity::{
        enrollment_service_server::EnrollmentServiceServer,
        join_token_service_server::JoinTokenServiceServer,
    },
    resource::resource_service_server::ResourceServiceServer,
};
use tonic::{service::Routes, transport::Server};

use crate::{actor::Core, bus::Bus, identity::Ca};

/// Largest message that the core takes.
pub const MESSAGE_BYTES_MAX: usize = 32 << 20;
/// Largest message of a service that anybody may call.
const ENROLL_BYTES_MAX: usize = 64 << 10;
/// Calls at a time on one connection.
const STREAMS_MAX: u32 = 64;
/// A connection without traffic is asked for a sign of life this often, and closed if none comes.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Flow-control window: a large policy needs few round trips.
const WINDOW_BYTES: u32 = 1 << 20;

/// The services; both fronts serve them.
pub fn routes(core: &Core, bus: &Bus, ca: &Arc<Ca>) -> anyhow::Result<Routes> {
    let (_, health) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(cnsmo_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let resources = ResourceServiceServer::new(resource::Service::new(core.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX);
    let agents = AgentServiceServer::new(agent::Service::new(core.clone()))
        .max_decoding_message_size(MESSAGE_BYTES_MAX);
    let identity = Arc::new(identity::Service::new(core.clone(), ca.clone()));
    let enrolment = EnrollmentServiceServer::from_arc(identity.clone())
        .max_decoding_message_size(ENROLL_BYTES_MAX);
    let buses = BusServiceServer::new(bus::Service::new(bus.clone()))
        .max_decoding_message_size(bus::MESSAGE_BYTES_MAX);
    let mut routes = Routes::builder();
    routes
        .add_service(health)
        .add_service(reflection)
        .add_service(resources)
        .add_service(agents)
        .add_service(buses)
        .add_service(enrolment)
        .add_service(JoinTokenServiceServer::from_arc(identity));
    Ok(routes.routes())
}

/// HTTP/2 as both fronts speak it. The request's role is checked before anything else looks at it.
pub fn server() -> Server<tower::layer::util::Stack<auth::AuthLayer, tower::layer::util::Identity>>
{
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .layer(auth::AuthLayer)
}
