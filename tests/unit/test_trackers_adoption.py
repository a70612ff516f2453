# SPDX-License-Identifier: GPL-2.0-or-later
"""Trackers over a restart of the service, the loss of the data path, and the loss of the connection to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from blksnap_service import errors
from tests.unit.fakes.datapath import FakeDatapath, Refusal, running
from tests.unit.fakes.service import MIB, Running, only, running_service


async def test_a_restart_finds_its_trackers(tmp_path: Path, fake: FakeDatapath) -> None:
    """With everything that was known about them; nothing is attached anew."""
    async with running_service(tmp_path, fake) as first:
        await first.tracked()
        before = only(first).entry
    adds = sum(one["op"] == "origin.add" for one in fake.requests)
    async with running_service(tmp_path, fake) as second:
        assert only(second).entry == before
        assert second.watcher.told == ["+device disk_2eimg", "+tracker disk_2eimg"]
    assert sum(one["op"] == "origin.add" for one in fake.requests) == adds


async def test_a_tracker_nobody_wrote_down_is_roots(
    tmp_path: Path, fake: FakeDatapath, caplog: pytest.LogCaptureFixture
) -> None:
    """As after the loss of the state directory: it is adopted, not ended."""
    async with running_service(tmp_path, fake) as first:
        await first.tracked()
    for name in ("images.json", "trackers.json"):
        (tmp_path / "state" / name).unlink()
    async with running_service(tmp_path, fake) as second:
        assert only(second).entry.owner_uid == 0
        assert only(second).entry.path == str(tmp_path / "disk.img")
    assert "nobody wrote down" in caplog.text


async def test_a_tracked_file_whose_name_is_gone_is_still_a_device(
    tmp_path: Path, fake: FakeDatapath
) -> None:
    """The data path has it open; it can be detached."""
    async with running_service(tmp_path, fake) as first:
        await first.tracked()
    (tmp_path / "disk.img").unlink()
    async with running_service(tmp_path, fake) as second:
        device = second.service.inventory.get("disk_2eimg")
        assert device.size == MIB
        await second.service.detach(device, force=False)
    assert fake.origins == {}


async def test_a_lost_tracker_is_forgotten(
    tmp_path: Path, fake: FakeDatapath, caplog: pytest.LogCaptureFixture
) -> None:
    """Never silently."""
    async with running_service(tmp_path, fake) as first:
        await first.tracked()
    fake.close()
    with running(tmp_path / "run") as other:
        async with running_service(tmp_path, other) as second:
            assert list(second.service.registry) == []
            assert list(second.catalogue.trackers) == []
            await second.service.registry.attach(second.service.inventory.get("disk_2eimg"), owner_uid=0)
            assert "without a clean detach" in only(second).entry.last_reset
    assert "is not tracked any more" in caplog.text


async def test_a_persistent_tracker_is_attached_again(tmp_path: Path, fake: FakeDatapath) -> None:
    """By the same owner, with the same block size, as a new generation that says why."""
    async with running_service(tmp_path, fake) as first:
        await first.service.registry.attach(
            await first.image(), owner_uid=1000, block_size=4096, persistent=True
        )
    fake.close()
    with running(tmp_path / "run") as other:
        async with running_service(tmp_path, other) as second:
            entry = only(second).entry
            assert (entry.owner_uid, entry.persistent) == (1000, True)
            assert only(second).tracker.last.block_size == 4096
            assert "without a clean detach" in entry.last_reset


async def test_a_persistent_tracker_that_cannot_be_attached_can_be_given_up(
    tmp_path: Path, fake: FakeDatapath, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried at every start until somebody detaches it."""
    async with running_service(tmp_path, fake) as first:
        await first.service.registry.attach(await first.image(), owner_uid=1000, persistent=True)
    fake.close()
    with running(tmp_path / "run") as other:
        other.refuse["origin.add"] = Refusal("busy", "locked")
        async with running_service(tmp_path, other) as second:
            assert list(second.service.registry) == []
            device = second.service.inventory.get("disk_2eimg")
            await second.service.detach(device, force=False)
            assert list(second.catalogue.trackers) == []
    assert "is to be tracked, but cannot be now: locked" in caplog.text


async def test_a_broken_origin_is_told(rig: Running, fake: FakeDatapath) -> None:
    """The state changes with the event."""
    device = await rig.tracked()
    fake.origins[device.origin].state, fake.origins[device.origin].reason = "broken", "it shrank"
    fake.tell(event="origin.broken", origin=device.origin, reason="it shrank")
    await rig.told("~tracker")
    assert only(rig).tracker.last.state == "broken"


async def test_while_the_data_path_is_away_requests_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the backend is not available, with the reason."""
    with running(tmp_path / "run") as fake:
        async with running_service(tmp_path, fake) as rig:
            device = await rig.image()
            fake.close()
            await rig.told("backends")
            info = next(one for one in rig.service.registry.infos() if one.name == "nbd")
            assert not info.available
            assert "data path" in info.reason
            with pytest.raises(errors.BlksnapError, match="data path"):
                await rig.service.registry.attach(device, owner_uid=0, backend="nbd")
            assert rig.service.registry.usable(device) == []
