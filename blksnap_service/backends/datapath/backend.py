# SPDX-License-Identifier: GPL-2.0-or-later
"""Attaches origins to the data path and detaches them, with their saved maps.

A generation goes on over a clean detach if nobody wrote in between (``savedmaps``); else a new one begins, with the
reason. What runs is the data path's business, whose it is the registry's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from blksnap_service import errors
from blksnap_service.backends.datapath.origin import Origin, fingerprint_of
from blksnap_service.backends.datapath.tracker import DatapathTracker
from blksnap_service.datapath.client import OriginMaps
from blksnap_service.datapath.model import Front
from blksnap_service.datapath.process import Datapath
from blksnap_service.devices import Device
from blksnap_service.fds import OwnedFd
from blksnap_service.savedmaps import ClaimedMap, Fingerprint, MapHeader, SavedMaps, UnusableMap
from blksnap_service.storage import Identity
from blksnap_service.tracker import NOWHERE, Attached, BackendInfo, Placement, Tracker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an origin goes. The descriptor, if there is one, is closed by ``close``."""

    identity: Identity
    origin: Origin | None
    """None when the data path opens it, under a live device: then others write to it until that moment."""
    placement: Placement

    def close(self) -> None:
        """Close the origin; the data path has its own descriptor."""
        if self.origin is not None:
            self.origin.fd.close()

    def fd(self) -> OwnedFd | None:
        """Return a descriptor to hand over."""
        return None if self.origin is None else self.origin.fd.dup()


class DatapathBackend(ABC):
    """Origins of the data path that are used through one of its front ends."""

    front: ClassVar[Front]

    def __init__(self, datapath: Datapath, maps: SavedMaps) -> None:
        """Use a data path, which may come and go, and the directory of saved maps."""
        self._datapath = datapath
        self._maps = maps

    @property
    @abstractmethod
    def info(self) -> BackendInfo:
        """What it can do now."""

    @abstractmethod
    def rank(self, device: Device) -> int:
        """Return how good it is for a device, less being better."""

    @abstractmethod
    def refusal(self, device: Device) -> errors.BlksnapError | None:
        """Return why it cannot track this device now, as far as one can tell without trying; None if it can."""

    @abstractmethod
    def place(self, device: Device, before: Placement) -> Place:
        """Open a device and choose where its tracker goes, if possible where one was ``before``.

        Blocks. Raises ``errors.BlksnapError``.
        """

    @abstractmethod
    def in_use(self, tracker: Tracker) -> str:
        """Return what uses the node of a tracker that could not be detached, for people; empty if unknown. Blocks."""

    async def attach(self, device: Device, block_size: int, before: Placement = NOWHERE) -> Attached:
        """Open the origin, continue its saved map or begin a generation, and hand both to the data path.

        The saved map of a tracker that was lost is marked as one of an unclean end, and never continued. Raises what ``place`` raises, ``errors.Busy`` (another process has locked the file), ``errors.AlreadyTracked``
        (the same file under another name), ``errors.InvalidArgument`` (block size).
        """
        place = await asyncio.to_thread(self.place, device, before)
        with contextlib.closing(place):
            claimed, reason = await self._claim(device, place.origin, block_size)
            try:
                maps, reason = await self._add(device, place, block_size, claimed, reason)
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError | errors.TimedOut):
                    await self._withdraw(device)
                await self._give_back(device)
                raise
            finally:
                if claimed is not None:
                    claimed.data.close()
        return self._attached(maps, place.identity, reason)

    def _attached(self, maps: OriginMaps, identity: Identity, reason: str) -> Attached:
        maps.close()
        return Attached(DatapathTracker(lambda: self._datapath.client, maps.reading, identity), reason)

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

    async def _claim(
        self, device: Device, origin: Origin | None, block_size: int
    ) -> tuple[ClaimedMap | None, str]:
        fingerprint = _IN_USE if origin is None else origin.fingerprint
        try:
            claimed = await asyncio.to_thread(self._maps.claim, device.origin, fingerprint, block_size)
        except UnusableMap as error:
            return None, str(error) if origin is not None else "it was in use before it was tracked"
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise errors.Failed(
                f"the state directory cannot be used to track {device.path}: {reason}"
            ) from error
        return claimed, claimed.header.last_reset

    async def _add(
        self, device: Device, place: Place, block_size: int, claimed: ClaimedMap | None, reason: str
    ) -> tuple[OriginMaps, str]:
        client, placement = self._datapath.client, place.placement
        if claimed is not None:
            header = claimed.header
            try:
                maps = await client.origin_add(
                    device.origin,
                    place.fd(),
                    saved_map=claimed.data,
                    block_size=header.block_size,
                    generation=header.generation,
                    base=header.base,
                    active=header.active,
                    label=device.path,
                    front=self.front,
                    top=placement.top,
                    insert=placement.insert,
                )
            except errors.InvalidArgument as error:
                reason = f"the map to go on from was refused: {error}"
            else:
                return maps, reason
        maps = await client.origin_add(
            device.origin,
            place.fd(),
            block_size=block_size,
            generation=str(uuid.uuid4()),
            label=device.path,
            front=self.front,
            top=placement.top,
            insert=placement.insert,
        )
        return maps, reason

    async def detach(self, tracker: Tracker, last_reset: str, *, force: bool) -> None:
        """Take the origin from the data path and save its final map.

        Raises ``errors.Busy`` (images or clients, unless forced). A map that cannot be saved is a line in the log, and a
        new generation at the next attach: the detach itself has happened.
        """
        client = self._datapath.client
        label = (await client.origin_info(tracker.origin)).label
        # What somebody writes between the removal and the next look is seen by no tracker: then the two are different.
        before = await asyncio.to_thread(fingerprint_of, label, tracker.identity)
        try:
            maps = await client.origin_remove(tracker.origin, force=force)
        except errors.Busy as error:
            if used := await asyncio.to_thread(self.in_use, tracker):
                raise errors.Busy(f"{label} cannot be detached: {used}") from error
            raise
        with maps:
            if maps.reading.state == "broken":
                _log.warning("the map of %s is not kept: %s", label, maps.reading.reason)
                return
            try:
                await asyncio.to_thread(self._save, maps, tracker, last_reset, before)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                _log.error("the map of %s could not be saved: %s", label, reason)

    def _save(self, maps: OriginMaps, tracker: Tracker, last_reset: str, before: Fingerprint | None) -> None:
        reading = maps.reading
        if tracker.placement.insert:
            # It was in use when it was let go, and is written to by now.
            self._maps.discard(reading.origin)
            return
        fingerprint = fingerprint_of(reading.label, tracker.identity)
        if fingerprint is None:
            _log.warning("the map of %s is not kept: its file is not there any more", reading.label)
            self._maps.discard(reading.origin)
            return
        if fingerprint != before:
            _log.warning("the map of %s is not kept: it was written to while it was detached", reading.label)
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
            if reading.front == self.front:
                identity = known.get(reading.origin)
                if identity is None:
                    identity = await asyncio.to_thread(_identity, reading.label)
                tracker = DatapathTracker(lambda: self._datapath.client, reading, identity)
                found.append((tracker, reading.label))
        return found


_IN_USE = Fingerprint("in use", 0, "")
"""Of no origin any map was saved for."""


def _identity(path: str) -> Identity:
    """Return what is at ``path``, or what no file is."""
    try:
        return Identity.of(Path(path).stat())
    except OSError:
        return Identity(0, 0)
