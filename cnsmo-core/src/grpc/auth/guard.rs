//! Bodies that end when the identity behind them does.

use std::{
    future::Future as _,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Status, body::Body, codegen::http::HeaderMap};

/// Messages that a stream which is cut may still send: those that were ready, its own last word among them.
const LAST_WORDS_MAX: u32 = 64;

/// Which way a body goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Request,
    Response,
}

/// See [`request`] and [`response`].
struct Guarded {
    inner: Body,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    side: Side,
    /// It is cut: how much it may still say.
    left: Option<u32>,
    ended: bool,
}

/// Fails when `cut` is cancelled.
pub(super) fn request(body: Body, cut: CancellationToken) -> Body {
    guarded(body, cut, Side::Request)
}

/// Ends with [`Status::unauthenticated`] when `cut` is cancelled.
pub(super) fn response(body: Body, cut: CancellationToken) -> Body {
    guarded(body, cut, Side::Response)
}

fn guarded(body: Body, cut: CancellationToken, side: Side) -> Body {
    if body.is_end_stream() {
        return body;
    }
    let cut = Box::pin(cut.cancelled_owned());
    Body::new(Guarded { inner: body, cut, side, left: None, ended: false })
}

fn status() -> Status {
    Status::unauthenticated("the identity has been revoked, or its certificate has expired")
}

impl Guarded {
    fn end(&mut self) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.ended = true;
        // Whoever fills it notices.
        self.inner = Body::empty();
        if self.side == Side::Request {
            return Poll::Ready(Some(Err(status())));
        }
        let mut trailers = HeaderMap::new();
        let frame = status().add_header(&mut trailers).map(|()| Frame::trailers(trailers));
        Poll::Ready(Some(frame))
    }
}

impl http_body::Body for Guarded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.left.is_none() && self.cut.as_mut().poll(context).is_ready() {
            self.left = Some(if self.side == Side::Request { 0 } else { LAST_WORDS_MAX });
        }
        match self.left {
            None => Pin::new(&mut self.inner).poll_frame(context),
            Some(0) => self.end(),
            Some(left) => {
                self.left = Some(left - 1);
                match Pin::new(&mut self.inner).poll_frame(context) {
                    Poll::Pending => self.end(),
                    ready @ Poll::Ready(_) => ready,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.left.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
