// SPDX-License-Identifier: GPL-2.0-or-later
//! Memory that outlives a borrow: anonymous buffers for the ring, and memfds shared with the service.
//!
//! Not an allocator: every region is mapped once, at control time, and unmapped when its owner goes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};

pub const PAGE: usize = 4096;

/// A mapped region, unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a Mapping is plain memory; whoever shares it goes through atomics or hands whole spans from one stage to the next.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn map(len: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<Self> {
        Self::map_for(libc::PROT_READ | libc::PROT_WRITE, len, flags, fd)
    }

    fn map_for(access: libc::c_int, len: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<Self> {
        let len = len.max(1).next_multiple_of(PAGE);
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self { start, len })
    }

    /// Zeroed private memory of at least `len` bytes, page aligned; pages appear when they are first touched.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// As [`Self::anonymous`], with all pages there (and locked, where memory is).
    pub fn populated(len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE, -1)
    }

    /// The first `len` bytes of what a driver shows, for reading only: nobody may write to spans of it.
    pub fn of_driver(file: &File, len: usize) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        Self::map_for(libc::PROT_READ, len, flags, file.as_raw_fd())
    }

    /// `len` bytes at `offset`. Panics when outside: a span is never computed from client data unchecked.
    pub fn span(&self, offset: usize, len: usize) -> Span {
        assert!(offset <= self.len && len <= self.len - offset);
        // SAFETY: the sum stays within the mapping, as just checked.
        let start = unsafe { self.start.add(offset) };
        Span { start, len }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the region was mapped by `map` and is unmapped once; the owners of spans end before their mapping
        // (a connection or an image is dropped only when no operation of its is in flight).
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// A piece of a [`Mapping`], without a lifetime so that the kernel may hold it while an operation is in flight.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: see Mapping.
unsafe impl Send for Span {}

impl Span {
    pub fn as_ptr(self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub fn len(self) -> usize {
        self.len
    }

    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The sub-span of `len` bytes from `offset`. Panics when outside.
    pub fn at(self, offset: usize, len: usize) -> Self {
        assert!(offset <= self.len && len <= self.len - offset);
        // SAFETY: the sum stays within the mapping, as just checked.
        let start = unsafe { self.start.add(offset) };
        Self { start, len }
    }

    pub fn from(self, offset: usize) -> Self {
        self.at(offset, self.len - offset)
    }

    pub fn bytes<'a>(self) -> &'a [u8] {
        // SAFETY: one thread owns a span at a time (the engine's), the kernel writes to it only while an operation is in
        // flight, and the engine looks at it only after the completion.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub fn copy_from(self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len);
        // SAFETY: both regions are valid for the length just checked; `copy` allows them to overlap.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.start.as_ptr(), bytes.len()) };
    }

    pub fn zero(self) {
        // SAFETY: the span is valid for its length.
        unsafe { std::ptr::write_bytes(self.start.as_ptr(), 0, self.len) };
    }

    /// Whether all bytes are zero (a run of zeros needs no room in the difference storage).
    pub fn is_zero(self) -> bool {
        let bytes = self.bytes();
        bytes.first().is_none_or(|first| *first == 0)
            && bytes.get(1..).is_none_or(|rest| *rest == bytes[..bytes.len() - 1])
    }
}

/// A memfd that the data path writes and the service reads.
#[derive(Debug)]
pub struct Shared {
    id: u64,
    mapping: Mapping,
    len: usize,
    reader: OwnedFd,
}

impl Shared {
    /// `len` zero bytes named `name` (seen in /proc), sealed: the size is fixed and nobody else can map it writable.
    ///
    /// `populate` touches all pages now, for memory that is first written behind a closed gate.
    pub fn new(name: &std::ffi::CStr, len: usize, populate: bool) -> io::Result<Self> {
        // SAFETY: plain system call with a NUL-terminated name.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len as u64)?;
        let populate = if populate { libc::MAP_POPULATE } else { 0 };
        let mapping = Mapping::map(len, libc::MAP_SHARED | populate, fd)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
        // SAFETY: fcntl with an integer argument. F_SEAL_FUTURE_WRITE (5.1) leaves the mapping above writable.
        if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let reader = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into();
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            id,
            mapping,
            len,
            reader,
        })
    }

    /// New memory with the content of that behind `reader`, which a process that died has left.
    pub fn copy_of(name: &std::ffi::CStr, reader: &File) -> io::Result<Self> {
        let len = reader.metadata()?.len();
        let copy = Self::new(name, len as usize, false)?;
        let mut at = 0;
        // Holes stay holes: a chunk table is mostly one.
        while let Ok(data) = crate::sys::seek(reader.as_raw_fd(), at, libc::SEEK_DATA) {
            at = data;
            let end = crate::sys::seek(reader.as_raw_fd(), at, libc::SEEK_HOLE)
                .unwrap_or(len)
                .min(len);
            while at < end {
                let into = copy.span(at as usize, (end - at) as usize);
                match crate::sys::read_at(reader.as_raw_fd(), into, at, true) {
                    Ok(0) | Err(libc::EIO) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(count) => at += count as u64,
                    Err(libc::EINTR) => {}
                    Err(errno) => return Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
        Ok(copy)
    }

    /// Names it in this process: no other memory has or had this number.
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The descriptor to hand out: opened read-only.
    pub fn reader(&self) -> &OwnedFd {
        &self.reader
    }

    /// Bytes `offset..offset + len` as atomics: the service reads them while we write.
    pub fn bytes(&self, offset: usize, len: usize) -> &[AtomicU8] {
        let span = self.mapping.span(offset, len);
        // SAFETY: AtomicU8 has the layout of u8, the region lives as long as `self`, all access is atomic.
        unsafe { std::slice::from_raw_parts(span.as_ptr().cast(), len) }
    }

    /// `count` words from byte `offset` (a multiple of 8).
    pub fn words(&self, offset: usize, count: usize) -> &[AtomicU64] {
        assert!(offset % 8 == 0);
        let span = self.mapping.span(offset, count * 8);
        // SAFETY: aligned as just checked (mappings are page aligned); otherwise as in `bytes`.
        unsafe { std::slice::from_raw_parts(span.as_ptr().cast(), count) }
    }

    /// Makes this a copy of `other`, of the same length. For memory that only its readers look at meanwhile.
    pub fn copy_from(&self, other: &Self) {
        self.span(0, self.len).copy_from(other.span(0, other.len).bytes());
    }

    /// Raw access for operations of the ring.
    pub fn span(&self, offset: usize, len: usize) -> Span {
        self.mapping.span(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_reader_of_shared_memory_sees_writes_and_cannot_make_any() {
        let shared = Shared::new(c"test", 5000, false).expect("memfd");
        shared.bytes(0, 5000)[4999].store(7, Ordering::Relaxed);
        let mut reader: File = shared.reader().try_clone().expect("dup").into();
        let mut seen = Vec::new();
        io::Read::read_to_end(&mut reader, &mut seen).expect("read");
        assert_eq!((seen.len(), seen[4999]), (5000, 7));
        assert!(reader.write(b"x").is_err());
        assert!(reader.set_len(1).is_err());
    }

    #[test]
    fn a_copy_has_the_same_bytes_and_another_number() {
        let shared = Shared::new(c"test", 300_000, false).expect("memfd");
        for place in [0, 4095, 150_000, 299_999] {
            shared.bytes(place, 1)[0].store(7, Ordering::Relaxed);
        }
        let reader: File = shared.reader().try_clone().expect("dup").into();
        let copy = Shared::copy_of(c"copy", &reader).expect("copy");
        assert_eq!(copy.span(0, 300_000).bytes(), shared.span(0, 300_000).bytes());
        assert_ne!(copy.id(), shared.id());
        copy.bytes(0, 1)[0].store(8, Ordering::Relaxed);
        assert_eq!(shared.bytes(0, 1)[0].load(Ordering::Relaxed), 7);
    }

    #[test]
    fn zero_runs_are_told_from_data_at_every_place() {
        let memory = Mapping::anonymous(PAGE).expect("mmap");
        let span = memory.span(0, PAGE);
        assert!(span.is_zero());
        for place in [0, 1, 2047, 4095] {
            span.at(place, 1).copy_from(&[1]);
            assert!(!span.is_zero());
            span.zero();
        }
    }
}
