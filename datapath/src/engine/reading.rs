// SPDX-License-Identifier: GPL-2.0-or-later
//! What a queue thread tells of itself: a consistent reading for the service, and the state page that outlives the process.

use super::{Engine, Front, Setup};
use crate::pages::state::{self, State};
use serde::Serialize;
use std::sync::atomic::AtomicU64;

/// I/O since the tracker began.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Counters {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub zeroes: u64,
    pub zeroed_bytes: u64,
    pub discards: u64,
    pub discarded_bytes: u64,
    pub discards_skipped: u64,
    pub flushes: u64,
    pub image_reads: u64,
    pub image_writes: u64,
    pub copies: u64,
    pub marks: u64,
}

/// One consistent reading of an origin (READING in docs/datapath-protocol.md).
#[derive(Clone, Debug, Serialize)]
pub struct Reading {
    pub origin: String,
    pub label: String,
    pub kind: &'static str,
    pub state: &'static str,
    pub reason: &'static str,
    pub size: u64,
    pub logical_block_size: u32,
    pub read_only: bool,
    pub block_size: u64,
    pub block_count: u64,
    pub generation: String,
    pub base: u32,
    pub active: u32,
    pub changes: u32,
    pub oldest: u32,
    pub live_sequence: u64,
    pub taken_sequence: u64,
    pub taken_base: u32,
    pub nbd_socket: String,
    pub clients: u32,
    /// Of the clients, those of the socket.
    #[serde(skip)]
    pub connections: u32,
    pub front: Front,
    /// What to mount or use, the number of its ublk device (-1: none), and the device-mapper devices about it; the control
    /// side fills them in.
    pub node: String,
    pub ublk_id: i64,
    pub top: String,
    pub insert: String,
    /// Why the data path began this generation by itself, without a take; "": it did not. Filled in likewise.
    pub reset: &'static str,
    pub snapshots: Vec<String>,
    pub counters: Counters,
    /// Why the map cannot be trusted any more (a take would begin a new generation); "": it can.
    #[serde(skip)]
    pub suspicion: &'static str,
}

impl Setup {
    /// Of an origin that nobody uses yet.
    pub fn reading(&self) -> Reading {
        let (map, node) = (&self.map, self.origin.node());
        Reading {
            origin: self.name.clone(),
            label: self.label.clone(),
            kind: if node.block { "block" } else { "file" },
            state: "tracking",
            reason: "",
            size: self.geometry.size(),
            logical_block_size: node.logical_block_size,
            read_only: self.origin.read_only,
            block_size: self.geometry.block_size(),
            block_count: self.geometry.block_count() as u64,
            generation: map.generation.clone(),
            base: map.numbers.base(),
            active: map.numbers.active(),
            changes: map.numbers.changes(),
            oldest: map.numbers.oldest(),
            live_sequence: map.live_sequence,
            taken_sequence: map.taken_sequence,
            taken_base: map.taken_base,
            nbd_socket: self.socket.clone(),
            clients: 0,
            connections: 0,
            front: self.front,
            node: String::new(),
            ublk_id: -1,
            top: String::new(),
            insert: String::new(),
            reset: "",
            snapshots: Vec::new(),
            counters: Counters::default(),
            suspicion: "",
        }
    }
}

impl Engine {
    pub(super) fn reading(&self) -> Reading {
        let connections = self.connections.iter().flatten().count() as u32;
        Reading {
            state: if self.broken.is_some() { "broken" } else { "tracking" },
            reason: self.broken.unwrap_or_default(),
            clients: connections,
            connections,
            snapshots: self
                .images
                .iter()
                .flatten()
                .filter(|image| image.leaving.is_none())
                .map(|image| image.snapshot.id.clone())
                .collect(),
            counters: self.counters,
            suspicion: self.suspicion,
            ..self.setup.reading()
        }
    }

    /// Has the state page tell what is true now.
    pub(super) fn store_state(&self) {
        let state = State {
            suspicion: self.suspicion,
            broken: self.broken.unwrap_or_default(),
            ..self.setup.state()
        };
        state.write(self.state_words());
    }

    pub(super) fn state_words(&self) -> &[AtomicU64] {
        self.state_page.words(0, state::WORDS)
    }
}

impl Setup {
    /// What the state page tells at the beginning.
    pub fn state(&self) -> State<'_> {
        let map = &self.map;
        State {
            base: map.numbers.base(),
            active: map.numbers.active(),
            generation: &map.generation,
            size: self.geometry.size(),
            block_size: self.geometry.block_size(),
            live_sequence: map.live_sequence,
            taken_sequence: map.taken_sequence,
            taken_base: map.taken_base,
            live: map.live.id(),
            taken: map.taken.id(),
            modified_ns: self.origin.node().modified_ns,
            suspicion: self.resumed.suspicion,
            broken: self.resumed.broken,
        }
    }
}
