//! Bounds-checked access to one frame.

/// What a hook may do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Judges, and cannot rewrite: leaves packets to virtual addresses to the next hook.
    Front,
    /// Judges what the hook in front has left to it, and rewrites.
    Behind,
    /// Judges everything, and rewrites.
    Whole,
}

/// A frame, however it is reached. Each load is one comparison against the end of the frame.
pub trait Packet {
    /// What the hook may do with it.
    const ROLE: Role;
    /// `N` bytes at offset `at`, or `None` if they are not all there.
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]>;
    /// Bytes of the whole frame. More than can be loaded where the kernel keeps the payload elsewhere.
    fn length(&self) -> usize;
    /// Kernel's index of the device that it came by; 0: not known.
    fn ifindex(&self) -> u32;
    /// What its sender on this VM has marked it with; 0: nothing.
    fn mark(&self) -> u32;
}

/// Place for [`Role::Front`] in the parameter of [`Direct`].
pub const FRONT: u8 = 0;
/// Place for [`Role::Behind`].
pub const BEHIND: u8 = 1;
/// Place for [`Role::Whole`].
pub const WHOLE: u8 = 2;

/// A frame that the kernel handed us as a pair of pointers: XDP, and the linear part of an skb.
pub struct Direct<const ROLE: u8> {
    start: usize,
    end: usize,
    length: u32,
    ifindex: u32,
    mark: u32,
}

impl<const ROLE: u8> Direct<ROLE> {
    /// # Safety
    /// `start..end` must be the data of the context this program was called with.
    #[inline(always)]
    pub unsafe fn new(start: usize, end: usize, length: u32, ifindex: u32, mark: u32) -> Self {
        Self { start, end, length, ifindex, mark }
    }
}

impl<const R: u8> Packet for Direct<R> {
    const ROLE: Role = match R {
        FRONT => Role::Front,
        BEHIND => Role::Behind,
        _ => Role::Whole,
    };
    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        // `from + 1 > end` becomes `from >= end`, which proves nothing to the verifier.
        const { assert!(N > 1, "load at least two bytes") };
        // In this form and order: the verifier follows `start + at` and takes the comparison as proof.
        let from = self.start + at;
        if from + N > self.end {
            return None;
        }
        // SAFETY: the range lies within the frame.
        Some(unsafe { *(from as *const [u8; N]) })
    }
    #[inline(always)]
    fn length(&self) -> usize {
        self.length as usize
    }
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ifindex
    }
    #[inline(always)]
    fn mark(&self) -> u32 {
        self.mark
    }
}

/// A frame in user space that is only looked at.
impl Packet for [u8] {
    const ROLE: Role = Role::Front;
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.get(at..at.checked_add(N)?)?.try_into().ok()
    }
    fn length(&self) -> usize {
        self.len()
    }
    fn ifindex(&self) -> u32 {
        0
    }
    fn mark(&self) -> u32 {
        0
    }
}
