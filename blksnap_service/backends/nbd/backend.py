# SPDX-License-Identifier: GPL-2.0-or-later
"""Attaches origins to the data path and detaches them, with their saved maps.

A generation goes on over a clean detach if nobody wrote in between (``savedmaps``); else a new one begins, with the
reason. What runs is the data path's business, whose it is the registry's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from blksnap_service import errors
from blksnap_service.backends.nbd.origin import Origin, fingerprint_of, open_origin
from blksnap_service.backends.nbd.tracker import NbdTracker
from blksnap_service.datapath.client import OriginMaps
from blksnap_service.datapath.process import Datapath
from blksnap_service.devices import Device
from blksnap_service.savedmaps import ClaimedMap, MapHeader, SavedMaps, UnusableMap
from blksnap_service.storage import Identity
from blksnap_service.tracker import Attached, BackendInfo, Tracker

_log = logging.getLogger(__name__)


class NbdBackend:
    """The backend ``nbd``."""

    def __init__(self, datapath: Datapath, maps: SavedMaps) -> None:
        """Use a data path, which may come and go, and the directory of saved maps."""
        self._datapath = datapath
        self._maps = maps

    @property
    def info(self) -> BackendInfo:
        """Available while the data path is connected."""
        reason = self._datapath.trouble
        return BackendInfo("nbd", not reason, reason, snapshots=True, live_map=True, live_attach=False)

    def can_track(self, device: Device) -> bool:
        """Image files that may be written, and block devices nobody uses."""
        if device.read_only or self._datapath.trouble:
            return False
        return device.kind == "file" or (
            not device.mount_points and os.access(device.path, os.R_OK | os.W_OK)
        )

    async def attach(self, device: Device, block_size: int) -> Attached:
        """Open the origin, continue its saved map or begin a generation, and hand both to the data path.

        Raises what ``open_origin`` raises, ``errors.Busy`` (another process has locked the file), ``errors.AlreadyTracked``
        (the same file under another name), ``errors.InvalidArgument`` (block size).
        """
        origin = await asyncio.to_thread(open_origin, device)
        with origin.fd:
            claimed, reason = await self._claim(device, origin, block_size)
            try:
                maps, reason = await self._add(device, origin, block_size, claimed, reason)
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError | errors.TimedOut):
                    await self._withdraw(device)
                await self._give_back(device)
                raise
            finally:
                if claimed is not None:
                    claimed.data.close()
        return self._attached(maps, origin, reason)

    async def resume(self, device: Device, ended: Tracker, block_size: int, last_reset: str) -> Attached:
        """Attach again what was tracked when the data path ended; the generation goes on if its map is known to be whole.

        Raises as ``attach``. The mark of the unclean end stays, so that an older saved map never comes back.
        """
        origin = await asyncio.to_thread(open_origin, device)
        with origin.fd:
            claimed, reason = _remaining(ended, origin, last_reset)
            try:
                maps, reason = await self._add(device, origin, block_size, claimed, reason)
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError | errors.TimedOut):
                    await self._withdraw(device)
                raise
            finally:
                if claimed is not None:
                    claimed.data.close()
        if claimed is None or maps.reading.generation != claimed.header.generation:
            reason = f"the data path ended unexpectedly: {reason}"
        return self._attached(maps, origin, reason)

    def _attached(self, maps: OriginMaps, origin: Origin, reason: str) -> Attached:
        with maps:
            tracker = NbdTracker(lambda: self._datapath.client, maps.reading, origin.identity)
            tracker.hold(maps)
        return Attached(tracker, reason)

    async def _withdraw(self, device: Device) -> None:
        """Undo a request nobody waits for any more: it may have been carried out."""
        with contextlib.suppress(errors.NotFound, errors.NotAvailable):
            (await self._datapath.client.origin_remove(device.origin, force=True)).close()

    async def _give_back(self, device: Device) -> None:
        try:
            await asyncio.to_thread(self._maps.give_back, device.origin)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            _log.error("the saved map of %s is lost to the next attach: %s", device.path, reason)

    async def _claim(self, device: Device, origin: Origin, block_size: int) -> tuple[ClaimedMap | None, str]:
        try:
            claimed = await asyncio.to_thread(self._maps.claim, device.origin, origin.fingerprint, block_size)
        except UnusableMap as error:
            return None, str(error)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise errors.Failed(
                f"the state directory cannot be used to track {device.path}: {reason}"
            ) from error
        return claimed, claimed.header.last_reset

    async def _add(
        self, device: Device, origin: Origin, block_size: int, claimed: ClaimedMap | None, reason: str
    ) -> tuple[OriginMaps, str]:
        client = self._datapath.client
        if claimed is not None:
            header = claimed.header
            try:
                maps = await client.origin_add(
                    device.origin,
                    origin.fd.dup(),
                    saved_map=claimed.data,
                    block_size=header.block_size,
                    generation=header.generation,
                    base=header.base,
                    active=header.active,
                    label=device.path,
                )
            except errors.InvalidArgument as error:
                reason = f"the map to go on from was refused: {error}"
            else:
                return maps, reason
        maps = await client.origin_add(
            device.origin,
            origin.fd.dup(),
            block_size=block_size,
            generation=str(uuid.uuid4()),
            label=device.path,
        )
        return maps, reason

    async def detach(self, tracker: Tracker, last_reset: str, *, force: bool) -> None:
        """Take the origin from the data path and save its final map.

        Raises ``errors.Busy`` (images or clients, unless forced). A map that cannot be saved is a line in the log, and a
        new generation at the next attach: the detach itself has happened.
        """
        client = self._datapath.client
        maps = await client.origin_remove(tracker.origin, force=force)
        with maps:
            if maps.reading.state == "broken":
                _log.warning("the map of %s is not kept: %s", maps.reading.label, maps.reading.reason)
                return
            try:
                await asyncio.to_thread(self._save, maps, tracker.identity, last_reset)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                _log.error("the map of %s could not be saved: %s", maps.reading.label, reason)

    def _save(self, maps: OriginMaps, identity: Identity, last_reset: str) -> None:
        reading = maps.reading
        fingerprint = fingerprint_of(reading.label, identity)
        if fingerprint is None:
            _log.warning("the map of %s is not kept: its file is not there any more", reading.label)
            self._maps.discard(reading.origin)
            return
        header = MapHeader(
            path=reading.label,
            fingerprint=fingerprint,
            block_size=reading.block_size,
            block_count=reading.block_count,
            generation=reading.generation,
            base=reading.base,
            active=reading.active,
            last_reset=last_reset,
            saved_at=time.time_ns() // 1000,
            saves=self._maps.saves(reading.origin) + 1,
        )
        self._maps.save(reading.origin, header, maps.live)

    async def discover(self, known: Mapping[str, Identity]) -> list[tuple[Tracker, str]]:
        """Return the origins the data path serves, each with its label, which is the path it was opened by."""
        origins, _ = await self._datapath.client.list()
        found: list[tuple[Tracker, str]] = []
        for reading in origins:
            identity = known.get(reading.origin)
            if identity is None:
                identity = await asyncio.to_thread(_identity, reading.label)
            found.append((NbdTracker(lambda: self._datapath.client, reading, identity), reading.label))
        return found


def _remaining(ended: Tracker, origin: Origin, last_reset: str) -> tuple[ClaimedMap | None, str]:
    """Return the map a new tracker goes on from, or None and why there is none."""
    if ended.last.state == "broken":
        return None, ended.last.reason
    if not isinstance(ended, NbdTracker) or ended.remains is None:
        return None, "its last map was not in reach of the service"
    try:
        return ended.remains.claim(origin, last_reset), last_reset
    except UnusableMap as error:
        return None, str(error)


def _identity(path: str) -> Identity:
    """Return what is at ``path``, or what no file is."""
    try:
        return Identity.of(Path(path).stat())
    except OSError:
        return Identity(0, 0)
