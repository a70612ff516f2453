// SPDX-License-Identifier: GPL-2.0-or-later
//! Pieces on the origin: gate, copies, mark, I/O. The order of these four is the whole safety of the tracker.

use super::piece::{Job, PieceId};
use super::Engine;
use crate::cbt;
use crate::pages::state;
use crate::ring::{Kind, Token};

/// Zeroes and trims are cut to this much at a time while an image must be kept, so that a copy of gigabytes does not
/// start at once.
const KEEPING_STEP: u64 = 1 << 20;

impl Engine {
    /// A piece begins or goes on after a wait.
    pub(super) fn go_on(&mut self, id: PieceId) {
        match self.pieces[id as usize].job {
            Job::Read => self.read_origin(id),
            Job::Write | Job::Zero | Job::Trim => self.change_origin(id),
            Job::Flush => self.flush_origin(id),
            Job::ImageRead => self.read_image(id),
            Job::ImageWrite => self.write_image(id),
            Job::Idle | Job::Receive => unreachable!("a piece that has not begun waits for nothing"),
        }
    }

    pub(super) fn fail_piece(&mut self, id: PieceId, errno: i32) {
        self.pieces[id as usize].errno = errno;
        self.finish(id);
    }

    fn read_origin(&mut self, id: PieceId) {
        loop {
            let piece = self.pieces[id as usize];
            if self.broken.is_some() {
                return self.fail_piece(id, libc::EIO);
            }
            if piece.left() == 0 {
                self.counters.reads += 1;
                self.counters.read_bytes += piece.len;
                return self.finish(id);
            }
            if let Some(buffer) = piece.fixed {
                let (fd, token) = (self.setup.origin.fd(), Token::new(Kind::Piece, id));
                let (place, left) = ((buffer, piece.done), piece.left() as u32);
                return self.ring.read_fixed(fd, place, left, piece.at(), token);
            }
            match self.setup.origin.read_now(piece.rest(), piece.at()) {
                Ok(0) => return self.origin_ended(id),
                Ok(count) => self.pieces[id as usize].done += count as u64,
                Err(libc::EAGAIN) => {
                    let token = Token::new(Kind::Piece, id);
                    self.ring.read(self.setup.origin.fd(), piece.rest(), piece.at(), token);
                    return;
                }
                Err(libc::EINTR) => {}
                Err(errno) => return self.fail_piece(id, errno),
            }
        }
    }

    /// A read inside the origin's size came to an end of file.
    pub(super) fn origin_ended(&mut self, id: PieceId) {
        self.watch_origin();
        self.fail_piece(id, libc::EIO);
    }

    fn change_origin(&mut self, id: PieceId) {
        loop {
            if self.gate.closed {
                self.gate.parked.push(&mut self.pieces, id);
                return;
            }
            if self.broken.is_some() {
                return self.fail_piece(id, libc::EIO);
            }
            let piece = self.pieces[id as usize];
            if piece.left() == 0 {
                return self.changed(id);
            }
            if !self.still_whole() {
                continue;
            }
            let kept = self.images.iter().flatten().any(|image| !image.failed());
            if piece.job == Job::Trim && kept {
                // Advisory: the image is worth more than the room. Not marked: nothing changes.
                self.counters.discards_skipped += 1;
                return self.finish(id);
            }
            let step = match piece.job {
                Job::Write => piece.left(),
                _ if kept => piece.left().min(KEEPING_STEP - piece.at() % KEEPING_STEP),
                _ => piece.left(),
            };
            if let Some(blocked) = self.prepare_write(piece.at(), step) {
                return self.wait_for(id, blocked);
            }
            self.mark(piece.at(), step);
            match self.submit_change(id, step) {
                None => return,
                Some(Ok(count)) => self.pieces[id as usize].done += count,
                Some(Err(errno)) => return self.fail_piece(id, errno),
            }
        }
    }

    /// A write behind the end of a file that was cut would make it whole again, with zeros for what was lost.
    fn still_whole(&mut self) -> bool {
        if self.setup.origin.reaches(self.setup.geometry.size()) {
            return true;
        }
        self.break_origin("the image file became smaller");
        false
    }

    /// Marks the live map. Comes before the submission of every change, and stays when that fails.
    pub(super) fn mark(&mut self, offset: u64, len: u64) {
        if !self.writes_unseen {
            self.writes_unseen = true;
            // Before the write: a process after us has to know that the time of the last change may be ours.
            state::set_written(self.state_words(), true);
        }
        if self.setup.tracking {
            let map = &self.setup.map;
            let live = map.live.bytes(0, self.setup.geometry.block_count());
            cbt::mark(
                live,
                self.setup.geometry.blocks(offset, len),
                map.numbers.byte_for_active(),
            );
        }
    }

    /// Sends the next `step` bytes of a change on their way. Some: it is done already.
    fn submit_change(&mut self, id: PieceId, step: u64) -> Option<Result<u64, i32>> {
        let piece = self.pieces[id as usize];
        let (fd, token) = (self.setup.origin.fd(), Token::new(Kind::Piece, id));
        match piece.job {
            Job::Write if self.setup.origin.writes_inline() && !piece.dsync => {
                return match self.setup.origin.write_now(piece.rest(), piece.at()) {
                    Err(libc::EINTR) => Some(Ok(0)),
                    Ok(0) => Some(Err(libc::EIO)),
                    written => Some(written.map(|count| count as u64)),
                };
            }
            Job::Write => match piece.fixed {
                Some(buffer) => {
                    let (place, left) = ((buffer, piece.done), piece.left() as u32);
                    self.ring.write_fixed(fd, place, left, piece.at(), piece.dsync, token);
                }
                None => self.ring.write(fd, piece.rest(), piece.at(), piece.dsync, token),
            },
            // A hole punched into a block device would be zeroes written: not what a discard is for.
            Job::Trim if super::ublk::is_request(id) => self.ring.discard(fd, piece.at(), step, token),
            Job::Zero if piece.by_hand => {
                let len = step.min(self.zeros.len() as u64);
                self.pieces[id as usize].step = len;
                let zeros = self.zeros.at(0, len as usize);
                self.ring.write(fd, zeros, piece.at(), false, token);
                self.gate.in_flight += 1;
                return None;
            }
            _ => {
                let mode = libc::FALLOC_FL_KEEP_SIZE
                    | if self.punches(id) {
                        libc::FALLOC_FL_PUNCH_HOLE
                    } else {
                        libc::FALLOC_FL_ZERO_RANGE
                    };
                self.ring.fallocate(fd, mode, piece.at(), step, token);
            }
        }
        self.pieces[id as usize].step = step;
        self.gate.in_flight += 1;
        None
    }

    /// Holes are what a trim is for, and what zeroes may become. On a block device a hole is the form of zeroing that
    /// fails rather than write zeros one by one (block/fops.c, `blkdev_fallocate`): right for FAST_ZERO, else not wanted.
    fn punches(&self, id: PieceId) -> bool {
        let piece = &self.pieces[id as usize];
        piece.job == Job::Trim || !piece.no_hole && (piece.fast_zero || !self.setup.origin.node().block)
    }

    /// All of a change is in the origin; a trim or zero with FUA still has to reach the medium.
    fn changed(&mut self, id: PieceId) {
        let piece = self.pieces[id as usize];
        let counters = &mut self.counters;
        match piece.job {
            Job::Write => {
                counters.writes += 1;
                counters.written_bytes += piece.len;
            }
            Job::Zero => {
                counters.zeroes += 1;
                counters.zeroed_bytes += piece.len;
            }
            _ => {
                counters.discards += 1;
                counters.discarded_bytes += piece.len;
            }
        }
        if piece.dsync && piece.job != Job::Write {
            self.ring.sync(self.setup.origin.fd(), Token::new(Kind::Sync, id));
            return;
        }
        self.finish(id);
    }

    fn flush_origin(&mut self, id: PieceId) {
        self.counters.flushes += 1;
        self.ring.sync(self.setup.origin.fd(), Token::new(Kind::Sync, id));
    }

    pub(super) fn synced(&mut self, id: PieceId, result: i32) {
        match result {
            0 => self.finish(id),
            error if error == -libc::EINTR => self.ring.sync(self.setup.origin.fd(), Token::new(Kind::Sync, id)),
            error => self.fail_piece(id, -error),
        }
    }

    /// An operation of a piece ended: short ones go on, none is passed on as a success.
    pub(super) fn piece_completed(&mut self, id: PieceId, result: i32) {
        let piece = self.pieces[id as usize];
        if matches!(piece.job, Job::ImageRead | Job::ImageWrite) {
            return self.image_piece_completed(id, result);
        }
        if piece.job != Job::Read {
            self.gate.in_flight -= 1;
        }
        match (piece.job, result) {
            (Job::Write, count) if count >= 0 => self.audit.wrote(count as u64),
            (Job::Read | Job::Trim, _) => {}
            // How much of it reached the device before it failed, or what zeroes came to there, is not told.
            _ => self.audit.unsure(),
        }
        match (piece.job, result) {
            (_, error) if error == -libc::EINTR || error == -libc::EAGAIN => self.go_on(id),
            (Job::Read, 0) => self.origin_ended(id),
            (Job::Write, 0) => self.fail_piece(id, libc::EIO),
            (Job::Read | Job::Write, count) if count > 0 => {
                self.pieces[id as usize].done += count as u64;
                self.go_on(id);
            }
            (Job::Zero, count) if count > 0 && piece.by_hand => {
                self.pieces[id as usize].done += count as u64;
                self.go_on(id);
            }
            (Job::Zero | Job::Trim, 0) if !piece.by_hand => {
                self.pieces[id as usize].done += piece.step;
                self.go_on(id);
            }
            (Job::Zero, error) if error == -libc::EOPNOTSUPP && piece.fast_zero => self.fail_piece(id, libc::ENOTSUP),
            (Job::Zero, error) if error == -libc::EOPNOTSUPP && !piece.by_hand => {
                self.pieces[id as usize].by_hand = true;
                self.go_on(id);
            }
            // Trim is advice; who cannot take it has not failed.
            (Job::Trim, error) if error == -libc::EOPNOTSUPP => self.finish(id),
            // Before 6.12 there is no command for it.
            (Job::Trim, error) if error == -libc::EINVAL && super::ublk::is_request(id) => self.finish(id),
            (_, error) if error < 0 => self.fail_piece(id, -error),
            _ => self.fail_piece(id, libc::EIO),
        }
    }

    /// Writes `bytes` of a payload straight from the receive buffer when nothing stands in the way: gate open, no copy
    /// due, page cache. Ok(None): it has to go the long way.
    pub(super) fn write_through(&mut self, bytes: crate::mem::Span, offset: u64) -> Option<Result<(), i32>> {
        if self.gate.closed || self.broken.is_some() || !self.setup.origin.writes_inline() {
            return None;
        }
        if self.untouched(offset, bytes.len() as u64) || !self.still_whole() {
            return None;
        }
        self.mark(offset, bytes.len() as u64);
        let mut done = 0;
        while done < bytes.len() {
            match self.setup.origin.write_now(bytes.from(done), offset + done as u64) {
                Ok(0) => return Some(Err(libc::EIO)),
                Ok(count) => done += count,
                Err(libc::EINTR) => {}
                Err(errno) => return Some(Err(errno)),
            }
        }
        self.counters.written_bytes += bytes.len() as u64;
        Some(Ok(()))
    }
}
