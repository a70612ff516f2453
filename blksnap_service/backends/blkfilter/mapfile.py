# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the kernel's map into a sealed memory file, consistently with what it says of it.

Information and map are two calls, and a take or a reset may come between: both are made again until the information
before is that after. Nothing is copied on the way: the kernel writes into the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Final

import numpy as np

from blksnap_service import errors
from blksnap_service.backends.blkfilter.kernel import FilteredDevice
from blksnap_service.backends.blkfilter.uapi import CbtInfo
from blksnap_service.fds import OwnedFd

_ATTEMPTS: Final = 100
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(slots=True)
class ReadMap:
    """A map and what the kernel said of it; ``fd`` is read-only, sealed, and owned by whoever has this."""

    info: CbtInfo
    fd: OwnedFd


class UntrustedMap(Exception):
    """Raised when the kernel does not trust its map any more."""


def consistent_info(device: FilteredDevice) -> tuple[CbtInfo, bool]:
    """What map there is, and whether the kernel trusts it. Blocks. Raises as ``FilteredDevice.info``."""
    for _ in range(_ATTEMPTS):
        info = device.info()
        trusted = device.is_trusted()
        if device.info() == info:
            return info, trusted
    raise _restless(device)


def read(device: FilteredDevice, before: ReadMap | None) -> ReadMap:
    """Read the map of the last take; ``before`` itself, if it says the same. Blocks.

    Raises ``UntrustedMap``, and as ``FilteredDevice.info``.
    """
    for _ in range(_ATTEMPTS):
        info = device.info()
        with OwnedFd(os.memfd_create("blksnap-map", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as memory:
            os.ftruncate(memory.fileno(), info.block_count)
            # In memory before the kernel writes to it: an old one may not wait for memory there (it holds the queue).
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            with mmap.mmap(memory.fileno(), info.block_count, flags=flags) as window:
                # At the wrap the map read is still that of the old generation: in the new one nothing has changed yet.
                with memoryview(window) as view:
                    if not info.wrapped and not device.read_map(view):
                        raise UntrustedMap
                if device.info() != info:
                    continue
                if before is not None and before.info == info and _same(before, window):
                    return before
            fcntl.fcntl(memory.fileno(), fcntl.F_ADD_SEALS, _SEALS)
            # Opened anew: a descriptor that could write cannot be made read-only.
            return ReadMap(
                info, OwnedFd(os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY | os.O_CLOEXEC))
            )
    raise _restless(device)


def _same(before: ReadMap, window: mmap.mmap) -> bool:
    with mmap.mmap(before.fd.fileno(), before.info.block_count, prot=mmap.PROT_READ) as old:
        one, other = np.frombuffer(old, np.uint8), np.frombuffer(window, np.uint8)
        same = bool(np.array_equal(one, other))
        # Arrays keep what they look at from being closed.
        del one, other
        return same


def _restless(device: FilteredDevice) -> errors.Busy:
    with contextlib.suppress(errors.BlksnapError):
        device.info()
    return errors.Busy(f"the map of {device.target.path} changes again and again while it is read: try later")
