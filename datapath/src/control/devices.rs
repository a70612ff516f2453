// SPDX-License-Identifier: GPL-2.0-or-later
//! Block devices: made, found in use, stopped and forgotten. Every wait for the driver is here, on control threads.
//!
//! ```text
//!  ADD → parameters → open, map → Serve (the queue thread fetches) → START → a node in /dev
//!  fsync → STOP (the queue thread answers what is left) → Unserve → DEL
//!  (after a death) START_USER_RECOVERY → open, map → Serve → END_USER_RECOVERY
//! ```

use super::error::{Refusal, Result};
use super::node::Node;
use super::registry::{Origin, ANSWER_S};
use crate::engine::mail::Letter;
use crate::engine::ublk::{DEPTH, IMAGE_DEPTH};
use crate::engine::Front;
use crate::ublk::control::{open_char, unavailable, Control, NEEDED};
use crate::ublk::params::{Sysfs, IMAGE_MAX_IO};
use crate::ublk::queue::{Buffers, Queue, Shows};
use crate::ublk::uapi::{flag, state, DeviceInfo, Params, BLOCK_PATH};
use crate::udev::{self, Role};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::mpsc::sync_channel;
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
    announce(origin, device, &plan.shows);
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
            let _ = delete(control, device);
            Err(failed(what, &error))
        }
    }
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

fn delete(control: &mut Control, device: u32) -> io::Result<()> {
    let deleted = control.delete(device);
    udev::forget(&format!("ublkb{device}"));
    deleted
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
    let buffers = Buffers::new(plan.depth, if plan.copied { plan.max_io } else { 0 })
        .map_err(|error| ("memory for the block device", error))?;
    serve(origin, device, plan.shows.clone(), plan.depth, buffers)?;
    control
        .start(device)
        .map_err(|error| ("starting the block device", error))
}

/// Opens a device, maps its memory and has the queue thread fetch all its requests.
fn serve(origin: &Origin, device: u32, shows: Shows, depth: u16, buffers: Buffers) -> std::result::Result<(), Failure> {
    let queue = open_char(device)
        .and_then(|file| Queue::new(device, shows, depth, buffers, file))
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
/// never started: [`forget_device`] it and make another; (timed-out) when old operations do not end.
pub fn recover_origin_device(origin: &Origin, device: u32) -> Result<()> {
    recover(origin, device, Shows::Origin)
}

/// As [`recover_origin_device`], for the device of the image that snapshot `id` has of it.
pub fn recover_image_device(origin: &Origin, device: u32, id: &str) -> Result<()> {
    recover(origin, device, Shows::Image(id.to_owned()))
}

/// Ends a device that nobody serves and forgets it: its I/O fails.
pub fn forget_device(device: u32) -> Result<()> {
    let mut control = open()?;
    let _ = control.stop(device);
    delete(&mut control, device).map_err(|error| Refusal::io(&format!("removing {}", node_of(device)), &error))
}

/// Forgets a device of which a data path that died has said that it was to go. Not one in service: its number may be
/// another's by now.
pub fn forget_orphan(device: u32) {
    let waits = |info: DeviceInfo| matches!(info.state, state::DEAD | state::QUIESCED);
    let orphan = Control::open()
        .and_then(|mut control| control.info(device))
        .is_ok_and(waits);
    if orphan {
        if let Err(refusal) = forget_device(device) {
            eprintln!("blksnap-datapath: {}", refusal.message);
        }
    }
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
    serve(origin, device, shows, info.queue_depth, buffers).map_err(|(what, error)| failed(what, &error))?;
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

/// Ends the device of an origin; what its page cache holds is written first. `force`: also when somebody uses it, whose
/// I/O then fails. Raised (busy) otherwise, (timed-out) when a disk holds it up: it may be tried again.
pub fn end_origin_device(origin: &Origin, device: u32, force: bool) -> Result<()> {
    let node = node_of(device);
    let held = claim(&node, force)?;
    if let Some(file) = held {
        // The driver fails writes that come after STOP, those of the page cache among them. The claim is kept until
        // then: nobody mounts the node meanwhile.
        let flushed = within(&format!("flushing {node}"), move || file.sync_all().map(|()| file));
        match flushed {
            Ok(claim) => return end(origin, device, Some(claim)),
            Err(refusal) if !force => return Err(refusal),
            Err(_) => {}
        }
    }
    end(origin, device, None)
}

/// Ends the device of an image, whoever uses it.
pub fn end_image_device(origin: &Origin, device: u32) -> Result<()> {
    end(origin, device, None)
}

fn end(origin: &Origin, device: u32, claim: Option<File>) -> Result<()> {
    halt(origin, device, claim)?;
    match delete(&mut open()?, device) {
        Err(error) if error.raw_os_error() != Some(libc::ENODEV) => {
            Err(Refusal::io(&format!("removing {}", node_of(device)), &error))
        }
        _ => Ok(()),
    }
}

/// Ends the service of a device, which stays until [`forget_device`].
pub fn halt(origin: &Origin, device: u32, claim: Option<File>) -> Result<()> {
    let node = node_of(device);
    let stopping = move || {
        let stopped = Control::open()?.stop(device);
        drop(claim);
        match stopped {
            // Gone already: it was tried before.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            done => done,
        }
    };
    within(&format!("stopping {node}"), stopping)?;
    origin.ask(|answer| Letter::Unserve(device, answer))
}

/// Does on a thread of its own what a disk may hold up for ever. Raised (timed-out) when that takes too long; it goes on.
fn within<T: Send + 'static>(what: &str, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T> {
    let (answer, answered) = sync_channel(1);
    std::thread::Builder::new()
        .name("device".into())
        .stack_size(256 << 10)
        .spawn(move || answer.send(work()))
        .map_err(|error| Refusal::io(what, &error))?;
    let done = answered.recv_timeout(Duration::from_secs(ANSWER_S));
    let done = done.map_err(|_| Refusal::timed_out(format!("{what} takes too long: a disk owes an answer")))?;
    done.map_err(|error| Refusal::io(what, &error))
}

/// Refuses to grow a device where the driver cannot.
pub fn check_growth(device: u32) -> Result<()> {
    let info = open()?.info(device);
    let info = info.map_err(|error| Refusal::io(&format!("asking for {}", node_of(device)), &error))?;
    if info.flags & flag::UPDATE_SIZE == 0 {
        return Err(Refusal::invalid_state(format!(
            "{} cannot grow on this kernel (6.16 can): remove it and add the origin again",
            node_of(device)
        )));
    }
    Ok(())
}

/// Tells a device that it has `size` bytes now.
pub fn grow(device: u32, size: u64) -> Result<()> {
    let grown = open()?.update_size(device, size);
    grown.map_err(|error| Refusal::io(&format!("growing {}", node_of(device)), &error))
}

/// A node that is in use, in words.
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
