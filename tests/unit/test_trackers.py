# SPDX-License-Identifier: GPL-2.0-or-later
"""Attach, detach, adopt, mark, read: trackers of image files over a fake data path."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from blksnap_service import errors, mapview
from blksnap_service.cbt import View
from blksnap_service.mapreader import MAX_READ_BYTES
from blksnap_service.mapview import Mode
from blksnap_service.trackers import Tracked
from tests.unit.fakes.datapath import FakeDatapath, Refusal, running
from tests.unit.fakes.service import MIB, Running, running_service

BLOCK = 65_536


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDatapath]:
    """A fake data path."""
    with running(tmp_path / "run") as one:
        yield one


@pytest.fixture
async def rig(tmp_path: Path, fake: FakeDatapath) -> AsyncIterator[Running]:
    """A service over it."""
    async with running_service(tmp_path, fake) as one:
        yield one


def only(rig: Running) -> Tracked:
    """The one tracker there is."""
    ((_, tracked),) = rig.service.registry
    return tracked


async def take(rig: Running, *origins: str) -> None:
    """Take a snapshot behind the service's back, as far as numbers go."""
    for origin in origins:
        rig.fake.origins[origin].map.take(rig.fake.origins[origin].map.generation)


def _become_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


async def test_attaching_serves_the_file_and_writes_down_whose_it_is(
    rig: Running, fake: FakeDatapath
) -> None:
    """Who, when, by what, and why the generation began."""
    device = await rig.tracked()
    tracked = only(rig)
    assert tracked.tracker.node == f"nbd+unix:///?socket={fake.runtime_dir}/nbd/{device.origin}.sock"
    assert (tracked.entry.owner_uid, tracked.entry.backend, tracked.entry.last_reset) == (
        1000,
        "nbd",
        "first attach",
    )
    assert [entry.key for entry in rig.catalogue.trackers] == [device.name]
    assert rig.watcher.told == ["+device disk_2eimg", "+tracker disk_2eimg"]
    assert fake.origins[device.origin].label == device.path


async def test_a_device_is_tracked_once(rig: Running) -> None:
    """Also when two ask at the same time."""
    device = await rig.image()
    attach = rig.service.registry.attach
    results = await asyncio.gather(
        attach(device, owner_uid=0), attach(device, owner_uid=0), return_exceptions=True
    )
    assert [type(result) for result in results] == [type(None), errors.AlreadyTracked]


async def test_an_unknown_backend_is_refused(rig: Running) -> None:
    """With those there are."""
    with pytest.raises(errors.InvalidArgument, match="there is: nbd"):
        await rig.service.registry.attach(await rig.image(), owner_uid=0, backend="magic")


@pytest.mark.parametrize(
    "spoil, error",
    [
        (lambda path: path.unlink(), errors.NotFound),
        (lambda path: os.truncate(path, 0), errors.InvalidArgument),
        (lambda path: os.truncate(path, 1000), errors.InvalidArgument),
        (lambda path: (path.unlink(), path.mkdir()), errors.InvalidArgument),
        (_become_fifo, errors.InvalidArgument),
    ],
)
async def test_a_file_that_is_no_image_any_more_is_refused(
    rig: Running, spoil: object, error: type[errors.BlksnapError]
) -> None:
    """With its path, and nothing is left of the attempt."""
    device = await rig.image()
    assert callable(spoil)
    spoil(Path(device.path))
    with pytest.raises(error, match=device.path):
        await rig.service.registry.attach(device, owner_uid=0)
    assert device.name not in rig.service.registry
    assert list(rig.catalogue.trackers) == []


async def test_a_refused_attach_leaves_nothing(rig: Running, fake: FakeDatapath) -> None:
    """Neither entry nor open file, and the next one is the first."""
    device = await rig.image()
    before = len(list(Path("/proc/self/fd").iterdir()))
    fake.refuse["origin.add"] = Refusal("busy", "the file is locked by another process")
    with pytest.raises(errors.Busy, match="locked"):
        await rig.service.registry.attach(device, owner_uid=0)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert list(rig.catalogue.trackers) == []
    fake.refuse.clear()
    await rig.service.registry.attach(device, owner_uid=0)
    assert only(rig).entry.last_reset == "first attach"


async def test_a_cancelled_attach_is_undone(rig: Running, fake: FakeDatapath) -> None:
    """The data path may carry out what nobody waits for any more."""
    device = await rig.image()
    fake.hold["origin.add"] = threading.Event()
    attach = asyncio.create_task(rig.service.registry.attach(device, owner_uid=0))
    await asyncio.sleep(0.1)
    attach.cancel()
    await asyncio.sleep(0.1)
    fake.hold["origin.add"].set()
    with pytest.raises(asyncio.CancelledError):
        await attach
    assert fake.origins == {}
    assert list(rig.catalogue.trackers) == []


async def test_a_generation_goes_on_over_a_clean_detach(rig: Running, fake: FakeDatapath) -> None:
    """With its map, its numbers and the reason it once began."""
    device = await rig.tracked()
    fake.write(device.origin, 3 * BLOCK, 1)
    await take(rig, device.origin)
    fake.write(device.origin, 5 * BLOCK, 1)
    before = await only(rig).tracker.read()
    await rig.service.detach(device, force=False)
    assert rig.watcher.told[-1] == "-tracker disk_2eimg"
    assert list(rig.catalogue.trackers) == []
    await rig.service.registry.attach(device, owner_uid=0)
    after = await only(rig).tracker.read()
    assert (after.generation, after.active) == (before.generation, 2)
    assert only(rig).entry.last_reset == "first attach"
    ranges, _ = await only(rig).reader.changed_ranges(View.LIVE, 0, 0, 10)
    assert ranges == [(3 * BLOCK, BLOCK), (5 * BLOCK, BLOCK)]


async def test_a_write_in_between_starts_a_generation(rig: Running) -> None:
    """The map says nothing about it; the reason does."""
    device = await rig.tracked()
    before = only(rig).tracker.last.generation
    await rig.service.detach(device, force=False)
    Path(device.path).write_bytes(b"x" * MIB)
    await rig.service.registry.attach(device, owner_uid=0)
    assert only(rig).tracker.last.generation != before
    assert only(rig).entry.last_reset == "it was written to while it was not tracked"


async def test_a_saved_map_the_data_path_refuses_starts_a_generation(
    rig: Running, fake: FakeDatapath
) -> None:
    """One more check than the checksum; tracking begins all the same."""
    device = await rig.tracked()
    await rig.service.detach(device, force=False)
    maps = rig.service._backends["nbd"]._maps  # type: ignore[attr-defined]
    claim = maps.claim

    def wrong(*arguments: object) -> object:
        claimed = claim(*arguments)
        os.pwrite(claimed.data.fileno(), b"\xff", 0)
        return claimed

    maps.claim = wrong
    await rig.service.registry.attach(device, owner_uid=0)
    assert "the map to go on from was refused" in only(rig).entry.last_reset


async def test_a_tracker_in_use_is_not_detached_unless_forced(rig: Running, fake: FakeDatapath) -> None:
    """Clients would lose their disk."""
    device = await rig.tracked()
    fake.origins[device.origin].clients = 1
    with pytest.raises(errors.Busy, match="1 clients"):
        await rig.service.detach(device, force=False)
    assert device.name in rig.service.registry
    await rig.service.detach(device, force=True)
    assert device.name not in rig.service.registry


async def test_the_map_of_a_broken_origin_is_not_kept(rig: Running, fake: FakeDatapath) -> None:
    """It cannot be trusted: the next attach begins anew and says why."""
    device = await rig.tracked()
    fake.origins[device.origin].state, fake.origins[device.origin].reason = "broken", "it shrank"
    await rig.service.detach(device, force=False)
    await rig.service.registry.attach(device, owner_uid=0)
    assert "without a clean detach" in only(rig).entry.last_reset


async def test_a_map_that_cannot_be_saved_does_not_stop_the_detach(
    rig: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detach has happened; the log says that history is lost, and the next attach too."""
    device = await rig.tracked()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rig.service._backends["nbd"]._maps, "save", full)  # type: ignore[attr-defined]
    await rig.service.detach(device, force=False)
    assert "could not be saved: no space left on device" in caplog.text
    await rig.service.registry.attach(device, owner_uid=0)
    assert "without a clean detach" in only(rig).entry.last_reset


async def test_detaching_what_is_not_tracked_says_so(rig: Running) -> None:
    """With its path."""
    device = await rig.image()
    with pytest.raises(errors.NotTracked, match=device.path):
        await rig.service.detach(device, force=False)


async def test_marks_are_checked_before_any_is_made(rig: Running, fake: FakeDatapath) -> None:
    """The text names the range that is wrong."""
    device = await rig.tracked()
    with pytest.raises(errors.InvalidArgument, match=r"range 1 .*nothing was marked"):
        await rig.service.registry.mark(device.name, [(0, BLOCK), (MIB, 1)])
    assert not any(one["op"] == "origin.mark" for one in fake.requests)
    await rig.service.registry.mark(device.name, [(0, 1), (MIB - 1, 1)])
    assert fake.origins[device.origin].map.read().changed_blocks(0) == [0, 15]


async def test_too_many_marks_are_refused(rig: Running) -> None:
    """The limit is in the text."""
    device = await rig.tracked()
    with pytest.raises(errors.InvalidArgument, match="65536"):
        await rig.service.registry.mark(device.name, [(0, 1)] * 65_537)


async def test_marking_everything_makes_the_next_increment_full(rig: Running, fake: FakeDatapath) -> None:
    """Every block."""
    device = await rig.tracked()
    await rig.service.registry.mark_all(device.name)
    assert len(fake.origins[device.origin].map.read().changed_blocks(0)) == 16


async def test_ranges_come_in_pages(rig: Running, fake: FakeDatapath) -> None:
    """Each says where to go on; the last one says the capacity."""
    device = await rig.tracked()
    for block in (1, 2, 5, 9, 15):
        fake.write(device.origin, block * BLOCK, 1)
    reader = only(rig).reader
    first, offset = await reader.changed_ranges(View.LIVE, 0, 0, 2)
    assert first == [(BLOCK, 2 * BLOCK), (5 * BLOCK, BLOCK)]
    assert offset == 9 * BLOCK
    second, offset = await reader.changed_ranges(View.LIVE, 0, offset, 2)
    assert second == [(9 * BLOCK, BLOCK), (15 * BLOCK, BLOCK)]
    assert offset == MIB
    assert await reader.changed_ranges(View.LIVE, 0, offset, 2) == ([], MIB)


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
                assert await only(rig).reader.changed_ranges(View.LIVE, 0, offset, most) == expected


async def test_another_generation_is_an_error(rig: Running) -> None:
    """Which it is now is in the text."""
    await rig.tracked()
    now = only(rig).tracker.last.generation
    with pytest.raises(errors.GenerationChanged, match=now):
        await only(rig).reader.changed_ranges(View.TAKEN, 0, 0, 1, "11111111-2222-3333-4444-555555555555")
    assert await only(rig).reader.changed_ranges(View.TAKEN, 0, 0, 1, now) == ([], MIB)


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


async def test_a_restart_finds_its_trackers(tmp_path: Path, fake: FakeDatapath) -> None:
    """With everything that was known about them; nothing is attached anew."""
    async with running_service(tmp_path, fake) as first:
        await first.tracked()
        before = only(first).entry
    adds = sum(one["op"] == "origin.add" for one in fake.requests)
    async with running_service(tmp_path, fake) as second:
        assert only(second).entry == before
        assert second.watcher.told == ["+device disk_2eimg", "+tracker disk_2eimg"]
    assert sum(one["op"] == "origin.add" for one in fake.requests) == adds


async def test_a_tracker_nobody_wrote_down_is_roots(
    tmp_path: Path, fake: FakeDatapath, caplog: pytest.LogCaptureFixture
) -> None:
    """As after the loss of the state directory: it is adopted, not ended."""
    async with running_service(tmp_path, fake) as first:
        await first.tracked()
    for name in ("images.json", "trackers.json"):
        (tmp_path / "state" / name).unlink()
    async with running_service(tmp_path, fake) as second:
        assert only(second).entry.owner_uid == 0
        assert only(second).entry.path == str(tmp_path / "disk.img")
    assert "nobody wrote down" in caplog.text


async def test_a_tracked_file_whose_name_is_gone_is_still_a_device(
    tmp_path: Path, fake: FakeDatapath
) -> None:
    """The data path has it open; it can be detached."""
    async with running_service(tmp_path, fake) as first:
        await first.tracked()
    (tmp_path / "disk.img").unlink()
    async with running_service(tmp_path, fake) as second:
        device = second.service.inventory.get("disk_2eimg")
        assert device.size == MIB
        await second.service.detach(device, force=False)
    assert fake.origins == {}


async def test_a_lost_tracker_is_forgotten(
    tmp_path: Path, fake: FakeDatapath, caplog: pytest.LogCaptureFixture
) -> None:
    """Never silently."""
    async with running_service(tmp_path, fake) as first:
        await first.tracked()
    fake.close()
    with running(tmp_path / "run") as other:
        async with running_service(tmp_path, other) as second:
            assert list(second.service.registry) == []
            assert list(second.catalogue.trackers) == []
            await second.service.registry.attach(second.service.inventory.get("disk_2eimg"), owner_uid=0)
            assert "without a clean detach" in only(second).entry.last_reset
    assert "is not tracked any more" in caplog.text


async def test_a_persistent_tracker_is_attached_again(tmp_path: Path, fake: FakeDatapath) -> None:
    """By the same owner, with the same block size, as a new generation that says why."""
    async with running_service(tmp_path, fake) as first:
        await first.service.registry.attach(
            await first.image(), owner_uid=1000, block_size=4096, persistent=True
        )
    fake.close()
    with running(tmp_path / "run") as other:
        async with running_service(tmp_path, other) as second:
            entry = only(second).entry
            assert (entry.owner_uid, entry.persistent) == (1000, True)
            assert only(second).tracker.last.block_size == 4096
            assert "without a clean detach" in entry.last_reset


async def test_a_persistent_tracker_that_cannot_be_attached_can_be_given_up(
    tmp_path: Path, fake: FakeDatapath, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried at every start until somebody detaches it."""
    async with running_service(tmp_path, fake) as first:
        await first.service.registry.attach(await first.image(), owner_uid=1000, persistent=True)
    fake.close()
    with running(tmp_path / "run") as other:
        other.refuse["origin.add"] = Refusal("busy", "locked")
        async with running_service(tmp_path, other) as second:
            assert list(second.service.registry) == []
            device = second.service.inventory.get("disk_2eimg")
            await second.service.detach(device, force=False)
            assert list(second.catalogue.trackers) == []
    assert "is to be tracked always, but cannot be now: locked" in caplog.text


async def test_a_broken_origin_is_told(rig: Running, fake: FakeDatapath) -> None:
    """The state changes with the event."""
    device = await rig.tracked()
    fake.origins[device.origin].state, fake.origins[device.origin].reason = "broken", "it shrank"
    fake.tell(event="origin.broken", origin=device.origin, reason="it shrank")
    await rig.told("~tracker")
    assert only(rig).tracker.last.state == "broken"


async def test_a_lost_connection_is_made_again_and_nothing_else_changes(
    rig: Running, fake: FakeDatapath
) -> None:
    """The data path is still there: its trackers are adopted, and ask no new attach."""
    await rig.tracked()
    before = only(rig).entry
    fake.drop_connections()
    await rig.told("-tracker")
    while rig.watcher.told[-1] != "+tracker disk_2eimg":
        rig.watcher.something.clear()
        await rig.watcher.something.wait()
    assert only(rig).entry == before


async def test_while_the_data_path_is_away_requests_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the backend is not available, with the reason."""
    with running(tmp_path / "run") as fake:
        async with running_service(tmp_path, fake) as rig:
            device = await rig.image()
            fake.close()
            await rig.told("backends")
            (info,) = rig.service.registry.infos()
            assert not info.available
            assert "data path" in info.reason
            with pytest.raises(errors.BlksnapError, match="data path"):
                await rig.service.registry.attach(device, owner_uid=0, backend="nbd")
            assert rig.service.registry.usable(device) == []
