// SPDX-License-Identifier: GPL-2.0-or-later
//! What of each origin and snapshot is in the descriptor store, so that a process after this one can go on (`recover`).
//!
//! Order is everything: what an origin or a take needs is stored before it exists, the descriptor that makes it exist
//! comes last, and is the first to go. A memory is kept as long as somebody holds its token.

use super::error::{Refusal, Result};
use super::server::Server;
use crate::engine::mail::Flip;
use crate::engine::Front;
use crate::mem::Shared;
use crate::pages::snapshot::{Page, Record};
use crate::store::{Kept, Name};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

/// Of what is written below; another number is not understood.
pub const VERSION: u32 = 1;

/// What an origin was told at its beginning, and the id of its state page.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OriginConf {
    pub version: u32,
    pub handle: u32,
    pub name: String,
    pub label: String,
    pub block_size: u64,
    pub read_only: bool,
    pub tracking: bool,
    pub front: Front,
    /// The number of its block device, once it has one.
    pub ublk_id: Option<u32>,
    /// Its device-mapper device: made by us, or there before us; "": none.
    #[serde(default)]
    pub top: String,
    #[serde(default)]
    pub insert: String,
    pub state: u64,
}

/// What a snapshot was told at its beginning, and the id of its page.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotConf {
    pub version: u32,
    pub handle: u32,
    pub id: String,
    pub limit: u64,
    pub low_space: u64,
    pub step: u64,
    pub chunk_size: u64,
    pub page: u64,
}

/// Dropped in this order: first what makes it exist.
#[derive(Debug)]
pub struct KeptOrigin {
    conf: Kept,
    /// Rewritings of it.
    version: u32,
    _file: Kept,
    _listener: Kept,
    _ring: Kept,
    _state: Arc<Kept>,
    live: Arc<Kept>,
    taken: Arc<Kept>,
}

#[derive(Debug)]
pub struct KeptSnapshot {
    _conf: Kept,
    _file: Kept,
    _page: Arc<Kept>,
    images: Vec<KeptFlip>,
}

impl KeptOrigin {
    /// Its block device is known now: what it was told at its beginning is told anew.
    pub fn has_device(&mut self, server: &Server, conf: &OriginConf) -> Result<()> {
        let (life, handle) = (server.life, conf.handle);
        self.version += 1;
        let version = self.version;
        // The new one is there before the old one goes: there is no moment without.
        self.conf = server.keep(Name::Origin { life, handle, version }, conf_memory(conf)?.reader())?;
        server.store_sync()
    }
}

/// The memory of one image, and the live map that came with it.
#[derive(Clone, Debug)]
pub struct KeptFlip {
    pub _table: Arc<Kept>,
    pub taken: Arc<Kept>,
    pub live: Option<Arc<Kept>>,
}

/// A place for tokens that many see and one empties.
pub type Keeps<T> = Arc<Mutex<Option<T>>>;

pub fn keeps<T>(kept: T) -> Keeps<T> {
    Arc::new(Mutex::new(Some(kept)))
}

fn refusal(error: &std::io::Error) -> Refusal {
    match error.kind() {
        std::io::ErrorKind::TimedOut => Refusal::timed_out(error.to_string()),
        std::io::ErrorKind::StorageFull => Refusal::limit(error.to_string()),
        _ => Refusal::io("the descriptor store", error),
    }
}

fn conf_memory(conf: &impl Serialize) -> Result<Shared> {
    let text = serde_json::to_vec(conf).map_err(|error| Refusal::invalid(error.to_string()))?;
    let memory = Shared::new(c"blksnap-conf", text.len(), false).map_err(|error| Refusal::io("memory", &error))?;
    memory.span(0, text.len()).copy_from(&text);
    Ok(memory)
}

impl Server {
    fn keep(&self, name: Name, fd: impl AsFd) -> Result<Kept> {
        self.store.keep(name, fd.as_fd()).map_err(|error| refusal(&error))
    }

    /// Returns when all that was stored or forgotten so far really is.
    pub fn store_sync(&self) -> Result<()> {
        self.store.sync().map_err(|error| refusal(&error))
    }

    /// Keeps a memory; one that is kept already once more.
    pub fn keep_memory(&self, memory: &Shared) -> Result<Arc<Kept>> {
        let id = memory.id();
        let mut known = self.memory.lock().expect("a panic aborts the process");
        known.retain(|_, kept| kept.strong_count() > 0);
        if let Some(kept) = known.get(&id).and_then(std::sync::Weak::upgrade) {
            return Ok(kept);
        }
        let kept = Arc::new(self.keep(Name::Memory { life: self.life, id }, memory.reader())?);
        known.insert(id, Arc::downgrade(&kept));
        Ok(kept)
    }

    /// Keeps all of an origin. `files` None: file and socket are in the store already, from an earlier life.
    pub fn keep_origin(
        &self,
        conf: &OriginConf,
        files: Option<(&File, &UnixListener)>,
        ring: &OwnedFd,
        [state, live, taken]: [&Shared; 3],
    ) -> Result<KeptOrigin> {
        let (life, handle) = (self.life, conf.handle);
        let (file, listener) = (Name::OriginFile(handle), Name::Listener(handle));
        let (file, listener) = match files {
            Some(files) => (self.keep(file, files.0)?, self.keep(listener, files.1)?),
            None => (self.store.adopt(file), self.store.adopt(listener)),
        };
        let ring = self.keep(Name::Ring { life, handle }, ring)?;
        let (state, live) = (self.keep_memory(state)?, self.keep_memory(live)?);
        let taken = self.keep_memory(taken)?;
        let version = 0;
        let name = Name::Origin { life, handle, version };
        Ok(KeptOrigin {
            conf: self.keep(name, conf_memory(conf)?.reader())?,
            version,
            _file: file,
            _listener: listener,
            _ring: ring,
            _state: state,
            live,
            taken,
        })
    }

    /// Keeps which block device an origin has.
    pub fn keep_device(&self, origin: &super::registry::Origin, device: u32) -> Result<()> {
        let conf = OriginConf {
            ublk_id: Some(device),
            ..(*origin.conf).clone()
        };
        match origin.kept.lock().expect("a panic aborts the process").as_mut() {
            Some(kept) => kept.has_device(self, &conf),
            None => Ok(()),
        }
    }

    /// Keeps all of a snapshot, as [`Self::keep_origin`].
    pub fn keep_snapshot(
        &self,
        conf: &SnapshotConf,
        file: Option<&File>,
        page: &Page,
        images: Vec<KeptFlip>,
    ) -> Result<KeptSnapshot> {
        let (life, handle) = (self.life, conf.handle);
        let file = match file {
            Some(file) => self.keep(Name::SnapshotFile(handle), file)?,
            None => self.store.adopt(Name::SnapshotFile(handle)),
        };
        let page = self.keep_memory(page.memory())?;
        Ok(KeptSnapshot {
            _conf: self.keep(Name::Snapshot { life, handle }, conf_memory(conf)?.reader())?,
            _file: file,
            _page: page,
            images,
        })
    }

    /// Keeps what the flip of one origin brings; before its gate closes, as a rule. A `store_sync` has to follow.
    pub fn keep_flip(&self, flip: &Flip) -> Result<KeptFlip> {
        Ok(KeptFlip {
            _table: self.keep_memory(&flip.image.table)?,
            taken: self.keep_memory(&flip.taken)?,
            live: flip.live.as_deref().map(|live| self.keep_memory(live)).transpose()?,
        })
    }
}

/// The images of a snapshot are in use from now on: what they replaced may be forgotten.
pub fn took(snapshot: &Keeps<KeptSnapshot>, flips: Vec<KeptFlip>) {
    if let Some(kept) = snapshot.lock().expect("a panic aborts the process").as_mut() {
        kept.images = flips;
    }
}

/// The maps of an origin are others from now on.
pub fn changed(origin: &Keeps<KeptOrigin>, live: Option<Arc<Kept>>, taken: Arc<Kept>) {
    if let Some(kept) = origin.lock().expect("a panic aborts the process").as_mut() {
        kept.taken = taken;
        if let Some(live) = live {
            kept.live = live;
        }
    }
}

/// Forgets all there is.
pub fn forget<T>(kept: &Keeps<T>) {
    let kept = kept.lock().expect("a panic aborts the process").take();
    drop(kept);
}

/// One image as the snapshot's page tells it to the process after us.
pub fn record(handle: u32, flipped: &crate::engine::mail::Flipped, origin: &str, writable: bool) -> Record {
    let (numbers, geometry) = (flipped.map.numbers, flipped.geometry);
    Record {
        handle,
        origin: origin.to_owned(),
        table: flipped.table.id(),
        taken: flipped.map.taken.id(),
        base: numbers.base(),
        active: numbers.active(),
        generation: flipped.map.generation.clone(),
        size: geometry.size(),
        block_size: geometry.block_size(),
        chunk_size: flipped.chunk_size,
        writable,
        device: None,
    }
}
