// SPDX-License-Identifier: GPL-2.0-or-later
//! The end of an origin: its devices, its queue thread, and all that was kept and noted of it.

use super::ends;
use super::error::{Refusal, Result};
use super::keeping;
use super::nodes;
use super::origins::WithMaps;
use super::server::Server;
use crate::engine::mail::Letter;
use crate::udev;

impl Server {
    pub fn remove(&self, name: &str, force: bool) -> Result<WithMaps> {
        self.leave(name, force, false)
    }

    /// Ends an origin. `stay`: its device-mapper device goes on without it.
    pub(super) fn leave(&self, name: &str, force: bool, stay: bool) -> Result<WithMaps> {
        let _structure = self.structure();
        let origin = self.registry().origin(name)?;
        let (mut reading, mut map) = match (origin.read(), origin.last()) {
            (Ok((reading, map, _)), _) => (reading, map),
            // It was told to end when its disk held it, and has ended since.
            (Err(_), Some(last)) if origin.mailbox.ended() => last,
            (Err(refusal), _) => return Err(refusal),
        };
        if !force && !reading.snapshots.is_empty() {
            return Err(Refusal::busy(format!("a snapshot of {name} is held")));
        }
        if !force && reading.connections > 0 {
            return Err(Refusal::busy(format!("{} clients use {name}", reading.connections)));
        }
        if !force {
            nodes::check_idle(&origin)?;
        }
        if !origin.mailbox.ended() {
            let images = self.registry().image_devices(name);
            for (snapshot, device) in images {
                ends::end_image_device(&origin, device)?;
                self.registry().forget_image_device(&snapshot, name);
            }
            // What was written until just now counts.
            (reading, map) = self.take_down(&origin, force, stay)?;
            if !origin.mailbox.ended() {
                origin.ask(Letter::End)?;
            }
        }
        self.registry().origins.remove(name);
        let _ = std::fs::remove_file(&origin.socket);
        if let Some(name) = udev::kernel_name(origin.identity.0).filter(|_| origin.identity.1 == 0) {
            udev::forget(&name);
            udev::look_again(&name);
        }
        keeping::forget(&origin.kept);
        // The lock on its file is held until the store has let go of it, too.
        self.store_sync()?;
        nodes::clear_away(&origin);
        self.notes.forget(name);
        if !reading.suspicion.is_empty() {
            // Nobody may continue this map.
            (reading.state, reading.reason) = ("broken", reading.suspicion);
        }
        Ok((reading, vec![map.live, map.taken]))
    }
}
