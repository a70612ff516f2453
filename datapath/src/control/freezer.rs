// SPDX-License-Identifier: GPL-2.0-or-later
//! The process that freezes and thaws for a take: `blksnap-datapath --freezer`, a child on a socket.
//!
//! Writing out and freezing a file system wait, deaf to SIGKILL, for I/O that goes through the data path itself. A thread
//! of the data path that was killed there would keep its memory and with it the ublk devices: no process after it could
//! take these over, and the I/O would never end. This process has none of them. It thaws when its time is over and
//! when the data path is gone.
//!
//! ```text
//!  → what to freeze, with descriptors     ← written   (all is written out)
//!  → go                                   ← frozen    or what went wrong, with all thawed
//!  → (end of file)                        ← thawed
//! ```

use super::error::{Refusal, Result};
use super::framing::{Lines, Sender};
use super::freeze::{too_late, Item, Plan, What, LONGEST};
use super::leftovers;
use super::stack::Devices;
use crate::dm::Dm;
use crate::fsfreeze::{close_others, keep_code, NoReclaimIo};
use crate::sys;
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};
use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long writing out may take, with everything still going on.
const WRITING_OUT: Duration = Duration::from_secs(20);
/// How long the start of a process, and a thaw, may take.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
struct Order {
    limit_ms: u64,
    items: Vec<Wanted>,
}

#[derive(Serialize, Deserialize)]
struct Wanted {
    /// A device-mapper device by its name; "": the file system of the next descriptor.
    name: String,
    label: String,
    devices: Vec<u64>,
}

/// File systems that stand still; they go on when this is dropped, or when their time is over.
#[derive(Debug, Default)]
pub struct Frozen(Option<Held>);

#[derive(Debug)]
struct Held {
    socket: UnixStream,
    /// Nothing is thawed before it, unless we say so: the other process counts from later.
    end: Instant,
    items: Vec<Item>,
    _quiet: NoReclaimIo,
}

impl Plan {
    /// Freezes all, or nothing. Raised (timed-out) when it takes longer than `limit`.
    pub fn freeze(self, limit: Duration) -> Result<Frozen> {
        if self.0.is_empty() {
            return Ok(Frozen::default());
        }
        let limit = limit.min(LONGEST);
        let socket = start().map_err(|error| Refusal::io("the process that freezes file systems", &error))?;
        let writing = socket
            .try_clone()
            .map_err(|error| Refusal::io("a descriptor", &error))?;
        let (sender, mut lines) = (Sender::new(writing), Lines::new(&socket));
        send_order(&sender, &self.0, limit)?;
        hear(&socket, &mut lines, WRITING_OUT + PATIENCE, "written").map_err(|refusal| match refusal.code {
            "timed-out" => Refusal::timed_out(
                "writing out the file systems takes too long (there is much to write, or a disk hangs); nothing was taken",
            ),
            _ => refusal,
        })?;
        // This process has to run while its own disk stands still, too.
        keep_code();
        let quiet = NoReclaimIo::begin();
        let end = Instant::now() + limit;
        sender.send(b"\"go\"".to_vec(), &[]).map_err(|error| gone(&error))?;
        // From here on the other process thaws what it has frozen when it hears no more of us.
        hear(&socket, &mut lines, limit + Duration::from_secs(1), "frozen")?;
        Ok(Frozen(Some(Held {
            socket,
            end,
            items: self.0,
            _quiet: quiet,
        })))
    }
}

fn start() -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    child("--freezer", Stdio::from(OwnedFd::from(theirs)))?;
    Ok(ours)
}

fn child(argument: &str, input: Stdio) -> io::Result<()> {
    let mut child = Command::new("/proc/self/exe")
        .arg(argument)
        .stdin(input)
        .stdout(Stdio::null())
        .spawn()?;
    // Somebody has to hear of its end, however late a disk lets it come.
    std::thread::Builder::new()
        .name("freezer".into())
        .stack_size(64 << 10)
        .spawn(move || child.wait())?;
    Ok(())
}

/// Lets all go on that a data path before this one may have stopped and its own freezer does not. The queue threads run: a
/// file system that is thawed is written.
pub fn go_on() {
    if let Err(error) = child("--resume", Stdio::null()) {
        eprintln!("blksnap-datapath: suspended devices are not looked for: {error}");
    }
}

/// The process that does it.
pub fn run_resume() -> io::Result<()> {
    let Ok(dm) = Dm::open() else { return Ok(()) };
    for name in leftovers::resume_all_ours(&dm)? {
        eprintln!("blksnap-datapath: {name} was suspended and goes on");
    }
    Ok(())
}

fn send_order(sender: &Sender, items: &[Item], limit: Duration) -> Result<()> {
    let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
    let wanted = items.iter().map(|item| {
        let name = match &item.what {
            What::Device(_, name) => name.clone(),
            What::Mount(mount) => {
                fds.push(mount.as_fd());
                String::new()
            }
        };
        Wanted {
            name,
            label: item.label.clone(),
            devices: item.devices.clone(),
        }
    });
    let order = Order {
        items: wanted.collect(),
        limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
    };
    let line = serde_json::to_vec(&order).map_err(|error| Refusal::invalid(error.to_string()))?;
    sender.send(line, &fds).map_err(|error| gone(&error))
}

fn gone(error: &io::Error) -> Refusal {
    Refusal::io(
        "the process that freezes file systems has ended; nothing was taken",
        error,
    )
}

/// Waits for the one good answer. Raised as the other process says, (timed-out) when it says nothing.
fn hear(socket: &UnixStream, lines: &mut Lines<'_>, patience: Duration, good: &str) -> Result<()> {
    socket.set_read_timeout(Some(patience)).map_err(|error| gone(&error))?;
    let line = match lines.read() {
        Ok(Some(line)) => line,
        Ok(None) => return Err(gone(&io::Error::from_raw_os_error(libc::EPIPE))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(too_late()),
        Err(error) => return Err(gone(&error)),
    };
    let said: Value = serde_json::from_slice(&line).unwrap_or_default();
    if said == good {
        return Ok(());
    }
    let message = said["message"].as_str().unwrap_or("freezing failed").to_owned();
    Err(match said["code"].as_str().unwrap_or_default() {
        "busy" => Refusal::busy(message),
        "invalid" => Refusal::invalid(message),
        "timed-out" => Refusal::timed_out(message),
        _ => Refusal {
            message,
            ..Refusal::io(
                "",
                &io::Error::from_raw_os_error(said["errno"].as_i64().unwrap_or_default() as i32),
            )
        },
    })
}

impl Frozen {
    /// How long closing the gates may take, of the `timeout` asked for.
    pub fn patience(&self, timeout: Duration) -> Duration {
        match &self.0 {
            Some(held) => timeout.min(held.end.saturating_duration_since(Instant::now())),
            None => timeout,
        }
    }

    /// Whether all stood still until now: to be asked when the gates are closed. Whatever is thawed after that waits at
    /// the gates. Raised (timed-out).
    pub fn check(&self) -> Result<()> {
        match &self.0 {
            Some(held) if Instant::now() >= held.end => Err(too_late()),
            _ => Ok(()),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Write);
        let mut lines = Lines::new(&self.socket);
        match hear(&self.socket, &mut lines, PATIENCE, "thawed") {
            // It is at it.
            Err(refusal) if refusal.code == "timed-out" => {}
            Ok(()) => {}
            // Somebody has killed it.
            Err(_) => self.items.iter().rev().for_each(Item::thaw),
        }
    }
}

/// The process itself. Its standard input is the socket.
pub fn run() -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let socket = close_others(socket)?;
    let _ = sys::lock_memory();
    keep_code();
    let _quiet = NoReclaimIo::begin();
    let sender = Sender::new(socket.try_clone()?);
    let mut lines = Lines::new(&socket);
    let say = |word: &str| sender.send(format!("{word:?}").into_bytes(), &[]);
    let Some(line) = lines.read()? else { return Ok(()) };
    let order: Order = serde_json::from_slice(&line)?;
    let limit = Duration::from_millis(order.limit_ms);
    let mounts = order.items.iter().filter(|item| item.name.is_empty()).count();
    let fds = lines.fds(mounts).ok_or(io::ErrorKind::InvalidData)?;
    let plan = Plan(items(order, fds).map_err(io::Error::other)?);
    plan.0.iter().for_each(Item::sync);
    say("written")?;
    if lines.read()?.is_none() {
        return Ok(());
    }
    match plan.freeze_here(limit) {
        Ok(standing) => {
            // When it cannot be told, or nobody is there to end it: then it ends at once.
            if say("frozen").is_ok() {
                let _ = lines.read();
            }
            drop(standing);
            say("thawed")
        }
        Err(refusal) => sender.send(json!(refusal).to_string().into_bytes(), &[]),
    }
}

fn items(order: Order, fds: Vec<OwnedFd>) -> std::result::Result<Vec<Item>, String> {
    let mut mounts = fds.into_iter().map(File::from);
    let dm = Dm::open().map(Arc::new);
    let item = |wanted: Wanted| -> std::result::Result<Item, String> {
        let what = if wanted.name.is_empty() {
            What::Mount(mounts.next().ok_or("a descriptor is missing")?)
        } else {
            What::Device(dm.clone()?, wanted.name)
        };
        Ok(Item {
            what,
            label: wanted.label,
            devices: wanted.devices,
            below: Devices::new(),
        })
    };
    order.items.into_iter().map(item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_to_freeze_leaves_all_the_time_to_the_gates() {
        let frozen = Plan::default().freeze(Duration::ZERO).expect("nothing can fail");
        assert_eq!(frozen.patience(Duration::from_secs(7)), Duration::from_secs(7));
        frozen.check().expect("never expires");
    }

    #[test]
    fn what_goes_wrong_over_there_is_told_here() {
        let (here, there) = UnixStream::pair().expect("pair");
        let sender = Sender::new(there);
        let refusal = Refusal::busy("frozen by another");
        sender.send(json!(refusal).to_string().into_bytes(), &[]).expect("send");
        let mut lines = Lines::new(&here);
        let heard = hear(&here, &mut lines, PATIENCE, "frozen").expect_err("refused");
        assert_eq!((heard.code, heard.message.as_str()), ("busy", "frozen by another"));
        sender.send(b"\"frozen\"".to_vec(), &[]).expect("send");
        hear(&here, &mut lines, PATIENCE, "frozen").expect("frozen");
        let silence = hear(&here, &mut lines, Duration::from_millis(20), "thawed").expect_err("nothing");
        assert_eq!(silence.code, "timed-out");
    }
}
