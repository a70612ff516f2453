// SPDX-License-Identifier: GPL-2.0-or-later
//! The page of a snapshot: how far it has come, why it failed, and its images, one record for each.
//!
//! The records are written while all gates are closed; the one word that says "taken" comes after them and before any
//! gate opens, so that a take is whole or did not happen, over all its origins. A snapshot that is to go says so first.

use super::{uuid_text, uuid_words};
use crate::mem::{Shared, PAGE};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: u64 = u64::from_le_bytes(*b"BLKSNAP3");
const FAILURE: usize = 1;
const PHASE: usize = 2;
const TAKEN_AT: usize = 3;
const COUNT: usize = 4;
const RECORDS: usize = PAGE / 8;
const RECORD: usize = 32;
/// The number of its block device + 1.
const DEVICE: usize = 10;
const NAME_AT: usize = 16;
const NAME_LEN: usize = 8 * (RECORD - NAME_AT) / 2;
/// Records that fit.
pub const MOST: usize = crate::sys::MAX_FDS / 3;
const LEN: usize = PAGE + MOST * RECORD * 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Phase {
    Created = 0,
    Taken = 1,
    /// It is being destroyed: origins may not keep its chunks any more.
    Leaving = 2,
}

/// What is known of an image from the moment of its take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Handle and name of its origin.
    pub handle: u32,
    pub origin: String,
    /// Of `Shared::id`.
    pub table: u64,
    pub taken: u64,
    pub base: u32,
    /// The active number after the take.
    pub active: u32,
    pub generation: String,
    pub size: u64,
    pub block_size: u64,
    pub chunk_size: u64,
    pub writable: bool,
    /// The number of its block device.
    pub device: Option<u32>,
}

#[derive(Debug)]
pub struct Page(Shared);

impl Page {
    pub fn new() -> io::Result<Self> {
        let page = Self(Shared::new(c"blksnap-snapshot", LEN, true)?);
        page.word(0).store(MAGIC, Ordering::Release);
        Ok(page)
    }

    /// A page that was copied from that of a process that died. Raised (InvalidData) when it is none.
    pub fn from(shared: Shared) -> io::Result<Self> {
        if shared.len() != LEN || shared.words(0, 1)[0].load(Ordering::Acquire) != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no snapshot page"));
        }
        Ok(Self(shared))
    }

    pub fn memory(&self) -> &Shared {
        &self.0
    }

    fn word(&self, place: usize) -> &AtomicU64 {
        &self.0.words(place * 8, 1)[0]
    }

    pub fn failure(&self) -> &AtomicU64 {
        self.word(FAILURE)
    }

    pub fn phase(&self) -> Phase {
        match self.word(PHASE).load(Ordering::Acquire) {
            0 => Phase::Created,
            1 => Phase::Taken,
            _ => Phase::Leaving,
        }
    }

    /// From here on no origin has to keep anything for it.
    pub fn leave(&self) {
        self.word(PHASE).store(Phase::Leaving as u64, Ordering::Release);
    }

    /// Makes it a taken one, of these images. The gates of all of them are closed.
    pub fn take(&self, taken_at: u64, records: &[Record]) {
        for (place, record) in records.iter().enumerate() {
            self.write(place, record);
        }
        self.word(TAKEN_AT).store(taken_at, Ordering::Release);
        self.word(COUNT).store(records.len() as u64, Ordering::Release);
        self.word(PHASE).store(Phase::Taken as u64, Ordering::Release);
    }

    pub fn taken_at(&self) -> u64 {
        self.word(TAKEN_AT).load(Ordering::Acquire)
    }

    /// The image at `place` of the records has this block device from now on.
    pub fn set_device(&self, place: usize, device: u32) {
        let words = self.0.words((RECORDS + place * RECORD) * 8, RECORD);
        words[DEVICE].store(u64::from(device) + 1, Ordering::Release);
    }

    fn write(&self, place: usize, record: &Record) {
        let words = self.0.words((RECORDS + place * RECORD) * 8, RECORD);
        let (high, low) = uuid_words(&record.generation);
        let values = [
            u64::from(record.handle),
            record.table,
            record.taken,
            u64::from(record.base) << 32 | u64::from(record.active),
            high,
            low,
            record.size,
            record.block_size,
            record.chunk_size,
            u64::from(record.writable),
            record.device.map_or(0, |device| u64::from(device) + 1),
        ];
        for (word, value) in words.iter().zip(values) {
            word.store(value, Ordering::Release);
        }
        let mut name = [0; NAME_LEN];
        let length = record.origin.len().min(NAME_LEN);
        name[..length].copy_from_slice(&record.origin.as_bytes()[..length]);
        for (word, bytes) in words[NAME_AT..].iter().zip(name.chunks_exact(8)) {
            let bytes = bytes.try_into().expect("eight of them");
            word.store(u64::from_le_bytes(bytes), Ordering::Release);
        }
    }

    /// The images, when it is taken.
    pub fn records(&self) -> Vec<Record> {
        if self.phase() != Phase::Taken {
            return Vec::new();
        }
        let count = self.word(COUNT).load(Ordering::Acquire) as usize;
        (0..count.min(MOST)).map(|place| self.read(place)).collect()
    }

    /// The block devices that its images had, also of one that is leaving.
    pub fn devices(&self) -> Vec<u32> {
        let count = self.word(COUNT).load(Ordering::Acquire) as usize;
        let all = (0..count.min(MOST)).map(|place| self.read(place));
        all.filter_map(|record| record.device).collect()
    }

    fn read(&self, place: usize) -> Record {
        let words = self.0.words((RECORDS + place * RECORD) * 8, RECORD);
        let word = |place: usize| words[place].load(Ordering::Acquire);
        let name: Vec<u8> = (0..NAME_LEN / 8)
            .flat_map(|place| word(NAME_AT + place).to_le_bytes())
            .take_while(|byte| *byte != 0)
            .collect();
        Record {
            handle: word(0) as u32,
            origin: String::from_utf8_lossy(&name).into_owned(),
            table: word(1),
            taken: word(2),
            base: (word(3) >> 32) as u32,
            active: word(3) as u32,
            generation: uuid_text(word(4), word(5)),
            size: word(6),
            block_size: word(7),
            chunk_size: word(8),
            writable: word(9) != 0,
            device: word(DEVICE).checked_sub(1).map(|device| device as u32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: u32) -> Record {
        Record {
            handle: number,
            origin: "x".repeat(NAME_LEN - number as usize % 3),
            table: u64::from(number) + 1,
            taken: u64::from(number) + 2,
            base: 128,
            active: 300,
            generation: "0b1f5c3e-9a0d-4c52-8f4e-8d8d2a6c1e55".into(),
            size: 5_000_000_001,
            block_size: 65536,
            chunk_size: 4096,
            writable: number % 2 == 0,
            device: (number % 3 == 0).then_some(number),
        }
    }

    #[test]
    fn images_are_there_from_the_take_to_the_leaving() {
        let page = Page::new().expect("page");
        let records: Vec<_> = (0..MOST as u32).map(record).collect();
        assert_eq!((page.phase(), page.records()), (Phase::Created, vec![]));
        page.take(17, &records);
        assert_eq!((page.phase(), page.taken_at()), (Phase::Taken, 17));
        assert_eq!(page.records(), records);
        page.leave();
        assert_eq!((page.phase(), page.records()), (Phase::Leaving, vec![]));
    }

    #[test]
    fn records_without_the_last_word_are_nothing() {
        let page = Page::new().expect("page");
        page.write(0, &record(0));
        page.word(COUNT).store(1, Ordering::Relaxed);
        assert_eq!(page.records(), vec![]);
    }
}
