// SPDX-License-Identifier: GPL-2.0-or-later
//! The last stop of a request: finished pieces become replies, replies become one message per connection and turn.

use super::connection::{Phase, Reply, Request};
use super::piece::{connection_of, Job, Piece, PieceId, PIECES};
use super::Engine;
use crate::nbd::proto::{command, Header};
use crate::ring::{Kind, Token};

impl Engine {
    /// A piece has done what it can (its `errno` says how well).
    pub(super) fn finish(&mut self, id: PieceId) {
        if super::ublk::is_request(id) {
            return self.finish_request(id);
        }
        let place = connection_of(id);
        let piece = self.pieces[id as usize];
        let connection = self.connections[place].as_mut().expect("pieces keep their connection");
        self.pending |= 1 << place;
        let request = &mut connection.requests[usize::from(piece.request)];
        if matches!(connection.phase, Phase::Closing) {
            request.pieces -= 1;
            self.release(id);
            return;
        }
        if piece.errno != 0 && request.errno == 0 {
            request.errno = piece.errno;
        }
        if request.ordered {
            self.pieces[id as usize].finished = true;
            self.send_in_order(place, piece.request);
            return;
        }
        request.pieces -= 1;
        let last = request.complete && request.pieces == 0;
        let request = *request;
        let reads = matches!(piece.job, Job::Read | Job::ImageRead);
        if reads && piece.errno == 0 {
            let done = last && request.errno == 0;
            connection.reply(Reply {
                header: Some(Header::data(request.cookie, done, piece.offset, piece.len as u32)),
                data: Some(piece.data()),
                piece: Some(id),
            });
        } else {
            self.release(id);
        }
        if last {
            self.end_request(place, piece.request, request);
        }
    }

    /// All pieces are answered. A read without an error needs nothing more: its last data said so.
    fn end_request(&mut self, place: usize, number: u8, request: Request) {
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        let header = match (request.command, request.errno) {
            (command::READ, 0) => None,
            (command::READ, errno) => Some(Header::error(request.cookie, errno)),
            (_, errno) => Some(Header::simple(request.cookie, errno)),
        };
        if header.is_some() {
            connection.reply(Reply {
                header,
                data: None,
                piece: None,
            });
        }
        connection.end(number);
    }

    /// Ends a request that has become complete only now, with no piece under way.
    pub(super) fn end_if_answered(&mut self, place: usize, number: u8) {
        let connection = self.connections[place].as_ref().expect("asked by the caller");
        let request = connection.requests[usize::from(number)];
        if request.complete && request.pieces == 0 {
            self.end_request(place, number, request);
        }
    }

    /// A read whose header promises that all data follows: pieces go out by offset, and after the header an error can
    /// only be told by hanging up (proto.md, "Simple reply message").
    fn send_in_order(&mut self, place: usize, number: u8) {
        loop {
            let connection = self.connections[place].as_mut().expect("asked by the caller");
            let request = &mut connection.requests[usize::from(number)];
            if request.errno != 0 && request.began {
                return self.hang_up(place);
            }
            let mine = |piece: &Piece| piece.job != Job::Idle && piece.finished && piece.request == number;
            let first = place * PIECES;
            let next = request.next;
            let errno = request.errno;
            let Some(found) = (first..first + PIECES).find(|id| {
                let piece = &self.pieces[*id];
                mine(piece) && (errno != 0 || piece.offset == next)
            }) else {
                return;
            };
            let piece = self.pieces[found];
            self.pieces[found].finished = false;
            request.pieces -= 1;
            let last = request.complete && request.pieces == 0;
            if errno != 0 {
                let cookie = request.cookie;
                self.release(found as PieceId);
                if last {
                    let connection = self.connections[place].as_mut().expect("asked by the caller");
                    connection.reply(Reply {
                        header: Some(Header::simple(cookie, errno)),
                        data: None,
                        piece: None,
                    });
                    connection.end(number);
                }
                continue;
            }
            let header = (!request.began).then(|| Header::simple(request.cookie, 0));
            request.began = true;
            request.next += piece.len;
            connection.reply(Reply {
                header,
                data: Some(piece.data()),
                piece: Some(found as PieceId),
            });
            if last {
                connection.end(number);
            }
        }
    }

    /// A piece is free again.
    pub(super) fn release(&mut self, id: PieceId) {
        let place = connection_of(id);
        self.pieces[id as usize] = Piece::IDLE;
        if let Some(connection) = &mut self.connections[place] {
            connection.free_piece(id);
            self.pending |= 1 << place;
        }
    }

    /// A reply of a header alone, for requests that never had a piece.
    pub(super) fn answer(&mut self, place: usize, header: Header) {
        let connection = self.connections[place].as_mut().expect("asked by the caller");
        connection.reply(Reply {
            header: Some(header),
            data: None,
            piece: None,
        });
    }

    /// Sends what has gathered, unless a message is still on its way.
    pub(super) fn send(&mut self, place: usize) {
        let Some(connection) = &mut self.connections[place] else {
            return;
        };
        if connection.sending || matches!(connection.phase, Phase::Closing) {
            return;
        }
        if matches!(connection.phase, Phase::Negotiating(_)) || !connection.out.is_empty() {
            if !connection.out.is_empty() {
                let header = connection.out_message();
                connection.sending = true;
                let socket = connection.socket();
                self.ring.send(socket, header, Token::new(Kind::Send, place as u32));
            }
            return;
        }
        if connection.gather() {
            connection.sending = true;
            let (socket, message) = (connection.socket(), connection.message());
            self.ring.send(socket, message, Token::new(Kind::Send, place as u32));
        }
    }

    pub(super) fn sent(&mut self, place: usize, result: i32) {
        let Some(connection) = &mut self.connections[place] else {
            return;
        };
        self.pending |= 1 << place;
        let gone = matches!(connection.phase, Phase::Closing);
        let again = result == -libc::EINTR || result == -libc::EAGAIN;
        let all = (result > 0 || again) && connection.sent(result.max(0) as usize);
        if !gone && !all && (result > 0 || again) {
            let (socket, message) = (connection.socket(), connection.message());
            self.ring.send(socket, message, Token::new(Kind::Send, place as u32));
            return;
        }
        connection.sending = false;
        connection.out.clear();
        while let Some(id) = self.connections[place]
            .as_mut()
            .and_then(|connection| connection.sent_piece())
        {
            self.release(id);
        }
        if result <= 0 && !gone {
            self.hang_up(place);
        }
    }

    /// Ends a connection: nothing more is read or answered; what is under way runs out.
    pub(super) fn hang_up(&mut self, place: usize) {
        let Some(connection) = &mut self.connections[place] else {
            return;
        };
        if !matches!(connection.phase, Phase::Closing) {
            connection.phase = Phase::Closing;
            crate::sys::shut_down(connection.socket());
        }
        self.pending |= 1 << place;
        self.sweep(place);
    }

    /// Frees what a closing connection still holds that nobody works on, and the connection when that was all.
    pub(super) fn sweep(&mut self, place: usize) {
        let Some(connection) = &mut self.connections[place] else {
            return;
        };
        if !matches!(connection.phase, Phase::Closing) {
            return;
        }
        while let Some(piece) = connection.drop_reply() {
            if let Some(id) = piece {
                self.pieces[id as usize] = Piece::IDLE;
                connection.free_piece(id);
            }
        }
        let first = place * PIECES;
        for id in first..first + PIECES {
            let piece = &mut self.pieces[id];
            if piece.job == Job::Receive || piece.finished {
                *piece = Piece::IDLE;
                connection.free_piece(id as PieceId);
            }
        }
        if connection.unused() {
            self.connections[place] = None;
        }
    }
}
