//! Our tunnel alone, for `cargo xtask bench vpn`.
//!
//! `serve STATE-DIR ADDRESS MTU PORT` prints its public key, reads `KEY ADDRESS ENDPOINT` of its one peer, prints `ready`, and
//! removes the tunnel when standard input is closed. `floor` prints the CPU-seconds in which one gigabyte is sealed and opened.
//! `tunnel --state-dir DIR` is the engine that `serve` starts, as the agent starts it.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{Write as _, stdin, stdout},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
    str::SplitWhitespace,
};

use anyhow::{Context as _, bail, ensure};
use cnsmo_agent::tunnel::{
    Backend, Peer, Tunnel as _, TunnelConfig, TunnelOptions, WireGuard, engine,
};
use cnsmo_proto::model::{Addresses, Name, PublicKey};
use ipnet::IpNet;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

/// Of a network of benchmarks (RFC 2544).
const PREFIX: &str = "198.18.0.0/24";

/// What a full packet of TCP is through a tunnel under an MTU of 1500.
const PACKET_BYTES: usize = 1400;
/// Sealed and opened to know the price of a gigabyte: a fifth of one, which is tenths of a second.
const PACKETS: u32 = 150_000;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["serve", state_dir, address, mtu, port] => serve(Path::new(state_dir), address, mtu, port),
        ["tunnel", "--state-dir", state_dir] => engine::run(Path::new(state_dir)),
        ["floor"] => floor(),
        _ => Err(anyhow::anyhow!("it is a part of `cargo xtask bench vpn`")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "cnsmo-bench-vpn: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(state_dir: &Path, address: &str, mtu: &str, port: &str) -> anyhow::Result<()> {
    let mut tunnel = WireGuard::open(TunnelOptions {
        state_dir: state_dir.to_owned(),
        program: PathBuf::from("/proc/self/exe").canonicalize()?,
        interfaces: vec![],
    })?;
    say(&hex(&tunnel.public_key()))?;
    let (key, peer) = read_peer()?;
    let config = TunnelConfig {
        network: Name::new("bench")?,
        addresses: addresses(address)?,
        prefixes: vec![PREFIX.parse::<IpNet>()?],
        listen_port: port.parse().context("the port is no number")?,
        mtu: Some(mtu.parse().context("the MTU is no number")?),
        peers: BTreeMap::from([(key, peer)]),
    };
    tunnel.prepare(&config)?;
    tunnel.complete(Some(&config))?;
    let backend = tunnel.status().map(|status| status.backend);
    ensure!(backend == Some(Backend::Engine), "it is not the engine that moves the packets");
    say("ready")?;
    // Returns when the other end of the pipe is closed.
    let mut rest = String::new();
    while stdin().read_line(&mut rest)? > 0 {}
    Ok(tunnel.complete(None)?)
}

fn read_peer() -> anyhow::Result<(PublicKey, Peer)> {
    let mut line = String::new();
    stdin().read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let key = unhex(word(&mut words, "a key")?)?;
    let address = addresses(word(&mut words, "an address")?)?;
    let endpoint: SocketAddr =
        word(&mut words, "an endpoint")?.parse().context("the endpoint is none")?;
    let peer = Peer { node: Name::new("peer")?, addresses: address, endpoints: vec![endpoint] };
    Ok((key, peer))
}

fn word<'a>(words: &mut SplitWhitespace<'a>, what: &str) -> anyhow::Result<&'a str> {
    words.next().with_context(|| format!("{what} is missing"))
}

fn addresses(text: &str) -> anyhow::Result<Addresses> {
    Ok(match text.parse().with_context(|| format!("`{text}` is no address"))? {
        IpAddr::V4(v4) => Addresses { v4: Some(v4), v6: None },
        IpAddr::V6(v6) => Addresses { v4: None, v6: Some(v6) },
    })
}

fn hex(key: &PublicKey) -> String {
    key.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> anyhow::Result<PublicKey> {
    let digits = text.as_bytes().chunks(2).map(|pair| {
        u8::from_str_radix(std::str::from_utf8(pair)?, 16).with_context(|| format!("key `{text}`"))
    });
    let bytes = digits.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(PublicKey::try_from(bytes.as_slice())?)
}

/// The cipher of WireGuard on packets of full size, one thread, each sealed and opened with one key.
fn floor() -> anyhow::Result<()> {
    let Ok(key) = UnboundKey::new(&CHACHA20_POLY1305, &[1; 32]) else { bail!("no cipher") };
    let key = LessSafeKey::new(key);
    let mut packet = vec![0; PACKET_BYTES];
    let before = cpu_nanoseconds()?;
    for counter in 0..PACKETS {
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&counter.to_le_bytes());
        let nonce = || Nonce::assume_unique_for_key(nonce);
        let sealed = key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut packet);
        let opened = key.open_in_place(nonce(), Aad::empty(), &mut packet).map(|data| data.len());
        if sealed.is_err() || opened != Ok(PACKET_BYTES) {
            bail!("a packet was not opened");
        }
        packet.truncate(PACKET_BYTES);
    }
    let seconds = (cpu_nanoseconds()? - before) as f64 / 1e9;
    let gigabytes = f64::from(PACKETS) * PACKET_BYTES as f64 / 1e9;
    say(&(seconds / gigabytes).to_string())
}

/// Of this thread: the first figure of its scheduler statistics.
fn cpu_nanoseconds() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(word(&mut text.split_whitespace(), "the time on the processor")?.parse()?)
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut out = stdout();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
