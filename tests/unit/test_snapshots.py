# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of snapshots, and that a failing one leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.cbt import View
from blksnap_service.fds import OwnedFd
from blksnap_service.mapview import Mode
from blksnap_service.snapshot import MAX_DEVICES, Request
from tests.unit.fakes.datapath import FakeDatapath, Refusal
from tests.unit.fakes.service import MIB, Running, nothing_left

MINE = Request(owner_uid=1000)


async def test_a_snapshot_is_created_and_taken(rig: Running, fake: FakeDatapath) -> None:
    """With an image of each device and everything about it written down."""
    one, two = await rig.tracked("one.img"), await rig.tracked("two.img")
    snapshot = await rig.service.snapshots.create([one, two], Request(owner_uid=1000, description="before"))
    assert snapshot.state == "taken"
    assert snapshot.status.taken_at > 0
    assert [image.origin for image in snapshot.status.images] == [one.origin, two.origin]
    image = snapshot.status.images[0]
    assert image.uri == f"nbd+unix:///{snapshot.id}?socket={fake.runtime_dir}/nbd/{one.origin}.sock"
    assert (image.number, image.size, image.read_only) == (1, MIB, True)
    assert list(rig.catalogue.snapshots) == [snapshot.entry]
    assert rig.service.snapshots.of_device(one.name) == [snapshot]


async def test_trackers_have_the_next_number_when_create_returns(rig: Running) -> None:
    """Who asks after the answer finds what it means."""
    device = await rig.tracked()
    await rig.service.snapshots.create([device], MINE)
    assert rig.service.registry.get(device.name).tracker.last.changes == 1
    assert "~tracker disk_2eimg" in rig.watcher.told


async def test_untracked_devices_are_refused_or_attached(rig: Running) -> None:
    """As the caller wants."""
    device = await rig.image()
    with pytest.raises(errors.NotTracked, match="option attach"):
        await rig.service.snapshots.create([device], MINE)
    await rig.service.snapshots.create([device], Request(owner_uid=1000, attach=True))
    assert rig.service.registry.get(device.name).entry.owner_uid == 1000


@pytest.mark.parametrize(
    "operation, code, error",
    [
        ("snapshot.create", "no-space", errors.NoSpace),
        ("snapshot.create", "invalid", errors.InvalidArgument),
        ("snapshot.take", "timed-out", errors.TimedOut),
        ("snapshot.take", "limit", errors.LimitExceeded),
    ],
)
@pytest.mark.parametrize("place", ["", "diff"])
async def test_a_failing_snapshot_leaves_nothing_behind(
    rig: Running, fake: FakeDatapath, operation: str, code: str, error: type[errors.BlksnapError], place: str
) -> None:
    """Neither snapshot, nor storage, nor the trackers attached for it; those that were there stay."""
    old, new = await rig.tracked("old.img"), await rig.image("new.img")
    fake.refuse[operation] = Refusal(code, "because of the moon")
    before = len(list(Path("/proc/self/fd").iterdir()))
    path = str(rig.directory / place) if place else ""
    with pytest.raises(error, match="moon"):
        await rig.service.snapshots.create(
            [old, new], Request(owner_uid=1000, attach=True, storage_path=path)
        )
    assert nothing_left(rig)
    assert [name for name, _ in rig.service.registry] == [old.name]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    fake.refuse.clear()
    await rig.service.snapshots.create([old], MINE)
    assert rig.service.registry.get(old.name).tracker.last.changes == 1


async def test_a_cancelled_snapshot_leaves_nothing_behind(rig: Running, fake: FakeDatapath) -> None:
    """The take may happen after nobody waits for it any more."""
    device = await rig.tracked()
    fake.hold["snapshot.take"] = threading.Event()
    creating = asyncio.create_task(rig.service.snapshots.create([device], MINE))
    await fake.asked("snapshot.take")
    creating.cancel()
    # Undoing it is asked for now, and is answered after what is held.
    await asyncio.sleep(0)
    fake.hold["snapshot.take"].set()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert nothing_left(rig)


async def test_devices_are_named_once_and_at_least_one(rig: Running) -> None:
    """And not more than one take can have."""
    device = await rig.tracked()
    with pytest.raises(errors.InvalidArgument, match="at least one"):
        await rig.service.snapshots.create([], MINE)
    with pytest.raises(errors.InvalidArgument, match="twice"):
        await rig.service.snapshots.create([device, device], MINE)
    many = [await rig.image(f"{number}.img") for number in range(MAX_DEVICES + 1)]
    with pytest.raises(errors.LimitExceeded, match=str(MAX_DEVICES)):
        await rig.service.snapshots.create(many, MINE)
    assert nothing_left(rig)


async def test_the_limit_is_what_there_is_to_keep(rig: Running, fake: FakeDatapath) -> None:
    """The sizes of all devices, where there is room for it; else what the caller says."""
    one, two = await rig.tracked("one.img"), await rig.tracked("two.img", 2 * MIB)
    snapshot = await rig.service.snapshots.create([one, two], MINE)
    assert snapshot.status.limit == 3 * MIB
    snapshot = await rig.service.snapshots.create([one, two], Request(owner_uid=0, limit=512 * 1024))
    assert snapshot.status.limit == 512 * 1024


async def test_storage_of_another_snapshot_is_refused(rig: Running) -> None:
    """Two would overwrite each other, also when both begin at the same time."""
    one, two = await rig.tracked("one.img"), await rig.tracked("two.img")
    (rig.directory / "diff").write_bytes(b"")
    request = Request(owner_uid=0, storage_path=str(rig.directory / "diff"))
    create = rig.service.snapshots.create
    results = await asyncio.gather(create([one], request), create([two], request), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Busy", "Snapshot"]
    (rig.directory / "link").hardlink_to(rig.directory / "diff")
    with pytest.raises(errors.Busy, match="another snapshot"):
        await create([one], Request(owner_uid=0, storage_path=str(rig.directory / "link")))


async def test_a_tracked_file_is_no_storage(rig: Running) -> None:
    """Not even of a snapshot of another device."""
    one, two = await rig.tracked("one.img"), await rig.tracked("two.img")
    with pytest.raises(errors.InvalidArgument, match="itself tracked"):
        await rig.service.snapshots.create([one], Request(owner_uid=0, storage_path=two.path))
    assert nothing_left(rig)


async def test_a_storage_descriptor_is_handed_on(rig: Running, fake: FakeDatapath) -> None:
    """And not kept here."""
    device = await rig.tracked()
    fd = OwnedFd(os.open(rig.directory, os.O_TMPFILE | os.O_RDWR))
    inode = os.fstat(fd.fileno()).st_ino
    snapshot = await rig.service.snapshots.create([device], Request(owner_uid=0, storage_fd=fd))
    assert fd.closed
    assert os.fstat(fake.snapshots[snapshot.id].fd).st_ino == inode


async def test_a_storage_descriptor_is_closed_when_nothing_comes_of_it(rig: Running) -> None:
    """Even before it was looked at."""
    fd = OwnedFd(os.open(rig.directory, os.O_TMPFILE | os.O_RDWR))
    with pytest.raises(errors.NotTracked):
        await rig.service.snapshots.create([await rig.image()], Request(owner_uid=0, storage_fd=fd))
    assert fd.closed


async def test_a_storage_file_made_here_goes_with_the_snapshot(rig: Running) -> None:
    """One that was there before stays."""
    device = await rig.tracked()
    (rig.directory / "old").write_bytes(b"")
    for name in ("new", "old"):
        path = str(rig.directory / name)
        snapshot = await rig.service.snapshots.create([device], Request(owner_uid=0, storage_path=path))
        assert (rig.directory / name).exists()
        await rig.service.snapshots.destroy(snapshot)
    assert not (rig.directory / "new").exists()
    assert (rig.directory / "old").exists()


async def test_devices_are_added_until_the_take(rig: Running) -> None:
    """Then it is one instant and stays so."""
    one, two = await rig.tracked("one.img"), await rig.tracked("two.img")
    snapshots = rig.service.snapshots
    snapshot = await snapshots.create([one], Request(owner_uid=0, take=False))
    assert (snapshot.state, snapshot.status.taken_at) == ("created", 0)
    await snapshots.add_device(snapshot, two)
    with pytest.raises(errors.InvalidArgument, match="already part"):
        await snapshots.add_device(snapshot, two)
    with pytest.raises(errors.NotTracked):
        await snapshots.add_device(snapshot, await rig.image("three.img"))
    await snapshots.take(snapshot)
    assert [image.origin for image in snapshot.status.images] == [one.origin, two.origin]
    with pytest.raises(errors.InvalidState, match="taken"):
        await snapshots.add_device(snapshot, one)
    with pytest.raises(errors.InvalidState, match="only once"):
        await snapshots.take(snapshot)


async def test_a_failing_take_can_be_tried_again(rig: Running, fake: FakeDatapath) -> None:
    """It consumed no number and left the snapshot as it was."""
    device = await rig.tracked()
    snapshot = await rig.service.snapshots.create([device], Request(owner_uid=0, take=False))
    fake.refuse["snapshot.take"] = Refusal("timed-out", "a write did not end")
    with pytest.raises(errors.TimedOut):
        await rig.service.snapshots.take(snapshot)
    assert snapshot.state == "created"
    fake.refuse.clear()
    await rig.service.snapshots.take(snapshot)
    assert snapshot.status.images[0].number == 1


async def test_a_take_that_ends_a_generation_says_why(rig: Running, fake: FakeDatapath) -> None:
    """Bytes were written behind the tracker's back."""
    device = await rig.tracked()
    before = rig.service.registry.get(device.name).tracker.last.generation
    fake.bypassed[device.origin] = "bytes were written past the tracker"
    snapshot = await rig.service.snapshots.create([device], MINE)
    tracked = rig.service.registry.get(device.name)
    assert tracked.tracker.last.generation == snapshot.status.images[0].generation != before
    assert tracked.entry.last_reset == "bytes were written past the tracker"
    assert "generation disk_2eimg: bytes were written past the tracker" in rig.watcher.told
    assert rig.catalogue.trackers.get(device.name) == tracked.entry


async def test_how_often_things_change_is_counted_at_each_take(rig: Running, fake: FakeDatapath) -> None:
    """The map itself forgets it."""
    device = await rig.tracked()
    for blocks in (1, 2, 2, 2):
        fake.write(device.origin, 0, blocks * 65_536)
        await rig.service.snapshots.create([device], MINE)
    levels, _ = await rig.service.registry.get(device.name).reader.summarize(
        View.LIVE, 0, 16, 16, Mode.FREQUENCY, 0
    )
    assert levels[:3] == bytes([255, 191, 0])


async def test_destroying_takes_everything_away(rig: Running) -> None:
    """In between it is seen that it goes."""
    snapshot = await rig.service.snapshots.create([await rig.tracked()], MINE)
    await rig.service.snapshots.destroy(snapshot)
    assert rig.watcher.told[-2:] == ["~snapshot destroying", "-snapshot"]
    assert nothing_left(rig)
    with pytest.raises(errors.NotFound):
        rig.service.snapshots.get(snapshot.id)


async def test_destroying_twice_at_once_is_one_destruction(rig: Running) -> None:
    """The second is too late and says so."""
    snapshot = await rig.service.snapshots.create([await rig.tracked()], MINE)
    destroy = rig.service.snapshots.destroy
    results = await asyncio.gather(destroy(snapshot), destroy(snapshot), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), errors.NotFound]


async def test_a_failing_destruction_leaves_the_snapshot(rig: Running, fake: FakeDatapath) -> None:
    """It can be tried again."""
    snapshot = await rig.service.snapshots.create([await rig.tracked()], MINE)
    fake.refuse["snapshot.destroy"] = Refusal("busy", "not now")
    with pytest.raises(errors.Busy):
        await rig.service.snapshots.destroy(snapshot)
    assert snapshot.state == "taken"
    fake.refuse.clear()
    await rig.service.snapshots.destroy(snapshot)
    assert nothing_left(rig)


async def test_a_device_in_a_snapshot_is_not_detached_unless_forced(rig: Running, fake: FakeDatapath) -> None:
    """Then its image fails, and the snapshot says so."""
    device = await rig.tracked()
    snapshot = await rig.service.snapshots.create([device], MINE)
    with pytest.raises(errors.Busy, match=f"part of snapshot {snapshot.id}"):
        await rig.service.detach(device, force=False)
    await rig.service.detach(device, force=True)
    assert (snapshot.state, snapshot.status.error) == ("failed", "the origin was removed")


async def test_a_failed_snapshot_is_told_after_its_state(rig: Running, fake: FakeDatapath) -> None:
    """Who hears the signal and looks finds what it says."""
    device = await rig.tracked()
    snapshot = await rig.service.snapshots.create([device], MINE)
    fake.fail(snapshot.id, device.origin, 5, "the storage cannot be written")
    await rig.told("corrupted")
    assert rig.watcher.told[-2:] == [
        "~snapshot failed",
        "corrupted disk_2eimg 5 the storage cannot be written, failed",
    ]
    assert snapshot.status.error == "the storage cannot be written"


async def test_storage_that_fills_is_told(rig: Running, fake: FakeDatapath) -> None:
    """First that it is low, then that it is full."""
    snapshot = await rig.service.snapshots.create([await rig.tracked()], MINE)
    fake.snapshots[snapshot.id].used = 900
    fake.tell(event="snapshot.low-space", snapshot=snapshot.id, used=900, limit=1000)
    await rig.told("low space 900/1000")
    assert snapshot.status.used == 900
    fake.snapshots[snapshot.id].state = "failed"
    fake.tell(event="snapshot.no-space", snapshot=snapshot.id, requested=65_536)
    await rig.told("no space 65536, failed")


async def test_events_about_what_is_not_there_are_ignored(rig: Running, fake: FakeDatapath) -> None:
    """A snapshot may have gone while the event was on its way; a newer data path may know more events."""
    snapshot = await rig.service.snapshots.create([await rig.tracked()], MINE)
    fake.tell(event="snapshot.low-space", snapshot="gone", used=1, limit=2)
    fake.tell(event="snapshot.melted", snapshot=snapshot.id)
    fake.tell(event="weather")
    fake.tell(event="snapshot.low-space", snapshot=snapshot.id)
    fake.tell(event="snapshot.low-space", snapshot=snapshot.id, used=3, limit=4)
    await rig.told("low space 3/4")
