// SPDX-License-Identifier: GPL-2.0-or-later
//! `--hold`: a parent that keeps the data path's descriptors and starts it again when it dies.
//!
//! What systemd is for a unit with a descriptor store (sd_notify(3)), for where there is no systemd. One thread, no
//! threads ever: it forks. It knows nothing of what it keeps, opens no device and serves nothing; the child's messages
//! are only hints to it, whatever is in them.

mod keeping;

use crate::lock;
use crate::sys::process::{self, End, Program, NOT_STARTED};
use keeping::{Keeping, News};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A life that was ready for less than this was short.
const SHORT: Duration = Duration::from_millis(250);
/// So many lives in a row that never were ready are enough. (Short ones are not: as long as one gets ready at all,
/// nothing is lost.)
const ENOUGH: u32 = 10;
/// Before the next start, for each short life before it.
const DELAY: Duration = Duration::from_millis(20);
const LONGEST_DELAY: Duration = Duration::from_secs(1);

type Failure = (u8, String);

fn failed(what: &str, error: &io::Error) -> Failure {
    (1, format!("{what}: {error}"))
}

struct Child {
    pid: libc::pid_t,
    ended: OwnedFd,
    ready: Option<Instant>,
}

struct Holder {
    socket: UnixDatagram,
    signals: OwnedFd,
    null: File,
    program: Program,
    kept: Keeping,
    child: Option<Child>,
    /// Whether `ready` was passed on.
    told: bool,
    stopping: bool,
    /// Lives in a row that were short, and that never were ready.
    short: u32,
    futile: u32,
    start_at: Option<Instant>,
}

/// Holds until the data path ends in order, fails to start at all, or cannot be kept alive; the status to end with.
pub fn run(directory: &Path) -> Result<u8, Failure> {
    crate::sys::private_files();
    std::fs::create_dir_all(directory)
        .map_err(|error| failed(&format!("cannot make {}", directory.display()), &error))?;
    let mut holder = Holder::new(directory)?;
    let status = holder.hold();
    let _ = std::fs::remove_file(directory.join("hold.sock"));
    status
}

impl Holder {
    fn new(directory: &Path) -> Result<Self, Failure> {
        // First of all: who has it is the only one that may touch the sockets.
        let lock = lock::take(&directory.join("datapath.pid"))?;
        crate::sys::raise_file_limit();
        let path = directory.join("hold.sock");
        let _ = std::fs::remove_file(&path);
        let cannot = |error| failed(&format!("cannot listen on {}", path.display()), &error);
        let socket = UnixDatagram::bind(&path).map_err(cannot)?;
        process::ask_for_senders(socket.as_fd()).map_err(cannot)?;
        let kept = Keeping::new(process::file_limit(), lock.into());
        Ok(Self {
            program: program(directory, &path, kept.most()).map_err(|error| failed("cannot start", &error))?,
            socket,
            signals: process::watch_signals().map_err(|error| failed("no signals", &error))?,
            null: File::options()
                .write(true)
                .open("/dev/null")
                .map_err(|error| failed("cannot open /dev/null", &error))?,
            kept,
            child: None,
            told: false,
            stopping: false,
            short: 0,
            futile: 0,
            start_at: Some(Instant::now()),
        })
    }

    fn hold(&mut self) -> Result<u8, Failure> {
        loop {
            if self.start_at.is_some_and(|at| at <= Instant::now()) {
                self.start()?;
            }
            let mut fds = vec![self.socket.as_fd(), self.signals.as_fd()];
            fds.extend(self.child.as_ref().map(|child| child.ended.as_fd()));
            let patience = self.start_at.map(|at| {
                // Rounded up: a poll that ends early would spin.
                at.saturating_duration_since(Instant::now()) + Duration::from_millis(1)
            });
            let woken = process::poll(&fds, patience).map_err(|error| failed("poll", &error))?;
            if woken[0] {
                self.read_mail();
            }
            if woken[1] {
                let mut signal = [0; 128];
                let _ = io::Read::read(
                    &mut File::from(self.signals.try_clone().map_err(|error| failed("dup", &error))?),
                    &mut signal,
                );
                self.stopping = true;
                match &self.child {
                    Some(child) => process::terminate(child.pid),
                    None => return Ok(0),
                }
            }
            if woken.get(2) == Some(&true) {
                if let Some(status) = self.bury()? {
                    return Ok(status);
                }
            }
        }
    }

    fn start(&mut self) -> Result<(), Failure> {
        self.start_at = None;
        let (fds, names) = self.kept.to_hand_on();
        let mut environment = std::mem::take(&mut self.program.environment);
        let fixed = environment.len();
        for variable in [format!("LISTEN_FDS={}", fds.len()), format!("LISTEN_FDNAMES={names}")] {
            environment.push(CString::new(variable).expect("names have no zero bytes"));
        }
        self.program.environment = environment;
        let pid = self.program.start(&fds, self.null.as_fd());
        self.program.environment.truncate(fixed);
        let cannot = |error| failed("cannot start the data path", &error);
        let pid = pid.map_err(cannot)?;
        self.child = Some(Child {
            pid,
            ended: process::watch_process(pid).map_err(cannot)?,
            ready: None,
        });
        Ok(())
    }

    fn read_mail(&mut self) {
        let pid = self.child.as_ref().map_or(0, |child| child.pid);
        while let Some(news) = self.kept.read(self.socket.as_fd(), pid) {
            if news == News::Ready {
                if let Some(child) = &mut self.child {
                    child.ready.get_or_insert_with(Instant::now);
                }
                if !std::mem::replace(&mut self.told, true) {
                    // Who does not listen does not wait either.
                    let _ = writeln!(io::stdout(), "ready");
                    let _ = io::stdout().flush();
                    crate::sys::replace_stdout(self.null.as_fd());
                }
            }
        }
    }

    /// The child has ended. Some: so do we, with this status.
    fn bury(&mut self) -> Result<Option<u8>, Failure> {
        // What it said before its end counts: its successor is told by descriptors alone.
        self.read_mail();
        let Some(child) = self.child.take() else {
            return Ok(None);
        };
        let end = process::reap(child.pid).map_err(|error| failed("waitpid", &error))?;
        let how = match end {
            End::Status(0) => return Ok(Some(0)),
            End::Status(NOT_STARTED) if !self.told => return Err((1, "the data path could not be started".into())),
            // It said itself why it cannot start.
            End::Status(status) if !self.told || self.stopping => return Ok(Some(status as u8)),
            End::Status(status) => format!("ended with status {status}"),
            End::Signal(signal) => format!("was killed by signal {signal}"),
        };
        if self.stopping {
            return Err((1, format!("the data path {how} while it was stopping")));
        }
        let ready = child.ready.map(|ready| ready.elapsed());
        let short = ready.is_none_or(|time| time < SHORT);
        self.short = if short { self.short + 1 } else { 0 };
        self.futile = if ready.is_none() { self.futile + 1 } else { 0 };
        if self.futile >= ENOUGH {
            let text = format!(
                "the data path {how}, for the {ENOUGH}th time in a row before it could serve; giving up: what was tracked \
                 is lost, a new generation begins when it is attached again"
            );
            return Err((1, text));
        }
        let delay = (DELAY * self.short.saturating_sub(1)).min(LONGEST_DELAY);
        eprintln!(
            "blksnap-datapath: the data path (pid {}) {how}; starting it again",
            child.pid
        );
        self.start_at = Some(Instant::now() + delay);
        Ok(None)
    }
}

/// This very program, without `--hold`.
fn program(directory: &Path, socket: &Path, most: usize) -> io::Result<Program> {
    // By its name, so that a new version is what is started next.
    let own = std::env::current_exe()?;
    let text = |text: OsString| CString::new(text.into_vec()).map_err(io::Error::other);
    let absolute = |path: &Path| -> io::Result<PathBuf> { std::path::absolute(path) };
    let mut environment = Vec::new();
    for (key, value) in std::env::vars_os() {
        let ours = [
            "NOTIFY_SOCKET",
            "FDSTORE",
            "LISTEN_PID",
            "LISTEN_FDS",
            "LISTEN_FDNAMES",
            "LISTEN_PIDFDID",
        ];
        if !ours.iter().any(|name| key.as_bytes() == name.as_bytes()) {
            environment.push(text([key, value].join("=".as_ref()))?);
        }
    }
    environment.push(text(
        [OsString::from("NOTIFY_SOCKET"), absolute(socket)?.into()].join("=".as_ref()),
    )?);
    environment.push(text(format!("FDSTORE={most}").into())?);
    let directory = absolute(directory)?.into_os_string();
    Ok(Program {
        path: text(own.clone().into_os_string())?,
        arguments: [own.into_os_string(), "--runtime-dir".into(), directory]
            .into_iter()
            .map(text)
            .collect::<io::Result<_>>()?,
        environment,
    })
}
