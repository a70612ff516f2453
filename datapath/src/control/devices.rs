// SPDX-License-Identifier: GPL-2.0-or-later
//! Block devices: made, found in use, stopped and forgotten. Every wait for the driver is here, on control threads.
//!
//! ```text
//!  ADD → parameters → open, map → Serve (the queue thread fetches) → START → a node in /dev
//!  fsync → STOP (the queue thread answers what is left) → Unserve → DEL
//! ```

use super::error::{Refusal, Result};
use super::registry::Origin;
use crate::engine::mail::Letter;
use crate::engine::ublk::{DEPTH, IMAGE_DEPTH};
use crate::engine::Front;
use crate::ublk::control::{open_char, unavailable, Control, NEEDED};
use crate::ublk::params::{Sysfs, IMAGE_MAX_IO};
use crate::ublk::queue::{Queue, Shows};
use crate::ublk::uapi::{flag, Params, BLOCK_PATH};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

/// What users of an origin see of it besides its socket.
#[derive(Clone, Debug, Default)]
pub struct Attachment {
    pub front: Front,
    /// The number of its ublk device.
    pub ublk_id: Option<u32>,
    /// What to mount or use; "": nothing but the socket.
    pub node: String,
    pub top: String,
    pub insert: String,
}

/// What a device is to be.
struct Plan {
    shows: Shows,
    params: Params,
    depth: u16,
    max_io: u32,
    /// Whether the driver copies the bytes of requests, instead of lending us their pages.
    copied: bool,
    flags: u64,
}

pub fn node_of(device: u32) -> String {
    format!("{BLOCK_PATH}{device}")
}

fn open() -> Result<Control> {
    Control::open().map_err(|error| Refusal::invalid_state(unavailable(&error)))
}

/// Refuses what ublk cannot stand before. `number`: the device's, 0 for a file.
pub fn check_fit(block: bool, number: u64) -> Result<()> {
    if !block {
        return Err(Refusal::invalid("a file has no block device; track it over NBD"));
    }
    match Sysfs::of(number).refusal() {
        Some(reason) => Err(Refusal::invalid(format!("the origin: {reason}"))),
        None => Ok(()),
    }
}

/// The device of an origin of `size` bytes; its number.
pub fn make_origin_device(origin: &Origin, size: u64, read_only: bool) -> Result<u32> {
    let mut control = open()?;
    let features = features(&mut control)?;
    let copied = features & flag::AUTO_BUF_REG == 0;
    let below = Sysfs::of(origin.identity.0);
    let max_io = below.max_io(copied);
    let wanted = flag::UPDATE_SIZE | flag::AUTO_BUF_REG;
    let plan = Plan {
        shows: Shows::Origin,
        params: below.params(size, read_only, max_io, copied),
        depth: DEPTH,
        max_io,
        copied,
        flags: NEEDED | features & wanted,
    };
    make(&mut control, origin, features, plan)
}

/// The device of the image that snapshot `id` has of an origin; its number.
pub fn make_image_device(origin: &Origin, id: &str, size: u64, writable: bool) -> Result<u32> {
    let mut control = open()?;
    let features = features(&mut control)?;
    let below = Sysfs::of(origin.identity.0);
    let plan = Plan {
        shows: Shows::Image(id.to_owned()),
        params: below.image_params(size, writable),
        depth: IMAGE_DEPTH,
        max_io: IMAGE_MAX_IO,
        // Its bytes come from staging, storage and origin by turns.
        copied: true,
        flags: NEEDED | features & flag::NO_AUTO_PART_SCAN,
    };
    make(&mut control, origin, features, plan)
}

fn features(control: &mut Control) -> Result<u64> {
    let features = control
        .features()
        .map_err(|error| Refusal::invalid_state(unavailable(&error)))?;
    if features & NEEDED != NEEDED {
        return Err(Refusal::invalid_state(
            "this kernel's ublk driver cannot be taken over (it needs 6.5 or later)",
        ));
    }
    Ok(features)
}

fn make(control: &mut Control, origin: &Origin, features: u64, plan: Plan) -> Result<u32> {
    let failed = |what: &str, error: &io::Error| Refusal::io(&format!("{what} of {}", origin.name), error);
    let info = control
        .add(plan.depth, plan.max_io, plan.flags)
        .map_err(|error| failed("a block device", &error))?;
    let device = info.dev_id;
    let made = make_added(control, origin, device, info.flags, &plan);
    match made {
        Ok(()) => {
            tune(device, plan.depth, features);
            Ok(device)
        }
        Err((what, error)) => {
            // Started or not: stopping ends what was fetched.
            let _ = control.stop(device);
            let _ = origin.ask(|answer| Letter::Unserve(device, answer));
            let _ = control.delete(device);
            Err(failed(what, &error))
        }
    }
}

type Failure = (&'static str, io::Error);

fn make_added(
    control: &mut Control,
    origin: &Origin,
    device: u32,
    flags: u64,
    plan: &Plan,
) -> std::result::Result<(), Failure> {
    if flags & plan.flags != plan.flags {
        let error = io::Error::other("the driver did not agree to all of them");
        return Err(("the features of the block device", error));
    }
    control
        .set_params(device, &plan.params)
        .map_err(|error| ("the parameters of the block device", error))?;
    serve(
        origin,
        device,
        plan.shows.clone(),
        plan.depth,
        if plan.copied { plan.max_io } else { 0 },
    )?;
    control
        .start(device)
        .map_err(|error| ("starting the block device", error))
}

/// Opens a device, maps its memory and has the queue thread fetch all its requests.
fn serve(origin: &Origin, device: u32, shows: Shows, depth: u16, buffer_len: u32) -> std::result::Result<(), Failure> {
    let queue = open_char(device)
        .and_then(|file| Queue::new(device, shows, depth, buffer_len, file))
        .map_err(|error| ("the queue of the block device", error))?;
    let served = origin.ask(|answer| Letter::Serve(Box::new(queue), answer));
    let served = served.map_err(|refusal| ("serving the block device", io::Error::other(refusal.message)))?;
    served.map_err(|errno| ("serving the block device", io::Error::from_raw_os_error(errno)))
}

/// No scheduler: the device below has one. And on kernels before 6.16 one request less than there are places: when a data
/// path dies that holds them all, those kernels never notice, and nobody can take the device over.
fn tune(device: u32, depth: u16, features: u64) {
    let queue = format!("/sys/block/ublkb{device}/queue");
    // Only speed depends on the first; the second is as old as blk-mq.
    let _ = fs::write(format!("{queue}/scheduler"), "none");
    if features & flag::UPDATE_SIZE == 0 {
        let _ = fs::write(format!("{queue}/nr_requests"), (depth - 1).to_string());
    }
}

/// Ends a device. `force`: also when somebody uses it, whose I/O then fails. Raised (busy) otherwise.
pub fn end_device(origin: &Origin, device: u32, force: bool) -> Result<()> {
    let node = node_of(device);
    let mut control = open()?;
    let held = claim(&node, force)?;
    if let Some(file) = &held {
        // The driver fails writes that come after STOP, those of the page cache among them.
        let flushed = file.sync_all();
        if let (Err(error), false) = (flushed, force) {
            return Err(Refusal::io(&format!("flushing {node}"), &error));
        }
    }
    control
        .stop(device)
        .map_err(|error| Refusal::io(&format!("stopping {node}"), &error))?;
    drop(held);
    origin.ask(|answer| Letter::Unserve(device, answer))?;
    control
        .delete(device)
        .map_err(|error| Refusal::io(&format!("removing {node}"), &error))
}

pub fn used(node: &str) -> Refusal {
    Refusal::busy(format!(
        "{node} is in use: it is mounted, or another device or program holds it"
    ))
}

/// Claims a node for ourselves, so that nobody mounts it any more. None: it is gone, or in use and `force`.
fn claim(node: &str, force: bool) -> Result<Option<File>> {
    let exclusive = |flags: i32| File::options().read(true).custom_flags(flags).open(node);
    match exclusive(libc::O_EXCL) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) && !force => Err(used(node)),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(exclusive(0).ok()),
        Err(_) => Ok(None),
    }
}

/// Whether a node is mounted or held by another device, as far as that is to be seen without opening it (which could
/// make somebody's mount fail). A program that has it open is not seen.
pub fn in_use(device: u32) -> bool {
    let directory = format!("/sys/block/ublkb{device}");
    let held = fs::read_dir(format!("{directory}/holders")).is_ok_and(|mut holders| holders.next().is_some());
    held || fs::read_to_string(format!("{directory}/dev")).is_ok_and(|number| is_mounted(number.trim()))
}

/// `number`: as "259:3".
fn is_mounted(number: &str) -> bool {
    // Ours, and that of everybody: we may run in a mount namespace of our own.
    ["/proc/self/mountinfo", "/proc/1/mountinfo"].iter().any(|path| {
        let text = fs::read_to_string(path).unwrap_or_default();
        // The third field is the device's number.
        text.lines().any(|line| line.split(' ').nth(2) == Some(number))
    })
}
