//! How a gRPC status looks in HTTP: `google/rpc/code.proto` says which HTTP status stands for which code.

use bytes::Bytes;
use http_body_util::Full;
use serde_json::{Value, json};
use tonic::{
    Code, Status,
    body::Body,
    codegen::http::{HeaderValue, Response, StatusCode, header::CONTENT_TYPE},
};

/// A response with this JSON.
pub(super) fn json(text: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::new(Full::new(text)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The response that tells an error.
pub(super) fn response(status: &Status) -> Response<Body> {
    let mut response = json(object(status).to_string().into());
    *response.status_mut() = in_http(status.code());
    response
}

/// The last line of a stream that ends with an error.
pub(super) fn line(status: &Status) -> Bytes {
    format!("{}\n", json!({ "error": object(status) })).into()
}

/// The names of all codes but OK.
pub(super) fn error_names() -> impl Iterator<Item = &'static str> {
    (1..=16).map(|code| name(Code::from_i32(code)))
}

fn object(status: &Status) -> Value {
    json!({ "code": name(status.code()), "message": status.message() })
}

fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

fn in_http(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        // 499, "client closed request", has no name in the registry of HTTP.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
    }
}
