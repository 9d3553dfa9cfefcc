//! The same packets, judged by another implementation: wireguard-go.

use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
};

use cnsmo_agent::tunnel::Peer;
use cnsmo_proto::model::{Addresses, LISTEN_PORT, Name, PublicKey};
use cnsmo_tests::{Netns, Process, pause};

use super::{
    payload,
    site::{PATIENCE, Site, Vm, transfer},
};

/// wireguard-go on the second VM of a site. Its socket is in a folder that all namespaces share, so is its name.
struct Judge {
    device: String,
    _process: Process,
}

impl Judge {
    fn start(vm: &Vm, log: &Path) -> Self {
        let device = format!("cnj{}", std::process::id());
        let mut command = vm.netns.command("wireguard-go").unwrap();
        command.args(["--foreground", &device]);
        let process = Process::spawn("wireguard-go", &mut command, log).unwrap();
        let this = Self { device, _process: process };
        let end = std::time::Instant::now() + PATIENCE;
        while UnixStream::connect(this.socket()).is_err() {
            assert!(std::time::Instant::now() < end, "apt-get install wireguard-go");
            pause(std::time::Duration::from_millis(20));
        }
        this
    }

    fn socket(&self) -> String {
        format!("/var/run/wireguard/{}.sock", self.device)
    }

    fn ask(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.write_all(format!("{request}\n\n").as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("errno=0"), "{request}: {answer}");
        answer
    }

    fn up(&self, netns: &Netns, addresses: [String; 2]) {
        for address in addresses {
            netns.ip(&["addr", "add", &address, "dev", &self.device]).unwrap();
        }
        netns.ip(&["link", "set", &self.device, "mtu", "1420", "up"]).unwrap();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn wireguard_go_understands_us_and_we_understand_it() {
    let mut site = Site::apart("ov-judge", 2);
    let log = site.run.path().join("wireguard-go.log");
    let judge = Judge::start(&site.vms[1], &log);
    // A key that some agent made.
    let secret = std::fs::read(site.vms[1].state.path().join("tunnel-engine.key")).unwrap();
    let its_key: PublicKey = site.vms[1].tunnel_key();
    let our_key = site.vms[0].tunnel_key();
    judge.ask(&format!(
        "set=1\nprivate_key={}\nlisten_port={LISTEN_PORT}\npublic_key={}\nendpoint={}:{LISTEN_PORT}\n\
         allowed_ip={}/32\nallowed_ip={}/128",
        hex(&secret),
        hex(&our_key.0),
        site.vms[0].underlay4(),
        site.vms[0].overlay4(),
        site.vms[0].overlay6(),
    ));
    let (v4, v6) = (site.vms[1].overlay4(), site.vms[1].overlay6());
    judge.up(&site.vms[1].netns, [format!("{v4}/24"), format!("{v6}/64")]);

    let mut config = site.config(0);
    let node = Name::new("judge").unwrap();
    let endpoints = vec![(site.vms[1].underlay4(), LISTEN_PORT).into()];
    let addresses =
        Addresses { v4: Some("10.99.0.2".parse().unwrap()), v6: Some("fd99::2".parse().unwrap()) };
    config.peers = [(its_key, Peer { node, addresses, endpoints })].into();
    site.vms[0].set(&config);

    let [ours, its] = &site.vms[..] else { unreachable!() };
    assert!(its.pings(ours.overlay4()) && ours.pings(v6));
    let data = payload(8 << 20);
    for (from, to, address) in [(ours, its, v4), (its, ours, ours.overlay6()), (ours, its, v6)] {
        let received = transfer(from, to, address, &data);
        assert!(received == data, "to {address}: {} bytes", received.len());
    }
    let shown = judge.ask("get=1");
    assert!(!shown.contains("last_handshake_time_sec=0"), "{shown}");
}
