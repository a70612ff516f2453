// SPDX-License-Identifier: GPL-2.0-or-later
//! `blksnap-datapath --runtime-dir DIR`: the process that serves I/O (docs/datapath-protocol.md).

use blksnap_datapath::control::server::Server;
use blksnap_datapath::snapshot::Bell;
use blksnap_datapath::sys;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

const USAGE: &str = "usage: blksnap-datapath --runtime-dir DIR\n       blksnap-datapath --version";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(|word| word.to_str()).collect();
    let directory = match words.as_slice() {
        [Some("--version")] => {
            println!("blksnap-datapath {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        [Some("--help" | "-h")] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        [Some("--runtime-dir"), _] => PathBuf::from(&arguments[1]),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&directory) {
        Ok(()) => ExitCode::SUCCESS,
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
    let nbd = directory.join("nbd");
    std::fs::create_dir_all(&nbd).map_err(|error| failed("cannot make", &nbd, &error))?;
    let _lock = lock(&directory.join("datapath.pid"))?;
    sys::raise_file_limit();
    if let Err(error) = sys::lock_memory() {
        eprintln!("blksnap-datapath: memory cannot be locked ({error}); under memory pressure I/O may wait for paging");
    }
    let path = directory.join("datapath.sock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(|error| failed("cannot listen on", &path, &error))?;
    let bell = Bell::new().map_err(|error| (1, format!("no event descriptor: {error}")))?;
    let server = Arc::new(Server::new(directory.to_owned(), bell));
    // Nothing is served yet: what the last one said is not true any more.
    server.udev.forget_all();
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
    ready();
    signals.wait();
    server.stop(true).map_err(|refusal| (1, refusal.message))
}

/// The pid file, locked for as long as it is open.
fn lock(path: &Path) -> Result<File, Failure> {
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|error| failed("cannot open", path, &error))?;
    sys::lock_exclusively(&file).map_err(|error| match error.raw_os_error() {
        Some(libc::EWOULDBLOCK) => (3, format!("another data path serves {}", path.display())),
        _ => failed("cannot lock", path, &error),
    })?;
    let write = |file: &mut File| {
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut file).map_err(|error| failed("cannot write", path, &error))?;
    Ok(file)
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
