// SPDX-License-Identifier: GPL-2.0-or-later
//! A process that dies inside a call of the rules leaves the new slot and the old state, never the new state alone.
//!
//! A child makes the call on shared memory in which it may not write the states: it dies at its store to the state, as
//! far as it had come before. What it leaves is what `Step`s with `cut` assume, and recovery is run on it.

use blksnap_datapath::cow::{BeforeImageWrite, Chunks, Recovered, Source, State};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicU8, Ordering};

const PAGE: usize = 65536;

/// The table of one chunk in memory shared with a child: the slot in the first part, the state in the second.
struct Table {
    memory: NonNull<u8>,
}

impl Table {
    fn new(state: State, slot: u64) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: a new anonymous mapping, nothing of ours is touched.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), 2 * PAGE, protection, flags, -1, 0) };
        assert_ne!(memory, libc::MAP_FAILED);
        let table = Self {
            memory: NonNull::new(memory.cast()).expect("a mapping"),
        };
        table.slot()[0].store(slot, Ordering::Relaxed);
        table.state()[0].store(state as u8, Ordering::Relaxed);
        table
    }

    fn slot(&self) -> &[AtomicU64] {
        // SAFETY: the start of the mapping is aligned and lives as long as `self`; it is only used as this atomic.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), 1) }
    }

    fn state(&self) -> &[AtomicU8] {
        // SAFETY: the second part of the mapping, which lives as long as `self`; it is only used as this atomic.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(PAGE).cast(), 1) }
    }

    /// Runs `call` in a child that dies when it stores the state.
    fn die_in(&self, call: impl FnOnce(&Chunks)) {
        let mut readers = [0];
        let chunks = Chunks::new(self.state(), self.slot(), &mut readers);
        // SAFETY: the child only makes system calls and atomic stores, and never returns.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            let no_core = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: plain system calls; the mapping is ours and only this process loses its right to write it.
            unsafe {
                libc::setrlimit(libc::RLIMIT_CORE, &no_core);
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                libc::mprotect(self.memory.as_ptr().add(PAGE).cast(), PAGE, libc::PROT_READ);
            }
            call(&chunks);
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: `child` is ours and `status` is a place for the answer.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert!(
            libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV,
            "the child ended with {status:#x}"
        );
    }

    fn with<R>(&self, question: impl FnOnce(&Chunks) -> R) -> R {
        question(&Chunks::new(self.state(), self.slot(), &mut [0]))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; no reference to it outlives `self`.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), 2 * PAGE) };
    }
}

#[test]
fn a_death_in_begin_copy_leaves_the_chunk_untouched() {
    let table = Table::new(State::None, 0);
    table.die_in(|chunks| chunks.begin_copy(0, 5));
    assert_eq!(
        (
            table.with(|chunks| chunks.state(0)),
            table.slot()[0].load(Ordering::Relaxed)
        ),
        (State::None, 5)
    );
    assert_eq!(table.with(|chunks| chunks.recover(0)), Recovered::Nothing);
    assert_eq!(table.with(|chunks| chunks.source(0)), Source::Origin);
}

#[test]
fn a_death_in_stored_leaves_a_chunk_that_is_found_in_the_storage() {
    for offset in [0, 3 << 16, (1 << 63) - (1 << 16)] {
        let table = Table::new(State::Storing, 5);
        table.die_in(|chunks| chunks.stored(0, offset));
        assert_eq!(table.with(|chunks| chunks.state(0)), State::Storing);
        assert_eq!(table.with(|chunks| chunks.recover(0)), Recovered::Nothing);
        assert_eq!(table.with(|chunks| chunks.source(0)), Source::Storage(offset));
    }
}

#[test]
fn a_death_in_copied_leaves_a_chunk_that_is_copied_again() {
    let table = Table::new(State::Reading, 5);
    table.die_in(|chunks| chunks.copied(0, false));
    assert_eq!(table.with(|chunks| chunks.recover(0)), Recovered::Nothing);
    assert_eq!(table.with(|chunks| chunks.source(0)), Source::Origin);
}

#[test]
fn a_death_in_materialise_leaves_a_chunk_of_zeros() {
    let table = Table::new(State::Zero, 0);
    table.die_in(|chunks| chunks.materialise(0, 5));
    assert_eq!(
        (
            table.with(|chunks| chunks.state(0)),
            table.slot()[0].load(Ordering::Relaxed)
        ),
        (State::Zero, 5)
    );
    assert_eq!(table.with(|chunks| chunks.recover(0)), Recovered::Nothing);
    assert_eq!(table.with(|chunks| chunks.source(0)), Source::Zero);
    assert_eq!(
        table.with(|chunks| chunks.before_image_write(0)),
        BeforeImageWrite::Materialise
    );
}
