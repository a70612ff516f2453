// SPDX-License-Identifier: GPL-2.0-or-later
//! What the queue threads of a snapshot's origins, the maintenance thread and the control side share of it.
//!
//! The images themselves belong to the queue threads (`engine::image`). A failure is one atomic word: queue threads set
//! it without allocating, the maintenance thread turns it into words and an event. It is in the snapshot's page, so that
//! a snapshot that failed stays failed whatever becomes of the process.

use crate::pages::snapshot::Page;
use crate::storage::Storage;
use crate::sys;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::Arc;

/// Wakes the maintenance thread.
#[derive(Clone, Debug)]
pub struct Bell(Arc<OwnedFd>);

impl Bell {
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(Arc::new(sys::event_fd()?)))
    }

    pub fn ring(&self) {
        sys::ring_bell(self.0.as_raw_fd());
    }

    pub fn wait(&self) {
        sys::hear_bell(self.0.as_raw_fd());
    }
}

/// Why a snapshot failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cause {
    /// The limit of the storage, or its file system, is full.
    NoSpace = 1,
    /// The storage could not be written or read.
    Storage = 2,
    /// The origin's old bytes could not be read.
    Origin = 3,
    /// The storage did not finish a write for [`crate::engine::STALL_S`] seconds while writes to the origin waited.
    Stalled = 4,
    /// The origin was detached by force.
    Detached = 5,
    /// Its memory was not there any more after the data path died.
    Lost = 6,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    pub cause: Cause,
    pub errno: i32,
    /// The control side's handle of the origin at which it happened.
    pub origin: u32,
}

#[derive(Debug)]
pub struct Snapshot {
    pub id: String,
    pub storage: Storage,
    /// As asked for at creation; 0 = by the rule for each origin.
    pub chunk_size: u64,
    pub page: Page,
    bell: Bell,
}

impl Snapshot {
    pub fn new(id: String, storage: Storage, chunk_size: u64, page: Page, bell: Bell) -> Self {
        Self {
            id,
            storage,
            chunk_size,
            page,
            bell,
        }
    }

    pub fn failed(&self) -> bool {
        self.page.failure().load(Ordering::Relaxed) != 0
    }

    pub fn failure(&self) -> Option<Failure> {
        let word = self.page.failure().load(Ordering::Acquire);
        let cause = match (word >> 56) as u8 {
            0 => return None,
            1 => Cause::NoSpace,
            2 => Cause::Storage,
            3 => Cause::Origin,
            4 => Cause::Stalled,
            5 => Cause::Detached,
            _ => Cause::Lost,
        };
        Some(Failure {
            cause,
            errno: (word & 0xffff) as i32,
            origin: (word >> 16) as u32,
        })
    }

    /// Ends the snapshot's worth; the first reason stays.
    pub fn fail(&self, failure: Failure) {
        let word = (failure.cause as u64) << 56
            | u64::from(failure.origin) << 16
            | u64::from(failure.errno.unsigned_abs() & 0xffff);
        if self
            .page
            .failure()
            .compare_exchange(0, word, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
        {
            self.bell.ring();
        }
    }

    /// Room for one chunk in the storage.
    pub fn room(&self, len: u64) -> Result<u64, i32> {
        let room = self.storage.take(len)?;
        if room.ring {
            self.bell.ring();
        }
        Ok(room.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn the_first_failure_is_the_one_that_is_told() {
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true);
        let path = std::env::temp_dir().join(format!("blksnap-snapshot-{}", std::process::id()));
        let storage = Storage::new(file.open(&path).expect("file"), 1 << 20, 0, 0).expect("storage");
        std::fs::remove_file(path).expect("remove");
        let snapshot = Snapshot::new(
            "id".into(),
            storage,
            0,
            Page::new().expect("page"),
            Bell::new().expect("bell"),
        );
        assert_eq!(snapshot.failure(), None);
        let first = Failure {
            cause: Cause::NoSpace,
            errno: libc::ENOSPC,
            origin: 0xffff_ffff,
        };
        snapshot.fail(first);
        snapshot.fail(Failure {
            cause: Cause::Origin,
            errno: libc::EIO,
            origin: 1,
        });
        assert_eq!(snapshot.failure(), Some(first));
    }
}
