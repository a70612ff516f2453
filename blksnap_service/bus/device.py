# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface Device: one usable block device or added image file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blksnap_service import errors
from blksnap_service.authority import Action
from blksnap_service.bus import options as bus_options, paths
from blksnap_service.bus.access import Context
from blksnap_service.bus.wire import Call, Value
from blksnap_service.devices import Device as DeviceRecord


class Device:
    """One device object."""

    def __init__(self, context: Context, device: DeviceRecord) -> None:
        """Speak for ``device``, which may be replaced by a later reading of the same."""
        self._context = context
        self._service = context.service
        self.device = device

    def properties(self) -> dict[str, Any]:
        """Return all properties."""
        device = self.device
        return {
            "Path": device.path,
            "Symlinks": list(device.symlinks),
            "DeviceNumber": device.number,
            "Size": device.size,
            "LogicalBlockSize": device.logical_block_size,
            "ReadOnly": device.read_only,
            "Model": device.model,
            "Serial": device.serial,
            "IdType": device.id_type,
            "IdLabel": device.id_label,
            "IdUUID": device.id_uuid,
            "MountPoints": list(device.mount_points),
            "Tracked": device.name in self._service.registry,
            "Snapshots": [
                paths.snapshot_path(one.id) for one in self._service.snapshots.of_device(device.name)
            ],
            "Backends": self._service.registry.usable(device),
        }

    async def Attach(self, call: Call, options: Mapping[str, Value]) -> None:  # noqa: N802
        """Attach a tracker."""
        chosen = bus_options.take(options, {"backend": "s", "block-size": "u", "persistent": "b"})
        block_size = chosen.get("block-size", 0)
        if "block-size" in chosen and block_size == 0:
            raise errors.InvalidArgument(
                "block size 0 is no block size; leave the option out for the usual one"
            )
        backend, persistent = chosen.get("backend", ""), chosen.get("persistent", False)
        before = self.device
        uid = await self._context.allow(call, [before], backend=backend, persistent=persistent)
        (device,) = self._context.same([before])
        async with self._context.run("tracker-attach", uid, [device], [call.path]) as work:
            await self._service.attach(
                device,
                work,
                owner_uid=uid,
                backend=backend,
                block_size=block_size,
                persistent=persistent,
            )

    async def Detach(self, call: Call, options: Mapping[str, Value]) -> None:  # noqa: N802
        """Detach the tracker."""
        chosen = bus_options.take(options, {"force": "b"})
        force = chosen.get("force", False)
        # By force it ends snapshots too.
        ended = self._snapshots_of_others(await call.uid()) if force else set()
        also = [Action.SNAPSHOT_DESTROY_OTHER_USER] if ended else []
        before = self.device
        uid = await self._context.allow(call, [before], also=also, force=force)
        (device,) = self._context.same([before])
        if force and not self._snapshots_of_others(uid) <= ended:
            raise errors.Busy(f"another user has taken a snapshot of {device.path} meanwhile: try again")
        async with self._context.run("tracker-detach", uid, [device], [call.path]) as work:
            await self._service.detach(device, force=force, work=work)

    def _snapshots_of_others(self, uid: int) -> set[str]:
        covering = self._service.snapshots.of_device(self.device.name)
        return {one.id for one in covering if one.entry.owner_uid != uid}
