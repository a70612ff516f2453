// SPDX-License-Identifier: GPL-2.0-or-later
//! Operations on one origin: add, read, mark, reset. It ends in [`removal`](super::removal).

use super::devices::{self, Attachment};
use super::error::{Refusal, Result};
use super::keeping::{self, keeps, OriginConf, VERSION};
use super::nodes;
use super::notes::Note;
use super::registry::{Origin, Registry};
use super::server::Server;
use super::take::Gates;
use crate::cbt::{self, Geometry, Numbers};
use crate::engine::mail::{Letter, Mailbox};
use crate::engine::reading::Reading;
use crate::engine::{Engine, Front, Map, Resumed, Setup};
use crate::mem::{Shared, PAGE};
use crate::origin;
use crate::pages::state;
use crate::sys;
use crate::udev;
use serde::Deserialize;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

/// An answer: a reading and the memory that goes with it.
pub type WithMaps = (Reading, Vec<Arc<Shared>>);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Add {
    pub origin: String,
    #[serde(default)]
    pub block_size: u64,
    pub generation: String,
    #[serde(default)]
    pub base: u32,
    #[serde(default = "one")]
    pub active: u32,
    #[serde(default)]
    pub read_only: bool,
    #[serde(default = "yes")]
    pub tracking: bool,
    #[serde(default)]
    pub label: String,
    #[serde(default)]
    pub front: Front,
    /// The device-mapper device to make on top, and the one to get under; "": none.
    #[serde(default)]
    pub top: String,
    #[serde(default)]
    pub insert: String,
}

fn one() -> u32 {
    1
}

pub(super) fn yes() -> bool {
    true
}

/// A generation or a snapshot is named by a uuid as Python's `uuid` prints it.
pub fn check_uuid(text: &str) -> Result<()> {
    let dashes = [8, 13, 18, 23];
    let right = text.len() == 36
        && text.bytes().enumerate().all(|(place, byte)| match byte {
            b'-' => dashes.contains(&place),
            byte => !dashes.contains(&place) && matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        });
    if right {
        return Ok(());
    }
    Err(Refusal::invalid(format!("{text:?} is no lower-case uuid with dashes")))
}

fn check_name(name: &str) -> Result<()> {
    let right = (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    if right {
        return Ok(());
    }
    Err(Refusal::invalid(format!("{name:?} cannot name an origin")))
}

/// A new map memfd.
pub fn new_map(geometry: Geometry, populate: bool) -> Result<Arc<Shared>> {
    Shared::new(c"blksnap-map", geometry.block_count(), populate)
        .map(Arc::new)
        .map_err(|error| Refusal::io("memory for a change map", &error))
}

/// Why a queue thread could not be started.
pub fn no_ring(error: &io::Error) -> Refusal {
    match error.raw_os_error() {
        Some(libc::ENOMEM | libc::EAGAIN) => Refusal::limit(
            "no memory can be locked for another origin: raise the limit of locked memory (LimitMEMLOCK= of the unit, \
             ulimit -l)",
        ),
        _ => Refusal::io(
            "io_uring cannot be used here (kernel.io_uring_disabled, a container's filter, a kernel before 6.1)",
            error,
        ),
    }
}

fn saved_map(file: &File, geometry: Geometry, numbers: Numbers) -> Result<Arc<Shared>> {
    let count = geometry.block_count();
    let metadata = file.metadata().map_err(|error| Refusal::io("the saved map", &error))?;
    if metadata.len() != count as u64 {
        let found = metadata.len();
        return Err(Refusal::invalid(format!(
            "the saved map has {found} bytes, not {count}"
        )));
    }
    let map = new_map(geometry, false)?;
    let mut bytes = vec![0_u8; 1 << 16];
    for start in (0..count).step_by(bytes.len()) {
        let part = (count - start).min(bytes.len());
        file.read_exact_at(&mut bytes[..part], start as u64)
            .map_err(|error| Refusal::io("the saved map", &error))?;
        for (to, from) in map.bytes(start, part).iter().zip(&bytes) {
            to.store(*from, Ordering::Relaxed);
        }
    }
    cbt::validate_map(map.bytes(0, count), numbers)?;
    Ok(map)
}

impl Server {
    pub fn add(&self, asked: Add, fds: Vec<OwnedFd>) -> Result<WithMaps> {
        check_name(&asked.origin)?;
        check_uuid(&asked.generation)?;
        let _structure = self.structure();
        if self.registry().origins.contains_key(&asked.origin) {
            return Err(Refusal::exists(format!("origin {} is tracked already", asked.origin)));
        }
        if self.registry().awaited.iter().any(|note| note.name == asked.origin) {
            return Err(Refusal::busy(format!(
                "origin {} is tracked already, and waits for its disk, which owes an answer to a process that died",
                asked.origin
            )));
        }
        if asked.front == Front::Nbd {
            return self.put_in(asked, fds);
        }
        let name = asked.origin.clone();
        self.note(&Note::of(&asked))?;
        let added = self.put_in(asked, fds);
        if added.as_ref().is_err_and(|refusal| refusal.code != "timed-out") {
            self.notes.forget(&name);
        }
        added
    }

    fn put_in(&self, asked: Add, fds: Vec<OwnedFd>) -> Result<WithMaps> {
        let nodes::Given {
            origin: file,
            saved,
            mut insertion,
        } = self.given(&asked, fds)?;
        let node = sys::node(&file).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => Refusal::invalid("the origin is neither a regular file nor a block device"),
            _ => Refusal::io("the origin", &error),
        })?;
        if asked.front == Front::Ublk {
            devices::check_fit(node.block, node.identity.0)?;
        }
        let handle = {
            let mut registry = self.registry();
            let same = |origin: &&Origin| origin.identity == node.identity;
            if let Some(other) = registry.origins.values().find(same) {
                let name = &other.name;
                return Err(Refusal::exists(format!(
                    "this file or device is tracked already, as {name}"
                )));
            }
            let used = |registry: &Registry| {
                registry
                    .snapshots
                    .values()
                    .any(|one| one.storage_identity == node.identity)
            };
            if used(&registry) {
                return Err(Refusal::busy("this file or device is the storage of a snapshot"));
            }
            registry.next_handle()
        };
        if !node.block {
            sys::lock_file(&file).map_err(|error| match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => Refusal::busy("another program holds a lock on this image file"),
                _ => Refusal::io("locking the image file", &error),
            })?;
        }
        let origin = origin::Origin::new(file, node, asked.read_only);
        let diskseq = origin.diskseq();
        let geometry = Geometry::new(node.size, asked.block_size)?;
        let numbers = Numbers::new(asked.base, asked.active)?;
        let live = match &saved {
            Some(saved) => saved_map(saved, geometry, numbers)?,
            None if numbers == Numbers::START => new_map(geometry, false)?,
            None => return Err(Refusal::invalid("numbers continue only with a saved map")),
        };
        let taken = new_map(geometry, false)?;
        if numbers != Numbers::START {
            // Nobody knows the map of the last take any more. What has changed until now covers it: asking it "since
            // N" then names blocks that changed later too, and never misses one.
            let count = geometry.block_count();
            cbt::copy_into(live.bytes(0, count), taken.bytes(0, count));
        }
        let state_page = Shared::new(c"blksnap-state", PAGE, false).map_err(|error| Refusal::io("memory", &error))?;
        let state_page = Arc::new(state_page);
        let socket = self.nbd_socket(&asked.origin);
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)
            .map_err(|error| Refusal::io(&format!("the socket {}", socket.display()), &error))?;
        let mailbox = Arc::new(Mailbox::new().map_err(|error| Refusal::io("an event descriptor", &error))?);
        let conf = OriginConf {
            version: VERSION,
            handle,
            name: asked.origin.clone(),
            label: asked.label.clone(),
            block_size: asked.block_size,
            read_only: asked.read_only,
            tracking: asked.tracking,
            front: asked.front,
            ublk_id: None,
            top: asked.top.clone(),
            insert: asked.insert.clone(),
            state: state_page.id(),
        };
        let (ring_life, ring_held) = sys::process::pipe().map_err(|error| Refusal::io("a pipe", &error))?;
        let kept = self.keep_origin(
            &conf,
            Some((origin.file(), &listener)),
            &ring_life,
            [&state_page, &live, &taken],
        )?;
        let mut entry = Origin {
            name: asked.origin.clone(),
            handle,
            mailbox: Arc::clone(&mailbox),
            identity: node.identity,
            block_size: asked.block_size,
            tracking: asked.tracking,
            state_page: Arc::clone(&state_page),
            socket: socket.clone(),
            attachment: Attachment {
                front: asked.front,
                ..Attachment::default()
            },
            conf: Arc::new(conf),
            anew: (String::new(), ""),
            last: Arc::default(),
            kept: keeps(kept),
        };
        let setup = Setup {
            handle,
            name: asked.origin.clone(),
            label: asked.label.clone(),
            socket: socket.display().to_string(),
            front: asked.front,
            origin,
            geometry,
            tracking: asked.tracking,
            map: Map {
                live,
                taken,
                numbers,
                taken_base: numbers.base(),
                generation: asked.generation.clone(),
                live_sequence: 1,
                taken_sequence: 1,
                epoch: 1,
            },
            listener,
            mailbox,
            bell: self.bell.clone(),
            ring_held,
            resumed: Resumed::default(),
        };
        setup.state().write(state_page.words(0, state::WORDS));
        self.store_sync()?;
        Engine::start(setup, state_page).map_err(|error| {
            let _ = std::fs::remove_file(&socket);
            no_ring(&error)
        })?;
        if let Err(refusal) = self.put_up(&mut entry, &asked, (node.size, diskseq), insertion.as_mut()) {
            // Before `insertion`, whose device it has open.
            self.undo(&entry, refusal.code == "timed-out");
            return Err(refusal);
        }
        self.registry().origins.insert(asked.origin.clone(), entry.clone());
        if node.block {
            if let Some(name) = udev::kernel_name(node.identity.0) {
                udev::say(&name, udev::Role::Origin);
                udev::look_again(&name);
            }
        }
        self.maps_of(&entry)
    }

    /// A reading with live map, taken map and state page.
    pub fn maps_of(&self, origin: &Origin) -> Result<WithMaps> {
        let (reading, map, _) = origin.read()?;
        Ok((reading, vec![map.live, map.taken, Arc::clone(&origin.state_page)]))
    }

    /// `ranges` None: everything.
    pub fn mark(&self, name: &str, ranges: Option<Vec<(u64, u64)>>) -> Result<u64> {
        const MOST: usize = 65_536;
        let origin = self.registry().origin(name)?;
        let all = ranges.is_none();
        let ranges = ranges.unwrap_or_default();
        if ranges.len() > MOST {
            return Err(Refusal::limit(format!(
                "{} ranges at once, at most {MOST}",
                ranges.len()
            )));
        }
        Ok(origin.ask(|answer| Letter::Mark { ranges, all, answer })??)
    }

    pub fn reset(&self, name: &str, generation: String) -> Result<WithMaps> {
        check_uuid(&generation)?;
        let _structure = self.structure();
        let origin = self.registry().origin(name)?;
        let (reading, map, _) = origin.read()?;
        if !reading.snapshots.is_empty() {
            return Err(Refusal::busy(format!("a snapshot of {name} is held")));
        }
        let gates = Gates::close(std::slice::from_ref(&origin), Duration::from_secs(10))?;
        let closed = gates.closed()[0];
        if !closed.broken.is_empty() {
            return Err(Refusal::invalid_state(format!("origin {name}: {}", closed.broken)));
        }
        let geometry = Geometry::new(closed.node.size, origin.block_size)?;
        let map = Map {
            live: new_map(geometry, false)?,
            taken: new_map(geometry, false)?,
            numbers: Numbers::START,
            taken_base: 0,
            generation,
            live_sequence: map.live_sequence + 1,
            taken_sequence: map.taken_sequence + 1,
            epoch: map.epoch + 1,
        };
        let (live, taken) = (self.keep_memory(&map.live)?, self.keep_memory(&map.taken)?);
        self.store_sync()?;
        origin.ask(|answer| Letter::Reset { map, geometry, answer })?;
        drop(gates);
        keeping::changed(&origin.kept, Some(live), taken);
        self.maps_of(&origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_and_uuids_pass() {
        assert!(check_uuid("0b1f5c3e-9a0d-4c52-8f4e-8d8d2a6c1e55").is_ok());
        for wrong in [
            "",
            "0B1F5C3E-9a0d-4c52-8f4e-8d8d2a6c1e55",
            "0b1f5c3e9a0d4c528f4e8d8d2a6c1e55----",
        ] {
            assert!(check_uuid(wrong).is_err(), "{wrong}");
        }
        assert!(check_name("a_1-B").is_ok());
        for wrong in ["", "a/b", "..", "a b", &"x".repeat(65)] {
            assert!(check_name(wrong).is_err(), "{wrong}");
        }
    }
}
