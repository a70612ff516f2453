# SPDX-License-Identifier: GPL-2.0-or-later
"""The service on a kernel with the filter: which backend takes what, what others do meanwhile, what is told."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from blksnap_service import errors
from blksnap_service.backends.blkfilter import uapi
from blksnap_service.backends.blkfilter.backend import FilterBackend
from blksnap_service.backends.blkfilter.probe import Found, Sign
from blksnap_service.cbt import View
from blksnap_service.devices import Device, origin_name
from blksnap_service.snapshot import Request
from blksnap_service.trackers import Tracked
from blksnap_service.work import Work
from tests.unit.blkfilter.lab import BLOCK, BLOCKS, SIGN, SIZE, Lab, ModelLab, running
from tests.unit.fakes.datapath import FakeDatapath
from tests.unit.fakes.machine import Machine
from tests.unit.fakes.service import Blocks, Running, running_service

pytestmark = pytest.mark.blkfilter

NOTHING = Sign((), frozenset())


class Rig:
    """A service and the kernel under it."""

    def __init__(self, model: ModelLab, service: Running, fake: FakeDatapath) -> None:
        self.model = model
        self.running = service
        self.service = service.service
        self.fake = fake
        self.told = service.watcher.told

    def disk(self, *mounted: str) -> Device:
        """A disk, listed; perhaps mounted."""
        device = self.model.disk()
        if mounted:
            device = replace(self.model.machine.mount(device, *mounted), path=device.path)
        self.service.inventory.keep(device)
        return device

    async def tracked(self, device: Device, backend: str = "blkfilter") -> Tracked:
        """Track it."""
        await self.service.attach(
            device, Work(), owner_uid=1000, backend=backend, block_size=0, persistent=False
        )
        return self.service.registry.get(device.name)

    def request(self, *, take: bool = True, limit: int = 1 << 24) -> Request:
        """A snapshot with storage that is on no disk."""
        path = str(self.model.directory / "difference")
        return Request(owner_uid=1000, storage_path=path, take=take, limit=limit)


@pytest.fixture
async def model(tmp_path: Path, machine: Machine) -> AsyncIterator[Lab]:
    """The newest generation: which one it is, is not the service's business."""
    async with running(ModelLab(tmp_path, machine, "6.15")) as one:
        yield one


@pytest.fixture
def sign() -> list[Sign]:
    """What there is to see of modules; a test may change it."""
    return [SIGN]


@pytest.fixture
async def here(tmp_path: Path, model: ModelLab, fake: FakeDatapath, sign: list[Sign]) -> AsyncIterator[Rig]:
    """A service."""
    async with running_service(tmp_path, fake, kernel_filter=backend_of(model, sign)) as one:
        yield Rig(model, one, fake)


def backend_of(model: ModelLab, sign: list[Sign]) -> FilterBackend:
    """A backend that sees the module when it is there."""

    def detect(seen: Sign) -> Found:
        return (
            Found(uapi.V615, "") if seen == SIGN else Found(None, "the kernel module blksnap is not loaded")
        )

    return FilterBackend(None, model.kernel, lambda: sign[0], detect)


async def test_a_device_in_use_is_for_the_filter(here: Rig) -> None:
    """And one that is free is for ublk, whose map is live."""
    mounted, free = here.disk("/srv"), here.disk()
    assert here.service.registry.usable(mounted) == ["blkfilter"]
    assert here.service.registry.usable(free)[:2] == ["ublk", "blkfilter"]
    tracked = await here.tracked(mounted, "")
    assert (tracked.entry.backend, tracked.tracker.node) == ("blkfilter", mounted.path)
    assert here.service.registry.choice(free, "") == "ublk"


async def test_a_module_comes_and_goes(here: Rig, sign: list[Sign]) -> None:
    """What can track is told each time, with the reason when it cannot."""
    device = here.disk("/srv")
    sign[0] = NOTHING
    await here.service._look_for_backends()
    assert "backends" in here.told
    info = here.service.registry.infos()[0]
    assert (info.name, info.available, info.reason) == (
        "blkfilter", False, "the kernel module blksnap is not loaded",
    )  # fmt: skip
    with pytest.raises(errors.NotAvailable, match="not loaded"):
        await here.tracked(device)
    sign[0] = SIGN
    await here.tracked(device)


async def test_a_snapshot_from_end_to_end(here: Rig) -> None:
    """Created, taken, shown with its image, its increment read, destroyed; and the number is the take's."""
    device = here.disk("/srv")
    tracked = await here.tracked(device)
    here.model.write(device, 2 * BLOCK, 4096)
    snapshot = await here.service.snapshots.create([device], here.request())
    assert snapshot.state == "taken"
    (image,) = snapshot.status.images
    assert (image.path, image.number, image.size) == ("/dev/blksnap-240-1", 1, SIZE)
    ranges, _ = await tracked.reader.changed_ranges(View.TAKEN, 0, 0, 100, image.generation)
    assert ranges.tolist() == [[2 * BLOCK, BLOCK]]
    await here.service.snapshots.destroy(snapshot)
    assert not here.model.kernel.snapshots
    assert not (here.model.directory / "difference").exists()


async def test_changes_since_the_last_take_are_not_made_up(here: Rig) -> None:
    """The map does not have them: neither as ranges nor as a count of 0."""
    device = here.disk()
    tracked = await here.tracked(device)
    await here.service.snapshots.create([device], here.request())
    here.model.write(device, 0, 4096)
    with pytest.raises(errors.NotSupported, match="as of the last snapshot"):
        await tracked.reader.changed_ranges(View.LIVE, 1, 0, 100)
    assert (await tracked.reader.count()).changed == {0: 0}
    assert len(await tracked.reader.read(View.LIVE, 0, BLOCKS)) == BLOCKS


async def test_a_failed_take_leaves_no_snapshot_and_tells_the_numbers(here: Rig) -> None:
    """Neither here nor in the kernel, nor its storage; the kernel has used a number up all the same."""
    device = here.disk()
    tracked = await here.tracked(device)
    here.model.kernel.fail_images = errno.ENOMEM
    with pytest.raises(errors.Failed, match="no memory"):
        await here.service.snapshots.create([device], here.request())
    assert not list(here.service.snapshots)
    assert not here.model.kernel.snapshots
    assert not (here.model.directory / "difference").exists()
    assert tracked.tracker.last.changes == 1


async def test_devices_of_different_backends_are_not_taken_together(here: Rig) -> None:
    """There is no instant both have; the message names them."""
    device, image = here.disk(), await here.running.tracked()
    await here.tracked(device)
    with pytest.raises(errors.NotSupported, match="blkfilter, nbd at one instant"):
        await here.service.snapshots.create([device, image], here.request())
    snapshot = await here.service.snapshots.create([device], here.request(take=False))
    with pytest.raises(errors.NotSupported, match="at one instant"):
        await here.service.snapshots.add_device(snapshot, image)


async def test_a_device_that_was_added_is_taken(here: Rig) -> None:
    """And none can be added after that."""
    first, second, third = here.disk(), here.disk(), here.disk()
    for device in (first, second, third):
        await here.tracked(device)
    snapshot = await here.service.snapshots.create([first], here.request(take=False))
    await here.service.snapshots.add_device(snapshot, second)
    await here.service.snapshots.take(snapshot)
    assert len(snapshot.status.images) == 2
    with pytest.raises(errors.InvalidState):
        await here.service.snapshots.add_device(snapshot, third)
    third_tracker = here.model.kernel.disks[third.number].tracker
    assert third_tracker is not None
    assert third_tracker.snapshot is None


async def test_what_others_attach_and_take_is_found(here: Rig) -> None:
    """Trackers by looking around, snapshots by Collect; numbers of their takes are told."""
    device = here.disk()
    tracker = await here.model.attach(device)
    await here.service._look_for_backends()
    assert device.name in here.service.registry
    with pytest.raises(errors.AlreadyTracked):
        await here.tracked(device)
    await here.model.take("00000000-0000-0000-0000-000000000001", tracker)
    await here.service.collect()
    (snapshot,) = here.service.snapshots
    assert (snapshot.state, snapshot.entry.owner_uid) == ("taken", 0)
    assert (snapshot.entry.devices, snapshot.entry.description) == ((device.name,), "found in the kernel")
    here.told.clear()
    await here.service._filter.follow_takes(here.service.registry)
    assert f"~tracker {device.name}" in here.told
    assert here.service.registry.get(device.name).tracker.last.changes == 1
    with pytest.raises(errors.Busy):
        await here.service.detach(device, force=False)
    await here.model.engine.destroy("00000000-0000-0000-0000-000000000001")
    await here.service.snapshots.refresh(snapshot)
    assert not list(here.service.snapshots)


async def test_a_wrap_in_another_programs_take_is_told(here: Rig) -> None:
    """As a generation that started."""
    device = here.disk()
    tracked = await here.tracked(device)
    tracker = here.model.kernel.disks[device.number].tracker
    assert tracker is not None
    for _ in range(255):
        tracker.map.switch()
    await here.service._filter.follow_takes(here.service.registry)
    assert any(told.startswith(f"generation {device.name}") for told in here.told)
    assert tracked.tracker.last.changes == 0


async def test_a_filter_others_took_off_ends_the_tracker(here: Rig) -> None:
    """It is not shown as if it still tracked."""
    device = here.disk()
    tracked = await here.tracked(device)
    here.model.kernel.disks[device.number].tracker = None
    await here.service._filter.follow_takes(here.service.registry)
    assert device.name not in here.service.registry
    assert f"-tracker {device.name}" in here.told
    del tracked
    await here.tracked(device)


async def test_a_detach_in_a_snapshot_is_refused_even_by_force(here: Rig) -> None:
    """The tracker stays."""
    device = here.disk()
    await here.tracked(device)
    snapshot = await here.service.snapshots.create([device], here.request())
    for force in (False, True):
        with pytest.raises(errors.Busy):
            await here.service.detach(device, force=force)
    assert device.name in here.service.registry
    await here.service.snapshots.destroy(snapshot)
    await here.service.detach(device, force=False)
    assert here.model.kernel.disks[device.number].tracker is None


async def test_an_overflow_is_told_after_the_state(here: Rig) -> None:
    """Whoever hears it and asks finds a failed snapshot."""
    device = here.disk()
    await here.tracked(device)
    snapshot = await here.service.snapshots.create([device], here.request(limit=1 << 20))
    here.model.write(device, 0, SIZE)
    await here.running.told("no space")
    await here.running.told(f"corrupted {device.name}")
    assert "no space 1048576, failed" in here.told
    assert any(told.startswith(f"corrupted {device.name} {errno.ENOSPC} ") for told in here.told)
    await here.service.snapshots.destroy(snapshot)


async def test_a_restart_finds_all_as_it_was(
    here: Rig, tmp_path: Path, sign: list[Sign], fake: FakeDatapath
) -> None:
    """Trackers with their owners and times, snapshots with ids, owners and images. The kernel did not notice."""
    device = here.disk("/srv")
    tracked = await here.tracked(device)
    snapshot = await here.service.snapshots.create([device], here.request())
    images = snapshot.status.images
    entries = (tracked.entry, snapshot.entry)
    sign[0] = SIGN
    await _end(here)
    blocks = Blocks()
    blocks.devices[device.name] = device
    async with running_service(
        tmp_path, fake, blocks=blocks, kernel_filter=backend_of(here.model, sign)
    ) as again:
        found = again.service.registry.get(device.name)
        (one,) = again.service.snapshots
        assert (found.entry, one.entry) == entries
        assert (one.state, one.status.images) == ("taken", images)
        await again.service.snapshots.destroy(one)


async def test_a_snapshot_is_not_lost_while_the_kernel_cannot_be_asked(
    here: Rig, tmp_path: Path, sign: list[Sign], fake: FakeDatapath
) -> None:
    """What was missing comes back: then it is found, its owner's."""
    device = here.disk("/srv")
    await here.tracked(device)
    snapshot = await here.service.snapshots.create([device], here.request())
    await _end(here)
    blocks = Blocks()
    blocks.devices[device.name] = device
    found = [Found(None, "no loop device", passing=True), Found(uapi.V615, "")]
    backend = FilterBackend(None, here.model.kernel, lambda: SIGN, lambda _: found.pop(0))
    async with running_service(tmp_path, fake, blocks=blocks, kernel_filter=backend) as again:
        assert not list(again.service.snapshots)
        await again.service._look_for_backends()
        await again.service.collect()
        (one,) = again.service.snapshots
        assert (one.entry, one.state) == (snapshot.entry, "taken")
        await again.service.snapshots.destroy(one)


async def _end(here: Rig) -> None:
    here.service.close()
    here.running.catalogue.__exit__(None, None, None)


async def test_a_persistent_tracker_has_no_record_for_udev(here: Rig) -> None:
    """The device is to be mounted as it is: udev hides what has one. The service attaches it again itself."""
    device = replace(here.disk("/srv"), stable_key="fsuuid-1")
    here.service.inventory.keep(device)
    await here.service.attach(device, Work(), owner_uid=7, backend="", block_size=0, persistent=True)
    entry = here.service.registry.get(device.name).entry
    assert (entry.persistent, entry.backend, entry.stable_key) == (True, "blkfilter", "fsuuid-1")
    assert here.service._records.all() == {}
    # After a boot the kernel knows nothing of it, and the disk has another name.
    here.service.registry.forget(device.name)
    here.model.kernel.disks[device.number].tracker = None
    here.model.kernel._show(here.model.kernel.disks[device.number])
    await here.service._follow_up(entry)
    now = here.service.registry.get(device.name).entry
    assert (now.owner_uid, now.persistent) == (7, True)
    assert here.model.kernel.disks[device.number].tracker is not None


async def test_the_data_path_away_is_no_trouble(here: Rig) -> None:
    """The kernel is still there."""
    device = here.disk()
    tracked = await here.tracked(device)
    here.service.registry.note_away("the data path is gone")
    assert tracked.tracker.last.state == "tracking"
    assert tracked.tracker.origin == origin_name(device.path)
