# SPDX-License-Identifier: GPL-2.0-or-later
"""
A small NBD client that reads: what a backup program needs to fetch changed ranges from an image.

Fixed newstyle negotiation and simple replies only (doc/proto.md of the NBD project), one request at a time. Not a
general client: `nbdcopy`, `qemu-img` and `fio` are, and the demo uses those for everything else.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

from demo.programs import DemoError

_MAGIC = b"NBDMAGICIHAVEOPT"
_FIXED_NEWSTYLE_NO_ZEROES = 3
_OPTION_GO = 7
_REPLY_MAGIC, _REPLY_ACK, _REPLY_INFO, _REPLY_ERROR = 0x3E889045565A9, 1, 3, 1 << 31
_INFO_EXPORT = 0
_REQUEST_MAGIC, _ANSWER_MAGIC = 0x25609513, 0x67446698
_READ, _DISCONNECT = 0, 2

# Every server takes requests of 32 MiB; smaller ones keep the memory small.
READ_MAX_BYTES = 4 << 20


def parse_uri(uri: str) -> tuple[str, str]:
    """
    Split `nbd+unix:///EXPORT?socket=PATH` into (socket path, export name).

    Raises DemoError for any other kind of URI.
    """
    parts = urlsplit(uri)
    paths = parse_qs(parts.query).get("socket", [])
    if parts.scheme != "nbd+unix" or len(paths) != 1:
        raise DemoError(f"{uri} is no NBD URI of a unix socket")
    return paths[0], unquote(parts.path.removeprefix("/"))


class Export:
    """One export, open for reading for as long as the `with` lasts. Not for several threads."""

    def __init__(self, uri: str) -> None:
        """Raises DemoError when there is no such export."""
        self._uri = uri
        path, name = parse_uri(uri)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._cookie = 0
        try:
            self._socket.connect(path)
            self.size = self._negotiate(name.encode())
        except OSError as error:
            self._socket.close()
            raise DemoError(f"cannot read from {uri}: {error.strerror or error}") from error
        except DemoError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._request(_DISCONNECT, 0, 0)
        except OSError:
            pass  # the server left first
        finally:
            self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        """Read a range of at most `READ_MAX_BYTES`. Raises DemoError when the server answers with an error."""
        try:
            self._request(_READ, offset, length)
            magic, errno, cookie = struct.unpack(">IIQ", self._receive(16))
            if magic != _ANSWER_MAGIC or cookie != self._cookie:
                raise DemoError(f"{self._uri}: the answer to a read is not one")
            if errno:
                raise DemoError(
                    f"{self._uri}: reading {length} bytes at {offset} failed with NBD error {errno}"
                )
            return self._receive(length)
        except OSError as error:
            raise DemoError(f"{self._uri}: reading failed: {error.strerror or error}") from error

    def _request(self, kind: int, offset: int, length: int) -> None:
        self._cookie += 1
        self._socket.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, kind, self._cookie, offset, length))

    def _receive(self, length: int) -> bytes:
        received = bytearray(length)
        view = memoryview(received)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise DemoError(f"{self._uri}: the server closed the connection")
            view = view[count:]
        return bytes(received)

    def _negotiate(self, name: bytes) -> int:
        """Choose the export; returns its size in bytes."""
        if self._receive(18)[:16] != _MAGIC:
            raise DemoError(f"{self._uri}: no NBD server answers there")
        self._socket.sendall(struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES))
        wish = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._socket.sendall(b"IHAVEOPT" + struct.pack(">II", _OPTION_GO, len(wish)) + wish)
        size = -1
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self._receive(20))
            content = self._receive(length)
            if magic != _REPLY_MAGIC or option != _OPTION_GO or kind & _REPLY_ERROR:
                why = content.decode(errors="replace") or f"reply {kind:#x}"
                raise DemoError(f"{self._uri}: the server refuses the export: {why}")
            if kind == _REPLY_ACK:
                break
            if kind == _REPLY_INFO and struct.unpack_from(">H", content)[0] == _INFO_EXPORT:
                size = struct.unpack_from(">Q", content, 2)[0]
        if size < 0:
            raise DemoError(f"{self._uri}: the server does not say how big the export is")
        return size
