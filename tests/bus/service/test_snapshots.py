# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots of a running service: held, overflowing, of several devices."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from blksnap_service.bus.paths import IMAGE, MANAGER, MANAGER_PATH, SNAPSHOT, TRACKER
from tests.bus.daemons import MIB, Bus, Client, Daemon, Signals, client, content, make_image, refused, write


async def gone(user: Client, path: str) -> None:
    """Wait until an object is not there any more."""
    while path in await user.objects():  # noqa: ASYNC110 - asks another process
        await asyncio.sleep(0.02)


async def test_a_held_snapshot_ends_with_its_caller(user: Client, bus: Bus, image: Path) -> None:
    """Unless it was released."""
    device = await user.attach(image)
    async with client(bus) as other:
        held = await other.snapshot(device, hold=("b", True))
        released = await other.snapshot(device, hold=("b", True))
        assert await user.get(held, SNAPSHOT, "Held")
        await other.call(released, SNAPSHOT, "Release", "")
    await gone(user, held)
    assert not await user.get(released, SNAPSHOT, "Held")


async def test_a_hold_outlives_the_service_but_not_its_caller(
    user: Client, daemon: Daemon, bus: Bus, image: Path
) -> None:
    """After a restart the caller is still watched; one that left meanwhile is missed."""
    device = await user.attach(image)
    staying = await user.snapshot(device, hold=("b", True))
    async with client(bus) as other:
        leaving = await other.snapshot(device, hold=("b", True))
        await daemon.end(signal.SIGKILL)
    await daemon.start()
    await gone(user, leaving)
    assert await user.get(staying, SNAPSHOT, "Held")


async def test_storage_that_overflows_fails_only_the_snapshot(
    user: Client, signals: Signals, directory: Path
) -> None:
    """Writes go on; the state, the error and the signals say what happened."""
    device = await user.attach(make_image(directory / "disk.img", 16 * MIB))
    uri = await user.get(device, TRACKER, "Node")
    await write(uri, (1, 0, 16 * MIB))
    snapshot = await user.snapshot(device, limit=("t", 4 * MIB), low_space=("t", 2 * MIB))
    for part in range(16):
        await write(uri, (2, part * MIB, MIB))
    assert (await signals.wait_for("LowSpace", snapshot))[1] == 4 * MIB
    await signals.wait_for("NoSpace", snapshot)
    about, _, _ = await signals.wait_for("Corrupted", snapshot)
    assert about == device
    assert await user.get(snapshot, SNAPSHOT, "State") == "failed"
    assert await user.get(snapshot, SNAPSHOT, "Error")
    (picture,) = await user.get(snapshot, SNAPSHOT, "Images")
    with refused("Corrupted", "take a new snapshot"):
        await user.call(picture, IMAGE, "Export", "")
    assert await content(uri) == b"\2" * 16 * MIB
    await user.call(snapshot, SNAPSHOT, "Destroy", "")
    await user.snapshot(device)


async def test_two_devices_are_taken_at_one_instant(user: Client, directory: Path) -> None:
    """One snapshot, an image of each, the same moment."""
    devices = [await user.attach(make_image(directory / f"{name}.img")) for name in ("one", "two")]
    snapshot = await user.snapshot(*devices, storage=("s", str(directory / "diff")))
    assert await user.get(snapshot, SNAPSHOT, "Devices") == devices
    pictures = await user.get(snapshot, SNAPSHOT, "Images")
    assert [await user.get(one, IMAGE, "Device") for one in pictures] == devices
    assert await user.call(MANAGER_PATH, MANAGER, "Collect", "") == [snapshot]
    await user.call(snapshot, SNAPSHOT, "Destroy", "")
    assert not (directory / "diff").exists()
