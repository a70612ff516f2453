# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend ``ublk``: chooses where a tracker goes among the system's devices, and says why it cannot go there.

A device nobody uses gets a new one on top. A device-mapper device in use gets the tracker under it, and stays what is
mounted. Anything else in use is refused: a file system keeps the device it was mounted from.
"""

from __future__ import annotations

import re
from typing import ClassVar

from blksnap_service import errors, sysblock
from blksnap_service.backends.datapath import usage
from blksnap_service.backends.datapath.backend import DatapathBackend, Place
from blksnap_service.backends.datapath.origin import open_origin
from blksnap_service.datapath.model import Front
from blksnap_service.devices import Device
from blksnap_service.tracker import BackendInfo, Placement, Tracker

_PREFIX = "blksnap-"
_NAME_MAX = 100
"""Less than DM_NAME_LEN (linux/dm-ioctl.h, 128), so that what is added to a name fits."""


class UblkBackend(DatapathBackend):
    """Block devices, with file systems on them."""

    front: ClassVar[Front] = "ublk"

    @property
    def info(self) -> BackendInfo:
        """Available while the data path says so; live attach, to device-mapper devices, while it has those."""
        hello, trouble = self._datapath.hello, self._datapath.trouble
        available = not trouble and hello.ublk.available
        return BackendInfo(
            "ublk",
            available,
            "" if available else trouble or hello.ublk.reason,
            snapshots=True,
            live_map=True,
            live_attach=available and hello.dm.available,
        )

    def rank(self, device: Device) -> int:
        """Before the kernel filter where nobody has to be moved: its map is live, and its numbers do not run out."""
        del device
        return 1

    def refusal(self, device: Device) -> errors.BlksnapError | None:
        """Return why not: no ublk, an image file, of a kind nothing can be put over, in use and not device-mapper's."""
        info = self.info
        if not info.available:
            return errors.NotAvailable(f"{device.path} cannot be tracked by ublk: {info.reason}")
        if device.kind != "block":
            return errors.NotSupported(f"{device.path} is an image file: use the backend nbd")
        reason = "it is read-only" if device.read_only else sysblock.unsupported(device.number)
        if reason:
            return errors.NotSupported(f"{device.path} cannot be tracked by ublk: {reason}")
        if usage.is_held(device) and not self._can_insert(device):
            return _busy(device)
        return None

    def place(self, device: Device, before: Placement) -> Place:
        """Open it for exclusive use, or choose to get under it. Blocks.

        Raises as ``open_origin``, and what ``refusal`` returns.
        """
        if (refusal := self.refusal(device)) is not None:
            raise refusal
        try:
            origin = open_origin(device)
        except errors.Busy as error:
            if not self._can_insert(device):
                raise _busy(device) from error
            return Place(device.identity, None, Placement("", _live_name(device)))
        top = (before.top or top_name(device)) if self._datapath.hello.dm.available else ""
        return Place(origin.identity, origin, Placement(top))

    def in_use(self, tracker: Tracker) -> str:
        """Return what uses the node, and what to do."""
        placement = tracker.placement
        number = (
            sysblock.dm_number(placement.top) if placement.top else sysblock.ublk_number(placement.ublk_id)
        )
        if not number:
            return ""
        return (
            f"its node {tracker.node} is in use, {usage.describe(number)}; end that, or give the option force"
        )

    def _can_insert(self, device: Device) -> bool:
        return self._datapath.hello.dm.available and bool(_live_name(device))


def _live_name(device: Device) -> str:
    """Return the device-mapper device the tracker of a device in use can get under; empty if there is none.

    That is the device itself, or a node of ours that was left straight over it: by a detach that was forced, or at boot.
    """
    if name := sysblock.dm_name(device.number):
        return name
    holders = [sysblock.dm_name(holder) for holder in sysblock.holders(device.number)]
    return holders[0] if len(holders) == 1 and holders[0].startswith(_PREFIX) else ""


def top_name(device: Device) -> str:
    """Return what the device-mapper device over a device is called: ``blksnap-`` and what the device is called.

    Only with characters udev leaves as they are in ``/dev/mapper`` (libdevmapper, DM_STRING_MANGLING_AUTO).
    """
    name = device.node_name or sysblock.dm_name(device.number) or sysblock.kernel_name(device.number)
    return _PREFIX + re.sub(r"[^A-Za-z0-9#+.:=@_-]", "_", name)[:_NAME_MAX]


def _busy(device: Device) -> errors.Busy:
    return errors.Busy(
        f"{device.path} is in use, {usage.describe(device.number)}: ublk cannot get under it. Unmount it or stop what uses"
        " it, attach it, and mount the Node of its tracker instead"
    )
