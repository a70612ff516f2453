// SPDX-License-Identifier: GPL-2.0-or-later
//! Origins that are not in the store, but noted (`control::notes`): the data path and what keeps its descriptors were
//! killed together. Their ublk devices wait, and so does who uses them. They are taken over with new maps: a new
//! generation begins. Requests that were under way come again and are marked in it.
//!
//! What an origin cannot be taken over without is checked before anything is touched.

use super::origins::{self, Origin};
use crate::control::error::{Refusal, Result};
use crate::control::keeping::{OriginConf, VERSION};
use crate::control::notes::Note;
use crate::control::server::Server;
use crate::control::{devices, leftovers, nodes};
use crate::dm::{link, Dm, Table};
use crate::engine::Front;
use crate::sys;
use crate::ublk::control::Control;
use crate::ublk::uapi::state;
use crate::udev;
use serde_json::json;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long all may take until others are served. A disk that owes the dead process an answer holds its origin open.
const PATIENCE: Duration = Duration::from_secs(8);
const AGAIN: Duration = Duration::from_millis(20);

/// What became of the notes.
#[derive(Default)]
pub struct Noted {
    pub found: Vec<Origin>,
    /// Those that cannot be taken over: their devices are to go.
    pub unfit: Vec<Note>,
    /// Those whose disks have not answered the dead process yet.
    pub held: Vec<Note>,
}

/// All noted origins but those of `known` names.
pub fn build(server: &Server, known: &[&str]) -> Noted {
    let end = Instant::now() + PATIENCE;
    let mut noted = Noted::default();
    for note in server.notes.all() {
        if known.contains(&note.name.as_str()) {
            continue;
        }
        match take_over(server, &note, end) {
            Ok(origin) => noted.found.push(origin),
            Err(refusal) if refusal.code == "busy" => noted.held.push(note),
            Err(refusal) => {
                eprintln!(
                    "blksnap-datapath: what is left of {} is taken away: {}",
                    note.name, refusal.message
                );
                noted.unfit.push(note);
            }
        }
    }
    noted
}

/// Raised (busy) when something still has the origin open, otherwise when it cannot be.
fn take_over(server: &Server, note: &Note, end: Instant) -> Result<Origin> {
    let device = check(note)?;
    let file = open(note, end)?;
    let node = sys::node(&file).map_err(|error| Refusal::io(&note.label, &error))?;
    let diskseq = sys::diskseq(&file).unwrap_or(0);
    if node.identity.0 != note.device || (note.diskseq != 0 && note.diskseq != diskseq) {
        return Err(Refusal::invalid(format!("{} is another disk now", note.label)));
    }
    let conf = OriginConf {
        version: VERSION,
        handle: server.registry().next_handle(),
        name: note.name.clone(),
        label: note.label.clone(),
        block_size: note.block_size,
        read_only: note.read_only,
        tracking: note.tracking,
        front: Front::Ublk,
        ublk_id: Some(device),
        top: note.top.clone(),
        insert: note.insert.clone(),
        state: 0,
    };
    origins::noted(server, conf, file, node)
}

/// Its ublk device, which is what the note says, and through which its node goes.
fn check(note: &Note) -> Result<u32> {
    let gone = |text: &str| Err(Refusal::not_found(text));
    let below = note.mapped().and_then(|name| nodes::front_below(name, note.stamp()));
    let Some(device) = below.or(note.ublk_id) else {
        return gone("it had no block device yet");
    };
    let info = Control::open().and_then(|mut control| control.info(device));
    let Ok(info) = info else {
        return gone("its block device is gone");
    };
    if info.server_flags != note.stamp() || info.state == state::DEAD {
        return gone("its block device is gone, or was not in service");
    }
    if let Some(name) = note.mapped() {
        let front = devices::number_and_size(device);
        let front = front.map_err(|error| Refusal::io("its block device", &error))?;
        let table = Dm::open()
            .map_err(Refusal::invalid_state)?
            .table(name)
            .map_err(|error| Refusal::io(name, &error))?;
        if table != Table::linear(front.number, front.size) {
            return gone("its device-mapper device goes another way");
        }
    }
    Ok(device)
}

/// Opens the origin for ourselves alone. That this succeeds means that the dead process has no I/O on it any more.
fn open(note: &Note, end: Instant) -> Result<File> {
    let failed = |error: &io::Error| Refusal::io(&format!("opening {}", note.label), error);
    let path = path_of(note).ok_or_else(|| Refusal::not_found(format!("{} is not there any more", note.label)))?;
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_EXCL | libc::O_DIRECT);
    loop {
        match options.open(&path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                if Instant::now() > end {
                    return Err(Refusal::busy(format!("{} is still in use", note.label)));
                }
                std::thread::sleep(AGAIN);
            }
            opened => return opened.map_err(|error| failed(&error)),
        }
    }
}

/// The kernel's own name for it: links are udev's.
fn path_of(note: &Note) -> Option<PathBuf> {
    if udev::dm_name(note.device).is_some() {
        return Some(link::node(note.device));
    }
    // What is a slash in a name in /dev is none in sysfs.
    let name = udev::kernel_name(note.device)?.replace('!', "/");
    Some(PathBuf::from("/dev").join(name))
}

/// Goes on waiting for a disk, on a thread of its own; nobody else can have the origin meanwhile.
pub fn await_disk(server: &Arc<Server>, note: Note) {
    let owned = Arc::clone(server);
    let waited = note.clone();
    let wait = move || {
        eprintln!(
            "blksnap-datapath: {} waits to be taken over: its disk owes the process that died an answer",
            waited.name
        );
        let taken = loop {
            match take_over(&owned, &waited, Instant::now() + Duration::from_secs(3600)) {
                Err(refusal) if refusal.code == "busy" => {}
                other => break other,
            }
        };
        let _structure = owned.structure();
        let started = taken
            .and_then(|origin| origin.keep(&owned))
            .and_then(|origin| owned.store_sync().map(|()| origin))
            .and_then(|origin| origin.start(&owned));
        owned.registry().awaited.retain(|note| note.name != waited.name);
        match started {
            Ok(()) => owned.publish(&json!({
                "event": "origin.recovered", "origin": waited.name, "life": owned.life,
            })),
            Err(refusal) => {
                eprintln!("blksnap-datapath: {}: {}", waited.name, refusal.message);
                leftovers::clear(&owned, &[waited]);
            }
        }
    };
    server.registry().awaited.push(note);
    let started = std::thread::Builder::new()
        .name("awaiting".into())
        .stack_size(512 << 10)
        .spawn(wait);
    if let Err(error) = started {
        eprintln!("blksnap-datapath: no thread: {error}");
    }
}
