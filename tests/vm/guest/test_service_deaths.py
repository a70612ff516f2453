# SPDX-License-Identifier: GPL-2.0-or-later
"""blksnapd, its data path and what keeps their maps are killed while a real block device is in use."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import time
from pathlib import Path

from blksnap_service.bus.paths import IMAGE, SNAPSHOT
from tests.bus.daemons import Bus, Daemon, client
from tests.nbd.load import running
from tests.vm.guest import devices
from tests.vm.guest.service import (
    DISK_BYTES as SIZE,
    TrackedDevice,
    mounted,
    scatter,
)
from tests.vm.guest.ublk import differing, read, verified_writes, verifying

MIB = 1 << 20
SERVICE_DEATHS = 20


async def test_killing_the_service_stops_no_io(tracked: TrackedDevice, rig: tuple[Bus, Daemon]) -> None:
    """Under verified writes, with a held snapshot: no error, one generation, no change missed, the image as it was.

    Most of the twenty deaths are somewhere on its way to being ready, some after it was.
    """
    bus, daemon = rig
    chance = random.Random(3)
    taken = await tracked.snapshot()
    before = await asyncio.to_thread(read, taken.node)
    generation = await tracked.get("GenerationId")
    with running(verifying(tracked.node, 16 * MIB)) as going:
        await daemon.end(signal.SIGKILL)
        started = time.monotonic()
        await daemon.start()
        takes_s = time.monotonic() - started
        for number in range(1, SERVICE_DEATHS):
            assert going()
            await daemon.end(signal.SIGKILL)
            daemon.launch()
            if number % 5 == 4:
                await daemon.ready()
            else:
                await asyncio.sleep(chance.uniform(0.3, 1) * takes_s)
        await daemon.ready()
    async with client(bus) as user:
        again = TrackedDevice(user, tracked.path, tracked.node)
        assert await again.get("GenerationId") == generation
        assert await again.get("Node") == str(tracked.node)
        assert await user.get(taken.image, IMAGE, "Path") == str(taken.node)
        assert await asyncio.to_thread(read, taken.node) == before
        later = await again.snapshot()
        after = await asyncio.to_thread(read, later.node)
        different = differing(before, after, await again.get("BlockSize"))
        assert different
        assert different <= await again.changed_since(taken.number)
        await later.destroy()
        await user.call(taken.path, SNAPSHOT, "Destroy", "")
        await again.detach()


async def test_killing_the_data_path_fails_no_io(tracked: TrackedDevice, rig: tuple[Bus, Daemon]) -> None:
    """Under verified writes, with a held snapshot: no error, no new generation, no change missed, the image as it was."""
    _, daemon = rig
    first = await tracked.snapshot()
    before = await asyncio.to_thread(read, first.node)
    generation = await tracked.get("GenerationId")
    load = fio(tracked.node)
    for _ in range(3):
        await asyncio.sleep(2)
        daemon.kill_datapath()
        async with asyncio.timeout(60):
            while await tracked.get("State") != "recovering":  # noqa: ASYNC110 - this is what a client may do
                await asyncio.sleep(0.02)
            while await tracked.get("State") != "tracking":  # noqa: ASYNC110 - the same
                await asyncio.sleep(0.1)
    await succeeds(load)
    assert await tracked.get("GenerationId") == generation
    assert await tracked.user.get(first.path, SNAPSHOT, "State") == "taken"
    assert await asyncio.to_thread(read, first.node) == before
    second = await tracked.snapshot()
    after = await asyncio.to_thread(read, second.node)
    assert differing(before, after, await tracked.get("BlockSize")) <= await tracked.changed_since(
        first.number
    )


async def test_losing_all_that_keeps_the_maps_stops_no_file_system(
    tracked: TrackedDevice, rig: tuple[Bus, Daemon], directory: Path
) -> None:
    """The data path and its holder are killed, also with the service: a new generation and why, snapshots are gone."""
    _, daemon = rig
    devices.run("mkfs.ext4", "-q", str(tracked.node))
    with mounted(tracked.node, directory / "mnt") as target:
        for with_service in (False, True):
            taken = await tracked.snapshot()
            generation = await tracked.get("GenerationId")
            load = asyncio.create_task(asyncio.to_thread(scatter, target, 200, 8))
            await asyncio.sleep(1)
            if with_service:
                await daemon.end(signal.SIGKILL)
            daemon.lose_datapath()
            if with_service:
                await daemon.start()
            async with asyncio.timeout(60):
                while await tracked.get("GenerationId") == generation:  # noqa: ASYNC110 - as clients may
                    await asyncio.sleep(0.1)
            await load
            assert await tracked.get("State") == "tracking"
            assert await tracked.get("Node") == str(tracked.node)
            assert "killed together" in await tracked.get("LastReset")
            async with asyncio.timeout(20):
                while taken.path in await tracked.user.objects():  # noqa: ASYNC110 - the same
                    await asyncio.sleep(0.1)
        first = await tracked.snapshot()
        before = await asyncio.to_thread(read, first.node)
        scatter(target, 30, seed=9)
        second = await tracked.snapshot()
        after = await asyncio.to_thread(read, second.node)
        assert differing(before, after, await tracked.get("BlockSize")) <= await tracked.changed_since(
            first.number
        )
        await first.destroy()
        await second.destroy()
    devices.run("fsck.ext4", "-n", "-f", str(tracked.node))


def fio(node: Path) -> subprocess.Popen[bytes]:
    """Write and verify the whole node at random; ends by itself."""
    words = ("fio", "--name=load", "--ioengine=io_uring", "--direct=1", *verified_writes(node, SIZE))
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


async def succeeds(load: subprocess.Popen[bytes]) -> None:
    """The load ends well."""
    output, _ = await asyncio.to_thread(load.communicate)
    assert load.returncode == 0, output.decode(errors="replace")
