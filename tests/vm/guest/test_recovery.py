# SPDX-License-Identifier: GPL-2.0-or-later
"""The data path and what keeps its memory are killed together: nobody's I/O fails or hangs, and nothing is left behind."""

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nbd.control import Control, HungUp, opened
from tests.nbd.datapath import Origin, new_id
from tests.nbd.survival import Held
from tests.vm.guest import devices, nodes, ublk
from tests.vm.guest.ublk import MIB, Tracked

SIZE = 64 * MIB
PATIENCE_S = 60.0
DEATHS = 8


class Lives:
    """Data paths of one runtime directory, each with a holder, of which nothing is left but devices and notes."""

    def __init__(self, directory: Path) -> None:
        """Start the first."""
        self.directory = directory
        self.now = Held(directory)

    def kill(self) -> None:
        """Kill the holder, which would start another, and then the data path."""
        pid = self.now.pid()
        self.now.control.close()
        self.now.process.kill()
        self.now.process.wait()
        os.kill(pid, signal.SIGKILL)
        await_end(pid)

    def lose(self, tracked: Tracked | None = None, *, forget_notes: bool = False) -> Tracked:
        """Kill all, start the next; the same origin there."""
        self.kill()
        if forget_notes:
            shutil.rmtree(self.directory / "origins")
        return self.again(tracked)

    def again(self, tracked: Tracked | None = None) -> Tracked:
        """Start the next one; the same origin there."""
        self.now = Held(self.directory)
        if tracked is None:
            return typing.cast("Tracked", None)
        origin = Origin(self.now, tracked.origin.name, tracked.device)
        return Tracked(self.now, origin, tracked.device, tracked.node)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A runtime directory that several data paths have one after the other."""
    devices.modprobe("ublk_drv")
    devices.modprobe("dm-mod")
    run = tmp_path / "run"
    run.mkdir()
    return run


@pytest.fixture
def lives(directory: Path) -> Iterator[Lives]:
    """Data paths, one after the other; the last one is ended in order."""
    one = Lives(directory)
    try:
        yield one
        one.now.control.call("stop", force=True)
        assert one.now.process.wait(30) == 0, one.now.story()
    finally:
        one.now.kill()


def await_end(pid: int) -> None:
    """Return when a process has ended, waited for or not."""
    end = time.monotonic() + PATIENCE_S
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while not Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
            assert time.monotonic() < end, f"process {pid} does not end"
            time.sleep(0.01)


def await_true(condition: Callable[[], bool]) -> None:
    """Return when it holds."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def await_writes(tracked: Tracked) -> None:
    """Return when some more writes have come through."""
    ublk.await_writes(tracked, 50)


def test_a_mounted_node_goes_on_as_a_new_generation(lives: Lives, tmp_path: Path) -> None:
    """Twice, under verified writes, with a snapshot that is lost: no error, what is written after is marked, fsck clean."""
    with devices.brd(SIZE) as disk:
        tracked = nodes.tracked_top(lives.now, disk, "blksnap-test")
        nodes.make_file_system(tracked.node, "ext4")
        generations, node = [], tracked.node
        with nodes.mounted(node, tmp_path / "m") as target, nodes.load(target / "file", 8 * MIB):
            for _ in range(2):
                ublk.take(tracked)
                generations.append(tracked.origin.info().generation)
                tracked = lives.lose(tracked)
                reading = tracked.origin.info()
                assert (reading.state, reading.node, reading.front) == ("tracking", str(node), "ublk")
                assert reading.generation not in generations
                assert "what changed until then is not known" in reading.reset
                assert lives.now.control.call("list")["snapshots"] == []
                assert ublk.fronts() == [f"ublkc{reading.ublk_id}"]
                await_writes(tracked)
            _, (image,) = ublk.take(tracked)
            content, number = ublk.read(image), tracked.origin.info().changes
            (target / "after").write_bytes(os.urandom(3 * MIB))
            os.sync()
            _, (image,) = ublk.take(tracked)
            maps = tracked.maps()
            different = ublk.differing(content, ublk.read(image), maps.reading.block_size)
            assert different
            assert different <= maps.changed(number)
            assert nodes.is_clean(image, "ext4")
        for snapshot in lives.now.control.call("list")["snapshots"]:
            lives.now.control.call("snapshot.destroy", snapshot=snapshot["snapshot"])
        assert nodes.is_clean(node, "ext4")
        tracked.remove()
        assert (ublk.fronts(), nodes.names()) == ([], set())
        assert nodes.is_clean(disk, "ext4")


def test_a_live_volume_goes_on_as_a_new_generation(lives: Lives, tmp_path: Path) -> None:
    """Got under it, and taken over; and out of it again."""
    with devices.brd(128 * MIB) as disk, devices.lvm_lv(disk, SIZE) as volume:
        name = nodes.mapped_name(volume)
        before = nodes.table(name)
        nodes.make_file_system(volume, "ext4")
        with nodes.mounted(volume, tmp_path / "m") as target, nodes.load(target / "file", 8 * MIB):
            tracked = nodes.insert(lives.now, name)
            await_writes(tracked)
            generation = tracked.origin.info().generation
            tracked = lives.lose(tracked)
            reading = tracked.origin.info()
            assert (reading.state, reading.insert) == ("tracking", name)
            assert reading.generation != generation
            await_writes(tracked)
            tracked.remove()
            assert nodes.table(name) == before
            assert (ublk.fronts(), nodes.names()) == ([], {name})
        assert nodes.is_clean(volume, "ext4")


def test_what_cannot_be_taken_over_is_taken_away(lives: Lives, tmp_path: Path) -> None:
    """A top that is mounted goes on without a tracker, one that is not goes; no ublk device and no note stays."""
    with devices.null_blk(SIZE) as one, devices.brd(SIZE) as two:
        used = nodes.tracked_top(lives.now, one, "blksnap-used")
        idle = nodes.tracked_top(lives.now, two, "blksnap-idle")
        nodes.make_file_system(used.node, "ext4")
        ublk.take(used)
        with nodes.mounted(used.node, tmp_path / "m") as target:
            (target / "kept").write_bytes(b"x" * 100_000)
            os.sync()
            # As if they had been of another boot.
            lives.lose(forget_notes=True)
            assert lives.now.control.call("list")["origins"] == []
            assert ublk.fronts() == []
            assert not list((lives.directory / "udev").iterdir())
        assert idle.node.exists()
        for name in ("blksnap-used", "blksnap-idle"):
            devices.run("dmsetup", "remove", "--retry", name)


def test_others_devices_are_left_alone(lives: Lives, tmp_path: Path) -> None:
    """Of a data path with another runtime directory, which is dead at the moment."""
    other = tmp_path / "other"
    other.mkdir()
    with devices.null_blk(SIZE) as one, devices.brd(SIZE) as two:
        theirs = Lives(other)
        try:
            tracked = nodes.tracked_top(theirs.now, one, "blksnap-theirs")
            ours = nodes.tracked_top(lives.now, two, "blksnap-ours")
            theirs.kill()
            lives.lose()
            assert len(ublk.fronts()) == 2
            lives.now.control.call("origin.remove", origin=ours.origin.name)
            tracked = theirs.again(tracked)
            assert tracked.origin.info().state == "tracking"
            tracked.remove()
            theirs.now.control.call("stop", force=True)
        finally:
            theirs.now.kill()


def test_deaths_at_any_moment_of_an_attach_leave_nothing_behind(lives: Lives) -> None:
    """Killed together while origins come, are taken and go: what is not served is gone, and can be attached again."""
    chance = random.Random(5)
    with devices.brd(SIZE) as disk:
        nodes.tracked_top(lives.now, disk, "blksnap-test").remove()
        for number in range(DEATHS):
            attempt = nodes.Attempt(busy, lives.now.connect(), disk)
            time.sleep(chance.random() * (0.1 + 0.1 * number))
            lives.lose()
            assert attempt.ended(PATIENCE_S)
            served = lives.now.control.call("list")["origins"]
            assert ublk.fronts() == [f"ublkc{one['ublk_id']}" for one in served], lives.now.story()
            assert nodes.names() == {one["top"] for one in served}
            assert all(one["state"] == "tracking" for one in served)
            for one in served:
                lives.now.control.call("origin.remove", origin=one["origin"])
            assert (ublk.fronts(), nodes.names()) == ([], set())
        nodes.tracked_top(lives.now, disk, "blksnap-test").remove()


def busy(control: Control, disk: Path) -> None:
    """Attach, take and detach until the data path is gone."""
    with control, contextlib.suppress(OSError, HungUp):
        while True:
            with opened(disk, os.O_RDWR | os.O_EXCL | os.O_DIRECT) as fd:
                control.call(
                    "origin.add",
                    [fd],
                    origin="a",
                    generation=new_id(),
                    front="ublk",
                    top="blksnap-test",
                    label=str(disk),
                )
            with tempfile.TemporaryFile() as storage:
                snapshot = new_id()
                control.call("snapshot.create", [storage.fileno()], snapshot=snapshot, limit=MIB)
            member = {"origin": "a", "next_generation": new_id()}
            control.call("snapshot.take", snapshot=snapshot, devices=[member])
            control.call("snapshot.destroy", snapshot=snapshot)
            control.call("origin.remove", origin="a")


def test_a_disk_that_hangs_delays_no_other(lives: Lives) -> None:
    """The data path alone is killed while one disk owes an answer: the other origin is back at once, the first with its disk."""
    with (
        devices.brd(SIZE) as one,
        devices.null_blk(SIZE) as two,
        devices.dm("hangs", f"0 {SIZE // 512} linear {one} 0") as below,
    ):
        slow = nodes.tracked_top(lives.now, below, "blksnap-slow")
        quick = nodes.tracked_top(lives.now, two, "blksnap-quick")
        before = slow.origin.info()
        devices.run("dmsetup", "suspend", "hangs")
        writing = nodes.Attempt(ublk.write, slow.node, 4 * MIB, b"w" * 4096)
        try:
            # Marked before it is on its way to the disk.
            await_true(lambda: bool(slow.maps().changed(0, live=True)))
            lives.now.die()
            ublk.write(quick.node, 0, b"q" * 4096)
            assert quick.maps().changed(0, live=True) == {0}
            listed = {item["origin"]: item for item in lives.now.control.call("list")["origins"]}
            assert "does not answer" in listed[slow.origin.name]["reason"]
            assert listed[slow.origin.name]["generation"] == before.generation
            assert not writing.ended(0)
        finally:
            with lives.now.events() as events:
                devices.run("dmsetup", "resume", "hangs")
                await_true(lambda: slow.origin.name in {one.get("origin") for one in events.gather(0.1)})
        assert writing.ended(PATIENCE_S)
        assert writing.error is None
        assert slow.origin.info().generation == before.generation
        assert slow.maps().changed(0, live=True) == {4 * MIB >> 16}
        assert ublk.read(slow.node)[4 * MIB : 4 * MIB + 4096] == b"w" * 4096
        slow.remove()
        quick.remove()
