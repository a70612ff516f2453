// SPDX-License-Identifier: GPL-2.0-or-later
//! Origins that were left: file, maps and numbers, and their queue threads.

use super::left::Left;
use super::memory::{conf, passes, Memory};
use super::snapshots::Found;
use crate::cbt::{self, Geometry, Numbers};
use crate::control::devices::{self, Attachment};
use crate::control::ends;
use crate::control::error::{Refusal, Result};
use crate::control::keeping::{keeps, OriginConf};
use crate::control::nodes;
use crate::control::origins::{new_map, no_ring};
use crate::control::registry;
use crate::control::server::Server;
use crate::engine::mail::Mailbox;
use crate::engine::{Engine, Front, Map, Resumed, Setup};
use crate::mem::{Shared, PAGE};
use crate::origin;
use crate::pages::state;
use crate::snapshot::Cause;
use crate::sys::{self, Node};
use crate::ublk::stamp;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

/// An origin that is to run.
pub struct Origin {
    conf: OriginConf,
    setup: Setup,
    state_page: Arc<Shared>,
    ring_life: Option<OwnedFd>,
    kept: Option<registry::Origin>,
    /// File and socket are in the store already.
    stored: bool,
    /// Why a new generation begins; "": none does.
    reset: &'static str,
}

/// All origins that can go on. Raised when this process lacks something.
pub fn build(server: &Server, left: &mut Left, memory: &mut Memory, snapshots: &mut [Found]) -> Result<Vec<Origin>> {
    let mut all = Vec::new();
    for (handle, (_, file)) in std::mem::take(&mut left.origins) {
        let origin_file = left.origin_files.remove(&handle);
        let lost = |error: &dyn std::fmt::Display| {
            eprintln!("blksnap-datapath: an origin is lost, it cannot be taken over: {error}");
        };
        let conf: OriginConf = match conf(&file) {
            Ok(conf) => conf,
            Err(error) if passes(&error) => return Err(Refusal::io("an origin that was left", &error)),
            Err(error) => {
                lost(&error);
                continue;
            }
        };
        let listener = left.listeners.remove(&handle).map(UnixListener::from);
        let (Some(file), Some(listener)) = (origin_file, listener) else {
            lost(&format!("the descriptors of {} are not there any more", conf.name));
            continue;
        };
        match sys::node(&file) {
            Ok(node) => all.push(one(server, conf, (file, node), listener, memory, snapshots)?),
            Err(error) => lost(&format!("{}: {error}", conf.name)),
        }
    }
    Ok(all)
}

/// Maps and numbers as they were.
struct Tracked {
    map: Map,
    geometry: Geometry,
    modified_ns: i128,
    resumed: Resumed,
}

fn tracked(conf: &OriginConf, memory: &mut Memory) -> io::Result<Tracked> {
    let wrong = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    let page = memory.owned(conf.state, c"blksnap-state")?;
    if page.len() != PAGE {
        return Err(wrong("its state page is none"));
    }
    let found = state::read(page.words(0, state::WORDS)).ok_or_else(|| wrong("its state page says nothing"))?;
    let state = found.state;
    let cbt = |error: cbt::CbtError| wrong(&error.to_string());
    let geometry = Geometry::new(state.size, state.block_size).map_err(cbt)?;
    let numbers = Numbers::new(state.base, state.active).map_err(cbt)?;
    let live = memory.shared(state.live, c"blksnap-map")?;
    let taken = memory.shared(state.taken, c"blksnap-map")?;
    let count = geometry.block_count();
    if live.len() != count || taken.len() != count {
        return Err(wrong("its maps do not fit it"));
    }
    cbt::validate_map(live.bytes(0, count), numbers).map_err(cbt)?;
    let map = Map {
        live,
        taken,
        numbers,
        taken_base: state.taken_base,
        generation: found.generation,
        live_sequence: state.live_sequence + 1,
        taken_sequence: state.taken_sequence + 1,
        epoch: 1,
    };
    let resumed = Resumed {
        images: Vec::new(),
        suspicion: state.suspicion,
        broken: state.broken,
        written: found.written,
    };
    Ok(Tracked {
        map,
        geometry,
        modified_ns: state.modified_ns,
        resumed,
    })
}

/// A new generation, for an origin whose map is lost.
fn anew(conf: &OriginConf, node: Node) -> Result<Tracked> {
    let geometry = Geometry::new(node.size, conf.block_size)?;
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid");
    let map = Map {
        live: new_map(geometry, false)?,
        taken: new_map(geometry, false)?,
        numbers: Numbers::START,
        taken_base: 0,
        generation: uuid.map_err(|error| Refusal::io("a uuid", &error))?.trim().to_owned(),
        live_sequence: 1,
        taken_sequence: 1,
        epoch: 1,
    };
    Ok(Tracked {
        map,
        geometry,
        modified_ns: node.modified_ns,
        resumed: Resumed::default(),
    })
}

/// An origin whose devices are left, and nothing else.
pub fn noted(server: &Server, conf: OriginConf, file: File, node: Node) -> Result<Origin> {
    let socket = server.nbd_socket(&conf.name);
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)
        .map_err(|error| Refusal::io(&format!("the socket {}", socket.display()), &error))?;
    let tracked = anew(&conf, node)?;
    let origin = assemble(server, conf, (file, node), listener, tracked)?;
    Ok(Origin {
        stored: false,
        reset: "the data path was killed together with what keeps its memory: what changed until then is not known",
        ..origin
    })
}

fn one(
    server: &Server,
    conf: OriginConf,
    (file, node): (File, Node),
    listener: UnixListener,
    memory: &mut Memory,
    snapshots: &mut [Found],
) -> Result<Origin> {
    let (name, handle) = (&conf.name, conf.handle);
    let mut lost_map = false;
    let mut tracked = match tracked(&conf, memory) {
        Ok(tracked) => tracked,
        Err(error) if passes(&error) => return Err(Refusal::io(name, &error)),
        Err(error) => {
            eprintln!("blksnap-datapath: the map of {name} is lost ({error}): a new generation begins");
            lost_map = true;
            anew(&conf, node)?
        }
    };
    for snapshot in snapshots {
        if let Some(image) = snapshot.take_image(handle) {
            // Nobody knows what was written without the old map; the chunks are whole, but not what they differ from.
            if lost_map {
                snapshot.fail(Cause::Lost, handle);
            }
            tracked.resumed.images.push(image);
        }
    }
    // As it was last looked at: whoever wrote since, when nobody was there, is found as ever.
    let known = Node {
        modified_ns: tracked.modified_ns,
        ..node
    };
    let origin = assemble(server, conf, (file, known), listener, tracked)?;
    Ok(Origin {
        reset: if lost_map {
            "its map was lost when the data path died"
        } else {
            ""
        },
        ..origin
    })
}

fn assemble(
    server: &Server,
    conf: OriginConf,
    (file, node): (File, Node),
    listener: UnixListener,
    tracked: Tracked,
) -> Result<Origin> {
    let name = &conf.name;
    let socket = server.nbd_socket(name);
    let state_page = Shared::new(c"blksnap-state", PAGE, false).map_err(|error| Refusal::io("memory", &error))?;
    let state_page = Arc::new(state_page);
    let (ring_life, ring_held) = sys::process::pipe().map_err(|error| Refusal::io("a pipe", &error))?;
    let mailbox = Arc::new(Mailbox::new().map_err(|error| Refusal::io("an event descriptor", &error))?);
    let setup = Setup {
        handle: conf.handle,
        name: name.clone(),
        label: conf.label.clone(),
        socket: socket.display().to_string(),
        front: conf.front,
        origin: origin::Origin::new(file, node, conf.read_only),
        geometry: tracked.geometry,
        tracking: conf.tracking,
        map: tracked.map,
        listener,
        mailbox,
        bell: server.bell.clone(),
        ring_held,
        resumed: tracked.resumed,
    };
    let words = state_page.words(0, state::WORDS);
    state::set_written(words, setup.resumed.written);
    setup.state().write(words);
    Ok(Origin {
        conf: OriginConf {
            state: state_page.id(),
            ..conf
        },
        setup,
        state_page,
        ring_life: Some(ring_life),
        kept: None,
        stored: true,
        reset: "",
    })
}

impl Origin {
    pub fn handle(&self) -> u32 {
        self.conf.handle
    }

    pub fn name(&self) -> &str {
        &self.conf.name
    }

    /// It was not in the store.
    pub fn is_noted(&self) -> bool {
        !self.stored
    }

    /// Stores it, as a part of this life.
    pub fn keep(mut self, server: &Server) -> Result<Self> {
        let map = &self.setup.map;
        let memory = [&*self.state_page, &*map.live, &*map.taken];
        let ring = self.ring_life.take().expect("kept once");
        let files = (self.setup.origin.file(), &self.setup.listener);
        let kept = server.keep_origin(&self.conf, (!self.stored).then_some(files), &ring, memory)?;
        let identity = self.setup.origin.node().identity;
        // The one its users are on.
        let mapped = [&self.conf.insert, &self.conf.top]
            .into_iter()
            .find(|name| !name.is_empty());
        let below = mapped.and_then(|name| nodes::front_below(name, stamp::stamp(identity.0, false)));
        let ublk_id = below.or(self.conf.ublk_id);
        self.kept = Some(registry::Origin {
            name: self.conf.name.clone(),
            handle: self.conf.handle,
            mailbox: Arc::clone(&self.setup.mailbox),
            identity,
            block_size: self.conf.block_size,
            tracking: self.conf.tracking,
            state_page: Arc::clone(&self.state_page),
            socket: server.nbd_socket(&self.conf.name),
            attachment: Attachment {
                front: self.conf.front,
                ublk_id,
                node: ublk_id.map(devices::node_of).unwrap_or_default(),
                ..Attachment::default()
            },
            conf: Arc::new(self.conf.clone()),
            anew: (map.generation.clone(), self.reset),
            last: Arc::default(),
            kept: keeps(kept),
        });
        Ok(self)
    }

    /// Has it known before it starts: it does not answer, but is told of as it was.
    pub fn register(&self, server: &Server) {
        let entry = self.kept.clone().expect("stored before it is told of");
        let mut reading = self.setup.reading();
        entry.complete(&mut reading);
        entry.remember(&reading, &self.setup.map);
        server.registry().origins.insert(entry.name.clone(), entry);
    }

    /// Starts its queue thread, and has its block devices go on: first its own (`devices::recover_origin_device`).
    pub fn start(self, server: &Server) -> Result<()> {
        let mut entry = self.kept.expect("stored before it starts");
        let size = self.setup.geometry.size();
        Engine::start(self.setup, self.state_page).map_err(|error| no_ring(&error))?;
        if entry.attachment.front == Front::Ublk {
            let go_on = |device| devices::recover_origin_device(&entry, device);
            let make = || match self.stored {
                true => devices::make_origin_device(&entry, size, self.conf.read_only),
                // Its users have another one, or none.
                false => Err(Refusal::invalid("its block device cannot be taken over")),
            };
            let device = again(entry.attachment.ublk_id, go_on, make).inspect_err(|_| {
                // What is in the store is for the next process.
                if !self.stored {
                    server.undo(&entry, false);
                }
            })?;
            if self.conf.ublk_id != Some(device) {
                entry.attachment.ublk_id = Some(device);
                entry.attachment.node = devices::node_of(device);
                server.keep_device(&entry, device)?;
            }
            if let Err(refusal) = nodes::adopt(&mut entry, device) {
                eprintln!("blksnap-datapath: origin {}: {}", entry.name, refusal.message);
            }
            Self::start_images(server, &entry)?;
        }
        server.registry().origins.insert(entry.name.clone(), entry);
        Ok(())
    }

    fn start_images(server: &Server, origin: &registry::Origin) -> Result<()> {
        let entries: Vec<_> = server.registry().snapshots.values().cloned().collect();
        for entry in entries {
            let id = &entry.snapshot.id;
            let mine = entry.images.iter().enumerate();
            for (place, info) in mine.filter(|(_, info)| info.origin == origin.name) {
                let go_on = |device| devices::recover_image_device(origin, device, id);
                let make = || devices::make_image_device(origin, id, info.size, info.writable);
                let device = again(info.device, go_on, make)?;
                entry.snapshot.page.set_device(place, device);
                if let Some(entry) = server.registry().snapshots.get_mut(id) {
                    entry.images[place].device = Some(device);
                    entry.images[place].path = devices::node_of(device);
                }
            }
        }
        Ok(())
    }
}

/// Has a block device go on; makes another when it is gone, was never in service, or there was none.
fn again(
    device: Option<u32>,
    go_on: impl FnOnce(u32) -> Result<()>,
    make: impl FnOnce() -> Result<u32>,
) -> Result<u32> {
    let Some(device) = device else {
        return make();
    };
    match go_on(device) {
        Ok(()) => Ok(device),
        Err(refusal) if refusal.code == "not-found" => {
            let _ = ends::forget_device(device);
            make()
        }
        Err(refusal) => Err(refusal),
    }
}
