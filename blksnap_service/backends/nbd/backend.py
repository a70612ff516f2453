# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend ``nbd``: the origin's new way in is a unix socket, and nothing is put among the system's devices."""

from __future__ import annotations

import os
from typing import ClassVar

from blksnap_service import errors
from blksnap_service.backends.datapath import usage
from blksnap_service.backends.datapath.backend import DatapathBackend, Place
from blksnap_service.backends.datapath.origin import open_origin
from blksnap_service.datapath.model import Front
from blksnap_service.devices import Device
from blksnap_service.tracker import BackendInfo, Placement, Tracker


class NbdBackend(DatapathBackend):
    """Image files, and block devices nobody uses."""

    front: ClassVar[Front] = "nbd"

    @property
    def info(self) -> BackendInfo:
        """Available while the data path is connected."""
        reason = self._datapath.trouble
        return BackendInfo("nbd", not reason, reason, snapshots=True, live_map=True, live_attach=False)

    def rank(self, device: Device) -> int:
        """After those that leave a block device one."""
        del device
        return 3

    def refusal(self, device: Device) -> errors.BlksnapError | None:
        """Return why not: no data path, read-only, mounted, not permitted."""
        if self._datapath.trouble:
            return errors.NotAvailable(self._datapath.trouble)
        if device.read_only:
            return errors.NotSupported(f"{device.path} is read-only: nothing on it can change")
        if device.kind == "block" and usage.is_held(device):
            return _busy(device)
        if device.kind == "block" and not os.access(device.path, os.R_OK | os.W_OK):
            return errors.NotAvailable(f"the service may not read and write {device.path}")
        return None

    def place(self, device: Device, before: Placement) -> Place:
        """Open it for exclusive use. Blocks. Raises as ``open_origin``."""
        del before
        try:
            origin = open_origin(device)
        except errors.Busy as error:
            if device.kind != "block":
                raise
            raise _busy(device) from error
        return Place(origin.identity, origin, Placement())

    def in_use(self, tracker: Tracker) -> str:
        """Return nothing: the data path knows its clients best."""
        del tracker
        return ""


def _busy(device: Device) -> errors.Busy:
    return errors.Busy(
        f"{device.path} is in use, {usage.describe(device.number)}: end that before it is tracked by nbd"
    )
