// SPDX-License-Identifier: GPL-2.0-or-later
//! Pieces: a request is served as pieces of at most [`PIECE_LEN`] bytes, each with a buffer of its own.
//!
//! A piece waits in at most one list at a time; lists are chains through the pieces, so waiting allocates nothing.

use crate::mem::Span;

pub const PIECE_LEN: usize = 128 << 10;
/// Pieces of one connection.
pub const PIECES: usize = 64;

pub type PieceId = u32;
const NOBODY: PieceId = PieceId::MAX;

/// What a piece is for, and at which stop of its way it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    Idle,
    /// Its payload is still coming.
    Receive,
    Read,
    Write,
    Zero,
    Trim,
    Flush,
    ImageRead,
    ImageWrite,
}

#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub job: Job,
    /// Place of the request in its connection.
    pub request: u8,
    /// Place of the image, for image jobs.
    pub image: u8,
    pub dsync: bool,
    pub no_hole: bool,
    pub fast_zero: bool,
    /// The hole could not be punched: zeros are written instead.
    pub by_hand: bool,
    /// Finished, waiting for its turn in an ordered reply.
    pub finished: bool,
    pub errno: i32,
    /// In the export, in bytes.
    pub offset: u64,
    pub len: u64,
    /// Bytes that are done, from `offset`.
    pub done: u64,
    /// Bytes of the operation in flight (of a zero or trim).
    pub step: u64,
    /// First chunk and number of chunks of an image read that is in flight on the origin; the number is 0 otherwise.
    pub held: (u64, u64),
    pub buffer: Option<Span>,
    /// Place of its pages in the ring's buffer table, instead of a buffer.
    pub fixed: Option<u16>,
    pub(super) next: PieceId,
}

impl Piece {
    pub const IDLE: Self = Self {
        job: Job::Idle,
        request: 0,
        image: 0,
        dsync: false,
        no_hole: false,
        fast_zero: false,
        by_hand: false,
        finished: false,
        errno: 0,
        offset: 0,
        len: 0,
        done: 0,
        step: 0,
        held: (0, 0),
        buffer: None,
        fixed: None,
        next: NOBODY,
    };

    /// Where it goes on, in the export.
    pub fn at(&self) -> u64 {
        self.offset + self.done
    }

    pub fn left(&self) -> u64 {
        self.len - self.done
    }

    /// The part of the buffer that is not done yet.
    pub fn rest(&self) -> Span {
        self.data().from(self.done as usize)
    }

    /// The buffer, as long as the piece.
    pub fn data(&self) -> Span {
        self.buffer
            .expect("a piece with data has a buffer")
            .at(0, self.len as usize)
    }
}

/// The connection of a piece.
pub fn connection_of(id: PieceId) -> usize {
    id as usize / PIECES
}

/// Pieces waiting for the same thing, first come first served.
#[derive(Clone, Copy, Debug)]
pub struct List {
    head: PieceId,
    tail: PieceId,
}

impl List {
    pub const EMPTY: Self = Self {
        head: NOBODY,
        tail: NOBODY,
    };

    pub fn is_empty(self) -> bool {
        self.head == NOBODY
    }

    pub fn push(&mut self, pieces: &mut [Piece], id: PieceId) {
        pieces[id as usize].next = NOBODY;
        if self.is_empty() {
            self.head = id;
        } else {
            pieces[self.tail as usize].next = id;
        }
        self.tail = id;
    }

    pub fn pop(&mut self, pieces: &[Piece]) -> Option<PieceId> {
        if self.is_empty() {
            return None;
        }
        let id = self.head;
        self.head = pieces[id as usize].next;
        Some(id)
    }

    /// Moves all of `other` behind all of this one.
    pub fn append(&mut self, pieces: &mut [Piece], other: &mut Self) {
        if other.is_empty() {
            return;
        }
        if self.is_empty() {
            *self = *other;
        } else {
            pieces[self.tail as usize].next = other.head;
            self.tail = other.tail;
        }
        *other = Self::EMPTY;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_keep_the_order_of_arrival_when_they_are_joined() {
        let mut pieces = [Piece::IDLE; 6];
        let (mut first, mut second) = (List::EMPTY, List::EMPTY);
        for id in [4, 1] {
            first.push(&mut pieces, id);
        }
        for id in [3, 0, 5] {
            second.push(&mut pieces, id);
        }
        first.append(&mut pieces, &mut second);
        assert!(second.is_empty());
        let order: Vec<_> = std::iter::from_fn(|| first.pop(&pieces)).collect();
        assert_eq!(order, [4, 1, 3, 0, 5]);
    }
}
