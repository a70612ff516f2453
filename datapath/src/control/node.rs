// SPDX-License-Identifier: GPL-2.0-or-later
//! Device-mapper devices over the front device of an origin: a top of our own, or a live device that we got under.
//!
//! Each step leaves the device that users hold with a whole table, and resumed, whatever fails. Which origin wants what
//! is not known here.

use super::error::{Refusal, Result};
use crate::dm::{link, Dm, Freeze, Table, Udev, PREFIX};
use crate::fsfreeze::{keep_code, NoReclaimIo};
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What stands behind the name of a live device, for the device that got its table.
pub const SUFFIX: &str = "-blksnap";
pub(super) const TOP: &str = "top-";
pub(super) const UNDER: &str = "lower-";
/// So that name and uuid of both devices fit (`DM_NAME_LEN`, `DM_UUID_LEN`).
pub(super) const LONGEST: usize = 112;

/// A block device by its number, with its size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    pub number: u64,
    pub size: u64,
}

impl Device {
    pub(super) fn linear(self) -> Table {
        Table::linear(self.number, self.size)
    }
}

/// What users mount or use.
#[derive(Debug)]
pub struct Node {
    dm: Arc<Dm>,
    name: String,
    device: u64,
    /// The device that got the table of the live one; None: the node is a top of our own.
    under: Option<String>,
    /// None: it has been let go.
    front: Mutex<Option<Device>>,
}

pub(super) fn failed(what: &str, name: &str, error: &io::Error) -> Refusal {
    let text = format!("{what} the device-mapper device {name}");
    match error.raw_os_error() {
        Some(libc::EBUSY) => Refusal::busy(format!("{text}: it, or a device below it, is in use")),
        Some(libc::ENXIO) => Refusal::not_found(format!("{text}: there is no such device")),
        _ => Refusal::io(&text, error),
    }
}

/// A table that is loaded and taken into use; what was in flight has ended by then. On an error the old one is in use.
pub(super) fn swap(dm: &Dm, name: &str, table: &Table) -> io::Result<()> {
    keep_code();
    let _quiet = NoReclaimIo::begin();
    dm.load(name, table, false)?;
    let swapped = dm
        .suspend(name, Freeze::No)
        .and_then(|()| dm.resume(name, Udev::Keep).map(drop));
    if swapped.is_err() {
        let _ = dm.clear(name);
        let _ = dm.resume(name, Udev::Keep);
    }
    swapped
}

/// A device with a table in use; gone again on an error.
pub(super) fn make(dm: &Dm, name: &str, uuid: &str, table: &Table, read_only: bool, udev: Udev) -> Result<u64> {
    let device = dm
        .create(name, uuid)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => Refusal::exists(format!("there is a device-mapper device {name} already")),
            _ => failed("making", name, &error),
        })?
        .device;
    let made = dm
        .load(name, table, read_only)
        .and_then(|()| dm.resume(name, udev).map(drop))
        .and_then(|()| link::appear(name, device));
    made.map_err(|error| {
        let _ = remove(dm, name, device);
        failed("making", name, &error)
    })?;
    Ok(device)
}

/// Removes a device. udev's probing holds one for a moment, and a ring's files close late: that is waited for.
pub(super) fn remove(dm: &Dm, name: &str, device: u64) -> io::Result<()> {
    let end = Instant::now() + Duration::from_secs(3);
    loop {
        match dm.remove(name) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) if error.raw_os_error() != Some(libc::ENXIO) => return Err(error),
            _ => {
                link::vanish(name, device);
                return Ok(());
            }
        }
    }
}

/// Whether somebody has it mounted, or holds it otherwise. Who merely has it open is not seen.
fn held(device: u64) -> bool {
    let mut options = File::options();
    let probe = options.read(true).custom_flags(libc::O_EXCL).open(link::node(device));
    probe.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

impl Node {
    /// A new device /dev/mapper/NAME over `front`. What is left of one of that name, and not in use, goes.
    pub fn top(dm: &Arc<Dm>, name: &str, front: Device, read_only: bool) -> Result<Self> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&byte);
        if name.is_empty() || name.len() > LONGEST || !name.bytes().all(plain) || name == "control" {
            return Err(Refusal::invalid(format!("{name:?} cannot name a device-mapper device")));
        }
        let uuid = format!("{PREFIX}{TOP}{name}");
        let found = dm.find(name).map_err(|error| failed("looking at", name, &error))?;
        if let Some(old) = found.filter(|old| old.uuid == uuid) {
            dm.remove(name).map_err(|error| failed("replacing", name, &error))?;
            link::vanish(name, old.device);
        }
        let device = make(dm, name, &uuid, &front.linear(), read_only, Udev::Show)?;
        Ok(Self {
            dm: Arc::clone(dm),
            name: name.to_owned(),
            device,
            under: None,
            front: Mutex::new(Some(front)),
        })
    }

    /// A live device that goes through `front` now.
    pub(super) fn inserted(dm: Arc<Dm>, name: String, device: u64, under: String, front: Device) -> Self {
        Self {
            dm,
            name,
            device,
            under: Some(under),
            front: Mutex::new(Some(front)),
        }
    }

    /// The node of an origin whose data path was killed: it is all there. `live`: we are under a device that was there
    /// before us.
    pub fn adopt(dm: &Arc<Dm>, name: &str, live: bool, front: Device) -> Result<Self> {
        let status = dm.status(name).map_err(|error| failed("looking at", name, &error))?;
        Ok(Self {
            dm: Arc::clone(dm),
            name: name.to_owned(),
            device: status.device,
            under: live.then(|| format!("{name}{SUFFIX}")),
            front: Mutex::new(Some(front)),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn dm(&self) -> Arc<Dm> {
        Arc::clone(&self.dm)
    }

    pub fn device(&self) -> u64 {
        self.device
    }

    pub fn path(&self) -> PathBuf {
        link::path(&self.name)
    }

    /// We are under a device that was there before us.
    pub fn is_live(&self) -> bool {
        self.under.is_some()
    }

    fn front(&self) -> MutexGuard<'_, Option<Device>> {
        self.front.lock().expect("a panic aborts the process")
    }

    /// Why I/O of the node no longer goes through the tracker (LVM, among others, reloads tables as it sees fit); None: it
    /// does, or we let it go ourselves. A node whose state cannot be read is not trusted.
    pub fn astray(&self) -> Option<&'static str> {
        let front = self.front();
        let wanted = (*front)?.linear();
        match self.dm.table(&self.name) {
            Ok(table) if table == wanted => None,
            Ok(_) => Some("another program has put another table under its device-mapper device"),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                Some("another program has removed its device-mapper device")
            }
            Err(_) => Some("its device-mapper device cannot be looked at"),
        }
    }

    /// Somebody has it open: a mount, a holder, or a program for a moment.
    pub fn is_open(&self) -> bool {
        self.dm.status(&self.name).is_ok_and(|status| status.open_count > 0)
    }

    /// Somebody has it mounted, or holds it otherwise. Who merely has it open is not seen.
    pub fn is_held(&self) -> bool {
        held(self.device)
    }

    /// Puts the node over another front device (a larger one); what was in flight on the old one has ended.
    pub fn swap_to(&self, front: Device) -> Result<()> {
        let mut now = self.front();
        swap(&self.dm, &self.name, &front.linear()).map_err(|error| failed("moving", &self.name, &error))?;
        *now = Some(front);
        Ok(())
    }

    /// Follows a front device that has grown to `size` bytes.
    pub fn grow(&self, size: u64) -> Result<()> {
        let front = *self.front();
        match front {
            Some(front) if front.size != size => self.swap_to(Device { size, ..front }),
            _ => Ok(()),
        }
    }

    /// Gives a live device its own table back. One whose table another program has changed is left alone.
    ///
    /// The device underneath stays until [`Self::remove`]: the queue thread still has it open.
    pub fn take_out(&self) -> Result<()> {
        let (Some(under), None) = (&self.under, self.astray()) else {
            return Ok(());
        };
        let front = self.front().take();
        let restored = self
            .dm
            .table(under)
            .and_then(|table| swap(&self.dm, &self.name, &table));
        restored.map_err(|error| {
            *self.front() = front;
            failed("taking the tracker out from under", &self.name, &error)
        })
    }

    /// Puts a top straight over `origin`. `release` ends the tracker and closes its origin, which device-mapper needs for
    /// itself; nothing is in flight when it is called, and what comes waits. When it fails the top is as it was.
    pub fn bypass<T>(&self, origin: Device, release: impl FnOnce() -> Result<T>) -> Result<T> {
        keep_code();
        let _quiet = NoReclaimIo::begin();
        let bad = |error: io::Error| failed("putting the tracker aside from under", &self.name, &error);
        let front = self.front().take();
        let suspended = self.dm.suspend(&self.name, Freeze::No).map_err(bad);
        let released = suspended.and_then(|()| release());
        let loaded = match &released {
            // The ring closes its files behind our back.
            Ok(_) => patiently(|| self.dm.load(&self.name, &origin.linear(), false)),
            Err(_) => Ok(()),
        };
        let resumed = self.dm.resume(&self.name, Udev::Keep);
        if released.is_err() {
            *self.front() = front;
        }
        let released = released?;
        loaded.and(resumed.map(drop)).map_err(bad)?;
        Ok(released)
    }

    /// Removes what we made: the top, or the device under a live one. Raised (busy) when it is in use.
    pub fn remove(&self) -> Result<()> {
        let name = self.under.as_ref().unwrap_or(&self.name);
        let bad = |error: io::Error| failed("removing", name, &error);
        let Some(status) = self.dm.find(name).map_err(bad)? else {
            return Ok(());
        };
        if self.under.is_none() && self.is_held() {
            return Err(Refusal::busy(format!("{} is mounted or in use", self.path().display())));
        }
        let front = self.front().take();
        remove(&self.dm, name, status.device).map_err(|error| {
            *self.front() = front;
            bad(error)
        })
    }
}

fn patiently(mut attempt: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let end = Instant::now() + Duration::from_secs(3);
    loop {
        match attempt() {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}
