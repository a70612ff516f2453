// SPDX-License-Identifier: GPL-2.0-or-later
//! Pieces on an image: reads from wherever the old bytes are, writes into the storage.

use super::copies::Blocked;
use super::piece::PieceId;
use super::{Engine, Image};
use crate::cbt;
use crate::cow::{BeforeImageWrite, Source};
use crate::mem::Span;
use crate::ring::{Kind, Token};
use crate::snapshot::Cause;
use crate::sys;
use std::os::fd::{AsRawFd, RawFd};

impl Engine {
    /// Whether the image of a piece can still be served.
    fn image_serves(&self, place: usize) -> bool {
        self.images[place]
            .as_ref()
            .is_some_and(|image| !image.failed() && image.leaving.is_none())
    }

    pub(super) fn read_image(&mut self, id: PieceId) {
        let place = usize::from(self.pieces[id as usize].image);
        loop {
            if !self.image_serves(place) {
                return self.fail_piece(id, libc::EIO);
            }
            let piece = self.pieces[id as usize];
            if piece.left() == 0 {
                self.counters.image_reads += 1;
                return self.finish(id);
            }
            let image = self.images[place].as_mut().expect("as just asked");
            let size = image.chunk_size();
            let (chunk, within) = (piece.at() / size, piece.at() % size);
            let count = (size - within).min(piece.left()) as usize;
            let into = piece.rest().at(0, count);
            let storage = image.snapshot.storage.file().as_raw_fd();
            match image.chunks().source(chunk) {
                Source::Zero => into.zero(),
                Source::Staging(slot) => into.copy_from(image.staging(slot).at(within as usize, count).bytes()),
                Source::AwaitCopy => {
                    let slot = self.slot_of(place, chunk);
                    return self.wait_for(id, Blocked::Copy { image: place, slot });
                }
                Source::Storage(offset) => match sys::read_at(storage, into, offset + within, false) {
                    Ok(read) if read > 0 => {
                        self.pieces[id as usize].done += read as u64;
                        continue;
                    }
                    Err(libc::EINTR) => continue,
                    Err(libc::EAGAIN | libc::EOPNOTSUPP) => {
                        image.in_flight += 1;
                        self.ring
                            .read(storage, into, offset + within, Token::new(Kind::Piece, id));
                        return;
                    }
                    error => return self.storage_failed(id, place, error.err().unwrap_or(libc::EIO)),
                },
                Source::Origin => {
                    if self.read_through(id, place, chunk) {
                        continue;
                    }
                    return;
                }
            }
            self.pieces[id as usize].done += count as u64;
        }
    }

    /// Reads the run of untouched chunks at the piece's place from the origin; true when some of it is done.
    fn read_through(&mut self, id: PieceId, place: usize, chunk: u64) -> bool {
        let piece = self.pieces[id as usize];
        let image = self.images[place].as_mut().expect("asked by the caller");
        let size = image.chunk_size();
        let chunks = image.chunks();
        let mut end = chunk + 1;
        while end * size < piece.offset + piece.len && chunks.source(end) == Source::Origin {
            end += 1;
        }
        let count = (end * size - piece.at()).min(piece.left()) as usize;
        let into = piece.rest().at(0, count);
        match self.setup.origin.read_now(into, piece.at()) {
            Ok(0) => {
                self.origin_ended(id);
                false
            }
            Ok(read) => {
                self.pieces[id as usize].done += read as u64;
                true
            }
            Err(libc::EINTR) => true,
            Err(libc::EAGAIN) => {
                let image = self.images[place].as_mut().expect("asked by the caller");
                image.in_flight += 1;
                let mut chunks = image.chunks();
                for held in chunk..end {
                    chunks.reader_began(held);
                }
                self.pieces[id as usize].held = (chunk, end - chunk);
                self.ring
                    .read(self.setup.origin.fd(), into, piece.at(), Token::new(Kind::Piece, id));
                false
            }
            Err(_) => {
                self.fail_piece(id, libc::EIO);
                false
            }
        }
    }

    fn storage_failed(&mut self, id: PieceId, place: usize, errno: i32) {
        self.fail_image(place, Cause::Storage, errno);
        self.fail_piece(id, libc::EIO);
    }

    pub(super) fn write_image(&mut self, id: PieceId) {
        let place = usize::from(self.pieces[id as usize].image);
        loop {
            if !self.image_serves(place) {
                return self.fail_piece(id, libc::EIO);
            }
            let piece = self.pieces[id as usize];
            if piece.left() == 0 {
                self.counters.image_writes += 1;
                return self.finish(id);
            }
            let image = self.images[place].as_mut().expect("as just asked");
            let size = image.chunk_size();
            let (chunk, within) = (piece.at() / size, piece.at() % size);
            let count = (size - within).min(piece.left());
            let wants_slot = match image.chunks().before_image_write(chunk) {
                BeforeImageWrite::Storage(offset) => {
                    let storage = image.snapshot.storage.file().as_raw_fd();
                    image.in_flight += 1;
                    self.mark_image_write(place, piece.at(), count);
                    return self.write_storage(id, storage, piece.rest().at(0, count as usize), offset + within);
                }
                BeforeImageWrite::AwaitStore => true,
                BeforeImageWrite::Copy => self.start_copy(place, chunk),
                BeforeImageWrite::Materialise => self.start_materialise(place, chunk),
            };
            if !wants_slot {
                return self.wait_for(id, Blocked::Staging);
            }
            // A copy from the page cache may have ended in ZERO, or failed: look again.
            if !self.image_serves(place) {
                continue;
            }
            let image = self.images[place].as_mut().expect("as just asked");
            if image.chunks().before_image_write(chunk) == BeforeImageWrite::AwaitStore {
                let slot = self.slot_of(place, chunk);
                let image = self.images[place].as_mut().expect("as just asked");
                image.copies[slot].store_wait.push(&mut self.pieces, id);
                return;
            }
        }
    }

    fn write_storage(&mut self, id: PieceId, storage: RawFd, from: Span, offset: u64) {
        self.ring
            .write(storage, from, offset, false, Token::new(Kind::Piece, id));
    }

    /// Bytes of an image that a client changed differ from all other copies of that instant. The image's own map says so,
    /// and that of every later take: who follows from this image to a later one must copy them again.
    fn mark_image_write(&mut self, place: usize, offset: u64, len: u64) {
        let mine = self.images[place].as_ref().expect("asked by the caller");
        let (generation, since) = (&mine.generation, mine.numbers.changes());
        let later = |image: &&Image| image.generation == *generation && image.numbers.changes() >= since;
        for image in self.images.iter().flatten().filter(later) {
            let taken = image.taken.bytes(0, image.geometry.block_count());
            cbt::mark(
                taken,
                image.geometry.blocks(offset, len),
                image.numbers.byte_for_changes(),
            );
        }
        let count = self.setup.geometry.block_count();
        let blocks = self.setup.geometry.blocks(offset, len);
        let map = &self.setup.map;
        cbt::mark(map.live.bytes(0, count), blocks.clone(), map.numbers.byte_for_active());
        cbt::mark(map.taken.bytes(0, count), blocks, map.numbers.byte_for_changes());
    }

    pub(super) fn image_piece_completed(&mut self, id: PieceId, result: i32) {
        let piece = self.pieces[id as usize];
        let place = usize::from(piece.image);
        let image = self.images[place].as_mut().expect("in_flight keeps the image");
        image.in_flight -= 1;
        let from_origin = piece.held.1 > 0;
        if from_origin {
            let mut chunks = image.chunks();
            let mut free = false;
            for held in piece.held.0..piece.held.0 + piece.held.1 {
                free |= chunks.reader_ended(held);
            }
            self.pieces[id as usize].held = (0, 0);
            if free {
                self.ready.append(&mut self.pieces, &mut self.readers_wait);
            }
        }
        match result {
            count if count > 0 => {
                self.pieces[id as usize].done += count as u64;
                self.go_on(id);
            }
            error if error == -libc::EINTR || error == -libc::EAGAIN => self.go_on(id),
            0 if from_origin => self.origin_ended(id),
            error if from_origin => {
                debug_assert!(error < 0);
                self.fail_piece(id, libc::EIO);
            }
            error => self.storage_failed(id, place, if error == 0 { libc::EIO } else { -error }),
        }
    }
}
