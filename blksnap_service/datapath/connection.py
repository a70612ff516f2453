# SPDX-License-Identifier: GPL-2.0-or-later
"""One connection to the data path: pairs replies with requests by id (docs/datapath-protocol.md, Framing).

Error codes become classes of ``errors``. What requests mean is the business of ``client``.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blksnap_service import errors
from blksnap_service.datapath.framing import LineSocket
from blksnap_service.datapath.model import Event, Fields, Hello
from blksnap_service.fds import OwnedFd, close_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

PROTOCOL = 1
REPLY_TIMEOUT_S = 60.0
"""Longest time any operation may take; the slowest is a take, which gives up by itself after its ``timeout_ms``."""

_BY_CODE: Mapping[str, type[errors.BlksnapError]] = {
    "protocol": errors.NotAvailable,
    "not-found": errors.NotFound,
    "exists": errors.AlreadyTracked,
    "busy": errors.Busy,
    "invalid": errors.InvalidArgument,
    "invalid-state": errors.InvalidState,
    "no-space": errors.NoSpace,
    "timed-out": errors.TimedOut,
    "io": errors.Failed,
    "limit": errors.LimitExceeded,
}


class Disconnected(errors.NotAvailable):
    """Raised for every request that is under way when the connection to the data path ends."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The ``ok`` part of a reply and the descriptors that came with it, owned by the caller."""

    ok: object
    fds: tuple[OwnedFd, ...]


def error_of(source: object) -> errors.BlksnapError:
    """Return the exception for an ``error`` object of a reply."""
    fields = Fields(source, "error")
    code, message = fields.text("code"), fields.text("message")
    if code == "io" and isinstance(source, dict) and isinstance(source.get("errno"), int):
        reason = os.strerror(source["errno"])
        if reason.lower() not in message.lower():
            message = f"{message}: {reason.lower()}"
    return _BY_CODE.get(code, errors.Failed)(message)


class Connection:
    """One connection: requests by id, answered in the order sent."""

    def __init__(self, on_event: Callable[[Event], None], on_closed: Callable[[str], None]) -> None:
        """Prepare a connection that reports to the two callbacks; ``open`` connects it."""
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._on_event = on_event
        self._on_closed = on_closed
        self._socket: LineSocket | None = None
        self.hello = Hello.NOTHING
        """What the data path said of itself when it was last asked."""

    async def open(self, path: Path) -> None:
        """Connect and agree on the protocol. Raises ``OSError`` or ``errors.NotAvailable`` (other version)."""
        self._socket = await LineSocket.connect(path, self._received, self._ended)
        try:
            await self.greet()
        except BaseException:
            self.close()
            raise

    async def greet(self) -> Hello:
        """Ask what the data path can do now. Raises as ``request``, and ``errors.NotAvailable`` for another version."""
        reply = await self.request("hello", protocol=PROTOCOL)
        close_all(reply.fds)
        self.hello = Hello.parse(reply.ok)
        return self.hello

    async def request(self, op: str, fds: Sequence[OwnedFd] = (), **arguments: object) -> Reply:
        """Send one request and wait for its reply; ``fds`` are consumed whatever happens.

        Raises the class of ``errors`` for the reply's code, ``Disconnected`` and ``errors.TimedOut``.
        """
        if self._socket is None or self._socket.closed:
            close_all(fds)
            raise Disconnected("the data path is not connected")
        number = next(self._ids)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._socket.send({"id": number, "op": op, **arguments}, fds)
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                return await future
        except BaseException as error:
            # A reply may have arrived in the very step in which the waiting was cancelled or timed out.
            if future.done() and not future.cancelled() and future.exception() is None:
                close_all(future.result().fds)
            if isinstance(error, TimeoutError):
                raise errors.TimedOut(
                    f"the data path did not answer {op} within {REPLY_TIMEOUT_S:.0f} s"
                ) from error
            if isinstance(error, ConnectionError):
                raise Disconnected("the data path is not connected") from error
            raise
        finally:
            self._waiting.pop(number, None)

    def close(self) -> None:
        """Close; requests under way end with ``Disconnected``."""
        if self._socket is not None:
            self._socket.close()
        self._fail_waiting("the connection to the data path was closed")

    def _fail_waiting(self, reason: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(Disconnected(reason))

    def _ended(self, reason: str) -> None:
        self._fail_waiting(reason)
        self._on_closed(reason)

    def _received(self, message: dict[str, object], fds: list[OwnedFd]) -> None:
        name = message.get("event")
        if isinstance(name, str):
            close_all(fds)
            self._on_event(Event(name, Fields(message, name)))
            return
        number = message.get("id")
        if number is None and "error" in message and self._waiting:
            # A line that could not be read has no id, but replies come in the order of requests.
            number = min(self._waiting)
        future = self._waiting.get(number) if isinstance(number, int) else None
        if future is None or future.done():
            # The one who asked has given up; what came for it must not stay open.
            close_all(fds)
        elif "error" in message:
            close_all(fds)
            try:
                future.set_exception(error_of(message["error"]))
            except errors.BlksnapError as error:
                future.set_exception(error)
        else:
            future.set_result(Reply(message.get("ok"), tuple(fds)))
