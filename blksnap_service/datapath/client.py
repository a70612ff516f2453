# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests to the data path and its events, over its control socket (docs/datapath-protocol.md).

A ``Connection`` pairs replies with requests by id; a ``DatapathClient`` holds three of them: one for operations, which may
take seconds (a take waits for writes in flight), one for readings, which must not wait behind them, and one for
events. Error codes become classes of ``errors``. It keeps no state about origins or snapshots and never reconnects.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from blksnap_service import errors
from blksnap_service.datapath.framing import LineSocket
from blksnap_service.datapath.model import Event, Fields, OriginReading, SnapshotReading, Taken
from blksnap_service.fds import OwnedFd, close_all

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

PROTOCOL = 1
REPLY_TIMEOUT_S = 60.0
"""Longest time any operation may take; the slowest is a take, which gives up by itself after its ``timeout_ms``."""
MARK_RANGES_PER_REQUEST = 20_000
"""As JSON, two 20-digit numbers and punctuation: stays below the 1 MiB line."""

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

    async def open(self, path: Path) -> None:
        """Connect and agree on the protocol. Raises ``OSError`` or ``errors.NotAvailable`` (other version)."""
        self._socket = await LineSocket.connect(path, self._received, self._ended)
        try:
            reply = await self.request("hello", protocol=PROTOCOL)
            close_all(reply.fds)
        except BaseException:
            self.close()
            raise

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


@dataclass(frozen=True, slots=True)
class OriginMaps:
    """A reading with the descriptors of what it is about (read-only, sealed memfds), owned by the receiver.

    A context manager that closes them. ``page`` is the state page; None of an origin that was removed.
    """

    reading: OriginReading
    live: OwnedFd
    taken: OwnedFd
    page: OwnedFd | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all."""
        close_all(fd for fd in (self.live, self.taken, self.page) if fd is not None)


@dataclass(frozen=True, slots=True)
class TakeDevice:
    """One origin of a take; ``next_generation`` begins if the tracker finds it was bypassed."""

    origin: str
    next_generation: str
    writable: bool = False


class DatapathClient:
    """All operations of the protocol, typed."""

    def __init__(self, on_event: Callable[[Event], None], on_lost: Callable[[str], None]) -> None:
        """Prepare a client. ``on_lost(reason)`` is called once when any of its connections ends by itself."""
        self._on_event = on_event
        self._on_lost = on_lost
        self._lost = False
        self._operations = Connection(on_event, self._ended)
        self._readings = Connection(on_event, self._ended)
        self._events = Connection(on_event, self._ended)

    async def open(self, path: Path) -> None:
        """Connect to the control socket at ``path`` and subscribe. Raises ``OSError``, ``errors.NotAvailable``."""
        try:
            for connection in (self._operations, self._readings, self._events):
                await connection.open(path)
            close_all((await self._events.request("subscribe")).fds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections; the data path goes on. ``on_lost`` is not called."""
        self._lost = True
        for connection in (self._operations, self._readings, self._events):
            connection.close()

    def _ended(self, reason: str) -> None:
        if not self._lost:
            self.close()
            self._on_lost(reason)

    async def list(self) -> tuple[list[OriginReading], list[SnapshotReading]]:
        """Return everything the data path holds."""
        fields = Fields(await _plain(self._readings.request("list")), "list")
        return (
            [OriginReading.parse(item) for item in fields.items("origins")],
            [SnapshotReading.parse(item) for item in fields.items("snapshots")],
        )

    async def origin_add(
        self,
        origin: str,
        fd: OwnedFd,
        *,
        saved_map: OwnedFd | None = None,
        block_size: int = 0,
        generation: str,
        base: int = 0,
        active: int = 1,
        read_only: bool = False,
        label: str = "",
    ) -> OriginMaps:
        """Track the open file or device ``fd``; both descriptors are consumed."""
        fds = (fd,) if saved_map is None else (fd, saved_map)
        return _maps(
            await self._operations.request(
                "origin.add",
                fds,
                origin=origin,
                block_size=block_size,
                generation=generation,
                base=base,
                active=active,
                read_only=read_only,
                label=label,
            )
        )

    async def origin_info(self, origin: str) -> OriginReading:
        """Return a consistent reading."""
        return OriginReading.parse(await _plain(self._readings.request("origin.info", origin=origin)))

    async def origin_maps(self, origin: str) -> OriginMaps:
        """Return a consistent reading with the maps it is about."""
        return _maps(await self._readings.request("origin.maps", origin=origin))

    async def origin_mark(self, origin: str, ranges: Sequence[tuple[int, int]]) -> int:
        """Mark byte ranges ``(offset, length)``; returns how many blocks they cover, counted once per range.

        Sent in parts when there are many, so "validated whole" is the caller's part.
        """
        blocks = 0
        for start in range(0, len(ranges), MARK_RANGES_PER_REQUEST):
            part = [list(item) for item in ranges[start : start + MARK_RANGES_PER_REQUEST]]
            reply = await _plain(self._operations.request("origin.mark", origin=origin, ranges=part))
            blocks += Fields(reply, "mark").number("blocks")
        return blocks

    async def origin_mark_all(self, origin: str) -> int:
        """Mark the whole origin; returns its number of blocks."""
        reply = await _plain(self._operations.request("origin.mark-all", origin=origin))
        return Fields(reply, "mark").number("blocks")

    async def origin_reset(self, origin: str, generation: str, reason: str) -> OriginMaps:
        """Start a new generation with empty maps."""
        return _maps(
            await self._operations.request(
                "origin.reset", origin=origin, generation=generation, reason=reason
            )
        )

    async def origin_remove(self, origin: str, *, force: bool) -> OriginMaps:
        """Stop tracking; returns the final reading and maps. Raises ``errors.Busy`` when in use."""
        return _maps(await self._operations.request("origin.remove", origin=origin, force=force))

    async def snapshot_create(
        self,
        snapshot: str,
        storage: OwnedFd,
        *,
        limit: int,
        chunk_size: int = 0,
        low_space: int = 0,
        step: int = 0,
    ) -> SnapshotReading:
        """Create a snapshot over difference storage, which is consumed; ``limit`` in bytes."""
        return SnapshotReading.parse(
            await _plain(
                self._operations.request(
                    "snapshot.create",
                    (storage,),
                    snapshot=snapshot,
                    limit=limit,
                    low_space=low_space,
                    step=step,
                    chunk_size=chunk_size,
                )
            )
        )

    async def snapshot_take(
        self, snapshot: str, devices: Sequence[TakeDevice], timeout_ms: int = 10_000
    ) -> Taken:
        """Take all ``devices`` at one instant. The maps in the reply are not kept: ask ``origin_maps``."""
        reply = await self._operations.request(
            "snapshot.take",
            snapshot=snapshot,
            devices=[
                {"origin": item.origin, "writable": item.writable, "next_generation": item.next_generation}
                for item in devices
            ],
            timeout_ms=timeout_ms,
        )
        close_all(reply.fds)
        return Taken.parse(reply.ok)

    async def snapshot_info(self, snapshot: str) -> SnapshotReading:
        """Return a consistent reading."""
        return SnapshotReading.parse(await _plain(self._readings.request("snapshot.info", snapshot=snapshot)))

    async def snapshot_destroy(self, snapshot: str) -> None:
        """Destroy a snapshot: its images end, its storage is closed."""
        await _plain(self._operations.request("snapshot.destroy", snapshot=snapshot))

    async def stop(self, *, force: bool = False) -> None:
        """End the data path process. Raises ``errors.Busy`` when it has origins, unless ``force``."""
        self._lost = True
        await _plain(self._operations.request("stop", force=force))


async def _plain(reply: Coroutine[object, object, Reply]) -> object:
    """Return ``ok`` of a reply that carries no descriptors."""
    answer = await reply
    close_all(answer.fds)
    return answer.ok


def _maps(reply: Reply) -> OriginMaps:
    """Return the reading with its descriptors: live map, taken map and, while the origin is there, state page."""
    if len(reply.fds) < 2:
        close_all(reply.fds)
        raise errors.Failed("the data path sent a reading without its maps")
    try:
        reading = OriginReading.parse(reply.ok)
    except BaseException:
        close_all(reply.fds)
        raise
    close_all(reply.fds[3:])
    return OriginMaps(reading, *reply.fds[:3])
