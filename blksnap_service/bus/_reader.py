# SPDX-License-Identifier: GPL-2.0-or-later
"""Receives messages: cuts a byte stream into messages and gives each its file descriptors.

What it is: the bounded half of a connection. At most BUDGET messages are delivered per turn of the event loop, at most
MAX_BODY_BYTES of a body are kept, and nothing is read while paused. What it is not: a parser of bodies.

Which file descriptors belong to which message: the kernel ends a read behind the data a set of descriptors was sent
with (unix_stream_read_generic), and buses send a message with descriptors on its own. So the message that holds
the last byte of such a read is the one they were sent with, however many were lost on the way.
"""

from __future__ import annotations

import array
import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from blksnap_service.bus._frame import FIXED_BYTES, FrameError, Lengths, Message, read_header, read_lengths
from blksnap_service.bus._writer import close_all

BUDGET: Final = 64
CHUNK_BYTES: Final = 64 * 1024
# MarkDirty of 65 536 ranges is 1 MiB, the largest call there is. A larger body is skipped and answered by its header.
MAX_BODY_BYTES: Final = 2 * 2**20
MAX_FIELDS_BYTES: Final = 64 * 1024
_SCM_MAX_FD: Final = 253

_log = logging.getLogger(__name__)


class Reader:
    """Messages from one socket, which it does not own."""

    def __init__(
        self, bus: socket.socket, on_message: Callable[[Message], None], on_lost: Callable[[str], None]
    ) -> None:
        """Call `on_message` for each message and `on_lost` once, when there will be no more. Starts paused."""
        self._loop = asyncio.get_running_loop()
        self._bus = bus
        self._on_message = on_message
        self._on_lost = on_lost
        self._buffer = bytearray()
        self._position = 0  # in the stream, of the first byte of the buffer
        self._skip = 0  # bytes to come that belong to a message already dealt with
        self._fds: deque[tuple[int, list[int]]] = (
            deque()
        )  # (position of the last byte they came with, descriptors)
        self._paused = True
        self._closed = False
        self._reading = False
        self._turn: asyncio.Handle | None = None

    def resume(self) -> None:
        """Read on."""
        if self._closed or not self._paused:
            return
        self._paused = False
        self._turn = self._loop.call_soon(self._deliver)

    def pause(self) -> None:
        """Read and deliver nothing until `resume`; what is being delivered is the last."""
        self._paused = True
        self._watch(False)
        if self._turn:
            self._turn.cancel()
            self._turn = None

    def close(self) -> None:
        """Read nothing more and close descriptors nobody was given. The socket stays open."""
        self.pause()
        self._closed = True
        self._buffer.clear()
        while self._fds:
            close_all(self._fds.popleft()[1])

    def _watch(self, on: bool) -> None:
        if on != self._reading:
            self._reading = on
            if on:
                self._loop.add_reader(self._bus.fileno(), self._receive)
            else:
                self._loop.remove_reader(self._bus.fileno())

    def _lose(self, reason: str) -> None:
        self.close()
        self._on_lost(reason)

    def _receive(self) -> None:
        ancillary_size = socket.CMSG_SPACE(_SCM_MAX_FD * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self._bus.recvmsg(CHUNK_BYTES, ancillary_size, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(f"cannot receive: {error.strerror}")
            return
        last_byte = self._position + len(self._buffer) + len(data) - 1
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
                self._fds.append((last_byte, fds.tolist()))
        if not data:
            self._lose("the bus closed the connection")
            return
        self._buffer += data
        self._deliver()

    def _deliver(self) -> None:
        """Deliver up to BUDGET messages, then see to it that there is a next turn."""
        self._turn = None
        try:
            for _ in range(BUDGET):
                if self._paused or not self._deliver_one():
                    break
            else:
                self._watch(False)
                if not self._paused:
                    self._turn = self._loop.call_soon(self._deliver)
                return
        except FrameError as error:
            self._lose(f"the bus sent what is no message: {error}")
            return
        self._watch(not self._paused)

    def _deliver_one(self) -> bool:
        """Deliver the next message if it is there. Raised when there is none and never will be: FrameError."""
        if self._skip:
            dropped = min(self._skip, len(self._buffer))
            self._drop(dropped)
            self._skip -= dropped
        if self._skip or len(self._buffer) < FIXED_BYTES:
            return False
        lengths = read_lengths(self._buffer, 0)
        if lengths.fields > MAX_FIELDS_BYTES:
            # An object path of any length is valid. Nobody has one like this, and the sender is in there.
            _log.info("skipped a message with %d bytes of header fields", lengths.fields)
            close_all(self._finish(lengths))
            return True
        whole = lengths.body <= MAX_BODY_BYTES
        if len(self._buffer) < (lengths.total if whole else lengths.body_start):
            return False
        try:
            header = read_header(lengths, bytes(self._buffer[: lengths.body_start]))
        except FrameError as error:
            _log.info("skipped a message: %s", error)
            close_all(self._finish(lengths))
            return True
        body = bytes(self._buffer[lengths.body_start : lengths.total]) if whole else None
        message = Message(header, body, self._finish(lengths))
        if len(message.fds) != header.fd_count:
            close_all(message.fds)
            message.fds_lost = True
        self._on_message(message)
        return True

    def _finish(self, lengths: Lengths) -> list[int]:
        """Step over a message and return its file descriptors, which the caller owns."""
        end = self._position + lengths.total
        fds: list[int] = []
        while self._fds and self._fds[0][0] < end:
            fds += self._fds.popleft()[1]
        dropped = min(lengths.total, len(self._buffer))
        self._drop(dropped)
        self._skip = lengths.total - dropped
        return fds

    def _drop(self, count: int) -> None:
        del self._buffer[:count]
        self._position += count
