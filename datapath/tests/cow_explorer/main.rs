// SPDX-License-Identifier: GPL-2.0-or-later
//! Every interleaving of copy-before-write over 2 to 3 chunks, driven through the real `cow::Chunks`.
//!
//! A world (`world`) is an origin, its images, and the writers, image readers, image writers, takes and crashes that a
//! scenario (`scenarios`) allows. `steps` says what can happen next, `apply` makes it happen through the real rules,
//! `check` says what must hold in each state, and `explore` visits all reachable states, shortest paths first. The
//! engine is single-threaded per origin, so what interleaves is completions; a step is one call of the rules or one
//! completion, and a crash can come between any two of them and between the two memory stores of one call.
//!
//! Checked in each reachable state:
//! 1. image reads, those in flight and one made right now, return the bytes of the instant and of the image's own writes;
//! 2. when everything has ended, the whole image is right (a consequence of 1 in the last state);
//! 3. no acknowledged write is lost, on the origin or on an image, unless a later one replaced it;
//! 4. something can go on until all is done, and each step but a crash is progress: no deadlock, no livelock;
//! 5. no write is submitted for a chunk whose old bytes are not safe or are being read from the origin;
//! 6. the rules never panic.
//!
//! `mutants` breaks the rules and the engine around them one by one and demands that the explorer sees each of them.
//! `store_order` shows on the real code that a crash inside a call leaves the memory as the world assumes.
//!
//! Not a test of the engine: who wakes whom, buffers, and I/O errors are not here.

mod apply;
mod check;
mod explore;
mod mutants;
mod rules;
mod scenarios;
mod steps;
mod store_order;
mod world;
