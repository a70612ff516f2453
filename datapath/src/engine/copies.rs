// SPDX-License-Identifier: GPL-2.0-or-later
//! Copies under way: old bytes from the origin to staging, from staging to the storage. The states are `cow`'s.

use super::image::COPIES;
use super::piece::{List, PieceId};
use super::Engine;
use crate::cow::{BeforeWrite, State};
use crate::ring::{Kind, Token};
use crate::snapshot::Cause;
use std::os::fd::AsRawFd;

const NO_ROOM: i32 = -libc::ENOSPC;

/// What a write waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blocked {
    /// The copy in this image's slot.
    Copy { image: usize, slot: usize },
    /// A free staging slot.
    Staging,
    /// Image reads of the origin.
    Readers,
}

fn token(kind: Kind, image: usize, slot: u32) -> Token {
    Token::new(kind, (image * COPIES) as u32 + slot)
}

impl Engine {
    /// Starts every copy that a write of `len` bytes at `offset` of the origin needs. None: the write may go.
    pub(super) fn prepare_write(&mut self, offset: u64, len: u64) -> Option<Blocked> {
        let mut blocked = None;
        for place in 0..self.images.len() {
            let Some(image) = &self.images[place] else {
                continue;
            };
            if image.failed() || image.leaving.is_some() {
                continue;
            }
            for chunk in image.touched(offset, len) {
                let found = self.prepare_chunk(place, chunk);
                blocked = blocked.or(found);
            }
        }
        blocked
    }

    fn prepare_chunk(&mut self, place: usize, chunk: u64) -> Option<Blocked> {
        let image = self.images[place]
            .as_mut()
            .expect("an image is there while it is asked");
        match image.chunks().before_write(chunk) {
            BeforeWrite::Go => None,
            BeforeWrite::AwaitReaders => Some(Blocked::Readers),
            BeforeWrite::AwaitCopy => self.copy_of(place, chunk),
            BeforeWrite::Copy => {
                if !self.start_copy(place, chunk) {
                    return Some(Blocked::Staging);
                }
                // It may be done already: from the page cache it takes no waiting.
                let image = self.images[place].as_mut().expect("as above");
                if image.failed() {
                    return None;
                }
                match image.chunks().before_write(chunk) {
                    BeforeWrite::Go => None,
                    BeforeWrite::AwaitReaders => Some(Blocked::Readers),
                    _ => self.copy_of(place, chunk),
                }
            }
        }
    }

    fn copy_of(&self, place: usize, chunk: u64) -> Option<Blocked> {
        let slot = self.slot_of(place, chunk);
        Some(Blocked::Copy { image: place, slot })
    }

    /// The staging slot of a chunk that is READING or STORING.
    pub(super) fn slot_of(&self, place: usize, chunk: u64) -> usize {
        let image = self.images[place]
            .as_ref()
            .expect("an image is there while it is asked");
        image
            .copies
            .iter()
            .position(|copy| copy.busy && copy.chunk == chunk)
            .expect("a chunk under way has a copy")
    }

    /// Begins the copy of a NONE chunk; false when no staging slot is free.
    pub(super) fn start_copy(&mut self, place: usize, chunk: u64) -> bool {
        let Some(slot) = self.claim_slot(place, chunk) else {
            return false;
        };
        self.counters.copies += 1;
        let image = self.images[place].as_mut().expect("as in claim_slot");
        image.chunks().begin_copy(chunk, slot);
        self.read_old(place, slot);
        true
    }

    /// Gives a ZERO chunk room in the storage; false when no staging slot is free.
    pub(super) fn start_materialise(&mut self, place: usize, chunk: u64) -> bool {
        let Some(slot) = self.claim_slot(place, chunk) else {
            return false;
        };
        let image = self.images[place].as_mut().expect("as in claim_slot");
        image.staging(slot).zero();
        image.chunks().materialise(chunk, slot);
        self.store_old(place, slot);
        true
    }

    fn claim_slot(&mut self, place: usize, chunk: u64) -> Option<u32> {
        let image = self.images[place]
            .as_mut()
            .expect("an image is there while it is asked");
        let slot = image.take_staging()?;
        let (_, len) = image.extent(chunk);
        let copy = &mut image.copies[slot as usize];
        (copy.chunk, copy.len, copy.done, copy.offset, copy.busy) = (chunk, len, 0, 0, true);
        debug_assert!(copy.read_wait.is_empty() && copy.store_wait.is_empty());
        Some(slot)
    }

    /// Reads the old bytes, at once if the page cache has them.
    fn read_old(&mut self, place: usize, slot: u32) {
        loop {
            let image = self.images[place].as_mut().expect("a copy keeps its image");
            let copy = image.copies[slot as usize];
            if copy.done == copy.len {
                self.old_bytes_read(place, slot);
                return;
            }
            let (offset, _) = image.extent(copy.chunk);
            let rest = image
                .staging(slot)
                .at(copy.done as usize, (copy.len - copy.done) as usize);
            match self.setup.origin.read_now(rest, offset + copy.done) {
                Ok(0) => return self.copy_failed(place, slot, Cause::Origin, libc::EIO),
                Ok(count) => {
                    let image = self.images[place].as_mut().expect("a copy keeps its image");
                    image.copies[slot as usize].done += count as u64;
                }
                Err(libc::EAGAIN) => {
                    let token = token(Kind::CopyRead, place, slot);
                    self.ring.read(self.setup.origin.fd(), rest, offset + copy.done, token);
                    return;
                }
                Err(libc::EINTR) => {}
                Err(errno) => return self.copy_failed(place, slot, Cause::Origin, errno),
            }
        }
    }

    pub(super) fn copy_read(&mut self, index: usize, result: i32) {
        let (place, slot) = (index / COPIES, (index % COPIES) as u32);
        match result {
            0 => self.copy_failed(place, slot, Cause::Origin, libc::EIO),
            count if count > 0 => {
                let image = self.images[place].as_mut().expect("a copy keeps its image");
                image.copies[slot as usize].done += count as u64;
                self.read_old(place, slot);
            }
            error if error == -libc::EINTR || error == -libc::EAGAIN => self.read_old(place, slot),
            error => self.copy_failed(place, slot, Cause::Origin, -error),
        }
    }

    fn old_bytes_read(&mut self, place: usize, slot: u32) {
        let image = self.images[place].as_mut().expect("a copy keeps its image");
        let copy = image.copies[slot as usize];
        let zero = image.staging(slot).at(0, copy.len as usize).is_zero();
        image.chunks().copied(copy.chunk, zero);
        if zero {
            self.copy_ended(place, slot, true);
        } else {
            self.store_old(place, slot);
            self.wake_read_wait(place, slot);
        }
    }

    pub(super) fn store_old(&mut self, place: usize, slot: u32) {
        let image = self.images[place].as_mut().expect("a copy keeps its image");
        match image.snapshot.room(image.chunk_size()) {
            Err(errno) => self.copy_failed(place, slot, Cause::NoSpace, errno),
            Ok(offset) => {
                let copy = &mut image.copies[slot as usize];
                (copy.offset, copy.done) = (offset, 0);
                self.write_old(place, slot);
            }
        }
    }

    fn write_old(&mut self, place: usize, slot: u32) {
        let image = self.images[place].as_ref().expect("a copy keeps its image");
        let copy = image.copies[slot as usize];
        let rest = image
            .staging(slot)
            .at(copy.done as usize, (copy.len - copy.done) as usize);
        let fd = image.snapshot.storage.file().as_raw_fd();
        let token = token(Kind::CopyStore, place, slot);
        self.ring.write(fd, rest, copy.offset + copy.done, false, token);
    }

    pub(super) fn copy_stored(&mut self, index: usize, result: i32) {
        let (place, slot) = (index / COPIES, (index % COPIES) as u32);
        let image = self.images[place].as_mut().expect("a copy keeps its image");
        let copy = &mut image.copies[slot as usize];
        match result {
            count if count > 0 => {
                copy.done += count as u64;
                if copy.done < copy.len {
                    return self.write_old(place, slot);
                }
                let (chunk, offset) = (copy.chunk, copy.offset);
                image.chunks().stored(chunk, offset);
                self.copy_ended(place, slot, true);
            }
            error if error == -libc::EINTR || error == -libc::EAGAIN => self.write_old(place, slot),
            // It had all its room from the start, and has no size any more.
            0 | NO_ROOM if image.snapshot.storage.is_disk() => {
                self.copy_failed(place, slot, Cause::Storage, libc::ENODEV);
            }
            // A short store of nothing is a storage that has no room left.
            0 => self.copy_failed(place, slot, Cause::NoSpace, libc::ENOSPC),
            error if matches!(-error, libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => {
                self.copy_failed(place, slot, Cause::NoSpace, -error);
            }
            error => self.copy_failed(place, slot, Cause::Storage, -error),
        }
    }

    fn copy_failed(&mut self, place: usize, slot: u32, cause: Cause, errno: i32) {
        self.fail_image(place, cause, errno);
        self.copy_ended(place, slot, false);
    }

    fn copy_ended(&mut self, place: usize, slot: u32, stored: bool) {
        self.wake_read_wait(place, slot);
        let image = self.images[place].as_mut().expect("a copy keeps its image");
        let mut waiting = std::mem::replace(&mut image.copies[slot as usize].store_wait, List::EMPTY);
        image.free_staging(slot, stored);
        self.ready.append(&mut self.pieces, &mut waiting);
        self.ready.append(&mut self.pieces, &mut self.staging_wait);
    }

    fn wake_read_wait(&mut self, place: usize, slot: u32) {
        let image = self.images[place].as_mut().expect("a copy keeps its image");
        let mut waiting = std::mem::replace(&mut image.copies[slot as usize].read_wait, List::EMPTY);
        self.ready.append(&mut self.pieces, &mut waiting);
    }

    /// Lets everything that waits for an image look again (it failed or leaves). Its copies end on their own.
    pub(super) fn wake_image(&mut self, place: usize) {
        let Some(image) = &mut self.images[place] else {
            return;
        };
        for copy in &mut image.copies {
            self.ready.append(&mut self.pieces, &mut copy.read_wait);
            self.ready.append(&mut self.pieces, &mut copy.store_wait);
        }
        self.ready.append(&mut self.pieces, &mut self.staging_wait);
        self.ready.append(&mut self.pieces, &mut self.readers_wait);
    }

    pub(super) fn wait_for(&mut self, id: PieceId, blocked: Blocked) {
        let list = match blocked {
            Blocked::Staging => &mut self.staging_wait,
            Blocked::Readers => &mut self.readers_wait,
            Blocked::Copy { image, slot } => {
                let image = self.images[image].as_mut().expect("a copy keeps its image");
                &mut image.copies[slot].read_wait
            }
        };
        list.push(&mut self.pieces, id);
    }

    /// Whether a chunk's old bytes are not safe in any image yet, for the fast way of writes.
    pub(super) fn untouched(&mut self, offset: u64, len: u64) -> bool {
        self.images.iter_mut().flatten().any(|image| {
            !image.failed() && image.leaving.is_none() && {
                let touched = image.touched(offset, len);
                !image.chunks().all_go(touched)
            }
        })
    }

    /// For block status: whether the image's chunk still lives in the origin (true), or is known to be zero (None) or data.
    pub(super) fn chunk_state(&mut self, place: usize, chunk: u64) -> State {
        let image = self.images[place]
            .as_mut()
            .expect("an image is there while it is asked");
        image.chunks().state(chunk)
    }
}
