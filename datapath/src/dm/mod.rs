// SPDX-License-Identifier: GPL-2.0-or-later
//! Device-mapper without libdevmapper: the kernel's interface as it is, and the links in /dev/mapper.
//!
//! Which device is made for what is not decided here (`control::node`). [`ioctl`] is one of the places with `unsafe`.

pub mod ioctl;
pub mod link;
pub mod table;
pub mod uapi;

pub use ioctl::{Dm, Freeze, Status, Udev};
pub use table::{Table, Target};

/// What every uuid of ours begins with, so that udev's rules and others can tell our devices.
pub const PREFIX: &str = "BLKSNAP-";
