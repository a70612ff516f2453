// SPDX-License-Identifier: GPL-2.0-or-later
//! What can happen next in a world, and how far it has come.
//!
//! Finer than an engine: what an engine does in one go (ask, begin copies, submit) is several steps here, in any order
//! that the rules allow, so that a crash can come between them.

use crate::rules::{Model, Mutant};
use crate::world::{members, mix, ChunkRead, Phase, Request, Slot, Step, World, HIGH, LOW};
use blksnap_datapath::cow::{BeforeImageWrite, BeforeWrite, Source, State};

/// How far a chunk has come, by its state byte: NONE, READING, STORING, DONE, ZERO.
const PROGRESS_OF_STATE: [i64; 5] = [0, 2, 5, 6, 4];

impl Model {
    /// Appends all steps that `world` allows.
    pub fn steps(&self, world: &World, steps: &mut Vec<Step>) {
        if matches!(world.phase, Phase::Down(_)) || self.is(Mutant::OrphansOutliveRecovery) {
            Self::orphan_steps(world, steps);
        }
        if let Phase::Down(_) = world.phase {
            steps.push(Step::Recover);
        } else {
            self.writer_steps(world, steps);
            self.copy_steps(world, steps);
            self.reader_steps(world, steps);
            self.image_writer_steps(world, steps);
            self.take_steps(world, steps);
        }
        if self.may_crash(world) {
            steps.push(Step::Crash);
        }
    }

    fn may_crash(&self, world: &World) -> bool {
        world.crashes < self.scenario.crashes
    }

    pub fn free_slot(&self, world: &World, image: usize) -> Option<usize> {
        let early = self.is(Mutant::StagingFreedEarly);
        let free = |slot: &Slot| *slot == Slot::Free || early && matches!(slot, Slot::Storing { .. });
        world.process.slots[image][..self.scenario.slots].iter().position(free)
    }

    fn orphan_steps(world: &World, steps: &mut Vec<Step>) {
        for (writer, &set) in world.kernel.orphan_writes.iter().enumerate() {
            steps.extend(members(set).map(|chunk| Step::OrphanLands { writer, chunk }));
        }
        for (writer, &set) in world.kernel.orphan_image_writes.iter().enumerate() {
            steps.extend(members(set).map(|chunk| Step::OrphanImageLands { writer, chunk }));
        }
    }

    fn writer_steps(&self, world: &World, steps: &mut Vec<Step>) {
        for (writer, write) in self.scenario.writers.iter().enumerate() {
            let pending = world.kernel.writes[writer];
            steps.extend(members(pending).map(|chunk| Step::Land { writer, chunk }));
            if world.clients.acked & 1 << writer != 0 {
                continue;
            }
            match world.process.writers[writer] {
                Request::Idle if !world.process.gate_closed => steps.push(Step::Arrive { writer }),
                Request::Idle => {}
                Request::Waiting => {
                    let newest = world.images().len().saturating_sub(1);
                    let mut images = if self.is(Mutant::NewestImageOnly) {
                        newest..newest + 1
                    } else {
                        world.images()
                    };
                    if images.all(|image| self.all_go(world, image, write.chunks())) {
                        steps.push(Step::Submit { writer });
                    }
                }
                Request::Submitted if pending == 0 || self.is(Mutant::AcknowledgedEarly) => {
                    steps.push(Step::Acknowledge { writer });
                }
                Request::Submitted => {}
            }
        }
    }

    /// Whether a request that waits wants the old bytes of the chunk copied.
    fn copy_wanted(&self, world: &World, image: usize, chunk: usize) -> bool {
        let newest_only = self.is(Mutant::NewestImageOnly) && image + 1 != usize::from(world.taken);
        let by_writer = self
            .scenario
            .writers
            .iter()
            .zip(&world.process.writers)
            .any(|(write, request)| *request == Request::Waiting && write.mask(chunk) != 0 && !newest_only);
        if by_writer && self.before_write(world, image, chunk) == BeforeWrite::Copy {
            return true;
        }
        let by_image_writer = self.image_write_waits(world, image, chunk);
        by_image_writer && self.before_image_write(world, image, chunk) == BeforeImageWrite::Copy
    }

    /// Whether a write to the image has still to be submitted for the chunk.
    fn image_write_waits(&self, world: &World, image: usize, chunk: usize) -> bool {
        self.scenario
            .image_writers
            .iter()
            .enumerate()
            .any(|(writer, image_write)| {
                let writing = world.process.image_writes[writer];
                let submitted = (writing.landed | world.kernel.image_writes[writer]) & 1 << chunk != 0;
                writing.running && image_write.image == image && image_write.write.mask(chunk) != 0 && !submitted
            })
    }

    /// Of a mutant: a slot in use for a chunk that needs none.
    fn leaked(&self, world: &World, image: usize, chunk: usize) -> bool {
        self.is(Mutant::StagingLeaksOnZero) && self.state(world, image, chunk) == State::Zero
    }

    fn copy_steps(&self, world: &World, steps: &mut Vec<Step>) {
        let cuts = if self.may_crash(world) {
            &[false, true][..]
        } else {
            &[false]
        };
        for image in world.images() {
            if self.free_slot(world, image).is_some() {
                for chunk in 0..self.scenario.chunks() {
                    if self.copy_wanted(world, image, chunk) {
                        steps.extend(cuts.iter().map(|&cut| Step::BeginCopy { image, chunk, cut }));
                    }
                }
            }
            for (slot, holder) in world.process.slots[image].iter().enumerate() {
                match *holder {
                    Slot::Free => {}
                    Slot::Copying { chunk, at_begin } => {
                        let now = world.origin[usize::from(chunk)];
                        let halves = [now, at_begin, mix(now, at_begin, LOW), mix(now, at_begin, HIGH)];
                        for (index, &content) in halves.iter().enumerate() {
                            if !halves[..index].contains(&content) {
                                steps.push(Step::Copied { image, slot, content });
                            }
                        }
                    }
                    Slot::Storing { chunk } if world.process.unpublished[image] & 1 << chunk != 0 => {}
                    Slot::Storing { chunk } if self.leaked(world, image, usize::from(chunk)) => {}
                    Slot::Storing { .. } => steps.extend(cuts.iter().map(|&cut| Step::Stored { image, slot, cut })),
                }
            }
            steps.extend(members(world.process.unpublished[image]).filter_map(|chunk| {
                let waits = |(write, request): (&crate::world::Write, &Request)| {
                    *request == Request::Waiting && write.mask(chunk) != 0
                };
                let waiting = self.scenario.writers.iter().zip(&world.process.writers).any(waits);
                (!waiting).then_some(Step::Publish { image, chunk })
            }));
        }
    }

    fn reader_steps(&self, world: &World, steps: &mut Vec<Step>) {
        for (reader, read) in self.scenario.readers.iter().enumerate() {
            if world.clients.read & 1 << reader != 0 || read.image >= world.images().end {
                continue;
            }
            let reading = &world.process.reads[reader];
            if !reading.running {
                steps.push(Step::ReadArrives { reader });
                continue;
            }
            for chunk in read.chunks() {
                match reading.chunks[chunk] {
                    ChunkRead::Waiting if self.source(world, read.image, chunk) != Source::AwaitCopy => {
                        steps.push(Step::ReadStarts { reader, chunk });
                    }
                    ChunkRead::InOrigin | ChunkRead::InStorage(_) => steps.push(Step::ReadEnds { reader, chunk }),
                    ChunkRead::Waiting | ChunkRead::Got => {}
                }
            }
        }
    }

    fn image_writer_steps(&self, world: &World, steps: &mut Vec<Step>) {
        for (writer, image_write) in self.scenario.image_writers.iter().enumerate() {
            let pending = world.kernel.image_writes[writer];
            let image = image_write.image;
            steps.extend(members(pending).map(|chunk| Step::ImageLand { writer, chunk }));
            if world.clients.image_acked & 1 << writer != 0 || image >= world.images().end {
                continue;
            }
            let writing = world.process.image_writes[writer];
            if !writing.running {
                steps.push(Step::ImageArrive { writer });
                continue;
            }
            let submitted = writing.landed | pending;
            for chunk in image_write.write.chunks().filter(|chunk| submitted & 1 << chunk == 0) {
                if let BeforeImageWrite::Storage(_) = self.before_image_write(world, image, chunk) {
                    steps.push(Step::ImageSubmit { writer, chunk });
                }
            }
            let landed = writing.landed == image_write.write.set();
            let early = self.is(Mutant::ImageAcknowledgedEarly) && submitted == image_write.write.set();
            if landed || early {
                steps.push(Step::ImageAcknowledge { writer });
            }
        }
        for image in world.images().filter(|&image| self.free_slot(world, image).is_some()) {
            for chunk in (0..self.scenario.chunks()).filter(|&chunk| self.image_write_waits(world, image, chunk)) {
                if self.before_image_write(world, image, chunk) == BeforeImageWrite::Materialise {
                    steps.push(Step::Materialise {
                        image,
                        chunk,
                        cut: false,
                    });
                    if self.may_crash(world) {
                        steps.push(Step::Materialise {
                            image,
                            chunk,
                            cut: true,
                        });
                    }
                }
            }
        }
    }

    fn take_steps(&self, world: &World, steps: &mut Vec<Step>) {
        if usize::from(world.taken) < self.scenario.images + self.scenario.takes {
            if !world.process.gate_closed {
                steps.push(Step::CloseGate);
            } else if !world.process.writers.contains(&Request::Submitted) || self.is(Mutant::TakeWithoutDrain) {
                steps.push(Step::Take);
            }
        }
    }

    /// A number that each step increases, as nothing but a crash may undo what was done and crashes are few.
    pub fn progress(&self, world: &World) -> i64 {
        let bits = |set: u8| i64::from(set.count_ones());
        let recovered = match world.phase {
            Phase::Up => (self.scenario.chunks() * usize::from(world.taken)) as i64 + 1,
            Phase::Down(count) => i64::from(count),
        };
        let mut sum = i64::from(world.crashes) * 100_000 + recovered * 1000 + i64::from(world.taken) * 50;
        sum += i64::from(world.process.gate_closed);
        sum += 20 * (bits(world.clients.acked) + bits(world.clients.read) + bits(world.clients.image_acked));
        for (write, (request, pending)) in self
            .scenario
            .writers
            .iter()
            .zip(world.process.writers.iter().zip(world.kernel.writes))
        {
            sum += match request {
                Request::Idle => 0,
                Request::Waiting => 1,
                Request::Submitted => 2 + bits(write.set()),
            } - bits(pending);
        }
        for reading in &world.process.reads {
            sum += i64::from(reading.running);
            sum += reading
                .chunks
                .iter()
                .map(|chunk| match chunk {
                    ChunkRead::Waiting => 0,
                    ChunkRead::InOrigin | ChunkRead::InStorage(_) => 1,
                    ChunkRead::Got => 2,
                })
                .sum::<i64>();
        }
        for (writing, pending) in world.process.image_writes.iter().zip(world.kernel.image_writes) {
            sum += i64::from(writing.running) + 2 * bits(writing.landed) + bits(pending);
        }
        sum -= world
            .kernel
            .orphan_writes
            .iter()
            .chain(&world.kernel.orphan_image_writes)
            .map(|&set| bits(set))
            .sum::<i64>();
        for image in world.images() {
            sum += bits(world.process.unpublished[image]);
            for chunk in 0..self.scenario.chunks() {
                sum += PROGRESS_OF_STATE[usize::from(world.shared[image].state[chunk])];
            }
        }
        sum
    }
}
