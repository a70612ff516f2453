// SPDX-License-Identifier: GPL-2.0-or-later
//! The I/O path of blksnap: one thread and one io_uring per origin, change map, copy-before-write images, two front ends.
//!
//! A request travels `nbd` (bytes to requests) → `engine` (gate, marks, copies, origin I/O) → `nbd` (replies), or comes
//! from and goes back to the kernel's ublk driver (`ublk`).
//! `control` is the border to the service (docs/datapath-protocol.md); it never touches a request.
//! `store` keeps descriptors beyond the death of the process, `recover` goes on from them, `hold` starts it again.
//! `cbt` and `cow` are the pure rules; `mem`, `ring`, `sys`, `fsfreeze` and `dm::ioctl` are the only places with `unsafe`.

pub mod cbt;
pub mod control;
pub mod cow;
pub mod dm;
pub mod engine;
pub mod fsfreeze;
pub mod hold;
pub mod lock;
pub mod mem;
pub mod nbd;
pub mod origin;
pub mod pages;
pub mod recover;
pub mod ring;
pub mod snapshot;
pub mod storage;
pub mod store;
pub mod sys;
pub mod ublk;
pub mod udev;
