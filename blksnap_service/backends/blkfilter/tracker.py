# SPDX-License-Identifier: GPL-2.0-or-later
"""One device with the kernel filter as a ``tracker.Tracker``.

The kernel's map changes at a take only (and where something is marked, or an image is written to): both views are that map,
and what it says is as of the last snapshot. What was written since is told by the device's own statistics.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

from blksnap_service import errors, sysblock
from blksnap_service.backends.blkfilter import mapfile
from blksnap_service.backends.blkfilter.kernel import FilteredDevice
from blksnap_service.backends.blkfilter.mapfile import ReadMap, UntrustedMap
from blksnap_service.backends.blkfilter.threads import to_the_end
from blksnap_service.backends.blkfilter.uapi import CbtInfo
from blksnap_service.cbt import View
from blksnap_service.tracker import NOWHERE, OpenMap, TrackerReading

NAME: Final = "blkfilter"
COUNTED: Final = ("writes", "written_bytes", "discards", "discarded_bytes")


class FilterTracker:
    """Asks the kernel every time; keeps the last reading, for properties."""

    backend = NAME
    map_is_live = False
    placement = NOWHERE

    def __init__(self, device: FilteredDevice, origin: str, reading: TrackerReading) -> None:
        """Speak for ``device``; ``reading`` is what ``first_reading`` gave."""
        self.device = device
        self.origin = origin
        self.node = device.target.path
        self.identity = device.target.identity
        self.devices = frozenset({self.identity})
        self.last = reading
        self._marks = 0
        self._baseline: tuple[int, ...] | None = None
        self._baseline_of = ("", 0)
        self._read_map: ReadMap | None = None
        self._sequence = 0
        self._lock = asyncio.Lock()

    def close(self) -> None:
        """Let go of the map that was read last."""
        if self._read_map is not None:
            self._read_map.fd.close()
            self._read_map = None

    def note_away(self, reason: str) -> None:
        """Do nothing: the kernel is never away."""
        del reason

    async def read(self) -> TrackerReading:
        """Make a reading. Raises ``errors.NotFound`` when the device has no filter of blksnap (any more)."""
        info, reason = await asyncio.to_thread(look, self.device)
        self.last = reading_of(info, reason, self._counters(info))
        return self.last

    async def open_map(self, view: View) -> OpenMap:
        """Open the map of the last take, whichever view is asked for.

        Raises ``errors.GenerationChanged`` when it cannot be trusted: after a take there is another one.
        """
        del view
        async with self._lock:
            try:
                before = self._read_map
                now = await to_the_end(lambda: mapfile.read(self.device, before), self._drop_unused)
            except UntrustedMap as error:
                _, reason = await asyncio.to_thread(look, self.device)
                raise errors.GenerationChanged(
                    f"the map of {self.node} cannot be trusted ({reason or _MISSED}): take a snapshot, and copy everything"
                    " of it"
                ) from error
            if now is not self._read_map:
                self.close()
                self._read_map = now
                self._sequence += 1
            # Not noted: what is different from the last reading is for the registry to find, and to tell.
            reading = reading_of(now.info, self.last.reason, self._counters(now.info))
            return OpenMap(reading, View.TAKEN, 0, self._sequence, now.fd.dup())

    def _drop_unused(self, made: ReadMap) -> None:
        if made is not self._read_map:
            made.fd.close()

    async def mark(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Mark validated byte ranges. Raises ``errors.InvalidState`` when the kernel does not trust its map."""
        await asyncio.to_thread(self._mark, ranges)

    async def mark_all(self) -> None:
        """Mark everything. Raises as ``mark``."""
        info = await asyncio.to_thread(self.device.info)
        await asyncio.to_thread(self._mark, [(0, info.capacity)])

    def _mark(self, ranges: Sequence[tuple[int, int]]) -> None:
        for offset, length in ranges:
            self.device.mark(offset, length)
            self._marks += 1

    async def resize(self) -> None:
        """Raise that it cannot: the kernel makes a map for the new size at the next take, and begins a generation."""
        raise errors.InvalidState(
            f"the kernel filter on {self.node} goes by its new size from the next snapshot on, with a new history"
        )

    def begin_interval(self, written: tuple[int, ...] | None, taken: CbtInfo) -> None:
        """Count what is written from a take on; ``written`` is what ``written_now`` gave before it."""
        self._baseline = written
        self._baseline_of = (taken.generation, taken.changes)

    def written_now(self) -> tuple[int, ...] | None:
        """What the device counts; None when it does not. Blocks shortly."""
        try:
            return sysblock.written(self.identity.device)
        except (OSError, ValueError):
            return None

    def _counters(self, info: CbtInfo) -> Mapping[str, int]:
        now = self.written_now()
        counters = {"marks": self._marks}
        # Where nobody knows what there was at the last take (another program took it) nothing is said.
        is_ours = self._baseline_of == (info.generation, info.changes)
        if is_ours and now is not None and self._baseline is not None:
            since = (f"{name}_since_take" for name in COUNTED)
            counters |= zip(
                since, (max(0, b - a) for a, b in zip(self._baseline, now, strict=True)), strict=True
            )
        return counters


_MISSED: Final = "the kernel missed writes"


def look(device: FilteredDevice) -> tuple[CbtInfo, str]:
    """What map there is and what is wrong with it, or nothing. Blocks. Raises as ``FilteredDevice.info``."""
    info, trusted = mapfile.consistent_info(device)
    if not device.is_same():
        reason = (
            "another medium is in it, which the kernel filter does not notice: detach and attach it again"
        )
    elif (size := device.size()) != info.capacity:
        reason = (
            f"its size changed from {info.capacity} to {size} bytes: the next snapshot begins a new history, and one that is"
            " held may have lost writes"
        )
    elif sysblock.partitions(device.target.identity.device):
        reason = "it has partitions now, and writes to those are not seen: detach it and attach them"
    elif not trusted:
        reason = (
            f"{_MISSED}: the next snapshot begins a new history, and one that is held may have lost writes"
        )
    else:
        reason = ""
    return info, reason


def reading_of(info: CbtInfo, reason: str, counters: Mapping[str, int] | None = None) -> TrackerReading:
    """Put what the kernel says into the service's terms."""
    return TrackerReading(
        state="broken" if reason else "tracking",
        reason=reason,
        capacity=info.capacity,
        block_size=info.block_size,
        block_count=info.block_count,
        generation=info.generation,
        base=0,
        active=info.changes + 1,
        oldest=0,
        clients=0,
        snapshots=(),
        counters=counters or {},
    )
