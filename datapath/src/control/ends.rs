// SPDX-License-Identifier: GPL-2.0-or-later
//! Block devices: found in use, stopped and forgotten. How they are made is in [`devices`](super::devices).
//!
//! ```text
//!  fsync → STOP (the queue thread answers what is left) → Unserve → DEL
//! ```

use super::devices::{node_of, open};
use super::errand::Errand;
use super::error::{Refusal, Result};
use super::registry::{Origin, ANSWER_S};
use crate::engine::mail::Letter;
use crate::ublk::control::Control;
use crate::ublk::stamp;
use crate::ublk::uapi::{state, DeviceInfo};
use crate::udev;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(ANSWER_S);

/// Ends the device of an origin; what its page cache holds is written first. `force`: also when somebody uses it, whose
/// I/O then fails. Raised (busy) otherwise, (timed-out) when a disk holds it up: it may be tried again.
pub fn end_origin_device(origin: &Origin, device: u32, force: bool) -> Result<()> {
    let node = node_of(device);
    let held = claim(&node, force)?;
    if let Some(file) = held {
        // The driver fails writes that come after STOP, those of the page cache among them. The claim is kept until
        // then: nobody mounts the node meanwhile.
        let what = format!("flushing {node}");
        let copy = file.try_clone().map_err(|error| Refusal::io(&what, &error))?;
        match Errand::Flush.run(what, Some(copy), PATIENCE) {
            Ok(()) => return end(origin, device, Some(file)),
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
    stop(device, claim)?;
    origin.ask(|answer| Letter::Unserve(device, answer))
}

fn stop(device: u32, claim: Option<File>) -> Result<()> {
    Errand::Stop(device).run(format!("stopping {}", node_of(device)), claim, PATIENCE)
}

/// Forgets a device that was stopped, or never started.
pub(super) fn delete(control: &mut Control, device: u32) -> io::Result<()> {
    let deleted = control.delete(device);
    udev::forget(&format!("ublkb{device}"));
    deleted
}

/// Ends a device that nobody serves and forgets it: its I/O fails.
pub fn forget_device(device: u32) -> Result<()> {
    let _ = stop(device, None);
    delete(&mut open()?, device).map_err(|error| Refusal::io(&format!("removing {}", node_of(device)), &error))
}

/// Forgets a device of which a data path that died has said that it was to go. Not one in service: its number may be
/// another's by now.
pub fn forget_orphan(device: u32) {
    let waits =
        |info: DeviceInfo| matches!(info.state, state::DEAD | state::QUIESCED) && stamp::is_ours(info.server_flags);
    let orphan = Control::open()
        .and_then(|mut control| control.info(device))
        .is_ok_and(waits);
    if orphan {
        if let Err(refusal) = forget_device(device) {
            eprintln!("blksnap-datapath: {}", refusal.message);
        }
    }
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
