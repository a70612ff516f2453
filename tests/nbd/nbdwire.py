# SPDX-License-Identifier: GPL-2.0-or-later
"""NBD as bytes (doc/proto.md of the nbd project), for what no well-behaved client does, and for reading much quickly.

Two layers: functions that make messages, right or wrong, and ``Client``, a plain client with simple replies and one
request at a time. The behaviour of third-party clients is tested with third-party clients.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from pathlib import Path
from typing import Self

GREETING = b"NBDMAGIC" + b"IHAVEOPT"
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT = (
    1,
    2,
    3,
    6,
    7,
    8,
    9,
    10,
)
READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
READ_ONLY = 1 << 1

MAX_PAYLOAD = 32 << 20


class NbdError(Exception):
    """Raised for an error reply; ``errno`` is the protocol's number, which is Linux's."""

    def __init__(self, errno: int) -> None:
        """Keep the number."""
        super().__init__(f"NBD error {errno}")
        self.errno = errno


class Gone(Exception):
    """Raised when the server closed the connection."""


def option(code: int, body: bytes = b"", *, magic: int = OPTION_MAGIC, length: int | None = None) -> bytes:
    """Return an option; ``length`` tells another length than that of the body."""
    return struct.pack(">QII", magic, code, len(body) if length is None else length) + body


def name_of(export: str) -> bytes:
    """Return a string with its length before it."""
    raw = export.encode()
    return struct.pack(">I", len(raw)) + raw


def info_body(export: str = "", *wanted: int) -> bytes:
    """Return the body of INFO and GO."""
    return name_of(export) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def meta_body(export: str, *queries: str) -> bytes:
    """Return the body of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return name_of(export) + struct.pack(">I", len(queries)) + b"".join(map(name_of, queries))


def request(
    command: int, offset: int, length: int, *, cookie: int = 1, flags: int = 0, magic: int = REQUEST_MAGIC
) -> bytes:
    """Return a request header."""
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length)


def receive(sock: socket.socket, count: int) -> bytearray:
    """Return exactly ``count`` bytes. Raises ``Gone`` and ``TimeoutError``."""
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view)
        if not got:
            raise Gone(f"{len(view)} of {count} bytes did not come")
        view = view[got:]
    return data


def connect(path: Path, seconds: float = 20.0) -> socket.socket:
    """Return a socket that has the greeting still to come."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock


class Client:
    """A client of one export, in the transmission phase with simple replies; a context manager."""

    def __init__(self, path: Path, export: str = "", *, seconds: float = 20.0) -> None:
        """Connect by EXPORT_NAME. Raises ``Gone`` when there is no such export."""
        self.socket = connect(path, seconds)
        try:
            greeting = receive(self.socket, 18)
            assert greeting[:16] == GREETING
            self.socket.sendall(struct.pack(">I", 3) + option(EXPORT_NAME, export.encode()))
            self.size, self.flags = struct.unpack(">QH", receive(self.socket, 10))
        except BaseException:
            self.socket.close()
            raise
        self._cookie = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Say goodbye and close."""
        self.close()

    def close(self) -> None:
        """Say goodbye, if anybody listens, and close."""
        try:
            self.socket.sendall(request(DISCONNECT, 0, 0))
        except OSError:
            pass
        finally:
            self.socket.close()

    def send(self, command: int, offset: int, length: int, payload: bytes = b"", *, flags: int = 0) -> int:
        """Send a request without waiting; returns its cookie."""
        self._cookie += 1
        head = request(command, offset, length, cookie=self._cookie, flags=flags)
        self.socket.sendall(head + payload)
        return self._cookie

    def answer(self, cookie: int, length: int = 0) -> bytearray:
        """Return the data of the reply to ``cookie``, the next that comes. Raises ``NbdError``."""
        magic, errno, found = struct.unpack(">IIQ", receive(self.socket, 16))
        assert magic == SIMPLE_REPLY_MAGIC, hex(magic)
        assert found == cookie, f"a reply to {found} instead of {cookie}"
        if errno:
            raise NbdError(errno)
        return receive(self.socket, length)

    def read(self, offset: int, length: int) -> bytearray:
        """Read. Raises ``NbdError``."""
        return self.answer(self.send(READ, offset, length), length)

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        """Write. Raises ``NbdError``."""
        self.answer(self.send(WRITE, offset, len(data), data, flags=flags))

    def command(self, code: int, offset: int, length: int, *, flags: int = 0) -> None:
        """Send a request without data and wait for its answer. Raises ``NbdError``."""
        self.answer(self.send(code, offset, length, flags=flags))

    def read_all(self, step: int = 8 << 20) -> bytes:
        """Return the whole export."""
        parts = [self.read(at, min(step, self.size - at)) for at in range(0, self.size, step)]
        return b"".join(parts)


def content_of(path: Path, export: str = "") -> bytes:
    """Return the bytes of an export. Raises ``Gone`` and ``NbdError``."""
    with Client(path, export) as client:
        return client.read_all()


def digest_of(path: Path, export: str = "") -> str:
    """Return the SHA-256 of an export. Raises ``Gone`` and ``NbdError``."""
    with Client(path, export) as client:
        digest = hashlib.sha256()
        step = 4 << 20
        for at in range(0, client.size, step):
            digest.update(client.read(at, min(step, client.size - at)))
        return digest.hexdigest()
