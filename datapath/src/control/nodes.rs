// SPDX-License-Identifier: GPL-2.0-or-later
//! What users of an origin see in /dev, put up and taken down: its ublk device, and the device-mapper device about that.
//!
//! How each is made is in [`devices`], [`node`](super::node) and [`insertion`](super::insertion); here is the order, and
//! what is undone when a step fails.

use super::devices;
use super::ends;
use super::error::{Refusal, Result};
use super::freeze::Plan;
use super::insertion::Insertion;
use super::keeping;
use super::node::{Device, Node};
use super::notes::Note;
use super::origins::{Add, WithMaps};
use super::registry::{Origin, SnapshotEntry};
use super::server::Server;
use super::stack::{self, Fronts};
use super::take::Take;
use crate::dm::Dm;
use crate::engine::mail::Letter;
use crate::engine::reading::Reading;
use crate::engine::{Front, Map};
use crate::ublk::control::Control;
use crate::udev;
use serde::Serialize;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::sync_channel;
use std::sync::Arc;

/// `dm` in the answer to `hello`.
#[derive(Debug, Serialize)]
pub struct Availability {
    pub available: bool,
    pub reason: String,
}

pub fn availability() -> Availability {
    let reason = Dm::open().err().unwrap_or_default();
    Availability {
        available: reason.is_empty(),
        reason,
    }
}

fn open() -> Result<Arc<Dm>> {
    Dm::open().map(Arc::new).map_err(Refusal::invalid_state)
}

/// What `origin.add` came with.
pub struct Given {
    pub origin: File,
    pub saved: Option<File>,
    /// The origin is the device under a live one, and not yet in use.
    pub insertion: Option<Insertion>,
}

impl Server {
    /// The origin of `origin.add` and its saved map: as sent, or by getting ready to get under a live device.
    pub fn given(&self, asked: &Add, fds: Vec<OwnedFd>) -> Result<Given> {
        let mut fds = fds.into_iter().map(File::from);
        let (first, second, None) = (fds.next(), fds.next(), fds.next()) else {
            return Err(Refusal::bad_request("origin.add takes one or two descriptors"));
        };
        if asked.front != Front::Ublk && !(asked.top.is_empty() && asked.insert.is_empty()) {
            return Err(Refusal::invalid(
                "only a ublk device can be under a device-mapper device",
            ));
        }
        if asked.insert.is_empty() {
            let origin = first.ok_or_else(|| Refusal::bad_request("origin.add takes one or two descriptors"))?;
            self.check_top(&asked.top)?;
            return Ok(Given {
                origin,
                saved: second,
                insertion: None,
            });
        }
        if !asked.top.is_empty() || asked.read_only {
            return Err(Refusal::invalid(
                "an origin under a live device has no top of its own and is not read-only",
            ));
        }
        if second.is_some() {
            return Err(Refusal::bad_request(
                "origin.add with insert takes no origin, at most a saved map",
            ));
        }
        let (insertion, origin) = Insertion::prepare(&open()?, &asked.insert)?;
        if first.is_some() && !insertion.is_idle() {
            return Err(Refusal::invalid(format!(
                "{} is in use: what was written without the tracker is not in the saved map; begin a new generation",
                asked.insert
            )));
        }
        Ok(Given {
            origin,
            saved: first,
            insertion: Some(insertion),
        })
    }

    /// A top that another origin has, open or not, must not be replaced.
    fn check_top(&self, top: &str) -> Result<()> {
        let registry = self.registry();
        let taken = |origin: &&Origin| origin.attachment.top == top || origin.attachment.insert == top;
        match registry.origins.values().find(taken) {
            Some(other) if !top.is_empty() => {
                let name = &other.name;
                Err(Refusal::exists(format!("{top} is the device of origin {name}")))
            }
            _ => Ok(()),
        }
    }

    /// Puts up the devices of an origin whose queue thread runs. On an error none of them is left.
    pub fn put_up(
        &self,
        entry: &mut Origin,
        asked: &Add,
        (size, diskseq): (u64, u64),
        insertion: Option<&mut Insertion>,
    ) -> Result<()> {
        if asked.front != Front::Ublk {
            return Ok(());
        }
        entry.attachment.top.clone_from(&asked.top);
        entry.attachment.insert.clone_from(&asked.insert);
        let device = devices::make_origin_device(entry, size, asked.read_only)?;
        let path = devices::node_of(device);
        entry.attachment.ublk_id = Some(device);
        // Before anybody's I/O depends on it.
        let note = Note {
            device: entry.identity.0,
            diskseq,
            ublk_id: Some(device),
            ..Note::of(asked)
        };
        let kept = self.keep_device(entry, device).and_then(|()| self.note(&note));
        match kept.and_then(|()| over(asked, &path, size, insertion)) {
            Ok(None) => entry.attachment.node = path,
            Ok(Some(node)) => {
                entry.attachment.node = node.path().display().to_string();
                entry.attachment.over = Some(Arc::new(node));
            }
            Err(refusal) => {
                let _ = ends::end_origin_device(entry, device, true);
                return Err(refusal);
            }
        }
        Ok(())
    }

    /// Ends an origin that could not be put up. `late`: its queue thread is needed for a while yet.
    pub fn undo(&self, entry: &Origin, late: bool) {
        if late {
            entry.mailbox.post(Letter::End(sync_channel(1).0));
        } else {
            let _ = entry.ask(Letter::End);
        }
        keeping::forget(&entry.kept);
        let _ = self.store_sync();
        let _ = std::fs::remove_file(&entry.socket);
    }

    /// Ends an origin under its device-mapper device, which goes on without it, whoever uses it.
    pub fn bypass(&self, name: &str) -> Result<WithMaps> {
        if self.registry().origin(name)?.attachment.over.is_none() {
            return Err(Refusal::invalid(format!(
                "{name} has no device-mapper device that could go on"
            )));
        }
        self.leave(name, true, true)
    }

    /// What stands still in a take: the device-mapper devices of its origins, and the file systems of `mounts`.
    pub fn freeze_plan(&self, asked: &Take, origins: &[Origin], mounts: Vec<OwnedFd>) -> Result<Plan> {
        if mounts.len() != asked.freeze_fds || !(asked.freeze || mounts.is_empty()) {
            return Err(Refusal::bad_request(
                "snapshot.take takes freeze_fds descriptors, and none without freeze",
            ));
        }
        if !asked.freeze {
            return Ok(Plan::default());
        }
        let (mut fronts, mut needs) = (Fronts::new(), Vec::new());
        let (all, entries): (Vec<_>, Vec<_>) = {
            let registry = self.registry();
            (
                registry.origins.values().cloned().collect(),
                registry.snapshots.values().cloned().collect(),
            )
        };
        for origin in &all {
            let node = origin.attachment.ublk_id.map(devices::node_of);
            if let Some(Ok(metadata)) = node.map(std::fs::metadata) {
                fronts.insert(metadata.rdev(), origin.identity.0);
            }
        }
        let concerned = |entry: &&SnapshotEntry| {
            let mut images = entry.images.iter();
            entry.snapshot.id == asked.snapshot
                || images.any(|image| origins.iter().any(|origin| origin.name == image.origin))
        };
        for entry in entries.iter().filter(concerned) {
            if !entry.snapshot.failed() {
                let under = stack::under_file(entry.snapshot.storage.file());
                needs.push((
                    format!("the difference storage of snapshot {}", entry.snapshot.id),
                    under,
                ));
            }
        }
        for origin in origins.iter().filter(|origin| origin.attachment.front == Front::Nbd) {
            needs.push((format!("origin {}", origin.name), vec![origin.identity.0]));
        }
        let nodes: Vec<_> = origins
            .iter()
            .filter_map(|origin| origin.attachment.over.clone())
            .collect();
        Plan::new(&nodes, mounts.into_iter().map(File::from).collect(), &needs, &fronts)
    }
}

/// The ublk device that a device-mapper device of an origin lies on now, if it is one of that origin's (by its `stamp`):
/// it may have been given another one when the origin grew.
pub fn front_below(name: &str, stamp: u64) -> Option<u32> {
    let table = Dm::open().ok()?.table(name).ok()?;
    let [target] = table.0.as_slice() else { return None };
    let number = target.params.split(' ').next()?;
    let device = udev::kernel_name_at(number)?.strip_prefix("ublkb")?.parse().ok()?;
    let info = Control::open().and_then(|mut control| control.info(device)).ok()?;
    (info.server_flags == stamp).then_some(device)
}

/// Has the device-mapper device of an origin that was left go on with it. One that is not as it was is `astray` later.
pub fn adopt(entry: &mut Origin, device: u32) -> Result<()> {
    let conf = Arc::clone(&entry.conf);
    let live = !conf.insert.is_empty();
    let name = if live { &conf.insert } else { &conf.top };
    if name.is_empty() {
        return Ok(());
    }
    let dm = open()?;
    let front = devices::number_and_size(device).map_err(|error| Refusal::io(&entry.attachment.node, &error))?;
    let node = match Node::adopt(&dm, name, live, front) {
        Err(refusal) if refusal.code == "not-found" && !live => Node::top(&dm, name, front, conf.read_only)?,
        adopted => adopted?,
    };
    entry.attachment.top.clone_from(&conf.top);
    entry.attachment.insert.clone_from(&conf.insert);
    entry.attachment.node = node.path().display().to_string();
    entry.attachment.over = Some(Arc::new(node));
    Ok(())
}

fn front_of(path: &str, size: u64) -> Result<Device> {
    let metadata = std::fs::metadata(path).map_err(|error| Refusal::io(path, &error))?;
    let number = metadata.rdev();
    Ok(Device { number, size })
}

fn over(asked: &Add, path: &str, size: u64, insertion: Option<&mut Insertion>) -> Result<Option<Node>> {
    let front = front_of(path, size)?;
    match insertion {
        Some(insertion) => insertion.complete(front).map(Some),
        None if asked.top.is_empty() => Ok(None),
        None => Node::top(&open()?, &asked.top, front, asked.read_only).map(Some),
    }
}

/// Why the I/O of an origin's users no longer goes through it; None: it does.
pub fn astray(origin: &Origin) -> Option<&'static str> {
    let reason = origin.attachment.over.as_ref()?.astray()?;
    origin.mailbox.post(Letter::Break(reason));
    Some(reason)
}

/// Whether somebody uses the node of an origin.
pub fn in_use(origin: &Origin) -> bool {
    match &origin.attachment.over {
        Some(node) => node.is_open(),
        None => origin.attachment.ublk_id.is_some_and(ends::in_use),
    }
}

/// Raised (busy) when the devices of an origin cannot go because of who uses them.
pub fn check_idle(origin: &Origin) -> Result<()> {
    let attachment = &origin.attachment;
    let held = match &attachment.over {
        Some(node) if node.is_live() => false,
        Some(node) => node.is_held(),
        None => attachment.ublk_id.is_some_and(ends::in_use),
    };
    if held {
        return Err(ends::used(&attachment.node));
    }
    Ok(())
}

impl Server {
    /// Takes down the devices of an origin; its last reading. A node in use goes on without the tracker: a live device by
    /// its own table, a top (`force`: that it is in use is no reason to refuse) straight over the origin; `reason` then says
    /// that the map must not be continued. The queue thread may have ended with it.
    ///
    /// `stay`: a top goes on in any case.
    pub fn take_down(&self, origin: &Origin, force: bool, stay: bool) -> Result<(Reading, Map)> {
        const GOES_ON: &str = "the device is in use without the tracker";
        let attachment = &origin.attachment;
        let read = || origin.read().map(|(reading, map, _)| (reading, map));
        let Some(device) = attachment.ublk_id else {
            return read();
        };
        let Some(node) = &attachment.over else {
            ends::end_origin_device(origin, device, force)?;
            return read();
        };
        if node.is_live() {
            let used = node.is_open();
            node.take_out()?;
            let used = used || node.is_open();
            ends::end_origin_device(origin, device, force)?;
            let (mut reading, map) = read()?;
            if used && reading.suspicion.is_empty() {
                reading.suspicion = GOES_ON;
            }
            return Ok((reading, map));
        }
        if !(stay || force && node.is_held()) {
            node.remove()?;
            ends::end_origin_device(origin, device, force)?;
            return read();
        }
        let (reading, ..) = origin.read()?;
        let below = Device {
            number: origin.identity.0,
            size: reading.size,
        };
        let (mut reading, map) = node.bypass(below, || {
            ends::halt(origin, device, None)?;
            let last = read()?;
            origin.ask(Letter::End)?;
            // The store has the origin open, too.
            keeping::forget(&origin.kept);
            self.store_sync()?;
            Ok(last)
        })?;
        let _ = ends::forget_device(device);
        reading.suspicion = GOES_ON;
        Ok((reading, map))
    }
}

/// What can only go when neither the queue thread nor the store has it open.
pub fn clear_away(origin: &Origin) {
    if let Some(node) = origin.attachment.over.as_ref().filter(|node| node.is_live()) {
        // What cannot be removed yet is, before the next one of its name is made.
        let _ = node.remove();
    }
}
