// SPDX-License-Identifier: GPL-2.0-or-later
//! Getting under a live device-mapper device (an LVM volume, an opened LUKS device), mounted or not.
//!
//! Its table moves to a second device NAME-blksnap, which becomes the origin; then the live one is put over the front
//! device. LVM makes room for a snapshot under a volume in the same way.

use super::error::{Refusal, Result};
use super::node::{failed, make, remove, swap, Device, Node, LONGEST, SUFFIX, UNDER};
use crate::dm::{link, Dm, Status, Table, Udev, PREFIX};
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

/// On the way under a live device: its table is on a second device too. Dropped, it is as if nothing had been.
#[derive(Debug)]
pub struct Insertion {
    dm: Arc<Dm>,
    live: Status,
    under: String,
    under_device: u64,
    table: Table,
    done: bool,
}

impl Insertion {
    /// Makes the second device; the origin is its descriptor. The live device is not touched yet.
    ///
    /// Raised (invalid) for a device that cannot be got under, (busy) for one that must not be in use to be tracked,
    /// (exists) when we are under it already.
    pub fn prepare(dm: &Arc<Dm>, name: &str) -> Result<(Self, File)> {
        let refuse = |why: String| {
            Err(Refusal::invalid(format!(
                "no tracker can get under /dev/mapper/{name}: {why}"
            )))
        };
        if name.len() > LONGEST {
            return refuse(format!("its name is longer than {LONGEST} characters"));
        }
        let look = |error: io::Error| failed("getting under", name, &error);
        let live = dm.status(name).map_err(look)?;
        if live.uuid.starts_with(&format!("{PREFIX}{UNDER}")) {
            return refuse("it is itself the device under another one".into());
        }
        if live.read_only {
            return refuse("it is read-only".into());
        }
        if live.suspended || live.inactive || !live.active {
            return Err(Refusal::busy(format!(
                "{name} is being worked on by another program (it is suspended, or a new table is loaded)"
            )));
        }
        let table = dm.table(name).map_err(look)?;
        if let Some(kind) = table.unmovable() {
            let reason = match kind {
                "multipath" => "it is a multipath device, which can be no other kind of device meanwhile".into(),
                kind => format!("it has a {kind:?} target, which keeps a state of its own and is there only once"),
            };
            return Err(must_not_be_in_use(name, &reason));
        }
        let under = format!("{name}{SUFFIX}");
        let uuid = format!("{PREFIX}{UNDER}{name}");
        if let Some(old) = dm.find(&under).map_err(look)? {
            // What a removal could not remove, and nobody has open now.
            if old.uuid != uuid || dm.table(&under).map_err(look)? != table || dm.remove(&under).is_err() {
                return Err(Refusal::exists(format!(
                    "{name} has a tracker under it already (the device-mapper device {under} exists)"
                )));
            }
            link::vanish(&under, old.device);
        }
        // ENOKEY: the key of a LUKS device is in a keyring that only cryptsetup could read.
        let under_device = make(dm, &under, &uuid, &table, false, Udev::Hide).map_err(|refusal| {
            if refusal.errno == Some(libc::ENOKEY) {
                let reason =
                    "its key is in a keyring that nobody but cryptsetup could read (not so when it is opened with \
                              cryptsetup --disable-keyring)";
                return must_not_be_in_use(name, reason);
            }
            refusal
        })?;
        let insertion = Self {
            dm: Arc::clone(dm),
            live,
            under,
            under_device,
            table,
            done: false,
        };
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_EXCL | libc::O_DIRECT);
        let origin = options
            .open(link::node(under_device))
            .map_err(|error| failed("opening", &insertion.under, &error))?;
        Ok((insertion, origin))
    }

    /// Nobody has the live device open: its content stands still, but for who opens it now.
    pub fn is_idle(&self) -> bool {
        self.live.open_count == 0
    }

    /// Puts the live device over `front`. What was in flight has gone the old way and has ended; what comes goes through
    /// the tracker. On an error the live device is as it was; the origin must be closed before this is dropped.
    pub fn complete(&mut self, front: Device) -> Result<Node> {
        let name = self.live.name.clone();
        if front.size != self.table.size() {
            let (ours, theirs) = (front.size, self.table.size());
            return Err(Refusal::invalid(format!(
                "{name} has {theirs} bytes, the device to put under it {ours}"
            )));
        }
        let look = |error: io::Error| failed("getting under", &name, &error);
        let now = self.dm.status(&name).map_err(look)?;
        if now.suspended || now.inactive || self.dm.table(&name).map_err(look)? != self.table {
            return Err(Refusal::busy(format!(
                "another program changed the table of {name} meanwhile; try again"
            )));
        }
        swap(&self.dm, &name, &front.linear()).map_err(look)?;
        self.done = true;
        let node = Node::inserted(Arc::clone(&self.dm), name, self.live.device, self.under.clone(), front);
        Ok(node)
    }
}

/// Nobody can get under it; over it one can, and that becomes what is mounted.
fn must_not_be_in_use(name: &str, reason: &str) -> Refusal {
    Refusal::busy(format!(
        "/dev/mapper/{name} is in use, and no tracker can get under it: {reason}. Unmount it or stop what uses it, attach \
         it, and mount the Node of its tracker instead"
    ))
}

impl Drop for Insertion {
    fn drop(&mut self) {
        if !self.done {
            // What cannot be removed (it is still open) is left to `leftovers`.
            let _ = remove(&self.dm, &self.under, self.under_device);
        }
    }
}
