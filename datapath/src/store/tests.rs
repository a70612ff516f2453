// SPDX-License-Identifier: GPL-2.0-or-later
//! The client of the store against a keeper that is only a socket.

use super::*;
use std::fs::File;
use std::path::PathBuf;

/// A socket that nobody reads but the test.
struct Keeper {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Keeper {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("blksnap-keeper-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        Self {
            socket: UnixDatagram::bind(&path).expect("bind"),
            path,
        }
    }

    fn store(&self, most: Option<usize>) -> Arc<Store> {
        Arc::new(Store::connect(self.path.to_str().expect("utf-8"), most).expect("connect"))
    }

    fn next(&self) -> (String, Vec<OwnedFd>) {
        let mut bytes = [0; 4096];
        let message = process::receive_datagram(self.socket.as_fd(), &mut bytes).expect("a message");
        (String::from_utf8_lossy(&bytes[..message.len]).into_owned(), message.fds)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn a_descriptor_is_kept_as_long_as_its_token() {
    let keeper = Keeper::new("token");
    let store = keeper.store(None);
    let null = File::open("/dev/null").expect("open");
    let kept = store.keep(Name::OriginFile(4), null.as_fd()).expect("kept");
    let (text, fds) = keeper.next();
    assert_eq!((text.as_str(), fds.len()), ("FDSTORE=1\nFDNAME=of.4\nFDPOLL=0\n", 1));
    drop(kept);
    assert_eq!(keeper.next().0, "FDSTOREREMOVE=1\nFDNAME=of.4\n");
}

#[test]
fn a_barrier_waits_until_the_keeper_has_read_it() {
    let keeper = Keeper::new("barrier");
    let store = keeper.store(None);
    let waiting = {
        let store = Arc::clone(&store);
        std::thread::spawn(move || store.sync())
    };
    while process::poll(&[keeper.socket.as_fd()], None).expect("poll") != [true] {}
    let (text, fds) = keeper.next();
    assert_eq!((text.as_str(), fds.len()), ("BARRIER=1", 1));
    assert!(!waiting.is_finished());
    drop(fds);
    waiting.join().expect("thread").expect("synced");
}

#[test]
fn a_keeper_that_is_gone_stops_nothing() {
    let keeper = Keeper::new("gone");
    let store = keeper.store(None);
    drop(keeper);
    assert!(store.works());
    let null = File::open("/dev/null").expect("open");
    store.keep(Name::Lock, null.as_fd()).expect("no error");
    store.sync().expect("no error");
    assert!(!store.works());
}

#[test]
fn a_full_store_refuses_and_says_so() {
    let keeper = Keeper::new("full");
    let store = keeper.store(Some(1));
    let null = File::open("/dev/null").expect("open");
    let first = store.keep(Name::OriginFile(1), null.as_fd()).expect("kept");
    let error = store.keep(Name::OriginFile(2), null.as_fd()).expect_err("full");
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    drop(first);
    store.keep(Name::OriginFile(3), null.as_fd()).expect("room again");
}

#[test]
fn without_a_keeper_everything_is_as_it_was() {
    let store = Arc::new(Store::default());
    let null = File::open("/dev/null").expect("open");
    let kept = store.keep(Name::Lock, null.as_fd()).expect("no error");
    store.sync().expect("no error");
    store.ready();
    drop(kept);
    assert!(!store.works());
}
