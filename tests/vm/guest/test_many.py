# SPDX-License-Identifier: GPL-2.0-or-later
"""Many devices tracked by one service at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

from blksnap_service.bus.paths import DEVICE, IMAGE, SNAPSHOT
from tests.bus.daemons import Bus, Daemon, client, scratch
from tests.nbd.control import Control
from tests.vm.guest import devices
from tests.vm.guest.service import TrackedDevice, attach, resolve
from tests.vm.guest.ublk import differing, read, write

MIB = 1 << 20
COUNT = 32
SIZE = 8 * MIB
BLOCK = 64 << 10
FIXED = 24 * MIB
MAPS = 4 * 4096
"""Two maps, the state and a table of chunks, each a page at least."""
QUEUES = MIB
"""The ring of a device, its requests, and the stack of its thread."""
BUFFERS, IMAGE_BUFFERS = 64 * (512 << 10), 32 * (256 << 10)
"""Where the driver copies: requests times their largest size (datapath/src/ublk/params.rs)."""
STAGING = 4 * MIB
"""Of an image: chunks on their way to the storage."""


async def test_thirty_two_devices_are_tracked_at_once() -> None:
    """Attached, taken in one snapshot, written, taken again: no block missed, images as they were; memory is bounded."""
    devices.modprobe("ublk_drv")
    devices.modprobe("dm-mod")
    chance = random.Random(32)
    with contextlib.ExitStack() as stack:
        disks = [stack.enter_context(devices.null_blk(SIZE)) for _ in range(COUNT)]
        directory = stack.enter_context(scratch())
        bus = Bus(directory)
        stack.callback(bus.stop)
        daemon = Daemon(directory, bus)
        stack.callback(daemon.clean_up)
        await daemon.start()
        async with client(bus) as user:
            # One after the other, as the answer to each must come within a time.
            tracked = [await attach(user, disk) for disk in disks]
            pid = daemon.datapath_pid()
            assert pid is not None
            with Control(daemon.run / "datapath.sock") as control:
                copied = not control.call("hello", protocol=1)["ublk"]["zero_copy"]
            allowed = FIXED + COUNT * (MAPS + QUEUES + (BUFFERS if copied else 0))
            check(f"{COUNT} devices tracked", pid, allowed)
            first, numbers = await take(tracked)
            allowed += COUNT * (STAGING + MAPS + (IMAGE_BUFFERS if copied else 0))
            before = [await asyncio.to_thread(read, node) for node in first]
            for one in tracked:
                for block in chance.sample(range(SIZE // BLOCK), 20):
                    await asyncio.to_thread(write, one.node, block * BLOCK, chance.randbytes(4096))
            check(f"{COUNT} devices tracked, a snapshot of all held and written over", pid, allowed)
            second, _ = await take(tracked)
            for one, old, number, was, new in zip(tracked, first, numbers, before, second, strict=True):
                different = differing(was, await asyncio.to_thread(read, new), BLOCK)
                assert len(different) == 20
                assert await one.changed_since(number) == different
                assert await asyncio.to_thread(read, old) == was
            for snapshot in await user.get(tracked[0].path, DEVICE, "Snapshots"):
                await user.call(snapshot, SNAPSHOT, "Destroy", "")
            for one in tracked:
                await one.detach()
            check("none tracked any more", pid, FIXED)
            for disk in disks:
                assert not await user.get(await resolve(user, disk), DEVICE, "Tracked")


async def take(tracked: list[TrackedDevice]) -> tuple[list[Path], list[int]]:
    """Take all at one instant; the nodes of the images and their numbers, in the order of the devices."""
    user = tracked[0].user
    snapshot = await user.snapshot(*(one.path for one in tracked), limit=("t", 512 * MIB))
    images = {
        await user.get(image, IMAGE, "Device"): image
        for image in await user.get(snapshot, SNAPSHOT, "Images")
    }
    nodes = [Path(await user.get(images[one.path], IMAGE, "Path")) for one in tracked]
    return nodes, [await user.get(images[one.path], IMAGE, "ChangesNumber") for one in tracked]


def check(what: str, pid: int, allowed: int) -> None:
    """Print what a process holds, and compare."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    held = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
    text = f"{what}: {held / MIB:.1f} MiB, allowed {allowed / MIB:.1f}"
    print(text)
    assert held <= allowed, text
