// SPDX-License-Identifier: GPL-2.0-or-later
//! /dev/mapper/NAME: udev makes it where udev runs; where it does not, we make the same link.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long udev may take; its queue may be long at boot. A link that is made by both is the same link.
const PATIENCE: Duration = Duration::from_millis(500);

pub fn path(name: &str) -> PathBuf {
    Path::new("/dev/mapper").join(name)
}

/// The kernel's own node, there as soon as the device has a table (devtmpfs).
pub fn node(device: u64) -> PathBuf {
    Path::new("/dev").join(format!("dm-{}", libc::minor(device)))
}

fn target(device: u64) -> PathBuf {
    Path::new("..").join(format!("dm-{}", libc::minor(device)))
}

fn udev_runs() -> bool {
    Path::new("/run/udev/control").exists()
}

/// Returns when /dev/mapper/NAME leads to `device`.
pub fn appear(name: &str, device: u64) -> io::Result<()> {
    let path = path(name);
    let end = Instant::now() + PATIENCE;
    while udev_runs() && Instant::now() < end {
        if leads_to(&path, device) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    if leads_to(&path, device) {
        return Ok(());
    }
    // What stands there is of a device that is gone: names are unique in device-mapper.
    let _ = std::fs::remove_file(&path);
    match std::os::unix::fs::symlink(target(device), &path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && leads_to(&path, device) => Ok(()),
        other => other,
    }
}

/// Removes what would be left of a device that is gone. udev does the same, later.
pub fn vanish(name: &str, device: u64) {
    let path = path(name);
    if std::fs::read_link(&path).is_ok_and(|link| link == target(device)) {
        let _ = std::fs::remove_file(path);
    }
}

fn leads_to(path: &Path, device: u64) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.rdev() == device)
}
