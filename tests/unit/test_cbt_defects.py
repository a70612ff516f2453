# SPDX-License-Identifier: GPL-2.0-or-later
"""Defects of the kernel filter that the map rules could share, one test each.

The filter is blksnap as posted to the kernel's list in November 2023 (version 6, cbt_map.c and tracker.c). The numbers
are those that `cbt` and `changemap` name. The gaps are defects of dispatching, locking and reference counting, which
rules without a thread, a lock or a pointer cannot have.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from blksnap_service.cbt import (
    GenerationChanged,
    GenerationId,
    Geometry,
    InvalidRange,
    InvalidSize,
    Range,
    Reading,
    ResetReason,
    StalePlan,
    View,
)
from blksnap_service.changemap import ChangeMap

G1, G2, G3 = GenerationId("1"), GenerationId("2"), GenerationId("3")
BLOCK = 4096


def device_of(blocks: int, takes: int = 0) -> ChangeMap:
    """A change map of so many blocks after so many takes, none of them held."""
    device = ChangeMap(blocks * BLOCK, G1, BLOCK)
    for _ in range(takes):
        device.release(device.take(G2))
    return device


def both(device: ChangeMap) -> tuple[bytes, bytes]:
    """The bytes of the live and the taken map."""
    return device.read(View.LIVE).data, device.read(View.TAKEN).data


def test_02_every_range_of_a_list_is_marked() -> None:
    """Guards against marking the first range n times: all others are then missing from the next increment."""
    device = device_of(8, takes=1)
    assert device.mark_dirty([(0, 1), (3 * BLOCK, 2 * BLOCK), (7 * BLOCK + 5, 1)]) == 4
    assert both(device) == (b"\2\0\0\2\2\0\0\2", b"\1\0\0\1\1\0\0\1")


@pytest.mark.parametrize("size", [0, 1 << 63])
def test_04_a_reset_that_fails_leaves_the_map_as_it_was(size: int) -> None:
    """Guards against freeing the old maps before the new ones exist: the next write dereferenced NULL."""
    device = device_of(2, takes=3)
    device.record_write(0, 1)
    before = (device.read(), device.taken, device.last_reset)
    with pytest.raises(InvalidSize):
        device.reset(G2, ResetReason.REQUESTED, size)
    assert (device.read(), device.taken, device.last_reset) == before


@pytest.mark.parametrize(
    "offset, length", [(5, 0), (4, 1), (0, 5), (6, 1 << 64), (1 << 64, 1), (-1, 1), (0, -1)]
)
def test_05_a_part_outside_the_map_is_not_read(offset: int, length: int) -> None:
    """Guards against `length > count - offset`, which underflows and hands out memory behind the map."""
    reading = device_of(4).read()
    assert reading.read(4, 0) == b""
    with pytest.raises(InvalidRange):
        reading.read(offset, length)


def test_06_the_255th_take_loses_no_increment() -> None:
    """Guards against number 255 with a new generation: "byte > 255" finds nothing, so changes are lost."""
    device = device_of(4, takes=254)
    device.record_write(2 * BLOCK, 1)
    taken = device.take(G2)
    device.record_write(3 * BLOCK, 1)
    assert (device.generation, taken.number, device.numbers.active) == (G1, 255, 256)
    assert taken.reading().changed_blocks(254) == [2]
    assert device.read().changed_blocks(255) == [3]
    assert device.read().changed_blocks(254) == [2, 3]


def test_06_a_number_never_handed_out_is_not_answered_with_nothing() -> None:
    """Guards the client's side of the same: an empty answer to an impossible number is a silent loss."""
    device = device_of(1, takes=2)
    device.record_write(0, 1)
    for view in View:
        with pytest.raises(GenerationChanged, match="full copy"):
            device.changed_ranges(G1, 3, view)


def test_07_the_taken_map_is_fresh_when_the_window_slides() -> None:
    """Guards against a take that renews the numbers but not the map that is read with them."""
    device = device_of(3, takes=254)
    device.record_write(BLOCK, 1)
    taken = device.take(G2).reading()
    assert taken.data == device.read().data == b"\0\x7f\0"
    assert taken.numbers == device.numbers


def test_08_a_write_past_the_end_is_no_error_to_the_writer() -> None:
    """Guards against leaving the write path early: the snapshot of the whole device became silently wrong."""
    device = device_of(2)
    device.record_write(BLOCK, 2 * BLOCK)
    assert device.distrusted is ResetReason.GROWN
    plan = device.prepare_take(G2, 3 * BLOCK)
    assert (plan.generation, plan.reset, plan.geometry.block_count) == (G2, ResetReason.GROWN, 3)


def test_08_a_lost_map_is_loud() -> None:
    """Guards the same: the live map of which bytes are missing answers nothing, and says why."""
    device = device_of(2)
    device.distrust(ResetReason.BYTES_MISSED)
    with pytest.raises(GenerationChanged, match="bytes-missed"):
        device.changed_ranges(G1, 0)


def test_09_a_held_snapshot_stays_readable_when_the_live_map_is_lost() -> None:
    """Guards against one "corrupted" flag for both maps: the taken one is complete, whatever comes later."""
    device = device_of(2)
    device.record_write(0, 1)
    device.take(G2)
    device.distrust(ResetReason.BYTES_MISSED)
    assert device.changed_ranges(G1, 0, View.TAKEN)[0] == [Range(0, BLOCK)]


@pytest.mark.parametrize("offset", [0, BLOCK, 5])
def test_10_an_empty_range_is_refused(offset: int) -> None:
    """Guards against `start + 0 - 1`: at 0 every block was marked, elsewhere one or none."""
    device = device_of(4, takes=1)
    with pytest.raises(InvalidRange, match="range 0 is empty"):
        device.mark_dirty([(offset, 0)])
    assert both(device) == (bytes(4), bytes(4))


def test_10_an_empty_write_marks_nothing() -> None:
    """Guards the same where a flush arrives as a write of length 0."""
    device = device_of(4)
    device.record_write(0, 0)
    device.record_write(4 * BLOCK, 0)
    assert (both(device)[0], device.distrusted) == (bytes(4), None)


@pytest.mark.parametrize("wrapped", [(1, (1 << 64) - 1), ((1 << 64) - 1, 2), ((1 << 63), (1 << 63) + 1)])
def test_11_a_range_that_overflows_is_refused(wrapped: tuple[int, int]) -> None:
    """Guards against 64-bit sums: success was reported and nothing marked."""
    device = device_of(4, takes=1)
    with pytest.raises(InvalidRange, match="range 0 does not lie inside the device of 16384 bytes"):
        device.mark_dirty([wrapped])
    assert both(device) == (bytes(4), bytes(4))


@pytest.mark.parametrize("bad", [(4 * BLOCK, 1), (3 * BLOCK, BLOCK + 1), (0, 0)])
def test_12_a_list_with_one_bad_range_marks_nothing(bad: tuple[int, int]) -> None:
    """Guards against half a list: its beginning was marked in one map and not in the other."""
    device = device_of(4, takes=1)
    with pytest.raises(InvalidRange, match="range 2"):
        device.mark_dirty([(0, BLOCK), (BLOCK, BLOCK), bad])
    assert both(device) == (bytes(4), bytes(4))
    assert device.distrusted is None


@pytest.mark.parametrize("requested", [1, 256, 1 << 31, 1 << 32, 1 << 33, 1 << 63])
def test_14_a_block_size_that_does_not_fit_is_refused(requested: int) -> None:
    """Guards against shifting an int by 32 (block size 1) and by less than a sector."""
    with pytest.raises(InvalidSize):
        Geometry.of(1 << 40, requested)


def test_14_the_block_count_is_not_cut_to_32_bits() -> None:
    """Guards against a map shorter than its device: a count is refused, never truncated."""
    with pytest.raises(InvalidSize, match="4294967297 blocks"):
        Geometry.of((1 << 44) + 1, 4096)


def test_15_a_map_without_a_take_says_number_0() -> None:
    """Guards against answering with what the caller happened to send: the stand-in is empty and has number 0."""
    device = device_of(2)
    assert (device.taken.number, device.taken.reading().data) == (0, b"\0\0")


def test_17_a_reading_is_of_one_moment() -> None:
    """Guards against numbers read before a take and bytes read after it."""
    device = device_of(2)
    device.record_write(0, 1)
    reading = device.read()
    device.take(G2)
    device.record_write(BLOCK, 1)
    device.reset(G2, ResetReason.REQUESTED)
    assert reading == Reading(G1, Geometry(2 * BLOCK, BLOCK), reading.numbers, b"\1\0")
    assert reading.numbers.active == 1
    with pytest.raises(FrozenInstanceError):
        reading.data = b""  # type: ignore[misc]


def test_17_an_answer_is_bound_to_the_generation_asked_about() -> None:
    """Guards against mixing generations: a reset between the client's two calls is seen, in both views."""
    device = device_of(2, takes=1)
    device.reset(G2, ResetReason.REQUESTED)
    for view in View:
        with pytest.raises(GenerationChanged, match="the generation is 2, not 1"):
            device.changed_ranges(G1, 0, view)


def test_22_an_image_can_be_released_twice() -> None:
    """Guards against a release that depends on what an earlier, failed one left behind."""
    device = device_of(2)
    first, second = device.take(G2), device.take(G2)
    device.release(first)
    device.release(first)
    device.mark_dirty([(0, 1)])
    assert (first.reading().data, second.reading().data) == (b"\0\0", b"\2\0")


@pytest.mark.parametrize("reason", [ResetReason.MEDIA_CHANGED, ResetReason.BYTES_MISSED])
def test_25_what_a_take_finds_out_begins_a_generation(reason: ResetReason) -> None:
    """Guards against comparing the size alone: another medium of the same size is another device."""
    device = device_of(2, takes=5)
    device.record_write(0, 1)
    taken = device.commit_take(device.prepare_take(G2, 2 * BLOCK, reason))
    assert (device.generation, device.last_reset, device.distrusted) == (G2, reason, None)
    assert (taken.generation, taken.number, taken.reading().data) == (G2, 1, b"\0\0")


def test_26_a_device_of_size_0_is_refused_by_name() -> None:
    """Guards against reporting everything as out of memory."""
    with pytest.raises(InvalidSize, match="a size of 0 bytes cannot be tracked"):
        ChangeMap(0, G1)


def test_29_a_write_to_an_image_is_in_every_increment_it_spoils() -> None:
    """Guards against images that differ from their instant while the map denies it, also between two held ones."""
    device = device_of(2)
    first, second, third = device.take(G2), device.take(G2), device.take(G2)
    device.mark_image_write(second, [(BLOCK, 1)])
    assert first.reading().changed_blocks(0) == []
    assert second.reading().changed_blocks(1) == [1]
    assert third.reading().changed_blocks(2) == [1]
    assert device.read().changed_blocks(3) == [1]


def test_29_a_write_to_an_image_of_an_ended_generation_stays_in_it() -> None:
    """Guards against numbers of one generation in the maps of another."""
    device = device_of(2)
    old = device.take(G2)
    device.reset(G2, ResetReason.REQUESTED)
    new = device.take(G3)
    device.mark_image_write(old, [(0, 1)])
    assert (old.reading().data, new.reading().data, device.read().data) == (b"\1\0", b"\0\0", b"\0\0")


def test_33_a_lost_map_can_still_be_marked() -> None:
    """Guards against a corrupted map that refuses the one thing that would help: mark everything."""
    device = device_of(3, takes=1)
    device.distrust(ResetReason.BYTES_MISSED)
    assert device.mark_all_dirty() == 3
    assert device.taken.reading().data == b"\1\1\1"


def test_34_a_failing_take_of_many_consumes_no_number() -> None:
    """Guards against the devices that were switched before one failed: none is switched before all can be."""
    first, second = device_of(2, takes=7), device_of(2, takes=7)
    before = (first.read(), second.read(), first.taken, second.taken)
    second.distrust(ResetReason.BYTES_MISSED)
    first.prepare_take(G2)
    with pytest.raises(InvalidSize):
        second.prepare_take(G2, size=0)
    second_taken = second.taken
    assert (first.read(), first.taken, second_taken) == (before[0], before[2], before[3])
    assert (first.take(G2).number, second.take(G2).number) == (8, 1)


def test_34_a_take_whose_ground_has_moved_is_refused() -> None:
    """Guards against a number handed out for a map that stopped being trusted after the take was prepared."""
    device = device_of(2)
    plan = device.prepare_take(G2)
    device.record_write(2 * BLOCK, 1)
    with pytest.raises(StalePlan):
        device.commit_take(plan)
    assert (device.numbers.changes, device.generation) == (0, G1)
    assert device.take(G2).number == 1
