# SPDX-License-Identifier: GPL-2.0-or-later
"""File systems stand still around a take: clean in the image, never for long, never for ever."""

import os
import time
from pathlib import Path

import pytest

from tests.nbd.control import Refused, opened
from tests.nbd.datapath import Datapath
from tests.vm.guest import devices, nodes, ublk
from tests.vm.guest.ublk import MIB

SIZE = 64 * MIB
XFS_SIZE = 320 * MIB
"""mkfs.xfs makes none below 300 MiB."""


def writes_to(directory: Path) -> None:
    """A small file that is on the disk when this returns."""
    with opened(directory / "probe", os.O_WRONLY | os.O_CREAT) as fd:
        os.pwrite(fd, b"x" * 512, 0)
        os.fsync(fd)


@pytest.mark.parametrize(
    "kind, size, options",
    [("ext4", SIZE, "ro,noload"), ("xfs", XFS_SIZE, "ro,norecovery,nouuid")],
)
def test_a_file_system_on_a_top_is_clean_in_the_image(
    datapath: Datapath, tmp_path: Path, kind: str, size: int, options: str
) -> None:
    """With all that was written and not yet on the disk; without a freeze ext4 is not clean."""
    with devices.brd(size) as disk:
        tracked = nodes.tracked_top(datapath, disk, "blksnap-test")
        nodes.make_file_system(tracked.node, kind)
        with nodes.mounted(tracked.node, tmp_path / "m") as directory:
            (directory / "file").write_bytes(b"frozen" * 100_000)
            taken = nodes.take_all([tracked])
            image = Path(taken["images"][0]["path"])
            assert nodes.is_clean(image, kind)
            with nodes.mounted(image, tmp_path / "image", "-o", options) as old:
                assert (old / "file").read_bytes() == b"frozen" * 100_000
            taken["snapshot"].destroy()

            writes_to(directory)
            torn = nodes.take_all([tracked], freeze=False)
            assert kind == "xfs" or not nodes.is_clean(Path(torn["images"][0]["path"]), kind)
            torn["snapshot"].destroy()
        tracked.remove()


def test_a_file_system_is_clean_in_the_image_while_it_is_written(datapath: Datapath, tmp_path: Path) -> None:
    """Take after take under verified writes; none of these fails."""
    with devices.brd(2 * SIZE) as disk:
        tracked = nodes.tracked_top(datapath, disk, "blksnap-test")
        nodes.make_file_system(tracked.node, "ext4")
        with (
            nodes.mounted(tracked.node, tmp_path / "m") as directory,
            nodes.load(directory / "file", 8 * MIB),
        ):
            for _ in range(5):
                taken = nodes.take_all([tracked])
                assert nodes.is_clean(Path(taken["images"][0]["path"]), "ext4")
                taken["snapshot"].destroy()
        assert nodes.is_clean(tracked.node, "ext4")
        tracked.remove()


def test_a_live_volume_is_clean_in_the_image(datapath: Datapath, tmp_path: Path) -> None:
    """The device we are under is what is suspended."""
    with devices.brd(2 * SIZE) as disk, devices.lvm_lv(disk, SIZE) as volume:
        nodes.make_file_system(volume, "ext4")
        with nodes.mounted(volume, tmp_path / "m") as directory:
            tracked = nodes.insert(datapath, nodes.mapped_name(volume))
            writes_to(directory)
            taken = nodes.take_all([tracked])
            assert nodes.is_clean(Path(taken["images"][0]["path"]), "ext4")
            writes_to(directory)
            taken["snapshot"].destroy()
            tracked.remove()


def test_a_mount_point_that_is_sent_is_frozen(datapath: Datapath, tmp_path: Path) -> None:
    """For a ublk device without a top."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        nodes.make_file_system(tracked.node, "ext4")
        with nodes.mounted(tracked.node, tmp_path / "m") as directory:
            writes_to(directory)
            with opened(directory, os.O_RDONLY) as fd:
                taken = nodes.take_all([tracked], mounts=[fd])
            assert nodes.is_clean(Path(taken["images"][0]["path"]), "ext4")
            writes_to(directory)
            taken["snapshot"].destroy()
        tracked.remove()


def test_a_storage_on_a_file_system_to_be_frozen_is_refused(datapath: Datapath, tmp_path: Path) -> None:
    """With the reason; the file system goes on, and without a freeze the take is made."""
    with devices.brd(2 * SIZE) as disk:
        tracked = nodes.tracked_top(datapath, disk, "blksnap-test")
        nodes.make_file_system(tracked.node, "ext4")
        with nodes.mounted(tracked.node, tmp_path / "m") as directory:
            with opened(directory / "storage", os.O_RDWR | os.O_CREAT) as storage:
                snapshot = datapath.create(storage=storage, limit=16 * MIB)
            with pytest.raises(Refused, match="would be frozen") as refused:
                nodes.take_all([tracked], snapshot=snapshot)
            assert refused.value.code == "invalid"
            writes_to(directory)
            nodes.take_all([tracked], snapshot=snapshot, freeze=False)
            snapshot.destroy()
        tracked.remove()


def test_what_cannot_be_frozen_fails_the_take_and_all_goes_on(datapath: Datapath, tmp_path: Path) -> None:
    """Here another program has frozen one of the two."""
    with devices.brd(SIZE) as disk, devices.null_blk(SIZE) as other:
        first = nodes.tracked_top(datapath, disk, "blksnap-test")
        second = ublk.track(datapath, other)
        for one in (first, second):
            nodes.make_file_system(one.node, "ext4")
        with (
            nodes.mounted(first.node, tmp_path / "a") as a,
            nodes.mounted(second.node, tmp_path / "b") as b,
            opened(b, os.O_RDONLY) as fd,
        ):
            devices.run("fsfreeze", "--freeze", str(b))
            with pytest.raises(Refused, match="another program") as refused:
                nodes.take_all([first, second], mounts=[fd])
            assert refused.value.code == "busy"
            writes_to(a)
            devices.run("fsfreeze", "--unfreeze", str(b))
            writes_to(b)
            assert [one.origin.info().changes for one in (first, second)] == [0, 0]
        first.remove()
        second.remove()


def test_what_lies_on_another_is_frozen_first(datapath: Datapath, tmp_path: Path) -> None:
    """A file system in a file on another one, both in the take, in either order."""
    with devices.brd(2 * SIZE) as disk:
        outer = nodes.tracked_top(datapath, disk, "blksnap-outer")
        nodes.make_file_system(outer.node, "ext4")
        with nodes.mounted(outer.node, tmp_path / "outer") as directory:
            file = directory / "disk"
            file.touch()
            os.truncate(file, SIZE)
            with devices.loop(file) as loop:
                inner = nodes.tracked_top(datapath, loop, "blksnap-inner")
                nodes.make_file_system(inner.node, "ext4")
                with nodes.mounted(inner.node, tmp_path / "inner") as inside:
                    for order in ([inner, outer], [outer, inner]):
                        (inside / "file").write_bytes(os.urandom(MIB))
                        started = time.monotonic()
                        taken = nodes.take_all(order)
                        assert time.monotonic() - started < 9
                        for image in taken["images"]:
                            assert nodes.is_clean(Path(image["path"]), "ext4")
                        taken["snapshot"].destroy()
                inner.remove()
        outer.remove()


def test_the_watchdog_thaws_what_a_hanging_disk_would_keep_frozen(datapath: Datapath, tmp_path: Path) -> None:
    """One file system is frozen when the disk of another device of the set hangs: after ten seconds it goes on."""
    sectors = SIZE // 512
    with (
        devices.brd(SIZE) as disk,
        devices.dm("lower", f"0 {sectors} linear {disk} 0") as lower,
        devices.dm("upper", f"0 {sectors} linear {lower} 0") as upper,
        devices.null_blk(SIZE) as other,
        devices.dm("hanging", f"0 {sectors} linear {other} 0") as hanging,
    ):
        # The one with more below it is frozen first.
        first = nodes.tracked_top(datapath, upper, "blksnap-first")
        second = nodes.tracked_top(datapath, hanging, "blksnap-second")
        nodes.make_file_system(first.node, "ext4")
        with nodes.mounted(first.node, tmp_path / "m") as directory, opened(second.node) as raw:
            os.pwrite(raw, b"dirty" * 4096, 0)
            devices.run("dmsetup", "suspend", "--nolockfs", "hanging")
            started = time.monotonic()
            taking = nodes.Attempt(lambda: nodes.take_all([first, second], timeout_ms=60_000))
            time.sleep(2)
            writing = nodes.Attempt(writes_to, directory)
            assert not writing.ended(4)
            assert writing.ended(20)
            assert time.monotonic() - started < 15
            assert taking.ended(10)
            assert isinstance(taking.error, Refused)
            assert taking.error.code == "timed-out"
            devices.run("dmsetup", "resume", "hanging")
            writes_to(directory)
            os.fsync(raw)
            assert [one.origin.info().changes for one in (first, second)] == [0, 0]
        first.remove()
        second.remove()
