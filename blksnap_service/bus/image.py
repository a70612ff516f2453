# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface Image: one device as it was at the instant of a snapshot."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from blksnap_service import errors
from blksnap_service.bus import options as bus_options, paths
from blksnap_service.bus.access import Context
from blksnap_service.bus.wire import Call, OwnedFd, Value
from blksnap_service.devices import Device
from blksnap_service.engines import ImageStatus
from blksnap_service.snapshot import Snapshot


class Image:
    """One image object."""

    def __init__(self, context: Context, snapshot: Snapshot, name: str, image: ImageStatus) -> None:
        """Speak for the image of the device ``name``; ``image`` may be replaced by a later reading of the same."""
        self._context = context
        self._snapshot = snapshot
        self._name = name
        self.image = image

    def properties(self) -> dict[str, Any]:
        """Return all properties."""
        image = self.image
        return {
            "Path": image.path,
            "NbdUri": image.uri,
            "Device": paths.device_path(self._name),
            "Snapshot": paths.snapshot_path(self._snapshot.id),
            "Size": image.size,
            "ReadOnly": image.read_only,
            "GenerationId": image.generation,
            "ChangesNumber": image.number,
            "Error": image.error,
        }

    async def Open(self, call: Call, options: Mapping[str, Value]) -> OwnedFd:  # noqa: N802
        """Open the image's block device read-only."""
        await self._allow(call, options)
        path = self.image.path
        if not path:
            raise errors.NotSupported(
                f"the image of {self._name} is not a block device: use Export and an NBD client, e.g. nbdcopy or nbdfuse"
            )
        try:
            return OwnedFd(await asyncio.to_thread(os.open, path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise errors.Failed(f"the image {path} of {self._name} cannot be opened: {reason}") from error

    async def Export(self, call: Call, options: Mapping[str, Value]) -> str:  # noqa: N802
        """Return where the image is served."""
        await self._allow(call, options)
        if self.image.error:
            raise errors.Corrupted(
                f"the image of {self._name} failed: {self.image.error}; take a new snapshot"
            )
        if not self.image.uri:
            raise errors.NotSupported(f"the image of {self._name} is not served over NBD: use Open")
        return self.image.uri

    async def _allow(self, call: Call, options: Mapping[str, Value]) -> None:
        bus_options.take(options, {})
        found: list[Device | str] = [one for one in self._context.service.inventory if one.name == self._name]
        entry = self._snapshot.entry
        await self._context.allow(call, found or [self._name], owner_uid=entry.owner_uid, snapshot=entry.key)
