# SPDX-License-Identifier: GPL-2.0-or-later
"""The data path is killed with -9 under a block device and comes back: no I/O fails, no change is missed."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nbd.load import running
from tests.nbd.survival import Held
from tests.vm.guest import devices, filework, kinds, nodes, ublk
from tests.vm.guest.kinds import FILE_SYSTEMS, KINDS, Placed
from tests.vm.guest.ublk import MIB

SIZE = 64 * MIB
DEATHS = 14


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    """A data path with a holder, with the drivers loaded; what it still serves is stopped by force."""
    devices.modprobe("ublk_drv")
    devices.modprobe("dm-mod")
    directory = tmp_path / "run"
    directory.mkdir()
    held = Held(directory)
    try:
        yield held
        held.control.call("stop", force=True)
        assert held.process.wait(30) == 0, held.story()
    finally:
        held.kill()


def die_often(held: Held, deaths: int, alive: Callable[[], bool]) -> None:
    """Kill it at moments of no pattern, each time when it has come back."""
    chance = random.Random(1)
    while held.deaths < deaths:
        assert alive(), held.story()
        time.sleep(chance.random() * 0.5)
        held.die()


def lose_nothing_raw(held: Held, directory: Path, kind: str, deaths: int) -> None:
    """Verified writes to the node itself."""
    with kinds.disk(kind, SIZE, directory) as disk:
        tracked = kinds.place(held, kind, disk).tracked
        ublk.fio("before", *ublk.verified_writes(tracked.node, 8 * MIB))
        content = ublk.read(tracked.node)
        snapshot, (image,) = ublk.take(tracked)
        number = snapshot.info().images[0].number
        with running(ublk.verifying(tracked.node, 16 * MIB)) as going:
            die_often(held, deaths, going)
        assert held.deaths == deaths
        assert ublk.read(image) == content
        after = ublk.read(tracked.node)
        maps = tracked.maps()
        block = maps.reading.block_size
        different = ublk.differing(content, after, block)
        assert different
        assert different <= maps.changed(number, live=True)
        assert maps.reading.changes == number
        snapshot.destroy()
        assert not image.exists()
        tracked.remove()
        assert ublk.read(disk) == after


def lose_nothing_mounted(held: Held, directory: Path, kind: str, file_system: str, deaths: int) -> None:
    """Verified writes and a random program on a file system."""
    with kinds.disk(kind, SIZE, directory) as disk:
        nodes.make_file_system(disk, file_system)
        placed: Placed = kinds.place(held, kind, disk)
        tracked = placed.tracked
        with nodes.mounted(tracked.node, directory / "live") as live:
            (live / "kept").write_bytes(b"as it was" * 5000)
            with kinds.to_be_frozen(tracked, live) as mounts:
                taken = nodes.take_all([tracked], mounts=mounts)
            image = Path(taken["images"][0]["path"])
            content = ublk.read(image)
            (live / "kept").write_bytes(b"something else")
            with (
                filework.RandomProgram(live / "random", 3, MIB) as program,
                nodes.load(live / "verified", 4 * MIB),
            ):
                die_often(held, deaths, lambda: True)
            print(f"{deaths} deaths under {program.operations} random operations")
        assert nodes.is_clean(tracked.node, file_system)
        assert ublk.read(image) == content
        options = kinds.IMAGE_OPTIONS[file_system]
        with nodes.mounted(image, directory / "past", "-o", options) as past:
            assert (past / "kept").read_bytes() == b"as it was" * 5000
        after, maps = ublk.read(tracked.node), tracked.maps()
        different = ublk.differing(content, after, maps.reading.block_size)
        assert different
        assert different <= maps.changed(taken["images"][0]["number"], live=True)
        assert ublk.read(placed.below) == after
        taken["snapshot"].destroy()
        tracked.remove()


@pytest.mark.parametrize("kind", ["brd", "scsi_debug"])
def test_deaths_under_verified_writing_lose_nothing(held: Held, tmp_path: Path, kind: str) -> None:
    """fio sees no error through any death; the held image is what the device was; what changed is marked."""
    lose_nothing_raw(held, tmp_path, kind, DEATHS)


@pytest.mark.parametrize("kind, file_system", [("lvm", "ext4"), ("loop", "xfs")])
def test_deaths_under_a_file_system_lose_nothing(
    held: Held, tmp_path: Path, kind: str, file_system: str
) -> None:
    """Nobody on it sees one; it is whole afterwards, the held image is what it was, what changed is marked."""
    lose_nothing_mounted(held, tmp_path, kind, file_system, DEATHS)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_deaths_under_verified_writing(held: Held, tmp_path: Path, kind: str) -> None:
    """On every kind of disk."""
    lose_nothing_raw(held, tmp_path, kind, 50)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_deaths_under_a_file_system(held: Held, tmp_path: Path, kind: str, file_system: str) -> None:
    """On every kind of disk with either file system."""
    lose_nothing_mounted(held, tmp_path, kind, file_system, 50)
