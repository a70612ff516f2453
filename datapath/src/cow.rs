// SPDX-License-Identifier: GPL-2.0-or-later
//! Copy-before-write of one image: the state of each chunk and what it allows. Pure: no I/O, no waiting, no storage.
//!
//! ```text
//!  NONE ──begin_copy──▶ READING ──copied──▶ STORING ──stored──▶ DONE
//!                          │ └──all bytes zero──▶ ZERO ──materialise──▶ STORING
//!                          └──crash──▶ NONE            STORING ──crash──▶ STORING (stored again from staging)
//! ```
//!
//! The old bytes are safe from STORING on: they are in shared memory, so a write to the origin may go on, and a crash of
//! the process cannot lose them. The state is changed *before* the write is submitted; after a crash a chunk that is
//! READING was never written, and one that is not is never copied again.
//!
//! States and slots are in shared memory (a chunk table, docs/datapath-protocol.md); the readers of the origin are not: a
//! crash ends them. One thread (the origin's) changes all of it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};

/// Where the old bytes of a chunk are. The numbers are those of the chunk table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// In the origin: no write has touched the chunk since the take.
    None = 0,
    /// In the origin, on their way to staging; writes wait.
    Reading = 1,
    /// In staging, on their way to the storage; writes go on.
    Storing = 2,
    /// In the storage.
    Done = 3,
    /// Nowhere: they were all zero.
    Zero = 4,
}

impl State {
    /// Any other byte cannot come from us; it is read as `Reading`, which neither serves nor overwrites anything.
    fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::None,
            2 => Self::Storing,
            3 => Self::Done,
            4 => Self::Zero,
            _ => Self::Reading,
        }
    }
}

/// What a write to the origin has to do about a chunk before it may be submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BeforeWrite {
    /// Nothing: the old bytes are safe and nobody reads them from the origin.
    Go,
    /// Start the copy ([`Chunks::begin_copy`]), then wait for it.
    Copy,
    /// Wait for the copy that is under way.
    AwaitCopy,
    /// Wait for image reads of the origin that are in flight on this chunk.
    AwaitReaders,
}

/// Where an image read finds a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the origin; hold the chunk with [`Chunks::reader_began`] for as long as the read is in flight.
    Origin,
    /// Nowhere yet: wait for the copy.
    AwaitCopy,
    /// In staging slot `.0`.
    Staging(u32),
    /// At offset `.0` of the storage.
    Storage(u64),
    Zero,
}

/// What a write to the image itself has to do about a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BeforeImageWrite {
    /// Write to the storage at this offset.
    Storage(u64),
    /// Copy the chunk first ([`Chunks::begin_copy`]), then wait until it is stored.
    Copy,
    /// Give the zero chunk room ([`Chunks::materialise`]), then wait until it is stored.
    Materialise,
    /// Wait until the copy is stored.
    AwaitStore,
}

/// After a crash: what is left to do for a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovered {
    Nothing,
    /// Store staging slot `.0` again (to a new place in the storage).
    Store(u32),
}

/// The chunks of one image.
pub struct Chunks<'a> {
    state: &'a [AtomicU8],
    slot: &'a [AtomicU64],
    readers: &'a mut [u16],
}

impl<'a> Chunks<'a> {
    /// `state`, `slot` (shared) and `readers` (ours, all 0 at start) have one entry per chunk.
    pub fn new(state: &'a [AtomicU8], slot: &'a [AtomicU64], readers: &'a mut [u16]) -> Self {
        assert!(state.len() == slot.len() && state.len() == readers.len());
        Self { state, slot, readers }
    }

    pub fn len(&self) -> u64 {
        self.state.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.state.is_empty()
    }

    pub fn state(&self, chunk: u64) -> State {
        State::from_byte(self.state[chunk as usize].load(Ordering::Relaxed))
    }

    fn set(&self, chunk: u64, state: State) {
        // Release: whoever sees the state (the process after a crash) sees the slot and the staged bytes.
        self.state[chunk as usize].store(state as u8, Ordering::Release);
    }

    fn slot(&self, chunk: u64) -> u64 {
        self.slot[chunk as usize].load(Ordering::Relaxed)
    }

    fn set_slot(&self, chunk: u64, slot: u64) {
        self.slot[chunk as usize].store(slot, Ordering::Relaxed);
    }

    pub fn before_write(&self, chunk: u64) -> BeforeWrite {
        match self.state(chunk) {
            State::None => BeforeWrite::Copy,
            State::Reading => BeforeWrite::AwaitCopy,
            State::Storing | State::Done | State::Zero if self.readers[chunk as usize] > 0 => BeforeWrite::AwaitReaders,
            State::Storing | State::Done | State::Zero => BeforeWrite::Go,
        }
    }

    /// Whether a write to all these chunks may be submitted now.
    pub fn all_go(&self, chunks: Range<u64>) -> bool {
        chunks
            .into_iter()
            .all(|chunk| self.before_write(chunk) == BeforeWrite::Go)
    }

    /// NONE → READING: the old bytes are now read from the origin into `staging`.
    pub fn begin_copy(&self, chunk: u64, staging: u32) {
        assert_eq!(self.state(chunk), State::None);
        self.set_slot(chunk, u64::from(staging));
        self.set(chunk, State::Reading);
    }

    /// READING → STORING, or ZERO when `zero`: the old bytes are in staging. Waiting writes and readers may go on.
    pub fn copied(&self, chunk: u64, zero: bool) {
        assert_eq!(self.state(chunk), State::Reading);
        self.set(chunk, if zero { State::Zero } else { State::Storing });
    }

    /// STORING → DONE: the old bytes are at `offset` of the storage; staging is free again.
    pub fn stored(&self, chunk: u64, offset: u64) {
        assert_eq!(self.state(chunk), State::Storing);
        // Two words cannot change at once. A process that follows a crash between these two finds STORING with a slot
        // that says STORED: the bytes are in the storage, and `recover` makes the chunk DONE.
        self.set_slot(chunk, offset | STORED);
        self.set(chunk, State::Done);
    }

    /// ZERO → STORING: `staging` (filled with zeros) gets room in the storage, for a write to the image.
    pub fn materialise(&self, chunk: u64, staging: u32) {
        assert_eq!(self.state(chunk), State::Zero);
        self.set_slot(chunk, u64::from(staging));
        self.set(chunk, State::Storing);
    }

    pub fn source(&self, chunk: u64) -> Source {
        match self.state(chunk) {
            State::None => Source::Origin,
            State::Reading => Source::AwaitCopy,
            State::Storing => Source::Staging(self.slot(chunk) as u32),
            State::Done => Source::Storage(self.slot(chunk) & !STORED),
            State::Zero => Source::Zero,
        }
    }

    pub fn before_image_write(&self, chunk: u64) -> BeforeImageWrite {
        match self.state(chunk) {
            State::None => BeforeImageWrite::Copy,
            State::Reading | State::Storing => BeforeImageWrite::AwaitStore,
            State::Done => BeforeImageWrite::Storage(self.slot(chunk) & !STORED),
            State::Zero => BeforeImageWrite::Materialise,
        }
    }

    /// An image read of the origin is in flight on `chunk` from now on.
    pub fn reader_began(&mut self, chunk: u64) {
        assert_eq!(self.state(chunk), State::None);
        self.readers[chunk as usize] += 1;
    }

    /// Whether the last one ended (waiting writes may go on).
    pub fn reader_ended(&mut self, chunk: u64) -> bool {
        self.readers[chunk as usize] -= 1;
        self.readers[chunk as usize] == 0
    }

    /// Puts `chunk` right after the process that served it died; to be called for each chunk before any I/O.
    pub fn recover(&self, chunk: u64) -> Recovered {
        match self.state(chunk) {
            State::Reading => {
                self.set(chunk, State::None);
                Recovered::Nothing
            }
            State::Storing if self.slot(chunk) & STORED != 0 => {
                self.set(chunk, State::Done);
                Recovered::Nothing
            }
            State::Storing => Recovered::Store(self.slot(chunk) as u32),
            State::None | State::Done | State::Zero => Recovered::Nothing,
        }
    }
}

/// Marks a slot as an offset of the storage (offsets are below 2^63), so that `stored` needs no two words at once.
const STORED: u64 = 1 << 63;
