# SPDX-License-Identifier: GPL-2.0-or-later
"""Sends messages: a queue in front of a non-blocking socket.

What it is: the owner of every byte and file descriptor between "reply" and the kernel. A full socket is waited for,
and `on_pressure` tells when so much is queued that no more calls should be read. What it is not: marshalling.
"""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

HIGH_BYTES: Final = 4 * 2**20
LOW_BYTES: Final = 2**20

_log = logging.getLogger(__name__)


def close_all(fds: list[int]) -> None:
    """Close file descriptors and empty the list."""
    while fds:
        os.close(fds.pop())


class Writer:
    """Queue of messages for one socket, which it does not own."""

    def __init__(
        self, bus: socket.socket, on_pressure: Callable[[bool], None], on_lost: Callable[[str], None]
    ) -> None:
        """Call `on_pressure(True)` above HIGH_BYTES queued, `(False)` below LOW_BYTES; `on_lost` once, if sending fails."""
        self._loop = asyncio.get_running_loop()
        self._bus = bus
        self._on_pressure = on_pressure
        self._on_lost = on_lost
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self._queued = 0
        self._pressed = False
        self._armed = False
        self._closed = False
        self._emptied = asyncio.Event()
        self._emptied.set()

    @property
    def queued(self) -> int:
        """Bytes not yet given to the kernel."""
        return self._queued

    def send(self, message: bytes, fds: list[int]) -> None:
        """Queue a message and send what the socket takes. The file descriptors are the writer's now."""
        if self._closed:
            close_all(fds)
            return
        self._queue.append((memoryview(message), fds))
        self._queued += len(message)
        self._emptied.clear()
        if not self._armed:
            self._send_some()
        if self._queued > HIGH_BYTES and not self._pressed and not self._closed:
            self._pressed = True
            self._on_pressure(True)

    async def drained(self) -> None:
        """Wait until everything queued is sent, or the writer is closed."""
        await self._emptied.wait()

    def close(self) -> None:
        """Drop what is queued. The socket stays open."""
        self._closed = True
        self._disarm()
        for _, fds in self._queue:
            close_all(fds)
        self._queue.clear()
        self._queued = 0
        self._emptied.set()

    def _disarm(self) -> None:
        if self._armed:
            self._armed = False
            self._loop.remove_writer(self._bus.fileno())

    def _send_some(self) -> None:
        while self._queue:
            view, fds = self._queue[0]
            try:
                sent = self._send_one(view, fds)
            except (BlockingIOError, InterruptedError):
                if not self._armed:
                    self._armed = True
                    self._loop.add_writer(self._bus.fileno(), self._send_some)
                return
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS and fds:
                    # unix(7): file descriptors in flight are limited to RLIMIT_NOFILE per user without CAP_SYS_RESOURCE.
                    _log.warning("a message with file descriptors was dropped: %s", error.strerror)
                    sent = len(view)
                else:
                    self.close()
                    self._on_lost(f"cannot send: {error.strerror}")
                    return
            close_all(fds)  # they go with the first byte
            self._queued -= sent
            if sent == len(view):
                self._queue.popleft()
            else:
                self._queue[0] = (view[sent:], fds)
            if self._pressed and self._queued < LOW_BYTES:
                self._pressed = False
                self._on_pressure(False)
        self._disarm()
        self._emptied.set()

    def _send_one(self, view: memoryview, fds: list[int]) -> int:
        if not fds:
            return self._bus.send(view)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        return self._bus.sendmsg([view], [rights])
