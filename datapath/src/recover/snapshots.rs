// SPDX-License-Identifier: GPL-2.0-or-later
//! Snapshots that were left: storage, page, and the images that their origins get back.

use super::left::{Left, Rings};
use super::memory::{conf, passes, Memory};
use super::origins::Origin;
use crate::cbt::{Geometry, Numbers};
use crate::control::devices;
use crate::control::ends;
use crate::control::error::Result;
use crate::control::keeping::{keeps, KeptFlip, SnapshotConf};
use crate::control::registry::{ImageInfo, SnapshotEntry};
use crate::control::server::Server;
use crate::engine::Image;
use crate::pages::snapshot::{Page, Phase, Record};
use crate::snapshot::{Cause, Failure, Snapshot};
use crate::storage::Storage;
use crate::sys;
use std::fs::File;
use std::io;
use std::sync::Arc;

pub struct Found {
    conf: SnapshotConf,
    snapshot: Arc<Snapshot>,
    storage_identity: (u64, u64),
    records: Vec<Record>,
    /// Of origins that have not taken theirs yet, by handle.
    images: Vec<(u32, Image)>,
    used: u64,
    /// Table and taken map of each image.
    memory: Vec<[Arc<crate::mem::Shared>; 2]>,
}

pub struct Ready {
    pub handle: u32,
    pub id: String,
    pub entry: SnapshotEntry,
}

/// All snapshots that are there to stay. Those that were being destroyed or were not stored as a whole are not.
pub fn build(server: &Server, left: &mut Left, memory: &mut Memory) -> io::Result<Vec<Found>> {
    server.registry().handles = left.highest_handle();
    let mut all = Vec::new();
    for (handle, file) in std::mem::take(&mut left.snapshots) {
        match one(server, left.snapshot_files.remove(&handle), &file, memory) {
            Ok(found) => all.extend(found),
            Err(error) if passes(&error) => return Err(error),
            Err(error) => eprintln!("blksnap-datapath: a snapshot is lost, it cannot be taken over: {error}"),
        }
    }
    Ok(all)
}

fn one(server: &Server, storage: Option<File>, file: &File, memory: &mut Memory) -> io::Result<Option<Found>> {
    let conf: SnapshotConf = conf(file)?;
    let page = Page::from(memory.owned(conf.page, c"blksnap-snapshot")?)?;
    if page.phase() == Phase::Leaving {
        for device in page.devices() {
            ends::forget_orphan(device);
        }
        return Ok(None);
    }
    let storage = storage.ok_or(io::ErrorKind::NotFound)?;
    let storage_identity = sys::node(&storage)?.identity;
    let storage = Storage::unready(storage, conf.limit, conf.low_space, conf.step)?;
    let records = page.records();
    let snapshot = Snapshot::new(conf.id.clone(), storage, conf.chunk_size, page, server.bell.clone());
    let mut found = Found {
        conf,
        snapshot: Arc::new(snapshot),
        storage_identity,
        images: Vec::new(),
        used: 0,
        memory: Vec::new(),
        records: Vec::new(),
    };
    for record in records {
        match found.image(&record, memory) {
            Ok(image) => {
                found.memory.push([Arc::clone(&image.taken), Arc::clone(&image.table)]);
                found.images.push((record.handle, image));
                found.records.push(record);
            }
            Err(error) if passes(&error) => return Err(error),
            Err(error) => found.lose(&record, &error.to_string()),
        }
    }
    Ok(Some(found))
}

impl Found {
    fn image(&mut self, record: &Record, memory: &mut Memory) -> io::Result<Image> {
        let wrong = |error: crate::cbt::CbtError| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
        let geometry = Geometry::new(record.size, record.block_size).map_err(wrong)?;
        let taken = memory.shared(record.taken, c"blksnap-map")?;
        if taken.len() != geometry.block_count() || !record.chunk_size.is_power_of_two() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "its map or chunks do not fit it",
            ));
        }
        let mut image = Image::with_table(
            Arc::clone(&self.snapshot),
            geometry,
            record.chunk_size,
            taken,
            memory.shared(record.table, c"blksnap-chunks")?,
            record.writable,
        )?;
        image.numbers = Numbers::new(record.base, record.active).map_err(wrong)?;
        image.generation.clone_from(&record.generation);
        self.used = self.used.max(image.recover()?);
        Ok(image)
    }

    fn lose(&self, record: &Record, why: &str) {
        let (id, origin) = (&self.conf.id, &record.origin);
        eprintln!("blksnap-datapath: snapshot {id} is lost, its image of {origin} cannot be taken over: {why}");
        self.fail(Cause::Lost, record.handle);
    }

    /// Some of its origins have I/O under way still, and others have not.
    pub fn shares_with(&self, rings: &Rings) -> bool {
        let mut slow = self.records.iter().map(|record| rings.contains(record.handle));
        slow.clone().any(|slow| slow) && slow.any(|slow| !slow)
    }

    pub fn fail(&self, cause: Cause, origin: u32) {
        let errno = libc::EIO;
        self.snapshot.fail(Failure { cause, errno, origin });
    }

    /// The image of an origin, for its engine.
    pub fn take_image(&mut self, handle: u32) -> Option<Image> {
        let place = self.images.iter().position(|(owner, _)| *owner == handle)?;
        Some(self.images.swap_remove(place).1)
    }

    /// Stores it, as a part of this life.
    pub fn keep(self, server: &Server) -> Result<Ready> {
        let kept = self
            .memory
            .iter()
            .map(|[taken, table]| {
                Ok(KeptFlip {
                    _table: server.keep_memory(table)?,
                    taken: server.keep_memory(taken)?,
                    live: None,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let conf = SnapshotConf {
            page: self.snapshot.page.memory().id(),
            ..self.conf
        };
        let kept = server.keep_snapshot(&conf, None, &self.snapshot.page, kept)?;
        let images = self.records.iter().map(info).collect();
        let entry = SnapshotEntry {
            storage_identity: self.storage_identity,
            taken_at: self.snapshot.page.taken_at(),
            images,
            memory: self.memory,
            kept: keeps(kept),
            told_low: self.snapshot.storage.low(),
            told_failed: self.snapshot.failed(),
            told_full: self.snapshot.failed(),
            snapshot: self.snapshot,
        };
        Ok(Ready {
            handle: conf.handle,
            id: conf.id,
            entry,
        })
    }
}

fn info(record: &Record) -> ImageInfo {
    let (base, active) = (record.base, record.active);
    ImageInfo {
        origin: record.origin.clone(),
        size: record.size,
        generation: record.generation.clone(),
        number: active - 1,
        base,
        oldest: if base == 0 { 0 } else { base + 1 },
        writable: record.writable,
        chunk_size: record.chunk_size,
        chunk_count: record.size.div_ceil(record.chunk_size),
        path: record.device.map(devices::node_of).unwrap_or_default(),
        device: record.device,
        error: String::new(),
    }
}

/// Puts the storages to use, when all their tables have been read, and fails the snapshots of origins that are gone.
pub fn settle(all: &mut [Found], origins: &[Origin]) {
    for found in all {
        found.snapshot.storage.resume(found.used);
        for record in &found.records {
            if !origins.iter().any(|origin| origin.handle() == record.handle) {
                found.fail(Cause::Detached, record.handle);
            }
        }
        // Its record has to say what the table now means.
        let renewed: Vec<_> = found
            .records
            .iter()
            .zip(&found.memory)
            .map(|(record, [taken, table])| Record {
                table: table.id(),
                taken: taken.id(),
                ..record.clone()
            })
            .collect();
        if found.snapshot.page.phase() == Phase::Taken {
            found.snapshot.page.take(found.snapshot.page.taken_at(), &renewed);
        }
    }
}
