// SPDX-License-Identifier: GPL-2.0-or-later
//! What waits, deaf to SIGKILL, for I/O that goes through the data path itself, and is therefore done by a child
//! (`blksnap-datapath --errand …`): starting and stopping ublk devices, writing out what their page cache holds.
//!
//! A thread of the data path that was killed there would keep its memory, and with it the ublk devices: no process after
//! it could take these over, and the I/O would never end. A child holds up nobody but itself.

use super::error::{Refusal, Result};
use crate::sys::process;
use crate::ublk::control::Control;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// START_DEV: a device that is told to read its partition table does it here, before 7.0.
    Start(u32),
    /// STOP_DEV: waits for what is under way.
    Stop(u32),
    /// fsync of standard input.
    Flush,
}

impl Errand {
    fn words(self) -> Vec<String> {
        match self {
            // The driver wants to know who serves.
            Self::Start(device) => vec!["start".into(), device.to_string(), std::process::id().to_string()],
            Self::Stop(device) => vec!["stop".into(), device.to_string()],
            Self::Flush => vec!["flush".into()],
        }
    }
}

/// A child at work.
#[derive(Debug)]
pub struct Running {
    what: String,
    said: ChildStdout,
}

impl Errand {
    /// Begins it; `input` is kept open until it is done. `what`: what an error is about.
    pub fn begin(self, what: String, input: Option<File>) -> Result<Running> {
        let began = || -> io::Result<ChildStdout> {
            let mut child = Command::new("/proc/self/exe")
                .arg("--errand")
                .args(self.words())
                .stdin(input.map_or_else(Stdio::null, |file| Stdio::from(OwnedFd::from(file))))
                .stdout(Stdio::piped())
                .spawn()?;
            let said = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
            // Somebody has to hear of its end, however late a disk lets it come.
            std::thread::Builder::new()
                .name("errand".into())
                .stack_size(64 << 10)
                .spawn(move || child.wait())?;
            Ok(said)
        };
        match began() {
            Ok(said) => Ok(Running { what, said }),
            Err(error) => Err(Refusal::io(&what, &error)),
        }
    }

    /// Does it. Raised (timed-out) when that takes longer than `patience`; it goes on.
    pub fn run(self, what: String, input: Option<File>, patience: Duration) -> Result<()> {
        self.begin(what, input)?.wait(Some(patience))
    }
}

impl Running {
    /// Waits for its end. Raised (timed-out), or as it ended: it may be waited for again then, or not.
    pub fn wait(&mut self, patience: Option<Duration>) -> Result<()> {
        let end = patience.map(|patience| Instant::now() + patience);
        let mut text = Vec::new();
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let ready = process::poll(&[self.said.as_fd()], left).map_err(|error| Refusal::io(&self.what, &error))?;
            if ready[0] {
                let mut part = [0; 64];
                match self.said.read(&mut part) {
                    Ok(0) => break,
                    Ok(count) => text.extend(&part[..count]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(Refusal::io(&self.what, &error)),
                }
            } else if left.is_some_and(|left| left.is_zero()) {
                let what = &self.what;
                return Err(Refusal::timed_out(format!(
                    "{what} takes too long: a disk owes an answer"
                )));
            }
        }
        match std::str::from_utf8(&text).map(|text| text.trim().parse()) {
            Ok(Ok(0)) => Ok(()),
            Ok(Ok(errno)) => Err(Refusal::io(&self.what, &io::Error::from_raw_os_error(errno))),
            _ => Err(Refusal::io(&self.what, &io::ErrorKind::BrokenPipe.into())),
        }
    }
}

/// The child. None: no such errand.
pub fn serve(words: &[Option<&str>]) -> Option<()> {
    let number = |word: &Option<&str>| word.and_then(|word| word.parse::<u32>().ok());
    let done = match words {
        [Some("start"), device, server] => {
            let (device, server) = (number(device)?, number(server)?);
            Control::open().and_then(|mut control| control.start(device, server))
        }
        [Some("stop"), device] => {
            let device = number(device)?;
            match Control::open().and_then(|mut control| control.stop(device)) {
                // Gone already: it was tried before.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
                done => done,
            }
        }
        [Some("flush")] => {
            let file = io::stdin().as_fd().try_clone_to_owned().map(File::from);
            file.and_then(|file| file.sync_all())
        }
        _ => return None,
    };
    let errno = done.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0);
    // Who does not listen does not wait either.
    let _ = writeln!(io::stdout(), "{errno}");
    Some(())
}
