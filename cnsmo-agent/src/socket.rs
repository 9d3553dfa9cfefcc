//! The agent's unix socket: whoever is root on this VM steers its services, also without a core.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use cnsmo_proto::pb::service::host_service_server::HostServiceServer;
use cnsmo_service::{
    host::{
        Host,
        front::{Front, Local},
    },
    supervise::Stop,
};
use nix::unistd::geteuid;
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Request, Status,
    transport::{Server, server::UdsConnectInfo},
};

/// Largest message: names of a service, and a time.
const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// Calls at a time on one connection.
const STREAMS_MAX: u32 = 16;

/// Serves `HostService` at `path` until `stop`; then the file is gone. `node`: as which this VM is known, if it is already.
///
/// # Errors
/// Another program listens there, or the file cannot be made.
pub async fn serve(
    path: &Path,
    host: Host,
    node: &str,
    mut stop: Stop,
) -> io::Result<JoinHandle<()>> {
    let (listener, file) = bind(path).await?;
    let service = HostServiceServer::new(Front(Local::new(host, node)))
        .max_decoding_message_size(MESSAGE_BYTES_MAX);
    let service = tonic::service::interceptor::InterceptedService::new(service, check_peer);
    let server = Server::builder().max_concurrent_streams(STREAMS_MAX).add_service(service);
    Ok(tokio::spawn(async move {
        let incoming = UnixListenerStream::new(listener);
        let stopped = async move { stop.asked().await };
        if let Err(error) = server.serve_with_incoming_shutdown(incoming, stopped).await {
            tracing::error!(%error, "services cannot be steered on this VM any more");
        }
        drop(file);
    }))
}

/// The file of a socket, removed with it.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(%error, "the socket is left behind");
        }
    }
}

async fn bind(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another agent listens there"));
    }
    // Under another name until its mode is set: nobody shall get in before.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
    fs::rename(&temporary, path)?;
    Ok((listener, SocketFile(path.to_owned())))
}

/// The mode of the file says the same; whoever got hold of a descriptor is refused all the same.
fn check_peer(request: Request<()>) -> Result<Request<()>, Status> {
    let info = request.extensions().get::<UdsConnectInfo>();
    let uid = info.and_then(|info| info.peer_cred).map(|peer| peer.uid());
    if uid.is_some_and(|uid| uid == 0 || uid == geteuid().as_raw()) {
        return Ok(request);
    }
    Err(Status::permission_denied("services are steered by root"))
}
