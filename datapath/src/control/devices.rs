// SPDX-License-Identifier: GPL-2.0-or-later
//! Block devices: made, grown, taken over after a death. How they end is in [`ends`](super::ends).
//!
//! ```text
//!  ADD → parameters → open, map → Serve (the queue thread fetches) → START → a node in /dev
//!  (after a death) START_USER_RECOVERY → open, map → Serve → END_USER_RECOVERY
//! ```

use super::ends::delete;
use super::errand::Errand;
use super::error::{Refusal, Result};
use super::node::{Device, Node};
use super::registry::{Origin, ANSWER_S};
use crate::engine::mail::Letter;
use crate::engine::ublk::{DEPTH, IMAGE_DEPTH};
use crate::engine::Front;
use crate::ublk::control::{open_char, unavailable, Control, NEEDED};
use crate::ublk::params::{Sysfs, IMAGE_MAX_IO};
use crate::ublk::queue::{Buffers, Queue, Shows};
use crate::ublk::stamp;
use crate::ublk::uapi::{flag, state, Params, BLOCK_PATH, SECTOR};
use crate::udev::{self, Role};
use std::fs;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long operations of a data path that has died may last.
const RECOVERY_S: u64 = 30;

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
    /// The device-mapper device over the ublk device.
    pub over: Option<Arc<Node>>,
}

/// What a device is to be.
struct Plan {
    shows: Shows,
    params: Params,
    depth: u16,
    max_io: u32,
    /// Whether the driver copies the bytes of requests, instead of lending us their pages.
    copied: bool,
    /// See [`Queue::scanned`].
    scanned: bool,
    flags: u64,
}

pub fn node_of(device: u32) -> String {
    format!("{BLOCK_PATH}{device}")
}

pub(super) fn open() -> Result<Control> {
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
        scanned: features & flag::NO_AUTO_PART_SCAN != 0,
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
        scanned: false,
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
    let stamp = stamp::stamp(origin.identity.0, plan.shows != Shows::Origin);
    let info = control
        .add(plan.depth, plan.max_io, plan.flags, stamp)
        .map_err(|error| failed("a block device", &error))?;
    let device = info.dev_id;
    announce(origin, device, &plan.shows);
    if let Err((what, error)) = ready(control, origin, device, info.flags, &plan) {
        let _ = origin.ask(|answer| Letter::Unserve(device, answer));
        let _ = delete(control, device);
        return Err(failed(what, &error));
    }
    start(origin, device)?;
    tune(device, plan.depth, features);
    Ok(device)
}

/// The block device appears. Raised (timed-out) when a disk holds that up; all is taken back as soon as it can be.
fn start(origin: &Origin, device: u32) -> Result<()> {
    let what = format!("starting a block device for {}", origin.name);
    let mut starting = Errand::Start(device).begin(what, None)?;
    let started = starting.wait(Some(Duration::from_secs(ANSWER_S)));
    let Err(refusal) = started else { return Ok(()) };
    let late = refusal.code == "timed-out";
    let queue = origin.clone();
    let mut undo = move || {
        if late {
            let _ = starting.wait(None);
        }
        // Started or not: stopping ends what was fetched.
        let stopped = Errand::Stop(device).begin(node_of(device), None);
        let _ = stopped.and_then(|mut stopping| stopping.wait(None));
        let _ = queue.ask(|answer| Letter::Unserve(device, answer));
        let _ = open().map(|mut control| delete(&mut control, device));
    };
    match late {
        false => undo(),
        // Until then the driver holds a lock on the device, and its requests need the queue thread.
        true => drop(
            std::thread::Builder::new()
                .name("undo".into())
                .stack_size(128 << 10)
                .spawn(undo),
        ),
    }
    Err(refusal)
}

/// Tells udev what a device is for, before it appears.
fn announce(origin: &Origin, device: u32, shows: &Shows) {
    let attachment = &origin.attachment;
    let below = udev::kernel_name(origin.identity.0).unwrap_or_default();
    let name = udev::dm_name(origin.identity.0).unwrap_or_else(|| below.clone());
    // Under a live device, that one is what users know as the origin.
    let live = Some(&attachment.insert).filter(|name| !name.is_empty());
    let origin = live.and_then(|name| udev::kernel_name_of_dm(name)).unwrap_or(below);
    let role = match shows {
        Shows::Image(snapshot) => Role::Image {
            origin: &origin,
            snapshot,
            name: live.unwrap_or(&name),
        },
        Shows::Origin if attachment.top.is_empty() && live.is_none() => Role::Node { origin: &origin },
        Shows::Origin => Role::Device { origin: &origin },
    };
    udev::say(&format!("ublkb{device}"), role);
}

type Failure = (&'static str, io::Error);

/// All before START.
fn ready(
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
    let buffers = Buffers::new(plan.depth, if plan.copied { plan.max_io } else { 0 })
        .map_err(|error| ("memory for the block device", error))?;
    serve(origin, device, plan.shows.clone(), (plan.depth, plan.scanned), buffers)
}

/// Opens a device, maps its memory and has the queue thread fetch all its requests.
fn serve(
    origin: &Origin,
    device: u32,
    shows: Shows,
    (depth, scanned): (u16, bool),
    buffers: Buffers,
) -> std::result::Result<(), Failure> {
    let queue = open_char(device)
        .and_then(|file| Queue::new(device, shows, depth, scanned, buffers, file))
        .map_err(|error| ("the queue of the block device", error))?;
    let served = origin.ask(|answer| Letter::Serve(Box::new(queue), answer));
    let served = served.map_err(|refusal| ("serving the block device", io::Error::other(refusal.message)))?;
    served.map_err(|errno| ("serving the block device", io::Error::from_raw_os_error(errno)))
}

/// Goes on serving the device of an origin whose data path has died: its engine runs again, with maps and images as they
/// were, and has done no I/O yet. Requests that the old process held come again.
///
/// To be done before [`recover_image_device`] of the same origin: that this succeeds means that every operation of the
/// old queue thread has ended (its ring held the device until then). Raised (not-found) when the device is gone or was
/// never started: [`forget_device`](super::ends::forget_device) it and make another; (timed-out) when old operations do not end.
pub fn recover_origin_device(origin: &Origin, device: u32) -> Result<()> {
    recover(origin, device, Shows::Origin)
}

/// As [`recover_origin_device`], for the device of the image that snapshot `id` has of it.
pub fn recover_image_device(origin: &Origin, device: u32, id: &str) -> Result<()> {
    recover(origin, device, Shows::Image(id.to_owned()))
}

fn recover(origin: &Origin, device: u32, shows: Shows) -> Result<()> {
    let node = node_of(device);
    let failed = |what: &str, error: &io::Error| Refusal::io(&format!("{what} ({node})"), error);
    let mut control = open()?;
    let features = features(&mut control)?;
    let info = control.info(device).map_err(|error| match error.raw_os_error() {
        Some(libc::ENODEV | libc::EINVAL) => Refusal::not_found(format!("{node} is gone")),
        _ => failed("asking for the block device", &error),
    })?;
    if info.state == state::DEAD {
        return Err(Refusal::not_found(format!("{node} was not in service")));
    }
    // Everything that can fail comes before the driver is told: some kernels take a second beginning amiss.
    let copied = info.flags & flag::AUTO_BUF_REG == 0;
    let buffers = Buffers::new(info.queue_depth, if copied { info.max_io_buf_bytes } else { 0 })
        .map_err(|error| failed("memory for the block device", &error))?;
    let end = Instant::now() + Duration::from_secs(RECOVERY_S);
    loop {
        match control.start_recovery(device) {
            Ok(()) => break,
            // The old process's operations have not all ended (EBUSY), or the driver has not seen its end (EINVAL too,
            // on 6.12, when one that recovered has died half-way).
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EINVAL)) => {
                if Instant::now() > end {
                    return Err(Refusal::timed_out(format!(
                        "{node}: the driver still waits for the old data path"
                    )));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(failed("taking over the block device", &error)),
        }
    }
    serve(origin, device, shows, (info.queue_depth, true), buffers).map_err(|(what, error)| failed(what, &error))?;
    control
        .end_recovery(device)
        .map_err(|error| failed("going on with the block device", &error))?;
    tune(device, info.queue_depth, features);
    Ok(())
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

/// Whether a device can be told another size (6.16).
pub fn can_grow(device: u32) -> Result<bool> {
    let info = open()?.info(device);
    let info = info.map_err(|error| Refusal::io(&format!("asking for {}", node_of(device)), &error))?;
    Ok(info.flags & flag::UPDATE_SIZE != 0)
}

/// The block device as it is now.
pub fn number_and_size(device: u32) -> io::Result<Device> {
    let read = |name: &str| fs::read_to_string(format!("/sys/block/ublkb{device}/{name}"));
    let number = |text: &str| -> Option<u64> {
        let (major, minor) = text.trim_end().split_once(':')?;
        Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
    };
    let (dev, size) = (read("dev")?, read("size")?);
    match (number(&dev), size.trim_end().parse::<u64>()) {
        (Some(number), Ok(sectors)) => Ok(Device {
            number,
            size: sectors * SECTOR,
        }),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Tells a device that it has `size` bytes now.
pub fn grow(device: u32, size: u64) -> Result<()> {
    let grown = open()?.update_size(device, size);
    grown.map_err(|error| Refusal::io(&format!("growing {}", node_of(device)), &error))
}
