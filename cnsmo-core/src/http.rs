//! The API by HTTP and JSON, for clients without gRPC: `POST /<package.Service>/<Method>` with the canonical JSON of the
//! request (<https://protobuf.dev/programming-guides/json>).
//!
//! [`HttpLayer`] turns such a call into the gRPC call that it stands for, and the answer back, by the descriptors alone.
//! Authorisation, limits and handlers are those of gRPC and see no difference. The two pages have the rules of RPCs:
//! `GET /healthz` that of the health check, `GET /openapi.json` that of reflection, which tells the same.

mod json;
mod openapi;
mod request;
mod response;
mod status;

use std::{
    collections::HashMap,
    future::ready,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::future::{BoxFuture, Either};
use prost_reflect::{DescriptorError, DescriptorPool, MessageDescriptor, MethodDescriptor};
use tonic::{
    Status,
    body::Body,
    codegen::http::{
        HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri,
        header::{
            ACCEPT_ENCODING, ALLOW, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, TE,
            TRANSFER_ENCODING,
        },
    },
};
use tower::{Layer, Service};

use crate::grpc::auth::Whole;

/// Larger messages are converted on a thread of their own, so that they do not hold up other tasks.
const INLINE_BYTES_MAX: usize = 64 << 10;

const HEALTH_PAGE: &str = "/healthz";
const DESCRIPTION_PAGE: &str = "/openapi.json";
const HEALTH_RPC: &str = "/grpc.health.v1.Health/Check";
const REFLECTION_RPC: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// Takes HTTP/JSON calls beside gRPC.
#[derive(Clone, Debug)]
pub struct HttpLayer {
    api: Arc<Api>,
}

impl HttpLayer {
    /// For the services of this core.
    ///
    /// # Errors
    /// The descriptors that were compiled in contradict themselves.
    pub fn new() -> Result<Self, DescriptorError> {
        Ok(Self { api: Arc::new(Api::new()?) })
    }
}

impl<S> Layer<S> for HttpLayer {
    type Service = Http<S>;

    fn layer(&self, inner: S) -> Http<S> {
        Http { inner, api: self.api.clone() }
    }
}

/// See [`HttpLayer`].
#[derive(Clone, Debug)]
pub struct Http<S> {
    inner: S,
    api: Arc<Api>,
}

impl<S> Service<Request<Body>> for Http<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, BoxFuture<'static, Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if is_grpc(request.headers()) {
            return Either::Left(self.inner.call(request));
        }
        match self.api.translate(request) {
            Ok((request, answer)) => {
                let call = self.inner.call(request);
                Either::Right(Box::pin(async move { Ok(answer.translate(call.await?).await) }))
            }
            Err(refusal) => Either::Right(Box::pin(ready(Ok(*refusal)))),
        }
    }
}

/// What can be called.
#[derive(Debug)]
struct Api {
    /// By path.
    methods: HashMap<String, MethodDescriptor>,
    openapi: Bytes,
}

/// How the answer to a call is translated.
enum Answer {
    Message(MessageDescriptor, Failure),
    Lines(MessageDescriptor, Failure),
    Health,
    Description(Bytes),
    /// The RPC does not exist.
    Unknown,
}

/// Why the body of a request cannot be translated. The handler sees its end then, but may say something else about it.
type Failure = Arc<OnceLock<Status>>;

impl Api {
    fn new() -> Result<Self, DescriptorError> {
        let pool = pool()?;
        let methods = pool
            .services()
            .flat_map(|service| service.methods().collect::<Vec<_>>())
            .map(|method| (path(&method), method))
            .collect();
        Ok(Self { methods, openapi: openapi::describe(&pool).to_string().into() })
    }

    /// The gRPC call that a request stands for. An error is the answer.
    fn translate(
        &self,
        request: Request<Body>,
    ) -> Result<(Request<Body>, Answer), Box<Response<Body>>> {
        let (mut parts, body) = request.into_parts();
        let path = parts.uri.path();
        let method = self.methods.get(path);
        let allowed = match (method, path) {
            (Some(_), _) => Method::POST,
            (None, HEALTH_PAGE | DESCRIPTION_PAGE) => Method::GET,
            (None, _) => parts.method.clone(),
        };
        if parts.method != allowed {
            return Err(Box::new(not_allowed(&parts.method, &allowed)));
        }
        let (uri, body, answer) = match (method, path) {
            (Some(method), _) => {
                let content = request::Content::of(method);
                content.check(&parts.headers)?;
                let failure = Failure::default();
                let limit = request::text_bytes_max(method.parent_service().full_name());
                let reader = request::Reader::new(body, method.input(), limit, failure.clone());
                (parts.uri, reader.into_body(content), Answer::of(method, failure))
            }
            (None, HEALTH_PAGE) => {
                (Uri::from_static(HEALTH_RPC), request::empty_message(), Answer::Health)
            }
            (None, DESCRIPTION_PAGE) => {
                let answer = Answer::Description(self.openapi.clone());
                (Uri::from_static(REFLECTION_RPC), Body::empty(), answer)
            }
            (None, _) => (parts.uri, Body::empty(), Answer::Unknown),
        };
        parts.uri = uri;
        parts.method = Method::POST;
        let length = parts.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        let length = length.and_then(|length| length.parse::<usize>().ok());
        if length.is_some_and(|length| length <= INLINE_BYTES_MAX) {
            parts.extensions.insert(Whole);
        }
        make_grpc(&mut parts.headers);
        Ok((Request::from_parts(parts, body), answer))
    }
}

impl Answer {
    fn of(method: &MethodDescriptor, failure: Failure) -> Self {
        if method.is_server_streaming() {
            Self::Lines(method.output(), failure)
        } else {
            Self::Message(method.output(), failure)
        }
    }

    async fn translate(self, response: Response<Body>) -> Response<Body> {
        match self {
            Self::Message(of, failure) => response::message(response, &of, &failure).await,
            Self::Lines(of, failure) => response::lines(response, of, failure),
            Self::Health => response::health(response).await,
            Self::Description(text) => match response::refusal(&response) {
                Some(status) => status::response(&status),
                None => status::json(text),
            },
            Self::Unknown => status::response(
                &response::refusal(&response).unwrap_or_else(|| Status::unimplemented("")),
            ),
        }
    }
}

/// All services that the core has.
fn pool() -> Result<DescriptorPool, DescriptorError> {
    let mut pool = DescriptorPool::decode(cnsmo_proto::DESCRIPTORS)?;
    pool.decode_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)?;
    pool.decode_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)?;
    Ok(pool)
}

fn path(method: &MethodDescriptor) -> String {
    format!("/{}/{}", method.parent_service().full_name(), method.name())
}

fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// Headers about the body are of the JSON.
fn make_grpc(headers: &mut HeaderMap) {
    for name in [CONTENT_LENGTH, TRANSFER_ENCODING, CONTENT_ENCODING, ACCEPT_ENCODING] {
        headers.remove(name);
    }
    headers.remove("grpc-encoding");
    headers.remove("grpc-accept-encoding");
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
}

fn not_allowed(method: &Method, allowed: &Method) -> Response<Body> {
    let text = format!("{method} is not taken here: use {allowed}");
    let mut response = status::response(&Status::unimplemented(text));
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    if let Ok(value) = HeaderValue::from_str(allowed.as_str()) {
        response.headers_mut().insert(ALLOW, value);
    }
    response
}

#[cfg(test)]
mod tests;
