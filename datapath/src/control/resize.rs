// SPDX-License-Identifier: GPL-2.0-or-later
//! An origin that has grown: map, block device and what stands on it follow. Nothing shrinks here.

use super::devices;
use super::ends;
use super::error::{Refusal, Result};
use super::keeping;
use super::node::Node;
use super::notes::Note;
use super::origins::{new_map, WithMaps};
use super::registry::Origin;
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
        if let (Some(device), None) = (origin.attachment.ublk_id, &origin.attachment.over) {
            if !devices::can_grow(device)? {
                return Err(Refusal::invalid_state(format!(
                    "{} cannot grow on this kernel (6.16 can, and with device-mapper any): remove it and add the origin again",
                    devices::node_of(device)
                )));
            }
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
            match &origin.attachment.over {
                Some(node) if !devices::can_grow(device)? => self.move_to_larger(&origin, device, node, size)?,
                over => {
                    devices::grow(device, size)?;
                    if let Some(node) = over {
                        node.grow(size)?;
                    }
                }
            }
        }
        let origin = self.registry().origin(name)?;
        self.maps_of(&origin)
    }

    /// Puts the node of an origin over another ublk device, which is as large as the origin is. At a death in between, the
    /// one that the node lies on is the one that counts (`nodes::front_below`).
    fn move_to_larger(&self, origin: &Origin, device: u32, node: &Node, size: u64) -> Result<()> {
        let failed = |error: &std::io::Error| Refusal::io(&origin.name, error);
        if devices::number_and_size(device).map_err(|error| failed(&error))?.size == size {
            return Ok(());
        }
        let larger = devices::make_origin_device(origin, size, origin.conf.read_only)?;
        let front = devices::number_and_size(larger).map_err(|error| failed(&error));
        if let Err(refusal) = front.and_then(|front| node.swap_to(front)) {
            let _ = ends::end_origin_device(origin, larger, true);
            return Err(refusal);
        }
        if let Some(entry) = self.registry().origins.get_mut(&origin.name) {
            entry.attachment.ublk_id = Some(larger);
        }
        // Whether or not it can be written down: the old one has no users any more.
        let kept = self.keep_device(origin, larger);
        let noted = self.notes.read(&origin.name).map_or(Ok(()), |note| {
            self.note(&Note {
                ublk_id: Some(larger),
                ..note
            })
        });
        ends::end_origin_device(origin, device, true)?;
        kept.and(noted)
    }
}
