# SPDX-License-Identifier: GPL-2.0-or-later
"""Attach, detach, mark: trackers of image files over a fake data path."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.cbt import View
from blksnap_service.savedmaps import ClaimedMap, Fingerprint
from tests.unit.fakes.datapath import FakeDatapath, Refusal
from tests.unit.fakes.service import BLOCK, MIB, Running, only, take


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
    with pytest.raises(errors.InvalidArgument, match="there is: blkfilter, ublk, nbd, bpf"):
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
    await fake.asked("origin.add")
    attach.cancel()
    # Undoing it is asked for now, and is answered after what is held.
    await asyncio.sleep(0)
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
    assert ranges.tolist() == [[3 * BLOCK, BLOCK], [5 * BLOCK, BLOCK]]


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
    rig: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more check than the checksum; tracking begins all the same."""
    device = await rig.tracked()
    await rig.service.detach(device, force=False)
    claim = rig.catalogue.maps.claim

    def wrong(name: str, fingerprint: Fingerprint, block_size: int) -> ClaimedMap:
        claimed = claim(name, fingerprint, block_size)
        os.pwrite(claimed.data.fileno(), b"\xff", 0)
        return claimed

    monkeypatch.setattr(rig.catalogue.maps, "claim", wrong)
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

    monkeypatch.setattr(rig.catalogue.maps, "save", full)
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
