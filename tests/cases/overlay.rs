//! Tunnels between VMs, by whatever this kernel lets move their packets.

mod judge;
mod site;

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use cnsmo_agent::tunnel::Backend;
use cnsmo_proto::model::{LISTEN_PORT, Name, PublicKey};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use self::site::{PATIENCE, Site, contains, echo, start_of, transfer};

const MARKER: &[u8] = b"7f2c-in-clear-on-the-wire";

/// Bytes that no two places have in common.
fn payload(len: u32) -> Vec<u8> {
    (0..len / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

#[test]
fn all_pairs_reach_each_other_over_both_families() {
    let site = Site::joined("ov-pairs", 3);
    for from in &site.vms {
        for to in site.vms.iter().filter(|to| to.n != from.n) {
            assert!(from.pings(to.overlay4()), "{} -> {} IPv4", from.n, to.n);
            assert!(from.pings(to.overlay6()), "{} -> {} IPv6", from.n, to.n);
        }
    }
}

#[test]
fn bulk_transfers_and_datagrams_arrive_whole() {
    let site = Site::joined("ov-bulk", 3);
    let [a, b, c] = &site.vms[..] else { unreachable!() };
    let data = payload(8 << 20);
    for (from, to) in [(a, b), (b, a), (a, c)] {
        for address in [to.overlay4(), to.overlay6()] {
            let received = transfer(from, to, address, &data);
            assert!(received == data, "{} -> {address}: {} bytes", from.n, received.len());
        }
    }
    for len in [0, 1, 1_372, 1_372 * 3] {
        let datagram = payload(len);
        assert_eq!(echo(a, b, b.overlay4(), &datagram), datagram);
        assert_eq!(echo(b, c, c.overlay6(), &datagram), datagram);
    }
}

#[test]
fn a_path_with_a_smaller_mtu_is_no_black_hole() {
    let site = Site::joined("ov-mtu", 3);
    let [a, b, c] = &site.vms[..] else { unreachable!() };
    for vm in ["vm2", "vm3"] {
        site.router.ip(&["link", "set", vm, "mtu", "1300"]).unwrap();
    }
    let data = payload(256 << 10);
    // Over IPv4 and over IPv6, whose routers do not fragment.
    for to in [b, c] {
        assert!(a.pings(to.overlay4()));
        let received = transfer(a, to, to.overlay4(), &data);
        assert!(received == data, "to {}: {} bytes", to.n, received.len());
    }
}

#[test]
fn a_removed_peer_is_cut_off_and_the_others_notice_nothing() {
    let mut site = Site::joined("ov-remove", 3);
    let addresses: Vec<_> = site.vms.iter().map(site::Vm::overlay4).collect();
    assert!(site.vms[2].pings(addresses[0]) && site.vms[1].pings(addresses[0]));
    let before = site.vms[0].peer(2).last_handshake;

    let mut config = site.config(0);
    let removed = site.vms[2].tunnel_key();
    config.peers.remove(&removed);
    site.vms[0].set(&config);

    let quick = |to: &str| ["-c", "3", "-i", "0.2", "-W", "1", to].map(str::to_owned);
    let fails = |from: usize, to: usize| {
        let args = quick(&addresses[to].to_string());
        !site.vms[from].ping(&args.each_ref().map(String::as_str))
    };
    assert!(fails(2, 0), "from the removed peer");
    assert!(fails(0, 2), "to the removed peer");
    assert!(!fails(1, 0), "another peer");
    assert_eq!(site.vms[0].peer(2).last_handshake, before, "its session was kept");
}

#[test]
fn a_peer_that_moves_is_followed() {
    let site = Site::joined("ov-roam", 2);
    let [a, b] = &site.vms[..] else { unreachable!() };
    assert!(a.pings(b.overlay4()));
    b.netns.ip(&["addr", "del", "10.61.2.2/24", "dev", "eth0"]).unwrap();
    b.netns.ip(&["addr", "add", "10.61.2.77/24", "dev", "eth0"]).unwrap();
    b.netns.ip(&["route", "replace", "default", "via", "10.61.2.1"]).unwrap();
    assert!(b.pings(a.overlay4()), "from where it is now");
    assert!(a.pings(b.overlay4()), "to where it is now");
    let endpoint = a.report().peers[0].endpoint.clone();
    assert_eq!(endpoint, format!("10.61.2.77:{LISTEN_PORT}"));
}

#[test]
fn a_peer_that_does_not_answer_is_tried_at_its_next_endpoint() {
    let mut site = Site::apart("ov-next", 2);
    let mut config = site.config(0);
    for peer in config.peers.values_mut() {
        peer.endpoints.insert(0, SocketAddr::from(([10, 61, 2, 250], LISTEN_PORT)));
    }
    site.vms[0].set(&config);
    // The other one must not find us first.
    let mut answering = site.config(1);
    for peer in answering.peers.values_mut() {
        peer.endpoints.clear();
    }
    site.vms[1].set(&answering);
    let to = site.vms[1].overlay4().to_string();
    let end = Instant::now() + PATIENCE * 3;
    while !site.vms[0].ping(&["-c", "1", "-W", "1", &to]) {
        assert!(Instant::now() < end, "{:?}", site.vms[0].peer(2));
        site.vms[0].tend();
    }
    let endpoint = SocketAddr::new(site.vms[1].underlay4(), LISTEN_PORT);
    assert_eq!(site.vms[0].peer(2).endpoint, Some(endpoint));
}

#[test]
fn a_packet_with_the_address_of_another_is_dropped_and_counted() {
    let site = Site::joined("ov-foreign", 2);
    let [a, b] = &site.vms[..] else { unreachable!() };
    assert!(b.ping(&["-c", "1", "-W", "5", &a.overlay4().to_string()]), "with its own address");
    assert_eq!(a.report().drops["foreign-source"], 0);
    b.netns.ip(&["addr", "add", "10.99.0.77/32", "dev", "cnsmo0"]).unwrap();
    let to = a.overlay4().to_string();
    assert!(!b.ping(&["-c", "2", "-i", "0.2", "-W", "1", "-I", "10.99.0.77", &to]));
    assert_eq!(a.report().drops["foreign-source"], 2);
    assert_eq!(a.report().peers[0].foreign_sources, 2);
}

#[test]
fn nothing_is_in_clear_on_the_wire_and_the_key_stays_where_it_is() {
    let site = Site::joined("ov-clear", 2);
    let [a, b] = &site.vms[..] else { unreachable!() };
    let capture = site.capture("overlay");
    assert_eq!(echo(a, b, b.overlay4(), MARKER), MARKER);
    let wire = capture.bytes(&site);
    let key = fs::read(a.state.path().join("tunnel-engine.key")).unwrap();
    assert!(!wire.is_empty() && !contains(&wire, MARKER) && !contains(&wire, &key));

    let capture = site.capture("underlay");
    assert_eq!(echo(a, b, b.underlay4(), MARKER), MARKER);
    assert!(contains(&capture.bytes(&site), MARKER), "the witness sees what is in clear");

    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let start = start_of(a.report().pid);
    let state = a.state.path().to_str().unwrap();
    assert!(contains(&start["cmdline"], state.as_bytes()), "the right process is looked at");
    for (file, bytes) in start {
        assert!(!contains(&bytes, &key) && !contains(&bytes, hex.as_bytes()), "{file}");
    }
}

#[test]
fn a_killed_engine_leaks_nothing_and_is_started_again() {
    let mut site = Site::joined("ov-kill", 2);
    let to = site.vms[1].overlay4();
    assert!(site.vms[0].pings(to));
    let pid = site.vms[0].report().pid;
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();

    let capture = site.capture("killed");
    let socket = site.vms[0].netns.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    let sent = socket.send_to(MARKER, (to, 9));
    assert!(!site.vms[0].ping(&["-c", "1", "-W", "1", &to.to_string()]));
    assert!(!contains(&capture.bytes(&site), MARKER), "{sent:?}");

    site.vms[0].tend();
    assert_ne!(site.vms[0].report().pid, pid);
    assert!(site.vms[0].pings(to));
    let from = site.vms[0].overlay6();
    assert!(site.vms[1].pings(from), "the other end has not to be told");
}

#[test]
fn an_agent_that_starts_again_does_not_touch_the_tunnel() {
    let mut site = Site::joined("ov-adopt", 2);
    let to = site.vms[1].overlay4();
    assert!(site.vms[0].pings(to));
    let before = (site.vms[0].report().pid, site.vms[0].peer(2).last_handshake);
    let config = site.config(0);
    let (mut vms, data) = (std::mem::take(&mut site.vms), payload(64 << 20));
    let (a, b) = vms.split_at_mut(1);
    let receiver = b[0].netns.run(|| std::net::TcpListener::bind((to, 0))).unwrap().unwrap();
    let target = receiver.local_addr().unwrap();
    let stream = a[0].netns.run(|| std::net::TcpStream::connect_timeout(&target, PATIENCE));
    let mut stream = stream.unwrap().unwrap();
    thread::scope(|scope| {
        let received = scope.spawn(move || {
            let mut received = Vec::new();
            let (mut stream, _) = receiver.accept().unwrap();
            std::io::Read::read_to_end(&mut stream, &mut received).unwrap();
            received
        });
        let sent = scope.spawn(|| {
            std::io::Write::write_all(&mut stream, &data).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        });
        for _ in 0..5 {
            a[0].open();
            a[0].set(&config);
            a[0].tend();
        }
        sent.join().unwrap();
        assert!(received.join().unwrap() == data);
    });
    let after = (a[0].report().pid, a[0].peer(2).last_handshake);
    assert_eq!(after, before, "the same engine with the same session");
}

#[test]
fn a_thousand_peers_are_told_apart() {
    let mut site = Site::joined("ov-many", 2);
    let mut config = site.config(0);
    let (_, real) = config.peers.iter().next().map(|(key, peer)| (*key, peer.clone())).unwrap();
    for n in 0..1_000_u16 {
        let [high, low] = n.to_be_bytes();
        let mut peer = real.clone();
        peer.node = Name::new(format!("absent{n}")).unwrap();
        peer.addresses.v4 = Some([10, 99, 4 + high, low].into());
        peer.addresses.v6 = Some(std::net::Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 1, n));
        let mut key = [0xa5; 32];
        key[..2].copy_from_slice(&[high, low]);
        config.peers.insert(PublicKey(key), peer);
    }
    site.vms[0].set(&config);
    let (from, to) = (site.vms[0].overlay6(), site.vms[1].overlay4());
    assert!(site.vms[0].pings(to) && site.vms[1].pings(from));
    assert_eq!(site.vms[0].report().peers.len(), 1_001);
}

#[test]
fn an_engine_of_another_build_is_replaced() {
    let mut site = Site::joined("ov-build", 2);
    let to = site.vms[1].overlay4();
    assert!(site.vms[0].pings(to));
    let pid = site.vms[0].report().pid;
    let other = site.run.path().join("cnsmo-agent");
    fs::copy(site::agent(), &other).unwrap();
    site.vms[0].open_with(other);
    let config = site.config(0);
    site.vms[0].set(&config);
    assert_ne!(site.vms[0].report().pid, pid);
    assert!(site.vms[0].pings(to));
}

#[test]
fn port_address_and_mtu_change_in_place() {
    let mut site = Site::joined("ov-change", 2);
    let (to, from) = (site.vms[1].overlay4(), site.vms[0].overlay4());
    assert!(site.vms[0].pings(to));
    let pid = site.vms[0].report().pid;
    let mut config = site.config(0);
    config.listen_port = 4_000;
    config.mtu = Some(1_300);
    config.addresses.v6 = Some("fd99::42".parse().unwrap());
    site.vms[0].set(&config);
    assert!(site.vms[0].pings(to), "from the new port");
    assert!(site.vms[1].pings(from), "to the new port");
    assert_eq!(site.vms[1].peer(1).endpoint.unwrap().port(), 4_000);
    assert_eq!(site.vms[0].report().pid, pid);
    let link = site.vms[0].netns.command("ip").unwrap().args(["addr", "show", "cnsmo0"]).output();
    let link = String::from_utf8(link.unwrap().stdout).unwrap();
    assert!(link.contains("mtu 1300") && link.contains("qlen 1000"), "{link}");
    assert!(link.contains("fd99::42/128") && !link.contains("fd99::1/128"), "{link}");
    assert!(!link.contains("fe80::"), "{link}");
}

#[test]
fn an_end_of_the_tunnel_leaves_nothing_behind() {
    let mut site = Site::joined("ov-end", 2);
    assert_eq!(
        site.vms[0].backend(),
        Backend::Engine,
        "else this test knows no process to look for"
    );
    let pid = site.vms[0].report().pid;
    site.vms[0].leave();
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
    let link = site.vms[0].netns.command("ip").unwrap().args(["link", "show", "cnsmo0"]).output();
    assert!(!link.unwrap().status.success());

    // `cnsmo-agent detach`, which knows nothing of the engine.
    let pid = site.vms[1].report().pid;
    let detach = site.vms[1].netns.run(cnsmo_agent::tunnel::WireGuard::detach);
    detach.unwrap().unwrap();
    let end = Instant::now() + PATIENCE;
    while fs::read_link(format!("/proc/{pid}/exe")).is_ok() {
        assert!(Instant::now() < end, "the engine outlives its device");
        cnsmo_tests::pause(Duration::from_millis(20));
    }
}

#[test]
fn keys_are_made_on_each_vm_and_stay() {
    let mut site = Site::apart("ov-keys", 2);
    let keys: Vec<PublicKey> = site.vms.iter().map(site::Vm::tunnel_key).collect();
    assert_ne!(keys[0], keys[1]);
    site.vms[0].open();
    assert_eq!(site.vms[0].tunnel_key(), keys[0]);
}
