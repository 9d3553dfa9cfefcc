//! Calls to a service of this core that is stopped are refused, whoever calls.

use std::task::{Context, Poll};

use cnsmo_service::{
    host::Host,
    lifecycle::{Lifecycle, Phase},
};
use futures::future::{Either, Ready, ready};
use tonic::{
    Status,
    body::Body,
    codegen::http::{Request, Response},
};
use tower::{Layer, Service};

use crate::own;

/// Lets through what is for services that take calls. Streams that are open go on.
#[derive(Clone, Debug)]
pub struct GateLayer {
    lives: Vec<(String, Lifecycle)>,
}

impl GateLayer {
    /// Of the services that the host has now.
    pub fn new(host: &Host) -> Self {
        Self { lives: host.lives() }
    }
}

impl<S> Layer<S> for GateLayer {
    type Service = Gate<S>;

    fn layer(&self, inner: S) -> Gate<S> {
        Gate { inner, lives: self.lives.clone() }
    }
}

/// See [`GateLayer`].
#[derive(Clone, Debug)]
pub struct Gate<S> {
    inner: S,
    lives: Vec<(String, Lifecycle)>,
}

impl<S> Gate<S> {
    /// One that failed is started again within a moment: who calls meanwhile is served, or waits.
    fn refusal(&self, path: &str) -> Option<Status> {
        let service = own::service_of(path)?;
        let (_, life) = self.lives.iter().find(|(name, _)| name == service)?;
        let phase = life.phase();
        matches!(phase, Phase::Draining | Phase::Stopped).then(|| {
            Status::unavailable(format!("service {service} of this core is {phase} on request"))
        })
    }
}

impl<S> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, Ready<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self.refusal(request.uri().path()) {
            None => Either::Left(self.inner.call(request)),
            Some(status) => Either::Right(ready(Ok(status.into_http()))),
        }
    }
}
