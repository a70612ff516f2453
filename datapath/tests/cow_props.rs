// SPDX-License-Identifier: GPL-2.0-or-later
//! The copy-before-write rules over many chunks and all numbers, against a table written down by hand.
//!
//! What `cow_explorer` cannot see in its small worlds: that chunks do not touch each other, and that every staging slot
//! (32 bits) and every storage offset (63 bits) comes back as it was given. Single steps in any order that the rules
//! allow; no I/O is modelled here.

use blksnap_datapath::cow::{BeforeImageWrite, BeforeWrite, Chunks, Recovered, Source, State};
use proptest::prelude::*;
use std::sync::atomic::{AtomicU64, AtomicU8};

const CHUNKS: usize = 9;

#[derive(Clone, Copy, Debug)]
enum Call {
    BeginCopy(u32),
    Copied { zero: bool },
    Stored(u64),
    Materialise(u32),
    ReaderBegan,
    ReaderEnded,
    Recover,
}

/// Where a chunk is, with the number that belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Origin,
    OnItsWay(u32),
    Staging(u32),
    Storage(u64),
    Nowhere,
}

/// What all questions about a chunk have to answer.
type Answers = (State, BeforeWrite, Source, BeforeImageWrite);

fn answers(place: Place, readers: usize) -> Answers {
    let go = if readers > 0 {
        BeforeWrite::AwaitReaders
    } else {
        BeforeWrite::Go
    };
    match place {
        Place::Origin => (State::None, BeforeWrite::Copy, Source::Origin, BeforeImageWrite::Copy),
        Place::OnItsWay(_) => {
            let (write, read) = (BeforeWrite::AwaitCopy, Source::AwaitCopy);
            (State::Reading, write, read, BeforeImageWrite::AwaitStore)
        }
        Place::Staging(slot) => (State::Storing, go, Source::Staging(slot), BeforeImageWrite::AwaitStore),
        Place::Storage(at) => (State::Done, go, Source::Storage(at), BeforeImageWrite::Storage(at)),
        Place::Nowhere => (State::Zero, go, Source::Zero, BeforeImageWrite::Materialise),
    }
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        any::<u32>().prop_map(Call::BeginCopy),
        prop::bool::weighted(0.3).prop_map(|zero| Call::Copied { zero }),
        prop_oneof![0..1u64 << 63, Just(0), Just((1 << 63) - 1)].prop_map(Call::Stored),
        any::<u32>().prop_map(Call::Materialise),
        Just(Call::ReaderBegan),
        Just(Call::ReaderEnded),
        Just(Call::Recover),
    ]
}

proptest! {
    #[test]
    fn each_chunk_answers_for_itself(calls in prop::collection::vec((0..CHUNKS, call()), 1..200)) {
        let state = [const { AtomicU8::new(0) }; CHUNKS];
        let slot = [const { AtomicU64::new(0) }; CHUNKS];
        let mut memory = [0; CHUNKS];
        let mut chunks = Chunks::new(&state, &slot, &mut memory);
        let (mut places, mut readers) = ([Place::Origin; CHUNKS], [0; CHUNKS]);
        for (index, call) in calls {
            let (chunk, place) = (index as u64, &mut places[index]);
            match (*place, call) {
                (Place::Origin, Call::BeginCopy(number)) => {
                    chunks.begin_copy(chunk, number);
                    *place = Place::OnItsWay(number);
                }
                (Place::OnItsWay(number), Call::Copied { zero }) => {
                    chunks.copied(chunk, zero);
                    *place = if zero { Place::Nowhere } else { Place::Staging(number) };
                }
                (Place::Staging(_), Call::Stored(offset)) => {
                    chunks.stored(chunk, offset);
                    *place = Place::Storage(offset);
                }
                (Place::Nowhere, Call::Materialise(number)) => {
                    chunks.materialise(chunk, number);
                    *place = Place::Staging(number);
                }
                (Place::Origin, Call::ReaderBegan) => {
                    chunks.reader_began(chunk);
                    readers[index] += 1;
                }
                (_, Call::ReaderEnded) if readers[index] > 0 => {
                    readers[index] -= 1;
                    prop_assert_eq!(chunks.reader_ended(chunk), readers[index] == 0);
                }
                // A crash ends the readers; recovering twice is recovering once.
                (before, Call::Recover) if readers[index] == 0 => {
                    let expected = match before {
                        Place::Staging(number) => Recovered::Store(number),
                        _ => Recovered::Nothing,
                    };
                    prop_assert_eq!(chunks.recover(chunk), expected);
                    prop_assert_eq!(chunks.recover(chunk), expected);
                    if let Place::OnItsWay(_) = before {
                        *place = Place::Origin;
                    }
                }
                _ => {}
            }
            let mut go = [false; CHUNKS];
            for (index, chunk) in (0..CHUNKS as u64).enumerate() {
                let found = (
                    chunks.state(chunk),
                    chunks.before_write(chunk),
                    chunks.source(chunk),
                    chunks.before_image_write(chunk),
                );
                prop_assert_eq!(found, answers(places[index], readers[index]), "chunk {}", index);
                go[index] = found.1 == BeforeWrite::Go;
            }
            for first in 0..CHUNKS {
                let all = go[first..].iter().all(|go| *go);
                prop_assert_eq!(chunks.all_go(first as u64..CHUNKS as u64), all, "from chunk {}", first);
            }
        }
    }
}

#[test]
fn a_state_byte_that_is_none_of_ours_serves_and_lets_through_nothing() {
    for byte in 5..=u8::MAX {
        let (state, slot, mut readers) = ([AtomicU8::new(byte)], [AtomicU64::new(0)], [0]);
        let chunks = Chunks::new(&state, &slot, &mut readers);
        assert_eq!(chunks.before_write(0), BeforeWrite::AwaitCopy);
        assert_eq!(chunks.source(0), Source::AwaitCopy);
        assert_eq!(chunks.before_image_write(0), BeforeImageWrite::AwaitStore);
    }
}
