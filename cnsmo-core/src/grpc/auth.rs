//! Who may call what: one table, and nothing outside it.

use std::task::{Context, Poll};

use futures::future::{Either, Ready, ready};
use tonic::{
    Status,
    body::Body,
    codegen::http::{Request, Response},
    transport::server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
};
use tower::{Layer, Service};

use crate::identity::AgentIdentity;

/// What a caller is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Came over the unix socket as root or as the core's own user.
    Admin,
    /// Has the certificate of an agent.
    Agent,
    /// Came over TLS without a certificate.
    Anonymous,
}

use Role::{Admin, Agent, Anonymous};

/// Every RPC, and who may call it.
pub const RULES: &[(&str, &[Role])] = &[
    ("/cnsmo.agent.v1.AgentService/Connect", &[Agent]),
    ("/cnsmo.bus.v1.BusService/DeleteGroup", &[Admin]),
    ("/cnsmo.bus.v1.BusService/ListMessages", &[Admin]),
    ("/cnsmo.bus.v1.BusService/ListStreams", &[Admin]),
    ("/cnsmo.bus.v1.BusService/Publish", &[Admin]),
    ("/cnsmo.bus.v1.BusService/Replay", &[Admin]),
    ("/cnsmo.bus.v1.BusService/Request", &[Admin]),
    ("/cnsmo.bus.v1.BusService/Subscribe", &[Admin]),
    ("/cnsmo.identity.v1.EnrollmentService/Enroll", &[Anonymous]),
    ("/cnsmo.identity.v1.JoinTokenService/CreateJoinToken", &[Admin]),
    ("/cnsmo.resource.v1.ResourceService/Apply", &[Admin]),
    ("/cnsmo.resource.v1.ResourceService/Delete", &[Admin]),
    ("/cnsmo.resource.v1.ResourceService/Get", &[Admin]),
    ("/cnsmo.resource.v1.ResourceService/List", &[Admin]),
    ("/cnsmo.resource.v1.ResourceService/WaitApplied", &[Admin]),
    ("/cnsmo.resource.v1.ResourceService/Watch", &[Admin]),
    ("/grpc.health.v1.Health/Check", &[Admin, Agent, Anonymous]),
    ("/grpc.health.v1.Health/Watch", &[Admin, Agent, Anonymous]),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", &[Admin]),
];

/// Whether `role` may call the RPC at `path`.
pub fn allows(role: Role, path: &str) -> bool {
    RULES.iter().any(|(rpc, roles)| *rpc == path && roles.contains(&role))
}

/// Lets through what the table allows.
#[derive(Clone, Copy, Debug)]
pub struct AuthLayer;

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth { inner }
    }
}

/// See [`AuthLayer`].
#[derive(Clone, Debug)]
pub struct Auth<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for Auth<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let refusal = match identify(&mut request) {
            None => Status::unauthenticated("the way of this connection proves no identity"),
            Some(role) if allows(role, request.uri().path()) => {
                return Either::Left(self.inner.call(request));
            }
            Some(role) => Status::permission_denied(format!(
                "{} is not allowed to the role {}",
                request.uri().path(),
                match role {
                    Admin => "admin",
                    Agent => "agent",
                    Anonymous => "anonymous",
                }
            )),
        };
        tracing::debug!(path = request.uri().path(), %refusal, "refused");
        Either::Right(ready(Ok(refusal.into_http())))
    }
}

/// The role of the caller; an agent's identity is left in the request's extensions.
fn identify(request: &mut Request<Body>) -> Option<Role> {
    if let Some(unix) = request.extensions().get::<UdsConnectInfo>() {
        let uid = unix.peer_cred.as_ref()?.uid();
        let own = nix::unistd::geteuid().as_raw();
        return (uid == 0 || uid == own).then_some(Admin);
    }
    let tls = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>()?;
    let Some(certificates) = tls.peer_certs() else { return Some(Anonymous) };
    let identity = AgentIdentity::from_certificate(certificates.first()?)?;
    request.extensions_mut().insert(identity);
    Some(Agent)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    /// Fails when an RPC is added without a rule, or a rule outlives its RPC.
    #[test]
    fn every_rpc_has_exactly_one_rule() {
        let sets = [
            cnsmo_proto::DESCRIPTORS,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        ];
        let mut rpcs = BTreeSet::new();
        for set in sets {
            for file in FileDescriptorSet::decode(set).unwrap().file {
                for service in &file.service {
                    for method in &service.method {
                        rpcs.insert(format!(
                            "/{}.{}/{}",
                            file.package(),
                            service.name(),
                            method.name()
                        ));
                    }
                }
            }
        }
        let rules: Vec<_> = RULES.iter().map(|(rpc, _)| (*rpc).to_owned()).collect();
        assert_eq!(rules.len(), rules.iter().collect::<BTreeSet<_>>().len(), "one rule per RPC");
        assert_eq!(rules.into_iter().collect::<BTreeSet<_>>(), rpcs);
    }

    #[test]
    fn what_is_not_in_the_table_is_refused() {
        for role in [Admin, Agent, Anonymous] {
            assert!(!allows(role, "/cnsmo.resource.v1.ResourceService/Unknown"));
            assert!(!allows(role, ""));
        }
        for (role, rpcs) in [(Agent, 3), (Anonymous, 3)] {
            assert_eq!(RULES.iter().filter(|(_, roles)| roles.contains(&role)).count(), rpcs);
        }
    }
}
