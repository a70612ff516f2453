// SPDX-License-Identifier: GPL-2.0-or-later
//! What an engine exports, and block status: which bytes are holes, which changed since a number.

use super::connection::{Export, Reply};
use super::piece::{Job, PIECES};
use super::{Engine, Front, IMAGES};
use crate::cbt::{Geometry, Numbers};
use crate::cow::State;
use crate::mem::{Shared, Span};
use crate::nbd::negotiate::{Context, ExportInfo, Exports, MAX_CONTEXTS};
use crate::nbd::proto::{self, export, flag, state, Header};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::Arc;

/// Extents of one answer; the client asks again for the rest.
const EXTENTS: usize = 1024;
const ROOM: usize = 4 + 8 * EXTENTS;

impl Exports for Engine {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        if name.is_empty() {
            return self.export_info(Export::Origin);
        }
        let served = |place: &usize| self.images[*place].as_ref().is_some_and(|image| image.serves(name));
        (0..IMAGES)
            .find(served)
            .and_then(|place| self.export_info(Export::Image(place as u8)))
    }

    fn names(&self) -> Vec<String> {
        let images = self.images.iter().flatten();
        let served = images.filter(|image| image.leaving.is_none());
        std::iter::once(String::new())
            .chain(served.map(|image| image.snapshot.id.clone()))
            .collect()
    }

    fn since(&self, key: usize, number: u32) -> bool {
        self.numbers_of(key)
            .is_some_and(|(_, numbers, _)| numbers.threshold(number).is_ok())
    }
}

impl Engine {
    /// What the client of an export may do; None when the image is gone.
    pub(super) fn export_info(&self, which: Export) -> Option<ExportInfo> {
        let node = self.setup.origin.node();
        let common = export::HAS_FLAGS | export::CAN_MULTI_CONN | export::SEND_FLUSH;
        let (key, size, flags, description) = match which {
            Export::Origin => {
                let changes = export::SEND_FUA | export::SEND_TRIM | export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO;
                // Who uses the block device must not find it changed by somebody else.
                let flags = if self.setup.origin.read_only || self.setup.front == Front::Ublk {
                    export::READ_ONLY
                } else {
                    changes
                };
                (0, self.setup.geometry.size(), flags, self.setup.label.clone())
            }
            Export::Image(place) => {
                let image = self.images[usize::from(place)].as_ref()?;
                if image.leaving.is_some() {
                    return None;
                }
                let flags = if image.writable { 0 } else { export::READ_ONLY };
                let text = format!("{} as of snapshot {}", self.setup.label, image.numbers.changes());
                (usize::from(place) + 1, image.size, flags, text)
            }
        };
        Some(ExportInfo {
            key,
            size,
            flags: common | flags,
            minimum_block: node.logical_block_size,
            description,
        })
    }

    /// Whether reads of the export can succeed at all.
    pub(super) fn readable(&self, which: Export) -> bool {
        self.broken.is_none()
            && match which {
                Export::Origin => true,
                Export::Image(place) => self.images[usize::from(place)]
                    .as_ref()
                    .is_some_and(|image| !image.failed()),
            }
    }

    fn numbers_of(&self, key: usize) -> Option<(Geometry, Numbers, &Arc<Shared>)> {
        let Some(place) = key.checked_sub(1) else {
            return Some((self.setup.geometry, self.setup.map.numbers, &self.setup.map.live));
        };
        let image = self.images.get(place)?.as_ref()?;
        Some((image.geometry, image.numbers, &image.taken))
    }

    /// Answers a block status request at once; `accepts` has seen to a free piece.
    pub(super) fn block_status(&mut self, place: usize, asked: proto::Request) -> bool {
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        let (within, buffer) = connection.take_piece().expect("`accepts` was asked before");
        let id = (place * PIECES) as u32 + within;
        let which = connection.export;
        let epoch = connection.epoch;
        let count = connection.contexts.len();
        let mut contexts = [Context::Allocation; MAX_CONTEXTS];
        contexts[..count].copy_from_slice(&connection.contexts);
        self.pieces[id as usize].job = Job::Receive;
        let end = asked.offset + u64::from(asked.length);
        let most = if asked.flags & flag::REQ_ONE != 0 { 1 } else { EXTENTS };
        for (number, context) in contexts[..count].iter().enumerate() {
            let mut extents = Extents {
                room: buffer.at(number * ROOM, ROOM),
                used: 4,
                most,
                at: asked.offset,
                last: None,
            };
            extents.room.copy_from(&(number as u32 + 1).to_be_bytes());
            match (context, which) {
                (Context::Allocation, Export::Origin) => self.origin_allocation(end, &mut extents),
                (Context::Allocation, Export::Image(image)) => {
                    self.image_allocation(usize::from(image), end, &mut extents);
                }
                (Context::Since(since), _) => self.changes(which, *since, epoch, end, &mut extents),
            }
            let done = number + 1 == count;
            let data = extents.finish();
            let connection = self.connections[place].as_mut().expect("asked by the caller");
            connection.reply(Reply {
                header: Some(Header::block_status(asked.cookie, done, data.len() as u32)),
                data: Some(data),
                piece: done.then_some(id),
            });
        }
        true
    }

    fn origin_allocation(&self, end: u64, extents: &mut Extents) {
        while extents.at < end && !extents.full() {
            let (next, hole) = self.setup.origin.extent(extents.at, end);
            extents.add(next, if hole { state::HOLE_AND_ZERO } else { state::DATA });
        }
    }

    /// A chunk that no write has touched is what the origin is there; a trim would have been skipped, and any write makes a
    /// copy first.
    fn image_allocation(&mut self, place: usize, end: u64, extents: &mut Extents) {
        while extents.at < end && !extents.full() {
            let image = self.images[place].as_ref().expect("refused when it is gone");
            let size = image.chunk_size();
            let chunk = extents.at / size;
            let kind = Kind::of(self.chunk_state(place, chunk));
            let mut next = chunk + 1;
            while next * size < end && Kind::of(self.chunk_state(place, next)) == kind {
                next += 1;
            }
            let next = (next * size).min(end);
            match kind {
                Kind::Zero => extents.add(next, state::HOLE_AND_ZERO),
                Kind::Data => extents.add(next, state::DATA),
                Kind::Origin => self.origin_allocation(next, extents),
            }
        }
    }

    fn changes(&self, which: Export, since: u32, epoch: u64, end: u64, extents: &mut Extents) {
        let key = match which {
            Export::Origin => 0,
            Export::Image(place) => usize::from(place) + 1,
        };
        let (geometry, numbers, map) = self.numbers_of(key).expect("refused when it is gone");
        // Agreed under another generation, or slid out of the window meanwhile: everything may have changed.
        let same = key > 0 || epoch == self.setup.map.epoch;
        let threshold = numbers.threshold(since).ok().filter(|_| same);
        let Some(threshold) = threshold else {
            return extents.add(end, proto::STATE_DIRTY);
        };
        let map: &[AtomicU8] = map.bytes(0, geometry.block_count());
        let size = geometry.block_size();
        while extents.at < end && !extents.full() {
            let block = extents.at / size;
            let dirty = |block: u64| map[block as usize].load(Ordering::Relaxed) > threshold;
            let first = dirty(block);
            let mut next = block + 1;
            while next * size < end && dirty(next) == first {
                next += 1;
            }
            extents.add((next * size).min(end), if first { proto::STATE_DIRTY } else { 0 });
        }
    }
}

/// What block status says of a chunk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// What the origin says.
    Origin,
    Data,
    Zero,
}

impl Kind {
    fn of(state: State) -> Self {
        match state {
            State::None => Self::Origin,
            State::Zero => Self::Zero,
            State::Reading | State::Storing | State::Done => Self::Data,
        }
    }
}

/// Extents in wire form: (length, flags) pairs behind the context's id; equal neighbours become one.
struct Extents {
    room: Span,
    used: usize,
    most: usize,
    at: u64,
    last: Option<(u32, u32)>,
}

impl Extents {
    fn full(&self) -> bool {
        self.used >= 4 + 8 * self.most
    }

    /// From the end of the one before to `next`.
    fn add(&mut self, next: u64, flags: u32) {
        let len = u32::try_from(next - self.at).expect("no longer than the request");
        self.at = next;
        if let Some((last, same)) = &mut self.last {
            if *same == flags {
                *last += len;
                return;
            }
        }
        self.flush();
        if self.full() {
            // What does not fit any more is asked for again.
            self.last = None;
            return;
        }
        self.last = Some((len, flags));
    }

    fn flush(&mut self) {
        if let Some((len, flags)) = self.last.take() {
            let place = self.room.at(self.used, 8);
            place.copy_from(&len.to_be_bytes());
            place.from(4).copy_from(&flags.to_be_bytes());
            self.used += 8;
        }
    }

    fn finish(mut self) -> Span {
        self.flush();
        self.room.at(0, self.used)
    }
}
