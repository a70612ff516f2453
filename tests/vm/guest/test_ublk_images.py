# SPDX-License-Identifier: GPL-2.0-or-later
"""Images of ublk origins as block devices: constant whatever is written, writable when asked, gone when destroyed."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.datapath import Datapath
from tests.vm.guest import devices, ublk
from tests.vm.guest.ublk import MIB

SIZE = 32 * MIB


@pytest.fixture
def datapath() -> Iterator[Datapath]:
    """A running data path."""
    with ublk.datapath() as running:
        yield running


def digest(node: Path) -> str:
    """A checksum of all bytes."""
    return hashlib.sha256(ublk.read(node)).hexdigest()


def test_images_stay_as_they_were_under_writes(datapath: Datapath) -> None:
    """Four takes while random verified writes go on: each image reads the same at its take, during them and at the end."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        held = []
        with ublk.writer(tracked):
            for _ in range(4):
                snapshot, images = ublk.take(tracked)
                held.append((snapshot, images[0], digest(images[0])))
            for _, image, seen in held:
                assert digest(image) == seen
        for _, image, seen in held:
            assert digest(image) == seen
        for snapshot, image, _ in held:
            snapshot.destroy()
            assert not image.exists()
        assert tracked.counters()["copies"] > 0
        tracked.remove()


def test_the_map_between_two_takes_misses_nothing(datapath: Datapath) -> None:
    """What differs between two images is marked as changed between their numbers."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk, block_size=4096)
        previous, number = None, 0
        with ublk.writer(tracked):
            for _ in range(4):
                snapshot, images = ublk.take(tracked)
                content = ublk.read(images[0])
                info = tracked.origin.info()
                marked = {
                    block
                    for block, byte in enumerate(snapshot.taken_maps[tracked.origin.name])
                    if byte and info.taken_base + byte > number
                }
                if previous is not None:
                    differ = ublk.differing(previous, content, info.block_size)
                    assert differ
                    assert not differ - marked
                previous, number = content, info.changes
                snapshot.destroy()
                ublk.await_writes(tracked, 50)
        tracked.remove()


def test_a_file_system_of_an_image_mounts(datapath: Datapath, tmp_path: Path) -> None:
    """Read-only, with the files of its moment; the image is a read-only device without partitions."""
    live, past = tmp_path / "live", tmp_path / "past"
    live.mkdir()
    past.mkdir()
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        devices.run("mkfs.ext4", "-q", str(tracked.node))
        devices.run("mount", str(tracked.node), str(live))
        try:
            (live / "then").write_text("then")
            os.sync()
            snapshot, (image,) = ublk.take(tracked)
            (live / "then").write_text("now")
            (live / "later").write_text("later")
            os.sync()
            assert Path("/sys/class/block", image.name, "ro").read_text() == "1\n"
            devices.run("mount", "-o", "ro,noload", str(image), str(past))
            try:
                assert {path.name for path in past.iterdir()} == {"lost+found", "then"}
                assert (past / "then").read_text() == "then"
            finally:
                devices.run("umount", str(past))
            snapshot.destroy()
        finally:
            devices.run("umount", str(live))
        tracked.remove()


def test_a_writable_image_takes_writes_of_its_own(datapath: Datapath) -> None:
    """The origin and other images do not see them."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        ublk.fio("fill", *ublk.verified_writes(tracked.node, 4 * MIB))
        kept, (constant,) = ublk.take(tracked)
        snapshot, (image,) = ublk.take(tracked, writable=True)
        before, seen = digest(tracked.node), digest(constant)
        ublk.fio("v", *ublk.verified_writes(image, 8 * MIB))
        assert digest(tracked.node) == before
        assert digest(constant) == seen
        assert digest(image) != seen
        snapshot.destroy()
        kept.destroy()
        tracked.remove()


def test_discards_under_a_held_image_do_nothing(datapath: Datapath) -> None:
    """The image is worth more than the room; they are counted apart."""
    with devices.null_blk(SIZE, discard=True) as disk:
        tracked = ublk.track(datapath, disk)
        ublk.write(tracked.node, 0, b"old!" * (MIB // 4))
        snapshot, (image,) = ublk.take(tracked)
        devices.run("blkdiscard", "-f", str(tracked.node))
        assert tracked.counters()["discards_skipped"] > 0
        assert ublk.read(image)[:MIB] == b"old!" * (MIB // 4)
        snapshot.destroy()
        tracked.remove()


def test_images_of_several_origins_are_of_one_take(datapath: Datapath) -> None:
    """Each has its device."""
    with devices.null_blk(SIZE) as one, devices.null_blk(SIZE) as other:
        first, second = ublk.track(datapath, one), ublk.track(datapath, other)
        ublk.write(first.node, 0, b"1" * 4096)
        ublk.write(second.node, 0, b"2" * 4096)
        snapshot, images = ublk.take(first, second)
        assert [ublk.read(image)[:1] for image in images] == [b"1", b"2"]
        assert [image.path for image in snapshot.info().images] == [str(image) for image in images]
        snapshot.destroy()
        first.remove()
        second.remove()


def test_forced_removal_takes_the_images_along(datapath: Datapath) -> None:
    """Their nodes are gone; the snapshot is failed and can be destroyed."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        snapshot, (image,) = ublk.take(tracked)
        tracked.remove(force=True)
        assert not image.exists()
        assert not tracked.node.exists()
        assert snapshot.info().state == "failed"
        snapshot.destroy()


def test_sixteen_images_at_once(datapath: Datapath) -> None:
    """As many as may be held, all the same bytes when nothing is written between them."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        ublk.write(tracked.node, 0, b"x" * MIB)
        held = [ublk.take(tracked) for _ in range(16)]
        ublk.write(tracked.node, 0, b"y" * MIB)
        assert {ublk.read(image)[:MIB] for _, (image,) in held} == {b"x" * MIB}
        for snapshot, _ in held:
            snapshot.destroy()
        assert not list(Path("/dev").glob("ublkb[1-9]*"))
        tracked.remove()
