//! Who may call what: each request gets its [`Caller`], and passes if the table of rules lets its role call the RPC.

mod guard;
pub mod rules;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use futures::future::{Either, Ready, ready};
use http_body_util::BodyExt as _;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status,
    body::Body,
    codegen::http::{Request, Response},
    transport::server::UdsConnectInfo,
};
use tower::{Layer, Service};

use self::rules::Rule;
use super::listen::TlsInfo;
use crate::{
    audit::{Audit, Note},
    identity::{
        Peer,
        caller::Caller,
        registry::{Refusal, Registry},
    },
};

/// The one RPC that a certificate which has expired opens.
const RENEW: &str = "/cnsmo.identity.v1.IdentityService/Renew";

/// Lets through what the rules allow.
#[derive(Clone, Debug)]
pub struct AuthLayer {
    registry: Arc<Registry>,
    audit: Audit,
}

impl AuthLayer {
    /// Roles are looked up in `registry`; what matters is told to `audit`.
    pub fn new(registry: Arc<Registry>, audit: Audit) -> Self {
        Self { registry, audit }
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth { inner, registry: self.registry.clone(), audit: self.audit.clone() }
    }
}

/// Of a request whose body ends by itself and is small: it is read before a refusal is answered. An answer in the middle of
/// a body resets the stream, which some clients of HTTP/2 tell as an error in place of the answer (curl before 8).
#[derive(Clone, Copy, Debug)]
pub struct Whole;

/// For the rest of a refused request.
const PATIENCE: Duration = Duration::from_secs(2);

async fn drain(mut body: Body) {
    while let Some(Ok(_)) = body.frame().await {}
}

/// See [`AuthLayer`].
#[derive(Clone, Debug)]
pub struct Auth<S> {
    inner: S,
    registry: Arc<Registry>,
    audit: Audit,
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
        let (caller, cut, audited) = match authorize(&self.registry, &request) {
            Ok(authorized) => authorized,
            Err((caller, refusal)) => {
                self.audit.refused_call(caller.as_ref(), request.uri().path(), &refusal);
                if request.extensions().get::<Whole>().is_none() {
                    return Either::Left(Either::Right(ready(Ok(refusal.into_http()))));
                }
                return Either::Right(Box::pin(async move {
                    // Late is as good as never: who sends so slowly gets the answer before.
                    let _ = timeout(PATIENCE, drain(request.into_body())).await;
                    Ok(refusal.into_http())
                }));
            }
        };
        let audited = audited.map(|rule| (self.audit.clone(), caller.clone(), rule.rpc));
        request.extensions_mut().insert(caller);
        if cut.is_none() && audited.is_none() {
            return Either::Left(Either::Left(self.inner.call(request)));
        }
        if let Some(cut) = cut.clone() {
            request = request.map(|body| guard::request(body, cut));
        }
        let answer = self.inner.call(request);
        Either::Right(Box::pin(async move {
            let mut answer = answer.await?;
            if let Some((audit, caller, rpc)) = audited {
                let code = Status::from_header_map(answer.headers());
                let code = code.map_or(Code::Ok, |status| status.code());
                let note = answer.extensions_mut().remove::<Note>().unwrap_or_default();
                audit.call(&caller, rpc, code, note).await;
            }
            Ok(match cut {
                Some(cut) => answer.map(|body| guard::response(body, cut)),
                None => answer,
            })
        }))
    }
}

/// The caller as far as it is known, and why it is refused.
type Refused = (Option<Caller>, Status);
/// The caller, and what ends it.
type Identified = Result<(Caller, Option<CancellationToken>), Refused>;

/// The rule is given for calls that the audit shall have.
fn authorize(
    registry: &Registry,
    request: &Request<Body>,
) -> Result<(Caller, Option<CancellationToken>, Option<&'static Rule>), Refused> {
    let path = request.uri().path();
    let (caller, cut) = identify(registry, request, path)?;
    let rule = rules::rule_of(path).filter(|rule| rule.roles.contains(&caller.role));
    if let Some(rule) = rule {
        return Ok((caller, cut, rule.audited.then_some(rule)));
    }
    let role = caller.role.as_str();
    let refusal = Status::permission_denied(format!("{path} is not allowed to the role {role}"));
    Err((Some(caller), refusal))
}

fn identify(registry: &Registry, request: &Request<Body>, path: &str) -> Identified {
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

fn certified(registry: &Registry, peer: &Arc<Peer>, path: &str) -> Identified {
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
