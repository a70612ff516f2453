# SPDX-License-Identifier: GPL-2.0-or-later
"""What the data path can be asked to do, and its events (docs/datapath-protocol.md, Operations).

A ``DatapathClient`` holds three connections: one for operations, which may take seconds (a take waits for writes in
flight), one for readings, which must not wait behind them, and one for events. It keeps no state about origins or
snapshots and never reconnects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from blksnap_service import errors
from blksnap_service.datapath.connection import Connection, Reply
from blksnap_service.datapath.model import Event, Fields, Front, Hello, OriginReading, SnapshotReading, Taken
from blksnap_service.fds import OwnedFd, close_all

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path
    from types import TracebackType

MARK_RANGES_PER_REQUEST = 20_000
"""As JSON, two 20-digit numbers and punctuation: stays below the 1 MiB line."""


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

    @property
    def hello(self) -> Hello:
        """What the data path said of itself when it was last asked."""
        return self._readings.hello

    async def greet(self) -> Hello:
        """Ask again: a kernel module may have been loaded since."""
        return await self._readings.greet()

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
        fd: OwnedFd | None,
        *,
        saved_map: OwnedFd | None = None,
        block_size: int = 0,
        generation: str,
        base: int = 0,
        active: int = 1,
        read_only: bool = False,
        label: str = "",
        front: Front = "nbd",
        top: str = "",
        insert: str = "",
    ) -> OriginMaps:
        """Track the open file or device ``fd``; both descriptors are consumed.

        ``front`` ublk needs a block device: ``top`` names the device-mapper device to make over it. With ``insert``, the data
        path gets under the live device-mapper device of that name by itself, and there is no ``fd``.
        """
        fds = [one for one in (fd, saved_map) if one is not None]
        # A data path that was started by an older service refuses what it does not know.
        placed = {} if front == "nbd" else {"front": front, "top": top, "insert": insert}
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
                **placed,
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

    async def origin_resize(self, origin: str) -> OriginMaps:
        """Go by the present size of an origin that has grown: what is new counts as changed, the generation goes on."""
        return _maps(await self._operations.request("origin.resize", origin=origin))

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
        self,
        snapshot: str,
        devices: Sequence[TakeDevice],
        timeout_ms: int = 10_000,
        mounts: Sequence[OwnedFd] = (),
    ) -> Taken:
        """Take all ``devices`` at one instant. The maps in the reply are not kept: ask ``origin_maps``.

        File systems ``mounts`` are open on are frozen around the instant; the descriptors are consumed.
        """
        reply = await self._operations.request(
            "snapshot.take",
            mounts,
            snapshot=snapshot,
            devices=[
                {"origin": item.origin, "writable": item.writable, "next_generation": item.next_generation}
                for item in devices
            ],
            timeout_ms=timeout_ms,
            **({"freeze_fds": len(mounts)} if mounts else {}),
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
