// SPDX-License-Identifier: GPL-2.0-or-later
//! Makes a step happen, as an engine, a kernel or a crash would.

use crate::explore::{violation, Property, Violation};
use crate::rules::{life_of, offset, Model, Mutant};
use crate::world::{
    mix, ChunkRead, Content, ImageWriting, Kernel, Phase, Process, Reading, Request, Shared, Slot, Step, World,
    GARBAGE, LIVES,
};
use blksnap_datapath::cow::{BeforeImageWrite, Recovered, Source, State};

type Done = Result<(), Violation>;

impl Model {
    pub fn apply(&self, world: &mut World, step: Step) -> Done {
        match step {
            Step::Arrive { writer } => {
                if world.clients.sent & 1 << writer == 0 {
                    world.clients.sent |= 1 << writer;
                    world.clients.after[writer] = world.clients.acked;
                }
                world.process.writers[writer] = Request::Waiting;
            }
            Step::Submit { writer } => return self.submit(world, writer),
            Step::Land { writer, chunk } => {
                world.kernel.writes[writer] &= !(1 << chunk);
                self.land(world, writer, chunk);
            }
            Step::OrphanLands { writer, chunk } => {
                world.kernel.orphan_writes[writer] &= !(1 << chunk);
                self.land(world, writer, chunk);
            }
            Step::Acknowledge { writer } => {
                world.process.writers[writer] = Request::Idle;
                world.clients.acked |= 1 << writer;
            }
            Step::BeginCopy { image, chunk, cut } => self.begin_copy_step(world, image, chunk, cut),
            Step::Copied { image, slot, content } => self.copied_step(world, image, slot, content),
            Step::Publish { image, chunk } => {
                world.process.unpublished[image] &= !(1 << chunk);
                self.copied(world, image, chunk, false);
            }
            Step::Stored { image, slot, cut } => self.stored_step(world, image, slot, cut),
            Step::ReadArrives { reader } => {
                let image = self.scenario.readers[reader].image;
                world.process.reads[reader].running = true;
                world.process.reads[reader].at_arrival = world.expected[image];
            }
            Step::ReadStarts { reader, chunk } => return self.read_starts(world, reader, chunk),
            Step::ReadEnds { reader, chunk } => return self.read_ends(world, reader, chunk),
            Step::ImageArrive { writer } => {
                if world.clients.image_sent & 1 << writer == 0 {
                    world.clients.image_sent |= 1 << writer;
                    world.clients.image_after[writer] = world.clients.image_acked;
                }
                world.process.image_writes[writer].running = true;
            }
            Step::ImageSubmit { writer, chunk } => return self.image_submit(world, writer, chunk),
            Step::ImageLand { writer, chunk } => {
                world.kernel.image_writes[writer] &= !(1 << chunk);
                if world.process.image_writes[writer].running {
                    world.process.image_writes[writer].landed |= 1 << chunk;
                }
                self.image_land(world, writer, chunk);
            }
            Step::OrphanImageLands { writer, chunk } => {
                world.kernel.orphan_image_writes[writer] &= !(1 << chunk);
                self.image_land(world, writer, chunk);
            }
            Step::ImageAcknowledge { writer } => {
                world.process.image_writes[writer] = ImageWriting::default();
                world.clients.image_acked |= 1 << writer;
            }
            Step::Materialise { image, chunk, cut } => self.materialise_step(world, image, chunk, cut),
            Step::CloseGate => world.process.gate_closed = true,
            Step::Take => {
                let image = usize::from(world.taken);
                world.instant[image] = world.origin;
                world.expected[image] = world.origin;
                world.taken += 1;
                world.process.gate_closed = false;
            }
            Step::Crash => Self::crash(world),
            Step::Recover => return self.recover_step(world),
        }
        Ok(())
    }

    fn submit(&self, world: &mut World, writer: usize) -> Done {
        let write = &self.scenario.writers[writer];
        for image in world.images().filter(|_| self.check_submissions) {
            for chunk in write.chunks() {
                let state = self.state(world, image, chunk);
                let readers = world.reads_of_origin(self.scenario.readers, image, chunk);
                if matches!(state, State::None | State::Reading) || readers > 0 {
                    let what = format!(
                        "writer {writer} is submitted while chunk {chunk} of image {image} is {state:?} with {readers} readers"
                    );
                    return violation(Property::EarlyWrite, what);
                }
            }
        }
        world.process.writers[writer] = Request::Submitted;
        world.kernel.writes[writer] = write.set();
        Ok(())
    }

    fn land(&self, world: &mut World, writer: usize, chunk: usize) {
        let write = &self.scenario.writers[writer];
        world.origin[chunk] = mix(world.origin[chunk], write.content(), write.mask(chunk));
    }

    /// Lowest free slot of staging; the step is enabled only when there is one.
    fn take_slot(&self, world: &World, image: usize) -> usize {
        self.free_slot(world, image).expect("a free staging slot")
    }

    fn begin_copy_step(&self, world: &mut World, image: usize, chunk: usize, cut: bool) {
        let slot = self.take_slot(world, image);
        let before = world.shared[image];
        self.begin_copy(world, image, chunk, slot);
        let at_begin = world.origin[chunk];
        world.process.slots[image][slot] = Slot::Copying {
            chunk: chunk as u8,
            at_begin,
        };
        if cut {
            self.cut(world, image, &before);
        }
    }

    fn copied_step(&self, world: &mut World, image: usize, slot: usize, content: Content) {
        let Slot::Copying { chunk, .. } = world.process.slots[image][slot] else {
            unreachable!("only a slot that is being filled can be full");
        };
        let (chunk, zero) = (usize::from(chunk), content == 0);
        world.shared[image].staging[slot] = content;
        world.process.slots[image][slot] = Slot::Storing { chunk: chunk as u8 };
        if self.is(Mutant::StateAfterSubmit) {
            world.process.unpublished[image] |= 1 << chunk;
            return;
        }
        self.copied(world, image, chunk, zero);
        if zero && !self.is(Mutant::StagingLeaksOnZero) {
            Self::free_slot_step(world, image, slot);
        } else if self.is(Mutant::DoneBeforeStored) {
            let place = self.place(world, chunk);
            self.stored(world, image, chunk, place);
        }
    }

    fn free_slot_step(world: &mut World, image: usize, slot: usize) {
        world.process.slots[image][slot] = Slot::Free;
        world.shared[image].staging[slot] = GARBAGE;
    }

    fn stored_step(&self, world: &mut World, image: usize, slot: usize, cut: bool) {
        let Slot::Storing { chunk } = world.process.slots[image][slot] else {
            unreachable!("only a slot that is being stored can be done");
        };
        let chunk = usize::from(chunk);
        let before = world.shared[image];
        world.shared[image].storage[chunk][usize::from(world.crashes)] = world.shared[image].staging[slot];
        if self.state(world, image, chunk) == State::Storing || !self.is(Mutant::DoneBeforeStored) {
            let place = self.place(world, chunk);
            self.stored(world, image, chunk, place);
        }
        Self::free_slot_step(world, image, slot);
        if cut {
            self.cut(world, image, &before);
        }
    }

    fn materialise_step(&self, world: &mut World, image: usize, chunk: usize, cut: bool) {
        let slot = self.take_slot(world, image);
        let before = world.shared[image];
        world.process.slots[image][slot] = Slot::Storing { chunk: chunk as u8 };
        if !self.is(Mutant::MaterialiseUnfilled) {
            world.shared[image].staging[slot] = 0;
        }
        self.materialise(world, image, chunk, slot);
        if cut {
            self.cut(world, image, &before);
        }
    }

    /// The process died after the call stored the slot and before it stored the state (`store_order` shows that order).
    fn cut(&self, world: &mut World, image: usize, before: &Shared) {
        if self.is(Mutant::StateBeforeSlot) {
            world.shared[image].slot = before.slot;
        } else {
            world.shared[image].state = before.state;
        }
        Self::crash(world);
    }

    fn read_starts(&self, world: &mut World, reader: usize, chunk: usize) -> Done {
        let image = self.scenario.readers[reader].image;
        let part = match self.source(world, image, chunk) {
            Source::Origin => {
                self.reader_began(world, image, chunk);
                ChunkRead::InOrigin
            }
            Source::AwaitCopy => unreachable!("a read that has to wait does not start"),
            Source::Staging(slot) => {
                let content = world.shared[image].staging[slot as usize];
                self.check_read(world, reader, chunk, content, "staging")?;
                ChunkRead::Got
            }
            Source::Storage(at) => match life_of(chunk, at) {
                Some(life) => ChunkRead::InStorage(life as u8),
                None => {
                    return violation(
                        Property::WrongAnswer,
                        format!("no place of chunk {chunk} is at {at:#x}"),
                    )
                }
            },
            Source::Zero => {
                self.check_read(world, reader, chunk, 0, "zero")?;
                ChunkRead::Got
            }
        };
        world.process.reads[reader].chunks[chunk] = part;
        self.finish_read(world, reader);
        Ok(())
    }

    fn read_ends(&self, world: &mut World, reader: usize, chunk: usize) -> Done {
        let image = self.scenario.readers[reader].image;
        let part = std::mem::replace(&mut world.process.reads[reader].chunks[chunk], ChunkRead::Got);
        if part == ChunkRead::InOrigin {
            let last = self.reader_ended(world, image, chunk);
            let others = world.reads_of_origin(self.scenario.readers, image, chunk);
            if last != (others == 0) {
                let what = format!("reader_ended says last: {last}, and {others} others read chunk {chunk}");
                return violation(Property::WrongAnswer, what);
            }
        }
        self.finish_read(world, reader);
        Ok(())
    }

    fn finish_read(&self, world: &mut World, reader: usize) {
        let all = self.scenario.readers[reader].chunks();
        if world.process.reads[reader].chunks[all]
            .iter()
            .all(|chunk| *chunk == ChunkRead::Got)
        {
            world.process.reads[reader] = Reading::default();
            world.clients.read |= 1 << reader;
        }
    }

    fn image_submit(&self, world: &mut World, writer: usize, chunk: usize) -> Done {
        let image = self.scenario.image_writers[writer].image;
        let BeforeImageWrite::Storage(at) = self.before_image_write(world, image, chunk) else {
            unreachable!("an image write that has to wait is not submitted");
        };
        let Some(life) = life_of(chunk, at) else {
            return violation(
                Property::WrongAnswer,
                format!("no place of chunk {chunk} is at {at:#x}"),
            );
        };
        world.kernel.image_writes[writer] |= 1 << chunk;
        world.kernel.image_places[writer][chunk] = life as u8;
        Ok(())
    }

    fn image_land(&self, world: &mut World, writer: usize, chunk: usize) {
        let image = self.scenario.image_writers[writer].image;
        let write = &self.scenario.image_writers[writer].write;
        let life = usize::from(world.kernel.image_places[writer][chunk]);
        let (content, mask) = (write.content(), write.mask(chunk));
        let place = &mut world.shared[image].storage[chunk][life];
        *place = mix(*place, content, mask);
        world.expected[image][chunk] = mix(world.expected[image][chunk], content, mask);
        if (world.kernel.image_writes[writer] | world.kernel.orphan_image_writes[writer]) & 1 << chunk == 0 {
            world.kernel.image_places[writer][chunk] = 0;
        }
    }

    /// The process is gone; what it had submitted is still on its way.
    fn crash(world: &mut World) {
        world.process = Process::default();
        world.crashes += 1;
        world.phase = Phase::Down(0);
        for (orphans, pending) in world.kernel.orphan_writes.iter_mut().zip(&mut world.kernel.writes) {
            *orphans |= std::mem::take(pending);
        }
        for (orphans, pending) in world
            .kernel
            .orphan_image_writes
            .iter_mut()
            .zip(&mut world.kernel.image_writes)
        {
            *orphans |= std::mem::take(pending);
        }
    }

    /// Recovers the next chunk; after the last one the new process serves.
    fn recover_step(&self, world: &mut World) -> Done {
        let Phase::Down(count) = world.phase else {
            unreachable!("only what died recovers")
        };
        let (image, chunk) = (
            usize::from(count) / self.scenario.chunks(),
            usize::from(count) % self.scenario.chunks(),
        );
        if image < world.images().end {
            if let Recovered::Store(slot) = self.recover(world, image, chunk) {
                let slot = slot as usize;
                if slot >= self.scenario.slots || world.process.slots[image][slot] != Slot::Free {
                    let what = format!("chunk {chunk} of image {image} is to be stored from slot {slot:#x}");
                    return violation(Property::WrongAnswer, what);
                }
                world.process.slots[image][slot] = Slot::Storing { chunk: chunk as u8 };
            }
            world.phase = Phase::Down(count + 1);
            return Ok(());
        }
        world.phase = Phase::Up;
        if !self.is(Mutant::OrphansOutliveRecovery) {
            world.kernel = Kernel::default();
        }
        self.forget_unused(world);
        Ok(())
    }

    /// Staging and storage that no chunk refers to will be given to others.
    fn forget_unused(&self, world: &mut World) {
        for image in world.images() {
            for slot in 0..self.scenario.slots {
                if world.process.slots[image][slot] == Slot::Free {
                    world.shared[image].staging[slot] = GARBAGE;
                }
            }
            for chunk in 0..self.scenario.chunks() {
                let source = self.peek_source(world, image, chunk);
                for life in (0..LIVES).filter(|&life| source != Source::Storage(offset(chunk, life))) {
                    world.shared[image].storage[chunk][life] = GARBAGE;
                }
            }
        }
    }
}
