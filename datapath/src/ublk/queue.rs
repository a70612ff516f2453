// SPDX-License-Identifier: GPL-2.0-or-later
//! The memory of one device's queue: where the driver shows requests, and where their bytes go when it copies.
//!
//! Made on a control thread, served by the queue thread (`engine::ublk`). Dropped when no request is fetched any more:
//! the driver forgets a device only when its descriptor and its mapping are gone.

use super::params::MAX_IO;
use super::uapi::Descriptor;
use crate::mem::{Mapping, Span};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

/// What a device shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shows {
    Origin,
    /// The image that this snapshot has of the origin.
    Image(String),
}

/// Where the bytes of requests go, unless their pages are used where they are. Allocated before anything is promised to
/// the driver.
#[derive(Debug)]
pub struct Buffers {
    memory: Option<Mapping>,
    len: usize,
}

impl Buffers {
    /// `len`: the longest request, when its bytes are to be copied; 0: they are not.
    pub fn new(depth: u16, len: u32) -> io::Result<Self> {
        debug_assert!(len <= MAX_IO);
        let memory = match len {
            0 => None,
            // Populated: before 6.15 the driver repeats a request for ever whose pages are not there.
            len => Some(Mapping::populated(usize::from(depth) * len as usize)?),
        };
        let len = len as usize;
        Ok(Self { memory, len })
    }
}

#[derive(Debug)]
pub struct Queue {
    pub device: u32,
    pub shows: Shows,
    pub depth: u16,
    /// Whether the driver may read the device's partition table by itself when it starts.
    ///
    /// It does so only for servers with CAP_SYS_ADMIN, and before 7.0 inside START_DEV, with the device's locks held: when
    /// its server dies then, device, sync(2) and all who come near it hang for ever.
    pub scanned: bool,
    file: File,
    descriptors: Mapping,
    buffers: Buffers,
}

impl Queue {
    /// `file`: the character device.
    pub fn new(device: u32, shows: Shows, depth: u16, scanned: bool, buffers: Buffers, file: File) -> io::Result<Self> {
        // Exactly this length, rounded to a page: the driver refuses any other (ublk_ch_mmap).
        let descriptors = Mapping::of_driver(&file, usize::from(depth) * size_of::<Descriptor>())?;
        Ok(Self {
            device,
            shows,
            depth,
            scanned,
            file,
            descriptors,
            buffers,
        })
    }

    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The request in place `tag`, which the driver has handed over.
    pub fn descriptor(&self, tag: u16) -> Descriptor {
        assert!(tag < self.depth);
        let place = usize::from(tag) * size_of::<Descriptor>();
        let span = self.descriptors.span(place, size_of::<Descriptor>());
        // SAFETY: inside the mapping, which is page aligned, at a multiple of the structure's size; any bytes are a valid
        // Descriptor. Volatile: the driver writes here, though not while the request is ours.
        unsafe { span.as_ptr().cast::<Descriptor>().read_volatile() }
    }

    /// Where the bytes of request `tag` are; None: in the ring's buffer table.
    pub fn buffer(&self, tag: u16) -> Option<Span> {
        let Buffers { memory, len } = &self.buffers;
        memory.as_ref().map(|memory| memory.span(usize::from(tag) * len, *len))
    }
}
