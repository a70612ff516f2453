# SPDX-License-Identifier: GPL-2.0-or-later
"""Trackers and snapshots of the kernel filter: over the model, and unchanged on a kernel that has the filter."""

from __future__ import annotations

import errno
import uuid

import pytest

from blksnap_service import errors
from blksnap_service.backends.blkfilter.engine import SnapshotEvent
from blksnap_service.cbt import View
from tests.unit.blkfilter.lab import BLOCK, BLOCKS, MIB, SIZE, Lab

pytestmark = pytest.mark.blkfilter

ONE, TWO, THREE = (str(uuid.UUID(int=number)) for number in (1, 2, 3))


def expected(blocks: dict[int, int], count: int = BLOCKS) -> bytes:
    """A map with these bytes, and 0 everywhere else."""
    return bytes(blocks.get(block, 0) for block in range(count))


async def test_a_fresh_tracker_is_at_the_start(lab: Lab) -> None:
    """Number 0, an empty map, the device itself to be used."""
    device = lab.disk()
    tracker = await lab.attach(device)
    reading = await tracker.read()
    assert (reading.state, reading.changes, reading.active, reading.oldest) == ("tracking", 0, 1, 0)
    assert (reading.capacity, reading.block_size, reading.block_count) == (SIZE, BLOCK, BLOCKS)
    assert (tracker.node, tracker.map_is_live) == (device.path, False)
    assert await lab.map(tracker) == bytes(BLOCKS)


async def test_a_take_shows_what_was_written_before_it(lab: Lab) -> None:
    """Exactly the blocks that were touched, and nothing of what comes after."""
    device = lab.disk()
    tracker = await lab.attach(device)
    lab.write(device, 3 * BLOCK + 4096, 4096)
    lab.write(device, 7 * BLOCK - 512, 1024)
    assert await lab.map(tracker) == bytes(BLOCKS)
    await lab.take(ONE, tracker)
    lab.write(device, 9 * BLOCK, 4096)
    assert await lab.map(tracker) == expected({3: 1, 6: 1, 7: 1})
    await lab.engine.destroy(ONE)
    await lab.take(TWO, tracker)
    assert await lab.map(tracker) == expected({3: 1, 6: 1, 7: 1, 9: 2})
    assert (await tracker.read()).changes == 2
    await lab.engine.destroy(TWO)


async def test_what_is_written_since_the_take_is_counted(lab: Lab) -> None:
    """By the device's own statistics: the map says nothing of it."""
    device = lab.disk()
    tracker = await lab.attach(device)
    lab.write(device, 0, 4096)
    await lab.take(ONE, tracker)
    assert (await tracker.read()).counters["written_bytes_since_take"] == 0
    lab.write(device, BLOCK, 8192)
    assert (await tracker.read()).counters["written_bytes_since_take"] == 8192
    await lab.engine.destroy(ONE)
    # Nobody noted what there was when another program took.
    await lab.take_elsewhere(tracker)
    assert "written_bytes_since_take" not in (await tracker.read()).counters


async def test_every_range_of_a_list_is_marked(lab: Lab) -> None:
    """In both maps, although older kernels take the first range for all others (defect 2)."""
    tracker = await lab.attach(lab.disk())
    await lab.take(ONE, tracker)
    await tracker.mark([(1, 1), (4 * BLOCK, 2 * BLOCK), (9 * BLOCK - 1, 2), (SIZE - 1, 1)])
    marked = {0: 1, 4: 1, 5: 1, 8: 1, 9: 1, BLOCKS - 1: 1}
    assert await lab.map(tracker) == expected(marked)
    await lab.engine.destroy(ONE)
    await lab.take(TWO, tracker)
    assert await lab.map(tracker) == expected(dict.fromkeys(marked, 2))
    await tracker.mark_all()
    assert await lab.map(tracker) == bytes([2]) * BLOCKS
    await lab.engine.destroy(TWO)


async def test_a_map_that_says_the_same_is_the_same_file(lab: Lab) -> None:
    """A client that looks twice a second is told only once that something is different."""
    tracker = await lab.attach(lab.disk())
    await lab.take(ONE, tracker)
    sequences = []
    for marked in ((), (), ((0, 1),)):
        await tracker.mark(marked)
        opened = await tracker.open_map(View.TAKEN)
        opened.fd.close()
        sequences.append(opened.sequence)
    assert sequences[0] == sequences[1] < sequences[2]
    await lab.engine.destroy(ONE)


async def test_no_increment_is_lost_when_numbers_run_out(lab: Lab) -> None:
    """The 255th take begins a generation, at number 0 of it, and what is written then is in the next increment (6, 7)."""
    device = lab.disk()
    tracker = await lab.attach(device)
    first = tracker.last.generation
    await lab.take_elsewhere(tracker, 254)
    assert (await tracker.read()).changes == 254
    lab.write(device, BLOCK, 4096)
    resets = await lab.take(ONE, tracker)
    assert "used up" in resets[tracker.origin]
    reading = await tracker.read()
    assert reading.generation != first
    assert (reading.changes, reading.active) == (0, 1)
    assert await lab.map(tracker) == bytes(BLOCKS)
    (image,) = (await lab.engine.status(ONE)).images
    assert (image.generation, image.number) == (reading.generation, 0)
    await lab.engine.destroy(ONE)
    lab.write(device, 5 * BLOCK, 4096)
    assert await lab.take(ONE, tracker) == {}
    now = await tracker.read()
    assert (now.generation, now.changes) == (reading.generation, 1)
    assert await lab.map(tracker) == expected({5: 1})
    await lab.engine.destroy(ONE)


async def test_a_device_that_grew_begins_a_history_with_the_next_take(lab: Lab) -> None:
    """Until then its tracker is broken and says why."""
    device = lab.disk()
    tracker = await lab.attach(device)
    await lab.take(ONE, tracker)
    await lab.engine.destroy(ONE)
    lab.grow(device, 2 * SIZE)
    reading = await tracker.read()
    assert (reading.state, "size changed" in reading.reason) == ("broken", True)
    with pytest.raises(errors.InvalidState, match="next snapshot"):
        await tracker.resize()
    resets = await lab.take(TWO, tracker)
    assert "size changed" in resets[tracker.origin]
    now = await tracker.read()
    assert (now.state, now.capacity, now.changes) == ("tracking", 2 * SIZE, 1)
    assert now.generation != reading.generation
    await lab.engine.destroy(TWO)


async def test_a_snapshot_of_a_device_that_grew_has_failed(lab: Lab) -> None:
    """After a write behind the old end the kernel copies nothing any more, and tells nobody (defect 8)."""
    device = lab.disk()
    tracker = await lab.attach(device)
    await lab.take(ONE, tracker)
    lab.grow(device, 2 * SIZE)
    lab.write(device, SIZE, 4096)
    status = await lab.engine.status(ONE)
    assert status.state == "failed"
    assert "may have lost" in status.images[0].error
    with pytest.raises(errors.GenerationChanged, match="take a snapshot"):
        await tracker.open_map(View.TAKEN)
    with pytest.raises(errors.InvalidState, match="next snapshot"):
        await tracker.mark([(0, 1)])
    await lab.engine.destroy(ONE)


async def test_two_devices_have_two_images(lab: Lab) -> None:
    """Until the snapshot is destroyed."""
    devices = [lab.disk(), lab.disk()]
    trackers = [await lab.attach(device) for device in devices]
    created = await lab.create(ONE)
    assert (created.state, created.images) == ("created", ())
    await lab.engine.take(ONE, [tracker.origin for tracker in trackers])
    status = await lab.engine.status(ONE)
    assert (status.state, status.error) == ("taken", "")
    assert [image.origin for image in status.images] == [tracker.origin for tracker in trackers]
    assert len({image.path for image in status.images}) == 2
    assert all(image.path.startswith("/dev/blksnap") and not image.error for image in status.images)
    await lab.engine.destroy(ONE)
    assert await lab.held() == []
    with pytest.raises(errors.NotFound):
        await lab.engine.status(ONE)


async def test_a_take_that_fails_leaves_nothing_in_the_kernel(lab: Lab) -> None:
    """One device is in another snapshot: the other one is free again, and the snapshot can be taken without it."""
    first, second = [await lab.attach(lab.disk()) for _ in range(2)]
    await lab.take(ONE, second)
    await lab.create(TWO)
    with pytest.raises(errors.Busy, match="another snapshot"):
        await lab.engine.take(TWO, [first.origin, second.origin])
    assert len(await lab.held()) == 1
    assert (await lab.engine.status(TWO)).state == "created"
    await lab.engine.take(TWO, [first.origin])
    assert (await lab.engine.status(TWO)).state == "taken"
    with pytest.raises(errors.InvalidState, match="already"):
        await lab.engine.take(TWO, [first.origin])
    await lab.engine.destroy(TWO)
    await lab.engine.destroy(ONE)


async def test_a_tracker_in_a_snapshot_is_not_detached(lab: Lab) -> None:
    """Not even by force: the kernel would, and the image would go wrong with nobody told (defect 20)."""
    tracker = await lab.attach(lab.disk())
    await lab.take(ONE, tracker)
    for force in (False, True):
        with pytest.raises(errors.Busy, match="destroy that first"):
            await lab.backend.detach(tracker, "", force=force)
    await lab.engine.destroy(ONE)
    await lab.backend.detach(tracker, "", force=False)
    with pytest.raises(errors.NotFound):
        await tracker.read()


async def test_a_filter_another_program_attached_is_found(lab: Lab) -> None:
    """With its history; attaching it again is refused."""
    device = lab.disk()
    generation = (await lab.attach(device)).last.generation
    await lab.again("another")
    ((found, path),) = await lab.backend.discover({})
    assert (found.last.generation, found.origin, path) == (generation, device.origin, device.path)
    with pytest.raises(errors.AlreadyTracked, match="another program"):
        await lab.backend.attach(device, 0)


async def test_snapshots_go_on_while_no_service_runs(lab: Lab) -> None:
    """With their ids, devices and images; and end when asked to."""
    trackers = [await lab.attach(lab.disk()) for _ in range(2)]
    await lab.take(ONE, trackers[0])
    await lab.take(TWO, trackers[1])
    before = [await lab.engine.status(name) for name in (ONE, TWO)]
    await lab.again()
    after = await lab.engine.discover()
    assert [(one.snapshot, one.state, one.taken_at) for one in after] == [
        (one.snapshot, one.state, one.taken_at) for one in before
    ]
    assert [[image.path for image in one.images] for one in after] == [
        [image.path for image in one.images] for one in before
    ]
    for name in (ONE, TWO):
        await lab.engine.destroy(name)
    assert await lab.held() == []


@pytest.mark.parametrize("count", [1, 2])
async def test_snapshots_of_others_are_adopted(lab: Lab, count: int) -> None:
    """Under the kernel's ids, each with the devices whose images are its own."""
    trackers = [await lab.attach(lab.disk()) for _ in range(count + 1)]
    for name, tracker in zip((ONE, TWO), trackers[:count], strict=False):
        await lab.take(name, tracker)
    held = await lab.held()
    await lab.again("another")
    found = {one.snapshot: one for one in await lab.engine.discover()}
    assert sorted(found) == sorted(held)
    for kernel_id, tracker in zip(held, trackers[:count], strict=True):
        assert found[kernel_id].state == "taken"
        assert [image.origin for image in found[kernel_id].images] == [tracker.origin]
        await lab.engine.destroy(kernel_id)
    assert await lab.held() == []


async def test_a_snapshot_another_program_ended_is_gone(lab: Lab) -> None:
    """It is looked for at every reading."""
    tracker = await lab.attach(lab.disk())
    await lab.take(ONE, tracker)
    (kernel_id,) = await lab.held()
    lab.backend.control().destroy(kernel_id)
    with pytest.raises(errors.NotFound):
        await lab.engine.status(ONE)


async def test_a_filter_another_program_took_off_spoils_the_image(lab: Lab) -> None:
    """What is written from then on shows through it."""
    tracker = await lab.attach(lab.disk())
    await lab.take(ONE, tracker)
    tracker.device.detach()
    status = await lab.engine.status(ONE)
    assert status.state == "failed"
    assert "taken off" in status.images[0].error
    assert (await lab.event()).origin == tracker.origin
    await lab.engine.destroy(ONE)


async def test_storage_that_overflows_fails_the_snapshot(lab: Lab) -> None:
    """First that, then which device; the storage is smaller than the kernel grows it by, and lasts for its limit."""
    device = lab.disk()
    tracker = await lab.attach(device)
    await lab.take(ONE, tracker, limit=4 * MIB)
    lab.write(device, 0, MIB)
    assert (await lab.engine.status(ONE)).state == "taken"
    assert not lab.events
    lab.write(device, MIB, SIZE - MIB)
    assert await lab.event() == SnapshotEvent(ONE, requested=4 * MIB)
    told = await lab.event()
    assert (told.origin, told.errno) == (tracker.origin, errno.ENOSPC)
    status = await lab.engine.status(ONE)
    assert (status.state, "overflowed" in status.error) == ("failed", True)
    assert not lab.events
    await lab.engine.destroy(ONE)


async def test_an_attach_for_blocks_of_a_size_is_refused(lab: Lab) -> None:
    """The kernel chooses; nothing is attached."""
    device = lab.disk()
    with pytest.raises(errors.NotSupported, match="chooses"):
        await lab.backend.attach(device, 4096)
    assert await lab.backend.discover({}) == []
