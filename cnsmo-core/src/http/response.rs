//! The body of an answer: gRPC frames to JSON, or lines of JSON.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use prost::Message as _;
use prost_reflect::MessageDescriptor;
use tonic::{
    Code, Status,
    body::Body,
    codegen::http::{HeaderValue, Response, StatusCode, header::CONTENT_TYPE},
};
use tonic_health::pb::{HealthCheckResponse, health_check_response::ServingStatus};

use super::{Failure, INLINE_BYTES_MAX, json, status};

/// The answer to a call that gives one message.
pub(super) async fn message(
    response: Response<Body>,
    of: &MessageDescriptor,
    failure: &Failure,
) -> Response<Body> {
    let text = async {
        let message = single(response).await?;
        to_json(vec![message], of, false).await
    };
    let answer = text.await;
    match (failure.get(), answer) {
        (Some(status), _) => status::response(status),
        (None, Ok(text)) => status::json(text),
        (None, Err(status)) => status::response(&status),
    }
}

/// The answer to a call that gives a stream. What the handler refuses before the stream begins has a status of its own;
/// afterwards an error is the last line.
pub(super) fn lines(
    response: Response<Body>,
    of: MessageDescriptor,
    failure: Failure,
) -> Response<Body> {
    if let Some(status) = refusal(&response) {
        return status::response(failure.get().unwrap_or(&status));
    }
    let writer = Writer { frames: Frames::new(response.into_body()), of, failure };
    let lines = stream::unfold(Some(writer), |writer| async {
        let mut writer = writer?;
        let (line, rest) = match writer.lines().await {
            Ok(Some(lines)) => (lines, Some(writer)),
            Ok(None) => (status::line(writer.failure.get()?), None),
            Err(error) => (status::line(writer.failure.get().unwrap_or(&error)), None),
        };
        Some((Ok::<_, Status>(http_body::Frame::data(line)), rest))
    });
    let mut response = Response::new(Body::new(StreamBody::new(lines)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
    response
}

/// The health page.
pub(super) async fn health(response: Response<Body>) -> Response<Body> {
    let check = async {
        let check = HealthCheckResponse::decode(single(response).await?);
        check.map_err(|error| Status::internal(format!("cannot read the health: {error}")))
    };
    let serving = match check.await {
        Ok(check) => check.status() == ServingStatus::Serving,
        Err(status) => return status::response(&status),
    };
    let text = if serving { r#"{"status":"SERVING"}"# } else { r#"{"status":"NOT_SERVING"}"# };
    let mut response = status::json(Bytes::from_static(text.as_bytes()));
    if !serving {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

/// Why a call was refused before anything of an answer.
pub(super) fn refusal(response: &Response<Body>) -> Option<Status> {
    Status::from_header_map(response.headers()).filter(|status| status.code() != Code::Ok)
}

async fn single(response: Response<Body>) -> Result<Bytes, Status> {
    if let Some(status) = refusal(&response) {
        return Err(status);
    }
    let mut frames = Frames::new(response.into_body());
    let mut message = None;
    while let Some(messages) = frames.next().await? {
        message = messages.into_iter().next_back().or(message);
    }
    message.ok_or_else(|| Status::internal("the answer has no message"))
}

struct Writer {
    frames: Frames,
    of: MessageDescriptor,
    failure: Failure,
}

impl Writer {
    /// All that is there. None: the stream has ended well.
    async fn lines(&mut self) -> Result<Option<Bytes>, Status> {
        let Some(messages) = self.frames.next().await? else { return Ok(None) };
        to_json(messages, &self.of, true).await.map(Some)
    }
}

async fn to_json(
    messages: Vec<Bytes>,
    of: &MessageDescriptor,
    lines: bool,
) -> Result<Bytes, Status> {
    let of = of.clone();
    let length: usize = messages.iter().map(Bytes::len).sum();
    let write = move || {
        let mut text = BytesMut::with_capacity(2 * length);
        for message in messages {
            json::write(message, &of, &mut text)?;
            if lines {
                text.put_u8(b'\n');
            }
        }
        Ok(text.freeze())
    };
    if length <= INLINE_BYTES_MAX {
        return write();
    }
    let written = tokio::task::spawn_blocking(write).await;
    written.map_err(|_| Status::internal("the core failed: see its log"))?
}

/// Takes messages out of gRPC frames.
struct Frames {
    body: Body,
    bytes: BytesMut,
}

impl Frames {
    fn new(body: Body) -> Self {
        Self { body, bytes: BytesMut::new() }
    }

    /// The messages that have come, at least one. None: the call has ended with OK.
    async fn next(&mut self) -> Result<Option<Vec<Bytes>>, Status> {
        loop {
            let Some(frame) = self.body.frame().await else {
                return Err(Status::internal("the answer has no end"));
            };
            match frame?.into_data() {
                Ok(data) => self.bytes.put(data),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return match Status::from_header_map(&trailers) {
                        Some(status) if status.code() == Code::Ok => Ok(None),
                        Some(status) => Err(status),
                        None => Err(Status::internal("the answer has no status")),
                    };
                }
            }
            let messages = self.complete();
            if !messages.is_empty() {
                return Ok(Some(messages));
            }
        }
    }

    fn complete(&mut self) -> Vec<Bytes> {
        let mut messages = Vec::new();
        // Nobody asked for compression, so the first byte is 0.
        while let Some((&[_, a, b, c, d], rest)) = self.bytes.split_first_chunk() {
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            if rest.len() < length {
                break;
            }
            self.bytes.advance(5);
            messages.push(self.bytes.split_to(length).freeze());
        }
        messages
    }
}
