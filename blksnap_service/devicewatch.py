# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens to trackers when their devices come, go or grow: an ``inventory.Follower``.

The data path sees by itself, within a second, that a device under it is gone or has become smaller, and fails its I/O; this
makes sure that it is asked, and does what nobody else does. One task per device at a time, so one that hangs holds up
no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from blksnap_service import errors
from blksnap_service.devices import Device

_log = logging.getLogger(__name__)

BROKEN_WITHIN_S = 5.0
_ASK_S = 0.2


class Trackers(Protocol):
    """What is needed of ``trackers.Registry``."""

    async def refresh(self, name: str, reason: str = "") -> None:
        """Make a reading and tell what changed; ``reason`` explains a new generation."""

    async def resize(self, name: str) -> None:
        """Have a tracker go by the present size of its device."""

    def trouble(self, name: str) -> str | None:
        """Return why a tracker is broken, empty if it is not, None if there is no tracker."""


class DeviceWatch:
    """Follows an inventory."""

    def __init__(self, trackers: Trackers, attach: Callable[[Device], Awaitable[None]]) -> None:
        """``attach`` attaches a device that is to be tracked always; it is used after ``begin``."""
        self._trackers = trackers
        self._attach = attach
        self._begun = False
        self._last: dict[str, asyncio.Task[None]] = {}

    def begin(self) -> None:
        """Attach what is found from now on; what was there before is the caller's."""
        self._begun = True

    def close(self) -> None:
        """Stop what is under way."""
        for task in self._last.values():
            task.cancel()

    def device_found(self, device: Device) -> None:
        """Attach it."""
        if self._begun:
            self._then(device, self._found)

    def device_lost(self, device: Device) -> None:
        """Have its tracker notice."""
        self._then(device, self._lost)

    def device_resized(self, device: Device) -> None:
        """Have its tracker grow with it."""
        self._then(device, self._resized)

    def _then(self, device: Device, step: Callable[[Device], Awaitable[None]]) -> None:
        before = self._last.get(device.name)

        async def run() -> None:
            if before is not None:
                await asyncio.wait([before])
            try:
                await step(device)
            except errors.BlksnapError as error:
                _log.error("%s: %s", device.path, error)

        task = asyncio.get_running_loop().create_task(run())
        self._last[device.name] = task
        task.add_done_callback(lambda done: self._forget(device.name, done))

    def _forget(self, name: str, task: asyncio.Task[None]) -> None:
        if self._last.get(name) is task:
            del self._last[name]

    async def _found(self, device: Device) -> None:
        await self._attach(device)

    async def _lost(self, device: Device) -> None:
        _log.error("%s is gone, or another medium is in it, while it is tracked", device.path)
        end = asyncio.get_running_loop().time() + BROKEN_WITHIN_S
        while (trouble := self._trackers.trouble(device.name)) == "":
            if asyncio.get_running_loop().time() > end:
                _log.error("the tracker of %s does not notice that its device is gone", device.path)
                return
            await asyncio.sleep(_ASK_S)
            await self._trackers.refresh(device.name)
        if trouble is not None:
            _log.error("the tracker of %s is broken: %s", device.path, trouble)

    async def _resized(self, device: Device) -> None:
        _log.warning("%s now has %d bytes", device.path, device.size)
        await self._trackers.resize(device.name)
        await self._trackers.refresh(device.name, "the size of the device changed")
