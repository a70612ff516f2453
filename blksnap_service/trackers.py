# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is tracked by what.

The ``Registry`` attaches, detaches and adopts trackers of any backend, one operation per device at a time, and keeps
the catalogue in step. It reads no maps (``mapreader``) and takes no snapshots (``snapshots``).
"""

from __future__ import annotations

import asyncio
import contextlib
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
from blksnap_service.tracker import Backend, BackendInfo, Tracker, TrackerReading

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
        self._ended: dict[str, Tracked] = {}
        """Trackers that ran when their backend ended, until they run again or are given up."""
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
        return [name for name, backend in self._backends.items() if backend.refusal(device) is None]

    async def attach(
        self,
        device: Device,
        *,
        owner_uid: int,
        backend: str = "",
        block_size: int = 0,
        persistent: bool = False,
    ) -> None:
        """Attach a tracker. ``backend`` empty: the best one that can.

        Raises ``errors.AlreadyTracked``, ``errors.InvalidArgument`` (no such backend), ``errors.NotSupported`` (it cannot
        track this device) and what the backend raises.
        """
        async with self.lock(device.name):
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
        if device.name in self._ended:
            raise errors.Busy(
                f"{device.path} is about to be tracked again by itself: wait, or detach it first"
            )
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
        )
        before = self._catalogue.trackers.get(device.name)
        await self._catalogue.trackers.put(entry)
        try:
            attached = await chosen.attach(device, block_size)
        except BaseException:
            if before is not None and before.persistent:
                await self._catalogue.trackers.put(before)
            else:
                await self._catalogue.trackers.drop(device.name)
            raise
        await self._admit(device.name, attached.tracker, entry, attached.last_reset)

    async def detach(self, device: Device, *, force: bool = False) -> None:
        """Detach and save the map. Raises ``errors.NotTracked`` and ``errors.Busy`` (snapshots, clients) unless forced."""
        async with self.lock(device.name):
            await self.detach_locked(device, force=force)

    async def detach_locked(self, device: Device, *, force: bool = False) -> None:
        """Detach as ``detach`` does; the caller holds the device's lock."""
        tracked = self._tracked.get(device.name)
        if tracked is None:
            entry = self._catalogue.trackers.get(device.name)
            ended = self._ended.pop(device.name, None)
            if ended is not None:
                ended.tracker.close()
            if ended is not None or (entry is not None and entry.persistent):
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
            reason = reason or "the map could not be trusted any more"
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
            if device.name in self._tracked:
                tracker.close()
                return
            await self._admit(device.name, tracker, entry, entry.last_reset)
            if not tracker.last.reason:
                # From now on it holds what is left when the backend ends. One that hangs would keep others waiting.
                with contextlib.suppress(errors.BlksnapError):
                    await self.refresh(device.name)

    def forget(self, name: str) -> None:
        """Drop a tracker that is gone; the catalogue is not touched."""
        if (tracked := self._tracked.pop(name, None)) is not None:
            tracked.tracker.close()
            self._watcher.tracker_removed(name)

    def close(self) -> None:
        """Let go of what all trackers hold here; they go on."""
        for tracked in (*self._tracked.values(), *self._ended.values()):
            tracked.tracker.close()

    # What happens when a backend ends.

    def ended(self) -> list[TrackerEntry]:
        """The trackers that ran when their backend ended and do not run again yet."""
        return [tracked.entry for tracked in self._ended.values()]

    async def note_end(self) -> None:
        """All trackers have ended with their backend: forget them, but keep what ``resume`` needs."""
        fresh = self._tracked.copy()
        self._tracked.clear()
        self._ended.update(fresh)
        for name in fresh:
            self._watcher.tracker_removed(name)
        await asyncio.gather(*(tracked.tracker.note_end() for tracked in fresh.values()))

    async def resume(self, device: Device) -> None:
        """Attach again what ran when its backend ended, unless somebody has detached it. Raises as ``attach``.

        Its owner and the time of its attach stay. A new generation is told like any other.
        """
        async with self.lock(device.name):
            ended = self._ended.get(device.name)
            if ended is None:
                return
            backend, entry = self._backends[ended.entry.backend], ended.entry
            before = ended.tracker.last.generation
            attached = await backend.resume(device, ended.tracker, entry.block_size, entry.last_reset)
            await self._admit(device.name, attached.tracker, entry, attached.last_reset)
            now = attached.tracker.last.generation
            if now == before:
                _log.info("%s is tracked again, and its generation goes on", entry.path)
                return
            _log.warning("%s is tracked again, as a new generation: %s", entry.path, attached.last_reset)
            self._watcher.generation_started(device.name, now, attached.last_reset)

    async def give_up(self, name: str) -> None:
        """Forget a tracker that cannot be attached again; one that is to be there always stays in the catalogue."""
        async with self.lock(name):
            if (ended := self._ended.pop(name, None)) is not None:
                ended.tracker.close()
                if not ended.entry.persistent:
                    await self._catalogue.trackers.drop(name)

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
        self._tracked[name] = Tracked(tracker, MapReader(tracker), entry)
        if (ended := self._ended.pop(name, None)) is not None:
            ended.tracker.close()
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
        refusals = [backend.refusal(device) for backend in self._backends.values()]
        for backend, refusal in zip(self._backends.values(), refusals, strict=True):
            if refusal is None:
                return backend
        for backend, refusal in zip(self._backends.values(), refusals, strict=True):
            # What one must do for the best one that could is more help than all that cannot be had.
            if (
                backend.info.available
                and refusal is not None
                and not isinstance(refusal, errors.NotSupported)
            ):
                raise refusal
        reasons = "; ".join(str(refusal) for refusal in refusals)
        raise errors.NotSupported(f"nothing here can track {device.path} now: {reasons}")

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
