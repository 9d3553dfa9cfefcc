//! The network between gateways and backends: TUN devices in their namespaces, joined by addresses. The same for everybody
//! who is measured, so that what differs is the gateway.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    net::Ipv4Addr,
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::OpenOptionsExt as _,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::Context as _;
use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::netns::Netns;

/// Datagrams to this port (RFC 863) are counted and thrown away: what receives them must not slow down what sends them.
pub(super) const DISCARD_PORT: u16 = 9;
/// Name of the devices.
pub(super) const DEVICE: &str = "hub0";
/// As WireGuard's tools set it.
pub(super) const MTU: u16 = 1420;

/// `virtio_net_hdr`, which tells of checksums and segments left to do, before each packet.
const VNET_HEADER: usize = 10;
const FRAME_MAX: usize = VNET_HEADER + 65_535;
/// After which an idle thread sees that it is to end.
const IDLE_MS: u16 = 100;

// From linux/if_tun.h: checksums and TCP segmentation are left to whoever reads.
const OFFLOADS: libc::c_ulong = 0x01 | 0x02 | 0x04;

/// A namespace to be joined.
pub(super) struct Port<'a> {
    pub(super) netns: &'a Netns,
    pub(super) address: Ipv4Addr,
    /// Where else packets to these addresses go, with the bits that count.
    pub(super) also: Option<(Ipv4Addr, u8)>,
}

/// Devices and threads that carry packets between them until it is dropped.
pub(super) struct Hub {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    ports: Vec<Joined>,
    ended: AtomicBool,
}

struct Joined {
    address: Ipv4Addr,
    also: Option<(Ipv4Addr, u8)>,
    device: File,
    discarded: AtomicU64,
}

impl Hub {
    /// Makes the devices, with an address of `bits` bits each.
    pub(super) fn join(ports: &[Port<'_>], bits: u8) -> anyhow::Result<Self> {
        let join = |port: &Port<'_>| -> anyhow::Result<_> {
            let device = port.netns.run(open)?.context("making a TUN device")?;
            port.netns.ip(&["link", "set", DEVICE, "mtu", &MTU.to_string(), "up"])?;
            let address = format!("{}/{bits}", port.address);
            port.netns.ip(&["address", "add", &address, "dev", DEVICE])?;
            let discarded = AtomicU64::new(0);
            Ok(Joined { address: port.address, also: port.also, device, discarded })
        };
        let ports = ports.iter().map(join).collect::<anyhow::Result<Vec<_>>>()?;
        let shared = Arc::new(Shared { ports, ended: AtomicBool::new(false) });
        let carry = |port| {
            let shared = shared.clone();
            thread::spawn(move || shared.carry(port))
        };
        let threads = (0..shared.ports.len()).map(carry).collect();
        Ok(Self { shared, threads })
    }

    /// Datagrams to the discard port so far, by the address that they were for.
    pub(super) fn discarded(&self) -> BTreeMap<Ipv4Addr, u64> {
        let count = |port: &Joined| (port.address, port.discarded.load(Ordering::Relaxed));
        self.shared.ports.iter().map(count).collect()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn carry(&self, from: usize) {
        let mut frame = vec![0; FRAME_MAX];
        let mut device = &self.ports[from].device;
        while !self.ended.load(Ordering::Relaxed) {
            match device.read(&mut frame) {
                Ok(length) => self.deliver(&frame[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut ready = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
                    // Whatever it says, the next read finds out.
                    let _ = poll(&mut ready, PollTimeout::from(IDLE_MS));
                }
                // The namespace is gone.
                Err(_) => return,
            }
        }
    }

    /// IPv4 alone; anything else is nobody's.
    fn deliver(&self, frame: &[u8]) {
        let Some(packet) = frame.get(VNET_HEADER..).filter(|packet| packet.len() >= 24) else {
            return;
        };
        let destination = Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]);
        let Some(port) = self.ports.iter().find(|port| port.takes(destination)) else { return };
        let is_udp = packet[0] == 0x45 && packet[9] == 17;
        if is_udp && packet[22..24] == DISCARD_PORT.to_be_bytes() {
            port.discarded.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // A write that fails is a packet lost, as in any network.
        let _ = (&port.device).write(frame);
    }
}

impl Joined {
    fn takes(&self, address: Ipv4Addr) -> bool {
        let inside = |(prefix, bits): (Ipv4Addr, u8)| {
            (address.to_bits() ^ prefix.to_bits()).leading_zeros() >= u32::from(bits)
        };
        address == self.address || self.also.is_some_and(inside)
    }
}

/// Makes the device in the namespace of this thread. It is gone when the file is closed.
fn open() -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // SAFETY: plain old data; zero is a value of each field.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
        *slot = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the request is a live `ifreq`, and its name ends with a zero byte.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    // SAFETY: the argument is passed by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, OFFLOADS) })?;
    Ok(file)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
