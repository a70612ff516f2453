// SPDX-License-Identifier: GPL-2.0-or-later
//! What is written down of each origin among the system's devices, in `DIR/origins`: enough to take its devices over when
//! the descriptor store is lost too, or to take them away. Not the map, and not who wanted it.
//!
//! A note is there before the first device of its origin, and goes after the last one. The directory is as volatile as
//! the devices are; where it is not, a note of another boot says nothing.

use super::error::{Refusal, Result};
use super::origins::Add;
use super::server::Server;
use crate::ublk::stamp;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub version: u32,
    pub boot: String,
    pub name: String,
    pub label: String,
    pub block_size: u64,
    pub read_only: bool,
    pub tracking: bool,
    /// Its device-mapper devices, as `origin.add` has them.
    pub top: String,
    pub insert: String,
    /// The origin's number and, unless it is a device-mapper device, its disk sequence (0: not known).
    pub device: u64,
    pub diskseq: u64,
    /// The number of its ublk device; None: it has none yet.
    pub ublk_id: Option<u32>,
}

impl Note {
    /// Of an origin that has no device yet.
    pub fn of(asked: &Add) -> Self {
        Self {
            version: VERSION,
            boot: boot(),
            name: asked.origin.clone(),
            label: asked.label.clone(),
            block_size: asked.block_size,
            read_only: asked.read_only,
            tracking: asked.tracking,
            top: asked.top.clone(),
            insert: asked.insert.clone(),
            device: 0,
            diskseq: 0,
            ublk_id: None,
        }
    }

    /// The stamp of its ublk device.
    pub fn stamp(&self) -> u64 {
        stamp::stamp(self.device, false)
    }

    /// What users see of it, if that is a device-mapper device.
    pub fn mapped(&self) -> Option<&str> {
        [&self.insert, &self.top]
            .into_iter()
            .find(|name| !name.is_empty())
            .map(String::as_str)
    }
}

impl Server {
    /// Writes a note down.
    pub fn note(&self, note: &Note) -> Result<()> {
        let written = self.notes.write(note);
        written.map_err(|error| Refusal::io(&format!("writing down where {} is", note.name), &error))
    }
}

/// The boot that notes of now are of.
fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim_end().to_owned()
}

#[derive(Debug)]
pub struct Notes {
    directory: PathBuf,
}

impl Notes {
    pub fn new(runtime_directory: &Path) -> Self {
        Self {
            directory: runtime_directory.join("origins"),
        }
    }

    /// Writes one down, in the place of an older one of that origin.
    pub fn write(&self, note: &Note) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        // Never half a file. No origin has a dot in its name.
        let part = self.directory.join(".part");
        fs::write(&part, serde_json::to_vec(note)?)?;
        fs::rename(part, self.directory.join(&note.name))
    }

    pub fn forget(&self, name: &str) {
        let _ = fs::remove_file(self.directory.join(name));
    }

    /// The note of an origin.
    pub fn read(&self, name: &str) -> Option<Note> {
        let text = fs::read(self.directory.join(name)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// All notes of this boot; others are removed.
    pub fn all(&self) -> Vec<Note> {
        let now = boot();
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let note = name.to_str().and_then(|name| self.read(name));
            match note.filter(|note| note.version == VERSION && note.boot == now && name == *note.name) {
                Some(note) => found.push(note),
                None => drop(fs::remove_file(entry.path())),
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &str) -> Note {
        Note {
            version: VERSION,
            boot: boot(),
            name: name.into(),
            label: "/dev/sdb1".into(),
            block_size: 0,
            read_only: false,
            tracking: true,
            top: String::new(),
            insert: "vg-lv".into(),
            device: libc::makedev(8, 17),
            diskseq: 3,
            ublk_id: Some(2),
        }
    }

    #[test]
    fn notes_are_read_as_they_were_written_and_only_those_of_this_boot() {
        let runtime = std::env::temp_dir().join(format!("blksnap-notes-{}", std::process::id()));
        let notes = Notes::new(&runtime);
        assert_eq!(notes.all(), []);
        let (kept, mut old) = (note("a"), note("b"));
        old.boot = "another".into();
        for one in [&kept, &old, &note("gone")] {
            notes.write(one).unwrap();
        }
        fs::write(runtime.join("origins/c"), "no note").unwrap();
        notes.forget("gone");
        assert_eq!(notes.all(), std::slice::from_ref(&kept));
        assert_eq!(fs::read_dir(runtime.join("origins")).unwrap().count(), 1);
        assert_eq!((notes.read("a"), notes.read("b")), (Some(kept.clone()), None));
        assert_eq!(kept.mapped(), Some("vg-lv"));
        fs::remove_dir_all(runtime).unwrap();
    }
}
