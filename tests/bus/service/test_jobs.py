# SPDX-License-Identifier: GPL-2.0-or-later
"""Jobs: operations that take long are shown while they run, and can be stopped where that leaves nothing half done."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from blksnap_service.bus import paths
from blksnap_service.bus.paths import DEVICE, JOB, SNAPSHOT
from blksnap_service.errors import RemoteError
from tests.bus.daemons import (
    START_S,
    Bus,
    Client,
    Daemon,
    Signals,
    client,
    make_image,
    refused,
    standing_still,
)


async def jobs(user: Client, count: int) -> dict[str, dict[str, Any]]:
    """Wait until there are that many jobs; returns them by path."""
    async with asyncio.timeout(START_S):
        while True:
            objects = await user.objects()
            found = {path: one[JOB] for path, one in objects.items() if JOB in one}
            if len(found) == count:
                return found
            await asyncio.sleep(0.02)


async def ours(user: Client) -> dict[str, dict[str, dict[str, Any]]]:
    """Return all objects but the block devices of this machine, which change by themselves."""
    objects = await user.objects()
    return {path: one for path, one in objects.items() if not one.get(DEVICE, {}).get("DeviceNumber")}


async def outcome(call: asyncio.Task[Any]) -> str:
    """Return the last name of the error a call ended with, or nothing."""
    try:
        async with asyncio.timeout(START_S):
            await call
    except RemoteError as error:
        return error.remote_name.rpartition(".")[2]
    return ""


async def test_what_takes_long_is_shown(user: Client, daemon: Daemon, signals: Signals, image: Path) -> None:
    """What it does, to what, for whom; and how it ended."""
    device = await user.attach(image)
    with standing_still(daemon):
        taking = asyncio.create_task(user.snapshot(device))
        ((path, job),) = (await jobs(user, 1)).items()
        assert path.startswith(f"{paths.ROOT}/jobs/")
        assert job.pop("StartTime") > 0
        assert job == {
            "Operation": "snapshot-take",
            "Progress": 0.0,
            "ProgressValid": False,
            "Bytes": 0,
            "Rate": 0,
            "ExpectedEndTime": 0,
            "Objects": [device],
            "StartedByUID": os.geteuid(),
            "Cancelable": True,
        }
    assert await outcome(taking) == ""
    assert await signals.wait_for("Completed", path) == [True, ""]
    assert await jobs(user, 0) == {}
    # Devices of this machine come and go too.
    assert (paths.ROOT, "InterfacesRemoved", [path, [JOB]]) in signals.heard


async def test_a_cancelled_snapshot_leaves_nothing(
    user: Client, daemon: Daemon, signals: Signals, image: Path
) -> None:
    """Neither the snapshot nor the tracker that was attached for it."""
    device = await user.add(image)
    before = await ours(user)
    with standing_still(daemon):
        taking = asyncio.create_task(user.snapshot(device, attach=("b", True)))
        (path,) = await jobs(user, 1)
        await user.call(path, JOB, "Cancel", "")
    assert await outcome(taking) == "Cancelled"
    assert await signals.wait_for("Completed", path) == [False, "it was cancelled, and is undone"]
    assert await ours(user) == before


async def test_an_attach_is_cancelled_before_it_begins(user: Client, daemon: Daemon, image: Path) -> None:
    """While it asks what can track now."""
    device = await user.add(image)
    with standing_still(daemon):
        attaching = asyncio.create_task(user.call(device, DEVICE, "Attach", ""))
        (path,) = await jobs(user, 1)
        await user.call(path, JOB, "Cancel", "")
    assert await outcome(attaching) == "Cancelled"
    assert not await user.get(device, DEVICE, "Tracked")


async def test_progress_is_told(user: Client, daemon: Daemon, signals: Signals, directory: Path) -> None:
    """One step for each device that is to be tracked, one for the take."""
    images = [make_image(directory / f"{number}.img") for number in range(3)]
    devices = [await user.add(image) for image in images]
    await user.call(devices[0], DEVICE, "Attach", "")
    with standing_still(daemon):
        taking = asyncio.create_task(user.snapshot(*devices, attach=("b", True)))
        ((path, job),) = (await jobs(user, 1)).items()
        assert (job["Progress"], job["ProgressValid"]) == (0.25, True)
        assert job["ExpectedEndTime"] > job["StartTime"]
    assert await outcome(taking) == ""
    reached = [
        body[1]["Progress"].value
        for where, member, body in signals.heard
        if (where, member) == (path, "PropertiesChanged")
    ]
    assert reached == [0.5, 0.75, 0.75]


@pytest.mark.parametrize("member", ["Detach", "Take", "Destroy"])
async def test_what_waits_for_another_can_be_cancelled(
    user: Client, daemon: Daemon, bus: Bus, image: Path, member: str
) -> None:
    """At once; what it waits for goes on, and cannot be stopped where that would leave it half done."""
    device = await user.attach(image)
    path, interface = device, DEVICE
    if member in {"Take", "Destroy"}:
        path, interface = await user.snapshot(device, take=("b", False)), SNAPSHOT
    with standing_still(daemon):
        first = asyncio.create_task(user.call(path, interface, member, ""))
        (running,) = await jobs(user, 1)
        async with client(bus) as other:
            second = asyncio.create_task(other.call(path, interface, member, ""))
            (waiting,) = set(await jobs(user, 2)) - {running}
            with refused("NotSupported", "cannot be cancelled any more"):
                await user.call(running, JOB, "Cancel", "")
            assert not await user.get(running, JOB, "Cancelable")
            await user.call(waiting, JOB, "Cancel", "")
            assert await outcome(second) == "Cancelled"
    assert await outcome(first) == ""
