//! Backends that say who they are, and clients that keep them busy.

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use super::hub::DISCARD_PORT;
use crate::{interrupt, netns::Netns};

/// TCP: messages of [`MESSAGE`] bytes, each answered by one that begins with the backend's name. After one that begins with
/// [`SINK`] bytes are taken until the end, and the answer has their number behind the name.
pub(in crate::bench) const TCP_PORT: u16 = 80;
/// UDP: each datagram is answered by the backend's name (in place of RFC 862's echo).
pub(super) const UDP_PORT: u16 = 7;

const MESSAGE: usize = 64;
const SINK: u8 = b'S';
const REQUEST: u8 = b'R';
const BULK_BYTES: usize = 256 << 10;
/// Connections that a backend serves at once: more than [`CONNECTIONS`], the most that are open.
const WORKERS: usize = 16;
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// How long a stream, requests or datagrams are sent.
const TIME: Duration = Duration::from_secs(1);
/// Opened one after the other by each of the clients: a few tenths of a second.
const NEW_CONNECTIONS: u32 = 1_000;
const CLIENTS: u32 = 4;
/// Kept open, each with one request at a time.
const CONNECTIONS: u32 = 8;
/// Source ports of datagrams.
const FLOWS: usize = 64;
/// Datagrams sent at once; the next follow when half of them have arrived. A TUN device's queue holds 500.
const BURST: u64 = 256;
/// Far more than what is under way takes.
const LOST_AFTER: Duration = Duration::from_millis(100);

/// Starts a backend inside. It ends with this process.
pub(in crate::bench) fn serve(netns: &Netns, name: &'static str) -> anyhow::Result<()> {
    let sockets = netns.run(|| -> io::Result<_> {
        Ok((TcpListener::bind(("0.0.0.0", TCP_PORT))?, UdpSocket::bind(("0.0.0.0", UDP_PORT))?))
    })?;
    let (listener, udp) = sockets.with_context(|| format!("listening in {}", netns.name()))?;
    for _ in 0..WORKERS {
        let listener = listener.try_clone()?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // The client says what is wrong with a connection that ends.
                let _ = answer(stream, name);
            }
        });
    }
    thread::spawn(move || {
        let mut buffer = [0; MESSAGE];
        while let Ok((_, from)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(name.as_bytes(), from);
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream, name: &str) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut message = [0; MESSAGE];
    loop {
        match stream.read_exact(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        }
        if message[0] == SINK {
            let bytes = sink(&mut stream)?;
            return stream.write_all(&padded(&format!("{name} {bytes}")));
        }
        stream.write_all(&padded(name))?;
    }
}

fn sink(stream: &mut TcpStream) -> io::Result<u64> {
    let mut buffer = vec![0; BULK_BYTES];
    let mut bytes = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(bytes),
            length => bytes += length as u64,
        }
    }
}

fn padded(text: &str) -> [u8; MESSAGE] {
    let mut message = [b' '; MESSAGE];
    for (slot, byte) in message.iter_mut().zip(text.bytes()) {
        *slot = byte;
    }
    message
}

/// Which backends answered, and how often, over `count` connections.
pub(super) fn tcp_backends(
    client: &Netns,
    to: SocketAddr,
    count: u32,
) -> anyhow::Result<BTreeMap<String, u32>> {
    let mut seen = BTreeMap::new();
    for _ in 0..count {
        interrupt::check()?;
        let name = client.run(|| once(to))?.with_context(|| format!("asking {to}"))?;
        *seen.entry(name).or_default() += 1;
    }
    Ok(seen)
}

/// As [`tcp_backends`], over UDP.
pub(super) fn udp_backends(
    client: &Netns,
    to: SocketAddr,
    count: u32,
) -> anyhow::Result<BTreeMap<String, u32>> {
    let mut seen = BTreeMap::new();
    for _ in 0..count {
        interrupt::check()?;
        let name = client.run(|| -> io::Result<_> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(ANSWER_MAX))?;
            socket.connect(to)?;
            socket.send(b"who")?;
            let mut buffer = [0; MESSAGE];
            let length = socket.recv(&mut buffer)?;
            Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
        })?;
        *seen.entry(name.with_context(|| format!("asking {to}"))?).or_default() += 1;
    }
    Ok(seen)
}

/// Gb/s of one stream towards a backend; every byte was counted there.
pub(super) fn stream(client: &Netns, to: SocketAddr) -> anyhow::Result<f64> {
    let (sent, said, took) = client.run(|| -> io::Result<_> {
        let mut stream = connect(to)?;
        stream.write_all(&[SINK; MESSAGE])?;
        let bulk = vec![0; BULK_BYTES];
        let start = Instant::now();
        let mut sent = 0;
        while start.elapsed() < TIME {
            stream.write_all(&bulk)?;
            sent += bulk.len() as u64;
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        let said = read_message(&mut stream)?;
        Ok((sent, said, start.elapsed()))
    })??;
    let received = said.split_whitespace().nth(1).and_then(|bytes| bytes.parse::<u64>().ok());
    ensure!(received == Some(sent), "{sent} bytes were sent, the backend said `{said}`");
    Ok(sent as f64 * 8.0 / took.as_secs_f64() / 1e9)
}

/// Connections per second: opened, one answer, closed.
pub(in crate::bench) fn connections(client: &Netns, to: SocketAddr) -> anyhow::Result<f64> {
    let start = Instant::now();
    in_parallel(client, CLIENTS, || (0..NEW_CONNECTIONS).try_for_each(|_| once(to).map(drop)))?;
    Ok(f64::from(CLIENTS * NEW_CONNECTIONS) / start.elapsed().as_secs_f64())
}

/// Answers per second on connections that are kept, spread over `to`.
pub(super) fn requests(client: &Netns, to: &[SocketAddr]) -> anyhow::Result<f64> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let counts = in_parallel(client, CONNECTIONS, || {
        let n = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut stream = connect(to[n % to.len()])?;
        let start = Instant::now();
        let mut count = 0_u32;
        while start.elapsed() < TIME {
            stream.write_all(&[REQUEST; MESSAGE])?;
            read_message(&mut stream)?;
            count += 1;
        }
        Ok(f64::from(count) / start.elapsed().as_secs_f64())
    })?;
    Ok(counts.iter().sum())
}

/// Datagrams per second that arrive, by `arrived`, of those that nobody answers. No more than a queue holds are under way, so
/// that no time is spent on what is then lost.
pub(super) fn datagrams(
    client: &Netns,
    to: SocketAddr,
    arrived: impl Fn() -> u64 + Sync,
) -> anyhow::Result<f64> {
    let to = SocketAddr::new(to.ip(), DISCARD_PORT);
    let per_second = client.run(|| -> io::Result<_> {
        let sockets = (0..FLOWS).map(|_| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(to)?;
            Ok(socket)
        });
        let sockets = sockets.collect::<io::Result<Vec<_>>>()?;
        let (start, before) = (Instant::now(), arrived());
        let mut sent = before;
        while start.elapsed() < TIME {
            for socket in sockets.iter().cycle().take(BURST as usize) {
                // A lost one is missing where they arrive.
                sent += u64::from(socket.send(&[0; MESSAGE]).is_ok());
            }
            let waiting = Instant::now();
            while arrived() + BURST / 2 < sent {
                if waiting.elapsed() > LOST_AFTER {
                    sent = arrived();
                }
                thread::yield_now();
            }
        }
        Ok((arrived() - before) as f64 / start.elapsed().as_secs_f64())
    })??;
    interrupt::check()?;
    Ok(per_second)
}

fn once(to: SocketAddr) -> io::Result<String> {
    let mut stream = connect(to)?;
    stream.write_all(&[REQUEST; MESSAGE])?;
    read_message(&mut stream)
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, ANSWER_MAX)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    stream.set_write_timeout(Some(ANSWER_MAX))?;
    Ok(stream)
}

fn read_message(stream: &mut TcpStream) -> io::Result<String> {
    let mut message = [0; MESSAGE];
    stream.read_exact(&mut message)?;
    Ok(String::from_utf8_lossy(&message).trim_end().to_owned())
}

fn in_parallel<T: Send>(
    client: &Netns,
    threads: u32,
    work: impl Fn() -> io::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    let results = thread::scope(|scope| {
        let start = |_| scope.spawn(|| client.run(&work));
        let threads: Vec<_> = (0..threads).map(start).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, anyhow::Result<io::Result<T>>>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect::<Vec<_>>()
    });
    interrupt::check()?;
    results.into_iter().map(|result| Ok(result??)).collect()
}
