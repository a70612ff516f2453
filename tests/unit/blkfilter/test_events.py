# SPDX-License-Identifier: GPL-2.0-or-later
"""Events of the kernel filter's snapshots, its lists, its storage, and that the model has the defects it is there for."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import struct
import uuid
from pathlib import Path

import pytest

from blksnap_service.backends.blkfilter import difference, events, probe, uapi
from blksnap_service.backends.blkfilter.engine import SnapshotEvent
from blksnap_service.backends.blkfilter.uapi import V6, V7, V615
from blksnap_service.fds import OwnedFd
from tests.unit.blkfilter.lab import BLOCKS, MIB, SIZE, ModelLab
from tests.unit.blkfilter.model_map import KernelError, ModelMap, Oops

pytestmark = pytest.mark.blkfilter

ONE, TWO = (str(uuid.UUID(int=number)) for number in (1, 2))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_corrupted_image_is_told(model: ModelLab, number: int) -> None:
    """Which origin and why; when the storage overflowed, that first. Once."""
    tracker = await model.attach(model.disk())
    await model.take(ONE, tracker)
    kernel_tracker = model.kernel.disks[tracker.identity.device].tracker
    assert kernel_tracker is not None
    model.kernel.corrupt(kernel_tracker, number)
    if number == errno.ENOSPC:
        assert await model.event() == SnapshotEvent(ONE, requested=64 * MIB)
    told = await model.event()
    assert (told.snapshot, told.origin, told.errno) == (ONE, tracker.origin, number)
    for _ in range(2):
        assert (await model.engine.status(ONE)).state == "failed"
    assert not model.events


async def test_storage_that_cannot_grow_is_told(model: ModelLab) -> None:
    """The kernel does when half a step is left."""
    tracker = await model.attach(model.disk())
    await model.take(ONE, tracker, limit=2 << 30)
    (snapshot,) = model.kernel.snapshots
    model.kernel.tell(snapshot, 1, struct.pack("=Q", 4 << 20))
    if model.kernel.generation != "6.15":
        # Older ones have no such code.
        model.kernel.tell(snapshot, 0, struct.pack("=IIi", 8, 0, 5))
        assert (await model.event()).errno == 5
        return
    assert await model.event() == SnapshotEvent(ONE, used=(2 << 30) - (512 << 20), limit=2 << 30)


async def test_the_thread_that_waits_survives_signals(model: ModelLab) -> None:
    """EINTR is no end."""
    tracker = await model.attach(model.disk())
    model.kernel.fail[uapi.IOCTL_WAIT_EVENT] = [errno.EINTR, errno.ENOENT, errno.EINTR]
    await model.take(ONE, tracker)
    (snapshot,) = model.kernel.snapshots
    model.kernel.tell(snapshot, 0, struct.pack("=IIi", 8, 0, 5))
    assert (await model.event()).errno == 5


async def test_the_thread_ends_with_its_snapshot(model: ModelLab) -> None:
    """Whoever ends it; and before a destroy says it is done, since it keeps the images in the kernel."""
    tracker = await model.attach(model.disk())
    await model.take(ONE, tracker)
    thread = model.engine._records[ONE].events
    assert isinstance(thread, events.EventThread)
    (kernel_id,) = await model.held()
    model.backend.control().destroy(kernel_id)
    await thread.ended()
    await model.again("another")
    await model.take(TWO, await model.attach(model.disk()))
    await model.engine.destroy(TWO)
    kernel_trackers = [disk.tracker for disk in model.kernel.disks.values()]
    assert not any(one.snapshot for one in kernel_trackers if one)


async def test_events_of_others_are_left_to_them(model: ModelLab) -> None:
    """Each goes to one waiter only. What an image lost is found by looking, and told once."""
    tracker = await model.attach(model.disk())
    await model.take(ONE, tracker)
    (kernel_id,) = await model.held()
    thread = model.engine._records[ONE].events
    assert thread is not None
    await model.again("another")
    await thread.ended()
    await model.engine.discover()
    assert model.kernel.snapshots[0].waiters == 0
    kernel_tracker = model.kernel.disks[tracker.identity.device].tracker
    assert kernel_tracker is not None
    model.kernel.corrupt(kernel_tracker, errno.EIO)
    for _ in range(2):
        assert (await model.engine.status(kernel_id)).state == "failed"
    assert [(one.origin, one.errno) for one in model.events] == [(tracker.origin, errno.EIO)]
    assert len(model.kernel.snapshots[0].events) == 1


# Storage, lists, and the model itself.


@pytest.mark.parametrize("generation_", [V6, V7, V615])
def test_the_kernel_is_told_a_limit_that_is_kept(tmp_path: Path, generation_: uapi.Generation) -> None:
    """What a generation leaves unused comes on top; a file that is larger than the limit is used up to its size."""
    path = tmp_path / "difference"
    for size, limit, told in (
        (0, 4 * MIB, 4 * MIB + generation_.skipped_sectors * 512),
        (8 * MIB, MIB, 8 * MIB),
    ):
        with path.open("wb") as file:
            file.truncate(size)
        made = difference.prepare(
            OwnedFd(os.open(path, os.O_RDWR)), limit, generation_, tmp_path / "no-parameter"
        )
        with made.fd:
            assert (made.told, made.limit, made.step) == (told, max(limit, size), 1 << 30)


def can_be_had_alone(path: str) -> bool:
    """Whether nobody has the device exclusively."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


@pytest.mark.parametrize("generation_", [V6, V615])
def test_a_block_device_is_used_up_to_its_end(generation_: uapi.Generation) -> None:
    """And is free to be opened exclusively by a kernel that does so itself; an older one relies on our being alone."""
    if os.geteuid() != 0:
        pytest.skip("not root: a loop device cannot be made")
    with contextlib.ExitStack() as stack:
        try:
            loop = stack.enter_context(probe.loop_device())
        except OSError as error:
            pytest.skip(f"not root enough: no loop device can be made here ({error.strerror})")
        path = str(Path(f"/proc/self/fd/{loop.fileno()}").readlink())
        opened = OwnedFd(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        made = stack.enter_context(difference.prepare(opened, 4 * MIB, generation_, mode=os.O_RDONLY).fd)
        assert opened.closed
        assert can_be_had_alone(path) == (generation_ == V615)
        assert not made.closed


async def test_all_snapshots_are_listed_while_more_come(model: ModelLab) -> None:
    """One that did not fit, and one that was made meanwhile, are asked for again."""
    control = model.backend.control()
    with model.storage() as storage:
        made = [control.create(storage, 64 * MIB) for _ in range(20)]

        left = [10, 10]
        original = model.kernel.control

        def racing(number: int, argument: bytearray) -> None:
            original(number, argument)
            if number == uapi.IOCTL_COLLECT and left and not struct.unpack("=I4xQ", argument)[1]:
                made.extend(control.create(storage, 64 * MIB) for _ in range(left.pop()))

        model.kernel.control = racing  # type: ignore[method-assign, assignment]  # a test looks inside
        assert await asyncio.to_thread(control.collect) == made


def test_the_model_has_the_defects() -> None:
    """Else none of these tests shows anything: marks of nothing, past the end, and over the end of the numbers."""
    map_ = ModelMap(SIZE // 512)
    map_.switch()
    with pytest.raises(KernelError, match="EINVAL"):
        map_.mark(0, 0)  # defect 10: all blocks are marked first
    assert map_.write_map == bytes([2]) * BLOCKS
    assert map_.read_map == bytes(BLOCKS)
    with pytest.raises(Oops):
        map_.part(BLOCKS + 1, 16)
    for _ in range(253):
        map_.switch()
    stale = bytes(map_.read_map)
    map_.switch()
    assert (map_.previous, map_.active, bytes(map_.read_map)) == (255, 1, stale)
