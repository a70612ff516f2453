// SPDX-License-Identifier: GPL-2.0-or-later
//! One NBD client: its socket, buffers, requests under way and replies to send. Knows no origin and no image.

use super::piece::{PieceId, PIECES, PIECE_LEN};
use crate::mem::{Mapping, Span};
use crate::nbd::negotiate::{Context, Negotiation};
use crate::nbd::proto::{Header, HEADER_LEN};
use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Clients of one origin at a time.
pub const CONNECTIONS: usize = 64;
pub const RECEIVE_LEN: usize = 256 << 10;
/// No request is begun while this many replies wait for a client that does not read them.
const REPLIES_HIGH: usize = 128;
const REPLIES_MAX: usize = REPLIES_HIGH + 2 * PIECES + 16;
const VECTORS: usize = 2 * PIECES;
/// Seconds a client has for negotiating.
pub const NEGOTIATION_S: u8 = 30;

/// What a connection is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Export {
    Origin,
    Image(u8),
}

#[derive(Debug)]
pub enum Phase {
    Negotiating(Negotiation),
    Transmitting,
    /// No more requests (the client said goodbye); what is under way is still answered.
    Finishing,
    /// Nothing is answered any more; freed when nothing is in flight.
    Closing,
}

/// What the next received bytes belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    Header,
    /// The payload of a write.
    Payload {
        request: u8,
        offset: u64,
        left: u64,
        piece: Option<PieceId>,
    },
    /// A payload that nobody wants; then the request is answered with this errno.
    Discard {
        cookie: u64,
        left: u64,
        errno: i32,
    },
    /// No bytes: a read, zero or trim that is not yet fully cut into pieces.
    Cutting {
        request: u8,
        offset: u64,
        left: u64,
    },
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    pub cookie: u64,
    pub command: u16,
    pub flags: u16,
    pub errno: i32,
    /// Pieces that are not answered yet.
    pub pieces: u32,
    /// Whether all pieces have been cut.
    pub complete: bool,
    /// A read without structured replies: data must follow the header in order.
    pub ordered: bool,
    /// Offset of the next byte of an ordered read to be sent.
    pub next: u64,
    pub began: bool,
}

/// A reply: a header, then perhaps the buffer of a piece (which is free again when it has been sent).
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    pub header: Option<Header>,
    pub data: Option<Span>,
    pub piece: Option<PieceId>,
}

/// The message in flight. Boxed: its addresses are the kernel's until the completion.
struct Message {
    header: libc::msghdr,
    vectors: [libc::iovec; VECTORS],
    headers: [u8; VECTORS * HEADER_LEN],
    first: usize,
    count: usize,
    pieces: Vec<PieceId>,
}

pub struct Connection {
    socket: OwnedFd,
    memory: Mapping,
    pub phase: Phase,
    pub export: Export,
    pub structured: bool,
    pub contexts: Vec<Context>,
    /// The engine's generation count when the contexts were agreed.
    pub epoch: u64,
    /// Negotiation output.
    pub out: Vec<u8>,
    pub seconds: u8,
    pub received: (usize, usize),
    pub receiving: bool,
    pub sending: bool,
    pub incoming: Incoming,
    pub requests: [Request; PIECES],
    free_requests: u64,
    free_pieces: u64,
    replies: VecDeque<Reply>,
    message: Box<Message>,
}

impl Connection {
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let memory = Mapping::anonymous(RECEIVE_LEN + PIECES * PIECE_LEN)?;
        let mut out = Vec::with_capacity(4096);
        let negotiation = Negotiation::new(&mut out);
        // SAFETY: null pointers and zero lengths are a valid empty message.
        let header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        let empty = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Ok(Self {
            socket,
            memory,
            phase: Phase::Negotiating(negotiation),
            export: Export::Origin,
            structured: false,
            contexts: Vec::new(),
            epoch: 0,
            out,
            seconds: 0,
            received: (0, 0),
            receiving: false,
            sending: false,
            incoming: Incoming::Header,
            requests: [Request::default(); PIECES],
            free_requests: u64::MAX,
            free_pieces: u64::MAX,
            replies: VecDeque::with_capacity(REPLIES_MAX),
            message: Box::new(Message {
                header,
                vectors: [empty; VECTORS],
                headers: [0; VECTORS * HEADER_LEN],
                first: 0,
                count: 0,
                pieces: Vec::with_capacity(VECTORS),
            }),
        })
    }

    pub fn socket(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// The receive buffer.
    pub fn inbox(&self) -> Span {
        self.memory.span(0, RECEIVE_LEN)
    }

    /// Received bytes that are not consumed yet.
    pub fn pending(&self) -> Span {
        let (start, end) = self.received;
        self.inbox().at(start, end - start)
    }

    pub fn consume(&mut self, count: usize) {
        self.received.0 += count;
        debug_assert!(self.received.0 <= self.received.1);
    }

    /// Room for receiving, after moving what is left to the front when the back is short of room. Only here do bytes move:
    /// while a receive is in flight the kernel holds the place behind `received.1`.
    pub fn room(&mut self) -> Option<Span> {
        assert!(!self.receiving);
        let (start, end) = self.received;
        if start == end {
            self.received = (0, 0);
        } else if start > 0 && end > RECEIVE_LEN / 2 {
            self.inbox().copy_from(self.pending().bytes());
            self.received = (0, end - start);
        }
        let room = self.inbox().from(self.received.1);
        (!room.is_empty()).then_some(room)
    }

    /// A place for a request, unless all are taken or the client does not read its replies.
    pub fn begin(&mut self, request: Request) -> Option<u8> {
        if self.free_requests == 0 || self.replies.len() >= REPLIES_HIGH {
            return None;
        }
        let place = self.free_requests.trailing_zeros() as u8;
        self.free_requests &= !(1 << place);
        self.requests[usize::from(place)] = request;
        Some(place)
    }

    /// Whether another request may be begun, or answered without being begun.
    pub fn accepts(&self) -> bool {
        self.free_requests != 0 && self.free_pieces != 0 && self.replies.len() < REPLIES_HIGH
    }

    /// Whether request `place` is the only one under way.
    pub fn only(&self, place: u8) -> bool {
        !self.free_requests == 1 << place
    }

    pub fn end(&mut self, place: u8) {
        self.free_requests |= 1 << place;
    }

    /// The number of a free piece of this connection and its buffer.
    pub fn take_piece(&mut self) -> Option<(u32, Span)> {
        if self.free_pieces == 0 {
            return None;
        }
        let place = self.free_pieces.trailing_zeros();
        self.free_pieces &= !(1 << place);
        Some((
            place,
            self.memory.span(RECEIVE_LEN + place as usize * PIECE_LEN, PIECE_LEN),
        ))
    }

    pub fn free_piece(&mut self, id: PieceId) {
        self.free_pieces |= 1 << (id as usize % PIECES);
    }

    /// Whether no request and no piece is under way.
    pub fn idle(&self) -> bool {
        self.free_requests == u64::MAX && self.free_pieces == u64::MAX
    }

    /// Whether it can be dropped: nothing of it is in the kernel's or the engine's hands.
    pub fn unused(&self) -> bool {
        self.free_pieces == u64::MAX && !self.receiving && !self.sending
    }

    pub fn reply(&mut self, reply: Reply) {
        debug_assert!(self.replies.len() < REPLIES_MAX);
        self.replies.push_back(reply);
    }

    pub fn has_replies(&self) -> bool {
        !self.replies.is_empty()
    }

    /// Forgets what was not sent; returns the next piece that is free by that.
    pub fn drop_reply(&mut self) -> Option<Option<PieceId>> {
        self.replies.pop_front().map(|reply| reply.piece)
    }

    /// Gathers waiting replies into the message; false when there is nothing to send.
    pub fn gather(&mut self) -> bool {
        let message = &mut *self.message;
        message.pieces.clear();
        (message.first, message.count) = (0, 0);
        let mut used = 0;
        // Headers that follow each other share a vector.
        let mut open = false;
        while let Some(reply) = self.replies.front().copied() {
            if message.count + 2 > VECTORS || used + HEADER_LEN > message.headers.len() {
                break;
            }
            self.replies.pop_front();
            if let Some(header) = reply.header {
                let bytes = header.as_slice();
                let place = &mut message.headers[used..used + bytes.len()];
                place.copy_from_slice(bytes);
                used += bytes.len();
                if open {
                    message.vectors[message.count - 1].iov_len += bytes.len();
                } else {
                    message.vectors[message.count] = libc::iovec {
                        iov_base: place.as_mut_ptr().cast(),
                        iov_len: bytes.len(),
                    };
                    message.count += 1;
                    open = true;
                }
            }
            if let Some(data) = reply.data {
                message.vectors[message.count] = libc::iovec {
                    iov_base: data.as_ptr().cast(),
                    iov_len: data.len(),
                };
                message.count += 1;
                open = false;
            }
            message.pieces.extend(reply.piece);
        }
        message.count > 0
    }

    /// The negotiation's output as the message.
    pub fn out_message(&mut self) -> *const libc::msghdr {
        let message = &mut *self.message;
        message.pieces.clear();
        (message.first, message.count) = (0, 1);
        message.vectors[0] = libc::iovec {
            iov_base: self.out.as_mut_ptr().cast(),
            iov_len: self.out.len(),
        };
        self.message()
    }

    /// The gathered message, from the first byte that is not sent yet.
    pub fn message(&mut self) -> *const libc::msghdr {
        let message = &mut *self.message;
        message.header.msg_iov = message.vectors[message.first..].as_mut_ptr();
        message.header.msg_iovlen = message.count - message.first;
        &raw const message.header
    }

    /// Takes note that `sent` bytes of the message are gone; true when that was all of it.
    pub fn sent(&mut self, mut sent: usize) -> bool {
        let message = &mut *self.message;
        while message.first < message.count {
            let vector = &mut message.vectors[message.first];
            if sent < vector.iov_len {
                // SAFETY: within the vector, as just compared.
                vector.iov_base = unsafe { vector.iov_base.cast::<u8>().add(sent).cast() };
                vector.iov_len -= sent;
                return false;
            }
            sent -= vector.iov_len;
            message.first += 1;
        }
        true
    }

    /// The next piece that was sent with the message.
    pub fn sent_piece(&mut self) -> Option<PieceId> {
        self.message.pieces.pop()
    }
}
