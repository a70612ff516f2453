// SPDX-License-Identifier: GPL-2.0-or-later
//! Visits every reachable state, breadth first, and gives the shortest path to a state that must not be.
//!
//! States are compared whole, not by a digest, so that no state is taken for another.

use crate::rules::Model;
use crate::world::{Step, World};
use std::fmt::{self, Write as _};
use std::hash::{Hash, Hasher};
use std::panic::{self, AssertUnwindSafe};

/// What was broken (the numbers of the crate's docstring).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    /// 1, 2: an image shows other bytes than its own.
    ImageBytes,
    /// 3: an acknowledged write is gone.
    LostWrite,
    /// 4: something waits for ever.
    Stuck,
    /// 5: a write was submitted too early.
    EarlyWrite,
    /// 6: an assertion of the rules failed.
    Panic,
    /// The rules said something about memory or readers that is not so.
    WrongAnswer,
}

#[derive(Clone, Debug)]
pub struct Violation {
    pub property: Property,
    pub what: String,
}

pub fn violation<T>(property: Property, what: impl Into<String>) -> Result<T, Violation> {
    Err(Violation {
        property,
        what: what.into(),
    })
}

pub struct Report {
    pub states: usize,
    pub steps: usize,
    pub ends: usize,
    pub depth: u32,
}

/// A violation and how to get there.
pub struct Counterexample {
    pub violation: Violation,
    path: Vec<Step>,
    world: Box<World>,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}: {}", self.violation.property, self.violation.what)?;
        for (index, step) in self.path.iter().enumerate() {
            writeln!(f, "{:3}. {step:?}", index + 1)?;
        }
        write!(f, "{:#x?}", self.world)
    }
}

struct Node {
    world: World,
    digest: u64,
    parent: u32,
    depth: u32,
    step: Option<Step>,
}

/// All worlds seen so far and an open-addressed index of them.
struct Visited {
    nodes: Vec<Node>,
    index: Vec<u32>,
}

/// No node has this number.
const EMPTY: u32 = u32::MAX;

impl Visited {
    fn new() -> Self {
        Self {
            nodes: Vec::new(),
            index: vec![EMPTY; 1 << 12],
        }
    }

    /// Where `world` is, or where it would go.
    fn find(&self, digest: u64, world: &World) -> usize {
        let mask = self.index.len() - 1;
        let mut at = digest as usize & mask;
        while let Some(node) = self.nodes.get(self.index[at] as usize) {
            if node.digest == digest && node.world == *world {
                break;
            }
            at = (at + 1) & mask;
        }
        at
    }

    /// Nothing happens when `world` was seen before.
    fn insert(&mut self, world: World, parent: usize, depth: u32, step: Option<Step>) {
        let digest = digest(&world);
        let at = self.find(digest, &world);
        if self.index[at] != EMPTY {
            return;
        }
        self.index[at] = self.nodes.len() as u32;
        let parent = parent as u32;
        self.nodes.push(Node {
            world,
            digest,
            parent,
            depth,
            step,
        });
        if self.nodes.len() * 2 > self.index.len() {
            self.index = vec![EMPTY; self.index.len() * 2];
            for (number, node) in self.nodes.iter().enumerate() {
                let at = self.find(node.digest, &node.world);
                self.index[at] = number as u32;
            }
        }
    }

    fn counterexample(&self, mut number: usize, last: Option<Step>, violation: Violation) -> Box<Counterexample> {
        let world = Box::new(self.nodes[number].world.clone());
        let mut path: Vec<Step> = last.into_iter().collect();
        while let Some(step) = self.nodes[number].step {
            path.push(step);
            number = self.nodes[number].parent as usize;
        }
        path.reverse();
        Box::new(Counterexample { violation, path, world })
    }
}

/// Visits all worlds that `model` can reach.
pub fn explore(model: &Model) -> Result<Report, Box<Counterexample>> {
    let mut visited = Visited::new();
    visited.insert(World::new(&model.scenario), 0, 0, None);
    let mut report = Report {
        states: 0,
        steps: 0,
        ends: 0,
        depth: 0,
    };
    let mut steps = Vec::new();
    while report.states < visited.nodes.len() {
        let number = report.states;
        report.states += 1;
        let world = visited.nodes[number].world.clone();
        let depth = visited.nodes[number].depth;
        report.depth = depth;
        steps.clear();
        let enabled = no_panic(|| {
            model.check(&world)?;
            model.steps(&world, &mut steps);
            Ok(())
        });
        enabled.map_err(|violation| visited.counterexample(number, None, violation))?;
        if steps.iter().all(|step| step.is_crash()) {
            report.ends += 1;
            model
                .check_complete(&world)
                .map_err(|violation| visited.counterexample(number, None, violation))?;
        }
        let progress = model.progress(&world);
        for &step in &steps {
            report.steps += 1;
            let mut next = world.clone();
            let done = no_panic(|| {
                model.apply(&mut next, step)?;
                if model.progress(&next) <= progress {
                    return violation(Property::Stuck, "a step that is no progress");
                }
                Ok(())
            });
            done.map_err(|violation| visited.counterexample(number, Some(step), violation))?;
            visited.insert(next, number, depth + 1, Some(step));
        }
    }
    Ok(report)
}

/// A panic inside `f` as a violation.
fn no_panic(f: impl FnOnce() -> Result<(), Violation>) -> Result<(), Violation> {
    panic::catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| {
        let mut what = String::from("panic");
        if let Some(message) = payload.downcast_ref::<String>() {
            let _ = write!(what, ": {message}");
        } else if let Some(message) = payload.downcast_ref::<&str>() {
            let _ = write!(what, ": {message}");
        }
        violation(Property::Panic, what)
    })
}

/// Multiply and rotate over words: cheap without an optimiser too.
#[derive(Default)]
struct Digest(u64);

impl Digest {
    fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
}

impl Hasher for Digest {
    fn write(&mut self, bytes: &[u8]) {
        let mut word = 0;
        for &byte in bytes {
            if word >> 56 != 0 {
                self.word(word);
                word = 0;
            }
            word = word << 8 | u64::from(byte);
        }
        self.word(word);
    }

    fn write_u8(&mut self, value: u8) {
        self.word(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.word(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.word(value as u64);
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

fn digest(world: &World) -> u64 {
    let mut digest = Digest::default();
    world.hash(&mut digest);
    digest.finish()
}
