# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel filter's snapshots as an ``engines.SnapshotEngine``.

The kernel forgets who is in a snapshot, and one whose take failed can never be taken: what is known is kept here, and devices
are added right before the take, to a snapshot that is thrown away when that fails. So nothing of a failed take is left in the
kernel but the number it may have used up, and a device can never be added to a snapshot that was taken. Snapshots others
made are adopted under the kernel's id, with the devices whose images are theirs; their events are left to whoever made them.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from blksnap_service import errors, storage as storages
from blksnap_service.backends.blkfilter import difference
from blksnap_service.backends.blkfilter.backend import FilterBackend
from blksnap_service.backends.blkfilter.control import Control
from blksnap_service.backends.blkfilter.difference import Difference
from blksnap_service.backends.blkfilter.events import EventThread
from blksnap_service.backends.blkfilter.images import Member, failure_of, find_members, image_of, take_reason
from blksnap_service.backends.blkfilter.threads import to_the_end
from blksnap_service.backends.blkfilter.tracker import FilterTracker
from blksnap_service.backends.blkfilter.uapi import Event
from blksnap_service.catalogue import FilterSnapshotEntry, Table
from blksnap_service.engines import SnapshotStatus
from blksnap_service.fds import OwnedFd

_log = logging.getLogger(__name__)

_END_TIMEOUT_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class SnapshotEvent:
    """Something to tell about a snapshot: it is nearly full, it is full, or old bytes of an origin could not be kept."""

    snapshot: str
    used: int = 0
    limit: int = 0
    requested: int = 0
    origin: str = ""
    errno: int = 0
    message: str = ""


@dataclass(eq=False, slots=True)
class _Record:
    entry: FilterSnapshotEntry
    ours: bool
    storage: Difference | None = None
    failures: dict[str, str] = field(default_factory=dict)
    """By origin, why its image is not what it was. It never is again."""
    events: EventThread | None = None


class FilterEngine:
    """Snapshots of origins with the kernel filter."""

    name = "the kernel"

    def __init__(
        self,
        backend: FilterBackend,
        table: Table[FilterSnapshotEntry],
        tell: Callable[[SnapshotEvent], None],
    ) -> None:
        """Use what ``backend`` found; ``tell`` is called on the event loop."""
        self._backend = backend
        self._table = table
        self._tell = tell
        self._records: dict[str, _Record] = {}
        # Adding and taking at once can stop the kernel for good (its locks are taken in both orders).
        self._kernel_lock = asyncio.Lock()

    async def create(
        self, snapshot: str, storage: OwnedFd, *, limit: int, low_space: int, chunk_size: int
    ) -> SnapshotStatus:
        """Begin a snapshot. ``low_space`` is the kernel's own choice.

        Raises ``errors.NoSpace``, ``errors.NotSupported`` (a chunk size), ``errors.InvalidArgument`` and ``errors.Busy`` (storage).
        """
        del low_space
        with storage:
            if chunk_size:
                raise errors.NotSupported(
                    "the kernel filter chooses the chunk size itself: leave the option chunk-size out"
                )
            control, generation = self._backend.control(), self._backend.generation
            if generation is None:
                raise errors.NotAvailable("the kernel filter is gone")
            try:
                prepared = await asyncio.to_thread(difference.prepare, storage, limit, generation)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise errors.Failed(f"the difference storage cannot be used: {reason}") from error
        try:
            kernel_id = await self._create(control, prepared)
            record = _Record(FilterSnapshotEntry(snapshot, kernel_id, (), 0, prepared.limit), True, prepared)
            self._records[snapshot] = record
            await self._table.put(record.entry)
        except BaseException:
            self._records.pop(snapshot, None)
            prepared.fd.close()
            raise
        return await self.status(snapshot)

    async def _create(self, control: Control, prepared: Difference) -> str:
        return await to_the_end(lambda: control.create(prepared.fd, prepared.told), control.destroy)

    async def take(self, snapshot: str, origins: Sequence[str]) -> Mapping[str, str]:
        """Take all at one instant: file systems together, bare devices one after the other.

        A failing take leaves the kernel without the snapshot; the next one makes another there.
        """
        record = self._record(snapshot)
        if record.entry.taken_at:
            raise errors.InvalidState("the snapshot was taken already")
        trackers = [self._backend.tracker(origin) for origin in origins]
        control = self._backend.control()
        async with self._kernel_lock:
            kernel_id = record.entry.kernel_id
            if not kernel_id:
                if record.storage is None:
                    raise errors.InvalidState("the storage of the snapshot is gone: destroy it")
                kernel_id = await self._create(control, record.storage)
            try:
                resets = await to_the_end(
                    lambda: _take(control, kernel_id, trackers, record.storage), lambda _: None
                )
                entry = replace(
                    record.entry, kernel_id=kernel_id, origins=tuple(origins), taken_at=time.time_ns() // 1000
                )
                await self._table.put(entry)
            except BaseException:
                record.entry = replace(record.entry, kernel_id="")
                await to_the_end(lambda: _undo(control, kernel_id), lambda _: None)
                raise
            record.entry = entry
        self._listen(record)
        return resets

    async def status(self, snapshot: str) -> SnapshotStatus:
        """Make a reading. Raises ``errors.NotFound`` when the kernel does not have it any more."""
        record = self._record(snapshot)
        if not await self._is_held(record):
            await self._forget(record)
            raise errors.NotFound(f"the kernel has no snapshot {snapshot} (any more)")
        return await self._status(record)

    async def _is_held(self, record: _Record) -> bool:
        if self._backend.generation is None:
            return False
        held = await asyncio.to_thread(self._backend.control().collect)
        return not record.entry.kernel_id or record.entry.kernel_id in held

    async def _status(self, record: _Record) -> SnapshotStatus:
        entry = record.entry
        members = {tracker.origin: tracker for tracker in self._backend.trackers()}
        images = []
        for origin in entry.origins:
            member = await asyncio.to_thread(
                image_of, origin, members.get(origin), record.failures.get(origin, "")
            )
            self._note_failure(record, member)
            images.append(member.status)
        failed = [f"{image.origin}: {image.error}" for image in images if image.error]
        allocated = record.storage.allocated() if record.storage is not None else 0
        return SnapshotStatus(
            snapshot=entry.key,
            state="failed" if failed else "taken" if entry.taken_at else "created",
            error="; ".join(failed),
            limit=entry.limit,
            # The kernel does not tell: at most what it has allocated.
            used=allocated,
            allocated=allocated,
            taken_at=entry.taken_at,
            images=tuple(images),
        )

    def _note_failure(self, record: _Record, member: Member) -> None:
        if member.status.error and member.status.origin not in record.failures:
            record.failures[member.status.origin] = member.status.error
            if record.events is None or not member.errno:
                # Nobody else tells: it is another's snapshot, or a kind of failure the kernel does not notice.
                self._tell_failure(record, member.status.origin, member.errno, member.status.error)

    def _tell_failure(self, record: _Record, origin: str, number: int, message: str) -> None:
        if number == errno.ENOSPC:
            self._tell(SnapshotEvent(record.entry.key, requested=record.entry.limit))
        self._tell(SnapshotEvent(record.entry.key, origin=origin, errno=number, message=message))

    async def destroy(self, snapshot: str) -> None:
        """End it; images go away with whoever uses them. Raises ``errors.NotFound`` when there is none."""
        record = self._record(snapshot)
        if record.events is not None:
            record.events.stop()
        try:
            if record.entry.kernel_id:
                control = self._backend.control()
                async with self._kernel_lock:
                    await asyncio.to_thread(control.destroy, record.entry.kernel_id)
        except errors.NotFound:
            await self._forget(record)
            raise
        except BaseException:
            self._listen(record)
            raise
        await self._forget(record)

    def may_hold(self, snapshot: str) -> bool:
        """Whether the kernel may have it, although that cannot be told now."""
        return self._table.get(snapshot) is not None and self._backend.is_hoped_for

    async def discover(self) -> list[SnapshotStatus]:
        """Return all of the kernel's snapshots, adopting those made by others, and those made before it took none."""
        if self._backend.generation is None:
            return []
        try:
            held = await asyncio.to_thread(self._backend.control().collect)
        except errors.BlksnapError as error:
            _log.error("snapshots of the kernel filter cannot be listed: %s", error)
            return []
        for entry in self._table:
            if entry.key not in self._records:
                if entry.kernel_id in held:
                    record = self._records[entry.key] = _Record(entry, True)
                    self._listen(record)
                else:
                    await self._table.drop(entry.key)
        known = {record.entry.kernel_id for record in self._records.values()}
        await self._adopt([kernel_id for kernel_id in held if kernel_id not in known])
        records = list(self._records.values())
        return [await self._status(record) for record in records if record.entry.kernel_id in held]

    async def _adopt(self, foreign: Sequence[str]) -> None:
        """Take note of snapshots others made, and of devices that came to those since."""
        others = {record.entry.kernel_id: record for record in self._records.values() if not record.ours}
        for kernel_id in foreign:
            others[kernel_id] = _Record(FilterSnapshotEntry(kernel_id, kernel_id, (), 0, 0), False)
            self._records[kernel_id] = others[kernel_id]
        placed = {origin for record in self._records.values() for origin in record.entry.origins}
        free = [tracker for tracker in self._backend.trackers() if tracker.origin not in placed]
        if not others or not free:
            return
        async with self._kernel_lock:
            found = await asyncio.to_thread(find_members, free, list(others))
        for kernel_id, origins in found.items():
            entry = others[kernel_id].entry
            taken_at = entry.taken_at or time.time_ns() // 1000
            others[kernel_id].entry = replace(entry, origins=(*entry.origins, *origins), taken_at=taken_at)

    def close(self) -> None:
        """Let go of storage and threads; the kernel keeps its snapshots."""
        for record in self._records.values():
            if record.events is not None:
                record.events.stop()
            if record.storage is not None:
                record.storage.fd.close()
        self._records.clear()

    def _record(self, snapshot: str) -> _Record:
        found = self._records.get(snapshot)
        if found is None:
            raise errors.NotFound(f"the kernel has no snapshot {snapshot} (any more)")
        return found

    async def _forget(self, record: _Record) -> None:
        self._records.pop(record.entry.key, None)
        if record.storage is not None:
            record.storage.fd.close()
        if (events := record.events) is not None:
            record.events = None
            events.stop()
            # Until then the kernel keeps images and storage.
            try:
                await asyncio.wait_for(events.ended(), _END_TIMEOUT_S)
            except TimeoutError:
                _log.error("the kernel does not let go of snapshot %s", record.entry.kernel_id)
        await self._table.drop(record.entry.key)

    def _listen(self, record: _Record) -> None:
        if record.ours and record.entry.taken_at:
            record.events = EventThread(
                self._backend.control(), record.entry.kernel_id, lambda event: self._on_event(record, event)
            )

    def _on_event(self, record: _Record, event: Event) -> None:
        entry = record.entry
        if event.kind == "corrupted":
            origin = self._origin_at(os.makedev(*event.device))
            message = failure_of(event.errno)
            record.failures.setdefault(origin, message)
            self._tell_failure(record, origin, event.errno, message)
            return
        # It tells that half a step is left and that it cannot grow: of a storage that never had more, that says nothing.
        half = (record.storage.step if record.storage is not None else difference.DEFAULT_STEP) // 2
        if entry.limit > half:
            self._tell(SnapshotEvent(entry.key, used=entry.limit - half, limit=entry.limit))

    def _origin_at(self, number: int) -> str:
        for tracker in self._backend.trackers():
            if tracker.identity.device == number:
                return tracker.origin
        return ""


def _take(
    control: Control, kernel_id: str, trackers: Sequence[FilterTracker], storage: Difference | None
) -> dict[str, str]:
    """Add and take; returns, for each whose generation ended, why. Blocks. Raises ``errors.BlksnapError``."""
    if storage is not None:
        below = storages.origins_below(os.fstat(storage.fd.fileno()), {one.identity for one in trackers})
        if hosts := [tracker.node for tracker in trackers if tracker.identity in below]:
            raise errors.InvalidArgument(
                f"the difference storage lies on {', '.join(hosts)}, of which the snapshot is to be taken: choose a place on"
                " another device"
            )
    before = {}
    for tracker in trackers:
        if not tracker.device.is_same():
            raise errors.InvalidState(
                f"another medium is in {tracker.node} than was tracked: detach and attach it again"
            )
        before[tracker.origin] = tracker.device.info()
        if number := tracker.device.add_to(kernel_id):
            which = "this" if number == errno.EALREADY else "another"
            raise errors.Busy(
                f"{tracker.node} is part of {which} snapshot of the kernel filter already: destroy that first"
            )
    written = {tracker.origin: tracker.written_now() for tracker in trackers}
    control.take(kernel_id)
    resets = {}
    for tracker in trackers:
        info = tracker.device.snapshot_info()
        if not info.image:
            raise errors.NotSupported(
                f"the kernel left {tracker.node} out of the snapshot: it holds the difference storage; choose another place"
            )
        if info.errno:
            raise errors.Corrupted(f"{tracker.node}: {failure_of(info.errno)}")
        after = tracker.device.info()
        tracker.begin_interval(written[tracker.origin], after)
        if reason := take_reason(before[tracker.origin], after):
            resets[tracker.origin] = reason
    return resets


def _undo(control: Control, kernel_id: str) -> None:
    try:
        control.destroy(kernel_id)
    except errors.NotFound:
        return
    except errors.BlksnapError as error:
        _log.error("snapshot %s could not be removed from the kernel: %s", kernel_id, error)
