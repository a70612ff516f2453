// SPDX-License-Identifier: GPL-2.0-or-later
//! The maintenance thread: turns what queue threads noticed into events, and has storages grown ahead of their use, each
//! in a thread of its own: a disk that hangs holds up nobody else's events.

use super::registry::describe;
use super::server::Server;
use crate::snapshot::Snapshot;
use serde_json::{json, Value};
use std::sync::atomic::Ordering;
use std::sync::Arc;

impl Server {
    /// Runs for ever.
    pub fn maintain(&self) {
        loop {
            self.bell.wait();
            let mut events = self.look_at_snapshots();
            events.extend(self.look_at_origins());
            for event in &events {
                self.publish(event);
            }
        }
    }

    fn look_at_snapshots(&self) -> Vec<Value> {
        let entries: Vec<_> = self.registry().snapshots.values().cloned().collect();
        let mut events = Vec::new();
        for entry in entries {
            let (snapshot, id) = (&entry.snapshot, &entry.snapshot.id);
            self.grow_ahead(snapshot);
            let mut registry = self.registry();
            let failure = snapshot.failure();
            let origin = failure.map(|failure| registry.name_of(failure.origin));
            let Some(told) = registry.snapshots.get_mut(id) else {
                continue;
            };
            let storage = &snapshot.storage;
            if storage.low() && !std::mem::replace(&mut told.told_low, true) {
                let (used, limit) = (storage.used(), storage.limit());
                events.push(json!({"event": "snapshot.low-space", "snapshot": id, "used": used, "limit": limit}));
            }
            let out = snapshot.storage.stuck()
                || failure.is_some_and(|failure| failure.cause == crate::snapshot::Cause::NoSpace);
            if out && !std::mem::replace(&mut told.told_full, true) {
                let chunk = entry
                    .images
                    .first()
                    .map_or(snapshot.chunk_size, |image| image.chunk_size);
                let requested = storage.used() + chunk;
                events.push(json!({"event": "snapshot.no-space", "snapshot": id, "requested": requested}));
            }
            if let Some(failure) = failure {
                if !std::mem::replace(&mut told.told_failed, true) {
                    let message = describe(failure.cause, failure.errno);
                    let errno = failure.errno;
                    events.push(json!({
                        "event": "snapshot.failed", "snapshot": id, "origin": origin, "errno": errno, "message": message,
                    }));
                }
            }
        }
        events
    }

    fn grow_ahead(&self, snapshot: &Arc<Snapshot>) {
        if snapshot.failed() || !snapshot.storage.claim_growth() {
            return;
        }
        let (growing, bell) = (Arc::clone(snapshot), self.bell.clone());
        let grow = move || {
            // A failure is kept by the storage; the bell has it told.
            let _ = growing.storage.grow();
            growing.storage.grown();
            bell.ring();
        };
        let started = std::thread::Builder::new()
            .name("grow".into())
            .stack_size(128 << 10)
            .spawn(grow);
        if started.is_err() {
            snapshot.storage.grown();
        }
    }

    fn look_at_origins(&self) -> Vec<Value> {
        let registry = self.registry();
        let broken: Vec<_> = registry
            .origins
            .values()
            .filter(|origin| origin.mailbox.broken.load(Ordering::Acquire))
            .filter(|origin| !registry.told_broken.contains(&origin.handle))
            .cloned()
            .collect();
        drop(registry);
        let mut events = Vec::new();
        for origin in broken {
            let reason = origin
                .read()
                .map_or("it does not answer", |(reading, ..)| reading.reason);
            self.registry().told_broken.push(origin.handle);
            events.push(json!({"event": "origin.broken", "origin": origin.name, "reason": reason}));
        }
        events
    }
}
