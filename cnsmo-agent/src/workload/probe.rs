//! Whether an instance is ready, and whether anybody talks with it.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use cnsmo_proto::model::{Check, Instance, Probe, protocol};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::{
    child::{Folder, beside},
    launch::Launch,
};

/// Bytes of an answer in which its first line must end.
const STATUS_LINE_BYTES_MAX: usize = 256;
/// TCP_ESTABLISHED of the kernel, in the tables of proc_net(5).
const ESTABLISHED: &str = "01";

/// One try.
///
/// # Errors
/// Why it is not ready, for people.
pub(super) async fn look(
    probe: &Probe,
    instance: &Instance,
    launch: &Launch,
    folder: &Folder,
) -> Result<(), String> {
    let look = async {
        match &probe.check {
            Check::Tcp(port) => connect(number(port, instance)?).await.map(drop),
            Check::Http { port, path } => get(number(port, instance)?, path).await,
            Check::Exec(_) => {
                let command = beside(folder, launch).map_err(|e| e.to_string())?;
                let mut command = tokio::process::Command::from(command);
                let status =
                    command.kill_on_drop(true).status().await.map_err(|e| e.to_string())?;
                let failed = || format!("the check ended with {status}");
                status.success().then_some(()).ok_or_else(failed)
            }
            // Heard, not asked for.
            Check::Announced => Ok(()),
        }
    };
    match timeout(probe.timeout, look).await {
        Ok(result) => result,
        Err(_) => Err(format!("no answer within {:?}", probe.timeout)),
    }
}

fn number(port: &str, instance: &Instance) -> Result<u16, String> {
    let named = instance.template.ports.iter().find(|one| one.name.as_str() == port);
    let number = named.map(|one| one.port).or_else(|| port.parse().ok());
    number.ok_or_else(|| format!("there is no port {port}"))
}

/// By either family: a service may have chosen one.
async fn connect(port: u16) -> Result<TcpStream, String> {
    let v4 = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let v6 = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port);
    match TcpStream::connect(v4).await {
        Ok(stream) => Ok(stream),
        Err(error) => match TcpStream::connect(v6).await {
            Ok(stream) => Ok(stream),
            Err(_) => Err(format!("port {port}: {error}")),
        },
    }
}

async fn get(port: u16, path: &str) -> Result<(), String> {
    let mut stream = connect(port).await?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: cnsmo-agent\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.map_err(|e| e.to_string())?;
    let mut answer = Vec::with_capacity(STATUS_LINE_BYTES_MAX);
    let mut some = stream.take(STATUS_LINE_BYTES_MAX as u64);
    while !answer.contains(&b'\n') {
        if some.read_buf(&mut answer).await.map_err(|e| e.to_string())? == 0 {
            break;
        }
    }
    let line = String::from_utf8_lossy(&answer);
    let line = line.lines().next().unwrap_or_default();
    let status = line.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
    match status {
        Some(200..=399_u16) => Ok(()),
        _ => Err(format!("GET {path}: {line}")),
    }
}

/// TCP connections of others with the instance's ports on this VM.
pub(super) fn connections(instance: &Instance) -> usize {
    let ports = instance.template.ports.iter().filter(|port| port.protocol == protocol::TCP);
    let ports: Vec<String> = ports.map(|port| format!("{:04X}", port.port)).collect();
    if ports.is_empty() {
        return 0;
    }
    let is_one = |line: &&str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = fields.next().and_then(|local| local.rsplit_once(':')).map(|(_, port)| port);
        let state = fields.nth(1);
        state == Some(ESTABLISHED) && local.is_some_and(|local| ports.iter().any(|p| p == local))
    };
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(fs::read_to_string);
    tables.iter().flatten().map(|table| table.lines().skip(1).filter(is_one).count()).sum()
}
