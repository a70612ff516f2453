// SPDX-License-Identifier: GPL-2.0-or-later
//! The NBD front end (NBD protocol, doc/proto.md of the nbd project): bytes of a client to requests, answers to bytes.
//!
//! `proto` is the wire format, `negotiate` the option haggling, both pure; the transmission phase is `engine::request`
//! (in) and `engine::reply` (out), where requests meet the gate, the map and the copies.

pub mod negotiate;
pub mod proto;
