// SPDX-License-Identifier: GPL-2.0-or-later
//! Who is connected to the control socket. One thread per connection; each request is done before the next is read.

use super::error::{Refusal, Result};
use super::framing::{Lines, Sender};
use super::keeping;
use super::notes::Notes;
use super::registry::Registry;
use super::request::{Envelope, Then};
use crate::snapshot::Bell;
use crate::store::{Kept, Name, Store};
use crate::sys;
use serde_json::{json, Value};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

/// Control connections at a time.
const CONNECTIONS: usize = 64;
/// How long a subscriber may leave its socket full.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

pub struct Server {
    directory: PathBuf,
    pub notes: Notes,
    pub bell: Bell,
    registry: Mutex<Registry>,
    structure: Mutex<()>,
    pub subscribers: Mutex<Vec<Arc<Sender>>>,
    connections: AtomicUsize,
    pub store: Arc<Store>,
    /// How many processes have served this directory without an end in order, with this one.
    pub life: u64,
    /// Memory in the store, by id.
    pub memory: Mutex<HashMap<u64, Weak<Kept>>>,
    /// What is in the store for the process as a whole.
    pub kept: Mutex<Vec<Kept>>,
    /// Events that the first subscriber is told.
    pub untold: Mutex<Vec<Value>>,
}

impl Server {
    pub fn new(directory: PathBuf, bell: Bell, store: Arc<Store>, life: u64) -> Self {
        Self {
            notes: Notes::new(&directory),
            directory,
            bell,
            registry: Mutex::default(),
            structure: Mutex::default(),
            subscribers: Mutex::default(),
            connections: AtomicUsize::new(0),
            store,
            life,
            memory: Mutex::default(),
            kept: Mutex::default(),
            untold: Mutex::default(),
        }
    }

    /// Keeps what is there once, for the process as a whole; None: the store has it already.
    pub fn keep_one(&self, name: Name, fd: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        let kept = match fd {
            Some(fd) => self.store.keep(name, fd)?,
            None => self.store.adopt(name),
        };
        self.kept.lock().expect("a panic aborts the process").push(kept);
        Ok(())
    }

    /// Notices the end of the keeper when it comes: it is our parent.
    pub fn watch_keeper(self: &Arc<Self>) -> std::io::Result<()> {
        if !self.store.works() {
            return Ok(());
        }
        let parent = sys::process::watch_process(sys::process::parent())?;
        let server = Arc::clone(self);
        let watch = move || {
            while let Ok([false]) = sys::process::poll(&[parent.as_fd()], None).as_deref() {}
            server.store.lose("it ended");
        };
        std::thread::Builder::new()
            .name("keeper".into())
            .stack_size(64 << 10)
            .spawn(watch)
            .map(drop)
    }

    /// What exists. Never held while waiting for anything.
    pub fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().expect("a panic aborts the process")
    }

    /// Held for the whole of an operation that changes what exists, takes among them: they come one after the other.
    pub fn structure(&self) -> MutexGuard<'_, ()> {
        self.structure.lock().expect("a panic aborts the process")
    }

    pub fn nbd_socket(&self, origin: &str) -> PathBuf {
        self.directory.join("nbd").join(format!("{origin}.sock"))
    }

    /// Accepts for ever.
    pub fn listen(self: &Arc<Self>, listener: &UnixListener) {
        loop {
            let Ok((socket, _)) = listener.accept() else {
                // Out of descriptors: those that are connected must end first.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            let allowed = sys::peer_uid(socket.as_fd()).is_ok_and(|uid| uid == 0 || uid == sys::own_uid());
            if !allowed || self.connections.load(Ordering::Relaxed) >= CONNECTIONS {
                continue;
            }
            self.connections.fetch_add(1, Ordering::Relaxed);
            let server = Arc::clone(self);
            let serve = move || {
                server.serve(&socket);
                server.connections.fetch_sub(1, Ordering::Relaxed);
            };
            let started = std::thread::Builder::new()
                .name("control".into())
                .stack_size(512 << 10)
                .spawn(serve);
            if started.is_err() {
                self.connections.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    fn serve(&self, socket: &UnixStream) {
        let (Ok(writing), Ok(())) = (socket.try_clone(), socket.set_write_timeout(Some(SEND_TIMEOUT))) else {
            return;
        };
        let sender = Arc::new(Sender::new(writing));
        let mut lines = Lines::new(socket);
        loop {
            let line = match lines.read() {
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(error) => {
                    let refusal = Refusal::bad_request(error.to_string());
                    let _ = sender.send(refused(None, &refusal), &[]);
                    break;
                }
            };
            let Ok(then) = self.answer(&sender, &mut lines, &line) else {
                break;
            };
            match then {
                Then::GoOn => {}
                Then::Subscribe => {
                    self.subscribers().push(Arc::clone(&sender));
                    let untold = std::mem::take(&mut *self.untold.lock().expect("a panic aborts the process"));
                    for event in untold {
                        self.publish(&event);
                    }
                }
                Then::Stop => std::process::exit(0),
            }
        }
        self.subscribers().retain(|other| !Arc::ptr_eq(other, &sender));
        // The sender's copy of the socket may live on in the hands of the maintenance thread for a moment.
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }

    fn answer(&self, sender: &Sender, lines: &mut Lines<'_>, line: &[u8]) -> std::io::Result<Then> {
        let envelope = match Envelope::parse(line) {
            Ok(envelope) => envelope,
            Err(refusal) => {
                // Without an envelope nobody knows whose descriptors these are.
                lines.fds(usize::MAX);
                sender.send(refused(None, &refusal), &[])?;
                return Ok(Then::GoOn);
            }
        };
        let id = envelope.id;
        let Some(fds) = lines.fds(envelope.fds) else {
            let refusal = Refusal::bad_request("the number of descriptors is not what fds says");
            sender.send(refused(None, &refusal), &[])?;
            return Ok(Then::GoOn);
        };
        match self.perform(envelope, fds) {
            Err(refusal) => {
                sender.send(refused(Some(id), &refusal), &[])?;
                Ok(Then::GoOn)
            }
            Ok(answer) => {
                let fds: Vec<BorrowedFd<'_>> = answer.memory.iter().map(|shared| shared.reader().as_fd()).collect();
                let mut body = json!({"id": id, "ok": answer.body});
                if !fds.is_empty() {
                    body["fds"] = fds.len().into();
                }
                sender.send(body.to_string().into_bytes(), &fds)?;
                Ok(answer.then)
            }
        }
    }

    fn subscribers(&self) -> MutexGuard<'_, Vec<Arc<Sender>>> {
        self.subscribers.lock().expect("a panic aborts the process")
    }

    /// Tells all subscribers; one that does not listen is hung up on.
    pub fn publish(&self, event: &Value) {
        let line = event.to_string().into_bytes();
        let subscribers = self.subscribers().clone();
        for subscriber in subscribers {
            if subscriber.send(line.clone(), &[]).is_err() {
                self.subscribers().retain(|other| !Arc::ptr_eq(other, &subscriber));
            }
        }
    }

    /// Ends all I/O in order.
    pub fn stop(&self, force: bool) -> Result<()> {
        let origins: Vec<_> = self.registry().origins.keys().cloned().collect();
        if !force && !origins.is_empty() {
            return Err(Refusal::busy(format!("{} origins are served", origins.len())));
        }
        for origin in origins {
            match self.remove(&origin, true) {
                Err(refusal) if refusal.code != "not-found" => return Err(refusal),
                _ => {}
            }
        }
        for entry in self.registry().snapshots.values() {
            keeping::forget(&entry.kept);
        }
        self.kept.lock().expect("a panic aborts the process").clear();
        // A keeper that does not answer holds descriptors until it does.
        let _ = self.store.sync();
        let _ = std::fs::remove_file(self.directory.join("datapath.sock"));
        Ok(())
    }
}

fn refused(id: Option<u64>, refusal: &Refusal) -> Vec<u8> {
    json!({"id": id, "error": refusal}).to_string().into_bytes()
}
