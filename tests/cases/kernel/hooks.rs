//! Hooks on a device of the kernel under test, made by system calls alone: an emulated VM has no tools.

use std::{
    fs::{File, OpenOptions},
    io::Write as _,
    net::UdpSocket,
    os::fd::{AsRawFd as _, RawFd},
    time::{Duration, Instant},
};

use cnsmo_agent::{
    datapath::{
        Datapath as _,
        kernel::{Kernel, Options, XdpChoice},
    },
    effective::Effective,
};
use cnsmo_proto::model::{Action, Direction, FirewallPolicy, Name, PolicyDefaults};
use cnsmo_tests::{
    PinDir,
    frame::{Ends, ethernet, ip, udp},
};

const DEVICE: &str = "tap0";
const OURS: [u8; 4] = [10, 9, 0, 1];

#[test]
fn xdp_is_hooked_judges_each_frame_once_and_goes() {
    in_own_network(|| hooked(XdpChoice::Auto, "xdp-native"));
}

#[test]
fn generic_xdp_is_hooked_judges_each_frame_once_and_goes() {
    in_own_network(|| hooked(XdpChoice::Generic, "xdp-generic"));
}

#[test]
fn tc_is_hooked_judges_each_frame_once_and_goes() {
    in_own_network(|| hooked(XdpChoice::Off, tc()));
}

/// What the kernel offers: tcx came with 6.6.
fn tc() -> &'static str {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut parts = release.split(['.', '-']).map(|part| part.trim().parse::<u32>());
    let mut part = || parts.next().unwrap().unwrap();
    if (part(), part()) >= (6, 6) { "tcx" } else { "clsact" }
}

fn hooked(xdp: XdpChoice, ingress: &str) {
    let mut device = tap();
    let (pins, state) = (PinDir::new("hooks"), tempfile::tempdir().unwrap());
    let options = Options {
        pins: pins.path().to_owned(),
        state: state.path().to_owned(),
        interfaces: vec![DEVICE.into()],
        xdp,
        flows: 1_024,
        policy_bytes: 1 << 16,
        rules_max: 64,
    };
    let closed = closed();
    let mut kernel = Kernel::open(options.clone()).unwrap();
    kernel.apply(&closed).unwrap();
    let hooks = &kernel.status().interfaces[0];
    assert_eq!((hooks.ingress, hooks.egress), (ingress, tc()));

    let frame = ethernet(&[], &ip(Ends::V4([10, 9, 0, 2], OURS), 17, &udp(9, 80, b"hello")));
    for expected in 1..=3 {
        device.write_all(&frame).unwrap();
        assert_eq!(denied(&mut kernel, Direction::Ingress, expected), expected);
    }
    send();
    assert_eq!(denied(&mut kernel, Direction::Egress, 1), 1);

    // A restarted agent takes the place of the first: a frame is still judged once.
    drop(kernel);
    let mut kernel = Kernel::open(options).unwrap();
    kernel.apply(&closed).unwrap();
    device.write_all(&frame).unwrap();
    assert_eq!(denied(&mut kernel, Direction::Ingress, 4), 4);
    send();
    assert_eq!(denied(&mut kernel, Direction::Egress, 2), 2);

    Kernel::detach(pins.path()).unwrap();
    device.write_all(&frame).unwrap();
    send();
    cnsmo_tests::pause(Duration::from_millis(100));
    assert_eq!(denied(&mut kernel, Direction::Ingress, 0), 4, "judged after it was detached");
    assert_eq!(denied(&mut kernel, Direction::Egress, 0), 2, "judged after it was detached");
}

/// Nothing may pass but what always does.
fn closed() -> Effective {
    let policy = FirewallPolicy {
        defaults: PolicyDefaults { ingress: Some(Action::Deny), egress: Some(Action::Deny) },
        ..FirewallPolicy::default()
    };
    Effective::merge(vec![], [(&Name::new("closed").unwrap(), &policy)])
}

/// IPv4 packets of ours that the default has denied, as soon as they are `expected` or after a while.
fn denied(kernel: &mut Kernel, direction: Direction, expected: u64) -> u64 {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let drops = kernel.status().drops;
        let ours =
            drops.iter().find(|(d, word, _)| *d == direction && *word == "denied-by-default");
        let seen = ours.map_or(0, |(_, _, count)| count.packets);
        if seen >= expected || Instant::now() > end {
            return seen;
        }
        cnsmo_tests::pause(Duration::from_millis(10));
    }
}

/// One datagram on its way out; a broadcast needs no neighbour.
fn send() {
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    socket.set_broadcast(true).unwrap();
    // Where it is dropped on the way, the kernel may say so.
    let _ = socket.send_to(b"hello", "10.255.255.255:9");
}

/// Runs `work` in a network namespace of its own, gone with the thread.
fn in_own_network(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        work();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// An Ethernet device that is up and has an address; what is written to the file comes in.
fn tap() -> File {
    // IPv6 would send frames of its own.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    request(file.as_raw_fd(), libc::TUNSETIFF, &flags.to_ne_bytes());
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // `struct sockaddr_in`: family, port, address.
    let mut address = [0; 16];
    address[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    address[4..8].copy_from_slice(&OURS);
    request(socket.as_raw_fd(), libc::SIOCSIFADDR, &address);
    let up = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    request(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &up.to_ne_bytes());
    file
}

/// An ioctl about the device with a `struct ifreq`: its name in 16 bytes, then `value`.
fn request(fd: RawFd, command: libc::Ioctl, value: &[u8]) {
    let mut request = [0u8; 40];
    request[..DEVICE.len()].copy_from_slice(DEVICE.as_bytes());
    request[16..16 + value.len()].copy_from_slice(value);
    // SAFETY: the request is as long as a `struct ifreq` and outlives the call.
    let done = unsafe { libc::ioctl(fd, command, request.as_mut_ptr()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}
