// SPDX-License-Identifier: GPL-2.0-or-later
//! What others did to the origin behind the tracker: bytes they wrote, a size that is another.
//!
//! A file tells by its time of change, a disk by the kernel's count of sectors written to it
//! (Documentation/block/stat.rst), compared with ours. Neither sees everything; what one sees is not trusted away.

use super::Engine;
use crate::cbt::{self, Geometry};
use crate::mem::Shared;
use crate::sys::Node;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

pub const RESIZED: &str = "the size of the origin changed";
const WRITTEN: &str = "the origin was written behind the tracker's back";
const SECTOR: u64 = 512;

/// Sectors written to a block device: by the kernel's count and by ours.
#[derive(Debug)]
pub struct Audit {
    /// None: a file, or a device whose count is not exact (a bio-based one may count a write twice that it had refused).
    count: Option<File>,
    /// The kernel's count when `ours` was 0.
    before: u64,
    ours: u64,
    /// Something was written and nobody knows how much of it was counted.
    unsure: bool,
}

impl Audit {
    pub fn new(node: Node) -> Self {
        let directory = format!(
            "/sys/dev/block/{}:{}",
            libc::major(node.identity.0),
            libc::minor(node.identity.0)
        );
        // A partition's directory is inside its disk's.
        let exact = ["mq", "../mq"]
            .iter()
            .any(|place| Path::new(&directory).join(place).is_dir());
        let count = (node.block && exact)
            .then(|| File::open(format!("{directory}/stat")).ok())
            .flatten();
        let mut audit = Self {
            count,
            before: 0,
            ours: 0,
            unsure: false,
        };
        audit.begin();
        audit
    }

    fn read(&self) -> Option<u64> {
        let mut bytes = [0_u8; 512];
        let len = self.count.as_ref()?.read_at(&mut bytes, 0).ok()?;
        let text = std::str::from_utf8(&bytes[..len]).ok()?;
        // "write sectors" is the seventh value.
        text.split_ascii_whitespace().nth(6)?.parse().ok()
    }

    fn begin(&mut self) {
        match self.read() {
            Some(count) => (self.before, self.ours, self.unsure) = (count, 0, false),
            None => self.count = None,
        }
    }

    /// A write of ours has completed.
    pub fn wrote(&mut self, bytes: u64) {
        self.ours += bytes / SECTOR;
    }

    pub fn unsure(&mut self) {
        self.unsure = true;
    }

    /// Whether more was written than by us. To be asked while nothing is in flight; counts from here on.
    pub fn found(&mut self) -> bool {
        let Some(now) = self.read() else {
            return false;
        };
        let more = !self.unsure && now.wrapping_sub(self.before) > self.ours;
        self.begin();
        more
    }
}

impl Engine {
    /// Whether somebody wrote the origin but us; what it is now. Writes of ours since the last look hide others' in a file.
    pub(super) fn look_behind(&mut self) -> Node {
        self.watch_origin();
        let known = self.setup.origin.node();
        let node = self.setup.origin.stat().unwrap_or(known);
        if node.size != self.setup.geometry.size() {
            self.suspect(RESIZED);
        } else if node.modified_ns != known.modified_ns && !self.writes_unseen {
            self.suspect(WRITTEN);
        }
        if self.gate.in_flight == 0 && self.audit.found() {
            self.suspect(WRITTEN);
        }
        node
    }

    /// The first suspicion stays, but for a size, which may be put right.
    fn suspect(&mut self, reason: &'static str) {
        if (self.suspicion.is_empty() || self.suspicion == RESIZED) && self.suspicion != reason {
            self.suspicion = reason;
            // Who follows after a death must not trust the map either.
            self.store_state();
        }
    }

    /// The origin has grown, behind a closed gate: the maps become these, which are as long as `geometry` says. What is new
    /// counts as changed.
    pub(super) fn grow(&mut self, live: Arc<Shared>, taken: Arc<Shared>, geometry: Geometry) {
        let (old, new) = (self.setup.geometry, geometry);
        let map = &mut self.setup.map;
        let (was, is) = (old.block_count(), new.block_count());
        let added = new.blocks(old.size(), new.size() - old.size());
        for (from, to, byte) in [
            (&map.live, &live, map.numbers.byte_for_active()),
            (&map.taken, &taken, map.numbers.byte_for_changes()),
        ] {
            cbt::copy_into(from.bytes(0, was), &to.bytes(0, is)[..was]);
            cbt::mark(to.bytes(0, is), added.clone(), byte);
        }
        (map.live, map.taken) = (live, taken);
        map.live_sequence += 1;
        map.taken_sequence += 1;
        self.setup.geometry = geometry;
        if self.suspicion == RESIZED {
            self.suspicion = "";
        }
        self.store_state();
    }
}
