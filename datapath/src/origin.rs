// SPDX-License-Identifier: GPL-2.0-or-later
//! The file or block device behind an origin: how it is read and written, and whether it is still what it was.

use crate::mem::Span;
use crate::sys::{self, Node};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStringExt;

/// How a read that should not wait can be made without the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inline {
    /// Always through the ring (block devices, O_DIRECT).
    Never,
    /// `RWF_NOWAIT`: answers from the page cache or says EAGAIN.
    NoWait,
    /// tmpfs: knows no `RWF_NOWAIT` but does not wait for a disk either.
    Memory,
}

#[derive(Debug)]
pub struct Origin {
    file: File,
    node: Node,
    inline: Inline,
    /// Where sysfs has it for as long as it is there; None for a file, and where there is no sysfs.
    listed: Option<CString>,
    /// Another number is another medium. 0: not known, or a device-mapper device, whose table may change.
    diskseq: u64,
    pub read_only: bool,
}

impl Origin {
    pub fn new(file: File, node: Node, read_only: bool) -> Self {
        let inline = match (node.block, sys::is_tmpfs(&file)) {
            (true, _) => Inline::Never,
            (false, true) => Inline::Memory,
            (false, false) => Inline::NoWait,
        };
        let listed = node.block.then(|| sys::sysfs_of(node.identity.0));
        let is_dm = node.block && sys::sysfs_of(node.identity.0).join("dm").exists();
        let diskseq = if is_dm { 0 } else { sys::diskseq(&file).unwrap_or(0) };
        Self {
            diskseq,
            file,
            node,
            inline,
            listed: listed
                .filter(|path| path.exists())
                .and_then(|path| CString::new(path.into_os_string().into_vec()).ok()),
            read_only,
        }
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// 0: not known, or it says nothing (device-mapper).
    pub fn diskseq(&self) -> u64 {
        self.diskseq
    }

    pub fn node(&self) -> Node {
        self.node
    }

    pub fn set_node(&mut self, node: Node) {
        self.node = node;
    }

    /// Reads now if that needs no waiting. EAGAIN: ask the ring.
    pub fn read_now(&mut self, into: Span, offset: u64) -> Result<usize, i32> {
        match self.inline {
            Inline::Never => Err(libc::EAGAIN),
            Inline::Memory => sys::read_at(self.fd(), into, offset, true),
            Inline::NoWait => sys::read_at(self.fd(), into, offset, false).map_err(|errno| {
                if errno == libc::EOPNOTSUPP {
                    self.inline = Inline::Never;
                    return libc::EAGAIN;
                }
                errno
            }),
        }
    }

    /// Whether writes go to the page cache and are made in place ([`Self::write_now`]): a copy of memory as a rule, and
    /// the kernel's own brake (dirty throttling) when the disk is slower than the writers.
    pub fn writes_inline(&self) -> bool {
        !self.node.block
    }

    pub fn write_now(&self, from: Span, offset: u64) -> Result<usize, i32> {
        sys::write_at(self.fd(), from, offset)
    }

    /// What the file or device is now. Fails with ENODEV when the device is gone or has another medium: an open
    /// partition keeps its size, and a card reader takes writes for whatever card is in it.
    pub fn stat(&self) -> io::Result<Node> {
        if self.listed.as_ref().is_some_and(|path| !sys::exists(path))
            || (self.diskseq != 0 && sys::diskseq(&self.file).is_ok_and(|now| now != self.diskseq))
        {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        sys::node(&self.file)
    }

    /// The end of the data or hole that `offset` is in, and whether it is a hole. Block devices are all data.
    ///
    /// Asks the caller to have seen that the file still reaches to `end`: behind its end everything looks like a hole.
    pub fn extent(&self, offset: u64, end: u64) -> (u64, bool) {
        if self.node.block {
            return (end, false);
        }
        match sys::seek(self.fd(), offset, libc::SEEK_DATA) {
            Ok(data) if data > offset => (data.min(end), true),
            Ok(_) => {
                let hole = sys::seek(self.fd(), offset, libc::SEEK_HOLE).unwrap_or(end);
                (hole.clamp(offset + 1, end), false)
            }
            // No data behind `offset`. Any other failure must not be taken for a hole.
            Err(libc::ENXIO) => (end, true),
            Err(_) => (end, false),
        }
    }

    /// Whether a file still has `size` bytes. A block device that shrinks fails its I/O itself.
    pub fn reaches(&self, size: u64) -> bool {
        self.node.block || sys::size(self.fd()).is_some_and(|now| now >= size)
    }
}
