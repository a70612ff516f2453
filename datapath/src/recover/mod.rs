// SPDX-License-Identifier: GPL-2.0-or-later
//! The beginning of a process that follows one which died: from the descriptors in the store to running queue threads.
//!
//! 1. Wait until the kernel has ended all I/O of the dead process ([`left::Rings`]): a write that lands late would undo a
//!    newer one. Origins of which that takes long come later ([`late`]).
//! 2. Copy maps, tables and pages into memory of our own ([`memory`]) and put chunk tables right there. Nothing that was
//!    left is changed: whoever follows when we die now begins anew from the same.
//! 3. Store all of it, then `life.N`. From that instant on it is the new memory that counts. Forget the old.
//! 4. Start the queue threads; only now there is I/O.
//!
//! What cannot be had any more (a keeper that lost something) ends as little as possible: an image fails, a map begins a
//! new generation, an origin without its file is given up with a line in the log.

mod late;
mod left;
mod memory;
mod noted;
mod origins;
mod snapshots;

use crate::control::server::Server;
use crate::control::{freezer, leftovers};
use crate::snapshot::Cause;
use crate::store::Name;
pub use left::life_after;
use left::{Left, Rings};
use memory::Memory;
use origins::Origin;
use serde_json::json;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// How long all origins wait for I/O of the dead process.
const SOON: Duration = Duration::from_secs(1);
/// And how much longer, when a snapshot would fail otherwise.
const LATER: Duration = Duration::from_secs(9);

/// Goes on from `found` and from notes, and forgets `strangers`. Raised (words) when this process cannot serve at all.
///
/// For a process that follows none it says that there is a life to follow.
pub fn run(server: &Arc<Server>, mut found: BTreeMap<Name, OwnedFd>, strangers: &[String]) -> Result<(), String> {
    let mut rings = Rings::take(&mut found);
    let all_rings = rings.names();
    rings.wait(Some(SOON));
    let names: Vec<Name> = found.keys().copied().collect();
    let mut left = Left::sort(found);
    let mut memory = Memory::new(std::mem::take(&mut left.memory));
    let words = |refusal: crate::control::error::Refusal| refusal.message;
    let mut snapshots = snapshots::build(server, &mut left, &mut memory).map_err(|error| error.to_string())?;
    let origins = origins::build(server, &mut left, &mut memory, &mut snapshots).map_err(words)?;
    if snapshots.iter().any(|snapshot| snapshot.shares_with(&rings)) {
        rings.wait(Some(LATER));
    }
    // What an origin still writes to the storage of a snapshot would hit what another one writes there from now on.
    for snapshot in snapshots.iter().filter(|snapshot| snapshot.shares_with(&rings)) {
        snapshot.fail(Cause::Stalled, 0);
    }
    snapshots::settle(&mut snapshots, &origins);
    let stored: Vec<_> = origins.iter().map(Origin::name).collect();
    let noted = noted::build(server, &stored);
    let strays = noted.found.len();

    let snapshots = snapshots
        .into_iter()
        .map(|snapshot| snapshot.keep(server))
        .collect::<Result<Vec<_>, _>>()
        .map_err(words)?;
    let origins = origins
        .into_iter()
        .chain(noted.found)
        .map(|origin| origin.keep(server))
        .collect::<Result<Vec<_>, _>>()
        .map_err(words)?;
    commit(server).map_err(|error| format!("the descriptor store: {error}"))?;
    // What goes from life to life is named in `names`, too.
    let goes_on = |name: &Name| match *name {
        Name::OriginFile(handle) | Name::Listener(handle) => origins.iter().any(|origin| origin.handle() == handle),
        Name::SnapshotFile(handle) => snapshots.iter().any(|snapshot| snapshot.handle == handle),
        name => matches!(name, Name::Lock | Name::Control),
    };
    let under_way = rings.names();
    let ended = all_rings.iter().filter(|name| !under_way.contains(name));
    for name in names.iter().filter(|name| !goes_on(name)).chain(ended) {
        server.store.forget_text(&name.to_string());
    }
    for name in strangers {
        server.store.forget_text(name);
    }
    if left.life > 0 {
        eprintln!(
            "blksnap-datapath: goes on where a process that died has stood (life {}): {} origins, {} snapshots",
            server.life,
            origins.len(),
            snapshots.len()
        );
    }
    if strays > 0 {
        eprintln!(
            "blksnap-datapath: takes over {strays} origins of a data path that was killed together with what keeps its \
             memory: new generations begin, snapshots are lost"
        );
    }
    for snapshot in snapshots {
        server.registry().snapshots.insert(snapshot.id, snapshot.entry);
    }
    let mut unfit = noted.unfit;
    for origin in origins {
        let (name, noted) = (origin.name().to_owned(), origin.is_noted());
        if rings.contains(origin.handle()) {
            let slow = rings.take_out(origin.handle());
            late::begin(server, origin, slow)?;
            continue;
        }
        match origin.start(server) {
            Ok(()) => {}
            Err(refusal) if noted => {
                eprintln!("blksnap-datapath: origin {name}: {}", refusal.message);
                unfit.extend(server.notes.read(&name));
                continue;
            }
            Err(refusal) => return Err(format!("origin {name}: {}", refusal.message)),
        }
        let event = json!({"event": "origin.recovered", "origin": name, "life": server.life});
        server.untold.lock().expect("a panic aborts the process").push(event);
    }
    noted.held.into_iter().for_each(|note| noted::await_disk(server, note));
    leftovers::clear(server, &unfit);
    if left.life > 0 || strays > 0 {
        freezer::go_on();
    }
    Ok(())
}

/// Stores that this life is complete.
fn commit(server: &Server) -> std::io::Result<()> {
    let null = std::fs::File::open("/dev/null")?;
    let kept = server.store.keep(Name::Life(server.life), null.as_fd())?;
    server.kept.lock().expect("a panic aborts the process").push(kept);
    server.store.sync()
}
