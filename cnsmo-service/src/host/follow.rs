//! Followers of the output of services, for a core that asks for one part after the other.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use cnsmo_proto::pb::{
    agent::{CommandResult, Follow, LogPart, command_result::Result as Outcome},
    service::ReadLogsRequest,
};
use tokio::time::{Instant, timeout_at};
use tokio_stream::StreamExt as _;
use tonic::Status;

use super::front::{Local, LogStream, Steer as _, result, size};

/// Followers at a time; one more is refused.
pub const FOLLOWERS_MAX: usize = 8;
/// One that is asked for nothing for so long belongs to nobody any more.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Longest wait for something to tell.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// After the first line of a part: those that are there go with it.
const GATHER: Duration = Duration::from_millis(10);
/// Of one part.
const PART_BYTES_MAX: usize = 64 << 10;

/// The followers of one stream of a core. Clones share them.
#[derive(Clone)]
pub struct Followers {
    local: Local,
    all: Arc<Mutex<BTreeMap<u64, Follower>>>,
}

struct Follower {
    /// None: somebody is reading from it.
    lines: Option<LogStream>,
    used: Instant,
}

impl Followers {
    /// None yet.
    pub fn new(local: Local) -> Self {
        Self { local, all: Arc::default() }
    }

    /// The answer to a command of the core.
    pub async fn answer(&self, id: u64, follow: Follow) -> CommandResult {
        result(id, self.part(id, follow).await.map(Outcome::Part))
    }

    async fn part(&self, id: u64, follow: Follow) -> Result<LogPart, Status> {
        let Follow { logs, follower, wait, stop } = follow;
        if stop {
            self.all().remove(&follower);
            return Ok(LogPart { follower, ended: true, ..LogPart::default() });
        }
        let (follower, mut lines) = match logs {
            Some(logs) => (id, self.begin(id, logs)?),
            None => (follower, self.take(follower)?),
        };
        let wait = wait.and_then(|wait| Duration::try_from(wait).ok()).unwrap_or_default();
        let (part, ended) = read(&mut lines, wait.min(WAIT_MAX)).await;
        let mut all = self.all();
        if ended || part.is_err() {
            all.remove(&follower);
        } else if let Some(known) = all.get_mut(&follower) {
            *known = Follower { lines: Some(lines), used: Instant::now() };
        }
        Ok(LogPart { lines: part?, follower, ended })
    }

    fn begin(&self, id: u64, logs: ReadLogsRequest) -> Result<LogStream, Status> {
        let mut all = self.all();
        all.retain(|_, one| one.lines.is_none() || one.used.elapsed() < IDLE_MAX);
        if all.len() >= FOLLOWERS_MAX {
            let text = format!("the output of this VM has {FOLLOWERS_MAX} followers already");
            return Err(Status::resource_exhausted(text));
        }
        let lines = self.local.logs(ReadLogsRequest { follow: true, ..logs })?;
        all.insert(id, Follower { lines: None, used: Instant::now() });
        Ok(lines)
    }

    fn take(&self, follower: u64) -> Result<LogStream, Status> {
        let mut all = self.all();
        let known = all.get_mut(&follower);
        let known = known.ok_or_else(|| Status::not_found(format!("no follower {follower}")))?;
        let busy = || Status::failed_precondition(format!("follower {follower} waits already"));
        known.lines.take().ok_or_else(busy)
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, Follower>> {
        // Each change of it is whole before anything can panic.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What comes within `wait`, and whether that was all there will be.
async fn read(
    lines: &mut LogStream,
    wait: Duration,
) -> (Result<Vec<cnsmo_proto::pb::service::LogLine>, Status>, bool) {
    let (mut part, mut bytes) = (Vec::new(), 0);
    let mut end = Instant::now() + wait;
    while bytes < PART_BYTES_MAX {
        match timeout_at(end, lines.next()).await {
            Err(_) => return (Ok(part), false),
            Ok(None) => return (Ok(part), true),
            Ok(Some(Err(status))) => return (Err(status), true),
            Ok(Some(Ok(some))) => {
                bytes += some.lines.iter().map(size).sum::<usize>();
                part.extend(some.lines);
                end = end.min(Instant::now() + GATHER);
            }
        }
    }
    (Ok(part), false)
}

#[cfg(test)]
mod tests {
    use cnsmo_proto::pb::service::{LogLine, ReadLogsResponse, ServiceId};
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;
    use tonic::Code;

    use super::*;
    use crate::{
        host::{Host, Run, Service},
        lifecycle::Lifecycle,
        supervise::{Limits, Stop},
    };

    /// Its output is what the test sends.
    struct Talks(Mutex<Vec<mpsc::Receiver<String>>>);

    impl Service for Talks {
        fn name(&self) -> &str {
            "talks"
        }

        fn logs(&self, _: usize, follow: bool) -> Option<LogStream> {
            assert!(follow);
            let lines = ReceiverStream::new(self.0.lock().unwrap().pop()?);
            Some(Box::pin(lines.map(|text| {
                let line = LogLine { text, ..LogLine::default() };
                Ok(ReadLogsResponse { lines: vec![line] })
            })))
        }

        fn run(&self, _: Lifecycle, mut stop: Stop) -> Run {
            Box::pin(async move {
                stop.asked().await;
                Ok(())
            })
        }
    }

    fn first() -> Follow {
        let id = ServiceId { service: "talks".into(), ..ServiceId::default() };
        let logs = Some(ReadLogsRequest { id: Some(id), ..ReadLogsRequest::default() });
        Follow { logs, wait: seconds(5), ..Follow::default() }
    }

    fn seconds(seconds: i64) -> Option<prost_types::Duration> {
        Some(prost_types::Duration { seconds, nanos: 0 })
    }

    fn further(follower: u64) -> Follow {
        Follow { follower, wait: seconds(5), ..Follow::default() }
    }

    /// Texts of a part, and whether it is the last.
    fn told(result: CommandResult) -> (Vec<String>, bool) {
        let Some(Outcome::Part(part)) = result.result else { panic!("{result:?}") };
        (part.lines.into_iter().map(|line| line.text).collect(), part.ended)
    }

    fn code(result: &CommandResult) -> Code {
        Code::from(i32::try_from(result.code).unwrap())
    }

    fn followers(count: usize) -> (Followers, Vec<mpsc::Sender<String>>) {
        let host = Host::new(Limits::DEFAULT);
        let (senders, receivers) = (0..count).map(|_| mpsc::channel(10_000)).unzip();
        host.add(Arc::new(Talks(Mutex::new(receivers)))).unwrap();
        (Followers::new(Local::new(host, "vm1")), senders)
    }

    #[tokio::test(start_paused = true)]
    async fn parts_come_in_order_and_within_their_limits_up_to_the_end() {
        let (followers, mut senders) = followers(1);
        let sender = senders.pop().unwrap();
        sender.send("a".into()).await.unwrap();
        assert_eq!(told(followers.answer(7, first()).await), (vec!["a".to_owned()], false));
        // Nothing to tell is an answer too.
        assert_eq!(told(followers.answer(8, further(7)).await), (vec![], false));
        let line = "x".repeat(1_000);
        for _ in 0..100 {
            sender.send(line.clone()).await.unwrap();
        }
        let (part, _) = told(followers.answer(9, further(7)).await);
        assert!((60..70).contains(&part.len()), "{}", part.len());
        drop(sender);
        let (rest, ended) = told(followers.answer(10, further(7)).await);
        assert_eq!((part.len() + rest.len(), ended), (100, true));
        assert_eq!(code(&followers.answer(11, further(7)).await), Code::NotFound);
    }

    #[tokio::test(start_paused = true)]
    async fn there_are_few_and_who_is_gone_leaves_room() {
        let (followers, senders) = followers(FOLLOWERS_MAX + 3);
        for id in 1..=FOLLOWERS_MAX as u64 {
            told(followers.answer(id, first()).await);
        }
        let refused = followers.answer(20, first()).await;
        assert_eq!(code(&refused), Code::ResourceExhausted);
        // Stopped, also while it waits.
        let waits = followers.clone();
        let waits = tokio::spawn(async move { waits.answer(21, further(3)).await });
        tokio::task::yield_now().await;
        assert_eq!(code(&followers.answer(22, further(3)).await), Code::FailedPrecondition);
        followers.answer(23, Follow { follower: 3, stop: true, ..Follow::default() }).await;
        told(waits.await.unwrap());
        assert_eq!(code(&followers.answer(24, further(3)).await), Code::NotFound);
        told(followers.answer(25, first()).await);
        // Or silent for too long.
        assert_eq!(code(&followers.answer(26, first()).await), Code::ResourceExhausted);
        tokio::time::advance(IDLE_MAX).await;
        told(followers.answer(27, first()).await);
        assert_eq!(followers.all().len(), 1);
        drop(senders);
    }
}
