// SPDX-License-Identifier: GPL-2.0-or-later
//! The queue thread of one origin: one ring, its clients, its map, its images. Nothing here is shared but by intent.
//!
//! A request's way, stop by stop: [`request`] cuts it into pieces → [`origin_io`] (gate, copies, mark, I/O) or
//! [`image_io`] → [`reply`]; one of a block device comes from and goes back to [`ublk`]. [`copies`] is copy-before-write, [`image`] an image's state, [`mail`] what the control side asks for.
//!
//! On the I/O path it allocates nothing, logs nothing and takes no lock; memory comes when a client connects or the
//! control side hands it in. An impossible state aborts the process (`panic = "abort"`): the service starts another.

mod behind;
mod connection;
mod copies;
mod extents;
mod image;
mod image_io;
pub mod mail;
mod origin_io;
mod payload;
mod piece;
pub mod reading;
mod reply;
mod request;
mod resume;
pub mod ublk;

use crate::cbt::{Geometry, Numbers};
use crate::mem::{Mapping, Shared, Span};
use crate::origin::Origin;
use crate::ring::{Kind, Ring, Token};
use crate::snapshot::{Bell, Cause, Failure};
use crate::sys;
use behind::Audit;
use connection::{Connection, Phase, CONNECTIONS, NEGOTIATION_S};
pub use image::Image;
use io_uring::types::Timespec;
use mail::Mailbox;
use piece::{List, Piece, PIECES, PIECE_LEN};
use reading::Counters;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::sync::Arc;
use ublk::{Device, DEVICES, REQUESTS};

/// Snapshots of one origin held at once.
pub const IMAGES: usize = 16;
/// Seconds a storage may owe a write before its snapshot is given up.
pub const STALL_S: u32 = 10;

/// Where the requests to an origin come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Front {
    /// Clients of its socket.
    #[default]
    Nbd,
    /// A block device.
    Ublk,
}

/// What an engine starts with.
pub struct Setup {
    pub handle: u32,
    pub name: String,
    pub label: String,
    pub socket: String,
    pub front: Front,
    pub origin: Origin,
    pub geometry: Geometry,
    pub tracking: bool,
    pub map: Map,
    pub listener: UnixListener,
    pub mailbox: Arc<Mailbox>,
    pub bell: Bell,
    /// Hangs up its pipe when the ring is gone.
    pub ring_held: OwnedFd,
    pub resumed: Resumed,
}

/// What the process before this one left, but for maps; the default for an origin that begins.
#[derive(Default)]
pub struct Resumed {
    pub images: Vec<Image>,
    pub suspicion: &'static str,
    /// "": it is not broken.
    pub broken: &'static str,
    /// Writes of its own may hide those of others.
    pub written: bool,
}

/// The change map and its numbers. Replaced as a whole, by the queue thread only.
#[derive(Clone, Debug)]
pub struct Map {
    pub live: Arc<Shared>,
    pub taken: Arc<Shared>,
    pub numbers: Numbers,
    pub taken_base: u32,
    pub generation: String,
    pub live_sequence: u64,
    pub taken_sequence: u64,
    /// Counts generations, for what was agreed under an older one.
    pub epoch: u64,
}

/// The gate that a take closes. Writes, zeroes and trims of the origin pass it; reads and flushes do not come by.
#[derive(Debug)]
struct Gate {
    closed: bool,
    /// Operations on the origin in the kernel's hands.
    in_flight: u32,
    parked: List,
    /// To be told when the gate is closed and nothing is in flight.
    waiting: Option<SyncSender<mail::Closed>>,
}

pub struct Engine {
    setup: Setup,
    state_page: Arc<Shared>,
    ring: Ring,
    second: Box<Timespec>,
    /// Zeros to write where no hole can be punched.
    zeros: Span,
    _zeros: Mapping,
    connections: Vec<Option<Connection>>,
    /// Those of the connections, then those of the devices.
    pieces: Vec<Piece>,
    devices: Vec<Option<Device>>,
    table_made: bool,
    images: Vec<Option<Image>>,
    gate: Gate,
    /// Pieces that can go on.
    ready: List,
    /// Pieces waiting for a free staging slot, and for image reads of the origin to end.
    staging_wait: List,
    readers_wait: List,
    /// Connections to look at before the next wait.
    pending: u64,
    counters: Counters,
    broken: Option<&'static str>,
    audit: Audit,
    /// Why the map cannot be trusted; stays until a new generation begins.
    suspicion: &'static str,
    /// Writes since the origin's mtime was last looked at.
    writes_unseen: bool,
    /// Set when the engine is to end: told when it has.
    ending: Option<SyncSender<()>>,
    accepting: bool,
}

impl Engine {
    /// On the thread that will run it.
    fn new(setup: Setup, state_page: Arc<Shared>) -> io::Result<Self> {
        sys::set_io_flusher();
        let mut ring = Ring::new(512)?;
        ring.hold(setup.ring_held.as_fd(), ublk::ORIGINS as u32)?;
        let audit = Audit::new(setup.origin.node());
        let zeros = Mapping::anonymous(PIECE_LEN)?;
        Ok(Self {
            setup,
            state_page,
            ring,
            second: Box::new(Timespec::new().sec(1)),
            zeros: zeros.span(0, PIECE_LEN),
            _zeros: zeros,
            connections: (0..CONNECTIONS).map(|_| None).collect(),
            pieces: vec![Piece::IDLE; CONNECTIONS * PIECES + REQUESTS],
            devices: (0..DEVICES).map(|_| None).collect(),
            table_made: false,
            images: (0..IMAGES).map(|_| None).collect(),
            gate: Gate {
                closed: false,
                in_flight: 0,
                parked: List::EMPTY,
                waiting: None,
            },
            ready: List::EMPTY,
            staging_wait: List::EMPTY,
            readers_wait: List::EMPTY,
            pending: 0,
            counters: Counters::default(),
            broken: None,
            audit,
            suspicion: "",
            writes_unseen: false,
            ending: None,
            accepting: false,
        })
    }

    /// Starts the queue thread; returns when its ring exists, or why it cannot.
    pub fn start(setup: Setup, state_page: Arc<Shared>) -> io::Result<()> {
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name(format!("o-{}", setup.name).chars().take(15).collect())
            .stack_size(256 << 10)
            .spawn(move || match Self::new(setup, state_page) {
                Ok(mut engine) => {
                    // The receiver waits for just this.
                    let _ = ready.send(Ok(()));
                    engine.run();
                    engine.setup.mailbox.close();
                    let ending = engine.ending.take();
                    // Before anybody hears of the end: the origin's descriptor holds a lock.
                    drop(engine);
                    if let Some(ending) = ending {
                        let _ = ending.send(());
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            })?;
        started.recv().map_err(io::Error::other)?
    }

    fn run(&mut self) {
        self.resume();
        self.store_state();
        self.listen();
        self.await_mail();
        self.ring.timeout(&raw const *self.second, Token::new(Kind::Tick, 0));
        loop {
            // A ring that cannot be entered cannot serve: abort (see the module's text).
            self.ring.wait().expect("io_uring_enter");
            while let Some((token, result)) = self.ring.reap() {
                self.complete(token, result);
            }
            self.settle();
            if self.ended() {
                return;
            }
        }
    }

    /// Runs everything that can go on without another completion.
    fn settle(&mut self) {
        loop {
            if let Some(id) = self.ready.pop(&self.pieces) {
                self.go_on(id);
            } else if self.pending != 0 {
                let place = self.pending.trailing_zeros() as usize;
                self.pending &= !(1 << place);
                self.attend(place);
            } else {
                break;
            }
        }
        self.report_closed();
        self.settle_devices();
        for place in 0..self.images.len() {
            self.drop_image_if_unused(place);
        }
    }

    fn complete(&mut self, token: Token, result: i32) {
        let index = token.index as usize;
        match token.kind {
            Kind::Accept => self.accepted(result),
            Kind::Mail => {
                sys::hear_bell(self.setup.mailbox.fd());
                self.read_mail();
                self.await_mail();
            }
            Kind::Tick => {
                self.tick();
                self.ring.timeout(&raw const *self.second, Token::new(Kind::Tick, 0));
            }
            Kind::Receive => self.received(index, result),
            Kind::Send => self.sent(index, result),
            Kind::Piece => self.piece_completed(token.index, result),
            Kind::Sync => self.synced(token.index, result),
            Kind::CopyRead => self.copy_read(index, result),
            Kind::CopyStore => self.copy_stored(index, result),
            Kind::Request => self.request_arrived(index, result),
        }
    }

    fn listen(&mut self) {
        if !self.accepting && self.ending.is_none() {
            self.accepting = true;
            self.ring
                .accept(self.setup.listener.as_raw_fd(), Token::new(Kind::Accept, 0));
        }
    }

    fn await_mail(&mut self) {
        self.ring.poll(self.setup.mailbox.fd(), Token::new(Kind::Mail, 0));
    }

    fn accepted(&mut self, result: i32) {
        self.accepting = false;
        if result >= 0 {
            let socket = sys::own(result);
            sys::send_buffer(socket.as_raw_fd(), 1 << 20);
            let free = self.connections.iter().position(Option::is_none);
            // No place, no memory, or ending: the client sees the socket closed.
            if let (Some(place), None, Ok(connection)) = (free, &self.ending, Connection::new(socket)) {
                self.connections[place] = Some(connection);
                self.pending |= 1 << place;
            }
        }
        // EMFILE and the like must not spin; the tick listens again.
        if result >= 0 {
            self.listen();
        }
    }

    fn tick(&mut self) {
        self.listen();
        for place in 0..self.connections.len() {
            let Some(connection) = &mut self.connections[place] else {
                continue;
            };
            if matches!(connection.phase, Phase::Negotiating(_)) {
                connection.seconds += 1;
                if connection.seconds > NEGOTIATION_S {
                    self.hang_up(place);
                }
            }
        }
        self.watch_origin();
        self.watch_storages();
    }

    /// A file may be cut behind our back at any time; a take would find it, but reads would see zeros until then.
    fn watch_origin(&mut self) {
        if self.broken.is_some() {
            return;
        }
        match self.setup.origin.stat() {
            Ok(now) if now.size >= self.setup.geometry.size() => {}
            Ok(_) => self.break_origin("the image file or device became smaller"),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                self.break_origin("the device is gone, or another medium is in it");
            }
            Err(_) => self.break_origin("the image file or device cannot be looked at any more"),
        }
    }

    fn break_origin(&mut self, reason: &'static str) {
        if self.broken.is_none() {
            self.broken = Some(reason);
            // In this order: who hears the bell looks at the flag once.
            self.setup.mailbox.broken.store(true, Ordering::Release);
            self.setup.bell.ring();
            self.store_state();
        }
    }

    /// Gives up snapshots whose storage owes a write for too long: the origin's writers may be waiting for its staging.
    fn watch_storages(&mut self) {
        for place in 0..self.images.len() {
            let Some(image) = &mut self.images[place] else {
                continue;
            };
            if image.stalled_for() > STALL_S && !image.failed() {
                self.fail_image(place, Cause::Stalled, libc::ETIMEDOUT);
            }
        }
    }

    fn fail_image(&mut self, place: usize, cause: Cause, errno: i32) {
        let Some(image) = &self.images[place] else {
            return;
        };
        image.snapshot.fail(Failure {
            cause,
            errno,
            origin: self.setup.handle,
        });
        self.wake_image(place);
    }

    fn ended(&self) -> bool {
        self.ending.is_some()
            && !self.accepting
            && self.connections.iter().all(Option::is_none)
            && self.images.iter().all(Option::is_none)
            && self.devices.iter().all(Option::is_none)
            && self.gate.in_flight == 0
    }
}
