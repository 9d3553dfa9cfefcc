//! The device: one read or write moves a packet or super-packet with its `virtio_net_hdr`.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::fs::OpenOptionsExt as _,
    },
};

use super::{
    merge::Sink,
    vnet::{self, VnetHeader},
};

// From linux/if_tun.h.
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

/// Header and the longest packet.
pub(super) const FRAME_BYTES_MAX: usize = vnet::LEN + 65_535;
/// Header and the parts of one run.
const PARTS_MAX: usize = 1 + 64;

/// A descriptor of the device.
#[derive(Debug)]
pub(super) struct Tun {
    file: File,
    uso: bool,
}

impl Tun {
    /// Takes the device, making it if it is not there. It stays when the process ends, and while one process has it
    /// no other can: that is `EBUSY`.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // SAFETY: plain old data; zero is a value of each field.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.len() >= request.ifr_name.len() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "name of the device too long"));
        }
        for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *slot = byte.cast_signed();
        }
        request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
        // SAFETY: the request is a live `ifreq` that ends with a zero byte.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        let tso = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6;
        let set = |offload: libc::c_ulong| {
            // SAFETY: the argument is passed by value.
            check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offload) })
        };
        // Since Linux 6.2.
        let uso = set(tso | TUN_F_USO4 | TUN_F_USO6).is_ok();
        if !uso {
            set(tso)?;
        }
        let persist: libc::c_ulong = 1;
        // SAFETY: the argument is passed by value.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, persist) })?;
        Ok(Self { file, uso })
    }

    /// Whether UDP super-packets may be written.
    pub(super) fn has_uso(&self) -> bool {
        self.uso
    }

    pub(super) fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(frame)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Sink for &Tun {
    /// A failed write is a lost packet, as in any network: the device may be down.
    fn write(&mut self, header: &VnetHeader, parts: &[&[u8]]) {
        let header = header.emit();
        let mut slices = [IoSlice::new(&[]); PARTS_MAX];
        slices[0] = IoSlice::new(&header);
        for (slice, part) in slices[1..].iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        let _ = (&self.file).write_vectored(&slices[..=parts.len()]);
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
