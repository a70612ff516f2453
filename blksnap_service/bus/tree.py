# SPDX-License-Identifier: GPL-2.0-or-later
"""The objects on the bus, kept as the service is: they come, change and go with devices, trackers and snapshots.

Also ends snapshots whose holder leaves the bus. It decides nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from blksnap_service import errors
from blksnap_service.authority import Authority
from blksnap_service.bus import paths
from blksnap_service.bus.access import Context
from blksnap_service.bus.device import Device
from blksnap_service.bus.image import Image
from blksnap_service.bus.job import Jobs
from blksnap_service.bus.manager import Manager
from blksnap_service.bus.snapshot import Snapshot, images_of
from blksnap_service.bus.tracker import Tracker
from blksnap_service.bus.wire import Connection, Implementation, Publisher
from blksnap_service.devices import Device as DeviceRecord
from blksnap_service.service import Service
from blksnap_service.snapshot import Snapshot as SnapshotRecord

_log = logging.getLogger(__name__)


class Names(Protocol):
    """Tells when bus names leave: the connection."""

    def watch_name(self, unique: str, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call ``callback`` once when nobody has the name (any more). Returns how to stop that."""


class Tree:
    """Everything under the root path; a ``service.Watcher``."""

    def __init__(self, publisher: Publisher, names: Names) -> None:
        """Publish there; ``serve`` says what."""
        self._publisher = publisher
        self._names = names
        self._context: Context | None = None
        self._shown: dict[tuple[str, str], tuple[Implementation, dict[str, Any]]] = {}
        self._images: dict[str, set[str]] = {}
        self._watches: dict[str, Callable[[], None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, service: Service, authority: Authority, bus_id: str) -> None:
        """Show the manager; the rest follows as the service finds it."""
        self._context = Context(service, authority, bus_id, Jobs(self._publisher))
        self._show(paths.MANAGER_PATH, paths.MANAGER, Manager(self._context))

    def close(self) -> None:
        """Stop watching names and ending snapshots."""
        for cancel in self._watches.values():
            cancel()
        for task in self._tasks:
            task.cancel()

    @property
    def _serving(self) -> Context:
        if self._context is None:
            raise RuntimeError("nothing is served yet")
        return self._context

    # Objects and what is different about them.

    def _show(self, path: str, interface: str, implementation: Implementation) -> None:
        self._publisher.export(path, {interface: implementation})
        self._shown[path, interface] = (implementation, dict(implementation.properties()))

    def _hide(self, path: str, interface: str) -> None:
        if self._shown.pop((path, interface), None) is not None:
            self._publisher.remove_interface(path, interface)

    def _tell(self, path: str, interface: str) -> None:
        """Send what is different from what was last sent."""
        if (shown := self._shown.get((path, interface))) is None:
            return
        implementation, before = shown
        now = dict(implementation.properties())
        different = {name: value for name, value in now.items() if value != before[name]}
        if different:
            self._shown[path, interface] = (implementation, now)
            self._publisher.changed(path, interface, different)

    def _tell_device(self, name: str) -> None:
        self._tell(paths.device_path(name), paths.DEVICE)

    # inventory.Watcher

    def device_added(self, device: DeviceRecord) -> None:
        """Show a device."""
        self._show(paths.device_path(device.name), paths.DEVICE, Device(self._serving, device))

    def device_changed(self, device: DeviceRecord) -> None:
        """Tell what is different."""
        shown = self._shown.get((paths.device_path(device.name), paths.DEVICE))
        if shown is not None and isinstance(shown[0], Device):
            shown[0].device = device
        self._tell_device(device.name)

    def device_removed(self, device: DeviceRecord) -> None:
        """Hide a device, and its tracker if it has one."""
        path = paths.device_path(device.name)
        self._hide(path, paths.TRACKER)
        self._hide(path, paths.DEVICE)

    # trackers.Watcher

    def tracker_added(self, name: str) -> None:
        """Show a tracker on its device."""
        self._show(paths.device_path(name), paths.TRACKER, Tracker(self._serving, name))
        self._tell_device(name)

    def tracker_changed(self, name: str) -> None:
        """Tell what is different."""
        self._tell(paths.device_path(name), paths.TRACKER)

    def tracker_removed(self, name: str) -> None:
        """Hide a tracker."""
        self._hide(paths.device_path(name), paths.TRACKER)
        self._tell_device(name)

    def generation_started(self, name: str, generation: str, reason: str) -> None:
        """Send the signal, after the properties."""
        self._tell(paths.device_path(name), paths.TRACKER)
        self._publisher.signal(
            paths.device_path(name), paths.TRACKER, "GenerationStarted", generation, reason
        )

    def backends_changed(self) -> None:
        """Tell what can track now."""
        self._tell(paths.MANAGER_PATH, paths.MANAGER)
        for path, interface in list(self._shown):
            if interface == paths.DEVICE:
                self._tell(path, interface)

    # snapshot.Watcher

    def snapshot_added(self, snapshot: SnapshotRecord) -> None:
        """Show a snapshot and its images."""
        self._show_images(snapshot)
        self._show(paths.snapshot_path(snapshot.id), paths.SNAPSHOT, Snapshot(self._serving, snapshot))
        for name in snapshot.entry.devices:
            self._tell_device(name)
        self._watch_holder(snapshot)

    def snapshot_changed(self, snapshot: SnapshotRecord) -> None:
        """Tell what is different, about its images too."""
        self._show_images(snapshot)
        self._tell(paths.snapshot_path(snapshot.id), paths.SNAPSHOT)
        for name in snapshot.entry.devices:
            self._tell_device(name)
        self._watch_holder(snapshot)

    def snapshot_removed(self, snapshot: SnapshotRecord) -> None:
        """Hide a snapshot and its images."""
        for path in self._images.pop(snapshot.id, set()):
            self._hide(path, paths.IMAGE)
        self._hide(paths.snapshot_path(snapshot.id), paths.SNAPSHOT)
        for name in snapshot.entry.devices:
            self._tell_device(name)
        if (cancel := self._watches.pop(snapshot.id, None)) is not None:
            cancel()

    def low_space(self, snapshot: SnapshotRecord, used: int, limit: int) -> None:
        """Send the signal."""
        self._publisher.signal(paths.snapshot_path(snapshot.id), paths.SNAPSHOT, "LowSpace", used, limit)

    def no_space(self, snapshot: SnapshotRecord, requested: int) -> None:
        """Send the signal."""
        self._publisher.signal(paths.snapshot_path(snapshot.id), paths.SNAPSHOT, "NoSpace", requested)

    def corrupted(self, snapshot: SnapshotRecord, device: str, errno: int, message: str) -> None:
        """Send the signal."""
        path, about = paths.snapshot_path(snapshot.id), paths.device_path(device)
        self._publisher.signal(path, paths.SNAPSHOT, "Corrupted", about, errno, message)

    def _show_images(self, snapshot: SnapshotRecord) -> None:
        shown = self._images.setdefault(snapshot.id, set())
        for path, (name, image) in images_of(self._serving, snapshot).items():
            if path not in shown:
                shown.add(path)
                self._show(path, paths.IMAGE, Image(self._serving, snapshot, name, image))
                continue
            known = self._shown[path, paths.IMAGE][0]
            if isinstance(known, Image):
                known.image = image
            self._tell(path, paths.IMAGE)

    # Holders.

    def _watch_holder(self, snapshot: SnapshotRecord) -> None:
        holder = snapshot.entry.holder
        if holder and snapshot.id not in self._watches:
            self._watches[snapshot.id] = self._names.watch_name(holder, lambda _: self._holder_left(snapshot))
        elif not holder and (cancel := self._watches.pop(snapshot.id, None)) is not None:
            cancel()

    def _holder_left(self, snapshot: SnapshotRecord) -> None:
        async def end() -> None:
            try:
                await self._serving.service.snapshots.destroy(snapshot)
            except errors.BlksnapError as error:
                _log.error("snapshot %s could not be ended after its holder left: %s", snapshot.id, error)

        task = asyncio.get_running_loop().create_task(end())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def bus_id(connection: Connection) -> str:
    """Return what tells this run of the bus from any other (the daemon's GetId)."""
    (answer,) = await connection.call(
        "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "GetId"
    )
    return str(answer)
