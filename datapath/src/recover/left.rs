// SPDX-License-Identifier: GPL-2.0-or-later
//! What a process that died left in the store, by kind. Of lives that did not come to their end of recovery: nothing.

use crate::store::Name;
use crate::sys::process;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

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

/// Earlier processes' rings that may have I/O under way, by the handle of their origin (see `ring::Ring::hold`). A disk that
/// hangs owes a write: going on with that origin before it lands would lose a newer one.
#[derive(Debug, Default)]
pub struct Rings(BTreeMap<u32, Vec<(Name, OwnedFd)>>);

impl Rings {
    pub fn take(found: &mut BTreeMap<Name, OwnedFd>) -> Self {
        let (rings, others) = std::mem::take(found)
            .into_iter()
            .partition(|(name, _)| matches!(name, Name::Ring { .. }));
        *found = others;
        let rings: BTreeMap<Name, OwnedFd> = rings;
        let mut all = Self::default();
        for (name, fd) in rings {
            if let Name::Ring { handle, .. } = name {
                all.0.entry(handle).or_default().push((name, fd));
            }
        }
        all
    }

    /// Waits until none has I/O under way, for at most `patience` (None: as long as it takes). Those that are left have.
    pub fn wait(&mut self, patience: Option<Duration>) {
        let end = patience.map(|patience| Instant::now() + patience);
        self.0.retain(|_, rings| {
            rings.retain(|(_, fd)| {
                let left = end.map(|end| end.saturating_duration_since(Instant::now()));
                // Nothing is ever written to the pipe: readable is hung up. An error cannot be waited out.
                matches!(process::poll(&[fd.as_fd()], left).map(|ready| ready[0]), Ok(false))
            });
            !rings.is_empty()
        });
    }

    pub fn contains(&self, handle: u32) -> bool {
        self.0.contains_key(&handle)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn names(&self) -> Vec<Name> {
        self.0.values().flatten().map(|(name, _)| *name).collect()
    }

    /// Those of one origin.
    pub fn take_out(&mut self, handle: u32) -> Self {
        Self(self.0.remove_entry(&handle).into_iter().collect())
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
    fn only_rings_with_io_under_way_are_waited_for() {
        let ring = |handle| Name::Ring { life: 1, handle };
        let (slow, _held) = process::pipe().expect("pipe");
        let (done, _) = process::pipe().expect("pipe");
        let mut found = found(&[Name::Lock]);
        found.insert(ring(1), slow);
        found.insert(ring(2), done);
        let mut rings = Rings::take(&mut found);
        assert_eq!(found.len(), 1);
        rings.wait(Some(Duration::from_millis(1)));
        assert_eq!((rings.names(), rings.contains(2)), (vec![ring(1)], false));
        let mut one = rings.take_out(1);
        assert!(rings.is_empty());
        drop(_held);
        one.wait(None);
        assert!(one.is_empty());
    }

    #[test]
    fn a_first_life_follows_nothing() {
        assert_eq!(life_after(&[Name::Lock]), 1);
        // Files alone are what is left of something that never was or is gone.
        let left = Left::sort(found(&[Name::OriginFile(1), Name::Memory { life: 1, id: 1 }]));
        assert_eq!((left.life, left.memory.len(), left.origins.len()), (0, 0, 0));
    }
}
