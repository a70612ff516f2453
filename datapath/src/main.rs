// SPDX-License-Identifier: GPL-2.0-or-later
//! `blksnap-datapath --runtime-dir DIR`: the process that serves I/O (docs/datapath-protocol.md); with `--hold` the one
//! that starts it again when it dies.

use blksnap_datapath::control::server::Server;
use blksnap_datapath::control::{errand, freezer};
use blksnap_datapath::snapshot::Bell;
use blksnap_datapath::store::{Inherited, Name};
use blksnap_datapath::ublk::stamp;
use blksnap_datapath::{hold, lock, recover, sys, udev};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

const USAGE: &str = "usage: blksnap-datapath [--hold] --runtime-dir DIR\n       blksnap-datapath --version";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(|word| word.to_str()).collect();
    let result = match words.as_slice() {
        [Some("--version")] => {
            println!("blksnap-datapath {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        [Some("--help" | "-h")] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        [Some("--runtime-dir"), _] => run(&PathBuf::from(&arguments[1])).map(|()| 0),
        [Some("--freezer")] => freezer::run()
            .map(|()| 0)
            .map_err(|error| (1, format!("freezing: {error}"))),
        [Some("--resume")] => freezer::run_resume()
            .map(|()| 0)
            .map_err(|error| (1, format!("resuming: {error}"))),
        [Some("--errand"), words @ ..] => errand::serve(words).map(|()| 0).ok_or((2, USAGE.into())),
        [Some("--hold"), Some("--runtime-dir"), _] => hold::run(&PathBuf::from(&arguments[2])),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err((status, text)) => {
            eprintln!("blksnap-datapath: {text}");
            ExitCode::from(status)
        }
    }
}

type Failure = (u8, String);

fn failed(what: &str, path: &Path, error: &io::Error) -> Failure {
    (1, format!("{what} {}: {error}", path.display()))
}

fn run(directory: &Path) -> Result<(), Failure> {
    sys::private_files();
    // Before any other thread exists, so that all inherit it.
    let signals = sys::Signals::block();
    let found = Inherited::take().map_err(|error| (1, format!("the descriptor store cannot be reached: {error}")))?;
    let Inherited {
        store,
        mut fds,
        strangers,
    } = found;
    let nbd = directory.join("nbd");
    std::fs::create_dir_all(&nbd).map_err(|error| failed("cannot make", &nbd, &error))?;
    let path = directory.join("datapath.pid");
    let (lock, stored) = match fds.remove(&Name::Lock) {
        Some(lock) => (File::from(lock), true),
        None => (lock::take(&path)?, false),
    };
    lock::write_pid(&lock).map_err(|error| failed("cannot write", &path, &error))?;
    sys::raise_file_limit();
    if let Err(error) = sys::lock_memory() {
        eprintln!("blksnap-datapath: memory cannot be locked ({error}); under memory pressure I/O may wait for paging");
    }
    let bell = Bell::new().map_err(|error| (1, format!("no event descriptor: {error}")))?;
    let life = recover::life_after(fds.keys());
    udev::begin(directory);
    stamp::begin(directory);
    let server = Arc::new(Server::new(directory.to_owned(), bell, Arc::new(store), life));
    let keep = |name, fd| server.keep_one(name, fd).map_err(|error| (1, error.to_string()));
    keep(Name::Lock, (!stored).then_some(lock.as_fd()))?;
    let path = directory.join("datapath.sock");
    let (listener, stored) = match fds.remove(&Name::Control) {
        Some(listener) => (UnixListener::from(listener), true),
        None => {
            let _ = std::fs::remove_file(&path);
            let listener = UnixListener::bind(&path);
            (
                listener.map_err(|error| failed("cannot listen on", &path, &error))?,
                false,
            )
        }
    };
    keep(Name::Control, (!stored).then_some(listener.as_fd()))?;
    recover::run(&server, fds, &strangers).map_err(|text| (1, text))?;
    for (name, work) in [("maintenance", None), ("listener", Some(listener))] {
        let server = Arc::clone(&server);
        std::thread::Builder::new()
            .name(name.into())
            .stack_size(256 << 10)
            .spawn(move || match work {
                None => server.maintain(),
                Some(listener) => server.listen(&listener),
            })
            .map_err(|error| (1, format!("no thread: {error}")))?;
    }
    server
        .watch_keeper()
        .map_err(|error| (1, format!("no thread: {error}")))?;
    ready();
    server.store.ready();
    signals.wait();
    server.stop(true).map_err(|refusal| (1, refusal.message))
}

/// Tells whoever started us, and lets go of its pipe.
fn ready() {
    // Who does not listen does not wait either.
    let _ = writeln!(io::stdout(), "ready");
    let _ = io::stdout().flush();
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        sys::replace_stdout(null.as_fd());
    }
}
