// SPDX-License-Identifier: GPL-2.0-or-later
//! What a line asks for: from JSON to an operation and back. Unknown operations and keys are refused, never ignored.

use super::error::{Refusal, Result};
use super::nodes;
use super::origins::Add;
use super::registry::Origin;
use super::server::Server;
use super::snapshots::Create;
use super::take::Take;
use crate::mem::Shared;
use crate::ublk::control::availability;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub const PROTOCOL: u64 = 1;

/// What to do after the answer was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    GoOn,
    Subscribe,
    Stop,
}

/// A good answer with the memory that goes with it.
pub struct Answer {
    pub body: Value,
    pub memory: Vec<Arc<Shared>>,
    pub then: Then,
}

/// The envelope of a request: everything that is the same for all.
pub struct Envelope {
    pub id: u64,
    pub fds: usize,
    operation: String,
    arguments: Map<String, Value>,
}

impl Envelope {
    pub fn parse(line: &[u8]) -> Result<Self> {
        let Ok(Value::Object(mut arguments)) = serde_json::from_slice(line) else {
            return Err(Refusal::bad_request("a request is one JSON object on one line"));
        };
        let id = arguments.remove("id").and_then(|id| id.as_u64());
        let id = id.ok_or_else(|| Refusal::bad_request("a request needs an unsigned integer as id"))?;
        let fds = match arguments.remove("fds") {
            None => 0,
            Some(count) => count
                .as_u64()
                .filter(|count| *count <= crate::sys::MAX_FDS as u64)
                .ok_or_else(|| Refusal::bad_request("fds is a number of descriptors"))?
                as usize,
        };
        let Some(Value::String(operation)) = arguments.remove("op") else {
            return Err(Refusal::bad_request("a request needs an op"));
        };
        Ok(Self {
            id,
            fds,
            operation,
            arguments,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Hello {
    protocol: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OneOrigin {
    origin: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mark {
    origin: String,
    ranges: Vec<(u64, u64)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reset {
    origin: String,
    generation: String,
    #[serde(default)]
    #[allow(
        dead_code,
        reason = "told for the log of whoever reads the line; the service keeps it"
    )]
    reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Remove {
    origin: String,
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Bypass {
    origin: String,
    #[serde(default)]
    #[allow(
        dead_code,
        reason = "told for the log of whoever reads the line; the service keeps it"
    )]
    reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OneSnapshot {
    snapshot: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stop {
    #[serde(default)]
    force: bool,
}

fn read<T: DeserializeOwned>(arguments: Map<String, Value>) -> Result<T> {
    serde_json::from_value(Value::Object(arguments)).map_err(|error| Refusal::bad_request(error.to_string()))
}

fn answer(body: impl Serialize, memory: Vec<Arc<Shared>>) -> Result<Answer> {
    let body = serde_json::to_value(body).map_err(|error| Refusal::bad_request(error.to_string()))?;
    Ok(Answer {
        body,
        memory,
        then: Then::GoOn,
    })
}

impl Server {
    pub fn perform(&self, envelope: Envelope, fds: Vec<OwnedFd>) -> Result<Answer> {
        let arguments = envelope.arguments;
        let operation = envelope.operation.as_str();
        if !fds.is_empty() && !matches!(operation, "origin.add" | "snapshot.create" | "snapshot.take") {
            return Err(Refusal::bad_request(format!("{operation} takes no descriptors")));
        }
        match operation {
            "hello" => {
                let Hello { protocol } = read(arguments)?;
                if protocol != PROTOCOL {
                    let text = format!("this data path speaks protocol {PROTOCOL}, not {protocol}");
                    return Err(Refusal::protocol(text));
                }
                let version = env!("CARGO_PKG_VERSION");
                let pid = std::process::id();
                let ublk = availability();
                let dm = nodes::availability();
                let mut features = vec!["nbd"];
                features.extend(ublk.available.then_some("ublk"));
                features.extend(dm.available.then_some("dm"));
                let hello = json!({
                    "protocol": PROTOCOL, "version": version, "pid": pid, "features": features, "ublk": ublk, "dm": dm,
                    "survives": self.store.works(), "life": self.life,
                });
                answer(hello, vec![])
            }
            "subscribe" => {
                let Nothing {} = read(arguments)?;
                let answer = answer(json!({}), vec![])?;
                Ok(Answer {
                    then: Then::Subscribe,
                    ..answer
                })
            }
            "list" => {
                let Nothing {} = read(arguments)?;
                let origins: Vec<_> = self.registry().origins.values().cloned().collect();
                let origins: Vec<_> = origins.iter().filter_map(Origin::glance).collect();
                let registry = self.registry();
                let snapshots: Vec<_> = registry
                    .snapshots
                    .values()
                    .map(|entry| registry.reading(entry))
                    .collect();
                answer(json!({"origins": origins, "snapshots": snapshots}), vec![])
            }
            "origin.add" => {
                let (reading, maps) = self.add(read::<Add>(arguments)?, fds)?;
                answer(reading, maps)
            }
            "origin.info" => {
                let OneOrigin { origin } = read(arguments)?;
                let origin = self.registry().origin(&origin)?;
                answer(origin.read()?.0, vec![])
            }
            "origin.maps" => {
                let OneOrigin { origin } = read(arguments)?;
                let origin = self.registry().origin(&origin)?;
                let (reading, maps) = self.maps_of(&origin)?;
                answer(reading, maps)
            }
            "origin.mark" => {
                let Mark { origin, ranges } = read(arguments)?;
                answer(json!({"blocks": self.mark(&origin, Some(ranges))?}), vec![])
            }
            "origin.mark-all" => {
                let OneOrigin { origin } = read(arguments)?;
                answer(json!({"blocks": self.mark(&origin, None)?}), vec![])
            }
            "origin.reset" => {
                let Reset { origin, generation, .. } = read(arguments)?;
                let (reading, maps) = self.reset(&origin, generation)?;
                answer(reading, maps)
            }
            "origin.resize" => {
                let OneOrigin { origin } = read(arguments)?;
                let (reading, maps) = self.resize(&origin)?;
                answer(reading, maps)
            }
            "origin.remove" => {
                let Remove { origin, force } = read(arguments)?;
                let (reading, maps) = self.remove(&origin, force)?;
                answer(reading, maps)
            }
            "origin.bypass" => {
                let Bypass { origin, .. } = read(arguments)?;
                let (reading, maps) = self.bypass(&origin)?;
                answer(reading, maps)
            }
            "snapshot.create" => answer(self.create(read::<Create>(arguments)?, fds)?, vec![]),
            "snapshot.take" => {
                let (taken, memory) = self.take(&read::<Take>(arguments)?, fds)?;
                answer(taken, memory)
            }
            "snapshot.info" => {
                let OneSnapshot { snapshot } = read(arguments)?;
                let registry = self.registry();
                answer(registry.reading(&registry.snapshot(&snapshot)?), vec![])
            }
            "snapshot.maps" => {
                let OneSnapshot { snapshot } = read(arguments)?;
                let registry = self.registry();
                let entry = registry.snapshot(&snapshot)?;
                let memory = entry.memory.iter().flatten().cloned().collect();
                answer(registry.reading(&entry), memory)
            }
            "snapshot.destroy" => {
                let OneSnapshot { snapshot } = read(arguments)?;
                self.destroy(&snapshot)?;
                answer(json!({}), vec![])
            }
            "stop" => {
                let Stop { force } = read(arguments)?;
                self.stop(force)?;
                let answer = answer(json!({}), vec![])?;
                Ok(Answer {
                    then: Then::Stop,
                    ..answer
                })
            }
            other => Err(Refusal::bad_request(format!("there is no operation {other:?}"))),
        }
    }
}
