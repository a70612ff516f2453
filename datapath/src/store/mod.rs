// SPDX-License-Identifier: GPL-2.0-or-later
//! The descriptor store: descriptors that outlive this process, kept by systemd or by our own holder (`hold`).
//!
//! The client's half of sd_notify(3) and sd_listen_fds(3): `FDSTORE=1`, `FDSTOREREMOVE=1`, `BARRIER=1`, `READY=1` as
//! datagrams to `NOTIFY_SOCKET`; what the process before us left comes in `LISTEN_FDS`. Without a store everything works
//! but survival. Decides nothing about what is kept: that is `recover`'s.

mod names;

pub use names::Name;

use crate::sys::{self, process};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the keeper may take to read what was sent.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a process finds in its environment; to be asked once, before there are threads.
#[derive(Debug, Default)]
pub struct Inherited {
    pub store: Store,
    pub fds: BTreeMap<Name, OwnedFd>,
    /// Stored under names that say nothing to us: to be forgotten.
    pub strangers: Vec<String>,
}

#[derive(Debug, Default)]
pub struct Store {
    socket: Option<UnixDatagram>,
    lost: AtomicBool,
    kept: AtomicUsize,
    most: Option<usize>,
}

/// A descriptor in the store, for as long as this lives.
#[derive(Debug)]
pub struct Kept {
    store: Arc<Store>,
    name: Name,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.store.forget(self.name);
    }
}

impl Store {
    /// A client of the keeper that listens at `address` (`@…`: abstract); `most` descriptors fit.
    pub fn connect(address: &str, most: Option<usize>) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        match address.strip_prefix('@') {
            Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
            None => socket.connect(address)?,
        }
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            socket: Some(socket),
            most,
            ..Self::default()
        })
    }

    /// Whether this process would be followed by one that goes on where it stood.
    pub fn works(&self) -> bool {
        self.socket.is_some() && !self.lost.load(Ordering::Relaxed)
    }

    /// Keeps a copy of `fd` under `name`. Without a store nothing is done, and that is no error.
    ///
    /// Raised (TimedOut) when the keeper does not read, (StorageFull) when it has no room.
    pub fn keep(self: &Arc<Self>, name: Name, fd: BorrowedFd<'_>) -> io::Result<Kept> {
        let before = self.kept.fetch_add(1, Ordering::Relaxed);
        let kept = Kept {
            store: Arc::clone(self),
            name,
        };
        if self.most.is_some_and(|most| before >= most) && self.works() {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!("the descriptor store is full ({before} descriptors)"),
            ));
        }
        // FDPOLL=0: a pipe that hangs up is news for our successor and no reason to close it.
        self.send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"), Some(fd))?;
        Ok(kept)
    }

    /// Takes over what a process before us had stored.
    pub fn adopt(self: &Arc<Self>, name: Name) -> Kept {
        self.kept.fetch_add(1, Ordering::Relaxed);
        Kept {
            store: Arc::clone(self),
            name,
        }
    }

    fn forget(&self, name: Name) {
        self.kept.fetch_sub(1, Ordering::Relaxed);
        self.forget_text(&name.to_string());
    }

    /// Removes all descriptors of this name.
    pub fn forget_text(&self, name: &str) {
        // A keeper that does not read now will be told to forget more by the process after us.
        let _ = self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None);
    }

    pub fn ready(&self) {
        let _ = self.send("READY=1\n", None);
    }

    /// Returns when everything sent so far has been done. Raised (TimedOut) when the keeper does not read.
    pub fn sync(&self) -> io::Result<()> {
        if !self.works() {
            return Ok(());
        }
        let (read, write) = process::pipe()?;
        self.send("BARRIER=1", Some(write.as_fd()))?;
        drop(write);
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if process::poll(&[read.as_fd()], Some(left))?[0] {
                return Ok(());
            }
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the descriptor store does not answer",
                ));
            }
        }
    }

    fn send(&self, text: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let Some(socket) = self.socket.as_ref().filter(|_| self.works()) else {
            return Ok(());
        };
        loop {
            match sys::send_with_fds(socket.as_fd(), text.as_bytes(), fd.as_slice()) {
                Ok(_) => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => {
                        return Err(io::Error::new(
                            io::ErrorKind::TimedOut,
                            "the descriptor store does not read",
                        ));
                    }
                    _ => {
                        self.lose(&error.to_string());
                        return Ok(());
                    }
                },
            }
        }
    }

    /// The keeper is gone, once and for all.
    pub fn lose(&self, why: &str) {
        if self.socket.is_some() && !self.lost.swap(true, Ordering::Relaxed) {
            eprintln!(
                "blksnap-datapath: the keeper of the descriptors is gone ({why}); I/O goes on, but nothing that is \
                 tracked would survive the death of this process"
            );
        }
    }
}

impl Inherited {
    /// What the environment says; its variables are removed. Raised when there is a keeper that cannot be reached.
    pub fn take() -> io::Result<Self> {
        let variable = |name: &str| {
            let value = std::env::var(name).ok();
            std::env::remove_var(name);
            value
        };
        let address = variable("NOTIFY_SOCKET");
        // Half of it: the process that takes over stores its own before it forgets ours.
        let most = variable("FDSTORE").and_then(|most| most.parse::<usize>().ok());
        let most = most.map(|most| most / 2);
        let (pid, count) = (variable("LISTEN_PID"), variable("LISTEN_FDS"));
        let names = variable("LISTEN_FDNAMES").unwrap_or_default();
        let mut inherited = Self::default();
        if let Some(address) = address {
            inherited.store = Store::connect(&address, most)?;
        }
        if pid.is_none_or(|pid| pid != std::process::id().to_string()) {
            return Ok(inherited);
        }
        let count = count.and_then(|count| count.parse().ok()).unwrap_or(0);
        let mut names = names.split(':');
        for place in 0..count {
            let name = names.next().unwrap_or("unknown");
            let Some(fd) = process::inherited(3 + place) else {
                break;
            };
            match name.parse() {
                Ok(name) => drop(inherited.fds.insert(name, fd)),
                Err(()) => inherited.strangers.push(name.to_owned()),
            }
        }
        Ok(inherited)
    }
}

#[cfg(test)]
mod tests;
