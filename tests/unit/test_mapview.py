# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast readers of maps against the slow rules and against counting by hand."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from blksnap_service import mapview
from blksnap_service.cbt import GenerationId, Geometry, InvalidMap, InvalidRange, Number, Numbers, Reading
from blksnap_service.mapview import (
    FrequencyCounter,
    Mode,
    Ranges,
    changed_ranges,
    changed_since_counts,
    summarize,
)
from tests.unit.effort import instructions_at_most

BLOCK = 4096

maps = st.lists(
    st.tuples(st.integers(0, 6) | st.integers(0, 255), st.integers(1, 9) | st.integers(1, 200)),
    min_size=1,
    max_size=25,
).map(lambda runs: b"".join(bytes([byte]) * length for byte, length in runs))
"""Maps as they are: runs of equal bytes."""


def pairs(ranges: Ranges) -> list[tuple[int, int]]:
    """Ranges as the reference has them."""
    assert ranges.dtype == np.uint64
    assert ranges.shape[1:] == (2,)
    return [(offset, length) for offset, length in ranges.tolist()]


def levels(share: float) -> int:
    """A share as `summarize` shows it."""
    return max(int(share > 0), int(share * 255 + 1e-9))


@given(
    maps,
    st.integers(0, 254),
    st.integers(1, BLOCK),
    st.integers(0, 300),
    st.integers(1, 40),
    st.sampled_from([8, 64]),
)
def test_ranges_are_those_of_the_rules(
    data: bytes, since: int, tail: int, offset: int, page: int, tile: int
) -> None:
    """Any map, number, offset, page and tile size: the same ranges and next offset as the reference gives."""
    capacity = (len(data) - 1) * BLOCK + tail
    reading = Reading(GenerationId("1"), Geometry(capacity, BLOCK), Numbers(0, Number(255)), data)
    start = min(offset * BLOCK // 3, capacity)
    with mock.patch.object(mapview, "TILE", tile):
        for limit in (None, page):
            expected = reading.changed_ranges(since, start, limit)
            found, following = changed_ranges(data, 0, since, BLOCK, capacity, start, limit)
            assert (pairs(found), following) == expected


@example(b"\0\1\2", 128, -1)
@example(b"\0\1\xff", 128, 256)
@given(maps, st.sampled_from([128, 256, 1 << 20]), st.integers(-3, 400))
def test_ranges_count_from_the_base(data: bytes, base: int, since: int) -> None:
    """With a base, a number is compared as base plus byte; below the base it reports every change."""
    found, _ = changed_ranges(data, base, base + since, 1 << 16, len(data) << 16)
    blocks = [
        block for offset, length in pairs(found) for block in range(offset >> 16, (offset + length) >> 16)
    ]
    assert blocks == [block for block, byte in enumerate(data) if byte and byte > since]


def test_a_run_across_many_tiles_is_one_range() -> None:
    """Tiles leave no seams, whether a run begins, ends or passes at their border."""
    tile = mapview.TILE
    data = bytearray(5 * tile + 3)
    data[tile : 4 * tile] = b"\1" * (3 * tile)
    data[5 * tile :] = b"\1\1\1"
    size = len(data) * BLOCK
    expected = [(tile * BLOCK, 3 * tile * BLOCK), (5 * tile * BLOCK, 3 * BLOCK)]
    found, following = changed_ranges(data, 0, 0, BLOCK, size)
    assert (pairs(found), following) == (expected, size)
    found, following = changed_ranges(data, 0, 0, BLOCK, size, 0, 1)
    assert (pairs(found), following) == (expected[:1], 5 * tile * BLOCK)


def test_no_more_is_read_than_a_page_needs() -> None:
    """A few ranges of a long map are found without going through all of it."""
    data = bytes([0, 1]) * (4 << 20)

    def seconds(limit: int) -> float:
        start = time.process_time()
        found, following = changed_ranges(data, 0, 0, BLOCK, len(data) * BLOCK, 0, limit)
        assert (len(found), following) == (limit, (2 * limit + 1) * BLOCK)
        return time.process_time() - start

    assert min(seconds(10) for _ in range(3)) * 5 < seconds(4_000_000)


@pytest.mark.parametrize("offset, limit", [(-1, None), (8 * BLOCK + 1, None), (0, 0), (0, -1)])
def test_a_query_outside_the_device_is_refused(offset: int, limit: int | None) -> None:
    """The caller's mistakes are those that the reference refuses."""
    with pytest.raises(InvalidRange):
        changed_ranges(bytes(8), 0, 0, BLOCK, 8 * BLOCK, offset, limit)


@pytest.mark.parametrize("capacity", [7 * BLOCK, 8 * BLOCK + 1, 0])
def test_a_map_of_another_device_is_refused(capacity: int) -> None:
    """A map too short or too long for the capacity would give wrong offsets."""
    with pytest.raises(InvalidMap, match="a map of 8 blocks of 4096 bytes is not of"):
        changed_ranges(bytes(8), 0, 0, BLOCK, capacity)


def bins_of(window: bytes, bins: int) -> list[bytes]:
    """What each bin shows: its blocks, or the one block that it shares."""
    edges = [index * len(window) // bins for index in range(bins + 1)]
    return [window[start : max(start + 1, end)] for start, end in itertools.pairwise(edges)]


windows = st.tuples(maps, st.integers(0, 100), st.integers(1, 2000), st.integers(1, 700))


def window_of(data: bytes, first: int, count: int) -> tuple[int, int]:
    """Some window inside the map, made of any two numbers."""
    first %= len(data)
    return first, min(count, len(data) - first)


@given(windows, st.integers(1, 255))
def test_age_is_the_newest_change_in_each_bin(window: tuple[bytes, int, int, int], newest: int) -> None:
    """255 for the present interval, one less for each before, never below 1, 0 for no change."""
    data, first, count, bins = window
    data = bytes(min(byte, newest) for byte in data)
    first, count = window_of(data, first, count)
    expected = [
        max(1, 255 - newest + max(blocks)) if max(blocks) else 0
        for blocks in bins_of(data[first : first + count], bins)
    ]
    assert list(summarize(data, 0, newest, first, count, bins, Mode.AGE)) == expected


def test_age_of_a_byte_newer_than_the_numbers_is_the_newest() -> None:
    """A take between reading the numbers and reading a live map is no reason to wrap around."""
    assert summarize(b"\5\4\3\0", 0, 4, 0, 4, 4, Mode.AGE) == bytes([255, 255, 254, 0])


@given(windows, st.integers(0, 256), st.sampled_from([2, 1 << 30]), st.sampled_from([8, 1 << 18]))
def test_density_is_the_share_of_changed_blocks(
    window: tuple[bytes, int, int, int], since: int, wide: int, tile: int
) -> None:
    """Rounded down, but never to 0 where anything changed; the same by both ways of counting."""
    data, first, count, bins = window
    first, count = window_of(data, first, count)
    expected = [
        levels(sum(byte > since for byte in blocks) / len(blocks))
        for blocks in bins_of(data[first : first + count], bins)
    ]
    with mock.patch.object(mapview, "_WIDE_BIN", wide), mock.patch.object(mapview, "TILE", tile):
        assert list(summarize(data, 128, 383, first, count, bins, Mode.DENSITY, 128 + since)) == expected


changed_blocks = st.sets(st.integers(0, 29), max_size=6)


@given(
    st.lists(changed_blocks, max_size=6),
    st.integers(1, 40),
    st.integers(0, 29),
    st.integers(1, 30),
    st.integers(1, 70),
)
def test_frequency_counts_the_takes_a_block_changed_before(
    takes: list[set[int]], cells: int, first: int, count: int, bins: int
) -> None:
    """A bin shows the most often changed of the cells it touches, as a share of all takes."""
    first, count = window_of(bytes(30), first, count)
    with mock.patch.object(mapview, "FREQUENCY_CELLS", cells):
        counter = FrequencyCounter(30)
    for number, take in enumerate(takes, 1):
        counter.add(bytes(number if block in take else 0 for block in range(30)), 0, number)
    assert counter.takes == len(takes)

    cells = min(cells, 30)
    cell_of = [max(cell for cell in range(cells) if cell * 30 // cells <= block) for block in range(30)]
    counts = [sum(any(cell_of[block] == cell for block in take) for take in takes) for cell in range(cells)]
    expected = [
        levels(max(counts[cell_of[block]] for block in blocks) / max(1, len(takes)))
        for blocks in bins_of(bytes(range(30))[first : first + count], bins)
    ]
    assert list(summarize(bytes(30), 0, 1, first, count, bins, Mode.FREQUENCY, 0, counter)) == expected


@given(maps, st.integers(1, 40), st.integers(1, 60))
def test_frequency_is_the_same_through_any_window(data: bytes, cells: int, window_blocks: int) -> None:
    """Windows cover the map once, in order, and none is larger than asked for unless one cell is."""
    with mock.patch.object(mapview, "FREQUENCY_CELLS", cells):
        whole, parts = FrequencyCounter(len(data)), FrequencyCounter(len(data))
    seen: list[tuple[int, int]] = []

    def window(start: int, stop: int) -> AbstractContextManager[bytes]:
        seen.append((start, stop))
        return contextlib.nullcontext(data[start:stop])

    for number in (1, 3):
        seen.clear()
        whole.add(data, 0, number)
        parts.add_windows(window, 0, number, window_blocks)
        assert [start for start, _ in seen] == [0, *(stop for _, stop in seen[:-1])]
        assert seen[-1][1] == len(data)
        widest = -(-len(data) // min(len(data), cells))
        assert max(stop - start for start, stop in seen) <= max(window_blocks, widest)
    assert parts.takes == 2
    assert parts._counts.tolist() == whole._counts.tolist()


def test_a_take_that_cannot_be_read_is_not_counted() -> None:
    """Not even in part: shares of it would be wrong."""
    with mock.patch.object(mapview, "FREQUENCY_CELLS", 4):
        counter = FrequencyCounter(8)

    @contextlib.contextmanager
    def window(start: int, stop: int) -> Iterator[bytes]:
        if start:
            raise OSError(5, "gone")
        yield b"\1" * (stop - start)

    with pytest.raises(OSError, match="gone"):
        counter.add_windows(window, 0, 1, 4)
    assert (counter.takes, counter._counts.tolist()) == (0, [0, 0, 0, 0])


def test_frequency_of_neighbours_in_one_cell_is_the_same() -> None:
    """A cell that two bins share shows in both; a cell outside the window in none."""
    with mock.patch.object(mapview, "FREQUENCY_CELLS", 3):
        counter = FrequencyCounter(9)
    counter.add(bytes([0, 0, 0, 1, 0, 0, 0, 0, 0]), 0, 1)
    assert counter.levels(0, 9, 2) == bytes([255, 255])
    assert counter.levels(0, 3, 1) == counter.levels(6, 3, 1) == bytes([0])
    assert counter.levels(2, 2, 1) == counter.levels(5, 1, 1) == bytes([255])


def test_density_of_one_block_in_thousands_is_not_nothing() -> None:
    """The smallest share is still seen, and the largest but one is not called all."""
    data = b"\1" + bytes(9_999)
    assert summarize(data, 0, 1, 0, 10_000, 1, Mode.DENSITY) == b"\1"
    assert summarize(bytes(1) + b"\1" * 9_999, 0, 1, 0, 10_000, 1, Mode.DENSITY) == b"\xfe"


def test_frequency_counts_only_the_interval_just_taken() -> None:
    """What changed before stays in the map but counts once; the base is taken off the number."""
    counter = FrequencyCounter(4)
    counter.add(bytes([0, 126, 127, 0]), 128, 255)
    counter.add(bytes([0, 128, 127, 128]), 128, 256)
    assert counter.levels(0, 4, 4) == bytes([0, 127, 127, 127])


def test_frequency_of_nothing_is_zero() -> None:
    """Without a counter, or before the first take, no bin has ever changed."""
    assert summarize(b"\1\1", 0, 1, 0, 2, 3, Mode.FREQUENCY) == bytes(3)
    assert summarize(b"\1\1", 0, 1, 0, 2, 3, Mode.FREQUENCY, 0, FrequencyCounter(2)) == bytes(3)


def test_frequency_takes_bounded_memory() -> None:
    """A large device has no more counters than a picture can use."""
    counter = FrequencyCounter(10 * mapview.FREQUENCY_CELLS + 7)
    assert counter._counts.nbytes == 4 * mapview.FREQUENCY_CELLS


def test_a_counter_refuses_the_map_of_another_size() -> None:
    """Counts of one geometry mean nothing in another."""
    with pytest.raises(InvalidMap, match="the map has 3 blocks, the counter 4"):
        FrequencyCounter(4).add(bytes(3), 0, 1)
    with pytest.raises(InvalidRange):
        FrequencyCounter(0)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(
    "first, count, bins", [(-1, 1, 1), (0, 0, 1), (0, 9, 1), (8, 1, 1), (0, 8, 0), (1 << 70, 1, 1)]
)
def test_a_window_outside_the_map_is_refused(mode: Mode, first: int, count: int, bins: int) -> None:
    """An empty window, one that leaves the map, and no bins: in every mode the same error."""
    with pytest.raises(InvalidRange):
        summarize(bytes(8), 0, 1, first, count, bins, mode, 0, FrequencyCounter(8))


@given(
    maps, st.sampled_from([(0, 1), (0, 255), (0, 7), (128, 256), (256, 511)]), st.sampled_from([8, 1 << 18])
)
def test_counts_are_those_of_the_rules(data: bytes, numbers: tuple[int, int], tile: int) -> None:
    """For every number that can be asked for, as many blocks as the reference lists."""
    base, active = numbers
    data = bytes(min(byte, active - base) for byte in data)
    geometry = Geometry(len(data) * BLOCK, BLOCK)
    reading = Reading(GenerationId("1"), geometry, Numbers(base, Number(active)), data)
    with mock.patch.object(mapview, "TILE", tile):
        counts = changed_since_counts(data, base, active)
    possible = range(reading.numbers.oldest, active)
    assert counts == {since: len(reading.changed_blocks(since)) for since in possible}


def test_a_shared_memory_file_is_read_as_it_is() -> None:
    """A live map comes as a read-only mapping; it can be unmapped as soon as the call has returned."""
    fd = os.memfd_create("map")
    try:
        os.write(fd, bytes(3) + b"\2\2")
        with mmap.mmap(fd, 5, prot=mmap.PROT_READ) as mapped:
            found, following = changed_ranges(mapped, 0, 1, BLOCK, 5 * BLOCK)
            assert (pairs(found), following) == ([(3 * BLOCK, 2 * BLOCK)], 5 * BLOCK)
            assert summarize(mapped, 0, 2, 0, 5, 5, Mode.AGE) == bytes([0, 0, 0, 255, 255])
            assert changed_since_counts(mapped, 0, 2) == {0: 2, 1: 2}
            FrequencyCounter(5).add(mapped, 0, 2)
    finally:
        os.close(fd)


def test_sixty_four_mi_blocks_are_not_looked_at_one_by_one() -> None:
    """A quiet map goes at gigabytes per second: a loop over blocks that crept in would take a hundred times as long."""
    data = bytearray(64 << 20)
    for block in range(0, len(data), 64_007):
        data[block] = 1
    with instructions_at_most(len(data) // 100):
        found, _ = changed_ranges(data, 0, 0, BLOCK, len(data) * BLOCK)
    assert len(found) == -(-len(data) // 64_007)
