# SPDX-License-Identifier: GPL-2.0-or-later
"""Difference storage as the kernel filter wants it: what it is given, and what limit makes it do what was asked for.

It grows a file by 1 GiB at a time (``diff_storage_minimum``) and takes that step into account where there is no room for it:
of a block device no larger than half a step it uses more than there is, and a file that is larger than the limit it refuses up
to that size and ignores the limit above. All functions block.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blksnap_service.backends.blkfilter.kernel import BLKGETSIZE64
from blksnap_service.backends.blkfilter.uapi import SECTOR, Generation
from blksnap_service.fds import OwnedFd

_PARAMETER: Final = Path("/sys/module/blksnap/parameters/diff_storage_minimum")
DEFAULT_STEP: Final = 1 << 30


@dataclass(slots=True)
class Difference:
    """Open storage, owned by whoever has this; ``limit`` is what the kernel will keep to, ``told`` what it is told. Bytes."""

    fd: OwnedFd
    limit: int
    told: int
    step: int

    def allocated(self) -> int:
        """What it takes up now."""
        status = os.fstat(self.fd.fileno())
        return self.limit if stat.S_ISBLK(status.st_mode) else status.st_blocks * SECTOR


def prepare(
    storage: OwnedFd,
    limit: int,
    generation: Generation,
    parameter: Path = _PARAMETER,
    mode: int = os.O_RDWR,
) -> Difference:
    """Make storage ready; ``storage``, open in that ``mode``, is consumed. Raises ``OSError``."""
    with storage:
        status = os.fstat(storage.fileno())
        step = _step(parameter)
        if stat.S_ISBLK(status.st_mode):
            capacity = int.from_bytes(fcntl.ioctl(storage.fileno(), BLKGETSIZE64, b"\0" * 8), "little")
            if generation.create_by_name:
                # The kernel opens it exclusively itself: ours must not be.
                fd = OwnedFd(os.open(f"/proc/self/fd/{storage.fileno()}", mode | os.O_CLOEXEC))
            else:
                fd = OwnedFd(storage.release())
            return Difference(fd, capacity, capacity, step)
        # What the kernel leaves unused is not the user's loss, where there is room for it.
        space = os.fstatvfs(storage.fileno())
        room = space.f_bavail * space.f_frsize + status.st_blocks * SECTOR
        told = max(limit, min(limit + generation.skipped_sectors * SECTOR, room), status.st_size)
        return Difference(OwnedFd(storage.release()), max(limit, status.st_size), told, step)


def _step(parameter: Path) -> int:
    try:
        return int(parameter.read_text(encoding="ascii")) * SECTOR
    except (OSError, ValueError):
        return DEFAULT_STEP
