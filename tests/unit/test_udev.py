# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of devices and mounts, and what the data path says of its own devices."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blksnap_service import mounts
from blksnap_service.fds import OwnedFd
from blksnap_service.mounts import mount_points, mounted_device
from blksnap_service.sizes import SizeWatch
from blksnap_service.udev import drain
from blksnap_service.udevfiles import OurDevice, read_ours


class Monitor:
    """A pyudev monitor: raises when its socket has an error, as ``poll`` does, and has events otherwise."""

    def __init__(self, reader: socket.socket, events: int) -> None:
        self._reader = reader
        self.events = events

    def fileno(self) -> int:
        """Return the socket's."""
        return self._reader.fileno()

    def poll(self, timeout: float) -> object | None:
        """Return an event, or None."""
        assert timeout == 0
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        if any(mask & select.POLLERR for _, mask in poll.poll(0)):
            raise OSError("Error while polling fd")
        self.events -= 1
        return object() if self.events >= 0 else None


def test_an_error_of_the_socket_is_taken() -> None:
    """Else the loop would wake up for it for ever; the kernel tells so that events were lost."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reader:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
            nobody.bind(("127.0.0.1", 0))
            reader.connect(nobody.getsockname())
        reader.send(b"x")
        monitor = Monitor(reader, 1)
        waiting = select.poll()
        waiting.register(reader.fileno(), select.POLLIN)
        assert waiting.poll(5000)
        drain(monitor)
        assert not waiting.poll(0)
        assert monitor.events == 1


def test_a_flood_of_events_leaves_others_their_turn() -> None:
    """It is gone on with at the next wake-up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as reader:
        monitor = Monitor(reader, 1000)
        drain(monitor)
        assert 0 < monitor.events < 1000


def test_what_the_data_path_says_of_its_devices_is_read(tmp_path: Path) -> None:
    """What is no such file is left alone."""
    (tmp_path / "ublkb0").write_text("BLKSNAP_ROLE=image\nBLKSNAP_ORIGIN=sdb1\nBLKSNAP_SNAPSHOT=x\n")
    (tmp_path / "sdb1").write_text("BLKSNAP_ROLE=origin\n")
    (tmp_path / "sdc").write_text("BLKSNAP_ROLE=magic\n")
    (tmp_path / "sdd").write_bytes(b"\xff\xfe no lines")
    (tmp_path / "sde").mkdir()
    assert read_ours(tmp_path) == {"ublkb0": OurDevice("image", "sdb1"), "sdb1": OurDevice("origin", "")}
    assert read_ours(tmp_path / "nope") == {}
    assert read_ours(None) == {}


def test_the_root_file_system_is_mounted_on_slash() -> None:
    """Mount points are those of this machine."""
    root = os.stat("/").st_dev  # noqa: PTH116
    points = mount_points()
    assert "/" in points.get(root, ()) or os.major(root) == 0


def test_a_mount_is_of_the_device_it_was_mounted_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are written with escapes; btrfs has a number that is no device's, and its source says what it is."""
    disk = next(
        (one for one in Path("/dev").iterdir() if one.is_block_device() and " " not in one.name), None
    )
    number = disk.stat().st_rdev if disk else os.makedev(0, 41)
    (tmp_path / "mountinfo").write_text(
        "29 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        "30 29 254:1 /a\\040b /srv/a\\040b rw - ext4 /dev/root rw\n"
        f"31 29 0:41 /sub /home rw shared:5 master:2 - btrfs {disk or 'none'} rw\n"
        "32 29 0:42 / /run rw - tmpfs tmpfs rw\n"
        "33 29 0:43 / /gone rw - btrfs /dev/no-such-disk rw\n"
    )
    monkeypatch.setattr(mounts, "_MOUNTINFO", tmp_path / "mountinfo")
    assert mount_points() == {
        os.makedev(254, 1): ("/", "/srv/a b"),
        number: ("/home",),
        os.makedev(0, 42): ("/run",),
        os.makedev(0, 43): ("/gone",),
    }


def test_an_open_file_is_on_the_device_of_its_own_mount(tmp_path: Path) -> None:
    """Not of what is mounted over it, or below it."""
    for place in (tmp_path, Path("/proc")):
        with OwnedFd(os.open(place, os.O_RDONLY)) as fd:
            target = next(
                targets for number, targets in mount_points().items() if number == mounted_device(fd)
            )
            assert any(place.is_relative_to(one) for one in target)


_WATCH = """
import asyncio, subprocess, sys
from blksnap_service.mounts import MountWatch, mount_points

async def main():
    told = asyncio.Event()
    calls = 0
    def changed():
        nonlocal calls
        calls += 1
        told.set()
    watch = MountWatch(changed)
    await asyncio.sleep(0.2)
    print("before", calls)
    for command in (["mount", "-t", "tmpfs", "none", sys.argv[1]], ["umount", sys.argv[1]]):
        told.clear()
        calls = 0
        subprocess.run(command, check=True)
        async with asyncio.timeout(30):
            await told.wait()
        await asyncio.sleep(0.2)
        mounted = any(sys.argv[1] in targets for targets in mount_points().values())
        print(command[0], "once" if calls == 1 else calls, mounted)
    watch.close()

asyncio.run(main())
"""


async def test_mounts_are_noticed_and_the_loop_sleeps_in_between(tmp_path: Path) -> None:
    """In a mount namespace of its own, with the real kernel."""
    process = await asyncio.create_subprocess_exec(
        "unshare", "--map-root-user", "--mount", sys.executable, "-c", _WATCH, str(tmp_path),
        stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    output, _ = await process.communicate()
    assert output.decode().splitlines() == ["before 0", "mount once True", "umount once False"]


async def test_a_size_that_nobody_announces_is_noticed_once(tmp_path: Path) -> None:
    """Each change is told, nothing is while all stays as it is, and nothing after the end."""
    sizes, new = tmp_path / "partitions", tmp_path / "new"
    sizes.write_text("8 1 1024 sda1\n")
    told = asyncio.Queue[None]()
    watch = SizeWatch(lambda: told.put_nowait(None), sizes, 0.001)
    try:
        for size in (2048, 1024):
            new.write_text(f"8 1 {size} sda1\n")
            new.replace(sizes)
            async with asyncio.timeout(30):
                await told.get()
        sizes.unlink()
        async with asyncio.timeout(30):
            await told.get()
        assert told.empty()
    finally:
        watch.close()
