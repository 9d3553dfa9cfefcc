//! What waits to be sent to one subscriber.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Instant,
};

use cnsmo_proto::pb::bus::{
    Delivery, Lagged, Message, SubscribeResponse, Subscribed, subscribe_response,
};
use futures::Stream;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Messages that wait for one subscriber. A burst of them is sent at once; with more, it is too slow.
pub const WAITING_MAX: usize = 1_024;
/// Bytes that wait for one subscriber, four of the largest messages.
pub const WAITING_BYTES_MAX: usize = 4 << 20;
/// Credit of one subscription. More would tell nothing: [`WAITING_MAX`] holds before.
pub const CREDIT_MAX: u32 = 1_000_000;
/// What a message takes beside its payload, about.
const MESSAGE_BYTES: usize = 256;

/// A subscription may not be granted more than [`CREDIT_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooMuchCredit;

/// Filled by publishers, emptied by the stream to the subscriber.
#[derive(Debug, Default)]
pub struct Outbox {
    state: Mutex<State>,
    /// The subscriber is gone.
    gone: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Item>,
    bytes: usize,
    credit: u32,
    skipped: u64,
    was_full: bool,
    /// How the stream ends; `Ok`: in good order.
    end: Option<Result<(), Status>>,
    reader: Option<Waker>,
    /// Told when there is room again after there was none.
    room: Option<Arc<Notify>>,
}

/// One message of the stream.
#[derive(Debug)]
pub(super) enum Item {
    Subscribed { next_sequence: i64 },
    Lagged { skipped: u64 },
    Live(Arc<Message>),
    Request { message: Arc<Message>, reply_id: u64, deadline: Instant },
    Durable(Box<Delivery>),
}

impl Item {
    fn bytes(&self) -> usize {
        let payload = match self {
            Self::Subscribed { .. } | Self::Lagged { .. } => 0,
            Self::Live(message) | Self::Request { message, .. } => message.payload.len(),
            Self::Durable(delivery) => {
                delivery.message.as_ref().map_or(0, |message| message.payload.len())
            }
        };
        payload + MESSAGE_BYTES
    }
}

impl From<Item> for SubscribeResponse {
    fn from(item: Item) -> Self {
        let message = match item {
            Item::Subscribed { next_sequence } => {
                subscribe_response::Message::Subscribed(Subscribed { next_sequence })
            }
            Item::Lagged { skipped } => subscribe_response::Message::Lagged(Lagged { skipped }),
            Item::Live(message) => subscribe_response::Message::Delivery(Box::new(Delivery {
                message: Some(Message::clone(&message)),
                ..Delivery::default()
            })),
            Item::Request { message, reply_id, deadline } => {
                let left = deadline.saturating_duration_since(Instant::now());
                subscribe_response::Message::Delivery(Box::new(Delivery {
                    message: Some(Message::clone(&message)),
                    reply_id,
                    timeout: prost_types::Duration::try_from(left).ok(),
                    ..Delivery::default()
                }))
            }
            Item::Durable(delivery) => subscribe_response::Message::Delivery(delivery),
        };
        Self { message: Some(message) }
    }
}

impl Outbox {
    /// Takes the item if there is credit and room, else counts it as skipped.
    pub(super) fn offer(&self, item: Item) -> bool {
        let mut state = self.lock();
        if !state.takes() {
            // What comes after the end is not missed.
            state.skipped += u64::from(state.end.is_none());
            return false;
        }
        state.credit -= 1;
        if state.skipped > 0 {
            let skipped = std::mem::take(&mut state.skipped);
            state.push(Item::Lagged { skipped });
        }
        state.push(item);
        wake(state);
        true
    }

    /// As [`Self::offer`], but an item that is not taken is not counted: the caller keeps it.
    pub(super) fn try_push(&self, item: Item) -> Result<(), Item> {
        let mut state = self.lock();
        if !state.takes() {
            return Err(item);
        }
        state.credit -= 1;
        state.push(item);
        wake(state);
        Ok(())
    }

    /// Whatever credit and room there are: for what the subscription itself has to say.
    pub(super) fn push(&self, item: Item) {
        let mut state = self.lock();
        state.push(item);
        wake(state);
    }

    /// How many items it takes now.
    pub(super) fn free(&self) -> usize {
        let mut state = self.lock();
        if !state.has_room() {
            state.was_full = true;
            return 0;
        }
        (state.credit as usize).min(WAITING_MAX - state.waiting.len())
    }

    pub(super) fn grant(&self, messages: u32) -> Result<(), TooMuchCredit> {
        let mut state = self.lock();
        let credit = state.credit.checked_add(messages).filter(|credit| *credit <= CREDIT_MAX);
        state.credit = credit.ok_or(TooMuchCredit)?;
        if state.skipped > 0 {
            wake(state);
        }
        Ok(())
    }

    /// Ends the stream once what waits has been sent. The first reason counts.
    pub fn end(&self, reason: Status) {
        self.end_with(Err(reason));
    }

    /// As [`Self::end`], in good order.
    pub fn finish(&self) {
        self.end_with(Ok(()));
    }

    fn end_with(&self, end: Result<(), Status>) {
        let mut state = self.lock();
        state.end.get_or_insert(end);
        wake(state);
    }

    /// Waits until the subscriber is gone.
    pub async fn gone(&self) {
        self.gone.cancelled().await;
    }

    /// `room` is notified when there is room again after [`Self::free`] found none.
    pub(super) fn tell_room(&self, room: Arc<Notify>) {
        self.lock().room = Some(room);
    }

    /// Requests that were not sent yet.
    pub(super) fn unsent_requests(&self) -> Vec<u64> {
        let request = |item: &Item| match item {
            Item::Request { reply_id, .. } => Some(*reply_id),
            Item::Subscribed { .. } | Item::Lagged { .. } | Item::Live(_) | Item::Durable(_) => {
                None
            }
        };
        self.lock().waiting.iter().filter_map(request).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<Option<Result<SubscribeResponse, Status>>> {
        let mut state = self.lock();
        if let Some(item) = state.waiting.pop_front() {
            state.bytes -= item.bytes();
            if state.was_full && state.waiting.len() <= WAITING_MAX / 2 && state.has_room() {
                state.was_full = false;
                state.room.iter().for_each(|room| room.notify_one());
            }
            drop(state);
            return Poll::Ready(Some(Ok(item.into())));
        }
        if state.skipped > 0 && state.credit > 0 {
            let skipped = std::mem::take(&mut state.skipped);
            return Poll::Ready(Some(Ok(Item::Lagged { skipped }.into())));
        }
        if let Some(end) = state.end.clone() {
            return Poll::Ready(end.err().map(Err));
        }
        if !state.reader.as_ref().is_some_and(|reader| reader.will_wake(context.waker())) {
            state.reader = Some(context.waker().clone());
        }
        Poll::Pending
    }
}

impl State {
    fn takes(&self) -> bool {
        self.credit > 0 && self.has_room() && self.end.is_none()
    }

    fn has_room(&self) -> bool {
        self.waiting.len() < WAITING_MAX && self.bytes < WAITING_BYTES_MAX
    }

    fn push(&mut self, item: Item) {
        self.bytes += item.bytes();
        self.waiting.push_back(item);
    }
}

/// Outside of the lock, which the reader needs next.
fn wake(mut state: MutexGuard<'_, State>) {
    let reader = state.reader.take();
    drop(state);
    if let Some(reader) = reader {
        reader.wake();
    }
}

/// The stream to the subscriber; who drops it is gone.
#[derive(Debug)]
pub struct Outgoing {
    outbox: Arc<Outbox>,
    ended: bool,
}

impl Outgoing {
    /// The only one of this outbox.
    pub fn new(outbox: Arc<Outbox>) -> Self {
        Self { outbox, ended: false }
    }
}

impl Stream for Outgoing {
    type Item = Result<SubscribeResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let polled = self.outbox.poll(context);
        self.ended = matches!(polled, Poll::Ready(Some(Err(_)) | None));
        polled
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        self.outbox.gone.cancel();
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, StreamExt as _};

    use super::*;

    fn live(payload: &'static [u8]) -> Item {
        Item::Live(Arc::new(Message { payload: payload.into(), ..Message::default() }))
    }

    fn next(outgoing: &mut Outgoing) -> Option<Result<subscribe_response::Message, Status>> {
        let next = outgoing.next().now_or_never()?;
        Some(next.unwrap().map(|response| response.message.unwrap()))
    }

    fn payload(outgoing: &mut Outgoing) -> Vec<u8> {
        match next(outgoing) {
            Some(Ok(subscribe_response::Message::Delivery(delivery))) => {
                delivery.message.unwrap().payload.to_vec()
            }
            other => panic!("{other:?}"),
        }
    }

    fn skipped(outgoing: &mut Outgoing) -> u64 {
        match next(outgoing) {
            Some(Ok(subscribe_response::Message::Lagged(lagged))) => lagged.skipped,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_skipped_is_told_where_it_is_missing() {
        let outbox = Arc::new(Outbox::default());
        let mut outgoing = Outgoing::new(outbox.clone());
        assert!(!outbox.offer(live(b"lost")));
        assert!(next(&mut outgoing).is_none(), "nothing is sent without credit");
        outbox.grant(2).unwrap();
        assert_eq!(skipped(&mut outgoing), 1);
        assert!(outbox.offer(live(b"1")));
        assert!(outbox.offer(live(b"2")));
        assert!(!outbox.offer(live(b"lost")) && !outbox.offer(live(b"lost")));
        outbox.grant(1).unwrap();
        assert!(outbox.offer(live(b"3")));
        assert_eq!([payload(&mut outgoing), payload(&mut outgoing)], [b"1", b"2"]);
        assert_eq!(skipped(&mut outgoing), 2);
        assert_eq!(payload(&mut outgoing), b"3");
        assert!(next(&mut outgoing).is_none());
    }

    #[test]
    fn it_is_bounded_in_number_bytes_and_credit() {
        let outbox = Arc::new(Outbox::default());
        let mut outgoing = Outgoing::new(outbox.clone());
        let room = Arc::<Notify>::default();
        outbox.tell_room(room.clone());
        outbox.grant(CREDIT_MAX).unwrap();
        assert_eq!(outbox.grant(1), Err(TooMuchCredit));
        let taken = (0..2 * WAITING_MAX).filter(|_| outbox.offer(live(b"x"))).count();
        assert_eq!((taken, outbox.free()), (WAITING_MAX, 0));
        assert!(room.notified().now_or_never().is_none());
        for _ in 0..WAITING_MAX {
            assert_eq!(payload(&mut outgoing), b"x");
        }
        assert!(room.notified().now_or_never().is_some());
        assert_eq!(skipped(&mut outgoing), WAITING_MAX as u64);

        static LARGE: [u8; 1 << 20] = [0; 1 << 20];
        let taken = (0..10).filter(|_| outbox.offer(live(&LARGE))).count();
        assert_eq!(taken, WAITING_BYTES_MAX / LARGE.len());
    }

    #[test]
    fn the_end_comes_after_what_waits() {
        let outbox = Arc::new(Outbox::default());
        let mut outgoing = Outgoing::new(outbox.clone());
        outbox.grant(2).unwrap();
        assert!(outbox.offer(live(b"1")));
        outbox.end(Status::unavailable("first"));
        outbox.end(Status::internal("second"));
        assert!(!outbox.offer(live(b"2")));
        assert_eq!(payload(&mut outgoing), b"1");
        assert_eq!(next(&mut outgoing).unwrap().unwrap_err().message(), "first");
        assert!(outgoing.next().now_or_never().unwrap().is_none());
        drop(outgoing);
        assert!(outbox.gone().now_or_never().is_some());
    }
}
