// SPDX-License-Identifier: GPL-2.0-or-later
//! File systems stand still around a take: clean in the image, and never for longer than ten seconds.
//!
//! From the first file system frozen until the last is thawed, nothing here may need one of them: no file is opened, no
//! memory is waited for, and a watchdog thaws when the take does not come to its end. What is to be taken is not known
//! here. All of it that may wait for a disk runs in a process of its own (`freezer`).

use super::error::{words, Refusal, Result};
use super::node::Node;
use super::stack::{self, Devices, Fronts};
use crate::dm::{self, Dm, Udev};
use crate::fsfreeze::{self, keep_code, NoReclaimIo};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest that anything stands still.
pub const LONGEST: Duration = Duration::from_secs(10);

/// One thing to be frozen.
#[derive(Debug)]
pub(super) struct Item {
    pub what: What,
    /// As told in errors.
    pub label: String,
    /// What is written to while it is being frozen, and stands still then.
    pub devices: Vec<u64>,
    /// These, and all they lie on.
    pub below: Devices,
}

#[derive(Debug)]
pub(super) enum What {
    /// A device-mapper device: the file system on it is frozen wherever it is mounted, and all its I/O waits.
    Device(Arc<Dm>, String),
    /// The file system that this is on.
    Mount(File),
}

impl Item {
    fn freeze(&self) -> io::Result<()> {
        match &self.what {
            What::Device(dm, name) => {
                if dm.status(name)?.suspended {
                    // Not ours, and so not ours to resume.
                    return Err(io::Error::from_raw_os_error(libc::EBUSY));
                }
                dm.suspend(name, dm::Freeze::Yes)
            }
            What::Mount(mount) => fsfreeze::freeze(mount.as_fd()),
        }
    }

    pub fn thaw(&self) {
        // EINVAL, ENXIO: somebody was faster, or it is gone. There is nothing else to be done about any error here.
        match &self.what {
            What::Device(dm, name) => drop(dm.resume(name, Udev::Keep)),
            What::Mount(mount) => drop(fsfreeze::thaw(mount.as_fd())),
        }
    }

    /// Writes out what the freeze would have to, while nobody has to wait for it yet.
    pub fn sync(&self) {
        let sync = |file: &File| drop(fsfreeze::sync(file.as_fd()));
        match &self.what {
            What::Mount(mount) => sync(mount),
            What::Device(..) => {
                let points = self.devices.iter().flat_map(|device| stack::mount_points(*device));
                for point in points {
                    let mut options = File::options();
                    let options = options.read(true).custom_flags(libc::O_DIRECTORY | libc::O_NONBLOCK);
                    options.open(point).iter().for_each(sync);
                }
            }
        }
    }
}

/// What to freeze, in an order that works: what lies on something else comes first.
#[derive(Debug, Default)]
pub struct Plan(pub(super) Vec<Item>);

impl Plan {
    /// `nodes` are the device-mapper devices of the set, `mounts` descriptors on further file systems, `needs` what must go
    /// on working meanwhile: what to call it, and the devices it is on.
    ///
    /// Raised (invalid) when one of these lies on what is to be frozen: old data, say, would have to be written to a
    /// storage there before the file system could come to rest.
    pub fn new(nodes: &[Arc<Node>], mounts: Vec<File>, needs: &[(String, Vec<u64>)], fronts: &Fronts) -> Result<Self> {
        let mut items = Vec::new();
        for mount in mounts {
            let devices = stack::under_file(&mount);
            let label = match devices
                .first()
                .map(|device| stack::mount_points(*device))
                .unwrap_or_default()
                .first()
            {
                Some(point) => format!("the file system on {}", point.display()),
                None => "a file system".into(),
            };
            items.push(Item::new(What::Mount(mount), label, devices, fronts));
        }
        // A file system that is named twice is frozen once: the second time would be refused.
        let mut seen = Devices::new();
        items.retain(|item| item.devices.first().is_none_or(|device| seen.insert(*device)));
        for node in nodes {
            let what = What::Device(node.dm(), node.name().to_owned());
            items.push(Item::new(
                what,
                node.path().display().to_string(),
                vec![node.device()],
                fronts,
            ));
        }
        for (need, devices) in needs {
            let under: Devices = devices
                .iter()
                .flat_map(|device| stack::below(*device, fronts))
                .collect();
            let frozen = |item: &&Item| item.devices.iter().any(|device| under.contains(device));
            if let Some(item) = items.iter().find(frozen) {
                return Err(Refusal::invalid(format!(
                    "{need} lies on {}, which would be frozen for the take; it has to be elsewhere, or nothing be frozen",
                    item.label
                )));
            }
        }
        // What lies on something else has more below it. Mounts come before the device they are on, being first above.
        items.sort_by_key(|item| std::cmp::Reverse(item.below.len()));
        Ok(Self(items))
    }

    /// Freezes all, or nothing; all of it is written out. Raised (timed-out) when it takes longer than `limit`.
    pub(super) fn freeze_here(self, limit: Duration) -> Result<Standing> {
        keep_code();
        let mut frozen = Standing::begin(self.0.len(), limit)?;
        for item in self.0 {
            // Nothing is allocated from here on, but for the words of an error.
            if let Err(error) = item.freeze() {
                frozen.thaw();
                return Err(refusal(&item.label, &error));
            }
            let late = frozen.shared.keep(item);
            if late {
                frozen.thaw();
                return Err(too_late());
            }
        }
        Ok(frozen)
    }
}

impl Item {
    fn new(what: What, label: String, devices: Vec<u64>, fronts: &Fronts) -> Self {
        let below = devices
            .iter()
            .flat_map(|device| stack::below(*device, fronts))
            .collect();
        Self {
            what,
            label,
            devices,
            below,
        }
    }
}

pub(super) fn too_late() -> Refusal {
    Refusal::timed_out("file systems stood still for too long and go on now; nothing was taken")
}

fn refusal(label: &str, error: &io::Error) -> Refusal {
    match error.raw_os_error() {
        Some(libc::EBUSY) => Refusal::busy(format!(
            "{label} is frozen or suspended by another program; nothing was taken"
        )),
        Some(libc::EOPNOTSUPP) => Refusal::invalid(format!("{label} cannot be frozen; nothing was taken")),
        _ => Refusal {
            message: format!("{label} could not be frozen ({}); nothing was taken", words(error)),
            ..Refusal::io(label, error)
        },
    }
}

#[derive(Debug)]
struct Shared {
    /// Set before anything is thawed too early. Not under the lock: who thaws may wait for writes that wait at the gates
    /// of who asks.
    expired: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// In the order of freezing.
    items: Vec<Item>,
    done: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a panic aborts the process")
    }

    /// Keeps what was just frozen for the thaw; whether it is too late already.
    fn keep(&self, item: Item) -> bool {
        let mut state = self.state();
        state.items.push(item);
        self.expired.load(Ordering::SeqCst)
    }

    fn thaw(state: &mut State) {
        while let Some(item) = state.items.pop() {
            item.thaw();
        }
    }

    fn watch(&self, end: Instant) {
        let _quiet = NoReclaimIo::begin();
        let mut state = self.state();
        while !state.done {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.expired.store(true, Ordering::SeqCst);
                Self::thaw(&mut state);
                return;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .expect("a panic aborts the process")
                .0;
        }
    }
}

/// File systems that stand still; they go on when this is dropped, or when their time is over.
#[derive(Debug)]
pub(super) struct Standing {
    shared: Arc<Shared>,
    watchdog: Option<JoinHandle<()>>,
    _quiet: NoReclaimIo,
}

impl Standing {
    fn begin(count: usize, limit: Duration) -> Result<Self> {
        let shared = Arc::new(Shared {
            expired: AtomicBool::new(false),
            state: Mutex::new(State {
                items: Vec::with_capacity(count),
                ..State::default()
            }),
            changed: Condvar::new(),
        });
        let end = Instant::now() + limit.min(LONGEST);
        let watched = Arc::clone(&shared);
        let watchdog = (count > 0)
            .then(|| {
                std::thread::Builder::new()
                    .name("watchdog".into())
                    .stack_size(128 << 10)
                    .spawn(move || watched.watch(end))
            })
            .transpose()
            .map_err(|error| Refusal::io("a thread to watch over the freeze", &error))?;
        Ok(Self {
            shared,
            watchdog,
            _quiet: NoReclaimIo::begin(),
        })
    }

    fn thaw(&mut self) {
        {
            let mut state = self.shared.state();
            state.done = true;
            Shared::thaw(&mut state);
        }
        self.shared.changed.notify_all();
        if let Some(watchdog) = self.watchdog.take() {
            // It does nothing any more but end.
            let _ = watchdog.join();
        }
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        self.thaw();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_ends_what_the_take_does_not() {
        let item = Item {
            what: What::Mount(File::open("/proc/self").expect("proc")),
            label: String::new(),
            devices: vec![],
            below: Devices::new(),
        };
        let frozen = Standing::begin(1, Duration::from_millis(50)).expect("thread");
        assert!(!frozen.shared.keep(item));
        std::thread::sleep(Duration::from_millis(300));
        assert!(frozen.shared.state().items.is_empty());
        assert!(frozen.shared.expired.load(Ordering::SeqCst));
    }

    #[test]
    fn a_file_system_that_cannot_be_frozen_fails_in_words() {
        let mounts = vec![File::open("/proc/self").expect("proc")];
        let plan = Plan::new(&[], mounts, &[], &Fronts::new()).expect("plan");
        let refusal = plan.freeze_here(LONGEST).expect_err("proc cannot be frozen");
        assert!(refusal.message.ends_with("nothing was taken"), "{}", refusal.message);
    }

    #[test]
    fn a_storage_on_a_file_system_to_be_frozen_is_refused() {
        let mount = File::open("/proc/self").expect("proc");
        let needs = [("the difference storage".to_owned(), stack::under_file(&mount))];
        let refusal = Plan::new(&[], vec![mount], &needs, &Fronts::new()).expect_err("the same");
        assert_eq!(refusal.code, "invalid");
    }
}
