# SPDX-License-Identifier: GPL-2.0-or-later
"""The life cycle of snapshots: created, taken, failed, destroying.

A snapshot here is what an engine holds plus what only the service knows: owner, holder, description, storage. Everything
that changes one goes through its lock; what fails on the way to a snapshot leaves nothing behind. How old blocks are
kept is the engine's business, who may ask for what is ``authority``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blksnap_service import errors, storage
from blksnap_service.catalogue import Catalogue, SnapshotEntry
from blksnap_service.devices import Device
from blksnap_service.engines import SnapshotEngine, SnapshotStatus
from blksnap_service.snapshot import (
    MAX_DEVICES,
    Request,
    Snapshot,
    State,
    Watcher,
    check_holds,
    distinct,
    found,
    note_loss,
)
from blksnap_service.trackers import Registry
from blksnap_service.work import Work

_log = logging.getLogger(__name__)


class Snapshots:
    """All snapshots by uuid."""

    def __init__(
        self,
        catalogue: Catalogue,
        registry: Registry,
        engines: Mapping[str, SnapshotEngine],
        default_directory: Path,
        watcher: Watcher,
    ) -> None:
        """``engines`` by the name of the backend whose origins they take."""
        self._catalogue = catalogue
        self._registry = registry
        self._engines = engines
        self._default_directory = default_directory
        self._watcher = watcher
        self._snapshots: dict[str, Snapshot] = {}
        self._choosing = asyncio.Lock()
        self._making: set[str] = set()
        self._unwanted: set[str] = set()
        """Those that came to nothing while their engine could not be told."""

    def __iter__(self) -> Iterator[Snapshot]:
        """Iterate over a copy of all snapshots."""
        return iter(list(self._snapshots.values()))

    def get(self, snapshot_id: str) -> Snapshot:
        """Return a snapshot. Raises ``errors.NotFound``."""
        found = self._snapshots.get(snapshot_id)
        if found is None:
            raise errors.NotFound(f"there is no snapshot {snapshot_id} (any more)")
        return found

    def of_device(self, name: str) -> list[Snapshot]:
        """Return the snapshots that cover a device."""
        return [snapshot for snapshot in self if name in snapshot.entry.devices]

    async def create(self, devices: Sequence[Device], request: Request) -> Snapshot:
        """Create a snapshot of ``devices`` and, unless asked not to, take it. Its work can be stopped until it is there.

        Raises ``errors.InvalidArgument`` (no or twice the same device, storage, limit), ``errors.NotTracked``,
        ``errors.NotSupported`` (devices no engine takes together), ``errors.NoSpace``, ``errors.LimitExceeded``, and what the
        engine raises. Then neither snapshot nor storage file nor tracker of this call is left.
        """
        with contextlib.ExitStack() as stack:
            if request.storage_fd is not None:
                stack.callback(request.storage_fd.close)
            names = distinct(devices)
            if request.holder:
                check_holds(self, request.owner_uid)
            async with self._locked(names, request.work), self._attaching(devices, request):
                engine = self._engine(names)
                return await self._create(engine, devices, request)

    async def add_device(self, snapshot: Snapshot, device: Device) -> None:
        """Add a device before the take. Raises ``errors.InvalidState``, ``errors.NotTracked``, ``errors.InvalidArgument``."""
        async with snapshot.lock:
            self._require(snapshot, "created", "a device can only be added before the take")
            names = (*snapshot.entry.devices, device.name)
            if device.name in snapshot.entry.devices:
                raise errors.InvalidArgument(f"{device.path} is already part of the snapshot")
            if len(names) > MAX_DEVICES:
                raise errors.LimitExceeded(f"a snapshot covers at most {MAX_DEVICES} devices")
            self._engine(names)
            await self._note(snapshot, replace(snapshot.entry, devices=names))

    async def take(self, snapshot: Snapshot, work: Work | None = None) -> None:
        """Take a created snapshot. A take that fails leaves it created, and no number is consumed."""
        work = work or Work()
        async with self._locked(snapshot.entry.devices, work), work.holding(snapshot.lock):
            self._require(snapshot, "created", "it can be taken only once")
            work.commit()
            await self._take(snapshot)

    async def destroy(self, snapshot: Snapshot, work: Work | None = None) -> None:
        """End a snapshot and give its storage back. Raises ``errors.InvalidState`` when that is under way."""
        work = work or Work()
        async with work.holding(snapshot.lock):
            if self._snapshots.get(snapshot.id) is not snapshot:
                raise errors.NotFound(f"there is no snapshot {snapshot.id} (any more)")
            work.commit()
            snapshot.destroying = True
            self._watcher.snapshot_changed(snapshot)
            try:
                await self._end_in_engine(snapshot)
            except BaseException:
                snapshot.destroying = False
                self._watcher.snapshot_changed(snapshot)
                raise
            await self._forget(snapshot)

    async def release(self, snapshot: Snapshot) -> None:
        """Drop the hold. Raises ``errors.InvalidState`` when there is none."""
        async with snapshot.lock:
            if not snapshot.entry.holder:
                raise errors.InvalidState("the snapshot is not held")
            await self._note(snapshot, replace(snapshot.entry, holder="", bus_id=""))

    async def refresh(self, snapshot: Snapshot) -> None:
        """Read the status again and tell what changed. A snapshot the engine does not have any more is forgotten."""
        async with snapshot.lock:
            if self._snapshots.get(snapshot.id) is not snapshot:
                return
            try:
                status = await snapshot.engine.status(snapshot.id)
            except errors.NotFound:
                note_loss(snapshot.entry)
                await self._forget(snapshot)
                return
            self._update(snapshot, status)

    async def adopt(self, bus_id: str) -> None:
        """Bring this process in step with what the engines hold: take over what it does not know, forget what is not there.

        What the catalogue does not name belongs to uid 0. A holder on another bus than ``bus_id`` has left: its snapshots
        end here.
        """
        for snapshot in self:
            await self.refresh(snapshot)
        for engine in dict.fromkeys(self._engines.values()):
            for status in await engine.discover():
                if status.snapshot in self._unwanted:
                    await engine.destroy(status.snapshot)
                    self._unwanted.discard(status.snapshot)
                elif status.snapshot not in self._snapshots and status.snapshot not in self._making:
                    entry = self._catalogue.snapshots.get(status.snapshot) or found(
                        engine, status, self._names(status)
                    )
                    snapshot = Snapshot(entry, engine, status)
                    self._snapshots[snapshot.id] = snapshot
                    self._watcher.snapshot_added(snapshot)
                    if entry.holder and entry.bus_id != bus_id:
                        _log.warning("the holder of snapshot %s has left: it ends", entry.key)
                        await self.destroy(snapshot)
                elif (known := self._snapshots.get(status.snapshot)) is not None and not known.entry.devices:
                    # Another program made it, and has only now added devices.
                    known.entry = replace(known.entry, devices=self._names(status))
                    self._update(known, status)
        for entry in self._catalogue.snapshots:
            hoped_for = any(engine.may_hold(entry.key) for engine in self._engines.values())
            if entry.key not in self._snapshots and entry.key not in self._making and not hoped_for:
                note_loss(entry)
                await self._drop(entry)

    def low_space(self, snapshot_id: str, used: int, limit: int) -> None:
        """Pass on what the engine told."""
        if (snapshot := self._snapshots.get(snapshot_id)) is not None:
            self._watcher.low_space(snapshot, used, limit)

    def no_space(self, snapshot_id: str, requested: int) -> None:
        """Pass on what the engine told."""
        if (snapshot := self._snapshots.get(snapshot_id)) is not None:
            self._watcher.no_space(snapshot, requested)

    def corrupted(self, snapshot_id: str, origin: str, errno: int, message: str) -> None:
        """Pass on what the engine told."""
        snapshot, device = self._snapshots.get(snapshot_id), self._registry.by_origin(origin)
        if snapshot is not None and device is not None:
            self._watcher.corrupted(snapshot, device, errno, message)

    # How a snapshot comes to be.

    async def _create(self, engine: SnapshotEngine, devices: Sequence[Device], request: Request) -> Snapshot:
        # From looking whether a file is free to writing down that it is not.
        async with request.work.holding(self._choosing):
            opened = await asyncio.to_thread(self._open_storage, request, self._registry.origins())
            entry = await self._begin(opened, devices, request)
        try:
            return await self._finish(engine, entry, opened, devices, request)
        finally:
            self._making.discard(entry.key)

    async def _begin(
        self, opened: storage.Storage, devices: Sequence[Device], request: Request
    ) -> SnapshotEntry:
        """Write down that there will be a snapshot, so that a crash leaves nothing nobody knows of."""
        entry = SnapshotEntry(
            key=str(uuid.uuid4()),
            devices=tuple(device.name for device in devices),
            owner_uid=request.owner_uid,
            description=request.description,
            storage_path=opened.path,
            storage_made=str(opened.identity) if opened.made else "",
            limit=request.limit,
            created_at=time.time_ns() // 1000,
            holder=request.holder,
            bus_id=request.bus_id if request.holder else "",
        )
        self._making.add(entry.key)
        try:
            await self._catalogue.snapshots.put(entry)
        except BaseException:
            self._making.discard(entry.key)
            opened.discard()
            raise
        return entry

    async def _finish(
        self,
        engine: SnapshotEngine,
        entry: SnapshotEntry,
        opened: storage.Storage,
        devices: Sequence[Device],
        request: Request,
    ) -> Snapshot:
        try:
            request.work.reach()
            limit = opened.limit(request.limit, sum(device.size for device in devices))
            status = await engine.create(
                entry.key, opened.fd, limit=limit, low_space=request.low_space, chunk_size=request.chunk_size
            )
            snapshot = Snapshot(entry, engine, status)
            request.work.reach()
            if request.take:
                await self._take(snapshot)
            request.work.commit()
        except BaseException:
            await self._undo(engine, entry, opened)
            raise
        self._snapshots[snapshot.id] = snapshot
        self._watcher.snapshot_added(snapshot)
        return snapshot

    async def _undo(self, engine: SnapshotEngine, entry: SnapshotEntry, opened: storage.Storage) -> None:
        opened.fd.close()
        try:
            await engine.destroy(entry.key)
        except errors.NotFound:
            pass
        except errors.BlksnapError as error:
            self._unwanted.add(entry.key)
            _log.error("snapshot %s could not be undone yet: %s", entry.key, error)
        await self._drop(entry)

    async def _take(self, snapshot: Snapshot) -> None:
        names = snapshot.entry.devices
        trackers = {name: self._registry.get(name).tracker for name in names}
        engine = self._engine(names)
        if engine is not snapshot.engine:
            raise errors.InvalidState(
                f"its devices are not tracked any more as they were when {snapshot.engine.name} began it: destroy it"
            )
        try:
            resets = await engine.take(snapshot.id, [tracker.origin for tracker in trackers.values()])
        except errors.BlksnapError:
            # The kernel filter may have used up numbers, or a generation, before it failed.
            for name in names:
                with contextlib.suppress(errors.BlksnapError):
                    await self._registry.refresh(name)
            raise
        # The take has happened: what follows only tells.
        for name, tracker in trackers.items():
            try:
                await self._registry.taken(name, resets.get(tracker.origin, ""))
            except errors.BlksnapError as error:
                _log.error("%s was taken, but cannot be read: %s", name, error)
        self._update(snapshot, await engine.status(snapshot.id))

    def _open_storage(self, request: Request, origins: Collection[storage.Identity]) -> storage.Storage:
        if request.storage_fd is not None:
            opened = storage.open_fd(request.storage_fd, origins)
        else:
            opened = storage.open_path(request.storage_path or str(self._default_directory), origins)
        taken = [entry.storage_path for entry in self._catalogue.snapshots]
        if opened.made or not any(storage.is_at(path, opened) for path in taken):
            return opened
        opened.discard()
        raise errors.Busy(
            f"difference storage {opened.path} is used by another snapshot: choose another place"
        )

    @contextlib.asynccontextmanager
    async def _locked(self, names: Collection[str], work: Work) -> AsyncIterator[None]:
        """Hold the locks of several devices, always in the same order."""
        async with contextlib.AsyncExitStack() as stack:
            for name in sorted(names):
                await stack.enter_async_context(work.holding(self._registry.lock(name)))
            yield

    @contextlib.asynccontextmanager
    async def _attaching(self, devices: Sequence[Device], request: Request) -> AsyncIterator[None]:
        """Attach trackers to devices that have none, if asked to; detach them again when the block fails."""
        mine: list[Device] = []
        try:
            for done, device in enumerate(devices):
                if request.attach:
                    # The take is the last step.
                    request.work.reach(done / (len(devices) + 1))
                if device.name in self._registry:
                    continue
                if not request.attach:
                    raise errors.NotTracked(
                        f"{device.path} is not tracked: attach a tracker first, or give the option attach"
                    )
                await self._registry.attach_locked(device, owner_uid=request.owner_uid)
                mine.append(device)
            if request.attach:
                request.work.reach(len(devices) / (len(devices) + 1))
            yield
        except BaseException:
            for device in mine:
                try:
                    await self._registry.detach_locked(device)
                except errors.BlksnapError as error:
                    _log.error("the tracker of %s could not be detached again: %s", device.path, error)
            raise

    # What holds together.

    def _engine(self, names: Collection[str]) -> SnapshotEngine:
        engines = {self._engines.get(self._registry.get(name).entry.backend) for name in names}
        engine = engines.pop() if len(engines) == 1 else None
        if engine is None:
            backends = ", ".join(sorted({self._registry.get(name).entry.backend for name in names}))
            raise errors.NotSupported(f"no snapshot can cover devices tracked by {backends} at one instant")
        return engine

    def _names(self, status: SnapshotStatus) -> tuple[str, ...]:
        names = [self._registry.by_origin(image.origin) for image in status.images]
        return tuple(name for name in names if name is not None)

    def _require(self, snapshot: Snapshot, state: State, why: str) -> None:
        if self._snapshots.get(snapshot.id) is not snapshot:
            raise errors.NotFound(f"there is no snapshot {snapshot.id} (any more)")
        if snapshot.state != state:
            raise errors.InvalidState(f"the snapshot is {snapshot.state}: {why}")

    def _update(self, snapshot: Snapshot, status: SnapshotStatus) -> None:
        if status != snapshot.status:
            snapshot.status = status
            if snapshot.id in self._snapshots:
                self._watcher.snapshot_changed(snapshot)

    async def _note(self, snapshot: Snapshot, entry: SnapshotEntry) -> None:
        await self._catalogue.snapshots.put(entry)
        snapshot.entry = entry
        self._watcher.snapshot_changed(snapshot)

    async def _end_in_engine(self, snapshot: Snapshot) -> None:
        with contextlib.suppress(errors.NotFound):
            await snapshot.engine.destroy(snapshot.id)

    async def _forget(self, snapshot: Snapshot) -> None:
        self._snapshots.pop(snapshot.id, None)
        self._watcher.snapshot_removed(snapshot)
        await self._drop(snapshot.entry)

    async def _drop(self, entry: SnapshotEntry) -> None:
        if entry.storage_made and not await asyncio.to_thread(
            storage.remove_made, entry.storage_path, entry.storage_made
        ):
            _log.warning("the storage file %s could not be removed", entry.storage_path)
        try:
            await self._catalogue.snapshots.drop(entry.key)
        except errors.BlksnapError as error:
            _log.error("%s", error)
