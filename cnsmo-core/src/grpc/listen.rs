//! Connections: TLS over TCP, and the unix socket.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

use crate::{audit::Audit, identity::Peer};

/// TLS connections at a time: one for each node that may join, and room for those that come back before the core has
/// noticed that they were gone. Further ones wait in the kernel.
const CONNECTIONS_MAX: usize = 25_000;
/// TLS handshakes at a time; further connections wait in the kernel. They cost most of a reconnect storm.
const HANDSHAKES_MAX: usize = 256;
/// A client that does not finish its handshake in time is dropped, and so is one that has not begun to speak after as long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// What a client must have sent by then: the preface of HTTP/2 (RFC 9113, section 3.4), which tells it from HTTP/1.1. Later
/// silence is for HTTP's own timeouts.
const OPENING_BYTES: usize = 24;
/// HTTP/1.1 has no sign of life of its own. After nine that did not come the kernel gives a connection up.
const TCP_KEEPALIVE: Duration = Duration::from_secs(10);
/// Pause after the system refused to accept, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Who is at the other end of a TLS connection. In the extensions of each of its requests.
#[derive(Clone, Debug)]
pub struct TlsInfo {
    /// Where it comes from.
    pub address: SocketAddr,
    /// What its certificate says; none: it showed none.
    pub peer: Option<Arc<Peer>>,
}

/// A TLS connection that counts.
#[derive(Debug)]
pub struct TlsConnection {
    /// Apart, because it is large, and the task that serves it has several places for the connection.
    stream: Box<TlsStream<TcpStream>>,
    info: TlsInfo,
    /// None: it has begun to speak.
    opening: Option<Opening>,
    _place: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Opening {
    received: usize,
    deadline: Pin<Box<Sleep>>,
}

impl TlsConnection {
    /// None: the certificate is of no identity.
    fn new(
        stream: TlsStream<TcpStream>,
        address: SocketAddr,
        place: OwnedSemaphorePermit,
    ) -> Option<Self> {
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let peer = match certificate {
            None => None,
            Some(certificate) => Some(Arc::new(Peer::from_certificate(certificate)?)),
        };
        let deadline = Box::pin(tokio::time::sleep(HANDSHAKE_TIMEOUT));
        let opening = Some(Opening { received: 0, deadline });
        let stream = Box::new(stream);
        Some(Self { stream, info: TlsInfo { address, peer }, opening, _place: place })
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = TlsInfo;

    fn connect_info(&self) -> TlsInfo {
        self.info.clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Some(opening) = &mut self.opening {
            opening.received += buffer.filled().len() - before;
            if opening.received >= OPENING_BYTES {
                self.opening = None;
            } else if read.is_pending() && opening.deadline.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Accepts connections and hands on those that finish the handshake. Ends when nobody takes them.
pub async fn accept_tls(
    listener: TcpListener,
    config: Arc<rustls::ServerConfig>,
    audit: Audit,
    to: mpsc::Sender<io::Result<TlsConnection>>,
) {
    let acceptor = TlsAcceptor::from(config);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok(handshake) = handshakes.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = to.closed() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, audit, to) = (acceptor.clone(), audit.clone(), to.clone());
        tokio::spawn(async move {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%peer, %error, "cannot set TCP_NODELAY");
            }
            let keepalive =
                TcpKeepalive::new().with_time(TCP_KEEPALIVE).with_interval(TCP_KEEPALIVE);
            if let Err(error) = SockRef::from(&stream).set_tcp_keepalive(&keepalive) {
                tracing::debug!(%peer, %error, "cannot set TCP keep-alive");
            }
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    if let Some(connection) = TlsConnection::new(stream, peer, place) {
                        // The server is stopping if nobody takes it.
                        let _ = to.send(Ok(connection)).await;
                    }
                }
                Ok(Err(error)) => {
                    tracing::debug!(%peer, %error, "TLS handshake failed");
                    if let Some(reason) = bad_certificate(&error) {
                        audit.refused_handshake(peer, &reason);
                    }
                }
                Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
            }
            drop(handshake);
        });
    }
}

/// What is wrong with the client's certificate, if that is why the handshake failed.
fn bad_certificate(error: &io::Error) -> Option<String> {
    let tls = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    matches!(tls, rustls::Error::InvalidCertificate(_)).then(|| tls.to_string())
}

/// Accepts local connections. Ends when nobody takes them.
pub async fn accept_unix(listener: UnixListener, to: mpsc::Sender<io::Result<UnixStream>>) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = to.closed() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                if to.send(Ok(stream)).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a local connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The socket's file; removed when dropped.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A path that is gone already is as good.
        let _ = fs::remove_file(&self.0);
    }
}

/// Listens at `path`, readable and writable for owner and group. A socket that nobody listens at any more is replaced.
pub async fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another core listens there"));
    }
    // Under another name until its mode is set: nobody shall get in before.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o660))?;
    fs::rename(&temporary, path)?;
    Ok((listener, SocketFile(path.to_owned())))
}
