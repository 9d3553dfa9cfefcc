//! The connection to the core, and its errors in an operator's words.

use std::{
    error::Error as _,
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow};
use cnsmo_proto::pb::{
    admin::admin_service_client::AdminServiceClient,
    bus::bus_service_client::BusServiceClient,
    catalog::catalog_service_client::CatalogServiceClient,
    event::event_service_client::EventServiceClient,
    flow::flow_service_client::FlowServiceClient,
    identity::{
        identity_service_client::IdentityServiceClient,
        join_token_service_client::JoinTokenServiceClient,
    },
    resource::resource_service_client::ResourceServiceClient,
    service::host_service_client::HostServiceClient,
    state::state_service_client::StateServiceClient,
};
use cnsmo_service::{
    channel::{self, CoreAddress},
    identity::{Credentials, Identity},
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

/// Largest answer. A list of policies can be long; a bound keeps a wrong peer from filling the memory.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// A local socket answers at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) type Resources = ResourceServiceClient<Channel>;

pub(crate) type Identities = IdentityServiceClient<Channel>;

/// Where the core is.
pub(crate) enum Target {
    /// On this machine.
    Socket(PathBuf),
    /// On another one; key and certificate are in `dir`.
    Remote { core: CoreAddress, dir: PathBuf },
}

pub(crate) struct Client {
    target: Target,
}

impl Client {
    /// Connects later: commands check their input first.
    pub(crate) fn new(target: Target) -> Self {
        Self { target }
    }

    pub(crate) async fn resources(&self) -> Result<Resources> {
        let client = ResourceServiceClient::new(self.connect().await?);
        Ok(client.max_decoding_message_size(ANSWER_BYTES_MAX))
    }

    pub(crate) async fn join_tokens(&self) -> Result<JoinTokenServiceClient<Channel>> {
        Ok(JoinTokenServiceClient::new(self.connect().await?))
    }

    pub(crate) async fn identities(&self) -> Result<Identities> {
        let client = IdentityServiceClient::new(self.connect().await?);
        Ok(client.max_decoding_message_size(ANSWER_BYTES_MAX))
    }

    pub(crate) async fn catalog(&self) -> Result<CatalogServiceClient<Channel>> {
        let client = CatalogServiceClient::new(self.connect().await?);
        Ok(client.max_decoding_message_size(ANSWER_BYTES_MAX))
    }

    pub(crate) async fn events(&self) -> Result<EventServiceClient<Channel>> {
        Ok(EventServiceClient::new(self.connect().await?))
    }

    pub(crate) async fn flows(&self) -> Result<FlowServiceClient<Channel>> {
        Ok(FlowServiceClient::new(self.connect().await?))
    }

    pub(crate) async fn hosts(&self) -> Result<HostServiceClient<Channel>> {
        let client = HostServiceClient::new(self.connect().await?);
        Ok(client.max_decoding_message_size(ANSWER_BYTES_MAX))
    }

    pub(crate) async fn state(&self) -> Result<StateServiceClient<Channel>> {
        let client = StateServiceClient::new(self.connect().await?);
        Ok(client.max_decoding_message_size(ANSWER_BYTES_MAX))
    }

    pub(crate) async fn admin(&self) -> Result<AdminServiceClient<Channel>> {
        Ok(AdminServiceClient::new(self.connect().await?))
    }

    pub(crate) async fn bus(&self) -> Result<BusServiceClient<Channel>> {
        let client = BusServiceClient::new(self.connect().await?);
        Ok(client.max_decoding_message_size(ANSWER_BYTES_MAX))
    }

    pub(crate) async fn connect(&self) -> Result<Channel> {
        match &self.target {
            Target::Socket(socket) => connect_local(socket).await,
            Target::Remote { core, dir } => connect_remote(core, dir).await,
        }
    }
}

async fn connect_local(path: &Path) -> Result<Channel> {
    let socket = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The URI is never resolved: the connector knows the socket.
    Endpoint::from_static("http://cnsmo.invalid")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(connector)
        .await
        .map_err(|error| unreachable(path, &error))
}

/// Renews a certificate that is past its half-life: an operator who comes daily never logs in again.
async fn connect_remote(core: &CoreAddress, dir: &Path) -> Result<Channel> {
    let shown = dir.display();
    let identity = Identity::load(dir)?.with_context(|| {
        format!("no identity in {shown}: get one with `cnsmo --core {core} login`, or name another folder with --identity")
    })?;
    let failed = || format!("failed to connect to {core}");
    let channel = channel::connect(core, &identity).await.with_context(failed)?;
    let now = SystemTime::now();
    if !identity.renew_in(now).is_zero() {
        return Ok(channel);
    }
    let expired = identity.not_after() <= now;
    match Credentials::new(dir, identity).renew(channel.clone()).await {
        Err(error) if expired => {
            let remedy = "the certificate has expired: log in again with a new token";
            Err(anyhow::Error::new(error).context(remedy))
        }
        // It still serves; the next command tries again.
        _ => Ok(channel),
    }
}

fn unreachable(socket: &Path, error: &tonic::transport::Error) -> anyhow::Error {
    let mut cause = error.source();
    let io = loop {
        match cause {
            None => break None,
            Some(inner) => match inner.downcast_ref::<io::Error>() {
                Some(io) => break Some(io),
                None => cause = inner.source(),
            },
        }
    };
    if let Some(message) = io.and_then(|io| remedy(socket, io.kind())) {
        return anyhow!(message);
    }
    anyhow!("{}", io.map_or_else(|| error.to_string(), ToString::to_string))
        .context(format!("failed to connect to {}", socket.display()))
}

/// What went wrong, and what to do about it.
fn remedy(socket: &Path, kind: io::ErrorKind) -> Option<String> {
    let path = socket.display();
    match kind {
        io::ErrorKind::NotFound => Some(format!(
            "no socket at {path}: is cnsmo-core running on this machine? \
             Name another socket with --socket or CNSMO_SOCKET"
        )),
        io::ErrorKind::PermissionDenied => Some(format!(
            "permission denied on {path}: run as root, or as a user of the socket's group \
             (`ls -l {path}` shows it)"
        )),
        io::ErrorKind::ConnectionRefused => Some(format!(
            "nobody listens on {path}: cnsmo-core has stopped; start it again \
             (`systemctl start cnsmo-core`)"
        )),
        _ => None,
    }
}

/// What the core says, without the noise of the protocol where it speaks of the operator's own input.
#[expect(clippy::needless_pass_by_value, reason = "for use in map_err")]
pub(crate) fn refused(status: Status) -> anyhow::Error {
    let message = status.message();
    match status.code() {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::OutOfRange
            if !message.is_empty() =>
        {
            anyhow!("{message}")
        }
        Code::Unimplemented => anyhow!("this core does not offer that: it is of another version"),
        Code::Unavailable => anyhow!("the core ended the connection: {message}"),
        code => anyhow!("the core answered {code:?}: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_may_not_be_used_is_said_with_the_remedy() {
        let path = Path::new("/run/cnsmo/core.sock");
        let message = remedy(path, io::ErrorKind::PermissionDenied).unwrap();
        assert!(message.starts_with("permission denied on /run/cnsmo/core.sock: run as root"));
        assert_eq!(remedy(path, io::ErrorKind::OutOfMemory), None);
    }
}
