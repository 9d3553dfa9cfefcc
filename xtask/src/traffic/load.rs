//! Traffic that runs while something else happens, and a record of each of its rounds.

use std::{
    io::{self, Read as _},
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use ring::digest::{Context, SHA256};

use super::{http, tcp};
use crate::{interrupt, netns::Netns, process::pause};

/// A round takes longer than this only if its packets are dropped.
const ROUND_LIMIT: Duration = Duration::from_millis(1500);
/// Between two rounds.
const ROUND_PAUSE: Duration = Duration::from_millis(20);
/// For traffic to get going on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Rounds that must have been made before something may happen.
const ROUNDS_BEFORE: usize = 3;
/// A transfer that stalls for longer is broken.
const STALL_LIMIT: Duration = Duration::from_secs(30);

/// What a load does in each round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// Asks a web server for its name over one connection that is never renewed. The first failure ends it.
    Stream,
    /// The same over a new connection.
    Connect,
    /// A connection that policy forbids: one that succeeds is a failure.
    Forbidden,
}

/// One round of a load.
#[derive(Clone, Debug)]
pub(crate) struct Round {
    /// When it began.
    pub(crate) at: Instant,
    /// Who answered, or what went wrong.
    pub(crate) answer: Result<String, String>,
}

/// A load that runs in a thread of its own. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Running {
    stop: Arc<AtomicBool>,
    rounds: Arc<Mutex<Vec<Round>>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts a load from inside `from`, and returns once it has made its first rounds.
    pub(crate) fn start(load: Load, from: &Netns, to: SocketAddr) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(Mutex::new(Vec::new()));
        let (stop_inside, rounds_inside) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = from.spawn(move || drive(load, to, &stop_inside, &rounds_inside))?;
        let running = Self { stop, rounds, thread: Some(thread) };
        let going =
            interrupt::wait_until(START_LIMIT, || Ok(running.rounds().len() >= ROUNDS_BEFORE))?;
        match running.rounds().iter().find_map(|round| round.answer.clone().err()) {
            Some(error) => Err(anyhow!("{error}").context(format!("sending traffic to {to}"))),
            None if going => Ok(running),
            None => Err(anyhow!("the traffic to {to} does not get going")),
        }
    }

    /// Who answers: of a stream always the same.
    pub(crate) fn peer(&self) -> Option<String> {
        self.rounds().first()?.answer.clone().ok()
    }

    /// The rounds so far.
    pub(crate) fn rounds(&self) -> Vec<Round> {
        // A panic inside was printed; it leaves the rounds at which it happened.
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the load.
    pub(crate) fn finish(mut self) -> Vec<Round> {
        self.end();
        self.rounds()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// `0 wrong` or how many of how many, with the first reason.
pub(crate) fn verdict<'a>(rounds: impl IntoIterator<Item = &'a Round>) -> String {
    let mut total = 0;
    let mut errors = Vec::new();
    for round in rounds {
        total += 1;
        errors.extend(round.answer.as_ref().err());
    }
    match errors.first() {
        _ if total == 0 => "nothing was sent".to_owned(),
        None => "0 wrong".to_owned(),
        Some(first) => format!("{} wrong of {total}, first: {first}", errors.len()),
    }
}

fn drive(load: Load, to: SocketAddr, stop: &AtomicBool, rounds: &Mutex<Vec<Round>>) {
    let mut kept = None;
    while !stop.load(Ordering::Relaxed) {
        let at = Instant::now();
        let answer = match load {
            Load::Stream => ask(&mut kept, to),
            Load::Connect => ask(&mut None, to),
            Load::Forbidden => match tcp(to, ROUND_PAUSE * 10) {
                Ok(seen) if seen == "timeout" || seen == "refused" => Ok(seen),
                Ok(seen) => Err(format!("a connection to {seen}")),
                Err(error) => Err(error.to_string()),
            },
        };
        let broken = load == Load::Stream && answer.is_err();
        let mut rounds = rounds.lock().unwrap_or_else(PoisonError::into_inner);
        rounds.push(Round { at, answer });
        drop(rounds);
        if broken {
            return;
        }
        pause(ROUND_PAUSE);
    }
}

fn ask(kept: &mut Option<http::Client>, to: SocketAddr) -> Result<String, String> {
    let answer = (|| -> io::Result<String> {
        if kept.is_none() {
            *kept = Some(http::Client::connect(to, ROUND_LIMIT)?);
        }
        kept.as_mut().ok_or(io::ErrorKind::NotConnected)?.text("/")
    })();
    answer.map_err(|error| super::outcome(&error))
}

/// A large file on its way to a client, slowly enough for something to happen meanwhile.
#[derive(Debug)]
pub(crate) struct Download {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    thread: Option<JoinHandle<io::Result<Downloaded>>>,
}

/// What arrived.
#[derive(Debug)]
pub(crate) struct Downloaded {
    pub(crate) bytes: u64,
    pub(crate) sha256: Vec<u8>,
    /// The longest time without a byte.
    pub(crate) stall: Duration,
}

impl Download {
    /// Starts it from inside `from`, and returns once bytes have come.
    pub(crate) fn start(
        from: &Netns,
        to: SocketAddr,
        path: &'static str,
        bytes_per_second: u64,
    ) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let received = Arc::new(AtomicU64::new(0));
        let (stop_inside, received_inside) = (Arc::clone(&stop), Arc::clone(&received));
        let thread = from
            .spawn(move || download(to, path, bytes_per_second, &stop_inside, &received_inside))?;
        let download = Self { stop, received, thread: Some(thread) };
        let going = interrupt::wait_until(START_LIMIT, || Ok(download.received() > 0))?;
        if going {
            return Ok(download);
        }
        Err(match download.finish() {
            Err(error) => error,
            Ok(_) => anyhow!("the transfer from {to} does not get going"),
        })
    }

    /// Bytes so far.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self) -> anyhow::Result<Downloaded> {
        interrupt::wait_until(STALL_LIMIT * 4, || {
            Ok(self.thread.as_ref().is_none_or(JoinHandle::is_finished))
        })?;
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the transfer was waited for twice")?;
        let result = thread.join().map_err(|_| anyhow!("the transfer panicked"))?;
        let received = self.received();
        result.with_context(|| format!("the transfer broke after {received} bytes"))
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn download(
    to: SocketAddr,
    path: &str,
    bytes_per_second: u64,
    stop: &AtomicBool,
    received: &AtomicU64,
) -> io::Result<Downloaded> {
    let mut client = http::Client::connect(to, STALL_LIMIT)?;
    let length = client.get(path)?;
    let mut sha256 = Context::new(&SHA256);
    let mut buffer = vec![0; 64 << 10];
    let (start, mut last, mut stall, mut bytes) =
        (Instant::now(), Instant::now(), Duration::ZERO, 0);
    while bytes < length && !stop.load(Ordering::Relaxed) {
        let count = client.body().read(&mut buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        stall = stall.max(last.elapsed());
        sha256.update(&buffer[..count]);
        bytes += count as u64;
        received.store(bytes, Ordering::Relaxed);
        let due = Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64);
        // The pauses are the client's own, so they do not count as a stall.
        pause(due.saturating_sub(start.elapsed()).min(ROUND_PAUSE));
        last = Instant::now();
    }
    Ok(Downloaded { bytes, sha256: sha256.finish().as_ref().to_vec(), stall })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_counts_what_went_wrong() {
        let round = |answer: Result<&str, &str>| Round {
            at: Instant::now(),
            answer: answer.map(str::to_owned).map_err(str::to_owned),
        };
        assert_eq!(verdict(&[]), "nothing was sent");
        assert_eq!(verdict(&[round(Ok("web1"))]), "0 wrong");
        let rounds = [round(Ok("web1")), round(Err("refused")), round(Err("timeout"))];
        assert_eq!(verdict(&rounds), "2 wrong of 3, first: refused");
    }
}
