//! Who may call what: each request gets its [`Caller`], and passes if the table of rules lets its role call the RPC.

mod guard;
pub mod rules;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::SystemTime,
};

use futures::future::{Either, Ready, ready};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    body::Body,
    codegen::http::{Request, Response},
    transport::server::UdsConnectInfo,
};
use tower::{Layer, Service};

use super::listen::TlsInfo;
use crate::identity::{
    Peer,
    caller::Caller,
    registry::{Refusal, Registry},
};

/// The one RPC that a certificate which has expired opens.
const RENEW: &str = "/cnsmo.identity.v1.IdentityService/Renew";

/// Lets through what the rules allow.
#[derive(Clone, Debug)]
pub struct AuthLayer {
    registry: Arc<Registry>,
}

impl AuthLayer {
    /// Roles are looked up in `registry`.
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry }
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth { inner, registry: self.registry.clone() }
    }
}

/// See [`AuthLayer`].
#[derive(Clone, Debug)]
pub struct Auth<S> {
    inner: S,
    registry: Arc<Registry>,
}

type Boxed<T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send>>;

impl<S> Service<Request<Body>> for Auth<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<
        Either<S::Future, Ready<Result<S::Response, S::Error>>>,
        Boxed<S::Response, S::Error>,
    >;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let (caller, cut) = match authorize(&self.registry, &request) {
            Ok(authorized) => authorized,
            Err((caller, refusal)) => {
                let who = caller.as_ref().map_or("", |caller| &*caller.identity);
                tracing::debug!(path = request.uri().path(), who, %refusal, "refused");
                return Either::Left(Either::Right(ready(Ok(refusal.into_http()))));
            }
        };
        request.extensions_mut().insert(caller);
        let Some(cut) = cut else {
            return Either::Left(Either::Left(self.inner.call(request)));
        };
        let answer = self.inner.call(request.map(|body| guard::request(body, cut.clone())));
        Either::Right(Box::pin(
            async move { Ok(answer.await?.map(|body| guard::response(body, cut))) },
        ))
    }
}

/// The caller, and what ends it. An error carries the caller as far as it is known.
type Authorized = Result<(Caller, Option<CancellationToken>), (Option<Caller>, Status)>;

fn authorize(registry: &Registry, request: &Request<Body>) -> Authorized {
    let path = request.uri().path();
    let (caller, cut) = identify(registry, request, path)?;
    let may = rules::rule_of(path).is_some_and(|rule| rule.roles.contains(&caller.role));
    if may {
        return Ok((caller, cut));
    }
    let role = caller.role.as_str();
    let refusal = Status::permission_denied(format!("{path} is not allowed to the role {role}"));
    Err((Some(caller), refusal))
}

fn identify(registry: &Registry, request: &Request<Body>, path: &str) -> Authorized {
    let unproven = || Status::unauthenticated("the way of this connection proves no identity");
    if let Some(unix) = request.extensions().get::<UdsConnectInfo>() {
        let uid = unix.peer_cred.as_ref().map(tokio::net::unix::UCred::uid);
        let uid = uid.ok_or_else(|| (None, unproven()))?;
        if uid == 0 || uid == nix::unistd::geteuid().as_raw() {
            return Ok((Caller::local(uid), None));
        }
        return Err((None, unproven()));
    }
    let tls = request.extensions().get::<TlsInfo>().ok_or_else(|| (None, unproven()))?;
    match &tls.peer {
        None => Ok((Caller::anonymous(), None)),
        Some(peer) => certified(registry, peer, path),
    }
}

fn certified(registry: &Registry, peer: &Arc<Peer>, path: &str) -> Authorized {
    let now = SystemTime::now();
    let refused = |refusal: Refusal| {
        let text = format!("{}: {refusal}", peer.identity);
        let status = match refusal {
            Refusal::Expired | Refusal::Outlived => Status::unauthenticated(text),
            Refusal::Unknown | Refusal::OtherKey | Refusal::Revoked => {
                Status::permission_denied(text)
            }
        };
        (Some(Caller::unproven(peer.clone())), status)
    };
    if path == RENEW {
        let role = registry.renewable(peer, now).map_err(refused)?;
        return Ok((Caller::certified(peer.clone(), role, Arc::default()), None));
    }
    let standing = registry.standing(peer, now).map_err(refused)?;
    let caller = Caller::certified(peer.clone(), standing.role, standing.grants);
    Ok((caller, Some(standing.cut)))
}
