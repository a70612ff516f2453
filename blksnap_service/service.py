# SPDX-License-Identifier: GPL-2.0-or-later
"""The service without its bus: the parts put together, brought in step with the data path, and kept there.

At start, and whenever the data path went away and is there again, ``reconcile`` compares what runs with what the catalogue
says: what both know goes on, what only runs is adopted as nobody's. A data path that was killed comes back with all it
had; what it has lost is tracked again as a new generation, or is lost and said so. Methods that involve several parts are here; the others are called on the parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from blksnap_service import errors, inventory, kernelfilter, snapshot, trackers
from blksnap_service.backends.blkfilter.backend import FilterBackend
from blksnap_service.backends.datapath.engine import DatapathEngine
from blksnap_service.backends.nbd.backend import NbdBackend
from blksnap_service.backends.planned import PlannedBackend
from blksnap_service.backends.ublk.backend import UblkBackend
from blksnap_service.catalogue import Catalogue, TrackerEntry
from blksnap_service.datapath.model import Event
from blksnap_service.datapath.process import Datapath
from blksnap_service.devices import Device, escape
from blksnap_service.devicewatch import DeviceWatch
from blksnap_service.engines import SnapshotEngine
from blksnap_service.inventory import Inventory
from blksnap_service.kernelfilter import KernelFilter, SnapshotEvent
from blksnap_service.persistent import Record, Records
from blksnap_service.snapshots import Snapshots
from blksnap_service.storage import Identity
from blksnap_service.tracker import Backend, Tracker
from blksnap_service.trackers import Registry
from blksnap_service.udev import BlockDevices
from blksnap_service.work import Work

_log = logging.getLogger(__name__)

REFRESH_S = 2.0
"""How often fill levels of difference storage are read."""
LOOK_AROUND_TICKS = 5
"""Every this many refreshes mounts and sizes of image files are looked at, which nobody announces."""
RETRY_S = (0.2, 1.0, 5.0, 15.0, 30.0)
"""How long to wait before the data path is started again, time after time."""


class Watcher(inventory.Watcher, trackers.Watcher, snapshot.Watcher, Protocol):
    """Is told about everything; must not raise."""

    def backends_changed(self) -> None:
        """A backend became available or ceased to be."""


class Service:
    """Inventory, trackers and snapshots over one data path and one state directory."""

    def __init__(
        self,
        catalogue: Catalogue,
        datapath: Datapath,
        blocks: BlockDevices,
        storage_directory: Path,
        watcher: Watcher,
        records: Records | None = None,
        filter_backend: FilterBackend | None = None,
    ) -> None:
        """Put the parts together; nothing happens before ``start``. ``records`` are the devices to be tracked always."""
        self._catalogue = catalogue
        self._datapath = datapath
        self._watcher = watcher
        self._bus_id = ""
        self._events: asyncio.Queue[Event | SnapshotEvent | str] = asyncio.Queue()
        self._filter = KernelFilter(catalogue, self._events.put_nowait, filter_backend)
        self._backends: Sequence[Backend] = (
            self._filter.backend,
            UblkBackend(datapath, catalogue.maps),
            NbdBackend(datapath, catalogue.maps),
            PlannedBackend("bpf", snapshots=False, live_map=True),
        )
        self.storage_directory = storage_directory
        self.registry = Registry(catalogue, self._backends, watcher, self._made_of)
        self._records = records or Records()
        self._devices = DeviceWatch(self.registry, self._attach_found)
        self.inventory = Inventory(
            catalogue.images, blocks, watcher, lambda: {name for name, _ in self.registry}, self._devices
        )
        engine = DatapathEngine(datapath)
        engines: dict[str, SnapshotEngine] = {"blkfilter": self._filter.engine, "ublk": engine, "nbd": engine}
        self.snapshots = Snapshots(catalogue, self.registry, engines, storage_directory, watcher)

    async def start(self, bus_id: str) -> None:
        """List devices, connect to the data path and adopt what runs. Raises ``errors.NotAvailable`` without a data path."""
        self._bus_id = bus_id
        await self._connect()
        await self.reconcile()
        self._devices.begin()

    async def attach_recorded(self, record: Record) -> None:
        """Instead of ``start``: track one device that is to be tracked always, unless it is (``boot``). Raises as ``attach``."""
        await self._connect()
        await self._adopt_running()
        await self._attach_record(record)

    async def _connect(self) -> None:
        await self._filter.backend.refresh()
        needed = {entry.key for entry in self._catalogue.trackers}
        await self.inventory.load(frozenset(needed))
        await self._datapath.connect(self._events.put_nowait, self._events.put_nowait)

    async def run(self) -> None:
        """Follow events and keep readings fresh, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_events())
            group.create_task(self._keep_fresh())

    def close(self) -> None:
        """Let go of everything; trackers and snapshots go on without this service."""
        self._devices.close()
        self.inventory.close()
        self._datapath.close()
        self._filter.close()

    async def attach(
        self, device: Device, work: Work, *, owner_uid: int, backend: str, block_size: int, persistent: bool
    ) -> None:
        """Attach a tracker, after every boot too if ``persistent``. Raises as ``Registry.attach``."""
        await self._look_for_backends()
        attach = partial(
            self.registry.attach, owner_uid=owner_uid, backend=backend, block_size=block_size, work=work
        )
        record_it = persistent and device.kind == "block"
        choice = self.registry.choice(device, backend)
        if not record_it or choice == kernelfilter.NAME:
            # What the kernel filter tracks is to be mounted as it is: udev is not to hide it, as it does what has a record.
            await attach(device, persistent=persistent)
            return
        known = device.stable_key in await asyncio.to_thread(self._records.all)
        record = await asyncio.to_thread(
            self._records.remember, device, owner_uid=owner_uid, backend=choice, block_size=block_size
        )
        try:
            device = replace(device, node_name=record.name)
            await attach(device, persistent=True)
        except BaseException:
            if not known:
                await asyncio.to_thread(self._records.forget, device.stable_key)
            raise
        if self.registry.get(device.name).entry.insert:
            # Under a device that is mounted at boot it is put again by the service itself.
            await asyncio.to_thread(self._records.forget, device.stable_key)

    async def _look_for_backends(self) -> None:
        """Notice that a kernel module was loaded or removed, and what others do with the kernel filter."""
        changed = await self._filter.backend.refresh()
        with contextlib.suppress(errors.BlksnapError):
            changed = await self._datapath.greet() or changed
        if changed:
            self._watcher.backends_changed()
        with contextlib.suppress(errors.BlksnapError):
            await self._filter.look_around(self.registry, self._adopt_running)

    async def _attach_found(self, device: Device) -> None:
        for record in (await asyncio.to_thread(self._records.all)).values():
            if record.key == device.stable_key:
                await self._attach_record(record)

    async def _attach_record(self, record: Record) -> None:
        device = self.inventory.by_key(record.key)
        if device.name not in self.registry:
            await self.registry.attach(
                device,
                owner_uid=record.owner_uid,
                backend=record.backend or UblkBackend.front,  # of all that can, what has a node to be mounted
                block_size=record.block_size,
                persistent=True,
            )
            _log.info("%s is tracked again, as it is to be after every boot", device.path)

    async def detach(self, device: Device, *, force: bool, work: Work | None = None) -> None:
        """Detach a tracker. Raises ``errors.Busy`` (snapshots, clients) unless forced, and ``errors.NotTracked``."""
        covering = self.snapshots.of_device(device.name)
        if covering and not force:
            which = ", ".join(one.id for one in covering)
            raise errors.Busy(
                f"{device.path} is part of snapshot {which}: destroy that first, or give the option force"
            )
        await self.registry.detach(device, force=force, work=work)
        await asyncio.to_thread(self._records.forget, device.stable_key)
        # One that is gone was only listed for its tracker.
        self.inventory.refresh_soon()
        for one in covering:
            await self.snapshots.refresh(one)

    def _made_of(self, identity: Identity) -> str:
        """Return what a device is that is an image; empty for all others."""
        for one in self.snapshots:
            for image in one.status.images:
                with contextlib.suppress(OSError):
                    if image.path and Identity.of(Path(image.path).stat()) == identity:
                        return f"an image of snapshot {one.id}"
        return ""

    async def collect(self) -> None:
        """Adopt snapshots this service does not know yet."""
        await self._adopt_running()
        await self.snapshots.adopt(self._bus_id)

    async def reconcile(self) -> None:
        """Bring trackers and snapshots in step with what the backends run."""
        late = await self._adopt_running()
        for _, tracked in self.registry:
            if tracked.tracker.last.state == "recovering" and tracked.tracker.origin not in late:
                await self._replace_lost(tracked.entry, "the data path ended and lost its map")
        for entry in self._catalogue.trackers:
            if entry.key not in self.registry:
                await self._follow_up(entry)
        await self.snapshots.adopt(self._bus_id)
        for record in (await asyncio.to_thread(self._records.all)).values():
            try:
                await self._attach_record(record)
            except errors.BlksnapError as error:
                _log.error("%s is to be tracked always, but cannot be now: %s", record.name, error)

    async def _adopt_running(self) -> set[str]:
        """Take over what runs and is not known here; returns the origins whose disks hang, which are told when they come."""
        late = set[str]()
        known = {
            entry.origin: Identity.parse(entry.identity)
            for entry in self._catalogue.trackers
            if entry.identity
        }
        for backend in self._backends:
            for tracker, path in await backend.discover(known):
                name = self.registry.by_origin(tracker.origin)
                if tracker.origin in self.registry.unwanted:
                    await backend.detach(tracker, "", force=True)
                    self.registry.unwanted.discard(tracker.origin)
                elif name is None:
                    await self._adopt(backend.info.name, tracker, path)
                elif self.registry.get(name).tracker.last.state == "recovering":
                    try:
                        await self.registry.refresh(name)
                    except errors.TimedOut as error:
                        _log.error("%s", error)
                        late.add(tracker.origin)
        return late

    async def _adopt(self, backend: str, tracker: Tracker, path: str) -> None:
        entry = next((one for one in self._catalogue.trackers if one.origin == tracker.origin), None)
        device = await self._device_of(tracker, path, entry.key if entry else "")
        if entry is None or entry.key != device.name:
            _log.warning("%s is tracked, but nobody wrote down by whom: it is uid 0's now", path)
            entry = TrackerEntry(
                key=device.name,
                path=path,
                backend=backend,
                origin=tracker.origin,
                owner_uid=0,
                attached_at=time.time_ns() // 1000,
                persistent=False,
                last_reset="found running",
                block_size=0,
                identity=str(tracker.identity),
            )
        await self.registry.adopt(device, tracker, entry)

    async def _device_of(self, tracker: Tracker, path: str, name: str) -> Device:
        """Return the device a running tracker is of, listing it if need be."""
        with contextlib.suppress(errors.NotFound):
            return self.inventory.get(name) if name else await self.inventory.resolve(path)
        if not tracker.identity.is_device:
            with contextlib.suppress(errors.BlksnapError):
                return await self.inventory.add_image(path)
        _log.warning("%s is tracked, but it is not there any more", path)
        device = Device(
            name=name or escape(Path(path).name),
            kind="block" if tracker.identity.is_device else "file",
            path=path,
            identity=tracker.identity,
            size=tracker.last.capacity,
        )
        self.inventory.keep(device)
        return device

    async def _replace_lost(self, entry: TrackerEntry, reason: str) -> None:
        """Track again what the data path does not have any more.

        Raises ``errors.NotAvailable`` when the data path has ended again.
        """
        try:
            await self.registry.replace(self.inventory.get(entry.key), entry, reason)
        except errors.BlksnapError as error:
            if self._datapath.trouble:
                raise errors.NotAvailable(self._datapath.trouble) from error
            self.registry.forget(entry.key)
            if entry.persistent:
                _log.error("%s is to be tracked, but cannot be now: %s", entry.path, error)
                return
            _log.error("%s is not tracked any more: %s", entry.path, error)
            await self._catalogue.trackers.drop(entry.key)

    async def _follow_up(self, entry: TrackerEntry) -> None:
        """Deal with a tracker that ended while no service ran: it is wanted always, or it is lost."""
        if entry.persistent and entry.backend == kernelfilter.NAME:
            await self._filter.attach_again(entry, self.registry, self.inventory)
        elif not entry.persistent:
            _log.warning("%s is not tracked any more: what tracked it has ended", entry.path)
            await self._catalogue.trackers.drop(entry.key)
        elif not entry.insert and Identity.parse(entry.identity or "0:1").is_device:
            # Another disk may have its name now: the record says which one it is.
            await self._catalogue.trackers.drop(entry.key)
        else:
            await self._replace_lost(entry, "the data path ended while no service ran")

    # What happens by itself.

    async def _follow_events(self) -> None:
        while True:
            event = await self._events.get()
            try:
                if isinstance(event, str):
                    await self._datapath_lost(event)
                elif isinstance(event, SnapshotEvent):
                    await self._filter.pass_on(event, self.snapshots)
                else:
                    await self._on_event(event)
            except errors.BlksnapError as error:
                _log.error("%s", error)

    async def _on_event(self, event: Event) -> None:
        fields = event.fields
        if event.name == "origin.broken":
            name = self.registry.by_origin(fields.text("origin"))
            _log.error(
                "%s cannot be trusted any more: %s", name or fields.text("origin"), fields.text("reason")
            )
            if name is not None:
                await self.registry.refresh(name)
            return
        if event.name == "origin.recovered":
            _log.warning("%s goes on after a death of the data path", fields.text("origin"))
            # One whose disk hung comes later than the others.
            await self._adopt_running()
            return
        if not event.name.startswith("snapshot."):
            _log.debug("the data path told %s, which this service does not know", event.name)
            return
        snapshot_id = fields.text("snapshot")
        with contextlib.suppress(errors.NotFound):
            # State first: who hears the signal and asks must find what it says.
            await self.snapshots.refresh(self.snapshots.get(snapshot_id))
        match event.name:
            case "snapshot.low-space":
                self.snapshots.low_space(snapshot_id, fields.number("used"), fields.number("limit"))
            case "snapshot.no-space":
                self.snapshots.no_space(snapshot_id, fields.number("requested"))
            case "snapshot.failed":
                self.snapshots.corrupted(
                    snapshot_id, fields.text("origin"), fields.number("errno"), fields.text("message")
                )
            case _:
                _log.debug("the data path told %s, which this service does not know", event.name)

    async def _datapath_lost(self, reason: str) -> None:
        _log.error("the data path is gone: %s", reason)
        self.registry.note_away(f"the data path is gone, and hoped to come back: {reason}")
        self._watcher.backends_changed()
        for attempt in range(1 << 30):
            await asyncio.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
            try:
                await self._datapath.connect(self._events.put_nowait, self._events.put_nowait)
                break
            except errors.NotAvailable as error:
                _log.error("%s", error)
        self._watcher.backends_changed()
        await self.reconcile()

    async def _keep_fresh(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(REFRESH_S)
            ticks += 1
            for one in self.snapshots:
                with contextlib.suppress(errors.BlksnapError):
                    await self.snapshots.refresh(one)
            await self._filter.follow_takes(self.registry)
            if ticks % LOOK_AROUND_TICKS == 0:
                await self._look_for_backends()
                await self.inventory.refresh()
