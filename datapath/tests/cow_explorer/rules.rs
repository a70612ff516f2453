// SPDX-License-Identifier: GPL-2.0-or-later
//! The real `cow::Chunks` over the memory of a world, and the ways in which a mutant answers otherwise.
//!
//! Without a mutant each function is exactly one call of the rules under test.

use crate::world::{Answer, Scenario, World, CHUNKS};
use blksnap_datapath::cow::{BeforeImageWrite, BeforeWrite, Chunks, Recovered, Source, State};
use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicU8};

/// A mistake in the rules, or in an engine that uses them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    // In the rules.
    /// Writes do not wait for image reads of the origin.
    WritesIgnoreReaders,
    /// Image reads of the origin are not counted.
    ReadersUncounted,
    /// Image reads of the origin are counted for ever.
    ReadersNeverEnd,
    /// Each reader that ends is told to be the last.
    EachReaderIsLast,
    /// A write looks at its first chunk only.
    FirstChunkOnly,
    /// The state of a copied chunk is set after the write that waited for it was submitted.
    StateAfterSubmit,
    /// DONE as soon as the copy is in staging.
    DoneBeforeStored,
    /// The state is stored before the slot, and the process dies between.
    StateBeforeSlot,
    /// A chunk that is being copied is read from the origin, too.
    ReadDuringCopy,
    /// An image write goes to the storage while the store is under way.
    ImageWriteWhileStoring,
    /// After a crash, READING counts as copied.
    RecoverReadingAsCopied,
    /// After a crash, STORING is copied again.
    RecoverStoringAsNone,
    /// After a crash, ZERO is copied again.
    RecoverZeroAsNone,
    /// After a crash inside `stored`, the slot is taken for one of staging.
    RecoverIgnoresMark,
    // In the engine.
    /// A second copy of a chunk begins while the first runs.
    CopyTwice,
    /// A write asks the newest image only.
    NewestImageOnly,
    /// A take does not wait for writes in flight.
    TakeWithoutDrain,
    /// A staging slot is free as soon as the copy is in it.
    StagingFreedEarly,
    /// A staging slot stays in use when the chunk was zero.
    StagingLeaksOnZero,
    /// Staging is not filled with zeros for a materialised chunk.
    MaterialiseUnfilled,
    /// Recovery does not wait for the writes of the process that died.
    OrphansOutliveRecovery,
    /// A write is acknowledged before it is on the medium.
    AcknowledgedEarly,
    /// So is an image write.
    ImageAcknowledgedEarly,
}

/// A scenario, its mutant, and which answers of the rules occurred.
pub struct Model {
    pub scenario: Scenario,
    pub mutant: Option<Mutant>,
    /// Off: property 5 is not checked, so that what follows from its breach can be seen.
    pub check_submissions: bool,
    seen: Cell<u32>,
}

impl Model {
    pub fn new(scenario: Scenario, mutant: Option<Mutant>) -> Self {
        Self {
            scenario,
            mutant,
            check_submissions: true,
            seen: Cell::new(0),
        }
    }

    pub fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn saw(&self, answer: Answer) {
        self.seen.set(self.seen.get() | 1 << answer as u8);
    }

    pub fn has_seen(&self, answer: Answer) -> bool {
        self.seen.get() & 1 << answer as u8 != 0
    }

    /// The real rules over copies of the memory of `image`.
    fn ask<R>(&self, world: &World, image: usize, question: impl FnOnce(&Chunks) -> R) -> R {
        let count = self.scenario.chunks();
        let shared = &world.shared[image];
        let state: [AtomicU8; CHUNKS] = shared.state.map(AtomicU8::new);
        let slot: [AtomicU64; CHUNKS] = shared.slot.map(AtomicU64::new);
        let mut readers = world.process.readers[image];
        question(&Chunks::new(&state[..count], &slot[..count], &mut readers[..count]))
    }

    /// The real rules over the memory of `image`.
    fn tell<R>(&self, world: &mut World, image: usize, change: impl FnOnce(&mut Chunks) -> R) -> R {
        let count = self.scenario.chunks();
        let shared = &mut world.shared[image];
        let state: [AtomicU8; CHUNKS] = shared.state.map(AtomicU8::new);
        let slot: [AtomicU64; CHUNKS] = shared.slot.map(AtomicU64::new);
        let readers = &mut world.process.readers[image][..count];
        let result = change(&mut Chunks::new(&state[..count], &slot[..count], readers));
        shared.state = state.map(AtomicU8::into_inner);
        shared.slot = slot.map(AtomicU64::into_inner);
        result
    }

    pub fn state(&self, world: &World, image: usize, chunk: usize) -> State {
        self.ask(world, image, |chunks| chunks.state(chunk as u64))
    }

    pub fn before_write(&self, world: &World, image: usize, chunk: usize) -> BeforeWrite {
        let answer = self.ask(world, image, |chunks| chunks.before_write(chunk as u64));
        self.saw(match answer {
            BeforeWrite::Go => Answer::WriteGo,
            BeforeWrite::Copy => Answer::WriteCopy,
            BeforeWrite::AwaitCopy => Answer::WriteAwaitCopy,
            BeforeWrite::AwaitReaders => Answer::WriteAwaitReaders,
        });
        let copied = world.process.unpublished[image] & 1 << chunk != 0;
        match answer {
            BeforeWrite::AwaitReaders if self.is(Mutant::WritesIgnoreReaders) => BeforeWrite::Go,
            BeforeWrite::AwaitCopy if self.is(Mutant::StateAfterSubmit) && copied => BeforeWrite::Go,
            BeforeWrite::AwaitCopy if self.is(Mutant::CopyTwice) => BeforeWrite::Copy,
            _ => answer,
        }
    }

    pub fn all_go(&self, world: &World, image: usize, chunks: Range<usize>) -> bool {
        match self.mutant {
            Some(Mutant::FirstChunkOnly) => self.before_write(world, image, chunks.start) == BeforeWrite::Go,
            Some(Mutant::WritesIgnoreReaders | Mutant::StateAfterSubmit) => chunks
                .into_iter()
                .all(|chunk| self.before_write(world, image, chunk) == BeforeWrite::Go),
            _ => {
                let go = self.ask(world, image, |rules| {
                    rules.all_go(chunks.start as u64..chunks.end as u64)
                });
                let each = chunks
                    .into_iter()
                    .filter(|&chunk| self.before_write(world, image, chunk) != BeforeWrite::Go);
                assert_eq!(go, each.count() == 0, "all_go and before_write disagree");
                go
            }
        }
    }

    pub fn begin_copy(&self, world: &mut World, image: usize, chunk: usize, slot: usize) {
        self.tell(world, image, |chunks| chunks.begin_copy(chunk as u64, slot as u32));
    }

    pub fn copied(&self, world: &mut World, image: usize, chunk: usize, zero: bool) {
        self.tell(world, image, |chunks| chunks.copied(chunk as u64, zero));
    }

    pub fn stored(&self, world: &mut World, image: usize, chunk: usize, offset: u64) {
        self.tell(world, image, |chunks| chunks.stored(chunk as u64, offset));
    }

    pub fn materialise(&self, world: &mut World, image: usize, chunk: usize, slot: usize) {
        self.tell(world, image, |chunks| chunks.materialise(chunk as u64, slot as u32));
    }

    /// `source` without a note that it occurred.
    pub fn peek_source(&self, world: &World, image: usize, chunk: usize) -> Source {
        let answer = self.ask(world, image, |chunks| chunks.source(chunk as u64));
        match answer {
            Source::AwaitCopy if self.is(Mutant::ReadDuringCopy) => Source::Origin,
            _ => answer,
        }
    }

    pub fn source(&self, world: &World, image: usize, chunk: usize) -> Source {
        let answer = self.peek_source(world, image, chunk);
        self.saw(match answer {
            Source::Origin => Answer::ReadOrigin,
            Source::AwaitCopy => Answer::ReadAwaitCopy,
            Source::Staging(_) => Answer::ReadStaging,
            Source::Storage(_) => Answer::ReadStorage,
            Source::Zero => Answer::ReadZero,
        });
        answer
    }

    pub fn before_image_write(&self, world: &World, image: usize, chunk: usize) -> BeforeImageWrite {
        let answer = self.ask(world, image, |chunks| chunks.before_image_write(chunk as u64));
        self.saw(match answer {
            BeforeImageWrite::Storage(_) => Answer::ImageWriteStorage,
            BeforeImageWrite::Copy => Answer::ImageWriteCopy,
            BeforeImageWrite::Materialise => Answer::ImageWriteMaterialise,
            BeforeImageWrite::AwaitStore => Answer::ImageWriteAwaitStore,
        });
        let storing = self.state(world, image, chunk) == State::Storing;
        match answer {
            BeforeImageWrite::AwaitStore if self.is(Mutant::ImageWriteWhileStoring) && storing => {
                BeforeImageWrite::Storage(self.place(world, chunk))
            }
            _ => answer,
        }
    }

    pub fn reader_began(&self, world: &mut World, image: usize, chunk: usize) {
        if !self.is(Mutant::ReadersUncounted) {
            self.tell(world, image, |chunks| chunks.reader_began(chunk as u64));
        }
    }

    pub fn reader_ended(&self, world: &mut World, image: usize, chunk: usize) -> bool {
        match self.mutant {
            Some(Mutant::ReadersUncounted | Mutant::ReadersNeverEnd) => true,
            Some(Mutant::EachReaderIsLast) => {
                self.tell(world, image, |chunks| chunks.reader_ended(chunk as u64));
                true
            }
            _ => self.tell(world, image, |chunks| chunks.reader_ended(chunk as u64)),
        }
    }

    pub fn recover(&self, world: &mut World, image: usize, chunk: usize) -> Recovered {
        let before = self.state(world, image, chunk);
        let slot = world.shared[image].slot[chunk];
        match (before, self.mutant) {
            (State::Reading, Some(Mutant::RecoverReadingAsCopied)) => {
                self.copied(world, image, chunk, false);
                return Recovered::Store(slot as u32);
            }
            (State::Storing, Some(Mutant::RecoverStoringAsNone)) | (State::Zero, Some(Mutant::RecoverZeroAsNone)) => {
                world.shared[image].state[chunk] = State::None as u8;
                return Recovered::Nothing;
            }
            (State::Storing, Some(Mutant::RecoverIgnoresMark)) => return Recovered::Store(slot as u32),
            _ => {}
        }
        let answer = self.tell(world, image, |chunks| chunks.recover(chunk as u64));
        match (before, answer) {
            (State::Reading, _) => self.saw(Answer::RecoveredReading),
            (State::Storing, Recovered::Store(_)) => self.saw(Answer::RecoveredStoring),
            (State::Storing, Recovered::Nothing) => self.saw(Answer::RecoveredStored),
            _ => {}
        }
        answer
    }

    /// The offset for a store of `chunk` in this life of the process. 64 KiB apart, the first one 0.
    pub fn place(&self, world: &World, chunk: usize) -> u64 {
        offset(chunk, usize::from(world.crashes))
    }
}

/// The offset of the place of `chunk` for the given life. The images have a storage each.
pub fn offset(chunk: usize, life: usize) -> u64 {
    ((chunk * crate::world::LIVES + life) as u64) << 16
}

/// The life of the place of `chunk` at `offset`, unless it is no place of this chunk.
pub fn life_of(chunk: usize, at: u64) -> Option<usize> {
    (0..crate::world::LIVES).find(|&life| offset(chunk, life) == at)
}
