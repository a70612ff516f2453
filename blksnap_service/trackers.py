# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is tracked by what.

The ``Registry`` attaches, detaches and adopts trackers of any backend, one operation per device at a time, and keeps
the catalogue in step. It reads no maps (``mapreader``) and takes no snapshots (``snapshots``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from blksnap_service import errors
from blksnap_service.catalogue import Catalogue, TrackerEntry
from blksnap_service.cbt import Geometry, InvalidRange
from blksnap_service.devices import Device
from blksnap_service.mapreader import MAX_RANGES, MapReader
from blksnap_service.storage import Identity
from blksnap_service.tracker import Backend, BackendInfo, Placement, Tracker, TrackerReading
from blksnap_service.work import Work

_log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Is told about trackers; must not raise."""

    def tracker_added(self, name: str) -> None:
        """The device is tracked from now on."""

    def tracker_changed(self, name: str) -> None:
        """The reading is another one."""

    def tracker_removed(self, name: str) -> None:
        """The device is not tracked any more."""

    def generation_started(self, name: str, generation: str, reason: str) -> None:
        """Numbers and maps from before say nothing any more."""


@dataclass(frozen=True, slots=True)
class Tracked:
    """A tracker with the reader of its maps and what the catalogue says about it."""

    tracker: Tracker
    reader: MapReader
    entry: TrackerEntry


class Registry:
    """Who is tracked by what, by object name of the device."""

    def __init__(
        self,
        catalogue: Catalogue,
        backends: Sequence[Backend],
        watcher: Watcher,
        made_of: Callable[[Identity], str] = lambda _: "",
    ) -> None:
        """Use ``backends``, best first. ``made_of`` says what a device is that is none of its own, or nothing."""
        self._catalogue = catalogue
        self._backends = {backend.info.name: backend for backend in backends}
        self._watcher = watcher
        self._made_of = made_of
        self._tracked: dict[str, Tracked] = {}
        self.unwanted: set[str] = set()
        """Origins a failed attach may have left behind."""
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def __iter__(self) -> Iterator[tuple[str, Tracked]]:
        """Iterate over a copy of all trackers by device name."""
        return iter(list(self._tracked.items()))

    def __contains__(self, name: str) -> bool:
        return name in self._tracked

    def lock(self, name: str) -> asyncio.Lock:
        """The lock of a device: held while its tracker is attached, detached, marked or taken. Take several in order of name."""
        return self._locks[name]

    def get(self, name: str) -> Tracked:
        """Return the tracker of a device. Raises ``errors.NotTracked``."""
        found = self._tracked.get(name)
        if found is None:
            raise errors.NotTracked(f"{name} is not tracked: attach a tracker first")
        return found

    def by_origin(self, origin: str) -> str | None:
        """Return the device name of an origin, or None."""
        for name, tracked in self._tracked.items():
            if tracked.tracker.origin == origin:
                return name
        return None

    def origins(self) -> set[Identity]:
        """The files and devices that are open as origins, and the devices over them."""
        return {identity for tracked in self._tracked.values() for identity in tracked.tracker.devices}

    def infos(self) -> list[BackendInfo]:
        """What each backend can do, best first."""
        return [backend.info for backend in self._backends.values()]

    def usable(self, device: Device) -> list[str]:
        """The names of backends that can track a device now, best first."""
        if self._ours(device):
            return []
        return [backend.info.name for backend in self._ranked(device) if backend.refusal(device) is None]

    def choice(self, device: Device, backend: str) -> str:
        """The name of the backend ``attach`` would use. Raises as ``attach``."""
        return self._choose(device, backend).info.name

    async def attach(
        self,
        device: Device,
        *,
        owner_uid: int,
        backend: str = "",
        block_size: int = 0,
        persistent: bool = False,
        work: Work | None = None,
    ) -> None:
        """Attach a tracker. ``backend`` empty: the best one that can. ``work`` can be stopped while it waits for its turn.

        Raises ``errors.AlreadyTracked``, ``errors.InvalidArgument`` (no such backend), ``errors.NotSupported`` (it cannot
        track this device) and what the backend raises.
        """
        work = work or Work()
        async with work.holding(self.lock(device.name)):
            work.commit()
            await self.attach_locked(
                device, owner_uid=owner_uid, backend=backend, block_size=block_size, persistent=persistent
            )

    async def attach_locked(
        self,
        device: Device,
        *,
        owner_uid: int,
        backend: str = "",
        block_size: int = 0,
        persistent: bool = False,
    ) -> None:
        """Attach as ``attach`` does; the caller holds the device's lock."""
        if device.name in self._tracked:
            raise errors.AlreadyTracked(f"{device.path} is already tracked")
        if ours := self._ours(device):
            raise errors.NotSupported(f"{device.path} is {ours}: it cannot be tracked itself")
        chosen = self._choose(device, backend)
        entry = TrackerEntry(
            key=device.name,
            path=device.path,
            backend=chosen.info.name,
            origin=device.origin,
            owner_uid=owner_uid,
            attached_at=time.time_ns() // 1000,
            persistent=persistent,
            last_reset="",
            block_size=block_size,
            identity="",
            stable_key=device.stable_key,
        )
        self.unwanted.discard(device.origin)
        before = self._catalogue.trackers.get(device.name)
        await self._catalogue.trackers.put(entry)
        try:
            attached = await chosen.attach(device, block_size)
        except BaseException as error:
            if isinstance(error, errors.NotAvailable):
                # It may have ended in the middle, and come back with what nobody waits for any more.
                self.unwanted.add(device.origin)
            if before is not None and before.persistent:
                await self._catalogue.trackers.put(before)
            else:
                await self._catalogue.trackers.drop(device.name)
            raise
        await self._admit(device.name, attached.tracker, entry, attached.last_reset)

    async def detach(self, device: Device, *, force: bool = False, work: Work | None = None) -> None:
        """Detach and save the map. Raises ``errors.NotTracked`` and ``errors.Busy`` (snapshots, clients) unless forced."""
        work = work or Work()
        async with work.holding(self.lock(device.name)):
            work.commit()
            await self.detach_locked(device, force=force)

    async def detach_locked(self, device: Device, *, force: bool = False) -> None:
        """Detach as ``detach`` does; the caller holds the device's lock."""
        tracked = self._tracked.get(device.name)
        if tracked is None:
            entry = self._catalogue.trackers.get(device.name)
            if entry is not None and entry.persistent:
                # It was to be attached by itself and is not yet: this is how one stops that.
                await self._catalogue.trackers.drop(device.name)
                return
            raise errors.NotTracked(f"{device.path} is not tracked")
        backend = self._backends[tracked.entry.backend]
        await backend.detach(tracked.tracker, tracked.entry.last_reset, force=force)
        self.forget(device.name)
        await self._catalogue.trackers.drop(device.name)

    async def mark(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Mark byte ranges (offset, length) as changed: all or, when one is wrong, none.

        Raises ``errors.InvalidArgument`` and ``errors.NotTracked``.
        """
        if len(ranges) > MAX_RANGES:
            raise errors.InvalidArgument(f"{len(ranges)} ranges are more than {MAX_RANGES}: mark in parts")
        # Under the lock no take and no reset comes between the parts the ranges may be sent in.
        async with self.lock(name):
            tracker = self.get(name).tracker
            reading = await tracker.read()
            try:
                Geometry(reading.capacity, reading.block_size).validate(ranges)
            except InvalidRange as error:
                raise errors.InvalidArgument(f"{error}; nothing was marked") from error
            await tracker.mark(ranges)

    async def mark_all(self, name: str) -> None:
        """Mark everything as changed. Raises ``errors.NotTracked``."""
        async with self.lock(name):
            await self.get(name).tracker.mark_all()

    async def refresh(self, name: str, reason: str = "") -> None:
        """Make a reading and tell what changed; ``reason`` explains a new generation.

        A tracker its backend does not have any more is forgotten.
        """
        tracked = self._tracked.get(name)
        if tracked is None:
            return
        before = tracked.tracker.last
        try:
            now = await tracked.tracker.read()
        except errors.NotFound:
            _log.error("the tracker of %s is gone", tracked.entry.path)
            self.forget(name)
            return
        if now.generation != before.generation:
            reason = reason or now.reset or "the map could not be trusted any more"
            await self._note_reset(name, tracked, reason)
        elif now.state == "broken" != before.state:
            await self._note_reset(name, tracked, now.reason)
        if _visible(now) != _visible(before):
            self._watcher.tracker_changed(name)
        if now.generation != before.generation:
            self._watcher.generation_started(name, now.generation, reason)

    def trouble(self, name: str) -> str | None:
        """Return why a tracker is broken, empty if it is not, None if there is no tracker."""
        if (tracked := self._tracked.get(name)) is None:
            return None
        last = tracked.tracker.last
        return (last.reason or "it does not say why") if last.state == "broken" else ""

    async def resize(self, name: str) -> None:
        """Have a tracker go by the present size of its device. Raises what the backend raises."""
        async with self.lock(name):
            if (tracked := self._tracked.get(name)) is not None:
                await tracked.tracker.resize()

    async def taken(self, name: str, reason: str) -> None:
        """Tell what a take changed; ``reason`` is why it began a new generation, if it did."""
        await self.refresh(name, reason)
        if (tracked := self._tracked.get(name)) is not None:
            await tracked.reader.note_take()

    async def adopt(self, device: Device, tracker: Tracker, entry: TrackerEntry) -> None:
        """Take over a tracker that runs already, unless it was just attached here."""
        async with self.lock(device.name):
            if device.name not in self._tracked:
                last_reset = tracker.last.reset or entry.last_reset
                await self._admit(device.name, tracker, entry, last_reset)

    def forget(self, name: str) -> None:
        """Drop a tracker that is gone; the catalogue is not touched."""
        if self._tracked.pop(name, None) is not None:
            self._watcher.tracker_removed(name)

    # What happens when a backend ends.

    def note_away(self, reason: str) -> None:
        """No backend can be asked for a while; what it tracks is hoped to be tracked still."""
        for name, tracked in self:
            tracked.tracker.note_away(reason)
            self._watcher.tracker_changed(name)

    async def replace(self, device: Device, entry: TrackerEntry, reason: str) -> None:
        """Track again what its backend has lost, in the same place as far as possible: with a new generation.

        Its owner and the time of its attach stay. Raises as ``attach``.
        """
        async with self.lock(device.name):
            before = Placement(entry.top, entry.insert, entry.ublk_id)
            attached = await self._backends[entry.backend].attach(device, entry.block_size, before)
            last_reset = f"{reason}: {attached.last_reset}"
            await self._admit(device.name, attached.tracker, entry, last_reset)
            _log.warning("%s is tracked again, as a new generation: %s", entry.path, last_reset)
            self._watcher.generation_started(device.name, attached.tracker.last.generation, last_reset)

    async def _admit(self, name: str, tracker: Tracker, entry: TrackerEntry, last_reset: str) -> None:
        placement = tracker.placement
        entry = replace(
            entry,
            last_reset=last_reset,
            identity=str(tracker.identity),
            top=placement.top,
            insert=placement.insert,
            ublk_id=placement.ublk_id,
        )
        known = name in self._tracked
        self._tracked[name] = Tracked(tracker, MapReader(tracker), entry)
        if known:
            self._watcher.tracker_changed(name)
        else:
            self._watcher.tracker_added(name)
        try:
            await self._catalogue.trackers.put(entry)
        except errors.BlksnapError as error:
            # It does run; after a restart it is found in the data path, as nobody's.
            _log.error("%s is tracked, but that could not be written down: %s", name, error)

    async def _note_reset(self, name: str, tracked: Tracked, reason: str) -> None:
        entry = replace(tracked.entry, last_reset=reason)
        self._tracked[name] = replace(tracked, entry=entry)
        _log.warning("the history of %s ended: %s", entry.path, reason)
        try:
            await self._catalogue.trackers.put(entry)
        except errors.BlksnapError as error:
            _log.error("%s", error)

    def _choose(self, device: Device, name: str) -> Backend:
        if name:
            chosen = self._backends.get(name)
            if chosen is None:
                known = ", ".join(self._backends)
                raise errors.InvalidArgument(f"there is no backend {name!r} here; there is: {known}")
            return chosen
        ranked = self._ranked(device)
        refusals = [backend.refusal(device) for backend in ranked]
        for backend, refusal in zip(ranked, refusals, strict=True):
            if refusal is None:
                return backend
        for backend, refusal in zip(ranked, refusals, strict=True):
            # What one must do for the best one that could is more help than all that cannot be had.
            if (
                backend.info.available
                and refusal is not None
                and not isinstance(refusal, errors.NotSupported)
            ):
                raise refusal
        reasons = "; ".join(str(refusal) for refusal in refusals)
        raise errors.NotSupported(f"nothing here can track {device.path} now: {reasons}")

    def _ranked(self, device: Device) -> list[Backend]:
        return sorted(self._backends.values(), key=lambda backend: backend.rank(device))

    def _ours(self, device: Device) -> str:
        """Return what a device is that is there because another one is tracked; empty for all others."""
        for name, tracked in self._tracked.items():
            if name != device.name and device.identity in tracked.tracker.devices:
                return f"part of the tracker of {tracked.entry.path}"
        return self._made_of(device.identity)


def _visible(reading: TrackerReading) -> tuple[object, ...]:
    """What of a reading is a property on the bus."""
    return (
        reading.state,
        reading.capacity,
        reading.block_size,
        reading.block_count,
        reading.generation,
        reading.active,
        reading.oldest,
    )
