# SPDX-License-Identifier: GPL-2.0-or-later
"""The service or its data path is killed: I/O goes on or comes back, and no change is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from blksnap_service.bus.paths import DEVICE, IMAGE, SNAPSHOT, TRACKER
from tests.bus.daemons import BLOCK, MIB, Client, Daemon, Signals, blocks_since, content, make_image, write


async def load(uri: str, seconds: int, *, patience: bool = True) -> dict[str, Any]:
    """Write and verify with fio for a while; returns its report. Fails when any request failed, if there is patience."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report"
        process = await asyncio.create_subprocess_exec(
            # Without its server fio complains into its report for ever: one process, which must not outlive this one.
            "setpriv", "--pdeathsig", "KILL", "--",
            "fio", "--thread", "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=8",
            "--size=16M", "--time_based", f"--runtime={seconds}", "--verify=crc32c", "--verify_backlog=512",
            "--verify_state_save=0", "--thinktime=200", "--output-format=json", f"--output={report}",
            cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            status = await process.wait()
            if not patience:
                return {}
            assert status == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        # With --thread a line about the connection comes first.
        text = report.read_text()
        job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
        assert job["error"] == 0
        return job


async def test_killing_the_service_stops_no_io_and_forgets_nothing(
    user: Client, daemon: Daemon, directory: Path
) -> None:
    """While fio writes and verifies: kill -9, start, take, stop, start. All it had is there again."""
    device = await user.attach(make_image(directory / "disk.img", 16 * MIB))
    uri = await user.get(device, TRACKER, "Node")
    await write(uri, (7, 0, MIB))
    snapshot = await user.snapshot(device, description=("s", "held over the kill"))
    (picture,) = await user.get(snapshot, SNAPSHOT, "Images")
    export = await user.get(picture, IMAGE, "NbdUri")
    frozen = await content(export)
    before = (await user.objects())[device]
    async with asyncio.TaskGroup() as group:
        loading = group.create_task(load(uri, 6))
        await asyncio.sleep(1)
        await daemon.end(signal.SIGKILL)
        await asyncio.sleep(0.5)
        assert not loading.done()
        await daemon.start()
        after = await user.objects()
        assert after[device][TRACKER] == before[TRACKER]
        assert after[snapshot][SNAPSHOT]["Description"] == "held over the kill"
        second = await user.snapshot(device)
        assert await user.get(device, TRACKER, "ChangesNumber") == 2
        assert await daemon.end(signal.SIGTERM) == 0
        assert not loading.done()
        await daemon.start()
        assert {snapshot, second} < set(await user.objects())
        assert await content(export) == frozen
    assert loading.result()["write"]["total_ios"] > 100
    assert await user.get(snapshot, SNAPSHOT, "State") == "taken"
    assert await content(export) == frozen


async def states_until(signals: Signals, device: str, last: str) -> list[str]:
    """Return the states a tracker was told to have, up to one."""
    async with asyncio.timeout(30):
        while True:
            states = [
                str(body[1]["State"].value)
                for path, member, body in signals.heard
                if member == "PropertiesChanged" and path == device and "State" in body[1]
            ]
            if last in states:
                return states
            await asyncio.sleep(0.05)


async def test_a_killed_data_path_loses_nothing(
    user: Client, daemon: Daemon, signals: Signals, directory: Path
) -> None:
    """Killed while fio writes: trackers recover, their maps hold every difference, snapshots and images are what they were."""
    busy = make_image(directory / "a.img", 16 * MIB)
    quiet = make_image(directory / "b.img")
    devices = [await user.attach(busy), await user.attach(quiet, persistent=("b", True))]
    nodes = [await user.get(device, TRACKER, "Node") for device in devices]
    await write(nodes[0], (1, 0, 16 * MIB))
    snapshot = await user.snapshot(*devices)
    images = await user.get(snapshot, SNAPSHOT, "Images")
    exports = [await user.get(image, IMAGE, "NbdUri") for image in images]
    frozen = [await content(export) for export in exports]
    await write(nodes[1], (2, 3 * BLOCK, 512))
    before = (await user.objects()), busy.read_bytes()
    async with asyncio.TaskGroup() as group:
        loading = group.create_task(load(nodes[0], 30, patience=False))
        async with asyncio.timeout(20):
            while not await blocks_since(user, devices[0], 1):  # noqa: ASYNC110 - fio tells nobody
                await asyncio.sleep(0.1)
        daemon.kill_datapath()
        assert await states_until(signals, devices[0], "tracking") == ["recovering", "tracking"]
        loading.cancel()
    after = await user.objects()
    for path in (*devices, *images):
        assert after[path] == before[0][path]
    assert (after[snapshot][SNAPSHOT]["State"], after[snapshot][SNAPSHOT]["Images"]) == ("taken", images)
    now = busy.read_bytes()
    different = {offset for offset in range(0, len(now), BLOCK)
                 if now[offset : offset + BLOCK] != before[1][offset : offset + BLOCK]}  # fmt: skip
    assert different
    assert different <= set(await blocks_since(user, devices[0], 1))
    assert await blocks_since(user, devices[1], 1) == [3 * BLOCK]
    await write(nodes[1], (3, 9 * BLOCK, 512))
    assert await blocks_since(user, devices[1], 1) == [3 * BLOCK, 9 * BLOCK]
    assert [await content(export) for export in exports] == frozen
    await user.snapshot(*devices)
    assert await user.get(devices[1], TRACKER, "ChangesNumber") == 2
    assert not any(member == "GenerationStarted" for _, member, _ in signals.heard)


async def test_a_file_that_grew_under_a_killed_data_path_begins_anew(
    user: Client, daemon: Daemon, signals: Signals, image: Path
) -> None:
    """With the next take: a new generation, with its reason as property and signal."""
    device = await user.attach(image)
    generation = await user.get(device, TRACKER, "GenerationId")
    daemon.kill_datapath()
    os.truncate(image, 2 * MIB)
    await states_until(signals, device, "tracking")
    await user.snapshot(device)
    now, reason = await signals.wait_for("GenerationStarted", device)
    assert now == await user.get(device, TRACKER, "GenerationId") != generation
    assert reason == await user.get(device, TRACKER, "LastReset")
    assert reason


async def test_a_data_path_that_lost_everything_begins_anew(
    user: Client, daemon: Daemon, signals: Signals, image: Path
) -> None:
    """It and its holder were killed: a new generation, with its reason as property and signal; the snapshot is gone, and said."""
    device = await user.attach(image)
    generation = await user.get(device, TRACKER, "GenerationId")
    snapshot = await user.snapshot(device)
    daemon.lose_datapath()
    now, reason = await signals.wait_for("GenerationStarted", device)
    assert now == await user.get(device, TRACKER, "GenerationId") != generation
    assert reason == await user.get(device, TRACKER, "LastReset")
    assert reason.startswith("the data path ended and lost its map: ")
    async with asyncio.timeout(20):
        while snapshot in await user.objects():  # noqa: ASYNC110 - simpler than a signal
            await asyncio.sleep(0.05)
    snapshot_id = snapshot.rpartition("/")[2].replace("_", "-")
    assert f"snapshot {snapshot_id} of disk_2eimg did not survive" in daemon.said()


async def test_a_data_path_killed_with_the_service_loses_nothing(
    user: Client, daemon: Daemon, image: Path
) -> None:
    """The service that is started again finds what the holder kept."""
    device = await user.attach(image)
    snapshot = await user.snapshot(device)
    before = await user.objects()
    await daemon.end(signal.SIGKILL)
    daemon.kill_datapath()
    await daemon.start()
    after = await user.objects()
    assert {path: after[path] for path in (device, snapshot)} == {
        path: before[path] for path in (device, snapshot)
    }


async def test_what_was_lost_with_the_service_is_not_continued(
    user: Client, daemon: Daemon, directory: Path
) -> None:
    """Nobody held the maps: what is to be tracked always is, as a new generation; the rest is forgotten, and said."""
    always = await user.attach(make_image(directory / "a.img"), persistent=("b", True))
    once = await user.attach(make_image(directory / "b.img"))
    generation = await user.get(always, TRACKER, "GenerationId")
    await daemon.end(signal.SIGKILL)
    daemon.lose_datapath()
    await daemon.start()
    objects = await user.objects()
    assert not objects[once][DEVICE]["Tracked"]
    assert objects[always][TRACKER]["GenerationId"] != generation
    assert "without a clean detach" in objects[always][TRACKER]["LastReset"]
    assert "b.img is not tracked any more" in daemon.said()
