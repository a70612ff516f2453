// SPDX-License-Identifier: GPL-2.0-or-later
//! Calls to /dev/mapper/control, one method each. Devices are named by their name; sizes are in bytes.

use super::table::{text, Table};
use super::uapi::{self as uapi, Head, NAME_LEN, UUID_LEN};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const CONTROL: &str = "/dev/mapper/control";

/// The device-mapper of this kernel.
#[derive(Debug)]
pub struct Dm(File);

/// What happens to a file system on a device that is suspended. I/O in flight is waited for in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freeze {
    /// It is frozen: written out, and clean on the device.
    Yes,
    /// It is left alone; its I/O waits.
    No,
}

/// What udev's rules do with a device when they hear of its resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Udev {
    /// All they do with a device that is for use.
    Show,
    /// A name in /dev/mapper, and nothing else: not looked into, not offered.
    Hide,
    /// As they did until now: the event says nothing.
    Keep,
}

impl Udev {
    /// libdevmapper's way to pass flags without a cookie to wait on (`dm_task_set_cookie` with sync support off).
    fn event_nr(self) -> u32 {
        let flags = match self {
            Self::Show => uapi::UDEV_PRIMARY_SOURCE | uapi::UDEV_DISABLE_LIBRARY_FALLBACK,
            Self::Hide => {
                uapi::UDEV_PRIMARY_SOURCE
                    | uapi::UDEV_DISABLE_LIBRARY_FALLBACK
                    | uapi::UDEV_DISABLE_SUBSYSTEM_RULES
                    | uapi::UDEV_DISABLE_DISK_RULES
                    | uapi::UDEV_DISABLE_OTHER_RULES
            }
            Self::Keep => 0,
        };
        flags << uapi::UDEV_SHIFT
    }
}

/// `DM_DEV_STATUS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub name: String,
    pub uuid: String,
    pub device: u64,
    pub open_count: u32,
    pub suspended: bool,
    pub read_only: bool,
    /// A table is in use / is loaded but not in use yet.
    pub active: bool,
    pub inactive: bool,
}

/// One argument: the head and what follows it, aligned as the kernel's structures are.
struct Argument(Vec<u64>);

impl Argument {
    fn new(name: &str, room: usize) -> io::Result<Self> {
        let size = (size_of::<Head>() + room).next_multiple_of(size_of::<u64>());
        let mut argument = Self(vec![0; size / size_of::<u64>()]);
        let head = argument.head();
        head.version = uapi::VERSION;
        head.data_size = size as u32;
        head.data_start = size_of::<Head>() as u32;
        put(name, &mut head.name)?;
        Ok(argument)
    }

    fn head(&mut self) -> &mut Head {
        // SAFETY: the buffer is at least a head long and aligned to eight; any bytes are a valid head.
        unsafe { &mut *self.0.as_mut_ptr().cast::<Head>() }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let len = self.0.len() * size_of::<u64>();
        // SAFETY: the same memory, as bytes.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }

    /// What the kernel put behind the head.
    fn data(&mut self) -> &[u8] {
        let start = (self.head().data_start as usize).min(self.0.len() * size_of::<u64>());
        &self.bytes()[start..]
    }
}

impl Drop for Argument {
    /// A table may have held a key.
    fn drop(&mut self) {
        for word in &mut self.0 {
            // SAFETY: a live, aligned word; volatile, so that it is not optimised away.
            unsafe { std::ptr::write_volatile(word, 0) };
        }
    }
}

fn put(text: &str, into: &mut [u8]) -> io::Result<()> {
    if text.len() >= into.len() || text.contains(['\0', '/']) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    into[..text.len()].copy_from_slice(text.as_bytes());
    Ok(())
}

impl Dm {
    /// Raised with words when there is no device-mapper, or none that is of use.
    pub fn open() -> Result<Self, String> {
        let file = File::options().read(true).write(true).open(CONTROL);
        let dm = Self(file.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "device-mapper is not in this kernel or not loaded (modprobe dm_mod)".to_owned()
            }
            _ => format!("{CONTROL} cannot be opened: {}", plain(&error)),
        })?);
        let failed = |error| format!("device-mapper does not answer: {}", plain(&error));
        // The kernel refuses a major version that is not its own.
        let mut argument = Argument::new("", 0).map_err(failed)?;
        dm.call(uapi::DM_VERSION, &mut argument).map_err(failed)?;
        if !dm.targets().map_err(failed)?.iter().any(|name| name == "linear") {
            return Err("this device-mapper has no linear target".into());
        }
        Ok(dm)
    }

    fn call(&self, command: libc::Ioctl, argument: &mut Argument) -> io::Result<()> {
        // SAFETY: the argument is a head with `data_size` bytes of room, as every command of device-mapper wants.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), command, argument.0.as_mut_ptr()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn simple(&self, command: libc::Ioctl, name: &str, flags: u32, event_nr: u32) -> io::Result<Status> {
        let mut argument = Argument::new(name, 0)?;
        argument.head().flags = flags;
        argument.head().event_nr = event_nr;
        self.call(command, &mut argument)?;
        Ok(status_of(argument.head()))
    }

    /// A call whose answer may be of any length.
    fn long(&self, command: libc::Ioctl, name: &str, flags: u32) -> io::Result<Argument> {
        const MOST: usize = 64 << 20;
        let mut room = 16 << 10;
        loop {
            let mut argument = Argument::new(name, room)?;
            argument.head().flags = flags;
            self.call(command, &mut argument)?;
            if argument.head().flags & uapi::BUFFER_FULL == 0 {
                return Ok(argument);
            }
            if room >= MOST {
                return Err(io::Error::from_raw_os_error(libc::E2BIG));
            }
            room *= 4;
        }
    }

    /// The kinds of targets that are loaded.
    pub fn targets(&self) -> io::Result<Vec<String>> {
        let mut argument = self.long(uapi::DM_LIST_VERSIONS, "", 0)?;
        // struct dm_target_versions: next (u32), version (3 × u32), name.
        Ok(records(argument.data(), 16, 0))
    }

    /// The names of all devices.
    pub fn devices(&self) -> io::Result<Vec<String>> {
        let mut argument = self.long(uapi::DM_LIST_DEVICES, "", 0)?;
        // struct dm_name_list: dev (u64), next (u32), name. Without devices: one record of zeroes.
        let mut names = records(argument.data(), 12, 8);
        names.retain(|name| !name.is_empty());
        Ok(names)
    }

    /// A new device without a table; its number.
    pub fn create(&self, name: &str, uuid: &str) -> io::Result<Status> {
        let mut argument = Argument::new(name, 0)?;
        put(uuid, &mut argument.head().uuid)?;
        self.call(uapi::DM_DEV_CREATE, &mut argument)?;
        Ok(status_of(argument.head()))
    }

    /// Loads a table, which comes into use at the next resume.
    pub fn load(&self, name: &str, table: &Table, read_only: bool) -> io::Result<()> {
        let encoded = table.encode();
        let mut argument = Argument::new(name, encoded.len())?;
        argument.head().target_count = table.0.len() as u32;
        argument.head().flags = uapi::SECURE_DATA | if read_only { uapi::READONLY } else { 0 };
        argument.bytes()[size_of::<Head>()..][..encoded.len()].copy_from_slice(&encoded);
        self.call(uapi::DM_TABLE_LOAD, &mut argument)
    }

    /// Forgets a table that was loaded but is not in use.
    pub fn clear(&self, name: &str) -> io::Result<()> {
        self.simple(uapi::DM_TABLE_CLEAR, name, 0, 0).map(drop)
    }

    /// The table in use.
    pub fn table(&self, name: &str) -> io::Result<Table> {
        let mut argument = self.long(
            uapi::DM_TABLE_STATUS,
            name,
            uapi::STATUS_TABLE | uapi::SECURE_DATA | uapi::NOFLUSH,
        )?;
        let count = argument.head().target_count as usize;
        Table::decode(argument.data(), count)
    }

    /// Returns when nothing is in flight on it; what comes now waits. One that is suspended already stays so.
    pub fn suspend(&self, name: &str, freeze: Freeze) -> io::Result<()> {
        let skip = if freeze == Freeze::No { uapi::SKIP_LOCKFS } else { 0 };
        loop {
            match self.simple(uapi::DM_DEV_SUSPEND, name, uapi::SUSPEND | skip, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(drop),
            }
        }
    }

    /// Takes a loaded table into use and lets I/O go on. When the table cannot be taken, the old one stays and the device
    /// is still suspended.
    pub fn resume(&self, name: &str, udev: Udev) -> io::Result<Status> {
        loop {
            match self.simple(uapi::DM_DEV_SUSPEND, name, uapi::SKIP_LOCKFS, udev.event_nr()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Raised (ENXIO) when there is no such device.
    pub fn status(&self, name: &str) -> io::Result<Status> {
        self.simple(uapi::DM_DEV_STATUS, name, 0, 0)
    }

    /// As [`Self::status`], None when there is no such device.
    pub fn find(&self, name: &str) -> io::Result<Option<Status>> {
        match self.status(name) {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Raised (EBUSY) while it is open.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.simple(uapi::DM_DEV_REMOVE, name, 0, 0).map(drop)
    }
}

fn status_of(head: &Head) -> Status {
    let has = |flag| head.flags & flag != 0;
    Status {
        name: text(&head.name[..NAME_LEN]).unwrap_or_default(),
        uuid: text(&head.uuid[..UUID_LEN]).unwrap_or_default(),
        device: device(head.dev),
        open_count: u32::try_from(head.open_count).unwrap_or_default(),
        suspended: has(uapi::SUSPEND),
        read_only: has(uapi::READONLY),
        active: has(uapi::ACTIVE_PRESENT),
        inactive: has(uapi::INACTIVE_PRESENT),
    }
}

/// The kernel's `huge_encode_dev` as a `dev_t` of the C library.
fn device(encoded: u64) -> u64 {
    let (major, minor) = ((encoded >> 8) & 0xfff, (encoded & 0xff) | ((encoded >> 12) & 0xfff00));
    libc::makedev(major as libc::c_uint, minor as libc::c_uint)
}

/// The names in a chain of records of `fixed` bytes and a C string, linked by the word at `next`; 0 ends it.
fn records(bytes: &[u8], fixed: usize, next: usize) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = bytes;
    while let Some(name) = rest.get(fixed..).and_then(text) {
        names.push(name);
        let step = u32::from_ne_bytes(rest[next..next + 4].try_into().expect("four bytes")) as usize;
        match rest.get(step..) {
            Some(following) if step >= fixed => rest = following,
            _ => break,
        }
    }
    names
}

fn plain(error: &io::Error) -> String {
    crate::control::error::words(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_of_records_is_followed_to_its_end_and_not_beyond() {
        let mut bytes = Vec::new();
        for (step, name) in [(24_u32, "linear\0\0"), (0, "zero\0\0\0\0")] {
            bytes.extend(step.to_ne_bytes());
            bytes.extend([0; 12]);
            bytes.extend(name.as_bytes());
        }
        assert_eq!(records(&bytes, 16, 0), ["linear", "zero"]);
        assert_eq!(records(&bytes[..24], 16, 0), ["linear"]);
        assert!(records(&bytes[..18], 16, 0).is_empty());
        assert!(records(&[], 16, 0).is_empty());
    }

    #[test]
    fn names_that_the_kernel_would_cut_off_are_refused() {
        assert!(Argument::new(&"x".repeat(127), 0).is_ok());
        for wrong in [&"x".repeat(128), "a/b", "a\0b"] {
            assert!(Argument::new(wrong, 0).is_err());
        }
    }

    #[test]
    fn device_numbers_are_those_of_the_c_library() {
        assert_eq!(device(0xfd03), libc::makedev(253, 3));
        assert_eq!(device(0x1100_fd03), libc::makedev(253, 0x1_1003));
    }

    #[test]
    fn udev_is_told_by_flags_without_a_cookie() {
        assert_eq!(Udev::Show.event_nr(), 0x60 << 16);
        assert_eq!(Udev::Hide.event_nr(), 0x6e << 16);
        assert_eq!(Udev::Keep.event_nr(), 0);
    }
}
