// SPDX-License-Identifier: GPL-2.0-or-later
//! The first stop of a request: received bytes become requests, requests are cut into pieces.
//!
//! A connection takes its requests one by one: the next header is read when the one before has been cut completely. The
//! pieces themselves run in any order.

use super::connection::{Export, Incoming, Phase, Request};
use super::piece::{Job, Piece, PieceId, PIECES, PIECE_LEN};
use super::Engine;
use crate::nbd::negotiate::Step;
use crate::nbd::proto::{self, command, flag, Header, REQUEST_LEN};
use crate::ring::{Kind, Token};

impl Engine {
    pub(super) fn received(&mut self, place: usize, result: i32) {
        let Some(connection) = &mut self.connections[place] else {
            return;
        };
        connection.receiving = false;
        self.pending |= 1 << place;
        match result {
            count if count > 0 => connection.received.1 += count as usize,
            error if error == -libc::EINTR || error == -libc::EAGAIN => {}
            // End of stream, at a request's border or not: whoever leaves without goodbye gets no more answers.
            _ => self.hang_up(place),
        }
    }

    /// Does all that can be done for a connection now.
    pub(super) fn attend(&mut self, place: usize) {
        loop {
            let Some(connection) = &mut self.connections[place] else {
                return;
            };
            let on = match connection.phase {
                Phase::Negotiating(_) => self.negotiate(place),
                Phase::Transmitting => self.take_incoming(place),
                Phase::Finishing => {
                    if connection.idle()
                        && !connection.has_replies()
                        && !connection.sending
                        && connection.out.is_empty()
                    {
                        self.hang_up(place);
                    }
                    false
                }
                Phase::Closing => {
                    self.sweep(place);
                    return;
                }
            };
            if !on {
                break;
            }
        }
        self.receive(place);
        self.send(place);
    }

    fn receive(&mut self, place: usize) {
        let Some(connection) = &mut self.connections[place] else {
            return;
        };
        if connection.receiving || matches!(connection.phase, Phase::Finishing | Phase::Closing) {
            return;
        }
        if let Some(room) = connection.room() {
            connection.receiving = true;
            let socket = connection.socket();
            self.ring.receive(socket, room, Token::new(Kind::Receive, place as u32));
        }
    }

    /// One step of the negotiation; true when there may be more to do with the bytes at hand.
    fn negotiate(&mut self, place: usize) -> bool {
        let Some(mut connection) = self.connections[place].take() else {
            return false;
        };
        // One answer at a time, so that a client cannot make us gather answers it does not read.
        if connection.sending || !connection.out.is_empty() {
            self.connections[place] = Some(connection);
            return false;
        }
        let bytes = connection.pending().bytes();
        let Phase::Negotiating(negotiation) = &mut connection.phase else {
            unreachable!("asked by the caller");
        };
        let (consumed, step) = negotiation.step(bytes, self, &mut connection.out);
        connection.consume(consumed);
        let on = match step {
            Step::More => consumed > 0,
            Step::Begin(agreed) => {
                connection.phase = Phase::Transmitting;
                connection.export = match agreed.export.key.checked_sub(1) {
                    None => Export::Origin,
                    Some(image) => Export::Image(image as u8),
                };
                connection.structured = agreed.structured;
                connection.contexts = agreed.contexts;
                connection.epoch = self.setup.map.epoch;
                true
            }
            Step::End => {
                connection.phase = Phase::Finishing;
                true
            }
        };
        self.connections[place] = Some(connection);
        on
    }

    /// Consumes what it can of the received bytes; true when it should be called again.
    fn take_incoming(&mut self, place: usize) -> bool {
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        match connection.incoming {
            Incoming::Header => {
                let pending = connection.pending();
                if pending.len() < REQUEST_LEN || !connection.accepts() {
                    return false;
                }
                let bytes: &[u8; REQUEST_LEN] = pending.bytes()[..REQUEST_LEN].try_into().expect("as just compared");
                let Some(request) = proto::Request::parse(bytes) else {
                    self.hang_up(place);
                    return false;
                };
                connection.consume(REQUEST_LEN);
                self.begin_request(place, request)
            }
            Incoming::Discard { cookie, left, errno } => {
                let count = left.min(connection.pending().len() as u64);
                connection.consume(count as usize);
                if count < left {
                    let left = left - count;
                    connection.incoming = Incoming::Discard { cookie, left, errno };
                    return false;
                }
                connection.incoming = Incoming::Header;
                self.answer(place, Header::simple(cookie, errno));
                true
            }
            Incoming::Cutting { request, offset, left } => self.cut(place, request, offset, left),
            Incoming::Payload {
                request,
                offset,
                left,
                piece,
            } => self.take_payload(place, request, offset, left, piece),
        }
    }

    fn begin_request(&mut self, place: usize, asked: proto::Request) -> bool {
        if asked.command == command::BLOCK_STATUS {
            self.watch_origin();
        }
        let errno = self.refusal(place, asked);
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        let request = Request {
            cookie: asked.cookie,
            command: asked.command,
            flags: asked.flags,
            next: asked.offset,
            ..Request::default()
        };
        let (offset, left) = (asked.offset, u64::from(asked.length));
        match asked.command {
            command::DISCONNECT => {
                connection.phase = Phase::Finishing;
                return true;
            }
            command::WRITE if errno != 0 => {
                // Far more than we ever allowed: not worth reading.
                if left > 2 * u64::from(proto::MAX_PAYLOAD) {
                    self.hang_up(place);
                    return false;
                }
                let cookie = asked.cookie;
                connection.incoming = Incoming::Discard { cookie, left, errno };
                return true;
            }
            command::READ if errno != 0 && connection.structured => {
                self.answer(place, Header::error(asked.cookie, errno));
                return true;
            }
            command::BLOCK_STATUS if errno != 0 && connection.structured => {
                self.answer(place, Header::error(asked.cookie, errno));
                return true;
            }
            _ if errno != 0 => {
                self.answer(place, Header::simple(asked.cookie, errno));
                return true;
            }
            command::BLOCK_STATUS => return self.block_status(place, asked),
            command::FLUSH if connection.export != Export::Origin => {
                self.answer(place, Header::simple(asked.cookie, 0));
                return true;
            }
            _ => {}
        }
        // A reply without structure names no offset: such a read runs alone, its pieces in order.
        let ordered = asked.command == command::READ && !connection.structured;
        let number = connection
            .begin(Request { ordered, ..request })
            .expect("`accepts` was asked before the header was taken");
        connection.incoming = if asked.command == command::WRITE {
            Incoming::Payload {
                request: number,
                offset,
                left,
                piece: None,
            }
        } else {
            Incoming::Cutting {
                request: number,
                offset,
                left,
            }
        };
        true
    }

    /// The errno that answers a request at once; 0: it is served.
    fn refusal(&self, place: usize, asked: proto::Request) -> i32 {
        let connection = self.connections[place].as_ref().expect("asked by the caller");
        let export = self.export_info(connection.export);
        let Some(export) = export else {
            return libc::ESHUTDOWN;
        };
        let allowed = match asked.command {
            // FUA may come with anything once it is offered (proto.md, "Request flags").
            command::READ | command::WRITE | command::TRIM | command::FLUSH => flag::FUA,
            command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE,
            command::DISCONNECT => return 0,
            _ => return libc::EINVAL,
        };
        if asked.flags & !allowed != 0 {
            return libc::EINVAL;
        }
        if asked.command == command::FLUSH {
            return if asked.offset == 0 && asked.length == 0 {
                0
            } else {
                libc::EINVAL
            };
        }
        let changes = matches!(asked.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        let past = asked
            .offset
            .checked_add(u64::from(asked.length))
            .is_none_or(|end| end > export.size);
        let payload = matches!(asked.command, command::READ | command::WRITE);
        let grain = u64::from(export.minimum_block);
        match () {
            () if changes && export.flags & proto::export::READ_ONLY != 0 => libc::EPERM,
            () if matches!(asked.command, command::TRIM | command::WRITE_ZEROES)
                && export.flags & proto::export::SEND_WRITE_ZEROES == 0 =>
            {
                libc::EINVAL
            }
            () if asked.length == 0 => libc::EINVAL,
            () if past && changes => libc::ENOSPC,
            () if past => libc::EINVAL,
            () if payload && asked.length > proto::MAX_PAYLOAD => libc::EOVERFLOW,
            () if asked.offset % grain != 0 || u64::from(asked.length) % grain != 0 => libc::EINVAL,
            () if asked.command != command::BLOCK_STATUS => 0,
            () if connection.contexts.is_empty() => libc::EINVAL,
            // Block status must not promise zeros where nothing can be read any more.
            () if !self.readable(connection.export) => libc::EIO,
            () => 0,
        }
    }

    /// Cuts the next piece of a request that brings no bytes.
    fn cut(&mut self, place: usize, number: u8, offset: u64, left: u64) -> bool {
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        let request = connection.requests[usize::from(number)];
        let flush = request.command == command::FLUSH;
        if left == 0 && !flush {
            // An ordered read goes on alone until its last byte is queued.
            if request.ordered && request.pieces > 0 {
                return false;
            }
            connection.incoming = Incoming::Header;
            return true;
        }
        if request.ordered && request.pieces == 0 && !request.began && !connection.only(number) {
            return false;
        }
        let Some(id) = self.new_piece(place, number) else {
            return false;
        };
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        let export = connection.export;
        let len = match request.command {
            // Pieces end at multiples of their length: a piece then touches as few chunks as it can.
            command::READ => left.min(PIECE_LEN as u64 - offset % PIECE_LEN as u64),
            _ => left,
        };
        let piece = &mut self.pieces[id as usize];
        (piece.offset, piece.len) = (offset, len);
        piece.dsync = request.flags & flag::FUA != 0;
        piece.no_hole = request.flags & flag::NO_HOLE != 0;
        piece.fast_zero = request.flags & flag::FAST_ZERO != 0;
        piece.job = match (request.command, export) {
            (command::READ, Export::Origin) => Job::Read,
            (command::READ, Export::Image(_)) => Job::ImageRead,
            (command::WRITE_ZEROES, _) => Job::Zero,
            (command::TRIM, _) => Job::Trim,
            _ => Job::Flush,
        };
        let request = &mut connection.requests[usize::from(number)];
        request.complete = left == len || flush;
        connection.incoming = if request.complete && !request.ordered {
            Incoming::Header
        } else {
            Incoming::Cutting {
                request: number,
                offset: offset + len,
                left: left - len,
            }
        };
        self.go_on(id);
        true
    }

    /// A piece of a connection for a request, counted in it.
    pub(super) fn new_piece(&mut self, place: usize, number: u8) -> Option<PieceId> {
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        let (within, buffer) = connection.take_piece()?;
        let id = (place * PIECES) as PieceId + within;
        connection.requests[usize::from(number)].pieces += 1;
        self.pieces[id as usize] = Piece {
            job: Job::Receive,
            request: number,
            image: match connection.export {
                Export::Origin => 0,
                Export::Image(image) => image,
            },
            buffer: Some(buffer),
            ..Piece::IDLE
        };
        Some(id)
    }
}
