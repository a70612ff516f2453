// SPDX-License-Identifier: GPL-2.0-or-later
//! What the descriptors in the store are called. Short: all names together are one environment variable.
//!
//! Memory cannot be mapped for writing twice (it is sealed), so each life of the data path makes its own and stores it
//! under its own number. `life.N` is stored last: what belongs to a life without it is a recovery that was cut off.

use std::fmt;
use std::str::FromStr;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// The lock on `datapath.pid`.
    Lock,
    /// The control socket: who connects while nobody serves waits, and is not refused.
    Control,
    /// The life is complete: all it needs was stored before.
    Life(u64),
    /// What `origin.add` was told, as JSON; with it an origin exists. The second number counts rewritings.
    Origin { life: u64, handle: u32, version: u32 },
    /// The file or device of an origin.
    OriginFile(u32),
    /// What `snapshot.create` was told, as JSON; with it a snapshot exists.
    Snapshot { life: u64, handle: u32 },
    /// The NBD socket of an origin, likewise.
    Listener(u32),
    /// The storage of a snapshot.
    SnapshotFile(u32),
    /// A map, a chunk table or a page.
    Memory { life: u64, id: u64 },
    /// Hung up when the kernel has ended all I/O of an origin's ring.
    Ring { life: u64, handle: u32 },
}

impl Name {
    /// The life that stored it; None: it goes from life to life.
    pub fn life(self) -> Option<u64> {
        match self {
            Self::Lock | Self::Control | Self::OriginFile(_) | Self::Listener(_) | Self::SnapshotFile(_) => None,
            Self::Life(life)
            | Self::Origin { life, .. }
            | Self::Snapshot { life, .. }
            | Self::Memory { life, .. }
            | Self::Ring { life, .. } => Some(life),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Lock => f.write_str("lock"),
            Self::Control => f.write_str("control"),
            Self::Life(life) => write!(f, "life.{life}"),
            Self::Origin { life, handle, version } => write!(f, "o.{life}.{handle}.{version}"),
            Self::OriginFile(handle) => write!(f, "of.{handle}"),
            Self::Listener(handle) => write!(f, "nbd.{handle}"),
            Self::Snapshot { life, handle } => write!(f, "s.{life}.{handle}"),
            Self::SnapshotFile(handle) => write!(f, "sf.{handle}"),
            Self::Memory { life, id } => write!(f, "m.{life}.{id}"),
            Self::Ring { life, handle } => write!(f, "r.{life}.{handle}"),
        }
    }
}

impl FromStr for Name {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut words = text.split('.');
        let kind = words.next().unwrap_or_default();
        let numbers: Vec<u64> = words
            .map(|word| word.parse().map_err(drop))
            .collect::<Result<_, ()>>()?;
        let short = |number: u64| u32::try_from(number).map_err(drop);
        let name = match (kind, numbers.as_slice()) {
            ("lock", []) => Self::Lock,
            ("control", []) => Self::Control,
            ("life", &[life]) => Self::Life(life),
            ("o", &[life, handle, version]) => Self::Origin {
                life,
                handle: short(handle)?,
                version: short(version)?,
            },
            ("of", &[handle]) => Self::OriginFile(short(handle)?),
            ("nbd", &[handle]) => Self::Listener(short(handle)?),
            ("s", &[life, handle]) => Self::Snapshot {
                life,
                handle: short(handle)?,
            },
            ("sf", &[handle]) => Self::SnapshotFile(short(handle)?),
            ("m", &[life, id]) => Self::Memory { life, id },
            ("r", &[life, handle]) => Self::Ring {
                life,
                handle: short(handle)?,
            },
            _ => return Err(()),
        };
        Ok(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_were_written() {
        let (life, handle) = (u64::MAX, u32::MAX);
        for name in [
            Name::Lock,
            Name::Control,
            Name::Listener(3),
            Name::Life(1),
            Name::Origin {
                life,
                handle,
                version: 3,
            },
            Name::OriginFile(0),
            Name::Snapshot { life: 2, handle: 7 },
            Name::SnapshotFile(handle),
            Name::Memory { life, id: 12 },
            Name::Ring { life, handle },
        ] {
            assert_eq!(name.to_string().parse(), Ok(name));
        }
    }

    #[test]
    fn what_is_no_name_of_ours_is_not_read_as_one() {
        for wrong in [
            "",
            "stored",
            "life",
            "life.",
            "life.x",
            "of.4294967296",
            "m.1",
            "m.1.2.3",
            "lock.1",
            "o.1.2",
        ] {
            assert_eq!(wrong.parse::<Name>(), Err(()), "{wrong}");
        }
    }
}
