# SPDX-License-Identifier: GPL-2.0-or-later
"""One origin of the data path as a ``tracker.Tracker``."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Sequence
from urllib.parse import quote

from blksnap_service import sysblock
from blksnap_service.backends.datapath.remains import Remains
from blksnap_service.cbt import View
from blksnap_service.datapath.client import DatapathClient, OriginMaps
from blksnap_service.datapath.model import OriginReading
from blksnap_service.fds import OwnedFd
from blksnap_service.storage import Identity
from blksnap_service.tracker import OpenMap, Placement, TrackerReading


def nbd_uri(socket: str, export: str = "") -> str:
    """Return the URI of an export on a unix socket (the NBD URI specification)."""
    return f"nbd+unix:///{quote(export, safe='')}?socket={quote(os.fsencode(socket), safe='/')}"


def below_name(live: str) -> str:
    """Return the name of the device-mapper device that has the table ``live`` had before a tracker got under it."""
    return f"{live}-blksnap"


def tracker_reading(reading: OriginReading) -> TrackerReading:
    """Translate the data path's READING."""
    return TrackerReading(
        state=reading.state,
        reason=reading.reason,
        capacity=reading.size,
        block_size=reading.block_size,
        block_count=reading.block_count,
        generation=reading.generation,
        base=reading.base,
        active=reading.active,
        oldest=reading.oldest,
        clients=reading.clients,
        snapshots=reading.snapshots,
        counters=reading.counters,
    )


class DatapathTracker:
    """Asks the data path every time; keeps the last reading, for properties, and what a killed data path leaves behind."""

    map_is_live = True

    def __init__(
        self, client: Callable[[], DatapathClient], reading: OriginReading, identity: Identity
    ) -> None:
        """Speak for the origin of ``reading``, which is the open file or device ``identity``."""
        self._client = client
        self.backend = reading.front
        self.origin = reading.origin
        self.identity = identity
        self.placement = Placement()
        self.devices = frozenset({identity})
        self.remains: Remains | None = None
        self._closed = False
        self._note(reading)

    def _note(self, reading: OriginReading) -> TrackerReading:
        self.last = tracker_reading(reading)
        self.node = reading.node or nbd_uri(reading.nbd_socket)
        placement = Placement(reading.top, reading.insert, reading.ublk_id)
        if placement != self.placement:
            self.placement, self.devices = placement, _devices(self.identity, placement)
        return self.last

    def close(self) -> None:
        """Close what is held for the case that the data path ends."""
        self._closed = True
        if self.remains is not None:
            self.remains.close()
            self.remains = None

    def hold(self, maps: OriginMaps) -> None:
        """Hold the live map and the state page, unless they are held already; ``maps`` stays the caller's."""
        held = self.remains
        if self._closed or maps.page is None:
            return
        # Sequences only rise while a data path lives; replies to two requests may be looked at in any order.
        if held is None or held.reading.live_sequence < maps.reading.live_sequence:
            self.remains = Remains(maps, self.identity, maps.page)
            if held is not None:
                held.close()

    async def note_end(self) -> None:
        """Note how the origin is, now that the data path has ended."""
        if self.remains is not None:
            await asyncio.to_thread(self.remains.note_end)

    async def read(self) -> TrackerReading:
        """Make a reading. Raises ``errors.NotFound`` when the data path does not have the origin (any more)."""
        reading = await self._client().origin_info(self.origin)
        if self.remains is None or self.remains.reading.live_sequence < reading.live_sequence:
            with await self._client().origin_maps(self.origin) as maps:
                self.hold(maps)
                reading = maps.reading
        return self._note(reading)

    async def open_map(self, view: View) -> OpenMap:
        """Open a map: the memory file itself, read-only and sealed, with the reading from the same reply.

        The live map of a later window or generation is another file with another sequence: this one then stands still, and
        what is returned here stays true of it.
        """
        maps = await self._client().origin_maps(self.origin)
        with maps:
            self.hold(maps)
            reading = tracker_reading(maps.reading)
            # Not those of `maps`, which are closed here.
            if view is View.LIVE:
                fd = OwnedFd(maps.live.release())
                return OpenMap(reading, view, maps.reading.base, maps.reading.live_sequence, fd)
            fd = OwnedFd(maps.taken.release())
            return OpenMap(reading, view, maps.reading.taken_base, maps.reading.taken_sequence, fd)

    async def mark(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Mark validated byte ranges."""
        await self._client().origin_mark(self.origin, ranges)

    async def mark_all(self) -> None:
        """Mark everything."""
        await self._client().origin_mark_all(self.origin)

    async def resize(self) -> None:
        """Begin a new generation that counts by the present size. Raises ``errors.Busy`` while a snapshot is held."""
        reason = "the size of the device changed"
        with await self._client().origin_reset(self.origin, str(uuid.uuid4()), reason) as maps:
            self.hold(maps)


def _devices(identity: Identity, placement: Placement) -> frozenset[Identity]:
    """Return the origin, the node, and what lies between."""
    numbers = set[int]()
    if placement.ublk_id >= 0:
        numbers.add(sysblock.ublk_number(placement.ublk_id))
    if placement.top:
        numbers.add(sysblock.dm_number(placement.top))
    if placement.insert:
        numbers.add(sysblock.dm_number(below_name(placement.insert)))
    return frozenset({identity, *(Identity(number, 0) for number in numbers if number)})
