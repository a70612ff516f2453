// SPDX-License-Identifier: GPL-2.0-or-later
//! What must hold in each state of a world.

use crate::explore::{violation, Property, Violation};
use crate::rules::{life_of, Model};
use crate::world::{ChunkRead, Content, ImageWriting, Phase, Reading, Request, Set, Slot, World, Write, HIGH, LOW};
use blksnap_datapath::cow::Source;

type Checked = Result<(), Violation>;

impl Model {
    /// Properties 1 and 3 (and 2, in the last states).
    pub fn check(&self, world: &World) -> Checked {
        let clients = &world.clients;
        let writes: Vec<(usize, &Write)> = self.scenario.writers.iter().enumerate().collect();
        check_writes(
            "origin",
            self.scenario.origin,
            &world.origin,
            &writes,
            clients.acked,
            &clients.after,
        )?;
        for image in world.images() {
            let all = self.scenario.image_writers.iter().enumerate();
            let writes: Vec<(usize, &Write)> = all
                .filter(|(_, write)| write.image == image)
                .map(|(index, write)| (index, &write.write))
                .collect();
            let count = self.scenario.chunks();
            let (before, now) = (&world.instant[image][..count], &world.expected[image]);
            check_writes("image", before, now, &writes, clients.image_acked, &clients.image_after)?;
        }
        // A process that has not recovered answers nobody.
        if world.phase == Phase::Up {
            self.check_sources(world)?;
            self.check_reads(world)?;
        }
        Ok(())
    }

    /// A read of any chunk of any image that takes no time.
    fn check_sources(&self, world: &World) -> Checked {
        for image in world.images() {
            let shared = &world.shared[image];
            for chunk in 0..self.scenario.chunks() {
                let source = self.peek_source(world, image, chunk);
                let content = match source {
                    Source::AwaitCopy => continue,
                    Source::Origin => Some(world.origin[chunk]),
                    Source::Staging(slot) => shared.staging[..self.scenario.slots].get(slot as usize).copied(),
                    Source::Storage(at) => life_of(chunk, at).map(|life| shared.storage[chunk][life]),
                    Source::Zero => Some(0),
                };
                let expected = world.expected[image][chunk];
                match content {
                    Some(content) if content == expected => {}
                    Some(content) => {
                        let what = format!(
                            "chunk {chunk} of image {image} is {content:02x} in {source:?}, not {expected:02x}"
                        );
                        return violation(Property::ImageBytes, what);
                    }
                    None => {
                        let what = format!("chunk {chunk} of image {image} is said to be in {source:?}");
                        return violation(Property::WrongAnswer, what);
                    }
                }
            }
        }
        Ok(())
    }

    /// An image read in flight may see what is there at any moment until it ends.
    fn check_reads(&self, world: &World) -> Checked {
        for (reader, read) in self.scenario.readers.iter().enumerate() {
            for chunk in read.chunks() {
                match world.process.reads[reader].chunks[chunk] {
                    ChunkRead::InOrigin => self.check_read(world, reader, chunk, world.origin[chunk], "the origin")?,
                    ChunkRead::InStorage(life) => {
                        let content = world.shared[read.image].storage[chunk][usize::from(life)];
                        self.check_read(world, reader, chunk, content, "the storage")?;
                    }
                    ChunkRead::Waiting | ChunkRead::Got => {}
                }
            }
        }
        Ok(())
    }

    /// A read may return what the image held when it arrived or what it holds now (image writes may overtake a read).
    pub fn check_read(&self, world: &World, reader: usize, chunk: usize, content: Content, source: &str) -> Checked {
        let image = self.scenario.readers[reader].image;
        let (before, now) = (
            world.process.reads[reader].at_arrival[chunk],
            world.expected[image][chunk],
        );
        let legal = |mask: u8| content & mask == before & mask || content & mask == now & mask;
        if legal(LOW) && legal(HIGH) {
            return Ok(());
        }
        let what = format!(
            "reader {reader} gets {content:02x} from {source} for chunk {chunk} of image {image}, not {before:02x} or {now:02x}"
        );
        violation(Property::ImageBytes, what)
    }

    /// Property 4, for a world in which no step but a crash is left.
    pub fn check_complete(&self, world: &World) -> Checked {
        let all = |count: usize| (1u16 << count) as Set - 1;
        let process = &world.process;
        let held = self.scenario.images + self.scenario.takes;
        let done = world.phase == Phase::Up
            && world.clients.acked == all(self.scenario.writers.len())
            && world.clients.read == all(self.scenario.readers.len())
            && world.clients.image_acked == all(self.scenario.image_writers.len())
            && usize::from(world.taken) == held
            && !process.gate_closed
            && process.writers.iter().all(|writer| *writer == Request::Idle)
            && process.reads.iter().all(|read| *read == Reading::default())
            && process
                .image_writes
                .iter()
                .all(|write| *write == ImageWriting::default())
            && process.slots.iter().flatten().all(|slot| *slot == Slot::Free)
            && process.readers.iter().flatten().all(|count| *count == 0);
        if done {
            return Ok(());
        }
        violation(Property::Stuck, "nothing can happen any more, and not all is done")
    }
}

/// Property 3: each half holds what one of `writes` or nobody put there, and no acknowledged write is missing.
///
/// `after[w]`: who was acknowledged before `w` was sent, and must therefore not show through it.
fn check_writes(
    what: &str,
    before: &[Content],
    now: &[Content],
    writes: &[(usize, &Write)],
    acked: Set,
    after: &[Set],
) -> Checked {
    for (chunk, &before) in before.iter().enumerate() {
        for mask in [LOW, HIGH] {
            let here = || writes.iter().filter(|(_, write)| write.mask(chunk) & mask != 0);
            let replaced = |by: Set| here().any(|(later, _)| acked & 1 << later != 0 && after[*later] & by == by);
            let content = now[chunk] & mask;
            let of_writer = here().any(|(writer, write)| content == write.content() & mask && !replaced(1 << writer));
            // The empty set is in every `after`: any acknowledged write replaces what was there before.
            if !of_writer && (content != before & mask || replaced(0)) {
                let what = format!(
                    "chunk {chunk} of the {what} holds {:02x}: an acknowledged write is lost",
                    now[chunk]
                );
                return violation(Property::LostWrite, what);
            }
        }
    }
    Ok(())
}
