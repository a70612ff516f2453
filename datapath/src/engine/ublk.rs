// SPDX-License-Identifier: GPL-2.0-or-later
//! The block devices that an engine serves: its origin's, and one for each image that has one. A request is one piece.
//!
//! ```text
//!  FETCH ──request──▶ piece ──finish──▶ COMMIT_AND_FETCH ──request──▶ …
//!    └──ENODEV (the device was stopped): the place is never fetched again
//! ```
//!
//! Only the queue thread fetches and commits (the driver takes a queue's commands from one thread). Making, starting,
//! stopping and forgetting devices is for control threads (`control::devices`): those wait for this one.

use super::connection::CONNECTIONS;
use super::piece::{Job, Piece, PieceId, PIECES};
use super::{Engine, IMAGES};
use crate::ring::{Kind, Served, Token};
use crate::sys::process::without_admin;
use crate::ublk::queue::{Queue, Shows};
use crate::ublk::uapi::{self, op, IoCommand, OP_FUA, SECTOR};
use std::sync::mpsc::SyncSender;

/// Requests of one device at a time.
pub const DEPTH: u16 = 64;
/// Requests of an image's device at a time.
pub const IMAGE_DEPTH: u16 = 32;
/// Devices that show the origin: one, and for a moment its successor.
pub const ORIGINS: usize = 2;
pub const DEVICES: usize = ORIGINS + IMAGES;
/// Pieces before this one are those of connections.
const FIRST: usize = CONNECTIONS * PIECES;
/// Pieces of all devices.
pub const REQUESTS: usize = DEVICES * DEPTH as usize;

pub struct Device {
    queue: Box<Queue>,
    served: Served,
    /// Place of the image that it shows.
    pub image: Option<u8>,
    /// Requests that are fetched or under way; the others have ended.
    open: u16,
    /// Told once all requests are fetched, or which error the driver gave.
    serving: Option<SyncSender<Result<(), i32>>>,
    refused: i32,
    /// Told when the driver has ended all requests.
    leaving: Option<SyncSender<()>>,
}

/// Whether a piece is a device's and not a connection's.
pub fn is_request(id: PieceId) -> bool {
    id as usize >= FIRST
}

/// The device and the tag of a piece, or of a token.
fn split(request: usize) -> (usize, u16) {
    (request / usize::from(DEPTH), (request % usize::from(DEPTH)) as u16)
}

impl Engine {
    /// Begins to serve a device: all its requests are fetched in one go. Errors are errno.
    pub(super) fn serve(&mut self, queue: Box<Queue>, answer: SyncSender<Result<(), i32>>) {
        match self.take_device(queue) {
            Err(errno) => {
                let _ = answer.send(Err(errno));
            }
            Ok(place) => {
                let device = self.devices[place].as_mut().expect("just taken");
                device.serving = Some(answer);
                let (depth, scanned) = (device.queue.depth, device.queue.scanned);
                device.open = depth;
                for tag in 0..depth {
                    self.command(place, tag, uapi::FETCH_REQ, 0);
                }
                // What the driver refuses has completed by then: `settle` answers with the turn's last completion.
                if scanned {
                    self.ring.submit().expect("io_uring_enter");
                } else {
                    without_admin(|| self.ring.submit().expect("io_uring_enter"));
                }
            }
        }
    }

    fn take_device(&mut self, queue: Box<Queue>) -> Result<usize, i32> {
        let (places, image) = match &queue.shows {
            Shows::Origin => (0..ORIGINS, None),
            Shows::Image(id) => {
                let found = (0..IMAGES).find(|place| self.images[*place].as_ref().is_some_and(|one| one.serves(id)));
                (ORIGINS..DEVICES, Some(found.ok_or(libc::ENOENT)? as u8))
            }
        };
        let place = places
            .into_iter()
            .find(|place| self.devices[*place].is_none())
            .ok_or(libc::EBUSY)?;
        let errno = |error: std::io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        if !std::mem::replace(&mut self.table_made, true) {
            let buffers = ORIGINS * usize::from(DEPTH);
            self.ring.make_table(buffers as u32).map_err(errno)?;
        }
        // Only the origin's: before 6.13 a file leaves the table only when all operations that began before it left have
        // ended, which fetches of the origin's device never do. Images need it less: who takes over takes the origin's
        // device first, which the ring holds until every operation of its thread has ended.
        let served = match image {
            None => {
                self.ring.register_file(place as u32, Some(queue.fd())).map_err(errno)?;
                Served::Registered(place as u32)
            }
            Some(_) => Served::Plain(queue.fd()),
        };
        self.devices[place] = Some(Device {
            queue,
            served,
            image,
            open: 0,
            serving: None,
            refused: 0,
            leaving: None,
        });
        Ok(place)
    }

    /// Gives a request back with its result, unless it is the first time, and asks for the next.
    fn command(&mut self, place: usize, tag: u16, number: u32, result: i32) {
        let device = self.devices[place].as_ref().expect("asked by the caller");
        let index = place * usize::from(DEPTH) + usize::from(tag);
        let buffer = device.queue.buffer(tag);
        let body = IoCommand {
            queue_id: 0,
            tag,
            result,
            addr: buffer.map_or(0, |span| span.as_ptr() as u64),
        };
        let fixed = buffer.is_none().then_some(index as u16);
        let token = Token::new(Kind::Request, index as u32);
        self.ring.ublk(device.served, number, body.bytes(), fixed, token);
    }

    /// The driver has a request, or wants a place back.
    pub(super) fn request_arrived(&mut self, index: usize, result: i32) {
        let (place, tag) = split(index);
        let device = self.devices[place].as_mut().expect("its commands keep a device");
        match result {
            uapi::RESULT_OK => self.begin_request_of(place, tag),
            uapi::RESULT_ABORT => device.open -= 1,
            // Not yet started: whoever wants it served hears of it.
            error if device.serving.is_some() => {
                device.open -= 1;
                device.refused = error;
            }
            // Nobody else can answer this request, and the driver waits for ever: a new process takes over.
            error => panic!("ublk device {}, request {tag}: {error}", device.queue.device),
        }
    }

    fn begin_request_of(&mut self, place: usize, tag: u16) {
        let device = self.devices[place].as_ref().expect("asked by the caller");
        let asked = device.queue.descriptor(tag);
        let id = (FIRST + place * usize::from(DEPTH) + usize::from(tag)) as PieceId;
        let buffer = device.queue.buffer(tag);
        let (image, size, writable) = match device.image {
            None => (0, self.setup.geometry.size(), !self.setup.origin.read_only),
            Some(image) => {
                let shown = self.images[usize::from(image)].as_ref();
                (
                    image,
                    shown.map_or(0, |image| image.size),
                    shown.is_some_and(|image| image.writable),
                )
            }
        };
        let of_image = device.image.is_some();
        let operation = asked.op_flags as u8;
        let (offset, len) = match operation {
            // It has no place; what stands there is no sector (blk_flush_init_rq).
            op::FLUSH => (0, 0),
            _ => (
                asked.first_sector.saturating_mul(SECTOR),
                u64::from(asked.sectors) * SECTOR,
            ),
        };
        let job = match (operation, of_image) {
            (op::READ, false) => Ok(Job::Read),
            (op::READ, true) => Ok(Job::ImageRead),
            (op::WRITE | op::DISCARD, _) if !writable => Err(libc::EPERM),
            (op::WRITE, false) => Ok(Job::Write),
            (op::WRITE, true) => Ok(Job::ImageWrite),
            (op::DISCARD, false) => Ok(Job::Trim),
            (op::FLUSH, false) => Ok(Job::Flush),
            // What was written to an image is in its storage, which ends with the snapshot.
            (op::FLUSH, true) => Err(0),
            _ => Err(libc::EOPNOTSUPP),
        };
        self.pieces[id as usize] = Piece {
            job: job.unwrap_or(Job::Receive),
            image,
            dsync: asked.op_flags & OP_FUA != 0,
            offset,
            len,
            buffer: buffer.map(|span| span.at(0, if moves(operation) { len as usize } else { 0 })),
            fixed: buffer
                .is_none()
                .then_some((place * usize::from(DEPTH) + usize::from(tag)) as u16),
            ..Piece::IDLE
        };
        match job {
            Err(errno) => self.fail_piece(id, errno),
            // The driver keeps requests inside the device, which is never larger than what we know.
            Ok(_) if offset.checked_add(len).is_none_or(|end| end > size) => self.fail_piece(id, libc::EIO),
            Ok(_) => self.go_on(id),
        }
    }

    /// A request of a device is done: whole, or not at all.
    pub(super) fn finish_request(&mut self, id: PieceId) {
        let piece = std::mem::replace(&mut self.pieces[id as usize], Piece::IDLE);
        let result = match (piece.errno, piece.job) {
            (0, Job::Read | Job::Write | Job::ImageRead | Job::ImageWrite) => {
                // A shorter result would be taken for all of it (7.x) or asked again (6.12).
                assert_eq!(piece.done, piece.len);
                piece.len as i32
            }
            // Never a byte count: the driver would not take it for one.
            (0, _) => 0,
            (errno, _) => -errno,
        };
        let (place, tag) = split(id as usize - FIRST);
        self.command(place, tag, uapi::COMMIT_AND_FETCH_REQ, result);
    }

    /// Answered when the driver, which was told to stop the device, has ended all its requests.
    pub(super) fn unserve(&mut self, number: u32, answer: SyncSender<()>) {
        let found = self.devices.iter_mut().flatten();
        match found.into_iter().find(|device| device.queue.device == number) {
            Some(device) => device.leaving = Some(answer),
            None => {
                let _ = answer.send(());
            }
        }
    }

    /// Answers those who wait for a device to be served or to end.
    pub(super) fn settle_devices(&mut self) {
        for place in 0..DEVICES {
            let Some(device) = &mut self.devices[place] else {
                continue;
            };
            if let Some(answer) = device.serving.take() {
                let _ = answer.send(match device.refused {
                    0 => Ok(()),
                    error => Err(-error),
                });
            }
            if device.open == 0 {
                if let Some(answer) = device.leaving.take() {
                    if let Served::Registered(place) = device.served {
                        // Fails only for a place that does not exist.
                        self.ring.register_file(place, None).expect("a registered file");
                    }
                    self.devices[place] = None;
                    let _ = answer.send(());
                }
            }
        }
    }

    /// Whether a device shows this image.
    pub(super) fn image_is_shown(&self, image: usize) -> bool {
        let mut devices = self.devices.iter().flatten();
        devices.any(|device| device.image.is_some_and(|shown| usize::from(shown) == image))
    }
}

/// Whether an operation comes with bytes, or wants some.
fn moves(operation: u8) -> bool {
    matches!(operation, op::READ | op::WRITE)
}
