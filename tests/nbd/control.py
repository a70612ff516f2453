# SPDX-License-Identifier: GPL-2.0-or-later
"""A second, synchronous speaker of docs/datapath-protocol.md, written from the page and not from the service.

One request at a time, replies in order; ``Events`` is a subscriber. Replies are parsed by the service's own ``model``, so
that what the data path says and what the service expects are compared by every test. It knows nothing of NBD.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from blksnap_service.fds import OwnedFd, close_all

TIMEOUT_S = 45.0
"""Longer than the longest wait inside the data path (30 s for a queue thread)."""


class Refused(Exception):
    """Raised when the data path answers with an error."""

    def __init__(self, identity: int | None, error: dict[str, Any]) -> None:
        """Keep ``code``, ``message`` and ``errno`` (0: none), and the ``identity`` the error was addressed to."""
        super().__init__(f"{error['code']}: {error['message']}")
        self.identity = identity
        self.code = str(error["code"])
        self.message = str(error["message"])
        self.errno = int(error.get("errno", 0))


class HungUp(Exception):
    """Raised when the data path closed the connection."""


class Control:
    """One connection to the control socket; a context manager."""

    def __init__(self, path: Path) -> None:
        """Connect. Raises ``OSError``."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        self._buffer = b""
        self._fds: list[OwnedFd] = []
        self._number = 0
        try:
            self.socket.connect(str(path))
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the connection and descriptors nobody asked for."""
        self.socket.close()
        close_all(self._fds)
        self._fds.clear()

    def send(self, line: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are, ``fds`` attached to the first; the caller keeps its descriptors."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.socket.sendmsg([line], ancillary)
        if sent < len(line):
            self.socket.sendall(line[sent:])

    def line(self) -> dict[str, Any]:
        """Return the next line. Raises ``HungUp`` and ``TimeoutError``."""
        while b"\n" not in self._buffer:
            data, fds, flags, _ = socket.recv_fds(self.socket, 1 << 16, 253, socket.MSG_CMSG_CLOEXEC)
            self._fds.extend(OwnedFd(fd) for fd in fds)
            assert not flags & socket.MSG_CTRUNC
            if not data:
                raise HungUp("the data path closed the connection")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message = json.loads(line)
        assert isinstance(message, dict)
        return message

    def reply(self) -> tuple[Any, list[OwnedFd]]:
        """Return ``ok`` of the next reply with its descriptors, which the caller owns. Raises ``Refused``."""
        message = self.line()
        if "error" in message:
            raise Refused(message["id"], message["error"])
        count = message.get("fds", 0)
        fds, self._fds = self._fds[:count], self._fds[count:]
        assert len(fds) == count
        return message["ok"], fds

    def request(self, op: str, fds: Sequence[int] = (), **arguments: Any) -> tuple[Any, list[OwnedFd]]:
        """Ask and return the answer with its descriptors, which the caller owns. Raises ``Refused``."""
        self._number += 1
        message = {"id": self._number, "op": op, **arguments}
        if fds:
            message["fds"] = len(fds)
        self.send(json.dumps(message).encode() + b"\n", fds)
        return self.reply()

    def call(self, op: str, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """Ask, close the descriptors of the answer and return its body. Raises ``Refused``."""
        ok, received = self.request(op, fds, **arguments)
        close_all(received)
        return ok


class Events(Control):
    """A subscriber."""

    def __init__(self, path: Path) -> None:
        """Connect and subscribe."""
        super().__init__(path)
        self.call("subscribe")
        self.seen: list[dict[str, Any]] = []

    def gather(self, seconds: float = 0.0) -> list[dict[str, Any]]:
        """Return all events so far, after waiting for more during ``seconds``."""
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            if b"\n" not in self._buffer and not select.select([self.socket], [], [], left)[0]:
                return self.seen
            self.seen.append(self.line())

    def wait_for(self, name: str, seconds: float = 10.0) -> dict[str, Any]:
        """Return the first event of this name. Raises ``AssertionError`` when none comes."""
        end = time.monotonic() + seconds
        while True:
            for event in self.gather():
                if event["event"] == name:
                    return event
            left = end - time.monotonic()
            assert left > 0, f"no {name} within {seconds} s, but {[event['event'] for event in self.seen]}"
            select.select([self.socket], [], [], left)


@contextlib.contextmanager
def opened(path: Path | str, flags: int = os.O_RDWR, mode: int = 0o600) -> Iterator[int]:
    """Open a file for the block."""
    fd = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def read_all(fd: OwnedFd) -> bytes:
    """Return the content of a memory file from its start and close it."""
    with fd:
        size = os.fstat(fd.fileno()).st_size
        data = os.pread(fd.fileno(), size, 0)
        assert len(data) == size
        return data
