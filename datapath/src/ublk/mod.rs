// SPDX-License-Identifier: GPL-2.0-or-later
//! The ublk driver seen from user space: numbers and structures, control commands, parameters, a device's queue.
//!
//! Nothing here serves a request (that is `engine::ublk`) and nothing decides when a device is made or ended
//! (`control::devices`). [`uapi`] is `linux/ublk_cmd.h`, [`control`] the commands of `/dev/ublk-control`, [`params`] what
//! a device takes over from the one below it, [`queue`] the memory of one served device,
//! [`stamp`] whose a device is.

pub mod control;
pub mod params;
pub mod queue;
pub mod stamp;
pub mod uapi;
