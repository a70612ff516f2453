// SPDX-License-Identifier: GPL-2.0-or-later
//! Origins whose disks owe the process that died an answer: each waits on a thread of its own, and holds up no other.
//! Until then it is told of as it was, and answers nothing; its users wait.

use super::left::Rings;
use super::origins::Origin;
use crate::control::server::Server;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

const NEWS: Duration = Duration::from_secs(10);

/// Raised (words) when there is no thread for it.
pub fn begin(server: &Arc<Server>, origin: Origin, mut rings: Rings) -> Result<(), String> {
    let (server, name, names) = (Arc::clone(server), origin.name().to_owned(), rings.names());
    origin.register(&server);
    let wait = move || {
        let mut waited = Duration::ZERO;
        loop {
            rings.wait(Some(NEWS));
            if rings.is_empty() {
                break;
            }
            waited += NEWS;
            eprintln!(
                "blksnap-datapath: {name} waits for writes of the process that died ({} s): its disk, or a storage of its \
                 snapshots, owes an answer",
                waited.as_secs()
            );
        }
        let _structure = server.structure();
        if let Err(refusal) = origin.start(&server) {
            eprintln!("blksnap-datapath: origin {name}: {}", refusal.message);
            return;
        }
        for name in names {
            server.store.forget_text(&name.to_string());
        }
        server.publish(&json!({"event": "origin.recovered", "origin": name, "life": server.life}));
    };
    std::thread::Builder::new()
        .name("late".into())
        .stack_size(512 << 10)
        .spawn(wait)
        .map(drop)
        .map_err(|error| format!("no thread: {error}"))
}
