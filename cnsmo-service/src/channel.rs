//! The way to the core: HTTP/2 over mutually authenticated TLS.

use std::{error::Error, fmt, io, net::SocketAddr, path::Path, str::FromStr, time::Duration};

use rustls::AlertDescription;
use tonic::{
    Code, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint},
};

use crate::{identity::Identity, supervise::Chain};

/// The name in every core's certificate, whatever its address.
pub const CORE_DNS_NAME: &str = "core.cnsmo";
/// Metadata of a refusal by a core that does not lead: address of the one that does, empty while there is none.
pub const LEADER_HEADER: &str = "cnsmo-leader";
/// Longest wait for the TCP connection and the TLS handshake together with it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an idle connection is probed. A core that vanished without a word is noticed after this and the timeout.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long a probe may stay without an answer.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Host and port of the core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreAddress {
    host: String,
    port: u16,
}

impl CoreAddress {
    /// Host name or address; IPv6 without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl From<SocketAddr> for CoreAddress {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

impl fmt::Display for CoreAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Not of the form `HOST:PORT` or `[IPV6]:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an address is HOST:PORT, 10.0.0.1:PORT or [fd00::1]:PORT")]
pub struct InvalidAddress;

impl FromStr for CoreAddress {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let (host, port) = text.rsplit_once(':').ok_or(InvalidAddress)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or(InvalidAddress)?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().map_err(|_| InvalidAddress)?.to_string(),
            None => host.to_owned(),
        };
        let is_v6 = host.parse::<std::net::Ipv6Addr>().is_ok();
        let is_name = !host.is_empty()
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
        if is_v6 == text.starts_with('[') && (is_v6 || is_name) {
            Ok(Self { host, port })
        } else {
            Err(InvalidAddress)
        }
    }
}

/// Connects with the certificate of `identity`; only a core whose certificate its CA issued is accepted.
///
/// A certificate that the core refuses shows at the first call, not here: in TLS 1.3 (RFC 8446, section 4.4.2) the
/// client is done before the server has checked it. [`ConnectError::of_call`] tells.
///
/// # Errors
/// See [`ConnectError`].
pub async fn connect(core: &CoreAddress, identity: &Identity) -> Result<Channel, ConnectError> {
    let tls = ClientTlsConfig::new()
        .domain_name(CORE_DNS_NAME)
        .ca_certificate(Certificate::from_pem(identity.trust_bundle()))
        .identity(identity.to_tls());
    let endpoint = endpoint(core).and_then(|e| e.tls_config(tls)).map_err(ConnectError::new)?;
    endpoint.connect().await.map_err(ConnectError::new)
}

/// To the core on this machine, by its unix socket. Connects at the first call, and again after a loss.
///
/// # Errors
/// The path is not text.
pub fn local(socket: &Path) -> Result<Channel, ConnectError> {
    let uri = format!("unix://{}", socket.display());
    let endpoint = Endpoint::from_shared(uri).map_err(ConnectError::new)?;
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT).connect_lazy())
}

/// With everything but TLS.
pub(crate) fn endpoint(core: &CoreAddress) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("https://{core}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// Why the core cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No answer, or the connection was lost: try again.
    #[error("the core cannot be reached")]
    Unreachable(#[source] Box<dyn Error + Send + Sync>),
    /// Our core, but another one of its cluster leads and serves this call.
    #[error("the core does not lead")]
    Follower(#[source] Box<dyn Error + Send + Sync>),
    /// What answers cannot prove that it is our core.
    #[error("what answers is not our core")]
    CoreUntrusted(#[source] Box<dyn Error + Send + Sync>),
    /// The core does not accept our certificate: expired, revoked or of another CA.
    #[error("the core refuses our certificate")]
    CertificateRefused(#[source] Box<dyn Error + Send + Sync>),
    /// The core knows our certificate's CA, but not us.
    #[error("the core does not know this identity")]
    NotEnrolled(#[source] Box<dyn Error + Send + Sync>),
}

impl ConnectError {
    pub(crate) fn new(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let error = error.into();
        if let Some(rustls::Error::InvalidCertificate(_) | rustls::Error::General(_)) =
            tls_error(&*error)
        {
            return Self::CoreUntrusted(error);
        }
        match alert(&*error) {
            Some(AlertDescription::CertificateRequired) => Self::NotEnrolled(error),
            Some(_) => Self::CertificateRefused(error),
            None => Self::Unreachable(error),
        }
    }

    /// Classifies the failure of a call on a channel that [`connect`] returned.
    pub fn of_call(status: Status) -> Self {
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => Self::NotEnrolled(status.into()),
            Code::Unavailable if status.metadata().contains_key(LEADER_HEADER) => {
                Self::Follower(status.into())
            }
            _ => Self::new(status),
        }
    }
}

/// What a server says of a client's certificate (RFC 8446, section 6.2).
const CERTIFICATE_ALERTS: [AlertDescription; 9] = [
    AlertDescription::CertificateRequired,
    AlertDescription::BadCertificate,
    AlertDescription::UnsupportedCertificate,
    AlertDescription::CertificateRevoked,
    AlertDescription::CertificateExpired,
    AlertDescription::CertificateUnknown,
    AlertDescription::UnknownCA,
    AlertDescription::AccessDenied,
    AlertDescription::DecryptError,
];

/// The alert about our certificate among the causes. On a connection in use HTTP/2 hands on only the text of what went
/// wrong below it.
fn alert(error: &(dyn Error + 'static)) -> Option<AlertDescription> {
    if let Some(tls) = tls_error(error) {
        return CERTIFICATE_ALERTS
            .into_iter()
            .find(|alert| *tls == rustls::Error::AlertReceived(*alert));
    }
    let text = Chain(error).to_string();
    CERTIFICATE_ALERTS
        .into_iter()
        .find(|alert| text.ends_with(&rustls::Error::AlertReceived(*alert).to_string()))
}

/// The TLS error among the causes. It is inside an `io::Error`, whose `source` skips what it wraps.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_alike() {
        for text in ["core.example:7400", "10.0.0.1:7400", "[fd00::1]:7400"] {
            assert_eq!(text.parse::<CoreAddress>().unwrap().to_string(), text);
        }
        for bad in
            ["core", "core:", ":7400", "core:0", "core:70000", "fd00::1:7400", "[core]:1", "a b:1"]
        {
            assert_eq!(bad.parse::<CoreAddress>(), Err(InvalidAddress), "{bad}");
        }
    }

    #[test]
    fn failures_are_told_apart_however_deep_the_tls_error_is() {
        let wrap =
            |e: rustls::Error| io::Error::other(io::Error::new(io::ErrorKind::InvalidData, e));
        let alert = |a| ConnectError::new(wrap(rustls::Error::AlertReceived(a)));
        assert!(matches!(
            alert(AlertDescription::CertificateExpired),
            ConnectError::CertificateRefused(_)
        ));
        assert!(matches!(
            alert(AlertDescription::CertificateRequired),
            ConnectError::NotEnrolled(_)
        ));
        assert!(matches!(alert(AlertDescription::InternalError), ConnectError::Unreachable(_)));
        let untrusted = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        assert!(matches!(ConnectError::new(wrap(untrusted)), ConnectError::CoreUntrusted(_)));
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert!(matches!(ConnectError::new(refused), ConnectError::Unreachable(_)));
        let mut follower = Status::unavailable("another core leads");
        follower.metadata_mut().insert(LEADER_HEADER, "10.0.0.2:7443".parse().unwrap());
        assert!(matches!(ConnectError::of_call(follower), ConnectError::Follower(_)));
        let denied = Status::permission_denied("evicted");
        assert!(matches!(ConnectError::of_call(denied), ConnectError::NotEnrolled(_)));
    }
}
