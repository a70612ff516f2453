// SPDX-License-Identifier: GPL-2.0-or-later
//! The state page of an origin: numbers, generation, size, which memory is its maps, what the file looked like.
//!
//! Two slots, written in turns: a death in the middle of a change leaves the slot before it. The count of a slot is 0
//! while it is written and makes it valid with the last store. Nothing is reordered by a death: what a process has
//! stored is in the memory, in the order of its program; Release keeps the compiler (and other readers) to that order.

use super::{uuid_text, uuid_words};
use crate::mem::PAGE;
use std::sync::atomic::{AtomicU64, Ordering};

pub const WORDS: usize = PAGE / 8;
const MAGIC: u64 = u64::from_le_bytes(*b"BLKSNAP2");
/// Whether the origin was written since `modified_ns` was looked at: a word of its own, set by the first such write.
const WRITTEN: usize = 1;
const SLOTS: [usize; 2] = [8, 64];

/// Why a map cannot be trusted or an origin cannot be served, as the engine says it; a text that is not here comes back
/// as [`UNKNOWN`].
const REASONS: [&str; 8] = [
    "the size of the origin changed",
    "the origin was written behind the tracker's back",
    "the image file or device became smaller",
    "the image file or device cannot be looked at any more",
    "the image file became smaller",
    "another program has put another table under its device-mapper device",
    "another program has removed its device-mapper device",
    "its device-mapper device cannot be looked at",
];
const UNKNOWN: &str = "it was so before the data path was started again";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State<'a> {
    pub base: u32,
    pub active: u32,
    pub generation: &'a str,
    pub size: u64,
    pub block_size: u64,
    pub live_sequence: u64,
    pub taken_sequence: u64,
    pub taken_base: u32,
    /// Of `Shared::id`.
    pub live: u64,
    pub taken: u64,
    pub modified_ns: i128,
    pub suspicion: &'static str,
    /// "": it is not broken.
    pub broken: &'static str,
}

/// [`State`] as it was found, with what is no part of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub generation: String,
    /// Its `generation` is empty: see above.
    pub state: State<'static>,
    pub written: bool,
}

fn code(reason: &str) -> u64 {
    match REASONS.iter().position(|known| *known == reason) {
        _ if reason.is_empty() => 0,
        Some(place) => place as u64 + 1,
        None => u64::MAX,
    }
}

fn reason(code: u64) -> &'static str {
    match code {
        0 => "",
        code => REASONS.get(code as usize - 1).copied().unwrap_or(UNKNOWN),
    }
}

const LEN: usize = 14;

impl State<'_> {
    fn words(&self) -> [u64; LEN] {
        let (high, low) = uuid_words(self.generation);
        [
            u64::from(self.base) << 32 | u64::from(self.active),
            high,
            low,
            self.size,
            self.block_size,
            self.live_sequence,
            self.taken_sequence,
            u64::from(self.taken_base),
            self.live,
            self.taken,
            (self.modified_ns >> 64) as u64,
            self.modified_ns as u64,
            code(self.suspicion),
            code(self.broken),
        ]
    }

    /// Makes this the state that `page` tells.
    pub fn write(&self, page: &[AtomicU64]) {
        self.write_by(page, |word, value| word.store(value, Ordering::Release));
    }

    fn write_by(&self, page: &[AtomicU64], mut store: impl FnMut(&AtomicU64, u64)) {
        let counts = SLOTS.map(|slot| page[slot].load(Ordering::Acquire));
        let older = usize::from(counts[0] > counts[1]);
        let slot = &page[SLOTS[older]..SLOTS[older] + 1 + LEN];
        store(&slot[0], 0);
        for (word, value) in slot[1..].iter().zip(self.words()) {
            store(word, value);
        }
        store(&slot[0], counts[1 - older] + 1);
        store(&page[0], MAGIC);
    }
}

/// The last state that was written as a whole; None: none was.
pub fn read(page: &[AtomicU64]) -> Option<Found> {
    let load = |place: usize| page[place].load(Ordering::Acquire);
    let slot = SLOTS.into_iter().max_by_key(|slot| load(*slot))?;
    if page.len() < WORDS || load(0) != MAGIC || load(slot) == 0 {
        return None;
    }
    let word = |place: usize| load(slot + 1 + place);
    Some(Found {
        generation: uuid_text(word(1), word(2)),
        state: State {
            base: (word(0) >> 32) as u32,
            active: word(0) as u32,
            generation: "",
            size: word(3),
            block_size: word(4),
            live_sequence: word(5),
            taken_sequence: word(6),
            taken_base: word(7) as u32,
            live: word(8),
            taken: word(9),
            modified_ns: i128::from(word(10) as i64) << 64 | i128::from(word(11)),
            suspicion: reason(word(12)),
            broken: reason(word(13)),
        },
        written: load(WRITTEN) != 0,
    })
}

/// Whether our own writes since the last look hide those of others. Set before the first write, cleared after a look.
pub fn set_written(page: &[AtomicU64], written: bool) {
    page[WRITTEN].store(u64::from(written), Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    const GENERATION: &str = "0b1f5c3e-9a0d-4c52-8f4e-8d8d2a6c1e55";

    fn state(number: u64) -> State<'static> {
        State {
            base: 128,
            active: 200 + number as u32,
            generation: GENERATION,
            size: number << 40,
            block_size: 65536,
            live_sequence: number,
            taken_sequence: number + 1,
            taken_base: 128,
            live: number + 2,
            taken: number + 3,
            modified_ns: (-1 - i128::from(number)) << 33,
            suspicion: REASONS[1],
            broken: "",
        }
    }

    fn page() -> Vec<AtomicU64> {
        (0..WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    fn found(state: &State<'static>) -> Found {
        Found {
            generation: state.generation.into(),
            state: State {
                generation: "",
                ..state.clone()
            },
            written: false,
        }
    }

    #[test]
    fn the_last_state_is_the_one_that_is_read() {
        let page = page();
        assert_eq!(read(&page), None);
        for number in 0..5 {
            state(number).write(&page);
            assert_eq!(read(&page), Some(found(&state(number))));
        }
        set_written(&page, true);
        assert!(read(&page).expect("a state").written);
    }

    #[test]
    fn a_death_between_any_two_stores_leaves_one_whole_state() {
        let stores = LEN + 3;
        for before in 0..4 {
            for cut in 0..=stores {
                let page = page();
                for number in 0..before {
                    state(number).write(&page);
                }
                let mut made = 0;
                state(before).write_by(&page, |word, value| {
                    if made < cut {
                        word.store(value, Ordering::Relaxed);
                    }
                    made += 1;
                });
                assert_eq!(made, stores);
                let old = before.checked_sub(1).map(|number| found(&state(number)));
                let new = Some(found(&state(before)));
                let now = read(&page);
                assert!(now == old || now == new, "{before} {cut}: {now:?}");
                assert_eq!(now == new, cut >= stores - usize::from(before > 0), "{before} {cut}");
                // And the process that comes after it goes on from there.
                state(9).write(&page);
                assert_eq!(read(&page), Some(found(&state(9))));
            }
        }
    }

    #[test]
    fn a_reason_that_is_not_known_is_still_a_reason() {
        assert_eq!(reason(code("")), "");
        assert_eq!(reason(code(REASONS[4])), REASONS[4]);
        assert_eq!(reason(code("something new")), UNKNOWN);
        assert_eq!(reason(77), UNKNOWN);
    }
}
