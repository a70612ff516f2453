# SPDX-License-Identifier: GPL-2.0-or-later
"""The real service over real devices, as the tests in a guest handle it. Holds no expectation of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blksnap_service.bus.paths import DEVICE, IMAGE, MANAGER, MANAGER_PATH, SNAPSHOT, TRACKER
from tests.bus.daemons import Client
from tests.vm.guest import devices

DISK_BYTES = 128 << 20
"""Of the disk that the fixtures of conftest track."""


@dataclass(frozen=True)
class TrackedDevice:
    """A device object with a tracker."""

    user: Client
    path: str
    node: Path

    async def get(self, name: str) -> Any:
        """Return a property of the tracker."""
        return await self.user.get(self.path, TRACKER, name)

    async def info(self) -> dict[str, Any]:
        """Make a reading."""
        info = await self.user.call(self.path, TRACKER, "GetInfo", "")
        return {name: getattr(value, "value", value) for name, value in info.items()}

    async def snapshot(self, **options: Any) -> Taken:
        """Take a snapshot of this device alone."""
        snapshot = await self.user.snapshot(self.path, **options)
        (image,) = await self.user.get(snapshot, SNAPSHOT, "Images")
        return Taken(
            self.user,
            snapshot,
            image,
            Path(await self.user.get(image, IMAGE, "Path")),
            await self.user.get(image, IMAGE, "ChangesNumber"),
        )

    async def changed_since(self, number: int) -> set[int]:
        """Return the numbers of the blocks changed since a snapshot number, as of the last take."""
        size, capacity = await self.get("BlockSize"), await self.get("Capacity")
        found, offset = set[int](), 0
        while offset < capacity:
            ranges, offset = await self.user.call(
                self.path, TRACKER, "GetChangedRanges", "utu", number, offset, 1000
            )
            for start, length in ranges:
                found.update(range(start // size, -(-(start + length) // size)))
        return found

    async def detach(self, **options: Any) -> None:
        """Detach."""
        await self.user.call(self.path, DEVICE, "Detach", "", **options)


@dataclass(frozen=True)
class Taken:
    """A snapshot of one device, and its image."""

    user: Client
    path: str
    image: str
    node: Path
    number: int

    async def destroy(self) -> None:
        """End it."""
        await self.user.call(self.path, SNAPSHOT, "Destroy", "")


async def resolve(user: Client, node: Path) -> str:
    """Return the object of a device."""
    return str(await user.call(MANAGER_PATH, MANAGER, "ResolveDevice", "s", str(node)))


async def attach(user: Client, device: Path, **options: Any) -> TrackedDevice:
    """Attach a tracker."""
    path = await resolve(user, device)
    await user.call(path, DEVICE, "Attach", "", **options)
    return TrackedDevice(user, path, Path(await user.get(path, TRACKER, "Node")))


@contextlib.contextmanager
def mounted(node: Path, target: Path, options: str = "") -> Iterator[Path]:
    """Mount a device for as long as the block lasts."""
    target.mkdir(exist_ok=True)
    devices.run("mount", *(("-o", options) if options else ()), str(node), str(target))
    try:
        yield target
    finally:
        devices.run("umount", str(target))


def scatter(directory: Path, count: int, seed: int) -> None:
    """Write files of many sizes, over those that are there."""
    import random

    chance = random.Random(seed)
    for number in range(count):
        (directory / f"file-{chance.randrange(2 * count)}").write_bytes(
            chance.randbytes(chance.randrange(1, 200_000))
        )
        if number % 7 == 0:
            (directory / f"file-{chance.randrange(2 * count)}").unlink(missing_ok=True)
    os.sync()


async def listed(user: Client, disk: Path) -> None:
    """Wait until the service knows a disk that has just appeared."""
    async with asyncio.timeout(20):
        while True:
            objects = (await user.objects()).values()
            if str(disk) in [one[DEVICE]["Path"] for one in objects if DEVICE in one]:
                return
            await asyncio.sleep(0.1)
