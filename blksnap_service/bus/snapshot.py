# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface Snapshot: one instant over one or more devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from blksnap_service import errors
from blksnap_service.bus import options as bus_options, paths
from blksnap_service.bus.access import Context
from blksnap_service.bus.wire import Call, Value
from blksnap_service.devices import Device
from blksnap_service.engines import ImageStatus
from blksnap_service.snapshot import Snapshot as SnapshotRecord
from blksnap_service.work import Work


def images_of(context: Context, snapshot: SnapshotRecord) -> dict[str, tuple[str, ImageStatus]]:
    """Return the images of a snapshot by object path, each with the name of its device."""
    found = {}
    for index, image in enumerate(snapshot.status.images):
        # Devices are in the order they were taken; the registry does not know one that was detached by force.
        names = snapshot.entry.devices
        name = context.service.registry.by_origin(image.origin) or (
            names[index] if index < len(names) else ""
        )
        if name:
            found[paths.image_path(snapshot.id, name)] = (name, image)
    return found


class Snapshot:
    """One snapshot object."""

    def __init__(self, context: Context, snapshot: SnapshotRecord) -> None:
        """Speak for ``snapshot``."""
        self._context = context
        self._snapshots = context.service.snapshots
        self._snapshot = snapshot

    def properties(self) -> dict[str, Any]:
        """Return all properties."""
        entry, status = self._snapshot.entry, self._snapshot.status
        return {
            "Id": entry.key,
            "State": self._snapshot.state,
            "Devices": [paths.device_path(name) for name in entry.devices],
            "Images": list(images_of(self._context, self._snapshot)),
            "CreatedAt": entry.created_at,
            "TakenAt": status.taken_at,
            "StoragePath": entry.storage_path,
            "StorageUsed": status.used,
            "StorageAllocated": status.allocated,
            "StorageLimit": status.limit,
            "OwnerUID": entry.owner_uid,
            "Held": bool(entry.holder),
            "Description": entry.description,
            "Error": status.error,
        }

    async def AddDevice(self, call: Call, device: str, options: Mapping[str, Value]) -> None:  # noqa: N802
        """Add a device before the take."""
        bus_options.take(options, {})
        target = self._context.service.inventory.get(paths.device_name(device))
        await self._require_owner(call)
        await self._allow(call, [target])
        (target,) = self._context.same([target])
        await self._snapshots.add_device(self._snapshot, target)

    async def Take(self, call: Call, options: Mapping[str, Value]) -> None:  # noqa: N802
        """Take it."""
        bus_options.take(options, {})
        await self._require_owner(call)
        await self._allow(call, self._devices())
        async with self._run("snapshot-take", await call.uid()) as work:
            await self._snapshots.take(self._snapshot, work)

    async def Destroy(self, call: Call, options: Mapping[str, Value]) -> None:  # noqa: N802
        """End it."""
        bus_options.take(options, {})
        await self._allow(call, self._devices())
        async with self._run("snapshot-destroy", await call.uid()) as work:
            await self._snapshots.destroy(self._snapshot, work)

    async def Release(self, call: Call, options: Mapping[str, Value]) -> None:  # noqa: N802
        """Drop the hold."""
        bus_options.take(options, {})
        await self._allow(call, self._devices())
        await self._snapshots.release(self._snapshot)

    def _run(self, name: str, uid: int) -> AbstractAsyncContextManager[Work]:
        return self._context.run(name, uid, self._devices(), [paths.snapshot_path(self._snapshot.id)])

    async def _allow(self, call: Call, devices: Sequence[Device | str]) -> None:
        entry = self._snapshot.entry
        await self._context.allow(call, devices, owner_uid=entry.owner_uid, snapshot=entry.key)

    async def _require_owner(self, call: Call) -> None:
        """Raises ``errors.NotAuthorized``: what a snapshot is to cover, and when, is its owner's to say."""
        uid, owner_uid = await call.uid(), self._snapshot.entry.owner_uid
        if uid != owner_uid and not self._context.trusted(uid):
            raise errors.NotAuthorized(
                f"uid {uid} may not do this: the snapshot belongs to uid {owner_uid}, and only that user and root may change it"
            )

    def _devices(self) -> list[Device | str]:
        known = {device.name: device for device in self._context.service.inventory}
        return [known.get(name, name) for name in self._snapshot.entry.devices]
