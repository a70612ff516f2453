// SPDX-License-Identifier: GPL-2.0-or-later
//! `datapath.pid`: whose the runtime directory is. Locked (flock) as long as its open file description lives, in
//! whatever process; it contains the pid of the data path.

use crate::sys;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Exit status and text.
type Failure = (u8, String);

/// Takes the lock. Raised with status 3 when another process has it.
pub fn take(path: &Path) -> Result<File, Failure> {
    let failed = |what: &str, error: &io::Error| (1, format!("{what} {}: {error}", path.display()));
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|error| failed("cannot open", &error))?;
    sys::lock_exclusively(&file).map_err(|error| match error.raw_os_error() {
        Some(libc::EWOULDBLOCK) => (3, format!("another data path serves {}", path.display())),
        _ => failed("cannot lock", &error),
    })?;
    Ok(file)
}

/// Says that this process serves.
pub fn write_pid(file: &File) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let text = format!("{}\n", std::process::id());
    // Never empty in between: the new pid covers the old one, then the rest of that goes.
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(text.len() as u64)?;
    (&mut &*file).flush()
}
