# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of trackers when their data path ends under a service that goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.cbt import View
from blksnap_service.snapshot import Request
from tests.unit.fakes.datapath import FakeDatapath, Refusal, running
from tests.unit.fakes.service import MIB, Running, running_service

BLOCK = 65_536
ENDED = "the data path ended unexpectedly: "


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Running]:
    """A service over a fake data path."""
    with running(tmp_path / "run") as fake:
        async with running_service(tmp_path, fake) as one:
            yield one


@contextlib.asynccontextmanager
async def another(rig: Running, prepare: Callable[[FakeDatapath], None] | None = None) -> AsyncIterator[None]:
    """Kill the data path, start another one, wait until the tracker runs again."""
    rig.watcher.told.clear()
    await asyncio.to_thread(rig.fake.close)
    await rig.told("backends")
    with running(rig.fake.runtime_dir) as fake:
        if prepare is not None:
            prepare(fake)
        rig.fake = fake
        await rig.told("+tracker")
        await asyncio.sleep(0.05)
        yield


async def test_a_generation_goes_on_when_the_map_is_whole(rig: Running) -> None:
    """Same owner, time, numbers and reason; what was written before the end is in the map, and no signal is sent."""
    device = await rig.tracked()
    await rig.service.snapshots.create([device], Request(owner_uid=0))
    rig.fake.write(device.origin, 3 * BLOCK, 1)
    before = rig.service.registry.get(device.name)
    reading = before.tracker.last
    async with another(rig):
        after = rig.service.registry.get(device.name)
        assert after.entry == before.entry
        assert (after.tracker.last.generation, after.tracker.last.active) == (reading.generation, 2)
        assert (await after.reader.changed_ranges(View.LIVE, 1, 0, 10))[0].tolist() == [[3 * BLOCK, BLOCK]]
        assert after.tracker.node == before.tracker.node
        assert rig.catalogue.trackers.get(device.name) == before.entry
        assert not any(told.startswith("generation") for told in rig.watcher.told)
        assert rig.watcher.told[:3] == ["-snapshot", "-tracker disk_2eimg", "backends"]


async def test_a_map_that_slid_goes_on_too(rig: Running) -> None:
    """The service holds each new memory file as soon as it has told of the take that began it."""
    device = await rig.tracked()
    origin = rig.fake.origins[device.origin]
    for _ in range(254):
        origin.map.take(origin.map.generation)
    snapshot = await rig.service.snapshots.create([device], Request(owner_uid=0))
    await rig.service.snapshots.destroy(snapshot)
    reading = rig.service.registry.get(device.name).tracker.last
    assert reading.base > 0
    rig.fake.write(device.origin, 0, 1)
    async with another(rig):
        now = rig.service.registry.get(device.name)
        assert (now.tracker.last.generation, now.tracker.last.active, now.tracker.last.base) == (
            reading.generation, reading.active, reading.base,
        )  # fmt: skip
        assert (await now.reader.changed_ranges(View.LIVE, reading.changes, 0, 10))[0].tolist() == [
            [0, BLOCK]
        ]


async def test_a_tracker_adopted_at_start_goes_on(tmp_path: Path) -> None:
    """A service that was restarted holds what it needs from then on."""
    with running(tmp_path / "run") as fake:
        async with running_service(tmp_path, fake) as first:
            await first.tracked()
        async with running_service(tmp_path, fake) as second:
            ((_, before),) = second.service.registry
            async with another(second):
                ((_, after),) = second.service.registry
                assert after.tracker.last.generation == before.tracker.last.generation


def _new_map(rig: Running, origin: str, _: Path) -> None:
    """Let the data path go to another memory file that nobody told the service of."""
    one = rig.fake.origins[origin]
    for _take in range(300):
        one.map.take(one.map.generation)
    rig.fake.sync(origin)


def _no_page(rig: Running, origin: str, _: Path) -> None:
    os.pwrite(rig.fake.origins[origin].page, bytes(64), 0)


def _grow(_rig: Running, _origin: str, path: Path) -> None:
    os.truncate(path, 2 * MIB)


def _replace(_rig: Running, _origin: str, path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(bytes(MIB))
    other.rename(path)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (_new_map, "not in reach of the service"),
        (_no_page, "no state that can be read"),
        (_grow, f"size changed from {MIB} to {2 * MIB}"),
        (_replace, "replaced, while nothing tracked it"),
    ],
)
async def test_doubt_starts_a_generation(
    rig: Running, spoil: Callable[[Running, str, Path], None], reason: str
) -> None:
    """With a reason, a signal, and the block size once asked for; the tracker runs all the same."""
    device = await rig.image()
    await rig.service.registry.attach(device, owner_uid=1000, block_size=4096)
    before = rig.service.registry.get(device.name)
    spoil(rig, device.origin, Path(device.path))
    async with another(rig):
        after = rig.service.registry.get(device.name)
        assert after.tracker.last.generation != before.tracker.last.generation
        assert (after.tracker.last.block_size, after.entry.owner_uid) == (4096, 1000)
        assert after.entry.last_reset.startswith(ENDED)
        assert reason in after.entry.last_reset
        assert f"generation disk_2eimg: {after.entry.last_reset}" in rig.watcher.told


async def test_a_write_while_nothing_tracked_starts_a_generation(rig: Running) -> None:
    """Between the end of one data path and the start of the next anybody can write the file."""
    device = await rig.tracked()
    before = rig.service.registry.get(device.name)
    await asyncio.to_thread(rig.fake.close)
    await rig.told("backends")
    Path(device.path).write_bytes(b"x" * MIB)
    with running(rig.fake.runtime_dir):
        await rig.told("generation")
        after = rig.service.registry.get(device.name)
        assert after.tracker.last.generation != before.tracker.last.generation
        assert "while nothing tracked it" in after.entry.last_reset


async def test_a_map_the_data_path_refuses_starts_a_generation(rig: Running) -> None:
    """A byte newer than the numbers cannot be right."""
    device = await rig.tracked()
    before = rig.service.registry.get(device.name)
    os.pwrite(rig.fake.origins[device.origin].live, b"\xff", 0)
    async with another(rig):
        after = rig.service.registry.get(device.name)
        assert after.tracker.last.generation != before.tracker.last.generation
        assert after.entry.last_reset.startswith(ENDED + "the map to go on from was refused")


async def test_a_tracker_that_cannot_come_back_is_said(
    rig: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The entry goes, the next attach begins a generation, nothing stays open."""
    device = await rig.tracked()
    await asyncio.to_thread(rig.fake.close)
    await rig.told("backends")
    with running(rig.fake.runtime_dir) as fake:
        fake.refuse["origin.add"] = Refusal("busy", "locked by another process")
        while list(rig.catalogue.trackers):  # noqa: ASYNC110 - a table tells nobody
            await asyncio.sleep(0.02)
        assert f"{device.path} is not tracked any more: locked by another process" in caplog.text
        fake.refuse.clear()
        await rig.service.registry.attach(device, owner_uid=0)
        assert "without a clean detach" in rig.service.registry.get(device.name).entry.last_reset


async def test_a_tracker_that_is_to_come_back_can_be_detached(rig: Running) -> None:
    """While the data path is away: then it does not come back, and until then it cannot be attached twice."""
    device = await rig.tracked()
    await asyncio.to_thread(rig.fake.close)
    await rig.told("backends")
    with pytest.raises(errors.Busy, match="by itself"):
        await rig.service.registry.attach(device, owner_uid=0)
    await rig.service.detach(device, force=False)
    assert list(rig.catalogue.trackers) == []
    rig.watcher.told.clear()
    with running(rig.fake.runtime_dir) as fake:
        await rig.told("backends")
        await asyncio.sleep(0.1)
        assert fake.origins == {}


async def test_a_data_path_that_ends_again_loses_nothing(rig: Running) -> None:
    """What could not be attached to the second goes on in the third."""
    device = await rig.tracked()
    before = rig.service.registry.get(device.name)
    await asyncio.to_thread(rig.fake.close)
    await rig.told("backends")
    rig.watcher.told.clear()
    with running(rig.fake.runtime_dir) as second:
        second.refuse["list"] = Refusal("io", "not now")
        await rig.told("backends")
    async with asyncio.timeout(20):
        with running(rig.fake.runtime_dir):
            await rig.told("+tracker")
            after = rig.service.registry.get(device.name)
            assert after.tracker.last.generation == before.tracker.last.generation


async def test_snapshots_of_a_dead_data_path_are_gone(rig: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Their old data was in its memory: they are removed, their storage too, and the log says which of what."""
    device = await rig.tracked()
    snapshot = await rig.service.snapshots.create([device], Request(owner_uid=0))
    async with another(rig):
        assert rig.watcher.told[0] == "-snapshot"
        assert list(rig.catalogue.snapshots) == []
        assert f"snapshot {snapshot.id} of disk_2eimg did not survive" in caplog.text
        assert list(rig.storage.iterdir()) == []
