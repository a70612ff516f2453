# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots over a restart of the service, of the bus and of the data path: whose they are and how long they are held."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.snapshot import MAX_HOLDS_PER_UID, Request
from tests.unit.fakes.datapath import FakeDatapath, running
from tests.unit.fakes.service import BUS_ID, Running, nothing_left, running_service

MINE = Request(owner_uid=1000)


async def test_a_restart_finds_its_snapshots(tmp_path: Path, fake: FakeDatapath) -> None:
    """Taken or not, with owner, description and storage."""
    async with running_service(tmp_path, fake) as first:
        device = await first.tracked()
        taken = await first.service.snapshots.create([device], Request(owner_uid=1000, description="a"))
        created = await first.service.snapshots.create([device], Request(owner_uid=1001, take=False))
    async with running_service(tmp_path, fake) as second:
        found = {one.id: one for one in second.service.snapshots}
        assert found[taken.id].entry == taken.entry
        assert found[taken.id].status == taken.status
        assert found[created.id].entry == created.entry
        await second.service.snapshots.take(found[created.id])


async def test_a_snapshot_nobody_wrote_down_is_roots(tmp_path: Path, fake: FakeDatapath) -> None:
    """It is adopted with what the engine knows; Collect finds those that appear later."""
    async with running_service(tmp_path, fake) as first:
        snapshot = await first.service.snapshots.create([await first.tracked()], MINE)
    (tmp_path / "state" / "snapshots.json").unlink()
    async with running_service(tmp_path, fake) as second:
        found = second.service.snapshots.get(snapshot.id)
        assert (found.entry.owner_uid, found.entry.devices) == (0, ("disk_2eimg",))
        await second.service.collect()
        assert len(list(second.service.snapshots)) == 1


async def test_collecting_does_not_adopt_what_is_being_created(rig: Running, fake: FakeDatapath) -> None:
    """It is its creator's, who may yet fail and undo it."""
    device = await rig.tracked()
    fake.hold["snapshot.take"] = threading.Event()
    creating = asyncio.create_task(rig.service.snapshots.create([device], MINE))
    while not any(one["op"] == "snapshot.take" for one in fake.requests):  # noqa: ASYNC110 - another thread's list
        await asyncio.sleep(0.01)
    await rig.service.collect()
    assert list(rig.service.snapshots) == []
    fake.hold["snapshot.take"].set()
    assert (await creating).entry.owner_uid == 1000


async def test_a_snapshot_that_did_not_survive_leaves_no_storage_file(
    tmp_path: Path, fake: FakeDatapath, caplog: pytest.LogCaptureFixture
) -> None:
    """Its old data is of no use any more."""
    async with running_service(tmp_path, fake) as first:
        request = Request(owner_uid=0, storage_path=str(tmp_path / "diff"))
        await first.service.snapshots.create([await first.tracked()], request)
    fake.close()
    assert (tmp_path / "diff").exists()
    with running(tmp_path / "run") as other:
        async with running_service(tmp_path, other) as second:
            assert nothing_left(second)
    assert "did not survive" in caplog.text


async def test_a_hold_from_another_bus_is_over(tmp_path: Path, fake: FakeDatapath) -> None:
    """Names of one run of a bus mean nothing on the next; on the same bus the hold goes on."""
    held = Request(owner_uid=1000, holder=":1.7", bus_id=BUS_ID)
    async with running_service(tmp_path, fake) as first:
        snapshot = await first.service.snapshots.create([await first.tracked()], held)
        assert snapshot.entry.holder == ":1.7"
    async with running_service(tmp_path, fake) as second:
        assert second.service.snapshots.get(snapshot.id).entry.holder == ":1.7"
    async with running_service(tmp_path, fake, bus_id="another") as third:
        assert nothing_left(third)


async def test_a_released_snapshot_stays(tmp_path: Path, fake: FakeDatapath) -> None:
    """Also over the next bus."""
    held = Request(owner_uid=1000, holder=":1.7", bus_id=BUS_ID)
    async with running_service(tmp_path, fake) as first:
        snapshot = await first.service.snapshots.create([await first.tracked()], held)
        await first.service.snapshots.release(snapshot)
        with pytest.raises(errors.InvalidState, match="not held"):
            await first.service.snapshots.release(snapshot)
    async with running_service(tmp_path, fake, bus_id="another") as second:
        assert not second.service.snapshots.get(snapshot.id).entry.holder


async def test_holds_are_counted(rig: Running) -> None:
    """Per uid: one cannot use up what is there for all."""
    device = await rig.tracked()
    held = Request(owner_uid=1000, holder=":1.7", bus_id=BUS_ID)
    for _ in range(MAX_HOLDS_PER_UID):
        await rig.service.snapshots.create([device], held)
    with pytest.raises(errors.LimitExceeded, match="destroy or release"):
        await rig.service.snapshots.create([device], held)
    await rig.service.snapshots.create([device], Request(owner_uid=1001, holder=":1.8", bus_id=BUS_ID))


async def test_a_snapshot_that_vanished_is_forgotten(rig: Running, fake: FakeDatapath) -> None:
    """As soon as somebody looks."""
    snapshot = await rig.service.snapshots.create([await rig.tracked()], MINE)
    os.close(fake.snapshots.pop(snapshot.id).fd)
    await rig.service.snapshots.refresh(snapshot)
    assert nothing_left(rig)
    assert rig.watcher.told[-1] == "-snapshot"
