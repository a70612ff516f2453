// SPDX-License-Identifier: GPL-2.0-or-later
//! What the control side asks of a queue thread, and how: a box of letters and a bell that the ring listens to.
//!
//! Letters may allocate (they come at control time); nothing on the I/O path writes one.

use super::reading::Reading;
use super::{Engine, Image, Map, IMAGES};
use crate::cbt::{self, Geometry, Numbers};
use crate::mem::Shared;
use crate::pages::state;
use crate::snapshot::Cause;
use crate::sys::{self, Node};
use crate::ublk::queue::Queue;
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex};

/// The gate is closed and nothing is in flight.
#[derive(Clone, Copy, Debug)]
pub struct Closed {
    pub node: Node,
    /// Why the map cannot be trusted (bytes written behind the tracker); "": it can.
    pub suspicion: &'static str,
    /// Why the origin cannot be served at all; "": it can.
    pub broken: &'static str,
}

/// What changes at the instant of a take, prepared before it.
#[derive(Debug)]
pub struct Flip {
    pub image: Image,
    pub taken: Arc<Shared>,
    /// The new live map, when the window slides or a generation begins.
    pub live: Option<Arc<Shared>>,
    /// A new generation begins with this take: its name and how the origin is cut now.
    pub reset: Option<(String, Geometry)>,
}

/// What the flip came to.
#[derive(Debug)]
pub struct Flipped {
    pub map: Map,
    pub geometry: Geometry,
    pub table: Arc<Shared>,
    pub chunk_size: u64,
    pub chunk_count: u64,
}

pub enum Letter {
    Read(SyncSender<(Reading, Map, Geometry)>),
    Mark {
        /// Empty: all of it.
        ranges: Vec<(u64, u64)>,
        all: bool,
        answer: SyncSender<Result<u64, cbt::CbtError>>,
    },
    CloseGate(SyncSender<Closed>),
    OpenGate(SyncSender<()>),
    Flip(Box<Flip>, SyncSender<Flipped>),
    /// A new generation without a take; behind a closed gate as well.
    Reset {
        map: Map,
        geometry: Geometry,
        answer: SyncSender<()>,
    },
    /// The origin has grown; behind a closed gate. The maps are new and as long as `geometry` says.
    Grow {
        live: Arc<Shared>,
        taken: Arc<Shared>,
        geometry: Geometry,
        answer: SyncSender<()>,
    },
    /// Answered when nothing of the image is in flight any more.
    DropImage(String, SyncSender<()>),
    /// Serves a device that was added and not yet started; answered when all its requests are fetched, or with errno.
    Serve(Box<Queue>, SyncSender<Result<(), i32>>),
    /// Answered when no request of this device, which was stopped, is fetched any more.
    Unserve(u32, SyncSender<()>),
    /// The origin's I/O goes other ways now: neither its map nor its images can be trusted any more.
    Break(&'static str),
    /// Ends the queue thread, which serves no device any more; answered when it has ended.
    End(SyncSender<()>),
}

#[derive(Debug)]
pub struct Mailbox {
    letters: Mutex<VecDeque<Letter>>,
    bell: OwnedFd,
    /// Set by the queue thread when the origin broke (so that the maintenance thread need not ask each one).
    pub broken: AtomicBool,
    ended: AtomicBool,
}

impl std::fmt::Debug for Letter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("letter")
    }
}

impl Mailbox {
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            letters: Mutex::new(VecDeque::new()),
            bell: sys::event_fd()?,
            broken: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        })
    }

    pub fn fd(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// A letter to a queue thread that has ended is dropped: who waits for its answer hears so at once.
    pub fn post(&self, letter: Letter) {
        let mut letters = self.letters.lock().expect("no holder of this lock panics");
        if !self.ended() {
            letters.push_back(letter);
            sys::ring_bell(self.fd());
        }
    }

    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// By the queue thread, as the last thing it does.
    pub(super) fn close(&self) {
        let mut letters = self.letters.lock().expect("no holder of this lock panics");
        self.ended.store(true, Ordering::Release);
        letters.clear();
    }

    fn take(&self) -> Option<Letter> {
        self.letters.lock().expect("no holder of this lock panics").pop_front()
    }
}

impl Engine {
    pub(super) fn read_mail(&mut self) {
        let mailbox = Arc::clone(&self.setup.mailbox);
        while let Some(letter) = mailbox.take() {
            // A sender that stopped waiting (a timed-out take) has dropped its receiver; that is its own matter.
            match letter {
                Letter::Read(answer) => {
                    self.look_behind();
                    let _ = answer.send((self.reading(), self.setup.map.clone(), self.setup.geometry));
                }
                Letter::Mark { ranges, all, answer } => {
                    let _ = answer.send(self.mark_dirty(&ranges, all));
                }
                Letter::CloseGate(answer) => {
                    self.gate.closed = true;
                    self.gate.waiting = Some(answer);
                }
                Letter::OpenGate(answer) => {
                    self.gate.closed = false;
                    self.gate.waiting = None;
                    self.ready.append(&mut self.pieces, &mut self.gate.parked);
                    self.pending = u64::MAX;
                    let _ = answer.send(());
                }
                Letter::Flip(flip, answer) => {
                    let _ = answer.send(self.flip(*flip));
                }
                Letter::Reset { map, geometry, answer } => {
                    self.setup.map = map;
                    self.setup.geometry = geometry;
                    self.suspicion = "";
                    self.store_state();
                    let _ = answer.send(());
                }
                Letter::Grow {
                    live,
                    taken,
                    geometry,
                    answer,
                } => {
                    self.grow(live, taken, geometry);
                    let _ = answer.send(());
                }
                Letter::DropImage(id, answer) => self.leave_image(&id, answer),
                Letter::Serve(queue, answer) => self.serve(queue, answer),
                Letter::Unserve(device, answer) => self.unserve(device, answer),
                Letter::Break(reason) => self.give_up(reason),
                Letter::End(answer) => self.end(answer),
            }
        }
    }

    /// Tells who closed the gate that it is closed, once nothing is in flight.
    pub(super) fn report_closed(&mut self) {
        if !self.gate.closed || self.gate.in_flight > 0 {
            return;
        }
        let Some(waiting) = self.gate.waiting.take() else {
            return;
        };
        let node = self.look_behind();
        self.setup.origin.set_node(node);
        self.store_state();
        self.writes_unseen = false;
        state::set_written(self.state_words(), false);
        let _ = waiting.send(Closed {
            node,
            suspicion: self.suspicion,
            broken: self.broken.unwrap_or_default(),
        });
    }

    /// The instant of a take. The gate is closed: nobody writes the map but us.
    fn flip(&mut self, flip: Flip) -> Flipped {
        let Flip {
            mut image,
            taken,
            live,
            reset,
        } = flip;
        let map = &mut self.setup.map;
        if let Some((generation, geometry)) = reset {
            self.setup.geometry = geometry;
            self.suspicion = "";
            map.generation = generation;
            map.epoch += 1;
            map.numbers = Numbers::START;
            if let Some(live) = &live {
                map.live = Arc::clone(live);
                map.live_sequence += 1;
            }
        }
        // Numbers run out after four thousand million takes; the control side has asked before.
        let plan = map.numbers.after_take().expect("asked before the gate closed");
        let count = self.setup.geometry.block_count();
        if plan.slides {
            let live = live.expect("prepared for a slide");
            cbt::slide_into(map.live.bytes(0, count), live.bytes(0, count));
            cbt::slide_into(map.live.bytes(0, count), taken.bytes(0, count));
            map.live = live;
            map.live_sequence += 1;
        } else {
            // As `cbt::copy_into`, at the speed of memory: clients wait at the gate.
            taken.copy_from(&map.live);
        }
        map.numbers = plan.numbers;
        map.taken = Arc::clone(&taken);
        map.taken_base = plan.numbers.base();
        map.taken_sequence += 1;
        image.taken = taken;
        image.numbers = plan.numbers;
        image.generation.clone_from(&map.generation);
        image.geometry = self.setup.geometry;
        let flipped = Flipped {
            map: map.clone(),
            geometry: self.setup.geometry,
            table: Arc::clone(&image.table),
            chunk_size: image.chunk_size(),
            chunk_count: image.chunk_count(),
        };
        let place = self.images.iter().position(Option::is_none);
        self.images[place.expect("counted before the gate closed")] = Some(image);
        self.store_state();
        flipped
    }

    fn mark_dirty(&mut self, ranges: &[(u64, u64)], all: bool) -> Result<u64, cbt::CbtError> {
        let geometry = self.setup.geometry;
        cbt::validate_ranges(ranges, geometry.size())?;
        let map = &self.setup.map;
        let count = geometry.block_count();
        let (live, taken) = (map.live.bytes(0, count), map.taken.bytes(0, count));
        let (active, changes) = (map.numbers.byte_for_active(), map.numbers.byte_for_changes());
        let everything = std::iter::once((0, geometry.size())).filter(|_| all);
        let mut blocks = 0;
        for (offset, len) in ranges.iter().copied().chain(everything) {
            let range = geometry.blocks(offset, len);
            blocks += range.len() as u64;
            cbt::mark(live, range.clone(), active);
            cbt::mark(taken, range, changes);
            // What changed unseen shows through every image that has no copy of it.
            for image in self.images.iter().flatten() {
                let taken = image.taken.bytes(0, image.geometry.block_count());
                cbt::mark(
                    taken,
                    image.geometry.blocks(offset, len),
                    image.numbers.byte_for_changes(),
                );
            }
        }
        self.counters.marks += blocks;
        Ok(blocks)
    }

    fn leave_image(&mut self, id: &str, answer: SyncSender<()>) {
        let found = (0..IMAGES).find(|place| {
            self.images[*place]
                .as_ref()
                .is_some_and(|image| image.snapshot.id == id)
        });
        let Some(place) = found else {
            let _ = answer.send(());
            return;
        };
        if let Some(image) = &mut self.images[place] {
            image.leaving = Some(answer);
        }
        self.wake_image(place);
        for connection in 0..self.connections.len() {
            let mine = self.connections[connection]
                .as_ref()
                .is_some_and(|client| client.export == super::connection::Export::Image(place as u8));
            if mine {
                self.hang_up(connection);
            }
        }
        self.drop_image_if_unused(place);
    }

    pub(super) fn drop_image_if_unused(&mut self, place: usize) {
        if self.images[place].as_ref().is_none_or(|image| image.leaving.is_none()) {
            return;
        }
        // Pieces that still wait look for their image when they wake: it goes last.
        let used = self.image_is_shown(place)
            || self.pieces.iter().any(|piece| {
                usize::from(piece.image) == place
                    && matches!(piece.job, super::piece::Job::ImageRead | super::piece::Job::ImageWrite)
            });
        let Some(image) = &mut self.images[place] else {
            return;
        };
        if image.unused() && !used {
            if let Some(answer) = image.leaving.take() {
                self.images[place] = None;
                let _ = answer.send(());
            }
        }
    }

    fn give_up(&mut self, reason: &'static str) {
        self.break_origin(reason);
        for place in 0..IMAGES {
            self.fail_image(place, Cause::Detached, libc::ENODEV);
            self.wake_image(place);
        }
    }

    fn end(&mut self, answer: SyncSender<()>) {
        self.ending = Some(answer);
        for place in 0..IMAGES {
            self.fail_image(place, Cause::Detached, libc::ENODEV);
            if let Some(image) = &mut self.images[place] {
                let (nobody, _) = std::sync::mpsc::sync_channel(1);
                image.leaving.get_or_insert(nobody);
            }
            self.wake_image(place);
            self.drop_image_if_unused(place);
        }
        for place in 0..self.connections.len() {
            self.hang_up(place);
        }
        // Wakes the accept that is waiting, so that the thread can end.
        sys::shut_down(self.setup.listener.as_raw_fd());
    }
}
