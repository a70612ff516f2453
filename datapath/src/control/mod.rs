// SPDX-License-Identifier: GPL-2.0-or-later
//! The border to the service: docs/datapath-protocol.md in code. Decides nothing that the service could decide.
//!
//! [`devices`] are block devices in /dev, [`framing`] is lines with descriptors, [`request`] their meaning, [`registry`]
//! what exists, [`keeping`] what outlives the process, [`take`] the one instant,
//! [`server`] who is connected, [`maintenance`] growth and events. All of it may block and allocate: no I/O passes here.

pub mod devices;
pub mod ends;
pub mod errand;
pub mod error;
pub mod framing;
pub mod freeze;
pub mod freezer;
pub mod insertion;
pub mod keeping;
pub mod leftovers;
pub mod maintenance;
pub mod node;
pub mod nodes;
pub mod notes;
pub mod origins;
pub mod registry;
pub mod removal;
pub mod request;
pub mod resize;
pub mod server;
pub mod snapshots;
pub mod stack;
pub mod take;
