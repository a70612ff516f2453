# SPDX-License-Identifier: GPL-2.0-or-later
"""What is read from the maps of a tracker: ranges in pages, parts, summaries, counts."""

from __future__ import annotations

import pytest

from blksnap_service import errors, mapview
from blksnap_service.cbt import View
from blksnap_service.mapreader import MAX_READ_BYTES
from blksnap_service.mapview import Mode
from tests.unit.fakes.datapath import FakeDatapath
from tests.unit.fakes.service import BLOCK, MIB, Running, only, take


async def ranges(rig: Running, offset: int, most: int) -> tuple[list[tuple[int, int]], int]:
    """A page of what changed in the live map, as the reference has it."""
    found, following = await only(rig).reader.changed_ranges(View.LIVE, 0, offset, most)
    return [(start, length) for start, length in found.tolist()], following


async def test_ranges_come_in_pages(rig: Running, fake: FakeDatapath) -> None:
    """Each says where to go on; the last one says the capacity."""
    device = await rig.tracked()
    for block in (1, 2, 5, 9, 15):
        fake.write(device.origin, block * BLOCK, 1)
    first, offset = await ranges(rig, 0, 2)
    assert first == [(BLOCK, 2 * BLOCK), (5 * BLOCK, BLOCK)]
    assert offset == 9 * BLOCK
    second, offset = await ranges(rig, offset, 2)
    assert second == [(9 * BLOCK, BLOCK), (15 * BLOCK, BLOCK)]
    assert offset == MIB
    assert await ranges(rig, offset, 2) == ([], MIB)


async def test_ranges_are_whole_over_window_borders(
    rig: Running, fake: FakeDatapath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the window and the page, the answer is that of the reference."""
    device = await rig.tracked()
    for block in (0, 2, 3, 4, 5, 7, 8, 11, 12, 13, 14, 15):
        fake.write(device.origin, block * BLOCK, 1)
    reference = fake.origins[device.origin].map.read()
    for window in (1, 2, 3, 5, 16):
        monkeypatch.setattr("blksnap_service.mapreader.WINDOW_BLOCKS", window)
        for most in (1, 2, 6):
            for offset in range(0, MIB + 1, BLOCK * 3 // 2):
                expected = reference.changed_ranges(0, offset, most)
                assert await ranges(rig, offset, most) == expected


async def test_another_generation_is_an_error(rig: Running) -> None:
    """Which it is now is in the text."""
    await rig.tracked()
    now = only(rig).tracker.last.generation
    with pytest.raises(errors.GenerationChanged, match=now):
        await only(rig).reader.changed_ranges(View.TAKEN, 0, 0, 1, "11111111-2222-3333-4444-555555555555")
    found, following = await only(rig).reader.changed_ranges(View.TAKEN, 0, 0, 1, now)
    assert (len(found), following) == (0, MIB)


@pytest.mark.parametrize("since", [1, 2**32 - 1])
async def test_a_number_never_handed_out_is_an_error(rig: Running, since: int) -> None:
    """An empty answer would lose changes silently."""
    await rig.tracked()
    with pytest.raises(errors.GenerationChanged, match="full copy"):
        await only(rig).reader.changed_ranges(View.LIVE, since, 0, 1)


async def test_a_number_older_than_the_window_is_an_error(rig: Running) -> None:
    """After 256 takes the first are forgotten; the oldest is still known."""
    device = await rig.tracked()
    await take(rig, *[device.origin] * 300)
    reading = await only(rig).tracker.read()
    assert reading.oldest > 0
    with pytest.raises(errors.GenerationChanged, match=str(reading.oldest)):
        await only(rig).reader.changed_ranges(View.LIVE, reading.oldest - 1, 0, 1)
    await only(rig).reader.changed_ranges(View.LIVE, reading.oldest, 0, 1)


@pytest.mark.parametrize("offset, most", [(MIB + 1, 1), (0, 0), (2**64 - 1, 1)])
async def test_impossible_pages_are_refused(rig: Running, offset: int, most: int) -> None:
    """Numbers as they may come over the bus."""
    await rig.tracked()
    with pytest.raises(errors.InvalidArgument):
        await only(rig).reader.changed_ranges(View.LIVE, 0, offset, most)


async def test_parts_of_the_map_are_read(rig: Running, fake: FakeDatapath) -> None:
    """Both views; only what is inside."""
    device = await rig.tracked()
    fake.write(device.origin, BLOCK, 1)
    reader = only(rig).reader
    assert await reader.read(View.LIVE, 0, 3) == b"\0\1\0"
    assert await reader.read(View.TAKEN, 0, 16) == bytes(16)
    assert await reader.read(View.LIVE, 16, 0) == b""
    for offset, length in ((16, 1), (2**64 - 1, 1), (0, 17), (0, MAX_READ_BYTES + 1)):
        with pytest.raises(errors.InvalidArgument):
            await reader.read(View.LIVE, offset, length)


async def test_summaries_have_a_number_that_rises_with_changes(rig: Running, fake: FakeDatapath) -> None:
    """And stays when there are none."""
    device = await rig.tracked()
    reader = only(rig).reader
    empty, first = await reader.summarize(View.LIVE, 0, 16, 4, Mode.AGE, 0)
    assert (empty, first) == (bytes(4), (await reader.summarize(View.LIVE, 0, 16, 4, Mode.AGE, 0))[1])
    fake.write(device.origin, 0, 1)
    levels, second = await reader.summarize(View.LIVE, 0, 16, 4, Mode.AGE, 0)
    assert levels == b"\xff\0\0\0"
    assert second > first
    levels, _ = await reader.summarize(View.LIVE, 0, 16, 4, Mode.DENSITY, 0)
    assert levels == b"\x3f\0\0\0"


async def test_summaries_are_the_same_through_any_window(
    rig: Running, fake: FakeDatapath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is cut, and into how many bins."""
    device = await rig.tracked()
    for block in (0, 3, 4, 8, 11, 15):
        fake.write(device.origin, block * BLOCK, 1)
    data = fake.origins[device.origin].map.read().data
    for window in (1, 3, 4, 16):
        monkeypatch.setattr("blksnap_service.mapreader.WINDOW_BLOCKS", window)
        for first, count, bins in (
            (0, 16, 4),
            (0, 16, 16),
            (0, 16, 64),
            (0, 16, 5),
            (1, 15, 3),
            (2, 12, 8),
            (15, 1, 7),
        ):
            for mode in (Mode.AGE, Mode.DENSITY):
                levels, _ = await only(rig).reader.summarize(View.LIVE, first, count, bins, mode, 0)
                assert levels == mapview.summarize(data, 0, 1, first, count, bins, mode, 0)


@pytest.mark.parametrize(
    "first, count, bins", [(0, 0, 1), (0, 17, 1), (16, 1, 1), (0, 1, 0), (2**64 - 1, 2, 1), (0, 1, 2**32 - 1)]
)
async def test_impossible_summaries_are_refused(rig: Running, first: int, count: int, bins: int) -> None:
    """Before anything is read."""
    await rig.tracked()
    with pytest.raises(errors.InvalidArgument):
        await only(rig).reader.summarize(View.LIVE, first, count, bins, Mode.AGE, 0)


async def test_blocks_are_counted_for_each_number(rig: Running, fake: FakeDatapath) -> None:
    """As many as have changed since."""
    device = await rig.tracked()
    fake.write(device.origin, 0, 3 * BLOCK)
    await take(rig, device.origin)
    fake.write(device.origin, 0, 1)
    assert (await only(rig).reader.count()).changed == {0: 3, 1: 1}
