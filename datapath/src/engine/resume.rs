// SPDX-License-Identifier: GPL-2.0-or-later
//! The beginning of a queue thread that goes on where a process that died stood (`recover` has made all it needs).

use super::{Engine, Resumed};
use crate::pages::state;
use std::sync::atomic::Ordering;

impl Engine {
    /// Before any client: images are back, and what was on its way to a storage is on its way again, to a new place.
    pub(super) fn resume(&mut self) {
        let Resumed {
            images,
            suspicion,
            broken,
            written,
        } = std::mem::take(&mut self.setup.resumed);
        self.suspicion = suspicion;
        self.writes_unseen = written;
        state::set_written(self.state_words(), written);
        if !broken.is_empty() {
            self.broken = Some(broken);
            self.setup.mailbox.broken.store(true, Ordering::Release);
            self.setup.bell.ring();
        }
        for (place, image) in images.into_iter().enumerate() {
            let owed: Vec<_> = (0..image.copies.len())
                .filter(|slot| image.copies[*slot].busy)
                .collect();
            let failed = image.failed();
            self.images[place] = Some(image);
            for slot in owed.into_iter().filter(|_| !failed) {
                self.store_old(place, slot as u32);
            }
        }
    }
}
