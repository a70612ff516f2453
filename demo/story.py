# SPDX-License-Identifier: GPL-2.0-or-later
"""
The demonstration itself, step by step, told through the bus like any other client would.

A disk image is tracked while real programs write to it; a full copy and then increments are made of it, each proved
byte for byte; in the middle the service is killed. Raises DemoError as soon as something does not hold.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from blksnap_tui.client import Client
from blksnap_tui.errors import BlksnapError
from blksnap_tui.model import Device, Image, ObjectPath, Tracker
from demo.copies import Increment, apply_increment, full_copy, is_true, keep
from demo.disk import Disk, ext4_on, why_not
from demo.programs import DemoError, run
from demo.report import Report, mebibytes
from demo.service import Service
from demo.workload import Workload, workload

PIECES_PER_INCREMENT = 5
SNAPSHOTS_KEPT = 3
_ADOPT_TIMEOUT_S = 30.0
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything; `scratch` is a directory of the demo's own."""

    scratch: Path
    size_bytes: int
    increments: int
    seed: int
    bare_socket: bool


@dataclass(frozen=True, slots=True)
class Taken:
    """A snapshot of our one device: its object, its image, and how many bytes had been written by then."""

    snapshot: ObjectPath
    image: Image
    written_bytes: int


async def until(
    client: Client, holds: Callable[[], bool], what: str, *, service: Service | None = None
) -> None:
    """
    Wait until what the client sees is as it should be.

    Raises DemoError when that takes too long, or when `service` ends meanwhile.
    """
    changed = asyncio.Event()
    unsubscribe = client.subscribe(lambda _: changed.set())
    try:
        async with asyncio.timeout(_ADOPT_TIMEOUT_S):
            while not holds():
                if service is not None:
                    service.check()
                changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _LOOK_S)
    except TimeoutError:
        raise DemoError(f"{what} within {_ADOPT_TIMEOUT_S:.0f} s") from None
    finally:
        unsubscribe()


class Story:
    """The device, its snapshots and its copy, and what can be done with them."""

    def __init__(self, plan: Plan, report: Report, service: Service, client: Client) -> None:
        self.plan = plan
        self.increments: list[Increment] = []
        self._report = report
        self._service = service
        self._client = client
        self._device_path = ObjectPath("")
        self._snapshots: list[Taken] = []
        self._copy = plan.scratch / "copy.img"
        self._first_copy = plan.scratch / "first.img"

    # ---- what the bus says

    def _device(self) -> Device:
        device = self._client.state.device(self._device_path)
        if device is None:
            raise DemoError("the service has forgotten the image file")
        return device

    def _tracker(self) -> Tracker:
        tracker = self._device().tracker
        if tracker is None:
            raise DemoError("the image file is no longer tracked")
        return tracker

    async def _written_bytes(self) -> int:
        """Ask how many bytes the data path has written or zeroed since the attach."""
        info = await self._client.get_info(self._device_path)
        return int(info["written-bytes"]) + int(info["zeroed-bytes"])

    # ---- steps

    async def track(self) -> str:
        """Make the image file, add and attach it; gives the NBD URI to write to."""
        path = self.plan.scratch / "disk.img"
        with path.open("wb") as image:
            image.truncate(self.plan.size_bytes)
        self._report.step(f"a sparse image file of {mebibytes(self.plan.size_bytes)}: {path}")
        self._device_path = await self._client.add_image_file(str(path))
        await self._client.attach(self._device_path, backend="nbd")
        tracker = self._tracker()
        self._report.step(
            f"tracked: {tracker.block_count} blocks of {tracker.block_size // 1024} KiB, served at"
        )
        self._report.detail(tracker.node)
        return tracker.node

    async def full(self) -> None:
        """Take the first snapshot and copy all of it."""
        taken = await self._take()
        await full_copy(taken.image.nbd_uri, self._copy)
        verified = await is_true(taken.image.nbd_uri, self._copy)
        await keep(self._copy, self._first_copy)
        self._report.step(
            f"full copy of snapshot {taken.image.changes_number} by nbdcopy: {_judge(verified)}"
        )
        if not verified:
            raise DemoError("the full copy differs from the image it was made of")

    async def increment(self, around_take: AbstractAsyncContextManager[None]) -> None:
        """Take a snapshot (inside `around_take`), copy what changed since the one before, prove the copy."""
        since = self._snapshots[-1]
        async with around_take:
            taken = await self._take()
        image = taken.image
        expected = (since.image.generation_id, since.image.changes_number + 1)
        if (image.generation_id, image.changes_number) != expected:
            raise DemoError(f"number {since.image.changes_number} was followed by {image.changes_number}")
        ranges = [
            pair
            async for pair in self._client.changed_ranges(
                self._device_path, since.image.changes_number, generation_id=image.generation_id, view="taken"
            )
        ]
        copied = await apply_increment(image.nbd_uri, ranges, self._copy)
        block_size = self._tracker().block_size
        line = Increment(
            number=image.changes_number,
            written_blocks=sum(-(-length // block_size) for _, length in ranges),
            written_bytes=taken.written_bytes - since.written_bytes,
            ranges=len(ranges),
            copied_bytes=copied,
            full_bytes=image.size,
            verified=await is_true(image.nbd_uri, self._copy),
        )
        self.increments.append(line)
        self._report.step(
            f"increment {line.number}: {line.ranges} ranges, {mebibytes(line.copied_bytes)} of"
            f" {mebibytes(line.full_bytes)} copied: {_judge(line.verified)}"
        )
        if not line.written_blocks:
            raise DemoError("the workload wrote, but no block is said to have changed")
        await self._forget_old()

    async def survive_a_kill(self, work: Workload) -> None:
        """Kill the service with SIGKILL while the workload runs; I/O goes on, and the next service knows everything."""
        before, snapshots = self._tracker(), {taken.snapshot for taken in self._snapshots}
        written = await self._written_bytes()
        self._report.step(f"kill -9 {self._service.pid}: blksnapd is gone")
        await self._service.kill()
        await until(
            self._client,
            lambda: not self._client.available,
            "the bus did not notice the death of the service",
        )
        for piece in await work.more(PIECES_PER_INCREMENT):
            self._report.detail(f"meanwhile: {piece}")
        await self._service.start()
        await until(
            self._client,
            self._is_tracked,
            "a new blksnapd did not find its tracker again",
            service=self._service,
        )
        after = self._tracker()
        if (after.generation_id, after.changes_number) != (before.generation_id, before.changes_number):
            raise DemoError(f"the tracker's history was lost: {after.last_reset or 'no reason given'}")
        if lost := snapshots - {snapshot.object_path for snapshot in self._client.state.snapshots}:
            raise DemoError(f"{len(lost)} snapshots were lost with the service")
        more = await self._written_bytes() - written
        if more <= 0:
            raise DemoError("nothing reached the image while the service was away")
        self._report.step(
            f"blksnapd is back: same generation, same number {after.changes_number}, {len(snapshots)} snapshots;"
            f" {mebibytes(more)} were written in between"
        )

    async def first_is_unchanged(self) -> None:
        """Read the image of the first snapshot again: the moment it shows has not moved."""
        if not await is_true(self._snapshots[0].image.nbd_uri, self._first_copy):
            raise DemoError("the image of the first snapshot is not what it was")
        self._report.step("the image of the first snapshot still reads as on its first day, byte for byte")

    async def check_file_system(self) -> None:
        """Have e2fsck look at the copy, which was taken from a frozen file system."""
        await run("e2fsck", "-fn", self._copy)
        self._report.step("e2fsck calls the copy clean")

    async def give_back(self) -> None:
        """Destroy the snapshots and stop tracking."""
        for taken in self._snapshots:
            await self._client.destroy_snapshot(taken.snapshot)
        self._snapshots.clear()
        await self._client.detach(self._device_path)

    # ---- parts of steps

    def _is_tracked(self) -> bool:
        device = self._client.state.device(self._device_path) if self._client.available else None
        return device is not None and device.tracker is not None

    async def _take(self) -> Taken:
        storage = self.plan.scratch / "storage"
        storage.mkdir(exist_ok=True)
        path = await self._client.create_snapshot(
            [self._device_path],
            limit=self.plan.size_bytes,
            storage=str(storage),
            description=f"increment {len(self.increments) + 2}" if self._snapshots else "full copy",
        )
        snapshot = self._client.state.snapshot(path)
        if snapshot is None or snapshot.state != "taken":
            raise DemoError(f"the snapshot is {snapshot.state if snapshot else 'not there'} instead of taken")
        (image,) = self._client.state.images_of(snapshot)
        taken = Taken(path, image, await self._written_bytes())
        self._snapshots.append(taken)
        return taken

    async def _forget_old(self) -> None:
        """Destroy all but the first snapshot and the newest few."""
        while len(self._snapshots) > SNAPSHOTS_KEPT:
            await self._client.destroy_snapshot(self._snapshots.pop(1).snapshot)


def _judge(verified: bool) -> str:
    return "the same byte for byte" if verified else "DIFFERENT"


@contextlib.asynccontextmanager
async def _work_on(story: Story, report: Report, uri: str) -> AsyncIterator[tuple[Workload, Disk | None]]:
    """Put the workload on a mounted file system where that can be, on the bare socket where not."""
    plan = story.plan
    reason = "asked for" if plan.bare_socket else await why_not(plan.scratch)
    async with contextlib.AsyncExitStack() as stack:
        disk: Disk | None = None
        if reason:
            report.step(f"no file system on top ({reason}): qemu-io and fio write to the socket")
            where = ["--uri", uri, "--size", str(plan.size_bytes)]
        else:
            disk = await stack.enter_async_context(ext4_on(uri, plan.scratch))
            report.step(f"nbdfuse and losetup made {disk.device} of it; ext4 is mounted, programs work on it")
            where = ["--mount", str(disk.mount)]
        yield await stack.enter_async_context(workload(plan.scratch, *where, "--seed", str(plan.seed))), disk


async def tell(story: Story, report: Report) -> None:
    """Go through the whole story. Raises DemoError when something does not hold, also at the end of it."""
    try:
        uri = await story.track()
        async with _work_on(story, report, uri) as (work, disk):
            await _work_done(work, report)
            await story.full()
            for index in range(story.plan.increments):
                await _work_done(work, report)
                if index == story.plan.increments // 2:
                    await story.survive_a_kill(work)
                last = index == story.plan.increments - 1
                await story.increment(disk.frozen() if disk and last else contextlib.nullcontext())
            if disk:
                await story.check_file_system()
            await story.first_is_unchanged()
    except BlksnapError as error:
        raise DemoError(str(error)) from error
    if wrong := [line.number for line in story.increments if not line.verified]:
        raise DemoError(f"these increments differ from their images: {wrong}")


async def _work_done(work: Workload, report: Report) -> None:
    for piece in await work.more(PIECES_PER_INCREMENT):
        report.detail(piece)
