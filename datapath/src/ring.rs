// SPDX-License-Identifier: GPL-2.0-or-later
//! The ring of one queue thread: typed submissions, completions as (token, result).
//!
//! Holds no state of requests. Whoever submits keeps the memory and the descriptor of an operation alive until its
//! completion has come; the engine does so by counting the operations of a connection or an image before it ends either.

use crate::mem::Span;
use io_uring::{opcode, squeue, types::Fd, types::Fixed, types::FsyncFlags, types::Timespec, IoUring};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// What an operation was for: a kind and two numbers, carried through the kernel as `user_data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    pub kind: Kind,
    pub index: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A client arrived at the listening socket.
    Accept = 1,
    /// The mailbox was rung.
    Mail,
    /// One second passed.
    Tick,
    /// Bytes of connection `index`.
    Receive,
    /// Replies of connection `index` were taken.
    Send,
    /// I/O of piece `index` on the origin or on a storage.
    Piece,
    /// fdatasync after piece `index`.
    Sync,
    /// Old bytes of copy `index` were read.
    CopyRead,
    /// Old bytes of copy `index` were stored.
    CopyStore,
    /// A block device has a request in place `index`, or has ended.
    Request,
}

/// The character device of a block device that is served.
#[derive(Clone, Copy, Debug)]
pub enum Served {
    /// A place in the ring's file table. The ring lets go of it only when its last operation has ended: nobody can take
    /// such a device over while a write of ours is still on its way.
    Registered(u32),
    Plain(RawFd),
}

/// `BLOCK_URING_CMD_DISCARD` of linux/blkdev.h, since 6.12.
const DISCARD: u32 = 0x12 << 8;

impl Token {
    pub fn new(kind: Kind, index: u32) -> Self {
        Self { kind, index }
    }

    fn encode(self) -> u64 {
        (self.kind as u64) << 56 | u64::from(self.index)
    }

    fn decode(data: u64) -> Option<Self> {
        const KINDS: [Kind; 10] = [
            Kind::Accept,
            Kind::Mail,
            Kind::Tick,
            Kind::Receive,
            Kind::Send,
            Kind::Piece,
            Kind::Sync,
            Kind::CopyRead,
            Kind::CopyStore,
            Kind::Request,
        ];
        let kind = *KINDS.get((data >> 56).checked_sub(1)? as usize)?;
        Some(Self::new(kind, data as u32))
    }
}

pub struct Ring {
    inner: IoUring,
}

impl Ring {
    /// To be called on the thread that will use it (`SINGLE_ISSUER`).
    ///
    /// Fails where io_uring is switched off (`kernel.io_uring_disabled`, seccomp filters of containers) or older than 6.1.
    pub fn new(entries: u32) -> io::Result<Self> {
        let inner = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_cqsize(entries * 8)
            .build(entries)?;
        Ok(Self { inner })
    }

    /// Holds a copy of `fd` until the ring itself is gone, which the kernel does only when its last operation has ended.
    ///
    /// A process that dies leaves its ring to the kernel: writes may land long after. The other end of a pipe tells.
    /// Makes the file table, with `places` more for [`Self::register_file`].
    pub fn hold(&mut self, fd: BorrowedFd<'_>, places: u32) -> io::Result<()> {
        self.inner.submitter().register_files_sparse(places + 1)?;
        self.register_file(places, Some(fd.as_raw_fd()))
    }

    fn push(&mut self, entry: squeue::Entry, token: Token) {
        let entry = entry.user_data(token.encode());
        loop {
            // SAFETY: spans live in mappings, descriptors and messages in objects that their owner keeps until the completion.
            if unsafe { self.inner.submission().push(&entry) }.is_ok() {
                return;
            }
            // Full: hand over what is queued. EBUSY and EAGAIN ask to reap completions first; those are in the
            // completion queue by then and the kernel takes entries again.
            if let Err(error) = self.inner.submit() {
                assert!(
                    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN | libc::EINTR)),
                    "io_uring_enter: {error}"
                );
            }
        }
    }

    pub fn accept(&mut self, listener: RawFd, token: Token) {
        let entry = opcode::Accept::new(Fd(listener), std::ptr::null_mut(), std::ptr::null_mut())
            .flags(libc::SOCK_CLOEXEC)
            .build();
        self.push(entry, token);
    }

    pub fn read(&mut self, fd: RawFd, into: Span, offset: u64, token: Token) {
        let entry = opcode::Read::new(Fd(fd), into.as_ptr(), into.len() as u32)
            .offset(offset)
            .build();
        self.push(entry, token);
    }

    /// `dsync`: the completion means the bytes are on the medium (`RWF_DSYNC`).
    pub fn write(&mut self, fd: RawFd, from: Span, offset: u64, dsync: bool, token: Token) {
        let flags = if dsync { libc::RWF_DSYNC } else { 0 };
        let entry = opcode::Write::new(Fd(fd), from.as_ptr(), from.len() as u32)
            .offset(offset)
            .rw_flags(flags)
            .build();
        self.push(entry, token);
    }

    /// fdatasync.
    pub fn sync(&mut self, fd: RawFd, token: Token) {
        let entry = opcode::Fsync::new(Fd(fd)).flags(FsyncFlags::DATASYNC).build();
        self.push(entry, token);
    }

    pub fn fallocate(&mut self, fd: RawFd, mode: i32, offset: u64, len: u64, token: Token) {
        let entry = opcode::Fallocate::new(Fd(fd), len).offset(offset).mode(mode).build();
        self.push(entry, token);
    }

    /// Discards `len` bytes of a block device at `offset`; completes with 0. EOPNOTSUPP or EINVAL: this kernel or device
    /// does not know how.
    pub fn discard(&mut self, fd: RawFd, offset: u64, len: u64, token: Token) {
        let mut command = [0; 16];
        // The length is where other operations have their third address, which is where commands begin.
        command[..8].copy_from_slice(&len.to_ne_bytes());
        let entry = opcode::UringCmd16::new(Fd(fd), DISCARD)
            .addr(Some(offset))
            .cmd(command)
            .build();
        self.push(entry, token);
    }

    /// The table for what block devices need: `buffers` places for the pages of requests.
    pub fn make_table(&mut self, buffers: u32) -> io::Result<()> {
        self.inner.submitter().register_buffers_sparse(buffers)
    }

    /// Puts `file` into the file table; None takes it out again.
    pub fn register_file(&mut self, place: u32, file: Option<RawFd>) -> io::Result<()> {
        let submitter = self.inner.submitter();
        submitter.register_files_update(place, &[file.unwrap_or(-1)]).map(drop)
    }

    /// A command of the ublk driver: `body` is its `ublksrv_io_cmd`, `buffer` the place in the buffer table for the
    /// request's pages, when the driver is to put them there.
    pub fn ublk(&mut self, device: Served, number: u32, body: [u8; 16], buffer: Option<u16>, token: Token) {
        let buffer = buffer.map(u64::from);
        let entry = match device {
            Served::Registered(place) => opcode::UringCmd16::new(Fixed(place), number)
                .cmd(body)
                .addr(buffer)
                .build(),
            Served::Plain(fd) => opcode::UringCmd16::new(Fd(fd), number).cmd(body).addr(buffer).build(),
        };
        self.push(entry, token);
    }

    /// Reads into the pages at place `buffer` of the buffer table, from byte `at` of them.
    pub fn read_fixed(&mut self, fd: RawFd, (buffer, at): (u16, u64), len: u32, offset: u64, token: Token) {
        // The pages have no address here: what stands for it counts from their first byte.
        let entry = opcode::ReadFixed::new(Fd(fd), at as *mut u8, len, buffer)
            .offset(offset)
            .build();
        self.push(entry, token);
    }

    /// Writes from the pages at place `buffer` of the buffer table, from byte `at` of them.
    pub fn write_fixed(
        &mut self,
        fd: RawFd,
        (buffer, at): (u16, u64),
        len: u32,
        offset: u64,
        dsync: bool,
        token: Token,
    ) {
        let flags = if dsync { libc::RWF_DSYNC } else { 0 };
        let entry = opcode::WriteFixed::new(Fd(fd), at as *const u8, len, buffer)
            .offset(offset)
            .rw_flags(flags)
            .build();
        self.push(entry, token);
    }

    pub fn receive(&mut self, socket: RawFd, into: Span, token: Token) {
        let entry = opcode::Recv::new(Fd(socket), into.as_ptr(), into.len() as u32).build();
        self.push(entry, token);
    }

    /// `message` and what it points to must stay where they are until the completion.
    pub fn send(&mut self, socket: RawFd, message: *const libc::msghdr, token: Token) {
        let entry = opcode::SendMsg::new(Fd(socket), message)
            .flags(libc::MSG_NOSIGNAL as u32)
            .build();
        self.push(entry, token);
    }

    /// Completes when `fd` is readable.
    pub fn poll(&mut self, fd: RawFd, token: Token) {
        let entry = opcode::PollAdd::new(Fd(fd), libc::POLLIN as u32).build();
        self.push(entry, token);
    }

    /// Completes with -ETIME after `after`, which must stay where it is until then.
    pub fn timeout(&mut self, after: *const Timespec, token: Token) {
        self.push(opcode::Timeout::new(after).build(), token);
    }

    /// Submits what is queued. What the kernel refuses at once has completed by then.
    pub fn submit(&mut self) -> io::Result<()> {
        match self.inner.submit() {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => Err(error),
            // What is left of it goes with the next wait.
            _ => Ok(()),
        }
    }

    /// Submits what is queued and waits for at least one completion.
    pub fn wait(&mut self) -> io::Result<()> {
        match self.inner.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The next completion that is there, with a result as of the system call: a count or -errno.
    pub fn reap(&mut self) -> Option<(Token, i32)> {
        loop {
            let entry = self.inner.completion().next()?;
            if let Some(token) = Token::decode(entry.user_data()) {
                return Some((token, entry.result()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_as_they_were_sent() {
        for (kind, index) in [(Kind::Accept, 0), (Kind::Piece, u32::MAX), (Kind::CopyStore, 7)] {
            let token = Token::new(kind, index);
            assert_eq!(Token::decode(token.encode()), Some(token));
        }
        assert_eq!(Token::decode(0), None);
        assert_eq!(Token::decode(u64::MAX), None);
    }
}
