# SPDX-License-Identifier: GPL-2.0-or-later
"""The data path's snapshots as an ``engines.SnapshotEngine``, of origins of any front end together.

Images are NBD exports on the socket of their origin; those of ublk origins are block devices too.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from blksnap_service.backends.datapath.freeze import open_mounts
from blksnap_service.backends.datapath.tracker import nbd_uri
from blksnap_service.datapath.client import TakeDevice
from blksnap_service.datapath.model import SnapshotReading
from blksnap_service.datapath.process import Datapath
from blksnap_service.engines import ImageStatus, SnapshotStatus
from blksnap_service.fds import OwnedFd

TAKE_TIMEOUT_MS = 10_000
"""How long writes are held back, at most, while those in flight end (DESIGN section 4, rule 6)."""


class DatapathEngine:
    """Snapshots of origins of the data path."""

    name = "the data path"

    def __init__(self, datapath: Datapath) -> None:
        """Use a data path, which may come and go."""
        self._datapath = datapath

    async def create(
        self, snapshot: str, storage: OwnedFd, *, limit: int, low_space: int, chunk_size: int
    ) -> SnapshotStatus:
        """Begin a snapshot; a file is grown by its first step here. Raises ``errors.NoSpace`` when it cannot."""
        reading = await self._datapath.client.snapshot_create(
            snapshot, storage, limit=limit, low_space=low_space, chunk_size=chunk_size
        )
        return self._status(reading)

    async def take(self, snapshot: str, origins: Sequence[str]) -> Mapping[str, str]:
        """Take all at one instant. Raises ``errors.TimedOut`` when writes in flight do not end.

        File systems are frozen around it: those right on a device-mapper device of the data path's by that, the others
        by a descriptor.
        """
        client = self._datapath.client
        devices = [TakeDevice(origin, str(uuid.uuid4())) for origin in origins]
        readings = [await client.origin_info(origin) for origin in origins]
        mounts = await open_mounts(readings) if client.hello.freezes else []
        taken = await client.snapshot_take(snapshot, devices, TAKE_TIMEOUT_MS, mounts)
        return {image.origin: image.reset for image in taken.images if image.reset}

    async def status(self, snapshot: str) -> SnapshotStatus:
        """Make a reading."""
        return self._status(await self._datapath.client.snapshot_info(snapshot))

    async def destroy(self, snapshot: str) -> None:
        """End it; clients of its images are disconnected."""
        await self._datapath.client.snapshot_destroy(snapshot)

    def may_hold(self, snapshot: str) -> bool:
        """Return that it has none but those it lists."""
        del snapshot
        return False

    async def discover(self) -> list[SnapshotStatus]:
        """Return all of the data path's snapshots."""
        _, snapshots = await self._datapath.client.list()
        return [self._status(reading) for reading in snapshots]

    def _status(self, reading: SnapshotReading) -> SnapshotStatus:
        return SnapshotStatus(
            snapshot=reading.snapshot,
            state=reading.state,
            error=reading.error,
            limit=reading.limit,
            used=reading.used,
            allocated=reading.allocated,
            taken_at=reading.taken_at,
            images=tuple(
                ImageStatus(
                    origin=image.origin,
                    size=image.size,
                    generation=image.generation,
                    number=image.number,
                    read_only=not image.writable,
                    error=image.error,
                    path=image.path,
                    uri=nbd_uri(str(self._datapath.origin_socket(image.origin)), reading.snapshot),
                )
                for image in reading.images
            ),
        )
