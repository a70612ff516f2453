// SPDX-License-Identifier: GPL-2.0-or-later
//! What lies on what: the block devices below a device, and those a file is on. Reads sysfs, decides nothing.

use crate::fsfreeze;
use crate::sys;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A set of device numbers.
pub type Devices = BTreeSet<u64>;

/// What sysfs does not know: which origin is behind a front device of ours, by their numbers.
pub type Fronts = BTreeMap<u64, u64>;

/// A device and all it lies on: through device-mapper and md, loop devices and the file systems of their files,
/// partitions, and ourselves.
pub fn below(device: u64, fronts: &Fronts) -> Devices {
    let mut found = Devices::new();
    let mut waiting = vec![device];
    while let Some(device) = waiting.pop() {
        if !found.insert(device) {
            continue;
        }
        waiting.extend(fronts.get(&device));
        let directory = directory(device);
        for slave in fs::read_dir(directory.join("slaves")).into_iter().flatten().flatten() {
            waiting.extend(number_in(&slave.path().join("dev")));
        }
        if directory.join("partition").exists() {
            // /sys/dev/block/M:m leads to …/disk/partition.
            waiting.extend(
                fs::canonicalize(&directory)
                    .ok()
                    .and_then(|path| number_in(&path.join("../dev"))),
            );
        }
        if let Ok(path) = fs::read_to_string(directory.join("loop/backing_file")) {
            // One that was deleted, or is in another mount namespace, is not found by its path.
            waiting.extend(File::open(path.trim_end_matches('\n')).iter().flat_map(under_file));
        }
    }
    found
}

/// The device a block device is, or those of the file system that a file or directory is on (btrfs may have several).
pub fn under_file(file: &File) -> Vec<u64> {
    let Ok(node) = sys::node(file) else {
        return file
            .metadata()
            .map_or_else(|_| Vec::new(), |metadata| file_system(file, metadata.dev()));
    };
    if node.block {
        return vec![node.identity.0];
    }
    file_system(file, node.identity.0)
}

fn file_system(file: &File, device: u64) -> Vec<u64> {
    use std::os::fd::AsFd;
    let Some(id) = fsfreeze::btrfs_id(file.as_fd()) else {
        return vec![device];
    };
    let devices = Path::new("/sys/fs/btrfs").join(id).join("devices");
    let devices = fs::read_dir(devices).into_iter().flatten().flatten();
    devices.filter_map(|link| number_in(&link.path().join("dev"))).collect()
}

/// Where file systems of this device are mounted, as far as our mount namespace knows.
pub fn mount_points(device: u64) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounted(&table, device)
}

fn mounted(table: &str, device: u64) -> Vec<PathBuf> {
    let wanted = crate::dm::table::number(device);
    let point = |line: &str| {
        let mut words = line.split(' ').skip(2);
        let matches = words.next()? == wanted;
        matches
            .then(|| words.nth(1).map(|word| PathBuf::from(unescape(word))))
            .flatten()
    };
    table.lines().filter_map(point).collect()
}

/// Blanks and the like are written as three octal digits (`mangle` in fs/proc_namespace.c).
fn unescape(word: &str) -> String {
    let escapes = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\043", "#"),
        ("\\134", "\\"),
    ];
    escapes
        .iter()
        .fold(word.to_owned(), |word, (escape, plain)| word.replace(escape, plain))
}

fn directory(device: u64) -> PathBuf {
    Path::new("/sys/dev/block").join(crate::dm::table::number(device))
}

fn number_in(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_found_by_device_number() {
        let table = "\
29 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 29 253:7 / /srv/a\\040b rw shared:5 - xfs /dev/mapper/x rw
31 29 253:7 /sub /mnt rw - xfs /dev/mapper/x rw
32 29 253:77 / /other rw - xfs /dev/mapper/y rw
";
        let found = mounted(table, libc::makedev(253, 7));
        assert_eq!(found, [PathBuf::from("/srv/a b"), PathBuf::from("/mnt")]);
    }

    #[test]
    fn an_origin_is_below_its_front_device_and_both_are_below_what_lies_on_it() {
        let (front, origin) = (libc::makedev(4000, 1), libc::makedev(4000, 2));
        let fronts = Fronts::from([(front, origin)]);
        assert_eq!(below(front, &fronts), Devices::from([front, origin]));
        assert_eq!(below(origin, &fronts), Devices::from([origin]));
    }

    #[test]
    fn a_file_is_on_the_device_of_its_file_system() {
        let file = File::open("/proc/self/mountinfo").expect("proc");
        assert_eq!(under_file(&file), [file.metadata().expect("metadata").dev()]);
    }
}
