// SPDX-License-Identifier: GPL-2.0-or-later
//! Taking a snapshot: one instant over several origins, in two phases. Until the flip nothing has changed anywhere.

use super::devices;
use super::ends;
use super::error::{Refusal, Result};
use super::keeping;
use super::nodes;
use super::origins::{check_uuid, new_map, yes};
use super::registry::{ImageInfo, Origin, SnapshotEntry};
use super::server::Server;
use crate::cbt::{self, Geometry};
use crate::engine::mail::{Closed, Flip, Letter};
use crate::engine::{Front, Image, IMAGES};
use crate::mem::Shared;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::mpsc::sync_channel;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Origins of one take: the answer carries three descriptors for each.
const MOST: usize = crate::sys::MAX_FDS / 3;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    pub origin: String,
    #[serde(default)]
    pub writable: bool,
    pub next_generation: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Take {
    pub snapshot: String,
    pub devices: Vec<Device>,
    #[serde(default = "ten_seconds")]
    pub timeout_ms: u64,
    #[serde(default = "yes")]
    pub freeze: bool,
    /// How many descriptors of mount points come along, to be frozen as well.
    #[serde(default)]
    pub freeze_fds: usize,
}

fn ten_seconds() -> u64 {
    10_000
}

#[derive(Debug, Serialize)]
pub struct TakenImage {
    #[serde(flatten)]
    info: ImageInfo,
    reset: &'static str,
}

#[derive(Debug, Serialize)]
pub struct Taken {
    taken_at: u64,
    images: Vec<TakenImage>,
}

/// Closed gates; they open when this is dropped, whatever happened.
pub struct Gates<'a> {
    origins: &'a [Origin],
    closed: Vec<Closed>,
}

impl<'a> Gates<'a> {
    /// Closes all gates and waits until nothing is in flight behind any of them. Raised (timed-out) when one write takes
    /// longer than `timeout`; all gates are open again then.
    pub fn close(origins: &'a [Origin], timeout: Duration) -> Result<Self> {
        let end = Instant::now() + timeout;
        // Made first: its drop opens the gates on every way out.
        let mut gates = Self {
            origins,
            closed: Vec::new(),
        };
        let waiting: Vec<_> = origins
            .iter()
            .map(|origin| {
                let (answer, answered) = sync_channel(1);
                origin.mailbox.post(Letter::CloseGate(answer));
                answered
            })
            .collect();
        for (answered, origin) in waiting.iter().zip(origins) {
            let left = end.saturating_duration_since(Instant::now());
            let closed = answered.recv_timeout(left).map_err(|_| {
                Refusal::timed_out(format!(
                    "a write to {} did not end in time; nothing was taken",
                    origin.name
                ))
            })?;
            gates.closed.push(closed);
        }
        Ok(gates)
    }

    pub fn closed(&self) -> &[Closed] {
        &self.closed
    }
}

impl Drop for Gates<'_> {
    fn drop(&mut self) {
        let answers: Vec<_> = self
            .origins
            .iter()
            .map(|origin| {
                let (answer, answered) = sync_channel(1);
                origin.mailbox.post(Letter::OpenGate(answer));
                answered
            })
            .collect();
        // All are told before any is waited for; one that is stuck in a write opens when it comes out.
        for answered in answers {
            let _ = answered.recv_timeout(Duration::from_secs(1));
        }
    }
}

impl Server {
    pub fn take(&self, asked: &Take, mounts: Vec<OwnedFd>) -> Result<(Taken, Vec<Arc<Shared>>)> {
        let _structure = self.structure();
        let entry = self.registry().snapshot(&asked.snapshot)?;
        if !entry.images.is_empty() || entry.snapshot.failed() {
            return Err(Refusal::invalid_state(format!(
                "snapshot {} is taken already",
                asked.snapshot
            )));
        }
        let origins = self.take_set(asked, &entry)?;
        let mut flips = asked
            .devices
            .iter()
            .zip(&origins)
            .map(|(device, origin)| prepare(&entry, device, origin, None))
            .collect::<Result<Vec<_>>>()?;
        let mut kept = flips
            .iter()
            .map(|flip| self.keep_flip(flip))
            .collect::<Result<Vec<_>>>()?;
        self.store_sync()?;

        let patience = Duration::from_millis(asked.timeout_ms);
        // Thawed when this function is left, behind open gates.
        let frozen = self.freeze_plan(asked, &origins, mounts)?.freeze(patience)?;
        let gates = Gates::close(&origins, frozen.patience(patience))?;
        frozen.check()?;
        let mut resets = Vec::new();
        for (place, closed) in gates.closed().iter().enumerate() {
            let (device, origin) = (&asked.devices[place], &origins[place]);
            let broken = nodes::astray(origin).unwrap_or(closed.broken);
            if !broken.is_empty() {
                let (name, why) = (&origin.name, broken);
                return Err(Refusal::invalid_state(format!(
                    "origin {name}: {why}; nothing was taken"
                )));
            }
            if !closed.suspicion.is_empty() {
                let geometry = Geometry::new(closed.node.size, origin.block_size)?;
                flips[place] = prepare(&entry, device, origin, Some(geometry))?;
                kept[place] = self.keep_flip(&flips[place])?;
                self.store_sync()?;
            }
            resets.push(closed.suspicion);
        }
        let taken_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let taken_at = u64::try_from(taken_at.as_micros()).unwrap_or(u64::MAX);
        // From here on nothing can fail.
        let answers: Vec<_> = flips
            .into_iter()
            .zip(&origins)
            .map(|(flip, origin)| {
                let (answer, answered) = sync_channel(1);
                let writable = flip.image.writable;
                origin.mailbox.post(Letter::Flip(Box::new(flip), answer));
                (answered, writable)
            })
            .collect();
        let (mut infos, mut memory) = (Vec::new(), Vec::new());
        let mut records = Vec::new();
        for ((answered, writable), origin) in answers.into_iter().zip(&origins) {
            // A queue thread behind a closed gate has nothing that could hold it.
            let flipped = answered
                .recv()
                .map_err(|_| Refusal::invalid_state("a queue thread ended"))?;
            let numbers = flipped.map.numbers;
            infos.push(ImageInfo {
                origin: origin.name.clone(),
                size: flipped.geometry.size(),
                generation: flipped.map.generation.clone(),
                number: numbers.changes(),
                base: numbers.base(),
                oldest: numbers.oldest(),
                writable,
                chunk_size: flipped.chunk_size,
                chunk_count: flipped.chunk_count,
                path: String::new(),
                device: None,
                error: String::new(),
            });
            records.push(keeping::record(origin.handle, &flipped, &origin.name, writable));
            memory.extend([flipped.map.taken, flipped.table, flipped.map.live]);
        }
        // All of it or nothing, for a process after us: the gates are still closed.
        entry.snapshot.page.take(taken_at, &records);
        drop(gates);
        drop(frozen);
        for (origin, kept) in origins.iter().zip(&kept) {
            keeping::changed(&origin.kept, kept.live.clone(), Arc::clone(&kept.taken));
        }
        keeping::took(&entry.kept, kept);
        if let Err(refusal) = show(&asked.snapshot, &origins, &mut infos) {
            entry.snapshot.page.leave();
            for origin in &origins {
                let _ = origin.ask(|answer| Letter::DropImage(asked.snapshot.clone(), answer));
            }
            return Err(refusal);
        }
        let images = infos.iter().cloned().zip(resets);
        let images = images.map(|(info, reset)| TakenImage { info, reset }).collect();
        if let Some(entry) = self.registry().snapshots.get_mut(&asked.snapshot) {
            for (place, info) in infos.iter().enumerate() {
                info.device
                    .inspect(|device| entry.snapshot.page.set_device(place, *device));
            }
            entry.images = infos;
            entry.taken_at = taken_at;
            entry.memory = memory.chunks_exact(3).map(image_memory).collect();
        }
        Ok((Taken { taken_at, images }, memory))
    }

    /// The origins of a take, all fit for it.
    fn take_set(&self, asked: &Take, entry: &SnapshotEntry) -> Result<Vec<Origin>> {
        if asked.devices.is_empty() {
            return Err(Refusal::invalid("a snapshot needs at least one origin"));
        }
        if asked.devices.len() > MOST {
            let count = asked.devices.len();
            return Err(Refusal::limit(format!("{count} origins in one take, at most {MOST}")));
        }
        let names: BTreeSet<_> = asked.devices.iter().map(|device| &device.origin).collect();
        if names.len() != asked.devices.len() {
            return Err(Refusal::invalid("an origin is named twice"));
        }
        let mut origins = Vec::new();
        for device in &asked.devices {
            check_uuid(&device.next_generation)?;
            let origin = self.registry().origin(&device.origin)?;
            let name = &origin.name;
            if !origin.tracking {
                return Err(Refusal::invalid_state(format!(
                    "origin {name} is served without tracking"
                )));
            }
            if origin.identity == entry.storage_identity {
                return Err(Refusal::invalid(format!("the storage is origin {name} itself")));
            }
            let (reading, map, _) = origin.read()?;
            if reading.state == "broken" {
                return Err(Refusal::invalid_state(format!("origin {name}: {}", reading.reason)));
            }
            if reading.snapshots.len() >= IMAGES {
                return Err(Refusal::limit(format!("{IMAGES} snapshots of {name} are held already")));
            }
            map.numbers.after_take()?;
            origins.push(origin);
        }
        Ok(origins)
    }
}

/// Gives the images of ublk origins their block devices: all, or none.
fn show(id: &str, origins: &[Origin], infos: &mut [ImageInfo]) -> Result<()> {
    for place in 0..infos.len() {
        let (origin, info) = (&origins[place], &infos[place]);
        if origin.attachment.front != Front::Ublk {
            continue;
        }
        match devices::make_image_device(origin, id, info.size, info.writable) {
            Ok(device) => {
                infos[place].device = Some(device);
                infos[place].path = devices::node_of(device);
            }
            Err(mut refusal) => {
                for (origin, info) in origins.iter().zip(infos) {
                    if let Some(device) = info.device {
                        let _ = ends::end_image_device(origin, device);
                    }
                }
                refusal.message += "; the snapshot was undone";
                return Err(refusal);
            }
        }
    }
    Ok(())
}

/// Taken map and chunk table, out of what a take answers for one image.
fn image_memory(answer: &[Arc<Shared>]) -> [Arc<Shared>; 2] {
    [Arc::clone(&answer[0]), Arc::clone(&answer[1])]
}

/// Makes all that the flip of one origin needs. `fresh`: a new generation begins with it.
fn prepare(entry: &SnapshotEntry, device: &Device, origin: &Origin, fresh: Option<Geometry>) -> Result<Flip> {
    let (_, map, geometry) = origin.read()?;
    let slides = fresh.is_none() && map.numbers.after_take()?.slides;
    let geometry = fresh.unwrap_or(geometry);
    let live = (slides || fresh.is_some())
        .then(|| new_map(geometry, true))
        .transpose()?;
    let taken = new_map(geometry, true)?;
    let chunk_size = match entry.snapshot.chunk_size {
        0 => cbt::block_size_for(geometry.size(), 0)?,
        size => size,
    };
    let image = Image::new(
        Arc::clone(&entry.snapshot),
        geometry,
        chunk_size,
        Arc::clone(&taken),
        device.writable,
    )
    .map_err(|error| Refusal::io("memory for a chunk table", &error))?;
    Ok(Flip {
        image,
        taken,
        live,
        reset: fresh.map(|geometry| (device.next_generation.clone(), geometry)),
    })
}
