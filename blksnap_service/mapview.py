# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading real maps fast: changed ranges, summaries for a picture, counts.

Functions over a buffer of map bytes, one per block. It may be a live map that the data path is writing: a byte then
counts as it was at some moment of the call, and the buffer must not be closed before the call returns. The rules are
those of `cbt`. Whether a number may be asked for at all is not decided here but by `cbt.Numbers.threshold`, before:
for an older number these functions report too much, for one never handed out nothing.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from blksnap_service.cbt import MAX_BYTE, InvalidMap, InvalidRange, Number, Numbers

MapBuffer = bytes | bytearray | memoryview | mmap.mmap
Ranges = NDArray[np.uint64]
"""Byte ranges, ascending, one per row: offset and length. Millions of them are one object, not one tuple each."""
_Bytes = NDArray[np.uint8]
_Blocks = NDArray[np.int64]

TILE: Final = 256 << 10
"""Blocks looked at in one step: the tile and its comparison stay in the processor's cache."""
FREQUENCY_CELLS: Final = 65_536
"""Resolution of a `FrequencyCounter`; its counters take 256 KiB."""
_WIDE_BIN: Final = 256
"""From this many blocks per bin on, counting bin by bin is faster than one pass that sums them all."""


class Mode(StrEnum):
    """What a summary says about each bin."""

    AGE = "age"
    DENSITY = "density"
    FREQUENCY = "frequency"


def changed_ranges(
    data: MapBuffer,
    base: int,
    since: int,
    block_size: int,
    capacity_bytes: int,
    offset: int = 0,
    max_ranges: int | None = None,
) -> tuple[Ranges, int]:
    """The bytes changed since a number, and the next offset: the numbers of `cbt.Reading.changed_ranges`.

    The array is new at each call and belongs to the caller. Not more of the map is read than the answer needs. Raises `InvalidRange` for an offset past the end or a
    `max_ranges` below 1, `InvalidMap` when the map is not that of the capacity.
    """
    blocks = _blocks_of(data)
    if len(blocks) != -(-capacity_bytes // block_size):
        raise InvalidMap(
            f"a map of {len(blocks)} blocks of {block_size} bytes is not of {capacity_bytes} bytes"
        )
    if not 0 <= offset <= capacity_bytes:
        raise InvalidRange(f"offset {offset} is past the end of the device ({capacity_bytes} bytes)")
    if max_ranges is not None and max_ranges < 1:
        raise InvalidRange("at least one range must be asked for")
    first = len(blocks) if offset == capacity_bytes else offset // block_size
    edges = _edges(blocks, first, _threshold(base, since), None if max_ranges is None else 2 * max_ranges)
    following = capacity_bytes
    if max_ranges is not None and len(edges) > 2 * max_ranges:
        following = int(edges[2 * max_ranges]) * block_size
        edges = edges[: 2 * max_ranges]
    # In place: most of the time goes into memory that is touched for the first time.
    edges *= block_size
    ranges = edges.reshape(-1, 2)
    if len(ranges):
        ranges[-1, 1] = min(ranges[-1, 1], capacity_bytes)
    ranges[:, 1] -= ranges[:, 0]
    return ranges.view(np.uint64), following


def summarize(
    data: MapBuffer,
    base: int,
    active: int,
    first_block: int,
    block_count: int,
    bins: int,
    mode: Mode,
    since: int = 0,
    frequency: FrequencyCounter | None = None,
) -> bytes:
    """One byte for each of `bins` equal parts of a window of the map; several bins may show one block.

    age: the newest change: 255 in the interval `active`, 254 in the one before, …, 1 long ago, 0 never.
    density: the share of blocks changed since `since`: 255 all, 1 or more any, 0 none.
    frequency: in how many of the takes that `frequency` has seen the bin had changed: 255 all, 1 or more any, 0 none.
    All zero without `frequency`. Raises `InvalidRange` for a window that is empty or not inside the map, and for no
    bins, `InvalidMap` for impossible numbers.
    """
    blocks = _blocks_of(data)
    if first_block < 0 or block_count < 1 or first_block + block_count > len(blocks):
        raise InvalidRange(
            f"{block_count} blocks at {first_block} do not lie inside the map of {len(blocks)}"
        )
    if bins < 1:
        raise InvalidRange("at least one bin must be asked for")
    newest = Numbers(base, Number(active)).byte_for_active
    if mode is Mode.FREQUENCY:
        return bytes(bins) if frequency is None else frequency.levels(first_block, block_count, bins)
    window = blocks[first_block : first_block + block_count]
    edges = _bin_edges(bins, block_count)
    if mode is Mode.AGE:
        return _age_levels(newest)[np.maximum.reduceat(window, edges)].tobytes()
    return _density(window, edges, _threshold(base, since))


def changed_since_counts(data: MapBuffer, base: int, active: int) -> dict[int, int]:
    """How many blocks have changed since each number that can be asked for: {number: blocks}.

    Raises `InvalidMap` for impossible numbers.
    """
    numbers = Numbers(base, Number(active))
    blocks = _blocks_of(data)
    histogram = np.zeros(MAX_BYTE + 1, np.int64)
    for start in range(0, len(blocks), TILE):
        tile = blocks[start : start + TILE]
        if tile.max():
            histogram += np.bincount(tile, minlength=MAX_BYTE + 1)
    above = histogram[::-1].cumsum()[::-1]  # above[byte]: blocks with this byte or a greater one
    return {since: int(above[since - base + 1]) for since in range(numbers.oldest, numbers.changes + 1)}


class FrequencyCounter:
    """How often each part of a device had changed when a snapshot was taken.

    The map itself forgets: it keeps only the last change of a block. Counts at a fixed resolution, so that a device
    of any size takes the same memory. Belongs to one number of blocks; a device that changes it needs a new counter.
    """

    def __init__(self, block_count: int) -> None:
        """Raises `InvalidRange` for a device without blocks."""
        if block_count < 1:
            raise InvalidRange("a device without blocks has no frequencies")
        self._block_count = block_count
        self._edges = _bin_edges(min(block_count, FREQUENCY_CELLS), block_count)
        self._counts = np.zeros(len(self._edges), np.uint32)
        self._takes = 0

    @property
    def takes(self) -> int:
        """How many takes have been counted."""
        return self._takes

    def add(self, taken: MapBuffer, base: int, number: int) -> None:
        """Count a take: its map, and its number with the base it counts from. Raises `InvalidMap` for another size."""
        blocks = len(_blocks_of(taken))
        if blocks != self._block_count:
            raise InvalidMap(f"the map has {blocks} blocks, the counter {self._block_count}")
        self.add_windows(lambda _start, _stop: contextlib.nullcontext(taken), base, number, blocks)

    def add_windows(
        self,
        window: Callable[[int, int], AbstractContextManager[MapBuffer]],
        base: int,
        number: int,
        window_blocks: int,
    ) -> None:
        """Count a take as `add` does, looking at one window of its map after the other, of at most `window_blocks` blocks.

        `window` opens the bytes of the blocks from a first one up to, not including, another. A window is larger only
        where a single cell is. What `window` raises is raised here, and the take is not counted.
        """
        hits = np.zeros(len(self._edges), np.bool_)
        # Cells differ by one block at most.
        widest = -(-self._block_count // len(hits))
        step = max(1, window_blocks // widest)
        if window_blocks >= self._block_count:
            step = len(hits)
        for first in range(0, len(hits), step):
            cells = self._edges[first : first + step]
            start = int(cells[0])
            stop = int(self._edges[first + step]) if first + step < len(hits) else self._block_count
            with window(start, stop) as part:
                newest = np.maximum.reduceat(_blocks_of(part), cells - start)
            hits[first : first + step] = newest == number - base
        self._takes += 1
        self._counts += hits

    def levels(self, first_block: int, block_count: int, bins: int) -> bytes:
        """The window in bins as `summarize` wants them: the most often changed cell under each."""
        if not self._takes:
            return bytes(bins)
        edges = first_block + _bin_edges(bins, block_count)
        ends = np.append(edges[1:], first_block + block_count)
        first_cell = np.searchsorted(self._edges, edges, side="right") - 1
        last_cell = np.searchsorted(self._edges, np.maximum(ends - 1, edges), side="right") - 1
        # A reduceat part ends before the next one starts, but neighbouring bins may share a cell.
        most = np.maximum.reduceat(self._counts[: last_cell[-1] + 1], first_cell)
        most = np.maximum(most, self._counts[last_cell])
        return _share(most, self._takes)


def _blocks_of(data: MapBuffer) -> _Bytes:
    return np.frombuffer(data, np.uint8)


def _threshold(base: int, since: int) -> int:
    """The byte above which a block counts as changed."""
    return min(max(since - base, 0), MAX_BYTE)


def _bin_edges(bins: int, block_count: int) -> _Blocks:
    """The first block of each bin; bins that share a block have the same."""
    return np.arange(bins, dtype=np.int64) * block_count // bins


def _edges(blocks: _Bytes, first: int, threshold: int, enough: int | None) -> _Blocks:
    """Where runs of changed blocks start and end, alternating; stops when more than `enough` are found."""
    found: list[_Blocks] = []
    count = 0
    quiet = True
    turns = np.zeros(TILE, np.bool_)  # of each block: whether it differs from the one before it
    for start in range(first, len(blocks), TILE):
        tile = blocks[start : start + TILE]
        inside = bool(count % 2)
        # The greatest byte is found faster than the changed ones, and quiet tiles come in rows.
        if quiet and not inside and int(tile.max()) <= threshold:
            continue
        changed = tile > threshold
        turns[0] = bool(changed[0]) != inside
        np.not_equal(changed[1:], changed[:-1], out=turns[1 : len(tile)])
        turns[len(tile) :] = False
        edges = _set_positions(turns) + start
        quiet = not len(edges)
        found.append(edges)
        count += len(edges)
        if enough is not None and count > enough:
            break
    if count % 2:
        found.append(np.array([len(blocks)], np.int64))
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _set_positions(flags: NDArray[np.bool_]) -> _Blocks:
    """As `np.flatnonzero`, but several times faster where few are set: looks at eight at a time first."""
    eights = flags.view(np.uint64)
    words = np.flatnonzero(eights != 0)
    # Positions in the words picked out, moved by how far each word was from where it stands among them.
    positions = np.flatnonzero(eights[words].view(np.bool_))
    words -= np.arange(len(words))
    words *= 8
    positions += words[positions >> 3]
    return positions


def _age_levels(newest: int) -> _Bytes:
    """The level of every byte, when `newest` is the byte of the interval being written."""
    levels = np.minimum(np.arange(MAX_BYTE + 1) + (MAX_BYTE - newest), MAX_BYTE).astype(np.uint8)
    levels[0] = 0
    return levels


def _density(window: _Bytes, edges: _Blocks, threshold: int) -> bytes:
    """The shares of changed blocks."""
    bins = len(edges)
    bounds = np.append(edges, len(window))
    widths = np.maximum(np.diff(bounds), 1)
    if len(window) < _WIDE_BIN * bins:
        return _share(np.add.reduceat(window > threshold, edges, dtype=np.int64), widths)
    counts = np.zeros(bins, np.int64)
    limits = bounds.tolist()
    step = max(1, TILE * bins // len(window))
    for first in range(0, bins, step):
        last = min(first + step, bins)
        start = limits[first]
        changed = window[start : limits[last]] > threshold
        if changed.any():
            for bin_ in range(first, last):
                counts[bin_] = np.count_nonzero(changed[limits[bin_] - start : limits[bin_ + 1] - start])
    return _share(counts, widths)


def _share(counts: NDArray[np.int64] | NDArray[np.uint32], wholes: _Blocks | int) -> bytes:
    """Shares as levels: 255 only for all, 0 only for none."""
    levels: _Blocks = np.maximum(counts.astype(np.int64) * MAX_BYTE // wholes, counts > 0)
    return levels.astype(np.uint8).tobytes()
