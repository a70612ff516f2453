# SPDX-License-Identifier: GPL-2.0-or-later
"""Backends that have a name but are not written yet, so that nobody has to guess why they do nothing."""

from __future__ import annotations

from collections.abc import Mapping

from blksnap_service import errors
from blksnap_service.devices import Device
from blksnap_service.storage import Identity
from blksnap_service.tracker import NOWHERE, Attached, BackendInfo, Placement, Tracker


class PlannedBackend:
    """A backend that tracks nothing."""

    def __init__(self, name: str, *, snapshots: bool, live_map: bool) -> None:
        """Say what it will be able to do."""
        reason = "this version of blksnap does not have it yet"
        self.info = BackendInfo(name, False, reason, snapshots=snapshots, live_map=live_map, live_attach=True)

    def rank(self, device: Device) -> int:
        """Last."""
        del device
        return 9

    def refusal(self, device: Device) -> errors.BlksnapError:
        """Return the reason."""
        return errors.NotAvailable(f"{device.path} cannot be tracked by {self.info.name}: {self.info.reason}")

    async def attach(self, device: Device, block_size: int, before: Placement = NOWHERE) -> Attached:
        """Raise the reason."""
        del block_size, before
        raise self.refusal(device)

    async def detach(self, tracker: Tracker, last_reset: str, *, force: bool) -> None:
        """Raise that there is nothing to detach."""
        del last_reset, force
        raise errors.NotTracked(f"{tracker.origin} is not tracked by {self.info.name}")

    async def discover(self, known: Mapping[str, Identity]) -> list[tuple[Tracker, str]]:
        """Return nothing."""
        del known
        return []
