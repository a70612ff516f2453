// SPDX-License-Identifier: GPL-2.0-or-later
//! What a process that died left in the store, by kind. Of lives that did not come to their end of recovery: nothing.

use crate::store::Name;
use crate::sys::process;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

#[derive(Debug, Default)]
pub struct Left {
    /// The last complete life; 0: there was none.
    pub life: u64,
    pub origins: BTreeMap<u32, (u32, File)>,
    pub snapshots: BTreeMap<u32, File>,
    pub origin_files: BTreeMap<u32, File>,
    pub listeners: BTreeMap<u32, OwnedFd>,
    pub snapshot_files: BTreeMap<u32, File>,
    pub memory: BTreeMap<u64, File>,
}

/// The number of the life that begins; larger than that of any, also of one that was cut off.
pub fn life_after<'a>(names: impl IntoIterator<Item = &'a Name>) -> u64 {
    names.into_iter().filter_map(|name| name.life()).max().unwrap_or(0) + 1
}

impl Left {
    pub fn sort(found: BTreeMap<Name, OwnedFd>) -> Self {
        let complete = |name: &Name| match *name {
            Name::Life(life) => Some(life),
            _ => None,
        };
        let mut left = Self {
            life: found.keys().filter_map(complete).max().unwrap_or(0),
            ..Self::default()
        };
        for (name, fd) in found {
            if name.life().is_some_and(|life| life != left.life) {
                continue;
            }
            if let Name::Listener(handle) = name {
                left.listeners.insert(handle, fd);
                continue;
            }
            let file = File::from(fd);
            match name {
                Name::Origin { handle, version, .. } => {
                    let newer = left.origins.get(&handle).is_none_or(|(other, _)| *other < version);
                    if newer {
                        left.origins.insert(handle, (version, file));
                    }
                }
                Name::Snapshot { handle, .. } => drop(left.snapshots.insert(handle, file)),
                Name::OriginFile(handle) => drop(left.origin_files.insert(handle, file)),
                Name::SnapshotFile(handle) => drop(left.snapshot_files.insert(handle, file)),
                Name::Memory { id, .. } => drop(left.memory.insert(id, file)),
                Name::Lock | Name::Control | Name::Listener(_) | Name::Life(_) | Name::Ring { .. } => {}
            }
        }
        left
    }

    /// The highest handle that is in use.
    pub fn highest_handle(&self) -> u32 {
        let handles = self.origins.keys().chain(self.snapshots.keys());
        let files = self.origin_files.keys().chain(self.snapshot_files.keys());
        handles.chain(files).copied().max().unwrap_or(0)
    }
}

/// Waits until no I/O of any earlier process is under way: its rings are gone (see `ring::Ring::hold`). As long as it
/// takes: a disk that hangs owes a write, and going on before that lands would lose a newer one.
pub fn await_rings(found: &BTreeMap<Name, OwnedFd>) {
    for (name, fd) in found {
        let Name::Ring { handle, .. } = name else {
            continue;
        };
        let mut waited = 0;
        // Nothing is ever written to the pipe: readable is hung up. An error cannot be waited out.
        while let Ok(false) = process::poll(&[fd.as_fd()], Some(Duration::from_secs(10))).map(|ready| ready[0]) {
            waited += 10;
            eprintln!(
                "blksnap-datapath: waits for writes of the process that died ({waited} s): a disk owes an answer \
                 (origin {handle}, or a storage of its snapshots)"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[Name]) -> BTreeMap<Name, OwnedFd> {
        let null = File::open("/dev/null").expect("open");
        names
            .iter()
            .map(|name| (*name, null.try_clone().expect("dup").into()))
            .collect()
    }

    #[test]
    fn only_the_last_complete_life_counts() {
        let (life, cut) = (3, 4);
        let names = [
            Name::Lock,
            Name::Life(2),
            Name::Life(life),
            Name::Origin {
                life: 2,
                handle: 1,
                version: 9,
            },
            Name::Origin {
                life,
                handle: 1,
                version: 0,
            },
            Name::Origin {
                life,
                handle: 1,
                version: 2,
            },
            Name::Origin {
                life: cut,
                handle: 1,
                version: 0,
            },
            Name::OriginFile(1),
            Name::SnapshotFile(8),
            Name::Memory { life, id: 5 },
            Name::Memory { life: cut, id: 6 },
        ];
        assert_eq!(life_after(&names), 5);
        let left = Left::sort(found(&names));
        assert_eq!((left.life, left.highest_handle()), (3, 8));
        assert_eq!(
            left.origins
                .iter()
                .map(|(handle, (version, _))| (*handle, *version))
                .collect::<Vec<_>>(),
            [(1, 2)]
        );
        assert_eq!(left.memory.keys().copied().collect::<Vec<_>>(), [5]);
    }

    #[test]
    fn a_first_life_follows_nothing() {
        assert_eq!(life_after(&[Name::Lock]), 1);
        // Files alone are what is left of something that never was or is gone.
        let left = Left::sort(found(&[Name::OriginFile(1), Name::Memory { life: 1, id: 1 }]));
        assert_eq!((left.life, left.memory.len(), left.origins.len()), (0, 0, 0));
    }
}
