# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices come, go, grow and change under the real service, with the real udevd and without one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_service.bus.paths import DEVICE, TRACKER, device_path
from tests.vm.guest import devices
from tests.vm.guest.system import (
    FOLLOW_S,
    MIB,
    Rig,
    breaks,
    follows,
    gone,
    has,
    install_rules,
    load,
    make_ext4,
    make_partitions,
    service,
    there,
    written,
)


@pytest.fixture(scope="class", params=["udevd", "kernel"])
def source(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where events come from."""
    if request.param == "kernel":
        yield "kernel"
        return
    install_rules()
    with devices.udevd():
        yield "udevd"


@pytest.fixture(scope="class")
def rig(source: str) -> Iterator[Rig]:
    """A running service."""
    with service() as one:
        yield one


class TestFollowing:
    """Objects follow devices."""

    async def test_a_loop_device_comes_grows_and_goes(self, rig: Rig, file: Path) -> None:
        """Attach, `losetup -c`, detach."""
        async with rig.user() as user:
            with devices.loop(file) as node:
                await follows(user, "loop attached", node.name, has("Size", 64 * MIB))
                os.truncate(file, 96 * MIB)
                devices.run("losetup", "--set-capacity", str(node))
                await follows(user, "loop grown", node.name, has("Size", 96 * MIB))
            await follows(user, "loop detached", node.name, gone)

    async def test_a_ram_disk_comes_and_goes(self, rig: Rig) -> None:
        """A module that is loaded and removed."""
        async with rig.user() as user:
            with devices.brd(16 * MIB) as node:
                await follows(user, "brd loaded", node.name, there)
            await follows(user, "brd removed", node.name, gone)

    async def test_partitions_are_read_again(self, rig: Rig) -> None:
        """A table is written and replaced by another one."""
        async with rig.user() as user:
            with devices.scsi_debug(64 * MIB) as disk:
                for sizes in ([8, 8], [16]):
                    make_partitions(disk, *sizes)
                    devices.run("blockdev", "--rereadpt", str(disk))
                    seen = has("Size", sizes[0] * MIB)
                    await follows(user, f"{len(sizes)} partitions", f"{disk.name}1", seen)
                await follows(user, "second partition gone", f"{disk.name}2", gone)
            await follows(user, "disk removed", f"{disk.name}1", gone)

    async def test_a_partition_is_given_another_size(self, rig: Rig) -> None:
        """By BLKPG, as resizepart(8) does it: there is no event. A tracker of it goes on, and has the new part marked."""
        async with rig.user() as user:
            with devices.scsi_debug(64 * MIB) as disk:
                make_partitions(disk, 8)
                devices.run("blockdev", "--rereadpt", str(disk))
                name = f"{disk.name}1"
                await follows(user, "partition", name, has("Size", 8 * MIB))
                devices.run("resizepart", str(disk), "1", str(16 * MIB // 512))
                await follows(user, "partition grown", name, has("Size", 16 * MIB))
                path = device_path(name)
                await user.call(path, DEVICE, "Attach", "", backend=("s", "nbd"))
                devices.run("resizepart", str(disk), "1", str(32 * MIB // 512))
                await follows(user, "tracked partition grown", name, has("Size", 32 * MIB))
                begin = time.monotonic()
                while await user.get(path, TRACKER, "Capacity") != 32 * MIB:
                    assert time.monotonic() < begin + FOLLOW_S
                    await asyncio.sleep(0.02)
                await user.call(path, DEVICE, "Detach", "")

    async def test_mounts_are_followed(self, rig: Rig, file: Path, tmp_path: Path) -> None:
        """Nobody sends an event for those."""
        make_ext4(file)
        async with rig.user() as user:
            with devices.loop(file) as node:
                devices.run("mount", str(node), str(tmp_path))
                try:
                    await follows(
                        user,
                        "mounted",
                        node.name,
                        has("MountPoints", [str(tmp_path)]),
                    )
                finally:
                    devices.run("umount", str(tmp_path))
                await follows(user, "unmounted", node.name, has("MountPoints", []))

    async def test_a_device_mapper_device_is_renamed(self, rig: Rig, source: str) -> None:
        """Its object stays, its links change; links are udev's."""
        async with rig.user() as user:
            devices.modprobe("dm-mod")
            devices.run("dmsetup", "create", "before", "--table", "0 2048 linear /dev/vda 0")
            try:
                # Without udevd it is a node of its own and no link.
                name = f"dm-{os.minor(Path('/dev/mapper/before').stat().st_rdev)}"
                await follows(user, "dm created", name.replace("-", "_2d"), there)
                devices.run("dmsetup", "rename", "before", "after")
                if source == "udevd":
                    await follows(
                        user,
                        "dm renamed",
                        name.replace("-", "_2d"),
                        lambda at: at is not None and "/dev/mapper/after" in at["Symlinks"],
                    )
            finally:
                for one in ("before", "after"):
                    with contextlib.suppress(subprocess.CalledProcessError):
                        devices.run("dmsetup", "remove", one)
            await follows(user, "dm removed", name.replace("-", "_2d"), gone)

    async def test_lost_events_are_made_up_for(self, rig: Rig, file: Path) -> None:
        """The service sleeps while more happens than the kernel keeps for it (ENOBUFS)."""
        assert rig.daemon.process is not None
        # Of any device: the kernel's channel has them all, and udevd is soon done with this one.
        uevent = Path("/sys/class/mem/null/uevent")
        async with rig.user() as user:
            rig.daemon.process.send_signal(signal.SIGSTOP)
            try:
                count = 0
                while not lost_events(rig.daemon.process.pid):
                    assert count < 20_000, "nothing was lost"
                    for _ in range(100):
                        uevent.write_text("change")
                    count += 100
                with devices.loop(file) as node:
                    rig.daemon.process.send_signal(signal.SIGCONT)
                    await follows(user, "after a flood", node.name, there)
                await follows(user, "after a flood, detached", node.name, gone)
            finally:
                rig.daemon.process.send_signal(signal.SIGCONT)
            if devices.udevd_runs():
                devices.run("udevadm", "settle")
            await asyncio.sleep(3)
            before = cpu_s(rig.daemon.process.pid)
            await asyncio.sleep(3)
            # An error of the socket that nobody takes would keep the loop busy.
            assert cpu_s(rig.daemon.process.pid) - before < 1.5

    async def test_a_disk_that_is_pulled_out_under_load_breaks_its_tracker(self, rig: Rig) -> None:
        """State and reason are told, clients get errors, nothing hangs, and the object goes with the tracker."""
        async with rig.user() as user:
            with devices.scsi_debug(64 * MIB) as disk:
                path = device_path(disk.name)
                await follows(user, "disk found", disk.name, there)
                await user.call(path, DEVICE, "Attach", "", backend=("s", "nbd"))
                node = await user.get(path, TRACKER, "Node")
                with load(node) as writer:
                    await written(user, path)
                    Path("/sys/class/block", disk.name, "device/delete").write_text("1")
                    await breaks(user, path)
                    info = await user.call(path, TRACKER, "GetInfo", "")
                    # The kernel takes its size away a moment before its name.
                    assert re.search("gone|smaller", info["reason"].value)
                    assert await user.get(path, TRACKER, "LastReset") == info["reason"].value
                    assert await asyncio.to_thread(writer.wait, 60) != 0
                await user.call(path, DEVICE, "Detach", "", force=("b", True))
                await follows(user, "detached", disk.name, gone)

    async def test_a_partition_whose_disk_is_pulled_out_breaks_its_tracker(self, rig: Rig) -> None:
        """It keeps its size for who has it open; its place in sysfs is gone."""
        async with rig.user() as user:
            with devices.scsi_debug(64 * MIB) as disk:
                make_partitions(disk, 60)
                devices.run("blockdev", "--rereadpt", str(disk))
                name = f"{disk.name}1"
                await follows(user, "partition found", name, there)
                path = device_path(name)
                await user.call(path, DEVICE, "Attach", "", backend=("s", "nbd"))
                Path("/sys/class/block", disk.name, "device/delete").write_text("1")
                await breaks(user, path)
                await user.call(path, DEVICE, "Detach", "", force=("b", True))
                await follows(user, "detached", name, gone)

    async def test_a_tracker_follows_a_device_that_grows(self, rig: Rig, file: Path) -> None:
        """Its generation goes on, with the new part marked."""
        async with rig.user() as user:
            with devices.loop(file) as node:
                path = device_path(node.name)
                await follows(user, "loop attached", node.name, there)
                await user.call(path, DEVICE, "Attach", "", backend=("s", "nbd"))
                generation = await user.get(path, TRACKER, "GenerationId")
                os.truncate(file, 96 * MIB)
                devices.run("losetup", "--set-capacity", str(node))
                begin = time.monotonic()
                while await user.get(path, TRACKER, "Capacity") != 96 * MIB:
                    assert time.monotonic() < begin + FOLLOW_S
                    await asyncio.sleep(0.02)
                assert await user.get(path, TRACKER, "GenerationId") == generation
                ranges, _ = await user.call(
                    path, TRACKER, "GetChangedRanges", "utu", 0, 0, 10, view=("s", "live")
                )
                assert [[offset, length] for offset, length in ranges] == [[64 * MIB, 32 * MIB]]
                await user.call(path, DEVICE, "Detach", "")


def lost_events(pid: int) -> int:
    """How many events did not fit into the sockets of a process (proc_net_netlink: protocol 15, column Drops)."""
    rows = [line.split() for line in Path("/proc/net/netlink").read_text().splitlines()[1:]]
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        if found := re.fullmatch(r"socket:\[(\d+)\]", os.fspath(fd.readlink())):
            inodes.add(found[1])
    return sum(int(row[8]) for row in rows if row[1] == "15" and row[9] in inodes)


def cpu_s(pid: int) -> float:
    """The processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
