# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface Manager: finds devices and starts snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from blksnap_service import __version__, errors, storage
from blksnap_service.authority import Action
from blksnap_service.bus import options as bus_options, paths
from blksnap_service.bus.access import Context
from blksnap_service.bus.wire import Call, Value, variant
from blksnap_service.fds import OwnedFd
from blksnap_service.snapshot import Request


class Manager:
    """The one object of the interface."""

    def __init__(self, context: Context) -> None:
        """Speak for the service."""
        self._context = context
        self._service = context.service

    def properties(self) -> dict[str, Any]:
        """Return all properties."""
        return {
            "Version": __version__,
            "Backends": {
                info.name: {
                    "available": variant("b", info.available),
                    "reason": variant("s", info.reason),
                    "snapshots": variant("b", info.snapshots),
                    "live-map": variant("b", info.live_map),
                    "live-attach": variant("b", info.live_attach),
                }
                for info in self._service.registry.infos()
            },
            "DefaultStorageDirectory": str(self._service.storage_directory),
        }

    async def ResolveDevice(self, call: Call, path: str, options: Mapping[str, Value]) -> str:  # noqa: N802
        """Find a device object."""
        bus_options.take(options, {})
        await self._context.allow(call)
        return paths.device_path((await self._service.inventory.resolve(path)).name)

    async def AddImageFile(self, call: Call, path: str, options: Mapping[str, Value]) -> str:  # noqa: N802
        """Make a regular file a device object."""
        chosen = bus_options.take(options, {"path-fd": "h"})
        uid = await call.uid()
        if "path-fd" not in chosen and not self._context.trusted(uid):
            raise errors.OptionNotPermitted(
                f"uid {uid} may not have the service open {path}: open it and give the option path-fd"
            )
        # Not the caller's word for it: a person may be asked about this file.
        shown = await asyncio.to_thread(storage.name_of, chosen["path-fd"]) if "path-fd" in chosen else path
        await self._context.allow(call, [shown])
        fd = _owned(chosen.get("path-fd"))
        return paths.device_path((await self._service.inventory.add_image(path, fd)).name)

    async def CreateSnapshot(  # noqa: N802
        self, call: Call, devices: list[str], options: Mapping[str, Value]
    ) -> str:
        """Create a snapshot and take it."""
        chosen = bus_options.take(
            options,
            {
                "limit": "t",
                "storage": "s",
                "storage-fd": "h",
                "low-space": "t",
                "chunk-size": "u",
                "take": "b",
                "attach": "b",
                "description": "s",
                "hold": "b",
            },
        )
        inventory = self._service.inventory
        targets = [inventory.get(paths.device_name(path)) for path in devices]
        path = self._storage_path(chosen, await call.uid())
        attach = chosen.get("attach", False)
        uid = await self._context.allow(
            call,
            targets,
            also=[Action.TRACKER_ATTACH] if attach else [],
            storage=path,
            limit=chosen.get("limit", 0),
            attach=attach,
        )
        targets = self._context.same(targets)
        async with self._context.run("snapshot-take", uid, targets, devices) as work:
            request = Request(
                owner_uid=uid,
                holder=call.sender if chosen.get("hold") else "",
                bus_id=self._context.bus_id,
                description=chosen.get("description", ""),
                storage_path=path,
                storage_fd=_owned(chosen.get("storage-fd")),
                limit=chosen.get("limit", 0),
                low_space=chosen.get("low-space", 0),
                chunk_size=chosen.get("chunk-size", 0),
                take=chosen.get("take", True),
                attach=attach,
                work=work,
            )
            snapshot = await self._service.snapshots.create(targets, request)
        return paths.snapshot_path(snapshot.id)

    def _storage_path(self, chosen: Mapping[str, Any], uid: int) -> str:
        """Return where difference storage is to be. Raises ``errors.InvalidArgument``, ``errors.OptionNotPermitted``."""
        path = str(chosen.get("storage", ""))
        if path and "storage-fd" in chosen:
            raise errors.InvalidArgument("give either storage or storage-fd, not both")
        if not path or self._context.trusted(uid):
            return path
        directory = self._service.storage_directory
        inside = storage.inside(path, directory)
        if not inside:
            raise errors.OptionNotPermitted(
                f"uid {uid} may choose difference storage in {directory} only: open it and give the option storage-fd"
            )
        return inside

    async def Collect(self, call: Call, options: Mapping[str, Value]) -> list[str]:  # noqa: N802
        """Adopt what is not known yet and return all snapshots."""
        bus_options.take(options, {})
        await self._context.allow(call)
        await self._service.collect()
        return [paths.snapshot_path(snapshot.id) for snapshot in self._service.snapshots]


def _owned(fd: Any) -> OwnedFd | None:
    """Take a descriptor over from the call that brought it, which would close it in the end."""
    return None if fd is None else OwnedFd(fd.release())
