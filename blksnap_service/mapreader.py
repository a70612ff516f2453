# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers questions about a tracker's map: part of it, changed ranges, summaries, counts.

Puts together a ``tracker.Tracker`` (which map, what its bytes mean) and ``mapview`` (what they say). Scans run in threads
and look at maps through windows: a map of a gigabyte does not become resident here. Numbers are checked before
anything is read. It keeps only what a map forgets: how often things changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from blksnap_service import cbt, errors, mapview
from blksnap_service.cbt import Number, Numbers, View
from blksnap_service.mapview import FrequencyCounter, Mode, Ranges
from blksnap_service.tracker import OpenMap, Tracker, TrackerReading

WINDOW_BLOCKS = 1 << 20
MAX_READ_BYTES = 1 << 20
"""Most of a map in one message; dbus-daemon throws off who sends too much, and text clients are slow."""
MAX_BINS = 1 << 20
MAX_RANGES = 65_536
_SEQUENCE_SHIFT = 48


@dataclass(frozen=True, slots=True)
class Counted:
    """A reading and how many blocks changed since each number that can be asked for."""

    reading: TrackerReading
    changed: dict[int, int]


class MapReader:
    """Reads the maps of one tracker. All methods raise ``errors.BlksnapError``."""

    def __init__(self, tracker: Tracker) -> None:
        """Read the maps of ``tracker``."""
        self._tracker = tracker
        self._frequency: FrequencyCounter | None = None
        self._frequency_blocks = 0

    async def read(self, view: View, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of a map from block ``offset`` on. Raises ``errors.InvalidArgument``."""
        if length > MAX_READ_BYTES:
            raise errors.InvalidArgument(
                f"{length} bytes are more than {MAX_READ_BYTES}: read in parts, or use OpenMap"
            )
        opened = await self._tracker.open_map(view)
        with opened.fd:
            count = opened.reading.block_count
            if offset + length > count:
                raise errors.InvalidArgument(f"{length} bytes at {offset} are not inside the map of {count}")
            return await asyncio.to_thread(_part, opened, offset, length)

    async def changed_ranges(
        self, view: View, since: int, offset: int, most: int, generation: str = ""
    ) -> tuple[Ranges, int]:
        """Return byte ranges changed since a number, from byte ``offset`` on, and where to go on (the capacity: nowhere).

        At most ``most`` ranges, and at most ``MAX_RANGES``. Raises ``errors.GenerationChanged`` when the generation is not
        ``generation`` or the number is older than it remembers; ``errors.InvalidArgument``.
        """
        if view is View.LIVE and not self._tracker.map_is_live:
            # What it would say is the last take's: that nothing has changed since.
            raise errors.NotSupported(
                f"{self._tracker.node} shows changes only as of the last snapshot: ask for the view taken, or take one"
            )
        opened = await self._tracker.open_map(view)
        with opened.fd:
            reading = opened.reading
            if generation and generation != reading.generation:
                raise errors.GenerationChanged(
                    f"the generation is {reading.generation} now, not {generation}: a full copy is needed"
                )
            _threshold(opened, since)
            if most < 1 or offset > reading.capacity:
                raise errors.InvalidArgument(
                    f"max must be at least 1 and offset at most the capacity, {reading.capacity} bytes"
                )
            return await asyncio.to_thread(_ranges, opened, since, offset, min(most, MAX_RANGES))

    async def summarize(
        self, view: View, first: int, count: int, bins: int, mode: Mode, since: int
    ) -> tuple[bytes, int]:
        """Fold ``count`` blocks from ``first`` on into ``bins`` bytes; with a number that rises when the map changes."""
        if bins > MAX_BINS:
            raise errors.InvalidArgument(f"{bins} bins are more than {MAX_BINS}")
        opened = await self._tracker.open_map(view)
        with opened.fd:
            if mode is Mode.DENSITY:
                _threshold(opened, since)
            if count < 1 or bins < 1 or first + count > opened.reading.block_count:
                raise errors.InvalidArgument(
                    f"{count} blocks at {first} in {bins} bins are not inside the map of"
                    f" {opened.reading.block_count} blocks"
                )
            frequency = self._frequency
            levels = await asyncio.to_thread(_summary, opened, first, count, bins, mode, since, frequency)
            return levels, _sequence(opened)

    async def count(self) -> Counted:
        """Return a reading with the number of blocks changed since each number, from the live map.

        Without one, how many changed since the last take is not known and not said.
        """
        opened = await self._tracker.open_map(View.LIVE)
        with opened.fd:
            changed = await asyncio.to_thread(_counts, opened)
            if opened.view is View.TAKEN:
                del changed[opened.reading.changes]
            return Counted(opened.reading, changed)

    async def note_take(self) -> None:
        """Count the last take for ``Mode.FREQUENCY``."""
        opened = await self._tracker.open_map(View.TAKEN)
        with opened.fd:
            count = opened.reading.block_count
            if self._frequency is None or self._frequency_blocks != count:
                self._frequency, self._frequency_blocks = FrequencyCounter(count), count
            if opened.reading.changes:
                await asyncio.to_thread(_add_take, self._frequency, opened)


def _threshold(opened: OpenMap, since: int) -> None:
    """Check that a number may be asked for. Raises ``errors.GenerationChanged``."""
    try:
        Numbers(opened.base, Number(opened.reading.active)).threshold(since)
    except cbt.GenerationChanged as error:
        raise errors.GenerationChanged(str(error)) from error
    except cbt.CbtError as error:
        raise errors.Corrupted(f"the numbers of the map do not fit together: {error}") from error


def _part(opened: OpenMap, offset: int, length: int) -> bytes:
    data = os.pread(opened.fd.fileno(), length, offset)
    if len(data) != length:
        raise _too_short(opened)
    return data


@contextlib.contextmanager
def _window(opened: OpenMap, start: int, stop: int) -> Iterator[memoryview]:
    """Map the bytes of blocks ``start`` to ``stop`` into memory. Raises ``errors.Corrupted`` when the map is shorter."""
    # The memory file is sealed against shrinking: what is inside now stays inside, no access can fail.
    if os.fstat(opened.fd.fileno()).st_size < stop:
        raise _too_short(opened)
    aligned = start - start % mmap.ALLOCATIONGRANULARITY
    whole = mmap.mmap(opened.fd.fileno(), stop - aligned, prot=mmap.PROT_READ, offset=aligned)
    # On an error its traceback still holds arrays over the window, and with them the window.
    with (
        contextlib.suppress(BufferError),
        whole,
        memoryview(whole) as view,
        view[start - aligned :] as window,
    ):
        yield window


def _too_short(opened: OpenMap) -> errors.Corrupted:
    return errors.Corrupted(f"the map has not the {opened.reading.block_count} blocks it should have")


def _ranges(opened: OpenMap, since: int, offset: int, most: int) -> tuple[Ranges, int]:
    """The rule of ``mapview.changed_ranges``, window by window; a range over a border of windows is one range."""
    reading = opened.reading
    size, capacity, count = reading.block_size, reading.capacity, reading.block_count
    found = [np.empty((0, 2), np.uint64)]
    room = most
    start = min(offset // size, count) if offset < capacity else count
    while start < count:
        stop = min(start + WINDOW_BLOCKS, count)
        begin, end = start * size, min(stop * size, capacity)
        # One more than wanted: the first may turn out to continue the last one of the window before.
        with _window(opened, start, stop) as window:
            ranges, following = mapview.changed_ranges(
                window, opened.base, since, size, end - begin, 0, room + 1
            )
        ranges[:, 0] += np.uint64(begin)
        if len(ranges) and room < most and found[-1][-1].sum() == ranges[0, 0]:
            found[-1][-1, 1] += ranges[0, 1]
            ranges = ranges[1:]
        if len(ranges) > room:
            return np.concatenate([*found, ranges[:room]]), int(ranges[room, 0])
        if len(ranges):
            found.append(ranges)
            room -= len(ranges)
        start = stop if following == end - begin else (begin + following) // size
    return np.concatenate(found), capacity


def _summary(
    opened: OpenMap,
    first: int,
    count: int,
    bins: int,
    mode: Mode,
    since: int,
    frequency: FrequencyCounter | None,
) -> bytes:
    if mode is Mode.FREQUENCY:
        return bytes(bins) if frequency is None else frequency.levels(first, count, bins)
    # Bins are cut by one division over the whole; it comes out the same in parts that hold whole bins and whole blocks.
    parts = math.gcd(count, bins)
    step = max(1, WINDOW_BLOCKS * parts // count)
    levels = bytearray()
    for part in range(0, parts, step):
        size = min(step, parts - part)
        blocks = size * count // parts
        start = first + part * count // parts
        with _window(opened, start, start + blocks) as window:
            levels += mapview.summarize(
                window, opened.base, opened.reading.active, 0, blocks, size * bins // parts, mode, since
            )
    return bytes(levels)


def _counts(opened: OpenMap) -> dict[int, int]:
    total: Counter[int] = Counter()
    for start in range(0, opened.reading.block_count, WINDOW_BLOCKS):
        stop = min(start + WINDOW_BLOCKS, opened.reading.block_count)
        with _window(opened, start, stop) as window:
            total.update(mapview.changed_since_counts(window, opened.base, opened.reading.active))
    return dict(total)


def _add_take(frequency: FrequencyCounter, opened: OpenMap) -> None:
    frequency.add_windows(
        lambda start, stop: _window(opened, start, stop), opened.base, opened.reading.changes, WINDOW_BLOCKS
    )


def _sequence(opened: OpenMap) -> int:
    """A number that rises whenever the map may have changed: what was written, in which memory file."""
    counters = opened.reading.counters
    kinds = (
        ("marks",) if opened.view is View.TAKEN else ("writes", "zeroes", "discards", "image_writes", "marks")
    )
    events = sum(counters.get(kind, 0) for kind in kinds) + opened.reading.active
    return (opened.sequence << _SEQUENCE_SHIFT) + events
