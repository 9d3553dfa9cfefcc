//! Bounds-checked access to one frame.

/// A frame, however it is reached. Each load is one comparison against the end of the frame.
pub trait Packet {
    /// `N` bytes at offset `at`, or `None` if they are not all there.
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]>;
    /// Bytes of the whole frame. More than can be loaded where the kernel keeps the payload elsewhere.
    fn length(&self) -> usize;
}

/// A frame that the kernel handed us as a pair of pointers: XDP, and the linear part of an skb.
pub struct Direct {
    start: usize,
    end: usize,
    length: usize,
}

impl Direct {
    /// # Safety
    /// `start..end` must be the data of the context this program was called with.
    #[inline(always)]
    pub unsafe fn new(start: usize, end: usize, length: usize) -> Self {
        Self { start, end, length }
    }
}

impl Packet for Direct {
    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
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
        self.length
    }
}

/// A frame in user space.
impl Packet for [u8] {
    fn load<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.get(at..at.checked_add(N)?)?.try_into().ok()
    }
    fn length(&self) -> usize {
        self.len()
    }
}
