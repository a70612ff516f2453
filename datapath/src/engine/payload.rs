// SPDX-License-Identifier: GPL-2.0-or-later
//! The bytes of a write on their way from the receive buffer: straight to the page cache, or into pieces.

use super::connection::{Export, Incoming};
use super::piece::{Job, PieceId, PIECE_LEN};
use super::Engine;
use crate::mem::Span;
use crate::nbd::proto::flag;

/// A payload that arrives in small portions is gathered up to this before it is written straight through.
const THROUGH_MIN: usize = 64 << 10;

impl Engine {
    /// Takes what has come of a payload: straight through to the page cache where it can, else into pieces.
    pub(super) fn take_payload(
        &mut self,
        place: usize,
        number: u8,
        offset: u64,
        left: u64,
        piece: Option<PieceId>,
    ) -> bool {
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        let pending = connection.pending();
        if pending.is_empty() {
            return false;
        }
        let request = connection.requests[usize::from(number)];
        let available = left.min(pending.len() as u64) as usize;
        let direct = piece.is_none() && connection.export == Export::Origin && request.flags & flag::FUA == 0;
        if direct && request.errno == 0 {
            if (available as u64) < left && available < THROUGH_MIN {
                return false;
            }
            if let Some(written) = self.write_through(pending.at(0, available), offset) {
                return self.payload_done(place, number, offset, left, available, written.err());
            }
        }
        let id = match piece {
            Some(id) => id,
            None => {
                let Some(id) = self.new_piece(place, number) else {
                    return false;
                };
                let piece = &mut self.pieces[id as usize];
                piece.offset = offset;
                piece.dsync = request.flags & flag::FUA != 0;
                id
            }
        };
        let piece = &mut self.pieces[id as usize];
        let end = (piece.offset / PIECE_LEN as u64 + 1) * PIECE_LEN as u64;
        let count = available.min((end - offset) as usize);
        let filled = piece.len as usize;
        let buffer: Span = piece.buffer.expect("a piece with data has a buffer");
        buffer.from(filled).copy_from(pending.at(0, count).bytes());
        piece.len += count as u64;
        let full = offset + count as u64 == end || count as u64 == left;
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        connection.consume(count);
        let image = connection.export != Export::Origin;
        let (offset, left) = (offset + count as u64, left - count as u64);
        connection.requests[usize::from(number)].complete = left == 0;
        connection.incoming = if left == 0 {
            Incoming::Header
        } else {
            Incoming::Payload {
                request: number,
                offset,
                left,
                piece: (!full).then_some(id),
            }
        };
        if full {
            self.pieces[id as usize].job = if image { Job::ImageWrite } else { Job::Write };
            self.go_on(id);
        }
        true
    }

    /// `count` bytes of a payload went straight through.
    fn payload_done(
        &mut self,
        place: usize,
        number: u8,
        offset: u64,
        left: u64,
        count: usize,
        errno: Option<i32>,
    ) -> bool {
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        connection.consume(count);
        let request = &mut connection.requests[usize::from(number)];
        if let (Some(errno), 0) = (errno, request.errno) {
            request.errno = errno;
        }
        let left = left - count as u64;
        request.complete = left == 0;
        connection.incoming = if left == 0 {
            self.counters.writes += 1;
            Incoming::Header
        } else {
            Incoming::Payload {
                request: number,
                offset: offset + count as u64,
                left,
                piece: None,
            }
        };
        self.end_if_answered(place, number);
        true
    }
}
