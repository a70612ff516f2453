// SPDX-License-Identifier: GPL-2.0-or-later
//! The negotiation against the specification's cases, and against bytes that no client would send.

use super::*;
use proptest::prelude::*;

struct Two;

impl Exports for Two {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        let key = ["", "image"].iter().position(|known| *known == name)?;
        Some(ExportInfo {
            key,
            size: 1 << 30,
            flags: 1,
            minimum_block: 1,
            description: "about".into(),
        })
    }

    fn names(&self) -> Vec<String> {
        vec![String::new(), "image".into()]
    }

    fn since(&self, _: usize, number: u32) -> bool {
        number <= 3
    }
}

fn option(code: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = proto::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(code.to_be_bytes());
    bytes.extend((body.len() as u32).to_be_bytes());
    bytes.extend(body);
    bytes
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    let mut body = (name.len() as u32).to_be_bytes().to_vec();
    body.extend(name.as_bytes());
    body.extend(rest);
    body
}

fn queries(name: &str, list: &[&str]) -> Vec<u8> {
    let mut rest = (list.len() as u32).to_be_bytes().to_vec();
    for query in list {
        rest.extend(named(query, b""));
    }
    named(name, &rest)
}

/// Feeds `bytes` in portions of `portion`; the output and the last step that was not `More`.
fn feed(bytes: &[u8], portion: usize) -> (Vec<u8>, Option<Step>) {
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(&mut out);
    let mut pending = Vec::new();
    for part in bytes.chunks(portion) {
        pending.extend(part);
        loop {
            let (consumed, step) = negotiation.step(&pending, &Two, &mut out);
            assert!(consumed <= pending.len());
            pending.drain(..consumed);
            match step {
                Step::More if consumed == 0 => break,
                Step::More => {}
                end => return (out, Some(end)),
            }
        }
        assert!(pending.len() < 16 + MAX_OPTION, "unbounded memory");
    }
    (out, None)
}

/// (option, kind, body) of each option reply behind the greeting.
fn replies(out: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut rest = &out[18..];
    let mut found = Vec::new();
    while !rest.is_empty() {
        assert_eq!(be64(rest), proto::OPTION_REPLY_MAGIC);
        let len = be32(&rest[16..]) as usize;
        found.push((be32(&rest[8..]), be32(&rest[12..]), rest[20..20 + len].to_vec()));
        rest = &rest[20 + len..];
    }
    found
}

fn greeting() -> Vec<u8> {
    3_u32.to_be_bytes().to_vec()
}

#[test]
fn a_client_that_goes_gets_size_block_sizes_and_its_contexts() {
    let mut bytes = greeting();
    bytes.extend(option(option::STRUCTURED_REPLY, b""));
    let wanted = queries(
        "image",
        &["base:allocation", "blksnap:since:3", "blksnap:since:4", "qemu:x"],
    );
    bytes.extend(option(option::SET_META_CONTEXT, &wanted));
    bytes.extend(option(option::GO, &named("image", &[0, 0])));
    for portion in [1, 7, bytes.len()] {
        let (out, step) = feed(&bytes, portion);
        let Some(Step::Begin(agreed)) = step else {
            panic!("no transmission: {step:?}");
        };
        assert_eq!(agreed.export.key, 1);
        assert!(agreed.structured);
        assert_eq!(agreed.contexts, [Context::Allocation, Context::Since(3)]);
        let kinds: Vec<_> = replies(&out).iter().map(|(_, kind, _)| *kind).collect();
        let (ack, context, info) = (reply::ACK, reply::META_CONTEXT, reply::INFO);
        assert_eq!(kinds, [ack, context, context, ack, info, info, ack]);
    }
}

#[test]
fn contexts_of_one_export_are_not_those_of_another() {
    let mut bytes = greeting();
    bytes.extend(option(option::STRUCTURED_REPLY, b""));
    bytes.extend(option(
        option::SET_META_CONTEXT,
        &queries("image", &["base:allocation"]),
    ));
    bytes.extend(option(option::GO, &named("", &[0, 0])));
    let (_, step) = feed(&bytes, 64);
    let Some(Step::Begin(agreed)) = step else {
        panic!("no transmission");
    };
    assert_eq!((agreed.export.key, agreed.contexts), (0, vec![]));
}

#[test]
fn contexts_need_structured_replies_first() {
    let mut bytes = greeting();
    bytes.extend(option(option::SET_META_CONTEXT, &queries("", &["base:allocation"])));
    let (out, _) = feed(&bytes, 64);
    assert_eq!(replies(&out)[0].1, reply::ERR_INVALID);
}

#[test]
fn an_unknown_name_is_an_answer_and_not_the_end() {
    let mut bytes = greeting();
    bytes.extend(option(option::GO, &named("other", &[0, 0])));
    bytes.extend(option(option::LIST, b""));
    let (out, step) = feed(&bytes, 64);
    assert_eq!(step, None);
    let kinds: Vec<_> = replies(&out).iter().map(|(_, kind, _)| *kind).collect();
    assert_eq!(kinds, [reply::ERR_UNKNOWN, reply::SERVER, reply::SERVER, reply::ACK]);
}

#[test]
fn an_unknown_option_is_refused_and_the_next_is_served() {
    let mut bytes = greeting();
    bytes.extend(option(5, b""));
    bytes.extend(option(77, b"whatever"));
    bytes.extend(option(option::ABORT, b""));
    let (out, step) = feed(&bytes, 64);
    assert_eq!(step, Some(Step::End));
    let kinds: Vec<_> = replies(&out).iter().map(|(_, kind, _)| *kind).collect();
    assert_eq!(kinds, [reply::ERR_UNSUP, reply::ERR_UNSUP, reply::ACK]);
}

#[test]
fn the_old_way_to_begin_sends_zeros_unless_both_sides_agreed_not_to() {
    for (flags, len) in [(3_u32, 18 + 10), (1_u32, 18 + 10 + 124)] {
        let mut bytes = flags.to_be_bytes().to_vec();
        bytes.extend(option(option::EXPORT_NAME, b""));
        let (out, step) = feed(&bytes, 64);
        assert!(matches!(step, Some(Step::Begin(_))));
        assert_eq!(out.len(), len);
    }
}

#[test]
fn a_huge_option_is_skipped_without_being_stored() {
    let mut bytes = greeting();
    bytes.extend(option(option::GO, &vec![0; 5 << 20]));
    bytes.extend(option(option::ABORT, b""));
    let (out, step) = feed(&bytes, 4096);
    assert_eq!(step, Some(Step::End));
    assert_eq!(replies(&out)[0].1, reply::ERR_TOO_BIG);
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic_or_grow(bytes in prop::collection::vec(any::<u8>(), 0..200), portion in 1..64_usize) {
        feed(&bytes, portion);
    }

    #[test]
    fn no_option_makes_it_panic(
        code in 0..12_u32,
        body in prop::collection::vec(prop_oneof![Just(0_u8), Just(1), Just(255), any::<u8>()], 0..80),
    ) {
        let mut bytes = greeting();
        bytes.extend(option(option::STRUCTURED_REPLY, b""));
        bytes.extend(option(code, &body));
        feed(&bytes, 1024);
    }
}
