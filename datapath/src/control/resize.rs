// SPDX-License-Identifier: GPL-2.0-or-later
//! An origin that has grown: map, block device and what stands on it follow. Nothing shrinks here.

use super::devices;
use super::error::{Refusal, Result};
use super::keeping;
use super::origins::{new_map, WithMaps};
use super::server::Server;
use super::take::Gates;
use crate::cbt::Geometry;
use crate::engine::mail::Letter;
use std::time::Duration;

impl Server {
    /// Raised (invalid-state) when the origin is smaller than it was, or its block device cannot grow on this kernel.
    pub fn resize(&self, name: &str) -> Result<WithMaps> {
        let _structure = self.structure();
        let origin = self.registry().origin(name)?;
        if let Some(device) = origin.attachment.ublk_id {
            devices::check_growth(device)?;
        }
        let gates = Gates::close(std::slice::from_ref(&origin), Duration::from_secs(10))?;
        let closed = gates.closed()[0];
        if !closed.broken.is_empty() {
            return Err(Refusal::invalid_state(format!("origin {name}: {}", closed.broken)));
        }
        let (_, _, old) = origin.read()?;
        let size = closed.node.size;
        if size > old.size() {
            // The blocks stay as large as they are: numbers of blocks keep their meaning.
            let geometry = Geometry::new(size, old.block_size())?;
            let (live, taken) = (new_map(geometry, false)?, new_map(geometry, false)?);
            // Stored before they count: a process that follows must find them.
            let kept = (self.keep_memory(&live)?, self.keep_memory(&taken)?);
            self.store_sync()?;
            origin.ask(|answer| Letter::Grow {
                live,
                taken,
                geometry,
                answer,
            })?;
            keeping::changed(&origin.kept, Some(kept.0), kept.1);
        }
        drop(gates);
        if let Some(device) = origin.attachment.ublk_id {
            // Also when the map was long enough: it may be the second try.
            devices::grow(device, size)?;
            if let Some(node) = &origin.attachment.over {
                node.grow(size)?;
            }
        }
        self.maps_of(&origin)
    }
}
