# SPDX-License-Identifier: GPL-2.0-or-later
"""Opens the file systems that have to be frozen around a take, and that device-mapper does not freeze by itself.

Suspending a device-mapper device freezes the file system right on it, in whatever mount namespace; those on
partitions, on logical volumes above, or on a bare ublk device are frozen through a descriptor (ioctl_fifreeze, fs/ioctl.c).
Opening may hang where a file system does: it happens in threads nobody waits for for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from blksnap_service import sysblock
from blksnap_service.datapath.model import OriginReading
from blksnap_service.fds import OwnedFd
from blksnap_service.mounts import mount_points

_log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 3.0
MOST = 64
"""Descriptors with one request; there are as many as file systems on tracked devices."""


async def open_mounts(readings: Sequence[OriginReading]) -> list[OwnedFd]:
    """Open each file system on the nodes of these origins that needs it, once.

    One that cannot be opened is a line in the log: its image is as after a power cut.
    """
    targets = await asyncio.to_thread(_targets, [reading for reading in readings if reading.front == "ublk"])
    opened = await asyncio.gather(*(_open_somehow(target) for target in targets[:MOST]))
    return [fd for fd in opened if fd is not None]


def _targets(readings: Sequence[OriginReading]) -> list[str]:
    """Return one mount point of each file system. Blocks shortly."""
    if not readings:
        return []
    mounts = mount_points()
    found: dict[int, str] = {}
    for reading in readings:
        frozen, start = 0, sysblock.ublk_number(reading.ublk_id)
        if name := reading.insert or reading.top:
            frozen = start = sysblock.dm_number(name)
        for device in sysblock.above(start) - {frozen}:
            if targets := mounts.get(device):
                found[device] = targets[0]
    return list(found.values())


async def _open_somehow(target: str) -> OwnedFd | None:
    future = _open(target)
    taken = False
    try:
        await asyncio.wait([asyncio.wrap_future(future)], timeout=OPEN_TIMEOUT_S)
        if not future.done():
            _log.warning("%s does not answer: it is not frozen for the snapshot", target)
        elif isinstance(error := future.exception(), OSError):
            reason = (error.strerror or str(error)).lower()
            _log.warning("%s is not frozen for the snapshot: %s", target, reason)
        else:
            taken = True
            return future.result()
    finally:
        if not taken:
            future.add_done_callback(_discard)
    return None


def _open(target: str) -> Future[OwnedFd]:
    """Open a directory in a thread that may hang: the program does not wait for it when it ends."""
    future: Future[OwnedFd] = Future()

    def work() -> None:
        try:
            future.set_result(OwnedFd(os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)))
        except OSError as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="open-mount").start()
    return future


def _discard(future: Future[OwnedFd]) -> None:
    if future.exception() is None:
        future.result().close()
