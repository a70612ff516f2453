// SPDX-License-Identifier: GPL-2.0-or-later
//! What exists in the small model: contents, memory that survives a crash, memory that does not, and the steps.
//!
//! Data only. A chunk has two halves, so that writes can cover a part of it; a half holds one of 16 values.

/// Two halves of a chunk, a nibble each.
pub type Content = u8;
/// A set of chunks or of clients, one bit each.
pub type Set = u8;

pub const CHUNKS: usize = 3;
pub const IMAGES: usize = 2;
pub const SLOTS: usize = 2;
pub const WRITERS: usize = 3;
pub const READERS: usize = 2;
pub const IMAGE_WRITERS: usize = 2;
/// One place in the storage per chunk and life of the process: what is stored again goes to a new place.
pub const LIVES: usize = 3;

/// Memory that nobody has given a meaning (again): no client ever writes this.
pub const GARBAGE: Content = 0xEE;
pub const WHOLE: u8 = 0xFF;
pub const LOW: u8 = 0x0F;
pub const HIGH: u8 = 0xF0;

/// `new` over `old` in the halves that `mask` names.
pub fn mix(old: Content, new: Content, mask: u8) -> Content {
    (old & !mask) | (new & mask)
}

/// A write of `value` (a nibble in both halves) to consecutive chunks from `first` on; `masks` says which halves.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub first: usize,
    pub masks: &'static [u8],
    pub value: u8,
}

impl Write {
    pub fn chunks(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.masks.len()
    }

    pub fn set(&self) -> Set {
        self.chunks().fold(0, |set, chunk| set | 1 << chunk)
    }

    /// 0 where the write does not reach.
    pub fn mask(&self, chunk: usize) -> u8 {
        chunk
            .checked_sub(self.first)
            .and_then(|index| self.masks.get(index))
            .copied()
            .unwrap_or(0)
    }

    pub fn content(&self) -> Content {
        self.value * 0x11
    }
}

#[derive(Clone, Copy, Debug)]
pub struct ImageWrite {
    pub image: usize,
    pub write: Write,
}

/// A read of `count` chunks of an image from `first` on.
#[derive(Clone, Copy, Debug)]
pub struct Read {
    pub image: usize,
    pub first: usize,
    pub count: usize,
}

impl Read {
    pub fn chunks(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }
}

/// Who takes part.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub origin: &'static [Content],
    /// Staging slots of each image.
    pub slots: usize,
    /// Images that exist at the start.
    pub images: usize,
    /// Takes to come.
    pub takes: usize,
    pub writers: &'static [Write],
    pub readers: &'static [Read],
    pub image_writers: &'static [ImageWrite],
    pub crashes: u8,
    /// Answers of the rules that have to occur, or the scenario does not test what it says.
    pub must_see: &'static [Answer],
}

impl Scenario {
    pub fn chunks(&self) -> usize {
        self.origin.len()
    }
}

/// An answer of `cow::Chunks` to the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Answer {
    WriteGo,
    WriteCopy,
    WriteAwaitCopy,
    WriteAwaitReaders,
    ReadOrigin,
    ReadAwaitCopy,
    ReadStaging,
    ReadStorage,
    ReadZero,
    ImageWriteStorage,
    ImageWriteCopy,
    ImageWriteMaterialise,
    ImageWriteAwaitStore,
    RecoveredReading,
    RecoveredStoring,
    RecoveredStored,
}

/// The chunk table of an image as `cow::Chunks` wants it, and what its slots say about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shared {
    pub state: [u8; CHUNKS],
    pub slot: [u64; CHUNKS],
    pub staging: [Content; SLOTS],
    pub storage: [[Content; LIVES]; CHUNKS],
}

/// Who uses a staging slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Slot {
    #[default]
    Free,
    /// The origin is being read; `at_begin` is what it held when the read began.
    Copying {
        chunk: u8,
        at_begin: Content,
    },
    Storing {
        chunk: u8,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Request {
    #[default]
    Idle,
    Waiting,
    Submitted,
}

/// One chunk of an image read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ChunkRead {
    #[default]
    Waiting,
    InOrigin,
    /// Of the place for this life.
    InStorage(u8),
    Got,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reading {
    pub running: bool,
    pub chunks: [ChunkRead; CHUNKS],
    /// What the image held when the read arrived.
    pub at_arrival: [Content; CHUNKS],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ImageWriting {
    pub running: bool,
    pub landed: Set,
}

/// Memory of the process: gone after a crash.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Process {
    pub gate_closed: bool,
    pub readers: [[u16; CHUNKS]; IMAGES],
    pub slots: [[Slot; SLOTS]; IMAGES],
    pub writers: [Request; WRITERS],
    pub reads: [Reading; READERS],
    pub image_writes: [ImageWriting; IMAGE_WRITERS],
    /// Of a mutant: copied chunks whose state has not been set.
    pub unpublished: [Set; IMAGES],
}

/// Writes that the kernel has: per client the chunks that have not reached the medium.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Kernel {
    pub writes: [Set; WRITERS],
    pub image_writes: [Set; IMAGE_WRITERS],
    /// Life in which the place that an image write goes to was filled.
    pub image_places: [[u8; CHUNKS]; IMAGE_WRITERS],
    /// Submitted by a process that died: may land until its ring is gone, or never.
    pub orphan_writes: [Set; WRITERS],
    pub orphan_image_writes: [Set; IMAGE_WRITERS],
}

/// What the clients have seen of their requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Clients {
    pub sent: Set,
    pub acked: Set,
    /// Writers that were acknowledged before this one was sent.
    pub after: [Set; WRITERS],
    pub read: Set,
    pub image_sent: Set,
    pub image_acked: Set,
    pub image_after: [Set; IMAGE_WRITERS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    Up,
    /// The process died; so many chunks of all images have been recovered.
    Down(u8),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub phase: Phase,
    pub crashes: u8,
    pub taken: u8,
    pub origin: [Content; CHUNKS],
    pub shared: [Shared; IMAGES],
    pub process: Process,
    pub kernel: Kernel,
    pub clients: Clients,
    /// What each image held at its instant.
    pub instant: [[Content; CHUNKS]; IMAGES],
    /// What each image must hold: its instant and the image writes that landed on it.
    pub expected: [[Content; CHUNKS]; IMAGES],
}

/// One thing that happens. `cut`: the process dies inside the call, between its store to the slot and that to the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Arrive {
        writer: usize,
    },
    Submit {
        writer: usize,
    },
    Land {
        writer: usize,
        chunk: usize,
    },
    Acknowledge {
        writer: usize,
    },
    BeginCopy {
        image: usize,
        chunk: usize,
        cut: bool,
    },
    Copied {
        image: usize,
        slot: usize,
        content: Content,
    },
    Publish {
        image: usize,
        chunk: usize,
    },
    Stored {
        image: usize,
        slot: usize,
        cut: bool,
    },
    ReadArrives {
        reader: usize,
    },
    ReadStarts {
        reader: usize,
        chunk: usize,
    },
    ReadEnds {
        reader: usize,
        chunk: usize,
    },
    ImageArrive {
        writer: usize,
    },
    ImageSubmit {
        writer: usize,
        chunk: usize,
    },
    ImageLand {
        writer: usize,
        chunk: usize,
    },
    ImageAcknowledge {
        writer: usize,
    },
    Materialise {
        image: usize,
        chunk: usize,
        cut: bool,
    },
    CloseGate,
    Take,
    Crash,
    OrphanLands {
        writer: usize,
        chunk: usize,
    },
    OrphanImageLands {
        writer: usize,
        chunk: usize,
    },
    Recover,
}

impl Step {
    /// Nothing may depend on a crash to go on.
    pub fn is_crash(self) -> bool {
        matches!(
            self,
            Self::Crash
                | Self::BeginCopy { cut: true, .. }
                | Self::Stored { cut: true, .. }
                | Self::Materialise { cut: true, .. }
        )
    }
}

impl World {
    pub fn new(scenario: &Scenario) -> Self {
        let mut origin = [0; CHUNKS];
        origin[..scenario.chunks()].copy_from_slice(scenario.origin);
        let shared = Shared {
            state: [0; CHUNKS],
            slot: [0; CHUNKS],
            staging: [GARBAGE; SLOTS],
            storage: [[GARBAGE; LIVES]; CHUNKS],
        };
        Self {
            phase: Phase::Up,
            crashes: 0,
            taken: scenario.images as u8,
            origin,
            shared: [shared; IMAGES],
            process: Process::default(),
            kernel: Kernel::default(),
            clients: Clients::default(),
            instant: [origin; IMAGES],
            expected: [origin; IMAGES],
        }
    }

    pub fn images(&self) -> std::ops::Range<usize> {
        0..usize::from(self.taken)
    }

    /// Reads of the origin for `image` that are in flight on `chunk`.
    pub fn reads_of_origin(&self, readers: &[Read], image: usize, chunk: usize) -> usize {
        let reads = readers
            .iter()
            .zip(&self.process.reads)
            .filter(|(read, _)| read.image == image);
        reads
            .filter(|(_, reading)| reading.chunks[chunk] == ChunkRead::InOrigin)
            .count()
    }
}

/// The members of a set.
pub fn members(set: Set) -> impl Iterator<Item = usize> {
    (0..8).filter(move |index| set & 1 << index != 0)
}
