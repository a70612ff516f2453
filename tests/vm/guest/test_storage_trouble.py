# SPDX-License-Identifier: GPL-2.0-or-later
"""A difference storage that fills up, goes away or hangs costs the snapshot, and nobody on the origin notices."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.control import Events, Refused, opened
from tests.nbd.datapath import Datapath, Snapshot
from tests.vm.guest import devices, ublk
from tests.vm.guest.ublk import MIB, Tracked

SIZE = 32 * MIB


@pytest.fixture
def datapath() -> Iterator[Datapath]:
    """A running data path."""
    with ublk.datapath() as running:
        yield running


@pytest.fixture
def tracked(datapath: Datapath) -> Iterator[Tracked]:
    """A disk without a zero block: each first write costs a chunk."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        ublk.fio("fill", f"--filename={tracked.node}", f"--size={SIZE}", "--rw=write", "--bs=256k")
        yield tracked
        # Whatever became of the storage, the tracker is whole.
        assert tracked.origin.info().state == "tracking"
        seen = ublk.read(tracked.node)
        tracked.remove()
        assert ublk.read(disk) == seen


def taken_on(tracked: Tracked, storage: Path) -> tuple[Snapshot, Path]:
    """Take with a block device as storage, past the page cache: what becomes of it is noticed at once."""
    with opened(storage, os.O_RDWR | os.O_DIRECT) as fd:
        snapshot = tracked.datapath.create(storage=fd, limit=0)
    (image,) = snapshot.take(tracked.origin).images
    return snapshot, Path(image.path)


def is_lost(snapshot: Snapshot, image: Path, events: Events, *numbers: int) -> None:
    """The snapshot has failed and says so; its image answers errors."""
    # Longer than a storage may owe a write.
    event = events.wait_for("snapshot.failed", 60)
    assert event["snapshot"] == snapshot.name
    assert event["errno"] in numbers, event
    assert snapshot.info().state == "failed"
    with pytest.raises(OSError, match="Input/output error"):
        ublk.read(image)


def goes(snapshot: Snapshot, image: Path) -> None:
    """It ends as any other does."""
    snapshot.destroy()
    assert not image.exists()


def test_a_full_one(datapath: Datapath, tracked: Tracked) -> None:
    """Who watches is told; verified writes go on."""
    with datapath.events() as events:
        snapshot, (image,) = ublk.take(tracked, storage_bytes=4 * MIB)
        ublk.fio("v", *ublk.verified_writes(tracked.node, 16 * MIB))
        assert events.wait_for("snapshot.no-space")["snapshot"] == snapshot.name
        is_lost(snapshot, image, events, errno.ENOSPC)
        goes(snapshot, image)


def test_one_that_is_pulled_out(datapath: Datapath, tracked: Tracked) -> None:
    """Its disk is removed under load; nothing of ours keeps the driver from being unloaded afterwards."""
    with datapath.events() as events, devices.scsi_debug(SIZE) as storage:
        snapshot, image = taken_on(tracked, storage)
        # Before the writer, who is soon done with all chunks.
        Path("/sys/class/block", storage.name, "device/delete").write_text("1")
        with ublk.writer(tracked):
            # A write that was on its way, or one that found no disk.
            is_lost(snapshot, image, events, errno.EIO, errno.ENODEV, errno.ENXIO)
            assert "snapshot.no-space" not in [event["event"] for event in events.gather()]
            goes(snapshot, image)
            ublk.await_writes(tracked, 50)


def test_one_that_hangs(datapath: Datapath, tracked: Tracked) -> None:
    """It is given up after some seconds in which writers may wait; then they go on, though it still hangs."""
    devices.modprobe("dm-mod")
    with (
        datapath.events() as events,
        devices.null_blk(SIZE) as disk,
        devices.dm("storage", f"0 {SIZE // 512} linear {disk} 0") as storage,
    ):
        snapshot, image = taken_on(tracked, storage)
        devices.run("dmsetup", "suspend", "--nolockfs", "storage")
        try:
            with ublk.writer(tracked):
                is_lost(snapshot, image, events, errno.ETIMEDOUT)
                with pytest.raises(Refused, match="not gone yet") as refused:
                    snapshot.destroy()
                assert refused.value.code == "timed-out"
                ublk.await_writes(tracked, 50)
        finally:
            devices.run("dmsetup", "resume", "storage")
        goes(snapshot, image)
