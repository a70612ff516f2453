# SPDX-License-Identifier: GPL-2.0-or-later
"""One origin of the data path as a ``tracker.Tracker``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from urllib.parse import quote

from blksnap_service import sysblock
from blksnap_service.cbt import View
from blksnap_service.datapath.client import DatapathClient
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
        reset=reading.reset,
    )


class DatapathTracker:
    """Asks the data path every time; keeps the last reading, for properties."""

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
        self._note(reading)

    def _note(self, reading: OriginReading) -> TrackerReading:
        self.last = tracker_reading(reading)
        self.node = reading.node or nbd_uri(reading.nbd_socket)
        placement = Placement(reading.top, reading.insert, reading.ublk_id)
        if placement != self.placement:
            self.placement, self.devices = placement, _devices(self.identity, placement)
        return self.last

    def note_away(self, reason: str) -> None:
        """Note in the last reading that the data path cannot be asked."""
        self.last = replace(self.last, state="recovering", reason=reason)

    async def read(self) -> TrackerReading:
        """Make a reading. Raises ``errors.NotFound`` when the data path does not have the origin (any more)."""
        return self._note(await self._client().origin_info(self.origin))

    async def open_map(self, view: View) -> OpenMap:
        """Open a map: the memory file itself, read-only and sealed, with the reading from the same reply.

        The live map of a later window or generation is another file with another sequence: this one then stands still, and
        what is returned here stays true of it.
        """
        maps = await self._client().origin_maps(self.origin)
        with maps:
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
        """Go by the present size of the origin, which has grown: the generation goes on, and what is new is marked."""
        (await self._client().origin_resize(self.origin)).close()


def _devices(identity: Identity, placement: Placement) -> frozenset[Identity]:
    """Return the origin, the node, and what lies between."""
    numbers = set[int]()
    if placement.ublk_id >= 0:
        numbers.add(sysblock.ublk_number(placement.ublk_id))
    if placement.top:
        numbers.add(sysblock.dm_number(placement.top))
    if placement.insert:
        numbers.add(sysblock.dm_number(placement.insert))
        numbers.add(sysblock.dm_number(below_name(placement.insert)))
    return frozenset({identity, *(Identity(number, 0) for number in numbers if number)})
