// SPDX-License-Identifier: GPL-2.0-or-later
//! What udev is told about origins and about devices of ours, in files its rules read (docs/datapath-protocol.md, "What
//! udev is told"; dbus/udev). Nothing here can fail an operation: without udev there is nobody to be told.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// What a block device is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role<'a> {
    /// It is tracked: used by way of its node only.
    Origin,
    /// Ours over the origin of that kernel name, below the device-mapper device that is its node.
    Device { origin: &'a str },
    /// Ours over an origin, and its node.
    Node { origin: &'a str },
    /// An image; `name` is its name in `/dev/blksnap/SNAPSHOT/`.
    Image {
        origin: &'a str,
        snapshot: &'a str,
        name: &'a str,
    },
}

impl Role<'_> {
    fn lines(self) -> String {
        let mut text = String::new();
        let mut line = |key, value: &str| {
            // A value ends with its line; none of ours has two, and what is not plain is not passed on.
            let plain = value
                .chars()
                .filter(|one| one.is_ascii_alphanumeric() || "_.:+-".contains(*one));
            let _ = writeln!(text, "BLKSNAP_{key}={}", plain.collect::<String>());
        };
        match self {
            Self::Origin => line("ROLE", "origin"),
            Self::Device { origin } => {
                line("ROLE", "device");
                line("ORIGIN", origin);
            }
            Self::Node { origin } => {
                line("ROLE", "node");
                line("ORIGIN", origin);
            }
            Self::Image { origin, snapshot, name } => {
                line("ROLE", "image");
                line("ORIGIN", origin);
                line("SNAPSHOT", snapshot);
                line("NAME", name);
            }
        }
        text
    }
}

/// The files of this process; who makes devices says so from anywhere. Before [`begin`], nobody is told anything.
static FILES: OnceLock<Files> = OnceLock::new();

/// Says from now on what devices are for, in the directory `udev` of a runtime directory. What a data path said before
/// goes on until [`forget_all_but`].
pub fn begin(runtime_directory: &Path) {
    FILES.get_or_init(|| Files::new(runtime_directory));
}

/// Forgets all devices but these: a data path that ended without a word may have left some.
pub fn forget_all_but(kernel_names: &BTreeSet<String>) {
    if let Some(files) = FILES.get() {
        files.forget_all_but(kernel_names);
    }
}

/// Says what the device `kernel_name` is for. For a device of ours: before it appears. It may be said again.
pub fn say(kernel_name: &str, role: Role<'_>) {
    if let Some(files) = FILES.get() {
        files.say(kernel_name, role);
    }
}

/// The device is nobody's any more.
pub fn forget(kernel_name: &str) {
    if let Some(files) = FILES.get() {
        files.forget(kernel_name);
    }
}

#[derive(Debug)]
struct Files {
    directory: PathBuf,
}

impl Files {
    fn new(runtime_directory: &Path) -> Self {
        Self {
            directory: runtime_directory.join("udev"),
        }
    }

    fn say(&self, kernel_name: &str, role: Role<'_>) {
        if let Err(error) = self.write(kernel_name, role) {
            eprintln!("blksnap-datapath: udev is not told about {kernel_name}: {error}");
        }
    }

    fn write(&self, kernel_name: &str, role: Role<'_>) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        // Never half a file: a rule may read it at any time. A name with a dot in front is no device's.
        let part = self.directory.join(format!(".{kernel_name}"));
        fs::write(&part, role.lines())?;
        fs::rename(part, self.directory.join(kernel_name))
    }

    fn forget(&self, kernel_name: &str) {
        let _ = fs::remove_file(self.directory.join(kernel_name));
    }

    /// Those that are forgotten are looked at again.
    fn forget_all_but(&self, kernel_names: &BTreeSet<String>) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            if !kernel_names.contains(name) {
                let _ = fs::remove_file(entry.path());
                look_again(name);
            }
        }
    }
}

/// Has udev look at a device again (Documentation/ABI/testing/sysfs-uevent).
pub fn look_again(kernel_name: &str) {
    // Not there, no sysfs, not permitted: then nobody has a wrong idea of it either.
    let _ = fs::write(format!("/sys/class/block/{kernel_name}/uevent"), "change");
}

/// What the kernel calls the block device of that number; None when it is not there (any more).
pub fn kernel_name(device: u64) -> Option<String> {
    kernel_name_at(&crate::dm::table::number(device))
}

/// As [`kernel_name`], of the number as the kernel writes it ("259:3").
pub fn kernel_name_at(number: &str) -> Option<String> {
    let target = fs::read_link(Path::new("/sys/dev/block").join(number)).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// The name of a device-mapper device (Documentation/ABI/testing/sysfs-block-dm); None for any other.
pub fn dm_name(device: u64) -> Option<String> {
    let name = fs::read_to_string(crate::sys::sysfs_of(device).join("dm/name")).ok()?;
    Some(name.trim_end().to_owned())
}

/// What the kernel calls the device-mapper device of that name.
pub fn kernel_name_of_dm(name: &str) -> Option<String> {
    let called = |path: &Path| fs::read_to_string(path.join("dm/name")).is_ok_and(|found| found.trim_end() == name);
    let devices = fs::read_dir("/sys/block").ok()?.flatten().map(|entry| entry.path());
    let found = devices.into_iter().find(|path| called(path))?;
    Some(found.file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("blksnap-udev-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn what_is_said_can_be_read_and_forgotten() {
        let runtime = directory("say");
        let files = Files::new(&runtime);
        files.say("nosuch0", Role::Origin);
        let image = Role::Image {
            origin: "sdb1",
            snapshot: "0b1f5c3e-9a0d-4c52-8f4e-8d8d2a6c1e55",
            name: "sdb1",
        };
        files.say("ublkb7", image);
        let read = |name: &str| fs::read_to_string(runtime.join("udev").join(name));
        assert_eq!(read("nosuch0").unwrap(), "BLKSNAP_ROLE=origin\n");
        assert_eq!(
            read("ublkb7").unwrap(),
            "BLKSNAP_ROLE=image\nBLKSNAP_ORIGIN=sdb1\nBLKSNAP_SNAPSHOT=0b1f5c3e-9a0d-4c52-8f4e-8d8d2a6c1e55\nBLKSNAP_NAME=sdb1\n"
        );
        files.forget("ublkb7");
        assert!(read("ublkb7").is_err());
        files.say("ublkb8", image);
        files.forget_all_but(&BTreeSet::from(["ublkb8".to_owned()]));
        assert!(read("ublkb8").is_ok() && read("nosuch0").is_err());
        files.forget_all_but(&BTreeSet::new());
        assert_eq!(fs::read_dir(runtime.join("udev")).unwrap().count(), 0);
        fs::remove_dir_all(runtime).unwrap();
    }

    #[test]
    fn a_value_cannot_say_more_than_itself() {
        let role = Role::Device {
            origin: "sdb1\nBLKSNAP_ROLE=node/$env{X}",
        };
        assert_eq!(
            role.lines(),
            "BLKSNAP_ROLE=device\nBLKSNAP_ORIGIN=sdb1BLKSNAP_ROLEnodeenvX\n"
        );
    }
}
