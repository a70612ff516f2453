// SPDX-License-Identifier: GPL-2.0-or-later
//! Operations on one snapshot but the take: create, destroy.

use super::ends;
use super::error::{Refusal, Result};
use super::keeping::{self, keeps, SnapshotConf, VERSION};
use super::origins::check_uuid;
use super::registry::{SnapshotEntry, SnapshotReading};
use super::server::Server;
use crate::engine::mail::Letter;
use crate::pages::snapshot::Page;
use crate::snapshot::Snapshot;
use crate::storage::Storage;
use crate::sys;
use serde::Deserialize;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Create {
    pub snapshot: String,
    #[serde(default)]
    pub limit: u64,
    #[serde(default)]
    pub low_space: u64,
    #[serde(default)]
    pub step: u64,
    #[serde(default)]
    pub chunk_size: u64,
}

const MIN_CHUNK: u64 = 4 << 10;
const MAX_CHUNK: u64 = 16 << 20;
/// Offsets of a storage stay below the bit that tells them from staging slots (`cow`).
const MAX_LIMIT: u64 = 1 << 62;

impl Server {
    pub fn create(&self, asked: Create, mut fds: Vec<OwnedFd>) -> Result<SnapshotReading> {
        check_uuid(&asked.snapshot)?;
        let (Some(fd), true) = (fds.pop(), fds.is_empty()) else {
            return Err(Refusal::bad_request("snapshot.create takes one descriptor"));
        };
        let size = asked.chunk_size;
        if size != 0 && !(size.is_power_of_two() && (MIN_CHUNK..=MAX_CHUNK).contains(&size)) {
            return Err(Refusal::invalid(format!(
                "chunk size {size} is no power of two from {MIN_CHUNK} to {MAX_CHUNK}"
            )));
        }
        if asked.limit > MAX_LIMIT {
            return Err(Refusal::invalid(format!(
                "a limit of {} bytes is no limit",
                asked.limit
            )));
        }
        let _structure = self.structure();
        let file = File::from(fd);
        let handle = self.registry().next_handle();
        let node = sys::node(&file).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => Refusal::invalid("the storage is neither a regular file nor a block device"),
            _ => Refusal::io("the difference storage", &error),
        })?;
        {
            let registry = self.registry();
            if registry.snapshots.contains_key(&asked.snapshot) {
                return Err(Refusal::exists(format!("snapshot {} exists already", asked.snapshot)));
            }
            if registry.origins.values().any(|origin| origin.identity == node.identity) {
                return Err(Refusal::invalid("the storage is a tracked origin"));
            }
            if registry
                .snapshots
                .values()
                .any(|other| other.storage_identity == node.identity)
            {
                return Err(Refusal::busy("the storage is in use by another snapshot"));
            }
        }
        if asked.limit == 0 && !node.block {
            return Err(Refusal::invalid("a file as storage needs a limit"));
        }
        let storage = Storage::new(file, asked.limit, asked.low_space, asked.step)
            .map_err(|error| Refusal::io("the difference storage", &error))?;
        let page = Page::new().map_err(|error| Refusal::io("memory", &error))?;
        let conf = SnapshotConf {
            version: VERSION,
            handle,
            id: asked.snapshot.clone(),
            limit: asked.limit,
            low_space: asked.low_space,
            step: asked.step,
            chunk_size: asked.chunk_size,
            page: page.memory().id(),
        };
        let kept = self.keep_snapshot(&conf, Some(storage.file()), &page, Vec::new())?;
        self.store_sync()?;
        let snapshot = Snapshot::new(
            asked.snapshot.clone(),
            storage,
            asked.chunk_size,
            page,
            self.bell.clone(),
        );
        let entry = SnapshotEntry {
            snapshot: Arc::new(snapshot),
            storage_identity: node.identity,
            taken_at: 0,
            images: Vec::new(),
            memory: Vec::new(),
            kept: keeps(kept),
            told_low: false,
            told_failed: false,
            told_full: false,
        };
        let mut registry = self.registry();
        let reading = registry.reading(&entry);
        registry.snapshots.insert(asked.snapshot, entry);
        Ok(reading)
    }

    pub fn destroy(&self, id: &str) -> Result<()> {
        let _structure = self.structure();
        let entry = self.registry().snapshot(id)?;
        // Before any origin stops keeping its chunks: from here on a process after us must not show it.
        entry.snapshot.page.leave();
        for image in &entry.images {
            // An origin that was detached by force took its image along.
            let origin = self.registry().origin(&image.origin);
            if let Ok(origin) = origin {
                if let Some(device) = image.device {
                    ends::end_image_device(&origin, device)?;
                    self.registry().forget_image_device(id, &image.origin);
                }
                let asked = origin.ask(|answer| Letter::DropImage(id.to_owned(), answer));
                asked.map_err(|refusal| match refusal.code {
                    "timed-out" => Refusal::timed_out(format!(
                        "snapshot {id} is not gone yet: the disk of its storage, or of {}, owes an answer",
                        image.origin
                    )),
                    _ => refusal,
                })?;
            }
        }
        self.registry().snapshots.remove(id);
        keeping::forget(&entry.kept);
        self.store_sync()
    }
}
