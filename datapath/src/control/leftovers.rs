// SPDX-License-Identifier: GPL-2.0-or-later
//! What a data path that was killed may leave in device-mapper: devices suspended, tables loaded and not used, devices of
//! an origin that nobody serves.

use super::node::{remove, swap, SUFFIX, TOP, UNDER};
use crate::dm::{Dm, Status, Table, Udev, PREFIX};
use std::collections::BTreeMap;
use std::io;

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

/// Takes back what belongs to no origin: live devices not in `known` get their own tables, the devices under them and
/// unused tops go. Their front devices must be stopped before, or I/O in flight on them would be waited for in vain.
///
/// What could not be taken back, with the reason.
pub fn sweep(dm: &Dm, known: &[&str]) -> io::Result<Vec<(String, io::Error)>> {
    let mut kept = Vec::new();
    for (name, status) in ours(dm)? {
        let owner = live_of(&status).unwrap_or_else(|| name.clone());
        if known.contains(&owner.as_str()) {
            continue;
        }
        let gone = match live_of(&status) {
            Some(live) => take_back(dm, &live, &name, &status),
            // A top straight over its origin is in use as it should be.
            None if status.active && !through_front(&dm.table(&name)?) => Ok(()),
            None => remove(dm, &name, status.device),
        };
        if let Err(error) = gone {
            kept.push((name, error));
        }
    }
    Ok(kept)
}

fn take_back(dm: &Dm, live: &str, under: &str, status: &Status) -> io::Result<()> {
    if status.active && dm.find(live)?.is_some() && through_front(&dm.table(live)?) {
        swap(dm, live, &dm.table(under)?)?;
    }
    remove(dm, under, status.device)
}

/// The table leads to a front device of a data path, and nowhere else.
fn through_front(table: &Table) -> bool {
    let [target] = table.0.as_slice() else { return false };
    let device = target.params.split(' ').next().unwrap_or_default();
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{device}/uevent")).unwrap_or_default();
    uevent.lines().any(|line| line.starts_with("DEVNAME=ublkb"))
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
