# SPDX-License-Identifier: GPL-2.0-or-later
"""What only a model can be made to do: errors at every step, and things that happen between two calls."""

from __future__ import annotations

import asyncio
import errno
import os
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from blksnap_service import errors, sysblock
from blksnap_service.backends.blkfilter import uapi
from blksnap_service.cbt import View
from tests.unit.blkfilter.lab import BLOCK, BLOCKS, ModelLab
from tests.unit.blkfilter.model_map import ModelMap

pytestmark = pytest.mark.blkfilter

ONE, TWO = (str(uuid.UUID(int=number)) for number in (1, 2))


def request(lab: ModelLab, name: str) -> int:
    """A request of the lab's generation."""
    generation = lab.backend.generation
    assert generation is not None
    number: int = getattr(generation, name)
    return number


@pytest.mark.parametrize(
    "number, error, says",
    [
        (errno.ENOMEM, errors.Failed, "no memory"),
        (errno.EBUSY, errors.Busy, "another block device filter"),
        (errno.EALREADY, errors.AlreadyTracked, "another program"),
        (errno.ENOENT, errors.NotAvailable, "is gone"),
        (errno.ENODEV, errors.NotFound, "not there any more"),
        (errno.EIO, errors.Failed, "input/output error"),
    ],
)
async def test_an_attach_that_fails_says_why(
    model: ModelLab, number: int, error: type[errors.BlksnapError], says: str
) -> None:
    """And leaves the device as it was."""
    device = model.disk()
    model.kernel.fail[request(model, "attach")] = [number]
    with pytest.raises(error, match=says):
        await model.attach(device)
    assert model.kernel.disks[device.number].tracker is None
    await model.attach(device)


async def test_a_filter_of_another_program_is_searched_for_when_it_is_met(model: ModelLab) -> None:
    """In generations that stop every device to be asked for its filter not before."""
    device = model.disk()
    assert model.backend.is_to_be_searched == (model.kernel.generation == "6.15")
    await model.attach(device)
    await model.start("another")
    with pytest.raises(errors.AlreadyTracked):
        await model.attach(device)
    assert model.backend.is_to_be_searched
    assert len(await model.backend.discover({})) == 1


async def test_an_attach_whose_map_cannot_be_read_is_undone(model: ModelLab) -> None:
    """No filter stays behind that nobody knows of."""
    device = model.disk()
    model.kernel.fail[request(model, "ctl")] = [errno.ESRCH]
    with pytest.raises(errors.Corrupted):
        await model.attach(device)
    assert model.kernel.disks[device.number].tracker is None


@pytest.mark.parametrize(
    "number, error",
    [
        (errno.ENOSPC, errors.NoSpace),
        (errno.EBUSY, errors.Busy),
        (errno.EINVAL, errors.InvalidArgument),
        (errno.ENOMEM, errors.Failed),
        (errno.EFAULT, errors.Failed),
    ],
)
async def test_a_create_that_fails_leaves_nothing(
    model: ModelLab, number: int, error: type[errors.BlksnapError]
) -> None:
    """No snapshot, no descriptor, nothing written down."""
    model.kernel.fail[uapi.IOCTL_CREATE] = [number]
    with pytest.raises(error):
        await model.create(ONE)
    assert await model.held() == []
    with pytest.raises(errors.NotFound):
        await model.engine.status(ONE)


@pytest.mark.parametrize(
    "number, error",
    [
        (errno.ENOMEM, errors.Failed),
        (errno.EFAULT, errors.Corrupted),
        (errno.EALREADY, errors.InvalidState),
        (errno.ENODEV, errors.InvalidState),
        (errno.ESRCH, errors.NotFound),
        (errno.ENOSPC, errors.NoSpace),
    ],
)
async def test_a_take_that_fails_can_be_tried_again(
    model: ModelLab, number: int, error: type[errors.BlksnapError]
) -> None:
    """Nothing of it is left in the kernel."""
    tracker = await model.attach(model.disk())
    await model.create(ONE)
    model.kernel.fail[uapi.IOCTL_TAKE] = [number]
    with pytest.raises(error):
        await model.engine.take(ONE, [tracker.origin])
    assert await model.held() == []
    await model.engine.take(ONE, [tracker.origin])
    assert (await model.engine.status(ONE)).state == "taken"


async def test_a_take_that_failed_late_can_be_tried_again(model: ModelLab) -> None:
    """In the kernel such a snapshot counts as taken for ever (defect S3), with numbers used up (defect 34)."""
    tracker = await model.attach(model.disk())
    await model.create(ONE)
    model.kernel.fail_images = errno.ENOMEM
    with pytest.raises(errors.Failed, match="no memory"):
        await model.engine.take(ONE, [tracker.origin])
    model.kernel.fail_images = 0
    assert await model.engine.take(ONE, [tracker.origin]) == {}
    assert (await tracker.read()).changes == 2


async def test_a_take_that_fails_in_the_middle_loses_no_change(model: ModelLab) -> None:
    """The device that was taken has one number more, and both have all they changed in the next increment."""
    devices = [model.disk(), model.disk()]
    trackers = [await model.attach(device) for device in devices]
    for device in devices:
        model.write(device, BLOCK, 4096)
    model.kernel.fail_take_after = 1
    await model.create(ONE)
    origins = [tracker.origin for tracker in trackers]
    with pytest.raises(errors.Failed):
        await model.engine.take(ONE, origins)
    model.kernel.fail_take_after = None
    await model.engine.take(ONE, origins)
    assert [(await tracker.read()).changes for tracker in trackers] == [2, 1]
    for tracker in trackers:
        assert (await model.map(tracker))[1] == 1


async def test_a_cancelled_take_leaves_nothing(model: ModelLab) -> None:
    """The call to the kernel cannot be: its snapshot is removed when it comes back."""
    tracker = await model.attach(model.disk())
    await model.create(ONE)
    loop, entered = asyncio.get_running_loop(), asyncio.Event()

    def note(command: int) -> None:
        if command == uapi.CTL_SNAPSHOTADD:
            loop.call_soon_threadsafe(entered.set)

    model.kernel.hook = note
    taking = asyncio.ensure_future(model.engine.take(ONE, [tracker.origin]))
    await entered.wait()
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert await model.held() == []
    assert model.kernel.disks[tracker.identity.device].tracker is not None


async def test_the_device_that_holds_the_storage_is_not_left_out(model: ModelLab) -> None:
    """The kernel does so and says all is well (defect S2)."""
    device = model.disk()
    tracker, other = await model.attach(device), await model.attach(model.disk())
    model.kernel.storage_device = device.number
    await model.create(ONE)
    with pytest.raises(errors.NotSupported, match="holds the difference storage"):
        await model.engine.take(ONE, [tracker.origin, other.origin])
    assert await model.held() == []
    assert not any(one.snapshot for disk in model.kernel.disks.values() if (one := disk.tracker))


async def test_info_and_map_of_two_takes_are_not_mixed(model: ModelLab) -> None:
    """Another program takes between the calls (defect 17)."""
    device = model.disk()
    tracker = await model.attach(device)
    model.write(device, 0, 4096)
    kernel_map = model.kernel.disks[device.number].tracker
    assert kernel_map is not None
    left = 3

    def take_in_between(command: int) -> None:
        nonlocal left
        if command == 1 and left:
            left -= 1
            kernel_map.map.switch()

    model.kernel.hook = take_in_between
    opened = await tracker.open_map(View.TAKEN)
    with opened.fd:
        data = os.pread(opened.fd.fileno(), BLOCKS, 0)
    assert (opened.reading.changes, data[0], left) == (3, 1, 0)


async def test_a_reset_between_info_and_map_is_noticed(model: ModelLab) -> None:
    """The new map is smaller: nothing behind it is asked for in the end, whatever the kernel would give (defect 5)."""
    device = model.disk()
    tracker = await model.attach(device)
    before = await tracker.read()
    kernel_tracker = model.kernel.disks[device.number].tracker
    assert kernel_tracker is not None

    def reset(command: int) -> None:
        if command == 1 and kernel_tracker.map.generation == uuid.UUID(before.generation):
            kernel_tracker.map = ModelMap(kernel_tracker.map.capacity)

    model.kernel.hook = reset
    opened = await tracker.open_map(View.TAKEN)
    opened.fd.close()
    assert opened.reading.generation != before.generation


async def test_a_map_that_cannot_be_right_is_refused(model: ModelLab) -> None:
    """A module parameter may make the kernel shift a 1 out of 32 bits (defect 14)."""
    device = model.disk()
    tracker = await model.attach(device)
    kernel_tracker = model.kernel.disks[device.number].tracker
    assert kernel_tracker is not None
    kernel_tracker.map.shift = 0
    with pytest.raises(errors.Corrupted, match="cannot be right"):
        await tracker.read()


async def test_another_medium_in_the_device_is_noticed(model: ModelLab) -> None:
    """The kernel looks at sizes only (defect 25); no snapshot is taken of it."""
    device = model.disk()
    tracker = await model.attach(device)
    model.kernel.disks[device.number].diskseq += 1
    reading = await tracker.read()
    assert (reading.state, "another medium" in reading.reason) == ("broken", True)
    await model.create(ONE)
    with pytest.raises(errors.InvalidState, match="another medium"):
        await model.engine.take(ONE, [tracker.origin])
    assert await model.held() == []


async def test_another_medium_is_noticed_by_the_next_service(model: ModelLab) -> None:
    """It was changed while none ran."""
    device = model.disk()
    await model.attach(device)
    await model.again()
    ((same, _),) = await model.backend.discover({})
    assert same.last.state == "tracking"
    model.stop()
    model.kernel.disks[device.number].diskseq += 1
    await model.start()
    ((other, _),) = await model.backend.discover({})
    assert (other.last.state, "another medium" in other.last.reason) == ("broken", True)


async def test_a_device_that_is_pulled_out_has_no_tracker(model: ModelLab) -> None:
    """And its image fails."""
    device = model.disk()
    tracker = await model.attach(device)
    await model.take(ONE, tracker)
    model.kernel.pull(model.kernel.disks[device.number])
    with pytest.raises(errors.NotFound):
        await tracker.read()
    assert (await model.engine.status(ONE)).state == "failed"
    await model.backend.detach(tracker, "", force=False)


async def test_a_disk_with_partitions_is_refused(model: ModelLab) -> None:
    """The filter on the disk does not see what is written through them."""
    device = model.disk()
    model.machine.partition(replace(device, path=str(model.directory / Path(device.path).name)), "sda1")
    with pytest.raises(errors.NotSupported, match="track /dev/sda1"):
        await model.attach(device)


async def test_a_disk_that_gets_partitions_is_not_trusted(model: ModelLab) -> None:
    """From then on writes may be missed."""
    device = model.disk()
    tracker = await model.attach(device)
    model.machine.partition(device, "sda1")
    reading = await tracker.read()
    assert (reading.state, "partitions" in reading.reason) == ("broken", True)


@pytest.mark.parametrize(
    "attribute, says",
    [
        ("queue__zoned", "zoned"),
        ("queue__dax", "dax"),
        ("integrity__format", "integrity"),
    ],
)
async def test_devices_the_filter_does_badly_are_refused(model: ModelLab, attribute: str, says: str) -> None:
    """One with integrity data would stop the kernel when it is added to a snapshot (defect S1)."""
    device = model.disk()
    file = sysblock.node(device.number) / attribute.replace("__", "/")
    file.parent.mkdir(exist_ok=True)
    file.write_text({"queue__zoned": "host-managed", "queue__dax": "1"}.get(attribute, "T10-DIF"))
    with pytest.raises(errors.NotSupported, match=says):
        await model.attach(device)
