# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of trackers and snapshots when their data path ends under a service that goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.cbt import GenerationId, View
from blksnap_service.changemap import ChangeMap
from blksnap_service.snapshot import Request
from tests.unit.fakes.datapath import FakeDatapath, Refusal, running
from tests.unit.fakes.machine import Machine
from tests.unit.fakes.service import MIB, Running, running_service

BLOCK = 65_536
NAME = "disk_2eimg"
LOST = "the data path ended and lost its map: "


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for a data path more often than a service of users does."""
    monkeypatch.setattr("blksnap_service.service.RETRY_S", (0.05,))


@contextlib.asynccontextmanager
async def recovery(rig: Running) -> AsyncIterator[None]:
    """The data path dies and is back with all it had; what the block does happens while it is away."""
    away, since = rig.fake, rig.service.reconciled
    rig.watcher.told.clear()
    away.accepting.clear()
    await asyncio.to_thread(away.drop_connections)
    await rig.told("backends")
    yield
    rig.watcher.told.remove("backends")
    away.accepting.set()
    await rig.told("backends")
    await settled(rig, since)


@contextlib.asynccontextmanager
async def successor(rig: Running) -> AsyncIterator[FakeDatapath]:
    """The data path dies, and another one that knows of nothing takes its place."""
    rig.watcher.told.clear()
    await asyncio.to_thread(rig.fake.close)
    await rig.told("backends")
    rig.watcher.told.remove("backends")
    with running(rig.fake.runtime_dir) as fake:
        rig.fake = fake
        yield fake


async def settled(rig: Running, since: int) -> None:
    """Wait until the service is in step with a data path once more than ``since``."""
    async with asyncio.timeout(60):
        while rig.service.reconciled == since:  # noqa: ASYNC110 - simpler than an event for each time
            await asyncio.sleep(0.01)


async def test_a_recovered_data_path_goes_on_where_it_was(rig: Running, fake: FakeDatapath) -> None:
    """Trackers and snapshots stay objects, nothing says that a generation began, and maps have what was written before."""
    device = await rig.tracked()
    snapshot = await rig.service.snapshots.create([device], Request(owner_uid=0))
    fake.write(device.origin, 3 * BLOCK, 1)
    before = rig.service.registry.get(device.name)
    await before.tracker.read()
    reading = before.tracker.last
    async with recovery(rig):
        assert before.tracker.last.state == "recovering"
        assert rig.watcher.told == [f"~tracker {NAME}", "backends"]
    after = rig.service.registry.get(device.name)
    assert after.entry == before.entry
    assert after.tracker.last == reading
    assert (await after.reader.changed_ranges(View.LIVE, 1, 0, 10))[0].tolist() == [[3 * BLOCK, BLOCK]]
    assert list(rig.service.snapshots) == [snapshot]
    assert rig.watcher.told == [f"~tracker {NAME}", "backends", f"~tracker {NAME}"]


async def test_while_it_recovers_requests_say_so(rig: Running) -> None:
    """Nothing is forgotten, and nothing is changed behind the data path's back."""
    device = await rig.tracked()
    async with recovery(rig):
        for request in (
            rig.service.detach(device, force=False),
            rig.service.registry.mark_all(device.name),
            rig.service.snapshots.create([device], Request(owner_uid=0)),
        ):
            with pytest.raises(errors.NotAvailable, match="data path"):
                await request
        with pytest.raises(errors.AlreadyTracked):
            await rig.service.registry.attach(device, owner_uid=0)
    assert device.name in rig.service.registry
    assert list(rig.catalogue.snapshots) == []


async def test_a_generation_that_ended_in_between_is_told(rig: Running, fake: FakeDatapath) -> None:
    """The data path knows best whether its map is whole."""
    device = await rig.tracked()
    async with recovery(rig):
        other = GenerationId("11111111-2222-4333-8444-555555555555")
        fake.origins[device.origin].map = ChangeMap(MIB, other)
    await rig.told("generation")
    tracked = rig.service.registry.get(device.name)
    assert tracked.tracker.last.generation == "11111111-2222-4333-8444-555555555555"
    assert f"generation {NAME}: {tracked.entry.last_reset}" in rig.watcher.told


async def test_what_failed_in_between_is_told(rig: Running, fake: FakeDatapath) -> None:
    """State that accompanied an event nobody heard."""
    device = await rig.tracked()
    snapshot = await rig.service.snapshots.create([device], Request(owner_uid=0))
    async with recovery(rig):
        fake.snapshots[snapshot.id].state = "failed"
        fake.origins[device.origin].state = "broken"
        fake.origins[device.origin].reason = "the disk is gone"
    assert snapshot.state == "failed"
    assert rig.service.registry.get(device.name).tracker.last.state == "broken"


async def test_an_attach_nobody_waits_for_any_more_is_undone(rig: Running, fake: FakeDatapath) -> None:
    """It was under way and may have been carried out by the one that died."""
    device = await rig.image()
    fake.die_after("origin.add")
    with pytest.raises(errors.NotAvailable):
        await rig.service.registry.attach(device, owner_uid=0)
    async with asyncio.timeout(60):
        while fake.origins:  # noqa: ASYNC110 - the fake tells nobody
            await asyncio.sleep(0.01)
    assert (list(rig.service.registry), list(rig.catalogue.trackers)) == ([], [])
    await rig.service.registry.attach(device, owner_uid=0)


async def test_a_snapshot_nobody_waits_for_any_more_is_undone(rig: Running, fake: FakeDatapath) -> None:
    """Nobody knows of it, and its storage would fill."""
    device, since = await rig.tracked(), rig.service.reconciled
    fake.die_after("snapshot.take")
    with pytest.raises(errors.NotAvailable):
        await rig.service.snapshots.create([device], Request(owner_uid=0))
    async with asyncio.timeout(60):
        while fake.snapshots:  # noqa: ASYNC110 - the fake tells nobody
            await asyncio.sleep(0.01)
    await settled(rig, since)
    assert (list(rig.service.snapshots), list(rig.catalogue.snapshots)) == ([], [])


async def test_a_data_path_that_lost_everything_starts_a_generation(rig: Running) -> None:
    """With the reason, a signal, the owner and the block size that was asked for; snapshots are gone."""
    device = await rig.image()
    await rig.service.registry.attach(device, owner_uid=1000, block_size=4096)
    before = rig.service.registry.get(device.name)
    await rig.service.snapshots.create([device], Request(owner_uid=0))
    async with successor(rig):
        await rig.told("generation")
        await rig.told("-snapshot")
        after = rig.service.registry.get(device.name)
        assert after.tracker.last.generation != before.tracker.last.generation
        assert (after.tracker.last.block_size, after.entry.owner_uid) == (4096, 1000)
        assert after.entry.attached_at == before.entry.attached_at
        assert after.entry.last_reset.startswith(LOST)
        assert f"generation {NAME}: {after.entry.last_reset}" in rig.watcher.told
        assert f"-tracker {NAME}" not in rig.watcher.told
        assert rig.catalogue.trackers.get(device.name) == after.entry
        assert list(rig.catalogue.snapshots) == []
        assert list(rig.storage.iterdir()) == []


async def test_an_older_map_never_comes_back(rig: Running) -> None:
    """The detach before the attach saved one; what was written since is not in it."""
    device = await rig.tracked()
    await rig.service.detach(device, force=False)
    await rig.service.registry.attach(device, owner_uid=1000)
    before = rig.service.registry.get(device.name).tracker.last.generation
    async with successor(rig):
        await rig.told("generation")
        assert rig.service.registry.get(device.name).tracker.last.generation != before


async def test_a_tracker_that_cannot_come_back_is_said(
    rig: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """The entry goes, and the next attach begins a generation."""
    device, since = await rig.tracked(), rig.service.reconciled
    rig.watcher.told.clear()
    await asyncio.to_thread(rig.fake.close)
    await rig.told("backends")
    with running(rig.fake.runtime_dir) as fake:
        fake.refuse["origin.add"] = Refusal("busy", "locked by another process")
        await rig.told("-tracker")
        await settled(rig, since)
        assert f"{device.path} is not tracked any more: locked by another process" in caplog.text
        assert list(rig.catalogue.trackers) == []
        fake.refuse.clear()
        await rig.service.registry.attach(device, owner_uid=0)
        assert "without a clean detach" in rig.service.registry.get(device.name).entry.last_reset


async def test_a_data_path_that_ends_again_loses_nothing(rig: Running, fake: FakeDatapath) -> None:
    """Before it could be asked what it has."""
    device = await rig.tracked()
    before, since = rig.service.registry.get(device.name).tracker.last, rig.service.reconciled
    fake.refuse["list"] = Refusal("io", "not now")
    async with asyncio.timeout(60):
        rig.watcher.told.clear()
        await asyncio.to_thread(fake.drop_connections)
        while rig.watcher.told.count("backends") < 2:  # noqa: ASYNC110 - the watcher wakes one
            await asyncio.sleep(0.01)
        fake.refuse.clear()
        await asyncio.to_thread(fake.drop_connections)
        await settled(rig, since)
    assert rig.service.registry.get(device.name).tracker.last == before


async def test_a_disk_that_hangs_keeps_its_tracker(rig: Running, fake: FakeDatapath) -> None:
    """The data path is back, but an origin of it does not answer yet: that is waited for, and is no loss."""
    device = await rig.tracked()
    generation = rig.service.registry.get(device.name).tracker.last.generation
    async with recovery(rig):
        fake.refuse["origin.info"] = Refusal("timed-out", "its disk holds it in a write")
    assert rig.service.registry.get(device.name).tracker.last.state == "recovering"
    fake.refuse.clear()
    await rig.service.reconcile()
    last = rig.service.registry.get(device.name).tracker.last
    assert (last.state, last.generation) == ("tracking", generation)


@pytest.mark.parametrize("stays", [True, False])
async def test_what_the_data_path_took_over_is_a_new_generation(
    tmp_path: Path, fake: FakeDatapath, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    """Killed with its holder, it goes on with nodes that are mounted: the reason is told, to a service that was there or not."""
    device = Machine(tmp_path, monkeypatch).disk("sdb")
    reset = "nobody knows"
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(running_service(tmp_path, fake))
        first.service.inventory.keep(device)
        first.blocks.devices[device.name] = device
        await first.service.registry.attach(device, owner_uid=1000)
        generation = first.service.registry.get(device.name).tracker.last.generation
        if not stays:
            await stack.aclose()
            await asyncio.to_thread(fake.close)
            another = stack.enter_context(running(fake.runtime_dir))
            another.take_over(device.origin, Path(device.path), top="blksnap-sdb", reset=reset)
            first = await stack.enter_async_context(running_service(tmp_path, another, blocks=first.blocks))
        else:
            since = first.service.reconciled
            fake.accepting.clear()
            await asyncio.to_thread(fake.drop_connections)
            await first.told("backends")
            fake.origins.pop(device.origin).close()
            fake.take_over(device.origin, Path(device.path), top="blksnap-sdb", reset=reset)
            fake.accepting.set()
            await settled(first, since)
        after = first.service.registry.get(device.name)
        assert after.tracker.last.generation != generation
        assert (after.entry.owner_uid, after.entry.last_reset) == (1000, reset)
        assert (after.entry.top, after.tracker.last.state) == ("blksnap-sdb", "tracking")
