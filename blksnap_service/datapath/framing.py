# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines with file descriptors over a unix stream socket, for asyncio.

One JSON object per line; the descriptors of a line travel with its first byte (docs/datapath-protocol.md, "Framing").
asyncio's own streams drop ancillary data, so this drives the socket itself. It knows neither requests nor replies.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import socket
from collections import deque
from typing import TYPE_CHECKING

from blksnap_service.fds import OwnedFd, close_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

MAX_LINE_BYTES = 1 << 20
MAX_FDS_PER_LINE = 253
"""SCM_MAX_FD of the kernel: sendmsg(2) refuses more in one message."""
UNIX_PATH_MAX_BYTES = 107
"""``sun_path`` holds 108 bytes with the terminating zero (unix(7))."""

_READ_BYTES = 64 << 10


class FramingError(Exception):
    """Raised when the peer sent something that is not the protocol."""


class LineSocket:
    """A connected unix socket that sends and receives lines with descriptors.

    ``on_line(message, fds)`` owns the descriptors it gets. ``on_closed(reason)`` is called exactly once, unless
    ``close`` was called first.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_line: Callable[[dict[str, object], list[OwnedFd]], None],
        on_closed: Callable[[str], None],
    ) -> None:
        """Start reading from the non-blocking ``sock``, which is owned from now on."""
        self._sock = sock
        self._on_line = on_line
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._scanned = 0
        self._fds: deque[OwnedFd] = deque()
        self._out: deque[tuple[memoryview, list[OwnedFd]]] = deque()
        self._writing = False
        self._closed = False
        self._loop.add_reader(sock.fileno(), self._readable)

    @classmethod
    async def connect(
        cls,
        path: Path,
        on_line: Callable[[dict[str, object], list[OwnedFd]], None],
        on_closed: Callable[[str], None],
    ) -> LineSocket:
        """Connect to the socket at ``path``. Raises ``OSError`` (refused, missing, not permitted)."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, str(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock, on_line, on_closed)

    @property
    def closed(self) -> bool:
        """True when nothing can be sent any more."""
        return self._closed

    def send(self, message: dict[str, object], fds: Sequence[OwnedFd] = ()) -> None:
        """Queue one line; the descriptors are closed when they are on their way.

        Raises ``ValueError`` when the line or the number of descriptors is over the protocol's limit and
        ``ConnectionError`` when the socket is closed; the descriptors are closed in both cases.
        """
        if fds:
            message = {**message, "fds": len(fds)}
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES or len(fds) > MAX_FDS_PER_LINE or self._closed:
            close_all(fds)
            if self._closed:
                raise ConnectionError("the socket is closed")
            raise ValueError(f"a line of {len(line)} bytes with {len(fds)} descriptors is over the limit")
        self._out.append((memoryview(line), list(fds)))
        if not self._writing:
            self._writable()

    def close(self) -> None:
        """Close the socket and every descriptor still in a queue."""
        if self._closed:
            return
        self._closed = True
        number = self._sock.fileno()
        self._loop.remove_reader(number)
        self._loop.remove_writer(number)
        self._sock.close()
        close_all(self._fds)
        self._fds.clear()
        for _, fds in self._out:
            close_all(fds)
        self._out.clear()

    def _fail(self, reason: str) -> None:
        if not self._closed:
            self.close()
            self._on_closed(reason)

    def _writable(self) -> None:
        try:
            while self._out:
                data, fds = self._out[0]
                ancillary = []
                if fds:
                    numbers = array.array("i", [fd.fileno() for fd in fds])
                    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)]
                sent = self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
                close_all(fds)
                if sent < len(data):
                    self._out[0] = (data[sent:], [])
                else:
                    self._out.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            # send() must not call back into its caller; the reader reports the end in order.
            self._loop.call_soon(self._fail, _broken(error))
            return
        if bool(self._out) != self._writing:
            self._writing = bool(self._out)
            if self._writing:
                self._loop.add_writer(self._sock.fileno(), self._writable)
            else:
                self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data = self._receive()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(_broken(error))
            return
        except FramingError as error:
            self._fail(str(error))
            return
        if not data:
            self._fail("the data path closed the connection")
            return
        self._buffer += data
        try:
            self._split()
        except FramingError as error:
            self._fail(str(error))

    def _receive(self) -> bytes:
        space = socket.CMSG_SPACE(MAX_FDS_PER_LINE * array.array("i").itemsize)
        # CPython sets no close-on-exec on received descriptors; the flag must ask for it.
        data, ancillary, flags, _ = self._sock.recvmsg(_READ_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                self._fds.extend(OwnedFd(number) for number in numbers)
        if flags & socket.MSG_CTRUNC:
            raise FramingError("file descriptors were lost: this process has too many open files")
        return data

    def _split(self) -> None:
        while not self._closed:
            end = self._buffer.find(b"\n", self._scanned)
            if end < 0:
                self._scanned = len(self._buffer)
                if self._scanned > MAX_LINE_BYTES:
                    raise FramingError("the data path sent a line over 1 MiB")
                return
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._scanned = 0
            self._deliver(line)

    def _deliver(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FramingError("the data path sent a line that is not JSON") from error
        if not isinstance(message, dict):
            raise FramingError("the data path sent a line that is no JSON object")
        count = message.pop("fds", 0)
        if not isinstance(count, int) or not 0 <= count <= len(self._fds):
            raise FramingError("the data path announced descriptors that did not arrive")
        fds = [self._fds.popleft() for _ in range(count)]
        with contextlib.ExitStack() as stack:
            stack.callback(close_all, fds)
            self._on_line(message, fds)
            stack.pop_all()


def _broken(error: OSError) -> str:
    """For people: most often the data path died before it had read or answered."""
    return f"the connection to the data path broke: {error.strerror or error}"
