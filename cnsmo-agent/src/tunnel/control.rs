//! How the agent steers its engine: one request and one answer per connection to a Unix socket, which ends with the
//! stream. The private key never passes here; the engine reads it from its file.

use std::{
    fs, io,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr},
    os::fd::OwnedFd,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use cnsmo_proto::model::PublicKey;
use cnsmo_service::supervise::Chain;
use ipnet::IpNet;
use nix::sys::socket::{getsockopt, sockopt};
use prost::Message as _;
use socket2::{Domain, SockAddr, Socket, Type};

/// Bytes of a message. 65,536 peers with addresses of both families fit.
const MESSAGE_BYTES_MAX: u64 = 16 << 20;
/// Both sides are on one machine; who does not answer by then is stuck.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Pause of the engine where the kernel hands no connection over.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// File of the private key below the agent's state directory.
///
/// The kernel's tunnel has a key of its own: time stamps of handshakes differ by some seconds between the two, so that
/// peers would take the first handshakes after a change for repeated ones.
#[must_use]
pub fn key_path(state_dir: &Path) -> PathBuf {
    state_dir.join("tunnel-engine.key")
}

/// The engine's socket below the agent's state directory.
#[must_use]
pub fn socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("tunnel.sock")
}

/// Tells apart builds of the program: an agent replaces an engine of another one.
///
/// # Errors
/// The file cannot be found.
pub fn build_of(program: &Path) -> io::Result<String> {
    let file = fs::metadata(program)?;
    let (device, inode, size) = (file.dev(), file.ino(), file.size());
    let changed = (file.mtime(), file.mtime_nsec());
    Ok(format!("{device}:{inode}:{size}:{}.{:09}", changed.0, changed.1))
}

/// What the agent asks for.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Request {
    /// Nothing but the answer.
    #[prost(message, tag = "1")]
    Report(()),
    /// These are the peers from now on.
    #[prost(message, tag = "2")]
    Configure(Configure),
    /// End; the device stays.
    #[prost(message, tag = "3")]
    Stop(()),
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Envelope {
    #[prost(oneof = "Request", tags = "1, 2, 3")]
    request: Option<Request>,
}

/// All that the engine is told. What is as before is not touched.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Configure {
    /// UDP port.
    #[prost(uint32, tag = "1")]
    pub listen_port: u32,
    /// Of the device, in bytes.
    #[prost(uint32, tag = "2")]
    pub mtu: u32,
    /// Others are forgotten.
    #[prost(message, repeated, tag = "3")]
    pub peers: Vec<PeerConfig>,
}

/// A peer.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PeerConfig {
    /// 32 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub public_key: Vec<u8>,
    /// CIDRs that it may send from, and that are sent to it.
    #[prost(string, repeated, tag = "2")]
    pub allowed_ips: Vec<String>,
    /// Where it may be reached; empty: not known.
    #[prost(string, tag = "3")]
    pub endpoint: String,
}

/// What the engine does now.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Report {
    /// Why the request was not carried out; empty: it was.
    #[prost(string, tag = "1")]
    pub error: String,
    /// See [`build_of`].
    #[prost(string, tag = "2")]
    pub build: String,
    /// Process id.
    #[prost(uint32, tag = "3")]
    pub pid: u32,
    /// UDP port; 0: not configured yet.
    #[prost(uint32, tag = "4")]
    pub listen_port: u32,
    /// All peers.
    #[prost(message, repeated, tag = "5")]
    pub peers: Vec<PeerReport>,
    /// Packets that went nowhere, by reason.
    #[prost(btree_map = "string, uint64", tag = "6")]
    pub drops: std::collections::BTreeMap<String, u64>,
}

/// What the engine knows of a peer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PeerReport {
    /// 32 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub public_key: Vec<u8>,
    /// Where its packets go now; empty: not known.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    /// Absent: never.
    #[prost(message, optional, tag = "3")]
    pub last_handshake: Option<prost_types::Timestamp>,
    /// Of encrypted packets.
    #[prost(uint64, tag = "4")]
    pub received_bytes: u64,
    /// Of encrypted packets.
    #[prost(uint64, tag = "5")]
    pub sent_bytes: u64,
    /// Packets that were dropped because their source address is not this peer's.
    #[prost(uint64, tag = "6")]
    pub foreign_sources: u64,
}

/// A request cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error("{field} of a peer is not valid")]
pub struct Malformed {
    field: &'static str,
}

/// The engine was not reached, or refused.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody answers.
    #[error("cannot reach the engine")]
    Unreachable(#[from] io::Error),
    /// The answer is no message.
    #[error("the engine's answer makes no sense")]
    Garbled(#[from] prost::DecodeError),
    /// It did not do it.
    #[error("the engine refused: {0}")]
    Refused(String),
}

impl PeerConfig {
    /// Key, endpoint and prefixes.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn parse(&self) -> Result<(PublicKey, Option<SocketAddr>, Vec<IpNet>), Malformed> {
        let invalid = |field| Malformed { field };
        let key = PublicKey::try_from(&*self.public_key).map_err(|_| invalid("public key"))?;
        let endpoint = match self.endpoint.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| invalid("endpoint"))?),
        };
        let allowed = self.allowed_ips.iter().map(|text| text.parse()).collect::<Result<_, _>>();
        Ok((key, endpoint, allowed.map_err(|_| invalid("allowed address"))?))
    }
}

/// Asks the engine below `state_dir`.
///
/// # Errors
/// See [`ControlError`].
pub fn ask(state_dir: &Path, request: Request) -> Result<Report, ControlError> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Also of connecting: an engine that is stuck takes nobody in once its backlog is full.
    socket.set_write_timeout(Some(TIMEOUT))?;
    socket.connect(&SockAddr::unix(socket_path(state_dir))?)?;
    let mut stream = UnixStream::from(OwnedFd::from(socket));
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(&Envelope { request: Some(request) }.encode_to_vec())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.take(MESSAGE_BYTES_MAX).read_to_end(&mut answer)?;
    if answer.is_empty() {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let report = Report::decode(&*answer)?;
    if report.error.is_empty() { Ok(report) } else { Err(ControlError::Refused(report.error)) }
}

/// What answers.
pub(super) trait Service {
    fn configure(&self, wanted: &Configure) -> anyhow::Result<()>;
    fn report(&self) -> Report;
}

/// The engine's end.
#[derive(Debug)]
pub(super) struct Listener {
    listener: UnixListener,
    build: String,
}

impl Listener {
    /// Takes the place of an engine that is gone: the caller has the device, so there is no other.
    pub(super) fn bind(state_dir: &Path) -> io::Result<Self> {
        let path = socket_path(state_dir);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, build: build_of(Path::new("/proc/self/exe"))? })
    }

    /// Serves one connection after the other, until one asks for the end.
    pub(super) fn serve(&self, service: &impl Service) -> io::Result<()> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                // Such as too many open files. Packets flow meanwhile.
                Err(error) => {
                    tracing::warn!(%error, "failed to take a request in");
                    #[expect(clippy::disallowed_methods, reason = "on a thread of its own")]
                    std::thread::sleep(ACCEPT_RETRY);
                    continue;
                }
            };
            match self.answer(stream, service) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "a request was not answered"),
            }
        }
    }

    /// Whether the engine shall end.
    fn answer(&self, mut stream: UnixStream, service: &impl Service) -> io::Result<bool> {
        let peer = getsockopt(&stream, sockopt::PeerCredentials)?.uid();
        if peer != 0 && peer != nix::unistd::geteuid().as_raw() {
            return Err(io::Error::other(format!("asked by user {peer}")));
        }
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let mut request = Vec::new();
        (&stream).take(MESSAGE_BYTES_MAX).read_to_end(&mut request)?;
        let request = Envelope::decode(&*request).map_err(io::Error::other)?.request;
        let stop = matches!(request, Some(Request::Stop(())));
        let result = match request {
            Some(Request::Configure(wanted)) => service.configure(&wanted),
            Some(Request::Report(()) | Request::Stop(())) => Ok(()),
            None => Err(anyhow::anyhow!("unknown request")),
        };
        let error = result.err().map(|e| Chain(e.as_ref()).to_string()).unwrap_or_default();
        let (build, pid) = (self.build.clone(), std::process::id());
        let report = Report { error, build, pid, ..service.report() };
        stream.write_all(&report.encode_to_vec())?;
        Ok(stop)
    }
}
