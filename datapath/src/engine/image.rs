// SPDX-License-Identifier: GPL-2.0-or-later
//! One image: an origin at one instant. Its chunk table, staging and copies under way; no I/O (see `copies`, `image_io`).

use super::piece::List;
use crate::cbt::{Geometry, Numbers};
use crate::cow::{Chunks, Recovered, Source};
use crate::mem::{Shared, Span, PAGE};
use crate::snapshot::Snapshot;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Copies of one image under way at most; the number of its staging slots is smaller for large chunks.
pub const COPIES: usize = 64;
const STAGING_LEN: u64 = 4 << 20;

/// A chunk on its way from the origin to the storage. Its place in the list is its staging slot.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    pub chunk: u64,
    pub len: u64,
    pub done: u64,
    /// In the storage.
    pub offset: u64,
    /// Whether the kernel holds an operation of it.
    pub busy: bool,
    /// Pieces waiting for the old bytes to be in staging, and for them to be stored.
    pub read_wait: List,
    pub store_wait: List,
}

#[derive(Debug)]
pub struct Image {
    pub snapshot: Arc<Snapshot>,
    pub table: Arc<Shared>,
    pub taken: Arc<Shared>,
    /// The map's rules as of the take: block status "changed since" counts by them.
    pub geometry: Geometry,
    pub numbers: Numbers,
    pub generation: String,
    pub writable: bool,
    pub size: u64,
    shift: u32,
    chunk_count: u64,
    readers: Vec<u16>,
    pub copies: Vec<Copy>,
    free: Vec<u32>,
    stall: u32,
    stored: u64,
    stored_seen: u64,
    /// To be dropped when nothing of it is in flight.
    pub leaving: Option<std::sync::mpsc::SyncSender<()>>,
    /// Operations of image pieces on its storage or the origin.
    pub in_flight: u32,
}

/// Bytes of a chunk table: states, slots, staging (docs/datapath-protocol.md).
fn layout(chunk_count: u64, chunk_size: u64) -> (usize, usize, usize, usize) {
    let slots = (STAGING_LEN / chunk_size).clamp(4, COPIES as u64);
    let slot_words = (chunk_count as usize).next_multiple_of(8);
    let staging = (slot_words + 8 * chunk_count as usize).next_multiple_of(PAGE);
    (
        slot_words,
        staging,
        slots as usize,
        staging + (slots * chunk_size) as usize,
    )
}

impl Image {
    /// All that a take needs to have ready before the gate closes. `numbers` are set at the flip.
    pub fn new(
        snapshot: Arc<Snapshot>,
        geometry: Geometry,
        chunk_size: u64,
        taken: Arc<Shared>,
        writable: bool,
    ) -> io::Result<Self> {
        let (_, _, _, len) = layout(geometry.size().div_ceil(chunk_size), chunk_size);
        let table = Arc::new(Shared::new(c"blksnap-chunks", len, false)?);
        Self::with_table(snapshot, geometry, chunk_size, taken, table, writable)
    }

    /// The image whose chunks `table` tells. Raised (InvalidData) when it does not fit.
    pub fn with_table(
        snapshot: Arc<Snapshot>,
        geometry: Geometry,
        chunk_size: u64,
        taken: Arc<Shared>,
        table: Arc<Shared>,
        writable: bool,
    ) -> io::Result<Self> {
        let size = geometry.size();
        let chunk_count = size.div_ceil(chunk_size);
        let (_, _, slots, len) = layout(chunk_count, chunk_size);
        if table.len() != len {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "no chunk table of this image",
            ));
        }
        let nothing = Copy {
            chunk: 0,
            len: 0,
            done: 0,
            offset: 0,
            busy: false,
            read_wait: List::EMPTY,
            store_wait: List::EMPTY,
        };
        Ok(Self {
            table,
            snapshot,
            taken,
            geometry,
            numbers: Numbers::START,
            generation: String::new(),
            writable,
            size,
            shift: chunk_size.trailing_zeros(),
            chunk_count,
            readers: vec![0; chunk_count as usize],
            copies: vec![nothing; slots],
            free: (0..slots as u32).rev().collect(),
            stall: 0,
            stored: 0,
            stored_seen: 0,
            leaving: None,
            in_flight: 0,
        })
    }

    /// Whether it is the image of this snapshot, and stays.
    pub fn serves(&self, id: &str) -> bool {
        self.snapshot.id == id && self.leaving.is_none()
    }

    /// Puts right what a process that died left in the table; before any I/O. Copies that still have to be stored get
    /// their staging slots back and are `busy`. Returns where the used part of the storage ends.
    ///
    /// Of a snapshot that failed nothing is put right. Raised (InvalidData) when the table cannot be one that we wrote.
    pub fn recover(&mut self) -> io::Result<u64> {
        let failed = self.failed();
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "a chunk table that contradicts itself");
        let mut end = 0;
        for chunk in 0..self.chunk_count {
            let recovered = match failed {
                false => self.chunks().recover(chunk),
                true => Recovered::Nothing,
            };
            if let Recovered::Store(slot) = recovered {
                let (_, len) = self.extent(chunk);
                let copy = self.copies.get_mut(slot as usize).filter(|copy| !copy.busy);
                let copy = copy.ok_or_else(wrong)?;
                (copy.chunk, copy.len, copy.busy) = (chunk, len, true);
                self.free.retain(|free| *free != slot);
            }
            if let Source::Storage(offset) = self.chunks().source(chunk) {
                end = end.max(offset.checked_add(self.chunk_size()).ok_or_else(wrong)?);
            }
        }
        Ok(end)
    }

    pub fn failed(&self) -> bool {
        self.snapshot.failed()
    }

    pub fn chunk_size(&self) -> u64 {
        1 << self.shift
    }

    pub fn chunk_count(&self) -> u64 {
        self.chunk_count
    }

    pub fn chunks(&mut self) -> Chunks<'_> {
        let count = self.chunk_count as usize;
        let (slot_words, ..) = layout(self.chunk_count, 1 << self.shift);
        Chunks::new(
            self.table.bytes(0, count),
            self.table.words(slot_words, count),
            &mut self.readers,
        )
    }

    /// The chunks of the image that `len` bytes at `offset` touch; none behind its end (the origin may have grown).
    pub fn touched(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return 0..0;
        }
        offset >> self.shift..((end - 1) >> self.shift) + 1
    }

    /// The bytes of a chunk: offset and length (the last may be short).
    pub fn extent(&self, chunk: u64) -> (u64, u64) {
        let offset = chunk << self.shift;
        (offset, (1_u64 << self.shift).min(self.size - offset))
    }

    pub fn staging(&self, slot: u32) -> Span {
        let (_, staging, ..) = layout(self.chunk_count, 1 << self.shift);
        let size = 1_usize << self.shift;
        self.table.span(staging + slot as usize * size, size)
    }

    pub fn take_staging(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// `stored`: whether the storage did its part (for [`Self::stalled_for`]).
    pub fn free_staging(&mut self, slot: u32, stored: bool) {
        self.copies[slot as usize].busy = false;
        self.free.push(slot);
        self.stored += u64::from(stored);
    }

    /// Seconds (calls) since the storage last finished a write although it owes one.
    pub fn stalled_for(&mut self) -> u32 {
        let owes = self.free.len() < self.copies.len();
        self.stall = if owes && self.stored == self.stored_seen {
            self.stall + 1
        } else {
            0
        };
        self.stored_seen = self.stored;
        self.stall
    }

    /// Whether the kernel holds nothing of it and no copy is under way.
    pub fn unused(&self) -> bool {
        self.in_flight == 0 && self.free.len() == self.copies.len()
    }
}
