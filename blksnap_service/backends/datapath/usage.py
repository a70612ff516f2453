# SPDX-License-Identifier: GPL-2.0-or-later
"""What keeps a block device from being opened exclusively, in words for the one who wanted to.

The kernel only says EBUSY. What is said here is looked up afterwards, in this mount namespace, so it can miss the one who
was in the way but never names one who is not there. All functions block shortly.
"""

from __future__ import annotations

from pathlib import Path

from blksnap_service import sysblock
from blksnap_service.devices import Device
from blksnap_service.mounts import mount_points

_SWAPS = Path("/proc/swaps")


def is_held(device: Device) -> bool:
    """Whether a file system or another device is on it, as far as one can see; never for a program that has it open.

    What is listed of a device may be a moment old, and has where a node of its tracker is mounted, too.
    """
    mounted = device.mount_points and device.number in mount_points()
    return bool(mounted or sysblock.holders(device.number))


def describe(number: int) -> str:
    """Return what uses a device, as the end of a sentence about it."""
    mounts = mount_points()
    for device in (number, *sysblock.partitions(number)):
        if targets := mounts.get(device):
            where = "it is" if device == number else f"its partition {sysblock.kernel_name(device)} is"
            return f"{where} mounted on {', '.join(targets)}"
        if _is_swap(device):
            where = "it" if device == number else f"its partition {sysblock.kernel_name(device)}"
            return f"{where} is used as swap space"
        if held := sysblock.holders(device):
            return f"it belongs to {', '.join(_shown(holder) for holder in held)}"
    return "another program uses it, or it is mounted where this service does not see it"


def _shown(number: int) -> str:
    name = sysblock.dm_name(number)
    return f"/dev/mapper/{name}" if name else f"/dev/{sysblock.kernel_name(number)}"


def _is_swap(number: int) -> bool:
    try:
        lines = _SWAPS.read_text(errors="replace").splitlines()[1:]
    except OSError:
        return False
    for line in lines:
        try:
            if Path(line.split()[0]).stat().st_rdev == number:
                return True
        except (OSError, IndexError):
            continue
    return False
