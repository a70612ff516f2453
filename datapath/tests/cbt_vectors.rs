// SPDX-License-Identifier: GPL-2.0-or-later
//! The engine's map rules against the reference: replays tests/vectors/cbt.json, which the Python rules have written.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use blksnap_datapath::cbt::{self, Geometry, Numbers};
use serde_json::Value;

fn vectors() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/cbt.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn integer(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

fn small(value: &Value) -> u32 {
    integer(value).try_into().unwrap()
}

fn pairs(value: &Value) -> Vec<(u64, u64)> {
    list(value)
        .iter()
        .map(|pair| (integer(&pair[0]), integer(&pair[1])))
        .collect()
}

fn hex(map: &[AtomicU8]) -> String {
    map.iter().map(|cell| format!("{:02x}", cell.load(Relaxed))).collect()
}

fn empty(blocks: usize) -> Vec<AtomicU8> {
    (0..blocks).map(|_| AtomicU8::new(0)).collect()
}

/// What the engine keeps of one origin, moved by the functions under test alone.
struct Map {
    geometry: Geometry,
    requested: u64,
    numbers: Numbers,
    live: Vec<AtomicU8>,
    taken: Vec<AtomicU8>,
}

impl Map {
    fn new(size: u64, requested: u64) -> Self {
        let geometry = Geometry::new(size, requested).unwrap();
        let (live, taken) = (empty(geometry.block_count()), empty(geometry.block_count()));
        Self {
            geometry,
            requested,
            numbers: Numbers::START,
            live,
            taken,
        }
    }

    /// How many blocks were marked, or nothing if the list is refused.
    fn mark(&self, ranges: &[(u64, u64)]) -> Option<u64> {
        cbt::validate_ranges(ranges, self.geometry.size()).ok()?;
        let mut count = 0;
        for &(offset, length) in ranges {
            let blocks = self.geometry.blocks(offset, length);
            count += blocks.len() as u64;
            cbt::mark(&self.live, blocks.clone(), self.numbers.byte_for_active());
            cbt::mark(&self.taken, blocks, self.numbers.byte_for_changes());
        }
        Some(count)
    }

    fn mark_all(&self) -> Option<u64> {
        cbt::mark_all(&self.live, self.numbers.byte_for_active());
        cbt::mark_all(&self.taken, self.numbers.byte_for_changes());
        Some(self.live.len() as u64)
    }

    /// Whether the window slid.
    fn take(&mut self) -> bool {
        let plan = self.numbers.after_take().unwrap();
        self.taken = empty(self.live.len());
        if plan.slides {
            let live = empty(self.live.len());
            cbt::slide_into(&self.live, &live);
            cbt::slide_into(&self.live, &self.taken);
            self.live = live;
        } else {
            cbt::copy_into(&self.live, &self.taken);
        }
        self.numbers = plan.numbers;
        plan.slides
    }

    fn restore(&mut self) {
        self.numbers = Numbers::new(self.numbers.base(), self.numbers.active()).unwrap();
        cbt::validate_map(&self.live, self.numbers).unwrap();
        self.taken = empty(self.live.len());
        cbt::lower_into(&self.live, &self.taken, self.numbers);
    }

    fn changed(&self, view: &str, since: u32) -> Option<Vec<(u64, u64)>> {
        let threshold = self.numbers.threshold(since).ok()?;
        let map = if view == "live" { &self.live } else { &self.taken };
        Some(
            cbt::changed_runs(map, threshold, 0)
                .map(|run| self.geometry.bytes(&run))
                .collect(),
        )
    }

    fn replay(&mut self, step: &Value) {
        match step["op"].as_str().unwrap() {
            "write" => {
                let blocks = self.geometry.blocks(integer(&step["offset"]), integer(&step["length"]));
                cbt::mark(&self.live, blocks, self.numbers.byte_for_active());
            }
            "mark" => assert_eq!(self.mark(&pairs(&step["ranges"])), step["blocks"].as_u64()),
            "mark-all" => assert_eq!(self.mark_all(), step["blocks"].as_u64()),
            "take" => assert_eq!(self.take(), step["slides"].as_bool().unwrap()),
            "reset" => *self = Self::new(integer(&step["size"]), self.requested),
            "restore" => self.restore(),
            other => panic!("unknown step {other}"),
        }
    }

    fn compare(&self, step: &Value) {
        assert_eq!(self.numbers.base(), small(&step["numbers"][0]));
        assert_eq!(self.numbers.active(), small(&step["numbers"][1]));
        assert_eq!(hex(&self.live), step["live"].as_str().unwrap());
        assert_eq!(hex(&self.taken), step["taken"].as_str().unwrap());
        for question in step["asked"].as_array().into_iter().flatten() {
            let expected = question[2].as_array().map(|_| pairs(&question[2]));
            assert_eq!(
                self.changed(question[0].as_str().unwrap(), small(&question[1])),
                expected,
                "{question}"
            );
        }
    }
}

#[test]
fn every_sequence_leads_to_the_same_maps() {
    let mut takes = 0;
    for sequence in list(&vectors()["sequences"]) {
        let mut map = Map::new(integer(&sequence["size"]), integer(&sequence["block_size"]));
        for (index, step) in list(&sequence["steps"]).iter().enumerate() {
            println!("{} step {index}: {}", sequence["name"], step["op"]); // seen only when one fails
            map.replay(step);
            map.compare(step);
            takes += usize::from(step["op"] == "take");
        }
    }
    assert!(takes >= 600);
}

#[test]
fn every_block_size_is_the_same() {
    for row in list(&vectors()["block_sizes"]) {
        let found = cbt::block_size_for(integer(&row[0]), integer(&row[1])).ok();
        assert_eq!(found, row[2].as_u64(), "{row}");
    }
}

#[test]
fn every_number_is_the_same() {
    for row in list(&vectors()["numbers"]) {
        let found =
            Numbers::new(small(&row[0]), small(&row[1])).and_then(|numbers| Ok((numbers, numbers.after_take()?)));
        let Ok((numbers, plan)) = found else {
            assert!(row[2].is_null(), "{row}");
            continue;
        };
        let expected: Vec<u32> = list(&row[2])[..4].iter().map(small).collect();
        let after = [
            numbers.changes(),
            numbers.oldest(),
            plan.numbers.base(),
            plan.numbers.active(),
        ];
        assert_eq!(
            (&after[..], plan.slides),
            (&expected[..], row[2][4].as_bool().unwrap()),
            "{row}"
        );
    }
}

#[test]
fn every_byte_slides_the_same() {
    let slid: String = (0..=255).map(|byte| format!("{:02x}", cbt::slide(byte))).collect();
    assert_eq!(slid, vectors()["slide"].as_str().unwrap());
}
