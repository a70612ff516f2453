// SPDX-License-Identifier: GPL-2.0-or-later
//! What the holder keeps, and how the child's messages change it (sd_notify(3)). No process here.

use crate::sys::process::{receive_datagram, Datagram};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Descriptors kept at most, however many this process may have
/// (their names are one environment variable, which has to stay below 128 KiB).
const MOST: u64 = 6000;
/// The longest name.
const NAME_LEN: usize = 64;

#[derive(Debug)]
pub struct Keeping {
    fds: Vec<(String, OwnedFd)>,
    most: usize,
    complained: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    Ready,
    /// Nothing that anybody has to do something about.
    Nothing,
}

impl Keeping {
    /// Starts with the lock of the runtime directory, which every child has to hold.
    pub fn new(file_limit: u64, lock: OwnedFd) -> Self {
        // A child has each twice for a moment while it is started.
        let most = (file_limit / 2).saturating_sub(64).min(MOST) as usize;
        Self {
            fds: vec![("lock".into(), lock)],
            most,
            complained: false,
        }
    }

    pub fn most(&self) -> usize {
        self.most
    }

    /// The descriptors and their names as `LISTEN_FDNAMES` has them.
    pub fn to_hand_on(&self) -> (Vec<BorrowedFd<'_>>, String) {
        let names: Vec<_> = self.fds.iter().map(|(name, _)| name.as_str()).collect();
        (self.fds.iter().map(|(_, fd)| fd.as_fd()).collect(), names.join(":"))
    }

    /// Reads one message and does what it says, if it is from process `pid`. None: no message is there.
    pub fn read(&mut self, socket: BorrowedFd<'_>, pid: libc::pid_t) -> Option<News> {
        let mut bytes = [0; 4096];
        let message = receive_datagram(socket, &mut bytes).ok()?;
        if message.pid != pid || pid == 0 {
            return Some(News::Nothing);
        }
        if message.cut {
            self.complain("a message that is too long, or a descriptor more than this process may have");
            return Some(News::Nothing);
        }
        Some(self.obey(&bytes[..message.len], message))
    }

    fn obey(&mut self, text: &[u8], message: Datagram) -> News {
        let text = String::from_utf8_lossy(text);
        let value = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key).and_then(|rest| rest.strip_prefix('=')))
        };
        let name = value("FDNAME").unwrap_or("stored");
        if value("FDSTOREREMOVE") == Some("1") {
            self.fds.retain(|(kept, _)| kept != name);
        } else if value("FDSTORE") == Some("1") {
            self.keep(name, message.fds);
        }
        // BARRIER=1: its descriptor is closed by now, or when this returns.
        match value("READY") {
            Some("1") => News::Ready,
            _ => News::Nothing,
        }
    }

    fn keep(&mut self, name: &str, fds: Vec<OwnedFd>) {
        let right =
            (1..=NAME_LEN).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':');
        if !right {
            return self.complain("a descriptor with a name that is none");
        }
        for fd in fds {
            if self.fds.len() >= self.most {
                return self.complain("more descriptors than are kept");
            }
            self.fds.push((name.to_owned(), fd));
        }
    }

    /// Once: a child that is mad may be so a thousand times a second.
    fn complain(&mut self, what: &str) {
        if !std::mem::replace(&mut self.complained, true) {
            eprintln!("blksnap-datapath: the data path sent its holder {what}; not kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;
    use std::fs::File;
    use std::os::unix::net::UnixDatagram;

    struct Case {
        keeping: Keeping,
        here: UnixDatagram,
        there: UnixDatagram,
        null: File,
    }

    impl Case {
        fn new(file_limit: u64) -> Self {
            let null = File::open("/dev/null").expect("open");
            let (here, there) = UnixDatagram::pair().expect("pair");
            sys::process::ask_for_senders(here.as_fd()).expect("credentials");
            Self {
                keeping: Keeping::new(file_limit, null.try_clone().expect("dup").into()),
                here,
                there,
                null,
            }
        }

        fn send(&mut self, text: &[u8], fds: usize) -> News {
            self.send_as(text, fds, std::process::id() as i32)
        }

        fn send_as(&mut self, text: &[u8], fds: usize, pid: i32) -> News {
            let fds = vec![self.null.as_fd(); fds];
            sys::send_with_fds(self.there.as_fd(), text, &fds).expect("send");
            self.keeping.read(self.here.as_fd(), pid).expect("a message")
        }

        fn names(&self) -> String {
            self.keeping.to_hand_on().1
        }
    }

    #[test]
    fn descriptors_are_kept_and_forgotten_by_name() {
        let mut case = Case::new(1 << 20);
        case.send(b"FDSTORE=1\nFDNAME=a.1\nFDPOLL=0\n", 1);
        case.send(b"FDSTORE=1\nFDNAME=a.1", 1);
        case.send(b"FDNAME=b\nFDSTORE=1\n", 2);
        assert_eq!(case.names(), "lock:a.1:a.1:b:b");
        case.send(b"FDSTOREREMOVE=1\nFDNAME=a.1\n", 0);
        assert_eq!(case.names(), "lock:b:b");
        assert_eq!(case.send(b"READY=1", 0), News::Ready);
    }

    #[test]
    fn garbage_changes_nothing() {
        let mut case = Case::new(1 << 20);
        let long = [b'x'; 5000];
        let wrong: [&[u8]; 8] = [
            b"\xff\xfe\0\0",
            b"FDSTORE=1\nFDNAME=\n",
            b"FDSTORE=1\nFDNAME=a:b\n",
            b"FDSTORE=1\nFDNAME=a b\n",
            b"FDSTORE=2\nFDNAME=a\n",
            b"FDSTOREREMOVE=1\nFDNAME=nothing\n",
            b"READY=0\nSTOPPING=1\nMAINPID=1\n",
            &long,
        ];
        for text in wrong {
            assert_eq!(case.send(text, 1), News::Nothing);
        }
        case.send(b"BARRIER=1", 1);
        assert_eq!(case.names(), "lock");
    }

    #[test]
    fn only_the_child_is_listened_to() {
        let mut case = Case::new(1 << 20);
        for pid in [0, 1] {
            assert_eq!(case.send_as(b"READY=1\nFDSTORE=1\nFDNAME=a\n", 1, pid), News::Nothing);
        }
        assert_eq!(case.names(), "lock");
    }

    #[test]
    fn descriptors_are_bounded() {
        let mut case = Case::new(2 * (64 + 10));
        for _ in 0..5 {
            case.send(b"FDSTORE=1\nFDNAME=a\n", 4);
        }
        assert_eq!(case.keeping.fds.len(), 10);
        case.send(b"FDSTOREREMOVE=1\nFDNAME=a\n", 0);
        case.send(b"FDSTORE=1\nFDNAME=b\n", 1);
        assert_eq!(case.names(), "lock:b");
    }
}
