# SPDX-License-Identifier: GPL-2.0-or-later
"""The block device over an origin: what it takes over, that it loses nothing, that the map misses nothing."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd.control import Refused, opened
from tests.nbd.datapath import Datapath, new_id
from tests.vm.guest import devices, kinds, ublk
from tests.vm.guest.ublk import MIB

SIZE = 32 * MIB


@pytest.fixture
def datapath() -> Iterator[Datapath]:
    """A running data path."""
    with ublk.datapath() as running:
        yield running


def limit(node: Path, name: str) -> str:
    """``/sys/class/block/…/queue/<name>``."""
    return Path("/sys/class/block", node.name, "queue", name).read_text().strip()


def own_threads(datapath: Datapath) -> list[str]:
    """The names of its threads, but for the kernel's workers for io_uring."""
    names = (path.read_text().strip() for path in Path(f"/proc/{datapath.process.pid}/task").glob("*/comm"))
    return [name for name in names if not name.startswith("iou-")]


def test_hello_tells_of_the_driver(datapath: Datapath, kernel: str) -> None:
    """It is there, and pages are used in place where the kernel can (6.16)."""
    hello = datapath.control.call("hello", protocol=1)
    assert hello["ublk"]["available"], hello
    assert "ublk" in hello["features"]
    assert hello["ublk"]["zero_copy"] == (kernel != "6.12")


def test_a_file_system_keeps_what_is_written(datapath: Datapath, tmp_path: Path) -> None:
    """Verified random writes on ext4 over the node; the origin holds the very same bytes, without faults."""
    with devices.brd(2 * SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        devices.run("mkfs.ext4", "-q", str(tracked.node))
        devices.run("mount", str(tracked.node), str(tmp_path))
        try:
            assert tracked.origin.info().clients == 1
            ublk.fio("v", *ublk.verified_writes(tmp_path / "file", 8 * MIB, "--fsync=64"))
            with pytest.raises(Refused, match="in use") as refused:
                tracked.remove()
            assert refused.value.code == "busy"
        finally:
            devices.run("umount", str(tmp_path))
        devices.run("fsck.ext4", "-fn", str(tracked.node))
        seen = ublk.read(tracked.node)
        tracked.remove()
        assert not tracked.node.exists()
        assert ublk.read(disk) == seen


def test_the_node_is_like_the_device_below(datapath: Datapath) -> None:
    """Size, sectors, write cache and discards; no scheduler of its own, and a spare place where a death needs one."""
    with devices.null_blk(SIZE, discard=True, cache_bytes=4 * MIB, block_size=4096) as disk:
        tracked = ublk.track(datapath, disk)
        for name in ("logical_block_size", "physical_block_size", "write_cache", "fua", "rotational"):
            assert limit(tracked.node, name) == limit(disk, name), name
        assert int(limit(tracked.node, "discard_max_bytes")) > 0
        assert limit(tracked.node, "scheduler").startswith("[none]")
        recovers = datapath.control.call("hello", protocol=1)["ublk"]["zero_copy"]
        assert limit(tracked.node, "nr_requests") == ("64" if recovers else "63")
        with opened(tracked.node, os.O_RDONLY) as fd:
            assert os.lseek(fd, 0, os.SEEK_END) == SIZE
        tracked.remove()


def test_flushes_reach_the_origin(datapath: Datapath) -> None:
    """Each fsync of a device with a write cache, and no device without one."""
    with devices.null_blk(SIZE, cache_bytes=4 * MIB) as disk:
        tracked = ublk.track(datapath, disk)
        below = Path("/sys/class/block", disk.name, "stat")

        def flushes() -> int:
            # Documentation/block/stat.rst: the sixteenth value.
            return int(below.read_text().split()[15])

        before, told = flushes(), tracked.counters()["flushes"]
        with opened(tracked.node) as fd:
            for place in range(8):
                os.pwrite(fd, b"x" * 4096, place * 4096)
                os.fsync(fd)
        assert tracked.counters()["flushes"] - told >= 8
        assert flushes() - before >= 8
        tracked.remove()


def test_writes_with_fua_go_through(datapath: Datapath) -> None:
    """O_DSYNC writes become FUA or a flush, and end."""
    with devices.null_blk(SIZE, cache_bytes=4 * MIB) as disk:
        tracked = ublk.track(datapath, disk)
        for place in range(8):
            ublk.write(tracked.node, place * MIB, bytes([place + 1]) * 8192, sync=True)
        seen = ublk.read(tracked.node)
        assert all(seen[place * MIB] == place + 1 for place in range(8))
        tracked.remove()


def test_a_discard_reaches_the_origin(datapath: Datapath) -> None:
    """And counts as a change."""
    with devices.null_blk(SIZE, discard=True) as disk:
        tracked = ublk.track(datapath, disk)
        ublk.write(tracked.node, 0, b"x" * MIB)
        datapath.control.call("origin.reset", origin=tracked.origin.name, generation=new_id())
        devices.run("blkdiscard", "-f", "-l", str(MIB), str(tracked.node))
        assert ublk.read(tracked.node)[:MIB] == bytes(MIB)
        assert tracked.counters()["discarded_bytes"] == MIB
        assert tracked.maps().changed(0, live=True) == set(range(MIB // (64 << 10)))
        tracked.remove()


def test_the_map_misses_no_write(datapath: Datapath) -> None:
    """Every block that differs from the bytes before is marked; a mark without a difference is rare."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk, block_size=4096)
        ublk.fio(
            "fill", f"--filename={tracked.node}", f"--size={SIZE}", "--rw=write", "--bs=256k", "--iodepth=4"
        )
        snapshot, images = ublk.take(tracked)
        before = ublk.read(tracked.node)
        options = (
            "--rw=randwrite",
            "--bsrange=512-96k",
            "--blockalign=512",
            "--number_ios=500",
        )
        ublk.fio(
            "w", f"--filename={tracked.node}", f"--size={SIZE}", *options, "--iodepth=32", "--norandommap"
        )
        after = ublk.read(tracked.node)
        maps = tracked.maps()
        marked, differ = maps.changed(maps.reading.changes, live=True), ublk.differing(before, after, 4096)
        assert differ
        assert not differ - marked
        assert len(marked - differ) <= len(differ) // 100
        assert ublk.read(images[0]) == before
        snapshot.destroy()
        tracked.remove()


def test_readers_of_the_origin_do_not_shorten_writes(datapath: Datapath) -> None:
    """Pages that somebody reads behind our back make direct writes short or repeat; all bytes arrive."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        loop = f"while :; do cat {disk} >/dev/null; done"
        with subprocess.Popen(["/bin/sh", "-c", loop]) as reader:
            try:
                ublk.fio("v", *ublk.verified_writes(tracked.node, 16 * MIB))
            finally:
                reader.kill()
        assert ublk.read(tracked.node) == ublk.read(disk)
        tracked.remove()


def test_an_error_of_the_origin_is_the_users_error(datapath: Datapath) -> None:
    """EIO where the medium is bad, and only there; the map has the mark all the same."""
    with devices.null_blk(SIZE, badblocks="+2048-2055") as disk:
        tracked = ublk.track(datapath, disk)
        with pytest.raises(OSError, match="Input/output error"):
            ublk.write(tracked.node, MIB, b"x" * 4096)
        ublk.write(tracked.node, 2 * MIB, b"x" * 4096)
        assert tracked.origin.info().state == "tracking"
        assert {16, 32} <= tracked.maps().changed(0, live=True)
        tracked.remove()


def test_what_is_in_the_page_cache_survives_the_removal(datapath: Datapath) -> None:
    """Buffered bytes of the node are written before it goes."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        with opened(tracked.node) as fd:
            os.pwrite(fd, b"late" * 1024, 3 * MIB)
            # The last close of a block device would write them: the removal must not count on it.
            maps = tracked.remove()
        assert 48 in maps.changed(0, live=True)
        assert ublk.read(disk)[3 * MIB : 3 * MIB + 4096] == b"late" * 1024


def test_force_removes_a_mounted_node(datapath: Datapath, tmp_path: Path) -> None:
    """The file system gets errors, nothing hangs, and the origin can be tracked again."""
    with devices.brd(SIZE) as disk:
        tracked = ublk.track(datapath, disk)
        devices.run("mkfs.ext4", "-q", str(tracked.node))
        devices.run("mount", str(tracked.node), str(tmp_path))
        try:
            tracked.remove(force=True)
            assert not tracked.node.exists()
        finally:
            devices.run("umount", str(tmp_path))
        again = ublk.track(datapath, disk)
        devices.run("fsck.ext4", "-fy", str(again.node))
        again.remove()


@pytest.mark.parametrize("kind", ["null_blk", "scsi_debug", "loop"])
def test_bytes_written_behind_the_tracker_end_the_generation(
    datapath: Datapath, tmp_path: Path, kind: str
) -> None:
    """The disk's own count of sectors tells of a dd to it; without one the generation goes on, whatever was written."""
    with kinds.disk(kind, SIZE, tmp_path) as disk:
        tracked = ublk.track(datapath, disk)
        generation = tracked.origin.info().generation
        for round_ in range(2):
            ublk.fio("v", *ublk.verified_writes(tracked.node, 8 * MIB, "--fsync=16"))
            snapshot, _ = ublk.take(tracked)
            snapshot.destroy()
            assert tracked.origin.info().generation == generation, round_
        ublk.write(disk, 5 * MIB, b"!" * 4096)
        snapshot, _ = ublk.take(tracked)
        snapshot.destroy()
        assert tracked.origin.info().generation != generation
        tracked.remove()


def test_a_grown_origin_has_a_grown_node(datapath: Datapath, kernel: str) -> None:
    """On kernels that can: the map goes on, what is new is marked, an image keeps its size."""
    with devices.brd(SIZE) as disk:
        small, large = (f"0 {size // 512} linear {disk} 0" for size in (SIZE // 2, SIZE))
        with devices.dm("grows", small) as origin:
            tracked = ublk.track(datapath, origin)
            ublk.write(tracked.node, 0, b"x" * 4096)
            snapshot, (image,) = ublk.take(tracked)
            ublk.write(tracked.node, MIB, b"y" * 4096)
            before = tracked.origin.info()
            for words in (("load", "grows", "--table", large), ("suspend", "grows"), ("resume", "grows")):
                devices.run("dmsetup", *words)
            if kernel == "6.12":
                with pytest.raises(Refused, match=r"6\.16"):
                    datapath.control.call("origin.resize", origin=tracked.origin.name)
            else:
                datapath.control.call("origin.resize", origin=tracked.origin.name)
                after = tracked.origin.info()
                assert (after.size, after.generation) == (SIZE, before.generation)
                assert tracked.maps().changed(1, live=True) == {16, *range(SIZE // 2 >> 16, SIZE >> 16)}
                ublk.write(tracked.node, SIZE - 4096, b"z" * 4096)
                assert ublk.read(tracked.node)[-4096:] == b"z" * 4096
                assert len(ublk.read(image)) == SIZE // 2
                more, _ = ublk.take(tracked)
                more.destroy()
                assert tracked.origin.info().generation == before.generation
            snapshot.destroy()
            tracked.remove()


def test_a_file_is_refused(datapath: Datapath) -> None:
    """It has no block device."""
    with pytest.raises(Refused, match="NBD") as refused:
        datapath.add(front="ublk")
    assert refused.value.code == "invalid"


def test_disks_of_other_kinds_are_refused(datapath: Datapath) -> None:
    """Zoned ones, and such as keep integrity data: with the reason, and nothing is left over them."""
    with devices.null_blk(SIZE, zoned=True) as disk:
        with pytest.raises(Refused, match="zoned") as refused:
            ublk.track(datapath, disk)
        assert refused.value.code == "invalid"
    with devices.scsi_debug(SIZE, dif=1, dix=1) as disk:
        with pytest.raises(Refused, match="integrity") as refused:
            ublk.track(datapath, disk)
        assert refused.value.code == "invalid"
    assert not list(Path("/dev").glob("ublk[bc]*"))


def test_many_origins_come_and_go(datapath: Datapath) -> None:
    """Nothing of a removed origin stays: no device, no thread, no descriptor."""
    with devices.brd(SIZE) as disk:
        ublk.track(datapath, disk).remove()
        before = datapath.descriptors()
        for _ in range(5):
            tracked = ublk.track(datapath, disk)
            ublk.write(tracked.node, 0, b"x" * 4096)
            tracked.remove()
        assert not list(Path("/dev").glob("ublk[bc]*"))
        # The main thread, the listener, maintenance, and one for this connection; one that ends may take a moment,
        # and so may the descriptors of an answer. Workers
        # of a ring that was used once stay with their thread.
        end = time.monotonic() + 10
        while len(own_threads(datapath)) > 4 or datapath.descriptors() > before:
            assert time.monotonic() < end, (own_threads(datapath), datapath.descriptors(), before)
            time.sleep(0.05)
