# SPDX-License-Identifier: GPL-2.0-or-later
"""The real service in the system's own directories, with udev's rules, as the tests in a guest handle it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from blksnap_service.bus.paths import DEVICE, TRACKER, device_path
from tests.bus import daemons
from tests.bus.daemons import Bus, Client, Daemon, client, scratch
from tests.vm.guest import devices
from tests.vm.machine import TREE

MIB = 1 << 20
RUNTIME = Path("/run/blksnap")
RECORDS = Path("/etc/blksnap/attach")
FOLLOW_S = 5.0
"""A machine has 1 s; emulation is slower. What it took is printed."""
UUID = "11111111-2222-3333-4444-555555555555"


class Rig:
    """A service with the system's directories."""

    def __init__(self, directory: Path) -> None:
        self.bus = Bus(directory)
        self.daemon = Daemon(directory, self.bus, f"--runtime-dir={RUNTIME}")
        self.daemon.run = RUNTIME

    @contextlib.asynccontextmanager
    async def user(self) -> AsyncIterator[Client]:
        """A client of it."""
        async with client(self.bus) as one:
            yield one

    def end(self) -> None:
        """End all."""
        self.daemon.clean_up()
        self.bus.stop()
        said = self.daemon.log.read_text()
        print(said)
        assert "Traceback" not in said


def start(directory: Path) -> Rig:
    """Start a service, which takes its time under emulation."""
    daemons.START_S = 120
    rig = Rig(directory)
    asyncio.run(rig.daemon.start())
    return rig


@contextlib.contextmanager
def service() -> Iterator[Rig]:
    """A service for as long as the block lasts."""
    with scratch() as directory:
        one = start(directory)
        try:
            yield one
        finally:
            one.end()


def install_rules() -> None:
    """Put the rules where udevd finds them; not below /usr, as that is the host's."""
    target = Path("/run/udev/rules.d")
    target.mkdir(parents=True, exist_ok=True)
    for rules in (TREE / "dbus" / "udev").glob("*.rules"):
        shutil.copy(rules, target)


async def follows(
    user: Client, what: str, name: str, expected: Callable[[dict[str, Any] | None], bool]
) -> None:
    """Wait until the object of a device is as expected; says how long that took."""
    begin = time.monotonic()
    while not expected((await user.objects()).get(device_path(name), {}).get(DEVICE)):
        assert time.monotonic() < begin + FOLLOW_S, f"{what}: not seen"
        await asyncio.sleep(0.02)
    print(f"{what}: seen after {time.monotonic() - begin:.2f} s")


async def written(user: Client, path: str) -> None:
    """Wait until a load has begun."""
    count = 0
    while count < 50:
        await asyncio.sleep(0.1)
        count = (await user.call(path, TRACKER, "GetInfo", ""))["writes"].value


async def breaks(user: Client, path: str) -> None:
    """Wait until the tracker is broken; says how long that took."""
    begin = time.monotonic()
    while await user.get(path, TRACKER, "State") != "broken":
        assert time.monotonic() < begin + FOLLOW_S, "not broken"
        await asyncio.sleep(0.02)
    print(f"broken: seen after {time.monotonic() - begin:.2f} s")


def there(found: dict[str, Any] | None) -> bool:
    """Whether there is an object."""
    return found is not None


def gone(found: dict[str, Any] | None) -> bool:
    """Whether there is none."""
    return found is None


def has(name: str, value: object) -> Callable[[dict[str, Any] | None], bool]:
    """Whether a property of an object has a value."""
    return lambda found: found is not None and found[name] == value


def make_partitions(node: Path, *sizes_mib: int) -> None:
    """Write an MBR with partitions of these sizes, the first one at 1 MiB."""
    sectors, entries = 2048, b""
    for size_mib in sizes_mib:
        entries += bytes((0, 0, 0, 0, 0x83, 0, 0, 0)) + struct.pack("<II", sectors, size_mib * 2048)
        sectors += size_mib * 2048
    with node.open("r+b", buffering=0) as file:
        file.write((bytes(446) + entries).ljust(510, b"\0") + b"\x55\xaa")
        os.fsync(file.fileno())


def properties(node: Path | str) -> dict[str, str]:
    """What udev's database says of a device."""
    devices.run("udevadm", "settle")
    lines = devices.run("udevadm", "info", "--query=property", str(node)).splitlines()
    return dict(line.split("=", 1) for line in lines)


def poke(node: Path) -> None:
    """Have udev look again."""
    Path("/sys/class/block", node.name, "uevent").write_text("change")
    devices.run("udevadm", "settle")


@contextlib.contextmanager
def load(uri: str) -> Iterator[subprocess.Popen[bytes]]:
    """Random writes, for longer than any test waits."""
    words = f"fio --name=load --ioengine=nbd --uri={uri} --rw=randwrite --bs=4k --iodepth=8 --size=32m --time_based"
    process = subprocess.Popen(
        [*words.split(), "--runtime=250"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def make_ext4(node: Path) -> None:
    """Make a file system with a known UUID."""
    devices.run("mkfs.ext4", "-q", "-F", "-U", UUID, "-L", "data", str(node))
