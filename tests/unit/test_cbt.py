# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of the change map, one by one."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from blksnap_service import cbt, changemap
from blksnap_service.cbt import (
    GenerationChanged,
    GenerationId,
    Geometry,
    InvalidMap,
    InvalidRange,
    InvalidSize,
    Number,
    Numbers,
    Range,
    Reading,
    ResetReason,
    View,
    slide,
)
from blksnap_service.changemap import ChangeMap

KIB, GIB = 1 << 10, 1 << 30
G1, G2 = GenerationId("1"), GenerationId("2")


@pytest.mark.parametrize(
    "gib, block_kib, count",
    [
        (1, 64, 16_384),
        (128, 64, 2_097_152),
        (129, 128, 1_056_768),
        (256, 128, 2_097_152),
        (512, 256, 2_097_152),
        (1 << 10, 512, 2_097_152),
        (4 << 10, 2 << 10, 2_097_152),
        (16 << 10, 8 << 10, 2_097_152),
        (64 << 10, 32 << 10, 2_097_152),
        (128 << 10, 64 << 10, 2_097_152),
        (256 << 10, 64 << 10, 4_194_304),
        (1 << 20, 64 << 10, 16_777_216),
    ],
)
def test_the_block_size_follows_the_table(gib: int, block_kib: int, count: int) -> None:
    """The rule gives the sizes that the kernel filter gives."""
    geometry = Geometry.of(gib * GIB)
    assert (geometry.block_size, geometry.block_count) == (block_kib * KIB, count)


@given(st.integers(1, cbt.MAX_BLOCKS * cbt.MAX_BLOCK_SIZE))
def test_the_rule_stops_doubling_as_soon_as_it_may(size: int) -> None:
    """The block size is the smallest of 64 KiB, 128 KiB … 64 MiB with a comfortable count, else 64 MiB."""
    geometry = Geometry.of(size)
    sizes = [64 * KIB << step for step in range(11)]
    fitting = [each for each in sizes if -(-size // each) <= 2_097_152]
    assert geometry.block_size == min(fitting, default=sizes[-1])
    assert (
        (geometry.block_count - 1) * geometry.block_size < size <= geometry.block_count * geometry.block_size
    )


@pytest.mark.parametrize("requested", [4 * KIB << step for step in range(15)])
def test_every_power_of_two_can_be_requested(requested: int) -> None:
    """4 KiB to 64 MiB are taken as they are."""
    assert Geometry.of(GIB, requested).block_size == requested


@pytest.mark.parametrize("requested", [1, 512, 2 * KIB, 4 * KIB + 1, 96 * KIB, 128 << 20, 1 << 32, -4096])
def test_other_block_sizes_are_refused(requested: int) -> None:
    """No power of two, or outside 4 KiB to 64 MiB: an error that says which are possible."""
    with pytest.raises(InvalidSize, match="no power of two from 4096 to 67108864"):
        Geometry.of(GIB, requested)


@pytest.mark.parametrize("size", [0, -1, 1 << 63])
def test_impossible_sizes_are_refused(size: int) -> None:
    """Nothing, less than nothing, and more than an off_t can say."""
    with pytest.raises(InvalidSize, match=f"a size of {size} bytes"):
        Geometry.of(size)


def test_a_map_above_a_gibibyte_is_refused() -> None:
    """A sparse file that claims exbibytes must not take the machine's memory for its map."""
    assert Geometry.of(cbt.MAX_BLOCKS * 4 * KIB, 4 * KIB).block_count == cbt.MAX_BLOCKS
    with pytest.raises(InvalidSize, match="choose a larger block size"):
        Geometry.of(cbt.MAX_BLOCKS * 4 * KIB + 1, 4 * KIB)
    with pytest.raises(InvalidSize, match="137438953472 blocks"):
        Geometry.of(cbt.MAX_SIZE)


@given(st.integers(1, 100_000), st.integers(-9_000, 110_000), st.integers(0, 110_000))
def test_blocks_are_those_that_the_bytes_touch(size: int, offset: int, length: int) -> None:
    """A range of bytes is widened to whole blocks and clipped to the device, at both ends."""
    geometry = Geometry.of(size, 4096)
    touched = {position // 4096 for position in range(max(0, offset), min(offset + length, size))}
    assert set(geometry.blocks(offset, length)) == touched


@given(st.integers(1, 1000))
def test_numbers_never_wrap(takes: int) -> None:
    """Every take counts one further; the bytes always fit; the window holds at least the last 126 takes."""
    numbers = Numbers()
    for take in range(1, takes + 1):
        slides, before = numbers.slides_next, numbers
        numbers = numbers.after_take()
        assert numbers.changes == take
        assert numbers.base == before.base + (128 if slides else 0)
        assert 1 <= numbers.byte_for_active <= 255
        assert numbers.byte_for_changes == numbers.byte_for_active - 1
        assert numbers.oldest <= max(0, take - 126)


def test_the_window_slides_with_the_255th_take() -> None:
    """Takes 1 to 254 leave the base alone, 255 slides, and so does each 128th from then on."""
    numbers, slid = Numbers(), []
    for take in range(1, 700):
        if numbers.slides_next:
            slid.append(take)
        numbers = numbers.after_take()
    assert slid == [255, 383, 511, 639]


def test_a_slide_lowers_by_128_but_never_to_unchanged() -> None:
    """0 stays 0, 1 to 129 become 1, all others 128 less."""
    assert slide(bytes(range(256))) == bytes([0] + [1] * 129 + list(range(2, 128)))


@pytest.mark.parametrize(
    "base, active",
    [
        (0, 0),
        (0, 256),
        (0, -1),
        (-128, 1),
        (1, 2),
        (128, 128),
        (128, 255),
        (128, 384),
        (256, 1),
        (2**32 - 128, 2**32),
    ],
)
def test_impossible_numbers_are_refused(base: int, active: int) -> None:
    """Numbers that no sequence of takes leads to are not continued."""
    with pytest.raises(InvalidMap, match="do not belong together"):
        Numbers(base, Number(active))


def test_only_numbers_of_the_window_can_be_asked_for() -> None:
    """Below the oldest and above the last take there is no answer, not even an empty one."""
    numbers = Numbers(128, Number(256))
    assert [numbers.threshold(since) for since in (129, 254, 255)] == [1, 126, 127]
    for since in (-1, 0, 128, 256, 2**40):
        with pytest.raises(GenerationChanged, match="only since 129 to 255: a full copy is needed"):
            numbers.threshold(since)


def test_the_generation_ends_when_its_numbers_do() -> None:
    """After number 2**32 - 1 a take starts a new generation; it does not fail and does not wrap."""
    numbers = Numbers(2**32 - 256, Number(2**32 - 1))
    full = ChangeMap.restore(Reading(G1, Geometry.of(1), numbers, b"\xff"))
    taken = full.take(G2)
    assert (full.generation, full.last_reset) == (G2, ResetReason.NUMBERS_EXHAUSTED)
    assert (taken.number, taken.reading().data, full.numbers.active) == (1, b"\0", 2)


def test_a_fresh_map_answers_for_number_0() -> None:
    """A client that copies the device before the first take keeps number 0 and loses nothing."""
    fresh = ChangeMap(3 * 4096, G1, 4096)
    assert (fresh.numbers.changes, fresh.numbers.active, fresh.last_reset) == (0, 1, ResetReason.ATTACHED)
    fresh.record_write(5000, 1)
    assert fresh.changed_ranges(G1, 0) == ([Range(4096, 4096)], 3 * 4096)
    assert fresh.changed_ranges(G1, 0, View.TAKEN) == ([], 3 * 4096)


def test_neighbours_are_one_range_and_the_last_ends_with_the_device() -> None:
    """Ranges never touch; a partial last block is as long as the device is."""
    device = ChangeMap(4 * 4096 + 10, G1, 4096)
    device.record_write(0, 1)
    device.record_write(3 * 4096 - 1, 4096 + 2)
    assert device.changed_ranges(G1, 0)[0] == [Range(0, 4096), Range(2 * 4096, 2 * 4096 + 10)]


def test_an_offset_inside_a_block_starts_with_the_block() -> None:
    """A query may start anywhere; the block that holds the offset is whole."""
    device = ChangeMap(4 * 4096, G1, 4096)
    device.mark_all_dirty()
    assert device.changed_ranges(G1, 0, offset=5000) == ([Range(4096, 3 * 4096)], 4 * 4096)
    assert device.changed_ranges(G1, 0, offset=4 * 4096) == ([], 4 * 4096)


@pytest.mark.parametrize("offset, max_ranges", [(4097, 1), (-1, 1), (0, 0), (0, -1)])
def test_a_query_outside_the_device_is_refused(offset: int, max_ranges: int) -> None:
    """An offset past the end, and asking for no range at all, are mistakes of the caller."""
    with pytest.raises(InvalidRange):
        ChangeMap(4096, G1).changed_ranges(G1, 0, View.LIVE, offset, max_ranges)


def test_an_old_generation_is_refused() -> None:
    """A number of another generation means nothing here, even when it exists here too."""
    device = ChangeMap(4096, G1)
    device.reset(G2, ResetReason.REQUESTED)
    with pytest.raises(GenerationChanged, match="the generation is 2, not 1"):
        device.changed_ranges(G1, 0)


def test_a_generation_cannot_begin_twice() -> None:
    """A reset to the present generation would hand out its numbers again."""
    device = ChangeMap(4096, G1)
    with pytest.raises(InvalidMap, match="generation 1 is in use"):
        device.reset(G1, ResetReason.REQUESTED)
    device.distrust(ResetReason.BYTES_MISSED)
    with pytest.raises(InvalidMap, match="generation 1 is in use"):
        device.prepare_take(G1)


def test_marks_before_the_first_take_touch_only_the_live_map() -> None:
    """There is no number for a change before the first take: the taken map stays empty."""
    device = ChangeMap(2 * 4096, G1, 4096)
    assert device.mark_all_dirty() == 2
    assert (device.read().data, device.taken.reading().data) == (b"\1\1", b"\0\0")


def test_a_mark_is_in_the_present_and_in_the_next_increment() -> None:
    """Marked after take 2: in the increment 1 to 2, and in the one from 2 on."""
    device = ChangeMap(4096, G1)
    device.take(G2)
    device.take(G2)
    device.mark_dirty([(0, 1)])
    assert [bool(device.changed_ranges(G1, since, View.TAKEN)[0]) for since in (0, 1, 2)] == [
        True,
        True,
        False,
    ]
    assert [bool(device.changed_ranges(G1, since, View.LIVE)[0]) for since in (0, 1, 2)] == [True] * 3


def test_a_grown_device_keeps_a_requested_block_size() -> None:
    """By the rule blocks may become larger when the device grows; requested ones stay."""
    ruled, requested = ChangeMap(128 * GIB, G1), ChangeMap(GIB, G1, 1 << 20)
    assert ruled.resize(256 * GIB, G2)
    assert requested.resize(2 * GIB, G2)
    assert (ruled.geometry.block_size, requested.geometry.block_size) == (128 * KIB, 1 << 20)
    assert ruled.last_reset is requested.last_reset is ResetReason.GROWN


def test_a_resize_to_the_same_size_is_none() -> None:
    """Looking again changes nothing."""
    device = ChangeMap(4096, G1)
    assert not device.resize(4096, G2)
    assert device.generation == G1


def test_a_saved_map_continues_its_generation() -> None:
    """Numbers, bytes and block size go on; the taken view says at least what it said."""
    device = ChangeMap(3 * 8192, G1, 8192)
    device.record_write(0, 1)
    device.take(G2)
    device.record_write(8192, 1)
    restored = ChangeMap.restore(device.read())
    assert restored.read() == device.read()
    assert restored.taken.reading().data == b"\1\1\0"
    assert restored.take(G2).number == 2


@pytest.mark.parametrize("data", [b"\0", b"\0\0\0", b"\2\0"])
def test_a_map_that_cannot_be_of_its_numbers_is_refused(data: bytes) -> None:
    """Of another length, or with bytes newer than itself: not ours, or damaged."""
    with pytest.raises(InvalidMap, match="the saved map"):
        ChangeMap.restore(Reading(G1, Geometry(2 * 4096, 4096), Numbers(), data))


@pytest.mark.parametrize("module", [cbt, changemap])
def test_the_rules_import_only_the_standard_library_and_each_other(module: object) -> None:
    """The rules can be read, copied and tested alone."""
    source = Path(str(getattr(module, "__file__", ""))).read_text(encoding="utf-8")
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    ours = {name for name in imported if name and name.partition(".")[0] not in sys.stdlib_module_names}
    assert ours == ({"blksnap_service.cbt"} if module is changemap else set())
