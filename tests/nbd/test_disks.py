# SPDX-License-Identifier: GPL-2.0-or-later
"""Loop devices and small file systems under origins and storages. All of it needs root."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nbd import nbdwire as nbd
from tests.nbd.control import Refused, opened
from tests.nbd.datapath import BLOCK, MIB, Datapath, Origin, qemu_io, run
from tests.nbd.load import running
from tests.nbd.nbdwire import Client, NbdError, content_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="not root: mounts and loop devices need it")

BLOCK_DEVICE = os.O_RDWR | os.O_EXCL | os.O_DIRECT


@contextlib.contextmanager
def mounted(source: str | Path, place: Path, *options: str) -> Iterator[None]:
    """Mount something for the block."""
    run("mount", *options, source, place)
    try:
        yield
    finally:
        # Lazily: the data path of a failed test still holds a file of it.
        run("umount", "--lazy", place)


@contextlib.contextmanager
def loop_device(path: Path, *options: str) -> Iterator[Path]:
    """Make a block device of a file for the block."""
    device = run("losetup", "--find", "--show", *options, path).strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def frozen(place: Path) -> Iterator[None]:
    """Let no write to a mounted file system end during the block."""
    run("fsfreeze", "--freeze", place)
    try:
        yield
    finally:
        run("fsfreeze", "--unfreeze", place)


@pytest.fixture
def place(directory: Path) -> Path:
    """An empty directory to mount something on."""
    place = directory / "place"
    place.mkdir()
    return place


@pytest.fixture
def small(place: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with mounted("blksnap-test", place, "-t", "tmpfs", "-o", f"size={2 * MIB}"):
        yield place


@pytest.fixture
def freezable(datapath: Datapath, place: Path) -> Iterator[Path]:
    """An ext4 on a loop device, with a file ``disk`` of 8 MiB in it."""
    backing = datapath.image_file(64 * MIB)
    run("mkfs.ext4", "-q", backing)
    with loop_device(backing) as device, mounted(device, place):
        with (place / "disk").open("wb") as file:
            file.truncate(8 * MIB)
        yield place


@pytest.fixture
def full(datapath: Datapath) -> Origin:
    """An origin of 8 MiB without a zero block: every first write costs a chunk."""
    return datapath.add(8 * MIB, content=random.Random(1).randbytes(8 * MIB))


def leave(origin: Origin) -> None:
    """Remove an origin, so that what is below it can go."""
    origin.wait_for_no_clients()
    origin.remove()


def test_a_block_device_as_storage(datapath: Datapath, full: Origin) -> None:
    """A loop device, to its end when no limit is told; nothing of it grows."""
    before = full.content()
    with loop_device(datapath.image_file(32 * MIB)) as device:
        with opened(device, os.O_RDWR | os.O_EXCL) as fd:
            snapshot = datapath.create(storage=fd, limit=0)
        assert (snapshot.info().limit, snapshot.info().allocated) == (32 * MIB, 32 * MIB)
        snapshot.take(full)
        qemu_io(full.uri(), "write -P 1 0 3M", "write -z 4M 1M", "write -P 2 7000000 1000")
        assert content_of(full.socket, snapshot.name) == before
        assert snapshot.info().used == 65 * BLOCK
        snapshot.destroy()


def test_a_block_device_that_is_too_small_for_the_changes(datapath: Datapath, full: Origin) -> None:
    """Its end is the limit: the snapshot fails there, the origin does not notice."""
    with loop_device(datapath.image_file(MIB)) as device, datapath.events() as events:
        with opened(device, os.O_RDWR | os.O_EXCL) as fd:
            snapshot = datapath.create(storage=fd, limit=1 << 30)
        assert snapshot.info().limit == MIB
        snapshot.take(full)
        qemu_io(full.uri(), "write -P 1 0 8M", "read -P 1 0 8M")
        assert events.wait_for("snapshot.failed")["errno"] == errno.ENOSPC
        snapshot.destroy()


def test_an_origin_that_is_a_block_device(datapath: Datapath, directory: Path) -> None:
    """O_DIRECT on a loop device: sectors only, tracked and taken like a file."""
    content = random.Random(4).randbytes(16 * MIB)
    backing = datapath.image_file(16 * MIB, content)
    with loop_device(backing, "--sector-size=512") as device:
        origin = datapath.add(path=device, flags=BLOCK_DEVICE)
        assert (origin.info().kind, origin.info().size) == ("block", 16 * MIB)
        snapshot = datapath.create()
        snapshot.take(origin)
        with Client(origin.socket) as client:
            client.write(512, b"x" * 1536)
            client.write(5 * MIB, b"y" * 3 * MIB)
            client.command(nbd.WRITE_ZEROES, 9 * MIB, MIB)
            assert client.read(512, 1536) == b"x" * 1536
            for offset, length in ((1, 512), (512, 100)):
                with pytest.raises(NbdError) as caught:
                    client.read(offset, length)
                assert caught.value.errno == errno.EINVAL
        assert content_of(origin.socket, snapshot.name) == content
        run("nbdcopy", origin.uri(snapshot.name), directory / "out")
        assert (directory / "out").read_bytes() == content
        assert origin.maps().changed(1, live=True) == {0, *range(80, 128), *range(144, 160)}
        snapshot.destroy()
        leave(origin)
    now = backing.read_bytes()
    assert now[512:2048] == b"x" * 1536
    assert now[9 * MIB : 10 * MIB] == bytes(MIB)


def test_a_file_system_without_room_is_refused_at_once(datapath: Datapath, small: Path) -> None:
    """The first step is allocated before the answer: no room means no snapshot."""
    with opened(small / "storage", os.O_RDWR | os.O_CREAT) as fd, pytest.raises(Refused) as caught:
        datapath.create(storage=fd, limit=1 << 30)
    assert (caught.value.code, caught.value.errno) == ("no-space", errno.ENOSPC)
    assert datapath.control.call("list")["snapshots"] == []


def test_a_file_system_that_fills_up_fails_the_snapshot(
    datapath: Datapath, full: Origin, small: Path
) -> None:
    """Below its limit, but with no room behind it: the same as an overflow, and the origin goes on."""
    with datapath.events() as events, opened(small / "storage", os.O_RDWR | os.O_CREAT) as fd:
        snapshot = datapath.create(storage=fd, limit=1 << 30, step=MIB // 2)
        snapshot.take(full)
        qemu_io(full.uri(), "write -P 1 0 6M", "read -P 1 0 6M")
        events.wait_for("snapshot.no-space")
        assert events.wait_for("snapshot.failed")["errno"] == errno.ENOSPC
        with pytest.raises(NbdError):
            content_of(full.socket, snapshot.name)
        snapshot.destroy()


def test_an_image_file_without_room_behind_it_tells_its_writer(datapath: Datapath, small: Path) -> None:
    """A sparse origin on a full file system: ENOSPC for the client, tracking goes on."""
    with (small / "image").open("wb") as file:
        file.truncate(8 * MIB)
    origin = datapath.add(path=small / "image")
    with Client(origin.socket) as client:
        client.write(0, b"x" * MIB)
        with pytest.raises(NbdError) as caught:
            client.write(MIB, b"y" * 4 * MIB)
        assert caught.value.errno == errno.ENOSPC
        assert client.read(0, MIB) == b"x" * MIB
    assert origin.info().state == "tracking"
    assert set(range(2 * MIB // BLOCK)) <= origin.maps().changed(0, live=True)
    leave(origin)


def test_a_take_that_cannot_close_a_gate_leaves_no_trace(datapath: Datapath, freezable: Path) -> None:
    """A write is stuck in a disk: the take ends in time with an error, later ones get the number it would have had."""
    with loop_device(freezable / "disk") as device:
        origin, other = datapath.add(path=device, flags=BLOCK_DEVICE), datapath.add()
        snapshot = datapath.create()
        with Client(origin.socket) as client:
            with frozen(freezable):
                cookie = client.send(nbd.WRITE, 0, 4096, b"x" * 4096)
                began = time.monotonic()
                with pytest.raises(Refused) as caught:
                    snapshot.take(other, origin, timeout_ms=300)
                assert caught.value.code == "timed-out"
                assert time.monotonic() - began < 5
                assert snapshot.info().state == "created"
                qemu_io(other.uri(), "write -P 1 0 64k")
            client.answer(cookie)
        taken = snapshot.take(other, origin)
        assert [image.number for image in taken.images] == [1, 1]
        assert content_of(origin.socket, snapshot.name)[:4096] == b"x" * 4096
        snapshot.destroy()
        leave(origin)


def test_an_image_file_whose_disk_hangs_keeps_nobody_from_the_others(
    datapath: Datapath, freezable: Path
) -> None:
    """Writes of a file are made in place: its queue thread hangs with them, and only that one.

    A take with it ends in time, the list still comes, others are taken; when the disk is back all goes on.
    """
    origin, other = datapath.add(path=freezable / "disk"), datapath.add()
    with Client(origin.socket) as client:
        with frozen(freezable):
            cookie = client.send(nbd.WRITE, 0, 4096, b"x" * 4096)
            time.sleep(0.2)
            began = time.monotonic()
            with pytest.raises(Refused) as caught:
                datapath.create().take(other, origin, timeout_ms=300)
            assert caught.value.code == "timed-out"
            names = [reading["origin"] for reading in datapath.control.call("list")["origins"]]
            assert other.name in names
            assert datapath.create().take(other).images[0].number == 1
            qemu_io(other.uri(), "write -P 1 0 64k")
            assert time.monotonic() - began < 15
        client.answer(cookie)
    assert datapath.create().take(other, origin).images[1].number == 1
    for snapshot in datapath.control.call("list")["snapshots"]:
        datapath.control.call("snapshot.destroy", snapshot=snapshot["snapshot"])
    leave(origin)


@pytest.mark.timeout(120)
def test_an_origin_whose_removal_was_given_up_can_be_removed_later(
    datapath: Datapath, freezable: Path
) -> None:
    """The disk comes back after the removal was answered with an error: the origin is not lost between the two."""
    with loop_device(freezable / "disk") as device:
        origin = datapath.add(path=device, flags=BLOCK_DEVICE)
        with Client(origin.socket) as client, frozen(freezable):
            client.send(nbd.WRITE, 0, 4096, b"x" * 4096)
            time.sleep(0.2)
            with pytest.raises(Refused) as caught:
                origin.remove(force=True)
            assert caught.value.code == "timed-out"
        # The queue thread ends when the write does.
        final = origin.remove(force=True)
        assert 0 in final.changed(0, live=True)
        again = datapath.add(path=device, flags=BLOCK_DEVICE)
        with Client(again.socket) as client:
            assert client.read(0, 4096) == b"x" * 4096
        leave(again)


@pytest.mark.timeout(120)
def test_a_storage_whose_disk_hangs_holds_up_nobody_else(datapath: Datapath, freezable: Path) -> None:
    """Its snapshot is given up after a while and its origin's writers go on; other snapshots are not even delayed.

    That holds for their events, too, which come while the disk still hangs.
    """
    contents = [random.Random(number).randbytes(32 * MIB) for number in (1, 2)]
    origin, other = (datapath.add(len(content), content=content) for content in contents)
    with opened(freezable / "storage", os.O_RDWR | os.O_CREAT) as fd:
        hanging = datapath.create(storage=fd, limit=48 * MIB, step=MIB)
    small = datapath.create(limit=2 * MIB)
    hanging.take(origin)
    small.take(other)
    with datapath.events() as events, Client(origin.socket, seconds=60) as client:

        def write(_stopping: Callable[[], bool]) -> None:
            # More than its staging holds: the writer has to wait until the snapshot is given up.
            client.write(0, b"x" * 16 * MIB)

        with frozen(freezable), running(write):
            began = time.monotonic()
            qemu_io(other.uri(), "write -P 1 0 8M", "read -P 1 0 8M")
            assert events.wait_for("snapshot.failed", 5)["snapshot"] == small.name
            assert time.monotonic() - began < 5
            events.seen.clear()
            failed = events.wait_for("snapshot.failed", 45)
            assert (failed["snapshot"], failed["errno"]) == (hanging.name, errno.ETIMEDOUT)
            with pytest.raises(NbdError):
                content_of(origin.socket, hanging.name)
        hanging.destroy()
    assert origin.content() == b"x" * 16 * MIB + contents[0][16 * MIB :]
