// SPDX-License-Identifier: GPL-2.0-or-later
//! The fixed newstyle negotiation as a pure machine: bytes of a client in, bytes for it out, until an export is chosen.
//!
//! Bounded by construction: an option longer than [`MAX_OPTION`] is refused and skipped, never stored.

use super::proto::{self, be16, be32, be64, info, option, reply};

/// The longest option whose content is looked at; a name is at most 4096 bytes by the specification.
pub const MAX_OPTION: usize = 16 << 10;
/// Meta contexts a client can hold at once.
pub const MAX_CONTEXTS: usize = 8;

/// What may be negotiated, as the engine has it at that moment.
pub trait Exports {
    /// An export of this name ("" = the origin); None: there is none.
    fn find(&self, name: &str) -> Option<ExportInfo>;
    /// The names of all exports, the origin's first.
    fn names(&self) -> Vec<String>;
    /// Whether `blksnap:since:number` can be answered for this export.
    fn since(&self, export: usize, number: u32) -> bool;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The engine's own key.
    pub key: usize,
    pub size: u64,
    pub flags: u16,
    pub minimum_block: u32,
    pub description: String,
}

/// A meta context: what block status tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    Allocation,
    /// Blocks changed since the number.
    Since(u32),
}

impl Context {
    const ALLOCATION: &'static str = "base:allocation";
    const SINCE: &'static str = "blksnap:since:";

    fn name(self) -> String {
        match self {
            Self::Allocation => Self::ALLOCATION.into(),
            Self::Since(number) => format!("{}{number}", Self::SINCE),
        }
    }

    fn parse(query: &str) -> Option<Self> {
        if query == Self::ALLOCATION {
            return Some(Self::Allocation);
        }
        let number = query.strip_prefix(Self::SINCE)?;
        // Digits only: "+1" would parse, but is not the name we list.
        number
            .bytes()
            .all(|digit| digit.is_ascii_digit())
            .then(|| number.parse().ok().map(Self::Since))?
    }
}

/// The outcome of negotiating.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    pub export: ExportInfo,
    pub structured: bool,
    /// Wire ids are the places in this list plus one.
    pub contexts: Vec<Context>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// More bytes are needed.
    More,
    /// Transmission begins; bytes behind what was consumed are requests.
    Begin(Agreed),
    /// The client is to be disconnected once `out` has been sent.
    End,
}

#[derive(Debug)]
pub struct Negotiation {
    greeted: bool,
    no_zeroes: bool,
    structured: bool,
    skip: usize,
    contexts: Option<(usize, Vec<Context>)>,
}

impl Negotiation {
    /// Puts the greeting into `out`.
    pub fn new(out: &mut Vec<u8>) -> Self {
        out.extend(proto::INIT_MAGIC.to_be_bytes());
        out.extend(proto::OPTION_MAGIC.to_be_bytes());
        out.extend((proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES).to_be_bytes());
        Self {
            greeted: false,
            no_zeroes: false,
            structured: false,
            skip: 0,
            contexts: None,
        }
    }

    /// Looks at `bytes` (what came and was not consumed), does at most one option.
    /// Returns how many bytes were consumed and what follows.
    pub fn step(&mut self, bytes: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> (usize, Step) {
        if self.skip > 0 {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            return (skipped, Step::More);
        }
        if !self.greeted {
            let Some(flags) = bytes.get(..4).map(be32) else {
                return (0, Step::More);
            };
            // An unknown client flag: the specification asks to disconnect.
            if flags & !u32::from(proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES) != 0 {
                return (4, Step::End);
            }
            self.greeted = true;
            self.no_zeroes = flags & u32::from(proto::FLAG_NO_ZEROES) != 0;
            return (4, Step::More);
        }
        let Some(header) = bytes.get(..16) else {
            return (0, Step::More);
        };
        if be64(header) != proto::OPTION_MAGIC {
            return (16, Step::End);
        }
        let (code, length) = (be32(&header[8..]), be32(&header[12..]) as usize);
        if length > MAX_OPTION {
            self.skip = length;
            if code == option::EXPORT_NAME {
                return (16, Step::End);
            }
            answer(out, code, reply::ERR_TOO_BIG, b"option too long");
            return (16, Step::More);
        }
        let Some(body) = bytes.get(16..16 + length) else {
            return (0, Step::More);
        };
        (16 + length, self.option(code, body, exports, out))
    }

    fn option(&mut self, code: u32, body: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Step {
        match code {
            option::EXPORT_NAME => {
                // This option has no error reply: a wrong name ends the connection.
                let Some(export) = std::str::from_utf8(body).ok().and_then(|name| exports.find(name)) else {
                    return Step::End;
                };
                out.extend(export.size.to_be_bytes());
                out.extend(export.flags.to_be_bytes());
                if !self.no_zeroes {
                    out.extend([0; 124]);
                }
                return Step::Begin(self.agreed(export));
            }
            option::ABORT => {
                answer(out, code, reply::ACK, b"");
                return Step::End;
            }
            option::LIST if body.is_empty() => {
                for name in exports.names() {
                    let mut entry = (name.len() as u32).to_be_bytes().to_vec();
                    entry.extend(name.as_bytes());
                    answer(out, code, reply::SERVER, &entry);
                }
                answer(out, code, reply::ACK, b"");
            }
            option::INFO | option::GO => return self.info(code, body, exports, out),
            option::STRUCTURED_REPLY if body.is_empty() => {
                self.structured = true;
                answer(out, code, reply::ACK, b"");
            }
            option::LIST | option::STRUCTURED_REPLY => {
                answer(out, code, reply::ERR_INVALID, b"this option takes no data");
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta(code, body, exports, out),
            _ => answer(out, code, reply::ERR_UNSUP, b""),
        }
        Step::More
    }

    fn agreed(&mut self, export: ExportInfo) -> Agreed {
        let contexts = match self.contexts.take() {
            Some((key, contexts)) if key == export.key => contexts,
            _ => Vec::new(),
        };
        Agreed {
            export,
            structured: self.structured,
            contexts,
        }
    }

    fn info(&mut self, code: u32, body: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Step {
        let mut body = Reader(body);
        let parsed = body.name().and_then(|name| {
            let count = body.u16()?;
            let wanted = (0..count).map(|_| body.u16()).collect::<Option<Vec<_>>>()?;
            body.0.is_empty().then_some((name, wanted))
        });
        let Some((name, wanted)) = parsed else {
            answer(out, code, reply::ERR_INVALID, b"malformed request");
            return Step::More;
        };
        let Some(export) = exports.find(name) else {
            answer(out, code, reply::ERR_UNKNOWN, b"no export of this name");
            return Step::More;
        };
        let mut entry = info::EXPORT.to_be_bytes().to_vec();
        entry.extend(export.size.to_be_bytes());
        entry.extend(export.flags.to_be_bytes());
        answer(out, code, reply::INFO, &entry);
        let mut entry = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [export.minimum_block, export.minimum_block.max(4096), proto::MAX_PAYLOAD] {
            entry.extend(size.to_be_bytes());
        }
        answer(out, code, reply::INFO, &entry);
        for (kind, text) in [(info::NAME, name), (info::DESCRIPTION, export.description.as_str())] {
            if wanted.contains(&kind) {
                let mut entry = kind.to_be_bytes().to_vec();
                entry.extend(text.as_bytes());
                answer(out, code, reply::INFO, &entry);
            }
        }
        answer(out, code, reply::ACK, b"");
        if code == option::GO {
            return Step::Begin(self.agreed(export));
        }
        Step::More
    }

    fn meta(&mut self, code: u32, body: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) {
        let set = code == option::SET_META_CONTEXT;
        if set {
            self.contexts = None;
        }
        let mut body = Reader(body);
        let parsed = body.name().and_then(|name| {
            let count = body.u32()?;
            // Not sized by `count`: that is the client's word. Each query needs four bytes, so the loop ends.
            let queries = (0..count).map(|_| body.name()).collect::<Option<Vec<_>>>()?;
            body.0.is_empty().then_some((name, queries))
        });
        let Some((name, queries)) = parsed else {
            answer(out, code, reply::ERR_INVALID, b"malformed request");
            return;
        };
        if !self.structured {
            answer(out, code, reply::ERR_INVALID, b"structured replies come first");
            return;
        }
        let Some(export) = exports.find(name) else {
            answer(out, code, reply::ERR_UNKNOWN, b"no export of this name");
            return;
        };
        let mut found: Vec<Context> = Vec::new();
        let mut add = |context: Context| {
            let answerable = match context {
                Context::Allocation => true,
                Context::Since(number) => exports.since(export.key, number),
            };
            if answerable && found.len() < MAX_CONTEXTS && !found.contains(&context) {
                found.push(context);
            }
        };
        if queries.is_empty() && !set {
            add(Context::Allocation);
        }
        for query in queries {
            match Context::parse(query) {
                Some(context) => add(context),
                // A bare namespace lists what is in it; "since" has no end of numbers and is listed as a pattern nowhere.
                None if query == "base:" && !set => add(Context::Allocation),
                None => {}
            }
        }
        for (place, context) in found.iter().enumerate() {
            let id = if set { place as u32 + 1 } else { 0 };
            let mut entry = id.to_be_bytes().to_vec();
            entry.extend(context.name().as_bytes());
            answer(out, code, reply::META_CONTEXT, &entry);
        }
        if set {
            self.contexts = Some((export.key, found));
        }
        answer(out, code, reply::ACK, b"");
    }
}

fn answer(out: &mut Vec<u8>, code: u32, kind: u32, body: &[u8]) {
    out.extend(proto::OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(code.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((body.len() as u32).to_be_bytes());
    out.extend(body);
}

/// Takes fields off the front of an option's body; None when they do not fit.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(be16)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4).map(be32)
    }

    fn name(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        std::str::from_utf8(self.take(len)?).ok()
    }
}

#[cfg(test)]
mod tests;
