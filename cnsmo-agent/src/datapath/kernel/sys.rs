//! The few calls of bpf(2) that aya has no form for, and shared memory of array maps.

use std::{
    ffi::CString,
    io,
    mem::MaybeUninit,
    net::{Ipv4Addr, UdpSocket},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};

use aya::Pod;

const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE: libc::c_long = 2;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const MAP_UPDATE_BATCH: libc::c_long = 26;
const LINK_DETACH: libc::c_long = 34;
const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;
const F_MMAPABLE: u32 = 1 << 10;

/// `union bpf_attr` (linux/bpf.h) as far as these calls use it.
#[repr(C, align(8))]
struct Attr([u32; 32]);

impl Attr {
    fn new(words: &[u32]) -> Self {
        let mut all = [0; 32];
        all[..words.len()].copy_from_slice(words);
        Self(all)
    }

    fn set_pointer<T>(&mut self, word: usize, to: *const T) {
        let address = to as u64;
        self.0[word] = address as u32;
        self.0[word + 1] = (address >> 32) as u32;
    }

    fn call(&mut self, command: libc::c_long) -> io::Result<libc::c_long> {
        // SAFETY: the attributes are large enough for each command, and what they point to outlives the call: every
        // caller passes references that it holds.
        let result =
            unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut self.0, size_of::<Self>()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }

    fn call_for_fd(&mut self, command: libc::c_long) -> io::Result<OwnedFd> {
        let fd = self.call(command)?;
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel returned a new descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// An array of one value of `bytes` bytes that can be mapped into memory.
pub(super) fn create_large_array(bytes: u32) -> io::Result<OwnedFd> {
    Attr::new(&[MAP_TYPE_ARRAY, 4, bytes, 1, F_MMAPABLE]).call_for_fd(MAP_CREATE)
}

/// An array map of one array map; [`wait_for_readers`] needs it.
pub(super) struct GracePeriod {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl GracePeriod {
    pub(super) fn new() -> io::Result<Self> {
        let inner = Attr::new(&[MAP_TYPE_ARRAY, 4, 4, 1]).call_for_fd(MAP_CREATE)?;
        let fd = inner.as_raw_fd() as u32;
        let outer = Attr::new(&[MAP_TYPE_ARRAY_OF_MAPS, 4, 4, 1, 0, fd]).call_for_fd(MAP_CREATE)?;
        Ok(Self { outer, inner })
    }

    /// As [`Self::wait_for_readers`]; if the kernel refuses that, waits for longer than any program runs.
    pub(super) fn settle(&self) {
        if let Err(error) = self.wait_for_readers() {
            // What was switched is live all the same. A program runs for microseconds: none is left after this.
            tracing::warn!(%error, "failed to wait for running programs; waiting a second instead");
            #[expect(clippy::disallowed_methods, reason = "on the data path's own thread")]
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    }

    /// Returns when every program that runs now has ended: the kernel waits for that before an update of a map of maps
    /// returns. membarrier(2) does the same, but not with one CPU online or with nohz_full.
    fn wait_for_readers(&self) -> io::Result<()> {
        let (key, value) = (0u32, self.inner.as_raw_fd());
        let mut attr = Attr::new(&[self.outer.as_raw_fd() as u32]);
        attr.set_pointer(2, &raw const key);
        attr.set_pointer(4, &raw const value);
        attr.call(MAP_UPDATE).map(drop)
    }
}

/// Pins a map under bpffs.
pub(super) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let mut attr = Attr::new(&[0, 0, fd.as_raw_fd() as u32]);
    attr.set_pointer(0, path.as_ptr());
    attr.call(OBJ_PIN).map(drop)
}

/// Gives memory back that was needed for a while: to read the object takes several times its size, to compile a policy more
/// than to keep it. glibc would keep it for the next time.
pub(super) fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches nothing that is allocated.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Opens what is pinned at `path`.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let mut attr = Attr::new(&[]);
    attr.set_pointer(0, path.as_ptr());
    attr.call_for_fd(OBJ_GET)
}

/// Takes the link that is pinned at `path` off its hook, at once: without its pin it would go some time later.
pub(super) fn detach_link(path: &Path) -> io::Result<()> {
    let link = open_pinned(path)?;
    Attr::new(&[link.as_raw_fd() as u32]).call(LINK_DETACH).map(drop)
}

/// The link-layer type of a device (`ARPHRD_*`). Not by getifaddrs(3), which knows devices with a link-layer address
/// only: a tunnel has none.
pub(super) fn link_layer(interface: &str) -> io::Result<u16> {
    // SAFETY: zeros are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: the call reads and writes a `struct ifreq`, which outlives it.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has written this member; any bytes are valid.
    Ok(unsafe { request.ifr_ifru.ifru_hwaddr.sa_family })
}

/// Zeroes `n` values of `bytes` bytes, a multiple of eight, from place `first` on, in an array that each of `cpus` has.
pub(super) fn clear_per_cpu(
    map: BorrowedFd<'_>,
    first: u32,
    n: u32,
    bytes: usize,
    cpus: usize,
) -> io::Result<()> {
    /// Places per call.
    const CHUNK: u32 = 4_096;
    let values = vec![0_u64; CHUNK as usize * cpus * bytes / 8];
    let places: Vec<u32> = (first..first + n).collect();
    for keys in places.chunks(CHUNK as usize) {
        let mut attr = Attr::new(&[]);
        attr.set_pointer(4, keys.as_ptr());
        attr.set_pointer(6, values.as_ptr());
        attr.0[8] = keys.len() as u32;
        attr.0[9] = map.as_raw_fd() as u32;
        attr.call(MAP_UPDATE_BATCH)?;
    }
    Ok(())
}

/// Walks a hash map by batches of buckets.
pub(super) struct Batches<K, V> {
    keys: Vec<MaybeUninit<K>>,
    values: Vec<MaybeUninit<V>>,
    /// Where the next batch begins; `None`: at the start.
    token: Option<u32>,
}

impl<K: Pod, V: Pod> Batches<K, V> {
    /// `size` entries at once; more than any bucket holds.
    pub(super) fn new(size: usize) -> Self {
        let keys = vec![MaybeUninit::uninit(); size];
        let values = vec![MaybeUninit::uninit(); size];
        Self { keys, values, token: None }
    }

    /// The next entries, and whether they were the last; after the last it begins again.
    pub(super) fn next(
        &mut self,
        map: BorrowedFd<'_>,
    ) -> io::Result<(impl Iterator<Item = (K, V)> + use<'_, K, V>, bool)> {
        let mut out = 0u32;
        let token = self.token;
        let mut attr = Attr::new(&[]);
        if let Some(token) = &token {
            attr.set_pointer(0, ptr::from_ref(token));
        }
        attr.set_pointer(2, &raw mut out);
        attr.set_pointer(4, self.keys.as_mut_ptr());
        attr.set_pointer(6, self.values.as_mut_ptr());
        attr.0[8] = self.keys.len() as u32;
        attr.0[9] = map.as_raw_fd() as u32;
        let done = match attr.call(MAP_LOOKUP_BATCH) {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        self.token = if done { None } else { Some(out) };
        let found = (attr.0[8] as usize).min(self.keys.len());
        let entries = self.keys[..found].iter().zip(&self.values[..found]);
        // SAFETY: the kernel has filled that many, and any bytes are a valid `Pod`.
        let entries = entries.map(|(k, v)| unsafe { (k.assume_init(), v.assume_init()) });
        Ok((entries, done))
    }
}

/// The memory of an array map with values of `T`.
pub(super) struct Mapped<T> {
    at: *mut T,
    length: usize,
}

// SAFETY: memory shared with the kernel; every access copies plain data.
unsafe impl<T: Pod> Send for Mapped<T> {}

impl<T: Pod> Mapped<T> {
    /// Maps `length` values of an array whose values lie one behind the other.
    pub(super) fn new(map: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        const PAGE: usize = 4096;
        let bytes = (length * size_of::<T>()).next_multiple_of(PAGE);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, map.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { at: at.cast(), length })
    }

    /// Copies `values` to place `from` on.
    pub(super) fn write(&self, from: usize, values: &[T]) {
        assert!(from + values.len() <= self.length, "write beyond the end of a map");
        // SAFETY: inside the mapping; programs that read meanwhile take any value.
        unsafe { ptr::copy_nonoverlapping(values.as_ptr(), self.at.add(from), values.len()) }
    }

    /// Copies `n` values from place `from` on.
    pub(super) fn read(&self, from: usize, n: usize) -> Vec<T> {
        assert!(from + n <= self.length, "read beyond the end of a map");
        // SAFETY: inside the mapping.
        (from..from + n).map(|n| unsafe { self.at.add(n).read_volatile() }).collect()
    }

    /// Whether the values from place `from` on are `values`.
    pub(super) fn holds(&self, from: usize, values: &[T]) -> bool
    where
        T: PartialEq,
    {
        self.read(from, values.len()) == values
    }

    /// The word at byte `offset`, for stores that programs see whole and in order.
    pub(super) fn store_word(&self, offset: usize, value: u64) {
        assert!(
            offset.is_multiple_of(8) && offset + 8 <= self.length * size_of::<T>(),
            "no such word"
        );
        // SAFETY: inside the mapping and aligned; the kernel reads it by one load.
        unsafe { AtomicU64::from_ptr(self.at.byte_add(offset).cast()) }
            .store(value, Ordering::Release);
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        const PAGE: usize = 4096;
        let bytes = (self.length * size_of::<T>()).next_multiple_of(PAGE);
        // SAFETY: mapped by `new` with this length; nothing borrows from it.
        unsafe { libc::munmap(self.at.cast(), bytes) };
    }
}
