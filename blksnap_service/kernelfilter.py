# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel filter among the parts of the service: its backend and engine, and what happens there without being asked.

The module may come and go, other programs attach it, take snapshots and end them, and its map changes at every take: all of
that is looked for, since the kernel tells none of it. What it does tell (events of snapshots) is passed on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable

from blksnap_service import errors
from blksnap_service.backends.blkfilter.backend import FilterBackend
from blksnap_service.backends.blkfilter.engine import FilterEngine, SnapshotEvent
from blksnap_service.backends.blkfilter.tracker import NAME
from blksnap_service.catalogue import Catalogue, TrackerEntry
from blksnap_service.inventory import Inventory
from blksnap_service.snapshots import Snapshots
from blksnap_service.trackers import Registry

__all__ = ["NAME", "KernelFilter", "SnapshotEvent"]

_log = logging.getLogger(__name__)


class KernelFilter:
    """Backend and engine of the kernel filter."""

    def __init__(
        self,
        catalogue: Catalogue,
        tell: Callable[[SnapshotEvent], None],
        backend: FilterBackend | None = None,
    ) -> None:
        """``tell`` is called on the event loop."""
        self._catalogue = catalogue
        self.backend = backend or FilterBackend(catalogue.filter_devices)
        self.engine = FilterEngine(self.backend, catalogue.filter_snapshots, tell)

    def close(self) -> None:
        """Let go of everything; the kernel goes on."""
        self.engine.close()
        self.backend.close()

    async def pass_on(self, event: SnapshotEvent, snapshots: Snapshots) -> None:
        """Tell what the kernel told."""
        with contextlib.suppress(errors.NotFound):
            # State first: who hears the signal and asks must find what it says.
            await snapshots.refresh(snapshots.get(event.snapshot))
        if event.origin or event.errno:
            snapshots.corrupted(event.snapshot, event.origin, event.errno, event.message)
        elif event.requested:
            snapshots.no_space(event.snapshot, event.requested)
        else:
            snapshots.low_space(event.snapshot, event.used, event.limit)

    async def look_around(self, registry: Registry, adopt_running: Callable[[], Awaitable[object]]) -> None:
        """Find devices others attached it to, and what they did since."""
        if self.backend.is_to_be_searched:
            await adopt_running()
        await self.follow_takes(registry)

    async def follow_takes(self, registry: Registry) -> None:
        """Read trackers again whose map others may have changed."""
        for name, tracked in registry:
            if tracked.entry.backend == NAME:
                with contextlib.suppress(errors.BlksnapError):
                    await registry.refresh(name)

    async def attach_again(self, entry: TrackerEntry, registry: Registry, inventory: Inventory) -> None:
        """Track a device again that is to be tracked always: the kernel knows nothing of that after a boot."""
        try:
            device = inventory.by_key(entry.stable_key)
            if device.name in registry:
                return
            await registry.attach(
                device, owner_uid=entry.owner_uid, backend=NAME, block_size=entry.block_size, persistent=True
            )
        except errors.BlksnapError as error:
            _log.error("%s is to be tracked always, but cannot be now: %s", entry.path, error)
        else:
            if device.name != entry.key:
                await self._catalogue.trackers.drop(entry.key)
            _log.info("%s is tracked again, as it is to be after every boot", device.path)
