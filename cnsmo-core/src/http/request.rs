//! The body of a request: JSON, or lines of JSON, to gRPC frames.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::stream;
use http_body_util::{BodyExt as _, Full, StreamBody};
use prost::Message as _;
use prost_reflect::{MessageDescriptor, MethodDescriptor};
use tonic::{
    Status,
    body::Body,
    codegen::http::{
        HeaderMap, Response, StatusCode,
        header::{CONTENT_ENCODING, CONTENT_TYPE},
    },
};

use super::{Failure, INLINE_BYTES_MAX, json, status};
use crate::grpc;

/// JSON takes more room than protobuf: names of fields, base64. What is still too large as protobuf is refused as gRPC does.
const TEXT_PER_MESSAGE: usize = 2;
/// A request of one message that stops coming for so long is given up. A stream of messages may be silent.
const BODY_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Before each message of gRPC: whether it is compressed, and its length.
const FRAME_HEADER_BYTES: usize = 5;

/// Largest JSON text of one message to a service.
pub(super) fn text_bytes_max(service: &str) -> usize {
    TEXT_PER_MESSAGE * grpc::request_bytes_max(service)
}

/// The body with a message that has no fields.
pub(super) fn empty_message() -> Body {
    Body::new(Full::new(Bytes::from_static(&[0; FRAME_HEADER_BYTES])))
}

/// What the body holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// One message.
    Message,
    /// A message on each line.
    Lines,
}

impl Content {
    pub(super) fn of(method: &MethodDescriptor) -> Self {
        if method.is_client_streaming() { Self::Lines } else { Self::Message }
    }

    /// Media types that say so. A browser does not send them to another site without asking it first.
    pub(super) fn types(self) -> &'static [&'static str] {
        match self {
            Self::Message => &["application/json"],
            Self::Lines => &["application/jsonl", "application/x-ndjson"],
        }
    }

    /// An error is the answer.
    pub(super) fn check(self, headers: &HeaderMap) -> Result<(), Box<Response<Body>>> {
        let unsupported = |text: String| {
            let mut response = status::response(&Status::invalid_argument(text));
            *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            Box::new(response)
        };
        if headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
            return Err(unsupported("content-encoding: must be identity".into()));
        }
        let sent = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let essence = sent.and_then(|value| value.split(';').next()).unwrap_or_default().trim();
        if self.types().iter().any(|allowed| essence.eq_ignore_ascii_case(allowed)) {
            return Ok(());
        }
        let expected = self.types().join(" or ");
        Err(unsupported(format!("content-type: {essence:?} is not taken here: send {expected}")))
    }
}

/// Reads messages from a body.
pub(super) struct Reader {
    body: Body,
    of: MessageDescriptor,
    bytes_max: usize,
    /// What has come and belongs to no message yet.
    text: BytesMut,
    /// Bytes of it without an end of line.
    searched: usize,
    ended: bool,
    failure: Failure,
}

impl Reader {
    /// Of messages that take at most `bytes_max` as JSON.
    pub(super) fn new(
        body: Body,
        of: MessageDescriptor,
        bytes_max: usize,
        failure: Failure,
    ) -> Self {
        Self { body, of, bytes_max, text: BytesMut::new(), searched: 0, ended: false, failure }
    }

    /// The same messages in gRPC frames.
    pub(super) fn into_body(self, content: Content) -> Body {
        let frames = stream::unfold(Some(self), move |reader| async move {
            let mut reader = reader?;
            match reader.frame(content).await {
                Ok(Some(frame)) => Some((Ok(http_body::Frame::data(frame)), Some(reader))),
                Ok(None) => None,
                Err(status) => {
                    // The first one counts.
                    let _ = reader.failure.set(status.clone());
                    Some((Err(status), None))
                }
            }
        });
        Body::new(StreamBody::new(frames))
    }

    async fn frame(&mut self, content: Content) -> Result<Option<Bytes>, Status> {
        let text = match content {
            Content::Lines => self.line().await?,
            Content::Message if self.ended => None,
            Content::Message => Some(self.all().await?),
        };
        let Some(text) = text else { return Ok(None) };
        let of = self.of.clone();
        if text.len() <= INLINE_BYTES_MAX {
            return encode(&text, &of).map(Some);
        }
        let encoded = tokio::task::spawn_blocking(move || encode(&text, &of)).await;
        encoded.map_err(|_| Status::internal("the core failed: see its log"))?.map(Some)
    }

    async fn all(&mut self) -> Result<Bytes, Status> {
        // What the client declares need not be waited for.
        let declared = http_body::Body::size_hint(&self.body).lower();
        self.bounded(usize::try_from(declared).unwrap_or(usize::MAX))?;
        while !self.ended {
            match tokio::time::timeout(BODY_PAUSE_MAX, self.receive()).await {
                Ok(received) => received?,
                Err(_) => return Err(Status::deadline_exceeded("the request stopped coming")),
            }
            self.bounded(self.text.len())?;
        }
        Ok(self.text.split().freeze())
    }

    /// The next line that is not blank.
    async fn line(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            let end = memchr::memchr(b'\n', &self.text[self.searched..]);
            let line = match end {
                Some(end) => self.text.split_to(self.searched + end + 1),
                None if self.ended => self.text.split(),
                None => {
                    self.searched = self.text.len();
                    self.bounded(self.searched)?;
                    self.receive().await?;
                    continue;
                }
            };
            self.searched = 0;
            self.bounded(line.len())?;
            if !line.trim_ascii().is_empty() {
                return Ok(Some(line.freeze()));
            }
            if self.ended && self.text.is_empty() {
                return Ok(None);
            }
        }
    }

    async fn receive(&mut self) -> Result<(), Status> {
        match self.body.frame().await {
            None => self.ended = true,
            Some(frame) => {
                if let Ok(data) = frame?.into_data() {
                    self.text.put(data);
                }
            }
        }
        Ok(())
    }

    fn bounded(&self, length: usize) -> Result<(), Status> {
        if length <= self.bytes_max {
            return Ok(());
        }
        Err(Status::out_of_range(format!(
            "a message takes at most {} bytes of JSON",
            self.bytes_max
        )))
    }
}

fn encode(text: &[u8], of: &MessageDescriptor) -> Result<Bytes, Status> {
    let message = json::read(text, of)?;
    let length = message.encoded_len();
    let declared = u32::try_from(length)
        .map_err(|_| Status::out_of_range("a message takes less than 4 GiB"))?;
    let mut frame = BytesMut::with_capacity(FRAME_HEADER_BYTES + length);
    frame.put_u8(0);
    frame.put_u32(declared);
    message
        .encode(&mut frame)
        .map_err(|error| Status::internal(format!("cannot encode the request: {error}")))?;
    Ok(frame.freeze())
}
