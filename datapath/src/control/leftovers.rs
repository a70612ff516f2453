// SPDX-License-Identifier: GPL-2.0-or-later
//! What a data path that was killed may leave: devices suspended, tables loaded and not used, ublk and device-mapper
//! devices of origins that nobody serves. Only ours: ublk devices by their stamp, the others by the notes of origins.

use super::ends;
use super::errand::Errand;
use super::node::{remove, swap, SUFFIX, TOP, UNDER};
use super::notes::Note;
use super::server::Server;
use crate::dm::{Dm, Status, Table, Udev, PREFIX};
use crate::ublk::control::{self, Control};
use crate::ublk::stamp;
use crate::udev;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

/// How long stopping devices may take until others are served.
const PATIENCE: Duration = Duration::from_secs(5);

/// Lets I/O go on at every device we may have suspended: our own, and the live ones we are under. A table that was loaded
/// and not used is forgotten. The names of those that were suspended.
pub fn resume_all_ours(dm: &Dm) -> io::Result<Vec<String>> {
    let devices = ours(dm)?;
    let mut names: Vec<_> = devices.keys().cloned().collect();
    names.extend(devices.values().filter_map(live_of));
    let mut resumed = Vec::new();
    for name in names {
        let Some(status) = dm.find(&name)? else { continue };
        if status.suspended {
            if status.inactive {
                dm.clear(&name)?;
            }
            // One without any table cannot be resumed, and nothing waits for it.
            if status.active {
                dm.resume(&name, Udev::Keep)?;
                resumed.push(name);
            }
        }
    }
    Ok(resumed)
}

/// Takes away what belongs to no origin: ublk devices of this runtime directory that nobody serves, and the
/// device-mapper devices of `unfit` origins. Users of those get errors, or (where device-mapper can do it) go on without us.
///
/// To be called when nothing else makes devices. What cannot go now is noted still, and goes when the next data path begins.
pub fn clear(server: &Server, unfit: &[Note]) {
    let said = |what: &str, why: &dyn std::fmt::Display| eprintln!("blksnap-datapath: {what} is left: {why}");
    let orphans = orphans(server);
    let mut stuck = Vec::new();
    let stopping: Vec<_> = orphans
        .iter()
        .map(|device| {
            (
                *device,
                Errand::Stop(*device).begin(format!("stopping ublkb{device}"), None),
            )
        })
        .collect();
    let end = Instant::now() + PATIENCE;
    for (device, stopping) in stopping {
        let left = end.saturating_duration_since(Instant::now());
        if let Err(refusal) = stopping.and_then(|mut stopping| stopping.wait(Some(left))) {
            said(&format!("ublkb{device}"), &refusal.message);
            stuck.push(device);
        }
    }
    for note in unfit {
        if note.ublk_id.is_some_and(|device| stuck.contains(&device)) {
            continue;
        }
        match Dm::open().map(|dm| put_right(&dm, note)) {
            Ok(Err(error)) => said(&note.name, &error),
            // Without device-mapper there is nothing of it.
            Ok(Ok(())) | Err(_) => server.notes.forget(&note.name),
        }
    }
    for device in orphans.iter().filter(|device| !stuck.contains(device)) {
        match Control::open().and_then(|mut control| ends::delete(&mut control, *device)) {
            Ok(()) => eprintln!("blksnap-datapath: ublkb{device}, which nobody served, is gone"),
            Err(error) => said(&format!("ublkb{device}"), &error),
        }
    }
    udev::forget_all_but(&known_to_udev(server));
}

/// The ublk devices of this runtime directory that belong to no origin and no image.
fn orphans(server: &Server) -> Vec<u32> {
    let all = control::all();
    let Ok(mut control) = Control::open() else {
        return Vec::new();
    };
    let known = known(server);
    let mut ours = |device: &u32| {
        let info = control.info(*device);
        info.is_ok_and(|info| stamp::is_ours(info.server_flags))
    };
    let unknown = all.into_iter().filter(|device| !known.contains(device));
    unknown.filter(|device| ours(device)).collect()
}

fn known(server: &Server) -> BTreeSet<u32> {
    let registry = server.registry();
    let origins = registry.origins.values().filter_map(|origin| origin.attachment.ublk_id);
    let images = registry.snapshots.values().flat_map(|entry| &entry.images);
    let awaited = registry.awaited.iter().filter_map(|note| note.ublk_id);
    origins
        .chain(images.filter_map(|image| image.device))
        .chain(awaited)
        .collect()
}

/// The kernel's names of all devices udev is told about.
fn known_to_udev(server: &Server) -> BTreeSet<String> {
    let fronts = known(server).into_iter().map(|device| format!("ublkb{device}"));
    let registry = server.registry();
    let blocks = registry.origins.values().filter(|origin| origin.identity.1 == 0);
    let awaited = registry.awaited.iter().map(|note| note.device);
    let origins = blocks.map(|origin| origin.identity.0).chain(awaited);
    fronts.chain(origins.filter_map(udev::kernel_name)).collect()
}

/// The device-mapper devices of an origin that is not served, and whose ublk device has been stopped.
fn put_right(dm: &Dm, note: &Note) -> io::Result<()> {
    let uuid = |kind: &str, name: &str| format!("{PREFIX}{kind}{name}");
    if !note.insert.is_empty() {
        let under = format!("{}{SUFFIX}", note.insert);
        if let Some(status) = dm.find(&under)?.filter(|found| found.uuid == uuid(UNDER, &note.insert)) {
            return take_back(dm, &note.insert, &status);
        }
    }
    if !note.top.is_empty() {
        if let Some(status) = dm.find(&note.top)?.filter(|found| found.uuid == uuid(TOP, &note.top)) {
            return settle_top(dm, note, &status);
        }
    }
    Ok(())
}

/// Gives a live device its own table back; the device that has it goes.
fn take_back(dm: &Dm, live: &str, under: &Status) -> io::Result<()> {
    if under.active && dm.find(live)?.is_some() && through_front(&dm.table(live)?) {
        swap(dm, live, &dm.table(&under.name)?)?;
    }
    remove(dm, &under.name, under.device)
}

/// Removes a top, or puts it straight over its origin when somebody uses it.
fn settle_top(dm: &Dm, note: &Note, top: &Status) -> io::Result<()> {
    if !top.active {
        return remove(dm, &top.name, top.device);
    }
    let table = dm.table(&top.name)?;
    if !through_front(&table) {
        // As it should be: it lies on its origin.
        return Ok(());
    }
    match remove(dm, &top.name, top.device) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) && udev::kernel_name(note.device).is_some() => {
            swap(dm, &top.name, &Table::linear(note.device, table.size()))
        }
        done => done,
    }
}

/// The table leads to a front device of a data path, or to a device that is gone, and nowhere else.
fn through_front(table: &Table) -> bool {
    let [target] = table.0.as_slice() else { return false };
    let device = target.params.split(' ').next().unwrap_or_default();
    match std::fs::read_to_string(format!("/sys/dev/block/{device}/uevent")) {
        Ok(uevent) => uevent.lines().any(|line| line.starts_with("DEVNAME=ublkb")),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn ours(dm: &Dm) -> io::Result<BTreeMap<String, Status>> {
    let mut found = BTreeMap::new();
    for name in dm.devices()? {
        if let Some(status) = dm.find(&name)? {
            let kind = status.uuid.strip_prefix(PREFIX);
            if kind.is_some_and(|kind| kind.starts_with(TOP) || kind.starts_with(UNDER)) {
                found.insert(name, status);
            }
        }
    }
    Ok(found)
}

/// The live device whose table this one of ours got.
fn live_of(status: &Status) -> Option<String> {
    let under = status.uuid.strip_prefix(PREFIX)?.starts_with(UNDER);
    under
        .then(|| status.name.strip_suffix(SUFFIX).map(str::to_owned))
        .flatten()
}
