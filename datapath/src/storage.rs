// SPDX-License-Identifier: GPL-2.0-or-later
//! The difference storage of a snapshot: room for old chunks, handed out to the queue threads of all its origins.
//!
//! Counts and grows; does no I/O of chunks (the engine does) and takes no lock: queue threads only add atomically, a
//! thread of its own grows the file ahead of them. A storage that cannot grow fails its snapshot, never an origin.

use crate::sys;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

#[derive(Debug)]
pub struct Storage {
    file: File,
    grows: bool,
    limit: u64,
    step: u64,
    low_space: u64,
    used: AtomicU64,
    allocated: AtomicU64,
    low: AtomicBool,
    errno: AtomicI32,
    growing: AtomicBool,
}

const MIB: u64 = 1 << 20;

/// What a queue thread should tell the maintenance thread after taking room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub offset: u64,
    pub ring: bool,
}

impl Storage {
    /// `limit` 0 = the size of the block device; `low_space` 0 = a tenth of the limit; `step` 0 = an eighth of it, 1 MiB … 1 GiB.
    ///
    /// Raised (EINVAL) when a file has no limit, (ENOSPC, EROFS, …) when the first step cannot be allocated.
    pub fn new(file: File, limit: u64, low_space: u64, step: u64) -> io::Result<Self> {
        let storage = Self::unready(file, limit, low_space, step)?;
        match storage.grow() {
            Ok(()) => Ok(storage),
            Err(errno) => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// As [`Self::new`], of a storage that was in use: nothing is known of what it has. [`Self::resume`] has to follow.
    pub fn unready(file: File, limit: u64, low_space: u64, step: u64) -> io::Result<Self> {
        let node = sys::node(&file)?;
        let limit = match (limit, node.block) {
            (0, false) => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
            (0, true) => node.size,
            (limit, true) => limit.min(node.size),
            (limit, false) => limit,
        };
        let step = match step {
            0 => (limit / 8).clamp(MIB, 1024 * MIB),
            step => step,
        }
        .clamp(1, limit.max(1));
        let low_space = if low_space == 0 { limit / 10 } else { low_space };
        Ok(Self {
            file,
            grows: !node.block,
            limit,
            step,
            low_space,
            used: AtomicU64::new(0),
            allocated: AtomicU64::new(if node.block { limit } else { 0 }),
            low: AtomicBool::new(false),
            errno: AtomicI32::new(0),
            growing: AtomicBool::new(false),
        })
    }

    /// Goes on behind `used`. What the file has is asked for once more from its start: what is there already costs
    /// nothing. A failure to grow is kept, as always.
    pub fn resume(&self, used: u64) {
        self.used.store(used, Ordering::Relaxed);
        let left = self.limit.saturating_sub(used);
        self.low.store(left <= self.low_space, Ordering::Relaxed);
        let _ = self.grow();
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether it has all its room from the start: it is a block device.
    pub fn is_disk(&self) -> bool {
        !self.grows
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    pub fn low_space(&self) -> u64 {
        self.low_space
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub fn allocated(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    pub fn low(&self) -> bool {
        self.low.load(Ordering::Relaxed)
    }

    /// Room for `len` bytes, or the errno that fails the snapshot. Never blocks: room that the file does not have yet
    /// is still taken (the write makes it, or fails), growing ahead only finds a full file system earlier.
    pub fn take(&self, len: u64) -> Result<Room, i32> {
        let offset = self.used.fetch_add(len, Ordering::Relaxed);
        if offset + len > self.limit {
            self.used.fetch_sub(len, Ordering::Relaxed);
            return Err(libc::ENOSPC);
        }
        let left = self.limit - offset - len;
        let crossed = left <= self.low_space && !self.low.swap(true, Ordering::Relaxed);
        Ok(Room {
            offset,
            ring: crossed || self.wants_growth(offset + len),
        })
    }

    fn wants_growth(&self, used: u64) -> bool {
        let allocated = self.allocated();
        self.grows
            && allocated < self.limit
            && used + self.step / 2 > allocated
            && self.errno.load(Ordering::Relaxed) == 0
    }

    /// Whether it is time to grow and nobody does yet. Who hears true calls [`Self::grow`] and then [`Self::grown`].
    pub fn claim_growth(&self) -> bool {
        self.wants_growth(self.used()) && !self.growing.swap(true, Ordering::AcqRel)
    }

    pub fn grown(&self) {
        self.growing.store(false, Ordering::Release);
    }

    /// Whether growing failed, and will not be tried again.
    pub fn stuck(&self) -> bool {
        self.errno.load(Ordering::Relaxed) != 0
    }

    /// Grows by as many steps as it is time for. Blocks as long as the disk likes. An errno is kept.
    pub fn grow(&self) -> Result<(), i32> {
        while self.wants_growth(self.used()) {
            let allocated = self.allocated();
            let step = self.step.min(self.limit - allocated);
            if let Err(error) = sys::allocate(&self.file, allocated, step) {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                if errno == libc::EOPNOTSUPP {
                    // No preallocation here (some network file systems): writes make their room themselves.
                    self.allocated.store(self.limit, Ordering::Relaxed);
                    return Ok(());
                }
                self.errno.store(errno, Ordering::Relaxed);
                return Err(errno);
            }
            self.allocated.store(allocated + step, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        let path = std::env::temp_dir();
        let flags = libc::O_TMPFILE;
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(true);
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
        options.open(path).expect("unnamed file")
    }

    #[test]
    fn room_ends_exactly_at_the_limit_and_nothing_is_lost_by_asking_for_more() {
        let storage = Storage::new(file(), 10 * 65536, 65536, 65536).expect("storage");
        let offsets: Vec<_> = (0..10).map(|_| storage.take(65536).expect("room").offset).collect();
        assert_eq!(offsets, (0..10).map(|chunk| chunk * 65536).collect::<Vec<_>>());
        assert_eq!(storage.take(65536), Err(libc::ENOSPC));
        assert_eq!(storage.used(), 10 * 65536);
    }

    #[test]
    fn low_space_rings_once_when_the_mark_is_crossed() {
        let storage = Storage::new(file(), 10 * MIB, 2 * MIB, 10 * MIB).expect("storage");
        let rings: Vec<_> = (0..10).map(|_| storage.take(MIB).expect("room").ring).collect();
        assert_eq!(rings.iter().filter(|ring| **ring).count(), 1);
        assert!(rings[7] && storage.low());
    }

    #[test]
    fn a_file_grows_by_steps_ahead_of_its_use_and_stops_at_the_limit() {
        let storage = Storage::new(file(), 3 * MIB, 1, MIB).expect("storage");
        assert_eq!(storage.allocated(), MIB);
        storage.take(MIB - 4096).expect("room");
        storage.grow().expect("grown");
        assert_eq!(storage.allocated(), 2 * MIB);
        storage.take(2 * MIB).expect("room");
        storage.grow().expect("grown");
        assert_eq!(storage.allocated(), 3 * MIB);
        assert_eq!(storage.file().metadata().expect("stat").len(), 3 * MIB);
    }

    #[test]
    fn a_storage_that_was_in_use_goes_on_behind_what_is_used() {
        let file = file();
        let before = Storage::new(file.try_clone().expect("dup"), 4 * MIB, MIB, MIB).expect("storage");
        before.take(3 * MIB).expect("room");
        let after = Storage::unready(file, 4 * MIB, MIB, MIB).expect("storage");
        after.resume(3 * MIB);
        assert_eq!((after.used(), after.allocated(), after.low()), (3 * MIB, 4 * MIB, true));
        assert_eq!(after.take(MIB).expect("room").offset, 3 * MIB);
        assert_eq!(after.take(1), Err(libc::ENOSPC));
    }

    #[test]
    fn a_file_without_a_limit_is_refused() {
        let error = Storage::new(file(), 0, 0, 0).expect_err("refused");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
