//! Traffic between hosts of the fleet, and what comes of it: real clients where they exist, sockets where they do not.

pub(crate) mod http;
pub(crate) mod load;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};

use crate::{interrupt, netns::Netns, shell};

/// Ports the scanner asks for: all well-known ones, and the two others something listens on.
const SCANNED_PORTS: &str = "1-1024,5432,8080";
/// A name that a server sends first.
const GREETING_MAX: usize = 64;

/// One kind of traffic. What it shows is text, so that it can be printed beside what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// curl: `200 <body>`, `timeout` or `refused`.
    Http { port: u16 },
    /// A connection and one echo through it: the server's name, `timeout` or `refused`.
    Tcp { port: u16 },
    /// Datagrams: the server's name, or `silence`.
    Udp { port: u16 },
    /// Three echo requests with so much payload: `3 of 3`.
    Ping { bytes: u16 },
    /// nmap's SYN scan: open ports, and how many others are in which state.
    Scan,
}

impl Probe {
    /// Sends the traffic from inside `from` and says what came of it. `limit` is for one answer.
    pub(crate) fn run(self, from: &Netns, to: IpAddr, limit: Duration) -> anyhow::Result<String> {
        match self {
            Self::Http { port } => http(from, SocketAddr::new(to, port), limit),
            Self::Tcp { port } => from.run(|| tcp(SocketAddr::new(to, port), limit))?,
            Self::Udp { port } => from.run(|| udp(SocketAddr::new(to, port), limit))?,
            Self::Ping { bytes } => ping(from, to, bytes, limit),
            Self::Scan => scan(from, to),
        }
    }
}

/// Starts a TCP server inside, on both families, that says its name and then echoes. It ends with this process.
pub(crate) fn serve_tcp(netns: &Netns, port: u16, name: &'static str) -> anyhow::Result<()> {
    let listener = netns
        .run(|| TcpListener::bind(("::", port)))?
        .with_context(|| format!("listening on port {port} in {}", netns.name()))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || greet_and_echo(stream, name));
        }
    });
    Ok(())
}

/// Starts a UDP server inside, on both families, that answers its name. It ends with this process.
pub(crate) fn serve_udp(netns: &Netns, port: u16, name: &'static str) -> anyhow::Result<()> {
    let socket = netns
        .run(|| UdpSocket::bind(("::", port)))?
        .with_context(|| format!("binding UDP port {port} in {}", netns.name()))?;
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            // A lost answer is what the client is there to notice.
            let _ = socket.send_to(name.as_bytes(), from);
        }
    });
    Ok(())
}

/// Starts a TCP server inside, on both families, that sends a file to whoever connects. It ends with this process.
pub(crate) fn serve_file(netns: &Netns, port: u16, file: &Path) -> anyhow::Result<()> {
    let contents = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let listener = netns
        .run(|| TcpListener::bind(("::", port)))?
        .with_context(|| format!("listening on port {port} in {}", netns.name()))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A file that is not complete is what the client is there to notice.
            let _ = stream.write_all(&contents);
        }
    });
    Ok(())
}

/// Sends `count` datagrams and waits for no answer.
pub(crate) fn send_datagrams(
    from: &Netns,
    to: SocketAddr,
    payload: &[u8],
    count: u32,
) -> anyhow::Result<()> {
    from.run(|| -> io::Result<()> {
        let socket = UdpSocket::bind(unspecified(to))?;
        for _ in 0..count {
            socket.send_to(payload, to)?;
        }
        Ok(())
    })?
    .with_context(|| format!("sending datagrams to {to}"))
}

/// Asks `count` times, each time over a new connection or from a new port, and counts who answers. Ends early where nobody
/// does.
pub(crate) fn answers(
    from: &Netns,
    to: SocketAddr,
    probe: Probe,
    count: u32,
) -> anyhow::Result<BTreeMap<String, u32>> {
    /// Nothing is expected to be lost.
    const LIMIT: Duration = Duration::from_secs(5);
    const FAILURES_MAX: u32 = 3;
    from.run(|| {
        let mut answers = BTreeMap::new();
        for _ in 0..count {
            interrupt::check()?;
            let answer = match probe {
                Probe::Udp { .. } => udp(to, LIMIT)?,
                _ => http::Client::connect(to, LIMIT)
                    .and_then(|mut client| client.text("/"))
                    .unwrap_or_else(|error| outcome(&error)),
            };
            let failed = matches!(answer.as_str(), "timeout" | "silence");
            let times = answers.entry(answer).or_default();
            *times += 1;
            if failed && *times >= FAILURES_MAX {
                break;
            }
        }
        Ok(answers)
    })?
}

/// An established connection to one of our servers, used for one echo after the other.
#[derive(Debug)]
pub(crate) struct Connection(TcpStream);

impl Connection {
    /// Opens it from inside `from`.
    pub(crate) fn open(from: &Netns, to: SocketAddr) -> anyhow::Result<Self> {
        const LIMIT: Duration = Duration::from_secs(5);
        let stream = from.run(|| -> io::Result<TcpStream> {
            let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
            greeting(&mut stream, LIMIT)?;
            Ok(stream)
        })?;
        Ok(Self(stream.with_context(|| format!("connecting to {to}"))?))
    }

    /// Whether an echo comes back within `limit`.
    pub(crate) fn works(&mut self, limit: Duration) -> bool {
        round(&mut self.0, limit).is_ok()
    }
}

fn http(from: &Netns, to: SocketAddr, limit: Duration) -> anyhow::Result<String> {
    let seconds = limit.as_secs_f32().to_string();
    let mut command = from.command("curl")?;
    command.args(["--silent", "--noproxy", "*", "--max-time", &seconds]);
    let output =
        shell::capture(command.args(["--write-out", "\n%{http_code}", &format!("http://{to}/")]))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(match (output.status.code(), text.rsplit_once('\n')) {
        (Some(0), Some((body, code))) => format!("{code} {}", body.trim()),
        (Some(7), _) => "refused".to_owned(),
        (Some(28), _) => "timeout".to_owned(),
        (code, _) => format!("curl ended with {code:?}"),
    })
}

fn tcp(to: SocketAddr, limit: Duration) -> anyhow::Result<String> {
    let mut stream = match TcpStream::connect_timeout(&to, limit) {
        Ok(stream) => stream,
        Err(error) => return Ok(outcome(&error)),
    };
    let name = greeting(&mut stream, limit);
    let echoed = name.and_then(|name| round(&mut stream, limit).map(|()| name));
    Ok(echoed.unwrap_or_else(|error| outcome(&error)))
}

fn outcome(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "timeout".to_owned(),
        io::ErrorKind::ConnectionRefused => "refused".to_owned(),
        _ => error.to_string(),
    }
}

fn udp(to: SocketAddr, limit: Duration) -> anyhow::Result<String> {
    /// A datagram may be lost for other reasons, such as a neighbour that is not resolved yet.
    const TRIES: u32 = 3;
    let socket = UdpSocket::bind(unspecified(to))?;
    socket.set_read_timeout(Some(limit / TRIES))?;
    for _ in 0..TRIES {
        socket.send_to(b"cnsmo", to)?;
        let mut buffer = [0; 64];
        if let Ok((length, from)) = socket.recv_from(&mut buffer)
            && from == to
        {
            return Ok(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
    }
    Ok("silence".to_owned())
}

fn ping(from: &Netns, to: IpAddr, bytes: u16, limit: Duration) -> anyhow::Result<String> {
    let seconds = limit.as_secs_f32().to_string();
    let mut command = from.command("ping")?;
    command.args(["-n", "-q", "-c", "3", "-i", "0.2", "-W", &seconds, "-s", &bytes.to_string()]);
    let output = shell::capture(command.arg(to.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let received = text.split(", ").find_map(|part| part.strip_suffix(" received"));
    match received {
        Some(received) => Ok(format!("{received} of 3")),
        None => bail!("ping said\n{text}{}", String::from_utf8_lossy(&output.stderr)),
    }
}

fn scan(from: &Netns, to: IpAddr) -> anyhow::Result<String> {
    let mut command = from.command("nmap")?;
    command.args(["-n", "-Pn", "-sS", "-T4", "--max-retries", "2", "--min-rate", "1000"]);
    command.args(["-p", SCANNED_PORTS, "-oG", "-"]).arg(to.to_string());
    if to.is_ipv6() {
        command.arg("-6");
    }
    read_scan(&shell::read(&mut command)?)
}

/// Reads nmap's grepable output, whose line of ports is
/// `Host: A ()\tPorts: 22/open/tcp//ssh///, 80/open/tcp//http///\tIgnored State: filtered (1024)`.
fn read_scan(text: &str) -> anyhow::Result<String> {
    let line = text.lines().find(|line| line.contains("Ports: "));
    let line = line.or_else(|| text.lines().find(|line| line.contains("Ignored State: ")));
    let line = line.with_context(|| format!("nmap named no ports\n{text}"))?;
    let mut open = Vec::new();
    let mut others = Vec::new();
    for field in line.split('\t') {
        if let Some(ports) = field.strip_prefix("Ports: ") {
            // With every port in one state, the list is there and empty.
            for port in ports.split(", ").filter(|port| !port.trim().is_empty()) {
                let mut parts = port.split('/');
                match (parts.next(), parts.next()) {
                    (Some(number), Some("open")) => open.push(number.to_owned()),
                    (Some(number), Some(state)) => others.push(format!("{number} {state}")),
                    _ => bail!("nmap's port `{port}` is not understood"),
                }
            }
        } else if let Some(ignored) = field.strip_prefix("Ignored State: ") {
            let (state, count) = ignored.split_once(" (").context("nmap's ignored state")?;
            others.push(format!("{} {state}", count.trim_end_matches(')')));
        }
    }
    let open = if open.is_empty() { "none".to_owned() } else { open.join(" ") };
    Ok(format!("open: {open}; others: {}", others.join(", ")))
}

/// One message there and back.
fn round(stream: &mut TcpStream, limit: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"cnsmo")?;
    let mut buffer = [0; 5];
    stream.read_exact(&mut buffer)?;
    if &buffer == b"cnsmo" { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// The line with the server's name.
fn greeting(stream: &mut TcpStream, limit: Duration) -> io::Result<String> {
    stream.set_read_timeout(Some(limit))?;
    let mut name = Vec::new();
    while name.len() < GREETING_MAX {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        match byte {
            [b'\n'] => return Ok(String::from_utf8_lossy(&name).into_owned()),
            [byte] => name.push(byte),
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

fn greet_and_echo(mut stream: TcpStream, name: &str) {
    if stream.write_all(format!("{name}\n").as_bytes()).is_err() {
        return;
    }
    let mut buffer = [0; 2048];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

fn unspecified(to: SocketAddr) -> SocketAddr {
    if to.is_ipv4() {
        (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_is_read_as_open_ports_and_the_rest() {
        let text = "# Nmap 7.93 scan\nHost: 10.77.1.11 ()\tStatus: Up\n\
            Host: 10.77.1.11 ()\tPorts: 80/open/tcp//http///\tIgnored State: filtered (1025)\n# done\n";
        assert_eq!(read_scan(text).unwrap(), "open: 80; others: 1025 filtered");
        let text =
            "Host: h ()\tPorts: 22/open/tcp//ssh///, 80/open/tcp//http///, 81/closed/tcp/////\n";
        assert_eq!(read_scan(text).unwrap(), "open: 22 80; others: 81 closed");
        let text = "Host: h ()\tPorts: \tIgnored State: filtered (1026)\n";
        assert_eq!(read_scan(text).unwrap(), "open: none; others: 1026 filtered");
        assert!(read_scan("# Nmap done: 0 hosts up").is_err());
    }
}
