# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices tracked by ublk among those of the system: what udev knows of them, and disks that are pulled out."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from blksnap_service.bus.paths import IMAGE, MANAGER, MANAGER_PATH, SNAPSHOT
from blksnap_service.devices import escape
from tests.bus.daemons import Client
from tests.vm.guest import devices
from tests.vm.guest.service import TrackedDevice, attach, mounted
from tests.vm.guest.system import (
    MIB,
    RUNTIME,
    UUID,
    Rig,
    breaks,
    follows,
    gone,
    make_ext4,
    poke,
    properties,
    service,
    there,
    written,
)

UBLK = ("s", "ublk")
Act = Callable[[], object]
DISK = Path("/dev/vdb")
BY_UUID = Path(f"/dev/disk/by-uuid/{UUID}")


@pytest.fixture(scope="class")
def rig(rules: None) -> Iterator[Rig]:
    """A running service, with udevd and its rules."""
    devices.modprobe("ublk_drv")
    devices.modprobe("dm-mod")
    with service() as one:
        yield one


@pytest.fixture
async def tracked(rig: Rig) -> AsyncIterator[TrackedDevice]:
    """A disk with a file system, tracked."""
    make_ext4(DISK)
    poke(DISK)
    async with rig.user() as user:
        one = await attach(user, DISK, backend=UBLK)
        yield one
        with contextlib.suppress(Exception):
            await one.detach(force=("b", True))


def told() -> dict[str, str]:
    """What the data path tells udev, by device."""
    return {file.name: file.read_text() for file in (RUNTIME / "udev").iterdir()}


async def only_the_node_is_a_disk(tracked: TrackedDevice) -> None:
    """Everything else of the tracker is hidden, from udev's users and from ours."""
    node = tracked.node.resolve()
    found = properties(DISK)
    assert (found["SYSTEMD_READY"], found["ID_FS_TYPE"]) == ("0", "blksnap_member")
    assert BY_UUID.resolve() == node
    found = properties(node)
    assert found["ID_FS_TYPE"] == "ext4"
    assert found.get("SYSTEMD_READY", "1") == "1"
    (between,) = Path("/sys/class/block", node.name, "slaves").iterdir()
    found = properties(f"/dev/{between.name}")
    assert (found["BLKSNAP_ROLE"], found["SYSTEMD_READY"]) == ("device", "0")
    assert "ID_FS_TYPE" not in found
    for image in Path("/dev/blksnap").glob("*/*"):
        found = properties(image.resolve())
        assert (found["BLKSNAP_ROLE"], found["SYSTEMD_READY"]) == ("image", "0")
        assert "ID_FS_TYPE" not in found
    objects = await tracked.user.objects()
    assert not [name for name in objects if re.search(r"/devices/(ublkb|dm_2d)", name)]
    assert await tracked.user.call(MANAGER_PATH, MANAGER, "ResolveDevice", "s", str(node)) == tracked.path


class TestUdev:
    """What udev knows."""

    async def test_only_the_node_is_a_disk(self, tracked: TrackedDevice) -> None:
        """The origin, what lies between and the images are hidden; all of it is undone by the detach."""
        await only_the_node_is_a_disk(tracked)
        await tracked.snapshot(limit=("t", 64 * MIB))
        devices.run("udevadm", "settle")
        assert len(list(Path("/dev/blksnap").glob("*/vdb"))) == 1
        await only_the_node_is_a_disk(tracked)
        await tracked.detach(force=("b", True))
        devices.run("udevadm", "settle")
        assert BY_UUID.resolve() == DISK
        assert told() == {}


@contextlib.contextmanager
def scsi_disk() -> Iterator[tuple[Path, Act]]:
    """A disk, and what takes it away."""
    with devices.scsi_debug(64 * MIB) as disk:
        yield disk, lambda: Path("/sys/class/block", disk.name, "device/delete").write_text("1")


def load(target: Path) -> subprocess.Popen[bytes]:
    """Random writes, for longer than any test waits."""
    words = f"fio --name=load --filename={target} --ioengine=io_uring --direct=1 --rw=randwrite --bs=4k --iodepth=8"
    return subprocess.Popen(
        [*words.split(), "--size=32m", "--time_based", "--runtime=250"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


async def pull(user: Client, tracked: TrackedDevice, writer: subprocess.Popen[bytes], act: Act) -> None:
    """Take the disk away under load: the tracker breaks and says why, who writes gets an error."""
    try:
        await written(user, tracked.path)
        await asyncio.to_thread(act)
        await breaks(user, tracked.path)
        info = await tracked.info()
        # The kernel takes its size away a moment before its name.
        assert re.search("gone|smaller", info["reason"])
        assert await tracked.get("LastReset") == info["reason"]
        assert await asyncio.to_thread(writer.wait, 100) != 0
    finally:
        writer.kill()
        writer.wait()


class TestPulledOut:
    """The disk below goes away under load: nothing hangs."""

    @pytest.mark.parametrize("kind", [scsi_disk])
    async def test_a_disk_below_a_node_that_is_written(
        self, rig: Rig, kind: Callable[[], contextlib.AbstractContextManager[tuple[Path, Act]]]
    ) -> None:
        """With a held snapshot, which fails: its image ends with an error or has what was kept, and all can be undone."""
        async with rig.user() as user:
            with kind() as (disk, act):
                await follows(user, "disk found", escape(disk.name), there)
                tracked = await attach(user, disk, backend=UBLK)
                taken = await tracked.snapshot(limit=("t", 64 * MIB))
                await pull(user, tracked, load(tracked.node), act)
                with contextlib.suppress(subprocess.CalledProcessError):
                    devices.run("dd", f"if={taken.node}", "of=/dev/null", "bs=1M", "iflag=direct")
                assert await user.get(taken.image, IMAGE, "Path") == str(taken.node)
                assert await user.get(taken.path, SNAPSHOT, "State") in {"taken", "failed"}
                await taken.destroy()
                await tracked.detach(force=("b", True))
                await follows(user, "detached", escape(disk.name), gone)

    async def test_a_disk_below_a_mounted_file_system(self, rig: Rig, tmp_path: Path) -> None:
        """The file system sees errors, as on the bare disk, and can be unmounted."""
        async with rig.user() as user:
            with scsi_disk() as (disk, act):
                await follows(user, "disk found", escape(disk.name), there)
                tracked = await attach(user, disk, backend=UBLK)
                devices.run("mkfs.ext4", "-q", str(tracked.node))
                with mounted(tracked.node, tmp_path / "mnt") as target:
                    await pull(user, tracked, load(target / "file"), act)
                await tracked.detach(force=("b", True))
                await follows(user, "detached", escape(disk.name), gone)
