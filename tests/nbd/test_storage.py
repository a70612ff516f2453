# SPDX-License-Identifier: GPL-2.0-or-later
"""The difference storage: files of every kind, and what happens when it is full, small, cut or read-only."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.nbd.control import Refused, opened
from tests.nbd.datapath import BLOCK, MIB, Datapath, Origin, Snapshot, qemu_io, run
from tests.nbd.load import FIO_BYTES, fio
from tests.nbd.nbdwire import Client, NbdError, content_of


@pytest.fixture
def full(datapath: Datapath) -> Origin:
    """An origin of 8 MiB without a zero block: every first write costs a chunk."""
    return datapath.add(8 * MIB, content=random.Random(1).randbytes(8 * MIB))


def check_image(origin: Origin, snapshot: Snapshot) -> None:
    """Write all over the origin and check that the image holds what was there."""
    before = origin.content()
    snapshot.take(origin)
    qemu_io(origin.uri(), "write -P 1 0 3M", "write -z 4M 1M", "write -P 2 7000000 1000")
    assert origin.content() != before
    assert content_of(origin.socket, snapshot.name) == before
    reading = snapshot.info()
    assert reading.state == "taken"
    assert 0 < reading.used <= reading.allocated <= reading.limit
    assert origin.info().counters["copies"] * BLOCK == reading.used


def test_a_named_file(datapath: Datapath, full: Origin, directory: Path) -> None:
    """A file grows as it is used and is released with the snapshot."""
    with opened(directory / "storage", os.O_RDWR | os.O_CREAT) as fd:
        snapshot = datapath.create(storage=fd, limit=64 * MIB, step=MIB)
    check_image(full, snapshot)
    assert (directory / "storage").stat().st_size == snapshot.info().allocated
    before = datapath.descriptors()
    snapshot.destroy()
    assert datapath.descriptors() < before


def test_an_unnamed_file(datapath: Datapath, full: Origin, directory: Path) -> None:
    """O_TMPFILE: nothing of it is left in the directory, not even meanwhile."""
    with opened(directory, os.O_RDWR | os.O_TMPFILE) as fd:
        snapshot = datapath.create(storage=fd, limit=64 * MIB)
    names = set(directory.iterdir())
    check_image(full, snapshot)
    assert set(directory.iterdir()) == names


def test_a_file_on_tmpfs(datapath: Datapath, full: Origin) -> None:
    """Memory as storage."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        snapshot = datapath.create(storage=file.fileno(), limit=64 * MIB)
    check_image(full, snapshot)


@pytest.mark.parametrize("chunk_size", [4096, BLOCK, MIB, 16 * MIB])
def test_every_size_of_chunk(datapath: Datapath, chunk_size: int) -> None:
    """Small chunks, and chunks larger than what is written, than staging and than the origin's last one."""
    content = random.Random(3).randbytes(20 * MIB + 777)
    origin = datapath.add(len(content), content=content)
    snapshot = datapath.create(chunk_size=chunk_size, limit=1 << 30)
    snapshot.take(origin)
    qemu_io(
        origin.uri(),
        "write -P 1 100 5M",
        "write -z 6M 9M",
        "write -P 2 19M 1M",
        f"write -P 3 {20 * MIB + 776} 1",
    )
    assert content_of(origin.socket, snapshot.name) == content
    assert snapshot.info().used % chunk_size == 0


def test_zeros_take_no_room(datapath: Datapath, origin: Origin) -> None:
    """Old data that is all zero is remembered and not stored."""
    snapshot = datapath.create()
    snapshot.take(origin)
    qemu_io(origin.uri(), "write -P 1 0 16M")
    assert snapshot.info().used == 0
    assert not any(content_of(origin.socket, snapshot.name))


def test_a_discard_waits_for_no_image(datapath: Datapath, full: Origin) -> None:
    """While a snapshot is held a discard is skipped: it is advice, and the image is worth more than the room."""
    before = full.content()
    snapshot = datapath.create()
    snapshot.take(full)
    qemu_io(full.uri(), "discard 0 8M")
    assert full.info().counters["discards_skipped"] == 1
    assert content_of(full.socket, snapshot.name) == before == full.content()
    assert full.maps().changed(1, live=True) == set()
    snapshot.destroy()
    qemu_io(full.uri(), "discard 0 8M")
    assert not any(full.content())


@pytest.mark.timeout(120)
def test_an_overflow_fails_the_snapshot_and_nothing_else(datapath: Datapath, directory: Path) -> None:
    """Clients of the origin go on and verify; readers of the image get EIO; who watches is told in order.

    A second snapshot with room of its own stays good.
    """
    origin = datapath.add(FIO_BYTES, content=random.Random(2).randbytes(FIO_BYTES))
    before = origin.content()
    small, large = datapath.create(limit=2 * MIB, low_space=MIB), datapath.create()
    for snapshot in (small, large):
        snapshot.take(origin)
    with datapath.events() as events, Client(origin.socket, small.name) as reader:
        assert reader.read(0, 4096) == before[:4096]
        fio(origin, 1, loops=2)
        low = events.wait_for("snapshot.low-space")
        events.wait_for("snapshot.no-space")
        failed = events.wait_for("snapshot.failed")
        assert [event["event"] for event in events.seen] == [
            "snapshot.low-space",
            "snapshot.no-space",
            "snapshot.failed",
        ]
        assert {event["snapshot"] for event in events.seen} == {small.name}
        assert low["used"] >= MIB
        assert low["limit"] == 2 * MIB
        assert (failed["origin"], failed["errno"]) == (origin.name, errno.ENOSPC)
        with pytest.raises(NbdError) as caught:
            reader.read(0, 4096)
        assert caught.value.errno == errno.EIO
    reading = small.info()
    assert (reading.state, reading.low, reading.errno) == ("failed", True, errno.ENOSPC)
    assert reading.used <= reading.limit
    convert = ("qemu-img", "convert", "-f", "raw", "-O", "raw", origin.uri(small.name), directory / "out")
    assert "Input/output error" in run(*convert, status=1)
    assert content_of(origin.socket, large.name) == before
    small.destroy()
    again = datapath.create()
    again.take(origin)
    assert content_of(origin.socket, again.name) == origin.content()


def test_a_failed_image_promises_no_holes(datapath: Datapath, full: Origin, directory: Path) -> None:
    """What a trim took from the origin after the failure is not shown as "a hole" of the image: the copy fails."""
    snapshot = datapath.create(limit=MIB)
    snapshot.take(full)
    qemu_io(full.uri(), "write -P 1 0 2M", "discard 0 8M")
    assert snapshot.info().state == "failed"
    for context in ("base:allocation", "blksnap:since:0"):
        run("nbdinfo", f"--map={context}", full.uri(snapshot.name), status=1)
    run("nbdcopy", full.uri(snapshot.name), directory / "out", status=1)


def test_who_asks_late_misses_nothing(datapath: Datapath, full: Origin) -> None:
    """The state says what the events said."""
    snapshot = datapath.create(limit=MIB)
    snapshot.take(full)
    with datapath.events() as early:
        qemu_io(full.uri(), "write -P 1 0 4M")
        early.wait_for("snapshot.failed")
    reading = snapshot.info()
    assert (reading.state, reading.low, reading.images[0].error) == ("failed", True, reading.error)
    assert "full" in reading.error


def test_a_storage_that_cannot_be_written_is_refused(datapath: Datapath, directory: Path) -> None:
    """A descriptor that was opened for reading."""
    (directory / "storage").touch()
    with opened(directory / "storage", os.O_RDONLY) as fd, pytest.raises(Refused) as caught:
        datapath.create(storage=fd, limit=MIB)
    assert (caught.value.code, caught.value.errno) == ("io", errno.EBADF)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "origin"])
def test_a_storage_of_the_wrong_kind_is_refused(
    datapath: Datapath, origin: Origin, directory: Path, kind: str
) -> None:
    """Neither a pipe, nor a directory, nor a character device, nor a tracked image file."""
    os.mkfifo(directory / "pipe")
    path, flags = {
        "pipe": (directory / "pipe", os.O_RDWR),
        "directory": (directory, os.O_RDONLY),
        "device": (Path("/dev/null"), os.O_RDWR),
        "origin": (origin.path, os.O_RDWR),
    }[kind]
    with opened(path, flags) as fd, pytest.raises(Refused) as caught:
        datapath.create(storage=fd)
    assert caught.value.code == "invalid"


def test_a_storage_serves_one_purpose(datapath: Datapath) -> None:
    """The storage of a snapshot is no other snapshot's, and no origin."""
    with opened(datapath.directory, os.O_RDWR | os.O_TMPFILE) as fd:
        datapath.create(storage=fd)
        with pytest.raises(Refused) as caught:
            datapath.create(storage=fd)
        assert caught.value.code == "busy"
        with pytest.raises(Refused) as caught:
            datapath.add(path=Path(f"/proc/self/fd/{fd}"))
        assert caught.value.code == "busy"


@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 5000}, {"chunk_size": 2048}, {"chunk_size": 32 * MIB}, {"limit": 0}, {"limit": 1 << 63}],
    ids=str,
)
def test_impossible_options_are_refused(datapath: Datapath, options: dict[str, Any]) -> None:
    """A chunk that is none, a limit that is none."""
    with pytest.raises(Refused) as caught:
        datapath.create(**options)
    assert caught.value.code == "invalid"


def test_a_storage_that_was_cut_fails_the_snapshot(datapath: Datapath, full: Origin, directory: Path) -> None:
    """Somebody truncates the storage file: the image says EIO instead of inventing bytes."""
    with opened(directory / "storage", os.O_RDWR | os.O_CREAT) as fd:
        snapshot = datapath.create(storage=fd, limit=64 * MIB)
    snapshot.take(full)
    qemu_io(full.uri(), "write -P 1 0 1M")
    os.truncate(directory / "storage", 0)
    with pytest.raises(NbdError) as caught:
        content_of(full.socket, snapshot.name)
    assert caught.value.errno == errno.EIO
    qemu_io(full.uri(), "write -P 2 2M 1M", "read -P 1 0 1M")
    assert snapshot.info().state == "failed"
