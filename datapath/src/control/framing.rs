// SPDX-License-Identifier: GPL-2.0-or-later
//! Lines with file descriptors over a stream socket. Knows nothing of what the lines say.

use crate::sys;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

/// The longest line, with its newline.
pub const MAX_LINE: usize = 1 << 20;

/// The receiving half of a connection.
pub struct Lines<'a> {
    socket: &'a UnixStream,
    buffer: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl<'a> Lines<'a> {
    pub fn new(socket: &'a UnixStream) -> Self {
        Self {
            socket,
            buffer: Vec::new(),
            fds: VecDeque::new(),
        }
    }

    /// The next line without its newline; None when the peer is gone. Raised (InvalidData) for a line that is too long.
    pub fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut looked = 0;
        loop {
            if let Some(end) = self.buffer[looked..].iter().position(|byte| *byte == b'\n') {
                if looked + end >= MAX_LINE {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"));
                }
                let rest = self.buffer.split_off(looked + end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.pop();
                return Ok(Some(line));
            }
            looked = self.buffer.len();
            if looked >= MAX_LINE {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "line too long"));
            }
            let mut chunk = [0_u8; 16 << 10];
            let mut fds = Vec::new();
            let count = match sys::receive_with_fds(self.socket.as_fd(), &mut chunk, &mut fds) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if count == 0 {
                return Ok(None);
            }
            self.fds.extend(fds);
            if self.fds.len() > sys::MAX_FDS {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "too many descriptors"));
            }
            self.buffer.extend(&chunk[..count]);
        }
    }

    /// The descriptors of the line just returned: exactly `count`, or None (and all that have come are closed).
    pub fn fds(&mut self, count: usize) -> Option<Vec<OwnedFd>> {
        if self.fds.len() < count {
            self.fds.clear();
            return None;
        }
        let mine = self.fds.drain(..count).collect();
        if self.buffer.is_empty() && !self.fds.is_empty() {
            self.fds.clear();
            return None;
        }
        Some(mine)
    }
}

/// The sending half, shared by the connection's thread and the maintenance thread (events).
pub struct Sender {
    socket: Mutex<UnixStream>,
}

impl Sender {
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket: Mutex::new(socket),
        }
    }

    /// One line with descriptors on its first byte. An error (also of a peer that does not read) ends the connection.
    pub fn send(&self, mut line: Vec<u8>, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        line.push(b'\n');
        let socket = self.socket.lock().expect("no holder of this lock panics");
        let result = Self::send_all(&socket, &line, fds);
        if result.is_err() {
            // The receiving half hears of it by this.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        result
    }

    fn send_all(socket: &UnixStream, mut bytes: &[u8], mut fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        while !bytes.is_empty() {
            match sys::send_with_fds(socket.as_fd(), bytes, fds) {
                Ok(count) => {
                    bytes = &bytes[count..];
                    fds = &[];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;

    #[test]
    fn descriptors_stay_with_the_line_they_were_sent_with() {
        let (here, there) = UnixStream::pair().expect("pair");
        let file = File::open("/dev/null").expect("open");
        let sender = Sender::new(there);
        sender.send(b"none".to_vec(), &[]).expect("send");
        sender
            .send(b"two".to_vec(), &[file.as_fd(), file.as_fd()])
            .expect("send");
        sender.send(b"one".to_vec(), &[file.as_fd()]).expect("send");
        let mut lines = Lines::new(&here);
        for (text, count) in [("none", 0), ("two", 2), ("one", 1)] {
            assert_eq!(lines.read().expect("line"), Some(text.as_bytes().to_vec()));
            assert_eq!(lines.fds(count).map(|fds| fds.len()), Some(count));
        }
    }

    #[test]
    fn descriptors_that_nobody_announced_are_closed() {
        let (here, there) = UnixStream::pair().expect("pair");
        let file = File::open("/dev/null").expect("open");
        Sender::new(there).send(b"x".to_vec(), &[file.as_fd()]).expect("send");
        let mut lines = Lines::new(&here);
        lines.read().expect("line");
        assert!(lines.fds(0).is_none());
        assert!(lines.fds.is_empty());
    }

    #[test]
    fn a_line_without_end_is_an_error_and_not_a_full_memory() {
        let (here, mut there) = UnixStream::pair().expect("pair");
        let writer = std::thread::spawn(move || {
            // Ends with an error when the reader hangs up.
            while there.write_all(&[b'x'; 65536]).is_ok() {}
        });
        let error = Lines::new(&here).read().expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(here);
        writer.join().expect("writer");
    }
}
