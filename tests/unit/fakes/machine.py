# SPDX-License-Identifier: GPL-2.0-or-later
"""Block devices that are not there: a tree like sysfs, mount points, and files in place of nodes.

For what one cannot have without root and a kernel of one's own; tests/vm has the real ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from blksnap_service import errors, sysblock
from blksnap_service.backends.datapath import freeze, usage
from blksnap_service.backends.datapath.origin import Origin, open_origin
from blksnap_service.backends.nbd import backend as nbd
from blksnap_service.backends.ublk import backend as ublk
from blksnap_service.devices import Device, escape
from blksnap_service.fds import OwnedFd
from blksnap_service.storage import Identity
from tests.unit.fakes.service import MIB, image_file


class Machine:
    """Disks, partitions and device-mapper devices of one test."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.sys = directory / "sys"
        self.in_use: set[str] = set()
        """Paths of devices that cannot be opened exclusively."""
        self.mounted: dict[int, tuple[str, ...]] = {}
        self.swaps = directory / "swaps"
        self.swaps.write_text("Filename Type Size Used Priority\n")
        self._minor = 0
        patch.setattr(sysblock, "_SYS", self.sys)
        patch.setattr(usage, "_SWAPS", self.swaps)
        for module in (usage, freeze):
            patch.setattr(module, "mount_points", self._mount_points)
        patch.setattr(freeze, "mounted_device", self._mounted_device)
        for module in (ublk, nbd):
            patch.setattr(module, "open_origin", self._open_origin)

    def disk(self, name: str, **attributes: str) -> Device:
        """Make a disk; ``attributes`` are files, with ``__`` for ``/``."""
        return self._device(name, self.sys / "devices" / name, {"queue__zoned": "none"} | attributes)

    def partition(self, disk: Device, name: str) -> Device:
        """Make a partition of a disk."""
        directory = sysblock.node(disk.number) / name
        return self._device(name, directory, {"partition": "1"})

    def dm(self, name: str, *below: Device) -> Device:
        """Make a device-mapper device of that name over others."""
        made = self.disk(f"dm-{self._minor}", dm__name=name)
        for device in below:
            self.hold(device, made)
        return made

    def hold(self, device: Device, holder: Device) -> None:
        """Let a device belong to another one."""
        holders = sysblock.node(device.number) / "holders"
        holders.mkdir(exist_ok=True)
        (holders / Path(holder.path).name).symlink_to(sysblock.node(holder.number))
        self.in_use.add(device.path)

    def mount(self, device: Device, *targets: str) -> Device:
        """Mount a device; returns what the inventory has of it then."""
        self.mounted[device.number] = targets
        self.in_use.add(device.path)
        return replace(device, mount_points=targets)

    def _device(self, name: str, directory: Path, attributes: Mapping[str, str]) -> Device:
        self._minor += 1
        number = os.makedev(240, self._minor)
        for file, text in {"dev": f"240:{self._minor}", **attributes}.items():
            path = directory / file.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        for link in (self.sys / "block" / name, self.sys / "dev" / "block" / f"240:{self._minor}"):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(directory)
        node = image_file(self.directory, name)
        return Device(escape(name), "block", str(node), Identity(number, 0), MIB)

    def _mount_points(self) -> Mapping[int, tuple[str, ...]]:
        return self.mounted

    def _mounted_device(self, fd: OwnedFd) -> int:
        target = str(Path(f"/proc/self/fd/{fd.fileno()}").readlink())
        return next((number for number, targets in self.mounted.items() if target in targets), 0)

    def _open_origin(self, device: Device) -> Origin:
        if device.path in self.in_use:
            raise errors.Busy(f"{device.path} cannot be opened: device or resource busy")
        return open_origin(replace(device, kind="file"))
