// SPDX-License-Identifier: GPL-2.0-or-later
//! What exists: origins with their queue threads, snapshots with their images. No decisions, no waiting for I/O.

use super::devices::Attachment;
use super::error::{Refusal, Result};
use super::keeping::{Keeps, KeptOrigin, KeptSnapshot, OriginConf};
use super::nodes;
use super::notes::Note;
use crate::cbt::Geometry;
use crate::engine::mail::{Letter, Mailbox};
use crate::engine::reading::Reading;
use crate::engine::Map;
use crate::mem::Shared;
use crate::snapshot::{Cause, Snapshot};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc::{sync_channel, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a queue thread may take to answer a letter. It answers at once unless a disk holds it in a write.
pub const ANSWER_S: u64 = 10;

#[derive(Clone, Debug)]
pub struct Origin {
    pub name: String,
    pub handle: u32,
    pub mailbox: Arc<Mailbox>,
    pub identity: (u64, u64),
    /// As asked for at attach; 0 = by the rule.
    pub block_size: u64,
    pub tracking: bool,
    pub state_page: Arc<Shared>,
    pub socket: PathBuf,
    pub attachment: Attachment,
    /// What it was told at its beginning.
    pub conf: Arc<OriginConf>,
    /// The generation it came back with, and why that is a new one ("": it is not).
    pub anew: (String, &'static str),
    pub last: Arc<Mutex<Option<(Reading, Map)>>>,
    pub kept: Keeps<KeptOrigin>,
}

impl Origin {
    /// Posts a letter and waits for its answer.
    pub fn ask<T>(&self, letter: impl FnOnce(SyncSender<T>) -> Letter) -> Result<T> {
        self.ask_for(Duration::from_secs(ANSWER_S), letter)
    }

    fn ask_for<T>(&self, patience: Duration, letter: impl FnOnce(SyncSender<T>) -> Letter) -> Result<T> {
        let (answer, answered) = sync_channel(1);
        self.mailbox.post(letter(answer));
        let name = &self.name;
        answered.recv_timeout(patience).map_err(|error| match error {
            RecvTimeoutError::Disconnected => Refusal::not_found(format!("origin {name} has ended")),
            RecvTimeoutError::Timeout => {
                Refusal::timed_out(format!("origin {name} does not answer: its disk holds it in a write"))
            }
        })
    }

    pub fn read(&self) -> Result<(Reading, Map, Geometry)> {
        let mut read = self.ask(Letter::Read)?;
        self.complete(&mut read.0);
        self.remember(&read.0, &read.1);
        Ok(read)
    }

    /// Adds to a reading what the queue thread does not know.
    pub fn complete(&self, reading: &mut Reading) {
        let attachment = &self.attachment;
        reading.node.clone_from(&attachment.node);
        reading.top.clone_from(&attachment.top);
        reading.insert.clone_from(&attachment.insert);
        if reading.generation == self.anew.0 {
            reading.reset = self.anew.1;
        }
        if let Some(device) = attachment.ublk_id {
            reading.ublk_id = i64::from(device);
            reading.clients += u32::from(nodes::in_use(self));
        }
        if let Some(reason) = nodes::astray(self).filter(|_| reading.state == "tracking") {
            (reading.state, reading.reason) = ("broken", reason);
        }
    }

    /// For when no new one is to be had.
    pub fn remember(&self, reading: &Reading, map: &Map) {
        *self.last.lock().expect("a panic aborts the process") = Some((reading.clone(), map.clone()));
    }

    /// The last reading there was, for when no new one is to be had.
    pub fn last(&self) -> Option<(Reading, Map)> {
        self.last.lock().expect("a panic aborts the process").clone()
    }

    /// A reading for a list: one origin whose disk hangs must not keep the others from being seen. Its last reading
    /// then says so in `reason`.
    pub fn glance(&self) -> Option<Reading> {
        match self.ask_for(Duration::from_secs(1), Letter::Read) {
            Ok(mut read) => {
                self.complete(&mut read.0);
                self.remember(&read.0, &read.1);
                Some(read.0)
            }
            Err(refusal) if refusal.code == "timed-out" => self.last().map(|(mut reading, _)| {
                reading.reason = "it does not answer: its disk holds it in a write";
                reading
            }),
            Err(_) => None,
        }
    }
}

/// An image as SNAPSHOT and the answer to a take tell it.
#[derive(Clone, Debug, Serialize)]
pub struct ImageInfo {
    pub origin: String,
    pub size: u64,
    pub generation: String,
    pub number: u32,
    pub base: u32,
    pub oldest: u32,
    pub writable: bool,
    pub chunk_size: u64,
    pub chunk_count: u64,
    /// Its block device; "": it is an export of its origin's socket only.
    pub path: String,
    #[serde(skip)]
    pub device: Option<u32>,
    /// Why it cannot be read; "": it can.
    pub error: String,
}

#[derive(Clone, Debug)]
pub struct SnapshotEntry {
    pub snapshot: Arc<Snapshot>,
    pub storage_identity: (u64, u64),
    pub taken_at: u64,
    pub images: Vec<ImageInfo>,
    /// Taken map and chunk table of each image.
    pub memory: Vec<[Arc<Shared>; 2]>,
    pub kept: Keeps<KeptSnapshot>,
    /// Events that have been told.
    pub told_low: bool,
    pub told_failed: bool,
    pub told_full: bool,
}

/// SNAPSHOT in docs/datapath-protocol.md.
#[derive(Debug, Serialize)]
pub struct SnapshotReading {
    snapshot: String,
    state: &'static str,
    error: String,
    errno: i32,
    limit: u64,
    used: u64,
    allocated: u64,
    low_space: u64,
    chunk_size: u64,
    low: bool,
    taken_at: u64,
    images: Vec<ImageInfo>,
}

#[derive(Debug, Default)]
pub struct Registry {
    pub origins: BTreeMap<String, Origin>,
    pub snapshots: BTreeMap<String, SnapshotEntry>,
    pub handles: u32,
    /// Origins to be, when their disks have answered a process that died.
    pub awaited: Vec<Note>,
    /// Origins whose end was told.
    pub told_broken: Vec<u32>,
}

impl Registry {
    pub fn origin(&self, name: &str) -> Result<Origin> {
        let found = self.origins.get(name).cloned();
        found.ok_or_else(|| Refusal::not_found(format!("origin {name} is not tracked")))
    }

    /// A number for an origin or a snapshot that nothing has or had.
    pub fn next_handle(&mut self) -> u32 {
        self.handles += 1;
        self.handles
    }

    pub fn snapshot(&self, id: &str) -> Result<SnapshotEntry> {
        let found = self.snapshots.get(id).cloned();
        found.ok_or_else(|| Refusal::not_found(format!("there is no snapshot {id}")))
    }

    /// The block devices of an origin's images, with their snapshots.
    pub fn image_devices(&self, origin: &str) -> Vec<(String, u32)> {
        let images = |entry: &SnapshotEntry| {
            let mine = entry.images.iter().filter(|image| image.origin == origin);
            mine.filter_map(|image| image.device).next()
        };
        let entries = self.snapshots.iter();
        entries
            .filter_map(|(id, entry)| Some((id.clone(), images(entry)?)))
            .collect()
    }

    /// An image has no block device any more.
    pub fn forget_image_device(&mut self, snapshot: &str, origin: &str) {
        let entry = self.snapshots.get_mut(snapshot);
        let images = entry.into_iter().flat_map(|entry| &mut entry.images);
        for image in images.filter(|image| image.origin == origin) {
            image.device = None;
            image.path.clear();
        }
    }

    /// The name of an origin by its handle, also when it has left.
    pub fn name_of(&self, handle: u32) -> String {
        let found = self.origins.values().find(|origin| origin.handle == handle);
        found.map_or_else(|| "(detached)".into(), |origin| origin.name.clone())
    }

    pub fn reading(&self, entry: &SnapshotEntry) -> SnapshotReading {
        let failure = entry.snapshot.failure();
        let error = failure.map(|failure| describe(failure.cause, failure.errno));
        let error = error.unwrap_or_default();
        let mut images = entry.images.clone();
        for image in &mut images {
            image.error.clone_from(&error);
        }
        let storage = &entry.snapshot.storage;
        SnapshotReading {
            snapshot: entry.snapshot.id.clone(),
            state: match (failure, entry.images.is_empty()) {
                (Some(_), _) => "failed",
                (None, true) => "created",
                (None, false) => "taken",
            },
            error,
            errno: failure.map_or(0, |failure| failure.errno),
            limit: storage.limit(),
            used: storage.used(),
            allocated: storage.allocated(),
            low_space: storage.low_space(),
            chunk_size: entry.snapshot.chunk_size,
            low: storage.low(),
            taken_at: entry.taken_at,
            images,
        }
    }
}

/// Why a snapshot failed, in words.
pub fn describe(cause: Cause, errno: i32) -> String {
    let error = super::error::words(&std::io::Error::from_raw_os_error(errno));
    match cause {
        Cause::NoSpace => "the difference storage is full".into(),
        Cause::Storage => format!("the difference storage cannot be used: {error}"),
        Cause::Origin => format!("old data of the origin could not be read: {error}"),
        Cause::Stalled => "the difference storage did not finish a write in time".into(),
        Cause::Detached => "its origin was detached".into(),
        Cause::Lost => "its chunks were lost when the data path died".into(),
    }
}
