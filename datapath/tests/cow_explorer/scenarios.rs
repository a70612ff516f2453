// SPDX-License-Identifier: GPL-2.0-or-later
//! The small worlds: every pair of actors meets in one of them, with crashes.
//!
//! Values are nibbles: 1 to 3 on the origin, 4 to 6 from writers, 8 and 9 from image writers, 0 for zero chunks.

use crate::explore::explore;
use crate::rules::Model;
use crate::world::Answer::{
    ImageWriteAwaitStore, ImageWriteCopy, ImageWriteMaterialise, ImageWriteStorage, ReadAwaitCopy, ReadOrigin,
    ReadStaging, ReadStorage, ReadZero, RecoveredReading, RecoveredStored, RecoveredStoring, WriteAwaitCopy,
    WriteAwaitReaders, WriteCopy, WriteGo,
};
use crate::world::{ImageWrite, Read, Scenario, Write, HIGH, LOW, WHOLE};
use std::time::Instant;

/// Visits all of `scenario` and fails with the shortest way to a state that must not be.
fn holds(scenario: Scenario) {
    let started = Instant::now();
    let must_see = scenario.must_see;
    let model = Model::new(scenario, None);
    let report = match explore(&model) {
        Ok(report) => report,
        Err(counterexample) => panic!("{}: {counterexample}", model.scenario.name),
    };
    println!(
        "{}: {} states, {} steps, {} last states, depth {}, {:.1} s",
        model.scenario.name,
        report.states,
        report.steps,
        report.ends,
        report.depth,
        started.elapsed().as_secs_f64()
    );
    assert!(report.ends > 0, "{}: the work never ends", model.scenario.name);
    for &answer in must_see {
        assert!(
            model.has_seen(answer),
            "{}: {answer:?} never occurs",
            model.scenario.name
        );
    }
}

const fn write(first: usize, masks: &'static [u8], value: u8) -> Write {
    Write { first, masks, value }
}

const fn read(image: usize, first: usize, count: usize) -> Read {
    Read { image, first, count }
}

const fn image_write(image: usize, first: usize, masks: &'static [u8], value: u8) -> ImageWrite {
    ImageWrite {
        image,
        write: write(first, masks, value),
    }
}

/// One image of two chunks, two staging slots, nobody there.
const QUIET: Scenario = Scenario {
    name: "",
    origin: &[0x11, 0x22],
    slots: 2,
    images: 1,
    takes: 0,
    writers: &[],
    readers: &[],
    image_writers: &[],
    crashes: 0,
    must_see: &[],
};

/// Two writes that share a chunk and halves of it, three chunks, one staging slot, two crashes.
pub const WRITERS: Scenario = Scenario {
    name: "writers",
    origin: &[0x11, 0x22, 0x33],
    slots: 1,
    writers: &[write(0, &[WHOLE, WHOLE], 4), write(1, &[LOW, HIGH], 5)],
    crashes: 2,
    must_see: &[
        WriteGo,
        WriteCopy,
        WriteAwaitCopy,
        RecoveredReading,
        RecoveredStoring,
        RecoveredStored,
    ],
    ..QUIET
};

/// Three writes to the same two chunks, one after the other or at once.
pub const THREE_WRITERS: Scenario = Scenario {
    name: "three writers",
    writers: &[
        write(0, &[WHOLE], 4),
        write(0, &[WHOLE, LOW], 5),
        write(0, &[HIGH, HIGH], 6),
    ],
    crashes: 1,
    must_see: &[
        WriteGo,
        WriteCopy,
        WriteAwaitCopy,
        RecoveredReading,
        RecoveredStoring,
        RecoveredStored,
    ],
    ..QUIET
};

/// A write and an image read over three chunks.
pub const WRITER_AND_READER: Scenario = Scenario {
    name: "writer and reader",
    origin: &[0x11, 0x22, 0x33],
    writers: &[write(0, &[WHOLE, WHOLE, LOW], 4)],
    readers: &[read(0, 0, 3)],
    crashes: 1,
    must_see: &[
        WriteAwaitReaders,
        ReadOrigin,
        ReadAwaitCopy,
        ReadStaging,
        ReadStorage,
        RecoveredStoring,
    ],
    ..QUIET
};

/// Two image reads hold the same chunk, two writes want it.
pub const TWO_READERS: Scenario = Scenario {
    name: "two readers",
    slots: 1,
    writers: &[write(0, &[WHOLE], 4), write(0, &[HIGH, LOW], 5)],
    readers: &[read(0, 0, 1), read(0, 0, 2)],
    crashes: 1,
    must_see: &[WriteAwaitReaders, ReadOrigin, ReadAwaitCopy, ReadStaging, ReadStorage],
    ..QUIET
};

/// The image is written, read, and its origin written, all at once.
pub const IMAGE_WRITER: Scenario = Scenario {
    name: "image writer",
    slots: 1,
    writers: &[write(0, &[WHOLE, WHOLE], 4)],
    readers: &[read(0, 0, 2)],
    image_writers: &[image_write(0, 0, &[HIGH, WHOLE], 8)],
    crashes: 1,
    must_see: &[
        ImageWriteCopy,
        ImageWriteAwaitStore,
        ImageWriteStorage,
        WriteAwaitReaders,
        ReadStorage,
    ],
    ..QUIET
};

/// Two image writes meet in one chunk, two crashes.
pub const TWO_IMAGE_WRITERS: Scenario = Scenario {
    name: "two image writers",
    slots: 1,
    writers: &[write(0, &[LOW], 4)],
    image_writers: &[image_write(0, 0, &[HIGH, WHOLE], 8), image_write(0, 0, &[WHOLE], 9)],
    crashes: 2,
    must_see: &[ImageWriteCopy, ImageWriteAwaitStore, ImageWriteStorage, RecoveredStored],
    ..QUIET
};

/// Chunks of zeros: written on the origin, read and written on the image, two crashes.
pub const ZERO_CHUNKS: Scenario = Scenario {
    name: "zero chunks",
    origin: &[0x00, 0x01],
    writers: &[write(0, &[WHOLE, WHOLE], 4)],
    readers: &[read(0, 0, 2)],
    image_writers: &[image_write(0, 0, &[LOW], 8)],
    crashes: 2,
    must_see: &[
        ReadZero,
        ImageWriteMaterialise,
        ImageWriteStorage,
        WriteAwaitReaders,
        RecoveredStoring,
    ],
    ..QUIET
};

/// Zeros only, and one slot, which must come free again for the chunk that needs it.
pub const ZEROS_ONLY: Scenario = Scenario {
    name: "zeros only",
    origin: &[0x00, 0x00, 0x00],
    slots: 1,
    writers: &[write(0, &[WHOLE, LOW, WHOLE], 4)],
    image_writers: &[image_write(0, 1, &[HIGH, LOW], 8)],
    crashes: 1,
    must_see: &[ImageWriteMaterialise, ImageWriteStorage],
    ..QUIET
};

/// Two images of one origin: a write waits for both, each has its own copies, readers and writes.
pub const TWO_IMAGES: Scenario = Scenario {
    name: "two images",
    slots: 1,
    images: 2,
    writers: &[write(0, &[WHOLE, HIGH], 4)],
    readers: &[read(0, 0, 1), read(1, 1, 1)],
    image_writers: &[image_write(1, 0, &[LOW], 8)],
    crashes: 1,
    must_see: &[
        WriteAwaitReaders,
        WriteAwaitCopy,
        ReadOrigin,
        ReadStaging,
        ImageWriteCopy,
    ],
    ..QUIET
};

/// A second image is taken between and amid writes while the first is read; both are read.
pub const TAKE: Scenario = Scenario {
    name: "take",
    slots: 1,
    takes: 1,
    writers: &[write(0, &[WHOLE], 4), write(0, &[LOW, WHOLE], 5)],
    readers: &[read(1, 0, 1)],
    crashes: 1,
    must_see: &[
        WriteAwaitReaders,
        WriteAwaitCopy,
        ReadOrigin,
        ReadStaging,
        RecoveredReading,
    ],
    ..QUIET
};

/// A second image is taken while the first is read and its origin written; the second is read, too.
pub const TAKE_AND_READERS: Scenario = Scenario {
    name: "take and readers",
    slots: 1,
    takes: 1,
    writers: &[write(0, &[WHOLE, LOW], 4)],
    readers: &[read(0, 0, 1), read(1, 0, 2)],
    crashes: 1,
    must_see: &[
        WriteAwaitReaders,
        WriteAwaitCopy,
        ReadOrigin,
        ReadStaging,
        ReadStorage,
        ReadAwaitCopy,
    ],
    ..QUIET
};

/// Every kind of actor once.
pub const EVERYBODY: Scenario = Scenario {
    name: "everybody",
    slots: 1,
    takes: 1,
    writers: &[write(0, &[WHOLE, LOW], 4)],
    readers: &[read(0, 0, 1)],
    image_writers: &[image_write(0, 0, &[HIGH], 8)],
    crashes: 1,
    must_see: &[
        WriteAwaitReaders,
        WriteAwaitCopy,
        ReadOrigin,
        ReadStorage,
        ImageWriteCopy,
        ImageWriteAwaitStore,
    ],
    ..QUIET
};

/// The first and the second image are taken under two writes; the second is written.
pub const TWO_TAKES: Scenario = Scenario {
    name: "two takes",
    slots: 1,
    images: 0,
    takes: 2,
    writers: &[write(0, &[WHOLE, WHOLE], 4), write(0, &[HIGH], 5)],
    image_writers: &[image_write(1, 0, &[LOW], 8)],
    crashes: 1,
    must_see: &[WriteGo, WriteCopy, ImageWriteCopy],
    ..QUIET
};

#[test]
fn writers_hold() {
    holds(WRITERS);
}

#[test]
fn three_writers_hold() {
    holds(THREE_WRITERS);
}

#[test]
fn a_writer_and_a_reader_hold() {
    holds(WRITER_AND_READER);
}

#[test]
fn two_readers_hold() {
    holds(TWO_READERS);
}

#[test]
fn an_image_writer_holds() {
    holds(IMAGE_WRITER);
}

#[test]
fn two_image_writers_hold() {
    holds(TWO_IMAGE_WRITERS);
}

#[test]
fn zero_chunks_hold() {
    holds(ZERO_CHUNKS);
}

#[test]
fn zeros_only_hold() {
    holds(ZEROS_ONLY);
}

#[test]
fn two_images_hold() {
    holds(TWO_IMAGES);
}

#[test]
fn a_take_holds() {
    holds(TAKE);
}

#[test]
fn a_take_amid_readers_holds() {
    holds(TAKE_AND_READERS);
}

#[test]
fn everybody_holds() {
    holds(EVERYBODY);
}

#[test]
fn two_takes_hold() {
    holds(TWO_TAKES);
}
